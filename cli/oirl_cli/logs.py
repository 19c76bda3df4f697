"""Commands on logs: import, export, split and pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from oirl.errors import ConfigError
from oirl_cli.output import note, print_json, say, shorten, working


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("import")(import_)
    app.command("export")(export)
    app.command("split")(split)
    app.command("pairs")(pairs)


def import_(
    sources: Annotated[list[str], typer.Argument(metavar="SRC...", help="Files, folders or glob patterns.")],
    out: Annotated[Path, typer.Option("--out", help="The log to write (Parquet).")],
    format: Annotated[str, typer.Option("--format", help="A format (`oirl formats`), or auto.")] = "auto",
    map_: Annotated[
        list[str] | None,
        typer.Option("--map", metavar="COLUMN=FIELD", help="Which field of the files fills a column; may repeat."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="COLUMN=VALUE", help="The same value for all rows; may repeat."),
    ] = None,
    grade: Annotated[
        str | None,
        typer.Option("--grade", help="Give the verdicts: numeric, exact, choice, math or package.module:function."),
    ] = None,
    filter_: Annotated[
        str | None, typer.Option("--filter", help="Which filter's verdicts to read, where a run has several (lm-eval).")
    ] = None,
    scorer: Annotated[
        str | None, typer.Option("--scorer", help="Which score gives the verdict, where a format keeps several.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse everything at the first bad row.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Read files of any known format and write one log; say which rows were refused and why."""
    from oirl.logs.importing.pipeline import import_log

    with working(f"importing to {out}") as progress:
        report = import_log(
            sources,
            out,
            format=format,
            mapping=_pairs("--map", map_),
            constants=_pairs("--set", set_),
            grade=grade,
            filter=filter_,
            scorer=scorer,
            strict=strict,
            progress=progress,
        )
    if json_:
        print_json(report.to_dict())
        return
    what = {"interactions": "rows", "queries": "queries", "preferences": "pairs"}[report.record]
    say(f"{report.out}: {report.rows_kept:,} {what} kept of {report.rows_read:,}")
    if report.record == "interactions":
        say(f"  {report.n_queries:,} queries, {report.n_prompts:,} prompts")
    for file in report.files:
        say(f"  {file['file']} ({file['format']}): {file['rows_kept']:,} kept, {file['rows_refused']:,} refused")
        for prompt in (p for p in report.prompts if p["file"] == file["file"]):
            say(f"    {_origin(prompt)}: {shorten(prompt['prompt'])}")
    if report.grade:
        g = report.grade
        say(
            f"  graded by {g['checker']}: {g['graded']:,} rows, {g['changed']:,} verdicts changed "
            f"({g['to_right']:,} of them from wrong to right), {g['filled']:,} new, {g['not_gradable']:,} not gradable"
        )
    for warning in report.warnings:
        note(f"warning: {warning}")
    for reason in report.reasons[:10]:
        note(f"  refused {reason['count']:,}: {reason['reason']} (first at {reason['first']})")
    if report.rejected_file:
        note(f"  refused rows with reasons: {report.rejected_file}")


def export(
    log: Annotated[list[str], typer.Argument(metavar="LOG...", help="A log, or a file of preference pairs.")],
    to: Annotated[str, typer.Option("--to", help="A format of `oirl formats`: trl-sft, lm-eval, jsonl, …")],
    out: Annotated[Path, typer.Option("--out", help="The file or folder to write.")],
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write a log, or preference pairs, as files that another tool loads."""
    from oirl.logs.exporting.pipeline import export_log

    with working(f"exporting to {out}"):
        report = export_log(log, out, to=to)
    if json_:
        print_json(report.to_dict())
        return
    say(f"{report.out} ({report.format}): {report.written:,} written, from {report.rows_read:,} rows")
    for reason, count in report.left_out.most_common():
        note(f"  left out {count:,}: {reason}")
    if report.next:
        say(f"  next: {report.next}")


def split(
    log: Annotated[list[str], typer.Argument(metavar="LOG...", help="The log, or a file of preference pairs.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for train.parquet and test.parquet.")],
    by: Annotated[str, typer.Option("--by", help="What may not be cut: query.")] = "query",
    test: Annotated[float, typer.Option("--test", help="Share of the queries in the test part.")] = 0.2,
    folds: Annotated[int | None, typer.Option("--folds", help="Write K folds instead: fold-0/train.parquet, …")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Another seed gives another split.")] = 0,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Split a log by query so that nothing leaks: exact and near duplicates stay together."""
    from oirl.logs.splits import write_split

    with working(f"splitting to {out}"):
        report = write_split(log, out, test=test, by=by, folds=folds, seed=seed)
    if json_:
        print_json(report)
        return
    for part in report["parts"]:
        say(f"{part['file']}: {part['rows']:,} rows, {part['queries']:,} queries")
    for warning in report["warnings"]:
        note(f"warning: {warning}")


def pairs(
    log: Annotated[list[str], typer.Argument(metavar="LOG...", help="The log, with responses and verdicts.")],
    out: Annotated[Path, typer.Option("--out", help="The file of preference pairs to write (Parquet).")],
    per_query: Annotated[
        int | None,
        typer.Option("--per-query", help="At most so many pairs of a query, balanced by prompt; all by default."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Decides between pairs that are equally good.")] = 0,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Make preference pairs of a log: of two responses to one query, the right one over the wrong one."""
    from oirl.logs.pairs import write_pairs

    with working(f"pairing to {out}"):
        report = write_pairs(log, out, per_query=per_query, seed=seed)
    if json_:
        print_json(report.to_dict())
        return
    say(f"{report.out}: {report.n_pairs:,} pairs of {report.n_queries:,} queries")
    say(f"  from {report.rows_used:,} of {report.rows_read:,} rows; margins: {report.margin}")
    for reason, count in (+report.left_out).most_common():
        note(f"  left out {count:,} rows: {reason}")


def _origin(prompt: dict[str, Any]) -> str:
    kept = "prompt kept by the tool" if prompt["source"] == "format" else "prompt recovered"
    return f"{kept} (fits {prompt['fits']:,} of {prompt['rows']:,} rendered texts)" if prompt["rows"] else kept


def _pairs(option: str, given: list[str] | None) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in given or []:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ConfigError(
                f"{option} {text}: the form is {option} COLUMN={'FIELD' if option == '--map' else 'VALUE'}"
            )
        if name in pairs:
            raise ConfigError(f"{option} {name} is given twice; keep one")
        pairs[name] = value
    return pairs
