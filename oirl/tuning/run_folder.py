"""The folder of a run: what it is, how far it is, its metrics; a killed run goes on from it."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from oirl.errors import ConfigError, WriteError
from oirl.logs.atomic import atomic_file, atomic_folder

try:
    import fcntl
except ImportError:  # not on Windows: two runs in one folder are not noticed there
    fcntl = None  # type: ignore[assignment]

_RUN, _STATE, _METRICS, _MODEL = "run.json", "state.json", "metrics.jsonl", "model"
_TIMES = "times.jsonl"
VALIDATION = "validation.json"
"""File beside the weights of the best validation, and of the result if it is that one: what was measured of them."""
LESSON = "lesson"
"""Name, among the metrics of rollouts, of a hash of what is learned from them."""
GIVEN = "given"
"""Name, among the metrics of rollouts, of the templates that something is learned under, with their responses."""
# What a run needs while it goes on, and what is left where it was killed while it wrote.
_PASSING = ("weights-*", "best-*", "checkpoints", "**/.*.tmp", "**/.*.old")


class RunFolder:
    """What a run has written.

    ```
    run.json        settings, versions, fingerprints of model and data: what the run is
    state.json      finished iterations
    metrics.jsonl   a line for each rollout, update and validation that is told of
    times.jsonl     seconds and tokens a second of each phase of an iteration, of online methods
    rollouts/       the log of each iteration
    rewards/        of online methods: the rewards of its rows, as they are learned from
    checkpoints/    of the iteration that is running
    weights-K/      after K iterations; the newest only; of online methods with all that is trained
    best-I-S/       weights of the best validation so far, after S updates of iteration I
    model/          the result
    ```

    Args:
        path: The folder.
        identity: What the run is; a folder of another one is refused.
        writes: Whether this process is the one that writes.

    Raises:
        ConfigError: If the folder is that of another run, or holds something else.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], *, writes: bool = True) -> None:
        self.path, self._writes, self._identity = path, writes, json.loads(json.dumps(identity))
        self._told: dict[tuple[Any, ...], dict[str, Any]] = {}
        if writes:  # others would look while the one that writes may just be writing
            self._is_ours()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keep other processes out for a while, and write down whose folder it is.

        Raises:
            ConfigError: If another process is writing to it, or it has become that of another run.
            WriteError: If it cannot be made.
        """
        if not self._writes:
            yield
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise WriteError(f"cannot make the folder {self.path}: {e.strerror}") from e
        with _locked(self.path):
            if not self._is_ours():
                self._write(_RUN, {"identity": self._identity})
            yield

    def _is_ours(self) -> bool:
        """Return whether the folder is that of this run already; refuse that of another one.

        A start that failed, of a model that could not be loaded, leaves nothing but what the run was to be: no reason
        to keep another run out.
        """
        path = self.path
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{path} is a file; `out` names a folder")
        known = self._read(_RUN)
        if known is None and path.is_dir() and any(path.iterdir()):
            raise ConfigError(f"{path} holds other files and no {_RUN}; name a new or empty folder under `out`")
        if known is None:
            return False
        before = known.get("identity") if isinstance(known, dict) else None
        if not isinstance(before, dict):
            raise ConfigError(f"{path / _RUN} is not of a run of oirl; name another folder under `out`")
        if before != self._identity and not any(file.stat().st_size for file in self._made()):
            return False
        _check_same(path, before, self._identity)
        return True

    def _made(self) -> Iterator[Path]:
        """Return the files of the folder beside that which says what the run is."""
        return (file for file in self.path.rglob("*") if file.is_file() and file != self.path / _RUN)

    @property
    def iterations_done(self) -> int:
        """How many iterations are finished."""
        return int(self._state["iterations_done"])

    @property
    def updates_done(self) -> int:
        """How many updates these had."""
        return int(self._state["updates_done"])

    @property
    def _state(self) -> dict[str, int]:
        found = self._read(_STATE) or {"iterations_done": 0, "updates_done": 0}
        if not isinstance(found, dict) or set(found) != {"iterations_done", "updates_done"}:
            raise ConfigError(f"{self.path / _STATE} is damaged; name another folder under `out`")
        return found

    @property
    def weights(self) -> Path:
        """The weights after the finished iterations."""
        return self.path / f"weights-{self.iterations_done}"

    @property
    def finished(self) -> bool:
        """Whether the result is there."""
        return (self.path / _MODEL).is_dir()

    def rollouts(self, iteration: int) -> Path:
        """Return the folder of an iteration's log."""
        return self.path / "rollouts" / f"iteration-{iteration:03}"

    def rewards(self, iteration: int) -> Path:
        """Return the file of an iteration's rewards."""
        return self.path / "rewards" / f"iteration-{iteration:03}.json"

    def checkpoints(self, iteration: int) -> Path:
        """Return the folder of an iteration's checkpoints."""
        return self.path / "checkpoints" / f"iteration-{iteration:03}"

    def finish_iteration(self, done: int, updates: int, save: Callable[[Path], None]) -> None:
        """Keep the weights after so many iterations and updates, and let go of what is not needed any more."""
        if not self._writes:
            return
        target = self.path / f"weights-{done}"
        self.put(target.name, save)
        self._write(_STATE, {"iterations_done": done, "updates_done": updates})
        shutil.rmtree(self.path / "checkpoints", ignore_errors=True)
        for old in self.path.glob("weights-*"):
            if old != target:
                shutil.rmtree(old)
        self._prune_bests(settled=False)

    def put(self, name: str, save: Callable[[Path], None]) -> None:
        """Write a folder, which appears under its name when it is complete."""
        if not self._writes:
            return
        with atomic_folder(self.path / name, marker=None) as folder:
            save(folder)

    def best(self) -> tuple[Path, float] | None:
        """Return the weights of the best validation so far, and its value; None if there was none."""
        found = sorted(self.path.glob("best-*"))
        if not found:
            return None
        return found[-1], float(json.loads((found[-1] / VALIDATION).read_text(encoding="utf-8"))["value"])

    def keep_best(
        self,
        iteration: int,
        step: int,
        value: float,
        save: Callable[[Path], None],
        measured: Mapping[str, Any] | None = None,
    ) -> None:
        """Keep weights, and what was measured of them, if their validation is better than all before."""
        if not self._writes:  # others may look while a folder is just being replaced
            return
        before = self.best()
        if math.isnan(value) or (before is not None and value <= before[1]):
            return
        name = f"best-{iteration:03}-{step:07}"

        def save_all(folder: Path) -> None:
            save(folder)
            row = {"value": value, "iteration": iteration, "step": step, **(measured or {})}
            (folder / VALIDATION).write_text(json.dumps(row), encoding="utf-8")

        self.put(name, save_all)
        self._prune_bests(settled=True)

    def forget_bests(self, done: int) -> None:
        """Let go of what was kept in iterations from `done` on, as these are made again."""
        for path in self.path.glob("best-*") if self._writes else ():
            if _iteration_of(path) >= done:
                shutil.rmtree(path)

    def _prune_bests(self, *, settled: bool) -> None:
        """Keep the newest, which is the best, and, if asked, that of the iterations which will not be made again."""
        found = sorted(self.path.glob("best-*"))
        kept = found[-1:]
        if settled:
            kept += [path for path in found if _iteration_of(path) < self.iterations_done][-1:]
        for path in set(found) - set(kept):
            shutil.rmtree(path)

    def finish(self, save: Callable[[Path], None]) -> None:
        """Write the result, and remove what only a run that goes on needs."""
        if not self._writes:
            return
        if not self.finished:
            self.put(_MODEL, save)
        for old in [path for pattern in _PASSING for path in self.path.glob(pattern)]:
            if old.is_dir():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.unlink(missing_ok=True)

    def go_on(self, iteration: int, step: int) -> None:
        """Forget the metrics that come after some updates of an iteration: they are told again."""
        path = self.path / _METRICS
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            try:
                row = json.loads(line)
                place = row["iteration"], row["step"]
            except (ValueError, KeyError, TypeError):  # the run was killed while it wrote
                break
            if place[0] < iteration or (place[0] == iteration and place[1] <= step):
                kept.append(line + "\n")
                self._told[_key(row)] = row
        if self._writes:
            with atomic_file(path) as file:
                file.write_text("".join(kept), encoding="utf-8")

    @property
    def told(self) -> list[dict[str, Any]]:
        """The lines that `go_on` has kept, and those told since by the process that writes."""
        return list(self._told.values())

    def tell(self, kind: str, iteration: int, step: int, values: Mapping[str, Any]) -> None:
        """Append a line of metrics, once.

        Raises:
            ConfigError: If an earlier process has learned something else in this iteration.
        """
        row = {"kind": kind, "iteration": iteration, "step": step, **values}
        before = self._told.get(_key(row))
        if before is not None and before.get(LESSON) != row.get(LESSON):
            raise ConfigError(
                f"{self.path}: what iteration {iteration} learns from is not what it was before the run was stopped: "
                "the reward, the checker or the relabelling is another one; name another folder under `out`"
            )
        if self._writes and before is None:
            self._told[_key(row)] = row
            with (self.path / _METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def tell_times(self, row: Mapping[str, Any]) -> None:
        """Append what took how long: a file of its own, as no two runs agree on it."""
        if self._writes:
            with (self.path / _TIMES).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Return all lines of metrics."""
        path, found = self.path / _METRICS, []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            try:
                found.append(json.loads(line))
            except ValueError as e:
                raise ConfigError(f"{path} is damaged: {e}; the result is in {self.path / _MODEL}") from e
        return found

    def _read(self, name: str) -> Any:
        file = self.path / name
        try:
            return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        except ValueError as e:
            raise ConfigError(f"{file} is damaged: {e}; name another folder under `out`") from e

    def _write(self, name: str, value: Any) -> None:
        with atomic_file(self.path / name) as file:
            file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder against other processes; the death of this one gives it free."""
    if fcntl is None:
        yield
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise ConfigError(f"{folder} is being written by another process; wait for it, or stop it") from e
        except OSError:  # a file system without locks: two runs in one folder are not noticed there
            pass
        yield
    finally:
        os.close(number)


def _iteration_of(best: Path) -> int:
    return int(best.name.split("-")[1])


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["kind"], row["iteration"], row["step"]


def _check_same(path: Path, known: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    for name in {**known, **ours}:
        before, now = known.get(name), ours.get(name)
        if before != now:
            raise ConfigError(
                f"{path} is the folder of another run: {name} was {before!r}, and is {now!r}; name another folder "
                "under `out`, or repeat the settings in its run.json"
            )
