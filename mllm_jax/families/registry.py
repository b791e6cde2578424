"""The architectures we have: all that differs between them outside of the networks, in one table.

A new architecture is a config class that builds its network, and one line here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from mllm_jax.checkpoints import files, tables
from mllm_jax.families.instructblip import checkpoint as instructblip_checkpoints
from mllm_jax.families.instructblip.model import InstructBlipConfig
from mllm_jax.families.instructblip.processor import InstructBlipProcessor
from mllm_jax.families.llava import config as llava_checkpoints
from mllm_jax.families.llava.model import LlavaConfig
from mllm_jax.families.llava_next.model import LlavaNextConfig
from mllm_jax.processors.processor import Processor
from mllm_jax.sharding import rules


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A kind of checkpoint.

    Attributes:
        config: our config class. It builds the network.
        from_hf: the fields of a `config.json`, and what to call the file, to our config.
        to_hf: our config to these fields.
        table: our config to the key table.
        rules: our config to the sharding rules.
        processor: the class of its processor.
    """

    config: type[LlavaConfig]
    from_hf: Callable[[Mapping[str, Any], object], LlavaConfig]
    to_hf: Callable[[Any], dict[str, Any]]
    table: Callable[[Any], tuple[tables.Row, ...]]
    rules: Callable[[Any], tuple[rules.Rule, ...]]
    processor: type[Processor]


BY_TYPE = {  # `model_type` of config.json
    "llava": Architecture(
        LlavaConfig,
        llava_checkpoints.from_hf,
        llava_checkpoints.to_hf,
        tables.llava,
        rules.llava,
        Processor,
    ),
    "llava_next": Architecture(
        LlavaNextConfig,
        llava_checkpoints.from_hf,
        llava_checkpoints.to_hf,
        tables.llava,
        rules.llava,
        Processor,
    ),
    "instructblip": Architecture(
        InstructBlipConfig,
        instructblip_checkpoints.from_hf,
        instructblip_checkpoints.to_hf,
        instructblip_checkpoints.table,
        rules.instructblip,
        InstructBlipProcessor,
    ),
}


def from_hf(fields: Mapping[str, Any], source: object = "config.json") -> LlavaConfig:
    """Our config of a `config.json`, whatever its architecture; see `config.from_hf`."""
    name = fields.get("model_type", "llava")
    if not isinstance(name, str) or name not in BY_TYPE:
        problem = f"model_type={files.shown(name)} is not supported, only {', '.join(BY_TYPE)}"
        raise ValueError(files.refusal(source, [problem]))
    return BY_TYPE[name].from_hf(fields, source)


def of(config: LlavaConfig) -> Architecture:
    """The architecture that a config belongs to."""
    return next(a for a in BY_TYPE.values() if a.config is type(config))
