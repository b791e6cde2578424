"""LLaVA's training data as a domain: a JSON list of conversations about images.

    [{"id": "1", "image": "coco/1.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is shown?"},
        {"from": "gpt", "value": "A cat."}]}]

The first question of each conversation is asked, with its answer: later ones depend on what was
said before. Records without an image, or with several, are counted and left out.
"""

from __future__ import annotations

import collections
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

from mllm_jax import files
from mllm_jax.data.domains.table import Record

IMAGE = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def flattened(path: pathlib.Path, records: Sequence[Record]) -> list[Record]:
    """Records with a question and an answer in place of their conversations, if they have any."""
    made, unused = [], collections.Counter()
    for where, record in records:
        if "conversations" not in record:
            made.append((where, record))
            continue
        turns = _turns(record["conversations"], where)
        images = record.get("image", [])
        images = images if isinstance(images, list) else [images]
        if len(images) != 1:
            unused[f"records with {'several images' if images else 'no image'}"] += 1
            continue
        asked = {"image": images[0], "question": turns[0], "answer": turns[1]}
        made.append((where, asked))
        if len(turns) > 2:
            unused["later questions"] += (len(turns) - 2) // 2
    if unused:
        said = ", ".join(f"{what} {count}" for what, count in sorted(unused.items()))
        logging.getLogger(__name__).warning(f"{files.name(path)}: not used: {said}")
    return made


def _turns(conversation: Any, where: str) -> list[str]:
    """What was said, in turn by user and assistant, the picture's place left out."""
    said, roles = [], []
    for turn in conversation if isinstance(conversation, list) else [None]:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise ValueError(f"{where}: conversations is not a list of {{from, value}}")
        if turn.get("from") == "system":
            continue
        roles.append(ROLES.get(str(turn.get("from"))))
        said.append(turn["value"].replace(IMAGE, "").strip())
    if len(said) < 2 or roles != ["user", "assistant"] * (len(said) // 2) + ["user"] * (
        len(said) % 2
    ):
        raise ValueError(f"{where}: the conversation is not in turn of human and gpt")
    return said
