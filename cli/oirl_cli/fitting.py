"""The command fit: reward models of prompts, of responses, and from preferences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from oirl.errors import ConfigError
from oirl_cli.models import deployed, describe_metrics, prices_of, warn
from oirl_cli.output import note, print_json, say, working
from oirl_cli.responses import describe_preference_metrics, describe_response_metrics, print_learning_curve

TARGETS = ("prompt", "response", "preference")
_ONLY = {
    "--actions": "prompt",
    "--prices": "prompt",
    "--margin": "preference",
    "--learning-curve": "preference",
}


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command("fit")(fit)


def fit(
    log: Annotated[
        list[str],
        typer.Argument(metavar="LOG...", help="The log, or preference pairs; the rows marked `train` are used."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the model.")],
    target: Annotated[str, typer.Option("--target", help="What is scored: prompt, response or preference.")] = "prompt",
    model: Annotated[
        str | None,
        typer.Option("--model", help="A model of that target (`oirl models`), or language-model:FOLDER."),
    ] = None,
    embedder: Annotated[
        str | None,
        typer.Option(
            "--embedder",
            help="checks (responses), tfidf, sentence-transformers[:model], hidden-states:MODEL or module:function.",
        ),
    ] = None,
    actions: Annotated[
        str | None, typer.Option("--actions", help="What is chosen: prompt, or pair (a language model and a prompt).")
    ] = None,
    prices: Annotated[
        Path | None,
        typer.Option("--prices", help="YAML: model -> input and output price of a million tokens."),
    ] = None,
    margin: Annotated[
        str | None, typer.Option("--margin", help="none, or pairs: be ahead by the margin of each preference pair.")
    ] = None,
    learning_curve: Annotated[
        bool, typer.Option("--learning-curve", help="Show the accuracy by the number of preference pairs learned from.")
    ] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A parameter of the model; may repeat."),
    ] = None,
    folds: Annotated[int, typer.Option("--folds", help="Folds of the cross-fitting.")] = 5,
    seed: Annotated[int, typer.Option("--seed", help="For folds and learners that draw.")] = 0,
    json_: Annotated[bool, typer.Option("--json", help="Print the manifest as one JSON document.")] = False,
) -> None:
    """Train a reward model of prompts, of responses, or from preferences, with held-out metrics in its manifest."""
    if target not in TARGETS:
        raise ConfigError(f"--target {target}: allowed: {', '.join(TARGETS)}")
    given = {"--actions": actions, "--prices": prices, "--margin": margin, "--learning-curve": learning_curve or None}
    for option, value in given.items():
        if value is not None and _ONLY[option] != target:
            raise ConfigError(f"{option} goes with --target {_ONLY[option]}, not with --target {target}")
    if model and model.partition(":")[0] == "language-model" and target != "preference":
        raise ConfigError(f"--model {model} goes with --target preference, not with --target {target}")
    common = {"folds": folds, "seed": seed, "params": parse_parameters(set_)}
    if target == "prompt":
        summary = _fit_prompts(log, out, model, embedder, actions or "prompt", prices_of(prices), common)
    elif target == "response":
        summary = _fit_responses(log, out, model, embedder, common)
    else:
        summary = _fit_preferences(log, out, model, embedder, margin or "none", learning_curve, common)
    if json_:
        from oirl.rewards.saving import read_manifest

        print_json(read_manifest(out).model_dump())
    else:
        summary()


def _fit_prompts(
    log: list[str], out: Path, name: str | None, embedder: str | None, actions: str, prices: Any, common: dict[str, Any]
) -> Any:
    from oirl.logs.store import read_log
    from oirl.rewards.prompts import PromptRewardModel
    from oirl.selection.selector import FITTED, PromptSelector

    name, embedder = name or "contrast", embedder or "tfidf"
    with working(f"fitting {name} on {embedder}"):
        reward_model = PromptRewardModel(name, embedder=embedder, **common)
        selector = PromptSelector(reward_model, actions=actions, prices=prices).fit(read_log(log, FITTED))
        selector.save(out)

    def summary() -> None:
        d, train = selector.deployment_, selector.model_.train_
        say(f"{out}: {name} on {embedder}, {train.n_rows:,} runs of {train.n_queries:,} queries")
        say(f"held out on the training log: {describe_metrics(selector.metrics_)}")
        say(f"deployed: {deployed(d.policy, d.best_prompt)}, because {d.reason}")
        warn(selector.warnings_)

    return summary


def _fit_responses(log: list[str], out: Path, name: str | None, embedder: str | None, common: dict[str, Any]) -> Any:
    from oirl.logs.splits import train_rows
    from oirl.logs.store import read_log
    from oirl.rewards.responses import RESPONSE_COLUMNS, ResponseRewardModel

    name, embedder = name or "linear", embedder or "checks"
    with working(f"fitting {name} on {embedder}"):
        model = ResponseRewardModel(name, embedder=embedder, **common)
        model.fit(train_rows(read_log(log, RESPONSE_COLUMNS))).save(out)

    def summary() -> None:
        data = model.data_
        say(f"{out}: {name} on {embedder}, {data['n_rows']:,} responses to {data['n_queries']:,} queries")
        say(f"held out on the training log: {describe_response_metrics(model.metrics_)}")
        _left_out(model.left_out_, "rows")
        warn(model.warnings_)

    return summary


def _fit_preferences(
    source: list[str],
    out: Path,
    name: str | None,
    embedder: str | None,
    margin: str,
    curve: bool,
    common: dict[str, Any],
) -> Any:
    from oirl.evaluation.preferences import learning_curve
    from oirl.logs.pairs import read_pairs, train_pairs
    from oirl.rewards.preferences import BradleyTerryRewardModel

    if name and name.partition(":")[0] == "language-model":
        return _fit_language_model(source, out, name, embedder, margin, curve, common)
    name, embedder = name or "linear", embedder or "tfidf"
    with working(f"fitting {name} on {embedder}"):
        pairs = train_pairs(read_pairs(source))
        model = BradleyTerryRewardModel(name, embedder=embedder, margin=margin, **common).fit(pairs)
        model.learning_curve_ = learning_curve(model, pairs, seed=common["seed"]) if curve else None
        model.save(out)

    def summary() -> None:
        data = model.data_
        say(f"{out}: {name} on {embedder}, {data['n_pairs']:,} pairs of {data['n_queries']:,} queries")
        say(f"held out on the training pairs: {describe_preference_metrics(model.metrics_)}")
        if model.learning_curve_:
            print_learning_curve(model.learning_curve_)
        _left_out(model.left_out_, "pairs")
        warn(model.warnings_)

    return summary


def _fit_language_model(
    source: list[str],
    out: Path,
    name: str,
    embedder: str | None,
    margin: str,
    curve: bool,
    common: dict[str, Any],
) -> Any:
    import shutil

    from oirl.logs.pairs import read_pairs, train_pairs
    from oirl.rewards.language_model import LanguageModelRewardModel, parameters_of

    base = name.partition(":")[2]
    if not base:
        raise ConfigError(f"--model {name}: name the base model, as language-model:FOLDER")
    if embedder or curve:
        raise ConfigError(f"{'--embedder' if embedder else '--learning-curve'} does not go with a language model")
    parameters = parameters_of(common["params"])
    checkpoints = out.with_name(f"{out.name}.checkpoints")
    with working(f"training {base}"):
        pairs = train_pairs(read_pairs(source))
        model = LanguageModelRewardModel(base, margin=margin, seed=common["seed"], **parameters)
        model.fit(pairs, checkpoints=checkpoints)
        model.save(out)
    if not model.is_main:
        raise typer.Exit  # the first process says what there is to say
    shutil.rmtree(checkpoints, ignore_errors=True)

    def summary() -> None:
        data = model.data_
        say(f"{out}: {base} with {model.heads} scalar heads, {data['n_pairs']:,} pairs")
        say(f"on {data['n_held_out']:,} of them, held out: {describe_preference_metrics(model.metrics_)}")
        _left_out(model.left_out_, "pairs")
        warn(model.warnings_)

    return summary


def parse_parameters(given: list[str] | None) -> dict[str, Any] | None:
    """Return NAME=VALUE options as parameters: numbers, true, false, null and lists as in JSON, else text."""
    found: dict[str, Any] = {}
    for text in given or []:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise ConfigError(f"--set {text}: the form is --set NAME=VALUE")
        if name in found:
            raise ConfigError(f"--set {name} is given twice; keep one")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found or None


def _left_out(reasons: dict[str, int], what: str) -> None:
    for reason, count in reasons.items():
        note(f"  left out {count:,} {what}: {reason}")
