"""What is said of logs whose prompts were drawn with changing probability."""

from __future__ import annotations

import pyarrow as pa
import pytest
from conftest import make_log

import oirl


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
