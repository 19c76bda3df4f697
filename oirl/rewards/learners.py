"""Learners of a score per row of features, from verdicts or from pairs of rows: linear, boosted trees, a network.

Verdicts are fitted by cross-entropy, pairs by the Bradley-Terry loss −log σ(s₊ − s₋ − m) (`oirl.rewards.objectives`).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from oirl.errors import ConfigError, require
from oirl.rewards.embedders import Matrix
from oirl.rewards.logistic import fit_differences, fit_logistic
from oirl.rewards.objectives import bradley_terry_gradient


@dataclass(frozen=True, slots=True)
class Verdicts:
    """What a learner is to reproduce: how often each row was right.

    Attributes:
        runs: Int (n,), at least 1.
        successes: Int (n,).
    """

    runs: np.ndarray
    successes: np.ndarray


@dataclass(frozen=True, slots=True)
class Comparisons:
    """What a learner is to reproduce: of two rows, which is preferred.

    Attributes:
        chosen: Position of the preferred row of each pair, int (m,).
        rejected: Position of the other, int (m,).
        margin: By how much the score of `chosen` should be ahead, float (m,); 0 when None.
    """

    chosen: np.ndarray
    rejected: np.ndarray
    margin: np.ndarray | None = None


Target = Verdicts | Comparisons
_WHOLE = frozenset("max_depth rounds hidden epochs patience batch micro_batch heads save_every".split())


class Learner(ABC):
    """Base of learners; parameters in `__init__` only."""

    name = ""

    def __init__(self, **parameters: Any) -> None:
        self.parameters = parameters

    def candidates(self) -> Sequence[Learner]:
        """Return the learners among which cross-fitting chooses; itself where nothing is left open."""
        return [self]

    def fresh(self) -> Learner:
        """Return an unfitted copy."""
        return copy.copy(self)

    @abstractmethod
    def fit(self, rows: Matrix, target: Target, groups: np.ndarray, seed: int) -> Learner:
        """Learn scores.

        Args:
            rows: Features, (n, d).
            target: Verdicts on the rows, or comparisons of them.
            groups: Group of each row, int (n,): rows of one group never part where some are held out to stop early.
            seed: For learners that draw.
        """

    @abstractmethod
    def scores(self, rows: Matrix) -> np.ndarray:
        """Return the score of each row, float64 (n,): log-odds of being right, or a reward up to a constant."""

    @abstractmethod
    def state(self) -> dict[str, np.ndarray]:
        """Return the learned arrays."""

    @abstractmethod
    def restore(self, state: Mapping[str, np.ndarray]) -> Learner:
        """Take the arrays that `state` gave."""

    def describe(self) -> dict[str, Any]:
        """Return name and parameters for the manifest."""
        return {"name": self.name, **self.parameters}


class LinearLearner(Learner):
    """Logistic regression on rows, or, for pairs, on the difference of two rows; solved by Newton's method.

    Args:
        strength: α of the penalty α/2 · ‖w‖², shared by all pairs or rows together; None to have it chosen from
            `STRENGTHS` by cross-fitted log loss.
    """

    name = "linear"
    STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0)

    def __init__(self, strength: float | None = None) -> None:
        if strength is not None:
            check_above_zero(self.name, strength=strength)
        super().__init__(strength=strength)

    def candidates(self) -> Sequence[Learner]:
        """Return one learner per strength, the strongest penalty first."""
        if self.parameters["strength"] is not None:
            return [self]
        return [type(self)(strength) for strength in reversed(self.STRENGTHS)]

    def fit(self, rows: Matrix, target: Target, groups: np.ndarray, seed: int) -> LinearLearner:
        """Learn the weights; `groups` and `seed` are not needed."""
        strength = self.parameters["strength"]
        if isinstance(target, Verdicts):
            total = target.runs.astype(float)
            self._weights, self._intercept = fit_logistic(rows, target.successes / total, total, strength)
        else:
            difference = rows[target.chosen] - rows[target.rejected]
            self._weights = fit_differences(difference, target.margin, strength)
            self._intercept = 0.0
        return self

    def scores(self, rows: Matrix) -> np.ndarray:
        """Return x·w + b."""
        return np.asarray(rows @ self._weights, dtype=np.float64).ravel() + self._intercept

    def state(self) -> dict[str, np.ndarray]:
        """Return weights and intercept."""
        return {"weights": self._weights.astype(np.float32), "intercept": np.array([self._intercept])}

    def restore(self, state: Mapping[str, np.ndarray]) -> LinearLearner:
        """Take weights and intercept."""
        self._weights, self._intercept = state["weights"], float(state["intercept"][0])
        return self


class ClassifierLearner(LinearLearner):
    """Logistic regression that takes chosen responses for right and rejected ones for wrong, each on its own.

    Sun et al. (2025) find it as good as Bradley-Terry, or better, in most of their settings. A response that stands in
    several pairs counts in each.
    """

    name = "classifier"

    def fit(self, rows: Matrix, target: Target, groups: np.ndarray, seed: int) -> ClassifierLearner:
        """Learn the weights."""
        if isinstance(target, Comparisons):
            n = rows.shape[0]
            chosen, rejected = np.bincount(target.chosen, minlength=n), np.bincount(target.rejected, minlength=n)
            compared = np.flatnonzero(chosen + rejected)
            rows, target = rows[compared], Verdicts((chosen + rejected)[compared], chosen[compared])
        super().fit(rows, target, groups, seed)
        return self


class BoostedLearner(Learner):
    """Gradient-boosted trees (XGBoost); on pairs with the exact gradient of the Bradley-Terry loss.

    Args:
        max_depth: Depth of each tree.
        eta: Learning rate.
        rounds: Number of trees.
        subsample: Share of rows a tree sees, for verdicts; pairs are always seen whole.
        colsample: Share of features a tree sees.
        min_child_weight: Smallest sum of curvatures in a leaf.
        centring: Weight of (s₊ + s₋)² beside the loss of each pair.
    """

    name = "xgboost"

    def __init__(
        self,
        max_depth: int = 4,
        eta: float = 0.1,
        rounds: int = 100,
        subsample: float = 0.8,
        colsample: float = 0.5,
        min_child_weight: float = 5.0,
        centring: float = 0.0,
    ) -> None:
        require("xgboost", "xgboost", "the reward model 'xgboost'")
        check_above_zero(
            self.name, max_depth=max_depth, eta=eta, rounds=rounds, subsample=subsample, colsample=colsample
        )
        check_range(self.name, 0, 1, subsample=subsample, colsample=colsample)
        check_range(self.name, 0, float("inf"), min_child_weight=min_child_weight, centring=centring)
        super().__init__(
            max_depth=max_depth,
            eta=eta,
            rounds=rounds,
            subsample=subsample,
            colsample=colsample,
            min_child_weight=min_child_weight,
            centring=centring,
        )

    def fit(self, rows: Matrix, target: Target, groups: np.ndarray, seed: int) -> BoostedLearner:
        """Grow the trees."""
        import xgboost

        p = self.parameters
        settings = {
            "max_depth": p["max_depth"],
            "eta": p["eta"],
            "colsample_bytree": p["colsample"],
            "min_child_weight": p["min_child_weight"],
            "tree_method": "hist",
            "base_score": 0.0,
            "seed": seed % 2**31,
        }
        if isinstance(target, Verdicts):
            # Labels may be shares: k/n with weight n has the same cross-entropy as n rows.
            data = xgboost.DMatrix(rows, label=target.successes / target.runs, weight=target.runs)
            rate = (target.successes.sum() + 0.5) / (target.runs.sum() + 1)
            settings |= {"objective": "binary:logistic", "subsample": p["subsample"], "base_score": float(rate)}
            self._booster = xgboost.train(settings, data, num_boost_round=p["rounds"])
            return self
        pairs = target

        def objective(scores: np.ndarray, _: Any) -> tuple[np.ndarray, np.ndarray]:
            up, down, curvature = bradley_terry_gradient(
                scores[pairs.chosen], scores[pairs.rejected], margin=pairs.margin, centring=p["centring"]
            )
            n = len(scores)
            gradient = np.bincount(pairs.chosen, up, n) + np.bincount(pairs.rejected, down, n)
            hessian = np.bincount(pairs.chosen, curvature, n) + np.bincount(pairs.rejected, curvature, n)
            return gradient, np.maximum(hessian, 1e-6)

        self._booster = xgboost.train(settings, xgboost.DMatrix(rows), num_boost_round=p["rounds"], obj=objective)
        return self

    def scores(self, rows: Matrix) -> np.ndarray:
        """Return the sums of leaves."""
        import xgboost

        return np.asarray(self._booster.predict(xgboost.DMatrix(rows), output_margin=True), dtype=np.float64)

    def state(self) -> dict[str, np.ndarray]:
        """Return the trees in XGBoost's own format."""
        return {"booster_ubj": np.frombuffer(bytes(self._booster.save_raw("ubj")), dtype=np.uint8)}

    def restore(self, state: Mapping[str, np.ndarray]) -> BoostedLearner:
        """Take the trees."""
        import xgboost

        self._booster = xgboost.Booster()
        self._booster.load_model(bytearray(state["booster_ubj"].tobytes()))
        return self


class NetworkLearner(Learner):
    """A multilayer perceptron trained by AdamW; it stops early on groups of rows that are held out.

    Sun et al. (2025), "Rethinking Reward Modeling in Preference-based Large Language Model Alignment", use 1024 and
    512 units on embeddings of 2,048 dimensions and tens of thousands of pairs; the default is for logs of hundreds.

    Args:
        hidden: Units of each hidden layer.
        learning_rate: Of AdamW.
        weight_decay: Of AdamW.
        dropout: Share of hidden units left out at random in training.
        epochs: Passes over the data at most.
        patience: Passes without a better held-out loss after which training ends.
        batch: Rows, or pairs, of a step.
        centring: Weight of (s₊ + s₋)² beside the loss of each pair.
    """

    name = "mlp"

    def __init__(
        self,
        hidden: Sequence[int] = (64,),
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        dropout: float = 0.1,
        epochs: int = 50,
        patience: int = 3,
        batch: int = 64,
        centring: float = 0.0,
    ) -> None:
        require("torch", "tune", "the reward model 'mlp'")
        units = [hidden] if isinstance(hidden, int) else list(hidden)
        check_above_zero(self.name, learning_rate=learning_rate, epochs=epochs, batch=batch, patience=patience)
        check_range(self.name, 0, 0.99, dropout=dropout)
        check_range(self.name, 0, float("inf"), weight_decay=weight_decay, centring=centring)
        for width in units:
            check_above_zero(self.name, hidden=width)
        super().__init__(
            hidden=units,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            dropout=dropout,
            epochs=epochs,
            patience=patience,
            batch=batch,
            centring=centring,
        )

    def fit(self, rows: Matrix, target: Target, groups: np.ndarray, seed: int) -> NetworkLearner:
        """Train; the weights of the best held-out loss are kept."""
        import torch

        from oirl.rewards.network import train_network

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self._layers = train_network(rows, target, groups, np.random.default_rng(seed), **self.parameters)
        return self

    def scores(self, rows: Matrix) -> np.ndarray:
        """Return what the network gives."""
        hidden: Any = rows
        for i in range(0, len(self._layers) - 2, 2):
            hidden = np.maximum(np.asarray(hidden @ self._layers[i]) + self._layers[i + 1], 0)
        return np.asarray(hidden @ self._layers[-2] + self._layers[-1], dtype=np.float64).ravel()

    def state(self) -> dict[str, np.ndarray]:
        """Return weights and biases, layer after layer."""
        return {f"layer_{i}": array for i, array in enumerate(self._layers)}

    def restore(self, state: Mapping[str, np.ndarray]) -> NetworkLearner:
        """Take weights and biases."""
        self._layers = [state[f"layer_{i}"] for i in range(2 * len(self.parameters["hidden"]) + 2)]
        return self


def check_above_zero(name: str, **parameters: Any) -> None:
    """Raise `ConfigError` unless all parameters of a model are numbers above 0, whole where only that makes sense."""
    for parameter, value in parameters.items():
        whole = parameter in {
            "max_depth",
            "rounds",
            "hidden",
            "epochs",
            "patience",
            "batch",
            "heads",
            "save_every",
            "micro_batch",
        }
        number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not number or not 0 < value < float("inf"):
            kind = "whole number" if whole else "number"
            raise ConfigError(f"{parameter}={value!r} of the model {name!r}: a {kind} above 0 is needed")


def check_range(name: str, low: float, high: float, **parameters: Any) -> None:
    """Raise `ConfigError` unless all parameters of a model are numbers from `low` to `high`."""
    for parameter, value in parameters.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not low <= value <= high or value == float("inf"):
            raise ConfigError(
                f"{parameter}={value!r} of the model {name!r}: a number from {low:g} to {high:g} is needed"
            )
