"""Domain-specific neurons of a multimodal LLM, whole (MMNeuron, Huo et al., EMNLP 2024).

    python -m experiments.domain_neurons --config=configs/embedded.py --workdir=DIR

`--edits` change the model that is studied; `--captures` (statistics, entropies) are read while
activations are counted, into `captures/DOMAIN.npz`.

One pass per batch counts activations of the vision tower, the projector (or the Q-Former) and the
LLM in every domain; the entropy over domains selects neurons, or another selector does, or they
come from a file (`config.masks`); each domain's neurons are switched off on each domain's
questions, beside random neurons as many per layer; the logit lens follows image and text tokens
through the layers and tests the three-stage hypothesis. `config.compat="official"` does what the
released code does, see docs/official.md.

Leaves in the workdir: `results.json`, `tables/*.csv`, `figures/*.png`, `index.html`,
`manifest.json`, and the neurons as `masks.npz` and `masks/MODULE.pth`. A killed run continues and
ends with the same bytes. The parts of it are in `experiments/neurons`.
"""

from __future__ import annotations

from experiments import command

if __name__ == "__main__":  # before the long imports
    command.main("experiments.domain_neurons", takes=("edits", "captures"), rows={"batch_size": 1})

import mllm_jax as mj
from experiments import study
from experiments.neurons import ablation, counts, evidence, layers, selection
from experiments.neurons.base import MODULES, Study
from mllm_jax import store
from mllm_jax.data import domains
from mllm_jax.report import domain_neurons as page


def run(config, workdir: store.Workdir, edits=None, captures=None) -> None:
    selection.check(config)
    ablation.check(config)
    train, test = (study.domains_of(config, split) for split in ("train", "test"))
    domains.require_domains(train)
    lens = study.domains_of(config, "lens") if config.get("vqa") else test
    model, processor = mj.load(config.model)
    this = Study(config, workdir, model, processor, train, test, lens, edits, captures or {})
    study.claim(workdir, config, model, processor, this.content())
    for module in config.modules:
        ablation.cut(this, module)  # one that the model lacks is said before anything is counted

    counted, found = {}, selection.read(this) if config.masks else {}
    if not found:
        counted = {name: counts.count(this, name) for name in train}
        found = selection.select(this, counted, selection.rule(config))
    selection.write(this, found)
    baseline, cells, against = ablation.ablate(this, found)
    read = layers.read(this)
    results = {
        "study": "domain_neurons",
        "model": config.model,
        "domains": list(train),
        "compat": config.compat,
        "selector": "given" if config.masks else config.selector,
        "modules": {
            module: {"site": MODULES[module].name, "layers": shape[0], "width": shape[1]}
            for module, shape in this.shapes.items()
        },
        "tokens": {
            module: {
                name: int(arrays[f"{module}/tokens"].sum()) for name, arrays in counted.items()
            }
            for module in (this.shapes if counted else ())
        },
        "selection": {module: selection.describe(this, f) for module, f in found.items()},
        "steadiness": {
            module: evidence.steadiness(this, counted, module)
            for module in (this.shapes if counted else ())
        },
        "comparison": evidence.compare(this, counted, found) if counted else {},
        "baseline": baseline,
        "ablation": cells,
        "against_random": against,
        "lens": layers.curves(read),
        "stages": layers.staged(read, found["lm"]),
        "features": layers.features(read),
        "pictures": layers.pictures(this),
    } | study.named(workdir)
    store.atomic_json(workdir / "results.json", results)
    page.write(workdir.path, results)
    store.write_manifest(workdir, seed=config.seed)
    print(f"finished: {workdir / 'index.html'}")
