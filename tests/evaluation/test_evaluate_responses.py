"""The evaluation of models of responses: by hand on tiny logs, identities, warnings, and intervals that cover."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import make_queries
from scipy.special import expit

from oirl import ResponseRewardModel
from oirl.errors import DataError, NotFittedError, OirlError
from oirl.evaluation.responses import POLICIES, ResponseEvaluation, evaluate_responses, length_correlation
from oirl.logs.pairs import NO_RESPONSE, NO_VERDICT
from oirl.rewards.base import Estimates
from oirl.rewards.training import SeenQueries
from oirl.statistics import metrics
from oirl.statistics.intervals import (
    bootstrap_counts,
    bootstrap_means,
    percentile_interval,
    reliability_bins,
    success_interval,
)

DATA: dict[str, Any] = {"success": 0.5, "prompts": {"p0": 0.25, "p1": 0.75}, "best_prompt": "p1", "answers": "numeric"}
DATA |= {"longer_preferred": 1.0}


class Known:
    """A fitted model whose rewards are a function of query and response."""

    def __init__(self, reward: Callable[[str, str], float], seen: Sequence[str] = (), **data: Any) -> None:
        self.reward = reward
        self.seen_ = SeenQueries.of(seen)
        self.data_: dict[str, Any] = DATA | data

    def estimate(self, queries: Sequence[str], responses: Sequence[str]) -> Estimates:
        found = np.array([self.reward(q, r) for q, r in zip(queries, responses, strict=True)])
        return Estimates(found, np.zeros(len(found)))


Reply = tuple[str, "bool | None", str]


def log_of(replies: Sequence[Sequence[Reply]], seed: int = 0) -> pa.Table:
    """Return a log of the (response, correct, prompt_id) of each query."""
    rows = [
        {"query_id": f"q{i}", "query": query, "prompt_id": p, "prompt": "{query}", "response": r, "correct": c}
        for i, (query, of_query) in enumerate(zip(make_queries(len(replies), seed), replies, strict=True))
        for r, c, p in of_query
    ]
    return pa.Table.from_pylist(rows)


def noisy_log(n: int = 60, m: int = 6, seed: int = 0, *, right: float = 0.5) -> pa.Table:
    """Return a log of m distinct replies to each query; every third one is given twice."""
    rng = np.random.default_rng(seed)
    replies = []
    for _ in range(n):
        easy = rng.random() * 2 * right
        of_query = [
            (f"{'well ' * rng.integers(1, 9)}{k} is {rng.integers(5)}", bool(rng.random() < easy)) for k in range(m)
        ]
        of_query[m // 2] = of_query[0]
        replies.append([(r, c, f"p{k % 2}") for k, (r, c) in enumerate(of_query)])
    return log_of(replies, seed)


def truth(log: pa.Table, scale: float = 4.0) -> Known:
    right = {(r["query"], r["response"]): r["correct"] for r in log.to_pylist()}
    return Known(lambda q, r: scale if right[q, r] else -scale)


def noise(_: str, response: str) -> float:
    return float(np.random.default_rng(list(response.encode())).normal())


def chosen(model: Any, log: pa.Table, **options: Any) -> dict[str, Any]:
    found = evaluate_responses(model, log, **{"draws": 200, **options}).best_of_n
    assert found is not None
    return found


LOG = noisy_log()


def test_the_document_keeps_the_contract() -> None:
    document = evaluate_responses(Known(noise), LOG).to_dict()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["model"].keys() >= {"auc", "auc_within_query", "brier", "ece"}
    assert (document["n_rows"], document["n_queries"], document["warnings"]) == (360, 60, [])
    found = document["best_of_n"]
    assert tuple(found["policies"]) == POLICIES
    for policy in found["policies"].values():
        for prefix, value in (("", "value"), ("gain_", "gain"), ("over_majority_", "over_majority")):
            assert policy[f"{prefix}ci_low"] <= policy[value] <= policy[f"{prefix}ci_high"]
    assert [row["n"] for row in found["curve"]] == [1, 2, 3, 4, 5, 6]
    assert [row["kl"] for row in found["curve"]] == pytest.approx([np.log(n) - (n - 1) / n for n in range(1, 7)])
    for row in found["curve"]:
        assert row.keys() == {"n", "kl", "proxy", *POLICIES}
    for name in POLICIES:  # the curve ends where the table stands
        assert found["curve"][-1][name]["value"] == pytest.approx(found["policies"][name]["value"])
    assert found["over_optimisation"].keys() == {"alpha", "beta", "peak_kl", "turns_down"}


def test_choosing_by_the_truth_is_the_oracle_at_every_n() -> None:
    found = chosen(truth(LOG), LOG)
    for row in found["curve"]:
        assert row["best_of_n"] == pytest.approx(row["oracle"])
    values = [row["oracle"]["value"] for row in found["curve"]]
    assert values == sorted(values)
    assert values[-1] > values[0] + 0.2
    worst = chosen(truth(LOG, -4.0), LOG)["policies"]
    assert worst["best_of_n"]["value"] < worst["random"]["value"] < found["policies"]["best_of_n"]["value"]


def test_a_random_choice_is_worth_the_mean_at_every_n() -> None:
    found = chosen(Known(noise), LOG)
    mean = np.mean(LOG["correct"].to_pylist())
    assert [row["random"]["value"] for row in found["curve"]] == pytest.approx([mean] * 6)
    assert found["curve"][0]["best_of_n"]["value"] == pytest.approx(mean)
    assert found["curve"][0]["oracle"]["value"] == pytest.approx(mean)
    assert found["policies"]["random"]["gain"] == found["policies"]["random"]["gain_ci_high"] == 0
    constant = chosen(Known(lambda q, r: 1.0), LOG)
    assert [row["best_of_n"]["value"] for row in constant["curve"]] == pytest.approx([mean] * 6)


HAND = [
    [("so 1", True, "p0"), ("is 1", True, "p1"), ("so 2", False, "p1")],  # 1 has two votes: right
    [("so 3", True, "p0"), ("so 4", False, "p1"), ("is 4", False, "p0")],  # 4 has two votes: wrong
    [("so 5", False, "p0"), ("so 6", True, "p1"), ("none", False, "p1")],  # a tie, and one without an answer
]
HAND_REWARDS = {"so 3": 3.0, "so 2": 2.0, "so 6": 1.0, "none": 0.5}  # of all others -1
HAND_MODEL = Known(lambda q, r: HAND_REWARDS.get(r, -1.0))


def test_values_by_hand() -> None:
    found = chosen(HAND_MODEL, log_of(HAND))
    assert (found["n"], found["n_queries"], found["left_out"], found["answers"]) == (3, 3, 0, "numeric")
    value = {name: policy["value"] for name, policy in found["policies"].items()}
    w = expit(-1.0)
    assert expit(2.0) > 2 * w  # so that the heavy vote for 2 beats the two for 1
    expected = {
        "random": (2 / 3 + 1 / 3 + 1 / 3) / 3,
        "best_prompt": (1 / 2 + 0 + 1 / 2) / 3,
        "best_of_n": (0 + 1 + 1) / 3,
        "majority": (1 + 0 + 1 / 2) / 3,
        "weighted_majority": (0 + 1 + 1) / 3,
        "oracle": 1.0,
    }
    assert value == pytest.approx(expected)
    for name, policy in found["policies"].items():
        assert policy["gain"] == pytest.approx(expected[name] - expected["random"])
        assert policy["over_majority"] == pytest.approx(expected[name] - expected["majority"])
    two = found["curve"][1]  # over all pairs of candidates
    assert two["best_of_n"]["value"] == pytest.approx((1 / 3 + 2 / 3 + 2 / 3) / 3)
    assert two["oracle"]["value"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert two["proxy"]["value"] == pytest.approx(np.mean([(2 + 2 - 1) / 3, (3 + 3 - 1) / 3, (1 + 1 + 0.5) / 3]))
    assert two["majority"]["value"] == pytest.approx(np.mean([2 / 3, 1 / 6 + 0 + 1 / 6, (1 / 2 + 1 + 0) / 3]), abs=0.1)


def test_answers_are_read_as_the_model_says() -> None:
    """As texts all answers of a query are unlike: a vote is a random choice."""
    model = Known(HAND_MODEL.reward, answers="text")
    found = chosen(model, log_of(HAND))["policies"]
    assert found["majority"]["value"] == pytest.approx(found["random"]["value"])


def test_majority_over_majority_is_exactly_nothing() -> None:
    for log in (LOG, log_of(HAND)):
        policy = chosen(Known(noise), log)["policies"]["majority"]
        assert [policy[f"over_majority{end}"] for end in ("", "_ci_low", "_ci_high")] == [0, 0, 0]


def test_gains_are_paired() -> None:
    """Where queries are all easy or all hard, values are unsure and the gain over a random choice is sure."""
    rng = np.random.default_rng(0)
    replies = [[(f"so {k}", bool(hard) and k > 0, "p1") for k in range(4)] for hard in rng.random(80) < 0.5]
    policy = chosen(Known(lambda q, r: float(r == "so 1")), log_of(replies))["policies"]["best_of_n"]
    assert policy["gain"] == pytest.approx(policy["value"] / 4)
    width, of_gain = (policy[f"{p}ci_high"] - policy[f"{p}ci_low"] for p in ("", "gain_"))
    assert of_gain == pytest.approx(width / 4, rel=0.2)


def test_queries_with_fewer_responses_are_left_out_and_counted() -> None:
    replies = [[(f"so {k}", k == 0, "p1") for k in range(n)] for n in (4, 4, 6, 2, 1)]
    model = Known(lambda q, r: -float(r[3:]))
    found = chosen(model, log_of(replies))
    assert (found["n"], found["n_queries"], found["left_out"]) == (4, 3, 2)
    short = chosen(model, log_of(replies[:2] + replies[3:]))
    assert (short["n"], short["n_queries"], short["left_out"]) == (4, 2, 2)
    half = chosen(model, log_of([replies[0], replies[1], *[replies[3]] * 2]))
    assert (half["n"], half["n_queries"]) == (4, 2)  # at least half of the queries have four
    mixed = chosen(model, log_of([replies[0], replies[0], replies[0][:3]]))
    assert (mixed["n"], mixed["n_queries"], mixed["left_out"]) == (4, 2, 1)
    mostly = chosen(model, log_of([replies[0], *[replies[3]] * 2]))
    assert (mostly["n"], mostly["n_queries"], mostly["left_out"]) == (2, 3, 0)


def test_where_most_queries_have_one_response_there_is_nothing_to_choose() -> None:
    replies = [[("so 1", i % 2 == 0, "p1")] for i in range(30)]
    replies[0] += [("so 2", False, "p1")]
    found = evaluate_responses(Known(noise), log_of(replies))
    assert found.best_of_n is None
    assert any("one response" in w for w in found.warnings)
    json.dumps(found.to_dict(), allow_nan=False)


def test_best_prompt_is_that_of_the_training_log_where_it_was_run() -> None:
    replies = [[("so 1", i % 4 == 0, "p1"), ("so 2", True, "p1"), ("so 3", False, "p0")] for i in range(40)]
    found = evaluate_responses(Known(noise), log_of(replies), draws=100)
    assert found.best_of_n is not None
    assert found.best_of_n["policies"]["best_prompt"]["value"] == pytest.approx((1 / 4 + 1) / 2)
    replies[7] = [(r, c, "p0") for r, c, _ in replies[7]]
    without = evaluate_responses(Known(noise), log_of(replies), draws=100)
    assert without.best_of_n is not None
    assert "best_prompt" not in without.best_of_n["policies"]
    assert any("p1" in w and "best_prompt" in w for w in without.warnings)


def test_metrics_and_null_models_by_hand() -> None:
    """Rewards order the nine responses as in `HAND_REWARDS`; the right ones are so 1, is 1, so 3, so 6."""
    found = evaluate_responses(HAND_MODEL, log_of(HAND))
    # Of 4 · 5 pairs: so 3 beats 5, so 6 four; so 1 and is 1 tie with three of the wrong ones.
    assert found.model["auc"] == pytest.approx((5 + 4 + 2 * 1.5) / 20)
    # Within queries: 0 of 2, 2 of 2, 2 of 2 pairs.
    assert found.model["auc_within_query"] == pytest.approx(4 / 6)
    right = np.array([1, 1, 0, 1, 0, 0, 0, 1, 0])
    p = expit(np.array([-1, -1, 2, 3, -1, -1, -1, 1, 0.5]))
    assert found.model["brier"] == pytest.approx(np.mean((right - p) ** 2))
    assert found.model["brier_skill"] == pytest.approx(1 - np.mean((right - p) ** 2) / 0.25)
    # p1 (0.75) holds two of the four right ones and three of the five wrong ones.
    assert found.null_models["prompt"]["auc"] == pytest.approx((2 * 2 + 0.5 * (2 * 3 + 2 * 2)) / 20)
    assert found.null_models["length"]["auc"] == pytest.approx(0.5)  # all have four letters
    longer = evaluate_responses(HAND_MODEL, log_of([[(r + " " * 3 * c, c, p) for r, c, p in q] for q in HAND]))
    assert longer.null_models["length"] == {"auc": 1.0, "auc_within_query": 1.0, "prefers": "longer"}


def test_a_prompt_that_the_training_log_lacks_counts_as_the_mean_of_all() -> None:
    replies = [[("so 1", True, "new"), ("so 2", False, "p0"), ("so 3", True, "p1")] for _ in range(25)]
    found = evaluate_responses(Known(noise), log_of(replies), draws=50)
    assert found.null_models["prompt"]["auc"] == 1.0
    replies = [[("so 1", False, "new"), ("so 2", True, "p0"), ("so 3", False, "p1")] for _ in range(25)]
    assert evaluate_responses(Known(noise), log_of(replies), draws=50).null_models["prompt"]["auc"] == 0.0


def test_equal_responses_are_one_response_given_often() -> None:
    replies = [[("so 1", True, "p0"), ("so 1", True, "p1"), ("so 1", False, "p1"), ("so 2", False, "p1")]] * 25
    model = Known(lambda q, r: 2.0 if r == "so 1" else -2.0)
    found = evaluate_responses(model, log_of(replies), draws=50)
    assert found.n_rows == 100
    p = expit(np.array([2.0, 2.0, 2.0, -2.0]))
    assert found.model["brier"] == pytest.approx(np.mean((np.array([1, 1, 0, 0]) - p) ** 2))
    assert found.best_of_n is not None
    assert found.best_of_n["policies"]["best_of_n"]["value"] == pytest.approx(2 / 3)


def test_reliability_by_hand() -> None:
    predicted = np.array([0.05, 0.12, 0.19, 1.0, 0.0, 0.02, 0.03, 0.1, 0.1, 0.1, 0.03, *[0.95] * 4])
    rate = np.array([0, 0.5, 1, 1, 0, 0.5, 0, 1, 0, 0, 0, *[1] * 4], dtype=float)
    runs = np.array([1, 2, 1, 3, 1, 2, 1, 1, 1, 1, 1, *[1] * 4])
    clusters = np.arange(15) // 2
    low, middle, high = reliability_bins(predicted, rate, runs, clusters)
    assert low["predicted"] == pytest.approx((0.05 + 0 + 0.02 + 0.03 + 0.03) / 5)
    assert (low["observed"], low["runs"]) == (pytest.approx(0.1), 6)
    assert middle["predicted"] == pytest.approx((0.12 + 0.19 + 0.3) / 5)
    assert (middle["observed"], middle["runs"]) == (pytest.approx(0.5), 6)
    of_middle = np.flatnonzero((predicted >= 0.1) & (predicted < 0.2))
    expected = success_interval(rate[of_middle], clusters[of_middle])
    assert (middle["observed"], middle["ci_low"], middle["ci_high"]) == pytest.approx(expected)
    assert (high["predicted"], high["observed"], high["runs"]) == (
        pytest.approx(0.96),
        1.0,
        7,
    )  # 1.0 is of the last bin
    assert high["ci_low"] < 1
    assert len(reliability_bins(predicted[:-1], rate[:-1], runs[:-1], clusters[:-1])) == 2  # four are too few


def test_reliability_sums_to_the_rows() -> None:
    reward = {r: float(i % 3) for i, r in enumerate(LOG["response"].unique().to_pylist())}
    found = evaluate_responses(Known(lambda q, r: reward[r]), LOG)
    assert [b["predicted"] for b in found.reliability] == pytest.approx(expit([0, 1, 2]))
    assert sum(b["runs"] for b in found.reliability) == found.n_rows
    assert all(b["ci_low"] <= b["observed"] <= b["ci_high"] for b in found.reliability)


def test_length_correlation_by_hand() -> None:
    """Within each query longer is better; between the two the longer ones are worse."""
    reward = np.array([1.0, 2.0, 3.0, -3.0, -2.0, -1.0, 9.0])
    length = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    query = np.array([0, 0, 0, 1, 1, 1, 2])
    order = np.random.default_rng(0).permutation(7)
    found = length_correlation(reward[order], length[order], query[order])
    assert found["within_query"] == pytest.approx(1)
    rank_reward = np.argsort(np.argsort(reward))
    assert found["all"] == pytest.approx(np.corrcoef(rank_reward, length)[0, 1])
    assert length_correlation(np.ones(4), np.arange(4.0), np.zeros(4, int)) == {"all": None, "within_query": None}
    assert length_correlation(np.arange(2.0), np.arange(2.0), np.zeros(2, int))["within_query"] is None


@pytest.mark.parametrize(
    "model", [Known(noise), Known(lambda q, r: 0.0), truth(LOG, 0.4)], ids=["noise", "flat", "true"]
)
def test_intervals_hold_their_values(model: Known) -> None:
    found = evaluate_responses(model, LOG)
    for name, (low, high) in found.intervals.items():
        value = found.model[name]
        assert value is not None
        assert low <= value <= high, name
    # Resamples move an ECE upwards, so that it has no interval.
    assert found.intervals.keys() == {name for name, value in found.model.items() if value is not None} - {"ece"}


def test_intervals_of_metrics_are_those_of_resampled_queries() -> None:
    """A Brier score is a mean: its interval is that of `bootstrap_means` over queries."""
    log = noisy_log(100)
    found = evaluate_responses(Known(noise), log)
    p = expit(np.array([noise("", r["response"]) for r in log.to_pylist()]))
    loss = (p - np.array(log["correct"].to_pylist(), dtype=float)) ** 2
    draws = bootstrap_means(loss.reshape(100, 6).mean(axis=1)[:, None], np.random.default_rng(0), 4000)
    low, high = percentile_interval(draws)
    assert found.intervals["brier"] == pytest.approx([low[0], high[0]], abs=0.25 * (high[0] - low[0]))


def test_the_gain_of_a_choice_by_chance_is_covered_at_nothing() -> None:
    hits = 0
    for seed in range(60):
        log = noisy_log(40, 4, 1000 + seed)
        policy = chosen(Known(noise), log, draws=200)["policies"]["best_of_n"]
        hits += policy["gain_ci_low"] <= 0 <= policy["gain_ci_high"]
    assert 52 <= hits < 60  # 57 on average, and not all: an interval of no use would hold it always


# Over-optimisation ----------------------------------------------------------------------------------------


def bent_log(n: int = 60, m: int = 16) -> pa.Table:
    """Return replies named by their reward: of 0 … 15 those from 8 to 12 are right, and nothing above."""
    return log_of([[(f"so {k}", 8 <= k <= 12, "p1") for k in range(m)] for _ in range(n)])


def test_gold_that_turns_down_while_the_proxy_rises_is_told() -> None:
    model = Known(lambda q, r: float(r[3:]))
    found = evaluate_responses(model, bent_log(), draws=100)
    assert found.best_of_n is not None
    curve = found.best_of_n["curve"]
    gold = [row["best_of_n"]["value"] for row in curve]
    proxy = [row["proxy"]["value"] for row in curve]
    assert proxy == sorted(proxy)
    peak = int(np.argmax(gold))
    assert 0 < peak < 15
    assert gold[-1] == 0
    (warning,) = [w for w in found.warnings if "over-optimisation" in w]
    assert f"beyond N = {curve[peak]['n']}:" in warning
    assert f"at N = 16 the reward is higher and success {100 * gold[peak]:.1f} points lower" in warning
    over = found.best_of_n["over_optimisation"]
    assert over["turns_down"] is True
    assert over["beta"] > 0
    assert curve[0]["kl"] < over["peak_kl"] < curve[-1]["kl"]


@pytest.mark.parametrize("kind", ["truth", "noise", "flat", "wrong from the start"])
def test_no_over_optimisation_is_told_where_there_is_none(kind: str) -> None:
    log = bent_log()
    models = {
        "truth": truth(log),
        "noise": Known(lambda q, r: noise(q, q + r)),
        "flat": Known(lambda q, r: 0.0),
        "wrong from the start": Known(lambda q, r: float(r[3:]) if int(r[3:]) >= 8 else -float(r[3:])),
    }
    if kind == "wrong from the start":
        log = log_of([[(f"so {k}", k < 8, "p1") for k in range(16)] for _ in range(60)])
    found = evaluate_responses(models[kind], log, draws=100)
    assert found.best_of_n is not None
    told = any("over-optimisation" in w for w in found.warnings)
    assert found.best_of_n["over_optimisation"]["turns_down"] is told
    assert told is (kind == "wrong from the start")  # there N = 1 is the best N of all


def test_a_turn_that_may_be_chance_is_not_told() -> None:
    """Rewards of pure noise: gold peaks somewhere, and seldom so that it cannot be chance."""
    told = 0
    for seed in range(24):
        log = noisy_log(30, 8, 5000 + seed)
        found = evaluate_responses(Known(noise), log, draws=50)
        told += any("over-optimisation" in w for w in found.warnings)
    assert told <= 3


# What is read, told and refused ---------------------------------------------------------------------------


def test_training_queries_are_told() -> None:
    queries = make_queries(60)
    (warning,) = evaluate_responses(Known(noise, seen=queries[:12]), LOG, draws=50).warnings
    assert "of the 60 queries 12 stood in the training log" in warning


def test_few_queries_and_leaking_splits_are_told() -> None:
    assert any("fewer than 20" in w for w in evaluate_responses(HAND_MODEL, log_of(HAND), draws=50).warnings)
    leaking = LOG.append_column("split", pa.array(["test", "train"] * 180))
    assert any("split column leaks" in w for w in evaluate_responses(Known(noise), leaking, draws=50).warnings)


def test_rows_marked_test_are_used() -> None:
    marks = ["test" if int(i[1:]) < 25 else "train" for i in LOG["query_id"].to_pylist()]
    found = evaluate_responses(Known(noise), LOG.append_column("split", pa.array(marks)), draws=50)
    assert (found.n_queries, found.n_rows) == (25, 150)


def test_rows_of_which_nothing_is_known_are_left_out_and_counted() -> None:
    rows = LOG.to_pylist()
    for i, change in enumerate([{"correct": None}, {"response": None}, {"response": " "}]):
        rows[i] |= change
    found = evaluate_responses(Known(noise), pa.Table.from_pylist(rows), draws=50)
    assert found.left_out == {NO_VERDICT: 1, NO_RESPONSE: 2}
    assert found.n_rows == 357


def test_one_seed_one_document_and_the_order_of_rows_changes_no_metric() -> None:
    a, b, c = (evaluate_responses(Known(noise), LOG, seed=s, draws=100).to_dict() for s in (1, 1, 2))
    assert a == b
    assert a["model"] == c["model"]
    assert a["intervals"] != c["intervals"]
    mixed = LOG.take(pa.array(np.random.default_rng(0).permutation(len(LOG))))
    d = evaluate_responses(Known(noise), mixed, seed=1, draws=100).to_dict()
    assert d["model"] == pytest.approx(a["model"])
    for name in ("best_of_n", "majority", "oracle"):
        ours, theirs = (x["best_of_n"]["policies"][name]["value"] for x in (a, d))
        assert ours == pytest.approx(theirs)


@pytest.mark.parametrize("verdict", [True, False])
def test_one_outcome_only_is_strict_json(verdict: bool) -> None:
    rows = [r | {"correct": verdict} for r in LOG.to_pylist()]
    document = evaluate_responses(Known(noise), pa.Table.from_pylist(rows), draws=50).to_dict()
    json.dumps(document, allow_nan=False)
    assert document["model"]["auc"] is None
    assert "auc" not in document["intervals"]


@pytest.mark.parametrize("m", [1, 2, 3, 5])
def test_a_single_query_is_strict_json(m: int) -> None:
    document = evaluate_responses(Known(noise), LOG.slice(0, m), draws=50).to_dict()
    json.dumps(document, allow_nan=False)
    assert (document["n_queries"], document["n_rows"]) == (1, m)


@pytest.mark.parametrize(
    ("model", "log", "options", "kind", "message"),
    [
        (ResponseRewardModel(), LOG, {}, NotFittedError, "fitted"),
        (Known(noise), LOG, {"seed": -1}, OirlError, "seed"),
        (Known(noise), LOG.slice(0, 0), {}, DataError, "no row with a response"),
        (Known(noise), LOG.drop_columns(["response"]), {}, DataError, "no row with a response"),
        (Known(noise), log_of([[("so 1", None, "p1")]]), {}, DataError, "1 rows: no verdict"),
    ],
)
def test_bad_input_is_refused(
    model: Any, log: pa.Table, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        evaluate_responses(model, log, **options)


# A fitted model -------------------------------------------------------------------------------------------


def sums(n: int, seed: int) -> pa.Table:
    """Return a log of six replies to each query that add up two numbers, two of them truly."""
    rng = np.random.default_rng(seed)
    replies: list[list[Reply]] = []
    for _ in range(n):
        a, b = (int(x) for x in rng.integers(10, 40, 2))
        wrong = a + b + 1
        totals = [a + b, a + b, wrong, wrong, wrong, wrong + 3]
        texts = [f"Step {k}: {a} + {b} = {t}. The answer is {t}." for k, t in enumerate(totals)]
        replies.append([(text, k < 2, f"p{k % 2}") for k, text in enumerate(texts)])
    return log_of(replies, seed)


@pytest.fixture(scope="module")
def evaluated() -> ResponseEvaluation:
    model = ResponseRewardModel(params={"strength": 3.0}).fit(sums(80, 0))
    return evaluate_responses(model, sums(50, 1), draws=200)


def test_a_sound_model_beats_the_vote_of_a_wrong_majority(evaluated: ResponseEvaluation) -> None:
    assert evaluated.warnings == []
    assert evaluated.model["auc_within_query"] > 0.95  # type: ignore[operator]
    assert evaluated.best_of_n is not None
    policies = evaluated.best_of_n["policies"]
    assert policies["majority"]["value"] == 0
    assert policies["best_of_n"]["value"] > 0.9
    assert policies["best_of_n"]["over_majority_ci_low"] > 0.8
    assert policies["weighted_majority"]["value"] > 0.9
    assert policies["random"]["value"] == pytest.approx(1 / 3)


def test_metrics_are_those_of_the_rows() -> None:
    log = sums(30, 2)
    model = ResponseRewardModel(params={"strength": 3.0}).fit(sums(40, 0))
    rows = log.to_pylist()
    p = model.predict_proba([r["query"] for r in rows], [r["response"] for r in rows])
    right = np.array([r["correct"] for r in rows], dtype=np.int64)
    found = evaluate_responses(model, log, draws=50).model
    assert found["auc"] == pytest.approx(metrics.auc(p, np.ones_like(right), right))
    assert found["brier"] == pytest.approx(np.mean((p - right) ** 2))
    assert found["brier_skill"] == pytest.approx(1 - np.mean((p - right) ** 2) / np.mean((1 / 3 - right) ** 2))


# bootstrap_counts -----------------------------------------------------------------------------------------


def test_counts_are_of_whole_clusters() -> None:
    clusters = np.array([7, 3, 7, 9, 3, 7, 100])
    drawn = np.array(list(bootstrap_counts(clusters, np.random.default_rng(0), 4000)))
    assert drawn.shape == (4000, 7)
    for name in (3, 7):
        assert (drawn[:, clusters == name] == drawn[:, clusters == name][:, :1]).all()
    of_clusters = drawn[:, [0, 1, 3, 6]]
    assert (of_clusters.sum(axis=1) == 4).all()
    # Each cluster is drawn Binomial(4, 1/4) times.
    assert of_clusters.mean(axis=0) == pytest.approx(np.ones(4), abs=0.05)
    assert of_clusters.var(axis=0) == pytest.approx(np.full(4, 3 / 4), abs=0.06)


def test_counts_agree_with_resampled_means() -> None:
    values, clusters = np.random.default_rng(0).random(30), np.arange(30) // 3
    means = bootstrap_means(values[:, None], np.random.default_rng(1), 4000, clusters)[:, 0]
    counted = [c @ values / c.sum() for c in bootstrap_counts(clusters, np.random.default_rng(2), 4000)]
    assert np.quantile(counted, [0.025, 0.5, 0.975]) == pytest.approx(np.quantile(means, [0.025, 0.5, 0.975]), abs=0.01)


def test_one_seed_one_resample() -> None:
    clusters = np.arange(20)
    a, b, c = (np.array(list(bootstrap_counts(clusters, np.random.default_rng(s), 5))) for s in (0, 0, 1))
    assert (a == b).all()
    assert (a != c).any()
