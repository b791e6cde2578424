"""The processor: pictures and prompts to a batch whose every token knows what it is."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mllm_jax import tokens
from mllm_jax.data import pictures as picture_files
from mllm_jax.models.llava import Batch, Layout, LlavaConfig

IMAGE = "<image>"
PLACE = "[what the user says]"  # stands for it while a chat template is looked at
# Rows are padded to one of these lengths, so that batches share a few compiled programs.
LENGTHS = (
    32, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024, 1536, 2048, 2560, 3072, 4096,
)  # fmt: skip
LONGER = 1024  # beyond those, to a multiple of this


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture of a row.

    Attributes:
      image: in RGB, or None where features stand for it.
      layout: how the model reads it.
    """

    image: Any
    layout: Layout


@dataclasses.dataclass
class Row:
    """One tokenised row, before padding."""

    ids: list[int] = dataclasses.field(default_factory=list)
    kinds: list[int] = dataclasses.field(default_factory=list)
    patches: list[int] = dataclasses.field(default_factory=list)  # through all its tiles, or -1
    positions: list[int] = dataclasses.field(default_factory=list)
    segments: list[int] = dataclasses.field(default_factory=list)
    prompt: int = 0  # tokens of the prompt, or of the first of several
    told: list[Row] = dataclasses.field(default_factory=list)  # for each image, a Q-Former's text

    def add(
        self, ids: Sequence[int], kinds: Sequence[int], patches=None, *, segment: int = 0, at=None
    ) -> None:
        """Appends tokens; `at` is the position of the first, if it is not the next."""
        start = len(self.ids) if at is None else at
        self.ids.extend(ids)
        self.kinds.extend(kinds)
        self.patches.extend([-1] * len(ids) if patches is None else patches)
        self.positions.extend(range(start, start + len(ids)))
        self.segments.extend([segment] * len(ids))


class Processor:
    """A tokenizer, a chat template and an image processor: those of the checkpoint.

    Args:
      tokenizer: of transformers, fast (it must give character offsets).
      pictures: makes the image processor of transformers (PIL backend) when first needed.
      config: of the model: which id is the image token, and how a picture is read.
      directory: where all this comes from.
      image_aspect_ratio: what the original LLaVA calls so. "square" leaves a picture to the image
        processor, which crops it; "pad" first makes it square with bars of the mean colour, as
        LLaVA-1.5 was trained; "anyres" is LLaVA-NeXT's. None is "square", or "anyres" there.

    Attributes:
      anew: whether a picture is read anew for each question about it.
    """

    anew = False

    def __init__(
        self,
        tokenizer,
        pictures,
        config: LlavaConfig,
        directory=None,
        *,
        image_aspect_ratio: str | None = None,
    ):
        known = ("anyres",) if config.pinpoints else ("square", "pad")
        image_aspect_ratio = image_aspect_ratio or known[0]
        if image_aspect_ratio not in known:
            raise ValueError(
                f"image_aspect_ratio={image_aspect_ratio!r}: this model has {' and '.join(known)}"
            )
        self.tokenizer = tokenizer
        self.config = config
        self.directory = directory
        self.image_aspect_ratio = image_aspect_ratio
        self._pictures = pictures

    @classmethod
    def from_directory(
        cls,
        directory,
        config: LlavaConfig,
        *,
        pictures=None,
        image_aspect_ratio: str | None = None,
        **parts,
    ) -> Processor:
        """Of a local checkpoint directory.

        Args:
          directory: of the checkpoint. config: of the model.
          pictures: makes the image processor; None is that of the directory.
          image_aspect_ratio: see the class.
          parts: what else the class takes.
        """
        directory = pathlib.Path(directory)
        tokenizer = read_tokenizer(directory)
        tokenizer.chat_template = tokenizer.chat_template or _chat_template(directory)
        if IMAGE not in tokenizer.get_vocab():  # the original LLaVA code has none
            tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
            added = tokenizer.convert_tokens_to_ids(IMAGE)
            config = dataclasses.replace(config, image_token=added)
        pictures = pictures or functools.partial(read_image_processor, directory)
        parts["image_aspect_ratio"] = image_aspect_ratio
        return cls(tokenizer, pictures, config, directory, **parts)

    @functools.cached_property
    def image_processor(self):
        made = self._pictures()
        cuts = tuple(map(tuple, getattr(made, "image_grid_pinpoints", None) or ()))
        if cuts != self.config.pinpoints:
            raise ValueError(
                f"{self.directory}: the image processor cuts pictures at {cuts}, the model at "
                f"{self.config.pinpoints}; make image_grid_pinpoints the same in both configs"
            )
        return made

    def reads_pictures(self) -> list[Any]:
        """What pixels depend on, beside the picture: for the fingerprints of stores."""
        made = self.image_processor
        settings = made.to_dict() if hasattr(made, "to_dict") else made
        return [self.image_aspect_ratio, self.config.pinpoints, settings]

    def _fingerprint_(self) -> list[Any]:
        """What batches depend on, beside pictures and text."""
        tokenizers = [self.tokenizer, getattr(self, "qformer_tokenizer", None)]
        return [self.config, self.reads_pictures(), *map(_tokenizer_content, tokenizers)]

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
        sizes: Sequence[tuple[int, int]] | None = None,
        rows: int | None = None,
        length: int | None = None,
        left: bool = False,
    ) -> Batch:
        """A batch of one prompt a row.

        Args:
          images: one picture a row, or a list of pictures a row, or None for text; a picture is
            a path, bytes, an array or one of PIL, see `pictures.read`. One that is given again,
            such as `[picture] * 4` with four prompts, is encoded once.
          prompts: with `<image>` in it a prompt is used as it stands; without, it is set into
            the chat template, pictures first.
          answers: read after the prompt, with an end of turn; of kind answer.
          features: float[B, P, E], vision features of one picture a row, of all its places for
            tiles, in place of images.
          sizes: (height, width) of those pictures, where the model reads them by their size.
          rows: fill up with empty rows to this many.
          length: pad to this length instead of the nearest of LENGTHS.
          left: pad on the left.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts is a list of strings, one a row; got one string")
        pictures = self._read(images, features, sizes, len(prompts))
        if answers is not None and len(answers) != len(prompts):
            raise ValueError(f"{len(answers)} answers for {len(prompts)} prompts")
        made = [self._row(prompt, p) for prompt, p in zip(prompts, pictures, strict=True)]
        for row, answer in zip(made, answers or (), strict=False):
            self._answer(row, answer)
        return self._batch(made, pictures, features, rows, length, left)

    def pack(
        self,
        images: Sequence[Any] | None,
        turns: Sequence[Sequence[tuple[str, str]]],
        *,
        features: np.ndarray | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
        rows: int | None = None,
        length: int | None = None,
    ) -> Batch:
        """Several questions on one picture in one row: the picture is read once (but see `anew`).

        Each question with its answer is a segment of its own. It sees the picture and not the
        other questions, at the positions that it would have alone.

        Args:
          images: one picture a row.
          turns: (question, answer) pairs of each row.
          features, sizes, rows, length: as in a call.
        """
        pictures = self._read(images, features, sizes, len(turns))
        made = []
        for pairs, shown in zip(turns, pictures, strict=True):
            row, shared = Row(), None
            for segment, (question, answer) in enumerate(pairs, 1):
                if IMAGE in question:
                    raise ValueError(f"the packed question {question!r} names its picture again")
                alone = self._row(question, shown, first=len(row.told))
                ids, kinds, patches = alone.ids, alone.kinds, alone.patches
                row.told += alone.told
                if shared is None:  # up to the question all rows of a template are the same
                    shared = 0 if self.anew else kinds.index(tokens.CODE["question"])
                    row.add(ids[:shared], kinds[:shared], patches[:shared])
                    row.prompt = len(ids)
                row.add(ids[shared:], kinds[shared:], patches[shared:], segment=segment, at=shared)
                self._answer(row, answer, segment=segment, at=len(ids))
            made.append(row)
        if self.anew:
            pictures = [shown * len(pairs) for shown, pairs in zip(pictures, turns, strict=True)]
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
        question = prompt.strip()
        before, after = self._around(images)
        return before + question + after, slice(len(before), len(before) + len(question))

    def _around(self, images: int) -> tuple[str, str]:
        """What stands before and after what a user says, pictures before."""
        pictures = f"{IMAGE}\n" * images
        if not self.tokenizer.chat_template:
            return pictures, ""
        if not self._in_parts:
            before, after = self._turn(PLACE).split(PLACE)
            return before + pictures, after
        parts = [{"type": "image"}] * images + [{"type": "text", "text": PLACE}]
        try:
            before, after = self._turn(parts).split(PLACE)
        except Exception as error:
            raise ValueError(
                f"the chat template of {self.directory} does not take a plain user turn ({error}); "
                f"write {IMAGE} into the prompt to use it as it stands"
            ) from error
        return before, after

    @functools.cached_property
    def _in_parts(self) -> bool:
        """Whether the chat template wants pictures and text apart: it is a processor's then."""
        if not self.tokenizer.chat_template:
            return False
        try:
            return self._turn(PLACE).count(PLACE) != 1
        except Exception:  # whatever a template raises
            return True

    def _turn(self, content: str | list[dict[str, str]]) -> str:
        """One user turn in the chat template."""
        turns = [{"role": "user", "content": content}]
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    def _bare(self, prompt: str, text: str) -> bool:
        """Whether the special tokens of a row are still to be added to its text."""
        if IMAGE in prompt or not self.tokenizer.chat_template:
            return True
        # A tokenizer's template writes them itself; a processor's may leave them to the tokenizer.
        begin = self.tokenizer.bos_token
        return self._in_parts and not (begin and text.startswith(begin))

    def _row(self, prompt: str, pictures: Sequence[Picture], first: int = 0) -> Row:
        """The tokens of a prompt; `first` counts the pictures that stand in the row before it."""
        text, question = self.render(prompt, len(pictures))
        if text.count(IMAGE) != len(pictures):
            raise ValueError(
                f"the prompt {prompt!r} has {text.count(IMAGE)} {IMAGE} "
                f"for {len(pictures)} pictures"
            )
        row, shown = Row(), enumerate(pictures, first)
        for token, kind in zip(*self._coded(prompt, text, question), strict=True):
            if token == self.config.image_token:
                self._add_picture(row, *next(shown))
            else:
                row.add([token], [kind])
        row.prompt = len(row.ids)
        return row

    def _add_picture(self, row: Row, number: int, picture: Picture) -> None:
        """Appends the tokens of the row's picture of this number."""
        places, patches = self.config.tiles * self.config.image_tokens, picture.layout.patches
        kinds = np.where(patches < 0, tokens.CODE["newline"], tokens.CODE["image"])
        patches = np.where(patches < 0, -1, number * places + patches)
        row.add([self.config.image_token] * len(patches), kinds.tolist(), patches.tolist())

    def _coded(self, prompt: str, text: str, question: slice) -> tuple[list[int], list[int]]:
        """Ids and kinds of the whole text of a prompt."""
        return coded(self.tokenizer, text, question, special=self._bare(prompt, text))

    def _batch(self, made: list[Row], pictures, features, rows, length, left: bool) -> Batch:
        missing = max(0, (rows or 0) - len(made))
        made, pictures = made + [Row()] * missing, pictures + [[]] * missing
        longest = max(len(row.ids) for row in made)
        T = length or padded(longest)
        if longest > T:
            raise ValueError(f"a row has {longest} tokens, more than length={T}")
        # Every row has as many places for pictures, every picture as many for tiles: few shapes.
        place, count = _places(pictures, made)
        B, tiles = len(made), self.config.tiles * max((len(p) for p in pictures), default=0)
        n, side = self.config.image_tokens, self.config.token_grid
        ids = np.full((B, T), self.tokenizer.eos_token_id, np.int32)
        position, segment = np.zeros((2, B, T), np.int32)
        kind = np.zeros((B, T), np.int8)
        image_at = np.full((B, T), -1, np.int32)
        grid = {name: np.full((B, T), -1, np.int16) for name in ("row", "column", "tile")}
        last = np.zeros((B, T), bool)
        for b, row in enumerate(made):
            if not row.ids:
                continue
            at = np.arange(len(row.ids)) + (T - len(row.ids) if left else 0)
            ids[b, at], kind[b, at] = row.ids, row.kinds
            position[b, at], segment[b, at] = row.positions, row.segments
            last[b, at[row.prompt - 1]] = True
            kinds, patches = np.array(row.kinds), np.array(row.patches)
            image_at[b, at[kinds == tokens.CODE["newline"]]] = count * tiles * n
            places, number = at[patches >= 0], patches[patches >= 0]
            image_at[b, places] = place[b] * tiles * n + number
            grid["tile"][b, places] = number // n
            patch = number % n - (n - side**2)  # what is no patch, such as CLS, comes first
            places, patch = places[patch >= 0], patch[patch >= 0]
            grid["row"][b, places], grid["column"][b, places] = np.divmod(patch, max(side, 1))
        seen = [[]] * count
        for at, row in zip(place, pictures, strict=True):
            seen[at] = seen[at] or row
        pixels, real = self._pixels(seen, tiles, features is None)
        if features is not None:
            features = _spread(features, pictures, tiles // self.config.tiles)
            features = features.reshape(len(real), -1, features.shape[-1])
        return Batch(
            ids=ids,
            position=position,
            tokens=tokens.TokenMap(kind=kind, last=last, **grid),
            image_at=image_at,
            pixels=pixels,
            tile=np.tile(np.arange(tiles, dtype=np.int16), len(seen)),
            real=real,
            features=features,
            segment=segment if segment.any() else None,
            labels=_labels(kind),
            processor=self,
        )

    def _read(self, images, features, sizes, rows: int) -> list[list[Picture]]:
        """The pictures of each row; where features are given, one that nobody needs to see."""
        layout = self.config.layout
        if features is not None:
            if images is not None:
                raise ValueError("give images or features, not both")
            if len(features) != rows:
                raise ValueError(f"features of {len(features)} pictures for {rows} rows")
            sizes = [None] * rows if sizes is None else sizes
            pictures = [[Picture(None, layout(size))] for size in sizes]
        elif sizes is not None:
            raise ValueError("sizes= goes with features=: pictures say how large they are")
        else:
            images = [[]] * rows if images is None else images
            opened = _opened([_as_list(row) for row in images])
            # PIL says the width first.
            pictures = [[Picture(p, layout(p.size[::-1])) for p in row] for row in opened]
        if len(pictures) != rows:
            raise ValueError(f"{len(pictures)} rows of pictures for {rows} prompts")
        return pictures

    def _pixels(self, pictures: list[list[Picture]], tiles: int, read: bool):
        """Pixels [I, row, column, 3] of `tiles` places a row, and which of the I are real."""
        each, size = self.config.tiles, self.config.vision.image_size if read else 0
        real = np.zeros((len(pictures), tiles), bool)
        for places, row in zip(real, pictures, strict=True):
            for first, picture in zip(range(0, tiles, each), row, strict=False):
                places[first : first + picture.layout.tiles] = True
        real = real.reshape(-1)
        pixels = np.zeros((len(real), size, size, 3), np.float32)
        flat = [picture for row in pictures for picture in row]
        if read and flat:
            values = self._prepare([picture.image for picture in flat])
            own = [v[: picture.layout.tiles] for v, picture in zip(values, flat, strict=True)]
            pixels[real] = np.moveaxis(np.concatenate(own), 1, -1)
        return pixels, real

    def _prepare(self, images: list) -> np.ndarray:
        """float32[n, tiles, 3, row, column]: normalised by the checkpoint's image processor."""
        if self.image_aspect_ratio == "pad":
            images = [squared(image, self.image_processor.image_mean) for image in images]
        values = self.image_processor(images, return_tensors="np")["pixel_values"]
        return values.reshape(len(images), -1, *values.shape[-3:])


def squared(image, mean: Sequence[float]):
    """A picture in the middle of a square of the mean colour (Liu et al. 2023, LLaVA-1.5).

    Args:
      image: of PIL, in RGB. mean: of each channel, 0 to 1.
    """
    import PIL.Image

    side = max(image.size)
    if side**2 > picture_files.MAX_PIXELS:
        raise ValueError(
            f"a picture of {image.width} x {image.height} (width x height) makes a square of more "
            f"than {picture_files.MAX_PIXELS:,} pixels: make it smaller"
        )
    square = PIL.Image.new("RGB", (side, side), tuple(int(m * 255) for m in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _opened(rows: list[list]) -> list[list]:
    """The pictures of each row in RGB; one that is given twice is opened once."""
    opened = {}
    for number, row in enumerate(rows):
        for place, picture in enumerate(row):
            if (key := _key(picture)) not in opened:
                opened[key] = picture_files.read(picture, f"picture {place} of row {number}")
    return [[opened[_key(picture)] for picture in row] for row in rows]


def _key(picture) -> int | str:
    return os.fspath(picture) if isinstance(picture, (str, os.PathLike)) else id(picture)


def _places(pictures: list[list[Picture]], rows: list[Row]) -> tuple[list[int], int]:
    """Where each row's pictures stand among all, and how many places there are.

    Rows that read the same pictures, and are told the same of them, share a place; then the places
    are a power of two: few shapes. Where these are not fewer than the rows, each has its own.
    """

    def key(shown: list[Picture], row: Row) -> tuple:
        images = tuple(id(p.image) for p in shown if p.image is not None)
        return images and (images, tuple(tuple(told.ids) for told in row.told))

    keys = [key(*pair) for pair in zip(pictures, rows, strict=True)]
    distinct = list(dict.fromkeys(filter(None, keys)))
    count = 2 ** max(0, len(distinct) - 1).bit_length()
    if len(distinct) == sum(map(bool, keys)) or count >= len(keys):
        return list(range(len(keys))), len(keys)
    return [distinct.index(key) if key else 0 for key in keys], count


def coded(tokenizer, text: str, question: slice, *, special: bool) -> tuple[list[int], list[int]]:
    """Ids and kinds of a text: the question, and all else.

    Args:
      question: which characters it is.
      special: whether the tokenizer adds its special tokens.
    """
    found = tokenizer(
        text, add_special_tokens=special, return_offsets_mapping=True, return_attention_mask=False
    )
    asked = (
        low < question.stop and high > question.start and high > low
        for low, high in found["offset_mapping"]
    )
    return found["input_ids"], [tokens.CODE["question" if a else "system"] for a in asked]


def padded(length: int) -> int:
    """The nearest of LENGTHS."""
    return next((n for n in LENGTHS if n >= length), -(-length // LONGER) * LONGER)


def _spread(features: np.ndarray, pictures: list[list[Picture]], count: int) -> np.ndarray:
    """Features of one picture a row at each place [B, count] where it is read, zero elsewhere."""
    out = np.zeros((len(pictures), count, *features.shape[1:]), features.dtype)
    for places, row, values in zip(out, pictures, features, strict=False):
        places[: len(row)] = values
    return out


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


def _as_list(pictures) -> list:
    return list(pictures) if isinstance(pictures, (list, tuple)) else [pictures]


def _chat_template(directory: pathlib.Path) -> str | None:
    """The chat template in a file of its own; older checkpoints wrap it in JSON."""
    plain, wrapped = directory / "chat_template.jinja", directory / "chat_template.json"
    if plain.exists():
        return plain.read_text(encoding="utf-8")
    if wrapped.exists():
        return json.loads(wrapped.read_text(encoding="utf-8"))["chat_template"]
    return None


def read_tokenizer(directory: pathlib.Path):
    """The tokenizer that was saved there; one of sentencepiece alone is a Llama's."""
    # A second to import: only when needed.
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast

    for name, kind in (
        ("tokenizer.json", PreTrainedTokenizerFast),
        ("tokenizer.model", LlamaTokenizer),
    ):
        if (directory / name).exists():
            return kind.from_pretrained(directory)
    raise FileNotFoundError(
        f"{directory} has neither tokenizer.json nor tokenizer.model: save the tokenizer there "
        "with save_pretrained"
    )


def read_image_processor(directory: pathlib.Path):
    """The checkpoint's image processor, PIL backend: pixel values do not depend on torch."""
    from transformers import AutoImageProcessor

    for name in ("preprocessor_config.json", "processor_config.json"):
        if (directory / name).exists():
            return AutoImageProcessor.from_pretrained(directory, backend="pil")
    raise FileNotFoundError(f"{directory} has no preprocessor_config.json to prepare pictures with")


def _tokenizer_content(tokenizer) -> list[Any] | None:
    """All that a fast tokenizer is made of; how it last filled up or cut text is no part of it."""
    if tokenizer is None:
        return None
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    core |= {"padding": None, "truncation": None}
    return [core, tokenizer.chat_template, tokenizer.special_tokens_map]
