"""Commands that run a language model: generate and propose."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oirl.errors import ConfigError
from oirl_cli.fitting import parse_parameters
from oirl_cli.models import prices_of
from oirl_cli.output import interval, note, percent, points, print_json, print_table, say, shorten

if TYPE_CHECKING:
    from oirl.engines.base import Engine
    from oirl.engines.collecting import Progress

ENGINE = typer.Option("--engine", help="transformers, vllm, openai, or package.module:attribute.")
MODEL = typer.Option("--model", help="The model: a folder, a name on the hub, or its name on the server.")
SET = typer.Option("--set", metavar="NAME=VALUE", help="A parameter of the engine, such as batch_size or base_url.")
MAX_TOKENS = typer.Option("--max-tokens", help="The most tokens of a response.")
TEMPERATURE = typer.Option("--temperature", help="0 takes the likeliest token each time.")
GRADE = typer.Option("--grade", help="numeric, exact, choice, math or package.module:function.")
BUDGET = typer.Option("--budget", help="Stop before more is spent: 500ktokens, or 2.50money with --prices.")
PRICES = typer.Option("--prices", help="YAML: model -> {input, output}, of a million tokens each.")


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("generate")(generate)
    app.command("propose")(propose)


def generate(
    engine: Annotated[str, ENGINE],
    model: Annotated[str, MODEL],
    queries: Annotated[Path, typer.Option("--queries", help="File of queries, with `answer` if they are graded.")],
    prompts: Annotated[
        Path, typer.Option("--prompts", help="File of prompts: .jsonl, .yaml, or .txt with one a line.")
    ],
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
    grade: Annotated[str | None, GRADE] = None,
    budget: Annotated[str | None, BUDGET] = None,
    prices: Annotated[Path | None, PRICES] = None,
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
    if out.suffix.lower() != ".parquet":
        raise ConfigError(f"{out}: a log is written to a .parquet file; name such a file")
    settings: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    sampling = Sampling(**settings, stop=tuple(stop or ()), seed=seed)
    asked, templates = read_query_records(queries), read_templates(prompts)
    limit, price = Budget.parse(budget) if budget is not None else None, _price(prices, model)
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
                price=price,
                progress=progress,
            )
        except KeyboardInterrupt:
            note(f"what is done is kept in {out}.journal; the same command goes on from there")
            raise
    if json_:
        print_json(report.to_dict())
        return
    _print(report)


def propose(
    log: Annotated[list[str], typer.Argument(metavar="LOG...", help="The log, with verdicts and answers.")],
    engine: Annotated[str, ENGINE],
    model: Annotated[str, MODEL],
    out: Annotated[Path, typer.Option("--out", help="The prompt file to write (.jsonl), with the evidence.")],
    n: Annotated[int, typer.Option("--n", help="Candidates to propose.")] = 8,
    keep: Annotated[int, typer.Option("--keep", help="Candidates that go into the race.")] = 4,
    reward_model: Annotated[
        str | None, typer.Option("--reward-model", help="A model by `oirl fit`: its estimates say which are kept.")
    ] = None,
    proposer_engine: Annotated[
        str | None, typer.Option("--proposer-engine", help="Engine of the model that proposes; by default --engine.")
    ] = None,
    proposer_model: Annotated[
        str | None, typer.Option("--proposer-model", help="The model that proposes; by default --model.")
    ] = None,
    proposer_set: Annotated[
        list[str] | None, typer.Option("--proposer-set", metavar="NAME=VALUE", help="A parameter of its engine.")
    ] = None,
    race: Annotated[
        int, typer.Option("--race", help="Queries on which all kept candidates run; 0 to propose only.")
    ] = 100,
    confirm: Annotated[
        int, typer.Option("--confirm", help="Queries besides those, to confirm the winner's gain on.")
    ] = 200,
    grade: Annotated[str, GRADE] = "numeric",
    budget: Annotated[str | None, BUDGET] = None,
    prices: Annotated[Path | None, PRICES] = None,
    max_tokens: Annotated[int, MAX_TOKENS] = 512,
    temperature: Annotated[float, TEMPERATURE] = 1.0,
    set_: Annotated[list[str] | None, SET] = None,
    seed: Annotated[int, typer.Option("--seed", help="For examples, queries and draws.")] = 0,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Let a language model propose prompts, race them against the best logged one, and say what is shown."""
    from oirl.engines.base import Sampling
    from oirl.engines.spending import Budget
    from oirl.logs.store import read_log
    from oirl.selection.proposing import MetaPromptProposer, RacePlan, Screen, check_prompt_file, write_prompt_file
    from oirl.selection.proposing import propose as propose_prompts

    if out.suffix.lower() != ".jsonl":
        raise ConfigError(f"{out}: prompts are written with their evidence to a .jsonl file; name such a file")
    if n < 1 or race < 0 or confirm < 0:
        raise ConfigError("--n must be 1 or more, --race and --confirm 0 or more")
    rows, screen = read_log(log), Screen(keep, _reward_model(reward_model))
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed)
    limit, price = Budget.parse(budget) if budget is not None else None, _price(prices, model)
    check_prompt_file(out)
    other = proposer_engine or proposer_model or proposer_set
    with ExitStack() as stack:
        target = stack.enter_context(opened(engine, model, set_)) if race or not other else None
        asked = (
            stack.enter_context(opened(proposer_engine or engine, proposer_model or model, proposer_set))
            if other
            else target
        )
        plan = None
        if race and target is not None:
            runs = out.with_suffix(".race.parquet")
            plan = RacePlan(target, grade, runs, race, confirm, sampling, limit, price)
        progress = stack.enter_context(collecting_progress())
        proposer = MetaPromptProposer(asked)  # type: ignore[arg-type]
        report = propose_prompts(rows, proposer, n, screen=screen, plan=plan, seed=seed, progress=progress)
    write_prompt_file(report, out)
    if json_:
        print_json(report.to_dict())
        return
    _print_proposed(report)


def _price(prices: Path | None, model: str) -> tuple[float, float] | None:
    table = prices_of(prices)
    if table is None:
        return None
    found = table.get(model, table.get("default"))
    if found is None:
        raise ConfigError(f"{prices} has no price of {model!r}, and no `default`; it has: {', '.join(table)}")
    return found


def _reward_model(folder: str | None) -> Any:
    if folder is None:
        return None
    from oirl.rewards.saving import load

    model = load(folder)
    model = getattr(model, "model_", model)  # a selector holds one
    if getattr(model, "kind", None) != "prompt-reward-model":
        raise ConfigError(f"{folder} is no reward model of prompts; fit one with `oirl fit LOG --out {folder}`")
    return model


def _print_proposed(report: Any) -> None:
    best = report.best_prompt
    say(f"{report.out}: {len(report.candidates):,} candidates")
    right = f"right in {percent(best.success)} of {best.n:,} logged runs"
    say(f"  to beat: {best.prompt_id}, {right}: {shorten(best.prompt)}")
    for reason, count in report.left_out.items():
        note(f"  left out {count:,}: {reason}")
    if report.race is None:
        rows = [[c.prompt_id, percent(c.predicted), shorten(c.prompt)] for c in report.candidates]
        print_table(["prompt", "predicted (extrapolation)", "template"], rows)
    else:
        _print_race(report)
    for warning in report.warnings:
        note(f"warning: {warning}")


def _print_race(report: Any) -> None:
    race = report.race
    predicted = {c.prompt_id: c.predicted for c in report.candidates}
    print_table(
        ["prompt", "queries", "success", "95% interval", "predicted", "standing", "template"],
        [
            [
                r.prompt_id,
                f"{r.n:,}",
                percent(r.success),
                interval(r.ci_low, r.ci_high),
                percent(predicted.get(r.prompt_id)),
                _standing(r, race),
                shorten(r.prompt, 48),
            ]
            for r in race.racers
        ],
    )
    say("the first was chosen on these runs, so its success here is too high; what counts is the gain on other queries")
    if race.gain is not None:
        say(
            f"on {race.n_confirm:,} other queries {race.winner} gains {points(race.gain)} points over {race.incumbent} "
            f"{interval(race.ci_low, race.ci_high, points)}"
        )
    say(f"all runs: {race.log}")


def _standing(racer: Any, race: Any) -> str:
    if racer.prompt_id == race.winner and race.winner != race.incumbent:
        return "won, confirmed" if race.ci_low is not None and race.ci_low > 0 and not race.stopped else "leads"
    if racer.left_after is not None:
        return f"out after {racer.left_after}"
    return "to beat" if racer.prompt_id == race.incumbent else "stayed"


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
