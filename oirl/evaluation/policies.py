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


def one_hot(choice: np.ndarray, prompts: int) -> np.ndarray:
    """Return a choice as a policy π, float (Q, P): probability 1 of the chosen prompt.

    Args:
        choice: Positions of prompts, int (Q,).
        prompts: Number of prompts P.
    """
    return np.asarray(np.eye(prompts)[choice])
