"""What a run asks its model for, what it leaves in its folder, and how it ends where nothing is left to learn."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from small_runs import CORRECT, RELABEL, make_queries, quick, write_queries, write_small_log

import oirl
from oirl.errors import ConfigError, DataError
from oirl.language_models import trained_prompts
from oirl.tuning.configuring import make_settings
from oirl.tuning.examples import Encoder
from oirl.tuning.policy import Policy
from oirl.tuning.relabelling import Ranks
from oirl.tuning.report import TuneReport
from oirl.tuning.rollouts import rollouts_of_log


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_small_log(tmp_path_factory.mktemp("log") / "log.parquet", 30)


@pytest.fixture(scope="module")
def queries(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_queries(make_queries(16, seed=2), tmp_path_factory.mktemp("queries") / "queries.jsonl")


def run(method: str, settings: dict[str, Any]) -> tuple[TuneReport, list[dict[str, Any]]]:
    told: list[dict[str, Any]] = []
    return oirl.tune(method, settings, progress=told.append), told


# What nothing was trained on is not asked for


def part_of(log: str, path: Path, keep: Callable[[dict[str, Any]], bool]) -> str:
    table = oirl.read_log(log)
    oirl.write_log(table.filter(pa.array([keep(row) for row in table.to_pylist()])), path)
    return str(path)


def test_hir_does_not_ask_for_what_no_response_followed(log: str, tmp_path: Path) -> None:
    wrong = part_of(log, tmp_path / "wrong.parquet", lambda row: not row["correct"])
    told: list[dict[str, Any]] = []
    with pytest.raises(DataError, match="no response follows") as raised:
        oirl.tune("hir", quick(tmp_path / "run", log=wrong, relabel=RELABEL), progress=told.append)
    assert "equal" in str(raised.value)
    assert not told


class Ranked(Ranks):
    """Quarters, named by numbers that the small model's tokenizer knows."""

    def __init__(self) -> None:
        super().__init__()
        self.instructions = tuple(f"{{prompt}} {share} ." for share in (25, 50, 55, 60))
        self.wanted = self.instructions[-1]


RANKED = {"name": "test_what_runs_leave:Ranked"}


def test_hir_by_ranks_asks_for_the_highest_that_was_given(log: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Of verdicts with ties only two of four ranks are given, and not the highest."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    settings = quick(tmp_path / "run", log=log, relabel=RANKED)
    report, told = run("hir", settings)
    given = next(row for row in told if row["kind"] == "rollouts")["given"]
    assert list(report.prompts.values()) == [f"{{query}} Work step by step. {share} ." for share in (55, 25)]
    assert sum(given.values()) == report.iterations[0]["examples"]
    assert set(trained_prompts(report.model) or []) == set(given)
    assert (trained_prompts(report.model) or [])[0] == next(iter(report.prompts.values()))
    assert [name for name in told[0] if name.startswith("success_instruction")] == [
        f"success_{name}" for name in report.prompts
    ]
    assert any(" 60 ." in text and " 55 ." in text for text in report.warnings)
    assert oirl.tune("hir", settings).to_dict() == report.to_dict()


def test_hir_asks_under_a_prompt_whose_responses_followed(log: str, tmp_path: Path) -> None:
    few = make_queries(8)[-1].query_id

    def keep(row: dict[str, Any]) -> bool:
        return row["correct"] == (row["prompt"] == "{query}") and (not row["correct"] or row["query_id"] <= few)

    apart = part_of(log, tmp_path / "apart.parquet", keep)
    prompts = oirl.read_log(apart)["prompt"].to_pylist()
    assert prompts.count("{query}") < len(prompts) / 2
    report, _ = run("hir", quick(tmp_path / "run", log=apart, relabel=RELABEL, held_out=0))
    asked = CORRECT.replace("{prompt}", "{query}")
    assert next(iter(report.prompts.values())) == asked
    found = trained_prompts(report.model) or []
    assert found[0] == asked
    assert CORRECT.replace("{prompt}", "{query} Work step by step.") not in found
    with pytest.raises(DataError, match="no response follows"):
        run(
            "hir",
            quick(tmp_path / "named", log=apart, relabel=RELABEL, prompt="{query} Work step by step.", held_out=0),
        )


def test_prompts_whose_responses_were_left_out_are_not_named(log: str, tmp_path: Path) -> None:
    table = oirl.read_log(log)
    cut = [json.dumps({"finish_reason": "length" if p == "{query}" else "stop"}) for p in table["prompt"].to_pylist()]
    marked = table.set_column(table.column_names.index("metadata"), "metadata", pa.array(cut))
    oirl.write_log(marked, tmp_path / "cut.parquet")
    report, _ = run("sft", quick(tmp_path / "run", log=str(tmp_path / "cut.parquet"), updates=1))
    assert trained_prompts(report.model) == ["{query} Work step by step."]


def test_sampled_hir_goes_on_with_the_highest_rank_that_was_given(
    queries: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    settings = quick(tmp_path / "run", queries=queries, relabel=RANKED, iterations=3, samples=2, updates=2)
    report, told = run("hir", settings)
    given: dict[str, int] = {}
    for row in (row for row in told if row["kind"] == "rollouts"):
        (asked,) = set(
            oirl.read_log(tmp_path / "run" / "rollouts" / f"iteration-{row['iteration']:03}")["prompt"].to_pylist()
        )
        highest = f"{{query}} {max([60] if not given else [int(text.split()[-2]) for text in given])} ."
        assert asked == highest
        given |= row["given"]
    assert set(trained_prompts(report.model) or []) == set(given)
    assert next(iter(report.prompts.values())) in given


# Whose the folder is


def test_a_start_with_a_wrong_model_keeps_no_right_one_out(log: str, tmp_path: Path) -> None:
    settings = quick(tmp_path / "run", log=log, updates=1)
    with pytest.raises(ConfigError, match="cannot load"):
        run("sft", settings | {"model": "no/such/model"})
    assert run("sft", settings)[0].iterations


def test_two_runs_at_once_are_not_let_into_one_folder(log: str, tmp_path: Path) -> None:
    settings = quick(tmp_path / "run", log=log, updates=2)
    refused: list[str] = []

    def again(row: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match="another process") as raised:
            oirl.tune("sft", settings)
        refused.append(str(raised.value))

    report = oirl.tune("sft", settings, progress=again)
    assert refused
    assert oirl.tune("sft", settings).to_dict() == report.to_dict()


# What a folder says of its run


def test_a_run_says_what_made_it(log: str, tmp_path: Path) -> None:
    for place in ("reward", "other"):
        rows = oirl.read_log(log)
        oirl.ResponseRewardModel().fit(rows if place == "reward" else rows.slice(0, 90)).save(tmp_path / place)
    settings = quick(tmp_path / "run", log=log, reward=str(tmp_path / "reward"), lora_rank=2, updates=1)
    run("raft", settings)
    identity = json.loads((tmp_path / "run" / "run.json").read_text())["identity"]
    assert set(identity["versions"]) == {"oirl", "torch", "transformers", "accelerate", "peft"}
    assert identity["reward_fingerprint"] != identity["model_fingerprint"]
    for name in ("weights.npz", "manifest.json"):
        (tmp_path / "other" / name).replace(tmp_path / "reward" / name)
    with pytest.raises(ConfigError, match="reward_fingerprint"):
        run("raft", settings)


def test_validations_keep_a_few_responses(log: str, tmp_path: Path) -> None:
    report, _ = run("sft", quick(tmp_path / "run", log=log, updates=1))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    measured = [row for row in lines if row["kind"] == "validation"]
    assert len(measured) == 2
    for row in measured:
        assert len(row["samples"]) == 3
        assert [int(sample["correct"]) for sample in row["samples"]] == row["right"][:3]
    assert all(sample["query"] and isinstance(sample["response"], str) for sample in measured[0]["samples"])
    assert "samples" not in report.before | report.after


def test_updates_tell_the_share_of_padding(log: str, tmp_path: Path) -> None:
    _, told = run("sft", quick(tmp_path / "run", log=log, held_out=0, batch=120, micro_batch=120, log_every=1))
    rows = oirl.read_log(log).to_pylist()
    (row,) = (row for row in told if row["kind"] == "update")
    policy = Policy(make_settings("sft", quick(tmp_path, log=log)))
    encoder = Encoder(policy)
    lengths = [len(e) for r in rollouts_of_log(oirl.read_log(log)) if (e := encoder.example(r, r.prompt))]
    assert len(lengths) > len(rows) / 2
    assert row["padding"] == pytest.approx(1 - sum(lengths) / (len(lengths) * max(lengths)))


# What ends early


CALLS = [0]


def good_once(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Pay for the responses of the first iteration only."""
    CALLS[0] += 1
    return [1.0 if CALLS[0] == 1 else 0.0 for _ in completions]


@pytest.mark.parametrize("keep", ["best", "last"])
def test_an_iteration_with_nothing_to_choose_ends_the_run_with_what_it_has(
    keep: str, queries: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import test_what_runs_leave

    test_what_runs_leave.CALLS[0] = 0
    changes = {
        "queries": queries,
        "reward": "test_what_runs_leave:good_once",
        "min_reward": 0.5,
        "samples": 2,
        "keep": keep,
    }
    settings = quick(tmp_path / "run", iterations=3, updates=2, **changes)
    report, told = run("raft", settings)
    assert [row["iteration"] for row in report.iterations] == [0]
    assert report.kept == {"iteration": 0, "step": 2}
    assert any("ended after 1 of 3 iterations" in text and "min_reward" in text for text in report.warnings)
    assert told[-1]["kind"] == "guard"
    with oirl.open_engine("transformers", report.model) as engine:
        assert engine.generate(["Anna has 3 apples."], oirl.Sampling(max_tokens=4))
    assert oirl.tune("raft", settings).to_dict() == report.to_dict()
    with pytest.raises(DataError, match="min_reward"):
        run("raft", settings | {"out": str(tmp_path / "first")})
