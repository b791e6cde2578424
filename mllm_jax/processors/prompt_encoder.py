"""Prompts and answers to rows of tokens: the text side of a processor."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, cast

import numpy as np

from mllm_jax import files, tokens
from mllm_jax.batch import Layout
from mllm_jax.files import shown
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.processors import prompts as prompts_
from mllm_jax.processors import rows as rows_
from mllm_jax.processors import tokenizers
from mllm_jax.processors.chat_template import ChatTemplate, Questions
from mllm_jax.processors.prompts import IMAGE, Chat
from mllm_jax.processors.rows import Picture, Row, Token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class PromptEncoder:
    """A tokenizer and a chat template, which encode prompts and answers as rows of tokens.

    Args:
      tokenizer: A fast tokenizer of transformers (it must give character offsets).
      config: The model's config: the id of the image token, and the number of tokens of a picture.
      directory: The checkpoint's directory, for errors.
      stop_ids: Ids that end an answer, besides the tokenizer's end of sequence.

    Attributes:
      reencode_per_question: Whether a packed row encodes its picture again for each question.
      image_text: The text of the image token in the tokenizer.
      placeholder: The text for a picture in the chat template; `picture_text` replaces it.
      written_placeholder: The text that replaces `<image>` in a prompt that is used verbatim.
      markers: The texts of the tokens around and between those of a picture.
      video_text: The text of the token of a video, which is refused; None if there is none.
      end_of_turn: The text of the token that ends an answer, if it is not the tokenizer's end of
        sequence and the checkpoint stops at it.
    """

    reencode_per_question: ClassVar[bool] = False
    image_text: ClassVar[str] = IMAGE
    placeholder: ClassVar[str] = IMAGE
    written_placeholder: ClassVar[str] = IMAGE
    markers: ClassVar[tuple[str, ...]] = ()
    video_text: ClassVar[str | None] = None
    end_of_turn: ClassVar[str | None] = None

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        config: MultimodalConfig,
        directory: str | os.PathLike | None = None,
        *,
        stop_ids: Sequence[int] = (),
    ):
        self.tokenizer = tokenizer
        self.config = config
        self.directory = directory
        self._stop_ids = tuple(stop_ids)
        self._check_image_tokens()

    def _check_image_tokens(self) -> None:
        """Raise ValueError if the image tokens of the tokenizer and of the config differ."""
        vocab, config = self.tokenizer.get_vocab(), self.config
        place = f"{files.line(self.directory, 200)}/" if self.directory else ""
        needed = [self.image_text] if 0 <= config.image_token < config.lm.vocab else []
        for text in filter(None, (*needed, *self.markers)):
            if text not in vocab:
                raise ValueError(
                    f"{place}tokenizer.json: the tokenizer has no token {text}, which this model "
                    "reads with every picture: its files are incomplete or of another model"
                )
        theirs = vocab.get(self.image_text)
        if theirs is not None and config.image_token not in (-1, theirs):
            raise ValueError(
                f"{place}config.json: image_token_index is {config.image_token}, but the "
                f"tokenizer (tokenizer.json beside it) gives {self.image_text} the id {theirs}: "
                "they must be equal, or no picture would be read"
            )

    @functools.cached_property
    def stop_ids(self) -> np.ndarray:
        """The ids that end an answer, at which transformers stops, int32[n].

        The first is the one that ends the answers of a batch.
        """
        end = self.tokenizer.eos_token_id
        turn = self.tokenizer.get_vocab().get(self.end_of_turn or "")
        first = [turn] if turn in self._stop_ids else []
        ids = first + ([] if end is None else [end]) + list(self._stop_ids)
        return np.array(list(dict.fromkeys(ids)), np.int32)

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The chat template, if there is one."""
        return ChatTemplate.from_tokenizer(self.tokenizer)

    def answer_ids(self, answer: str, *, end: bool = True) -> list[int]:
        """Return the ids of an answer.

        Args:
          answer: The text.
          end: Whether to add the end of turn.

        Raises:
          ValueError: It holds the text of a special token; or no token ends a turn.
        """
        ids = tokenizers.answer_ids(self.tokenizer, answer)
        tokenizers.check_vocab(self.tokenizer, ids, self.config.lm.vocab)
        if end and not len(self.stop_ids):
            raise ValueError(
                f"the tokenizer of {self.directory or 'this model'} has no token that ends an "
                "answer: set eos_token in tokenizer_config.json"
            )
        return ids + [int(token) for token in self.stop_ids[:end]]

    def text(self, ids: np.ndarray, *, stop: bool = True) -> list[str]:
        """Return the text of each row of ids.

        Args:
          ids: int[B, N]; negative ids are left out.
          stop: Whether to cut each row at its end of turn.
        """
        texts = []
        for row in np.asarray(ids):
            ends = np.flatnonzero(np.isin(row, self.stop_ids))
            row = row[: ends[0]] if stop and len(ends) else row[row >= 0]
            text = cast(str, self.tokenizer.decode(row, skip_special_tokens=True))
            texts.append(text.strip())
        return texts

    def word(self, token: int) -> str:
        """Return the text of one token."""
        return cast(str, self.tokenizer.decode([int(token)]))

    def render(self, prompt: str | Chat, images: int) -> tuple[str, Questions]:
        """Return the whole text of a prompt with its images, and the spans of the question."""
        if isinstance(prompt, str):
            if IMAGE in prompt or not self.chat_template:
                before = "" if IMAGE in prompt else f"{IMAGE}\n" * images
                return before + prompt, (slice(len(before), len(before) + len(prompt)),)
            prompt = [{"role": "user", "content": prompt}]
        if not self.chat_template:
            raise ValueError(f"{self.directory or 'this model'} has no chat template for a chat")
        try:
            return self.chat_template.render(prompts_.put_images_first(prompt, images))
        except ValueError as error:
            turn = "a plain user turn" if len(prompt) == 1 else "this chat"
            raise ValueError(
                f"the chat template of {self.directory} does not accept {turn} ({error}); "
                f"write {IMAGE} into the prompt to use it verbatim"
            ) from error

    def _needs_special_tokens(self, prompt: str | Chat, text: str) -> bool:
        """Return whether the tokenizer has to add its special tokens to a rendered text."""
        if not self.chat_template or (isinstance(prompt, str) and IMAGE in prompt):
            return True
        # A tokenizer's template writes them itself; a processor's may leave them to the tokenizer.
        begin = self.tokenizer.bos_token
        return self.chat_template.takes_parts and not (begin and text.startswith(begin))

    def _encode_row(
        self, prompt: str | Chat, pictures: Sequence[Picture], where: str, first: int = 0
    ) -> Row:
        """Return the tokens of a prompt.

        Args:
          prompt: The prompt.
          pictures: Its pictures.
          where: The origin of the prompt, for errors.
          first: The number of pictures before it in the row.
        """
        with _errors_at(where):
            row = self._encode_prompt(prompt, pictures, first)
            if not row.tokens:
                raise ValueError("the prompt is empty")
            image = sum(token.is_image for token in row.tokens)
            needed = sum(len(picture.layout.patches) for picture in pictures)
            if image != needed:
                raise ValueError(
                    f"{len(pictures)} pictures need {needed} image tokens, the prompt has {image}"
                )
        row.ends = [len(row) - 1]
        return row

    def picture_text(self, picture: Picture) -> str:
        """Return the text that represents a picture: `image_text` once for each of its runs."""
        del picture
        return self.image_text

    def _encode_prompt(self, prompt: str | Chat, pictures: Sequence[Picture], first: int) -> Row:
        """Return the tokens of a prompt, each image token replaced by those of its picture."""
        text, questions = self.render(prompt, len(pictures))
        if self.video_text and self.video_text in text:
            raise ValueError(
                f"the prompt has a video ({self.video_text}): give its frames as pictures"
            )
        if self.placeholder != IMAGE:
            text, questions = replaced(text, questions, IMAGE, lambda _: self.written_placeholder)
        if text.count(self.placeholder) != len(pictures):
            raise ValueError(
                f"the prompt {shown(prompt)} has {text.count(self.placeholder)} {IMAGE} "
                f"for {len(pictures)} pictures"
            )
        text, questions = replaced(
            text, questions, self.placeholder, lambda number: self.picture_text(pictures[number])
        )
        ids, kinds = self._tokenize(prompt, text, questions)
        tiles = self.first_tiles([picture.layout for picture in pictures])
        runs = [
            run
            for tile, picture in zip(tiles, pictures, strict=True)
            for run in self._picture_runs(first * self.config.tiles + tile, picture)
        ]
        if ids.count(self.config.image_token) != len(runs):
            raise ValueError(f"the tokenizer does not encode {self.image_text} as the image token")
        row, remaining = Row(), iter(runs)
        for token in rows_.text_tokens(ids, kinds):
            is_image = token.id == self.config.image_token
            row.add(next(remaining) if is_image else [token])
        return row

    def first_tiles(self, layouts: Sequence[Layout]) -> list[int]:
        """Return the number of the first tile of each picture of a row."""
        return [number * self.config.tiles for number in range(len(layouts))]

    def _picture_runs(self, first_tile: int, picture: Picture) -> list[list[Token]]:
        """Return the image tokens of a picture by run.

        Args:
          first_tile: The number of its first tile in the row.
          picture: The picture.
        """
        config, layout = self.config, picture.layout
        # A picture of any size is one tile, however many tokens it has.
        tile_tokens = config.image_tokens if layout.grid is None else len(layout.patches)
        made = rows_.image_tokens(
            layout, config.image_token, first_tile, tile_tokens, config.token_grid
        )
        if not layout.runs:
            return [made]
        ends = np.cumsum(layout.runs)
        return [made[end - run : end] for run, end in zip(layout.runs, ends, strict=True)]

    def _tokenize(
        self, prompt: str | Chat, text: str, questions: Questions
    ) -> tuple[list[int], list[int]]:
        """Return the ids and kinds of the whole text of a prompt."""
        return tokenizers.tokenize(
            self.tokenizer, text, questions, special=self._needs_special_tokens(prompt, text),
            vocab=self.config.lm.vocab, image=self.config.image_token,
        )  # fmt: skip

    def _append_answer(
        self, row: Row, answer: str, where: str, *, segment: int = 0, start: int | None = None
    ) -> None:
        with _errors_at(where):
            ids = self.answer_ids(answer)
        answer_tokens = rows_.text_tokens(ids, [tokens.CODE["answer"]] * len(ids))
        row.add(answer_tokens, segment=segment, start=start)

    def _pack_row(
        self, pairs: Sequence[tuple[str, str]], pictures: Sequence[Picture], where: str
    ) -> Row:
        """Return the tokens of a row of (question, answer) pairs."""
        row, singles = Row(), []
        places = [f"{where}, question {segment}" for segment in range(1, len(pairs) + 1)]
        for (question, _), place in zip(pairs, places, strict=True):
            if IMAGE in question:
                raise ValueError(
                    f"{place}: the packed question {shown(question)} contains its picture again"
                )
            single = self._encode_row(question, pictures, place, first=len(row.qformer_rows))
            row.qformer_rows += single.qformer_rows
            singles.append(single)
        shared = 0 if self.reencode_per_question else _shared_tokens(singles)
        row.add(singles[0].tokens[:shared])
        for segment, ((_, answer), single) in enumerate(zip(pairs, singles, strict=True), 1):
            row.add(single.tokens[shared:], segment=segment, start=shared)
            row.ends.append(len(row) - 1)
            place = places[segment - 1]
            self._append_answer(row, answer, place, segment=segment, start=len(single))
        return row

    @property
    def _padding_id(self) -> int:
        return int(self.stop_ids[0]) if len(self.stop_ids) else 0


def _shared_tokens(rows: Sequence[Row]) -> int:
    """Return the number of tokens that prompts share at their start, before any question.

    Tokens before a question may differ although their text does not: a token may contain the end
    of the template and the beginning of the question.
    """
    shared = min(row.column("kind").tolist().index(tokens.CODE["question"]) for row in rows)
    return rows_.same_at_start(row.tokens[:shared] for row in rows)


@contextlib.contextmanager
def _errors_at(where: str) -> Iterator[None]:
    """Begin the message of a ValueError with the origin of the wrong value."""
    try:
        yield
    except ValueError as error:
        raise ValueError(files.line(f"{where}: {error}")) from error


def replaced(
    text: str, questions: Questions, old: str, new: Callable[[int], str]
) -> tuple[str, Questions]:
    """Return a text with each `old` replaced, and the new spans of the questions.

    Args:
      text: The text.
      questions: The spans of characters that the user wrote.
      old: The text to replace.
      new: number of an occurrence -> its replacement, which is not part of a question.
    """
    is_question = np.zeros(len(text), bool)
    for part in questions:
        is_question[part] = True
    pieces, masks, start = [], [], 0
    for number in range(text.count(old)):
        at = text.index(old, start)
        replacement = new(number)
        pieces += [text[start:at], replacement]
        masks += [is_question[start:at], np.zeros(len(replacement), bool)]
        start = at + len(old)
    masks.append(is_question[start:])
    edges = np.flatnonzero(np.diff(np.concatenate([[False], *masks, [False]]).astype(np.int8)))
    slices = (slice(int(a), int(b)) for a, b in edges.reshape(-1, 2))
    return "".join(pieces) + text[start:], tuple(slices)
