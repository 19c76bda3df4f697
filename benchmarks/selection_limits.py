"""Why choosing gains no more on SVAMP: learning curve, whose queries gain, what is true and what is noise. Prints JSON.

* learning_curve: gain of the selector over the best single prompt by the number of training queries, ten folds.
* by_company: the same gain, by whether a near duplicate in other words, only the same words with other numbers, or
  nothing like the query stands in the log.
* variance: of the difference of two prompts' success over queries, what is true and what is the noise of few runs.
* choosing_by_runs: success of choosing by k runs of a query, scored on its other runs, and the ceiling beside it.
* oracle: the gain where the same text with other numbers may stand in training.

Run: python benchmarks/selection_limits.py [--data FOLDER] [--seeds 2] [--folds 10]
"""

from __future__ import annotations

import argparse
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from common import PROMPTS, add_data_argument, read_prompt_log

import oirl
from oirl.evaluation.ceilings import best_choice_ceiling
from oirl.logs.cells import Cells, make_cells
from oirl.logs.groups import group_queries
from oirl.logs.splits import assign_folds
from oirl.logs.text import mask_numbers
from oirl.statistics.intervals import standard_error

SIZES = (250, 500, 1000, 2000, None)


def gains(log: pa.Table, cells: Cells, fold: np.ndarray, size: int | None, seed: int) -> np.ndarray:
    """Return the held-out gain of each query over the best single prompt of its training folds, float (Q,)."""
    position = {name: i for i, name in enumerate(cells.query_ids)}
    of_row = np.array([position[name] for name in log["query_id"].to_pylist()])
    runs, successes = cells.matrices()
    rates = successes / runs
    found = np.empty(len(fold))
    rng = np.random.default_rng(seed)
    for f in range(int(fold.max()) + 1):
        train = np.flatnonzero(fold != f)
        if size is not None:
            train = rng.choice(train, min(size, len(train)), replace=False)
        selector = oirl.PromptSelector().fit(log.filter(pa.array(np.isin(of_row, train))))
        model = selector.model_
        order = [cells.prompt_ids.index(name) for name in model.prompt_ids_]
        inside = np.flatnonzero(fold == f)
        choice = selector.choose(model.predict_proba([cells.queries[i] for i in inside]))
        own = rates[inside][:, order]
        found[inside] = own[np.arange(len(own)), choice] - own[:, model.train_.best]
    return found


def summary(values: list[np.ndarray], groups: np.ndarray, chosen: np.ndarray | None = None) -> dict[str, float | int]:
    """Return the mean over cuts in points, with its standard error clustered by near duplicates."""
    mean = np.mean(values, axis=0)
    kept = np.ones(len(mean), dtype=bool) if chosen is None else chosen
    return {
        "queries": int(kept.sum()),
        "points": round(100 * float(mean[kept].mean()), 2),
        "standard_error": round(100 * float(standard_error(mean[kept], groups[kept])), 2),
    }


def company(cells: Cells, groups: np.ndarray) -> dict[str, np.ndarray]:
    """Return which queries have near duplicates in the log, bool (Q,) each."""
    masked = [mask_numbers(q) for q in cells.queries]
    same_text, in_group = Counter(masked), Counter(groups.tolist())
    same = np.array([same_text[m] for m in masked])
    group = np.array([in_group[g] for g in groups.tolist()])
    return {
        "near duplicates in other words": group > same,
        "the same words with other numbers only": (group == same) & (same > 1),
        "nothing like it": group == 1,
    }


def variance(cells: Cells, one: str, other: str) -> dict[str, float]:
    """Return the variance over queries of the difference of two prompts, and how much of it is noise of few runs."""
    runs, successes = cells.matrices()
    a, b = cells.prompt_ids.index(one), cells.prompt_ids.index(other)
    repeated = (runs[:, [a, b]] > 1).all(axis=1)
    n, x = runs[repeated], (successes / runs)[repeated]
    noise = sum((x[:, p] * (1 - x[:, p]) / (n[:, p] - 1)).mean() for p in (a, b))
    total = (x[:, a] - x[:, b]).var()
    return {"total": round(float(total), 4), "noise": round(float(noise), 4), "true": round(float(total - noise), 4)}


def choosing_by_runs(cells: Cells, k: int, rng: np.random.Generator) -> dict[str, float]:
    """Return the success of choosing by k runs of each prompt, scored on one other run, and that of the best prompt."""
    runs, successes = cells.matrices()
    enough = (runs > k).all(axis=1)
    n, s = runs[enough], successes[enough]
    prior = s.sum(axis=0) / n.sum(axis=0)
    total = 0.0
    for _ in range(50):
        seen = rng.hypergeometric(s, n - s, k)
        rest = (s - seen) / (n - k)
        total += rest[np.arange(len(n)), (seen + prior).argmax(axis=1)].mean()
    return {"chosen": round(total / 50, 4), "best_prompt": round(float((s / n).mean(axis=0).max()), 4)}


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_data_argument(parser)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--folds", type=int, default=10)
    arguments = parser.parse_args()
    log = read_prompt_log(arguments.data, "svamp")
    log = log.filter(pc.is_in(log["prompt_id"], pa.array(PROMPTS)))
    log = log.set_column(log.column_names.index("split"), "split", pa.nulls(len(log), pa.string()))
    cells = make_cells(log)
    groups = group_queries(cells.queries).labels
    masked = np.unique([mask_numbers(q) for q in cells.queries], return_inverse=True)[1]
    curve: dict[str, dict[str, object]] = {}
    whole: dict[str, list[np.ndarray]] = {}
    for name, keys in (("by_query", masked), ("by_group", groups)):
        curve[name] = {}
        for size in SIZES:
            cuts = [assign_folds(cells.query_ids, keys, arguments.folds, s) for s in range(arguments.seeds)]
            found = [gains(log, cells, fold, size, s) for s, fold in enumerate(cuts)]
            curve[name][str(size or "all")] = summary(found, groups)
            whole[name] = found
    exact = [assign_folds(cells.query_ids, np.arange(len(groups)), arguments.folds, s) for s in range(arguments.seeds)]
    rng = np.random.default_rng(0)
    runs, successes = cells.matrices()
    document = {
        "learning_curve": curve,
        "by_company": {
            name: {kind: summary(found, groups, mask) for kind, mask in company(cells, groups).items()}
            for name, found in whole.items()
        },
        "variance": {
            "CoT - direct": variance(cells, "CoT", "direct"),
            "APE - direct": variance(cells, "APE", "direct"),
        },
        "choosing_by_runs": {str(k): choosing_by_runs(cells, k, rng) for k in (1, 2, 3)},
        "ceiling": best_choice_ceiling(runs, successes, rng, groups).to_dict(),
        "oracle": {
            "other numbers in training": summary([gains(log, cells, f, None, s) for s, f in enumerate(exact)], groups)
        },
    }
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
