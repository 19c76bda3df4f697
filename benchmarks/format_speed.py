"""Time and measure `oirl.import_log` on 200,000 lines of lm-eval samples, beside `json.loads` of the same lines.

Prints one JSON document. `seconds` is for one core, reading both passes included; `ratio` is the seconds of
`json.loads` alone over oirl's, as no reader of these files in Python can be faster than that. `peak_mb` at one and at
five times the lines tells whether memory is flat.
Run from anywhere: `python benchmarks/format_speed.py [--lines N]`.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import cpu_environment
from import_speed import WORDS

TARGET_SECONDS = 20.0
REPEATS = 3
MEASURED = """
import resource, sys, time
import oirl
started = time.perf_counter()
report = oirl.import_log(sys.argv[1], sys.argv[2], filter="strict-match")
seconds = time.perf_counter() - started
assert report.rows_kept == int(sys.argv[3]), report
print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def write_samples(path: Path, lines: int, seed: int = 0) -> None:
    """Write samples as lm-eval does: one line per document and filter, about 1.9 KB each, without a results file."""
    rng = np.random.default_rng(seed)
    words = np.array(WORDS)
    with path.open("w", encoding="utf-8") as file:
        documents = lines // 2
        for kind in ("strict-match", "flexible-extract"):
            stock = " ".join(words[rng.integers(0, len(words), 200_000)])
            for i in range(documents):
                at = int(rng.integers(0, len(stock) - 2000))
                question = f"Case {i}: {stock[at : at + 280]}?"
                answer = f"{stock[at + 300 : at + 560]}\n#### {i % 97}"
                rendered = f"Question: {question}\nAnswer: Let's think step by step."
                sample = {
                    "doc_id": i,
                    "doc": {"question": question, "answer": answer},
                    "target": answer,
                    "arguments": {"gen_args_0": {"arg_0": rendered, "arg_1": {"until": ["Question:"]}}},
                    "resps": [[f"{stock[at + 600 : at + 1000]}\n#### {i % 89}"]],
                    "filtered_resps": [str(i % 89)],
                    "filter": kind,
                    "metrics": ["exact_match"],
                    "doc_hash": f"{i:064x}",
                    "prompt_hash": f"{i + 1:064x}",
                    "target_hash": f"{i + 2:064x}",
                    "exact_match": float(i % 97 == i % 89),
                }
                file.write(json.dumps(sample) + "\n")


def measured(source: Path, rows: int) -> tuple[float, float]:
    """Return seconds and peak MB of an import in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", MEASURED, str(source), f"{folder}/log.parquet", str(rows)]
        done = subprocess.run(command, env=cpu_environment(), check=True, capture_output=True, text=True)
    seconds, peak = done.stdout.split()
    return float(seconds), float(peak)


def loads_only(source: Path) -> float:
    """Return the seconds that parsing the lines alone takes."""
    started = time.perf_counter()
    with source.open("rb") as file:
        for line in file:
            json.loads(line)
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=200_000)
    lines = parser.parse_args().lines
    with tempfile.TemporaryDirectory() as folder:
        source, small = Path(folder) / "samples_task_a.jsonl", Path(folder) / "samples_task_b.jsonl"
        write_samples(source, lines)
        write_samples(small, lines // 5)
        runs = [(measured(source, lines // 2), loads_only(source)) for _ in range(REPEATS)]
        few = measured(small, lines // 10)
        seconds, plain = min(r[0][0] for r in runs), min(r[1] for r in runs)
        document = {
            "machine": platform.machine(),
            "python": platform.python_version(),
            "lines": lines,
            "megabytes": round(source.stat().st_size / 1e6, 1),
            "seconds": round(seconds, 2),
            "target_seconds": TARGET_SECONDS,
            "json_loads_seconds": round(plain, 2),
            "ratio": round(plain / seconds, 3),
            "peak_mb": round(max(r[0][1] for r in runs), 1),
            "peak_mb_of_a_fifth_of_the_lines": round(few[1], 1),
        }
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
