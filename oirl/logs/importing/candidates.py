"""DSPy and GEPA: the candidates of an optimisation and their scores on each validation example."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oirl.errors import DataError
from oirl.logs.importing.base import Chunk, Refusal, Request
from oirl.logs.importing.lines import files_like, read_whole
from oirl.logs.importing.runs import Run, load_json, number, run_chunks, tidy


@dataclass(frozen=True)
class GepaCandidates:
    """A result of GEPA as JSON: each candidate is a prompt, each score a verdict or a grade."""

    name: str = "gepa"
    description: str = "DSPy/GEPA candidates.json with val_subscores (result.to_dict())"
    record: str = "interactions"

    def find(self, folder: Path) -> list[Path]:
        """Return the results in a folder."""
        return files_like(folder, (".json",), self.sniff)

    def sniff(self, path: Path, head: bytes) -> bool:
        """Accept a JSON object with candidates and validation scores, or GEPA's own list of candidates."""
        start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        named = path.name == "candidates.json" and start in (b"{", b"[")
        return named or (start == b"{" and b'"candidates"' in head and b'"val_' in head)

    def chunks(self, path: Path, request: Request) -> Iterator[Chunk]:
        """Yield one row per candidate and validation example."""
        result = load_json(path, read_whole(path))
        if isinstance(result, list):
            raise DataError(
                f"{path} is a list of candidates without scores; write them with the result: "
                "json.dump(result.to_dict(), file), which has `candidates` and `val_subscores`"
            )
        candidates = result.get("candidates") if isinstance(result, dict) else None
        scores = result.get("val_subscores") if isinstance(result, dict) else None
        if not isinstance(candidates, list) or not isinstance(scores, list) or len(candidates) != len(scores):
            raise DataError(f"{path}: `candidates` and `val_subscores` must be lists of one length")
        request.warnings.append(
            f"{path.name}: the format keeps no texts of the validation examples, so queries have names only; prompts "
            "can be compared, but nothing can be learned per query"
        )
        yield from run_chunks(path, _runs(path, candidates, scores, result), request)


def _runs(path: Path, candidates: list[Any], scores: list[Any], result: dict[str, Any]) -> Iterator[Run | Refusal]:
    row, name = 0, f"{path.resolve().parent.name}/{path.name.split('.')[0]}"
    for place, (candidate, found) in enumerate(zip(candidates, scores, strict=True)):
        prompt = _prompt(candidate)
        examples = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
        if prompt is None or not isinstance(found, (dict, list)):
            row += 1
            yield Refusal(row, f"candidate {place} has no text, or no scores", candidate)
            continue
        for example, score in examples:
            row += 1
            value = score if isinstance(score, bool) else number(score)
            if value is None and score is not None:
                yield Refusal(row, f"the score of candidate {place} on example {example} is no finite number", score)
                continue
            values = {
                # Another optimisation's example of that number is another query.
                "query": f"validation example {example} of {name}",
                "query_id": f"{name}-example-{example}",
                "prompt": prompt,
                "run_id": name,
                "metadata": tidy({"candidate": place, "parents": _at(result.get("parents"), place)}),
            }
            yield Run(row, values, value, {"candidate": candidate, "example": example, "score": score})


def _prompt(candidate: Any) -> str | None:
    """Return the text of a candidate: of one component alone, or of all, each under its name."""
    if isinstance(candidate, str):
        return candidate
    if not isinstance(candidate, dict):
        return None
    texts = {str(n): t for n, t in candidate.items() if isinstance(t, str)}
    if len(texts) == 1:
        return next(iter(texts.values()))
    return "\n\n".join(f"[{name}]\n{text}" for name, text in texts.items()) or None


def _at(values: Any, place: int) -> Any:
    return values[place] if isinstance(values, list) and place < len(values) else None


GEPA = GepaCandidates()
