"""Saved models: a folder with a manifest and plain arrays. Loading runs no code from the folder."""

from __future__ import annotations

import io
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from oirl import __version__
from oirl.errors import ModelFileError, NotFoundError, UnknownNameError
from oirl.logs.atomic import atomic_folder
from oirl.logs.store import first_line
from oirl.registry import KINDS, resolve

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_MAX_MANIFEST = 64 << 20
_MAX_ARRAYS = 8 << 30
LANGUAGE_MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*config.json",
    "tokenizer*.json",
    "*.txt",
    "*.jinja",
)
"""What a language model and its tokenizer are saved as."""
_NATIVE = "_ubj"
"""Arrays of bytes whose name ends like this are written as files of XGBoost's own format."""

_UNSOUND = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, MemoryError, UnknownNameError)
_DAMAGED = (
    ValueError,
    OSError,
    KeyError,
    EOFError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    zipfile.BadZipFile,
    zlib.error,
)  # what reading a damaged or hostile archive raises


class SavedPrompt(BaseModel):
    """A prompt that a model knows."""

    model_config = ConfigDict(extra="forbid", strict=True)
    prompt_id: str
    prompt: str


class Manifest(BaseModel):
    """What stands in `manifest.json`.

    Attributes:
        format_version: Version of this layout.
        kind: What the folder holds: a name of the registry's kind "saved".
        oirl_version: The oirl that wrote it.
        created_at: When, in UTC.
        model: Name and parameters of the scorer.
        embedder: Name and parameters of the embedder.
        prompts: The prompts of the training log, in the order of the scores.
        data: What the model was trained on: fingerprint, counts.
        metrics: Held-out metrics on the training log, by cross-fitting.
        calibration: How scores became probabilities.
        learning_curve: Held-out accuracy by the number of pairs learned from, where it was asked for.
        deploy: What the gate decided, for a selector.
        costs: What prompts cost, and what each weight of cost gives, for a selector that knows costs.
        warnings: What limits the model.
        files: Name -> SHA-256 of the other files.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    format_version: int
    kind: str
    oirl_version: str
    created_at: str
    model: dict[str, Any]
    embedder: dict[str, Any]
    prompts: list[SavedPrompt]
    data: dict[str, Any]
    metrics: dict[str, float | None]
    calibration: dict[str, Any]
    learning_curve: list[dict[str, Any]] | None = None
    deploy: dict[str, Any] | None = None
    costs: dict[str, Any] | None = None
    warnings: list[str] = Field(default_factory=list)
    files: dict[str, str] = Field(default_factory=dict)


def save_folder(
    path: str | os.PathLike[str],
    manifest: dict[str, Any],
    arrays: Mapping[str, np.ndarray],
    write: Callable[[Path], None] | None = None,
) -> None:
    """Write a model folder whole or not at all.

    Args:
        path: The folder; an earlier model there is replaced.
        manifest: The fields of `Manifest` less those that are filled in here.
        arrays: Name -> array. Names ending in `_ubj` become files of that format, all others one `weights.npz`.
        write: Writes more files into the folder, of the kinds in `LANGUAGE_MODEL_FILES`.
    """
    with atomic_folder(path, marker=MANIFEST, others=("*.npz", "*.ubj", *LANGUAGE_MODEL_FILES)) as folder:
        if write is not None:
            write(folder)
        native = {name for name in arrays if name.endswith(_NATIVE)}
        with (folder / "weights.npz").open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **{n: a for n, a in arrays.items() if n not in native})
        for name in native:
            (folder / f"{name.removesuffix(_NATIVE)}.ubj").write_bytes(arrays[name].tobytes())
        files = {p.name: _checksum(p) for p in sorted(folder.iterdir())}
        document = Manifest(
            format_version=FORMAT_VERSION,
            oirl_version=__version__,
            created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            files=files,
            **manifest,
        )
        (folder / MANIFEST).write_text(document.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read and check the manifest of a model folder.

    Raises:
        NotFoundError: If there is no such folder, or no manifest in it.
        ModelFileError: If it is not a manifest, or of another version.
    """
    folder = Path(path)
    file = folder / MANIFEST
    if not file.is_file():
        what = "no such folder" if not folder.exists() else f"not a model of oirl (no {MANIFEST})"
        raise NotFoundError(f"{folder}: {what}; make one with `oirl fit LOG --out {folder}`")
    if file.stat().st_size > _MAX_MANIFEST:
        raise ModelFileError(f"{file} is larger than {_MAX_MANIFEST >> 20} MiB; it is not a manifest of oirl")
    try:
        document = json.loads(file.read_bytes(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        raise ModelFileError(f"{file} is not JSON: {e}; fit the model again") from e
    version = document.get("format_version") if isinstance(document, dict) else None
    if version != FORMAT_VERSION:
        raise ModelFileError(
            f"{file} has format version {version!r}, this oirl ({__version__}) reads {FORMAT_VERSION}; "
            "fit the model again, or use the oirl that wrote it"
        )
    try:
        return Manifest.model_validate(document)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ModelFileError(f"{file}: {where}: {first['msg']}; fit the model again") from e


def read_arrays(path: str | os.PathLike[str], manifest: Manifest) -> dict[str, np.ndarray]:
    """Read the arrays that a manifest lists, after checking every file.

    Raises:
        ModelFileError: If a file is missing, is changed, is not listed, or holds objects instead of numbers.
    """
    folder = Path(path)
    there = {p.name for p in folder.iterdir()} - {MANIFEST}
    if there != set(manifest.files):
        unlike = sorted(there ^ set(manifest.files))
        raise ModelFileError(f"{folder}: files do not match the manifest: {', '.join(unlike)}; fit the model again")
    arrays: dict[str, np.ndarray] = {}
    for name, checksum in manifest.files.items():
        file = folder / name
        if file.is_symlink() or not file.is_file():
            raise ModelFileError(f"{file} is not a plain file")
        if _checksum(file) != checksum:
            raise ModelFileError(f"{file} has changed since it was written (SHA-256 differs); fit the model again")
        if name.endswith(".ubj"):
            arrays[name.removesuffix(".ubj") + _NATIVE] = np.frombuffer(file.read_bytes(), dtype=np.uint8)
        elif name.endswith(".npz"):
            arrays |= _read_npz(file, file.read_bytes())
        elif not any(fnmatchcase(name, pattern) for pattern in LANGUAGE_MODEL_FILES):
            raise ModelFileError(f"{file}: a model of oirl holds no such file")
    return arrays


def load(path: str | os.PathLike[str], *, embedder: Any = None) -> Any:
    """Load a saved model or selector.

    Args:
        path: The folder that `oirl fit` or `save` wrote.
        embedder: The embedder, or its name, where it is code of your own; oirl imports nothing that a folder names.

    Raises:
        NotFoundError: If there is no model.
        ModelFileError: If a file is damaged, changed, of another version or not ours, or the embedder does not match.
    """
    manifest = read_manifest(path)
    if manifest.kind not in KINDS["saved"]:
        raise ModelFileError(f"{path}: unknown kind of model {manifest.kind!r}; known: {', '.join(KINDS['saved'])}")
    return resolve("saved", manifest.kind).load(path, embedder=embedder)


@contextmanager
def sound_state(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn whatever restoring a model raises, where its parts do not fit together, into a `ModelFileError`."""
    try:
        yield
    except ModelFileError:
        raise
    except _UNSOUND as e:
        raise ModelFileError(f"{path}: the saved state is not sound: {first_line(e)}; fit the model again") from e


def named(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Return the arrays whose name begins with `prefix`, under the rest of their name."""
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _read_npz(file: Path, content: bytes) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sum(member.file_size for member in archive.infolist()) > _MAX_ARRAYS:
                raise ModelFileError(f"{file} unpacks to more than {_MAX_ARRAYS >> 30} GiB; it is not a model of oirl")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except ModelFileError:
        raise
    except _DAMAGED as e:
        raise ModelFileError(f"{file} does not hold plain arrays: {first_line(e)}; fit the model again") from e


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not allowed")


def _checksum(file: Path) -> str:
    digest = sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
