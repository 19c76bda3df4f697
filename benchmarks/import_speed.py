"""Time `oirl.import_log` against pyarrow alone reading and writing the same rows, and measure its memory.

Prints one JSON document. `ratio` is pyarrow's seconds over oirl's: 1 is as fast as pyarrow alone, the target is 0.5.
Both sides read a whole file and write Parquet with zstd; each figure is the best of three runs, taken in turn.
Run from anywhere: `python benchmarks/import_speed.py [--rows N] [--formats parquet jsonl csv] [--memory-rows N]`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.json as pjson
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import oirl  # noqa: E402

TARGET_RATIO = 0.5
TARGET_MB = 1024
REPEATS = 3
PROMPTS = 20
CHUNK = 50_000
WORDS = (
    "the a of and to in is that for it as was with be by on not he his but at are this have from or had an they "
    "which one you were her all she there would their we him been has when who will more no if out so said what up "
    "its about into than them can only other new some could time these two may then do first any my now such like "
    "eggs dollars sells every market costs apples pencils hours miles remaining total each half twice"
).split()


def make_rows(rows: int, seed: int = 0) -> Iterator[pa.Table]:
    """Yield tables of rows: 20 prompts on each query, responses of about 400 characters, 20 MB of words to cut from."""
    rng = np.random.default_rng(seed)
    stock = " ".join(np.array(WORDS)[rng.integers(0, len(WORDS), 1_000_000)])
    prompts = [f"Way {i}: {stock[i * 90 : i * 90 + 80]}\n{{query}}" for i in range(PROMPTS)]
    for start in range(0, rows, CHUNK):
        n = min(CHUNK, rows - start)
        number = np.arange(start, start + n)
        at = rng.integers(0, len(stock) - 1000, (2, n // PROMPTS + 2))[0]
        where, length = rng.integers(0, len(stock) - 1000, n), rng.integers(200, 600, n)
        query_of = number // PROMPTS - start // PROMPTS
        queries = [f"Query {start // PROMPTS + i}: {stock[a : a + 180]}?" for i, a in enumerate(at)]
        yield pa.table(
            {
                "query": [queries[i] for i in query_of],
                "prompt": [prompts[i] for i in number % PROMPTS],
                "response": [
                    f"{stock[w : w + k]}.\nThe answer is {w % 97}." for w, k in zip(where, length, strict=True)
                ],
                "correct": rng.random(n) < 0.4,
                "answer": [str(i % 97) for i in number // PROMPTS],
                "model": ["llama-2-7b-chat"] * n,
                "tokens_out": (length // 4).astype(np.int32),
                "latency_s": rng.random(n).round(4),
            }
        )


def write_sources(folder: Path, rows: int, formats: list[str]) -> dict[str, Path]:
    """Write the same rows in each format."""
    files = {name: folder / f"rows.{name}" for name in formats}
    writers: dict[str, Any] = {}
    for table in make_rows(rows):
        for name, file in files.items():
            if name == "parquet":
                writer = writers.setdefault(name, None) or pq.ParquetWriter(file, table.schema, compression="zstd")
                writers[name] = writer
                writer.write_table(table)
            elif name == "csv":
                writer = writers.setdefault(name, None) or pcsv.CSVWriter(file, table.schema)
                writers[name] = writer
                writer.write_table(table)
            else:
                with file.open("a", encoding="utf-8") as out:
                    out.writelines(json.dumps(row) + "\n" for row in table.to_pylist())
    for writer in writers.values():
        writer.close()
    return files


def read_with_pyarrow(name: str, file: Path) -> pa.Table:
    """Read a file with pyarrow and nothing else."""
    if name == "parquet":
        return pq.read_table(file)
    if name == "csv":
        # Responses hold line breaks; without this option pyarrow does not read the file at all.
        return pcsv.read_csv(file, parse_options=pcsv.ParseOptions(newlines_in_values=True))
    return pjson.read_json(file)


def best_of(repeats: int, *tasks: Callable[[], Any]) -> list[float]:
    """Return the least seconds of each task; the tasks take turns, so that a busy machine hits all alike."""
    best = [float("inf")] * len(tasks)
    for _ in range(repeats):
        for i, task in enumerate(tasks):
            start = time.perf_counter()
            task()
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def compare(folder: Path, rows: int, formats: list[str]) -> dict[str, dict[str, Any]]:
    """Return seconds, ratio and whether the target is met, by format."""
    found = {}
    for name, file in write_sources(folder, rows, formats).items():

        def alone(name: str = name, file: Path = file) -> None:
            pq.write_table(read_with_pyarrow(name, file), folder / "alone.parquet", compression="zstd")

        def ours(file: Path = file) -> None:
            report = oirl.import_log(file, folder / "ours.parquet")
            if report.rows_kept != rows:
                sys.exit(f"{file.name}: {report.rows_kept} rows kept of {rows}: {report.reasons}")

        pyarrow_seconds, oirl_seconds = best_of(REPEATS, alone, ours)
        ratio = pyarrow_seconds / oirl_seconds
        found[name] = {
            "file_mb": round(file.stat().st_size / 2**20, 1),
            "pyarrow_seconds": round(pyarrow_seconds, 3),
            "oirl_seconds": round(oirl_seconds, 3),
            "ratio": round(ratio, 3),
            "meets_target": ratio >= TARGET_RATIO,
        }
    return found


def peak_mb(file: Path, out: Path) -> dict[str, float]:
    """Import a file in a process of its own and return its peak resident memory in MB, and the seconds."""
    code = (
        "import resource, sys, time; import oirl; from oirl.logs.importing import pipeline\n"
        "scale = 2**20 if sys.platform == 'darwin' else 2**10\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale\n"
        "start = time.perf_counter(); report = oirl.import_log(sys.argv[1], sys.argv[2])\n"
        "print(report.rows_kept, before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale,"
        " time.perf_counter() - start)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(file), str(out)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        sys.exit(f"the import failed: {done.stderr[-500:]}")
    rows, before, after, seconds = done.stdout.split()
    return {
        "rows_kept": int(rows),
        "before_mb": round(float(before), 1),
        "peak_mb": round(float(after), 1),
        "seconds": round(float(seconds), 1),
    }


def measure_memory(folder: Path, rows: int, formats: list[str]) -> dict[str, Any]:
    """Return the peak memory of importing `rows` rows, by format."""
    found: dict[str, Any] = {}
    for name in formats:
        # Written by another process: a child's peak on Linux begins with that of the process it came from.
        command = [sys.executable, __file__, "--write", str(folder), "--rows", str(rows), "--formats", name]
        subprocess.run(command, check=True)
        file = folder / f"rows.{name}"
        figures = peak_mb(file, folder / "ours.parquet")
        found[name] = {**figures, "meets_target": figures["peak_mb"] < TARGET_MB}
        file.unlink()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=300_000, help="rows to time; 0 leaves the timing out")
    parser.add_argument(
        "--formats", nargs="+", choices=["parquet", "jsonl", "csv"], default=["parquet", "jsonl", "csv"]
    )
    parser.add_argument(
        "--memory-rows", type=int, default=0, help="rows to import for the peak memory, such as 2000000"
    )
    parser.add_argument("--memory-formats", nargs="+", choices=["parquet", "jsonl", "csv"], default=["parquet"])
    parser.add_argument("--write", type=Path, help="only write the rows to this folder")
    options = parser.parse_args()
    if options.write:
        write_sources(options.write, options.rows, options.formats)
        return
    document: dict[str, Any] = {
        "oirl": oirl.__version__,
        "pyarrow": pa.__version__,
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "pyarrow_threads": pa.cpu_count(),
        "repeats": REPEATS,
        "target_ratio": TARGET_RATIO,
        "target_mb": TARGET_MB,
        "rows": options.rows,
    }
    with tempfile.TemporaryDirectory(prefix="oirl-import-") as folder:
        # Memory first, while this process is small.
        if options.memory_rows:
            document["memory_rows"] = options.memory_rows
            document["memory"] = measure_memory(Path(folder), options.memory_rows, options.memory_formats)
        if options.rows:
            document["formats"] = compare(Path(folder), options.rows, options.formats)
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
