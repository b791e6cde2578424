"""The context of the lens study: its questions, its layers and the states of its tokens."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping

import numpy as np
import tqdm

import mllm_jax as mj
from experiments import context
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.batch import Batch
from mllm_jax.data import batching

KINDS = {"image": tok.image, "question": tok.question}
SEEN = tok.image | tok.question
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study(context.Context):
    """The inputs of every step of the study.

    Attributes:
      layers: The layers of every lens, of which the last is the model's last.
      questions: The batches of questions, by split: `train`, `jacobian` and `test`.
    """

    layers: list[int]
    questions: Mapping[str, batching.QuestionBatches]

    def batch(self, split: str, number: int) -> Batch:
        """Return a batch of a split, with the features of its pictures."""
        return self.with_features(self.questions[split][number]).replace(processor=None)

    def states(self, split: str, number: int) -> Arrays:
        """Return the states of the image and question tokens of a batch, see `read_states`."""
        step = f"states/{split}-{number}"
        return self.workdir.arrays(step, functools.partial(read_states, self, split, number))

    def numbers(self, split: str, label: str) -> Iterator[int]:
        """Yield the numbers of the batches of a split, with a progress bar."""
        return iter(tqdm.trange(len(self.questions[split]), desc=label, leave=False))


def read_states(study: Study, split: str, number: int) -> Arrays:
    """Read the residual of a batch.

    Returns:
      `states`, float32[n, L, D], of the n image and question tokens; `row`, int[n], their row;
      `kind`, int[n], the index of their kind.
    """
    batch, rows = study.batch(split, number), len(study.questions[split].rows(number))
    kept = {"x": mj.keep(S.lm.resid_post[study.layers], where=SEEN)}
    x = np.asarray(mj.run(study.model, batch, study.edits, kept, logits="none")["x"], np.float32)
    places = study.model.token_maps(batch)["lm"]
    masks = np.stack([np.asarray(kind.mask(places))[:rows] for kind in KINDS.values()])
    row, token = np.nonzero(masks.any(0))
    return {
        "states": np.moveaxis(x[:, row, token], 0, 1),
        "row": row,
        "kind": masks[:, row, token].argmax(0),
    }
