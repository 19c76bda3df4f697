"""The command that improves a language model: tune."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from oirl_cli.fitting import parse_parameters
from oirl_cli.output import interval, note, percent, points, print_json, print_table, say, shorten


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("tune")(tune)


def tune(
    method: Annotated[str, typer.Argument(help="sft, filter, raft or hir.")],
    config: Annotated[Path | None, typer.Option("--config", help="YAML file of settings.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting over the file's, such as out or relabel.name."),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Improve a language model by supervised updates; a run that was stopped goes on with the same command."""
    from oirl.tuning.running import tune as run
    from oirl.tuning.settings import make_settings, merge, read_settings

    entries = merge(read_settings(config) if config else {}, parse_parameters(set_) or {})
    settings = make_settings(method, entries, str(config or "--set"))
    report = run(method, settings, progress=_tell)
    if os.environ.get("RANK", "0") != "0":  # one of several processes; the first one tells
        return
    if json_:
        print_json(report.to_dict())
        return
    _print(report)


def _tell(row: dict[str, Any]) -> None:
    where = f"iteration {row['iteration']}, update {row['step']}"
    if row["kind"] == "update":
        note(f"{where}: loss {row['loss']:.4f}, {row['tokens_per_s']:,.0f} tokens/s")
    elif row["kind"] == "rollouts":
        shown = [f"{row['responses']:,} responses", f"{row['examples']:,} examples"]
        shown += [f"{percent(row['success'])} right"] if row["success"] is not None else []
        shown += [f"reward {row['reward']:.3f}"] if row.get("reward") is not None else []
        note(f"{where}: {', '.join(shown)}")
    else:
        note(f"{where}: held out: {_measured(row)}")


def _measured(row: dict[str, Any]) -> str:
    shown = [f"loss {row['loss']:.4f}"] if row.get("loss") is not None else []
    if "success" in row:
        shown.insert(0, f"{percent(row['success'])} right {interval(row['ci_low'], row['ci_high'])}")
    return ", ".join(shown)


def _print(report: Any) -> None:
    say(f"{report.model}: the tuned model ({report.method})")
    if report.before:
        say(f"  before: {_measured(report.before)}")
        say(f"  after:  {_measured(report.after)}")
    if "gain" in report.after:
        low, high = report.after["gain_ci_low"], report.after["gain_ci_high"]
        say(f"  gain on held-out queries: {points(report.after['gain'])} points {interval(low, high, points)}")
    for row in report.iterations:
        say(f"  iteration {row['iteration']}: {_figures(row)}")
    print_table(["asked as", "template"], [[name, shorten(text, 70)] for name, text in report.prompts.items()])
    for reason, count in report.left_out.items():
        note(f"  left out {count:,} responses: {reason}")
    for warning in report.warnings:
        note(f"warning: {warning}")


def _figures(row: dict[str, Any]) -> str:
    shown = [f"{row['examples']:,} examples of {row['responses']:,} responses"]
    shown += [f"{percent(row['success'])} right"] if row["success"] is not None else []
    shown += [f"reward {row['reward']:.3f}"] if row.get("reward") is not None else []
    shown += [f"{row['words']:.1f} words"] if row["words"] is not None else []
    shown += [f"distinct-2 {row['distinct_2']:.3f}"] if row["distinct_2"] is not None else []
    return ", ".join(shown)
