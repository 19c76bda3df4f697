"""HIR from a log alone, with nothing sampled for it: failures teach what "wrong" means, and so what "right" does.

The small language model that comes with oirl answers word problems; its responses, right and wrong, are a log. HIR
learns from all of it, each response under the instruction that it did follow. On other problems the tuned model is
asked for right answers, and, to see what the instruction does, for wrong ones. Beside it stand the initial model and
filtered SFT, which learns from right responses only, with the same number of updates.

Run: python examples/hir_from_a_log.py [--problems 300] [--updates 300]
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

import oirl
from oirl.records import Query
from oirl.statistics.intervals import paired_interval
from oirl_data import small_lm_path
from oirl_data.problems import generate_problems

SMALL = str(small_lm_path())
# Words that this model's tokenizer knows; for other models the defaults will do.
RELABEL = {
    "name": "correctness",
    "correct": "The answer is equal . {prompt}",
    "wrong": "The answer is not equal . {prompt}",
}


def verdicts(model: str, prompt: str, queries: list[Query], out: Path) -> list[bool]:
    """Ask a model, and return whether each response is right."""
    with oirl.open_engine("transformers", model) as engine:
        sampling = oirl.Sampling(max_tokens=64, temperature=0.0)
        oirl.collect(engine, queries, [("asked", prompt)], out, sampling=sampling, grade="numeric")
    return [verdict is True for verdict in oirl.read_log(out)["correct"].to_pylist()]


def shown(name: str, before: list[bool], after: list[bool]) -> str:
    """Return a line: success, and the paired gain over the initial model with its interval."""
    first, second = (sum(a and not b for a, b in zip(x, y, strict=True)) for x, y in ((after, before), (before, after)))
    gain, low, high = paired_interval(first, second, len(after))
    return f"{name:24} {sum(after) / len(after):6.1%}  gain {gain:+.1%} [{low:+.1%}, {high:+.1%}]"


def main() -> None:
    """Collect a log, tune twice, compare on other problems."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=300)
    parser.add_argument("--updates", type=int, default=300)
    args = parser.parse_args()
    problems = generate_problems(2 * args.problems, random.Random(0), held_out=True, distinct_masked=True)
    queries = [Query(f"q{i}", problem.query, str(problem.answer)) for i, problem in enumerate(problems)]
    train, test = queries[: args.problems], queries[args.problems :]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with oirl.open_engine("transformers", SMALL) as engine:
            sampling = oirl.Sampling(max_tokens=64)
            log = folder / "log.parquet"
            oirl.collect(engine, train, [("plain", "{query}")], log, sampling=sampling, grade="numeric", replicates=8)
        settings = {"model": SMALL, "log": str(log), "held_out": 0.0, "learning_rate": 3e-4, "batch": 64}
        settings |= {"micro_batch": 64, "updates": args.updates}
        filtered = oirl.tune("filter", settings | {"out": str(folder / "filter")})
        hir = oirl.tune("hir", settings | {"out": str(folder / "hir"), "relabel": RELABEL})
        right, wrong = hir.prompts.values()
        before = verdicts(SMALL, "{query}", test, folder / "before.parquet")
        print(f"{'initial model':24} {sum(before) / len(before):6.1%}  of {len(test)} other problems")
        after = verdicts(filtered.model, "{query}", test, folder / "filter.parquet")
        print(shown("filtered SFT", before, after))
        for text, prompt in (("HIR, asked for right", right), ("HIR, asked for wrong", wrong)):
            after = verdicts(hir.model, prompt, test, folder / f"{text[-5:].strip()}.parquet")
            print(shown(text, before, after))


if __name__ == "__main__":
    main()
