"""Commands on models: evaluate and select."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from oirl.errors import ConfigError
from oirl_cli.output import (
    check_report,
    interval,
    note,
    percent,
    points,
    print_json,
    print_row,
    print_table,
    say,
    working,
)


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("evaluate")(evaluate)
    app.command("select")(select)


def evaluate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of the model.")],
    log: Annotated[list[str], typer.Argument(metavar="LOG...", help="The log; its rows marked `test` are used.")],
    embedder: Annotated[
        str | None, typer.Option("--embedder", help="The embedder, where it is code of your own.")
    ] = None,
    estimator: Annotated[
        str,
        typer.Option("--estimator", help="auto, replay, ips, snips, direct, doubly_robust or switch."),
    ] = "auto",
    prices: Annotated[
        Path | None,
        typer.Option("--prices", help="YAML: model -> input and output price of a million tokens."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="Write a page with figures and replies side by side (.html).")
    ] = None,
    self_check: Annotated[
        bool,
        typer.Option("--self-check", help="Thin the log by a known policy and show each estimator's error."),
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="For the bootstrap and the self-check.")] = 0,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Evaluate the model and what it would choose on a log, with 95% intervals."""
    from oirl.rewards.saving import read_manifest

    check_report(report)
    kind = read_manifest(model).kind
    if kind not in ("prompt-selector", "prompt-reward-model"):
        given: dict[str, Any] = {"--prices": prices, "--self-check": self_check or None}
        given |= {"--estimator": None if estimator == "auto" else estimator}
        for option in [name for name, value in given.items() if value is not None]:
            raise ConfigError(f"{option} is for models of prompts; {model} is a {kind}")
        _evaluate_responses(model, log, embedder, report, seed, json_)
        return
    document = _evaluate_prompts(model, log, embedder, estimator, prices_of(prices), report, self_check, seed)
    if json_:
        print_json(document)
    else:
        print_evaluation(document)


def _evaluate_prompts(
    model: Path,
    log: list[str],
    embedder: str | None,
    estimator: str,
    prices: Any,
    report: Path | None,
    self_check: bool,
    seed: int,
) -> dict[str, Any]:
    from oirl.evaluation.evaluate import EVALUATED
    from oirl.evaluation.evaluate import evaluate as run
    from oirl.logs.store import read_log
    from oirl.selection.selector import PromptSelector

    with working(f"evaluating {model}"):
        selector = PromptSelector.load(model, embedder=embedder)
        table = read_log(log, EVALUATED)
        document = run(selector, table, estimator=estimator, prices=prices, seed=seed).to_dict()
        if self_check:
            from oirl.evaluation.self_check import self_check as check

            document["self_check"] = check(selector, table, seed=seed).to_dict()
        if report:
            from oirl.evaluation.details import DETAILED, evaluation_details
            from oirl.evaluation.report import write_report

            details = evaluation_details(selector, read_log(log, DETAILED), seed=seed)
            write_report(document, details, report)
            note(f"{report}: the report")
    return document


def _evaluate_responses(
    model: Path, log: list[str], embedder: str | None, report: Path | None, seed: int, json_: bool
) -> None:
    """Evaluate on verdicts where the source is a log, on pairs where it holds preference pairs."""
    from oirl.evaluation.preferences import evaluate_preferences
    from oirl.evaluation.responses import evaluate_responses
    from oirl.logs.pairs import read_pairs
    from oirl.logs.store import read_log, record_of
    from oirl.rewards.responses import RESPONSE_COLUMNS
    from oirl.rewards.saving import load
    from oirl.rewards.training import check_seed
    from oirl_cli.responses import print_preference_evaluation, print_response_evaluation

    check_seed(seed)
    with working(f"evaluating {model}"):
        loaded = load(model, embedder=embedder)
        if loaded.kind == "response-reward-model" and record_of(log) == "interactions":
            document = evaluate_responses(loaded, read_log(log, RESPONSE_COLUMNS), seed=seed).to_dict()
            show = print_response_evaluation
        else:
            document = evaluate_preferences(loaded, read_pairs(log)).to_dict()
            show = print_preference_evaluation
        if report:
            from oirl.evaluation.response_report import write_response_report

            write_response_report(document, report)
            note(f"{report}: the report")
    if json_:
        print_json(document)
    else:
        show(document)


def select(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of the model.")],
    queries: Annotated[list[str] | None, typer.Argument(metavar="[QUERY...]", help="Queries.")] = None,
    in_: Annotated[
        str | None,
        typer.Option("--in", help="JSONL, CSV, TSV or Parquet with a column `query`, or - for lines on stdin."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="Candidates: a template per line, or JSONL/YAML with prompt_id and prompt."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write .jsonl, .csv or .parquet instead.")] = None,
    top: Annotated[int, typer.Option("--top", help="How many prompts per query.")] = 1,
    max_cost: Annotated[
        float | None, typer.Option("--max-cost", help="Mean cost per query not to be exceeded, as on the training log.")
    ] = None,
    cost_weight: Annotated[
        float | None, typer.Option("--cost-weight", help="Success that a unit of cost is worth.")
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show the scores of all prompts.")] = False,
    embedder: Annotated[
        str | None, typer.Option("--embedder", help="The embedder, where it is code of your own.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
) -> None:
    """Choose the prompt of each query: a table on a terminal, JSON lines into a pipe."""
    from oirl.logs.queries import write_rows
    from oirl.selection.selector import PromptSelector, read_candidates

    query_ids, texts = _queries(queries, in_)
    selector = PromptSelector.load(model, embedder=embedder)
    candidates = None if prompts is None else read_candidates(prompts, selector.model_)
    selections = selector.select(
        texts, candidates, query_ids=query_ids, top=top, max_cost=max_cost, cost_weight=cost_weight
    )
    rows = [s.to_dict(explain=explain) for s in selections]
    if out is not None:
        write_rows(rows, out)
        note(f"{out}: {len(rows):,} rows")
    if json_:
        print_json(rows)
    elif out is None:
        _print_selection(rows, selector.deployment_)
    if any(row.get("extrapolation") for row in rows):
        note("note: a prompt that the training log does not hold was scored through its text: an extrapolation")


def _queries(arguments: list[str] | None, file: str | None) -> tuple[list[str], list[str]]:
    from oirl.logs.queries import parse_query_lines, read_queries
    from oirl.logs.text import text_id

    if arguments and file:
        raise ConfigError("queries as arguments and --in are given; use one of the two")
    if arguments and arguments != ["-"]:
        return [text_id(q) for q in arguments], arguments
    if file and file != "-":
        return read_queries(file)
    if sys.stdin.isatty():
        note("type queries, one a line, and end with Ctrl-D")
    return parse_query_lines(sys.stdin, "stdin")


def describe_metrics(m: dict[str, Any]) -> str:
    """Return the metrics of a reward model in one line."""

    def show(name: str, form: str = ".3f") -> str:
        return "–" if m[name] is None else format(m[name], form)

    return (
        f"AUC {show('auc')} (within prompt {show('auc_within_prompt')}, within query {show('auc_within_query')}), "
        f"Brier {show('brier', '.4f')} (skill {show('brier_skill', '+.3f')} against the prompt means), "
        f"ECE {show('ece')}"
    )


def print_evaluation(document: dict[str, Any]) -> None:
    """Print an evaluation for people: prompts, policies, ceiling, decision."""
    say(
        f"{document['n_rows']:,} runs, {document['n_queries']:,} queries, {document['n_prompts']} prompts known "
        "to the model"
    )
    print_table(
        ["prompt", "runs", "success", "95% interval"],
        [
            [p["prompt_id"], f"{p['n']:,}", percent(p["success"]), interval(p["ci_low"], p["ci_high"])]
            for p in document["prompts"]
        ],
    )
    say(f"reward model: {describe_metrics(document['model'])}")
    say(f"prompt means alone: {describe_metrics(document['null_model'])}")
    print_table(
        ["policy", "success", "95% interval", "gain (points)", "95% interval "],
        [
            [
                name,
                percent(p["value"]),
                interval(p["ci_low"], p["ci_high"]),
                points(p["gain"]),
                interval(p["gain_ci_low"], p["gain_ci_high"], points),
            ]
            for name, p in document["policies"].items()
        ],
    )
    best = document["policies"]["best_prompt"]["prompt_id"]
    if document["off_policy"]:
        _print_off_policy(document["off_policy"], document["policies"])
    say(f"best_prompt is {best}, the best single prompt of the training log; gains are against it, paired by query.")
    ceiling = document["ceiling"]
    if ceiling["one_draw_oracle"] is None:
        say(f"ceiling of a choice per query: {ceiling['method']}.")
    else:
        bounds = interval(ceiling["ci_low"], ceiling["ci_high"])
        say(f"ceiling of a choice per query: {percent(ceiling['value'])} {bounds} ({ceiling['method']});")
        say(f"one run of every prompt, best in hindsight: {percent(ceiling['one_draw_oracle'])}, luck included.")
    if document["cost"]:
        _print_cost(document["cost"], best)
    if "self_check" in document:
        _print_self_check(document["self_check"])
    say(f"deployed: {deployed(document['deploy']['policy'], best)}, because {document['deploy']['reason']}")
    warn(document["warnings"])


def _print_off_policy(found: dict[str, Any], policies: dict[str, Any]) -> None:
    """Print where values come from if not from replay: support, and what each estimator says."""
    names = list(dict.fromkeys(e for row in found["estimates"].values() for e in row))
    say(f"values are estimated from runs that another policy chose: {found['reason']}.")
    print_table(
        ["policy", "estimator", *names, "effective queries", "largest weight", "unsupported"],
        [
            [
                name,
                policies[name]["estimator"] if policies[name]["value"] is not None else "none",
                *(percent(row.get(e)) for e in names),
                f"{found['support'][name]['effective_sample_size']:,.0f}",
                percent(found["support"][name]["largest_weight"]),
                percent(found["support"][name]["unsupported_share"]),
            ]
            for name, row in found["estimates"].items()
        ],
    )


def _print_cost(cost: dict[str, Any], best: str) -> None:
    """Print what policies cost and what thrift would keep."""
    spent = ", ".join(f"{name} {value:.4g}" for name, value in cost["policies"].items())
    say(f"mean cost per query ({cost['unit']}): {spent}; the cheapest prompt is {cost['cheapest_prompt']}.")
    for point in cost["calibrated"]:
        say(
            f"  thrift set on the training log to keep {percent(point['target'])} of what {best} has over "
            f"{cost['cheapest_prompt']}: here it keeps {percent(point['gap_recovered'])} at "
            f"{percent(point['cost_ratio'])} of its cost (--cost-weight {point['weight']:.4g})"
        )
    if cost["area"] is not None:
        say(f"  area under the gap recovered by cost {cost['area']:.3f} (mixing at random 0.500)")


def prices_of(path: Path | None) -> Any:
    """Return the price table of a file, None where there is none."""
    from oirl.logs.costs import read_prices

    return None if path is None else read_prices(path)


def _print_self_check(check: dict[str, Any]) -> None:
    say(
        f"self-check: {check['n_queries']:,} complete queries thinned {check['repeats']} times to one run each "
        f"({check['logger']}); errors against the value of all runs"
    )
    print_table(
        ["policy", "estimator", "mean error (points)", "RMSE (points)", "half width", "intervals that hold the truth"],
        [
            [
                e["policy"],
                e["estimator"],
                points(e["mean_error"]),
                f"{100 * e['rmse']:.2f}",
                f"{100 * e['half_width']:.2f}",
                percent(e["covered"]),
            ]
            for e in check["errors"]
        ],
    )


def _print_selection(rows: list[dict[str, Any]], deployment: Any) -> None:
    if not sys.stdout.isatty():
        for row in rows:
            print_row(row)
        return
    print_selection(rows)
    if not any(row.get("extrapolation") for row in rows):
        say(f"deployed: {deployed(deployment.policy, deployment.best_prompt)}, because {deployment.reason}")


def print_selection(rows: list[dict[str, Any]]) -> None:
    """Print rows of `select` as a table."""
    table = []
    for row in rows:
        mark = f"rank {row['rank']}" if "rank" in row else ("switched" if row["changed"] else "")
        mark = "extrapolated" if row.get("extrapolation") else mark
        cells = [row["query"], row["prompt_id"], percent(row["score"]), percent(row["baseline_score"]), mark]
        if "scores" in row:
            ordered = sorted(row["scores"].items(), key=lambda item: -item[1])
            cells.append(", ".join(f"{name} {percent(score)}" for name, score in ordered))
        table.append(cells)
    columns = ["query", "prompt", "estimate", "best single", ""]
    print_table([*columns, "all prompts"] if rows and "scores" in rows[0] else columns, table)


def deployed(policy: str, best: str) -> str:
    """Return in words what the gate has decided."""
    return "the choice per query" if policy == "selector" else f"the best single prompt ({best}) for every query"


def warn(warnings: list[str]) -> None:
    """Print warnings on stderr."""
    for warning in warnings:
        note(f"warning: {warning}")
