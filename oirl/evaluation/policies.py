"""Policies on a full matrix of queries and prompts, and their values by replay. Pure functions of arrays."""

from __future__ import annotations

import numpy as np


def switch(scores: np.ndarray, best: int, margin: float) -> np.ndarray:
    """Return the prompt of each query: the one with the highest score, if it beats `best` by more than `margin`.

    Args:
        scores: Estimated success of each prompt, float (Q, P).
        best: Position of the best single prompt, kept where no other is clearly better.
        margin: Smallest estimated gain that pays for leaving `best`, at least 0.

    Returns:
        Positions of prompts, int64 (Q,).
    """
    top = scores.argmax(axis=1)
    ahead = scores[np.arange(len(scores)), top] - scores[:, best] > margin
    return np.where(ahead, top, best)


def replay(rates: np.ndarray, choice: np.ndarray) -> np.ndarray:
    """Return the logged success of the chosen prompt of each query, float (Q,): exact where all prompts were run.

    Args:
        rates: Mean success over replicates, float (Q, P).
        choice: Positions of prompts, int (Q,).
    """
    return np.asarray(rates[np.arange(len(rates)), choice])


def one_draw_oracle(runs: np.ndarray, successes: np.ndarray) -> float:
    """Return the mean of 1 − Π_p (1 − k_p / n_p): how often one run of every prompt holds a right one.

    It is what "the best prompt in hindsight" reaches, luck included, so it is no ceiling of any policy.

    Args:
        runs: Int (Q, P), all at least 1.
        successes: Int (Q, P).
    """
    return float((1 - np.prod(1 - successes / runs, axis=1)).mean())


def held_out_ceiling(
    runs: np.ndarray,
    successes: np.ndarray,
    estimate: np.ndarray,
    rng: np.random.Generator,
    *,
    estimate_runs: float = 4.0,
    draws: int = 200,
) -> float:
    """Return the value of choosing each query's prompt by all its runs but one, scored on the run left out.

    No choice is scored on a run that it has seen, so luck does not count; as it chooses from few runs, it is a lower
    bound of what the best choice per query could reach.

    Args:
        runs: Int (Q, P), all at least 2.
        successes: Int (Q, P).
        estimate: Success estimated without these runs, float (Q, P); it counts beside the runs that are seen.
        rng: Source of chance for which run is left out.
        estimate_runs: As how many runs the estimate counts.
        draws: Repetitions that are averaged.
    """
    total = 0.0
    for _ in range(draws):
        left_out = rng.random(runs.shape) < successes / runs
        seen = (successes - left_out + estimate_runs * estimate) / (runs - 1 + estimate_runs)
        total += left_out[np.arange(len(runs)), seen.argmax(axis=1)].mean()
    return float(total / draws)
