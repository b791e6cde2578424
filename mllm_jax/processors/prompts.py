"""Prompts and answers as text and as tokens: chats, chat templates, tokenizers.

A prompt is a string, or a chat in the form that transformers has:

    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it ?"}]},
     {"role": "assistant", "content": "a cat"}, {"role": "user", "content": "which ?"}]
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from mllm_jax import tokens
from mllm_jax.checkpoints import files
from mllm_jax.processors import templates

IMAGE = "<image>"
_TOKENIZER_BYTES = 2**28
USER = "[what the user says, {}]"  # stands for it while a chat template is looked at
_USERS = re.compile(re.escape(USER).replace(r"\{\}", r"(\d+)"))
Chat = list[dict[str, Any]]
Questions = tuple[slice, ...]  # the characters of a text that the user says


def short(value: Any) -> str:
    """A value as an error shows it."""
    return files.shown(value)


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its name."""
    lines = str(error).strip().splitlines()
    return files.line(lines[0], 120) if lines else type(error).__name__


def tokenizer_origin(tokenizer) -> str:
    """Where a tokenizer comes from."""
    return files.line(getattr(tokenizer, "name_or_path", None) or "this model", 120)


def as_list(values: Any, name: str, what: str = "strings") -> list:
    """Values as a list; a string or a mapping is none, though Python would go through it."""
    found = values.tolist() if hasattr(values, "tolist") else values
    one = isinstance(found, (str, bytes, Mapping, set, frozenset))
    if one or not isinstance(found, Iterable):
        raise ValueError(f"{name} is a list of {what}, one a row; got {short(values)}")
    return list(found)


def as_strings(values: Any, name: str) -> list[str]:
    """Values as a list of strings."""
    found = as_list(values, name)
    for number, value in enumerate(found):
        if not isinstance(value, str):
            raise ValueError(f"{name}, row {number}: {short(value)} is no text")
    return found


def parse_prompts(prompts: Any) -> list[str | Chat]:
    """Prompts as strings and chats.

    Args:
      prompts: a list with a string or a chat for each row; or one chat.

    Raises:
      ValueError: they are something else.
    """
    found = as_list(prompts, "prompts", "strings or chats")
    if found and all(isinstance(message, Mapping) for message in found):
        found = [found]
    return [one if isinstance(one, str) else _chat(one, row) for row, one in enumerate(found)]


def _chat(messages: Any, row: int) -> Chat:
    at = f"prompts, row {row}"
    several = isinstance(messages, (list, tuple)) and messages
    if not several or not all(isinstance(message, Mapping) for message in messages):
        raise ValueError(f"{at}: {short(messages)} is neither text nor a list of messages")
    chat = [_message(message, f"{at}, message {i}") for i, message in enumerate(messages)]
    if chat[-1]["role"] == "assistant":
        raise ValueError(f"{at}: the chat ends with what the assistant says: give that as answers=")
    if not any(message["role"] == "user" for message in chat):
        raise ValueError(f"{at}: no message of the chat has the role user")
    return chat


def _message(message: Mapping, at: str) -> dict[str, Any]:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not isinstance(content, (str, list, tuple)):
        raise ValueError(
            f'{at}: a message has "role", a string, and "content", a string or a list of parts; '
            f"got {short(dict(message))}"
        )
    if not isinstance(content, str):
        content = [_part(part, at) for part in content]
    others = {key: value for key, value in message.items() if value is not None}
    others = json.loads(json.dumps(others, default=lambda value: f"<{type(value).__name__}>"))
    return others | {"role": role, "content": content}


def _part(part: Any, at: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "image":
        shown = [part[key] for key in ("image", "path", "url") if part.get(key) is not None]
        return {"type": "image"} | ({"image": shown[0]} if shown else {})
    raise ValueError(
        f'{at}: a part is {{"type": "image"}} or {{"type": "text", "text": ...}}; got {short(part)}'
    )


def image_parts(prompt: str | Chat) -> list[dict[str, Any]]:
    """The parts of a chat that are pictures."""
    contents = [] if isinstance(prompt, str) else [message["content"] for message in prompt]
    parts = [part for content in contents if not isinstance(content, str) for part in content]
    return [part for part in parts if part["type"] == "image"]


def without_images(chat: Chat) -> Chat:
    """A chat without its pictures."""

    def kept(content):
        return content if isinstance(content, str) else [p for p in content if p["type"] == "text"]

    return [message | {"content": kept(message["content"])} for message in chat]


def put_images_first(chat: Chat, images: int) -> Chat:
    """A chat with pictures, before what the user says first if it does not say where they stand."""
    if not images or image_parts(chat) or any(IMAGE in text for text in _texts(chat)):
        return chat
    first = next(i for i, message in enumerate(chat) if message["role"] == "user")
    content = [{"type": "image"}] * images + _parts(chat[first]["content"])
    return [*chat[:first], chat[first] | {"content": content}, *chat[first + 1 :]]


def _parts(content: str | list) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _texts(chat: Chat) -> list[str]:
    parts = [part for message in chat for part in _parts(message["content"])]
    return [part["text"] for part in parts if part["type"] == "text"]


def _map_user(chat: Chat, change: Callable[[str], str]) -> Chat:
    """A chat in which the texts of the user are others."""

    def changed(content):
        if isinstance(content, str):
            return change(content)
        return [p | {"text": change(p["text"])} if p["type"] == "text" else p for p in content]

    return [m | {"content": changed(m["content"])} if m["role"] == "user" else m for m in chat]


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A chat template.

    Attributes:
      source: in Jinja. special: the special tokens by name, which it may read.
    """

    source: str
    special: tuple[tuple[str, str], ...] = ()

    @classmethod
    def from_tokenizer(cls, tokenizer) -> ChatTemplate | None:
        """That of a tokenizer of transformers, the one named default where it has several."""
        source = tokenizer.chat_template
        if not source:
            return None
        source = source.get("default") if isinstance(source, dict) else source
        if not isinstance(source, str):
            raise ValueError(
                f"{tokenizer_origin(tokenizer)}: chat_template is no string, nor one named default"
            )
        special = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
        return _template(source, tuple(special.items()))

    @functools.cached_property
    def takes_parts(self) -> bool:
        """Whether it reads content as parts, as the templates of processors do."""
        text = self._try([{"type": "text", "text": USER}])
        return text.count(USER) == 1 and not re.search("[\"']type[\"']", text)

    @functools.cached_property
    def takes_text(self) -> bool:
        """Whether it reads content as a string."""
        return self._try(USER).count(USER) == 1

    def _try(self, content) -> str:
        try:
            return self._text([{"role": "user", "content": content}])
        except ValueError:
            return ""

    def _text(self, chat: Chat) -> str:
        return templates.render(self.source, chat, **dict(self.special))

    def _given(self, content: str | list) -> str | list:
        """Content as this template reads it."""
        if isinstance(content, str):
            return _parts(content) if self.takes_parts and not self.takes_text else content
        if self.takes_parts:
            return [{k: p[k] for k in ("type", "text") if k in p} for p in content]
        return "\n".join(IMAGE if p["type"] == "image" else p["text"] for p in content)

    def _rendered(self, chat: Chat) -> str:
        return self._text([m | {"content": self._given(m["content"])} for m in chat])

    def render(self, chat: Chat) -> tuple[str, Questions]:
        """The text of a chat up to where the assistant goes on, and what in it the user says.

        Raises:
          ValueError: the template does not take the chat, or changes what the user says.
        """
        said = []

        def mark(text: str) -> str:
            if not text.strip():
                return text
            said.append(text)
            return USER.format(len(said) - 1)

        pieces = _USERS.split(self._rendered(_map_user(chat, mark)))
        between, numbers = pieces[::2], [int(number) for number in pieces[1::2]]
        if numbers != list(range(len(said))):
            raise ValueError("it does not show what the user says once and in order")
        text = self._rendered(chat)
        for shown in (said, [words.strip() for words in said]):  # as it is, or trimmed
            parts = [between[0]]
            for words, after in zip(shown, between[1:], strict=True):
                parts += [words, after]
            if "".join(parts) == text:
                ends = [sum(map(len, parts[: 2 * i + 1])) for i in range(len(shown))]
                slices = zip(ends, shown, strict=True)
                return text, tuple(slice(end, end + len(words)) for end, words in slices)
        raise ValueError("it changes what the user says")


@functools.lru_cache(maxsize=32)
def _template(source: str, special: tuple[tuple[str, str], ...]) -> ChatTemplate:
    """One object for one template, which is looked at once."""
    return ChatTemplate(source, special)


def encode(tokenizer, text: str, **how: Any):
    """What a tokenizer of transformers makes of a text; whatever it raises is a ValueError."""
    return _guarded(
        lambda: tokenizer(text, return_attention_mask=False, **how),
        lambda: f"the tokenizer of {tokenizer_origin(tokenizer)} cannot read {short(text)}",
    )


def _guarded(call: Callable, name: Callable[[], str]) -> Any:
    """A call into tokenizers, whose errors are of any kind, panics of Rust included."""
    try:
        return call()
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{name()}: {first_line(error)}") from error


def tokenize(
    tokenizer, text: str, questions: Questions, *, special: bool, vocab: int, image: int = -1
) -> tuple[list[int], list[int]]:
    """Ids and kinds of a text: the question, and all else.

    Args:
      questions: which characters it is.
      special: whether the tokenizer adds its special tokens.
      vocab: how many words the model has.
      image: id of the image token.

    Raises:
      ValueError: the tokenizer is broken, or not the model's.
    """
    found = encode(tokenizer, text, add_special_tokens=special, return_offsets_mapping=True)
    asked = [
        high > low and any(low < part.stop and high > part.start for part in questions)
        for low, high in found["offset_mapping"]
    ]
    ids = found["input_ids"]
    check_vocab(tokenizer, ids, vocab, image)
    words = "".join(text[part] for part in questions).replace(IMAGE, "").strip()
    if words and not any(a and token != image for a, token in zip(asked, ids, strict=True)):
        raise ValueError(
            f"the tokenizer of {tokenizer_origin(tokenizer)} makes no token of "
            f"{short(words)}: its files are incomplete"
        )
    return ids, [tokens.CODE["question" if a else "system"] for a in asked]


def check_vocab(tokenizer, ids: Sequence[int], vocab: int, image: int = -1) -> None:
    """Raises where an id is no word of the model."""
    beyond = [token for token in ids if token >= vocab and token != image]
    if beyond:
        raise ValueError(
            f"the tokenizer of {tokenizer_origin(tokenizer)} gives "
            f"{short(tokenizer.decode(beyond[:1]))} the id {beyond[0]}, the model has {vocab} "
            "words: the tokenizer is another model's"
        )


def answer_ids(tokenizer, answer: str) -> list[int]:
    """Ids of an answer, which is plain text.

    Raises:
      ValueError: it holds the text of a special token, such as `<image>` or the end of a turn.
    """
    ids = encode(tokenizer, answer, add_special_tokens=False)["input_ids"]
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    named = [token for token in sorted({*special, IMAGE}, key=len) if token in answer]
    if named:
        plain = encode(tokenizer, answer, add_special_tokens=False, split_special_tokens=True)
        if plain["input_ids"] != ids:
            raise ValueError(
                f"the answer {short(answer)} holds {named[-1]}, which is a token of the model and "
                "no text; leave it out (the end of a turn is added by itself)"
            )
    return ids


def read_tokenizer(directory: pathlib.Path):
    """The tokenizer that was saved there; one of sentencepiece alone is a Llama's.

    Raises:
      FileNotFoundError: there is none. ValueError: it cannot be read.
    """
    # A second to import: only when needed.
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast

    for name, kind in (
        ("tokenizer.json", PreTrainedTokenizerFast),
        ("tokenizer.model", LlamaTokenizer),
    ):
        path = directory / name
        if path.exists():
            if not 0 < files.regular(path).stat().st_size <= _TOKENIZER_BYTES:
                raise ValueError(
                    f"{files.line(path, 200)}: {path.stat().st_size:,} bytes are no tokenizer; "
                    "fetch it again"
                )
            tokenizer = _guarded(
                lambda kind=kind: kind.from_pretrained(directory, trust_remote_code=False),
                lambda path=path: (
                    f"{files.line(path, 200)}: not readable as a tokenizer with the files by it"
                ),
            )
            tokenizer.chat_template = tokenizer.chat_template or _chat_template(directory)
            return tokenizer
    raise FileNotFoundError(
        f"{directory} has neither tokenizer.json nor tokenizer.model: save the tokenizer there "
        "with save_pretrained"
    )


def tokenizer_content(tokenizer) -> list[Any] | None:
    """All that a fast tokenizer is made of; how it last filled up or cut text is no part of it."""
    if tokenizer is None:
        return None
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    core |= {"padding": None, "truncation": None}
    return [core, tokenizer.chat_template, tokenizer.special_tokens_map]


def _chat_template(directory: pathlib.Path) -> str | None:
    """The chat template in a file of its own; older checkpoints wrap it in JSON."""
    plain, wrapped = directory / "chat_template.jinja", directory / "chat_template.json"
    if plain.exists():
        try:
            return files.regular(plain).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(files.refusal(plain, ["not readable as UTF-8"])) from error
    found = files.read_json(wrapped).get("chat_template") if wrapped.exists() else None
    if found is not None and not isinstance(found, str):
        raise ValueError(files.refusal(wrapped, [f"chat_template is no string: {short(found)}"]))
    return found


def read_stop_ids(directory: pathlib.Path) -> list[int]:
    """The ids at which transformers stops: of generation_config.json, or else of config.json."""
    path = directory / "generation_config.json"
    if not path.exists():
        path = directory / "config.json"
    fields = files.read_json(path) if path.exists() else {}
    text = fields.get("text_config")
    fields = text if isinstance(text, dict) and "eos_token_id" in text else fields
    found = fields.get("eos_token_id")
    found = [] if found is None else found if isinstance(found, list) else [found]
    if not all(type(token) is int and 0 <= token < 2**31 for token in found):
        problem = f"eos_token_id is {short(found)}, not one or several ids"
        raise ValueError(files.refusal(path, [problem]))
    return found
