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
``evaluation_*.jsonl`` (the answers as they came), ``comprehensive_evaluation_*.json``.

Errors::

    OpenAISFTError
    ├── ConfigurationError   also a ValueError: a setting, the key, an option
    ├── DataError            also a ValueError: the data, with where it stands
    │   └── UnknownRole      a speaker who is neither the assistant nor the user
    ├── BudgetError          the estimate passes max_cost_usd, or can't be known
    ├── Declined             confirm() said no
    ├── JobFailed            the job ended without a model
    ├── WaitTimeout          timeout= ran out; the job goes on
    ├── TrainingNotAvailable the organisation can't fine-tune there any more
    ├── EvaluationFailed     not one answer was had
    └── BrokenAnswer         the endpoint answered something that isn't the API's

The SDK's own errors (``openai.OpenAIError``) pass through unchanged.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import collections
import contextlib
import csv
import functools
import gc
import hashlib
import html
import io
import itertools
import json
import logging
import math
import os
import platform
import queue
import random
import re
import shlex
import shutil
import sys
import threading
import time
import unicodedata
import urllib.parse
import uuid
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import date, datetime
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    NamedTuple,
    NotRequired,
    TypedDict,
    TypeVar,
    Unpack,
    cast,
)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # told by `fcntl is None`

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from datasets import Dataset
    from openai import OpenAI
    from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent

    from openai_sft_rehearsal import Rehearsal

__version__ = "0.2.0"
__all__ = [
    "GROUPS",
    "PRICES",
    "BrokenAnswer",
    "BudgetError",
    "Case",
    "CheckItem",
    "ConfigurationError",
    "CostEstimate",
    "DataError",
    "DataSummary",
    "Declined",
    "Dialogue",
    "EvaluationFailed",
    "Example",
    "Finding",
    "JobFailed",
    "OpenAISFT",
    "OpenAISFTError",
    "Price",
    "RunRecord",
    "RunRow",
    "Selection",
    "SelectionOptions",
    "Splits",
    "SystemMonitor",
    "TokenCounter",
    "TokenStats",
    "Tokens",
    "TrainingNotAvailable",
    "UnknownRole",
    "WaitTimeout",
    "check_file",
    "check_hyperparameters",
    "choose_cases",
    "dialogue_row",
    "estimate_cost",
    "example_line",
    "explain_api_error",
    "find_run",
    "fix_file",
    "is_transient",
    "load_vocabulary",
    "measure_leakage",
    "parse_dialogue",
    "parse_result_file",
    "percentile",
    "price_of",
    "printable",
    "read_dialogues",
    "read_examples",
    "retry_delay",
    "select_dialogues",
    "split_dialogues",
    "split_long_example",
    "to_example",
    "token_stats",
]

logger = logging.getLogger("openai_sft")
T = TypeVar("T")

# ── Constants ────────────────────────────────────────────────────────────────────────────────

DEFAULT_MODEL = "gpt-4o-mini-2024-07-18"
DEFAULT_DATASET = "UEC-InabaLab/KokoroChat"
OPENAI_HOST = "api.openai.com"
OPENAI_BASE_URL = f"https://{OPENAI_HOST}/v1"
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

CHAT_ROLES = frozenset({"system", "user", "assistant", "tool"})
GROUPS = ("counselor", "client", "pair")
Group = Literal["counselor", "client", "pair"]
TaskName = Literal["response", "score"]
EvalTurns = int | Literal["last", "all"]
LongExamples = Literal["split", "drop", "refuse"]
FLAGS = ("unwilling_to_continue", "harmful_due_to_ignorance", "other_potentially_unethical")
# The client's feedback of KokoroChat: 20 items of 0–5, whose sum is the score.
SCORE_ITEMS = {
    "聴いてもらえた、わかってもらえたと感じた": "felt_heard_and_understood",
    "尊重されたと感じた": "felt_respected",
    "新しい気づきや体験があった": "gained_new_insights",
    "希望や期待を感じられた": "felt_hopeful_or_expectant",
    "取り組みたかったことを扱えた": "concerns_were_addressed",
    "一緒に考えながら取り組めた": "thought_through_concerns_together",
    "やりとりのリズムがあっていた": "conversation_had_good_rhythm",
    "居心地のよいやりとりだった": "conversation_felt_comfortable",
    "全体として適切でよかった": "felt_appropriate_and_satisfying",
    "今回の相談は価値があった": "conversation_was_valuable",
    "相談開始の円滑さ": "conversation_started_smoothly",
    "相談終了のタイミング（不必要に聴きすぎていないか）、円滑さ": "conversation_ended_well",
    "受容・共感": "showed_acceptance_and_empathy",
    "肯定・承認": "provided_acknowledgment_and_affirmation",
    "的確な質問による会話の促進": "asked_effective_questions",
    "要約": "summarized_key_points_effectively",
    "問題の明確化": "clarified_issues_cleraly",  # spelt so in the data
    "この相談での目標の明確化": "helped_identify_goals",
    "次の行動につながる提案": "offered_actionable_suggestions",
    "勇気づけ・希望の喚起": "encouraged_and_instilled_hope",
}
MAX_ITEM_SCORE = 5

MAX_UNREADABLE_SHARE = 0.01

KOKOROCHAT_LICENCE = (
    "KokoroChatを使います。ライセンス: CC BY-NC-ND 4.0。出典: Qi et al. (ACL 2025), "
    '"KokoroChat: A Japanese Psychological Counseling Dialogue Dataset Collected via '
    'Role-Playing by Trained Counselors"'
)

# Limits of the service: https://platform.openai.com/docs/guides/supervised-fine-tuning and the
# API description of POST /fine_tuning/jobs.
MIN_TRAINING_EXAMPLES = 10
MAX_EPOCHS = 50
MAX_BATCH_SIZE = 256
MAX_SUFFIX_LENGTH = 64
MAX_SEED = 2_147_483_647
MAX_FILE_BYTES = 8 * 1024**3
MAX_SINGLE_UPLOAD_BYTES = 512 * 1024**2  # larger files go up in parts
UPLOAD_PART_BYTES = 64 * 1024**2
MAX_EXAMPLE_TOKENS = 65_536  # of gpt-4o-mini; the service cuts a longer example at its end
LINE_KEYS = frozenset({"messages", "tools", "parallel_tool_calls"})
MESSAGE_KEYS = frozenset(
    {"role", "content", "name", "weight", "tool_calls", "tool_call_id"}
    | {"refusal", "audio", "function_call"}
)
SPECIAL_TOKEN = re.compile(
    r"<\|(?:im_start|im_end|im_sep|endoftext|endofprompt|fim_prefix|fim_middle|fim_suffix)\|>"
)

TERMINAL_STATUSES = frozenset({"succeeded", "failed", "cancelled"})
KNOWN_STATUSES = TERMINAL_STATUSES | frozenset(
    {"validating_files", "queued", "running", "pausing", "paused", "pending"}
)

# o200k_base spends 0.228 tokens a UTF-8 byte on KokoroChat (10,601,921 tokens over the merged
# messages of 5,989 dialogues; 0.2279 to 0.2284 on samples of 600), and 0.2 to 0.25 on English.
TOKENS_PER_BYTE = 0.228
VOCABULARY = "o200k_base"

# https://platform.openai.com/docs/deprecations, read 2026-11-22.
CLOSED_TO_NEW_SINCE = "2026-05-07"  # organisations that never fine-tuned
CLOSED_TO_IDLE_SINCE = "2026-07-02"  # without inference on a tuned model in the last 60 days
LAST_NEW_JOB_DATE = "2027-01-06"
MODEL_SHUTDOWN_DATE = "2027-01-14"

RETRIED_STATUSES = frozenset({408, 409, 429})  # and every 5xx
RETRY_SECONDS = 600.0
LOOK_DELAYS = (0.0, 3.0, 3.0)  # a list may lag behind what was just created
MODEL_LOADING_SECONDS = 600.0  # a model may answer 404 for a while after its job succeeded
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


class UnknownRole(DataError):
    """A speaker who is neither the assistant nor the user; never guessed, never left out."""


class BudgetError(OpenAISFTError):
    """The estimated cost passes ``max_cost_usd``, or can't be known while a limit is set."""

    exit_code = 2


class Declined(OpenAISFTError):
    """``confirm`` answered no; nothing was sent."""

    exit_code = 2


class JobFailed(OpenAISFTError):
    """A fine-tuning job ended as ``failed`` or ``cancelled``."""

    def __init__(self, job_id: str, status: str, code: str | None, message: str | None) -> None:
        self.job_id, self.status, self.code, self.message = (job_id, status, code, message)
        reason = ": ".join(printable(part) for part in (code, message) if part)
        job_id, status = printable(job_id), printable(status)
        reason = f"、{reason}" if reason else ""
        super().__init__(f"ファインチューニング失敗: {status}（ジョブ {job_id}{reason}）")


class WaitTimeout(OpenAISFTError):
    """``timeout`` ran out while the job went on; the job itself is left alone."""

    def __init__(self, job_id: str, status: str, seconds: float) -> None:
        self.job_id, self.status = job_id, status
        super().__init__(
            f"{seconds:g}秒待ちましたが、ジョブ {printable(job_id)} は終わっていません"
            f"（{printable(status)}）。ジョブはサービス側で続いています。"
        )


class TrainingNotAvailable(OpenAISFTError):
    """The endpoint takes no fine-tuning job from this organisation any more (HTTP 403)."""

    def __init__(self, endpoint: str, deleted: Sequence[str]) -> None:
        self.deleted = list(deleted)
        gone = (
            f"アップロードしたファイル（{'、'.join(deleted)}）は削除しました。" if deleted else ""
        )
        super().__init__(
            f"training_not_available: この組織は {endpoint} で新しいファインチューニングが"
            f"できません。OpenAIは{LAST_NEW_JOB_DATE}にすべての組織の新規ジョブを終え、"
            f"{MODEL_SHUTDOWN_DATE}にGPT-4o miniとその学習済みモデルを停止します。{gone}"
            "まだできること: --base-url で別のエンドポイントを使う、作成済みのモデルを "
            "--evaluate-only で評価する、同じJSONLで手元のモデルを学習する。"
        )


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
    parallel_tool_calls: NotRequired[bool]


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A dialogue as read: stripped, non-empty utterances in order, or a ready ``chat``.

    ``source`` says where it stands, for messages to the user. ``digest`` is the sha256 of the
    content: the split is drawn in its order, so that neither file names nor their order matter.
    ``chat`` holds ``messages`` (and ``tools``) of data that is in the service's form already.
    """

    id: str
    source: str
    turns: tuple[tuple[Role, str], ...]
    digest: str
    topic: Mapping[str, Any] = field(default_factory=dict)
    review_jp: Mapping[str, Any] = field(default_factory=dict)
    review_en: Mapping[str, Any] = field(default_factory=dict)
    chat: Mapping[str, Any] | None = None

    @property
    def score(self) -> float | None:
        """The client's total score, 0–100, where there is a review."""
        score = self.review_en.get("score", self.review_jp.get("点数"))
        return score if isinstance(score, int | float) else None

    def group(self, by: Group) -> Hashable | None:
        """Who took part, ``None`` where the review doesn't tell."""
        people = []
        for english, japanese in (
            ("counselor_id", "カウンセラー役ID"),
            ("client_id", "クライアント役ID"),
        ):
            person = self.review_en.get(english, self.review_jp.get(japanese))
            people.append(person if isinstance(person, int | str) else None)
        counselor, client = people
        if by == "pair":
            return None if counselor is None or client is None else (client, counselor)
        return counselor if by == "counselor" else client


class SelectionOptions(TypedDict, total=False):
    """The filters of :class:`Selection` as keywords of the methods that load data."""

    min_score: float | None
    max_score: float | None
    topics: Sequence[str] | None
    exclude_flagged: bool
    group_by: Group | None


class RunOptions(SelectionOptions, total=False):
    """Besides the filters, how the evaluation asks; see
    :meth:`OpenAISFT.evaluate_model_comprehensive`."""

    eval_turns: EvalTurns
    baseline: str | bool | None
    concurrency: int
    temperature: float
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Selection:
    """Which dialogues are used and how they are split.

    ``min_score`` and ``max_score`` are inclusive bounds of the client's score (KokoroChat's
    paper calls < 70 Low and 70–98 High); ``topics`` are main topics, Japanese or English;
    ``exclude_flagged`` leaves out dialogues that the client walked away from or called harmful
    or unethical. ``group_by`` keeps a counsellor's, a client's or a pair's dialogues in one
    split. Raises :class:`ConfigurationError` for values out of range.
    """

    max_samples: int | None = None
    seed: int = 42
    min_score: float | None = None
    max_score: float | None = None
    topics: Sequence[str] | None = None
    exclude_flagged: bool = False
    group_by: Group | None = None

    def __post_init__(self) -> None:
        if self.max_samples is not None and self.max_samples < 1:
            raise ConfigurationError(
                f"max_samples は1以上でなければなりません（指定: {self.max_samples}）。"
            )
        if self.group_by is not None and self.group_by not in GROUPS:
            raise ConfigurationError(
                f"group_by は {'、'.join(GROUPS)} のどれかです（指定: {self.group_by}）。"
            )
        if isinstance(self.topics, str):
            raise ConfigurationError("topics は話題のリストで指定してください。")


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem of a training file. ``line`` is 1-based and physical, ``None``: the file.

    ``error``: the service would refuse or cut it; ``warning``: it would train, but you would
    regret it. ``code`` is stable.
    """

    path: str
    line: int | None
    message_index: int | None
    code: str
    severity: Literal["error", "warning"]
    text: str
    remedy: str

    def __str__(self) -> str:
        place = self.path if self.line is None else f"{self.path}:{self.line}"
        if self.message_index is not None:
            place += f"（messages[{self.message_index}]）"
        label = "エラー" if self.severity == "error" else "注意"
        return f"{place}: {label} [{self.code}] {self.text} → {self.remedy}"


class Tokens(NamedTuple):
    """Tokens of one conversation as one example, and as one example an assistant's turn."""

    total: int
    per_turn_format: int


@dataclass(frozen=True, slots=True)
class TokenStats:
    """Tokens of a file: their sum, and how they are spread over its conversations."""

    total: int
    p5: int
    p50: int
    p95: int
    max: int
    per_turn_format: int


class _Loaded(NamedTuple):
    selection: Selection
    removed: dict[str, int]
    leakage: dict[str, float]
    sources: dict[str, str]


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

    def __post_init__(self) -> None:
        for rate in (getattr(self, name) for name in self.__slots__):
            if rate is not None and not (math.isfinite(rate) and rate >= 0):
                raise ConfigurationError(f"単価は0以上の数です（指定: {rate}）。")

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
    baseline: str | None
    price: Price | None
    price_source: str

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
            f"{self.evaluation_output_tokens:,}トークン{mark}"
            f"{f' × 2（比較: {self.baseline}）' if self.baseline else ''}"
            f" = {money(self.evaluation_usd)}",
            f"合計: {money(self.total_usd)}",
        ]
        if self.total_usd is None:
            lines.append(
                "エポック数 auto はサービスが決めるため、料金は事前に分かりません。"
                if self.epochs == "auto" and self.price
                else f"{self.model} の単価は不明です。--price-training などで指定できます。"
            )
        lines.append(
            f"単価: {self.price_source}、1ドル={self.yen_per_dollar:g}円と仮定。"
            "検証データは無料です。"
        )
        return lines


@dataclass(frozen=True, slots=True)
class DataSummary:
    """What the data stages made: the examples and tokens of each split, the files, the price."""

    examples: Mapping[str, int]
    tokens: Mapping[str, TokenStats]
    files: Mapping[str, str]
    estimate: CostEstimate
    removed: Mapping[str, int]
    leakage: Mapping[str, float]

    def lines(self) -> list[str]:
        """The summary as lines of Japanese text."""
        train, test, valid = (self.examples[name] for name in SPLIT_NAMES)
        tokens = self.tokens["train"]
        lines = [f"件数: 学習 {train:,}件、テスト {test:,}件、検証 {valid:,}件"]
        if self.removed:
            lines.append(removed_line(self.removed))
        if self.leakage:
            lines.append(leakage_line(self.leakage))
        lines += [
            f"学習データの1件あたりのトークン: 5% {tokens.p5:,} | 中央 {tokens.p50:,} | "
            f"95% {tokens.p95:,} | 最大 {tokens.max:,}",
            *self.estimate.lines(),
        ]
        one_turn = tokens.per_turn_format == tokens.total
        if self.estimate.training_usd is not None and tokens.total and not one_turn:
            factor = tokens.per_turn_format / tokens.total
            dollars = self.estimate.training_usd * factor
            lines.append(
                f"参考: 発話ごとに1件とする形式なら {tokens.per_turn_format:,}トークン"
                f"（{factor:.1f}倍）、学習 ${dollars:,.2f}"
            )
        return lines


@dataclass(frozen=True, slots=True)
class Case:
    """One question to a model: the context up to a counsellor's turn, and the real answer."""

    id: str
    dialogue_id: str
    input: list[Message]
    reference: str
    tools: list[Any] | None = None


@dataclass(frozen=True, slots=True)
class RunRow:
    """A run here and its job there; ``orphan`` says where one of the two is missing."""

    run_id: str | None
    job_id: str | None
    status: str
    model: str | None
    started_at: str | None
    orphan: Literal["no record", "no job"] | None = None


@dataclass(frozen=True, slots=True)
class CheckItem:
    """One line of :meth:`OpenAISFT.check`; ``fail`` means that a run can't work today."""

    name: str
    level: Literal["ok", "warn", "fail"]
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        mark = {"ok": "✓", "warn": "⚠", "fail": "✗"}[self.level]
        return f"{mark} {self.name}: {self.text}" + (f" → {self.remedy}" if self.remedy else "")


class Sample(NamedTuple):
    """One reading of the machine. Percentages are 0–100, memory in bytes."""

    cpu_percent: float
    memory_percent: float
    memory_used: int
    memory_total: int
    disk_percent: float


# ── Reading ──────────────────────────────────────────────────────────────────────────────────


def read_dialogues(
    source: str, *, revision: str | None = None, each: Callable[[Dialogue], None] | None = None
) -> list[Dialogue]:
    """Read every dialogue of ``source``: a folder, a JSON/JSONL/Parquet file, or a Hub name.

    A folder is read as the released KokoroChat is: every ``.json``, ``.jsonl`` and ``.parquet``
    file in it. A name that is no path is fetched from the Hub at ``revision``, all its splits.
    ``each`` is given every dialogue as it is read, before ids that are shared are told apart.

    A file, line or row that can't be read or isn't a dialogue is named in the log and left out.
    Raises :class:`DataError` where these are more than 1 %, or where there is no dialogue, and
    :class:`UnknownRole` always.
    """
    dialogues: list[Dialogue] = []
    unreadable: list[DataError] = []
    with _gc_paused():
        for fallback_id, where, record in _records(source, revision):
            try:
                if isinstance(record, DataError):
                    raise record
                dialogue = parse_dialogue(record, fallback_id=fallback_id, source=where)
            except UnknownRole:
                raise
            except DataError as error:
                unreadable.append(error)
            else:
                dialogues.append(dialogue)
                if each is not None:
                    each(dialogue)
    total = len(dialogues) + len(unreadable)
    for problem in unreadable[:10]:
        logger.warning("除外: %s", problem)
    if len(unreadable) > MAX_UNREADABLE_SHARE * total:
        raise DataError(
            f"{source}: {total:,}件のうち{len(unreadable):,}件が対話として読めません（1%を超えた"
            f"ため中止）。最初の理由: {unreadable[0]}"
        )
    if unreadable:
        logger.warning("対話として読めない%s件を除きました。", f"{len(unreadable):,}")
    if not dialogues:
        raise DataError(f"対話が1件もありません: {source}。中身と指定を確認してください。")
    return _with_unique_ids(dialogues)


@contextlib.contextmanager
def _gc_paused() -> Iterator[None]:
    """Millions of small objects that all stay are made here: collecting would only cost time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _with_unique_ids(dialogues: list[Dialogue]) -> list[Dialogue]:
    """Where different dialogues share an id, add a part of the digest, whatever their order."""
    distinct = {(dialogue.id, dialogue.digest) for dialogue in dialogues}
    shared = {id_ for id_, n in collections.Counter(id_ for id_, _ in distinct).items() if n > 1}
    return [
        replace(dialogue, id=f"{dialogue.id}#{dialogue.digest[:8]}")
        if dialogue.id in shared
        else dialogue
        for dialogue in dialogues
    ]


# What a source yields: an id for a record without one, where it stands, and the record itself
# or the error that reading it gave.
SourceRecord = tuple[str, str, object]


def _records(source: str, revision: str | None) -> Iterator[SourceRecord]:
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder_records(path)
    if path.exists():
        return _file_records(path)
    if _looks_like_path(source):
        raise DataError(
            f"データがありません: {source}。フォルダー、JSON・JSONL・Parquetファイル、"
            f"またはHugging Face Hubの名前（例: {DEFAULT_DATASET}）を指定してください。"
        )
    return _hub_records(source, revision)


def _folder_records(folder: Path) -> Iterator[SourceRecord]:
    for path in sorted(folder.iterdir()):
        if _is_data_file(path.relative_to(folder)):
            yield from _file_records(path)


def _is_data_file(path: Path) -> bool:
    return (
        path.suffix in (".json", ".jsonl", ".parquet")
        and not any(part.startswith(".") for part in path.parts)
        and path.name != "dataset_infos.json"  # the Hub's own, about a data set
    )


def _looks_like_path(source: str) -> bool:
    """True unless ``source`` has the form of a Hub name (``name`` or ``owner/name``)."""
    return (
        source.startswith((".", "/", "~", os.sep))
        or source.count("/") > 1
        or Path(source).suffix in (".json", ".jsonl", ".parquet")
    )


def _file_records(path: Path) -> Iterator[SourceRecord]:
    if path.suffix == ".parquet":
        yield from _parquet_records(path)
        return
    try:
        content = path.read_bytes()
    except OSError as error:
        yield (path.stem, str(path), DataError(f"{path}: 読めません（{error.strerror}）。"))
        return
    content = content.removeprefix(codecs.BOM_UTF8)
    if path.suffix == ".jsonl":
        for number, line in enumerate(content.split(b"\n"), 1):
            if line.strip():
                yield (f"{path.stem}-{number}", f"{path}:{number}", _parse_json(line, path, number))
        return
    value = _parse_json(content, path, 1)
    if isinstance(value, list):
        for number, row in enumerate(value, 1):
            yield f"{path.stem}-{number}", f"{path}[{number}]", row
    else:
        yield path.stem, str(path), value


def _parse_json(content: bytes, path: Path, line: int) -> object:
    """The parsed value, or the :class:`DataError` that says what is wrong with it."""
    try:
        return json.loads(content.decode())
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        return DataError(f"{path}:{line}: UTF-8ではありません。")
    except (ValueError, RecursionError) as error:
        line += getattr(error, "lineno", 1) - 1
        return DataError(
            f"{path}:{line}: JSONとして読めません（{printable(error)}）。"
            "1行に1件のJSONなら拡張子を .jsonl にしてください。"
        )


def _parquet_records(path: Path) -> Iterator[SourceRecord]:
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
        for number, row in enumerate(itertools.chain.from_iterable(b.to_pylist() for b in batches)):
            yield f"{path.stem}-{number + 1}", f"{path}:{number + 1}", row
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: Parquetとして読めません（{printable(error)}）。") from error


def _hub_records(name: str, revision: str | None) -> Iterator[SourceRecord]:
    """Records of a Hub data set by the first of three ways that works.

    ``load_dataset`` fails on KokoroChat's JSON, whose review fields are null in most files and
    text in a few, and runs no loader script; the Hub's own Parquet conversion (of the main
    revision only) and the repository's JSON files don't have these troubles.
    """
    import datasets
    import huggingface_hub

    failures = []
    unreachable = False
    for attempt in [revision] if revision else [None, "refs/convert/parquet"]:
        label = f"load_dataset(revision={attempt})" if attempt else "load_dataset"
        # Without a cache of its own, an attempt that fails is given what another one has built.
        cache = Path(datasets.config.HF_DATASETS_CACHE, "openai_sft", *(attempt or "").split("/"))
        if unreachable and not cache.exists():
            continue  # each try takes half a minute to give up
        try:
            loaded = datasets.load_dataset(
                name, revision=attempt, cache_dir=str(cache) if attempt else None
            )
        except Exception as error:  # noqa: BLE001  # builders raise anything; all are told
            failures.append(f"{label}: {_reason(error)}")
            logger.info("%s では読めません。次の方法を試します。", failures[-1])
            unreachable = isinstance(error, ConnectionError)
            continue
        for split, rows in loaded.items():
            for number, row in enumerate(rows):
                yield f"{split}-{number}", f"{name}:{split}[{number}]", row
        return
    try:
        folder = huggingface_hub.snapshot_download(
            name, repo_type="dataset", revision=revision, allow_patterns=["*.json", "*.jsonl"]
        )
        root = Path(folder)
        files = sorted(p for p in root.rglob("*.json*") if _is_data_file(p.relative_to(root)))
        records = [
            (id_, where.replace(folder, f"{name}:", 1).replace(":/", ":", 1), record)
            for id_, where, record in itertools.chain.from_iterable(map(_file_records, files))
        ]
        if not any(
            isinstance(r, Mapping) and ("dialogue" in r or "messages" in r) for *_, r in records
        ):
            raise FileNotFoundError("対話のJSONファイルがありません")
    except (OSError, ValueError, RuntimeError) as error:
        failures.append(f"JSONファイル: {_reason(error)}")
        raise DataError(
            f"データセット {name} を読み込めません。試した方法と理由: {' / '.join(failures)}。"
            "ネットワークと名前を確かめるか、ダウンロードしたフォルダーを --dataset で"
            "指定してください。"
        ) from error
    yield from records


def _reason(error: Exception) -> str:
    """An error in one short line; where the text alone says nothing, its cause."""
    generic = type(error).__name__.startswith("DatasetGeneration")
    told = error.__cause__ if generic and error.__cause__ else error
    return f"{type(told).__name__}: {printable(told)[:300]}"


def parse_dialogue(record: object, *, fallback_id: str, source: str) -> Dialogue:
    """Make a :class:`Dialogue` of one raw record; :func:`dialogue_row` is its inverse.

    ``record`` holds its turns under ``dialogue`` (KokoroChat), each with ``role`` and
    ``utterance`` (or ``content``), or ``messages`` in the service's own form, which pass
    unchanged. The id is the record's ``id``, else KokoroChat's ``evaluation_id``, else
    ``fallback_id``. Raises :class:`DataError`, and :class:`UnknownRole` for a role that is not
    in :data:`ROLES` (or, of a message, in :data:`CHAT_ROLES`).
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{source}: 対話はJSONオブジェクトでなければなりません。")
    review_en = _mapping(record, "review_by_client_en", source)
    dialogue_id = record.get("id")
    if dialogue_id is None:
        dialogue_id = review_en.get("evaluation_id", fallback_id)
    dialogue_id = str(dialogue_id)
    turns: tuple[tuple[Role, str], ...] = ()
    chat: dict[str, Any] | None = None
    if record.get("dialogue") is None and record.get("messages") is not None:
        chat = _read_chat(record, dialogue_id, source)
    else:
        turns = tuple(_read_turns(record.get("dialogue"), dialogue_id, source))
    try:
        content = _encode_json(chat) if chat else "\0".join(itertools.chain.from_iterable(turns))
        digest = hashlib.sha256(content.encode()).hexdigest()
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{source}: 対話「{dialogue_id}」にUTF-8で表せない文字（対になっていないサロゲートや"
            "NaN）が含まれています。"
        ) from error
    return Dialogue(
        id=dialogue_id,
        source=source,
        turns=turns,
        digest=digest,
        topic=_mapping(record, "topic", source),
        review_jp=_mapping(record, "review_by_client_jp", source),
        review_en=review_en,
        chat=chat,
    )


def _mapping(record: Mapping[str, Any], key: str, source: str) -> Mapping[str, Any]:
    value = record.get(key)
    if value is None:
        return {}
    if isinstance(value, str) and key == "topic":
        return {"main_jp": value}
    if not isinstance(value, Mapping):
        raise DataError(f"{source}: {key} はオブジェクトでなければなりません。")
    # The Hub's conversion makes datetimes of what the files hold as text.
    return {k: v.isoformat() if isinstance(v, datetime) else v for k, v in value.items()}


def _read_turns(turns: object, dialogue_id: str, source: str) -> Iterator[tuple[Role, str]]:
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise DataError(f"{source}: 対話の本文（dialogue か messages の配列）がありません。")
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
            raise UnknownRole(
                f"{source}: 対話「{dialogue_id}」の{number}番目の発話の話者"
                f"「{printable(turn['role'])}」が分かりません。使える話者: {'、'.join(ROLES)}"
            )
        if text:
            yield role, text


def _read_chat(record: Mapping[str, Any], dialogue_id: str, source: str) -> dict[str, Any]:
    messages = record["messages"]
    if not isinstance(messages, list):
        raise DataError(f"{source}: messages は配列でなければなりません。")
    # A Dataset gives every struct all keys of its column; what it can't hold is JSON text there.
    try:
        messages = [json.loads(m) if isinstance(m, str) else _without_none(m) for m in messages]
        tools = [json.loads(t) if isinstance(t, str) else t for t in record.get("tools") or ()]
    except (TypeError, ValueError) as error:
        raise DataError(f"{source}: messages か tools がJSONとして読めません。") from error
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise DataError(
                f"{source}: 対話「{dialogue_id}」の{number}番目が発話の形ではありません。"
            )
        role = message.get("role")
        if not isinstance(role, str) or role not in CHAT_ROLES:
            raise UnknownRole(
                f"{source}: 対話「{dialogue_id}」の{number}番目の role「{printable(role)}」が"
                f"分かりません。使える role: {'、'.join(sorted(CHAT_ROLES))}"
            )
    chat: dict[str, Any] = {"messages": messages}
    if tools:
        chat["tools"] = tools
    if record.get("parallel_tool_calls") is not None:
        chat["parallel_tool_calls"] = record["parallel_tool_calls"]
    return chat


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _role_of(role: str) -> Role | None:
    return ROLES.get(unicodedata.normalize("NFKC", role).strip().casefold())


def dialogue_row(dialogue: Dialogue) -> dict[str, Any]:
    """The row of a ``Dataset`` for ``dialogue``; :func:`parse_dialogue` reads it back."""
    if dialogue.chat is not None:
        tools = [_encode_json(tool) for tool in dialogue.chat.get("tools", ())]
        messages = dialogue.chat["messages"]
        if not all(set(m) <= {"role", "content", "name", "weight"} for m in messages) or not all(
            isinstance(m.get("content"), str) for m in messages
        ):
            messages = [_encode_json(message) for message in messages]
        return {"id": dialogue.id, **dialogue.chat, "messages": messages, "tools": tools}
    return {
        "id": dialogue.id,
        "dialogue": [{"role": role, "utterance": text} for role, text in dialogue.turns],
        "topic": dict(dialogue.topic),
        "review_by_client_jp": dict(dialogue.review_jp),
        "review_by_client_en": dict(dialogue.review_en),
    }


# ── Choosing and splitting ───────────────────────────────────────────────────────────────────


def select_dialogues(
    dialogues: Iterable[Dialogue], selection: Selection
) -> tuple[list[Dialogue], dict[str, int]]:
    """Leave out exact duplicates, then what the filters exclude; count what each took out.

    A dialogue without a score falls to ``min_score`` and ``max_score``. Raises
    :class:`DataError` for a topic that no dialogue has.
    """
    ordered = sorted(dialogues, key=lambda dialogue: (dialogue.digest, dialogue.id))
    kept = [next(same) for _, same in itertools.groupby(ordered, key=lambda d: d.digest)]
    removed = {"duplicates": len(ordered) - len(kept)}
    low, high = selection.min_score, selection.max_score
    if selection.topics:
        known = {
            str(d.topic[key]) for d in kept for key in ("main_jp", "main_en") if key in d.topic
        }
        if unknown := [topic for topic in selection.topics if topic not in known]:
            raise DataError(
                f"話題「{'、'.join(unknown)}」の対話はありません。ある話題: "
                f"{'、'.join(sorted(known))}"
            )
    filters: dict[str, Callable[[Dialogue], bool]] = {}
    if low is not None:
        filters["min_score"] = lambda d: d.score is not None and d.score >= low
    if high is not None:
        filters["max_score"] = lambda d: d.score is not None and d.score <= high
    if topics := selection.topics:
        filters["topics"] = lambda d: (
            d.topic.get("main_jp") in topics or d.topic.get("main_en") in topics
        )
    if selection.exclude_flagged:
        filters["exclude_flagged"] = lambda d: not any(d.review_en.get(flag) for flag in FLAGS)
    for name, keep in filters.items():
        before = len(kept)
        kept = [dialogue for dialogue in kept if keep(dialogue)]
        removed[name] = before - len(kept)
    return kept, {name: count for name, count in removed.items() if count or name in filters}


def removed_line(removed: Mapping[str, int]) -> str:
    """What the duplicates and each filter took out, in Japanese."""
    labels = {"duplicates": "重複"}
    parts = (f"{labels.get(name, name)} {count:,}件" for name, count in removed.items())
    return f"除いた対話: {'、'.join(parts)}"


def split_dialogues(
    dialogues: Iterable[Dialogue],
    *,
    seed: int = 42,
    max_samples: int | None = None,
    group_by: Group | None = None,
) -> Splits:
    """Shuffle by ``seed`` and split 8:1:1: ``test = valid = round(n / 10)``, the rest trains.

    ``max_samples`` takes a seeded sample first; a smaller sample is part of a larger one. The
    same dialogues give the same split on every machine, in whatever order they come. With
    ``group_by`` no counsellor, client or pair stands in two splits: groups are drawn by
    ``seed``, and test and validation come as near to their sizes as whole groups allow; raises
    :class:`DataError` below three groups, and :class:`ConfigurationError` for a value out of
    range.
    """
    Selection(max_samples, seed, group_by=group_by)  # checks the values
    shuffled = sorted(dialogues, key=lambda dialogue: (dialogue.digest, dialogue.id))
    random.Random(seed).shuffle(shuffled)
    chosen = shuffled[:max_samples]
    held_out = round(len(chosen) / 10)
    if group_by is None:
        return Splits(
            train=chosen[2 * held_out :],
            test=chosen[:held_out],
            valid=chosen[held_out : 2 * held_out],
        )
    groups: dict[Hashable, list[Dialogue]] = {}
    for dialogue in chosen:
        group = dialogue.group(group_by)
        key = ("no group", dialogue.id) if group is None else group
        groups.setdefault(key, []).append(dialogue)
    if len(groups) < 3:
        raise DataError(
            f"group_by={group_by} では{len(groups)}組しかなく、3つに分けられません。"
            "対話を増やすか、group_by を外してください。"
        )
    # They stand in the order in which the shuffled dialogues name them, where a large group comes
    # early: they are shuffled themselves, so that each is as likely to be held out.
    rest = list(groups.values())
    random.Random(seed).shuffle(rest)
    parts = []
    for left in (2, 1):
        taken = _nearest_subset([len(group) for group in rest], max(1, held_out), left)
        parts.append([d for index, group in enumerate(rest) if index in taken for d in group])
        rest = [group for index, group in enumerate(rest) if index not in taken]
    return Splits([d for group in rest for d in group], *parts)


def _nearest_subset(sizes: Sequence[int], target: int, left: int) -> set[int]:
    """Indexes of a non-empty subset with a sum as near ``target`` as can be had while ``left``
    sizes remain; the first sizes go first.

    Subset sum by dynamic programming; the sums that are reachable with the first ``k`` sizes
    are the bits of ``reachable[k]``. A size is taken where the sum can't be had without it.
    """
    reachable = [1]
    for size in sizes:
        reachable.append(reachable[-1] | reachable[-1] << size)
    sums = [total for total in range(1, sum(sizes)) if reachable[-1] >> total & 1]
    for total in sorted(sums, key=lambda total: (abs(total - target), total)):
        taken = set()
        for index in reversed(range(len(sizes))):
            if not reachable[index] >> total & 1:
                taken.add(index)
                total -= sizes[index]
        if len(taken) <= len(sizes) - left:
            return taken
    raise AssertionError("the smallest size alone is always a subset")


def measure_leakage(splits: Splits) -> dict[str, float]:
    """Share (0–1) of test dialogues whose counsellor, client, pair was seen in training.

    A share is left out where no test dialogue tells who took part.
    """
    shares = {}
    for by in GROUPS:
        seen = {dialogue.group(by) for dialogue in splits.train}
        tested = [group for dialogue in splits.test if (group := dialogue.group(by)) is not None]
        if tested:
            shares[by] = sum(group in seen for group in tested) / len(tested)
    return shares


def leakage_line(leakage: Mapping[str, float]) -> str:
    """:func:`measure_leakage` in Japanese."""
    labels = {"counselor": "カウンセラー", "client": "クライアント", "pair": "同じ組"}
    shares = "、".join(f"{labels[name]} {share:.1%}" for name, share in leakage.items())
    return (
        f"テスト対話のうち、相手が学習データにも現れるものの割合: {shares}"
        "（--group-by で分けられます）"
    )


# ── Converting ───────────────────────────────────────────────────────────────────────────────


def to_example(dialogue: Dialogue, *, system_prompt: str | None = None) -> Example | None:
    """Turn a dialogue into one training example, or ``None`` where the assistant says nothing.

    A ready ``chat`` passes as it is, but for ``system_prompt`` where it has no system message.

    Consecutive turns of one speaker become one message, joined by a newline; what the client
    says after the counsellor's last turn is cut, for an example has to end with the assistant.
    """
    messages: list[Message] = []
    if dialogue.chat is not None:
        chat = cast("Example", {"id": dialogue.id, **dialogue.chat})
        if system_prompt and chat["messages"][:1] and chat["messages"][0]["role"] != "system":
            chat["messages"] = [{"role": "system", "content": system_prompt}, *chat["messages"]]
        return chat
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


SCORE_PROMPT = (
    "次の心理相談の対話を読み、相談者（クライアント）がこの相談を終えて付けた評価を予測して"
    f"ください。次の20項目を、それぞれ0（まったくそう思わない）〜{MAX_ITEM_SCORE}（とてもそう思う）"
    "の整数で答えてください。項目名をキーとするJSONオブジェクトだけを返してください。\n"
    + "\n".join(f"- {item}" for item in SCORE_ITEMS)
)


def to_score_example(dialogue: Dialogue, *, system_prompt: str | None = None) -> Example | None:
    """Turn a dialogue into one example of the score task, ``None`` without complete scores.

    The system's message says what to do, the user's is the dialogue with the speakers marked,
    the assistant's a JSON object of :data:`SCORE_ITEMS`, its Japanese keys in their order.
    ``system_prompt`` must be ``None``, for the task has its own.
    """
    scores = {}
    for item, english in SCORE_ITEMS.items():
        score = dialogue.review_jp.get(item)
        scores[item] = dialogue.review_en.get(english) if score is None else score
    if not dialogue.turns or not all(map(is_item_score, scores.values())):
        return None
    speakers = {"assistant": "カウンセラー", "user": "クライアント"}
    text = "\n".join(f"{speakers[role]}: {text}" for role, text in dialogue.turns)
    return {
        "id": dialogue.id,
        "messages": [
            {"role": "system", "content": SCORE_PROMPT},
            {"role": "user", "content": text},
            {"role": "assistant", "content": json.dumps(scores, ensure_ascii=False)},
        ],
    }


def is_item_score(value: object) -> bool:
    """Whether a value is one of the scale's integers (``True`` is none)."""
    return type(value) is int and 0 <= value <= MAX_ITEM_SCORE


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


def split_long_example(example: Example, counter: TokenCounter, limit: int) -> list[Example]:
    """Cut a conversation of more than ``limit`` tokens into consecutive examples.

    Cuts stand only between an assistant's message and the user's next; leading system messages
    are repeated. Ids gain ``/1``, ``/2``… A part with nothing to train (``weight`` 0) is left
    out and logged. Raises :class:`DataError` where one exchange alone is too long.
    """
    messages = example["messages"]
    head = list(itertools.takewhile(lambda message: message["role"] == "system", messages))
    exchanges: list[list[Message]] = []
    for message in messages[len(head) :]:
        if not exchanges or (
            exchanges[-1][-1]["role"] == "assistant"
            and not exchanges[-1][-1].get("tool_calls")
            and message["role"] == "user"
        ):
            exchanges.append([])
        exchanges[-1].append(message)
    parts: list[list[Message]] = []
    for exchange in exchanges:
        if not parts or counter.count([*head, *parts[-1], *exchange]).total > limit:
            parts.append([])
            if counter.count([*head, *exchange]).total > limit:
                raise DataError(
                    f"対話「{example['id']}」には1回のやりとりだけで{limit:,}トークンを超える"
                    "部分があり、分割できません。除くには --long-examples drop を指定してください。"
                )
        parts[-1].extend(exchange)
    trained = [
        part
        for part in parts
        if any(m["role"] == "assistant" and m.get("weight") != 0 for m in part)
    ]
    if len(trained) < len(parts):
        logger.warning(
            "対話「%s」を分けた%d件のうち、学習する発話のない%d件を除きました。",
            example["id"],
            len(parts),
            len(parts) - len(trained),
        )
    return [
        cast("Example", {**example, "id": f"{example['id']}/{n}", "messages": [*head, *part]})
        for n, part in enumerate(trained, 1)
    ]


# ── Checking ─────────────────────────────────────────────────────────────────────────────────

# code: (severity, what is wrong, what to do). The texts are formatted with what was found.
PROBLEMS: dict[str, tuple[Literal["error", "warning"], str, str]] = {
    "encoding": ("error", "UTF-8ではありません", "UTF-8で保存し直してください"),
    "bom": ("error", "先頭にBOMがあります", "BOMなしのUTF-8で保存し直してください"),
    "invalid_json": ("error", "JSONとして読めません（{0}）", "1行に1つのJSONを書いてください"),
    "blank_line": ("error", "空行です", "行を削除してください"),
    "not_object": (
        "error",
        "JSONオブジェクトではありません",
        '{{"messages": [...]}} の形にしてください',
    ),
    "unknown_key": ("error", "使えないキー {0} があります", "キーを削除してください"),
    "missing_messages": ("error", "messages の配列がありません", "messages を書いてください"),
    "empty_messages": ("error", "messages が空です", "発話を書くか、行を削除してください"),
    "unknown_role": (
        "error",
        "role {0} は使えません",
        "system、user、assistant、tool のどれかにしてください",
    ),
    "wrong_type": ("error", "{0} の型が違います", "サービスの形式に直してください"),
    "empty_content": ("error", "content が空です", "本文を書くか、発話を削除してください"),
    "blank_content": ("warning", "content が空白だけです", "本文を書くか、削除してください"),
    "no_trained_message": (
        "error",
        "学習する assistant の発話がありません",
        "weight が0でない assistant の発話を加えてください",
    ),
    "last_not_assistant": (
        "error",
        "最後の発話が assistant ではありません",
        "最後の assistant より後の発話を削除してください",
    ),
    "bad_weight": ("error", "weight は assistant の0か1だけです", "0か1にするか、削除してください"),
    "special_token": (
        "error",
        "特殊トークンの文字列 {0} があります",
        "取り除いてください。1行でもあるとジョブ全体が失敗します",
    ),
    "lone_surrogate": (
        "error",
        "UTF-8で表せない文字（対になっていないサロゲート）があります",
        "その文字を取り除いてください",
    ),
    "too_long": (
        "error",
        "{0}トークンあり、上限{1}を超えた末尾は学習されません",
        "発話の切れ目で分割してください",
    ),
    "too_few_examples": ("error", "学習例が{0}件しかありません", "{1}件以上にしてください"),
    "file_too_large": ("error", "{0}MBあり、上限{1}MBを超えています", "ファイルを分けてください"),
    "duplicate_line": ("warning", "{0}行目と同じ内容です", "重複を削除してください"),
    "shared_conversation": (
        "warning",
        "学習データの{0}行目と同じ対話です",
        "どちらかから除いてください。検証の損失が実際より良く見えます",
    ),
}


class Problem(NamedTuple):
    """A finding before it has a place: its code, the message it is in, what was found."""

    code: str
    message_index: int | None = None
    details: tuple[object, ...] = ()


def find_problems(example: object) -> Iterator[Problem]:
    """Every problem in the value of one line, but for its length. The order is the reading's."""
    if not isinstance(example, dict):
        yield Problem("not_object")
        return
    for key in example.keys() - LINE_KEYS:
        yield Problem("unknown_key", None, (key,))
    messages = example.get("messages")
    if not isinstance(messages, list):
        yield Problem("missing_messages")
        return
    if not messages:
        yield Problem("empty_messages")
        return
    trained = False
    role: object = None
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            role = None
            yield Problem("wrong_type", index, ("発話",))
            continue
        role = message.get("role")
        content = message.get("content")
        plain = type(role) is str and role in _PLAIN_ROLES and len(message) == 2
        if not (plain and type(content) is str and content):
            yield from _find_message_problems(index, message)
        if type(content) is str and content.isspace():
            yield Problem("blank_content", index)
        trained = trained or (role == "assistant" and message.get("weight") != 0)
    if not trained:
        yield Problem("no_trained_message")
    if role != "assistant":
        yield Problem("last_not_assistant", len(messages) - 1)


_PLAIN_ROLES = CHAT_ROLES - {"tool"}


def _find_message_problems(index: int, message: Mapping[str, Any]) -> Iterator[Problem]:
    for key in message.keys() - MESSAGE_KEYS:
        yield Problem("unknown_key", index, (key,))
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in CHAT_ROLES:
        yield Problem("unknown_role", index, (role,))
    if "weight" in message and (
        role != "assistant" or type(message["weight"]) is not int or message["weight"] not in (0, 1)
    ):
        yield Problem("bad_weight", index)
    if role == "tool" and not isinstance(message.get("tool_call_id"), str):
        yield Problem("wrong_type", index, ("tool_call_id",))
    if content is None:
        calls = message.get("tool_calls")
        if not (role == "assistant" and isinstance(calls, list) and calls):
            yield Problem("wrong_type", index, ("content",))
    elif content in ("", []):
        yield Problem("empty_content", index)
    elif not isinstance(content, str) and not (
        isinstance(content, list) and all(map(_is_content_part, content))
    ):
        yield Problem("wrong_type", index, ("content",))


def _is_content_part(part: object) -> bool:
    return (
        isinstance(part, dict)
        and isinstance(part.get("type"), str)
        and (part["type"] != "text" or isinstance(part.get("text"), str))
    )


def _find_text_problems(line: str) -> Iterator[Problem]:
    """Problems of the text of a line as JSON without escapes, wherever they stand in it."""
    if "<|" in line:
        for token in sorted(set(SPECIAL_TOKEN.findall(line))):
            yield Problem("special_token", None, (token,))
    try:
        line.encode()
    except UnicodeEncodeError:
        yield Problem("lone_surrogate")


def find_length_problem(messages: object, size: int, limit: int) -> Problem | None:
    """``too_long``, for the ``messages`` of a line of ``size`` bytes.

    No token is shorter than a byte, so that only lines over ``limit`` need the vocabulary.
    """
    if size <= limit or not isinstance(messages, list):
        return None
    if not all(isinstance(message, dict) for message in messages):
        return None
    tokens = TokenCounter(load_vocabulary()).count(messages).total
    return Problem("too_long", None, (f"{tokens:,}", f"{limit:,}")) if tokens > limit else None


def check_file(
    path: str | os.PathLike[str],
    *,
    kind: Literal["training", "validation"] = "training",
    compare_with: str | os.PathLike[str] | None = None,
    max_tokens: int = MAX_EXAMPLE_TOKENS,
    max_bytes: int = MAX_FILE_BYTES,
) -> list[Finding]:
    """Every problem of a JSONL file on disk, in the order of its lines.

    ``compare_with`` names the training file of a validation file: conversations in both are
    found. The file is read line by line; only hashes of them stay in memory. The vocabulary is
    needed for lines of more than ``max_tokens`` bytes alone. Raises :class:`DataError` where
    the file can't be read.
    """
    path = Path(path)
    trained = {} if compare_with is None else _conversation_lines(Path(compare_with))
    findings: list[Finding] = []

    def report(line: int | None, problem: Problem) -> None:
        findings.append(_finding(str(path), line, problem))

    seen: dict[bytes, int] = {}
    count = 0
    for number, raw, value, problems in _read_checked(path):
        for problem in problems:
            report(number, problem)
        if not any(problem.code == "blank_line" for problem in problems):
            count += 1
        if value is None:
            continue
        first = seen.setdefault(hashlib.sha256(raw.strip()).digest(), number)
        if first != number:
            report(number, Problem("duplicate_line", None, (first,)))
        messages = value.get("messages") if isinstance(value, dict) else None
        if trained and (shared := trained.get(_conversation_digest(messages))):
            report(number, Problem("shared_conversation", None, (shared,)))
        if too_long := find_length_problem(messages, len(raw), max_tokens):
            report(number, too_long)
    needed = MIN_TRAINING_EXAMPLES if kind == "training" else 1
    if count < needed:
        report(None, Problem("too_few_examples", None, (count, needed)))
    size = path.stat().st_size
    if size > max_bytes:
        details = (f"{size / 2**20:,.0f}", f"{max_bytes / 2**20:,.0f}")
        report(None, Problem("file_too_large", None, details))
    return findings


def _read_checked(path: Path) -> Iterator[tuple[int, bytes, Any, list[Problem]]]:
    """Yield (line number, bytes, value or ``None``, problems) of each physical line."""
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                yield number, raw, *_check_line(raw, first=number == 1)
    except OSError as error:
        raise DataError(f"{path}: 読めません（{error.strerror}）。") from error


def _check_line(raw: bytes, *, first: bool) -> tuple[Any, list[Problem]]:
    problems = []
    if first and raw.startswith(codecs.BOM_UTF8):
        problems.append(Problem("bom"))
        raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return None, [*problems, Problem("encoding")]
    if not text.strip():
        return None, [*problems, Problem("blank_line")]
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        if "\\" in text:
            text = json.dumps(value, ensure_ascii=False)
    except (ValueError, RecursionError) as error:
        return None, [*problems, Problem("invalid_json", None, (printable(error)[:100],))]
    return value, [*problems, *find_problems(value), *_find_text_problems(text)]


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} はJSONの値ではありません")


def _conversation_digest(messages: object) -> bytes:
    text = json.dumps(messages, sort_keys=True)
    return hashlib.sha256(text.encode()).digest()


def _conversation_lines(path: Path) -> dict[bytes, int]:
    return {
        _conversation_digest(value.get("messages")): number
        for number, _, value, _ in _read_checked(path)
        if isinstance(value, dict)
    }


def _finding(path: str, line: int | None, problem: Problem) -> Finding:
    severity, text, remedy = PROBLEMS[problem.code]
    details = [printable(detail) for detail in problem.details]
    return Finding(
        path=path,
        line=line,
        message_index=problem.message_index,
        code=problem.code,
        severity=severity,
        text=text.format(*details),
        remedy=remedy.format(*details),
    )


def fix_file(path: str | os.PathLike[str]) -> tuple[str, str, int, int]:
    """Write ``NAME.fixed.jsonl`` and ``NAME.rejects.jsonl`` beside a JSONL file.

    Mended: BOM, blank lines, unknown keys, duplicate lines, what follows the last assistant
    message, over-long conversations (split). A line that still has an error goes to the rejects
    as ``{"line", "codes", "raw"}``. Returns both paths, and how many examples and rejects they
    hold. Raises :class:`DataError` rather than overwrite either.
    """
    path = Path(path)
    examples: dict[str, None] = {}  # an ordered set: a repeated line is dropped
    rejects = []
    outputs = [path.with_name(f"{path.stem}.{name}.jsonl") for name in ("fixed", "rejects")]
    for output in filter(Path.exists, outputs):
        raise DataError(f"{output} がすでにあります。移動するか削除してからやり直してください。")
    for number, raw, value, problems in _read_checked(path):
        if any(problem.code == "blank_line" for problem in problems):
            continue
        mended = _mend(value)
        remaining = [*find_problems(mended), *_find_text_problems(_dump(mended))]
        codes = [p.code for p in (problems if value is None else remaining) if _is_error(p)]
        parts = [mended]
        if not codes and find_length_problem(mended["messages"], len(raw), MAX_EXAMPLE_TOKENS):
            named = cast("Example", {"id": f"{path}:{number}", **mended})
            counter = TokenCounter(load_vocabulary())
            try:
                parts = list(split_long_example(named, counter, MAX_EXAMPLE_TOKENS))
            except DataError:
                codes = ["too_long"]
        if not codes:
            try:
                examples.update(dict.fromkeys(map(example_line, parts)))
            except ValueError:  # an infinite number, which JSON has no way to write
                codes = ["invalid_json"]
        if codes:
            text = raw.decode(errors="backslashreplace").rstrip("\r\n")
            rejects.append(_encode_json({"line": number, "codes": codes, "raw": text}))
    for output, lines in zip(outputs, (examples, rejects), strict=True):
        write_new_file(output, "".join(line + "\n" for line in lines))
    return str(outputs[0]), str(outputs[1]), len(examples), len(rejects)


def _mend(value: Any) -> Any:
    if not isinstance(value, dict) or not isinstance(value.get("messages"), list):
        return value
    messages = [
        {key: item for key, item in message.items() if key in MESSAGE_KEYS}
        if isinstance(message, dict)
        else message
        for message in value["messages"]
    ]
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    if "assistant" in roles:
        messages = messages[: len(roles) - roles[::-1].index("assistant")]
    return {**{key: item for key, item in value.items() if key in LINE_KEYS}, "messages": messages}


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _is_error(problem: Problem) -> bool:
    return PROBLEMS[problem.code][0] == "error"


def require_no_errors(findings: Iterable[Finding]) -> None:
    """Log every finding; raise :class:`DataError` with the first errors where there are any."""
    errors = []
    for finding in findings:
        if finding.severity == "error":
            errors.append(finding)
        else:
            logger.warning("%s", finding)
    if errors:
        shown = "\n".join(f"  {finding}" for finding in errors[:20])
        more = f"\n  ほか{len(errors) - 20:,}件" if len(errors) > 20 else ""
        raise DataError(
            f"データに{len(errors):,}件のエラーがあるため、アップロードしません。\n{shown}{more}\n"
            "すべて見るには: --check-file PATH、直したファイルを作るには: --check-file PATH --fix"
        )


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
    Cookbook, ``Chat_finetuning_data_prep``); tool calls are counted as their JSON text.
    ``exact`` is False without the vocabulary: text is then estimated from its UTF-8 length.
    """

    SEPARATOR = "<|endoftext|>"

    def __init__(self, encoding: Any | None) -> None:
        self._encoding = encoding
        self.exact = encoding is not None

    def count(self, messages: Sequence[Message]) -> Tokens:
        """Tokens of one conversation as a training example."""
        return self.count_many([messages])[0]

    def count_many(self, conversations: Iterable[Sequence[Message]]) -> list[Tokens]:
        """Tokens of several conversations, with one call of the tokeniser for all."""
        texts: list[str] = []
        layouts: list[list[tuple[int, int, bool]]] = []
        for messages in conversations:
            overhead = 3
            layout = []  # of each message: texts up to its end, tokens besides, whose it is
            for message in messages:
                own, names = _billed_texts(message)
                texts += own
                overhead += 4 + names  # 3 a message, its role is one token, and 1 for a name
                layout.append((len(texts), overhead, message.get("role") == "assistant"))
            layouts.append(layout)
        ends = [0, *self._text_ends(texts)]
        counts = []
        before = 0
        for layout in layouts:
            sizes = [ends[last] - before + extra for last, extra, _ in layout]
            turns = [size for size, (_, _, trained) in zip(sizes, layout, strict=True) if trained]
            counts.append(Tokens(sizes[-1] if sizes else 3, sum(turns)))
            before = ends[layout[-1][0]] if layout else before
        return counts

    def count_texts(self, texts: Sequence[str]) -> int:
        """Tokens of some bare texts together."""
        return self._text_ends(texts)[-1] if texts else 0

    def _text_ends(self, texts: Sequence[str]) -> list[int]:
        """For each text the number of tokens up to its end, those before it included."""
        if not texts:
            return []
        if self._encoding is None:
            bytes_so_far = itertools.accumulate(len(text.encode()) for text in texts)
            return [round(TOKENS_PER_BYTE * count) for count in bytes_so_far]
        # One call for all, for a call costs more than a short text; a special token never
        # merges with its neighbours. Text that holds one itself is counted one by one.
        joined = self.SEPARATOR.join(texts)
        if joined.count(self.SEPARATOR) != len(texts) - 1:
            counts = (len(self._encoding.encode_ordinary(text)) for text in texts)
            return list(itertools.accumulate(counts))
        tokens = self._encoding.encode_to_numpy(
            joined, allowed_special={self.SEPARATOR}, disallowed_special=()
        )
        separators = (tokens == self._encoding.eot_token).nonzero()[0].tolist()
        return [end - index for index, end in enumerate([*separators, len(tokens)])]


class _Counting:
    """Counts of examples, begun on threads as they are added, while the caller goes on.

    Threads do, for the tokeniser works outside the interpreter's lock; a chunk a call, for the
    end of each call has to wait for that lock.
    """

    CHUNK = 64

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._vocabulary = executor.submit(load_vocabulary)  # slow to load, so it starts first
        self._waiting: list[Example] = []
        self._begun: list[tuple[list[str], Future[list[Tokens]]]] = []
        self._known: set[str] = set()

    @property
    def exact(self) -> bool:
        """Whether the vocabulary is there; waits for it."""
        return self._vocabulary.result() is not None

    def add(self, example: Example) -> None:
        """Count ``example``, soon."""
        self._known.add(example["id"])
        self._waiting.append(example)
        if len(self._waiting) == self.CHUNK:
            self._begin()

    def _begin(self) -> None:
        chunk, self._waiting = self._waiting, []
        conversations = [example["messages"] for example in chunk]
        future = self._executor.submit(self._count, conversations)
        self._begun.append(([example["id"] for example in chunk], future))

    def _count(self, conversations: Sequence[Sequence[Message]]) -> list[Tokens]:
        return TokenCounter(self._vocabulary.result()).count_many(conversations)

    def finish(self) -> dict[str, Tokens]:
        """The counts of all examples by their ids; waits for them."""
        self._begin()
        counts: dict[str, Tokens] = {}
        for ids, future in self._begun:
            counts.update(zip(ids, future.result(), strict=True))
        return counts

    def add_missing(self, examples: Iterable[Example]) -> None:
        """Count those that were not added under their ids yet."""
        for example in examples:
            if example["id"] not in self._known:
                self.add(example)


def _billed_texts(message: Message) -> tuple[list[str], int]:
    """The texts of a message that are billed, and how many names are among them."""
    content = message.get("content")
    if len(message) == 2 and type(content) is str:
        return [content], 0
    texts = [v for k, v in message.items() if isinstance(v, str) and k != "role"]
    texts += [_dump(value) for value in message.values() if isinstance(value, list | dict)]
    return texts, int("name" in message)


def token_stats(tokens: Sequence[Tokens]) -> TokenStats:
    """Sum and spread over a file's conversations; all 0 for an empty file."""
    sizes = sorted(count.total for count in tokens)
    return TokenStats(
        total=sum(sizes),
        p5=percentile(sizes, 5),
        p50=percentile(sizes, 50),
        p95=percentile(sizes, 95),
        max=sizes[-1] if sizes else 0,
        per_turn_format=sum(count.per_turn_format for count in tokens),
    )


def percentile(ordered: Sequence[int], percent: float) -> int:
    """Of ascending values, by linear interpolation between ranks, rounded; 0 of none."""
    if not ordered:
        return 0
    rank = (len(ordered) - 1) * percent / 100
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return round(ordered[low] + (ordered[high] - ordered[low]) * (rank - low))


def price_of(model: str) -> Price | None:
    """The price of a base model or of a tuned one (``ft:BASE:…``); ``None`` where unknown."""
    base = model.split(":")[1] if model.startswith("ft:") and ":" in model[3:] else model
    return PRICES.get(MODEL_ALIASES.get(base, base))


def rates_of(model: str, given: Price | None, *, tuned: bool) -> tuple[float, float] | None:
    """Input and output rate of asking ``model``, ``None`` where unknown.

    A ``given`` price is that of the evaluated model, whatever its name.
    """
    if given is not None:
        return given.tuned_input, given.tuned_output
    known = price_of(model)
    return known.rates(tuned=tuned) if known else None


def estimate_cost(
    training_tokens: int,
    epochs: int | Literal["auto"] | None,
    *,
    model: str = DEFAULT_MODEL,
    baseline: str | None = None,
    evaluation_input_tokens: int = 0,
    evaluation_output_tokens: int = 0,
    price: Price | None = None,
    yen_per_dollar: float = DEFAULT_YEN_PER_DOLLAR,
    exact_tokens: bool = True,
) -> CostEstimate:
    """Price a run: training tokens × epochs × price, plus the evaluation at the tuned rate.

    With ``baseline`` the same questions are asked of that model too, at its own rate.

    ``epochs=None`` prices an evaluation alone; ``"auto"`` leaves the training price unknown,
    for the service chooses. Prices: ``price``, else :data:`PRICES`, dated
    :data:`PRICES_AS_OF`; where there is none, dollars are ``None``.
    """
    given = price is not None
    source = "指定された単価" if given else f"{PRICES_SOURCE}（{PRICES_AS_OF}時点）"
    price = price or price_of(model)
    training: float | None = None
    if epochs is None:
        training = 0.0
    elif price is not None and epochs != "auto":
        training = training_tokens * epochs * price.training / 1e6
    tuned = epochs is not None or model.startswith("ft:")
    asked = [rates_of(model, price if given else None, tuned=tuned)]
    if baseline is not None:
        asked.append(rates_of(baseline, None, tuned=baseline.startswith("ft:")))
    evaluation: float | None = 0.0
    for rates in asked:
        if rates is None or evaluation is None:
            evaluation = None
        else:
            evaluation += evaluation_input_tokens * rates[0] / 1e6
            evaluation += evaluation_output_tokens * rates[1] / 1e6
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
        baseline=baseline,
        price=price,
        price_source=source,
    )


# ── Choosing what to ask ─────────────────────────────────────────────────────────────────────


def choose_cases(
    examples: Iterable[Example], *, max_cases: int | None = 10, seed: int = 42, turns: EvalTurns = 1
) -> list[Case]:
    """Draw turns to answer from across the dialogues, at most ``max_cases`` (0 or ``None``: all).

    ``turns`` of a dialogue are asked: that many by a seeded choice, the ``"last"`` or ``"all"``
    of the assistant's turns that follow a user's; the last turn of the dialogue, which is nearly
    always a farewell, is left out where there is another. No dialogue gives its second case
    before each has given its first. A case's id is the dialogue's id and the turn's index in
    ``messages``; the draws depend on the seed and the id alone, so that two runs meet on the
    same cases. Raises :class:`ConfigurationError` for a value out of range.
    """
    check_evaluation(max_cases, eval_turns=turns)
    ranked = []
    for example in examples:
        rank = random.Random(f"{seed}/{example['id']}").random()
        for order, index in enumerate(_chosen_turns(example, seed, turns)):
            ranked.append((order, rank, example["id"], index, example))
    ranked.sort(key=lambda entry: entry[:4])
    return [_case(example, index) for *_, index, example in ranked[: max_cases or None]]


def _chosen_turns(example: Example, seed: int, turns: EvalTurns) -> list[int]:
    possible = _turns_to_ask(example["messages"])
    if turns == "last":
        return possible[-1:]
    draw = random.Random(f"{seed}/{example['id']}/turn")
    count = len(possible) if turns == "all" else min(turns, len(possible))
    return draw.sample(possible, count)


def check_evaluation(
    max_test_cases: int | None,
    *,
    eval_turns: EvalTurns = 1,
    concurrency: int = 1,
    temperature: float = 0.0,
    max_tokens: int = 1,
    **_others: Any,
) -> None:
    """Raise :class:`ConfigurationError` for options of an evaluation that are out of range."""
    for name, value, ok, allowed in (
        ("max_test_cases", max_test_cases, (max_test_cases or 0) >= 0, "0以上（0は全部）"),
        (
            "eval_turns",
            eval_turns,
            eval_turns in ("last", "all") or (type(eval_turns) is int and eval_turns >= 1),
            "last、all、1以上の整数のどれか",
        ),
        ("concurrency", concurrency, concurrency >= 1, "1以上"),
        ("temperature", temperature, 0 <= temperature <= 2, "0〜2"),
        ("max_tokens", max_tokens, max_tokens >= 1, "1以上"),
    ):
        if not ok:
            raise ConfigurationError(
                f"{name} は{allowed}でなければなりません（指定: {printable(value)}）。"
            )


def _turns_to_ask(messages: Sequence[Message]) -> list[int]:
    turns = [
        index
        for index, message in enumerate(messages)
        if index
        and message["role"] == "assistant"
        and messages[index - 1]["role"] == "user"
        and isinstance(message.get("content"), str)
        and message["content"].strip()
    ]
    if len(turns) > 1 and turns[-1] == len(messages) - 1:
        turns.pop()
    return turns


def _case(example: Example, index: int) -> Case:
    messages = example["messages"]
    context = [
        {key: value for key, value in message.items() if key != "weight"}
        for message in messages[:index]
    ]
    return Case(
        id=f"{example['id']}:{index}",
        dialogue_id=example["id"],
        input=context,
        reference=messages[index]["content"],
        tools=example.get("tools"),
    )


# ── Scoring ──────────────────────────────────────────────────────────────────────────────────

BOOTSTRAP_SAMPLES = 1000
SIGNIFICANCE = 0.05
EVAL_EXTRA = "pip install 'openai-sft[eval]'"
BACKCHANNELS = frozenset(
    {"はい", "ええ", "うん", "うんうん", "はいはい", "そう", "なるほど"}
    | {"そうですか", "そうですね", "そうなんですね"}
)


class Answer(NamedTuple):
    """A model's text for one case, beside the real one."""

    case_id: str
    dialogue_id: str
    output: str
    reference: str


@dataclass(frozen=True, slots=True)
class Figure:
    """A corpus-level figure of some answers, ready to be computed on resampled dialogues.

    ``score`` takes weights of shape (samples, dialogues), how often each dialogue is in each
    sample, and gives one value a sample. ``per_case`` holds a value a case for the sign test.
    ``better`` is the sign of a good difference, 0 where neither direction is good by itself.
    """

    name: str
    label: str
    better: int
    signature: str
    score: Callable[[Any], Any]
    per_case: Sequence[float]
    symmetric: bool = False


def score_answers(
    answers: Sequence[Answer], *, seed: int = 42
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Corpus-level figures on a scale of 0–100 with 95 % intervals, and those that are missing.

    Each is ``{"score", "low", "high", "signature"}``. Intervals are by bootstrap over dialogues
    (percentiles of :data:`BOOTSTRAP_SAMPLES` samples by ``seed``; for Dist-n, whose resampled
    values are biased low by repetition, the score ± 1.96 standard deviations of them). Nothing
    is scored where there is no answer; chrF, BLEU and ROUGE-L need the extra ``eval``.
    """
    figures, missing = make_figures(answers)
    weights = _resample(answers, seed)
    metrics = {}
    for figure in figures:
        score, samples = _evaluate_figure(figure, weights)
        low, high = _interval(score, samples, symmetric=figure.symmetric)
        if figure.symmetric:
            low, high = max(0.0, low), min(100.0, high)
        metrics[figure.name] = {
            "score": score,
            "low": low,
            "high": high,
            "signature": figure.signature,
        }
    return metrics, missing


def make_figures(answers: Sequence[Answer]) -> tuple[list[Figure], list[str]]:
    """The figures of some answers, and the names of those that a missing package holds back."""
    if not answers:
        return [], []
    owners, count = _dialogue_indexes(answers)
    figures: list[Figure] = []
    missing: list[str] = []
    for name, make in (
        ("chrf", _make_chrf),
        ("bleu_char", _make_bleu_char),
        ("bleu_ja_mecab", _make_bleu_mecab),
        ("rouge_l", _make_rouge_l),
    ):
        try:
            figures.append(make(answers, owners, count))
        except ImportError:
            missing += [name] if name != "bleu_ja_mecab" else []
    figures += [
        _make_dist(answers, owners, count, 1),
        _make_dist(answers, owners, count, 2),
        _make_length_ratio(answers, owners, count),
        _make_backchannel_share(answers, owners, count),
    ]
    return figures, missing


def _dialogue_indexes(answers: Sequence[Answer]) -> tuple[list[int], int]:
    order = {id_: n for n, id_ in enumerate(dict.fromkeys(a.dialogue_id for a in answers))}
    return [order[answer.dialogue_id] for answer in answers], len(order)


def _resample(answers: Sequence[Answer], seed: int) -> Any:
    """Weights of the sample itself (first row) and of the bootstrap samples of its dialogues."""
    import numpy as np

    _, count = _dialogue_indexes(answers)
    if not count:
        return np.zeros((0, 0))
    draws = np.random.default_rng(seed).multinomial(
        count, np.full(count, 1 / count), size=BOOTSTRAP_SAMPLES
    )
    return np.vstack([np.ones((1, count)), draws])


def _evaluate_figure(figure: Figure, weights: Any) -> tuple[float, Any]:
    values = figure.score(weights)
    return float(values[0]), values[1:]


def _interval(score: float, samples: Any, *, symmetric: bool) -> tuple[float, float]:
    import numpy as np

    if symmetric:
        half = 1.96 * float(np.std(samples, ddof=1))
        return score - half, score + half
    low, high = np.percentile(samples, (2.5, 97.5))
    return float(low), float(high)


def _by_dialogue(rows: Any, owners: Sequence[int], count: int) -> Any:
    """Rows of statistics a case, summed over the cases of each dialogue."""
    import numpy as np

    rows = np.asarray(rows, dtype=float)
    sums = np.zeros((count, rows.shape[1]))
    np.add.at(sums, list(owners), rows)
    return sums


def _ratio_figure(
    name: str,
    label: str,
    better: int,
    signature: str,
    rows: Sequence[tuple[float, float]],
    owners: Sequence[int],
    count: int,
) -> Figure:
    """A figure that is 100 × Σ first / Σ second of statistics that add up over cases."""
    sums = _by_dialogue(rows, owners, count)

    def score(weights: Any) -> Any:
        totals = weights @ sums
        return 100 * totals[:, 0] / totals[:, 1]

    per_case = [100 * first / second for first, second in rows]
    return Figure(name, label, better, signature, score, per_case)


def _sacrebleu_figure(
    name: str, label: str, metric: Any, answers: Sequence[Answer], owners: Sequence[int], count: int
) -> Figure:
    # The statistics of each segment, which corpus_score() sums up itself, are wanted one by one.
    outputs = [answer.output for answer in answers]
    statistics = metric._extract_corpus_statistics(outputs, [[a.reference for a in answers]])
    sums = _by_dialogue(statistics, owners, count)

    def score(weights: Any) -> Any:
        import numpy as np

        totals = (weights @ sums).round().astype(int).tolist()
        return np.array([metric._compute_score_from_stats(row).score for row in totals])

    return Figure(
        name,
        label,
        1,
        metric.get_signature().format(),
        score,
        [metric._compute_score_from_stats(list(row)).score for row in statistics],
    )


def _make_chrf(answers: Sequence[Answer], owners: Sequence[int], count: int) -> Figure:
    from sacrebleu.metrics.chrf import CHRF

    metric = CHRF()
    return _sacrebleu_figure("chrf", "chrF", metric, answers, owners, count)


def _make_bleu_char(answers: Sequence[Answer], owners: Sequence[int], count: int) -> Figure:
    return _make_bleu("bleu_char", "BLEU（文字）", "char", answers, owners, count)


def _make_bleu_mecab(answers: Sequence[Answer], owners: Sequence[int], count: int) -> Figure:
    import MeCab  # noqa: F401  # sacrebleu's own error for its absence is a RuntimeError

    return _make_bleu("bleu_ja_mecab", "BLEU（MeCab）", "ja-mecab", answers, owners, count)


def _make_bleu(
    name: str,
    label: str,
    tokenize: str,
    answers: Sequence[Answer],
    owners: Sequence[int],
    count: int,
) -> Figure:
    from sacrebleu.metrics.bleu import BLEU

    # Effective order only matters where all answers are shorter than four tokens, which would
    # otherwise score 0 even when they are the references.
    metric = BLEU(tokenize=tokenize, effective_order=True)
    return _sacrebleu_figure(name, label, metric, answers, owners, count)


def _make_rouge_l(answers: Sequence[Answer], owners: Sequence[int], count: int) -> Figure:
    from rapidfuzz.distance import LCSseq

    def f1(answer: Answer) -> float:
        lengths = len(answer.output) + len(answer.reference)
        return 2 * LCSseq.similarity(answer.output, answer.reference) / lengths

    signature = "F1 of the longest common subsequence of characters, mean over cases (Lin 2004)"
    rows = [(f1(answer), 1.0) for answer in answers]
    return _ratio_figure("rouge_l", "ROUGE-L（文字）", 1, signature, rows, owners, count)


def _make_dist(answers: Sequence[Answer], owners: Sequence[int], count: int, n: int) -> Figure:
    import numpy as np

    grams = [[a.output[i : i + n] for i in range(len(a.output) - n + 1)] for a in answers]
    columns = {gram: k for k, gram in enumerate(dict.fromkeys(itertools.chain(*grams)))}
    present = np.zeros((count, len(columns)), dtype=np.float32)
    for owner, own in zip(owners, grams, strict=True):
        present[owner, [columns[gram] for gram in own]] = 1
    totals = _by_dialogue([(len(own),) for own in grams], owners, count)[:, 0]

    def score(weights: Any) -> Any:
        chunks = np.array_split((weights > 0).astype(np.float32), max(1, len(weights) // 64))
        distinct = np.concatenate([((chunk @ present) > 0).sum(axis=1) for chunk in chunks])
        return 100 * distinct / np.maximum(1, weights @ totals)

    return Figure(
        f"dist_{n}",
        f"Dist-{n}",
        1,
        f"distinct/all character {n}-grams of all answers (Li et al. 2016)",
        score,
        [100 * len(set(own)) / max(1, len(own)) for own in grams],
        symmetric=True,
    )


def _make_length_ratio(answers: Sequence[Answer], owners: Sequence[int], count: int) -> Figure:
    rows = [(float(len(a.output)), float(len(a.reference))) for a in answers]
    signature = "100 × characters of all answers / of all references"
    return _ratio_figure("length_ratio", "長さの比", 0, signature, rows, owners, count)


def _make_backchannel_share(answers: Sequence[Answer], owners: Sequence[int], count: int) -> Figure:
    rows = [(float(is_backchannel(answer.output)), 1.0) for answer in answers]
    signature = "100 × share of answers that are a bare back-channel (openai_sft.BACKCHANNELS)"
    return _ratio_figure("backchannel_share", "相づちだけの割合", 0, signature, rows, owners, count)


def is_backchannel(text: str) -> bool:
    """Whether an answer is nothing but back-channels such as はい or ええ、ええ。"""
    bare = re.sub(r"[\s。、．，.,!！?？…〜ー]+", "", text)
    longest_first = sorted(BACKCHANNELS, key=len, reverse=True)
    return re.fullmatch(f"(?:{'|'.join(longest_first)})+", bare) is not None


def compare_answers(
    tuned: Sequence[Answer],
    baseline: Sequence[Answer],
    *,
    seed: int = 42,
    make: Callable[[Sequence[Answer]], tuple[list[Figure], list[str]]] | None = None,
    cases: int | None = None,
) -> dict[str, Any]:
    """Compare two models on the cases that both answered, figure by figure.

    A figure holds both values, ``difference`` (tuned − baseline) with its paired 95 % bootstrap
    interval over dialogues, wins (where the tuned model is better), losses and ties over cases
    with the two-sided sign test's ``p_value``, ``verdict`` (``better``, ``worse``, ``higher``,
    ``lower`` or ``indistinguishable``) and ``sentence``. A verdict needs both: the interval
    excludes 0, and p < .05 in the same direction. ``make`` gives the figures (by default those
    of the response task); ``cases`` is how many were asked, by default those with an answer.
    """
    others = {answer.case_id: answer for answer in baseline}
    both = [answer for answer in tuned if answer.case_id in others]
    return compare_figures(
        both,
        [others[answer.case_id] for answer in both],
        make=make or make_figures,
        seed=seed,
        cases=len({a.case_id for a in tuned} | others.keys()) if cases is None else cases,
    )


def compare_figures(
    tuned: Sequence[Answer],
    baseline: Sequence[Answer],
    *,
    make: Callable[[Sequence[Answer]], tuple[list[Figure], list[str]]],
    seed: int,
    cases: int,
    rival: str = "基準のモデル",
) -> dict[str, Any]:
    """:func:`compare_answers` of answers that stand in pairs already, out of ``cases`` asked."""
    weights = _resample(tuned, seed)
    figures = {}
    for one, other in zip(make(tuned)[0], make(baseline)[0], strict=True):
        value, samples = _evaluate_figure(one, weights)
        other_value, other_samples = _evaluate_figure(other, weights)
        difference = value - other_value
        low, high = _interval(difference, samples - other_samples, symmetric=one.symmetric)
        good = one.better or 1
        deltas = [good * (a - b) for a, b in zip(one.per_case, other.per_case, strict=True)]
        wins, losses = sum(delta > 0 for delta in deltas), sum(delta < 0 for delta in deltas)
        p_value = sign_test(wins, losses)
        verdict = _verdict(one.better, low, high, wins - losses, p_value)
        figures[one.name] = {
            "tuned": value,
            "baseline": other_value,
            "difference": difference,
            "low": low,
            "high": high,
            "wins": wins,
            "losses": losses,
            "ties": len(deltas) - wins - losses,
            "p_value": p_value,
            "verdict": verdict,
            "sentence": f"{one.label}は{rival}{VERDICTS[verdict]}（差 {difference:+.2f}、95%区間 "
            f"{low:+.2f}〜{high:+.2f}、符号検定 p={p_value:.3g}）。",
        }
    return {"pairs": len(tuned), "left_out_pairs": cases - len(tuned), "figures": figures}


VERDICTS = {
    "better": "より良くなりました",
    "worse": "より悪くなりました",
    "higher": "より高くなりました",
    "lower": "より低くなりました",
    "indistinguishable": "と区別できない",
}


def _verdict(better: int, low: float, high: float, lead: int, p_value: float) -> str:
    direction = (better or 1) * (1 if low > 0 else -1 if high < 0 else 0)
    if direction * lead <= 0 or p_value >= SIGNIFICANCE:
        return "indistinguishable"
    if better == 0:
        return "higher" if direction > 0 else "lower"
    return "better" if direction > 0 else "worse"


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p of a sign test (binomial with one half; ties are left out before)."""
    trials = wins + losses
    term = tail = 1  # the binomial coefficients, each from the one before
    for k in range(min(wins, losses)):
        term = term * (trials - k) // (k + 1)
        tail += term
    return min(1.0, float(2 * tail / 2**trials))


def parse_scores(text: str) -> dict[str, int] | str:
    """The 20 item scores of an answer, or why it is no valid answer. Nothing is clipped."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return "JSONではありません"
    if not isinstance(value, dict):
        return "JSONオブジェクトではありません"
    for item in SCORE_ITEMS:
        if item not in value:
            return f"「{item}」がありません"
        if not is_item_score(value[item]):
            shown = json.dumps(value[item])[:50]
            return f"「{item}」が0〜{MAX_ITEM_SCORE}の整数ではありません（{shown}）"
    return {item: value[item] for item in SCORE_ITEMS}


def score_predictions(
    answers: Sequence[Answer], *, seed: int = 42
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """How well predicted scores agree with the real ones: an item, ``overall`` and ``total``.

    Each holds ``mse``, ``rmse``, ``mae``, ``accuracy``, ``accuracy_within_1`` (shares, 0–1),
    ``spearman`` and ``pearson`` as ``{"score", "low", "high"}`` with 95 % percentile bootstrap
    intervals over dialogues; ``None`` where a correlation is undefined. ``overall`` pools the
    items, ``total`` is their sum (0–100).
    """
    import numpy as np

    if not answers:
        return {}, []
    weights = _resample(answers, seed)
    owners, _ = _dialogue_indexes(answers)
    metrics: dict[str, dict[str, Any]] = {}
    for name, predicted, real in _score_groups(answers):
        values = agreement(weights, predicted, real, owners)
        metrics[name] = {}
        for measure, samples in values.items():
            undefined = bool(np.isnan(samples[0]))
            low, high = (None, None) if undefined else np.nanpercentile(samples[1:], (2.5, 97.5))
            metrics[name][measure] = {
                "score": None if undefined else float(samples[0]),
                "low": None if low is None else float(low),
                "high": None if high is None else float(high),
            }
    return metrics, []


def _score_groups(answers: Sequence[Answer]) -> Iterator[tuple[str, Any, Any]]:
    """Name, predictions and real scores of shape (dialogues, items of the group)."""
    import numpy as np

    predicted, real = (
        np.array([[float(json.loads(text)[item]) for item in SCORE_ITEMS] for text in texts])
        for texts in zip(*((answer.output, answer.reference) for answer in answers), strict=True)
    )
    yield "overall", predicted, real
    yield "total", predicted.sum(axis=1, keepdims=True), real.sum(axis=1, keepdims=True)
    for index, item in enumerate(SCORE_ITEMS):
        yield item, predicted[:, index : index + 1], real[:, index : index + 1]


def agreement(
    weights: Any, predicted: Any, real: Any, owners: Sequence[int] | None = None
) -> dict[str, Any]:
    """Measures of agreement, an array of one value a row of ``weights``.

    ``weights`` (samples, dialogues) says how often each dialogue is in each sample;
    ``predicted`` and ``real`` are (answers, values), and ``owners`` tells the dialogue of each
    answer, by default one each. Predictions that are no integers are
    rounded for the accuracies. Ranks of ties are their mean; a correlation with a constant is
    ``nan``.
    """
    import numpy as np

    # A sample is known by how often each distinct pair of values is in it.
    pairs, codes = np.unique(
        np.stack([predicted.ravel(), real.ravel()], axis=1), axis=0, return_inverse=True
    )
    counts = np.zeros((weights.shape[1], len(pairs)))
    rows = np.arange(len(predicted)) if owners is None else np.asarray(owners)
    np.add.at(counts, (np.repeat(rows, predicted.shape[1]), codes.ravel()), 1)
    weighted = weights @ counts
    shares = weighted / weighted.sum(axis=1, keepdims=True)
    x, y = pairs.T
    errors, misses = x - y, np.abs(np.rint(x) - y)
    mse = shares @ errors**2
    return {
        "mse": mse,
        "rmse": np.sqrt(mse),
        "mae": shares @ np.abs(errors),
        "accuracy": shares @ (misses == 0).astype(float),
        "accuracy_within_1": shares @ (misses <= 1).astype(float),
        "spearman": _correlation(shares, _mean_ranks(shares, x), _mean_ranks(shares, y)),
        "pearson": _correlation(shares, x[None, :], y[None, :]),
    }


def _mean_ranks(shares: Any, values: Any) -> Any:
    """For each sample the rank of each pair's value as a share of all, ties at their mean."""
    import numpy as np

    distinct, codes = np.unique(values, return_inverse=True)
    belongs = np.zeros((len(values), len(distinct)))
    belongs[np.arange(len(values)), codes] = 1
    mass = shares @ belongs
    return (np.cumsum(mass, axis=1) - mass / 2)[:, codes]


def _correlation(shares: Any, x: Any, y: Any) -> Any:
    import numpy as np

    x = x - (shares * x).sum(axis=1, keepdims=True)
    y = y - (shares * y).sum(axis=1, keepdims=True)
    spread = np.sqrt((shares * x**2).sum(axis=1) * (shares * y**2).sum(axis=1))
    together = (shares * x * y).sum(axis=1)
    # Rounding leaves a constant a spread of about 1e-16 instead of 0.
    return np.where(spread > 1e-12, together / np.maximum(spread, 1e-12), np.nan)


def make_score_figures(answers: Sequence[Answer]) -> tuple[list[Figure], list[str]]:
    """The figures in which two predictors are compared: errors and accuracies."""
    import numpy as np

    figures = []
    if not answers:
        return [], []
    owners, _ = _dialogue_indexes(answers)
    for group, predicted, real in itertools.islice(_score_groups(answers), 2):
        errors, misses = predicted - real, np.abs(np.rint(predicted) - real)
        per_case = {
            "mse": (errors**2).mean(axis=1),
            "rmse": np.sqrt((errors**2).mean(axis=1)),
            "mae": np.abs(errors).mean(axis=1),
            "accuracy": (misses == 0).mean(axis=1),
            "accuracy_within_1": (misses <= 1).mean(axis=1),
        }
        for measure, values in per_case.items():
            figures.append(
                Figure(
                    name=f"{group}.{measure}",
                    label=f"{FIGURE_LABELS[group]}の{FIGURE_LABELS[measure]}",
                    better=1 if measure.startswith("accuracy") else -1,
                    signature=measure,
                    score=functools.partial(_measure, measure, predicted, real, owners),
                    per_case=values.tolist(),
                )
            )
    return figures, []


def _measure(name: str, predicted: Any, real: Any, owners: Sequence[int], weights: Any) -> Any:
    return agreement(weights, predicted, real, owners)[name]


def mean_scores(train_data: Iterable[Example]) -> dict[str, float]:
    """The mean of each item over the training examples: what a model has to beat."""
    scores = list(filter(None, map(_scores_of, train_data)))
    return {item: math.fsum(row[item] for row in scores) / len(scores) for item in SCORE_ITEMS}


def _scores_of(example: Example) -> dict[str, int] | None:
    scores = parse_scores(str(example["messages"][-1].get("content")))
    return None if isinstance(scores, str) else scores


@dataclass(frozen=True, slots=True)
class Task:
    """All that differs between the tasks; a third one is a third entry of :data:`TASKS`.

    ``make_example`` turns a dialogue into an example, ``None`` for ``left_out``. ``request`` is
    added to each question. ``find_fault`` says why an answer isn't one. ``score`` gives a
    split's metrics and the names of those missing, ``make_figures`` what is compared.
    """

    make_example: Callable[..., Example | None]
    left_out: str
    request: Mapping[str, Any]
    find_fault: Callable[[str], str | None]
    score: Callable[..., tuple[dict[str, dict[str, Any]], list[str]]]
    make_figures: Callable[[Sequence[Answer]], tuple[list[Figure], list[str]]]


def _find_score_fault(text: str) -> str | None:
    scores = parse_scores(text)
    return scores if isinstance(scores, str) else None


TASKS: dict[TaskName, Task] = {
    "response": Task(
        make_example=to_example,
        left_out="カウンセラーの発話がない",
        request={},
        find_fault=lambda text: None,
        score=score_answers,
        make_figures=make_figures,
    ),
    "score": Task(
        make_example=to_score_example,
        left_out="20項目の評価が揃っていない",
        request={
            "response_format": {
                "type": "json_schema",
                "json_schema": {
                    "name": "client_feedback",
                    "strict": True,
                    "schema": {
                        "type": "object",
                        # Bounds as an enum: tuned models don't take minimum and maximum.
                        "properties": {
                            item: {"type": "integer", "enum": list(range(MAX_ITEM_SCORE + 1))}
                            for item in SCORE_ITEMS
                        },
                        "required": list(SCORE_ITEMS),
                        "additionalProperties": False,
                    },
                },
            }
        },
        find_fault=_find_score_fault,
        score=score_predictions,
        make_figures=make_score_figures,
    ),
}


class EvaluationResults(dict[str, Any]):
    """The results of an evaluation: a plain dict that a notebook shows as a table."""

    def tables(self) -> list[list[list[str]]]:
        """Rows of text, the first of each table its head: the figures, then the comparisons."""
        tables = [self._score_table()] if self.get("task") == "score" else [self._figure_table()]
        comparisons = self.get("comparison", {})
        against = {"基準": comparisons, "平均予測": comparisons.get("mean_reference", {})}
        for rival, (name, label) in itertools.product(
            against, (("test", "テスト"), ("valid", "検証"))
        ):
            if name not in against[rival]:
                continue
            rows = [[f"比較（{label}）", "学習後", rival, "差", "95%区間", "p", "判定"]]
            for figure_name, figure in against[rival][name]["figures"].items():
                rows.append(
                    [
                        _figure_label(figure_name),
                        _short(figure["tuned"]),
                        _short(figure["baseline"]),
                        *_figure_cells(figure, "difference"),
                        f"{figure['p_value']:.2g}",
                        VERDICT_LABELS[figure["verdict"]],
                    ]
                )
            tables.append(rows)
        return [table for table in tables if len(table) > 1]

    def _metrics(self, name: str) -> dict[str, Any]:
        metrics: dict[str, Any] = self[f"{name}_evaluation"].get("metrics", {})
        return metrics

    def _figure_table(self) -> list[list[str]]:
        rows = [["指標", "テスト", "95%区間", "検証", "95%区間"]]
        parts = [self._metrics("test"), self._metrics("valid")]
        for name in dict.fromkeys(itertools.chain(*parts)):
            cells = [_figure_cells(part.get(name), "score") for part in parts]
            rows.append([_figure_label(name), *itertools.chain(*cells)])
        return rows

    def _score_table(self) -> list[list[str]]:
        measures = ("mse", "mae", "accuracy", "spearman")
        head = [FIGURE_LABELS[measure] for measure in measures]
        rows = [["項目（テスト）", head[0], "95%区間", "平均予測", *head[1:]]]
        means = self.get("mean_reference", {}).get("test", {})
        for name, metrics in self._metrics("test").items():
            if name == "coverage":
                continue
            mean = means.get(name, {}).get("mse", {"score": None})["score"]
            rows.append(
                [
                    _figure_label(name),
                    *_figure_cells(metrics["mse"], "score"),
                    _short(mean),
                    *(_figure_cells(metrics[measure], "score")[0] for measure in measures[1:]),
                ]
            )
        return rows

    def _repr_html_(self) -> str:
        parts = [f"<p>モデル: {html.escape(str(self['model_id']))}</p>"]
        if self.get("rehearsal"):
            parts.append(f"<p><strong>{html.escape(self['note'])}</strong></p>")
        for head, *rows in self.tables():
            cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
            body = "".join(
                "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
                for row in rows
            )
            parts.append(f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>")
        return "".join(parts)


FIGURE_LABELS = {
    "chrf": "chrF",
    "bleu_char": "BLEU（文字）",
    "bleu_ja_mecab": "BLEU（MeCab）",
    "rouge_l": "ROUGE-L（文字）",
    "dist_1": "Dist-1",
    "dist_2": "Dist-2",
    "length_ratio": "長さの比",
    "backchannel_share": "相づちだけの割合",
    "overall": "全項目",
    "total": "合計点",
    "mse": "MSE",
    "rmse": "RMSE",
    "mae": "MAE",
    "accuracy": "一致率",
    "accuracy_within_1": "1点差以内",
    "spearman": "順位相関",
    "pearson": "相関",
}
VERDICT_LABELS = {
    "better": "良い",
    "worse": "悪い",
    "higher": "高い",
    "lower": "低い",
    "indistinguishable": "区別できない",
}


def _figure_label(name: str) -> str:
    group, _, measure = name.partition(".")
    labels = [FIGURE_LABELS.get(part, part) for part in (group, measure) if part]
    return " ".join(labels)


def _figure_cells(figure: Mapping[str, float | None] | None, key: str) -> list[str]:
    if figure is None or figure[key] is None:
        return ["-", "-"]
    score, low, high = (_short(figure[name]) for name in (key, "low", "high"))
    return [score, f"{low}〜{high}"]


def _short(value: float | None) -> str:
    """Two decimals, fewer for large values; never -0.00."""
    if value is None:
        return "-"
    digits = 2 if abs(value) < 100 else 1 if abs(value) < 1000 else 0
    return f"{round(value, digits) + 0.0:.{digits}f}"


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
        f"1〜{MAX_EPOCHS}の整数または auto ",
    )
    require(
        "batch_size",
        batch_size,
        batch_size == "auto" or whole(batch_size, 1, MAX_BATCH_SIZE),
        f"1〜{MAX_BATCH_SIZE}の整数または auto ",
    )
    rate = learning_rate_multiplier
    require(
        "learning_rate_multiplier",
        rate,
        rate is None
        or rate == "auto"
        or (isinstance(rate, int | float) and 0 < rate < float("inf")),
        "正の数または auto ",
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
            content = base64.b64decode(b"".join(content.split()), validate=True)
        except binascii.Error as error:
            raise ValueError("CSVでもBase64でもありません") from error
    reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig")))
    try:
        if "step" not in (reader.fieldnames or ()):
            raise ValueError("step の列がありません")
        return [
            {key: float(value) for key, value in row.items() if isinstance(value, str) and value}
            for row in reader
        ]
    except csv.Error as error:
        raise ValueError(str(error)) from error


# ── The run record and other files ───────────────────────────────────────────────────────────


def write_new_file(path: Path, lines: str | Iterable[bytes]) -> None:
    """Write ``path`` whole or not at all; an existing file raises ``FileExistsError``."""
    temporary = _write_temporary(path, lines)
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


def _write_temporary(path: Path, lines: str | Iterable[bytes]) -> Path:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.writelines([lines.encode()] if isinstance(lines, str) else lines)
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
    """What is known of one run, in ``run_STAMP.json``; replaced whole at every update.

    Whoever may write a record holds its lock; another process gets :class:`ConfigurationError`.
    """

    VERSION = 1

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self.path, self.data = path, data
        self._release: weakref.finalize[..., Any] | None = None

    @classmethod
    def create(cls, folder: Path, stamp: str, **facts: Any) -> RunRecord:
        """Start a locked record. Raises ``FileExistsError`` where the stamp is taken."""
        data = {"version": cls.VERSION, "run_id": f"run_{stamp}", **facts}
        path = folder / f"run_{stamp}.json"
        write_new_file(path, to_json(data))
        record = cls(path, data)
        record.lock()
        return record

    @classmethod
    def load(cls, path: Path) -> RunRecord:
        """Read a record. Raises :class:`DataError` where it isn't one."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: 実行記録として読めません（{printable(error)}）。") from error
        if (
            not isinstance(data, dict)
            or data.get("version") != cls.VERSION
            or not isinstance(data.get("run_id"), str)
            or not isinstance(data.get("settings"), dict)
        ):
            raise DataError(f"{path}: この版では読めない実行記録です。")
        return cls(path, data)

    @property
    def stamp(self) -> str:
        """The ``YYYYmmdd_HHMMSS`` that all files of the run carry."""
        return self.path.stem.removeprefix("run_")

    @property
    def unfinished(self) -> bool:
        """Whether :meth:`OpenAISFT.resume` has something to do here."""
        facts = self.data
        return (
            facts.get("kind") in ("pipeline", "evaluation")
            and not facts.get("rehearsal")
            and "finished_at" not in facts
            and facts.get("job_status") not in ("failed", "cancelled")
        )

    def file(self, kind: str) -> Path:
        """A file of the run, by its bare name: a run's files stand beside its record."""
        path = self.path.parent / Path(self.data["files"][kind]).name
        if path.is_symlink():
            raise DataError(f"{path}: リンクは読みません。ファイルそのものを置いてください。")
        return path

    def update(self, **facts: Any) -> None:
        """Add or replace top-level facts, on disk too."""
        self.data.update(facts)
        _write_temporary(self.path, to_json(self.data)).replace(self.path)

    def lock(self) -> None:
        """Take the lock and read what another process may have written before it ended.

        Raises :class:`ConfigurationError` while another process holds it. Windows has no
        ``fcntl``; there the lock is left out.
        """
        path = _lock_path(self.path.parent, self.stamp)
        if fcntl is None:
            path.unlink(missing_ok=True)
        if fcntl is None or self._release is not None:
            return
        if path.is_symlink():
            raise ConfigurationError(f"{path} がリンクです。取り除いてください。")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.exists() or not os.path.samestat(os.fstat(descriptor), path.stat()):
                raise BlockingIOError  # its holder has just removed it, and another made it anew
        except OSError as error:
            os.close(descriptor)
            raise ConfigurationError(
                f"{self.path} は別のプロセスが使っています。終わるのを待ってください。"
            ) from error
        self._release = weakref.finalize(self, _unlock, path, descriptor)
        for left_behind in self.path.parent.glob(f".*_{self.stamp}.*.tmp"):
            left_behind.unlink(missing_ok=True)  # by a process that was killed while writing
        self.data = self.load(self.path).data

    def release(self) -> None:
        """Give the lock back; it ends with the process too."""
        if self._release is not None:
            self._release()
            self._release = None


def _lock_path(folder: Path, stamp: str) -> Path:
    return folder / f".run_{stamp}.lock"


def _unlock(path: Path, descriptor: int) -> None:
    path.unlink(missing_ok=True)
    os.close(descriptor)


def read_runs(folder: Path) -> Iterator[RunRecord]:
    """The run records of ``folder``, newest first; one that can't be read is logged."""
    for path in sorted(folder.glob("run_*.json"), reverse=True):
        try:
            yield RunRecord.load(path)
        except DataError as error:
            logger.warning("%s", error)


def find_run(folder: Path, model_id: str | None = None) -> RunRecord | None:
    """The newest run in ``folder`` that tuned ``model_id``, or any model; never a rehearsal."""
    for run in read_runs(folder):
        models = [run.data.get("fine_tuned_model"), *run.data.get("checkpoints", ())]
        if models[0] and not run.data.get("rehearsal") and (model_id is None or model_id in models):
            return run
    return None


def sha256_of(path: Path) -> str:
    """The hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        self._thread.join(timeout=1.0)  # a reading that hangs is left to end with the program

    def _run(self) -> None:
        while True:
            try:
                self._report(self._sampler())
            except Exception as error:  # noqa: BLE001  # a reading must never end a paid wait
                logger.warning("[監視] 読み取れません: %s", printable(repr(error)))
            if self._stopped.wait(self._interval):
                return

    def _read_machine(self) -> Sample:
        import psutil

        memory = psutil.virtual_memory()
        psutil.cpu_percent(None)
        self._stopped.wait(0.1)  # the usage of a tenth of a second, unless it ends before
        return Sample(
            cpu_percent=psutil.cpu_percent(None),
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
        self.rows: list[dict[str, float]] = []  # the metrics of each step, for the record

    def show(self, event: FineTuningJobEvent) -> None:
        """Move to the step of a metrics event, or log any other event's message."""
        data = event.data if isinstance(event.data, Mapping) else {}
        step, total = data.get("step"), data.get("total_steps")
        if event.type != "metrics" or not isinstance(step, int):
            logger.info("[イベント] %s", printable(event.message))
            return
        logger.debug("[イベント] %s", printable(event.message))
        numbers = {k: v for k, v in data.items() if isinstance(v, int | float)}
        self.rows.append({k: v for k, v in numbers.items() if k != "total_steps"})
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


class _Journal:
    """The answers of an evaluation, one JSON line each, written as they come.

    Opening it reads what is there; a line that was cut by a crash is ignored.
    """

    def __init__(self, path: Path) -> None:
        self.answers: dict[tuple[str, str, str], dict[str, Any]] = {}
        self._usage: dict[str, dict[str, int]] = {}
        if path.is_symlink():
            raise DataError(f"{path}: リンクには書きません。リンクを取り除いてください。")
        content = path.read_bytes() if path.exists() else b""
        for line in content.splitlines():
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                self._take(entry.pop("model_id"), entry.pop("split"), entry)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._file = os.fdopen(descriptor, "a", encoding="utf-8", newline="\n")
        if content and not content.endswith(b"\n"):
            self._file.write("\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _take(self, model_id: str, split: str, response: dict[str, Any]) -> None:
        totals = self._usage.setdefault(model_id, {"prompt_tokens": 0, "completion_tokens": 0})
        for key in totals:
            tokens = (response.get("usage") or {}).get(key)
            totals[key] += tokens if isinstance(tokens, int) else 0
        if "error" not in response:
            self.answers[model_id, split, response["case_id"]] = response

    def add(self, model_id: str, split: str, response: dict[str, Any]) -> None:
        """Keep one answer, on disk before the next is taken."""
        self._take(model_id, split, response)
        self._file.write(_dump({"model_id": model_id, "split": split, **response}) + "\n")
        self._file.flush()

    def usage_by_model(self) -> dict[str, dict[str, int]]:
        """Tokens of everything that was answered, also before a crash, a model."""
        return self._usage

    def usage(self) -> dict[str, Any]:
        """The tokens of all models together and ``by_model``."""
        keys = ("prompt_tokens", "completion_tokens")
        totals = {key: sum(usage[key] for usage in self._usage.values()) for key in keys}
        return {**totals, "by_model": self._usage}


class _Stopped(OpenAISFTError):
    """The pool was closed while this question waited for its turn."""


class _Pool:
    """Daemon threads that ask, with a bound on the requests under way that follows the endpoint.

    When the endpoint limits the rate the bound is halved, once a wave; every answer widens it
    again (additive increase, multiplicative decrease, as TCP does). Closing it ends the threads
    after the request they are in; the program's end doesn't wait for them.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._bound = float(size)
        self._wave = 0
        self._under_way = 0
        self._changed = threading.Condition()
        self._closed = False

    def map(self, ask: Callable[[Case], T], cases: Sequence[Case]) -> Iterator[T]:
        """``ask`` each case on the threads; yield what comes, as it comes; raise its error."""
        waiting = collections.deque(cases)
        answers: queue.SimpleQueue[T | BaseException] = queue.SimpleQueue()

        def work() -> None:
            while not self._closed:
                try:
                    case = waiting.popleft()
                except IndexError:
                    return
                try:
                    answers.put(ask(case))
                except BaseException as error:  # noqa: BLE001  # raised again where it is awaited
                    answers.put(error)
                    self.close()  # it would meet every other case too

        threads = [
            threading.Thread(target=work, name=f"openai-sft-ask-{number}", daemon=True)
            for number in range(min(self._size, len(cases)))
        ]
        for thread in threads:
            thread.start()
        for _ in cases:
            answer = answers.get()
            if isinstance(answer, BaseException):
                # What the others were asking is paid for as well: it is kept before the end.
                for thread in threads:
                    thread.join(timeout=30.0)
                while not answers.empty():
                    late = answers.get()
                    if not isinstance(late, BaseException):
                        yield late
                raise answer
            yield answer

    def attempt(self, request: Callable[[], T]) -> T:
        """``request()`` when there is room for it."""
        import openai

        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._under_way < int(self._bound))
            if self._closed:
                raise _Stopped
            self._under_way += 1
            wave = self._wave
        try:
            answer = request()
        except openai.RateLimitError:
            with self._changed:
                if wave == self._wave:
                    self._bound = max(1.0, self._bound / 2)
                    self._wave += 1
            raise
        else:
            with self._changed:
                self._bound = min(float(self._size), self._bound + 1 / self._bound)
            return answer
        finally:
            with self._changed:
                self._under_way -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Let no further question begin."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class _ProgressReader(io.FileIO):
    """A file that moves a tqdm bar of bytes as it is read."""

    def __init__(self, path: Path, size: int, *, enabled: bool) -> None:
        super().__init__(path)
        from tqdm.auto import tqdm

        self._bar = tqdm(
            total=size,
            desc="アップロード",
            unit="B",
            unit_scale=True,
            disable=None if enabled else True,
        )

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(-1 if size is None else size) or b""
        self._bar.update(len(data))
        return data

    def close(self) -> None:
        if not self.closed:
            self._bar.close()
        super().close()


# ── The class ────────────────────────────────────────────────────────────────────────────────


NO_KEY = (
    "OpenAI API keyが設定されていません。環境変数 OPENAI_API_KEY か .env ファイルに設定するか、"
    "OpenAISFT(api_key=...) で渡してください。キーなしで試すにはリハーサル（rehearse=True、"
    "--rehearse）を使えます。"
)
RECORDED_SETTINGS = (
    "task",
    "model",
    "dataset",
    "revision",
    "base_url",
    "system_prompt",
    "long_examples",
)
MIN_FREE_BYTES = 2**30


class OpenAISFT:
    """Fine-tuning from dialogue data to an evaluated model; the methods follow a run's order.

    Settings come from the argument, then the environment (``OPENAI_API_KEY``,
    ``OPENAI_BASE_URL``, ``OPENAI_SFT_MODEL``, ``OPENAI_SFT_DATASET``), then a ``.env`` found
    from the working directory upwards, then the default (model
    ``gpt-4o-mini-2024-07-18``, data ``UEC-InabaLab/KokoroChat``). Nothing is sent anywhere and
    no file is written before a method needs it.

    ``task`` is ``"response"`` (answer as the counsellor; the default) or ``"score"`` (predict
    the client's 20 feedback scores). ``revision`` pins a Hub data set. ``long_examples`` says
    what becomes of a conversation over the service's limit of tokens: ``split`` at a turn,
    ``drop`` or ``refuse`` (DataError).
    ``price`` replaces the price table. ``client`` is a ready ``openai.OpenAI``.
    ``offline=True`` gives the data stages alone. ``rehearse=True`` starts a local endpoint and
    uses it, whatever key or URL is set. ``allow_no_key`` puts the question for a key off until
    it is needed, for :meth:`check` and :meth:`list_runs`.
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
        allow_no_key: bool = False,
        rehearse: bool = False,
        verbose: bool = True,
        task: TaskName | None = None,
        revision: str | None = None,
        system_prompt: str | None = None,
        long_examples: LongExamples = "split",
        price: Price | None = None,
        max_single_upload_bytes: int = MAX_SINGLE_UPLOAD_BYTES,
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
        self.base_url = None if rehearse else setting(base_url, "OPENAI_BASE_URL", OPENAI_BASE_URL)
        self._base_url_given = base_url
        self.output_dir = Path(output_dir)
        self.poll_interval = poll_interval
        self.rehearse = rehearse
        self.verbose = verbose
        self.task: TaskName = task or "response"
        self._task_given = task
        self._train_data: Sequence[Example] | None = None
        self.revision = revision
        self.system_prompt = system_prompt
        self.long_examples = long_examples
        self.price = price
        self.max_cost_usd = max_cost_usd
        self.yen_per_dollar = yen_per_dollar
        self._api_key = "rehearsal" if rehearse else setting(api_key, "OPENAI_API_KEY")
        self._api_key_source = (
            "引数"
            if api_key
            else "環境変数 OPENAI_API_KEY"
            if os.environ.get("OPENAI_API_KEY")
            else ".env"
        )
        self._max_single_upload_bytes = max_single_upload_bytes
        self._organization = setting(None, "OPENAI_ORG_ID")
        self._project = setting(None, "OPENAI_PROJECT_ID")
        self._client = client
        self._owns_client = client is None
        self._offline = offline
        self._allow_no_key = allow_no_key
        self._confirm = confirm
        self._clock, self._sleep = clock, sleep
        self._endpoint: Rehearsal | None = None
        self._run: RunRecord | None = None
        self._dataset_given = dataset
        self._loaded: _Loaded | None = None
        self._licence_told = False
        self._made: Splits | None = None
        self._converted: dict[str, Example] = {}
        self._resumed = False
        self._evaluated_model = ""
        self._fresh_models: dict[str, float] = {}
        self._lacking: set[str] = set()
        if verbose and not logger.hasHandlers():
            handler = _StderrHandler()
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
        self._check_settings()

    def _check_settings(self) -> None:
        if not (self._api_key or self._client or self._offline or self._allow_no_key):
            raise ConfigurationError(NO_KEY)
        if self._api_key and not (self._api_key.isascii() and self._api_key.isprintable()):
            raise ConfigurationError(
                "OpenAI API keyに使えない文字（全角文字や改行など）が含まれています。"
                "OPENAI_API_KEY を確認してください。"
            )
        for name in ("model", "dataset", "system_prompt"):
            if not _is_text(getattr(self, name)):
                raise ConfigurationError(f"{name} にUTF-8で表せない文字が含まれています。")
        if self.base_url is not None and not _is_http_url(self.base_url):
            raise ConfigurationError(
                "base_url は http:// か https:// で始まるURLです"
                f"（指定: {printable(self.base_url)}）。"
            )
        for name, value, ok in (
            ("poll_interval", self.poll_interval, self.poll_interval >= 0),
            ("yen_per_dollar", self.yen_per_dollar, self.yen_per_dollar > 0),
            ("max_cost_usd", self.max_cost_usd, (self.max_cost_usd or 0) >= 0),
        ):
            if not ok:
                raise ConfigurationError(f"{name} の値が範囲外です（指定: {value}）。")
        if self.task not in TASKS:
            raise ConfigurationError(
                f"task は {'、'.join(TASKS)} のどれかです（指定: {printable(self.task)}）。"
            )
        if self.task == "score" and self.system_prompt:
            raise ConfigurationError(
                "task=score は決まった指示を使うため、system_prompt は指定できません。"
            )
        if self.long_examples not in ("split", "drop", "refuse"):
            raise ConfigurationError(
                f"long_examples は split、drop、refuse のどれかです（指定: {self.long_examples}）。"
            )

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
        """Close the connections, and the local endpoint of a rehearsal."""
        if self._run is not None:
            self._run.release()
        if self._client is not None and self._owns_client:
            self._client.close()
            self._client = None
        if self._endpoint is not None:
            self._endpoint.close()
            self._endpoint = None

    @property
    def client(self) -> OpenAI:
        """The SDK's client, made on first use; it leaves retrying to this class."""
        if self._offline:
            raise ConfigurationError(
                "offline=True ではサービスを使えません。データの準備だけができます。"
            )
        if self._client is None and not self._api_key:
            raise ConfigurationError(NO_KEY)
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
                max_retries=0,
                # A proxy of the environment must not see a rehearsal.
                http_client=openai.DefaultHttpxClient(trust_env=False) if self.rehearse else None,
            )
        if self._client.max_retries:
            self._client = self._client.with_options(max_retries=0)
        return self._client

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
        timeout: float | None = None,
        **options: Unpack[RunOptions],
    ) -> EvaluationResults:
        """Load, split, convert, price, upload, train, evaluate and save; return the results.

        ``options`` are :class:`RunOptions`; ``timeout`` bounds the wait for the job in
        seconds. Whatever happens to this program, :meth:`resume` goes on where it stopped.

        Raises :class:`JobFailed` for a job that ends without a model, :class:`BudgetError` and
        :class:`Declined` before anything is sent, and what the stages raise.
        """
        check_hyperparameters(epochs, batch_size, learning_rate_multiplier, suffix, seed)
        filters, evaluation = _split_options(options, max_test_cases, seed)
        self._require_ready()
        self._make_data(
            Selection(max_samples, seed, **filters),
            kind="pipeline",
            plan={
                "epochs": epochs,
                "batch_size": batch_size,
                "learning_rate_multiplier": learning_rate_multiplier,
                "suffix": suffix,
                "seed": seed,
                "evaluation": evaluation,
            },
        )
        return self._continue_pipeline(self._current_run, timeout)

    def _continue_pipeline(self, run: RunRecord, timeout: float | None = None) -> EvaluationResults:
        """Take a run whose data are made on from its first unfinished step to its end."""
        plan = run.data["plan"]
        splits = self._recorded_splits(run)
        if "job_id" not in run.data and (found := self._job_of_intent(run)):
            run.update(job_id=found)
        if "job_id" not in run.data:
            tokens = run.data["data"]["train"]["tokens"]
            self._authorise(
                self.estimate(splits, plan["epochs"], tokens, **_about_cases(plan["evaluation"]))
            )
            training_file_id = self._upload(run.file("train"), "training")
            validation_file_id = None
            if splits.valid:
                validation_file_id = self._upload(run.file("valid"), "validation")
            else:
                logger.info("検証データが0件のため、検証なしで学習します。")
            self.create_fine_tune_job(
                training_file_id,
                plan["epochs"],
                plan["batch_size"],
                validation_file_id=validation_file_id,
                learning_rate_multiplier=plan["learning_rate_multiplier"],
                suffix=plan["suffix"],
                seed=plan["seed"],
            )
        if "training_recorded_at" not in run.data:
            job = self.monitor_fine_tune_job(run.data["job_id"], timeout=timeout)
            if job.status == "succeeded" and not job.fine_tuned_model:
                self._remember(finished_at=self._now())
                raise BrokenAnswer(
                    f"学習は成功しましたが、エンドポイントはモデル名を返しませんでした（ジョブ "
                    f"{printable(job.id)}）。重みはチェックポイントのファイルにあるかもしれません。"
                )
            if job.status != "succeeded":
                code, message = _job_error(job)
                raise JobFailed(job.id, job.status, code, message)
        return self._evaluate_and_save(run.data["fine_tuned_model"], splits, plan["evaluation"])

    def resume(
        self, run: str | None = None, *, timeout: float | None = None
    ) -> EvaluationResults | None:
        """Go on with an unfinished run (the newest, or ``run_STAMP``) with its own settings.

        Returns its results, or ``None`` where there is nothing to do. Raises
        :class:`ConfigurationError` for a run that isn't here or that another process drives.
        """
        self._refuse_rehearsal("再開")
        record = self._find_unfinished(run)
        if record is None:
            logger.info("再開する実行はありません。")
            return None
        recorded = record.data["settings"].get("task") or "response"
        if self._task_given not in (None, recorded):
            raise ConfigurationError(
                f"{record.path} は task={recorded} の実行です（指定: task={self._task_given}）。"
                "指定を外してください。"
            )
        if self._run is not None:
            self._run.release()
        record.lock()
        logger.info(
            "再開します: %s（設定は記録したもの、接続先 %s）",
            record.path,
            record.data["settings"].get("base_url"),
        )
        self._run = record
        if model := record.data.get("fine_tuned_model"):
            self._fresh_models[model] = self._clock() + MODEL_LOADING_SECONDS
        self._resumed = True
        self._use_settings(record.data["settings"])
        self._require_ready()
        if record.data["kind"] == "evaluation":
            return self._continue_evaluation(record)
        return self._continue_pipeline(record, timeout)

    def _refuse_rehearsal(self, deed: str) -> None:
        if self.rehearse:
            raise ConfigurationError(
                f"リハーサルの中では{deed}できません。--rehearse を外してください。"
            )

    def _find_unfinished(self, name: str | None) -> RunRecord | None:
        if name is None:
            return next((run for run in read_runs(self.output_dir) if run.unfinished), None)
        stem = Path(name).name.removesuffix(".json")
        path = self.output_dir / f"{stem}.json"
        if not re.fullmatch(r"run_\d{8}_\d{6}", stem) or not path.is_file():
            raise ConfigurationError(
                f"実行 {printable(name)} の記録が {self.output_dir} にありません。"
                "--list で実行の一覧を見られます。"
            )
        record = RunRecord.load(path)
        return record if record.unfinished else None

    def _use_settings(self, settings: Mapping[str, Any]) -> None:
        for name in RECORDED_SETTINGS:
            setattr(self, name, settings.get(name))
        self.task = settings.get("task") or "response"
        # A limit or a price that is given now was meant for what is left.
        if self.max_cost_usd is None:
            self.max_cost_usd = settings.get("max_cost_usd")
        if self.price is None and settings.get("price"):
            self.price = Price(**settings["price"])
        if self._owns_client and self._client is not None:
            self._client.close()
            self._client = None

    def attach(
        self, job_id: str, *, timeout: float | None = None
    ) -> EvaluationResults | FineTuningJob:
        """Watch any job to its end, also one made elsewhere; save what it leaves.

        A job of an unfinished run here is taken through to the run's results; of any other the
        SDK's job object is returned.
        """
        self._refuse_rehearsal("監視")
        for run in read_runs(self.output_dir):
            if run.data.get("job_id") == job_id and run.unfinished:
                results = self.resume(run.path.stem, timeout=timeout)
                assert results is not None
                return results
        self._start_run(kind="job")
        return self.monitor_fine_tune_job(job_id, timeout=timeout)

    def cancel_job(self, job_id: str) -> FineTuningJob:
        """Cancel a job; what it has trained so far is still billed. An ended job is left alone."""
        import openai

        jobs = self.client.fine_tuning.jobs
        job = self._call(lambda: jobs.retrieve(job_id), needs="status")
        if job.status in TERMINAL_STATUSES:
            logger.info("ジョブ %s はすでに終わっています（%s）。", job_id, job.status)
            return job
        try:
            job = self._call(lambda: jobs.cancel(job_id), needs="status")
        except openai.BadRequestError:  # ended, or cancelled by a request whose answer was lost
            job = self._call(lambda: jobs.retrieve(job_id), needs="status")
            if job.status not in TERMINAL_STATUSES:
                raise
        logger.info(
            "ジョブ %s を取り消しました（%s）。取り消しまでに学習した分の料金は請求されます。",
            job_id,
            printable(job.status),
        )
        for run in read_runs(self.output_dir):
            if run.data.get("job_id") != job_id:
                continue
            if self._run is not None and run.path == self._run.path:
                self._remember(job_status=job.status)
                continue
            with contextlib.suppress(ConfigurationError):  # who watches the job records it
                run.lock()
                run.update(job_status=job.status)
                run.release()
        return job

    def list_runs(self) -> list[RunRow]:
        """The runs recorded here and the jobs at the endpoint side by side, newest first.

        Without a key (``offline``) or where the endpoint lists no jobs, the runs alone.
        """
        import openai

        jobs: dict[str, FineTuningJob] | None = None
        if self._api_key or self._client:
            try:
                listed = self._optional("ジョブの一覧", lambda: list(self._all_jobs(patience=10.0)))
                jobs = None if listed is None else {job.id: job for job in listed}
            except (openai.APIError, BrokenAnswer) as error:
                logger.warning("ジョブの一覧を取得できません: %s", explain_api_error(error))
        rows = []
        for run in read_runs(self.output_dir):
            job_id = run.data.get("job_id")
            job = jobs.get(job_id) if jobs and job_id else None
            missing = jobs is not None and job_id and job is None and not run.data.get("rehearsal")
            rows.append(
                RunRow(
                    run_id=run.data["run_id"],
                    job_id=job_id,
                    status=job.status if job else run.data.get("job_status", "-"),
                    model=run.data.get("fine_tuned_model")
                    or (job.fine_tuned_model if job else None),
                    started_at=run.data.get("started_at"),
                    orphan="no job" if missing else None,
                )
            )
        known = {row.job_id for row in rows}
        for job in (jobs or {}).values():
            if job.id in known:
                continue
            started = datetime.fromtimestamp(job.created_at or 0).astimezone()
            rows.append(
                RunRow(
                    run_id=(job.metadata or {}).get("openai_sft_run"),
                    job_id=job.id,
                    status=job.status,
                    model=job.fine_tuned_model,
                    started_at=started.isoformat(timespec="seconds"),
                    orphan="no record",
                )
            )
        return sorted(rows, key=lambda row: row.started_at or "", reverse=True)

    def _all_jobs(
        self, *, patience: float = RETRY_SECONDS, **options: Any
    ) -> Iterator[FineTuningJob]:
        jobs = self.client.fine_tuning.jobs
        page = self._call(lambda: jobs.list(limit=100, **options), patience=patience)
        seen: set[str] = set()
        while True:
            fresh = [job for job in page.data if job.id not in seen]
            yield from fresh
            seen.update(job.id for job in fresh)
            if not fresh or not page.has_next_page():
                return
            page = self._call(page.get_next_page, patience=patience)

    def check(self) -> list[CheckItem]:
        """Whether a run can work today: key, endpoint, model, dates, disk, vocabulary.

        Nothing is paid. What an endpoint doesn't offer is a warning, never a failure.
        """
        return [
            *self._check_local(),
            self._check_key(),
            *self._check_endpoint(),
            self._check_vocabulary(),
            self._check_versions(),
        ]

    def _require_ready(self) -> None:
        """The cheap part of :meth:`check`; raises ConfigurationError where a run can't work."""
        _ = self.client
        for item in self._check_local():
            if item.level == "fail":
                raise ConfigurationError(f"{item.name}: {item.text}。{item.remedy}")
            if item.level == "warn":
                logger.warning("%s", item)

    def _check_local(self) -> Iterator[CheckItem]:
        try:
            folder = self._existing_folder()
        except ConfigurationError as error:
            yield CheckItem("保存先", "fail", str(error))
            return
        if os.access(folder, os.W_OK | os.X_OK):
            yield CheckItem("保存先", "ok", f"{folder} に書き込めます")
        else:
            remedy = "--output-dir で書き込めるフォルダーを指定してください"
            yield CheckItem("保存先", "fail", f"{folder} に書き込めません", remedy)
        free = shutil.disk_usage(folder).free
        level: Literal["ok", "warn"] = "ok" if free > MIN_FREE_BYTES else "warn"
        remedy = "" if level == "ok" else "不要なファイルを削除してください"
        yield CheckItem("ディスク", level, f"空き {free / 2**30:.1f}GB", remedy)
        today = datetime.fromtimestamp(self._clock()).date()
        if not self.rehearse and self._host == OPENAI_HOST:
            left = (date.fromisoformat(LAST_NEW_JOB_DATE) - today).days
            until = f"あと{left}日" if left > 0 else "終了"
            yield CheckItem(
                "OpenAIの新規ジョブ",
                "warn",
                f"経験のない組織は{CLOSED_TO_NEW_SINCE}、直近60日に学習済みモデルを使っていない組織は"
                f"{CLOSED_TO_IDLE_SINCE}に受付終了。ほかは{LAST_NEW_JOB_DATE}まで（{until}）。"
                f"GPT-4o miniと学習済みモデルは{MODEL_SHUTDOWN_DATE}に停止",
                "受け付けられない場合は --base-url で別のエンドポイントを使ってください",
            )
        age = (today - date.fromisoformat(f"{PRICES_AS_OF}-01")).days
        text = f"{PRICES_AS_OF}時点（{age}日前）"
        if self.price is not None:
            yield CheckItem("料金表", "ok", "指定された単価を使います")
        elif price_of(self.model) is None:
            remedy = "--price-training などで指定してください"
            yield CheckItem("料金表", "warn", f"{self.model} の単価がありません", remedy)
        elif age > 180:
            yield CheckItem("料金表", "warn", text, f"{PRICES_SOURCE} で確かめてください")
        else:
            yield CheckItem("料金表", "ok", text)

    @property
    def _host(self) -> str:
        return urllib.parse.urlsplit(self.base_url or "").hostname or ""

    def _check_key(self) -> CheckItem:
        if not self._api_key:
            if self._owns_client:
                return CheckItem(
                    "APIキー", "fail", "ありません", "OPENAI_API_KEY に設定してください"
                )
            return CheckItem("APIキー", "ok", "渡された client のものを使います")
        if self.rehearse:
            return CheckItem("APIキー", "ok", "リハーサルでは使いません")
        ending = f"…{self._api_key[-4:]}" if len(self._api_key) >= 12 else "短すぎる値"
        return CheckItem("APIキー", "ok", f"{self._api_key_source}から（{ending}）")

    def _check_endpoint(self) -> Iterator[CheckItem]:
        import openai

        if self._offline or not (self._api_key or self._client):
            yield CheckItem("エンドポイント", "warn", "キーがないため確かめていません")
            return
        try:
            client = self.client
            address = str(client.base_url)
            model = self._call(lambda: client.models.retrieve(self.model), patience=5.0)
        except openai.APIStatusError as error:
            if error.status_code == 404 and error.code == "model_not_found":
                yield CheckItem("エンドポイント", "ok", address)
                remedy = "--model か --base-url を確認してください"
                yield CheckItem("モデル", "fail", f"{self.model} がありません", remedy)
            elif error.status_code in MISSING_STATUSES:
                yield CheckItem("エンドポイント", "ok", address)
                yield CheckItem("モデル", "warn", f"{self.model} を確かめられません")
            else:
                yield CheckItem("エンドポイント", "fail", address, explain_api_error(error))
            return
        except (openai.OpenAIError, BrokenAnswer, ConfigurationError) as error:
            text = self.base_url or "不明"
            yield CheckItem("エンドポイント", "fail", text, explain_api_error(error))
            return
        yield CheckItem("エンドポイント", "ok", f"{address} につながりました")
        shutdown = _shutdown_date(model)
        if shutdown is None and self._host == OPENAI_HOST and price_of(self.model):
            shutdown = date.fromisoformat(MODEL_SHUTDOWN_DATE)
        if shutdown is None:
            yield CheckItem("モデル", "ok", f"{self.model}（停止日の情報なし）")
            return
        left = (shutdown - datetime.fromtimestamp(self._clock()).date()).days
        text = f"{self.model} は{shutdown}に停止します（あと{left}日）"
        remedy = "学習したモデルも同じ日に停止します。別のモデルを検討してください"
        yield CheckItem("モデル", "warn" if left > 0 else "fail", text, remedy)

    def _check_vocabulary(self) -> CheckItem:
        if load_vocabulary() is None:
            remedy = "TIKTOKEN_CACHE_DIR に語彙ファイルを置くと正確になります"
            return CheckItem(
                "トークンの語彙", "warn", f"{VOCABULARY} がなく、推定になります", remedy
            )
        return CheckItem("トークンの語彙", "ok", f"{VOCABULARY} で正確に数えられます")

    def _check_versions(self) -> CheckItem:
        versions = " ".join(f"{name} {version}" for name, version in _versions().items())
        return CheckItem("バージョン", "ok", versions)

    def prepare_data(
        self,
        epochs: int | Literal["auto"] = 10,
        max_samples: int | None = None,
        seed: int = 42,
        max_test_cases: int | None = 10,
        **options: Unpack[RunOptions],
    ) -> DataSummary:
        """Load, split, convert and write the three files, and price them. Needs no key."""
        check_hyperparameters(epochs, "auto", seed=seed)
        filters, evaluation = _split_options(options, max_test_cases, seed)
        splits, tokens = self._make_data(Selection(max_samples, seed, **filters), kind="data")
        loaded = self._loaded
        return DataSummary(
            examples={name: len(part) for name, part in zip(SPLIT_NAMES, splits, strict=True)},
            tokens=tokens,
            files=self.files,
            estimate=self.estimate(
                splits, epochs, tokens["train"].total, **_about_cases(evaluation)
            ),
            removed=loaded.removed if loaded else {},
            leakage=loaded.leakage if loaded else {},
        )

    def run_evaluation(
        self,
        model_id: str | None = None,
        max_samples: int | None = None,
        seed: int | None = None,
        max_test_cases: int | None = 10,
        **options: Unpack[RunOptions],
    ) -> EvaluationResults:
        """Evaluate ``model_id``, or the newest model tuned here; save and return the results.

        A model tuned here is asked the split recorded with its run; options that would change
        that split raise :class:`ConfigurationError`. For one made elsewhere the split is made
        from the options (``seed`` 42), and nothing tells what the model was trained on.
        """
        filters, evaluation = _split_options(options, max_test_cases, 42 if seed is None else seed)
        folder = self.output_dir
        run = find_run(folder, model_id)
        if run is None and model_id is None:
            raise ConfigurationError(
                f"評価するモデルがありません。{folder} に学習済みモデルの記録がないため、"
                "--model-id（model_id=）で指定してください。"
            )
        if run is not None:
            self._use_endpoint_of(run)
        self._require_ready()
        if run is not None:
            model_id = model_id or run.data["fine_tuned_model"]
        if run is not None and "selection" in run.data:
            given = {"max_samples": max_samples, "seed": seed, **filters}
            self._require_same_split(run, given)
            self.task = run.data["settings"].get("task") or "response"
            evaluation["seed"] = run.data["selection"]["seed"]
        else:
            logger.warning(
                "モデル %s の学習記録がないため、分割は指定から作り直します。このモデルが学習した"
                "対話が評価に混ざっている可能性を否定できません。",
                model_id,
            )
            run = None
        self._start_run(
            kind="evaluation",
            plan={
                "model_id": model_id,
                "split_of": run.path.stem if run else None,
                "selection": asdict(Selection(max_samples, evaluation["seed"], **filters)),
                "evaluation": evaluation,
            },
        )
        return self._continue_evaluation(self._current_run)

    def _continue_evaluation(self, run: RunRecord) -> EvaluationResults:
        plan = run.data["plan"]
        if plan["split_of"]:
            source = RunRecord.load(self.output_dir / f"{plan['split_of']}.json")
            splits = self._recorded_splits(source)
        else:
            splits = self._convert(self._load(Selection(**plan["selection"])))
        model, evaluation = plan["model_id"], plan["evaluation"]
        self._authorise(self.estimate(splits, None, model=model, **_about_cases(evaluation)))
        return self._evaluate_and_save(model, splits, evaluation)

    def _use_endpoint_of(self, run: RunRecord) -> None:
        """A tuned model answers where it was tuned, unless another place is asked for."""
        recorded = run.data["settings"].get("base_url")
        if self._base_url_given or not self._owns_client or recorded in (None, self.base_url):
            return
        logger.info("記録したエンドポイントを使います: %s", recorded)
        self.base_url = recorded
        if self._client is not None:
            self._client.close()
            self._client = None

    def _require_same_split(self, run: RunRecord, given: Mapping[str, Any]) -> None:
        recorded = {"task": "response", **run.data["selection"], **run.data["settings"]}
        asked = {
            **given,
            "dataset": self._dataset_given,
            "task": self._task_given,
            "revision": self.revision,
            "system_prompt": self.system_prompt,
        }
        changed = [
            f"{name}: 記録 {recorded.get(name)} → 指定 {value}"
            for name, value in asked.items()
            if value is not None
            and value is not False
            and _dump(value) != _dump(recorded.get(name))
        ]
        if changed:
            raise ConfigurationError(
                f"このモデルは {run.path} の分割で学習しました。別の分割で評価すると、学習した"
                f"対話が混ざります（{'、'.join(changed)}）。これらの指定を外してください。"
            )

    def _recorded_splits(self, run: RunRecord) -> Splits:
        """The examples of a run's three files, with their ids; the files must be unchanged."""
        if run is not self._run or self._resumed:
            logger.info("記録した分割を使います: %s", run.path)
        elif self._made is not None:
            return self._made
        parts = []
        for name in SPLIT_NAMES:
            facts = run.data["data"][name]
            path = run.file(name)
            if not path.exists() or sha256_of(path) != facts["sha256"]:
                raise DataError(
                    f"{path}: 学習時のデータファイルがないか、変わっています（{run.path} の記録と"
                    "sha256が違います）。元に戻すか、--model-id と別の --output-dir で、記録の"
                    "ないモデルとして評価してください。"
                )
            examples = read_examples(path)
            try:
                manifest = json.loads(run.file("manifest").read_text(encoding="utf-8"))
                ids = [line["id"] for line in manifest["splits"][name]["lines"]]
                named = list(zip(examples, ids, strict=True))
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{run.file('manifest')}: 分割の記録がないか、変わっています。"
                    "元に戻してください。"
                ) from error
            parts.append([cast("Example", {**e, "id": id_}) for e, id_ in named])
        return Splits(*parts)

    def _make_data(
        self, selection: Selection, *, kind: str, plan: Mapping[str, Any] | None = None
    ) -> tuple[Splits, dict[str, TokenStats]]:
        """Load, split, convert, check and save; count the tokens beside it.

        The run record appears once everything in it is on disk.
        """
        workers = os.cpu_count() or 1
        with (
            _gc_paused(),
            ThreadPoolExecutor(workers, thread_name_prefix="openai-sft-tokens") as executor,
        ):
            counting = _Counting(executor)

            def begin(dialogue: Dialogue) -> None:
                example = self._make_example(dialogue)
                if example is not None:
                    self._converted[dialogue.id] = example
                    counting.add(example)

            # What is read is converted and counted at once, where all of it will be used.
            everything = Selection(seed=selection.seed, group_by=selection.group_by)
            try:
                splits = self._convert(
                    self._load(selection, begin if selection == everything else None)
                )
            finally:
                self._converted.clear()
            self._require_examples(len(splits.train))
            for part in splits:
                counting.add_missing(part)
            stamp = self._new_stamp()
            facts = self._write_datasets(stamp, splits)
            counts = counting.finish()
            tokens: dict[str, TokenStats] = {
                name: token_stats([counts[example["id"]] for example in part])
                for name, part in zip(SPLIT_NAMES, splits, strict=True)
            }
        for name, stats in tokens.items():
            facts["data"][name]["tokens"] = stats.total
        self._start_run(stamp, kind=kind, plan=plan, exact_tokens=counting.exact, **facts)
        self._made = splits
        return splits, tokens

    def _load(self, selection: Selection, each: Callable[[Dialogue], None] | None = None) -> Splits:
        """Read, choose and split the dialogues; what was left out and leaks is logged.

        ``each`` is given every dialogue as it is read.
        """
        splits, self._loaded = self._read_and_split(selection, each)
        return splits

    def _convert(self, splits: Splits) -> Splits:
        parts = zip(splits, SPLIT_NAMES, strict=True)
        return Splits(*(self.prepare_dataset(part, name) for part, name in parts))

    def _evaluate_and_save(
        self, model_id: str, splits: Splits, options: Mapping[str, Any]
    ) -> EvaluationResults:
        results = self.evaluate_model_comprehensive(
            model_id, splits.test, splits.valid, train_data=splits.train, **options
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
        self._remember(finished_at=self._now())
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
        self, max_samples: int | None = None, seed: int = 42, **filters: Unpack[SelectionOptions]
    ) -> tuple[Dataset, Dataset, Dataset]:
        """Return train, test and valid as ``datasets.Dataset``; see :func:`split_dialogues`.

        ``filters`` are those of :class:`Selection`. Columns: ``id``, ``dialogue`` (``role`` and
        ``utterance``), ``topic``, ``review_by_client_jp``, ``review_by_client_en``; for data in
        the service's form ``id``, ``messages``, ``tools`` (JSON texts).
        """
        from datasets import Dataset

        splits = self._load(Selection(max_samples, seed, **filters))
        # One table cut in three, so that a field that is null throughout one part keeps the
        # type it has in another.
        rows = [dialogue_row(dialogue) for part in splits for dialogue in part]
        columns = dict.fromkeys(key for row in rows for key in row)
        if any(isinstance(m, str) for row in rows for m in row.get("messages") or ()):
            for row in rows:  # a column holds one type
                if "messages" in row:
                    texts = [m if isinstance(m, str) else _encode_json(m) for m in row["messages"]]
                    row["messages"] = texts
        rows = [{column: row.get(column) for column in columns} for row in rows]
        table = Dataset.from_list(rows)
        ends = list(itertools.accumulate(map(len, splits), initial=0))
        train, test, valid = (
            table.select(list(range(start, end))) for start, end in itertools.pairwise(ends)
        )
        return train, test, valid

    def _read_and_split(
        self, selection: Selection, each: Callable[[Dialogue], None] | None
    ) -> tuple[Splits, _Loaded]:
        if self.dataset is None:
            from openai_sft_rehearsal import example_dialogues

            logger.info("リハーサル用の対話を使います（--dataset で変えられます）。")
            dialogues = [
                parse_dialogue(record, fallback_id=str(number), source=f"例[{number}]")
                for number, record in enumerate(example_dialogues(), 1)
            ]
        else:
            logger.info("データを読み込んでいます: %s", self.dataset)
            dialogues = read_dialogues(self.dataset, revision=self.revision, each=each)
            if not self._licence_told and (
                "kokorochat" in self.dataset.casefold() or dialogues[0].review_en
            ):
                self._licence_told = True
                logger.info("%s", KOKOROCHAT_LICENCE)
        kept, removed = select_dialogues(dialogues, selection)
        if removed:
            logger.info("%s", removed_line(removed))
        if not kept:
            raise DataError("条件に合う対話が1件もありません。絞り込みの指定を緩めてください。")
        if selection.max_samples is not None and selection.max_samples > len(kept):
            logger.info(
                "max_samples=%s は対話の数（%s件）より多いため、すべて使います。",
                f"{selection.max_samples:,}",
                f"{len(kept):,}",
            )
        splits = split_dialogues(
            kept,
            seed=selection.seed,
            max_samples=selection.max_samples,
            group_by=selection.group_by,
        )
        logger.info(
            "対話 %s件 → 学習 %s / テスト %s / 検証 %s（seed=%s）",
            *(f"{n:,}" for n in (len(kept), *map(len, splits))),
            selection.seed,
        )
        leakage = {} if selection.group_by else measure_leakage(splits)
        if leakage:
            logger.info("%s", leakage_line(leakage))
        sources = {dialogue.id: dialogue.source for part in splits for dialogue in part}
        return splits, _Loaded(selection, removed, leakage, sources)

    def prepare_dataset(
        self, dataset: Iterable[Dialogue | Mapping[str, Any]], split: str = "data"
    ) -> list[Example]:
        """Convert dialogues, or the rows of a ``Dataset``, to examples with ids.

        A dialogue with nothing to learn from is left out, counted and named. Those of
        more than :data:`MAX_EXAMPLE_TOKENS` become several, are left out or refused
        (:class:`DataError`), as ``long_examples`` says.
        """
        task = TASKS[self.task]
        examples: list[Example] = []
        left_out = []
        for number, row in enumerate(dataset, 1):
            dialogue = row
            if not isinstance(dialogue, Dialogue):
                name = f"{split}-{number}"
                dialogue = parse_dialogue(row, fallback_id=name, source=f"{split}[{number}]")
            example = self._converted.get(dialogue.id) or self._make_example(dialogue)
            if example is None:
                left_out.append(dialogue.id)
            else:
                examples.extend(self._fit_length(example))
        if left_out:
            logger.warning(
                "%s: %s対話を%d件除きました（ID: %s%s）",
                split,
                task.left_out,
                len(left_out),
                "、".join(left_out[:10]),
                " ほか" if len(left_out) > 10 else "",
            )
        if split == "train":
            self._train_data = examples
        return examples

    def _make_example(self, dialogue: Dialogue) -> Example | None:
        return TASKS[self.task].make_example(dialogue, system_prompt=self.system_prompt)

    def _fit_length(self, example: Example) -> list[Example]:
        messages = example["messages"]
        # No token is shorter than a byte, and no character takes more than four.
        size = sum(len(text) for message in messages for text in _billed_texts(message)[0])
        if 4 * size + 4 * len(messages) + 3 <= MAX_EXAMPLE_TOKENS:
            return [example]
        counter = TokenCounter(load_vocabulary())
        # An estimate may be off by some percent: keep a distance.
        limit = MAX_EXAMPLE_TOKENS if counter.exact else MAX_EXAMPLE_TOKENS * 9 // 10
        tokens = counter.count(messages).total
        if tokens <= limit:
            return [example]
        place = f"対話「{example['id']}」は{tokens:,}トークンで、上限{limit:,}を超えています"
        if self.long_examples == "refuse":
            raise DataError(f"{place}。--long-examples split か drop を指定してください。")
        if self.long_examples == "drop":
            logger.warning("%s。除きました。", place)
            return []
        parts = split_long_example(example, counter, limit)
        logger.warning("%s。発話の切れ目で%d件に分けました。", place, len(parts))
        return parts

    def save_all_datasets(
        self,
        train_data: Sequence[Example],
        test_data: Sequence[Example],
        valid_data: Sequence[Example],
    ) -> dict[str, str]:
        """Check and write the three JSONL files of a run (``messages`` only); return their paths.

        Beside them goes ``manifest_STAMP.json``: which dialogue stands on which line, with the
        seed, the filters and the sha256 of each file. Problems that the service would refuse
        raise :class:`DataError` before anything is written.
        """
        stamp = self._new_stamp()
        facts = self._write_datasets(stamp, Splits(*map(list, (train_data, test_data, valid_data))))
        self._start_run(stamp, kind="steps", **facts)
        return {name: facts["files"][name] for name in SPLIT_NAMES}

    def _write_datasets(self, stamp: str, splits: Splits) -> dict[str, Any]:
        """Check and write the files of the data stages; return what the record says of them."""
        try:
            return self._check_and_write(stamp, splits)
        except BaseException:
            _lock_path(self.output_dir, stamp).unlink(missing_ok=True)
            raise

    def _check_and_write(self, stamp: str, splits: Splits) -> dict[str, Any]:
        loaded = self._loaded
        sources = loaded.sources if loaded else {}
        paths: dict[str, str] = {}
        lines: dict[str, list[bytes]] = {}
        manifest: dict[str, Any] = {
            "version": 1,
            "dataset": self.dataset or "openai_sft_rehearsal",
            "revision": self.revision,
            "system_prompt": self.system_prompt,
            "selection": asdict(loaded.selection) if loaded else None,
            "removed": loaded.removed if loaded else None,
            "leakage": loaded.leakage if loaded else None,
            "splits": {},
        }
        findings: list[Finding] = []
        seen: dict[tuple[str, bytes], int] = {}
        for name, examples in zip(SPLIT_NAMES, splits, strict=True):
            path = self.output_dir / f"{name}_data_{stamp}.jsonl"
            lines[name] = []
            for number, example in enumerate(examples, 1):
                value = {key: item for key, item in example.items() if key != "id"}
                problems = list(find_problems(value))
                try:
                    line = example_line(example)
                    problems += _find_text_problems(line)
                except ValueError as error:
                    line = ""
                    problems.append(Problem("invalid_json", None, (printable(error),)))
                encoded = line.encode(errors="replace") + b"\n"
                lines[name].append(encoded)
                first = seen.setdefault((name, encoded), number)
                if first != number:
                    problems.append(Problem("duplicate_line", None, (first,)))
                if name == "valid" and (shared := seen.get(("train", encoded))):
                    problems.append(Problem("shared_conversation", None, (shared,)))
                findings += [_finding(str(path), number, problem) for problem in problems]
            paths[name] = str(path)
            manifest["splits"][name] = {
                "file": path.name,
                "examples": len(examples),
                "lines": [
                    {"id": id_, "source": sources.get(id_) or sources.get(id_.rpartition("/")[0])}
                    for id_ in (example["id"] for example in examples)
                ],
            }
        require_no_errors(findings)
        for kind, content in lines.items():
            digest = hashlib.sha256()
            for encoded in content:
                digest.update(encoded)
            manifest["splits"][kind]["sha256"] = digest.hexdigest()
            write_new_file(Path(paths[kind]), content)
            count = manifest["splits"][kind]["examples"]
            logger.info("保存しました: %s（%s件）", paths[kind], f"{count:,}")
        manifest_path = self.output_dir / f"manifest_{stamp}.json"
        write_new_file(manifest_path, to_json(manifest))
        return {
            "files": {**paths, "manifest": str(manifest_path)},
            "data": {
                name: {key: facts[key] for key in ("sha256", "examples")}
                for name, facts in manifest["splits"].items()
            },
            **({"selection": manifest["selection"]} if loaded else {}),
        }

    def _new_stamp(self) -> str:
        """Claim a stamp of now, or of the next second that is free, by its lock file."""
        folder = self._existing_folder()
        now = self._clock()
        for second in itertools.count():
            stamp = datetime.fromtimestamp(now + second).strftime("%Y%m%d_%H%M%S")
            if any(folder.glob(f"*_{stamp}.*")):
                continue
            with contextlib.suppress(FileExistsError):  # another process has just claimed it
                _lock_path(folder, stamp).touch(0o600, exist_ok=False)
                return stamp
        raise AssertionError("unreachable")

    def _start_run(self, stamp: str | None = None, **facts: Any) -> RunRecord:
        """Begin a run record, under ``stamp`` or a new one, and make it the current one."""
        if self._run is not None:
            self._run.release()
        self._resumed = False
        self._made = None
        facts = {
            "rehearsal": self.rehearse,
            "started_at": self._now(),
            "versions": _versions(),
            "settings": {
                **{name: getattr(self, name) for name in RECORDED_SETTINGS},
                "max_cost_usd": self.max_cost_usd,
                "price": asdict(self.price) if self.price else None,
            },
            **facts,
        }
        while True:
            try:
                self._run = RunRecord.create(self.output_dir, stamp or self._new_stamp(), **facts)
                return self._run
            except FileExistsError:  # taken by another process just now
                if stamp is not None:
                    raise

    @property
    def _current_run(self) -> RunRecord:
        return self._run or self._start_run(kind="steps")

    def _now(self) -> str:
        return datetime.fromtimestamp(self._clock()).astimezone().isoformat(timespec="seconds")

    def estimate(
        self,
        splits: Splits,
        epochs: int | Literal["auto"] | None,
        training_tokens: int = 0,
        *,
        model: str | None = None,
        max_test_cases: int | None = 10,
        seed: int = 42,
        eval_turns: EvalTurns = 1,
        baseline: str | bool | None = None,
    ) -> CostEstimate:
        """Price training on ``training_tokens`` (``epochs=None``: none) and the evaluation.

        The evaluation's answers are taken to be as long as the real ones.
        """
        counter = TokenCounter(load_vocabulary())
        cases = [
            case
            for part in (splits.test, splits.valid)
            for case in choose_cases(part, max_cases=max_test_cases, seed=seed, turns=eval_turns)
        ]
        model = model or self.model
        return estimate_cost(
            training_tokens,
            epochs,
            model=model,
            baseline=self._baseline_model(model, baseline),
            evaluation_input_tokens=sum(counter.count(case.input).total for case in cases),
            evaluation_output_tokens=counter.count_texts([case.reference for case in cases]),
            price=self.price,
            yen_per_dollar=self.yen_per_dollar,
            exact_tokens=counter.exact,
        )

    def _baseline_model(self, model_id: str, baseline: str | bool | None) -> str | None:
        if baseline is True:
            return model_id.split(":")[1] if model_id.startswith("ft:") else self.model
        return baseline or None

    def _authorise(self, estimate: CostEstimate) -> None:
        """Show the price, hold it against the limit and ask; raises before anything is sent.

        The limit is the whole run's: what its earlier attempts have cost counts as well.
        """
        run = self._current_run
        # The answers that a resumed evaluation has are in its estimate.
        spent = run.data.get("cost", {}).get("training_usd", 0.0)
        for line in estimate.lines():
            logger.info("%s", line)
        if spent:
            logger.info("この実行でこれまでにかかった料金: $%.4f", spent)
        if self.rehearse:
            logger.info("リハーサルのため、実際の課金はありません。")
            return
        run.update(estimate={**asdict(estimate), "total_usd": estimate.total_usd})
        if self.max_cost_usd is not None:
            limit = f"上限 ${self.max_cost_usd:,.4f}"
            if estimate.total_usd is None:
                raise BudgetError(
                    f"料金が不明で、{limit} を守れるか判断できないため中止しました。"
                    "--price-training などで単価を指定するか、--max-cost-usd を外してください。"
                )
            if estimate.total_usd + spent > self.max_cost_usd:
                paid = f"とこれまでの ${spent:,.4f} " if spent else " "
                raise BudgetError(
                    f"見積もり ${estimate.total_usd:,.4f}{paid}が{limit} を超えるため中止しました。"
                    "この先は何も送信していません。--max-samples か --epochs を減らすか、"
                    "--max-cost-usd を上げてください。"
                )
        if self._confirm is not None and not self._confirm(estimate):
            raise Declined("中止しました。この先は何も送信していません。")

    # Training ------------------------------------------------------------------------------

    def upload_training_file(self, path: str | os.PathLike[str]) -> str:
        """Check and upload a training file; return its id. Any error raises DataError."""
        require_no_errors(check_file(path))
        return self._upload(path, "training")

    def upload_validation_file(self, path: str | os.PathLike[str]) -> str:
        """Check and upload a validation file (one example is enough); return its id."""
        require_no_errors(check_file(path, kind="validation", compare_with=self.files.get("train")))
        return self._upload(path, "validation")

    def _upload(self, path: str | os.PathLike[str], part: str) -> str:
        """Upload a file, unless this data is there already; its intent is recorded first."""
        path = Path(path)
        run = self._current_run
        size = path.stat().st_size
        facts: dict[str, Any] = {"name": path.name, "bytes": size, "sha256": sha256_of(path)}
        before = run.data.get("uploads", {})
        facts["intent_time"] = before.get(part, {}).get("intent_time", self._clock())
        facts["other_content"] = sorted(
            upload["file_id"]
            for known in read_runs(self.output_dir)
            for upload in known.data.get("uploads", {}).values()
            if "file_id" in upload and upload["sha256"] != facts["sha256"]
        )
        file_id = self._uploaded_before(facts)
        if file_id is None and "file_id" not in before.get(part, {"file_id": None}):
            file_id = self._look_for(lambda: self._find_file(facts))
        if file_id is not None:
            logger.info("アップロード済みのファイルを使います: %s（%s）", path.name, file_id)
            facts["reused"] = file_id not in {u.get("file_id") for u in before.values()}
        else:
            logger.info("アップロードしています: %s（%.1f MB）", path, size / 1e6)
            run.update(uploads={**before, part: facts})
            file_id = self._send_once(
                lambda: self._send_file(path, size), lambda: self._find_file(facts)
            )
        run.update(uploads={**before, part: {**facts, "file_id": file_id}})
        return file_id

    def _uploaded_before(self, facts: Mapping[str, Any]) -> str | None:
        """The id of a file that a run here uploaded to this endpoint, if it is still there."""
        if self.rehearse:
            return None
        for run in read_runs(self.output_dir):
            if run.data.get("rehearsal") or run.data["settings"]["base_url"] != self.base_url:
                continue
            for upload in run.data.get("uploads", {}).values():
                if upload["sha256"] != facts["sha256"] or "file_id" not in upload:
                    continue
                file_id = str(upload["file_id"])
                kept = self._optional(
                    "ファイルの照会",
                    functools.partial(self.client.files.retrieve, file_id),
                    gone_is_missing=False,
                )
                if kept is not None and kept.bytes == facts["bytes"] and kept.status != "error":
                    return file_id
        return None

    def _find_file(self, facts: Mapping[str, Any]) -> str | None:
        page = self._call(lambda: self.client.files.list(purpose="fine-tune"), needs="data")
        for file in page.data:
            same = (file.filename, file.bytes) == (facts["name"], facts["bytes"])
            # A stamp a run makes names unique; the hour is for clocks that disagree.
            late = file.created_at >= facts["intent_time"] - 3600
            other = file.purpose != "fine-tune" or file.id in facts["other_content"]
            if same and late and not other:
                return file.id
        return None

    def _send_file(self, path: Path, size: int) -> str:
        client = self.client.with_options(timeout=600.0)
        with _ProgressReader(path, size, enabled=self.verbose) as file:
            if size <= self._max_single_upload_bytes:
                create = functools.partial(client.files.create, purpose="fine-tune")
                sent = self._call(lambda: create(file=(path.name, file)), patience=0, needs="id")
                return sent.id
            # The SDK's helper for this neither repeats a part that fails nor shows how far it is.
            upload = self._call(
                lambda: client.uploads.create(
                    bytes=size,
                    filename=path.name,
                    mime_type="application/jsonl",
                    purpose="fine-tune",
                )
            )
            part_ids = []
            while chunk := file.read(min(UPLOAD_PART_BYTES, self._max_single_upload_bytes)):
                send = functools.partial(client.uploads.parts.create, upload.id, data=chunk)
                # A part whose answer is lost may count twice: then the whole begins again.
                part_ids.append(self._call(send, patience=0, needs="id").id)
            complete = functools.partial(client.uploads.complete, upload.id, part_ids=part_ids)
            done = self._call(complete, patience=0, needs="file")
            return str(done.file.id)  # type: ignore[union-attr]  # `needs` has settled it

    def _send_once(self, send: Callable[[], T], find: Callable[[], T | None]) -> T:
        """Carry out what must not happen twice: after a lost answer, look before sending again.

        Raises the SDK's error or :class:`BrokenAnswer` after :data:`RETRY_SECONDS`.
        """
        import openai

        started = self._clock()
        for attempt in itertools.count():
            try:
                return send()
            except (openai.APIError, BrokenAnswer) as error:
                if not is_transient(error):
                    raise
                failure: Exception = error
            # A refusal for the rate tells that nothing happened; of any other failure only the
            # service knows whether the request was carried out.
            if getattr(failure, "status_code", None) != 429:
                logger.info(
                    "応答を受け取れませんでした。リクエストがサービスに届いたかを確認します。"
                )
                found = self._look_for(find)
                if found is not None:
                    return found
            delay = retry_delay(attempt, _retry_after(failure), random.random())
            if self._clock() + delay - started > RETRY_SECONDS:
                raise failure
            self._sleep(delay)
        raise AssertionError("unreachable")

    def _look_for(self, find: Callable[[], T | None]) -> T | None:
        for delay in LOOK_DELAYS:
            if delay:
                self._sleep(delay)
            found = find()
            if found is not None:
                return found
        return None

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

        What is asked is recorded before it is sent, and the job carries the run's id, the
        data's hash and a token of this one request as ``metadata``. Where the answer is lost,
        the job with that token is looked for before anything is sent again. Raises
        :class:`TrainingNotAvailable` after deleting the files just uploaded.
        """
        import openai

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
        if "job_id" in self._current_run.data:
            known = self._current_run.data
            kept = ("kind", "plan", "selection", "data", "files", "uploads")
            self._start_run(**{key: known[key] for key in kept if key in known})
        run = self._current_run
        found = self._job_of_intent(run)
        if found is not None:
            run.update(job_id=found)
            sent = run.data["job_intent"]["request"]
            if any(sent.get(k) != v for k, v in request.items() if not k.endswith("_file")):
                raise ConfigurationError(
                    f"別の設定で送信したジョブ {printable(found)} がサービスにあります。"
                    "--job-id で見守るか、--cancel で取り消してから、もう一度作成してください。"
                )
            logger.info("前に送信したジョブを引き継ぎます: %s", printable(found))
            return found
        token = uuid.uuid4().hex
        run.update(job_intent={"token": token, "at": self._now(), "request": request})
        metadata = {
            "openai_sft_run": run.data["run_id"],
            "openai_sft_data": run.data.get("data", {}).get("train", {}).get("sha256", "unknown"),
            "openai_sft_intent": token,
        }
        jobs = self.client.fine_tuning.jobs
        try:
            found = self._send_once(
                lambda: (
                    self._call(
                        lambda: jobs.create(**request, metadata=metadata), patience=0, needs="id"
                    ).id
                ),
                lambda: self._find_job(token),
            )
        except openai.PermissionDeniedError as error:
            if error.code != "training_not_available":
                raise
            endpoint = str(self.client.base_url)
            raise TrainingNotAvailable(endpoint, self._delete_uploads(run)) from error
        run.update(job_id=found)
        logger.info("ファインチューニングジョブを作成しました: %s", printable(found))
        return found

    def _job_of_intent(self, run: RunRecord) -> str | None:
        """The job that an earlier attempt of ``run`` may have made without learning its id."""
        if "job_intent" not in run.data:
            return None
        token = run.data["job_intent"]["token"]
        found = self._look_for(lambda: self._find_job(token))
        if found is None:
            del run.data[
                "job_intent"
            ]  # it never arrived; the next one is written before it is sent
            run.update()
        return found

    def _find_job(self, token: str) -> str | None:
        # Compared here too, for an endpoint may ignore the filter.
        for job in self._all_jobs(metadata={"openai_sft_intent": token}):
            if (job.metadata or {}).get("openai_sft_intent") == token:
                return job.id
        return None

    def _delete_uploads(self, run: RunRecord) -> list[str]:
        """Delete what this run uploaded itself; return the ids that are gone."""
        import openai

        deleted = []
        uploads = run.data.get("uploads", {})
        for upload in uploads.values():
            file_id = upload.get("file_id")
            if not file_id or upload.get("reused"):
                continue
            try:
                self._call(functools.partial(self.client.files.delete, file_id))
            except openai.NotFoundError:  # gone by a request whose answer was lost
                pass
            except (openai.APIError, BrokenAnswer) as error:
                reason = explain_api_error(error)
                logger.warning("ファイル %s は削除できず、残っています: %s", file_id, reason)
                continue
            deleted.append(str(file_id))
        run.update(uploads={k: u for k, u in uploads.items() if u.get("file_id") not in deleted})
        return deleted

    def monitor_fine_tune_job(self, job_id: str, *, timeout: float | None = None) -> FineTuningJob:
        """Poll until the job ends; return it, whatever its end. Events are logged as they come.

        Waits ``poll_interval`` seconds between polls, less at first. Failed polls are survived,
        however many; an unknown status waits. After ``timeout`` seconds raises
        :class:`WaitTimeout` and leaves the job alone. The outcome, with the tuned model, its
        checkpoints, the metrics and the cost, is saved in the run record.
        """
        self._turn_to_run_of(job_id)
        deadline = None if timeout is None else self._clock() + timeout
        seen: set[str] = set()
        status = ""
        bar = _TrainingBar(enabled=self.verbose)
        with SystemMonitor(self._existing_folder()), contextlib.closing(bar):
            for delay in self._poll_delays():
                polled = self._survive(lambda: self._poll(job_id, seen), deadline)
                if polled is not None:
                    job, events = polled
                    for event in events:
                        bar.show(event)
                    if job.status != status:
                        status = job.status
                        waiting = (
                            ""
                            if status in KNOWN_STATUSES
                            else "（未知の状態です。このまま待ちます）"
                        )
                        logger.info("ジョブ %s の状態: %s%s", job_id, printable(status), waiting)
                        self._remember(job_status=status)
                    if status in TERMINAL_STATUSES:
                        break
                if timeout is not None and deadline is not None:
                    if self._clock() >= deadline:
                        raise WaitTimeout(job_id, status, timeout)
                    delay = min(delay, deadline - self._clock())
                self._sleep(delay)
        self._record_outcome(job, bar.rows)
        return job

    def _turn_to_run_of(self, job_id: str) -> None:
        """Make the record of this job the current one; no job takes over another's."""
        if self._current_run.data.get("job_id", job_id) != job_id:
            for run in read_runs(self.output_dir):
                if run.data.get("job_id") == job_id:
                    self._current_run.release()
                    run.lock()
                    self._run = run
                    return
            self._start_run(kind="job")
        self._current_run.update(job_id=job_id)

    def _poll(self, job_id: str, seen: set[str]) -> tuple[FineTuningJob, list[FineTuningJobEvent]]:
        """One look at a job: how it stands, and its events that are not in ``seen``."""
        retrieve = functools.partial(self.client.fine_tuning.jobs.retrieve, job_id)
        job = self._call(retrieve, patience=0, needs="status")
        return job, self._new_events(job_id, seen)

    def _survive(self, request: Callable[[], T], deadline: float | None) -> T | None:
        """``request()``, waiting out any outage; ``None`` where the deadline comes first."""
        import openai

        began: float | None = None
        for attempt in itertools.count():
            try:
                answer = request()
            except (openai.APIError, BrokenAnswer) as error:
                if not is_transient(error):
                    raise
                if began is None:
                    began = self._clock()
                    logger.warning(
                        "ジョブの状態を取得できません。回復するまで待ちます: %s",
                        explain_api_error(error),
                    )
                delay = retry_delay(attempt, _retry_after(error), random.random())
                if deadline is not None and self._clock() + delay >= deadline:
                    self._sleep(max(0.0, deadline - self._clock()))
                    return None
                self._sleep(delay)
            else:
                if began is not None:
                    logger.info("接続が回復しました（%.0f秒間中断）。", self._clock() - began)
                return answer
        raise AssertionError("unreachable")

    def _poll_delays(self) -> Iterator[float]:
        """Seconds between polls: short at first, when a bad file is found, then the interval."""
        interval = min(self.poll_interval, 0.5) if self.rehearse else self.poll_interval
        return (interval / 2 ** max(0, 4 - n) for n in itertools.count())

    def _new_events(self, job_id: str, seen: set[str]) -> list[FineTuningJobEvent]:
        """Events not in ``seen``, oldest first; they come newest first, in pages."""
        fresh: list[FineTuningJobEvent] = []
        page = self._optional(
            "イベント",
            lambda: self.client.fine_tuning.jobs.list_events(job_id, limit=100),
            patience=0,
        )
        while page is not None:
            known = seen.union(event.id for event in fresh)
            unseen = [event for event in page.data if event.id not in known]
            fresh.extend(unseen)
            if len(unseen) < len(page.data) or not unseen or not page.has_next_page():
                break
            page = self._optional("イベント", page.get_next_page, patience=0)
        seen.update(event.id for event in fresh)  # only now, for a page may have failed
        return fresh[::-1]

    def _record_outcome(self, job: FineTuningJob, rows: Sequence[Mapping[str, float]]) -> None:
        code, message = _job_error(job)
        self._remember(
            job_id=job.id,
            job_status=job.status,
            job_error={"code": code, "message": message} if code or message else None,
            fine_tuned_model=job.fine_tuned_model,
            trained_tokens=job.trained_tokens,
            result_files=job.result_files,
        )
        if job.status != "succeeded":
            reason = ": ".join(printable(part) for part in (code, message) if part)
            reason = f"（{reason}）" if reason else ""
            logger.error("ファインチューニング失敗: %s%s", printable(job.status), reason)
            self._record_training_cost(job)  # what was trained is billed all the same
            return
        logger.info("学習済みモデル: %s", printable(job.fine_tuned_model))
        if job.fine_tuned_model:
            self._fresh_models[job.fine_tuned_model] = self._clock() + MODEL_LOADING_SECONDS
        self._save_metrics(job, rows)
        self._record_checkpoints(job)
        self._record_training_cost(job)
        self._record_shutdown(job)
        self._remember(training_recorded_at=self._now())

    def _record_checkpoints(self, job: FineTuningJob) -> None:
        page = self._optional(
            "チェックポイント", lambda: self.client.fine_tuning.jobs.checkpoints.list(job.id)
        )
        checkpoints = page.data if page is not None else []
        for checkpoint in checkpoints:
            logger.info(
                "チェックポイント: %s（step %s）",
                printable(checkpoint.fine_tuned_model_checkpoint),
                checkpoint.step_number,
            )
        names = [checkpoint.fine_tuned_model_checkpoint for checkpoint in checkpoints]
        self._remember(checkpoints=names)

    def _record_training_cost(self, job: FineTuningJob) -> None:
        price = self.price or price_of(job.model)
        if self.rehearse or price is None or job.trained_tokens is None:
            return
        actual = job.trained_tokens * price.training / 1e6
        estimate = (self._current_run.data.get("estimate") or {}).get("training_usd")
        difference = f"、見積もりとの差 {actual / estimate - 1:+.1%}" if estimate else ""
        logger.info(
            "学習の実費: $%.4f（%s トークン%s）", actual, f"{job.trained_tokens:,}", difference
        )
        self._add_cost(training_usd=actual)

    def _add_cost(self, **dollars: float) -> None:
        cost = {**self._current_run.data.get("cost", {}), **dollars}
        cost["total_usd"] = sum(value for key, value in cost.items() if key != "total_usd")
        self._remember(cost=cost)

    def _record_shutdown(self, job: FineTuningJob) -> None:
        for name in filter(None, (job.fine_tuned_model, job.model)):
            model = self._optional(
                "モデル情報",
                functools.partial(self.client.models.retrieve, name),
                gone_is_missing=False,
            )
            shutdown = _shutdown_date(model)
            if shutdown is not None:
                logger.warning("%s は %s に停止します。", printable(name), shutdown)
                self._remember(shutdown_date=str(shutdown))
                return

    def _save_metrics(self, job: FineTuningJob, event_rows: Sequence[Mapping[str, float]]) -> None:
        """Write the result file's rows, or those of the events, to ``training_metrics_*.csv``."""
        rows = self._result_rows(job) or event_rows
        if not rows:
            logger.info("学習の記録（損失など）は得られませんでした。")
            return
        columns = list(dict.fromkeys(key for row in rows for key in row))
        table = io.StringIO()
        writer = csv.DictWriter(table, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        self._publish("training_metrics", ".csv", table.getvalue())
        # Validation has no value at most steps, so the last of each column counts.
        self._remember(final_metrics=dict(collections.ChainMap(*map(dict, reversed(rows)))))

    def _result_rows(self, job: FineTuningJob) -> list[dict[str, float]]:
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
            if rows:
                return rows
        return []

    # Evaluation ----------------------------------------------------------------------------

    def evaluate_model_comprehensive(
        self,
        model_id: str,
        test_data: Sequence[Example],
        valid_data: Sequence[Example],
        max_test_cases: int | None = 10,
        *,
        seed: int = 42,
        eval_turns: EvalTurns = 1,
        baseline: str | bool | None = None,
        concurrency: int = 8,
        temperature: float = 0.0,
        max_tokens: int = 1024,
        train_data: Sequence[Example] | None = None,
    ) -> EvaluationResults:
        """Ask the model :func:`choose_cases` of each split and score its answers.

        ``max_test_cases`` is per split; 0 or ``None`` asks all. ``baseline`` names a model to
        ask the same (``True``: the base model), and the results gain ``comparison``. Up to
        ``concurrency`` questions are under way at once, fewer while the endpoint limits the
        rate. In the score task the mean of ``train_data``'s scores (by default what this
        instance prepared) is a reference as well. A case that fails carries its ``error``;
        errors that would meet every case (key, model, quota) are raised, and
        :class:`BudgetError` before anything is asked.
        """
        check_evaluation(
            max_test_cases,
            eval_turns=eval_turns,
            concurrency=concurrency,
            temperature=temperature,
            max_tokens=max_tokens,
        )
        generation = {"temperature": temperature, "seed": seed, "max_tokens": max_tokens}
        baseline_id = self._baseline_model(model_id, baseline)
        data = {"test": test_data, "valid": valid_data}
        cases = {
            name: choose_cases(part, max_cases=max_test_cases, seed=seed, turns=eval_turns)
            for name, part in data.items()
        }
        task = TASKS[self.task]
        for case in itertools.chain(*cases.values()):
            if fault := task.find_fault(case.reference):
                raise DataError(f"{case.id}: task={self.task} のデータではありません（{fault}）。")
        train_data = self._scored_train_data(model_id, train_data)
        self._evaluated_model = model_id
        models = [model_id, *([baseline_id] if baseline_id else [])]
        results = EvaluationResults(model_id=model_id, evaluation_timestamp=self._now())
        answers: dict[tuple[str, str], list[Answer]] = {}
        asked: dict[str, dict[str, Any]] = {model: {} for model in models}
        held_back: dict[str, None] = {}
        with (
            SystemMonitor(self._existing_folder()),
            self._journal(model_id, baseline_id, generation) as journal,
        ):
            self._require_evaluation_budget(models, cases, journal)
            for model, name in itertools.product(models, data):
                responses = self._ask_all(
                    model, cases[name], name, generation, journal, concurrency
                )
                answers[model, name] = _answers(cases[name], responses)
                answered = sum("error" not in response for response in responses)
                metrics, missing = task.score(answers[model, name], seed=seed)
                held_back.update(dict.fromkeys(missing))
                if self.task == "score":
                    metrics["coverage"] = {
                        "valid": len(answers[model, name]),
                        "asked": len(responses),
                    }
                asked[model][f"{name}_evaluation"] = {
                    "dataset_type": name,
                    "total_test_cases": len(data[name]),
                    "evaluated_cases": answered,
                    "failed_cases": len(responses) - answered,
                    "invalid_cases": sum("invalid" in response for response in responses),
                    "cut_cases": sum(r.get("finish_reason") == "length" for r in responses),
                    "responses": responses,
                    "metrics": metrics,
                    "missing_metrics": missing,
                }
        if held_back:
            logger.warning(
                "%s は計算していません。%s で計算できるようになります。",
                "、".join(FIGURE_LABELS[name] for name in held_back),
                EVAL_EXTRA,
            )
        results.update(asked[model_id])
        counts = [results[f"{name}_evaluation"]["evaluated_cases"] for name in data]
        results["summary"] = {
            "test_cases_evaluated": counts[0],
            "valid_cases_evaluated": counts[1],
            "total_cases_evaluated": sum(counts),
        }
        if baseline_id is not None:
            results["baseline"] = {"model_id": baseline_id, **asked[baseline_id]}
            results["comparison"] = {"baseline_model": baseline_id} | {
                name: compare_answers(
                    answers[model_id, name],
                    answers[baseline_id, name],
                    make=task.make_figures,
                    seed=seed,
                    cases=len(cases[name]),
                )
                for name in data
            }
        if self.task == "score":
            tested = {name: answers[model_id, name] for name in data}
            self._add_mean_reference(results, tested, train_data, seed)
            overall = results["test_evaluation"]["metrics"].get("overall")
            results["summary"]["mse"] = overall["mse"]["score"] if overall else None
        else:
            run = self._current_run
            if run.data.get("fine_tuned_model") != model_id:
                run = find_run(self.output_dir, model_id) or run
            if run.data.get("fine_tuned_model") == model_id:
                results["summary"].update(_cross_entropies(run.data))
        results["task"] = self.task
        results["usage"] = journal.usage()
        results["settings"] = {
            **generation,
            "max_test_cases": max_test_cases,
            "eval_turns": eval_turns,
            "concurrency": concurrency,
        }
        self._record_evaluation_cost(results)
        if self.rehearse or ":rehearsal:" in model_id:
            results["rehearsal"] = True
            results["note"] = "リハーサルの小さな文字モデルの応答です。GPTの性能とは無関係です。"
        return results

    def _scored_train_data(
        self, model_id: str, train_data: Sequence[Example] | None
    ) -> Sequence[Example] | None:
        """What the score task takes the mean of: given, prepared here or recorded."""
        if self.task != "score":
            return None
        train_data = train_data or self._train_data
        if not train_data:
            run = find_run(self.output_dir, model_id)
            if run is not None and "manifest" in run.data.get("files", {}):
                train_data = self._recorded_splits(run).train
        if train_data and not any(map(_scores_of, train_data)):
            raise DataError(
                "train_data に評価点の例がありません（task=score のデータが必要です）。"
            )
        return train_data

    @staticmethod
    def _add_mean_reference(
        results: EvaluationResults,
        answers: Mapping[str, Sequence[Answer]],
        train_data: Sequence[Example] | None,
        seed: int,
    ) -> None:
        """Add what predicting the training mean gives on the cases that were answered."""
        if not train_data:
            logger.warning("学習データがないため、平均予測との比較は省きます（train_data=）。")
            return
        means = mean_scores(train_data)
        text = _dump(means)
        reference = {
            name: [answer._replace(output=text) for answer in part]
            for name, part in answers.items()
        }
        results["mean_reference"] = {"scores": means} | {
            name: score_predictions(part, seed=seed)[0] for name, part in reference.items()
        }
        results.setdefault("comparison", {})["mean_reference"] = {
            name: compare_figures(
                part,
                reference[name],
                make=make_score_figures,
                seed=seed,
                cases=len(part),
                rival="平均予測",
            )
            for name, part in answers.items()
        }

    def _rates(self, model: str, tuned_model: str) -> tuple[float, float] | None:
        given = self.price if model == tuned_model else None
        return rates_of(model, given, tuned=model.startswith("ft:"))

    def _require_evaluation_budget(
        self, models: Sequence[str], cases: Mapping[str, Sequence[Case]], journal: _Journal
    ) -> None:
        if self.max_cost_usd is None or self.rehearse:
            return
        counter = TokenCounter(load_vocabulary())
        dollars = self._current_run.data.get("cost", {}).get("training_usd", 0.0)
        dollars += self._cost_of(journal.usage_by_model(), models[0]) or 0.0
        for model, (name, part) in itertools.product(models, cases.items()):
            rates = self._rates(model, models[0])
            if rates is None:
                raise BudgetError(f"{model} の単価が不明で、上限を守れるか判断できません。")
            for case in part:
                if (model, name, case.id) not in journal.answers:
                    dollars += counter.count(case.input).total * rates[0] / 1e6
                    dollars += counter.count_texts([case.reference]) * rates[1] / 1e6
        if dollars > self.max_cost_usd:
            raise BudgetError(
                f"評価まで含めた料金 ${dollars:,.4f} が上限 ${self.max_cost_usd:,.4f} を超える"
                "ため、評価の前に中止しました。学習済みモデルは残っています。"
            )

    def _stop_over_budget(self, spent: float | None) -> None:
        """Raise :class:`BudgetError` where the answers so far have passed the limit."""
        before = self._current_run.data.get("cost", {}).get("training_usd", 0.0)
        if self.max_cost_usd is not None and spent and before + spent > self.max_cost_usd:
            raise BudgetError(
                f"料金が ${before + spent:,.4f} になり、上限 ${self.max_cost_usd:,.4f} を超えた"
                "ため、評価を止めました。それまでの応答は残っています。上限を上げて --resume すると"
                "続けられます。"
            )

    def _cost_of(self, usage: Mapping[str, Mapping[str, int]], tuned_model: str) -> float | None:
        if self.rehearse:
            return None
        dollars = 0.0
        for model, tokens in usage.items():
            rates = self._rates(model, tuned_model)
            if rates is None:
                return None
            dollars += tokens["prompt_tokens"] * rates[0] / 1e6
            dollars += tokens["completion_tokens"] * rates[1] / 1e6
        return dollars

    def _record_evaluation_cost(self, results: EvaluationResults) -> None:
        dollars = self._cost_of(results["usage"]["by_model"], results["model_id"])
        if dollars is None:
            return
        self._add_cost(evaluation_usd=dollars)
        results["cost"] = dict(self._current_run.data["cost"])
        logger.info("評価の実費: $%.4f（キャッシュ割引を除いた上限）", dollars)

    def _journal(
        self, model_id: str, baseline_id: str | None, generation: Mapping[str, Any]
    ) -> _Journal:
        """The answers so far of a resumed evaluation, or a new journal."""
        run = self._current_run
        asked = {"model_id": model_id, "baseline": baseline_id, "generation": dict(generation)}
        known = run.data.get("evaluation", {})
        resumes = self._resumed and {key: known.get(key) for key in asked} == asked
        if not resumes and "journal" in run.data.get("files", {}):
            kept = ("kind", "plan", "selection", "data")
            run = self._start_run(**{key: run.data[key] for key in kept if key in run.data})
        path = self.output_dir / f"evaluation_{run.stamp}.jsonl"
        run.update(evaluation=asked, files={**run.data.get("files", {}), "journal": str(path)})
        return _Journal(path)

    def _ask_all(
        self,
        model_id: str,
        cases: Sequence[Case],
        name: str,
        generation: Mapping[str, Any],
        journal: _Journal,
        concurrency: int,
    ) -> list[dict[str, Any]]:
        """The responses to ``cases``, in their order; only those not in the journal are asked."""
        from tqdm.auto import tqdm

        label = {"test": "テスト", "valid": "検証"}[name]
        logger.info("%sデータの%d件を評価しています: %s", label, len(cases), printable(model_id))
        responses: dict[str, dict[str, Any]] = {}
        missing = []
        for case in cases:
            known = journal.answers.get((model_id, name, case.id))
            if known is None:
                missing.append(case)
            else:
                responses[case.id] = known
        if responses:
            logger.info("うち%d件は回答済みです。", len(responses))
        failed = 0
        bar = tqdm(
            total=len(cases),
            initial=len(responses),
            desc=f"評価 {label}",
            unit="件",
            disable=None if self.verbose else True,
        )
        _ = self.client  # made here once, not by every thread
        pool = _Pool(concurrency)
        with contextlib.closing(bar), contextlib.closing(pool):
            # A model that was just tuned may still be loading: the first case waits for it.
            first = missing[:1] if model_id in self._fresh_models else []
            ask = functools.partial(self._ask, model_id, generation, pool)
            for response in itertools.chain(map(ask, first), pool.map(ask, missing[len(first) :])):
                journal.add(model_id, name, response)
                responses[response["case_id"]] = response
                failed += "error" in response
                spent = self._cost_of(journal.usage_by_model(), self._evaluated_model)
                self._stop_over_budget(spent)
                bar.set_postfix(
                    {"失敗": failed, **({"$": f"{spent:.4f}"} if spent is not None else {})},
                    refresh=False,
                )
                bar.update()
        return [responses[case.id] for case in cases]

    def _ask(
        self, model_id: str, generation: Mapping[str, Any], pool: _Pool, case: Case
    ) -> dict[str, Any]:
        import openai

        response: dict[str, Any] = {"case_id": case.id, "input": case.input}
        task = TASKS[self.task]
        request: dict[str, Any] = {
            **generation,
            **task.request,
            "model": model_id,
            "messages": case.input,
        }
        if case.tools:
            request["tools"] = case.tools
        create = functools.partial(self.client.chat.completions.create, **request)
        started = time.perf_counter()
        try:
            answer = self._wait_for_model(model_id, lambda: pool.attempt(create))
            response["usage"] = _usage(answer)
            response["finish_reason"], response["output"] = _read_answer(answer)
            if fault := task.find_fault(response["output"]):
                response["invalid"] = fault
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

    def _wait_for_model(self, model_id: str, request: Callable[[], T]) -> T:
        """``request()``; while a model that was just tuned is still loading, it is repeated."""
        import openai

        for attempt in itertools.count():
            try:
                answer = self._call(request)
            except openai.NotFoundError:
                if self._clock() >= self._fresh_models.get(model_id, 0.0):
                    raise
                if attempt == 0:
                    logger.info("モデルの準備を待っています: %s", printable(model_id))
                self._sleep(retry_delay(attempt, None, random.random()))
            else:
                self._fresh_models.pop(model_id, None)
                return answer
        raise AssertionError("unreachable")

    def save_results(self, results: Mapping[str, Any]) -> str:
        """Write ``comprehensive_evaluation_STAMP.json``; return its path."""
        path = self._publish("comprehensive_evaluation", ".json", to_json(results))
        evaluation = {**self._current_run.data.get("evaluation", {}), **results.get("summary", {})}
        self._remember(evaluation=evaluation)
        return path

    # Shared --------------------------------------------------------------------------------

    def describe_remote_state(self) -> str:
        """What goes on at the service after an interruption, and how to come back to it."""
        facts = self._run.data if self._run else {}
        folder_text = shlex.quote(str(self.output_dir))
        job_id, model = facts.get("job_id"), facts.get("fine_tuned_model")
        folder = (
            "" if str(self.output_dir) == DEFAULT_OUTPUT_DIR else f" --output-dir {folder_text}"
        )
        if self.rehearse or not self._run:
            return "サービス側で続いている処理はありません。"
        going = "サービス側で続いている処理はありません。"
        if job_id and not model and facts.get("job_status") not in TERMINAL_STATUSES:
            going = f"ジョブ {printable(job_id)} はサービス側で続いていて、料金もかかります。"
        elif "job_intent" in facts and not job_id:
            going = "ジョブの作成を送信したところで、サービス側で作られている可能性があります。"
        elif model:
            going = f"学習済みモデル {printable(model)} はサービス側に残っています。"
        if self._run.unfinished:
            return f"{going}続きから再開するには: openai-sft --resume {facts['run_id']}{folder}"
        if job_id and not model:
            quoted = shlex.quote(printable(job_id))
            place = "" if self.base_url == OPENAI_BASE_URL else f" --base-url {self.base_url}"
            return f"{going}監視を再開するには: openai-sft --job-id {quoted}{place}{folder}"
        return going

    @property
    def goes_on_remotely(self) -> bool:
        """Whether this run has left something at the service to come back to."""
        run = self._run
        if run is None or self.rehearse or not ({"job_id", "job_intent"} & run.data.keys()):
            return False
        return run.unfinished or run.data.get("job_status") not in TERMINAL_STATUSES

    def _remember(self, **facts: Any) -> None:
        self._current_run.update(**facts)

    def _publish(self, kind: str, suffix: str, text: str) -> str:
        """Write one more file of the run, in a new run where this one has it already."""
        run = self._current_run
        path = self.output_dir / f"{kind}_{run.stamp}{suffix}"
        if path.exists() and self._resumed and "finished_at" not in run.data:
            path.unlink()  # written just before the program died, and not yet in the record
        elif path.exists():
            run = self._start_run(kind="steps")
            path = self.output_dir / f"{kind}_{run.stamp}{suffix}"
        write_new_file(path, text)
        run.update(files={**run.data.get("files", {}), kind: str(path)})
        logger.info("保存しました: %s", path)
        return str(path)

    def _existing_folder(self) -> Path:
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"保存先 {self.output_dir} を作れません（{error.strerror}）。"
                "--output-dir で別のフォルダーを指定してください。"
            ) from error
        return self.output_dir

    def _optional(
        self,
        part: str,
        request: Callable[[], T],
        *,
        gone_is_missing: bool = True,
        patience: float = RETRY_SECONDS,
    ) -> T | None:
        """``request()``, or ``None`` where the endpoint lacks this part of the API.

        With ``gone_is_missing=False`` a 404 is about this one object and isn't remembered.
        """
        import openai

        if part in self._lacking:
            return None
        try:
            return self._call(request, patience=patience)
        except openai.APIStatusError as error:
            if error.status_code not in MISSING_STATUSES:
                raise
            if error.status_code == 404 and not gone_is_missing:
                return None
            self._lacking.add(part)
            logger.info(
                "このエンドポイントは%sに対応していません（HTTP %d）。この処理を省略して続けます。",
                part,
                error.status_code,
            )
            return None

    def _call(
        self, request: Callable[[], T], *, patience: float = RETRY_SECONDS, needs: str | None = None
    ) -> T:
        """``request()``; transient failures are repeated for up to ``patience`` seconds.

        An answer without the attribute that ``needs`` names is a broken one.
        Raises the SDK's error, or :class:`BrokenAnswer` for an answer that isn't the API's JSON.
        The key is taken out of what an endpoint may echo.
        """
        import openai

        started = self._clock()
        for attempt in itertools.count():
            failure: openai.APIError | BrokenAnswer
            try:
                answer = request()
                if isinstance(answer, str):  # what the SDK makes of a page that isn't JSON
                    raise BrokenAnswer("エンドポイントの応答がJSONではありません。")
                if needs is not None and getattr(answer, needs, None) is None:
                    raise BrokenAnswer(f"エンドポイントの応答に {needs} がありません。")
                return answer
            except (openai.APIError, BrokenAnswer) as error:
                failure = error
            except json.JSONDecodeError:
                failure = BrokenAnswer("エンドポイントの応答が途中で切れたか、壊れています。")
            self._hide_key(failure)
            delay = retry_delay(attempt, _retry_after(failure), random.random())
            if not is_transient(failure) or self._clock() + delay - started > patience:
                raise failure
            level = logging.INFO if attempt == 0 and patience > 60 else logging.DEBUG
            logger.log(
                level, "最大%d分やり直します: %s", patience // 60, explain_api_error(failure)
            )
            self._sleep(delay)
        raise AssertionError("unreachable")

    def _hide_key(self, error: Any) -> None:
        """Take the key out of an error's text: an endpoint may echo what it was sent."""
        client_key = self._client.api_key if self._client is not None else None
        for key in {self._api_key, client_key} - {None, ""}:

            def clean(text: object, key: str = str(key)) -> Any:
                return text.replace(key, "[APIキー]") if isinstance(text, str) else text

            error.args = tuple(map(clean, error.args))
            for name in ("message", "code", "type", "param"):
                if hasattr(error, name):
                    setattr(error, name, clean(getattr(error, name)))
            if getattr(error, "body", None) is not None:
                error.body = json.loads(clean(_dump(error.body)))


def _split_options(
    options: Mapping[str, Any], max_test_cases: int | None, seed: int
) -> tuple[SelectionOptions, dict[str, Any]]:
    """The filters among :class:`RunOptions`, and the options of the evaluation."""
    names = SelectionOptions.__annotations__
    filters = cast("SelectionOptions", {k: v for k, v in options.items() if k in names})
    evaluation = {key: value for key, value in options.items() if key not in names}
    check_evaluation(max_test_cases, **evaluation)
    return filters, {"max_test_cases": max_test_cases, "seed": seed, **evaluation}


def _about_cases(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    names = ("max_test_cases", "seed", "eval_turns", "baseline")
    return {key: value for key, value in evaluation.items() if key in names}


def _answers(cases: Sequence[Case], responses: Sequence[Mapping[str, Any]]) -> list[Answer]:
    return [
        Answer(case.id, case.dialogue_id, response["output"], case.reference)
        for case, response in zip(cases, responses, strict=True)
        if "error" not in response and "invalid" not in response
    ]


def _cross_entropies(facts: Mapping[str, Any]) -> dict[str, float]:
    """The job's last losses, where they are known; the service trains by cross-entropy."""
    metrics = facts.get("final_metrics") or {}
    valid = metrics.get("full_valid_loss", metrics.get("valid_loss"))
    losses = {
        "training_cross_entropy": metrics.get("train_loss"),
        "validation_cross_entropy": valid,
    }
    return {name: loss for name, loss in losses.items() if loss is not None}


def _usage(completion: Any) -> dict[str, Any] | None:
    usage = getattr(completion, "usage", None)
    dump = getattr(usage, "model_dump", None)
    return None if dump is None else dict(dump(exclude_none=True, warnings=False))


def _read_answer(completion: Any) -> tuple[str, str]:
    """Finish reason and text. Raises :class:`BrokenAnswer` for none, naming what came instead."""
    try:
        choice = completion.choices[0]
        text, refusal = choice.message.content, getattr(choice.message, "refusal", None)
    except (AttributeError, IndexError, TypeError) as error:
        raise BrokenAnswer("応答がチャットの形ではありません。") from error
    reason = str(choice.finish_reason)
    if refusal:
        raise BrokenAnswer(f"モデルが応答を拒否しました: {printable(refusal)}")
    if reason == "content_filter":
        raise BrokenAnswer("内容フィルターで止められました（finish_reason: content_filter）")
    if not str(text or "").strip():
        raise BrokenAnswer(f"応答が空です（finish_reason: {printable(reason)}）")
    # Half of a surrogate pair (an emoji cut in two) can't be written.
    return reason, str(text).encode(errors="replace").decode()


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed later: no connection, a broken answer, 408, 409,
    429 (but for ``insufficient_quota``) and 5xx (but for 501)."""
    status = getattr(error, "status_code", None)
    if status is None:
        return True
    if getattr(error, "code", None) == "insufficient_quota":
        return False
    return status in RETRIED_STATUSES or (status >= 500 and status not in MISSING_STATUSES)


def _job_error(job: FineTuningJob) -> tuple[str | None, str | None]:
    """Code and message; a job without an error may carry an empty object."""
    return (job.error.code, job.error.message) if job.error else (None, None)


def _shutdown_date(model: object) -> date | None:
    """The date of a model's end; older SDKs don't declare the field, other endpoints lack it."""
    try:
        return date.fromisoformat(str(getattr(model, "shutdown_date", None)))
    except ValueError:
        return None


@functools.lru_cache(maxsize=1)
def _versions() -> dict[str, str]:
    import importlib.metadata

    names = ("openai", "datasets", "tiktoken", "psutil", "tqdm", "python-dotenv")
    found = {name: importlib.metadata.version(name) for name in names}
    return {"openai_sft": __version__, "python": platform.python_version(), **found}


def _is_text(value: str | None) -> bool:
    """Whether ``value`` can be written as UTF-8; an odd byte of a command line can't."""
    return value is None or not any("\ud800" <= character <= "\udfff" for character in value)


def _is_http_url(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:
        return False
    host = parts.hostname or ""
    return parts.scheme in ("http", "https") and host.isprintable() and host.split() == [host]


def _retry_after(error: Any) -> float | None:
    """Seconds of a ``Retry-After`` header; its date form is left to the back-off."""
    try:
        return float(error.response.headers.get("retry-after", ""))
    except (AttributeError, ValueError):
        return None


def _read_dotenv() -> Mapping[str, str | None]:
    """The nearest ``.env`` from the working directory upwards, read but never written."""
    from dotenv import dotenv_values, find_dotenv

    return dotenv_values(find_dotenv(usecwd=True))


if __name__ == "__main__":
    from openai_sft_example import main

    raise SystemExit(main())
