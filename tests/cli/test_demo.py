from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT, run_oirl

from oirl_data import demo_path, small_lm_path


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Return the JSON document of one run of the demo."""
    out = tmp_path_factory.mktemp("demo")
    done = run_oirl("demo", "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_demo_does_the_whole_job_and_leaves_its_files(document: dict) -> None:
    assert set(document) == {"import", "audit", "fit", "evaluate", "select", "files", "seconds"}
    assert document["import"]["rows_refused"] == 0
    assert document["import"]["grade"]["graded"] == document["import"]["rows_kept"]
    assert all(Path(file).exists() for file in document["files"])
    assert document["evaluate"]["warnings"] == [], "the demo's own split must not leak"


def test_the_demo_log_is_what_the_documentation_promises(document: dict) -> None:
    assert document["import"]["n_prompts"] >= 8
    assert document["import"]["n_queries"] >= 600
    assert document["evaluate"]["n_rows"] == document["evaluate"]["n_queries"] * document["evaluate"]["n_prompts"] * 2


def test_choosing_per_query_pays_in_the_demo_as_the_model_was_taught(document: dict) -> None:
    policies = document["evaluate"]["policies"]
    assert document["evaluate"]["deploy"]["policy"] == "selector"
    assert policies["selector"]["gain_ci_low"] > 0.02
    assert policies["selector"]["value"] > policies["best_prompt"]["value"] > policies["random"]["value"]
    assert len({row["prompt_id"] for row in document["select"]}) > 1


def test_the_demo_for_people_ends_with_the_answer(tmp_path: Path) -> None:
    done = run_oirl("demo", "--out", tmp_path / "demo")
    assert done.returncode == 0, done.stderr
    for phrase in ("In short: the best single prompt is", "95% interval", "deployed:", "selected.jsonl"):
        assert phrase in done.stdout
    assert "Traceback" not in done.stderr


def test_the_same_seed_gives_the_same_demo(document: dict, tmp_path: Path) -> None:
    again = json.loads(run_oirl("demo", "--out", tmp_path / "again", "--json").stdout)
    for part in ("evaluate", "select"):
        assert again[part] == document[part]
    assert again["import"]["fingerprint"] == document["import"]["fingerprint"]


@pytest.mark.slow
def test_the_log_comes_from_the_model_beside_it(tmp_path: Path) -> None:
    """Sampling the first queries again gives the replies that stand in the log."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import gzip
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, str(ROOT / "data" / "make_demo_log.py"), "--check", "40"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.strip().splitlines()[-1])["same"] >= 0.99
    with gzip.open(demo_path() / "replies.jsonl.gz", "rt") as file:
        assert json.loads(next(file))["model"]
    assert (small_lm_path() / "model.safetensors").stat().st_size < 3_000_000
