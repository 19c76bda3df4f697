"""Engines by their names in the registry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oirl.engines.base import Engine
from oirl.errors import ConfigError
from oirl.registry import create


def open_engine(name: str, model: str, params: Mapping[str, Any] | None = None) -> Engine:
    """Return an engine with a model, to be used as a context manager.

    Args:
        name: "transformers", "vllm", "openai", one of another package, or `package.module:attribute`.
        model: What the engine calls the model: a folder, a name on the hub, a name on the server.
        params: The engine's other parameters; see its class.

    Raises:
        UnknownNameError: If there is no such engine.
        ConfigError: If it has no parameter of a name, or does not take its value.
        MissingPackageError: If a package is not installed.
        EngineError: If a server cannot be reached, or the like.
    """
    if params and "model" in params:
        raise ConfigError("the model is named by --model, not by --set model")
    try:
        made = create("engines", name, {"model": model, **(params or {})})
    except TypeError as e:  # a value of another type than the engine's code expects
        raise ConfigError(f"the engine {name!r} does not take these parameters: {e}") from e
    if not isinstance(made, Engine):
        raise ConfigError(f"{name!r} is no engine: a {type(made).__name__}, not an oirl.engines.base.Engine")
    return made
