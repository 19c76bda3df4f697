"""From a file and options to the settings of a method."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from oirl.errors import ConfigError, NotFoundError, UnknownNameError, nearest
from oirl.tuning.online_settings import Apa, Awr, Ppo
from oirl.tuning.settings import Filter, Hir, Raft, Settings, Sft

SUPERVISED: dict[str, type[Settings]] = {kind.method: kind for kind in (Sft, Filter, Raft, Hir)}
ONLINE: dict[str, type[Settings]] = {kind.method: kind for kind in (Apa, Ppo, Awr)}
METHODS: dict[str, type[Settings]] = SUPERVISED | ONLINE


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the entries of a YAML file of settings.

    Raises:
        NotFoundError: If it is not there.
        ConfigError: If it is no YAML mapping.
    """
    import yaml

    file = Path(path)
    if not file.is_file():
        raise NotFoundError(f"{file} is not there; --config names a YAML file")
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise ConfigError(f"{file} is no YAML: {e}") from e
    if found is not None and not isinstance(found, dict):
        raise ConfigError(f"{file} must hold `name: value` entries, and holds a {type(found).__name__}")
    return {str(name): value for name, value in (found or {}).items()}


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with changes; `relabel.correct` names an entry within an entry.

    Raises:
        ConfigError: If a name goes into something that has no entries.
    """
    found = dict(base)
    for name, value in changes.items():
        outer, dot, inner = name.partition(".")
        if dot:
            within = found.get(outer) or {}
            if not isinstance(within, dict):
                raise ConfigError(f"--set {name}: {outer!r} has no entries, it is {within!r}")
            value = merge(within, {inner: value})
        found[outer] = value
    return found


def make_settings(method: str, entries: Mapping[str, Any], where: str = "the settings") -> Settings:
    """Return checked settings.

    Raises:
        UnknownNameError: If there is no such method.
        ConfigError: If an entry is unknown, missing, or not allowed.
    """
    if method not in METHODS:
        raise UnknownNameError(f"unknown method {method!r}{nearest(method, METHODS)}; known: {', '.join(METHODS)}")
    kind = METHODS[method]
    known = list(kind.model_fields)
    for name in entries:
        if name not in known:
            elsewhere = [m for m, other in METHODS.items() if name in other.model_fields]
            hint = f"; it is one of {', '.join(elsewhere)}" if elsewhere else nearest(name, known)
            raise ConfigError(f"{where}: {method} has no setting {name!r}{hint}; it has: {', '.join(known)}")
    try:
        return kind.model_validate(dict(entries))
    except ValidationError as e:
        problem = e.errors()[0]
        name = ".".join(map(str, problem["loc"]))
        told = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "missing":
            raise ConfigError(f"{where}: {method} needs `{name}`: {_about(kind, name)}") from e
        given = f" = {problem['input']!r}" if name else ""
        raise ConfigError(f"{where}: {f'{name}{given}: ' if name else ''}{told}") from e


def _about(kind: type[Settings], name: str) -> str:
    """Return what the docstring says of a setting."""
    for cls in kind.__mro__:
        for line in (cls.__doc__ or "").splitlines():
            if line.strip().startswith(f"{name}: "):
                return line.strip().removeprefix(f"{name}: ")
    return "see docs/tuning.md"
