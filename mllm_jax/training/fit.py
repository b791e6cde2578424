"""The training loop: one compiled step, and checkpoints from which a killed run continues."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from mllm_jax.arguments import require_number, require_whole, type_error
from mllm_jax.batch import Batch
from mllm_jax.passes import arguments
from mllm_jax.sharding import hosts, mesh
from mllm_jax.training import losses, parts
from mllm_jax.training.checkpoint import Checkpoint
from mllm_jax.typing import Array, Float, Indexed, Int

Batches: TypeAlias = Indexed[Batch]


class Loss(Protocol):
    """A loss of a batch: a sum and the number of its terms for each row."""

    def __call__(
        self, model: Any, batch: Batch, *, remat: bool
    ) -> tuple[Float[Array, " B"], Int[Array, " B"]]:
        """Return the sums float32[B] and the numbers of terms int32[B]."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of the training of a part of a model.

    Attributes:
      part: The part that is trained, see `parts.partition`.
      lora: The low-rank adaptation, if the part has one.
      rate: Peak learning rate.
      projector_rate: Peak learning rate of the projector, if it has its own.
      warmup: Share of the steps in which the learning rate rises; see `schedule`.
      weight_decay: Weight decay of AdamW, only for matrices; see `parts.decays`.
      clip: Largest norm of the gradient, 0 for none.
      accumulate: Number of batches per step.
      remat: Whether to recompute layers in the backward pass, which saves memory.
      every: Number of steps between two checkpoints.
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

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
          ValueError: One is not finite, too small or too large.
        """
        if not isinstance(self.part, str):
            raise type_error("part", self.part, "the name of a part, such as 'projector'")
        for name in ("rate", "weight_decay", "clip"):
            require_number(name, getattr(self, name))
        if self.projector_rate is not None:
            require_number("projector_rate", self.projector_rate)
        require_number("warmup", self.warmup, most=1)
        for name in ("accumulate", "every"):
            require_whole(name, getattr(self, name))

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Recipe:
        """Return the recipe of the plain values in a config."""
        lora = parts.Lora(**fields.get("lora", {}))
        return cls(**{**fields, "lora": lora})

    def optimiser(self, steps: int) -> optax.GradientTransformation:
        """Return AdamW with warm-up and cosine decay, for the trained part of `parts.partition`."""

        def adamw(rate: float) -> optax.GradientTransformation:
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
    """Return the learning rate as a function of the step, counted from 0; it is never 0.

    The first `warmup` steps have 1/warmup, 2/warmup, ... of the rate; the others decay along half
    a cosine, from the rate to just above 0.
    """

    def at(step: Any) -> jax.Array:
        rise = (step + 1) / max(1, warmup)
        done = (step - warmup) / max(1, steps - warmup)
        return rate * jnp.where(step < warmup, rise, (1 + jnp.cos(jnp.pi * done)) / 2)

    return at


def fit(
    model: Any,
    batches: Batches,
    recipe: Recipe,
    *,
    neurons: Mapping[str, np.ndarray] | None = None,
    save: str | pathlib.Path | None = None,
    restart: bool = False,
    loss: Loss = losses.answer_nll,
    label: str = "train",
) -> tuple[Any, np.ndarray]:
    """Train a part of a model, with one step on every `recipe.accumulate` batches.

    Trained parameters are float32 until the end, as are their gradients and the optimiser's
    moments, whatever the model's dtype; see `parts`.

    Args:
      model: The model, which is not changed.
      batches: The batches, all of one shape. They are computed when they are read, and must be
        equal each time.
      recipe: The settings of the training.
      neurons: The neurons to train, if the recipe trains neurons; see `parts.partition`.
      save: A folder for the checkpoint: trained parameters, the optimiser's state and the curve,
        with fingerprints of the start, the recipe, the loss and the batches so far. A killed run
        continues from it and returns the same weights. Batches of finished steps are read again, to
        compare their content; a finished run trains nothing.
      restart: Whether to remove an existing checkpoint.
      loss: (model, batch, remat=) -> sums float32[B] and their numbers of terms int32[B], such as
        tokens. The total of a step is divided by its number of terms, so that the division of a
        step into batches does not matter. Use a module-level function, so that a second run
        compiles nothing.
      label: The label of the progress bar.

    Returns:
      The trained model, and the loss of each step before its update, float32[steps].

    Raises:
      ValueError: The batches do not divide into steps, one has no answer token, or `save` is
        damaged or holds a training with another start model, recipe, number of steps, loss or
        batches.
      FloatingPointError: A loss is not finite.
      OSError: The checkpoint cannot be written.
    """
    _check_arguments(model, batches, recipe, loss)
    partition = parts.partition(model, recipe.part, lora=recipe.lora, neurons=neurons)
    merge, trained, frozen = partition
    steps = _count_steps(batches, recipe)
    settings = _settings(recipe) | {"steps": steps, "neurons": neurons}
    checkpoint = Checkpoint(
        save, restart=restart, model=model, settings=settings, code={"loss": loss}
    )
    exists = checkpoint.find()
    rest = checkpoint.resume(_Steps(batches, recipe.accumulate))
    optimiser = recipe.optimiser(steps)
    with mesh.use_mesh_of(model):
        curve = mesh.replicate(jnp.zeros((steps,), jnp.float32))
        if exists and checkpoint.done == steps:
            trained, curve = _read_finished(checkpoint, trained, optimiser, curve)
            return merge(trained, frozen), np.array(curve)
        trained = _copy_shared(trained, model)
        trained, state = mesh.replicate((trained, optimiser.init(trained)))
        if exists:
            trained, state, curve = checkpoint.load((trained, state, curve))
        shardings = tuple(jax.tree.leaves(mesh.shardings_of((trained, state))))
        step = functools.partial(
            _update, merge=merge, recipe=recipe, steps=steps, loss=loss, places=shardings
        )
        run = _Run(step, recipe, checkpoint, np.array(curve), label)
        trained = run.train(trained, state, frozen, rest)
    return merge(trained, frozen), run.curve


def _check_arguments(model: Any, batches: Any, recipe: Any, loss: Loss) -> None:
    """Raise ValueError unless these are a model, several batches by number, and a recipe.

    With a user's own loss the model may be any pytree.
    """
    if loss is losses.answer_nll:
        arguments.check_model(model)
    arguments.check_batches(batches, by_number=True)
    if not len(batches):
        raise ValueError("there is no batch to train on")
    if not isinstance(recipe, Recipe):
        raise type_error("recipe", recipe, "a Recipe: Recipe(rate=1e-3)")


def _count_steps(batches: Batches, recipe: Recipe) -> int:
    steps, remainder = divmod(len(batches), recipe.accumulate)
    if remainder:
        raise ValueError(f"{len(batches)} batches do not divide into steps of {recipe.accumulate}")
    return steps


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Return the fields of a recipe that change the result, which excludes saving."""
    settings = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    return settings | {"every": None}


def _read_finished(
    checkpoint: Checkpoint, trained: Any, optimiser: optax.GradientTransformation, curve: jax.Array
) -> tuple[Any, jax.Array]:
    """Read the parameters and the curve of a finished training, without the optimiser's state."""
    unread = jax.tree.map(lambda _: ..., jax.eval_shape(optimiser.init, trained))
    trained, _, curve = checkpoint.load((mesh.replicate(trained), unread, curve))
    return trained, curve


def _copy_shared(trained: Any, model: Any) -> Any:
    """Copy arrays that are shared with the model, because each step overwrites its arguments."""
    own = set(map(id, jax.tree.leaves(model)))
    return jax.tree.map(lambda array: jnp.copy(array) if id(array) in own else array, trained)


@dataclasses.dataclass
class _Run:
    """The loop over steps.

    Attributes:
      step: (trained, state, frozen, batches) -> trained, state, loss.
      recipe: The recipe, which determines when to save.
      checkpoint: The checkpoint, with the number of finished steps.
      curve: float32[steps], the loss of each step so far.
      label: The label of the progress bar.
    """

    step: Callable[..., tuple[Any, Any, jax.Array]]
    recipe: Recipe
    checkpoint: Checkpoint
    curve: np.ndarray
    label: str

    def train(self, trained: Any, state: Any, frozen: Any, rest: Iterator[list[Batch]]) -> Any:
        """Return the trained parameters after the remaining steps."""
        done, steps = self.checkpoint.done, len(self.curve)
        bar = tqdm.tqdm(rest, desc=self.label, initial=done, total=steps, mininterval=1)
        for batches in bar:
            number = self.checkpoint.done
            self._check(number, batches)
            placed = [mesh.shard_batch(batch.replace(processor=None)) for batch in batches]
            trained, state, value = self.step(trained, state, frozen, placed)
            self._note(number, value)
            bar.set_postfix(loss=f"{self.curve[max(0, number - 19) : number + 1].mean():.3f}")
            self.checkpoint.add(batches)
            leaving = hosts.preemption_requested()
            if leaving or self._is_saved_after(number):
                curve = mesh.replicate(jnp.asarray(self.curve))
                self.checkpoint.save((trained, state, curve))
            if leaving:
                hosts.exit_preempted(self.label)
        return trained

    def _check(self, number: int, batches: Sequence[Batch]) -> None:
        """Raise an error for a batch whose labels hold no token; labels may be absent."""
        try:
            for batch in batches:
                if not dataclasses.is_dataclass(batch):
                    raise type_error("batch", batch, "a batch from a processor")
                if getattr(batch, "labels", None) is not None:  # a loss may read batches of its own
                    losses.require_answers(batch)
            first, *others = map(_shapes, batches)
            if any(shapes != first for shapes in others):
                raise ValueError(
                    "its batches differ in shape: give the processor one length= and rows= for all"
                )
        except ValueError as error:
            raise ValueError(f"{self.label}: step {number}: {error}") from error

    def _note(self, number: int, loss: jax.Array) -> None:
        self.curve[number] = loss
        if not np.isfinite(self.curve[number]):
            raise FloatingPointError(
                f"{self.label}: the loss of step {number} is {self.curve[number]}; lower the "
                f"learning rate (now {self.recipe.rate}) or look at batch {number}"
            )

    def _is_saved_after(self, number: int) -> bool:
        return (number + 1) % self.recipe.every == 0 or number + 1 == len(self.curve)


def _shapes(batch: Batch) -> tuple[Any, list[tuple[int, ...]]]:
    """Return the structure of a batch and the shapes of its arrays."""
    leaves, structure = jax.tree.flatten(batch.replace(processor=None))
    return structure, [np.shape(leaf) for leaf in leaves]


def update(
    trained: Any,
    state: Any,
    frozen: Any,
    batches: Sequence[Batch],
    *,
    merge: parts.Merge,
    recipe: Recipe,
    steps: int,
    loss: Loss,
    places: tuple[jax.sharding.Sharding, ...],
) -> tuple[Any, Any, jax.Array]:
    """Compute one step on several batches.

    Args:
      trained: The trained parameters; their memory is reused.
      state: The optimiser's state; its memory is reused.
      frozen: The other arrays of the model.
      batches: The batches of the step, all of one shape.
      merge: (trained, frozen) -> the model.
      recipe: The settings of the training.
      steps: Number of steps of the whole training, for the learning rate.
      loss: The loss, see `fit`.
      places: The sharding of each array of (trained, state), also of the results.

    Returns:
      The new `trained` and `state`, and the loss before the step, float32[].
    """

    def total(trained: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        sums, counts = loss(merge.for_pass(trained, frozen), batch, remat=recipe.remat)
        return sums.sum(), counts.sum()

    def add(sums: Any, batch: Batch) -> tuple[Any, None]:
        (value, count), gradient = jax.value_and_grad(total, has_aux=True)(trained, batch)
        return jax.tree.map(jnp.add, sums, (gradient, value, count.astype(jnp.float32))), None

    zeros = jax.tree.map(jnp.zeros_like, trained), jnp.zeros(()), jnp.zeros(())
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
    (gradient, value, count), _ = jax.lax.scan(add, zeros, stacked)
    count = jnp.maximum(count, 1)
    gradient = jax.tree.map(lambda g: g / count.astype(g.dtype), gradient)
    change, state = recipe.optimiser(steps).update(gradient, state, trained)
    leaves, shape = jax.tree.flatten((optax.apply_updates(trained, change), state))
    if places:
        leaves = list(map(jax.lax.with_sharding_constraint, leaves, places))
    return *jax.tree.unflatten(shape, leaves), value / count


_update = jax.jit(
    update,
    static_argnames=("merge", "recipe", "steps", "loss", "places"),
    donate_argnames=("trained", "state"),
)


@dataclasses.dataclass(frozen=True)
class _Steps:
    """The batches of each step."""

    batches: Batches
    size: int

    def __len__(self) -> int:
        return len(self.batches) // self.size

    def __getitem__(self, step: int) -> list[Batch]:
        return [self.batches[step * self.size + i] for i in range(self.size)]

    def __iter__(self) -> Iterator[list[Batch]]:
        return (self[step] for step in range(len(self)))


def evaluate(
    model: Any, batches: Batches, wrong_batches: Batches | None = None, *, label: str = "loss"
) -> tuple[float, float]:
    """Compute the loss with each row's own picture, and with a wrong one.

    A model that answers from the picture does much worse with a wrong one.

    Args:
      model: The model.
      batches: Batches with answers and vision features.
      wrong_batches: The same with wrong pictures. By default each row is given the features of the
        row before, which is valid if all pictures have the same layout.
      label: The label of the progress bar.

    Returns:
      Both losses, in nats per answer token over all batches.

    Raises:
      ValueError: There is no batch, or one has no answer token, or no wrong pictures.
    """
    arguments.check_model(model)
    arguments.check_batches(batches, by_number=True)
    if not len(batches):
        raise ValueError(f"{label}: there is no batch")
    step = jax.jit(losses.answer_nll)
    right, wrong, count = 0.0, 0.0, 0
    with mesh.use_mesh_of(model):
        for number in tqdm.trange(len(batches), desc=label, leave=False):
            batch = batches[number].replace(processor=None)
            losses.require_answers(batch)
            if wrong_batches is None:
                if batch.features is None or len(batch.features) < 2:
                    raise ValueError(
                        f"{label}: batch {number} has no vision features of several pictures to "
                        "exchange between rows: give such batches, or wrong_batches"
                    )
                swapped = batch.replace(features=jnp.roll(jnp.asarray(batch.features), 1, 0))
            else:
                swapped = wrong_batches[number].replace(processor=None)
            nll, tokens = mesh.gather_to_host(step(model, mesh.shard_batch(batch)))
            right += float(nll.sum())
            wrong += float(mesh.gather_to_host(step(model, mesh.shard_batch(swapped)))[0].sum())
            count += int(tokens.sum())
    return right / count, wrong / count
