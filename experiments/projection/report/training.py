"""Sections of the report on neurons whose weights change most, or are the only ones trained."""

from __future__ import annotations

import pathlib

import numpy as np

from experiments.projection.report import cells
from mllm_jax.report import page, parts
from mllm_jax.report.report import Results


def changed(folder: pathlib.Path, results: Results) -> page.Section | None:
    """Build the section on the neurons of most changed weights; None if not measured."""
    rows = results.get("changed")
    if not rows:
        return None
    shared, chance = (np.mean([row[key] for row in rows]) for key in ("jaccard", "chance"))
    columns = ("task", "variant", "seed", "domain neurons", "neurons", "jaccard", "chance")
    return page.Section(
        title="Neurons whose weights change",
        reading="The neurons of the language model whose weights fine-tuning turns most (NeFT) "
        f"share {shared:.2f} with the domain's neurons (Jaccard index; chance gives {chance:.2f}), "
        "on average over tasks and seeds.",
        table=page.Table(
            ("task", "variant", "seed", "domain neurons", "neurons", "Jaccard", "by chance"),
            [
                (
                    row["task"], row["variant"], str(row["seed"]),
                    f"{row['domain neurons']} fine-tuning",
                    f"{row['neurons']:,}", f"{row['jaccard']:.2f}", f"{row['chance']:.2f}",
                )
                for row in rows
            ],
        ),
        note="As many neurons as the domain has, selected by 1 minus the cosine of the columns "
        "of `up` before and after. Their ablation is in the next section.",
        data=[
            parts.write_csv(folder, "changed", columns, [[row[c] for c in columns] for row in rows])
        ],
    )  # fmt: skip


def trained(folder: pathlib.Path, results: Results) -> page.Section | None:
    """Build the section on fine-tuning of selected neurons only; None if not measured."""
    rows = results.get("trained")
    if not rows:
        return None
    columns = (
        "task", "variant", "neurons", *cells.VALUE, *(f"change_{c}" for c in cells.CHANGE),
    )  # fmt: skip
    lines = [
        (
            row["task"], row["variant"], row["neurons"], *cells.pick(row["f1"], cells.VALUE),
            *cells.pick(row["change"], cells.CHANGE),
        )
        for row in rows
    ]  # fmt: skip
    return page.Section(
        title="Fine-tuning of the neurons only",
        reading="Only the weights of a domain's neurons in the language model are fine-tuned, "
        "compared with those of as many random neurons of the same layers, and with the whole "
        "model.",
        table=page.Table(
            ("task", "variant", "neurons", "macro-F1", "interval", "change of F1"),
            [
                (
                    row["task"], row["variant"],
                    page.DASH if row["neurons"] is None else f"{row['neurons']:,}",
                    cells.value(row["f1"]), cells.interval(row["f1"]), cells.change(row["change"]),
                )
                for row in rows
            ],
        ),
        note=f"Rows of `up` and columns of `down` are trained. {cells.MARKS} One fine-tuning of "
        f"each kind, with seed {results['seeds'][0]}: intervals are over pictures only.",
        data=[parts.write_csv(folder, "trained", columns, lines)],
    )  # fmt: skip
