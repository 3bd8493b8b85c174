"""How close an evaluation comes to the least time it can take, in the shape that is usual.

    python tests/bench_eval.py

100 cases of the test and 100 of the validation split at concurrency 16, alone and with a baseline
that is asked the same, against an endpoint in a process of its own that takes 200 ms an answer:
ideally questions / 16 × 0.2 s. The time is counted from the first request to the last answer, as
the client's own connection sees them. Goal: at most 1.15 times the ideal. Since 200 isn't a
multiple of 16, the thirteenth round makes 1.04 the least that can be had without a baseline.
"""

from __future__ import annotations

import logging
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from openai_sft import OpenAISFT

CASES, CONCURRENCY, LATENCY, RUNS = 200, 16, 0.2, 3
GOAL = 1.15
OTHER = "gpt-4.1-mini-2025-04-14"  # any other model that the endpoint has


@contextmanager
def endpoint() -> Iterator[str]:
    """The rehearsal in a process of its own; its URL is what it logs."""
    command = [sys.executable, "-m", "openai_sft_rehearsal", "--port", "0"]
    with subprocess.Popen(
        [*command, "--latency", str(LATENCY)],
        stderr=subprocess.PIPE,
        cwd=Path(__file__).resolve().parent.parent,
        encoding="utf-8",
    ) as process:
        assert process.stderr
        try:
            found = re.search(r"http://\S+/v1", process.stderr.readline())
            assert found
            yield found[0]
        finally:
            process.terminate()


def dialogues() -> list[dict[str, Any]]:
    said = ("相談です。眠れません。", "眠れないのですね。", "はい。仕事が心配で…", "お大事に。")
    return [
        {
            "id": f"d{number}",
            "messages": [
                {"role": ("user", "assistant")[place % 2], "content": f"{text}{number}"}
                for place, text in enumerate(said)
            ],
        }
        for number in range(CASES)
    ]


def measure(url: str, *, baseline: bool) -> tuple[float, float]:
    """Times the ideal from the first request to the last answer, and seconds of the whole call."""
    asked: list[float] = []
    answered: list[float] = []
    hooks = {
        "request": [lambda _: asked.append(time.perf_counter())],
        "response": [lambda _: answered.append(time.perf_counter())],
    }
    http_client = openai.DefaultHttpxClient(event_hooks=hooks, trust_env=False)
    with (
        openai.OpenAI(api_key="k", base_url=url, http_client=http_client) as client,
        tempfile.TemporaryDirectory() as folder,
        OpenAISFT("k", client=client, base_url=url, output_dir=folder, verbose=False) as sft,
    ):
        began = time.perf_counter()
        data, rival = dialogues(), OTHER if baseline else None
        results = sft.evaluate_model_comprehensive(
            sft.model, data[::2], data[1::2], 0, concurrency=CONCURRENCY, baseline=rival
        )
        whole = time.perf_counter() - began
    questions = CASES * (2 if baseline else 1)
    assert results["summary"]["total_cases_evaluated"] == CASES
    assert len(asked) == len(answered) == questions
    return (max(answered) - min(asked)) / (questions / CONCURRENCY * LATENCY), whole


def main() -> int:
    logging.getLogger("openai_sft").addHandler(logging.NullHandler())
    medians = []
    with endpoint() as url:
        for baseline in (False, True):
            ratios = []
            shape = f"two splits, {CASES} cases, {'with' if baseline else 'no'} baseline"
            for _ in range(RUNS):
                ratio, whole = measure(url, baseline=baseline)
                ratios.append(ratio)
                sys.stdout.write(
                    f"{shape}: {ratio:.3f} x the ideal (the whole call: {whole:.2f} s)\n"
                )
            medians.append(statistics.median(ratios))
            sys.stdout.write(f"{shape}: median {medians[-1]:.3f} (goal {GOAL})\n")
    return 0 if max(medians) <= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
