"""What is said of logs whose prompts were drawn with changing probability."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from conftest import make_log, make_queries

import oirl
from oirl.evaluation.logged import logged_runs
from oirl.logs.cells import make_cells
from oirl.logs.store import conform_table
from oirl.rewards.training import COLUMNS


def with_propensities(values: list[float | None]) -> pa.Table:
    log = make_log(60, replicates=1)
    return log.append_column("propensity", pa.array([values[i % len(values)] for i in range(len(log))], pa.float64()))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0.2, 0.3, 0.5], False),  # one each of the three prompts
        ([0.2, 0.3, 0.5, 0.4, 0.3, 0.5], True),
        ([None], False),
        ([0.2, None, None, None, 0.3, None], False),
        ([1 / 3], False),
    ],
)
def test_audit_says_where_propensities_changed(values: list[float | None], said: bool) -> None:
    warnings = oirl.audit(with_propensities(values)).warnings
    assert any("adaptive collection" in warning for warning in warnings) is said


def test_no_prompt_of_an_adaptive_log_counts_as_impossible() -> None:
    """Three draws of a query, with probabilities of three rounds: they may add up to more than 1."""
    rng = np.random.default_rng(0)
    found = []
    for query in make_queries(60):
        for draw, chances in enumerate(([0.25] * 4, [0.55, 0.25, 0.1, 0.1], [0.05, 0.05, 0.45, 0.45])):
            prompt = int(rng.choice(4, p=chances))
            row = {"query_id": query, "query": query, "prompt_id": f"p{prompt}", "prompt": f"{{query}} {prompt}"}
            row |= {"correct": bool(rng.random() < 0.5), "propensity": chances[prompt], "replicate": draw}
            found.append(row)
    cells = make_cells(conform_table(pa.Table.from_pylist(found), [*COLUMNS, "propensity"]))
    logged = logged_runs(cells, np.arange(len(cells.query_ids)))
    assert logged.propensity == "logged"
    assert logged.possible.all()


@pytest.mark.parametrize(("share", "said"), [(0.3, True), (0.0, False)])
def test_audit_says_where_one_prompts_runs_failed_more_often(share: float, said: bool) -> None:
    rows = make_log(200, replicates=1).to_pylist()
    for i, row in enumerate(rows):
        if row["prompt_id"] == "b" and (i // 3) % 10 < 10 * share:
            row["correct"] = None
    warnings = oirl.audit(pa.Table.from_pylist(rows)).warnings
    assert any("30% of the runs under b have no verdict, 0%" in warning for warning in warnings) is said
