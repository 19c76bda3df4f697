"""Evaluate a selector on a log: metrics of its reward model, values of policies, all without a language model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from oirl.errors import DataError, NotFittedError
from oirl.evaluation import metrics
from oirl.evaluation.intervals import MIN_QUERIES, bootstrap_means, percentile_interval
from oirl.evaluation.policies import held_out_ceiling, one_draw_oracle, replay
from oirl.evaluation.success import prompt_success, success_interval
from oirl.logs.cells import Cells, make_cells
from oirl.logs.splits import find_leaks, group_queries, test_rows
from oirl.logs.store import conform_table
from oirl.rewards.prompts import PromptRewardModel
from oirl.rewards.training import COLUMNS, check_seed, pooled_models_warning

POLICIES = ("best_prompt", "selector", "deployed", "knn", "random")
_METHOD = "at least this: choose on all runs but one, score on the run left out; or what a policy here reaches"


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
        ceiling: What the best choice per query could reach.
        deploy: What the gate decided when the model was fitted.
        warnings: What limits the figures.
    """

    n_rows: int
    n_queries: int
    n_prompts: int
    model: dict[str, float | None]
    null_model: dict[str, float | None]
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
    were run under every prompt of the model. Intervals come from a bootstrap over queries, near duplicates taken
    together, paired for gains.

    Args:
        selector: A fitted or loaded `oirl.PromptSelector`.
        log: Interactions with verdicts.
        seed: For the bootstrap.
        draws: Number of bootstrap resamples.

    Raises:
        NotFittedError: If the selector is not fitted.
        DataError: If the log has no verdicts, or none under a prompt of the model, or an id stands for another prompt.
        ConfigError: If the seed is negative.
    """
    if not hasattr(selector, "model_"):
        raise NotFittedError("evaluate needs a fitted oirl.PromptSelector: call fit(log), or oirl.load(folder), first")
    model = selector.model_
    check_seed(seed)
    rng = np.random.default_rng(seed)
    log = conform_table(log, COLUMNS)
    everything = make_cells(test_rows(log))
    _check_prompts(everything, model)
    cells = everything.of_prompts(model.prompt_ids_)
    if not len(cells.runs):
        raise DataError(
            f"the log has no run of a prompt that the model knows ({', '.join(model.prompt_ids_[:8])}); "
            f"prompts there: {', '.join(everything.prompt_ids[:8])}"
        )
    scores = model.predict_proba(cells.queries)
    groups = group_queries(cells.queries)
    warnings, seen = _data_warnings(log, everything, cells, model)
    if groups.templated:
        warnings.append(
            f"{groups.templated:,} of {len(cells.queries):,} queries follow one template; the intervals take them for "
            "independent and speak of new fillings of that template only"
        )
    replayed = _Replay(selector, cells, scores, groups.labels, rng, draws, seen)
    policies, ceiling = replayed.policies(warnings)
    present = len(np.unique(cells.prompt_index))
    return Evaluation(
        n_rows=int(cells.runs.sum()),
        n_queries=len(cells.queries),
        n_prompts=present,
        model=model_metrics(scores[cells.query_index, cells.prompt_index], cells, model.train_.rates),
        null_model=model_metrics(model.train_.rates[cells.prompt_index], cells, model.train_.rates),
        prompts=[s.to_dict() for s in prompt_success(cells, rng, draws, groups.labels)],
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


@dataclass(slots=True)
class _Replay:
    """Policies on the queries of a log that were run under every prompt of the model."""

    selector: Selector
    cells: Cells
    scores: np.ndarray
    groups: np.ndarray
    rng: np.random.Generator
    draws: int
    seen: bool

    def policies(self, warnings: list[str]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        """Return the values of the policies and the ceiling; add a warning where queries had to be left out."""
        runs, successes = self.cells.matrices()
        full = np.all(runs > 0, axis=1)
        if not full.all():
            warnings.append(
                f"policies are valued on the {int(full.sum()):,} of {len(full):,} queries that were run under all "
                f"{runs.shape[1]} prompts of the model; the others may differ from these, so compare the policies with "
                "each other, not with the success of the prompts"
            )
        if not full.any():
            return self._unknown()
        if len(np.unique(self.groups[full])) < MIN_QUERIES:
            warnings.append(f"intervals of fewer than {MIN_QUERIES} unlike queries are too narrow to be relied upon")
        runs, successes, scores, groups = runs[full], successes[full], self.scores[full], self.groups[full]
        rates = successes / runs
        model, deployment = self.selector.model_, self.selector.deployment_
        best = model.train_.best
        queries = [q for q, keep in zip(self.cells.queries, full, strict=True) if keep]
        chosen = {
            "best_prompt": np.full(len(rates), best),
            "selector": self.selector.choose(scores),
            "knn": model.knn_.predict(queries).argmax(axis=1),
        }
        values = {name: replay(rates, choice) for name, choice in chosen.items()}
        values["random"] = rates.mean(axis=1)
        values["deployed"] = values["selector" if deployment.policy == "selector" else "best_prompt"]
        found = self._values(values, groups)
        found["best_prompt"]["prompt_id"] = model.prompt_ids_[best]
        found["selector"]["switched"] = float((chosen["selector"] != best).mean())
        return found, self._ceiling(runs, successes, scores, [values[name] for name in chosen], warnings)

    def _unknown(self) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        why = "none: no query was run under every prompt"
        keys = ("value", "ci_low", "ci_high", "gain", "gain_ci_low", "gain_ci_high")
        unknown: dict[str, dict[str, Any]] = {name: dict.fromkeys(keys) | {"estimator": why} for name in POLICIES}
        unknown["best_prompt"]["prompt_id"] = self.selector.deployment_.best_prompt
        return unknown, {"value": None, "method": why, "one_draw_oracle": None}

    def _values(self, values: dict[str, np.ndarray], groups: np.ndarray) -> dict[str, dict[str, Any]]:
        """Return value and gain of each policy; sharing the resamples, equal policies have equal intervals."""
        table = np.stack([values[name] for name in POLICIES], axis=1)
        gains = table - values["best_prompt"][:, None]
        draws = bootstrap_means(np.hstack([table, gains]), self.rng, self.draws, groups)
        low, high = percentile_interval(draws)
        found = {}
        for i, name in enumerate(POLICIES):
            j = i + len(POLICIES)
            if np.ptp(table[:, i]) == 0:
                _, low[i], high[i] = success_interval(table[:, i], self.rng, self.draws, groups)
            found[name] = {
                "value": float(table[:, i].mean()),
                "ci_low": float(low[i]),
                "ci_high": float(high[i]),
                "gain": float(gains[:, i].mean()),
                "gain_ci_low": float(low[j]),
                "gain_ci_high": float(high[j]),
                "estimator": "replay",
            }
        return found

    def _ceiling(
        self,
        runs: np.ndarray,
        successes: np.ndarray,
        scores: np.ndarray,
        replayed: list[np.ndarray],
        warnings: list[str],
    ) -> dict[str, Any]:
        oracle = one_draw_oracle(runs, successes)
        repeated = np.all(runs > 1, axis=1)
        if not repeated.any():
            method = "not known: no query was run twice under every prompt, so luck and merit cannot be told apart"
            return {"value": None, "method": method, "one_draw_oracle": oracle}
        if not repeated.all():
            warnings.append(
                f"the ceiling is that of the {int(repeated.sum()):,} queries that were run at least twice under every "
                f"prompt, not of all {len(runs):,}"
            )
        # An estimate by a model that has seen these runs would bring their luck back in.
        rates = self.selector.model_.train_.rates
        estimate = np.broadcast_to(rates, scores.shape) if self.seen else scores
        value = held_out_ceiling(runs[repeated], successes[repeated], estimate[repeated], self.rng)
        return {
            # Policies that were fixed before these runs were seen cannot be above the ceiling but by chance.
            "value": max([value, *(float(v[repeated].mean()) for v in replayed)]),
            "method": _METHOD,
            "n_queries": int(repeated.sum()),
            "one_draw_oracle": one_draw_oracle(runs[repeated], successes[repeated]),
        }


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
    exact, near = model.train_.overlap(cells.queries)
    if exact + near:
        found.append(
            f"of the {len(cells.queries):,} queries {exact:,} stood in the training log"
            + (f" and {near:,} more did with other numbers" if near else "")
            + ": the figures flatter the model"
        )
    unknown = [name for name in everything.prompt_ids if name not in model.prompt_ids_]
    if unknown:
        shown = ", ".join(unknown[:5]) + (", …" if len(unknown) > 5 else "")
        found.append(f"{len(unknown)} prompts of the log are unknown to the model and were left out: {shown}")
    return found, exact + near > 0
