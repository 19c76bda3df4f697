"""An online run that is stopped anywhere, and goes on, ends with the same bytes as one that was not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_runs import Stopped, killed_until_done, make_queries, result, write_queries, write_small_log
from test_online_runs import online

import oirl
from oirl.errors import ConfigError

RUNS: dict[str, dict[str, Any]] = {
    "apa": {"iterations": 5, "entropy_coef": 0.01, "importance_cap": 2.0, "whiten": "none", "weight_decay": 0.1},
    "ppo": {
        "iterations": 5,
        "baseline": "value_head",
        "reward_scale": "running",
        "schedule": "cosine",
        "lora_rank": 4,
        "max_kl": 0.001,
        "on_exceed": "raise_kl_coef",
    },
    "awr": {"iterations": 4, "samples": 2, "baseline": "leave_one_out", "average": "sequence", "save_every": 1},
    "refit": {"iterations": 5, "refit_reward_every": 2, "max_kl": 0.05, "on_exceed": "rollback"},
    "refit and gold": {
        "iterations": 6,
        "refit_reward_every": 2,
        "save_every": 3,
        "evaluate_every": 1,
        "on_exceed": "rollback",
        "held_out": 0.5,
    },
}


def method_of(name: str) -> str:
    return "apa" if name.startswith("refit") else name


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("sources")
    log = write_small_log(folder / "log.parquet", 20)
    oirl.ResponseRewardModel(embedder="tfidf", folds=2).fit(oirl.read_log(log)).save(folder / "reward")
    queries = write_queries(make_queries(20), folder / "queries.jsonl")
    return {"queries": queries, "log": log, "reward": str(folder / "reward")}


def settings_of(name: str, out: Path, sources: dict[str, str]) -> dict[str, Any]:
    changes = dict(RUNS[name])
    if name.startswith("refit"):
        changes |= {"reward": sources["reward"], "refit_log": sources["log"]}
    return online(out, sources["queries"], **changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, sources: dict[str, str]) -> dict[str, Path]:
    """Return the folders of runs that were never stopped."""
    found = {}
    for name in RUNS:
        out = tmp_path_factory.mktemp("whole") / name
        oirl.tune(method_of(name), settings_of(name, out, sources))
        found[name] = out
    return found


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_is_stopped_after_any_line_ends_the_same(
    name: str, tmp_path: Path, sources: dict[str, str], whole: dict[str, Path]
) -> None:
    settings = settings_of(name, tmp_path / name, sources)
    left = 0

    def stop(row: dict[str, Any]) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise Stopped

    stops = 0
    for length in (1, 2, 4, 5, 7, 6, 8, 9, 10, 11, 12):  # from a checkpoint on, other lines each time
        left = length
        try:
            oirl.tune(method_of(name), settings, progress=stop)
            break
        except Stopped:
            stops += 1
    else:
        oirl.tune(method_of(name), settings)
    assert stops > 4
    assert result(tmp_path / name) == result(whole[name])


def test_the_runs_have_shown_what_they_are_to_show(whole: dict[str, Path]) -> None:
    kinds = {name: {line["kind"] for line in lines_of(out)} for name, out in whole.items()}
    assert {"rollouts", "update", "validation"} <= kinds["apa"]
    assert "guard" in kinds["refit"]
    assert "guard" in kinds["ppo"]
    assert (whole["refit"] / "reward-002" / "manifest.json").is_file()
    assert {line["kl_coef"] for line in lines_of(whole["ppo"]) if line["kind"] == "rollouts"} != {0.05}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["apa", "ppo", "awr"])
def test_a_run_that_is_killed_ends_the_same(
    name: str, tmp_path: Path, sources: dict[str, str], whole: dict[str, Path]
) -> None:
    settings = settings_of(name, tmp_path / name, sources)
    assert killed_until_done(name, settings) > 1
    assert result(tmp_path / name) == result(whole[name])


def test_a_run_does_not_go_on_with_other_settings(sources: dict[str, str], whole: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"kl_coef was 0\.1, and is 0\.2"):
        oirl.tune("apa", settings_of("apa", whole["apa"], sources) | {"kl_coef": 0.2})
