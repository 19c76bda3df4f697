"""`oirl generate` as a user types it: what it prints, what it refuses, and that its options reach the engine."""

from __future__ import annotations

import json
import re
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.compute as pc
import pytest
from conftest import run_oirl
from typer.main import get_command

from oirl import read_log
from oirl.errors import OirlError
from oirl.logs.store import log_metadata
from oirl_cli.main import app

ENGINE = '''
"""An engine for tests: right under the prompt that says so, and whatever --set asks for besides."""
import json, re, time
from pathlib import Path
from oirl.engines.base import Completion, Engine, EngineError, failed

class Toy(Engine):
    name = "toy"

    def __init__(self, model, chat=False, dies_after=None, fails=None, file=None, hurries=False, length=1):
        self.model, self.chat, self.dies_after, self.fails, self.file = model, chat, dies_after, fails, file
        self.length, self.made, self.notes = length, 0, {"closed": False}
        if length < 1:
            raise TypeError("length is too small")
        if hurries:  # an hour passes between any two looks at the clock
            clock = iter(range(0, 10**9, 3600))
            time.monotonic = lambda: next(clock)

    def describe(self):
        return {"engine": self.name, "engine_version": "1", "model": self.model, "chat": self.chat}

    def stream(self, requests, sampling):
        for position, request in enumerate(requests):
            if self.made == self.dies_after:
                raise EngineError("the server\\nis gone")
            self.made += 1
            self.notes["rendered"] = request.rendered
            a, b = re.findall(r"(\\d+) and (\\d+)", str(request.rendered))[0]
            right = int(a) + int(b)
            said = right if "well" in str(request.rendered) else right + 1
            if self.fails and self.fails in str(request.rendered):
                yield position, failed("it is \\x1b[31mbusy")
            else:
                yield position, [Completion(f"It is {said}." + " So." * self.length, "stop", tokens_in=8, tokens_out=5)]

    def close(self):
        self.notes["closed"] = True
        if self.file:
            Path(self.file).write_text(json.dumps(self.notes))

class NotAnEngine:
    def __init__(self, model):
        pass
'''
QUERIES = [{"query_id": f"q{i}", "query": f"Add {i} and {i + 2}!", "answer": 2 * i + 2} for i in range(4)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "toy_engine.py").write_text(ENGINE)
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUERIES))
    (tmp_path / "prompts.yaml").write_text("well: '{query} Do it well.'\nbadly: '{query} Do it badly.'\n")
    (tmp_path / "prices.yaml").write_text("toy-1: {input: 1, output: 10}\ndefault: {input: 2, output: 20}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


USUAL = {
    **{"--engine": "toy_engine:Toy", "--model": "toy-1", "--queries": "queries.jsonl", "--prompts": "prompts.yaml"},
    **{"--out": "log.parquet", "--grade": "numeric"},
}


def arguments(*more: str, **changed: str | None) -> list[str]:
    """Return the usual options, some of them changed, or left out where they are None."""
    options = USUAL | {f"--{name}": value for name, value in changed.items()}
    return [
        "generate",
        *(text for name, value in options.items() if value is not None for text in (name, value)),
        *more,
    ]


class Said(NamedTuple):
    stdout: str
    stderr: str


def done(*more: str, **changed: str | None) -> Said:
    """Run the command in this process, which is quicker than in one of its own."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        assert not get_command(app).main(arguments(*more, **changed), standalone_mode=False)
    return Said(out.getvalue(), err.getvalue())


def refused(*more: str, **changed: str | None) -> str:
    """Return why the command is refused; `oirl_cli.main.run` makes one line and exit 2 of any `OirlError`."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(OirlError) as error:
        get_command(app).main(arguments(*more, **changed), standalone_mode=False)
    assert out.getvalue() + err.getvalue() == ""
    assert "\n" not in str(error.value)
    return str(error.value)


def generate(folder: Path, *more: str, **changed: str | None) -> subprocess.CompletedProcess[str]:
    return run_oirl(*arguments(*more, **changed), cwd=folder)


def line_of(found: subprocess.CompletedProcess[str]) -> str:
    """Return the one line of a user's error."""
    assert found.returncode == 2, found.stderr
    assert found.stdout == ""
    (line,) = found.stderr.splitlines()
    assert line.startswith("oirl: ")
    return line


def rows(folder: Path, name: str = "log.parquet") -> list[dict[str, Any]]:
    found = read_log(folder / name).to_pylist()
    assert isinstance(found, list)
    return found


# What is printed --------------------------------------------------------------------------------------------


def test_the_text(folder: Path) -> None:
    found = done()
    assert found.stdout == "log.parquet: 8 of 8 runs\n  right: 50.0% of 8 graded\n  tokens: 64 in, 40 out\n"
    assert found.stderr == ""
    assert [(r["query_id"], r["prompt_id"]) for r in rows(folder)] == [
        (f"q{i}", name) for i in range(4) for name in ("well", "badly")
    ]
    assert [r["correct"] for r in rows(folder)] == [True, False] * 4
    assert not (folder / "log.parquet.journal").exists()


def test_the_document(folder: Path) -> None:
    found = done("--json", "--prices", "prices.yaml")
    assert found.stderr == ""
    document = json.loads(found.stdout)
    assert document.keys() == {"out", "run_id", "progress", "stopped", "errors", "warnings"}
    assert (document["out"], document["stopped"], document["errors"], document["warnings"]) == (
        *("log.parquet", None, {}),
        [],
    )
    assert {row["run_id"] for row in rows(folder)} == {document["run_id"]}
    progress = document["progress"]
    assert progress.pop("seconds") >= 0
    assert progress == {
        **{"total": 8, "done": 8, "failed": 0, "graded": 8, "right": 4, "tokens_in": 64, "tokens_out": 40},
        **{"money": pytest.approx((64 * 1 + 40 * 10) / 1e6), "new_tokens_out": 40, "new": 8},
    }


def test_prices_by_model_or_default(folder: Path) -> None:
    assert "tokens: 64 in, 40 out, cost 0.000464\n" in done("--prices", "prices.yaml").stdout
    assert rows(folder)[0]["cost"] == pytest.approx(58e-6)
    done("--prices", "prices.yaml", model="other", out="b.parquet")
    assert rows(folder, "b.parquet")[0]["cost"] == pytest.approx(116e-6)


def test_failures_and_warnings_go_to_stderr(folder: Path) -> None:
    found = done("--set", "fails=badly", "--json", grade=None)
    document = json.loads(found.stdout)
    assert document["progress"]["failed"] == 4
    assert list(document["errors"].values()) == [4]
    assert len(document["warnings"]) == 2
    found = done("--set", "fails=badly", grade=None)
    assert found.stdout == "log.parquet: 8 of 8 runs\n  tokens: 32 in, 20 out\n"
    lines = found.stderr.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("  failed 4: it is ")
    assert "\x1b" not in found.stderr  # what a server says must not command the terminal
    assert lines[1].startswith("warning: 4 runs failed and stand in the log without a response")
    assert lines[2] == "warning: the queries have answers, but nothing was graded: name a checker (--grade)"


def test_progress_goes_to_stderr(folder: Path) -> None:
    found = generate(folder, "--set", "hurries=true", "--set", "fails=3 and 5", "--json", "--prices", "prices.yaml")
    assert found.returncode == 0
    assert json.loads(found.stdout)["progress"]["done"] == 8
    lines = found.stderr.splitlines()
    assert len(lines) == 8
    assert lines[0].startswith("1 of 8 runs, ")
    assert lines[-1].startswith("8 of 8 runs, ")
    for part in ("tokens/s", "right 50.0%", "failed 2", "cost 0.0003", "0 s left"):
        assert part in lines[-1]
    assert "min left" in lines[0]


def test_a_budget_stops(folder: Path) -> None:
    found = done("--budget", "100tokens", "--max-tokens", "10")
    assert re.match(r"log\.parquet: [1-7] of 8 runs, as the budget is spent\n", found.stdout)
    assert found.stderr == ""
    assert 50 < sum(row["tokens_in"] + row["tokens_out"] for row in rows(folder)) <= 100
    found = done("--budget", "1ktokens", "--max-tokens", "10")
    assert found.stdout.startswith("log.parquet: 8 of 8 runs\n")
    document = json.loads(
        done(
            *("--budget", "0.0004money", "--prices", "prices.yaml", "--max-tokens", "10", "--json"),
            out="b.parquet",
        ).stdout
    )
    assert document["stopped"] == "the budget is spent"
    assert 0.0001 < document["progress"]["money"] <= 0.0004


# What the options do ----------------------------------------------------------------------------------------


def test_options_reach_the_engine(folder: Path) -> None:
    options = ["--max-tokens", "40", "--temperature", "0.5", "--top-p", "0.9", "--top-k", "7", "--seed", "3"]
    done(*options, "--stop", "A:", "--stop", "\n\n", "--replicates", "2", "--set", "length=3")
    found = rows(folder)
    assert len(found) == 16
    assert json.loads(found[0]["sampling"]) == {
        **{"max_tokens": 40, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "stop": ["A:", "\n\n"], "seed": 3},
        **{"engine": "toy", "engine_version": "1", "model": "toy-1", "chat": False},
    }
    assert found[0]["response"] == "It is 2. So. So. So."
    assert found[0]["model"] == "toy-1"


def test_the_engine_is_closed(folder: Path) -> None:
    done("--set", "file=notes", "--set", "chat=true")
    notes = json.loads((folder / "notes").read_text())
    assert notes["closed"]
    (turn,) = notes["rendered"]
    assert turn["role"] == "user"
    assert re.fullmatch(r"Add \d and \d! Do it (well|badly)\.", turn["content"])
    assert "temperature was 1.0, is 0.0" in refused("--set", "file=other", "--set", "chat=true", "--temperature", "0")
    assert json.loads((folder / "other").read_text())["closed"]


@pytest.mark.parametrize("design", ["random", "balanced", "adaptive"])
def test_designs(folder: Path, design: str) -> None:
    done("--design", design, "--replicates", "3")
    found = rows(folder)
    assert len(found) == 12
    assert all(0.1 <= row["propensity"] <= 0.9 for row in found)
    assert json.loads(log_metadata(folder / "log.parquet")["run"])["design"] == design


def test_adaptive_is_a_design(folder: Path) -> None:
    done("--adaptive", "--replicates", "3")
    assert pc.sum(pc.is_null(read_log(folder / "log.parquet")["propensity"])).as_py() == 0
    again = json.loads(done("--design", "adaptive", "--replicates", "3", "--json").stdout)
    assert again["progress"]["new"] == 0
    assert "--adaptive is a design of its own; leave out --design full" in refused("--adaptive", "--design", "full")
    assert "adaptive design needs verdicts" in refused("--adaptive", grade=None, out="b.parquet")


def test_files_of_other_forms(folder: Path) -> None:
    (folder / "queries.csv").write_text("query,answer,dataset,split\nAdd 1 and 2!,3,sums,test\n")
    (folder / "prompts.txt").write_text("{query} Do it well.\nDo it badly.\n")
    done(queries="queries.csv", prompts="prompts.txt")
    found = rows(folder)
    assert [(r["prompt"], r["dataset"], r["split"], r["correct"]) for r in found] == [
        ("{query} Do it well.", "sums", "test", True),
        ("Do it badly.", "sums", "test", False),
    ]
    (folder / "plain.txt").write_text("Add 1 and 2!\nAdd 3 and 4!\n")
    done(queries="plain.txt", out="b.parquet")
    assert {row["correct"] for row in rows(folder, "b.parquet")} == {None}


def test_metadata_of_a_csv_file_may_be_any_text(folder: Path) -> None:
    (folder / "queries.csv").write_text("query,answer,metadata\nAdd 1 and 2!,3,easy\n")
    assert "2 of 2 runs" in done(queries="queries.csv").stdout


# What is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["100", "5 dollars", "_tokens", ""])
def test_budgets_of_another_form(folder: Path, budget: str) -> None:
    """An empty one is what `--budget "$LIMIT"` gives where LIMIT is not set: not a leave to spend without limit."""
    assert f"budget {budget!r}; allowed: a number and `tokens` or `money`" in refused("--budget", budget)
    assert not (folder / "log.parquet").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--engine", "tranformers"], "unknown engine 'tranformers' (did you mean 'transformers'?)"),
        (["--engine", "toy_engine:Nothing"], "module 'toy_engine' has no attribute 'Nothing'"),
        (["--engine", "no_such_module:Engine"], "cannot import 'no_such_module'"),
        (["--engine", "toy_engine:NotAnEngine"], "'toy_engine:NotAnEngine' is no engine: a NotAnEngine, not an"),
        (["--set", "lenght=2"], "has no parameter 'lenght' (did you mean 'length'?)"),
        (["--set", "length"], "--set length: the form is --set NAME=VALUE"),
        (["--set", "model=other"], "the model is named by --model, not by --set model"),
        (["--set", "length=0"], "does not take these parameters: length is too small"),
        (["--grade", "nummeric"], "unknown checker 'nummeric' (did you mean 'numeric'?)"),
        (["--grade", "oirl:__version__"], "oirl:__version__"),
        (["--design", "greedy"], "design = 'greedy'; allowed: full, random, balanced, adaptive"),
        (["--queries", "none.jsonl"], "none.jsonl: no such file"),
        (["--prompts", "none.yaml"], "none.yaml: no such file"),
        (["--prices", "none.yaml"], "none.yaml: no such file"),
        (["--budget", "1money"], "a budget in money needs the model's prices"),
        (["--max-tokens", "0"], "max_tokens = 0; allowed: 1 or more"),
        (["--temperature", "-1"], "temperature = -1.0; allowed: 0 or more"),
        (["--top-p", "0"], "top_p = 0.0; allowed: above 0, up to 1"),
        (["--top-k", "0"], "top_k = 0; allowed: 1 or more"),
        (["--stop", ""], "stop = ('',); allowed: texts that are not empty"),
        (["--replicates", "0"], "replicates = 0; allowed: 1 or more"),
        (["--out", "."], "."),
    ],
)
def test_options_that_cannot_be(folder: Path, more: list[str], message: str) -> None:
    before = {path.name for path in folder.iterdir()}
    assert message in refused(*more)
    assert {path.name for path in folder.iterdir()} - before <= {"__pycache__"}


def test_errors_are_one_line(folder: Path) -> None:
    assert line_of(generate(folder, "--set", "lenght=2")).endswith(
        "the engine 'toy_engine:Toy' has no parameter 'lenght' (did you mean 'length'?); it has: model, chat, "
        "dies_after, fails, file, hurries, length"
    )
    assert "generate --help`" in line_of(generate(folder, "--replicates", "two"))
    assert "--prompts" in line_of(generate(folder, prompts=None))


def test_an_engine_that_cannot_go_on(folder: Path) -> None:
    found = generate(folder, "--set", "dies_after=3", "--set", "file=notes", "--json")
    assert line_of(found) == "oirl: the server is gone"
    assert len((folder / "log.parquet.journal").read_text().splitlines()) == 1 + 3
    assert json.loads((folder / "notes").read_text())["closed"]
    assert json.loads(done("--json").stdout)["progress"]["new"] == 5
