"""Section of the report on the paper's claims and their verdicts."""

from __future__ import annotations

import pathlib

from mllm_jax.report import page, parts
from mllm_jax.report.report import Results

COLUMNS = ("claim", "verdict", "criterion", "found", "power")


def claims(folder: pathlib.Path, results: Results) -> page.Section:
    """Build the section on the claims."""
    rows = results["claims"]
    count = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in parts.VERDICTS}
    return page.Section(
        title="The claims",
        reading=f"Of the paper's {len(rows)} claims, {count['holds']} hold here, {count['fails']} "
        f"fail, and {count['undecided']} are undecided at this sample size.",
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
