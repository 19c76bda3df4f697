"""The command rank, and what is printed of reward models of responses."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from oirl.errors import ConfigError
from oirl_cli.output import interval, note, percent, points, print_json, print_row, print_table, say, shorten, working


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command("rank")(rank)


def rank(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a reward model of responses.")],
    in_: Annotated[
        str,
        typer.Option("--in", help="JSONL, CSV, Parquet … with `query` and `response`, or - for JSON lines on stdin."),
    ],
    out: Annotated[Path | None, typer.Option("--out", help="Write .jsonl, .csv or .parquet instead.")] = None,
    method: Annotated[
        str, typer.Option("--method", help="How to choose: reward, majority or weighted_majority.")
    ] = "reward",
    threshold: Annotated[
        float, typer.Option("--threshold", help="Choose no response where the score is below this, in [0, 1].")
    ] = 0.0,
    embedder: Annotated[
        str | None, typer.Option("--embedder", help="The embedder, where it is code of your own.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
) -> None:
    """Rank the candidate responses of each query, and choose one: best-of-N, or a vote."""
    from oirl.logs.queries import check_rows_file, parse_candidate_lines, read_candidates, write_rows
    from oirl.rewards.saving import load
    from oirl.selection.ranking import rank as run

    if out is not None:
        check_rows_file(out)
        if in_ != "-" and out.resolve() == Path(in_).resolve():
            raise ConfigError(f"--out {out} is also the input; name another file")
    with working(f"ranking with {model}"):
        if in_ == "-":
            ids, queries, responses, without = parse_candidate_lines(sys.stdin, "stdin")
        else:
            ids, queries, responses, without = read_candidates(in_)
        loaded = load(model, embedder=embedder)
        if not hasattr(loaded, "estimate"):
            raise ConfigError(f"{model} is a {loaded.kind}, which scores prompts; fit one with --target response")
        rankings = run(loaded, queries, responses, query_ids=ids, method=method, threshold=threshold)
    rows = [r.to_dict() for r in rankings]
    if without:
        note(f"{without:,} rows without a response were left out")
    if out is not None:
        write_rows(rows, out)
        note(f"{out}: {len(rows):,} rows")
    if json_:
        print_json(rows)
    elif out is None:
        _print_rankings(rows)


def _print_rankings(rows: list[dict[str, Any]]) -> None:
    if not sys.stdout.isatty():
        for row in rows:
            print_row(row)
        return
    print_table(
        ["query", "candidates", "score", "chosen"],
        [
            [
                shorten(row["query"], 48),
                str(len(row["ranked"])),
                percent(row["score"]),
                "none: the score is below the threshold" if row["abstained"] else shorten(row["chosen"], 60),
            ]
            for row in rows
        ],
    )


def _figure(value: float | None, form: str = ".3f") -> str:
    return "–" if value is None else format(value, form)


def describe_response_metrics(m: dict[str, Any]) -> str:
    """Return the metrics of a model of responses in one line."""
    return (
        f"AUC {_figure(m['auc'])} (within query {_figure(m['auc_within_query'])}), "
        f"Brier {_figure(m['brier'], '.4f')} (skill {_figure(m['brier_skill'], '+.3f')} against the mean success), "
        f"ECE {_figure(m['ece'])}"
    )


def describe_preference_metrics(m: dict[str, Any]) -> str:
    """Return the metrics of a preference model in one line."""
    return (
        f"pair accuracy {percent(m['pair_accuracy'])} {interval(m['ci_low'], m['ci_high'])}, "
        f"Brier {_figure(m['brier'], '.4f')} (0.25 = a coin), ECE {_figure(m['ece'])}"
    )


def print_learning_curve(curve: list[dict[str, float]]) -> None:
    """Print accuracy by the number of pairs learned from."""
    print_table(
        ["pairs learned from", "pair accuracy", "95% interval"],
        [[f"{c['n_pairs']:,.0f}", percent(c["pair_accuracy"]), interval(c["ci_low"], c["ci_high"])] for c in curve],
    )


def print_response_evaluation(document: dict[str, Any]) -> None:
    """Print an evaluation of a model of responses for people."""
    say(f"{document['n_rows']:,} responses to {document['n_queries']:,} queries")
    say(f"reward model: {describe_response_metrics(document['model'])}")
    for name, aucs in document["null_models"].items():
        name = f"{aucs['prefers']} ones" if "prefers" in aucs else name
        say(f"{name} alone: AUC {_figure(aucs['auc'])} (within query {_figure(aucs['auc_within_query'])})")
    lengths = document["length_correlation"]
    say(f"rank correlation of reward and length: {_figure(lengths['all'], '+.2f')}")
    chosen = document["best_of_n"]
    if chosen:
        print_best_of_n(chosen)
    _notes(document)


def print_best_of_n(chosen: dict[str, Any]) -> None:
    """Print what choosing among N responses is worth."""
    say(f"choosing among {chosen['n']} responses of each of {chosen['n_queries']:,} queries:")
    print_table(
        ["choice", "success", "95% interval", "over a random one", "95% interval ", "over majority", "95% interval  "],
        [
            [
                name,
                percent(p["value"]),
                interval(p["ci_low"], p["ci_high"]),
                points(p["gain"]),
                interval(p["gain_ci_low"], p["gain_ci_high"], points),
                points(p["over_majority"]),
                interval(p["over_majority_ci_low"], p["over_majority_ci_high"], points),
            ]
            for name, p in chosen["policies"].items()
        ],
    )
    sure = chosen["chosen"]
    say(
        f"the response with the highest reward gets a score of {percent(sure['score'])} on average and is right in "
        f"{percent(sure['success'])} {interval(sure['ci_low'], sure['ci_high'])}"
    )
    curve = [row for row in chosen["curve"] if row["n"] & (row["n"] - 1) == 0 or row["n"] == chosen["n"]]
    names = ["best_of_n", "majority", "weighted_majority", "oracle"]
    print_table(
        ["N", "KL (nats)", "reward of the best", *names],
        [
            [str(r["n"]), f"{r['kl']:.2f}", f"{r['proxy']['value']:.2f}", *(percent(r[n]["value"]) for n in names)]
            for r in curve
        ],
    )


def print_preference_evaluation(document: dict[str, Any]) -> None:
    """Print an evaluation on preference pairs for people."""
    m, null = document["model"], document["null_models"]["length"]
    say(f"{document['n_pairs']:,} pairs of {document['n_queries']:,} queries")
    say(f"reward model: {describe_preference_metrics(m)}")
    say(
        f"preferring the {null['prefers']} response: {percent(null['pair_accuracy'])}; the model's difference to that: "
        f"{points(null['gain'])} points {interval(null['gain_ci_low'], null['gain_ci_high'], points)}"
    )
    if null["gain_ci_high"] < 0:
        say("these pairs show that it knows less than length alone")
    elif null["gain_ci_low"] <= 0:
        say("these pairs do not show that it knows more than length")
    say(f"rank correlation of reward and length: {_figure(document['length']['correlation'], '+.2f')}")
    for title, key in (("margin", "by_margin"), ("longer by (characters)", "by_length_difference")):
        if document[key]:
            print_table(
                [title, "pairs", "pair accuracy", "95% interval"],
                [
                    [
                        f"{b['low']:g} to {b['high']:g}",
                        f"{b['n_pairs']:,}",
                        percent(b["pair_accuracy"]),
                        interval(b["ci_low"], b["ci_high"]),
                    ]
                    for b in document[key]
                ],
            )
    _print_subsets(document)
    _notes(document)


def _print_subsets(document: dict[str, Any]) -> None:
    if document["subsets"]:
        print_table(
            ["subset", "pairs", "pair accuracy", "95% interval"],
            [
                [name, f"{s['n_pairs']:,}", percent(s["pair_accuracy"]), interval(s["ci_low"], s["ci_high"])]
                for name, s in document["subsets"]["subsets"].items()
            ],
        )
        say(f"mean over subsets: {percent(document['subsets']['mean'])}")
    if document["agreement"]:
        a = document["agreement"]
        say(
            f"annotators agree in {percent(a['agreement'])} of the judgments of {a['n_comparisons']:,} comparisons "
            f"that were judged again; no model can be right on more than {percent(a['ceiling'])} of these"
        )


def _notes(document: dict[str, Any]) -> None:
    for reason, count in document["left_out"].items():
        note(f"  left out {count:,}: {reason}")
    for warning in document["warnings"]:
        note(f"warning: {warning}")
