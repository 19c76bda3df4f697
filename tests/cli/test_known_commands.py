from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import ROOT, make_log, run_oirl

import oirl
from oirl import __version__
from oirl.environment import PACKAGES, inspect_environment
from oirl.registry import KINDS

ENVIRONMENT = {"PYTHONPATH": os.pathsep.join(str(ROOT / p) for p in (".", "cli", "data"))}


def test_models_lists_what_is_registered() -> None:
    kinds = json.loads(run_oirl("models", "--json").stdout)
    shown = ("prompt-models", "response-models", "preference-models", "embedders", "checkers", "engines")
    assert kinds == {kind: KINDS[kind] for kind in shown}
    table = run_oirl("models").stdout
    assert all(name in table for kind in kinds for name in KINDS[kind])


def test_formats_say_what_they_make() -> None:
    rows = json.loads(run_oirl("formats", "--json").stdout)
    assert [row["name"] for row in rows if row["use"] == "import"] == list(KINDS["formats"])
    assert [row["name"] for row in rows if row["use"] == "export"] == list(KINDS["exports"])
    assert {row["name"]: row["record"] for row in rows}["gsm8k"] == "queries"
    assert "gzip" in run_oirl("formats").stdout or ".gz" in run_oirl("formats").stdout


def test_doctor_names_the_command_that_installs_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "oirl.environment._version", lambda name: None if name in {"torch", "xgboost-cpu", "xgboost"} else "1"
    )
    rows = {p["package"]: p for p in inspect_environment()["packages"]}
    assert rows.keys() == PACKAGES.keys()
    assert rows["torch"]["version"] is None
    assert rows["torch"]["install"] == "pip install 'oirl[tune]'"
    assert rows["xgboost"]["version"] is None
    assert rows["numpy"]["version"] == "1"


def test_doctor_warns_of_two_builds_of_one_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oirl.environment._version", lambda name: "1")
    (problem,) = inspect_environment()["problems"]
    assert "xgboost-cpu" in problem


def test_doctor_says_what_a_broken_driver_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexit 9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    report = inspect_environment()
    assert report["gpus"] == []
    assert "failed" in report["gpu_note"]
    tool.write_text("#!/bin/sh\necho 'A Card, 1 MiB'\n")
    assert inspect_environment()["gpus"] == ["A Card, 1 MiB"]


def test_doctor_runs_here() -> None:
    report = json.loads(run_oirl("doctor", "--json").stdout)
    assert report["oirl"] == __version__
    assert run_oirl("doctor").stdout.startswith(f"oirl {__version__}, Python ")


def test_version_help_and_a_mistyped_command() -> None:
    assert run_oirl("--version").stdout == f"oirl {__version__}\n"
    bare = run_oirl()
    assert "Usage" in bare.stdout + bare.stderr
    wrong = run_oirl("imprt")
    assert wrong.returncode == 2
    (line,) = wrong.stderr.splitlines()
    assert line.startswith("oirl: ")
    assert "import" in line


def test_what_stands_in_a_log_does_not_command_the_terminal(tmp_path: Path) -> None:
    table = make_log(30)
    names = ["\x1b]0;owned\x07" if p == "a" else p for p in table["prompt_id"].to_pylist()]
    wrong = table.set_column(table.schema.get_field_index("prompt_id"), "prompt_id", pa.array(names))
    oirl.write_log(wrong, tmp_path / "log.parquet")
    done = run_oirl("audit", tmp_path / "log.parquet")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout + done.stderr
    assert "owned" in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    oirl.write_log(make_log(30), tmp_path / "log.parquet")
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "oirl_cli", "audit", str(tmp_path / "log.parquet"), "--json"]
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, env=os.environ | ENVIRONMENT, check=False
        )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "cannot be written" in done.stderr


def test_the_demo_replaces_no_files_of_others(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("mine")
    done = run_oirl("demo", "--out", tmp_path)
    assert done.returncode == 2
    assert "holds other files" in done.stderr
    assert (tmp_path / "report.html").read_text() == "mine"
