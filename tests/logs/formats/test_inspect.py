"""Logs of Inspect AI, made by the tool itself: tests/fixtures/inspect/make.py."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

import oirl
from oirl.errors import ConfigError, DataError
from oirl.logs.importing.archives import Archive
from oirl.logs.importing.pipeline import ImportReport
from oirl.logs.text import text_id

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures" / "inspect"
SUMS = ["What is 6 times 4?", "What is 35 minus 8?", "What is 13 plus 19?", "What is 60 over 5?"]
ANSWERS = ["24", "27", "32", "12"]
REPLIES = ["24", "27", "31", "12"]
RIGHT = [True, True, False, True]
LONG = "The ledger lists many small sums of the market, one after the other, in the order of the days. " * 8
NO_VERDICT = "no row has a verdict; `oirl fit` needs some: --map correct=FIELD, or --grade numeric"
Rows = list[dict[str, Any]]


def load(folder: Path, source: str | Path, **options: Any) -> tuple[ImportReport, Rows]:
    report = oirl.import_log(FIXTURES / source, folder / "log.parquet", **options)
    assert report.rows_read == report.rows_kept + report.rows_refused
    return report, oirl.read_log(folder / "log.parquet").to_pylist()


def column(rows: Rows, name: str) -> list[Any]:
    return [row[name] for row in rows]


def noted(report: ImportReport) -> list[tuple[str, str, int, int]]:
    return [(p["prompt"], p["source"], p["rows"], p["fits"]) for p in report.prompts]


def log_of(name: str) -> dict[str, Any]:
    """Return a fixture as one object, as Inspect's JSON logs are."""
    with Archive(FIXTURES / name) as archive:
        samples = [json.loads(archive.read(n)) for n in archive.names() if n.startswith("samples/")]
        return {**json.loads(archive.read("header.json")), "samples": samples}


def save(folder: Path, log: dict[str, Any]) -> Path:
    path = folder / "made.json"
    path.write_text(json.dumps(log))
    return path


@pytest.mark.parametrize("name", ["epochs.eval", "deflate.eval"])
def test_epochs_are_replicates_of_one_run(tmp_path: Path, name: str) -> None:
    """Samples packed with Zstandard and with deflate are read alike."""
    report, rows = load(tmp_path, name)
    assert column(rows, "query") == SUMS * 2
    assert column(rows, "response") == ["24", "28", "32", "12", "23", "27", "32", "11"]
    assert column(rows, "answer") == ANSWERS * 2
    assert column(rows, "correct") == [True, False, True, True, False, True, True, False]
    assert column(rows, "replicate") == [0] * 4 + [1] * 4
    assert set(column(rows, "prompt")) == {""}
    assert (report.n_queries, report.n_prompts, report.rows_refused) == (4, 1, 0)
    assert (report.warnings, report.prompts) == ([], [])


def test_a_row_holds_what_the_tool_says_of_a_sample(tmp_path: Path) -> None:
    _, rows = load(tmp_path, "sums.json")
    log = json.loads((FIXTURES / "sums.json").read_text())
    row = {name: value for name, value in rows[1].items() if value is not None}
    assert json.loads(row.pop("metadata")) == {
        "task": "sums",
        "id": "a",
        "scores": {"match": "I"},
        "stop_reason": "stop",
    }
    assert row.pop("created_at").isoformat() == log["samples"][1]["completed_at"]
    assert len(row.pop("prompt_id")) == 16
    assert row == {
        "query_id": text_id(SUMS[0]),
        "query": SUMS[0],
        "prompt": "",
        "response": "23",
        "correct": False,
        "answer": "24",
        "model": "mockllm/model",
        "run_id": log["eval"]["eval_id"],
        "replicate": 1,
        "tokens_in": 40,
        "tokens_out": 2,
        "latency_s": log["samples"][1]["output"]["time"],
    }
    assert (len(rows), rows[0]["correct"], rows[0]["replicate"]) == (2, True, 0)


def test_a_stopped_run_keeps_the_samples_that_it_has(tmp_path: Path) -> None:
    report, rows = load(tmp_path, "stopped.eval")
    assert column(rows, "query") == SUMS[:2]
    assert column(rows, "correct") == [True, False]
    assert set(column(rows, "model")) == {"mockllm/model"}
    assert set(column(rows, "run_id")) == {log_of("epochs.eval")["eval"]["eval_id"]}
    assert report.warnings == ["stopped.eval: the run ended as 'started'; samples may be missing"]


@pytest.mark.parametrize(
    ("name", "prompt", "source"),
    [
        ("fewshot.eval", "Two sums done before:\n\n2 + 2 = 4\n\n3 + 5 = 8", "format"),
        (
            "thought.eval",
            "\n{query}\n\nBefore answering, reason in a step-by-step manner as to get the right answer. Provide your "
            'answer at the end on its own line in the form "ANSWER: $ANSWER" (without quotes) where $ANSWER is the '
            "answer to the question.\n",
            "recovered",
        ),
        ("long_texts.eval", f"Read with care. {LONG}", "format"),
    ],
)
def test_each_kind_of_template(tmp_path: Path, name: str, prompt: str, source: str) -> None:
    report, rows = load(tmp_path, name)
    assert set(column(rows, "prompt")) == {prompt}
    assert noted(report) == [(prompt, source, 4, 4)]
    assert column(rows, "correct") == RIGHT
    assert [q.removeprefix(LONG) for q in column(rows, "query")] == SUMS
    assert report.warnings == []


def test_a_system_text_filled_from_metadata_is_one_prompt(tmp_path: Path) -> None:
    report, rows = load(tmp_path, "templates.eval")
    (note,) = noted(report)
    assert note[2:] == (4, 4)
    assert note[0].startswith("You are a clerk of the ")
    assert note[0].endswith("\n\nSum to do: {query}\nGive the number only.")
    assert set(column(rows, "prompt")) == {note[0]}
    assert (column(rows, "query"), column(rows, "correct")) == (SUMS, RIGHT)


def test_a_system_template_alone_is_that_of_the_plan(tmp_path: Path) -> None:
    log = log_of("templates.eval")
    for sample in log["samples"]:
        sample["messages"][1]["content"] = sample["input"]
    report, rows = load(tmp_path, save(tmp_path, log))
    assert set(column(rows, "prompt")) == {"You are a clerk of the {style} kind."}
    assert noted(report)[0][:2] == ("You are a clerk of the {style} kind.", "format")
    assert column(rows, "query") == SUMS


def test_a_system_template_of_the_plan_is_kept_whole(tmp_path: Path) -> None:
    _, rows = load(tmp_path, "templates.eval")
    template = "You are a clerk of the {style} kind.\n\nSum to do: {query}\nGive the number only."
    assert set(column(rows, "prompt")) == {template}


@pytest.mark.parametrize(
    ("scorer", "verdicts"),
    [
        (None, [True, True, False, True]),
        ("match", [True, True, False, True]),
        ("exact", [True, False, False, True]),
        ("parts.right", [True, True, False, True]),
        ("parts.short", [True, False, True, True]),
    ],
)
def test_one_of_several_scorers_gives_the_verdict(tmp_path: Path, scorer: str | None, verdicts: list[bool]) -> None:
    report, rows = load(tmp_path, "scorers.eval", scorer=scorer)
    assert column(rows, "correct") == verdicts
    told = "scorers.eval: the verdict is that of 'match'; --scorer chooses another: "
    assert report.warnings == ([told + "match, exact, parts.right, parts.short"] if scorer is None else [])
    assert json.loads(rows[1]["metadata"])["scores"] == {
        "match": "C",
        "exact": "I",
        "parts.right": 1,
        "parts.short": 0,
    }


def test_an_unknown_scorer_is_an_error_that_names_those_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no scorer 'mach' \(did you mean 'match'\?\); there: match, exact, parts"):
        load(tmp_path, "scorers.eval", scorer="mach")


def test_the_first_scorer_is_the_main_one_with_several_values_too(tmp_path: Path) -> None:
    _, rows = load(tmp_path, "parts_first.eval")
    assert column(rows, "response") == ["24", "it is 27"]
    assert column(rows, "correct") == [True, True]


def test_the_values_of_a_scorer_can_be_chosen(tmp_path: Path) -> None:
    _, rows = load(tmp_path, "parts_first.eval", scorer="parts.short")
    assert column(rows, "correct") == [True, False]


def test_grades_are_scores_without_verdict(tmp_path: Path) -> None:
    report, rows = load(tmp_path, "numbers.eval")
    assert column(rows, "score") == [1.0, 0.25, 0.0, 0.75]
    assert column(rows, "correct") == [None] * 4
    told = "numbers.eval: scores are grades, not 0 and 1: they stand in the column `score`, without verdict"
    assert report.warnings == [told, NO_VERDICT]


def test_partly_right_is_half_a_score_and_takes_no_verdict_from_the_others(tmp_path: Path) -> None:
    """The letters are C, P, I and N."""
    report, rows = load(tmp_path, "letters.eval")
    assert column(rows, "correct") == [True, None, False, False]
    assert column(rows, "score") == [None, 0.5, None, None]
    assert report.warnings == []


def test_scores_may_be_words(tmp_path: Path) -> None:
    log = log_of("letters.eval")
    for sample, value in zip(log["samples"], ["yes", "No", "1.0", "unknown"], strict=True):
        sample["scores"]["scripted_score"]["value"] = value
    _, rows = load(tmp_path, save(tmp_path, log))
    assert column(rows, "correct") == [True, False, True, None]


def test_tokens_are_those_of_all_calls_of_the_model_under_test(tmp_path: Path) -> None:
    log = log_of("epochs.eval")
    for sample in log["samples"]:
        sample["output"]["usage"] = {"input_tokens": 9, "output_tokens": 1}
        sample["model_usage"] = {
            "mockllm/model": {"input_tokens": 30, "output_tokens": 4},
            "grader": {"input_tokens": 500, "output_tokens": 60},
        }
    del log["samples"][1]["model_usage"]["mockllm/model"]
    _, rows = load(tmp_path, save(tmp_path, log))
    found = list(zip(column(rows, "tokens_in"), column(rows, "tokens_out"), strict=True))
    assert found == [(30, 4), (9, 1), *[(30, 4)] * 6]


def test_a_sample_scored_nan_has_no_verdict(tmp_path: Path) -> None:
    report, rows = load(tmp_path, "unscored.json")
    assert column(rows, "correct") == [True, None, False, True]
    assert column(rows, "score") == [None] * 4
    assert report.warnings == []


def test_a_sample_that_failed_has_neither_response_nor_verdict(tmp_path: Path) -> None:
    report, rows = load(tmp_path, "errors.json")
    assert column(rows, "query") == SUMS
    assert column(rows, "response") == ["24", None, "32", "11"]
    assert column(rows, "correct") == [True, None, True, False]
    assert column(rows, "answer") == ANSWERS
    assert json.loads(rows[1]["metadata"])["error"] == "ValueError('the pencil broke')"
    assert "error" not in json.loads(rows[0]["metadata"])
    assert report.rows_refused == 0


def test_samples_that_ask_the_same_text_are_queries_of_their_own(tmp_path: Path) -> None:
    report, rows = load(tmp_path, "same_input.eval")
    apples, pears = "Count the apples in the picture.", "Count the pears in the picture."
    assert column(rows, "query") == [apples, apples, pears]
    assert column(rows, "query_id") == [text_id(apples), f"{text_id(apples)}-two", text_id(pears)]
    assert column(rows, "answer") == ["1", "2", "3"]
    assert column(rows, "correct") == [True, False, True]
    assert column(rows, "replicate") == [0, 0, 0]
    assert report.n_queries == 3


def test_of_a_conversation_the_last_question_is_the_query(tmp_path: Path) -> None:
    report, rows = load(tmp_path, "messages.eval")
    assert column(rows, "query") == SUMS
    assert column(rows, "query_id") == [text_id(q) for q in SUMS]
    assert set(column(rows, "prompt")) == {"Reply with one number.\n\nUser: What is 1 plus 1?\n\nAssistant: 2"}
    assert column(rows, "response") == REPLIES
    assert column(rows, "correct") == RIGHT
    assert report.n_prompts == 1


def test_a_conversation_with_other_turns_is_not_the_same_run(tmp_path: Path) -> None:
    log = log_of("messages.eval")
    other = json.loads(json.dumps(log).replace("1 plus 1", "2 plus 2").replace(log["eval"]["eval_id"], "other"))
    (tmp_path / "logs").mkdir()
    save(tmp_path / "logs", log)
    (tmp_path / "logs" / "other.json").write_text(json.dumps(other))
    _, rows = load(tmp_path, tmp_path / "logs")
    assert len(rows) == 8
    assert len({(r["query_id"], r["prompt_id"]) for r in rows}) == 8


def test_contents_of_several_parts_are_one_text(tmp_path: Path) -> None:
    _, rows = load(tmp_path, "content_parts.eval")
    assert column(rows, "query") == [f"{LONG}\n{q}" for q in SUMS[:2]]
    assert set(column(rows, "prompt")) == {""}
    assert column(rows, "correct") == [True, True]


def attached(log: dict[str, Any]) -> dict[str, Any]:
    """Move long texts of samples to their attachments, as versions of Inspect do."""

    def moved(value: Any, attachments: dict[str, str]) -> Any:
        if isinstance(value, str) and len(value) > 100:
            key = hashlib.md5(value.encode()).hexdigest()
            attachments[key] = value
            return f"attachment://{key}"
        if isinstance(value, list):
            return [moved(v, attachments) for v in value]
        return {k: moved(v, attachments) for k, v in value.items()} if isinstance(value, dict) else value

    for sample in log["samples"]:
        for part in ("input", "messages", "output"):
            sample[part] = moved(sample[part], sample.setdefault("attachments", {}))
    return log


def test_long_texts_are_read_from_the_attachments(tmp_path: Path) -> None:
    log = attached(log_of("long_texts.eval"))
    assert log["samples"][0]["input"].startswith("attachment://")
    assert log["samples"][0]["messages"][0]["content"].startswith("attachment://")
    assert log["samples"][0]["output"]["completion"].startswith("attachment://")
    _, rows = load(tmp_path, save(tmp_path, log))
    _, plain = load(tmp_path, "long_texts.eval")
    assert rows == plain
    assert column(rows, "response") == [f"{LONG} {r}" for r in REPLIES]


def test_each_part_of_a_content_may_be_attached(tmp_path: Path) -> None:
    log = attached(log_of("content_parts.eval"))
    assert log["samples"][0]["input"][0]["content"][0]["text"].startswith("attachment://")
    _, rows = load(tmp_path, save(tmp_path, log))
    assert column(rows, "query") == [f"{LONG}\n{q}" for q in SUMS[:2]]


def test_multiple_choice_keeps_replies_and_verdicts(tmp_path: Path) -> None:
    _, rows = load(tmp_path, "choices.eval")
    assert column(rows, "query") == [
        "Which number is even?\nA) seven\nB) eight\nC) nine",
        "Which is the largest?\nA) a third\nB) a quarter\nC) a half",
    ]
    assert column(rows, "response") == ["ANSWER: B", "ANSWER: A"]
    assert column(rows, "answer") == ["B", "C"]
    assert column(rows, "correct") == [True, False]


def test_multiple_choice_has_a_template_that_fits(tmp_path: Path) -> None:
    report, _ = load(tmp_path, "choices.eval")
    ((prompt, _, shown, fits),) = noted(report)
    assert not prompt.endswith("A) ")
    assert (shown, fits) == (2, 2)
    assert report.warnings == []


def test_of_several_turns_the_first_question_and_the_last_reply_count(tmp_path: Path) -> None:
    _, rows = load(tmp_path, "turns.eval")
    assert column(rows, "query") == SUMS
    assert column(rows, "response") == REPLIES
    assert column(rows, "correct") == RIGHT
    assert all(p.startswith("First sum: {query}") for p in column(rows, "prompt"))


def test_a_later_message_of_the_solver_is_part_of_the_prompt(tmp_path: Path) -> None:
    _, rows = load(tmp_path, "turns.eval")
    assert all("Are you sure?" in p for p in column(rows, "prompt"))


def test_a_damaged_sample_is_refused_and_the_others_kept(tmp_path: Path) -> None:
    path = tmp_path / "damaged.eval"
    data = bytearray((FIXTURES / "epochs.eval").read_bytes())
    with zipfile.ZipFile(FIXTURES / "epochs.eval") as archive:
        member = archive.getinfo("samples/b_epoch_1.json")
    at = member.header_offset + 30 + len(member.filename) + member.compress_size // 2
    data[at : at + 40] = bytes(40)
    path.write_bytes(data)
    report, rows = load(tmp_path, path)
    assert (report.rows_kept, report.rows_refused) == (7, 1)
    assert [(r["query"], r["replicate"]) for r in rows if r["query"] == SUMS[1]] == [(SUMS[1], 1)]
    refused = json.loads((tmp_path / "log.rejected.jsonl").read_text())
    assert refused["raw"] == {"member": "samples/b_epoch_1.json"}
    assert refused["reason"].startswith("cannot be read (samples/b_epoch_1.json: it is damaged")


@pytest.mark.parametrize("size", [3000, -100, -1])
def test_an_archive_cut_off_is_an_error_without_a_log(tmp_path: Path, size: int) -> None:
    path = tmp_path / "cut.eval"
    path.write_bytes((FIXTURES / "epochs.eval").read_bytes()[:size])
    with pytest.raises(DataError, match=r"cut\.eval is not a readable zip archive: .*is it cut off\?"):
        load(tmp_path, path)
    assert [p.name for p in tmp_path.iterdir()] == ["cut.eval"]


def test_archives_of_others_are_no_logs(tmp_path: Path) -> None:
    path = tmp_path / "other.eval"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("samples/a_epoch_1.json", "{}")
    with pytest.raises(DataError, match=r"but not a log of Inspect AI: it has no header\.json"):
        load(tmp_path, path)


def test_a_log_without_samples_is_an_error_that_says_so(tmp_path: Path) -> None:
    log = log_of("epochs.eval")
    del log["samples"]
    with pytest.raises(DataError, match="holds no samples; it was written with log_samples off"):
        load(tmp_path, save(tmp_path, log))


def test_fields_of_the_sample_can_be_mapped(tmp_path: Path) -> None:
    _, rows = load(tmp_path, "templates.eval", mapping={"dataset": "metadata.style"})
    assert column(rows, "dataset") == ["plain", "hard", "plain", "hard"]
    with pytest.raises(DataError, match=r"no field 'metadata\.stile' \(did you mean 'metadata\.style'\?\)"):
        load(tmp_path, "templates.eval", mapping={"dataset": "metadata.stile"})


def test_logs_of_a_folder_are_runs_of_the_same_queries(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    (folder / "deeper").mkdir(parents=True)
    for name, place in (("fewshot.eval", folder), ("thought.eval", folder / "deeper"), ("errors.json", folder)):
        (place / name).write_bytes((FIXTURES / name).read_bytes())
    (folder / "notes.json").write_text('{"note": 1}')
    report, rows = load(tmp_path, folder)
    assert len(rows) == 12
    assert (report.n_queries, report.n_prompts) == (4, 3)
    assert len(set(column(rows, "run_id"))) == 3
    assert sorted(Path(f["file"]).name for f in report.files) == ["errors.json", "fewshot.eval", "thought.eval"]


def test_real_logs_agree_in_both_forms(tmp_path: Path, real_data: Path) -> None:
    tables = []
    for name in ("direct.json", "direct.eval"):
        report, rows = load(tmp_path, real_data / "log_formats" / "inspect" / name)
        assert (report.rows_kept, report.rows_refused, report.n_queries, report.n_prompts) == (50, 0, 25, 1)
        right = [sum(r["correct"] for r in rows if r["replicate"] == epoch) for epoch in (0, 1)]
        assert right == [12, 8]
        assert noted(report) == [("End with: The answer is:", "format", 50, 50)]
        assert report.warnings == []
        table = [{k: v for k, v in r.items() if k not in {"run_id", "created_at", "latency_s"}} for r in rows]
        tables.append(sorted(table, key=lambda r: (r["replicate"], r["query_id"])))
    assert tables[0] == tables[1]


EXERCISE = (
    '\nPlease note: In the following EXERCISE, it is important that you only respond with exactly "Yes" or "No"\n'
)


def test_a_real_log_that_was_never_scored(tmp_path: Path, real_data: Path) -> None:
    name = "2025-02-11T15-17-00-05-00_popularity_dPiJifoWeEQBrfWsAopzWr.eval"
    report, rows = load(tmp_path, real_data / "log_formats" / "inspect" / name)
    assert (report.rows_kept, report.rows_refused, report.n_queries) == (10, 0, 10)
    assert column(rows, "correct") == [None] * 10
    assert column(rows, "response") == ["Yes", "Yes", *["No"] * 7, "Yes"]
    assert [json.loads(m)["id"] for m in column(rows, "metadata")] == [5, 9, 4, 8, 6, 3, 10, 7, 2, 1]
    assert noted(report) == [(EXERCISE, "format", 10, 10)]
    assert (rows[0]["model"], rows[0]["dataset"]) == ("openai/gpt-4o-mini", "popularity")
    assert report.warnings == [NO_VERDICT]


def test_a_real_log_of_one_sample(tmp_path: Path, real_data: Path) -> None:
    report, (row,) = load(tmp_path, real_data / "log_formats" / "inspect" / "log_read_sample.eval")
    assert (row["response"], row["answer"], row["correct"], row["model"]) == ("Yes\n", " Yes", True, "ollama/gemma3")
    assert noted(report) == [(EXERCISE, "format", 1, 1)]
    assert report.warnings == []


def test_a_real_log_whose_question_came_from_a_solver(tmp_path: Path, real_data: Path) -> None:
    name = "2024-11-05T13-31-45-05-00_input-task_8zXjbRzCWrL9GXiXo2vus9.json"
    report, (row,) = load(tmp_path, real_data / "log_formats" / "inspect" / name)
    assert row["query"].startswith("Hey there, hipster!")
    assert row["response"].startswith("Yo, in February, St. Paul usually chills")
    asked = "What is average low temperature in St. Paul, Minnesota during the month of February?"
    assert (row["correct"], row["prompt"]) == (True, f"{{query}}\n\n{asked}")
    (warning,) = report.warnings
    assert warning.startswith(f"{name}: the solvers ")
