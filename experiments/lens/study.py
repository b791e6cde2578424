"""The steps of the lens study; see `experiments/lens/__main__.py`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
import tqdm

import mllm_jax as mj
from experiments import context, examples
from experiments.lens import nearest, page
from experiments.lens.context import KINDS, SEEN, Arrays, Study
from mllm_jax import sites as S
from mllm_jax import store
from mllm_jax import tokens as tok
from mllm_jax.analysis import intervals
from mllm_jax.data import batching
from mllm_jax.interventions.edits import Edits
from mllm_jax.training import jacobian_lens, lenses, tuned_lens
from mllm_jax.training.lenses import AffineLens
from mllm_jax.typing import Float

MEASURES = ("kl", "entropy", "agrees")
PADDING = 64  # states are compared in multiples of this number, so that few programs compile


def run(
    config: ml_collections.ConfigDict, workdir: store.Workdir, edits: Edits | None = None
) -> None:
    """Run the study.

    Args:
      config: Its settings, see configs/embedded_lens.py.
      workdir: The folder of its steps and results.
      edits: Edits of every pass.
    """
    model, processor = mj.load(config.model)
    base = context.Context(
        config=config, workdir=workdir, model=model, processor=processor, edits=edits or Edits()
    )
    layers = _layers(config, model.config.lm.layers)
    pairs = {
        split: batching.ask(examples.examples_of(config, name, count), config.styles)
        for split, name, count in (
            ("train", "train", config.train_per_domain),
            ("jacobian", "train", config.jacobian_per_domain),
            ("test", "test", config.test_per_domain),
        )
    }
    length = batching.row_length(processor, [pair for part in pairs.values() for pair in part])
    sizes = dict.fromkeys(pairs, config.batch_size) | {"jacobian": config.jacobian_batch_size}
    questions = {
        split: batching.QuestionBatches(processor, part, sizes[split], length)
        for split, part in pairs.items()
    }
    study = Study(**vars(base), layers=layers, questions=questions)
    study.claim({split: context.content(part) for split, part in pairs.items()})
    trained = workdir.arrays("tuned", functools.partial(train, study))
    fitted: dict[str, AffineLens | None] = {"logit": None, "tuned": _lens(trained)}
    if pairs["jacobian"]:
        fitted["jacobian"] = _lens(average_jacobians(study))
    for name, lens in fitted.items():
        if lens is not None:
            store.atomic_npz(workdir / f"lens-{name}.npz", dataclasses.asdict(lens))
    measured = {name: measure(study, name, lens) for name, lens in fitted.items()}
    domains = [example.domain for example, _ in pairs["test"]]
    named = nearest.texts(pairs["train"], config.text_styles)
    results = {
        "study": "lens",
        "model": config.model,
        "layers": layers,
        "kinds": list(KINDS),
        "lenses": list(fitted),
        "pictures": {name: domains.count(name) for name in dict.fromkeys(domains)},
        "steps": config.steps,
        "jacobian_pictures": len(pairs["jacobian"]),
        "curves": curves(measured, domains, layers),
        "beyond_logit": beyond(measured, layers),
        "texts": [text for _, text in named],
        "nearest": nearest.measure(study, named, domains) if named else [],
        "words": [words(study, fitted, name) for name in dict.fromkeys(domains)],
    }
    losses = {f"layer {n}": trained["losses"][:, i] for i, n in enumerate(layers[:-1])}
    study.finish(
        results, lambda folder, content: page.write(folder, content, losses), seed=config.seed
    )
    print(f"finished: {workdir / 'index.html'}")


def _layers(config: ml_collections.ConfigDict, count: int) -> list[int]:
    """Return the layers of the config; all layers if it names none."""
    given = tuple(config.layers) or tuple(range(count))
    layers = lenses.require_layers("config.layers", given, count)
    if unknown := [layer for layer in config.word_layers if layer not in layers]:
        raise ValueError(f"config.word_layers: {unknown[0]} is not among config.layers")
    return layers


def _lens(arrays: Mapping[str, np.ndarray]) -> AffineLens:
    return AffineLens(arrays["weight"], arrays["bias"])


def train(study: Study) -> Arrays:
    """Train the tuned lens on the states of the training pictures, in random order.

    Returns:
      `weight` and `bias` of the lens; `losses`, float32[steps, L - 1].
    """
    config = study.config
    parts = [study.states("train", i)["states"] for i in study.numbers("train", "states")]
    states = np.concatenate(parts)
    if len(states) < config.tokens:
        raise ValueError(
            f"config.tokens={config.tokens}: the training pictures have only {len(states)} tokens"
        )

    def chunks() -> Iterator[Float[np.ndarray, "n L D"]]:
        random, order = np.random.default_rng(config.seed), np.zeros(0, int)
        for _ in tqdm.trange(config.steps, desc="tuned lens", leave=False):
            if len(order) < config.tokens:
                order = random.permutation(len(states))
            chosen, order = order[: config.tokens], order[config.tokens :]
            yield states[chosen]

    lens, losses = tuned_lens.fit(study.model, chunks(), rate=config.rate)
    return {"weight": np.asarray(lens.weight), "bias": np.asarray(lens.bias), "losses": losses}


def average_jacobians(study: Study) -> Arrays:
    """Return `weight` and `bias` of the Jacobian lens of the training pictures."""

    def read(number: int) -> Arrays:
        batch = study.batch("jacobian", number)
        found = jacobian_lens.jacobians(
            study.model, batch, study.layers, where=SEEN, edits=study.edits
        )
        return {"values": found.values, "rows": np.asarray(found.rows)}

    steps = (
        study.workdir.arrays(f"jacobian/{i}", functools.partial(read, i))
        for i in study.numbers("jacobian", "Jacobians")
    )
    lens = jacobian_lens.mean(
        jacobian_lens.Jacobians(step["values"], int(step["rows"])) for step in steps
    )
    return {"weight": np.asarray(lens.weight), "bias": np.asarray(lens.bias)}


def measure(study: Study, name: str, lens: AffineLens | None) -> Arrays:
    """Compare a lens with the model's own words on the test pictures.

    Returns:
      Each of MEASURES, float64[N, L, kinds], summed over the tokens of each of N pictures;
      `tokens`, int[N, kinds], their number.
    """

    def read(number: int) -> Arrays:
        found = study.states("test", number)
        shape = len(study.questions["test"].rows(number)), len(KINDS)
        at = found["row"], found["kind"]
        compared = _compare(study, found["states"], lens)
        totals: Arrays = {"tokens": np.zeros(shape, int)}
        np.add.at(totals["tokens"], at, 1)
        for key in MEASURES:
            total = np.zeros((*shape, len(study.layers)))
            np.add.at(total, at, getattr(compared, key).T)
            totals[key] = total.swapaxes(1, 2)
        return totals

    parts = [
        study.workdir.arrays(f"measured/{name}-{i}", functools.partial(read, i))
        for i in study.numbers("test", f"{name} lens")
    ]
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _compare(
    study: Study, states: Float[np.ndarray, "n L D"], lens: AffineLens | None
) -> lenses.Comparison:
    """Compare a lens in batches of a few fixed sizes."""
    count = len(states)
    padded = np.pad(states, ((0, -count % PADDING), (0, 0), (0, 0)), mode="edge")
    compared = lenses.compare(study.model, padded, lens)
    return lenses.Comparison(*(values[:, :count] for values in compared))


def curves(
    measured: Mapping[str, Arrays], domains: Sequence[str], layers: Sequence[int]
) -> list[dict[str, Any]]:
    """Return the mean per token by lens, measure, kind, domain and layer, with its interval.

    Args:
      measured: The results of `measure`, by lens.
      domains: The domain of each test picture; the rows of "all" are of all pictures together.
      layers: The layers of every lens.
    """
    of_domain = np.array(domains)
    chosen = {"all": np.ones(len(domains), bool)}
    chosen |= {name: of_domain == name for name in dict.fromkeys(domains)}
    return [
        {"lens": lens, "domain": domain, **row}
        for lens, arrays in measured.items()
        for domain, pictures in chosen.items()
        for row in _rows({key: values[pictures] for key, values in arrays.items()}, layers)
    ]


def beyond(measured: Mapping[str, Arrays], layers: Sequence[int]) -> list[dict[str, Any]]:
    """Return the difference of each other lens from the logit lens, over the same tokens."""
    logit = measured["logit"]
    return [
        {"lens": name, **row}
        for name, arrays in measured.items()
        if name != "logit"
        for row in _rows(arrays | {key: arrays[key] - logit[key] for key in MEASURES}, layers)
    ]


def _rows(arrays: Mapping[str, np.ndarray], layers: Sequence[int]) -> list[dict[str, Any]]:
    """Return the ratio of sums to tokens by measure, kind and layer."""
    rows: list[dict[str, Any]] = []
    for k, kind in enumerate(KINDS):
        tokens = arrays["tokens"][:, k]
        if not tokens.any():
            continue
        for key in MEASURES:
            found = intervals.ratio(arrays[key][..., k], tokens[:, None])
            rows += [
                {"measure": key, "kind": kind, "layer": layer, "value": float(value),
                 "low": float(low), "high": float(high), "pictures": int((tokens > 0).sum())}
                for layer, value, low, high in zip(layers, *found, strict=True)
            ]  # fmt: skip
    return rows


def words(study: Study, fitted: Mapping[str, AffineLens | None], name: str) -> dict[str, Any]:
    """Return the most probable word and the entropy of each lens at a picture's image tokens.

    Args:
      study: The study.
      fitted: The lenses.
      name: A domain, whose first test picture is read.

    Returns:
      `panels`, one for each lens and layer of `config.word_layers`: `words` and `entropy`
      [rows][columns]; empty if image tokens are not on a grid.
    """
    pairs = study.questions["test"].pairs
    example, question = next(pair for pair in pairs if pair[0].domain == name)
    batch = study.processor([example.image], [question.prompt])
    layout = study.processor.layout(example.image.size[::-1])
    grid, _ = layout.grids(batch.tokens)
    at = [study.layers.index(layer) for layer in study.config.word_layers]

    def read() -> dict[str, Any]:
        kept = {"x": mj.keep(S.lm.resid_post[study.layers], where=tok.image)}
        x = mj.run(study.model, batch, study.edits, kept, logits="none")["x"]
        states = np.moveaxis(np.asarray(x, np.float32)[:, 0, grid.reshape(-1)], 0, 1)
        panels = []
        for title, lens in fitted.items():
            compared = _compare(study, states, lens)
            for i in at:
                ids = compared.word[i].reshape(grid.shape)
                entropy = compared.entropy[i].reshape(grid.shape)
                panels.append({
                    "title": f"{title} lens, layer {study.layers[i]}",
                    "words": [[study.processor.word(word) for word in line] for line in ids],
                    "entropy": entropy.astype(float).tolist(),
                })  # fmt: skip
        return {"panels": panels}

    entry = {"domain": name, "id": example.id, "question": question.prompt}
    if not grid.size or not at:
        return entry | {"image": "", "panels": []}
    found = study.workdir.json(f"words-{name}", read)
    number = list(dict.fromkeys(e.domain for e, _ in pairs)).index(name)
    shown = study.processor.tile_picture(batch, layout.whole)
    image = store.save_figure(study.workdir, f"picture-{number}.png", shown)
    return entry | {"image": image} | found
