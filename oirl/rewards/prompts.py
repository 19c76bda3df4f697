"""Reward models of prompts: r(query, prompt), the chance that a response to the query under the prompt is right."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from oirl.errors import ConfigError, DataError, ModelFileError, NotFittedError
from oirl.logs.cells import Cells, make_cells
from oirl.logs.groups import group_queries
from oirl.logs.splits import assign_folds
from oirl.logs.store import conform_table, table_fingerprint
from oirl.registry import create, names, resolve
from oirl.rewards.calibration import apply_platt, cross_fit_platt
from oirl.rewards.embedders import DenseEmbedder, Matrix, TfidfEmbedder, make_embedder, restore_embedder
from oirl.rewards.knn import NearestNeighbours
from oirl.rewards.saving import Manifest, named, read_arrays, read_manifest, save_folder, sound_state
from oirl.rewards.training import (
    COLUMNS,
    HeldOut,
    SeenQueries,
    TrainingSummary,
    check_seed,
    pooled_models_warning,
    summarise,
    without_sparse_prompts,
)

_log = logging.getLogger(__name__)


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
        if not isinstance(self.folds, (int, np.integer)) or self.folds < 2:
            raise ConfigError(f"folds={self.folds!r}; a whole number of at least 2 is needed")
        check_seed(self.seed)
        log = conform_table(log, COLUMNS)
        cells, sparse = without_sparse_prompts(make_cells(log))
        if len(cells.prompt_ids) < 2:
            raise DataError(f"the log has one prompt only ({cells.prompt_ids[0]}); there is nothing to choose from")
        groups = group_queries(cells.queries)
        n_groups = int(groups.labels.max()) + 1
        if n_groups < 2:
            raise DataError("all queries of the log are one query; at least two unlike queries are needed")
        self.warnings_ = [w for w in [sparse, groups.warning(), pooled_models_warning(log)] if w]
        self.prompt_ids_, self.prompts_ = list(cells.prompt_ids), list(cells.prompts)
        self.train_ = summarise(cells, table_fingerprint(log))
        self._embedder = make_embedder(self.embedder)
        self._prompt_embedder = _prompt_embedder(self._embedder)
        read_prompts = self._prompt_embedder.prepare(cells.prompts)
        prompts = self._prompt_embedder.fit(read_prompts).embed(read_prompts)
        _log.info("reading %s queries", f"{len(cells.queries):,}")
        prepared = self._embedder.prepare(cells.queries)
        fold = assign_folds(cells.query_ids, groups.labels, min(self.folds, n_groups), self.seed)
        features = self._embedder.fit(prepared).embed(prepared)
        scorer: PromptScorer = create("prompt-models", self.model, self.params)
        _log.info("fitting %s to %s cells in %d folds", self.model, f"{len(cells.runs):,}", int(fold.max()) + 1)
        self._scorer, held_out = scorer.fit(features, prompts, cells, fold, self.seed)
        self._calibrate(cells, held_out, fold, groups.labels)
        self.knn_ = NearestNeighbours().fit(cells, self.seed)
        return self

    def _calibrate(self, cells: Cells, scores: np.ndarray, fold: np.ndarray, groups: np.ndarray) -> None:
        """Learn the calibration from cross-fitted scores; `held_out_` gets its own of the other folds."""
        score = scores[cells.query_index, cells.prompt_index]
        self._platt, of_fold = cross_fit_platt(score, cells.runs, cells.successes, fold[cells.query_index])
        probability = np.empty_like(scores)
        for f, platt in enumerate(of_fold):
            probability[fold == f] = apply_platt(scores[fold == f], platt)
        self.held_out_ = HeldOut(cells, probability, fold, groups)

    def clone(self) -> PromptRewardModel:
        """Return an unfitted model with the same parameters."""
        return type(self)(self.model, embedder=self.embedder, folds=self.folds, seed=self.seed, params=self.params)

    def predict_proba(self, queries: Sequence[str], prompts: Sequence[str] | None = None) -> np.ndarray:
        """Return the estimated success of each query under each prompt, float (Q, P).

        Args:
            queries: Texts.
            prompts: Prompt templates; the training prompts, in the order of `prompt_ids_`, when None. A template that
                the training log does not hold is scored through its text: an extrapolation.
        """
        if prompts is None:
            return self.predict_columns(queries, np.arange(len(self._fitted().prompts_)), [])
        positions: dict[str, list[int]] = {}
        for i, text in enumerate(self._fitted().prompts_):
            positions.setdefault(text, []).append(i)
        # Of several prompts with one text, each is meant once, in order.
        known = [places.pop(0) if (places := positions.get(text)) else -1 for text in prompts]
        return self.predict_columns(queries, np.array(known), prompts)

    def predict_columns(self, queries: Sequence[str], known: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Return the estimated success under some prompts, float (Q, P').

        Args:
            queries: Texts.
            known: For each prompt its position in `prompt_ids_`, or -1, int (P',).
            prompts: The template of each prompt; read only where `known` is -1.
        """
        self._fitted()
        features = self._embedder.embed(self._embedder.prepare(queries))
        columns = np.empty((len(queries), len(known)))
        columns[:, known >= 0] = self._scorer.scores(features)[:, known[known >= 0]]
        new = np.flatnonzero(known < 0)
        if len(new):
            unseen = self._prompt_embedder.embed(self._prompt_embedder.prepare([prompts[int(j)] for j in new]))
            columns[:, new] = self._scorer.scores_for(features, unseen)
        return apply_platt(columns, self._platt)

    def to_saved(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return what `save` writes: the fields of the manifest, and the arrays."""
        train = self._fitted().train_
        arrays = {f"scorer.{k}": v for k, v in self._scorer.state().items()}
        arrays |= {f"embedder.{k}": v for k, v in self._embedder.arrays().items()}
        arrays |= {f"prompt_embedder.{k}": v for k, v in self._prompt_embedder.arrays().items()}
        arrays |= {f"knn.{k}": v for k, v in self.knn_.state().items()}
        arrays |= {"train.rates": train.rates, "train.texts": train.seen.texts, "train.wordings": train.seen.wordings}
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
                "folds": int(self.folds),
                "seed": int(self.seed),
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
        with sound_state(path):
            model = cls._restore(manifest, arrays, embedder)
            # Whatever does not fit together shows in one prediction, before anybody relies on one.
            shape = (1, len(model.prompt_ids_))
            for estimate in (model.predict_proba(["Is it sound?"]), model.knn_.predict(["Is it sound?"])):
                if estimate.shape != shape or not np.isfinite(estimate).all():
                    raise ValueError("its parts do not belong together")
        return model

    @classmethod
    def _restore(cls, manifest: Manifest, arrays: Mapping[str, np.ndarray], embedder: Any) -> PromptRewardModel:
        parameters = {k: v for k, v in manifest.model.items() if k != "name"}
        name, data = manifest.model["name"], manifest.data
        model = cls(name, embedder=embedder or manifest.embedder["name"], folds=data["folds"], seed=data["seed"])
        model.params = parameters
        model.prompt_ids_ = [p.prompt_id for p in manifest.prompts]
        model.prompts_ = [p.prompt for p in manifest.prompts]
        model.warnings_ = manifest.warnings
        if not model.prompt_ids_ or arrays["train.rates"].shape != (len(model.prompt_ids_),):
            raise ValueError("its prompts do not match its arrays")
        model.train_ = TrainingSummary(
            arrays["train.rates"],
            model.prompt_ids_.index(data["best_prompt"]),
            data["n_rows"],
            data["n_queries"],
            data["fingerprint"],
            SeenQueries(arrays["train.texts"], arrays["train.wordings"]),
        )
        slope, intercept = manifest.calibration["slope"], manifest.calibration["intercept"]
        if not np.isfinite(slope) or not np.isfinite(intercept):
            raise ValueError("its calibration is not finite")
        model._platt = (slope, intercept)
        model._embedder = restore_embedder(manifest.embedder, named(arrays, "embedder."), embedder)
        model._prompt_embedder = _prompt_embedder(model._embedder)
        # Another fit of this model starts from the embedder that it was trained with.
        model.embedder = model._embedder
        if hasattr(model._prompt_embedder, "restore"):
            model._prompt_embedder.restore(named(arrays, "prompt_embedder."))
        known = names("prompt-models")
        if name not in known:
            raise ModelFileError(f"unknown prompt model {name!r}; known: {', '.join(known)}")
        model._scorer = resolve("prompt-models", name)(**parameters).restore(named(arrays, "scorer."))
        model.knn_ = NearestNeighbours().restore(named(arrays, "knn."))
        return model

    def _fitted(self) -> PromptRewardModel:
        if not hasattr(self, "_scorer"):
            raise NotFittedError("this PromptRewardModel is not fitted; call fit(log) or oirl.load(folder) first")
        return self


def _prompt_embedder(embedder: Any) -> Any:
    # A handful of prompts needs a vocabulary of its own, in which a word of one prompt counts.
    if isinstance(embedder, TfidfEmbedder):
        return TfidfEmbedder(min_df=1, blocks=("words", "chars"))
    # What another embedder learns of the prompts must not be overwritten by what it learns of the queries.
    return embedder if isinstance(embedder, DenseEmbedder) else copy.deepcopy(embedder)
