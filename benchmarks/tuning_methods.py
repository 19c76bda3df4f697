"""sft, filter, RAFT and HIR side by side on the demo's small language model: same responses, same updates. Prints JSON.

Each seed has its own training problems, sampled responses (8 a problem, at temperature 1), order of updates and test
problems, whose wording with numbers masked stands in no training problem. All methods learn from the same log with the
same number of updates; HIR's contrastive loss reads each response under two instructions. Shown are the success on the
test problems (greedy, and at temperature 1), the gain over the initial model, and differences between methods: means
over seeds with 95% intervals (Student's t over seeds; each seed is a whole repetition). `length_reward` shows a bad
reward on purpose: RAFT that is paid for words.

With --ablations it asks instead why HIR is not above filtered SFT, by the same seeds and logs: four times the updates;
a log of fewer wrong responses; and both methods after the model was taught to follow the two instructions, by HIR on
responses to as many other problems (without its contrastive loss it does not learn to), with twice the updates.

Run: OMP_NUM_THREADS=1 python benchmarks/tuning_methods.py [--seeds 5] [--updates 400] [--batch 64] [--problems 400]
     [--tests 500] [--ablations]
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
import pyarrow as pa
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
ABLATED = [
    ("hir", "filter"),
    ("hir_more_updates", "filter"),
    ("hir_more_updates", "hir"),
    ("hir_few_wrong", "filter"),
    ("hir_few_wrong", "hir"),
    ("hir_of_taught", "filter_of_taught"),
    ("hir_of_taught", "hir"),
]
TIMES, FEW_WRONG = 4, 0.2


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


def make_log(seed: int, queries: list[Query], path: Path) -> str:
    """Sample 8 responses to each query with the demo's model, and write the log."""
    with oirl.open_engine("transformers", str(small_lm_path())) as engine:
        sampling = oirl.Sampling(max_tokens=64, seed=seed)
        oirl.collect(engine, queries, [("plain", "{query}")], path, sampling=sampling, grade="numeric", replicates=8)
    return str(path)


class Tuned:
    """Tunes models one after the other, and measures each on the test problems.

    Attributes:
        found: Name -> figures.
    """

    def __init__(self, seed: int, args: argparse.Namespace, folder: Path, test: list[Query]) -> None:
        self._seed, self._args, self._folder, self._test = seed, args, folder, test
        self.found = {"initial": self.measured(str(small_lm_path()), "{query}")}

    def measured(self, model: str, template: str, name: str = "success") -> dict[str, float]:
        """Return the success of a model under a template, greedy and at temperature 1."""
        temperatures = {name: 0.0, f"{name}_at_1": 1.0}
        return {key: success(model, template, self._test, value) for key, value in temperatures.items()}

    def tune(self, name: str, log: str, **settings: Any) -> str:
        """Tune by the method that a name begins with, and return the model."""
        method = name.split("_")[0]
        base = {"model": str(small_lm_path()), "out": str(self._folder / name), "log": log, "held_out": 0.0,
                "seed": self._seed, "learning_rate": 3e-4, "updates": self._args.updates, "batch": self._args.batch,
                "micro_batch": self._args.batch}  # fmt: skip
        report = oirl.tune(method, base | METHODS.get(name, METHODS[method]) | settings)
        asked = list(report.prompts.values())
        self.found[name] = self.measured(report.model, asked[0])
        if len(asked) > 1:
            self.found[name] |= self.measured(report.model, asked[1], "asked_for_wrong")
        print(f"seed {self._seed}, {name}: {self.found[name]}", file=sys.stderr)
        return report.model


def one_seed(seed: int, args: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """Return method -> figures of a whole repetition."""
    train, test = make_queries(seed, args.problems, args.tests)
    log = make_log(seed, train, folder / "log.parquet")
    tuned = Tuned(seed, args, folder, test)
    for method in METHODS:
        tuned.tune(method, log)
    return tuned.found


def one_seed_of_ablations(seed: int, args: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """Return the same of what might explain HIR's place."""
    train, test = make_queries(seed, args.problems, args.tests)
    log = make_log(seed, train, folder / "log.parquet")
    known = {masked(q.query) for q in train + test}
    others = [q for q in make_queries(seed + 1000, 2 * args.problems, 1)[0] if masked(q.query) not in known]
    log_of_others = make_log(seed, others[: args.problems], folder / "others.parquet")
    tuned = Tuned(seed, args, folder, test)
    tuned.tune("filter", log)
    tuned.tune("hir", log)
    tuned.tune("hir_more_updates", log, updates=TIMES * args.updates)
    tuned.tune("hir_few_wrong", fewer_wrong(log, seed, folder / "few_wrong.parquet"))
    taught = tuned.tune("hir_teaching", log_of_others, updates=2 * args.updates)
    asked = under_instruction(log, folder / "asked.parquet")  # so that both begin at what the model was taught
    tuned.tune("filter_of_taught", asked, model=taught)
    tuned.tune("hir_of_taught", log, model=taught)
    return tuned.found


def fewer_wrong(log: str, seed: int, path: Path) -> str:
    """Write a log with all right responses of another and so many wrong ones that these are `FEW_WRONG` of it."""
    table = oirl.read_log(log)
    right = np.array(table["correct"].to_pylist(), dtype=bool)
    count = round(right.sum() * FEW_WRONG / (1 - FEW_WRONG))
    chosen = np.random.default_rng(seed).choice(np.flatnonzero(~right), count, replace=False)
    oirl.write_log(table.take(pa.array(np.sort(np.concatenate([np.flatnonzero(right), chosen])))), path)
    return str(path)


def under_instruction(log: str, path: Path) -> str:
    """Write a log whose responses count as given under the instruction to be right."""
    table = oirl.read_log(log)
    prompt = RELABEL["correct"].replace("{prompt}", "{query}")
    table = table.set_column(table.column_names.index("prompt"), "prompt", pa.array([prompt] * len(table)))
    oirl.write_log(
        table.set_column(table.column_names.index("prompt_id"), "prompt_id", pa.array(["asked"] * len(table))), path
    )
    return str(path)


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
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--problems", type=int, default=400)
    parser.add_argument("--tests", type=int, default=500)
    parser.add_argument("--processes", type=int, default=2, help="seeds at a time")
    parser.add_argument("--ablations", action="store_true", help="why HIR is not above filtered SFT")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / str(seed) for seed in range(args.seeds)]
        for folder in folders:
            folder.mkdir()
        with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
            work = one_seed_of_ablations if args.ablations else one_seed
            seeds = list(pool.map(work, range(args.seeds), [args] * args.seeds, folders))
        hacked = None if args.ablations else length_reward(args, Path(name))

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
        for a, b in (ABLATED if args.ablations else DIFFERENCES)
    }
    right_over_wrong = {
        method: each(lambda seed, m=method: seed[m]["success"] - seed[m]["asked_for_wrong"])
        for method in seeds[0]
        if "asked_for_wrong" in seeds[0][method]
    }
    print(
        json.dumps(
            {"settings": vars(args), "methods": figures, "differences": differences,
             "asked_for_correct - asked_for_wrong": right_over_wrong, "length_reward": hacked},
            indent=1,
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
