"""The HTML page of an evaluation of a reward model of responses: on verdicts, or on preference pairs."""

from __future__ import annotations

from typing import Any

from oirl.evaluation.details import Details
from oirl.evaluation.figures import best_of_n_figure, intervals_figure, reliability_figure
from oirl.evaluation.page import (
    as_interval,
    as_number,
    as_percent,
    as_points,
    figure_box,
    in_bold,
    rows_table,
    safe_text,
    verdict_box,
    whole_page,
)
from oirl.logs.atomic import atomic_file
from oirl.logs.store import Source

_CURVES = ("best_of_n", "weighted_majority", "majority", "random", "oracle", "best_prompt")
_WORDS = {
    "random": "null: any of the responses",
    "best_prompt": "null: the response under the best single prompt of the training log",
    "best_of_n": "the response with the highest reward",
    "majority": "the answer that most responses give (self-consistency)",
    "weighted_majority": "the same, each vote weighted by the model's probability",
    "oracle": "a right response, if there is one: luck included",
}
_METHOD = {
    "Best of N": "Expected success over all subsets of N of the logged responses, by order statistics; votes are "
    "averaged over random subsets. KL = log N − (N − 1)/N.",
    "Intervals": "95%, from resamples of queries, near duplicates taken together; differences are paired.",
    "AUC within query": "How often a right response to a query has a higher reward than a wrong one to the same query.",
    "Calibration": "Observed against predicted shares in ten bins; on the diagonal 70% predicted come true in 70%.",
    "Pair accuracy": "Share of pairs whose chosen response has the higher reward, ties ½.",
}


def write_response_report(document: dict[str, Any], out: Source) -> None:
    """Write the page, whole or not at all.

    Args:
        document: `ResponseEvaluation.to_dict()` or `PreferenceEvaluation.to_dict()`.
        out: The file, which should end in .html.
    """
    with atomic_file(out) as temporary:
        temporary.write_text(render_response_report(document), encoding="utf-8")


def render_response_report(document: dict[str, Any]) -> str:
    """Return the page as text; see `write_response_report`."""
    pairs = "n_pairs" in document
    body = _preference_body(document) if pairs else _response_body(document)
    body += _calibration(document, "preference" if pairs else "success")
    if document["warnings"]:
        body.append(
            "<h2>Warnings</h2><ul>" + "".join(f"<li>{safe_text(w)}</li>" for w in document["warnings"]) + "</ul>"
        )
    shown = [f"<dt>{safe_text(name)}</dt><dd>{safe_text(text)}</dd>" for name, text in _METHOD.items()]
    body.append("<details><summary>How the figures are made</summary><dl>" + "".join(shown) + "</dl></details>")
    title = "Reward model on preference pairs" if pairs else "Reward model of responses"
    return whole_page(title, body, Details(), None)


def _response_body(d: dict[str, Any]) -> list[str]:
    m, low_high = d["model"], d["intervals"]
    verdict = [
        f"Of a right and a wrong response to one query, the model puts {in_bold(as_percent(m['auc_within_query']))} in "
        f"order (preferring the {d['null_models']['length']['prefers']} one "
        f"{as_percent(d['null_models']['length']['auc_within_query'])}, the prompt alone "
        f"{as_percent(d['null_models']['prompt']['auc_within_query'])})."
    ]
    parts = []
    if d["best_of_n"]:
        chosen = d["best_of_n"]
        best, vote = chosen["policies"]["best_of_n"], chosen["policies"]["weighted_majority"]
        verdict.append(
            f"Of {chosen['n']} responses, the one with the highest reward is right in "
            f"{in_bold(as_percent(best['value']))} of {chosen['n_queries']:,} queries, {_over(best, 'over_majority')} "
            f"points over the majority vote; a vote weighted by the model is right in "
            f"{in_bold(as_percent(vote['value']))}, {_over(vote, 'over_majority')} points over it."
        )
        sure = chosen["chosen"]
        verdict.append(
            f"To the response with the highest reward oirl rank gives a score of {as_percent(sure['score'])}, on "
            f"average; it is right in {as_percent(sure['success'])} {as_interval(sure['ci_low'], sure['ci_high'])}."
        )
        parts = _best_of_n(chosen)
    rows = [[name, as_number(value), _ends(low_high.get(name))] for name, value in m.items()]
    return [verdict_box(verdict), *parts, "<h2>Metrics</h2>", rows_table(["metric", "value", "95% interval"], rows)]


def _best_of_n(chosen: dict[str, Any]) -> list[str]:
    policies = chosen["policies"]
    names = [name for name in _CURVES if name in policies]
    rows = [
        [
            name,
            as_percent(p["value"]),
            as_interval(p["ci_low"], p["ci_high"]),
            as_points(p["over_majority"]),
            as_interval(p["over_majority_ci_low"], p["over_majority_ci_high"], points=True),
            _WORDS[name],
        ]
        for name, p in policies.items()
    ]
    columns = ["choice", "success", "95% interval", "over majority (points)", "95% interval ", "what it is"]
    fit = chosen["over_optimisation"]
    bend = ""
    if fit:
        bend = f" Fitted: gain = d (α − β d), d = √KL, α {fit['alpha']:.3f}, β {fit['beta']:.3f} (Gao et al. 2022)."
    return [
        f"<h2>Choosing among {chosen['n']} responses</h2>",
        rows_table(columns, rows),
        figure_box(
            best_of_n_figure(chosen["curve"], names),
            f"Success by N, with 95% bands; answers read as {chosen['answers']}.{bend}",
            "success of best-of-N, votes and nulls by KL",
        ),
    ]


def _preference_body(d: dict[str, Any]) -> list[str]:
    m, null = d["model"], d["null_models"]["length"]
    verdict = [
        f"The chosen response has the higher reward in {in_bold(as_percent(m['pair_accuracy']))} of {d['n_pairs']:,} "
        f"pairs, 95% interval {as_interval(m['ci_low'], m['ci_high'])}.",
        f"Preferring the {null['prefers']} response is right in {as_percent(null['pair_accuracy'])}; the model's "
        f"difference to that is {_over(null, 'gain')} points{_shown_or_not(null)}.",
    ]
    parts = [verdict_box(verdict)]
    for title, key in (
        ("Accuracy by margin", "by_margin"),
        ("Accuracy by difference of length", "by_length_difference"),
    ):
        if d[key]:
            points = [(f"{b['low']:g} to {b['high']:g}", b["pair_accuracy"], b["ci_low"], b["ci_high"]) for b in d[key]]
            drawn = intervals_figure(
                points, name=key.replace("_", "-"), label="pair accuracy (%)", lines=[("coin", 0.5)]
            )
            parts += [f"<h2>{title}</h2>", figure_box(drawn, "Quarters of the pairs, with 95% intervals.", title)]
    if d["subsets"]:
        rows = [
            [name, f"{s['n_pairs']:,}", as_percent(s["pair_accuracy"]), as_interval(s["ci_low"], s["ci_high"])]
            for name, s in d["subsets"]["subsets"].items()
        ]
        table = rows_table(["subset", "pairs", "pair accuracy", "95% interval"], rows)
        parts += ["<h2>Subsets</h2>", table, f"<p>Mean over subsets: {as_percent(d['subsets']['mean'])}.</p>"]
    return parts


def _calibration(d: dict[str, Any], what: str) -> list[str]:
    if not d["reliability"]:
        return []
    caption = f"Observed against predicted {what}; ECE {as_number(d['model']['ece'])}."
    return ["<h2>Calibration</h2>", figure_box(reliability_figure(d["reliability"]), caption, f"calibration of {what}")]


def _shown_or_not(null: dict[str, Any]) -> str:
    if null["gain_ci_high"] < 0:
        return ": these pairs show that it knows less than length alone"
    return "" if null["gain_ci_low"] > 0 else ": these pairs do not show that it knows more than length"


def _over(figures: dict[str, Any], name: str) -> str:
    ends = as_interval(figures[f"{name}_ci_low"], figures[f"{name}_ci_high"], points=True)
    return f"{as_points(figures[name])} {ends}"


def _ends(ends: list[float] | None) -> str:
    return "–" if ends is None else f"[{as_number(ends[0])}, {as_number(ends[1])}]"
