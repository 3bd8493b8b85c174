"""Fine-tune a chat model on dialogue data and know whether it got better.

One class, :class:`OpenAISFT`, takes KokoroChat (or any dialogue data) to a tuned and evaluated
model through the OpenAI API or an endpoint that speaks the same calls::

    from openai_sft import OpenAISFT

    sft = OpenAISFT()                                # key from the environment or .env
    results = sft.run_full_pipeline(epochs=10, batch_size=32)

``OpenAISFT(rehearse=True)`` walks the same path against a local endpoint: no key, no cost.

The stages, and the record that each hands to the next::

    read_dialogues ─ Dialogue ─ split_dialogues ─ Splits ─ to_example ─ Example ─ JSONL files
      ─ estimate_cost ─ CostEstimate ─ upload ─ file id ─ job ─ FineTuningJob
      ─ choose_cases ─ Case ─ answers ─ results

Files written, all in ``output_dir`` with one ``YYYYmmdd_HHMMSS`` stamp a run:
``train_data_*.jsonl``, ``test_data_*.jsonl``, ``valid_data_*.jsonl``, ``run_*.json`` (the run
record: settings, files, job, tuned model), ``training_metrics_*.csv``,
``comprehensive_evaluation_*.json``.

Errors::

    OpenAISFTError
    ├── ConfigurationError   also a ValueError: a setting, the key, an option
    ├── DataError            also a ValueError: the data, with where it stands
    ├── BudgetError          the estimate passes max_cost_usd, or can't be known
    ├── Declined             confirm() said no
    ├── JobFailed            the job ended without a model
    ├── EvaluationFailed     not one answer was had
    └── BrokenAnswer         the endpoint answered something that isn't the API's

The SDK's own errors (``openai.OpenAIError``) pass through unchanged.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import csv
import functools
import hashlib
import io
import itertools
import json
import logging
import os
import random
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NotRequired, TypedDict, TypeVar, cast

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from datasets import Dataset
    from openai import OpenAI
    from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent

    from openai_sft_rehearsal import Rehearsal

__version__ = "0.1.0"
__all__ = [
    "BrokenAnswer",
    "BudgetError",
    "Case",
    "ConfigurationError",
    "CostEstimate",
    "DataError",
    "DataSummary",
    "Declined",
    "Dialogue",
    "EvaluationFailed",
    "Example",
    "JobFailed",
    "OpenAISFT",
    "OpenAISFTError",
    "Price",
    "Splits",
    "SystemMonitor",
    "TokenCounter",
    "choose_cases",
    "estimate_cost",
    "explain_api_error",
    "load_vocabulary",
    "parse_dialogue",
    "price_of",
    "read_dialogues",
    "read_examples",
    "split_dialogues",
    "to_example",
]

logger = logging.getLogger("openai_sft")
T = TypeVar("T")

# ── Constants ────────────────────────────────────────────────────────────────────────────────

DEFAULT_MODEL = "gpt-4o-mini-2024-07-18"
DEFAULT_DATASET = "UEC-InabaLab/KokoroChat"
DEFAULT_OUTPUT_DIR = "openai_sft_outputs"
DEFAULT_YEN_PER_DOLLAR = 150.0  # an assumption, said to be one wherever yen are shown

SPLIT_NAMES: tuple[SplitName, ...] = ("train", "test", "valid")
SplitName = Literal["train", "test", "valid"]
Role = Literal["assistant", "user"]

ROLES: dict[str, Role] = {
    **dict.fromkeys(("counselor", "counsellor", "therapist", "assistant"), "assistant"),
    **dict.fromkeys(("カウンセラー", "カウンセラー役", "相談員"), "assistant"),
    **dict.fromkeys(("client", "user", "クライアント", "クライエント"), "user"),
    **dict.fromkeys(("クライアント役", "相談者"), "user"),
}

# Limits of the service: https://platform.openai.com/docs/guides/supervised-fine-tuning and the
# API description of POST /fine_tuning/jobs.
MIN_TRAINING_EXAMPLES = 10
MAX_EPOCHS = 50
MAX_BATCH_SIZE = 256
MAX_SUFFIX_LENGTH = 64
MAX_SEED = 2_147_483_647

TERMINAL_STATUSES = frozenset({"succeeded", "failed", "cancelled"})

# o200k_base spends 0.228 tokens a UTF-8 byte on KokoroChat (10,601,921 tokens over the merged
# messages of 5,989 dialogues; 0.2279 to 0.2284 on samples of 600), and 0.2 to 0.25 on English.
TOKENS_PER_BYTE = 0.228
VOCABULARY = "o200k_base"

RETRIED_STATUSES = frozenset({408, 409, 429})  # and every 5xx
RETRY_SECONDS = 600.0
MISSING_STATUSES = frozenset({404, 405, 501})  # the endpoint lacks this part of the API


# ── Errors ───────────────────────────────────────────────────────────────────────────────────


class OpenAISFTError(Exception):
    """Base of this library's errors. ``exit_code`` is what the command line ends with."""

    exit_code = 1


class ConfigurationError(OpenAISFTError, ValueError):
    """A setting, a key or an option is missing or out of range."""

    exit_code = 2


class DataError(OpenAISFTError, ValueError):
    """The data can't be used. The message names the place (``path:line`` or a dialogue's id)."""

    exit_code = 2


class BudgetError(OpenAISFTError):
    """The estimated cost passes ``max_cost_usd``, or can't be known while a limit is set."""

    exit_code = 2


class Declined(OpenAISFTError):
    """``confirm`` answered no; nothing was sent."""

    exit_code = 2


class JobFailed(OpenAISFTError):
    """A fine-tuning job ended as ``failed`` or ``cancelled``."""

    def __init__(self, job_id: str, status: str, code: str | None, message: str | None) -> None:
        self.job_id, self.status, self.code, self.message = job_id, status, code, message
        reason = ": ".join(printable(part) for part in (code, message) if part)
        reason = f"、{reason}" if reason else ""
        super().__init__(f"ファインチューニング失敗: {status}（ジョブ {job_id}{reason}）")


class EvaluationFailed(OpenAISFTError):
    """Not one case was answered. ``path`` is the saved file with the errors."""

    def __init__(self, message: str, path: str) -> None:
        self.path = path
        super().__init__(message)


class BrokenAnswer(OpenAISFTError):
    """The endpoint's answer was cut, or isn't the API's JSON (a proxy's page, for example)."""


# ── Records ──────────────────────────────────────────────────────────────────────────────────

Message = dict[str, Any]


class Example(TypedDict):
    """One line of a training file, with the id of its dialogue (which isn't written)."""

    id: str
    messages: list[Message]
    tools: NotRequired[list[Any]]


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A dialogue as read: stripped, non-empty utterances in order.

    ``source`` says where it stands, for messages to the user. ``digest`` is the sha256 of the
    turns: the split is drawn in its order, so that neither file names nor their order matter.
    """

    id: str
    source: str
    turns: tuple[tuple[Role, str], ...]
    digest: str
    topic: Mapping[str, Any] = field(default_factory=dict)
    review_jp: Mapping[str, Any] = field(default_factory=dict)
    review_en: Mapping[str, Any] = field(default_factory=dict)


class Splits(NamedTuple):
    """Three disjoint lists, in the order in which the public methods give them."""

    train: list[Any]
    test: list[Any]
    valid: list[Any]


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars per 1,000,000 tokens of one base model and of its tuned ones."""

    training: float
    tuned_input: float
    tuned_output: float
    base_input: float | None = None
    base_output: float | None = None

    def rates(self, *, tuned: bool) -> tuple[float, float] | None:
        """Input and output rate of the tuned or of the base model, ``None`` where unknown."""
        if tuned:
            return self.tuned_input, self.tuned_output
        if self.base_input is None or self.base_output is None:
            return None
        return self.base_input, self.base_output


PRICES_AS_OF = "2026-09"
PRICES_SOURCE = "https://platform.openai.com/docs/pricing"
PRICES: dict[str, Price] = {
    "gpt-4o-mini-2024-07-18": Price(3.00, 0.30, 1.20, 0.15, 0.60),
    "gpt-4o-2024-08-06": Price(25.00, 3.75, 15.00),
    "gpt-4.1-2025-04-14": Price(25.00, 3.00, 12.00),
    "gpt-4.1-mini-2025-04-14": Price(5.00, 0.80, 3.20),
}
MODEL_ALIASES = {
    "gpt-4o-mini": "gpt-4o-mini-2024-07-18",
    "gpt-4o": "gpt-4o-2024-08-06",
    "gpt-4.1": "gpt-4.1-2025-04-14",
    "gpt-4.1-mini": "gpt-4.1-mini-2025-04-14",
}


@dataclass(frozen=True, slots=True)
class CostEstimate:
    """What a run costs, before it is paid. Dollars are ``None`` where they can't be known."""

    model: str
    epochs: int | Literal["auto"] | None
    training_tokens: int
    evaluation_input_tokens: int
    evaluation_output_tokens: int
    training_usd: float | None
    evaluation_usd: float | None
    yen_per_dollar: float
    exact_tokens: bool

    @property
    def total_usd(self) -> float | None:
        """Training and evaluation together."""
        if self.training_usd is None or self.evaluation_usd is None:
            return None
        return self.training_usd + self.evaluation_usd

    def lines(self) -> list[str]:
        """The estimate as lines of Japanese text."""

        def money(usd: float | None) -> str:
            if usd is None:
                return "不明"
            return f"${usd:,.4f}（約{usd * self.yen_per_dollar:,.0f}円）"

        mark = "" if self.exact_tokens else "（推定）"
        lines = []
        if self.epochs is not None:
            lines.append(
                f"学習: {self.training_tokens:,}トークン{mark} × {self.epochs}エポック"
                f" = {money(self.training_usd)}"
            )
        lines += [
            f"評価: 入力 {self.evaluation_input_tokens:,} + 出力 約"
            f"{self.evaluation_output_tokens:,}トークン{mark} = {money(self.evaluation_usd)}",
            f"合計: {money(self.total_usd)}",
        ]
        if self.total_usd is None:
            lines.append(
                "エポック数 auto はサービスが決めるため、料金は事前に分かりません。"
                if self.epochs == "auto" and price_of(self.model)
                else f"{self.model} の単価は料金表にありません。提供元の料金を確認してください。"
            )
        lines.append(
            f"単価: {PRICES_SOURCE}（{PRICES_AS_OF}時点）、"
            f"1ドル={self.yen_per_dollar:g}円と仮定。検証データは無料です。"
        )
        return lines


@dataclass(frozen=True, slots=True)
class DataSummary:
    """What the data stages made: the examples of each split, their files and the price."""

    examples: Mapping[str, int]
    files: Mapping[str, str]
    estimate: CostEstimate

    def lines(self) -> list[str]:
        """The summary as lines of Japanese text."""
        train, test, valid = (self.examples[name] for name in SPLIT_NAMES)
        counts = f"対話: 学習 {train:,}件、テスト {test:,}件、検証 {valid:,}件"
        return [counts, *self.estimate.lines()]


@dataclass(frozen=True, slots=True)
class Case:
    """One question to a model: the context up to a counsellor's turn, and the real answer."""

    id: str
    input: list[Message]
    reference: str
    tools: list[Any] | None = None


class Sample(NamedTuple):
    """One reading of the machine. Percentages are 0–100, memory in bytes."""

    cpu_percent: float
    memory_percent: float
    memory_used: int
    memory_total: int
    disk_percent: float


# ── Reading ──────────────────────────────────────────────────────────────────────────────────


def read_dialogues(source: str) -> list[Dialogue]:
    """Read every dialogue of ``source``: a folder, a JSON/JSONL/Parquet file, or a Hub name.

    A folder is read as the released KokoroChat is: every ``.json``, ``.jsonl`` and ``.parquet``
    file in it. A name that is no path goes to ``datasets.load_dataset``, all of its splits.

    Raises :class:`DataError` for a source that isn't there, can't be read or holds no dialogue,
    and for a row that isn't a dialogue.
    """
    records: Iterable[tuple[str, str, object]]
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if _is_data_file(p))
        records = itertools.chain.from_iterable(map(_file_records, files))
    elif path.exists():
        records = _file_records(path)
    elif _looks_like_path(source):
        raise DataError(
            f"データがありません: {source}。フォルダー、JSON・JSONL・Parquetファイル、"
            f"またはHugging Face Hubの名前（例: {DEFAULT_DATASET}）を指定してください。"
        )
    else:
        records = _hub_records(source)
    dialogues = []
    ids: set[str] = set()
    for fallback_id, where, record in records:
        dialogue = parse_dialogue(record, fallback_id=fallback_id, source=where)
        if dialogue.id in ids:
            raise DataError(f"{where}: 対話のID「{dialogue.id}」が重複しています。")
        ids.add(dialogue.id)
        dialogues.append(dialogue)
    if not dialogues:
        raise DataError(f"対話が1件もありません: {source}。中身と指定を確認してください。")
    return dialogues


def _is_data_file(path: Path) -> bool:
    return path.suffix in (".json", ".jsonl", ".parquet") and not path.name.startswith(".")


def _looks_like_path(source: str) -> bool:
    """True unless ``source`` has the form of a Hub name (``name`` or ``owner/name``)."""
    return (
        source.startswith((".", "/", "~", os.sep))
        or source.count("/") > 1
        or Path(source).suffix in (".json", ".jsonl", ".parquet")
    )


def _file_records(path: Path) -> Iterator[tuple[str, str, object]]:
    """Yield (id if the record has none, where it stands, the record) for each row of a file."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: Parquetとして読めません（{printable(error)}）。") from error
        for number, row in enumerate(rows, 1):
            yield f"{path.stem}-{number}", f"{path}:{number}", row
        return
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: UTF-8ではありません（{error.start}バイト目）。") from error
    except OSError as error:
        raise DataError(f"{path}: 読めません（{error.strerror}）。") from error
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"{path.stem}-{number}", f"{path}:{number}", _parse_json(line, path, number)
        return
    value = _parse_json(text, path, 1)
    if isinstance(value, list):
        for number, row in enumerate(value, 1):
            yield f"{path.stem}-{number}", f"{path}[{number}]", row
    else:
        yield path.stem, str(path), value


def _parse_json(text: str, path: Path, line: int) -> object:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError):
            line += error.lineno - 1
        raise DataError(
            f"{path}:{line}: JSONとして読めません（{printable(error)}）。"
            "1行に1件のJSONなら拡張子を .jsonl にしてください。"
        ) from error


def _hub_records(name: str) -> Iterator[tuple[str, str, object]]:
    import datasets

    try:
        loaded = datasets.load_dataset(name)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"データセット {name} を読み込めません（{type(error).__name__}: {printable(error)}）。"
            "ネットワークと名前を確かめるか、ダウンロードしたフォルダーを --dataset で"
            "指定してください。"
        ) from error
    for split, rows in loaded.items():
        for number, row in enumerate(rows):
            yield f"{split}-{number}", f"{name}:{split}[{number}]", row


def parse_dialogue(record: object, *, fallback_id: str, source: str) -> Dialogue:
    """Make a :class:`Dialogue` of one raw record; :func:`dialogue_row` is its inverse.

    ``record`` holds its turns under ``dialogue`` (KokoroChat) or ``messages``, each with
    ``role`` and ``utterance`` or ``content``. The id is the record's ``id``, else KokoroChat's
    ``evaluation_id``, else ``fallback_id``. Raises :class:`DataError`, also for a role that is
    not in :data:`ROLES`: who is to be imitated is never guessed.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{source}: 対話はJSONオブジェクトでなければなりません。")
    turns = record.get("dialogue") or record.get("messages")
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise DataError(f"{source}: 対話の本文（dialogue の配列）がありません。")
    review_en = record.get("review_by_client_en") or {}
    dialogue_id = record.get("id", review_en.get("evaluation_id"))
    dialogue_id = fallback_id if dialogue_id is None else str(dialogue_id)
    spoken: list[tuple[Role, str]] = []
    for number, turn in enumerate(turns, 1):
        try:
            role = ROLES.get(turn["role"]) or _role_of(turn["role"])
            text = (turn["utterance"] if "utterance" in turn else turn["content"]).strip()
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{source}: 対話「{dialogue_id}」の{number}番目の発話に文字列の role と "
                "utterance がありません。"
            ) from error
        if role is None:
            raise DataError(
                f"{source}: 対話「{dialogue_id}」の{number}番目の発話の話者"
                f"「{printable(turn['role'])}」が分かりません。使える話者: {'、'.join(ROLES)}"
            )
        if text:
            spoken.append((role, text))
    try:
        flat = "\0".join(itertools.chain.from_iterable(spoken)).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{source}: 対話「{dialogue_id}」に文字にならない符号（対になっていないサロゲート）"
            "が含まれています。"
        ) from error
    return Dialogue(
        id=dialogue_id,
        source=source,
        turns=tuple(spoken),
        digest=hashlib.sha256(flat).hexdigest(),
        topic=record.get("topic") or {},
        review_jp=record.get("review_by_client_jp") or {},
        review_en=review_en,
    )


def _role_of(role: str) -> Role | None:
    return ROLES.get(unicodedata.normalize("NFKC", role).strip().casefold())


def dialogue_row(dialogue: Dialogue) -> dict[str, Any]:
    """The row of a ``Dataset`` for ``dialogue``; :func:`parse_dialogue` reads it back."""
    return {
        "id": dialogue.id,
        "dialogue": [{"role": role, "utterance": text} for role, text in dialogue.turns],
        "topic": dict(dialogue.topic),
        "review_by_client_jp": dict(dialogue.review_jp),
        "review_by_client_en": dict(dialogue.review_en),
    }


# ── Splitting ────────────────────────────────────────────────────────────────────────────────


def split_dialogues(
    dialogues: Iterable[Dialogue], *, seed: int = 42, max_samples: int | None = None
) -> Splits:
    """Shuffle by ``seed`` and split 8:1:1: ``test = valid = round(n / 10)``, the rest trains.

    ``max_samples`` takes a seeded sample first; a smaller sample is part of a larger one. The
    same dialogues give the same split on every machine, in whatever order they come.
    """
    if max_samples is not None and max_samples < 1:
        raise ConfigurationError(
            f"max_samples は1以上でなければなりません（指定: {max_samples}）。"
        )
    shuffled = sorted(dialogues, key=lambda dialogue: (dialogue.digest, dialogue.id))
    random.Random(seed).shuffle(shuffled)
    chosen = shuffled[:max_samples]
    held_out = round(len(chosen) / 10)
    return Splits(
        train=chosen[2 * held_out :],
        test=chosen[:held_out],
        valid=chosen[held_out : 2 * held_out],
    )


# ── Converting ───────────────────────────────────────────────────────────────────────────────


def to_example(dialogue: Dialogue, *, system_prompt: str | None = None) -> Example | None:
    """Turn a dialogue into one training example, or ``None`` where the assistant says nothing.

    Consecutive turns of one speaker become one message, joined by a newline; what the client
    says after the counsellor's last turn is cut, for an example has to end with the assistant.
    """
    messages: list[Message] = []
    for role, text in dialogue.turns:
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n" + text
        else:
            messages.append({"role": role, "content": text})
    if messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        return None
    if system_prompt:
        messages.insert(0, {"role": "system", "content": system_prompt})
    return {"id": dialogue.id, "messages": messages}


_encode_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def example_line(example: Example) -> str:
    """The line of a training file, without its newline and without the id."""
    line = _encode_json({key: value for key, value in example.items() if key != "id"})
    # Some readers take these for line ends, which would break one line into two.
    for character in "\u2028\u2029\x85":
        if character in line:
            line = line.replace(character, f"\\u{ord(character):04x}")
    return line


def read_examples(path: str | os.PathLike[str]) -> list[Example]:
    """Read a JSONL file of examples back; the ids are ``NAME-LINE``. Raises DataError."""
    examples: list[Example] = []
    for example_id, where, value in _file_records(Path(path)):
        if not isinstance(value, dict) or not isinstance(value.get("messages"), list):
            raise DataError(f"{where}: messages の配列がありません。")
        examples.append(cast("Example", {"id": example_id, **value}))
    return examples


# ── Counting and pricing ─────────────────────────────────────────────────────────────────────


@functools.lru_cache(maxsize=1)
def load_vocabulary(timeout: float = 20.0) -> Any | None:
    """tiktoken's ``o200k_base``, or ``None`` when it can't be had within ``timeout`` seconds.

    tiktoken fetches the vocabulary on first use, without a time-out of its own; a daemon thread
    keeps that from hanging the program. The outcome is kept for the life of the process.
    """
    outcome: list[Any] = []

    def fetch() -> None:
        try:
            import tiktoken

            outcome.append(tiktoken.get_encoding(VOCABULARY))
        except (ImportError, OSError, ValueError) as error:
            outcome.append(error)

    thread = threading.Thread(target=fetch, name="openai-sft-vocabulary", daemon=True)
    thread.start()
    thread.join(timeout)
    if not outcome or isinstance(outcome[0], Exception):
        logger.warning(
            "tiktokenの語彙 %s を取得できないため、トークン数は推定です（%s）。"
            "TIKTOKEN_CACHE_DIR に語彙ファイルを置くとオフラインでも正確に数えられます。",
            VOCABULARY,
            type(outcome[0]).__name__ if outcome else f"{timeout:g}秒で打ち切り",
        )
        return None
    return outcome[0]


class TokenCounter:
    """Counts the tokens of conversations as the service bills them.

    3 a message plus its role and content, 1 more for a name, 3 more an example (OpenAI
    Cookbook, ``Chat_finetuning_data_prep``). ``exact`` is False without the vocabulary: text
    is then estimated from its UTF-8 length.
    """

    SEPARATOR = "<|endoftext|>"

    def __init__(self, encoding: Any | None) -> None:
        self._encoding = encoding
        self.exact = encoding is not None

    def count(self, messages: Sequence[Message]) -> int:
        """Tokens of one conversation as a training example."""
        overhead = 3 + 4 * len(messages)  # every role is one token
        texts = []
        for message in messages:
            for key, value in message.items():
                if isinstance(value, str) and key != "role":
                    texts.append(value)
                    overhead += key == "name"
        return overhead + self.count_texts(texts)

    def count_texts(self, texts: Sequence[str]) -> int:
        """Tokens of bare texts, summed."""
        if self._encoding is None:
            return round(TOKENS_PER_BYTE * sum(map(len, map(str.encode, texts))))
        if not texts:
            return 0
        # One call for all: a special token never merges with its neighbours, so the sum is
        # that of the texts one by one. Text that holds one itself is counted the slow way.
        joined = self.SEPARATOR.join(texts)
        if joined.count(self.SEPARATOR) != len(texts) - 1:
            return sum(len(self._encoding.encode_ordinary(text)) for text in texts)
        tokens = self._encoding.encode_to_numpy(
            joined, allowed_special={self.SEPARATOR}, disallowed_special=()
        )
        return len(tokens) - (len(texts) - 1)


def price_of(model: str) -> Price | None:
    """The price of a base model or of a tuned one (``ft:BASE:…``); ``None`` where unknown."""
    base = model.split(":")[1] if model.startswith("ft:") and ":" in model[3:] else model
    return PRICES.get(MODEL_ALIASES.get(base, base))


def estimate_cost(
    training_tokens: int,
    epochs: int | Literal["auto"] | None,
    *,
    model: str = DEFAULT_MODEL,
    evaluation_input_tokens: int = 0,
    evaluation_output_tokens: int = 0,
    yen_per_dollar: float = DEFAULT_YEN_PER_DOLLAR,
    exact_tokens: bool = True,
) -> CostEstimate:
    """Price a run: training tokens × epochs × price, plus the evaluation at the tuned rate.

    ``epochs=None`` prices an evaluation alone; ``"auto"`` leaves the training price unknown,
    for the service chooses. Prices: :data:`PRICES`, dated :data:`PRICES_AS_OF`.
    """
    price = price_of(model)
    training: float | None = None
    if epochs is None:
        training = 0.0
    elif price is not None and epochs != "auto":
        training = training_tokens * epochs * price.training / 1e6
    rates = None
    if price is not None:
        rates = price.rates(tuned=epochs is not None or model.startswith("ft:"))
    evaluation = None
    if rates is not None:
        evaluation = (
            evaluation_input_tokens * rates[0] + evaluation_output_tokens * rates[1]
        ) / 1e6
    return CostEstimate(
        model=model,
        epochs=epochs,
        training_tokens=training_tokens,
        evaluation_input_tokens=evaluation_input_tokens,
        evaluation_output_tokens=evaluation_output_tokens,
        training_usd=training,
        evaluation_usd=evaluation,
        yen_per_dollar=yen_per_dollar,
        exact_tokens=exact_tokens,
    )


# ── Choosing what to ask ─────────────────────────────────────────────────────────────────────


def choose_cases(
    examples: Iterable[Example], *, max_cases: int | None = 10, seed: int = 42
) -> list[Case]:
    """Draw at most ``max_cases`` dialogues (0 or ``None``: all) and one turn of each to answer.

    The turn is a seeded choice among the assistant's turns that follow a user's, but not the
    last of the dialogue, which is nearly always a farewell, where there is another. A case's id
    is the dialogue's id and the turn's index in ``messages``; both draws depend on the seed and
    the id alone, so the same dialogue is always asked at the same turn.
    """
    ranked = sorted(
        (random.Random(f"{seed}/{example['id']}").random(), example["id"], example)
        for example in examples
        if _turns_to_ask(example["messages"])
    )
    return [_case(example, seed) for _, _, example in ranked[: max_cases or None]]


def _turns_to_ask(messages: Sequence[Message]) -> list[int]:
    turns = [
        index
        for index, message in enumerate(messages)
        if index
        and message["role"] == "assistant"
        and messages[index - 1]["role"] == "user"
        and message.get("content")
    ]
    if len(turns) > 1 and turns[-1] == len(messages) - 1:
        turns.pop()
    return turns


def _case(example: Example, seed: int) -> Case:
    messages = example["messages"]
    index = random.Random(f"{seed}/{example['id']}/turn").choice(_turns_to_ask(messages))
    context = [
        {key: value for key, value in message.items() if key != "weight"}
        for message in messages[:index]
    ]
    return Case(
        id=f"{example['id']}:{index}",
        input=context,
        reference=messages[index]["content"],
        tools=example.get("tools"),
    )


# ── Talking to the service ───────────────────────────────────────────────────────────────────


def check_hyperparameters(
    epochs: int | str,
    batch_size: int | str,
    learning_rate_multiplier: float | str | None = None,
    suffix: str | None = None,
    seed: int | None = None,
) -> None:
    """Raise :class:`ConfigurationError` for what the service would refuse."""

    def require(name: str, value: object, ok: bool, allowed: str) -> None:
        if not ok:
            raise ConfigurationError(
                f"{name} は{allowed}でなければなりません（指定: {printable(value)}）。"
            )

    def whole(value: object, low: int, high: int) -> bool:
        return type(value) is int and low <= value <= high

    require(
        "epochs",
        epochs,
        epochs == "auto" or whole(epochs, 1, MAX_EPOCHS),
        f"1〜{MAX_EPOCHS}の整数か auto ",
    )
    require(
        "batch_size",
        batch_size,
        batch_size == "auto" or whole(batch_size, 1, MAX_BATCH_SIZE),
        f"1〜{MAX_BATCH_SIZE}の整数か auto ",
    )
    rate = learning_rate_multiplier
    require(
        "learning_rate_multiplier",
        rate,
        rate is None
        or rate == "auto"
        or (isinstance(rate, int | float) and 0 < rate < float("inf")),
        "正の数か auto ",
    )
    require(
        "suffix",
        suffix,
        suffix is None or 1 <= len(suffix) <= MAX_SUFFIX_LENGTH,
        f"1〜{MAX_SUFFIX_LENGTH}文字",
    )
    require("seed", seed, seed is None or whole(seed, 0, MAX_SEED), f"0〜{MAX_SEED}の整数")


def retry_delay(attempt: int, retry_after: float | None, jitter: float) -> float:
    """Seconds to wait after failed attempt number ``attempt`` (from 0).

    Doubles from half a second to one minute, less up to a quarter by ``jitter`` (0–1); the
    service's own ``Retry-After`` is honoured up to :data:`RETRY_SECONDS`.
    """
    backoff = min(60.0, 0.5 * 2.0 ** min(attempt, 10)) * (1 - 0.25 * jitter)
    return max(backoff, min(retry_after or 0.0, RETRY_SECONDS))


def explain_api_error(error: Exception) -> str:
    """One line of Japanese for an error of the SDK: what happened and what to do next."""
    status = getattr(error, "status_code", None)
    code = getattr(error, "code", None)
    remedies: dict[object, str] = {
        "insufficient_quota": "残高か上限額が足りません。支払い設定を確認してください。",
        "training_not_available": (
            "この組織では新しいファインチューニングができません。"
            "--base-url で別のエンドポイントを使うか、作成済みモデルを評価してください。"
        ),
        400: "リクエストが受け付けられませんでした。指定した値を確認してください。",
        401: "APIキーが正しくありません。OPENAI_API_KEY を確認してください。",
        403: "この操作は許可されていません。キーの権限と組織の設定を確認してください。",
        404: "見つかりません。モデル・ジョブ・ファイルのIDと --base-url を確認してください。",
        429: "回数の上限に達しています。しばらく待ってからやり直してください。",
    }
    remedy = remedies.get(code) or remedies.get(status)
    if remedy is None:
        remedy = (
            "サービスがエラーを返しました。しばらく待ってからやり直してください。"
            if status
            else "接続できません。ネットワークと --base-url を確認してください。"
        )
    body = getattr(error, "body", None)
    message = body.get("message") if isinstance(body, Mapping) else None
    label = " ".join(str(part) for part in (status, code) if part) or type(error).__name__
    return f"{remedy}（{printable(label)}: {printable(message or error)[:500]}）"


def printable(text: object) -> str:
    """``text`` on one line without control characters: safe to show, whoever wrote it."""
    return "".join(c if c.isprintable() else " " for c in str(text)).strip()


def parse_result_file(content: bytes) -> list[dict[str, float]]:
    """The rows of a job's result file: header names to numbers, empty cells left out.

    The CSV has been seen base64-encoded. Raises ``ValueError`` where it is neither.
    """
    if b"step" not in content.split(b"\n", 1)[0]:
        try:
            content = base64.b64decode(content, validate=True)
        except binascii.Error as error:
            raise ValueError("CSVでもBase64でもありません") from error
    reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig")))
    if "step" not in (reader.fieldnames or ()):
        raise ValueError("step の列がありません")
    return [
        {key: float(value) for key, value in row.items() if isinstance(value, str) and value}
        for row in reader
    ]


# ── The run record and other files ───────────────────────────────────────────────────────────


def write_new_file(path: Path, text: str) -> None:
    """Write ``path`` whole or not at all; an existing file raises ``FileExistsError``."""
    temporary = _write_temporary(path, text)
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        path.open("x").close()
        temporary.replace(path)
        return
    finally:
        temporary.unlink(missing_ok=True)


def _write_temporary(path: Path, text: str) -> Path:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def to_json(value: object) -> str:
    """Readable JSON, UTF-8 as it is."""
    return json.dumps(value, ensure_ascii=False, indent=2, default=str) + "\n"


class RunRecord:
    """What is known of one run, in ``run_STAMP.json``; replaced whole at every update."""

    VERSION = 1

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self.path, self.data = path, data

    @classmethod
    def create(cls, folder: Path, stamp: str, **facts: Any) -> RunRecord:
        """Start a record. Raises ``FileExistsError`` where the stamp is taken."""
        data = {"version": cls.VERSION, "run_id": f"run_{stamp}", **facts}
        path = folder / f"run_{stamp}.json"
        write_new_file(path, to_json(data))
        return cls(path, data)

    @classmethod
    def load(cls, path: Path) -> RunRecord:
        """Read a record. Raises :class:`DataError` where it isn't one."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: 実行記録として読めません（{printable(error)}）。") from error
        if not isinstance(data, dict) or data.get("version") != cls.VERSION:
            raise DataError(f"{path}: この版では読めない実行記録です。")
        return cls(path, data)

    @property
    def stamp(self) -> str:
        """The ``YYYYmmdd_HHMMSS`` that all files of the run carry."""
        return self.path.stem.removeprefix("run_")

    def update(self, **facts: Any) -> None:
        """Add or replace top-level facts, on disk too."""
        self.data.update(facts)
        _write_temporary(self.path, to_json(self.data)).replace(self.path)


def newest_model(folder: Path) -> str | None:
    """The tuned model of the newest run in ``folder`` that has one and was no rehearsal."""
    for path in sorted(folder.glob("run_*.json"), reverse=True):
        data = RunRecord.load(path).data
        if data.get("fine_tuned_model") and not data.get("rehearsal"):
            return str(data["fine_tuned_model"])
    return None


# ── The monitor beside it ────────────────────────────────────────────────────────────────────


class SystemMonitor:
    """A thread that logs CPU, memory and disk at once and then every ``interval`` seconds.

    A context manager. ``sampler`` gives a :class:`Sample`; by default psutil reads this machine
    and the disk of ``folder``. A reading that fails is logged and the thread goes on.
    """

    WARN_PERCENT = 90.0

    def __init__(
        self,
        folder: str | os.PathLike[str] = ".",
        *,
        interval: float = 30.0,
        sampler: Callable[[], Sample] | None = None,
    ) -> None:
        self._folder, self._interval = folder, interval
        self._sampler = sampler or self._read_machine
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="openai-sft-monitor", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        import psutil

        while True:
            try:
                self._report(self._sampler())
            except (OSError, psutil.Error) as error:
                logger.warning("[監視] 読み取れません: %s", printable(error))
            if self._stopped.wait(self._interval):
                return

    def _read_machine(self) -> Sample:
        import psutil

        memory = psutil.virtual_memory()
        return Sample(
            cpu_percent=psutil.cpu_percent(interval=0.1),
            memory_percent=memory.percent,
            memory_used=memory.total - memory.available,
            memory_total=memory.total,
            disk_percent=psutil.disk_usage(os.fspath(self._folder)).percent,
        )

    def _report(self, sample: Sample) -> None:
        logger.info(
            "[監視] CPU: %.1f%% | メモリ: %.1f%% (%.1f/%.1fGB) | ディスク: %.1f%%",
            sample.cpu_percent,
            sample.memory_percent,
            sample.memory_used / 2**30,
            sample.memory_total / 2**30,
            sample.disk_percent,
        )
        for name, percent in (
            ("CPU", sample.cpu_percent),
            ("メモリ", sample.memory_percent),
            ("ディスク", sample.disk_percent),
        ):
            if percent > self.WARN_PERCENT:
                logger.warning("⚠️ %s使用率が高いです: %.1f%%", name, percent)


class _StderrHandler(logging.Handler):
    """Writes log lines to stderr above a progress bar, looked up anew for notebooks."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except (OSError, ValueError):
            self.handleError(record)


class _TrainingBar:
    """A tqdm bar on training steps, made when the first metrics event tells how many."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._bar: Any = None

    def show(self, event: FineTuningJobEvent) -> None:
        """Move to the step of a metrics event, or log any other event's message."""
        data = event.data if isinstance(event.data, Mapping) else {}
        step, total = data.get("step"), data.get("total_steps")
        if event.type != "metrics" or not isinstance(step, int):
            logger.info("[イベント] %s", printable(event.message))
            return
        logger.debug("[イベント] %s", printable(event.message))
        if self._bar is None and self._enabled:
            from tqdm.auto import tqdm

            self._bar = tqdm(total=total, desc="学習", unit="step", disable=None)
        if self._bar is not None:
            losses = {
                label: f"{data[key]:.3f}"
                for label, key in (("損失", "train_loss"), ("検証", "valid_loss"))
                if isinstance(data.get(key), int | float)
            }
            self._bar.set_postfix(losses, refresh=False)
            self._bar.update(step - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


# ── The class ────────────────────────────────────────────────────────────────────────────────


class OpenAISFT:
    """Fine-tuning from dialogue data to an evaluated model; the methods follow a run's order.

    Settings come from the argument, then the environment (``OPENAI_API_KEY``,
    ``OPENAI_BASE_URL``, ``OPENAI_SFT_MODEL``, ``OPENAI_SFT_DATASET``), then a ``.env`` found
    from the working directory upwards, then the default (model
    ``gpt-4o-mini-2024-07-18``, data ``UEC-InabaLab/KokoroChat``). Nothing is sent anywhere and
    no file is written before a method needs it.

    ``client`` is a ready ``openai.OpenAI``. ``offline=True`` gives the data stages alone.
    ``rehearse=True`` starts a local endpoint and uses it, whatever key or URL is set.
    ``confirm`` is asked with a :class:`CostEstimate` before anything is paid; ``max_cost_usd``
    bounds it. ``clock`` and ``sleep`` serve tests. With ``verbose`` the log goes to stderr,
    unless the application has set up logging itself.

    Raises :class:`ConfigurationError` where no key is set and none is needed otherwise.
    """

    def __init__(
        self,
        api_key: str | None = None,
        *,
        model: str | None = None,
        base_url: str | None = None,
        dataset: str | None = None,
        output_dir: str | os.PathLike[str] = DEFAULT_OUTPUT_DIR,
        poll_interval: float = 10.0,
        client: OpenAI | None = None,
        offline: bool = False,
        rehearse: bool = False,
        verbose: bool = True,
        system_prompt: str | None = None,
        max_cost_usd: float | None = None,
        yen_per_dollar: float = DEFAULT_YEN_PER_DOLLAR,
        confirm: Callable[[CostEstimate], bool] | None = None,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        dotenv = _read_dotenv()

        def setting(argument: str | None, name: str, default: str | None = None) -> str | None:
            return argument or os.environ.get(name) or dotenv.get(name) or default

        self.model: str = setting(model, "OPENAI_SFT_MODEL", DEFAULT_MODEL) or DEFAULT_MODEL
        self.dataset = setting(dataset, "OPENAI_SFT_DATASET", None if rehearse else DEFAULT_DATASET)
        self.base_url = None if rehearse else setting(base_url, "OPENAI_BASE_URL")
        self.output_dir = Path(output_dir)
        self.poll_interval = poll_interval
        self.rehearse = rehearse
        self.verbose = verbose
        self.system_prompt = system_prompt
        self.max_cost_usd = max_cost_usd
        self.yen_per_dollar = yen_per_dollar
        self._api_key = "rehearsal" if rehearse else setting(api_key, "OPENAI_API_KEY")
        self._organization = setting(None, "OPENAI_ORG_ID")
        self._project = setting(None, "OPENAI_PROJECT_ID")
        self._client = client
        self._offline = offline
        self._confirm = confirm
        self._clock, self._sleep = clock, sleep
        self._endpoint: Rehearsal | None = None
        self._run: RunRecord | None = None
        self._lacking: set[str] = set()
        if verbose and not logger.hasHandlers():
            handler = _StderrHandler()
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
        self._check_settings()

    def _check_settings(self) -> None:
        if not (self._api_key or self._client or self._offline):
            raise ConfigurationError(
                "OpenAI API keyが設定されていません。環境変数 OPENAI_API_KEY か .env ファイルに"
                "設定するか、OpenAISFT(api_key=...) で渡してください。キーなしで試すには"
                "リハーサル（rehearse=True、--rehearse）を使えます。"
            )
        if self._api_key and not (self._api_key.isascii() and self._api_key.isprintable()):
            raise ConfigurationError(
                "OpenAI API keyに使えない文字（全角文字や改行など）が含まれています。"
                "OPENAI_API_KEY を確認してください。"
            )
        for name, value, ok in (
            ("poll_interval", self.poll_interval, self.poll_interval >= 0),
            ("yen_per_dollar", self.yen_per_dollar, self.yen_per_dollar > 0),
            ("max_cost_usd", self.max_cost_usd, (self.max_cost_usd or 0) >= 0),
        ):
            if not ok:
                raise ConfigurationError(f"{name} の値が範囲外です（指定: {value}）。")

    def __repr__(self) -> str:
        return (
            f"OpenAISFT(model={self.model!r}, dataset={self.dataset!r}, base_url={self.base_url!r})"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the local endpoint of a rehearsal; anything else needs no end."""
        if self._endpoint is not None:
            self._endpoint.close()
            self._endpoint = self._client = None

    @property
    def client(self) -> OpenAI:
        """The SDK's client, made on first use; it leaves retrying to this class."""
        if self._offline:
            raise ConfigurationError(
                "offline=True ではサービスを使えません。データの準備だけができます。"
            )
        if self._client is None:
            import openai

            if self.rehearse:
                from openai_sft_rehearsal import Rehearsal

                self._endpoint = Rehearsal()
                self._endpoint.start()
                logger.info(
                    "リハーサル: ローカルの模擬エンドポイント %s を使います。課金も外部への送信も"
                    "ありません。損失や応答は小さな文字モデルのもので、GPTの性能とは無関係です。",
                    self._endpoint.url,
                )
            self._client = openai.OpenAI(
                api_key=self._api_key,
                base_url=self._endpoint.url if self._endpoint else self.base_url,
                organization=self._organization,
                project=self._project,
                timeout=60.0,
                # A proxy of the environment must not see a rehearsal.
                http_client=openai.DefaultHttpxClient(trust_env=False) if self.rehearse else None,
            )
        return self._client.with_options(max_retries=0)

    @property
    def files(self) -> dict[str, str]:
        """The files written so far in this run, by kind; ``record`` is the run record."""
        if self._run is None:
            return {}
        return {**self._run.data.get("files", {}), "record": str(self._run.path)}

    # The whole path ------------------------------------------------------------------------

    def run_full_pipeline(
        self,
        epochs: int | Literal["auto"] = 10,
        batch_size: int | Literal["auto"] = 32,
        max_samples: int | None = None,
        seed: int = 42,
        max_test_cases: int | None = 10,
        *,
        learning_rate_multiplier: float | Literal["auto"] | None = None,
        suffix: str | None = None,
    ) -> dict[str, Any]:
        """Load, split, convert, price, upload, train, evaluate and save; return the results.

        Raises :class:`JobFailed` for a job that ends without a model, :class:`BudgetError` and
        :class:`Declined` before anything is sent, and what the stages raise.
        """
        check_hyperparameters(epochs, batch_size, learning_rate_multiplier, suffix, seed)
        _ = self.client
        splits = self._load_convert_save(max_samples, seed)
        self._authorise(self.estimate(splits, epochs, max_test_cases=max_test_cases, seed=seed))
        training_file_id = self._upload(self.files["train"], "training")
        validation_file_id = None
        if splits.valid:
            validation_file_id = self._upload(self.files["valid"], "validation")
        else:
            logger.info("検証データが0件のため、検証なしで学習します。")
        job_id = self.create_fine_tune_job(
            training_file_id,
            epochs,
            batch_size,
            validation_file_id=validation_file_id,
            learning_rate_multiplier=learning_rate_multiplier,
            suffix=suffix,
            seed=seed,
        )
        job = self.monitor_fine_tune_job(job_id)
        if job.status != "succeeded" or not job.fine_tuned_model:
            error = job.error
            raise JobFailed(
                job_id, job.status, error.code if error else None, error.message if error else None
            )
        return self._evaluate_and_save(
            job.fine_tuned_model, splits, max_test_cases=max_test_cases, seed=seed
        )

    def prepare_data(
        self,
        epochs: int | Literal["auto"] = 10,
        max_samples: int | None = None,
        seed: int = 42,
        max_test_cases: int | None = 10,
    ) -> DataSummary:
        """Load, split, convert and write the three files, and price them. Needs no key."""
        splits = self._load_convert_save(max_samples, seed)
        return DataSummary(
            examples={name: len(part) for name, part in zip(SPLIT_NAMES, splits, strict=True)},
            files=self.files,
            estimate=self.estimate(splits, epochs, max_test_cases=max_test_cases, seed=seed),
        )

    def run_evaluation(
        self,
        model_id: str | None = None,
        max_samples: int | None = None,
        seed: int = 42,
        max_test_cases: int | None = 10,
    ) -> dict[str, Any]:
        """Evaluate ``model_id``, or the newest model tuned here, on the split; save and return.

        Raises :class:`ConfigurationError` where no model is given and none was tuned here.
        """
        model_id = model_id or newest_model(self.output_dir)
        if model_id is None:
            raise ConfigurationError(
                f"評価するモデルがありません。{self.output_dir} に学習済みモデルの記録がないため、"
                "--model-id（model_id=）で指定してください。"
            )
        _ = self.client
        splits = self._load_and_convert(max_samples, seed)
        self._authorise(
            self.estimate(splits, None, model=model_id, max_test_cases=max_test_cases, seed=seed)
        )
        return self._evaluate_and_save(model_id, splits, max_test_cases=max_test_cases, seed=seed)

    def _load_convert_save(self, max_samples: int | None, seed: int) -> Splits:
        splits = self._load_and_convert(max_samples, seed)
        self._require_examples(len(splits.train))
        self._start_run()
        self.save_all_datasets(*splits)
        return splits

    def _load_and_convert(self, max_samples: int | None, seed: int) -> Splits:
        splits = self._load_and_split(max_samples, seed)
        return Splits(
            *(
                self.prepare_dataset(part, name)
                for part, name in zip(splits, SPLIT_NAMES, strict=True)
            )
        )

    def _evaluate_and_save(
        self, model_id: str, splits: Splits, *, max_test_cases: int | None, seed: int
    ) -> dict[str, Any]:
        results = self.evaluate_model_comprehensive(
            model_id, splits.test, splits.valid, max_test_cases=max_test_cases, seed=seed
        )
        path = self.save_results(results)
        asked = sum(
            results[key]["evaluated_cases"] + results[key]["failed_cases"]
            for key in ("test_evaluation", "valid_evaluation")
        )
        if asked and not results["summary"]["total_cases_evaluated"]:
            raise EvaluationFailed(
                f"{asked}件すべての応答に失敗しました。理由は {path} の error を見てください。",
                path,
            )
        return results

    @staticmethod
    def _require_examples(count: int) -> None:
        if count < MIN_TRAINING_EXAMPLES:
            raise DataError(
                f"学習データが{count}件しかありません。サービスは{MIN_TRAINING_EXAMPLES}件以上を"
                "求めます（8:1:1に分けるので、対話は12件以上必要です。--max-samples を"
                "確認してください）。"
            )

    # Data ----------------------------------------------------------------------------------

    def load_and_split_dataset(
        self, max_samples: int | None = None, seed: int = 42
    ) -> tuple[Dataset, Dataset, Dataset]:
        """Return train, test and valid as ``datasets.Dataset``; see :func:`split_dialogues`.

        Columns: ``id``, ``dialogue`` (``role`` and ``utterance``), ``topic``,
        ``review_by_client_jp``, ``review_by_client_en``.
        """
        from datasets import Dataset

        splits = self._load_and_split(max_samples, seed)
        # One table cut in three, so that a field that is null throughout one part keeps the
        # type it has in another.
        rows = [dialogue_row(dialogue) for part in splits for dialogue in part]
        table = Dataset.from_list(rows)
        ends = list(itertools.accumulate(map(len, splits), initial=0))
        train, test, valid = (
            table.select(range(start, end)) for start, end in itertools.pairwise(ends)
        )
        return train, test, valid

    def _load_and_split(self, max_samples: int | None, seed: int) -> Splits:
        if self.dataset is None:
            from openai_sft_rehearsal import example_dialogues

            logger.info("リハーサル用の対話を使います（--dataset で変えられます）。")
            dialogues = [
                parse_dialogue(record, fallback_id=str(number), source=f"例[{number}]")
                for number, record in enumerate(example_dialogues(), 1)
            ]
        else:
            logger.info("データを読み込んでいます: %s", self.dataset)
            dialogues = read_dialogues(self.dataset)
        if max_samples is not None and max_samples > len(dialogues):
            logger.info(
                "max_samples=%s は対話の数（%s件）より多いため、すべて使います。",
                f"{max_samples:,}",
                f"{len(dialogues):,}",
            )
        splits = split_dialogues(dialogues, seed=seed, max_samples=max_samples)
        logger.info(
            "対話 %s件 → 学習 %s / テスト %s / 検証 %s（seed=%s）",
            *(f"{n:,}" for n in (len(dialogues), *map(len, splits))),
            seed,
        )
        return splits

    def prepare_dataset(
        self, dataset: Iterable[Dialogue | Mapping[str, Any]], split: str = "train"
    ) -> list[Example]:
        """Convert dialogues, or the rows of a ``Dataset``, to examples with ids.

        A dialogue in which the assistant says nothing is left out, counted and named.
        """
        examples, left_out = [], []
        for number, row in enumerate(dataset, 1):
            dialogue = row
            if not isinstance(dialogue, Dialogue):
                name = f"{split}-{number}"
                dialogue = parse_dialogue(row, fallback_id=name, source=f"{split}[{number}]")
            example = to_example(dialogue, system_prompt=self.system_prompt)
            if example is None:
                left_out.append(dialogue.id)
            else:
                examples.append(example)
        if left_out:
            logger.warning(
                "%s: カウンセラーの発話がない対話を%d件除きました（ID: %s%s）",
                split,
                len(left_out),
                "、".join(left_out[:10]),
                " ほか" if len(left_out) > 10 else "",
            )
        return examples

    def save_all_datasets(
        self,
        train_data: Sequence[Example],
        test_data: Sequence[Example],
        valid_data: Sequence[Example],
    ) -> dict[str, str]:
        """Write the three JSONL files of a run (``messages`` only); return their paths."""
        run = self._run
        if run is None or "files" in run.data:
            run = self._start_run()
        paths: dict[str, str] = {}
        for name, examples in zip(SPLIT_NAMES, (train_data, test_data, valid_data), strict=True):
            path = self.output_dir / f"{name}_data_{run.stamp}.jsonl"
            write_new_file(path, "".join(example_line(example) + "\n" for example in examples))
            paths[name] = str(path)
            logger.info("保存しました: %s（%s件）", path, f"{len(examples):,}")
        run.update(files=paths)
        return paths

    def _start_run(self) -> RunRecord:
        """Begin a run record under a stamp that no file of the folder carries yet."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        now = self._clock()
        for second in itertools.count():
            stamp = datetime.fromtimestamp(now + second).strftime("%Y%m%d_%H%M%S")
            if any(self.output_dir.glob(f"*_{stamp}.*")):
                continue
            with contextlib.suppress(FileExistsError):  # taken by another process just now
                self._run = RunRecord.create(
                    self.output_dir,
                    stamp,
                    rehearsal=self.rehearse,
                    started_at=self._now(),
                    settings={
                        "model": self.model,
                        "dataset": self.dataset,
                        "base_url": self.base_url,
                        "system_prompt": self.system_prompt,
                    },
                )
                return self._run
        raise AssertionError("unreachable")

    def _now(self) -> str:
        return datetime.fromtimestamp(self._clock()).astimezone().isoformat(timespec="seconds")

    def estimate(
        self,
        splits: Splits,
        epochs: int | Literal["auto"] | None,
        *,
        model: str | None = None,
        max_test_cases: int | None = 10,
        seed: int = 42,
    ) -> CostEstimate:
        """Count the tokens of ``splits`` of examples and price them; ``epochs=None``: no training.

        The evaluation's answers are taken to be as long as the real ones.
        """
        counter = TokenCounter(load_vocabulary())
        cases = [
            case
            for part in (splits.test, splits.valid)
            for case in choose_cases(part, max_cases=max_test_cases, seed=seed)
        ]
        return estimate_cost(
            0 if epochs is None else sum(counter.count(e["messages"]) for e in splits.train),
            epochs,
            model=model or self.model,
            evaluation_input_tokens=sum(counter.count(case.input) for case in cases),
            evaluation_output_tokens=sum(counter.count_texts([c.reference]) for c in cases),
            yen_per_dollar=self.yen_per_dollar,
            exact_tokens=counter.exact,
        )

    def _authorise(self, estimate: CostEstimate) -> None:
        """Show the price, hold it against the limit and ask; raises before anything is sent."""
        for line in estimate.lines():
            logger.info("%s", line)
        if self.rehearse:
            logger.info("リハーサルのため、実際の課金はありません。")
            return
        if self.max_cost_usd is not None:
            if estimate.total_usd is None:
                raise BudgetError(
                    f"料金が不明で、上限 ${self.max_cost_usd:,.2f} を守れるか判断できません。"
                    "何も送信していません。--max-cost-usd を外すと続けられます。"
                )
            if estimate.total_usd > self.max_cost_usd:
                raise BudgetError(
                    f"見積もり ${estimate.total_usd:,.4f} が上限 ${self.max_cost_usd:,.2f} を"
                    "超えるため中止しました。何も送信していません。--max-samples か --epochs を"
                    "減らすか、--max-cost-usd を上げてください。"
                )
        if self._confirm is not None and not self._confirm(estimate):
            raise Declined("中止しました。何も送信していません。")

    # Training ------------------------------------------------------------------------------

    def upload_training_file(self, path: str | os.PathLike[str]) -> str:
        """Upload a training file; return its id. Fewer than 10 examples raise DataError."""
        self._require_examples(len(read_examples(path)))
        return self._upload(path, "training")

    def upload_validation_file(self, path: str | os.PathLike[str]) -> str:
        """Upload a validation file, which needs one example; return its id."""
        if not read_examples(path):
            raise DataError(f"{path}: 検証データが0件です。")
        return self._upload(path, "validation")

    def _upload(self, path: str | os.PathLike[str], part: str) -> str:
        path = Path(path)
        logger.info("アップロードしています: %s（%.1f MB）", path, path.stat().st_size / 1e6)
        with path.open("rb") as file:
            uploaded = self._call(
                lambda: self.client.files.create(
                    file=(path.name, file), purpose="fine-tune", timeout=600.0
                ),
                again=False,
            )
        self._remember(**{f"{part}_file_id": uploaded.id})
        return uploaded.id

    def create_fine_tune_job(
        self,
        file_id: str,
        epochs: int | Literal["auto"] = 10,
        batch_size: int | Literal["auto"] = 32,
        *,
        validation_file_id: str | None = None,
        learning_rate_multiplier: float | Literal["auto"] | None = None,
        suffix: str | None = None,
        seed: int | None = None,
    ) -> str:
        """Create the (paid) job with supervised fine-tuning; return its id.

        It is sent once: a repeated request could make a second paid job.
        """
        check_hyperparameters(epochs, batch_size, learning_rate_multiplier, suffix, seed)
        hyperparameters: dict[str, Any] = {"n_epochs": epochs, "batch_size": batch_size}
        if learning_rate_multiplier is not None:
            hyperparameters["learning_rate_multiplier"] = learning_rate_multiplier
        request: dict[str, Any] = {
            "model": self.model,
            "training_file": file_id,
            "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        }
        options = {"validation_file": validation_file_id, "suffix": suffix, "seed": seed}
        request.update((key, value) for key, value in options.items() if value is not None)
        job = self._call(lambda: self.client.fine_tuning.jobs.create(**request), again=False)
        self._remember(job_id=job.id, job_request=request, job_status=job.status)
        logger.info("ファインチューニングジョブを作成しました: %s", job.id)
        return job.id

    def monitor_fine_tune_job(self, job_id: str) -> FineTuningJob:
        """Poll until the job ends; return it, whatever its end. Events are logged as they come.

        Waits ``poll_interval`` seconds between polls, less at first. The outcome, with the
        tuned model's name and the training metrics, is saved in the run record.
        """
        seen: set[str] = set()
        status = ""
        bar = _TrainingBar(enabled=self.verbose)
        with SystemMonitor(self._existing_folder()), contextlib.closing(bar):
            for delay in self._poll_delays():
                job = self._call(lambda: self.client.fine_tuning.jobs.retrieve(job_id))
                for event in self._new_events(job_id, seen):
                    bar.show(event)
                if job.status != status:
                    status = job.status
                    logger.info("ジョブ %s の状態: %s", job_id, printable(status))
                if status in TERMINAL_STATUSES:
                    break
                self._sleep(delay)
        self._record_outcome(job)
        return job

    def _poll_delays(self) -> Iterator[float]:
        """Seconds between polls: short at first, when a bad file is found, then the interval."""
        interval = min(self.poll_interval, 0.5) if self.rehearse else self.poll_interval
        return (interval / 2 ** max(0, 4 - n) for n in itertools.count())

    def _new_events(self, job_id: str, seen: set[str]) -> list[FineTuningJobEvent]:
        """Events not in ``seen``, oldest first; they come newest first, in pages."""
        fresh: list[FineTuningJobEvent] = []
        page = self._optional(
            "イベント", lambda: self.client.fine_tuning.jobs.list_events(job_id, limit=100)
        )
        while page is not None:
            unseen = [event for event in page.data if event.id not in seen]
            seen.update(event.id for event in unseen)
            fresh.extend(unseen)
            if len(unseen) < len(page.data) or not unseen or not page.has_next_page():
                break
            page = self._optional("イベント", page.get_next_page)
        return fresh[::-1]

    def _record_outcome(self, job: FineTuningJob) -> None:
        error = job.error
        self._remember(
            job_id=job.id,
            job_status=job.status,
            job_error={"code": error.code, "message": error.message} if error else None,
            fine_tuned_model=job.fine_tuned_model,
            trained_tokens=job.trained_tokens,
            result_files=job.result_files,
        )
        if job.status != "succeeded":
            reason = f"（{printable(error.code)}: {printable(error.message)}）" if error else ""
            logger.error("ファインチューニング失敗: %s%s", printable(job.status), reason)
            return
        logger.info("学習済みモデル: %s", job.fine_tuned_model)
        self._save_metrics(job)

    def _save_metrics(self, job: FineTuningJob) -> None:
        """Write the result file's rows to ``training_metrics_STAMP.csv``, where there is one."""
        for file_id in job.result_files or ():
            content = self._optional(
                "結果ファイル", functools.partial(self.client.files.content, file_id)
            )
            if content is None:
                continue
            try:
                rows = parse_result_file(content.content)
            except ValueError as error:
                logger.warning("結果ファイル %s を読めません（%s）。", file_id, printable(error))
                continue
            columns = list(dict.fromkeys(key for row in rows for key in row))
            table = io.StringIO()
            writer = csv.DictWriter(table, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            self._publish("training_metrics", ".csv", table.getvalue())
            self._remember(final_metrics=rows[-1] if rows else None)
            return

    # Evaluation ----------------------------------------------------------------------------

    def evaluate_model_comprehensive(
        self,
        model_id: str,
        test_data: Sequence[Example],
        valid_data: Sequence[Example],
        max_test_cases: int | None = 10,
        *,
        seed: int = 42,
        temperature: float = 0.0,
        max_tokens: int = 512,
    ) -> dict[str, Any]:
        """Ask the model :func:`choose_cases` of each split; return answers beside references.

        ``max_test_cases`` is per split; 0 or ``None`` asks all. A case that fails carries its
        ``error``; errors that would meet every case (key, model, quota) are raised.
        """
        generation = {"temperature": temperature, "seed": seed, "max_tokens": max_tokens}
        results: dict[str, Any] = {
            "model_id": model_id,
            "evaluation_timestamp": self._now(),
        }
        with SystemMonitor(self._existing_folder()):
            for name, data in (("test", test_data), ("valid", valid_data)):
                cases = choose_cases(data, max_cases=max_test_cases, seed=seed)
                responses = self._ask_all(model_id, cases, name, generation)
                answered = sum("error" not in response for response in responses)
                results[f"{name}_evaluation"] = {
                    "dataset_type": name,
                    "total_test_cases": len(data),
                    "evaluated_cases": answered,
                    "failed_cases": len(cases) - answered,
                    "responses": responses,
                }
        counts = [results[f"{name}_evaluation"]["evaluated_cases"] for name in ("test", "valid")]
        results["summary"] = {
            "test_cases_evaluated": counts[0],
            "valid_cases_evaluated": counts[1],
            "total_cases_evaluated": sum(counts),
        }
        results["settings"] = {**generation, "max_test_cases": max_test_cases}
        if self.rehearse or ":rehearsal:" in model_id:
            results["rehearsal"] = True
            results["note"] = "リハーサルの小さな文字モデルの応答です。GPTの性能とは無関係です。"
        return results

    def _ask_all(
        self, model_id: str, cases: Sequence[Case], name: str, generation: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        from tqdm.auto import tqdm

        label = {"test": "テスト", "valid": "検証"}[name]
        logger.info("%sデータの%d件を評価しています: %s", label, len(cases), model_id)
        hidden = None if self.verbose else True
        return [
            self._ask(model_id, case, generation)
            for case in tqdm(cases, desc=f"評価 {label}", unit="件", disable=hidden)
        ]

    def _ask(self, model_id: str, case: Case, generation: Mapping[str, Any]) -> dict[str, Any]:
        import openai

        response: dict[str, Any] = {"case_id": case.id, "input": case.input}
        request: dict[str, Any] = {**generation, "model": model_id, "messages": case.input}
        if case.tools:
            request["tools"] = case.tools
        started = time.perf_counter()
        try:
            answer = self._call(lambda: self.client.chat.completions.create(**request))
            choice = answer.choices[0]
            if not choice.message.content:
                raise BrokenAnswer(f"応答が空です（finish_reason: {choice.finish_reason}）")
            response["output"] = choice.message.content
            response["usage"] = answer.usage.model_dump(exclude_none=True) if answer.usage else None
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError):
            raise
        except (openai.APIError, BrokenAnswer) as error:
            if getattr(error, "code", None) == "insufficient_quota":
                raise
            reason = error if isinstance(error, BrokenAnswer) else explain_api_error(error)
            response["error"] = str(reason)
            logger.warning("評価 %s に失敗しました: %s", case.id, reason)
        response["reference"] = case.reference
        response["latency_seconds"] = round(time.perf_counter() - started, 3)
        return response

    def save_results(self, results: Mapping[str, Any]) -> str:
        """Write ``comprehensive_evaluation_STAMP.json``; return its path."""
        path = self._publish("comprehensive_evaluation", ".json", to_json(results))
        self._remember(evaluation=results.get("summary"), finished_at=self._now())
        return path

    # Shared --------------------------------------------------------------------------------

    def describe_remote_state(self) -> str:
        """What goes on at the service after an interruption, and how to come back to it."""
        facts = self._run.data if self._run else {}
        job_id, model = facts.get("job_id"), facts.get("fine_tuned_model")
        if self.rehearse or not job_id:
            return "サービス側で続いている処理はありません。"
        if model:
            return (
                f"学習済みモデル {model} は残っています。評価: --evaluate-only --model-id {model}"
            )
        if facts.get("job_status") in TERMINAL_STATUSES:
            return f"ジョブ {job_id} は終わっています（{facts['job_status']}）。"
        return (
            f"ジョブ {job_id} はサービス側で続いていて、料金もかかります。見守りに戻るには: "
            f'python -c "from openai_sft import OpenAISFT; '
            f"OpenAISFT().monitor_fine_tune_job('{job_id}')\""
        )

    def _remember(self, **facts: Any) -> None:
        (self._run or self._start_run()).update(**facts)

    def _publish(self, kind: str, suffix: str, text: str) -> str:
        """Write one more file of the run, in a new run where this one has it already."""
        run = self._run or self._start_run()
        path = self.output_dir / f"{kind}_{run.stamp}{suffix}"
        if path.exists():
            run = self._start_run()
            path = self.output_dir / f"{kind}_{run.stamp}{suffix}"
        write_new_file(path, text)
        run.update(files={**run.data.get("files", {}), kind: str(path)})
        logger.info("保存しました: %s", path)
        return str(path)

    def _existing_folder(self) -> Path:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        return self.output_dir

    def _optional(self, part: str, request: Callable[[], T]) -> T | None:
        """``request()``, or ``None`` where the endpoint lacks this part of the API."""
        import openai

        if part in self._lacking:
            return None
        try:
            return self._call(request)
        except openai.APIStatusError as error:
            if error.status_code not in MISSING_STATUSES:
                raise
            self._lacking.add(part)
            logger.info(
                "このエンドポイントは%sに対応していません（HTTP %d）。省いて続けます。",
                part,
                error.status_code,
            )
            return None

    def _call(self, request: Callable[[], T], *, again: bool = True) -> T:
        """``request()``; transient failures are repeated for ten minutes where ``again``.

        Raises the SDK's error, or :class:`BrokenAnswer` for an answer that isn't the API's JSON.
        """
        import openai

        started = self._clock()
        for attempt in itertools.count():
            failure: Exception
            retry_after: float | None = None
            try:
                answer = request()
                if isinstance(answer, str):  # what the SDK makes of a page that isn't JSON
                    raise BrokenAnswer("エンドポイントの応答がJSONではありません。")
                return answer
            except openai.APIStatusError as error:
                if not _is_transient(error):
                    raise
                failure, retry_after = error, _retry_after(error.response.headers)
            except (openai.APIConnectionError, BrokenAnswer) as error:
                failure = error
            except (json.JSONDecodeError, openai.APIResponseValidationError) as error:
                failure = BrokenAnswer("エンドポイントの応答が途中で切れたか、壊れています。")
                failure.__cause__ = error
            delay = retry_delay(attempt, retry_after, random.random())
            if not again or self._clock() + delay - started > RETRY_SECONDS:
                raise failure
            logger.debug("%.1f秒後にやり直します: %s", delay, printable(failure))
            self._sleep(delay)
        raise AssertionError("unreachable")


def _is_transient(error: Any) -> bool:
    status = error.status_code
    return (status in RETRIED_STATUSES or status >= 500) and (
        error.code != "insufficient_quota" and status not in MISSING_STATUSES
    )


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds of a ``Retry-After`` header; its date form is left to the back-off."""
    try:
        return float(headers.get("retry-after", ""))
    except ValueError:
        return None


def _read_dotenv() -> Mapping[str, str | None]:
    """The nearest ``.env`` from the working directory upwards, read but never written."""
    from dotenv import dotenv_values, find_dotenv

    return dotenv_values(find_dotenv(usecwd=True))
