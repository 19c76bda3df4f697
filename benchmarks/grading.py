"""Regrade the GSM8K replies of the Prompt-OIRL logs with `numeric` and compare with the logged verdicts.

Prints one JSON document: speed, how many verdicts change in which direction, why (simple rules, listed in
`kind_of`), two examples of each kind, and how many logged verdicts `logged_rule` reproduces. Run from
anywhere: `python benchmarks/grading.py [--data FOLDER]`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from oirl.logs.answers import extract_number  # noqa: E402
from oirl.logs.checkers import numeric  # noqa: E402
from oirl.logs.numbers import Number, last_number  # noqa: E402

DIGITS = re.compile(r"\d+(?:\.\d+)?")
LABEL = re.compile(r"(?:Steps?|Experts?|Solver|Philosophers?|Scholar|Question|Clue|and) $")
ANSWER = re.compile(r"answer|\\boxed", re.IGNORECASE)
SEPARATED = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?$")


def load(folder: Path) -> list[dict[str, Any]]:
    """Return the rows that have a response, each with the gold as GSM8K prints it, with its commas."""
    files = [
        folder / "prompt_oirl_llama2/gsm8k.parquet",
        folder / "gsm8k/train.jsonl",
        folder / "gsm8k/test.jsonl",
    ]
    for file in files:
        if not file.is_file():
            sys.exit(f"{file} is missing: give the folder of the real data with --data")
    printed = {}
    for file in files[1:]:
        for line in file.read_text(encoding="utf-8").splitlines():
            problem = json.loads(line)
            printed[problem["question"].strip()] = problem["answer"].rpartition("####")[2].strip()
    columns = ["query", "prompt_id", "response", "correct", "answer"]
    rows: list[dict[str, Any]] = pq.read_table(files[0], columns=columns).to_pylist()
    for row in rows:
        row["printed"] = printed.get(row["query"].strip(), row["answer"])
    return [row for row in rows if row["response"] is not None and row["correct"] is not None]


def logged_rule(response: str, printed: str) -> bool:
    """The comparison behind the logged verdicts: last digits with last digits, without commas and signs."""
    said, gold = DIGITS.findall(response), DIGITS.findall(printed)
    return bool(said and gold) and float(said[-1]) == float(gold[-1])


def kind_of(row: dict[str, Any]) -> str:
    """Say why the verdict changes; the first rule that applies names the kind."""
    response, found, gold = row["response"], extract_number(row["response"]), extract_number(row["answer"])
    digits = list(DIGITS.finditer(response))
    if found is None or gold is None or not digits:
        return "no number to read"
    if found.value == -gold.value:
        return "sign lost in the log"
    last = last_number(response)
    if last != found:
        if ANSWER.search(response):
            return "answer phrase or box, more numbers after it"
        return "last sentence repeats a result, more numbers after it"
    if SEPARATED.search(response, max(0, digits[-1].start() - 24), digits[-1].end()):
        return "log read part of a number with a thousands separator (reply)"
    if "," in row["printed"]:
        return "log read part of a number with a thousands separator (gold)"
    return by_form(found, response, digits[-1])


def by_form(found: Number, response: str, digits: re.Match[str]) -> str:
    """Name the kind by how the compared number is written, or by what the log took for a number."""
    after, before = response[digits.end() :], response[: digits.start()].rpartition("\n")[2]
    rules = {
        "fraction or mixed number": found.places == -1,
        "log read an ordinal (3rd turn)": after.startswith(("st", "nd", "rd", "th")),
        "log read an aside in parentheses": before.count("(") > before.count(")"),
        "log read a label (3. or Expert 3:)": LABEL.search(before) is not None or not before.strip(),
        "log read minutes, an exponent or a name with digits": before[-1:] in (":", "^", "-", ".")
        or before[-1:].isalpha(),
        "percent": found.percent,
        "number with a word such as million": found.scale != 1,
        "reply cut off": not response.rstrip().endswith((".", "!", "?", '"', ")")),
    }
    return next((name for name, applies in rules.items() if applies), "other")


def report(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Grade all rows and return the figures."""
    began = time.perf_counter()
    verdicts = [numeric(row["response"], row["answer"]) for row in rows]
    seconds = time.perf_counter() - began
    changed = [(r, v) for r, v in zip(rows, verdicts, strict=True) if v.correct is not r["correct"]]
    kinds: dict[str, dict[str, Any]] = {}
    for row, verdict in changed:
        kind = kinds.setdefault(kind_of(row), {"count": 0, "right_to_wrong": 0, "wrong_to_right": 0, "examples": []})
        kind["count"] += 1
        kind["wrong_to_right" if verdict.correct else "right_to_wrong"] += 1
        if len(kind["examples"]) < 2:
            kind["examples"].append(
                {
                    "gold": row["printed"],
                    "extracted": verdict.extracted,
                    "logged": row["correct"],
                    "now": verdict.correct,
                    "end_of_reply": row["response"][-160:],
                }
            )
    reproduced = sum(logged_rule(row["response"], row["printed"]) == row["correct"] for row in rows)
    return {
        "rows": len(rows),
        "seconds": round(seconds, 3),
        "replies_per_second": round(len(rows) / seconds),
        "mean_characters": round(sum(len(row["response"]) for row in rows) / len(rows), 1),
        "logged_right": sum(row["correct"] for row in rows),
        "now_right": sum(verdict.correct is True for verdict in verdicts),
        "not_gradable": sum(verdict.correct is None for verdict in verdicts),
        "changed": len(changed),
        "changed_share": round(len(changed) / len(rows), 5),
        "right_to_wrong": sum(row["correct"] for row, _ in changed),
        "wrong_to_right": sum(not row["correct"] for row, _ in changed),
        "logged_rule": {"reproduced": reproduced, "share": round(reproduced / len(rows), 5)},
        "kinds": dict(sorted(kinds.items(), key=lambda item: -item[1]["count"])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data", help="folder of the real data")
    print(json.dumps(report(load(parser.parse_args().data)), indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
