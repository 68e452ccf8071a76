"""A server on loopback that answers chat completions by a rule, or with the faults that real ones have."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Said = tuple[int, dict[str, str], str]
"""Status, headers, body."""


def completion(text: str, usage: dict[str, int] | None = None) -> Said:
    """A chat completion as OpenAI's API gives it."""
    body: dict[str, Any] = {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}
    return 200, {"Content-Type": "application/json"}, json.dumps(body | ({"usage": usage} if usage else {}))


def pair(prompt: str) -> tuple[str, str]:
    """Answers A and B of a prompt made with the shipped rubric."""
    found = re.search(r"\[Answer A\]\n(.*)\n\[End of answer A\].*\[Answer B\]\n(.*)\n\[End of answer B\]", prompt, re.DOTALL)
    return (found[1], found[2]) if found else ("", "")


class Server:
    """What it was sent, and its address."""

    def __init__(self, rule: Callable[[dict[str, Any], dict[str, str]], Said]) -> None:
        """`rule` gets a request's body and headers."""
        self.rule = rule
        self.requests: list[tuple[dict[str, Any], dict[str, str]]] = []
        self.url = ""

    def prompts(self) -> list[str]:
        """The text of each request, in order."""
        return [body["messages"][-1]["content"] for body, _ in self.requests]


@contextlib.contextmanager
def serve(rule: Callable[[dict[str, Any], dict[str, str]], Said]) -> Iterator[Server]:
    """The server, for as long as the block."""
    server = Server(rule)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            headers = {name.lower(): value for name, value in self.headers.items()}
            server.requests.append((body, headers))
            status, told, text = server.rule(body, headers)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # who asked has gone
                self.send_response(status)
                for name, value in {"Content-Length": str(len(text.encode())), **told}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

        def log_message(self, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server.url = f"http://127.0.0.1:{http.server_port}/v1"
    thread = threading.Thread(target=http.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
