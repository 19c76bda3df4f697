"""RAFT on the small language model that comes with oirl: sample, keep what is right, imitate it, again.

The reward is the verdict, or, with --reward words, the number of words: a bad reward, to see in the figures how a
policy games it. What the result is worth is measured on problems that the run has not seen.

Run: python examples/raft.py [--problems 300] [--iterations 3] [--reward verdict|words]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import oirl
from oirl.records import Query
from oirl_data import small_lm_path
from oirl_data.problems import generate_problems


def words(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Reward the number of words."""
    return [float(len(text.split())) for text in completions]


def measure(model: str, queries: list[Query], out: Path) -> None:
    """Run queries on a model and write the log."""
    with oirl.open_engine("transformers", model) as engine:
        sampling = oirl.Sampling(max_tokens=64, temperature=0.7)
        oirl.collect(engine, queries, [(out.stem, "{query}")], out, sampling=sampling, grade="numeric", replicates=4)


def main() -> None:
    """Tune, then audit the initial and the tuned model on other problems."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=300)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--updates", type=int, default=40, help="of an iteration")
    parser.add_argument("--reward", choices=["verdict", "words"], default="verdict")
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))  # for the reward's name, raft:words
    problems = generate_problems(2 * args.problems, random.Random(0), held_out=True, distinct_masked=True)
    queries = [Query(f"q{i}", problem.query, str(problem.answer)) for i, problem in enumerate(problems)]
    train, test = queries[: args.problems], queries[args.problems :]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [json.dumps({"query_id": q.query_id, "query": q.query, "answer": q.answer}) for q in train]
        (folder / "queries.jsonl").write_text("\n".join(rows))
        report = oirl.tune(
            "raft",
            {
                "model": str(small_lm_path()),
                "queries": str(folder / "queries.jsonl"),
                "out": str(folder / "run"),
                "grade": "numeric",
                "reward": "verdict" if args.reward == "verdict" else "raft:words",
                "iterations": args.iterations,
                "temperature": 1.0,
                "max_tokens": 64,
                "updates": args.updates,
                "micro_batch": 32,
                "learning_rate": 3e-4,
            },
        )
        for row in report.iterations:
            figures = ", ".join(f"{key} {row[key]:.3f}" for key in ("reward", "success", "words", "distinct_2"))
            print(f"iteration {row['iteration']}: {figures}")
        measure(str(small_lm_path()), test, folder / "both" / "before.parquet")
        measure(report.model, test, folder / "both" / "after.parquet")
        audit = oirl.audit(oirl.read_log(folder / "both"))
        for prompt in audit.to_dict()["prompts"]:
            interval = f"[{prompt['ci_low']:.1%}, {prompt['ci_high']:.1%}]"
            print(f"{prompt['prompt_id']:6} {prompt['success']:.1%} {interval} on {len(test)} other problems")


if __name__ == "__main__":
    main()
