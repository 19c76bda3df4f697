"""What runs cost: money of the log, prices of tokens, tokens alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from oirl.errors import ConfigError, DataError, NotFoundError, OirlError
from oirl.logs.cells import make_cells, name_actions
from oirl.logs.costs import COST_COLUMNS, cell_costs, read_prices, run_costs
from oirl.logs.store import conform_table


def log_of(rows: list[dict[str, Any]]) -> pa.Table:
    known = {"query_id": "q", "query": "q", "prompt_id": "p", "prompt": "p", "correct": True}
    texts, numbers = ("query_id", "query", "prompt_id", "prompt", "model"), ("tokens_in", "tokens_out")
    types = {**dict.fromkeys(texts, pa.string()), **dict.fromkeys(numbers, pa.int64())}
    schema = pa.schema(types | {"correct": pa.bool_(), "cost": pa.float64()})
    return pa.Table.from_pylist([known | row for row in rows], schema=schema)


ROWS = [
    {"model": "small", "tokens_in": 100, "tokens_out": 50},
    {"model": "large", "tokens_in": 100, "tokens_out": 50, "cost": 0.5},
    {"model": None, "tokens_in": 10, "tokens_out": None},
]


def test_tokens_are_counted_where_no_money_is_known() -> None:
    found = run_costs(log_of([{k: v for k, v in row.items() if k != "cost"} for row in ROWS]))
    assert found is not None
    assert found.unit == "tokens"
    assert found.values[:2].tolist() == [150, 150]
    assert np.isnan(found.values[2])


def test_money_goes_before_tokens_and_prices_fill_it() -> None:
    found = run_costs(log_of(ROWS))
    assert (found.unit, found.values[1]) == ("money", 0.5)
    assert np.isnan(found.values[0])
    priced = run_costs(log_of(ROWS), {"small": (2.0, 10.0), "large": (9.0, 9.0)})
    # 100 · 2 / 10⁶ + 50 · 10 / 10⁶; what the log says of `large` stands.
    assert priced.values[0] == pytest.approx(0.0007)
    assert priced.values[1] == 0.5
    assert run_costs(log_of(ROWS), {"default": (2.0, 10.0)}).values[0] == pytest.approx(0.0007)


def test_a_log_without_any_has_no_costs() -> None:
    assert run_costs(conform_table(log_of([{}]).select(["query_id", "query"]), COST_COLUMNS)) is None


def test_prices_are_read_and_others_refused(tmp_path: Path) -> None:
    good = tmp_path / "prices.yaml"
    good.write_text("gpt-4o-mini: {input: 0.15, output: 0.6}\ndefault: {input: 1, output: 2}\n")
    assert read_prices(good) == {"gpt-4o-mini": (0.15, 0.6), "default": (1.0, 2.0)}
    with pytest.raises(NotFoundError):
        read_prices(tmp_path / "none.yaml")
    for text in ("", "- 1", "a: 3", "a: {input: 1}", "a: {input: -1, output: 2}", "a: {input: x, output: 2}", "a: ["):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(OirlError) as e:
            read_prices(tmp_path / "bad.yaml")
        assert "bad.yaml" in str(e.value)


def test_cells_cost_the_mean_of_their_runs() -> None:
    rows = [
        {"query_id": "a", "query": "a", "prompt_id": "x", "prompt": "x", "cost": 1.0},
        {"query_id": "a", "query": "a", "prompt_id": "x", "prompt": "x", "cost": 3.0},
        {"query_id": "a", "query": "a", "prompt_id": "y", "prompt": "y", "cost": None},
        {"query_id": "b", "query": "b", "prompt_id": "y", "prompt": "y", "cost": 5.0},
    ]
    table = log_of(rows)
    found = cell_costs(table, run_costs(table).values, make_cells(table))
    assert np.nan_to_num(found, nan=-1).tolist() == [[2, -1], [-1, 5]]


def test_pairs_of_model_and_prompt_are_actions() -> None:
    table = log_of([{"model": "m"}, {"model": "n"}, {}])
    assert name_actions(table, "prompt") is table
    assert name_actions(table, "pair")["prompt_id"].to_pylist() == ["m | p", "n | p"]
    with pytest.raises(ConfigError, match="allowed: prompt, pair"):
        name_actions(table, "both")
    with pytest.raises(DataError, match="model"):
        name_actions(table.slice(2), "pair")
