"""Reward models of responses from verdicts: r(query, response), the chance that the response is right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.special import expit

from oirl.errors import DataError
from oirl.logs.cells import make_cells
from oirl.logs.checkers import ANSWER_KINDS, answer_kind, response_kind
from oirl.logs.groups import group_queries
from oirl.logs.pairs import NO_RESPONSE, NO_VERDICT
from oirl.logs.store import conform_table, table_fingerprint
from oirl.rewards.base import ResponseScorer
from oirl.rewards.calibration import apply_platt, cross_fit_platt
from oirl.rewards.learners import Verdicts
from oirl.rewards.logistic import fit_logistic
from oirl.rewards.response_features import CHECKS_ONLY
from oirl.rewards.training import COLUMNS, SeenQueries, summarise
from oirl.statistics import metrics

_CHOSEN_DRAWS = 4
RESPONSE_COLUMNS = (*COLUMNS, "response", "answer")
"""The columns of a log that reward models of responses read."""


class ResponseRewardModel(ResponseScorer):
    """Estimates whether a response is right, from logged verdicts, by a classifier on features of query and response.

    Args:
        model: A registered response model: "linear" (default), "xgboost" or "mlp".
        embedder: As for `oirl.rewards.base.ResponseScorer`.
        folds: Members of the committee, each of which leaves out one fold of the queries.
        seed: For the folds and for learners that draw.
        params: Parameters of the learner, None for its defaults.

    Attributes:
        metrics_: Cross-fitted: auc, auc_within_query, brier, brier_skill (against the mean success), ece, log_loss.
        chosen_: How the best of N is calibrated (`fit_chosen`).
        held_out_: Cross-fitted predictions (`HeldOutResponses`); not saved.
        seen_: The queries learned from.
        data_: What was learned from: fingerprint, counts, success, best single prompt.
        left_out_: Reason -> rows of the log that nothing was learned from.
        warnings_: What limits the model.
    """

    kind = "response-reward-model"
    learners = "response-models"

    def __init__(
        self,
        model: str = "linear",
        *,
        embedder: Any = CHECKS_ONLY,
        folds: int = 5,
        seed: int = 0,
        params: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(model, embedder=embedder, folds=folds, seed=seed, params=params)

    def fit(self, log: pa.Table) -> ResponseRewardModel:
        """Learn from the rows of a log that have a response and a verdict, whatever their split.

        Args:
            log: Interactions.

        Raises:
            DataError: If there are no such rows, all verdicts are alike, or there are too few unlike queries.
            ConfigError: If a parameter is not allowed.
            UnknownNameError: If the model or the embedder is not registered.
        """
        log = conform_table(log, RESPONSE_COLUMNS)
        kept, self.left_out_ = graded_responses(log)
        every, log = make_cells(log), kept  # prompts are compared by all verdicts, also of runs without a response
        rows = DistinctResponses(log)
        runs, successes = rows.runs, rows.successes
        if successes.sum() in (0, runs.sum()):
            raise DataError("all responses of the log are right, or all are wrong; there is nothing to tell apart")
        grouping = group_queries(rows.queries)
        self.warnings_ = [w for w in [grouping.warning()] if w]
        keys = [rows.query_ids[q] for q in rows.query]
        texts = [rows.queries[q] for q in rows.query]
        groups = grouping.labels[rows.query]
        scores, fold = self._learn(texts, rows.responses, Verdicts(runs, successes), groups, keys)
        self._platt, of_fold = cross_fit_platt(scores, runs, successes, fold)
        probability = np.empty(len(scores))
        for f, platt in enumerate(of_fold):
            probability[fold == f] = apply_platt(scores[fold == f], platt)
        self.held_out_ = HeldOutResponses(rows, probability, fold, groups)
        rng = np.random.default_rng(int(self.seed))
        self.chosen_ = fit_chosen(rows, np.clip(probability, 1e-9, 1 - 1e-9), rng)
        self.seen_ = SeenQueries.of(rows.queries)
        self.metrics_ = response_metrics(probability, runs, successes, rows.query, successes.sum() / runs.sum())
        prompts = summarise(every, table_fingerprint(log))
        self.data_ = {
            "fingerprint": prompts.fingerprint,
            "n_rows": len(log),
            "n_responses": len(rows.responses),
            "n_queries": len(rows.queries),
            "success": float(successes.sum() / runs.sum()),
            "longer_preferred": _longer_preferred(rows),
            "best_prompt": every.prompt_ids[prompts.best],
            "prompts": dict(zip(every.prompt_ids, prompts.rates.tolist(), strict=True)),
            "answers": answer_kind(log["answer"].drop_null().to_pylist()) or response_kind(rows.responses),
        }
        return self

    def chosen_probability(self, reward: np.ndarray, count: int) -> np.ndarray:
        """Return P(right) of the response with the highest reward among `count`, float, as `reward`.

        The best of many is right less often than its own P(right) says: it is there because the model thinks well of
        it. Learned from best-of-N on the cross-fitted rewards of the training log; P(right) where no query had two
        responses.
        """
        if self.chosen_ is None:
            return np.asarray(expit(reward))
        c = self.chosen_
        return np.asarray(expit(c["slope"] * reward + c["per_log_n"] * np.log(min(count, c["most"])) + c["intercept"]))

    def _calibration(self) -> dict[str, Any]:
        return super()._calibration() | {"chosen": self.chosen_}

    @classmethod
    def _restore(cls, manifest: Any, arrays: Any, embedder: Any) -> ResponseRewardModel:
        model = super()._restore(manifest, arrays, embedder)
        model.chosen_ = manifest.calibration["chosen"]
        data = model.data_
        rates = np.array(list(data["prompts"].values()), dtype=np.float64)
        whole = (
            0 <= data["success"] <= 1 and 0 <= data["longer_preferred"] <= 1 and data["best_prompt"] in data["prompts"]
        )
        if not whole or not np.isfinite(rates).all() or data["answers"] not in ANSWER_KINDS:
            raise ValueError("what it says of its training log does not fit together")
        if not np.isfinite(model.chosen_probability(np.zeros(1), 2)).all():
            raise ValueError("the calibration of its choices is not finite")
        return model


class DistinctResponses:
    """The distinct responses of a log and their verdicts.

    Attributes:
        query_ids: Distinct queries, length Q.
        queries: Their texts.
        query: Position of each response's query, int64 (n,).
        responses: Length n; equal texts to one query are one.
        runs: How often each was given, int64 (n,).
        successes: How often it was right, int64 (n,).
        row: Position of each row of the log among the responses, int64 (rows,).
    """

    def __init__(self, log: pa.Table) -> None:
        ids = log["query_id"].cast(pa.string()).dictionary_encode().combine_chunks()
        texts = log["response"].cast(pa.string()).dictionary_encode().combine_chunks()
        query = np.asarray(ids.indices, dtype=np.int64)
        text = np.asarray(texts.indices, dtype=np.int64)
        self.query_ids: list[str] = ids.dictionary.to_pylist()
        first_row = np.unique(query, return_index=True)[1]
        self.queries: list[str] = log["query"].take(pa.array(first_row)).to_pylist()
        key = query * len(texts.dictionary) + text
        _, first, self.row = np.unique(key, return_index=True, return_inverse=True)
        self.query = query[first]
        known = texts.dictionary.to_pylist()
        self.responses: list[str] = [known[i] for i in text[first]]
        self.runs = np.bincount(self.row)
        right = log["correct"].combine_chunks().to_numpy(zero_copy_only=False).astype(np.int64)
        self.successes = np.bincount(self.row, weights=right).astype(np.int64)


@dataclass(frozen=True, slots=True)
class HeldOutResponses:
    """Predictions for training responses by members of the committee that have seen neither them nor a near duplicate.

    The scale of features, which says nothing of outcomes, is that of all training responses.

    Attributes:
        rows: The responses.
        probability: Predicted chance of being right, float (n,).
        fold: Fold of each, int64 (n,).
        groups: Group of near duplicates of each one's query, int64 (n,).
    """

    rows: DistinctResponses
    probability: np.ndarray
    fold: np.ndarray
    groups: np.ndarray


def fit_chosen(rows: DistinctResponses, probability: np.ndarray, rng: np.random.Generator) -> dict[str, float] | None:
    """Return slope, per_log_n and intercept of P(best is right) = σ(slope · reward + per_log_n · log N + intercept).

    For N = 1, 2, 4, … the response with the highest reward among N random ones of a query is drawn several times; every
    N counts alike. `most` is the largest N.

    Args:
        rows: The responses.
        probability: Cross-fitted, float (n,).
        rng: Draws the responses.

    Returns:
        None where no query has two responses.
    """
    reward = np.log(probability / (1 - probability))
    rate = rows.successes / rows.runs
    query = rows.query[rows.row]
    counts = np.bincount(query)
    starts = np.cumsum(counts) - counts
    most, drawn = int(np.quantile(counts, 0.5, method="higher")), []
    if most < 2:
        return None
    for n in [2**k for k in range(most.bit_length())]:
        enough = np.flatnonzero(counts >= n)
        found = []
        for _ in range(_CHOSEN_DRAWS):
            order = np.lexsort((rng.random(len(query)), query))
            picks = rows.row[order[starts[enough][:, None] + np.arange(n)]]
            best = picks[np.arange(len(picks)), reward[picks].argmax(axis=1)]
            found.append(np.stack([reward[best], np.full(len(best), np.log(n)), rate[best]], axis=1))
        both = np.concatenate(found)
        drawn.append(np.column_stack([both, np.full(len(both), 1 / len(both))]))
    table = np.concatenate(drawn)
    weight = table[:, 3] * len(table) / len(drawn)
    w, b = fit_logistic(table[:, :2].astype(np.float32), table[:, 2], weight, 1e-3)
    return {"slope": float(w[0]), "per_log_n": float(w[1]), "intercept": b, "most": float(most)}


def _longer_preferred(rows: DistinctResponses) -> float:
    """Return how often the longer of a right and a wrong response to one query is the right one, ½ if not known."""
    lengths = np.array([len(r) for r in rows.responses], dtype=float)
    share = metrics.auc_within(lengths, rows.runs, rows.successes, rows.query)
    return 0.5 if np.isnan(share) else share


def graded_responses(log: pa.Table) -> tuple[pa.Table, Counter[str]]:
    """Return the rows with a response and a verdict, and reason -> number of the others.

    Raises:
        DataError: If there is none.
    """
    graded = pc.is_valid(log["correct"])
    text = pc.fill_null(pc.greater(pc.binary_length(pc.utf8_trim_whitespace(log["response"])), 0), False)
    kept = log.filter(pc.and_(graded, text))
    missing = Counter({NO_VERDICT: pc.sum(pc.invert(graded)).as_py() or 0})
    missing[NO_RESPONSE] = pc.sum(pc.and_(graded, pc.invert(text))).as_py() or 0
    if not len(kept):
        why = "; ".join(f"{count:,} rows: {reason}" for reason, count in (+missing).items()) or "it has no rows"
        raise DataError(
            f"the log has no row with a response and a verdict ({why}); import the responses with --map "
            "response=FIELD, and verdicts with --grade"
        )
    return kept, +missing


def response_metrics(
    probability: np.ndarray, runs: np.ndarray, successes: np.ndarray, query: np.ndarray, rate: float
) -> dict[str, float | None]:
    """Return the metrics of predicted correctness, over rows of the log; None where a metric is not defined.

    Args:
        probability: Predicted, float (n,).
        runs: Int (n,).
        successes: Int (n,).
        query: Query of each response, int (n,).
        rate: Success in the training log: the reference of `brier_skill`.
    """
    reference = metrics.brier(np.full(len(runs), rate), runs, successes)
    brier = metrics.brier(probability, runs, successes)
    return metrics.known(
        {
            "auc": metrics.auc(probability, runs, successes),
            "auc_within_query": metrics.auc_within(probability, runs, successes, query),
            "brier": brier,
            "brier_skill": metrics.skill(brier, reference),
            "ece": metrics.ece(probability, runs, successes),
            "log_loss": metrics.log_loss(probability, runs, successes),
        }
    )
