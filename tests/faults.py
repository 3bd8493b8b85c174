"""What the tests of losses share: a time of their own, and an endpoint whose answers are bent."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

from endpoint import Exchange, Rehearsal
from helpers import LoopbackHandler, LoopbackServer

JOBS = "/fine_tuning/jobs"
JOB = f"{JOBS}/ftjob-{'?' * 24}"  # one job, and not its events or checkpoints
FILE = f"/files/file-{'?' * 24}"  # one file, and not its content
CHAT = "/chat/completions"

#: Faults after which the request has been carried out although its answer is lost.
LOST = ("500_after", "reset_after", "stall_after", "truncated", "malformed")
#: Faults that a second try gets past.
PASSING = ("408", "409", "429", "500", "502", "503", "reset_before", "stall", *LOST)


class Clock:
    """A time that passes only while somebody sleeps; the endpoint works on meanwhile."""

    def __init__(self, endpoint: Rehearsal, moment: float = 0.005) -> None:
        self.began = self.now = time.time()  # as the endpoint's, which dates the files it takes
        self.slept: list[float] = []
        self.endpoint, self.moment = endpoint, moment

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        self.endpoint.wait_for_progress(self.moment)


def until(holds: Callable[[], object], timeout: float = 20.0) -> None:
    """Wait until ``holds()``; for what other processes do, which tell nobody."""
    never = threading.Event()
    for _ in range(int(timeout / 0.005)):
        if holds():
            return
        never.wait(0.005)
    raise AssertionError("it never came to that")


def asked(endpoint: Rehearsal, method: str, path: str) -> list[Exchange]:
    """The requests of one kind, whatever became of them."""
    return [e for e in endpoint.exchanges if (e.method, e.path) == (method, path)]


def made(endpoint: Rehearsal, path: str) -> int:
    """How many things were created by POST on ``path``, whether or not an answer told of it."""
    return sum(e.fault in LOST or e.status == 200 for e in asked(endpoint, "POST", path))


class Answer(NamedTuple):
    """An answer on its way back to the client, for a bend to replace."""

    status: int
    body: bytes
    content_type: str = "application/json"
    headers: Mapping[str, str] = {}  # besides the usual ones

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def saying(self, value: Any, status: int | None = None) -> Answer:
        return Answer(status or self.status, json.dumps(value).encode())


class Asked(NamedTuple):
    """A request on its way to the endpoint."""

    method: str
    path: str
    query: str
    authorization: str
    headers: Mapping[str, str] = {}


Bend = Callable[[Asked, Answer], Answer]


class Bent:
    """An endpoint before the endpoint, that alters what it likes: for what no fault can do.

    ``bend`` sees each answer and gives the one that is sent; ``deaf`` drops every query, as an
    endpoint that doesn't know a filter. What ``instead`` answers never gets to the endpoint.
    """

    def __init__(
        self,
        endpoint: Rehearsal,
        bend: Bend = lambda _, answer: answer,
        *,
        deaf: bool = False,
        instead: Callable[[Asked], Answer | None] = lambda _: None,
    ) -> None:
        behind = urlsplit(endpoint.url).netloc

        class Handler(LoopbackHandler):
            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                path, _, query = self.path.partition("?")
                target = path if deaf or not query else f"{path}?{query}"
                authorization = self.headers.get("Authorization", "")
                headers = {name.lower(): value for name, value in self.headers.items()}
                request = Asked(
                    self.command, path.removeprefix("/v1"), query, authorization, headers
                )
                self.send(instead(request) or bend(request, self.forward(target, body)))

            def forward(self, target: str, body: bytes) -> Answer:
                connection = http.client.HTTPConnection(behind, timeout=30)
                try:
                    headers = {
                        name: self.headers[name]
                        for name in ("Content-Type", "Authorization")
                        if name in self.headers
                    }
                    connection.request(self.command, target, body, headers)
                    got = connection.getresponse()
                    content_type = got.headers.get("Content-Type", "")
                    return Answer(got.status, got.read(), content_type)
                finally:
                    connection.close()

            def send(self, answer: Answer) -> None:
                self.send_response(answer.status)
                self.send_header("Content-Type", answer.content_type)
                self.send_header("Content-Length", str(len(answer.body)))
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer.body)

            do_POST = do_DELETE = do_GET

        self._server = LoopbackServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
