"""Runs of online updates: draw, reward, measure, guard, learn, validate; again (apa, ppo, awr)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from oirl.engines.base import Engine
from oirl.engines.parity import THRESHOLDS
from oirl.errors import TrainingError
from oirl.tuning.base_run import TuningRun
from oirl.tuning.guards import (
    FEWEST_QUERIES,
    MOST_ROLLBACKS,
    RAISE_FACTOR,
    ROLLBACK_FACTOR,
    WARNED_DRIFT,
    drifted,
    over_optimised,
    pairs_of,
    too_far,
)
from oirl.tuning.lessons import rollout_figures
from oirl.tuning.online_settings import Apa, Online
from oirl.tuning.refitting import check_refit, refit_reward
from oirl.tuning.run_folder import LESSON
from oirl.tuning.scoring import by_model, cautious, open_reward_model, whole_rewards
from oirl.tuning.sources import Data

_SAMPLES = 2


class OnlineRun(TuningRun):
    """A run of APA, PPO or AWR; see `TuningRun`. If no validation beats the first, the result is the initial model."""

    keeps_initial = True

    def __init__(self, how: Online, data: Data, progress: Callable[[dict[str, Any]], None]) -> None:
        super().__init__(how, data, progress)
        self._how = how
        self._first: dict[str, Any] | None = None
        self._best: dict[str, Any] | None = None
        self._groups: np.ndarray | None = None
        self._rollbacks = self._reward_from = self._best_by = 0
        if how.refit_reward_every:
            check_refit(how, [*data.queries, *data.validation])
        held_to = how.gold_reward or how.reward
        if how.guard_gold and how.reward != "verdict" and how.gold_reward is None:
            data.warnings.append(
                f"nothing says whether {how.reward} is being gamed: name a checker under `grade`, or `gold`"
            )
        elif how.guard_gold and held_to != how.reward and len(set(data.validation_groups)) < FEWEST_QUERIES:
            data.warnings.append(
                f"fewer than {FEWEST_QUERIES} unlike queries are held out: too few to say whether the reward is gamed"
            )
        if how.queries and len(data.queries) < how.rollouts // how.samples:
            data.warnings.append(
                f"there are {len(data.queries)} queries to learn from, so that each iteration has "
                f"{len(data.queries) * how.samples} responses, not {how.rollouts}; raise `samples` for more"
            )
        if isinstance(how, Apa) and how.log:
            data.warnings.append(
                "apa learns online: from a log it is known to do worse than awr (2306.02231, appendix D.3)"
            )

    def _learn(self, sampler: Engine | None) -> None:
        from oirl.tuning.drawing import Drawer
        from oirl.tuning.learner import Learner

        self._learner = Learner(self._how, self._policy, self._processes)
        prompt = next(iter(self._prompts.items()))
        self._drawer = Drawer(
            self._how, self._data, self._policy, self._encoder, prompt, self._folder, self._processes, sampler
        )
        done = self._folder.iterations_done
        resumed = self._folder.weights.is_dir()
        self._processes.wait_for_everyone()
        if resumed:
            self._load_state(self._folder.weights)
        self._folder.go_on(done, 0)
        self._folder.forget_bests(done)
        self._processes.wait_for_everyone()
        for row in self._folder.metrics():
            self._recall(row)
        if not done:
            self._look(self._validate(0, 0))
        for iteration in range(done, self._how.iterations):
            if not self._iterate(iteration, save=not (resumed and iteration == done)):
                break

    def _iterate(self, iteration: int, *, save: bool) -> bool:
        """Do an iteration; False if the run is to end here.

        The state is kept before anything is learned, when the guards have passed it: what a run goes back to is sound.
        """
        import torch

        from oirl.tuning.drawing import Clock
        from oirl.tuning.experience import make_experience, response_mask, token_rewards

        how, learner, clock = self._how, self._learner, Clock()
        self._refit(iteration)
        drawn = self._drawer.draw(iteration, clock)
        ended = [r.finished for r in drawn.rollouts]
        mask = response_mask([len(e.response) for e in drawn.examples])
        moments = learner.moments.joined(torch.from_numpy(whole_rewards(drawn.rewards)))
        rewards = token_rewards(drawn.rewards, ended, mask, how, moments.deviation)
        measured = learner.measure(drawn.examples, [r.logprobs for r in drawn.rollouts])
        queries = {q: i for i, q in enumerate(dict.fromkeys(r.query_id for r in drawn.rollouts))}
        of_query = [queries[r.query_id] for r in drawn.rollouts]
        experience = make_experience(drawn.examples, measured, rewards, of_query, how, learner.kl.kl_coef)
        clock.lap("measure", sum(map(len, drawn.examples)))
        figures = self._figures(drawn, experience, rewards)
        self._tell("rollouts", iteration, 0, figures)
        self._recall({"kind": "rollouts", "iteration": iteration, **figures})
        reason = self._beyond(figures)
        sound = reason is None or how.on_exceed == "raise_kl_coef"  # a higher price is to be paid again by who goes on
        if save and sound and iteration % how.save_every == 0:
            self._folder.finish_iteration(iteration, self._updates, self._save_state)
            self._processes.wait_for_everyone()
        action = self._act(iteration, 0, reason, self._folder.weights) if reason else None
        if action in ("stop", "rollback"):
            return action == "rollback"
        learner.moments = moments  # only now: what is kept above is how this iteration began
        try:
            told = learner.update(experience, iteration)
        except TrainingError as e:
            return self._act(iteration, 1, str(e), self._folder.weights) != "stop"
        clock.lap("update", how.epochs * sum(map(len, drawn.examples)))
        learner.kl.update(figures.get("kl", 0.0), len(drawn.examples))
        step, self._rollbacks = int(told["updates"]), 0
        self._tell("update", iteration, step, told, **clock.told())
        self._folder.tell_times({"iteration": iteration, **clock.told()})
        going_on = self._validated(iteration, step)
        self._updates += step
        return going_on

    def _figures(self, drawn: Any, experience: Any, rewards: Any) -> dict[str, Any]:
        """Return what is told of an iteration's rollouts."""
        from oirl.tuning.experience import experience_figures, experience_hash

        whole = whole_rewards(drawn.rewards)
        figures = rollout_figures(drawn.rollouts)
        figures |= {"reward": float(whole.mean()), "reward_deviation": float(whole.std())}
        figures |= experience_figures(experience, rewards) | {"kl_coef": self._learner.kl.kl_coef}
        if self._how.log:  # what others have drawn tells no KL
            figures["log_ratio"] = figures.pop("kl")
            figures = {name: value for name, value in figures.items() if not name.startswith(("kl_k3", "kl_token"))}
        figures |= {"examples": len(drawn.examples), "left_out": drawn.left_out}
        figures["samples"] = [
            {"query": r.query, "response": r.response, "reward": float(reward), "correct": r.correct}
            for r, reward in zip(drawn.rollouts[:_SAMPLES], whole, strict=False)
        ]
        if notes := self._notes(figures):
            figures["notes"] = notes
        return figures | {LESSON: experience_hash(drawn.examples, rewards)}

    def _notes(self, figures: Mapping[str, Any]) -> dict[str, str]:
        """Return kind -> what is worth a warning in an iteration's figures."""
        found = {}
        drift = drifted(self._first, figures, WARNED_DRIFT) if self._first is not None else None
        if drift is not None:
            found["drift"] = drift
        limit, gap = THRESHOLDS[self._policy.number_type], figures.get("engine_gap")
        if gap is not None and gap > limit:
            found["engine"] = (
                f"the engine's log-probs differ from the trainer's by {gap:.3g} nats on average (up to {limit:g} is "
                "rounding); see `oirl doctor --engine`, and importance_cap"
            )
        return found

    def _refit(self, iteration: int) -> None:
        """Take the reward model that is due at an iteration, fitted to all verdicts so far."""
        due = self._reward_due(iteration)
        if due == self._reward_from:
            return
        folder = self._folder.path / f"reward-{due:03}"
        if not folder.is_dir() and self._processes.is_main_process:
            held_out = {q.query_id for q in self._data.validation}
            refit_reward(self._how, [self._folder.rollouts(i) for i in range(due)], held_out, folder)
        self._processes.wait_for_everyone()
        self._take_reward(open_reward_model(folder), due)

    def _take_reward(self, model: Any, due: int) -> None:
        self._data.scorer = by_model(model)
        if self._how.gold == "spread":
            self._data.gold = cautious(model)
        self._reward_from = due

    def _reward_due(self, iteration: int) -> int:
        """Return the iteration at which the reward model was fitted that an iteration uses; 0 for the first one."""
        every = self._how.refit_reward_every
        return iteration // every * every if every else 0

    @property
    def _keeps_bests(self) -> bool:
        return super()._keeps_bests or (self._how.guard_gold and self._how.on_exceed == "rollback")

    def _beyond(self, figures: Mapping[str, Any]) -> str | None:
        how = self._how
        reason = too_far(figures.get("kl", 0.0), how.max_kl)
        if reason is None and how.max_drift is not None and self._first is not None:
            reason = drifted(self._first, figures, how.max_drift)
        return reason

    def _validated(self, iteration: int, step: int) -> bool:
        """Validate where it is time, and see whether the reward is being gamed; False if the run is to end."""
        how = self._how
        if (iteration + 1) % how.evaluate_every and iteration + 1 < how.iterations:
            return True
        self._validation.labels = {"reward_model": self._reward_from} if how.refit_reward_every else {}
        measured = self._validate(iteration, step)
        if measured is None:
            return True
        measured = measured | {"iteration": iteration}
        reason = self._gamed(measured) if how.guard_gold else None
        if reason is None:
            self._look(measured)
            return True
        best = self._folder.best()
        return self._act(iteration, step, reason, self._folder.weights if best is None else best[0]) != "stop"

    def _gamed(self, measured: Mapping[str, Any]) -> str | None:
        if self._best is None or self._groups is None:
            return None
        then, now = (_rewards_and_gold(row) for row in (self._best, measured))
        if then is None or now is None:
            return None
        how = self._how
        same_model = self._best_by == self._reward_from
        looks = pairs_of(how.iterations // how.evaluate_every + 2)
        return over_optimised(then[0] if same_model else None, now[0], then[1], now[1], self._groups, comparisons=looks)

    def _look(self, measured: Mapping[str, Any] | None) -> None:
        """Remember the best validation so far."""
        if measured is None:
            return
        if "groups" in measured:
            self._groups = np.array(measured["groups"])
        value = self._validation.value(measured)
        if not math.isnan(value) and (self._best is None or value > self._validation.value(self._best)):
            self._best, self._best_by = dict(measured), self._reward_due(int(measured.get("iteration", 0)))

    def _act(self, iteration: int, step: int, reason: str, back_to: Path) -> str:
        """Do what is to be done beyond a limit, and tell of it; return what was done."""
        action, kl = str(self._how.on_exceed), self._learner.kl
        if action == "rollback" and self._rollbacks >= MOST_ROLLBACKS:
            action, reason = "stop", f"{reason}; going back {MOST_ROLLBACKS} times did not help"
        elif action == "rollback" and iteration + 1 == self._how.iterations:
            action = "stop"  # there is nothing left to do better
        coefficient = kl.kl_coef
        if action == "rollback":
            self._load_state(back_to)
            self._rollbacks += 1
            kl.kl_coef = coefficient * ROLLBACK_FACTOR
        elif action == "raise_kl_coef":
            kl.kl_coef = coefficient * RAISE_FACTOR
        self._tell("guard", iteration, step, {"reason": reason, "action": action, "kl_coef": kl.kl_coef})
        return action

    def _recall(self, row: Mapping[str, Any]) -> None:
        """Take in what has been told, by an earlier process or by this one."""
        if row["kind"] == "rollouts" and row["iteration"] == 0:
            self._first = {name: row[name] for name in ("tokens_mean", "distinct_2")}
        elif row["kind"] == "validation":
            self._look(row)
        elif row["kind"] == "update":
            self._rollbacks = 0
        elif row["kind"] == "guard":
            self._rollbacks += row["action"] == "rollback"

    def _save_state(self, folder: Path) -> None:
        super()._save_state(folder)
        self._learner.save(folder)

    def _load_state(self, folder: Path) -> None:
        self._policy.load(folder)
        self._learner.load(folder)


def _rewards_and_gold(row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the reward that is trained for and gold of each held-out query; None where they are one and the same."""
    by_query = row.get("by_query", {})
    reward, gold = (by_query.get(name, row.get("right")) for name in ("reward", "gold"))
    if not by_query or reward is None or gold is None:
        return None
    return np.array(reward, dtype=np.float64), np.array(gold, dtype=np.float64)
