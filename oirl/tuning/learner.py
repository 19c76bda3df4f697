"""The policy, its values and their optimisers in online updates: forward passes, updates, exact state."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from oirl.engines.base import derive_seed
from oirl.errors import TrainingError
from oirl.language_models import padding_id
from oirl.tuning.examples import Example
from oirl.tuning.experience import Experience, Measured, by_token, response_mask
from oirl.tuning.heads import head_is_all, token_terms
from oirl.tuning.kl import AdaptiveKl, FixedKl
from oirl.tuning.online_settings import Apa, Awr, Online, Ppo
from oirl.tuning.policy import Policy
from oirl.tuning.policy_losses import (
    WEIGHTS,
    Metrics,
    apa_loss,
    awr_loss,
    clipped_value_loss,
    importance_weights,
    ppo_loss,
    value_loss,
)
from oirl.tuning.shaping import RunningMoments
from oirl.tuning.trainer import collate
from oirl.tuning.values import ValueHead, load_value, open_value, save_value

_BETAS = (0.9, 0.95)  # trlX's
_SCORED = 4  # micro-batches at a time where no gradient is wanted
_OPTIMISERS, _STATE = "optimisers.safetensors", "online.json"


class Learner:
    """What is trained, on one process or on each of several, which share every update.

    Args:
        how: How to train.
        policy: The policy.
        processes: accelerate's view of the processes.

    Attributes:
        kl: The KL coefficient's controller.
        moments: Of all rewards so far.
    """

    def __init__(self, how: Online, policy: Policy, processes: Any) -> None:
        self._how, self._policy, self._processes = how, policy, processes
        self._fill = padding_id(policy.tokenizer)
        self._whole = not head_is_all(policy.model)
        self._value = open_value(how, policy)
        self._head = self._value if isinstance(self._value, ValueHead) else None
        for model in self._models():
            _without_dropout(model)
            if how.gradient_checkpointing:
                _recompute_activations(model)
        self._trained: dict[str, dict[str, nn.Parameter]] = {"policy": _trainable(policy.model)}
        if self._value is not None:
            self._trained["value"] = _trainable(self._value)
        rates = {"policy": how.learning_rate, "value": how.value_rate}
        self._rates = {name: rates[name] for name in self._trained}
        self._optimisers = {
            name: torch.optim.AdamW(list(ps.values()), rates[name], betas=_BETAS, weight_decay=how.weight_decay)
            for name, ps in self._trained.items()
        }
        adaptive = isinstance(how, Ppo) and how.kl_controller == "adaptive"
        self.kl = AdaptiveKl(how.kl_coef, how.kl_target, how.kl_horizon) if adaptive else FixedKl(how.kl_coef)  # type: ignore[attr-defined]
        self.moments = RunningMoments()

    def measure(self, examples: Sequence[Example], engine_logprobs: Sequence[Sequence[float] | None]) -> Measured:
        """Return what policy, reference and values say of the tokens of responses; each process does its share."""
        mask = response_mask([len(e.response) for e in examples])

        def policy_says(inputs: Mapping[str, Any]) -> list[torch.Tensor]:
            terms = self._terms(self._policy.model, inputs, entropy=True)
            values = [] if self._value is None else [self._values(inputs, terms.states)]
            return [terms.logprobs, -terms.negative_entropy, *values]

        old, entropy, *values = self._each(examples, mask, policy_says, 2 + (self._value is not None))
        with self._policy.reference_model() as reference:
            (ref,) = self._each(examples, mask, lambda inputs: [self._terms(reference, inputs).logprobs], 1)
        return Measured(mask, old, ref, entropy, values[0] if values else None, by_token(engine_logprobs, mask))

    def update(self, experience: Experience, iteration: int) -> dict[str, float]:
        """Go over an iteration's experience for some epochs, and return the means of the metrics over its updates.

        Args:
            experience: What to learn from.
            iteration: Decides the order, and the learning rate.

        Raises:
            TrainingError: If a loss or a gradient is not a number; the update is not made.
        """
        how, n = self._how, len(experience.examples)
        rng = np.random.default_rng(derive_seed(how.seed, "updates", iteration))
        total = how.epochs * math.ceil(n / how.batch)
        sums: dict[str, float] = {}
        done = 0
        for _ in range(how.epochs):
            order = rng.permutation(n)
            for start in range(0, n, how.batch):
                rate = _rate(how, (iteration + (done + 0.5) / total) / how.iterations)
                for name, value in self._update(experience, order[start : start + how.batch], rate).items():
                    sums[name] = sums.get(name, 0.0) + value
                done += 1
        return {name: value / done for name, value in sums.items()} | {"updates": done}

    def save(self, folder: Path) -> None:
        """Write all that is trained, and what training it needs, beside the policy's weights."""
        if self._value is not None:
            save_value(self._value, folder)
        states = {
            f"{group}/{name}/{key}": torch.as_tensor(value).detach().contiguous()
            for group, parameters in self._trained.items()
            for name, parameter in parameters.items()
            for key, value in self._optimisers[group].state.get(parameter, {}).items()
        }
        save_file(states, str(folder / _OPTIMISERS))
        told = {"kl_coef": self.kl.kl_coef, "moments": self.moments.state()}
        (folder / _STATE).write_text(json.dumps(told), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Take what `save` has written; the policy loads its own."""
        if self._value is not None:
            load_value(self._value, folder)
        states = load_file(str(folder / _OPTIMISERS))
        for group, parameters in self._trained.items():
            self._optimisers[group].state.clear()
            for name, parameter in parameters.items():
                found = {k.rpartition("/")[2]: v for k, v in states.items() if k.startswith(f"{group}/{name}/")}
                if found:
                    moved = {k: v if k == "step" else v.to(parameter.device) for k, v in found.items()}
                    self._optimisers[group].state[parameter] = moved
        told = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        self.kl.kl_coef = float(told["kl_coef"])
        self.moments.restore(told["moments"])

    def _models(self) -> Iterator[Any]:
        yield self._policy.model
        yield from ([] if self._value is None else [getattr(self._value, "body", self._value)])

    def _terms(self, model: Any, inputs: Mapping[str, Any], *, entropy: bool = False) -> Any:
        return token_terms(model, inputs, 0.0, entropy, temperature=self._how.temperature, whole=self._whole)

    def _values(self, inputs: Mapping[str, Any], states: torch.Tensor) -> torch.Tensor:
        assert self._value is not None
        return self._value(states) if self._head is not None else self._value(inputs)

    def _inputs(self, examples: Sequence[Example]) -> dict[str, Any]:
        batch = collate(examples, self._fill, "none", self._policy.start)
        return {k: v.to(self._policy.device) if torch.is_tensor(v) else v for k, v in batch.items()}

    def _each(
        self,
        examples: Sequence[Example],
        mask: torch.Tensor,
        function: Callable[[Mapping[str, Any]], list[torch.Tensor]],
        count: int,
    ) -> list[torch.Tensor]:
        """Return what a function says of the tokens of micro-batches, joined over all processes, (n, t) each."""
        found = torch.zeros(count, *mask.shape)
        order = np.argsort([-len(e) for e in examples], kind="stable")
        size = _SCORED * self._how.micro_batch
        parts = [order[i : i + size] for i in range(0, len(order), size)]
        with torch.no_grad(), self._policy.computing():
            for rows in parts[self._processes.process_index :: self._processes.num_processes]:
                told = torch.stack(function(self._inputs([examples[i] for i in rows]))).float().cpu()
                block = torch.zeros(count, len(rows), mask.shape[1])
                block[:, mask[rows]] = told
                found[:, rows] = block
        return list(self._sum(found))

    def _update(self, experience: Experience, rows: np.ndarray, rate: float) -> dict[str, float]:
        how, mask = self._how, experience.measured.mask
        weights = WEIGHTS[how.average](mask[rows])
        order = sorted(range(len(rows)), key=lambda i: (-len(experience.examples[rows[i]]), i))
        parts = [order[i : i + how.micro_batch] for i in range(0, len(order), how.micro_batch)]
        for optimiser in self._optimisers.values():
            optimiser.zero_grad(set_to_none=True)
        sums: dict[str, torch.Tensor] = {}
        for part in parts[self._processes.process_index :: self._processes.num_processes]:
            loss, told = self._loss(experience, rows[part], weights[part])
            loss.backward()
            for name, value in told.items():
                sums[name] = sums.get(name, torch.zeros(())) + value.detach().float().cpu()
        found = self._shared(sums)
        norms = {name: self._shared_gradients(name) for name in self._optimisers}
        if not all(map(math.isfinite, [*norms.values(), found["policy_loss"]])):
            raise TrainingError(
                f"a loss or gradient is no finite number any more (loss {found['policy_loss']}, norms {norms}); the "
                f"update was not made: lower learning_rate (now {how.learning_rate:g}) or raise kl_coef, elsewhere"
            )
        for name, optimiser in self._optimisers.items():
            for group in optimiser.param_groups:
                group["lr"] = self._rates[name] * rate
            optimiser.step()
        found |= {"grad_norm" if name == "policy" else f"{name}_grad_norm": norm for name, norm in norms.items()}
        return found | {"learning_rate": self._rates["policy"] * rate}

    def _loss(
        self, experience: Experience, rows: np.ndarray, weights: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return this micro-batch's share of the loss of an update, and sums of its metrics by the same weights."""
        how, m = self._how, experience.measured
        kept = m.mask[rows]

        def flat(values: torch.Tensor) -> torch.Tensor:
            return values[rows][kept].to(self._policy.device)

        share, ones = weights[kept].to(self._policy.device), torch.ones(int(kept.sum()), device=self._policy.device)
        inputs = self._inputs([experience.examples[i] for i in rows])
        with self._policy.computing():
            terms = self._terms(self._policy.model, inputs, entropy=bool(how.entropy_coef))
            values = None if experience.returns is None else self._values(inputs, terms.states)
        loss, told = self._policy_loss(terms.logprobs, m, experience, flat, ones)
        if how.importance_cap is not None:
            trust = importance_weights(
                m.old_logprobs, m.engine_logprobs, ~m.engine_logprobs.isnan(), cap=how.importance_cap
            )
            loss = loss * torch.where(flat(m.engine_logprobs).isnan(), ones, flat(trust))
        total = (share * loss).sum()
        found = {"policy_loss": total} | {name: (share * value).sum() for name, value in told.items()}
        if how.entropy_coef:
            bonus = (share * terms.negative_entropy).sum()
            total, found = total + how.entropy_coef * bonus, found | {"update_entropy": -bonus}
        if values is not None:
            assert m.values is not None
            assert experience.returns is not None
            if how.value_clip:
                of_values, told = clipped_value_loss(
                    values, flat(m.values), flat(experience.returns), ones, clip_range=how.value_clip
                )
            else:
                of_values, told = value_loss(values, flat(experience.returns), ones)
            part = (share * of_values).sum()
            total = total + (how.value_coef if self._head is not None else 1.0) * part
            found |= {"value_loss": part} | {name: (share * value).sum() for name, value in told.items()}
        return total, found

    def _policy_loss(
        self,
        logprobs: torch.Tensor,
        measured: Measured,
        experience: Experience,
        flat: Callable[[torch.Tensor], torch.Tensor],
        ones: torch.Tensor,
    ) -> tuple[torch.Tensor, Metrics]:
        how, advantages = self._how, flat(experience.advantages)
        if isinstance(how, Apa):
            anchor = measured.ref_logprobs if how.anchor == "initial" else measured.old_logprobs
            return apa_loss(logprobs, flat(anchor), advantages, ones, kl_coef=self.kl.kl_coef)
        if isinstance(how, Awr):
            return awr_loss(logprobs, advantages, ones, kl_coef=self.kl.kl_coef, max_weight=how.max_weight)
        assert isinstance(how, Ppo)
        return ppo_loss(logprobs, flat(measured.old_logprobs), advantages, ones, clip_range=how.clip_range)

    def _shared(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        """Return sums over all processes; one without a micro-batch takes the names of the first."""
        names = sorted(sums)
        if self._processes.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            names = broadcast_object_list([names])[0]
        total = self._sum(torch.stack([sums.get(name, torch.zeros(())) for name in names]))
        return dict(zip(names, total.tolist(), strict=True))

    def _shared_gradients(self, group: str) -> float:
        """Add the gradients of all processes up, cut them to the largest norm, and return their norm before."""
        parameters = list(self._trained[group].values())
        if self._processes.num_processes > 1:
            for parameter in parameters:
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self._sum(grad)
        return float(torch.nn.utils.clip_grad_norm_(parameters, self._how.max_grad_norm))

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        if self._processes.num_processes == 1:
            return values
        from accelerate.utils import reduce

        return reduce(values.to(self._policy.device), reduction="sum").to(values.device)


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _without_dropout(model: nn.Module) -> None:
    """Turn dropout off: π_θ / π_old must be 1 before the first update."""
    model.eval()
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and "dropout" in name:
                setattr(module, name, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def _recompute_activations(model: Any) -> None:
    """Have activations recomputed in the backward pass; transformers has renamed the method in version 5."""
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        if hasattr(model, f"{name}_enable"):
            getattr(model, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": False}})
            model.train()  # only then; dropout is off
            return


def _rate(how: Online, at: float) -> float:
    """Return the share of the learning rate that holds after a share of the run."""
    if at < how.warmup:
        return at / how.warmup
    rest = (at - how.warmup) / (1 - how.warmup) if how.warmup < 1 else 0.0
    return {"constant": 1.0, "linear": 1 - rest, "cosine": (1 + math.cos(math.pi * rest)) / 2}[how.schedule]
