"""Evaluate a selector on a log: metrics of its reward model, values of policies, all without a language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from oirl.errors import ConfigError, DataError, NotFittedError
from oirl.evaluation.ceilings import best_choice_ceiling
from oirl.evaluation.cost_curve import cost_document
from oirl.evaluation.logged import logged_runs
from oirl.evaluation.policies import one_hot
from oirl.evaluation.success import prompt_success
from oirl.evaluation.valuation import (
    ESTIMATORS,
    Valuation,
    allows_replay,
    complete_queries,
    replay_policies,
    value_off_policy,
)
from oirl.logs.cells import Cells, make_cells, name_actions
from oirl.logs.costs import COST_COLUMNS
from oirl.logs.groups import group_queries
from oirl.logs.splits import find_leaks, test_rows
from oirl.logs.store import conform_table
from oirl.rewards.prompts import PromptRewardModel
from oirl.rewards.training import COLUMNS, check_seed, pooled_models_warning
from oirl.statistics import metrics
from oirl.statistics.intervals import MIN_QUERIES, bootstrap_means, percentile_interval, success_interval

POLICIES = ("best_prompt", "selector", "deployed", "knn", "random")
EVALUATED = tuple(dict.fromkeys((*COLUMNS, "propensity", *COST_COLUMNS)))
"""The columns of a log that `evaluate` reads."""


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
        null_model: The same metrics of predicting each prompt's success in the training log for every query.
        prompts: Success of each prompt with its interval.
        policies: Name -> value and gain over `best_prompt`, both with 95% intervals, and the estimator.
        off_policy: Where values are not replayed: how prompts were chosen, support, and what each estimator says.
        ceiling: What the best choice per query could reach.
        deploy: What the gate decided when the model was fitted.
        cost: What prompts and policies cost, and the cost-quality curve (`oirl.evaluation.cost_curve`); None where
            costs are not known.
        warnings: What limits the figures.
    """

    n_rows: int
    n_queries: int
    n_prompts: int
    model: dict[str, float | None]
    null_model: dict[str, float | None]
    prompts: list[dict[str, Any]]
    policies: dict[str, dict[str, Any]]
    off_policy: dict[str, Any] | None
    ceiling: dict[str, Any]
    deploy: dict[str, Any]
    cost: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the evaluation as a dictionary for JSON; what cannot be known is None."""
        return asdict(self)


def evaluate(
    selector: Selector,
    log: pa.Table,
    *,
    estimator: str = "auto",
    prices: Mapping[str, tuple[float, float]] | None = None,
    seed: int = 0,
    draws: int = 2000,
) -> Evaluation:
    """Evaluate a fitted selector and its reward model on a log.

    Rows that the log marks "test" are used where it marks any. Where at least half of the queries were run under every
    prompt of the model, values of policies are replayed on these: exact. Else they come from an off-policy estimator,
    with the propensities of the log or estimated ones (`oirl.evaluation.valuation`). Intervals come from a bootstrap
    over queries, near duplicates taken together, paired for gains.

    Args:
        selector: A fitted or loaded `oirl.PromptSelector`.
        log: Interactions with verdicts.
        estimator: "auto", or one of `oirl.evaluation.valuation.ESTIMATORS`.
        prices: Prices of tokens by model, for logs without costs (`oirl.logs.costs.read_prices`).
        seed: For the bootstrap.
        draws: Number of bootstrap resamples.

    Raises:
        NotFittedError: If the selector is not fitted.
        DataError: If the log has no verdicts, or none under a prompt of the model, or an id stands for another prompt.
        ConfigError: If the seed is negative, or the log does not allow the estimator.
    """
    if not hasattr(selector, "model_"):
        raise NotFittedError(
            "evaluate needs a fitted oirl.PromptSelector: call fit(log), or oirl.load(folder), first; models of "
            "responses have oirl.evaluate_responses and oirl.evaluate_preferences"
        )
    check_seed(seed)
    if estimator not in ("auto", *ESTIMATORS):
        raise ConfigError(f"unknown estimator {estimator!r}; known: auto, {', '.join(ESTIMATORS)}")
    rng = np.random.default_rng(seed)
    found = _read(selector, log)
    cells, model = found.cells, selector.model_
    policies, notes, valuation, clusters = _valued(selector, found, estimator, seed)
    found.warnings += valuation.warnings
    if len(np.unique(clusters[valuation.chosen])) < MIN_QUERIES:
        found.warnings.append(f"intervals of fewer than {MIN_QUERIES} unlike queries are too narrow to be relied upon")
    differing = {name for name, policy in policies.items() if np.any(policy != policies["best_prompt"])}
    values = _intervals(valuation, clusters, differing, rng, draws)
    reached = [] if found.seen or valuation.off_policy else list(valuation.contributions.values())
    lows = [values[name]["ci_low"] for name in valuation.contributions] if reached else []
    own_groups = found.groups[found.here]
    ceiling, limits = _ceiling(*cells.matrices(), own_groups, rng, reached, lows)
    scores = found.scores[found.here]
    thrift = cost_document(
        getattr(selector, "costs_", None),
        found.rows,
        cells,
        scores,
        evaluated_policies(selector, cells.queries, scores)[0],
        own_groups,
        prices,
        best=model.train_.best,
        margin=getattr(selector.deployment_, "margin", 0.0),
    )
    return Evaluation(
        n_rows=int(cells.runs.sum()),
        n_queries=len(cells.queries),
        n_prompts=len(np.unique(cells.prompt_index)),
        model=model_metrics(scores[cells.query_index, cells.prompt_index], cells, model.train_.rates),
        null_model=model_metrics(model.train_.rates[cells.prompt_index], cells, model.train_.rates),
        prompts=[s.to_dict() for s in prompt_success(cells, own_groups)],
        policies={name: value | notes.get(name, {}) for name, value in values.items()},
        off_policy=valuation.off_policy,
        ceiling=ceiling,
        deploy={"policy": selector.deployment_.policy, "reason": selector.deployment_.reason},
        cost=thrift,
        warnings=found.warnings + limits,
    )


@dataclass(slots=True)
class _Tested:
    """The rows of a log that are evaluated, and what the model says of them.

    Attributes:
        rows: The rows.
        everything: Their graded runs, under whatever prompt.
        cells: Those under prompts of the model.
        here: Which queries of `everything` are those of `cells`, bool (Q,).
        scores: The model's estimates for the queries of `everything`, float (Q, P).
        groups: Group of near duplicates of these queries, int (Q,).
        seen: Whether the model has learned from some of them.
        warnings: What limits the figures.
    """

    rows: pa.Table
    everything: Cells
    cells: Cells
    here: np.ndarray
    scores: np.ndarray
    groups: np.ndarray
    seen: bool
    warnings: list[str]


def _read(selector: Selector, log: pa.Table) -> _Tested:
    model = selector.model_
    log = name_actions(conform_table(log, EVALUATED), getattr(selector, "actions", "prompt"))
    rows = test_rows(log)
    everything = make_cells(rows)
    _check_prompts(everything, model)
    cells = everything.of_prompts(model.prompt_ids_)
    if not len(cells.runs):
        raise DataError(
            f"the log has no run of a prompt that the model knows ({', '.join(model.prompt_ids_[:8])}); "
            f"prompts there: {', '.join(everything.prompt_ids[:8])}"
        )
    groups = group_queries(everything.queries)
    warnings, seen = _data_warnings(log, everything, cells, model)
    if groups.templated:
        warnings.append(
            f"{groups.templated:,} of {len(everything.queries):,} queries follow one template; the intervals take them "
            "for independent and speak of new fillings of that template only"
        )
    here = np.isin(everything.query_ids, cells.query_ids)
    scores = model.predict_proba(everything.queries)
    return _Tested(rows, everything, cells, here, scores, groups.labels, seen, warnings)


def _valued(
    selector: Selector, found: _Tested, estimator: str, seed: int
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]], Valuation, np.ndarray]:
    """Return the policies, what is shown beside their values, the values, and the groups of the queries behind them."""
    runs, successes = found.cells.matrices()
    complete = complete_queries(runs)
    if estimator == "replay" or (estimator == "auto" and allows_replay(complete)):
        policies, notes = evaluated_policies(selector, found.cells.queries, found.scores[found.here])
        valuation = replay_policies(policies, successes / np.maximum(runs, 1), complete)
        return policies, notes, valuation, found.groups[found.here]
    policies, notes = evaluated_policies(selector, found.everything.queries, found.scores)
    columns = np.array([_position(name, found.everything.prompt_ids) for name in selector.model_.prompt_ids_])
    logged = logged_runs(found.everything, found.groups, seed).of_prompts(columns)
    estimate = cross_fitted_estimate(selector.model_, found.rows, found.everything, found.scores)
    return policies, notes, value_off_policy(policies, logged, estimate, estimator), found.groups


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
    return metrics.known(found)


def evaluated_policies(
    selector: Selector, queries: list[str], scores: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]]]:
    """Return the policies of `POLICIES`, each float (Q, P), and what is shown beside their values."""
    model, deployment = selector.model_, selector.deployment_
    best, prompts = model.train_.best, scores.shape[1]
    chosen = {
        "best_prompt": np.full(len(scores), best),
        "selector": selector.choose(scores),
        "knn": model.knn_.predict(queries).argmax(axis=1),
    }
    found = {name: one_hot(choice, prompts) for name, choice in chosen.items()}
    found["random"] = np.full(scores.shape, 1 / prompts)
    found["deployed"] = found["selector" if deployment.policy == "selector" else "best_prompt"]
    notes: dict[str, dict[str, Any]] = {
        "best_prompt": {"prompt_id": model.prompt_ids_[best]},
        "selector": {"switched": float((chosen["selector"] != best).mean())},
    }
    return {name: found[name] for name in POLICIES}, notes


def cross_fitted_estimate(model: PromptRewardModel, log: pa.Table, cells: Cells, scores: np.ndarray) -> np.ndarray:
    """Return success estimated without each query's own runs, float (Q, P).

    A model of the same kind is cross-fitted to the log itself: the model at hand has chosen the selector's prompts, so
    that its own estimates of them are too high. Where the log is too small for that, or never ran a prompt, the
    model's estimates stand.
    """
    try:
        own = model.clone().fit(log)
    except DataError:
        return scores
    estimate = scores.copy()
    column = [_position(name, model.prompt_ids_) for name in own.prompt_ids_]
    row = {name: i for i, name in enumerate(cells.query_ids)}
    held_out = own.held_out_
    rows = np.array([row[name] for name in held_out.cells.query_ids])
    known = np.array([c for c in column if c >= 0], dtype=np.int64)
    estimate[np.ix_(rows, known)] = held_out.probability[:, [i for i, c in enumerate(column) if c >= 0]]
    return estimate


def _ends(name: str, low: float, high: float, value: float, least: float, most: float) -> dict[str, float]:
    ends = (min(value, max(least, float(low))), max(value, min(most, float(high))))
    return {f"{name}_low": ends[0], f"{name}_high": ends[1]}


def _intervals(
    valuation: Valuation, groups: np.ndarray, differing: set[str], rng: np.random.Generator, draws: int
) -> dict[str, dict[str, Any]]:
    """Return value and gain of each policy; sharing the resamples, equal policies have equal intervals."""
    unknown = dict.fromkeys(("value", "ci_low", "ci_high", "gain", "gain_ci_low", "gain_ci_high"))
    found: dict[str, dict[str, Any]] = {name: unknown | {"estimator": valuation.label} for name in POLICIES}
    names = list(valuation.contributions)
    if not names:
        return found
    table = np.stack([valuation.contributions[name] for name in names], axis=1)
    baseline = valuation.contributions.get("best_prompt")
    gains = table - (table[:, :1] if baseline is None else baseline[:, None])
    own = groups[valuation.chosen]
    clusters = len(np.unique(own))
    low, high = percentile_interval(bootstrap_means(np.hstack([table, gains]), rng, draws, own))
    for i, name in enumerate(names):
        j = i + len(names)
        if np.ptp(table[:, i]) == 0 and 0 <= table[0, i] <= 1:
            _, low[i], high[i] = success_interval(table[:, i], own)
        value = float(table[:, i].mean())
        # An unbiased estimate may leave the range of what it estimates; its interval is cut there.
        found[name] |= {"value": value, **_ends("ci", low[i], high[i], value, 0.0, 1.0)}
        if baseline is not None:
            gain = float(gains[:, i].mean())
            if np.ptp(gains[:, i]) == 0 and name in differing:
                # No query told them apart: of so many, up to three in a hundred could have (rule of three).
                low[j], high[j] = gain - 3 / clusters, gain + 3 / clusters
            found[name] |= {"gain": gain, **_ends("gain_ci", low[j], high[j], gain, -1.0, 1.0)}
    return found


def _ceiling(
    runs: np.ndarray,
    successes: np.ndarray,
    groups: np.ndarray,
    rng: np.random.Generator,
    reached: list[np.ndarray],
    lows: list[float],
) -> tuple[dict[str, Any], list[str]]:
    """Return the ceiling, no lower than what policies reached that have not seen these queries, and warnings."""
    ceiling = best_choice_ceiling(runs, successes, rng, groups)
    if ceiling.value is None:
        return ceiling.to_dict(), []
    complete = complete_queries(runs)
    repeated = (runs[complete] > 1).all(axis=1)
    floor = max((float(values[repeated].mean()) for values in reached), default=0.0)
    document = ceiling.to_dict() | {"value": max(ceiling.value, floor), "ci_high": max(ceiling.ci_high or 0.0, floor)}
    document["gain"] = document["value"] - (ceiling.best_prompt or 0.0)
    document["gain_ci_high"] = max(document["gain"], ceiling.gain_ci_high or 0.0)
    if repeated.all():
        return document | {"ci_low": max([ceiling.ci_low or 0.0, *lows])}, []
    return document, [
        f"the ceiling is that of the {ceiling.n_queries:,} queries that were run at least twice under every prompt, "
        f"not of all {len(repeated):,}"
    ]


def _check_prompts(everything: Cells, model: PromptRewardModel) -> None:
    known = dict(zip(model.prompt_ids_, model.prompts_, strict=True))
    for name, text in zip(everything.prompt_ids, everything.prompts, strict=True):
        if known.get(name, text) != text:
            raise DataError(
                f"the prompt {name!r} of the log has another text than the prompt of that id in the model; give the "
                "new template an id of its own"
            )


def _data_warnings(log: pa.Table, everything: Cells, cells: Cells, model: PromptRewardModel) -> tuple[list[str], bool]:
    """Return what limits the figures, and whether the model has seen some of these queries."""
    found = [w for w in (find_leaks(log).warning(), pooled_models_warning(log)) if w]
    seen = model.train_.seen.warning(cells.queries)
    found += [seen] if seen else []
    unknown = [name for name in everything.prompt_ids if name not in model.prompt_ids_]
    if unknown:
        shown = ", ".join(unknown[:5]) + (", …" if len(unknown) > 5 else "")
        found.append(f"{len(unknown)} prompts of the log are unknown to the model and were left out: {shown}")
    return found, seen is not None


def _position(name: str, names: list[str]) -> int:
    return names.index(name) if name in names else -1
