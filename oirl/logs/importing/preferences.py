"""Preference data to preference pairs: HH-RLHF, TRL, UltraFeedback and RewardBench, in any table or JSON Lines."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from oirl.logs.importing.base import Chunk, Refusal, Request
from oirl.logs.importing.objects import first_object, read_objects
from oirl.logs.importing.runs import Run, as_list, choose, number, row_chunks, text_of, tidy
from oirl.logs.importing.templates import shared_start

_TURN = re.compile(r"\n\n(?=(?:Human|Assistant):)")
_MAX_PAIRS = 10_000
_SAME = "chosen and rejected are the same text: they show no preference"

Rows = Iterator["Run | Refusal"]


@dataclass(frozen=True)
class _Preferences:
    """A format whose rows each make preference pairs."""

    name: str
    description: str
    known_by: Callable[[dict[str, Any]], bool]
    read: Callable[[int, dict[str, Any]], Rows]
    record: str = "preferences"

    def sniff(self, path: Path, head: bytes) -> bool:
        """Accept by the fields of the first row."""
        return self.known_by(first_object(path, head))

    def chunks(self, path: Path, request: Request) -> Iterator[Chunk]:
        """Yield the pairs of each row."""
        yield from row_chunks(path, self._rows(path), request)

    def _rows(self, path: Path) -> Rows:
        for row, value in read_objects(path):
            yield from [value] if isinstance(value, Refusal) else self.read(row, value)


def _pair(row: int, value: dict[str, Any], query: str, chosen: Any, rejected: Any, **more: Any) -> Run | Refusal:
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        return Refusal(row, "chosen and rejected must each be one text, or one conversation", value)
    if chosen.strip() == rejected.strip():
        return Refusal(row, _SAME, value)
    values = {"query": query, "chosen": chosen, "rejected": rejected, **more}
    return Run(row, values, source=value)


# --- HH-RLHF -------------------------------------------------------------------------------------------------------


def _is_hh(first: dict[str, Any]) -> bool:
    texts = [first.get("chosen"), first.get("rejected")]
    return set(first) == {"chosen", "rejected"} and all(isinstance(t, str) and "\n\nHuman:" in t for t in texts)


def _read_hh(row: int, value: dict[str, Any]) -> Rows:
    """Split two transcripts where they part: what they share is the query, the rest are the responses."""
    chosen, rejected = value.get("chosen"), value.get("rejected")
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        yield Refusal(row, "`chosen` and `rejected` must be transcripts", value)
        return
    turns = [_TURN.split(text.strip("\n")) for text in (chosen, rejected)]
    shared = len(shared_start(turns))  # whole turns, as these are lists
    context = turns[0][:shared]
    rests = [t[shared:] for t in turns]
    if not context or not context[-1].startswith("Human:"):
        yield Refusal(row, "the transcripts share no context that ends with a turn of the human", value)
        return
    if not all(rest and rest[0].startswith("Assistant:") for rest in rests):
        yield Refusal(row, "one transcript has no reply after the context that both share", value)
        return
    replies = ["\n\n".join([rest[0].removeprefix("Assistant:").strip(), *rest[1:]]) for rest in rests]
    for name, rest in zip(("chosen", "rejected"), rests, strict=True):
        speaker, _, text = rest[-1].partition(":")
        if speaker != "Assistant" or not text.strip():
            yield Refusal(row, f"the last turn of `{name}` is empty, or not the assistant's", value)
            return
    if shared == 1:
        query, metadata = context[0].removeprefix("Human:").strip(), None
    else:
        query, metadata = "\n\n".join(context), {"messages": [_message(turn) for turn in context]}
    yield _pair(row, value, query, *replies, source="hh-rlhf", metadata=metadata)


def _message(turn: str) -> dict[str, str]:
    speaker, _, text = turn.partition(":")
    return {"role": {"Human": "user"}.get(speaker, "assistant"), "content": text.strip()}


# --- TRL -----------------------------------------------------------------------------------------------------------


def _is_trl(first: dict[str, Any]) -> bool:
    return {"chosen", "rejected"} <= set(first)


def _read_trl(row: int, value: dict[str, Any]) -> Rows:
    """Read explicit and implicit prompts, as text or as messages."""
    prompt = value.get("prompt", value.get("query"))
    chosen, rejected = value.get("chosen"), value.get("rejected")
    messages: list[dict[str, Any]] = []
    query: Any
    if _is_chat(chosen) and _is_chat(rejected):
        # An explicit prompt may be repeated in the conversations; what they share is then the prompt.
        shared = 0
        while shared < min(len(chosen), len(rejected)) and _same(chosen[shared], rejected[shared]):
            shared += 1
        messages = chosen[:shared]
        if _is_chat(prompt):
            messages = _joined(prompt, messages)
        query = _conversation(messages) if messages else prompt if isinstance(prompt, str) else ""
        chosen, rejected = (_conversation(c[shared:], reply=True) for c in (chosen, rejected))
    elif isinstance(chosen, str) and isinstance(rejected, str):
        messages = prompt if _is_chat(prompt) else []
        query = _conversation(messages) if messages else prompt
        if not isinstance(query, str):
            query, chosen, rejected = _implicit(chosen, rejected)
    else:
        yield Refusal(row, "`chosen` and `rejected` must both be text, or both lists of messages", value)
        return
    if not query.strip():
        yield Refusal(row, "no `prompt`, and `chosen` and `rejected` do not begin alike", value)
        return
    margin = number(value.get("margin"))
    given = value.get("margin")
    if margin is None and given is not None and given == given:  # NaN, as tables write it, is no margin
        yield Refusal(row, f"margin is {given!r}: a finite number, or none, is needed", value)
        return
    if margin is None:
        scores = [number(value.get("score_chosen")), number(value.get("score_rejected"))]
        margin = scores[0] - scores[1] if scores[0] is not None and scores[1] is not None else None
    yield _pair(
        row,
        value,
        query,
        chosen,
        rejected,
        margin=margin,
        pair_id=value.get("pair_id"),
        source=value.get("source"),
        metadata=tidy({"messages": messages}) if len(messages) > 1 else value.get("metadata"),
    )


def _joined(prompt: list[dict[str, Any]], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a prompt and the turns after it, which may repeat its end, or all of it."""
    for k in range(min(len(prompt), len(messages)), 0, -1):
        if all(_same(a, b) for a, b in zip(prompt[-k:], messages[:k], strict=True)):
            return [*prompt, *messages[k:]]
    return [*prompt, *messages]


def _implicit(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Cut two texts after the words that both begin with."""
    shared = shared_start([chosen, rejected])
    at = max((m.end() for m in re.finditer(r"\s+", shared)), default=0)
    return shared[:at].strip(), chosen[at:].strip(), rejected[at:].strip()


def _is_chat(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "content" in m for m in value)


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.get("role") == other.get("role") and one.get("content") == other.get("content")


def _conversation(messages: list[dict[str, Any]], reply: bool = False) -> str:
    """Return messages as one text: a single one as it is, several each with its role."""
    texts = [(str(m.get("role") or "user").capitalize(), text_of(m.get("content"))) for m in messages]
    if len(texts) == 1:
        return texts[0][1]
    if reply and texts and texts[0][0] == "Assistant":
        return "\n\n".join([texts[0][1], *(f"{role}: {text}" for role, text in texts[1:])])
    return "\n\n".join(f"{role}: {text}" for role, text in texts)


# --- RewardBench ---------------------------------------------------------------------------------------------------


def _is_rewardbench(first: dict[str, Any]) -> bool:
    return {"prompt", "chosen", "rejected", "subset"} <= set(first)


def _read_rewardbench(row: int, value: dict[str, Any]) -> Rows:
    """Read one pair, or, as in RewardBench 2, each right completion against each wrong one."""
    prompt = value.get("prompt")
    query = _conversation(prompt) if _is_chat(prompt) else prompt
    if not isinstance(query, str):
        yield Refusal(row, "`prompt` must be text or a list of messages", value)
        return
    chosen, rejected = (
        [v] if isinstance(v, str) or _is_chat(v) else v for v in (value.get("chosen"), value.get("rejected"))
    )
    if not isinstance(chosen, list) or not isinstance(rejected, list) or not chosen or not rejected:
        yield Refusal(row, "`chosen` and `rejected` must be texts or lists of texts", value)
        return
    if len(chosen) * len(rejected) > _MAX_PAIRS:
        yield Refusal(
            row, f"{len(chosen)} x {len(rejected)} completions; at most {_MAX_PAIRS:,} pairs of a row are read"
        )
        return
    pairs = list(itertools.product(range(len(chosen)), range(len(rejected))))
    for i, k in pairs:
        name = None if value.get("id") is None else f"{value.get('subset')}/{value['id']}"
        right, wrong = (_conversation(t, reply=True) if _is_chat(t) else t for t in (chosen[i], rejected[k]))
        yield _pair(
            row,
            value,
            query,
            right,
            wrong,
            pair_id=f"{name}/{i}-{k}" if name and len(pairs) > 1 else name,
            source=f"rewardbench/{value.get('subset')}",
            metadata=tidy({n: value.get(n) for n in ("chosen_model", "rejected_model")}) or None,
        )


# --- UltraFeedback -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UltraFeedback:
    """UltraFeedback: several rated completions of one instruction; each two with different ratings make a pair."""

    name: str = "ultrafeedback"
    description: str = "UltraFeedback: instruction, completions and their ratings, as pairs with margins"
    record: str = "preferences"
    options: frozenset[str] = field(default_factory=lambda: frozenset({"scorer"}))

    def sniff(self, path: Path, head: bytes) -> bool:
        """Accept by the fields of the first row."""
        first = first_object(path, head)
        if not first and b'"completions"' in head and b'"instruction"' in head and b'"annotations"' in head:
            return True  # a first row longer than the head
        return "instruction" in first and isinstance(first.get("completions"), list)

    def chunks(self, path: Path, request: Request) -> Iterator[Chunk]:
        """Yield the pairs of each instruction."""
        yield from row_chunks(path, self._rows(path, request), request)

    def _rows(self, path: Path, request: Request) -> Rows:
        scorer: str | None = None
        ties = 0
        for row, value in read_objects(path):
            if isinstance(value, Refusal):
                yield value
                continue
            completions = [c for c in as_list(value.get("completions")) if isinstance(c, dict)]
            rated = [(c, _ratings(c)) for c in completions]
            if scorer is None and any(r for _, r in rated):
                scorer = choose(path, request.scorer, {n: None for _, r in rated for n in r}, "rating")
            scored = [(c, r[scorer]) for c, r in rated if scorer in r and isinstance(c.get("response"), str)]
            query = value.get("instruction")
            if len(scored) ** 2 > 2 * _MAX_PAIRS:
                yield Refusal(row, f"{len(scored)} completions; at most {_MAX_PAIRS:,} pairs of a row are read")
                continue
            if not isinstance(query, str) or len(scored) < 2:
                yield Refusal(row, "an `instruction` and two completions with ratings are needed", value)
                continue
            pairs = [(a, b) for a, b in itertools.permutations(scored, 2) if a[1] > b[1]]
            ties += len(scored) * (len(scored) - 1) // 2 - len(pairs)
            if not pairs:
                yield Refusal(row, "all completions have the same rating: they show no preference", value)
            for (better, high), (worse, low) in pairs:
                more = {"chosen_model": better.get("model"), "rejected_model": worse.get("model")}
                source = value.get("source")
                yield _pair(
                    row,
                    value,
                    query,
                    better["response"],
                    worse["response"],
                    margin=high - low,
                    source=f"ultrafeedback/{source}" if isinstance(source, str) else "ultrafeedback",
                    metadata=tidy(more),
                )
        if scorer is not None:
            request.warnings.append(
                f"{path.name}: pairs are ordered by {scorer!r} (--scorer chooses another); {ties:,} pairs with equal "
                "ratings were left out"
            )


def _ratings(completion: dict[str, Any]) -> dict[str, float]:
    """Return the ratings of a completion: the mean over aspects first, as `overall_score` is known to hold errors."""
    aspects: dict[str, float] = {}
    annotations = completion.get("annotations")
    for name, note in annotations.items() if isinstance(annotations, dict) else ():
        rating = note.get("Rating") if isinstance(note, dict) else None
        try:
            aspects[str(name)] = float(rating)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            continue
    found = {"mean_rating": sum(aspects.values()) / len(aspects)} if aspects else {}
    for name in ("fine-grained_score", "overall_score"):
        score = number(completion.get(name))
        if score is not None:
            found[name] = score
    return {n: v for n, v in (found | aspects).items() if number(v) is not None}


# --- TRL, unpaired -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrlUnpaired:
    """TRL's unpaired preferences: a completion and whether it is a good one."""

    name: str = "trl-unpaired"
    description: str = "TRL unpaired preferences (prompt, completion, label), as a log under its system messages"
    record: str = "interactions"

    def sniff(self, path: Path, head: bytes) -> bool:
        """Accept by the fields of the first row."""
        return {"prompt", "completion", "label"} <= set(first_object(path, head))

    def chunks(self, path: Path, request: Request) -> Iterator[Chunk]:
        """Yield one row per completion."""
        yield from row_chunks(path, self._rows(path), request)

    def _rows(self, path: Path) -> Rows:
        for row, value in read_objects(path):
            if isinstance(value, Refusal):
                yield value
                continue
            prompt, completion = value.get("prompt"), value.get("completion")
            system = ""
            if _is_chat(prompt):
                # A system message is the instruction; what the user says is the query.
                first = prompt[0].get("role") == "system" and len(prompt) > 1
                system = text_of(prompt[0].get("content")) if first else ""
                prompt = _conversation(prompt[1:] if first else prompt)
            if completion is None or value.get("label") is None:
                yield Refusal(row, "a `completion` and its `label` are needed", value)
                continue
            values = {
                "query": prompt,
                "prompt": system,
                "response": _conversation(completion, reply=True) if _is_chat(completion) else completion,
                "correct": value.get("label"),
            }
            yield Run(row, values, source=value)


HH_RLHF = _Preferences("hh-rlhf", "HH-RLHF transcripts (chosen, rejected; .jsonl, .jsonl.gz)", _is_hh, _read_hh)
TRL = _Preferences("trl", "TRL preferences (chosen, rejected, maybe prompt; text or messages)", _is_trl, _read_trl)
REWARDBENCH = _Preferences(
    "rewardbench", "RewardBench (prompt, chosen, rejected, subset)", _is_rewardbench, _read_rewardbench
)
ULTRAFEEDBACK = UltraFeedback()
TRL_UNPAIRED = TrlUnpaired()
