"""docs/online.md: its commands run in their order, and every setting, default and name in it is there."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, run_oirl

import oirl
from oirl.records import Query
from oirl.tuning.configuring import ONLINE, SUPERVISED, make_settings
from oirl.tuning.settings import Sampled
from oirl_data import small_lm_path
from oirl_data.problems import generate_problems

DOCS = (ROOT / "docs" / "online.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import random

    path = tmp_path_factory.mktemp("online-docs")
    shutil.copytree(small_lm_path(), path / "my-model")
    problems = generate_problems(140, random.Random(0), held_out=True)
    queries = [Query(f"q{i}", p.query, str(p.answer)) for i, p in enumerate(problems)]
    with oirl.open_engine("transformers", str(small_lm_path())) as engine:
        sampling = oirl.Sampling(48)
        oirl.collect(
            engine, queries[:60], [("plain", "{query}")], path / "raw.parquet", sampling=sampling, replicates=4
        )
    names = ("query_id", "query", "prompt_id", "prompt", "response", "answer", "replicate")
    rows = oirl.read_log(path / "raw.parquet").select(names).to_pylist()
    (path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, some in (("queries", queries[:100]), ("test", queries[100:])):
        lines = [json.dumps({"query_id": q.query_id, "query": q.query, "answer": q.answer}) for q in some]
        (path / f"{name}.jsonl").write_text("\n".join(lines))
    for name in ("before", "after"):
        (path / f"{name}.jsonl").write_text(json.dumps({"prompt_id": name, "prompt": "{query}"}))
    (settings,) = re.findall(r"```yaml\n(.*?)```", DOCS, re.DOTALL)
    (path / "apa.yaml").write_text(settings)
    return path


@pytest.mark.slow
def test_a_log_becomes_an_aligned_model(folder: Path) -> None:
    (block,) = re.findall(r"```sh\n(.*?)```", DOCS, re.DOTALL)
    commands = block.strip().splitlines()
    names = "import pairs split fit evaluate tune generate generate audit"
    assert [shlex.split(command)[1] for command in commands] == names.split()
    for command in commands:
        done = run_oirl(*shlex.split(command)[1:], cwd=folder)
        assert done.returncode == 0, f"{command}: {done.stderr}"
    assert "after" in done.stdout
    lines = [json.loads(line) for line in (folder / "aligned" / "metrics.jsonl").read_text().splitlines()]
    validations = [line for line in lines if line["kind"] == "validation"]
    assert all({"reward", "success"} <= set(line) for line in validations)


def table(heading: str) -> list[list[str]]:
    lines = DOCS.split(heading)[1].split("\n\n")
    rows = next(part for part in lines if part.startswith("|")).splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_every_setting_is_told_of_and_every_one_told_of_is_there() -> None:
    told = {name for row in table("## Settings") for name in re.findall(r"`(\w+)`", row[0])}
    own = {name for kind in ONLINE.values() for name in kind.model_fields}
    shared = set(Sampled.model_fields) | {"log"}
    assert told <= own
    assert own - shared <= told
    assert {"epochs", "batch", "learning_rate", "iterations"} <= told


def test_the_defaults_are_those_told_of() -> None:
    shown = {
        "iterations": 100, "samples": 1, "batch": 32, "learning_rate": 1e-5, "schedule": "constant", "warmup": 0,
        "average": "token", "baseline": "value_network", "gamma": 1, "gae_lambda": 0.95, "whiten": "standardise",
        "value_coef": 1, "entropy_coef": 0, "reward_clip": 10, "missing_eos_penalty": 0, "on_exceed": "stop",
        "save_every": 10, "evaluate_every": 10, "anchor": "initial", "max_weight": 20, "clip_range": 0.2,
        "kl_controller": "adaptive", "kl_target": 6, "kl_horizon": 10000,
    }  # fmt: skip
    fields = {name: field for kind in ONLINE.values() for name, field in kind.model_fields.items()}
    assert {name: fields[name].default for name in shown} == shown
    for name, value in shown.items():
        (row,) = [row for row in table("## Settings") if f"`{name}`" in row[0]]
        assert str(value).replace("1e-05", "1e-5") in row[1], row
    several = {
        "kl_coef": (0.1, 0.05, 1.0),
        "rollouts": (64, 128, 64),
        "epochs": (2, 4, 2),
        "value_clip": (None, 0.2, None),
    }
    for name, values in several.items():
        assert tuple(ONLINE[m].model_fields[name].default for m in ("apa", "ppo", "awr")) == values


def test_every_method_is_told_of_and_its_example_is_sound() -> None:
    assert {row[0].strip("`") for row in table("## Methods")} == set(ONLINE)
    assert not set(ONLINE) & set(SUPERVISED)
    for method in ONLINE:
        entries = yaml.safe_load((ROOT / "examples" / f"{method}.yaml").read_text(encoding="utf-8"))
        assert make_settings(method, entries).method == method
