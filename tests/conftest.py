"""Fixtures: a vocabulary that needs no network, the endpoint, and instances that talk to it."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from endpoint import Rehearsal
from faults import Clock
from helpers import (
    KOKOROCHAT,
    Ended,
    records,
    training_file,
    unpack_vocabulary,
    write_jsonl,
)
from hypothesis import settings

import openai_sft_example
from openai_sft import Dialogue, OpenAISFT, read_dialogues
from openai_sft_rehearsal import example_dialogues

settings.register_profile("suite", max_examples=40, deadline=None, derandomize=True, database=None)
settings.load_profile("suite")

PROXIES = ("http_proxy", "https_proxy", "all_proxy")


@pytest.fixture(scope="session", autouse=True)
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which tiktoken finds ``o200k_base``, here and in the processes tests start."""
    folder = tmp_path_factory.mktemp("vocabulary")
    unpack_vocabulary(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def no_authorities(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No certificate is trusted, here and in the processes tests start: reading those of the
    system takes longer than most tests, for each client anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SSL_CERT_FILE", raising=False)
        patch.setenv("SSL_CERT_DIR", str(tmp_path_factory.mktemp("authorities")))
        yield


@pytest.fixture
def clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No setting of the person who runs the tests is seen: no key, no proxy, no ``.env``."""
    for name in list(os.environ):
        if name.startswith("OPENAI_") or name.lower() in PROXIES:
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def endpoint() -> Iterator[Rehearsal]:
    """A running endpoint; at the end OpenAI's own description judges all it was asked and said."""
    with Rehearsal() as running:
        yield running
        exchanges = list(running.exchanges)
    if importlib.util.find_spec("judge"):
        problems = importlib.import_module("judge").check_exchanges(exchanges)

        assert problems == []


@pytest.fixture
def dataset(clean_environment: Path) -> Path:
    """Twenty dialogues in a JSONL file."""
    return write_jsonl(clean_environment / "dialogues.jsonl", records(20))


@pytest.fixture
def example_file(clean_environment: Path) -> Path:
    """The rehearsal's own dialogues in a JSONL file."""
    return write_jsonl(clean_environment / "examples.jsonl", example_dialogues())


@pytest.fixture
def file(clean_environment: Path) -> Path:
    """A training file of twelve examples."""
    return training_file(clean_environment)


@pytest.fixture
def out(clean_environment: Path) -> Path:
    """Where ``make_sft`` and ``place`` have a run's files go."""
    return clean_environment / "out"


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], clean_environment: Path) -> Callable[..., Ended]:
    """The command line in this process, which has no terminal."""

    def run(*arguments: str | Path) -> Ended:
        try:
            code = openai_sft_example.main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else -1
        return Ended(code, *capsys.readouterr())

    return run


@pytest.fixture
def place(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[str, ...]]:
    """Arguments and a key for a short run against the endpoint at a URL."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-recognisable-0123456789-wxyz")

    def arguments(url: str) -> tuple[str, ...]:
        return (
            *("--base-url", url, "--dialect", "openai", "--dataset", str(dataset)),
            *("--poll-interval", "0"),
            *("--epochs", "1", "--batch-size", "4", "--max-test-cases", "1"),
            *("--output-dir", "out"),
        )

    return arguments


@pytest.fixture(scope="session")
def kokorochat() -> list[Dialogue]:
    """KokoroChat whole, read once; the tests of it are skipped where it isn't."""
    if not KOKOROCHAT.is_dir():
        pytest.skip("KokoroChat isn't here")
    return read_dialogues(str(KOKOROCHAT))


@pytest.fixture(scope="session")
def sdk() -> Iterator[openai.OpenAI]:
    """The SDK's client, made once."""
    with openai.OpenAI(api_key="k", base_url="http://127.0.0.1:1/v1") as client:
        yield client


@pytest.fixture
def make_sft(
    endpoint: Rehearsal, clean_environment: Path, dataset: Path, sdk: openai.OpenAI
) -> Iterator[Callable[..., OpenAISFT]]:
    """Makes instances that talk to ``endpoint``: their time passes only while they sleep, and a
    sleep waits for the endpoint's progress."""
    made: list[OpenAISFT] = []
    clock = Clock(endpoint, moment=0.05)

    def make(**options: Any) -> OpenAISFT:
        own = {"api_key", "base_url", "offline"} & options.keys()  # it makes its client itself
        usual = {
            "client": None if own else sdk.with_options(base_url=endpoint.url),
            "api_key": "k",
            "base_url": endpoint.url,
            "dialect": "openai",
            "dataset": str(dataset),
            "output_dir": clean_environment / "out",
            "clock": clock,
            "sleep": clock.sleep,
            "verbose": False,
        }
        made.append(OpenAISFT(**(usual | options)))
        return made[-1]

    yield make
    for sft in made:
        sft.close()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the library has logged so far, every level of it."""
    caplog.set_level(logging.DEBUG, "openai_sft")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "openai_sft"]
