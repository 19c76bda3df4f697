"""What tests share: logs with a known truth, the command line as a user types it, and where real data is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

ROOT = Path(__file__).resolve().parents[1]
REAL_DATA = ROOT.parent / "shared" / "data"

ANIMALS = "cat dog horse cow goat sheep duck hen fox owl bear wolf frog crab seal".split()
PLACES = "barn field river hill wood shed lake park yard cave road farm port moor isle".split()
VERBS = "finds eats hides sells paints counts lifts drops moves breaks washes carries keeps throws draws".split()


def make_queries(n: int, seed: int = 0) -> list[str]:
    """Return distinct queries of two kinds, 'alpha' and 'beta', whose wording tells which prompt is better."""
    rng = np.random.default_rng(seed)
    queries: dict[str, None] = {}
    while len(queries) < n:
        a, b, c, d = rng.integers(0, 15, 4)
        kind = ["alpha", "beta"][len(queries) % 2]
        words = [f"the {ANIMALS[a]} in the {PLACES[b]} {VERBS[c]} {rng.integers(2, 99)} things"]
        words.append(f"near a {PLACES[d]} of kind {kind} {kind} {kind}")
        queries[", ".join(words) + f" with {ANIMALS[rng.integers(15)]} {VERBS[rng.integers(15)]}?"] = None
    return list(queries)


def make_log(n: int = 300, *, replicates: int = 2, seed: int = 0, effect: float = 0.4, base: float = 0.5) -> pa.Table:
    """Return a full log of three prompts with a known truth.

    Prompt `a` succeeds with `base` + `effect` on alpha queries and `base` − `effect` on beta ones, `b` the other way
    round, `c` with `base` + 0.05 on all: so `c` is the best single prompt, and choosing by kind gains effect − 0.05.
    """
    rng = np.random.default_rng(seed + 1)
    rows: dict[str, list[Any]] = {k: [] for k in ("query_id", "query", "prompt_id", "prompt", "correct", "replicate")}
    for i, query in enumerate(make_queries(n, seed)):
        sign = 1 if "alpha" in query else -1
        truth = {"a": base + sign * effect, "b": base - sign * effect, "c": base + 0.05}
        for prompt_id, p in truth.items():
            for replicate in range(replicates):
                rows["query_id"].append(f"q{i}")
                rows["query"].append(query)
                rows["prompt_id"].append(prompt_id)
                rows["prompt"].append(f"Use way {prompt_id}. {{query}}")
                rows["correct"].append(bool(rng.random() < p))
                rows["replicate"].append(replicate)
    table = pa.table({**rows, "replicate": pa.array(rows["replicate"], pa.int32())})
    return table.append_column("split", pa.nulls(len(table), pa.string()))


@pytest.fixture(scope="session")
def log() -> pa.Table:
    """Return a log where choosing per query pays."""
    return make_log()


@pytest.fixture(scope="session")
def null_log() -> pa.Table:
    """Return a log where no prompt does better on one kind of query than on the other."""
    return make_log(effect=0.0)


def run_oirl(*arguments: str | Path, stdin: str = "", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, as a user would."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / p) for p in (".", "cli", "data"))}
    return subprocess.run(
        [sys.executable, "-m", "oirl_cli", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder of real data, or skip."""
    if not REAL_DATA.is_dir():
        pytest.skip("needs the real data in ../shared/data")
    return REAL_DATA
