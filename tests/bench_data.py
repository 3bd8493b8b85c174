"""Measure the data stages against two plain ways of doing the same; ratios of one run.

Run it as ``python tests/bench_data.py [FOLDER] [--rounds N] [--features] [--copies]`` with the
extra ``dev`` installed. FOLDER holds KokoroChat's JSON files (``../shared/kokorochat/...`` by
default). Each way is a process of its own, timed whole, in turns: ``plain`` reads with ``json``,
merges, counts with ``tiktoken`` in a loop and writes JSONL; ``ours`` is ``--data-only`` with
everything it does by default; ``features`` (slow) is ``load_dataset`` with explicit features
alone; ``copies`` (slow, 1.2 GB of temporary files) is ``ours`` on ten distinct copies.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
KOKOROCHAT = ROOT.parent / "shared" / "kokorochat" / "kokorochat_dialogues"

PLAIN = """
import json, pathlib, sys
import tiktoken

encoding = tiktoken.get_encoding("o200k_base")
roles = {"counselor": "assistant", "client": "user"}
total = 0
with open(sys.argv[2], "w", encoding="utf-8") as output:
    for path in sorted(pathlib.Path(sys.argv[1]).glob("*.json")):
        dialogue = json.loads(path.read_text(encoding="utf-8"))["dialogue"]
        messages = []
        for turn in dialogue:
            role, text = roles[turn["role"]], turn["utterance"].strip()
            if messages and messages[-1]["role"] == role:
                messages[-1]["content"] += "\\n" + text
            else:
                messages.append({"role": role, "content": text})
        if messages[-1]["role"] != "assistant":
            messages.pop()
        total += 3
        for message in messages:
            total += 3 + sum(len(encoding.encode_ordinary(text)) for text in message.values())
        output.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\\n")
"""

FEATURES = """
import json, pathlib, sys
import datasets

def feature(value):
    if isinstance(value, dict):
        return {key: feature(item) for key, item in value.items()}
    if isinstance(value, list):
        return [feature(value[0])]
    return datasets.Value("int64" if isinstance(value, int) else "string")

paths = sorted(map(str, pathlib.Path(sys.argv[1]).glob("*.json")))
first = json.loads(pathlib.Path(paths[0]).read_text(encoding="utf-8"))
datasets.load_dataset(
    "json", data_files=paths, features=datasets.Features(feature(first)), cache_dir=sys.argv[2]
)
"""


class Measured(NamedTuple):
    """What a process took; its seconds on the processors hardly depend on who else is there."""

    seconds: float
    cpu: float
    megabytes: float


def run(*command: str) -> Measured:
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    return Measured(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def ours(folder: Path, scratch: Path) -> Measured:
    program = str(ROOT / "openai_sft_example.py")
    output = str(scratch / f"out-{time.monotonic_ns()}")
    return run(program, "--data-only", "--dataset", str(folder), "--output-dir", output)


def show(name: str, results: list[Measured]) -> Measured:
    """Print a line and return the medians, with the most memory."""
    seconds = [result.seconds for result in results]
    middle = Measured(
        statistics.median(seconds),
        statistics.median(result.cpu for result in results),
        max(result.megabytes for result in results),
    )
    sys.stdout.write(
        f"{name:10} {middle.seconds:7.2f} s (best {min(seconds):.2f})  "
        f"{middle.cpu:7.2f} s CPU  {middle.megabytes:7.0f} MB\n"
    )
    sys.stdout.flush()
    return middle


def compare(name: str, one: Measured, other: Measured) -> None:
    sys.stdout.write(f"{name} = {one.seconds / other.seconds:.2f}, CPU {one.cpu / other.cpu:.2f}\n")


def copy_ten_times(folder: Path, target: Path) -> None:
    target.mkdir()
    for path in folder.glob("*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        number = record["review_by_client_en"].pop("evaluation_id")
        first = record["dialogue"][0]["utterance"]
        for copy in range(10):
            record["dialogue"][0]["utterance"] = f"{copy} {first}"
            text = json.dumps({"id": f"{copy}-{number}", **record}, ensure_ascii=False, indent=2)
            (target / f"{copy}-{number}.json").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=KOKOROCHAT)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--features", action="store_true")
    parser.add_argument("--copies", action="store_true")
    options = parser.parse_args()
    package = importlib.util.find_spec("bpe_openai")
    if package is None or package.origin is None:
        raise SystemExit("pip install -e '.[dev]' first")
    packed = Path(package.origin).with_name("data") / "o200k_base.tiktoken.gz"
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        vocabulary = scratch / "fb374d419588a4632f3f557e76b4b70aebbca790"  # tiktoken's own name
        vocabulary.write_bytes(gzip.decompress(packed.read_bytes()))
        os.environ["TIKTOKEN_CACHE_DIR"] = folder
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # what is installed has its bytecode
        plain, mine = [], []
        for _ in range(options.rounds):
            target = str(scratch / "plain.jsonl")
            plain.append(run("-c", PLAIN, str(options.folder), target))
            mine.append(ours(options.folder, scratch))
        base = show("plain", plain)
        own = show("ours", mine)
        compare("ours / plain", own, base)
        if options.features:
            slow = show("features", [run("-c", FEATURES, str(options.folder), str(scratch / "hf"))])
            compare("features / ours", slow, own)
        if options.copies:
            copies = scratch / "copies"
            copy_ten_times(options.folder, copies)
            os.sync()  # or writing them would still be under way
            ten = show("ten copies", [ours(copies, scratch)])
            compare("ten copies / ours", ten, own)


if __name__ == "__main__":
    main()
