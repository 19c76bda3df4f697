"""GEPA: candidates as prompts, scores by name and as lists, verdicts and grades."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from reading import FIXTURES, column, read, refused

from oirl.errors import DataError

GEPA = FIXTURES / "gepa"
NO_TEXTS = (
    "the format keeps no texts of the validation examples, so queries have names only; prompts can be compared, but "
    "nothing can be learned per query"
)


def test_grades_by_name_of_the_example(tmp_path: Path) -> None:
    report, rows = read(GEPA / "dict.json", tmp_path)
    better = 'Count, then say "done".\nUse {words}.'
    assert column(rows, "query_id", "query", "prompt", "correct", "score", "run_id") == [
        (f"gepa/dict-example-{k}", f"validation example {k} of gepa/dict", prompt, None, score, "gepa/dict")
        for prompt, scores in (("Count.", (1.0, 0.0, 0.5)), (better, (1.0, 0.25, 1.0)))
        for k, score in enumerate(scores)
    ]
    assert column(rows, "metadata")[0] == {"candidate": 0, "parents": [None]}
    assert column(rows, "metadata")[3] == {"candidate": 1, "parents": [0]}
    assert (report.n_queries, report.n_prompts) == (3, 2)
    assert report.warnings == [
        f"dict.json: {NO_TEXTS}",
        "dict.json: scores are grades, not 0 and 1: they stand in the column `score`, without verdict",
        "no row has a verdict; `oirl fit` needs some: --map correct=FIELD, or --grade numeric",
    ]


def test_verdicts_in_lists_and_components_of_a_program(tmp_path: Path) -> None:
    report, rows = read(GEPA / "list.json", tmp_path)
    one, two = "[plan]\nPlan.\n\n[solve]\nSolve.", "[plan]\nPlan well.\n\n[solve]\nSolve."
    assert column(rows, "query_id", "prompt", "correct", "score") == [
        ("gepa/list-example-0", one, True, None),
        ("gepa/list-example-1", one, False, None),
        ("gepa/list-example-0", two, True, None),
        ("gepa/list-example-1", two, True, None),
    ]
    assert report.warnings == [f"list.json: {NO_TEXTS}"]
    assert [f["format"] for f in report.files] == ["gepa"]


def save(folder: Path, result: Any) -> Path:
    path = folder / "candidates.json"
    path.write_text(json.dumps(result))
    return path


def test_candidates_as_texts_and_those_without_any(tmp_path: Path) -> None:
    scores = [[True, False], [1.0, "x"], {"a": 1, "b": None}]
    path = save(tmp_path, {"candidates": ["Say.", {"n": 3}, {"p": "Go."}], "val_subscores": scores})
    report, rows = read(path, tmp_path)
    name = f"{tmp_path.name}/candidates"
    assert column(rows, "query_id", "prompt", "correct") == [
        (f"{name}-example-0", "Say.", True),
        (f"{name}-example-1", "Say.", False),
        (f"{name}-example-a", "Go.", True),
        (f"{name}-example-b", "Go.", None),
    ]
    assert refused(tmp_path) == [(3, "candidate 1 has no text, or no scores")]
    assert report.rows_read == 5


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        ([{"p": "Say."}], "a list of candidates without scores; write them with the result"),
        ({"candidates": ["a"], "val_subscores": []}, "must be lists of one length"),
        ({"candidates": ["a"]}, "must be lists of one length"),
    ],
)
def test_results_without_scores_are_refused(tmp_path: Path, result: Any, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        read(save(tmp_path, result), tmp_path)


def test_examples_of_two_optimisations_are_queries_of_their_own(tmp_path: Path) -> None:
    for name, prompt in (("one", "Say."), ("two", "Go.")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        save(tmp_path / "runs" / name, {"candidates": [prompt], "val_subscores": [[1.0]]})
    report, rows = read(tmp_path / "runs", tmp_path)
    assert column(rows, "query_id", "query", "run_id", "prompt") == [
        (f"{name}/candidates-example-0", f"validation example 0 of {name}/candidates", f"{name}/candidates", prompt)
        for name, prompt in (("one", "Say."), ("two", "Go."))
    ]
    assert (report.n_queries, report.rows_refused) == (2, 0)
