"""What every part of the main study reads: the config, the model, the pictures."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np

import mllm_jax as mj
from experiments import study
from mllm_jax import sites as S
from mllm_jax import store
from mllm_jax.analysis import official
from mllm_jax.data import batching, domains
from mllm_jax.interventions.captures import Capture
from mllm_jax.interventions.edits import Edits
from mllm_jax.interventions.shapes import site_shapes
from mllm_jax.sharding import mesh

MODULES = {
    "vision": S.vision.mlp.act,
    "qformer": S.qformer.mlp.act,
    "query": S.qformer.query_mlp.act,
    "projector": S.projector.act,
    "lm": S.lm.mlp.act,
}


def off(masks: Mapping[str, np.ndarray]) -> Edits:
    """The edits that switch neurons off: bool[L, F] by module."""
    cut = (mj.ablate(MODULES[module][mask]) for module, mask in masks.items() if mask.any())
    return functools.reduce(operator.rshift, cut, Edits())


@dataclasses.dataclass(frozen=True)
class Study:
    """The study.

    Attributes:
        train, test, lens: pictures by domain: where activations are counted, where answers are
            scored, and what the logit lens reads.
        edits: of every pass. captures: read while activations are counted.
    """

    config: Any
    workdir: store.Workdir
    model: Any
    processor: Any
    train: dict[str, domains.Domain]
    test: dict[str, domains.Domain]
    lens: dict[str, domains.Domain]
    edits: Edits | None = None
    captures: dict[str, Capture] = dataclasses.field(default_factory=dict)

    def content(self) -> dict[str, list[str]]:
        """Fingerprints of the pictures that are read, with their questions, by half and domain."""
        return {
            f"{half}/{name}": study.content(self._pairs(half, name))
            for half in ("train", "test", "lens")
            for name in self.names
        }

    @property
    def names(self) -> tuple[str, ...]:
        """Of the domains."""
        return tuple(self.train)

    def asked(self, half: str, name: str) -> batching.QuestionBatches:
        """One question a picture of a domain, the styles of the config in turn.

        Args:
            half: "train", "test" or "lens".
        """
        pairs = self._pairs(half, name)
        if half != "train":
            return batching.QuestionBatches(
                self.processor, pairs, self.config.batch_size, self.length
            )
        size = self.counted_at_once
        filled = mesh.round_up_to_shards("B", size)
        return batching.QuestionBatches(self.processor, pairs, size, self.length, filled=filled)

    @functools.cached_property
    def counted_at_once(self) -> int:
        """Rows of a batch that is counted: few enough that the smallest domain has its groups."""
        fewest = min(len(self._pairs("train", name)) for name in self.names)
        return max(1, min(self.config.batch_size, fewest // self.config.groups))

    def groups(self, asked: batching.QuestionBatches) -> list[np.ndarray]:
        """Numbers of the batches of each group of examples, in order."""
        return np.array_split(np.arange(len(asked)), min(self.config.groups, len(asked)))

    def _pairs(self, half: str, name: str) -> batching.ExampleQuestions:
        examples = getattr(self, half)[name]
        count = self.config[f"{half}_per_domain"]
        if half == "train" and self.config.train_tokens:
            sizes = (self._vision_tokens(example) for example in examples)
            count = official.examples_counted(sizes, self.config.train_tokens)
        return batching.ExampleQuestions(examples, tuple(self.config.styles), count)

    def _vision_tokens(self, example: domains.Example) -> int:
        """Tokens of the vision tower in all tiles of a picture."""
        tiles = self.model.config.layout(example.image.size[::-1]).tiles
        return tiles * (self.model.config.vision.grid**2 + 1)

    @functools.cached_property
    def length(self) -> int | None:
        """Tokens of the longest prompt, so that batches are alike; None to pad each by itself."""
        if not self.config.one_length:
            return None
        every = [pair for half in ("train", "test", "lens") for name in self.names
                 for pair in self._pairs(half, name)]  # fmt: skip
        return batching.row_length(self.processor, every)

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(layers, neurons of a layer) of each module that the model has."""
        batch = self.asked("train", self.names[0])[0].replace(processor=None)
        found = site_shapes(self.model, batch)
        specs = {m: (site, found.get(site.name)) for m, site in MODULES.items()}
        return {
            module: (spec.layers, spec.shape[site.unit_axis])
            for module, (site, spec) in specs.items()
            if spec
        }
