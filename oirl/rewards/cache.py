"""Vectors of texts kept on disk, so that the same text is never embedded twice."""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from hashlib import blake2b
from pathlib import Path

import numpy as np

_CHUNK = 512


def cache_folder() -> Path:
    """Return the folder of the cache: $OIRL_CACHE, or `oirl` in the user's cache folder."""
    given = os.environ.get("OIRL_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "oirl"


def cached_rows(key: str | None, texts: Sequence[str], compute: Callable[[list[str]], np.ndarray]) -> np.ndarray:
    """Return one vector per text, computing those that the cache does not hold.

    Args:
        key: Name of the cache, one per embedder; None to compute everything.
        texts: The texts; equal ones are computed once.
        compute: Texts to float32 (n, d).

    Returns:
        Float32 (n, d).
    """
    distinct = list(dict.fromkeys(texts))
    if key is None:
        vectors = dict(zip(distinct, compute(distinct), strict=True)) if distinct else {}
    else:
        try:
            vectors = _through_disk(key, distinct, compute)
        except (sqlite3.Error, OSError) as e:
            logging.getLogger(__name__).warning("the cache in %s cannot be used: %s", cache_folder(), e)
            vectors = dict(zip(distinct, compute(distinct), strict=True)) if distinct else {}
    if not texts:
        return np.zeros((0, 0), dtype=np.float32)
    return np.stack([vectors[t] for t in texts]).astype(np.float32, copy=False)


def _through_disk(key: str, texts: list[str], compute: Callable[[list[str]], np.ndarray]) -> dict[str, np.ndarray]:
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    name = blake2b(key.encode(), digest_size=8).hexdigest()
    hashes = {t: blake2b(t.encode("utf-8", "surrogatepass"), digest_size=16).digest() for t in texts}
    found: dict[str, np.ndarray] = {}
    with closing(sqlite3.connect(folder / f"vectors-{name}.sqlite", timeout=60)) as database:
        database.execute("CREATE TABLE IF NOT EXISTS vectors (hash BLOB PRIMARY KEY, vector BLOB) WITHOUT ROWID")
        for text in texts:
            row = database.execute("SELECT vector FROM vectors WHERE hash = ?", (hashes[text],)).fetchone()
            if row:
                found[text] = np.frombuffer(row[0], dtype=np.float32)
        missing = [t for t in texts if t not in found]
        # Written chunk by chunk, so that a killed run has lost little.
        for start in range(0, len(missing), _CHUNK):
            chunk = missing[start : start + _CHUNK]
            vectors = np.asarray(compute(chunk), dtype=np.float32)
            with database:
                database.executemany(
                    "INSERT OR REPLACE INTO vectors VALUES (?, ?)",
                    [(hashes[t], v.tobytes()) for t, v in zip(chunk, vectors, strict=True)],
                )
            found.update(zip(chunk, vectors, strict=True))
    return found
