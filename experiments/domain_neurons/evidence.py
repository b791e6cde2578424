"""Gather evidence on the selected neurons for readers: tokens, words, values and effects."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

import mllm_jax as mj
from experiments.domain_neurons import robustness, selection, single_effects
from experiments.domain_neurons.context import Study
from experiments.modules import MODULES
from mllm_jax import store
from mllm_jax import tokens as tok
from mllm_jax.analysis.domain_neurons import SelectedNeurons
from mllm_jax.batch import Batch
from mllm_jax.interventions.captures import TOKEN_KINDS, Capture
from mllm_jax.sharding import mesh

TOP = 8  # tokens of a neuron that are shown
WORDS = 10  # words that its output promotes, and as many that it suppresses
CONTEXT = 6  # tokens shown before a token of text
PLACE = ("value", "example", "token", "tile", "row", "column")
Arrays = dict[str, np.ndarray]


class Units(NamedTuple):
    """The neurons of a module on which evidence is gathered, in order of layer and index.

    Attributes:
      layer: int64[n].
      unit: int64[n], their indices in the layer.
    """

    layer: np.ndarray
    unit: np.ndarray


def gather(
    study: Study, neurons: Mapping[str, SelectedNeurons], counted: selection.Counted
) -> dict[str, Any]:
    """Return the evidence on selected neurons, and write the pictures that it names.

    Args:
      study: The study. `evidence_neurons` of its config is the largest number of neurons of a
        domain and module, `evidence_per_domain` that of pictures of a domain.
      neurons: The selected neurons by module.
      counted: The counts for their tests; empty if the neurons come from a file.

    Returns:
      The entry of results.json: `edges` of the histograms, `pictures`, and `neurons`; empty if
      there are no neurons to show.
    """
    units = {
        module: choose(selected, study.config.evidence_neurons)
        for module, selected in neurons.items()
    }
    units = {module: of for module, of in units.items() if len(of.layer)}
    if not units:
        return {}
    shown = _Shown(study)

    def make() -> dict[str, Any]:
        by_domain = {name: _read_domain(study, name, units) for name in study.names}
        rows = [
            row
            for module, of in units.items()
            for row in _rows(study, module, of, neurons[module], by_domain, shown)
        ]
        edges = next(iter(by_domain.values()))["edges"]
        return {"edges": edges.tolist(), "pictures": shown.pictures, "neurons": rows}

    found = study.workdir.json("evidence", make)
    for picture in found["pictures"]:
        tile = study.processor.tile_picture(
            shown.batch(picture["domain"], picture["example"]), picture["tile"]
        )
        store.save_figure(study.workdir, picture["image"].removeprefix("figures/"), tile)
    exact = single_effects.measure(study, found["neurons"])
    tested = units if counted else ()
    tests = {module: robustness.shuffle_test(study, counted, module) for module in tested}
    rows = [
        row | {"exact": of, "p": _p_value(row, tests.get(row["module"]))}
        for row, of in zip(found["neurons"], exact, strict=True)
    ]
    return found | {"neurons": rows}


def _p_value(row: Mapping[str, Any], test: robustness.Shuffled | None) -> float | None:
    """Return the p-value of a neuron's entropy; None if it was not tested."""
    return None if test is None else float(test.p_values[row["layer"], row["index"]])


def choose(selected: SelectedNeurons, count: int) -> Units:
    """Return the neurons of lowest entropy of each domain; ties go to those active most often."""
    chosen = np.zeros(selected.selected.shape, bool)
    probability = np.broadcast_to(selected.probability, selected.mask.shape)
    for mask, of_domain in zip(selected.mask, probability, strict=True):
        layer, index = np.nonzero(mask)
        entropy, rate = (np.nan_to_num(a[layer, index]) for a in (selected.entropy, of_domain))
        best = np.lexsort((-rate, entropy))[:count]
        chosen[layer[best], index[best]] = True
    return Units(*np.nonzero(chosen))


def _captures(module: str) -> dict[str, Capture]:
    """Return the captures of a module: its strongest tokens by kind, its values, its rates."""
    site = MODULES[module]
    kinds = site.entry(TOKEN_KINDS)
    # The Q-Former tokenises the question itself; the batch does not contain these tokens as text.
    text = [k for k in kinds if k in tok.TEXT and k != "answer"] if module == "lm" else []
    selectors = {kind: getattr(tok, kind) for kind in ("image", "query") if kind in kinds}
    if text:
        selectors["text"] = selection.tokens_of(text)
    tops = {f"{module} {name}": mj.top(site, k=TOP, where=s) for name, s in selectors.items()}
    counted = tuple(kind for kind in kinds if kind != "answer")
    return tops | {
        f"{module} values": mj.histogram(site),
        f"{module} rates": mj.stats(site, by=counted),
    }


def _read_domain(study: Study, name: str, units: Mapping[str, Units]) -> Arrays:
    """Return the captures of the chosen neurons on the pictures of a domain."""

    def make() -> Arrays:
        captures = {k: c for module in units for k, c in _captures(module).items()}
        questions = study.evidence(name)
        total = mj.reduce(captures, study.model, questions, study.edits, label=f"evidence, {name}")
        arrays: Arrays = {}
        for key, result in total.items():
            layer, index = units[key.split()[0]]
            if key.endswith(" values"):
                arrays |= {key: result.counts[layer, index], "edges": result.edges}
            elif key.endswith(" rates"):
                arrays |= {f"{key} positive": result.positive[layer, index]}
                arrays |= {f"{key} tokens": result.tokens[0], f"{key} kinds": result.kinds}
            else:
                arrays |= {f"{key} {part}": getattr(result, part)[layer, index] for part in PLACE}
        if study.config.evidence_effects:
            questions = study.evidence(name, "released")  # neutral prompts have no answers
            gradients = selection.attribute_batch(study, questions, 0)
            rows = len(questions.rows(0))
            arrays |= {f"{m} effect": -gradients[m][of] / rows for m, of in units.items()}
        return {key: np.asarray(value) for key, value in arrays.items()}

    return study.workdir.arrays(f"evidence/{name}", make)


class _Shown:
    """The pictures in the evidence, without duplicates, and the texts of their questions."""

    def __init__(self, study: Study):
        self.study = study
        self.pairs = {name: study.evidence(name).pairs for name in study.names}
        self.pictures: list[dict[str, Any]] = []
        self._numbers: dict[tuple[str, int, int], int] = {}
        self.batch = functools.cache(self._batch)
        self._maps = functools.cache(lambda d, e: study.model.token_maps(self.batch(d, e)))

    def _batch(self, domain: str, example: int) -> Batch:
        one, question = self.pairs[domain][example]
        return self.study.processor([one.image], [question.prompt])

    def picture(self, domain: str, example: int, tile: int) -> int:
        """Return the number of a tile in `pictures`."""
        key = domain, example, tile
        if key not in self._numbers:
            number = self._numbers[key] = len(self.pictures)
            one, question = self.pairs[domain][example]
            self.pictures.append(
                {"image": f"figures/evidence-{number}.jpg", "domain": domain, "example": example,
                 "tile": tile, "id": one.id, "question": question.prompt}
            )  # fmt: skip
        return self._numbers[key]

    def grid(self, module: str, domain: str, example: int, tile: int) -> tuple[int, int]:
        """Return the rows and columns of a module's tokens on a tile."""
        tokens = self._maps(domain, example)[MODULES[module].module]
        own = np.asarray(tokens.tile) == tile
        rows, columns = (np.asarray(a)[own].max() + 1 for a in (tokens.row, tokens.column))
        return int(rows), int(columns)

    def words(self, domain: str, example: int, token: int) -> dict[str, str]:
        """Return a token of the prompt as text, and the text before it."""
        batch = self.batch(domain, example)
        is_real = np.asarray(batch.valid)[0]
        ids, kinds = np.asarray(batch.ids)[0][is_real], np.asarray(batch.tokens.kind)[0][is_real]
        start = max(0, token - CONTEXT)
        before = [
            self.study.processor.word(ids[i])
            for i in range(start, token)
            if kinds[i] != tok.CODE["image"]
        ]
        return {"before": "".join(before), "word": self.study.processor.word(ids[token])}


def _rows(
    study: Study,
    module: str,
    units: Units,
    selected: SelectedNeurons,
    by_domain: Mapping[str, Arrays],
    shown: _Shown,
) -> list[dict[str, Any]]:
    """Return the evidence on each neuron of a module as plain JSON values."""
    words = _words(study, units) if module == "lm" else None
    known = [name for name in ("image", "query", "text") if f"{module} {name} value" in
             next(iter(by_domain.values()))]  # fmt: skip
    rows: list[dict[str, Any]] = []
    for n, (layer, index) in enumerate(zip(*units, strict=True)):
        entropy = float(selected.entropy[layer, index])
        rows.append(
            {
                "module": module,
                "layer": int(layer),
                "index": int(index),
                "domains": [
                    name for d, name in enumerate(study.names) if selected.mask[d, layer, index]
                ],
                "entropy": entropy if np.isfinite(entropy) else None,
                "rates": {d: _rates(arrays, module, n) for d, arrays in by_domain.items()},
                "values": {d: arrays[f"{module} values"][n].tolist()
                           for d, arrays in by_domain.items()},
                "top": {name: _strongest(module, name, n, by_domain, shown) for name in known},
                "words": words and words[n],
                "effects": {d: float(arrays[f"{module} effect"][n])
                            for d, arrays in by_domain.items() if f"{module} effect" in arrays},
            }
        )  # fmt: skip
    return rows


def _rates(arrays: Arrays, module: str, n: int) -> dict[str, float]:
    """Return the share of tokens on which a neuron is active: of all, and by kind of token."""
    positive, tokens = arrays[f"{module} rates positive"][n], arrays[f"{module} rates tokens"]
    kinds = arrays[f"{module} rates kinds"].tolist()
    by_kind = {
        kind: float(active / count)
        for kind, active, count in zip(kinds, positive, tokens, strict=True)
        if count
    }
    return {"all": float(positive.sum() / max(tokens.sum(), 1)), **by_kind}


def _strongest(
    module: str, name: str, n: int, by_domain: Mapping[str, Arrays], shown: _Shown
) -> list[dict[str, Any]]:
    """Return the strongest tokens of a neuron over all domains; ties go to earlier domains."""
    found = [
        (domain, *(arrays[f"{module} {name} {part}"][n, k] for part in PLACE))
        for domain, arrays in by_domain.items()
        for k in range(arrays[f"{module} {name} value"].shape[1])
        if arrays[f"{module} {name} example"][n, k] >= 0
    ]
    entries: list[dict[str, Any]] = []
    for domain, value, *place in sorted(found, key=lambda token: -token[1])[:TOP]:
        example, token, tile, row, column = map(int, place)
        entry: dict[str, Any] = {"value": float(value), "domain": domain}
        if name == "text":
            entry |= shown.words(domain, example, token)
        else:
            entry["picture"] = shown.picture(domain, example, max(tile, 0))
            if row >= 0:
                rows, columns = shown.grid(module, domain, example, tile)
                entry |= {"row": row, "column": column, "rows": rows, "columns": columns}
        entries.append(entry)
    return entries


def _words(study: Study, units: Units) -> list[dict[str, list[str]]]:
    """Return the words that the output of each neuron promotes and suppresses most.

    The head reads the output weights of the neuron as if they were the whole residual; the effects
    of later layers are not included.
    """
    with mesh.use_mesh_of(study.model):
        every = mesh.gather_to_host(_through_head(study.model.lm, *units))
    words: list[dict[str, list[str]]] = []
    for logits in np.asarray(every):
        order = np.argsort(logits, kind="stable")
        raised, lowered = (
            [study.processor.word(i) for i in ids[:WORDS]] for ids in (order[::-1], order)
        )
        words.append({"raised": raised, "lowered": lowered})
    return words


@jax.jit
def _through_head(lm, layer, index):
    """Return float[n, V], the logits of the output weights of neurons."""
    return lm.lens(lm.layers.mlp.down.kernel[...][layer, index])
