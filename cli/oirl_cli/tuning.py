"""The command that improves a language model: tune."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from oirl_cli.fitting import parse_parameters
from oirl_cli.output import interval, note, percent, points, print_json, print_table, say, shorten

_SHOWN = 12


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("tune")(tune)


def tune(
    method: Annotated[str, typer.Argument(help="sft, filter, raft, hir, apa, ppo or awr.")],
    config: Annotated[Path | None, typer.Option("--config", help="YAML file of settings.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting over the file's, such as out or relabel.name."),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Improve a language model by supervised or online updates; a stopped run goes on with the same command."""
    from oirl.tuning.configuring import make_settings, merge, read_settings
    from oirl.tuning.running import tune as run

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
        name = "loss" if "loss" in row else "policy_loss"
        note(f"{where}: {name.replace('_', ' ')} {row[name]:.4f}, {row['tokens_per_s']:,.0f} tokens/s")
    elif row["kind"] == "guard":
        note(f"{where}: {row['reason']}: {row['action']}")
    elif row["kind"] == "rollouts":
        shown = [f"{row['responses']:,} responses", f"{row['examples']:,} examples"]
        shown += [f"{percent(row['success'])} right"] if row["success"] is not None else []
        shown += [f"reward {row['reward']:.3f}"] if row.get("reward") is not None else []
        shown += [f"KL {row['kl']:.3f}"] if "kl" in row else []
        note(f"{where}: {', '.join(shown)}")
    else:
        note(f"{where}: held out: {_measured(row)}")


def _measured(row: dict[str, Any]) -> str:
    shown = [f"{name} {row[name]:.4f}" for name in ("reward", "gold", "loss") if row.get(name) is not None]
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
    for name in ("reward", "gold"):
        if f"{name}_gain" in report.after:
            gain, low, high = (report.after[f"{name}_gain{end}"] for end in ("", "_ci_low", "_ci_high"))
            say(f"  gain in {name} on held-out queries: {gain:+.3f} [{low:+.3f}, {high:+.3f}]")
    rows = report.iterations
    for row in rows if len(rows) <= _SHOWN else [rows[i * (len(rows) - 1) // (_SHOWN - 1)] for i in range(_SHOWN)]:
        say(f"  iteration {row['iteration']}: {_figures(row)}")
    for guard in report.guards:
        say(f"  guard, iteration {guard['iteration']}: {guard['reason']}: {guard['action']}")
    print_table(["asked as", "template"], [[name, shorten(text, 70)] for name, text in report.prompts.items()])
    for reason, count in report.left_out.items():
        note(f"  left out {count:,} responses: {reason}")
    for warning in report.warnings:
        note(f"warning: {warning}")


def _figures(row: dict[str, Any]) -> str:
    shown = [f"{row['examples']:,} examples of {row['responses']:,} responses"]
    shown += [f"{percent(row['success'])} right"] if row["success"] is not None else []
    shown += [f"reward {row['reward']:.3f}"] if row.get("reward") is not None else []
    shown += [f"KL {row['kl']:.3f}"] if "kl" in row else []
    shown += [f"{row['words']:.1f} words"] if row["words"] is not None else []
    shown += [f"distinct-2 {row['distinct_2']:.3f}"] if row["distinct_2"] is not None else []
    return ", ".join(shown)
