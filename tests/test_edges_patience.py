"""How long anything waits: not for what can't mend itself, and for the rest as long as agreed.

Time is the clock's, and passes only while something sleeps: that this ends within seconds, or
waits for an hour, is seen at once.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import openai
import pytest
from edges import Forward, Gateway, Reply, Request, Serve, refusal
from endpoint import Fault, Rehearsal
from faults import CHAT, JOB, JOBS, Clock, made, until
from helpers import PROJECT, examples, posts, recorded_run, records, training_file, write_jsonl

import openai_sft_example
from openai_sft import (
    BrokenAnswer,
    ConfigurationError,
    OpenAISFT,
    OpenAISFTError,
    explain_api_error,
)

MakeSFT = Callable[..., OpenAISFT]

BASE = "gpt-4o-mini-2024-07-18"
SHORT: dict[str, Any] = {"epochs": 1, "batch_size": 4, "max_test_cases": 1}
KEY = "sk-recognisable-0123456789-wxyz"
SECONDS = 10.0  # what "within seconds" means here
# No resolver asks anybody about a name of more than 253 characters.
NO_HOST = ".".join(["host" * 12] * 6)


class Patience(Clock):
    """A clock that ends a test which waits for longer than its limit."""

    limit = 24 * 3600.0

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds)
        assert self.waited <= self.limit, "it waits on"

    @property
    def waited(self) -> float:
        return self.now - self.began


class Door:
    """A port that leads to ``endpoint``, and refuses while it is shut."""

    def __init__(self, endpoint: Rehearsal) -> None:
        self._behind = urlsplit(endpoint.url).port
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        self._port = 0
        self.open()
        self.url = f"http://127.0.0.1:{self._port}/v1"

    def open(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self._port))
        self._port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, args=(self._listener,), daemon=True).start()

    @property
    def is_open(self) -> bool:
        return self._listener.fileno() >= 0

    def shut(self) -> None:
        with self._lock:
            for one in (self._listener, *self._open):
                with contextlib.suppress(OSError):  # it has hung up by itself
                    one.shutdown(socket.SHUT_RDWR)
                one.close()
            self._open.clear()

    def _serve(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # shut
            while True:
                near = listener.accept()[0]
                far = socket.create_connection(("127.0.0.1", self._behind))
                with self._lock:
                    if listener.fileno() < 0:  # shut meanwhile
                        near.close()
                        far.close()
                        return
                    self._open += [near, far]
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=(one, other), daemon=True).start()

    def _pass(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):  # either has hung up
            while data := one.recv(65536):
                other.sendall(data)
            other.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shut()


@pytest.fixture
def clock(endpoint: Rehearsal) -> Patience:
    return Patience(endpoint)


@pytest.fixture
def timed(make_sft: MakeSFT, clock: Patience) -> MakeSFT:
    """Makes instances with a client of their own, whose time passes only while they sleep."""
    return lambda **options: make_sft(
        **({"client": None, "api_key": KEY, "clock": clock, "sleep": clock.sleep} | options)
    )


@pytest.fixture
def nowhere() -> Iterator[str]:
    """The URL of a port that refuses."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and not listening
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/v1"


def told(error: Exception) -> str:
    """What the user reads of an error, on the command line too."""
    return str(error) if isinstance(error, OpenAISFTError) else explain_api_error(error)


def any_of(text: str, *words: str) -> bool:
    return any(word in text for word in words)


# ── What can't mend itself, at first contact ─────────────────────────────────────────────────


def pipeline(sft: OpenAISFT) -> None:
    sft.run_full_pipeline(**SHORT)


def evaluate(sft: OpenAISFT) -> None:
    sft.evaluate_model_comprehensive(BASE, examples(6), [])


def watch(sft: OpenAISFT) -> None:
    sft.attach("ftjob-0123456789abcdef01234567", timeout=3600)


ACTS = {"a run": pipeline, "an evaluation": evaluate, "a watch": watch}


def ends_within_seconds(sft: OpenAISFT, act: Callable[[OpenAISFT], None], clock: Patience) -> str:
    """Let it fail; return what the user is told."""
    clock.limit = SECONDS
    with pytest.raises((openai.OpenAIError, OpenAISFTError)) as caught:
        act(sft)
    return told(caught.value)


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
def test_a_port_that_refuses_ends_it_within_seconds_with_cause_and_remedy(
    timed: MakeSFT, clock: Patience, nowhere: str, act: Callable[[OpenAISFT], None]
) -> None:
    said = ends_within_seconds(timed(base_url=nowhere), act, clock)

    assert any_of(said, "拒否", "refused")
    assert any_of(said, "--base-url", "OPENAI_BASE_URL")


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
def test_a_host_that_has_no_address_ends_it_within_seconds_with_cause_and_remedy(
    timed: MakeSFT, clock: Patience, act: Callable[[OpenAISFT], None]
) -> None:
    said = ends_within_seconds(timed(base_url=f"http://{NO_HOST}/v1"), act, clock)

    assert NO_HOST[:48] in said
    assert any_of(said, "--base-url", "OPENAI_BASE_URL")


@pytest.fixture
def self_signed(tmp_path: Path) -> Iterator[str]:
    """The URL of a server whose certificate nobody else has signed."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the certificate, isn't here")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=shake_hands, args=(listener, context), daemon=True).start()
        yield f"https://127.0.0.1:{listener.getsockname()[1]}/v1"
        listener.shutdown(socket.SHUT_RDWR)


def shake_hands(listener: socket.socket, context: ssl.SSLContext) -> None:
    with contextlib.suppress(OSError):  # shut
        while True:
            with listener.accept()[0] as connection, contextlib.suppress(OSError):  # hung up
                context.wrap_socket(connection, server_side=True).close()


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
def test_a_certificate_nobody_knows_ends_it_within_seconds_with_cause_and_remedy(
    timed: MakeSFT, clock: Patience, self_signed: str, act: Callable[[OpenAISFT], None]
) -> None:
    said = ends_within_seconds(timed(base_url=self_signed), act, clock)

    assert any_of(said, "証明書", "certificate")
    assert any_of(said, "SSL_CERT_FILE", "--base-url")


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
def test_a_key_with_a_blank_at_its_end_ends_it_within_seconds_and_is_not_shown(
    timed: MakeSFT, clock: Patience, endpoint: Rehearsal, act: Callable[[OpenAISFT], None]
) -> None:
    clock.limit = SECONDS
    with pytest.raises((openai.OpenAIError, OpenAISFTError)) as caught:
        act(timed(api_key=f"{KEY} ", base_url=endpoint.url))
    said = told(caught.value)

    assert any_of(said, "APIキー", "API key", "OPENAI_API_KEY")
    assert KEY not in said
    assert endpoint.exchanges == []


@pytest.mark.parametrize("variable", ["OPENAI_ORG_ID", "OPENAI_PROJECT_ID"])
@pytest.mark.parametrize("value", ["id-1 ", "id\n1", "組織"], ids=["blank", "line", "wide"])
def test_an_organisation_that_no_header_can_carry_is_refused_and_its_variable_named(
    timed: MakeSFT, endpoint: Rehearsal, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError, match=variable):
        timed(base_url=endpoint.url)


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
def test_a_given_client_whose_key_no_header_can_carry_ends_it_within_seconds(
    timed: MakeSFT, clock: Patience, endpoint: Rehearsal, act: Callable[[OpenAISFT], None]
) -> None:
    with openai.OpenAI(api_key=f"{KEY} ", base_url=endpoint.url) as client:
        said = ends_within_seconds(timed(client=client), act, clock)

    assert "ヘッダー" in said
    assert "APIキー" in said
    assert KEY not in said


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
def test_a_proxy_whose_package_is_missing_ends_it_at_once_with_cause_and_remedy(
    timed: MakeSFT,
    clock: Patience,
    endpoint: Rehearsal,
    monkeypatch: pytest.MonkeyPatch,
    act: Callable[[OpenAISFT], None],
) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "socksio", None)
    said = ends_within_seconds(timed(base_url=endpoint.url), act, clock)

    assert "ALL_PROXY" in said
    assert any_of(said, "socksio", "httpx[socks]")


# ── What is waited out in the middle ─────────────────────────────────────────────────────────


def test_a_port_that_refuses_for_an_hour_in_mid_watch_is_waited_out(
    timed: MakeSFT, clock: Patience, endpoint: Rehearsal, clean_environment: Path
) -> None:
    endpoint.hold("running")
    with Door(endpoint) as door:

        def sleep(seconds: float) -> None:
            if clock.waited == 0:
                door.shut()
            elif clock.waited > 3600 and not door.is_open:
                door.open()
                endpoint.release()
            clock.sleep(seconds)

        job = timed(base_url=door.url, sleep=sleep).monitor_fine_tune_job(
            start(timed(base_url=door.url), clean_environment)
        )

    assert job.status == "succeeded"
    assert 3600 < clock.waited < 3 * 3600


def test_a_host_that_has_no_address_for_an_hour_in_mid_watch_is_waited_out(
    timed: MakeSFT,
    clock: Patience,
    endpoint: Rehearsal,
    clean_environment: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a laptop that wakes up before its network does."""
    resolve = socket.getaddrinfo

    def look_up(host: Any, *rest: Any, **options: Any) -> Any:
        if 0 < clock.waited <= 3600:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        if clock.waited:
            endpoint.release()
        return resolve(host, *rest, **options)

    def close_after(request: Request, forward: Forward) -> Reply:
        return (reply := forward(request))._replace(pieces=iter([reply.body]))

    endpoint.hold("running")
    with Gateway(endpoint, close_after) as gateway:  # each request needs the address again
        sft = timed(base_url=gateway.url)
        job_id = start(sft, clean_environment)
        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        job = sft.monitor_fine_tune_job(job_id)

    assert job.status == "succeeded"
    assert 3600 < clock.waited < 3 * 3600


@pytest.mark.parametrize(("concurrency", "cases"), [(1, 40), (4, 300)])
def test_an_endpoint_that_dies_under_an_evaluation_is_waited_for_once_and_not_for_each_case(
    timed: MakeSFT, clock: Patience, endpoint: Rehearsal, concurrency: int, cases: int
) -> None:
    clock.limit = 1200
    with Door(endpoint) as door:

        def shut_after_an_answer() -> None:
            until(lambda: any(p.stat().st_size for p in sft.output_dir.glob("evaluation_*.jsonl")))
            door.shut()

        sft = timed(base_url=door.url)
        threading.Thread(target=shut_after_an_answer, daemon=True).start()
        with pytest.raises(openai.APIConnectionError):
            sft.evaluate_model_comprehensive(BASE, examples(cases), [], 0, concurrency=concurrency)
        waited, told = clock.waited, sft.describe_remote_state()
        sft.close()
        door.open()
        results = timed(base_url=door.url).resume()

    assert 40 < waited <= 120
    assert "--resume" in told
    assert results is not None
    assert results["test_evaluation"]["evaluated_cases"] == cases
    assert len([e for e in posts(endpoint, CHAT) if e.status == 200]) <= cases + concurrency


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize("fault", ["500", "malformed", "503", "reset_before"])
def test_an_endpoint_that_answers_no_question_ends_the_evaluation_within_two_minutes(
    timed: MakeSFT, clock: Patience, endpoint: Rehearsal, fault: str, concurrency: int
) -> None:
    endpoint.inject(Fault(fault, "POST", CHAT, skip=2, times=None))
    sft = timed(base_url=endpoint.url)
    with pytest.raises((openai.OpenAIError, OpenAISFTError)):
        sft.evaluate_model_comprehensive(BASE, examples(99), [], 0, concurrency=concurrency)

    assert clock.waited <= 120
    assert "--resume" in sft.describe_remote_state()


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_question_that_is_never_answered_fails_alone_while_others_are_answered(
    timed: MakeSFT, endpoint: Rehearsal, concurrency: int
) -> None:
    def reply(request: Request, forward: Forward) -> Reply:
        poisoned = request.line == ("POST", CHAT) and "相談3".encode() in request.body
        return refusal(500) if poisoned else forward(request)

    with Gateway(endpoint, reply) as gateway:
        results = timed(base_url=gateway.url).evaluate_model_comprehensive(
            BASE, examples(8), [], 0, concurrency=concurrency
        )

    assert results["summary"]["total_cases_evaluated"] == 7
    (failed,) = (r for r in results["test_evaluation"]["responses"] if "error" in r)
    assert failed["case_id"].startswith("d3:")


def test_an_endpoint_that_falls_silent_ends_the_evaluation_and_one_that_is_slow_does_not(
    timed: MakeSFT, clock: Patience, endpoint: Rehearsal
) -> None:
    """Nothing is refused and nothing comes; whether anybody is there tells them apart."""
    looks: list[str] = []
    ended = threading.Event()

    def reply(request: Request, forward: Forward) -> Reply:
        if request.line == ("POST", CHAT):
            while not ended.wait(0.01):
                clock.now += 2
        elif request.path.startswith("/models"):
            looks.append(request.path)
            return refusal(401 if len(looks) < 3 else 503)
        return forward(request)

    with Gateway(endpoint, reply) as gateway:
        sft = timed(base_url=gateway.url)
        with pytest.raises(BrokenAnswer, match="応答しません"):
            sft.evaluate_model_comprehensive(BASE, examples(4), [], 0, concurrency=2)
        ended.set()

    assert len(looks) == 3
    assert "--resume" in sft.describe_remote_state()


# ── Asked once before anything is read or sent ───────────────────────────────────────────────


@pytest.mark.parametrize("fault", ["401", "403", None], ids=["401", "403", "refused"])
def test_a_run_asks_the_endpoint_before_it_reads_or_writes_anything(
    timed: MakeSFT, endpoint: Rehearsal, nowhere: str, fault: str | None
) -> None:
    """The data set isn't there, which is not what the user is told first."""
    if fault:
        endpoint.inject(Fault(fault, times=None))
    sft = timed(base_url=endpoint.url if fault else nowhere, dataset="nothing.json")
    with pytest.raises((openai.OpenAIError, OpenAISFTError)) as caught:
        sft.run_full_pipeline(**SHORT)

    assert "nothing.json" not in told(caught.value)
    assert len(endpoint.exchanges) == bool(fault)
    assert not sft.output_dir.exists() or list(sft.output_dir.iterdir()) == []


# ── The list, and the check ──────────────────────────────────────────────────────────────────


@pytest.fixture
def recorded(clean_environment: Path) -> str:
    """A run that is recorded here, with a job."""
    facts = {"kind": "job", "job_id": "ftjob-here"}
    return recorded_run(clean_environment / "out", "20260101_000000", **facts).stem


@pytest.mark.parametrize("fault", ["refused", "503", "reset_before", "malformed", "429"])
def test_the_local_runs_are_listed_within_seconds_whatever_the_endpoint_does(
    timed: MakeSFT,
    clock: Patience,
    endpoint: Rehearsal,
    nowhere: str,
    recorded: str,
    fault: str,
) -> None:
    clock.limit = 15
    if fault != "refused":
        endpoint.inject(Fault(fault, times=None))
    (row,) = timed(base_url=nowhere if fault == "refused" else endpoint.url).list_runs()

    assert (row.run_id, row.job_id) == (recorded, "ftjob-here")


def test_the_command_line_shows_the_local_table_before_the_endpoint_has_answered(
    recorded: str,
) -> None:
    """It is killed as soon as it has asked; nothing was ever answered."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        command = [sys.executable, str(PROJECT / "openai_sft_example.py"), "--list"]
        with subprocess.Popen(
            [*command, "--base-url", address, "--output-dir", "out"],
            env=os.environ | {"OPENAI_API_KEY": "k", "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
        ) as process:
            silent.settimeout(20)
            try:
                with silent.accept()[0] as connection:
                    connection.recv(65536)
            finally:
                process.kill()
            shown = process.communicate()[0]

    assert recorded in shown


@pytest.fixture
def limits(endpoint: Rehearsal) -> Iterator[tuple[str, dict[str, float]]]:
    """An endpoint, and how many seconds each kind of request was given, as the SDK tells it."""
    given: dict[str, float] = {}

    def note(request: Request, forward: Forward) -> Reply:
        seconds = request.headers.get("x-stainless-read-timeout")
        if seconds is not None:
            given[f"{request.method} {request.path}"] = float(seconds)
        return forward(request)

    with Gateway(endpoint, note) as gateway:
        yield gateway.url, given


def test_a_look_is_given_seconds(timed: MakeSFT, limits: tuple[str, dict[str, float]]) -> None:
    url, given = limits
    sft = timed(base_url=url)
    sft.check()
    sft.list_runs()

    assert len(given) >= 2
    assert max(given.values()) <= 15


def test_an_answer_is_given_minutes_for_to_ask_anew_is_to_pay_anew(
    timed: MakeSFT, limits: tuple[str, dict[str, float]]
) -> None:
    url, given = limits
    timed(base_url=url).evaluate_model_comprehensive(BASE, examples(1), [])

    assert given[f"POST {CHAT}"] >= 300


def lines(sft: OpenAISFT) -> list[tuple[str, str]]:
    """What ``check`` tells: the level of each line and its whole text."""
    return [(item.level, str(item)) for item in sft.check()]


def test_a_data_set_that_is_not_there_fails_the_check(timed: MakeSFT, endpoint: Rehearsal) -> None:
    found = lines(timed(base_url=endpoint.url, dataset="nothing.jsonl"))

    assert [level for level, text in found if "nothing.jsonl" in text] == ["fail"]


def test_a_data_set_that_is_there_is_ticked(
    timed: MakeSFT, endpoint: Rehearsal, dataset: Path
) -> None:
    found = lines(timed(base_url=endpoint.url))

    assert [level for level, text in found if str(dataset) in text] == ["ok"]


def test_a_missing_extra_is_a_warning_that_says_how_to_get_it(
    timed: MakeSFT, endpoint: Rehearsal, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = lines(timed(base_url=endpoint.url))
    for name in [name for name in sys.modules if name.partition(".")[0] == "sacrebleu"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    after = lines(timed(base_url=endpoint.url))

    assert not any("openai-sft[eval]" in text for _, text in before)
    assert [level for level, text in after if "openai-sft[eval]" in text] == ["warn"]


@pytest.mark.parametrize("key", ["k", "abcdefg"])
def test_a_key_too_short_to_be_one_is_not_ticked(
    timed: MakeSFT, endpoint: Rehearsal, key: str
) -> None:
    items = timed(api_key=key, base_url=endpoint.url).check()
    (item,) = (item for item in items if item.name == "APIキー")

    assert item.level != "ok"
    assert item.remedy


# ── A 200 that isn't the API's JSON ──────────────────────────────────────────────────────────

#: What no fault of the endpoint says: "malformed" and "truncated" are JSON that can't be read.
BODIES = {
    "a page": (b"<html>Log in</html>", "text/html"),
    "null": (b"null", "application/json"),
    "a list": (b"[]", "application/json"),
}
PLACES = {
    "the job": ("GET", JOB),
    "its events": ("GET", f"{JOB}/events"),
    "its checkpoints": ("GET", f"{JOB}/checkpoints"),
    "the model": ("GET", "/models/*"),
    "the list of files": ("GET", "/files"),
    "the list of jobs": ("GET", JOBS),
}
bodies = pytest.mark.parametrize("body", BODIES)


@bodies
@pytest.mark.parametrize("place", PLACES)
def test_a_200_that_is_not_the_apis_json_is_got_past_wherever_it_comes(
    timed: MakeSFT, endpoint: Rehearsal, clean_environment: Path, place: str, body: str
) -> None:
    method, pattern = PLACES[place]
    left = [Reply(200, *BODIES[body])]

    def bend(request: Request, forward: Forward) -> Reply:
        here = request.method == method and fnmatchcase(request.path, pattern)
        reply = forward(request)
        return left.pop() if here and left else reply

    if place == "the list of files":
        endpoint.inject(Fault("reset_after", "POST", "/files"))
    if place == "the list of jobs":
        endpoint.inject(Fault("reset_after", "POST", JOBS))
    with Gateway(endpoint, bend) as gateway:
        sft = timed(base_url=gateway.url)
        job = sft.monitor_fine_tune_job(start(sft, clean_environment), timeout=3600)

    assert left == []
    assert job.status == "succeeded"
    assert made(endpoint, JOBS) == made(endpoint, "/files") == 1


@bodies
def test_a_second_page_of_events_that_is_not_the_apis_json_is_got_past(
    timed: MakeSFT, endpoint: Rehearsal, clean_environment: Path, body: str
) -> None:
    left = [Reply(200, *BODIES[body])]

    def bend(request: Request, forward: Forward) -> Reply:
        second = request.path.endswith("/events") and "after=" in request.query
        return left.pop() if second and left else forward(request)

    with Gateway(endpoint, bend) as gateway:
        sft = timed(base_url=gateway.url)
        file_id = sft.upload_training_file(training_file(clean_environment))
        job_id = sft.create_fine_tune_job(file_id, 10, 1)
        until(lambda: sft.client.fine_tuning.jobs.retrieve(job_id).status == "succeeded")
        job = sft.monitor_fine_tune_job(job_id, timeout=3600)

    assert left == []
    assert job.status == "succeeded"


@bodies
def test_an_endpoint_that_never_speaks_the_api_is_a_broken_answer_and_the_list_is_the_local_one(
    timed: MakeSFT, recorded: str, body: str
) -> None:
    with Gateway(None, lambda *_: Reply(200, *BODIES[body])) as gateway:
        sft = timed(base_url=gateway.url)
        (row,) = sft.list_runs()
        with pytest.raises(BrokenAnswer):
            sft.cancel_job("ftjob-here")

    assert row.job_id == "ftjob-here"


# ── Refusals that mean to wait ───────────────────────────────────────────────────────────────


def start(sft: OpenAISFT, folder: Path) -> str:
    return sft.create_fine_tune_job(sft.upload_training_file(training_file(folder)), 1, 4)


def refusing(
    times: int, status: int, message: str, *, code: str | None = None, **headers: str
) -> Serve:
    """Refuses so often to make a job."""
    left = [times]
    named = {name.replace("_", "-"): value for name, value in headers.items()}

    def serve(request: Request, forward: Forward) -> Reply:
        if request.line != ("POST", JOBS) or not left[0]:
            return forward(request)
        left[0] -= 1
        return refusal(status, message, code)._replace(headers=named)

    return serve


PROCESSED = (
    "File 'file-abc' is still being processed and is not ready to be used for fine-tuning. "
    "Please try again later."
)


@pytest.mark.parametrize("message", [PROCESSED, "The specified file is still being processed."])
def test_a_file_that_is_still_being_processed_is_waited_for(
    timed: MakeSFT, clock: Patience, endpoint: Rehearsal, clean_environment: Path, message: str
) -> None:
    with Gateway(endpoint, refusing(3, 400, message)) as gateway:
        job_id = start(timed(base_url=gateway.url), clean_environment)

    assert job_id.startswith("ftjob-")
    assert made(endpoint, JOBS) == 1
    assert clock.waited > 1


def test_a_file_that_is_never_processed_is_not_waited_for_for_ever(
    timed: MakeSFT, clock: Patience, endpoint: Rehearsal, clean_environment: Path
) -> None:
    with (
        Gateway(endpoint, refusing(10**9, 400, PROCESSED)) as gateway,
        pytest.raises((openai.BadRequestError, OpenAISFTError)),
    ):
        start(timed(base_url=gateway.url), clean_environment)

    assert clock.waited <= 2 * 3600
    assert made(endpoint, JOBS) == 0


def test_a_job_that_has_to_wait_for_the_rate_says_so(
    timed: MakeSFT,
    clock: Patience,
    endpoint: Rehearsal,
    clean_environment: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "openai_sft")
    endpoint.inject(Fault("429", "POST", JOBS, times=3, seconds=45))
    start(timed(base_url=endpoint.url), clean_environment)
    said = [line for record in caplog.records if "待" in (line := record.getMessage())]

    assert clock.waited >= 135
    assert said
    assert any_of(said[0], "上限", "429")


def test_a_retry_after_that_is_a_date_is_waited_for(
    timed: MakeSFT, clock: Patience, endpoint: Rehearsal, clean_environment: Path
) -> None:
    date = formatdate(clock() + 120, usegmt=True)
    with Gateway(endpoint, refusing(1, 429, "slow down", Retry_After=date)) as gateway:
        start(timed(base_url=gateway.url), clean_environment)

    assert 110 <= clock.waited <= 130


@pytest.mark.parametrize("said", ["an hour ago", "soon", "", "-5", "nan", "1e400", "\uff15"])
def test_a_retry_after_that_makes_no_sense_is_no_obstacle(
    timed: MakeSFT, clock: Patience, endpoint: Rehearsal, clean_environment: Path, said: str
) -> None:
    if said == "an hour ago":
        said = formatdate(clock() - 3600, usegmt=True)
    latin = said.encode().decode("latin-1")  # as a header's bytes are read
    with Gateway(endpoint, refusing(1, 429, "slow down", Retry_After=latin)) as gateway:
        start(timed(base_url=gateway.url), clean_environment)

    assert made(endpoint, JOBS) == 1
    assert clock.waited <= 600


def test_an_organisation_that_does_not_fit_the_key_is_named_with_its_variable(
    timed: MakeSFT, clock: Patience, endpoint: Rehearsal, clean_environment: Path
) -> None:
    message = "OpenAI-Organization header should match organization for API key"
    refuse = refusing(1, 401, message, code="mismatched_organization")
    with (
        Gateway(endpoint, refuse) as gateway,
        pytest.raises((openai.AuthenticationError, OpenAISFTError)) as caught,
    ):
        start(timed(base_url=gateway.url), clean_environment)

    assert "OPENAI_ORG_ID" in told(caught.value)
    assert clock.waited <= SECONDS


# ── The Hub and the vocabulary ───────────────────────────────────────────────────────────────


class Said:
    """What a process says on stderr, as it comes."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.lines: list[str] = []
        self._stream = process.stderr
        self._began = 0.0
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        for line in self._stream or ():
            self._began = self._began or time.monotonic()
            self.lines.append(line)

    def soon(self, *words: str) -> bool:
        """Whether it says one of the words, in Japanese, within 5 s of its first line."""
        until(lambda: self.lines)
        with contextlib.suppress(AssertionError):
            left = self._began + 5 - time.monotonic()
            until(lambda: any(any_of(line, *words) for line in self.lines[1:]), timeout=left)
        return any(any_of(line, *words) and "ません" in line for line in self.lines[1:])

    def close(self) -> None:
        self._thread.join(5)


@pytest.fixture(scope="module")
def unreachable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Said]]:
    """Two runs of the data stage: the one has no Hub, the other no vocabulary."""
    folder = tmp_path_factory.mktemp("unreachable")
    data = write_jsonl(folder / "a.jsonl", records(20))
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OPENAI_", "HF_")) and "proxy" not in name.lower()
    }
    with (
        socket.socket() as refusing,
        socket.create_server(("127.0.0.1", 0)) as silent,
        contextlib.ExitStack() as stack,
    ):
        refusing.bind(("127.0.0.1", 0))
        environments = {
            "the Hub": {
                "HF_ENDPOINT": f"http://127.0.0.1:{refusing.getsockname()[1]}",
                "HF_HOME": str(folder / "hub"),
            },
            "the vocabulary": {
                "OPENAI_SFT_DATASET": str(data),
                "HTTPS_PROXY": f"http://127.0.0.1:{silent.getsockname()[1]}",
                "TIKTOKEN_CACHE_DIR": str(folder / "nothing"),
            },
        }
        started = {}
        for name, environment in environments.items():
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, str(PROJECT / "openai_sft_example.py"), "--data-only"],
                    env=kept | environment | {"PYTHONIOENCODING": "utf-8"},
                    cwd=folder,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    encoding="utf-8",
                )
            )
            started[name] = Said(process)
            stack.callback(started[name].close)
            stack.callback(process.kill)
        yield started


@pytest.mark.parametrize(
    ("missing", "words"), [("the Hub", ("Hub", "Hugging Face")), ("the vocabulary", ("語彙",))]
)
def test_a_line_says_within_five_seconds_what_can_not_be_reached(
    unreachable: dict[str, Said], missing: str, words: tuple[str, ...]
) -> None:
    assert unreachable[missing].soon(*words), unreachable[missing].lines


@pytest.mark.parametrize(
    ("hub", "reason"), [("refusing", "Connect"), ("silent", "TimeoutError: 5秒")]
)
def test_the_check_looks_at_the_hub_too_and_says_why_it_knows_nothing(
    endpoint: Rehearsal, clean_environment: Path, vocabulary: Path, hub: str, reason: str
) -> None:
    """In a process of its own, for where the Hub is was settled when it was imported."""
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        if hub == "silent":
            port.listen()
        environment = {
            "OPENAI_API_KEY": KEY,
            "HF_ENDPOINT": f"http://127.0.0.1:{port.getsockname()[1]}",
            "HF_HOME": str(clean_environment / "hub"),
        }
        command = [sys.executable, str(PROJECT / "openai_sft_example.py"), "--check", "--json"]
        done = subprocess.run(
            [*command, "--base-url", endpoint.url],
            env=os.environ | environment,
            capture_output=True,
            encoding="utf-8",
            timeout=20,
        )
    found = [item for item in json.loads(done.stdout) if "KokoroChat" in item["text"]]

    assert [item["level"] for item in found] == ["warn"]
    assert reason in found[0]["text"]
    assert found[0]["remedy"]


# ── What is set up wrongly ───────────────────────────────────────────────────────────────────

DOTENVS = {
    "UTF-16": "OPENAI_API_KEY=k\n".encode("utf-16"),
    "UTF-16 without a mark": "OPENAI_API_KEY=k\n".encode("utf-16-le"),
    "CP932": "# 相談用の鍵\nOPENAI_API_KEY=k\n".encode("cp932"),
}


@pytest.mark.parametrize("content", DOTENVS.values(), ids=DOTENVS)
def test_a_dotenv_that_is_not_utf_8_is_read(clean_environment: Path, content: bytes) -> None:
    Path(".env").write_bytes(content)
    sft = OpenAISFT(verbose=False)

    assert (sft.settings.api_key, sft.settings.api_key_source) == ("k", ".env")


def test_a_dotenv_that_is_no_text_is_one_line_that_names_it(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(".env").write_bytes(b"OPENAI_API_KEY=\xff\xfe\xff\n")
    with pytest.raises(ConfigurationError, match=r"\.env.*UTF-8"):
        OpenAISFT(offline=True)
    code = openai_sft_example.main(["--data-only", "--dataset", str(dataset)])
    said = capsys.readouterr().err

    assert code == 2
    assert said.startswith("エラー: ")
    assert said.count("\n") == 1
    assert ".env" in said
    assert "UTF-8" in said


def test_a_proxy_whose_package_is_missing_is_what_the_check_blames(
    timed: MakeSFT, endpoint: Rehearsal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "socksio", None)
    items = timed(base_url=endpoint.url).check()
    (item,) = (item for item in items if item.name == "エンドポイント")

    assert item.level == "fail"
    assert "ALL_PROXY" in item.remedy
    assert "--base-url" not in item.remedy


def test_a_proxy_whose_package_is_missing_is_one_line(
    endpoint: Rehearsal,
    dataset: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setitem(sys.modules, "socksio", None)
    arguments = ["--dataset", str(dataset), "--base-url", endpoint.url, "--yes", "--quiet"]
    code = openai_sft_example.main(arguments)
    said = capsys.readouterr().err

    assert code in (1, 2)
    assert said.startswith("エラー: ")
    assert said.count("\n") == 1
    assert "ALL_PROXY" in said
