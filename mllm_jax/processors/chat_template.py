"""A checkpoint's chat template, and the characters of a rendered chat that the user wrote."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import TYPE_CHECKING, Any

from mllm_jax.processors import template_sandbox
from mllm_jax.processors.prompts import IMAGE, Chat, as_parts, map_user_text
from mllm_jax.processors.tokenizers import tokenizer_origin

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MARK = "[what the user says, {}]"  # replaces a user's text to find where a template puts it
_MARKS = re.compile(re.escape(MARK).replace(r"\{\}", r"(\d+)"))
Questions = tuple[slice, ...]  # the characters of a text that the user wrote


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A chat template.

    Attributes:
      source: The template's Jinja source.
      special: The special tokens by name, which the template may read.
    """

    source: str
    special: tuple[tuple[str, str], ...] = ()

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerFast) -> ChatTemplate | None:
        """Return a tokenizer's template, the one named default of several, or None.

        Raises:
          ValueError: The tokenizer's chat_template is not a string.
        """
        source: Any = tokenizer.chat_template
        if not source:
            return None
        source = source.get("default") if isinstance(source, dict) else source
        if not isinstance(source, str):
            raise ValueError(
                f"{tokenizer_origin(tokenizer)}: chat_template is no string and has no default"
            )
        special = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
        return _cached(source, tuple(special.items()))

    @functools.cached_property
    def takes_parts(self) -> bool:
        """Whether the template reads content as parts, as the templates of processors do."""
        text = self._try([{"type": "text", "text": MARK}])
        return text.count(MARK) == 1 and not re.search("[\"']type[\"']", text)

    @functools.cached_property
    def takes_text(self) -> bool:
        """Whether the template reads content as a string."""
        return self._try(MARK).count(MARK) == 1

    def _try(self, content: str | list) -> str:
        try:
            return self._render([{"role": "user", "content": content}])
        except ValueError:
            return ""

    def _render(self, chat: Chat) -> str:
        return template_sandbox.render(self.source, chat, **dict(self.special))

    def _adapt(self, content: str | list) -> str | list:
        """Return content in the form that this template reads."""
        if isinstance(content, str):
            return as_parts(content) if self.takes_parts and not self.takes_text else content
        if self.takes_parts:
            return [{k: p[k] for k in ("type", "text") if k in p} for p in content]
        return "\n".join(IMAGE if p["type"] == "image" else p["text"] for p in content)

    def _render_adapted(self, chat: Chat) -> str:
        return self._render([m | {"content": self._adapt(m["content"])} for m in chat])

    def render(self, chat: Chat) -> tuple[str, Questions]:
        """Return the text of a chat up to the assistant's turn, and the spans of the user's texts.

        Raises:
          ValueError: The template rejects the chat, or changes the user's texts.
        """
        user_texts: list[str] = []

        def mark(text: str) -> str:
            if not text.strip():
                return text
            user_texts.append(text)
            return MARK.format(len(user_texts) - 1)

        pieces = _MARKS.split(self._render_adapted(map_user_text(chat, mark)))
        between, numbers = pieces[::2], [int(number) for number in pieces[1::2]]
        if numbers != list(range(len(user_texts))):
            raise ValueError("it does not contain the user's texts once and in order")
        text = self._render_adapted(chat)
        for variant in (user_texts, [words.strip() for words in user_texts]):  # as is, or trimmed
            parts = [between[0]]
            for words, after in zip(variant, between[1:], strict=True):
                parts += [words, after]
            if "".join(parts) == text:
                starts = [sum(map(len, parts[: 2 * i + 1])) for i in range(len(variant))]
                pairs = zip(starts, variant, strict=True)
                return text, tuple(slice(start, start + len(words)) for start, words in pairs)
        raise ValueError("it changes the user's texts")


@functools.lru_cache(maxsize=32)
def _cached(source: str, special: tuple[tuple[str, str], ...]) -> ChatTemplate:
    """Return the same object for the same template, so that its properties are computed once."""
    return ChatTemplate(source, special)
