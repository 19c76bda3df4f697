"""What choosing the prompt per query gains on SVAMP, by how the folds are cut. Prints JSON.

Ten folds; in each, everything (model, strengths, margin, gate, best single prompt) is learned from the other nine.
Intervals are clustered by groups of near duplicates, whichever way the folds are cut. Three ways to cut them:

* by_query: queries that differ in numbers only stay together (the protocol of the earlier measurements);
* by_group: near duplicates stay together too, as `oirl split` does: the strictest;
* by_row: repeats of a query at random, as in the published split: runs of a test query stand in training. Shown as the
  leak that it is, together with a lookup table (the prompt that did best on this very query in training), which learns
  nothing about queries and gains nothing on the other splits.

Run: python benchmarks/svamp_selection.py [--data FOLDER] [--seeds 5] [--folds 10]
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from common import PROMPTS, add_data_argument, read_prompt_log

import oirl
from oirl.evaluation.policies import switch
from oirl.logs.cells import Cells, make_cells
from oirl.logs.groups import group_queries
from oirl.logs.splits import assign_folds, distinct_queries
from oirl.logs.text import mask_numbers
from oirl.selection.gate import MARGINS
from oirl.statistics.intervals import bootstrap_means, percentile_interval


def fold_of_rows(log: pa.Table, protocol: str, folds: int, seed: int) -> np.ndarray:
    """Return the fold of each row, int64 (rows,)."""
    keys, texts, index = distinct_queries(log)
    if protocol == "by_row":
        # A row of the question list is one repeat of a query under all prompts.
        repeat = index * 1000 + np.asarray(log["replicate"])
        return np.random.default_rng(seed).integers(0, folds, repeat.max() + 1)[repeat]
    if protocol == "by_group":
        groups = group_queries(texts).labels
    else:
        groups = np.unique([mask_numbers(t) for t in texts], return_inverse=True)[1]
    return assign_folds(keys, groups, folds, seed)[index]


def held_out_gains(log: pa.Table, fold: np.ndarray) -> dict[str, np.ndarray]:
    """Return per held-out query the gain of each policy over the best single prompt of the training folds.

    The entry "group" holds the group of near duplicates of each query, by which intervals are clustered.
    """
    keys, texts, _ = distinct_queries(log)
    group_of = dict(zip(keys, group_queries(texts).labels, strict=True))
    gains: dict[str, list[np.ndarray]] = {}
    for f in np.unique(fold):
        selector = oirl.PromptSelector().fit(log.filter(pa.array(fold != f)))
        model = selector.model_
        cells = make_cells(log.filter(pa.array(fold == f))).of_prompts(model.prompt_ids_)
        runs, successes = cells.matrices()
        full = (runs > 0).all(axis=1)
        rates, best = successes[full] / runs[full], model.train_.best
        queries = [q for q, keep in zip(cells.queries, full, strict=True) if keep]
        scores = model.predict_proba(queries)
        at = np.arange(len(rates))
        chosen = {f"margin {m}": switch(scores, best, m) for m in sorted(MARGINS)}
        chosen["selector"] = selector.choose(scores)
        deployed = selector.deployment_.policy == "selector"
        chosen["deployed"] = chosen["selector"] if deployed else np.full(len(rates), best)
        chosen["lookup"] = lookup(model.held_out_.cells, queries, best)
        chosen["knn"] = model.knn_.predict(queries).argmax(axis=1)
        for name, choice in chosen.items():
            gains.setdefault(name, []).append(rates[at, choice] - rates[:, best])
        gains.setdefault("best_prompt_value", []).append(rates[:, best])
        ids = [q for q, keep in zip(cells.query_ids, full, strict=True) if keep]
        gains.setdefault("group", []).append(np.array([group_of[q] for q in ids]))
        gains.setdefault("gate_open", []).append(np.array([float(deployed)]))
        gains.setdefault("switched", []).append((chosen["selector"] != best).astype(float))
    return {name: np.concatenate(parts) for name, parts in gains.items()}


def lookup(train: Cells, queries: list[str], best: int) -> np.ndarray:
    """Return the prompt that did best on the very same query in training; `best` for a new query."""
    runs, successes = train.matrices()
    rates = successes / np.maximum(runs, 1)
    position = {text: i for i, text in enumerate(train.queries)}
    rows = [position.get(query) for query in queries]
    return np.array([best if row is None else int(rates[row].argmax()) for row in rows])


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_data_argument(parser)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folds", type=int, default=10)
    parser.add_argument("--protocols", nargs="+", default=["by_query", "by_group", "by_row"])
    arguments = parser.parse_args()
    log = read_prompt_log(arguments.data, "svamp")
    log = log.filter(pc.is_in(log["prompt_id"], pa.array(PROMPTS)))
    # The published split leaks; it is left out so that `fit` sees all training rows.
    log = log.set_column(log.column_names.index("split"), "split", pa.nulls(len(log), pa.string()))
    document: dict[str, object] = {"queries": len(set(log["query_id"].to_pylist())), "rows": len(log)}
    for protocol in arguments.protocols:
        begin = time.perf_counter()
        runs = [held_out_gains(log, fold_of_rows(log, protocol, arguments.folds, s)) for s in range(arguments.seeds)]
        figures: dict[str, object] = {}
        for name in [n for n in runs[0] if n != "group"]:
            values = [run[name] for run in runs]
            summary: dict[str, object] = {"mean": float(np.mean([v.mean() for v in values]))}
            if name not in {"gate_open", "switched"}:
                ends = [
                    percentile_interval(bootstrap_means(v[:, None], np.random.default_rng(s), 2000, run["group"]))
                    for s, (v, run) in enumerate(zip(values, runs, strict=True))
                ]
                summary["by_seed"] = [
                    {"mean": float(v.mean()), "ci_low": float(low[0]), "ci_high": float(high[0])}
                    for v, (low, high) in zip(values, ends, strict=True)
                ]
            figures[name] = summary
        document[protocol] = {"seconds": time.perf_counter() - begin, "gain": figures}
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
