"""Evaluate a selector on a log: metrics of its reward model, values of policies, all without a language model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from oirl.errors import DataError
from oirl.evaluation import metrics
from oirl.evaluation.intervals import bootstrap_means, percentile_interval
from oirl.evaluation.policies import held_out_ceiling, one_draw_oracle, replay
from oirl.evaluation.success import prompt_success, success_interval
from oirl.logs.cells import Cells, make_cells
from oirl.logs.splits import find_leaks, test_rows
from oirl.rewards.prompts import PromptRewardModel

_METHOD = (
    "lower bound: each query's prompt chosen by its runs but one and the model's estimate, scored on the run left out"
)


class Selector(Protocol):
    """What `evaluate` needs of a selector (see `oirl.PromptSelector`)."""

    @property
    def model_(self) -> PromptRewardModel:
        """The fitted reward model."""
        ...

    @property
    def deployment_(self) -> Any:
        """What the gate decided: `policy`, `reason`, `best_prompt`."""
        ...

    def choose(self, scores: np.ndarray) -> np.ndarray:
        """Return positions of prompts, int (Q,), for scores (Q, P), as if the gate had let the selector pass."""
        ...


@dataclass(slots=True)
class Evaluation:
    """What `evaluate` found; `to_dict` gives the JSON document.

    Attributes:
        n_rows: Graded rows under prompts that the model knows.
        n_queries: Distinct queries among them.
        n_prompts: Distinct prompts among them.
        model: Metrics of the reward model, over rows.
        prompts: Success of each prompt with its interval.
        policies: Name -> value and gain over `best_prompt`, both with 95% intervals, and the estimator.
        ceiling: What the best choice per query could reach.
        deploy: What the gate decided when the model was fitted.
        warnings: What limits the figures.
    """

    n_rows: int
    n_queries: int
    n_prompts: int
    model: dict[str, float | None]
    prompts: list[dict[str, Any]]
    policies: dict[str, dict[str, Any]]
    ceiling: dict[str, Any]
    deploy: dict[str, Any]
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the evaluation as a dictionary for JSON; what cannot be known is None."""
        return asdict(self)


def evaluate(selector: Selector, log: pa.Table, *, seed: int = 0, draws: int = 2000) -> Evaluation:
    """Evaluate a fitted selector and its reward model on a log.

    Rows that the log marks "test" are used where it marks any. Values of policies are replayed: exact on queries that
    were run under every prompt of the model. Intervals come from a bootstrap over queries, paired for gains.

    Args:
        selector: A fitted or loaded `oirl.PromptSelector`.
        log: Interactions with verdicts.
        seed: For the bootstrap.
        draws: Number of bootstrap resamples.

    Raises:
        DataError: If the log has no verdicts, or none under a prompt of the model.
    """
    model = selector.model_
    rng = np.random.default_rng(seed)
    rows = test_rows(log)
    everything = make_cells(rows)
    cells = everything.of_prompts(model.prompt_ids_)
    if not len(cells.runs):
        raise DataError(
            f"the log has no run of a prompt that the model knows ({', '.join(model.prompt_ids_[:8])}); "
            f"prompts there: {', '.join(everything.prompt_ids[:8])}"
        )
    scores = model.predict_proba(cells.queries)
    warnings = _data_warnings(log, everything, cells, model)
    policies, ceiling = _policies(selector, cells, scores, rng, draws, warnings)
    present = len(np.unique(cells.prompt_index))
    return Evaluation(
        n_rows=int(cells.runs.sum()),
        n_queries=len(cells.queries),
        n_prompts=present,
        model=model_metrics(scores[cells.query_index, cells.prompt_index], cells, model.train_.rates),
        prompts=[s.to_dict() for s in prompt_success(cells, rng, draws)],
        policies=policies,
        ceiling=ceiling,
        deploy={"policy": selector.deployment_.policy, "reason": selector.deployment_.reason},
        warnings=warnings,
    )


def model_metrics(probability: np.ndarray, cells: Cells, train_rates: np.ndarray) -> dict[str, float | None]:
    """Return the metrics of predicted success, over runs; None where a metric is not defined.

    Args:
        probability: Predicted success of each cell, float (C,).
        cells: The cells, with prompts in the order of `train_rates`.
        train_rates: Success of each prompt in the training log, float (P,): the reference of `brier_skill`.
    """
    n, k = cells.runs, cells.successes
    reference = metrics.brier(train_rates[cells.prompt_index], n, k)
    brier = metrics.brier(probability, n, k)
    found = {
        "auc": metrics.auc(probability, n, k),
        "auc_within_prompt": metrics.auc_within(probability, n, k, cells.prompt_index),
        "auc_within_query": metrics.auc_within(probability, n, k, cells.query_index),
        "brier": brier,
        "brier_skill": metrics.skill(brier, reference),
        "ece": metrics.ece(probability, n, k),
        "log_loss": metrics.log_loss(probability, n, k),
    }
    return {name: None if np.isnan(value) else value for name, value in found.items()}


def _policies(
    selector: Selector,
    cells: Cells,
    scores: np.ndarray,
    rng: np.random.Generator,
    draws: int,
    warnings: list[str],
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    runs, successes = cells.matrices()
    full = np.all(runs > 0, axis=1)
    if not full.all():
        warnings.append(
            f"policies are valued on the {int(full.sum()):,} of {len(full):,} queries that were run under all "
            f"{runs.shape[1]} prompts of the model; the others may differ from these"
        )
    model = selector.model_
    best = model.train_.best
    names = ("best_prompt", "selector", "knn", "random")
    if not full.any():
        none = {"value": None, "ci_low": None, "ci_high": None, "gain": None, "gain_ci_low": None}
        unknown = none | {"gain_ci_high": None, "estimator": "none: no query was run under every prompt"}
        ceiling = {"value": None, "method": unknown["estimator"], "one_draw_oracle": None}
        return {name: dict(unknown) for name in names}, ceiling
    runs, successes, scores = runs[full], successes[full], scores[full]
    rates = successes / runs
    queries = [q for q, keep in zip(cells.queries, full, strict=True) if keep]
    chosen = {
        "best_prompt": np.full(len(rates), best),
        "selector": selector.choose(scores),
        "knn": model.knn_.predict(queries).argmax(axis=1),
    }
    values = {name: replay(rates, choice) for name, choice in chosen.items()}
    values["random"] = rates.mean(axis=1)
    policies = {name: _value(values[name], values["best_prompt"], rng, draws) for name in names}
    policies["best_prompt"]["prompt_id"] = model.prompt_ids_[best]
    policies["selector"]["switched"] = float((chosen["selector"] != best).mean())
    return policies, _ceiling(runs, successes, scores, rng)


def _value(values: np.ndarray, base: np.ndarray, rng: np.random.Generator, draws: int) -> dict[str, Any]:
    mean, low, high = success_interval(values, rng, draws)
    gains = values - base
    gain_low, gain_high = percentile_interval(bootstrap_means(gains[:, None], rng, draws))
    return {
        "value": mean,
        "ci_low": low,
        "ci_high": high,
        "gain": float(gains.mean()),
        "gain_ci_low": float(gain_low[0]),
        "gain_ci_high": float(gain_high[0]),
        "estimator": "replay",
    }


def _ceiling(runs: np.ndarray, successes: np.ndarray, scores: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    oracle = one_draw_oracle(runs, successes)
    repeated = (runs > 1).all(axis=1)
    if not repeated.any():
        method = "not known: no query was run twice under every prompt, so luck and merit cannot be told apart"
        return {"value": None, "method": method, "one_draw_oracle": oracle}
    value = held_out_ceiling(runs[repeated], successes[repeated], scores[repeated], rng)
    return {"value": value, "method": _METHOD, "n_queries": int(repeated.sum()), "one_draw_oracle": oracle}


def _data_warnings(log: pa.Table, everything: Cells, cells: Cells, model: PromptRewardModel) -> list[str]:
    found = []
    leaks = find_leaks(log).warning()
    if leaks:
        found.append(leaks)
    exact, near = model.train_.overlap(cells.queries)
    if exact + near:
        found.append(
            f"of the {len(cells.queries):,} queries {exact:,} stood in the training log and {near:,} more did with "
            "other numbers: the figures flatter the model"
        )
    unknown = len(everything.prompt_ids) - len(np.unique(cells.prompt_index))
    if unknown:
        found.append(f"{unknown} prompts of the log are unknown to the model and were left out")
    return found
