"""What is installed and which devices there are, found without importing anything heavy."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from oirl import __version__

# package -> (what it is needed for, the extra of oirl that brings it, None for the base install)
PACKAGES: dict[str, tuple[str, str | None]] = {
    "numpy": ("everything", None),
    "scipy": ("everything", None),
    "pyarrow": ("logs", None),
    "pydantic": ("saved models", None),
    "scikit-learn": ("models logistic and mlp", None),
    "xgboost": ("models xgboost and xgboost-published", "xgboost"),
    "sentence-transformers": ("embedder sentence-transformers", "embed"),
    "math-verify": ("checker math", "math"),
    "torch": ("embeddings, fine-tuning", "tune"),
    "transformers": ("language models", "tune"),
    "accelerate": ("training of language models", "tune"),
    "peft": ("LoRA adapters", "tune"),
    "openai": ("engine openai: servers", "openai"),
    "vllm": ("engine vllm, on GPUs", "vllm"),
    "datasets": ("data sets of the hub", "data"),
}
_STAND_INS = {"xgboost": "xgboost-cpu"}


def inspect_environment() -> dict[str, Any]:
    """Return versions, devices, what is missing with the command that installs it, and problems, for JSON."""
    packages = []
    for package, (purpose, extra) in PACKAGES.items():
        found = _version(package) or _version(_STAND_INS.get(package, package))
        install = f"pip install 'oirl[{extra}]'" if extra else f"pip install {package}"
        packages.append({"package": package, "version": found, "purpose": purpose, "install": install})
    gpus, gpu_note = _gpus()
    problems = []
    if _version("xgboost") and _version("xgboost-cpu"):
        problems.append(
            "xgboost and xgboost-cpu are both installed and overwrite each other; pip uninstall xgboost-cpu"
        )
    return {
        "oirl": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": gpus,
        "gpu_note": gpu_note,
        "packages": packages,
        "problems": problems,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpus() -> tuple[list[str], str]:
    command = shutil.which("nvidia-smi")
    if command is None:
        return [], "none found (no nvidia-smi)"
    try:
        done = subprocess.run(
            [command, "--query-gpu=name,memory.total", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as e:
        return [], f"nvidia-smi failed: {e}"
    return [line.strip() for line in done.stdout.splitlines() if line.strip()], "none found"
