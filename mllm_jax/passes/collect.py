"""Collect activations on disk, with their positions in the data, and read them in any order.

The files are safetensors: PyTorch, NumPy and JAX read them by memory map without this library, an
array of n vectors is contiguous, and the format has bfloat16.
"""

from __future__ import annotations

import math
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np
import tqdm

from mllm_jax.arguments import require_whole
from mllm_jax.batch import Batch
from mllm_jax.checkpoints.shards import (
    ShardStore,
    TableReader,
    free_bytes,
    read_record,
    table_names,
)
from mllm_jax.files import name as short_name
from mllm_jax.interventions import binding
from mllm_jax.interventions.bound_capture import BoundCapture, Places
from mllm_jax.interventions.captures import Capture
from mllm_jax.interventions.edits import Edits
from mllm_jax.interventions.model import Model
from mllm_jax.interventions.shapes import look_up, site_shapes
from mllm_jax.interventions.splices import latent_sites
from mllm_jax.passes import arguments
from mllm_jax.passes.run import run, unshare_patched
from mllm_jax.sharding import hosts
from mllm_jax.typing import Bool, Float, Int

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
SHARD_BYTES = 2**27  # a killed run repeats the work of at most one shard


class Vectors(NamedTuple):
    """Vectors and their positions in the data; a single vector has no axis n.

    Attributes:
      value: The activations, [n, F], or [n, L, F] for several layers. A site with heads keeps its
        axes, such as [n, N, H].
      example: The example, counted from 0 through the data, int64[n].
      token: The token of the example, counted without padding, or of the tile, int32[n].
      tile: The tile within the example, int16[n]; -1 for text.
      row: The row on the grid of the tile, int16[n]; -1 elsewhere.
      column: The column on that grid, int16[n]; -1 elsewhere.
    """

    value: Float[np.ndarray, "n ..."]
    example: Int[np.ndarray, " n"]
    token: Int[np.ndarray, " n"]
    tile: Int[np.ndarray, " n"]
    row: Int[np.ndarray, " n"]
    column: Int[np.ndarray, " n"]


class VectorSource:
    """The vectors of one capture of a collection, in the order of the data: a data source.

    `len(source)`, `source[i]` and `source.__getitems__([i, j])` are the interface of data sources
    in Grain and PyTorch. An array or a slice as index returns all those vectors at once.

    Args:
      folder: The folder of the collection.
      name: The name of the capture.
    """

    def __init__(self, folder: str | pathlib.Path, name: str) -> None:
        self.folder, self.name = pathlib.Path(folder), name
        self._reader = TableReader(self.folder, name)

    def __reduce__(self) -> tuple[Any, ...]:
        """Reopen the files in another process, instead of copying their content."""
        return VectorSource, (self.folder, self.name)

    def __repr__(self) -> str:
        return f"VectorSource({self.folder}, {self.name}: {len(self)} x {self.shape} {self.dtype})"

    def __len__(self) -> int:
        return len(self._reader)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a vector: (F,), or (L, F) of several layers."""
        return self._reader.kinds["value"][1]

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the vectors."""
        return self._reader.kinds["value"][0]

    def __getitem__(self, index: int | slice | Int[np.ndarray, " n"] | Sequence[int]) -> Vectors:
        if isinstance(index, int | np.integer):
            return Vectors(*(array[0] for array in self._take(np.array([index]))))
        if isinstance(index, slice):
            index = np.arange(len(self))[index]
        return self._take(self._whole(index))

    def __getitems__(self, indices: Sequence[int]) -> list[Vectors]:
        """Return a list of vectors, read at once."""
        taken = self._take(self._whole(indices))
        return [Vectors(*one) for one in zip(*taken, strict=True)]

    def shuffled(self, size: int, *, seed: int, drop_last: bool = False) -> Iterator[Vectors]:
        """Yield all vectors once, in random order.

        Args:
          size: The number of vectors to yield at once.
          seed: The seed of the order; give each epoch its own.
          drop_last: Whether to drop the last vectors if they are fewer than `size`.
        """
        order = np.random.default_rng(seed).permutation(len(self))
        end = len(self) - len(self) % size if drop_last else len(self)
        for start in range(0, end, size):
            yield self._take(order[start : start + size])

    def _whole(self, index: Any) -> Int[np.ndarray, " n"]:
        """Return an index, which may be a mask of all vectors, as integers.

        Raises:
          IndexError: It is neither, or is a mask of another length.
        """
        array = np.asarray(index)
        if array.dtype == bool and array.shape == (len(self),):
            return np.flatnonzero(array)
        if array.ndim != 1 or not (np.issubdtype(array.dtype, np.integer) or not array.size):
            raise IndexError(
                f"an index of {self.name} is an integer, a slice, a list of integers or a mask "
                f"bool[{len(self)}], not {array.dtype}{list(array.shape)}"
            )
        return array.astype(np.int64)

    def _take(self, indices: Int[np.ndarray, " n"]) -> Vectors:
        return Vectors(**self._reader.take(indices))


class Collection(Mapping[str, VectorSource]):
    """The collected captures of a folder, by name; see `read_collection`.

    Attributes:
      examples: The number of examples that were read, including those without a selected token.
    """

    def __init__(self, folder: str | pathlib.Path) -> None:
        self.folder = pathlib.Path(folder)
        record = read_record(self.folder)
        self.examples: int = record["examples"]
        self._names = table_names(self.folder, record)

    def __getitem__(self, name: str) -> VectorSource:
        if name not in self._names:
            raise KeyError(f"no capture '{name}'; {self.folder} has: {', '.join(self._names)}")
        return VectorSource(self.folder, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_collection(path: str | pathlib.Path) -> Collection:
    """Open the collection that `collect` wrote to a folder; changed files are verified first.

    Raises:
      ValueError: The folder is damaged.
      FileNotFoundError: It holds no collection.
    """
    return Collection(path)


def collect(
    captures: dict[str, Capture],
    model: Model,
    batches: Iterable[Batch],
    path: str | pathlib.Path,
    edits: Edits | None = None,
    *,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    shard_bytes: int = SHARD_BYTES,
    restart: bool = False,
    label: str = "collect",
) -> Collection:
    """Write the kept activations of selected tokens to disk, for probes and dictionaries.

    Before the first pass it prints the estimated bytes of an example, and of all batches if their
    number is known. A run that was killed or whose disk was full continues after its last shard and
    produces the same bytes; further batches are appended. Finished batches are made again to
    compare their content, but are not run.

    Args:
      captures: `keep` of some sites, layers, units and tokens, by name.
      model: See `run`.
      batches: A sequence or an iterable, read one by one.
      path: A folder for the shards, with fingerprints of the model, the captures, the edits, the
        batches and the settings.
      edits: The edits to apply.
      dtype: The dtype in which vectors are stored.
      shard_bytes: The smallest size of a full shard.
      restart: Whether to remove an existing collection.
      label: The label of the progress bar.

    Returns:
      The collection, from which `collection["name"]` reads vectors in any order.

    Raises:
      ValueError: A capture is not `keep`, there is no batch, or the folder is damaged or belongs to
        other arguments.
      OSError: The disk has too little space, or is full.
    """
    arguments.check_stream(captures, model, batches, edits)
    shard_bytes = require_whole("shard_bytes", shard_bytes, most=2**63 - 1)
    if not captures:
        raise ValueError("there is no capture to collect")
    for name, capture in captures.items():
        if capture.form != "keep" or "S" in capture.address.site.axes:
            raise ValueError(
                f"capture '{name}' ({capture.form} of {capture.address.site}) has no vector for "
                "each token: collect reads keep; for other captures use reduce, for attention run"
            )
    if dtype not in DTYPES:
        raise ValueError(f'dtype="{dtype}" is not one of {", ".join(DTYPES)}')
    store = ShardStore(
        path, shard_bytes=shard_bytes, restart=restart, model=model, captures=captures,
        edits=edits, settings={"dtype": dtype, "shard_bytes": shard_bytes},
    )  # fmt: skip
    rest, started = store.resume(batches), store.done
    count = len(batches) if isinstance(batches, Sized) else None
    for batch in tqdm.tqdm(rest, desc=label, initial=started, total=count, leave=False):
        arguments.check(model, batch)
        batch = unshare_patched(model, batch.replace(processor=None), edits)
        selections = _selections(captures, model, batch, edits, DTYPES[dtype])
        if store.done == started:
            left = None if count is None else count - started
            _announce_size(store, label, selections, left)
        out = run(model, batch, edits, captures, logits="none")
        tables = {
            name: selection.vectors(np.asarray(out[name]), store.examples)._asdict()
            for name, selection in selections.items()
        }
        store.append(batch, tables, next(iter(selections.values())).examples)
        if hosts.preemption_requested():
            store.flush()
            hosts.exit_preempted(label)
    if not store.done:
        raise ValueError(f"{label}: there was no batch to collect")
    store.flush()
    hosts.barrier(f"collected {path}")
    return read_collection(path)


class _Selection(NamedTuple):
    """The selected tokens of a batch, for one capture.

    Attributes:
      mask: The selected tokens, bool[B, T].
      places: The positions of the tokens in the batch.
      layered: Whether the kept array has a leading layer axis.
      shape: The shape of a vector.
      dtype: The dtype in which it is stored.
    """

    mask: Bool[np.ndarray, "B T"]
    places: Places
    layered: bool
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def examples(self) -> int:
        return int(self.places.examples)

    @property
    def bytes(self) -> int:
        """The bytes of the vectors and their positions."""
        each = math.prod(self.shape) * self.dtype.itemsize + 18
        return int(self.mask.sum()) * each

    def vectors(self, kept: Float[np.ndarray, "*L B T F"], first: int) -> Vectors:
        """Return the selected tokens of a kept array.

        Args:
          kept: The result of `keep`.
          first: The number of the first example of the batch.
        """
        at = np.nonzero(self.mask)
        by_token = np.moveaxis(kept, 0, 2) if self.layered else kept  # [B, T, L, F], a view
        places = self.places
        return Vectors(
            value=by_token[at].astype(self.dtype),
            example=(np.asarray(places.example)[at[0]] + first).astype(np.int64),
            token=np.asarray(places.token)[at].astype(np.int32),
            tile=np.asarray(places.tile)[at].astype(np.int16),
            row=np.asarray(places.row)[at].astype(np.int16),
            column=np.asarray(places.column)[at].astype(np.int16),
        )


def _selections(
    captures: dict[str, Capture], model: Model, batch: Batch, edits: Edits | None, dtype: np.dtype
) -> dict[str, _Selection]:
    shapes, maps = site_shapes(model, batch), model.token_maps(batch)
    selections, bound_captures = {}, binding.bind_captures(captures, shapes, maps, edits)
    shapes = shapes | {name: site.spec for name, site in latent_sites(edits, shapes).items()}
    for name, bound in bound_captures.items():
        token_map = bound.site.entry(maps)
        mask = np.asarray(bound.tokens)
        if bound.readers is not None:  # a tile that no row reads has no example
            mask = mask & np.asarray(bound.readers).any(0, keepdims=True).T
        layered, shape = not bound.single, _vector_shape(bound, look_up(bound.site, shapes).shape)
        places = binding.places_of(token_map, maps["lm"])
        selections[name] = _Selection(mask, places, layered, shape, dtype)
    return selections


def _vector_shape(bound: BoundCapture, site: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of one token's values; `site` is that of the tensor in one layer."""
    sizes = list(site)
    if bound.units is not None:
        sizes[bound.site.unit_axis] = len(bound.units)
    return (*(() if bound.single else (bound.count,)), *sizes[2:])


def _announce_size(
    store: ShardStore, label: str, selections: dict[str, _Selection], batches: int | None
) -> None:
    """Print the size of the collection; raise an error if the disk lacks the space.

    Args:
      store: The store that it is written to.
      label: The label of the progress bar.
      selections: The selections of the first batch.
      batches: The number of batches, if known.

    Raises:
      OSError: The disk has too little space.
    """
    size = sum(selection.bytes for selection in selections.values())
    examples = max(1, next(iter(selections.values())).examples)
    needed, free = size * (batches or 1), free_bytes(store.folder)
    each = f"{_readable(size / examples)} an example"
    total = each if batches is None else f"{_readable(needed)} for {batches} batches, {each}"
    place = short_name(store.folder, 100)
    if hosts.broadcast_from_primary(needed > free):
        raise OSError(
            f"{label}: {total}, does not fit in {place}, where {_readable(free)} are free: select "
            "fewer tokens or layers, give another path, or free some space, and start again"
        )
    if hosts.is_primary():
        print(f"{label}: {total}; {_readable(free)} are free in {place}", file=sys.stderr)


def _readable(size: float) -> str:
    """Return a number of bytes as text."""
    power = min(4, max(0, int(math.log(max(size, 1), 1000))))
    return f"{size / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
