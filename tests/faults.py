"""What the tests of losses share: a time of their own, and what was asked and made."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from endpoint import Exchange, Rehearsal

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
