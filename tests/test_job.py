"""Upload, create and watch: everything between a training file and a tuned model."""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from endpoint import Fault, Rehearsal
from faults import Clock
from helpers import Script, job, posts, read_json, training_file
from hypothesis import given
from hypothesis import strategies as st

from openai_sft import (
    BrokenAnswer,
    ConfigurationError,
    DataError,
    Declined,
    OpenAISFT,
    OpenAISFTError,
    explain_api_error,
    parse_result_file,
    retry_delay,
)

MakeSFT = Callable[..., OpenAISFT]
Log = Callable[[], list[str]]

JOBS = "/fine_tuning/jobs"
BROKEN = ["truncated", "malformed"]


@pytest.fixture
def sft(make_sft: MakeSFT) -> OpenAISFT:
    return make_sft()


def start(sft: OpenAISFT, file: Path, epochs: int = 1, batch_size: int = 4) -> str:
    return sft.create_fine_tune_job(sft.upload_training_file(file), epochs, batch_size)


def briefly(endpoint: Rehearsal, slept: list[float]) -> Callable[[float], None]:
    """A sleep that notes how long it was to be and waits for the endpoint, not for the time."""

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        endpoint.wait_for_progress(0.02)

    return sleep


def finish(endpoint: Rehearsal, sft: OpenAISFT, job_id: str) -> None:
    """Wait until a job is over without watching it by the library."""
    while sft.client.fine_tuning.jobs.retrieve(job_id).status not in ("succeeded", "failed"):
        endpoint.wait_for_progress(5)


def events(sft: OpenAISFT, job_id: str) -> list[str]:
    """What the endpoint has to tell of a job, oldest first, by the SDK's own paging."""
    return [e.message for e in sft.client.fine_tuning.jobs.list_events(job_id, limit=7)][::-1]


def shown(log: Log) -> list[str]:
    return [line.removeprefix("[イベント] ") for line in log() if line.startswith("[イベント] ")]


def run_record(sft: OpenAISFT) -> Any:
    return read_json(sft.files["record"])


# ── Upload ───────────────────────────────────────────────────────────────────────────────────


def test_the_file_arrives_byte_for_byte_to_be_trained_on(sft: OpenAISFT, file: Path) -> None:
    file_id = sft.upload_training_file(str(file))

    assert sft.client.files.content(file_id).content == file.read_bytes()
    assert sft.client.files.retrieve(file_id).purpose == "fine-tune"
    assert sft.client.files.retrieve(file_id).filename == file.name


@pytest.mark.parametrize("count", [0, 9])
def test_fewer_than_ten_training_examples_are_never_sent(
    sft: OpenAISFT, endpoint: Rehearsal, clean_environment: Path, count: int
) -> None:
    with pytest.raises(DataError, match="10件以上") as caught:
        sft.upload_training_file(training_file(clean_environment, count))

    assert f"{count}件" in str(caught.value)
    assert endpoint.exchanges == []


def test_a_validation_file_needs_one_example_and_no_more(
    sft: OpenAISFT, endpoint: Rehearsal, clean_environment: Path
) -> None:
    with pytest.raises(DataError):
        sft.upload_validation_file(training_file(clean_environment, 0))
    before = list(endpoint.exchanges)
    sft.upload_validation_file(training_file(clean_environment, 1))

    assert before == []
    assert len(posts(endpoint, "/files")) == 1


def test_a_training_file_that_is_not_there_is_an_error_of_the_data(
    sft: OpenAISFT, endpoint: Rehearsal
) -> None:
    with pytest.raises(DataError, match=r"nothing\.jsonl"):
        sft.upload_training_file("nothing.jsonl")

    assert endpoint.exchanges == []


# ── Create ───────────────────────────────────────────────────────────────────────────────────


def test_a_job_is_asked_for_with_exactly_what_was_chosen(
    sft: OpenAISFT, endpoint: Rehearsal, file: Path
) -> None:
    file_id, valid_id = sft.upload_training_file(file), sft.upload_validation_file(file)
    job_id = sft.create_fine_tune_job(
        file_id,
        epochs=3,
        batch_size=8,
        validation_file_id=valid_id,
        learning_rate_multiplier=1.8,
        suffix="心-😀",
        seed=7,
    )
    (asked,) = posts(endpoint, JOBS)

    metadata = asked.request.pop("metadata")

    assert job_id == asked.response["id"]
    assert metadata["openai_sft_run"] == Path(sft.files["record"]).stem
    assert asked.request == {
        "model": "gpt-4o-mini-2024-07-18",
        "training_file": file_id,
        "validation_file": valid_id,
        "suffix": "心-😀",
        "seed": 7,
        "method": {
            "type": "supervised",
            "supervised": {
                "hyperparameters": {
                    "n_epochs": 3,
                    "batch_size": 8,
                    "learning_rate_multiplier": 1.8,
                }
            },
        },
    }


def test_what_was_not_chosen_is_not_sent_and_the_defaults_are_ten_epochs_of_32(
    sft: OpenAISFT, endpoint: Rehearsal, file: Path
) -> None:
    endpoint.hold("validating_files")
    sft.create_fine_tune_job(sft.upload_training_file(file))
    (asked,) = posts(endpoint, JOBS)

    assert set(asked.request) == {"model", "training_file", "method", "metadata"}
    assert asked.request["method"]["supervised"] == {
        "hyperparameters": {"n_epochs": 10, "batch_size": 32}
    }


def test_auto_is_left_to_the_service(sft: OpenAISFT, endpoint: Rehearsal, file: Path) -> None:
    sft.create_fine_tune_job(
        sft.upload_training_file(file), "auto", "auto", learning_rate_multiplier="auto"
    )
    (asked,) = posts(endpoint, JOBS)

    assert asked.status == 200
    assert set(asked.request["method"]["supervised"]["hyperparameters"].values()) == {"auto"}


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 0},
        {"epochs": 51},
        {"epochs": 1.5},
        {"epochs": True},
        {"epochs": "many"},
        {"batch_size": 0},
        {"batch_size": 257},
        {"learning_rate_multiplier": 0},
        {"learning_rate_multiplier": -1.0},
        {"learning_rate_multiplier": float("nan")},
        {"learning_rate_multiplier": float("inf")},
        {"suffix": ""},
        {"suffix": "あ" * 65},
        {"seed": -1},
        {"seed": 2**31},
    ],
    ids=str,
)
def test_what_the_service_would_refuse_is_refused_by_name_before_it_is_sent(
    sft: OpenAISFT, endpoint: Rehearsal, options: dict[str, Any]
) -> None:
    (name,) = options

    with pytest.raises(ConfigurationError, match=name):
        sft.create_fine_tune_job("file-1", **options)

    assert endpoint.exchanges == []


@pytest.mark.parametrize(
    "options",
    [{"epochs": 50}, {"batch_size": 256}, {"suffix": "あ" * 64}, {"seed": 0}, {"seed": 2**31 - 1}],
    ids=str,
)
def test_the_limits_themselves_are_allowed(
    sft: OpenAISFT, endpoint: Rehearsal, file: Path, options: dict[str, Any]
) -> None:
    endpoint.hold("validating_files")
    sft.create_fine_tune_job(sft.upload_training_file(file), **options)

    assert posts(endpoint, JOBS)[0].status == 200


@pytest.mark.parametrize("fault", ["503", "reset_before"])
def test_a_job_that_was_not_created_is_asked_for_again(
    sft: OpenAISFT, endpoint: Rehearsal, file: Path, fault: str
) -> None:
    endpoint.inject(Fault(fault, "POST", JOBS))
    job_id = start(sft, file)
    requests = [asked.request for asked in posts(endpoint, JOBS) if asked.request]

    assert [one.id for one in sft.client.fine_tuning.jobs.list().data] == [job_id]
    assert all(one == requests[-1] for one in requests)


def test_a_job_that_was_created_is_on_record_before_it_is_watched(
    sft: OpenAISFT, file: Path
) -> None:
    job_id = start(sft, file)
    record = run_record(sft)

    assert record["job_id"] == job_id
    assert (
        record["uploads"]["training"]["file_id"] == record["job_intent"]["request"]["training_file"]
    )
    assert "fine_tuned_model" not in record


# ── Watch: the end of a job ──────────────────────────────────────────────────────────────────


def test_a_job_that_succeeds_comes_back_with_its_model_and_goes_on_record(
    sft: OpenAISFT, file: Path, log: Log
) -> None:
    ended = sft.monitor_fine_tune_job(start(sft, file))
    record = run_record(sft)

    assert ended.status == "succeeded"
    assert ended.fine_tuned_model
    assert record["fine_tuned_model"] == ended.fine_tuned_model
    assert record["job_status"] == "succeeded"
    assert "job_error" not in record
    assert record["trained_tokens"] == ended.trained_tokens
    assert any(ended.fine_tuned_model in line for line in log())
    assert not any("失敗" in line for line in log())


def test_the_models_of_two_jobs_of_one_instance_are_both_on_record(
    sft: OpenAISFT, file: Path
) -> None:
    ended = [sft.monitor_fine_tune_job(start(sft, file)) for _ in range(2)]
    kept = [read_json(path) for path in sorted(sft.output_dir.glob("run_*.json"))]

    assert [(one.get("job_id"), one.get("fine_tuned_model")) for one in kept] == [
        (job.id, job.fine_tuned_model) for job in ended
    ]
    assert all("final_metrics" in one for one in kept)


def test_a_second_job_of_one_instance_knows_its_data_and_not_the_plan_of_the_first(
    make_sft: MakeSFT, endpoint: Rehearsal, out: Path
) -> None:
    sft = make_sft()
    first = sft.run_full_pipeline(1, 4, 18, 3, max_test_cases=1)
    path = Path(sft.files["record"])
    before = path.read_bytes()
    own = sft.create_fine_tune_job(sft.upload_training_file(sft.files["train"]), 2, 8)
    ended = sft.monitor_fine_tune_job(own)
    kept = run_record(sft)
    again = make_sft().run_evaluation(ended.fine_tuned_model, max_test_cases=1)

    def asked(results: dict[str, Any]) -> list[str]:
        return [r["case_id"] for r in results["test_evaluation"]["responses"]]

    assert read_json(path) == json.loads(before)
    assert (kept["kind"], kept["job_id"]) == ("steps", own)
    assert {"plan", "evaluation", "finished_at"} & kept.keys() == set()
    assert kept["files"].keys() == {"train", "test", "valid", "manifest", "training_metrics"}
    assert kept["estimate"]["epochs"] == 2
    assert kept["cost"].keys() == {"training_usd", "total_usd"}
    assert again["model_id"] == ended.fine_tuned_model != first["model_id"]
    assert asked(again) == asked(first)
    assert again["settings"]["seed"] == 3
    assert make_sft().resume() is None


def test_a_second_job_that_was_refused_is_not_gone_on_with(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    sft = make_sft(confirm=lambda estimate: estimate.epochs != 2)
    sft.run_full_pipeline(1, 4, max_test_cases=1)
    file_id = sft.upload_training_file(sft.files["train"])
    with pytest.raises(Declined):
        sft.create_fine_tune_job(file_id, 2, 8)
    sft.close()

    assert make_sft().resume() is None
    assert len(posts(endpoint, JOBS)) == 1


def test_a_failed_job_is_returned_and_logged_with_the_services_code_and_message(
    sft: OpenAISFT, endpoint: Rehearsal, file: Path, log: Log
) -> None:
    endpoint.inject(Fault("job_failed", "POST", JOBS))
    ended = sft.monitor_fine_tune_job(start(sft, file))
    (line,) = (line for line in log() if line.startswith("ファインチューニング失敗"))

    assert ended.status == "failed"
    assert line.startswith("ファインチューニング失敗: failed")
    assert "server_error" in line
    assert "The job failed due to an internal error." in line
    assert run_record(sft)["job_error"] == {
        "code": "server_error",
        "message": "The job failed due to an internal error.",
    }


def test_the_services_verdict_on_a_file_is_shown_with_its_line(
    sft: OpenAISFT, file: Path, log: Log
) -> None:
    """A file that was sent without this library's checks."""
    text = file.read_text("utf-8").replace("相談3", "<|im_start|>")
    sent = sft.client.files.create(file=("a.jsonl", text.encode()), purpose="fine-tune")
    ended = sft.monitor_fine_tune_job(sft.create_fine_tune_job(sent.id, 1, 4))

    assert ended.status == "failed"
    assert any(
        "失敗" in line and "invalid_file_format" in line and "Line 3" in line for line in log()
    )


def test_a_cancelled_job_ends_the_watch(
    make_sft: MakeSFT, endpoint: Rehearsal, file: Path, log: Log
) -> None:
    endpoint.hold("running")
    sft = make_sft(sleep=lambda _: sft.client.fine_tuning.jobs.cancel(job_id))
    job_id = start(sft, file)
    ended = sft.monitor_fine_tune_job(job_id)

    assert ended.status == "cancelled"
    assert any(line.startswith("ファインチューニング失敗: cancelled") for line in log())


@pytest.mark.parametrize(
    "status", ["paused", "pausing", "pending", "なにか\x1b[31m新しい", ""], ids=ascii
)
def test_a_status_that_is_no_end_is_said_once_and_waited_out(
    make_sft: MakeSFT, status: str, log: Log
) -> None:
    answers = {"/jobs/ftjob-script": [job(status), job(status), job("succeeded")]}
    with Script(**answers) as script:
        sft = make_sft(base_url=script.url, sleep=lambda _: None)
        ended = sft.monitor_fine_tune_job("ftjob-script")
    told = [line.partition("の状態: ")[2] for line in log() if "の状態: " in line]

    assert ended.status == "succeeded"
    assert len([line for line in script.asked if line.endswith("/ftjob-script")]) == 3
    assert len(told) == 1 + bool(status)  # it, if it is anything, and the end: each once
    assert told[0].startswith(status.partition("\x1b")[0])
    assert not any("\x1b" in line for line in log())


def test_an_empty_error_object_is_no_error(make_sft: MakeSFT, log: Log) -> None:
    empty = {"code": None, "message": None, "param": None}
    with Script(**{"/jobs/ftjob-script": [job("cancelled", error=empty)]}) as script:
        make_sft(base_url=script.url).monitor_fine_tune_job("ftjob-script")
    (line,) = (line for line in log() if line.startswith("ファインチューニング失敗"))

    assert "cancelled" in line
    assert "None" not in line


def test_a_message_of_the_service_can_neither_break_a_line_nor_colour_the_terminal(
    make_sft: MakeSFT, log: Log
) -> None:
    error = {"code": "bad\x07", "message": "one\ntwo\x1b[31m\u2028three", "param": None}
    with Script(**{"/jobs/ftjob-script": [job("failed", error=error)]}) as script:
        make_sft(base_url=script.url).monitor_fine_tune_job("ftjob-script")
    (line,) = (line for line in log() if line.startswith("ファインチューニング失敗"))

    assert line.isprintable()
    assert "one" in line
    assert "two" in line
    assert "three" in line


# ── Watch: events ────────────────────────────────────────────────────────────────────────────


def test_every_event_is_shown_once_and_oldest_first_while_the_job_goes_on(
    sft: OpenAISFT, file: Path, log: Log
) -> None:
    job_id = start(sft, file, epochs=5, batch_size=2)
    sft.monitor_fine_tune_job(job_id)

    assert shown(log) == events(sft, job_id)
    assert len(shown(log)) >= 30


def test_more_events_than_a_page_holds_are_all_shown_in_order(
    sft: OpenAISFT, endpoint: Rehearsal, file: Path, log: Log
) -> None:
    job_id = start(sft, file, epochs=20, batch_size=1)
    finish(endpoint, sft, job_id)
    sft.monitor_fine_tune_job(job_id)
    expected = events(sft, job_id)

    assert len(expected) > 240
    assert shown(log) == expected
    assert [line.split(":")[0] for line in shown(log) if line.startswith("Step ")] == [
        f"Step {n}/240" for n in range(1, 241)
    ]


def test_events_are_shown_before_the_job_is_over(
    make_sft: MakeSFT, endpoint: Rehearsal, file: Path, log: Log
) -> None:
    seen_while_held: list[list[str]] = []

    def sleep(_: float) -> None:
        if any("の状態: running" in line for line in log()):
            seen_while_held.append(shown(log))
            endpoint.release()
        endpoint.wait_for_progress(5)

    endpoint.hold("running")
    sft = make_sft(sleep=sleep)
    job_id = start(sft, file)
    sft.monitor_fine_tune_job(job_id)

    assert seen_while_held[0][0] == f"Created fine-tuning job: {job_id}"
    assert "The job has successfully completed" not in seen_while_held[0]
    assert shown(log)[-1] == "The job has successfully completed"


@pytest.mark.parametrize("fault", ["500", *BROKEN])
def test_a_page_of_events_that_fails_is_asked_for_again_and_no_event_is_lost(
    make_sft: MakeSFT, endpoint: Rehearsal, file: Path, log: Log, fault: str
) -> None:
    slept: list[float] = []
    sft = make_sft(sleep=briefly(endpoint, slept))
    job_id = start(sft, file, epochs=10, batch_size=1)
    finish(endpoint, sft, job_id)
    endpoint.inject(Fault(fault, "GET", "*/events", skip=1))
    sft.monitor_fine_tune_job(job_id)

    assert shown(log) == events(sft, job_id)
    assert len(slept) == 1


# ── Watch: what an endpoint lacks ────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("status", "path"),
    [("404", "*/events"), ("405", "*/events"), ("501", "*/events"), ("404", "/files/*/content")],
)
def test_a_part_of_the_api_that_is_missing_is_logged_once_and_gone_past(
    sft: OpenAISFT, endpoint: Rehearsal, file: Path, log: Log, status: str, path: str
) -> None:
    endpoint.inject(Fault(status, "GET", path, times=None))
    first = sft.monitor_fine_tune_job(start(sft, file))
    second = sft.monitor_fine_tune_job(start(sft, file))

    assert (first.status, second.status) == ("succeeded", "succeeded")
    assert sum("対応していません" in line and status in line for line in log()) == 1
    assert second.fine_tuned_model in [
        read_json(path).get("fine_tuned_model") for path in sft.output_dir.glob("run_*.json")
    ]


def test_a_job_that_is_not_there_is_an_error_and_not_a_missing_part(sft: OpenAISFT) -> None:
    with pytest.raises(openai.NotFoundError):
        sft.monitor_fine_tune_job("ftjob-nothing")


# ── Watch: faults ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("401", openai.AuthenticationError),
        ("403", openai.PermissionDeniedError),
        ("400", openai.BadRequestError),
        ("insufficient_quota", openai.RateLimitError),
    ],
)
def test_what_waiting_cannot_cure_is_raised_at_once(
    make_sft: MakeSFT, endpoint: Rehearsal, file: Path, fault: str, error: type[Exception]
) -> None:
    slept: list[float] = []
    sft = make_sft(sleep=briefly(endpoint, slept))
    job_id = start(sft, file)
    endpoint.inject(Fault(fault, "GET", f"{JOBS}/*"))
    with pytest.raises(error):
        sft.monitor_fine_tune_job(job_id)

    assert slept == []


def test_a_watch_outlasts_an_outage_of_hours(
    make_sft: MakeSFT, endpoint: Rehearsal, file: Path, log: Log
) -> None:
    clock = Clock(endpoint)
    sft = make_sft(clock=clock, sleep=clock.sleep)
    job_id = start(sft, file)
    endpoint.inject(Fault("429", "GET", f"{JOBS}/*", times=15, seconds=600))
    started = clock.now
    ended = sft.monitor_fine_tune_job(job_id)

    assert ended.status == "succeeded"
    assert clock.now - started > 2 * 3600
    assert sum("回復するまで待ちます" in line for line in log()) == 1
    assert sum("接続が回復しました（" in line for line in log()) == 1


def test_any_other_call_is_given_up_after_ten_minutes(
    make_sft: MakeSFT, endpoint: Rehearsal, file: Path
) -> None:
    clock = Clock(endpoint)
    sft = make_sft(clock=clock, sleep=clock.sleep)
    endpoint.hold("running")
    job_id = start(sft, file)
    endpoint.inject(Fault("503", "POST", f"{JOBS}/*/cancel", times=None))
    started = clock.now
    with pytest.raises(openai.InternalServerError):
        sft.cancel_job(job_id)

    assert 500 <= clock.now - started <= 600


def test_the_services_own_retry_after_is_honoured(
    make_sft: MakeSFT, endpoint: Rehearsal, file: Path
) -> None:
    slept: list[float] = []
    sft = make_sft(sleep=briefly(endpoint, slept))
    job_id = start(sft, file)
    finish(endpoint, sft, job_id)
    endpoint.inject(Fault("429", "GET", f"{JOBS}/*", seconds=17))
    sft.monitor_fine_tune_job(job_id)

    assert slept == [17]


def test_the_time_between_polls_grows_to_the_interval_and_no_further(
    make_sft: MakeSFT, endpoint: Rehearsal, file: Path
) -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 9:
            endpoint.release()
        if len(slept) >= 9:
            endpoint.wait_for_progress(5)

    endpoint.hold("validating_files")
    sft = make_sft(sleep=sleep, poll_interval=30)
    sft.monitor_fine_tune_job(start(sft, file))

    assert slept == sorted(slept)
    assert slept[0] < 30
    assert slept[8] == max(slept) == 30


@given(st.integers(0, 10_000), st.none() | st.floats(), st.floats(0, 1))
def test_a_retry_waits_between_a_moment_and_ten_minutes(
    attempt: int, retry_after: float | None, jitter: float
) -> None:
    delay = retry_delay(attempt, retry_after, jitter)

    assert 0.25 < delay <= 600
    if retry_after is not None and 0 <= retry_after <= 600:
        assert delay >= retry_after


@given(st.integers(0, 30), st.floats(0, 1))
def test_retries_become_rarer_up_to_one_a_minute(attempt: int, jitter: float) -> None:
    assert retry_delay(attempt, None, jitter) <= 60
    assert retry_delay(attempt + 1, None, jitter) >= retry_delay(attempt, None, jitter)


# ── Result metrics ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("faults", [[], ["base64_result"]], ids=["plain", "base64"])
def test_the_result_metrics_are_saved_however_the_file_is_encoded(
    sft: OpenAISFT, endpoint: Rehearsal, file: Path, faults: list[str]
) -> None:
    for fault in faults:
        endpoint.inject(Fault(fault))
    sft.monitor_fine_tune_job(start(sft, file, epochs=2, batch_size=4))
    with Path(sft.files["training_metrics"]).open(encoding="utf-8", newline="") as table:
        rows = list(csv.DictReader(table))
    final = run_record(sft)["final_metrics"]

    assert [float(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    last = {key: float(value) for key, value in rows[-1].items() if value}
    assert final.items() <= last.items()
    assert last.keys() - final.keys() == {"created_at"}


def test_a_result_file_that_is_none_is_told_and_the_model_is_kept(
    sft: OpenAISFT, endpoint: Rehearsal, file: Path, log: Log
) -> None:
    endpoint.inject(Fault("malformed", "GET", "/files/*/content", times=None))
    ended = sft.monitor_fine_tune_job(start(sft, file))

    table = Path(sft.files["training_metrics"]).read_text("utf-8")

    assert ended.status == "succeeded"
    assert any("結果ファイル" in line for line in log())
    assert [line.split(",")[0] for line in table.splitlines()] == ["step", "1", "2", "3"]
    assert run_record(sft)["fine_tuned_model"] == ended.fine_tuned_model


TABLE = (
    b"step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n"
    b"1,2.5,0.1,,\n2,1.5,0.2,1.75,0.3\n"
)


@pytest.mark.parametrize(
    "content",
    [TABLE, base64.b64encode(TABLE), b"\xef\xbb\xbf" + TABLE, TABLE.replace(b"\n", b"\r\n")],
    ids=["plain", "base64", "byte order mark", "crlf"],
)
def test_a_result_file_is_read_by_its_header_and_empty_cells_are_no_numbers(
    content: bytes,
) -> None:
    assert parse_result_file(content) == [
        {"step": 1, "train_loss": 2.5, "train_accuracy": 0.1},
        {
            "step": 2,
            "train_loss": 1.5,
            "train_accuracy": 0.2,
            "valid_loss": 1.75,
            "valid_mean_token_accuracy": 0.3,
        },
    ]


def test_the_columns_of_another_endpoint_in_another_order_are_read_too() -> None:
    assert parse_result_file(b"full_valid_loss,step\n0.5,7\n") == [
        {"full_valid_loss": 0.5, "step": 7}
    ]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "step の列がありません"),
        (b"<html>Bad gateway</html>", "CSVでもBase64でもありません"),
        (b"\xff\xfe\x00step", "0xff"),
        (base64.b64encode(b"<html>"), "step の列がありません"),
        (b"step,train_loss\n1,much\n", "much"),
        (b'step,train_loss\n1,"' + b"9" * 200_000 + b'"\n', "limit"),
    ],
    ids=["empty", "html", "bytes", "base64 html", "no number", "endless cell"],
)
def test_what_is_no_result_file_is_a_value_error(content: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_result_file(content)


# ── Errors of the service in one line ────────────────────────────────────────────────────────


@pytest.fixture
def failures(sft: OpenAISFT, endpoint: Rehearsal) -> Callable[[str], Exception]:
    def fail(fault: str) -> Exception:
        endpoint.inject(Fault(fault, "GET", "/models"))
        with pytest.raises(openai.OpenAIError) as caught:
            sft.client.models.list()
        return caught.value

    return fail


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("401", "OPENAI_API_KEY"),
        ("403", "権限"),
        ("404", "見つかりません"),
        ("429", "回数の上限"),
        ("insufficient_quota", "支払い"),
        ("training_not_available", "ファインチューニングができません"),
        ("503", "しばらく待って"),
        ("reset_before", "接続できません"),
    ],
)
def test_an_error_of_the_service_is_one_line_that_says_what_to_do(
    failures: Callable[[str], Exception], fault: str, words: str
) -> None:
    text = explain_api_error(failures(fault))

    assert words in text
    assert text.isprintable()


def test_the_librarys_own_errors_have_one_root() -> None:
    assert issubclass(BrokenAnswer, OpenAISFTError)
    assert issubclass(DataError, OpenAISFTError)
    assert issubclass(DataError, ValueError)


def test_jobs_that_are_watched_in_another_order_than_made_keep_their_own_records(
    sft: OpenAISFT, file: Path
) -> None:
    first, second = start(sft, file), start(sft, file)
    ended = [sft.monitor_fine_tune_job(job_id) for job_id in (first, second)]
    kept = [read_json(path) for path in sorted(sft.output_dir.glob("run_*.json"))]

    assert {one["job_id"]: one["fine_tuned_model"] for one in kept} == {
        job.id: job.fine_tuned_model for job in ended
    }


def test_a_job_made_elsewhere_does_not_take_the_record_of_the_instances_own(
    sft: OpenAISFT, file: Path
) -> None:
    own = start(sft, file)
    sent = sft.client.files.create(file=file, purpose="fine-tune").id
    other = sft.client.fine_tuning.jobs.create(model="gpt-4.1-2025-04-14", training_file=sent)
    ended = [sft.monitor_fine_tune_job(job_id) for job_id in (other.id, own)]
    kept = [read_json(path) for path in sorted(sft.output_dir.glob("run_*.json"))]

    assert [(one["kind"], one["job_id"], one["fine_tuned_model"]) for one in kept] == [
        ("steps", own, ended[1].fine_tuned_model),
        ("job", other.id, ended[0].fine_tuned_model),
    ]
