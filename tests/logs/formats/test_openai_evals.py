"""OpenAI evals: events in any order, lists of replies, metrics, grading models, few-shot and text prompts."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path

import pytest
from reading import FIXTURES, column, read, refused, write_lines

from oirl.errors import ConfigError, DataError

LOGS = FIXTURES / "openai_evals"
HENS, NUTS, BEANS = "Two hens and one hen?", "Nine nuts less five?", "Six beans and 1 bean?"
ALL = {(HENS, "3", "3", True), (NUTS, "It is 4.", "4", True), (BEANS, "8", "7", False)}
CELL = ("query", "response", "answer", "correct")


@pytest.mark.parametrize(
    ("name", "prompt", "source", "kept"),
    [
        ("match", "Reply with a number.", "format", ALL),
        ("plain", "Q: {query}\nA:", "recovered", ALL),
        ("includes", "Question: {query}\nEnd with a number.", "recovered", ALL),
        (
            "fewshot",
            "Reply with a number.\n\nOne egg and one egg?\n\n2",
            "format",
            {cell for cell in ALL if cell[0] != NUTS},
        ),
    ],
)
def test_a_sample_becomes_one_row(
    tmp_path: Path, name: str, prompt: str, source: str, kept: set[tuple[str, str, str, bool]]
) -> None:
    report, rows = read(LOGS / f"{name}.jsonl", tmp_path)
    assert set(column(rows, *CELL)) == kept
    assert {row["prompt"] for row in rows} == {prompt}
    constant = {"dataset": name, "model": "scripted/small", "run_id": f"2611200000{name.upper()}", "split": None}
    assert all(constant.items() <= row.items() for row in rows)
    assert {(r["replicate"], r["tokens_in"], r["tokens_out"]) for r in rows} == {(0, 9, 2)}
    notes = [(p["prompt"], p["source"], p["rows"], p["fits"]) for p in report.prompts]
    assert notes == [(prompt, source, len(kept), len(kept))]
    assert report.warnings == []
    assert [f["format"] for f in report.files] == ["openai-evals"]


def test_events_are_shuffled_and_the_report_is_line_2() -> None:
    events = [json.loads(line) for line in (LOGS / "match.jsonl").read_text().splitlines()]
    assert "final_report" in events[1]
    ids = [event["event_id"] for event in events[2:]]
    assert ids != sorted(ids), "the fixture no longer shows what it is for"


def test_times_and_names_of_samples(tmp_path: Path) -> None:
    _, rows = read(LOGS / "match.jsonl", tmp_path)
    made = {row["query"]: (row["created_at"], row["metadata"]["sample_id"]) for row in rows}
    # Events 0, 2 and 4 are the replies.
    assert made == {
        query: (datetime(2026, 11, 20, 18, 50, 2 * i, 500000, tzinfo=timezone.utc), f"match.dev.{i}")
        for i, query in enumerate((HENS, NUTS, BEANS))
    }


def test_a_match_without_a_reply_is_refused(tmp_path: Path) -> None:
    report, _ = read(LOGS / "fewshot.jsonl", tmp_path)
    assert (report.rows_kept, report.rows_refused) == (2, 1)
    ((row, reason),) = refused(tmp_path)
    assert reason == "sample 'fewshot.dev.1' has no `sampling` event, so its query is not known"
    assert json.loads((LOGS / "fewshot.jsonl").read_text().splitlines()[row - 1])["sample_id"] == "fewshot.dev.1"


def test_metrics_of_a_grading_model(tmp_path: Path) -> None:
    report, rows = read(LOGS / "modelgraded.jsonl", tmp_path, scorer="score")
    want = [(HENS, "3", True), (NUTS, "It is 4.", True), (BEANS, "8", False)]
    assert column(rows, "query", "response", "correct") == want
    assert [r["metadata"]["metrics"]["choice"] for r in rows] == ["Y", "Y", "N"]
    assert report.warnings == []
    with pytest.raises(ConfigError, match=r"--scorer scores: no score 'scores' \(did you mean 'score'\?\)"):
        read(LOGS / "modelgraded.jsonl", tmp_path, scorer="scores")


def test_the_verdict_is_a_number(tmp_path: Path) -> None:
    _, rows = read(LOGS / "modelgraded.jsonl", tmp_path)
    assert column(rows, "correct") == [True, True, False]


def event(number: int, sample: str, kind: str, data: object) -> dict[str, object]:
    return {"run_id": "r", "event_id": number, "sample_id": sample, "type": kind, "data": data}


def test_several_replies_to_one_request_are_replicates(tmp_path: Path) -> None:
    rows_in = [
        event(0, "a", "sampling", {"prompt": [{"role": "user", "content": "Two?"}], "sampled": ["2", "two", "3"]}),
        event(1, "a", "match", {"correct": True, "expected": ["2"], "picked": "2", "sampled": "2"}),
        event(2, "b", "sampling", {"prompt": [{"role": "user", "content": "Five?"}], "sampled": "5"}),
        event(3, "b", "match", {"correct": False, "expected": 6, "sampled": "5"}),
    ]
    report, rows = read(write_lines(tmp_path / "many.jsonl", rows_in), tmp_path)
    assert column(rows, "query", "response", "replicate", "correct", "answer", "prompt") == [
        ("Two?", "2", 0, True, "2", ""),
        ("Two?", "two", 1, None, "2", ""),
        ("Two?", "3", 2, None, "2", ""),
        ("Five?", "5", 0, False, "6", ""),
    ]
    assert report.n_prompts == 1


@pytest.mark.parametrize("judged", ["5", ["5"]])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_reasoning_and_answer_the_response_is_the_one_that_was_judged(
    tmp_path: Path, judged: object, order: tuple[int, int]
) -> None:
    asked = [{"role": "user", "content": "Two and three?"}]
    samplings = [{"prompt": asked, "sampled": ["Two, then three more."]}, {"prompt": asked, "sampled": ["5"]}]
    events = [event(k, "a", "sampling", samplings[i]) for k, i in enumerate(order)]
    events.append(event(2, "a", "match", {"correct": True, "expected": "5", "sampled": judged}))
    _, rows = read(write_lines(tmp_path / "cot.jsonl", events), tmp_path)
    assert column(rows, "query", "response", "correct") == [("Two and three?", "5", True)]


def test_what_is_no_event_is_refused(tmp_path: Path) -> None:
    good = (LOGS / "plain.jsonl").read_text().splitlines()
    bad = ['{"foo": 1}', '{"sample_id": [1], "data": {}}', '{"sample_id": "x", "type": "match"}', "[1]", "{"]
    path = tmp_path / "events.jsonl"
    path.write_text("\n".join([*good, *bad]) + "\n")
    report, rows = read(path, tmp_path)
    assert len(rows) == 3
    assert [row for row, _ in refused(tmp_path)] == [len(good) + k for k in range(1, 6)]
    assert report.rows_refused == 5


def test_a_spec_alone_is_no_log(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "cut.jsonl", [{"spec": {"completion_fns": ["m"], "run_id": "r"}}])
    with pytest.raises(DataError, match="holds no events of samples"):
        read(path, tmp_path)
    assert not (tmp_path / "out" / "log.parquet").exists()


@pytest.mark.real_data
def test_a_real_run(tmp_path: Path, real_data: Path) -> None:
    path = real_data / "log_formats" / "openai_evals" / "scripted_direct.jsonl"
    assert len(path.read_text().splitlines()) == 52
    report, rows = read(path, tmp_path)
    assert (report.rows_kept, report.rows_refused, report.n_queries) == (25, 0, 25)
    assert column(rows, "correct").count(True) == 11
    assert {row["prompt"] for row in rows} == {"The answer is:"}
    assert [(p["source"], p["rows"], p["fits"]) for p in report.prompts] == [("format", 25, 25)]
