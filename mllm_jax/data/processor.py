"""The processor: pictures and prompts to a batch whose every token knows what it is."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mllm_jax import tokens
from mllm_jax.models.llava import Batch, LlavaConfig

IMAGE = "<image>"
PLACE = "[what the user says]"  # stands for it while a chat template is looked at
# Rows are padded to one of these lengths, so that batches share a few compiled programs.
LENGTHS = (
    32, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024, 1536, 2048, 3072, 4096,
)  # fmt: skip


@dataclasses.dataclass
class Row:
    """One tokenised row, before padding."""

    ids: list[int] = dataclasses.field(default_factory=list)
    kinds: list[int] = dataclasses.field(default_factory=list)
    positions: list[int] = dataclasses.field(default_factory=list)
    segments: list[int] = dataclasses.field(default_factory=list)
    prompt: int = 0  # tokens of the prompt, or of the first of several

    def add(self, ids: Sequence[int], kinds: Sequence[int], *, segment: int = 0, at=None) -> None:
        """Appends tokens; `at` is the position of the first, if it is not the next."""
        start = len(self.ids) if at is None else at
        self.ids.extend(ids)
        self.kinds.extend(kinds)
        self.positions.extend(range(start, start + len(ids)))
        self.segments.extend([segment] * len(ids))


class Processor:
    """A tokenizer, a chat template and an image processor: those of the checkpoint.

    Args:
      tokenizer: of transformers, fast (it must give character offsets).
      pictures: makes the image processor of transformers (PIL backend) when first needed.
      config: of the model: which id is the image token, and how many tokens an image is.
    """

    def __init__(self, tokenizer, pictures, config: LlavaConfig, directory=None):
        self.tokenizer = tokenizer
        self.config = config
        self.directory = directory
        self._pictures = pictures

    @classmethod
    def from_directory(cls, directory, config: LlavaConfig) -> Processor:
        """Of a local checkpoint directory in the layout of HF transformers."""
        from transformers import PreTrainedTokenizerFast  # a second to import: only when needed

        directory = pathlib.Path(directory)
        if not (directory / "tokenizer.json").exists():
            raise FileNotFoundError(
                f"{directory} has no tokenizer.json: save the tokenizer there with save_pretrained"
            )
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
        template = directory / "chat_template.jinja"
        if tokenizer.chat_template is None and template.exists():
            tokenizer.chat_template = template.read_text()
        return cls(tokenizer, functools.partial(_image_processor, directory), config, directory)

    @functools.cached_property
    def image_processor(self):
        return self._pictures()

    @functools.cached_property
    def stop_ids(self) -> np.ndarray:
        """int32[n]: the ids that end an answer."""
        return np.array([self.tokenizer.eos_token_id], np.int32)

    def __call__(
        self,
        images: Sequence[Any] | None,
        prompts: Sequence[str],
        *,
        answers: Sequence[str] | None = None,
        features: np.ndarray | None = None,
        rows: int | None = None,
        length: int | None = None,
        left: bool = False,
    ) -> Batch:
        """A batch of one prompt a row.

        Args:
          images: one picture a row (PIL or path), or a list of pictures a row, or None for text.
          prompts: with `<image>` in it a prompt is used as it stands; without, it is set into
            the chat template, pictures first.
          answers: read after the prompt, with an end of turn; of kind answer.
          features: float[B, P, E], vision features of one picture a row, in place of images.
          rows: fill up with empty rows to this many.
          length: pad to this length instead of the nearest of LENGTHS.
          left: pad on the left.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts is a list of strings, one a row; got one string")
        pictures = _pictures(images, features, len(prompts))
        if len(pictures) != len(prompts):
            raise ValueError(f"{len(pictures)} rows of pictures for {len(prompts)} prompts")
        if answers is not None and len(answers) != len(prompts):
            raise ValueError(f"{len(answers)} answers for {len(prompts)} prompts")
        made = [self._row(prompt, len(p)) for prompt, p in zip(prompts, pictures, strict=True)]
        for row, answer in zip(made, answers or (), strict=False):
            self._answer(row, answer)
        return self._batch(made, pictures, features, rows, length, left)

    def pack(
        self,
        images: Sequence[Any] | None,
        turns: Sequence[Sequence[tuple[str, str]]],
        *,
        features: np.ndarray | None = None,
        rows: int | None = None,
        length: int | None = None,
    ) -> Batch:
        """Several questions on one picture in one row: the picture is read once.

        Each question with its answer is a segment of its own. It sees the picture and not the
        other questions, at the positions that it would have alone.

        Args:
          images: one picture a row.
          turns: (question, answer) pairs of each row.
          features, rows, length: as in a call.
        """
        made = []
        for pairs in turns:
            row, shared = Row(), None
            for segment, (question, answer) in enumerate(pairs, 1):
                if IMAGE in question:
                    raise ValueError(f"the packed question {question!r} names its picture again")
                alone = self._row(question, 1)
                if shared is None:  # up to the question all rows of a template are the same
                    shared = alone.kinds.index(tokens.CODE["question"])
                    row.add(alone.ids[:shared], alone.kinds[:shared])
                    row.prompt = len(alone.ids)
                row.add(alone.ids[shared:], alone.kinds[shared:], segment=segment, at=shared)
                self._answer(row, answer, segment=segment, at=len(alone.ids))
            made.append(row)
        pictures = _pictures(images, features, len(turns))
        return self._batch(made, pictures, features, rows, length, False)

    def _answer(self, row: Row, answer: str, *, segment: int = 0, at: int | None = None) -> None:
        ids = self.answer_ids(answer)
        row.add(ids, [tokens.CODE["answer"]] * len(ids), segment=segment, at=at)

    def answer_ids(self, answer: str, *, end: bool = True) -> list[int]:
        """The tokens of an answer, with the end of turn."""
        ids = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        return ids + [self.tokenizer.eos_token_id] * end

    def text(self, ids: np.ndarray, *, stop: bool = True) -> list[str]:
        """Tokens int[B, N] as text; `stop` cuts each row at its end of turn."""
        texts = []
        for row in np.asarray(ids):
            ends = np.flatnonzero(np.isin(row, self.stop_ids))
            row = row[: ends[0]] if stop and len(ends) else row[row >= 0]
            texts.append(self.tokenizer.decode(row, skip_special_tokens=True).strip())
        return texts

    def word(self, token: int) -> str:
        """One token as it is read."""
        return self.tokenizer.decode([int(token)])

    def render(self, prompt: str, images: int) -> tuple[str, slice]:
        """The whole text of a prompt, and which part of it is the question."""
        if IMAGE in prompt:
            return prompt, slice(0, len(prompt))
        question, pictures = prompt.strip(), f"{IMAGE}\n" * images
        before, after = self._turn() if self.tokenizer.chat_template else ("", "")
        start = len(before) + len(pictures)
        return before + pictures + question + after, slice(start, start + len(question))

    def _turn(self) -> tuple[str, str]:
        """What the chat template puts before and after what a user says."""
        turns = [{"role": "user", "content": PLACE}]
        try:
            text = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True
            )
            before, after = text.split(PLACE)
        except Exception as error:
            raise ValueError(
                f"the chat template of {self.directory} does not take a plain user turn ({error}); "
                f"write {IMAGE} into the prompt to use it as it stands"
            ) from error
        return before, after

    def _row(self, prompt: str, images: int) -> Row:
        text, question = self.render(prompt, images)
        if text.count(IMAGE) != images:
            raise ValueError(
                f"the prompt {prompt!r} has {text.count(IMAGE)} {IMAGE} for {images} pictures"
            )
        # A chat template writes the special tokens itself.
        raw = IMAGE in prompt or not self.tokenizer.chat_template
        coded = self.tokenizer(
            text, add_special_tokens=raw, return_offsets_mapping=True,
            return_attention_mask=False,
        )  # fmt: skip
        row = Row()
        for token, (low, high) in zip(coded["input_ids"], coded["offset_mapping"], strict=True):
            if token == self.config.image_token:
                count = self.config.image_tokens
                row.add([token] * count, [tokens.CODE["image"]] * count)
            else:
                asked = low < question.stop and high > question.start and high > low
                row.add([token], [tokens.CODE["question" if asked else "system"]])
        row.prompt = len(row.ids)
        return row

    def _batch(self, made: list[Row], pictures, features, rows, length, left: bool) -> Batch:
        missing = max(0, (rows or 0) - len(made))
        made, pictures = made + [Row()] * missing, pictures + [[]] * missing
        longest = max(len(row.ids) for row in made)
        T = length or next((n for n in LENGTHS if n >= longest), longest)
        if longest > T:
            raise ValueError(f"a row has {longest} tokens, more than length={T}")
        B, tiles = len(made), max((len(p) for p in pictures), default=0)
        n = self.config.image_tokens
        side = round(n**0.5)
        ids = np.full((B, T), self.tokenizer.eos_token_id, np.int32)
        position, segment = np.zeros((2, B, T), np.int32)
        kind = np.zeros((B, T), np.int8)
        image_at = np.full((B, T), -1, np.int32)
        grid = {name: np.full((B, T), -1, np.int16) for name in ("row", "column", "tile")}
        last = np.zeros((B, T), bool)
        for b, row in enumerate(made):
            count = len(row.ids)
            if not count:
                continue
            at = np.arange(T - count, T) if left else np.arange(count)
            ids[b, at], kind[b, at] = row.ids, row.kinds
            position[b, at], segment[b, at] = row.positions, row.segments
            last[b, at[row.prompt - 1]] = True
            places = at[np.array(row.kinds) == tokens.CODE["image"]]
            number = np.arange(len(places))
            image_at[b, places] = b * tiles * n + number
            patch = number % n - (n - side**2)  # a CLS token, where it is kept, is at -1
            grid["tile"][b, places] = number // n
            grid["row"][b, places] = np.where(patch < 0, -1, patch // side)
            grid["column"][b, places] = np.where(patch < 0, -1, patch % side)
        pixels, real = self._pixels(pictures, tiles, features is None)
        if features is not None:
            features = np.pad(features, ((0, missing), (0, 0), (0, 0)))
        return Batch(
            ids=ids,
            position=position,
            tokens=tokens.TokenMap(kind=kind, last=last, **grid),
            image_at=image_at,
            pixels=pixels,
            tile=np.tile(np.arange(tiles, dtype=np.int16), B),
            real=real,
            features=features,
            segment=segment if segment.any() else None,
            labels=_labels(kind),
            processor=self,
        )

    def _pixels(self, pictures: list[list], tiles: int, read: bool):
        size = self.config.vision.image_size if read else 0
        pixels = np.zeros((len(pictures) * tiles, size, size, 3), np.float32)
        real = np.zeros((len(pixels),), bool)
        places = [b * tiles + i for b, row in enumerate(pictures) for i in range(len(row))]
        real[places] = True
        if read and places:
            flat = [_open(picture) for row in pictures for picture in row]
            values = self.image_processor(flat, return_tensors="np")["pixel_values"]
            pixels[places] = np.moveaxis(values, 1, -1)
        return pixels, real


def _labels(kind: np.ndarray) -> np.ndarray | None:
    """int32[B, A]: the places of the answer tokens, -1 to fill up; A is a multiple of 8."""
    answer = kind == tokens.CODE["answer"]
    most = answer.sum(-1).max()
    if not most:
        return None
    labels = np.full((len(kind), -(-most // 8) * 8), -1, np.int32)
    for row, found in zip(labels, answer, strict=True):
        places = np.flatnonzero(found)
        row[: len(places)] = places
    return labels


def _pictures(images, features, rows: int) -> list[list]:
    """The pictures of each row; where features are given, one that nobody needs to see."""
    if features is not None:
        if images is not None:
            raise ValueError("give images or features, not both")
        if len(features) != rows:
            raise ValueError(f"features of {len(features)} pictures for {rows} rows")
        return [[None]] * rows
    return [_as_list(p) for p in (images if images is not None else [[]] * rows)]


def _as_list(pictures) -> list:
    return list(pictures) if isinstance(pictures, (list, tuple)) else [pictures]


def _open(picture):
    import PIL.Image

    if isinstance(picture, (str, pathlib.Path)):
        try:
            picture = PIL.Image.open(picture)
            picture.load()
        except OSError as error:
            raise ValueError(f"cannot read the picture {picture}: {error}") from error
    return picture.convert("RGB")


def _image_processor(directory: pathlib.Path):
    """The checkpoint's image processor, PIL backend: pixel values do not depend on torch."""
    from transformers import AutoImageProcessor

    for name in ("preprocessor_config.json", "processor_config.json"):
        if (directory / name).exists():
            return AutoImageProcessor.from_pretrained(directory, backend="pil")
    raise FileNotFoundError(f"{directory} has no preprocessor_config.json to prepare pictures with")
