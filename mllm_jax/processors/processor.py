"""The processor: pictures and prompts to a batch whose every token knows what it is."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from mllm_jax import tokens
from mllm_jax.batch import Batch
from mllm_jax.checkpoints import files
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.processors import image_processors
from mllm_jax.processors import pictures as picture_files
from mllm_jax.processors import prompts as prompts_
from mllm_jax.processors import rows as rows_
from mllm_jax.processors.prompts import IMAGE, Chat, Questions, short
from mllm_jax.processors.rows import Picture, Row


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
      stop_ids: ids that end an answer, beside the end of a turn that the tokenizer names.

    Attributes:
      reencode_per_question: whether a picture is read anew for each question about it.
    """

    reencode_per_question = False

    def __init__(
        self,
        tokenizer,
        pictures,
        config: MultimodalConfig,
        directory=None,
        *,
        image_aspect_ratio: str | None = None,
        stop_ids: Sequence[int] = (),
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
        self._stop_ids = tuple(stop_ids)
        self._check_image_token()

    def _check_image_token(self) -> None:
        """The config and the tokenizer mean the same token, if both have one for images."""
        theirs = self.tokenizer.get_vocab().get(IMAGE)
        if theirs is not None and self.config.image_token not in (-1, theirs):
            place = f"{files.line(self.directory, 200)}/" if self.directory else ""
            raise ValueError(
                f"{place}config.json: image_token_index is {self.config.image_token}, but the "
                f"tokenizer (tokenizer.json beside it) gives {IMAGE} the id {theirs}: make them "
                "the same, else no picture would be seen"
            )

    @classmethod
    def from_directory(
        cls,
        directory,
        config: MultimodalConfig,
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
        tokenizer = prompts_.read_tokenizer(directory)
        if IMAGE not in tokenizer.get_vocab():  # the original LLaVA code has none
            tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
            added = tokenizer.convert_tokens_to_ids(IMAGE)
            config = dataclasses.replace(config, image_token=added)
        pictures = pictures or functools.partial(image_processors.read, directory)
        parts["image_aspect_ratio"] = image_aspect_ratio
        parts["stop_ids"] = prompts_.read_stop_ids(directory)
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
        image_processors.check_size(made, self.config.vision.image_size, self.directory)
        return made

    def picture_settings(self) -> list[Any]:
        """What pixels depend on, beside the picture: for the fingerprints of stores."""
        made = self.image_processor
        settings = made.to_dict() if hasattr(made, "to_dict") else made
        return [self.image_aspect_ratio, self.config.pinpoints, settings]

    def _fingerprint_(self) -> list[Any]:
        """What batches depend on, beside pictures and text."""
        tokenizers = [self.tokenizer, getattr(self, "qformer_tokenizer", None)]
        contents = map(prompts_.tokenizer_content, tokenizers)
        return [self.config, self.picture_settings(), self.stop_ids, *contents]

    @functools.cached_property
    def stop_ids(self) -> np.ndarray:
        """int32[n]: the ids that end an answer: at these transformers stops, too."""
        end = self.tokenizer.eos_token_id
        ids = ([] if end is None else [end]) + list(self._stop_ids)
        return np.array(list(dict.fromkeys(ids)), np.int32)

    @property
    def chat_template(self) -> prompts_.ChatTemplate | None:
        """The chat template, if there is one."""
        return prompts_.ChatTemplate.from_tokenizer(self.tokenizer)

    def __call__(
        self,
        images: Sequence[Any] | None,
        prompts: Sequence[str | Chat],
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
            the chat template, pictures first. Or a chat of several turns, see `prompts`: what
            its users say is of kind question, all else of kind system; the pictures are those of
            `images`, or else those that its parts hold.
          answers: read after the prompt, with an end of turn; of kind answer. Plain text: that of
            a special token is refused.
          features: float[B, P, E], vision features of one picture a row, of all its places for
            tiles, in place of images.
          sizes: (height, width) of those pictures, where the model reads them by their size.
          rows: fill up with empty rows to this many.
          length: pad to this length instead of the nearest of LENGTHS.
          left: pad on the left.
        """
        prompts = prompts_.parse_prompts(prompts)
        if not prompts and not rows:
            raise ValueError("prompts is empty: there is nothing to make a batch of")
        pictures = self._read(_shown(images, prompts), features, sizes, len(prompts))
        if answers is not None:
            answers = prompts_.as_strings(answers, "answers")
            if len(answers) != len(prompts):
                raise ValueError(f"{len(answers)} answers for {len(prompts)} prompts")
        made = [
            self._row(prompt, shown, f"prompts, row {number}")
            for number, (prompt, shown) in enumerate(zip(prompts, pictures, strict=True))
        ]
        for number, (row, answer) in enumerate(zip(made, answers or (), strict=False)):
            self._answer(row, answer, f"answers, row {number}")
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
        """Return a batch of several questions on one picture a row.

        Each question with its answer is a segment of its own. It sees the picture and not the
        other questions, at the positions that it would have alone.

        Args:
          images: one picture a row.
          turns: (question, answer) pairs of each row.
          features, sizes, rows, length: as in a call.
        """
        turns = [_pairs(pairs, row) for row, pairs in enumerate(prompts_.as_list(turns, "turns"))]
        pictures = self._read(images, features, sizes, len(turns))
        made = []
        for number, (pairs, shown) in enumerate(zip(turns, pictures, strict=True)):
            row, shared = Row(), None
            for segment, (question, answer) in enumerate(pairs, 1):
                at = f"turns, row {number}, question {segment}"
                if IMAGE in question:
                    raise ValueError(
                        f"{at}: the packed question {short(question)} names its picture again"
                    )
                alone = self._row(question, shown, at, first=len(row.qformer_rows))
                ids, kinds, patches = alone.ids, alone.kinds, alone.patches
                row.qformer_rows += alone.qformer_rows
                if shared is None:  # up to the question all rows of a template are the same
                    shared = (
                        0 if self.reencode_per_question else kinds.index(tokens.CODE["question"])
                    )
                    row.add(ids[:shared], kinds[:shared], patches[:shared])
                    row.prompt = len(ids)
                row.add(ids[shared:], kinds[shared:], patches[shared:], segment=segment, at=shared)
                self._answer(row, answer, at, segment=segment, place=len(ids))
            made.append(row)
        if self.reencode_per_question:
            pictures = [shown * len(pairs) for shown, pairs in zip(pictures, turns, strict=True)]
        return self._batch(made, pictures, features, rows, length, False)

    def _answer(
        self, row: Row, answer: str, at: str, *, segment: int = 0, place: int | None = None
    ) -> None:
        with _naming(at):
            ids = self.answer_ids(answer)
        row.add(ids, [tokens.CODE["answer"]] * len(ids), segment=segment, at=place)

    def answer_ids(self, answer: str, *, end: bool = True) -> list[int]:
        """The tokens of an answer, with the end of turn.

        Raises:
          ValueError: it holds the text of a special token; or no token ends a turn.
        """
        ids = prompts_.answer_ids(self.tokenizer, answer)
        prompts_.check_vocab(self.tokenizer, ids, self.config.lm.vocab)
        if end and not len(self.stop_ids):
            raise ValueError(
                f"the tokenizer of {self.directory or 'this model'} names no token that ends an "
                "answer: set eos_token in tokenizer_config.json"
            )
        return ids + [int(token) for token in self.stop_ids[:end]]

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

    def render(self, prompt: str | Chat, images: int) -> tuple[str, Questions]:
        """The whole text of a prompt, and which parts of it are the question."""
        if isinstance(prompt, str):
            if IMAGE in prompt or not self.chat_template:
                before = "" if IMAGE in prompt else f"{IMAGE}\n" * images
                return before + prompt, (slice(len(before), len(before) + len(prompt)),)
            prompt = [{"role": "user", "content": prompt}]
        if not self.chat_template:
            raise ValueError(
                f"{self.directory or 'this model'} has no chat template to set a chat into"
            )
        try:
            return self.chat_template.render(prompts_.put_images_first(prompt, images))
        except ValueError as error:
            turn = "a plain user turn" if len(prompt) == 1 else "this chat"
            raise ValueError(
                f"the chat template of {self.directory} does not take {turn} ({error}); "
                f"write {IMAGE} into the prompt to use it as it stands"
            ) from error

    def _bare(self, prompt: str | Chat, text: str) -> bool:
        """Whether the special tokens of a row are still to be added to its text."""
        if not self.chat_template or (isinstance(prompt, str) and IMAGE in prompt):
            return True
        # A tokenizer's template writes them itself; a processor's may leave them to the tokenizer.
        begin = self.tokenizer.bos_token
        return self.chat_template.takes_parts and not (begin and text.startswith(begin))

    def _row(self, prompt: str | Chat, pictures: Sequence[Picture], at: str, first: int = 0) -> Row:
        """The tokens of a prompt.

        Args:
          at: where it comes from, for errors.
          first: how many pictures stand in the row before it.
        """
        with _naming(at):
            row = self._prompt(prompt, pictures, first)
            if not row.ids:
                raise ValueError("the prompt is empty")
            image = sum(kind in rows_.IMAGE_KINDS for kind in row.kinds)
            needed = sum(len(picture.layout.patches) for picture in pictures)
            if image != needed:
                raise ValueError(
                    f"{len(pictures)} pictures need {needed} image tokens, the prompt has {image}"
                )
        row.prompt = len(row.ids)
        return row

    def _prompt(self, prompt: str | Chat, pictures: Sequence[Picture], first: int) -> Row:
        text, questions = self.render(prompt, len(pictures))
        row, shown = Row(), enumerate(pictures, first)
        ids, kinds = self._coded(prompt, text, questions)
        if text.count(IMAGE) != len(pictures):
            raise ValueError(
                f"the prompt {short(prompt)} has {text.count(IMAGE)} {IMAGE} "
                f"for {len(pictures)} pictures"
            )
        if ids.count(self.config.image_token) != len(pictures):
            raise ValueError(f"the tokenizer makes other tokens of {IMAGE} than the image token")
        for token, kind in zip(ids, kinds, strict=True):
            if token == self.config.image_token:
                self._add_picture(row, *next(shown))
            else:
                row.add([token], [kind])
        return row

    def _add_picture(self, row: Row, number: int, picture: Picture) -> None:
        """Appends the tokens of the row's picture of this number."""
        places, patches = self.config.tiles * self.config.image_tokens, picture.layout.patches
        kinds = np.where(patches < 0, tokens.CODE["newline"], tokens.CODE["image"])
        patches = np.where(patches < 0, -1, number * places + patches)
        row.add([self.config.image_token] * len(patches), kinds.tolist(), patches.tolist())

    def _coded(
        self, prompt: str | Chat, text: str, questions: Questions
    ) -> tuple[list[int], list[int]]:
        """Ids and kinds of the whole text of a prompt."""
        return prompts_.tokenize(
            self.tokenizer, text, questions, special=self._bare(prompt, text),
            vocab=self.config.lm.vocab, image=self.config.image_token,
        )  # fmt: skip

    def _batch(self, made: list[Row], pictures, features, rows, length, left: bool) -> Batch:
        missing = max(0, (rows or 0) - len(made))
        made, pictures = made + [Row()] * missing, pictures + [[]] * missing
        longest = max(len(row.ids) for row in made)
        T = length or rows_.round_up_length(longest)
        if longest > T:
            raise ValueError(f"a row has {longest} tokens, more than length={T}")
        # Every row has as many places for pictures, every picture as many for tiles: few shapes.
        place, count = rows_.assign_image_slots(pictures, made)
        B, tiles = len(made), self.config.tiles * max((len(p) for p in pictures), default=0)
        n, side = self.config.image_tokens, self.config.token_grid
        ids = np.full((B, T), self.stop_ids[0] if len(self.stop_ids) else 0, np.int32)
        position, segment = np.zeros((2, B, T), np.int32)
        kind = np.zeros((B, T), np.int8)
        image_token_index = np.full((B, T), -1, np.int32)
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
            image_token_index[b, at[kinds == tokens.CODE["newline"]]] = count * tiles * n
            places, number = at[patches >= 0], patches[patches >= 0]
            image_token_index[b, places] = place[b] * tiles * n + number
            grid["tile"][b, places] = number // n
            patch = number % n - (n - side**2)  # what is no patch, such as CLS, comes first
            places, patch = places[patch >= 0], patch[patch >= 0]
            grid["row"][b, places], grid["column"][b, places] = np.divmod(patch, max(side, 1))
        seen = [[]] * count
        for at, row in zip(place, pictures, strict=True):
            seen[at] = seen[at] or row
        pixels, real = self._pixels(seen, tiles, features is None)
        if features is not None:
            features = rows_.place_features(features, pictures, tiles // self.config.tiles)
            features = features.reshape(len(real), -1, features.shape[-1])
        return Batch(
            ids=ids,
            position=position,
            tokens=tokens.TokenMap(kind=kind, last=last, **grid),
            image_token_index=image_token_index,
            pixels=pixels,
            tile=np.tile(np.arange(tiles, dtype=np.int16), len(seen)),
            is_real_tile=real,
            features=features,
            segment=segment if segment.any() else None,
            labels=rows_.answer_positions(kind),
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
            opened = _opened(picture_rows([[]] * rows if images is None else images))
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
            mean = self.image_processor.image_mean
            images = [image_processors.pad_to_square(image, mean) for image in images]
        values = image_processors.preprocess(
            self.image_processor, images, self.config.vision.image_size, self.directory
        )
        return values.reshape(len(images), -1, *values.shape[-3:])


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


def _shown(images: Any, prompts: Sequence[str | Chat]) -> Any:
    """The pictures of each row: those that are given, or else those that the chats hold."""
    held = [
        [p["image"] for p in prompts_.image_parts(prompt) if "image" in p] for prompt in prompts
    ]
    if not any(held):
        return images
    if images is not None:
        raise ValueError("the chats hold pictures in their parts: give those or images, not both")
    return held


def picture_rows(images: Any) -> list[list]:
    """Pictures as a list for each row.

    Args:
      images: for each row a picture, or a list of pictures.
    """
    one = isinstance(images, (str, bytes, os.PathLike)) or hasattr(images, "convert")
    if one or (hasattr(images, "ndim") and images.ndim < 4) or not isinstance(images, Iterable):
        raise ValueError(
            "images is a list with a picture, or a list of pictures, for each row; got "
            f"{type(images).__name__}: write images=[picture]"
        )
    return [list(row) if isinstance(row, (list, tuple)) else [row] for row in images]


def _pairs(pairs: Any, row: int) -> list[tuple[str, str]]:
    """The questions of a packed row with their answers."""
    found = [tuple(prompts_.as_list(p, f"turns, row {row}", "pairs")) for p in pairs]
    if not found:
        raise ValueError(f"turns, row {row}: there is no question")
    for number, pair in enumerate(found, 1):
        if len(pair) != 2 or not all(isinstance(part, str) for part in pair) or not pair[0].strip():
            raise ValueError(
                f"turns, row {row}, question {number}: {short(pair)} is no pair of a question, "
                "which is not empty, and its answer"
            )
    return found


@contextlib.contextmanager
def _naming(at: str) -> Iterator[None]:
    """Names the place where a prompt or answer that is wrong comes from."""
    try:
        yield
    except ValueError as error:
        raise ValueError(files.line(f"{at}: {error}")) from error
