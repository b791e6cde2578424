"""Sections of the report on how certain the words of the logit lens are, and at further sites."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.domain_neurons.report import layers
from mllm_jax.report import page, parts
from mllm_jax.report.report import Results

COLUMNS = (
    "data", "measure", "n", "value", "low", "high", "bound", "p", "p_holm", "verdict",
)  # fmt: skip
MEASURES = {
    "entropy": "image tokens less question tokens, nats",
    "most likely word": "probability of the most likely word",
}


def sparsity(folder: pathlib.Path, results: Results) -> page.Section | None:
    """Build the section on image and text tokens at the last layer; None if not measured."""
    rows = results["sparsity"]
    if not rows:
        return None
    cells = [[row[c] for c in COLUMNS] for row in rows]
    return page.Section(
        title="Are words of image tokens less certain?",
        reading=_read(rows),
        table=page.Table(
            ["domain", "measure", "mean", "claimed", "verdict"],
            [
                [
                    row["data"], MEASURES[row["measure"]],
                    f"{row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]",
                    f"{'above' if row['claimed'] > 0 else 'below'} {row['bound']:g}",
                    parts.VERDICTS[row["verdict"]],
                ]
                for row in rows
            ],
        ),
        note="The logit lens at the last layer, the mean over the tokens of a picture and then "
        "over pictures, with 95 % bootstrap intervals over pictures. Verdicts are by sign-flip "
        "tests of the differences from the claimed bound, corrected for the domains (Holm).",
        data=[
            parts.write_csv(folder, "sparsity", COLUMNS, cells),
            _curves_csv(folder, "lens_top", {"resid_post": results["lens_top"]}),
        ],
    )  # fmt: skip


def _read(rows: list[Mapping[str, Any]]) -> str:
    clauses: list[str] = []
    for measure, claim in (
        ("entropy", "image tokens have a higher entropy than those of the question"),
        ("most likely word", "the most likely word of an image token has less than 40 %"),
    ):
        of = [row["verdict"] for row in rows if row["measure"] == measure]
        clauses.append(
            f"that {claim} holds in {of.count('holds')} of {len(of)} domains, fails in "
            f"{of.count('fails')} and is undecided in {of.count('undecided')}"
        )
    return f"At the last layer, {'; '.join(clauses)}."


def sites(folder: pathlib.Path, results: Results) -> page.Section | None:
    """Build the section on the lens at further sites; None if there are none."""
    by_site = results["lens_sites"]
    if not by_site:
        return None
    rows: list[list[str]] = []
    for site, lens in {"resid_post": results["lens"], **by_site}.items():
        for kind in dict.fromkeys(kind for by_kind in lens.values() for kind in by_kind):
            curve = np.mean([by_kind[kind]["mean"] for by_kind in lens.values()], axis=0)
            rows.append(
                [f"lm.{site}", kind, f"{curve[0]:.2f}", f"{curve.min():.2f}",
                 str(curve.argmin()), f"{curve[-1]:.2f}"]
            )  # fmt: skip
    return page.Section(
        title="The lens inside the blocks",
        reading="The same lens after attention, and at the outputs of attention and of the MLP, "
        "each read as if it were the residual.",
        table=page.Table(["site", "tokens", "first layer", "lowest", "at layer", "last"], rows),
        note="Entropy in nats, the mean over domains. The table file has each domain, with 95 % "
        "bootstrap intervals over pictures.",
        data=[_curves_csv(folder, "lens_sites", by_site)],
    )


def _curves_csv(
    folder: pathlib.Path, name: str, by_site: Mapping[str, Mapping[str, Any]]
) -> tuple[str, str]:
    rows = [[site, *row] for site, lens in by_site.items() for row in layers.curve_rows(lens)]
    return parts.write_csv(folder, name, ["site", *layers.CURVE], rows)
