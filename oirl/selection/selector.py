"""Choose the prompt of each query with a reward model, where the gate lets it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import TypeAdapter, ValidationError

from oirl.errors import ConfigError, ModelFileError, NotFittedError, nearest
from oirl.evaluation.costs import choose_by_cost
from oirl.evaluation.evaluate import model_metrics
from oirl.evaluation.policies import switch
from oirl.logs.cells import Cells, name_actions
from oirl.logs.costs import COST_COLUMNS
from oirl.logs.queries import read_prompts
from oirl.logs.splits import find_leaks, train_rows
from oirl.logs.store import conform_table, first_line
from oirl.logs.text import template_id, text_id
from oirl.rewards.prompts import PromptRewardModel
from oirl.rewards.saving import read_manifest, save_folder
from oirl.rewards.training import COLUMNS
from oirl.selection.costs import CostPlan, learn_costs
from oirl.selection.gate import MARGINS, Deployment, decide

FITTED = tuple(dict.fromkeys((*COLUMNS, *COST_COLUMNS)))
"""The columns of a log that a selector learns from."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A prompt to choose from.

    Attributes:
        prompt_id: Its name.
        prompt: The template.
    """

    prompt_id: str
    prompt: str


@dataclass(frozen=True, slots=True)
class Selection:
    """The prompt chosen for a query.

    Attributes:
        query_id: Name of the query.
        query: Its text.
        prompt_id: The chosen prompt.
        prompt: Its template.
        score: Estimated success under it.
        baseline_score: Estimated success under the best single prompt.
        changed: Whether the prompt chosen for the query is another than the best single prompt.
        rank: 1 for the chosen prompt; further prompts follow when `top` asks for them.
        extrapolation: True for a prompt that the training log does not hold: its score is a guess from its text.
        scores: prompt_id -> estimated success.
    """

    query_id: str
    query: str
    prompt_id: str
    prompt: str
    score: float
    baseline_score: float
    changed: bool
    rank: int
    extrapolation: bool
    scores: dict[str, float]

    def to_dict(self, *, explain: bool = False) -> dict[str, Any]:
        """Return the row of `oirl select`; with `explain` it holds the scores of all prompts too."""
        row = {
            "query_id": self.query_id,
            "query": self.query,
            "prompt_id": self.prompt_id,
            "prompt": self.prompt,
            "score": self.score,
            "baseline_score": self.baseline_score,
            "changed": self.changed,
        }
        if self.rank > 1:
            row["rank"] = self.rank
        if self.extrapolation:
            row["extrapolation"] = True
        if explain:
            row["scores"] = self.scores
        return row


@dataclass(frozen=True, slots=True)
class Thrift:
    """How cost counts in a selection.

    Attributes:
        weight: Success that a unit of cost is worth.
        prices: Cost of each candidate, float (P',).
        single: Position of the best single candidate at this weight.
        margin: Smallest advantage that pays for leaving it.
        deploy: Whether choosing per query is shown to pay at this weight.
    """

    weight: float
    prices: np.ndarray
    single: int
    margin: float
    deploy: bool

    def choose(self, scores: np.ndarray) -> np.ndarray:
        """Return the position of the candidate taken for each query, int (Q,)."""
        if not self.deploy:
            return np.full(len(scores), self.single)
        return choose_by_cost(scores, self.prices, self.weight, self.single, self.margin)


def _restored_costs(path: str | os.PathLike[str], found: dict[str, Any] | None, prompts: int) -> CostPlan | None:
    if found is None:
        return None
    try:
        return CostPlan.from_dict(found, prompts)
    except (KeyError, TypeError, ValueError) as e:
        raise ModelFileError(f"{path}: `costs` in the manifest are not sound: {first_line(e)}; fit it again") from e


def _coverage_warning(cells: Cells) -> list[str]:
    runs, _ = cells.matrices()
    full = int(np.all(runs > 0, axis=1).sum())
    if full == len(runs):
        return []
    return [
        f"the prompts were compared on the {full:,} of {len(runs):,} queries that were run under all of them; leave "
        "out prompts with few queries to compare the others on more"
    ]


def read_candidates(path: str | os.PathLike[str], model: PromptRewardModel) -> list[Candidate]:
    """Return the candidate prompts of a file; ids stand for prompts that the model knows, texts find their ids.

    Args:
        path: A prompt file, see `oirl.logs.queries.read_prompts`.
        model: The fitted reward model.

    Raises:
        ConfigError: If an entry has an id only, and the model does not know it.
        DataError: If the file does not hold prompts.
    """
    text_of = dict(zip(model.prompt_ids_, model.prompts_, strict=True))
    id_of = {text.strip(): name for name, text in text_of.items()}
    found = []
    for name, text in read_prompts(path):
        if text is None:
            if name not in text_of:
                raise ConfigError(
                    f"{path}: the model does not know the prompt {name!r}{nearest(name or '', text_of)}; give its "
                    f"template under `prompt`, or one of: {', '.join(text_of)}"
                )
            text = text_of[name]
        found.append(Candidate(name or id_of.get(text.strip()) or template_id(text), text))
    return found


class PromptSelector:
    """Learns from a log which prompt to use for each query, and whether choosing pays at all.

    Args:
        model: The reward model to fit; `PromptRewardModel()` when None.
        margins: Estimated gains among which the gate finds the one from which a switch pays.
        actions: What is chosen: "prompt", or "pair" for a language model and a prompt.
        prices: Prices of tokens by model, for logs without costs (`oirl.logs.costs.read_prices`).

    Attributes:
        model_: The fitted reward model.
        deployment_: What the gate decided (`Deployment`).
        metrics_: Held-out metrics of the reward model on the training log, by cross-fitting.
        costs_: What prompts cost and what thrift gives (`CostPlan`); None where the log does not tell.
        warnings_: What limits the selector.
    """

    kind = "prompt-selector"

    def __init__(
        self,
        model: PromptRewardModel | None = None,
        *,
        margins: Sequence[float] = MARGINS,
        actions: str = "prompt",
        prices: Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        self.model = model
        self.margins = margins
        self.actions = actions
        self.prices = prices

    def fit(self, log: pa.Table) -> PromptSelector:
        """Fit the reward model and let the gate decide, on the rows marked "train" where the log marks any.

        Raises:
            DataError: If the log cannot be learned from; see `PromptRewardModel.fit`.
            ConfigError: If a margin is negative, or there is none.
        """
        if not self.margins or min(self.margins) < 0:
            raise ConfigError(f"margins={self.margins!r}; numbers of 0 or more are needed")
        log = name_actions(conform_table(log, FITTED), self.actions)
        leaks = find_leaks(log).warning()
        rows = train_rows(log)
        self.model_ = (self.model or PromptRewardModel()).clone().fit(rows)
        held_out = self.model_.held_out_
        cells = held_out.cells
        predicted = held_out.probability[cells.query_index, cells.prompt_index]
        self.metrics_ = model_metrics(predicted, cells, self.model_.train_.rates)
        rng = np.random.default_rng(self.model_.seed)
        self.deployment_ = decide(held_out, self.model_.train_.best, rng, self.margins)
        self.costs_ = learn_costs(rows, held_out, self.deployment_.margin, self.prices)
        self.warnings_ = [*([leaks] if leaks else []), *self.model_.warnings_, *_coverage_warning(cells)]
        return self

    def choose(self, scores: np.ndarray) -> np.ndarray:
        """Return the prompt of each query as if the gate had let the selector pass.

        Args:
            scores: `predict_proba` of the reward model, float (Q, P).

        Returns:
            Positions of prompts, int64 (Q,).
        """
        self._check_fitted()
        return switch(scores, self.model_.train_.best, self.deployment_.margin)

    def select(
        self,
        queries: Sequence[str],
        prompts: Sequence[Candidate] | None = None,
        *,
        query_ids: Sequence[str] | None = None,
        top: int = 1,
        max_cost: float | None = None,
        cost_weight: float | None = None,
    ) -> list[Selection]:
        """Choose the prompt of each query, by the policy that the gate deployed.

        Where choosing is not deployed, every query gets the best single prompt. A prompt that the training log does
        not hold is scored through its text and marked; it is chosen only if no known prompt is among the candidates.

        Args:
            queries: Texts.
            prompts: The candidates; the prompts of the training log when None.
            query_ids: Names of the queries; hashes of their texts when None.
            top: How many prompts per query, best first.
            max_cost: Mean cost per query that may not be exceeded, as calibrated on the training log.
            cost_weight: Success that a unit of cost is worth: the highest score − weight · cost is taken.

        Raises:
            NotFittedError: If neither `fit` nor `load` was called.
            ConfigError: If there are no candidates, `top` is below 1, or two candidates share an id.
        """
        self._check_fitted()
        blank = next((i for i, query in enumerate(queries) if not query.strip()), None)
        if blank is not None:
            raise ConfigError(f"query {blank + 1} is empty; a text is needed")
        if top < 1:
            raise ConfigError(f"top={top}; it must be at least 1")
        if query_ids is not None and len(query_ids) != len(queries):
            raise ConfigError(f"{len(query_ids)} query_ids for {len(queries)} queries; one for each is needed")
        candidates, known = self._candidates(prompts)
        scores = self.model_.predict_columns(queries, known, [c.prompt for c in candidates])
        thrift = self._thrift(max_cost, cost_weight, known)
        best = self._baseline(known, scores) if thrift is None else thrift.single
        choice = self._choice(scores, known, best) if thrift is None else thrift.choose(scores)
        ids = [text_id(q) for q in queries] if query_ids is None else list(query_ids)
        found: list[Selection] = []
        for i, query in enumerate(queries):
            # Guesses of unseen prompts rank behind what is known.
            by_score = [int(c) for c in np.lexsort((-scores[i], known < 0)) if c != choice[i]]
            row_scores = {c.prompt_id: float(scores[i, j]) for j, c in enumerate(candidates)}
            for rank, j in enumerate([int(choice[i]), *by_score][:top], 1):
                found.append(
                    Selection(
                        query_id=ids[i],
                        query=query,
                        prompt_id=candidates[j].prompt_id,
                        prompt=candidates[j].prompt,
                        score=float(scores[i, j]),
                        baseline_score=float(scores[i, best]),
                        changed=bool(choice[i] != best),
                        rank=rank,
                        extrapolation=bool(known[j] < 0),
                        scores=row_scores,
                    )
                )
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the selector to a folder, whole or not at all."""
        self._check_fitted()
        manifest, arrays = self.model_.to_saved()
        manifest |= {
            "kind": self.kind,
            "metrics": self.metrics_,
            "deploy": self.deployment_.to_dict(),
            "warnings": self.warnings_,
            "costs": None if self.costs_ is None else self.costs_.to_dict(),
        }
        manifest["data"]["actions"] = self.actions
        manifest["data"]["margins"] = [float(m) for m in self.margins]
        save_folder(path, manifest, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, embedder: Any = None) -> PromptSelector:
        """Read a selector from a folder; see `oirl.load`."""
        manifest = read_manifest(path)
        if manifest.kind != cls.kind or manifest.deploy is None:
            raise ModelFileError(f"{path} holds a {manifest.kind}, not a {cls.kind}; use oirl.load")
        try:
            deployment = TypeAdapter(Deployment).validate_json(json.dumps(manifest.deploy), strict=True)
        except ValidationError as e:
            what = f"{'.'.join(map(str, e.errors()[0]['loc']))}: {e.errors()[0]['msg']}"
            raise ModelFileError(f"{path}: `deploy` in the manifest: {what}; fit the model again") from e
        unknown = manifest.deploy.keys() - deployment.to_dict().keys()
        if unknown:
            raise ModelFileError(f"{path}: `deploy` in the manifest has the unknown key {min(unknown)!r}; fit it again")
        model = PromptRewardModel.load(path, embedder=embedder)
        if deployment.policy not in ("selector", "best_prompt"):
            raise ModelFileError(f"{path}: unknown policy {deployment.policy!r} in the manifest; fit the model again")
        actions = manifest.data.get("actions", "prompt")
        selector = cls(model, margins=tuple(manifest.data.get("margins", MARGINS)), actions=actions)
        selector.costs_ = _restored_costs(path, manifest.costs, len(model.prompt_ids_))
        selector.model_ = model
        selector.deployment_ = deployment
        selector.metrics_ = manifest.metrics
        selector.warnings_ = manifest.warnings
        return selector

    def _thrift(self, max_cost: float | None, cost_weight: float | None, known: np.ndarray) -> Thrift | None:
        """Return how cost counts in a selection, None where it does not."""
        if max_cost is None and cost_weight is None:
            return None
        if max_cost is not None and cost_weight is not None:
            raise ConfigError("max_cost and cost_weight are given; use one of the two")
        if self.costs_ is None:
            raise ConfigError(
                "this model knows no costs: its training log had neither `cost` nor `tokens_in` and `tokens_out`"
            )
        if (known < 0).any() or not len(known):
            raise ConfigError("the cost of a prompt that the training log does not hold is not known; leave it out")
        if max_cost is not None:
            point = self.costs_.within(max_cost)
            weight = point.weight
        else:
            weight = float(cost_weight or 0.0)
            point = self.costs_.at_weight(weight)
        prices = self.costs_.prices[known]
        single = int((self.costs_.values[known] - weight * prices).argmax())
        return Thrift(weight, prices, single, self.deployment_.margin, point.deploy)

    def _check_fitted(self) -> None:
        if not hasattr(self, "model_"):
            raise NotFittedError("this PromptSelector is not fitted; call fit(log) or oirl.load(folder) first")

    def _candidates(self, prompts: Sequence[Candidate] | None) -> tuple[list[Candidate], np.ndarray]:
        """Return the candidates and the position of each among the training prompts, -1 for unseen ones."""
        model = self.model_
        if prompts is None:
            found = [Candidate(i, p) for i, p in zip(model.prompt_ids_, model.prompts_, strict=True)]
            return found, np.arange(len(found))
        if not prompts:
            raise ConfigError("no candidate prompts; leave them out to choose among those of the training log")
        names = [c.prompt_id for c in prompts]
        if len(set(names)) < len(names):
            twice = next(n for n in names if names.count(n) > 1)
            raise ConfigError(f"two candidate prompts have the id {twice!r}; give each one its own")
        # Text files do not show spaces at the ends of a line; they make no other prompt of it.
        by_text = {text.strip(): i for i, text in reversed(list(enumerate(model.prompts_)))}
        by_both = {pair: i for i, pair in enumerate(zip(model.prompt_ids_, model.prompts_, strict=True))}
        known = [by_both.get((c.prompt_id, c.prompt), by_text.get(c.prompt.strip(), -1)) for c in prompts]
        return list(prompts), np.array(known)

    def _baseline(self, known: np.ndarray, scores: np.ndarray) -> int:
        """Return the best single candidate: that of the log, else by logged success, else by mean score."""
        if self.model_.train_.best in known:
            return int(np.flatnonzero(known == self.model_.train_.best)[0])
        rates = np.where(known >= 0, self.model_.train_.rates[known], -1.0)
        if (known >= 0).any():
            return int(rates.argmax())
        return int(scores.mean(axis=0).argmax()) if len(scores) else 0

    def _choice(self, scores: np.ndarray, known: np.ndarray, best: int) -> np.ndarray:
        if self.deployment_.policy == "best_prompt":
            return np.full(len(scores), best)
        allowed = np.where((known >= 0) | ~(known >= 0).any(), scores, -np.inf)
        return switch(allowed, best, self.deployment_.margin)
