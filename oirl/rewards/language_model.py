"""Reward models that are a language model with linear scalar heads, trained on preference pairs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from oirl.errors import ConfigError, DataError, ModelFileError, NotFittedError, require
from oirl.language_models import check_vocabulary, load_model_body, load_tokenizer, padding_id, token_limit
from oirl.logs.pairs import group_pairs, usable_pairs
from oirl.logs.splits import assign_folds, assign_test
from oirl.logs.store import table_fingerprint
from oirl.rewards.base import Estimates
from oirl.rewards.encoding import by_length, encode, pad
from oirl.rewards.learners import check_above_zero
from oirl.rewards.preferences import (
    PairedResponses,
    calibrate_differences,
    conform_pairs,
    longer_preferred,
    pair_margins,
    preference_metrics,
)
from oirl.rewards.saving import read_arrays, read_manifest, save_folder, sound_state
from oirl.rewards.training import SeenQueries, check_seed

_HELD_OUT = 0.1
_LEAST_LENGTH = 8
_SCORED = 16


class LanguageModelRewardModel:
    """A causal language model whose head is replaced by linear scalars at the last token.

    Total loss λ · L_R + β · L_IL (Askell et al. 2021): L_R = −log σ(r₊ − r₋), L_IL = −Σ log P(y₊ tokens | x). Of the
    heads, each sees its own random weights of the pairs (Bayesian bootstrap, Rubin 1981), so that they differ as much
    as the pairs leave open; the reward is their mean. What the shared layers leave open does not show in the spread. A
    tenth of the groups of queries is held out, for calibration and metrics.

    Args:
        base: The language model: a name on the hub, or a local folder.
        ranking: λ ≥ 0.
        imitation: β ≥ 0; above 0 the model also learns to write the chosen responses.
        centring: Weight of mean((r₊ + r₋)²).
        margin: "none", or "pairs": be ahead by each pair's margin, over the mean margin.
        epochs: Passes over the pairs.
        batch: Pairs of a step.
        micro_batch: Pairs that are in memory at a time; gradients of a step are added up. All when None.
        learning_rate: Of AdamW.
        lora_rank: Rank of adapters on all linear layers (LoRA, Hu et al. 2021); 0 trains all weights.
        gradient_checkpointing: Recompute activations instead of keeping them.
        max_length: Tokens of query and response at most; what the model allows when None.
        heads: Number of heads.
        save_every: Steps between checkpoints, where these are asked for.
        seed: For the order of pairs, the held-out part and the weights of heads.

    Attributes:
        metrics_: On the held-out pairs: pair_accuracy with ci_low and ci_high, brier, ece, log_loss.
        seen_: The queries of all pairs given, held out or not.
        data_: What was learned from.
        left_out_: Reason -> pairs that nothing was learned from.
        warnings_: What limits the model.
    """

    kind = "language-model-reward-model"
    is_main = True
    """Whether this process is the only one, or the first of those that `accelerate launch` has started."""

    def __init__(
        self,
        base: str,
        *,
        ranking: float = 1.0,
        imitation: float = 0.0,
        centring: float = 0.01,
        margin: str = "none",
        epochs: int = 1,
        batch: int = 16,
        micro_batch: int | None = None,
        learning_rate: float = 1e-5,
        lora_rank: int = 0,
        gradient_checkpointing: bool = False,
        max_length: int | None = None,
        heads: int = 5,
        save_every: int = 100,
        seed: int = 0,
    ) -> None:
        self.base = base
        self.ranking = ranking
        self.imitation = imitation
        self.centring = centring
        self.margin = margin
        self.epochs = epochs
        self.batch = batch
        self.micro_batch = micro_batch
        self.learning_rate = learning_rate
        self.lora_rank = lora_rank
        self.gradient_checkpointing = gradient_checkpointing
        self.max_length = max_length
        self.heads = heads
        self.save_every = save_every
        self.seed = seed

    def get_params(self) -> dict[str, Any]:
        """Return the parameters by name."""
        names = (
            "base ranking imitation centring margin epochs batch micro_batch learning_rate lora_rank "
            "gradient_checkpointing max_length heads save_every seed"
        )
        return {name: getattr(self, name) for name in names.split()}

    def clone(self) -> LanguageModelRewardModel:
        """Return an unfitted model with the same parameters."""
        return type(self)(**self.get_params())

    def fit(self, pairs: pa.Table, *, checkpoints: str | os.PathLike[str] | None = None) -> LanguageModelRewardModel:
        """Train on preference pairs, whatever their split.

        Args:
            pairs: Preference pairs.
            checkpoints: Folder in which the training is saved from time to time, and from which it goes on.

        Raises:
            DataError: If there are no usable pairs, or too few unlike queries.
            ConfigError: If a parameter is not allowed, the base cannot be loaded, or checkpoints are of another run.
            MissingPackageError: If transformers, accelerate or, for LoRA, peft is not installed.
        """
        self._check()
        pairs, self.left_out_ = usable_pairs(conform_pairs(pairs))
        if not len(pairs):
            raise DataError("no pair that says anything; make pairs with `oirl pairs` or `oirl import`")
        grouping = group_pairs(pairs)
        held_out = assign_test(pairs["pair_id"].to_pylist(), grouping.labels, _HELD_OUT, self.seed)
        margin = pair_margins(pairs, self.margin)
        self._tokenizer = load_tokenizer(self.base)
        causal = load_model_body(self.base, dtype="float32")
        check_vocabulary(causal, self._tokenizer, self.base)
        self._model = self._make(causal)
        self._train(pairs.filter(pa.array(~held_out)), None if margin is None else margin[~held_out], checkpoints)
        self._scale = (1.0, 0.0)
        rows = PairedResponses(pairs)
        rewards = self._rewards(rows.queries, rows.responses).mean(axis=1)
        difference = (rewards[rows.chosen] - rewards[rows.rejected])[held_out]
        groups = grouping.labels[held_out]
        keys = pairs.filter(pa.array(held_out))["pair_id"].to_pylist()
        # The metrics of each half of the held-out pairs are with the slope of the other half.
        halves = assign_folds(keys, groups, min(2, len(np.unique(groups))), self.seed)
        slope, probability = calibrate_differences(difference, halves)
        self._scale = (slope, -slope * float(rewards.mean()))
        self.metrics_ = preference_metrics(difference, probability, groups)
        self.warnings_ = [w for w in [grouping.warning()] if w]
        self.seen_ = SeenQueries.of(rows.queries)
        self.data_ = {
            "fingerprint": table_fingerprint(pairs),
            "n_pairs": len(pairs),
            "n_held_out": int(held_out.sum()),
            "n_queries": len(set(rows.queries)),
            "longer_preferred": longer_preferred(pairs),
        }
        return self

    def estimate(self, queries: Sequence[str], responses: Sequence[str]) -> Estimates:
        """Return reward and spread over heads of each response; see `oirl.rewards.base.Estimates`."""
        self._fitted()
        if len(queries) != len(responses):
            raise ConfigError(f"{len(queries)} queries, {len(responses)} responses; one query per response is needed")
        slope, intercept = self._scale
        rewards = slope * self._rewards(queries, responses) + intercept
        return Estimates(rewards.mean(axis=1), rewards.std(axis=1))

    def predict_reward(self, queries: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """Return the reward of each response, float (n,)."""
        return self.estimate(queries, responses).reward

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to a folder, whole or not at all; of LoRA the adapters only, beside the name of the base.

        Of several processes that have trained it together, the first one writes.
        """
        self._fitted()
        if not self.is_main:
            return
        arrays = {"head": self._model.head.weight.detach().cpu().numpy()}
        arrays |= {"seen.texts": self.seen_.texts, "seen.wordings": self.seen_.wordings}
        manifest = {
            "kind": self.kind,
            "model": {"name": "language-model", **self.get_params()},
            "embedder": {},
            "prompts": [],
            "data": self.data_,
            "metrics": self.metrics_,
            "calibration": {
                "method": "slope by maximum likelihood on held-out pairs: reward = slope * mean of heads + intercept",
                "slope": self._scale[0],
                "intercept": self._scale[1],
            },
            "warnings": self.warnings_,
        }

        def write(folder: Path) -> None:
            whole = self._adapted if self.lora_rank else self._model.causal
            whole.save_pretrained(str(folder))
            self._tokenizer.save_pretrained(folder)
            (folder / "README.md").unlink(missing_ok=True)  # a card that peft writes

        save_folder(path, manifest, arrays, write)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, embedder: Any = None) -> LanguageModelRewardModel:
        """Read a model from a folder; see `oirl.load`."""
        if embedder is not None:
            raise ConfigError(f"{path} is a language model; it takes no embedder")
        manifest = read_manifest(path)
        arrays = read_arrays(path, manifest)
        with sound_state(path):
            model = cls(**{k: v for k, v in manifest.model.items() if k != "name"})
            model._restore(Path(path), arrays["head"])
            model._scale = (manifest.calibration["slope"], manifest.calibration["intercept"])
            model.seen_ = SeenQueries(arrays["seen.texts"], arrays["seen.wordings"])
            model.data_, model.metrics_, model.warnings_ = manifest.data, dict(manifest.metrics), manifest.warnings
            if not np.isfinite(model.predict_reward(["Is it sound?"], ["It is."])).all():
                raise ValueError("its parts do not belong together")
        return model

    def _restore(self, folder: Path, head: np.ndarray) -> None:
        import torch

        from oirl.rewards.scalar_head import ScalarHeads

        self._tokenizer = load_tokenizer(str(folder))
        causal = load_model_body(self.base if self.lora_rank else str(folder), dtype="float32")
        if self.lora_rank:
            require("peft", "tune", "a model with LoRA adapters")
            from peft import PeftModel

            self._adapted = PeftModel.from_pretrained(causal, str(folder))
            causal = self._adapted.get_base_model()
        if head.shape != (self.heads, causal.config.hidden_size):
            raise ModelFileError(f"{folder}: the heads do not fit the base model {self.base!r}; fit the model again")
        self._model = ScalarHeads(causal, self.heads)
        with torch.no_grad():
            self._model.head.weight.copy_(torch.from_numpy(head))
        self._model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def _make(self, causal: Any) -> Any:
        import torch

        from oirl.rewards.scalar_head import ScalarHeads

        torch.manual_seed(self.seed)
        if self.lora_rank:
            require("peft", "tune", "lora_rank above 0")
            from peft import LoraConfig, get_peft_model

            config = LoraConfig(r=self.lora_rank, lora_alpha=2 * self.lora_rank, target_modules="all-linear")
            self._adapted = get_peft_model(causal, config)
            causal = self._adapted.get_base_model()
        elif not self.imitation and not causal.config.tie_word_embeddings:
            causal.get_output_embeddings().requires_grad_(False)  # nothing of the loss goes through it
        if self.gradient_checkpointing:
            enable = getattr(causal, "activation_checkpointing_enable", causal.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
            causal.enable_input_require_grads()
        return ScalarHeads(causal, self.heads)

    def _train(self, pairs: pa.Table, margin: np.ndarray | None, checkpoints: str | os.PathLike[str] | None) -> None:
        from oirl.rewards.scalar_head import Pairs, Training, train

        limit = token_limit(self._model.causal, self._tokenizer, self.max_length)
        queries = pairs["query"].to_pylist()
        sides = [
            [encode(self._tokenizer, q, r, limit) for q, r in zip(queries, pairs[name].to_pylist(), strict=True)]
            for name in ("chosen", "rejected")
        ]
        weights = np.random.default_rng(self.seed).exponential(size=(len(pairs), self.heads))
        how = Training(
            self.ranking,
            self.imitation,
            self.centring,
            self.epochs,
            self.batch,
            self.micro_batch or self.batch,
            self.learning_rate,
            self.save_every,
            self.seed,
        )
        key = hashlib.sha256(json.dumps([self.get_params(), table_fingerprint(pairs)]).encode()).hexdigest()
        folder = None if checkpoints is None else Path(checkpoints)
        data = Pairs(sides[0], sides[1], margin, weights)
        self._model, self.is_main = train(self._model, data, how, padding_id(self._tokenizer), folder, key)

    def _rewards(self, queries: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """Return the uncalibrated reward of each response by each head, float64 (n, heads)."""
        import torch

        limit = token_limit(self._model.causal, self._tokenizer, self.max_length)
        rows = [encode(self._tokenizer, q, r, limit) for q, r in zip(queries, responses, strict=True)]
        out = np.empty((len(rows), self.heads))
        device = self._model.head.weight.device
        with torch.inference_mode():
            for batch in by_length(rows, _SCORED):
                ids, mask, _ = (t.to(device) for t in pad([rows[i] for i in batch], padding_id(self._tokenizer)))
                out[batch] = self._model.rewards(self._model.states(ids, mask), mask).double().cpu().numpy()
        return out

    def _fitted(self) -> None:
        if not hasattr(self, "seen_"):
            raise NotFittedError("this LanguageModelRewardModel is not fitted; call fit or oirl.load(folder) first")

    def _check(self) -> None:
        check_seed(self.seed)
        require("accelerate", "tune", "training a language model")
        whole = {"epochs": self.epochs, "batch": self.batch, "heads": self.heads, "save_every": self.save_every}
        whole |= {} if self.micro_batch is None else {"micro_batch": self.micro_batch}
        check_above_zero("language-model", learning_rate=self.learning_rate, **whole)
        for name, value in {"ranking": self.ranking, "imitation": self.imitation, "centring": self.centring}.items():
            if not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise ConfigError(f"{name}={value!r} of the model 'language-model': a number of at least 0 is needed")
        if not isinstance(self.gradient_checkpointing, bool):
            raise ConfigError(f"gradient_checkpointing={self.gradient_checkpointing!r}: true or false is needed")
        if self.max_length is not None and (not isinstance(self.max_length, int) or self.max_length < _LEAST_LENGTH):
            raise ConfigError(f"max_length={self.max_length!r}: at least {_LEAST_LENGTH} tokens are needed")
        if not isinstance(self.lora_rank, int) or self.lora_rank < 0:
            raise ConfigError(f"lora_rank={self.lora_rank!r}: 0 for all weights, or the rank of the adapters")
        if not self.ranking:
            raise ConfigError("ranking=0: nothing would be learned of which response is preferred")


def parameters_of(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return parameters for `LanguageModelRewardModel` that a user has named.

    Raises:
        ConfigError: If there is no parameter of a name.
    """
    known = [name for name in LanguageModelRewardModel("").get_params() if name not in ("base", "seed", "margin")]
    for name in given or {}:
        if name not in known:
            raise ConfigError(f"a language-model has no parameter {name!r}; it has: {', '.join(known)}")
    return dict(given or {})
