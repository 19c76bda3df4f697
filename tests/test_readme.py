"""The README's words are commands and code; they must do what they say."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, make_log, make_queries, run_oirl

from oirl_data import small_lm_path

README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import oirl

    oirl.write_log(make_log(120), tmp_path / "log.parquet")
    monkeypatch.chdir(tmp_path)
    (block,) = code_blocks("python")
    assert len([line for line in block.splitlines() if line.strip()]) <= 6
    exec(compile(block, "README.md", "exec"), {})


def test_the_commands_of_the_readme_run(tmp_path: Path) -> None:
    rows = make_log(120).select(["query", "prompt", "correct"]).to_pylist()
    said = [f"{i % 3} + {4 - i % 3} is {4 if row['correct'] else 5}" for i, row in enumerate(rows)]
    graded = [json.dumps(row | {"response": r, "answer": "4"}) for row, r in zip(rows, said, strict=True)]
    (tmp_path / "runs.jsonl").write_text("\n".join(graded))
    cells = [f'"{query}",p {i % 2},x,{i % 2}' for i, query in enumerate(make_queries(9))]
    (tmp_path / "runs.csv").write_text("\n".join(["question,prompt,output,correct", *cells]))
    write_lm_eval(tmp_path / "results")
    shutil.copytree(small_lm_path(), tmp_path / "my-model")
    (tmp_path / "queries.jsonl").write_text(json.dumps({"query": "Tom has 3 red balls.", "answer": "3"}))
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt_id": "plain", "prompt": "{query}"}))
    commands = [line.split("#")[0].strip() for block in code_blocks("sh") for line in block.splitlines()]
    commands = [c for c in commands if c.startswith("oirl ")]
    assert len(commands) >= 6
    for command in commands:
        done = run_oirl(*shlex.split(command)[1:], cwd=tmp_path)
        assert done.returncode == 0, f"{command}: {done.stderr}"


def write_lm_eval(folder: Path) -> None:
    folder.mkdir()
    sample = {
        "doc": {"question": "2 + 2?"},
        "arguments": [["Q: 2 + 2?", {}]],
        "resps": [["4"]],
        "filtered_resps": ["4"],
    }
    scored = {"doc_id": 0, **sample, "metrics": ["exact_match"], "exact_match": 1.0}
    lines = [json.dumps(scored | {"filter": name}) for name in ("strict-match", "flexible-extract")]
    (folder / "samples_task_2026-01-01T00-00-00.jsonl").write_text("\n".join(lines))


def test_every_command_and_no_other_stands_in_the_readme() -> None:
    listed = set(re.findall(r"^\| .*?`oirl (\w+)", README, re.MULTILINE)) | {"formats", "doctor"}
    shown = run_oirl("--help").stdout.split("Commands:")[1]
    assert listed == {line.split()[0] for line in shown.splitlines() if re.match(r"  \w", line)}


def test_every_option_of_the_readme_is_one(tmp_path: Path) -> None:
    for name, options in re.findall(r"^\| `oirl (\w+)([^`]*)`", README, re.MULTILINE):
        help_text = run_oirl(name, "--help").stdout
        for option in re.findall(r"--[a-z]+", options):
            assert option in help_text, f"oirl {name} has no {option}"
