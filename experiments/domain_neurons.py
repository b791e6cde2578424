"""Domain-specific neurons of a multimodal LLM, whole (MMNeuron, Huo et al., EMNLP 2024).

    python -m experiments.domain_neurons --config=configs/embedded.py --workdir=DIR

`--edits` change the model that is studied; `--captures` (statistics, entropies) are read while
activations are counted, into `captures/DOMAIN.npz`.

One pass per batch counts activations of the vision tower, the projector and the LLM in every
domain; the entropy over domains selects neurons; each domain's neurons are switched off on each
domain's questions, beside random neurons as many per layer; the logit lens follows image and text
tokens through the layers and tests the three-stage hypothesis.

Leaves in the workdir: `results.json`, `tables/*.csv`, `figures/*.png`, `index.html`,
`manifest.json`. A killed run continues and ends with the same bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterator
from typing import Any

import numpy as np
import tqdm

import mllm_jax as mj
from experiments import study
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax import workdir as workdir_
from mllm_jax.analysis import deviation, domain_neurons, intervals, logit_lens, stages
from mllm_jax.data import batching, domains
from mllm_jax.evaluation import score
from mllm_jax.interventions.captures import Capture
from mllm_jax.interventions.edits import Edits
from mllm_jax.report import domain_neurons as page

SITES = {"vision": S.vision.mlp.act, "projector": S.projector.act, "lm": S.lm.mlp.act}
LAST = S.lm.resid_post[-1]
DEVIATION_KINDS = ("image", "question", "system")
LENS_KINDS = ("image", "question")


@dataclasses.dataclass(frozen=True)
class Study:
    """What every step reads: the config, the folder, the model, and the pictures by domain."""

    config: Any
    workdir: workdir_.Workdir
    model: Any
    processor: Any
    train: dict[str, list]
    test: dict[str, list]
    edits: Edits | None = None
    captures: dict[str, Capture] = dataclasses.field(default_factory=dict)

    def asked(self, examples: list) -> batching.Asked:
        """One question a picture, the styles of the config in turn."""
        pairs = batching.ask(examples, self.config.styles)
        return batching.Asked(self.processor, pairs, self.config.batch_size, self.length)

    @functools.cached_property
    def length(self) -> int:
        every = [e for half in (self.train, self.test) for some in half.values() for e in some]
        return batching.row_length(self.processor, batching.ask(every, self.config.styles))


def run(config, workdir: workdir_.Workdir, edits=None, captures=None) -> None:
    model, processor = mj.load(config.model)
    train = _first(study.domains_of(config, "train"), config.train_per_domain)
    test = _first(study.domains_of(config, "test"), config.test_per_domain)
    domains.require_domains(train)
    this = Study(config, workdir, model, processor, train, test, edits, captures or {})

    counts = {name: count(this, name) for name in train}
    found = {module: select(this, counts, module) for module in SITES}
    baseline, ablation = ablate(this, found)
    curves, stage = lens(this)
    results = {
        "study": "domain_neurons",
        "model": config.model,
        "domains": list(train),
        "modules": {m: _module(m, f) for m, f in found.items()},
        "tokens": {m: {d: int(counts[d][f"{m}/tokens"].sum()) for d in train} for m in SITES},
        "selection": {m: _selection(f, list(train)) for m, f in found.items()},
        "baseline": baseline,
        "ablation": ablation,
        "lens": curves,
        "stages": stage,
        "pictures": [picture(this, i, name) for i, name in enumerate(test)],
    } | study.named(workdir)
    workdir_.atomic_json(workdir / "results.json", results)
    page.write(workdir.path, results)
    data = [e.encoded for some in (*train.values(), *test.values()) for e in some]
    workdir_.manifest(
        workdir,
        model=workdir_.fingerprint(model),
        data=workdir_.fingerprint([np.frombuffer(encoded, np.uint8) for encoded in data]),
        seed=config.seed,
    )
    print(f"finished: {workdir / 'index.html'}")


def _first(found: dict[str, Any], count: int) -> dict[str, list]:
    return {
        name: [domain[i] for i in range(min(count, len(domain)))] for name, domain in found.items()
    }


def count(this: Study, name: str) -> dict[str, np.ndarray]:
    """Activation counts of one domain, by module and kind of token (facts of A.2.1)."""

    def make():
        captures = {f"neurons.{m}": mj.stats(site, by=tok.kind) for m, site in SITES.items()}
        total = mj.reduce(
            captures | this.captures, this.model, this.asked(this.train[name]), this.edits,
            save=this.workdir / "steps" / f"counting-{name}.npz", label=f"count, {name}",
        )  # fmt: skip
        if this.captures:
            brought = {key: total[key] for key in this.captures}
            study.write_captures(this.workdir / "captures" / f"{name}.npz", brought)
        arrays = {}
        for module in SITES:
            stats = total[f"neurons.{module}"]
            arrays[f"{module}/positive"] = stats.positive
            arrays[f"{module}/tokens"] = stats.tokens[0]
            arrays[f"{module}/kinds"] = np.array(stats.kinds)
        return arrays

    return this.workdir.arrays(f"counts-{name}", make)


def select(this: Study, counts: dict, module: str) -> domain_neurons.Found:
    """The neurons of one module, from the counts of all domains over the tokens of the scope."""

    def of(domain, what):
        kinds = counts[domain][f"{module}/kinds"]
        scope = set(tok.KINDS) if this.config.scope == "all" else {this.config.scope, "cls"}
        chosen = [kind in scope for kind in kinds]
        return counts[domain][f"{module}/{what}"][..., chosen].sum(-1)

    positive = np.stack([of(domain, "positive") for domain in counts])
    tokens = np.stack([of(domain, "tokens") for domain in counts])
    return domain_neurons.select(
        positive, tokens, top_rate=this.config.top_rate, filter_rate=this.config.filter_rate,
        bar_rate=this.config.bar_rate, names=tuple(counts),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cell:
    """One ablation: whose neurons of which module, on whose questions; or a random control."""

    module: str
    mask: str
    data: str
    control: int | None

    @property
    def name(self) -> str:
        kind = "selected" if self.control is None else f"random{self.control}"
        return f"ablation/{self.data}/{self.module}-{self.mask}-{kind}"


def ablate(this: Study, found: dict[str, domain_neurons.Found]) -> tuple[dict, list]:
    """Accuracy and hidden-state deviation of every ablation (A.2.3, A.2.4)."""
    names = list(this.test)
    cells = list(_cells(this.config, names))
    random = {
        (module, seed): domain_neurons.random_like(f, seed)
        for module, f in found.items()
        for seed in range(this.config.controls)
    }

    def masks(cell: Cell) -> dict[str, np.ndarray]:
        modules = SITES if cell.module == "all" else (cell.module,)
        whose = names.index(cell.mask)
        every = {
            m: (found[m].mask if cell.control is None else random[m, cell.control])[whose]
            for m in modules
        }
        return {m: mask for m, mask in every.items() if mask.any()}

    baseline, rows = {}, []
    for name in names:
        measure = Measure(this, name)
        clean = this.workdir.arrays(f"ablation/{name}/clean", lambda m=measure: m({}))
        baseline[name] = _accuracy(clean) | {"chance": measure.chance}
        mine = [cell for cell in cells if cell.data == name]
        for cell in tqdm.tqdm(mine, desc=f"ablate, {name}", leave=False):
            edited = this.workdir.arrays(cell.name, lambda c=cell, m=measure: m(masks(c)))
            rows.append(_row(cell, clean, edited, sum(int(m.sum()) for m in masks(cell).values())))
    return baseline, rows


def _cells(config, names: list[str]) -> Iterator[Cell]:
    """Every mask on every domain; controls where a domain meets its own mask."""
    for data in names:
        for module in config.modules:
            for mask in names:
                yield Cell(module, mask, data, None)
            for seed in range(config.controls):
                yield Cell(module, data, data, seed)


class Measure:
    """Accuracy and deviation on the questions of one domain. Clean states are kept by batch."""

    def __init__(self, this: Study, name: str):
        self.this = this
        self.asked = this.asked(this.test[name])
        options = [q.options for _, q in self.asked.pairs]
        longest = max(len(this.processor.answer_ids(o)) for some in options for o in some)
        self.answers = -(-longest // 4) * 4
        self.chance = float(np.mean([1 / len(some) for some in options]))

    @functools.cached_property
    def clean(self) -> list[tuple[Any, Any, Any, Any]]:
        """(batch, vision features, candidates, last residual) of each batch, without an edit."""
        kept = []
        for i in range(len(self.asked)):
            batch = self.asked[i]
            features = study.with_features(self.this.model, batch, self.this.edits).features
            ids = score.candidate_ids(
                self.this.processor, self.asked.candidates(i), len(batch.ids), length=self.answers
            )
            # By the program that measures the edits, so that no edit is no deviation.
            out = self._score(batch.replace(features=features), ids, Edits())
            kept.append((batch, features, ids, out.captures["last"]))
        return kept

    def _score(self, batch, ids, edits: Edits) -> score.Scores:
        edits = (self.this.edits or Edits()) >> edits
        return score.score_with(self.this.model, batch, ids, edits, {"last": mj.keep(LAST)})

    def __call__(self, masks: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Of one edit: bool[N] right, and deviation sums by kind and example."""
        edits = _compose(masks)
        right, sums = [], []
        for i, (batch, features, ids, last) in enumerate(self.clean):
            if "vision" not in masks:  # the tower's features are what they were
                batch = batch.replace(features=features)
            rows = len(self.asked.rows(i))
            out = self._score(batch, ids, edits)
            right.append(np.asarray(out.values)[:rows].argmax(-1) == self.asked.right(i))
            sums.append(_deviation(last, out.captures["last"], batch, rows))
        total = deviation.join(sums)
        return {"right": np.concatenate(right), **total._asdict()}


def _compose(masks: dict[str, np.ndarray]) -> Edits:
    edits = [mj.ablate(SITES[module][mask]) for module, mask in masks.items()]
    return functools.reduce(operator.rshift, edits, Edits())


def _deviation(clean, edited, batch, rows: int) -> deviation.Sums:
    weight = np.stack([np.asarray(getattr(tok, k).mask(batch.tokens)) for k in DEVIATION_KINDS])
    return deviation.sums(clean[:rows], edited[:rows], weight[:, :rows])


def _accuracy(arrays: dict[str, np.ndarray]) -> dict[str, float]:
    value, low, high = intervals.mean(arrays["right"].astype(float))
    return {
        "accuracy": float(value), "low": float(low), "high": float(high), "n": len(arrays["right"]),
    }  # fmt: skip


def _row(cell: Cell, clean: dict, edited: dict, neurons: int) -> dict[str, Any]:
    change = intervals.paired_difference(clean["right"], edited["right"])
    moved = deviation.finish(
        deviation.Sums(edited["relative_l2"], edited["cosine"], edited["tokens"])
    )
    return {
        **dataclasses.asdict(cell),
        "neurons": neurons,
        "accuracy": float(edited["right"].mean()),
        "difference": float(change.value),
        "low": float(change.low),
        "high": float(change.high),
        "deviation": {
            kind: {"relative_l2": float(l2), "cosine": float(cosine)}
            for kind, l2, cosine in zip(
                DEVIATION_KINDS, moved.relative_l2, moved.cosine, strict=True
            )
        },
    }


def lens(this: Study) -> tuple[dict, dict]:
    """Entropy of the logit lens by layer and kind, and the stages of the image tokens' curve."""

    def one(asked, number):
        """Of each picture of a batch, which a bootstrap draws from: [pictures, L, kinds]."""
        out = mj.run(
            this.model, asked[number], this.edits,
            {"lens": mj.lens(S.lm.resid_post, by=LENS_KINDS)}, logits="none",
        )["lens"]  # fmt: skip
        kinds = [out.kinds.index(kind) for kind in LENS_KINDS]
        real = slice(0, len(asked.rows(number)))  # the last batch is filled up with empty rows
        sums, top = (np.moveaxis(a, 0, 1)[real][..., kinds] for a in (out.sum, out.top))
        return {"sums": sums, "top": top, "tokens": np.asarray(out.tokens)[0, real][:, kinds]}

    def make(name):
        asked = this.asked(this.test[name][: this.config.lens_per_domain])
        parts = [
            this.workdir.arrays(f"lens/{name}-{i}", functools.partial(one, asked, i))
            for i in tqdm.tqdm(range(len(asked)), desc=f"lens, {name}", leave=False)
        ]
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    found = {
        name: this.workdir.arrays(f"lens-{name}", functools.partial(make, name))
        for name in this.test
    }
    curves = {name: _curves(arrays) for name, arrays in found.items()}
    image = LENS_KINDS.index("image")
    by_domain = {
        name: _stages(arrays["sums"][..., image], arrays["tokens"][..., image])
        for name, arrays in found.items()
    }
    sums = np.concatenate([arrays["sums"][..., image] for arrays in found.values()])
    counts = np.concatenate([arrays["tokens"][..., image] for arrays in found.values()])
    stage = {"rule": stages.RULE, "by_domain": by_domain, "all": _stages(sums, counts)}
    return curves, stage


def _curves(arrays: dict[str, np.ndarray]) -> dict[str, dict[str, list[float]]]:
    curve = logit_lens.entropy_curve(arrays["sums"], arrays["tokens"])
    return {
        kind: {
            "mean": curve.value[:, k].tolist(),
            "low": curve.low[:, k].tolist(),
            "high": curve.high[:, k].tolist(),
        }
        for k, kind in enumerate(LENS_KINDS)
    }


def _stages(sums: np.ndarray, tokens: np.ndarray) -> dict[str, Any]:
    found = stages.find(sums, tokens)

    def plain(pair):
        return None if pair is None else [int(value) for value in pair]

    return {
        "boundaries": plain(found.boundaries),
        "low": plain(found.low),
        "high": plain(found.high),
        "verdict": found.verdict,
    }


def picture(this: Study, number: int, name: str) -> dict[str, Any]:
    """One picture of a domain: what each image token says through the lens, at a few layers."""
    example = this.test[name][0]
    image = workdir_.relative_picture(this.workdir, f"picture-{number}.png", example.image)

    def make():
        question = batching.ask([example], ("category",))[0][1]
        batch = this.processor([example.image], [question.prompt])
        layers = np.linspace(0, this.model.config.lm.layers - 1, this.config.picture_layers)
        layers = [int(layer) for layer in layers.round()]
        capture = mj.lens(S.lm.resid_post[layers], k=1, where=tok.image)
        found = mj.run(this.model, batch, this.edits, {"lens": capture}, logits="none")["lens"]
        seen = batch.tokens
        at = np.flatnonzero((seen.tile[0] == 0) & (seen.row[0] >= 0))  # the whole, not its parts
        side = round(len(at) ** 0.5)
        ids = np.asarray(found.ids)[:, 0, at, 0].reshape(len(layers), side, side)
        entropy = np.asarray(found.entropy)[:, 0, at].reshape(len(layers), side, side)
        said = mj.generate(this.model, batch, this.edits, max_new_tokens=12, stop=True).text[0]
        return {
            "domain": name,
            "id": example.id,
            "question": question.prompt,
            "answer": question.answer,
            "generated": said,
            "layers": layers,
            "words": [[[this.processor.word(i) for i in row] for row in grid] for grid in ids],
            "entropy": entropy.astype(float).tolist(),
        }

    return this.workdir.json(f"picture-{name}", make) | {"image": image}


def _module(module: str, found: domain_neurons.Found) -> dict[str, Any]:
    layers, width = found.entropy.shape
    return {"site": SITES[module].name, "layers": layers, "width": width}


def _selection(found: domain_neurons.Found, names: list[str]) -> dict[str, Any]:
    layers = domain_neurons.per_layer(found)
    how_many = domain_neurons.domains_per_neuron(found)
    return {
        "k": found.k,
        "threshold": found.threshold,
        "bar": found.bar,
        "selected": int(found.selected.sum()),
        "share": float(found.selected.mean()),
        "neurons_per_domain": {n: int(layers[d].sum()) for d, n in enumerate(names)},
        "domains_per_neuron": {str(n): int(c) for n, c in enumerate(how_many)},
        "per_layer": {n: layers[d].tolist() for d, n in enumerate(names)},
        "overlap": domain_neurons.overlap(found).tolist(),
    }


if __name__ == "__main__":
    study.main(run, takes=("edits", "captures"))
