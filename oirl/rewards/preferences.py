"""Bradley-Terry reward models of responses from preference pairs, on embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.special import expit

from oirl.errors import ConfigError, DataError
from oirl.logs.pairs import group_pairs, usable_pairs
from oirl.logs.store import conform, table_fingerprint
from oirl.records import PREFERENCE_SCHEMA
from oirl.rewards.base import ResponseScorer
from oirl.rewards.calibration import cross_fit_platt
from oirl.rewards.learners import Comparisons
from oirl.rewards.training import SeenQueries
from oirl.statistics import metrics
from oirl.statistics.intervals import success_interval


class BradleyTerryRewardModel(ResponseScorer):
    """Estimates a reward r(query, response) such that P(y₊ preferred to y₋) = σ(r₊ − r₋) (Bradley and Terry 1952).

    Args:
        model: A registered preference model: "linear" (default), "xgboost", "mlp" or "classifier".
        embedder: As for `oirl.rewards.base.ResponseScorer`.
        margin: "none", or "pairs": the reward of the chosen response should be ahead by each pair's margin, over the
            mean margin of all.
        folds: Members of the committee, each of which leaves out one fold of the queries.
        seed: For the folds and for learners that draw.
        params: Parameters of the learner, None for its defaults.

    Attributes:
        metrics_: Cross-fitted: pair_accuracy with ci_low and ci_high, brier, ece, log_loss.
        seen_: The queries learned from.
        data_: What was learned from: fingerprint and counts.
        left_out_: Reason -> pairs that nothing was learned from.
        warnings_: What limits the model.
    """

    kind = "preference-reward-model"
    learners = "preference-models"

    def __init__(
        self,
        model: str = "linear",
        *,
        embedder: Any = "tfidf",
        margin: str = "none",
        folds: int = 5,
        seed: int = 0,
        params: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(model, embedder=embedder, folds=folds, seed=seed, params=params)
        self.margin = margin

    def clone(self) -> BradleyTerryRewardModel:
        """Return an unfitted model with the same parameters."""
        found = super().clone()
        found.margin = self.margin
        return found

    def fit(self, pairs: pa.Table) -> BradleyTerryRewardModel:
        """Learn from preference pairs, whatever their split; pairs with equal or empty texts are left out and counted.

        Args:
            pairs: Preference pairs (`oirl.logs.pairs.read_pairs`).

        Raises:
            DataError: If there are no usable pairs, or too few unlike queries.
            ConfigError: If a parameter is not allowed, or margins are asked for and not known.
            UnknownNameError: If the model or the embedder is not registered.
        """
        pairs, self.left_out_ = usable_pairs(conform_pairs(pairs))
        if not len(pairs):
            why = "; ".join(f"{count:,}: {reason}" for reason, count in self.left_out_.items()) or "there are none"
            raise DataError(f"no pair that says anything ({why}); make pairs with `oirl pairs` or `oirl import`")
        rows = PairedResponses(pairs)
        grouping = group_pairs(pairs)
        groups = grouping.labels
        of_row = np.zeros(len(rows.responses), dtype=np.int64)
        of_row[rows.chosen] = of_row[rows.rejected] = groups
        target = Comparisons(rows.chosen, rows.rejected, pair_margins(pairs, self.margin))
        scores, fold = self._learn(rows.queries, rows.responses, target, of_row, rows.queries)
        difference = scores[rows.chosen] - scores[rows.rejected]
        of_pair = fold[rows.chosen]
        slope, probability = calibrate_differences(difference, of_pair)
        # Rewards are free up to a constant: the mean over the training responses is set to 0.
        self._platt = (slope, -slope * float(scores.mean()))
        self.warnings_ = [w for w in [grouping.warning()] if w]
        self.seen_ = SeenQueries.of(rows.queries)
        self.metrics_ = preference_metrics(difference, probability, groups)
        self.data_ = {
            "fingerprint": table_fingerprint(pairs),
            "n_pairs": len(pairs),
            "n_queries": len(set(rows.queries)),
            "margin": self.margin,
            "longer_preferred": longer_preferred(pairs),
        }
        return self

    @classmethod
    def _restore(cls, manifest: Any, arrays: Any, embedder: Any) -> BradleyTerryRewardModel:
        model = super()._restore(manifest, arrays, embedder)
        model.margin = manifest.data["margin"]
        if not 0 <= manifest.data["longer_preferred"] <= 1:
            raise ValueError("what it says of its training pairs does not fit together")
        return model


class PairedResponses:
    """The distinct responses of preference pairs.

    Attributes:
        queries: The query of each, length n.
        responses: Length n.
        chosen: Position of each pair's chosen response, int64 (m,).
        rejected: Position of its rejected one, int64 (m,).
    """

    def __init__(self, pairs: pa.Table) -> None:
        position: dict[tuple[str, str], int] = {}
        sides = []
        queries = pairs["query"].to_pylist()
        for name in ("chosen", "rejected"):
            texts = zip(queries, pairs[name].to_pylist(), strict=True)
            sides.append(np.array([position.setdefault(key, len(position)) for key in texts], dtype=np.int64))
        self.queries = [query for query, _ in position]
        self.responses = [response for _, response in position]
        self.chosen, self.rejected = sides


def conform_pairs(pairs: pa.Table) -> pa.Table:
    """Return preference pairs with the columns and types of the schema.

    Raises:
        DataError: If a required column is missing or holds nulls.
    """
    batches = [conform(batch, "the table of pairs", PREFERENCE_SCHEMA) for batch in pairs.to_batches()]
    return pa.Table.from_batches(batches, PREFERENCE_SCHEMA)


def calibrate_differences(difference: np.ndarray, fold: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the slope of P(chosen preferred) = σ(slope · (s₊ − s₋)), and that probability by the other folds' slopes.

    Args:
        difference: s₊ − s₋ of each pair, by a model that has not seen it, float (m,).
        fold: Fold of each pair, int (m,), from 0.
    """
    # Each pair in both orders makes the intercept 0.
    ones, none = np.ones(len(difference), dtype=np.int64), np.zeros(len(difference), dtype=np.int64)
    both = (np.r_[difference, -difference], np.r_[ones, ones], np.r_[ones, none], np.r_[fold, fold])
    (slope, _), of_fold = cross_fit_platt(*both)
    slopes = np.array([s for s, _ in of_fold])
    return slope, np.asarray(expit(slopes[fold] * difference))


def pair_margins(pairs: pa.Table, margin: str) -> np.ndarray | None:
    """Return the margin of each pair over the mean margin, float (m,), None for margin "none".

    Raises:
        ConfigError: If margins are asked for ("pairs") and not known, or not above 0 on average.
    """
    if margin == "none":
        return None
    if margin != "pairs":
        raise ConfigError(f"margin={margin!r}; allowed: none, pairs")
    if pairs["margin"].null_count:
        raise ConfigError(f"margin='pairs', but {pairs['margin'].null_count:,} of {len(pairs):,} pairs have none")
    values = pairs["margin"].combine_chunks().to_numpy(zero_copy_only=False)
    if not np.isfinite(values).all() or not values.mean() > 0:
        raise ConfigError("margin='pairs', but the margins are not finite, or not above 0 on average")
    return np.asarray(values / values.mean())


def right_share(difference: np.ndarray) -> np.ndarray:
    """Return 1 where the chosen response is ahead, 0 where it is behind, ½ where both are alike, float (m,)."""
    return (np.sign(difference) + 1) / 2


def longer_preferred(pairs: pa.Table) -> float:
    """Return the share of pairs whose chosen response is the longer one, equal lengths ½."""
    lengths = [pc.utf8_length(pairs[name]).to_numpy() for name in ("chosen", "rejected")]
    return float(right_share(lengths[0].astype(np.int64) - lengths[1]).mean())


def preference_metrics(difference: np.ndarray, probability: np.ndarray, groups: np.ndarray) -> dict[str, float | None]:
    """Return pair accuracy (ties ½) with its 95% interval clustered by group, Brier score, ECE and log loss.

    Args:
        difference: r₊ − r₋, float (m,).
        probability: Predicted probability that the chosen response is preferred, float (m,).
        groups: Group of each pair, int (m,).
    """
    accuracy, low, high = success_interval(right_share(difference), groups)
    ones = np.ones(len(probability), dtype=np.int64)
    found = {
        "brier": metrics.brier(probability, ones, ones),
        # Of the response that the model prefers: with both orders in one bin at ½, any model would look calibrated.
        "ece": metrics.ece(np.maximum(probability, 1 - probability), ones, right_share(difference)),
        "log_loss": metrics.log_loss(probability, ones, ones),
    }
    return {"pair_accuracy": accuracy, "ci_low": low, "ci_high": high, **metrics.known(found)}
