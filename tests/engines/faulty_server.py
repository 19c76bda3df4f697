"""A server on this machine with the interface of OpenAI: it answers as a pure function of the text, and fails as told.

It is a real HTTP/1.1 server with connections that are kept, as what a client makes of a cut stream or a reset shows
with sockets only. A request is recorded when it has been read; one that waits is given up when its client goes.
"""

from __future__ import annotations

import json
import os
import re
import select
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

END = 2
"""Id of the end-of-text token."""
FINGERPRINT = "fp_tiny_1"
_FOREVER_S = 1e6


@dataclass(frozen=True)
class Fault:
    """What becomes of a request.

    Attributes:
        status: The reply's status.
        body: Its body; None for the right one.
        headers: Headers beside those of a right reply, or in their place.
        change: Makes another body out of the right one.
        after_s: Seconds before anything is sent.
        how: "whole"; "cut" (the connection ends within the body), "reset" (it is broken off without a reply), "drip"
            (a byte every `gap_s`).
        gap_s: See "drip".
    """

    status: int = 200
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    change: Callable[[dict[str, Any]], Any] | None = None
    after_s: float = 0.0
    how: str = "whole"
    gap_s: float = 1.0


def error(
    status: int, message: str = "the server is unwell", *, code: str | None = None, retry_after: str | None = None
) -> Fault:
    """Return an error as OpenAI's servers write it."""
    body = {"error": {"message": message, "type": "some_error", "param": None, "code": code}}
    return Fault(status, json.dumps(body).encode(), {} if retry_after is None else {"Retry-After": retry_after})


def reply(body: Any) -> Fault:
    """Return JSON, whatever its shape, or text, in the place of a completion."""
    return Fault(body=body.encode() if isinstance(body, str) else json.dumps(body).encode())


def changed(**fields: Any) -> Fault:
    """Return a right reply with some fields replaced."""
    return Fault(change=lambda right: right | fields)


def changed_choice(**fields: Any) -> Fault:
    """Return a right reply whose choices have some fields replaced."""
    return Fault(change=lambda right: right | {"choices": [choice | fields for choice in right["choices"]]})


def slow(seconds: float) -> Fault:
    """Return the right reply, later."""
    return Fault(after_s=seconds)


def drip(gap_s: float = 1.0) -> Fault:
    """Return the right reply so slowly that it never ends, but without a pause in which a read timeout would hit."""
    return Fault(how="drip", gap_s=gap_s)


QUOTA = error(429, "You exceeded your current quota, please check your plan.", code="insufficient_quota")
HANG = Fault(after_s=_FOREVER_S)
CUT = Fault(how="cut")
RESET = Fault(how="reset")
HTML = Fault(body=b"<html><body><h1>Bad gateway</h1></body></html>", headers={"Content-Type": "text/html"})
WRONG_JSON = reply('{"id": "x", "choices": [{"index": 0, "mess')


@dataclass
class Asked:
    """A request as it came.

    Attributes:
        path: Its path.
        headers: Its headers, names in lower case.
        body: What it sent, {} for a GET.
        text: The rendered text: messages as `role: content` lines, or the plain prompt.
        nth: How many requests with this text came before.
        at: When it had been read, in seconds of `time.monotonic`.
        status: That of the reply that was sent in full (or is, to the last piece); None as long as there is none.
        right: Whether this was the right reply.
        closed: Whether the request is no longer open.
    """

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    text: str
    nth: int
    at: float
    status: int | None = None
    right: bool = False
    closed: bool = False


Faults = Callable[[Asked], "Fault | None"] | Sequence["Fault | None"]


class FaultyServer:
    """The server, from `with` to its end.

    Args:
        faults: What becomes of each request for a completion: a function of it, or a list in order of arrival; the
            right reply where it is None, or the list is at its end.
        models: Names of the models that it lists.
        vllm: Whether to pose as vLLM.
        list_faults: The same as `faults`, of the list of models.
        latency_s: Seconds before a right reply.

    Attributes:
        asked: The requests for completions in the order in which they came.
        others: All other requests.
        peak: The most requests for completions that were open at one time.
        open: How many are open now.
    """

    def __init__(
        self,
        faults: Faults = (),
        *,
        models: Sequence[str] = ("tiny",),
        vllm: bool = False,
        list_faults: Faults = (),
        latency_s: float = 0.0,
    ) -> None:
        self.faults, self.list_faults = faults, list_faults
        self.models, self.vllm, self.latency_s = models, vllm, latency_s
        self.asked: list[Asked] = []
        self.others: list[Asked] = []
        self.peak = self.open = 0
        self._broken: list[BaseException] = []
        self._seen: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._closing, self._close = os.pipe()
        self._http = _Server(("127.0.0.1", 0), _Handler)
        self._http.owner = self
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02})

    @property
    def port(self) -> int:
        return self._http.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def answered(self) -> Counter[str]:
        """Return how often each text has had its right reply."""
        return Counter(asked.text for asked in self.asked if asked.right)

    def __enter__(self) -> FaultyServer:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        os.write(self._close, b"x")  # never read: whoever waits for it wakes
        self._http.shutdown()
        with self._lock:
            for connection in self._connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._http.server_close()  # waits for the threads of all connections
        os.close(self._close)
        os.close(self._closing)
        if self._broken and raised[0] is None:
            raise AssertionError("the server of the tests is broken") from self._broken[0]

    def take(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> tuple[Asked, Fault | None]:
        """Record a request and return what becomes of it."""
        completion = path.endswith("/completions")
        with self._lock:
            text = text_of(body) if completion else path
            asked = Asked(path, headers, body, text, self._seen[text], time.monotonic())
            self._seen[text] += 1
            kept, faults = (self.asked, self.faults) if completion else (self.others, self.list_faults)
            kept.append(asked)
            if completion:
                self.open += 1
                self.peak = max(self.peak, self.open)
            if not completion and not path.endswith("/models"):
                return asked, None
            if callable(faults):
                return asked, faults(asked)
            return asked, faults[len(kept) - 1] if len(kept) <= len(faults) else None

    def done(self, asked: Asked) -> None:
        """Count a request as no longer open, once: before its last piece is sent, as the client may be quick."""
        with self._lock:
            if not asked.closed and asked.path.endswith("/completions"):
                self.open -= 1
            asked.closed = True

    def right(self, asked: Asked) -> tuple[int, Any]:
        """Return status and body of the right reply."""
        if asked.path.endswith("/v1/chat/completions"):
            return 200, completion(asked.body, chat=True, vllm=self.vllm)
        if asked.path.endswith("/v1/completions"):
            return 200, completion(asked.body, chat=False, vllm=self.vllm)
        if asked.path.endswith("/v1/models"):
            owner = "vllm" if self.vllm else "somebody"
            cards = [{"id": name, "object": "model", "created": 1, "owned_by": owner} for name in self.models]
            return 200, {"object": "list", "data": [card | {"root": f"/weights/{card['id']}"} for card in cards]}
        if asked.path == "/version" and self.vllm:
            return 200, {"version": "0.11.0"}
        return 404, {"error": {"message": f"no {asked.path}", "code": None}}


def answer(text: str, choice: int = 0) -> str:
    """Return what the model says to a rendered text: the sum it asks for, now and then one too much."""
    digest = blake2b(f"{choice} {text}".encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
    sums = re.findall(r"(\d+) \+ (\d+)", text)
    if not sums:
        return f"I see no sum here ({digest})."
    total = int(sums[-1][0]) + int(sums[-1][1]) + (int(digest, 16) % 4 == 0)
    return f"By way {digest} I add them. The answer is {total}."


def words(text: str) -> list[str]:
    """Return the tokens of a text: words, each with the space before it."""
    return re.findall(r"\s*\S+", text)


def token_id(word: str) -> int:
    """Return the id of a token."""
    return 3 + int.from_bytes(blake2b(word.encode("utf-8", "surrogatepass"), digest_size=2).digest(), "big")


def logprob(token: int) -> float:
    """Return the log-prob of a token, wherever it stands."""
    return -(token % 997 + 1) / 128


def completion(body: Mapping[str, Any], *, chat: bool, vllm: bool) -> dict[str, Any]:
    """Return the reply to a request for completions."""
    prompt = body.get("prompt")
    n, text = body.get("n") or 1, text_of(body)
    prompt_ids = list(prompt) if isinstance(prompt, list) else [token_id(word) for word in words(text)]
    choices, tokens_out = [], 0
    for index in range(n):
        choice, count = _choice(body, text, index, chat)
        tokens_out += count
        ids = choice.pop("ids")
        if vllm and body.get("return_token_ids"):
            choice["token_ids"] = ids
            if not chat:
                choice["prompt_token_ids"] = prompt_ids
        if vllm and not chat:
            _score_prompt(body, choice, prompt_ids, ids)
        choices.append(choice)
    found = {
        "id": "cmpl-1",
        "object": "chat.completion" if chat else "text_completion",
        "created": 1,
        "model": body.get("model"),
        "system_fingerprint": FINGERPRINT,
        "choices": choices,
        "usage": {
            "prompt_tokens": len(prompt_ids),
            "completion_tokens": tokens_out,
            "total_tokens": len(prompt_ids) + tokens_out,
        },
    }
    if chat and vllm and body.get("return_token_ids"):
        found["prompt_token_ids"] = prompt_ids
    return found


def _choice(body: Mapping[str, Any], text: str, index: int, chat: bool) -> tuple[dict[str, Any], int]:
    said = answer(text, index)
    for stop in body.get("stop") or ():
        said = said.split(stop)[0]
    tokens, most = words(said), body.get("max_tokens") or body.get("max_completion_tokens") or 16
    finish = "stop" if len(tokens) < most else "length"
    tokens = tokens[:most]
    ids = [token_id(word) for word in tokens] + ([END] if finish == "stop" else [])
    tokens += [""] * (len(ids) - len(tokens))
    said = "".join(tokens)
    choice: dict[str, Any] = {"index": index, "finish_reason": finish, "logprobs": None, "ids": ids}
    choice |= {"message": {"role": "assistant", "content": said}} if chat else {"text": said}
    values = [logprob(i) for i in ids]
    if chat and body.get("logprobs"):
        pairs = zip(tokens, values, strict=True)
        content = [{"token": t, "logprob": v, "bytes": list(t.encode()), "top_logprobs": []} for t, v in pairs]
        choice["logprobs"] = {"content": content, "refusal": None}
    if not chat and body.get("logprobs") is not None:
        choice["logprobs"] = {"tokens": tokens, "token_logprobs": values, "top_logprobs": None, "text_offset": []}
    return choice, len(ids)


def _score_prompt(
    body: Mapping[str, Any], choice: dict[str, Any], prompt_ids: Sequence[int], ids: Sequence[int]
) -> None:
    """Add the log-probs of the prompt's tokens, in the two ways that vLLM has."""
    if body.get("prompt_logprobs") is not None:
        scored = [{str(i): {"logprob": logprob(i), "rank": 1, "decoded_token": str(i)}} for i in prompt_ids[1:]]
        choice["prompt_logprobs"] = [None, *scored]
    if body.get("echo") and body.get("logprobs") is not None:
        kept = list(ids) if body.get("max_tokens") else []
        values = [None, *(logprob(i) for i in [*prompt_ids[1:], *kept])]
        choice["logprobs"] = {"tokens": [str(i) for i in [*prompt_ids, *kept]], "token_logprobs": values}


def text_of(body: Mapping[str, Any]) -> str:
    """Return the rendered text of a request: messages as `role: content` lines, or the plain prompt."""
    if "messages" in body:
        return "\n".join(f"{turn['role']}: {turn['content']}" for turn in body["messages"])
    prompt = body.get("prompt")
    return prompt if isinstance(prompt, str) else json.dumps(prompt)


class _Server(ThreadingHTTPServer):
    owner: FaultyServer
    daemon_threads = False
    request_queue_size = 256

    def process_request(self, request: Any, client_address: Any) -> None:
        with self.owner._lock:
            self.owner._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self.owner._lock:
            self.owner._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        import sys

        raised = sys.exc_info()[1]
        if raised is not None and not isinstance(raised, OSError):  # clients may go when they like
            self.owner._broken.append(raised)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve({})

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        body = self.rfile.read(length)
        if len(body) < length:  # the client has gone
            self.close_connection = True
            return
        self._serve(json.loads(body))

    def _serve(self, body: dict[str, Any]) -> None:
        owner = self.server.owner
        asked, fault = owner.take(self.path, {k.lower(): v for k, v in self.headers.items()}, body)
        try:
            self._answer(asked, fault or slow(owner.latency_s))
        finally:
            owner.done(asked)

    def _answer(self, asked: Asked, fault: Fault) -> None:
        status, right = self.server.owner.right(asked)
        if fault.change is not None:
            right = fault.change(right)
        body = fault.body if fault.body is not None else json.dumps(right).encode()
        status = fault.status if fault.status != 200 else status
        if fault.after_s and not self._wait(fault.after_s):
            return
        if fault.how == "reset":
            self.server.owner.done(asked)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        head = {"Content-Type": "application/json", "Content-Length": str(len(body))} | dict(fault.headers)
        lines = [f"HTTP/1.1 {status} Whatever", *(f"{name}: {value}" for name, value in head.items()), "", ""]
        start = "\r\n".join(lines).encode("latin-1")
        if fault.how == "cut":
            self.close_connection = True
            self.server.owner.done(asked)
            self.connection.sendall(start + body[: len(body) // 2])
            return
        if fault.how == "drip":
            for byte in body[:-1]:
                self.connection.sendall(start + bytes([byte]))
                start = b""
                if not self._wait(fault.gap_s):
                    return
            body = body[-1:]
        asked.status, asked.right = status, status == 200 and fault in (None, slow(fault.after_s), drip(fault.gap_s))
        self.server.owner.done(asked)
        self.connection.sendall(start + body)

    def _wait(self, seconds: float) -> bool:
        """Wait; False if the client has gone or the server closes before."""
        readable, _, _ = select.select([self.connection, self.server.owner._closing], [], [], seconds)
        if readable:
            self.close_connection = True
        return not readable
