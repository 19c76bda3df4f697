"""Reading what a server replies, whatever it is: nothing of it is trusted to have the right type."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from oirl.engines.base import Completion

_LARGEST = 2**31 - 1


class BrokenReplyError(ValueError):
    """A reply of status 200 that is not what the interface says."""


def read_choices(reply: Any, n: int) -> list[Any]:
    """Return the choices of a reply.

    Raises:
        BrokenReplyError: If there are not n, or one has no text or was broken off.
    """
    choices = getattr(reply, "choices", None)
    if not isinstance(choices, list) or len(choices) != n:
        raise BrokenReplyError("the reply is no completion")
    for choice in choices:
        message = getattr(choice, "message", None)
        if not hasattr(message, "content") and getattr(choice, "text", None) is None:
            raise BrokenReplyError("the reply has no text")
        if not isinstance(_text(choice), (str, type(None))):
            raise BrokenReplyError("the text of the reply is none")
        if getattr(choice, "finish_reason", None) == "abort":  # vLLM, when it is paused or shut down
            raise BrokenReplyError("the server has broken off the response")
    return choices


def read_completion(reply: Any, choice: Any, *, logprobs: bool, alone: bool, seconds: float) -> Completion:
    """Return a choice as a completion; what has not the type that it should have counts as not told.

    Args:
        reply: What it stands in.
        choice: One of `read_choices`.
        logprobs: Whether log-probs are wanted.
        alone: Whether it is the only choice, so that the reply's count of tokens is its own.
        seconds: How long it took.
    """
    tokens = _ids(getattr(choice, "token_ids", None))
    prompt = _ids(getattr(reply, "prompt_token_ids", None)) or _ids(getattr(choice, "prompt_token_ids", None))
    usage = getattr(reply, "usage", None)
    counted = _count(getattr(usage, "completion_tokens", None)) if alone else None
    finish, fingerprint = getattr(choice, "finish_reason", None), getattr(reply, "system_fingerprint", None)
    return Completion(
        _text(choice) or "",
        finish if isinstance(finish, str) else None,
        tokens,
        _logprobs(getattr(choice, "logprobs", None)) if logprobs else None,
        prompt,
        _count(getattr(usage, "prompt_tokens", None)),
        len(tokens) if tokens is not None else counted,
        seconds,
        model_fingerprint=fingerprint if isinstance(fingerprint, str) else None,
    )


def read_scores(reply: Any, start: int, tokens: Sequence[int]) -> list[float]:
    """Return the log-probs of the tokens of a prompt from a place on, as vLLM tells them.

    Raises:
        BrokenReplyError: If they are not there.
    """
    told = getattr(read_choices(reply, 1)[0], "prompt_logprobs", None)
    rows = told[start:] if isinstance(told, list) else []
    entries = [row.get(str(t)) if isinstance(row, dict) else None for row, t in zip(rows, tokens, strict=False)]
    scores = [entry.get("logprob") if isinstance(entry, dict) else None for entry in entries]
    if len(scores) != len(tokens) or not all(isinstance(s, (int, float)) and not isinstance(s, bool) for s in scores):
        raise BrokenReplyError("the reply does not tell the log-probs of the prompt")
    return [float(score) for score in scores if score is not None]


def _text(choice: Any) -> Any:
    message = getattr(choice, "message", None)
    return getattr(choice, "text", None) if message is None else getattr(message, "content", None)


def _ids(value: Any) -> tuple[int, ...] | None:
    whole = isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in value)
    return tuple(value) if whole and value else None


def _logprobs(told: Any) -> tuple[float, ...] | None:
    values = getattr(told, "token_logprobs", None)
    content = getattr(told, "content", None)
    if isinstance(content, list):
        values = [getattr(token, "logprob", None) for token in content]
    if not isinstance(values, list) or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        return None
    return tuple(float(value) for value in values) or None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST else None
