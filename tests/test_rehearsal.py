"""The rehearsal endpoint, through the official client and over bare sockets."""

from __future__ import annotations

import base64
import csv
import http.client
import io
import itertools
import json
import math
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import judge
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openai_sft_rehearsal import (
    Fault,
    Rehearsal,
    example_dialogues,
    judge_training_file,
    main,
)

PROJECT = Path(__file__).parents[1]
BASE = "gpt-4o-mini-2024-07-18"
BOM = b"\xef\xbb\xbf"


def example(number: int) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"{number}日ほど眠れません。仕事が不安です。\r\n\u2028🌙"},
            {"role": "assistant", "content": f"{number}日も。おつらいですね。何が不安ですか？"},
        ]
    }


def jsonl(*records: Any) -> bytes:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()


def examples(count: int) -> bytes:
    return jsonl(*map(example, range(count)))


def dialogue_files() -> tuple[bytes, bytes]:
    """The example dialogues as a training and a validation file."""
    records = []
    for dialogue in example_dialogues():
        turns: Any = dialogue["dialogue"]
        messages = [
            {
                "role": "assistant" if turn["role"] == "counselor" else "user",
                "content": turn["utterance"],
            }
            for turn in turns
        ]
        while messages[-1]["role"] != "assistant":
            messages.pop()
        records.append({"messages": messages})
    return jsonl(*records[4:]), jsonl(*records[:4])


def client_of(endpoint: Rehearsal, **options: Any) -> openai.OpenAI:
    settings: dict[str, Any] = {"max_retries": 0, "timeout": 10, **options}
    return openai.OpenAI(base_url=endpoint.url, api_key="rehearsal", **settings)


@pytest.fixture
def endpoint() -> Iterator[Rehearsal]:
    """An endpoint; at the end OpenAI's description finds nothing wrong in what was said."""
    with Rehearsal(keep_exchanges=True, max_file_bytes=100_000) as running:
        yield running
        assert judge.check_exchanges(running.exchanges) == []


@pytest.fixture
def client(endpoint: Rehearsal) -> Iterator[openai.OpenAI]:
    with client_of(endpoint) as connected:
        yield connected


def upload(client: openai.OpenAI, data: bytes, name: str = "train.jsonl") -> str:
    return client.files.create(file=(name, data), purpose="fine-tune").id


def start_job(client: openai.OpenAI, data: bytes | None = None, **options: Any) -> Any:
    file = upload(client, examples(20) if data is None else data)
    settings: dict[str, Any] = {"model": BASE, "training_file": file, "seed": 1, **options}
    return client.fine_tuning.jobs.create(**settings)


def wait_until(endpoint: Rehearsal, client: openai.OpenAI, job: str, *wanted: str) -> Any:
    for _ in range(10_000):
        found = client.fine_tuning.jobs.retrieve(job)
        if found.status in wanted:
            return found
        assert endpoint.wait_for_progress(10), f"still {found.status}"
    raise AssertionError(f"never {wanted}")


def finish(endpoint: Rehearsal, client: openai.OpenAI, job: Any) -> Any:
    return wait_until(endpoint, client, job.id, "succeeded", "failed", "cancelled")


def hyperparameters(**values: Any) -> dict[str, Any]:
    return {"type": "supervised", "supervised": {"hyperparameters": values}}


def ask(client: openai.OpenAI, model: str, text: str = "眠れません", **options: Any) -> Any:
    settings: dict[str, Any] = {"messages": [{"role": "user", "content": text}], **options}
    return client.chat.completions.create(model=model, **settings)


@pytest.fixture(scope="module")
def trained() -> Iterator[tuple[Rehearsal, openai.OpenAI, Any]]:
    """A finished job on the example dialogues, shared by the tests that only look at it."""
    with Rehearsal(keep_exchanges=True) as running, client_of(running) as connected:
        training, validation = dialogue_files()
        job = start_job(
            connected,
            training,
            validation_file=upload(connected, validation),
            suffix="kokoro",
            metadata={"purpose": "test"},
            method=hyperparameters(n_epochs=4, batch_size=4),
        )
        yield running, connected, finish(running, connected, job)
        assert judge.check_exchanges(running.exchanges) == []


# --- Models, files, uploads -----------------------------------------------------------------------


def test_models_are_listed_with_the_day_they_shut_down(client: openai.OpenAI) -> None:
    names = {model.id for model in client.models.list()}
    tunable: Any = client.models.retrieve(BASE)

    assert {BASE, "gpt-4o-mini", "gpt-4.1-nano-2025-04-14"} <= names
    assert (tunable.owned_by, tunable.shutdown_date) == ("rehearsal", "2027-01-14")


def test_a_file_comes_back_as_it_was_sent(client: openai.OpenAI) -> None:
    data = examples(3) + b"\r\n--not-the-boundary\r\n\r\n\x00"
    file = client.files.create(file=("訓練 1%.jsonl", data), purpose="fine-tune")

    assert client.files.content(file.id).content == data
    assert client.files.retrieve(file.id).filename == "訓練 1%.jsonl"
    assert (file.bytes, file.status) == (len(data), "processed")


def test_files_are_listed_in_pages_by_purpose_and_order(client: openai.OpenAI) -> None:
    ids = [upload(client, examples(1)) for _ in range(5)]
    client.files.create(file=("a.txt", b"x"), purpose="user_data")

    assert [f.id for f in client.files.list(purpose="fine-tune", limit=2)] == ids[::-1]
    assert [f.id for f in client.files.list(purpose="fine-tune", order="asc")] == ids
    assert client.files.list(purpose="batch").data == []


def test_a_deleted_file_is_gone(client: openai.OpenAI) -> None:
    file = upload(client, examples(1))

    assert client.files.delete(file).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file)


@pytest.mark.parametrize(
    ("name", "data", "status"),
    [("train.json", b"{}", 400), ("train.jsonl", b"", 400), ("train.jsonl", b"x" * 100_001, 413)],
    ids=["not .jsonl", "empty", "too large"],
)
def test_a_file_outside_the_limits_is_refused(
    client: openai.OpenAI, name: str, data: bytes, status: int
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        upload(client, data, name)

    assert caught.value.status_code == status
    assert caught.value.param == "file"


def test_a_request_over_every_limit_is_read_to_its_end_and_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        upload(client, bytes(70 * 1024 * 1024))

    assert caught.value.status_code == 413
    assert client.files.list().data == []


def test_an_unknown_purpose_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="purposes"):
        client.files.create(file=("a.jsonl", b"x"), purpose="training")  # type: ignore[arg-type]


def test_a_large_file_is_read_without_copying_it_again_and_again() -> None:
    data = b"x" * 100_000_000
    with Rehearsal() as endpoint, client_of(endpoint) as client:
        assert client.files.create(file=("a.jsonl", data), purpose="fine-tune").bytes == len(data)


def begin_upload(client: openai.OpenAI, size: int) -> str:
    return client.uploads.create(
        filename="a.jsonl", purpose="fine-tune", bytes=size, mime_type="application/jsonl"
    ).id


def test_parts_become_a_file_in_the_order_of_completion(client: openai.OpenAI) -> None:
    upload_id = begin_upload(client, 6)
    last = client.uploads.parts.create(upload_id, data=b"def").id
    first = client.uploads.parts.create(upload_id, data=b"abc").id
    done = client.uploads.complete(upload_id, part_ids=[first, last])

    assert done.status == "completed"
    assert done.file is not None
    assert client.files.content(done.file.id).content == b"abcdef"
    with pytest.raises(openai.BadRequestError, match="completed"):
        client.uploads.parts.create(upload_id, data=b"x")


def test_the_clients_chunked_upload_works(client: openai.OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(examples(30))
    done = client.uploads.upload_file_chunked(
        file=path, mime_type="application/jsonl", purpose="fine-tune", part_size=500
    )

    assert done.file is not None
    assert client.files.content(done.file.id).content == examples(30)


def test_an_upload_must_have_the_bytes_it_announced(client: openai.OpenAI) -> None:
    upload_id = begin_upload(client, 5)
    part = client.uploads.parts.create(upload_id, data=b"abc").id

    with pytest.raises(openai.BadRequestError, match="exceed"):
        client.uploads.parts.create(upload_id, data=b"def")
    with pytest.raises(openai.BadRequestError, match="3 bytes"):
        client.uploads.complete(upload_id, part_ids=[part])
    with pytest.raises(openai.BadRequestError, match="part_ids"):
        client.uploads.complete(upload_id, part_ids=["part_unknown"])
    assert client.uploads.cancel(upload_id).status == "cancelled"


def test_an_upload_over_eight_gigabytes_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="bytes"):
        begin_upload(client, 8 * 1024**3 + 1)


def test_an_upload_expires_after_an_hour() -> None:
    now = [1_800_000_000.0]
    with Rehearsal(clock=lambda: now[0]) as endpoint, client_of(endpoint) as client:
        upload_id = begin_upload(client, 3)
        now[0] += 3600

        with pytest.raises(openai.BadRequestError, match="expired"):
            client.uploads.parts.create(upload_id, data=b"abc")


# --- The life of a job ----------------------------------------------------------------------------


def test_a_job_ends_with_a_model_and_what_it_took(
    trained: tuple[Rehearsal, openai.OpenAI, Any],
) -> None:
    _, client, job = trained
    training, _ = dialogue_files()
    characters = sum(
        len(message["content"])
        for line in training.splitlines()
        for message in json.loads(line)["messages"]
    )

    assert job.status == "succeeded"
    assert job.error is None
    assert re.fullmatch(rf"ft:{BASE}:rehearsal:kokoro:\w{{8}}", job.fine_tuned_model)
    assert job.trained_tokens == 4 * characters
    assert job.hyperparameters.n_epochs == 4
    assert job.method.supervised.hyperparameters.batch_size == 4
    assert job.hyperparameters.learning_rate_multiplier == 1.0
    assert job.finished_at >= job.created_at
    assert client.models.retrieve(job.fine_tuned_model).id == job.fine_tuned_model


def metrics_of(client: openai.OpenAI, job: Any) -> list[dict[str, Any]]:
    events: list[Any] = list(client.fine_tuning.jobs.list_events(job.id))
    return [event.data for event in events[::-1] if event.type == "metrics"]


def test_losses_fall_over_the_epochs_and_accuracy_rises(
    trained: tuple[Rehearsal, openai.OpenAI, Any],
) -> None:
    _, client, job = trained
    steps = metrics_of(client, job)
    epochs = [steps[start : start + 5] for start in range(0, 20, 5)]
    losses = [sum(step["train_loss"] for step in epoch) for epoch in epochs]
    accuracies = [sum(step["train_mean_token_accuracy"] for step in epoch) for epoch in epochs]

    assert [step["step"] for step in steps] == list(range(1, 21))
    assert {step["total_steps"] for step in steps} == {20}
    assert losses == sorted(losses, reverse=True)
    assert accuracies[0] < min(accuracies[1:])
    assert ["full_valid_loss" in step for step in steps] == ([False] * 4 + [True]) * 4
    assert steps[4]["full_valid_loss"] > steps[-1]["train_loss"]  # learned by heart, not by sense


def test_the_first_loss_is_that_of_knowing_nothing(
    trained: tuple[Rehearsal, openai.OpenAI, Any],
) -> None:
    _, client, job = trained
    first = metrics_of(client, job)[0]

    assert first["train_loss"] == pytest.approx(math.log(0x110000), abs=1e-5)
    assert first["train_mean_token_accuracy"] == 0


def test_every_event_is_paged_through_once_newest_first(
    trained: tuple[Rehearsal, openai.OpenAI, Any],
) -> None:
    _, client, job = trained
    page = client.fine_tuning.jobs.list_events(job.id)
    every = [event.id for event in client.fine_tuning.jobs.list_events(job.id, limit=7)]

    assert len(page.data) == 20
    assert page.has_more
    assert page.data[0].message == "The job has successfully completed"
    assert len(every) == len(set(every)) > 20
    assert [event.id for event in page] == every


def test_the_last_three_epochs_leave_checkpoints(
    trained: tuple[Rehearsal, openai.OpenAI, Any],
) -> None:
    _, client, job = trained
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))

    assert [checkpoint.step_number for checkpoint in checkpoints] == [20, 15, 10]
    assert checkpoints[0].metrics.full_valid_loss is not None
    for checkpoint in checkpoints:
        name = checkpoint.fine_tuned_model_checkpoint
        assert name == f"{job.fine_tuned_model}:ckpt-step-{checkpoint.step_number}"
        assert ask(client, name).choices[0].message.content


def test_the_result_file_has_the_losses_of_the_events(
    trained: tuple[Rehearsal, openai.OpenAI, Any],
) -> None:
    _, client, job = trained
    (name,) = job.result_files
    text = client.files.content(name).text
    rows = list(csv.DictReader(io.StringIO(text)))

    assert text.splitlines()[0] == (
        "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    )
    assert [float(row["train_loss"]) for row in rows] == [
        step["train_loss"] for step in metrics_of(client, job)
    ]
    assert {row["valid_loss"] == "" for row in rows} == {True, False}
    assert client.files.retrieve(name).purpose == "fine-tune-results"


def test_the_same_seed_gives_the_same_run(endpoint: Rehearsal, client: openai.OpenAI) -> None:
    runs = [
        metrics_of(client, finish(endpoint, client, start_job(client, seed=seed)))
        for seed in (7, 7, 8)
    ]

    assert runs[0] == runs[1] != runs[2]


def test_text_of_weight_0_is_not_learned(endpoint: Rehearsal, client: openai.OpenAI) -> None:
    silent = {"role": "assistant", "content": "ヌヌヌヌヌ", "weight": 0}
    records = [{"messages": [silent, *example(n)["messages"]]} for n in range(10)]
    job = finish(endpoint, client, start_job(client, jsonl(*records)))
    answers = [ask(client, job.fine_tuned_model, seed=n).choices[0].message for n in range(20)]

    assert not any("ヌ" in answer.content for answer in answers)


def test_auto_is_resolved_and_the_deprecated_place_is_read(
    endpoint: Rehearsal, client: openai.OpenAI
) -> None:
    job = start_job(client, hyperparameters={"n_epochs": 2, "batch_size": "auto"})
    done = finish(endpoint, client, job)

    assert job.hyperparameters.batch_size == "auto"
    assert done.hyperparameters.n_epochs == 2
    assert done.method.supervised.hyperparameters.batch_size == 1


def test_jobs_are_found_by_their_metadata(endpoint: Rehearsal, client: openai.OpenAI) -> None:
    mine = start_job(client, metadata={"run": "a b&c", "k": "v"})
    other = start_job(client, metadata={"run": "other"})
    bare = start_job(client)
    jobs = client.fine_tuning.jobs

    assert [job.id for job in jobs.list()] == [bare.id, other.id, mine.id]
    assert [job.id for job in jobs.list(limit=1)] == [bare.id, other.id, mine.id]
    assert [job.id for job in jobs.list(metadata={"run": "a b&c"})] == [mine.id]
    assert [job.id for job in jobs.list(metadata={"run": "a b&c", "k": "x"})] == []


def test_a_held_job_stays_until_released(endpoint: Rehearsal, client: openai.OpenAI) -> None:
    endpoint.hold("queued")
    job = start_job(client)
    wait_until(endpoint, client, job.id, "queued")

    while endpoint.wait_for_progress(0.05):
        pass
    assert client.fine_tuning.jobs.retrieve(job.id).status == "queued"
    endpoint.release()
    assert finish(endpoint, client, job).status == "succeeded"


def test_progress_before_the_call_counts(endpoint: Rehearsal, client: openai.OpenAI) -> None:
    assert not endpoint.wait_for_progress(0)
    endpoint.hold("validating_files")
    start_job(client)
    assert endpoint.wait_for_progress(0)
    assert not endpoint.wait_for_progress(0)


def test_a_job_pauses_and_resumes(endpoint: Rehearsal, client: openai.OpenAI) -> None:
    endpoint.hold("running")
    job = start_job(client)
    wait_until(endpoint, client, job.id, "running")
    asked: Any = client.fine_tuning.jobs.pause(job.id)
    wait_until(endpoint, client, job.id, "paused")

    assert asked.status == "pausing"
    with pytest.raises(openai.BadRequestError):
        client.fine_tuning.jobs.pause(job.id)
    endpoint.release()
    assert client.fine_tuning.jobs.resume(job.id).status == "running"
    assert finish(endpoint, client, job).status == "succeeded"
    with pytest.raises(openai.BadRequestError):
        client.fine_tuning.jobs.resume(job.id)


def test_a_paused_job_lets_the_next_one_pass(endpoint: Rehearsal, client: openai.OpenAI) -> None:
    endpoint.inject(Fault("paused_job"))
    waiting = start_job(client)

    assert finish(endpoint, client, start_job(client)).status == "succeeded"
    assert wait_until(endpoint, client, waiting.id, "paused").finished_at is None


@pytest.mark.parametrize("status", ["validating_files", "queued", "running"])
def test_a_job_is_cancelled_at_any_time(
    endpoint: Rehearsal, client: openai.OpenAI, status: str
) -> None:
    endpoint.hold(status)
    job = start_job(client)
    wait_until(endpoint, client, job.id, status)
    cancelled = client.fine_tuning.jobs.cancel(job.id)
    endpoint.release()
    finish(endpoint, client, start_job(client))

    assert cancelled.status == "cancelled"
    assert client.fine_tuning.jobs.retrieve(job.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError):
        client.fine_tuning.jobs.cancel(job.id)


# --- What a job is refused for --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("method.supervised.hyperparameters.n_epochs", {"method": hyperparameters(n_epochs=0)}),
        ("method.supervised.hyperparameters.n_epochs", {"method": hyperparameters(n_epochs=51)}),
        ("method.supervised.hyperparameters.n_epochs", {"method": hyperparameters(n_epochs="3")}),
        ("method.supervised.hyperparameters.n_epochs", {"method": hyperparameters(n_epochs=True)}),
        ("method.supervised.hyperparameters.batch_size", {"method": hyperparameters(batch_size=0)}),
        (
            "method.supervised.hyperparameters.batch_size",
            {"method": hyperparameters(batch_size=257)},
        ),
        ("hyperparameters.batch_size", {"hyperparameters": {"batch_size": 1.5}}),
        (
            "method.supervised.hyperparameters.learning_rate_multiplier",
            {"method": hyperparameters(learning_rate_multiplier=0)},
        ),
        ("method.supervised.hyperparameters", {"method": hyperparameters(epochs=1)}),
        ("method", {"method": {"type": "dpo"}}),
        ("suffix", {"suffix": ""}),
        ("suffix", {"suffix": "x" * 65}),
        ("seed", {"seed": -1}),
        ("seed", {"seed": 2**31}),
        ("seed", {"seed": "1"}),
        ("metadata", {"metadata": {str(n): "" for n in range(17)}}),
        ("metadata", {"metadata": {"k" * 65: ""}}),
        ("metadata.k", {"metadata": {"k": "v" * 513}}),
        ("metadata.k", {"metadata": {"k": 1}}),
        ("training_file", {"training_file": "file-unknown"}),
        ("validation_file", {"validation_file": "file-unknown"}),
        ("model", {"model": "gpt-2"}),
        ("trainingType", {"extra_body": {"trainingType": "Standard"}}),
    ],
    ids=lambda value: value if isinstance(value, str) else json.dumps(value)[:40],
)
def test_a_job_outside_the_limits_is_refused(
    client: openai.OpenAI, param: str, body: dict[str, Any]
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        start_job(client, **body)

    assert caught.value.param == param
    assert client.fine_tuning.jobs.list().data == []


def test_the_widest_limits_are_accepted(endpoint: Rehearsal, client: openai.OpenAI) -> None:
    endpoint.hold("validating_files")
    job = start_job(
        client,
        method=hyperparameters(n_epochs=50, batch_size=256, learning_rate_multiplier=0.001),
        suffix="x" * 64,
        seed=2**31 - 1,
        metadata={f"{n:064}": "v" * 512 for n in range(16)},
    )

    assert job.status == "validating_files"


def test_only_a_fine_tune_file_trains(client: openai.OpenAI) -> None:
    file = client.files.create(file=("a.jsonl", examples(10)), purpose="user_data").id

    with pytest.raises(openai.BadRequestError) as caught:
        start_job(client, training_file=file)
    assert caught.value.param == "training_file"


def messages(*given: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(given), **more}


USER = {"role": "user", "content": "はい"}
ANSWER = {"role": "assistant", "content": "ええ"}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}

BAD_LINES: dict[str, bytes] = {
    "not UTF-8": "相談".encode("cp932"),
    "broken JSON": b'{"messages": [',
    "blank": b"",
    "white space": b" \t\r",
    "not an object": b"[]",
    "NaN": b'{"messages": [{"role": "assistant", "content": "a", "weight": NaN}]}',
    "a huge number": b"1" * 5000,
    "deep nesting": b'{"messages": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "a lone surrogate": rb'{"messages": [{"role": "assistant", "content": "\ud800"}]}',
    **{
        name: json.dumps(record).encode()
        for name, record in {
            "an unknown key": messages(USER, ANSWER, id=1),
            "no messages": {"tools": []},
            "empty messages": messages(),
            "messages that are no list": {"messages": "text"},
            "an unknown role": messages({"role": "counselor", "content": "x"}, ANSWER),
            "a role that is no string": messages({"role": ["user"], "content": "x"}, ANSWER),
            "a message that is no object": messages("x", ANSWER),
            "an unknown message key": messages(USER, ANSWER | {"id": 1}),
            "content of a wrong type": messages({"role": "user", "content": 1}, ANSWER),
            "a broken content part": messages({"role": "user", "content": [{"text": "x"}]}, ANSWER),
            "no content": messages({"role": "user"}, ANSWER),
            "an answer without content": messages(USER, {"role": "assistant", "content": None}),
            "empty content": messages({"role": "user", "content": ""}, ANSWER),
            "no content parts": messages({"role": "user", "content": []}, ANSWER),
            "a tool message without id": messages({"role": "tool", "content": "x"}, ANSWER),
            "no assistant": messages(USER),
            "nothing to train on": messages(USER, ANSWER | {"weight": 0}),
            "the user last": messages(ANSWER, USER),
            "weight 2": messages(USER, ANSWER | {"weight": 2}),
            "weight true": messages(USER, ANSWER | {"weight": True}),
            "weight 1.0": messages(USER, ANSWER | {"weight": 1.0}),
            "a user's weight": messages(USER | {"weight": 1}, ANSWER),
            "a special token": messages({"role": "user", "content": "a<|endoftext|>"}, ANSWER),
            "a special token in a part": messages(
                {"role": "user", "content": [{"type": "text", "text": "<|im_start|>"}]}, ANSWER
            ),
        }.items()
    },
}


@pytest.mark.parametrize("purpose", ["training", "validation"])
@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named(name: str, purpose: Any) -> None:
    data = examples(11) + BAD_LINES[name] + b"\n" + examples(1)
    problem = judge_training_file(data, purpose=purpose)

    assert problem is not None
    assert (problem.code, problem.line) == ("invalid_file_format", 12)
    assert "Line 12" in problem.message


def test_the_files_the_service_takes_are_taken() -> None:
    tool_call = messages(
        {"role": "system", "content": "s"},
        USER | {"name": "n", "content": [{"type": "text", "text": "<|im_strat|> 1 < 2"}]},
        ANSWER | {"weight": 0},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c", "content": "t"},
        ANSWER | {"weight": 1},
        tools=[],
        parallel_tool_calls=False,
    )
    twice = b'{"messages": 1, "messages": [{"role": "assistant", "content": "last wins"}]}\n'

    assert judge_training_file(jsonl(tool_call) * 9 + twice, purpose="training") is None
    assert judge_training_file(examples(10).rstrip(b"\n"), purpose="training") is None
    assert judge_training_file(jsonl(tool_call, ANSWER)[:-1], purpose="training") is not None


def test_training_needs_ten_examples_and_validation_one() -> None:
    short = judge_training_file(examples(9), purpose="training")
    empty = judge_training_file(b"", purpose="validation")

    assert short is not None
    assert empty is not None
    assert (short.code, short.line, empty.code) == ("invalid_n_examples", None, short.code)
    assert judge_training_file(examples(1), purpose="validation") is None


@settings(deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_no_file_makes_the_judgement_fail(data: bytes) -> None:
    for purpose in ("training", "validation"):
        assert judge_training_file(data, purpose=purpose) is not None


@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["role", "content", "weight", "tool_calls", "type", "text"]),
                inner,
                max_size=4,
            )
        ),
    )
)
def test_no_message_makes_the_judgement_fail(message: Any) -> None:
    line = json.dumps(messages(message, ANSWER)).encode()

    problem = judge_training_file(line, purpose="validation")

    assert problem is None or problem.line == 1


@pytest.mark.parametrize(
    ("training", "validation", "code", "param"),
    [
        (examples(9), None, "invalid_n_examples", "training_file"),
        (BOM + examples(10), None, "invalid_file_format", "training_file"),
        (examples(10) + b"{\n", None, "invalid_file_format", "training_file"),
        (examples(10), b"{\n", "invalid_file_format", "validation_file"),
    ],
    ids=["too few", "BOM", "bad line", "bad validation line"],
)
def test_a_job_on_a_bad_file_fails_with_the_services_code(
    endpoint: Rehearsal,
    client: openai.OpenAI,
    training: bytes,
    validation: bytes | None,
    code: str,
    param: str,
) -> None:
    more = {} if validation is None else {"validation_file": upload(client, validation)}
    job = finish(endpoint, client, start_job(client, training, **more))
    last = client.fine_tuning.jobs.list_events(job.id, limit=1).data[0]

    assert (job.status, job.error.code, job.error.param) == ("failed", code, param)
    assert job.error.message in last.message
    assert last.level == "error"
    assert job.fine_tuned_model is None


# --- Chat -----------------------------------------------------------------------------------------


def test_a_base_model_says_that_it_is_untrained(client: openai.OpenAI) -> None:
    answer = ask(client, "gpt-4o-mini", "こんにちは", temperature=0)

    assert "未学習" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == 5
    assert answer.usage.completion_tokens == len(answer.choices[0].message.content)


def test_a_tuned_model_answers_out_of_what_it_learned(
    trained: tuple[Rehearsal, openai.OpenAI, Any],
) -> None:
    _, client, job = trained
    known = {
        turn["utterance"][i : i + 2]
        for dialogue in example_dialogues()
        for turn in dialogue["dialogue"]  # type: ignore[attr-defined]
        for i in range(len(turn["utterance"]) - 1)
    }
    prompts = ["眠れません", "母と話せません", "転職したいです", "ひとりで寂しい", "試験が不安"]
    answers = [
        ask(client, job.fine_tuned_model, prompt, temperature=0).choices[0].message.content
        for prompt in prompts * 2
    ]

    assert answers[:5] == answers[5:]
    assert len(set(answers)) >= 4
    assert all(0 < len(answer) <= 200 for answer in answers)
    assert all(a[i : i + 2] in known for a in answers for i in range(len(a) - 1) if "\n" not in a)


def test_a_seed_repeats_an_answer_and_none_varies_it(
    trained: tuple[Rehearsal, openai.OpenAI, Any],
) -> None:
    _, client, job = trained

    def answers(**options: Any) -> set[str]:
        asked = [ask(client, job.fine_tuned_model, **options) for _ in range(12)]
        return {answer.choices[0].message.content for answer in asked}

    assert len(answers(seed=3)) == 1
    assert len(answers()) > 1


def test_an_answer_is_cut_at_the_limit(client: openai.OpenAI) -> None:
    cut = ask(client, "gpt-4o-mini", max_completion_tokens=3).choices[0]
    also = ask(client, "gpt-4o-mini", max_tokens=3).choices[0]

    assert (len(cut.message.content), cut.finish_reason) == (3, "length")
    assert cut.message.content == also.message.content


def test_tools_and_parts_and_a_format_of_text_are_accepted(client: openai.OpenAI) -> None:
    answer = ask(
        client,
        "gpt-4o-mini",
        tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
        response_format={"type": "text"},
        messages=[
            {"role": "developer", "content": "d"},
            {"role": "user", "content": [{"type": "text", "text": "四文字だ"}]},
        ],
    )

    assert answer.usage.prompt_tokens == 5


@pytest.mark.parametrize(
    ("param", "options"),
    [
        ("messages", {"messages": []}),
        ("messages[0]", {"messages": [{"role": "counselor", "content": "x"}]}),
        ("messages[0]", {"messages": [ANSWER | {"weight": 1}]}),
        ("messages[1]", {"messages": [USER, "x"]}),
        ("n", {"n": 2}),
        ("stream", {"stream": True}),
        ("temperature", {"temperature": 2.5}),
        ("max_tokens", {"max_tokens": 0}),
        ("seed", {"seed": "x"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_chat_outside_the_limits_is_refused(
    client: openai.OpenAI, param: str, options: dict[str, Any]
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "gpt-4o-mini", **options)

    assert caught.value.param == param


@pytest.mark.parametrize("name", ["ft:gpt-4o-mini:rehearsal::unknown1", "gpt-2"])
def test_a_model_that_cannot_chat_is_not_found(client: openai.OpenAI, name: str) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        ask(client, name)

    assert caught.value.code == "model_not_found"


def test_more_chats_than_the_limit_get_429() -> None:
    statuses: queue.SimpleQueue[int] = queue.SimpleQueue()
    with Rehearsal(latency=3600, max_in_flight=1) as endpoint:
        asking = [
            threading.Thread(target=lambda: statuses.put(post_chat(endpoint))) for _ in range(3)
        ]
        for thread in asking:
            thread.start()
        first_back = [statuses.get(timeout=10) for _ in range(2)]
    for thread in asking:
        thread.join(10)

    assert first_back == [429, 429]


def post_chat(endpoint: Rehearsal) -> int:
    body = {"model": "gpt-4o-mini", "messages": [USER]}
    return raw(endpoint, "POST", "/chat/completions", json.dumps(body).encode())[0]


# --- Scores and structured answers ----------------------------------------------------------------


def score_example(number: int) -> tuple[str, dict[str, int]]:
    """A made-up dialogue whose length and question marks carry the first two scores."""
    lines, asked = 1 + number * 7 % 23, number * 5 % 11
    text = "カウンセラー: そうですか。\n" * lines + "クライアント: はい？\n" * asked
    scores = {
        "長さ": min(5, lines // 4),
        "質問": min(5, asked // 2),
        "雑音": number * 3 % 6,
        "一": 4,
    }
    return text, scores


def score_file(count: int) -> bytes:
    made = map(score_example, range(count))
    return jsonl(
        *(
            messages(
                {"role": "user", "content": text},
                {"role": "assistant", "content": json.dumps(scores, ensure_ascii=False)},
            )
            for text, scores in made
        )
    )


def json_schema(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
        **more,
    }
    return {
        "type": "json_schema",
        "json_schema": {"name": "scores", "strict": True, "schema": schema},
    }


def ask_json(client: openai.OpenAI, model: str, wanted: Any, text: str = "眠れません") -> Any:
    answer = ask(client, model, text, response_format=wanted, temperature=0)
    return json.loads(answer.choices[0].message.content)


POINTS = {"type": "integer", "enum": [0, 1, 2, 3, 4, 5]}


@pytest.fixture(scope="module")
def scoring() -> Iterator[tuple[Rehearsal, openai.OpenAI, Any]]:
    """A finished job on made-up dialogues with their scores."""
    with Rehearsal(keep_exchanges=True) as running, client_of(running) as connected:
        job = start_job(
            connected, score_file(120), method=hyperparameters(n_epochs=2, batch_size=30)
        )
        yield running, connected, finish(running, connected, job)
        assert judge.check_exchanges(running.exchanges) == []


def test_a_model_tuned_on_scores_predicts_them_better_than_chance(
    scoring: tuple[Rehearsal, openai.OpenAI, Any],
) -> None:
    _, client, job = scoring
    wanted = json_schema(dict.fromkeys(["雑音", "質問", "長さ"], POINTS))
    cases = [score_example(number) for number in range(120, 160)]

    def errors(model: str) -> dict[str, float]:
        answers = [(ask_json(client, model, wanted, text), scores) for text, scores in cases]
        assert all(list(answer) == ["雑音", "質問", "長さ"] for answer, _ in answers)
        assert all(type(v) is int and 0 <= v <= 5 for a, _ in answers for v in a.values())
        return {
            key: sum((answer[key] - scores[key]) ** 2 for answer, scores in answers) / len(answers)
            for key in answers[0][0]
        }

    tuned, base = errors(job.fine_tuned_model), errors(BASE)
    mean = {key: sum((scores[key] - 2.5) ** 2 for _, scores in cases) / len(cases) for key in tuned}

    assert tuned["長さ"] < mean["長さ"] / 2
    assert tuned["質問"] < mean["質問"] / 2
    assert all(tuned[key] < base[key] for key in tuned)
    assert base["長さ"] == sum(scores["長さ"] ** 2 for _, scores in cases) / len(cases)


def test_the_losses_of_a_score_job_are_the_character_models_and_fall(
    scoring: tuple[Rehearsal, openai.OpenAI, Any],
) -> None:
    _, client, job = scoring
    losses = [step["train_loss"] for step in metrics_of(client, job)]

    assert losses[0] == pytest.approx(math.log(0x110000), abs=1e-5)
    assert sum(losses[4:]) < sum(losses[:4])


def test_predicted_scores_stay_within_the_enum_and_what_was_seen(
    scoring: tuple[Rehearsal, openai.OpenAI, Any],
) -> None:
    _, client, job = scoring
    allowed = {"雑音": [-9, 1], "一": [0, 3, 9], "長さ": [7], "新しい": [2, -2]}
    wanted = json_schema({key: POINTS | {"enum": numbers} for key, numbers in allowed.items()})
    answer = ask_json(client, job.fine_tuned_model, wanted, "？" * 1000)
    (checkpoint, *_) = client.fine_tuning.jobs.checkpoints.list(job.id)

    assert list(answer) == list(allowed)
    assert (answer["雑音"], answer["一"], answer["長さ"], answer["新しい"]) == (1, 3, 7, -2)
    name = checkpoint.fine_tuned_model_checkpoint
    assert ask_json(client, name, wanted, "？" * 1000) == answer


def test_a_model_that_never_saw_scores_gives_the_lowest_allowed(
    trained: tuple[Rehearsal, openai.OpenAI, Any],
) -> None:
    _, client, job = trained
    wanted = json_schema({"整数": POINTS | {"enum": [5, 3, 4]}, "零": POINTS})

    for model in (BASE, job.fine_tuned_model):
        assert ask_json(client, model, wanted) == {"整数": 3, "零": 0}


def renamed(name: Any, **more: Any) -> dict[str, Any]:
    wanted = json_schema({"a": POINTS})
    wanted["json_schema"] |= {"name": name, **more}
    return wanted


@pytest.mark.parametrize(
    "wanted",
    [
        {"type": "xml"},
        {"type": "json_object"},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "n"}},
        {"type": "json_schema", "json_schema": {"name": "n", "schema": {"properties": []}}},
        renamed("点数"),
        renamed(None),
        renamed("n", strict=False),
        json_schema({"a": POINTS}, additionalProperties=True),
        json_schema({"a": POINTS}, required=[]),
        json_schema({"a": POINTS}, required=["a", "b"]),
        json_schema({"a": POINTS}, type="array"),
        json_schema({"a": POINTS}, anyOf=[POINTS]),
        json_schema({"a": 1}),
        json_schema({"a": {"type": "string"}}),
        json_schema({"a": {"type": "integer"}}),
        json_schema({"a": POINTS | {"enum": []}}),
        json_schema({"a": POINTS | {"enum": [1, "2"]}}),
        json_schema({"a": POINTS | {"minimum": 0}}),
    ],
)
def test_a_response_format_other_than_scores_is_refused(endpoint: Rehearsal, wanted: Any) -> None:
    body = {"model": BASE, "messages": [USER], "response_format": wanted}
    status, answer = raw(endpoint, "POST", "/chat/completions", json.dumps(body).encode())

    assert (status, answer["error"]["param"]) == (400, "response_format")


@pytest.mark.parametrize(
    "last", ['{"a": 1.5}', '{"a": true}', '{"b": 1}', "{}", "[1]", "はい", "{"]
)
def test_answers_that_are_not_all_scores_are_learned_as_text_only(
    endpoint: Rehearsal, client: openai.OpenAI, last: str
) -> None:
    answers = ['{"a": 3}'] * 10 + [last]
    data = jsonl(*(messages(USER, {"role": "assistant", "content": text}) for text in answers))
    job = finish(endpoint, client, start_job(client, data))

    assert ask_json(client, job.fine_tuned_model, json_schema({"a": POINTS})) == {"a": 0}


# --- Bare HTTP ------------------------------------------------------------------------------------

AUTHORIZED = {"Authorization": "Bearer x"}


def raw(
    endpoint: Rehearsal,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: dict[str, str] = AUTHORIZED,
) -> tuple[int, Any]:
    port = int(endpoint.url.split(":")[2].split("/")[0])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, f"/v1{path}", body, headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    except (ConnectionError, http.client.HTTPException):
        return 0, None
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("PUT", "/files", 404),
        ("GET", "/files/file-unknown", 404),
        ("GET", "/files/file-unknown/content", 404),
        ("GET", "/fine_tuning/jobs/ftjob-unknown", 404),
        ("GET", "/fine_tuning/jobs/ftjob-unknown/events", 404),
        ("POST", "/uploads/upload_unknown/cancel", 404),
        ("GET", "/fine_tuning/jobs?limit=0", 400),
        ("GET", "/fine_tuning/jobs?limit=x", 400),
        ("GET", "/files?after=file-unknown", 400),
        ("GET", "/files?order=up", 400),
        ("GET", "/models/", 200),
    ],
)
def test_each_path_answers_in_the_apis_shape(
    endpoint: Rehearsal, method: str, path: str, status: int
) -> None:
    assert raw(endpoint, method, path)[0] == status


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer "}, {"Authorization": "x"}])
def test_a_key_is_needed(endpoint: Rehearsal, headers: dict[str, str]) -> None:
    status, answer = raw(endpoint, "GET", "/models", headers=headers)

    assert (status, answer["error"]["code"]) == (401, "invalid_api_key")


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b"\xff", b'{"n": NaN}', b"[" * 200_000], ids=lambda b: str(b[:8])
)
def test_a_malformed_body_is_refused(endpoint: Rehearsal, body: bytes) -> None:
    assert raw(endpoint, "POST", "/chat/completions", body)[0] == 400


@pytest.mark.parametrize(
    ("headers", "status"),
    [({"Transfer-Encoding": "chunked"}, 411), ({"Content-Length": "x"}, 400)],
)
def test_a_body_of_unknown_length_is_refused(
    endpoint: Rehearsal, headers: dict[str, str], status: int
) -> None:
    assert raw(endpoint, "POST", "/files", headers=AUTHORIZED | headers)[0] == status


@pytest.mark.parametrize(
    "body",
    [b"", b"--b\r\n", b"--b\r\n\r\n\r\nx\r\n--b--", b'--b\r\nA: b; name="x"\r\n\r\n1\r\n--b--'],
)
def test_a_broken_form_is_refused(endpoint: Rehearsal, body: bytes) -> None:
    headers = AUTHORIZED | {"Content-Type": "multipart/form-data; boundary=b"}

    assert raw(endpoint, "POST", "/files", body, headers)[0] == 400


def test_a_lone_surrogate_is_mirrored_and_not_fatal(endpoint: Rehearsal) -> None:
    body = rb'{"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "\ud800"}]}'

    assert raw(endpoint, "POST", "/chat/completions", body)[0] == 200
    assert raw(endpoint, "POST", "/chat/completions", rb'{"model": "\ud800"}')[0] == 400


# --- Faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "status", "error"),
    [
        ("400", 400, openai.BadRequestError),
        ("401", 401, openai.AuthenticationError),
        ("403", 403, openai.PermissionDeniedError),
        ("404", 404, openai.NotFoundError),
        ("405", 405, openai.APIStatusError),
        ("408", 408, openai.APIStatusError),
        ("409", 409, openai.ConflictError),
        ("429", 429, openai.RateLimitError),
        ("500", 500, openai.InternalServerError),
        ("501", 501, openai.InternalServerError),
        ("502", 502, openai.InternalServerError),
        ("503", 503, openai.InternalServerError),
        ("insufficient_quota", 429, openai.RateLimitError),
        ("training_not_available", 403, openai.PermissionDeniedError),
    ],
)
def test_a_refusal_leaves_nothing_behind(
    endpoint: Rehearsal,
    client: openai.OpenAI,
    kind: str,
    status: int,
    error: type[openai.APIStatusError],
) -> None:
    endpoint.inject(Fault(kind, "POST", "/files"))

    with pytest.raises(error) as caught:
        upload(client, examples(1))

    assert caught.value.status_code == status
    assert client.files.list().data == []
    assert [e.fault for e in endpoint.exchanges] == [kind, None]
    if not kind.isdecimal():
        assert caught.value.code == kind


def test_a_429_says_when_to_come_back(endpoint: Rehearsal, client: openai.OpenAI) -> None:
    endpoint.inject(Fault("429"))
    endpoint.inject(Fault("503", seconds=1.5))
    headers = []
    for _ in range(2):
        with pytest.raises(openai.APIStatusError) as caught:
            client.models.list()
        headers.append(caught.value.response.headers)

    assert (headers[0]["retry-after"], headers[0]["retry-after-ms"]) == ("0", "0")
    assert (headers[1]["retry-after"], headers[1]["retry-after-ms"]) == ("1.5", "1500")


@pytest.mark.parametrize(
    ("kind", "error", "carried_out"),
    [
        ("500_after", openai.InternalServerError, True),
        ("reset_before", openai.APIConnectionError, False),
        ("reset_after", openai.APIConnectionError, True),
        ("stall", openai.APIConnectionError, False),
        ("stall_after", openai.APIConnectionError, True),
        ("truncated", json.JSONDecodeError, True),
        ("malformed", json.JSONDecodeError, True),
    ],
)
def test_a_lost_answer_was_carried_out_or_not_as_its_name_says(
    endpoint: Rehearsal,
    client: openai.OpenAI,
    kind: str,
    error: type[Exception],
    carried_out: bool,
) -> None:
    file = upload(client, examples(10))
    endpoint.inject(Fault(kind, "POST", "/fine_tuning/jobs", seconds=0.05))

    with pytest.raises(error):
        client.fine_tuning.jobs.create(model=BASE, training_file=file)

    assert len(client.fine_tuning.jobs.list().data) == carried_out


def test_a_reset_is_a_reset(endpoint: Rehearsal) -> None:
    endpoint.inject(Fault("reset_before"))
    port = int(endpoint.url.split(":")[2].split("/")[0])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")

        with pytest.raises(ConnectionResetError):
            connection.recv(1)


def test_a_stall_outlasts_the_clients_patience(endpoint: Rehearsal) -> None:
    endpoint.inject(Fault("stall"))
    with (
        client_of(endpoint, timeout=0.05) as impatient,
        pytest.raises(openai.APITimeoutError),
    ):
        impatient.models.list()


def test_faults_count_what_they_skip_and_hit(endpoint: Rehearsal, client: openai.OpenAI) -> None:
    endpoint.inject(Fault("500", "get", "/mod*", times=2, skip=1))
    endpoint.inject(Fault("404", path="/files", times=None))
    upload_status = raw(endpoint, "GET", "/files")[0]
    statuses = [raw(endpoint, "GET", "/models")[0] for _ in range(5)]

    assert statuses == [200, 500, 500, 200, 200]
    assert [upload_status] + [raw(endpoint, "GET", "/files")[0] for _ in range(3)] == [404] * 4


def test_an_unknown_fault_is_named_in_japanese() -> None:
    with pytest.raises(ValueError, match=r"'quake' はありません.*reset_before.*paused_job"):
        Fault("quake")
    with pytest.raises(ValueError, match="1以上"):
        Fault("429", times=0)


def test_chat_faults_empty_refuse_and_cut(endpoint: Rehearsal, client: openai.OpenAI) -> None:
    for kind in ("empty_answer", "refusal", "length"):
        endpoint.inject(Fault(kind))
    client.models.list()  # not a chat: no chat fault hits it
    empty, refused, cut = (ask(client, "gpt-4o-mini").choices[0] for _ in range(3))

    assert (empty.message.content, empty.finish_reason) == ("", "stop")
    assert refused.message.content is None
    assert refused.message.refusal
    assert cut.finish_reason == "length"


@pytest.mark.parametrize(
    ("kind", "code"), [("flagged", "unsafe_file"), ("job_failed", "server_error")]
)
def test_a_job_fault_fails_the_job(
    endpoint: Rehearsal, client: openai.OpenAI, kind: str, code: str
) -> None:
    endpoint.inject(Fault(kind))
    job = finish(endpoint, client, start_job(client))

    assert (job.status, job.error.code) == ("failed", code)
    assert (len(metrics_of(client, job)) > 0) == (kind == "job_failed")


def test_a_paused_job_goes_on_when_resumed(endpoint: Rehearsal, client: openai.OpenAI) -> None:
    endpoint.inject(Fault("paused_job"))
    job = start_job(client)
    wait_until(endpoint, client, job.id, "paused")
    client.fine_tuning.jobs.resume(job.id)

    assert finish(endpoint, client, job).status == "succeeded"


def test_a_result_file_may_be_base64(endpoint: Rehearsal, client: openai.OpenAI) -> None:
    (name,) = finish(endpoint, client, start_job(client)).result_files
    endpoint.inject(Fault("base64_result"))
    encoded, plain = client.files.content(name).content, client.files.content(name).content

    assert encoded != plain
    assert base64.b64decode(encoded, validate=True) == plain


# --- The end --------------------------------------------------------------------------------------


def test_closing_ends_a_stalled_request(capfd: pytest.CaptureFixture[str]) -> None:
    outcomes: list[Any] = []
    with Rehearsal(faults=[Fault("stall", seconds=3600)], keep_exchanges=True) as endpoint:
        asking = threading.Thread(target=lambda: outcomes.append(raw(endpoint, "GET", "/models")))
        asking.start()
        for _ in itertools.takewhile(lambda _: not endpoint.exchanges, itertools.count()):
            asking.join(0.01)
    asking.join(5)

    assert outcomes == [(0, None)]
    assert capfd.readouterr() == ("", "")


def test_closing_in_the_middle_of_a_job_is_quick(capfd: pytest.CaptureFixture[str]) -> None:
    before = set(threading.enumerate())
    with Rehearsal() as endpoint, client_of(endpoint) as client:
        start_job(client, dialogue_files()[0] * 20, method=hyperparameters(n_epochs=50))
        endpoint.wait_for_progress(5)
    endpoint.close()

    assert capfd.readouterr() == ("", "")
    assert set(threading.enumerate()) <= before


def test_a_client_that_drops_makes_no_noise(capfd: pytest.CaptureFixture[str]) -> None:
    with Rehearsal() as endpoint:
        port = int(endpoint.url.split(":")[2].split("/")[0])
        for sent in (b"", b"GET /v1/mo", b"POST /v1/files HTTP/1.1\r\nContent-Length: 9\r\n\r\nx"):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(sent)
        assert raw(endpoint, "GET", "/models")[0] == 200

    assert capfd.readouterr() == ("", "")


def test_an_endpoint_not_started_says_so() -> None:
    with pytest.raises(RuntimeError, match="起動"):
        _ = Rehearsal().url


def test_an_endpoint_never_closed_does_not_hold_up_the_programs_end() -> None:
    code = (
        "import openai_sft_rehearsal as r, urllib.request as u\n"
        "e = r.Rehearsal(faults=[r.Fault('stall')]).start()\n"
        "import http.client\n"
        "c = http.client.HTTPConnection('127.0.0.1', int(e.url.split(':')[2][:-3]))\n"
        "c.request('GET', '/v1/models')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, timeout=20, check=True)

    assert done.returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_command_quietly(number: signal.Signals, code: int) -> None:
    command = [
        sys.executable, "-m", "openai_sft_rehearsal", "--port", "0",
        "--fault", "503:GET:/models:1", "--latency", "0.01",
    ]  # fmt: skip
    with subprocess.Popen(
        command, cwd=PROJECT, stderr=subprocess.PIPE, encoding="utf-8", errors="replace"
    ) as process:
        assert process.stderr is not None
        found = re.search(r"http://127\.0\.0\.1:\d+/v1", process.stderr.readline())
        assert found is not None
        client = openai.OpenAI(base_url=found.group(), api_key="x", max_retries=0)
        with client, pytest.raises(openai.InternalServerError):
            client.models.list()
        process.send_signal(number)

        assert process.wait(10) == code
        assert process.stderr.read() == ""


@pytest.mark.parametrize(
    "arguments", [["--fault", "quake"], ["--fault", "429:GET"], ["--fault", "429:GET:/x:y"]]
)
def test_a_bad_fault_argument_ends_with_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)

    assert caught.value.code == 2
    assert "--fault" in capsys.readouterr().err


def test_a_taken_port_ends_with_2(endpoint: Rehearsal) -> None:
    assert main(["--port", endpoint.url.split(":")[2].split("/")[0]]) == 2


# --- The judge ------------------------------------------------------------------------------------


@pytest.mark.skipif(not judge.DESCRIPTION.exists(), reason="OpenAI's description is not at hand")
def test_the_judge_sees_what_is_wrong() -> None:
    with Rehearsal(keep_exchanges=True) as endpoint, client_of(endpoint) as client:
        client.models.list()
        ask(client, "gpt-4o-mini")
        raw(endpoint, "GET", "/nothing")
        models, chat, missing = endpoint.exchanges
    wrong = [
        replace(models, response=models.response | {"object": "array"}),
        replace(models, response=None),
        replace(models, path="/nothing"),
        replace(chat, response=chat.response | {"object": "chat.completion.chunk"}),
        replace(chat, request=chat.request | {"n": 0}),
        replace(chat, content_type="text/plain"),
        replace(missing, response={"error": "not found"}),
    ]

    assert judge.check_exchanges([models, chat, missing]) == []
    assert [len(judge.check_exchanges([exchange])) > 0 for exchange in wrong] == [True] * 7


# --- The example dialogues ------------------------------------------------------------------------


def test_the_example_dialogues_have_kokorochats_form() -> None:
    dialogues: list[Any] = example_dialogues()
    utterances = [turn for dialogue in dialogues for turn in dialogue["dialogue"]]

    assert len(dialogues) == 24
    assert {turn["role"] for turn in utterances} == {"counselor", "client"}
    assert any("\n" in turn["utterance"] for turn in utterances)
    assert not any("\\n" in turn["utterance"] for turn in utterances)
    for dialogue in dialogues:
        japanese, english = dialogue["review_by_client_jp"], dialogue["review_by_client_en"]
        times = [turn["time"] for turn in dialogue["dialogue"]]
        items = list(english.values())[5:25]
        assert times == sorted(set(times))
        assert list(japanese.values()) == list(english.values())
        assert english["score"] == sum(items)
        assert all(0 <= points <= 5 for points in items)


def test_a_real_dialogue_has_the_same_keys() -> None:
    real = PROJECT.parent / "shared" / "kokorochat" / "kokorochat_dialogues" / "10.json"
    if not real.exists():
        pytest.skip("KokoroChat is not at hand")
    theirs, ours = json.loads(real.read_text(encoding="utf-8")), example_dialogues()[0]

    def keys(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: keys(inner) for key, inner in value.items()}
        return [keys(value[0])] if isinstance(value, list) else None

    assert keys(theirs) == keys(ours)
