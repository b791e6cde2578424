"""Prompts of a user: strings, or chats in the format of transformers.

[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it ?"}]},
 {"role": "assistant", "content": "a cat"}, {"role": "user", "content": "which ?"}]
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mllm_jax.files import shown

IMAGE = "<image>"
Chat = list[dict[str, Any]]


def as_list(values: Any, name: str, what: str = "strings") -> list:
    """Return values as a list.

    Args:
      values: Any iterable except a string, a mapping or a set.
      name: The name of the argument, for errors.
      what: A description of the items, for errors.

    Raises:
      ValueError: The values are not such an iterable.
    """
    items = values.tolist() if hasattr(values, "tolist") else values
    single = isinstance(items, (str, bytes, Mapping, set, frozenset))
    if single or not isinstance(items, Iterable):
        raise ValueError(f"{name} must be a list of {what}, one per row; got {shown(values)}")
    return list(items)


def as_strings(values: Any, name: str) -> list[str]:
    """Return values as a list of strings; `name` is the argument, for errors."""
    strings = as_list(values, name)
    for number, value in enumerate(strings):
        if not isinstance(value, str):
            raise ValueError(f"{name}, row {number}: {shown(value)} is not a string")
    return strings


def parse_prompts(prompts: Any) -> list[str | Chat]:
    """Return prompts as strings and chats.

    Args:
      prompts: A list with a string or a chat for each row; or one chat.

    Raises:
      ValueError: They have another form.
    """
    rows = as_list(prompts, "prompts", "strings or chats")
    if rows and all(isinstance(message, Mapping) for message in rows):
        rows = [rows]
    return [
        prompt if isinstance(prompt, str) else _parse_chat(prompt, row)
        for row, prompt in enumerate(rows)
    ]


def _parse_chat(messages: Any, row: int) -> Chat:
    where = f"prompts, row {row}"
    is_list = isinstance(messages, (list, tuple)) and messages
    if not is_list or not all(isinstance(message, Mapping) for message in messages):
        raise ValueError(f"{where}: {shown(messages)} is neither a string nor a list of messages")
    chat = [_parse_message(message, f"{where}, message {i}") for i, message in enumerate(messages)]
    if chat[-1]["role"] == "assistant":
        raise ValueError(
            f"{where}: the chat ends with a turn of the assistant: give that as answers="
        )
    if not any(message["role"] == "user" for message in chat):
        raise ValueError(f"{where}: no message of the chat has the role user")
    return chat


def _parse_message(message: Mapping, where: str) -> dict[str, Any]:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not isinstance(content, (str, list, tuple)):
        raise ValueError(
            f'{where}: a message has "role", a string, and "content", a string or a list of parts; '
            f"got {shown(dict(message))}"
        )
    if not isinstance(content, str):
        content = [_parse_part(part, where) for part in content]
    others = {key: value for key, value in message.items() if value is not None}
    others = json.loads(json.dumps(others, default=lambda value: f"<{type(value).__name__}>"))
    return others | {"role": role, "content": content}


def _parse_part(part: Any, where: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "image":
        images = [part[key] for key in ("image", "path", "url") if part.get(key) is not None]
        return {"type": "image"} | ({"image": images[0]} if images else {})
    raise ValueError(
        f'{where}: a part is {{"type": "image"}} or {{"type": "text", "text": ...}}; '
        f"got {shown(part)}"
    )


def image_parts(prompt: str | Chat) -> list[dict[str, Any]]:
    """Return the parts of a chat that are images."""
    contents = [] if isinstance(prompt, str) else [message["content"] for message in prompt]
    parts = [part for content in contents if not isinstance(content, str) for part in content]
    return [part for part in parts if part["type"] == "image"]


def without_images(chat: Chat) -> Chat:
    """Return a chat without its images."""

    def text_of(content: str | list) -> str | list:
        return content if isinstance(content, str) else [p for p in content if p["type"] == "text"]

    return [message | {"content": text_of(message["content"])} for message in chat]


def put_images_first(chat: Chat, images: int) -> Chat:
    """Return a chat with its images before the first user text, unless it places them itself."""
    if not images or image_parts(chat) or any(IMAGE in text for text in _texts(chat)):
        return chat
    first = next(i for i, message in enumerate(chat) if message["role"] == "user")
    content = [{"type": "image"}] * images + as_parts(chat[first]["content"])
    return [*chat[:first], chat[first] | {"content": content}, *chat[first + 1 :]]


def as_parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the content of a message as a list of parts."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _texts(chat: Chat) -> list[str]:
    parts = [part for message in chat for part in as_parts(message["content"])]
    return [part["text"] for part in parts if part["type"] == "text"]


def map_user_text(chat: Chat, change: Callable[[str], str]) -> Chat:
    """Return a chat with a function applied to each text of the user."""

    def changed(content: str | list) -> str | list:
        if isinstance(content, str):
            return change(content)
        return [p | {"text": change(p["text"])} if p["type"] == "text" else p for p in content]

    return [m | {"content": changed(m["content"])} if m["role"] == "user" else m for m in chat]
