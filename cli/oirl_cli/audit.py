"""The command audit: what a log can tell and what it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from oirl_cli.output import check_report, interval, note, percent, print_json, print_table, say, shorten, working

_PAIRS = 10


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("audit")(audit)


def audit(
    log: Annotated[list[str], typer.Argument(metavar="LOG...", help="The log.")],
    prices: Annotated[
        Path | None, typer.Option("--prices", help="YAML: model -> input and output price of a million tokens.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="Write a page with figures and replies side by side (.html).")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="For the sample of graded replies and the ceiling.")] = 0,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Say what a log can tell: leaks, label noise, each prompt's success, the ceiling of choosing, sample size."""
    from oirl.evaluation.audit import AUDITED
    from oirl.evaluation.audit import audit as run
    from oirl.logs.costs import read_prices
    from oirl.logs.store import read_log

    check_report(report)
    with working("auditing"):
        table = read_log(log, AUDITED)
        document = run(table, prices=None if prices is None else read_prices(prices), seed=seed).to_dict()
        if report:
            from oirl.evaluation.details import audit_details
            from oirl.evaluation.report import write_report

            write_report(document, audit_details(table, seed=seed), report)
            note(f"{report}: the report")
    if json_:
        print_json(document)
    else:
        print_audit(document)


def print_audit(document: dict[str, Any]) -> None:
    """Print an audit for people: the verdict stands at the end."""
    _print_rows(document)
    if document["prompts"]:
        print_table(
            ["prompt", "runs", "queries", "success", "95% interval"],
            [
                [
                    p["prompt_id"],
                    f"{p['n']:,}",
                    f"{p['n_queries']:,}",
                    percent(p["success"]),
                    interval(p["ci_low"], p["ci_high"]),
                ]
                for p in document["prompts"]
            ],
        )
        _print_costs(document["costs"])
        _print_pairs(document["comparisons"])
        ceiling = document["ceiling"]
        say(
            f"ceiling of a choice per query: {percent(ceiling['value'])} "
            f"{interval(ceiling['ci_low'], ceiling['ci_high'])} ({ceiling['method']})"
        )
    for example in document["labels"]["examples"][:3]:
        say(
            f"  row {example['row']:,}: logged {_word(example['logged'])}, by a careful reading "
            f"{_word(example['careful'])}; answer {shorten(example['answer'], 30)}, "
            f"reply …{shorten(example['response'][-120:], 120)}"
        )
    for warning in document["warnings"]:
        note(f"warning: {warning}")
    say()
    for sentence in document["verdict"]:
        say(sentence)


def _print_rows(document: dict[str, Any]) -> None:
    d, c, r = document["duplicates"], document["coverage"], document["replicates"]
    say(
        f"{document['n_rows']:,} rows, {document['n_queries']:,} queries, {document['n_prompts']} prompts; "
        f"{d['groups']:,} unlike queries ({d['exact']:,} with another of the same text, {d['near']:,} near duplicates)"
    )
    leaks = document["leaks"]
    if leaks["queries"]:
        say(f"split column: {leaks['exact']:,} queries stand on several sides, {leaks['near']:,} nearly do")
    else:
        say("split column: none, so nothing can leak; `oirl split` makes one")
    if "cells" in c:
        say(
            f"coverage: {c['complete_queries']:,} queries were run under every prompt, {c['one_prompt_queries']:,} "
            f"under one; {c['missing']:,} of {c['cells'] + c['missing']:,} cells are missing"
        )
    if r["cells"]:
        say(f"replicates: {r['cells']:,} cells were run more than once; two runs agree {percent(r['agreement'])}")
    labels = document["labels"]
    if labels["checker"]:
        sample = " (a sample)" if labels["sampled"] else ""
        say(f"labels: {labels['changed']:,} of {labels['regraded']:,} verdicts{sample} change under a careful reading")


def _print_costs(costs: list[dict[str, Any]]) -> None:
    if not costs:
        return

    def shown(value: float | None) -> str:
        return "–" if value is None else f"{value:,.4g}"

    rows = [[c["prompt_id"], *(shown(c[name]) for name in ("tokens_in", "tokens_out", "cost"))] for c in costs]
    print_table(["per run", "tokens in", "tokens out", "cost"], rows)


def _print_pairs(comparisons: list[dict[str, Any]]) -> None:
    alike = [c for c in comparisons if not c["told_apart"]]
    if not alike:
        return
    say(f"{len(alike)} of {len(comparisons)} pairs of prompts cannot be told apart (5%, Holm):")
    print_table(
        ["better", "other", "difference (points)", "queries", "p"],
        [
            [
                c["first"],
                c["second"],
                f"{100 * c['difference']:+.1f} ± {196 * c['standard_error']:.1f}",
                f"{c['n_queries']:,}",
                f"{c['p_value']:.2f}",
            ]
            for c in alike[:_PAIRS]
        ],
    )


def _word(verdict: bool) -> str:
    return "right" if verdict else "wrong"
