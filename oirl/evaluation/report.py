"""One self-contained HTML page of an evaluation or an audit: no network, no foreign code, all text escaped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from oirl.evaluation.details import Details
from oirl.evaluation.figures import cost_figure, gain_curve_figure, intervals_figure, reliability_figure
from oirl.evaluation.page import (
    as_interval,
    as_number,
    as_percent,
    as_points,
    figure_box,
    gain_words,
    in_bold,
    rows_table,
    safe_text,
    short_name,
    value_words,
    verdict_box,
    whole_page,
)
from oirl.logs.atomic import atomic_file
from oirl.logs.store import Source

_WORDS = {
    "best_prompt": "the best single prompt of the training log",
    "selector": "the prompt per query that the reward model would choose",
    "deployed": "what oirl select does, as the gate decided at fit time",
    "knn": "null: the prompt that did best on the 50 most similar training queries",
    "random": "null: any prompt",
}
_MOST_IN_FIGURE, _MOST_PAIRS = 40, 50
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
    return whole_page(title, shown, details, best)


def _evaluation_body(d: dict[str, Any], details: Details) -> list[str]:
    policies, ceiling, deploy = d["policies"], d["ceiling"], d["deploy"]
    selector = policies["selector"]
    best = policies["best_prompt"]
    deployed = "the choice per query" if deploy["policy"] == "selector" else short_name(best["prompt_id"])
    verdict = [
        f"The best single prompt is {in_bold(short_name(best['prompt_id']))}: {value_words(best)}.",
        f"Choosing the prompt per query gives {value_words(selector)}, a gain of {gain_words(selector)}.",
        f"Deployed: {in_bold(deployed)}, because {safe_text(deploy['reason'])}.",
    ]
    known = [(n, p) for n, p in policies.items() if p["value"] is not None]
    lines = [("ceiling", ceiling["value"])] if ceiling["value"] is not None else []
    parts = [verdict_box(verdict), *_prompts(d)]
    parts += ["<h2>What policies would reach</h2>"]
    if known:
        figure = intervals_figure(
            [(n, p["value"], p["ci_low"], p["ci_high"]) for n, p in known],
            name="policies",
            label="success (%)",
            lines=lines,
        )
        parts.append(
            figure_box(figure, "Values of policies with 95% intervals.", "Success of each policy with its interval")
        )
    parts.append(
        rows_table(
            ["policy", "what it is", "success", "95% interval", "gain (points)", "95% interval", "estimator"],
            [
                [
                    name,
                    _WORDS.get(name, ""),
                    as_percent(p["value"]),
                    as_interval(p["ci_low"], p["ci_high"]),
                    as_points(p["gain"]),
                    as_interval(p["gain_ci_low"], p["gain_ci_high"], points=True),
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
        rows_table(
            ["figure", "reward model", "prompt means alone"],
            [[_MODEL.get(name, name), as_number(m[name]), as_number(null[name])] for name in m],
        )
    )
    if details.reliability:
        parts.append(
            figure_box(reliability_figure(details.reliability), "Calibration.", "Observed against predicted success")
        )
    return parts


def _off_policy(found: dict[str, Any] | None) -> list[str]:
    """Return where values come from if not from replay."""
    if not found:
        return []
    names = list(dict.fromkeys(e for row in found["estimates"].values() for e in row))
    said = f"<p>Values are estimated from runs that another policy chose: {safe_text(found['reason'])}.</p>"
    rows = [
        [
            name,
            *(as_percent(row.get(e)) for e in names),
            f"{found['support'][name]['effective_sample_size']:,.0f}",
            as_percent(found["support"][name]["largest_weight"]),
            as_percent(found["support"][name]["unsupported_share"]),
        ]
        for name, row in found["estimates"].items()
    ]
    return [said, rows_table(["policy", *names, "effective queries", "largest weight", "never run"], rows)]


def _self_check(check: dict[str, Any] | None) -> list[str]:
    """Return how far each estimator was off when the log was thinned."""
    if not check:
        return []
    rows = [
        [
            e["policy"],
            e["estimator"],
            as_points(e["mean_error"]),
            f"{100 * e['rmse']:.2f}",
            f"{100 * e['half_width']:.2f}",
            as_percent(e["covered"]),
        ]
        for e in check["errors"]
    ]
    return [
        "<h2>Self-check of the estimators</h2>",
        f"<p>{check['n_queries']:,} complete queries were thinned {check['repeats']} times to one run each "
        f"({safe_text(check['logger'])}); errors against the value of all runs, in points.</p>",
        rows_table(["policy", "estimator", "mean error", "RMSE", "half width", "intervals that hold the truth"], rows),
    ]


def _choosing(d: dict[str, Any], details: Details) -> list[str]:
    """Return where the selector switches, and what that brings."""
    parts = ["<h2>Where choosing pays</h2>"]
    if not details.gain_curve:
        return [*parts, "<p>Too few queries were run under every prompt to say.</p>"]
    switched = d["policies"]["selector"].get("switched")
    text = "Gain if the queries with the largest predicted gain are switched, with a 95% band; dashed: the selector."
    parts.append(figure_box(gain_curve_figure(details.gain_curve, switched), text, "Gain by share of queries switched"))
    if not details.switches:
        return [*parts, "<p>The selector switches no query.</p>"]
    return [
        *parts,
        rows_table(
            ["switched to", "queries", "gain on them (points)", "95% interval", "words that stand out in them"],
            [
                [
                    short_name(s["prompt_id"]),
                    f"{s['queries']:,}",
                    as_points(s["gain"]),
                    as_interval(s["ci_low"], s["ci_high"], points=True),
                    ", ".join(s["words"]) or "–",
                ]
                for s in details.switches
            ],
        ),
    ]


def _cost(cost: dict[str, Any], best: str) -> list[str]:
    caption = "Success against cost as thrift grows; filled where choosing per query is deployed. Intervals are 95%."
    gap = f"{safe_text(short_name(best))} has over {safe_text(short_name(cost['cheapest_prompt']))}"
    said = [
        f"<li>Thrift set on the training log to keep {as_percent(c['target'])} of what {gap} keeps "
        f"{as_percent(c['gap_recovered'])} here, at "
        f"{as_percent(c['cost_ratio'])} of its cost.</li>"
        for c in cost["calibrated"]
    ]
    return [
        "<h2>Cost</h2>",
        rows_table(
            ["policy", f"mean cost per query ({cost['unit']})"],
            [[name, f"{value:.4g}"] for name, value in cost["policies"].items()],
        ),
        figure_box(cost_figure(cost["curve"], cost["unit"]), caption, "Success against cost"),
        f"<ul>{''.join(said)}</ul>",
    ]


def _audit_body(d: dict[str, Any]) -> list[str]:
    parts = [verdict_box([safe_text(sentence) for sentence in d["verdict"]]), *_prompts(d)]
    if d["ceiling"]:
        parts.append(_ceiling(d["ceiling"]))
    alike = [c for c in d["comparisons"] if not c["told_apart"]]
    if d["comparisons"]:
        parts.append(f"<h2>Prompts that cannot be told apart: {len(alike)} of {len(d['comparisons'])} pairs</h2>")
        if len(alike) > _MOST_PAIRS:
            parts.append(f'<p class="small">The {_MOST_PAIRS} least sure are shown.</p>')
        parts.append(
            rows_table(
                ["better", "other", "difference (points)", "queries", "p"],
                [
                    [
                        short_name(c["first"]),
                        short_name(c["second"]),
                        f"{100 * c['difference']:+.1f} ± {196 * c['standard_error']:.1f}",
                        f"{c['n_queries']:,}",
                        f"{c['p_value']:.3f}",
                    ]
                    for c in alike[:_MOST_PAIRS]
                ],
            )
        )
    return [*parts, "<h2>The log</h2>", rows_table(["what", "how many"], _health(d))]


def _health(d: dict[str, Any]) -> list[list[str]]:
    found = [["rows", f"{d['n_rows']:,}"], ["queries", f"{d['n_queries']:,}"], ["prompts", f"{d['n_prompts']:,}"]]
    for group, labels in _HEALTH.items():
        found += [[text, f"{d[group][key]:,}"] for key, text in labels.items() if d[group].get(key) is not None]
    agreement = d["replicates"].get("agreement")
    return [*found, ["agreement of two runs of a cell", as_percent(agreement)]]


def _prompts(d: dict[str, Any]) -> list[str]:
    rows = d["prompts"]
    if not rows:
        return []
    figure = intervals_figure(
        [(p["prompt_id"], p["success"], p["ci_low"], p["ci_high"]) for p in rows[:_MOST_IN_FIGURE]],
        name="prompts",
        label="success (%)",
    )
    table = rows_table(
        ["prompt", "runs", "queries", "success", "95% interval"],
        [
            [
                short_name(p["prompt_id"]),
                f"{p['n']:,}",
                f"{p['n_queries']:,}",
                as_percent(p["success"]),
                as_interval(p["ci_low"], p["ci_high"]),
            ]
            for p in rows
        ],
    )
    caption = "Success of each prompt with its 95% interval."
    if len(rows) > _MOST_IN_FIGURE:
        caption += f" The first {_MOST_IN_FIGURE} of {len(rows)}; the table has all."
    return ["<h2>Prompts</h2>", figure_box(figure, caption, caption), table]


def _ceiling(c: dict[str, Any]) -> str:
    if c.get("one_draw_oracle") is None:
        return f"<p>Ceiling of a choice per query: {safe_text(c['method'])}.</p>"
    return (
        f"<p>Ceiling of a choice per query: {as_percent(c['value'])} {as_interval(c['ci_low'], c['ci_high'])} on "
        f"{c['n_queries']:,} queries ({safe_text(c['method'])}). One run of every prompt in hindsight: "
        f"{as_percent(c['one_draw_oracle'])}, luck included.</p>"
    )


def _table(details: Details, best: str | None) -> list[str]:
    if not details.rows:
        return []
    heads = "".join(
        f'<th scope="col"><button type="button" data-sort="{i}">{safe_text(short_name(name))}</button></th>'
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
    items = "".join(f"<li>{safe_text(text)}</li>" for text in warnings)
    return ["<h2>Warnings</h2>", f'<ul class="warnings">{items}</ul>']


def _method(evaluation: bool) -> list[str]:
    left_out = _OF_AUDITS if evaluation else _OF_EVALUATIONS
    items = "".join(f"<dt>{safe_text(w)}</dt><dd>{safe_text(t)}</dd>" for w, t in _METHOD.items() if w not in left_out)
    return ["<h2>Method</h2>", f"<dl>{items}</dl>"]
