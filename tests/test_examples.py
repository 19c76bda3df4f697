"""The examples run as a user types them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, make_log

needs_xgboost = pytest.mark.skipif(find_spec("xgboost") is None, reason="xgboost is not installed")


def test_prompts_are_improved_from_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "improve_prompts.py"), "--problems", "160"]
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}:{ROOT / 'data'}", "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "{query} Work step by step." in done.stdout
    (gain,) = re.findall(r"gains \+\d+\.\d% \((\S+)% to", done.stdout)
    assert float(gain) > 0
    assert not list(tmp_path.iterdir())


@needs_xgboost
def test_the_reproduction_shows_a_leak_where_there_is_one(tmp_path: Path) -> None:
    """Of every query one run is for training and one for testing, so that a lookup table knows them all."""
    table = make_log(120, effect=0.0, base=0.5, replicates=2)
    rows = table.to_pylist()
    for row in rows:
        row["split"] = "test" if row["replicate"] else "train"
        # What prompt works on a query is fixed by its number, so that a lookup table knows it and nobody else can.
        row["correct"] = (int(row["query_id"][1:]) * 7919 % 3) == "abc".index(row["prompt_id"])
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), tmp_path / "log.parquet")
    command = [sys.executable, ROOT / "examples" / "reproduce_prompt_oirl.py", tmp_path / "log.parquet"]
    options = ["--rounds", "5", "--seeds", "1", "--json"]
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}:{ROOT / 'data'}", "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command), *options], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    leaking, clean = found["published"][0], found["leak-free"][0]
    assert leaking["lookup table"]["value"] == 1.0
    assert leaking["lookup table"]["gain_ci_low"] > 0.4
    assert clean["lookup table"]["gain"] == 0
    assert set(clean) == {
        "best single prompt",
        "published recipe",
        "lookup table",
        "oirl, choosing",
        "oirl, as the gate deploys",
        "test queries",
    }


@pytest.mark.slow
def test_raft_runs_and_measures_on_other_problems(tmp_path: Path) -> None:
    done = run_example("raft.py", tmp_path, "--problems", "20", "--iterations", "2", "--updates", "6")
    assert len(re.findall(r"^iteration \d: reward 0\.\d+, success 0\.\d+", done, re.MULTILINE)) == 2
    assert len(re.findall(r"^(before|after) +\d+\.\d% \[", done, re.MULTILINE)) == 2


@pytest.mark.slow
def test_hir_learns_from_a_log_alone(tmp_path: Path) -> None:
    done = run_example("hir_from_a_log.py", tmp_path, "--problems", "20", "--updates", "6")
    names = ("initial model", "filtered SFT", "HIR, asked for right", "HIR, asked for wrong")
    assert [line[:24].strip() for line in done.splitlines()] == list(names)


def run_example(name: str, folder: Path, *arguments: str) -> str:
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}:{ROOT / 'data'}", "PATH": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert not list(folder.iterdir())
    return done.stdout


@pytest.mark.slow
def test_the_whole_loop_of_apa_runs(tmp_path: Path) -> None:
    done = run_example("online_loop.py", tmp_path, "--iterations", "3")
    lines = re.findall(r"^iteration (\d): right (0\.\d+), KL (-?\d+\.\d+), explained variance", done, re.MULTILINE)
    assert [line[0] for line in lines] == ["0", "1", "2"]
    assert float(lines[0][2]) == 0
    assert float(lines[2][2]) > 0.05
