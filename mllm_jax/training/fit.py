"""The training loop: one compiled step, checkpoints, the same weights after a kill."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from mllm_jax.sharding import hosts, mesh
from mllm_jax.store import Store
from mllm_jax.training import losses, parts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a part is trained.

    Attributes:
      part: what trains, see `parts.split`. lora: if it is low-rank, how.
      rate: peak learning rate. warmup: share of the steps that it rises over; see `schedule`.
      projector_rate: that of the projector, where it is another.
      weight_decay: of AdamW, for matrices alone; see `parts.decays`.
      clip: largest norm of the gradient, 0 for none.
      accumulate: batches to a step.
      remat: save memory in the backward pass.
      every: steps between two checkpoints.
    """

    part: str = "projector"
    lora: parts.Lora = dataclasses.field(default_factory=parts.Lora)
    rate: float = 1e-3
    projector_rate: float | None = None
    warmup: float = 0.03
    weight_decay: float = 0.0
    clip: float = 1.0
    accumulate: int = 1
    remat: bool = False
    every: int = 50

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Recipe:
        """Out of plain values, as a config holds them."""
        lora = parts.Lora(**fields.get("lora", {}))
        return cls(**{**fields, "lora": lora})

    def optimiser(self, steps: int) -> optax.GradientTransformation:
        """AdamW with warm-up and cosine, of what `parts.split` says that trains."""

        def adamw(rate):
            return optax.adamw(
                schedule(rate, round(self.warmup * steps), steps),
                weight_decay=self.weight_decay,
                mask=parts.decays,
            )

        step = adamw(self.rate)
        if self.projector_rate is not None:
            step = optax.multi_transform(
                {"projector": adamw(self.projector_rate), "other": step},
                lambda trained: {p: "projector" if p == "projector" else "other" for p in trained},
            )
        clip = optax.clip_by_global_norm(self.clip) if self.clip else optax.identity()
        return optax.chain(clip, step)


def schedule(rate: float, warmup: int, steps: int) -> Callable[[Any], jax.Array]:
    """The learning rate of each step, counted from 0; that of no step is 0.

    The first `warmup` steps have 1/warmup, 2/warmup, ... of the rate; those after fall along half a
    cosine, from the rate to just above 0.
    """

    def at(step):
        rise = (step + 1) / max(1, warmup)
        done = (step - warmup) / max(1, steps - warmup)
        return rate * jnp.where(step < warmup, rise, (1 + jnp.cos(jnp.pi * done)) / 2)

    return at


def fit(
    model,
    batches: Sequence[Any],
    recipe: Recipe,
    *,
    neurons: Mapping[str, Any] | None = None,
    save: str | pathlib.Path | None = None,
    restart: bool = False,
    loss: Callable = losses.answer_nll,
    label: str = "train",
):
    """The model after all batches, `recipe.accumulate` of them a step, and the loss of each step.

    What trains is float32 until the end, with its gradient and the optimiser's moments, whatever
    the model's dtype; see `parts`.

    Args:
      batches: made when asked for, always the same at the same place, all of one shape.
      neurons: those that train, if the part says so; see `parts.split`.
      save: a folder for the checkpoint: what trains, its optimiser's state and the curve, with
        fingerprints of the start, the recipe, the loss and the batches so far. A killed run
        continues from it and ends with the same weights; batches of finished steps are made
        again, to compare their content. After the last step nothing is trained.
      restart: remove what is saved there.
      loss: (model, batch, remat=) -> sums float32[B] and what they are sums over [B], such as
        tokens. All sums of a step are divided by all counts: it does not matter how a step is cut
        into batches. A function of a module, so that a second run compiles nothing.
      label: of the progress bar.

    Returns:
      The trained model in the dtype that it had, float32[steps].

    Raises:
      ValueError: the batches are no whole steps, or `save` holds the training of another start
        model, recipe, number of steps, loss or other batches, or is damaged.
      FloatingPointError: a loss is not finite.
    """
    merge, trained, frozen = parts.partition(model, recipe.part, lora=recipe.lora, neurons=neurons)
    size = recipe.accumulate
    steps, left = divmod(len(batches), size)
    if left:
        raise ValueError(f"{len(batches)} batches are no steps of accumulate={size}")
    settings = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe)}
    settings |= {"every": None, "steps": steps, "neurons": neurons}  # saving changes no number
    store = Store(
        None if save is None else pathlib.Path(save) / "checkpoint.npz", restart=restart,
        model=model, settings=settings, code={"loss": loss},
    )  # fmt: skip
    kept = store.read()
    rest = store.resume(_Steps(batches, size))
    with mesh.use_mesh_of(model):
        if kept is not None and store.done == steps:
            return merge(_restored(mesh.replicate(trained), kept), frozen), kept["curve"]
        # Each step takes the place of the last in memory, and the model's own arrays stay.
        own = set(map(id, jax.tree.leaves(model)))
        trained = jax.tree.map(lambda a: jnp.copy(a) if id(a) in own else a, trained)
        trained, state = mesh.replicate((trained, recipe.optimiser(steps).init(trained)))
        where = tuple(jax.tree.leaves(mesh.shardings_of((trained, state))))
        advance = functools.partial(
            _update, merge=merge, recipe=recipe, steps=steps, loss=loss, places=where
        )
        curve = np.zeros((steps,), np.float32)
        if kept is not None:
            (trained, state), curve = _restored((trained, state), kept), kept["curve"]
        bar = tqdm.tqdm(rest, desc=label, initial=store.done, total=steps, mininterval=1)
        for some in bar:
            step = store.done
            placed = [mesh.shard_batch(batch.replace(processor=None)) for batch in some]
            trained, state, value = advance(trained, state, frozen, placed)
            curve[step] = value
            recent = curve[max(0, step - 19) : step + 1].mean()
            bar.set_postfix(loss=f"{recent:.3f}")
            if not np.isfinite(curve[step]):
                raise FloatingPointError(
                    f"{label}: the loss of step {step} is {curve[step]}; lower the learning rate "
                    f"(now {recipe.rate}) or look at batch {step}"
                )
            store.add(some)
            leaving = hosts.preemption_requested()
            if leaving or store.done % recipe.every == 0 or store.done == steps:
                leaves = jax.tree.leaves((trained, state))
                store.write({"curve": curve, **{str(i): leaf for i, leaf in enumerate(leaves)}})
            if leaving:
                hosts.exit_preempted(label)
    return merge(trained, frozen), curve


def update(trained, state, frozen, batches, *, merge, recipe, steps, loss, places):
    """One step on some batches; the loss before it. What comes out lies where it lay."""

    def total(trained, batch):
        sums, counts = loss(merge.for_pass(trained, frozen), batch, remat=recipe.remat)
        return sums.sum(), counts.sum()

    def add(found, batch):
        (value, count), gradient = jax.value_and_grad(total, has_aux=True)(trained, batch)
        return jax.tree.map(jnp.add, found, (gradient, value, count.astype(jnp.float32))), None

    nothing = jax.tree.map(jnp.zeros_like, trained), jnp.zeros(()), jnp.zeros(())
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
    (gradient, value, count), _ = jax.lax.scan(add, nothing, stacked)
    count = jnp.maximum(count, 1)
    gradient = jax.tree.map(lambda g: g / count.astype(g.dtype), gradient)
    change, state = recipe.optimiser(steps).update(gradient, state, trained)
    leaves, shape = jax.tree.flatten((optax.apply_updates(trained, change), state))
    if places:
        leaves = map(jax.lax.with_sharding_constraint, leaves, places)
    return *jax.tree.unflatten(shape, leaves), value / count


_update = jax.jit(
    update,
    static_argnames=("merge", "recipe", "steps", "loss", "places"),
    donate_argnames=("trained", "state"),
)


@dataclasses.dataclass(frozen=True)
class _Steps(Sequence):
    """The batches of each step."""

    batches: Sequence[Any]
    size: int

    def __len__(self) -> int:
        return len(self.batches) // self.size

    def __getitem__(self, step: int) -> list[Any]:
        return [self.batches[step * self.size + i] for i in range(self.size)]


def _restored(tree: Any, kept: Mapping[str, np.ndarray]) -> Any:
    """The tree with the arrays that were kept, by number, each where that of the tree lies."""
    leaves, shape = jax.tree.flatten(tree)
    found = [
        jax.make_array_from_callback(leaf.shape, leaf.sharding, kept[str(i)].__getitem__)
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(shape, found)


def evaluate(model, batches: Sequence[Any], *, label: str = "loss") -> tuple[float, float]:
    """Nats per answer token over batches, and the same with each row given the next row's picture.

    A model that answers from the picture does much worse with a wrong one.
    """
    step = jax.jit(losses.answer_nll)
    right, wrong, count = 0.0, 0.0, 0
    with mesh.use_mesh_of(model):
        for batch in tqdm.tqdm(batches, desc=label, leave=False):
            batch = batch.replace(processor=None)
            swapped = batch.replace(features=jnp.roll(jnp.asarray(batch.features), 1, 0))
            nll, tokens = mesh.gather_to_host(step(model, mesh.shard_batch(batch)))
            right += float(nll.sum())
            wrong += float(mesh.gather_to_host(step(model, mesh.shard_batch(swapped)))[0].sum())
            count += int(tokens.sum())
    return right / count, wrong / count
