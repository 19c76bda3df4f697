"""Ranking candidates: orders, scores and votes by hand, abstention, and the reward model inside a trainer of TRL."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import make_queries
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, logit

from oirl import BradleyTerryRewardModel, ResponseRewardModel
from oirl.errors import ConfigError, DataError
from oirl.logs.text import text_id
from oirl.rewards.base import Estimates
from oirl.rewards.objectives import total_reward
from oirl.selection.ranking import METHODS, RewardFunction, rank

RIGHT, PREFERRED = "response-reward-model", "preference-reward-model"


class Known:
    """A reward model that knows the rewards; what it was asked is kept."""

    def __init__(self, rewards: dict[str, float], kind: str = RIGHT, answers: str | None = "numeric") -> None:
        self.rewards = rewards
        self.kind = kind
        self.data_: dict[str, Any] = {} if answers is None else {"answers": answers}
        self.asked: list[tuple[str, str]] = []

    def estimate(self, queries: Sequence[str], responses: Sequence[str]) -> Estimates:
        self.asked = list(zip(queries, responses, strict=True))
        reward = np.array([self.rewards[r] for r in responses], dtype=float)
        return Estimates(reward, 0.1 * np.arange(len(reward)))


LETTERS = Known({"a": -1.0, "b": 2.0, "c": 0.5, "d": 0.5, "e": -3.0})


def test_the_best_leads_and_ties_keep_the_given_order() -> None:
    first, second = rank(LETTERS, ["q", "r"], [["d", "a", "b", "c"], ["e"]])
    assert [r.response for r in first.ranked] == ["b", "d", "c", "a"]
    assert [r.position for r in first.ranked] == [2, 0, 3, 1]
    assert [r.reward for r in first.ranked] == [2.0, 0.5, 0.5, -1.0]
    assert [r.spread for r in first.ranked] == pytest.approx([0.2, 0.0, 0.3, 0.1])
    assert [r.probability for r in first.ranked] == pytest.approx(expit([2.0, 0.5, 0.5, -1.0]))
    assert (first.chosen, second.chosen) == ("b", "e")
    assert {r.answer for r in first.ranked} == {None}
    assert LETTERS.asked == [("q", "d"), ("q", "a"), ("q", "b"), ("q", "c"), ("r", "e")]


def test_names_are_given_or_made_of_the_text() -> None:
    made, given_ = rank(LETTERS, ["q"], [["a"]]), rank(LETTERS, ["q"], [["a"]], query_ids=["7"])
    assert (made[0].query_id, given_[0].query_id) == (text_id("q"), "7")
    assert made[0].query == "q"
    assert made[0].method == "reward"


def test_of_a_correctness_model_the_score_is_the_probability_of_the_chosen() -> None:
    (found,) = rank(LETTERS, ["q"], [["a", "b", "c"]])
    assert found.score == pytest.approx(1 / (1 + np.exp(-2.0)))


@pytest.mark.parametrize("kind", [PREFERRED, "language-model-reward-model"])
def test_of_a_preference_model_the_score_is_that_of_beating_the_runner_up(kind: str) -> None:
    model = Known(LETTERS.rewards, kind)
    found = rank(model, ["q", "r", "s"], [["a", "b", "c"], ["a"], ["c", "d"]])
    assert found[0].score == pytest.approx(1 / (1 + np.exp(-(2.0 - 0.5))))
    assert found[1].score == pytest.approx(expit(-1.0))  # nobody to beat but a mean response
    assert found[2].score == pytest.approx(0.5)


VOTERS = Known(
    {
        "The answer is 1.": float(logit(0.6)),
        "So 1": float(logit(0.5)),
        "#### 2": float(logit(0.7)),
        "It is 2.0": float(logit(0.8)),
        "1": float(logit(0.1)),
        "no idea": float(logit(0.99)),
    }
)


def test_majority_by_hand() -> None:
    """Three say 1, two say 2, one nothing: 1 wins with 3 of 5 votes, and the best of those who say it is chosen."""
    (found,) = rank(VOTERS, ["q"], [list(VOTERS.rewards)], method="majority")
    assert found.chosen == "The answer is 1."
    assert found.score == pytest.approx(3 / 5)
    assert found.ranked[0].response == "no idea"  # ranked by reward all the same
    assert {r.response: r.answer for r in found.ranked} == dict(
        zip(VOTERS.rewards, ["1", "1", "2", "2", "1", None], strict=True)
    )


def test_weighted_majority_by_hand() -> None:
    """1 has .6 + .5 + .1 = 1.2, 2 has .7 + .8 = 1.5 of 2.7."""
    (found,) = rank(VOTERS, ["q"], [list(VOTERS.rewards)], method="weighted_majority")
    assert found.chosen == "It is 2.0"
    assert found.score == pytest.approx(1.5 / 2.7)


def test_of_equal_votes_the_earlier_answer_wins_and_of_equal_weights_the_higher_reward() -> None:
    for order in (["So 1", "#### 2"], ["#### 2", "So 1"]):
        (found,) = rank(VOTERS, ["q"], [order], method="majority")
        assert found.chosen == order[0]
        assert found.score == pytest.approx(0.5)
    equal = Known({"1": 0.0, "so 1": -800.0, "2": -800.0, "so 2": 0.0, "3": 1.0})
    (found,) = rank(equal, ["q"], [["1", "so 1", "2", "so 2"]], method="weighted_majority")
    assert found.chosen == "1"  # ½ each, and the first of the highest rewards
    (found,) = rank(equal, ["q"], [["2", "so 2", "1"]], method="weighted_majority")
    assert found.chosen == "so 2"


def test_the_majority_takes_the_first_that_gives_its_answer() -> None:
    (found,) = rank(VOTERS, ["q"], [["1", "#### 2", "The answer is 1."]], method="majority")
    assert found.chosen == "1"
    (found,) = rank(VOTERS, ["q"], [["1", "no idea", "The answer is 1."]], method="weighted_majority")
    assert found.chosen == "The answer is 1."


@pytest.mark.parametrize("method", ["majority", "weighted_majority"])
@pytest.mark.parametrize("kind", [RIGHT, PREFERRED])
def test_where_none_has_an_answer_the_reward_decides(method: str, kind: str) -> None:
    model = Known(LETTERS.rewards, kind)
    by_reward, by_vote = (rank(model, ["q"], [["a", "b", "c"]], method=m)[0] for m in ("reward", method))
    assert (by_vote.chosen, by_vote.score) == (by_reward.chosen, by_reward.score)


def test_votes_that_weigh_nothing_still_name_a_response() -> None:
    model = Known({"1": -1e4, "2": -2e4})
    (found,) = rank(model, ["q"], [["1", "2"]], method="weighted_majority")
    assert found.chosen == "1"
    assert found.score == 0.0


def test_answers_are_read_as_the_training_log_was_or_as_they_look() -> None:
    rewards = {"The answer is (B), 3 apples": 0.0, "(B): 4": -1.0, "(C): 3": -2.0}
    for answers, chosen_answer, score in (("choice", "B", 2 / 3), ("numeric", "3", 2 / 3), (None, "B", 2 / 3)):
        (found,) = rank(Known(rewards, answers=answers), ["q"], [list(rewards)], method="majority")
        assert found.ranked[0].answer == chosen_answer
        assert found.score == pytest.approx(score)
    (found,) = rank(Known(rewards, answers="text"), ["q"], [list(rewards)], method="majority")
    assert found.score == pytest.approx(1 / 3)


def test_the_model_abstains_below_the_threshold_and_not_at_it() -> None:
    (found,) = rank(LETTERS, ["q"], [["a", "b"]])
    for threshold, abstained in (
        (found.score, False),
        (float(np.nextafter(found.score, 1)), True),
        (1.0, True),
        (0.0, False),
    ):
        (again,) = rank(LETTERS, ["q"], [["a", "b"]], threshold=threshold)
        assert again.abstained is abstained
        assert again.chosen == (None if abstained else "b")
        assert again.score == found.score
        assert again.ranked == found.ranked


def test_a_threshold_that_numpy_found_is_fit_for_json() -> None:
    (found,) = rank(LETTERS, ["q"], [["a", "b"]], threshold=np.quantile([0.2, 0.4], 0.5))
    assert json.loads(json.dumps(found.to_dict()))["abstained"] is False


def test_a_threshold_counts_shares_of_votes() -> None:
    candidates = [list(VOTERS.rewards)]
    assert not rank(VOTERS, ["q"], candidates, method="majority", threshold=0.6)[0].abstained
    assert rank(VOTERS, ["q"], candidates, method="majority", threshold=0.61)[0].abstained


def test_penalties_change_the_choice() -> None:
    """η · KL by hand: ½ · (1 + 2) = 1.5 off the second response, whose first token alone counts in the first."""
    logprobs = np.array([[-1.0, -9.0], [-1.0, -1.0]])
    ref = np.array([[-1.0, 0.0], [-2.0, -3.0]])
    mask = np.array([[1.0, 0.0], [1.0, 1.0]])
    plain = np.array([LETTERS.rewards["c"], LETTERS.rewards["b"]])
    penalties = plain - total_reward(plain, logprobs, ref, mask, kl_coef=0.5)
    assert penalties == pytest.approx([0.0, 1.5])
    (found,) = rank(LETTERS, ["q"], [["c", "b"]], penalties=[penalties.tolist()])
    assert [r.reward for r in found.ranked] == pytest.approx([0.5, 0.5])
    (more,) = rank(LETTERS, ["q"], [["c", "b"]], penalties=[[0.0, 1.6]])
    assert (more.chosen, more.ranked[1].reward) == ("c", pytest.approx(0.4))
    assert more.score == pytest.approx(expit(0.5))
    first, second = rank(LETTERS, ["q", "r"], [["b"], ["c", "a"]], penalties=[[0.0], [2.0, 0.0]])
    assert (first.ranked[0].reward, second.chosen) == (2.0, "a")


@given(st.lists(st.sampled_from("abcde"), min_size=1, max_size=8), st.sampled_from(METHODS))
def test_what_holds_for_any_candidates(candidates: list[str], method: str) -> None:
    (found,) = rank(LETTERS, ["q"], [candidates], method=method)
    assert sorted(r.position for r in found.ranked) == list(range(len(candidates)))
    assert all(candidates[r.position] == r.response for r in found.ranked)
    assert [r.reward for r in found.ranked] == sorted((LETTERS.rewards[c] for c in candidates), reverse=True)
    assert found.chosen in candidates
    assert 0 <= found.score <= 1
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["ranked"][0]["response"] == found.ranked[0].response


def test_nothing_to_rank_gives_nothing() -> None:
    assert rank(LETTERS, [], []) == []


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "message"),
    [
        ((["q"], [["a"]]), {"method": "best"}, ConfigError, "reward, majority, weighted_majority"),
        ((["q"], [["a"]]), {"threshold": 1.1}, ConfigError, "threshold"),
        ((["q"], [["a"]]), {"threshold": -0.1}, ConfigError, "threshold"),
        ((["q"], [["a"]]), {"threshold": float("nan")}, ConfigError, "threshold"),
        ((["q", "r"], [["a"]]), {}, ConfigError, "2 queries, 1 lists"),
        ((["q"], [["a"]]), {"query_ids": ["1", "2"]}, ConfigError, "2 ids"),
        ((["q", "r"], [["a"], []]), {"query_ids": ["1", "second"]}, DataError, "'second' has no response"),
        ((["q"], [["a", "b"]]), {"penalties": [[1.0]]}, ConfigError, "penalties"),
        ((["q"], [["a"]]), {"penalties": []}, ConfigError, "penalties"),
    ],
    ids=str,
)
def test_bad_input_is_refused(arguments: Any, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        rank(LETTERS, *arguments, **options)


# A reward function for TRL --------------------------------------------------------------------------------


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_rewards_are_plain_floats_of_prompt_and_completion() -> None:
    function = RewardFunction(LETTERS)
    rewards = function(prompts=["q", "r"], completions=["b", "a"], completion_ids=[[1], [2]], trainer_state=None)
    assert rewards == [2.0, -1.0]
    assert all(type(r) is float for r in rewards)
    assert LETTERS.asked == [("q", "b"), ("r", "a")]


def test_a_column_query_is_what_is_asked() -> None:
    RewardFunction(LETTERS)(["long prompt"], ["b"], query=["q"])
    assert LETTERS.asked == [("q", "b")]


def test_chats_are_read_without_the_system_message() -> None:
    prompts = [
        [{"role": "system", "content": "Be brief."}, user("q")],
        [user("q"), {"role": "assistant", "content": "x"}, user("r")],
    ]
    completions = [[{"role": "assistant", "content": "b"}], [{"role": "assistant", "content": "a"}]]
    assert RewardFunction(LETTERS)(prompts, completions) == [2.0, -1.0]
    assert LETTERS.asked == [("q", "b"), ("User: q\n\nAssistant: x\n\nUser: r", "a")]


def test_a_reward_function_has_the_name_that_trl_logs() -> None:
    assert RewardFunction(LETTERS).__name__ == "oirl_reward"
    assert RewardFunction(LETTERS, name="right").__name__ == "right"


# Fitted models --------------------------------------------------------------------------------------------


def sums(n: int = 60, per_query: int = 4) -> pa.Table:
    """Return a log of replies that add up two numbers, every other one falsely."""
    rng = np.random.default_rng(0)
    rows = []
    for i, query in enumerate(make_queries(n)):
        a, b = (int(x) for x in rng.integers(10, 30, 2))
        for k in range(per_query):
            total = a + b + (0 if k % 2 else int(rng.integers(1, 9)))
            text = f"Step 1: {a} + {b} = {total}. The answer is {total}."
            row = {"query_id": f"q{i}", "query": query, "prompt_id": f"p{k}", "prompt": "{query}", "response": text}
            rows.append(row | {"correct": bool(k % 2), "answer": str(a + b)})
    return pa.Table.from_pylist(rows)


@pytest.fixture(scope="module")
def fitted() -> ResponseRewardModel:
    return ResponseRewardModel(params={"strength": 3.0}).fit(sums())


def test_a_fitted_model_ranks_the_true_sum_first(fitted: ResponseRewardModel) -> None:
    true, false = "Step 1: 20 + 11 = 31. The answer is 31.", "Step 1: 20 + 11 = 35. The answer is 35."
    (found,) = rank(fitted, ["Add 20 and 11."], [[false, true]])
    assert found.chosen == true
    reward = fitted.predict_reward(["Add 20 and 11."], [true])
    assert found.score == pytest.approx(fitted.chosen_probability(reward, 2)[0])
    (vote,) = rank(fitted, ["Add 20 and 11."], [[false, true, false]], method="majority")
    assert vote.chosen == false
    assert vote.score == pytest.approx(2 / 3)


def test_a_fitted_preference_model_votes_too() -> None:
    rows = [
        {"pair_id": str(i), "query": q, "chosen": f"It is good: {i}", "rejected": f"It is bad: {i}"}
        for i, q in enumerate(make_queries(40))
    ]
    model = BradleyTerryRewardModel().fit(pa.Table.from_pylist(rows))
    (found,) = rank(model, ["q"], [["It is bad: 5", "It is good: 5"]], method="reward")
    assert found.chosen == "It is good: 5"
    rewards = model.predict_reward(["q", "q"], ["It is bad: 5", "It is good: 5"])
    assert found.score == pytest.approx(expit(rewards[1] - rewards[0]))
    (vote,) = rank(model, ["q"], [["It is bad: 5", "It is good: 5", "It is bad: 7"]], method="majority")
    assert (vote.chosen, vote.ranked[0].answer) == ("It is bad: 5", "5")  # the first of two that say 5


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["GRPO", "RLOO"])
def test_trl_trains_with_it(trainer: str, fitted: ResponseRewardModel, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    pytest.importorskip("datasets")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    from oirl_data import small_lm_path

    class Counted(RewardFunction):
        def __init__(self) -> None:
            super().__init__(fitted)
            self.calls: list[tuple[list[str], list[str], list[float]]] = []

        def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
            rewards = super().__call__(prompts, completions, **columns)
            self.calls.append((columns["query"], list(completions), rewards))
            return rewards

    set_seed(0)
    function = Counted()
    queries = ["Anna has 12 apples and gets 7 more. How many apples?", "Ben has 9 books and buys 5. How many books?"]
    config = getattr(trl, f"{trainer}Config")(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        num_generations=2,
        max_completion_length=16,
        max_steps=2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    made = getattr(trl, f"{trainer}Trainer")(
        model=AutoModelForCausalLM.from_pretrained(small_lm_path()),
        processing_class=AutoTokenizer.from_pretrained(small_lm_path()),
        reward_funcs=function,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": [f"{q} Work step by step." for q in queries], "query": queries}),
    )
    made.train()
    assert len(function.calls) == 2
    for asked, completions, rewards in function.calls:
        assert set(asked) <= set(queries)
        assert rewards == pytest.approx(fitted.predict_reward(asked, completions).tolist())
    logged = [row["rewards/oirl_reward/mean"] for row in made.state.log_history if "rewards/oirl_reward/mean" in row]
    assert logged == pytest.approx([np.mean(rewards) for _, _, rewards in function.calls], abs=1e-4)
