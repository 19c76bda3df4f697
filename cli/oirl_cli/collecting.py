"""Commands that run a language model: generate."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oirl.errors import ConfigError
from oirl_cli.fitting import parse_parameters
from oirl_cli.models import prices_of
from oirl_cli.output import note, percent, print_json, say

if TYPE_CHECKING:
    from oirl.engines.base import Engine
    from oirl.engines.collecting import Progress

ENGINE = typer.Option("--engine", help="transformers, vllm, openai, or package.module:attribute.")
MODEL = typer.Option("--model", help="The model: a folder, a name on the hub, or its name on the server.")
SET = typer.Option("--set", metavar="NAME=VALUE", help="A parameter of the engine, such as batch_size or base_url.")
MAX_TOKENS = typer.Option("--max-tokens", help="The most tokens of a response.")
TEMPERATURE = typer.Option("--temperature", help="0 takes the likeliest token each time.")


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("generate")(generate)


def generate(
    engine: Annotated[str, ENGINE],
    model: Annotated[str, MODEL],
    queries: Annotated[Path, typer.Option("--queries", help="File of queries, with `answer` if they are graded.")],
    prompts: Annotated[Path, typer.Option("--prompts", help="File of prompts (.txt, .jsonl, .yaml).")],
    out: Annotated[Path, typer.Option("--out", help="The log to write (Parquet), or to go on with.")],
    replicates: Annotated[
        int,
        typer.Option("--replicates", help="Runs of each query under each prompt; of each query, if prompts are drawn."),
    ] = 1,
    design: Annotated[
        str | None,
        typer.Option(
            "--design", help="full (default): all prompts; random or balanced: prompts drawn, with propensity."
        ),
    ] = None,
    adaptive: Annotated[
        bool, typer.Option("--adaptive", help="Draw the prompts that may be the best more often, with propensity.")
    ] = False,
    grade: Annotated[
        str | None, typer.Option("--grade", help="numeric, exact, choice, math or package.module:function.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="Stop before more is spent: 500ktokens, or 2.50money with --prices.")
    ] = None,
    prices: Annotated[
        Path | None, typer.Option("--prices", help="YAML: model -> {input, output}, of a million tokens each.")
    ] = None,
    max_tokens: Annotated[int, MAX_TOKENS] = 512,
    temperature: Annotated[float, TEMPERATURE] = 1.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Draw from the likeliest tokens of this probability.")] = 1.0,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Draw from so many of the likeliest tokens.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="A text at which a response ends; may repeat.")
    ] = None,
    set_: Annotated[list[str] | None, SET] = None,
    seed: Annotated[int, typer.Option("--seed", help="For drawing prompts and responses.")] = 0,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Run queries under prompts on a language model and write a log; a run that was stopped goes on where it was."""
    from oirl.engines.base import Sampling
    from oirl.engines.collecting import collect
    from oirl.engines.spending import Budget
    from oirl.logs.queries import read_query_records, read_templates

    if adaptive and design not in (None, "adaptive"):
        raise ConfigError(f"--adaptive is a design of its own; leave out --design {design}")
    settings: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    sampling = Sampling(**settings, stop=tuple(stop or ()), seed=seed)
    asked, templates = read_query_records(queries), read_templates(prompts)
    limit, table = Budget.parse(budget) if budget else None, prices_of(prices) or {}
    with opened(engine, model, set_) as made, collecting_progress() as progress:
        try:
            report = collect(
                made,
                asked,
                templates,
                out,
                sampling=sampling,
                design="adaptive" if adaptive else design or "full",
                replicates=replicates,
                grade=grade,
                budget=limit,
                price=table.get(model, table.get("default")),
                progress=progress,
            )
        except KeyboardInterrupt:
            note(f"what is done is kept in {out}.journal; the same command goes on from there")
            raise
    if json_:
        print_json(report.to_dict())
        return
    _print(report)


def _print(report: Any) -> None:
    made = report.progress
    say(f"{report.out}: {made.done:,} of {made.total:,} runs" + (f", as {report.stopped}" if report.stopped else ""))
    if made.graded:
        say(f"  right: {percent(made.right / made.graded)} of {made.graded:,} graded")
    cost = f", cost {made.money:.4g}" if made.money is not None else ""
    say(f"  tokens: {made.tokens_in:,} in, {made.tokens_out:,} out{cost}")
    for reason, count in list(report.errors.items())[:5]:
        note(f"  failed {count:,}: {reason}")
    for warning in report.warnings:
        note(f"warning: {warning}")


@contextmanager
def opened(engine: str, model: str, params: list[str] | None) -> Iterator[Engine]:
    """Open an engine, say so, and free it at the end."""
    from oirl.engines.opening import open_engine

    if sys.stderr.isatty():
        note(f"loading {model} …")
    with open_engine(engine, model, parse_parameters(params)) as made:
        yield made


@contextmanager
def collecting_progress() -> Iterator[Callable[[Progress], None]]:
    """Show how far a collecting run is: a bar on a terminal, a line every five seconds otherwise."""
    if not sys.stderr.isatty():
        last = time.monotonic()

        def now_and_then(made: Progress) -> None:
            nonlocal last
            if time.monotonic() - last > 5:
                last = time.monotonic()
                note(f"{made.done:,} of {made.total:,} runs, {_figures(made)}")

        yield now_and_then
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}")
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("runs", total=None, figures="")
        yield lambda made: bar.update(task, completed=made.done, total=made.total, figures=_figures(made))


def _figures(made: Progress) -> str:
    seconds = max(made.seconds, 1e-9)
    parts = [f"{made.new_tokens_out / seconds:,.0f} tokens/s"]
    if made.graded:
        parts.append(f"right {percent(made.right / made.graded)}")
    if made.failed:
        parts.append(f"failed {made.failed:,}")
    if made.money is not None:
        parts.append(f"cost {made.money:.4g}")
    if made.new:
        left = (made.total - made.done) * seconds / made.new
        parts.append(f"{left / 60:.0f} min left" if left >= 90 else f"{left:.0f} s left")
    return ", ".join(parts)
