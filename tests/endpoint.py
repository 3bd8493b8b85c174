"""The rehearsal as the tests need it: it keeps what was said, and goes wrong when it is told to."""

from __future__ import annotations

import base64
import contextlib
import fnmatch
import json
import math
import socket
import struct
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import openai_sft_rehearsal
from openai_sft_rehearsal import Answer, ApiError, Job, Request, SentFile

_INVALID: Final = "invalid_request_error"
_SERVER: Final = "server_error"
_NO_QUOTA: Final = "You exceeded your current quota, please check your plan and billing details."
_NO_TRAINING: Final = "Fine-tuning is no longer available for your organization."
#: Faults answered instead of doing what was asked: status, message, code, type.
_REFUSALS: Final[dict[str, tuple[int, str, str | None, str]]] = {
    "400": (400, "Injected fault: bad request.", None, _INVALID),
    "401": (401, "Incorrect API key provided.", "invalid_api_key", _INVALID),
    "403": (403, "You have insufficient permissions.", None, _INVALID),
    "404": (404, "Injected fault: not found.", None, _INVALID),
    "405": (405, "Injected fault: method not allowed.", None, _INVALID),
    "408": (408, "Injected fault: request timeout.", None, _SERVER),
    "409": (409, "Injected fault: conflict.", None, _SERVER),
    "429": (429, "Rate limit reached for requests.", "rate_limit_exceeded", "requests"),
    "500": (500, "The server had an error.", None, _SERVER),
    "501": (501, "Injected fault: not implemented.", None, _SERVER),
    "502": (502, "Bad gateway.", None, _SERVER),
    "503": (503, "The engine is currently overloaded.", None, _SERVER),
    "insufficient_quota": (429, _NO_QUOTA, "insufficient_quota", "insufficient_quota"),
    "training_not_available": (403, _NO_TRAINING, "training_not_available", _INVALID),
}
#: Faults of the connection or the answer, on any request.
_WIRE_KINDS: Final = frozenset(
    {"500_after", "reset_before", "reset_after", "stall", "stall_after", "truncated", "malformed"}
)
#: Faults that only one kind of request can have.
_LOCAL_KINDS: Final = {
    "base64_result": ("GET", "/files/*/content"),
    **dict.fromkeys(("empty_answer", "refusal", "length"), ("POST", "/chat/completions")),
    **dict.fromkeys(("flagged", "job_failed", "paused_job"), ("POST", "/fine_tuning/jobs")),
}
FAULT_KINDS: Final = (*_REFUSALS, *sorted(_WIRE_KINDS), *_LOCAL_KINDS)


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong with matching requests.

    `path` is an fnmatch pattern on the path after ``/v1``; the first `skip` matching requests pass,
    the next `times` are hit (None: all of them). `seconds` is the length of a stall (60 unless
    told) or the ``Retry-After`` of a refusal worth retrying (429: 0 unless told; others: no header
    unless told).
    """

    kind: str
    method: str = "*"
    path: str = "*"
    times: int | None = 1
    skip: int = 0
    seconds: float | None = None

    def __post_init__(self) -> None:
        assert self.kind in FAULT_KINDS, f"{self.kind!r} is none of {FAULT_KINDS}"
        assert self.times is None or self.times > 0

    def matches(self, method: str, path: str) -> bool:
        wanted = ((self.method.upper(), self.path), _LOCAL_KINDS.get(self.kind, ("*", "*")))
        return all(
            fnmatch.fnmatchcase(method, methods) and fnmatch.fnmatchcase(path, paths)
            for methods, paths in wanted
        )


@dataclass(frozen=True)
class Exchange:
    """One request and its answer; recorded just before the answer is sent.

    `request` is the parsed JSON body or the form's fields (a file as its name and size), None where
    there is none or it can't be read; `response` the parsed JSON answer. `status` is 0 and
    `response` None where no answer was sent. `fault` names the fault that hit, if one did.
    """

    method: str
    path: str
    query: dict[str, str]
    request: Any
    status: int
    response: Any
    content_type: str
    fault: str | None = None


class Rehearsal(openai_sft_rehearsal.Rehearsal):
    """The rehearsal, with faults to inject and all exchanges kept."""

    def __init__(self, *, faults: Sequence[Fault] = (), **options: Any) -> None:
        super().__init__(**options)
        self.exchanges: list[Exchange] = []
        self._faults: list[list[Any]] = []  # [fault, how many to let pass, how many to hit]
        self._job_faults: dict[str, str] = {}
        for fault in faults:
            self.inject(fault)

    def inject(self, fault: Fault) -> None:
        with self.state:
            times = math.inf if fault.times is None else fault.times
            self._faults.append([fault, fault.skip, times])

    def _take_fault(self, request: Request) -> Fault | None:
        """The first fault that hits this request. Those that let it pass count it."""
        with self.state:
            for entry in self._faults:
                fault: Fault = entry[0]
                if entry[2] <= 0 or not fault.matches(request.method, request.path):
                    continue
                if entry[1] > 0:
                    entry[1] -= 1
                    continue
                entry[2] -= 1
                return fault
        return None

    def answer(self, request: Request) -> Answer:
        fault = self._take_fault(request)
        kind = fault.kind if fault else ""
        if fault and kind in ("reset_before", "stall"):
            self._vanish(request, fault)
        if fault and kind in _REFUSALS:
            answer = self.dialect.refusal(_refusal(fault))
        else:
            with self.state if kind in _WORK else contextlib.nullcontext():
                answer = super().answer(request)
                if kind in _WORK and answer.status == 200:  # the worker waits for `state`
                    self._job_faults[json.loads(answer.body)["id"]] = kind
        if fault and kind in ("reset_after", "stall_after"):
            self._vanish(request, fault)
        if kind in _SPOIL:
            answer = _SPOIL[kind](answer)
        self._keep(request, answer, fault)
        return answer

    def work(self, job: Job) -> Generator[None, None, None]:
        pieces = super().work(job)
        disturb = _WORK.get(self._job_faults.get(job.shown["id"], ""))
        yield from disturb(self, job, pieces) if disturb else pieces

    def _keep(self, request: Request, answer: Answer, fault: Fault | None) -> None:
        asked, response = None, None
        with contextlib.suppress(ApiError):
            asked = {
                key: {"filename": value.name, "bytes": len(value.data)}
                if isinstance(value, SentFile)
                else value
                for key, value in request.body.items()
            }
        if answer.content_type == "application/json":
            with contextlib.suppress(ValueError):
                response = json.loads(answer.body)
        self.exchanges.append(
            Exchange(
                *(request.method, request.path, request.query, asked if request.content else None),
                *(answer.status, response, answer.content_type),
                fault.kind if fault else None,
            )
        )

    def _vanish(self, request: Request, fault: Fault) -> NoReturn:
        """Leave the client waiting, or hang up with an RST, as the fault says."""
        self._keep(request, Answer(0, b"", ""), fault)
        if fault.kind.startswith("stall"):
            self.closing.wait(60.0 if fault.seconds is None else fault.seconds)
            raise TimeoutError
        # Closing the descriptor itself, for `socket.close` would wait for the handler's files, and
        # the server's own `shutdown` would send a FIN first.
        no_linger = struct.pack("ii", 1, 0)
        request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_linger)
        socket.close(request.connection.detach())
        raise ConnectionResetError


def _refusal(fault: Fault) -> ApiError:
    status, message, code, error_type = _REFUSALS[fault.kind]
    seconds = 0 if fault.kind == "429" and fault.seconds is None else fault.seconds
    headers = {}
    if seconds is not None:
        headers = {"Retry-After": f"{seconds:g}", "retry-after-ms": f"{seconds * 1000:g}"}
    return ApiError(status, message, None, code, error_type, headers)


# --- What becomes of an answer --------------------------------------------------------------------


def _another_choice(change: Callable[[str], dict[str, Any]]) -> Callable[[Answer], Answer]:
    """Puts what ``change`` makes of the text into the choice and its message."""

    def spoil(answer: Answer) -> Answer:
        if answer.status != 200:
            return answer
        completion = json.loads(answer.body)
        (choice,), usage = completion["choices"], completion["usage"]
        changed = change(choice["message"]["content"])
        choice |= {key: changed.pop(key) for key in ("finish_reason",) if key in changed}
        choice["message"] |= changed
        usage["completion_tokens"] = len(choice["message"]["content"] or "")
        usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
        return answer._replace(body=json.dumps(completion).encode())

    return spoil


_SPOIL: Final[dict[str, Callable[[Answer], Answer]]] = {
    "500_after": lambda _: _refusal(Fault("500")).answer,
    "truncated": lambda answer: answer._replace(body=answer.body[: len(answer.body) // 2]),
    "malformed": lambda answer: answer._replace(
        body=b"<html><body>Bad gateway</body></html>", content_type="application/json"
    ),
    "base64_result": lambda answer: answer._replace(body=base64.b64encode(answer.body)),
    "empty_answer": _another_choice(lambda _: {"content": ""}),
    "refusal": _another_choice(
        lambda _: {"content": None, "refusal": "I'm sorry, I can't help with that."}
    ),
    "length": _another_choice(
        lambda text: {"content": text[: len(text) // 2], "finish_reason": "length"}
    ),
}


# --- What becomes of a job ------------------------------------------------------------------------


def _flagged(endpoint: Rehearsal, job: Job, pieces: Iterator[None]) -> Iterator[None]:
    # What the service says is known from reports only: the code is a guess.
    message = (
        "The job failed because too many examples of the training file were flagged by "
        "moderation (a rehearsed fault)."
    )
    endpoint.fail(job, "unsafe_file", message, "training_file")
    yield


def _fails(endpoint: Rehearsal, job: Job, pieces: Iterator[None]) -> Iterator[None]:
    """In the middle of its steps."""
    for _ in pieces:
        done = [event["data"] for event in job.events if event["type"] == "metrics"]
        if done and 2 * done[-1]["step"] >= done[-1]["total_steps"]:
            endpoint.fail(job, "server_error", "The job failed due to an internal error.")
        yield


def _pauses(endpoint: Rehearsal, job: Job, pieces: Iterator[None]) -> Iterator[None]:
    """Once it runs, until `release`."""
    for _ in pieces:
        if job.status == "running":
            break
        yield
    endpoint.hold("paused")
    endpoint.move(job, "paused")
    yield
    endpoint.move(job, "running")
    yield from pieces


_WORK: Final[dict[str, Callable[[Rehearsal, Job, Iterator[None]], Iterator[None]]]] = {
    "flagged": _flagged,
    "job_failed": _fails,
    "paused_job": _pauses,
}
