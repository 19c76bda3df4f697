"""The responses of each iteration of online updates: drawn by an engine, or the next part of a log; with rewards."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from oirl.engines.base import Engine, Sampling, derive_seed
from oirl.engines.collecting import RUN
from oirl.errors import ConfigError, DataError
from oirl.logs.atomic import atomic_file
from oirl.logs.store import LogWriter, log_metadata, read_log
from oirl.tuning.advantages import BASELINES
from oirl.tuning.base_run import SHARED
from oirl.tuning.examples import Encoder, Example
from oirl.tuning.online_settings import Online
from oirl.tuning.policy import Policy
from oirl.tuning.rollouts import Rollout, read_rollouts, sample_rollouts
from oirl.tuning.run_folder import RunFolder
from oirl.tuning.scoring import whole_rewards
from oirl.tuning.sources import Data

_PART = 64  # responses that are drawn, and kept, together


@dataclass(frozen=True, slots=True)
class Drawn:
    """What an iteration learns from, before it is measured.

    Attributes:
        rollouts: Responses with a reward, length n.
        examples: Their tokens, as they were drawn.
        rewards: Float (n,), or objects with the rewards of tokens.
        left_out: Reason -> responses that nothing is learned from.
    """

    rollouts: list[Rollout]
    examples: list[Example]
    rewards: np.ndarray
    left_out: dict[str, int]


class Clock:
    """Seconds and tokens of the phases of an iteration."""

    def __init__(self) -> None:
        self._at = time.perf_counter()
        self._seconds: dict[str, float] = {}
        self._tokens: dict[str, int] = {}

    def lap(self, phase: str, tokens: int = 0) -> None:
        """End a phase that took in, or gave, some tokens."""
        now = time.perf_counter()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._at
        self._tokens[phase] = self._tokens.get(phase, 0) + tokens
        self._at = now

    def told(self) -> dict[str, float]:
        """Return `seconds_PHASE`, `tokens_per_s_PHASE`, and `tokens_per_s`: tokens drawn over the whole time."""
        found = {f"seconds_{phase}": seconds for phase, seconds in self._seconds.items()}
        found |= {f"tokens_per_s_{p}": n / max(self._seconds[p], 1e-9) for p, n in self._tokens.items() if n}
        return found | {"tokens_per_s": self._tokens.get("rollout", 0) / max(sum(self._seconds.values()), 1e-9)}


class Drawer:
    """Gives each iteration its responses.

    Args:
        how: What the run is told.
        data: Queries or logged responses, and the reward.
        policy: What is trained, and sent to an engine that has weights of its own.
        encoder: Turns responses into tokens.
        prompt: Name and template under which queries are asked.
        folder: Where rollouts are kept.
        processes: accelerate's view of the processes.
        sampler: The engine; None where a log is learned from.
    """

    def __init__(
        self,
        how: Online,
        data: Data,
        policy: Policy,
        encoder: Encoder,
        prompt: tuple[str, str],
        folder: RunFolder,
        processes: Any,
        sampler: Engine | None,
    ) -> None:
        self._how, self._data, self._policy, self._encoder = how, data, policy, encoder
        self._prompt, self._folder, self._processes, self._sampler = prompt, folder, processes, sampler
        self._logged: dict[str, list[Rollout]] = {}
        for rollout in data.rollouts:
            self._logged.setdefault(rollout.query_id, []).append(rollout)
        if how.log and how.baseline in BASELINES and max(map(len, self._logged.values()), default=0) < 2:
            raise DataError(
                f"{', '.join(how.log)}: every query has one response, and baseline = {how.baseline!r} compares several "
                "of one; take value_network"
            )

    def draw(self, iteration: int, clock: Clock) -> Drawn:
        """Return what an iteration learns from.

        Raises:
            DataError: If there are not even two responses with a reward.
            ConfigError: If the engine does not tell which tokens it has drawn.
        """
        failed: Counter[str] = Counter()
        if self._sampler is None:
            found = self._part_of_log(iteration)
        else:
            found, failed = self._sampled(iteration, self._sampler, clock)
        left_out = self._encoder.left_out
        left_out.clear()
        left_out.update(failed)
        pairs = [(r, e) for r, e in ((r, self._encoder.drawn(r)) for r in found) if e is not None]
        clock.lap("rollout", sum(len(e.response) for _, e in pairs))
        rewards = self._rewards(iteration, [r for r, _ in pairs])
        self._keep_scores(iteration, [r for r, _ in pairs], whole_rewards(rewards))
        clock.lap("reward", sum(len(e.response) for _, e in pairs))
        known = np.flatnonzero(~np.isnan(whole_rewards(rewards)))
        if len(known) < len(pairs):
            left_out["no reward"] += len(pairs) - len(known)
        if len(known) < 2:
            told = ", ".join(f"{count:,} {reason}" for reason, count in left_out.most_common()) or "no more were drawn"
            raise DataError(
                f"iteration {iteration}: of {len(found):,} responses {len(known)} can be learned from ({told}); at "
                "least two are needed"
            )
        kept = [pairs[i] for i in known]
        return Drawn([r for r, _ in kept], [e for _, e in kept], rewards[known], dict(left_out))

    def _sampled(self, iteration: int, sampler: Engine, clock: Clock) -> tuple[list[Rollout], Counter[str]]:
        how, folder = self._how, self._folder.rollouts(iteration)
        queries = block_of(self._data.queries, how.rollouts // how.samples, how.seed, iteration)
        # A server may still have the weights of another run.
        if sampler.takes_weights and how.engine != SHARED and (iteration or sampler.shared):
            texts = [self._encoder.context(self._prompt[1], q.query) for q in queries[:4]]
            if self._processes.is_main_process or not sampler.shared:
                self._policy.send(sampler, [ids for ids in texts if ids])
            self._processes.wait_for_everyone()
            clock.lap("sync")
        seed = derive_seed(how.seed, "rollouts", iteration)
        with self._policy.computing():
            sample_rollouts(
                sampler,
                queries,
                self._prompt,
                folder,
                Sampling(how.max_tokens, how.temperature, seed=seed, logprobs=True),
                samples=how.samples,
                grade=how.grade,
                share=(self._processes.process_index, self._processes.num_processes),
                part=_PART,
            )
        self._processes.wait_for_everyone()
        rollouts, failed = read_rollouts(folder, how.prompt)
        if any(r.token_ids is None or r.prompt_ids is None for r in rollouts):
            raise ConfigError(
                f"the engine {how.engine!r} does not tell the tokens that it reads and draws, and what is made anew "
                "from text is not what was drawn; use transformers, vllm, or a vLLM server"
            )
        return rollouts, failed

    def _rewards(self, iteration: int, rollouts: list[Rollout]) -> np.ndarray:
        """Return the rewards of an iteration's responses: asked for once, by one process, and kept.

        A judge that never says the same thing twice does not keep a run from going on.
        """
        path = self._folder.rewards(iteration)
        if not path.is_file() and self._processes.is_main_process and rollouts:
            assert self._data.scorer is not None
            found = self._data.scorer(rollouts)
            kept = [v.tolist() if isinstance(v, np.ndarray) else None if np.isnan(v) else float(v) for v in found]
            with atomic_file(path) as file:
                file.write_text(json.dumps(kept), encoding="utf-8")
        self._processes.wait_for_everyone()
        kept = json.loads(path.read_text(encoding="utf-8")) if rollouts else []
        if len(kept) != len(rollouts):
            raise DataError(
                f"{path} holds {len(kept)} rewards for {len(rollouts)} responses; name another folder under `out`"
            )
        if any(isinstance(value, list) for value in kept):
            rewards = np.empty(len(kept), dtype=object)
            for i, value in enumerate(kept):
                rewards[i] = np.array(value, dtype=np.float64)
            return rewards
        return np.array(kept, dtype=np.float64)

    def _keep_scores(self, iteration: int, rollouts: Sequence[Rollout], rewards: np.ndarray) -> None:
        """Write rewards into the log of an iteration, as the `score` of its rows."""
        if self._sampler is None or not self._processes.is_main_process:
            return
        score = dict(zip(((r.query_id, r.replicate) for r in rollouts), rewards.tolist(), strict=True))
        for path in sorted(self._folder.rollouts(iteration).glob("*.parquet")):
            table, notes = read_log(path), log_metadata(path)
            keys = zip(table["query_id"].to_pylist(), table["replicate"].to_pylist(), strict=True)
            values = [score.get(key) for key in keys]
            column = pa.array([None if v is None or np.isnan(v) else v for v in values], pa.float64())
            if column.equals(table["score"].combine_chunks()):
                continue
            place = table.schema.get_field_index("score")
            with LogWriter(path, notes={RUN: notes[RUN]}) as writer:
                for batch in table.set_column(place, table.schema.field(place), column).to_batches():
                    writer.write(batch)

    def _part_of_log(self, iteration: int) -> list[Rollout]:
        """Return the responses to about as many queries as there are to be rollouts: whole queries, all in turn."""
        each = sum(map(len, self._logged.values())) / len(self._logged)
        count = max(round(self._how.rollouts / each), 1)
        chosen = block_of(list(self._logged), count, self._how.seed, iteration)
        return [rollout for query in chosen for rollout in self._logged[query]]


def block_of(items: Sequence[Any], size: int, seed: int, iteration: int) -> list[Any]:
    """Return the items that an iteration takes: all in turn, in another random order each time round.

    What is left when whole blocks are cut waits for the next round; where there are fewer than `size`, all are taken.
    """
    size = min(size, len(items))
    each = len(items) // size
    order = np.random.default_rng(derive_seed(seed, "queries", iteration // each)).permutation(len(items))
    start = iteration % each * size
    return [items[i] for i in order[start : start + size]]
