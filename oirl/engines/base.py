"""What every engine does: text or messages in, completions with tokens and log-probs out, errors item by item."""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from oirl.errors import ConfigError, OirlError
from oirl.language_models import Rendered

if TYPE_CHECKING:
    from typing_extensions import Self

LOGPROBS_MODES = ("raw", "processed")
DEFAULT_TIMEOUT_S = 300.0
_SEED_BITS = 31  # the least that any server takes


class EngineError(OirlError, RuntimeError):
    """An engine cannot go on: no server, no access, no such model, weights that are not those they should be."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How responses are drawn.

    Attributes:
        max_tokens: The most tokens of a response.
        temperature: Logits are divided by it; 0 takes the likeliest token each time.
        top_p: Draw from the likeliest tokens that together have this probability.
        top_k: Draw from so many of the likeliest tokens; None for all.
        stop: Texts at which a response ends; they are no part of its text.
        n: Responses to each rendered text.
        seed: Another seed gives other responses.
        logprobs: Whether the log-probs of the sampled tokens are wanted; what is collected then keeps them and the
            tokens in the log's metadata.
    """

    max_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    seed: int = 0
    logprobs: bool = False

    def __post_init__(self) -> None:
        allowed = {
            "max_tokens": (self.max_tokens >= 1, "1 or more"),
            "temperature": (0 <= self.temperature < float("inf"), "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0, up to 1"),
            "top_k": (self.top_k is None or self.top_k >= 1, "1 or more, or none"),
            "stop": (not isinstance(self.stop, str) and all(self.stop), "texts that are not empty"),
            "n": (self.n >= 1, "1 or more"),
            "seed": (self.seed >= 0, "0 or more"),
        }
        for name, (right, what) in allowed.items():
            if not right:
                raise ConfigError(f"{name} = {getattr(self, name)!r}; allowed: {what}")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings that decide what is drawn, for JSON."""
        settings = {k: v for k, v in asdict(self).items() if k not in ("n", "logprobs")}
        return settings | {"stop": list(self.stop)}


@dataclass(frozen=True, slots=True)
class Request:
    """One thing to complete.

    Attributes:
        rendered: Text or messages.
        seed: Decides the draws of this request, whatever else is drawn with it (in `transformers` and vLLM; servers
            may ignore it).
    """

    rendered: Rendered
    seed: int


@dataclass(frozen=True, slots=True)
class Completion:
    """One response, or why there is none.

    Attributes:
        text: The response, without the end-of-text token and without a stop string; None if it failed.
        finish_reason: "stop" at the end-of-text token or a stop string, "length" at `max_tokens` or the model's limit;
            else what a server says.
        token_ids: All sampled tokens, the end-of-text token among them; None where an engine does not tell.
        logprobs: log π(token | all before it) of each of `token_ids`, in nats: of the model itself (`raw`) or as it was
            drawn, after temperature, top-k and top-p (`processed`), as the engine was made; None where not asked for.
        prompt_ids: The tokens that the model read.
        tokens_in: How many these are.
        tokens_out: How many were sampled.
        latency_s: Seconds from sending to receiving; of a batch those of the whole batch.
        error: Why there is no response.
        refused: Whether the request itself was to blame, so that asking again does not help.
        model_fingerprint: What a server says of the version of the model that responded.
    """

    text: str | None
    finish_reason: str | None = None
    token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    prompt_ids: tuple[int, ...] | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    latency_s: float | None = None
    error: str | None = None
    refused: bool = False
    model_fingerprint: str | None = None


@dataclass(frozen=True, slots=True)
class Probe:
    """Tokens and the log-probs that the right weights give them: what tells stale or mangled weights from right ones.

    Attributes:
        prompt_ids: What stands before, a list for each row.
        token_ids: The scored tokens of each row.
        logprobs: Their log-probs by the model whose weights are sent.
        threshold: The largest mean absolute difference, in nats, that passes (see `parity.THRESHOLDS`).
    """

    prompt_ids: Sequence[Sequence[int]]
    token_ids: Sequence[Sequence[int]]
    logprobs: Sequence[Sequence[float]]
    threshold: float


def failed(reason: str, n: int = 1) -> list[Completion]:
    """Return the completions of a request that failed and may succeed another time."""
    return [Completion(None, error=" ".join(reason.split()))] * n


def refused(reason: str, n: int = 1) -> list[Completion]:
    """Return the completions of a request that cannot be answered."""
    return [Completion(None, error=" ".join(reason.split()), refused=True)] * n


def derive_seed(*parts: object) -> int:
    """Return a seed of 31 bits that depends on all of the parts and on nothing else."""
    key = "\0".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "big") >> (64 - _SEED_BITS)


class Engine(ABC):
    """Something that completes text with one language model; a context manager that frees it at the end.

    Attributes:
        name: The engine's name in the registry.
        model: Name of the model, as it stands in a log.
        chat: Whether the model is given messages rather than plain text.
        weight_version: Raised by one with every update of the weights.
        paused: Whether `pause` was called and `resume` was not.
    """

    name: str
    model: str
    chat: bool
    weight_version: int = 0
    _fingerprint: str | None = None
    paused: bool = False
    shared: bool = False
    """Whether the model that it draws from is the same for all processes, as on a server."""

    @abstractmethod
    def stream(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[tuple[int, list[Completion]]]:
        """Yield (position, `sampling.n` completions) of the requests as they finish, in any order.

        Requests are taken from the iterable only when there is room for them. What fails is a completion with an
        `error`; the others go on. `check_not_paused` belongs before whatever draws.

        Raises:
            EngineError: If the engine is paused, or as a whole cannot go on.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return engine, version, model and what tells its weights from others', for JSON."""

    def score(self, prompt_ids: Sequence[Sequence[int]], token_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the raw log-probs that the model gives to tokens after a prompt; ids in, nothing is tokenised.

        Raises:
            EngineError: If the engine cannot score given tokens.
        """
        raise EngineError(f"the engine {self.name!r} cannot give log-probs of given tokens")

    @property
    def takes_weights(self) -> bool:
        """Whether `update_weights` can be used."""
        return type(self)._load_weights is not Engine._load_weights

    def update_weights(
        self, weights: Iterable[tuple[str, Any]], probe: Probe, *, timeout: float = DEFAULT_TIMEOUT_S
    ) -> int:
        """Take new weights, forget what was cached of the old ones, and prove it: the probe's log-probs must come out.

        Args:
            weights: (name, tensor) of every parameter, named as transformers names them.
            probe: What the new weights must give.
            timeout: Seconds after which the update counts as failed.

        Returns:
            The new `weight_version`.

        Raises:
            EngineError: If responses are still being drawn, the update does not end in time or is refused, or the probe
                comes out otherwise: the engine must then not be used any more.
        """
        ended = threading.Event()
        problem: list[BaseException] = []

        def work() -> None:
            try:
                self._load_weights(weights)
            except BaseException as e:  # it is raised below, where somebody sees it
                problem.append(e)
            ended.set()

        threading.Thread(target=work, daemon=True, name="oirl-weights").start()
        if not ended.wait(timeout):
            raise EngineError(f"the engine {self.name!r} did not take the new weights within {timeout:g} s")
        if problem:
            if isinstance(problem[0], OirlError):
                raise problem[0]
            raise EngineError(f"the engine {self.name!r} does not take the weights: {problem[0]}") from problem[0]
        self.weight_version += 1
        told = blake2b(repr([list(row) for row in probe.logprobs]).encode(), digest_size=8).hexdigest()
        self._fingerprint = f"updated {self.weight_version} times, probe {told}"
        self.check_weights(probe)
        return self.weight_version

    def pause(self) -> None:
        """Draw nothing until `resume`, and give back the memory that can be had again, where an engine can."""
        self.paused = True

    def resume(self) -> None:
        """Go on after `pause`."""
        self.paused = False

    def check_not_paused(self) -> None:
        """Refuse to draw between `pause` and `resume`.

        Raises:
            EngineError: If the engine is paused.
        """
        if problem := self._pause_problem():
            raise problem

    def _pause_problem(self) -> EngineError | None:
        return EngineError(f"the engine {self.name!r} is paused; resume it first") if self.paused else None

    def check_weights(self, probe: Probe) -> float:
        """Return the mean absolute difference of the engine's log-probs from the probe's, in nats.

        Raises:
            EngineError: If it is above the probe's threshold.
        """
        found = self.score(probe.prompt_ids, probe.token_ids)
        gaps = [abs(a - b) for r, s in zip(found, probe.logprobs, strict=True) for a, b in zip(r, s, strict=True)]
        mean = sum(gaps) / len(gaps) if gaps else math.nan
        if not mean <= probe.threshold:
            raise EngineError(
                f"the weights in the engine {self.name!r} are not those that were sent: log-probs differ by {mean:.3g} "
                f"nats on average, allowed: {probe.threshold:g}"
            )
        return mean

    def _load_weights(self, weights: Iterable[tuple[str, Any]]) -> None:
        raise EngineError(f"the engine {self.name!r} cannot take new weights")

    def generate(self, rendered: Sequence[Rendered], sampling: Sampling) -> list[list[Completion]]:
        """Return `sampling.n` completions of each rendered text, in its order.

        Raises:
            EngineError: If the engine is paused, or cannot go on.
        """
        self.check_not_paused()
        found: list[list[Completion]] = [[] for _ in rendered]
        requests = (Request(text, derive_seed(sampling.seed, i)) for i, text in enumerate(rendered))
        for position, completions in self.stream(requests, sampling):
            found[position] = completions
        return found

    def close(self) -> None:  # noqa: B027  (most engines have something to free, not all)
        """Free what the engine holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
