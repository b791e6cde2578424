"""The training loop: one compiled step, checkpoints, the same weights after a kill."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from orbax.checkpoint import v1 as ocp

from mllm_jax.sharding import hosts, mesh
from mllm_jax.training import losses, parts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a part is trained.

    Attributes:
      part: a name of `parts.PARTS`.
      rate: peak learning rate. warmup: share of the steps that it rises over; then a cosine to 0.
      weight_decay: of AdamW. clip: largest norm of the gradient, 0 for none.
      remat: save memory in the backward pass.
      every: steps between two checkpoints.
    """

    part: str = "projector"
    rate: float = 1e-3
    warmup: float = 0.03
    weight_decay: float = 0.0
    clip: float = 1.0
    remat: bool = False
    every: int = 50

    def optimiser(self, steps: int) -> optax.GradientTransformation:
        """AdamW with warm-up and cosine."""
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, self.rate, max(1, round(self.warmup * steps)), max(2, steps)
        )
        clip = optax.clip_by_global_norm(self.clip) if self.clip else optax.identity()
        return optax.chain(clip, optax.adamw(schedule, weight_decay=self.weight_decay))


def fit(
    model,
    batches: Sequence[Any],
    recipe: Recipe,
    *,
    save: str | pathlib.Path | None = None,
    loss: Callable = losses.mean_answer_nll,
    label: str = "train",
):
    """The model after one step on each batch, and the loss of each step.

    Args:
      batches: one for each step, made when asked for, always the same at the same place.
      save: a folder for checkpoints; a killed run continues from the newest and ends with the
        same weights.
      label: of the progress bar.

    Returns:
      The trained model, float32[steps].
    """
    merge, trained, frozen = parts.split(model, recipe.part)
    steps = len(batches)
    optimiser = recipe.optimiser(steps)

    update = updating(merge, optimiser, loss, remat=recipe.remat)
    with mesh.on(model):
        trained, state = mesh.settle((trained, optimiser.init(trained)))
        update = jax.jit(update, out_shardings=(*map(mesh.places, (trained, state)), None))
        leaves, shape = jax.tree.flatten((trained, state))
        store = _Checkpoints(save)
        first, leaves, curve = store.newest(leaves, np.zeros((steps,), np.float32))
        trained, state = jax.tree.unflatten(shape, leaves)
        bar = tqdm.tqdm(range(first, steps), desc=label, initial=first, total=steps, mininterval=1)
        for step in bar:
            batch = mesh.place(batches[step].replace(processor=None))
            trained, state, value = update(trained, state, frozen, batch)
            curve[step] = value
            recent = curve[max(0, step - 19) : step + 1].mean()
            bar.set_postfix(loss=f"{recent:.3f}")
            if not np.isfinite(curve[step]):
                raise FloatingPointError(
                    f"{label}: the loss of step {step} is {curve[step]}; lower the learning rate "
                    f"(now {recipe.rate}) or look at batch {step}"
                )
            leaving = hosts.leaving()
            if leaving or (step + 1) % recipe.every == 0 or step + 1 == steps:
                store.write(step + 1, jax.tree.leaves((trained, state)), curve)
            if leaving:
                hosts.leave(label)
    return merge(trained, frozen), curve


def updating(merge: Callable, optimiser, loss: Callable, *, remat: bool) -> Callable:
    """One step: (trained, state, frozen, batch) -> (trained, state, loss)."""

    def update(trained, state, frozen, batch):
        def objective(trained):
            return loss(merge(trained, frozen), batch, remat=remat)

        value, gradient = jax.value_and_grad(objective)(trained)
        change, state = optimiser.update(gradient, state, trained)
        return optax.apply_updates(trained, change), state, value

    return update


class _Checkpoints:
    """Orbax checkpoints of what trains, in a folder; none without a folder."""

    def __init__(self, path):
        self.checkpointer = None
        if path is not None:
            self.checkpointer = ocp.training.Checkpointer(pathlib.Path(path).absolute())

    def newest(self, leaves: list, curve: np.ndarray):
        if self.checkpointer is None or self.checkpointer.latest is None:
            return 0, leaves, curve
        abstract = jax.tree.map(ocp_abstract, self._tree(leaves, curve))
        tree = self.checkpointer.load(self.checkpointer.latest.step, abstract)
        found = [tree["leaves"][str(i)] for i in range(len(leaves))]
        return self.checkpointer.latest.step, found, np.array(tree["curve"])

    def write(self, step: int, leaves: list, curve: np.ndarray) -> None:
        if self.checkpointer is not None:
            self.checkpointer.save(step, self._tree(leaves, curve))

    @staticmethod
    def _tree(leaves, curve):
        # Orbax restores an array that knows where it lives; one of NumPy does not.
        named = {str(i): leaf for i, leaf in enumerate(leaves)}
        return {"leaves": named, "curve": mesh.settle(jnp.asarray(curve))}


def ocp_abstract(leaf):
    """What Orbax is told to restore: the shape and dtype, where the leaf lives now."""
    sharding = getattr(leaf, "sharding", None)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def evaluate(model, batches: Sequence[Any], *, label: str = "loss") -> tuple[float, float]:
    """Nats per answer token over batches, and the same with each row given the next row's picture.

    A model that answers from the picture does much worse with a wrong one.
    """
    step = jax.jit(losses.answer_nll)
    right, wrong, count = 0.0, 0.0, 0
    with mesh.on(model):
        for batch in tqdm.tqdm(batches, desc=label, leave=False):
            batch = batch.replace(processor=None)
            swapped = batch.replace(features=jnp.roll(jnp.asarray(batch.features), 1, 0))
            nll, tokens = mesh.home(step(model, mesh.place(batch)))
            right += float(nll.sum())
            wrong += float(mesh.home(step(model, mesh.place(swapped)))[0].sum())
            count += int(tokens.sum())
    return right / count, wrong / count
