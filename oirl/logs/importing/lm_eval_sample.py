"""One sample of lm-evaluation-harness: what was asked, what was replied, what counts as right."""

from __future__ import annotations

import json
from typing import Any

from oirl.logs.importing.runs import as_list, number, text_of
from oirl.logs.importing.templates import shared_start


def slot_text(value: Any) -> str | None:
    """Return a field of a document as text, None where it is none."""
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        return "\n".join(value)
    if isinstance(value, dict) and isinstance(value.get("text"), list):  # choices of ARC and its like
        return slot_text(value["text"])
    return None


def read_arguments(arguments: Any) -> tuple[str | None, dict[str, Any] | None, list[str]]:
    """Return the rendered prompt, the sampling settings, and the continuations that were scored."""
    if isinstance(arguments, dict):
        requests = [list(a.values()) if isinstance(a, dict) else a for a in arguments.values()]
    else:
        requests = arguments if isinstance(arguments, list) else []
    requests = [r if isinstance(r, list) else [r] for r in requests]
    if not requests or not requests[0]:
        return None, None, []
    first = requests[0]
    rendered = rendered_text(first[0])
    if len(first) > 1 and isinstance(first[1], dict):
        return rendered, first[1], []
    options = [r[1] for r in requests if len(r) > 1 and isinstance(r[1], str)]
    if len(options) > 1 and len(set(options)) == 1:  # the contexts differ, not what follows them
        contexts = [text for r in requests if (text := rendered_text(r[0])) is not None]
        start = shared_start(contexts)
        start = start[: start.rfind(" ") + 1]  # Sarah and Samantha share two letters, but no word
        end = shared_start([c[len(start) :][::-1] for c in contexts])[::-1]
        end = end[end.find(" ") :] if " " in end else ""
        rendered, options = start, [c[len(start) : len(c) - len(end)] for c in contexts]
    return rendered, None, options if len(options) == len(requests) else []


def rendered_text(value: Any) -> str | None:
    """Return the text given to the model; chat models of a server are given a list of messages, as JSON."""
    if isinstance(value, str) and value.startswith("[{") and '"role"' in value:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return value if isinstance(value, str) else None
    if isinstance(value, list):
        return "\n\n".join(text_of(m.get("content")) for m in value if isinstance(m, dict))
    return value if isinstance(value, str) else None


def read_replies(sample: dict[str, Any], options: list[str], metric: str | None) -> list[str | None]:
    """Return the replies to one document; for scored continuations, the one with the highest log-probability."""
    responses = sample.get("resps")
    if not isinstance(responses, list) or not responses:
        return [None]
    if options:
        found = [_log_probability(r) for r in as_list(sample.get("filtered_resps")) or responses]
        if len(found) != len(options) or any(p is None for p in found):
            return [None]
        # acc_norm compares log-probabilities per character of the continuation.
        sizes = [max(len(o.strip()), 1) if metric == "acc_norm" else 1 for o in options]
        scores = [(p or 0.0) / n for p, n in zip(found, sizes, strict=True)]
        return [options[scores.index(max(scores))].strip()] if len(options) > 1 else [None]
    replies = responses[0] if isinstance(responses[0], list) else responses
    texts: list[str | None] = [r for r in replies if isinstance(r, str)]
    return texts or [None]


def _log_probability(value: Any) -> float | None:
    while isinstance(value, list) and value:
        value = value[0]
    try:
        return float(value)  # written as text, "-inf" among them
    except (TypeError, ValueError, OverflowError):
        return None


def read_target(target: Any, options: list[str]) -> str | None:
    """Return the gold answer; of choices, the one that is right."""
    if isinstance(target, list) and target:
        target = target[0]
    if isinstance(target, bool) or target is None:
        return None
    place = target if isinstance(target, int) else None
    if isinstance(target, str) and target.isdecimal() and len(target) < 6:
        place = int(target)
    if options and place is not None and 0 <= place < len(options):
        return options[place].strip()
    return target if isinstance(target, str) else str(target) if isinstance(target, (int, float)) else None


def read_verdict(value: Any) -> bool | float | None:
    """Return a metric's value as a verdict or a grade."""
    if isinstance(value, bool):
        return value
    return number(value)
