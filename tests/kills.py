"""Whether anything is lost or paid twice, however often runs are killed and answers go astray.

    python tests/kills.py [--seed 1] [--runs 100] [--creations 30]

Each run is a process of its own that talks to a loopback endpoint of its own. First whole runs are
killed by SIGKILL at random moments (some of their resumptions too) and resumed until the results
are there. Then jobs are created whose answer is late, lost or says too little. A line for each, a
summary, and 1 as the exit code where something was lost or paid twice, or left out for time.

Time passes only while somebody sleeps, and goes on from a process to the one that resumes it: what
passed is in eight bytes that all of them share.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import random
import re
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from edges import Forgetful, Forward, Gateway, Late, Reply, Request
from endpoint import Fault, Rehearsal
from faults import CHAT, JOBS, asked, made, until
from helpers import PROJECT, read_json, records, unpack_vocabulary, write_jsonl

import openai_sft_rehearsal

CONCURRENCY = 2  # so many answers can be under way when a process is killed
CASES = 8
RUN = {"epochs": 1, "batch_size": 4, "max_test_cases": 4, "concurrency": CONCURRENCY}
PATIENCE = 60.0  # seconds for a process
BUDGET = 600.0  # seconds for everything

# Imports once and forks a process for each line it reads, for an import takes a second. It leaves
# the process that has ended where it is until it is told to go on: so its id stays its own, and
# nobody else is killed who has got it meanwhile.
MOTHER = """
import json, logging, mmap, os, struct, sys, time
from pathlib import Path
import openai
import openai_sft_example
from openai_sft import OpenAISFT, OpenAISFTError, load_vocabulary
load_vocabulary()
logging.getLogger("openai_sft").addHandler(logging.NullHandler())

def command(order):
    os.environ["OPENAI_API_KEY"] = "k"
    sys.stderr = open(order["said"], "w", encoding="utf-8")
    sys.stdout = open(os.devnull, "w")
    try:
        return openai_sft_example.main(order["command"])
    finally:
        sys.stderr.flush()

def run(order):
    passed = mmap.mmap(os.open(order["passed"], os.O_RDWR), 8)

    def clock():
        return time.time() + struct.unpack("d", passed[:])[0]

    def sleep(seconds):
        passed[:] = struct.pack("d", struct.unpack("d", passed[:])[0] + seconds)
        time.sleep(min(seconds, 0.02))

    with OpenAISFT(
        api_key="k", base_url=order["url"], dialect="openai", dataset=order["dataset"],
        output_dir=order["out"], verbose=False, clock=clock, sleep=sleep,
    ) as sft:
        try:
            name = order["name"]
            results = sft.resume(name) if name else sft.run_full_pipeline(**order["run"])
        except (OpenAISFTError, openai.OpenAIError) as error:
            Path(order["said"]).write_text(str(error), "utf-8")
            return 1
    return 0 if results else 3

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        code = 99
        try:
            order = json.loads(line)
            code = (command if "command" in order else run)(order)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)
    print(child, flush=True)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    print("ended", flush=True)
    sys.stdin.readline()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Mother:
    """Starts the processes, one after the other."""

    def __init__(self, vocabulary: Path) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.upper().endswith("_PROXY")}
        kept = {k: v for k, v in kept.items() if not k.startswith("OPENAI_")}
        authorities = vocabulary / "none"  # reading those of the system takes longer than a run
        authorities.mkdir(exist_ok=True)
        self._process = subprocess.Popen(
            [sys.executable, "-c", MOTHER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={
                **kept,
                "PYTHONPATH": str(PROJECT),
                "TIKTOKEN_CACHE_DIR": str(vocabulary),
                "SSL_CERT_DIR": str(authorities),
            },
            cwd=vocabulary,
            encoding="utf-8",
        )

    def start(
        self,
        order: dict[str, Any],
        kill_after: float = PATIENCE,
        started: Callable[[int], None] = lambda _: None,
    ) -> int:
        """Have a process do what is ordered; return its exit code, -9 where it was killed."""
        self._tell(json.dumps(order))
        child = int(self._hear())
        started(child)
        timer = threading.Timer(kill_after, os.kill, (child, signal.SIGKILL))
        timer.start()
        self._hear()
        timer.cancel()
        timer.join()
        self._tell("")
        return int(self._hear())

    def _tell(self, line: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _hear(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.__exit__(None, None, None)


class Place:
    """A folder, an endpoint and a time of its own for one run and what takes it up."""

    def __init__(self, mother: Mother, folder: Path, endpoint: Rehearsal) -> None:
        self.mother, self.endpoint, self.url = mother, endpoint, endpoint.url
        self._threads = set(threading.enumerate())
        self.out, self.said = folder / "out", folder / "said"
        self._dataset = write_jsonl(folder / "dialogues.jsonl", records(40))
        self._time = folder / "passed"
        self._time.write_bytes(bytes(8))
        with self._time.open("r+b") as file:
            self._passed = mmap.mmap(file.fileno(), 8)

    def clock(self) -> float:
        passed: float = struct.unpack("d", self._passed[:])[0]
        return time.time() + passed

    @property
    def name(self) -> str:
        """The name of the recorded run, if there is one."""
        names = [path.stem for path in self.out.glob("run_*.json")]
        assert len(names) <= 1, f"more than one run: {names}"
        return "".join(names)

    def go_on(self, kill_after: float = PATIENCE) -> int:
        """Resume the run in a process, or begin it where none is recorded."""
        self.said.unlink(missing_ok=True)
        order = {"url": self.url, "dataset": str(self._dataset), "out": str(self.out), "run": RUN}
        paths = {"passed": str(self._time), "said": str(self.said)}
        return self.mother.start({**order, **paths, "name": self.name}, kill_after)

    def begin_by_command(self, started: Callable[[int], None]) -> int:
        """Begin it as a user does, on the command line."""
        flags = ("--base-url", self.url, "--dialect", "openai", "--dataset", self._dataset)
        flags = (*flags, "--output-dir", self.out)
        sizes = ("--epochs", 1, "--batch-size", 4, "--max-test-cases", 4)
        command = [str(one) for one in (*flags, *sizes, "--poll-interval", 0, "--yes")]
        return self.mother.start({"command": command, "said": str(self.said)}, started=started)

    def settle(self) -> None:
        """Wait until the endpoint is done with what a killed process has sent."""
        until(
            lambda: not any("request" in t.name for t in {*threading.enumerate()} - self._threads)
        )

    def received(self) -> set[str]:
        """What has been asked and answered, as far as it was written down."""
        lines = [line for path in self.out.glob("evaluation_*.jsonl") for line in journal(path)]
        return {json.dumps(line["input"], sort_keys=True) for line in lines}

    def where(self) -> str:
        """How far it has come, as the endpoint and the folder show it."""
        shown = {
            "saved": any(self.out.glob("comprehensive_evaluation_*.json")),
            "evaluating": asked(self.endpoint, "POST", CHAT),
            "waiting for the job": made(self.endpoint, JOBS),
            "making the job": made(self.endpoint, "/files") == 2,
            "uploading": asked(self.endpoint, "POST", "/files"),
            "preparing": self.name,
            "before the record": True,
        }
        return next(stage for stage, there in shown.items() if there)


def journal(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError):  # half written
            yield json.loads(line)


class Far(Rehearsal):
    """At the end of a long line, so that many kills meet a request or an answer under way."""

    def answer(self, request: openai_sft_rehearsal.Request) -> openai_sft_rehearsal.Answer:
        time.sleep(0.02)
        answer = super().answer(request)
        time.sleep(0.02)
        return answer


@contextlib.contextmanager
def place(mother: Mother) -> Iterator[Place]:
    with tempfile.TemporaryDirectory() as folder, Far() as endpoint:
        yield Place(mother, Path(folder), endpoint)


class Outcome(NamedTuple):
    what: str
    lost: list[str]
    seconds: float
    killed: list[str]  # how far it had come, for each kill


# --- Killed runs ----------------------------------------------------------------------------------


def length_of_a_run(mother: Mother) -> float:
    """How long a run takes that nothing happens to; the least of three."""
    took = []
    for _ in range(3):
        with place(mother) as here:
            began = time.monotonic()
            assert here.go_on() == 0, here.said.read_text("utf-8")
            took.append(time.monotonic() - began)
    return min(took)


def killed_run(mother: Mother, dice: random.Random, length: float) -> Outcome:
    """Kill a run once or twice at random moments, resume it to its end, look what it has cost."""
    began = time.monotonic()
    moments = [dice.uniform(0, length) for _ in range(dice.choice((1, 1, 2)))]
    kills: list[str] = []
    unwritten: Counter[str] = Counter()  # of a case: the kills at which no answer was written yet
    with place(mother) as here:
        code = -9
        for moment in moments:
            code = here.go_on(moment)
            if code != -9:
                break
            here.settle()
            kills.append(here.where())
            written = here.received()
            unwritten.update(case for case in cases(here) if case not in written)
        if not kills:  # it was faster than that
            return killed_run(mother, dice, length)
        for _ in range(3):
            if code in (0, 3):  # 3: nothing was left to resume
                break
            code = here.go_on()
        lost = account(here, code, len(kills), unwritten)
    return Outcome("killed " + ", then ".join(kills), lost, time.monotonic() - began, kills)


def cases(here: Place) -> Counter[str]:
    """How often the endpoint answered each case, which is what is paid."""
    chats = asked(here.endpoint, "POST", CHAT)
    return Counter(
        json.dumps(e.request["messages"], sort_keys=True) for e in chats if e.status == 200
    )


def account(here: Place, code: int, kills: int, unwritten: Counter[str]) -> list[str]:
    """What was lost or paid twice."""
    results = [read_json(path) for path in here.out.glob("comprehensive_evaluation_*.json")]
    answers = [
        answer
        for result in results
        for part in ("test_evaluation", "valid_evaluation")
        for answer in result[part]["responses"]
    ]
    counted = cases(here)
    twice = [n for case, n in counted.items() if n > 1 + unwritten[case]]
    said = here.said.read_text("utf-8") if here.said.exists() else ""
    facts = {
        f"it ended with {code}: {said}": code in (0, 3),
        f"{len(results)} results": len(results) == 1,
        f"{len(answers)} answers": len(answers) == CASES,
        f"{made(here.endpoint, JOBS)} jobs": made(here.endpoint, JOBS) == 1,
        f"{made(here.endpoint, '/files')} files": made(here.endpoint, "/files") == 2,
        f"{len(counted)} cases": len(counted) == CASES,
        f"{len(twice)} cases paid again": not twice,
        f"{counted.total()} answers paid": counted.total() <= CASES + kills * CONCURRENCY,
    }
    return [fact for fact, holds in facts.items() if not holds]


# --- Creations ------------------------------------------------------------------------------------


def late(here: Place, seconds: float) -> list[str]:
    """The answer is lost, and the job is in no list for so long."""
    with Gateway(here.endpoint, Late(here.clock, seconds)) as gateway:
        here.url = gateway.url
        return one_job(here, here.go_on())


def lagging(here: Place, dice: random.Random) -> list[str]:
    return late(here, dice.uniform(1, 120))


def lost_answer(here: Place, kind: str) -> list[str]:
    here.endpoint.inject(Fault(kind, "POST", JOBS, seconds=0.2))
    return one_job(here, here.go_on())


def forgetful(here: Place, lose: str) -> list[str]:
    """No metadata are kept, and an answer or a request is lost."""
    with Gateway(here.endpoint, Forgetful(lose)) as gateway:
        here.url = gateway.url
        return one_job(here, here.go_on())


def ambiguous(here: Place) -> list[str]:
    """No metadata are kept, an answer is lost, and somebody else has the same file trained."""
    lost = []
    with Gateway(here.endpoint, Forgetful("both")) as gateway:
        here.url = gateway.url
        for _ in ("at first", "resumed"):
            code = here.go_on()
            said = here.said.read_text("utf-8") if here.said.exists() else ""
            ids = [e.response["id"] for e in asked(here.endpoint, "POST", JOBS)]
            if code != 1 or not all(job in said for job in ids):
                lost.append(f"it ended with {code} and didn't name {ids}: {said}")
    if made(here.endpoint, JOBS) != 2:  # one of them somebody else's
        lost.append(f"{made(here.endpoint, JOBS) - 1} jobs")
    return lost


def terminated(here: Place, seconds: float) -> list[str]:
    """SIGTERM while the job is being made; its answer is lost, and it is in a list later."""
    serve, child = Late(here.clock, seconds), [0]

    def serve_and_terminate(request: Request, forward: Forward) -> Reply:
        reply = serve(request, forward)
        if request.line == ("POST", JOBS) and child[0]:
            os.kill(child[0], signal.SIGTERM)
            child[0] = 0
            time.sleep(0.2)  # still at it
        return reply

    with Gateway(here.endpoint, serve_and_terminate) as gateway:
        here.url = gateway.url
        code = here.begin_by_command(lambda pid: child.__setitem__(0, pid))
        said = here.said.read_text("utf-8")
        told = re.findall(r"--resume (run_\w+)", said)
        lost = one_job(here, here.go_on())
    if code != 143 or told != [here.name]:
        lost.append(f"it ended with {code} and told no way back: {said}")
    return lost


def one_job(here: Place, code: int) -> list[str]:
    """What was lost of a creation that goes well in the end."""
    return account(here, code, 0, Counter())


Creation = Callable[[Place], list[str]]


def creations(dice: random.Random) -> dict[str, Creation]:
    lost = ("500_after", "reset_after", "stall_after", "truncated", "malformed")
    return {
        **{f"answer {s} s late": partial(late, seconds=s) for s in (7, 75, 110)},
        "no metadata, answer lost": partial(forgetful, lose="answer"),
        "no metadata, request lost": partial(forgetful, lose="request"),
        "no metadata, another's job beside it": ambiguous,
        "SIGTERM, job seen at once": partial(terminated, seconds=0),
        "SIGTERM, job seen 20 s later": partial(terminated, seconds=20),
        "list that lags": partial(lagging, dice=dice),
        **{f"answer lost: {kind}": partial(lost_answer, kind=kind) for kind in lost},
    }


def creation(mother: Mother, what: str, create: Creation) -> Outcome:
    began = time.monotonic()
    with place(mother) as here:
        lost = create(here)
        if (passed := here.clock() - time.time()) > 1:
            what += f" (after {passed:.0f} s by its clock)"
    return Outcome(what, lost, time.monotonic() - began, [])


# --- All of it ------------------------------------------------------------------------------------


def everything(
    mother: Mother, seed: int, length: float, runs: int, count: int
) -> Iterator[Outcome]:
    """Every case draws from dice of its own, so that it can be repeated whatever went before."""
    for number in range(runs):
        yield killed_run(mother, random.Random(f"{seed} run {number}"), length)
    for number in range(count):
        ways = creations(random.Random(f"{seed} creation {number}"))
        what = list(ways)[number % len(ways)]
        yield creation(mother, what, ways[what])


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill runs, lose answers, and see what is lost.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--creations", type=int, default=30)
    options = parser.parse_args()
    wanted = options.runs + options.creations
    began, outcomes = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        unpack_vocabulary(Path(folder))
        with Mother(Path(folder)) as mother:
            length = length_of_a_run(mother) if options.runs else 0.0
            for outcome in everything(
                mother, options.seed, length, options.runs, options.creations
            ):
                outcomes.append(outcome)
                verdict = "; ".join(outcome.lost) or "nothing lost"
                sys.stdout.write(
                    f"{len(outcomes):3}/{wanted} {outcome.what}: {verdict} "
                    f"[{outcome.seconds:.1f} s]\n"
                )
                sys.stdout.flush()
                if time.monotonic() - began > BUDGET:
                    break
    bad = sum(bool(outcome.lost) for outcome in outcomes)
    left = wanted - len(outcomes)
    stages = Counter(stage for outcome in outcomes for stage in outcome.killed)
    killed = ", ".join(f"{count} {stage}" for stage, count in stages.most_common())
    sys.stdout.write(
        f"\nseed {options.seed}: {len(outcomes)} cases in {time.monotonic() - began:.0f} s, "
        f"{bad} with a loss, {left} left out for time\n{stages.total()} kills: {killed}\n"
    )
    return 1 if bad or left else 0


if __name__ == "__main__":
    sys.exit(main())
