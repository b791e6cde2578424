"""Lingo-Judge: a classifier of whether a free answer about driving is correct (LingoQA 2023).

    judge = lingo_judge.load()                     # or load(fallback=True) without its weights
    judge.right(question, references, prediction)  # bool

The classifier runs in transformers with torch. Without its weights `load` raises an error, unless
a fallback is allowed: token F1, a different metric, which `Judge.name` and every table state.
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
LONGEST = 128  # tokens; longer texts are truncated


@dataclasses.dataclass(frozen=True)
class Judge:
    """A judge of answers.

    Attributes:
      name: Its name for tables.
      probability: (question, reference, prediction) -> probability that the prediction is
        correct, 0 to 1.
    """

    name: str
    probability: Callable[[str, str, str], float]

    @property
    def is_fallback(self) -> bool:
        """Whether this is token F1 in place of the classifier."""
        return self.name == FALLBACK

    def score(self, question: str, references: Sequence[str], prediction: str) -> float:
        """Return the highest probability over the references, as in the LingoQA benchmark."""
        if not references:
            raise ValueError(f"question {question!r} has no reference answer to judge by")
        prediction = prediction.lower().strip()
        return max(self.judged(question, r.lower().strip(), prediction) for r in references)

    def judged(self, question: str, reference: str, prediction: str) -> float:
        """Return the probability for one reference.

        Raises:
          ValueError: The classifier returned no probability, such as nan.
        """
        probability = self.probability(question, reference, prediction)
        if not 0 <= probability <= 1:
            raise ValueError(
                f"{self.name} gave {probability} for question {question!r:.80}, not a probability"
            )
        return probability

    def right(self, question: str, references: Sequence[str], prediction: str) -> bool:
        """Return whether the score is above one half."""
        return self.score(question, references, prediction) > 0.5


def load(source: str | pathlib.Path = WEIGHTS, *, fallback: bool = False) -> Judge:
    """Load the judge.

    Args:
      source: A folder, or a name in the local cache of the hub; nothing is downloaded.
      fallback: Whether to use token F1 if the classifier cannot be loaded.

    Raises:
      FileNotFoundError: The classifier or torch is missing, and no fallback is allowed.
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
    """Return the input of the classifier."""
    return f"{cls}\nQuestion: {question}\nAnswer: {reference}\nStudent: {prediction}"


def token_f1(question: str, reference: str, prediction: str) -> float:
    """Compute F1 of the words of a prediction, the fallback; the question is unused."""
    predicted, wanted = (re.findall(r"\w+", text.lower()) for text in (prediction, reference))
    if not predicted or not wanted:
        return float(predicted == wanted)
    common = (collections.Counter(predicted) & collections.Counter(wanted)).total()
    return 2 * common / (len(predicted) + len(wanted))


def _classifier(source: str | pathlib.Path) -> Callable[[str, str, str], float]:
    import torch
    import transformers

    how = {"local_files_only": True, "trust_remote_code": False}
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, **how)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(source, **how).eval()
    if model.config.num_labels != 1:
        raise ValueError(f"a judge has one output, this classifier has {model.config.num_labels}")

    def probability(question: str, reference: str, prediction: str) -> float:
        prompt = text(tokenizer.cls_token, question, reference, prediction)
        inputs = tokenizer(prompt, return_tensors="pt", truncation=True, max_length=LONGEST)
        with torch.inference_mode():
            return 1 / (1 + math.exp(-model(**inputs).logits.item()))

    return probability
