"""New weights for a vLLM server, through a folder that it can read too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

from oirl.engines.base import EngineError
from oirl.errors import require
from oirl.logs.atomic import atomic_folder


def send_weights(address: str, folder: Path, version: int, weights: Iterable[tuple[str, Any]], timeout: float) -> None:
    """Write weights to a folder of their own, have the server read them, and forget those before.

    vLLM offers this to servers that are started with VLLM_SERVER_DEV_MODE=1 (`/collective_rpc`). On CPUs it takes tied
    weights wrongly (seen in vLLM 0.32): whoever sends them compares log-probs afterwards (`Engine.update_weights`).

    Args:
        address: The server, without /v1.
        folder: Both sides see it under this name.
        version: Of the weights.
        weights: (name, tensor) of every parameter.
        timeout: Seconds that the server may take.

    Raises:
        EngineError: If the server does not take them.
    """
    require("safetensors", "tune", "sending weights to a server")
    from safetensors.torch import save_file

    target = folder.absolute() / f"version-{version}"
    with atomic_folder(target, marker=None) as made:
        kept: dict[int, str] = {}
        tensors = {}
        for name, tensor in weights:  # safetensors holds no tensor twice; what is tied comes with its other name
            if kept.setdefault(tensor.data_ptr(), name) == name:
                tensors[name] = tensor.detach().cpu().contiguous()
        save_file(tensors, str(made / "model.safetensors"), metadata={"format": "pt"})
    _post(address, "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(target)}}, timeout)
    _post(address, "/reset_prefix_cache", {}, timeout)
    shutil.rmtree(target)


def _post(address: str, path: str, body: dict[str, Any], timeout: float) -> None:
    request = Request(address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urlopen(request, timeout=timeout):
            return
    except (URLError, OSError) as e:
        hint = "; start it with VLLM_SERVER_DEV_MODE=1" if getattr(e, "code", None) == 404 else ""
        raise EngineError(f"{address}{path} does not take new weights: {e}{hint}") from e
