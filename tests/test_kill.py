"""A process that is killed at any moment, and the run that is taken up after it."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest
from endpoint import Exchange, Fault, Rehearsal
from faults import CHAT, JOBS, asked, made, until
from helpers import PROJECT, read_json, records, write_jsonl
from kills import Mother, everything
from services import MINI, MODELS, OPTIONS, service

from openai_sft import OpenAISFT, ToBeDeployed

MakeSFT = Callable[..., OpenAISFT]

# Imports once and forks a run for each line it reads, for an import takes a second. A run that
# gets to the moment named by "halt" says so by a file and stays there until it is killed.
MOTHER = """
import json, os, signal, sys, time
from pathlib import Path
import openai
from openai_sft import OpenAISFT, load_vocabulary
load_vocabulary()

def run(order):
    out, halt = Path(order["out"]), order["halt"]
    there = out.with_name("there")

    def stop():
        there.touch()
        while True:
            signal.pause()

    def confirm(estimate):
        if halt == "confirm":
            stop()
        return True

    def clock():
        if halt == "saved" and list(out.glob("comprehensive_evaluation_*.json")):
            stop()
        return time.time()

    sft = OpenAISFT(
        api_key="k", base_url=order["url"], dataset=order["dataset"], output_dir=out,
        poll_interval=0.05, verbose=False, confirm=confirm, clock=clock, **order["settings"],
    )
    sft.run_full_pipeline(**order["run"])

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            run(json.loads(line))
        finally:
            os._exit(1)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Moment(NamedTuple):
    """When to kill: where the run stays by itself, or the fault or hold that keeps it there."""

    halt: str = ""
    fault: Fault | None = None
    held: str = ""


MOMENTS = {
    "after the data": Moment(halt="confirm"),
    "in the upload": Moment(fault=Fault("stall_after", "POST", "/files")),
    "after the intent": Moment(fault=Fault("stall", "POST", JOBS)),
    "after the creation": Moment(fault=Fault("stall_after", "POST", JOBS)),
    "while polling": Moment(held="running"),
    "after success": Moment(fault=Fault("stall_after", "GET", "/files/*/content")),
    "in the evaluation": Moment(fault=Fault("stall_after", "POST", CHAT, skip=2)),
    "before the last write": Moment(halt="saved"),
}

KillAt = Callable[..., None]

RUN: dict[str, Any] = {"epochs": 2, "batch_size": 4, "max_test_cases": 2}
STAMP = re.compile(r"\d{8}_\d{6}")


@pytest.fixture(scope="module")
def mother(vocabulary: Path) -> Iterator[subprocess.Popen[str]]:
    environment = {k: v for k, v in os.environ.items() if not k.upper().endswith("_PROXY")}
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", MOTHER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**environment, "PYTHONPATH": str(PROJECT)},
        cwd=vocabulary,
        encoding="utf-8",
    ) as process:
        yield process
        assert process.stdin
        process.stdin.close()


def kill_at_of(
    mother: subprocess.Popen[str], endpoint: Rehearsal, dataset: Path, **settings: Any
) -> KillAt:
    """Starts a run in a process of its own and kills it at one of the moments."""
    out = dataset.parent / "out"

    def arrived(moment: Moment) -> bool:
        if moment.halt:
            return (out.parent / "there").exists()
        if moment.fault:
            # Of four answers, the three that aren't held up are on disk before the end.
            lines = "".join(path.read_text("utf-8") for path in out.glob("evaluation_*.jsonl"))
            met = any(e.fault == moment.fault.kind for e in endpoint.exchanges)
            return met and (moment.fault.path != CHAT or lines.count("\n") == 3)
        return any(read_json(path).get("job_status") == moment.held for path in only_runs(out))

    def kill(name: str, **more: Any) -> None:
        moment = MOMENTS[name]
        if moment.fault:
            endpoint.inject(moment.fault)
        if moment.held:
            endpoint.hold(moment.held)
        assert mother.stdin
        assert mother.stdout
        order = {"url": endpoint.url, "dataset": str(dataset), "out": str(out)}
        order |= {"halt": moment.halt, "settings": settings, "run": {**RUN, **more}}
        mother.stdin.write(json.dumps(order) + "\n")
        mother.stdin.flush()
        child = int(mother.stdout.readline())
        try:
            until(lambda: arrived(moment))
        finally:
            os.kill(child, signal.SIGKILL)
            ended = int(mother.stdout.readline())
        endpoint.release()

        assert ended == signal.SIGKILL, "it ended before it was killed"

    return kill


@pytest.fixture
def kill_at(mother: subprocess.Popen[str], endpoint: Rehearsal, dataset: Path) -> KillAt:
    return kill_at_of(mother, endpoint, dataset, dialect="openai")


def only_runs(folder: Path) -> list[Path]:
    return list(folder.glob("run_*.json"))


def without_times(value: Any) -> Any:
    """``value`` but for what no two runs have in common."""
    if isinstance(value, dict):
        others = ("latency", "timestamp", "created_at", "started_at", "finished_at", "job_id")
        kept = {k: v for k, v in value.items() if k != "id" and not any(o in k for o in others)}
        return {key: without_times(item) for key, item in kept.items()}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def end_result(folder: Path) -> dict[str, Any]:
    """All that a run ended with, but for its times and names."""
    (record,) = map(read_json, only_runs(folder))
    (results,) = folder.glob("comprehensive_evaluation_*.json")
    (metrics,) = folder.glob("training_metrics_*.csv")
    text = results.read_text("utf-8").replace(record["fine_tuned_model"], "MODEL")
    with metrics.open(encoding="utf-8", newline="") as table:
        rows = without_times(list(csv.DictReader(table)))
    kept = ("job_status", "job_error", "trained_tokens", "final_metrics", "estimate", "cost")
    found = json.loads(STAMP.sub("STAMP", text))
    places = (found.pop("base_url"), found["data"].pop("dataset"))

    assert all(places)
    return {
        "results": without_times(found),
        "metrics": rows,
        "record": {name: record.get(name) for name in kept},
        "checkpoints": len(record["checkpoints"]),
        "finished": "finished_at" in record,
        "kinds of files": sorted(record["files"]),
        "files": sorted(STAMP.sub("STAMP", path.name) for path in folder.iterdir()),
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, sdk: openai.OpenAI) -> dict[str, Any]:
    """The end of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    data = write_jsonl(folder / "dialogues.jsonl", records(20))
    with (
        Rehearsal() as endpoint,
        OpenAISFT(
            api_key="k",
            client=sdk.with_options(base_url=endpoint.url),
            base_url=endpoint.url,
            dialect="openai",
            dataset=str(data),
            output_dir=folder / "out",
            sleep=lambda _: endpoint.wait_for_progress(5),
            verbose=False,
        ) as sft,
    ):
        sft.run_full_pipeline(**RUN)
    return end_result(folder / "out")


def resume_quickly(
    make_sft: MakeSFT, endpoint: Rehearsal, name: str | None = None
) -> dict[str, Any] | None:
    """What is found at the endpoint is found at once here: nothing waits 3 s for a list."""
    with make_sft(sleep=lambda _: endpoint.wait_for_progress(0.05)) as sft:
        return sft.resume(name)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_at_any_moment_is_taken_up_to_the_end_of_one_that_was_not(
    make_sft: MakeSFT,
    endpoint: Rehearsal,
    kill_at: KillAt,
    clean_environment: Path,
    undisturbed: dict[str, Any],
    moment: str,
) -> None:
    kill_at(moment)
    (record,) = (clean_environment / "out").glob("run_*.json")
    # A run that has sent nothing yet is taken up by its name alone.
    name = record.stem if moment == "after the data" else None
    results = resume_quickly(make_sft, endpoint, name)
    cases = Counter(json.dumps(e.request["messages"]) for e in asked(endpoint, "POST", CHAT))
    in_flight = int(moment == "in the evaluation")

    assert results is not None
    assert made(endpoint, JOBS) == 1
    assert made(endpoint, "/files") == 2
    assert len(cases) == 4
    assert cases.total() == 4 + in_flight
    assert end_result(clean_environment / "out") == undisturbed
    assert [p.name for p in (clean_environment / "out").iterdir() if p.name[0] == "."] == []
    with make_sft() as sft:
        assert sft.resume() is None


def test_a_file_that_a_killed_process_left_half_written_is_cleared_away(
    make_sft: MakeSFT, endpoint: Rehearsal, kill_at: KillAt, clean_environment: Path
) -> None:
    kill_at("in the evaluation")
    (record,) = only_runs(clean_environment / "out")
    half = record.with_name(f".{record.name}.4194305.tmp")  # of a process that can't be
    half.write_text('{"version": 1, "run_', "utf-8")
    (journal,) = (clean_environment / "out").glob("evaluation_*.jsonl")
    with journal.open("ab") as file:
        file.write('{"split": "test", "output": "途'.encode()[:-1])
    resume_quickly(make_sft, endpoint)

    assert not half.exists()
    assert all(json.loads(line) for line in journal.read_bytes().splitlines()[-1:])
    assert len(asked(endpoint, "POST", CHAT)) == 5


@pytest.mark.parametrize("dialect", ["azure", "nebius", "litellm"])
@pytest.mark.parametrize("moment", ["in the upload", "after the creation", "while polling"])
def test_a_run_killed_at_another_service_makes_one_job_and_is_taken_up_to_its_end(
    mother: subprocess.Popen[str],
    sdk: openai.OpenAI,
    clean_environment: Path,
    dataset: Path,
    dialect: str,
    moment: str,
) -> None:
    with service(dialect, sdk, clean_environment, dataset) as place:
        settings = {"dialect": dialect, "model": MODELS.get(dialect, MINI)}
        kill_at = kill_at_of(mother, place.endpoint, dataset, **settings)
        kill_at(moment, **OPTIONS.get(dialect, {}))
        results = None
        try:
            results = place.make().resume()
        except ToBeDeployed as trained:
            place.endpoint.deploy("相談", trained.model)
            results = place.make().resume(deployment="相談")
        asked_of = Counter(json.dumps(e.request["messages"]) for e in answered(place.endpoint))

    assert results is not None
    assert len(place.endpoint.jobs) == 1
    assert made(place.endpoint, "/files") == 2
    assert set(asked_of.values()) == {1}
    assert len(asked_of) == 4


def answered(endpoint: Rehearsal) -> list[Exchange]:
    return [e for e in asked(endpoint, "POST", CHAT) if e.status == 200]


def test_whatever_is_killed_or_goes_astray_at_random_nothing_is_lost_or_paid_twice(
    vocabulary: Path,
) -> None:
    with Mother(vocabulary) as mother:
        outcomes = list(everything(mother, seed=1, length=0.5, runs=2, count=2))

    assert [outcome.what for outcome in outcomes if outcome.lost] == []
    assert [len(outcome.killed) > 0 for outcome in outcomes] == [True, True, False, False]
