"""The table of single neurons, and the page on which each has its evidence."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mllm_jax.report import cards, page, parts
from mllm_jax.report.report import Results

Neuron = Mapping[str, Any]  # an entry of `evidence.neurons` in results.json
PAGE = "neurons.html"
TOPS = {"image": "Strongest image tokens", "query": "Pictures of the strongest queries",
        "text": "Strongest text tokens"}  # fmt: skip


def single(folder: pathlib.Path, results: Results) -> page.Section | None:
    """Build the section on single neurons, and their page; None if there is no evidence."""
    evidence = results["evidence"]
    if not evidence:
        return None
    neurons, domains = evidence["neurons"], results["domains"]
    content = page.Page(
        title="Single neurons",
        lead="What each neuron responds to: the tokens on which it is strongest, its values, its "
        "rates, and the words that its output promotes.",
        sections=[_neuron_section(results, neuron) for neuron in neurons],
        data=[("back to the study", "index.html"), ("all neurons", PAGE)],
        contents=False,
    )
    page.write(folder / PAGE, content)
    most = max(neurons, key=_contrast)
    own, other = _own_and_other(most)
    return page.Section(
        title="Single neurons",
        reading=f"{_name(most)} is the neuron with the largest contrast: active on "
        f"{parts.percent(own)} of the tokens of {parts.join_words(most['domains'])}, and on "
        f"{parts.percent(other)} elsewhere.",
        table=page.Table(
            ["neuron", "module", "layer", "index", "domains", "entropy", "p",
             *(f"rate, {domain}" for domain in domains), "raises", "estimated effect",
             "effect alone"],
            [_table_row(neuron, domains) for neuron in neurons],
            links=[f"{PAGE}#{_id(neuron)}" for neuron in neurons],
            sortable=True,
        ),
        note="The neurons of lowest entropy of each domain and module; click on one to see its "
        "evidence. p: the share of studies with shuffled domains in which a neuron of the module "
        "has so low an entropy (Westfall and Young). Rates: the share of a domain's tokens on "
        "which it is active. Raises: the word whose logit its output increases most. "
        "Effects: those of ablating it on the log-likelihood of right answers of its own "
        "domain, per question: estimated to first order, and, for the largest estimates, "
        f"measured.{_read_exact(neurons)}",
        data=[_csv(folder, results), ("all neurons, each with its evidence", PAGE)],
        name="neurons",
    )  # fmt: skip


def _read_exact(neurons: Sequence[Neuron]) -> str:
    """Return the sentence on how well estimated effects agree with measured ones."""
    pairs = np.array(
        [
            (neuron["effects"][domain], value)
            for neuron in neurons
            for domain, value in neuron["exact"].items()
            if domain in neuron["effects"]
        ]
    )
    if len(pairs) < 3 or not pairs.std(axis=0).all():
        return ""
    correlation = np.corrcoef(pairs.T)[0, 1]
    return (
        f" Over {len(pairs)} neurons, estimated and measured effects have a correlation of "
        f"{correlation:.2f}.".replace("-", page.MINUS)
    )


def _id(neuron: Neuron) -> str:
    return f"{neuron['module']}-{neuron['layer']}-{neuron['index']}"


def _name(neuron: Neuron) -> str:
    module = parts.title(neuron["module"])
    return f"{module}, layer {neuron['layer']}, neuron {neuron['index']:,}"


def _own_and_other(neuron: Neuron) -> tuple[float, float]:
    """Return the lowest rate in the neuron's own domains, and the highest elsewhere."""
    rates = {domain: by_kind["all"] for domain, by_kind in neuron["rates"].items()}
    own = [rate for domain, rate in rates.items() if domain in neuron["domains"]]
    other = [rate for domain, rate in rates.items() if domain not in neuron["domains"]]
    return min(own, default=0.0), max(other, default=0.0)


def _contrast(neuron: Neuron) -> float:
    own, other = _own_and_other(neuron)
    return own - other


def _number(value: float | None, form: str) -> str:
    if value is None:
        return page.DASH
    text = format(value, form)
    return (text if float(text) else format(0.0, form)).replace("-", page.MINUS)


def _own_effect(neuron: Neuron, key: str) -> float | None:
    """Return the mean effect in the neuron's own domains, estimated (`effects`) or `exact`."""
    own = [value for domain, value in neuron[key].items() if domain in neuron["domains"]]
    return sum(own) / len(own) if own else None


def _table_row(neuron: Neuron, domains: Sequence[str]) -> list[str]:
    words = neuron["words"]
    return [
        f"{parts.title(neuron['module'])} {neuron['layer']}.{neuron['index']}",
        parts.title(neuron["module"]),
        str(neuron["layer"]),
        str(neuron["index"]),
        ", ".join(neuron["domains"]),
        _number(neuron["entropy"], ".3f"),
        _number(neuron["p"], ".3f"),
        *(f"{neuron['rates'][domain]['all']:.2f}" for domain in domains),
        cards.visible(words["raised"][0]) if words else page.DASH,
        *(_number(_own_effect(neuron, key), "+.4f") for key in ("effects", "exact")),
    ]


def _neuron_section(results: Results, neuron: Neuron) -> page.Section:
    evidence = results["evidence"]
    own, other = _own_and_other(neuron)
    lists = [
        cards.Cards(TOPS[name], [_card(evidence, token) for token in tokens])
        for name, tokens in neuron["top"].items()
        if tokens
    ]
    words = neuron["words"]
    raised = (
        [cards.Words("Words that its output promotes", words["raised"]),
         cards.Words("Words that its output suppresses", words["lowered"])]
        if words else []
    )  # fmt: skip
    entropy = "" if neuron["entropy"] is None else f" Entropy: {neuron['entropy']:.3f} nats."
    return page.Section(
        title=_name(neuron),
        reading=f"Belongs to {parts.join_words(neuron['domains'])}: active on at least "
        f"{parts.percent(own)} of the tokens there, on at most {parts.percent(other)} elsewhere."
        f"{entropy}",
        table=_rates(neuron),
        widgets=[*lists, *raised, _histogram(evidence, neuron)],
        name=_id(neuron),
        alone=True,
    )


def _card(evidence: Mapping[str, Any], token: Mapping[str, Any]) -> cards.Card:
    caption = f"{token['value']:.2f}, {token['domain']}".replace("-", page.MINUS)
    if "word" in token:
        return cards.Card(caption, before=token["before"], word=token["word"])
    picture = evidence["pictures"][token["picture"]]
    box = None
    if "row" in token:
        box = cards.Box(*(token[part] for part in ("row", "column", "rows", "columns")))
        caption += f", row {token['row'] + 1}, column {token['column'] + 1}"
    alt = f"{picture['domain']}, {picture['id']}"
    return cards.Card(f"{caption}, {picture['id']}", picture["image"], alt, box)


def _rates(neuron: Neuron) -> page.Table:
    kinds = list(dict.fromkeys(kind for rates in neuron["rates"].values() for kind in rates))
    rows = [
        [domain, *(_number(rates.get(kind), ".3f") for kind in kinds),
         *(_number(neuron[key].get(domain), "+.4f") for key in ("effects", "exact"))]
        for domain, rates in neuron["rates"].items()
    ]  # fmt: skip
    heads = [f"rate, {kind} tokens" for kind in kinds]
    return page.Table(["domain", *heads, "estimated effect", "effect alone"], rows)


def _histogram(evidence: Mapping[str, Any], neuron: Neuron) -> cards.Histogram:
    own, other = (
        [counts for domain, counts in neuron["values"].items()
         if (domain in neuron["domains"]) == is_own]
        for is_own in (True, False)
    )  # fmt: skip
    series = {"own domains": own, "other domains": other}
    return cards.Histogram(
        "Values", evidence["edges"],
        {name: [sum(bins) for bins in zip(*counts, strict=True)]
         for name, counts in series.items() if counts},
    )  # fmt: skip


def _csv(folder: pathlib.Path, results: Results) -> tuple[str, str]:
    rows = [
        [neuron["module"], neuron["layer"], neuron["index"], " ".join(neuron["domains"]),
         neuron["entropy"], neuron["p"], domain, kind, rate, neuron["effects"].get(domain),
         neuron["exact"].get(domain)]
        for neuron in results["evidence"]["neurons"]
        for domain, rates in neuron["rates"].items()
        for kind, rate in rates.items()
    ]  # fmt: skip
    columns = ["module", "layer", "index", "domains", "entropy", "p", "domain", "tokens", "rate",
               "estimated_effect", "effect"]  # fmt: skip
    return parts.write_csv(folder, "single_neurons", columns, rows)
