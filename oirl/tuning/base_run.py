"""What all runs of `oirl tune` do: open the model and the folder, validate, keep the best weights, tell and report."""

from __future__ import annotations

import json
import math
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from oirl import __version__
from oirl.engines.base import Engine, Sampling, derive_seed
from oirl.engines.runs import check_prompt
from oirl.errors import ConfigError, DataError, TrainingError, require
from oirl.language_models import folder_fingerprint, write_trained_prompts
from oirl.logs.rendering import split_at_query
from oirl.tuning.lessons import make_examples
from oirl.tuning.online_settings import Online
from oirl.tuning.report import TuneReport, compare_validations
from oirl.tuning.reporting import Reporter
from oirl.tuning.run_folder import GIVEN, LESSON, VALIDATION, RunFolder
from oirl.tuning.settings import Hir, Sampled, Settings
from oirl.tuning.sources import Data, asked_prompt

if TYPE_CHECKING:
    from oirl.tuning.policy import Policy
    from oirl.tuning.validating import Validation

Decision = TypeVar("Decision")
_HELD_OUT_ROLLOUTS = 2000
SHARED = "transformers"  # the engine that shares the policy's weights
_NO_FOLDERS = ("", "verdict", "score", "spread")


class TuningRun(ABC):
    """One run, from wherever it was stopped; a subclass says what an iteration is.

    Args:
        how: What the run is told.
        data: What it learns from.
        progress: Called with each line of metrics.
    """

    keeps_initial = False
    """Whether the initial model is the result if nothing is better."""

    def __init__(self, how: Settings, data: Data, progress: Callable[[dict[str, Any]], None]) -> None:
        from accelerate import PartialState

        self._data, self._progress = data, progress
        self._general = how
        self._processes = PartialState(cpu=os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"))
        _check_processes(how, self._processes)
        self._iterations = how.iterations if isinstance(how, Sampled) else 1
        self._trained = list(data.prompts)
        self._asked = asked_prompt(how, self._trained)
        self._prompts = data.method.asked(self._asked)
        self._given: dict[str, None] = {}
        for name, template in self._prompts.items():
            if how.queries:
                check_prompt(name, template)
            elif split_at_query(template) is None:
                raise ConfigError(f"the prompt {template!r} cannot be filled with a query alone; use {{query}}")
        main = self._processes.is_main_process
        self._folder = RunFolder(Path(how.out), _identity(how, data), writes=main)
        self._updates = 0

    def go(self) -> TuneReport:
        """Tune, unless the result is there already, and report."""
        with self._folder.writing():
            self._processes.wait_for_everyone()
            self._updates = self._folder.updates_done
            if not self._folder.finished:
                self._reporter = Reporter(self._general.report_to, self._folder.path)
                self._tune()
                self._reporter.close()
            self._folder.finish(lambda _: None)
            return self._report()

    def _tune(self) -> None:
        from oirl.tuning.policy import Policy

        policy = self._policy = Policy(self._general)
        self._encoder = self._make_encoder(policy)
        self._check_texts()
        self._prepare()
        self._validation = self._make_validation(policy)
        sampler = self._sampler(policy)
        try:
            self._learn(sampler)
        finally:
            if sampler is not None and sampler.name != SHARED:
                sampler.close()
        self._folder.finish(self._save_result)
        self._processes.wait_for_everyone()

    def _prepare(self) -> None:  # noqa: B027  (what is drawn anew cannot be known before)
        """Refuse what cannot be learned from, as far as it is known before anything is drawn."""

    def _settle(self, figures: Mapping[str, Any]) -> None:
        """Take in under which templates an iteration learns, and ask for nothing else from now on."""
        if GIVEN not in figures:
            return
        self._given = dict.fromkeys([*self._given, *figures[GIVEN]])
        named = "prompt" in self._general.model_fields_set
        prompts = [self._asked] if named else list(dict.fromkeys([self._asked, *self._trained]))
        self._asked, self._prompts = self._data.method.learned(prompts, self._given)

    @abstractmethod
    def _learn(self, sampler: Engine | None) -> None:
        """Go through the iterations that are not done."""

    def _make_encoder(self, policy: Policy) -> Any:
        from oirl.tuning.examples import Encoder

        unfinished = isinstance(self._general, Hir)  # a response without an end says something of its instruction too
        return Encoder(policy, keep_unfinished=unfinished)

    def _check_texts(self) -> None:
        self._encoder.check_apart(list(self._prompts.values()))

    def _make_validation(self, policy: Policy) -> Validation:
        from oirl.tuning.validating import Validation

        how, data = self._general, self._data
        rng = np.random.default_rng(derive_seed(how.seed, "validation"))
        answered = [q for q in data.validation if q.answer is not None]
        checker = data.checker if answered else None
        queries = answered if checker is not None or not data.validation_rewards else data.validation
        if len(queries) > how.validation_queries:
            queries = [queries[i] for i in sorted(rng.choice(len(queries), how.validation_queries, replace=False))]
        examples: list[Any] = []
        if data.held_out_rollouts and not isinstance(how, Online):  # there, likelihood tells nothing of what is better
            try:
                chosen = data.method.choose(data.held_out_rollouts)[0]
                examples = make_examples(chosen, self._make_encoder(policy), how, rng)[0][:_HELD_OUT_ROLLOUTS]
            except DataError as e:
                data.warnings.append(f"no loss of held-out responses: {e}")
        sampling = Sampling(how.max_tokens, how.validation_temperature, seed=derive_seed(how.seed, "validation"))
        initial = {"prompt": self._asked}
        return Validation(
            policy,
            queries,
            self._prompts,
            initial,
            data.groups,
            checker,
            sampling,
            examples,
            rewards=data.validation_rewards,
        )

    def _sampler(self, policy: Policy) -> Engine | None:
        how = self._general
        if not isinstance(how, Sampled) or not how.queries:
            return None
        from oirl.tuning.policy import open_sampler

        mode = "processed" if isinstance(how, Online) and how.temperature != 1 else None
        params, updated = how.engine_params, how.iterations > 1
        return open_sampler(policy, how.engine, how.model, params, updated=updated, logprobs_mode=mode)

    def _save_state(self, folder: Path) -> None:
        """Write all that going on from here needs, the policy among it."""
        self._policy.save(folder)

    def _validate(self, iteration: int, step: int) -> dict[str, Any] | None:
        """Measure the policy and keep it if it is the best so far; None if there is nothing to measure."""
        if self._validation.measures is None:
            return None
        measured = self._decided(lambda: self._validation.measure(initial=not iteration and not step))
        if "loss" in measured and not math.isfinite(measured["loss"]):
            raise TrainingError(f"the loss of held-out responses is {measured['loss']}; lower learning_rate")
        self._tell("validation", iteration, step, measured)
        if self._keeps_bests and (iteration or step or self.keeps_initial):
            self._folder.keep_best(iteration, step, self._validation.value(measured), self._save_state, measured)
        return measured

    @property
    def _keeps_bests(self) -> bool:
        """Whether the best weights so far are kept, be it to go back to them."""
        return self._general.keep == "best"

    def _decided(self, decide: Callable[[], Decision]) -> Decision:
        """Return what the process that writes comes to, on all of them: what they do next must not differ."""
        if self._processes.num_processes == 1:
            return decide()
        from accelerate.utils import broadcast_object_list

        found = [decide() if self._processes.is_main_process else None]
        return broadcast_object_list(found)[0]

    def _tell(self, kind: str, iteration: int, step: int, values: dict[str, Any], **speed: float) -> None:
        self._folder.tell(kind, iteration, step, values)
        if self._processes.is_main_process:
            self._reporter.tell(self._updates + step, kind, values | speed)
            self._progress({"kind": kind, "iteration": iteration, "step": step, **values, **speed})

    def _save_result(self, folder: Path) -> None:
        policy, best = self._policy, self._folder.best() if self._general.keep == "best" else None
        if best is not None:
            policy.load(best[0])
        policy.save(folder)
        if best is not None:
            shutil.copy(best[0] / VALIDATION, folder / VALIDATION)
        asked = [text for prompt in self._trained for text in self._data.method.asked(prompt).values()]
        templates = dict.fromkeys([*self._prompts.values(), *asked])
        if self._given:
            templates = dict.fromkeys(text for text in templates if text in self._given)
        write_trained_prompts(folder, templates)

    def _report(self) -> TuneReport:
        how, lines = self._general, self._folder.metrics()
        self._given = {}
        for row in lines:
            self._settle(row)
        report = TuneReport(how.method, how.out, str(self._folder.path / "model"), self._prompts)
        hidden = ("kind", "step", LESSON, GIVEN, "samples", "notes")
        drawn = [row for row in lines if row["kind"] == "rollouts"]
        report.iterations = [{k: v for k, v in row.items() if k not in hidden} for row in drawn]
        for row in report.iterations:
            for reason, count in row["left_out"].items():
                report.left_out[reason] = report.left_out.get(reason, 0) + count
        report.guards = [
            {k: v for k, v in row.items() if k not in ("kind", "step")} for row in lines if row["kind"] == "guard"
        ]
        report.warnings = list(self._data.warnings)
        wanted = next(iter(self._data.method.asked(self._asked).values()))
        if wanted not in self._prompts.values():
            report.warnings.append(
                f"no response follows {wanted!r}, so nothing was learned under it: ask for "
                f"{next(iter(self._prompts.values()))!r}, the highest that was given"
            )
        noted: dict[str, str] = {}
        for row in drawn:
            for kind, text in row.get("notes", {}).items():
                noted.setdefault(kind, f"from iteration {row['iteration']} on: {text}")
        report.warnings += noted.values()
        measured = [row for row in lines if row["kind"] == "validation"]
        if measured:
            file = self._folder.path / "model" / VALIDATION
            kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
            compare_validations(report, measured, kept)
        else:
            report.warnings.append("nothing was validated: name a checker under `grade`, and hold queries out")
        return report


def _identity(how: Settings, data: Data) -> dict[str, Any]:
    import accelerate
    import torch
    import transformers

    versions = {"oirl": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    versions["accelerate"] = accelerate.__version__
    if how.lora_rank:
        require("peft", "tune", "lora_rank above 0")
        versions["peft"] = version("peft")
    prints = {"model_fingerprint": _fingerprint(how.model), "data_fingerprint": data.fingerprint}
    if isinstance(how, Sampled):
        prints["reward_fingerprint"] = _fingerprint(how.reward)
    if isinstance(how, Online):
        prints["gold_fingerprint"] = _fingerprint(how.gold or "")
    known = how.model_dump(mode="json", exclude={"out", "report_to"})
    return {"method": how.method} | known | prints | {"versions": versions}


def _fingerprint(name: str) -> str | None:
    """Return the hash of a model's folder; None of anything else."""
    return folder_fingerprint(name) if name not in _NO_FOLDERS and Path(name).is_dir() else None


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
