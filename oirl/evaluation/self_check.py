"""Check the off-policy estimators on the user's own log: thin its full matrix by a known policy, see how far off."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from oirl.errors import DataError
from oirl.evaluation.evaluate import Selector, cross_fitted_estimate, evaluated_policies
from oirl.evaluation.logged import logged_runs
from oirl.evaluation.valuation import complete_queries, contributions_by, replay_policies
from oirl.logs.cells import Cells, make_cells
from oirl.logs.groups import group_queries
from oirl.logs.splits import test_rows
from oirl.logs.store import conform_table
from oirl.rewards.training import COLUMNS, check_seed
from oirl.statistics.intervals import MIN_QUERIES, normal_interval

_log = logging.getLogger(__name__)
_POLICIES = ("best_prompt", "selector", "random")
_ESTIMATED = " (propensities estimated)"


@dataclass(frozen=True, slots=True)
class EstimatorError:
    """How far an estimator was off, over repeated thinnings.

    Attributes:
        estimator: Its name; "(propensities estimated)" where it was not told them.
        policy: The policy that was valued.
        mean_error: Mean of estimate − truth: its bias, up to chance.
        rmse: Root of the mean squared error.
        half_width: Mean half width of its 95% intervals (analytic, clustered).
        covered: Share of the intervals that hold the truth.
    """

    estimator: str
    policy: str
    mean_error: float
    rmse: float
    half_width: float
    covered: float


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """What thinning a log by a known policy shows.

    Attributes:
        n_queries: Complete queries, of which each gave one run.
        repeats: Thinnings.
        logger: The policy that drew the prompts, in words.
        truth: Policy -> its value by replay of all runs.
        errors: Of each estimator and policy.
    """

    n_queries: int
    repeats: int
    logger: str
    truth: dict[str, float]
    errors: list[EstimatorError]

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as a dictionary for JSON."""
        return asdict(self)


def self_check(selector: Selector, log: pa.Table, *, repeats: int = 20, seed: int = 0) -> SelfCheck:
    """Thin the complete queries of a log to one run each and value policies by every estimator.

    The prompt of a query is drawn half of the time evenly, and else by what similar training queries favour, as a
    person who runs what seems best would: a logger that depends on the query, whose propensities are known.

    Args:
        selector: A fitted selector.
        log: Interactions with verdicts, as for `evaluate`.
        repeats: Thinnings.
        seed: For the draws.

    Raises:
        DataError: If fewer than 20 queries were run under every prompt of the model.
    """
    check_seed(seed)
    rng = np.random.default_rng(seed)
    model = selector.model_
    table = test_rows(conform_table(log, COLUMNS))
    cells = make_cells(table).of_prompts(model.prompt_ids_)
    runs, successes = cells.matrices()
    complete = complete_queries(runs)
    if complete.sum() < MIN_QUERIES:
        raise DataError(
            f"--self-check needs at least {MIN_QUERIES} queries that were run under every prompt, to know the truth; "
            f"there are {int(complete.sum())}"
        )
    cells = cells.of_queries(complete)
    runs, successes = runs[complete], successes[complete]
    scores = model.predict_proba(cells.queries)
    policies, _ = evaluated_policies(selector, cells.queries, scores)
    policies = {name: policies[name] for name in _POLICIES}
    exact = replay_policies(policies, successes / runs, np.ones(len(runs), dtype=bool))
    truth = {name: float(values.mean()) for name, values in exact.contributions.items()}
    groups = group_queries(cells.queries).labels
    logger = _logger(model.knn_.predict(cells.queries))
    found: dict[tuple[str, str], list[tuple[float, float, bool]]] = {}
    for repeat in range(repeats):
        _log.info("self-check %d of %d", repeat + 1, repeats)
        thin, rows = _thinned(cells, runs, successes, logger, rng)
        estimate = cross_fitted_estimate(model, rows, thin, scores)
        for told in (True, False):
            own = thin if told else _without_propensities(thin)
            logged = logged_runs(own, groups, seed)
            for name, policy in policies.items():
                for estimator, values in contributions_by(policy, logged, estimate).items():
                    if told or estimator == "doubly_robust":
                        key = (estimator if told else estimator + _ESTIMATED, name)
                        found.setdefault(key, []).append(_error(values, truth[name], groups))
    return SelfCheck(
        len(runs), repeats, "half evenly, half the prompt that similar training queries favour", truth, _summary(found)
    )


def _logger(favour: np.ndarray) -> np.ndarray:
    """Return π0, float (Q, P)."""
    prompts = favour.shape[1]
    return 0.5 / prompts + 0.5 * np.eye(prompts)[favour.argmax(axis=1)]


def _thinned(
    cells: Cells, runs: np.ndarray, successes: np.ndarray, logger: np.ndarray, rng: np.random.Generator
) -> tuple[Cells, pa.Table]:
    """Return one run of each query as cells, and as the rows of a log for the model of success."""
    queries = np.arange(len(runs))
    drawn = (rng.random((len(runs), 1)) > logger.cumsum(axis=1)[:, :-1]).sum(axis=1)
    right = rng.random(len(runs)) < (successes / runs)[queries, drawn]
    thin = Cells(
        cells.query_ids,
        cells.queries,
        cells.prompt_ids,
        cells.prompts,
        queries,
        drawn,
        np.ones(len(runs), dtype=np.int64),
        right.astype(np.int64),
        1 / logger[queries, drawn],
    )
    rows = pa.table(
        {
            "query_id": cells.query_ids,
            "query": cells.queries,
            "prompt_id": [cells.prompt_ids[p] for p in drawn],
            "prompt": [cells.prompts[p] for p in drawn],
            "correct": right,
        }
    )
    return thin, rows


def _without_propensities(cells: Cells) -> Cells:
    fields = (cells.query_ids, cells.queries, cells.prompt_ids, cells.prompts)
    return Cells(*fields, cells.query_index, cells.prompt_index, cells.runs, cells.successes)


def _error(values: np.ndarray, truth: float, groups: np.ndarray) -> tuple[float, float, bool]:
    low, high = normal_interval(values, groups)
    return float(values.mean() - truth), float(high - low) / 2, bool(low <= truth <= high)


def _summary(found: Mapping[tuple[str, str], list[tuple[float, float, bool]]]) -> list[EstimatorError]:
    errors = []
    for (estimator, policy), entries in found.items():
        off, half, hit = (np.array(column, dtype=float) for column in zip(*entries, strict=True))
        rmse = float(np.sqrt((off**2).mean()))
        errors.append(EstimatorError(estimator, policy, float(off.mean()), rmse, float(half.mean()), float(hit.mean())))
    return sorted(errors, key=lambda e: (_POLICIES.index(e.policy), e.rmse))
