"""A scripted chat server on loopback; it logs the requests.

with ChatServer() as server:
    server.script = lambda ask: Act(status=429) if ask.number < 3 else Act()
"""

import contextlib
import json
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self


@dataclass(frozen=True)
class Ask:
    """One request."""

    number: int
    """Requests before it, from 0; probes of one token are not counted."""
    text: str
    """Text of the user's messages."""
    body: Mapping[str, Any]
    headers: Mapping[str, str]
    at: float
    in_flight: int
    """Requests in flight, this one included."""


@dataclass(frozen=True)
class Act:
    """The reply to a request."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    hang_s: float = 0.0
    """Seconds of silence, after which the connection is closed."""
    raw: bytes | None = None
    """Body instead of a chat completion."""
    half: bool = False
    """Whether to send only half of the body."""
    reset: bool = False
    """Whether to reset the connection."""
    message: Mapping[str, Any] | None = None
    finish_reason: str = "stop"
    model: str | None = None
    fingerprint: str | None = None


def reversed_words(text: str) -> str:
    """Answer with the prompt's words in reverse order."""
    return " ".join(reversed(text.split())) or "nothing"


class ChatServer:
    """Serves one model until it is closed; can be stopped and restarted on its port."""

    def __init__(
        self, model: str = "tiny", answer: Callable[[str], str] = reversed_words, port: int = 0
    ) -> None:
        self.model = model
        self.fingerprint: str | None = None
        self.answer = answer
        self.script: Callable[[Ask], Act] = lambda _: Act()
        self.script_probe = Act()
        """The reply to requests for one token."""
        self.asked: list[Ask] = []
        self.answered: list[str] = []
        """Texts of the completely answered prompts, in order."""
        self.probes = 0
        self.wants_newer_limit = False
        """Whether to refuse `max_tokens` in favour of `max_completion_tokens`."""
        self.gives_logprobs = False
        self.gives_usage = True
        self.template_tokens = 0
        """What the chat template adds to each prompt."""
        self.version: str | None = None
        """What `/version` says; it is not there when None."""
        self.connections = 0
        """Connections that were opened."""
        self.listed: list[dict[str, Any]] | None = None
        self.most_in_flight = 0
        self._in_flight = 0
        self._lock = threading.Lock()
        self._port = port
        self._sockets: set[socket.socket] = set()
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    def start(self) -> None:
        """Listen; on the old port after a stop."""
        self._server = _QuietServer(("127.0.0.1", self._port), _handler(self))
        self._port = self._server.server_address[1]
        self._is_up = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Break all connections and refuse new ones, like a killed server."""
        self._server.shutdown()
        self._server.server_close()
        with self._lock:
            self._is_up = False
            for each in self._sockets:
                _reset(each)
            self._sockets.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def enter(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> Ask:
        text = " ".join(each["content"] for each in body["messages"] if each["role"] == "user").strip()
        with self._lock:
            self._in_flight += 1
            ask = Ask(
                len(self.asked), " ".join(text.split()), body, headers, time.monotonic(), self._in_flight
            )
            if _limit(body) == 1:
                self.probes += 1
            else:
                self.most_in_flight = max(self.most_in_flight, self._in_flight)
                self.asked.append(ask)
        return ask

    def refusal(self, body: Mapping[str, Any]) -> Act | None:
        """Return the reply to a request whose token limit has the wrong name, None for other requests."""
        if not self.wants_newer_limit or "max_tokens" not in body:
            return None
        words = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
        return Act(status=400, raw=json.dumps({"error": {"message": words}}).encode())

    def leave(self) -> None:
        with self._lock:
            self._in_flight -= 1

    def models(self) -> list[dict[str, Any]]:
        return self.listed or [
            {"id": self.model, "object": "model", "created": time.time(), "owned_by": "us"}
        ]

    def completion(self, ask: Ask, act: Act) -> bytes:
        message = act.message or {"role": "assistant", "content": self.answer(ask.text)}
        choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": act.finish_reason}
        if self.gives_logprobs and ask.body.get("logprobs"):
            choice["logprobs"] = {
                "content": [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -1.5}]
            }
        data: dict[str, Any] = {
            "id": f"chat-{ask.number}",
            "object": "chat.completion",
            "model": act.model or self.model,
            "choices": [choice],
        }
        if self.gives_usage:
            prompt_tokens = self.template_tokens + len(ask.text.split())
            data["usage"] = {"prompt_tokens": prompt_tokens, "completion_tokens": 3}
        if (fingerprint := act.fingerprint or self.fingerprint) is not None:
            data["system_fingerprint"] = fingerprint
        return json.dumps(data).encode()

    def keep(self, connection: socket.socket) -> None:
        with self._lock:
            self.connections += 1
            if self._is_up:
                self._sockets.add(connection)
            else:  # accepted just before the stop
                _reset(connection)

    def drop(self, connection: socket.socket) -> None:
        with self._lock:
            self._sockets.discard(connection)


class _QuietServer(ThreadingHTTPServer):
    """Prints nothing about clients that leave during a request."""

    daemon_threads = True
    request_queue_size = 512
    """Connections that may wait to be accepted; more are dropped, and come again after a second."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


def _limit(body: Mapping[str, Any]) -> int:
    return int(body.get("max_tokens") or body["max_completion_tokens"])


def _reset(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)  # its files keep it open after `close`
        connection.close()


def _handler(server: ChatServer) -> type[BaseHTTPRequestHandler]:  # noqa: C901 -- its methods are short
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            server.keep(self.connection)

        def finish(self) -> None:
            server.drop(self.connection)
            with contextlib.suppress(OSError, ValueError):
                super().finish()

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

        def do_GET(self) -> None:
            if self.path == "/v1/models":
                self._send(200, json.dumps({"object": "list", "data": server.models()}).encode())
            elif self.path == "/version" and server.version is not None:
                self._send(200, json.dumps({"version": server.version}).encode())
            else:
                self._send(404, b'{"error": "nothing here"}')

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            ask = server.enter(body, dict(self.headers.items()))
            try:
                self._act(
                    ask,
                    server.refusal(body)
                    or (server.script_probe if _limit(body) == 1 else server.script(ask)),
                )
            except OSError:
                self.close_connection = True
            finally:
                server.leave()

        def _act(self, ask: Ask, act: Act) -> None:
            time.sleep(act.delay_s)
            if act.hang_s or act.reset:
                time.sleep(act.hang_s)
                self.close_connection = True
                if act.reset:
                    _reset(self.connection)
                return
            content = server.completion(ask, act) if act.raw is None else act.raw
            if act.status != 200:
                content = act.raw or json.dumps({"error": {"message": f"status {act.status}"}}).encode()
            self._send(act.status, content, act.headers, half=act.half)
            if act.status == 200 and act.raw is None and not act.half and _limit(ask.body) > 1:
                server.answered.append(ask.text)

        def _send(
            self, status: int, content: bytes, headers: Mapping[str, str] | None = None, *, half: bool = False
        ) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if half else content)
            if half:
                self.close_connection = True

    return Handler


if __name__ == "__main__":
    # python chat_server.py PORT [SECONDS OF EACH ANSWER]
    program = ChatServer(port=int(sys.argv[1]))
    wait_s = float(sys.argv[2]) if len(sys.argv) > 2 else 0.0
    program.script = lambda _: Act(delay_s=wait_s)
    print("the server has started", flush=True)
    threading.Event().wait()
