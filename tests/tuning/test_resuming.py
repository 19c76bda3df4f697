"""A run that is stopped anywhere and goes on ends with the same bytes as one that was not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from small_runs import RELABEL, Stopped, killed_until_done, make_queries, quick, result, write_queries, write_small_log

import oirl
from oirl.errors import ConfigError

RUNS: dict[str, dict[str, Any]] = {
    "sft": {"epochs": 2, "evaluate_every": 5, "weight_decay": 0.1},
    "filter": {"lora_rank": 4, "epochs": 2, "schedule": "cosine"},
    "raft": {"iterations": 2, "samples": 3, "kl_coef": 0.05, "min_reward": 0.5},
    "hir": {"iterations": 2, "samples": 2, "relabel": RELABEL, "suboutputs": 1, "contrastive": "batch"},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("sources")
    log = write_small_log(folder / "log.parquet", 20)
    return {"log": log, "queries": write_queries(make_queries(20, seed=1), folder / "queries.jsonl")}


def settings_of(method: str, out: Path, sources: dict[str, str]) -> dict[str, Any]:
    kind = "log" if method in ("sft", "filter") else "queries"
    return quick(out, **{kind: sources[kind]}, **RUNS[method])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, sources: dict[str, str]) -> dict[str, Path]:
    """Return the folders of runs that were never stopped."""
    found = {}
    for method in RUNS:
        out = tmp_path_factory.mktemp("whole") / method
        oirl.tune(method, settings_of(method, out, sources))
        found[method] = out
    return found


@pytest.mark.parametrize("method", RUNS)
def test_a_run_that_is_stopped_after_each_line_ends_the_same(
    method: str, tmp_path: Path, sources: dict[str, str], whole: dict[str, Path]
) -> None:
    settings = settings_of(method, tmp_path / method, sources)
    lines = [json.loads(line) for line in (whole[method] / "metrics.jsonl").read_text().splitlines()]
    assert {line["kind"] for line in lines} == {"rollouts", "update", "validation"}

    def stop_after(count: int) -> Any:
        left = count

        def tell(row: dict[str, Any]) -> None:
            nonlocal left
            left -= 1
            if not left:
                raise Stopped

        return tell

    for count in range(1, len(lines), 2):  # each attempt gets a little further than its last one
        with pytest.raises(Stopped):
            oirl.tune(method, settings, progress=stop_after(min(count, 4)))
        if (tmp_path / method / "state.json").is_file() and count > 6:
            break
    oirl.tune(method, settings)
    assert result(tmp_path / method) == result(whole[method])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "hir"])
def test_a_run_that_is_killed_ends_the_same(
    method: str, tmp_path: Path, sources: dict[str, str], whole: dict[str, Path]
) -> None:
    settings = settings_of(method, tmp_path / method, sources)
    assert killed_until_done(method, settings) > 1
    assert result(tmp_path / method) == result(whole[method])


@pytest.mark.slow
def test_two_processes_that_are_killed_end_the_same(tmp_path: Path, sources: dict[str, str]) -> None:
    psutil = pytest.importorskip("psutil")  # the workers are of other sessions than their launcher
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "oirl_cli"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / p) for p in (".", "cli", "data"))}
    environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}

    def start(name: str) -> subprocess.Popen[bytes]:
        settings = quick(tmp_path / name, queries=sources["queries"], samples=2, iterations=2, epochs=4, min_reward=0)
        (tmp_path / f"{name}.yaml").write_text(json.dumps(settings | {"save_every": 2}))
        return subprocess.Popen(
            [*launch, "tune", "raft", "--config", str(tmp_path / f"{name}.yaml")],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    whole = start("whole")
    killed = start("killed")
    while not list((tmp_path / "killed").glob("checkpoints/iteration-001/*")):
        assert killed.poll() is None, "ended before it was killed"
        time.sleep(0.02)
    workers = psutil.Process(killed.pid).children()
    for process in [*workers, psutil.Process(killed.pid)]:
        process.kill()
    killed.wait()
    psutil.wait_procs(workers)
    assert len(workers) == 2
    assert not (tmp_path / "killed" / "model").exists()
    assert start("killed").wait(120) == 0
    assert whole.wait(120) == 0
    assert result(tmp_path / "killed") == result(tmp_path / "whole")


def test_a_finished_run_is_told_again_and_not_made_again(whole: dict[str, Path], sources: dict[str, str]) -> None:
    before = result(whole["sft"])
    told: list[dict[str, Any]] = []
    report = oirl.tune("sft", settings_of("sft", whole["sft"], sources), progress=told.append)
    assert told == []
    assert result(whole["sft"]) == before
    assert report.after["gain_ci_low"] <= report.after["gain"] <= report.after["gain_ci_high"]


LONGER_IS_BETTER = True


def by_length(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    """Reward length, or, as another version of this function might, its opposite."""
    return [float(len(text.split())) * (1 if LONGER_IS_BETTER else -1) for text in completions]


def test_a_run_does_not_go_on_under_another_reward(tmp_path: Path, sources: dict[str, str], monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import test_resuming

    settings = quick(tmp_path / "run", log=sources["log"], reward="test_resuming:by_length", epochs=2, save_every=2)

    def stop(row: dict[str, Any]) -> None:
        if row["kind"] == "update":
            raise Stopped

    with pytest.raises(Stopped):
        oirl.tune("raft", settings, progress=stop)
    monkeypatch.setattr(test_resuming, "LONGER_IS_BETTER", False)
    with pytest.raises(ConfigError, match="reward"):
        oirl.tune("raft", settings)
    monkeypatch.setattr(test_resuming, "LONGER_IS_BETTER", True)
    assert oirl.tune("raft", settings).iterations[0]["examples"] > 0
