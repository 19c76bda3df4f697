"""docs/formats.md: its recipes are commands, and every format stands in it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run_oirl

import oirl
from oirl.registry import KINDS

DOCS = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
BLOCKS = [re.sub(r"\\\n\s*", "", block) for block in re.findall(r"```sh\n(.*?)```", DOCS, re.DOTALL)]
COMMANDS = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.startswith("oirl ")]

CHAT: dict[str, Any] = {
    "request": {"messages": [{"role": "system", "content": "Think."}, {"role": "user", "content": "1 + 1?"}]},
    "response": {
        "model": "m",
        "choices": [{"message": {"role": "assistant", "content": "So 2"}}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 2},
    },
    "metadata": {"answer": "2"},
}
LANGFUSE: dict[str, Any] = {
    "input": CHAT["request"]["messages"],
    "output": {"role": "assistant", "content": "So 2"},
    "promptName": "thinker",
    "latency": 0.5,
    "totalCost": 0.001,
    "scores": [{"name": "exact", "value": 1}],
}
WEAVE: dict[str, Any] = {
    "inputs": {"example": {"question": "1 + 1?", "answer": "2"}, "model": {"name": "m", "prompt": "Think."}},
    "output": {"output": "So 2", "scores": {"exact": {"correct": True}}},
}


@pytest.mark.parametrize(
    ("word", "file", "row", "expected"),
    [
        ("choices.0", "calls.jsonl", CHAT, {"model": "m", "tokens_in": 9, "tokens_out": 2, "answer": "2"}),
        ("observations", "observations.jsonl", LANGFUSE, {"latency_s": 0.5, "cost": 0.001}),
        ("inputs.example", "calls.jsonl", WEAVE, {"model": "m", "answer": "2"}),
    ],
)
def test_recipes_for_other_logs_run_as_they_stand(
    word: str, file: str, row: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    (command,) = [c for c in COMMANDS if word in c]
    (tmp_path / file).write_text(json.dumps(row) + "\n")
    done = run_oirl(*shlex.split(command)[1:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (found,) = oirl.read_log(tmp_path / "log.parquet").to_pylist()
    texts = {"query": "1 + 1?", "prompt": "Think.", "response": "So 2", "correct": True}
    assert {name: found[name] for name in texts | expected} == texts | expected


def test_every_format_stands_in_the_docs() -> None:
    said = re.sub(r"[^a-z0-9]+", "", DOCS.lower())
    names = {"inspect": "inspectai", "gsm8k": "gsm8k", "arrow": "hf://", "tsv": "table", "openai-evals": "openaievals"}
    for name in [*KINDS["formats"], *KINDS["exports"]]:
        assert re.sub(r"[^a-z0-9]+", "", names.get(name, name)) in said, name
    for name in KINDS["exports"]:
        assert f"`{name}`" in DOCS


def test_every_option_of_the_docs_is_one() -> None:
    help_text = {name: run_oirl(name, "--help").stdout for name in ("import", "export")}
    assert len(COMMANDS) >= 15
    for command in COMMANDS:
        name = shlex.split(command)[1]
        for option in re.findall(r"(?<= )--[a-z]+", command):
            assert option in help_text[name], command
