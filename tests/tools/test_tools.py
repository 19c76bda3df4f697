"""What oirl exports, loaded by the tools themselves, and what they then write, imported again.

The tools are no test dependency: `make test-tools` installs them into an environment of their own. promptfoo comes from
npm; it is found on PATH, or where the variable PROMPTFOO says.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

import oirl

PROMPTS = {
    "think": "Think, then answer.",
    "ask": 'Q: {query}\nSay "A:" and the number.',
    "fix": "See a/main.py: {query}",
}
QUERIES = {
    "a": ("What is 1 + 1?", "2"),
    "b": ("What is {{3}} less \\frac{{1}}{{x}}, \u201cplease\u201d?", "2"),
    "c": ("Nine?", "9"),
}
OFFLINE = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "PROMPTFOO_DISABLE_TELEMETRY": "1"}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    rows = [
        {
            "query_id": q,
            "query": text,
            "prompt_id": p,
            "prompt": prompt,
            "response": f"A: {gold}" if p == "ask" else "A: 0",
            "correct": p == "ask",
            "answer": gold,
        }
        for q, (text, gold) in QUERIES.items()
        for p, prompt in PROMPTS.items()
    ]
    oirl.write_log(pa.Table.from_pylist(rows), tmp_path / "log.parquet")
    return tmp_path / "log.parquet"


def run(*command: str, cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, env=os.environ | OFFLINE, capture_output=True, text=True, timeout=300)
    assert done.returncode in {0, 100}, done.stderr[-3000:]  # promptfoo ends with 100 where tests fail


def test_lm_eval_runs_the_tasks_and_its_samples_come_back(log: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    oirl.export_log(log, tmp_path / "task", to="lm-eval")
    arguments = "--model dummy --include_path . --tasks oirl --log_samples --output_path results".split()
    run(sys.executable, "-m", "lm_eval", *arguments, cwd=tmp_path / "task")
    oirl.import_log(tmp_path / "task" / "results", tmp_path / "back.parquet")
    back = oirl.read_log(tmp_path / "back.parquet")
    assert back.num_rows == 9
    assert set(back["query"].to_pylist()) == {text for text, _ in QUERIES.values()}
    assert set(back["model"].to_pylist()) == {"dummy"}
    assert set(back["query_id"].to_pylist()) == set(QUERIES)
    assert set(back["prompt_id"].to_pylist()) == set(PROMPTS)
    assert dict(zip(back["prompt_id"].to_pylist(), back["prompt"].to_pylist(), strict=True)) == PROMPTS


def test_promptfoo_runs_the_config_and_its_results_come_back(log: Path, tmp_path: Path) -> None:
    promptfoo = os.environ.get("PROMPTFOO") or shutil.which("promptfoo")
    if not promptfoo:
        pytest.skip("promptfoo is not installed (npm install -g promptfoo)")
    oirl.export_log(log, tmp_path / "config.yaml", to="promptfoo")
    run(promptfoo, "eval", "-c", "config.yaml", "--no-write", "--no-cache", "-o", "results.json", cwd=tmp_path)
    report = oirl.import_log(tmp_path / "results.json", tmp_path / "back.parquet")
    back = oirl.read_log(tmp_path / "back.parquet")
    assert back.num_rows == 9
    assert {p["prompt"]: p["fits"] for p in report.prompts} == {
        "Think, then answer.\n\n{{query}}": 3,
        'Q: {{query}}\nSay "A:" and the number.': 3,
        "See a/main.py: {{query}}": 3,
    }
    assert set(back["query"].to_pylist()) == {text for text, _ in QUERIES.values()}
    # The provider echoes what it was given.
    asked = zip(back["query"].to_pylist(), back["response"].to_pylist(), strict=True)
    assert all(query in response and "set _" not in response for query, response in asked)


@pytest.mark.parametrize("format", ["trl-preference", "trl-unpaired", "trl-sft", "openai-finetune"])
def test_trl_knows_the_files(format: str, log: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data_utils = pytest.importorskip("trl.data_utils")
    oirl.export_log(log, tmp_path / "out.jsonl", to=format)
    loaded = datasets.load_dataset(
        "json", data_files=str(tmp_path / "out.jsonl"), split="train", cache_dir=str(tmp_path)
    )
    assert len(loaded) == {"trl-preference": 3, "trl-unpaired": 9, "trl-sft": 3, "openai-finetune": 3}[format]
    assert data_utils.is_conversational(loaded[0])
    if format == "trl-preference":
        unpaired = data_utils.unpair_preference_dataset(loaded)
        assert sorted(unpaired["label"]) == [False] * 3 + [True] * 3
        assert json.loads(json.dumps(loaded[0]["chosen"])) == [{"role": "assistant", "content": "A: 2"}]
