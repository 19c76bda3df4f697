"""A committee: learners of which each has left out one fold, so that every row is scored by one that has not seen it.

Predictions are the mean over members; how far they differ, scaled by the jackknife, is the standard error of a score.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import log_expit

from oirl.rewards.embedders import Matrix
from oirl.rewards.learners import Comparisons, Learner, Target, Verdicts
from oirl.rewards.saving import named

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Committee:
    """Learners that were fitted to all folds but one each.

    Attributes:
        members: One per fold.
    """

    members: Sequence[Learner]
    centres: np.ndarray
    """What is taken off the scores of each member, float (K,): those of comparisons are free up to a constant."""

    def scores(self, rows: Matrix) -> np.ndarray:
        """Return the score of each row by each member, float64 (K, n)."""
        return np.stack([member.scores(rows) for member in self.members]) - self.centres[:, None]

    def describe(self) -> list[dict[str, Any]]:
        """Return the parameters of each member."""
        return [{k: v for k, v in member.describe().items() if k != "name"} for member in self.members]

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the learned arrays of all members."""
        found = {f"member{i}.{k}": v for i, member in enumerate(self.members) for k, v in member.state().items()}
        return found | {"centres": self.centres}

    @classmethod
    def restore(cls, members: Sequence[Learner], arrays: Mapping[str, np.ndarray]) -> Committee:
        """Take the arrays that `arrays` gave, for unfitted members with the parameters that `describe` gave."""
        restored = [member.restore(named(arrays, f"member{i}.")) for i, member in enumerate(members)]
        if arrays["centres"].shape != (len(restored),):
            raise ValueError("its centres do not match its members")
        return cls(restored, arrays["centres"])


def fit_committee(
    learner: Learner, rows: Matrix, target: Target, fold: np.ndarray, groups: np.ndarray, seed: int
) -> tuple[Committee, np.ndarray]:
    """Fit one member per fold to the other folds.

    Where a learner leaves a parameter open, each member takes the candidate with the least cross-fitted log loss on
    the folds other than the one it leaves out.

    Args:
        learner: What to fit.
        rows: Features, (n, d).
        target: Verdicts on the rows, or comparisons of rows of one fold.
        fold: Fold of each row, int (n,), from 0.
        groups: Group of each row, int (n,).
        seed: For learners that draw; each member gets its own.

    Returns:
        The committee, and the score of each row by the member that has not seen it, float64 (n,).
    """
    folds = int(fold.max()) + 1
    candidates = learner.candidates()
    fitted: list[list[Learner]] = []
    held_out = np.empty((len(candidates), len(fold)))
    for c, candidate in enumerate(candidates):
        members = []
        for f in range(folds):
            _log.info("%s: candidate %d of %d, fold %d of %d", learner.name, c + 1, len(candidates), f + 1, folds)
            kept = np.flatnonzero(fold != f)
            part = _restrict(target, kept, len(fold))
            member = candidate.fresh().fit(rows[kept], part, groups[kept], seed + f)
            held_out[c, fold == f] = member.scores(rows[np.flatnonzero(fold == f)])
            members.append(member)
        fitted.append(members)
    losses, item_fold = _losses(target, held_out), _fold_of_items(target, fold)
    chosen = [int(losses[:, item_fold != f].sum(axis=1).argmin()) for f in range(folds)]
    scores = np.empty(len(fold))
    for f, c in enumerate(chosen):
        scores[fold == f] = held_out[c, fold == f]
    committee = [fitted[c][f] for f, c in enumerate(chosen)]
    centres = np.zeros(folds)
    if isinstance(target, Comparisons):
        centres = np.array([member.scores(rows).mean() for member in committee])
        scores = scores - centres[fold]
    return Committee(committee, centres), scores


def jackknife_error(values: np.ndarray) -> np.ndarray:
    """Return √((K − 1)/K · Σ_k (v_k − v̄)²), the delete-one-fold standard error (Quenouille 1956; Tukey 1958).

    Args:
        values: One row per member, float (K, n).
    """
    members = len(values)
    return np.sqrt((members - 1) * values.var(axis=0))


def _restrict(target: Target, kept: np.ndarray, size: int) -> Target:
    """Return the target on some of the rows, whose positions are new."""
    if isinstance(target, Verdicts):
        return Verdicts(target.runs[kept], target.successes[kept])
    position = np.full(size, -1)
    position[kept] = np.arange(len(kept))
    chosen, rejected = position[target.chosen], position[target.rejected]
    inside = (chosen >= 0) & (rejected >= 0)
    margin = None if target.margin is None else target.margin[inside]
    return Comparisons(chosen[inside], rejected[inside], margin)


def _losses(target: Target, scores: np.ndarray) -> np.ndarray:
    """Return the log loss of each row or pair under each candidate's scores, float (c, items)."""
    if isinstance(target, Verdicts):
        wrong = target.runs - target.successes
        return -(target.successes * log_expit(scores) + wrong * log_expit(-scores))
    return -log_expit(scores[:, target.chosen] - scores[:, target.rejected])


def _fold_of_items(target: Target, fold: np.ndarray) -> np.ndarray:
    return fold if isinstance(target, Verdicts) else fold[target.chosen]
