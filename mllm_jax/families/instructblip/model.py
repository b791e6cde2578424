"""InstructBLIP (Dai et al. 2023): a LLaVA whose pictures pass through a Q-Former.

The Q-Former reads the instruction as well, so the image tokens depend on the question. Each picture
becomes one image token for each query.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx

from mllm_jax import tokens
from mllm_jax.batch import Batch
from mllm_jax.models.decoder import Decoder, DecoderConfig
from mllm_jax.models.eva import EvaConfig
from mllm_jax.models.multimodal import ImageTokens, MultimodalConfig, MultimodalModel
from mllm_jax.models.projector import Projector, ProjectorConfig
from mllm_jax.models.qformer import QFormer, QFormerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstructBlipConfig(MultimodalConfig):
    """An InstructBLIP model.

    Attributes:
      vision: The vision tower.
      qformer: The Q-Former.
      projector: The linear map from the Q-Former to the language model.
      lm: The language model.
      image_token: The id of an image token in the text; -1 if none is reserved, as in
        checkpoints of 2023.
    """

    vision: EvaConfig
    qformer: QFormerConfig

    @property
    def image_tokens(self) -> int:
        """The number of image tokens of a picture: one for each query."""
        return self.qformer.queries

    @property
    def token_grid(self) -> int:
        """0, because queries are not on a grid."""
        return 0

    def build(self, *, rngs: nnx.Rngs) -> InstructBlip:
        """Build the model with random weights."""
        return InstructBlip(self, rngs=rngs)

    @classmethod
    def of(
        cls, vision: EvaConfig, qformer: QFormerConfig, lm: DecoderConfig, **fields
    ) -> InstructBlipConfig:
        """Return an InstructBLIP of three networks, with a linear projector before the LM."""
        projector = ProjectorConfig(in_width=qformer.width, out_width=lm.width, depth=1)
        return cls(vision=vision, qformer=qformer, projector=projector, lm=lm, **fields)

    @classmethod
    def vicuna_7b(cls) -> InstructBlipConfig:
        """Return the config of InstructBLIP with Vicuna 7B."""
        lm = dataclasses.replace(DecoderConfig.vicuna_7b(), vocab=32001, eps=1e-6)
        return cls.of(EvaConfig.vit_g_14(), QFormerConfig.bert_base(), lm)

    @classmethod
    def tiny(cls) -> InstructBlipConfig:
        """Return a config for tests."""
        return cls.of(EvaConfig.tiny(), QFormerConfig.tiny(), DecoderConfig.tiny(), image_token=95)


class InstructBlip(MultimodalModel):
    """LLaVA with a Q-Former between vision tower and projector."""

    config: InstructBlipConfig

    def __init__(self, config: InstructBlipConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.vision = config.vision.build(rngs=rngs)
        self.qformer = QFormer(config.qformer, rngs=rngs)
        self.projector = Projector(config.projector, rngs=rngs)
        self.lm = Decoder(config.lm, rngs=rngs)

    def token_maps(self, batch: Batch) -> dict[str, tokens.TokenMap]:
        """Return the token map of each module by its name.

        Their axes are vision [I, P], qformer [I, Q + T], projector [I, Q] and LM [B, T]. Each
        branch of the Q-Former also has a map: the queries [I, Q] and the text [I, T].
        """
        grid, Q = (self.config.vision.grid,) * 2, self.config.qformer.queries
        images = batch.tile, batch.is_real_tile
        maps = {
            "vision": tokens.TokenMap.grid(batch.tile, grid, True, batch.is_real_tile),
            "projector": tokens.TokenMap.alike("image", Q, *images),
        }
        if batch.qformer_kind is not None:
            query = tokens.TokenMap.alike("query", Q, *images)
            text = tokens.TokenMap.plain(batch.qformer_kind, batch.tile)
            maps |= {
                "qformer": query.followed_by(text),
                "qformer.query_mlp.act": query,
                "qformer.cross.pattern": query,
                "qformer.mlp.act": text,
            }
        return self.with_readers(batch, maps) | dict.fromkeys(("lm", "logits"), batch.tokens)

    def images(self, batch: Batch, taps) -> ImageTokens:
        """Return the image tokens of all pictures, one after the other."""
        if batch.qformer_ids is None:
            raise ValueError("this batch has no text for the Q-Former: use this model's processor")
        features = self.features(batch, taps)
        ids, kind = jnp.asarray(batch.qformer_ids), jnp.asarray(batch.qformer_kind)
        valid = kind != tokens.CODE["pad"]
        queries = self.qformer(features, ids, valid, taps.module("qformer"))
        images = self.projector(queries, taps.module("projector", lens=self.lm.lens))
        return ImageTokens(images.reshape(-1, images.shape[-1]))
