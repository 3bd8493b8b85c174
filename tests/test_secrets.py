"""The key appears nowhere, files are the user's alone, and what the service says is only text."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import stat
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from edges import Forward, Gateway, Reply, Request, saying
from endpoint import Fault, Rehearsal
from faults import CHAT, JOBS, asked
from helpers import examples, recorded_run, training_file

import openai_sft_example
from openai_sft import (
    ConfigurationError,
    DataError,
    OpenAISFT,
    OpenAISFTError,
    explain_api_error,
)

MakeSFT = Callable[..., OpenAISFT]

KEY = "sk-recognisable-0123456789-wxyz"
HOSTILE = "\x1b[31mred\x07\r\n\x9b2J\u202e\u2028<b>"
SHORT: dict[str, Any] = {"epochs": 1, "batch_size": 4, "max_test_cases": 1}


@pytest.fixture
def everything_logged(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """All that anybody logs at any level, with its tracebacks."""
    caplog.set_level(logging.DEBUG)
    for name in ("openai", "httpx", "httpcore", "httpx2", "httpcore2", "openai_sft"):
        caplog.set_level(logging.DEBUG, name)
    return lambda: caplog.text


@pytest.fixture
def echoing(endpoint: Rehearsal) -> Iterator[Gateway]:
    """An endpoint that says in every field of an error which key it was asked with."""

    def echo(request: Request, forward: Forward) -> Reply:
        reply = forward(request)
        if reply.status < 400:
            return reply
        said = f"You sent {request.headers['authorization']}"
        error = {"message": said, "type": said, "param": said, "code": said}
        return saying({"error": error}, reply.status)

    with Gateway(endpoint, echo) as gateway:
        yield gateway


def everything_told(error: BaseException) -> str:
    """All the ways in which an error may end up before somebody's eyes."""
    parts = [str(error), repr(error), repr(vars(error)), "".join(traceback.format_exception(error))]
    if isinstance(error, Exception):
        parts.append(explain_api_error(error))
    return "\n".join(parts)


def everything_written(folder: Path) -> str:
    return "\n".join(
        f"{path}\n{path.read_bytes().decode('utf-8', 'replace')}"
        for path in folder.rglob("*")
        if path.is_file()
    )


# ── The key ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("fault", "method", "path", "ready"),
    [
        ("401", "POST", "/files", False),
        ("400", "POST", JOBS, False),
        ("400", "POST", JOBS, True),
        ("403", "GET", "*/checkpoints", False),
        ("503", "GET", "/fine_tuning/jobs/*", True),
        ("400", "POST", CHAT, False),
        ("400", "POST", CHAT, True),
        ("401", "POST", CHAT, False),
        ("malformed", "POST", CHAT, False),
    ],
)
def test_the_key_is_nowhere_even_where_the_endpoint_tells_it(
    make_sft: MakeSFT,
    endpoint: Rehearsal,
    echoing: Gateway,
    clean_environment: Path,
    everything_logged: Callable[[], str],
    fault: str,
    method: str,
    path: str,
    ready: bool,
) -> None:
    client = openai.OpenAI(api_key=KEY, base_url=echoing.url) if ready else None
    own = None if ready else KEY
    sft = make_sft(api_key=own, client=client, base_url=echoing.url)
    endpoint.inject(Fault(fault, method, path, times=2))
    told = ""
    try:
        sft.run_full_pipeline(**SHORT)
    except (openai.OpenAIError, OpenAISFTError) as error:
        told = everything_told(error)
    if client is not None:
        client.close()

    assert any(e.fault == fault for e in endpoint.exchanges)
    assert KEY not in told
    assert KEY not in everything_logged()
    assert KEY not in everything_written(clean_environment)
    assert KEY not in repr(sft) + str(sft) + sft.describe_remote_state()


def test_the_command_line_shows_no_key(
    endpoint: Rehearsal,
    echoing: Gateway,
    dataset: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    endpoint.inject(Fault("400", "POST", JOBS))
    code = openai_sft_example.main(
        ["--base-url", echoing.url, "--dataset", str(dataset), "--verbose", "--yes"]
    )
    shown = capsys.readouterr()

    assert code == 1
    assert "400" in shown.err
    assert KEY not in shown.out + shown.err


def test_a_key_in_an_answer_that_is_no_json_is_not_shown_either(
    make_sft: MakeSFT, endpoint: Rehearsal, everything_logged: Callable[[], str]
) -> None:
    def page(request: Request, forward: Forward) -> Reply:
        text = f"<html>Denied: {request.headers['authorization']}</html>"
        return Reply(403, text.encode(), "text/html")

    with Gateway(endpoint, page) as gateway:
        sft = make_sft(api_key=KEY, client=None, base_url=gateway.url)
        with pytest.raises(openai.PermissionDeniedError) as caught:
            sft.cancel_job("ftjob-1")

    assert KEY not in everything_told(caught.value)
    assert KEY not in everything_logged()


def test_a_dotenv_is_read_and_never_written(
    make_sft: MakeSFT, clean_environment: Path, endpoint: Rehearsal
) -> None:
    dotenv = clean_environment / ".env"
    dotenv.write_text(f"OPENAI_API_KEY={KEY}\n", "utf-8")
    before = (dotenv.read_bytes(), dotenv.stat().st_mtime_ns)
    sft = make_sft(api_key=None, client=None, base_url=endpoint.url)
    sft.run_full_pipeline(**SHORT)

    assert (dotenv.read_bytes(), dotenv.stat().st_mtime_ns) == before
    assert KEY not in everything_written(clean_environment / "out")


# ── Files ────────────────────────────────────────────────────────────────────────────────────


def test_every_file_of_a_run_is_the_users_alone(make_sft: MakeSFT, clean_environment: Path) -> None:
    before = os.umask(0)
    try:
        sft = make_sft()
        sft.run_full_pipeline(**SHORT)
        files = [path for path in (clean_environment / "out").rglob("*") if path.is_file()]
    finally:
        os.umask(before)

    assert len(files) >= 8
    assert {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in files} == {
        path.name: "0o600" for path in files
    }


@pytest.fixture
def unfinished(make_sft: MakeSFT, endpoint: Rehearsal) -> Path:
    """The record of a run that stopped before its evaluation's first answer."""
    endpoint.inject(Fault("401", "POST", CHAT))
    with make_sft() as sft, pytest.raises(openai.AuthenticationError):
        sft.run_full_pipeline(**SHORT)
    return Path(sft.files["record"])


@pytest.mark.parametrize("kind", ["train", "test", "valid", "manifest"])
def test_a_data_file_that_is_a_link_is_refused(
    make_sft: MakeSFT, unfinished: Path, kind: str
) -> None:
    path = Path(json.loads(unfinished.read_text("utf-8"))["files"][kind])
    outside = path.rename(path.parents[1] / "outside")
    path.symlink_to(outside)
    with pytest.raises(DataError, match="リンク"):
        make_sft().resume()


def test_the_answers_are_not_written_through_a_link(make_sft: MakeSFT, unfinished: Path) -> None:
    (journal,) = unfinished.parent.glob("evaluation_*.jsonl")
    outside = unfinished.parents[1] / "outside"
    outside.write_text("mine\n", "utf-8")
    journal.unlink()
    journal.symlink_to(outside)
    with pytest.raises(OpenAISFTError):
        make_sft().resume()

    assert outside.read_text("utf-8") == "mine\n"


def test_a_lock_or_a_record_that_is_a_link_touches_nothing_outside(
    make_sft: MakeSFT, unfinished: Path
) -> None:
    outside = unfinished.parents[1] / "outside"
    unfinished.with_name(f".{unfinished.stem}.lock").symlink_to(outside)
    with contextlib.suppress(OpenAISFTError):
        make_sft().resume()

    assert not outside.exists()


@pytest.mark.parametrize(
    "name",
    [
        "../elsewhere/run_20260101_000000",
        "/etc/passwd",
        "../../x",
        "run_1",
        "",
        "run_*",
        "\x1b[31m",
    ],
)
def test_a_run_named_from_outside_is_refused(
    make_sft: MakeSFT, clean_environment: Path, name: str
) -> None:
    recorded_run(clean_environment / "elsewhere", "20260101_000000", kind="evaluation", plan={})
    with pytest.raises(ConfigurationError) as caught:
        make_sft().resume(name)

    assert str(caught.value).isprintable()


def test_a_record_leads_to_no_file_outside_its_folder(make_sft: MakeSFT, unfinished: Path) -> None:
    outside = unfinished.parents[1] / "train.jsonl"
    facts = json.loads(unfinished.read_text("utf-8"))
    Path(facts["files"]["train"]).rename(outside)
    facts["files"]["train"] = "../train.jsonl"
    unfinished.write_text(json.dumps(facts), "utf-8")
    with pytest.raises(DataError):
        make_sft().resume()


# ── What the service says ────────────────────────────────────────────────────────────────────


def hostile_words(value: Any, key: str = "") -> Any:
    """``value`` with awkward characters in all texts that are shown to people or kept as names."""
    if isinstance(value, dict):
        return {name: hostile_words(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [hostile_words(item, key) for item in value]
    shown = ("message", "code", "fine_tuned_model", "fine_tuned_model_checkpoint")
    return value + HOSTILE if key in shown and isinstance(value, str) else value


@pytest.fixture
def hostile(endpoint: Rehearsal) -> Iterator[Gateway]:
    def bend(request: Request, forward: Forward) -> Reply:
        reply = forward(request)
        if reply.content_type != "application/json":
            return reply
        # No model has such a name, and a 404 would be waited out.
        status = 401 if reply.status == 404 and request.path == CHAT else reply.status
        return saying(hostile_words(reply.json), status)

    with Gateway(endpoint, bend) as gateway:
        yield gateway


def inert(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


def test_what_the_service_says_of_a_run_comes_out_inert(
    hostile: Gateway,
    dataset: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "openai_sft")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    place = ["--base-url", hostile.url, "--output-dir", "out", "--yes"]
    code = openai_sft_example.main(
        [*place, "--dataset", str(dataset), "--epochs", "1", "--batch-size", "4", "--verbose"]
    )
    openai_sft_example.main([*place, "--list"])
    openai_sft_example.main([*place, "--evaluate-only"])
    openai_sft_example.main([*place, "--cancel", f"ftjob{HOSTILE}"])
    shown = capsys.readouterr()
    lines = [r.getMessage() for r in caplog.records if r.name == "openai_sft"]

    assert code == 1  # no model answers to such a name
    assert inert(shown.out)
    assert inert(shown.err)
    assert [line for line in lines if not line.isprintable()] == []


def test_what_the_service_says_of_a_failed_job_comes_out_inert(
    make_sft: MakeSFT, endpoint: Rehearsal, hostile: Gateway, clean_environment: Path
) -> None:
    endpoint.inject(Fault("job_failed", "POST", JOBS))
    sft = make_sft(client=None, base_url=hostile.url)
    with pytest.raises(OpenAISFTError) as caught:
        sft.run_full_pipeline(**SHORT)
    with pytest.raises(openai.NotFoundError) as missing:
        sft.cancel_job("ftjob-1")

    assert inert(str(caught.value))
    assert explain_api_error(missing.value).isprintable()
    assert "red" in str(caught.value)


def test_the_command_that_comes_back_cannot_be_made_another(
    make_sft: MakeSFT, endpoint: Rehearsal, clean_environment: Path
) -> None:
    def bend(request: Request, forward: Forward) -> Reply:
        reply = forward(request)
        if request.line != ("POST", JOBS):
            return reply
        return saying({**reply.json, "id": "ftjob-1; touch pwned #\x1b[31m"})

    with Gateway(endpoint, bend) as gateway:
        sft = make_sft(client=None, base_url=gateway.url)
        file = training_file(clean_environment)
        sft.create_fine_tune_job(sft.upload_training_file(file), 1)
    told = sft.describe_remote_state()

    assert told.isprintable()
    assert not re.search(r"--job-id [^'\"\s]*;", told)


def test_an_answer_is_kept_as_it_was_but_never_printed(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    def bend(request: Request, forward: Forward) -> Reply:
        reply = forward(request)
        if request.path != CHAT:
            return reply
        body = reply.json
        body["choices"][0]["message"]["content"] = HOSTILE
        return saying(body)

    with Gateway(endpoint, bend) as gateway:
        sft = make_sft(client=None, base_url=gateway.url)
        results = sft.evaluate_model_comprehensive("gpt-4o-mini-2024-07-18", examples(1), [])
        path = Path(sft.save_results(results))
    (response,) = results["test_evaluation"]["responses"]

    assert response["output"] == HOSTILE
    assert "\x1b" not in path.read_text("utf-8")
    assert len(asked(endpoint, "POST", CHAT)) == 1
