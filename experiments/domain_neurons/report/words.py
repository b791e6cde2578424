"""Section of the report on the neurons that the words of the questions select."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mllm_jax.report import page, parts
from mllm_jax.report.report import Results


def released(folder: pathlib.Path, results: Results) -> page.Section | None:
    """Build the section on the selection by released prompts; None if not measured."""
    other = results["released"]
    if not other:
        return None
    selection, stability = results["selection"], results["stability"]
    deepest = max(other["modules"], key=lambda module: results["modules"][module]["layers"])
    rows = [
        [
            parts.title(module),
            f"{selection[module]['selected']:,}",
            f"{of['selected']:,}",
            f"{np.mean(of['jaccard']):.2f}",
            f"{min(of['jaccard']):.2f} to {max(of['jaccard']):.2f}",
            f"{np.mean(of['chance']):.2f}",
            _halves(stability.get(module)),
        ]
        for module, of in other["modules"].items()
    ]
    return page.Section(
        title="Pictures or words?",
        reading=_read(other, deepest),
        table=page.Table(
            [
                "module", "selected", "as released", "shared", "by domain", "by chance",
                "halves of pictures share",
            ],
            rows,
        ),
        note="Shared: Jaccard index of the two selections, the mean over domains, and that of "
        "random sets of these sizes. The index of two halves of the pictures under the study's "
        "own prompts shows the effect of other pictures, half as many. The settings below change "
        "one thing at a time.",
        data=[_csv(folder, results["domains"], selection, other)],
    )  # fmt: skip


def _read(other: Mapping[str, Any], module: str) -> str:
    own, of = other["own"], other["modules"][module]
    return (
        f"The study counts {_describe(own)}. The released code counts "
        f"{_describe(other)}: questions that name what the pictures of a domain show, so that "
        "words select neurons as well. Of the "
        f"{parts.title(module).lower()}'s neurons, both ways select {np.mean(of['jaccard']):.2f} "
        f"(Jaccard index; chance gives {np.mean(of['chance']):.2f})."
    )


def _describe(way: Mapping[str, str]) -> str:
    """Return a selection's tokens and prompts in words."""
    prompts = {"neutral": "prompts that are the same in every domain",
               "released": "each domain's own questions"}[way["prompts"]]  # fmt: skip
    return f"{way['scope']} tokens under {prompts}"


def _halves(test: Mapping[str, Any] | None) -> str:
    return f"{np.mean(test['halves'][-1]):.2f}" if test else page.DASH


def _csv(
    folder: pathlib.Path, domains: list[str], selection: Results, other: Results
) -> tuple[str, str]:
    rows = [
        [
            module, domain, selection[module]["neurons_per_domain"][domain],
            of["neurons_per_domain"][domain], of["jaccard"][d], of["chance"][d],
        ]
        for module, of in other["modules"].items()
        for d, domain in enumerate(domains)
    ]  # fmt: skip
    columns = ["module", "domain", "neurons", "released", "jaccard", "chance"]
    return parts.write_csv(folder, "released", columns, rows)
