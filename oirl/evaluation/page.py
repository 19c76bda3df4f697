"""The parts of a report's page: text that is escaped, tables, figures, and what holds them together."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

from oirl import __version__
from oirl.evaluation.details import Details
from oirl.logs.text import printable

LONGEST_NAME = 60


def whole_page(title: str, parts: Sequence[str], details: Details, best: str | None) -> str:
    """Return the whole page."""
    assets = files("oirl.evaluation") / "assets"
    style = (assets / "report.css").read_text(encoding="utf-8")
    script = (assets / "report.js").read_text(encoding="utf-8") if details.rows else ""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Nothing is fetched and no script but the one below may run, whatever stands in the replies.
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    place = details.prompts.index(best) if best in details.prompts else None
    data = json.dumps({"rows": details.rows, "best": place}, ensure_ascii=False)
    # In a script element only `</script` and `<!--` end or change the text.
    data = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    scripts = f'<script type="application/json" id="rows">{data}</script><script>{script}</script>' if script else ""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{safe_text(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{safe_text(policy)}">'
        f"<style>{style}</style></head><body><main><h1>{safe_text(title)}</h1>\n"
        + "\n".join(parts)
        + f'\n</main><footer class="small">oirl {safe_text(__version__)}</footer>{scripts}</body></html>\n'
    )


def verdict_box(sentences: Sequence[str]) -> str:
    """Return the sentences that come first, each a paragraph of HTML."""
    return '<section class="verdict">' + "".join(f"<p>{text}</p>" for text in sentences) + "</section>"


def figure_box(svg: str, caption: str, label: str) -> str:
    """Return a figure with its caption; `label` is what a screen reader says."""
    image = f'<div role="img" aria-label="{safe_text(label)}">{svg}</div>'
    return f"<figure>{image}<figcaption>{safe_text(caption)}</figcaption></figure>"


def rows_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; columns of numbers stand to the right."""
    numeric = [i > 0 and all(_looks_numeric(row[i]) for row in rows) for i in range(len(columns))]
    kinds = [' class="number"' if n else "" for n in numeric]
    head = "".join(f'<th scope="col"{kind}>{safe_text(name)}</th>' for name, kind in zip(columns, kinds, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{safe_text(c)}</td>" for c, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    where = f'<div class="scroll" tabindex="0" role="region" aria-label="{safe_text(columns[0])} table">'
    return f"{where}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _looks_numeric(text: str) -> bool:
    return not text or text.lstrip("+-[−–").replace(".", "")[:1].isdigit() or text == "–"


def safe_text(text: str) -> str:
    """Return a text as HTML, without characters that turn the order of what follows."""
    return escape(printable(text))


def short_name(name: str) -> str:
    """Return a name on one line, cut where it is a whole text."""
    line = " ".join(name.split())
    return line if len(line) <= LONGEST_NAME else line[: LONGEST_NAME - 1] + "…"


def in_bold(text: str) -> str:
    """Return a text in bold."""
    return f"<b>{safe_text(text)}</b>"


def value_words(policy: dict[str, Any]) -> str:
    """Return the value of a policy in words."""
    if policy["value"] is None:
        return "a value that this log does not tell"
    return f"{as_percent(policy['value'])} success, 95% interval {as_interval(policy['ci_low'], policy['ci_high'])}"


def gain_words(policy: dict[str, Any]) -> str:
    """Return the gain of a policy in words."""
    if policy["gain"] is None:
        return "an amount that this log does not tell"
    ends = as_interval(policy["gain_ci_low"], policy["gain_ci_high"], points=True)
    return f"{as_points(policy['gain'])} points, 95% interval {ends}"


def as_percent(value: float | None) -> str:
    """Return a share as per cent, a dash where it is not known."""
    return "–" if value is None else f"{100 * value:.1f}%"


def as_points(value: float | None) -> str:
    """Return a difference in points, with its sign."""
    return "–" if value is None else f"{100 * value:+.1f}"


def as_number(value: float | None) -> str:
    """Return a number with three digits."""
    return "–" if value is None else f"{value:.3f}"


def as_interval(low: float | None, high: float | None, *, points: bool = False) -> str:
    """Return `[low, high]`."""
    form = as_points if points else as_percent
    return "–" if low is None or high is None else f"[{form(low)}, {form(high)}]"
