"""docs/response_models.md: its commands and its Python run, and every model that it names is registered."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import ROOT, make_queries, run_oirl

import oirl
from oirl.registry import KINDS

DOCS = (ROOT / "docs" / "response_models.md").read_text(encoding="utf-8")


def responses(queries: list[str]) -> pa.Table:
    """Return a log in which right replies calculate rightly, and wrong ones wrongly."""
    rows = []
    for i, query in enumerate(queries):
        for k in range(4):
            a, b = i % 7 + 1, k + 2
            right = (i + k) % 2 == 0
            said = f"{a} + {b} = {a + b if right else a + b + 1}. The answer is {9 if right else k}."
            rows.append({"query_id": f"q{i}", "query": query, "prompt_id": "p", "prompt": "{query}", "response": said})
            rows[-1] |= {"correct": right, "answer": "9", "replicate": k, "split": "train" if i % 3 else "test"}
    return pa.Table.from_pylist(rows)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    log = responses(make_queries(60))
    oirl.write_log(log, tmp_path / "log.parquet")
    candidates = log.select(["query", "response"]).slice(0, 40).to_pylist()
    (tmp_path / "candidates.jsonl").write_text("\n".join(str(row).replace("'", '"') for row in candidates))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_run(folder: Path) -> None:
    (block,) = re.findall(r"```sh\n(.*?)```", DOCS, re.DOTALL)
    commands = [line.split("#")[0].strip() for line in block.splitlines()]
    assert len(commands) == 7
    for command in commands:
        done = run_oirl(*shlex.split(command)[1:], cwd=folder)
        assert done.returncode == 0, f"{command}: {done.stderr}"


def test_the_python_runs(folder: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(block, "response_models.md", "exec"), names)
    assert names["reward"](["What is 2 + 3?"], ["2 + 3 = 5"]) != names["reward"](["What is 2 + 3?"], ["2 + 3 = 6"])


def test_every_model_stands_there() -> None:
    for kind in ("response-models", "preference-models", "embedders"):
        for name in KINDS[kind]:
            assert f"`{name}" in DOCS, name
