"""The context of the domain-neuron study: its pictures, questions and modules."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

import numpy as np

from experiments import context
from experiments.modules import MODULES
from mllm_jax.analysis import official, power, stability
from mllm_jax.data import batching, domains
from mllm_jax.data.embedded import questions
from mllm_jax.data.sequences import LazySequence
from mllm_jax.interventions.shapes import site_shapes
from mllm_jax.sharding import mesh

Split = Literal["train", "test", "lens"]
SPLITS: tuple[Split, ...] = ("train", "test", "lens")
# "neutral" prompts are the same in every domain. "released" prompts are the domain's own questions,
# as in MMNeuron, and name what its pictures show.
Prompts = Literal["neutral", "released"]
PROMPTS: tuple[Prompts, ...] = ("neutral", "released")
NEUTRAL = questions.PROMPTS["category"] + questions.PROMPTS["kind"]


@dataclasses.dataclass(frozen=True)
class NeutralQuestions(LazySequence[tuple[domains.Example, questions.Question]]):
    """Pairs of an example and a question that does not refer to a domain, see `NEUTRAL`.

    Attributes:
      examples: The examples.
      count: The largest number of pairs.
    """

    examples: Sequence[domains.Example]
    count: int  # type: ignore[assignment]  # Sequence has a method of this name

    def __len__(self) -> int:
        return min(self.count, len(self.examples))

    def item(self, index: int) -> tuple[domains.Example, questions.Question]:
        """Return the item at an index; see `LazySequence`."""
        prompt = NEUTRAL[index % len(NEUTRAL)]
        return self.examples[index], questions.Question("neutral", prompt, "", ("",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study(context.Context):
    """The inputs of every step of the study.

    Attributes:
      train: The pictures by domain on which activations are counted.
      test: The pictures by domain on which answers are scored.
      lens: The pictures by domain that the logit lens reads.
    """

    train: dict[str, domains.Domain]
    test: dict[str, domains.Domain]
    lens: dict[str, domains.Domain]

    def content(self) -> dict[str, list[str]]:
        """Return the fingerprints of the pictures and questions, by split and domain."""
        return {
            f"{split}/{name}": context.content(self._pairs(split, name))
            for split in SPLITS
            for name in self.names
        }

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the domains."""
        return tuple(self.train)

    def questions(
        self, split: Split, name: str, prompts: Prompts = "released"
    ) -> batching.QuestionBatches:
        """Return batches with one question per picture of a domain.

        Args:
          split: The split of the pictures.
          name: The name of the domain.
          prompts: "released" for the questions of the domain, which alternate between the styles
            of the config, or "neutral".
        """
        pairs = self._pairs(split, name, prompts)
        if split != "train":
            return batching.QuestionBatches(
                self.processor, pairs, self.config.batch_size, self.length
            )
        size = self.count_batch_size
        filled = mesh.round_up_to_shards("B", size)
        return batching.QuestionBatches(self.processor, pairs, size, self.length, filled=filled)

    def evidence(self, name: str, prompts: Prompts | None = None) -> batching.QuestionBatches:
        """Return batches with the pictures on which evidence of single neurons is gathered.

        Args:
          name: The name of the domain.
          prompts: See `questions`; by default those with which the neurons are selected.
        """
        pairs = self._pairs("train", name, prompts or self.config.prompts)
        count = min(self.config.evidence_per_domain, len(pairs))
        pairs = dataclasses.replace(pairs, count=count)
        return batching.QuestionBatches(self.processor, pairs, self.config.batch_size, self.length)

    @functools.cached_property
    def count_batch_size(self) -> int:
        """The batch size of the count: small enough for `groups` in the smallest domain."""
        smallest = min(len(self._pairs("train", name)) for name in self.names)
        return max(1, min(self.config.batch_size, smallest // self.config.groups))

    def too_small(self) -> list[str]:
        """Return a warning for each split that is too small for any conclusion."""
        config = self.config
        warnings: list[str] = []
        tests = len(self.names) * len(config.modules)
        needed = power.changed_answers(tests)
        for name in self.names:
            pairs = self._pairs("test", name)
            # A single option is always right.
            several = [len(q.options) > 1 for _, q in pairs] if config.measure == "options" else ()
            questions = sum(several) if several else len(pairs)
            if questions < needed:
                of_several = " with several options" if not all(several) else ""
                warnings.append(
                    f"domain {name!r} has {questions} test questions{of_several}: no change of its "
                    f"accuracy can be found beyond chance in {tests} tests, which takes {needed}"
                )
        each = [len(self.groups(self.questions("train", name))) for name in self.names]
        domain = np.repeat(np.arange(len(each)), each)
        if config.shuffles and not config.masks:
            chance = stability.power(domain, config.shuffles, config.level)
            if chance < stability.POWER:
                warnings.append(
                    f"{min(each)} groups of training pictures are too few to tell domain neurons "
                    "from chance; add pictures, or raise config.train_per_domain or config.groups"
                )
        return warnings

    def groups(self, questions: batching.QuestionBatches) -> list[np.ndarray]:
        """Return the indices of the batches of each group of examples, in order."""
        count = len(questions)
        return np.array_split(np.arange(count), min(self.config.groups, count))

    def _pairs(
        self, split: Split, name: str, prompts: Prompts = "released"
    ) -> batching.ExampleQuestions | NeutralQuestions:
        examples = getattr(self, split)[name]
        count = self.config[f"{split}_per_domain"]
        if split == "train" and self.config.train_tokens:
            count = self._examples_counted[name]
        if prompts == "neutral":
            return NeutralQuestions(examples, count)
        return batching.ExampleQuestions(examples, tuple(self.config.styles), count)

    @functools.cached_property
    def _examples_counted(self) -> dict[str, int]:
        """The number of training pictures of each domain with `train_tokens` vision tokens."""
        return {
            name: official.examples_counted(
                map(self._vision_tokens, domain), self.config.train_tokens
            )
            for name, domain in self.train.items()
        }

    def _vision_tokens(self, example: domains.Example) -> int:
        """Return the number of vision tokens in all tiles of a picture."""
        config, size = self.model.config, example.image.size[::-1]
        if config.tile_side is None:
            return int(np.prod(self.processor.layout(size).grid))
        each = config.vision.grid**2 + config.vision.has_cls
        return self.processor.layout(size).tiles * each

    @functools.cached_property
    def length(self) -> int | None:
        """The length to which all prompts are padded, that of the longest; None for no padding."""
        if not self.config.one_length:
            return None
        pairs = [p for split in SPLITS for name in self.names for p in self._pairs(split, name)]
        for name in self.names:
            pairs += self._pairs("train", name, "neutral")
        return batching.row_length(self.processor, pairs)

    @property
    def deviation_layers(self) -> list[int]:
        """The layers after which hidden states are compared; the last one is always among them."""
        layers = self.model.config.lm.layers
        return [layers - 1 - i for i in reversed(spaced(layers, self.config.deviation_layers))]

    @property
    def word_layers(self) -> list[int]:
        """The layers of the language model whose mean distribution over words is shown."""
        return spaced(self.model.config.lm.layers, self.config.picture_layers)

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The shape (L, F) of the neurons of each module that the model has."""
        batch = self.questions("train", self.names[0])[0].replace(processor=None)
        specs = site_shapes(self.model, batch)
        return {
            module: (spec.layers, spec.shape[site.unit_axis])
            for module, site in MODULES.items()
            if (spec := specs.get(site.name))
        }


def spaced(layers: int, count: int) -> list[int]:
    """Return `count` evenly spaced layers, first and last included; a single one is the first."""
    return [int(layer) for layer in np.linspace(0, layers - 1, min(count, layers)).round()]
