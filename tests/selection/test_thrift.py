"""Choosing with an eye to cost: what fits learn, select follows, evaluate shows, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import make_log, make_queries, run_oirl

import oirl
from oirl import PromptSelector, evaluate
from oirl.errors import ConfigError, ModelFileError
from oirl.selection.selector import Candidate

COSTS = {"a": 1.0, "b": 4.0, "c": 2.0}


def costly(n: int = 300, seed: int = 0) -> pa.Table:
    table = make_log(n, seed=seed)
    return table.append_column("cost", pa.array([COSTS[p] for p in table["prompt_id"].to_pylist()]))


@pytest.fixture(scope="module")
def selector() -> PromptSelector:
    return PromptSelector().fit(costly())


def mean_cost(selector: PromptSelector, **how: float) -> float:
    return float(np.mean([COSTS[s.prompt_id] for s in selector.select(make_queries(200, seed=9), **how)]))


def test_the_heavier_the_cost_the_thriftier_the_choice(selector: PromptSelector) -> None:
    spent = [mean_cost(selector, cost_weight=w) for w in (0.0, 0.05, 0.2, 1.0)]
    assert spent == sorted(spent, reverse=True)
    assert spent[0] == pytest.approx(2.5, abs=0.2)  # half `a`, half `b`
    assert spent[-1] == 1.0
    assert selector.costs_.unit == "money"
    assert selector.costs_.prices.tolist() == [1.0, 4.0, 2.0]


@pytest.mark.parametrize("most", [2.6, 2.0, 1.5, 1.0])
def test_a_mean_cost_is_kept(selector: PromptSelector, most: float) -> None:
    assert mean_cost(selector, max_cost=most) <= most + 0.15


def test_a_mean_cost_below_the_cheapest_is_refused(selector: PromptSelector) -> None:
    with pytest.raises(ConfigError, match="the least on the log is 1"):
        selector.select(["Which?"], max_cost=0.5)
    with pytest.raises(ConfigError, match="one of the two"):
        selector.select(["Which?"], max_cost=2, cost_weight=1)
    with pytest.raises(ConfigError, match="0 or more"):
        selector.select(["Which?"], cost_weight=-1)
    with pytest.raises(ConfigError, match="is not known"):
        selector.select(["Which?"], [Candidate("new", "New. {query}")], cost_weight=0.1)


def test_a_model_without_costs_says_so(log: pa.Table) -> None:
    with pytest.raises(ConfigError, match="knows no costs"):
        PromptSelector().fit(log).select(["Which?"], cost_weight=0.1)


def test_costs_are_saved_and_checked_when_loaded(selector: PromptSelector, tmp_path: Path) -> None:
    selector.save(tmp_path / "model")
    loaded = oirl.load(tmp_path / "model")
    queries = make_queries(30, seed=3)
    assert loaded.select(queries, cost_weight=0.05) == selector.select(queries, cost_weight=0.05)
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    for change in ({"unit": "beads"}, {"prices": [1.0]}, {"points": [{"weight": 1}]}, {"values": ["x", 1, 2]}):
        broken = manifest | {"costs": manifest["costs"] | change}
        (tmp_path / "model" / "manifest.json").write_text(json.dumps(broken))
        with pytest.raises(ModelFileError, match="costs"):
            oirl.load(tmp_path / "model")


def test_evaluate_shows_what_thrift_keeps(selector: PromptSelector) -> None:
    cost = evaluate(selector, costly(200, seed=5), draws=50).cost
    assert cost["unit"] == "money"
    assert cost["policies"]["best_prompt"] == 2.0
    assert cost["policies"]["random"] == pytest.approx(7 / 3)
    assert cost["cheapest_prompt"] == "a"
    assert cost["curve"][-1]["cost"] == 1.0
    assert all(c["ci_low"] <= c["value"] <= c["ci_high"] for c in cost["curve"])
    # Choosing is better than the best single prompt by far, so most of the gap costs less than mixing would.
    assert cost["perf_gain"] > 0.3
    assert cost["area"] > 0.5
    for point in cost["calibrated"]:
        assert point["gap_recovered"] > point["target"] - 0.2
    assert evaluate(selector, make_log(100, seed=5), draws=50).cost is None


def test_tokens_have_prices(tmp_path: Path) -> None:
    table = make_log(60)
    tokens = pa.array([int(1000 * COSTS[p]) for p in table["prompt_id"].to_pylist()])
    table = table.append_column("tokens_in", tokens).append_column("tokens_out", tokens)
    assert PromptSelector().fit(table).costs_.prices.tolist() == [2000, 8000, 4000]
    priced = PromptSelector(prices={"default": (1.0, 1.0)}).fit(table).costs_
    assert (priced.unit, priced.prices.tolist()) == ("money", pytest.approx([0.002, 0.008, 0.004]))


def test_pairs_of_model_and_prompt_are_chosen() -> None:
    """One model is good at alpha queries under `a`, the other at beta queries under `b`."""
    table = make_log(200)
    models = ["one" if p != "b" else "two" for p in table["prompt_id"].to_pylist()]
    pairs = PromptSelector(actions="pair").fit(table.append_column("model", pa.array(models)))
    assert pairs.model_.prompt_ids_ == ["one | a", "two | b", "one | c"]
    assert not any("language models" in w for w in pairs.warnings_)
    result = evaluate(pairs, make_log(100, seed=4).append_column("model", pa.array(models[:600])), draws=50)
    assert result.policies["selector"]["gain_ci_low"] > 0.1
    assert {s.prompt_id for s in pairs.select(make_queries(20, seed=1))} == {"one | a", "two | b"}


def test_the_commands_follow_costs(tmp_path: Path) -> None:
    oirl.write_log(costly(80), tmp_path / "log.parquet")
    assert run_oirl("fit", tmp_path / "log.parquet", "--out", tmp_path / "model").returncode == 0
    done = run_oirl("select", tmp_path / "model", *make_queries(4), "--max-cost", "1")
    assert {json.loads(line)["prompt_id"] for line in done.stdout.splitlines()} == {"a"}
    shown = run_oirl("evaluate", tmp_path / "model", tmp_path / "log.parquet")
    assert "mean cost per query (money)" in shown.stdout
    audited = run_oirl("audit", tmp_path / "log.parquet", "--json")
    assert {c["prompt_id"]: c["cost"] for c in json.loads(audited.stdout)["costs"]} == COSTS
    refused = run_oirl("audit", tmp_path / "log.parquet", "--prices", tmp_path / "none.yaml")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
