"""One job at the edges: whatever a network, a service or a user does, one is paid for."""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import importlib.util
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import openai
import pytest
from edges import Forgetful, Forward, Gateway, Late, Reply, Request, page, refusal, saying
from endpoint import Fault, Rehearsal
from faults import CHAT, JOBS, Clock, asked, made
from helpers import (
    PROJECT,
    Ended,
    example,
    examples,
    job,
    posts,
    read_json,
    record,
    records,
    training_file,
    write_jsonl,
)

from openai_sft import (
    BudgetError,
    ConfigurationError,
    CostEstimate,
    DataError,
    Declined,
    JobFailed,
    OpenAISFT,
    OpenAISFTError,
    TokenCounter,
    WaitTimeout,
    check_file,
    explain_api_error,
    fix_file,
    load_vocabulary,
    read_dialogues,
    read_examples,
    split_long_example,
)

MakeSFT = Callable[..., OpenAISFT]
Log = Callable[[], list[str]]
Serve = Callable[[Request, Forward], Reply]

BASE = "gpt-4o-mini-2024-07-18"
JOB = rf"{JOBS}/ftjob-[^/]+"  # one job, and not its events or checkpoints
SHORT: dict[str, Any] = {"epochs": 1, "batch_size": 4, "max_test_cases": 1}
KEY = "sk-recognisable-0123456789-wxyz"
HOSTILE = "\x1b[31m赤\x07\x9b2J\u202e"
FAILURES = (OpenAISFTError, openai.OpenAIError)
Cli = Callable[..., Ended]


@pytest.fixture
def clock(endpoint: Rehearsal) -> Clock:
    return Clock(endpoint, moment=0.002)


@pytest.fixture
def at(make_sft: MakeSFT, clock: Clock) -> MakeSFT:
    """Makes instances that make their own client for a URL; time passes while they sleep."""

    def make(url: str, **options: Any) -> OpenAISFT:
        usual = {"client": None, "base_url": url, "clock": clock, "sleep": clock.sleep}
        return make_sft(**(usual | options))

    return make


@pytest.fixture
def online(place: Callable[[str], tuple[str, ...]]) -> Callable[[str], tuple[str, ...]]:
    """Arguments and a key for a short run that is agreed to, against the endpoint at a URL."""
    return lambda url: (*place(url), "--yes")


def start(sft: OpenAISFT, file: Path) -> str:
    return sft.create_fine_tune_job(sft.upload_training_file(file), 1, 4)


def record_of(sft: OpenAISFT) -> Any:
    return read_json(sft.files["record"])


def status_at(endpoint: Rehearsal, sdk: openai.OpenAI, job_id: str) -> str:
    return sdk.with_options(base_url=endpoint.url).fine_tuning.jobs.retrieve(job_id).status


def interrupt_at(number: int) -> Callable[[float], None]:
    """A sleep in which Ctrl-C is pressed the so-manieth time."""
    count = itertools.count(1)

    def sleep(_: float) -> None:
        if next(count) >= number:
            raise KeyboardInterrupt

    return sleep


def inert(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


# ── A job whose answer is lost ───────────────────────────────────────────────────────────────


class Crowd:
    """Serves as the endpoint does, but loses the first creation of a job, and lists jobs of
    others, made so many seconds before now, in pages of 100 before those of the endpoint."""

    def __init__(self, clock: Callable[[], float], ages: Iterable[float], *, arrives: bool) -> None:
        self._clock, self._ages, self._arrives = clock, [*ages], arrives
        self._lost = False
        self.looks: list[str] = []

    def __call__(self, request: Request, forward: Forward) -> Reply:
        if request.line == ("POST", JOBS) and not self._lost:
            self._lost = True
            if self._arrives:
                forward(request)
            return page(504)
        if request.line != ("GET", JOBS):
            return forward(request)
        self.looks.append(request.query)
        after = re.search(r"after=ftjob-other-(\d+)", request.query)
        first = int(after[1]) + 1 if after else 0
        if first == len(self._ages):
            return forward(request._replace(query="limit=100"))
        listed = [
            {**job("running"), "id": f"ftjob-other-{n}", "created_at": int(self._clock() - age)}
            for n, age in enumerate(self._ages[first : first + 100], first)
        ]
        return saying({"object": "list", "data": listed, "has_more": True})


@pytest.mark.parametrize(
    "ages",
    [range(700), range(90_000, 89_300, -1), [7200.0 * (n % 2) for n in range(700)]],
    ids=["newer ones", "oldest first", "in no order"],
)
def test_a_job_whose_answer_is_lost_is_found_however_many_are_listed_before_it(
    at: MakeSFT, endpoint: Rehearsal, clock: Clock, file: Path, ages: Iterable[float]
) -> None:
    crowd = Crowd(clock, ages, arrives=True)
    with Gateway(endpoint, crowd) as gateway:
        job_id = start(at(gateway.url), file)

    assert made(endpoint, JOBS) == 1
    assert job_id == posts(endpoint, JOBS)[0].response["id"]


def test_a_search_is_over_where_the_list_comes_to_jobs_from_long_before(
    at: MakeSFT, endpoint: Rehearsal, clock: Clock, file: Path
) -> None:
    crowd = Crowd(clock, range(3500, 700_000, 100), arrives=False)
    with Gateway(endpoint, crowd) as gateway:
        start(at(gateway.url), file)

    assert made(endpoint, JOBS) == 1
    assert len(crowd.looks) > 10
    assert not any("after=" in query for query in crowd.looks)


@pytest.mark.parametrize("seconds", [7, 75, 110])
def test_a_job_that_turns_up_late_is_found_and_not_made_again(
    at: MakeSFT, endpoint: Rehearsal, clock: Clock, file: Path, log: Log, seconds: float
) -> None:
    late = Late(clock, seconds)
    with Gateway(endpoint, late) as gateway:
        job_id = start(at(gateway.url), file)

    assert made(endpoint, JOBS) == 1
    assert [job_id] == late.jobs
    assert any("確認" in line or "探し" in line for line in log())


def test_a_clock_that_is_wrong_by_days_hides_no_job(
    at: MakeSFT, endpoint: Rehearsal, clock: Clock, file: Path
) -> None:
    clock.now += 3 * 24 * 3600
    late = Late(clock, 7)
    with Gateway(endpoint, late) as gateway:
        job_id = start(at(gateway.url), file)

    assert [job_id] == late.jobs
    assert made(endpoint, JOBS) == 1


def test_a_creation_is_given_minutes(at: MakeSFT, endpoint: Rehearsal, file: Path) -> None:
    with Gateway(endpoint) as gateway:
        start(at(gateway.url), file)
        (creation,) = gateway.of("POST", JOBS)

    assert float(creation.headers.get("x-stainless-read-timeout", "inf")) >= 120


def test_a_termination_while_a_job_is_being_made_makes_no_second_one(
    at: MakeSFT,
    cli: Cli,
    online: Callable[[str], tuple[str, ...]],
    endpoint: Rehearsal,
    clock: Clock,
) -> None:
    late = Late(clock, 20)
    terminated = threading.Event()

    def serve(request: Request, forward: Forward) -> Reply:
        reply = late(request, forward)
        if request.line == ("POST", JOBS) and not terminated.is_set():
            terminated.set()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)  # still at it
        return reply

    with Gateway(endpoint, serve) as gateway:
        ended = cli(*online(gateway.url))
        (name,) = re.findall(r"--resume (run_\d+_\d+)", ended.err)
        results = at(gateway.url).resume(name)

    assert ended.code == 143
    assert results is not None
    assert made(endpoint, JOBS) == 1


def test_a_search_that_is_interrupted_goes_on_with_the_next_resume(
    at: MakeSFT, endpoint: Rehearsal, clock: Clock
) -> None:
    late = Late(clock)
    with Gateway(endpoint, late) as gateway:
        for number in (1, 2):
            with (
                at(gateway.url, sleep=interrupt_at(number)) as sft,
                pytest.raises(KeyboardInterrupt),
            ):
                sft.run_full_pipeline(**SHORT) if number == 1 else sft.resume()
        late.shown = True
        results = at(gateway.url).resume()

    assert results is not None
    assert made(endpoint, JOBS) == 1


def test_a_job_that_may_be_there_is_looked_for_again_although_another_was_declined(
    at: MakeSFT, endpoint: Rehearsal, clock: Clock
) -> None:
    late = Late(clock)
    with Gateway(endpoint, late) as gateway:
        with at(gateway.url, sleep=interrupt_at(1)) as sft, pytest.raises(KeyboardInterrupt):
            sft.run_full_pipeline(**SHORT)
        with at(gateway.url, confirm=lambda _: False) as later, pytest.raises(Declined):
            later.resume()
        late.shown = True
        results = at(gateway.url).resume()

    assert results is not None
    assert made(endpoint, JOBS) == 1


@pytest.mark.parametrize("look", ["resume", "list"])
def test_a_surplus_job_that_turns_up_later_is_cancelled_and_named(
    at: MakeSFT,
    endpoint: Rehearsal,
    clock: Clock,
    sdk: openai.OpenAI,
    file: Path,
    log: Log,
    look: str,
) -> None:
    endpoint.hold("validating_files")
    late = Late(clock)
    with Gateway(endpoint, late) as gateway:
        with at(gateway.url) as sft, pytest.raises(WaitTimeout) as caught:
            sft.run_full_pipeline(**SHORT, timeout=60)
        with at(gateway.url, output_dir="elsewhere") as stranger:
            other = start(stranger, file)
        late.shown = True
        before = len(log())
        with at(gateway.url) as later, contextlib.suppress(WaitTimeout):
            later.list_runs() if look == "list" else later.resume(timeout=60)
    (surplus,) = late.jobs

    assert status_at(endpoint, sdk, surplus) == "cancelled"
    assert any(surplus in line for line in log()[before:])
    assert status_at(endpoint, sdk, caught.value.job_id) == "validating_files"
    assert status_at(endpoint, sdk, other) == "validating_files"


@pytest.mark.parametrize("keeps", [True, False], ids=["metadata", "no metadata"])
def test_a_job_that_an_earlier_process_made_turns_up_by_the_token_that_all_requests_share(
    at: MakeSFT,
    endpoint: Rehearsal,
    clock: Clock,
    sdk: openai.OpenAI,
    log: Callable[[], list[str]],
    keeps: bool,
) -> None:
    """The first process is killed; hours later another sends again, and then both are shown.

    Without metadata nothing says for certain whose it is: it is named, and left alone.
    """
    endpoint.hold("validating_files")
    late, dates = Late(clock), dict[str, int]()

    def dated(one: dict[str, Any]) -> dict[str, Any]:
        kept = one["metadata"] if keeps else None
        made_at = dates.setdefault(one["id"], int(clock()))
        return {**one, "created_at": made_at, "metadata": kept}

    def serve(request: Request, forward: Forward) -> Reply:
        def told(request: Request) -> Reply:
            reply = forward(request)
            if request.path != JOBS or reply.status != 200:
                return reply
            said = reply.json
            if request.method == "GET":
                return saying({**said, "data": [dated(one) for one in said["data"]]})
            return saying(dated(said))

        return late(request, told)

    with Gateway(endpoint, serve) as gateway:
        with at(gateway.url, sleep=interrupt_at(1)) as sft, pytest.raises(KeyboardInterrupt):
            sft.run_full_pipeline(**SHORT)
        clock.now += 3 * 3600
        with at(gateway.url) as later, pytest.raises(WaitTimeout) as caught:
            later.resume(timeout=60)
        late.shown = True
        at(gateway.url).list_runs()
    (surplus,) = late.jobs

    assert (status_at(endpoint, sdk, surplus) == "cancelled") == keeps
    assert any(surplus in line and "--cancel" in line for line in log()) != keeps
    assert status_at(endpoint, sdk, caught.value.job_id) == "validating_files"


# ── An endpoint that keeps no metadata ───────────────────────────────────────────────────────


@pytest.mark.parametrize("resumed", [False, True], ids=["at once", "by a resume"])
def test_a_job_without_metadata_is_known_by_its_file_its_model_and_its_time(
    at: MakeSFT, endpoint: Rehearsal, resumed: bool
) -> None:
    with Gateway(endpoint, Forgetful("answer")) as gateway:
        if resumed:
            endpoint.inject(Fault("401", "GET", JOBS, skip=1))
            with at(gateway.url) as sft, pytest.raises(openai.AuthenticationError):
                sft.run_full_pipeline(**SHORT)
            results = at(gateway.url).resume()
        else:
            results = at(gateway.url).run_full_pipeline(**SHORT)

    assert results is not None
    assert made(endpoint, JOBS) == 1


def test_a_job_of_another_file_or_model_is_not_taken_for_the_one_that_never_arrived(
    at: MakeSFT, endpoint: Rehearsal, file: Path, clean_environment: Path
) -> None:
    endpoint.hold("validating_files")
    with Gateway(endpoint, Forgetful("request")) as gateway:
        sft = at(gateway.url)
        raw = sft.client.with_options(base_url=endpoint.url)
        other = raw.files.create(file=("別.jsonl", file.read_bytes()), purpose="fine-tune").id
        ours = sft.upload_training_file(file)
        foreign = [
            raw.fine_tuning.jobs.create(model=model, training_file=sent).id
            for model, sent in ((BASE, other), ("gpt-4.1-mini-2025-04-14", ours))
        ]
        job_id = sft.create_fine_tune_job(ours, 1, 4)

    assert job_id not in foreign
    assert made(endpoint, JOBS) == 3


def test_a_job_of_the_same_file_and_model_from_long_before_is_not_taken_for_it_either(
    at: MakeSFT, endpoint: Rehearsal, clock: Clock, file: Path
) -> None:
    endpoint.hold("validating_files")
    with Gateway(endpoint, Forgetful("request")) as gateway:
        sft = at(gateway.url)
        ours = sft.upload_training_file(file)
        raw = sft.client.with_options(base_url=endpoint.url)
        before = raw.fine_tuning.jobs.create(model=BASE, training_file=ours).id
        clock.now += 2 * 3600
        job_id = sft.create_fine_tune_job(ours, 1, 4)

    assert job_id != before
    assert made(endpoint, JOBS) == 2


def test_where_it_can_not_be_told_which_job_is_ours_nobody_is_billed_again(
    at: MakeSFT, endpoint: Rehearsal, file: Path
) -> None:
    endpoint.hold("validating_files")
    with Gateway(endpoint, Forgetful("both")) as gateway, pytest.raises(OpenAISFTError) as caught:
        start(at(gateway.url), file)

    assert made(endpoint, JOBS) == 2
    assert all(job.response["id"] in str(caught.value) for job in posts(endpoint, JOBS))


def test_where_jobs_are_not_listed_nobody_is_billed_again(at: MakeSFT, endpoint: Rehearsal) -> None:
    endpoint.inject(Fault("reset_after", "POST", JOBS))
    endpoint.inject(Fault("404", "GET", JOBS, times=None))
    for act in ("begin", "resume", "resume"):
        with at(endpoint.url) as sft, pytest.raises(FAILURES):
            sft.run_full_pipeline(**SHORT) if act == "begin" else sft.resume()

    assert made(endpoint, JOBS) == 1


def test_where_no_metadata_is_kept_a_job_that_may_be_surplus_is_named_and_not_cancelled(
    at: MakeSFT, endpoint: Rehearsal, clock: Clock, sdk: openai.OpenAI, log: Log
) -> None:
    endpoint.hold("validating_files")
    late, forgetful = Late(clock), Forgetful("")
    with Gateway(endpoint, lambda r, forward: late(r, lambda r: forgetful(r, forward))) as gateway:
        with at(gateway.url) as sft, pytest.raises(WaitTimeout) as caught:
            sft.run_full_pipeline(**SHORT, timeout=60)
        late.shown = True
        before = len(log())
        at(gateway.url).list_runs()
    (surplus,) = late.jobs
    said = [line for line in log()[before:] if surplus in line]

    assert any("--cancel" in line for line in said)
    assert not any(caught.value.job_id in line for line in said)
    assert status_at(endpoint, sdk, surplus) == "validating_files"


# ── An empty value ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(flags, id=" ".join(flags))
        for flags in (
            ("--cancel",),
            ("--job-id",),
            ("--check-file",),
            ("--dataset",),
            ("--base-url",),
            ("--model",),
            ("--output-dir",),
            ("--resume",),
            ("--evaluate-only", "--model-id"),
            ("--baseline",),
            ("--suffix",),
            ("--system-prompt",),
            ("--revision",),
            ("--topics",),
        )
    ],
)
def test_an_empty_value_of_a_flag_is_refused_and_nothing_is_sent(
    cli: Cli,
    online: Callable[[str], tuple[str, ...]],
    endpoint: Rehearsal,
    dataset: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
) -> None:
    # What an empty value falls to is nowhere outside this machine.
    monkeypatch.setenv("OPENAI_BASE_URL", endpoint.url)
    monkeypatch.setenv("OPENAI_SFT_DATASET", str(dataset))
    ended = cli(*online(endpoint.url), *flags, "")

    assert ended.code == 2
    assert flags[-1] in ended.err
    assert endpoint.exchanges == []


@pytest.mark.parametrize(
    "name",
    [
        *("dataset", "base_url", "model", "output_dir"),
        *("api_key", "revision", "system_prompt", "task"),
    ],
)
def test_an_empty_setting_is_refused_by_name(make_sft: MakeSFT, name: str) -> None:
    with pytest.raises(ConfigurationError, match=name):
        make_sft(**{name: ""})


@pytest.mark.parametrize(
    ("method", "arguments", "name"),
    [
        pytest.param(method, arguments, name, id=method)
        for method, arguments, name in (
            ("cancel_job", ("",), "job_id"),
            ("attach", ("",), "job_id"),
            ("monitor_fine_tune_job", ("",), "job_id"),
            ("create_fine_tune_job", ("",), "file_id"),
            ("run_evaluation", ("",), "model_id"),
            ("evaluate_model_comprehensive", ("", examples(1), []), "model_id"),
        )
    ],
)
def test_an_empty_argument_is_refused_by_name_and_nothing_is_sent(
    make_sft: MakeSFT,
    endpoint: Rehearsal,
    out: Path,
    method: str,
    arguments: tuple[Any, ...],
    name: str,
) -> None:
    with pytest.raises(ConfigurationError, match=name):
        getattr(make_sft(), method)(*arguments)

    assert endpoint.exchanges == []
    assert list(out.glob("run_*")) == []


@pytest.mark.parametrize("name", ["suffix", "baseline"])
def test_an_empty_option_of_a_run_is_refused_by_name_and_nothing_is_sent(
    make_sft: MakeSFT, endpoint: Rehearsal, name: str
) -> None:
    with pytest.raises(ConfigurationError, match=name):
        make_sft().run_full_pipeline(**SHORT, **{name: " "})

    assert endpoint.exchanges == []


@pytest.mark.parametrize("read", [check_file, fix_file, read_dialogues, read_examples])
def test_an_empty_path_is_not_the_working_directory(
    dataset: Path, read: Callable[[str], object]
) -> None:
    with pytest.raises((ConfigurationError, DataError)):
        read("")


# ── What the service doesn't tell ────────────────────────────────────────────────────────────


def untold_tokens(request: Request, forward: Forward) -> Reply:
    reply = forward(request)
    if request.method == "GET" and re.fullmatch(JOB, request.path):
        return saying({**reply.json, "trained_tokens": None})
    return reply


def test_a_training_whose_tokens_are_not_told_costs_what_was_estimated(
    at: MakeSFT, endpoint: Rehearsal
) -> None:
    estimates: list[CostEstimate] = []
    with Gateway(endpoint, untold_tokens) as gateway:
        sft = at(gateway.url, confirm=lambda estimate: not estimates.append(estimate))
        cost = sft.run_full_pipeline(**SHORT)["cost"]
    expected = estimates[0].training_usd

    assert expected
    assert cost.get("training_usd") == pytest.approx(expected)
    assert cost["total_usd"] == pytest.approx(expected + cost["evaluation_usd"])


@pytest.mark.parametrize(("told", "epochs"), [(3, 3), ("auto", 50)])
def test_a_training_of_auto_whose_tokens_are_not_told_costs_the_epochs_it_tells_or_the_most(
    at: MakeSFT, endpoint: Rehearsal, told: int | str, epochs: int
) -> None:
    def serve(request: Request, forward: Forward) -> Reply:
        reply = untold_tokens(request, forward)
        if request.method == "GET" and re.fullmatch(JOB, request.path):
            return saying({**reply.json, "hyperparameters": {"n_epochs": told}})
        return reply

    estimates: list[CostEstimate] = []
    with Gateway(endpoint, serve) as gateway:
        sft = at(gateway.url, confirm=lambda estimate: not estimates.append(estimate))
        cost = sft.run_full_pipeline("auto", 4, max_test_cases=1)["cost"]
    tokens = estimates[0].training_tokens

    assert tokens
    assert cost.get("training_usd") == pytest.approx(tokens * epochs * 3e-6)


def test_a_training_whose_tokens_are_not_told_counts_against_the_limit(
    at: MakeSFT, endpoint: Rehearsal
) -> None:
    def serve(request: Request, forward: Forward) -> Reply:
        reply = untold_tokens(request, forward)
        if request.line != ("POST", CHAT):
            return reply
        usage = {"prompt_tokens": 2000, "completion_tokens": 0, "total_tokens": 2000}
        return saying({**reply.json, "usage": usage})

    with Gateway(endpoint, serve) as gateway:
        estimates: list[CostEstimate] = []
        with at(gateway.url, confirm=estimates.append) as sft, pytest.raises(Declined):
            sft.run_full_pipeline(**SHORT)
        # The answers cost more than a tenth of it, for the service counts more tokens.
        limit = 1.05 * (estimates[0].total_usd or 0.0)
        with at(gateway.url, max_cost_usd=limit) as sft, pytest.raises(BudgetError):
            sft.run_full_pipeline(**SHORT)

    assert made(endpoint, JOBS) == 1


@pytest.mark.parametrize("usage", [None, {}], ids=str)
def test_answers_whose_tokens_are_not_told_cost_what_was_estimated(
    at: MakeSFT, endpoint: Rehearsal, usage: Any
) -> None:
    def serve(request: Request, forward: Forward) -> Reply:
        reply = forward(request)
        return saying({**reply.json, "usage": usage}) if request.path == CHAT else reply

    with Gateway(endpoint, serve) as gateway:
        sft = at(gateway.url)
        results = sft.evaluate_model_comprehensive(BASE, examples(6), examples(3))
    parts = (results["test_evaluation"], results["valid_evaluation"])
    said = [response for part in parts for response in part["responses"]]
    counter = TokenCounter(load_vocabulary())
    sent = sum(counter.count(response["input"]).total for response in said)
    came = sum(counter.count_texts([response["output"]]) for response in said)

    assert len(said) == 9
    assert results["cost"]["evaluation_usd"] == pytest.approx((0.15 * sent + 0.60 * came) / 1e6)


def test_an_answer_without_words_whose_tokens_are_not_told_costs_its_question(
    at: MakeSFT, endpoint: Rehearsal
) -> None:
    def serve(request: Request, forward: Forward) -> Reply:
        reply = forward(request)
        if request.path != CHAT:
            return reply
        (choice,) = reply.json["choices"]
        empty = {**choice, "message": {**choice["message"], "content": ""}}
        return saying({**reply.json, "choices": [empty], "usage": None})

    with Gateway(endpoint, serve) as gateway:
        results = at(gateway.url).evaluate_model_comprehensive(BASE, examples(3), [])
    counter = TokenCounter(load_vocabulary())
    failed = results["test_evaluation"]["responses"]
    sent = sum(counter.count(response["input"]).total for response in failed)

    assert [bool(response.get("error")) for response in failed] == [True] * 3
    assert results["cost"]["evaluation_usd"] == pytest.approx(0.15 * sent / 1e6)


# ── A long outage in the evaluation ──────────────────────────────────────────────────────────


def evaluated_whole(at: MakeSFT, url: str, clock: Clock) -> Any:
    """The results of a run, taken up again every ten minutes where it ends unfinished."""
    results = None
    with at(url) as sft, contextlib.suppress(*FAILURES):
        results = sft.run_full_pipeline(1, 4, max_test_cases=2, concurrency=1)
    for _ in range(8):
        clock.now += 600
        with at(url) as later, contextlib.suppress(*FAILURES):
            results = later.resume() or results
    return results


def test_an_outage_of_an_hour_loses_no_answer_of_an_evaluation(
    at: MakeSFT, endpoint: Rehearsal, clock: Clock
) -> None:
    began: list[float] = []

    def serve(request: Request, forward: Forward) -> Reply:
        if request.line != ("POST", CHAT):
            return forward(request)
        if len(asked(endpoint, "POST", CHAT)) == 1 and not began:
            began.append(clock.now)
        return page(503) if began and clock.now < began[0] + 3600 else forward(request)

    with Gateway(endpoint, serve) as gateway:
        results = evaluated_whole(at, gateway.url, clock)
    questions = Counter(json.dumps(e.request["messages"]) for e in asked(endpoint, "POST", CHAT))

    assert results is not None
    assert results["summary"]["total_cases_evaluated"] == 4
    assert results["test_evaluation"]["failed_cases"] == 0
    assert list(questions.values()) == [1] * 4


def test_a_wait_of_a_quarter_of_an_hour_that_the_service_asks_for_fails_no_case(
    at: MakeSFT, endpoint: Rehearsal, clock: Clock
) -> None:
    began: list[float] = []

    def serve(request: Request, forward: Forward) -> Reply:
        if request.line != ("POST", CHAT):
            return forward(request)
        began.append(clock.now)
        left = began[0] + 900 - clock.now
        if left <= 0:
            return forward(request)
        refused = refusal(429, code="rate_limit_exceeded")
        return refused._replace(headers={"Retry-After": f"{left:.0f}"})

    with Gateway(endpoint, serve) as gateway:
        results = evaluated_whole(at, gateway.url, clock)

    assert results["summary"]["total_cases_evaluated"] == 4
    assert len(asked(endpoint, "POST", CHAT)) == 4


# ── What a paid success doesn't need ─────────────────────────────────────────────────────────

OPTIONAL = ("/models/*", "*/checkpoints", "/files/*/content")


@pytest.mark.parametrize(
    ("kind", "paths"),
    [("403", (path,)) for path in OPTIONAL] + [("503", OPTIONAL)],
    ids=["model", "checkpoints", "result file", "all three, out of order"],
)
def test_a_step_that_can_be_done_without_does_not_end_a_paid_success(
    at: MakeSFT, endpoint: Rehearsal, log: Log, kind: str, paths: tuple[str, ...]
) -> None:
    for path in paths:
        endpoint.inject(Fault(kind, "GET", path, times=None))
    results = at(endpoint.url).run_full_pipeline(**SHORT)

    assert results["summary"]["total_cases_evaluated"] == 2
    assert any(kind in line for line in log())


# ── Answers that aren't the API's ────────────────────────────────────────────────────────────


def without_model(reply: Reply) -> Reply:
    return saying({key: value for key, value in reply.json.items() if key != "model"})


def without_data(reply: Reply) -> Reply:
    return saying({**reply.json, "data": None})


def of_texts(reply: Reply) -> Reply:
    return saying({**reply.json, "data": ["文", None, 3]})


def no_list(_: Reply) -> Reply:
    return saying(["文"])


def a_page(_: Reply) -> Reply:
    return page()


Bad = tuple[str, str, str, Callable[[Reply], Reply], bool]
EVENTS, CHECKPOINTS, CONTENT = r".*/events", r".*/checkpoints", r"/files/.*/content"
#: What is asked, by which method and path, what is said instead, whether the run gets past it,
#: and what happens today where that is wrong.
BAD: list[Bad] = [
    ("file sent", "POST", "/files", a_page, True),
    ("job made", "POST", JOBS, a_page, True),
    ("list of files", "GET", "/files", a_page, False),
    ("list of files", "GET", "/files", of_texts, False),
    ("list of jobs", "GET", JOBS, a_page, False),
    ("list of jobs", "GET", JOBS, without_data, False),
    ("list of jobs", "GET", JOBS, of_texts, False),
    ("job", "GET", JOB, a_page, False),
    ("job", "GET", JOB, without_model, True),
    ("events", "GET", EVENTS, a_page, False),
    ("events", "GET", EVENTS, without_data, False),
    ("events", "GET", EVENTS, of_texts, False),
    ("checkpoints", "GET", CHECKPOINTS, a_page, True),
    ("checkpoints", "GET", CHECKPOINTS, without_data, True),
    ("checkpoints", "GET", CHECKPOINTS, of_texts, True),
    ("result file", "GET", CONTENT, a_page, True),
    ("model", "GET", "/models/.*", a_page, True),
    ("model", "GET", "/models/.*", no_list, True),
    ("answer", "POST", CHAT, a_page, False),
]


@pytest.mark.parametrize(
    ("method", "path", "instead", "passed"),
    [
        pytest.param(method, path, instead, passed, id=f"{name}: {instead.__name__}")
        for name, method, path, instead, passed in BAD
    ],
)
def test_an_answer_that_is_not_the_apis_is_gone_past_or_a_clear_error_and_the_way_back_is_told(
    at: MakeSFT,
    endpoint: Rehearsal,
    clock: Clock,
    method: str,
    path: str,
    instead: Callable[[Reply], Reply],
    passed: bool,
) -> None:
    looked_for = {"/files": ("POST", "/files"), JOBS: ("POST", JOBS)}.get(path)
    lost = [looked_for] if method == "GET" and looked_for else []

    def serve(request: Request, forward: Forward) -> Reply:
        reply = forward(request)
        if request.line in lost:
            lost.remove(request.line)
            return page(504)
        if request.method == method and re.fullmatch(path, request.path):
            return instead(reply)
        return reply

    failure = None
    with Gateway(endpoint, serve) as gateway, at(gateway.url) as sft:
        try:
            sft.run_full_pipeline(**SHORT, timeout=3600)
        except FAILURES as error:
            failure = error
        back = sft.describe_remote_state()

    assert not (passed and failure)
    assert made(endpoint, JOBS) <= 1
    assert clock.now - clock.began < 2 * 3600
    if failure is not None:
        assert str(failure).strip()
        assert "--resume run_" in back or made(endpoint, JOBS) == 0 or path == CHAT


#: What is read of each answer, by what is asked.
READ = {
    ("POST", "/files"): ["id"],
    ("POST", JOBS): ["id"],
    ("GET", "/files"): ["data", "id", "filename", "bytes", "created_at", "purpose"],
    ("GET", JOBS): ["data", "id", "metadata", "created_at", "status", "model", "has_more"],
    ("GET", JOB): [
        *("id", "status", "error", "result_files", "trained_tokens", "fine_tuned_model"),
        *("hyperparameters", "created_at", "model"),
    ],
    ("GET", EVENTS): ["data", "id", "message", "created_at", "level", "type", "has_more"],
    ("GET", CHECKPOINTS): ["data", "id", "fine_tuned_model_checkpoint", "step_number"],
    ("GET", r"/models/.*"): ["id", "shutdown_date"],
    ("POST", CHAT): ["choices", "message", "content", "finish_reason", "usage", "prompt_tokens"],
}
OTHER_TYPES = [None, {}, [None], "\ud83d"]


def with_another(value: Any, name: str, other: object) -> Any:
    """JSON in which every field of a name has another value."""
    if isinstance(value, list):
        return [with_another(item, name, other) for item in value]
    if not isinstance(value, dict):
        return value
    return {k: other if k == name else with_another(v, name, other) for k, v in value.items()}


@pytest.mark.parametrize("other", OTHER_TYPES, ids=ascii)
@pytest.mark.parametrize(
    ("asked_for", "names"), READ.items(), ids=[" ".join(asked_for) for asked_for in READ]
)
def test_a_field_of_another_type_is_gone_past_or_a_clear_error_and_makes_no_second_job(
    at: MakeSFT, endpoint: Rehearsal, asked_for: tuple[str, str], names: list[str], other: object
) -> None:
    """Each field is left out, and has one of the other types in turn."""
    method, path = asked_for
    turn = OTHER_TYPES.index(other)
    for name in names if turn == 0 else names[turn - 1 :: len(OTHER_TYPES) - 1]:
        looked_for = ("POST", path) if method == "GET" and path in ("/files", JOBS) else None
        lost = [looked_for] if looked_for else []

        def serve(request: Request, forward: Forward, name: str = name, lost: Any = lost) -> Reply:
            reply = forward(request)
            if request.line in lost:
                lost.remove(request.line)
                return page(504)
            if request.method == method and re.fullmatch(path, request.path):
                return saying(with_another(reply.json, name, other))
            return reply

        endpoint.exchanges.clear()
        with Gateway(endpoint, serve) as gateway, at(gateway.url, output_dir=name) as sft:
            try:
                sft.run_full_pipeline(**SHORT, timeout=60)
            except FAILURES as error:
                told = str(error) if isinstance(error, OpenAISFTError) else explain_api_error(error)
                assert told.encode()
            assert sft.describe_remote_state()
            assert sft.list_runs()

        assert made(endpoint, JOBS) <= 1


@pytest.mark.parametrize("told", [-1, "x", [5], float("inf")], ids=str)
def test_what_is_of_another_type_than_the_apis_counts_as_not_told(
    at: MakeSFT, endpoint: Rehearsal, told: object
) -> None:
    def serve(request: Request, forward: Forward) -> Reply:
        reply = forward(request)
        if request.method == "GET" and re.fullmatch(JOB, request.path):
            return saying({**reply.json, "trained_tokens": told})
        return reply

    estimates: list[CostEstimate] = []
    with Gateway(endpoint, serve) as gateway:
        sft = at(gateway.url, confirm=lambda estimate: not estimates.append(estimate))
        cost = sft.run_full_pipeline(**SHORT)["cost"]

    assert cost["training_usd"] == pytest.approx(estimates[0].training_usd)


@pytest.mark.parametrize(
    "error",
    ["残高が足りません\ud83d", {"code": None, "message": "残高が足りません\ud83d"}],
    ids=["a text", "half an emoji"],
)
def test_the_reason_of_a_failed_job_is_told_whatever_its_form(
    at: MakeSFT, endpoint: Rehearsal, error: Any
) -> None:
    def serve(request: Request, forward: Forward) -> Reply:
        reply = forward(request)
        if request.method == "GET" and re.fullmatch(JOB, request.path):
            return saying({**reply.json, "status": "failed", "error": error})
        return reply

    with Gateway(endpoint, serve) as gateway:
        sft = at(gateway.url)
        with pytest.raises(JobFailed, match="残高が足りません") as caught:
            sft.run_full_pipeline(**SHORT)

    assert str(caught.value).encode()
    assert record_of(sft)["job_status"] == "failed"


@pytest.mark.parametrize(
    "reply",
    [refusal(401, code="invalid_api_key"), page(403), saying({"error": "だめ\ud83d"}, 400)],
    ids=["key", "page", "text"],
)
def test_the_command_line_tells_the_way_back_whatever_ends_the_watch(
    cli: Cli, online: Callable[[str], tuple[str, ...]], endpoint: Rehearsal, reply: Reply
) -> None:
    def serve(request: Request, forward: Forward) -> Reply:
        return reply if re.fullmatch(JOB, request.path) else forward(request)

    with Gateway(endpoint, serve) as gateway:
        ended = cli(*online(gateway.url))

    assert ended.code == 1
    assert re.search(
        r"openai-sft --resume run_\d+_\d+ --base-url \S+ --dialect openai --output-dir out",
        ended.err,
    )
    assert posts(endpoint, JOBS)[0].response["id"] in ended.err


# ── What never ends ──────────────────────────────────────────────────────────────────────────


def test_an_answer_that_drips_does_not_outlast_the_wait(make_sft: MakeSFT) -> None:
    dripped = threading.Event()

    def drip() -> Iterator[bytes]:
        for _ in range(30):
            time.sleep(0.05)
            yield b" "
        dripped.set()
        yield json.dumps(job("running")).encode()

    def serve(request: Request, _: Forward) -> Reply:
        if request.path.endswith("/events"):
            return saying({"object": "list", "data": [], "has_more": False})
        return Reply(200, pieces=drip())

    with Gateway(None, serve) as gateway:
        sft = make_sft(client=None, base_url=gateway.url, clock=time.time, sleep=time.sleep)
        with pytest.raises(WaitTimeout):
            sft.monitor_fine_tune_job("ftjob-script", timeout=0.3)
        outlasted = dripped.is_set()

    assert not outlasted


DRIPS: dict[str, Callable[[OpenAISFT], object]] = {
    "list": lambda sft: sft.list_runs(),
    "cancel": lambda sft: sft.cancel_job("ftjob-script"),
    "run": lambda sft: sft.run_full_pipeline(**SHORT),
    "evaluation": lambda sft: sft.evaluate_model_comprehensive(BASE, examples(1), []),
    "watch": lambda sft: sft.monitor_fine_tune_job("ftjob-script", timeout=3600),
}


@pytest.mark.parametrize("deed", DRIPS.values(), ids=DRIPS)
def test_an_answer_that_drips_is_given_up_wherever_it_comes(
    at: MakeSFT, clock: Clock, deed: Callable[[OpenAISFT], object]
) -> None:
    pieces = itertools.count()

    def drip() -> Iterator[bytes]:
        while next(pieces) < 10_000:
            clock.now += 5
            time.sleep(0.0005)  # for who reads to keep up with who writes
            yield b" "

    with (
        Gateway(None, lambda *_: Reply(200, pieces=drip())) as gateway,
        at(gateway.url) as sft,
        contextlib.suppress(*FAILURES),
    ):
        deed(sft)

    assert 1 < next(pieces) < 5000


def test_events_without_end_do_not_outlast_the_wait(at: MakeSFT, clock: Clock) -> None:
    pages: list[str] = []

    def serve(request: Request, _: Forward) -> Reply:
        if not request.path.endswith("/events"):
            return saying(job("running"))
        pages.append(request.query)
        clock.now += 1
        event = {
            "id": f"ftevent-{len(pages)}",
            "object": "fine_tuning.job.event",
            "created_at": 1,
            "level": "info",
            "message": "まだまだ",
            "type": "message",
        }
        return saying({"object": "list", "data": [event], "has_more": len(pages) < 80})

    with Gateway(None, serve) as gateway, pytest.raises(WaitTimeout):
        at(gateway.url).monitor_fine_tune_job("ftjob-script", timeout=5)

    assert len(pages) < 20


def an_event(number: int) -> dict[str, Any]:
    """Every second one tells of a step."""
    step = {"type": "metrics", "data": {"step": number, "total_steps": 400, "train_loss": 1.0}}
    return {
        "id": f"ftevent-{number}",
        "object": "fine_tuning.job.event",
        "created_at": number,
        "level": "info",
        "message": f"{number}番目",
        **({"type": "message", "data": None} if number % 2 else step),
    }


@pytest.mark.parametrize("broken", [page(), refusal(400)], ids=["page", "400"])
@pytest.mark.parametrize("mended", [True, False])
def test_events_behind_a_page_that_stays_broken_are_read_when_it_is_mended(
    at: MakeSFT, endpoint: Rehearsal, log: Log, broken: Reply, mended: bool
) -> None:
    looks: list[int] = []

    def serve(request: Request, forward: Forward) -> Reply:
        if request.path.endswith("/events"):
            newest = 340 + 10 * len(looks)  # a few more at each look
            after = re.search(r"after=ftevent-(\d+)", request.query)
            first = int(after[1]) - 1 if after else newest
            if after and 100 < first <= 250 and not (mended and len(looks) > 3):
                return broken
            listed = [an_event(number) for number in range(first, max(0, first - 100), -1)]
            return saying({"object": "list", "data": listed, "has_more": first > 100})
        if request.method == "GET" and request.path.startswith(f"{JOBS}/"):
            looks.append(1)
            return saying(job("running" if len(looks) < 5 else "succeeded"))
        return forward(request)

    with Gateway(endpoint, serve) as gateway:
        sft = at(gateway.url)
        sft.monitor_fine_tune_job("ftjob-script", timeout=3600)
    numbers = [int(line[7:-2]) for line in log() if line.startswith("[イベント]")]
    with Path(sft.files["training_metrics"]).open(encoding="utf-8", newline="") as table:
        steps = [float(row["step"]) for row in csv.DictReader(table)]
    begin = 1 if mended else 251

    assert numbers[:100] == list(range(251, 351))
    assert sorted(numbers) == list(range(begin, 391))
    assert steps == [number for number in range(begin, 391) if not number % 2]


@pytest.mark.parametrize("deed", ["list", "search"])
def test_jobs_without_end_are_not_all_read(
    at: MakeSFT, endpoint: Rehearsal, clock: Clock, file: Path, log: Log, deed: str
) -> None:
    pages: list[str] = []
    lost = [("POST", JOBS)]

    def serve(request: Request, forward: Forward) -> Reply:
        if request.line in lost:
            lost.clear()
            return page(502)
        if request.line != ("GET", JOBS):
            return forward(request)
        pages.append(request.query)
        clock.now += 10
        listed = {**job("succeeded"), "id": f"ftjob-{len(pages)}"}
        return saying({"object": "list", "data": [listed], "has_more": len(pages) < 150})

    with Gateway(endpoint, serve) as gateway, contextlib.suppress(*FAILURES):
        at(gateway.url).list_runs() if deed == "list" else start(at(gateway.url), file)

    assert 1 <= len(pages) < 150
    assert any("100ページで終わらない" in line for line in log()) == (deed == "list")


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, Callable[[float], None]]:
    """The library loaded where the machine's clock can be set, and what sets it."""
    real, moved = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + moved[0])
    spec = importlib.util.spec_from_file_location("openai_sft_again", PROJECT / "openai_sft.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module, lambda seconds: moved.__setitem__(0, seconds)


def test_a_clock_that_is_set_back_lengthens_no_wait(
    again: tuple[ModuleType, Callable[[float], None]], endpoint: Rehearsal, file: Path, out: Path
) -> None:
    module, set_clock = again
    naps = itertools.count()

    def sleep(_: float) -> None:
        set_clock(-3600)
        time.sleep(0.02)
        if next(naps) > 40:
            raise TimeoutError

    endpoint.hold("running")
    with module.OpenAISFT(
        "k", base_url=endpoint.url, output_dir=out, sleep=sleep, verbose=False
    ) as sft:
        job_id = start(sft, file)
        with pytest.raises(module.WaitTimeout):
            sft.monitor_fine_tune_job(job_id, timeout=0.3)


# ── Files ────────────────────────────────────────────────────────────────────────────────────


def strictly(path: Path) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{path.name}: {constant}")

    return json.loads(path.read_text("utf-8"), parse_constant=refuse)


@pytest.mark.parametrize("told", ["by the result file", "by the events"])
def test_a_loss_that_is_no_number_leaves_valid_files(
    at: MakeSFT, endpoint: Rehearsal, out: Path, told: str
) -> None:
    def serve(request: Request, forward: Forward) -> Reply:
        reply = forward(request)
        if request.path.endswith("/content"):
            table = b"step,train_loss,valid_loss\n1,2.5,inf\n2,nan,-inf\n"
            return reply._replace(body=table) if told == "by the result file" else refusal(404)
        if request.path.endswith("/events"):
            text = re.sub(rb'"(train_loss|valid_loss)": [-0-9.e]+', rb'"\1": NaN', reply.body)
            return reply._replace(body=text)
        return reply

    with Gateway(endpoint, serve) as gateway:
        at(gateway.url).run_full_pipeline(**SHORT)
    files = [*out.glob("*.json")]

    assert len(files) == 3
    assert all(strictly(path) for path in files)


@pytest.mark.parametrize("reason", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_files_cannot_be_locked_it_works_and_says_that_nothing_guards_them(
    at: MakeSFT,
    endpoint: Rehearsal,
    log: Log,
    monkeypatch: pytest.MonkeyPatch,
    reason: int,
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(fcntl, "flock", refuse)  # as Lustre and some NFS do
    results = at(endpoint.url).run_full_pipeline(**SHORT)

    assert results["summary"]["total_cases_evaluated"] == 2
    assert any("ロック" in line or "排他" in line for line in log())


def test_after_an_interrupt_in_a_notebook_a_new_instance_takes_the_run_over(
    at: MakeSFT, endpoint: Rehearsal
) -> None:
    endpoint.hold("running")
    kept = at(endpoint.url, sleep=interrupt_at(3))  # a name that the notebook still holds
    with pytest.raises(KeyboardInterrupt):
        kept.run_full_pipeline(**SHORT)
    endpoint.release()

    assert at(endpoint.url).resume() is not None
    assert made(endpoint, JOBS) == 1


HALTED = """
import os, signal, sys
from openai_sft import OpenAISFT

def stop(_):
    print(flush=True)
    while True:
        signal.pause()

os.fsync = stop  # what is written is on its way to the disk
OpenAISFT(offline=True, dataset=sys.argv[1], output_dir=sys.argv[2], verbose=False).prepare_data()
"""


def test_a_process_that_is_killed_while_it_writes_leaves_no_hidden_copy_of_dialogues(
    dataset: Path, out: Path
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HALTED, str(dataset), str(out)],
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout
        said = process.stdout.readline()
        process.kill()
    with OpenAISFT(offline=True, dataset=str(dataset), output_dir=out, verbose=False) as sft:
        sft.prepare_data()
    hidden = [path for path in out.iterdir() if path.name.startswith(".")]

    assert said
    assert [path.name for path in hidden if "眠れ" in path.read_text("utf-8")] == []


# ── Where the key goes ───────────────────────────────────────────────────────────────────────

SECRET = "p%40ss-wörd"


def test_credentials_in_a_base_url_are_neither_saved_nor_shown(
    at: MakeSFT,
    cli: Cli,
    online: Callable[[str], tuple[str, ...]],
    endpoint: Rehearsal,
    out: Path,
    log: Log,
) -> None:
    with Gateway(endpoint) as gateway:
        url = gateway.url.replace("//", f"//taro:{SECRET}@")
        arguments = online(url)
        shown = [cli(*arguments, "--verbose"), cli("--check", *arguments[:2])]
        endpoint.hold("running")
        with at(url) as sft, pytest.raises(WaitTimeout):
            sft.attach(start(sft, training_file(out.parent)), timeout=60)
        told = [sft.describe_remote_state(), repr(sft), *map(str, sft.check()), *log()]
    written = "".join(p.read_text("utf-8") for p in out.iterdir() if p.is_file())
    everything = "\n".join([written, *told, *(text for end in shown for text in end[1:])])

    assert shown[0].code == 0
    for secret in (SECRET, "p@ss-wörd", "p%40ss-w%C3%B6rd"):
        assert secret not in everything


@pytest.mark.parametrize(
    "url", ["ftp://taro:{}@host/v1", "taro:{}@host", "http://taro:{}@ho st/v1", "//taro:{}/@h"]
)
def test_credentials_in_what_is_no_url_are_not_shown(cli: Cli, url: str) -> None:
    ended = cli("--list", "--base-url", url.format(SECRET))

    assert ended.code == 2
    assert "base_url" in ended.err
    assert SECRET not in ended.err


def test_a_run_at_a_base_url_with_credentials_is_resumed_there(
    at: MakeSFT, endpoint: Rehearsal
) -> None:
    endpoint.inject(Fault("insufficient_quota", "POST", CHAT))
    with Gateway(endpoint) as gateway:
        url = gateway.url.replace("//", "//taro:p%40ss@")
        with at(url) as sft, pytest.raises(openai.RateLimitError):
            sft.run_full_pipeline(**SHORT)
        before = len(gateway.asked)
        results = at(url).resume()
        sent = {request.headers["authorization"] for request in gateway.asked[before:]}

    assert results is not None
    assert len(sent) == 1
    assert sent == {request.headers["authorization"] for request in gateway.asked[:before]}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("POST", "/files", 307), ("POST", JOBS, 308), ("POST", CHAT, 307), ("GET", JOB, 302)],
    ids=["file", "job", "question", "watch"],
)
def test_a_redirect_to_another_host_is_refused(
    at: MakeSFT, endpoint: Rehearsal, clock: Clock, method: str, path: str, status: int
) -> None:
    with Gateway(endpoint) as elsewhere:

        def serve(request: Request, forward: Forward) -> Reply:
            if request.method != method or not re.fullmatch(path, request.path):
                return forward(request)
            target = f"http://localhost:{elsewhere.port}/v1{request.path}"
            return Reply(status, headers={"Location": target})

        failure = None
        with Gateway(endpoint, serve) as gateway:
            try:
                at(gateway.url).run_full_pipeline(**SHORT, timeout=3600)
            except FAILURES as error:
                failure = error

    assert elsewhere.asked == []
    assert failure is not None


@pytest.fixture
def configured_elsewhere(
    endpoint: Rehearsal, at: MakeSFT, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Gateway]:
    """A run that waits for its evaluation at ``endpoint``, where now another one is configured."""
    endpoint.inject(Fault("insufficient_quota", "POST", CHAT))
    with at(endpoint.url) as sft, pytest.raises(openai.RateLimitError):
        sft.run_full_pipeline(**SHORT)
    endpoint.exchanges.clear()
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Gateway(endpoint, lambda *_: refusal(404)) as gateway:
        monkeypatch.setenv("OPENAI_BASE_URL", gateway.url)
        yield gateway


@pytest.mark.parametrize("deed", ["resume", "run_evaluation", "watch"])
def test_no_key_is_sent_to_a_recorded_endpoint_that_is_not_the_one_configured(
    make_sft: MakeSFT, endpoint: Rehearsal, configured_elsewhere: Gateway, deed: str
) -> None:
    sft = make_sft(client=None, base_url=None, api_key=None)
    (row,) = sft.list_runs()
    deeds: dict[str, Callable[[], object]] = {
        "resume": sft.resume,
        "run_evaluation": sft.run_evaluation,
        "watch": lambda: sft.monitor_fine_tune_job(row.job_id or ""),
    }
    with pytest.raises(OpenAISFTError, match=re.escape(endpoint.url)):
        deeds[deed]()

    assert endpoint.exchanges == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("いいえ", 2),
        ("はい", 0),
    ],
)
def test_on_a_terminal_a_recorded_endpoint_that_is_not_the_one_configured_is_asked_about(
    cli: Cli,
    endpoint: Rehearsal,
    configured_elsewhere: Gateway,
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    code: int,
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(f"{answer}\n" * 3))
    ended = cli("--resume", "--output-dir", "out", "--poll-interval", "0")

    assert ended.code == code
    assert bool(endpoint.exchanges) == (code == 0)


# ── What a terminal would obey ───────────────────────────────────────────────────────────────


def test_the_id_of_a_job_is_shown_inert(at: MakeSFT, endpoint: Rehearsal, log: Log) -> None:
    real: list[str] = []

    def serve(request: Request, forward: Forward) -> Reply:
        known = re.sub(r"(?<=/)ftjob-[^/]+", real[0] if real else "", request.path)
        reply = forward(request._replace(path=known))
        if request.path.startswith(JOBS) and reply.json.get("object") == "fine_tuning.job":
            real[:] = [reply.json["id"]]
            return saying({**reply.json, "id": f"ftjob-1{HOSTILE}"})
        return reply

    with Gateway(endpoint, serve) as gateway:
        at(gateway.url).run_full_pipeline(**SHORT)

    assert any("ftjob-1" in line for line in log())
    assert [line for line in log() if not line.isprintable()] == []


@pytest.mark.parametrize("what", ["topic", "id", "unknown role", "file name", "checked file"])
def test_what_data_are_called_is_shown_inert(
    cli: Cli, clean_environment: Path, log: Log, what: str
) -> None:
    folder = clean_environment / "data"
    folder.mkdir()
    rows = [*records(12)]
    flags: list[str] = []
    if what == "topic":
        rows[0]["topic"] = {"main_jp": f"家族{HOSTILE}"}
        flags = ["--topics", "ない話題"]
    elif what == "id":  # nothing to learn from
        rows.append({**record(13, ("client", "眠れません")), "id": f"d13{HOSTILE}"})
    elif what == "unknown role":
        rows.append({**record(13, ("医師", "眠れません")), "id": f"d13{HOSTILE}"})
    elif what == "file name":
        (folder / f"壊れた{HOSTILE}.json").write_text("{", "utf-8")
        rows = records(120)
    data = write_jsonl(folder / "dialogues.jsonl", rows)
    if what == "checked file":
        ended = cli("--check-file", data.rename(folder / f"壊れた{HOSTILE}.jsonl"))
    else:
        ended = cli("--data-only", "--dataset", folder, *flags)
    shown = "\n".join([ended.out, ended.err, *log()])

    assert any(word in shown for word in ("家族", "d13", "壊れた"))
    assert inert(shown)


# ── A conversation without end ───────────────────────────────────────────────────────────────


class Tally:
    """A vocabulary that counts the characters it is asked about."""

    def __init__(self, encoding: Any) -> None:
        self._encoding = encoding
        self.characters = 0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._encoding, name)
        if not callable(method):
            return method

        def count(text: Any, *rest: Any, **options: Any) -> Any:
            self.characters += sum(map(len, [text] if isinstance(text, str) else text))
            return method(text, *rest, **options)

        return count


def test_a_long_conversation_is_counted_a_few_times_over_to_be_split() -> None:
    tally = Tally(load_vocabulary())
    counter = TokenCounter(tally)
    long = example("d1", *("眠れません。仕事のことを考えてしまいます。" * 6 for _ in range(400)))
    size = sum(len(message["content"]) for message in long["messages"])
    whole = TokenCounter(load_vocabulary()).count(long["messages"]).total
    parts = split_long_example(long, counter, whole // 3)  # type: ignore[arg-type]

    assert len(parts) >= 3
    assert tally.characters < 8 * size
