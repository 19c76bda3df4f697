"""Start-up, selection speed and peak memory on the GSM8K log. Prints JSON.

* startup: seconds of `import oirl` and of `oirl --help`, each a fresh process, beside an empty Python process;
* selection: queries per second for 16 prompts in a batch, milliseconds for one query, warm and as a cold command,
  beside scoring the same batch with a scikit-learn pipeline (TF-IDF and logistic regression on query and prompt);
* memory: peak resident memory of import, fit and select, each a fresh process.

Run: python benchmarks/speed_and_memory.py [--data FOLDER]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import add_data_argument, cpu_environment

import oirl
from oirl.selection.selector import Candidate

REPEATS = 7


def run_measured(*arguments: str) -> tuple[float, float]:
    """Run a Python process; return its seconds and its peak resident memory in MB."""
    script = (
        "import os, resource, subprocess, sys, time\n"
        "begin = time.perf_counter()\n"
        "done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)\n"
        "seconds = time.perf_counter() - begin\n"
        "if done.returncode: sys.exit(done.stderr)\n"
        "print(seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)\n"
    )
    command = [sys.executable, "-c", script, sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=cpu_environment(), check=True)
    seconds, memory = done.stdout.split()
    return float(seconds), float(memory)


def median_seconds(*arguments: str) -> float:
    """Return the median seconds of several runs of a Python process."""
    return float(np.median([run_measured(*arguments)[0] for _ in range(REPEATS)]))


def best_seconds(function, repeats: int = REPEATS) -> float:
    """Return the shortest of several timings of a call."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return min(times)


def sixteen_prompts(source: Path) -> list[Candidate]:
    """Return the sixteen prompts of the log."""
    import pyarrow.parquet as pq

    table = pq.read_table(source, columns=["prompt_id", "prompt"]).group_by(["prompt_id", "prompt"]).aggregate([])
    return [Candidate(row["prompt_id"], row["prompt"]) for row in table.to_pylist()]


def sklearn_pipeline(log, queries: list[str], prompts: list[Candidate]):
    """Return a call that scores all queries under all prompts with a pipeline that many would write."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    rows = log.slice(0, 20_000)
    texts = [f"{q} {p}" for q, p in zip(rows["query"].to_pylist(), rows["prompt"].to_pylist(), strict=True)]
    pipeline = make_pipeline(TfidfVectorizer(ngram_range=(1, 3), min_df=2), LogisticRegression(max_iter=200))
    pipeline.fit(texts, rows["correct"].to_pylist())
    return lambda: pipeline.predict_proba([f"{q} {c.prompt}" for q in queries for c in prompts])


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_data_argument(parser)
    source = parser.parse_args().data / "prompt_oirl_llama2" / "gsm8k.parquet"
    if not source.is_file():
        sys.exit(f"{source} is missing; name the folder of real data with --data")
    with tempfile.TemporaryDirectory() as folder:
        log_path, model_path = f"{folder}/log.parquet", f"{folder}/model"
        cli = ("-m", "oirl_cli")
        memory = {"import_mb": run_measured(*cli, "import", str(source), "--out", log_path)[1]}
        memory["fit_mb"] = run_measured(*cli, "fit", log_path, "--out", model_path)[1]
        log = oirl.read_log(log_path)
        queries = list(dict.fromkeys(log["query"].to_pylist()))[-2000:]
        queries_file = Path(folder) / "queries.jsonl"
        queries_file.write_text("".join(json.dumps({"query": q}) + "\n" for q in queries))
        memory["select_2000_mb"] = run_measured(*cli, "select", model_path, "--in", str(queries_file))[1]
        prompts = sixteen_prompts(source)
        selector = oirl.load(model_path)
        selector.select(queries[:1], prompts)
        batch = best_seconds(lambda: selector.select(queries, prompts))
        peer = best_seconds(sklearn_pipeline(log, queries, prompts), 3)
        document = {
            "startup": {
                "python_seconds": median_seconds("-c", "pass"),
                "import_oirl_seconds": median_seconds("-c", "import oirl"),
                "oirl_help_seconds": median_seconds(*cli, "--help"),
            },
            "selection": {
                "batch_queries": len(queries),
                "prompts": len(prompts),
                "queries_per_second": len(queries) / batch,
                "sklearn_pipeline_queries_per_second": len(queries) / peer,
                "times_faster_than_sklearn_pipeline": peer / batch,
                "one_query_warm_ms": 1000 * best_seconds(lambda: selector.select(queries[:1], prompts), 50),
                "one_query_cold_command_ms": 1000 * median_seconds(*cli, "select", model_path, queries[0]),
            },
            "memory": memory | {"this_process_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024},
        }
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
