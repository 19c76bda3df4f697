"""Runs of every method on the small language model: what they learn, what they tell, what they refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import ROOT
from small_runs import CORRECT, RELABEL, WRONG, make_queries, quick, write_queries, write_small_log

import oirl
from oirl.errors import ConfigError, DataError, MissingPackageError, NotFoundError, OirlError
from oirl.language_models import trained_prompts
from oirl.tuning.configuring import make_settings
from oirl.tuning.report import TuneReport
from oirl_data import small_lm_path


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_small_log(tmp_path_factory.mktemp("log") / "log.parquet", 30)


@pytest.fixture(scope="module")
def queries(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_queries(make_queries(16, seed=2), tmp_path_factory.mktemp("queries") / "queries.jsonl")


def run(method: str, settings: dict[str, Any]) -> tuple[TuneReport, list[dict[str, Any]]]:
    told: list[dict[str, Any]] = []
    return oirl.tune(method, settings, progress=told.append), told


def losses(told: list[dict[str, Any]]) -> list[float]:
    return [row["supervised"] for row in told if row["kind"] == "update"]


def long_is_good(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Reward length, as a bad reward model would."""
    return [float(len(text.split())) for text in completions]


def one_too_few(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Return what no reward may."""
    return [0.0] * (len(completions) - 1)


# What is learned


def test_sft_learns_what_it_is_given(log: str, tmp_path: Path) -> None:
    report, told = run("sft", quick(tmp_path / "run", log=log, epochs=6, learning_rate=1e-3, held_out=0, log_every=4))
    assert sum(losses(told)[-5:]) < 0.9 * sum(losses(told)[:5])
    assert report.iterations[0]["examples"] + sum(report.left_out.values()) == report.iterations[0]["responses"]
    assert trained_prompts(report.model) == ["{query} Work step by step.", "{query}"]


def test_filter_learns_from_right_responses_only(log: str, tmp_path: Path) -> None:
    right = sum(row["correct"] for row in oirl.read_log(log).to_pylist())
    report, _ = run("filter", quick(tmp_path / "run", log=log, held_out=0))
    assert report.iterations[0]["examples"] == right
    assert report.iterations[0]["success"] == pytest.approx(right / report.iterations[0]["responses"])


def test_nothing_is_learned_from_held_out_queries(log: str, tmp_path: Path) -> None:
    whole, part = (run("sft", quick(tmp_path / f"run{h}", log=log, held_out=h))[0] for h in (0, 0.5))
    assert part.iterations[0]["queries"] == whole.iterations[0]["queries"] / 2
    assert part.before["loss"] > 0
    assert "gain" not in whole.after


def test_rows_marked_test_are_not_learned_from(log: str, tmp_path: Path) -> None:
    train, test = oirl.split(oirl.read_log(log), test=0.5)
    for name, table in (("train", train), ("test", test)):
        oirl.write_log(table, tmp_path / "both" / f"{name}.parquet")
    report, _ = run("sft", quick(tmp_path / "run", log=str(tmp_path / "both"), held_out=0))
    assert report.iterations[0]["responses"] == len(train)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_rows_marked_test_are_not_learned_from_where_no_others_are_marked(
    share: float, log: str, tmp_path: Path
) -> None:
    table = oirl.read_log(log)
    marks = ["test" if q < f"q{30 * share:03.0f}" else None for q in table["query_id"].to_pylist()]
    marked = table.set_column(table.column_names.index("split"), "split", pa.array(marks, pa.string()))
    oirl.write_log(marked, tmp_path / "marked.parquet")
    settings = quick(tmp_path / "run", log=str(tmp_path / "marked.parquet"), held_out=0)
    if share == 1:
        with pytest.raises(DataError, match="all rows are marked `test`"):
            run("sft", settings)
        queries = [{"query": q.query, "answer": q.answer, "split": "test"} for q in make_queries(12)]
        (tmp_path / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
        with pytest.raises(DataError, match="all rows are marked `test`"):
            run("raft", quick(tmp_path / "run", queries=str(tmp_path / "queries.jsonl")))
        return
    assert run("sft", settings)[0].iterations[0]["responses"] == marks.count(None) == len(table) / 2


def test_adapters_are_trained_alone_and_generate(log: str, queries: str, tmp_path: Path) -> None:
    report, told = run("sft", quick(tmp_path / "run", log=log, lora_rank=8, epochs=6, learning_rate=2e-3, held_out=0))
    assert sum(losses(told)[-3:]) < sum(losses(told)[:3])
    names = {path.name for path in Path(report.model).iterdir()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names
    with oirl.open_engine("transformers", str(small_lm_path()), {"adapter": report.model}) as engine:
        ((completion,),) = engine.generate(["Anna has 3 apples."], oirl.Sampling(max_tokens=4))
    assert completion.error is None


def test_activations_computed_again_change_nothing(log: str, tmp_path: Path) -> None:
    kept, again = (
        run("sft", quick(tmp_path / f"run{flag}", log=log, gradient_checkpointing=flag, held_out=0))[1]
        for flag in (False, True)
    )
    assert losses(again) == pytest.approx(losses(kept), rel=1e-4)


def test_the_size_of_micro_batches_changes_nothing(log: str, tmp_path: Path) -> None:
    settings = {"log": log, "held_out": 0, "epochs": 1, "updates": None}
    settings.pop("updates")
    told = [
        run("sft", quick(tmp_path / f"run{size}", **settings, batch=120, micro_batch=size, log_every=1, save_every=1))[
            1
        ]
        for size in (120, 8)
    ]
    first, second = (next(row for row in rows if row["kind"] == "update") for rows in told)
    assert second["loss"] == pytest.approx(first["loss"], rel=1e-4)
    assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-3)
    assert first["loss"] == pytest.approx(first["supervised"], rel=1e-4)  # one update: the mean over its tokens


def test_raft_of_a_log_takes_the_best_of_each_query(log: str, tmp_path: Path) -> None:
    rows = oirl.read_log(log).to_pylist()
    solved = {row["query_id"] for row in rows if row["correct"]}
    report, _ = run("raft", quick(tmp_path / "run", log=log, held_out=0))
    figures = report.iterations[0]
    assert figures["chosen"] == figures["examples"] == len(solved)
    assert figures["chosen_reward"] == 1
    assert figures["queries_without_reward"] == pytest.approx(1 - len(solved) / len({r["query_id"] for r in rows}))


def test_raft_samples_rewards_and_tells_the_drift(queries: str, tmp_path: Path) -> None:
    report, _ = run(
        "raft", quick(tmp_path / "run", queries=queries, iterations=2, samples=4, kl_coef=0.1, min_reward=0.0, epochs=3)
    )
    first, second = report.iterations
    assert abs(first["kl"]) < 1e-3  # nothing was learned yet
    assert second["kl"] > 0.01
    assert first["responses"] == 4 * first["queries"]
    logs = [oirl.read_log(tmp_path / "run" / "rollouts" / f"iteration-{i:03}") for i in range(2)]
    assert [len(log) for log in logs] == [first["responses"], second["responses"]]
    assert first["success"] == pytest.approx(sum(logs[0]["correct"].to_pylist()) / len(logs[0]))
    assert first["tokens"] == sum(logs[0]["tokens_out"].to_pylist())


def test_raft_follows_a_bad_reward_and_the_figures_show_it(queries: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    report, _ = run(
        "raft",
        quick(tmp_path / "run", queries=queries, reward="test_tuning_runs:long_is_good", iterations=3, samples=8,
              epochs=6, learning_rate=1e-3, held_out=0, select="top_fraction", top_fraction=0.2),
    )  # fmt: skip
    assert report.iterations[-1]["reward"] > report.iterations[0]["reward"]
    assert report.iterations[-1]["words"] > report.iterations[0]["words"]
    distinct = report.iterations[0]["responses"] * (1 - report.iterations[0]["duplicates"])
    assert report.iterations[0]["chosen"] == pytest.approx(distinct / 5, abs=1)


def test_raft_by_a_reward_model_of_a_log(log: str, tmp_path: Path) -> None:
    oirl.ResponseRewardModel().fit(oirl.read_log(log)).save(tmp_path / "reward")
    report, _ = run("raft", quick(tmp_path / "run", log=log, reward=str(tmp_path / "reward"), held_out=0))
    assert report.iterations[0]["chosen"] == 30
    assert report.iterations[0]["chosen_reward"] > report.iterations[0]["reward"]


def test_hir_learns_from_failures_too(log: str, tmp_path: Path) -> None:
    report, told = run("hir", quick(tmp_path / "run", log=log, relabel=RELABEL, suboutputs=1, held_out=0, epochs=3))
    assert report.iterations[0]["examples"] > 1.5 * report.iterations[0]["responses"]
    updates = [row for row in told if row["kind"] == "update"]
    assert updates[-1]["contrastive"] < updates[0]["contrastive"]
    assert list(report.prompts.values()) == [
        CORRECT.replace("{prompt}", "{query} Work step by step."),
        WRONG.replace("{prompt}", "{query} Work step by step."),
    ]
    assert len(trained_prompts(report.model) or []) == 4


def test_hir_samples_under_the_instruction_that_it_is_trained_on(queries: str, tmp_path: Path) -> None:
    report, told = run("hir", quick(tmp_path / "run", queries=queries, relabel=RELABEL, iterations=2, samples=2))
    asked = CORRECT.replace("{prompt}", "{query}")
    for iteration in range(2):
        log = oirl.read_log(tmp_path / "run" / "rollouts" / f"iteration-{iteration:03}")
        assert set(log["prompt"].to_pylist()) == {asked}
    assert (trained_prompts(report.model) or [])[0] == asked
    validations = [row for row in told if row["kind"] == "validation"]
    assert {"success_instruction_0", "success_instruction_1"} <= set(validations[0])


@pytest.mark.parametrize(
    "relabel",
    [
        {"name": "length", "limits": [4], "text": "{prompt} in {limit} and", "longer": "{prompt} Work step by step."},
        {"name": "format", "pattern": r"is \d+\.$", "matching": "{prompt} + +", "other": "{prompt} - -"},
        {"name": "ranks", "text": "{prompt} {share} .", "bins": 2},
    ],
    ids=["length", "format", "ranks"],
)
def test_hir_relabels_by_other_things(relabel: dict[str, Any], log: str, tmp_path: Path) -> None:
    report, _ = run("hir", quick(tmp_path / "run", log=log, relabel=relabel, held_out=0))
    assert report.iterations[0]["examples"] > 0


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_model_asked_otherwise_than_it_was_tuned_is_told_of(lora_rank: int, log: str, tmp_path: Path) -> None:
    settings = quick(tmp_path / "run", log=log, relabel=RELABEL, held_out=0, updates=1, lora_rank=lora_rank)
    report, _ = run("hir", settings)
    (right,) = (text for text in (trained_prompts(report.model) or [])[:1])
    model, params = (str(small_lm_path()), {"adapter": report.model}) if lora_rank else (report.model, {})
    with oirl.open_engine("transformers", model, params) as engine:
        for name, template in (("right", right), ("other", right + " ")):
            told = oirl.collect(
                engine, make_queries(2), [(name, template)], tmp_path / f"{name}.parquet", sampling=oirl.Sampling(4)
            )
            assert any("tuned under other prompts" in text for text in told.warnings) == (name == "other")


def test_the_best_validation_is_the_result(log: str, tmp_path: Path) -> None:
    best, _ = run("sft", quick(tmp_path / "best", log=log, grade=None, epochs=8, learning_rate=3e-3))
    last, told = run("sft", quick(tmp_path / "last", log=log, grade=None, epochs=8, learning_rate=3e-3, keep="last"))
    measured = [row["loss"] for row in told if row["kind"] == "validation"]
    assert best.after["loss"] == min(measured[1:]) < measured[-1] == last.after["loss"]
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("best", "last")]
    assert weights[0] != weights[1]
    beside = json.loads((tmp_path / "best" / "model" / "validation.json").read_text())
    assert (beside["loss"], beside["step"]) == (best.after["loss"], best.kept["step"])
    assert not (tmp_path / "last" / "model" / "validation.json").exists()


def test_metrics_go_to_tensorboard(log: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, told = run("sft", quick(tmp_path / "run", log=log, report_to="tensorboard", grade=None))
    (file,) = (tmp_path / "run").rglob("events.*")
    events = EventAccumulator(str(file.parent))
    events.Reload()
    shown = [(e.step, pytest.approx(e.value)) for e in events.Scalars("train/loss")]
    assert [(row["step"], row["loss"]) for row in told if row["kind"] == "update"] == shown


# What is refused


@pytest.mark.parametrize(
    ("method", "changes", "error", "words"),
    [
        ("sft", {"model": "no/such/folder"}, ConfigError, "no/such/folder"),
        ("sft", {"log": "none.parquet"}, NotFoundError, "none.parquet"),
        ("sft", {"max_length": 5}, DataError, "more than 5 tokens"),
        ("sft", {"log": "CUT OFF"}, DataError, "cut off"),
        ("sft", {"report_to": "nowhere"}, ConfigError, "nowhere"),
        ("sft", {"report_to": "comet_ml"}, MissingPackageError, "comet"),
        ("sft", {"prompt": "{query} Never seen."}, ConfigError, "Never seen"),
        ("raft", {"min_reward": 2}, DataError, "min_reward"),
        ("raft", {"reward": "score"}, DataError, "no response has a reward"),
        ("raft", {"reward": "no/such/model"}, NotFoundError, "no/such/model"),
        ("raft", {"reward": "test_tuning_runs:one_too_few"}, DataError, "rewards for"),
        ("raft", {"reward": "test_tuning_runs:ROOT"}, ConfigError, "not a function"),
        ("hir", {"relabel": {"name": "correctness"}}, ConfigError, "same tokens"),
        ("hir", {"relabel": {"name": "correctnes"}}, OirlError, "correctness"),
        ("hir", {"relabel": {"name": "correctness", "right": "x"}}, ConfigError, "right"),
        ("hir", {"relabel": {"name": "correctness", "correct": "a", "wrong": "a"}}, ConfigError, "equal"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_computed(
    method: str, changes: dict[str, Any], error: type[Exception], words: str, log: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    told: list[dict[str, Any]] = []
    if changes.get("log") == "CUT OFF":
        changes = {"log": all_cut_off(log, tmp_path / "cut.parquet")}
    with pytest.raises(error) as raised:
        oirl.tune(method, quick(tmp_path / "run", **{"log": log} | changes), progress=told.append)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not told


def all_cut_off(log: str, path: Path) -> str:
    table = oirl.read_log(log)
    cut = pa.array([json.dumps({"finish_reason": "length"})] * len(table))
    oirl.write_log(table.set_column(table.column_names.index("metadata"), "metadata", cut), path)
    return str(path)


def test_a_log_without_verdicts_is_refused_where_they_are_needed(log: str, tmp_path: Path) -> None:
    table = oirl.read_log(log)
    oirl.write_log(table.drop_columns(["correct"]), tmp_path / "plain.parquet")
    for method in ("filter", "raft", "hir"):
        with pytest.raises(DataError, match=r"verdict|right"):
            oirl.tune(method, quick(tmp_path / method, log=str(tmp_path / "plain.parquet")))


def test_responses_that_were_cut_off_are_left_out(log: str, tmp_path: Path) -> None:
    rows = oirl.read_log(log).to_pylist()
    for row in rows[:7]:
        row["metadata"] = json.dumps({"finish_reason": "length"})
    oirl.write_log(pa.Table.from_pylist(rows, oirl.read_log(log).schema), tmp_path / "cut.parquet")
    report, _ = run("sft", quick(tmp_path / "run", log=str(tmp_path / "cut.parquet"), held_out=0))
    assert report.left_out["cut off at the limit of tokens"] >= 7


def test_a_tokenizer_without_a_padding_token_is_no_hindrance(log: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small_lm_path())
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(small_lm_path()).save_pretrained(tmp_path / "model")
    without, _ = run("sft", quick(tmp_path / "without", model=str(tmp_path / "model"), log=log))
    with_one, _ = run("sft", quick(tmp_path / "with", log=log))
    assert without.after["loss"] == with_one.after["loss"]


def test_a_loss_that_is_no_number_ends_the_run(log: str, tmp_path: Path) -> None:
    with pytest.raises(OirlError, match="learning_rate"):
        oirl.tune("sft", quick(tmp_path / "run", log=log, learning_rate=1e30, grade=None, epochs=4, warmup=0))


# The command line


def oirl_tune(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / p) for p in (".", "cli", "data"))}
    command = [sys.executable, "-m", "oirl_cli", "tune", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_command_takes_a_file_and_settings_over_it(log: str, tmp_path: Path) -> None:
    lines = [f"{name}: {json.dumps(value)}" for name, value in quick(tmp_path / "run", log=log).items()]
    (tmp_path / "c.yaml").write_text("\n".join(lines))
    done = oirl_tune("filter", "--config", str(tmp_path / "c.yaml"), "--set", "epochs=2", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["method"] == "filter"
    assert report["after"]["gain_ci_low"] <= report["after"]["gain"]
    assert "tokens/s" in done.stderr
    for_people = oirl_tune("filter", "--config", str(tmp_path / "c.yaml"), "--set", "epochs=2")
    assert "gain on held-out queries" in for_people.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sft"], "needs `model`"),
        (["sfft", "--set", "model=m"], "did you mean 'sft'"),
        (["sft", "--config", "none.yaml"], "none.yaml"),
        (["raft", "--set", "model=m", "--set", "out=o", "--set", "iteration=3"], "did you mean 'iterations'"),
    ],
)
def test_mistakes_cost_one_line(arguments: list[str], words: str, tmp_path: Path) -> None:
    done = oirl_tune(*arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["hir"])
def test_two_processes_learn_what_one_does(method: str, queries: str, tmp_path: Path) -> None:
    extra = {"relabel": RELABEL, "contrastive": "opposite"} if method == "hir" else {"min_reward": 0}
    settings = {"queries": queries, "samples": 4, "iterations": 2, "log_every": 1, "save_every": 2} | extra
    run(method, quick(tmp_path / "one", **settings))
    (tmp_path / "c.yaml").write_text(json.dumps(quick(tmp_path / "two", **settings)))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / p) for p in (".", "cli", "data"))}
    environment |= {"ACCELERATE_USE_CPU": "true"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "oirl_cli"]
    done = subprocess.run(
        [*launch, "tune", method, "--config", str(tmp_path / "c.yaml"), "--json"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["method"] == method  # one document, though two processes ran
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        # How the rows of a last, smaller update are dealt out, and so padded, depends on the devices.
        numbers = [k for k, v in a.items() if isinstance(v, float) and k != "padding"]
        assert [b[k] for k in numbers] == pytest.approx([a[k] for k in numbers], rel=1e-3, abs=1e-5)


# What a reader with fresh eyes found


def test_the_gain_of_hir_is_over_the_prompt_that_the_initial_model_knows(log: str, tmp_path: Path) -> None:
    """Under an instruction that it was never trained on the initial model would be an easy mark."""
    base, _ = run("sft", quick(tmp_path / "sft", log=log, held_out=0.5, epochs=1))
    report, told = run("hir", quick(tmp_path / "hir", log=log, held_out=0.5, relabel=RELABEL, updates=1))
    assert report.before["success"] == base.before["success"]
    first = next(row for row in told if row["kind"] == "validation")
    assert first["success"] == first["success_prompt"]
    assert {"success_instruction_0", "success_instruction_1"} <= set(first)
    assert report.after["gain"] == pytest.approx(report.after["success"] - report.before["success"])


def test_a_divergence_after_the_last_line_of_metrics_is_seen(log: str, tmp_path: Path) -> None:
    with pytest.raises(OirlError, match="learning_rate"):
        run(
            "sft", quick(tmp_path / "run", log=log, updates=5, log_every=10, save_every=10, learning_rate=1e9, warmup=0)
        )
    assert not (tmp_path / "run" / "model").exists()


def test_the_last_update_is_told_of(log: str, tmp_path: Path) -> None:
    _, told = run("sft", quick(tmp_path / "run", log=log, updates=5, log_every=4, save_every=4))
    assert [row["step"] for row in told if row["kind"] == "update"] == [4, 5]


PROMPTS_SEEN: list[str] = []


def see_prompts(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Note what the reward is given."""
    PROMPTS_SEEN.extend(prompts)
    return [float(len(text)) for text in completions]


def failing(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Fail."""
    raise KeyError("nothing here")


def test_a_reward_function_gets_what_the_model_was_given(log: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    run("raft", quick(tmp_path / "run", log=log, reward="test_tuning_runs:see_prompts", updates=1, held_out=0))
    import test_tuning_runs

    seen = test_tuning_runs.PROMPTS_SEEN
    assert any(text.endswith("? Work step by step.") for text in seen)
    assert not any("{query}" in text for text in seen)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reward": "test_tuning_runs:failing"}, "nothing here"),
        ({"engine_params": {"dtype": "bfloat16"}}, "batch_size"),
        ({"engine": "openai", "iterations": 2}, "OPENAI|base_url|openai|key"),
        ({"bf16": True}, "GPU"),
    ],
)
def test_odd_settings_cost_one_line(
    changes: dict[str, Any], words: str, queries: str, tmp_path: Path, monkeypatch: Any
) -> None:
    import torch

    if "bf16" in changes and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(OirlError, match=words) as raised:
        run("raft", quick(tmp_path / "run", queries=queries, samples=2) | changes)
    assert "\n" not in str(raised.value)


def test_a_folder_of_adapters_is_not_tuned_on(log: str, tmp_path: Path) -> None:
    report, _ = run("sft", quick(tmp_path / "one", log=log, lora_rank=2, updates=1))
    with pytest.raises(ConfigError, match="merge"):
        run("sft", quick(tmp_path / "two", model=report.model, log=log, lora_rank=2, updates=1))


@pytest.mark.parametrize("name", ["correctness", "ranks"])
def test_hir_by_a_reward_needs_a_checker_where_it_asks_for_verdicts(
    name: str, queries: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    settings = quick(tmp_path / "run", queries=queries, reward="test_tuning_runs:long_is_good", relabel={"name": name})
    make_settings("hir", settings)
    if name == "ranks":
        make_settings("hir", settings | {"grade": None})
        return
    with pytest.raises(ConfigError, match="`grade`"):
        make_settings("hir", settings | {"grade": None})
    rows = [{"query": q.query} for q in make_queries(12)]
    (tmp_path / "queries.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match="answer"):
        run("hir", settings | {"queries": str(tmp_path / "queries.jsonl")})


def test_queries_without_answers_are_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    rows = [{"query": q.query} for q in make_queries(12)]
    (tmp_path / "queries.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match="answer"):
        run("raft", quick(tmp_path / "run", queries=str(tmp_path / "queries.jsonl")))
    assert not (tmp_path / "run").exists()


def test_requests_that_failed_are_told_of(tmp_path: Path) -> None:
    long = " ".join(["apples"] * 200)
    rows = [{"query": q.query, "answer": q.answer} for q in make_queries(10)] + [{"query": long, "answer": "1"}]
    (tmp_path / "queries.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = quick(tmp_path / "run", queries=str(tmp_path / "queries.jsonl"), held_out=0, samples=2, min_reward=0)
    report, _ = run("raft", settings | {"updates": 1})
    assert [(reason.startswith("failed"), count) for reason, count in report.left_out.items()] == [(True, 2)]


def test_contrast_over_a_batch_keeps_to_the_limit_of_tokens(tmp_path: Path) -> None:
    from oirl.tuning.examples import Example
    from oirl.tuning.trainer import collate

    examples = [Example([1] * 40, [2] * 5), Example([1] * 5, [2] * 40)]
    held = collate(examples, 0, "batch", limit=50)
    assert held["input_ids"].shape == (3, 45)  # both, and the short output under the short context; not the long pair
    assert held["candidates"] == 2
    assert collate(examples, 0, "batch")["input_ids"].shape == (4, 80)


def test_no_output_is_held_against_the_context_that_it_was_given_under() -> None:
    from oirl.tuning.examples import Example
    from oirl.tuning.trainer import collate

    same, other = [Example([1, 2], [3, 4]), Example([1, 2], [5])], Example([6], [7])
    held = collate([*same, other], 0, "batch")
    assert held["output"].tolist()[3:] == [0, 1, 2, 2]
    assert held["candidate"].tolist()[3:] == [2, 2, 0, 1]
    assert collate(same, 0, "batch")["input_ids"].shape == (2, 4)


def test_the_contrastive_loss_is_a_mean_over_the_rows_of_an_update(log: str, tmp_path: Path) -> None:
    sizes = {"batch": 80, "micro_batch": 8, "log_every": 1, "save_every": 1}
    settings = quick(tmp_path / "run", log=log, relabel=RELABEL, held_out=0, entropy_coef=0, **sizes)
    _, told = run("hir", settings)
    updates = [row for row in told if row["kind"] == "update"]
    assert len(updates) == 2  # the second one is smaller
    for row in updates:
        assert row["loss"] == pytest.approx(row["supervised"] + row["contrastive"], rel=1e-4)


def test_intervals_count_near_duplicates_once() -> None:
    from oirl.tuning.report import gain_of

    before, after = [0, 1] * 18, [1, 1] * 18
    alone = gain_of(before, after, range(36))
    together = gain_of(before, after, [i // 12 for i in range(36)])
    assert together["gain"] == alone["gain"] == 0.5
    mixed = gain_of([0] * 12 + [1] * 24, [1] * 12 + [1] * 24, [i // 12 for i in range(36)])
    assert mixed["gain_ci_low"] < 0 < mixed["gain_ci_high"]  # one group of three has changed


def test_a_sharded_policy_is_refused(log: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="FSDP"):
        run("sft", quick(tmp_path / "run", log=log))
