"""Which of sixteen replies to a GSM8K query is right? Models of responses on LLaMA-2 replies. Prints JSON.

The test part of the Prompt-OIRL log: 1,000 queries, one reply under each of 16 prompts. Ten folds by groups of near
duplicates; each reply is scored by a model that has learned from the other nine. Choosing among all 16 is compared with
a random reply, the best single prompt of the other folds, the majority vote and, as nulls, a vote weighted by each
prompt's success, and models that learned from verdicts moved to other queries as whole blocks (which keeps what
prompts are worth). Intervals are those of queries; what another draw of folds or moves would change is not in them.

Twice: with the verdicts as logged (last number of the reply against last number of the gold answer), and as regraded by
oirl's numeric checker, since what predicts a verdict may be how the answer is written rather than whether it is right.
Intervals are paired and clustered by query.

Run: python benchmarks/gsm8k_responses.py [--data FOLDER] [--tfidf]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from common import add_data_argument, import_data

import oirl
from oirl.evaluation.responses import best_of_n_document
from oirl.logs.checkers import numeric
from oirl.logs.groups import group_queries
from oirl.logs.splits import assign_folds
from oirl.rewards.base import Estimates
from oirl.rewards.calibration import cross_fit_platt
from oirl.rewards.committee import fit_committee
from oirl.rewards.learners import LinearLearner, Verdicts
from oirl.rewards.response_checks import CHECKS, check_response
from oirl.rewards.responses import RESPONSE_COLUMNS, DistinctResponses, response_metrics
from oirl.statistics.intervals import normal_interval

FOLDS, NULLS = 10, 5
MODELS = {
    "linear on checks (default)": ("linear", "checks"),
    "xgboost on checks": ("xgboost", "checks"),
    "mlp on checks": ("mlp", "checks"),
}


def cross_fitted(log: pa.Table, model: str, embedder: str) -> tuple[Estimates, float]:
    """Return estimates of the distinct responses by members that have not seen their fold, and seconds of the fit."""
    start = time.perf_counter()
    fitted = oirl.ResponseRewardModel(model, embedder=embedder, folds=FOLDS).fit(log)
    probability = np.clip(fitted.held_out_.probability, 1e-9, 1 - 1e-9)
    reward = np.log(probability / (1 - probability))
    return Estimates(reward, np.zeros(len(reward))), time.perf_counter() - start


def ablated(log: pa.Table, names: Sequence[str], fold: np.ndarray, groups: np.ndarray) -> Estimates:
    """Return estimates by the default learner on some of the checks alone."""
    rows = DistinctResponses(log)
    texts = [rows.queries[q] for q in rows.query]
    checks = np.array([check_response(q, r) for q, r in zip(texts, rows.responses, strict=True)])
    kept = checks[:, [CHECKS.index(name) for name in names]]
    z = np.clip((kept - kept.mean(axis=0)) / np.maximum(kept.std(axis=0), 1e-9), -5, 5).astype(np.float32)
    target = Verdicts(rows.runs, rows.successes)
    of_row = fold[rows.query]
    _, scores = fit_committee(LinearLearner(), z, target, of_row, groups[rows.query], 0)
    _, of_fold = cross_fit_platt(scores, rows.runs, rows.successes, of_row)
    slopes, intercepts = np.array(of_fold).T
    return Estimates(slopes[of_row] * scores + intercepts[of_row], np.zeros(len(scores)))


def prompt_weights(log: pa.Table, fold: np.ndarray) -> Estimates:
    """Return as reward the log-odds of each response's prompt in the other folds."""
    rows = DistinctResponses(log)
    prompts = np.asarray(log["prompt_id"].combine_chunks().dictionary_encode().indices)
    right = log["correct"].combine_chunks().to_numpy(zero_copy_only=False).astype(float)
    rate = np.empty(len(log))
    of_row = fold[rows.query[rows.row]]
    for f in range(FOLDS):
        mean = np.bincount(prompts[of_row != f], right[of_row != f]) / np.bincount(prompts[of_row != f])
        rate[of_row == f] = mean[prompts[of_row == f]]
    first = np.unique(rows.row, return_index=True)[1]
    return Estimates(np.log(rate / (1 - rate))[first], np.zeros(len(first)))


def moved(log: pa.Table, seed: int) -> pa.Table:
    """Return the log with the verdicts of each query given to another query, block by block, prompt by prompt."""
    order = log.sort_by([("query_id", "ascending"), ("prompt_id", "ascending")])
    right = order["correct"].combine_chunks().to_numpy(zero_copy_only=False).reshape(-1, 16)
    blocks = np.random.default_rng(seed).permutation(len(right))
    return order.set_column(order.column_names.index("correct"), "correct", pa.array(right[blocks].ravel()))


def shown(log: pa.Table, estimates: Estimates, groups: np.ndarray, best: np.ndarray) -> dict[str, Any]:
    """Return metrics, and what choosing among all replies is worth."""
    rows = DistinctResponses(log)
    data = {"answers": "numeric", "best_prompt": "direct"}
    document, _ = best_of_n_document(log, rows, estimates, groups, data, np.random.default_rng(0), 2000)
    assert document is not None
    counted = (estimates.probability, rows.runs, rows.successes, rows.query)
    metrics = response_metrics(*counted, rows.successes.sum() / rows.runs.sum())
    policies = {
        name: {k: round(v, 4) for k, v in policy.items()}
        for name, policy in document["policies"].items()
        if name != "best_prompt"
    }
    low, high = normal_interval(best, groups)
    policies["best_prompt"] = {"value": best.mean(), "ci_low": float(low), "ci_high": float(high)}
    return {
        "metrics": {k: None if v is None else round(v, 4) for k, v in metrics.items()},
        "choosing among 16": policies,
        "best_of_n by N": {r["n"]: round(r["best_of_n"]["value"], 4) for r in document["curve"]},
        "over_optimisation": document["over_optimisation"],
    }


def moved_nulls(log: pa.Table) -> dict[str, Any]:
    """Return what models gain that learned from moved verdicts: mean and range over several ways to move them."""
    true_log = log.sort_by([("query_id", "ascending"), ("prompt_id", "ascending")])
    gains: dict[str, list[float]] = {}
    for seed in range(NULLS):
        null_log = moved(log, seed)
        rows = DistinctResponses(null_log)
        groups = group_queries(rows.queries).labels
        fold = assign_folds(rows.query_ids, groups, FOLDS, 0)
        estimates, _ = cross_fitted(null_log, "linear", "checks")
        policies = shown(true_log, estimates, groups, best_prompt(true_log, fold))["choosing among 16"]
        for name in ("best_of_n", "weighted_majority"):
            gains.setdefault(f"{name} over majority", []).append(policies[name]["over_majority"])
            gains.setdefault(f"{name} over a random one", []).append(policies[name]["gain"])
    return {name: {"mean": round(float(np.mean(v)), 4), "from": min(v), "to": max(v)} for name, v in gains.items()}


def best_prompt(log: pa.Table, fold: np.ndarray) -> np.ndarray:
    """Return each query's verdict under the best single prompt of the other folds, float (Q,)."""
    rows = DistinctResponses(log)
    query = rows.query[rows.row]
    prompts = log["prompt_id"].combine_chunks().dictionary_encode()
    table = np.zeros((len(rows.queries), len(prompts.dictionary)))
    table[query, np.asarray(prompts.indices)] = log["correct"].combine_chunks().to_numpy(zero_copy_only=False)
    chosen = np.array([table[fold != f].mean(axis=0).argmax() for f in range(FOLDS)])
    return table[np.arange(len(table)), chosen[fold]]


def measure(log: pa.Table, models: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """Return the figures of all models on one set of verdicts."""
    rows = DistinctResponses(log)
    groups = group_queries(rows.queries).labels
    fold = assign_folds(rows.query_ids, groups, FOLDS, 0)
    best = best_prompt(log, fold)
    found: dict[str, Any] = {}
    for name, (model, embedder) in models.items():
        estimates, seconds = cross_fitted(log, model, embedder)
        found[name] = shown(log, estimates, groups, best) | {"seconds": round(seconds, 1)}
    calculations = CHECKS[CHECKS.index("equations") :]
    others = CHECKS[: CHECKS.index("equations")]
    for name, kept in (("form and numbers", others), ("calculations", calculations)):
        found[f"linear on checks of {name} alone"] = shown(log, ablated(log, kept, fold, groups), groups, best)
    found["null: weight by prompt"] = shown(log, prompt_weights(log, fold), groups, best)
    found[f"null: verdicts of other queries, {NULLS} draws"] = moved_nulls(log)
    return found


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_argument(parser)
    parser.add_argument("--tfidf", action="store_true", help="n-grams of query and response too (minutes)")
    arguments = parser.parse_args()
    source: Path = arguments.data / "prompt_oirl_llama2" / "gsm8k.parquet"
    log = import_data(source, [*RESPONSE_COLUMNS])
    log = log.filter(pc.and_(pc.equal(log["split"], "test"), pc.is_valid(log["response"])))
    verdicts = [
        numeric(r, a).correct for r, a in zip(log["response"].to_pylist(), log["answer"].to_pylist(), strict=True)
    ]
    regraded = log.set_column(log.column_names.index("correct"), "correct", pa.array(verdicts))
    models = MODELS | ({"linear on tfidf": ("linear", "tfidf")} if arguments.tfidf else {})
    document = {"as logged": measure(log, models), "regraded": measure(regraded, models)}
    print(json.dumps({"queries": 1000, "responses": len(log), "folds": FOLDS} | document, indent=2))


if __name__ == "__main__":
    main()
