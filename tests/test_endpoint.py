"""What the tests add to the rehearsal: faults, kept exchanges, and the judge of them."""

from __future__ import annotations

import base64
import itertools
import json
import socket
import threading
from dataclasses import replace
from typing import Any

import judge
import openai
import pytest
from calls import (
    BASE,
    ask,
    connected,
    examples,
    finish,
    hyperparameters,
    metrics_of,
    port_of,
    raw,
    start_job,
    upload,
    wait_until,
)
from endpoint import Fault, Rehearsal


@pytest.fixture
def client(sdk: openai.OpenAI, endpoint: Rehearsal) -> openai.OpenAI:
    return connected(sdk, endpoint)


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
    with socket.create_connection(("127.0.0.1", port_of(endpoint)), timeout=10) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")

        with pytest.raises(ConnectionResetError):
            connection.recv(1)


def test_closing_ends_a_stalled_request(capfd: pytest.CaptureFixture[str]) -> None:
    outcomes: list[Any] = []
    with Rehearsal(faults=[Fault("stall", seconds=3600)]) as endpoint:
        asking = threading.Thread(target=lambda: outcomes.append(raw(endpoint, "GET", "/models")))
        asking.start()
        for _ in itertools.takewhile(lambda _: not endpoint.exchanges, itertools.count()):
            asking.join(0.01)
    asking.join(5)

    assert outcomes == [(0, None)]
    assert capfd.readouterr() == ("", "")


def test_faults_count_what_they_skip_and_hit(endpoint: Rehearsal) -> None:
    endpoint.inject(Fault("500", "get", "/mod*", times=2, skip=1))
    endpoint.inject(Fault("404", path="/files", times=None))
    upload_status = raw(endpoint, "GET", "/files")[0]
    statuses = [raw(endpoint, "GET", "/models")[0] for _ in range(5)]

    assert statuses == [200, 500, 500, 200, 200]
    assert [upload_status] + [raw(endpoint, "GET", "/files")[0] for _ in range(3)] == [404] * 4


def test_chat_faults_empty_refuse_and_cut(endpoint: Rehearsal, client: openai.OpenAI) -> None:
    for kind in ("empty_answer", "refusal", "length"):
        endpoint.inject(Fault(kind))
    client.models.list()  # not a chat: no chat fault hits it
    answers = [ask(client, "gpt-4o-mini") for _ in range(3)]
    empty, refused, cut = (answer.choices[0] for answer in answers)

    assert (empty.message.content, empty.finish_reason) == ("", "stop")
    assert refused.message.content is None
    assert refused.message.refusal
    assert cut.finish_reason == "length"
    assert [answer.usage.completion_tokens for answer in answers] == [
        0,
        0,
        len(cut.message.content),
    ]


@pytest.mark.parametrize(
    ("kind", "code", "steps"), [("flagged", "unsafe_file", 0), ("job_failed", "server_error", 10)]
)
def test_a_job_fault_fails_the_job(
    endpoint: Rehearsal, client: openai.OpenAI, kind: str, code: str, steps: int
) -> None:
    endpoint.inject(Fault(kind))
    job = finish(endpoint, client, start_job(client, method=hyperparameters(n_epochs=1)))

    assert (job.status, job.error.code, job.fine_tuned_model) == ("failed", code, None)
    assert len(metrics_of(client, job)) == steps


def test_a_paused_job_lets_others_pass_until_it_is_released(
    endpoint: Rehearsal, client: openai.OpenAI
) -> None:
    endpoint.inject(Fault("paused_job"))
    paused = start_job(client)

    assert finish(endpoint, client, start_job(client)).status == "succeeded"
    assert wait_until(endpoint, client, paused, "paused").finished_at is None
    endpoint.release()
    assert finish(endpoint, client, paused).status == "succeeded"


def test_a_result_file_may_be_base64(endpoint: Rehearsal, client: openai.OpenAI) -> None:
    (name,) = finish(endpoint, client, start_job(client)).result_files
    endpoint.inject(Fault("base64_result"))
    encoded, plain = client.files.content(name).content, client.files.content(name).content

    assert encoded != plain
    assert base64.b64decode(encoded, validate=True) == plain


# --- What is kept, and its judge ------------------------------------------------------------------


def test_what_was_asked_and_said_is_kept_in_order(
    endpoint: Rehearsal, client: openai.OpenAI
) -> None:
    upload(client, examples(1), "対話 1.jsonl")
    listed = client.files.list(purpose="fine-tune", limit=1)
    raw(endpoint, "POST", "/chat/completions", b"{")
    sent, asked, broken = endpoint.exchanges

    assert sent.request == {
        "purpose": "fine-tune",
        "file": {"filename": "対話 1.jsonl", "bytes": len(examples(1))},
    }
    assert (asked.method, asked.path, asked.request) == ("GET", "/files", None)
    assert asked.query == {"purpose": "fine-tune", "limit": "1"}
    assert asked.response["data"][0]["id"] == sent.response["id"] == listed.data[0].id
    assert (broken.request, broken.status) == (None, 400)


@pytest.mark.skipif(not judge.DESCRIPTION.exists(), reason="OpenAI's description is not at hand")
def test_the_judge_sees_what_is_wrong(endpoint: Rehearsal, client: openai.OpenAI) -> None:
    client.models.list()
    ask(client, "gpt-4o-mini")
    start_job(client, metadata={"k": "v"}, method=hyperparameters(n_epochs=1))
    raw(endpoint, "GET", "/nothing")
    models, chat, _, job, missing = endpoint.exchanges
    wrong = [
        replace(models, response=models.response | {"object": "array"}),
        replace(models, response=None),
        replace(models, path="/nothing"),
        replace(chat, response=chat.response | {"object": "chat.completion.chunk"}),
        replace(chat, request=chat.request | {"n": 0}),
        replace(chat, content_type="text/plain"),
        replace(missing, response={"error": "not found"}),
        *(
            replace(job, request=job.request | more)
            for more in (
                {"trainingType": "Standard"},
                {"method": hyperparameters(epochs=1)},
                {"metadata": {str(n): "" for n in range(17)}},
                {"metadata": {"k" * 65: ""}},
                {"metadata": {"k": "v" * 513}},
            )
        ),
    ]

    assert judge.check_exchanges([models, chat, job, missing]) == []
    assert [len(judge.check_exchanges([exchange])) > 0 for exchange in wrong] == [True] * 12
