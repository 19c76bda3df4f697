"""Whole runs of APA, PPO and AWR on the small model: what is learned, told, guarded and refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from small_runs import make_queries, write_queries, write_small_log
from test_encoder_decoder import make

import oirl
from oirl.errors import ConfigError, DataError
from oirl_data import small_lm_path

METHODS = ("apa", "ppo", "awr")


def online(out: Path, queries: str, **changes: Any) -> dict[str, Any]:
    settings = {
        "model": str(small_lm_path()),
        "out": str(out),
        "queries": queries,
        "grade": "numeric",
        "max_tokens": 24,
        "learning_rate": 1e-3,
        "iterations": 3,
        "rollouts": 8,
        "epochs": 2,
        "batch": 4,
        "micro_batch": 2,
        "save_every": 2,
        "evaluate_every": 2,
        "held_out": 0.2,
    }
    return settings | changes


def long_words(prompts: Any, completions: Sequence[str], **columns: Any) -> list[float]:
    """Reward length: what verdicts do not care for."""
    return [float(len(text.split())) for text in completions]


def first_tokens(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[list[float]]:
    """Reward by token: 1 for the first one, 0 for the rest."""
    return [[1.0] + [0.0] * (len(ids) - 1) for ids in completion_ids]


def too_great(prompts: Any, completions: Sequence[str], **columns: Any) -> list[float]:
    return [1e38 * (i + 1) for i in range(len(completions))]


def none_at_first(prompts: Any, completions: Sequence[str], query: Sequence[str], **columns: Any) -> list[float | None]:
    """Give no gold the first time, and then more and more."""
    CALLS.append(len(query))
    return [None if len(CALLS) == 1 else float(len(CALLS))] * len(completions)


CALLS: list[int] = []


def no_reward(prompts: Any, completions: Sequence[str], **columns: Any) -> list[None]:
    return [None] * len(completions)


@pytest.fixture(scope="module")
def queries(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_queries(make_queries(30, seed=1), tmp_path_factory.mktemp("queries") / "queries.jsonl")


@pytest.fixture(autouse=True)
def _rewards_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def lines_of(out: Path, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


ROLLOUT_NAMES = {
    "reward", "success", "kl", "kl_k3", "kl_token", "kl_k3_token", "entropy", "tokens_mean", "words", "distinct_1",
    "distinct_2", "cut_off", "engine_gap", "engine_ratio_max", "kl_coef", "samples", "shaped_reward",
}  # fmt: skip
UPDATE_NAMES = {
    "apa": {"target_gap"},
    "ppo": {"clipped", "ratio", "kl_old", "value_clipped"},
    "awr": {"weight", "capped"},
}


@pytest.mark.parametrize("method", METHODS)
def test_each_method_runs_and_tells_its_metrics_under_stable_names(method: str, tmp_path: Path, queries: str) -> None:
    out = tmp_path / "run"
    report = oirl.tune(method, online(out, queries))
    assert (out / "model" / "config.json").is_file()
    assert [row["iteration"] for row in report.iterations] == [0, 1, 2]
    drawn = lines_of(out, "rollouts")
    assert all(ROLLOUT_NAMES | {"explained_variance", "value_mean"} <= set(row) for row in drawn)
    assert drawn[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert all(row["engine_gap"] < 1e-4 for row in drawn)
    shared = {"policy_loss", "value_loss", "grad_norm", "value_grad_norm", "learning_rate"}
    assert all(shared | UPDATE_NAMES[method] <= set(row) for row in lines_of(out, "update"))
    assert {"success", "ci_low", "ci_high"} <= set(report.before) & set(report.after)
    assert report.after["gain_ci_low"] <= report.after["gain"] <= report.after["gain_ci_high"]
    times = [json.loads(line) for line in (out / "times.jsonl").read_text().splitlines()]
    phases = {f"seconds_{phase}" for phase in ("rollout", "reward", "measure", "update")}
    assert all(phases <= set(row) for row in times)
    log = oirl.read_log(out / "rollouts")
    assert len(log) == 24
    assert log["score"].to_pylist() == [float(right) for right in log["correct"].to_pylist()]
    assert not list(out.glob("weights-*")) + list(out.glob("best-*"))


def test_the_docs_name_the_metrics() -> None:
    docs = (ROOT / "docs" / "online.md").read_text(encoding="utf-8").split("## What is told")[1].split("\n## ")[0]
    told = set(re.findall(r"`(\w+)`", docs))
    assert ROLLOUT_NAMES | set().union(*UPDATE_NAMES.values()) | {"policy_loss", "value_loss", "grad_norm"} <= told


@pytest.mark.parametrize("method", METHODS)
def test_the_policy_moves_and_the_first_ratio_is_one(method: str, tmp_path: Path, queries: str) -> None:
    oirl.tune(method, online(tmp_path / "run", queries, iterations=1, epochs=1, batch=8, micro_batch=8, keep="last"))
    (update,) = lines_of(tmp_path / "run", "update")
    before, after = (load_file(p / "model.safetensors") for p in (small_lm_path(), tmp_path / "run" / "model"))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    if method == "ppo":
        assert update["ratio"] == pytest.approx(1, abs=1e-5)
        assert update["clipped"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(("method", "kl_coef"), [("apa", 0.1), ("ppo", 0.02), ("awr", 0.3)])
def test_an_easy_reward_is_learned(method: str, kl_coef: float, tmp_path: Path, queries: str) -> None:
    """Long responses are paid for: all methods make them longer, clearly."""
    settings = online(
        tmp_path / "run", queries, reward="test_online_runs:long_words", rollouts=32, batch=16, micro_batch=16,
        iterations=12, learning_rate=1e-3, held_out=0.0, kl_coef=kl_coef, guard_gold=False, whiten="standardise",
    )  # fmt: skip
    report = oirl.tune(method, settings)
    first, last = (np.mean([row["reward"] for row in rows]) for rows in (report.iterations[:2], report.iterations[-2:]))
    assert last > first + 2
    assert report.iterations[-1]["kl"] > 0.05


def test_rewards_by_token_reach_their_tokens(tmp_path: Path, queries: str) -> None:
    settings = online(tmp_path / "run", queries, reward="test_online_runs:first_tokens", iterations=1)
    report = oirl.tune("apa", settings | {"whiten": "none", "gamma": 1.0, "gae_lambda": 1.0})
    assert report.iterations[0]["reward"] == 1.0
    # All that is paid comes with the first token: with values of 0 at first it alone has an advantage.
    (row,) = lines_of(tmp_path / "run", "rollouts")
    share = 1 / row["tokens_mean"]
    assert row["advantage_deviation"] == pytest.approx((share * (1 - share)) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("baseline", ["value_network", "value_head", "group", "leave_one_out"])
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_each_baseline_with_and_without_adapters(baseline: str, lora_rank: int, tmp_path: Path, queries: str) -> None:
    settings = online(tmp_path / "run", queries, baseline=baseline, samples=4, lora_rank=lora_rank, iterations=2)
    report = oirl.tune("apa", settings | {"kl_coef": 0.5})
    told = lines_of(tmp_path / "run", "rollouts")
    assert ("value_mean" in told[0]) == baseline.startswith("value")
    assert told[1]["kl"] != 0
    assert report.iterations[1]["examples"] == 8


def test_only_the_last_layers_are_trained(tmp_path: Path, queries: str) -> None:
    oirl.tune("apa", online(tmp_path / "run", queries, train_layers=1, iterations=1, keep="last"))
    before, after = (load_file(p / "model.safetensors") for p in (small_lm_path(), tmp_path / "run" / "model"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith(("model.layers.2.", "model.norm", "lm_head")) for name in moved)
    with pytest.raises(ConfigError, match="train_layers = 9, and the model has 3 layers"):
        oirl.tune("apa", online(tmp_path / "other", queries, train_layers=9))


def test_at_another_temperature_engine_and_trainer_agree(tmp_path: Path, queries: str) -> None:
    oirl.tune("ppo", online(tmp_path / "run", queries, temperature=0.7, iterations=2))
    assert all(row["engine_gap"] < 1e-4 for row in lines_of(tmp_path / "run", "rollouts"))


def test_a_log_is_learned_from_part_by_part(tmp_path: Path) -> None:
    log = write_small_log(tmp_path / "log.parquet", 16)
    settings = online(tmp_path / "run", "", log=log, iterations=4, grade=None)
    del settings["queries"]
    report = oirl.tune("awr", settings)
    assert all(4 <= row["examples"] <= 16 for row in report.iterations)
    assert not (tmp_path / "run" / "rollouts").exists()
    assert any("appendix D.3" in text for text in oirl.tune("apa", settings | {"out": str(tmp_path / "a")}).warnings)
    with pytest.raises(ConfigError, match="ppo needs responses of the policy itself"):
        oirl.tune("ppo", settings | {"out": str(tmp_path / "p")})


# Guards


def guarded(out: Path, queries: str, **changes: Any) -> dict[str, Any]:
    return online(out, queries, learning_rate=3e-3, iterations=6, max_kl=0.02, save_every=1, **changes)


def test_a_policy_that_goes_too_far_is_stopped(tmp_path: Path, queries: str) -> None:
    report = oirl.tune("apa", guarded(tmp_path / "run", queries))
    (guard,) = report.guards
    assert guard["action"] == "stop"
    assert "above max_kl = 0.02" in guard["reason"]
    assert len(report.iterations) < 6
    assert (tmp_path / "run" / "model" / "config.json").is_file()


def test_a_policy_that_goes_too_far_goes_back_with_a_higher_price(tmp_path: Path, queries: str) -> None:
    report = oirl.tune("apa", guarded(tmp_path / "run", queries, on_exceed="rollback"))
    assert report.guards[0]["action"] == "rollback"
    assert report.guards[0]["kl_coef"] == 0.2
    first = report.guards[0]["iteration"]
    after = report.iterations[first + 1]
    assert after["kl_coef"] == 0.2
    assert after["kl"] < report.iterations[first]["kl"]
    if len(report.guards) > 5:
        assert report.guards[5]["action"] == "stop"


def test_a_policy_that_goes_too_far_may_pay_more(tmp_path: Path, queries: str) -> None:
    report = oirl.tune("apa", guarded(tmp_path / "run", queries, on_exceed="raise_kl_coef"))
    assert {guard["action"] for guard in report.guards} == {"raise_kl_coef"}
    assert report.iterations[-1]["kl_coef"] == pytest.approx(
        0.1 * 1.5 ** sum(g["iteration"] < 5 for g in report.guards)
    )
    assert len(report.iterations) == 6


@pytest.mark.slow
def test_a_reward_that_is_gamed_stops_the_run_and_the_best_by_gold_is_kept(tmp_path: Path) -> None:
    many = write_queries(make_queries(150, seed=2), tmp_path / "queries.jsonl")
    settings = online(
        tmp_path / "run", many, reward="test_online_runs:long_words", rollouts=32, batch=16, micro_batch=16,
        iterations=40, max_tokens=48, held_out=0.5, evaluate_every=4, kl_coef=0.05,
    )  # fmt: skip
    report = oirl.tune("apa", settings)
    (guard,) = report.guards
    assert guard["action"] == "stop"
    assert "the reward is being gamed" in guard["reason"]
    assert len(report.iterations) < 40
    validations = lines_of(tmp_path / "run", "validation")
    best = max(validations, key=lambda row: row["success"])
    assert report.kept == {"iteration": best["iteration"], "step": best["step"]}
    assert validations[-1]["reward"] > best["reward"]
    assert validations[-1]["success"] < best["success"]
    assert report.after["success"] == best["success"]


def test_where_nothing_is_better_the_result_is_the_initial_model(tmp_path: Path, queries: str) -> None:
    settings = online(
        tmp_path / "run", queries, learning_rate=0.3, evaluate_every=1
    )  # far too high: it breaks the model
    report = oirl.tune("apa", settings | {"iterations": 2})
    assert report.kept == {"iteration": 0, "step": 0}
    assert any("the result is the initial model" in text for text in report.warnings)
    before, after = (load_file(p / "model.safetensors") for p in (small_lm_path(), tmp_path / "run" / "model"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert report.after["gain"] == 0


def test_numbers_that_are_none_end_the_run_with_what_was_good(tmp_path: Path, queries: str) -> None:
    settings = online(
        tmp_path / "run", queries, reward="test_online_runs:too_great", reward_clip=None, whiten="none", kl_coef=1e-9
    )
    report = oirl.tune("apa", settings)
    (guard,) = report.guards
    assert "no finite number any more" in guard["reason"]
    assert "lower learning_rate" in guard["reason"]
    assert guard["action"] == "stop"
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in after.values())


def test_numbers_that_are_none_are_gone_back_from(tmp_path: Path, queries: str) -> None:
    settings = online(
        tmp_path / "run", queries, reward="test_online_runs:too_great", reward_clip=None, whiten="none", kl_coef=1e-9,
        on_exceed="rollback", iterations=9,
    )  # fmt: skip
    report = oirl.tune("apa", settings)
    assert [guard["action"] for guard in report.guards] == ["rollback"] * 5 + ["stop"]
    assert "going back 5 times did not help" in report.guards[-1]["reason"]


def test_queries_without_an_answer_are_rewarded_and_not_graded(tmp_path: Path) -> None:
    """Held-out queries are those with an answer, if there are any; else the reward alone is measured."""
    some = make_queries(30, seed=1)
    rows = [
        {"query_id": q.query_id, "query": q.query} | ({"answer": q.answer} if i % 2 else {}) for i, q in enumerate(some)
    ]
    (tmp_path / "half.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "none.jsonl").write_text("\n".join(json.dumps({"query": q.query}) for q in some))
    settings = {"reward": "test_online_runs:long_words", "iterations": 1, "held_out": 0.4}
    half = oirl.tune("apa", online(tmp_path / "half", str(tmp_path / "half.jsonl"), **settings))
    assert 0 < half.before["success"] < 1
    none = oirl.tune("apa", online(tmp_path / "none", str(tmp_path / "none.jsonl"), **settings, grade=None))
    assert "success" not in none.before
    assert none.before["reward"] > 0
    assert "reward_gain" in none.after or none.kept == {"iteration": 0, "step": 0}


# Rewards


class _Scores(BaseHTTPRequestHandler):
    broken = 0
    asked: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked.append(body)
        if type(self).broken:
            type(self).broken -= 1
            self.send_response(503)
            self.end_headers()
            return
        rewards = [float(len(text)) for text in body["responses"]]
        reply = json.dumps({"rewards": rewards if self.path == "/score" else rewards[:-1]}).encode()
        self.send_response(404 if self.path == "/nowhere" else 200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def scores() -> Iterator[str]:
    _Scores.asked, _Scores.broken = [], 0
    with HTTPServer(("127.0.0.1", 0), _Scores) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_server_gives_rewards_and_is_asked_again_while_it_is_unwell(
    tmp_path: Path, queries: str, scores: str
) -> None:
    _Scores.broken = 1
    report = oirl.tune("apa", online(tmp_path / "run", queries, reward=f"{scores}/score", iterations=1))
    log = oirl.read_log(tmp_path / "run" / "rollouts")
    mean = np.mean([len(text) for text in log["response"].to_pylist()])
    assert report.iterations[0]["reward"] == pytest.approx(mean)
    assert report.after["reward"] > 0
    assert set(_Scores.asked[0]) == {"queries", "prompts", "responses", "answers"}


@pytest.mark.parametrize(
    ("path", "told"), [("/short", "rewards for"), ("/nowhere", "failed .1 tries.: HTTP Error 404")]
)
def test_a_server_that_replies_something_else_ends_the_run(
    path: str, told: str, tmp_path: Path, queries: str, scores: str
) -> None:
    with pytest.raises(DataError, match=told):
        oirl.tune("apa", online(tmp_path / "run", queries, reward=f"{scores}{path}", iterations=1))


def test_responses_without_a_reward_are_not_learned_from(tmp_path: Path, queries: str) -> None:
    with pytest.raises(DataError, match=r"0 can be learned from \(8 no reward\)"):
        oirl.tune("apa", online(tmp_path / "run", queries, reward="test_online_runs:no_reward", held_out=0.0))


def test_a_held_out_reward_that_is_none_is_no_best(tmp_path: Path, queries: str) -> None:
    settings = online(tmp_path / "run", queries, gold="test_online_runs:no_reward", iterations=1)
    report = oirl.tune("apa", settings)
    assert lines_of(tmp_path / "run", "validation")[0]["gold"] is None
    assert (tmp_path / "run" / "model" / "config.json").is_file()
    assert report.kept["iteration"] == 0


def test_the_first_gold_that_is_a_number_is_the_best_so_far(tmp_path: Path, queries: str) -> None:
    CALLS.clear()
    settings = online(tmp_path / "run", queries, gold="test_online_runs:none_at_first", iterations=2, evaluate_every=1)
    report = oirl.tune("apa", settings)
    golds = [row["gold"] for row in lines_of(tmp_path / "run", "validation")]
    assert golds == [None, 2.0, 3.0]
    assert report.kept["iteration"] == 1


def test_gold_by_spread_needs_a_reward_model(tmp_path: Path, queries: str) -> None:
    with pytest.raises(ConfigError, match="spread"):
        oirl.tune("apa", online(tmp_path / "run", queries, gold="spread"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"baseline": "group"}, "samples = 2 or more"),
        ({"rollouts": 7, "samples": 2}, "no multiple of samples"),
        ({"train_layers": 1, "lora_rank": 2}, "either `train_layers` or `lora_rank`"),
        ({"grade": None}, "needs a checker"),
        ({"kl_coef": 0.0}, "greater than 0"),
        ({"gold": "verdict", "grade": None, "reward": "a:b"}, "needs a checker"),
        ({"refit_reward_every": 2}, "go together"),
        ({"refit_reward_every": 2, "refit_log": "x"}, "folder of a reward model"),
        ({"kl_target": 1.0}, "is one of ppo"),
        ({"updates": 3}, "is one of"),
        ({"importance_cap": 0.5}, "greater than or equal to 1"),
        ({"baseline": "critic"}, "value_network"),
        ({"train_layer": 1}, "did you mean 'train_layers'"),
        ({"rollouts": 1}, "greater than or equal to 2"),
        ({"prompt": "{question}"}, "use {query}"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_loaded(
    changes: dict[str, Any], told: str, tmp_path: Path, queries: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        oirl.tune("apa", online(tmp_path / "run", queries, **changes))
    assert not (tmp_path / "run").exists()


# Other models, other devices


def test_activations_may_be_recomputed(tmp_path: Path, queries: str) -> None:
    """The losses and weights are the same, but for rounding."""
    plain, recomputed = (tmp_path / name for name in ("plain", "recomputed"))
    oirl.tune("ppo", online(plain, queries, iterations=1, keep="last"))
    oirl.tune("ppo", online(recomputed, queries, iterations=1, keep="last", gradient_checkpointing=True))
    (a,), (b,) = (lines_of(out, "update") for out in (plain, recomputed))
    numbers = [k for k, v in a.items() if isinstance(v, float)]
    assert [b[k] for k in numbers] == pytest.approx([a[k] for k in numbers], rel=1e-3, abs=1e-5)


def test_dropout_is_off(tmp_path: Path, queries: str) -> None:
    """π_θ / π_old is 1 before the first update, though the model's configuration has dropout."""
    shutil.copytree(small_lm_path(), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    settings = online(tmp_path / "run", queries, iterations=1, epochs=1, batch=8, model=str(tmp_path / "model"))
    oirl.tune("ppo", settings | {"gradient_checkpointing": True})
    assert lines_of(tmp_path / "run", "update")[0]["ratio"] == pytest.approx(1, abs=1e-5)


def test_encoder_decoder_models_are_trained_too(tmp_path: Path, queries: str) -> None:
    for part in make("t5"):
        part.save_pretrained(tmp_path / "t5")
    settings = online(tmp_path / "run", queries, model=str(tmp_path / "t5"), iterations=2, keep="last")
    report = oirl.tune("apa", settings)
    told = lines_of(tmp_path / "run", "rollouts")
    assert told[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert told[0]["engine_gap"] < 1e-3
    assert told[1]["kl"] != 0
    assert len(report.iterations) == 2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ppo"])
def test_two_processes_learn_what_one_does(method: str, queries: str, tmp_path: Path) -> None:
    settings = {"iterations": 3, "batch": 4, "micro_batch": 2, "learning_rate": 3e-4}
    oirl.tune(method, online(tmp_path / "one", queries, **settings))
    (tmp_path / "c.yaml").write_text(json.dumps(online(tmp_path / "two", queries, **settings)))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / p) for p in (".", "cli", "data"))}
    environment |= {"ACCELERATE_USE_CPU": "true"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "oirl_cli"]
    command = [*launch, "tune", method, "--config", str(tmp_path / "c.yaml"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["method"] == method
    for kind in ("rollouts", "update", "validation"):
        one, two = (lines_of(tmp_path / name, kind) for name in ("one", "two"))
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            numbers = [k for k, v in a.items() if isinstance(v, float)]
            assert [b[k] for k in numbers] == pytest.approx([a[k] for k in numbers], rel=2e-3, abs=2e-5)


def stop_after(kind: str, count: int) -> Any:
    left = count

    def tell(row: dict[str, Any]) -> None:
        nonlocal left
        left -= row["kind"] == kind
        if not left:
            raise KeyboardInterrupt

    return tell


def test_a_judge_that_never_says_the_same_twice_does_not_end_a_run(tmp_path: Path, queries: str) -> None:
    settings = online(tmp_path / "run", queries, reward="small_runs:unsteady", held_out=0.0, reward_clip=None)
    with pytest.raises(KeyboardInterrupt):
        oirl.tune("apa", settings, progress=stop_after("update", 2))
    before = [row["reward"] for row in lines_of(tmp_path / "run", "rollouts")]
    report = oirl.tune("apa", settings)
    assert [row["reward"] for row in report.iterations][:2] == before[:2]
    assert len(report.iterations) == 3


@pytest.mark.slow
def test_two_processes_come_to_the_same_decisions(queries: str, tmp_path: Path) -> None:
    """Each process would give other rewards; asked is one of them, and both stop where it says."""
    settings = online(
        tmp_path / "run", queries, reward="small_runs:unsteady", iterations=4, micro_batch=2, reward_clip=None,
        max_kl=1e-9, held_out=0.3,
    )  # fmt: skip
    (tmp_path / "c.yaml").write_text(json.dumps(settings))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(ROOT / p) for p in (".", "cli", "data", "tests/tuning"))
    }
    environment |= {"ACCELERATE_USE_CPU": "true"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "oirl_cli"]
    command = [*launch, "tune", "apa", "--config", str(tmp_path / "c.yaml"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [guard["action"] for guard in report["guards"]] == ["stop"]
    kept = json.loads((tmp_path / "run" / "rewards" / "iteration-000.json").read_text())
    assert report["iterations"][0]["reward"] == pytest.approx(np.mean(kept))
