"""One suite over every registered prompt model and kind of embedder, and what `PromptRewardModel` refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import make_log, make_queries

from oirl import PromptRewardModel, load
from oirl.errors import ConfigError, DataError, NotFittedError, OirlError, UnknownNameError
from oirl.registry import KINDS
from oirl.rewards.embedders import TfidfEmbedder

FAST: dict[str, dict[str, Any]] = {
    "xgboost": {"rounds": 30},
    "xgboost-published": {"rounds": 20},
    "mlp": {"epochs": 5},
}
QUERIES = [*make_queries(12, seed=70), "", "水 9,000"]


def counting(texts: list[str]) -> np.ndarray:
    return np.array([[t.count("alpha"), t.count("beta"), t.count("way a"), t.count("way b")] for t in texts], float)


EMBEDDERS: dict[str, Any] = {
    "tfidf": "tfidf",
    "tfidf-chars": lambda: TfidfEmbedder(min_df=1, blocks=("words", "chars")),
    "callable": counting,
}


def embedder_of(kind: str) -> Any:
    return EMBEDDERS[kind]() if kind == "tfidf-chars" else EMBEDDERS[kind]


@pytest.fixture(scope="module", params=[(m, e) for m in KINDS["prompt-models"] for e in EMBEDDERS], ids="-".join)
def fitted(request: pytest.FixtureRequest) -> tuple[PromptRewardModel, str]:
    model, kind = request.param
    table = make_log(40)
    return PromptRewardModel(model, embedder=embedder_of(kind), params=FAST.get(model)).fit(table), kind


def test_predictions_are_probabilities(fitted: tuple[PromptRewardModel, str]) -> None:
    model, _ = fitted
    predicted = model.predict_proba(QUERIES)
    assert predicted.shape == (len(QUERIES), 3)
    assert np.isfinite(predicted).all()
    assert ((predicted >= 0) & (predicted <= 1)).all()


def test_a_saved_model_predicts_the_same(fitted: tuple[PromptRewardModel, str], tmp_path: Path) -> None:
    model, kind = fitted
    model.save(tmp_path / "m")
    restored = load(tmp_path / "m", embedder=counting if kind == "callable" else None)
    assert restored.predict_proba(QUERIES) == pytest.approx(model.predict_proba(QUERIES), abs=1e-9)
    unseen = ["Another way a {query}", model.prompts_[1]]
    assert restored.predict_proba(QUERIES, unseen) == pytest.approx(model.predict_proba(QUERIES, unseen), abs=1e-9)
    assert restored.prompt_ids_ == model.prompt_ids_
    assert restored.prompts_ == model.prompts_
    assert restored.train_.seen.overlap(QUERIES) == model.train_.seen.overlap(QUERIES)
    assert restored.train_.rates == pytest.approx(model.train_.rates)
    assert np.array_equal(restored.knn_.predict(QUERIES), model.knn_.predict(QUERIES))
    again = tmp_path / "again"
    restored.save(again)
    second = load(again, embedder=counting if kind == "callable" else None)
    assert np.array_equal(second.predict_proba(QUERIES), restored.predict_proba(QUERIES))
    assert {f.suffix for f in again.iterdir()} <= {".json", ".npz", ".ubj"}


def test_a_query_does_not_depend_on_its_neighbours(fitted: tuple[PromptRewardModel, str]) -> None:
    model, _ = fitted
    together = model.predict_proba(QUERIES)
    for i in (0, 5, len(QUERIES) - 2):
        assert model.predict_proba([QUERIES[i]])[0] == pytest.approx(together[i], abs=1e-6)


def test_templates_of_the_log_get_their_own_scores(fitted: tuple[PromptRewardModel, str]) -> None:
    model, _ = fitted
    scores = model.predict_proba(QUERIES)
    assert np.array_equal(model.predict_proba(QUERIES, model.prompts_[::-1]), scores[:, ::-1])
    mixed = model.predict_proba(QUERIES, ["A new one. {query}", model.prompts_[2]])
    assert mixed.shape == (len(QUERIES), 2)
    assert np.array_equal(mixed[:, 1], scores[:, 2])


def test_held_out_predictions_cover_the_log(fitted: tuple[PromptRewardModel, str]) -> None:
    model, _ = fitted
    held_out = model.held_out_
    assert held_out.probability.shape == (40, 3)
    assert np.isfinite(held_out.probability).all()
    assert sorted(np.unique(held_out.fold)) == [0, 1, 2, 3, 4]


def test_no_queries_give_no_rows(fitted: tuple[PromptRewardModel, str]) -> None:
    model, _ = fitted
    assert model.predict_proba([]).shape == (0, 3)


@pytest.mark.parametrize("model", sorted(KINDS["prompt-models"]))
def test_a_second_fit_gives_the_same(model: str) -> None:
    table = make_log(30)
    a, b = (PromptRewardModel(model, params=FAST.get(model)).fit(table) for _ in range(2))
    assert np.array_equal(a.predict_proba(QUERIES), b.predict_proba(QUERIES))
    assert np.array_equal(a.held_out_.probability, b.held_out_.probability)
    refitted = a.fit(make_log(40, seed=3)).fit(table)
    assert np.array_equal(refitted.predict_proba(QUERIES), b.predict_proba(QUERIES))


def column(table: pa.Table, name: str, values: Any) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, pa.array(values))


def test_parameters_in_init_only_and_state_with_underscore() -> None:
    model = PromptRewardModel("contrast", folds=3, seed=4)
    assert vars(model) == {"model": "contrast", "embedder": "tfidf", "folds": 3, "seed": 4, "params": None}
    with pytest.raises(NotFittedError, match="not fitted"):
        model.predict_proba(["a"])
    with pytest.raises(NotFittedError):
        model.save("nowhere")
    assert model.fit(make_log(12)) is model
    assert (model.model, model.embedder, model.folds, model.seed) == ("contrast", "tfidf", 3, 4)


def test_remembers_its_training_log() -> None:
    table = make_log(30)
    train = PromptRewardModel().fit(table).train_
    queries = table["query"].unique().to_pylist()
    assert (train.n_rows, train.n_queries) == (180, 30)
    assert train.seen.overlap(queries) == (30, 0)
    assert train.seen.overlap([q.upper() + "  " for q in queries]) == (30, 0)
    assert train.seen.overlap(["a cat of 5"]) == (0, 0)
    other_numbers = [q.replace("things", "things").replace(" 1", " 3").replace(" 2", " 4") for q in queries]
    exact, near = train.seen.overlap(other_numbers)
    assert exact + near == 30
    assert near == sum(a != b for a, b in zip(queries, other_numbers, strict=True)) > 0
    verdicts = {p: [] for p in "abc"}
    for row in table.to_pylist():
        verdicts[row["prompt_id"]].append(row["correct"])
    assert train.rates == pytest.approx([np.mean(verdicts[p]) for p in "abc"])


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda t: t.slice(0, 0), DataError, "has a verdict"),
        (lambda t: column(t, "correct", [None] * len(t)).cast(t.schema), DataError, "has a verdict"),
        (lambda t: t.filter(pa.array([p == "a" for p in t["prompt_id"].to_pylist()])), DataError, "one prompt only"),
        (lambda t: column(t, "query", ["The same."] * len(t)), DataError, "one query"),
        (lambda t: column(t, "prompt", [f"{i}" for i in range(len(t))]), DataError, "several texts"),
    ],
)
def test_logs_that_teach_nothing_are_refused(change: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        PromptRewardModel().fit(change(make_log(12)))


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="folds=1"):
        PromptRewardModel(folds=1).fit(make_log(12))
    with pytest.raises(UnknownNameError, match="did you mean 'contrast'"):
        PromptRewardModel("contrst").fit(make_log(12))


@pytest.mark.parametrize("model", ["contrast", "mlp"])
@pytest.mark.parametrize("seed", [-1, 2**40])
def test_any_seed_works_or_is_refused(model: str, seed: int) -> None:
    try:
        PromptRewardModel(model, seed=seed, params=FAST.get(model)).fit(make_log(12))
    except OirlError:
        return


def test_more_folds_than_groups_are_cut_down() -> None:
    model = PromptRewardModel(folds=50).fit(make_log(12))
    assert int(model.held_out_.fold.max()) < 12


def test_one_query_id_for_two_queries_is_refused() -> None:
    """Ids such as 0, 1, 2 of two data sets in one log would melt unlike queries into one."""
    table = make_log(30)
    queries = table["query"].to_pylist()
    queries[:6] = ["Rockets fly to 5 moons."] * 6
    table = column(table, "query_id", ["q1" if i == "q0" else i for i in table["query_id"].to_pylist()])
    with pytest.raises(DataError, match="query_id"):
        PromptRewardModel().fit(column(table, "query", queries))


def test_casing_of_a_query_is_no_other_query() -> None:
    table = make_log(12)
    queries = table["query"].to_pylist()
    queries[0] = queries[0].upper()
    assert PromptRewardModel().fit(column(table, "query", queries)).train_.n_queries == 12


def test_a_prompt_tried_once_is_not_the_best_single_prompt() -> None:
    """One lucky run is no evidence: 1 of 1 right must not replace prompts that were run 120 times."""
    table = make_log(60)
    lucky = table.slice(0, 1).to_pylist()[0] | {"prompt_id": "lucky", "prompt": "Luck. {query}", "correct": True}
    model = PromptRewardModel().fit(pa.concat_tables([table, pa.Table.from_pylist([lucky], table.schema)]))
    assert model.prompt_ids_[model.train_.best] != "lucky"


def test_prompts_of_one_text_keep_their_own_scores() -> None:
    """Two ids may share a template text (they differ in the system prompt, say): their scores must not be mixed."""
    table = make_log(60)
    model = PromptRewardModel().fit(column(table, "prompt", ["Use it. {query}"] * len(table)))
    scores = model.predict_proba(QUERIES)
    assert np.abs(scores[:, 0] - scores[:, 1]).max() > 0.3
    assert np.array_equal(model.predict_proba(QUERIES, model.prompts_), scores)


@pytest.mark.parametrize("kind", ["large_string", "dictionary"])
def test_tables_of_other_arrow_text_types_can_be_learned_from(kind: str) -> None:
    """`pa.Table.from_pandas` of pandas 3 gives large_string."""
    table = make_log(12)
    wanted = pa.large_string() if kind == "large_string" else pa.dictionary(pa.int32(), pa.string())
    other = pa.table(
        {n: table[n].cast(wanted) if table[n].type == pa.string() else table[n] for n in table.column_names}
    )
    assert np.array_equal(
        PromptRewardModel().fit(other).predict_proba(QUERIES), PromptRewardModel().fit(table).predict_proba(QUERIES)
    )


@pytest.mark.parametrize("missing", ["split", "correct", "prompt"])
def test_a_table_without_a_column_is_a_user_error(missing: str) -> None:
    table = make_log(12).drop_columns([missing])
    if missing == "split":  # optional in a log: absent means not split
        PromptRewardModel().fit(table)
        return
    with pytest.raises(OirlError, match=missing):
        PromptRewardModel().fit(table)


def test_a_component_found_through_an_entry_point_can_be_loaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib.metadata import EntryPoint

    mine = EntryPoint("mine", "oirl.rewards.contrast:ContrastScorer", "oirl.prompt-models")
    monkeypatch.setattr("oirl.registry.entry_points", lambda group: [mine] if group == "oirl.prompt-models" else [])
    monkeypatch.setattr("oirl.rewards.contrast.ContrastScorer.name", "mine")
    model = PromptRewardModel("mine").fit(make_log(12))
    model.save(tmp_path / "m")
    assert np.array_equal(load(tmp_path / "m").predict_proba(QUERIES), model.predict_proba(QUERIES))


def test_probabilities_are_those_of_new_queries() -> None:
    """The truth of the generator is known: 0.9 and 0.1 by kind for a and b, 0.55 for c."""
    model = PromptRewardModel().fit(make_log(300))
    queries = make_queries(200, seed=77)
    truth = np.array([[0.9, 0.1, 0.55] if "alpha" in q else [0.1, 0.9, 0.55] for q in queries])
    predicted = model.predict_proba(queries)
    assert np.abs(predicted.mean(axis=0) - truth.mean(axis=0)).max() < 0.06
    assert np.abs(predicted - truth).mean() < 0.12
