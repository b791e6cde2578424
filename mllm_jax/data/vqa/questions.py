"""A question of a VQA data set, with what its metrics need."""

from __future__ import annotations

import dataclasses

from mllm_jax.data.embedded import questions


@dataclasses.dataclass(frozen=True)
class VqaQuestion(questions.Question):
    """One question about one picture.

    Attributes:
      style: "choice" with options, else "open".
      prompt: The prompt that the model reads.
      answer: One right answer: the letter of an option, or the first of `answers`.
      options: The candidates for scoring: the letters, or the distinct answers.
      id: The id in the data set. In lingoqa several rows ask the same question and share it.
      text: The question without a prompt.
      answers: All answers: of ten people (vqav2), of each annotator (docvqa), or one.
      confidence: How sure each person was, "yes", "maybe" or "no" (vqav2 only).
      choices: The texts of the options (pmc_vqa only).
      type: The type of question, such as "count"; empty if the data set has none.
    """

    id: str = ""
    text: str = ""
    answers: tuple[str, ...] = ()
    confidence: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    type: str = ""
