"""What goes wrong on the way, and that no job is lost or paid for twice by it."""

from __future__ import annotations

import base64
import csv
import json
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import openai
import pytest
from edges import Forward, Gateway, Late, Reply, Request, deaf, refusal, saying
from endpoint import FAULT_KINDS, Exchange, Fault, Rehearsal
from faults import (
    CHAT,
    FILE,
    JOB,
    JOBS,
    LOST,
    PASSING,
    Clock,
    asked,
    made,
    until,
)
from helpers import (
    PROJECT,
    examples,
    hearing_interrupts,
    posts,
    read_json,
    recorded_run,
    records,
    training_file,
    write_jsonl,
)
from tqdm import tqdm

import openai_sft_example
from openai_sft import (
    BudgetError,
    ConfigurationError,
    DataError,
    OpenAISFT,
    OpenAISFTError,
    Price,
    Runs,
    TrainingNotAvailable,
    WaitTimeout,
)

MakeSFT = Callable[..., OpenAISFT]
Log = Callable[[], list[str]]

BASE = "gpt-4o-mini-2024-07-18"
SHORT: dict[str, Any] = {"epochs": 1, "batch_size": 4, "max_test_cases": 1}


@pytest.fixture
def clock(endpoint: Rehearsal) -> Clock:
    return Clock(endpoint)


@pytest.fixture
def timed(make_sft: MakeSFT, clock: Clock) -> MakeSFT:
    """Makes instances whose time passes only while they sleep."""
    return lambda **options: make_sft(**({"clock": clock, "sleep": clock.sleep} | options))


@pytest.fixture
def sft(timed: MakeSFT) -> OpenAISFT:
    return timed()


def start(sft: OpenAISFT, file: Path) -> str:
    return sft.create_fine_tune_job(sft.upload_training_file(file), 1, 4)


def record_of(sft: OpenAISFT) -> Any:
    return read_json(sft.files["record"])


def stop_in_the_evaluation(sft: OpenAISFT, endpoint: Rehearsal) -> None:
    """A run that ends with everything paid but the answers."""
    endpoint.inject(Fault("insufficient_quota", "POST", CHAT))
    with pytest.raises(openai.RateLimitError):
        sft.run_full_pipeline(**SHORT)
    sft.close()


def made_elsewhere(sft: OpenAISFT, file: Path, **options: Any) -> str:
    """A job that no run here knows of."""
    with file.open("rb") as opened:
        sent = sft.client.files.create(file=(file.name, opened), purpose="fine-tune")
    asking: dict[str, Any] = {"model": BASE, "training_file": sent.id} | options
    return sft.client.fine_tuning.jobs.create(**asking).id


# ── Every fault × every kind of call ─────────────────────────────────────────────────────────


def upload(sft: OpenAISFT, file: Path) -> None:
    sft.upload_training_file(file)


def upload_again(sft: OpenAISFT, file: Path) -> None:
    sft.upload_training_file(file)
    sft.upload_training_file(file)


def create(sft: OpenAISFT, file: Path) -> None:
    start(sft, file)


def watch(sft: OpenAISFT, file: Path) -> None:
    sft.monitor_fine_tune_job(start(sft, file), timeout=3600)


def cancel(sft: OpenAISFT, file: Path) -> None:
    sft.cancel_job(start(sft, file))


def evaluate(sft: OpenAISFT, file: Path) -> None:
    sft.evaluate_model_comprehensive(BASE, examples(1), [])


Act = Callable[[OpenAISFT, Path], None]

#: Each kind of call: what makes it, its method and path, and what must go wrong before it.
CALLS: dict[str, tuple[Act, str, str, tuple[Fault, ...]]] = {
    "files.create": (upload, "POST", "/files", ()),
    "files.list": (upload, "GET", "/files", (Fault("reset_after", "POST", "/files"),)),
    "files.retrieve": (upload_again, "GET", FILE, ()),
    "files.delete": (create, "DELETE", FILE, (Fault("training_not_available", "POST", JOBS),)),
    "files.content": (watch, "GET", "/files/*/content", ()),
    "uploads.create": (upload, "POST", "/uploads", ()),
    "uploads.parts.create": (upload, "POST", "/uploads/*/parts", ()),
    "uploads.complete": (upload, "POST", "/uploads/*/complete", ()),
    "jobs.create": (create, "POST", JOBS, ()),
    "jobs.list": (create, "GET", JOBS, (Fault("reset_after", "POST", JOBS),)),
    "jobs.retrieve": (watch, "GET", JOB, ()),
    "jobs.list_events": (watch, "GET", "*/events", ()),
    "jobs.checkpoints": (watch, "GET", "*/checkpoints", ()),
    "jobs.cancel": (cancel, "POST", "*/cancel", (Fault("paused_job"),)),
    "models.retrieve": (watch, "GET", "/models/*", ()),
    "chat": (evaluate, "POST", CHAT, ()),
}
LASTING = ("503", "malformed")
WATCHING = [name for name, (act, *_) in CALLS.items() if act is watch]


def pairs(kind: str) -> Iterator[tuple[list[str], int | None]]:
    """Where a fault can hit and how often; what a watch survives meets all its calls at once."""
    together = WATCHING if kind in PASSING else []
    if together:
        yield together, 1
    for name, (_, method, path, _) in CALLS.items():
        if Fault(kind).matches(method, path.replace("*", "x")):
            if name not in together:
                yield [name], 1
            if kind in LASTING:
                yield [name], None


def asked_of(endpoint: Rehearsal, method: str, pattern: str) -> list[Exchange]:
    return [e for e in endpoint.exchanges if e.method == method and fnmatchcase(e.path, pattern)]


def try_out(
    folder: Path, sdk: openai.OpenAI, calls: list[str], kind: str, times: int | None
) -> None:
    """One run of one act with a fault in it; asserts what holds whatever the fault."""
    act, _, _, before = CALLS[calls[0]]
    places = [CALLS[call][1:3] for call in calls]
    faults = [Fault(kind, *place, times=times, seconds=0.01) for place in places]
    failure: Exception | None = None
    with Rehearsal(faults=[*before, *faults]) as endpoint:
        clock = Clock(endpoint)
        with OpenAISFT(
            api_key="recognisable-key",
            client=sdk.with_options(base_url=endpoint.url),
            base_url=endpoint.url,
            output_dir=folder / "out",
            max_single_upload_bytes=1500 if calls[0].startswith("uploads") else 2**20,
            clock=clock,
            sleep=clock.sleep,
            verbose=False,
        ) as sft:
            try:
                act(sft, training_file(folder))
            except (openai.OpenAIError, OpenAISFTError) as error:
                failure = error
            known = record_of(sft)
        hits = [[e for e in asked_of(endpoint, *place) if e.fault == kind] for place in places]
        jobs, files = made(endpoint, JOBS), made(endpoint, "/files")
        done = asked_of(endpoint, "POST", "/uploads/*/complete")
        files += len({e.path for e in done if e.fault in LOST or e.status == 200})

    assert all(hits)
    assert jobs <= 1
    assert files <= (2 if calls == ["files.retrieve"] else 1)
    assert jobs == 0 or "job_intent" in known
    assert clock.now < clock.began + 4 * 3600
    if calls == ["files.delete"]:
        assert isinstance(failure, TrainingNotAvailable)
    elif times == 1 and kind in PASSING:
        assert failure is None
    if failure is not None:
        assert str(failure).strip()
    elif jobs:
        assert known["job_id"].startswith("ftjob-")


@pytest.mark.parametrize("kind", FAULT_KINDS)
def test_whatever_goes_wrong_ends_well_or_in_a_clear_error_and_never_in_two_jobs(
    clean_environment: Path, sdk: openai.OpenAI, kind: str
) -> None:
    running: dict[str, Future[None]] = {}
    with ThreadPoolExecutor(6) as executor:  # they wait more than they work
        for calls, times in pairs(kind):
            name = f"{'+'.join(calls)}{'' if times else ' for ever'}"
            (folder := clean_environment / name).mkdir()
            running[name] = executor.submit(try_out, folder, sdk, calls, kind, times)
    failures = {name: one.exception() for name, one in running.items() if one.exception()}

    assert failures == {}
    assert running


# ── A lost answer ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("fault", LOST)
def test_a_lost_answer_never_makes_a_second_job(
    timed: MakeSFT, endpoint: Rehearsal, sdk: openai.OpenAI, file: Path, fault: str
) -> None:
    impatient = sdk.with_options(base_url=endpoint.url, timeout=0.3)
    sft = timed(client=impatient)
    endpoint.inject(Fault(fault, "POST", JOBS))
    job_id = start(sft, file)
    (asking,) = asked(endpoint, "POST", JOBS)

    assert record_of(sft)["job_id"] == job_id
    assert asking.request["metadata"]["openai_sft_run"] == record_of(sft)["run_id"]
    assert asking.request["metadata"]["openai_sft_data"]
    assert sft.monitor_fine_tune_job(job_id).status == "succeeded"


def test_a_refusal_after_a_lost_answer_does_not_tell_that_no_job_was_made(
    timed: MakeSFT, endpoint: Rehearsal, clock: Clock, file: Path
) -> None:
    late = Late(clock, seconds=None)

    def serve(request: Request, forward: Forward) -> Reply:
        if request.line == ("POST", JOBS) and late.jobs:
            return refusal(400)
        return late(request, forward)

    with Gateway(endpoint, serve) as gateway, timed(base_url=gateway.url, client=None) as sft:
        file_id = sft.upload_training_file(file)
        with pytest.raises(openai.BadRequestError):
            sft.create_fine_tune_job(file_id, 1, 4)
        late.shown = True
        job_id = sft.create_fine_tune_job(file_id, 1, 4)

    assert [job_id] == late.jobs
    assert made(endpoint, JOBS) == 1


def test_an_endpoint_that_ignores_the_filter_has_no_foreign_job_adopted(
    timed: MakeSFT, sft: OpenAISFT, endpoint: Rehearsal, file: Path
) -> None:
    endpoint.hold("validating_files")
    foreign = {made_elsewhere(sft, file, metadata={"openai_sft_run": "x"}) for _ in range(3)}
    endpoint.inject(Fault("reset_before", "POST", JOBS))
    with Gateway(endpoint, deaf) as gateway:
        job_id = start(timed(base_url=gateway.url, client=None), file)

    assert job_id not in foreign
    assert made(endpoint, JOBS) == 4


@pytest.mark.parametrize("body", [{}, None, []], ids=str)
def test_an_answer_that_is_no_job_is_a_lost_answer(
    timed: MakeSFT, endpoint: Rehearsal, file: Path, body: Any
) -> None:
    bodies = [body]

    def empty(request: Request, forward: Forward) -> Reply:
        reply = forward(request)
        return saying(bodies.pop()) if request.line == ("POST", JOBS) and bodies else reply

    with Gateway(endpoint, empty) as gateway:
        job_id = start(timed(base_url=gateway.url, client=None), file)

    assert job_id.startswith("ftjob-")
    assert made(endpoint, JOBS) == 1


def test_the_job_of_a_lost_answer_is_found_even_where_its_file_is_gone(
    make_sft: MakeSFT, timed: MakeSFT, endpoint: Rehearsal
) -> None:
    endpoint.inject(Fault("reset_after", "POST", JOBS))
    endpoint.inject(Fault("401", "GET", JOBS, skip=1))
    with timed() as sft, pytest.raises(openai.AuthenticationError):
        sft.run_full_pipeline(**SHORT)
    sent = record_of(sft)["uploads"]["training"]["file_id"]
    timed().client.files.delete(sent)
    results = timed().resume()

    assert results is not None
    assert made(endpoint, JOBS) == 1
    assert made(endpoint, "/files") == 2


@pytest.mark.parametrize("fault", LOST)
def test_a_file_whose_answer_was_lost_is_adopted(
    sft: OpenAISFT, endpoint: Rehearsal, file: Path, fault: str
) -> None:
    endpoint.inject(Fault(fault, "POST", "/files", seconds=0.01))
    file_id = sft.upload_training_file(file)

    assert made(endpoint, "/files") == 1
    assert sft.client.files.content(file_id).content == file.read_bytes()


def test_a_file_whose_answer_was_lost_is_looked_for_while_the_list_lags(
    timed: MakeSFT, endpoint: Rehearsal, clock: Clock, file: Path
) -> None:
    lists: list[str] = []

    def lag(request: Request, forward: Forward) -> Reply:
        reply = forward(request)
        if request.line != ("GET", "/files"):
            return reply
        lists.append(request.path)
        return reply if len(lists) >= 3 else saying({**reply.json, "data": []})

    endpoint.inject(Fault("500_after", "POST", "/files"))
    with Gateway(endpoint, lag) as gateway, timed(base_url=gateway.url, client=None) as sft:
        sft.upload_training_file(file)

    assert made(endpoint, "/files") == 1
    assert len(lists) == 3
    assert 5 <= clock.now - clock.began <= 7


def test_other_content_of_the_same_name_and_size_is_never_adopted(
    sft: OpenAISFT, endpoint: Rehearsal, file: Path
) -> None:
    first = sft.upload_training_file(file)
    file.write_text(file.read_text("utf-8").replace("眠れません", "眠れました"), "utf-8")
    endpoint.inject(Fault("reset_before", "POST", "/files"))
    second = sft.upload_training_file(file)

    assert second != first
    assert sft.client.files.content(second).content == file.read_bytes()


@pytest.mark.parametrize("other", ["longer", "of long ago"])
def test_a_file_of_the_same_name_that_nobody_here_knows_is_never_adopted(
    timed: MakeSFT, sft: OpenAISFT, endpoint: Rehearsal, file: Path, other: str
) -> None:
    content = file.read_bytes().replace("眠れません".encode(), "眠れました".encode())
    if other == "longer":
        content += b"\n"
    foreign = sft.client.files.create(file=(file.name, content), purpose="fine-tune").id

    def aged(request: Request, forward: Forward) -> Reply:
        reply = forward(request)
        if (*request.line, other) != ("GET", "/files", "of long ago"):
            return reply
        early = [{**one, "created_at": one["created_at"] - 7200} for one in reply.json["data"]]
        return saying({**reply.json, "data": early})

    endpoint.inject(Fault("reset_before", "POST", "/files"))
    with Gateway(endpoint, aged) as gateway:
        file_id = timed(base_url=gateway.url, client=None).upload_training_file(file)

    assert file_id != foreign
    assert sft.client.files.content(file_id).content == file.read_bytes()


def test_a_file_for_another_purpose_is_never_adopted(
    timed: MakeSFT, sft: OpenAISFT, endpoint: Rehearsal, file: Path
) -> None:
    with file.open("rb") as opened:
        other = sft.client.files.create(file=(file.name, opened), purpose="user_data").id
    endpoint.inject(Fault("reset_before", "POST", "/files"))
    with Gateway(endpoint, deaf) as gateway:
        file_id = timed(base_url=gateway.url, client=None).upload_training_file(file)

    assert file_id != other


def test_a_file_already_uploaded_for_this_data_is_used_again(
    timed: MakeSFT, endpoint: Rehearsal, file: Path
) -> None:
    with timed() as sft:
        first = sft.upload_training_file(file)
    again = timed().upload_training_file(file)

    assert again == first
    assert made(endpoint, "/files") == 1


def test_a_file_that_is_known_at_one_endpoint_is_not_looked_for_at_another(
    timed: MakeSFT, endpoint: Rehearsal, sdk: openai.OpenAI, file: Path
) -> None:
    with timed() as sft:
        sft.upload_training_file(file)
    with Rehearsal() as other:
        client = sdk.with_options(base_url=other.url)
        with timed(base_url=other.url, client=client) as sft:
            sft.upload_training_file(file)

        assert [(e.method, e.path) for e in other.exchanges] == [("POST", "/files")]


@pytest.mark.parametrize(("path", "act"), [("/files", "upload"), (JOBS, "create")])
def test_a_refusal_for_the_rate_is_not_looked_after_for_nothing_happened(
    sft: OpenAISFT, endpoint: Rehearsal, file: Path, path: str, act: str
) -> None:
    endpoint.inject(Fault("429", "POST", path))
    {"upload": upload, "create": create}[act](sft, file)

    assert {e.method for e in endpoint.exchanges} == {"POST"}
    assert [e.status for e in asked(endpoint, "POST", path)] == [429, 200]


def test_a_file_that_was_deleted_there_is_uploaded_again(
    timed: MakeSFT, endpoint: Rehearsal, clean_environment: Path
) -> None:
    files = [training_file(clean_environment, count) for count in (12, 13)]
    first, kept = (timed().upload_training_file(file) for file in files)
    later = timed()
    later.client.files.delete(first)
    again = [later.upload_training_file(file) for file in files]

    assert again[0] != first
    assert again[1] == kept  # one file that is gone doesn't tell that files can't be looked up
    assert made(endpoint, "/files") == 3


@pytest.mark.parametrize("change", [{"bytes": 7}, {"status": "error"}], ids=str)
def test_a_known_file_that_is_not_there_as_it_was_sent_is_uploaded_again(
    timed: MakeSFT, endpoint: Rehearsal, file: Path, change: dict[str, Any]
) -> None:
    def changed(request: Request, forward: Forward) -> Reply:
        known = request.method == "GET" and fnmatchcase(request.path, FILE)
        reply = forward(request)
        return saying({**reply.json, **change}, reply.status) if known else reply

    with Gateway(endpoint, changed) as gateway:
        with timed(base_url=gateway.url, client=None) as sft:
            first = sft.upload_training_file(file)
        with timed(base_url=gateway.url, client=None) as sft:
            again = sft.upload_training_file(file)

    assert again != first
    assert made(endpoint, "/files") == 2


@pytest.mark.parametrize("fault", [None, "503", "reset_before", "reset_after"])
def test_a_file_above_the_limit_goes_up_in_parts_of_which_one_may_fail(
    timed: MakeSFT, endpoint: Rehearsal, file: Path, fault: str | None
) -> None:
    if fault:
        endpoint.inject(Fault(fault, "POST", "/uploads/*/parts", skip=1))
    sft = timed(max_single_upload_bytes=1000)
    file_id = sft.upload_training_file(file)

    assert asked(endpoint, "POST", "/files") == []
    assert len(asked_of(endpoint, "POST", "/uploads/*/parts")) >= 3
    assert sft.client.files.content(file_id).content == file.read_bytes()
    assert sft.client.files.retrieve(file_id).filename == file.name


def test_a_lost_answer_to_a_cancellation_is_no_error(sft: OpenAISFT, endpoint: Rehearsal) -> None:
    endpoint.hold("validating_files")
    job_id = start(sft, training_file(sft.output_dir.parent))
    endpoint.inject(Fault("reset_after", "POST", "*/cancel"))

    assert sft.cancel_job(job_id).status == "cancelled"


# ── What is tried again, and how long ────────────────────────────────────────────────────────


@pytest.mark.parametrize("fault", ["429", "503"])
def test_the_services_own_retry_after_is_honoured_for_every_call(
    sft: OpenAISFT, endpoint: Rehearsal, clock: Clock, file: Path, fault: str
) -> None:
    endpoint.inject(Fault(fault, "POST", "/files", seconds=17))
    sft.upload_training_file(file)

    assert 17 in clock.slept


def test_what_stays_away_is_given_up_after_ten_minutes(
    sft: OpenAISFT, endpoint: Rehearsal, clock: Clock, file: Path
) -> None:
    endpoint.inject(Fault("500", "POST", "/files", times=None))
    with pytest.raises(openai.InternalServerError):
        sft.upload_training_file(file)

    assert 500 <= clock.now - clock.began <= 620
    assert max(clock.slept) <= 60


def test_a_question_whose_answer_stays_away_is_given_up_within_a_minute(
    sft: OpenAISFT, endpoint: Rehearsal, clock: Clock
) -> None:
    endpoint.inject(Fault("500", "POST", CHAT, times=None))
    results = sft.evaluate_model_comprehensive(BASE, examples(1), [])
    (response,) = results["test_evaluation"]["responses"]

    assert "500" in response["error"]
    assert 20 <= clock.now - clock.began <= 50


@pytest.mark.parametrize("fault", ["400", "401", "403", "404", "501", "insufficient_quota"])
@pytest.mark.parametrize(("method", "path"), [("POST", "/files"), ("POST", JOBS), ("POST", CHAT)])
def test_what_cannot_succeed_is_tried_once(
    sft: OpenAISFT,
    endpoint: Rehearsal,
    clock: Clock,
    file: Path,
    fault: str,
    method: str,
    path: str,
) -> None:
    endpoint.inject(Fault(fault, method, path, times=None))
    act = {"/files": upload, JOBS: create, CHAT: evaluate}[path]
    if fault in ("400", "501") and path == CHAT:
        act(sft, file)  # the case alone is at fault, and carries it
    else:
        with pytest.raises(openai.APIStatusError):
            act(sft, file)

    assert len(asked(endpoint, method, path)) == 1
    assert clock.slept == []


def test_a_refused_job_leaves_no_upload_behind_and_says_what_still_works(
    sft: OpenAISFT, endpoint: Rehearsal
) -> None:
    endpoint.inject(Fault("training_not_available", "POST", JOBS))
    with pytest.raises(TrainingNotAvailable) as caught:
        sft.run_full_pipeline(**SHORT)
    text = str(caught.value)

    assert sft.client.files.list().data == []
    assert len(caught.value.deleted) == 2
    (refused,) = posts(endpoint, JOBS)
    assert refused.response["error"]["message"] in text
    for word in ("training_not_available", "2027-01-06", "2027-01-14", "組織", "--base-url"):
        assert word in text
    assert "評価" in text
    assert "JSONL" in text
    assert made(endpoint, JOBS) == 0


@pytest.mark.parametrize("fault", ["reset_after", "403"])
def test_a_deletion_that_goes_wrong_hides_neither_the_refusal_nor_the_other_file(
    sft: OpenAISFT, endpoint: Rehearsal, fault: str
) -> None:
    endpoint.inject(Fault("training_not_available", "POST", JOBS))
    endpoint.inject(Fault(fault, "DELETE", "/files/*"))
    with pytest.raises(TrainingNotAvailable):
        sft.run_full_pipeline(**SHORT)

    assert len(sft.client.files.list().data) == (1 if fault == "403" else 0)


def test_a_file_that_was_there_before_is_not_deleted_by_a_refusal(
    timed: MakeSFT, endpoint: Rehearsal, file: Path
) -> None:
    with timed() as earlier:
        kept = earlier.upload_training_file(file)
    endpoint.inject(Fault("training_not_available", "POST", JOBS))
    sft = timed()
    with pytest.raises(TrainingNotAvailable):
        start(sft, file)

    assert [one.id for one in sft.client.files.list().data] == [kept]


# ── Resume ───────────────────────────────────────────────────────────────────────────────────


def test_with_nothing_to_do_resume_says_so_and_the_command_line_ends_with_0(
    make_sft: MakeSFT,
    endpoint: Rehearsal,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    code = openai_sft_example.main(["--resume", "--base-url", endpoint.url])

    assert code == 0
    assert "再開する実行はありません" in capsys.readouterr().out
    assert make_sft().resume() is None
    assert endpoint.exchanges == []


def test_a_finished_run_and_a_failed_job_leave_nothing_to_resume(
    timed: MakeSFT, endpoint: Rehearsal
) -> None:
    with timed() as sft:
        sft.run_full_pipeline(**SHORT)
    endpoint.inject(Fault("job_failed", "POST", JOBS))
    with timed() as sft, pytest.raises(OpenAISFTError, match="失敗"):
        sft.run_full_pipeline(**SHORT)

    assert timed().resume() is None
    assert made(endpoint, JOBS) == 2


def test_a_run_goes_on_with_its_recorded_settings(
    timed: MakeSFT, endpoint: Rehearsal, sdk: openai.OpenAI, out: Path
) -> None:
    endpoint.inject(Fault("401", "POST", JOBS))
    sft = timed(system_prompt="傾聴してください。", model="gpt-4.1-mini-2025-04-14")
    with sft, pytest.raises(openai.AuthenticationError):
        sft.run_full_pipeline(3, 8, max_test_cases=1, seed=7, suffix="x")
    client = sdk.with_options(base_url=endpoint.url)
    clock = Clock(endpoint)
    with OpenAISFT(
        api_key="k", client=client, output_dir=out, verbose=False, clock=clock, sleep=clock.sleep
    ) as later:
        results = later.resume()
    request = asked(endpoint, "POST", JOBS)[-1].request
    chosen = request["method"]["supervised"]["hyperparameters"]

    assert results is not None
    assert (request["model"], request["seed"], request["suffix"]) == (
        "gpt-4.1-mini-2025-04-14",
        7,
        "x",
    )
    assert chosen == {"n_epochs": 3, "batch_size": 8}
    assert len(results["test_evaluation"]["responses"]) == 1
    first = asked(endpoint, "POST", CHAT)[0].request["messages"][0]
    assert first == {"role": "system", "content": "傾聴してください。"}
    assert made(endpoint, "/files") == 2


def test_the_newest_unfinished_run_is_resumed_or_the_one_that_is_named(
    timed: MakeSFT, endpoint: Rehearsal
) -> None:
    names = []
    for _ in range(2):
        endpoint.inject(Fault("401", "POST", JOBS))
        with timed() as sft, pytest.raises(openai.AuthenticationError):
            sft.run_full_pipeline(**SHORT)
        names.append(record_of(sft)["run_id"])
    with timed() as sft:
        sft.resume(names[0])
        older = record_of(sft)["run_id"]
    with timed() as sft:
        sft.resume()
        newer = record_of(sft)["run_id"]

    assert [older, newer] == names
    assert timed().resume() is None
    assert timed().resume(names[0]) is None


@pytest.mark.parametrize("name", ["run_20200101_000000", "run_x", "../run_20200101_000000", "x"])
def test_a_run_that_is_not_recorded_here_is_a_wrong_setting(
    timed: MakeSFT, endpoint: Rehearsal, out: Path, name: str
) -> None:
    out.mkdir()
    for stray in ("run_x.json", "x.json"):
        (out / stray).write_text("{}")
    (out.parent / "run_20200101_000000.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="--list"):
        timed().resume(name)

    assert endpoint.exchanges == []


def test_after_a_resume_the_instance_goes_on_with_its_own_model_data_and_prompt(
    timed: MakeSFT, endpoint: Rehearsal, file: Path, clean_environment: Path
) -> None:
    endpoint.inject(Fault("401", "POST", JOBS))
    other = {"model": "gpt-4.1-mini-2025-04-14", "system_prompt": "傾聴してください。"}
    with timed(**other) as begun, pytest.raises(openai.AuthenticationError):
        begun.run_full_pipeline(**SHORT)
    mine = write_jsonl(clean_environment / "mine.jsonl", records(15))
    sft = timed(dataset=str(mine), confirm=lambda estimate: not estimates.append(estimate.model))
    estimates: list[str] = []
    assert sft.resume() is not None
    resumed = Path(sft.files["record"])
    before = resumed.read_bytes()
    parts = sft.load_and_split_dataset()
    start(sft, file)
    sent = [e.request["model"] for e in asked(endpoint, "POST", JOBS)]
    record = record_of(sft)

    assert (sft.model, sft.dataset) == (BASE, str(mine))
    assert sum(map(len, parts)) == 15
    assert {m["role"] for m in sft.prepare_dataset(parts[1])[0]["messages"]} == {
        "user",
        "assistant",
    }
    assert sent == [other["model"], other["model"], BASE]
    assert estimates == [other["model"], BASE]
    assert resumed.read_bytes() == before
    assert record["settings"]["model"] == BASE
    assert record["settings"]["dataset"] == str(mine)


def test_the_same_instance_comes_back_to_its_own_run(timed: MakeSFT, endpoint: Rehearsal) -> None:
    endpoint.hold("running")
    sft = timed()
    with pytest.raises(WaitTimeout):
        sft.run_full_pipeline(**SHORT, timeout=60)
    endpoint.release()

    assert sft.resume() is not None
    assert made(endpoint, JOBS) == 1


def test_two_processes_never_write_one_record(timed: MakeSFT, endpoint: Rehearsal) -> None:
    def meanwhile(_: float) -> None:
        before = Path(first.files["record"]).read_bytes()
        with pytest.raises(ConfigurationError, match="別のプロセス"):
            second.resume(timeout=60)
        seen.append(Path(first.files["record"]).read_bytes() == before)
        endpoint.release()

    seen: list[bool] = []
    endpoint.hold("running")
    first, second = timed(sleep=meanwhile), timed()
    results = first.run_full_pipeline(**SHORT)

    assert seen
    assert all(seen)
    assert results["summary"]["total_cases_evaluated"] == 2


def test_a_rehearsal_is_marked_and_never_resumed_nor_the_newest_model(
    make_sft: MakeSFT, endpoint: Rehearsal, out: Path
) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    with OpenAISFT(rehearse=True, output_dir=out, verbose=False) as done:
        done.run_full_pipeline(epochs=1, max_test_cases=1)
    endpoint.hold("running")
    with make_sft(rehearse=True, sleep=interrupt) as stopped, pytest.raises(KeyboardInterrupt):
        stopped.run_full_pipeline(**SHORT)
    endpoint.release()
    runs = sorted(out.glob("run_*.json"))

    assert [read_json(path)["rehearsal"] for path in runs] == [True, True]
    assert make_sft().resume() is None
    assert make_sft().resume(runs[-1].stem) is None
    assert Runs(out).of_model() is None


@pytest.mark.parametrize("fault", ["empty_answer", "refusal"])
def test_an_answer_without_words_is_paid_for_and_counted_all_the_same(
    sft: OpenAISFT, endpoint: Rehearsal, fault: str
) -> None:
    endpoint.inject(Fault(fault))
    results = sft.evaluate_model_comprehensive(BASE, examples(2), [])
    told = [e.response["usage"] for e in asked(endpoint, "POST", CHAT)]

    assert results["test_evaluation"]["failed_cases"] == 1
    assert results["usage"]["prompt_tokens"] == sum(one["prompt_tokens"] for one in told)


def test_a_data_file_that_changed_meanwhile_is_refused(timed: MakeSFT, endpoint: Rehearsal) -> None:
    endpoint.inject(Fault("401", "POST", JOBS))
    with timed() as sft, pytest.raises(openai.AuthenticationError):
        sft.run_full_pipeline(**SHORT)
    Path(sft.files["train"]).write_text("", "utf-8")
    with pytest.raises(OpenAISFTError, match="sha256"):
        timed().resume()

    assert made(endpoint, JOBS) == 0


# ── Jobs of this and other places ────────────────────────────────────────────────────────────


def test_a_job_made_elsewhere_is_watched_to_its_end_and_priced_as_what_it_is(
    sft: OpenAISFT, file: Path
) -> None:
    job_id = made_elsewhere(sft, file, model="gpt-4.1-2025-04-14")
    ended = sft.attach(job_id)
    record = record_of(sft)

    assert not isinstance(ended, dict)
    assert ended.status == "succeeded"
    assert record["fine_tuned_model"] == ended.fine_tuned_model
    assert Path(sft.files["training_metrics"]).exists()
    assert record["cost"]["training_usd"] == pytest.approx((ended.trained_tokens or 0) * 25 / 1e6)


def test_a_job_of_an_unfinished_run_is_taken_through_to_its_results(
    timed: MakeSFT, endpoint: Rehearsal
) -> None:
    endpoint.hold("running")
    with timed() as sft, pytest.raises(WaitTimeout) as caught:
        sft.run_full_pipeline(**SHORT, timeout=60)
    endpoint.release()
    results = timed().attach(caught.value.job_id)

    assert isinstance(results, dict)
    assert results["summary"]["total_cases_evaluated"] == 2
    assert made(endpoint, JOBS) == 1


def test_a_job_is_cancelled_and_what_is_still_billed_is_said(
    timed: MakeSFT, endpoint: Rehearsal, log: Log
) -> None:
    endpoint.hold("running")
    watching = timed()
    with pytest.raises(WaitTimeout) as caught:
        watching.run_full_pipeline(**SHORT, timeout=60)
    cancelled = timed().cancel_job(caught.value.job_id)  # while the other still holds its record

    assert cancelled.status == "cancelled"
    assert any("取り消しました" in line and "請求" in line for line in log())


def test_a_job_that_is_cancelled_from_elsewhere_leaves_nothing_to_resume(
    timed: MakeSFT, endpoint: Rehearsal
) -> None:
    endpoint.hold("running")
    with timed() as sft, pytest.raises(WaitTimeout) as caught:
        sft.run_full_pipeline(**SHORT, timeout=60)
    with timed() as other:
        other.cancel_job(caught.value.job_id)

    assert record_of(sft)["job_status"] == "cancelled"
    assert timed().resume() is None


def test_an_instance_cancels_its_own_job_and_has_nothing_left_to_resume(
    timed: MakeSFT, endpoint: Rehearsal
) -> None:
    endpoint.hold("running")
    sft = timed()
    with pytest.raises(WaitTimeout) as caught:
        sft.run_full_pipeline(**SHORT, timeout=60)
    sft.cancel_job(caught.value.job_id)
    sft.close()

    assert record_of(sft)["job_status"] == "cancelled"
    assert timed().resume() is None


def test_an_instance_that_holds_the_record_of_a_job_records_its_cancellation(
    sft: OpenAISFT, endpoint: Rehearsal, file: Path
) -> None:
    endpoint.hold("running")
    sft.cancel_job(start(sft, file))

    assert record_of(sft)["job_status"] == "cancelled"


def test_a_job_that_has_ended_is_not_cancelled(
    sft: OpenAISFT, endpoint: Rehearsal, file: Path
) -> None:
    job_id = start(sft, file)
    sft.monitor_fine_tune_job(job_id)

    assert sft.cancel_job(job_id).status == "succeeded"
    assert asked_of(endpoint, "POST", "*/cancel") == []


def test_runs_and_jobs_are_listed_side_by_side_with_orphans_both_ways(
    timed: MakeSFT, endpoint: Rehearsal, file: Path, out: Path
) -> None:
    endpoint.hold("validating_files")
    with timed() as sft:
        ours = start(sft, file)
    foreign = made_elsewhere(sft, file)
    with timed() as sft:
        sft.save_all_datasets(examples(10), [], [])
        sft.upload_training_file(file)
    recorded_run(out, "20260101_000000", kind="job", job_id="ftjob-gone")
    rows = {row.job_id: row for row in timed().list_runs()}

    assert rows[ours].orphan is None
    assert rows[ours].run_id
    assert rows[ours].status == "validating_files"
    assert rows[foreign].orphan == "no record"
    assert rows["ftjob-gone"].orphan == "no job"
    assert rows[None].orphan is None


def test_a_job_with_two_records_is_an_orphan_in_neither(
    timed: MakeSFT, endpoint: Rehearsal
) -> None:
    with timed() as sft:
        sft.run_full_pipeline(**SHORT)
        job_id = record_of(sft)["job_id"]
    with timed() as sft:
        sft.attach(job_id)
    rows = timed().list_runs()

    assert [(row.job_id, row.orphan) for row in rows] == [(job_id, None)] * 2


def test_more_jobs_than_a_page_holds_are_all_listed(
    sft: OpenAISFT, endpoint: Rehearsal, file: Path
) -> None:
    endpoint.hold("validating_files")
    first = made_elsewhere(sft, file)
    jobs = sft.client.fine_tuning.jobs
    training_file = jobs.retrieve(first).training_file
    made = [jobs.create(model=BASE, training_file=training_file).id for _ in range(100)]

    assert {row.job_id for row in sft.list_runs()} == {first, *made}


def test_an_endpoint_that_lists_no_jobs_still_has_its_runs_listed(
    sft: OpenAISFT, endpoint: Rehearsal, file: Path
) -> None:
    job_id = start(sft, file)
    endpoint.inject(Fault("404", "GET", JOBS, times=None))
    (row,) = sft.list_runs()

    assert (row.job_id, row.orphan) == (job_id, None)


# ── Watching ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", [JOB, "*/events"], ids=["the job", "its events"])
def test_an_outage_of_any_length_is_survived_and_logged_once_with_its_length_and_its_end(
    sft: OpenAISFT, endpoint: Rehearsal, clock: Clock, file: Path, log: Log, path: str
) -> None:
    job_id = start(sft, file)
    endpoint.inject(Fault("503", "GET", path, times=40))
    ended = sft.monitor_fine_tune_job(job_id)
    began = [line for line in log() if "回復するまで待ちます" in line]
    over = [line for line in log() if "接続が回復しました" in line]

    assert ended.status == "succeeded"
    assert clock.now - clock.began > 1200
    assert len(began) == len(over) == 1
    (length,) = re.findall(r"(\d+)秒", over[0])
    assert int(length) == pytest.approx(clock.now - clock.began, abs=60)


def test_events_that_cannot_be_had_do_not_hide_that_the_job_has_ended(
    sft: OpenAISFT, endpoint: Rehearsal, clock: Clock, file: Path
) -> None:
    job_id = start(sft, file)
    endpoint.inject(Fault("503", "GET", "*/events", times=None))
    ended = sft.monitor_fine_tune_job(job_id, timeout=100)

    assert ended.status == "succeeded"
    assert clock.now - clock.began <= 101


def test_an_outage_that_outlasts_the_wait_is_logged_once_and_does_not_lengthen_it(
    sft: OpenAISFT, endpoint: Rehearsal, clock: Clock, file: Path, log: Log
) -> None:
    job_id = start(sft, file)
    endpoint.inject(Fault("503", "GET", JOB, times=None))
    with pytest.raises(WaitTimeout) as caught:
        sft.monitor_fine_tune_job(job_id, timeout=100)

    assert caught.value.job_id == job_id
    assert clock.now - clock.began <= 101
    assert sum("回復するまで待ちます" in line for line in log()) == 1


def test_a_wait_that_runs_out_carries_the_job_and_leaves_it_alone(
    sft: OpenAISFT, endpoint: Rehearsal, clock: Clock, file: Path
) -> None:
    endpoint.hold("running")
    job_id = start(sft, file)
    with pytest.raises(WaitTimeout, match=job_id) as caught:
        sft.monitor_fine_tune_job(job_id, timeout=600)
    waited = clock.now - clock.began
    endpoint.release()

    assert (caught.value.job_id, caught.value.status) == (job_id, "running")
    assert waited == pytest.approx(600, abs=1)
    assert asked_of(endpoint, "POST", "*/cancel") == []
    assert sft.monitor_fine_tune_job(job_id).status == "succeeded"


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if "openai-sft" in thread.name}


def test_an_interruption_leaves_no_thread_and_no_bar_behind(
    timed: MakeSFT, endpoint: Rehearsal
) -> None:
    def interrupt(_: float) -> None:
        if asked_of(endpoint, "GET", "*/events"):
            raise KeyboardInterrupt
        endpoint.wait_for_progress(0.02)

    endpoint.hold("running")
    sft = timed(sleep=interrupt, verbose=True)
    with pytest.raises(KeyboardInterrupt):
        sft.run_full_pipeline(**SHORT)
    endpoint.release()

    assert threads() == set()
    assert list(getattr(tqdm, "_instances", ())) == []
    assert asked_of(endpoint, "POST", "*/cancel") == []
    assert "--resume" in sft.describe_remote_state()


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_prints_the_one_command_that_comes_back_and_it_works(
    endpoint: Rehearsal,
    dataset: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    sent: signal.Signals,
    code: int,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    script = [sys.executable, "-W", "error", str(PROJECT / "openai_sft_example.py"), "--yes"]
    chosen = ["--base-url", endpoint.url, "--dataset", str(dataset), "--output-dir", "o ut"]
    endpoint.hold("running")
    with hearing_interrupts():
        started = subprocess.Popen(
            [*script, *chosen, "--epochs", "1", "--batch-size", "4", "--max-test-cases", "1"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            encoding="utf-8",
        )
    folder = out.with_name("o ut")
    with started as process:
        try:
            until(lambda: any('"running"' in p.read_text() for p in folder.glob("run_*.json")))
            process.send_signal(sent)
            said = process.communicate(timeout=20)[1]
        finally:
            process.kill()  # or a failure here would wait for its end
    endpoint.release()
    commands = re.findall(r"openai-sft (--.*)", said)

    assert process.returncode == code
    assert "Traceback" not in said
    assert len(commands) == 1
    assert asked(endpoint, "POST", JOBS)[0].response["id"] in said
    assert "料金" in said
    assert made(endpoint, JOBS) == 1
    assert asked_of(endpoint, "POST", "*/cancel") == []
    if sent == signal.SIGINT:
        again = [*shlex.split(commands[0]), "--yes", "--quiet", "--poll-interval", "0.05"]
        assert openai_sft_example.main(again) == 0
        assert made(endpoint, JOBS) == 1


# ── The end of a job ─────────────────────────────────────────────────────────────────────────

AZURE = (
    b"step,train_loss,train_mean_token_accuracy,valid_loss,validation_mean_token_accuracy,"
    b"full_valid_loss,full_valid_mean_token_accuracy\n1,2.5,0.25,,,,\n2,1.5,0.5,1.75,0.4,1.8,0.45\n"
)


@pytest.mark.parametrize("content", [AZURE, base64.b64encode(AZURE)], ids=["raw", "base64"])
def test_the_columns_of_azure_are_kept_one_row_a_step(
    timed: MakeSFT, endpoint: Rehearsal, file: Path, content: bytes
) -> None:
    endpoint.inject(Fault("404", "GET", "*/events", times=None))
    endpoint.inject(Fault("404", "GET", "*/checkpoints", times=None))

    def azure(request: Request, forward: Forward) -> Reply:
        result = request.path.endswith("/content")
        return Reply(200, content, "application/octet-stream") if result else forward(request)

    with Gateway(endpoint, azure) as gateway:
        sft = timed(base_url=gateway.url, client=None)
        sft.monitor_fine_tune_job(start(sft, file))
    path = Path(sft.files["training_metrics"])
    with path.open(encoding="utf-8", newline="") as table:
        rows = list(csv.DictReader(table))

    assert re.fullmatch(r"training_metrics_\d{8}_\d{6}\.csv", path.name)
    assert [row["step"] for row in rows] == ["1", "2"]
    assert float(rows[1]["full_valid_loss"]) == 1.8
    assert rows[0]["full_valid_loss"] == ""
    assert record_of(sft)["final_metrics"]["train_mean_token_accuracy"] == 0.5


def test_without_a_result_file_the_metrics_of_the_events_serve(
    sft: OpenAISFT, endpoint: Rehearsal, file: Path
) -> None:
    endpoint.inject(Fault("404", "GET", "/files/*/content", times=None))
    job_id = sft.create_fine_tune_job(sft.upload_training_file(file), 3, 4)
    sft.monitor_fine_tune_job(job_id)
    with Path(sft.files["training_metrics"]).open(encoding="utf-8", newline="") as table:
        rows = list(csv.DictReader(table))

    assert [float(row["step"]) for row in rows] == list(range(1, 10))
    assert all(float(row["train_loss"]) > 0 for row in rows)


def test_checkpoints_the_shutdown_date_and_the_real_cost_beside_the_estimate_are_recorded(
    sft: OpenAISFT, log: Log
) -> None:
    results = sft.run_full_pipeline(2, 4, max_test_cases=1)
    record = record_of(sft)
    estimate, actual = record["estimate"]["training_usd"], record["cost"]["training_usd"]
    off = f"{actual / estimate - 1:+.1%}"

    assert len(record["checkpoints"]) == 2
    assert record["shutdown_date"] == "2027-01-14"
    assert actual == pytest.approx(record["trained_tokens"] * 3 / 1e6)
    assert any("実費" in line and off in line for line in log())
    assert any("2027-01-14" in line for line in log())
    usage = results["usage"]
    paid = (usage["prompt_tokens"] * 0.3 + usage["completion_tokens"] * 1.2) / 1e6
    assert record["cost"]["total_usd"] == pytest.approx(actual + paid)


def test_an_endpoint_that_tells_of_neither_checkpoints_nor_models_is_no_obstacle(
    sft: OpenAISFT, endpoint: Rehearsal
) -> None:
    endpoint.inject(Fault("404", "GET", "*/checkpoints", times=None))
    endpoint.inject(Fault("404", "GET", "/models/*", times=None))

    assert sft.run_full_pipeline(**SHORT)["summary"]["total_cases_evaluated"] == 2


@pytest.mark.parametrize("resumed", [False, True], ids=["at once", "after a resume"])
def test_a_model_that_is_still_loading_is_waited_for_with_the_first_case_and_no_probe(
    timed: MakeSFT, endpoint: Rehearsal, resumed: bool
) -> None:
    if resumed:
        stop_in_the_evaluation(timed(), endpoint)
    before = len(asked(endpoint, "POST", CHAT))
    endpoint.inject(Fault("404", "POST", CHAT, times=4))
    sft = timed()
    results = sft.resume() if resumed else sft.run_full_pipeline(**SHORT)
    chats = [str(e.request["messages"]) for e in asked(endpoint, "POST", CHAT)[before:]]

    assert results is not None
    assert results["summary"]["total_cases_evaluated"] == 2
    assert len(chats) == 6
    assert len(set(chats[:5])) == 1


def test_a_model_that_never_loads_is_given_up(
    timed: MakeSFT, endpoint: Rehearsal, clock: Clock
) -> None:
    endpoint.inject(Fault("404", "POST", CHAT, times=None))
    sft = timed()
    with pytest.raises(openai.NotFoundError):
        sft.run_full_pipeline(**SHORT)

    assert clock.now - clock.began < 1200


# ── Budget ───────────────────────────────────────────────────────────────────────────────────


def test_the_budget_covers_what_earlier_attempts_of_the_run_have_cost(
    timed: MakeSFT, endpoint: Rehearsal
) -> None:
    sft = timed()
    stop_in_the_evaluation(sft, endpoint)
    spent = record_of(sft)["cost"]["total_usd"]
    before = len(asked(endpoint, "POST", CHAT))
    with timed(max_cost_usd=spent) as later, pytest.raises(BudgetError) as caught:
        later.resume()
    text = str(caught.value)

    assert len(asked(endpoint, "POST", CHAT)) == before
    assert f"{spent:,.4f}" in text
    with timed(max_cost_usd=spent + 1) as later:
        assert later.resume() is not None


def test_what_the_record_says_was_paid_counts_before_a_job_is_asked_for(
    timed: MakeSFT, endpoint: Rehearsal
) -> None:
    endpoint.inject(Fault("401", "POST", JOBS))
    with timed() as sft, pytest.raises(openai.AuthenticationError):
        sft.run_full_pipeline(**SHORT)
    path = Path(sft.files["record"])
    record = read_json(path)
    price = record["estimate"]["total_usd"]
    paid = {"cost": {"training_usd": 1.5, "total_usd": 1.5}}
    path.write_text(json.dumps(record | paid), "utf-8")
    with timed(max_cost_usd=1.5 + price / 2) as later, pytest.raises(BudgetError) as caught:
        later.resume()

    assert made(endpoint, JOBS) == 0
    assert "1.5000" in str(caught.value)
    with timed(max_cost_usd=1.5 + 2 * price) as later:
        assert later.resume() is not None


def test_an_evaluation_stops_where_its_answers_and_the_training_have_passed_the_limit(
    timed: MakeSFT, endpoint: Rehearsal
) -> None:
    """Each answer costs 0.6 cents, many times what was estimated; the training was dear."""

    def long(request: Request, forward: Forward) -> Reply:
        reply = forward(request)
        if request.path != CHAT or reply.status != 200:
            return reply
        usage = {"prompt_tokens": 20_000, "completion_tokens": 0, "total_tokens": 20_000}
        return saying({**reply.json, "usage": usage})

    options: dict[str, Any] = {"client": None, "price": Price(1000.0, 0.3, 1.2)}
    with Gateway(endpoint, long) as gateway:
        sft = timed(base_url=gateway.url, **options)
        stop_in_the_evaluation(sft, endpoint)
        spent = record_of(sft)["cost"]["training_usd"]
        with (
            timed(base_url=gateway.url, max_cost_usd=spent + 0.004, **options) as later,
            pytest.raises(BudgetError, match="評価を止めました"),
        ):
            later.resume()

    assert spent > 0.1
    assert [e.status for e in asked(endpoint, "POST", CHAT)] == [429, 200]


def test_a_limit_and_a_price_once_given_hold_for_the_resumed_run(
    timed: MakeSFT, endpoint: Rehearsal
) -> None:
    endpoint.inject(Fault("401", "POST", JOBS))
    sft = timed(price=Price(3.0, 0.3, 1.2), max_cost_usd=0.06)
    with sft, pytest.raises(openai.AuthenticationError):
        sft.run_full_pipeline(**SHORT)
    record = Path(sft.files["record"])
    estimate = read_json(record)["estimate"]["total_usd"]
    kept = read_json(record)
    for name, value in (("max_cost_usd", 0.0001), ("price", asdict(Price(3e4, 0.3, 1.2)))):
        settings = {**kept["settings"], name: value}
        record.write_text(json.dumps({**kept, "settings": settings}), "utf-8")
        with pytest.raises(BudgetError):
            timed().resume()
    record.write_text(json.dumps(kept), "utf-8")

    assert estimate < 0.06
    assert timed().resume() is not None


@pytest.mark.parametrize("dearer", [{"max_cost_usd": 0.0001}, {"price": Price(3e4, 0.3, 1.2)}])
def test_a_limit_or_a_price_of_now_goes_before_the_recorded_one(
    timed: MakeSFT, endpoint: Rehearsal, dearer: dict[str, Any]
) -> None:
    endpoint.inject(Fault("401", "POST", JOBS))
    sft = timed(price=Price(3.0, 0.3, 1.2), max_cost_usd=0.06)
    with sft, pytest.raises(openai.AuthenticationError):
        sft.run_full_pipeline(**SHORT)
    with timed(**dearer) as limited, pytest.raises(BudgetError):
        limited.resume()
    sent = len(asked(endpoint, "POST", JOBS))
    both = {"max_cost_usd": 1e3, "price": Price(3e4, 0.3, 1.2)}
    results = timed(**both).resume()

    assert sent == 1
    assert results is not None
    assert results["cost"]["training_usd"] > 0.06


def test_an_unknown_price_stops_a_limited_run_before_anything_is_sent(
    timed: MakeSFT, endpoint: Rehearsal
) -> None:
    sft = timed(model="some-open-model", max_cost_usd=5)
    with pytest.raises(BudgetError, match="不明"):
        sft.run_full_pipeline(**SHORT)

    assert posts(endpoint) == []


# ── What a second look found ─────────────────────────────────────────────────────────────────


def test_a_job_sent_with_other_settings_is_never_taken_for_the_one_that_is_asked(
    timed: MakeSFT, endpoint: Rehearsal, file: Path
) -> None:
    with timed() as sft:
        file_id = sft.upload_training_file(file)
        endpoint.inject(Fault("reset_after", "POST", JOBS))
        endpoint.inject(Fault("401", "GET", JOBS))
        with pytest.raises(openai.AuthenticationError):
            sft.create_fine_tune_job(file_id, epochs=1)
        with pytest.raises(ConfigurationError, match="別の設定で送信したジョブ"):
            sft.create_fine_tune_job(file_id, epochs=3)

    assert made(endpoint, JOBS) == 1


def test_the_tokens_of_a_job_that_failed_are_a_cost_too(
    timed: MakeSFT, endpoint: Rehearsal, file: Path
) -> None:
    def trained(request: Request, forward: Forward) -> Reply:
        reply = forward(request)
        if "/ftjob-" not in request.path or reply.json.get("object") != "fine_tuning.job":
            return reply
        return saying({**reply.json, "trained_tokens": 1_000_000})

    endpoint.inject(Fault("job_failed", "POST", JOBS))
    with (
        Gateway(endpoint, trained) as gateway,
        timed(base_url=gateway.url, client=None) as sft,
    ):
        job = sft.monitor_fine_tune_job(start(sft, file))
        cost = record_of(sft)["cost"]

    assert job.status == "failed"
    assert cost["training_usd"] == pytest.approx(3.0)


def test_a_correction_after_a_failed_preparation_is_what_is_converted(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*records(12), {"dialogue": [{"role": "x"}]}])
    sft = OpenAISFT(
        offline=True, dataset=str(path), output_dir=tmp_path / "out", system_prompt="新しい指示"
    )
    with pytest.raises(DataError):
        sft.prepare_data()
    write_jsonl(path, records(12))
    train, _, _ = sft.load_and_split_dataset()

    assert all(e["messages"][0]["content"] == "新しい指示" for e in sft.prepare_dataset(train))
