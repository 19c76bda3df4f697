"""Commands on oirl itself: models, formats and doctor."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from oirl.errors import ConfigError
from oirl_cli.collecting import MODEL, SET, opened
from oirl_cli.fitting import parse_parameters
from oirl_cli.output import percent, print_json, print_table, say

_SHOWN = ("prompt-models", "response-models", "preference-models", "embedders", "checkers", "engines")
_JSON = typer.Option("--json", help="Print one JSON document.")


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("models")(models)
    app.command("formats")(formats)
    app.command("doctor")(doctor)


def models(json_: Annotated[bool, _JSON] = False) -> None:
    """List the registered reward models, embedders, checkers and engines."""
    from oirl.registry import names

    kinds = {kind: names(kind) for kind in _SHOWN}
    if json_:
        print_json(kinds)
        return
    print_table(["kind", "name", "where"], [[k, name, path] for k, n in kinds.items() for name, path in n.items()])


def formats(json_: Annotated[bool, _JSON] = False) -> None:
    """List the formats that `oirl import` reads and `oirl export` writes."""
    from oirl.registry import names, resolve

    read = [resolve("formats", name) for name in names("formats")]
    written = [resolve("exports", name) for name in names("exports")]
    if json_:
        rows = [{"name": f.name, "use": "import", "record": f.record, "description": f.description} for f in read]
        rows += [
            {
                "name": e.name,
                "use": "export",
                "record": e.records[0],
                "records": list(e.records),
                "description": e.description,
            }
            for e in written
        ]
        print_json(rows)
        return
    print_table(["import", "makes", "what it reads"], [[f.name, f.record, f.description] for f in read])
    print_table(
        ["export --to", "takes", "what it writes"], [[e.name, " or ".join(e.records), e.description] for e in written]
    )


def doctor(
    engine: Annotated[str | None, typer.Option("--engine", help="Check the log-probs of an engine instead.")] = None,
    model: Annotated[str | None, MODEL] = None,
    set_: Annotated[list[str] | None, SET] = None,
    reference: Annotated[
        str | None,
        typer.Option("--reference", help="The same model for transformers, before any adapter; else --model."),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option("--threshold", help="Largest mean difference of log-probs that passes, in nats.")
    ] = None,
    json_: Annotated[bool, _JSON] = False,
) -> None:
    """Show what is installed and what is missing; with --engine, whether its log-probs are those of a forward pass."""
    from oirl.environment import inspect_environment

    if engine is not None:
        _check_engine(engine, model, set_, reference, threshold, json_)
        return
    if model or set_ or reference or threshold is not None:
        raise ConfigError("--model, --set, --reference and --threshold go with --engine")
    report = inspect_environment()
    if json_:
        print_json(report)
        return
    print(f"oirl {report['oirl']}, Python {report['python']}, {report['platform']}")
    print(f"{report['cpus']} CPUs, GPUs: {', '.join(report['gpus']) or report['gpu_note']}")
    print_table(
        ["package", "version", "needed for", "install with"],
        [
            [p["package"], p["version"] or "missing", p["purpose"], "" if p["version"] else p["install"]]
            for p in report["packages"]
        ],
    )
    for problem in report["problems"]:
        print(f"problem: {problem}")


def _check_engine(
    engine: str,
    model: str | None,
    params: list[str] | None,
    reference: str | None,
    threshold: float | None,
    json_: bool,
) -> None:
    from oirl.engines.base import EngineError
    from oirl.engines.parity import check_parity, check_threshold, open_reference

    if model is None:
        raise ConfigError("--engine needs --model, the model to run")
    check_threshold(threshold)
    adapter = (parse_parameters(params) or {}).get("adapter")
    with opened(engine, model, params) as made, open_reference(made, reference or model, adapter) as plain:
        report = check_parity(made, plain, threshold=threshold)
    if json_:
        print_json(report.to_dict())
    else:
        _print_parity(report)
    if not report.agrees:
        raise EngineError(f"the log-probs of the engine {engine!r} are not those of a plain forward pass")


def _print_parity(report: Any) -> None:
    for name, told in (("engine", report.engine), ("reference", report.reference)):
        say(f"{name}: " + ", ".join(f"{key} {value}" for key, value in told.items() if value is not None))
    rows = [
        [
            d.case,
            f"{d.tokens:,}",
            f"{d.mean_abs:.2g}",
            f"{d.max_abs:.2g}",
            f"{d.kl_k3:.2g}",
            "yes" if d.agrees else "NO",
        ]
        for d in report.differences
    ]
    print_table(["log-probs against a forward pass", "tokens", "mean |Δ|", "max |Δ|", "KL (k3)", "agrees"], rows)
    shared = report.prompt_tokens_agree
    say(f"same prompt tokens: {'not told' if shared is None else percent(shared)}")
    say(f"responses whose text gives their tokens again: {percent(report.retokenised_agree)}")
    say(f"same response alone and in a batch: {'yes' if report.padding_agrees else 'no'}")
    say(f"{'agrees' if report.agrees else 'DOES NOT AGREE'} (threshold: mean |Δ| of {report.threshold:g} nats)")
