"""Reward models of prompts: r(query, prompt), the chance that a response to the query under the prompt is right."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from oirl.errors import ConfigError, DataError, ModelFileError, NotFittedError, UnknownNameError
from oirl.logs.cells import Cells, make_cells
from oirl.logs.splits import assign_folds, group_queries
from oirl.logs.store import table_fingerprint
from oirl.logs.text import masked_hash, normalise, text_hash
from oirl.registry import KINDS, resolve
from oirl.rewards.calibration import apply_platt, fit_platt
from oirl.rewards.embedders import Matrix, TfidfEmbedder, make_embedder, restore_embedder
from oirl.rewards.knn import NearestNeighbours
from oirl.rewards.saving import Manifest, read_arrays, read_manifest, save_folder

COLUMNS = ("query_id", "query", "prompt_id", "prompt", "correct", "split")
"""The columns of a log that reward models of prompts and their evaluation read."""


class PromptScorer(Protocol):
    """A learner of log-odds of success from features; the registry's kind "prompt-models"."""

    def fit(
        self, queries: Matrix, prompts: Matrix, cells: Cells, fold: np.ndarray, seed: int
    ) -> tuple[PromptScorer, np.ndarray]:
        """Fit to all cells, and score each query by what was fitted to the other folds.

        Args:
            queries: Features of the cells' queries, (Q, d).
            prompts: Features of the cells' prompts, (P, e).
            cells: Runs and successes.
            fold: Fold of each query, int (Q,), from 0; near duplicates share one.
            seed: For learners that draw.

        Returns:
            The scorer itself, and cross-fitted log-odds, float (Q, P).
        """
        ...

    def scores(self, queries: Matrix) -> np.ndarray:
        """Return log-odds under the training prompts, float (Q, P)."""
        ...

    def scores_for(self, queries: Matrix, prompts: Matrix) -> np.ndarray:
        """Return log-odds under any prompts, float (Q, P')."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return name and parameters."""
        ...

    def state(self) -> dict[str, np.ndarray]:
        """Return the learned arrays."""
        ...

    def restore(self, state: Mapping[str, np.ndarray]) -> PromptScorer:
        """Take the arrays that `state` gave."""
        ...


@dataclass(frozen=True, slots=True)
class TrainingSummary:
    """What a model remembers of its training log.

    Attributes:
        rates: Success of each prompt: the mean over queries of the mean over runs, float (P,).
        best: Position of the best single prompt.
        texts: Sorted hashes of the normalised queries, uint64.
        wordings: Sorted hashes of the queries with numbers masked, uint64.
        n_rows: Graded runs.
        n_queries: Distinct queries.
        fingerprint: Of the rows learned from.
    """

    rates: np.ndarray
    best: int
    texts: np.ndarray
    wordings: np.ndarray
    n_rows: int
    n_queries: int
    fingerprint: str

    def overlap(self, queries: Sequence[str]) -> tuple[int, int]:
        """Return how many queries stood in the training log, and how many more did with other numbers."""
        same = _among(np.array([text_hash(normalise(q)) for q in queries], dtype=np.uint64), self.texts)
        near = _among(np.array([masked_hash(q) for q in queries], dtype=np.uint64), self.wordings) & ~same
        return int(same.sum()), int(near.sum())


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Predictions for training queries by models that have not seen them nor a near duplicate.

    Attributes:
        cells: The training cells.
        probability: Predicted success, float (Q, P).
        fold: Fold of each query, int64 (Q,).
    """

    cells: Cells
    probability: np.ndarray
    fold: np.ndarray


class PromptRewardModel:
    """Estimates r(query, prompt) from logged verdicts, without seeing responses (Prompt-OIRL, ICLR 2024).

    Args:
        model: A registered prompt model: "contrast" (default), "logistic", "xgboost", "xgboost-published", "mlp".
        embedder: "tfidf" (default), "sentence-transformers[:model]", `package.module:function`, or a callable from
            texts to an array.
        folds: Folds of the cross-fitting that calibration and held-out metrics come from.
        seed: For the folds and for learners that draw.
        params: Parameters of the prompt model, None for its defaults.

    Attributes:
        prompt_ids_: The prompts of the training log.
        prompts_: Their templates.
        train_: What is remembered of the training log (`TrainingSummary`).
        held_out_: Cross-fitted predictions (`HeldOut`); not saved.
        warnings_: What limits the model.
    """

    kind = "prompt-reward-model"

    def __init__(
        self,
        model: str = "contrast",
        *,
        embedder: Any = "tfidf",
        folds: int = 5,
        seed: int = 0,
        params: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.embedder = embedder
        self.folds = folds
        self.seed = seed
        self.params = params

    def fit(self, log: pa.Table) -> PromptRewardModel:
        """Learn from the graded rows of a log.

        Args:
            log: Interactions; all rows are used, whatever their split.

        Raises:
            DataError: If there are no verdicts, fewer than two prompts or too few unlike queries.
            ConfigError: If a parameter is not allowed.
            UnknownNameError: If the model or the embedder is not registered.
        """
        if self.folds < 2:
            raise ConfigError(f"folds={self.folds}; at least 2 are needed")
        cells = make_cells(log)
        if len(cells.prompt_ids) < 2:
            raise DataError(f"the log has one prompt only ({cells.prompt_ids[0]}); there is nothing to choose from")
        groups = group_queries(cells.queries)
        n_groups = int(groups.labels.max()) + 1
        if n_groups < 2:
            raise DataError("all queries of the log are one query; at least two unlike queries are needed")
        self.warnings_ = [w for w in [groups.warning()] if w]
        self.prompt_ids_, self.prompts_ = list(cells.prompt_ids), list(cells.prompts)
        self.train_ = _summary(cells, table_fingerprint(log.select(list(COLUMNS))))
        self._embedder = make_embedder(self.embedder)
        self._prompt_embedder = _prompt_embedder(self._embedder)
        read_prompts = self._prompt_embedder.prepare(cells.prompts)
        prompts = self._prompt_embedder.fit(read_prompts).embed(read_prompts)
        prepared = self._embedder.prepare(cells.queries)
        fold = assign_folds(cells.query_ids, groups.labels, min(self.folds, n_groups), self.seed)
        features = self._embedder.fit(prepared).embed(prepared)
        self._scorer, held_out = _make_scorer(self.model, self.params).fit(features, prompts, cells, fold, self.seed)
        self._calibrate(cells, held_out, fold)
        self.knn_ = NearestNeighbours().fit(cells, self.seed)
        return self

    def _calibrate(self, cells: Cells, scores: np.ndarray, fold: np.ndarray) -> None:
        """Learn the calibration from cross-fitted scores; `held_out_` gets its own of the other folds."""
        of_cell, score = fold[cells.query_index], scores[cells.query_index, cells.prompt_index]
        self._platt = fit_platt(score, cells.runs, cells.successes)
        probability = np.empty_like(scores)
        for f in range(int(fold.max()) + 1):
            others = of_cell != f
            platt = fit_platt(score[others], cells.runs[others], cells.successes[others])
            probability[fold == f] = apply_platt(scores[fold == f], platt)
        self.held_out_ = HeldOut(cells, probability, fold)

    def predict_proba(self, queries: Sequence[str], prompts: Sequence[str] | None = None) -> np.ndarray:
        """Return the estimated success of each query under each prompt, float (Q, P).

        Args:
            queries: Texts.
            prompts: Prompt templates; the training prompts, in the order of `prompt_ids_`, when None. A template that
                the training log does not hold is scored through its text: an extrapolation.
        """
        self._check_fitted()
        features = self._embedder.embed(self._embedder.prepare(queries))
        scores = apply_platt(self._scorer.scores(features), self._platt)
        if prompts is None:
            return scores
        position = {text: i for i, text in enumerate(self.prompts_)}
        columns = np.empty((len(scores), len(prompts)))
        new = [j for j, text in enumerate(prompts) if text not in position]
        for j, text in enumerate(prompts):
            if text in position:
                columns[:, j] = scores[:, position[text]]
        if new:
            unseen = self._prompt_embedder.embed(self._prompt_embedder.prepare([prompts[j] for j in new]))
            columns[:, new] = apply_platt(self._scorer.scores_for(features, unseen), self._platt)
        return columns

    def to_saved(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return what `save` writes: the fields of the manifest, and the arrays."""
        self._check_fitted()
        train = self.train_
        arrays = {f"scorer.{k}": v for k, v in self._scorer.state().items()}
        arrays |= {f"embedder.{k}": v for k, v in self._embedder.arrays().items()}
        arrays |= {f"prompt_embedder.{k}": v for k, v in self._prompt_embedder.arrays().items()}
        arrays |= {f"knn.{k}": v for k, v in self.knn_.state().items()}
        arrays |= {"train.rates": train.rates, "train.texts": train.texts, "train.wordings": train.wordings}
        manifest = {
            "kind": self.kind,
            "model": self._scorer.describe(),
            "embedder": self._embedder.describe(),
            "prompts": [{"prompt_id": i, "prompt": p} for i, p in zip(self.prompt_ids_, self.prompts_, strict=True)],
            "data": {
                "fingerprint": train.fingerprint,
                "n_rows": train.n_rows,
                "n_queries": train.n_queries,
                "best_prompt": self.prompt_ids_[train.best],
                "folds": self.folds,
                "seed": self.seed,
            },
            "metrics": {},
            "calibration": {
                "method": "Platt scaling on cross-fitted scores: p = sigmoid(slope * score + intercept)",
                "slope": self._platt[0],
                "intercept": self._platt[1],
            },
            "warnings": self.warnings_,
        }
        return manifest, arrays

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to a folder, whole or not at all."""
        save_folder(path, *self.to_saved())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, embedder: Any = None) -> PromptRewardModel:
        """Read a model from a folder; see `oirl.load`."""
        manifest = read_manifest(path)
        arrays = read_arrays(path, manifest)
        try:
            return cls._restore(manifest, arrays, embedder)
        except (KeyError, IndexError, TypeError, UnknownNameError) as e:
            raise ModelFileError(f"{path}: the saved state is not complete: {e}; fit the model again") from e

    @classmethod
    def _restore(cls, manifest: Manifest, arrays: Mapping[str, np.ndarray], embedder: Any) -> PromptRewardModel:
        parameters = {k: v for k, v in manifest.model.items() if k != "name"}
        name, data = manifest.model["name"], manifest.data
        model = cls(name, embedder=embedder or manifest.embedder["name"], folds=data["folds"], seed=data["seed"])
        model.params = parameters
        model.prompt_ids_ = [p.prompt_id for p in manifest.prompts]
        model.prompts_ = [p.prompt for p in manifest.prompts]
        model.warnings_ = manifest.warnings
        model.train_ = TrainingSummary(
            arrays["train.rates"],
            model.prompt_ids_.index(data["best_prompt"]),
            arrays["train.texts"],
            arrays["train.wordings"],
            data["n_rows"],
            data["n_queries"],
            data["fingerprint"],
        )
        model._platt = (manifest.calibration["slope"], manifest.calibration["intercept"])
        model._embedder = restore_embedder(manifest.embedder, _named(arrays, "embedder."), embedder)
        model._prompt_embedder = _prompt_embedder(model._embedder)
        if hasattr(model._prompt_embedder, "restore"):
            model._prompt_embedder.restore(_named(arrays, "prompt_embedder."))
        if name not in KINDS["prompt-models"]:
            raise ModelFileError(f"unknown prompt model {name!r}; known: {', '.join(KINDS['prompt-models'])}")
        model._scorer = resolve("prompt-models", name)(**parameters).restore(_named(arrays, "scorer."))
        model.knn_ = NearestNeighbours().restore(_named(arrays, "knn."))
        return model

    def _check_fitted(self) -> None:
        if not hasattr(self, "_scorer"):
            raise NotFittedError("this PromptRewardModel is not fitted; call fit(log) or oirl.load(folder) first")


def _summary(cells: Cells, fingerprint: str) -> TrainingSummary:
    runs, successes = cells.matrices()
    asked = runs > 0
    rates = np.divide(successes, runs, out=np.zeros(runs.shape), where=asked).sum(axis=0) / asked.sum(axis=0)
    return TrainingSummary(
        rates=rates,
        best=int(rates.argmax()),
        texts=np.unique(np.array([text_hash(normalise(q)) for q in cells.queries], dtype=np.uint64)),
        wordings=np.unique(np.array([masked_hash(q) for q in cells.queries], dtype=np.uint64)),
        n_rows=int(cells.runs.sum()),
        n_queries=len(cells.queries),
        fingerprint=fingerprint,
    )


def _make_scorer(name: str, params: Mapping[str, Any] | None) -> PromptScorer:
    factory = resolve("prompt-models", name)
    try:
        return factory(**(params or {}))
    except TypeError as e:
        raise ConfigError(f"parameters of the prompt model {name!r}: {e}") from e


def _prompt_embedder(embedder: Any) -> Any:
    # A handful of prompts needs a vocabulary of its own, in which a word of one prompt counts.
    return TfidfEmbedder(min_df=1, blocks=("words", "chars")) if isinstance(embedder, TfidfEmbedder) else embedder


def _named(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _among(hashes: np.ndarray, known: np.ndarray) -> np.ndarray:
    if not len(known):
        return np.zeros(len(hashes), dtype=bool)
    return known[np.minimum(np.searchsorted(known, hashes), len(known) - 1)] == hashes
