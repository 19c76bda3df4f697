"""promptfoo: one run as JSON, JSONL and CSV gives one log; chats, named scores, errors, repeats, earlier versions."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from reading import FIXTURES, Row, column, read, refused, write_lines

import oirl
from oirl.errors import ConfigError, DataError
from oirl.logs.rendering import PROMPTFOO_TEXT

GRID = FIXTURES / "promptfoo" / "grid"
CHAT = FIXTURES / "promptfoo" / "chat"

SHORT = "Question: {{question}}\nThe answer in {{unit}} is:"
LONG = "Count the {{unit}}.\n\n{{question}}\n\nThink step by step, and end with the number of {{ unit }}."
EGGS = "A hen lays 5 eggs, then 3 more. How many?\neggs"
TINS = 'She said "put 6 beans in a tin",\nthen he filled 6 more. How many tins?\ntins'
CUPS = "Ann has 3 cups, Ben 4. How many, both?\ncups"
FULL, SEE, FIRST = '12, "full" tins', "Let me see,\nit is 8 eggs.", 'First 3, then "4":\n7 cups'

# query, answer, then (response, verdict, score) of short and long under each model.
GRID_CELLS: list[tuple[str, str, str, tuple[Any, Any, Any], tuple[Any, Any, Any]]] = [
    (EGGS, "8", "small", ("9 eggs", False, 0.5), ("9 eggs", False, 0.5)),
    (EGGS, "8", "scripted:large", (SEE, True, 1.0), (SEE, True, 1.0)),
    (TINS, "12", "small", (None, None, 0.0), (None, None, 0.0)),
    (TINS, "12", "scripted:large", (FULL, True, 1.0), (FULL, True, 1.0)),
    (CUPS, "7", "small", ("6", False, 0.0), (FIRST, True, 1.0)),
    (CUPS, "7", "scripted:large", ("6", False, 0.0), (FIRST, True, 1.0)),
]
"""What provider.js says to each prompt, and what the two assertions on it make of that."""
CELL = ("query", "answer", "model", "prompt", "replicate", "response", "correct")

COST = {EGGS: 0.001, TINS: 0.002, CUPS: 0.001}


def expected() -> set[tuple[Any, ...]]:
    cells = set()
    for query, answer, model, *results in GRID_CELLS:
        for prompt, (response, verdict, _) in zip((SHORT, LONG), results, strict=True):
            cells |= {(query, answer, model, prompt, k, response, verdict) for k in (0, 1)}
    return cells


@pytest.mark.parametrize("name", ["grid.json", "grid.jsonl"])
def test_a_run_becomes_one_row_per_test_prompt_provider_and_repeat(tmp_path: Path, name: str) -> None:
    report, rows = read(GRID.with_name(name), tmp_path)
    assert set(column(rows, *CELL)) == expected()
    assert (report.rows_kept, report.rows_refused, report.n_queries, report.n_prompts) == (24, 0, 3, 2)
    assert [f["format"] for f in report.files] == ["promptfoo"]
    assert report.warnings == [
        f"{name}: the query is made of vars.question + vars.unit; --map query=vars.NAME takes one of them"
    ]


def test_numbers_of_a_run(tmp_path: Path) -> None:
    _, rows = read(GRID.with_name("grid.json"), tmp_path)
    source = json.loads(GRID.with_name("grid.json").read_text())["results"]["results"]
    assert [row["latency_s"] * 1000 for row in rows] == pytest.approx([result["latencyMs"] for result in source])
    for row in rows:
        failed = row["query"] == TINS and row["model"] == "small"
        rendered = row["prompt"].replace("{{question}}", row["query"].rpartition("\n")[0])
        for mark in ("{{unit}}", "{{ unit }}"):
            rendered = rendered.replace(mark, row["query"].rpartition("\n")[2])
        assert row["tokens_in"] == (0 if failed else len(rendered))
        assert row["tokens_out"] == (0 if failed else 3)
        assert row["cost"] == (0 if failed else COST[row["query"]])
        assert row["run_id"].startswith("eval-")
        assert row["created_at"].replace(microsecond=0) == datetime(2026, 11, 21, 15, 16, 59, tzinfo=timezone.utc), row[
            "created_at"
        ]


def test_scores_and_metadata_of_a_run(tmp_path: Path) -> None:
    _, rows = read(GRID.with_name("grid.json"), tmp_path)
    found = {(r["query"], r["model"], r["prompt"]): r["score"] for r in rows if r["correct"] is not None}
    want = {}
    for query, _, model, *results in GRID_CELLS:
        for prompt, (_, verdict, score) in zip((SHORT, LONG), results, strict=True):
            if verdict is not None:
                want[query, model, prompt] = score
    assert found == want
    errors = {(r["query"], r["model"]): r["metadata"].get("error") for r in rows}
    assert errors.pop((TINS, "small")) == "no such model"
    assert set(errors.values()) == {None}, "the text of a failed assertion is no error"
    assert {r["metadata"].get("description") for r in rows if r["query"] == CUPS} == {"cups"}
    assert {r["metadata"].get("description") for r in rows if r["query"] != CUPS} == {None}
    half = [r["metadata"]["named_scores"] for r in rows if r["response"] == "9 eggs"]
    assert half == [{"gold": 0, "unit": 1}] * 4


def test_where_prompts_come_from(tmp_path: Path) -> None:
    report, _ = read(GRID.with_name("grid.json"), tmp_path)
    notes = [(p["prompt"], p["source"], p["rows"], p["fits"]) for p in report.prompts]
    assert notes == [(SHORT, "format", 12, 12), (LONG, "format", 12, 12)]
    report, _ = read(GRID.with_name("grid.jsonl"), tmp_path)
    notes = [(p["prompt"], p["source"], p["rows"], p["fits"]) for p in report.prompts]
    # A prompt that has no label is labelled with its template, and a line keeps the label.
    assert notes == [(SHORT, "recovered", 12, 12), (LONG, "format", 12, 12)]


SHARED = ("query", "response", "correct", "score", "answer", "model", "replicate")


def test_json_and_jsonl_hold_the_same_rows(tmp_path: Path) -> None:
    _, one = read(GRID.with_name("grid.json"), tmp_path)
    _, other = read(GRID.with_name("grid.jsonl"), tmp_path)
    lacking = ("run_id", "created_at")  # a line of its own knows nothing of the run
    assert [{k: v for k, v in row.items() if k not in lacking} for row in one] == [
        {k: v for k, v in row.items() if k not in lacking} for row in other
    ]
    assert {row["run_id"] for row in other} == {None}


def sorted_by_cell(rows: list[Row], *names: str) -> list[Any]:
    return sorted(column(rows, *names), key=repr)


def test_csv_holds_the_same_replies_and_verdicts(tmp_path: Path) -> None:
    _, one = read(GRID.with_name("grid.json"), tmp_path)
    _, other = read(GRID.with_name("grid.csv"), tmp_path, mapping={"query": "vars.question"})
    for rows in (one, other):
        for row in rows:
            row["query"] = row["query"].rpartition("\n")[0] if rows is one else row["query"]
            row["named"] = sorted(row["metadata"].get("named_scores", {}).items())
            # A csv file does not tell the score of an error from none.
            row["score"] = row["score"] if row["correct"] is not None else None
    names = (*SHARED, "named")
    assert sorted_by_cell(one, *names) == sorted_by_cell(other, *names)


def test_csv_holds_the_same_queries(tmp_path: Path) -> None:
    _, rows = read(GRID.with_name("grid.csv"), tmp_path)
    assert {row["query"] for row in rows} == {EGGS, TINS, CUPS}


def test_a_label_is_no_prompt(tmp_path: Path) -> None:
    report, rows = read(GRID.with_name("grid.csv"), tmp_path)
    assert "direct" not in {row["prompt"] for row in rows}
    assert any("only the labels of some prompts (direct)" in text for text in report.warnings)
    assert {row["prompt"] for row in rows if row["prompt_id"] == "direct"} == {""}


def test_where_prompts_of_a_csv_file_come_from(tmp_path: Path) -> None:
    report, _ = read(GRID.with_name("grid.csv"), tmp_path)
    assert (LONG, "format") in [(p["prompt"], p["source"]) for p in report.prompts]


CHAT_PROMPTS = [
    '[{"role":"system","content":"You count \\"things\\"."},{"role":"user","content":"{{question}}"}]',
    '[{"role":"user","content":"{{question}} Say a number."}]',
]
HENS, SAID = "A hen lays 5 eggs, then 3 more. How many?", 'He said "3 cups" and 4 more. How many?'


def test_chats_are_templates_too(tmp_path: Path) -> None:
    report, rows = read(CHAT.with_name("chat.json"), tmp_path)
    want = [
        (query, prompt, response, correct, answer, 0)
        for query, response, correct, answer in ((HENS, SEE, True, "8"), (SAID, "6", False, "7"))
        for prompt in CHAT_PROMPTS
    ]
    assert column(rows, "query", "prompt", "response", "correct", "answer", "replicate") == want
    notes = [(p["prompt"], p["source"], p["rows"], p["fits"]) for p in report.prompts]
    assert notes == [(prompt, "recovered", 2, 2) for prompt in CHAT_PROMPTS]
    assert report.warnings == []


def test_chats_of_jsonl_are_templates_too(tmp_path: Path) -> None:
    report, rows = read(CHAT.with_name("chat.jsonl"), tmp_path)
    assert column(rows, "prompt") == CHAT_PROMPTS * 2
    assert report.warnings == []


def test_a_named_score_can_be_the_verdict(tmp_path: Path) -> None:
    _report, rows = read(GRID.with_name("grid.jsonl"), tmp_path, scorer="unit")
    verdicts = {(r["query"], r["model"], r["prompt"]): r["correct"] for r in rows}
    assert verdicts[EGGS, "small", SHORT] is True
    assert verdicts[CUPS, "small", SHORT] is False
    assert verdicts[TINS, "small", SHORT] is None
    assert sum(v is True for v in column(rows, "correct")) == 4 + 12
    with pytest.raises(
        ConfigError, match=r"--scorer units: no score 'units' \(did you mean 'unit'\?\); there: success"
    ):
        read(GRID.with_name("grid.json"), tmp_path, scorer="units")


def test_one_variable_can_be_the_query(tmp_path: Path) -> None:
    report, rows = read(GRID.with_name("grid.json"), tmp_path, mapping={"query": "vars.question"})
    assert {row["query"] for row in rows} == {text.rpartition("\n")[0] for text in (EGGS, TINS, CUPS)}
    assert report.warnings == []
    with pytest.raises(DataError, match=r"--map query=vars\.qestion: no field .* \(did you mean 'vars\.question'\?\)"):
        read(GRID.with_name("grid.json"), tmp_path, mapping={"query": "vars.qestion"})


def version_2(results: list[Row], prompts: list[Row]) -> Row:
    table = {"head": {"prompts": prompts, "vars": ["question"]}, "body": []}
    about = {"version": 2, "timestamp": "2024-05-06T07:08:09.000Z", "results": results, "table": table}
    return {"evalId": "eval-2024", "results": about | {"stats": {"successes": 1, "failures": 1}}, "config": {}}


def test_version_2_names_prompts_by_their_labels(tmp_path: Path) -> None:
    prompts = [
        {"raw": "Q: {{question}}", "display": "Q: {{question}}", "label": "Q: {{question}}", "provider": "a"},
        {"raw": "{{question}} Think.", "label": "think", "provider": "a"},
    ]
    results = [
        {
            "provider": {"id": "a"},
            "prompt": {"raw": raw.replace("{{question}}", question), "label": label},
            "vars": {"question": question, "answer": "3"},
            "response": {"output": reply, "tokenUsage": {"prompt": 5, "completion": 1}},
            "success": reply == "3",
            "score": float(reply == "3"),
            "latencyMs": 1500,
        }
        for question, reply in (("Two hens and one?", "3"), ("Five less two?", "4"))
        for raw, label in (("Q: {{question}}", "Q: {{question}}"), ("{{question}} Think.", "think"))
    ]
    path = tmp_path / "old.json"
    path.write_text(json.dumps(version_2(results, prompts)))
    report, rows = read(path, tmp_path)
    assert column(rows, "query", "prompt", "correct", "answer", "latency_s", "tokens_in", "run_id") == [
        ("Two hens and one?", "Q: {{question}}", True, "3", 1.5, 5, "eval-2024"),
        ("Two hens and one?", "{{question}} Think.", True, "3", 1.5, 5, "eval-2024"),
        ("Five less two?", "Q: {{question}}", False, "3", 1.5, 5, "eval-2024"),
        ("Five less two?", "{{question}} Think.", False, "3", 1.5, 5, "eval-2024"),
    ]
    notes = [(p["prompt"], p["source"], p["rows"], p["fits"]) for p in report.prompts]
    assert notes == [("Q: {{question}}", "format", 2, 2), ("{{question}} Think.", "format", 2, 2)]
    assert {row["created_at"] for row in rows} == {datetime(2024, 5, 6, 7, 8, 9, tzinfo=timezone.utc)}


def test_cells_of_earlier_csv_files(tmp_path: Path) -> None:
    path = tmp_path / "old.csv"
    path.write_text(
        'question,answer,[a] Q: {{question}},"[b] Q: {{question}}"\n'
        'Two hens?,2,[PASS] (1.00) two,"[FAIL] (0.50) ""3"",\nor [PASS] (1.00)"\n'
        "Five less two?,3,[FAIL] (0.25) 2.9,[PASS] (1.00) 3\n"
        "Cut,off\n"
    )
    report, rows = read(path, tmp_path)
    assert column(rows, "query", "answer", "model", "prompt", "response", "correct", "score") == [
        ("Two hens?", "2", "a", "Q: {{question}}", "two", True, 1.0),
        ("Two hens?", "2", "b", "Q: {{question}}", '"3",\nor [PASS] (1.00)', False, 0.5),
        ("Five less two?", "3", "a", "Q: {{question}}", "2.9", False, 0.25),
        ("Five less two?", "3", "b", "Q: {{question}}", "3", True, 1.0),
    ]
    assert report.reasons == [{"reason": "2 cells where the header has 4", "count": 1, "first": f"{path}:3"}]


def test_errors_in_cells_of_earlier_csv_files(tmp_path: Path) -> None:
    path = tmp_path / "old.csv"
    path.write_text("question,[a] Q: {{question}}\nTwo hens?,[PASS] two\nFive?,[ERROR] no such model\n")
    _, rows = read(path, tmp_path)
    assert column(rows, "response", "correct") == [("two", True), (None, None)]
    assert rows[1]["metadata"]["error"] == "no such model"


def test_results_that_are_none_are_refused(tmp_path: Path) -> None:
    good = json.loads(GRID.with_name("grid.jsonl").read_text().splitlines()[0])
    path = write_lines(tmp_path / "some.jsonl", [good, {"vars": {}, "prompt": {}}, 7, good])
    report, rows = read(path, tmp_path)
    assert column(rows, "response", "replicate") == [("9 eggs", 0), ("9 eggs", 1)]
    assert refused(tmp_path) == [(k, "not a result of promptfoo: it has no `success`") for k in (2, 3)]
    assert (report.rows_kept, report.rows_refused) == (2, 2)


def run_of(prompts: list[str], tests: list[tuple[Row, list[str]]], **more: Any) -> Row:
    """Return a run as the tool writes it: tests with their variables and the rendered text of each prompt."""
    results = [
        {"promptIdx": k, "testIdx": i, "vars": variables, "prompt": {"raw": text, "label": f"p{k}"}, "success": True,
         "provider": {"id": "m"}, "response": {"output": "7"}, "score": 1} | more
        for i, (variables, texts) in enumerate(tests)
        for k, text in enumerate(texts)
    ]  # fmt: skip
    heads = [{"raw": raw, "label": f"p{k}"} for k, raw in enumerate(prompts)]
    return {"evalId": "eval-1", "results": {"version": 3, "prompts": heads, "results": results}}


def save(folder: Path, run: Row) -> Path:
    path = folder / "out.json"
    path.write_text(json.dumps(run))
    return path


def test_tests_without_assertions_have_no_verdict(tmp_path: Path) -> None:
    run = run_of(["{{q}}"], [({"q": f"{n}?"}, [f"{n}?"]) for n in ("One", "Two", "Six", "Ten", "Zero")])
    results = run["results"]["results"]
    asserted = [{"type": "equals", "value": "7"}]
    component = {"componentResults": [{"pass": True, "assertion": asserted[0]}]}
    results[0]["testCase"] = {"vars": {}, "assert": asserted}
    results[1]["testCase"] = {"vars": {}, "assert": []}
    results[2]["testCase"] = {"vars": {}}
    results[3] |= {"testCase": {"vars": {}}, "gradingResult": component}  # an assertion of all tests
    results[4] |= {"testCase": {"vars": {}, "assert": asserted}, "success": False, "score": 0}
    report, rows = read(save(tmp_path, run), tmp_path)
    assert column(rows, "correct", "score") == [(True, 1), (None, None), (None, None), (True, 1), (False, 0)]
    assert report.warnings == [
        "out.json: 2 results are of tests without assertions, which have no verdict; --grade can give one"
    ]


NESTED = "{{ctx.title}}: {{ ctx.items[0] }}? {{ctx.note | upper}}"
FARM = {"title": "Farm", "items": ["hens", "owls"], "note": "now"}
WOOD = {"title": "Wood", "items": ["nuts"], "note": "Then"}


def test_a_template_of_nested_names_is_kept_and_fits(tmp_path: Path) -> None:
    tests = [({"ctx": FARM}, ["Farm: hens? NOW"]), ({"ctx": WOOD}, ["Wood: nuts? THEN"])]
    report, rows = read(save(tmp_path, run_of([NESTED], tests)), tmp_path)
    assert [(p["prompt"], p["source"], p["rows"], p["fits"]) for p in report.prompts] == [(NESTED, "format", 2, 2)]
    assert column(rows, "prompt") == [NESTED] * 2
    assert rows[0]["metadata"]["template_fields"] == {
        "ctx.title": "Farm",
        "ctx.items[0]": "hens",
        "ctx.note | upper": "NOW",
    }
    tests[0] = (tests[0][0], ["Farm: owls? NOW"])
    report, _ = read(save(tmp_path, run_of([NESTED], tests)), tmp_path)
    assert [(p["rows"], p["fits"]) for p in report.prompts] == [(2, 1)]


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_what_kept_a_prompt_from_being_opened_as_a_file_is_no_part_of_it(tmp_path: Path, form: str) -> None:
    raw = PROMPTFOO_TEXT + "See a/main.py: {{query}}"
    tests = [({"query": q}, [f"See a/main.py: {q}"]) for q in ("Two hens?", "Nine nuts?")]
    run = run_of([raw], tests)
    path = save(tmp_path, run)
    if form == "jsonl":
        for result in run["results"]["results"]:
            result["prompt"]["raw"] = PROMPTFOO_TEXT + result["prompt"]["raw"]
        path = write_lines(tmp_path / "out.jsonl", run["results"]["results"])
    report, rows = read(path, tmp_path)
    prompt = "See a/main.py: " + ("{{query}}" if form == "json" else "{query}")
    assert column(rows, "prompt") == [prompt] * 2
    assert [(p["prompt"], p["rows"], p["fits"]) for p in report.prompts] == [(prompt, 2, 2)]
    assert "metadata" not in rows[0]["metadata"]


FILLED = ["{{question}} In {{lang}}.", "Q: {{question}}"]
TALK = [
    ({"question": "Two hens?", "lang": "French", "answer": "2"}, ["Two hens? In French.", "Q: Two hens?"]),
    ({"question": "Nine?", "lang": "Danish", "answer": "9"}, ["Nine? In Danish.", "Q: Nine?"]),
]


@pytest.mark.parametrize("form", ["trl-sft", "openai-finetune", "lm-eval", "promptfoo"])
def test_exports_of_prompts_that_are_filled_with_other_fields_than_the_query(tmp_path: Path, form: str) -> None:
    plain = write_lines(
        tmp_path / "rows.jsonl", [dict(query="Six?", prompt="Say.", response="6", answer="6", correct=True)]
    )
    log, out = tmp_path / "log.parquet", tmp_path / "out"
    oirl.import_log([save(tmp_path, run_of(FILLED, TALK)), plain], log)
    assert set(oirl.read_log(log)["query"].to_pylist()) == {"Two hens?\nFrench", "Nine?\nDanish", "Six?"}
    report = oirl.export_log(log, out, to=form)
    if form in ("lm-eval", "promptfoo"):
        assert report.left_out == {"the prompt cannot be filled with the query alone": 4}
        assert report.written == 1
        return
    examples = [json.loads(line) for line in out.read_text().splitlines()]
    asked = [next(m["content"] for m in e.get("messages", e.get("prompt")) if m["role"] == "user") for e in examples]
    assert asked == [text for _, texts in TALK for text in texts] + ["Six?"]
    assert report.left_out == {}


@pytest.mark.real_data
def test_a_real_run(tmp_path: Path, real_data: Path) -> None:
    report, rows = read(real_data / "log_formats" / "promptfoo" / "out.json", tmp_path)
    assert (report.rows_kept, report.rows_refused, report.n_queries, report.n_prompts) == (100, 0, 25, 2)
    direct, cot = ("Question: {{question}}\n" + end for end in ("The answer is:", "Let's think step by step:"))
    passed = {
        (model, prompt): [r["correct"] for r in rows if (r["model"], r["prompt"]) == (model, prompt)]
        for model in ("scripted", "echo")
        for prompt in (direct, cot)
    }
    assert {key: (values.count(True), values.count(None)) for key, values in passed.items()} == {
        ("scripted", direct): (10, 1),
        ("scripted", cot): (17, 0),
        ("echo", direct): (1, 0),
        ("echo", cot): (1, 0),
    }
    notes = [(p["prompt"], p["source"], p["rows"], p["fits"]) for p in report.prompts]
    assert notes == [(direct, "format", 50, 50), (cot, "format", 50, 50)]
    assert [r["response"] for r in rows if r["correct"] is None] == [None]
