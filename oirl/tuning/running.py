"""A run of `oirl tune`: sample or read, choose or relabel, learn, validate; again; the best weights are the result."""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from oirl import __version__
from oirl.engines.base import Engine, Sampling, derive_seed
from oirl.errors import ConfigError, DataError
from oirl.language_models import folder_fingerprint, write_trained_prompts
from oirl.tuning.lessons import Chosen, lesson_hash, make_examples
from oirl.tuning.report import TuneReport, compare_validations
from oirl.tuning.reporting import Reporter
from oirl.tuning.rollouts import Rollout, read_rollouts, sample_rollouts
from oirl.tuning.run_folder import LESSON, VALIDATION, RunFolder
from oirl.tuning.settings import Hir, Raft, Sampled, Settings, make_settings
from oirl.tuning.sources import Data, asked_prompt

if TYPE_CHECKING:
    from oirl.tuning.policy import Policy
    from oirl.tuning.validating import Validation

_HELD_OUT_ROLLOUTS = 2000


def tune(
    method: str,
    settings: Mapping[str, Any] | Settings,
    *,
    progress: Callable[[dict[str, Any]], None] = lambda _: None,
) -> TuneReport:
    """Improve a language model by supervised updates; a run that was stopped goes on where it was.

    Args:
        method: "sft", "filter", "raft" or "hir".
        settings: As `oirl.tuning.settings` says.
        progress: Called with each line of metrics.

    Raises:
        UnknownNameError: If there is no such method, reward, checker, engine or relabelling.
        ConfigError: If a setting is not allowed, or the model cannot be loaded.
        DataError: If there is nothing to learn from.
        EngineError: If an engine cannot go on.
        TrainingError: If the loss is not a number any more.
    """
    how = settings if isinstance(settings, Settings) else make_settings(method, settings)
    if how.method != method:
        raise ConfigError(f"the settings are of {how.method}, not of {method}")
    data = Data(how)
    return _Run(how, data, progress).go()


class _Run:
    """One run, from wherever it was stopped."""

    def __init__(self, how: Settings, data: Data, progress: Callable[[dict[str, Any]], None]) -> None:
        from accelerate import PartialState

        self._how, self._data, self._progress = how, data, progress
        self._processes = PartialState(cpu=os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"))
        _check_processes(how, self._processes)
        self._iterations = how.iterations if isinstance(how, Sampled) else 1
        self._trained = list(data.prompts)
        self._asked = asked_prompt(how, self._trained)
        self._prompts = data.method.asked(self._asked)
        main = self._processes.is_main_process
        self._folder = RunFolder(Path(how.out), _identity(how, data), writes=main)
        self._processes.wait_for_everyone()
        self._updates = self._folder.updates_done
        self._failed: Counter[str] = Counter()

    def go(self) -> TuneReport:
        if not self._folder.finished:
            self._reporter = Reporter(self._how.report_to, self._folder.path)
            self._tune()
            self._reporter.close()
        self._folder.finish(lambda _: None)
        return self._report()

    def _tune(self) -> None:
        from oirl.tuning.policy import Policy

        policy = self._policy = Policy(self._how)
        self._encoder = self._make_encoder(policy)
        self._check_texts()
        validation = self._validation(policy)
        done = self._folder.iterations_done
        if done:
            policy.load(self._folder.weights)
        self._folder.go_on(done, self._checkpoint_step(done))
        sampler = self._sampler(policy)
        if not done:
            self._validate(validation, 0, 0)
        for iteration in range(done, self._iterations):
            self._iterate(iteration, policy, validation, sampler)
        self._folder.finish(lambda folder: self._save_result(policy, folder))
        self._processes.wait_for_everyone()

    def _make_encoder(self, policy: Policy) -> Any:
        from oirl.tuning.examples import Encoder

        unfinished = isinstance(self._how, Hir)  # a response without an end says something of its instruction too
        return Encoder(policy, keep_unfinished=unfinished)

    def _check_texts(self) -> None:
        for template in self._prompts.values():
            if self._encoder.context(template, "A?") is None:
                raise ConfigError(f"the prompt {template!r} cannot be filled with a query alone; use {{query}}")
        self._encoder.check_apart(list(self._prompts.values()))

    def _validation(self, policy: Policy) -> Validation:
        from oirl.tuning.validating import Validation

        how, data = self._how, self._data
        rng = np.random.default_rng(derive_seed(how.seed, "validation"))
        queries = [q for q in data.validation if q.answer is not None]
        if len(queries) > how.validation_queries:
            queries = [queries[i] for i in sorted(rng.choice(len(queries), how.validation_queries, replace=False))]
        examples: list[Any] = []
        if data.held_out_rollouts:
            try:
                chosen = data.method.choose(data.held_out_rollouts)[0]
                examples = make_examples(chosen, self._make_encoder(policy), how, rng)[:_HELD_OUT_ROLLOUTS]
            except DataError as e:
                data.warnings.append(f"no loss of held-out responses: {e}")
        sampling = Sampling(how.max_tokens, how.validation_temperature, seed=derive_seed(how.seed, "validation"))
        initial = {"prompt": self._asked}
        return Validation(policy, queries, self._prompts, initial, data.groups, data.checker, sampling, examples)

    def _sampler(self, policy: Policy) -> Engine | None:
        how = self._how
        if not isinstance(how, Sampled) or not how.queries:
            return None
        from oirl.tuning.policy import open_sampler

        return open_sampler(policy, how.engine, how.model, how.engine_params, updated=how.iterations > 1)

    def _checkpoint_step(self, iteration: int) -> int:
        from oirl.tuning.trainer import last_checkpoint

        found = last_checkpoint(self._folder.checkpoints(iteration))
        return int(found.name.rpartition("-")[2]) if found else 0

    def _iterate(self, iteration: int, policy: Policy, validation: Validation, sampler: Engine | None) -> None:
        from oirl.language_models import padding_id
        from oirl.tuning.trainer import Objective, UpdateTrainer, last_checkpoint, steps_of

        how = self._how
        chosen, figures = self._data.chosen or self._drawn(iteration, policy, sampler)
        rng = np.random.default_rng(derive_seed(how.seed, "suboutputs", iteration))
        self._encoder.left_out.clear()
        self._encoder.left_out.update(self._failed)
        examples = make_examples(chosen, self._encoder, how, rng)
        figures = figures | {"examples": len(examples), "left_out": dict(self._encoder.left_out)}
        figures[LESSON] = lesson_hash(examples)
        self._tell("rollouts", iteration, 0, figures)
        objective = Objective()
        if isinstance(how, Hir):
            objective = Objective(how.label_smoothing, how.contrastive, how.contrastive_coef, how.entropy_coef)
        folder = self._folder.checkpoints(iteration)
        trainer = UpdateTrainer(
            policy.model,
            examples,
            objective,
            how,
            folder,
            seed=derive_seed(how.seed, "updates", iteration),
            fill=padding_id(policy.tokenizer),
            start=policy.start,
            limit=policy.limit,
            emit=lambda step, values, speed: self._tell("update", iteration, step, values, tokens_per_s=speed),
            evaluate=lambda step: self._validate(validation, iteration, step),
        )
        checkpoint = last_checkpoint(folder)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        del trainer  # its optimizer would stay in memory while the next responses are drawn
        gc.collect()
        self._updates += steps_of(how, len(examples))
        self._folder.finish_iteration(iteration + 1, self._updates, policy.save)
        self._processes.wait_for_everyone()

    def _drawn(self, iteration: int, policy: Policy, sampler: Engine | None) -> tuple[Chosen, dict[str, Any]]:
        """Return what is chosen of the responses of an iteration, drawing those that are not there yet."""
        how, folder = self._how, self._folder.rollouts(iteration)
        assert isinstance(how, Sampled)
        assert sampler is not None
        name, template = next(iter(self._prompts.items()))
        if iteration and sampler is not None and how.engine != "transformers":
            texts = [self._encoder.context(template, q.query) for q in self._data.queries[:4]]
            policy.send(sampler, [ids for ids in texts if ids])
        seed = derive_seed(how.seed, "rollouts", iteration)
        with policy.computing():
            sample_rollouts(
                sampler,
                self._data.queries,
                (name, template),
                folder,
                Sampling(how.max_tokens, how.temperature, seed=seed, logprobs=True),
                samples=how.samples,
                grade=how.grade,
                share=(self._processes.process_index, self._processes.num_processes),
            )
        self._processes.wait_for_everyone()
        rollouts, self._failed = read_rollouts(folder, how.prompt)
        penalties = None
        if isinstance(how, Raft) and how.kl_coef:
            penalties = how.kl_coef * self._divergence(rollouts, policy)
        return self._data.method.choose(rollouts, penalties)

    def _divergence(self, rollouts: Sequence[Rollout], policy: Policy) -> np.ndarray:
        """Return log π − log π_ref of each response, summed over its tokens (k1), float (n,), in nats."""
        with policy.reference() as engine, policy.computing():
            scored = engine.score([r.prompt_ids or () for r in rollouts], [r.token_ids or () for r in rollouts])
        return np.array([sum(r.logprobs or ()) - sum(row) for r, row in zip(rollouts, scored, strict=True)])

    def _validate(self, validation: Validation, iteration: int, step: int) -> None:
        from oirl.tuning.trainer import TrainingError

        if validation.measures is None:
            return
        measured = validation.measure(initial=not iteration and not step)
        if "loss" in measured and not math.isfinite(measured["loss"]):
            raise TrainingError(f"the loss of held-out responses is {measured['loss']}; lower learning_rate")
        self._tell("validation", iteration, step, measured)
        if self._how.keep == "best" and (iteration or step):
            self._folder.keep_best(iteration, step, validation.value(measured), self._policy.save, measured)

    def _tell(self, kind: str, iteration: int, step: int, values: dict[str, Any], **speed: float) -> None:
        self._folder.tell(kind, iteration, step, values)
        if self._processes.is_main_process:
            self._reporter.tell(self._updates + step, kind, values)
            self._progress({"kind": kind, "iteration": iteration, "step": step, **values, **speed})

    def _save_result(self, policy: Policy, folder: Path) -> None:
        best = self._folder.best()
        if best is not None:
            policy.load(best[0])
        policy.save(folder)
        if best is not None:
            shutil.copy(best[0] / VALIDATION, folder / VALIDATION)
        asked = [text for prompt in self._trained for text in self._data.method.asked(prompt).values()]
        templates = dict.fromkeys([*self._prompts.values(), *asked])
        write_trained_prompts(folder, templates)

    def _report(self) -> TuneReport:
        lines = self._folder.metrics()
        report = TuneReport(self._how.method, self._how.out, str(self._folder.path / "model"), self._prompts)
        hidden = ("kind", "step", LESSON)
        drawn = [row for row in lines if row["kind"] == "rollouts"]
        report.iterations = [{k: v for k, v in row.items() if k not in hidden} for row in drawn]
        for row in report.iterations:
            for reason, count in row["left_out"].items():
                report.left_out[reason] = report.left_out.get(reason, 0) + count
        report.warnings = list(self._data.warnings)
        measured = [row for row in lines if row["kind"] == "validation"]
        if measured:
            file = self._folder.path / "model" / VALIDATION
            kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
            compare_validations(report, measured, kept)
        else:
            report.warnings.append("nothing was validated: name a checker under `grade`, and hold queries out")
        return report


def _identity(how: Settings, data: Data) -> dict[str, Any]:
    import torch
    import transformers

    known = how.model_dump(mode="json", exclude={"out", "report_to"})
    path = Path(how.model)
    return (
        {"method": how.method}
        | known
        | {
            "model_fingerprint": folder_fingerprint(path) if path.is_dir() else None,
            "data_fingerprint": data.fingerprint,
            "versions": {"oirl": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        }
    )


def _check_processes(how: Settings, processes: Any) -> None:
    if how.batch % (how.micro_batch * processes.num_processes):
        raise ConfigError(
            f"batch = {how.batch} is no multiple of micro_batch = {how.micro_batch} on each of "
            f"{processes.num_processes} devices"
        )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise ConfigError(
            "a policy that is sharded over devices (FSDP) is not supported yet: start without it, so that each device "
            "holds the model; adapters (lora_rank) need far less memory"
        )
