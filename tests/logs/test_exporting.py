"""Exports: what each file holds, by hand, and that it comes back as it was."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from conftest import run_oirl

import oirl
from oirl.errors import ConfigError, DataError, UnknownNameError, WriteError
from oirl.logs.rendering import PROMPTFOO_TEXT, render
from oirl.logs.store import LogWriter, scan_log
from oirl.records import INTERACTION_SCHEMA, PREFERENCE_SCHEMA

ROWS: list[dict[str, Any]] = [
    {"query_id": "q1", "query": "1 + 1?", "prompt": "Think.", "response": "2", "correct": True, "answer": "2"},
    {"query_id": "q1", "query": "1 + 1?", "prompt": "Q: {query}", "response": "3", "correct": False, "answer": "2"},
    {"query_id": "q1", "query": "1 + 1?", "prompt": "Q: {query}", "response": "2.", "correct": True, "answer": "2"},
    {"query_id": "q2", "query": "2 + 2?", "prompt": "Think.", "response": "4", "correct": True, "answer": "x #### 4"},
    {"query_id": "q2", "query": "2 + 2?", "prompt": "Q: {query}", "response": None, "correct": False, "answer": "4"},
    {"query_id": "q3", "query": "3 + 3?", "prompt": "Think.", "response": "6", "correct": None, "answer": None},
    {
        "query_id": "q3",
        "query": "3 + 3?",
        "prompt": "{examples}{query}",
        "response": "6",
        "correct": True,
        "answer": "6",
    },
]
NAMES = {"Think.": "think", "Q: {query}": "q", "{examples}{query}": "shots"}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    rows = [row | {"prompt_id": NAMES.get(row["prompt"], "p"), "replicate": i} for i, row in enumerate(rows)]
    oirl.write_log(pa.Table.from_pylist(rows, pa.schema([INTERACTION_SCHEMA.field(n) for n in rows[0]])), path)
    return path


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "log.parquet", ROWS)


def write_pairs(path: Path, rows: list[dict[str, Any]]) -> Path:
    with LogWriter(path, "preferences") as writer:
        writer.write(pa.RecordBatch.from_pylist(rows, PREFERENCE_SCHEMA))
    return path


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Think."}


def test_trl_sft_holds_the_right_replies_and_counts_the_others(log: Path, tmp_path: Path) -> None:
    report = oirl.export_log(log, tmp_path / "sft.jsonl", to="trl-sft")
    assert lines(tmp_path / "sft.jsonl") == [
        {"prompt": [SYSTEM, user("1 + 1?")], "completion": [said("2")]},
        {"prompt": [user("Q: 1 + 1?")], "completion": [said("2.")]},
        {"prompt": [SYSTEM, user("2 + 2?")], "completion": [said("4")]},
    ]
    assert (report.rows_read, report.written) == (7, 3)
    assert report.to_dict()["left_out"] == {
        "the response is wrong": 1,
        "no response": 1,
        "no verdict": 1,
        "the prompt cannot be filled with the query alone": 1,
    }


def test_metadata_of_the_user_that_is_named_fields_does_not_matter(tmp_path: Path) -> None:
    rows = [{**ROWS[1], "correct": True, "metadata": '{"fields": {"topic": "sums"}}'}]
    source = write_rows(tmp_path / "log.parquet", rows)
    oirl.export_log([source], tmp_path / "sft.jsonl", to="trl-sft")
    assert [row["prompt"] for row in lines(tmp_path / "sft.jsonl")] == [[user("Q: 1 + 1?")]]


def test_openai_finetune_holds_whole_conversations(log: Path, tmp_path: Path) -> None:
    oirl.export_log(log, tmp_path / "ft.jsonl", to="openai-finetune")
    assert lines(tmp_path / "ft.jsonl")[0] == {"messages": [SYSTEM, user("1 + 1?"), said("2")]}
    assert len(lines(tmp_path / "ft.jsonl")) == 3


def test_trl_unpaired_holds_wrong_replies_too_and_is_read_back(log: Path, tmp_path: Path) -> None:
    report = oirl.export_log(log, tmp_path / "kto.jsonl", to="trl-unpaired")
    assert [row["label"] for row in lines(tmp_path / "kto.jsonl")] == [True, False, True, True]
    assert report.written == 4
    back = oirl.import_log(tmp_path / "kto.jsonl", tmp_path / "back.parquet")
    assert back.files[0]["format"] == "trl-unpaired"
    table = oirl.read_log(tmp_path / "back.parquet")
    assert table["correct"].to_pylist() == [True, False, True, True]
    assert table["query"].to_pylist() == ["1 + 1?", "Q: 1 + 1?", "Q: 1 + 1?", "2 + 2?"]
    assert table["prompt"].to_pylist() == ["Think.", "", "", "Think."]


def test_trl_preference_pairs_right_with_wrong_replies_of_one_query_each_once(log: Path, tmp_path: Path) -> None:
    report = oirl.export_log(log, tmp_path / "dpo.jsonl", to="trl-preference")
    assert lines(tmp_path / "dpo.jsonl") == [
        {"prompt": [user("1 + 1?")], "chosen": [said("2")], "rejected": [said("3")]}
    ]
    assert (report.written, sum(report.left_out.values())) == (1, 5)


def test_trl_preference_of_pairs_keeps_margins_and_conversations_and_is_read_back(tmp_path: Path) -> None:
    talk = [user("Hi"), said("Hello"), user("Bye")]
    pairs = [
        {"pair_id": "a", "query": "Hi", "chosen": "Hello", "rejected": "Go", "margin": 2.0},
        {
            "pair_id": "b",
            "query": "talk",
            "chosen": "See you",
            "rejected": "No",
            "metadata": json.dumps({"messages": talk}),
        },
        {"pair_id": "c", "query": "Why", "chosen": "So", "rejected": "No", "metadata": "no json"},
    ]
    source = write_pairs(tmp_path / "pairs.parquet", pairs)
    oirl.export_log(source, tmp_path / "dpo.jsonl", to="trl-preference")
    written = lines(tmp_path / "dpo.jsonl")
    assert written[0] == {"prompt": [user("Hi")], "chosen": [said("Hello")], "rejected": [said("Go")], "margin": 2.0}
    assert written[1]["prompt"] == talk
    assert "margin" not in written[1]
    assert written[2]["prompt"] == [user("Why")]
    report = oirl.import_log(tmp_path / "dpo.jsonl", tmp_path / "back.parquet")
    assert (report.record, report.files[0]["format"], report.rows_kept) == ("preferences", "trl", 3)
    back = pa.Table.from_batches(scan_log(tmp_path / "back.parquet", record="preferences")).to_pylist()
    assert back[0]["margin"] == 2.0
    assert json.loads(back[1]["metadata"])["messages"] == talk


@pytest.mark.parametrize("format", ["jsonl", "csv"])
def test_tables_come_back_unchanged(format: str, tmp_path: Path) -> None:
    full = {
        "run_id": "r",
        "score": 0.5,
        "dataset": "d",
        "split": "test",
        "model": "m",
        "propensity": 0.25,
        "sampling": '{"t": 1}',
        "tokens_in": 3,
        "tokens_out": 4,
        "latency_s": 0.125,
        "cost": 1e-7,
        "created_at": datetime(2026, 5, 31, 12, 0, 5, tzinfo=timezone.utc),
        "metadata": '{"a": "b, \\"c\\""}',
    }
    hostile = ["a\nb", 'say "x", then', "=1+1", "ünï ✓", "  kept  "]
    rows = [ROWS[0] | full | {"response": text} for text in hostile]
    source = write_rows(tmp_path / "log.parquet", rows)
    oirl.export_log(source, tmp_path / f"log.{format}", to=format)
    oirl.import_log(tmp_path / f"log.{format}", tmp_path / "back.parquet")
    assert oirl.read_log(tmp_path / "back.parquet").to_pylist() == oirl.read_log(source).to_pylist()


def test_a_csv_keeps_an_empty_response_apart_from_none(tmp_path: Path) -> None:
    rows = [ROWS[0] | {"response": text} for text in ("", None, "2")]
    source = write_rows(tmp_path / "log.parquet", rows)
    oirl.export_log(source, tmp_path / "log.csv", to="csv")
    oirl.import_log(tmp_path / "log.csv", tmp_path / "back.parquet")
    assert oirl.read_log(tmp_path / "back.parquet")["response"].to_pylist() == ["", None, "2"]


def test_csv_has_only_columns_that_hold_anything(log: Path, tmp_path: Path) -> None:
    oirl.export_log(log, tmp_path / "log.csv", to="csv")
    header = (tmp_path / "log.csv").read_text().splitlines()[0]
    assert header == '"query_id","query","prompt_id","prompt","response","correct","answer","replicate"'


def test_query_lists_and_pairs_are_tables_too(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text('{"question": "1?", "answer": "so #### 1"}')
    oirl.import_log(tmp_path / "test.jsonl", tmp_path / "queries.parquet")
    oirl.export_log(tmp_path / "queries.parquet", tmp_path / "q.jsonl", to="jsonl")
    assert lines(tmp_path / "q.jsonl")[0]["answer"] == "1"
    pairs = write_pairs(tmp_path / "pairs.parquet", [{"pair_id": "a", "query": "q", "chosen": "c", "rejected": "r"}])
    oirl.export_log(pairs, tmp_path / "p.csv", to="csv")
    assert (tmp_path / "p.csv").read_text() == '"pair_id","query","chosen","rejected"\n"a","q","c","r"\n'


def test_lm_eval_tasks_one_per_prompt_over_the_same_documents(log: Path, tmp_path: Path) -> None:
    report = oirl.export_log(log, tmp_path / "task", to="lm-eval")
    assert lines(tmp_path / "task" / "data.jsonl") == [
        {"query_id": "q1", "query": "1 + 1?", "answer": "2"},
        {"query_id": "q2", "query": "2 + 2?", "answer": "4"},
    ]
    group = yaml.safe_load((tmp_path / "task" / "_oirl.yaml").read_text())
    assert group == {"group": "oirl", "task": ["oirl_think", "oirl_q"]}
    task = yaml.safe_load((tmp_path / "task" / "oirl_q.yaml").read_text())
    assert (task["doc_to_text"], task["doc_to_target"], task["metadata"]["prompt_id"]) == (
        "Q: {{query}}",
        "{{answer}}",
        "q",
    )
    assert task["filter_list"][0]["name"] == "last-number"
    assert yaml.safe_load((tmp_path / "task" / "oirl_think.yaml").read_text())["doc_to_text"] == "Think.\n\n{{query}}"
    assert report.written == 4
    assert report.left_out == {
        "no gold answer, so there is nothing to check": 1,
        "the prompt cannot be filled with the query alone": 1,
    }
    oirl.export_log(log, tmp_path / "task", to="lm-eval")  # an earlier result of ours is replaced


def test_task_names_differ_where_prompt_names_look_alike(tmp_path: Path) -> None:
    rows = [{"query": "1?", "prompt": p, "prompt_id": p, "answer": "one"} for p in ("a b", "a-b", "??")]
    table = pa.Table.from_pylist([r | {"query_id": "q"} for r in rows])
    oirl.write_log(table, tmp_path / "log.parquet")
    oirl.export_log(tmp_path / "log.parquet", tmp_path / "task", to="lm-eval")
    group = yaml.safe_load((tmp_path / "task" / "_oirl.yaml").read_text())
    assert group["task"] == ["oirl_a_b", "oirl_a_b_2", "oirl_prompt"]
    task = yaml.safe_load((tmp_path / "task" / "oirl_a_b.yaml").read_text())
    assert "filter_list" not in task  # answers are words
    assert task["metric_list"][0]["ignore_punctuation"] is True


def test_promptfoo_config_looks_for_the_gold_answer_and_opens_no_file(tmp_path: Path) -> None:
    rows = [
        ROWS[0],
        ROWS[1],
        {**ROWS[0], "query_id": "f", "query": "file:///etc/passwd"},
        {**ROWS[0], "query_id": "e", "query": "what is {{ env.HOME }}?"},
        {**ROWS[0], "query_id": "s", "query": "what is {% if 1 %}?"},
        {**ROWS[0], "query_id": "a", "answer": "file:///etc/hostname"},
        {**ROWS[0], "query_id": "t", "query": "what is \\frac{{a}}{{b}}?", "answer": "Paris"},
        {**ROWS[0], "query_id": "t", "prompt_id": "p", "prompt": "You fix main.py: {query}", "answer": "Paris"},
    ]
    source = write_rows(tmp_path / "log.parquet", rows)
    report = oirl.export_log(source, tmp_path / "config.yaml", to="promptfoo")
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config["prompts"] == [
        {"label": "think", "raw": "Think.\n\n{{query}}"},
        {"label": "q", "raw": "Q: {{query}}"},
        # A line break that renders to nothing: a prompt of one line with a dot would be opened as a file.
        {"label": "p", "raw": '{% set _ = 0 -%}\n{{ "" }}You fix main.py: {{query}}'},
    ]
    assert [t["vars"]["query"] for t in config["tests"]] == ["1 + 1?", "what is \\frac{{a}}{{b}}?"]
    assert config["tests"][1]["assert"] == [{"type": "icontains", "value": "Paris"}]
    assert list(report.left_out.values()) == [4]
    assert "as a template or a file" in next(iter(report.left_out))


READ = "promptfoo would read a part of the query, the answer or the prompt as a template or a file"


@pytest.mark.parametrize("place", ["query", "answer"])
@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("if {% if x %}", False),
        ("a {# note #}", False),
        ("a {#\nnote\n#}", False),
        ("{{ env.HOME }}", False),
        ("{{process.env.HOME}}", False),
        ("see {{query}}", False),
        ("see {{ answer }}", False),
        ("file:///etc/passwd", False),
        ("package:a:b", False),
        ("\\frac{{1}}{{x}}", True),
        ("x_{a}^{{2}} {|} {%", True),
        ("see file:///etc/passwd", True),
        ("{environment}", True),
    ],
)
def test_what_promptfoo_would_read_as_a_template_or_a_file_is_left_out(
    text: str, kept: bool, place: str, tmp_path: Path
) -> None:
    source = write_rows(tmp_path / "log.parquet", [{**ROWS[0], place: text}, {**ROWS[3], "answer": "4"}])
    report = oirl.export_log(source, tmp_path / "config.yaml", to="promptfoo")
    found = [t["vars"][place] for t in yaml.safe_load((tmp_path / "config.yaml").read_text())["tests"]]
    assert (text in found, len(found)) == (kept, 1 + kept)
    assert report.left_out == ({} if kept else {READ: 1})


@pytest.mark.parametrize(
    ("prompt", "raw"),
    [
        ("See a/b: {query}", PROMPTFOO_TEXT + "See a/b: {{query}}"),
        ("Fix main.py: {query}", PROMPTFOO_TEXT + "Fix main.py: {{query}}"),
        ("Say * {query}", PROMPTFOO_TEXT + "Say * {{query}}"),
        ("a\\b {query}", PROMPTFOO_TEXT + "a\\b {{query}}"),
        ("Ask: {query}", "Ask: {{query}}"),
        ("Fix main.py:\n{query}", "Fix main.py:\n{{query}}"),
        ("Think.", "Think.\n\n{{query}}"),
    ],
)
def test_a_prompt_of_one_line_that_could_be_a_path_begins_with_a_line_break_that_is_not_shown(
    prompt: str, raw: str, tmp_path: Path
) -> None:
    jinja2 = pytest.importorskip("jinja2")
    source = write_rows(tmp_path / "log.parquet", [{**ROWS[0], "prompt": prompt}])
    oirl.export_log(source, tmp_path / "config.yaml", to="promptfoo")
    (found,) = yaml.safe_load((tmp_path / "config.yaml").read_text())["prompts"]
    assert found["raw"] == raw
    assert "\n" in found["raw"] or not set("./*\\") & set(found["raw"])
    shown = jinja2.Environment().from_string(found["raw"]).render(query="1 + 1?")
    assert shown == (render(prompt, "1 + 1?"))


@pytest.mark.parametrize("prompt", ["file://{query}", "package:{query}\nSay."])
def test_a_prompt_that_promptfoo_would_open_is_left_out(prompt: str, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "log.parquet", [{**ROWS[0], "prompt": prompt}, ROWS[3]])
    report = oirl.export_log(source, tmp_path / "config.yaml", to="promptfoo")
    assert report.left_out == {READ: 1}


@pytest.mark.parametrize(
    "theirs",
    ["data.jsonl", "oirl_a.yaml", *(f"_oirl.yaml+data.jsonl+{n}" for n in ("notes.txt", "results/a.json", ".hidden"))],
)
def test_a_folder_of_tasks_that_holds_anything_of_the_user_is_not_replaced(
    theirs: str, log: Path, tmp_path: Path
) -> None:
    for name in theirs.split("+"):
        (tmp_path / "task" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "task" / name).write_text("mine")
    with pytest.raises(ConfigError, match="holds"):
        oirl.export_log(log, tmp_path / "task", to="lm-eval")
    assert {
        p.relative_to(tmp_path / "task").as_posix(): p.read_text() for p in tmp_path.glob("task/**/*") if p.is_file()
    } == {name: "mine" for name in theirs.split("+")}


@pytest.mark.parametrize(
    ("output", "passes"), [("2", True), ("is 2.", True), ("$2,", True), ("12", False), ("2.5", False), ("2,000", False)]
)
def test_the_assertion_on_a_number_asks_for_that_number(output: str, passes: bool, log: Path, tmp_path: Path) -> None:
    import re

    oirl.export_log(log, tmp_path / "config.yaml", to="promptfoo")
    (assertion,) = yaml.safe_load((tmp_path / "config.yaml").read_text())["tests"][0]["assert"]
    assert assertion["type"] == "regex"
    assert bool(re.search(assertion["value"], output)) == passes


def test_bad_exports_leave_nothing_behind(log: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.parquet", [{"pair_id": "a", "query": "q", "chosen": "c", "rejected": "r"}])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UnknownNameError, match=r"unknown export 'trl' .*trl-sft"):
        oirl.export_log(log, tmp_path / "out", to="trl")
    with pytest.raises(ConfigError, match="--to trl-sft writes interactions, but the source holds preferences"):
        oirl.export_log(pairs, tmp_path / "out", to="trl-sft")
    with pytest.raises(ConfigError, match="is also the source"):
        oirl.export_log(log, log, to="jsonl")
    with pytest.raises(ConfigError, match="hold interactions and preferences"):
        oirl.export_log([log, pairs], tmp_path / "out", to="jsonl")
    wrong = write_rows(tmp_path / "log.parquet", [ROWS[1]])
    for format in ("trl-sft", "trl-preference", "openai-finetune"):
        with pytest.raises(DataError, match="nothing to write; 1 rows"):
            oirl.export_log(wrong, tmp_path / "out", to=format)
    (tmp_path / "file").write_text("")
    with pytest.raises((ConfigError, WriteError)):
        oirl.export_log(log, tmp_path / "file" / "out", to="jsonl")
    (tmp_path / "file").unlink()
    with pytest.raises(ConfigError, match="holds other files"):
        oirl.export_log(log, tmp_path, to="lm-eval")
    assert sorted(tmp_path.iterdir()) == before


def test_the_command_says_what_was_left_out(log: Path, tmp_path: Path) -> None:
    done = run_oirl("export", log, "--to", "trl-sft", "--out", tmp_path / "sft.jsonl")
    assert done.returncode == 0, done.stderr
    assert "3 written, from 7 rows" in done.stdout
    assert "left out 1: no verdict" in done.stderr
    document = json.loads(run_oirl("export", log, "--to", "jsonl", "--out", tmp_path / "a.jsonl", "--json").stdout)
    assert (document["format"], document["written"], document["left_out"]) == ("jsonl", 7, {})
    done = run_oirl("export", log, "--to", "nothing", "--out", tmp_path / "b")
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1)
