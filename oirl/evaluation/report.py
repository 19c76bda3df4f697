"""One self-contained HTML page of an evaluation or an audit: no network, no foreign code, all text escaped."""

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
from oirl.evaluation.figures import cost_figure, gain_curve_figure, intervals_figure, reliability_figure
from oirl.logs.atomic import atomic_file
from oirl.logs.store import Source
from oirl.logs.text import printable

_WORDS = {
    "best_prompt": "the best single prompt of the training log",
    "selector": "the prompt per query that the reward model would choose",
    "deployed": "what oirl select does, as the gate decided at fit time",
    "knn": "null: the prompt that did best on the 50 most similar training queries",
    "random": "null: any prompt",
}
_LONGEST_NAME, _MOST_IN_FIGURE, _MOST_PAIRS = 60, 40, 50
_METHOD = {
    "Success of a prompt": "Mean over queries of the mean over its runs. The 95% interval is Wilson's, for as many "
    "tries as the standard error, clustered by near duplicates, stands for.",
    "Value of a policy": "What the policy would reach on these queries. By replay where enough queries were run under "
    "every prompt: exact. Else by the off-policy estimator that the log allows; its name stands in the table.",
    "Gain": "Value less that of the best single prompt of the training log, paired by query. The interval is a "
    "bootstrap over queries, near duplicates taken together.",
    "Ceiling": "The value of the best choice per query, luck left out: chosen by all runs of a query but one, scored "
    "on the run left out, and extrapolated to many runs.",
    "Hindsight": "How often one run of every prompt holds a right one. It counts luck as merit: no policy reaches it.",
    "AUC, Brier skill, ECE": "How well predicted success orders runs; how much better it is than each prompt's mean "
    "(0 = not); how far it is from the observed shares.",
    "Calibration": "Observed against predicted success in ten bins; on the diagonal 70% predicted come true in 70%.",
    "Gain curve": "Queries are ordered by predicted gain; the curve is the gain over all queries if the first so many "
    "are switched to the prompt with the highest score, and all others get the best single prompt.",
    "Told apart": "Paired differences on shared queries, clustered, at 5% after Holm's correction for all pairs.",
    "Smallest detectable gain": "2.80 standard errors of the paired difference of the two best prompts: found with 80% "
    "power at 5%, two-sided.",
}
_OF_EVALUATIONS = {"Value of a policy", "Gain", "AUC, Brier skill, ECE", "Calibration", "Gain curve"}
_OF_AUDITS = {"Told apart", "Smallest detectable gain"}
_MODEL = {
    "auc": "AUC: a right run is scored above a wrong one",
    "auc_within_prompt": "AUC among runs of one prompt: tells queries apart",
    "auc_within_query": "AUC among runs of one query: tells prompts apart, which a choice needs",
    "brier": "Brier score (smaller is better)",
    "brier_skill": "Brier skill against each prompt's mean",
    "ece": "expected calibration error",
    "log_loss": "log loss in nats (smaller is better)",
}
_HEALTH = {
    "duplicates": {
        "exact": "queries with another of the same text",
        "near": "further near duplicates",
        "groups": "unlike queries",
        "repeated_replies": "replies that repeat an earlier one",
    },
    "leaks": {"exact": "queries on several sides of the split", "near": "further ones with a near duplicate there"},
    "coverage": {
        "missing": "cells (query and prompt) never run",
        "complete_queries": "queries run under every prompt",
        "one_prompt_queries": "queries run under one prompt",
        "rows_without_verdict": "rows without a verdict",
    },
    "replicates": {"cells": "cells run more than once"},
    "labels": {"regraded": "verdicts checked by a careful reading", "changed": "of them changed"},
    "cut_off": {"cut_off": "replies cut off by a limit", "end_midway": "long replies that end in mid-sentence"},
}


def write_report(document: dict[str, Any], details: Details, out: Source) -> None:
    """Write the page of an evaluation or an audit, whole or not at all.

    Args:
        document: `Evaluation.to_dict()` or `Audit.to_dict()`.
        details: What `oirl.evaluation.details` gives for the same log.
        out: The file, which should end in .html.
    """
    with atomic_file(out) as temporary:
        temporary.write_text(render_report(document, details), encoding="utf-8")


def render_report(document: dict[str, Any], details: Details) -> str:
    """Return the page as text; see `write_report`."""
    evaluation = "policies" in document
    title = "Evaluation of prompts" if evaluation else "Audit of an evaluation log"
    body = _evaluation_body(document, details) if evaluation else _audit_body(document)
    best = document["policies"]["best_prompt"].get("prompt_id") if evaluation else None
    shown = [*body, *_table(details, best), *_warnings(document["warnings"]), *_method(evaluation)]
    return _page(title, shown, details, best)


def _evaluation_body(d: dict[str, Any], details: Details) -> list[str]:
    policies, ceiling, deploy = d["policies"], d["ceiling"], d["deploy"]
    selector = policies["selector"]
    best = policies["best_prompt"]
    deployed = "the choice per query" if deploy["policy"] == "selector" else _id(best["prompt_id"])
    verdict = [
        f"The best single prompt is {_b(_id(best['prompt_id']))}: {_value(best)}.",
        f"Choosing the prompt per query gives {_value(selector)}, a gain of {_gain(selector)}.",
        f"Deployed: {_b(deployed)}, because {_text(deploy['reason'])}.",
    ]
    known = [(n, p) for n, p in policies.items() if p["value"] is not None]
    lines = [("ceiling", ceiling["value"])] if ceiling["value"] is not None else []
    parts = [_verdict(verdict), *_prompts(d)]
    parts += ["<h2>What policies would reach</h2>"]
    if known:
        figure = intervals_figure(
            [(n, p["value"], p["ci_low"], p["ci_high"]) for n, p in known],
            name="policies",
            label="success (%)",
            lines=lines,
        )
        parts.append(
            _figure(figure, "Values of policies with 95% intervals.", "Success of each policy with its interval")
        )
    parts.append(
        _rows(
            ["policy", "what it is", "success", "95% interval", "gain (points)", "95% interval", "estimator"],
            [
                [
                    name,
                    _WORDS.get(name, ""),
                    _percent(p["value"]),
                    _interval(p["ci_low"], p["ci_high"]),
                    _points(p["gain"]),
                    _interval(p["gain_ci_low"], p["gain_ci_high"], points=True),
                    p["estimator"],
                ]
                for name, p in policies.items()
            ],
        )
    )
    parts += _off_policy(d.get("off_policy"))
    parts.append(_ceiling(ceiling))
    parts += _self_check(d.get("self_check"))
    parts += _choosing(d, details)
    if d.get("cost"):
        parts += _cost(d["cost"], best["prompt_id"])
    m, null = d["model"], d["null_model"]
    parts += ["<h2>The reward model</h2>"]
    parts.append(
        _rows(
            ["figure", "reward model", "prompt means alone"],
            [[_MODEL.get(name, name), _number(m[name]), _number(null[name])] for name in m],
        )
    )
    if details.reliability:
        parts.append(
            _figure(reliability_figure(details.reliability), "Calibration.", "Observed against predicted success")
        )
    return parts


def _off_policy(found: dict[str, Any] | None) -> list[str]:
    """Return where values come from if not from replay."""
    if not found:
        return []
    names = list(dict.fromkeys(e for row in found["estimates"].values() for e in row))
    said = f"<p>Values are estimated from runs that another policy chose: {_text(found['reason'])}.</p>"
    rows = [
        [
            name,
            *(_percent(row.get(e)) for e in names),
            f"{found['support'][name]['effective_sample_size']:,.0f}",
            _percent(found["support"][name]["largest_weight"]),
            _percent(found["support"][name]["unsupported_share"]),
        ]
        for name, row in found["estimates"].items()
    ]
    return [said, _rows(["policy", *names, "effective queries", "largest weight", "never run"], rows)]


def _self_check(check: dict[str, Any] | None) -> list[str]:
    """Return how far each estimator was off when the log was thinned."""
    if not check:
        return []
    rows = [
        [
            e["policy"],
            e["estimator"],
            _points(e["mean_error"]),
            f"{100 * e['rmse']:.2f}",
            f"{100 * e['half_width']:.2f}",
            _percent(e["covered"]),
        ]
        for e in check["errors"]
    ]
    return [
        "<h2>Self-check of the estimators</h2>",
        f"<p>{check['n_queries']:,} complete queries were thinned {check['repeats']} times to one run each "
        f"({_text(check['logger'])}); errors against the value of all runs, in points.</p>",
        _rows(["policy", "estimator", "mean error", "RMSE", "half width", "intervals that hold the truth"], rows),
    ]


def _choosing(d: dict[str, Any], details: Details) -> list[str]:
    """Return where the selector switches, and what that brings."""
    parts = ["<h2>Where choosing pays</h2>"]
    if not details.gain_curve:
        return [*parts, "<p>Too few queries were run under every prompt to say.</p>"]
    switched = d["policies"]["selector"].get("switched")
    text = "Gain if the queries with the largest predicted gain are switched, with a 95% band; dashed: the selector."
    parts.append(_figure(gain_curve_figure(details.gain_curve, switched), text, "Gain by share of queries switched"))
    if not details.switches:
        return [*parts, "<p>The selector switches no query.</p>"]
    return [
        *parts,
        _rows(
            ["switched to", "queries", "gain on them (points)", "95% interval", "words that stand out in them"],
            [
                [
                    _id(s["prompt_id"]),
                    f"{s['queries']:,}",
                    _points(s["gain"]),
                    _interval(s["ci_low"], s["ci_high"], points=True),
                    ", ".join(s["words"]) or "–",
                ]
                for s in details.switches
            ],
        ),
    ]


def _cost(cost: dict[str, Any], best: str) -> list[str]:
    caption = "Success against cost as thrift grows; filled where choosing per query is deployed. Intervals are 95%."
    said = [
        f"<li>Thrift set on the training log to keep {_percent(c['target'])} of what {_text(_id(best))} has over "
        f"{_text(_id(cost['cheapest_prompt']))} keeps {_percent(c['gap_recovered'])} here, at "
        f"{_percent(c['cost_ratio'])} of its cost.</li>"
        for c in cost["calibrated"]
    ]
    return [
        "<h2>Cost</h2>",
        _rows(
            ["policy", f"mean cost per query ({cost['unit']})"],
            [[name, f"{value:.4g}"] for name, value in cost["policies"].items()],
        ),
        _figure(cost_figure(cost["curve"], cost["unit"]), caption, "Success against cost"),
        f"<ul>{''.join(said)}</ul>",
    ]


def _audit_body(d: dict[str, Any]) -> list[str]:
    parts = [_verdict([_text(sentence) for sentence in d["verdict"]]), *_prompts(d)]
    if d["ceiling"]:
        parts.append(_ceiling(d["ceiling"]))
    alike = [c for c in d["comparisons"] if not c["told_apart"]]
    if d["comparisons"]:
        parts.append(f"<h2>Prompts that cannot be told apart: {len(alike)} of {len(d['comparisons'])} pairs</h2>")
        if len(alike) > _MOST_PAIRS:
            parts.append(f'<p class="small">The {_MOST_PAIRS} least sure are shown.</p>')
        parts.append(
            _rows(
                ["better", "other", "difference (points)", "queries", "p"],
                [
                    [
                        _id(c["first"]),
                        _id(c["second"]),
                        f"{100 * c['difference']:+.1f} ± {196 * c['standard_error']:.1f}",
                        f"{c['n_queries']:,}",
                        f"{c['p_value']:.3f}",
                    ]
                    for c in alike[:_MOST_PAIRS]
                ],
            )
        )
    return [*parts, "<h2>The log</h2>", _rows(["what", "how many"], _health(d))]


def _health(d: dict[str, Any]) -> list[list[str]]:
    found = [["rows", f"{d['n_rows']:,}"], ["queries", f"{d['n_queries']:,}"], ["prompts", f"{d['n_prompts']:,}"]]
    for group, labels in _HEALTH.items():
        found += [[text, f"{d[group][key]:,}"] for key, text in labels.items() if d[group].get(key) is not None]
    agreement = d["replicates"].get("agreement")
    return [*found, ["agreement of two runs of a cell", _percent(agreement)]]


def _prompts(d: dict[str, Any]) -> list[str]:
    rows = d["prompts"]
    if not rows:
        return []
    figure = intervals_figure(
        [(p["prompt_id"], p["success"], p["ci_low"], p["ci_high"]) for p in rows[:_MOST_IN_FIGURE]],
        name="prompts",
        label="success (%)",
    )
    table = _rows(
        ["prompt", "runs", "queries", "success", "95% interval"],
        [
            [
                _id(p["prompt_id"]),
                f"{p['n']:,}",
                f"{p['n_queries']:,}",
                _percent(p["success"]),
                _interval(p["ci_low"], p["ci_high"]),
            ]
            for p in rows
        ],
    )
    caption = "Success of each prompt with its 95% interval."
    if len(rows) > _MOST_IN_FIGURE:
        caption += f" The first {_MOST_IN_FIGURE} of {len(rows)}; the table has all."
    return ["<h2>Prompts</h2>", _figure(figure, caption, caption), table]


def _ceiling(c: dict[str, Any]) -> str:
    if c.get("one_draw_oracle") is None:
        return f"<p>Ceiling of a choice per query: {_text(c['method'])}.</p>"
    return (
        f"<p>Ceiling of a choice per query: {_percent(c['value'])} {_interval(c['ci_low'], c['ci_high'])} on "
        f"{c['n_queries']:,} queries ({_text(c['method'])}). One run of every prompt in hindsight: "
        f"{_percent(c['one_draw_oracle'])}, luck included.</p>"
    )


def _table(details: Details, best: str | None) -> list[str]:
    if not details.rows:
        return []
    heads = "".join(
        f'<th scope="col"><button type="button" data-sort="{i}">{_text(_id(name))}</button></th>'
        for i, name in enumerate(details.prompts)
    )
    n = len(details.rows)
    sample = f"A random sample of {n} of {details.n_queries:,} queries." if n < details.n_queries else "All queries."
    switched = '<option value="switched">the selector switches</option>' if best else ""
    if len(details.prompts) < details.n_prompts:
        sample += f" The best {len(details.prompts)} of {details.n_prompts} prompts; filters look at these only."
    shaded = " A shaded cell is what the selector takes." if best else ""
    return [
        "<h2>Replies side by side</h2>",
        f'<p class="small">{sample} Each cell opens to the first reply, cut where it is long.{shaded}</p>',
        '<div class="tools"><label>Search <input id="search" type="search" autocomplete="off"></label>'
        '<label>Show <select id="filter"><option value="all">all</option><option value="disagree">prompts disagree'
        f'</option><option value="wrong">all prompts wrong</option>{switched}</select></label>'
        '<button type="button" id="previous">previous</button><button type="button" id="next">next</button>'
        '<span id="count" role="status"></span></div>',
        '<div class="scroll" tabindex="0" role="region" aria-label="Replies side by side"><table id="table"><thead><tr>'
        f'<th scope="col"><button type="button" data-sort="query">query</button></th>{heads}</tr></thead>'
        '<tbody id="table-body"></tbody></table></div><noscript><p>The table needs JavaScript.</p></noscript>',
    ]


def _warnings(warnings: Sequence[str]) -> list[str]:
    if not warnings:
        return ["<h2>Warnings</h2>", "<p>None.</p>"]
    items = "".join(f"<li>{_text(text)}</li>" for text in warnings)
    return ["<h2>Warnings</h2>", f'<ul class="warnings">{items}</ul>']


def _method(evaluation: bool) -> list[str]:
    left_out = _OF_AUDITS if evaluation else _OF_EVALUATIONS
    items = "".join(f"<dt>{_text(w)}</dt><dd>{_text(t)}</dd>" for w, t in _METHOD.items() if w not in left_out)
    return ["<h2>Method</h2>", f"<dl>{items}</dl>"]


def _page(title: str, parts: Sequence[str], details: Details, best: str | None) -> str:
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
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_text(policy)}">'
        f"<style>{style}</style></head><body><main><h1>{_text(title)}</h1>\n"
        + "\n".join(parts)
        + f'\n</main><footer class="small">oirl {_text(__version__)}</footer>{scripts}</body></html>\n'
    )


def _verdict(sentences: Sequence[str]) -> str:
    return '<section class="verdict">' + "".join(f"<p>{text}</p>" for text in sentences) + "</section>"


def _figure(svg: str, caption: str, label: str) -> str:
    image = f'<div role="img" aria-label="{_text(label)}">{svg}</div>'
    return f"<figure>{image}<figcaption>{_text(caption)}</figcaption></figure>"


def _rows(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    numeric = [i > 0 and all(_looks_numeric(row[i]) for row in rows) for i in range(len(columns))]
    kinds = [' class="number"' if n else "" for n in numeric]
    head = "".join(f'<th scope="col"{kind}>{_text(name)}</th>' for name, kind in zip(columns, kinds, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{_text(c)}</td>" for c, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    where = f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(columns[0])} table">'
    return f"{where}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _looks_numeric(text: str) -> bool:
    return not text or text.lstrip("+-[−–").replace(".", "")[:1].isdigit() or text == "–"


def _text(text: str) -> str:
    """Return a text as HTML, without characters that turn the order of what follows."""
    return escape(printable(text))


def _id(name: str) -> str:
    """Return a name on one line, cut where it is a whole text."""
    line = " ".join(name.split())
    return line if len(line) <= _LONGEST_NAME else line[: _LONGEST_NAME - 1] + "…"


def _b(text: str) -> str:
    return f"<b>{_text(text)}</b>"


def _value(policy: dict[str, Any]) -> str:
    if policy["value"] is None:
        return "a value that this log does not tell"
    return f"{_percent(policy['value'])} success, 95% interval {_interval(policy['ci_low'], policy['ci_high'])}"


def _gain(policy: dict[str, Any]) -> str:
    if policy["gain"] is None:
        return "an amount that this log does not tell"
    ends = _interval(policy["gain_ci_low"], policy["gain_ci_high"], points=True)
    return f"{_points(policy['gain'])} points, 95% interval {ends}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def _points(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:+.1f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _interval(low: float | None, high: float | None, *, points: bool = False) -> str:
    form = _points if points else _percent
    return "–" if low is None or high is None else f"[{form(low)}, {form(high)}]"
