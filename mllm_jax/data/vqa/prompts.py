"""The prompts of MMNeuron, verbatim (Huo et al. 2024; its released code, December 2024).

Each of them contains `<image>`, so that the processor adds no chat template. For models that the
paper does not have, "chat" omits it in generation, so that the checkpoint's own template is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

DATASETS = ("lingoqa", "pmc_vqa", "rsvqa_hr", "vqav2", "docvqa")  # in the paper's order
Model = Literal["llava_next", "instructblip", "chat"]
Pass = Literal["activation", "lens", "generation"]
MODELS: tuple[Model, ...] = get_args(Model)
PASSES: tuple[Pass, ...] = get_args(Pass)

_ROLE = (
    "Role: You are an advanced AI assistant installed on the Ego vehicle, equipped with "
    "conversational analysis capabilities for discussing autonomous driving scenarios. The "
    "perspective presented is from the point-of-view of the Ego vehicle, where the camera is "
    "mounted. It's important to note that the Ego vehicle itself is not visible in the images "
    "provided. "
)
_SHORT = "\nAnswer the question using a single word or phrase."
_LETTER = "\n\nAnswer with the option's letter from the given choices directly."
_NO_CONTEXT = "Context: N/A"
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: {} ASSISTANT:"
)


def prompt(
    dataset: str,
    question: str,
    choices: Sequence[str] = (),
    *,
    model: Model,
    of: Pass = "generation",
) -> str:
    """Return the prompt of a question.

    Args:
      dataset: One of DATASETS.
      question: The question in the data set's words.
      choices: Its options in the data set's words, "A:..." included; only for pmc_vqa.
      model: One of MODELS; used for generation only.
      of: The pass that reads the prompt: "activation", where neurons are counted, gives the bare
        question; "lens" the question with its instruction; "generation" the same in the model's
        template.

    Raises:
      ValueError: A name is unknown, or the data set takes no choices, or needs them.
    """
    for name, value, known in (
        ("data set", dataset, DATASETS), ("model", model, MODELS), ("pass", of, PASSES),
    ):  # fmt: skip
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; known are {', '.join(known)}")
    if (dataset == "pmc_vqa") != bool(choices):
        raise ValueError(f"only pmc_vqa takes choices; {dataset} was given {list(choices)}")
    if of == "activation":
        return f"<image>\n{question}"
    body = _body(dataset, question, choices)
    if of == "lens":
        return f"<image>\n{body}"
    if model == "chat":
        return body
    if model == "llava_next":
        return _VICUNA.format(f"<image>\n{body}")
    return "<image>" + body.replace(_NO_CONTEXT, "").replace(_SHORT, " Short Answer:")


def _body(dataset: str, question: str, choices: Sequence[str]) -> str:
    if dataset == "lingoqa":
        return f"{_ROLE}Question: {question}"
    if dataset == "pmc_vqa":
        return f"Question: {question}\n{_NO_CONTEXT}\nOptions: {list(choices)}{_LETTER}"
    return f"Question: {question}{_SHORT}"
