"""The journal of a collecting run: a line a run, appended as it finishes, from which a killed run goes on."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oirl.errors import ConfigError, DataError, WriteError

try:
    import fcntl
except ImportError:  # not on Windows: two runs on one journal are not noticed there
    fcntl = None  # type: ignore[assignment]

_SYNC_EVERY_S = 2.0
_HEAD = b'{"run": {'
_TOLD_LATER = ("options", "logprobs_mode", "base_url")
_OF_BYTES = re.compile(r"[0-9a-f]{32}(\+[0-9a-f]{32})?")


class Journal:
    """A file of JSON lines: the run's identity, then its rows. A last line that is only half there is cut off.

    What is appended is safe from the death of the process at once, and from that of the machine within two seconds.

    Args:
        path: The file; made if it is not there.
        identity: What the run is: a journal of another run is refused.

    Attributes:
        rows: The rows that an earlier process has left.
        identity: What stands in the file: that of an earlier process, if the run is its own.

    Raises:
        ConfigError: If it is the journal of another run, or a process is writing to it.
        DataError: If a line within it is damaged.
        WriteError: If it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], identity: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.identity, self.rows = dict(identity), list[dict[str, Any]]()
        self._holds_rows = False
        self._open()
        try:
            while not self._lock():  # another process has removed the file meanwhile
                self._file.close()
                self._open()
            self._read(dict(identity))
        except BaseException:
            self._file.close()
            raise
        self._synced = time.monotonic()

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row."""
        self._write(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        self._holds_rows = True
        if time.monotonic() - self._synced > _SYNC_EVERY_S:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def close(self) -> None:
        """Close the file; it stays for the next process."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def remove(self) -> None:
        """Close and delete the file: its rows stand elsewhere."""
        if fcntl is None:  # Windows deletes no file that is open
            self.close()
        self.path.unlink(missing_ok=True)  # before the lock is given up: after it, the file may be another's
        self.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        if self._holds_rows:
            self.close()
        else:  # nothing to go on with: a refused command leaves nothing behind
            self.remove()

    def _open(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115
        except OSError as e:
            raise WriteError(f"cannot write {self.path}: {e.strerror}") from e

    def _lock(self) -> bool:
        """Keep others out; False if the file that was opened has no name any more."""
        if fcntl is None:
            return True
        try:
            fcntl.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise ConfigError(f"{self.path} is being written by another process; wait for it, or stop it") from e
        return self.path.exists() and os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())

    def _read(self, identity: dict[str, Any]) -> None:
        self._file.seek(0)
        lines = self._file.readall().split(b"\n")
        half = lines.pop()
        # Before anything is cut off: is it ours at all?
        if not (lines[0].startswith(_HEAD) if lines else _HEAD.startswith(half[: len(_HEAD)])):
            raise DataError(f"{self.path}:1: not the journal of a run; move the file away")
        if half:
            self._file.truncate(sum(len(line) + 1 for line in lines))
        found = [self._parse(number, line) for number, line in enumerate(lines, 1)]
        # Where nothing was ever answered, other settings may be what helps: it binds to nothing.
        if found and found[0]["run"] != identity and all(row.get("response") is None for row in found[1:]):
            self._file.truncate(0)
            found = []
        if not found:
            self._write(json.dumps({"run": identity}, ensure_ascii=False, sort_keys=True).encode() + b"\n")
            return
        check_same_run(str(self.path), found[0]["run"], identity)
        self.identity, self.rows = found[0]["run"], found[1:]
        self._holds_rows = bool(self.rows)

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError as e:
            raise DataError(f"{self.path}:{number}: damaged: {e}; delete this line to make its run again") from e
        if not isinstance(row, dict):
            raise DataError(f"{self.path}:{number}: damaged: not an object; delete this line to make its run again")
        return row

    def _write(self, data: bytes) -> None:
        try:
            view = memoryview(data)
            while view:
                view = view[self._file.write(view) :]
        except OSError as e:
            raise WriteError(f"cannot write {self.path}: {e.strerror}; what it holds stays for the next try") from e


def check_same_run(where: str, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with a run whose settings were others.

    A model of equal bytes is the same wherever it lies. What runs of earlier versions did not tell is not compared.

    Raises:
        ConfigError: Naming the settings that differ.
    """
    ignored = {name for name in _TOLD_LATER if name not in earlier}
    if _bytes_of_model(earlier) == _bytes_of_model(now) is not None:
        ignored.add("model")
    earlier, now = ({k: v for k, v in told.items() if k not in ignored} for told in (earlier, now))
    earlier, now = _flat(earlier), _flat(now)
    names = [*earlier, *(name for name in now if name not in earlier)]
    differ = [
        f"{n} was {_short(earlier.get(n))}, is {_short(now.get(n))}" for n in names if earlier.get(n) != now.get(n)
    ]
    if differ:
        raise ConfigError(
            f"{where} holds a run with other settings: {'; '.join(differ)}; name another --out, or take those"
        )


def _bytes_of_model(told: Mapping[str, Any]) -> str | None:
    """Return the hash of a model's folders, None where something else tells it from others."""
    name, fingerprint = str(told.get("model")), str(told.get("model_fingerprint"))
    hashed = _OF_BYTES.fullmatch(fingerprint) is not None
    # Of an adapter that is no folder, the name tells alone.
    return fingerprint if hashed and name.count("+") == fingerprint.count("+") else None


def _flat(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):  # vLLM's own settings may have names that ours have too
            found |= _flat(value, f"{name}." if name == "options" else before)
        else:
            found[before + name] = value
    return found


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:79] + "…"
