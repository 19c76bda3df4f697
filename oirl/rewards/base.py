"""What reward models of responses share: estimates with their uncertainty, cross-fitted learning, the saved form."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from scipy.special import expit

from oirl.errors import ConfigError, DataError, ModelFileError, NotFittedError
from oirl.logs.splits import assign_folds
from oirl.registry import create, names
from oirl.rewards.committee import Committee, fit_committee, jackknife_error
from oirl.rewards.learners import Learner, Target
from oirl.rewards.response_features import CHECKS_ONLY, ResponseFeatures
from oirl.rewards.saving import Manifest, named, read_arrays, read_manifest, save_folder, sound_state
from oirl.rewards.training import SeenQueries, check_seed

_MOST_FOLDS = 100
Own = TypeVar("Own", bound="ResponseScorer")


@dataclass(frozen=True, slots=True)
class Estimates:
    """What a reward model says of some responses.

    Attributes:
        reward: Float (n,). Of a correctness model the calibrated log-odds of being right; of a preference model on the
            scale on which P(y preferred to y') = σ(r(y) − r(y')), 0 being the mean over its training responses.
        spread: How much the reward would move with other training queries, float (n,): a standard error of linear
            models; of trees and networks, whose members also differ by chance, an upper bound.
    """

    reward: np.ndarray
    spread: np.ndarray

    @property
    def probability(self) -> np.ndarray:
        """σ(reward), float (n,): of being right, or, of a preference model, of being preferred to a mean response."""
        return np.asarray(expit(self.reward))


class ResponseScorer:
    """Base of reward models of responses on features; a subclass says what is learned and how it is calibrated.

    Args:
        model: A registered learner of the subclass's kind.
        embedder: "checks", "tfidf", "sentence-transformers[:model]", "hidden-states:MODEL[,layer=L][,pooling=mean]",
            `package.module:function`, or a callable from texts to an array.
        folds: Members of the committee, each of which leaves out one fold of the queries.
        seed: For the folds and for learners that draw.
        params: Parameters of the learner, None for its defaults.

    Attributes:
        seen_: The queries learned from.
        metrics_: Cross-fitted metrics on the training data.
        warnings_: What limits the model.
    """

    kind = ""
    learners = ""
    """Kind of the registry that `model` is a name of."""
    seen_: SeenQueries
    data_: dict[str, Any]
    metrics_: dict[str, float | None]
    warnings_: list[str]
    learning_curve_: list[dict[str, Any]] | None = None
    _platt: tuple[float, float]

    def __init__(
        self,
        model: str,
        *,
        embedder: Any,
        folds: int = 5,
        seed: int = 0,
        params: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.embedder = embedder
        self.folds = folds
        self.seed = seed
        self.params = params

    def clone(self: Own) -> Own:
        """Return an unfitted model with the same parameters."""
        parameters = {name: getattr(self, name) for name in ("embedder", "folds", "seed", "params")}
        return type(self)(self.model, **parameters)

    def estimate(self, queries: Sequence[str], responses: Sequence[str]) -> Estimates:
        """Return reward and standard error of each response, in the order given.

        Args:
            queries: The query of each response, length n.
            responses: Length n.
        """
        self._fitted()
        if len(queries) != len(responses):
            raise ConfigError(
                f"{len(queries)} queries and {len(responses)} responses; one query per response is needed"
            )
        prepared = self._features.prepare(queries, responses)
        scores = self._committee.scores(self._features.embed(prepared))
        slope, intercept = self._platt
        calibrated = slope * scores + intercept
        return Estimates(calibrated.mean(axis=0), jackknife_error(calibrated))

    def predict_reward(self, queries: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """Return the reward of each response, float (n,); see `Estimates`."""
        return self.estimate(queries, responses).reward

    def predict_proba(self, queries: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """Return σ(reward) of each response, float (n,); see `Estimates`."""
        return self.estimate(queries, responses).probability

    def _learn(
        self, queries: list[str], responses: list[str], target: Target, groups: np.ndarray, keys: list[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Fit the committee; return cross-fitted scores, float (n,), and the fold of each row, int (n,).

        Args:
            queries: The query of each row.
            responses: The response of each row.
            target: Verdicts on rows, or comparisons of rows.
            groups: Group of each row, int (n,).
            keys: Name of each row, by which folds do not depend on the order of rows.
        """
        if not isinstance(self.folds, (int, np.integer)) or not 2 <= self.folds <= _MOST_FOLDS:
            raise ConfigError(f"folds={self.folds!r}; a whole number of at least 2, at most {_MOST_FOLDS}, is needed")
        check_seed(self.seed)
        n_groups = len(np.unique(groups))
        if n_groups < 2:
            raise DataError(
                "all queries are one query, or near duplicates of it; at least two unlike queries are needed"
            )
        learner: Learner = create(self.learners, self.model, self.params)
        self._features = ResponseFeatures(self.embedder)
        prepared = self._features.prepare(queries, responses)
        rows = self._features.fit(prepared).embed(prepared)
        fold = assign_folds(keys, groups, min(int(self.folds), n_groups), int(self.seed))
        self._committee, scores = fit_committee(learner, rows, target, fold, groups, int(self.seed))
        return scores, fold

    def _fitted(self) -> None:
        if not hasattr(self, "_committee"):
            raise NotFittedError(f"this {type(self).__name__} is not fitted; call fit or oirl.load(folder) first")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to a folder, whole or not at all."""
        self._fitted()
        arrays = self._committee.arrays() | {f"features.{k}": v for k, v in self._features.arrays().items()}
        arrays |= {"seen.texts": self.seen_.texts, "seen.wordings": self.seen_.wordings}
        manifest = {
            "kind": self.kind,
            "model": {
                "name": self.model,
                "params": self.params and dict(self.params),
                "members": self._committee.describe(),
            },
            "embedder": self._features.describe(),
            "prompts": [],
            "data": self.data_ | {"folds": int(self.folds), "seed": int(self.seed)},
            "metrics": self.metrics_,
            "calibration": self._calibration(),
            "learning_curve": self.learning_curve_,
            "warnings": self.warnings_,
        }
        save_folder(path, manifest, arrays)

    def _calibration(self) -> dict[str, Any]:
        return {
            "method": "Platt scaling on cross-fitted scores: reward = slope * score + intercept",
            "slope": self._platt[0],
            "intercept": self._platt[1],
        }

    @classmethod
    def load(cls: type[Own], path: str | os.PathLike[str], *, embedder: Any = None) -> Own:
        """Read a model from a folder; see `oirl.load`."""
        manifest = read_manifest(path)
        arrays = read_arrays(path, manifest)
        with sound_state(path):
            model = cls._restore(manifest, arrays, embedder)
            estimates = model.estimate(["Is it sound?"], ["It is."])
            if not np.isfinite([estimates.reward, estimates.spread]).all():
                raise ValueError("its parts do not belong together")
        return model

    @classmethod
    def _restore(cls: type[Own], manifest: Manifest, arrays: Mapping[str, np.ndarray], embedder: Any) -> Own:
        saved, data = manifest.model, manifest.data
        known = names(cls.learners)
        if saved["name"] not in known:
            raise ModelFileError(f"unknown model {saved['name']!r}; known: {', '.join(known)}")
        members = [create(cls.learners, saved["name"], params) for params in saved["members"]]
        features = ResponseFeatures.restore(manifest.embedder, named(arrays, "features."), embedder)
        options = {"folds": data["folds"], "seed": data["seed"], "params": saved["params"]}
        model = cls(saved["name"], embedder=features.embedder or CHECKS_ONLY, **options)
        model._features = features
        model._committee = Committee.restore(members, arrays)
        slope, intercept = manifest.calibration["slope"], manifest.calibration["intercept"]
        if not 0 <= slope < float("inf") or not np.isfinite(intercept):
            raise ValueError("its calibration is no rising finite line")
        model._platt = (slope, intercept)
        model.seen_ = SeenQueries(arrays["seen.texts"], arrays["seen.wordings"])
        model.data_, model.metrics_, model.warnings_ = data, dict(manifest.metrics), manifest.warnings
        model.learning_curve_ = manifest.learning_curve
        return model
