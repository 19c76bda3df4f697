"""docs/tuning.md: its commands and its Python run, and every setting, default and name in it is there."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, run_oirl

import oirl
from oirl.records import Query
from oirl.registry import KINDS
from oirl.tuning.configuring import SUPERVISED
from oirl_data import small_lm_path
from oirl_data.problems import generate_problems

DOCS = (ROOT / "docs" / "tuning.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import random

    path = tmp_path_factory.mktemp("tuning-docs")
    shutil.copytree(small_lm_path(), path / "my-model")
    problems = generate_problems(40, random.Random(0), held_out=True)
    queries = [Query(f"q{i}", p.query, str(p.answer)) for i, p in enumerate(problems)]
    with oirl.open_engine("transformers", str(small_lm_path())) as engine:
        prompts = [("plain", "{query}")]
        oirl.collect(
            engine, queries, prompts, path / "raw.parquet", sampling=oirl.Sampling(48), grade="numeric", replicates=4
        )
    names = ("query_id", "query", "prompt_id", "prompt", "response", "answer", "replicate")
    rows = oirl.read_log(path / "raw.parquet").select(names).to_pylist()
    (path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("before", "after"):
        (path / f"{name}.jsonl").write_text(json.dumps({"prompt_id": name, "prompt": "{query}"}))
    (yaml,) = re.findall(r"```yaml\n(.*?)```", DOCS, re.DOTALL)
    (path / "raft.yaml").write_text(yaml)
    return path


@pytest.mark.slow
def test_the_commands_of_tuning_run(folder: Path) -> None:
    (block,) = re.findall(r"```sh\n(.*?)```", DOCS, re.DOTALL)
    commands = block.strip().splitlines()
    names = "import split fit tune generate generate audit split fit evaluate"
    assert [shlex.split(command)[1] for command in commands] == names.split()
    for command in commands:
        done = run_oirl(*shlex.split(command)[1:], cwd=folder)
        assert done.returncode == 0, f"{command}: {done.stderr}"
    assert "after" in run_oirl("audit", "both", cwd=folder).stdout
    evaluated = json.loads(run_oirl("evaluate", "choice", "halves/test.parquet", "--json", cwd=folder).stdout)
    assert {"best_prompt", "selector", "random"} <= set(evaluated["policies"])


def test_the_python_of_tuning_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    shutil.copy(folder / "raw.parquet", folder / "log.parquet")
    (code,) = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    exec(code, {})
    assert (folder / "filtered" / "model" / "config.json").is_file()


def table(heading: str) -> list[list[str]]:
    lines = DOCS.split(heading)[1].split("\n\n")
    rows = next(part for part in lines if part.startswith("|")).splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_every_setting_is_told_of_and_every_one_told_of_is_there() -> None:
    told = {name for row in table("## Settings") for name in re.findall(r"`(\w+)`", row[0])}
    assert told == {name for kind in SUPERVISED.values() for name in kind.model_fields}


def test_the_defaults_are_those_told_of() -> None:
    shown = {
        "epochs": 1, "batch": 32, "micro_batch": 8, "learning_rate": 2e-5, "schedule": "linear", "warmup": 0.05,
        "weight_decay": 0, "max_grad_norm": 1, "lora_rank": 0, "max_tokens": 512, "held_out": 0.1,
        "validation_queries": 200, "validation_temperature": 0, "log_every": 10, "save_every": 100, "keep": "best",
        "seed": 0, "iterations": 1, "samples": 8, "engine": "transformers", "select": "best_per_query",
        "top_fraction": 0.125, "kl_coef": 0, "suboutputs": 0, "contrastive": "opposite", "contrastive_coef": 1,
        "entropy_coef": 0.001, "label_smoothing": 0,
    }  # fmt: skip
    fields = {name: field for kind in SUPERVISED.values() for name, field in kind.model_fields.items()}
    assert {name: fields[name].default for name in shown} == shown
    assert SUPERVISED["raft"].model_fields["temperature"].default == 0.85
    assert SUPERVISED["hir"].model_fields["temperature"].default == 1
    for name, value in shown.items():
        (row,) = [row for row in table("## Settings") if f"`{name}`" in row[0]]
        text = str(value).replace("2e-05", "2e-5")
        assert text in row[1], row


def test_every_method_and_relabelling_is_told_of() -> None:
    assert [row[0].strip("`") for row in table("## Methods")] == list(SUPERVISED)
    assert all(f"`{name}`" in DOCS for name in KINDS["relabellings"])
