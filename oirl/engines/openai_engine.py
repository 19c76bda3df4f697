"""The engine `openai`: any server with the interface of OpenAI (vLLM, llama.cpp, …), by the official client."""

from __future__ import annotations

import asyncio
import math
import os
import queue
import random
import re
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from oirl.engines.base import DEFAULT_TIMEOUT_S, Completion, Engine, EngineError, Request, Sampling, failed, refused
from oirl.engines.openai_replies import read_choices, read_completion, read_scores
from oirl.engines.server_weights import send_weights
from oirl.errors import ConfigError, require

T = TypeVar("T")
_TRANSIENT = (408, 409, 425, 429)
_FATAL = (401, 403, 404)
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 60.0
_OPENAI = "api.openai.com"


class OpenAIEngine(Engine):
    """Ask a server, many requests at a time; what fails for a while is asked again.

    Errors that may pass (429, 5xx, timeouts, broken connections, replies that are no JSON) are tried again after
    0.5, 1, 2, … 60 seconds, jittered, or when the server says (`Retry-After`); after a 429 all requests wait. A request
    that the server refuses (400, 413, 422) fails alone. No access or no such model ends it all.

    Args:
        model: The model's name on the server.
        base_url: Such as "http://127.0.0.1:8000/v1"; by default OPENAI_BASE_URL, else OpenAI's own.
        api_key_env: The environment variable that holds the key; a server of your own may need none.
        chat: Whether to send messages (/chat/completions) or plain text (/completions).
        concurrency: The most requests at a time.
        timeout: Seconds in which a request must be answered in full.
        max_retries: How often a request is tried again.
        requests_per_minute: The most requests to begin in a minute; None for no limit.
        weights_folder: A folder under which a vLLM server reads new weights that are put there (`send_weights`).

    Raises:
        MissingPackageError: If the client is not installed.
        ConfigError: If a parameter is not allowed, or there is no key for OpenAI's own server.
        EngineError: If the server cannot be reached or has no such model.
    """

    name = "openai"
    shared = True

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        chat: bool = True,
        concurrency: int = 16,
        timeout: float = 120.0,
        max_retries: int = 6,
        requests_per_minute: float | None = None,
        weights_folder: str | None = None,
    ) -> None:
        require("openai", "openai", "the engine `openai`")
        from openai import AsyncOpenAI

        _check_number("concurrency", concurrency, whole=True, least=1)
        _check_number("max_retries", max_retries, whole=True, least=0)
        _check_number("timeout", timeout)
        if requests_per_minute is not None:
            _check_number("requests_per_minute", requests_per_minute)
        self.model, self.chat = str(model), chat
        self.base_url = base_url or os.environ.get("OPENAI_BASE_URL") or f"https://{_OPENAI}/v1"
        key = (os.environ.get(api_key_env) or "").strip()  # files end in a line break, headers must not
        if not key and self._is_openai:
            raise ConfigError(f"{self._shown_url} needs a key: set the environment variable {api_key_env}")
        self._concurrency, self._timeout, self._max_retries = concurrency, timeout, max_retries
        self._weights_folder = weights_folder
        self._gap = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._not_before = self._next_start = 0.0
        self._over = asyncio.Event()  # set when a run ends early: nothing more is begun
        self._key = key
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="oirl-openai")
        self._thread.start()
        try:
            self._client = AsyncOpenAI(api_key=key or "none", base_url=self.base_url, max_retries=0, timeout=timeout)
        except Exception as e:  # an address that is none
            self._stop()
            raise ConfigError(f"base_url = {self._shown_url!r}: {e}") from e
        try:
            self._card = self._find_model()
        except BaseException:
            self.close()
            raise
        self._is_vllm = self._card.get("owned_by") == "vllm"

    @property
    def _shown_url(self) -> str:
        """The address without a name and password in it."""
        return re.sub(r"//[^/@]*@", "//", self.base_url)

    @property
    def _is_openai(self) -> bool:
        return _OPENAI in self.base_url

    def describe(self) -> dict[str, Any]:
        """Return engine, the client's and, of vLLM, the server's version, model and address."""
        import openai

        server = self._wait(self._version()) if self._is_vllm else None
        return {
            "engine": self.name,
            "engine_version": openai.__version__,
            "server_version": server,
            "base_url": self._shown_url.rstrip("/"),
            "model": self.model,
            "model_fingerprint": self._card.get("root"),
            "chat": self.chat,
        }

    def stream(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[tuple[int, list[Completion]]]:
        """Yield completions as they come; see `Engine.stream`."""
        done: queue.Queue[tuple[int, Future[list[Completion]]]] = queue.Queue()
        pending = enumerate(requests)
        running: dict[int, Future[list[Completion]]] = {}
        fatal: EngineError | None = None
        try:
            while True:
                fatal = fatal or self._pause_problem()  # what is on its way is waited for
                while not fatal and len(running) < self._concurrency and (item := next(pending, None)) is not None:
                    position, request = item
                    future = self._start(self._complete(request, sampling))
                    running[position] = future
                    future.add_done_callback(lambda f, position=position: done.put((position, f)))  # type: ignore[misc]
                if not running:
                    break
                position, future = done.get()
                del running[position]
                try:
                    completions = future.result()
                except EngineError as e:  # what is on its way is paid for: it is waited for
                    fatal = e
                    self._soon(self._over.set)
                except CancelledError:  # it had not begun when the run ended, or the engine was closed
                    if fatal is None:
                        raise EngineError("the engine was closed") from None
                else:
                    yield position, completions
            if fatal:
                raise fatal
        finally:
            for future in running.values():
                future.cancel()
            self._soon(self._over.clear)

    def score(self, prompt_ids: Sequence[Sequence[int]], token_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the raw log-probs of given tokens, of a vLLM server; see `Engine.score`."""
        if not self._is_vllm:
            return super().score(prompt_ids, token_ids)

        async def all_of_them() -> list[list[float]]:
            room = asyncio.Semaphore(self._concurrency)

            async def one(prompt: Sequence[int], tokens: Sequence[int]) -> list[float]:
                async with room:
                    return await self._score(prompt, tokens)

            return await asyncio.gather(*(one(p, t) for p, t in zip(prompt_ids, token_ids, strict=True)))

        return self._wait(all_of_them())

    async def _score(self, prompt: Sequence[int], tokens: Sequence[int]) -> list[float]:
        def ask() -> Awaitable[Any]:
            return self._client.completions.create(
                model=self.model,
                prompt=[*prompt, *tokens],
                max_tokens=1,
                temperature=0,
                extra_body={"prompt_logprobs": 0},
            )

        try:
            reply = await self._retrying(ask, lambda r: read_scores(r, len(prompt), tokens))
        except (_Refused, _Failed) as e:
            raise EngineError(f"{self._shown_url} cannot score given tokens: {e}") from e
        return read_scores(reply, len(prompt), tokens)

    @property
    def takes_weights(self) -> bool:
        """Whether there is a vLLM server, and a folder to put new weights in."""
        return self._is_vllm and self._weights_folder is not None

    def _load_weights(self, weights: Iterable[tuple[str, Any]]) -> None:
        if not self.takes_weights or self._weights_folder is None:
            raise EngineError(
                f"{self._shown_url} cannot take new weights: that needs a vLLM server with VLLM_SERVER_DEV_MODE=1, and "
                "weights_folder, a folder that it can read"
            )
        send_weights(self._root, Path(self._weights_folder), self.weight_version + 1, weights, DEFAULT_TIMEOUT_S)

    @property
    def _root(self) -> str:
        return self.base_url.rstrip("/").removesuffix("/v1")

    def close(self) -> None:
        """Break off what is running and close the connections."""
        if not self._loop.is_closed():
            self._wait(self._shut())
            self._stop()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _shut(self) -> None:
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await self._client.close()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return self._start(work).result()

    def _soon(self, work: Callable[[], None]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(work)

    def _start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        if self._loop.is_closed():
            work.close()
            raise EngineError("the engine is closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _find_model(self) -> dict[str, Any]:
        """Return the server's card of the model, {} if it does not list it but may still have it."""
        try:
            reply = self._wait(self._retrying(lambda: self._client.models.list()))
        except _Refused as e:
            # Gateways need not list models; what they have shows with the first request.
            if e.status in (401, 403):
                raise EngineError(f"{self._shown_url}: {e}") from e
            return {}
        except _Failed as e:
            raise EngineError(f"{self._shown_url} does not answer: {e}") from e
        listed = getattr(reply, "data", None)
        found = listed if isinstance(listed, list) else []
        cards = {card.id: card.model_dump() for card in found if isinstance(getattr(card, "id", None), str)}
        local = [name for name, card in cards.items() if card.get("owned_by") == "vllm"]
        if local and self.model not in cards:
            raise EngineError(f"{self._shown_url} has no model {self.model!r}; it has: {', '.join(cards)}")
        return cards.get(self.model, {})

    async def _version(self) -> str | None:
        url = f"{self._root}/version"
        try:
            reply = await self._retrying(lambda: self._client.get(url, cast_to=object))
        except (_Refused, _Failed):
            return None
        return str(reply["version"]) if isinstance(reply, dict) and "version" in reply else None

    async def _retrying(self, ask: Callable[[], Awaitable[Any]], check: Callable[[Any], Any] = lambda _: None) -> Any:
        """Return a reply that passes a check, asking again as long as it may help."""
        for attempt in range(self._max_retries + 1):
            await self._turn()
            try:
                reply = await asyncio.wait_for(ask(), self._timeout)
                check(reply)
                return reply
            except (asyncio.TimeoutError, Exception) as e:  # asyncio's own is no TimeoutError before Python 3.11
                reason, told = _passing(e, self._timeout, self._key)
            wait = min(_FIRST_WAIT_S * 2**attempt, _LONGEST_WAIT_S) * random.uniform(0.5, 1.0)
            if told is not None:
                wait = max(told, wait)
                self._not_before = max(self._not_before, time.monotonic() + told)
            if attempt < self._max_retries:
                await self._rest(wait)
        raise _Failed(f"{reason}; tried {self._max_retries + 1} times")

    async def _turn(self) -> None:
        """Wait until a request may begin: not more often than allowed, not while the server wants to be left alone."""
        while (start := max(self._not_before, self._next_start)) > (now := time.monotonic()):
            await self._rest(start - now)  # the server may ask for more patience meanwhile
        await self._rest(0)
        if self._gap:
            self._next_start = now + self._gap

    async def _rest(self, seconds: float) -> None:
        """Sleep, unless the run is over: what is not on its way then is not begun."""
        if seconds > 0 and not self._over.is_set():
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._over.wait(), seconds)
        if self._over.is_set():
            raise asyncio.CancelledError

    async def _complete(self, request: Request, sampling: Sampling) -> list[Completion]:
        seconds = 0.0

        async def ask() -> Any:
            nonlocal seconds
            began = time.perf_counter()
            reply = await self._ask(request, sampling)
            seconds = time.perf_counter() - began
            return reply

        try:
            reply = await self._retrying(ask, lambda r: read_choices(r, sampling.n))
        except _Refused as e:
            if e.status in _FATAL or e.status == 429:
                raise EngineError(f"{self._shown_url}: {e}") from e
            return refused(str(e), sampling.n)
        except _Failed as e:
            return failed(str(e), sampling.n)
        return [
            read_completion(reply, choice, logprobs=sampling.logprobs, alone=sampling.n == 1, seconds=seconds)
            for choice in read_choices(reply, sampling.n)
        ]

    async def _ask(self, request: Request, sampling: Sampling) -> Any:
        settings = self._settings(request, sampling)
        _check_unicode(request)
        if sampling.logprobs:
            settings["logprobs"] = True if self.chat else 1
        if self.chat:
            turns = request.rendered
            if isinstance(turns, str):
                turns = [{"role": "user", "content": turns}]
            return await self._client.chat.completions.create(
                messages=list(turns),  # type: ignore[arg-type]
                **settings,
            )
        if not isinstance(request.rendered, str):
            raise _Refused("messages cannot be sent as plain text", 400)
        return await self._client.completions.create(prompt=request.rendered, **settings)

    def _settings(self, request: Request, sampling: Sampling) -> dict[str, Any]:
        """Return what to send: all settings, as a server may take those it is not told from the model's own files."""
        # OpenAI's newer models know no `max_tokens`, and some refuse a temperature even if it is the default.
        limit = "max_completion_tokens" if self.chat and self._is_openai else "max_tokens"
        found: dict[str, Any] = {"model": self.model, limit: sampling.max_tokens, "n": sampling.n}
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p}
        found |= {k: v for k, v in drawn.items() if v != 1 or not self._is_openai}
        found |= {"seed": request.seed, "stop": list(sampling.stop) or None}
        extra: dict[str, Any] = {}
        if sampling.top_k is not None:
            extra["top_k"] = sampling.top_k
        if self._is_vllm:
            extra = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "return_token_ids": True} | extra
        return {k: v for k, v in found.items() if v is not None} | {"extra_body": extra or None}


def _check_number(name: str, value: Any, *, whole: bool = False, least: int | None = None) -> None:
    right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not right or (value < least if least is not None else value <= 0):
        allowed = f"{'a whole number, ' if whole else ''}{'above 0' if least is None else f'{least} or more'}"
        raise ConfigError(f"{name} = {value!r}; allowed: {allowed}")


def _check_unicode(request: Request) -> None:
    rendered = request.rendered
    try:
        for text in [rendered] if isinstance(rendered, str) else [turn["content"] for turn in rendered]:
            text.encode()
    except UnicodeEncodeError as e:
        raise _Refused("the text is not valid Unicode", 400) from e


class _Refused(Exception):
    """The server does not want the request, and will not want it later."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class _Failed(Exception):
    """What went wrong went on for too long."""


def _passing(error: BaseException, timeout: float, key: str) -> tuple[str, float | None]:
    """Return what to say of an error that may pass, and the seconds that the server asks to be left alone.

    Raises:
        _Refused: If it will not pass.
    """
    from openai import APIConnectionError, APIStatusError

    if isinstance(error, APIStatusError):
        status, said = error.status_code, _said(error, key)
        if (status not in _TRANSIENT and status < 500) or error.code == "insufficient_quota":
            raise _Refused(f"status {status}: {said}", status) from error
        return f"status {status}: {said}", _retry_after(error) if status in (429, 503) else None
    if isinstance(error, (asyncio.TimeoutError, TimeoutError)):
        return f"no reply within {timeout:g} s", None
    if isinstance(error, APIConnectionError):
        return f"{error} {error.__cause__ or ''}".strip(), None
    if isinstance(error, _Refused):
        raise error
    if isinstance(
        error, (ValueError, KeyError, TypeError, AttributeError, RecursionError)
    ):  # what parsing a broken reply raises
        return f"a broken reply: {error}", None
    raise error


def _said(error: Any, key: str) -> str:
    body = error.body
    if isinstance(body, dict):  # OpenAI's form, or those of FastAPI and others
        body = body.get("message") or body.get("detail") or body.get("error")
    message = body or error.message
    text = " ".join(str(message).split())
    return (text.replace(key, "(the key)") if key else text)[:300]  # a part of a key would not be found


def _retry_after(error: Any) -> float:
    """Return the seconds that a server asks for, at most a minute; 0 where it does not say."""
    try:
        asked = float(error.response.headers.get("retry-after", 0))
    except ValueError:  # a date: rare, and clocks differ
        return 0.0
    return min(max(asked, 0.0), _LONGEST_WAIT_S) if math.isfinite(asked) else 0.0
