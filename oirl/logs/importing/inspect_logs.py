"""Inspect AI logs: `.eval` archives and `.json` files, without Inspect's own library."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oirl.errors import ConfigError, DataError, nearest
from oirl.logs.importing.archives import Archive, MemberError
from oirl.logs.importing.base import Chunk, Refusal, Request
from oirl.logs.importing.lines import files_like, read_head, read_whole
from oirl.logs.importing.runs import (
    Run,
    as_dict,
    as_list,
    head_of,
    load_json,
    number,
    run_chunks,
    text_of,
    tidy,
    whole,
)
from oirl.logs.importing.templates import system_template
from oirl.logs.text import text_id

_SAMPLE = re.compile(r"samples/(.+)_epoch_(\d+)\.json")
_ATTACHMENT = re.compile(r"(?m)^attachment://(\w+)$")
_LETTERS = {"C": 1.0, "I": 0.0, "P": 0.5, "N": 0.0}
_PROMPTING = {
    "generate",
    "system_message",
    "user_message",
    "assistant_message",
    "prompt_template",
    "chain_of_thought",
    "multiple_choice",
}
_WORDS = {"yes": 1.0, "true": 1.0, "no": 0.0, "false": 0.0}


@dataclass(frozen=True)
class InspectLogs:
    """Logs of Inspect AI; each sample and epoch is one run."""

    name: str = "inspect"
    description: str = "Inspect AI log (.eval or .json), or a folder of them"
    record: str = "interactions"
    options: frozenset[str] = frozenset({"scorer"})

    def find(self, folder: Path) -> list[Path]:
        """Return the logs of a folder."""
        return files_like(folder, (".eval", ".json"), self.sniff)

    def sniff(self, path: Path, head: bytes) -> bool:
        """Accept zip archives named .eval, and JSON objects that begin as Inspect's logs do."""
        if head.startswith(b"PK"):
            return path.suffix == ".eval"
        start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:4096]
        keys = (b'"eval"', b'"task"') if b'"task_id"' in head else (b'"eval"', b'"eval_id"')
        return start[:1] == b"{" and b'"version"' in start and b'"status"' in start and all(k in head for k in keys)

    def chunks(self, path: Path, request: Request) -> Iterator[Chunk]:
        """Yield one row per sample and epoch."""
        if read_head(path, 2) == b"PK":
            with Archive(path) as archive:
                yield from self._log(path, _header(path, archive), _archived(archive), request)
            return
        log = load_json(path, read_whole(path))
        samples = log.get("samples") if isinstance(log, dict) else None
        if not isinstance(log, dict) or not isinstance(log.get("eval"), dict):
            raise DataError(f"{path} is not a log of Inspect AI: it has no `eval`")
        if not isinstance(samples, list):
            raise DataError(f"{path} holds no samples; it was written with log_samples off, or read by header only")
        yield from self._log(path, log, enumerate(samples, 1), request)

    def _log(
        self, path: Path, header: dict[str, Any], samples: Iterator[tuple[int, Any]] | enumerate[Any], request: Request
    ) -> Iterator[Chunk]:
        if header.get("status") not in ("success", None):
            request.warnings.append(f"{path.name}: the run ended as {header.get('status')!r}; samples may be missing")
        reader = _Reader(path, header, request)
        source = iter(samples)
        head = head_of(source)
        reader.learn([s for _, s in head if isinstance(s, dict)])

        def runs() -> Iterator[Run | Refusal]:
            for part in (head, source):
                for row, sample in part:
                    yield sample if isinstance(sample, Refusal) else reader.read(row, sample)

        yield from run_chunks(path, runs(), request)


class _Reader:
    """Samples of one log to runs."""

    def __init__(self, path: Path, header: dict[str, Any], request: Request) -> None:
        self._path = path
        self._request = request
        self._eval = as_dict(header.get("eval"))
        self._plan = as_dict(header.get("plan"))
        self._scorer: str | None = None
        self._system = ""
        self._varies = False
        self._earlier: str | None = ""
        self._after: str | None = ""
        self._ids: dict[str, Any] = {}
        config = as_dict(self._plan.get("config")) | as_dict(self._eval.get("model_generate_config"))
        self._sampling = {k: v for k, v in config.items() if k not in {"max_connections", "max_retries", "timeout"}}

    def learn(self, head: list[dict[str, Any]]) -> None:
        """Choose the score, and see what the system messages of the first samples share."""
        found: dict[str, None] = {}
        for sample in head:
            found |= dict.fromkeys(_scores(sample))
        self._scorer = self._choose(found)
        chats = [_chat(sample) for sample in head]
        systems = [chat.system for chat in chats]
        kept = self._template_of("system_message") if len(set(systems)) > 1 else None
        self._system = kept or system_template(systems)
        self._varies = len(set(systems)) > 1
        # Turns that all samples share belong to the prompt; others belong to the query, or come of the replies.
        self._earlier = _shared(chat.earlier for chat in chats)
        self._after = _shared(chat.after for chat in chats)
        self._warn()

    def read(self, row: int, sample: Any) -> Run | Refusal:
        """Return one sample as a run."""
        if not isinstance(sample, dict):
            return Refusal(row, f"a {type(sample).__name__}, not a sample of Inspect", sample)
        attachments = as_dict(sample.get("attachments"))
        chat = _chat(sample)
        query = _resolve(_input_text(sample.get("input")), attachments)
        asked = f"{chat.earlier}\n\nUser: {query}" if self._earlier is None and chat.earlier else query
        output = as_dict(sample.get("output"))
        response = _resolve(_completion(output), attachments)
        error = sample.get("error")
        usage = _usage(sample, self._eval.get("model")) or as_dict(output.get("usage"))
        score = _scores(sample).get(self._scorer or "")
        epoch = whole(sample.get("epoch"))
        values: dict[str, Any] = {
            "query": asked,
            "query_id": self._query_id(asked, sample.get("id")),
            # A run that ended in an error before any reply has neither response nor verdict.
            "response": None if error is not None and not response else response,
            "answer": _resolve(_target(sample.get("target")), attachments),
            "dataset": as_dict(self._eval.get("dataset")).get("name"),
            "model": self._eval.get("model"),
            "run_id": self._eval.get("eval_id") or self._eval.get("task_id") or self._eval.get("run_id"),
            "replicate": epoch - 1 if epoch else None,
            "sampling": tidy(self._sampling) if self._sampling else None,
            "tokens_in": whole(usage.get("input_tokens")),
            "tokens_out": whole(usage.get("output_tokens")),
            "latency_s": number(output.get("time")) or number(sample.get("total_time")),
            "created_at": sample.get("completed_at") or sample.get("started_at") or self._eval.get("created"),
            "metadata": tidy(
                {
                    "task": self._eval.get("task"),
                    "id": sample.get("id"),
                    "scores": {k: _plain_score(v) for k, v in _scores(sample).items()},
                    "error": as_dict(error).get("message") or error,
                    "stop_reason": _stop_reason(output),
                    "limit": as_dict(sample.get("limit")).get("type"),
                }
            ),
        }
        if score == "P":  # partly right: neither a verdict nor a reason to take the others for grades
            values |= {"correct": None, "score": _LETTERS["P"]}
        return self._run(row, values, None if score == "P" else _verdict(score), sample, chat, query)

    def _run(
        self, row: int, values: dict[str, Any], verdict: bool | float | None, sample: Any, chat: _Chat, query: str
    ) -> Run:
        lead = [t for t in (self._system if self._varies else chat.system, self._earlier) if t]
        tail = [self._after] if self._after else []
        if chat.user in ("", query) and not tail:
            if not lead:
                return Run(row, values | {"prompt": ""}, verdict, sample)
            # Nothing to align with the query: the prompt is what stands before it.
            given = "\n\n".join(t for t in (self._system, self._earlier) if t)
            rendered = "\n\n".join(t for t in (chat.system, self._earlier) if t)
            return Run(row, values, verdict, sample, rendered, {}, "system", given)
        slots = {"query": query}
        if options := as_list(sample.get("choices")):  # as `multiple_choice` writes them
            slots["choices"] = "\n".join(f"{chr(65 + i)}) {o}" for i, o in enumerate(options))
            values["query"] = f"{values['query']}\n{slots['choices']}"
        return Run(row, values, verdict, sample, "\n\n".join([*lead, chat.user, *tail]), slots)

    def _warn(self) -> None:
        """Say what is part of the runs, but not of their prompts."""
        solvers = [str(s.get("solver", "")).rpartition("/")[2] for s in as_list(self._plan.get("steps")) if as_dict(s)]
        others = [s for s in dict.fromkeys(solvers) if s and s not in _PROMPTING]
        if others:
            self._request.warnings.append(
                f"{self._path.name}: the solvers {', '.join(others)} leave no trace in the prompt; runs with and "
                "without them look alike (--set prompt_id=NAME tells them apart)"
            )
        if self._after is None:
            self._request.warnings.append(
                f"{self._path.name}: after the first reply the user says more, which differs from sample to sample; it "
                "is not part of the prompt"
            )

    def _query_id(self, query: str, sample_id: Any) -> str | None:
        """Tell samples apart that ask the same text, as agents' tasks with different files do."""
        first = self._ids.setdefault(query, sample_id)
        return None if first == sample_id else f"{text_id(query)}-{sample_id}"

    def _choose(self, found: dict[str, None]) -> str | None:
        named = [s.get("name") for s in as_list(self._eval.get("scorers")) if isinstance(s, dict)]
        places = {
            s: next((i for i, n in enumerate(named) if s == n or s.startswith(f"{n}.")), len(named)) for s in found
        }
        order = sorted(found, key=places.__getitem__)
        given = self._request.scorer
        if given is not None and given not in found:
            raise ConfigError(
                f"{self._path}: --scorer {given}: no scorer {given!r}{nearest(given, found)}; there: "
                f"{', '.join(order) or 'none'}"
            )
        if given is None and len(order) > 1:
            self._request.warnings.append(
                f"{self._path.name}: the verdict is that of {order[0]!r}; --scorer chooses another: {', '.join(order)}"
            )
        return given or next(iter(order), None)

    def _template_of(self, solver: str) -> str | None:
        for step in as_list(self._plan.get("steps")):
            if isinstance(step, dict) and str(step.get("solver", "")).rpartition("/")[2] == solver:
                template = as_dict(step.get("params")).get("template")
                return template if isinstance(template, str) else None
        return None


def _header(path: Path, archive: Archive) -> dict[str, Any]:
    """Return the log without its samples; a run that was stopped has only the start of its journal."""
    for name in ("header.json", "_journal/start.json"):
        try:
            header = json.loads(archive.read(name))
        except MemberError:
            continue
        except (ValueError, RecursionError) as e:
            raise DataError(f"{path}: {name} is not readable JSON: {str(e)[:200]}") from e
        if isinstance(header, dict) and isinstance(header.get("eval"), dict):
            return header if name == "header.json" else {**header, "status": "started"}
    raise DataError(f"{path} is a zip archive, but not a log of Inspect AI: it has no header.json")


def _archived(archive: Archive) -> Iterator[tuple[int, Any]]:
    names = [name for name in archive.names() if _SAMPLE.fullmatch(name)]
    for row, name in enumerate(names, 1):
        try:
            yield row, json.loads(archive.read(name).decode("utf-8"))
        except MemberError as e:
            yield row, Refusal(row, f"cannot be read ({name}: {e})", {"member": name})
        except (ValueError, RecursionError) as e:
            yield row, Refusal(row, f"not JSON ({name}: {str(e)[:200]})", {"member": name})


def _resolve(text: str, attachments: dict[str, Any]) -> str:
    return _ATTACHMENT.sub(lambda m: found if isinstance(found := attachments.get(m[1]), str) else m[0], text)


def _input_text(value: Any) -> str:
    """Return the query: the input, or of an input of several messages the last one of the user."""
    if isinstance(value, str):
        return value
    messages = [m for m in value if isinstance(m, dict)] if isinstance(value, list) else []
    users = [text_of(m.get("content")) for m in messages if m.get("role") == "user"]
    return users[-1] if users else ""


@dataclass(slots=True)
class _Chat:
    """What a sample's messages hold.

    Attributes:
        system: The system messages.
        earlier: Turns before the message that holds the query.
        user: The message that holds the query.
        after: What the user says after that, before or after the first generated reply.
    """

    system: str = ""
    earlier: str = ""
    user: str = ""
    after: str = ""


def _chat(sample: dict[str, Any]) -> _Chat:
    system: list[str] = []
    turns: list[tuple[str, str]] = []
    after: list[str] = []
    conversation = isinstance(sample.get("input"), list)
    generated = False
    for message in as_list(sample.get("messages")):
        if not isinstance(message, dict):
            continue
        role = message.get("role")
        text = _resolve(text_of(message.get("content")), as_dict(sample.get("attachments")))
        # An input that is itself a conversation, and examples, hold replies that were not generated.
        generated |= role == "assistant" and (message.get("source") == "generate" or not conversation)
        if generated:
            after.extend([text] if role == "user" else [])
        elif role == "system":
            system.append(text)
        elif role in ("user", "assistant"):
            turns.append((str(role).capitalize(), text))
    query = _resolve(_input_text(sample.get("input")), as_dict(sample.get("attachments")))
    asked = [i for i, (role, _) in enumerate(turns) if role == "User"]
    asked = [i for i in asked if query and query in turns[i][1]] or asked
    if not asked:
        return _Chat("\n\n".join(system), after="\n\n".join(after))
    last = asked[-1]
    earlier = "\n\n".join(f"{role}: {text}" for role, text in turns[:last])
    after = [*(text for role, text in turns[last + 1 :] if role == "User"), *after]
    return _Chat("\n\n".join(system), earlier, turns[last][1], "\n\n".join(after))


def _shared(texts: Iterable[str]) -> str | None:
    """Return the text that all are, None if they differ."""
    distinct = set(texts)
    return distinct.pop() if len(distinct) == 1 else None if distinct else ""


def _usage(sample: dict[str, Any], model: Any) -> dict[str, Any]:
    """Return the tokens of all calls of the model under test, not of the last call alone."""
    return as_dict(as_dict(sample.get("model_usage")).get(str(model)))


def _completion(output: dict[str, Any]) -> str:
    if isinstance(output.get("completion"), str) and output["completion"]:
        found: str = output["completion"]
        return found
    choices = output.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    return text_of(as_dict(as_dict(first).get("message")).get("content"))


def _stop_reason(output: dict[str, Any]) -> Any:
    choices = output.get("choices")
    return as_dict(choices[0] if isinstance(choices, list) and choices else None).get("stop_reason")


def _target(target: Any) -> str:
    if isinstance(target, list):
        return next((t for t in target if isinstance(t, str)), "")
    return target if isinstance(target, str) else ""


def _scores(sample: dict[str, Any]) -> dict[str, Any]:
    """Return name -> value of each score; of a score with several values, `scorer.key` -> value."""
    scores = dict(as_dict(sample.get("scores")))
    if not scores and isinstance(sample.get("score"), dict):  # of early versions, one score a sample
        scores["score"] = sample["score"]
    found: dict[str, Any] = {}
    for name, score in scores.items():
        value = score.get("value") if isinstance(score, dict) else score
        if isinstance(value, dict):
            found.update({f"{name}.{key}": inner for key, inner in value.items()})
        else:
            found[str(name)] = value
    return found


def _verdict(value: Any) -> bool | float | None:
    """Return a score as Inspect's own `value_to_float` reads it; NaN marks a sample that was not scored."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        if value in _LETTERS:
            return _LETTERS[value]
        if value.strip().lower() in _WORDS:
            return _WORDS[value.strip().lower()]
        try:
            value = float(value)
        except ValueError:
            return None
    return number(value)


def _plain_score(value: Any) -> Any:
    return value if isinstance(value, (str, bool, int, float)) else None


INSPECT = InspectLogs()
