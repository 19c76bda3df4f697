"""HELM: trials, completions, perturbations, two kinds of multiple choice, missing scores, several runs in a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from reading import FIXTURES, column, read, refused

from oirl.errors import ConfigError, DataError

RUNS = FIXTURES / "helm" / "runs"
COUNTING = RUNS / "counting:shots=2,model=simple_model1"
JOINT = RUNS / "kinds:method=multiple_choice_joint,model=simple_model1"
SEPARATE = RUNS / "kinds:method=multiple_choice_separate_original,model=simple_model1"
BEANS, NUTS, EGGS = "Six BEANS and one bean?", "Nine nuts less five nuts?", "One egg and one egg?"
SWIMS, MILK = "Which one swims?\nowl\ncow\neel", "Which one gives milk?\ncow\neel\nowl"
LETTERS = (
    "Name the letter.\n\nQuestion: Which one flies?\nA. owl\nB. cow\nC. eel\nAnswer:A\n\n"
    "Question: {query}\nA. {{A}}\nB. {{B}}\nC. {{C}}\nAnswer:"
)


def test_trials_and_completions_are_replicates(tmp_path: Path) -> None:
    report, rows = read(COUNTING, tmp_path)
    plain = [r for r in rows if "perturbation" not in r["metadata"]]
    # Replicate: trial x 2 completions; the score is that of the first completion.
    want = {
        (query, response, answer, 2 * trial + k, verdict if k == 0 else None)
        for query, answer, verdict, replies in (
            (BEANS, "7", True, (" 7", " 8")),
            (NUTS, "4", False, (" 3", " 4")),
            (EGGS, "2", True, (" 2", " 2")),
        )
        for trial in (0, 1)
        for k, response in enumerate(replies)
    }
    assert set(column(plain, "query", "response", "answer", "replicate", "correct")) == want
    assert len(plain) == len(want) == 12
    assert {r["model"] for r in rows} == {"simple/model1"}
    assert {r["latency_s"] for r in rows} == {0.25}
    assert {json.loads(r["sampling"])["temperature"] for r in rows} == {0.0}
    assert {r["metadata"]["instance_id"] for r in plain} == {"id3", "id4", "id5"}
    assert report.warnings == [
        f"{COUNTING.name}: the verdict is 'quasi_exact_match'; --scorer chooses another: quasi_exact_match, "
        "exact_match, exact_match@2, quasi_exact_match@2"
    ]


def test_the_examples_of_two_trials_stay_out_of_the_prompt(tmp_path: Path) -> None:
    report, _ = read(COUNTING, tmp_path)
    ((prompt, source, rows, fits),) = [(p["prompt"], p["source"], p["rows"], p["fits"]) for p in report.prompts]
    assert prompt.startswith("Count.\n\n{examples}\n")
    assert prompt.endswith("\n\nQuestion: {query}\nAnswer:")
    assert (source, rows, fits) == ("recovered", 24, 24)


def test_perturbed_rows_are_kept(tmp_path: Path) -> None:
    report, rows = read(COUNTING, tmp_path)
    assert (report.rows_kept, report.rows_refused) == (24, 0)
    lower = [r for r in rows if r["metadata"].get("perturbation") == "lowercase"]
    assert {(r["query"], r["response"], r["correct"]) for r in lower if r["correct"] is not None} == {
        (BEANS.lower(), " It is 7.", False),
        (NUTS.lower(), " 4", True),
        (EGGS.lower(), " 11", False),
    }


def test_perturbed_texts_that_differ_are_queries_of_their_own(tmp_path: Path) -> None:
    run = shutil.copytree(COUNTING, tmp_path / "run")
    state = json.loads((run / "scenario_state.json").read_text())
    for request in state["request_states"]:
        if "perturbation" in request["instance"]:
            text = request["instance"]["input"]["text"]
            request["instance"]["input"]["text"] = text + " please"
            request["request"]["prompt"] = request["request"]["prompt"].replace(text, text + " please")
    (run / "scenario_state.json").write_text(json.dumps(state))
    report, rows = read(run, tmp_path)
    assert (report.rows_kept, report.rows_refused, report.n_queries) == (24, 0, 6)
    verdicts = {(r["query"], r["correct"]) for r in rows if r["metadata"].get("perturbation") and r["replicate"] == 0}
    assert verdicts == {
        (BEANS.lower() + " please", False),
        (NUTS.lower() + " please", True),
        (EGGS.lower() + " please", False),
    }


def test_options_of_a_joint_choice_belong_to_the_query(tmp_path: Path) -> None:
    report, rows = read(JOINT, tmp_path)
    assert column(rows, "query", "response", "answer", "correct", "prompt") == [
        (SWIMS, "eel", "eel", True, LETTERS),
        (MILK, "eel", "cow", False, LETTERS),
    ]
    notes = [(p["prompt"], p["source"], p["rows"], p["fits"]) for p in report.prompts]
    assert notes == [(LETTERS, "recovered", 2, 2)]


def test_options_scored_one_by_one_make_one_row(tmp_path: Path) -> None:
    report, rows = read(SEPARATE, tmp_path)
    assert (report.rows_kept, report.rows_refused) == (2, 0)
    assert column(rows, "query", "response", "answer", "correct") == [
        (SWIMS, "eel", "eel", True),
        (MILK, "owl", "cow", False),
    ]


def test_the_prompt_of_options_scored_one_by_one(tmp_path: Path) -> None:
    report, _ = read(SEPARATE, tmp_path)
    assert [(p["rows"], p["fits"]) for p in report.prompts] == [(2, 2)]
    assert report.warnings == []


def test_a_folder_of_runs(tmp_path: Path) -> None:
    report, rows = read(RUNS, tmp_path)
    assert [(Path(f["file"]).parent.name, f["format"]) for f in report.files] == [
        (run.name, "helm") for run in (COUNTING, JOINT, SEPARATE)
    ]
    names = {run.name for run in (COUNTING, JOINT, SEPARATE)}
    assert {row["run_id"] for row in rows} == names | {f"{COUNTING.name}:lowercase"}
    assert report.n_queries == 5
    one, _ = read(JOINT / "scenario_state.json", tmp_path)
    assert one.rows_kept == 2


def test_a_run_without_scores_has_no_verdicts(tmp_path: Path) -> None:
    run = shutil.copytree(JOINT, tmp_path / "run:a=b,c")
    (run / "per_instance_stats.json").unlink()
    report, rows = read(run, tmp_path)
    assert column(rows, "correct", "score", "tokens_in") == [(None, None, None)] * 2
    assert report.warnings[0] == ("run:a=b,c: no per_instance_stats.json beside it, so there are no verdicts")
    (run / "run_spec.json").unlink()
    _, rows = read(run, tmp_path)
    assert {row["run_id"] for row in rows} == {"run:a=b,c"}


def test_another_score_can_be_the_verdict(tmp_path: Path) -> None:
    _, rows = read(COUNTING, tmp_path, scorer="exact_match@2")
    assert {r["correct"] for r in rows if r["replicate"] in (0, 2)} == {True}
    with pytest.raises(ConfigError, match=r"no score 'exact_math' \(did you mean 'exact_match'\?\)"):
        read(COUNTING, tmp_path, scorer="exact_math")


def test_requests_that_are_none_are_refused(tmp_path: Path) -> None:
    run = shutil.copytree(JOINT, tmp_path / "run")
    state = json.loads((run / "scenario_state.json").read_text())
    first = state["request_states"][0]
    state["request_states"] += [3, {}, {"instance": {"id": "x"}}, first]
    (run / "scenario_state.json").write_text(json.dumps(state))
    _report, rows = read(run, tmp_path)
    assert len(rows) == 2
    assert sorted(refused(tmp_path)) == [
        (3, "a request without `instance`"),
        (4, "a request without `instance`"),
        (5, "an instance without a text"),
        (6, "the same instance, trial and perturbation as an earlier request"),
    ]
    (run / "scenario_state.json").write_text('{"request_states": 3}')
    with pytest.raises(DataError, match="it has no list `request_states`"):
        read(run, tmp_path)


def helm_run(folder: Path, asked: list[str], lead: str | None) -> None:
    """Write a run of chats; with no `lead` nothing of what was asked is kept."""
    folder.mkdir(parents=True)
    states = []
    for i, text in enumerate(asked):
        messages = [{"role": "system", "content": lead}, {"role": "user", "content": f"Q: {text}"}]
        states.append(
            {
                "instance": {"id": f"id{i}", "input": {"text": text}, "references": []},
                "request": {"model": "m", "prompt": "", "messages": messages if lead else None},
                "result": {"success": True, "completions": [{"text": str(i)}]},
            }
        )
    (folder / "scenario_state.json").write_text(json.dumps({"adapter_spec": {}, "request_states": states}))


def test_the_template_of_a_chat_is_that_of_its_messages(tmp_path: Path) -> None:
    for name, lead in (("a", "Count."), ("b", "Think.")):
        helm_run(tmp_path / "runs" / name, [BEANS, NUTS], lead)
    report, rows = read(tmp_path / "runs", tmp_path)
    prompts = ["Count.\n\nQ: {query}", "Think.\n\nQ: {query}"]
    assert column(rows, "query", "prompt") == [(query, prompt) for prompt in prompts for query in (BEANS, NUTS)]
    assert [(p["prompt"], p["source"], p["rows"], p["fits"]) for p in report.prompts] == [
        (prompt, "recovered", 2, 2) for prompt in prompts
    ]


def test_runs_without_any_prompt_are_told_by_their_names(tmp_path: Path) -> None:
    for name in ("a", "b"):
        helm_run(tmp_path / "runs" / name, [BEANS, NUTS], None)
    report, rows = read(tmp_path / "runs", tmp_path)
    names = [f"unknown:scenario_state.json:{name}" for name in ("a", "b") for _ in range(2)]
    assert column(rows, "prompt_id", "prompt") == [(name, "") for name in names]
    assert (report.n_prompts, report.rows_refused) == (2, 0)
    told = [text for text in report.warnings if "give it one with --set prompt=TEXT" in text]
    assert len(told) == 2


@pytest.mark.real_data
def test_a_real_run(tmp_path: Path, real_data: Path) -> None:
    report, rows = read(real_data / "log_formats" / "helm" / "direct", tmp_path)
    assert (report.rows_kept, report.rows_refused, report.n_queries) == (25, 0, 25)
    assert column(rows, "correct").count(True) == 12
    notes = [(p["prompt"], p["source"], p["rows"], p["fits"]) for p in report.prompts]
    assert notes == [("Question: {query}\nThe answer is:", "recovered", 25, 25)]
    assert "final_number_exact_match" in report.warnings[0]
    assert {row["run_id"] for row in rows} == {"gsm_local:template=direct,model=local_scripted"}
