"""propose as a user types it: what is printed and written, what needs no engine, and what is refused in one line."""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import make_queries, run_oirl

from oirl import PromptSelector, ResponseRewardModel, load, read_log, write_log
from oirl.logs.queries import read_templates
from oirl.logs.text import template_id
from oirl.records import INTERACTION_SCHEMA
from oirl_cli import main
from oirl_data import small_lm_path
from oirl_data.problems import generate_problems
from oirl_data.prompts import PROMPTS as DEMO_PROMPTS

GOOD, FAIR, POOR = "{query} Well, at 0.95", "{query} Fairly, at 0.50", "{query} Poorly, at 0.05"
BAD = "{query} Badly, at 0.02"
TOY = '''
"""Engines of a user: one that is right as often as the prompt says, and one that proposes."""

import os
import re
import signal

from oirl.engines.base import Completion, Engine, EngineError

OPENED = []


class Toy(Engine):
    name = "toy"
    chat = False

    def __init__(self, model, dies_after=None, stopped_after=None, killed_after=None, note=None):
        self.model, self.dies_after, self.stopped_after, self.note = model, dies_after, stopped_after, note
        self.killed_after = killed_after
        self.asked, self.closed = [], False
        OPENED.append(self)

    def describe(self):
        return {"engine": self.name, "model": self.model, "chat": self.chat}

    def stream(self, requests, sampling):
        for position, request in enumerate(requests):
            if len(self.asked) == self.dies_after:
                raise EngineError("the server is gone")
            if len(self.asked) == self.stopped_after:
                raise KeyboardInterrupt
            if len(self.asked) == self.killed_after:
                os.kill(os.getpid(), signal.SIGKILL)
            self.asked.append(request.rendered)
            yield position, [Completion(self.reply(request), "stop", tokens_in=10, tokens_out=1)]

    def close(self):
        self.closed = True


class Target(Toy):
    def reply(self, request):
        rate = re.findall(r"at (\\d\\.\\d+)", request.rendered)
        right = rate and request.seed / 2**31 < float(rate[0])
        return request.rendered.partition("?")[0].split()[-1] if right else "nothing"


class Proposer(Toy):
    replies = PROPOSALS

    def reply(self, request):
        return self.replies[(len(self.asked) - 1) % len(self.replies)]


class Both(Target):
    """Proposes where it is asked to, responds elsewhere."""

    def reply(self, request):
        return "<prompt>GOOD</prompt>" if "improve the instructions" in request.rendered else super().reply(request)


class Careful(Proposer):
    replies = ["<prompt>{query} carefully at 0.9</prompt>", "<prompt>{query} rashly at 0.1</prompt>"]


class Steps(Proposer):
    replies = ["<prompt>{query} Work step by step.</prompt>"]


class Fickle(Proposer):
    """Answers otherwise each time that it is asked, as servers do."""

    def reply(self, request):
        return f"<prompt>{{query}} {os.urandom(8).hex()} at 0.{os.urandom(1)[0]:03}</prompt>"


class Silent(Proposer):
    replies = ["I cannot think of any."]


class Rude(Proposer):
    replies = ["<prompt>{query} \\x1b[31mred\\x07 at 0.9</prompt>"]
'''
PROPOSALS = [f"Think.\n<prompt>{GOOD}</prompt>", "No tag.\nNone.", f"<prompt>{BAD}</prompt>"]


def write_task(path: Path, prompts: dict[str, str], n: int = 80, *, answers: bool = True) -> None:
    """Write a log of prompts whose text says how good they are; the answer to a query is its last word."""
    rng = np.random.default_rng(3)
    rows = []
    for i, query in enumerate(make_queries(n)):
        answer = query.split()[-1].strip("?")
        for prompt_id, prompt in prompts.items():
            right = bool(rng.random() < float(prompt.split()[-1]))
            rows.append(
                {
                    **{"query_id": f"q{i}", "query": query, "prompt_id": prompt_id, "prompt": prompt, "replicate": 0},
                    **{"response": answer if right else f"no {i}", "correct": right},
                    **{"answer": answer if answers else None},
                }
            )
    write_log(pa.Table.from_pylist(rows, schema=INTERACTION_SCHEMA), path)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with logs, and the user's module of engines."""
    folder = tmp_path_factory.mktemp("propose")
    (folder / "toy_engines.py").write_text(
        TOY.replace("PROPOSALS", repr(PROPOSALS)).replace("GOOD", GOOD), encoding="utf-8"
    )
    write_task(folder / "log.parquet", {"fair": FAIR, "poor": POOR})
    write_task(folder / "silent.parquet", {"fair": FAIR, "poor": POOR}, answers=False)
    write_task(
        folder / "words.parquet", {"well": "{query} carefully slowly at 0.9", "ill": "{query} rashly soon at 0.1"}
    )
    return folder


@pytest.fixture
def toy(work: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(work))
    module = importlib.import_module("toy_engines")
    module.OPENED.clear()
    yield module
    sys.modules.pop("toy_engines", None)


Typed = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def oirl(
    work: Path, toy: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Typed]:
    """Return the command line, run in this process: `oirl propose LOG` with toy engines, if nothing else is said."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    before = signal.getsignal(signal.SIGPIPE)

    def run(
        *arguments: Any, log: str = "log.parquet", target: str | None = "Target", proposer: str | None = "Proposer"
    ) -> subprocess.CompletedProcess[str]:
        typed: list[str | Path] = ["propose", work / log]
        typed += ["--engine", f"toy_engines:{target}", "--model", "small"] if target else []
        typed += ["--proposer-engine", f"toy_engines:{proposer}", "--proposer-model", "large"] if proposer else []
        given = [str(a) for a in (*typed, *arguments)]
        if "--grade" not in given:
            given += ["--grade", "exact"]
        monkeypatch.setattr(sys, "argv", ["oirl", *given])
        with pytest.raises(SystemExit) as ended:
            main.run()
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(given, int(ended.value.code or 0), out, err)

    yield run
    signal.signal(signal.SIGPIPE, before)


SHORT = ("--n", "2", "--race", "30", "--confirm", "40")


def strict(text: str) -> Any:
    """Parse JSON that may hold no NaN and no Infinity."""

    def refuse(word: str) -> None:
        raise ValueError(word)

    return json.loads(text, parse_constant=refuse)


def error(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one line of a user's error."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("oirl: ")
    return line


def file_rows(path: Path) -> list[dict[str, Any]]:
    return [strict(line) for line in path.read_text(encoding="utf-8").splitlines()]


# From the log to the file -----------------------------------------------------------------------------------


def check_printed(done: subprocess.CompletedProcess[str], out: Path) -> None:
    assert done.returncode == 0, done.stderr
    name, runs = template_id(GOOD), out.with_name("prompts.race.parquet")
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    assert lines[0] == f"{out}: 2 candidates"
    assert re.fullmatch(r"to beat: fair, right in \d\d\.\d% of 80 logged runs: \{query\} Fairly, at 0\.50", lines[1])
    (won,) = [line for line in lines if line.startswith(name)]
    assert re.search(r" 30 +\d\d\.\d% +\[\d\d\.\d%, \d+\.\d%\] +– +won, confirmed +\{query\} Well, at 0\.95", won)
    (beaten,) = [line for line in lines if line.startswith(template_id(BAD))]
    assert re.search(r" 20 +\d\.\d% .* out after 20 ", beaten)
    assert [line for line in lines if line.startswith("fair ") and " to beat " in line]
    claim = rf"on 40 other queries {name} gains \+\d\d\.\d points over fair \[\+\d+\.\d, \+\d\d\.\d\]"
    assert re.fullmatch(claim, lines[-2])
    assert lines[-1] == f"all runs: {runs}"
    assert sorted(os.listdir(out.parent)) == ["prompts.jsonl", "prompts.race.parquet"]
    assert read_templates(out)[0] == (name, GOOD)
    assert len(read_log(runs)) == 30 * 2 + 20 + 40 * 2


def test_in_a_process_of_its_own(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "prompts.jsonl"
    done = run_oirl(
        *("propose", work / "log.parquet", "--engine", "toy_engines:Target", "--model", "small", "--out", out),
        *("--proposer-engine", "toy_engines:Proposer", "--proposer-model", "large", "--grade", "exact", *SHORT),
        cwd=work,
    )
    check_printed(done, out)
    assert done.stderr == ""


def test_as_text(oirl: Typed, tmp_path: Path) -> None:
    out = tmp_path / "new" / "prompts.jsonl"
    check_printed(oirl("--out", out, *SHORT), out)


def test_as_json(oirl: Typed, tmp_path: Path, toy: ModuleType) -> None:
    out = tmp_path / "prompts.jsonl"
    done = oirl("--out", out, *SHORT, "--json")
    assert done.returncode == 0
    document = strict(done.stdout)
    assert set(document) == {"out", "best_prompt", "candidates", "left_out", "race", "warnings"}
    assert document["out"] == str(out)
    assert (document["best_prompt"]["prompt_id"], document["best_prompt"]["n"]) == ("fair", 80)
    assert [c["prompt"] for c in document["candidates"]] == [GOOD, BAD]
    race = document["race"]
    assert (race["winner"], race["incumbent"]) == (template_id(GOOD), "fair")
    assert (race["n_confirm"], race["stopped"]) == (40, None)
    first = file_rows(out)[0]
    assert first["confirmed"] == {k: race[k] for k in ("gain", "ci_low", "ci_high")} | {"over": "fair", "n": 40}
    assert document["warnings"] == []
    assert [engine.model for engine in toy.OPENED] == ["small", "large"]
    assert all(engine.closed for engine in toy.OPENED)
    # Runs of the race are a log as any other.
    runs = read_log(race["log"])
    assert set(runs["model"].to_pylist()) == {"small"}
    assert len(runs) == len(toy.OPENED[0].asked)


def test_equal_commands_give_equal_files(oirl: Typed, tmp_path: Path) -> None:
    outs = [tmp_path / name / "prompts.jsonl" for name in "abc"]
    for out, seed in zip(outs, ("0", "0", "7"), strict=True):
        assert oirl("--out", out, *SHORT, "--seed", seed).returncode == 0
    assert file_rows(outs[0]) == file_rows(outs[1])
    assert file_rows(outs[0]) != file_rows(outs[2])
    asked = [set(read_log(out.with_name("prompts.race.parquet"))["query_id"].to_pylist()) for out in outs]
    assert asked[0] == asked[1] != asked[2]


def test_what_was_left_out_is_noted(oirl: Typed, tmp_path: Path) -> None:
    done = oirl("--out", tmp_path / "p.jsonl", "--n", "3", "--race", "0")
    assert done.returncode == 0
    assert "2 candidates" in done.stdout
    assert re.search(r"left out \d+: it is known already", done.stderr)


def test_commands_to_the_terminal_are_not_passed_on(oirl: Typed, tmp_path: Path) -> None:
    out = tmp_path / "p.jsonl"
    done = oirl("--out", out, "--n", "1", "--race", "20", "--confirm", "20", proposer="Rude")
    assert done.returncode == 0, done.stderr
    assert "red" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    assert "\x07" not in done.stdout + done.stderr
    assert "{query} \x1b[31mred\x07 at 0.9" in [text for _, text in read_templates(out)]


def test_the_file_is_one_that_select_reads(work: Path, oirl: Typed, tmp_path: Path) -> None:
    out, model = tmp_path / "prompts.jsonl", tmp_path / "model"
    assert oirl("--out", out, *SHORT).returncode == 0
    PromptSelector().fit(read_log(work / "log.parquet")).save(model)
    done = run_oirl("select", model, "What is it?", "--prompts", out, "--json", "--explain")
    assert done.returncode == 0, done.stderr
    (row,) = strict(done.stdout)
    assert row["prompt"] in (GOOD, BAD, FAIR)
    assert all(name in done.stdout for name in ("fair", template_id(GOOD), template_id(BAD)))


def test_warnings_are_printed(oirl: Typed, tmp_path: Path) -> None:
    done = oirl("--out", tmp_path / "p.jsonl", *SHORT, "--n", "2", "--confirm", "0")
    assert done.returncode == 0
    assert "warning: the winner was not confirmed" in done.stderr
    assert "gains" not in done.stdout
    assert " leads " in done.stdout
    assert " won" not in done.stdout


# Which engines are opened -----------------------------------------------------------------------------------


@pytest.mark.parametrize("json_", [True, False])
def test_to_propose_only_no_second_engine_is_needed(oirl: Typed, tmp_path: Path, toy: ModuleType, json_: bool) -> None:
    out = tmp_path / "p.jsonl"
    done = oirl("--out", out, "--n", "2", "--race", "0", *["--json"] * json_, target="NotThere")
    assert done.returncode == 0, done.stderr
    assert [engine.model for engine in toy.OPENED] == ["large"]
    assert [row["prompt"] for row in file_rows(out)] == [GOOD, BAD, FAIR]
    assert os.listdir(tmp_path) == ["p.jsonl"]
    if json_:
        assert strict(done.stdout)["race"] is None
    else:
        assert "predicted (extrapolation)" in done.stdout
        assert "won" not in done.stdout
        assert "warning: no candidate was raced or estimated: there is no evidence for any of them\n" in done.stderr


@pytest.mark.parametrize("race", ["0", "20"])
def test_one_engine_may_do_both(oirl: Typed, tmp_path: Path, toy: ModuleType, race: str) -> None:
    out = tmp_path / "p.jsonl"
    done = oirl("--out", out, "--n", "1", "--race", race, "--confirm", "20", target="Both", proposer=None)
    assert done.returncode == 0, done.stderr
    (engine,) = toy.OPENED
    assert engine.closed
    assert file_rows(out)[0]["prompt"] == GOOD
    asked = [text for text in engine.asked if "improve the instructions" in text]
    assert len(asked) == 1
    assert (len(engine.asked) > 1) == (race != "0")


def test_the_proposer_may_be_another_model_of_the_same_engine(oirl: Typed, tmp_path: Path, toy: ModuleType) -> None:
    arguments = ("--n", "1", "--race", "20", "--confirm", "0", "--proposer-model", "large")
    assert oirl("--out", tmp_path / "p.jsonl", *arguments, target="Both", proposer=None).returncode == 0
    assert [(type(e).__name__, e.model) for e in toy.OPENED] == [("Both", "small"), ("Both", "large")]
    assert len(toy.OPENED[1].asked) == 1


def test_each_engine_gets_its_own_parameters(oirl: Typed, tmp_path: Path, toy: ModuleType) -> None:
    arguments = ("--race", "20", "--confirm", "0", "--set", "note=a", "--proposer-set", "note=[1, 2]")
    assert oirl("--out", tmp_path / "p.jsonl", "--n", "1", *arguments).returncode == 0
    assert [engine.note for engine in toy.OPENED] == ["a", [1, 2]]


# The reward model -------------------------------------------------------------------------------------------


def test_a_model_by_fit_says_which_are_raced(work: Path, oirl: Typed, tmp_path: Path, toy: ModuleType) -> None:
    model, out = tmp_path / "model", tmp_path / "p.jsonl"
    fitted = run_oirl("fit", work / "words.parquet", "--out", model, "--model", "logistic")
    assert fitted.returncode == 0, fitted.stderr
    settings = ("--n", "2", "--keep", "1", "--reward-model", model, "--race", "20", "--confirm", "20")
    done = oirl("--out", out, *settings, "--json", log="words.parquet", proposer="Careful")
    assert done.returncode == 0, done.stderr
    document = strict(done.stdout)
    careful, rash = "{query} carefully at 0.9", "{query} rashly at 0.1"
    queries = list(dict.fromkeys(read_log(work / "words.parquet")["query"].to_pylist()))
    means = load(model).model_.predict_proba(queries, [careful, rash]).mean(axis=0)
    assert means[0] > means[1] + 0.2
    assert [(c["prompt"], c["predicted"], c["raced"]) for c in document["candidates"]] == [
        (careful, pytest.approx(means[0]), True),
        (rash, pytest.approx(means[1]), False),
    ]
    assert any("extrapolation" in warning for warning in document["warnings"])
    assert not any("rashly" in text for text in toy.OPENED[0].asked)
    assert {r["prompt"] for r in document["race"]["racers"]} == {careful, "{query} carefully slowly at 0.9"}
    by_name = {row["prompt"]: row for row in file_rows(out)}
    assert (by_name[rash]["extrapolation"], by_name[rash]["predicted"]) == (True, pytest.approx(means[1]))
    text = oirl("--out", out, *settings[:6], "--race", "0", log="words.parquet", proposer="Careful")
    assert re.search(rf"{template_id(careful)} +{100 * means[0]:.1f}% ", text.stdout)


def test_another_folder_is_no_reward_model_of_prompts(work: Path, oirl: Typed, tmp_path: Path, toy: ModuleType) -> None:
    responses = tmp_path / "responses"
    ResponseRewardModel().fit(read_log(work / "log.parquet")).save(responses)
    done = oirl("--out", tmp_path / "p.jsonl", "--reward-model", responses)
    assert f"{responses} is no reward model of prompts; fit one with `oirl fit LOG" in error(done)
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "not there", work / "log.parquet", small_lm_path()):
        error(oirl("--out", tmp_path / "p.jsonl", "--reward-model", folder))
    assert toy.OPENED == []  # before a model is loaded
    assert not (tmp_path / "p.jsonl").exists()


# What is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--out", "p.txt"), "p.txt: prompts are written with their evidence to a .jsonl file"),
        (("--out", "prompts"), "to a .jsonl file"),
        (("--out", "p.jsonl.parquet"), "to a .jsonl file"),
        (("--n", "0"), "--n must be 1 or more"),
        (("--race", "-1"), "--race and --confirm 0 or more"),
        (("--confirm", "-1"), "--race and --confirm 0 or more"),
        (("--keep", "0"), "keep = 0"),
        (("--max-tokens", "0"), "max_tokens = 0"),
        (("--temperature", "-0.5"), "temperature = -0.5"),
        (("--budget", "a lot"), "budget 'a lot'"),
        (("--budget", "2.50money"), "--prices"),
        (("--prices", "nothing.yaml"), "nothing.yaml"),
        (("--grade", "taste"), "taste"),
        (("--seed", "-1"), "seed"),
        (("--n", "many"), "'--n'"),
        (("--set", "novalue"), "NAME=VALUE"),
        (("--proposer-set", "volume=11"), "volume"),
        (("--engine", "nowhere"), "nowhere"),
        (("--proposer-engine", "toy_engines:NotThere"), "NotThere"),
        (("--proposer-engine", "toy_engines:re"), "toy_engines:re"),
    ],
)
def test_wrong_endings_numbers_and_names(
    oirl: Typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = oirl("--out", "p.jsonl", *arguments)
    assert said in error(done)
    assert not list(tmp_path.glob("p*"))


def test_endings_may_be_in_capitals(oirl: Typed, tmp_path: Path) -> None:
    assert oirl("--out", tmp_path / "P.JSONL", "--n", "1", "--race", "0").returncode == 0
    assert read_templates(tmp_path / "P.JSONL")


@pytest.mark.parametrize(
    "text", ['{"prompt": "mine"}\n', "no JSON", "[1, 2]\n", '{"source": "proposed"}\n{"source": "me"}\n']
)
def test_a_file_of_somebody_else_is_not_lost(oirl: Typed, tmp_path: Path, toy: ModuleType, text: str) -> None:
    out = tmp_path / "p.jsonl"
    out.write_text(text)
    assert f"{out} is there and holds no proposed prompts" in error(oirl("--out", out, *SHORT))
    assert out.read_text() == text
    assert toy.OPENED == []
    assert oirl("--out", tmp_path / "own.jsonl", "--n", "1", "--race", "0").returncode == 0
    assert oirl("--out", tmp_path / "own.jsonl", "--n", "2", "--race", "0").returncode == 0  # its own is replaced
    assert len(file_rows(tmp_path / "own.jsonl")) == 3


def test_a_log_that_is_not_there(oirl: Typed, tmp_path: Path, toy: ModuleType) -> None:
    assert "nothing.parquet" in error(oirl("--out", tmp_path / "p.jsonl", log="nothing.parquet"))
    assert toy.OPENED == []


def test_a_log_without_answers_cannot_be_raced(oirl: Typed, tmp_path: Path) -> None:
    done = oirl("--out", tmp_path / "p.jsonl", *SHORT, log="silent.parquet")
    assert "queries with an `answer`" in error(done)
    assert os.listdir(tmp_path) == []
    done = oirl("--out", tmp_path / "p.jsonl", "--n", "1", "--race", "0", log="silent.parquet")
    assert done.returncode == 0, done.stderr


def test_a_proposer_that_gives_nothing(oirl: Typed, tmp_path: Path, toy: ModuleType) -> None:
    done = oirl("--out", tmp_path / "p.jsonl", *SHORT, proposer="Silent")
    assert "the proposer gave no prompt that can be used: no <prompt> in any reply" in error(done)
    assert os.listdir(tmp_path) == []
    assert all(engine.closed for engine in toy.OPENED)
    assert len(toy.OPENED[1].asked) == 2 * 4


def test_a_proposer_that_breaks(oirl: Typed, tmp_path: Path) -> None:
    done = oirl("--out", tmp_path / "p.jsonl", *SHORT, "--proposer-set", "dies_after=1")
    assert "the server is gone" in error(done)
    assert os.listdir(tmp_path) == []


# Stopped, and gone on with ----------------------------------------------------------------------------------


def test_a_budget_stops_the_race_and_a_larger_one_goes_on(oirl: Typed, tmp_path: Path) -> None:
    out, runs = tmp_path / "p.jsonl", tmp_path / "p.race.parquet"
    settings = ("--out", out, *SHORT, "--max-tokens", "1")
    done = oirl(*settings, "--budget", "500tokens")
    assert done.returncode == 0
    assert "warning: the race is not finished, as the budget is spent" in done.stderr
    assert "gains" not in done.stdout
    spent = sum(row["tokens_in"] + row["tokens_out"] for row in read_log(runs).to_pylist())
    assert 200 < spent <= 500
    assert not any("confirmed" in row for row in file_rows(out))
    done = oirl(*settings, "--budget", "1Mtokens", "--json")
    assert strict(done.stdout)["race"]["stopped"] is None
    assert len(read_log(runs)) == 30 * 2 + 20 + 40 * 2
    whole = tmp_path / "whole" / "p.jsonl"
    assert oirl("--out", whole, *settings[2:]).returncode == 0
    assert file_rows(whole) == file_rows(out)


def test_a_budget_in_money_needs_prices(oirl: Typed, tmp_path: Path) -> None:
    (tmp_path / "prices.yaml").write_text("small: {input: 1000, output: 1000}\n")
    priceless = tmp_path / "others.yaml"
    priceless.write_text("other: {input: 1000, output: 1000}\n")
    settings = ("--out", tmp_path / "p.jsonl", *SHORT, "--max-tokens", "1", "--prices", tmp_path / "prices.yaml")
    assert "'small'" in error(oirl(*settings[:-1], priceless, "--budget", "0.5money"))
    done = oirl(*settings, "--budget", "0.5money", "--json")
    assert strict(done.stdout)["race"]["stopped"] == "the budget is spent"
    assert sum(read_log(tmp_path / "p.race.parquet")["cost"].to_pylist()) <= 0.5


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [("dies_after=70", 2, "oirl: the server is gone"), ("stopped_after=70", 130, "oirl: stopped")],
)
def test_a_race_that_was_cut_off_goes_on(
    oirl: Typed, tmp_path: Path, toy: ModuleType, how: str, code: int, said: str
) -> None:
    out, whole = tmp_path / "p.jsonl", tmp_path / "whole" / "p.jsonl"
    done = oirl("--out", out, *SHORT, "--set", how)
    assert done.returncode == code
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(said)
    assert not out.exists()
    assert (tmp_path / "p.race.parquet.journal").exists()
    assert all(engine.closed for engine in toy.OPENED)
    toy.OPENED.clear()
    assert oirl("--out", out, *SHORT).returncode == 0
    assert len(toy.OPENED[0].asked) == 30 * 2 + 20 + 40 * 2 - 70
    assert not (tmp_path / "p.race.parquet.journal").exists()
    assert oirl("--out", whole, *SHORT).returncode == 0
    assert file_rows(whole) == file_rows(out)


def candidates(path: Path) -> list[str]:
    return [row["prompt"] for row in file_rows(path) if row["source"] == "proposed"]


def test_a_race_goes_on_with_the_prompts_that_were_proposed(work: Path, tmp_path: Path) -> None:
    """A proposer that is asked again may answer otherwise; then what has run would be lost."""
    command = ["propose", work / "log.parquet", "--engine", "toy_engines:Target", "--model", "small", *SHORT]
    command += ["--proposer-engine", "toy_engines:Fickle", "--proposer-model", "large", "--grade", "exact"]
    command += ["--out", tmp_path / "p.jsonl"]
    killed = run_oirl(*command, "--set", "killed_after=10", cwd=work)
    assert killed.returncode == -signal.SIGKILL
    journal = tmp_path / "p.race.parquet.journal"
    ran = [json.loads(line)["prompt"] for line in journal.read_text().splitlines()[1:]]
    assert len(ran) == 10
    died = run_oirl(*command, "--set", "dies_after=10", "--proposer-set", "dies_after=0", cwd=work)
    assert "the server is gone" in died.stderr
    done = run_oirl(*command, "--proposer-set", "dies_after=0", cwd=work)
    assert done.returncode == 0, done.stderr
    proposed = candidates(tmp_path / "p.jsonl")
    assert len(proposed) == 2
    assert {r["prompt"] for r in read_log(tmp_path / "p.race.parquet").to_pylist()} == {*proposed, FAIR}
    assert set(ran) <= {*proposed, FAIR}
    assert sorted(os.listdir(tmp_path)) == ["p.jsonl", "p.race.parquet"]


def test_a_larger_budget_goes_on_with_the_prompts_that_were_proposed(
    oirl: Typed, tmp_path: Path, toy: ModuleType
) -> None:
    out, settings = tmp_path / "p.jsonl", ("--max-tokens", "1", *SHORT)
    assert oirl("--out", out, *settings, "--budget", "500tokens", proposer="Fickle").returncode == 0
    before = candidates(out)
    toy.OPENED.clear()
    assert oirl("--out", out, *settings, proposer="Fickle").returncode == 0
    assert sorted(candidates(out)) == sorted(before)
    assert toy.OPENED[1].asked == []
    assert oirl("--out", out, *settings, proposer="Fickle").returncode == 0  # that race is over: this is another
    assert not set(candidates(out)) & set(before)


@pytest.mark.parametrize("other", [("--n", "3"), ("--proposer-model", "larger")])
def test_who_asks_for_something_else_gets_something_else(
    oirl: Typed, tmp_path: Path, toy: ModuleType, other: tuple[str, str]
) -> None:
    out = tmp_path / "p.jsonl"
    assert oirl("--out", out, *SHORT, "--set", "dies_after=30", proposer="Fickle").returncode == 2
    toy.OPENED.clear()
    assert oirl("--out", out, *SHORT, *other, proposer="Fickle").returncode == 0
    assert len(toy.OPENED[1].asked) >= 2


def test_a_budget_for_nothing_is_said_before_the_proposer_is_paid(oirl: Typed, tmp_path: Path, toy: ModuleType) -> None:
    done = oirl("--out", tmp_path / "p.jsonl", *SHORT, "--budget", "100tokens")
    assert error(done) == "oirl: the budget does not allow for a single request; raise it, or lower max_tokens"
    assert [engine.asked for engine in toy.OPENED] == [[], []]
    assert os.listdir(tmp_path) == []


def test_answers_that_are_none_are_not_overwritten(oirl: Typed, tmp_path: Path) -> None:
    kept = tmp_path / "p.race.parquet.proposals"
    for text in ("mine", "[1]", '{"asked": 1}'):
        kept.write_text(text)
        assert f"{kept}: not the answers of a proposer; move the file away" in error(
            oirl("--out", tmp_path / "p.jsonl", *SHORT)
        )
        assert kept.read_text() == text


# The small language model -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def problems(work: Path) -> str:
    """Write a log of problems under two prompts under which the small model guesses."""
    made = generate_problems(60, random.Random(8), held_out=True, distinct_masked=True)
    rows = [
        {
            **{"query_id": f"p{i}", "query": p.query, "prompt_id": name, "prompt": DEMO_PROMPTS[name], "replicate": 0},
            **{"response": "It is 0.", "correct": i % 10 < share, "answer": str(p.answer)},
        }
        for i, p in enumerate(made)
        for name, share in (("answer", 4), ("plain", 3))
    ]
    write_log(pa.Table.from_pylist(rows, schema=INTERACTION_SCHEMA), work / "problems.parquet")
    return "problems.parquet"


REAL = ("--engine", "transformers", "--model", str(small_lm_path()), "--set", "batch_size=32", "--max-tokens", "60")


def test_the_small_model_is_given_a_better_prompt(oirl: Typed, tmp_path: Path, problems: str) -> None:
    out = tmp_path / "p.jsonl"
    settings = ("--n", "1", "--race", "20", "--confirm", "40", "--grade", "numeric", "--temperature", "0.7")
    done = oirl("--out", out, *REAL, *settings, "--json", log=problems, target=None, proposer="Steps")
    assert done.returncode == 0, done.stderr
    document = strict(done.stdout)
    steps = DEMO_PROMPTS["steps"]
    assert document["race"]["winner"] == template_id(steps)
    assert document["race"]["ci_low"] > 0
    assert read_templates(out) == [(template_id(steps), steps), ("answer", DEMO_PROMPTS["answer"])]
    rows = read_log(document["race"]["log"]).to_pylist()
    assert len(rows) == sum(r["n"] for r in document["race"]["racers"]) + 2 * document["race"]["n_confirm"] > 100
    assert {json.loads(row["sampling"])["temperature"] for row in rows} == {0.7}
    assert all(row["tokens_out"] <= 60 for row in rows)


def test_the_small_model_itself_cannot_propose(oirl: Typed, tmp_path: Path, problems: str) -> None:
    done = oirl("--out", tmp_path / "p.jsonl", *REAL, log=problems, target=None, proposer=None)
    assert (done.returncode, done.stdout) == (2, "")
    *_, last = done.stderr.splitlines()  # what transformers has to say stands before it
    assert re.match(r"oirl: the proposer '.*small_lm' does not answer: ", last)
    assert os.listdir(tmp_path) == []
