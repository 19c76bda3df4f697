"""Scorers on the features of query and prompt side by side, fitted by cross-entropy, as in Prompt-OIRL.

Sun, Hüyük and van der Schaar, "Query-Dependent Prompt Evaluation and Optimization with Offline Inverse RL" (ICLR
2024), eq. 5: L = −E[ y log r̂(x, π) + (1 − y) log(1 − r̂(x, π)) ]. A cell of n runs with k successes counts as k rows
with y = 1 and n − k with y = 0. The response is never seen.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.sparse as sp

from oirl.errors import ConfigError, require
from oirl.logs.cells import Cells
from oirl.rewards.embedders import Matrix

_log = logging.getLogger(__name__)
_CHUNK_ROWS = 20_000


class PointwiseScorer(ABC):
    """Base of scorers of one (query, prompt) row; a subclass fits and scores rows of [query, prompt] features."""

    name = ""

    def __init__(self, **parameters: Any) -> None:
        self.parameters = parameters

    def fit(
        self, queries: Matrix, prompts: Matrix, cells: Cells, fold: np.ndarray, seed: int
    ) -> tuple[PointwiseScorer, np.ndarray]:
        """Fit to all cells and to all but each fold; see `oirl.rewards.prompts.PromptScorer.fit`."""
        held_out = np.empty((len(cells.queries), len(cells.prompts)))
        self._prompts = prompts
        for f in range(int(fold.max()) + 1):
            inside = fold == f
            _log.info("%s: fold %d of %d", self.name, f + 1, int(fold.max()) + 1)
            self._fit_cells(queries[np.flatnonzero(~inside)], prompts, cells.of_queries(~inside), seed)
            held_out[inside] = self.scores(queries[np.flatnonzero(inside)])
        self._fit_cells(queries, prompts, cells, seed)
        return self, held_out

    def _fit_cells(self, queries: Matrix, prompts: Matrix, cells: Cells, seed: int) -> None:
        rows = _beside(queries[cells.query_index], prompts[cells.prompt_index])
        self._fit_rows(rows, cells.runs, cells.successes, seed)

    def scores(self, queries: Matrix) -> np.ndarray:
        """Return log-odds of success under the training prompts, float (Q, P)."""
        return self.scores_for(queries, self._prompts)

    def scores_for(self, queries: Matrix, prompts: Matrix) -> np.ndarray:
        """Return log-odds of success under any prompts, seen or not, float (Q, P)."""
        out = np.empty((queries.shape[0], prompts.shape[0]))
        for p in range(prompts.shape[0]):
            for start in range(0, len(out), _CHUNK_ROWS):
                part = queries[start : start + _CHUNK_ROWS]
                same = prompts[np.full(part.shape[0], p)]
                out[start : start + _CHUNK_ROWS, p] = self._score_rows(_beside(part, same))
        return out

    def describe(self) -> dict[str, Any]:
        """Return name and parameters for the manifest."""
        return {"name": self.name, **self.parameters}

    def state(self) -> dict[str, np.ndarray]:
        """Return the learned arrays."""
        return {f"prompts_{k}": v for k, v in _matrix_arrays(self._prompts).items()} | self._row_state()

    def restore(self, state: Mapping[str, np.ndarray]) -> PointwiseScorer:
        """Take the state that `state` gave."""
        self._prompts = _matrix_from({k.removeprefix("prompts_"): v for k, v in state.items()})
        self._restore_rows(state)
        return self

    @abstractmethod
    def _fit_rows(self, rows: Matrix, runs: np.ndarray, successes: np.ndarray, seed: int) -> None: ...

    @abstractmethod
    def _score_rows(self, rows: Matrix) -> np.ndarray: ...

    @abstractmethod
    def _row_state(self) -> dict[str, np.ndarray]: ...

    @abstractmethod
    def _restore_rows(self, state: Mapping[str, np.ndarray]) -> None: ...


class LogisticScorer(PointwiseScorer):
    """Logistic regression. Linear in query and prompt apart, it ranks the prompts alike for every query.

    Args:
        C: Inverse strength of the L2 penalty.
    """

    name = "logistic"

    def __init__(self, C: float = 1.0) -> None:
        _check_above_zero(self.name, C=C)
        super().__init__(C=C)

    def _fit_rows(self, rows: Matrix, runs: np.ndarray, successes: np.ndarray, seed: int) -> None:
        from sklearn.linear_model import LogisticRegression

        y = np.r_[np.ones(len(runs)), np.zeros(len(runs))]
        weight = np.r_[successes, runs - successes].astype(float)
        used = weight > 0
        stacked = _stack(rows, rows)[used]
        if len(np.unique(y[used])) < 2:
            # All right or all wrong: there is nothing to separate, the prior says it all.
            self._weights = np.zeros(rows.shape[1])
            self._intercept = _log_odds((successes.sum() + 0.5) / (runs.sum() + 1))
            return
        model = LogisticRegression(C=self.parameters["C"], max_iter=1000)
        model.fit(stacked, y[used], sample_weight=weight[used])
        self._weights, self._intercept = model.coef_[0], float(model.intercept_[0])

    def _score_rows(self, rows: Matrix) -> np.ndarray:
        return np.asarray(rows @ self._weights).ravel() + self._intercept

    def _row_state(self) -> dict[str, np.ndarray]:
        return {"weights": self._weights, "intercept": np.array([self._intercept])}

    def _restore_rows(self, state: Mapping[str, np.ndarray]) -> None:
        self._weights, self._intercept = state["weights"], float(state["intercept"][0])


class XGBoostScorer(PointwiseScorer):
    """Gradient-boosted trees (XGBoost) with settings that hold up on a few thousand queries.

    Args:
        max_depth: Depth of each tree.
        eta: Learning rate.
        rounds: Number of trees.
        subsample: Share of rows a tree sees.
        colsample: Share of features a tree sees.
        min_child_weight: Smallest sum of hessians in a leaf.
    """

    name = "xgboost"

    def __init__(
        self,
        max_depth: int = 4,
        eta: float = 0.1,
        rounds: int = 200,
        subsample: float = 0.8,
        colsample: float = 0.5,
        min_child_weight: float = 10.0,
    ) -> None:
        require("xgboost", "xgboost", "the reward model 'xgboost'")
        _check_above_zero(
            self.name, max_depth=max_depth, eta=eta, rounds=rounds, subsample=subsample, colsample=colsample
        )
        super().__init__(
            max_depth=max_depth,
            eta=eta,
            rounds=rounds,
            subsample=subsample,
            colsample=colsample,
            min_child_weight=min_child_weight,
        )

    def _fit_rows(self, rows: Matrix, runs: np.ndarray, successes: np.ndarray, seed: int) -> None:
        import xgboost

        p = self.parameters
        settings = {
            "objective": "binary:logistic",
            "max_depth": p["max_depth"],
            "eta": p["eta"],
            "subsample": p["subsample"],
            "colsample_bytree": p["colsample"],
            "min_child_weight": p["min_child_weight"],
            "tree_method": "hist",
            "seed": seed % 2**31,
        }
        # Labels may be shares: k/n with weight n has the same cross-entropy as n rows.
        data = xgboost.DMatrix(rows, label=successes / runs, weight=runs)
        self._booster = xgboost.train(settings, data, num_boost_round=p["rounds"])

    def _score_rows(self, rows: Matrix) -> np.ndarray:
        import xgboost

        return self._booster.predict(xgboost.DMatrix(rows), output_margin=True)

    def _row_state(self) -> dict[str, np.ndarray]:
        return {"booster_ubj": np.frombuffer(bytes(self._booster.save_raw("ubj")), dtype=np.uint8)}

    def _restore_rows(self, state: Mapping[str, np.ndarray]) -> None:
        import xgboost

        self._booster = xgboost.Booster()
        self._booster.load_model(bytearray(state["booster_ubj"].tobytes()))


class PublishedXGBoostScorer(XGBoostScorer):
    """The recipe of the published Prompt-OIRL code: depth 10, learning rate 0.001, 2,000 trees, no sampling.

    Args:
        rounds: Number of trees; 2,000 as published (about 40 minutes on 45,000 rows of 768 features on two cores).
    """

    name = "xgboost-published"

    def __init__(self, rounds: int = 2000) -> None:
        super().__init__(max_depth=10, eta=0.001, rounds=rounds, subsample=1.0, colsample=1.0, min_child_weight=1.0)

    def describe(self) -> dict[str, Any]:
        """Return name and the one parameter."""
        return {"name": self.name, "rounds": self.parameters["rounds"]}


class MLPScorer(PointwiseScorer):
    """A network with one hidden layer.

    Args:
        hidden: Width of the hidden layer.
        alpha: Strength of the L2 penalty.
        epochs: Passes over the rows at most; with enough rows of both outcomes, it stops early on held-out ones.
    """

    name = "mlp"

    def __init__(self, hidden: int = 64, alpha: float = 1e-3, epochs: int = 100) -> None:
        _check_above_zero(self.name, hidden=hidden, alpha=alpha, epochs=epochs)
        super().__init__(hidden=hidden, alpha=alpha, epochs=epochs)

    def _fit_rows(self, rows: Matrix, runs: np.ndarray, successes: np.ndarray, seed: int) -> None:
        from sklearn.neural_network import MLPClassifier

        p = self.parameters
        y = np.repeat(np.tile([1, 0], len(runs)), np.stack([successes, runs - successes], axis=1).ravel())
        repeated = rows[np.repeat(np.arange(len(runs)), runs)]
        if len(np.unique(y)) < 2:
            y = np.r_[y, 1 - y[:1]]
            repeated = _stack(repeated, repeated[:1])
        rarer = min(np.bincount(y, minlength=2))
        model = MLPClassifier(
            (p["hidden"],),
            alpha=p["alpha"],
            max_iter=p["epochs"],
            batch_size=max(1, min(64, len(y) // 10)),
            early_stopping=bool(rarer >= 100),
            n_iter_no_change=10,
            random_state=seed % 2**32,
        )
        import warnings

        with warnings.catch_warnings():
            # The number of epochs is ours to set; reaching it is no mishap.
            warnings.filterwarnings("ignore", message="Stochastic Optimizer")
            model.fit(repeated, y)
        self._layers = [*model.coefs_, *model.intercepts_]

    def _score_rows(self, rows: Matrix) -> np.ndarray:
        first, second, bias_first, bias_second = self._layers
        hidden = np.maximum(np.asarray(rows @ first) + bias_first, 0)
        return (hidden @ second + bias_second).ravel()

    def _row_state(self) -> dict[str, np.ndarray]:
        return {f"layer_{i}": array for i, array in enumerate(self._layers)}

    def _restore_rows(self, state: Mapping[str, np.ndarray]) -> None:
        self._layers = [state[f"layer_{i}"] for i in range(4)]


def _check_above_zero(name: str, **parameters: Any) -> None:
    for parameter, value in parameters.items():
        whole = parameter in {"max_depth", "rounds", "hidden", "epochs"}
        if not isinstance(value, int if whole else (int, float)) or isinstance(value, bool) or not value > 0:
            kind = "whole number" if whole else "number"
            raise ConfigError(f"{parameter}={value!r} of the prompt model {name!r}: a {kind} above 0 is needed")


def _beside(left: Matrix, right: Matrix) -> Matrix:
    if sp.issparse(left):
        return sp.hstack([left, right], format="csr")
    return np.hstack([left, right])


def _stack(upper: Matrix, lower: Matrix) -> Matrix:
    return sp.vstack([upper, lower], format="csr") if sp.issparse(upper) else np.vstack([upper, lower])


def _matrix_arrays(matrix: Matrix) -> dict[str, np.ndarray]:
    if isinstance(matrix, np.ndarray):
        return {"dense": matrix}
    return {
        "data": matrix.data,
        "indices": matrix.indices,
        "indptr": matrix.indptr,
        "shape": np.array(matrix.shape),
    }


def _matrix_from(arrays: Mapping[str, np.ndarray]) -> Matrix:
    if "dense" in arrays:
        return arrays["dense"]
    shape = tuple(int(n) for n in arrays["shape"])
    return sp.csr_matrix((arrays["data"], arrays["indices"], arrays["indptr"]), shape=shape)


def _log_odds(p: float) -> float:
    return float(np.log(p / (1 - p)))
