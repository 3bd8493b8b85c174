"""The rehearsal endpoint, through the official client and over bare sockets."""

from __future__ import annotations

import csv
import io
import json
import math
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import judge
import openai
import pytest
from calls import (
    AUTHORIZED,
    BASE,
    USER,
    ask,
    connected,
    example,
    examples,
    finish,
    hyperparameters,
    json_schema,
    jsonl,
    metrics_of,
    port_of,
    raw,
    start_job,
    upload,
    wait_until,
)
from endpoint import Rehearsal
from faults import until
from hypothesis import given, settings
from hypothesis import strategies as st

from openai_sft_rehearsal import (
    ApiError,
    Kept,
    Model,
    Note,
    Order,
    Progress,
    Reply,
    Step,
    Trained,
    TrainingFailed,
    example_dialogues,
    judge_training_file,
    main,
)

PROJECT = Path(__file__).parents[1]
BOM = b"\xef\xbb\xbf"
SUPERVISED = "method.supervised.hyperparameters"


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


@pytest.fixture
def client(sdk: openai.OpenAI, endpoint: Rehearsal) -> openai.OpenAI:
    return connected(sdk, endpoint)


@pytest.fixture(scope="module")
def trained(sdk: openai.OpenAI) -> Iterator[tuple[Rehearsal, openai.OpenAI, Any]]:
    """A finished job on the example dialogues, shared by the tests that only look at it."""
    with Rehearsal() as running:
        client = connected(sdk, running)
        training, validation = dialogue_files()
        job = start_job(
            client,
            training,
            validation_file=upload(client, validation),
            suffix="kokoro",
            metadata={"purpose": "test"},
            method=hyperparameters(n_epochs=4, batch_size=4),
        )
        yield running, client, finish(running, client, job)
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


def test_files_are_listed_in_pages_by_purpose_newest_first(client: openai.OpenAI) -> None:
    ids = [upload(client, examples(1)) for _ in range(5)]
    client.files.create(file=("a.txt", b"x"), purpose="user_data")

    assert [f.id for f in client.files.list(purpose="fine-tune", limit=2)] == ids[::-1]
    assert client.files.list(purpose="batch").data == []


def test_a_deleted_file_is_gone(client: openai.OpenAI) -> None:
    file = upload(client, examples(1))

    assert client.files.delete(file).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file)


@pytest.mark.parametrize(("name", "data"), [("train.json", b"{}"), ("train.jsonl", b"")])
def test_a_file_of_another_kind_or_without_content_is_refused(
    client: openai.OpenAI, name: str, data: bytes
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        upload(client, data, name)

    assert caught.value.param == "file"


def test_an_unknown_purpose_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="purpose"):
        client.files.create(file=("a.jsonl", b"x"), purpose="training")  # type: ignore[arg-type]


def test_a_large_file_is_read_without_copying_it_again_and_again(sdk: openai.OpenAI) -> None:
    data = b"x" * 100_000_000
    with Rehearsal() as endpoint:
        client = connected(sdk, endpoint)
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

    with pytest.raises(openai.BadRequestError, match="3 bytes"):
        client.uploads.complete(upload_id, part_ids=[part])
    with pytest.raises(openai.BadRequestError, match="part_ids"):
        client.uploads.complete(upload_id, part_ids=["part_unknown"])


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
    answer = ask(client, job.fine_tuned_model).choices[0].message.content
    for checkpoint in checkpoints:
        name = checkpoint.fine_tuned_model_checkpoint
        assert name == f"{job.fine_tuned_model}:ckpt-step-{checkpoint.step_number}"
        assert ask(client, name).choices[0].message.content == answer


def test_a_checkpoint_answers_with_what_was_learned_by_then(
    endpoint: Rehearsal, client: openai.OpenAI
) -> None:
    """Two endings are equally frequent: each epoch's own order decides, which the seed draws."""
    lines = [
        {"messages": [{"role": "user", "content": "続き"}, {"role": "assistant", "content": text}]}
        for text in ("一。い", "一。う")
        for _ in range(6)
    ]
    method = hyperparameters(n_epochs=4, batch_size=1)
    told = []
    for seed in range(4):
        job = finish(endpoint, client, start_job(client, jsonl(*lines), seed=seed, method=method))
        points = client.fine_tuning.jobs.checkpoints.list(job.id)
        names = [job.fine_tuned_model, *(point.fine_tuned_model_checkpoint for point in points)]
        told.append([ask(client, name, "続き").choices[0].message.content for name in names])

    assert all(model == last for model, last, *_ in told)
    assert {answer for answers in told for answer in answers} == {"一。い", "一。う"}
    assert any(len(set(answers)) == 2 for answers in told)


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

    assert "ヌ" not in ask(client, job.fine_tuned_model, "ヌヌヌヌヌ").choices[0].message.content


def test_auto_is_resolved(endpoint: Rehearsal, client: openai.OpenAI) -> None:
    job = start_job(client, method=hyperparameters(n_epochs=2, batch_size="auto"))
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
    wait_until(endpoint, client, job, "queued")

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


@pytest.mark.parametrize("status", ["validating_files", "queued", "running"])
def test_a_job_is_cancelled_at_any_time(
    endpoint: Rehearsal, client: openai.OpenAI, status: str
) -> None:
    endpoint.hold(status)
    job = start_job(client)
    wait_until(endpoint, client, job, status)
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
        (f"{SUPERVISED}.n_epochs", {"method": hyperparameters(n_epochs=0)}),
        (f"{SUPERVISED}.n_epochs", {"method": hyperparameters(n_epochs=51)}),
        (f"{SUPERVISED}.n_epochs", {"method": hyperparameters(n_epochs="3")}),
        (f"{SUPERVISED}.n_epochs", {"method": hyperparameters(n_epochs=True)}),
        (f"{SUPERVISED}.batch_size", {"method": hyperparameters(batch_size=257)}),
        (f"{SUPERVISED}.batch_size", {"method": hyperparameters(batch_size=1.5)}),
        ("method", {"hyperparameters": {"batch_size": 2}}),
        (
            f"{SUPERVISED}.learning_rate_multiplier",
            {"method": hyperparameters(learning_rate_multiplier=0)},
        ),
        ("method", {"method": {"type": "dpo"}}),
        ("suffix", {"suffix": ""}),
        ("suffix", {"suffix": "x" * 65}),
        ("seed", {"seed": 2**31}),
        ("seed", {"seed": "1"}),
        ("metadata", {"metadata": {"k": 1}}),
        ("training_file", {"training_file": "file-unknown"}),
        ("validation_file", {"validation_file": "file-unknown"}),
        ("validation_file", {"validation_file": 1}),
        ("model", {"model": "gpt-2"}),
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


ANSWER = {"role": "assistant", "content": "ええ"}
SPECIAL = (
    *("im_start", "im_end", "im_sep", "endoftext", "endofprompt"),
    *("fim_prefix", "fim_middle", "fim_suffix"),
)
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f"}}
RESULT = {"role": "tool", "tool_call_id": "c", "content": "t"}


def call(**more: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [CALL | more]}


def image(role: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "image_url", **more}]}


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
            "a name of null": messages(USER | {"name": None}, ANSWER),
            "a name that is no text": messages(USER | {"name": 1}, ANSWER),
            "calls of null": messages(USER, ANSWER | {"tool_calls": None}),
            "an assistant's image": messages(image("assistant", image_url={"url": "https://a"})),
            "an image without a place": messages(image("user", image_url={}), ANSWER),
            "tools of null": messages(USER, ANSWER, tools=None),
            "tools as text": messages(USER, ANSWER, tools="[]"),
            "a bare function": messages(USER, ANSWER, tools=[TOOL["function"]]),
            "a tool of no name": messages(USER, ANSWER, tools=[TOOL | {"function": {}}]),
            "a tool's wrong name": messages(
                USER, ANSWER, tools=[TOOL | {"function": {"name": "f g"}}]
            ),
            "parameters as text": messages(
                USER, ANSWER, tools=[TOOL | {"function": {"name": "f", "parameters": "{}"}}]
            ),
            "a strict that is no boolean": messages(
                USER, ANSWER, tools=[TOOL | {"function": {"name": "f", "strict": 1}}]
            ),
            "parallel calls of null": messages(USER, ANSWER, parallel_tool_calls=None),
            "a call without id": messages(USER, call(id=None)),
            "a call of another type": messages(USER, call(type="custom")),
            "arguments that are no text": messages(
                USER, call(function={"name": "f", "arguments": {}})
            ),
            "arguments that are no JSON": messages(
                USER, call(function={"name": "f", "arguments": "{"})
            ),
            "one id twice": messages(USER, {"role": "assistant", "tool_calls": [CALL, CALL]}),
            "a user's call": messages(USER | {"tool_calls": [CALL]}, ANSWER),
            "an unanswered call": messages(USER, call(), USER, ANSWER),
            "a result of no call": messages(USER, RESULT, ANSWER),
            "a second result": messages(USER, call(), RESULT, RESULT, ANSWER),
            "a late result": messages(USER, call(), ANSWER, RESULT, ANSWER),
            "a function_call": messages(USER, ANSWER | {"function_call": {"name": "f"}}),
            **{
                f"the special token {token}": messages(USER | {"content": f"a<|{token}|>"}, ANSWER)
                for token in SPECIAL
            },
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
    ends_with_call = messages(
        image("user", image_url={"url": "https://a"}),
        ANSWER | {"function_call": None},
        call(),
        tools=[TOOL | {"function": {"name": "f", "parameters": {}, "strict": None}}],
    )
    twice = b'{"messages": 1, "messages": [{"role": "assistant", "content": "last wins"}]}\n'

    assert judge_training_file(jsonl(tool_call) * 9 + twice, purpose="training") is None
    assert judge_training_file(jsonl(ends_with_call), purpose="validation") is None
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
                st.sampled_from(
                    ["role", "content", "weight", "tool_calls", "type", "text", "function", "name"]
                ),
                inner,
                max_size=4,
            )
        ),
    )
)
def test_no_message_tool_or_call_makes_the_judgement_fail(value: Any) -> None:
    calling = {"role": "assistant", "tool_calls": [value]}
    for record in (
        messages(value, ANSWER),
        messages(USER, calling),
        messages(USER, ANSWER, tools=[value]),
    ):
        problem = judge_training_file(json.dumps(record).encode(), purpose="validation")

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
        ask(client, job.fine_tuned_model, prompt).choices[0].message.content
        for prompt in prompts * 2
    ]

    assert answers[:5] == answers[5:]
    assert len(set(answers)) >= 4
    assert all(0 < len(answer) <= 200 for answer in answers)
    assert all(a[i : i + 2] in known for a in answers for i in range(len(a) - 1) if "\n" not in a)


def test_an_answer_begins_as_the_one_to_the_most_similar_text_did(
    endpoint: Rehearsal, client: openai.OpenAI
) -> None:
    topics = {"夜に眠れません": "睡眠", "母がこわいです": "家族", "上司がこわいです": "職場"}
    pairs = [
        messages(USER | {"content": text}, {"role": "assistant", "content": f"{topic}ですね。"})
        for text, topic in topics.items()
    ]
    job = finish(endpoint, client, start_job(client, jsonl(*pairs * 4)))
    said = ["上司がこわい", "昨日も眠れません", "母がこわい"]
    answers = [ask(client, job.fine_tuned_model, text).choices[0].message.content for text in said]

    assert answers == ["職場ですね。", "睡眠ですね。", "家族ですね。"]


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
            {"role": "system", "content": "d"},
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
        ("max_tokens", {"max_tokens": 0}),
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


def ask_json(client: openai.OpenAI, model: str, wanted: Any, text: str = "眠れません") -> Any:
    answer = ask(client, model, text, response_format=wanted, temperature=0)
    return json.loads(answer.choices[0].message.content)


POINTS = {"type": "integer", "enum": [0, 1, 2, 3, 4, 5]}


@pytest.fixture(scope="module")
def scoring(sdk: openai.OpenAI) -> Iterator[tuple[Rehearsal, openai.OpenAI, Any]]:
    """A finished job on made-up dialogues with their scores."""
    with Rehearsal() as running:
        client = connected(sdk, running)
        job = start_job(client, score_file(120), method=hyperparameters(n_epochs=2, batch_size=30))
        yield running, client, finish(running, client, job)
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
        json_schema({"reason": {"type": "string"}, "winner": {"type": "string"}}),
        json_schema({"a": {"type": "integer"}}),
        json_schema({"a": POINTS | {"enum": []}}),
        json_schema({"a": POINTS | {"enum": [1, "2"]}}),
        json_schema({"a": POINTS | {"minimum": 0}}),
    ],
)
def test_a_response_format_other_than_scores_or_a_verdict_is_refused(
    endpoint: Rehearsal, wanted: Any
) -> None:
    body = {"model": BASE, "messages": [USER], "response_format": wanted}
    status, answer = raw(endpoint, "POST", "/chat/completions", json.dumps(body).encode())

    assert (status, answer["error"]["param"]) == (400, "response_format")


VERDICT = json_schema(
    {"reason": {"type": "string"}, "winner": {"type": "string", "enum": ["A", "B", "tie"]}}
)
SAID = [{"role": "user", "content": "夜に何度も目が覚めて、眠れません。"}]


def judged(client: openai.OpenAI, model: str, a: str, b: str) -> str:
    text = json.dumps({"dialogue": SAID, "A": a, "B": b}, ensure_ascii=False)
    answer = ask(client, model, text, response_format=VERDICT, temperature=0)
    verdict = json.loads(answer.choices[0].message.content)

    assert list(verdict) == ["reason", "winner"]
    return str(verdict["winner"])


@pytest.mark.parametrize(("a", "b"), [("眠れませんか。", "Buy now!"), ("夜に目が覚めて。", "zz")])
def test_a_base_model_judges_by_what_was_said_in_the_dialogue(
    client: openai.OpenAI, a: str, b: str
) -> None:
    assert [judged(client, BASE, *pair) for pair in ((a, b), (b, a), (a, a))] == ["A", "B", "tie"]


def test_a_tuned_model_judges_by_what_it_has_learned(
    endpoint: Rehearsal, client: openai.OpenAI
) -> None:
    data = jsonl(*[messages(USER, {"role": "assistant", "content": "Buy now!"})] * 10)
    model = finish(endpoint, client, start_job(client, data)).fine_tuned_model

    assert judged(client, model, "眠れませんか。", "Buy now!") == "B"
    assert judged(client, BASE, "眠れませんか。", "Buy now!") == "A"


@pytest.mark.parametrize(
    "text",
    [
        *("はい", "[1]", '{"A": "", "B": ""}', '{"dialogue": [], "A": "x"}'),
        *('{"dialogue": ["x"], "A": "", "B": ""}', '{"dialogue": [], "A": 1, "B": ""}'),
    ],
)
def test_what_is_no_pair_of_answers_is_not_judged(endpoint: Rehearsal, text: str) -> None:
    asked = [{"role": "user", "content": text}]
    body = {"model": BASE, "messages": asked, "response_format": VERDICT}
    status, answer = raw(endpoint, "POST", "/chat/completions", json.dumps(body).encode())

    assert (status, answer["error"]["param"]) == (400, "messages")


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


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/files/file-unknown", 404),
        ("GET", "/files/file-unknown/content", 404),
        ("GET", "/fine_tuning/jobs/ftjob-unknown", 404),
        ("GET", "/fine_tuning/jobs/ftjob-unknown/events", 404),
        ("POST", "/uploads/upload_unknown/complete", 404),
        ("GET", "/fine_tuning/jobs?limit=0", 400),
        ("GET", "/fine_tuning/jobs?limit=x", 400),
        ("GET", "/files?after=file-unknown", 400),
        ("GET", "/models/", 200),
    ],
)
def test_each_path_answers_in_the_apis_shape(
    endpoint: Rehearsal, method: str, path: str, status: int
) -> None:
    assert raw(endpoint, method, path)[0] == status


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b"\xff", b'{"n": NaN}', b"[" * 200_000], ids=lambda b: str(b[:8])
)
def test_a_malformed_body_is_refused(endpoint: Rehearsal, body: bytes) -> None:
    assert raw(endpoint, "POST", "/chat/completions", body)[0] == 400


@pytest.mark.parametrize("headers", [{"Transfer-Encoding": "chunked"}, {"Content-Length": "x"}])
def test_a_body_of_unknown_length_is_refused(endpoint: Rehearsal, headers: dict[str, str]) -> None:
    assert raw(endpoint, "POST", "/files", headers=AUTHORIZED | headers)[0] == 411


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


# --- The end --------------------------------------------------------------------------------------


def test_closing_in_the_middle_of_a_job_is_quick(
    sdk: openai.OpenAI, capfd: pytest.CaptureFixture[str]
) -> None:
    before = set(threading.enumerate())
    with Rehearsal() as endpoint:
        client = connected(sdk, endpoint)
        start_job(client, dialogue_files()[0] * 20, method=hyperparameters(n_epochs=50))
        endpoint.wait_for_progress(5)
    endpoint.close()

    assert capfd.readouterr() == ("", "")
    assert set(threading.enumerate()) <= before


def test_a_client_that_drops_makes_no_noise(capfd: pytest.CaptureFixture[str]) -> None:
    with Rehearsal() as endpoint:
        for sent in (b"", b"GET /v1/mo", b"POST /v1/files HTTP/1.1\r\nContent-Length: 9\r\n\r\nx"):
            with socket.create_connection(("127.0.0.1", port_of(endpoint))) as connection:
                connection.sendall(sent)
        assert raw(endpoint, "GET", "/models")[0] == 200

    assert capfd.readouterr() == ("", "")


def test_an_endpoint_never_closed_does_not_hold_up_the_programs_end() -> None:
    code = """
import http.client, openai_sft_rehearsal
endpoint = openai_sft_rehearsal.Rehearsal(latency=3600).start()
connection = http.client.HTTPConnection("127.0.0.1", int(endpoint.url.split(":")[2][:-3]))
body = '{"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "x"}]}'
connection.request("POST", "/v1/chat/completions", body, {"Authorization": "Bearer x"})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, timeout=20, check=True)

    assert done.returncode == 0


def test_an_endpoint_that_never_started_closes() -> None:
    endpoint = Rehearsal()
    endpoint.close()
    endpoint.close()

    assert raw(endpoint, "GET", "/models")[0] == 0


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_command_quietly(number: signal.Signals, code: int) -> None:
    command = [
        *(sys.executable, "-m", "openai_sft_rehearsal", "--port", "0"),
        *("--latency", "0.01", "--max-in-flight", "1"),
    ]
    with subprocess.Popen(
        command, cwd=PROJECT, stderr=subprocess.PIPE, encoding="utf-8", errors="replace"
    ) as process:
        assert process.stderr is not None
        found = re.search(r"http://127\.0\.0\.1:\d+/v1", process.stderr.readline())
        assert found is not None
        client = openai.OpenAI(base_url=found.group(), api_key="x", max_retries=0)
        with client:
            assert ask(client, BASE).choices[0].message.content
        process.send_signal(number)

        assert process.wait(10) == code
        assert process.stderr.read() == ""


def test_a_taken_port_ends_with_2(endpoint: Rehearsal) -> None:
    assert main(["--port", str(port_of(endpoint))]) == 2


# --- Other engines, and what is kept --------------------------------------------------------------


class Scripted:
    """An engine that trains ten steps, each as soon as it may, and repeats what it is asked."""

    owner = "scripted"
    base_models: Mapping[str, str] = {"org/base": "org/base", "short": "org/base"}
    shutdown_date = None

    def __init__(self, steps: int = 10) -> None:
        self.steps = steps  # which it may take
        self.orders: list[Order] = []
        self.closed = self.finished = 0
        self.forgotten: list[str] = []

    def train(self, order: Order) -> Generator[Progress, None, None]:
        self.orders.append(order)
        try:
            yield Note("始めます", "warn")
            for step in range(max(1, order.seen - 2), 11):  # some steps are taken twice
                while step > self.steps:
                    time.sleep(0.002)
                    yield None
                metrics = {"step": step, "train_loss": step / 8, "train_mean_token_accuracy": 0.5}
                yield Step(10, metrics)
            yield Kept({"step": 5, "train_loss": 0.625})
            yield Kept({"step": 10, "train_loss": 1.25})
            yield Trained(77)
            self.finished += 1
        finally:
            self.closed += 1

    def answer(self, model: Model, body: dict[str, Any]) -> Reply:
        if model.step == 5:
            raise ApiError(400, "too long", "messages", "context_length_exceeded")
        return Reply(f"{model.base} {model.step}", 3, 2, "length")

    def forget(self, job_id: str) -> None:
        self.forgotten.append(job_id)

    def close(self) -> None:
        """Nothing was started."""


def test_an_engine_is_told_what_to_train_and_its_progress_becomes_the_jobs(
    sdk: openai.OpenAI,
) -> None:
    engine = Scripted()
    with Rehearsal(engine=engine) as endpoint:
        client = connected(sdk, endpoint)
        started = start_job(client, examples(10), model="short", seed=7, suffix="s")
        job = finish(endpoint, client, started)
        events = list(client.fine_tuning.jobs.list_events(job.id))
        checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
        last, first = (c.fine_tuned_model_checkpoint for c in checkpoints)

        assert engine.orders == [
            Order(job.id, "org/base", examples(10), None, 3, 1, 1.0, seed=7, seen=0)
        ]
        assert job.fine_tuned_model == f"ft:org/base:scripted:s:{job.id[-8:]}"
        assert (job.trained_tokens, job.status) == (77, "succeeded")
        assert (last, first) == tuple(f"{job.fine_tuned_model}:ckpt-step-{n}" for n in (10, 5))
        assert [(e.level, e.message) for e in events if e.level == "warn"] == [("warn", "始めます")]
        assert [e.data["step"] for e in events if e.type == "metrics"][::-1] == [*range(1, 11)]
        for name in (job.fine_tuned_model, last):
            answer = ask(client, name)
            assert answer.choices[0].message.content == "org/base 10"
            assert answer.choices[0].finish_reason == "length"
            assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (3, 5)
        with pytest.raises(openai.BadRequestError, match="too long"):
            ask(client, first)
        assert judge.check_exchanges(endpoint.exchanges) == []


def test_a_cancelled_job_ends_the_engines_work_at_once(sdk: openai.OpenAI) -> None:
    engine = Scripted(steps=3)
    with Rehearsal(engine=engine) as endpoint:
        client = connected(sdk, endpoint)
        job = start_job(client, examples(10), model="org/base")
        until(lambda: endpoint.job(job.id).metrics[2:])
        client.fine_tuning.jobs.cancel(job.id)
        until(lambda: engine.forgotten)

        assert (engine.closed, engine.finished, engine.forgotten) == (1, 0, [job.id])


def test_an_engine_that_fails_fails_the_job_with_its_words(sdk: openai.OpenAI) -> None:
    class Failing(Scripted):
        def train(self, order: Order) -> Generator[Progress, None, None]:
            yield Note("始めます")
            raise TrainingFailed("out_of_memory", "メモリーが足りません", "training_file")

    with Rehearsal(engine=Failing()) as endpoint:
        client = connected(sdk, endpoint)
        job = finish(endpoint, client, start_job(client, examples(10), model="org/base"))

        assert job.status == "failed"
        assert job.error.code == "out_of_memory"
        assert job.error.param == "training_file"
        assert job.error.message == "メモリーが足りません"


def test_a_defect_of_the_engine_ends_its_job_and_no_other(
    sdk: openai.OpenAI, caplog: pytest.LogCaptureFixture
) -> None:
    class Defective(Scripted):
        def train(self, order: Order) -> Generator[Progress, None, None]:
            if order.seed == 1:
                raise KeyError("bits")
            yield from super().train(order)

    with Rehearsal(engine=Defective()) as endpoint:
        client = connected(sdk, endpoint)
        broken, sound = (
            finish(endpoint, client, start_job(client, examples(10), model="short", seed=seed))
            for seed in (1, 2)
        )

    assert (broken.status, broken.error.code) == ("failed", "server_error")
    assert "KeyError" in broken.error.message
    assert sound.status == "succeeded"
    assert any(broken.id in record.getMessage() for record in caplog.records)


def test_an_endpoint_takes_up_what_an_earlier_one_has_left(
    sdk: openai.OpenAI, tmp_path: Path
) -> None:
    with Rehearsal(engine=Scripted(), folder=tmp_path) as endpoint:
        client = connected(sdk, endpoint)
        ended = finish(endpoint, client, start_job(client, examples(10), model="org/base"))
    engine = Scripted(steps=4)
    with Rehearsal(engine=engine, folder=tmp_path) as endpoint:
        client = connected(sdk, endpoint)
        gone = upload(client, examples(1))
        client.files.delete(gone)
        begun = start_job(client, examples(11), model="org/base", metadata={"for": "試験"})
        until(lambda: endpoint.job(begun.id).metrics[3:])
        events = [e.id for e in client.fine_tuning.jobs.list_events(begun.id)]
    with (tmp_path / "service.jsonl").open("ab") as diary:
        diary.write(b'{"job": "ftjob-half')
    engine = Scripted()
    with Rehearsal(engine=engine, folder=tmp_path) as endpoint:
        client = connected(sdk, endpoint)
        job = finish(endpoint, client, client.fine_tuning.jobs.retrieve(begun.id))

        assert engine.orders[0].seen == 5
        assert [e.id for e in client.fine_tuning.jobs.list_events(begun.id)][
            -len(events) :
        ] == events
        assert (job.status, job.metadata) == ("succeeded", {"for": "試験"})
        assert [*(j.id for j in client.fine_tuning.jobs.list())] == [begun.id, ended.id]
        assert client.files.content(begun.training_file).content == examples(11)
        assert gone not in {file.id for file in client.files.list()}
        assert ask(client, ended.fine_tuned_model).choices[0].message.content == "org/base 10"
        table = client.files.content(job.result_files[0]).text
        assert [row["step"] for row in csv.DictReader(io.StringIO(table))] == [
            str(n) for n in range(1, 11)
        ]
    with Rehearsal(engine=Scripted(), folder=tmp_path) as endpoint:  # the half line is gone
        assert set(endpoint.jobs) == {begun.id, ended.id}


@pytest.mark.parametrize("status", ["validating_files", "running"])
def test_a_job_taken_up_without_its_file_fails_and_says_which(
    sdk: openai.OpenAI, tmp_path: Path, status: str
) -> None:
    with Rehearsal(engine=Scripted(steps=0), folder=tmp_path) as endpoint:
        endpoint.hold(status)
        client = connected(sdk, endpoint)
        begun = start_job(client, examples(10), model="org/base")
        wait_until(endpoint, client, begun, status)
        client.files.delete(begun.training_file)
    with Rehearsal(engine=Scripted(), folder=tmp_path) as endpoint:
        client = connected(sdk, endpoint)
        job = finish(endpoint, client, client.fine_tuning.jobs.retrieve(begun.id))

        assert (job.status, job.error.code) == ("failed", "file_not_found")
        assert begun.training_file in job.error.message


def test_two_endpoints_never_share_a_folder(sdk: openai.OpenAI, tmp_path: Path) -> None:
    with (
        Rehearsal(engine=Scripted(), folder=tmp_path),
        pytest.raises(OSError, match="別のエンドポイントが使っています"),
    ):
        Rehearsal(engine=Scripted(), folder=tmp_path)
    with Rehearsal(engine=Scripted(), folder=tmp_path) as endpoint:
        assert raw(endpoint, "GET", "/models")[0] == 200


def test_a_deleted_model_is_gone_with_its_checkpoints_for_good(
    sdk: openai.OpenAI, tmp_path: Path
) -> None:
    engine = Scripted()
    with Rehearsal(engine=engine, folder=tmp_path) as endpoint:
        client = connected(sdk, endpoint)
        job = finish(endpoint, client, start_job(client, examples(10), model="org/base"))
        assert client.models.delete(job.fine_tuned_model).deleted
        with pytest.raises(openai.BadRequestError):
            client.models.delete("org/base")
        assert engine.forgotten == [job.id]
    with Rehearsal(engine=engine, folder=tmp_path) as endpoint:
        client = connected(sdk, endpoint)
        assert {model.id for model in client.models.list()} == {"org/base", "short"}
        with pytest.raises(openai.NotFoundError):
            ask(client, f"{job.fine_tuned_model}:ckpt-step-10")
        assert judge.check_exchanges(endpoint.exchanges) == []


def test_with_a_key_nobody_else_is_answered(sdk: openai.OpenAI) -> None:
    with Rehearsal(api_key="right") as endpoint:
        assert raw(endpoint, "GET", "/models", headers={"Authorization": "Bearer wrong"})[0] == 401
        assert raw(endpoint, "GET", "/models", headers={})[0] == 401
    with Rehearsal(api_key="secret") as endpoint:
        client = sdk.with_options(base_url=endpoint.url, api_key="secret")
        assert client.models.retrieve(BASE).id == BASE


def test_an_endpoint_that_others_reach_needs_a_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="APIキーが必要です"):
        Rehearsal(host="0.0.0.0")
    assert main(["--port", "0", "--host", "0.0.0.0"]) == 2
    (tmp_path / "key").write_text("\n")
    assert main(["--port", "0", "--api-key-file", str(tmp_path / "key")]) == 2


@pytest.mark.parametrize(
    "options",
    [
        ["--engine", "trl"],
        ["--engine", "trl", "--model", "tiny"],
        ["--state", "kept"],
        ["--model", "tiny"],
        ["--full"],
    ],
)
def test_an_engine_takes_its_own_options_and_no_others(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    assert main(["--port", "0", *options]) == 2
    assert list(tmp_path.iterdir()) == []


# --- The example dialogues ------------------------------------------------------------------------


def test_the_example_dialogues_have_kokorochats_form() -> None:
    dialogues: list[Any] = example_dialogues()
    utterances = [turn for dialogue in dialogues for turn in dialogue["dialogue"]]

    assert len(dialogues) == 24
    assert {turn["role"] for turn in utterances} == {"counselor", "client"}
    assert any("\n" in turn["utterance"] for turn in utterances)
    assert not any("\\n" in turn["utterance"] for turn in utterances)
    for dialogue in dialogues:
        review = dialogue["review_by_client_en"]
        items = list(review.values())[4:24]
        assert review["score"] == sum(items)
        assert all(0 <= points <= 5 for points in items)


def test_a_real_dialogue_has_these_fields_and_more() -> None:
    real = PROJECT.parent / "shared" / "kokorochat" / "kokorochat_dialogues" / "10.json"
    if not real.exists():
        pytest.skip("KokoroChat is not at hand")
    theirs, ours = json.loads(real.read_text(encoding="utf-8")), example_dialogues()[0]

    def paths(value: Any) -> set[str]:
        if isinstance(value, dict):
            return {f"{key}/{path}" for key in value for path in paths(value[key])}
        return paths(value[0]) if isinstance(value, list) else {""}

    assert paths(theirs) > paths(ours)
