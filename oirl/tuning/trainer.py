"""The one trainer of supervised updates: transformers' Trainer with our losses, our batches and exact resume."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from oirl.errors import TrainingError
from oirl.tuning.examples import Example, batches_of
from oirl.tuning.heads import head_is_all, token_terms
from oirl.tuning.losses import contrastive_loss, sequence_logprobs
from oirl.tuning.settings import SupervisedUpdates

# It remarks on the clocks of file systems, each time that a checkpoint is written.
logging.getLogger("transformers.trainer_utils").setLevel(logging.ERROR)
IGNORED = -100
_WHOLE = ".whole"


class Objective(NamedTuple):
    """L = L_supervised + α · L_contrastive + β · L_entropy (2302.05206, section 4.3); α = β = 0 is behaviour cloning.

    The supervised loss and the entropy are means over the tokens of an update, the contrastive loss over its rows.

    Attributes:
        label_smoothing: ε of the supervised loss.
        contrastive: "none", "opposite" or "batch", see `oirl.tuning.settings.Hir`.
        contrastive_coef: α.
        entropy_coef: β.
    """

    label_smoothing: float = 0.0
    contrastive: str = "none"
    contrastive_coef: float = 0.0
    entropy_coef: float = 0.0


class Sums(NamedTuple):
    """Sums of the parts of a loss over a micro-batch, each a tensor ().

    `tokens` and `rows` are what they run over; `read` are the tokens that the model has read, padding aside.
    """

    supervised: torch.Tensor
    contrastive: torch.Tensor
    negative_entropy: torch.Tensor
    tokens: torch.Tensor
    rows: torch.Tensor
    read: torch.Tensor


def collate(
    examples: Sequence[Example], fill: int, contrastive: str, start: int | None = None, limit: int | None = None
) -> dict[str, Any]:
    """Return a micro-batch, padded on the right.

    Returns:
        `input_ids` (r, t): the n examples, then, for a contrastive loss, each output under the contexts that it is held
        against. `row`, `column` and `target` (m,): where a token is predicted, and which; those of the examples come
        first, `own` of them. `first`: the least column. `read`: tokens that are no padding; `size`: all. `labels` (n,
        t): targets of the examples, from which the Trainer counts the tokens of an update. `output` and `candidate`
        (r,): the example whose output a row holds, and the place of its context among the `candidates` held against
        each other. With `start`, the token that responses start after in the decoder of an encoder-decoder model,
        `input_ids` are the contexts, with their `attention_mask`, and `decoder_input_ids` the responses behind that
        token. Of a batch, an output is held neither against a context that is equal to its own nor against one with
        which it has more than `limit` tokens.
    """
    rows = [(e.context, e, i, i if contrastive == "batch" else 0) for i, e in enumerate(examples)]
    if contrastive == "opposite":
        rows += [(c, e, i, k) for i, e in enumerate(examples) for k, c in enumerate(e.others, 1)]
    elif contrastive == "batch":
        rows += [
            (o.context, e, i, k)
            for i, e in enumerate(examples)
            for k, o in enumerate(examples)
            if k != i
            and o.context != e.context
            and (limit is None or start is not None or len(o.context) + len(e.response) <= limit)
        ]
    before = [context if start is None else [start] for context, _, _, _ in rows]
    ids = _padded([[*head, *e.response] for head, (_, e, _, _) in zip(before, rows, strict=True)], fill)
    labels = torch.full((len(examples), ids.shape[1]), IGNORED, dtype=torch.long)
    places: list[torch.Tensor] = []
    for r, (head, (_, example, _, _)) in enumerate(zip(before, rows, strict=True)):
        first, end = len(head) + example.given, len(head) + len(example.response)
        if r < len(examples):
            labels[r, first:end] = ids[r, first:end]
        places.append(torch.stack([torch.full((end - first,), r), torch.arange(first - 1, end - 1)]))
    row, column = torch.cat(places, dim=1)
    given = {"input_ids": ids}
    if start is not None:
        sources = [context for context, _, _, _ in rows]
        mask = _padded([[1] * len(context) for context in sources], 0)
        given = {"input_ids": _padded(sources, fill), "attention_mask": mask, "decoder_input_ids": ids}
    return {
        **given,
        "labels": labels,
        "row": row,
        "column": column,
        "target": ids[row, column + 1],
        "output": torch.tensor([i for _, _, i, _ in rows]),
        "candidate": torch.tensor([k for _, _, _, k in rows]),
        "first": int(column.min()),
        "own": sum(len(e.response) - e.given for e in examples),
        "candidates": max(k for _, _, _, k in rows) + 1,
        "size": sum(given[name].numel() for name in ("input_ids", "decoder_input_ids") if name in given)
        - (0 if start is None else len(rows)),
        "read": sum(len(context) + len(e.response) for context, e, _, _ in rows),
    }


def _padded(rows: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])


def loss_sums(model: Any, inputs: Mapping[str, Any], objective: Objective, *, whole_logits: bool = False) -> Sums:
    """Return the parts of the loss of a micro-batch by one forward pass.

    Args:
        model: The policy, as it is trained: wrapped for several devices or not.
        inputs: Of `collate`.
        objective: The loss.
        whole_logits: Whether the model does more with its logits than its head says (`heads.head_is_all`).
    """
    ids, own, n = inputs["input_ids"], inputs["own"], len(inputs["labels"])
    terms = token_terms(model, inputs, objective.label_smoothing, bool(objective.entropy_coef), whole=whole_logits)
    contrast = torch.zeros((), device=ids.device)
    if objective.contrastive != "none":
        logprobs = sequence_logprobs(terms.logprobs, inputs["row"], len(ids))
        table = torch.full((n, inputs["candidates"]), -math.inf, device=ids.device)
        table = table.index_put((inputs["output"], inputs["candidate"]), logprobs)
        contrast = contrastive_loss(table, inputs["candidate"][:n])
    counts = [torch.tensor(float(count), device=ids.device) for count in (own, n, inputs["read"])]
    return Sums(terms.supervised[:own].sum(), contrast, terms.negative_entropy[:own].sum(), *counts)


class _Batches:
    """This process's micro-batches, in order."""

    def __init__(self, batches: list[list[int]]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)


class UpdateTrainer(Trainer):
    """transformers' Trainer for one iteration of supervised updates.

    Args:
        model: The language model, with adapters or without.
        examples: What to learn from.
        objective: The loss.
        settings: How to train.
        folder: For checkpoints.
        seed: For the order and for dropout.
        fill: Id to pad with.
        start: See `collate`.
        limit: See `collate`.
        emit: Called with (updates of this iteration, metrics, tokens a second) every `log_every` updates.
        evaluate: Called with the updates of this iteration at `evaluate_every`, or at the ends of epochs.
    """

    def __init__(
        self,
        model: Any,
        examples: Sequence[Example],
        objective: Objective,
        settings: SupervisedUpdates,
        folder: Path,
        *,
        seed: int,
        fill: int,
        start: int | None = None,
        limit: int | None = None,
        emit: Callable[[int, dict[str, float], float], None],
        evaluate: Callable[[int], Any],
    ) -> None:
        self._examples, self._objective, self._settings = examples, objective, settings
        self._fill, self._start, self._limit, self._rows = fill, start, limit, 0.0
        self._emit, self._seed, self._since = emit, seed, time.perf_counter()
        self._whole_logits = not head_is_all(model)
        arguments = _arguments(settings, folder, seed, len(examples))
        super().__init__(model, arguments, callbacks=[_Callback(settings, len(examples), evaluate)])
        self._totals = torch.zeros(len(Sums._fields) + 1, dtype=torch.float64, device=self.args.device)
        self.model_accepts_loss_kwargs = True  # our loss is divided by the tokens of the whole update
        self._loss_shifts_labels = True

    def get_train_dataloader(self) -> DataLoader:
        """Return this process's micro-batches of all epochs, in the order that the seed gives."""
        how = self._settings
        epochs = epochs_of(how, len(self._examples))
        lengths, devices = [len(e) for e in self._examples], self.args.world_size
        order = batches_of(lengths, how.batch, how.micro_batch, epochs, self._seed, devices)
        order = order[: steps_of(how, len(self._examples)) * how.batch // how.micro_batch]
        return DataLoader(
            self._examples,
            batch_sampler=_Batches(order[self.args.process_index :: devices]),
            collate_fn=lambda rows: collate(rows, self._fill, self._objective.contrastive, self._start, self._limit),
            pin_memory=torch.cuda.is_available(),
        )

    def get_batch_samples(self, *arguments: Any, **named: Any) -> Any:
        """Return the micro-batches of an update, and count its rows on all devices."""
        found = super().get_batch_samples(*arguments, **named)
        rows = torch.tensor(float(sum(len(batch["labels"]) for batch in found[0])), device=self.args.device)
        self._rows = float(self.accelerator.reduce(rows, reduction="sum"))
        return found

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Return this micro-batch's share of the loss of an update."""
        sums = loss_sums(model, inputs, self._objective, whole_logits=self._whole_logits)
        size = torch.tensor(float(inputs["size"]), device=self._totals.device)  # of padded rows: no sum of a loss
        self._totals += torch.stack([value.detach().double() for value in (*sums, size)])
        per_token = sums.supervised + self._objective.entropy_coef * sums.negative_entropy
        loss = per_token / num_items_in_batch
        # Each process takes its own share; gradients are averaged over processes.
        loss = loss * self.accelerator.num_processes
        if self._objective.contrastive != "none":
            rows = self._rows / self.accelerator.num_processes
            loss = loss + self._objective.contrastive_coef * sums.contrastive / rows
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Emit the means since the last time instead of writing what the Trainer would."""
        if "loss" not in logs:
            return
        *sums, size = self.accelerator.reduce(self._totals).cpu()
        totals = Sums(*sums)
        self._totals.zero_()
        found = {"loss": float(logs["loss"]), "learning_rate": float(logs["learning_rate"])}
        found |= {"grad_norm": float(logs["grad_norm"]), "supervised": float(totals.supervised / totals.tokens)}
        if self._objective.contrastive != "none":
            found["contrastive"] = float(totals.contrastive / totals.rows)
        if self._objective.entropy_coef:
            found["entropy"] = float(-totals.negative_entropy / totals.tokens)
        found["padding"] = float(1 - totals.read / size)
        if not math.isfinite(found["loss"]):
            raise TrainingError(
                f"the loss is {found['loss']} after {self.state.global_step} updates; lower learning_rate (now "
                f"{self._settings.learning_rate:g}), and go on from an earlier run's model"
            )
        now = time.perf_counter()
        speed, self._since = float(totals.read) / max(now - self._since, 1e-9), now
        self._emit(self.state.global_step, found, speed)


class _Callback(TrainerCallback):
    """Validates at the right updates, and marks checkpoints that are whole."""

    def __init__(self, settings: SupervisedUpdates, n: int, evaluate: Callable[[int], Any]) -> None:
        self._evaluate = evaluate
        total = steps_of(settings, n)
        every = settings.evaluate_every
        epochs = 1 if settings.updates else settings.epochs
        ends = {round(total * (e + 1) / epochs) for e in range(epochs)}
        self._total = total
        self._at = (set(range(every, total + 1, every)) if every else ends) | {total}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in self._at:
            self._evaluate(state.global_step)
        if state.global_step == self._total:
            control.should_log = True  # so that a loss that is no number is never left unseen

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / _WHOLE).touch()


def steps_of(settings: SupervisedUpdates, n: int) -> int:
    """Return the updates of an iteration that learns from n examples."""
    return settings.updates or math.ceil(n * settings.epochs / settings.batch)


def epochs_of(settings: SupervisedUpdates, n: int) -> int:
    """Return the passes that an iteration makes over n examples, the last of which may be broken off."""
    return math.ceil(settings.updates * settings.batch / n) if settings.updates else settings.epochs


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint that was written to its end, and remove those that were not."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    whole = [path for path in found if (path / _WHOLE).is_file()]
    for path in set(found) - set(whole):
        shutil.rmtree(path, ignore_errors=True)  # several processes may do so
    return whole[-1] if whole else None


def _arguments(settings: SupervisedUpdates, folder: Path, seed: int, n: int) -> TrainingArguments:
    import os

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    halved = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    names = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
    made = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,  # our batches hold all epochs
        per_device_train_batch_size=settings.micro_batch,
        gradient_accumulation_steps=settings.batch // (settings.micro_batch * processes),
        learning_rate=settings.learning_rate,
        lr_scheduler_type=names[settings.schedule],
        warmup_steps=int(settings.warmup * steps_of(settings, n)),  # of one update all would be lost, as it begins at 0
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=halved if settings.bf16 is None else settings.bf16,
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=settings.save_every,
        save_total_limit=2,
        seed=seed,
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        **_checkpointing(settings),
    )
    made._n_gpu = min(made.n_gpu, 1)  # several devices by `accelerate launch`, not by threads of one process
    return made


def _checkpointing(settings: SupervisedUpdates) -> dict[str, Any]:
    """Return the arguments that have activations recomputed; transformers has renamed them in version 5."""
    if not settings.gradient_checkpointing:
        return {}
    known = TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}
