"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from oirl.errors import ConfigError, NotFoundError


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced to disk and renamed to `path`.

    When the block raises, or the process is killed, `path` is as it was before.

    Raises:
        ConfigError: If `path` is a folder.
        NotFoundError: If the folder that `path` stands in cannot be made.
    """
    target = Path(path)
    if target.is_dir():
        raise ConfigError(f"{target} is a folder; name a file")
    _make_folder(target.parent)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes private files; a result is as readable as any other file of the user's.
        temporary.chmod(0o666 & ~_umask())
        _sync(temporary)
        os.replace(temporary, target)
        _sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], *, marker: str) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it takes the place of `path`.

    Args:
        path: The folder to write. If it stands already, it must be empty or hold `marker`.
        marker: Name of the file by which an earlier result of ours is known, so that no other folder is replaced.

    Raises:
        ConfigError: If `path` is a file, or a folder with other content.
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file; name a folder")
    if target.is_dir() and any(target.iterdir()) and not (target / marker).is_file():
        raise ConfigError(f"{target} holds other files (no {marker}); name a new or empty folder")
    _make_folder(target.parent)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
            os.replace(target, old / "replaced")
            os.replace(temporary, target)
            shutil.rmtree(old)
        else:
            os.replace(temporary, target)
        _sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise NotFoundError(f"cannot make the folder {folder}: {e.strerror}") from e


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    current = os.umask(0o077)
    os.umask(current)
    return current
