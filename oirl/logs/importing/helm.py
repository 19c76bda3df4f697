"""HELM: the folder of one run, with requests in scenario_state.json and scores in per_instance_stats.json."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oirl.errors import DataError
from oirl.logs.importing.base import Chunk, Refusal, Request
from oirl.logs.importing.lines import read_whole
from oirl.logs.importing.runs import Run, as_dict, as_list, choose, load_json, number, run_chunks, text_of, tidy, whole

_STATE = "scenario_state.json"
_STATS = "per_instance_stats.json"
_MAIN = (
    "final_number_exact_match",
    "math_equiv_chain_of_thought",
    "math_equiv",
    "chain_of_thought_correctness",
    "quasi_exact_match",
    "exact_match",
    "quasi_prefix_exact_match",
    "prefix_exact_match",
    "quasi_leave_articles_exact_match",
)
"""Scores that HELM's leaderboards name first, the most particular one before the others."""
_BOOKKEEPING = (
    "num_", "batch_size", "finish_reason", "prompt_truncated", "logprob", "training_", "inference_", "max_prob",
    "perplexity", "bits_per_byte", "ensemble_", "predicted_index", "log_prob",
)  # fmt: skip

Key = tuple[str, int, str]


@dataclass(frozen=True)
class HelmRun:
    """Runs of HELM; each request is one run."""

    name: str = "helm"
    description: str = "HELM run folder (scenario_state.json, per_instance_stats.json), or a folder of runs"
    record: str = "interactions"
    options: frozenset[str] = frozenset({"scorer"})

    def find(self, folder: Path) -> list[Path]:
        """Return the requests of all runs in a folder."""
        return sorted(p for p in folder.rglob(_STATE) if p.is_file())

    def sniff(self, path: Path, head: bytes) -> bool:
        """Accept the file of the requests."""
        return path.name == _STATE and head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{"

    def chunks(self, path: Path, request: Request) -> Iterator[Chunk]:
        """Yield one row per completion."""
        state = load_json(path, read_whole(path))
        states = state.get("request_states") if isinstance(state, dict) else None
        if not isinstance(states, list):
            raise DataError(f"{path} is not a run of HELM: it has no list `request_states`")
        adapter = as_dict(state.get("adapter_spec"))
        stats = _stats(path, request)
        found = {n: None for scores in stats.values() for n in scores if not n.startswith(_BOOKKEEPING)}
        order = [n for n in _MAIN if n in found] + sorted(n for n in found if n not in _MAIN)
        scorer = choose(path, request.scorer, dict.fromkeys(order), "score")
        if len(order) > 1 and request.scorer is None:
            request.warnings.append(
                f"{path.parent.name}: the verdict is {scorer!r}; --scorer chooses another: {', '.join(order)}"
            )
        run_spec = _run_name(path)
        yield from run_chunks(path, _runs(states, adapter, stats, scorer, run_spec), request)


def _runs(
    states: list[Any], adapter: dict[str, Any], stats: dict[Key, dict[str, float]], scorer: str | None, run: str
) -> Iterator[Run | Refusal]:
    groups: dict[Key, list[dict[str, Any]]] = {}
    rows: dict[Key, int] = {}
    for row, state in enumerate(states, 1):
        instance = as_dict(as_dict(state).get("instance"))
        if not instance:
            yield Refusal(row, "a request without `instance`", state)
            continue
        if state.get("request_mode") == "calibration":
            continue
        key = _key(instance.get("id"), state.get("train_trial_index"), instance.get("perturbation"))
        # Of a choice that is scored reference by reference, all requests make one row.
        if state.get("reference_index") is None and key in groups:
            yield Refusal(row, "the same instance, trial and perturbation as an earlier request", instance)
            continue
        groups.setdefault(key, []).append(state)
        rows.setdefault(key, row)
    for key, group in groups.items():
        yield from _group(rows[key], group, adapter, stats.get(key, {}), scorer, run)


def _group(
    row: int,
    group: list[dict[str, Any]],
    adapter: dict[str, Any],
    scores: dict[str, float],
    scorer: str | None,
    run: str,
) -> Iterator[Run | Refusal]:
    state = group[0]
    instance, sent = as_dict(state.get("instance")), as_dict(state.get("request"))
    text = as_dict(instance.get("input")).get("text")
    if not isinstance(text, str):
        yield Refusal(row, "an instance without a text", instance)
        return
    options = as_dict(state.get("output_mapping"))
    texts = [as_dict(as_dict(r).get("output")).get("text") for r in as_list(instance.get("references"))]
    references = [t if isinstance(t, str) else None for t in texts]
    if len(group) > 1:
        options = {str(i): r for i, r in enumerate(references)}
    options = {k: v for k, v in options.items() if isinstance(v, str)}
    completions = _chosen(group, references) if len(group) > 1 else _completions(state)
    trial = whole(state.get("train_trial_index")) or 0
    result = as_dict(state.get("result"))
    scored = (
        references[at] if isinstance(at := state.get("reference_index"), int) and 0 <= at < len(references) else None
    )
    slots = {"query": text, **(options if len(group) == 1 else {"option": scored} if scored else {})}
    perturbation = as_dict(instance.get("perturbation")).get("name")
    for i, completion in enumerate(completions or [None]):
        values = {
            "query": "\n".join([text, *options.values()]) if options else text,
            "response": options.get((completion or "").strip(), completion) if options else completion,
            "answer": _answer(instance),
            "model": sent.get("model") or adapter.get("model"),
            # A perturbed text may read like the original: it is a run of its own, not a repeat.
            "run_id": f"{run}:{perturbation}" if isinstance(perturbation, str) else run,
            "replicate": trial * max(len(completions), 1) + i,
            "sampling": tidy({k: sent.get(k) for k in ("temperature", "top_p", "max_tokens", "stop_sequences")}),
            "tokens_in": whole(scores.get("num_prompt_tokens")),
            "tokens_out": whole(scores.get("num_output_tokens")),
            "latency_s": number(result.get("request_time")),
            "created_at": result.get("request_datetime"),
            "metadata": tidy(
                {
                    "instance_id": instance.get("id"),
                    "perturbation": perturbation,
                    "split": instance.get("split"),
                    "error": result.get("error") if not result.get("success", True) else None,
                }
            ),
        }
        verdict = None if i or scorer is None else scores.get(scorer)
        yield Run(row, values, verdict, state, _rendered(sent), slots, key=run)


def _rendered(sent: dict[str, Any]) -> str | None:
    """Return the text given to the model: a prompt, or the messages of a chat."""
    prompt = sent.get("prompt")
    if isinstance(prompt, str) and prompt:
        return prompt
    return "\n\n".join(text_of(as_dict(m).get("content")) for m in as_list(sent.get("messages"))) or None


def _completions(state: dict[str, Any]) -> list[str | None]:
    completions = as_dict(state.get("result")).get("completions")
    items = completions if isinstance(completions, list) else []
    return [text if isinstance(text := as_dict(c).get("text"), str) else None for c in items]


def _chosen(group: list[dict[str, Any]], references: list[Any]) -> list[str | None]:
    """Return the reference with the highest log-probability."""
    best: tuple[float, str | None] = (float("-inf"), None)
    for state in group:
        completions = as_dict(state.get("result")).get("completions") or [{}]
        score = number(as_dict(completions[0] if isinstance(completions, list) else None).get("logprob"))
        place = state.get("reference_index")
        if score is not None and isinstance(place, int) and 0 <= place < len(references) and score > best[0]:
            best = (score, references[place])
    return [best[1]]


def _answer(instance: dict[str, Any]) -> str | None:
    for reference in as_list(instance.get("references")):
        if "correct" in as_list(as_dict(reference).get("tags")):
            text = as_dict(reference.get("output")).get("text")
            if isinstance(text, str):
                return text
    return None


def _stats(path: Path, request: Request) -> dict[Key, dict[str, float]]:
    """Return the scores of each instance, trial and perturbation."""
    file = path.parent / _STATS
    if not file.is_file():
        request.warnings.append(f"{path.parent.name}: no {_STATS} beside it, so there are no verdicts")
        return {}
    entries = load_json(file, read_whole(file))
    found: dict[Key, dict[str, float]] = {}
    for entry in entries if isinstance(entries, list) else []:
        entry = as_dict(entry)
        key = _key(entry.get("instance_id"), entry.get("train_trial_index"), entry.get("perturbation"))
        scores = found.setdefault(key, {})
        for stat in as_list(entry.get("stats")):
            name = as_dict(as_dict(stat).get("name")).get("name")
            value = number(as_dict(stat).get("mean"))
            if isinstance(name, str) and value is not None:
                scores.setdefault(name, value)
    return found


def _key(instance_id: Any, trial: Any, perturbation: Any) -> Key:
    return str(instance_id), whole(trial) or 0, repr(sorted(as_dict(perturbation).items(), key=str))


def _run_name(path: Path) -> str:
    file = path.parent / "run_spec.json"
    if file.is_file():
        try:
            name = as_dict(load_json(file, read_whole(file))).get("name")
        except DataError:
            name = None
        if isinstance(name, str):
            return name
    return path.parent.name


HELM = HelmRun()
