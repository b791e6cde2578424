r"""LLaVA's training data as a domain: a JSON list of conversations about images.

    [{"id": "1", "image": "coco/1.jpg", "conversations": [
        {"from": "human", "value": "<image>\nWhat is shown?"},
        {"from": "gpt", "value": "A cat."}]}]

The first question of each conversation is read, with its answer; later ones depend on the turns
before them. Records without an image, or with several, are left out, and a warning counts them.
"""

from __future__ import annotations

import collections
import logging
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from mllm_jax import files
from mllm_jax.data.domains.table import Record

IMAGE = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def flattened(path: pathlib.Path, records: Iterable[Record]) -> Iterator[Record]:
    """Yield records with conversations replaced by their first question and answer.

    Args:
      path: The file, for the warning.
      records: Its records.
    """
    unused: collections.Counter[str] = collections.Counter()
    for where, record in records:
        if "conversations" not in record:
            yield where, record
            continue
        turns = _turns(record["conversations"], where)
        images = record.get("image", [])
        images = images if isinstance(images, list) else [images]
        if len(images) != 1:
            unused[f"records with {'several images' if images else 'no image'}"] += 1
            continue
        first = {"image": images[0], "question": turns[0], "answer": turns[1]}
        yield where, first
        if len(turns) > 2:
            unused["later questions"] += (len(turns) - 2) // 2
    if unused:
        counts = ", ".join(f"{what} {count}" for what, count in sorted(unused.items()))
        logging.getLogger(__name__).warning(f"{files.name(path)}: not used: {counts}")


def _turns(conversation: Any, where: str) -> list[str]:
    """Return the texts of user and assistant in turn, without the picture's placeholder."""
    texts: list[str] = []
    roles: list[str | None] = []
    for turn in conversation if isinstance(conversation, list) else [None]:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise ValueError(f"{where}: conversations is not a list of {{from, value}}")
        if turn.get("from") == "system":
            continue
        roles.append(ROLES.get(str(turn.get("from"))))
        texts.append(turn["value"].replace(IMAGE, "").strip())
    in_turn = ["user", "assistant"] * (len(texts) // 2) + ["user"] * (len(texts) % 2)
    if len(texts) < 2 or roles != in_turn:
        raise ValueError(f"{where}: the turns of the conversation do not alternate human and gpt")
    return texts
