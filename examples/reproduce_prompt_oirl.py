"""Reproduce Prompt-OIRL on its own logs, as published and without the leak. Prints a table, or JSON with --json.

Both protocols value the same policies on the same log:

* published: the log's own `split` column. On SVAMP every test query also stands in the training part.
* leak-free: queries are split by `oirl.split`, near duplicates on one side, over several seeds.

The policies: the best single prompt of the training part (what everything is compared with), the published recipe
(XGBoost of depth 10, learning rate 0.001, on features of query and prompt side by side, argmax over prompts), oirl's
default, and a lookup table that takes the prompt which did best on this very query in training, and knows nothing else.

Run: python examples/reproduce_prompt_oirl.py SVAMP.parquet [--rounds 2000] [--seeds 3] [--json]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

import oirl
from oirl.logs.cells import make_cells
from oirl.logs.groups import group_queries
from oirl.statistics.intervals import bootstrap_means, percentile_interval

PUBLISHED = ["direct", "CoT", "APE", "Dis", "ToT", "Decomp"]
"""The six training prompts of the paper; other logs are used with all of theirs."""


def read(source: str) -> pa.Table:
    """Return a log of any format that oirl imports, with the six published prompts only where it has them."""
    with tempfile.TemporaryDirectory() as folder:
        oirl.import_log(source, Path(folder) / "log.parquet")
        log = oirl.read_log(Path(folder) / "log.parquet")
    chosen = pc.is_in(log["prompt_id"], pa.array(PUBLISHED))
    return log.filter(chosen) if pc.sum(chosen).as_py() else log


def lookup_gain(train: pa.Table, test: pa.Table, best: str, seed: int) -> dict[str, float]:
    """Return value and gain of the lookup table, by replay of the complete test queries."""
    known = make_cells(train)
    runs, successes = known.matrices()
    favourite = (successes / np.maximum(runs, 1)).argmax(axis=1)
    prompt_of = {text: known.prompt_ids[p] for text, p in zip(known.queries, favourite, strict=True)}
    cells = make_cells(test).of_prompts(known.prompt_ids)
    runs, successes = cells.matrices()
    complete = (runs > 0).all(axis=1)
    rates = (successes / np.maximum(runs, 1))[complete]
    queries = [text for text, keep in zip(cells.queries, complete, strict=True) if keep]
    taken = np.array([cells.prompt_ids.index(prompt_of.get(text, best)) for text in queries])
    value = rates[np.arange(len(rates)), taken]
    gain = value - rates[:, cells.prompt_ids.index(best)]
    clusters = group_queries(queries).labels
    low, high = percentile_interval(bootstrap_means(gain[:, None], np.random.default_rng(seed), 2000, clusters))
    return {
        "value": float(value.mean()),
        "gain": float(gain.mean()),
        "gain_ci_low": float(low[0]),
        "gain_ci_high": float(high[0]),
    }


def run(train: pa.Table, test: pa.Table, rounds: int, seed: int) -> dict[str, Any]:
    """Return the policies' values on `test`, learned from `train`."""
    recipe = oirl.PromptRewardModel("xgboost-published", params={"rounds": rounds}, folds=2, seed=seed)
    published = oirl.evaluate(oirl.PromptSelector(recipe, margins=(0.0,)).fit(train), test, seed=seed)
    ours = oirl.evaluate(oirl.PromptSelector(oirl.PromptRewardModel(seed=seed)).fit(train), test, seed=seed)
    best = ours.policies["best_prompt"]
    return {
        "best single prompt": best,
        "published recipe": published.policies["selector"],
        "lookup table": lookup_gain(train, test, best["prompt_id"], seed),
        "oirl, choosing": ours.policies["selector"],
        "oirl, as the gate deploys": ours.policies["deployed"],
        "test queries": ours.n_queries,
    }


def without_split(log: pa.Table) -> pa.Table:
    """Return the log without its own split."""
    return log.set_column(log.column_names.index("split"), "split", pa.nulls(len(log), pa.string()))


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", help="a file that oirl imports, with a split column")
    parser.add_argument("--rounds", type=int, default=2000, help="trees of the published recipe; 2000 take 40 minutes")
    parser.add_argument("--seeds", type=int, default=3, help="leak-free splits")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    log = read(arguments.log)
    train, test = (without_split(log.filter(pc.equal(log["split"], name))) for name in ("train", "test"))
    found: dict[str, Any] = {"rows": len(log), "rounds": arguments.rounds}
    if len(train) and len(test):
        found["published"] = [run(train, test, arguments.rounds, 0)]
    else:
        print("the log has no split into train and test: the published protocol is left out", file=sys.stderr)
    splits = [oirl.split(without_split(log), test=0.2, seed=seed) for seed in range(arguments.seeds)]
    found["leak-free"] = [
        run(without_split(a), without_split(b), arguments.rounds, seed) for seed, (a, b) in enumerate(splits)
    ]
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    for protocol in ("published", "leak-free"):
        for seed, policies in enumerate(found.get(protocol, [])):
            print(f"\n{protocol}, {policies.pop('test queries'):,} test queries, seed {seed}")
            for name, p in policies.items():
                interval = f"[{100 * p['gain_ci_low']:+.2f}, {100 * p['gain_ci_high']:+.2f}]"
                print(f"  {name:28} {100 * p['value']:6.2f}%   gain {100 * p['gain']:+6.2f} points {interval}")


if __name__ == "__main__":
    main()
