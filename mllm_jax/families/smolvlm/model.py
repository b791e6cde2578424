"""SmolVLM 2 (Marafioti et al. 2025): an Idefics3 with SmolLM2."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Self

from mllm_jax.families.idefics3.model import Idefics3Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmolVLMConfig(Idefics3Config):
    """A SmolVLM 2 model; see `Idefics3Config`."""

    model_type: ClassVar[str] = "smolvlm"

    @classmethod
    def smolvlm_2b(cls) -> Self:
        """Return the config of SmolVLM 2 2.2B, which has more tokens than the first SmolVLM."""
        first = super().smolvlm_2b()
        return dataclasses.replace(
            first, lm=dataclasses.replace(first.lm, vocab=49280), image_token=49190
        )
