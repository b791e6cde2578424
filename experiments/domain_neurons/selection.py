"""Select the neurons of each domain: by MMNeuron's rule, by another selector, or from a file.

The rule is set by the config: `selector`, `prompts`, `scope`, `thresholds`, `assign`, `compat` and
the rates.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tqdm

import mllm_jax as mj
from experiments import context
from experiments.domain_neurons.context import PROMPTS, Prompts, Study
from experiments.domain_neurons.counts import SCOPES, Counts, Scope
from experiments.modules import MODULES
from mllm_jax import tokens as tok
from mllm_jax.analysis import attribution, domain_neurons, selectors, stability
from mllm_jax.analysis.domain_neurons import SelectedNeurons
from mllm_jax.batch import Batch
from mllm_jax.checkpoints import masks
from mllm_jax.data import batching
from mllm_jax.interventions.edits import Edits
from mllm_jax.passes import score
from mllm_jax.typing import AnyArray, Array, Float, Int

SELECTORS = ("entropy", "auroc", "difference", "attribution", "random")
ABLATE = ("selected", "tested")
SETTINGS = {
    "prompts": PROMPTS,
    "scope": ("image", "all", "text"),
    "thresholds": ("module", "global", "layer"),
    "assign": ("multiple", "single"),
    "compat": ("", "official"),
}
OFFICIAL = {"prompts": "released", "scope": "all", "thresholds": "module", "assign": "multiple"}
DomainCounts = Mapping[str, Mapping[str, np.ndarray]]  # {domain: the result of `counts.count`}
Counted = Mapping[Prompts, DomainCounts]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """The settings of the selection, except its rates; the config has the same fields.

    Attributes:
      selector: One of SELECTORS.
      prompts: The prompts of the pictures.
      scope: The tokens that are counted.
      thresholds: The neurons that compete: of a module, of all modules or of a layer.
      assign: Whether a neuron may belong to multiple domains.
      compat: "official" for the procedure of the released code.
    """

    selector: str
    prompts: Prompts
    scope: Scope
    thresholds: Literal["module", "global", "layer"]
    assign: Literal["multiple", "single"]
    compat: Literal["", "official"]


def check(config: ml_collections.ConfigDict) -> None:
    """Refuse unknown settings, before anything is computed."""
    for field, choices in (SETTINGS | {"scope": tuple(SCOPES), "selector": SELECTORS}).items():
        context.require_choice(f"config.{field}", config[field], choices)
    for name in config.compare:
        context.require_choice("config.compare", name, SELECTORS)
    context.require_choice("config.ablate", config.ablate, ABLATE)
    if config.ablate == "tested" and (config.masks or config.selector != "entropy"):
        raise ValueError(
            "config.ablate='tested' ablates the neurons whose entropy is beyond chance: set "
            "config.selector='entropy' and config.masks=''"
        )
    path = config.masks
    if path and not path.endswith(".npz") and "{module}" not in path:
        raise ValueError(
            f"config.masks={path!r}: give FILE.npz, or FOLDER/{{module}}.pth with the literal "
            "text {module}"
        )
    if config.compat and any(config[field] != value for field, value in OFFICIAL.items()):
        settings = ", ".join(f"{field}={value!r}" for field, value in OFFICIAL.items())
        raise ValueError(f"config.compat='official' follows the released code: set {settings}")


def rule(config: ml_collections.ConfigDict) -> Rule:
    """Return the rule of a config."""
    return Rule(**{field.name: config[field.name] for field in dataclasses.fields(Rule)})


def options(config: ml_collections.ConfigDict, rule: Rule) -> dict[str, Any]:
    """Return the keyword arguments of `domain_neurons.select`."""
    rates = {name: config[name] for name in ("top_rate", "filter_rate", "bar_rate")}
    return rates | {"assign": rule.assign, "compat": rule.compat or None}


def counts_of(study: Study, counted: Counted, module: str) -> Counts:
    """Return the counts of a module that the rule of the config reads: its prompts, its scope."""
    own = rule(study.config)
    return Counts.of(counted[own.prompts], module, own.scope)


def select(study: Study, counted: Counted, rule: Rule) -> dict[str, SelectedNeurons]:
    """Return the neurons of every module.

    Selectors other than the entropy select as many neurons of each domain as the entropy does.
    """
    of_prompts = counted[rule.prompts]
    counts = {module: Counts.of(of_prompts, module, rule.scope) for module in study.shapes}
    pooled = {m: stability.pool(c.positive, c.tokens, c.domain) for m, c in counts.items()}
    by_entropy = domain_neurons.select_modules(
        {module: positive for module, (positive, _) in pooled.items()},
        {module: tokens for module, (_, tokens) in pooled.items()},
        thresholds=rule.thresholds, names=study.names, **options(study.config, rule),
    )  # fmt: skip
    if rule.selector == "entropy":
        return by_entropy
    sizes = {module: selected.mask.sum(axis=(1, 2)) for module, selected in by_entropy.items()}
    if rule.selector == "auroc":
        return _by_auroc(study, of_prompts, rule, sizes)
    return {
        m: from_mask(selectors.top(scores(study, rule.selector, m, counts[m]), sizes[m]))
        for m in by_entropy
    }


def _by_auroc(
    study: Study, counted: DomainCounts, rule: Rule, sizes: Mapping[str, np.ndarray]
) -> dict[str, SelectedNeurons]:
    """Select by the ranks of pictures; ties are ordered by the size of the effect.

    Groups of pictures would be too few to rank: hundreds of neurons would then separate a domain
    without error, and the order of ties would decide the selection.
    """
    kinds = {m: set(counted[study.names[0]][f"{m}/kinds"].tolist()) for m in study.shapes}
    scope = SCOPES[rule.scope]
    where = {m: tokens_of(scope) if kinds[m] & set(scope) else None for m in kinds}
    means = [picture_means(study, name, rule, where) for name in study.names]
    domain = np.repeat(np.arange(len(means)), [len(next(iter(m.values()))) for m in means])
    out = {}
    for module, count in sizes.items():
        responses = np.concatenate([of_domain[module] for of_domain in means])
        area, size = (f(responses, domain) for f in (selectors.auroc, selectors.effect_size))
        out[module] = from_mask(selectors.top(area, count.tolist(), ties=size))
    return out


def picture_means(
    study: Study, name: str, rule: Rule, where: Mapping[str, tok.Selector | None]
) -> dict[str, np.ndarray]:
    """Return the mean activations over the tokens of a scope, by picture of a domain.

    Args:
      study: The study; `config.auroc_pictures` is the largest number of pictures.
      name: The name of the domain.
      rule: The prompts of the pictures, and the name of the scope.
      where: The tokens of the scope by module; None for all tokens if a module has none of them.

    Returns:
      float32[pictures, L, F] by module.
    """
    questions = study.questions("train", name, rule.prompts)
    count = min(study.config.auroc_pictures, len(questions.pairs))
    captures = {module: mj.mean(MODULES[module], where=where[module]) for module in study.shapes}

    def make() -> dict[str, np.ndarray]:
        parts: list[dict[str, np.ndarray]] = []
        numbers = range(-(-count // questions.size))
        for number in tqdm.tqdm(numbers, desc=f"pictures, {name}", leave=False):
            out = mj.run(study.model, questions[number], study.edits, captures, logits="none")
            rows = len(questions.rows(number))
            parts.append({m: np.asarray(out[m])[:, :rows].swapaxes(0, 1) for m in captures})
        return {m: np.concatenate([part[m] for part in parts])[:count] for m in captures}

    return study.workdir.arrays(f"pictures/{rule.prompts}-{rule.scope}/{name}", make)


def tokens_of(kinds: Iterable[str]) -> tok.Selector:
    """Return the selector of several kinds of token."""
    return functools.reduce(operator.or_, (getattr(tok, kind) for kind in kinds))


def scores(study: Study, selector: str, module: str, counts: Counts) -> np.ndarray:
    """Return float64[D_, L, F]: the higher a score, the more the neuron belongs to the domain."""
    domains = range(len(study.names))
    if selector == "difference":
        sums = np.stack([counts.sum[counts.domain == d].sum(axis=0) for d in domains])
        tokens = np.bincount(counts.domain, counts.tokens)
        return selectors.mean_difference(sums, None, tokens, centred=counts.centred)
    if selector == "attribution":
        values = [attributions(study, name)[module] for name in study.names]
        domain = np.repeat(np.arange(len(values)), [len(groups) for groups in values])
        return selectors.attribution(np.concatenate(values), domain)
    return selectors.random((len(domains), *study.shapes[module]), study.config.seed)


def attributions(study: Study, name: str) -> dict[str, np.ndarray]:
    """Return the gradients of the likelihood of right answers, by group of a domain.

    Returns:
      float32[groups, L, F] by module: d metric / d gate of gates that multiply the activations.
    """
    questions = study.questions("train", name)

    def add(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return jax.tree.map(np.add, a, b)

    def make() -> dict[str, np.ndarray]:
        groups = tqdm.tqdm(study.groups(questions), desc=f"attribute, {name}", leave=False)
        each = functools.partial(attribute_batch, study, questions)
        sums = [functools.reduce(add, map(each, group)) for group in groups]
        return {module: np.stack([part[module] for part in sums]) for module in study.shapes}

    return study.workdir.arrays(f"attribution-{name}", make)


def attribute_batch(
    study: Study, questions: batching.QuestionBatches, number: int
) -> dict[str, np.ndarray]:
    """Return the gradients of the likelihood of right answers, summed over a batch."""
    batch, ids = right_answers(study, questions, number)
    return jax.device_get(_attribute(open_gates(study), study.model, batch, ids, study.edits))


@jax.jit
def _attribute(gates, model, batch, ids, edits):
    def metric(gates):
        return score_gated(gates, model, batch, ids, edits).sum()

    return attribution.first_order(metric, gates).values


def right_answers(
    study: Study, questions: batching.QuestionBatches, number: int
) -> tuple[Batch, Int[np.ndarray, "B 1 A"]]:
    """Return a batch without its processor, and the token ids of its right answers."""
    right = [[question.answer] for _, question in questions.rows(number)]
    batch = questions[number].replace(processor=None)
    return batch, score.candidate_ids(study.processor, right, len(batch.ids))


def open_gates(study: Study) -> dict[str, Float[np.ndarray, "L F"]]:
    """Return gates that leave the neurons of all modules unchanged."""
    return {module: np.ones(shape, np.float32) for module, shape in study.shapes.items()}


def score_gated(
    gates: Mapping[str, AnyArray],
    model: Any,
    batch: Batch,
    ids: Int[AnyArray, "B 1 A"],
    edits: Edits,
) -> Float[Array, "B 1"]:
    """Return the log-likelihoods of answers with neurons scaled by gates; 0 without an answer."""
    scaled = [mj.scale(MODULES[module], gate) for module, gate in gates.items()]
    scores = mj.score(model, batch, ids, functools.reduce(operator.rshift, scaled, edits))
    return jnp.where(ids[..., 0] >= 0, scores, 0)


def from_mask(mask: np.ndarray) -> SelectedNeurons:
    """Return selected neurons whose entropies are unknown."""
    unknown, selected = np.full(mask.shape[1:], np.nan), np.asarray(mask.any(axis=0))
    return SelectedNeurons(unknown, unknown, selected, mask, np.nan, np.nan, int(selected.sum()))


def read(study: Study) -> dict[str, SelectedNeurons]:
    """Return the neurons of `config.masks`: our .npz, or MMNeuron's `FOLDER/{module}.pth`.

    MMNeuron's .pth of the vision tower may have one layer more than the model runs here; edits of
    that layer have no effect, so it is dropped.
    """
    path = study.config.masks
    if path.endswith(".npz"):
        by_module = _read_npz(study, path)
    else:
        by_module = {
            module: masks.read_pth(path.format(module=module), width, domains=len(study.names))
            for module, (_, width) in study.shapes.items()
        }
        layers = study.shapes["vision"][0]
        if by_module["vision"].shape[1] == layers + 1:
            by_module["vision"] = by_module["vision"][:, :layers]
    for module, mask in by_module.items():
        if mask.shape[1:] != study.shapes[module]:
            raise ValueError(
                f"{path}: {module} has (layers, neurons) {mask.shape[1:]}, but the model has "
                f"{study.shapes[module]}"
            )
    return {module: from_mask(mask) for module, mask in by_module.items()}


def _read_npz(study: Study, path: str) -> dict[str, np.ndarray]:
    stored = masks.load(path)
    if set(stored.domains) != set(study.names):
        raise ValueError(f"{path} has the domains {list(stored.domains)}, not {list(study.names)}")
    order = [stored.domains.index(name) for name in study.names]
    missing = [MODULES[m].name for m in study.shapes if MODULES[m].name not in stored.modules]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; it has {', '.join(stored.modules)}")
    return {module: stored.modules[MODULES[module].name][order] for module in study.shapes}


def write(study: Study, neurons: Mapping[str, SelectedNeurons], name: str = "masks") -> None:
    """Write `NAME.npz`, and `NAME/MODULE.pth` for MMNeuron's code."""
    by_site = {MODULES[module].name: selected.mask for module, selected in neurons.items()}
    masks.save(study.workdir / f"{name}.npz", by_site, study.names)
    for module, selected in neurons.items():
        masks.write_pth(study.workdir / name / f"{module}.pth", selected.mask)


def describe(study: Study, selected: SelectedNeurons) -> dict[str, Any]:
    """Return the entry of results.json on the neurons of a module."""
    layers = domain_neurons.per_layer(selected)
    counts = domain_neurons.domains_per_neuron(selected)
    return {
        "k": selected.k,
        "threshold": _plain(selected.threshold),
        "bar": _plain(selected.bar),
        "selected": int(selected.selected.sum()),
        "share": float(selected.selected.mean()),
        "neurons_per_domain": {n: int(layers[d].sum()) for d, n in enumerate(study.names)},
        "domains_per_neuron": {str(n): int(c) for n, c in enumerate(counts)},
        "per_layer": {n: layers[d].tolist() for d, n in enumerate(study.names)},
        "overlap": domain_neurons.overlap(selected).tolist(),
    }


def _plain(value: float | np.ndarray) -> float | list[float] | None:
    """Return a JSON value; None if a mask from a file does not determine it."""
    return None if np.isnan(value).any() else np.asarray(value).tolist()
