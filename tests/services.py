"""Services that speak the API in their own ways, as the rehearsal plays them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import openai
from endpoint import Rehearsal
from faults import Clock

from openai_sft import OpenAISFT

LLAMA = "meta-llama/Llama-3.1-8B-Instruct"
MINI = "gpt-4o-mini-2024-07-18"
SHORT: dict[str, Any] = {"epochs": 2, "batch_size": 4, "max_test_cases": 1}
# What a service needs besides.
MODELS = {"nebius": LLAMA}
OPTIONS: dict[str, dict[str, Any]] = {
    "azure": {"training_type": "Standard"},
    "nebius": {"learning_rate": 2e-5},
}

Make = Callable[..., OpenAISFT]


class Service(NamedTuple):
    """A service as it is played, its clock, and what makes instances that talk to it."""

    endpoint: Rehearsal
    clock: Clock
    make: Make
    options: Mapping[str, Any]  # of a run


@contextlib.contextmanager
def service(
    dialect: str, sdk: openai.OpenAI, folder: Path, dataset: Path, **more: Any
) -> Iterator[Service]:
    """A service that runs, for data in ``dataset`` and runs in ``folder / "out"``."""
    with Rehearsal(dialect=dialect, **more) as endpoint, contextlib.ExitStack() as opened:
        clock = Clock(endpoint, moment=0.05)

        def make(**settings: Any) -> OpenAISFT:
            usual = {
                "client": sdk.with_options(base_url=endpoint.url),
                "api_key": "k",
                "base_url": endpoint.url,
                "dialect": dialect,
                "model": MODELS.get(dialect, MINI),
                "dataset": str(dataset),
                "output_dir": folder / "out",
                "clock": clock,
                "sleep": clock.sleep,
                "verbose": False,
            }
            return opened.enter_context(OpenAISFT(**(usual | settings)))

        yield Service(endpoint, clock, make, {**SHORT, **OPTIONS.get(dialect, {})})
