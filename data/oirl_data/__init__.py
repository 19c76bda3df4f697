"""Demo data of oirl: a small language model and the graded-on-import log of its sampled replies.

The package holds data files and the pure Python generator that made them. Importing it imports nothing heavy.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["demo_path", "small_lm_path"]


def demo_path() -> Path:
    """Return the folder with the demo log (`replies.jsonl.gz`, `queries.jsonl`, `prompts.jsonl`)."""
    return Path(__file__).resolve().parent / "demo"


def small_lm_path() -> Path:
    """Return the folder with the small language model, as `transformers` saves one."""
    return Path(__file__).resolve().parent / "small_lm"
