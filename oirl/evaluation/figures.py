"""Figures of a report as SVG text, drawn with matplotlib; their colours are variables of the page's style sheet."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from oirl.logs.text import printable

_COLOURS = {"#101010": "var(--ink)", "#205090": "var(--accent)", "#808080": "var(--muted)", "#b04010": "var(--mark)"}
_INK, _ACCENT, _MUTED, _MARK = _COLOURS
_ROW_HEIGHT = 0.32


def intervals_figure(
    rows: Sequence[tuple[str, float, float, float]],
    *,
    name: str,
    label: str,
    lines: Sequence[tuple[str, float]] = (),
    form: Callable[[float], float] = lambda x: 100 * x,
) -> str:
    """Return points with their intervals, a row each.

    Args:
        rows: Label, value, low, high; the first is on top.
        name: Of the figure, part of its ids.
        label: Of the axis.
        lines: Label and place of vertical lines, such as the ceiling.
        form: From values to what the axis shows.
    """

    def draw(axes: Any) -> None:
        at = range(len(rows))
        values = [form(row[1]) for row in rows]
        ends = [[form(row[1]) - form(row[2]) for row in rows], [form(row[3]) - form(row[1]) for row in rows]]
        axes.errorbar(values, list(at), xerr=ends, fmt="o", color=_ACCENT, ecolor=_ACCENT, capsize=3, markersize=5)
        axes.set_yticks(list(at), [_shorten(row[0]) for row in rows])
        axes.invert_yaxis()
        axes.set_xlabel(label)
        for text, place in lines:
            axes.axvline(form(place), color=_MARK, linestyle="--", linewidth=1)
            axes.annotate(text, (form(place), -0.6), color=_MARK, fontsize=8, ha="center", annotation_clip=False)

    return _svg(draw, name, height=1.0 + _ROW_HEIGHT * len(rows))


def reliability_figure(bins: Sequence[dict[str, Any]]) -> str:
    """Return observed against predicted success, with intervals and the diagonal."""

    def draw(axes: Any) -> None:
        x, y = [100 * b["predicted"] for b in bins], [100 * b["observed"] for b in bins]
        below = [100 * (b["observed"] - b["ci_low"]) for b in bins]
        above = [100 * (b["ci_high"] - b["observed"]) for b in bins]
        axes.plot([0, 100], [0, 100], color=_MUTED, linestyle="--", linewidth=1)
        axes.errorbar(x, y, yerr=[below, above], fmt="o-", color=_ACCENT, ecolor=_ACCENT, capsize=3, markersize=5)
        axes.set_xlabel("predicted success (%)")
        axes.set_ylabel("observed (%)")
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 100)

    return _svg(draw, "reliability", height=3.6)


def best_of_n_figure(curve: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """Return what each way of choosing among N is worth, by KL = log N − (N − 1)/N, with bands; N stands on top.

    Args:
        curve: Rows with `n`, `kl`, and for each name its value and interval.
        names: The ways to draw, two with a band first.
    """
    styles = [(_ACCENT, "-"), (_MARK, "-"), (_INK, "-"), (_MUTED, "--"), (_MUTED, ":"), (_MUTED, "-.")]

    def draw(axes: Any) -> None:
        x = [row["kl"] for row in curve]
        for i, (name, (colour, style)) in enumerate(zip(names, styles, strict=False)):
            axes.plot(x, [100 * r[name]["value"] for r in curve], color=colour, linestyle=style, label=name)
            if i < 3:
                low, high = ([100 * r[name][end] for r in curve] for end in ("ci_low", "ci_high"))
                axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_xlabel("KL of the best of N from the policy (nats, if no rewards tie)")
        axes.set_ylabel("success (%)")
        axes.legend(frameon=False, labelcolor=_INK, fontsize=8)
        top = axes.secondary_xaxis("top")
        marked = [row for row in curve if row["n"] & (row["n"] - 1) == 0]
        top.set_xticks([row["kl"] for row in marked], [f"N = {row['n']}" for row in marked])
        top.tick_params(colors=_INK)
        top.spines["top"].set_visible(False)

    return _svg(draw, "best-of-n", height=4.2)


def gain_curve_figure(curve: Sequence[dict[str, Any]], switched: float | None) -> str:
    """Return the gain by the share of queries switched, with its band, and where the selector stands."""

    def draw(axes: Any) -> None:
        x = [100 * c["share"] for c in curve]
        low, high = [100 * c["ci_low"] for c in curve], [100 * c["ci_high"] for c in curve]
        axes.fill_between(x, low, high, color=_ACCENT, alpha=0.2, linewidth=0)
        axes.plot(x, [100 * c["gain"] for c in curve], color=_ACCENT)
        axes.axhline(0, color=_MUTED, linewidth=1)
        if switched is not None:
            axes.axvline(100 * switched, color=_MARK, linestyle="--", linewidth=1)
        axes.set_xlabel("queries switched, those with the largest predicted gain first (%)")
        axes.set_ylabel("gain (points)")

    return _svg(draw, "gain", height=3.2)


def cost_figure(curve: Sequence[dict[str, Any]], unit: str) -> str:
    """Return success against cost of the calibrated weights, with intervals; filled where choosing is deployed."""

    def draw(axes: Any) -> None:
        for point in curve:
            chosen = point["deploy"] == "selector"
            ends = [[100 * (point["value"] - point["ci_low"])], [100 * (point["ci_high"] - point["value"])]]
            face = _ACCENT if chosen else "none"
            axes.errorbar(
                [point["cost"]],
                [100 * point["value"]],
                yerr=ends,
                fmt="o",
                color=_ACCENT,
                markerfacecolor=face,
                capsize=2,
            )
        axes.set_xlabel(f"mean cost per query ({unit})")
        axes.set_ylabel("success (%)")

    return _svg(draw, "cost", height=3.2)


def _svg(draw: Callable[[Any], None], name: str, height: float) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # Text stays text, so that it can be searched and takes the page's font; the salt keeps ids of figures apart.
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": f"oirl-{name}", "text.parse_math": False}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the page's font draws what matplotlib's lacks
        figure = Figure(figsize=(7.0, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for spine in axes.spines.values():
            spine.set_color(_MUTED)
        axes.tick_params(colors=_INK)
        axes.xaxis.label.set_color(_INK)
        axes.yaxis.label.set_color(_INK)
        draw(axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    for colour, variable in _COLOURS.items():
        text = text.replace(colour, variable)
    # Several figures stand in one page, where an id must be one of its kind.
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return re.sub(r'(<svg[^>]*?) height="[^"]*"([^>]*?) width="[^"]*"', r"\1\2", text)


def _shorten(text: str) -> str:
    line = " ".join(printable(text).split())
    return line if len(line) <= 28 else line[:27] + "…"
