"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from oirl.errors import ConfigError, OirlError, WriteError


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced to disk and renamed to `path`.

    When the block raises, or the process is killed, `path` is as it was before.

    Raises:
        ConfigError: If `path` is a folder.
        WriteError: If the disk refuses: no room, no permission, a name too long.
    """
    target = Path(path)
    with _write_errors(target):
        if target.is_dir():
            raise ConfigError(f"{target} is a folder; name a file")
        if target.exists() and not target.is_file():
            raise ConfigError(f"{target} is a device, not a file; name a file")
        _make_folder(target.parent)
        handle, name = tempfile.mkstemp(prefix=f".{target.name[:100]}.", suffix=".tmp", dir=target.parent)
        os.close(handle)
        with _removed_at_the_end(Path(name)) as temporary:
            yield temporary
            # mkstemp makes private files; a result is as readable as any other file of the user's.
            temporary.chmod(0o666 & ~_umask())
            _sync(temporary)
            os.replace(temporary, target)
            _sync(target.parent)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], *, marker: str | None, others: Sequence[str] = ()) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it takes the place of `path`.

    Args:
        path: The folder to write. If it stands already, it must be empty, or hold `marker` and nothing but our files.
        marker: Name of the file by which an earlier result of ours is known; None where whatever stands there is ours.
        others: Patterns of the names of all other files that a result may hold. A folder with any other entry is
            somebody's work and is not replaced.

    Raises:
        ConfigError: If `path` is a file, or a folder with other content.
        WriteError: If the disk refuses.
    """
    target = Path(path)
    with _write_errors(target):
        if target.exists() and not target.is_dir():
            raise ConfigError(f"{target} is a file; name a folder")
        if marker is not None and target.is_dir():
            _check_ours(target, marker, others)
        _make_folder(target.parent)
        prefix = f".{target.name[:100]}."
        with _removed_at_the_end(Path(tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=target.parent))) as temporary:
            yield temporary
            temporary.chmod(0o777 & ~_umask())
            for file in temporary.rglob("*"):
                if file.is_file():
                    file.chmod(0o666 & ~_umask())  # some libraries write files for their owner only
                    _sync(file)
            _replace_folder(temporary, target, prefix)
            _sync(target.parent)


def _check_ours(target: Path, marker: str, others: Sequence[str]) -> None:
    entries = sorted(target.iterdir())
    if entries and not (target / marker).is_file():
        raise ConfigError(f"{target} holds other files (no {marker}); name a new or empty folder")
    for entry in entries:
        if not entry.is_file() or not any(fnmatchcase(entry.name, pattern) for pattern in (marker, *others)):
            raise ConfigError(
                f"{target} also holds {entry.name!r}, which was not written here and would be lost; move it, or name "
                "a new or empty folder"
            )


def _replace_folder(new: Path, target: Path, prefix: str) -> None:
    """Put `new` where `target` is; on failure the old folder is put back."""
    if not target.exists():
        os.replace(new, target)
        return
    with _removed_at_the_end(Path(tempfile.mkdtemp(prefix=prefix, suffix=".old", dir=target.parent))) as aside:
        os.replace(target, aside / "replaced")
        try:
            os.replace(new, target)
        except OSError:
            os.replace(aside / "replaced", target)
            raise


@contextmanager
def _removed_at_the_end(path: Path) -> Iterator[Path]:
    try:
        yield path
    finally:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def _write_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OirlError:
        raise
    except OSError as e:
        if e.filename is not None and target.parent.resolve() not in Path(os.fsdecode(e.filename)).resolve().parents:
            raise  # another file, which the block was reading
        raise WriteError(f"cannot write {target}: {e.strerror or ' '.join(str(e).split())}") from e


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise WriteError(f"cannot make the folder {folder}: {e.strerror}") from e


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
