"""What several tests share: dialogues to train on, files of them, an endpoint that plays a script.

No test is in here, and nothing in here knows how the library works inside.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import json
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, Self

import pytest
from hypothesis import strategies as st

from openai_sft_local import missing_packages

PROJECT = Path(__file__).resolve().parent.parent
KOKOROCHAT = PROJECT.parent / "shared" / "kokorochat" / "kokorochat_dialogues"
O200K_FILE = "fb374d419588a4632f3f557e76b4b70aebbca790"  # the sha1 of the URL tiktoken fetches

# Everything that has ever broken a line, a file or a terminal, besides ordinary characters.
AWKWARD = "\r\n\t\v\f\x1c\x85\u2028\u2029\0\x1b\x7f\u200b\ufeff\\\"'{}1１２３ｱｶﾞ漢字👨‍👩‍👧😀é"

awkward_text = st.text(
    st.one_of(st.sampled_from(AWKWARD), st.characters(exclude_categories=["Cs"])), max_size=12
)
turns = st.lists(
    st.tuples(st.sampled_from(["counselor", "client"]), awkward_text), min_size=1, max_size=12
)


def require_local() -> None:
    """Skip a module without the extra for training here; where it has to be there, fail."""
    missing = missing_packages()
    if not missing:
        return
    reason = f"needs pip install 'openai-sft[local]': no {', '.join(missing)}"
    if os.environ.get("OPENAI_SFT_NEEDS_LOCAL"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason, allow_module_level=True)


def unpack_vocabulary(folder: Path) -> None:
    """Put ``o200k_base`` where tiktoken finds it, if ``folder`` is its cache."""
    package = importlib.util.find_spec("bpe_openai")  # found, not imported: it parses for a second
    assert package is not None
    assert package.origin is not None
    packed = Path(package.origin).with_name("data") / "o200k_base.tiktoken.gz"
    (folder / O200K_FILE).write_bytes(gzip.decompress(packed.read_bytes()))


def record(number: int, *said: tuple[str, str]) -> dict[str, Any]:
    """A dialogue as KokoroChat has it; three exchanges and a farewell unless told what is said."""
    said = said or (
        ("client", f"相談{number}です。眠れません。"),
        ("counselor", f"眠れないのですね（{number}）。"),
        ("client", "はい。\u2028仕事が心配で…"),
        ("counselor", f"仕事のことを、もう少し聞かせてください。{number % 7}"),
        ("client", "上司が①こわい😢"),
        ("client", "それだけです"),
        ("counselor", "こわいと感じるのですね。"),
        ("client", "ありがとうございました"),
        ("counselor", "どうぞお大事に。"),
    )
    return {
        "id": f"d{number}",
        "dialogue": [{"role": role, "utterance": text} for role, text in said],
    }


def records(count: int) -> list[dict[str, Any]]:
    return [record(number) for number in range(1, count + 1)]


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def example(name: str, *said: str) -> dict[str, Any]:
    """An example whose messages take turns, the user first."""
    return {
        "id": name,
        "messages": [
            {"role": ("user", "assistant")[index % 2], "content": text}
            for index, text in enumerate(said)
        ],
    }


def examples(count: int) -> list[dict[str, Any]]:
    return [
        example(f"d{n}", f"相談{n}", "はい", "眠れません", f"それは{n}", "ありがとう", "お大事に")
        for n in range(1, count + 1)
    ]


def training_file(folder: Path, count: int = 12) -> Path:
    rows = [{"messages": one["messages"]} for one in examples(count)]
    return write_jsonl(folder / f"examples-{count}.jsonl", rows)


def read_json(path: str | Path) -> Any:
    return json.loads(Path(path).read_text("utf-8"))


def recorded_run(folder: Path, stamp: str, **facts: Any) -> Path:
    """A run record of the first version, as an earlier release has left it."""
    folder.mkdir(exist_ok=True)
    path = folder / f"run_{stamp}.json"
    path.write_text(
        json.dumps({"version": 1, "run_id": path.stem, "kind": "job", "settings": {}, **facts})
    )
    return path


def posts(endpoint: Any, path: str = "") -> list[Any]:
    """The exchanges in which something was sent to ``endpoint``, in order."""
    return [e for e in endpoint.exchanges if e.method == "POST" and e.path.startswith(path)]


@contextlib.contextmanager
def hearing_interrupts() -> Iterator[None]:
    """Processes started within hear SIGINT also where it is ignored here, as after ``nohup … &``.

    A handler isn't inherited, only that a signal is ignored.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Ended(NamedTuple):
    """How a command line ended, and what it said."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("エラー: ")]


class LoopbackHandler(BaseHTTPRequestHandler):
    """Keeps its connection, sends each answer at once and says nothing on the terminal."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass


class LoopbackServer(ThreadingHTTPServer):
    """Closes without waiting for the requests that it holds."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128


class Script:
    """A loopback endpoint that says what it is told to: a list of answers for each request line.

    The last answer of a list is repeated; a request that is in no list gets 404. For answers that
    the rehearsal, which follows the API, can't be made to give.
    """

    def __init__(self, **answers: list[Any]) -> None:
        self.answers = answers
        self.asked: list[str] = []
        script = self

        class Handler(LoopbackHandler):
            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status, body = script.answer(f"{self.command} {self.path.partition('?')[0]}")
                content = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_POST = do_GET

        self.server = LoopbackServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def answer(self, asked: str) -> tuple[int, Any]:
        self.asked.append(asked)
        for line, waiting in self.answers.items():
            if asked.endswith(line):
                return 200, waiting.pop(0) if len(waiting) > 1 else waiting[0]
        return 404, {"error": {"message": "not found", "type": "", "param": None, "code": None}}

    def __enter__(self) -> Self:
        threading.Thread(target=self.server.serve_forever, args=(0.002,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def job(status: str, **facts: Any) -> dict[str, Any]:
    """A job as the API shows it."""
    return {
        "id": "ftjob-script",
        "object": "fine_tuning.job",
        "created_at": 1,
        "error": None,
        "fine_tuned_model": None,
        "finished_at": None,
        "hyperparameters": {"n_epochs": 1},
        "model": "gpt-4o-mini-2024-07-18",
        "organization_id": "org",
        "result_files": [],
        "seed": 1,
        "status": status,
        "trained_tokens": None,
        "training_file": "file-1",
        "validation_file": None,
        **facts,
    }
