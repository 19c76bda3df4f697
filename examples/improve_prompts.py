"""From no log to a better prompt, end to end, on the small language model that comes with oirl.

Three poor prompts are run on word problems and graded: a log. A proposer writes new prompts, here a scripted one; with
`MetaPromptProposer(engine)` a language model writes them from the log's evidence. They race against the best of the
three, and the winner's gain is measured on queries that the race did not see.

Run: python examples/improve_prompts.py [--problems 400]
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import oirl
from oirl.records import Query
from oirl.selection.meta_prompt import Evidence
from oirl.selection.proposing import RacePlan, Screen, propose, write_prompt_file
from oirl_data import small_lm_path
from oirl_data.problems import generate_problems

POOR = [("answer", "{query} Answer only."), ("plain", "{query}"), ("hurry", "{query} Draw a table first. Answer only.")]
NEW = ["{query} Work step by step.", "Write one equation and solve it. {query}", "{query} Check the units."]


class ScriptedProposer:
    """Proposes what stands above; a language model would read the evidence."""

    def propose(self, evidence: Evidence, already: Sequence[str], n: int, seed: int) -> list[str]:
        """Return up to n prompts."""
        print(f"the best of {len(evidence.prompts)} prompts is right in {evidence.prompts[0].success:.0%} of its runs")
        return NEW[:n]


def main() -> None:
    """Collect, propose, race, confirm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=400)
    problems = generate_problems(parser.parse_args().problems, random.Random(0), held_out=True)
    queries = [Query(f"q{i}", problem.query, str(problem.answer)) for i, problem in enumerate(problems)]
    settings = oirl.Sampling(max_tokens=64, temperature=0.7)
    with tempfile.TemporaryDirectory() as name, oirl.open_engine("transformers", str(small_lm_path())) as engine:
        folder = Path(name)
        oirl.collect(
            engine, queries, POOR, folder / "log.parquet", sampling=settings, design="balanced", grade="numeric"
        )
        plan = RacePlan(engine, "numeric", folder / "race.parquet", n_race=100, n_confirm=200, sampling=settings)
        log = oirl.read_log(folder / "log.parquet")
        report = propose(log, ScriptedProposer(), n=3, screen=Screen(keep=3), plan=plan)
        write_prompt_file(report, folder / "better.jsonl")
    race = report.race
    assert race is not None
    for racer in race.racers:
        fate = f"out after {racer.left_after}" if racer.left_after else "stayed"
        print(f"{racer.success:6.1%} of {racer.n:3} queries, {fate:12}  {racer.prompt}")
    if race.gain is not None:
        interval = f"{race.ci_low:+.1%} to {race.ci_high:+.1%}"
        print(f"on {race.n_confirm} other queries the winner gains {race.gain:+.1%} ({interval})")
    for warning in report.warnings:
        print(f"warning: {warning}")


if __name__ == "__main__":
    main()
