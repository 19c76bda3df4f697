"""What a run has come to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from oirl.statistics.intervals import normal_interval, paired_interval


@dataclass(slots=True)
class TuneReport:
    """What a run has come to.

    Attributes:
        method: Its name.
        out: The run's folder.
        model: The folder of the tuned model.
        prompts: Name -> template under which it was trained to be asked; the first is the one to use.
        before: Validation of the initial model: success with ci_low and ci_high, loss; what was measured.
        after: That of the result, with `gain`, `gain_ci_low`, `gain_ci_high` in success, paired by query.
        iterations: Figures of the rollouts of each iteration.
        kept: Which weights the result has: iteration and updates.
        left_out: Reason -> responses that nothing was learned from.
        guards: What was found beyond a limit, and what was done: `reason`, `action`, `iteration`.
        warnings: What is worth saying.
    """

    method: str
    out: str
    model: str
    prompts: dict[str, str]
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    iterations: list[dict[str, Any]] = field(default_factory=list)
    kept: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    guards: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dictionary for JSON."""
        return asdict(self)


def compare_validations(report: TuneReport, measured: list[dict[str, Any]], kept: dict[str, Any] | None = None) -> None:
    """Fill in what validations say: the initial model against the result, paired by query.

    Args:
        report: To be filled.
        measured: The validations in order, the first of the initial model.
        kept: That of the result, the best; the last where None.
    """
    after = measured[-1] if kept is None else kept
    report.before, report.after = _shown(measured[0]), _shown(after)
    report.kept = {"iteration": after["iteration"], "step": after["step"]}
    if "right" in after:
        report.after |= gain_of(measured[0]["right"], after["right"], measured[0]["groups"])
    for name in after.get("by_query", ()):
        report.after |= reward_gain(name, measured[0], after)
    if report.kept == {"iteration": 0, "step": 0}:
        report.warnings.append(
            "no validation was better than that of the initial model: the result is the initial model"
        )
        return
    if kept is not None and len(measured) > 2:
        report.warnings.append(
            f"the result is the best of {len(measured) - 1} validations, so its figures and gain there are too good; "
            "measure it on other queries with `oirl generate` and `oirl audit`"
        )
    low, high = report.after.get("gain_ci_low"), report.after.get("gain_ci_high")
    if high is not None and high < 0:
        report.warnings.append("the result is worse than the initial model on the held-out queries")
    elif low is not None and low <= 0:
        report.warnings.append("the result is not shown to be better than the initial model: 0 lies in the interval")
    elif low is None and after.get("loss", -math.inf) >= measured[0].get("loss", math.inf):
        report.warnings.append("the loss of held-out responses has not fallen: nothing is shown to be gained")


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    hidden = ("right", "groups", "by_query", "reward_model", "samples", "kind", "iteration", "step", "value")
    return {k: v for k, v in row.items() if k not in hidden}


def reward_gain(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float]:
    """Return `NAME_gain` with its 95% interval: the paired gain in a reward on the same queries, clustered by group."""
    if before.get("reward_model", 0) != after.get("reward_model", 0) and name == "reward":
        return {}  # two models' rewards cannot be compared
    first, last = (np.array(row["by_query"][name], dtype=np.float64) for row in (before, after))
    gains = last - first
    known = ~np.isnan(gains)
    if known.sum() < 2:
        return {}
    low, high = normal_interval(gains[known], np.array(before["groups"])[known])
    return {
        f"{name}_gain": float(gains[known].mean()),
        f"{name}_gain_ci_low": float(low),
        f"{name}_gain_ci_high": float(high),
    }


def gain_of(before: Sequence[int], after: Sequence[int], groups: Sequence[int]) -> dict[str, float]:
    """Return the paired gain in success on the same queries, with its 95% interval.

    Args:
        before: Verdicts, 0 or 1, (n,).
        after: The same of the same queries.
        groups: Near duplicates of each query have its number; where there are some, errors are clustered by it.
    """
    pairs = list(zip(before, after, strict=True))
    gain, low, high = paired_interval(pairs.count((0, 1)), pairs.count((1, 0)), len(pairs))
    if len(set(groups)) < len(groups):
        ends = normal_interval(np.array(after, dtype=np.float64) - np.array(before), np.array(groups))
        low, high = min(low, float(ends[0])), max(high, float(ends[1]))
    return {"gain": float(gain), "gain_ci_low": float(low), "gain_ci_high": float(high)}
