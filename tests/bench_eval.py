"""How close an evaluation comes to the least time it can take.

    python tests/bench_eval.py

200 cases at concurrency 16 against an endpoint in a process of its own that takes 200 ms an
answer: ideally 200 / 16 × 0.2 s. The time is counted from the first request to the last answer,
as the client's own connection sees them. Goal: at most 1.3 times the ideal; aim: 1.1. Since 200
isn't a multiple of 16, the thirteenth round makes 1.04 the least that can be had.
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
IDEAL = CASES / CONCURRENCY * LATENCY
GOAL, AIM = 1.3, 1.1


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


def measure(url: str) -> tuple[float, float]:
    """Seconds from the first request to the last answer, and of the whole call."""
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
        results = sft.evaluate_model_comprehensive(
            sft.model, dialogues(), [], 0, concurrency=CONCURRENCY
        )
        whole = time.perf_counter() - began
    assert results["summary"]["total_cases_evaluated"] == len(asked) == len(answered) == CASES
    return max(answered) - min(asked), whole


def main() -> int:
    logging.getLogger("openai_sft").addHandler(logging.NullHandler())
    ratios = []
    with endpoint() as url:
        for run in range(1, RUNS + 1):
            seconds, whole = measure(url)
            ratios.append(seconds / IDEAL)
            sys.stdout.write(
                f"run {run}: {seconds:.3f} s = {ratios[-1]:.3f} x the ideal {IDEAL:.2f} s "
                f"(the whole call, with scoring: {whole:.2f} s)\n"
            )
    sys.stdout.write(
        f"{CASES} cases, concurrency {CONCURRENCY}, {1000 * LATENCY:.0f} ms an answer: "
        f"first {ratios[0]:.3f}, best {min(ratios):.3f}, median {statistics.median(ratios):.3f} "
        f"(goal {GOAL}, aim {AIM})\n"
    )
    return 0 if statistics.median(ratios) <= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
