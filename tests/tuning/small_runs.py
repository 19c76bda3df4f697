"""What tests of runs share: a log and queries of the small language model's problems, and settings that are quick."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

import oirl
from oirl.records import Query
from oirl_data import small_lm_path
from oirl_data.problems import generate_problems
from oirl_data.prompts import PROMPTS

CORRECT, WRONG = "The answer is equal . {prompt}", "The answer is not equal . {prompt}"
RELABEL = {"name": "correctness", "correct": CORRECT, "wrong": WRONG}


def make_queries(n: int, seed: int = 0) -> list[Query]:
    problems = generate_problems(n, random.Random(seed), held_out=True)
    return [Query(f"q{i:03}", problem.query, str(problem.answer)) for i, problem in enumerate(problems)]


def write_queries(queries: list[Query], path: Path) -> str:
    rows = [{"query_id": q.query_id, "query": q.query, "answer": q.answer} for q in queries]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def write_small_log(path: Path, n: int = 40) -> str:
    """Write a log of the small model: two prompts, two runs each, with verdicts."""
    with oirl.open_engine("transformers", str(small_lm_path())) as engine:
        prompts = [(name, PROMPTS[name]) for name in ("steps", "plain")]
        sampling = oirl.Sampling(max_tokens=48, temperature=0.7)
        oirl.collect(engine, make_queries(n), prompts, path, sampling=sampling, grade="numeric", replicates=2)
    return str(path)


def quick(out: Path, **changes: Any) -> dict[str, Any]:
    settings = {
        "model": str(small_lm_path()),
        "out": str(out),
        "grade": "numeric",
        "max_tokens": 48,
        "learning_rate": 3e-4,
        "batch": 8,
        "micro_batch": 4,
        "log_every": 2,
        "save_every": 4,
        "held_out": 0.2,
    }
    return settings | changes


def rows_of(path: Path) -> list[dict[str, Any]]:
    table: pa.Table = oirl.read_log(path)
    return table.drop_columns(["latency_s", "created_at"]).to_pylist()


def unsteady(prompts: Any, completions: Sequence[str], **columns: Any) -> list[float]:
    """Never say the same twice, and another thing in each process."""
    return [len(text) + random.random() + os.getpid() for text in completions]


class Stopped(Exception):
    """Raised in the middle of a run."""


def result(out: Path) -> dict[str, Any]:
    """Return all that a run has left: bytes of weights and metrics, rows of rollouts, names of files."""
    (weights,) = (out / "model").glob("*.safetensors")
    return {
        "weights": weights.read_bytes(),
        "metrics": (out / "metrics.jsonl").read_text(),
        "rollouts": [rows_of(path) for path in sorted((out / "rollouts").glob("*/*.parquet"))],
        "files": sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()),
    }


def killed_until_done(method: str, settings: dict[str, Any]) -> int:
    """Run again and again, killed after a while that grows, until it is done; return how often it was killed."""
    context = multiprocessing.get_context("forkserver")
    modules = ("running", "trainer", "policy", "online", "learner")
    context.set_forkserver_preload([f"oirl.tuning.{name}" for name in modules])
    rng = random.Random(method)
    for attempt in range(40):
        process = context.Process(target=oirl.tune, args=(method, settings))
        process.start()
        process.join(rng.uniform(0.3, 0.8 + attempt / 4))
        if not process.is_alive():
            assert process.exitcode == 0
            return attempt
        process.kill()
        process.join()
        time.sleep(0.05)
    raise AssertionError("never finished")
