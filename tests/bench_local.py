"""What training and answering here cost beside the plain way; ratios of one run.

    python tests/bench_local.py [FOLDER] [--dialogues N] [--rounds N]

Needs the extra ``local``. FOLDER holds KokoroChat's JSON files (``../shared/kokorochat/...`` by
default; the example dialogues, repeated, where it is absent). Each process has one thread.

- A whole job, on the tiny model with all its weights: ``plain`` is a script with TRL's SFTTrainer,
  ``ours`` the endpoint with a client. Both are timed from the start of Python to its end, with all
  imports, training three epochs, an evaluation and a checkpoint after each. ``plain`` is given the
  ids and the labels; ``ours`` reads, checks, tokenises and labels the files, starts a second
  process, evaluates once more before the training, and serves the result. The weights must be the
  same to the last bit. Both run at the same time, on two cores or more, so that whoever else is
  there holds up both.
- A chat request to an endpoint whose engine answers at once: seconds the client waits.
- Eight questions to the model at once, and in a row.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import hashlib
import http.client
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
KOKOROCHAT = ROOT.parent / "shared" / "kokorochat" / "kokorochat_dialogues"
GOALS = {"whole job": 1.05, "overhead": 5.0, "eight at once": 0.5}
EPOCHS, BATCH, SEED, RATE = 3, 4, 1, 100.0  # the rate is a multiplier of the usual one
REQUESTS, ANSWER_TOKENS = 300, 64

PLAIN = """
import json, sys
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

base, data, target, steps, epoch, batch, rate, seed = sys.argv[1:]
training, validation = json.load(open(data))
steps, epoch = int(steps), int(epoch)
SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(base, dtype="float32"),
    args=SFTConfig(
        output_dir=target,
        max_steps=steps,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=int(batch),
        train_sampling_strategy="sequential",
        learning_rate=float(rate),
        warmup_steps=int(0.03 * steps),
        seed=int(seed),
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        eval_strategy="steps",
        eval_steps=epoch,
        save_strategy="steps",
        save_steps=epoch,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    ),
    train_dataset=Dataset.from_dict(training),
    eval_dataset=Dataset.from_dict(validation),
    processing_class=AutoTokenizer.from_pretrained(base),
).train()
"""

OURS = """
import sys, time
from pathlib import Path
import openai
from openai_sft_local import LocalEngine
from openai_sft_rehearsal import Rehearsal

base, training, validation, state, epochs, batch, rate, seed = sys.argv[1:]
engine = LocalEngine(base, Path(state), full=True)
with (
    Rehearsal(engine=engine, folder=Path(state)) as endpoint,
    openai.OpenAI(api_key="k", base_url=endpoint.url) as client,
):
    paths = map(Path, (training, validation))
    ids = [client.files.create(file=path, purpose="fine-tune").id for path in paths]
    job = client.fine_tuning.jobs.create(
        model=base,
        training_file=ids[0],
        validation_file=ids[1],
        seed=int(seed),
        method={
            "type": "supervised",
            "supervised": {
                "hyperparameters": {
                    "n_epochs": int(epochs),
                    "batch_size": int(batch),
                    "learning_rate_multiplier": float(rate),
                }
            },
        },
    )
    while job.status not in ("succeeded", "failed"):
        endpoint.wait_for_progress(1)
        job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "succeeded", job.error
"""

INSTANT = """
import sys
from openai_sft_rehearsal import CharacterEngine, Rehearsal, Reply

class Instant(CharacterEngine):
    def answer(self, model, body):
        return Reply("はい。", 1, 1)

with Rehearsal(engine=Instant()) as endpoint:
    print(endpoint.url, file=sys.stderr, flush=True)
    sys.stdin.read()
"""


class Measured(NamedTuple):
    seconds: float
    cpu: float


class Data(NamedTuple):
    """The base model, its examples as dialogues and as the plain script takes them."""

    base: Path
    training: Path
    validation: Path
    ids: Path
    steps: int
    epoch: int


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def python(*words: str | Path, **more: Any) -> subprocess.Popen[str]:
    command = [sys.executable, *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, encoding="utf-8", **more)


def timed(log: Path, *words: str | Path) -> Measured:
    """A program from its start to its end, with all processes that it waits for."""
    with log.open("w") as file:
        started = time.perf_counter()
        process = python(*words, stdout=file, stderr=file)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(log.read_text(encoding="utf-8")[-3000:])
    return Measured(seconds, usage.ru_utime + usage.ru_stime)


# --- Dialogues ------------------------------------------------------------------------------------


def dialogues(folder: Path, count: int) -> list[dict[str, Any]]:
    from openai_sft_rehearsal import example_dialogues

    paths = sorted(folder.glob("*.json")) if folder.is_dir() else []
    records: list[Any] = [json.loads(p.read_text(encoding="utf-8")) for p in paths[:count]]
    examples = example_dialogues()
    records += [examples[n % len(examples)] for n in range(count - len(records))]
    roles = {"counselor": "assistant", "client": "user"}
    rows = []
    for record in records:
        talk = [
            {"role": roles[turn["role"]], "content": turn["utterance"]}
            for turn in record["dialogue"]
        ]
        while talk[-1]["role"] != "assistant":
            talk.pop()
        rows.append({"messages": [{"role": "system", "content": "聞き手です。"}, *talk]})
    return rows


def prepare(rows: list[dict[str, Any]], scratch: Path) -> Data:
    import openai_sft_local as local

    parts = {"training": rows[len(rows) // 5 :], "validation": rows[: len(rows) // 5]}
    files = {}
    for name, part in parts.items():
        files[name] = scratch / f"{name}.jsonl"
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        files[name].write_text("".join(lines), encoding="utf-8")
    base = Path(local.build_tiny(str(scratch / "base"), str(files["training"]), SEED))
    tokenizer = local.load_tokenizer(str(base))
    template = local.Template(tokenizer)
    training, validation = (
        local.read_examples(str(files[name]), template, None, name) for name in parts
    )
    order = local.schedule(len(training), EPOCHS, BATCH, SEED)
    training.append(local.Example([tokenizer.pad_token_id] * 2, [local.IGNORED] * 2, 0))
    columns = [
        {"input_ids": [e.ids for e in chosen], "labels": [e.labels for e in chosen]}
        for chosen in ([training[index] for index in order], validation)
    ]
    ids = scratch / "ids.json"
    ids.write_text(json.dumps(columns))
    steps = len(order) // BATCH
    return Data(base, files["training"], files["validation"], ids, steps, steps // EPOCHS)


# --- The whole job --------------------------------------------------------------------------------


def last_weights(folder: Path) -> str:
    paths = folder.glob("checkpoint-*/model.safetensors")
    last = max(paths, key=lambda path: int(path.parent.name.split("-")[1]))
    return hashlib.sha256(last.read_bytes()).hexdigest()


def plain(data: Data, target: Path) -> tuple[Measured, str]:
    from openai_sft_local import LEARNING_RATES

    numbers = (data.steps, data.epoch, BATCH, LEARNING_RATES["full"] * RATE, SEED)
    paths = (data.base, data.ids, target)
    took = timed(target.with_suffix(".log"), "-c", PLAIN, *paths, *map(str, numbers))
    return took, last_weights(target)


def ours(data: Data, state: Path) -> tuple[Measured, str]:
    paths = (data.base, data.training, data.validation, state)
    numbers = map(str, (EPOCHS, BATCH, RATE, SEED))
    took = timed(state.with_suffix(".log"), "-c", OURS, *paths, *numbers)
    [job] = (state / "trainers").iterdir()
    return took, last_weights(job)


def whole_job(data: Data, scratch: Path, rounds: int) -> float:
    pairs = []
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for number in range(rounds):
            ways = ((ours, f"ours-{number}"), (plain, f"plain-{number}"))
            running = [pool.submit(way, data, scratch / name) for way, name in ways]
            (own, left), (other, wanted) = (each.result() for each in running)
            if left != wanted:
                raise SystemExit("the two ways leave different weights")
            pairs.append((own, other))
            say(
                f"  ours {own.seconds:.2f} s, {own.cpu:.2f} s CPU; "
                f"plain {other.seconds:.2f} s, {other.cpu:.2f} s CPU"
            )
    cpu = statistics.median(one.cpu / other.cpu for one, other in pairs)
    say(f"  same weights; CPU {cpu:.3f} x, load {os.getloadavg()[0]:.1f}")
    return statistics.median(one.seconds / other.seconds for one, other in pairs)


# --- Requests -------------------------------------------------------------------------------------


@contextlib.contextmanager
def endpoint(*words: str | Path) -> Iterator[str]:
    """An endpoint in a process of its own; its URL is what it says first."""
    with python(*words, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr
        try:
            found = re.search(r"http://\S+/v1", process.stderr.readline())
            assert found
            yield found[0]
        finally:
            process.terminate()


class Connection:
    """One that is kept alive."""

    def __init__(self, url: str) -> None:
        self._http = http.client.HTTPConnection(urlsplit(url).netloc)

    def ask(self, body: dict[str, Any]) -> Any:
        """The usage of an answer."""
        content = json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Authorization": "Bearer k"}
        self._http.request("POST", "/v1/chat/completions", content, headers)
        with self._http.getresponse() as response:
            answer = json.loads(response.read())
        assert response.status == 200, answer
        return answer["usage"]


def overhead(rows: list[dict[str, Any]]) -> float:
    """Milliseconds a request takes beside what the engine does, for whole dialogues."""
    seconds = []
    with endpoint("-c", INSTANT) as url:
        connection = Connection(url)
        for number in range(REQUESTS):
            body = {"model": "gpt-4o-mini-2024-07-18", **rows[number % len(rows)]}
            started = time.perf_counter()
            connection.ask(body)
            seconds.append(time.perf_counter() - started)
    cuts = [1000 * cut for cut in statistics.quantiles(seconds, n=20)]
    say(f"  median {cuts[9]:.2f} ms, 95 % under {cuts[18]:.2f} ms, load {os.getloadavg()[0]:.1f}")
    return cuts[9]


def eight(data: Data, rows: list[dict[str, Any]], state: Path, rounds: int) -> float:
    command = ("-m", "openai_sft_rehearsal", "--engine", "trl", "--model", data.base)
    ratios = []
    with (
        endpoint(*command, "--state", state, "--port", "0") as url,
        concurrent.futures.ThreadPoolExecutor(8) as pool,
    ):
        connections = [Connection(url) for _ in range(8)]
        options = {"model": data.base.name, "temperature": 0, "max_tokens": ANSWER_TOKENS}
        draw = random.Random(SEED)
        for number in range(rounds + 1):  # the first loads the model
            questions = [
                {**options, "messages": row["messages"][: draw.randrange(6, 12)]}
                for row in draw.sample(rows, 8)
            ]
            began = time.perf_counter()
            row = [connections[0].ask(question) for question in questions]
            between = time.perf_counter()
            once = list(pool.map(Connection.ask, connections, questions))
            ended = time.perf_counter()
            if number:
                ratios.append((ended - between) / (between - began))
                tokens = sum(usage["completion_tokens"] for usage in row)
                assert row == once
                say(
                    f"  {tokens} tokens: {between - began:.2f} s in a row, "
                    f"{ended - between:.2f} s at once"
                )
    say(f"  load {os.getloadavg()[0]:.1f}")
    return statistics.median(ratios)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=KOKOROCHAT)
    parser.add_argument("--dialogues", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    rows = dialogues(options.folder, options.dialogues)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        data = prepare(rows, scratch)
        say(f"a whole job: {data.steps} steps on {len(rows)} dialogues")
        figures = {"whole job": whole_job(data, scratch, options.rounds)}
        say("a request's overhead")
        figures["overhead"] = overhead(rows)
        say("eight questions")
        figures["eight at once"] = eight(data, rows, scratch / "state", options.rounds)
    for name, figure in figures.items():
        unit = "ms" if name == "overhead" else "x"
        say(f"{name}: {figure:.3f} {unit} (goal {GOALS[name]} {unit})")
    return 0 if all(figure <= GOALS[name] for name, figure in figures.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
