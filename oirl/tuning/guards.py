"""What tells that a run goes wrong, in words; None where nothing does. Pure functions of figures."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

import numpy as np

from oirl.statistics.intervals import standard_error

WARNED_DRIFT = 2.0
"""The factor by which length or variety may change before it is warned of."""
MOST_ROLLBACKS = 5
"""After so many in a row, with no iteration done in between, a run stops: going back does not help."""
FEWEST_QUERIES = 20
"""With fewer held-out queries nothing is said of a reward that is gamed."""
ROLLBACK_FACTOR, RAISE_FACTOR = 2.0, 1.5
"""What the KL coefficient is multiplied by when a run goes back, and when it goes on."""


def too_far(kl: float, limit: float | None) -> str | None:
    """Return that the policy is too far from its reference.

    Args:
        kl: KL of a response from the reference, in nats.
        limit: The largest that passes.
    """
    if limit is None or not kl > limit:
        return None
    return f"the KL of a response from the reference is {kl:.3g} nats, above max_kl = {limit:g}"


def drifted(first: Mapping[str, Any], now: Mapping[str, Any], factor: float) -> str | None:
    """Return that responses have become much longer or shorter, or less varied, than they were at first.

    Args:
        first: `tokens_mean` and `distinct_2` of the first iteration.
        now: The same now.
        factor: The largest change that passes.
    """
    length, variety = (_ratio(now.get(name), first.get(name)) for name in ("tokens_mean", "distinct_2"))
    if length is not None and not 1 / factor <= length <= factor:
        return f"responses have {length:.2g} times the tokens that they had at first"
    if variety is not None and variety < 1 / factor:
        return f"the share of distinct pairs of words is {variety:.2g} times what it was at first"
    return None


def over_optimised(
    reward_then: np.ndarray | None,
    reward_now: np.ndarray,
    gold_then: np.ndarray,
    gold_now: np.ndarray,
    groups: np.ndarray,
    *,
    comparisons: int = 1,
) -> str | None:
    """Return that gold, what counts, has fallen on held-out queries while the reward that is trained for has not.

    Gold has fallen if the upper end of a one-sided interval of its paired difference, clustered by groups, lies below
    zero. Its level is 1 − 0.05/c for c comparisons (Bonferroni), so that a whole run, which looks again and again at
    the best of many validations, gives a false alarm in at most about 5% of the cases. (Gao et al. 2022, 2210.10760:
    over-optimisation of a reward model.)

    Args:
        reward_then: Of each held-out query at the best validation by gold so far, float (n,); None where it is that of
            another reward model, so that gold alone counts.
        reward_now: Of the same queries now.
        gold_then: Gold of the same.
        gold_now: Gold now.
        groups: Near duplicates of each query have its number, (n,).
        comparisons: How many pairs of validations the run may compare in all.
    """
    change = gold_now - gold_then
    rise = np.zeros_like(change) if reward_then is None else reward_now - reward_then
    known = ~(np.isnan(change) | np.isnan(rise))
    if len(set(groups[known].tolist())) < FEWEST_QUERIES or rise[known].mean() < 0:
        return None
    width = NormalDist().inv_cdf(1 - 0.05 / comparisons) * float(standard_error(change[known], groups[known]))
    mean = float(change[known].mean())
    if not mean + width < 0:
        return None
    reward = (
        "" if reward_then is None else f"the reward on held-out queries has risen by {rise[known].mean():.3g} while "
    )
    return f"{reward}gold has fallen by {-mean:.3g} (at least {-mean - width:.3g}): the reward is being gamed"


def pairs_of(validations: int) -> int:
    """Return how many pairs of an earlier and a later validation there are."""
    return max(validations * (validations - 1) // 2, 1)


def _ratio(now: Any, first: Any) -> float | None:
    return float(now) / float(first) if now is not None and first else None
