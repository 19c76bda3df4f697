"""The engine `vllm`: vLLM in this process, the fast way on GPUs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from oirl.engines.base import LOGPROBS_MODES, Completion, Engine, EngineError, Request, Sampling, refused
from oirl.errors import ConfigError, OirlError, require
from oirl.language_models import Rendered, finish_text, folder_fingerprint, load_tokenizer, prompt_tokens

_NOT_TOLD = (
    *("gpu_memory_utilization", "kv_cache_memory_bytes", "cpu_offload_gb", "swap_space", "enable_sleep_mode"),
    *("max_num_seqs", "max_num_batched_tokens", "disable_log_stats", "hf_token"),
)
"""Options that decide where a run has room, not what comes of it; after a lack of memory it must go on with others."""
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


class VLLMEngine(Engine):
    """Generate with vLLM's `LLM`, requests going in as others come out.

    Use one at a time: closing one ends state that vLLM shares between all of a process.

    Args:
        model: A local folder, or a name on the hub.
        adapter: Folder of a LoRA adapter (PEFT) to put on the model.
        dtype: "float32", "bfloat16", "float16", or "auto" for vLLM's choice (bfloat16 for weights in float32).
        chat: Whether to give the model messages; by default if its tokenizer has a chat template.
        logprobs_mode: "raw" or "processed", see `Completion`.
        batch_size: The most requests in vLLM at a time, running and waiting.
        options: Further arguments of `vllm.LLM`, such as `gpu_memory_utilization` or `tensor_parallel_size`.

    Raises:
        MissingPackageError: If vLLM is not installed.
        ConfigError: If vLLM does not take the model or a parameter.
    """

    name = "vllm"

    def __init__(
        self,
        model: str,
        *,
        adapter: str | None = None,
        dtype: str = "auto",
        chat: bool | None = None,
        logprobs_mode: str = "raw",
        batch_size: int = 512,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        require("vllm", "vllm", "the engine `vllm`")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError(f"batch_size = {batch_size}; allowed: a whole number, 1 or more")
        if logprobs_mode not in LOGPROBS_MODES:
            raise ConfigError(f"logprobs_mode = {logprobs_mode!r}; allowed: {', '.join(LOGPROBS_MODES)}")
        self.model = str(model) if adapter is None else f"{model}+{adapter}"
        self._tokenizer = load_tokenizer(str(model))
        self._fingerprint = folder_fingerprint(model) if Path(model).is_dir() else None
        if adapter is not None and Path(adapter).is_dir():
            self._fingerprint = f"{self._fingerprint}+{folder_fingerprint(adapter)}"
        self.chat = bool(self._tokenizer.chat_template) if chat is None else chat
        self._batch_size, self._logprobs_mode = batch_size, logprobs_mode
        self._options = {k: v for k, v in (options or {}).items() if k not in _NOT_TOLD}
        given = {
            "dtype": dtype,
            "logprobs_mode": f"{logprobs_mode}_logprobs",
            "enable_lora": adapter is not None,
            "use_tqdm_on_load": False,
        }
        if adapter is not None:
            given["max_lora_rank"] = _rank(adapter)
        self._llm = _open(str(model), given | dict(options or {}))
        self._adapter = None if adapter is None else self._put_on(adapter)
        self._sleeps = bool((options or {}).get("enable_sleep_mode"))
        self._limit = int(self._llm.model_config.max_model_len)

    def describe(self) -> dict[str, Any]:
        """Return engine, version, model, type of numbers, options, and a hash of the weights of a local folder."""
        import vllm

        return {
            "engine": self.name,
            "engine_version": vllm.__version__,
            "model": self.model,
            "model_fingerprint": self._fingerprint,
            "dtype": str(self._llm.model_config.dtype).removeprefix("torch."),
            "chat": self.chat,
            "logprobs_mode": self._logprobs_mode,
            "options": json.loads(json.dumps(self._options, default=str)),
            "weight_version": self.weight_version,
        }

    def tokens(self, rendered: Rendered) -> list[int]:
        """Return the tokens that the model reads of a rendered text."""
        return prompt_tokens(self._tokenizer, rendered)

    def stream(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[tuple[int, list[Completion]]]:
        """Yield completions as they finish; see `Engine.stream`."""
        engine = self._llm.llm_engine
        pending = enumerate(requests)
        began: dict[str, tuple[int, float]] = {}
        try:
            while True:
                self.check_not_paused()
                while len(began) < self._batch_size and (item := next(pending, None)) is not None:
                    position, request = item
                    reason = self._add(f"oirl-{position}", request, sampling)
                    if reason is not None:
                        yield position, refused(reason, sampling.n)
                        continue
                    began[f"oirl-{position}"] = position, time.perf_counter()
                if not began:
                    return
                for output in engine.step():
                    if output.finished and output.request_id in began:
                        position, start = began.pop(output.request_id)
                        seconds = time.perf_counter() - start
                        yield position, [self._completion(output, o, sampling, seconds) for o in output.outputs]
        finally:
            if began:
                engine.abort_request(list(began))

    def score(self, prompt_ids: Sequence[Sequence[int]], token_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the log-probs of tokens after a prompt; raw, whatever the mode is. See `Engine.score`."""
        from vllm import SamplingParams

        rows = [[*prompt, *tokens] for prompt, tokens in zip(prompt_ids, token_ids, strict=True)]
        longest = max(map(len, rows), default=0)
        if longest >= self._limit:
            raise EngineError(f"vLLM scores up to {self._limit - 1:,} tokens of this model, and a row has {longest:,}")
        settings = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        # With an adapter, several rows at a time end vLLM's engine on CPUs (seen in 0.32).
        size = len(rows) or 1 if self._adapter is None else 1
        outputs = []
        for start in range(0, len(rows), size):
            asked = [{"prompt_token_ids": row} for row in rows[start : start + size]]
            outputs += self._llm.generate(asked, settings, use_tqdm=False, lora_request=self._adapter)
        return [
            [told[token].logprob for told, token in zip(output.prompt_logprobs[len(p) :], tokens, strict=True)]
            for output, p, tokens in zip(outputs, prompt_ids, token_ids, strict=True)
        ]

    def pause(self) -> None:
        """Draw nothing until `resume`; with the option `enable_sleep_mode` the GPU's memory is given back meanwhile.

        Raises:
            EngineError: If responses are still being drawn.
        """
        if self._llm.llm_engine.has_unfinished_requests():
            raise EngineError("vLLM can only be paused when no response is being drawn")
        if self._sleeps:
            self._llm.sleep(level=1)
        super().pause()

    def resume(self) -> None:
        """Go on after `pause`."""
        if self._sleeps:
            self._llm.wake_up()
        super().resume()

    def _load_weights(self, weights: Iterable[tuple[str, Any]]) -> None:
        if self._llm.llm_engine.has_unfinished_requests():
            raise EngineError("weights can only be updated when no response is being drawn")
        # By path, vLLM leaves a stale copy of tied weights behind on CPUs; by name and tensor it does not.
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": list(weights)})
        if not self._llm.reset_prefix_cache():
            raise EngineError("vLLM did not reset its prefix cache: what it holds comes from the old weights")

    def close(self) -> None:
        """Free the memory that vLLM holds."""
        import gc

        self._llm = None
        gc.collect()

    def _put_on(self, adapter: str) -> Any:
        from vllm.lora.request import LoRARequest

        request = LoRARequest("adapter", 1, adapter)
        try:
            # At once: an adapter that fails with a first request leaves vLLM waiting for ever.
            self._llm.llm_engine.add_lora(request)
        except Exception as e:  # vLLM raises several kinds
            self.close()
            raise ConfigError(f"vLLM cannot load the adapter {adapter!r}: {str(e).strip().splitlines()[0]}") from e
        return request

    def _add(self, name: str, request: Request, sampling: Sampling) -> str | None:
        """Give a request to vLLM; return why it was refused."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        try:
            ids = self.tokens(request.rendered)
        except OirlError as e:
            return str(e)
        if not ids:
            return "the rendered text has no tokens"
        if len(ids) >= self._limit:
            return f"the rendered text has {len(ids):,} tokens, and the model reads {self._limit:,} with its response"
        settings = SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or 0,
            n=sampling.n,
            seed=request.seed,
            stop=list(sampling.stop),
            logprobs=0 if sampling.logprobs else None,
            detokenize=bool(sampling.stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        try:
            self._llm.llm_engine.add_request(name, {"prompt_token_ids": ids}, settings, lora_request=self._adapter)
        except Exception as e:  # vLLM's errors of validation are of several kinds
            return str(e).strip().splitlines()[0]
        return None

    def _completion(self, output: Any, made: Any, sampling: Sampling, seconds: float) -> Completion:
        tokens = list(made.token_ids)
        logprobs = None
        if sampling.logprobs:
            logprobs = tuple(told[token].logprob for told, token in zip(made.logprobs, tokens, strict=True))
        ended = made.finish_reason == "stop" and made.stop_reason is None
        text = finish_text(self._tokenizer, tokens, sampling.stop, ended=ended)
        prompt = tuple(output.prompt_token_ids)
        return Completion(text, made.finish_reason, tuple(tokens), logprobs, prompt, len(prompt), len(tokens), seconds)


def _open(model: str, arguments: dict[str, Any]) -> Any:
    # The engine runs in this process: weights are updated by plain calls, and nothing is left when it ends.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm import LLM
    from vllm.platforms import current_platform

    if current_platform.is_cpu():  # there, a prompt that is read in two steps cannot have a seed (seen in vLLM 0.32)
        arguments = {"enable_chunked_prefill": False} | arguments
    try:
        with _own_randomness():
            return LLM(model, **arguments)
    except OirlError:
        raise
    except Exception as e:  # vLLM, torch and pydantic raise many kinds
        lines = [line for line in str(e).strip().splitlines() if line.strip()]
        raise ConfigError(f"vLLM cannot load {model!r}: {lines[0] if lines else type(e).__name__}") from e


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Keep the caller's random states: vLLM seeds Python's, NumPy's and torch's anew when it is made."""
    import random

    import numpy as np
    import torch

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


def _rank(adapter: str) -> int:
    """Return the least rank that vLLM knows and that an adapter fits in."""
    try:
        rank = int(json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8"))["r"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"{adapter!r} is no folder of a LoRA adapter (adapter_config.json): {e}") from e
    return next((known for known in _RANKS if known >= rank), rank)
