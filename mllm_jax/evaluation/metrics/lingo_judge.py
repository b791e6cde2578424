"""Lingo-Judge: a classifier that says whether a free answer about driving is right (LingoQA 2023).

    judge = lingo_judge.load()                     # or load(fallback=True) without its weights
    judge.right(question, references, prediction)  # bool

The classifier runs in transformers with torch. Where its weights are not at hand, `load` is an
error, unless a fallback is asked for: words in common, which is another metric and says so in
`Judge.name` and in every table that carries it.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import pathlib
import re
from collections.abc import Callable, Sequence

WEIGHTS = "wayveai/Lingo-Judge"
FALLBACK = "token F1 (fallback, NOT Lingo-Judge)"
LONGEST = 128  # tokens; the rest of a text is cut


@dataclasses.dataclass(frozen=True)
class Judge:
    """Scores answers.

    Attributes:
        name: what to write over the numbers.
        probability: of (question, reference, prediction) that the prediction is right, 0 to 1.
    """

    name: str
    probability: Callable[[str, str, str], float]

    @property
    def is_fallback(self) -> bool:
        """Return whether this is not the released judge."""
        return self.name == FALLBACK

    def score(self, question: str, references: Sequence[str], prediction: str) -> float:
        """The highest probability over the references, as the LingoQA benchmark takes it."""
        if not references:
            raise ValueError(f"question {question!r} has no reference answer to judge by")
        prediction = prediction.lower().strip()
        return max(self.judged(question, r.lower().strip(), prediction) for r in references)

    def judged(self, question: str, reference: str, prediction: str) -> float:
        """The probability of one reference, checked.

        Raises:
            ValueError: the classifier gave what is no probability, such as nan.
        """
        found = self.probability(question, reference, prediction)
        if not 0 <= found <= 1:
            raise ValueError(
                f"{self.name} gave {found} for question {question!r:.80}, no probability"
            )
        return found

    def right(self, question: str, references: Sequence[str], prediction: str) -> bool:
        """Whether the score is above one half."""
        return self.score(question, references, prediction) > 0.5


def load(source: str | pathlib.Path = WEIGHTS, *, fallback: bool = False) -> Judge:
    """The judge.

    Args:
        source: a folder, or a name in the local cache of the hub; nothing is downloaded.
        fallback: take token F1 where the classifier cannot be loaded.

    Raises:
        FileNotFoundError: the classifier or torch is missing, and no fallback was asked for.
    """
    try:
        return Judge(str(source), _classifier(source))
    except (ImportError, OSError, ValueError) as error:
        if fallback:
            return Judge(FALLBACK, token_f1)
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"Lingo-Judge cannot be loaded from {source} ({reason}): install torch and fetch it "
            f"with `hf download {WEIGHTS}`, or pass fallback=True for token F1, another metric"
        ) from error


def text(cls: str, question: str, reference: str, prediction: str) -> str:
    """What the classifier reads."""
    return f"{cls}\nQuestion: {question}\nAnswer: {reference}\nStudent: {prediction}"


def token_f1(question: str, reference: str, prediction: str) -> float:
    """F1 of the words that reference and prediction share; the fallback. The question is unused."""
    said, wanted = (re.findall(r"\w+", words.lower()) for words in (prediction, reference))
    if not said or not wanted:
        return float(said == wanted)
    common = (collections.Counter(said) & collections.Counter(wanted)).total()
    return 2 * common / (len(said) + len(wanted))


def _classifier(source: str | pathlib.Path) -> Callable[[str, str, str], float]:
    import torch
    import transformers

    how = {"local_files_only": True, "trust_remote_code": False}
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, **how)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(source, **how).eval()
    if model.config.num_labels != 1:
        raise ValueError(f"a judge has one output, this classifier has {model.config.num_labels}")

    def probability(question: str, reference: str, prediction: str) -> float:
        asked = text(tokenizer.cls_token, question, reference, prediction)
        inputs = tokenizer(asked, return_tensors="pt", truncation=True, max_length=LONGEST)
        with torch.inference_mode():
            return 1 / (1 + math.exp(-model(**inputs).logits.item()))

    return probability
