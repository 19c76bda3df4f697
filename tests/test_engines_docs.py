"""docs/engines.md: its commands and its Python run, and every engine and parameter that it names is there."""

from __future__ import annotations

import inspect
import json
import random
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, run_oirl

from oirl.engines.designs import DESIGNS
from oirl.registry import KINDS, resolve
from oirl_data import small_lm_path
from oirl_data.problems import generate_problems

DOCS = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(small_lm_path(), tmp_path / "my-model")
    problems = generate_problems(30, random.Random(0))
    queries = [json.dumps({"query": p.query, "answer": str(p.answer)}) for p in problems]
    (tmp_path / "queries.jsonl").write_text("\n".join(queries))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "{query} Answer only."}\n{"prompt": "{query}"}')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_of_engines_run(folder: Path) -> None:
    (block,) = re.findall(r"```sh\n(.*?)```", DOCS, re.DOTALL)
    commands = [line.split("#")[0].strip() for line in block.splitlines()]
    assert len(commands) == 3
    for command in commands:
        done = run_oirl(*shlex.split(command)[1:], cwd=folder)
        assert done.returncode == 0, f"{command}: {done.stderr}"


def test_the_python_of_engines_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    exec(compile(block, "engines.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_every_engine_parameter_and_design_stands_there() -> None:
    for name in KINDS["engines"]:
        (row,) = re.findall(rf"^\| `{name}` \|(.*)$", DOCS, re.MULTILINE)
        known = set(inspect.signature(resolve("engines", name)).parameters) - {"model", "tokenizer"}
        assert known == set(re.findall(r"`(\w+)`", row.split("|")[1])), name
    for design in DESIGNS:
        assert f"`{design}`" in DOCS or f"--{design}" in DOCS
