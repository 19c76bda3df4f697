"""Choosing prompts: the contract of a row, candidates, and the gate's word."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import make_log, make_queries

from oirl import PromptRewardModel, PromptSelector, load
from oirl.errors import ConfigError, DataError, NotFittedError, OirlError
from oirl.logs.text import text_id
from oirl.selection.selector import Candidate, read_candidates

QUERIES = make_queries(40, seed=600)
ROW = {"query_id", "query", "prompt_id", "prompt", "score", "baseline_score", "changed"}


@pytest.fixture(scope="module")
def selector(log: pa.Table) -> PromptSelector:
    return PromptSelector().fit(log)


@pytest.fixture(scope="module")
def shut() -> PromptSelector:
    fitted = PromptSelector().fit(make_log(40))
    fitted.deployment_ = dataclasses.replace(fitted.deployment_, policy="best_prompt")
    return fitted


def known(selector: PromptSelector, *names: str) -> list[Candidate]:
    texts = dict(zip(selector.model_.prompt_ids_, selector.model_.prompts_, strict=True))
    return [Candidate(name, texts[name]) for name in names]


def test_rows_keep_the_contract(selector: PromptSelector) -> None:
    scores = selector.model_.predict_proba(QUERIES)
    best = selector.model_.prompt_ids_.index("c")
    for i, selection in enumerate(selector.select(QUERIES)):
        row = selection.to_dict()
        assert row.keys() == ROW
        assert json.loads(json.dumps(row, allow_nan=False)) == row
        chosen = selector.model_.prompt_ids_.index(row["prompt_id"])
        assert row["query"] == QUERIES[i]
        assert row["query_id"] == text_id(QUERIES[i])
        assert row["prompt"] == selector.model_.prompts_[chosen]
        assert row["score"] == scores[i, chosen] == scores[i].max()
        assert row["baseline_score"] == scores[i, best]
        assert row["changed"] == (chosen != best)


def test_the_choice_follows_the_kind_of_the_query(selector: PromptSelector) -> None:
    chosen = [s.prompt_id for s in selector.select(QUERIES)]
    right = ["a" if "alpha" in q else "b" for q in QUERIES]
    assert np.mean([x == y for x, y in zip(chosen, right, strict=True)]) > 0.95


def test_select_chooses_what_evaluate_values(selector: PromptSelector) -> None:
    positions = selector.choose(selector.model_.predict_proba(QUERIES))
    assert [s.prompt_id for s in selector.select(QUERIES)] == [selector.model_.prompt_ids_[p] for p in positions]


def test_explain_shows_all_scores(selector: PromptSelector) -> None:
    row = selector.select(QUERIES[:1])[0].to_dict(explain=True)
    assert row.keys() == ROW | {"scores"}
    assert row["scores"].keys() == {"a", "b", "c"}
    assert row["scores"][row["prompt_id"]] == row["score"]
    assert row["scores"]["c"] == row["baseline_score"]


@pytest.mark.parametrize("top", [1, 2, 3, 9])
def test_top_gives_the_best_first(selector: PromptSelector, top: int) -> None:
    rows = selector.select(QUERIES[:4], top=top)
    per_query = min(top, 3)
    assert len(rows) == 4 * per_query
    for start in range(0, len(rows), per_query):
        group = rows[start : start + per_query]
        assert [s.rank for s in group] == list(range(1, per_query + 1))
        assert len({s.prompt_id for s in group}) == per_query
        assert len({s.query_id for s in group}) == 1
        assert [s.score for s in group[1:]] == sorted((s.score for s in group[1:]), reverse=True)
        assert [s.to_dict().get("rank") for s in group] == [None, *range(2, per_query + 1)]


def test_a_shut_gate_gives_every_query_the_best_prompt(shut: PromptSelector) -> None:
    rows = shut.select(QUERIES)
    assert {s.prompt_id for s in rows} == {shut.deployment_.best_prompt}
    assert not any(s.changed for s in rows)
    assert all(s.score == s.baseline_score for s in rows)


def test_a_shut_gate_holds_among_candidates_too(shut: PromptSelector) -> None:
    rates = dict(zip(shut.model_.prompt_ids_, shut.model_.train_.rates, strict=True))
    better = max("ab", key=lambda name: rates[name])
    assert {s.prompt_id for s in shut.select(QUERIES, known(shut, "b", "a"))} == {better}


def test_candidates_restrict_the_choice(selector: PromptSelector) -> None:
    rows = selector.select(QUERIES, known(selector, "c", "a"))
    assert {s.prompt_id for s in rows} == {"a", "c"}
    assert all((s.prompt_id == "a") == ("alpha" in s.query) for s in rows)
    assert all(set(s.scores) == {"a", "c"} for s in rows)
    only = selector.select(QUERIES[:3], known(selector, "b"))
    assert {s.prompt_id for s in only} == {"b"}
    assert not any(s.changed for s in only)


def test_the_baseline_among_candidates_is_their_best_by_the_log(selector: PromptSelector) -> None:
    rates = dict(zip(selector.model_.prompt_ids_, selector.model_.train_.rates, strict=True))
    baseline = max("ab", key=lambda name: rates[name])
    for s in selector.select(QUERIES[:6], known(selector, "a", "b")):
        assert s.baseline_score == s.scores[baseline]
        assert s.changed == (s.prompt_id != baseline)


def test_a_prompt_the_log_does_not_hold_is_marked_and_not_chosen(selector: PromptSelector) -> None:
    new = Candidate("new", "Use way a, way a, way a. {query}")
    rows = selector.select(QUERIES[:10], [*known(selector, "c"), new], top=2)
    assert {s.prompt_id for s in rows if s.rank == 1} == {"c"}
    assert all(s.extrapolation == (s.prompt_id == "new") for s in rows)
    assert [s.to_dict().get("extrapolation") for s in rows[:2]] == [None, True]


def test_among_new_prompts_only_the_choice_is_by_their_text(selector: PromptSelector) -> None:
    new = [Candidate("x", "Use way a! {query}"), Candidate("y", "Quite unlike the rest")]
    rows = selector.select(QUERIES[:10], new)
    assert all(s.extrapolation for s in rows)
    assert {s.prompt_id for s in rows} <= {"x", "y"}


def test_query_ids_are_passed_on(selector: PromptSelector) -> None:
    rows = selector.select(["same", "same"], query_ids=["1", "2"], top=2)
    assert [s.query_id for s in rows] == ["1", "1", "2", "2"]


@pytest.mark.parametrize("ids", [["x"], ["x", "y", "z"]])
def test_query_ids_of_another_number_are_refused(selector: PromptSelector, ids: list[str]) -> None:
    with pytest.raises(ConfigError, match="quer"):
        selector.select(["a b", "c d"], query_ids=ids)


def test_no_queries_give_no_rows(selector: PromptSelector) -> None:
    assert selector.select([]) == []


def test_bad_requests_are_refused(selector: PromptSelector) -> None:
    with pytest.raises(ConfigError, match="top=0"):
        selector.select(QUERIES, top=0)
    with pytest.raises(ConfigError, match="no candidate"):
        selector.select(QUERIES, [])
    with pytest.raises(ConfigError, match="'a'"):
        selector.select(QUERIES, [Candidate("a", "1"), Candidate("a", "2")])
    with pytest.raises(NotFittedError, match="not fitted"):
        PromptSelector().select(QUERIES)
    with pytest.raises(NotFittedError):
        PromptSelector().save("nowhere")
    for margins in ((), (-0.1, 0.2)):
        with pytest.raises(ConfigError, match="margins"):
            PromptSelector(margins=margins).fit(make_log(12))


def test_prompts_of_one_text_are_not_mixed_up() -> None:
    """`select` must choose among ids as `evaluate` does, also where two ids have one template text."""
    table = make_log(80)
    texts = pa.array(["Use it. {query}"] * len(table))
    fitted = PromptSelector().fit(table.set_column(table.schema.get_field_index("prompt"), "prompt", texts))
    assert fitted.deployment_.policy == "selector"
    positions = fitted.choose(fitted.model_.predict_proba(QUERIES))
    assert [s.prompt_id for s in fitted.select(QUERIES)] == [fitted.model_.prompt_ids_[p] for p in positions]


def test_a_saved_selector_chooses_the_same(selector: PromptSelector, tmp_path: Path) -> None:
    selector.save(tmp_path / "m")
    restored = load(tmp_path / "m")
    assert isinstance(restored, PromptSelector)
    assert restored.deployment_ == selector.deployment_
    assert restored.metrics_ == selector.metrics_
    assert restored.warnings_ == selector.warnings_
    for a, b in zip(restored.select(QUERIES, top=2), selector.select(QUERIES, top=2), strict=True):
        assert a.prompt_id == b.prompt_id
        assert a.score == pytest.approx(b.score, abs=1e-9)


def test_only_rows_marked_train_are_learned_from() -> None:
    table = make_log(40)
    sides = ["train" if int(i[1:]) < 25 else "test" for i in table["query_id"].to_pylist()]
    marked = table.set_column(table.schema.get_field_index("split"), "split", pa.array(sides))
    fitted = PromptSelector().fit(marked)
    assert fitted.model_.train_.n_queries == 25
    assert fitted.warnings_ == []
    leaking = ["train" if r else "test" for r in table["replicate"].to_pylist()]
    marked = table.set_column(table.schema.get_field_index("split"), "split", pa.array(leaking))
    assert any("leaks" in w for w in PromptSelector().fit(marked).warnings_)


def test_one_prompt_with_few_runs_does_not_take_the_choice_away() -> None:
    """A fourth prompt tried once must not make every other query useless to the gate, nor become the default."""
    table = make_log(100)
    extra: dict[str, Any] = table.slice(0, 1).to_pylist()[0]
    extra |= {"prompt_id": "tried once", "prompt": "Other. {query}", "correct": True}
    fitted = PromptSelector().fit(pa.concat_tables([table, pa.Table.from_pylist([extra], table.schema)]))
    assert fitted.deployment_.best_prompt != "tried once"
    assert fitted.deployment_.policy == "selector" or fitted.warnings_


def test_two_selectors_on_one_reward_model_stay_apart() -> None:
    shared = PromptRewardModel()
    first = PromptSelector(shared).fit(make_log(40))
    before = first.model_.predict_proba(QUERIES[:3])
    PromptSelector(shared).fit(make_log(40, seed=8))
    assert np.array_equal(first.model_.predict_proba(QUERIES[:3]), before)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "Use way a. {query}\n\nBrand new. {query}\n"),
        ("p.jsonl", '{"prompt_id": "a"}\n{"prompt_id": "new", "prompt": "Brand new. {query}"}\n'),
        ("p.json", '["Use way a. {query}", "Brand new. {query}"]'),
        ("p.yaml", "a:\nnew: Brand new. {query}\n"),
        ("p.yml", "- Use way a. {query}\n- prompt: Brand new. {query}\n"),
    ],
)
def test_candidates_from_files(selector: PromptSelector, tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    a, new = read_candidates(tmp_path / name, selector.model_)
    assert a == Candidate("a", "Use way a. {query}")
    assert new.prompt == "Brand new. {query}"
    assert new.prompt_id == "new" or len(new.prompt_id) == 16  # a hash of the template, where the file names none
    assert read_candidates(tmp_path / name, selector.model_)[1].prompt_id == new.prompt_id


def test_bad_candidate_files_are_refused(selector: PromptSelector, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt_id": "aa"}\n')
    with pytest.raises(ConfigError, match="does not know the prompt 'aa'"):
        read_candidates(file, selector.model_)
    for text in ("", "{", "[1, 2]", '{"prompt": 3}'):
        file.write_text(text)
        with pytest.raises(DataError):
            read_candidates(file, selector.model_)
    with pytest.raises(OirlError, match="no such file"):
        read_candidates(tmp_path / "none.txt", selector.model_)


def test_the_baseline_is_the_prompt_that_the_gate_names() -> None:
    """A prompt run on few queries may have a higher rate; `select` must use the one that was compared and named."""
    table = make_log(200, effect=0.0)
    row = table.slice(0, 1).to_pylist()[0] | {"prompt_id": "few", "prompt": "Few. {query}", "correct": True}
    queries = dict(zip(table["query_id"].to_pylist(), table["query"].to_pylist(), strict=True))
    lucky = [row | {"query_id": i, "query": q} for i, q in list(queries.items())[:25]]
    # On the 25 queries that all four prompts were run on, the others are right too: there is no gain over them.
    first = {row["query_id"] for row in lucky}
    shared = [row | {"correct": row["correct"] or row["query_id"] in first} for row in table.to_pylist()]
    fitted = PromptSelector().fit(pa.Table.from_pylist([*shared, *lucky], table.schema))
    assert fitted.model_.train_.rates.argmax() != fitted.model_.train_.best  # the trap is set
    named = fitted.deployment_.best_prompt
    chosen = fitted.select(QUERIES)
    assert fitted.deployment_.policy == "best_prompt"
    assert {s.prompt_id for s in chosen} == {named}
    known = [Candidate(i, p) for i, p in zip(fitted.model_.prompt_ids_, fitted.model_.prompts_, strict=True)]
    assert {s.prompt_id for s in fitted.select(QUERIES, known)} == {named}


def test_spaces_at_the_ends_of_a_template_make_no_other_prompt(selector: PromptSelector) -> None:
    model = selector.model_
    spaced = [Candidate(i, f" {p} \n") for i, p in zip(model.prompt_ids_, model.prompts_, strict=True)]
    rows = selector.select(QUERIES, spaced)
    assert not any(s.extrapolation for s in rows)
    assert [s.score for s in rows] == [s.score for s in selector.select(QUERIES)]


def test_an_empty_query_is_refused(selector: PromptSelector) -> None:
    with pytest.raises(ConfigError, match="query 2 is empty"):
        selector.select(["a cat", " "])


def test_a_log_with_holes_says_on_which_queries_the_prompts_were_compared() -> None:
    table = make_log(100)
    assert PromptSelector().fit(table).warnings_ == []
    hole = [i >= 90 or p != "b" for i, p in zip(range(len(table)), table["prompt_id"].to_pylist(), strict=True)]
    (warning,) = PromptSelector().fit(table.filter(pa.array(hole))).warnings_
    assert "compared on the 85 of 100 queries" in warning


def test_a_loaded_selector_fits_as_the_saved_one_did(tmp_path: Path) -> None:
    first = PromptSelector(PromptRewardModel(seed=np.int64(3)), margins=(0.3,)).fit(make_log(60))
    first.save(tmp_path / "m")
    again = load(tmp_path / "m")
    assert again.margins == (0.3,)
    assert again.fit(make_log(60)).deployment_ == first.deployment_
    assert np.array_equal(again.model_.predict_proba(QUERIES), first.model_.predict_proba(QUERIES))


def test_guesses_rank_behind_known_prompts(selector: PromptSelector) -> None:
    known = [Candidate(i, p) for i, p in zip(selector.model_.prompt_ids_, selector.model_.prompts_, strict=True)]
    rows = selector.select(QUERIES[:1], [Candidate("new", "Something else."), *known], top=4)
    assert [s.extrapolation for s in rows] == [False, False, False, True]
