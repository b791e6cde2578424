"""Contrasts: a metric of two inputs, clean and corrupt, whose difference is to be explained.

The batches have one layout: the same questions about other pictures, or other questions of equally
many tokens about the same pictures. `patching`, `paths`, `edges` and `circuits` ask which parts of
the model carry the difference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import jax
import numpy as np

from mllm_jax import sites as S
from mllm_jax.analysis import attribution, checks
from mllm_jax.batch import Batch, join
from mllm_jax.interventions import edits as edits_
from mllm_jax.interventions.captures import Capture
from mllm_jax.interventions.edits import Edits
from mllm_jax.interventions.model import Model
from mllm_jax.interventions.shapes import site_shapes
from mllm_jax.passes.arguments import as_partial
from mllm_jax.passes.run import Logits, Out, run
from mllm_jax.passes.sweep import sweep
from mllm_jax.sites import Site
from mllm_jax.typing import Array, Bool, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Contrast:
    """A metric of two batches, clean and corrupt; see `of`.

    Attributes:
      metric: A pure function of the logits of one pass that gives float[B], one value per row.
      model: See `run`.
      clean: The batch whose metric is explained.
      corrupt: The batch that activations are taken from.
      edits: Edits of every pass.
      logits: See `run`. Static.
    """

    metric: jax.tree_util.Partial
    model: Model
    clean: Batch
    corrupt: Batch
    edits: Edits
    logits: Logits = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(
        cls,
        metric: Callable[[Out], Array],
        model: Model,
        clean: Batch,
        corrupt: Batch,
        edits: Edits | None = None,
        *,
        logits: Logits = "last",
    ) -> Contrast:
        """Return the contrast of two batches of one layout.

        Args:
          metric: A pure function of one pass that reads `out.logits` and gives float[B]. Define it
            once, and give it the arrays that vary as `jax.tree_util.Partial(metric, ids=...)`.
          model: See `run`.
          clean: The batch whose metric is explained.
          corrupt: The batch that activations are taken from.
          edits: Edits of every pass.
          logits: See `run`.

        Raises:
          ValueError: The batches have rows of different lengths, or differ in the kind of a token
            or its position on the picture; or an edit is a patch.
        """
        clean, corrupt = (b.replace(processor=None) for b in (clean, corrupt))
        _check_alike(model, clean, corrupt)
        if any(edit.kind == "patch" for edit in edits or ()):
            raise ValueError(
                "a contrast takes no patch among its edits, because its row numbers would be those "
                "of another batch when both batches are joined"
            )
        metric = jax.tree_util.Partial(_by_row, metric=as_partial(metric))
        return cls(metric, model, clean, corrupt, edits or Edits(), logits)

    @property
    def rows(self) -> int:
        """The number of rows B of each batch."""
        return len(self.clean.ids)

    @property
    def is_row(self) -> Bool[np.ndarray, " B"]:
        """False for rows that only pad the batches."""
        return np.asarray(self.clean.valid_row)

    def metric_of(self, batch: Batch) -> Float[np.ndarray, " B"]:
        """Return the metric of one of the batches."""
        return checks.finite(self.metric(self.run(batch, self.edits)), "the metric")

    def run(self, batch: Batch, edits: Edits, captures: dict[str, Capture] | None = None) -> Out:
        """Run a pass over one of the batches, with the logits that the metric reads."""
        return run(self.model, batch, edits, captures, logits=self.logits)

    def joined(self) -> Batch:
        """Return one batch with the clean rows and then the corrupt ones."""
        tile_tokens = self.model.config.tile_tokens(self.clean)
        return join(self.clean, self.corrupt, tile_tokens)

    def sweep(
        self,
        metric_of_rows: Callable[..., Array],
        batch: Batch,
        patches: Iterable[Edits],
        label: str,
    ) -> Float[np.ndarray, "R B"]:
        """Compute the metric under each of several patches, in one sweep.

        Args:
          metric_of_rows: (out, metric=) -> the metric of some B rows of the batch, such as
            `metric_of_clean_rows`.
          batch: A batch that holds the rows of both batches.
          patches: Edits beside those of every pass.
          label: See `sweep`.
        """
        lanes = [self.edits >> patch for patch in patches]
        metric = jax.tree_util.Partial(metric_of_rows, metric=self.metric)
        found = sweep(metric, self.model, batch, lanes, logits=self.logits, label=label)
        return checks.finite(found, "the metric")


def _by_row(out: Out, metric: Callable[[Out], Array]) -> Array:
    """Return a metric of a pass, one value per row."""
    assert out.logits is not None, "the metric of a contrast reads logits"
    return checks.one_a_row(metric(out), len(out.logits))


def _check_alike(model: Model, clean: Batch, corrupt: Batch) -> None:
    """Raise an error unless each token of one batch corresponds to the same token of the other."""
    maps = model.token_maps(clean), model.token_maps(corrupt)
    for module in maps[0]:
        for name in ("kind", "row", "column", "tile"):
            first, second = (np.asarray(getattr(m[module], name)) for m in maps)
            if first.shape != second.shape:
                raise ValueError(
                    f"the clean batch has {module} tokens [{first.shape}], the corrupt one "
                    f"[{second.shape}]: make both with the same rows= and length="
                )
            if (first != second).any():
                row, token = np.argwhere(first != second)[0]
                raise ValueError(
                    f"clean and corrupt batch differ in the {name} of {module} token {token} of "
                    f"row {row}: {first[row, token]} and {second[row, token]}. Give them questions "
                    "of equally many tokens and pictures on equal grids"
                )


def input_sites(contrast: Contrast) -> tuple[Site, ...]:
    """Return the sites at which inputs enter the language model."""
    shapes = site_shapes(contrast.model, contrast.clean)
    return tuple(site for site in (S.lm.embed, S.projector.deepstack) if site.name in shapes)


def line_between(contrast: Contrast, corrupt: dict[str, Array], share: Float[Array, ""]) -> Edits:
    """Return edits of the clean pass that put its inputs between the corrupt and the clean ones.

    Args:
      contrast: The contrast.
      corrupt: The inputs of the corrupt pass, by the names of `input_sites`.
      share: The share of the clean inputs, from 0 to 1.
    """
    edits = contrast.edits
    for site in input_sites(contrast):
        closed = with_layers(site, corrupt[site.name])
        edits >>= edits_.call(site, attribution.interpolate, gate=share, closed=closed)
    return edits


def with_layers(site: Site, value: Array) -> Array:
    """Return the value of a site with an axis of layers, even if the site exists once."""
    return value if site.stacked else value[None]


def metric_of_clean_rows(out: Out, metric: Callable[[Out], Array]) -> Array:
    """Return the metric of the clean rows of a joined batch."""
    assert out.logits is not None, "the metric of a contrast reads logits"
    return metric(dataclasses.replace(out, logits=out.logits[: len(out.logits) // 2]))
