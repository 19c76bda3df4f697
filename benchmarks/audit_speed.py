"""Time and measure `oirl.audit` on a log of 200,000 rows, beside reading that log with Arrow alone.

The log: 20,000 queries of the words of GSM8K-like problems under 5 prompts, two runs each, with replies, gold answers
and a split column. Prints one JSON document; `ratio` is the time of the audit over that of reading the file.
Run from anywhere: `python benchmarks/audit_speed.py [--queries N]`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / part) for part in (".", "cli", "data")]
NAMES = "Ann Ben Cleo Dan Eve Finn Gus Hal Ivy Jon Kim Leo Mia Ned Ola Pam Quin Rob Sue Tom".split()
THINGS = "apples books coins dolls eggs forks gems hats inks jars kites lamps mugs nuts owls pens".split()
DOING = "buys sells finds loses gives breaks counts paints packs stacks hides moves".split()


def make_log(n: int):
    """Return a log of n queries under five prompts, two runs each."""
    import pyarrow as pa

    rng = np.random.default_rng(0)
    words = [[str(rng.choice(pool)) for pool in (NAMES, DOING, THINGS, NAMES, DOING, THINGS, NAMES)] for _ in range(n)]
    numbers = rng.integers(2, 99, (n, 2))
    queries = [
        f"{w[0]} {w[1]} {a} {w[2]} before {w[3]} {w[4]} {b} {w[5]} near the house of {w[6]} ({i}). How many in all?"
        for i, (w, (a, b)) in enumerate(zip(words, numbers.tolist(), strict=True))
    ]
    chance = 1 / (1 + np.exp(-(rng.normal(0, 1.5, (n, 1)) + rng.normal(0, 0.5, (n, 5)))))
    rows: dict[str, list] = {
        name: [] for name in ("query_id", "query", "prompt_id", "prompt", "response", "answer", "correct", "split")
    }
    for i, query in enumerate(queries):
        total = int(numbers[i].sum())
        for p in range(5):
            for _ in range(2):
                right = bool(rng.random() < chance[i, p])
                rows["query_id"].append(f"q{i}")
                rows["query"].append(query)
                rows["prompt_id"].append(f"p{p}")
                rows["prompt"].append(f"Way {p}: {{query}}")
                rows["response"].append(f"First we look at both numbers. So the answer is {total + (not right)}.")
                rows["answer"].append(str(total))
                rows["correct"].append(right)
                rows["split"].append("test" if i % 5 == 0 else "train")
    return pa.table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=20_000)
    arguments = parser.parse_args()
    import pyarrow.parquet as pq

    import oirl
    from oirl.evaluation.audit import AUDITED

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.parquet"
        oirl.write_log(make_log(arguments.queries), path)
        begin = time.perf_counter()
        pq.read_table(path, columns=list(AUDITED))
        reading = time.perf_counter() - begin
        begin = time.perf_counter()
        found = oirl.audit(oirl.read_log(path, AUDITED))
        seconds = time.perf_counter() - begin
    document = {
        "rows": found.n_rows,
        "queries": found.n_queries,
        "seconds": round(seconds, 2),
        "arrow_reading_seconds": round(reading, 3),
        "ratio": round(seconds / reading, 1),
        "peak_mb": round(psutil.Process().memory_info().rss / 2**20),
    }
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
