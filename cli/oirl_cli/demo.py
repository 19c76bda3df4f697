"""The command demo: the whole main job on the data that comes with oirl."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from oirl.errors import ConfigError
from oirl_cli.models import describe_metrics, print_evaluation, print_selection
from oirl_cli.output import print_json, working


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("demo")(demo)


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the files of the demo.")] = Path("oirl-demo"),
    seed: Annotated[int, typer.Option("--seed", help="For folds and the bootstrap.")] = 0,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Do the main job on real replies of a small language model: import, audit, fit, evaluate, select. No network."""
    import oirl
    from oirl.evaluation.details import evaluation_details
    from oirl.evaluation.report import write_report
    from oirl.logs.queries import read_queries, write_rows
    from oirl.rewards.prompts import PromptRewardModel
    from oirl.rewards.saving import read_manifest
    from oirl_data import demo_path

    begin = time.perf_counter()
    if out.is_dir() and any(out.iterdir()) and not (out / "model" / "manifest.json").is_file():
        raise ConfigError(f"{out} holds other files, which the demo could replace; name a new folder with --out")
    log, model, chosen = out / "log.parquet", out / "model", out / "selected.jsonl"
    report = out / "report.html"
    show = _silent if json_ else print
    show(
        "The data: replies of a small language model (it comes with oirl) to arithmetic word problems under several\n"
        "prompts. It was taught on purpose to be good at unlike things under unlike prompts; see data/README.md.\n"
    )
    show(f"1. oirl import replies.jsonl.gz --grade numeric --out {log}")
    with working("importing"):
        imported = oirl.import_log(demo_path() / "replies.jsonl.gz", log, grade="numeric")
    show(
        f"   {imported.rows_kept:,} replies to {imported.n_queries:,} queries under {imported.n_prompts} prompts, "
        "graded against the gold answers\n"
    )
    show(f"2. oirl audit {log}")
    table = oirl.read_log(log)
    with working("auditing"):
        audited = oirl.audit(table, seed=seed).to_dict()
    for sentence in audited["verdict"]:
        show(f"   {sentence}")
    show(f"\n3. oirl fit {log} --out {model}")
    with working("fitting"):
        selector = oirl.PromptSelector(PromptRewardModel(seed=seed)).fit(table)
        selector.save(model)
    show(f"   on the training queries, cross-fitted: {describe_metrics(selector.metrics_)}")
    show(f"   the gate: {selector.deployment_.reason}\n")
    show(f"4. oirl evaluate {model} {log} --report {report}    (test queries, which the model has not seen)")
    with working("evaluating"):
        evaluation = oirl.evaluate(selector, table, seed=seed).to_dict()
        write_report(evaluation, evaluation_details(selector, table, seed=seed), report)
    if not json_:
        print_evaluation(evaluation)
    show(f"\n5. oirl select {model} --in queries.jsonl --out {chosen}")
    query_ids, queries = read_queries(demo_path() / "queries.jsonl")
    rows = [s.to_dict(explain=True) for s in selector.select(queries, query_ids=query_ids)]
    write_rows(rows, chosen)
    document = {
        "import": imported.to_dict(),
        "audit": audited,
        "fit": read_manifest(model).model_dump(),
        "evaluate": evaluation,
        "select": rows,
        "files": [str(log), str(model), str(report), str(chosen)],
        "seconds": round(time.perf_counter() - begin, 1),
    }
    if json_:
        print_json(document)
    else:
        _close(document, out)


def _close(document: dict[str, Any], out: Path) -> None:
    rows = document["select"]
    print_selection([{k: v for k, v in row.items() if k != "scores"} for row in rows[:6]])
    for row in [row for row in rows if row["changed"]][:2]:
        ordered = sorted(row["scores"].items(), key=lambda item: -item[1])
        scores = ", ".join(f"{name} {100 * score:.0f}%" for name, score in ordered)
        print(f"Why {row['prompt_id']} for {row['query'][:50]!r}…: {scores}")
    print()
    evaluation = document["evaluate"]
    selector, best = evaluation["policies"]["selector"], evaluation["policies"]["best_prompt"]
    gain, low, high = (100 * selector[key] for key in ("gain", "gain_ci_low", "gain_ci_high"))
    print(
        f"In short: the best single prompt is {best['prompt_id']} with {100 * best['value']:.1f}% success. Choosing\n"
        f"per query gives {100 * selector['value']:.1f}%, a gain of {gain:+.1f} points (95% interval {low:+.1f} to "
        f"{high:+.1f})\non queries that nothing was learned from."
    )
    print(f"\nThe files are in {out}: {', '.join(Path(f).name for f in document['files'])}.")
    print(
        f"It took {document['seconds']:.0f} s. Your own log: oirl import YOUR.jsonl --out log.parquet, then as above."
    )


def _silent(text: str) -> None:
    """Print nothing."""
