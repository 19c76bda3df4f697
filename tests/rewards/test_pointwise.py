"""Scorers on query and prompt side by side: toys that each must, or must not, be able to learn."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from conftest import make_log, make_queries
from scipy.special import logit

from oirl import PromptRewardModel
from oirl.errors import ConfigError
from oirl.logs.cells import Cells
from oirl.rewards.pointwise import LogisticScorer, MLPScorer, PublishedXGBoostScorer, XGBoostScorer

QUERIES = make_queries(60, seed=50)


def toy(n: int = 300, seed: int = 0, *, interaction: bool) -> tuple[np.ndarray, np.ndarray, Cells, np.ndarray]:
    """Return queries (n, 2), prompts (2, 2), cells and folds; right if x > 0 (turned round for prompt 1, or not)."""
    rng = np.random.default_rng(seed)
    queries = rng.normal(size=(n, 2)).astype(np.float32)
    prompts = np.eye(2, dtype=np.float32)
    q, p = np.repeat(np.arange(n), 2), np.tile([0, 1], n)
    sign = np.where((p == 1) & interaction, -1, 1)
    right = (queries[q, 0] * sign > 0).astype(np.int64)
    cells = Cells([str(i) for i in range(n)], [""] * n, ["0", "1"], ["", ""], q, p, np.ones(2 * n, np.int64), right)
    return queries, prompts, cells, np.arange(n) % 3


@pytest.mark.parametrize("scorer", [LogisticScorer(), XGBoostScorer(), MLPScorer()], ids=lambda s: s.name)
def test_learns_a_separable_toy(scorer: LogisticScorer) -> None:
    queries, prompts, cells, fold = toy(interaction=False)
    scorer, held_out = scorer.fit(queries, prompts, cells, fold, 0)
    right = queries[:, 0] > 0
    assert ((held_out > 0) == right[:, None]).mean() > 0.9
    new = toy(seed=9, interaction=False)[0]
    assert ((scorer.scores(new) > 0) == (new[:, :1] > 0)).mean() > 0.9


@pytest.mark.parametrize("scorer", [XGBoostScorer(), MLPScorer(epochs=100)], ids=lambda s: s.name)
def test_learns_which_prompt_suits_which_query(scorer: MLPScorer) -> None:
    queries, prompts, cells, fold = toy(interaction=True)
    _, held_out = scorer.fit(queries, prompts, cells, fold, 0)
    assert (held_out.argmax(axis=1) == (queries[:, 0] < 0)).mean() > 0.9


def test_logistic_ranks_the_prompts_alike_for_every_query(log: pa.Table) -> None:
    predicted = PromptRewardModel("logistic").fit(log).predict_proba(QUERIES)
    assert len(np.unique(predicted.argsort(axis=1), axis=0)) == 1
    odds = logit(predicted)
    assert np.ptp(odds - odds[:, :1], axis=0) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("name", ["logistic", "xgboost"])
def test_counts_weigh_like_rows(name: str) -> None:
    """One cell of 4 runs with 3 right says what 4 rows say."""
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(60, 3)).astype(np.float32)
    runs = rng.integers(1, 5, 60)
    successes = rng.binomial(runs, 0.6)
    make = {"logistic": LogisticScorer, "xgboost": lambda: XGBoostScorer(subsample=1.0, colsample=1.0, rounds=30)}
    cells, expanded = make[name](), make[name]()
    cells._fit_rows(rows, runs, successes, 0)
    each = np.repeat(np.arange(60), runs)
    outcome = np.concatenate([np.r_[np.ones(s), np.zeros(r - s)] for s, r in zip(successes, runs, strict=True)])
    expanded._fit_rows(rows[each], np.ones(len(each), np.int64), outcome.astype(np.int64), 0)
    assert cells._score_rows(rows) == pytest.approx(expanded._score_rows(rows), abs=2e-3)


@pytest.mark.parametrize("name", ["logistic", "xgboost", "mlp"])
@pytest.mark.parametrize("kind", ["all right", "all wrong", "one wrong"])
def test_one_outcome_only_is_no_crash(name: str, kind: str) -> None:
    table = make_log(40)
    verdicts = {"all right": [True] * 240, "all wrong": [False] * 240, "one wrong": [False] + [True] * 239}[kind]
    table = table.set_column(table.schema.get_field_index("correct"), "correct", pa.array(verdicts))
    params = {"rounds": 20} if name == "xgboost" else None
    predicted = PromptRewardModel(name, params=params).fit(table).predict_proba(QUERIES[:5])
    assert np.isfinite(predicted).all()
    assert (predicted < 0.1).all() if kind == "all wrong" else (predicted > 0.9).all()


def test_the_published_recipe_is_the_published_recipe() -> None:
    scorer = PublishedXGBoostScorer()
    assert {k: scorer.parameters[k] for k in ("max_depth", "eta", "rounds")} == {
        "max_depth": 10,
        "eta": 0.001,
        "rounds": 2000,
    }
    assert PublishedXGBoostScorer(**{k: v for k, v in scorer.describe().items() if k != "name"}).parameters == (
        scorer.parameters
    )


def test_another_seed_changes_learners_that_draw() -> None:
    table = make_log(40)
    by_seed = [PromptRewardModel("mlp", seed=s).fit(table).predict_proba(QUERIES[:5]) for s in (0, 0, 1)]
    assert np.array_equal(by_seed[0], by_seed[1])
    assert not np.array_equal(by_seed[0], by_seed[2])


def test_an_unknown_parameter_is_a_user_error() -> None:
    with pytest.raises(ConfigError, match="logistic"):
        PromptRewardModel("logistic", params={"c": 1}).fit(make_log(12))


@pytest.mark.parametrize("bad", [{"C": -1.0}, {"C": "x"}])
def test_a_parameter_out_of_range_is_a_user_error(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        PromptRewardModel("logistic", params=bad).fit(make_log(12))
