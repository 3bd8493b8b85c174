"""The thread that watches the machine."""

from __future__ import annotations

import inspect
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from helpers import PROJECT

from openai_sft import Sample, SystemMonitor

GIB = 2**30
CALM = Sample(45.2, 62.1, int(8.5 * GIB), 16 * GIB, 73.4)


def samples(*given: Sample | Exception) -> tuple[Callable[[], Sample], threading.Event]:
    """A sampler that gives these one after the other and the last for ever; the event says when
    all were given and what came of them was reported."""
    waiting = iter(given)
    last = given[-1]
    reported = threading.Event()

    def sample() -> Sample:
        value = next(waiting, None)
        if value is None:
            reported.set()
            value = last
        if isinstance(value, Exception):
            raise value
        return value

    return sample, reported


def watch(*given: Sample | Exception) -> None:
    sampler, reported = samples(*given)
    with SystemMonitor(interval=0.001, sampler=sampler):
        assert reported.wait(5)


def threads() -> Iterator[threading.Thread]:
    return (thread for thread in threading.enumerate() if thread.name == "openai-sft-monitor")


def test_a_line_has_exactly_the_agreed_form(log: Callable[[], list[str]]) -> None:
    watch(CALM)

    assert log()[0] == "[監視] CPU: 45.2% | メモリ: 62.1% (8.5/16.0GB) | ディスク: 73.4%"
    assert len(set(log())) == 1


@pytest.mark.parametrize(
    ("sample", "warning"),
    [
        (CALM._replace(cpu_percent=92.3), "⚠️ CPU使用率が高いです: 92.3%"),
        (CALM._replace(memory_percent=90.1), "⚠️ メモリ使用率が高いです: 90.1%"),
        (CALM._replace(disk_percent=100.0), "⚠️ ディスク使用率が高いです: 100.0%"),
    ],
)
def test_over_90_percent_is_warned_of(
    sample: Sample, warning: str, caplog: pytest.LogCaptureFixture, log: Callable[[], list[str]]
) -> None:
    watch(sample)
    levels = {r.getMessage(): r.levelno for r in caplog.records}

    assert log()[1] == warning
    assert levels[warning] == logging.WARNING
    assert sum(line.startswith("⚠️") for line in set(log())) == 1


def test_90_percent_is_not_over_90_percent(log: Callable[[], list[str]]) -> None:
    watch(Sample(90.0, 90.0, GIB, GIB, 90.0))

    assert not [line for line in log() if line.startswith("⚠️")]


def test_all_three_can_be_high_at_once(log: Callable[[], list[str]]) -> None:
    watch(Sample(99.0, 99.0, GIB, GIB, 99.0))

    assert [line.split("使")[0] for line in log()[1:4]] == ["⚠️ CPU", "⚠️ メモリ", "⚠️ ディスク"]


@pytest.mark.parametrize(
    "failure",
    [OSError("no /proc"), psutil.AccessDenied(1), ValueError("odd /proc"), KeyError("MemTotal:")],
    ids=lambda failure: type(failure).__name__,
)
def test_a_reading_that_fails_is_logged_and_the_next_one_is_shown(
    failure: Exception, log: Callable[[], list[str]]
) -> None:
    watch(failure, CALM)

    assert log()[0].startswith("[監視] 読み取れません")
    assert log()[1].startswith("[監視] CPU: 45.2%")


def test_the_first_line_comes_at_the_start_and_the_next_30_seconds_later(
    log: Callable[[], list[str]],
) -> None:
    taken = threading.Event()

    def sample() -> Sample:
        taken.set()
        return CALM

    with SystemMonitor(sampler=sample):
        assert taken.wait(5)

    assert log() == ["[監視] CPU: 45.2% | メモリ: 62.1% (8.5/16.0GB) | ディスク: 73.4%"]
    assert inspect.signature(SystemMonitor).parameters["interval"].default == 30.0


def test_the_thread_ends_with_the_block_also_when_it_ends_in_an_error() -> None:
    before, running = list(threads()), []

    def fail() -> None:
        with SystemMonitor(sampler=lambda: CALM):
            running.extend(threads())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()

    assert len(running) == len(before) + 1
    assert list(threads()) == before


def test_this_machine_is_read_and_the_disk_is_that_of_the_folder(
    tmp_path: Path, log: Callable[[], list[str]]
) -> None:
    with SystemMonitor(tmp_path):
        pass
    (line,) = (line for line in log() if not line.startswith("⚠️"))
    found = re.fullmatch(
        r"\[監視\] CPU: [\d.]+% \| メモリ: ([\d.]+)% \(([\d.]+)/([\d.]+)GB\)"
        r" \| ディスク: ([\d.]+)%",
        line,
    )

    assert found
    percent, used, total, disk = map(float, found.groups())
    assert total == pytest.approx(psutil.virtual_memory().total / GIB, abs=0.1)
    assert used / total == pytest.approx(percent / 100, abs=0.05)
    assert disk == pytest.approx(psutil.disk_usage(str(tmp_path)).percent, abs=5)


def test_a_folder_that_is_gone_is_logged_and_ends_nothing(
    tmp_path: Path, log: Callable[[], list[str]]
) -> None:
    with SystemMonitor(tmp_path / "gone"):
        pass

    assert [line for line in log() if line.startswith("[監視] 読み取れません")]


FORGOTTEN = "SystemMonitor(sampler=stuck).__enter__(); started.wait()"
STUCK = "\nwith SystemMonitor(sampler=stuck):\n    started.wait()"


@pytest.mark.parametrize("use", [FORGOTTEN, STUCK], ids=["never stopped", "in a stuck reading"])
def test_a_monitor_never_keeps_the_program_from_ending(use: str) -> None:
    code = (
        "import threading; from openai_sft import SystemMonitor; started = threading.Event()\n"
        "def stuck():\n    started.set()\n    threading.Event().wait()\n"
    )
    done = subprocess.run([sys.executable, "-c", code + use], cwd=PROJECT, timeout=5)

    assert done.returncode == 0


def test_what_stays_as_it_is_is_logged_once_in_ten_minutes(log: Callable[[], list[str]]) -> None:
    high, failure = CALM._replace(cpu_percent=91.0), OSError("no /proc")
    watch(CALM, CALM, high, high, CALM, high, failure, failure, CALM)

    assert [line.partition(":")[0] for line in log()] == [
        "[監視] CPU",
        "[監視] CPU",
        "⚠️ CPU使用率が高いです",
        "[監視] 読み取れません",
    ]
    assert SystemMonitor.TELL_SECONDS == 600


BAR_BEING_MADE = """
import sys, threading, tqdm, openai_sft
sft = openai_sft.OpenAISFT(offline=True)  # which shows the log
bar, read = tqdm.tqdm(total=1), threading.Event()
def half_made(*_, **__):  # as tqdm's bar of notebooks between two of its statements
    raise AttributeError("'tqdm_notebook' object has no attribute 'container'")
bar.refresh = half_made
def sample():
    read.set()
    return openai_sft.Sample(95.0, 1.0, 1, 1, 1.0)
with openai_sft.SystemMonitor(sampler=sample):
    assert read.wait(5)
"""


def test_the_monitor_is_heard_and_prints_no_traceback_while_another_thread_makes_a_bar() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BAR_BEING_MADE], cwd=PROJECT, timeout=20, capture_output=True
    )
    told = done.stderr.decode()

    assert "[監視] CPU: 95.0%" in told
    assert "⚠️ CPU" in told
    assert "Traceback" not in told
