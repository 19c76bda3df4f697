"""Do the log-probs that an engine reports agree with a plain forward pass of the same model?

In training by reinforcement learning the two stand in one ratio; where they differ, every update is off. Engines differ
from trainers by number types, kernels, padding, chat templates, tokens made anew from text, and by whether log-probs
are told before or after temperature and top-p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from oirl.engines.base import Completion, Engine, EngineError, Sampling
from oirl.engines.transformers_engine import TransformersEngine
from oirl.errors import ConfigError
from oirl.language_models import Rendered

THRESHOLDS = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.02}
"""Number type -> the largest mean absolute difference of log-probs, in nats, that passes for agreement."""
_AT_THE_EDGE = 0.02
_COMPARED = 0.9
_NEARLY_ALL, _TIMES_THE_MEAN = 0.99, 20
TEXTS = (
    "What is 2 + 3?",
    "Tom has 12 apples and gives 5 to Ann. How many apples are left?",
    "Name a colour.",
    "The quick brown fox jumps over",
    "Translate 'good morning' into French, German and Spanish.",
    "Write a short poem about the sea, the wind and an old ship that comes home.",
    "1, 1, 2, 3, 5, 8,",
    "Is the number 91 prime? Explain step by step, and end with yes or no.",
)


@dataclass(frozen=True, slots=True)
class Difference:
    """How far the log-probs of an engine are from those of the reference in one case.

    Attributes:
        case: What was sampled how.
        tokens: How many tokens were compared.
        mean_abs: Mean of |difference|, in nats.
        max_abs: The largest.
        kl_k3: Mean of r − 1 − log r with r = exp(reference − engine): an estimate of their KL divergence (Schulman).
        agrees: Whether the mean is within the threshold, and 99% of the differences within twenty times it.
    """

    case: str
    tokens: int
    mean_abs: float
    max_abs: float
    kl_k3: float
    agrees: bool


@dataclass(slots=True)
class ParityReport:
    """How an engine compares with a plain forward pass.

    Attributes:
        engine: What the engine says of itself.
        reference: What the reference says of itself.
        threshold: The largest mean absolute difference that passes.
        differences: Case by case.
        logprobs_are: "raw", "processed", or "neither": which of the two the log-probs at temperature 0.7 are.
        prompt_tokens_agree: Share of the prompts of which both read the same tokens; None if an engine does not tell.
        retokenised_agree: Share of the responses whose text gives their tokens again; the others must be trained on by
            token ids, never by text.
        padding_agrees: Whether greedy responses are the same alone and in a batch.
        agrees: The verdict: all cases within the threshold, and all prompt tokens the same.
    """

    engine: dict[str, Any]
    reference: dict[str, Any]
    threshold: float
    differences: list[Difference] = field(default_factory=list)
    logprobs_are: str = "neither"
    prompt_tokens_agree: float | None = None
    retokenised_agree: float = math.nan
    padding_agrees: bool = True
    agrees: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dictionary for JSON."""
        return asdict(self)


def check_parity(
    engine: Engine,
    reference: TransformersEngine,
    texts: Sequence[str] = TEXTS,
    *,
    max_tokens: int = 48,
    threshold: float | None = None,
) -> ParityReport:
    """Compare the log-probs of an engine with those of a plain forward pass on what the engine samples.

    Args:
        engine: The engine to check.
        reference: The same model in transformers.
        texts: What to complete; as user messages where the engine chats.
        max_tokens: The most tokens of a response.
        threshold: The largest mean absolute difference in nats; by default as the coarser of both number types allows.

    Raises:
        ConfigError: If there is no text, or the threshold is no finite number above 0.
        EngineError: If the engine answers nothing, or reports no log-probs.
    """
    if not texts:
        raise ConfigError("there is no text to compare on; name at least one")
    check_threshold(threshold)
    told, plain = engine.describe(), reference.describe()
    # Rounding on either side keeps the two apart.
    coarser = max(THRESHOLDS.get(str(d.get("dtype")), THRESHOLDS["float32"]) for d in (told, plain))
    limit = coarser if threshold is None else threshold
    report = ParityReport(told, plain, limit)
    rendered: list[Rendered] = [[{"role": "user", "content": t}] if engine.chat else t for t in texts]
    base = Sampling(max_tokens=max_tokens, logprobs=True)
    greedy = _pairs(engine, reference, rendered, replace(base, temperature=0.0))
    sampled = _pairs(engine, reference, rendered, base)
    warm = _pairs(engine, reference, rendered, replace(base, temperature=0.7))
    report.differences = [
        _differ("greedy", greedy, _scored(reference, greedy), limit),
        _differ("temperature 1", sampled, _scored(reference, sampled), limit),
    ]
    raw = _differ("temperature 0.7", warm, _scored(reference, warm), limit)
    processed = _differ("temperature 0.7", warm, _drawn(reference, warm, replace(base, temperature=0.7)), limit)
    closer = ("raw", raw) if raw.mean_abs <= processed.mean_abs else ("processed", processed)
    report.logprobs_are = closer[0] if closer[1].agrees else "neither"
    kept = processed if report.logprobs_are == "processed" else raw
    report.differences.append(replace(kept, case=f"temperature 0.7, log-probs {report.logprobs_are}"))
    narrow = replace(base, temperature=0.7, top_p=0.9)
    cut = _pairs(engine, reference, rendered, narrow)
    scores = _drawn(reference, cut, narrow) if report.logprobs_are == "processed" else _scored(reference, cut)
    report.differences.append(_differ("temperature 0.7, top-p 0.9", cut, scores, limit))
    _check_scoring(engine, sampled, report, limit)
    everything = [*greedy, *sampled, *warm]
    prompts = [(p.completion.prompt_ids, p.prompt) for p in everything if p.completion.prompt_ids is not None]
    if prompts:
        report.prompt_tokens_agree = sum(list(a or ()) == b for a, b in prompts) / len(prompts)
    report.retokenised_agree = sum(p.text_gives_tokens for p in everything) / len(everything)
    alone = [engine.generate([rendered[p.position]], replace(base, temperature=0.0))[0][0] for p in greedy[:3]]
    report.padding_agrees = all(c.text == p.completion.text for c, p in zip(alone, greedy, strict=False))
    report.agrees = all(d.agrees for d in report.differences) and report.prompt_tokens_agree in (None, 1.0)
    return report


def open_reference(engine: Engine, model: str, adapter: str | None = None) -> TransformersEngine:
    """Return what an engine is compared with: its model in transformers, under its adapter.

    It computes in float32 where the engine does, else in the type that the weights are saved in.

    Args:
        engine: The engine to check.
        model: Its model, as transformers names it.
        adapter: Folder of the LoRA adapter that the engine has put on the model.
    """
    dtype = "float32" if engine.describe().get("dtype") == "float32" else "auto"
    return TransformersEngine(model, adapter=adapter, dtype=dtype, chat=engine.chat)


def check_threshold(threshold: float | None) -> None:
    """Refuse a threshold under which everything or nothing would agree.

    Raises:
        ConfigError: If it is no finite number above 0.
    """
    if threshold is not None and not 0 < threshold < math.inf:
        raise ConfigError(f"threshold = {threshold:g}; allowed: a finite number above 0")


@dataclass(frozen=True, slots=True)
class _Pair:
    position: int
    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    completion: Completion
    text_gives_tokens: bool


def _pairs(
    engine: Engine, reference: TransformersEngine, rendered: Sequence[Rendered], sampling: Sampling
) -> list[_Pair]:
    found, errors = [], []
    for i, (text, (completion,)) in enumerate(zip(rendered, engine.generate(rendered, sampling), strict=True)):
        if completion.text is None:
            errors.append(completion.error)
            continue
        if completion.logprobs is None:
            raise EngineError(f"the engine {engine.name!r} reports no log-probs")
        again = reference.response_tokens(completion.text, ended=completion.finish_reason == "stop")
        tokens = list(completion.token_ids) if completion.token_ids is not None else again
        if tokens and max(tokens) >= reference.vocabulary:
            raise EngineError(f"the engine's token {max(tokens)} is none of the reference's: is it the same model?")
        if len(tokens) != len(completion.logprobs):  # servers may leave out the end-of-text token
            tokens = tokens[: len(completion.logprobs)]
        if len(tokens) == len(completion.logprobs):
            same = completion.token_ids is None or list(completion.token_ids) == again
            found.append(_Pair(i, reference.tokens(text), tokens, list(completion.logprobs), completion, same))
    if not found and errors:
        raise EngineError(f"the engine {engine.name!r} gave no response that can be compared: {errors[0]}")
    if len(found) < _COMPARED * (len(rendered) - len(errors)):
        count = len(rendered) - len(errors) - len(found)
        raise EngineError(f"{count} responses of the engine {engine.name!r} have not one log-prob for each token")
    return found


def _scored(reference: Engine, pairs: Sequence[_Pair]) -> list[list[float]]:
    return reference.score([p.prompt for p in pairs], [p.tokens for p in pairs])


def _drawn(reference: TransformersEngine, pairs: Sequence[_Pair], sampling: Sampling) -> list[list[float]]:
    return reference.score_drawn([p.prompt for p in pairs], [p.tokens for p in pairs], sampling)


def _check_scoring(engine: Engine, pairs: Sequence[_Pair], report: ParityReport, limit: float) -> None:
    """Compare also how the engine scores tokens that it is given, where it can."""
    try:
        given = _scored(engine, pairs)
    except EngineError:
        return
    compared = [replace(p, logprobs=scores) for p, scores in zip(pairs, given, strict=True)]
    reference = [p.logprobs for p in pairs]
    report.differences.append(_differ("scoring given tokens, against sampling them", compared, reference, limit))


def _differ(case: str, pairs: Sequence[_Pair], reference: Sequence[Sequence[float]], limit: float) -> Difference:
    return difference(case, [x for p in pairs for x in p.logprobs], [x for row in reference for x in row], limit)


def difference(case: str, logprobs: Sequence[float], reference: Sequence[float], limit: float) -> Difference:
    """Compare log-probs of the same tokens, in nats.

    Of processed log-probs, a token at the edge of what top-p leaves may be in for the one and out for the other: where
    that is so for at most 2% of the tokens, they are left out.

    Args:
        case: Its name.
        logprobs: The engine's.
        reference: Those of the plain forward pass.
        limit: The largest mean absolute difference that agrees.
    """
    pairs = list(zip(logprobs, reference, strict=True))
    gaps = [r - e for e, r in pairs if not (math.isfinite(e) and r == -math.inf)]
    if not gaps or not all(map(math.isfinite, gaps)) or len(pairs) - len(gaps) > _AT_THE_EDGE * len(pairs):
        return Difference(case, len(pairs), math.inf, math.inf, math.inf, False)
    mean = sum(map(abs, gaps)) / len(gaps)
    k3 = sum(math.expm1(min(gap, 700.0)) - gap for gap in gaps) / len(gaps)
    # A fault in few places, such as the first token of each response, hides in a mean.
    nearly_all = sorted(map(abs, gaps))[max(math.ceil(_NEARLY_ALL * len(gaps)) - 1, 0)]
    agrees = mean <= limit and nearly_all <= _TIMES_THE_MEAN * limit
    return Difference(case, len(gaps), mean, max(map(abs, gaps)), k3, agrees)
