"""Which neurons belong to which domain: by the paper's rule, by another, or out of a file.

The rule is the config's: `selector`, `scope`, `thresholds`, `assign`, `compat` and the rates.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

import mllm_jax as mj
from experiments.neurons.base import MODULES, Study
from experiments.neurons.counts import SCOPES, Counts
from mllm_jax.analysis import attribution, domain_neurons, selectors, stability
from mllm_jax.analysis.domain_neurons import SelectedNeurons
from mllm_jax.checkpoints import masks
from mllm_jax.interventions.edits import Edits
from mllm_jax.passes import score

SELECTORS = ("entropy", "auroc", "difference", "attribution", "random")
SETTINGS = {
    "scope": ("all", "image", "text"),
    "thresholds": ("module", "global", "layer"),
    "assign": ("multiple", "single"),
    "compat": ("", "official"),
}
All = Mapping[str, Mapping[str, np.ndarray]]  # {domain: what `counts.count` gives}


def check(config) -> None:
    """Refuses settings that are none, before anything is computed."""
    for field, known in (SETTINGS | {"scope": tuple(SCOPES), "selector": SELECTORS}).items():
        if config[field] not in known:
            raise ValueError(f"config.{field}={config[field]!r} is none of {', '.join(known)}")
    for name in config.compare:
        if name not in SELECTORS:
            raise ValueError(f"config.compare: {name!r} is none of {', '.join(SELECTORS)}")
    path = config.masks
    if path and not path.endswith(".npz") and "{module}" not in path:
        raise ValueError(
            f"config.masks={path!r} is neither FILE.npz nor FOLDER/{{module}}.pth with that word"
        )
    if config.compat and any(config[f] != SETTINGS[f][0] for f in SETTINGS if f != "compat"):
        raise ValueError(
            "config.compat='official' counts all tokens, has thresholds by module and several "
            "domains for a neuron: leave scope, thresholds and assign as they are"
        )


def rule(config) -> dict[str, str]:
    """What a selection depends on beside its rates."""
    return {field: config[field] for field in (*SETTINGS, "selector")}


def options(config, rule: Mapping[str, str]) -> dict[str, Any]:
    """What `domain_neurons.select` takes."""
    rates = {name: config[name] for name in ("top_rate", "filter_rate", "bar_rate")}
    return rates | {"assign": rule["assign"], "compat": rule["compat"] or None}


def select(this: Study, counts: All, rule: Mapping[str, str]) -> dict[str, SelectedNeurons]:
    """The neurons of every module.

    Selectors other than the entropy take as many neurons of each domain as the entropy does.
    """
    given = {module: Counts.of(counts, module, rule["scope"]) for module in this.shapes}
    pooled = {m: stability.pool(c.positive, c.tokens, c.domain) for m, c in given.items()}
    found = domain_neurons.select_modules(
        {module: positive for module, (positive, _) in pooled.items()},
        {module: tokens for module, (_, tokens) in pooled.items()},
        thresholds=rule["thresholds"], names=this.names, **options(this.config, rule),
    )  # fmt: skip
    if rule["selector"] == "entropy":
        return found
    sizes = {module: f.mask.sum(axis=(1, 2)) for module, f in found.items()}
    return {
        m: as_found(selectors.top(scores(this, rule["selector"], m, given[m]), sizes[m]))
        for m in found
    }


def scores(this: Study, selector: str, module: str, counts: Counts) -> np.ndarray:
    """float64[D_, L, F]: the higher, the more a neuron belongs to the domain."""
    domains = range(len(this.names))
    if selector == "auroc":
        mean = counts.sum / np.maximum(counts.tokens, 1)[:, None, None]
        return selectors.auroc(mean, counts.domain)
    if selector == "difference":
        sums = np.stack([counts.sum[counts.domain == d].sum(axis=0) for d in domains])
        tokens = np.bincount(counts.domain, counts.tokens)
        return selectors.mean_difference(sums, counts.squares, tokens)
    if selector == "attribution":
        found = [attributions(this, name)[module] for name in this.names]
        domain = np.repeat(np.arange(len(found)), [len(values) for values in found])
        return selectors.attribution(np.concatenate(found), domain)
    return selectors.random((len(domains), *this.shapes[module]), this.config.seed)


def attributions(this: Study, name: str) -> dict[str, np.ndarray]:
    """Of each group of a domain, how the likelihood of right answers hangs on every neuron.

    Returns:
        {module: float32[groups, L, F]}: d metric / d gate of gates that multiply the activations.
    """
    asked = this.asked("train", name)
    gates = {module: np.ones(shape, np.float32) for module, shape in this.shapes.items()}

    def one(number: int):
        right = [[question.answer] for _, question in asked.rows(number)]
        batch = asked[number].replace(processor=None)
        ids = score.candidate_ids(this.processor, right, len(batch.ids))
        return jax.device_get(_attribute(gates, this.model, batch, ids, this.edits or Edits()))

    def make():
        groups = tqdm.tqdm(this.groups(asked), desc=f"attribute, {name}", leave=False)
        sums = [
            functools.reduce(lambda a, b: jax.tree.map(np.add, a, b), map(one, group))
            for group in groups
        ]
        return {module: np.stack([part[module] for part in sums]) for module in gates}

    return this.workdir.arrays(f"attribution-{name}", make)


@jax.jit
def _attribute(gates, model, batch, ids, edits):
    def metric(gates):
        closed = [mj.scale(MODULES[module], gate) for module, gate in gates.items()]
        said = mj.score(model, batch, ids, functools.reduce(operator.rshift, closed, edits))
        return jnp.where(ids[..., 0] >= 0, said, 0).sum()

    return attribution.first_order(metric, gates).values


def as_found(mask: np.ndarray) -> SelectedNeurons:
    """A mask that comes without entropies."""
    unknown, selected = np.full(mask.shape[1:], np.nan), mask.any(axis=0)
    return SelectedNeurons(unknown, unknown, selected, mask, np.nan, np.nan, int(selected.sum()))


def read(this: Study) -> dict[str, SelectedNeurons]:
    """The masks of `config.masks`: a native .npz, or `FOLDER/{module}.pth` as MMNeuron writes it.

    A .pth of its vision tower has one layer more than is run here; it reaches nothing.
    """
    path = this.config.masks
    if path.endswith(".npz"):
        found = _native(this, path)
    else:
        found = {
            module: masks.read_pth(path.format(module=module), width, domains=len(this.names))
            for module, (_, width) in this.shapes.items()
        }
        layers = this.shapes["vision"][0]
        if found["vision"].shape[1] == layers + 1:
            found["vision"] = found["vision"][:, :layers]
    for module, mask in found.items():
        if mask.shape[1:] != this.shapes[module]:
            raise ValueError(
                f"{path}: {module} has (layers, neurons) {mask.shape[1:]}, but the model has "
                f"{this.shapes[module]}"
            )
    return {module: as_found(mask) for module, mask in found.items()}


def _native(this: Study, path: str) -> dict[str, np.ndarray]:
    kept = masks.load(path)
    if set(kept.domains) != set(this.names):
        raise ValueError(f"{path} has the domains {list(kept.domains)}, not {list(this.names)}")
    order = [kept.domains.index(name) for name in this.names]
    missing = [MODULES[m].name for m in this.shapes if MODULES[m].name not in kept.modules]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; it has {', '.join(kept.modules)}")
    return {module: kept.modules[MODULES[module].name][order] for module in this.shapes}


def write(this: Study, found: Mapping[str, SelectedNeurons]) -> None:
    """`masks.npz`, and `masks/MODULE.pth` as MMNeuron's code reads it."""
    named = {MODULES[module].name: f.mask for module, f in found.items()}
    masks.save(this.workdir / "masks.npz", named, this.names)
    for module, f in found.items():
        masks.write_pth(this.workdir / "masks" / f"{module}.pth", f.mask)


def describe(this: Study, found: SelectedNeurons) -> dict[str, Any]:
    """What results.json says of the neurons of a module."""
    layers = domain_neurons.per_layer(found)
    how_many = domain_neurons.domains_per_neuron(found)
    return {
        "k": found.k,
        "threshold": _plain(found.threshold),
        "bar": _plain(found.bar),
        "selected": int(found.selected.sum()),
        "share": float(found.selected.mean()),
        "neurons_per_domain": {n: int(layers[d].sum()) for d, n in enumerate(this.names)},
        "domains_per_neuron": {str(n): int(c) for n, c in enumerate(how_many)},
        "per_layer": {n: layers[d].tolist() for d, n in enumerate(this.names)},
        "overlap": domain_neurons.overlap(found).tolist(),
    }


def _plain(value: float | np.ndarray) -> float | list[float] | None:
    """As JSON has it; None for what a mask from a file does not say."""
    return None if np.isnan(value).any() else np.asarray(value).tolist()
