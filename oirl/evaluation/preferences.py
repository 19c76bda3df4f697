"""Evaluate a reward model on preference pairs: accuracy and where it comes from, calibration, the pull of length."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from scipy.special import expit
from scipy.stats import spearmanr

from oirl.errors import DataError, NotFittedError
from oirl.logs.pairs import group_pairs, test_pairs, usable_pairs
from oirl.logs.splits import assign_folds
from oirl.logs.text import normalise
from oirl.rewards.base import Estimates
from oirl.rewards.preferences import (
    BradleyTerryRewardModel,
    PairedResponses,
    conform_pairs,
    preference_metrics,
    right_share,
)
from oirl.rewards.training import SeenQueries
from oirl.statistics.intervals import MIN_QUERIES, normal_interval, reliability_bins, success_interval

_QUARTERS = 4
_CURVE_FOLDS = 5


class PreferenceModel(Protocol):
    """What is needed of a reward model; `oirl.BradleyTerryRewardModel` is one."""

    seen_: SeenQueries
    data_: dict[str, Any]

    def estimate(self, queries: list[str], responses: list[str]) -> Estimates:
        """Return reward and spread of each response."""
        ...


@dataclass(slots=True)
class PreferenceEvaluation:
    """What `evaluate_preferences` found; `to_dict` gives the JSON document.

    An accuracy counts pairs of which the chosen response has the higher reward, ties ½; its 95% interval is clustered
    by groups of near duplicates of queries.

    Attributes:
        n_pairs: Pairs that say something.
        n_queries: Distinct queries among them.
        model: `pair_accuracy`, `ci_low`, `ci_high`, `brier`, `ece`, `log_loss`, `n_pairs`, `ties` (share of pairs).
        null_models: `length`: accuracy of preferring the longer, or the shorter response, whichever the training pairs
            prefer (`prefers`), and by how much the model is better, `gain` with its paired interval.
        by_margin: Accuracy by quarters of the margin; empty where margins are not known or all alike.
        by_length_difference: Accuracy by quarters of len(chosen) − len(rejected), in characters.
        length: `correlation` (rank correlation of reward and length), accuracy where `chosen_longer`, `chosen_shorter`.
        subsets: Accuracy by source, where there are several, and their plain mean, as RewardBench counts.
        agreement: How often annotators agree where a comparison was judged several times; None where none was.
        reliability: Predicted and observed preference in bins of probability, each pair in both orders.
        warnings: What limits the figures.
        left_out: Reason -> pairs that nothing was counted of.
    """

    n_pairs: int
    n_queries: int
    model: dict[str, float | None]
    null_models: dict[str, dict[str, Any]]
    by_margin: list[dict[str, float]]
    by_length_difference: list[dict[str, float]]
    length: dict[str, Any]
    subsets: dict[str, Any]
    agreement: dict[str, Any] | None
    reliability: list[dict[str, float]]
    warnings: list[str] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the evaluation as a dictionary for JSON; what cannot be known is None."""
        return asdict(self)


def evaluate_preferences(model: PreferenceModel, pairs: pa.Table) -> PreferenceEvaluation:
    """Evaluate a fitted reward model on the test pairs of a file (all pairs where none is marked).

    Args:
        model: A fitted or loaded `oirl.BradleyTerryRewardModel`, or any model with `estimate`: a model of correctness
            prefers what it thinks right.
        pairs: Preference pairs.

    Raises:
        NotFittedError: If the model is not fitted.
        DataError: If no pair is left.
    """
    if not hasattr(model, "seen_"):
        raise NotFittedError("evaluate needs a fitted model: call fit(pairs), or oirl.load(folder), first")
    used, left_out = usable_pairs(test_pairs(conform_pairs(pairs)))
    if not len(used):
        why = "; ".join(f"{count:,}: {reason}" for reason, count in left_out.items()) or "there are none"
        raise DataError(f"no pair to evaluate on ({why})")
    rows = PairedResponses(used)
    grouping = group_pairs(used)
    groups = grouping.labels
    reward = model.estimate(rows.queries, rows.responses).reward
    difference = reward[rows.chosen] - reward[rows.rejected]
    right = right_share(difference)
    warnings = [w for w in (model.seen_.warning(list(dict.fromkeys(rows.queries))), grouping.warning()) if w]
    if len(np.unique(groups)) < MIN_QUERIES:
        warnings.append(f"intervals of fewer than {MIN_QUERIES} unlike queries are too narrow to be relied upon")
    lengths = np.array([len(r) for r in rows.responses], dtype=np.float64)
    longer = lengths[rows.chosen] - lengths[rows.rejected]
    known = used["margin"].combine_chunks().to_numpy(zero_copy_only=False).astype(np.float64)
    probability = expit(difference)
    metrics = preference_metrics(difference, probability, groups)
    one, none = np.ones(len(used), dtype=np.int64), np.zeros(len(used), dtype=np.int64)
    return PreferenceEvaluation(
        n_pairs=len(used),
        n_queries=len(set(rows.queries)),
        model=metrics | {"n_pairs": len(used), "ties": float((difference == 0).mean())},
        null_models={"length": _length_null(longer, right, groups, model.data_.get("longer_preferred", 1.0))},
        by_margin=_by_quarter(known, right, groups) if np.isfinite(known).all() else [],
        by_length_difference=_by_quarter(longer, right, groups),
        length={
            "correlation": float(spearmanr(reward, lengths).statistic) if np.ptp(reward) and np.ptp(lengths) else None,
            "chosen_longer": _accuracy(right[longer > 0], groups[longer > 0]) if (longer > 0).any() else None,
            "chosen_shorter": _accuracy(right[longer < 0], groups[longer < 0]) if (longer < 0).any() else None,
        },
        subsets=_subsets(used["source"].to_pylist(), right, groups),
        agreement=annotator_agreement(used),
        reliability=reliability_bins(
            np.r_[probability, 1 - probability], np.r_[one, none], np.r_[one, one], np.r_[groups, groups]
        ),
        warnings=warnings,
        left_out=dict(left_out),
    )


def annotator_agreement(pairs: pa.Table) -> dict[str, Any] | None:
    """Return how often two judgments of one comparison agree, and the accuracy of always siding with the majority.

    Comparisons are equal if query and the two responses are, in whichever order. No model can be more accurate on
    these pairs than `ceiling`.

    Returns:
        `n_comparisons` judged more than once, `n_judgments`, `agreement` over pairs of judgments, `ceiling` over
        judgments; None where no comparison was judged twice.
    """
    votes: dict[tuple[str, str, str], Counter[str]] = defaultdict(Counter)
    seen: set[str] = set()
    for row in pairs.select(["pair_id", "query", "chosen", "rejected"]).to_pylist():
        if row["pair_id"] in seen:  # the same judgment again is no second one
            continue
        seen.add(row["pair_id"])
        both = (normalise(row["chosen"]), normalise(row["rejected"]))
        votes[normalise(row["query"]), min(both), max(both)][both[0]] += 1
    repeated = [list(c.values()) for c in votes.values() if sum(c.values()) > 1]
    if not repeated:
        return None
    totals = np.array([sum(counts) for counts in repeated])
    agreeing = np.array([sum(n * (n - 1) for n in counts) for counts in repeated])
    return {
        "n_comparisons": len(repeated),
        "n_judgments": int(totals.sum()),
        "agreement": float(agreeing.sum() / (totals * (totals - 1)).sum()),
        "ceiling": float(sum(max(counts) for counts in repeated) / totals.sum()),
    }


def learning_curve(
    model: BradleyTerryRewardModel, pairs: pa.Table, *, shares: Sequence[float] = (0.125, 0.25, 0.5, 1.0), seed: int = 0
) -> list[dict[str, float]]:
    """Return the accuracy on held-out pairs by how many pairs were learned from.

    In each of five folds, models like the given one learn from growing shares of the other folds, whole groups at a
    time, the smaller shares being part of the larger ones. All shares are compared on the same pairs.

    Args:
        model: An unfitted model, or a fitted one, of which only the parameters are used.
        pairs: Preference pairs.
        shares: Shares of the training groups.
        seed: For the folds and the order of groups.

    Returns:
        For each share `n_pairs` (mean over folds), `pair_accuracy`, `ci_low`, `ci_high`.

    Raises:
        DataError: If there are too few unlike queries.
    """
    used, _ = usable_pairs(conform_pairs(pairs))
    groups = group_pairs(used).labels
    fold = assign_folds(used["pair_id"].to_pylist(), groups, _CURVE_FOLDS, seed)
    rng = np.random.default_rng(seed)
    right = np.empty((len(shares), len(used)))
    sizes = np.zeros(len(shares))
    for f in range(_CURVE_FOLDS):
        order = rng.permutation(np.unique(groups[fold != f]))
        held_out = used.filter(pa.array(fold == f))
        rows = PairedResponses(held_out)
        for s, share in enumerate(shares):
            kept = (fold != f) & np.isin(groups, order[: max(2, round(share * len(order)))])
            fitted = model.clone().fit(used.filter(pa.array(kept)))
            reward = fitted.estimate(rows.queries, rows.responses).reward
            right[s, fold == f] = right_share(reward[rows.chosen] - reward[rows.rejected])
            sizes[s] += kept.sum() / _CURVE_FOLDS
    return [_accuracy(row, groups) | {"n_pairs": float(n)} for n, row in zip(sizes, right, strict=True)]


def _accuracy(right: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    value, low, high = success_interval(right, groups)
    return {"n_pairs": len(right), "pair_accuracy": value, "ci_low": low, "ci_high": high}


def _length_null(longer: np.ndarray, right: np.ndarray, groups: np.ndarray, share: float) -> dict[str, Any]:
    by_length = right_share(longer if share >= 0.5 else -longer)
    gain = right - by_length
    low, high = normal_interval(gain, groups)
    if np.isnan(low):  # one group has no spread to go by
        low, high = np.array(-1.0), np.array(1.0)
    return _accuracy(by_length, groups) | {
        "prefers": "longer" if share >= 0.5 else "shorter",
        "gain": float(gain.mean()),
        "gain_ci_low": float(low),
        "gain_ci_high": float(high),
    }


def _by_quarter(values: np.ndarray, right: np.ndarray, groups: np.ndarray) -> list[dict[str, float]]:
    """Return the accuracy within quarters of a value; fewer where many values are equal, none where all are."""
    if np.ptp(values) == 0:
        return []
    ends = np.unique(np.quantile(values, np.linspace(0, 1, _QUARTERS + 1)))
    which = np.clip(np.searchsorted(ends, values, side="right") - 1, 0, len(ends) - 2)
    return [
        {"low": float(values[which == q].min()), "high": float(values[which == q].max())}
        | _accuracy(right[which == q], groups[which == q])
        for q in np.unique(which)
    ]


def _subsets(sources: list[str | None], right: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
    names = np.array([s or "" for s in sources])
    found = {str(name): _accuracy(right[names == name], groups[names == name]) for name in np.unique(names)}
    if len(found) < 2:
        return {}
    return {"subsets": found, "mean": float(np.mean([a["pair_accuracy"] for a in found.values()]))}
