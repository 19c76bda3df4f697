"""The evaluation document: its contract, its figures by hand, and what it must warn of."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import ANIMALS, PLACES, VERBS, make_log, make_queries

from oirl import PromptRewardModel, PromptSelector, evaluate
from oirl.errors import DataError, OirlError
from oirl.logs.cells import make_cells
from oirl.statistics import metrics

INTERVAL = {"value", "ci_low", "ci_high", "gain", "gain_ci_low", "gain_ci_high", "estimator"}


@pytest.fixture(scope="module")
def selector(log: pa.Table) -> PromptSelector:
    return PromptSelector().fit(log)


@pytest.fixture(scope="module")
def test_log() -> pa.Table:
    return make_log(120, seed=77)


def column(table: pa.Table, name: str, values: Any) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, pa.array(values, table.schema.field(name).type))


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [n for v in value.values() for n in numbers(v)]
    if isinstance(value, list):
        return [n for v in value for n in numbers(v)]
    return [float(value)] if isinstance(value, (int, float)) else []


def test_the_document_keeps_the_contract(selector: PromptSelector, test_log: pa.Table) -> None:
    document = evaluate(selector, test_log, draws=200).to_dict()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert {"n_rows", "n_queries", "n_prompts", "model", "policies", "ceiling", "deploy"} <= document.keys()
    expected = {"auc", "auc_within_prompt", "auc_within_query", "brier", "brier_skill", "ece", "log_loss"}
    assert document["model"].keys() == expected
    assert {"best_prompt", "selector", "random"} <= document["policies"].keys()
    for policy in document["policies"].values():
        assert policy.keys() >= INTERVAL
        assert policy["ci_low"] <= policy["value"] <= policy["ci_high"]
        assert policy["gain_ci_low"] <= policy["gain"] <= policy["gain_ci_high"]
    assert {"value", "method", "one_draw_oracle"} <= document["ceiling"].keys()
    assert {"policy", "reason"} <= document["deploy"].keys()
    assert (document["n_rows"], document["n_queries"], document["n_prompts"]) == (720, 120, 3)
    assert document["warnings"] == []


def test_values_by_hand(selector: PromptSelector, test_log: pa.Table) -> None:
    result = evaluate(selector, test_log, draws=200)
    cells = make_cells(test_log)
    runs, successes = cells.matrices()
    rates = successes / runs
    scores = selector.model_.predict_proba(cells.queries)
    best = cells.prompt_ids.index("c")
    margin = selector.deployment_.margin
    by_hand = []
    for i in range(120):
        top = int(scores[i].argmax())
        by_hand.append(rates[i, top] if scores[i, top] - scores[i, best] > margin else rates[i, best])
    policies = result.policies
    assert policies["best_prompt"]["value"] == pytest.approx(rates[:, best].mean())
    assert policies["best_prompt"]["prompt_id"] == "c"
    assert policies["selector"]["value"] == pytest.approx(np.mean(by_hand))
    assert policies["random"]["value"] == pytest.approx(rates.mean())
    for policy in policies.values():
        assert policy["gain"] == pytest.approx(policy["value"] - policies["best_prompt"]["value"])
    assert policies["best_prompt"]["gain_ci_low"] == policies["best_prompt"]["gain_ci_high"] == 0
    flat = scores[cells.query_index, cells.prompt_index]
    assert result.model["brier"] == pytest.approx(metrics.brier(flat, cells.runs, cells.successes))
    reference = metrics.brier(selector.model_.train_.rates[cells.prompt_index], cells.runs, cells.successes)
    assert result.model["brier_skill"] == pytest.approx(1 - result.model["brier"] / reference)


def test_gains_are_paired(selector: PromptSelector) -> None:
    """Where a policy and the best prompt fail on the same queries the gain is surer than the values."""
    table = make_log(200, seed=78)
    cells = make_cells(table)
    hard = np.random.default_rng(0).random(200) < 0.5
    ids = {name: h for name, h in zip(cells.query_ids, hard, strict=True)}
    verdicts = [False if ids[r["query_id"]] else r["correct"] for r in table.to_pylist()]
    random = evaluate(selector, column(table, "correct", verdicts)).policies["random"]
    rates = make_cells(column(table, "correct", verdicts))
    runs, successes = rates.matrices()
    gains = (successes / runs).mean(axis=1) - (successes / runs)[:, rates.prompt_ids.index("c")]
    half = 1.96 * gains.std() / np.sqrt(200)
    assert random["gain_ci_high"] - random["gain_ci_low"] == pytest.approx(2 * half, rel=0.15)


def test_best_prompt_is_that_of_the_training_log(selector: PromptSelector) -> None:
    table = make_log(60, seed=5)
    verdicts = [p == "a" for p in table["prompt_id"].to_pylist()]
    result = evaluate(selector, column(table, "correct", verdicts), draws=100)
    assert result.policies["best_prompt"]["prompt_id"] == "c"
    assert result.policies["best_prompt"]["value"] == 0
    assert result.prompts[0]["prompt_id"] == "a"


def test_one_seed_one_document(selector: PromptSelector, test_log: pa.Table) -> None:
    a, b, c = (evaluate(selector, test_log, seed=s, draws=200).to_dict() for s in (1, 1, 2))
    assert a == b
    assert a["policies"]["selector"]["value"] == c["policies"]["selector"]["value"]
    assert a["policies"]["selector"]["ci_low"] != c["policies"]["selector"]["ci_low"]


def test_the_order_of_rows_changes_no_value(selector: PromptSelector, test_log: pa.Table) -> None:
    mixed = test_log.take(pa.array(np.random.default_rng(0).permutation(len(test_log))))
    a, b = evaluate(selector, test_log, draws=100), evaluate(selector, mixed, draws=100)
    assert numbers(a.model) == pytest.approx(numbers(b.model))
    assert [p["value"] for p in a.policies.values()] == pytest.approx([p["value"] for p in b.policies.values()])


def test_rows_marked_test_are_used_and_those_marked_train_are_not(selector: PromptSelector) -> None:
    table = make_log(60, seed=9)
    number = [int(i[1:]) for i in table["query_id"].to_pylist()]
    marked = column(table, "split", ["test" if i < 20 else "train" if i < 40 else "other" for i in number])
    assert evaluate(selector, marked, draws=50).n_queries == 20
    no_test = column(table, "split", ["train" if i < 40 else None for i in number])
    assert evaluate(selector, no_test, draws=50).n_queries == 20
    assert evaluate(selector, column(table, "split", ["train"] * len(table)), draws=50).n_queries == 60


def test_a_split_that_leaks_is_told(selector: PromptSelector) -> None:
    table = make_log(40, seed=9)
    leaking = column(table, "split", ["test" if r % 2 else "train" for r in table["replicate"].to_pylist()])
    assert any("split column leaks" in w for w in evaluate(selector, leaking, draws=50).warnings)


def test_training_queries_are_told(selector: PromptSelector, log: pa.Table) -> None:
    (warning,) = evaluate(selector, log, draws=50).warnings
    assert "300 stood in the training log" in warning


def test_rows_without_a_verdict_do_not_count(selector: PromptSelector, test_log: pa.Table) -> None:
    verdicts = test_log["correct"].to_pylist()
    verdicts[::2] = [None] * len(verdicts[::2])  # one run of each cell
    result = evaluate(selector, column(test_log, "correct", verdicts), draws=100)
    assert result.n_rows == 360
    assert result.ceiling["value"] is None
    assert "bounds only" in result.ceiling["method"]
    assert result.ceiling["ci_low"] < result.ceiling["best_prompt"] < result.ceiling["ci_high"]
    assert result.ceiling["one_draw_oracle"] is not None


def test_queries_not_run_under_every_prompt_are_left_out_of_policies_and_told(
    selector: PromptSelector, test_log: pa.Table
) -> None:
    partial = test_log.filter(
        pa.array([not (r["prompt_id"] == "a" and int(r["query_id"][1:]) < 50) for r in test_log.to_pylist()])
    )
    result = evaluate(selector, partial, draws=100)
    assert any("on the 70 of 120 queries" in w for w in result.warnings)
    whole = test_log.filter(pa.array([int(i[1:]) >= 50 for i in test_log["query_id"].to_pylist()]))
    expected = evaluate(selector, whole, draws=100)
    for name in ("best_prompt", "selector", "random"):
        assert result.policies[name]["value"] == pytest.approx(expected.policies[name]["value"])
    assert result.n_rows == len(partial)


def test_policies_that_take_prompts_never_run_have_no_value(selector: PromptSelector, test_log: pa.Table) -> None:
    two = test_log.filter(pa.array([p != "b" for p in test_log["prompt_id"].to_pylist()]))
    document = evaluate(selector, two, draws=50).to_dict()
    json.dumps(document, allow_nan=False)
    assert document["n_prompts"] == 2
    policies = document["policies"]
    assert all(policy.keys() >= INTERVAL for policy in policies.values())
    for name in ("selector", "knn", "random"):  # they take b on some queries
        assert policies[name]["value"] is policies[name]["gain_ci_high"] is None
    # Both prompts were run on every query, so what was run of c is what c is worth.
    cells = make_cells(two)
    runs, successes = cells.matrices()
    assert policies["best_prompt"]["prompt_id"] == "c"
    assert policies["best_prompt"]["value"] == pytest.approx(
        (successes / runs)[:, cells.prompt_ids.index("c")].mean(), abs=0.02
    )
    assert any("never ran" in w and "selector" in w for w in document["warnings"])
    assert document["ceiling"]["value"] is None
    assert document["model"]["auc"] is not None


@pytest.mark.parametrize("verdict", [True, False])
def test_one_outcome_only_is_strict_json(selector: PromptSelector, verdict: bool) -> None:
    table = make_log(20, seed=3)
    document = evaluate(selector, column(table, "correct", [verdict] * len(table)), draws=50).to_dict()
    json.dumps(document, allow_nan=False)
    assert document["model"]["auc"] is None
    best = document["policies"]["best_prompt"]
    assert best["ci_high"] - best["ci_low"] > 0.05  # 20 of 20 is not certainty


def test_a_single_query_is_strict_json(selector: PromptSelector) -> None:
    document = evaluate(selector, make_log(1, seed=3), draws=50).to_dict()
    json.dumps(document, allow_nan=False)
    assert document["n_queries"] == 1


def test_unknown_prompts_are_told_and_left_out(selector: PromptSelector, test_log: pa.Table) -> None:
    extra = test_log.slice(0, 6)
    extra = column(extra, "prompt_id", ["new"] * 6)
    extra = column(extra, "prompt", ["New. {query}"] * 6)
    result = evaluate(selector, pa.concat_tables([test_log, extra]), draws=50)
    assert result.n_rows == len(test_log)
    assert any("unknown to the model" in w for w in result.warnings)
    with pytest.raises(DataError, match="no run of a prompt that the model knows"):
        evaluate(selector, extra)


def test_a_prompt_id_that_now_stands_for_another_template_is_told(selector: PromptSelector, test_log: pa.Table) -> None:
    """The id `a` of the model is one prompt, the `a` of this log is another: figures of one are not those of both."""
    other = column(test_log, "prompt", ["Another template. {query}"] * len(test_log))
    other = column(other, "prompt", [f"Another template {p}. {{query}}" for p in test_log["prompt_id"].to_pylist()])
    try:
        warnings = evaluate(selector, other, draws=50).warnings
    except OirlError:
        return
    assert any("template" in w or "text" in w for w in warnings)


def test_no_verdicts_are_refused(selector: PromptSelector, test_log: pa.Table) -> None:
    with pytest.raises(DataError, match="verdict"):
        evaluate(selector, column(test_log, "correct", [None] * len(test_log)))


def test_a_negative_seed_is_a_user_error(selector: PromptSelector, test_log: pa.Table) -> None:
    with pytest.raises(OirlError, match="seed"):
        evaluate(selector, test_log, seed=-1)


@pytest.mark.parametrize("effect", [0.0, 0.2, 0.4])
def test_the_ceiling_is_not_below_what_a_policy_reaches(effect: float) -> None:
    """A ceiling that the selector or the best single prompt stands above by more than chance is none."""
    result = evaluate(
        PromptSelector().fit(make_log(200, effect=effect)), make_log(300, seed=91, effect=effect), draws=100
    )
    for name in ("best_prompt", "selector"):
        assert result.ceiling["value"] > result.policies[name]["value"] - 0.02


def test_the_ceiling_holds_no_luck() -> None:
    result = evaluate(PromptSelector().fit(make_log(200, effect=0.0)), make_log(300, seed=91, effect=0.0), draws=100)
    assert result.ceiling["one_draw_oracle"] > 0.8
    assert result.ceiling["value"] < 0.6


def test_gain_intervals_cover_the_truth_on_new_logs(selector: PromptSelector) -> None:
    """The gain of `random` over `c` is −.0333 by construction."""
    hits = 0
    for seed in range(120):
        policy = evaluate(selector, make_log(60, seed=10_000 + seed), draws=200).policies["random"]
        hits += policy["gain_ci_low"] <= -0.05 * 2 / 3 <= policy["gain_ci_high"]
    assert 0.9 <= hits / 120 <= 0.992


def templated_log(stories: int, variants: int, seed: int) -> pa.Table:
    """Return a log of stories told with other numbers; success (½ on average) goes by story and prompt."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for story in range(stories):
        words = [*rng.permutation(ANIMALS)[:4], *rng.permutation(PLACES)[:3], *rng.permutation(VERBS)[:3]]
        chance = {p: float(np.clip(0.5 + 0.3 * rng.normal(), 0.02, 0.98)) for p in "abc"}
        for variant in range(variants):
            query = (
                f"{' '.join(words[:5])} has {rng.integers(2, 999)} and {rng.integers(2, 999)} {' '.join(words[5:])}?"
            )
            for prompt, p in chance.items():
                row = {"query_id": f"{story}-{variant}", "query": query, "prompt_id": prompt, "split": None}
                rows.append(row | {"prompt": f"Use way {prompt}. {{query}}", "correct": bool(rng.random() < p)})
    table = pa.Table.from_pylist(rows)
    return table.set_column(table.schema.get_field_index("split"), "split", pa.nulls(len(table), pa.string()))


def test_intervals_hold_where_queries_are_variants_of_few_stories(selector: PromptSelector) -> None:
    """Near duplicates are no independent evidence; oirl keeps them together in splits, so it knows which they are."""
    hits = 0
    for seed in range(100):
        policy = evaluate(selector, templated_log(20, 10, seed), draws=200).policies["best_prompt"]
        hits += policy["ci_low"] <= 0.5 <= policy["ci_high"]
    assert hits / 100 >= 0.88


def test_a_sound_model_has_skill_on_new_queries(selector: PromptSelector, test_log: pa.Table) -> None:
    model = evaluate(selector, test_log, draws=50).model
    assert model["brier_skill"] > 0.3
    assert model["auc_within_query"] > 0.85
    assert model["ece"] < 0.1
    null = evaluate(PromptSelector().fit(make_log(200, effect=0)), make_log(200, seed=6, effect=0), draws=50).model
    assert abs(null["brier_skill"]) < 0.03
    assert null["auc_within_query"] < 0.6


def test_another_reward_model_can_be_evaluated() -> None:
    fitted = PromptSelector(PromptRewardModel("logistic")).fit(make_log(40))
    result = evaluate(fitted, make_log(40, seed=2), draws=50)
    assert result.policies["selector"]["switched"] in (0.0, 1.0)  # it ranks prompts alike for all queries
    assert make_queries(2) != []


def test_the_ceiling_speaks_of_the_repeated_queries_only(selector: PromptSelector) -> None:
    """A few easy queries run twice must not make a ceiling for many hard ones run once."""
    hard = make_log(75, replicates=1, seed=21)
    easy = make_log(25, replicates=2, seed=22)
    hard = column(hard, "correct", [False] * len(hard))
    easy = column(easy, "correct", [True] * len(easy))
    easy = column(easy, "query_id", [f"easy {i}" for i in easy["query_id"].to_pylist()])
    result = evaluate(selector, pa.concat_tables([hard, easy]), draws=50)
    assert result.ceiling["n_queries"] == 25
    assert (result.ceiling["value"], result.ceiling["one_draw_oracle"]) == (1.0, 1.0)
    assert any("not of all 100" in w for w in result.warnings)


def test_runs_of_several_language_models_are_told(selector: PromptSelector, test_log: pa.Table) -> None:
    names = pa.array(["weak" if i % 2 else "strong" for i in range(len(test_log))])
    both = test_log.append_column("model", names)
    assert any("2 language models (strong, weak)" in w for w in evaluate(selector, both, draws=50).warnings)
    router = test_log.append_column("model", test_log["prompt_id"])
    assert not any("language model" in w for w in evaluate(selector, router, draws=50).warnings)
    assert not any("language model" in w for w in evaluate(selector, test_log, draws=50).warnings)


def test_an_unfitted_selector_is_a_user_error(test_log: pa.Table) -> None:
    with pytest.raises(OirlError, match="fitted"):
        evaluate(PromptSelector(), test_log)


def test_few_queries_are_told_to_be_few(selector: PromptSelector) -> None:
    assert any("fewer than 20" in w for w in evaluate(selector, make_log(5, seed=31), draws=50).warnings)


def test_the_ceiling_on_training_queries_holds_no_luck() -> None:
    """There the model has seen the runs: its estimates must not bring their luck into the ceiling."""
    table = make_log(120, effect=0.0)
    result = evaluate(PromptSelector().fit(table), table, draws=50)
    assert any("stood in the training log" in w for w in result.warnings)
    assert result.ceiling["value"] < 0.63
