"""The contrast model against logs of known truth."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
from conftest import make_log, make_queries
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from oirl import PromptRewardModel, PromptSelector
from oirl.errors import ConfigError
from oirl.logs.cells import Cells, make_cells
from oirl.logs.groups import group_queries
from oirl.logs.splits import assign_folds
from oirl.rewards.contrast import ContrastScorer, apply_stack, fit_stack
from oirl.rewards.embedders import TfidfEmbedder

NEW = make_queries(200, seed=4321)
IS_ALPHA = np.array(["alpha" in q for q in NEW])


def true_gain(model: PromptRewardModel, effect: float) -> float:
    """Return the expected gain, over always `c`, of taking the argmax on new queries: known, not estimated."""
    choice = model.predict_proba(NEW).argmax(axis=1)
    sign = np.where(IS_ALPHA, 1, -1)
    success = {"a": 0.5 + sign * effect, "b": 0.5 - sign * effect, "c": np.full(len(NEW), 0.55)}
    table = np.stack([success[name] for name in model.prompt_ids_], axis=1)
    return float((table[np.arange(len(NEW)), choice] - 0.55).mean())


def with_correct(table: pa.Table, verdict: Callable[[dict[str, object]], bool]) -> pa.Table:
    verdicts = pa.array([verdict(row) for row in table.to_pylist()])
    return table.set_column(table.schema.get_field_index("correct"), "correct", verdicts)


def fit_scorer(cells: Cells, fold: np.ndarray) -> tuple[ContrastScorer, np.ndarray]:
    embedder = TfidfEmbedder()
    prepared = embedder.prepare(cells.queries)
    features = embedder.fit(prepared).embed(prepared)
    return ContrastScorer().fit(features, np.eye(len(cells.prompts), dtype=np.float32), cells, fold, 0)


@pytest.mark.parametrize("effect", [0.2, 0.4])
def test_recovers_a_known_truth(effect: float) -> None:
    selector = PromptSelector().fit(make_log(300, effect=effect))
    best_possible = effect - 0.05
    assert true_gain(selector.model_, effect) > 0.85 * best_possible
    d = selector.deployment_
    assert d.policy == "selector"
    assert d.gain_ci_low - 0.02 < best_possible < d.gain_ci_high + 0.02


def test_probabilities_are_near_the_truth() -> None:
    model = PromptRewardModel().fit(make_log(600, effect=0.4))
    predicted = model.predict_proba(NEW)[:, model.prompt_ids_.index("a")]
    assert predicted[IS_ALPHA].mean() == pytest.approx(0.9, abs=0.05)
    assert predicted[~IS_ALPHA].mean() == pytest.approx(0.1, abs=0.05)


def open_gates(seeds: range, n: int, replicates: int) -> int:
    return sum(
        PromptSelector().fit(make_log(n, replicates=replicates, seed=seed, effect=0.0)).deployment_.policy == "selector"
        for seed in seeds
    )


def test_nothing_to_gain_keeps_the_gate_shut() -> None:
    # At a rate of 5% more than 6 of 60 come up once in 200 times; nominal is 2.5%.
    assert open_gates(range(60), 60, 1) <= 6


@pytest.mark.slow
def test_false_deployment_is_rare() -> None:
    # 95% shut, with room for chance: 200 at 5% give more than 17 once in 100 times.
    assert open_gates(range(100, 200), 60, 1) + open_gates(range(300, 400), 100, 2) <= 17


def test_on_noise_the_choice_loses_nothing(null_log: pa.Table) -> None:
    model = PromptRewardModel().fit(null_log)
    assert true_gain(model, 0.0) > -0.02


def test_row_order_and_prompt_order_do_not_matter() -> None:
    table = make_log(80)
    model = PromptRewardModel().fit(table)
    shuffled = PromptRewardModel().fit(table.take(pa.array(np.random.default_rng(0).permutation(len(table)))))
    order = [shuffled.prompt_ids_.index(name) for name in model.prompt_ids_]
    assert order != sorted(order) or shuffled.prompt_ids_ == model.prompt_ids_
    assert shuffled.predict_proba(NEW[:40])[:, order] == pytest.approx(model.predict_proba(NEW[:40]), abs=1e-4)

    by_prompt = PromptRewardModel().fit(table.sort_by([("prompt_id", "descending")]))
    assert by_prompt.prompt_ids_ == ["c", "b", "a"]
    assert by_prompt.predict_proba(NEW[:40])[:, ::-1] == pytest.approx(model.predict_proba(NEW[:40]), abs=1e-4)


def test_every_row_twice_gives_the_same_ranking() -> None:
    table = make_log(100)
    once = PromptRewardModel().fit(table).predict_proba(NEW)
    twice = PromptRewardModel().fit(pa.concat_tables([table, table])).predict_proba(NEW)
    # Twice the runs are half the penalty, so scores move a little; choices do not.
    assert np.array_equal(once.argmax(axis=1), twice.argmax(axis=1))
    assert np.abs(once - twice).max() < 0.1


def test_works_where_prompts_are_missing_on_some_queries() -> None:
    table = make_log(300)
    keep = np.random.default_rng(0).random(len(table)) < 0.6
    model = PromptRewardModel().fit(table.filter(pa.array(keep)))
    assert true_gain(model, 0.4) > 0.25


def test_works_where_each_query_saw_one_prompt_only() -> None:
    table = make_log(400, replicates=1)
    position = np.arange(len(table))
    one = np.random.default_rng(0).integers(0, 3, 400)[position // 3] == position % 3
    selector = PromptSelector().fit(table.filter(pa.array(one)))
    assert true_gain(selector.model_, 0.4) > 0.2
    assert selector.deployment_.policy == "best_prompt"  # the gain cannot be measured
    assert selector.deployment_.gain is None


def test_works_with_one_run_per_cell() -> None:
    assert true_gain(PromptRewardModel().fit(make_log(300, replicates=1)), 0.4) > 0.3


def test_works_with_two_prompts() -> None:
    table = make_log(200)
    two = table.filter(pa.array([p != "c" for p in table["prompt_id"].to_pylist()]))
    selector = PromptSelector().fit(two)
    assert selector.deployment_.policy == "selector"
    assert selector.deployment_.gain == pytest.approx(0.4, abs=0.08)


@pytest.mark.parametrize("kind", ["all right", "all wrong", "one right", "one wrong"])
def test_certain_prompts_stay_finite(kind: str) -> None:
    verdicts: dict[str, Callable[[dict[str, object]], bool]] = {
        "all right": lambda row: True,
        "all wrong": lambda row: False,
        "one right": lambda row: row["prompt_id"] == "b" or bool(row["correct"]),
        "one wrong": lambda row: row["prompt_id"] != "b" and bool(row["correct"]),
    }
    selector = PromptSelector().fit(with_correct(make_log(40), verdicts[kind]))
    predicted = selector.model_.predict_proba(NEW[:20])
    assert np.isfinite(predicted).all()
    assert ((predicted >= 0) & (predicted <= 1)).all()
    b = selector.model_.prompt_ids_.index("b")
    if kind == "one right":
        assert {s.prompt_id for s in selector.select(NEW[:20])} == {"b"}
    if kind == "one wrong":
        assert (predicted.argmax(axis=1) != b).all()


def test_works_with_a_dozen_queries() -> None:
    selector = PromptSelector().fit(make_log(12))
    assert np.isfinite(selector.model_.predict_proba(NEW[:10])).all()
    assert selector.deployment_.policy == "best_prompt"  # too few to measure a gain on
    assert "12 of 12" in selector.deployment_.reason


def test_works_on_one_giant_template_group() -> None:
    table = make_log(60)
    texts = {f"q{i}": f"Add {i} and {i * 7 + 3} to get the sum of both numbers." for i in range(60)}
    queries = pa.array([texts[i] for i in table["query_id"].to_pylist()])
    template = table.set_column(table.schema.get_field_index("query"), "query", queries)
    model = PromptRewardModel().fit(template)
    assert any("template" in w for w in model.warnings_)
    assert len(np.unique(model.held_out_.fold)) == 5
    assert np.isfinite(model.predict_proba(["Add 4 and 5."])).all()


def test_a_fold_is_scored_by_fits_of_the_other_folds() -> None:
    """The regressions that score a fold have not seen its labels; turning all of them round changes nothing there."""
    cells = make_cells(make_log(60))
    fold = assign_folds(cells.query_ids, group_queries(cells.queries).labels, 5, 0)
    embedder = TfidfEmbedder()
    prepared = embedder.prepare(cells.queries)
    x = embedder.fit(prepared).embed(prepared)
    runs, successes = (m.astype(float) for m in cells.matrices())
    inside = fold == 2
    turned = np.where(inside[:, None], runs - successes, successes)
    scorer = ContrastScorer()
    folds = [fold == f for f in range(5)]

    def grids(right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rates = right / runs
        means = np.stack([rates[~part].mean(axis=0) for part in folds])
        return (
            scorer._cross_fit_ease(x, rates, runs, means, folds)[inside],
            scorer._cross_fit_contrasts(x, rates, runs, means, folds)[inside],
        )

    for a, b in zip(grids(successes), grids(turned), strict=True):
        assert a == pytest.approx(b, abs=1e-6)


def test_cross_fitted_scores_do_not_know_their_own_labels() -> None:
    """On labels that are pure noise, held-out scores must not put the right prompts of a query ahead."""
    gaps = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        table = with_correct(make_log(50, replicates=1, seed=seed), lambda row, rng=rng: bool(rng.random() < 0.5))
        held_out = PromptRewardModel().fit(table).held_out_
        runs, successes = held_out.cells.matrices()
        score = held_out.probability - held_out.probability.mean(axis=1, keepdims=True)
        outcome = successes / runs - (successes / runs).mean(axis=1, keepdims=True)
        gaps.append(float((score * outcome).mean()))
    # Cross-fitted levels lean against a fold's own luck, so a mean below zero is expected; above it is a leak.
    assert np.mean(gaps) < 2 * np.std(gaps) / np.sqrt(len(gaps))


def test_unseen_prompts_are_scored_by_their_text() -> None:
    table = make_log(200)
    texts = {
        "a": "Reason step by step before answering. {query}",
        "b": "Reply with one number only, nothing else. {query}",
        "c": "Answer the question directly. {query}",
    }
    prompts = pa.array([texts[p] for p in table["prompt_id"].to_pylist()])
    table = table.set_column(table.schema.get_field_index("prompt"), "prompt", prompts)
    model = PromptRewardModel().fit(table)
    queries = NEW[:60]
    known = model.predict_proba(queries)
    assert np.array_equal(model.predict_proba(queries, model.prompts_), known)

    like_a = model.predict_proba(queries, ["Reason step by step before you are answering. {query}"])[:, 0]
    unlike = model.predict_proba(queries, ["水は好きですか"])[:, 0]
    column = model.prompt_ids_.index("a")
    assert np.corrcoef(like_a, known[:, column])[0, 1] > 0.9
    spread = np.ptp(known[:, column])
    assert np.ptp(unlike) < 0.2 * spread
    logits = np.log(known / (1 - known)).mean()
    assert np.log(unlike / (1 - unlike)).mean() == pytest.approx(logits, abs=0.3)


@pytest.mark.parametrize("bad", [{"ease_strengths": ()}, {"contrast_strengths": (1.0, 0.0)}, {"alpha": 3}])
def test_bad_parameters_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="contrast"):
        PromptRewardModel(params=bad).fit(make_log(12))


def test_the_stack_recovers_its_own_model() -> None:
    rng = np.random.default_rng(0)
    ease, contrasts = rng.normal(size=4000), rng.normal(size=(4000, 3)) * 0.5
    truth = np.array([0.5, -0.2, 0.1, 0.8, 1.5])
    runs = rng.integers(0, 4, (4000, 3))
    successes = rng.binomial(runs, expit(apply_stack(ease, contrasts, truth)))
    assert fit_stack(ease, contrasts, runs, successes) == pytest.approx(truth, abs=0.12)


def test_contrasts_that_mislead_are_dropped_not_turned_round() -> None:
    rng = np.random.default_rng(1)
    ease, contrasts = rng.normal(size=1000), rng.normal(size=(1000, 2))
    runs = np.ones((1000, 2), dtype=int)
    successes = rng.binomial(1, expit(-contrasts))
    weights = fit_stack(ease, contrasts, runs, successes)
    assert weights[-1] == 0
    assert weights[:-2] == pytest.approx(0, abs=0.2)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(2, 4), st.integers(0, 10**6))
def test_the_stack_is_finite_on_any_counts(n: int, prompts: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    runs = rng.integers(0, 3, (n, prompts))
    successes = rng.binomial(runs, rng.choice([0.0, 0.5, 1.0], (n, prompts)))
    scale = rng.choice([0.01, 1, 10])
    weights = fit_stack(rng.normal(size=n) * scale, rng.normal(size=(n, prompts)) * scale, runs, successes)
    assert np.isfinite(weights).all()
    assert weights[-1] >= 0
