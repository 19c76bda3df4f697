"""Values of prompt policies on a log: the estimator that the log allows, and one contribution per query."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from oirl.errors import ConfigError
from oirl.evaluation import estimators
from oirl.evaluation.estimators import Support
from oirl.evaluation.logged import LoggedRuns

ESTIMATORS = ("replay", "ips", "snips", "direct", "doubly_robust", "switch")
"""The estimators that `evaluate` knows, beside "auto"."""

_WEIGHTED = ("ips", "snips", "doubly_robust", "switch")
_MOST_COMPLETE = 0.5
_UNSUPPORTED = 0.01
_LARGEST_WEIGHT = 0.1
_SMALLEST_SAMPLE = 0.05
_FEWEST, _FEW, _LEAST_MEAN_WEIGHT = 10, 50, 0.5


@dataclass(slots=True)
class Valuation:
    """What policies are worth, query by query.

    Attributes:
        estimator: Name of the estimator, one of `ESTIMATORS`, or None where the log allows none.
        label: What is shown as the estimator of a policy: its name, and what limits it.
        contributions: Policy -> float (Q',), whose mean is its value; without those that the log does not cover.
        chosen: Queries behind the contributions, mask over all queries, bool (Q,).
        off_policy: How the prompts were chosen, support and other estimates, for JSON; None for replay.
        warnings: What limits the values.
    """

    estimator: str | None
    label: str
    contributions: dict[str, np.ndarray]
    chosen: np.ndarray
    off_policy: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)


def complete_queries(runs: np.ndarray) -> np.ndarray:
    """Return which queries were run under every prompt, bool (Q,), for runs of shape (Q, P)."""
    return np.asarray((runs > 0).all(axis=1))


def allows_replay(complete: np.ndarray) -> bool:
    """Say whether enough queries are complete for replay: half of them, so that they can speak for all."""
    return bool(complete.any()) and bool(complete.mean() >= _MOST_COMPLETE)


def replay_policies(policies: Mapping[str, np.ndarray], rates: np.ndarray, complete: np.ndarray) -> Valuation:
    """Value policies exactly, on the queries that were run under every prompt.

    Args:
        policies: Name -> π, float (Q, P).
        rates: Mean success over replicates, float (Q, P).
        complete: The complete queries, bool (Q,).

    Raises:
        ConfigError: If there are none.
    """
    if not complete.any():
        raise ConfigError(
            "estimator 'replay': no query was run under every prompt of the model; allowed: auto, which finds what the "
            "log can tell"
        )
    found = {name: estimators.direct(p[complete], rates[complete]) for name, p in policies.items()}
    warnings = []
    if not complete.all():
        warnings.append(
            f"policies are valued on the {int(complete.sum()):,} of {len(complete):,} queries that were run under all "
            f"{rates.shape[1]} prompts of the model; the others may differ from these, so compare the policies with "
            "each other, not with the success of the prompts"
        )
    return Valuation("replay", "replay", found, complete, warnings=warnings)


def value_off_policy(
    policies: Mapping[str, np.ndarray], logged: LoggedRuns, estimate: np.ndarray, estimator: str = "auto"
) -> Valuation:
    """Value policies from incomplete runs by the estimator that the log allows, or by the one that is asked for.

    Known propensities, and estimated ones, allow all; a deterministic logger allows the direct method only. Doubly
    robust is taken, or `switch` where a few queries have much of the weight. Policies that take prompts the log
    could not run, or of whose prompts it has next to no runs, are valued only if the direct method is asked for.

    Args:
        policies: Name -> π, float (Q, P).
        logged: The runs.
        estimate: Cross-fitted estimate of success, float (Q, P).
        estimator: "auto" or one of `ESTIMATORS` but "replay".

    Raises:
        ConfigError: If the log does not allow the estimator.
    """
    if estimator in _WEIGHTED and logged.propensity == "deterministic":
        raise ConfigError(
            f"estimator {estimator!r}: {logged.reason}, so that no weight can tell what another prompt would have "
            "done; allowed: direct, which is as good as the model of success is"
        )
    supports = {name: _support(policy, logged) for name, policy in policies.items()}
    by_model = estimator == "direct" or logged.propensity == "deterministic"
    covered = [n for n in policies if estimator == "direct" or _is_covered(supports[n], by_model)]
    taken = estimator if estimator != "auto" else _choose(logged, [supports[n] for n in covered], len(logged.shares))
    table = {n: contributions_by(policies[n], logged, estimate) for n in policies}
    off_policy = {
        "propensity": logged.propensity,
        "reason": logged.reason,
        "support": {name: s.to_dict() for name, s in supports.items()},
        "estimates": {
            name: {e: _finite(values.mean()) for e, values in row.items() if name in covered or e == "direct"}
            for name, row in table.items()
        },
    }
    warnings = [*([logged.warning] if logged.warning else []), *_limits(taken, logged, supports, covered)]
    label = taken + {"estimated": " (propensities estimated)"}.get(logged.propensity, "") if taken != "direct" else ""
    contributions = {n: table[n][taken] for n in covered if np.isfinite(table[n][taken]).all()}
    return Valuation(
        taken,
        label or "direct (model-based)",
        contributions,
        np.ones(len(logged.shares), dtype=bool),
        off_policy,
        warnings,
    )


def _support(policy: np.ndarray, logged: LoggedRuns) -> Support:
    weights = estimators.importance_weights(policy, logged.shares, logged.inverse_propensity)
    return estimators.support(policy, logged.shares, weights, logged.possible)


def _is_covered(support: Support, by_model: bool) -> bool:
    """Say whether a log speaks of a policy: of all prompts that it takes, and by enough runs of them."""
    if support.unsupported_share > _UNSUPPORTED:
        return False
    return by_model or (support.effective_sample_size >= _FEWEST and support.mean_weight >= _LEAST_MEAN_WEIGHT)


def _choose(logged: LoggedRuns, supports: list[Support], queries: int) -> str:
    if logged.propensity == "deterministic":
        return "direct"
    thin = any(
        s.largest_weight > _LARGEST_WEIGHT or s.effective_sample_size < _SMALLEST_SAMPLE * queries for s in supports
    )
    return "switch" if thin else "doubly_robust"


def contributions_by(policy: np.ndarray, logged: LoggedRuns, estimate: np.ndarray) -> dict[str, np.ndarray]:
    """Return the contributions of a policy by every estimator that the log allows; see `value_off_policy`."""
    found = {"direct": estimators.direct(policy, estimate)}
    if logged.propensity == "deterministic":
        return found
    weights = estimators.importance_weights(policy, logged.shares, logged.inverse_propensity)
    runs = (logged.shares, logged.rates, weights)
    threshold = estimators.choose_threshold(*runs, policy, estimate)
    return found | {
        "ips": estimators.ips(*runs),
        "snips": estimators.snips(*runs),
        "doubly_robust": estimators.doubly_robust(*runs, policy, estimate),
        "switch": estimators.switch(*runs, policy, estimate, threshold),
    }


def _limits(taken: str, logged: LoggedRuns, supports: Mapping[str, Support], covered: list[str]) -> list[str]:
    found = []
    if logged.propensity == "deterministic":
        found.append(
            f"{logged.reason}; the values are a model's (direct method): their intervals know the queries' spread, not "
            "the model's error"
        )
    elif logged.propensity == "estimated":
        found.append(
            f"{logged.reason}; values hold as far as these are right and nothing but the wording decided: their error, "
            "which can be many points (--self-check), is not in the intervals. Log the column `propensity` to be sure"
        )
    elif taken == "direct":
        found.append("the direct method is as good as its model of success is; the log allows doubly_robust")
    if taken != "direct":
        found += _thin_support(supports, covered)
    missing = {n: s.unsupported_share for n, s in supports.items() if s.unsupported_share > 0}
    if missing:
        shown = ", ".join(f"{name} ({share:.0%})" for name, share in missing.items())
        refused = [n for n in missing if n not in covered]
        found.append(
            f"policies take prompts that the log never ran, or could not run on their queries: {shown}; "
            + (f"{', '.join(refused)} cannot be valued" if refused else "that part is the model's extrapolation")
        )
    return found


def _thin_support(supports: Mapping[str, Support], covered: list[str]) -> list[str]:
    """Return which policies the log has few runs of."""
    refused = [n for n, s in supports.items() if n not in covered and s.unsupported_share <= _UNSUPPORTED]
    few = [n for n in covered if supports[n].effective_sample_size < _FEW]
    found = []
    for names, text in ((refused, "cannot be valued"), (few, "the figures rest on few runs")):
        if names:
            shown = ", ".join(f"{n} ({supports[n].effective_sample_size:.0f} effective queries)" for n in names)
            found.append(f"the log has few runs of what some policies take: {shown}; {text}")
    return found


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
