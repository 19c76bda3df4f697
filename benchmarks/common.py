"""What benchmarks share: where real data is, and a measured command."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for folder in ("", "cli", "data"):
    sys.path.insert(0, str(ROOT / folder))

PROMPTS = ["direct", "CoT", "APE", "Dis", "ToT", "Decomp"]
"""The six prompts that were run on every query of the Prompt-OIRL logs."""


def add_data_argument(parser: argparse.ArgumentParser) -> None:
    """Add --data, the folder of real data."""
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of real data")


def read_prompt_log(data: Path, name: str):
    """Import one of the Prompt-OIRL logs with oirl and read it."""
    from oirl.rewards.training import COLUMNS

    return import_data(data / "prompt_oirl_llama2" / f"{name}.parquet", [*COLUMNS, "replicate"])


def import_data(source: Path, columns: list[str]):
    """Import a file of the real data with oirl and read some columns of the log."""
    import oirl

    if not source.is_file():
        sys.exit(f"{source} is missing; name the folder of real data with --data")
    with tempfile.TemporaryDirectory() as folder:
        oirl.import_log(source, Path(folder) / "log.parquet")
        return oirl.read_log(Path(folder) / "log.parquet", columns)


def cpu_environment() -> dict[str, str]:
    """Return the environment with oirl on the path, for measured commands."""
    path = os.pathsep.join(str(ROOT / p) for p in ("", "cli", "data"))
    return os.environ | {"PYTHONPATH": path}
