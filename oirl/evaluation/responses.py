"""Evaluate a reward model of responses on a log: its metrics, and what choosing among N responses by it is worth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from scipy.special import expit
from scipy.stats import spearmanr

from oirl.errors import NotFittedError
from oirl.evaluation.best_of_n import (
    Candidates,
    best_of_n_kl,
    curves,
    fit_over_optimisation,
    sizes_up_to,
    turns_down,
)
from oirl.logs.checkers import stated_answer
from oirl.logs.groups import group_queries
from oirl.logs.splits import find_leaks, test_rows
from oirl.logs.store import conform_table
from oirl.rewards.base import Estimates
from oirl.rewards.responses import RESPONSE_COLUMNS, DistinctResponses, graded_responses, response_metrics
from oirl.rewards.training import SeenQueries, check_seed
from oirl.statistics import metrics
from oirl.statistics.intervals import (
    MIN_QUERIES,
    bootstrap_counts,
    bootstrap_means,
    percentile_interval,
    reliability_bins,
    standard_error,
    success_interval,
)

POLICIES = ("random", "best_prompt", "best_of_n", "majority", "weighted_majority", "oracle")
_METRIC_DRAWS, _PAIR_DRAWS = 200, 1000


class ResponseModel(Protocol):
    """What is needed of a reward model of responses; `oirl.ResponseRewardModel` is one."""

    seen_: SeenQueries
    data_: dict[str, Any]

    def estimate(self, queries: list[str], responses: list[str]) -> Estimates:
        """Return reward and spread of each response."""
        ...


@dataclass(slots=True)
class ResponseEvaluation:
    """What `evaluate_responses` found; `to_dict` gives the JSON document.

    Attributes:
        n_rows: Rows with a response and a verdict.
        n_queries: Distinct queries among them.
        model: Metrics over rows.
        intervals: Name of a metric -> [low, high] of its 95% interval, from resamples of queries.
        null_models: The AUCs of knowing only the response's length (the direction `prefers` is that of the training
            log, within queries), or only the prompt (its success in the training log).
        length_correlation: Rank correlation of reward and length, over all responses and within queries.
        reliability: Predicted and observed success (`oirl.statistics.intervals.reliability_bins`).
        best_of_n: What choosing among N is worth (`best_of_n_document`); None where queries have one response.
        warnings: What limits the figures.
        left_out: Reason -> rows that nothing was counted of.
    """

    n_rows: int
    n_queries: int
    model: dict[str, float | None]
    intervals: dict[str, list[float]]
    null_models: dict[str, dict[str, Any]]
    length_correlation: dict[str, float | None]
    reliability: list[dict[str, float]]
    best_of_n: dict[str, Any] | None
    warnings: list[str] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the evaluation as a dictionary for JSON; what cannot be known is None."""
        return asdict(self)


def evaluate_responses(model: ResponseModel, log: pa.Table, *, seed: int = 0, draws: int = 1000) -> ResponseEvaluation:
    """Evaluate a fitted reward model of responses on the test rows of a log (all rows where none is marked).

    Args:
        model: A fitted or loaded `oirl.ResponseRewardModel`, or anything like it.
        log: Interactions with responses and verdicts.
        seed: For the bootstrap and for the subsets of responses that votes are averaged over.
        draws: Resamples of queries for intervals of means.

    Raises:
        NotFittedError: If the model is not fitted.
        DataError: If no row has a response and a verdict.
    """
    if not hasattr(model, "seen_"):
        raise NotFittedError("evaluate needs a fitted model: call fit(log), or oirl.load(folder), first")
    check_seed(seed)
    rng = np.random.default_rng(seed)
    log = conform_table(log, RESPONSE_COLUMNS)
    warnings = [w for w in [find_leaks(log).warning()] if w]
    rows, left_out = graded_responses(test_rows(log))
    distinct = DistinctResponses(rows)
    grouping = group_queries(distinct.queries)
    warnings += [w for w in (model.seen_.warning(distinct.queries), grouping.warning()) if w]
    if len(np.unique(grouping.labels)) < MIN_QUERIES:
        warnings.append(f"intervals of fewer than {MIN_QUERIES} unlike queries are too narrow to be relied upon")
    texts = [distinct.queries[q] for q in distinct.query]
    estimates = model.estimate(texts, distinct.responses)
    rate = float(model.data_["success"])
    counted = (estimates.probability, distinct.runs, distinct.successes, distinct.query)
    lengths = np.array([len(r) for r in distinct.responses], dtype=np.float64)
    sure = getattr(model, "chosen_probability", lambda reward, _: expit(reward))
    chosen, limits = best_of_n_document(rows, distinct, estimates, grouping.labels, model.data_, rng, draws, sure)
    return ResponseEvaluation(
        n_rows=len(rows),
        n_queries=len(distinct.queries),
        model=response_metrics(*counted, rate),
        intervals=_metric_intervals(*counted, rate, grouping.labels, rng),
        null_models={
            "length": _length_aucs(lengths, distinct, float(model.data_["longer_preferred"])),
            "prompt": _prompt_aucs(rows, model.data_["prompts"]),
        },
        length_correlation=length_correlation(estimates.reward, lengths, distinct.query),
        reliability=reliability_bins(
            estimates.probability, distinct.successes / distinct.runs, distinct.runs, grouping.labels[distinct.query]
        ),
        best_of_n=chosen,
        warnings=warnings + limits,
        left_out=dict(left_out),
    )


def length_correlation(reward: np.ndarray, length: np.ndarray, query: np.ndarray) -> dict[str, float | None]:
    """Return Spearman's correlation of reward and length over all responses, and its mean over queries."""
    within = []
    order = np.argsort(query, kind="stable")
    for part in np.split(order, np.flatnonzero(np.diff(query[order])) + 1):
        value = _spearman(reward[part], length[part])
        within += [] if value is None else [value]
    return {"all": _spearman(reward, length), "within_query": float(np.mean(within)) if within else None}


def best_of_n_document(
    rows: pa.Table,
    distinct: DistinctResponses,
    estimates: Estimates,
    groups: np.ndarray,
    data: dict[str, Any],
    rng: np.random.Generator,
    draws: int,
    sure: Callable[[np.ndarray, int], np.ndarray] = lambda reward, _: expit(reward),
) -> tuple[dict[str, Any] | None, list[str]]:
    """Return what choosing among N logged responses is worth, and warnings; None where there is no choice.

    Every row of the log is a candidate of its query, whatever its prompt. As many responses (M) are taken of each query
    as at least half of the queries have, drawn at random where a query has more; queries with fewer are left out.

    Returns:
        `n` (M), `n_queries`, `left_out` (queries), `answers` (how they were read), `policies` (at N = M: value, gain
        over `random`, gain over `majority`, each with its interval), `curve` (for each N: `kl` and the policies),
        `over_optimisation` (`alpha`, `beta`, `turns_down`, and `peak_kl` where it does), `chosen` (of the response with
        the highest reward among all M: the mean `score` that `oirl rank` gives it, its `success`, and both in bins).
    """
    query = distinct.query[distinct.row]
    counts = np.bincount(query, minlength=len(distinct.queries))
    most = int(np.sort(counts)[::-1][(len(counts) - 1) // 2])
    if most < 2:
        return None, ["most queries have one response: there is nothing to choose from"]
    picked = _picks(query, counts, most, rng)
    candidates = _candidates(rows, distinct, estimates, picked, str(data["answers"]))
    asked = query[picked[:, 0]]
    sizes = sizes_up_to(most)
    worth = curves(candidates, sizes, rng)
    worth["best_prompt"] = _best_prompt(rows, asked, query, data["best_prompt"], len(sizes))
    clusters = groups[asked]
    names = [name for name in POLICIES if not np.isnan(worth[name]).any()]
    limits = [] if "best_prompt" in names else [f"not all queries were run under {data['best_prompt']}: no best_prompt"]
    last = np.stack([worth[name][:, -1] for name in names], axis=1)
    gains = np.hstack([last, last - worth["random"][:, -1:], last - worth["majority"][:, -1:]])
    low, high = percentile_interval(bootstrap_means(gains, rng, draws, clusters))
    table = np.stack([gains.mean(axis=0), low, high])
    for i in range(len(names)):
        table[:, i] = success_interval(last[:, i], clusters)
    policies = {
        name: _shown("", table[:, i]) | _shown("gain", table[:, k + i]) | _shown("over_majority", table[:, 2 * k + i])
        for k in [len(names)]
        for i, name in enumerate(names)
    }
    document = {
        "n": most,
        "n_queries": len(asked),
        "left_out": int(len(counts) - len(asked)),
        "answers": data["answers"],
        "policies": policies,
        "curve": _curve(worth, names, sizes, clusters, rng, draws),
        "chosen": _chosen(candidates, clusters, sure),
    }
    document["over_optimisation"], warning = _over_optimisation(worth, sizes, clusters)
    return document, limits + ([warning] if warning else [])


def _curve(
    worth: dict[str, np.ndarray],
    names: list[str],
    sizes: list[int],
    clusters: np.ndarray,
    rng: np.random.Generator,
    draws: int,
) -> list[dict[str, Any]]:
    shown = ["proxy", *names]
    proxy = [worth["proxy"].mean(axis=0), *percentile_interval(bootstrap_means(worth["proxy"], rng, draws, clusters))]
    columns = np.hstack([worth[name] for name in names])
    success = np.array([success_interval(column, clusters) for column in columns.T]).T.reshape(
        3, len(names), len(sizes)
    )
    table = np.concatenate([np.stack(proxy)[:, None], success], axis=1)
    kl = best_of_n_kl(sizes)
    return [
        {"n": n, "kl": float(kl[j])} | {name: _shown("", table[:, i, j]) for i, name in enumerate(shown)}
        for j, n in enumerate(sizes)
    ]


def _chosen(
    candidates: Candidates, clusters: np.ndarray, sure: Callable[[np.ndarray, int], np.ndarray]
) -> dict[str, Any]:
    """Return how the score of the response with the highest reward compares with its success."""
    best = candidates.reward.argmax(axis=1)
    every = np.arange(len(best))
    score = sure(candidates.reward[every, best], candidates.reward.shape[1])
    right = candidates.gold[every, best]
    value, low, high = success_interval(right, clusters)
    bins = reliability_bins(score, right, np.ones(len(right), dtype=np.int64), clusters)
    return {"score": float(score.mean()), "success": value, "ci_low": low, "ci_high": high, "reliability": bins}


def _over_optimisation(
    worth: dict[str, np.ndarray], sizes: list[int], clusters: np.ndarray
) -> tuple[dict[str, Any] | None, str | None]:
    """Return the fit of Gao et al., and a sentence where gold surely falls while the proxy rises."""
    gold = worth["best_of_n"].mean(axis=0)
    fit = fit_over_optimisation(best_of_n_kl(sizes), gold - gold[0])
    if fit is None:
        return None, None
    # The best N was picked among several: the interval must hold for all of them together (Bonferroni).
    z = float(np.sqrt(2) * _inverse_erf(1 - 0.05 / len(sizes)))

    def lower_end(loss: np.ndarray) -> float:
        return float(loss.mean() - z * standard_error(loss, clusters))

    turned = turns_down(worth["proxy"], worth["best_of_n"], lower_end)
    found = asdict(fit) | {"turns_down": turned is not None, "peak_kl": fit.peak_kl if turned else None}
    if turned is None:
        return found, None
    best, loss = turned
    return found, (
        f"choosing by the reward harms beyond N = {sizes[best]}: at N = {sizes[-1]} the reward is higher and success "
        f"{100 * loss:.1f} points lower (over-optimisation)"
    )


def _inverse_erf(value: float) -> float:
    from scipy.special import erfinv

    return float(erfinv(value))


def _picks(query: np.ndarray, counts: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """Return the rows taken of each query that has enough, int64 (Q, most), in random order."""
    order = np.lexsort((rng.random(len(query)), query))
    starts = np.cumsum(counts) - counts
    enough = np.flatnonzero(counts >= most)
    return order[starts[enough][:, None] + np.arange(most)]


def _candidates(
    rows: pa.Table, distinct: DistinctResponses, estimates: Estimates, picked: np.ndarray, kind: str
) -> Candidates:
    right = rows["correct"].combine_chunks().to_numpy(zero_copy_only=False).astype(np.float64)
    said = [stated_answer(text, kind) for text in distinct.responses]
    codes: dict[str, int] = {}
    code = np.array([-1 if a is None else codes.setdefault(a, len(codes)) for a in said], dtype=np.int64)
    response = distinct.row[picked]
    answers = code[response]
    for row in answers:
        known = row >= 0
        row[known] = np.unique(row[known], return_inverse=True)[1]
    return Candidates(estimates.reward[response], right[picked], answers, estimates.probability[response])


def _best_prompt(rows: pa.Table, asked: np.ndarray, query: np.ndarray, prompt: str, sizes: int) -> np.ndarray:
    """Return the success of each query under one prompt, float (Q, sizes); NaN where it was not run."""
    under = np.asarray(rows["prompt_id"].to_numpy() == prompt)
    right = rows["correct"].combine_chunks().to_numpy(zero_copy_only=False).astype(np.float64)
    size = int(query.max()) + 1
    runs = np.bincount(query[under], minlength=size)
    rate = np.full(size, np.nan)
    np.divide(np.bincount(query[under], right[under], minlength=size), runs, out=rate, where=runs > 0)
    return np.repeat(rate[asked][:, None], sizes, axis=1)


def _metric_intervals(
    probability: np.ndarray,
    runs: np.ndarray,
    successes: np.ndarray,
    query: np.ndarray,
    rate: float,
    groups: np.ndarray,
    rng: np.random.Generator,
) -> dict[str, list[float]]:
    """Return 95% intervals by resamples of queries; of the ECE there is none, as resampling adds to it.

    `groups` holds the group of near duplicates of each query, int (Q,).
    """
    drawn: dict[str, list[float]] = {}
    for count in bootstrap_counts(groups[query], rng, _METRIC_DRAWS):
        there = count > 0
        weight = count[there]
        part = response_metrics(probability[there], runs[there] * weight, successes[there] * weight, query[there], rate)
        for name in ("auc", "brier", "brier_skill", "log_loss"):
            value = part[name]
            drawn.setdefault(name, []).extend([] if value is None else [value])
    found = {name: [float(e) for e in np.quantile(values, [0.025, 0.975])] for name, values in drawn.items() if values}
    # Drawn twice, a query brings its own pairs twice: it is not compared with itself.
    within = metrics.pairs_within(probability, runs, successes, query)
    sums = bootstrap_means(within, rng, _PAIR_DRAWS, groups[np.unique(query)])
    ratios = sums[sums[:, 1] > 0]
    if len(ratios):
        ends = np.quantile(ratios[:, 0] / ratios[:, 1], [0.025, 0.975])
        found["auc_within_query"] = [float(end) for end in ends]
    return found


def _prompt_aucs(rows: pa.Table, success: dict[str, float]) -> dict[str, float | None]:
    mean = float(np.mean(list(success.values())))
    score = np.array([success.get(name, mean) for name in rows["prompt_id"].to_pylist()])
    query = np.asarray(rows["query_id"].combine_chunks().dictionary_encode().indices, dtype=np.int64)
    right = rows["correct"].combine_chunks().to_numpy(zero_copy_only=False).astype(np.int64)
    return _aucs(score, np.ones(len(rows), dtype=np.int64), right, query)


def _length_aucs(lengths: np.ndarray, distinct: DistinctResponses, share: float) -> dict[str, Any]:
    longer = share >= 0.5
    found = _aucs(lengths if longer else -lengths, distinct.runs, distinct.successes, distinct.query)
    return found | {"prefers": "longer" if longer else "shorter"}


def _aucs(score: np.ndarray, runs: np.ndarray, successes: np.ndarray, query: np.ndarray) -> dict[str, float | None]:
    return metrics.known(
        {
            "auc": metrics.auc(score, runs, successes),
            "auc_within_query": metrics.auc_within(score, runs, successes, query),
        }
    )


def _shown(name: str, figures: np.ndarray) -> dict[str, float]:
    value, low, high = (float(v) for v in figures)
    prefix = f"{name}_" if name else ""
    return {name or "value": value, f"{prefix}ci_low": min(low, value), f"{prefix}ci_high": max(high, value)}


def _spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(spearmanr(a, b).statistic)
