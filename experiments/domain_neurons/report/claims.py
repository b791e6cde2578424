"""Section of the report on the paper's claims and their verdicts."""

from __future__ import annotations

import pathlib

from mllm_jax.report import page, parts
from mllm_jax.report.report import Results

COLUMNS = ("claim", "verdict", "criterion", "found", "power")


def claims(folder: pathlib.Path, results: Results) -> page.Section | None:
    """Build the section on the claims; None while the study is running."""
    rows = results["claims"]
    if not rows:
        return None
    return page.Section(
        title="The claims",
        reading=parts.count_verdicts(rows),
        table=page.Table(
            ["verdict", "claim", "found", "what could have been found"],
            [
                [parts.VERDICTS[row["verdict"]], row["claim"], row["found"], row["power"]]
                for row in rows
            ],
        ),
        note="Criteria. " + " ".join(f"{i}: {row['criterion']}" for i, row in enumerate(rows, 1)),
        data=[
            parts.write_csv(folder, "claims", COLUMNS, [[row[c] for c in COLUMNS] for row in rows])
        ],
    )
