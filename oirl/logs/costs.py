"""What the runs of a log cost: money as logged or by a price table, else tokens."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from oirl.errors import DataError, NotFoundError
from oirl.logs.cells import Cells

COST_COLUMNS = ("cost", "tokens_in", "tokens_out", "model")
"""The columns of a log that costs come from."""

_MILLION = 1e6


@dataclass(frozen=True, slots=True)
class RunCosts:
    """What each run of a log cost.

    Attributes:
        values: Per row, float (n,), NaN where it is not known.
        unit: "money", in the currency of the log or of the price table, or "tokens".
    """

    values: np.ndarray
    unit: str


def read_prices(path: str | os.PathLike[str]) -> dict[str, tuple[float, float]]:
    """Return model -> (price of a million input tokens, of a million output tokens) of a YAML file.

    The file maps names of models to `{input: 0.15, output: 0.60}`; the name `default` stands for all others.

    Raises:
        NotFoundError: If the file is not there.
        DataError: If it does not hold prices.
    """
    import yaml

    file = Path(path)
    if not file.is_file():
        raise NotFoundError(f"{file}: no such file; a YAML file of prices is needed")
    try:
        document: Any = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise DataError(f"{file} is not YAML: {' '.join(str(e).split())}") from e
    if not isinstance(document, dict) or not document:
        raise DataError(
            f"{file}: a mapping from models to prices is needed, such as `default: {{input: 0.15, output: 0.6}}`"
        )
    return {str(model): _prices_of(f"{file}: {model}", entry) for model, entry in document.items()}


def _prices_of(where: str, entry: Any) -> tuple[float, float]:
    found = [entry.get(side) for side in ("input", "output")] if isinstance(entry, dict) else []
    sides = [
        float(p) for p in found if isinstance(p, (int, float)) and not isinstance(p, bool) and 0 <= p < float("inf")
    ]
    if len(sides) < 2:
        raise DataError(f"{where}: {entry!r}; `input` and `output`, each the price of a million tokens, are needed")
    return sides[0], sides[1]


def run_costs(log: pa.Table, prices: Mapping[str, tuple[float, float]] | None = None) -> RunCosts | None:
    """Return what each run cost, None where nothing is known of any.

    Money is the column `cost`, or the tokens times the prices of the row's model where that is empty; if no row has
    either, the tokens themselves are what is counted.

    Args:
        log: Interactions, with the columns `COST_COLUMNS`.
        prices: See `read_prices`.
    """
    money = _numbers(log, "cost")
    tokens_in, tokens_out = _numbers(log, "tokens_in"), _numbers(log, "tokens_out")
    if prices:
        models = log["model"].to_pylist()
        fallback = prices.get("default")
        table = [prices.get(model or "", fallback) for model in models]
        per = np.array([(np.nan, np.nan) if p is None else p for p in table]).reshape(len(models), 2)
        money = np.where(np.isnan(money), (tokens_in * per[:, 0] + tokens_out * per[:, 1]) / _MILLION, money)
    if np.isfinite(money).any():
        return RunCosts(money, "money")
    tokens = tokens_in + tokens_out
    return RunCosts(tokens, "tokens") if np.isfinite(tokens).any() else None


def _numbers(log: pa.Table, name: str) -> np.ndarray:
    return np.asarray(log[name].cast(pa.float64()).to_numpy(zero_copy_only=False), dtype=float)


def cell_costs(log: pa.Table, values: np.ndarray, cells: Cells) -> np.ndarray:
    """Return the mean cost of the runs of each cell, float (Q, P), NaN where it is not known.

    Args:
        log: Rows, with query_id and prompt_id.
        values: Cost of each row, float (n,).
        cells: Queries and prompts of the result.
    """
    query = {name: i for i, name in enumerate(cells.query_ids)}
    prompt = {name: i for i, name in enumerate(cells.prompt_ids)}
    q = np.array([query.get(name, -1) for name in log["query_id"].to_pylist()], dtype=np.int64)
    p = np.array([prompt.get(name, -1) for name in log["prompt_id"].to_pylist()], dtype=np.int64)
    known = (q >= 0) & (p >= 0) & np.isfinite(values)
    total = np.zeros((len(query), len(prompt)))
    count = np.zeros_like(total)
    np.add.at(total, (q[known], p[known]), values[known])
    np.add.at(count, (q[known], p[known]), 1)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
