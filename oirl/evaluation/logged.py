"""How the runs of a log came about: which prompts were tried on a query, and with which propensity."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from oirl.logs.cells import Cells
from oirl.logs.splits import assign_folds
from oirl.rewards.embedders import TfidfEmbedder
from oirl.statistics.intervals import standard_error

_DIMENSIONS, _FOLDS, _ENOUGH = 64, 5, 50
_MOSTLY_KNOWN = 0.95
_UNEVEN = 0.02
_STRENGTHS = (0.01, 0.1, 1.0)  # inverse penalties of the classifier, the best on held-out folds is taken
_DETERMINISTIC, _TOLD = 0.97, 0.9
"""Held-out accuracy of predicting the prompt from the query, and how much of what the most-run prompt alone leaves open
it must tell, from which the logger has left nothing to chance."""


@dataclass(frozen=True, slots=True)
class LoggedRuns:
    """The runs of a log, as the off-policy estimators read them (`oirl.evaluation.estimators`).

    Attributes:
        shares: Share of each query's runs under each prompt, float (Q, P).
        rates: Success of these runs, 0 where there are none, float (Q, P).
        inverse_propensity: 1 / π0 of these runs, 0 where there are none, float (Q, P).
        propensity: "logged", "estimated", or "deterministic" where the query decided the prompt: then no weight can
            tell what another prompt would have done.
        possible: Whether the logger could have run each prompt on each query, as far as the log tells, bool (Q, P).
        reason: How that was found, in words.
        warning: What is wrong with the propensities of the log, None if nothing.
    """

    shares: np.ndarray
    rates: np.ndarray
    inverse_propensity: np.ndarray
    propensity: str
    possible: np.ndarray
    reason: str
    warning: str | None = None

    def of_prompts(self, columns: np.ndarray) -> LoggedRuns:
        """Return the runs under some prompts; a query whose other runs are left out keeps its shares.

        Args:
            columns: Position of each wanted prompt, int (P',), −1 for one that the log does not hold.
        """

        def take(matrix: np.ndarray) -> np.ndarray:
            return np.where(columns >= 0, matrix[:, columns], 0.0)

        return LoggedRuns(
            take(self.shares),
            take(self.rates),
            take(self.inverse_propensity),
            self.propensity,
            take(self.possible) > 0,
            self.reason,
            self.warning,
        )


def logged_runs(cells: Cells, groups: np.ndarray, seed: int = 0) -> LoggedRuns:
    """Return the runs of a log with their propensities: those logged for all runs, or estimated from the queries.

    Args:
        cells: All graded runs, whatever their prompt.
        groups: Group of near duplicates of each query, int (Q,): the estimates are cross-fitted over groups.
        seed: For the folds.
    """
    runs, successes = cells.matrices()
    shares = runs / runs.sum(axis=1, keepdims=True)
    rates = np.divide(successes, runs, out=np.zeros(runs.shape), where=runs > 0)
    ever = np.broadcast_to((runs > 0).any(axis=0), runs.shape)
    known = _known(cells)
    if cells.inverse_propensity is not None and known.mean() >= _MOSTLY_KNOWN:
        shares = _without_unknown(shares, cells, known)
        inverse = np.zeros(runs.shape)
        inverse[cells.query_index, cells.prompt_index] = np.where(known, cells.inverse_propensity, 0.0)
        if np.all(cells.inverse_propensity[known] < 1 + 1e-9):
            why = "every run has the propensity 1: the logger left nothing to chance"
            return LoggedRuns(shares, rates, inverse, "deterministic", ever, why)
        # Where the prompts that were run have all of the probability, the others had none; more than all of it comes of
        # runs that were drawn with different probabilities, and tells nothing of the others.
        seen = np.divide(1.0, inverse, out=np.zeros(runs.shape), where=inverse > 0)
        possible = np.where((np.abs(seen.sum(axis=1) - 1) <= 1e-6)[:, None], runs > 0, ever)
        left_out = int(cells.runs[~known].sum())
        why = f"all runs but {left_out:,} have their propensity" if left_out else "every run has its propensity"
        warning = f"{left_out:,} runs without a propensity were left out of the weighting" if left_out else None
        return LoggedRuns(shares, rates, inverse, "logged", possible, why, _check(shares, inverse) or warning)
    propensity, accuracy, by_query = estimate_propensities(cells, shares, groups, seed)
    inverse = np.where(runs > 0, 1 / propensity, 0.0)
    # Where one prompt has nearly all runs, guessing it is no knowledge of the query.
    share = shares.mean(axis=0).max()
    if by_query and accuracy >= _DETERMINISTIC and accuracy - share >= _TOLD * (1 - share):
        why = f"the wording of the query tells in {accuracy:.0%} of the cases under which prompt it was run"
        return LoggedRuns(shares, rates, inverse, "deterministic", ever, why)
    lacks = "the log has no propensities" if cells.inverse_propensity is None else "some runs have no propensity"
    how = (
        "by a classifier of the prompt from the query, cross-fitted"
        if by_query
        else "as each prompt's share, as the query does not tell the prompt"
    )
    return LoggedRuns(shares, rates, inverse, "estimated", ever, f"{lacks}; they were estimated {how}")


def _known(cells: Cells) -> np.ndarray:
    """Return which cells have the propensity of all of their runs, bool (C,)."""
    if cells.inverse_propensity is None:
        return np.zeros(len(cells.runs), dtype=bool)
    return np.asarray(np.isfinite(cells.inverse_propensity))


def _without_unknown(shares: np.ndarray, cells: Cells, known: np.ndarray) -> np.ndarray:
    """Return the shares without cells of unknown propensity; queries that had others stand for those that had none."""
    if known.all():
        return shares
    kept = shares.copy()
    kept[cells.query_index[~known], cells.prompt_index[~known]] = 0.0
    total = kept.sum(axis=1, keepdims=True)
    scaled = np.divide(kept, total, out=np.zeros(kept.shape), where=total > 0)
    return np.asarray(scaled * len(total) / max(int((total > 0).sum()), 1))


def adaptive_warning(log: pa.Table) -> str | None:
    """Say so where the propensities of a prompt changed while a log was collected: then its plain means are biased.

    Args:
        log: Interactions, with prompt_id and propensity.
    """
    known = log.select(["prompt_id", "propensity"]).drop_null()
    spread = known.group_by("prompt_id").aggregate([("propensity", "min"), ("propensity", "max")])
    changed = pc.greater(pc.subtract(spread["propensity_max"], spread["propensity_min"]), 1e-9)
    if not len(spread) or not pc.any(changed).as_py():
        return None
    return (
        "the propensities of a prompt differ from run to run, as in an adaptive collection: prompts that did badly by "
        "bad luck were run less after it, so the success of each prompt's own runs is somewhat too low on average; "
        "`oirl evaluate` weighs by the propensities"
    )


def ungraded_warning(log: pa.Table) -> str | None:
    """Say so where runs under some prompts lack a verdict more often than under others: what is left is a selection.

    Args:
        log: Interactions, with prompt_id and correct.
    """
    flags = pa.table({"prompt_id": log["prompt_id"], "none": pc.is_null(log["correct"]).cast(pa.float64())})
    found = flags.group_by("prompt_id").aggregate([("none", "mean"), ("none", "count")])
    known = found.filter(pc.greater_equal(found["none_count"], _ENOUGH))
    if len(known) < 2:
        return None
    lowest, highest = pc.min(known["none_mean"]).as_py(), pc.max(known["none_mean"]).as_py()
    if highest - lowest <= _UNEVEN:
        return None
    worst = known["prompt_id"][pc.index(known["none_mean"], pa.scalar(highest)).as_py()].as_py()
    return (
        f"{highest:.0%} of the runs under {worst} have no verdict, {lowest:.0%} under another prompt: if it is the "
        "hard queries that failed, that prompt looks better than it is"
    )


def estimate_propensities(
    cells: Cells, shares: np.ndarray, groups: np.ndarray, seed: int = 0
) -> tuple[np.ndarray, float, bool]:
    """Estimate π0(prompt | query) by logistic regression on word n-grams and counts, cross-fitted over groups.

    Where the query does not tell the prompt on held-out folds better than the prompts' shares do, the shares are the
    estimate: they vary less. No estimate is below a tenth of the prompt's share, so that no single run decides.

    Returns:
        (Propensities, float (Q, P); held-out accuracy of the classifier; whether it is what the estimates come from.)
    """
    share = shares.mean(axis=0)
    floor = np.maximum(0.1 * share, 1e-9)
    n_groups = len(np.unique(groups))
    constant = np.broadcast_to(np.maximum(share, floor), shares.shape)
    if n_groups < 2 or (share > 0).sum() < 2:
        return constant, 0.0, False
    fold = assign_folds(cells.query_ids, groups, min(_FOLDS, n_groups), seed)
    features = _features(cells.queries, seed)
    estimates, frequency = np.empty((len(_STRENGTHS), *shares.shape)), np.empty(shares.shape)
    for f in range(int(fold.max()) + 1):
        inside = fold == f
        frequency[inside] = np.maximum(shares[~inside].mean(axis=0), floor)
        for i, strength in enumerate(_STRENGTHS):
            found = _classify(features[~inside], shares[~inside], features[inside], strength, seed)
            estimates[i, inside] = np.maximum(found, floor)
    estimates /= estimates.sum(axis=2, keepdims=True)
    gains = (shares * (np.log(estimates) - np.log(frequency))).sum(axis=2).mean(axis=1)
    estimate = estimates[gains.argmax()]
    accuracy = float(shares[np.arange(len(shares)), estimate.argmax(axis=1)].mean())
    # A classifier that only fits noise must not add its noise to the weights.
    return (estimate, accuracy, True) if gains.max() > 0 else (constant, accuracy, False)


def _features(queries: list[str], seed: int) -> np.ndarray:
    from sklearn.decomposition import TruncatedSVD

    embedder = TfidfEmbedder()
    prepared = embedder.prepare(queries)
    matrix = embedder.fit(prepared).embed(prepared)
    wanted = min(_DIMENSIONS, matrix.shape[1] - 1, len(queries) - 1)
    if wanted < 2:
        return np.asarray(matrix.toarray(), dtype=float)
    reduced = TruncatedSVD(wanted, random_state=seed).fit_transform(matrix)
    return np.asarray(reduced / max(reduced.std(), 1e-12))


def _classify(features: np.ndarray, shares: np.ndarray, new: np.ndarray, strength: float, seed: int) -> np.ndarray:
    """Return the probability of each prompt for new queries, learned from the shares of others."""
    from sklearn.linear_model import LogisticRegression

    query, prompt = np.nonzero(shares)
    out = np.zeros((len(new), shares.shape[1]))
    known = np.unique(prompt)
    if len(known) == 1:
        out[:, known[0]] = 1.0
        return out
    model = LogisticRegression(C=strength, max_iter=300, random_state=seed)
    out[:, known] = model.fit(features[query], prompt, sample_weight=shares[query, prompt]).predict_proba(new)
    return out


def _check(shares: np.ndarray, inverse: np.ndarray) -> str | None:
    """Return what is wrong with logged propensities: Σ_a π0(a | x) · 1 / π0(a | x) is the number of prompts."""
    of_query = (shares * inverse).sum(axis=1)
    if len(of_query) < _ENOUGH:
        return None
    prompts = int((shares > 0).any(axis=0).sum())
    error = 4 * float(standard_error(of_query)) + 0.05 * prompts
    mean = float(of_query.mean())
    if abs(mean - prompts) <= error:
        return None
    why = (
        "the propensities are too small for that many"
        if mean > prompts
        else "some prompts are so rare that they were hardly seen, or could not be chosen for some queries, or the "
        "propensities are those of being among several prompts of a query, where that of the single run is needed"
    )
    return f"1 / propensity is {mean:.2f} on average, but {prompts} prompts were run, and it should be that: {why}"
