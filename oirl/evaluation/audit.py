"""What a log can tell and what it cannot: duplicates, leaks, labels, coverage, prompts, ceiling, power."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from oirl.errors import DataError
from oirl.evaluation.ceilings import best_choice_ceiling
from oirl.evaluation.logged import adaptive_warning, ungraded_warning
from oirl.evaluation.power import compare_prompts, power_of
from oirl.evaluation.replies import check_cut_off, check_labels, repeated_until_right
from oirl.evaluation.success import prompt_success
from oirl.logs.cells import Cells, make_cells
from oirl.logs.costs import run_costs
from oirl.logs.groups import group_queries
from oirl.logs.splits import distinct_queries, find_leaks
from oirl.logs.store import conform_table
from oirl.logs.text import normalise
from oirl.rewards.training import check_seed, pooled_models_warning
from oirl.statistics.intervals import MIN_QUERIES

AUDITED = (
    "query_id", "query", "prompt_id", "prompt", "response", "correct", "answer", "split", "model", "tokens_in",
    "tokens_out", "cost", "sampling", "metadata", "propensity",
)  # fmt: skip
"""The columns of a log that `audit` reads."""

_SURE_AGREEMENT = 0.999


@dataclass(slots=True)
class Audit:
    """What `audit` found; `to_dict` gives the JSON document.

    Attributes:
        n_rows: Rows of the log.
        n_queries: Distinct query ids.
        n_prompts: Distinct prompt ids.
        duplicates: `exact`: query ids whose normalised text another id has too; `near`: further ones that are near
            duplicates of another; `groups`: unlike queries; `repeated_replies`: replies that repeat an earlier one of
            the same query and prompt word for word.
        leaks: `exact`, `near` and `queries`, see `oirl.logs.splits.Leaks`.
        coverage: Graded `cells` (query and prompt), `missing` ones, `complete_queries`, `one_prompt_queries`,
            `rows_without_verdict`.
        replicates: `cells` that were run more than once, and `agreement`, how often two of their runs agree.
        labels: See `oirl.evaluation.replies.Labels`.
        cut_off: See `oirl.evaluation.replies.CutOff`.
        prompts: Success of each prompt with its interval, best first.
        comparisons: Pairs of prompts, the least sure first (`oirl.evaluation.power.Comparison`).
        ceiling: What the best choice per query could reach (`oirl.evaluation.ceilings.Ceiling`).
        power: How small a gain the log could show (`oirl.evaluation.power.Power`).
        costs: Per prompt the means of tokens_in, tokens_out and cost per run, None where not known.
        verdict: What it comes to, in sentences.
        warnings: What is wrong with the log.
    """

    n_rows: int
    n_queries: int
    n_prompts: int
    duplicates: dict[str, int]
    leaks: dict[str, int]
    coverage: dict[str, int]
    replicates: dict[str, Any]
    labels: dict[str, Any]
    cut_off: dict[str, Any]
    prompts: list[dict[str, Any]]
    comparisons: list[dict[str, Any]]
    ceiling: dict[str, Any]
    power: dict[str, Any]
    costs: list[dict[str, Any]] = field(default_factory=list)
    verdict: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the audit as a dictionary for JSON; what cannot be known is None."""
        return asdict(self)


def audit(log: pa.Table, *, prices: Mapping[str, tuple[float, float]] | None = None, seed: int = 0) -> Audit:
    """Say what a log can tell and what it cannot. No model is fitted.

    Args:
        log: Interactions; all rows count, whatever their split.
        prices: Prices of tokens by model, for logs without costs (`oirl.logs.costs.read_prices`).
        seed: For the sample of replies that are graded, and the ceiling.

    Raises:
        DataError: If the log has no rows, or an id stands for several texts.
        ConfigError: If the seed is negative.
    """
    check_seed(seed)
    rng = np.random.default_rng(seed)
    log = conform_table(log, AUDITED)
    if not len(log):
        raise DataError("the log has no rows")
    ids, texts, index = distinct_queries(log)
    grouping = group_queries(texts)
    leaks = find_leaks(log, _group_of_texts(log, ids, grouping.labels))
    labels = check_labels(log, rng)
    cut_off = check_cut_off(log)
    found = Audit(
        n_rows=len(log),
        n_queries=len(ids),
        n_prompts=len(pc.unique(log["prompt_id"])),
        duplicates=_duplicates(log, texts, grouping.labels, index),
        leaks=leaks.to_dict(),
        coverage={"rows_without_verdict": log["correct"].null_count},
        replicates={"cells": 0, "agreement": None},
        labels=labels.to_dict(),
        cut_off=cut_off.to_dict(),
        prompts=[],
        comparisons=[],
        ceiling={},
        power={},
        costs=_costs(log, prices),
        warnings=[
            warning
            for warning in (
                leaks.warning(),
                grouping.warning(),
                pooled_models_warning(log),
                adaptive_warning(log),
                ungraded_warning(log),
            )
            if warning
        ],
    )
    if log["correct"].null_count == len(log):
        found.verdict = ["No row has a verdict, so nothing can be said of the prompts: import with --grade CHECKER."]
    else:
        cells = make_cells(log)
        group_of = dict(zip(ids, grouping.labels.tolist(), strict=True))
        _describe_verdicts(found, cells, np.array([group_of[name] for name in cells.query_ids]), rng)
    found.warnings += _data_warnings(found)
    retried = repeated_until_right(log)
    if retried is not None:
        found.warnings.append(
            f"in {retried:.0%} of the repeated cases only the last run is right: if runs were repeated until one was, "
            "success is overstated; keep the first run of each"
        )
    return found


def _costs(log: pa.Table, prices: Mapping[str, tuple[float, float]] | None) -> list[dict[str, Any]]:
    found = run_costs(log, prices)
    if found is None:
        return []
    money = found.values if found.unit == "money" else np.full(len(log), np.nan)
    table = log.select(["prompt_id", "tokens_in", "tokens_out"]).append_column(
        "cost", pa.array(money, from_pandas=True)
    )
    means = table.group_by("prompt_id").aggregate([(name, "mean") for name in ("tokens_in", "tokens_out", "cost")])
    rows = [{key.removesuffix("_mean"): value for key, value in row.items()} for row in means.to_pylist()]
    return sorted(rows, key=lambda row: row["prompt_id"])


def _group_of_texts(log: pa.Table, ids: list[str], groups: np.ndarray) -> dict[str, int]:
    """Return the group of every text; a query id may stand for several spellings of one."""
    group_of = dict(zip(ids, groups.tolist(), strict=True))
    pairs = log.group_by(["query_id", "query"]).aggregate([])
    return {t: group_of[i] for i, t in zip(pairs["query_id"].to_pylist(), pairs["query"].to_pylist(), strict=True)}


def _duplicates(log: pa.Table, texts: list[str], groups: np.ndarray, index: np.ndarray) -> dict[str, int]:
    normal: dict[str, int] = {}
    for text in texts:
        key = normalise(text)
        normal[key] = normal.get(key, 0) + 1
    exact = np.array([normal[normalise(text)] > 1 for text in texts], dtype=bool)
    grouped = np.bincount(groups)[groups] > 1
    replied = log.filter(pc.is_valid(log["response"])).select(["query_id", "prompt_id", "model", "response"])
    distinct = replied.group_by(["query_id", "prompt_id", "model", "response"]).aggregate([])
    return {
        "exact": int(exact.sum()),
        "near": int((grouped & ~exact).sum()),
        "groups": len(np.unique(groups)),
        "repeated_replies": len(replied) - len(distinct),
    }


def _describe_verdicts(found: Audit, cells: Cells, groups: np.ndarray, rng: np.random.Generator) -> None:
    """Fill in what needs verdicts."""
    runs, successes = cells.matrices()
    rates = successes / np.maximum(runs, 1)
    asked = runs > 0
    found.coverage |= {
        "cells": int(asked.sum()),
        "missing": int((~asked).sum()),
        "complete_queries": int(asked.all(axis=1).sum()),
        "one_prompt_queries": int((asked.sum(axis=1) == 1).sum()),
    }
    found.replicates = _replicates(cells)
    found.prompts = [s.to_dict() for s in prompt_success(cells, groups)]
    best = cells.prompt_ids.index(found.prompts[0]["prompt_id"])
    comparisons = compare_prompts(cells.prompt_ids, runs, rates, groups, best)
    found.comparisons = [c.to_dict() for c in comparisons]
    found.ceiling = best_choice_ceiling(runs, successes, rng, groups).to_dict()
    found.power = power_of(runs, rates, groups, best).to_dict()
    found.verdict = _verdict(found, len(np.unique(groups)))


def _replicates(cells: Cells) -> dict[str, Any]:
    """Return the repeated cells and how often two runs of one agree, each cell counting alike."""
    n, k = cells.runs[cells.runs > 1], cells.successes[cells.runs > 1]
    if not len(n):
        return {"cells": 0, "agreement": None}
    agree = (k * (k - 1) + (n - k) * (n - k - 1)) / (n * (n - 1))
    return {"cells": len(n), "agreement": float(agree.mean())}


def _data_warnings(found: Audit) -> list[str]:
    """Return what is wrong with the rows themselves."""
    warnings = []
    labels, cut = found.labels, found.cut_off
    if labels["changed"]:
        share = labels["changed"] / labels["regraded"]
        warnings.append(
            f"a careful reading ({labels['checker']}) gives {labels['changed']:,} of {labels['regraded']:,} replies "
            f"({share:.1%}) the opposite verdict, {labels['to_right']:,} of them to right; import with --grade "
            f"{labels['checker']} to use it"
        )
    if labels["answer_not_last"]:
        warnings.append(
            f"{labels['answer_not_last']:,} replies that count as wrong hold the gold number, but give another as the "
            "answer"
        )
    if cut["cut_off"]:
        wrong = "" if cut["wrong_if_cut"] is None else f", {cut['wrong_if_cut']:.0%} of them wrong"
        warnings.append(
            f"{cut['cut_off']:,} of {cut['replies']:,} replies were cut off by a limit ({cut['source']}){wrong}: a "
            "larger limit may change which prompt is best"
        )
    elif cut["cut_off"] is None and cut["end_midway"] > 0.02 * cut["replies"]:
        warnings.append(
            f"{cut['end_midway']:,} of {cut['replies']:,} replies end in the middle of a sentence; were they cut off? "
            "Log tokens_out and max_tokens to know"
        )
    if found.coverage["rows_without_verdict"]:
        warnings.append(f"{found.coverage['rows_without_verdict']:,} rows have no verdict and count for nothing")
    agreement = found.replicates["agreement"]
    if found.duplicates["repeated_replies"] and agreement is not None and agreement > _SURE_AGREEMENT:
        warnings.append(
            f"{found.duplicates['repeated_replies']:,} replies repeat an earlier one word for word: repeats of a "
            "cached or greedy run say nothing of chance"
        )
    return warnings


def _verdict(found: Audit, groups: int) -> list[str]:
    """Return what the figures come to, for people."""
    best, others = found.prompts[0], found.prompts[1:]
    said = [
        f"Best prompt: {best['prompt_id']} with {best['success']:.1%} success ({best['ci_low']:.1%} to "
        f"{best['ci_high']:.1%})."
    ]
    if not others:
        return [*said, "There is one prompt only, so there is nothing to choose."]
    said.append(_standing(found, best["prompt_id"], groups))
    said.append(_about_choosing(found))
    power = found.power
    if power["smallest_detectable_gain"] is not None:
        more = power["more_queries"]
        said.append(
            f"With {power['n_queries']:,} queries a gain of {100 * power['smallest_detectable_gain']:.1f} points or "
            "more would be found with 80% power"
            + (f"; for one point {more:,} more queries are needed." if more else ", one point included.")
        )
    if groups < MIN_QUERIES:
        said.append(f"That is too few to conclude anything; {MIN_QUERIES} are the least.")
    return said


def _standing(found: Audit, best: str, groups: int) -> str:
    """Return how the prompt with the highest success stands against the others, on the queries that they share."""
    met = [c for c in found.comparisons if best in (c["first"], c["second"])]
    unmet = len(found.prompts) - 1 - len(met)
    if groups < MIN_QUERIES:
        return f"With {groups} unlike queries nothing can be shown of the prompts."
    if not met:
        return "It cannot be compared: no other prompt was run on the same queries."
    ahead = [c["first"] for c in met if c["told_apart"] and c["second"] == best]
    if ahead:
        return (
            f"But {_some(ahead)} did better than it on the queries that they share: the prompts were not run on the "
            "same queries, so that their success cannot be compared as it stands."
        )
    unsure = [c["second"] if c["first"] == best else c["first"] for c in met if not c["told_apart"]]
    rest = f" {unmet} more were not run on the same queries." if unmet else ""
    if unsure:
        of = f"{len(unsure)} of the {len(met)} others on shared queries ({_some(unsure)})"
        return f"It cannot be told apart from {of}.{rest}"
    return f"It is shown to be better than each of the {len(met)} others on the queries that they share.{rest}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def _about_choosing(found: Audit) -> str:
    ceiling = found.ceiling
    if ceiling.get("value") is None and ceiling.get("ci_high") is None:
        return (
            f"Whether choosing per query could pay is not known: {ceiling['n_queries']} queries were run under every "
            f"prompt, and {MIN_QUERIES} unlike ones are the least. Run some under all prompts, better twice."
        )
    room_low, room_high = 100 * (ceiling["gain_ci_low"] or 0.0), 100 * ceiling["gain_ci_high"]
    if room_high < 0.05:
        return "No query was right under another prompt than the best one, so choosing per query can gain nothing here."
    if ceiling.get("value") is None:
        return (
            f"Choosing per query could gain anything from 0 to {room_high:.1f} points; run some queries twice under "
            "every prompt to know more."
        )
    room = 100 * ceiling["gain"]
    hindsight = 100 * (ceiling["one_draw_oracle"] - ceiling["best_prompt"])
    return (
        f"The best choice per query could gain about {room:.1f} points ({max(room_low, 0):.1f} to {room_high:.1f}) "
        f"over the best single prompt; in hindsight of one run it looks like {hindsight:.1f}, "
        f"{hindsight - room:.1f} of them luck."
    )
