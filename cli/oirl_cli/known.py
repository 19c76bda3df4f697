"""Commands on oirl itself: models, formats and doctor."""

from __future__ import annotations

from typing import Annotated

import typer

from oirl_cli.output import print_json, print_table

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


def doctor(json_: Annotated[bool, _JSON] = False) -> None:
    """Show what is installed, which devices there are, what is missing and the command that installs it."""
    from oirl.environment import inspect_environment

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
