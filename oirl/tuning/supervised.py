"""Runs of supervised updates: sample or read, choose or relabel, learn, validate; again."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from oirl.engines.base import Engine, Sampling, derive_seed
from oirl.tuning.base_run import TuningRun
from oirl.tuning.examples import Example
from oirl.tuning.lessons import Chosen, NothingToLearnError, lesson_hash, make_examples
from oirl.tuning.report import TuneReport
from oirl.tuning.rollouts import Rollout, read_rollouts, sample_rollouts
from oirl.tuning.run_folder import GIVEN, LESSON
from oirl.tuning.settings import Hir, Raft, Sampled, SupervisedUpdates
from oirl.tuning.sources import Data


class SupervisedRun(TuningRun):
    """A run of sft, filter, RAFT or HIR; see `TuningRun`."""

    def __init__(self, how: SupervisedUpdates, data: Data, progress: Callable[[dict[str, Any]], None]) -> None:
        super().__init__(how, data, progress)
        self._how = how
        self._failed: Counter[str] = Counter()
        self._lesson: tuple[list[Example], dict[str, Any]] | None = None

    def _prepare(self) -> None:
        if self._data.chosen:
            self._lesson = self._make_lesson(0, *self._data.chosen)

    def _learn(self, sampler: Engine | None) -> None:
        done = self._folder.iterations_done
        if done:
            self._policy.load(self._folder.weights)
        self._folder.go_on(done, self._checkpoint_step(done))
        for row in self._folder.told:
            if row["iteration"] < done:
                self._settle(row)
        if not done:
            self._validate(0, 0)
        for iteration in range(done, self._iterations):
            if not self._iterate(iteration, sampler):
                break

    def _checkpoint_step(self, iteration: int) -> int:
        from oirl.tuning.trainer import last_checkpoint

        found = last_checkpoint(self._folder.checkpoints(iteration))
        return int(found.name.rpartition("-")[2]) if found else 0

    def _iterate(self, iteration: int, sampler: Engine | None) -> bool:
        """Do an iteration; False if there is nothing to learn from in it, which ends the run."""
        from oirl.language_models import padding_id
        from oirl.tuning.trainer import Objective, UpdateTrainer, last_checkpoint, steps_of

        how, policy = self._how, self._policy
        try:
            examples, figures = self._lesson or self._make_lesson(iteration, *self._drawn(iteration, sampler))
        except NothingToLearnError as e:
            if not iteration:
                raise
            self._tell("guard", iteration, 0, {"reason": str(e), "action": "stop"})
            return False
        self._validation.ask(self._prompts)
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
            evaluate=lambda step: self._validate(iteration, step),
        )
        checkpoint = last_checkpoint(folder)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        del trainer  # its optimizer would stay in memory while the next responses are drawn
        gc.collect()
        self._updates += steps_of(how, len(examples))
        self._folder.finish_iteration(iteration + 1, self._updates, self._save_state)
        self._processes.wait_for_everyone()
        return True

    def _make_lesson(
        self, iteration: int, chosen: Chosen, figures: dict[str, Any]
    ) -> tuple[list[Example], dict[str, Any]]:
        """Return the examples of an iteration, and its figures with what became of the responses."""
        rng = np.random.default_rng(derive_seed(self._how.seed, "suboutputs", iteration))
        self._encoder.left_out.clear()
        self._encoder.left_out.update(self._failed)
        examples, given = make_examples(chosen, self._encoder, self._how, rng)
        figures = figures | {"examples": len(examples), "left_out": dict(self._encoder.left_out), GIVEN: dict(given)}
        self._settle(figures)
        return examples, figures | {LESSON: lesson_hash(examples)}

    def _report(self) -> TuneReport:
        report = super()._report()
        for row in report.guards:
            done = f"the run ended after {row['iteration']} of {self._iterations} iterations"
            report.warnings.append(f"{done}: {row['reason']}")
        return report

    def _drawn(self, iteration: int, sampler: Engine | None) -> tuple[Chosen, dict[str, Any]]:
        """Return what is chosen of the responses of an iteration, drawing those that are not there yet."""
        how, policy, folder = self._how, self._policy, self._folder.rollouts(iteration)
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
            penalties = how.kl_coef * self._divergence(rollouts)
        return self._data.method.choose(rollouts, penalties)

    def _divergence(self, rollouts: Sequence[Rollout]) -> np.ndarray:
        """Return log π − log π_ref of each response, summed over its tokens (k1), float (n,), in nats."""
        with self._policy.reference() as engine, self._policy.computing():
            scored = engine.score([r.prompt_ids or () for r in rollouts], [r.token_ids or () for r in rollouts])
        return np.array([sum(r.logprobs or ()) - sum(row) for r, row in zip(rollouts, scored, strict=True)])
