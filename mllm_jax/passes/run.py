"""One forward pass: a pure function of (model, batch, edits), with the requested results."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from mllm_jax import notebook_results, sites
from mllm_jax.batch import Batch
from mllm_jax.interventions import binding, finite
from mllm_jax.interventions.bound_capture import BoundCapture
from mllm_jax.interventions.captures import Capture
from mllm_jax.interventions.edits import BoundEdit, Edits
from mllm_jax.interventions.model import Model
from mllm_jax.interventions.receipts import Receipt
from mllm_jax.interventions.shapes import site_shapes
from mllm_jax.interventions.tap import Taps
from mllm_jax.models.cache import Cache
from mllm_jax.passes import arguments
from mllm_jax.sharding import mesh
from mllm_jax.typing import AnyArray, Array, Bool, Float

Logits = Literal["last", "all", "none"]
LOGITS = ("last", "all", "none")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Out:
    """The results of a pass.

    Attributes:
      logits: float32[B, V] at each row's last token; [B, T, V] for "all"; None for "none".
      captures: The captures by name; `out["name"]` for short.
      receipts: One for each edit, in order.
      finite: With `check_finite`, whether each site is finite, by name: bool[L], or bool[] of a
        site without layers. See `finite.first_not_finite`.
      processor: The processor of the batch, if it has one, which turns tokens into text for
        notebooks. Static.
    """

    logits: Float[Array, "B V"] | Float[Array, "B T V"] | None
    captures: dict[str, Any]
    receipts: tuple[Receipt, ...]
    finite: dict[str, Bool[AnyArray, ...]] | None = None
    processor: Any = dataclasses.field(default=None, metadata={"static": True})

    def __getitem__(self, name: str) -> Any:
        if name not in self.captures:
            known = ", ".join(self.captures) or "none"
            raise KeyError(f"no capture '{name}'; this pass has: {known}")
        return self.captures[name]

    def _repr_html_(self) -> str:
        return notebook_results.out(self.receipts, self.logits, self.captures, self.processor)


def run(
    model: Model,
    batch: Batch,
    edits: Edits | None = None,
    captures: dict[str, Capture] | None = None,
    *,
    logits: Logits = "last",
    remat: bool = False,
    check_finite: bool = False,
) -> Out:
    """Run one forward pass.

    It is a pure function, which can be called inside `jax.jit`, `vmap` and `grad`. Outside of these
    it compiles once per structure and keeps the program.

    Args:
      model: A network with sites.
      batch: The batch that it reads.
      edits: The edits to apply.
      captures: The captures to return, by name.
      logits: "last" at each row's last token, "all", or "none".
      remat: Whether to recompute a layer's tensors in the backward pass instead of keeping them.
      check_finite: Whether to check every site for NaN and infinities, apart from padding, and
        report the first. Inside `jax.jit` no error can be raised: use `Out.finite` there.

    Raises:
      ValueError: An argument has a wrong type; an edit or capture does not fit, or selects nothing;
        or, with `check_finite`, a site is not finite.
    """
    arguments.check(model, batch, edits, captures)
    check_logits(logits, batch)
    processor, batch = batch.processor, batch.replace(processor=None)
    batch = unshare_patched(model, batch, edits)
    if check_finite:
        captures = (captures or {}) | finite.captures(site_shapes(model, batch), logits)
    bound_edits, bound_captures = binding.bind(model, batch, edits, captures, logits)
    with mesh.use_mesh_of(model):
        inputs = mesh.shard_batch(batch), shard_edits(bound_edits), bound_captures
        out = mesh.gather_to_host(compiled_run(model, *inputs, logits=logits, remat=remat))
    out = dataclasses.replace(out, processor=processor)
    if not check_finite:
        return out
    results, checks = finite.separate(out.captures)
    finite.require(checks)
    return dataclasses.replace(out, captures=results, finite=checks)


def check_logits(logits: Logits, batch: Batch) -> None:
    """Raise ValueError unless a value is one of LOGITS that a pass of the batch can compute."""
    if not isinstance(logits, str) or logits not in LOGITS:
        raise ValueError(f'logits="{logits!s:.60}" is not one of {", ".join(LOGITS)}')
    if logits != "last" or isinstance(batch.segment, jax.core.Tracer):
        return
    if packed := batch.packed_rows:
        raise ValueError(
            f'row {min(packed)} holds several packed questions, and logits="last" are of one: use '
            'logits="all" or "none", or the rows of processor.unpack(batch)'
        )


def unshare_patched(model: Model, batch: Batch, edits: Edits | None) -> Batch:
    """Return the batch, with separate pictures for each row if a patch writes pictures."""
    patched = any(e.kind == "patch" and "I" in e.address.site.axes for e in edits or ())
    return model.unshared(batch) if patched else batch


def shard_edits(
    bound: tuple[BoundEdit, ...], put: Callable[[Any, tuple], Any] = mesh.shard
) -> tuple[BoundEdit, ...]:
    """Return edits sharded so that each device holds the values for its part of the site.

    Args:
      bound: The edits.
      put: A function that shards an array by its axis letters, see `mesh.shard`.
    """
    return tuple(_shard_edit(edit, put) for edit in bound)


def _shard_edit(edit: BoundEdit, put: Callable[[Any, tuple], Any]) -> BoundEdit:
    site = edit.site
    full, rows = ("L", *site.axes), (site.axes[0], None)

    def value(array):
        return put(array, full if array.ndim == len(full) else (None,) * array.ndim)

    return dataclasses.replace(
        edit,
        units=put(edit.units, ("L", site.axes[site.unit_axis])),
        tokens=put(edit.tokens, rows),
        values=jax.tree.map(value, edit.values),
        along=jax.tree.map(lambda array: put(array, rows), edit.along),
        splice=jax.tree.map(lambda array: put(array, (None,) * array.ndim), edit.splice),
    )


def forward(
    model: Model, batch: Batch, taps: Taps, logits: Logits = "last"
) -> tuple[Float[Array, ...] | None, Cache]:
    """Trace the pass; return the logits, and the keys and values of every token."""
    x, cache = model(batch, taps)
    if logits == "none":
        items: list[BoundEdit | BoundCapture] = [*taps.edits, *taps.captures.values()]
        if any(item.site == sites.logits for item in items):
            raise ValueError('this pass computes no logits to edit or capture: logits="none"')
        return None, cache
    if logits == "all":
        return model.logits(x, taps), cache
    return logits_at_last(model, batch, x, taps), cache


def logits_at_last(
    model: Model, batch: Batch, x: Float[Array, "B T D"], taps: Taps
) -> Float[Array, "B V"]:
    """Return the logits at each row's last token."""
    last = jnp.take_along_axis(x, batch.last[:, None, None], 1)
    return model.logits(last, _taps_at_last(taps, batch))[:, 0]


def _taps_at_last(taps: Taps, batch: Batch) -> Taps:
    """Return taps whose masks of the logits site cover only each row's last token.

    They collect their results in the given taps.
    """

    def pick(array):  # [B, T]
        return jnp.take_along_axis(jnp.asarray(array), batch.last[:, None], 1)

    def pick_value(array):  # [1, B, T, V], or without tokens
        if array.ndim < 4 or array.shape[2] == 1:
            return array
        return jnp.take_along_axis(jnp.asarray(array), batch.last[None, :, None, None], 2)

    def edit_at_last(edit: BoundEdit) -> BoundEdit:
        if edit.site != sites.logits:
            return edit
        selected, along = pick(edit.tokens), jax.tree.map(pick, edit.along)
        if "at" in along:  # it reads the last token of a row, or nothing that is computed
            selected = selected & (along["at"] == jnp.take(batch.last, along["row"]))
            along["at"] = jnp.full_like(along["at"], taps.at)
        values = jax.tree.map(pick_value, edit.values)
        return dataclasses.replace(edit, tokens=selected, values=values, along=along)

    def capture_at_last(capture: BoundCapture) -> BoundCapture:
        return capture.map_tokens(pick) if capture.site == sites.logits else capture

    return taps.with_items(
        tuple(edit_at_last(edit) for edit in taps.edits),
        {name: capture_at_last(capture) for name, capture in taps.captures.items()},
    )


@functools.partial(jax.jit, static_argnames=("logits", "remat"))
def compiled_run(
    model: Model,
    batch: Batch,
    edits: tuple[BoundEdit, ...],
    captures: dict[str, BoundCapture],
    *,
    logits: Logits,
    remat: bool,
) -> Out:
    """Run one forward pass of bound edits and captures; see `run`."""
    taps = Taps(edits, captures, remat=remat)
    scores, _ = forward(model, batch, taps, logits)
    return Out(scores, taps.results(), taps.receipt_list())
