"""The steps of the domain-neuron study, in order; see `experiments/domain_neurons/__main__.py`."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections
import numpy as np

import mllm_jax as mj
from experiments import examples
from experiments.domain_neurons import (
    ablation,
    claims,
    controls,
    counts,
    evidence,
    layers,
    pictures,
    robustness,
    selection,
)
from experiments.domain_neurons.context import PROMPTS, Study
from experiments.domain_neurons.report import page
from experiments.modules import MODULES
from mllm_jax import store
from mllm_jax.analysis.domain_neurons import SelectedNeurons
from mllm_jax.data import domains, near_copies
from mllm_jax.interventions.captures import Capture
from mllm_jax.interventions.edits import Edits


def run(
    config: ml_collections.ConfigDict,
    workdir: store.Workdir,
    edits: Edits | None = None,
    captures: dict[str, Capture] | None = None,
) -> None:
    """Run the study.

    Args:
      config: Its settings, see configs/embedded.py.
      workdir: The folder of its steps and results.
      edits: Edits of every pass.
      captures: Captures to read during the count.
    """
    selection.check(config)
    ablation.check(config)
    layers.check(config)
    train, test = (examples.domains_of(config, split) for split in ("train", "test"))
    domains.require_domains(train)
    if config.get("paths"):
        test = _without_near_copies(config, train, test)
    lens = examples.domains_of(config, "lens") if config.get("vqa") else test
    model, processor = mj.load(config.model, max_pixels=config.get("max_pixels"))
    study = Study(
        config=config, workdir=workdir, model=model, processor=processor, edits=edits or Edits(),
        captures=captures or {}, train=train, test=test, lens=lens,
    )  # fmt: skip
    study.claim(study.content())
    for warning in study.too_small():
        logging.getLogger(__name__).warning(warning)
    for module in config.modules:
        ablation.ablated_modules(study, module)  # refuse an unknown module before the count

    given = selection.read(study) if config.masks else None  # refuse wrong files before the count
    counted: selection.Counted = {}
    if given is None or config.controls:
        # Neurons from a file are not selected again by the other prompts.
        prompts = PROMPTS if given is None else (selection.rule(config).prompts,)
        counted = {p: {name: counts.count(study, name, p) for name in train} for p in prompts}
    active = controls.activities(study, counted) if counted else {}
    if given is not None:
        neurons, counted = given, {}
    else:
        neurons = selection.select(study, counted, selection.rule(config))
    selection.write(study, neurons)
    tested = robustness.tested(study, counted) if counted else {}
    if tested:
        selection.write(study, tested, "masks_tested")
    elif config.ablate == "tested":
        raise ValueError(
            "config.ablate='tested': there are too few groups of pictures, or shuffles, to test "
            "the neurons; raise config.groups, config.train_per_domain or config.shuffles"
        )
    ablated = tested if config.ablate == "tested" else neurons
    drawn = controls.draw(study, ablated, active)
    results: dict[str, Any] = {}
    for found in _results(study, counted, neurons, ablated, drawn):
        results |= found
        study.preview(results, page.preview)
    study.finish(results | {"claims": claims.judge(results)}, page.write, seed=config.seed)
    print(f"finished: {workdir / 'index.html'}")


def _without_near_copies(
    config: ml_collections.ConfigDict,
    train: Mapping[str, domains.Domain],
    test: Mapping[str, domains.Domain],
) -> dict[str, domains.Domain]:
    """Return the test split without near-duplicates of pictures that are counted."""
    count = max(config.test_per_domain, config.lens_per_domain)
    return {
        name: near_copies.leave_out(
            domain, itertools.islice(train[name], config.train_per_domain), count
        )
        for name, domain in test.items()
    }


def _results(
    study: Study,
    counted: selection.Counted,
    neurons: Mapping[str, SelectedNeurons],
    ablated: Mapping[str, SelectedNeurons],
    drawn: controls.Controls,
) -> Iterator[dict[str, Any]]:
    """Yield the entries of results.json, those of one step at a time, the fastest first.

    `counted` is empty if the neurons come from a file.
    """
    config = study.config
    modules = study.shapes if counted else ()
    yield {
        "study": "domain_neurons",
        "model": config.model,
        "domains": list(study.names),
        "compat": config.compat,
        "selector": "given" if config.masks else config.selector,
        "modules": {
            module: {"site": MODULES[module].name, "layers": shape[0], "width": shape[1]}
            for module, shape in study.shapes.items()
        },
        "tokens": {module: _tokens(counted[config.prompts], module) for module in modules},
        "selection": {m: selection.describe(study, selected) for m, selected in neurons.items()},
        "stability": {m: robustness.stability(study, counted, m) for m in modules},
        "released": robustness.released(study, counted, neurons) if counted else {},
        "ablated": config.ablate,
        "controls": drawn.rows,
        "pictures": pictures.pictures(study),
    }
    lens = layers.read(study)
    yield {
        "lens": layers.curves(lens),
        "lens_top": layers.curves(lens, "top"),
        "lens_sites": {site: layers.curves(lens, f"{site}/sums") for site in config.lens_sites},
        "lens_words": layers.words(study, lens),
        "sparsity": layers.sparsity(lens),
        "stages": layers.staged(lens, neurons["lm"], *_resampled(study, counted)),
        "features": layers.features(lens),
    }
    yield {"comparison": robustness.compare(study, counted, neurons) if counted else {}}
    yield {"evidence": evidence.gather(study, neurons, counted)}
    yield ablation.ablate(study, ablated, drawn)._asdict()


def _resampled(study: Study, counted: selection.Counted) -> tuple[np.ndarray | None, int]:
    """Return the neurons by layer of resampled groups of pictures, and the number of groups."""
    if not counted or study.config.selector != "entropy":
        return None, 0
    resampled = robustness.resample(study, counted, "lm")
    return (None, 0) if resampled is None else (resampled.per_layer, len(resampled.domain))


def _tokens(counted: selection.DomainCounts, module: str) -> dict[str, int]:
    """Return the number of counted tokens of each domain."""
    return {name: int(arrays[f"{module}/tokens"].sum()) for name, arrays in counted.items()}
