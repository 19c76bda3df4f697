"""sft, filter, RAFT and HIR side by side on the demo's small language model: same responses, same updates. Prints JSON.

Each seed has its own training problems, sampled responses (8 a problem, at temperature 1), order of updates and test
problems, whose wording with numbers masked stands in no training problem. All methods learn from the same log with the
same number of updates; HIR's contrastive loss reads each response under two instructions. Shown are the success on the
test problems (greedy, and at temperature 1), the gain over the initial model, and differences between methods: means
over seeds with 95% intervals (Student's t over seeds; each seed is a whole repetition). `length_reward` shows a bad
reward on purpose: RAFT that is paid for words.

Run: OMP_NUM_THREADS=1 python benchmarks/tuning_methods.py [--seeds 5] [--updates 400] [--problems 400] [--tests 500]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import common  # noqa: F401  (puts oirl on the path)
import numpy as np
from scipy.stats import t as student

import oirl
from oirl.logs.checkers import numeric
from oirl.logs.rendering import render
from oirl.records import Query
from oirl_data import small_lm_path
from oirl_data.problems import generate_problems, masked

RELABEL = {
    "name": "correctness",
    "correct": "The answer is equal . {prompt}",  # words that the small model's tokenizer knows
    "wrong": "The answer is not equal . {prompt}",
}
METHODS: dict[str, dict[str, Any]] = {
    "sft": {},
    "filter": {},
    "raft": {},
    "hir": {"relabel": RELABEL, "entropy_coef": 0.0},
    "hir_without_contrast": {"relabel": RELABEL, "entropy_coef": 0.0, "contrastive": "none"},
}
DIFFERENCES = [("hir", "filter"), ("hir", "hir_without_contrast"), ("filter", "sft"), ("raft", "filter")]


def words(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Reward length: a bad reward."""
    return [float(len(text.split())) for text in completions]


def make_queries(seed: int, train: int, test: int) -> tuple[list[Query], list[Query]]:
    """Return training and test problems that are no near duplicates of each other."""
    found = generate_problems(3 * (train + test), random.Random(seed), held_out=True)
    wordings = sorted({masked(problem.query) for problem in found})
    random.Random(seed).shuffle(wordings)
    for_training = set(wordings[: len(wordings) * train // (train + test)])
    queries = [(Query(f"q{i}", p.query, str(p.answer)), masked(p.query) in for_training) for i, p in enumerate(found)]
    return [q for q, is_train in queries if is_train][:train], [q for q, is_train in queries if not is_train][:test]


def success(model: str, template: str, queries: list[Query], temperature: float) -> float:
    """Return the share of right responses."""
    with oirl.open_engine("transformers", model) as engine:
        texts = [render(template, q.query) or "" for q in queries]
        found = engine.generate(texts, oirl.Sampling(max_tokens=64, temperature=temperature))
    return float(
        np.mean([numeric(c.text or "", q.answer or "").correct is True for (c,), q in zip(found, queries, strict=True)])
    )


def one_seed(seed: int, args: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """Return method -> figures of a whole repetition."""
    train, test = make_queries(seed, args.problems, args.tests)
    log = folder / "log.parquet"
    with oirl.open_engine("transformers", str(small_lm_path())) as engine:
        sampling = oirl.Sampling(max_tokens=64, seed=seed)
        oirl.collect(engine, train, [("plain", "{query}")], log, sampling=sampling, grade="numeric", replicates=8)

    def measured(model: str, template: str, name: str = "success") -> dict[str, float]:
        return {name: success(model, template, test, 0.0), f"{name}_at_1": success(model, template, test, 1.0)}

    found = {"initial": measured(str(small_lm_path()), "{query}")}
    for method, settings in METHODS.items():
        report = oirl.tune(
            method.split("_")[0],
            {"model": str(small_lm_path()), "out": str(folder / method), "log": str(log), "held_out": 0.0, "seed": seed,
             "learning_rate": 3e-4, "updates": args.updates, "batch": 64, "micro_batch": 64, **settings},
        )  # fmt: skip
        asked = list(report.prompts.values())
        found[method] = measured(report.model, asked[0])
        if len(asked) > 1:
            found[method] |= measured(report.model, asked[1], "asked_for_wrong")
        print(f"seed {seed}, {method}: {found[method]}", file=sys.stderr)
    return found


def length_reward(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Return what becomes of a policy that is paid for words, iteration by iteration."""
    train, _ = make_queries(0, args.problems, 10)
    rows = [{"query_id": q.query_id, "query": q.query, "answer": q.answer} for q in train]
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = oirl.tune(
        "raft",
        {"model": str(small_lm_path()), "out": str(folder / "run"), "queries": str(folder / "queries.jsonl"),
         "reward": "tuning_methods:words", "grade": "numeric", "iterations": 5, "samples": 8, "temperature": 1.0,
         "updates": 40, "batch": 32, "micro_batch": 32, "learning_rate": 3e-4, "held_out": 0.0, "max_tokens": 64},
    )  # fmt: skip
    shown = ("reward", "success", "words", "distinct_2", "surprise", "cut_off")
    return [{name: row[name] for name in shown} for row in report.iterations]


def over_seeds(values: list[float]) -> dict[str, float]:
    """Return a mean over seeds with its 95% interval."""
    mean = float(np.mean(values))
    half = float(student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return {"mean": round(mean, 4), "ci_low": round(mean - half, 4), "ci_high": round(mean + half, 4)}


def main() -> None:
    """Run all seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--problems", type=int, default=400)
    parser.add_argument("--tests", type=int, default=500)
    parser.add_argument("--processes", type=int, default=2, help="seeds at a time")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / str(seed) for seed in range(args.seeds)]
        for folder in folders:
            folder.mkdir()
        with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
            seeds = list(pool.map(one_seed, range(args.seeds), [args] * args.seeds, folders))
        hacked = length_reward(args, Path(name))

    def each(value: Callable[[dict[str, dict[str, float]]], float]) -> dict[str, float]:
        return over_seeds([value(seed) for seed in seeds])

    figures = {
        method: {key: each(lambda seed, m=method, k=key: seed[m][k]) for key in seeds[0][method]}
        | {"gain": each(lambda seed, m=method: seed[m]["success"] - seed["initial"]["success"])}
        for method in seeds[0]
    }
    differences = {
        f"{a} - {b}": {
            key: each(lambda seed, a=a, b=b, k=key: seed[a][k] - seed[b][k]) for key in ("success", "success_at_1")
        }
        for a, b in DIFFERENCES
    }
    right_over_wrong = each(lambda seed: seed["hir"]["success"] - seed["hir"]["asked_for_wrong"])
    print(
        json.dumps(
            {"settings": vars(args), "methods": figures, "differences": differences,
             "hir_asked_for_correct - asked_for_wrong": right_over_wrong, "length_reward": hacked},
            indent=1,
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
