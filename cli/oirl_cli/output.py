"""What commands print: one JSON document, tables for people, notes and progress on stderr."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from oirl.errors import ConfigError
from oirl.logs.text import plain_json, printable


def print_json(document: Any) -> None:
    """Print one JSON document on stdout; NaN would not be JSON, so it is an error."""
    print(json.dumps(document, ensure_ascii=False, indent=2, allow_nan=False))


def say(text: str = "") -> None:
    """Print a line on stdout; what stands in a log must not command the terminal."""
    print(printable(text))


def print_row(row: Any) -> None:
    """Print one JSON document on one line of stdout."""
    print(plain_json(json.dumps(row, ensure_ascii=False, allow_nan=False)))


def note(text: str) -> None:
    """Print a line on stderr, as `say` does on stdout."""
    print(printable(text), file=sys.stderr)


def check_report(path: Path | None) -> None:
    """Refuse a name for a page that no browser would open as one, before the work is done."""
    if path is not None and path.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--report {path}: the page is HTML; name a file that ends in .html")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout: the first column and those that hold words to the left, numbers to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        numeric = i > 0 and all(not row[i] or row[i].lstrip("+-[").replace(".", "")[:1].isdigit() for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    # Written to a file or a pipe, a table must not be cut to the width of a terminal that is not there.
    width = None if sys.stdout.isatty() else 120
    Console(width=width, highlight=False, soft_wrap=False).print(table)


def shorten(text: str, width: int = 72) -> str:
    """Return a text on one line, cut to `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def percent(value: float | None) -> str:
    """Return a share as per cent, a dash where it is not known."""
    return "–" if value is None else f"{100 * value:.1f}%"


def points(value: float | None) -> str:
    """Return a difference of shares in percentage points, with its sign."""
    return "–" if value is None else f"{100 * value:+.1f}"


def interval(low: float | None, high: float | None, form: Any = percent) -> str:
    """Return `[low, high]`."""
    return "–" if low is None or high is None else f"[{form(low)}, {form(high)}]"


@contextmanager
def working(text: str) -> Iterator[Callable[[str], None]]:
    """Show that work goes on: a spinner on a terminal, a line every five seconds otherwise.

    Yields:
        A function that takes what is being done; what oirl logs is shown the same way.
    """
    if sys.stderr.isatty():
        from rich.console import Console

        with Console(stderr=True).status(text) as status, _logged(lambda m: status.update(f"{text}: {m}")) as say:
            yield say
        return
    last = time.monotonic()

    def now_and_then(message: str) -> None:
        nonlocal last
        if time.monotonic() - last > 5:
            last = time.monotonic()
            note(f"{text}: {message}")

    with _logged(now_and_then) as say:
        yield say


@contextmanager
def _logged(say: Callable[[str], None]) -> Iterator[Callable[[str], None]]:
    logger, handler = logging.getLogger("oirl"), _Call(say)
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield say
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


class _Call(logging.Handler):
    def __init__(self, function: Callable[[str], None]) -> None:
        super().__init__()
        self._function = function

    def emit(self, record: logging.LogRecord) -> None:
        self._function(record.getMessage())
