"""Logs of lm-evaluation-harness, made by the tool itself: tests/fixtures/lm_eval/make.py."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from reading import write_lines

import oirl
from oirl.errors import ConfigError, DataError
from oirl.logs.importing.pipeline import ImportReport
from oirl.logs.text import text_id

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures" / "lm_eval"
RUNS = FIXTURES / "runs"
QUESTIONS = [json.loads(line) for line in (FIXTURES / "questions.jsonl").read_text().splitlines()]
QUERIES = [q["question"] for q in QUESTIONS]
ANSWERS = [q["answer"] for q in QUESTIONS]
SUM = "Sum: {{question}}\nResult:"
STEPS = "Work through this in steps.\n\nSum: {{question}}\nSteps:"
NUMBER_ONLY = "{{question}}\nNumber only:"
CHAT = (
    "<|system|>You are a patient clerk.\n\nThe sums are short.\n\n<|end|>"
    "<|user|>Sum: {{question}}\nResult:<|end|><|assistant|>"
)
NO_VERDICT = "no row has a verdict; `oirl fit` needs some: --map correct=FIELD, or --grade numeric"
Rows = list[dict[str, Any]]


def load(folder: Path, source: Path, **options: Any) -> tuple[ImportReport, Rows]:
    report = oirl.import_log(source, folder / "log.parquet", **options)
    assert report.rows_read == report.rows_kept + report.rows_refused
    return report, oirl.read_log(folder / "log.parquet").to_pylist()


def column(rows: Rows, name: str) -> list[Any]:
    return [row[name] for row in rows]


def samples_of(run: str, task: str = "") -> Path:
    (found,) = [p for p in (RUNS / run).rglob("samples_*.jsonl") if task in p.name]
    return found


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def time_of(path: Path) -> str:
    return path.stem.rpartition("_")[2]


def noted(report: ImportReport) -> list[tuple[str, str, int, int]]:
    return [(p["prompt"], p["source"], p["rows"], p["fits"]) for p in report.prompts]


def test_documents_under_several_filters_need_a_choice(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"several filters.*: strict, loose; choose one with --filter"):
        load(tmp_path, RUNS / "two_filters")
    with pytest.raises(ConfigError, match=r"no filter 'loos' \(did you mean 'loose'\?\); there: strict, loose"):
        load(tmp_path, RUNS / "two_filters", filter="loos")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "direct", "steps"),
    [("strict", [1, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1]), ("loose", [1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 0, 1])],
)
def test_the_metric_of_the_chosen_filter_is_the_verdict(
    tmp_path: Path, name: str, direct: list[int], steps: list[int]
) -> None:
    report, rows = load(tmp_path, RUNS / "two_filters", filter=name)
    assert column(rows, "correct") == [bool(v) for v in direct + steps]
    assert column(rows, "prompt") == [SUM] * 6 + [STEPS] * 6
    assert column(rows, "query") == QUERIES * 2
    assert column(rows, "answer") == ANSWERS * 2
    assert (report.n_queries, report.n_prompts) == (6, 2)
    assert noted(report) == [(SUM, "format", 6, 6), (STEPS, "format", 6, 6)]
    files = [samples_of("two_filters", task).name for task in ("direct", "steps")]
    assert report.warnings == [f"{file}: 6 lines hold the same replies under other filters" for file in files]


def test_a_row_holds_what_the_tool_says_of_a_reply(tmp_path: Path) -> None:
    source = samples_of("two_filters", "direct")
    _, rows = load(tmp_path, source, filter="strict")
    doc_hash = next(s["doc_hash"] for s in lines_of(source) if s["doc_id"] == 3)
    row = {name: value for name, value in rows[3].items() if value is not None}
    assert json.loads(row.pop("metadata")) == {
        "task": "sum_direct",
        "doc_id": 3,
        "doc_hash": doc_hash,
        "filter": "strict",
        "filtered": ["[invalid]"],
    }
    assert json.loads(row.pop("sampling")) == {"until": ["\n\n"], "do_sample": False}
    assert len(row.pop("prompt_id")) == 16
    assert row == {
        "query_id": text_id(QUERIES[3]),
        "query": QUERIES[3],
        "prompt": SUM,
        "response": "The pot holds 12.",
        "correct": False,
        "answer": "12",
        "model": "scripted",
        "run_id": time_of(source),
        "replicate": 0,
    }


def test_runs_with_other_templates_join_on_the_document(tmp_path: Path) -> None:
    sources = [RUNS / name for name in ("repeats", "shots", "function")]
    oirl.import_log(sources, tmp_path / "log.parquet")
    rows = oirl.read_log(tmp_path / "log.parquet").to_pylist()
    names = {(row["query"], row["query_id"]) for row in rows}
    assert len(names) == 6
    assert len(set(column(rows, "prompt_id"))) == 3
    assert set(column(rows, "run_id")) == {time_of(samples_of(s.name)) for s in sources}


def test_only_the_first_of_repeated_replies_is_scored(tmp_path: Path) -> None:
    report, rows = load(tmp_path, RUNS / "repeats")
    replies = ["24", "25", "26", "27", "32", "32", "11", "10", "33", "3", "63", "36"]
    assert column(rows, "response") == replies
    assert column(rows, "replicate") == [0, 1] * 6
    assert column(rows, "correct") == [True, None, False, None, True, None, False, None, True, None, True, None]
    assert column(rows, "query") == [q for q in QUERIES for _ in range(2)]
    assert noted(report) == [(NUMBER_ONLY, "format", 12, 12)]
    assert report.warnings == []


def test_grading_gives_repeated_replies_their_verdicts(tmp_path: Path) -> None:
    _, rows = load(tmp_path, RUNS / "repeats", grade="numeric")
    assert column(rows, "correct") == [True, False, False, True, True, True, False, False, True, False, True, False]


def test_the_score_of_a_vote_is_the_verdict_of_no_reply(tmp_path: Path) -> None:
    report, rows = load(tmp_path, RUNS / "votes", filter="vote")
    assert column(rows, "correct") == [None] * 18
    assert column(rows, "replicate") == [0, 1, 2] * 6
    assert column(rows, "response")[:6] == ["23", "24", "24", "27", "26", "26"]
    notes = [json.loads(m) for m in column(rows, "metadata")[::3]]
    assert [n["metrics"]["exact_match"] for n in notes] == [1.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    assert [n["filtered"] for n in notes] == [["24"], ["26"], ["32"], ["12"], ["33"], ["63"]]
    assert NO_VERDICT in report.warnings


def test_beside_a_vote_the_first_reply_has_its_own_score(tmp_path: Path) -> None:
    _, rows = load(tmp_path, RUNS / "votes", filter="first")
    assert column(rows, "correct")[::3] == [False, True, True, True, False, True]
    assert set(column(rows, "correct")[1::3] + column(rows, "correct")[2::3]) == {None}


def test_without_results_a_vote_is_no_verdict_of_the_first_reply(tmp_path: Path) -> None:
    source = shutil.copy(samples_of("votes"), tmp_path)
    _, rows = load(tmp_path, Path(source), filter="vote")
    assert (rows[0]["response"], rows[0]["answer"]) == ("23", "24")
    assert rows[0]["correct"] is None


def test_predictions_without_scores_have_no_verdict(tmp_path: Path) -> None:
    report, rows = load(tmp_path, RUNS / "predict_only")
    assert column(rows, "correct") == [None] * 6
    assert column(rows, "score") == [None] * 6
    assert column(rows, "response") == ["24", "27", "31", "12", "3", "63"]
    assert report.warnings == [NO_VERDICT]


def test_multiple_choice_gives_the_likeliest_option(tmp_path: Path) -> None:
    report, rows = load(tmp_path, RUNS / "choices")
    assert column(rows, "response") == ["eight", "a third", "sixteen", "four", "no"]
    assert column(rows, "answer") == ["eight", "a half", "sixteen", "thirteen", "no"]
    assert column(rows, "correct") == [True, False, True, False, True]
    assert noted(report) == [("Q: {{question}}\nA:", "format", 5, 5)]
    assert report.warnings == [
        f"{samples_of('choices').name}: the verdict is the metric 'acc'; --scorer chooses another: acc, acc_norm"
    ]
    assert json.loads(rows[3]["metadata"])["metrics"] == {"acc": 0.0, "acc_norm": 1.0}


def test_another_metric_can_be_the_verdict(tmp_path: Path) -> None:
    report, rows = load(tmp_path, RUNS / "choices", scorer="acc_norm")
    assert column(rows, "correct") == [True, False, True, True, False]
    assert column(rows, "response")[:4] == ["eight", "a third", "sixteen", "thirteen"]
    assert report.warnings == []
    with pytest.raises(ConfigError, match=r"no metric 'acc_nom' \(did you mean 'acc_norm'\?\); there: acc, acc_norm"):
        load(tmp_path, RUNS / "choices", scorer="acc_nom")


def test_acc_norm_counts_the_characters_of_the_option_alone(tmp_path: Path) -> None:
    _, rows = load(tmp_path, RUNS / "choices", scorer="acc_norm")
    assert (rows[4]["response"], rows[4]["correct"]) == ("certainly", False)


@pytest.mark.parametrize(
    ("run", "prompt", "source", "model"),
    [
        ("chat", CHAT, "recovered", "scripted"),
        ("function", "Topic: sums\nAsked: {{question}}\nReply with a number.", "recovered", "scripted"),
        ("column", "{{question}}", "format", "scripted"),
        ("hidden", SUM, "format", "./local"),
    ],
)
def test_each_kind_of_template(tmp_path: Path, run: str, prompt: str, source: str, model: str) -> None:
    report, rows = load(tmp_path, RUNS / run)
    assert set(column(rows, "prompt")) == {prompt}
    assert noted(report) == [(prompt, source, 6, 6)]
    assert set(column(rows, "model")) == {model}
    assert column(rows, "query") == QUERIES
    assert column(rows, "correct") == [True, True, False, True, False, True]
    assert report.warnings == []


def test_examples_that_differ_from_row_to_row_are_one_prompt(tmp_path: Path) -> None:
    report, rows = load(tmp_path, RUNS / "shots")
    rendered = {s["arguments"]["gen_args_0"]["arg_0"].rpartition("Sum: ")[0] for s in lines_of(samples_of("shots"))}
    assert len(rendered) > 1
    (note,) = noted(report)
    assert note[2:] == (6, 6)
    assert note[0].endswith("{2 examples}\n\n" + SUM)
    assert set(column(rows, "prompt")) == {note[0]}
    assert column(rows, "query") == QUERIES


def test_examples_stand_for_themselves_with_their_label(tmp_path: Path) -> None:
    _, rows = load(tmp_path, RUNS / "shots")
    assert set(column(rows, "prompt")) == {"{2 examples}\n\n" + SUM}


def test_a_description_with_fields_is_part_of_the_template(tmp_path: Path) -> None:
    report, _ = load(tmp_path, RUNS / "described")
    assert noted(report) == [("Answer the sums of a {{topic}}.\n\n" + SUM, "format", 6, 6)]


def test_the_question_alone_is_the_query_where_a_description_names_another_field(tmp_path: Path) -> None:
    report, rows = load(tmp_path, RUNS / "described")
    assert column(rows, "query") == QUERIES
    assert report.n_prompts == 1
    assert noted(report)[0][0].endswith("\n\n" + SUM)


def test_graded_metrics_are_scores_without_verdict(tmp_path: Path) -> None:
    report, rows = load(tmp_path, RUNS / "graded")
    assert column(rows, "score") == [1.0, 0.5, 1.0, 0.0, 1.0, 1.0]
    assert column(rows, "correct") == [None] * 6
    assert report.warnings == [
        f"{samples_of('graded').name}: scores are grades, not 0 and 1: they stand in the column `score`, "
        "without verdict",
        NO_VERDICT,
    ]


@pytest.mark.parametrize(
    ("run", "prompt"),
    [("hidden", SUM), ("chat", CHAT), ("function", "Topic: sums\nAsked: {{question}}\nReply with a number.")],
)
def test_samples_alone_show_their_template(tmp_path: Path, run: str, prompt: str) -> None:
    source = Path(shutil.copy(samples_of(run), tmp_path))
    report, rows = load(tmp_path, source)
    marked = prompt.replace("{{question}}", "")
    shown = column(rows, "prompt")[0]
    assert shown.replace("{{question}}", "").replace("{query}", "") == marked
    assert [note[1:] for note in noted(report)] == [("recovered", 6, 6)]
    assert set(column(rows, "model")) == {None}
    assert set(column(rows, "run_id")) == {time_of(source)}
    assert column(rows, "query") == QUERIES
    assert column(rows, "correct") == [True, True, False, True, False, True]
    (warning,) = report.warnings
    assert warning.startswith(f"{source.name}: no results_*.json of this run beside it, so the model is not known")


def test_each_run_of_a_folder_has_its_own_results(tmp_path: Path) -> None:
    """Runs of one model are written to one folder; the results of another run say nothing of this one."""
    folder = tmp_path / "model"
    folder.mkdir()
    for run in ("hidden", "repeats", "column"):
        for file in samples_of(run).parent.iterdir():
            shutil.copy(file, folder)
    report, rows = load(tmp_path, folder)
    found = {(r["run_id"], r["model"], r["prompt"]) for r in rows}
    assert found == {
        (time_of(samples_of("hidden")), "./local", SUM),
        (time_of(samples_of("repeats")), "scripted", NUMBER_ONLY),
        (time_of(samples_of("column")), "scripted", "{{question}}"),
    }
    assert report.warnings == []


def later_run(folder: Path, *, results: bool) -> None:
    """Write the same task, run an hour later with another model, beside the first run."""
    source = samples_of("hidden")
    time = time_of(source)
    files = [source, next(source.parent.glob("results_*"))]
    for file in files:
        shutil.copy(file, folder)
    later = time.replace("T15-", "T16-")
    assert later != time
    shutil.copy(source, folder / source.name.replace(time, later))
    if results:
        text = files[1].read_text().replace("./local", "./other")
        (folder / files[1].name.replace(time, later)).write_text(text)


def test_runs_of_one_task_keep_their_own_models(tmp_path: Path) -> None:
    later_run(tmp_path, results=True)
    _, rows = load(tmp_path, tmp_path)
    assert column(rows, "model") == ["./local"] * 6 + ["./other"] * 6
    assert len(set(column(rows, "run_id"))) == 2


def test_the_results_of_another_run_say_nothing(tmp_path: Path) -> None:
    later_run(tmp_path, results=False)
    report, rows = load(tmp_path, tmp_path)
    assert column(rows, "model") == ["./local"] * 6 + [None] * 6
    assert len(report.warnings) == 1


def test_packed_samples_are_read_as_plain_ones(tmp_path: Path) -> None:
    source = samples_of("hidden")
    shutil.copy(next(source.parent.glob("results_*")), tmp_path)
    (tmp_path / f"{source.name}.gz").write_bytes(gzip.compress(source.read_bytes()))
    _, packed = load(tmp_path, tmp_path)
    _, plain = load(tmp_path, source)
    assert packed == plain


def test_lines_that_are_no_samples_are_refused_one_by_one(tmp_path: Path) -> None:
    text = samples_of("hidden").read_text().splitlines(keepends=True)
    source = tmp_path / samples_of("hidden").name
    source.write_text("".join([*text[:2], '{"note": "no document"}\n', *text[2:5], text[5][:200]]))
    report, rows = load(tmp_path, source)
    assert column(rows, "query") == QUERIES[:5]
    assert (report.rows_kept, report.rows_refused) == (5, 2)
    refused = [json.loads(line) for line in (tmp_path / "log.rejected.jsonl").read_text().splitlines()]
    assert [r["row"] for r in refused] == [3, 7]
    assert refused[0]["reason"] == "not a sample of lm-eval: it has no `doc`"


def test_fields_of_the_document_can_be_mapped(tmp_path: Path) -> None:
    _, rows = load(tmp_path, samples_of("hidden"), mapping={"dataset": "doc.topic"})
    assert column(rows, "dataset") == [q["topic"] for q in QUESTIONS]
    with pytest.raises(DataError, match=r"no field 'doc\.topik' \(did you mean 'doc\.topic'\?\)"):
        load(tmp_path, samples_of("hidden"), mapping={"dataset": "doc.topik"})


TIME = "2026-01-02T03-04-05.678"
Doc = dict[str, Any]


def hash_of(doc: Doc) -> str:
    return hashlib.sha256(json.dumps(doc).encode()).hexdigest()


def sample_of(doc: Doc, rendered: str, **more: Any) -> Doc:
    """Return a sample as the tool logs it; the reply is `7`, and right."""
    asked = {"gen_args_0": {"arg_0": rendered, "arg_1": {"until": ["\n"]}}}
    replied = {"arguments": asked, "resps": [["7"]], "filtered_resps": ["7"], "filter": "none"}
    scored = {"metrics": ["exact_match"], "exact_match": 1.0, "target": "7", "doc_hash": hash_of(doc)}
    return {"doc_id": 0, "doc": doc} | replied | scored | more


def made(folder: Path, samples: list[Doc], task: str = "made", **config: Any) -> Path:
    """Write samples of a task and, with `config`, the results of its run beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    if config:
        results = {"configs": {task: config}, "config": {"model": "m"}}
        (folder / f"results_{TIME}.json").write_text(json.dumps(results))
    return write_lines(folder / f"samples_{task}_{TIME}.jsonl", samples)


ABOUT = "The following are questions about animals.\n\n"
MMLU = "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nAnswer:"
LOOP = "{{question}}\n{% for c in choices %}{{c}}\n{% endfor %}Answer:"
ASKED = [("Who flies? ", ["owl", "cow"]), ("Who swims? ", ["hen", "eel"]), ("Who sings? ", ["ox", "lark"])]
CHOICES = [{"question": question, "choices": choices, "answer": 0} for question, choices in ASKED]
AS_MMLU = [
    "Who flies?\nA. owl\nB. cow\nAnswer:",
    "Who swims?\nA. hen\nB. eel\nAnswer:",
    "Who sings?\nA. ox\nB. lark\nAnswer:",
]
AS_LOOP = ["Who flies? \nowl\ncow\nAnswer:", "Who swims? \nhen\neel\nAnswer:", "Who sings? \nox\nlark\nAnswer:"]


@pytest.mark.parametrize("lead", ["", ABOUT])
@pytest.mark.parametrize("count", [1, 3])
def test_a_template_of_expressions_is_kept_and_compared(tmp_path: Path, lead: str, count: int) -> None:
    """Also of one document alone, whose choices are then the same in every row."""
    samples = [sample_of(doc, lead + text) for doc, text in zip(CHOICES, AS_MMLU, strict=True)][:count]
    report, rows = load(tmp_path, made(tmp_path / "run", samples, doc_to_text=MMLU, description=lead))
    assert noted(report) == [(lead + MMLU, "format", count, count)]
    assert column(rows, "query") == ["Who flies? \nowl\ncow", "Who swims? \nhen\neel", "Who sings? \nox\nlark"][:count]
    source = f"samples_made_{TIME}.jsonl"
    assert report.warnings == [
        f"{source}: the query is made of doc.question + doc.choices; --map query=doc.FIELD takes one of them"
    ]
    changed = [samples[0] | {"arguments": [[lead + AS_MMLU[0].replace("owl", "emu"), {}]]}, *samples[1:]]
    report, _ = load(tmp_path, made(tmp_path / "other", changed, doc_to_text=MMLU, description=lead))
    if count > 1:
        assert noted(report) == [(lead + MMLU, "format", count, count - 1)]


@pytest.mark.parametrize("count", [1, 3])
def test_a_template_of_statements_is_kept_verbatim_and_not_compared(tmp_path: Path, count: int) -> None:
    samples = [sample_of(doc, text) for doc, text in zip(CHOICES, AS_LOOP, strict=True)][:count]
    report, rows = load(tmp_path, made(tmp_path / "run", samples, doc_to_text=LOOP))
    assert noted(report) == [(LOOP, "format", 0, 0)]
    assert set(column(rows, "prompt")) == {LOOP}
    assert report.warnings[1].endswith("could not be compared with the rendered texts")


SHOUT = "Q: {{question}}{% if loud %}!{% endif %}\nA:"


@pytest.mark.parametrize("template", [SHOUT, SHOUT.removeprefix("Q: ")])
def test_runs_with_other_system_texts_are_other_prompts_though_the_template_has_statements(
    tmp_path: Path, template: str
) -> None:
    label = template.partition("{")[0]
    for name, system in (("a", "Be brief.\n\n"), ("b", "Think first.\n\n"), ("c", "")):
        docs = [
            {"question": f"{number} hens?", "loud": i % 2} for i, number in enumerate(("Two", "Nine", "Six", "Ten"))
        ]
        texts = [f"{system}{label}{doc['question']}{'!' * doc['loud']}\nA:" for doc in docs]
        made(tmp_path / "runs" / name, list(map(sample_of, docs, texts)), doc_to_text=template)
    report, rows = load(tmp_path, tmp_path / "runs")
    assert [note[0] for note in noted(report)] == [f"Be brief.\n\n{template}", f"Think first.\n\n{template}", template]
    assert (report.n_prompts, report.n_queries, report.rows_refused) == (3, 4, 0)
    assert [note[1:] for note in noted(report)] == [("format", 0, 0)] * 3
    assert column(rows, "prompt") == [note[0] for note in noted(report) for _ in range(4)]


def test_a_question_has_one_name_in_the_logs_of_all_tools(tmp_path: Path) -> None:
    question = "Two hens and one?"
    doc = {"question": question}
    lm_eval = made(tmp_path / "run", [sample_of(doc, f"Q: {question}")], doc_to_text="Q: {{question}}")
    result = {"provider": {"id": "m"}, "prompt": {"raw": question, "label": "{{q}}"}, "vars": {"q": question}}
    promptfoo = write_lines(tmp_path / "out.jsonl", [result | {"success": True, "response": {"output": "3"}}])
    plain = write_lines(tmp_path / "rows.jsonl", [{"query": question, "prompt": "Say."}])
    report = oirl.import_log([lm_eval, promptfoo, plain], tmp_path / "log.parquet")
    rows = oirl.read_log(tmp_path / "log.parquet").to_pylist()
    assert [f["format"] for f in report.files] == ["lm-eval", "promptfoo", "jsonl"]
    assert column(rows, "query_id") == [text_id(question)] * 3
    assert (report.n_queries, report.rows_refused) == (1, 0)
    assert json.loads(rows[0]["metadata"])["doc_hash"] == hash_of(doc)


def test_runs_whose_templates_name_other_fields_of_the_documents_keep_all_rows(tmp_path: Path) -> None:
    docs = [{"question": "Two hens?", "topic": "farm"}, {"question": "Nine nuts?", "topic": "wood"}]
    for name, template in (("a", "{{question}}"), ("b", "{{topic}}: {{question}}")):
        texts = [template.replace("{{question}}", d["question"]).replace("{{topic}}", d["topic"]) for d in docs]
        made(tmp_path / "runs" / name, list(map(sample_of, docs, texts)), doc_to_text=template)
    report, rows = load(tmp_path, tmp_path / "runs")
    assert (report.rows_kept, report.rows_refused) == (4, 0)
    assert sorted(column(rows, "query")) == ["Nine nuts?", "Nine nuts?\nwood", "Two hens?", "Two hens?\nfarm"]
    assert column(rows, "query_id") == [text_id(q) for q in column(rows, "query")]


def test_documents_of_one_text_are_queries_of_their_own(tmp_path: Path) -> None:
    """Such as a question that is asked twice, with other choices."""
    docs = [{"question": "Which one?", "picture": k} for k in (1, 2, 1)] + [{"question": "Who?", "picture": 3}]
    samples = [sample_of(doc, doc["question"]) for doc in docs]
    report, rows = load(tmp_path, made(tmp_path / "run", samples, doc_to_text="{{question}}"))
    same = text_id("Which one?")
    assert column(rows, "query_id") == [same, f"{same}-{hash_of(docs[1])[:12]}", same, text_id("Who?")]
    assert column(rows, "replicate") == [0, 0, 1, 0]
    assert (report.n_queries, report.rows_refused) == (3, 0)


@pytest.mark.parametrize(("task", "ours"), [("oirl_think", True), ("think", False)])
def test_a_task_that_was_exported_from_a_log_brings_its_names_back(tmp_path: Path, task: str, ours: bool) -> None:
    docs = [
        {"query_id": "q1", "query": "Two hens?", "answer": "2"},
        {"query_id": "q2", "query": "Nine?", "answer": "9"},
    ]
    samples = [sample_of(doc, f"Think.\n\n{doc['query']}") for doc in docs]
    config = {"doc_to_text": "Think.\n\n{{query}}", "metadata": {"version": 1.0, "prompt_id": "think"}}
    _, rows = load(tmp_path, made(tmp_path / "run", samples, task, **config))
    names = ["q1", "q2"] if ours else [text_id("Two hens?"), text_id("Nine?")]
    assert column(rows, "query_id") == names
    assert (column(rows, "prompt_id") == ["think", "think"]) == ours


WINOGRANDE = 'def doc_to_text(doc):\n    answer_to_num = {"1": 0, "2": 1}\n    return answer_to_num[doc["answer"]]\n'


@pytest.mark.parametrize("known", [True, False], ids=["with results", "samples alone"])
def test_options_within_the_context_are_the_responses(tmp_path: Path, known: bool) -> None:
    """As in winogrande: the contexts differ by the option, and what follows them is the same."""
    docs = [
        {"sentence": "Eve thanked Kim because _ had helped.", "option1": "Eve", "option2": "Kim", "answer": "2"},
        {"sentence": "The cup fits not into the box as the _ is small.", "option1": "cup", "option2": "box",
         "answer": "2"},
    ]  # fmt: skip
    samples = []
    for doc, logprobs in zip(docs, ((-4.0, -1.5), (-2.0, -2.5)), strict=True):
        before, after = doc["sentence"].split("_")
        scored = [[str(p), "False"] for p in logprobs]
        sample = sample_of(doc, "", target=after.strip(), metrics=["acc"], acc=float(logprobs[1] > logprobs[0]))
        contexts = {f"gen_args_{i}": {"arg_0": before + doc[f"option{i + 1}"], "arg_1": after} for i in (0, 1)}
        samples.append(sample | {"arguments": contexts, "resps": [[s] for s in scored], "filtered_resps": scored})
    _, rows = load(tmp_path, made(tmp_path / "run", samples, **({"doc_to_text": WINOGRANDE} if known else {})))
    assert column(rows, "query") == [doc["sentence"] for doc in docs]
    assert column(rows, "response") == ["Kim", "cup"]
    assert column(rows, "correct") == [True, False]


@pytest.mark.parametrize(("options", "sentence"), [
    (("Sarah", "Samantha"), "_ thanked her."),
    (("Maria", "Samantha"), "She called _ today."),
    (("Ann", "Anna"), "It was _ who won."),
])  # fmt: skip
def test_options_within_the_context_may_share_letters(tmp_path: Path, options: tuple[str, str], sentence: str) -> None:
    doc = {"sentence": sentence, "option1": options[0], "option2": options[1], "answer": "2"}
    before, after = sentence.split("_")
    scored = [["-4.0", "False"], ["-1.0", "False"]]
    sample = sample_of(doc, "", target=after.strip(), metrics=["acc"], acc=1.0, filtered_resps=scored)
    sample["arguments"] = {f"gen_args_{i}": {"arg_0": before + o, "arg_1": after} for i, o in enumerate(options)}
    sample["resps"] = [[s] for s in scored]
    _, rows = load(tmp_path, made(tmp_path / "run", [sample], doc_to_text=WINOGRANDE))
    assert column(rows, "response") == [options[1]]


def test_runs_of_an_exported_task_join_the_log_it_came_from(tmp_path: Path) -> None:
    asked = {"query_id": "q1", "query": "Two hens?", "answer": "2"}
    log = write_lines(tmp_path / "rows.jsonl", [asked | {"prompt_id": "think", "prompt": "Think."}])
    config = {"doc_to_text": "Think.\n\n{{query}}", "metadata": {"prompt_id": "think", "prompt": "Think."}}
    run = made(tmp_path / "run", [sample_of(asked, "Think.\n\nTwo hens?")], "oirl_think", **config)
    report = oirl.import_log([log, run], tmp_path / "log.parquet")
    assert (report.rows_kept, report.rows_refused, report.n_prompts, report.n_queries) == (2, 0, 1, 1)


def test_a_template_of_statements_keeps_its_description_though_there_is_one_document(tmp_path: Path) -> None:
    samples = [sample_of(CHOICES[0], ABOUT + AS_LOOP[0])]
    report, _ = load(tmp_path, made(tmp_path / "run", samples, doc_to_text=LOOP, description=ABOUT))
    assert noted(report) == [(ABOUT + LOOP, "format", 0, 0)]


def filters(folder: Path, *runs: str) -> Path:
    for run in runs:
        shutil.copytree(RUNS / run, folder / "runs" / run)
    return folder / "runs"


def test_a_filter_is_followed_where_a_task_has_several_and_others_are_read_whole(tmp_path: Path) -> None:
    report, rows = load(tmp_path, filters(tmp_path, "two_filters", "hidden", "column"), filter="loose")
    for run in ("hidden", "column"):
        whole = [r["correct"] for r in rows if r["run_id"] == time_of(samples_of(run))]
        assert whole == [True, True, False, True, False, True]
    assert [r["correct"] for r in rows if r["prompt"] == SUM and r["model"] == "scripted"] == [
        bool(v) for v in (1, 1, 0, 1, 1, 0)
    ]
    assert report.rows_kept == 24


@pytest.mark.parametrize(
    ("runs", "there"),
    [(("hidden", "two_filters"), "strict, loose"), (("hidden",), "none"), (("two_filters",), "strict, loose")],
)
def test_a_filter_that_no_task_has_is_an_error_that_names_those_there(
    tmp_path: Path, runs: tuple[str, ...], there: str
) -> None:
    with pytest.raises(ConfigError, match=rf"--filter lose: no filter 'lose'.*; there: {there}$"):
        load(tmp_path, filters(tmp_path, *runs), filter="lose")
    assert not (tmp_path / "log.parquet").exists()


def test_a_filter_beside_files_of_another_tool(tmp_path: Path) -> None:
    promptfoo = FIXTURES.parent / "promptfoo" / "grid.jsonl"
    out = tmp_path / "log.parquet"
    report = oirl.import_log([promptfoo, RUNS / "two_filters"], out, filter="strict")
    assert {f["format"]: f["rows_kept"] for f in report.files} == {"promptfoo": 24, "lm-eval": 6}
    assert report.rows_kept == 36
    with pytest.raises(ConfigError, match="--filter strict: the format promptfoo has no filters; leave it out"):
        oirl.import_log([promptfoo, FIXTURES.parent / "inspect" / "sums.json"], out, filter="strict")


@pytest.mark.parametrize(("name", "direct", "cot"), [("strict-match", 8, 16), ("flexible-extract", 12, 18)])
def test_real_logs(tmp_path: Path, real_data: Path, name: str, direct: int, cot: int) -> None:
    folder = real_data / "log_formats" / "lm_eval"
    report, rows = load(tmp_path, folder, filter=name)
    prompts = {
        "Question: {{question}}\nThe answer is:": direct,
        "Question: {{question}}\nAnswer: Let's think step by step:": cot,
    }
    assert (report.rows_kept, report.rows_refused, report.n_queries, report.n_prompts) == (50, 0, 25, 2)
    for prompt, right in prompts.items():
        assert [sum(r["correct"] for r in rows if r["prompt"] == prompt)] == [right]
    assert sorted(noted(report)) == sorted((prompt, "format", 25, 25) for prompt in prompts)
    assert set(column(rows, "model")) == {"scripted"}
    assert set(column(rows, "replicate")) == {0}
    with pytest.raises(ConfigError, match="strict-match, flexible-extract"):
        load(tmp_path, folder)
