"""Directions to steer by, from two sets of states, and the file that holds one.

States are one vector for each example, such as `mj.mean(site, where=tok.image)` returns:

    page = directions.find("means", pages, galaxies, S.lm.resid_post[12], where="image")
    mj.generate(model, batch, page.edit(2.0))
    directions.write(page, "page.safetensors")

`find` knows three kinds. Each is scaled to the distance of the means of the negative and the
positive set along the direction, so that a strength of 1 means the same for all.

* "means": the difference of the two means (Marks and Tegmark 2024; of contrastive pairs, Rimsky et
  al. 2024: the mean of the paired differences is the difference of the means).
* "component": the first principal component of the differences of contrastive pairs, each pair
  taken in both orders (Zou et al. 2023, "Representation engineering").
* "probe": the weights of a logistic regression that separates the two sets.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping

import numpy as np

from mllm_jax import files, sites
from mllm_jax.analysis import checks
from mllm_jax.checkpoints import tensors
from mllm_jax.interventions import edits, spec
from mllm_jax.interventions.edits import Edits
from mllm_jax.selections import END
from mllm_jax.sites import Address, Site, Target
from mllm_jax.typing import Array, Float

FORMAT = "mllm_jax direction 1"
FIELDS = ("format", "site", "layers", "where", "kind", "norms", "model")


@dataclasses.dataclass(frozen=True)
class Direction:
    """A vector for a site, or one for each of several of its layers.

    Attributes:
      site: The site, which has one vector for each token.
      layers: The layer of each vector; empty for a site that exists once.
      vectors: The vectors, float32[L, D].
      where: The tokens that it is added to, in the syntax of `--edits`.
      kind: How it was found.
      model: The name of its model; "" if not known.

    Raises:
      ValueError: The vectors are not finite, or not one for each layer; or the site does not have
        one vector for each token, or the tokens are not given by kind.
    """

    site: Site
    layers: tuple[int, ...]
    vectors: Float[np.ndarray, "L D"]
    where: str = "every"
    kind: str = ""
    model: str = ""

    def __post_init__(self) -> None:
        """Check that the fields fit each other."""
        checks.finite(self.vectors, "vectors", axes="[L, D]")
        if not self.site.has_latents or len(self.site.axes) != 3:
            raise ValueError(f"a direction is one vector for each token, {self.site} is not")
        if bool(self.layers) != self.site.stacked or len(self.vectors) != max(1, len(self.layers)):
            raise ValueError(
                f"{len(self.vectors)} vectors for layers {list(self.layers)} of {self.site}: a "
                "direction has one vector for each layer, or one for a site that exists once"
            )
        if len(set(self.layers)) < len(self.layers) or min(self.layers, default=0) < 0:
            raise ValueError(f"layers {list(self.layers)}: each is listed once, from 0")
        if "@" in self.where:
            raise ValueError(f"where='{self.where}': a direction names kinds of tokens, no file")
        spec.parse_where(self.where)

    @property
    def norms(self) -> Float[np.ndarray, " L"]:
        """The length of each vector."""
        return np.linalg.norm(np.asarray(self.vectors, np.float64), axis=-1)

    def edit(self, strength: float | Float[Array, ""] = 1.0) -> Edits:
        """Return the edit that adds the vectors, times a strength."""
        targets: list[Target] = [self.site[layer] for layer in self.layers] or [self.site]
        where, chain = spec.parse_where(self.where), Edits()
        for target, vector in zip(targets, self.vectors, strict=True):
            chain >>= edits.add(target, strength * vector, where=where)
        return chain

    def random_like(self, seed: int) -> Direction:
        """Return random vectors of the same norms, a control."""
        draw = np.random.default_rng([seed, *b"direction"]).standard_normal(self.vectors.shape)
        draw *= (self.norms / np.linalg.norm(draw, axis=-1))[:, None]
        return dataclasses.replace(self, vectors=draw.astype(np.float32), kind="random")


def find(
    kind: str,
    positive: Float[np.ndarray, "... N D"],
    negative: Float[np.ndarray, "... N D"],
    target: Target,
    *,
    where: str = "every",
    model: str = "",
) -> Direction:
    """Find the direction from one set of states to another.

    Args:
      kind: "means", "component" or "probe", see above.
      positive: The states that the direction leads to, float[N, D] of one layer or [L, N, D].
      negative: The states that it leads from. For "component", rows i of both are a contrastive
        pair.
      target: The site and the layers of the states, such as `lm.resid_post[12]`.
      where: The tokens to add it to, in the syntax of `--edits`.
      model: The name of the model.

    Raises:
      ValueError: The states are not finite, are zeros like those of rows that pad a batch, or do
        not fit each other or the target; or the sets do not differ along the direction.
    """
    if kind not in KINDS:
        raise ValueError(f"kind='{kind}' is not one of {', '.join(KINDS)}")
    address = Address.of(target)
    sets = [checks.finite(x, n) for x, n in ((positive, "positive"), (negative, "negative"))]
    if any(x.ndim not in (2, 3) or not x.shape[-2] for x in sets):
        shapes = " and ".join(str(x.shape) for x in sets)
        raise ValueError(f"states are [N, D] or [L, N, D] of one or more examples, got {shapes}")
    for x, name in zip(sets, ("positive", "negative"), strict=True):
        if (empty := np.argwhere(~x.any(-1))).size:
            place = empty[0].tolist()
            raise ValueError(f"{name}{place} is a state of zeros: leave out rows that pad a batch")
    a, b = (x if x.ndim == 3 else x[None] for x in sets)
    if a.shape[::2] != b.shape[::2]:
        raise ValueError(f"positive {sets[0].shape} and negative {sets[1].shape}: unequal L or D")
    if kind == "component" and a.shape != b.shape:
        raise ValueError(
            f"component takes pairs: {a.shape[1]} positive and {b.shape[1]} negative states"
        )
    vectors = [_scaled(KINDS[kind](x, y), x, y) for x, y in zip(a, b, strict=True)]
    found, layers = np.asarray(vectors, np.float32), _layers(address, sets[0].shape[:-2])
    return Direction(address.site, layers, found, where, kind, model)


def _layers(address: Address, lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Return the numbers of the layers of an address.

    Args:
      address: The address of the states.
      lengths: The length of their layer axis; empty if they have none.
    """
    form, value = address.layers.form, np.asarray(address.layers.value)
    if address.units.form != "all":
        raise ValueError(f"a direction is of all units of {address.site}: give its layers alone")
    if not address.site.stacked:
        return ()
    if form == "all" and not lengths:
        raise ValueError(f"states [N, D] are of one layer: name it, as {address.site}[12]")
    if form == "all":
        return tuple(range(*lengths))
    if form == "range" and value[0] >= 0 and 0 <= value[1] < END:
        return tuple(range(*value.tolist()))
    if form in ("one", "index"):
        return tuple(np.atleast_1d(value).tolist())
    raise ValueError(f"the layers of {address.site} are counted from 0: list them, as [[18, 20]]")


def _scaled(
    weight: Float[np.ndarray, " D"], a: Float[np.ndarray, "N D"], b: Float[np.ndarray, "N D"]
) -> Float[np.ndarray, " D"]:
    """Return the part of the difference of two means that lies along a vector."""
    difference = _difference_of_means(a, b)
    vector = weight * (weight @ difference) / max(weight @ weight, np.finfo(np.float64).tiny)
    # A smaller difference of float32 states is rounding.
    least = np.finfo(np.float32).eps * max(np.abs(a).max(), np.abs(b).max())
    if np.linalg.norm(vector) <= least:
        raise ValueError("positive and negative do not differ along the direction")
    return vector


def _difference_of_means(
    a: Float[np.ndarray, "N D"], b: Float[np.ndarray, "N D"]
) -> Float[np.ndarray, " D"]:
    return a.mean(0) - b.mean(0)


def _first_component(
    a: Float[np.ndarray, "N D"], b: Float[np.ndarray, "N D"]
) -> Float[np.ndarray, " D"]:
    return np.linalg.svd(a - b, full_matrices=False)[2][0]


def _probe(a: Float[np.ndarray, "N D"], b: Float[np.ndarray, "N D"]) -> Float[np.ndarray, " D"]:
    """Return the weights of a logistic regression, in the units of the states.

    States are standardised, and the squared weights of the standardised states are added to twice
    the summed cross-entropy (C = 1 of scikit-learn). The weights then lie in the span of the
    states, in whose coordinates they are fitted.
    """
    x = np.concatenate([a, b])
    deviation = x.std(0)
    deviation[deviation <= np.finfo(np.float32).eps * np.abs(x).max(0)] = 1
    sign = np.repeat([1.0, -1.0], [len(a), len(b)])
    u, s, axes = np.linalg.svd((x - x.mean(0)) / deviation, full_matrices=False)
    return axes.T @ _logistic_regression(u * s, sign) / deviation


def _logistic_regression(
    x: Float[np.ndarray, "N r"], sign: Float[np.ndarray, " N"]
) -> Float[np.ndarray, " r"]:
    """Return the weights of a logistic regression with a bias, by Newton's method."""
    z = np.append(x, np.ones((len(x), 1)), 1)  # the last weight is the bias
    decay = np.append(np.ones(x.shape[1]), 0.0)

    def loss(weight: np.ndarray) -> float:
        return np.logaddexp(0, -sign * (z @ weight)).sum() + decay @ weight**2 / 2

    weight = np.zeros(z.shape[1])
    for _ in range(100):
        wrong = np.exp(-np.logaddexp(0, sign * (z @ weight)))  # the probability of the other set
        gradient = decay * weight - z.T @ (sign * wrong)
        curvature = np.diag(decay) + (z.T * wrong * (1 - wrong)) @ z
        step = np.linalg.lstsq(curvature, gradient)[0]
        size = next((s for s in 0.5 ** np.arange(30) if loss(weight - s * step) < loss(weight)), 0)
        if not size:  # nothing lies lower, up to rounding
            break
        weight = weight - size * step
    return weight[:-1]


KINDS: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "means": _difference_of_means,
    "component": _first_component,
    "probe": _probe,
}


def write(direction: Direction, path: str | os.PathLike) -> None:
    """Write a direction to a safetensors file: its vectors, and the record of the rest as metadata.

    Raises:
      OSError: The file cannot be written.
      ValueError: The name does not end in .safetensors.
    """
    path = _require_suffix(path)
    record = {
        "format": FORMAT, "site": str(direction.site), "layers": json.dumps(direction.layers),
        "where": direction.where, "kind": direction.kind, "model": direction.model,
        "norms": json.dumps([float(f"{norm:.6g}") for norm in direction.norms]),
    }  # fmt: skip
    tensors.write({"vectors": np.asarray(direction.vectors, np.float32)}, path, record)


def read(path: str | os.PathLike) -> Direction:
    """Read a direction.

    Raises:
      FileNotFoundError: There is no such file.
      OSError: It is not a regular file.
      ValueError: It is damaged, or its record is missing or does not match its vectors.
    """
    path = _require_suffix(path)
    record, stored = tensors.read_metadata(path), tensors.open_file(path)
    if missing := [name for name in FIELDS if name not in record]:
        raise ValueError(
            files.refusal(path, [f"no record of {', '.join(missing)} in its metadata"])
        )
    if record["format"] != FORMAT:
        problem = f"of format {files.shown(record['format'])}, expected '{FORMAT}'"
        raise ValueError(files.refusal(path, [problem]))
    if [tensor.key for tensor in stored] != ["vectors"]:
        problem = f"holds {files.some(t.key for t in stored)}, expected 'vectors' alone"
        raise ValueError(files.refusal(path, [problem]))
    try:
        layers, norms = _numbers(record["layers"], int), _numbers(record["norms"], float)
        found = Direction(
            sites.get(record["site"]), tuple(map(int, layers)), stored[0].read(), record["where"],
            record["kind"], record["model"],
        )  # fmt: skip
        if len(norms) != len(found.norms) or not np.allclose(norms, found.norms, rtol=1e-4):
            raise ValueError("its vectors do not have the norms in its record")
    except (ValueError, KeyError) as error:
        raise ValueError(files.refusal(path, [files.line(error.args[0], 180)])) from error
    return dataclasses.replace(found, vectors=np.asarray(found.vectors, np.float32))


def _require_suffix(path: str | os.PathLike) -> pathlib.Path:
    path = pathlib.Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise ValueError(files.refusal(path, ["a direction is a file that ends in .safetensors"]))
    return path


def _numbers(text: str, kind: type[int] | type[float]) -> list[float]:
    """Return the numbers of a list in JSON.

    Raises:
      ValueError: The text is something else.
    """
    numbers = json.loads(text) if len(text) < 2**16 else None
    allowed = (int,) if kind is int else (int, float)
    if not isinstance(numbers, list) or not all(type(n) in allowed for n in numbers):
        raise ValueError(f"{files.shown(text)} is not a list of numbers")
    return numbers
