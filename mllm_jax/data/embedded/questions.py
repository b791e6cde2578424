"""Questions about an image, made from its label alone: the same four styles in every domain.

Domain and answer style must not coincide, or "domain neurons" could be answer-style neurons. Every
image has a question for its kind, one for its category, two yes/no questions (one of each answer)
and a multiple choice. Wrong options come from the same family of labels, so that
neither the prompt nor the frequency of an answer gives it away.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence

# The answer to "What kind of picture is this?", by domain.
KINDS = {
    "objects": "a picture of an object",
    "medical": "a medical scan",
    "satellite": "a satellite image",
    "documents": "a document",
    "astronomy": "an astronomy photograph",
}
STYLES = ("kind", "category", "yesno", "choice")
MANY = 1000  # names of a family from which a few are drawn instead of sorting all

PROMPTS = {
    "kind": (
        "What kind of picture is this?",
        "What type of image is this?",
        "What sort of picture do you see?",
        "How would you describe this kind of image?",
    ),
    "category": (
        "What is shown in the picture?",
        "What does the image show?",
        "What can be seen here?",
        "What is this a picture of?",
    ),
    "yesno": ("Is this {}?", "Does the picture show {}?", "Is {} shown here?"),
    "choice": (
        "Which is shown: {}?",
        "What do you see: {}?",
        "What is in the picture: {}?",
    ),
}


@dataclasses.dataclass(frozen=True)
class Question:
    """One question about one image.

    Attributes:
      style: "kind", "category", "yesno", "choice", or a style of the user.
      prompt: The question, without `<image>`.
      answer: The right answer.
      options: The candidates for scoring, the right answer among them.
    """

    style: str
    prompt: str
    answer: str
    options: tuple[str, ...]

    def __post_init__(self):
        if self.answer not in self.options:
            raise ValueError(
                f"question {self.prompt!r}: the answer {self.answer!r} is not among its options "
                f"{list(self.options)}"
            )


def shuffled(items: Iterable[str], key: str) -> list[str]:
    """Return the items in an order that depends on the items and the key alone."""
    return sorted(items, key=lambda item: hashlib.sha256(f"{key}\0{item}".encode()).digest())


def others(answer: str, family: Sequence[str], key: str, count: int) -> list[str]:
    """Return members of a family that are not the answer.

    From a large family they are drawn, so that the time does not grow with the family.

    Args:
      answer: The answer.
      family: The family.
      key: The text that determines the choice.
      count: The number of members; a smaller family gives all.
    """
    drawn: dict[str, None] = {}
    for number in range(8 * count if len(family) > MANY else 0):
        digest = hashlib.sha256(f"{key}\0{number}".encode()).digest()
        name = family[int.from_bytes(digest[:8], "big") % len(family)]
        if name != answer:
            drawn[name] = None
        if len(drawn) == count:
            return list(drawn)
    return shuffled({*family} - {answer}, key)[:count]


def options_for(answer: str, family: Sequence[str], key: str, count: int = 4) -> tuple[str, ...]:
    """Return the answer and `count - 1` others of its family, in a shuffled order."""
    wrong = others(answer, family, f"{key} wrong", count - 1)
    return tuple(shuffled([answer, *wrong], f"{key} order"))


def questions_for(
    key: str, label: str, family: Sequence[str], kind: str | None = None
) -> tuple[Question, ...]:
    """Return all questions about one image.

    Args:
      key: The example's id, which decides the wording and the options.
      label: What the image shows, such as "a galaxy".
      family: The labels for wrong options, the label itself among them.
      kind: The kind of the picture, a value of KINDS; None makes no such question.

    Returns:
      The questions, in the order of STYLES.
    """

    def prompt(style: str, salt: str = "") -> str:
        return shuffled(PROMPTS[style], f"{key} {style} {salt}")[0]

    questions = []
    if kind is not None:
        options = options_for(kind, tuple(KINDS.values()), f"{key} kind")
        questions.append(Question("kind", prompt("kind"), kind, options))
    options = options_for(label, family, f"{key} category")
    questions.append(Question("category", prompt("category"), label, options))
    if wrong := others(label, family, f"{key} yesno", 1):
        for answer, shown in (("yes", label), ("no", wrong[0])):
            text = _capitalised(prompt("yesno", answer).format(shown))
            questions.append(Question("yesno", text, answer, ("yes", "no")))
        options = options_for(label, family, f"{key} choice")
        listed = ", ".join(options[:-1]) + f" or {options[-1]}"
        questions.append(Question("choice", prompt("choice").format(listed), label, options))
    return tuple(questions)


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]
