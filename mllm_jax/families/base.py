"""The definition of a family: the value that its folder exports and that all other code reads."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from mllm_jax.checkpoints import keys
from mllm_jax.models.multimodal import MultimodalConfig
from mllm_jax.processors.processor import Processor
from mllm_jax.sharding import rules

Fields = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OriginalLayout:
    """The checkpoint layout of the authors' own code, if it differs from that of transformers.

    Attributes:
      is_original: Whether the fields of a `config.json` are of this layout.
      to_hf: (fields, fields of the vision tower, name of the file) -> the fields of a `config.json`
        of transformers.
      image_processor: (directory of the vision tower, config) -> an image processor.
      tower_field: The field with the name of the vision tower's checkpoint.
      base_field: The field with the name of the model to which a separate projector belongs.
      projector_file: The name of a file that holds only the projector.
      projector_keys: canonical keys of a projector -> {canonical key: key in that file}.
      tower_key: A key of the tower's checkpoint -> its canonical key; None for unused tensors.
    """

    is_original: Callable[[Fields], bool]
    to_hf: Callable[[Fields, Fields, object], dict[str, Any]]
    image_processor: Callable[[pathlib.Path, MultimodalConfig], Any]
    tower_field: str
    base_field: str
    projector_file: str
    projector_keys: Callable[[Iterable[str]], dict[str, str]]
    tower_key: Callable[[str], str | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models: an architecture as it is released.

    Attributes:
      name: The `model_type` of its `config.json`, or another name if `reads` recognises its
        configs.
      config: The config class, which builds the network.
      from_hf: (fields of a `config.json`, name of the file) -> the config.
      to_hf: config -> the fields of a `config.json`.
      key_table: config -> the key table of its checkpoints.
      canonical_key: key in any known spelling -> its spelling in the key table.
      is_unused: Whether a checkpoint may hold a tensor that the model does not use, by its
        canonical key.
      projector_prefix: The prefix, or the prefixes, of the canonical keys of its projector.
      sharding_rules: config -> the sharding rules.
      processor: The class of its processor.
      released: Functions that return the configs of its released sizes, by name.
      reads: Whether the fields of a `config.json` are of this family, for a `model_type` that
        several families share.
      other_layouts: The `model_type` of unsupported layouts of the same models -> what to load
        instead.
      original: The layout of the authors' own code, if checkpoints in it are read.
      unused_tensors: model -> tensors that transformers expects and the model does not use.
    """

    name: str
    config: type[MultimodalConfig]
    from_hf: Callable[[Fields, object], MultimodalConfig]
    to_hf: Callable[[Any], dict[str, Any]]
    key_table: Callable[[Any], tuple[keys.Row, ...]]
    canonical_key: Callable[[str], str]
    is_unused: Callable[[str, Any], bool]
    projector_prefix: str | tuple[str, ...]
    sharding_rules: Callable[[Any], tuple[rules.Rule, ...]]
    processor: type[Processor]
    released: Mapping[str, Callable[[], MultimodalConfig]]
    reads: Callable[[Fields], bool] | None = None
    other_layouts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    original: OriginalLayout | None = None
    unused_tensors: Callable[[Any], dict[str, np.ndarray]] = lambda model: {}

    def is_projector(self, key: str) -> bool:
        """Return whether a tensor belongs to the projector, by its canonical key."""
        return key.startswith(self.projector_prefix)
