"""What an iteration learns from, and what the learner makes of it: signs, places and weights, by hand."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState
from test_online_runs import online

from oirl.tuning.configuring import make_settings
from oirl.tuning.drawing import block_of
from oirl.tuning.examples import Example
from oirl.tuning.experience import (
    Measured,
    by_token,
    experience_figures,
    make_experience,
    response_mask,
    token_rewards,
)
from oirl.tuning.learner import Learner
from oirl.tuning.online_settings import Online
from oirl.tuning.policy import Policy

MASK = response_mask([3, 1])
EXAMPLES = [Example([1, 5, 9, 30], [7, 12, 2]), Example([1, 8], [2])]


def settings(method: str = "apa", **changes: Any) -> Online:
    made = make_settings(method, online(Path("unused"), "unused.jsonl", **changes))
    assert isinstance(made, Online)
    return made


def measured(**changes: torch.Tensor | None) -> Measured:
    zero = torch.zeros(2, 3)
    found = Measured(MASK, zero - 1.0 * MASK, zero - 1.0 * MASK, zero, zero, torch.full((2, 3), torch.nan))
    return replace(found, **changes)  # type: ignore[arg-type]


def test_a_reward_stands_at_the_last_token_less_what_being_cut_off_costs() -> None:
    how = settings(missing_eos_penalty=0.5)
    found = token_rewards(np.array([2.0, 3.0]), [False, True], MASK, how, 1.0)
    assert found.tolist() == [[0, 0, 1.5], [3.0, 0, 0]]


def test_rewards_are_divided_by_their_deviation_and_then_cut() -> None:
    how = settings(reward_scale="running", reward_clip=3.0)
    found = token_rewards(np.array([4.0, -20.0]), [True, True], MASK, how, 2.0)
    assert found.tolist() == [[0, 0, 2.0], [-3.0, 0, 0]]
    unscaled = token_rewards(np.array([4.0, -20.0]), [True, True], MASK, settings(reward_clip=None), 2.0)
    assert unscaled.tolist() == [[0, 0, 4.0], [-20.0, 0, 0]]


def test_rewards_of_tokens_stay_where_they_are() -> None:
    rewards = np.empty(2, dtype=object)
    rewards[0], rewards[1] = np.array([1.0, 0.0, -12.0]), np.array([0.5])
    found = token_rewards(rewards, [True, False], MASK, settings(missing_eos_penalty=1.0), 1.0)
    assert found.tolist() == [[1.0, 0, -10.0], [-0.5, 0, 0]]


def test_ppo_pays_for_going_away_from_the_reference_and_the_others_do_not() -> None:
    """π_old of the first token is e times π_ref's: at β = 0.5 that costs 0.5 there, and so in what comes before."""
    old = torch.tensor([[-1.0, -1.0, -1.0], [-1.0, 0.0, 0.0]])
    ref = torch.tensor([[-1.0, -2.0, -1.0], [-1.0, 0.0, 0.0]])
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    told = measured(old_logprobs=old, ref_logprobs=ref)
    plain = {"whiten": "none", "gae_lambda": 1.0}
    ppo = make_experience(EXAMPLES, told, rewards, [0, 1], settings("ppo", **plain), 0.5)
    assert ppo.returns is not None
    assert ppo.returns.tolist() == [[0.5, 0.5, 1.0], [0, 0, 0]]
    assert torch.equal(ppo.advantages, ppo.returns)  # values are 0
    apa = make_experience(EXAMPLES, told, rewards, [0, 1], settings("apa", **plain), 0.5)
    assert apa.advantages.tolist() == [[1.0, 1.0, 1.0], [0, 0, 0]]


def test_without_values_all_tokens_have_the_advantage_of_their_response() -> None:
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    how = settings(baseline="leave_one_out", samples=2, whiten="none")
    found = make_experience(EXAMPLES, measured(values=None), rewards, [0, 0], how, 1.0)
    assert found.returns is None
    assert found.advantages.tolist() == [[1.0, 1.0, 1.0], [-1.0, 0, 0]]


def test_figures_by_hand() -> None:
    old = torch.tensor([[-1.0, -1.0, -1.0], [-2.0, 0.0, 0.0]])
    ref = torch.tensor([[-1.0, -1.5, -1.0], [-2.0, 0.0, 0.0]])
    engine = torch.tensor([[-1.0, -1.1, -1.0], [torch.nan, 0.0, 0.0]])
    told = measured(old_logprobs=old, ref_logprobs=ref, engine_logprobs=engine, entropy=1.0 * MASK)
    rewards = torch.tensor([[0.0, 0.0, 1.0], [3.0, 0.0, 0.0]])
    found = experience_figures(make_experience(EXAMPLES, told, rewards, [0, 1], settings(), 1.0), rewards)
    k3 = math.exp(-0.5) - 1 + 0.5
    assert found["kl"] == pytest.approx(0.25)  # 0.5 nats of the first response, 0 of the second
    assert found["kl_token"] == pytest.approx(0.125)
    assert found["kl_k3"] == pytest.approx(k3 / 2)
    assert found["kl_k3_token"] == pytest.approx(k3 / 4)
    assert found["entropy"] == 1.0
    assert found["tokens_mean"] == 2.0
    assert found["shaped_reward"] == 2.0
    assert found["advantage_deviation"] == pytest.approx(1.0)  # standardised
    assert found["engine_gap"] == pytest.approx(0.1 / 3)
    assert found["engine_ratio_max"] == pytest.approx(math.exp(0.1))


def test_numbers_of_a_response_that_do_not_fit_count_as_not_told() -> None:
    found = by_token([[1.0, 2.0, 3.0], None], MASK)
    assert found[0].tolist() == [1.0, 2.0, 3.0]
    assert found[1].isnan().tolist() == [True, False, False]
    assert by_token([[1.0], [4.0]], MASK)[0].isnan().all()


def test_all_queries_come_in_turn_in_another_order_each_time() -> None:
    blocks = [block_of(list(range(10)), 5, 0, i) for i in range(6)]
    for k in range(3):
        assert Counter(blocks[2 * k] + blocks[2 * k + 1]) == Counter(range(10))
    assert len({tuple(block) for block in blocks}) == 6
    assert blocks[0] == block_of(list(range(10)), 5, 0, 0)
    assert blocks[0] != block_of(list(range(10)), 5, 1, 0)
    assert sorted(block_of([1, 2, 3], 64, 0, 7)) == [1, 2, 3]


# The learner


def learner(method: str = "apa", **changes: Any) -> Learner:
    how = settings(method, epochs=1, batch=2, micro_batch=2, whiten="none", learning_rate=1e-12, **changes)
    return Learner(how, Policy(how), PartialState())


def update(made: Learner, how: Online, **changes: torch.Tensor | None) -> dict[str, float]:
    """Return the metrics of one update with advantages of 1 on the first response, 0 on the second."""
    told = replace(made.measure(EXAMPLES, [None, None]), **changes)  # type: ignore[arg-type]
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    experience = make_experience(EXAMPLES, told, rewards, [0, 1], how, made.kl.kl_coef)
    return made.update(experience, 0)


@pytest.mark.parametrize(("anchor", "loss"), [("initial", (3 * 9.0 + 1.0) / 4), ("old", 3 * 4.0 / 4)])
def test_apa_is_anchored_where_it_is_told_to_be(anchor: str, loss: float) -> None:
    """λ = 0.5, Adv = 1 on three tokens and 0 on one. The reference is 1 nat above: gaps 0 − 2 − 1 and 0 − 0 − 1."""
    how = settings(kl_coef=0.5, anchor=anchor, gae_lambda=1.0, whiten="none")
    made = learner(kl_coef=0.5, anchor=anchor, gae_lambda=1.0)
    ref = made.measure(EXAMPLES, [None, None]).old_logprobs + 1.0 * MASK
    assert update(made, how, ref_logprobs=ref)["policy_loss"] == pytest.approx(loss, rel=1e-4)


def test_importance_weights_count_up_to_their_cap() -> None:
    """π_old is 1.2 times what the engine told of the first response, 4 times of the second: weights 1.2 and 2."""
    how = settings("awr", kl_coef=1.0, gae_lambda=1.0, whiten="none")
    made = learner("awr", kl_coef=1.0, gae_lambda=1.0, importance_cap=2.0)
    old = made.measure(EXAMPLES, [None, None]).old_logprobs
    engine = old - torch.tensor([[math.log(1.2)] * 3, [math.log(4.0)] * 3]) * MASK
    losses = -torch.cat([math.e * old[0], old[1, :1]])  # weights exp(Adv/λ) = e and 1
    expected = (1.2 * losses[:3].sum() + 2 * losses[3]) / 4
    assert update(made, how, engine_logprobs=engine)["policy_loss"] == pytest.approx(float(expected), rel=1e-4)
    told = update(made, how)  # nothing is known of what the engine drew with: no weights
    assert told["policy_loss"] == pytest.approx(float(losses.sum() / 4), rel=1e-4)


def test_sequences_or_tokens_count_alike() -> None:
    """AWR with advantages of 0 is −log π of each token: its mean over tokens, or over responses."""
    old = learner("awr").measure(EXAMPLES, [None, None]).old_logprobs
    none = {"kl_coef": 1e9, "gae_lambda": 1.0}
    by_tokens = update(learner("awr", **none), settings("awr", **none))["policy_loss"]
    by_sequences = update(learner("awr", average="sequence", **none), settings("awr", **none))["policy_loss"]
    assert by_tokens == pytest.approx(-float(old.sum()) / 4, rel=1e-4)
    assert by_sequences == pytest.approx(-float(old[0].sum() / 3 + old[1, 0]) / 2, rel=1e-4)


def test_the_entropy_bonus_makes_the_policy_broader() -> None:
    changes = {"kl_coef": 1e9, "gae_lambda": 1.0, "whiten": "none", "entropy_coef": 50.0}
    how = settings("awr", epochs=8, batch=2, micro_batch=2, learning_rate=1e-4, **changes)
    made = Learner(how, Policy(how), PartialState())
    before = float(made.measure(EXAMPLES, [None, None]).entropy.sum())
    update(made, how)
    assert float(made.measure(EXAMPLES, [None, None]).entropy.sum()) > before + 0.05


def test_what_is_measured_is_what_a_plain_pass_says() -> None:
    made = learner()
    told = made.measure(EXAMPLES, [None, None])
    model = made._policy.model
    for i, example in enumerate(EXAMPLES):
        ids = torch.tensor([[*example.context, *example.response]])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(input_ids=ids).logits[0], dim=-1)
        start, n = len(example.context), len(example.response)
        rows = logprobs[start - 1 : start - 1 + n]
        wanted = rows[range(n), example.response]
        assert told.old_logprobs[i, :n].tolist() == pytest.approx(wanted.tolist(), abs=1e-4)
        assert told.entropy[i, :n].tolist() == pytest.approx((-(rows.exp() * rows).sum(-1)).tolist(), abs=1e-4)
        assert told.old_logprobs[i, n:].tolist() == [0.0] * (3 - n)
    assert told.values is not None
    assert not told.values.any()
    assert torch.allclose(told.ref_logprobs, told.old_logprobs, atol=1e-5)
