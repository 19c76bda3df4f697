"""Write the demo log: sampled replies of the small language model to fresh problems under every prompt.

    python data/make_demo_log.py

writes `replies.jsonl.gz`, `queries.jsonl` and `prompts.jsonl` into `data/oirl_data/demo/` and prints what it
measured as JSON. The log carries no grades: they are made when it is imported.

    python data/make_demo_log.py --check 200

writes nothing, samples the first 200 replies again and prints which share of them is the same as in the log.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from oirl.logs.groups import group_queries
from oirl.logs.splits import assign_test
from oirl_data import demo_path, small_lm_path
from oirl_data.problems import KINDS, Problem, generate_problems
from oirl_data.prompts import PROMPTS, TAUGHT, render
from sample_replies import SAMPLING, is_right, sample_replies

FRESH_QUERIES = 12
Row = dict[str, Any]


def make_rows(
    lm: Path, problems: list[Problem], splits: list[str], replicates: int, seed: int, limit: int | None = None
) -> list[Row]:
    """Sample replies for each query, prompt and replicate.

    Args:
        lm: The folder of the small language model.
        problems: The problems of the log.
        splits: The split of each problem.
        replicates: How many replies to sample for each query and prompt.
        seed: Seeds the draws of every reply.
        limit: Make only so many rows.
    """
    tokenizer = AutoTokenizer.from_pretrained(lm)
    model = AutoModelForCausalLM.from_pretrained(lm, dtype=torch.float32).eval()
    cells = [
        (f"q{number:04d}", problem, split, prompt_id, replicate)
        for number, (problem, split) in enumerate(zip(problems, splits, strict=True), start=1)
        for prompt_id in PROMPTS
        for replicate in range(replicates)
    ][:limit]
    rendered = [render(prompt_id, problem.query) for _, problem, _, prompt_id, _ in cells]
    keys = [f"{seed}:{query_id}:{prompt_id}:{replicate}" for query_id, _, _, prompt_id, replicate in cells]
    replies = sample_replies(model, tokenizer, rendered, keys)
    return [
        {
            "query_id": query_id,
            "query": problem.query,
            "prompt_id": prompt_id,
            "prompt": PROMPTS[prompt_id],
            "response": reply.text,
            "answer": str(problem.answer),
            "dataset": "oirl-demo",
            "split": split,
            "model": "oirl-small-lm",
            "replicate": replicate,
            "tokens_in": reply.tokens_in,
            "tokens_out": reply.tokens_out,
            "sampling": SAMPLING,
            "metadata": {"kind": problem.kind},
        }
        for (query_id, problem, split, prompt_id, replicate), reply in zip(cells, replies, strict=True)
    ]


def styles(rows: list[Row]) -> dict[str, float]:
    """Return the share of right replies of the taught prompts, of those that write a calculation and of the others."""
    right: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        if row["prompt_id"] in TAUGHT:
            style = "worked_out" if "=" in row["response"] else "answer_only"
            right[style].append(is_right(row["response"], int(row["answer"])))
    return {style: round(sum(found) / len(found), 3) for style, found in right.items()}


def split_problems(problems: list[Problem], test: float, seed: int) -> list[str]:
    """Return "train" or "test" for each problem; near duplicates stay together, as everywhere in oirl."""
    queries = [problem.query for problem in problems]
    mask = assign_test(queries, group_queries(queries).labels, test, seed)
    return ["test" if is_test else "train" for is_test in mask]


def read_log(log: Path) -> list[Row]:
    """Return the rows of a log that was written before."""
    with gzip.open(log, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def share_like_the_log(rows: list[Row], log: Path) -> float:
    """Return the share of rows whose response stands in the log, for the same query, prompt and replicate."""
    logged = read_log(log)
    cell = ("query_id", "prompt_id", "replicate")
    responses = {tuple(row[name] for name in cell): row["response"] for row in logged}
    same = [responses[tuple(row[name] for name in cell)] == row["response"] for row in rows]
    return sum(same) / len(same)


def success(rows: list[Row], splits: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the share of right replies of some splits for each prompt, by kind of problem and over all."""
    right: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for row in rows:
        if row["split"] in splits:
            ok = is_right(row["response"], int(row["answer"]))
            right[row["prompt_id"], row["metadata"]["kind"]].append(ok)
            right[row["prompt_id"], "all"].append(ok)
    return {
        prompt_id: {
            kind: round(sum(right[prompt_id, kind]) / len(right[prompt_id, kind]), 3) for kind in (*KINDS, "all")
        }
        for prompt_id in PROMPTS
    }


def summary(rows: list[Row]) -> dict[str, Any]:
    """Measure the log: success, and what choosing the prompt by kind of problem gains on the test queries.

    Both choices, of one prompt for all and of one for each kind, are made on train and measured on test.
    """
    train, test = success(rows, ["train"]), success(rows, ["test"])
    single = max(PROMPTS, key=lambda prompt_id: train[prompt_id]["all"])
    by_kind = {kind: max(PROMPTS, key=lambda prompt_id: train[prompt_id][kind]) for kind in KINDS}
    graded = [
        (row["prompt_id"] == by_kind[row["metadata"]["kind"]], is_right(row["response"], int(row["answer"])))
        for row in rows
        if row["split"] == "test"
    ]
    chosen = [ok for is_chosen, ok in graded if is_chosen]
    reached = round(sum(chosen) / len(chosen), 3)
    return {
        "rows": len(rows),
        "empty_responses": sum(not row["response"] for row in rows),
        "cut_responses": sum(row["tokens_out"] == SAMPLING["max_new_tokens"] for row in rows),
        "best_single_prompt": single,
        "best_single_test_success": test[single]["all"],
        "best_prompt_by_kind": by_kind,
        "best_by_kind_test_success": reached,
        "best_by_kind_test_gain": round(reached - test[single]["all"], 3),
        "taught_prompts_by_style": styles(rows),
        "success": success(rows, ["train", "test"]),
        "train_success": train,
        "test_success": test,
    }


def write_jsonl(path: Path, rows: list[Row]) -> None:
    """Write rows as JSON lines; a path that ends in `.gz` is compressed without time or name inside."""
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if path.suffix != ".gz":
        path.write_bytes(data)
        return
    with path.open("wb") as file, gzip.GzipFile("", "wb", compresslevel=9, fileobj=file, mtime=0) as packed:
        packed.write(data)


def main() -> None:
    """Write the files of the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm", type=Path, default=small_lm_path(), help="folder of the small language model")
    parser.add_argument("--out", type=Path, default=demo_path(), help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--queries", type=int, default=1200, help="number of queries")
    parser.add_argument("--test", type=float, default=1 / 3, help="share of test queries")
    parser.add_argument("--summary", action="store_true", help="only print what is measured of the log")
    parser.add_argument("--check", type=int, metavar="ROWS", help="only compare so many rows with the log")
    parser.add_argument("--replicates", type=int, default=2)
    args = parser.parse_args()
    if args.summary:
        print(json.dumps(summary(read_log(args.out / "replies.jsonl.gz")), indent=1))
        return
    # One thread: the order of additions in the model would depend on the number of threads.
    torch.set_num_threads(1)
    rng = random.Random(f"demo:{args.seed}")
    problems = generate_problems(args.queries + FRESH_QUERIES, rng, held_out=True, distinct_masked=True)
    logged, fresh_problems = problems[: args.queries], problems[args.queries :]
    splits = split_problems(logged, args.test, args.seed)
    rows = make_rows(args.lm, logged, splits, args.replicates, args.seed, args.check)
    if args.check:
        print(json.dumps({"rows": len(rows), "same": share_like_the_log(rows, args.out / "replies.jsonl.gz")}))
        return
    fresh = [
        {"query_id": f"new{number:02d}", "query": problem.query}
        for number, problem in enumerate(fresh_problems, start=1)
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    write_jsonl(args.out / "replies.jsonl.gz", rows)
    write_jsonl(args.out / "queries.jsonl", fresh)
    write_jsonl(args.out / "prompts.jsonl", [{"prompt_id": p, "prompt": text} for p, text in PROMPTS.items()])
    print(json.dumps(summary(rows), indent=1))


if __name__ == "__main__":
    main()
