"""Off-policy estimators: the value of a prompt policy from runs that another policy chose. Pure functions of arrays.

Query x was run under prompts drawn by a logging policy π0. All arrays are (Q, P), a row per query:

- `shares`: share of the query's runs that each prompt got; a row sums to 1, or to less where runs were under prompts
  that stand in no column. With one run per query it is 1 under the prompt that was drawn: a contextual bandit.
- `rates`: success of these runs, anything where the share is 0.
- `weights`: w = π(a | x) / π0(a | x) where the share is above 0, else 0 (`importance_weights`).
- `policy`: π, the policy to be valued; a row sums to 1.
- `estimate`: q(x, a), success estimated without the query's own runs (cross-fitted).

Every estimator returns one contribution per query, float (Q,), whose mean is the value; one bootstrap and one analytic
interval serve them all, and differences of policies stay paired.

=================  =====================================================================================================
`ips`              Σ w r (Horvitz and Thompson 1952): unbiased if π0 is known and never 0 where π is not
`snips`            Σ w r / mean w (Swaminathan and Joachims 2015, eq. 9): slightly biased, of smaller variance
`direct`           Σ π q: as good as q is, whatever the logger did
`doubly_robust`    Σ π q + Σ w (r − q) (Dudík, Langford and Li 2011, eq. 2): unbiased if π0 or q is right
`switch`           doubly robust where w ≤ τ, direct elsewhere (Wang, Agarwal and Dudík 2017, section 4.2)
=================  =====================================================================================================
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

_CANDIDATES = 30


@dataclass(frozen=True, slots=True)
class Support:
    """How well a log covers a policy.

    Attributes:
        effective_sample_size: (Σ w)² / Σ w² over queries (Kish): how many queries of the policy's own the log is worth.
        largest_weight: The largest query's share of Σ w; one query decides much from about 0.1.
        unsupported_share: Mean probability with which the policy takes prompts that the logger could not take.
        mean_weight: Mean of w over queries, 1 on average where the logger could take all that the policy takes.
    """

    effective_sample_size: float
    largest_weight: float
    unsupported_share: float
    mean_weight: float

    def to_dict(self) -> dict[str, float]:
        """Return the figures as a dictionary for JSON."""
        return asdict(self)


def importance_weights(policy: np.ndarray, shares: np.ndarray, inverse_propensity: np.ndarray) -> np.ndarray:
    """Return w = π / π0 where a prompt was run, 0 elsewhere, float (Q, P).

    Args:
        policy: π.
        shares: As above.
        inverse_propensity: 1 / π0 of the runs of each cell, averaged over them; read only where the share is above 0.
    """
    return np.where(shares > 0, policy * inverse_propensity, 0.0)


def support(policy: np.ndarray, shares: np.ndarray, weights: np.ndarray, possible: np.ndarray) -> Support:
    """Return how well the log covers the policy; `possible` says what the logger could have run, bool (Q, P)."""
    of_query = (shares * weights).sum(axis=1)
    total, squares = of_query.sum(), (of_query**2).sum()
    return Support(
        float(total**2 / squares) if squares else 0.0,
        float(of_query.max() / total) if total else 0.0,
        float((policy * ~possible).sum(axis=1).mean()),
        float(of_query.mean()) if len(of_query) else 0.0,
    )


def ips(shares: np.ndarray, rates: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return Σ w r."""
    return np.asarray((shares * weights * rates).sum(axis=1))


def snips(shares: np.ndarray, rates: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return v + Σ w (r − v) / mean w with v = mean Σ w r / mean Σ w: the mean is v, the spread that of a ratio.

    NaN if the policy takes no prompt that was run.
    """
    mean_weight = (shares * weights).sum(axis=1).mean()
    if not mean_weight:
        return np.full(len(shares), np.nan)
    value = ips(shares, rates, weights).mean() / mean_weight
    return np.asarray(value + (shares * weights * (rates - value)).sum(axis=1) / mean_weight)


def direct(policy: np.ndarray, estimate: np.ndarray) -> np.ndarray:
    """Return Σ π q."""
    return np.asarray((policy * estimate).sum(axis=1))


def doubly_robust(
    shares: np.ndarray, rates: np.ndarray, weights: np.ndarray, policy: np.ndarray, estimate: np.ndarray
) -> np.ndarray:
    """Return Σ π q + Σ w (r − q)."""
    return direct(policy, estimate) + (shares * weights * (rates - estimate)).sum(axis=1)


def switch(
    shares: np.ndarray,
    rates: np.ndarray,
    weights: np.ndarray,
    policy: np.ndarray,
    estimate: np.ndarray,
    threshold: float,
) -> np.ndarray:
    """Return the doubly robust contributions, without the correction of runs whose weight is above `threshold`."""
    kept = np.where(weights <= threshold, weights, 0.0)
    return doubly_robust(shares, rates, kept, policy, estimate)


def choose_threshold(
    shares: np.ndarray, rates: np.ndarray, weights: np.ndarray, policy: np.ndarray, estimate: np.ndarray
) -> float:
    """Return the threshold τ of `switch` with the smallest bound of the mean squared error, variance + bias².

    Switching leaves corrections out. Its bias is bounded by their mean plus two standard errors (in the manner of Su,
    Srinath and Krishnamurthy 2020), and, as verdicts lie between 0 and 1, by the policy's share of what is left out
    (Wang et al. 2017). At most 30 of the weights are tried, and 0.

    Returns:
        τ: the largest weight means doubly robust throughout, 0 the direct method.
    """
    n = len(shares)
    # Weights go with their runs: a quantile over cells would count a cell with one run as one with all of a query's.
    present = np.sort(weights[(shares > 0) & (weights > 0)])
    candidates = np.unique(np.r_[0.0, np.quantile(present, np.linspace(0, 1, _CANDIDATES))]) if len(present) else [0.0]
    best, smallest = 0.0, np.inf
    for threshold in candidates:
        kept = switch(shares, rates, weights, policy, estimate, float(threshold))
        without = shares * np.where(weights > threshold, weights, 0.0)
        left_out = (without * (rates - estimate)).sum(axis=1)
        bias = min(abs(left_out.mean()) + 2 * left_out.std() / np.sqrt(n), without.sum(axis=1).mean(), 1.0)
        bound = kept.var() / n + bias**2
        if bound <= smallest:  # of equals the largest threshold: the least bias
            best, smallest = float(threshold), float(bound)
    return best
