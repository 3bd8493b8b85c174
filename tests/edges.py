"""A gateway before the endpoint, which sees and says anything: for what no fault can do."""

from __future__ import annotations

import http.client
import io
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

from faults import JOBS
from helpers import LoopbackHandler, LoopbackServer

from openai_sft_rehearsal import Rehearsal

PAGE = b"<html><body>\xe3\x83\xa1\xe3\x83\xb3\xe3\x83\x86\xe4\xb8\xad</body></html>"


class Request(NamedTuple):
    """A request as it came; ``path`` is what stands after ``/v1``."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def line(self) -> tuple[str, str]:
        return self.method, self.path


class Reply(NamedTuple):
    """What is sent back: ``body`` at once, or ``pieces`` one by one until the client hangs up."""

    status: int
    body: bytes = b""
    content_type: str = "application/json"
    headers: Mapping[str, str] = {}
    pieces: Iterator[bytes] | None = None

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def saying(value: Any, status: int = 200) -> Reply:
    return Reply(status, json.dumps(value).encode())


def refusal(status: int, message: Any = "断られました😢", code: str | None = None) -> Reply:
    return saying({"error": {"message": message, "type": "x", "param": None, "code": code}}, status)


def page(status: int = 200) -> Reply:
    """What a proxy or a hotel says instead of the API."""
    return Reply(status, PAGE, "text/html; charset=utf-8")


Forward = Callable[[Request], Reply]
Serve = Callable[[Request, Forward], Reply]


def passing(request: Request, forward: Forward) -> Reply:
    return forward(request)


def deaf(request: Request, forward: Forward) -> Reply:
    """As an endpoint that knows no filter."""
    return forward(request._replace(query=""))


class Gateway:
    """Answers every request by ``serve``, which may pass it on to ``endpoint``, altered or not."""

    def __init__(self, endpoint: Rehearsal | None, serve: Serve = passing) -> None:
        self.asked: list[Request] = []
        gateway = self

        def forward(request: Request) -> Reply:
            assert endpoint is not None
            connection = http.client.HTTPConnection(urlsplit(endpoint.url).netloc, timeout=30)
            try:
                headers = {"Content-Type": request.headers.get("content-type", "")}
                target = f"/v1{request.path}" + (f"?{request.query}" if request.query else "")
                connection.request(request.method, target, request.body, headers)
                got = connection.getresponse()
                return Reply(got.status, got.read(), got.headers.get("Content-Type", ""))
            finally:
                connection.close()

        class Handler(LoopbackHandler):
            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                path, _, query = self.path.partition("?")
                headers = {name.lower(): value for name, value in self.headers.items()}
                request = Request(self.command, path.removeprefix("/v1"), query, headers, body)
                gateway.asked.append(request)
                reply = serve(request, forward)
                self.send_response(reply.status)
                self.send_header("Content-Type", reply.content_type)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                if reply.pieces is None:
                    self.send_header("Content-Length", str(len(reply.body)))
                    self.end_headers()
                    self.wfile.write(reply.body)
                    return
                self.close_connection = True
                self.send_header("Connection", "close")
                self.end_headers()
                try:
                    for piece in reply.pieces:
                        self.wfile.write(piece)
                        self.wfile.flush()
                except OSError:  # the client has hung up
                    self.wfile = io.BytesIO()  # for what is left to be written

            do_POST = do_DELETE = do_GET

        self._server = LoopbackServer(("127.0.0.1", 0), Handler)
        self.port: int = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def of(self, method: str, path: str) -> list[Request]:
        """The requests of one kind."""
        return [request for request in self.asked if request.line == (method, path)]

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.005,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class Late:
    """Serves as the endpoint does, but loses the answers to the first ``times`` creations of a job.

    These jobs are in no list until ``seconds`` later by ``clock`` (``None``: until they are
    ``shown``), whether the service was slow to make them or its list lags behind.
    """

    def __init__(
        self, clock: Callable[[], float], seconds: float | None = None, times: int = 1
    ) -> None:
        self._clock, self._seconds, self._times = clock, seconds, times
        self._due: dict[str, float] = {}
        self.shown = False

    @property
    def jobs(self) -> list[str]:
        """The ids of the jobs whose answer was lost."""
        return list(self._due)

    def __call__(self, request: Request, forward: Forward) -> Reply:
        reply = forward(request)
        if request.line == ("POST", JOBS) and self._times and reply.status == 200:
            self._times -= 1
            never = float("inf")
            due = never if self._seconds is None else self._clock() + self._seconds
            self._due[reply.json["id"]] = due
            return page(504)
        if request.line == ("GET", JOBS) and not self.shown:
            listed = [job for job in reply.json["data"] if self.is_there(job["id"])]
            return saying({**reply.json, "data": listed})
        return reply

    def is_there(self, job_id: str) -> bool:
        return self.shown or self._due.get(job_id, 0.0) <= self._clock()


class Forgetful:
    """Passes everything on but metadata and filters, as some gateways do.

    ``lose`` says what becomes of the first creation: it is carried out and its answer lost
    (``"answer"``), it never arrives (``"request"``), or while it is carried out and its answer lost
    somebody else has the same file trained (``"both"``).
    """

    def __init__(self, lose: str) -> None:
        self.lose = lose

    def __call__(self, request: Request, forward: Forward) -> Reply:
        if request.line == ("POST", JOBS):
            asked = {key: value for key, value in request.json.items() if key != "metadata"}
            lose, self.lose = self.lose, ""
            if lose == "request":
                return page(502)
            request = request._replace(body=json.dumps(asked).encode())
            if lose == "both":
                forward(request)
            reply = forward(request)
            return page(504) if lose else reply
        return forward(request._replace(query=""))
