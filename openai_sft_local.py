"""Fine-tuning of an open model on one's own machine, behind `openai_sft_rehearsal`'s endpoint.

Run as a program this is the trainer of one job, on its own or behind a launcher of several ranks:

    python -m openai_sft_local JOBDIR
    torchrun --nproc_per_node 8 -m openai_sft_local JOBDIR

What it is to do it reads from ``JOBDIR/spec.json`` (`Spec`); what it does it appends to
``JOBDIR/progress.jsonl``, a JSON object a line, of the ``kind`` note, data, ready, step,
checkpoint, done or failed. It holds ``JOBDIR/lock`` as long as it lives. Killed and started anew it
goes on after the last checkpoint, and reports the steps since then again: the last of a step
counts.

- Training is TRL's ``SFTTrainer``. Examples are tokenised and labelled here, since TRL's
  assistant-only loss knows few chat templates and no ``weight``: what the assistant says with a
  ``weight`` other than 0 is learnt, with the token that ends its turn. Nothing is cut.
- Every loss is in nats a learnt token, weighted by tokens. Bits per character count the characters
  of the learnt messages as they stand in the file, so that they compare across vocabularies.
- ``trained_tokens`` are the learnt tokens of the training file times the epochs.
- A batch is a number of examples over all ranks. The order of the examples depends on the seed
  alone, so that several ranks learn what one does.

In reading order: what a trainer needs (records, failures, the job's folder, chat templates,
examples, models, figures) and the trainer; answering, in this process or by a vLLM server;
`LocalEngine`, which starts trainers and answers; export, checks, the trainer's command line.
"""

from __future__ import annotations

import argparse
import bisect
import concurrent.futures
import contextlib
import errno
import functools
import gc
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import math
import os
import random
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Self

from openai_sft import MIN_DIALOGUES, OPENING_TURN, student_t
from openai_sft_rehearsal import (
    ApiError,
    Kept,
    Model,
    Note,
    Order,
    Reply,
    Step,
    Trained,
    TrainingFailed,
    hold_lock,
)
from openai_sft_rehearsal import Progress as Item

if TYPE_CHECKING:
    import psutil

_log = logging.getLogger("openai_sft_local")

Json = dict[str, Any]

EXTRA: Final = "pip install 'openai-sft[local]'"
TINY: Final = "tiny"
OUT_OF_MEMORY: Final = "out_of_memory"
IGNORED: Final = -100  # the label of a token that is not learnt, as PyTorch has it

LORA_RANK, LORA_ALPHA = 16, 32
LEARNING_RATES: Final = {"lora": 2e-4, "full": 2e-5, TINY: 3e-3}
WARMUP: Final = 0.03  # of all steps
KEPT_EPOCHS: Final = 3  # as OpenAI keeps; the best is kept besides

TINY_VOCABULARY, TINY_CONTEXT = 2000, 32768
TINY_SPECIAL: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # pads, opens, ends
TINY_TEMPLATE: Final = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


PACKAGES: Final = ("torch", "transformers", "trl", "peft", "accelerate", "llguidance")


def missing_packages() -> list[str]:
    """Those of the extra that aren't installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


# --- Records --------------------------------------------------------------------------------------


def _method(model: str, full: bool) -> str:
    if model == TINY:
        return TINY
    return "full" if full else "lora"


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What a job is to do: ``spec.json``."""

    job_id: str
    model: str  # a name on the Hugging Face Hub, a folder, or "tiny"
    model_dir: str | None  # where the tiny model is, or is built on first use
    training_file: str
    validation_file: str | None
    n_epochs: int
    batch_size: int  # over all ranks
    learning_rate_multiplier: float
    seed: int
    full: bool  # all weights, not an adapter
    ranks: int | None  # as many as must have been started

    @classmethod
    def read(cls, path: Path) -> Self:
        """What `write` wrote."""
        return cls(**json.loads(path.read_text("utf-8")))

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self), ensure_ascii=False, indent=2), "utf-8")

    @property
    def method(self) -> str:
        """A key of `LEARNING_RATES`."""
        return _method(self.model, self.full)


class Example(NamedTuple):
    """A dialogue as the model sees it."""

    ids: list[int]
    labels: list[int]  # IGNORED where nothing is learnt
    characters: int  # of the learnt messages

    @property
    def learnt(self) -> int:
        """The number of learnt tokens."""
        return sum(label != IGNORED for label in self.labels)


class Evaluation(NamedTuple):
    """The figures of each validation example at a step."""

    step: int
    nats: list[float]
    correct: list[int]  # tokens that were likeliest
    tokens: list[int]
    characters: list[int]

    @property
    def bits_per_character(self) -> float:
        """Over all examples."""
        return sum(self.nats) / math.log(2) / max(1, sum(self.characters))

    @property
    def metrics(self) -> dict[str, float]:
        """As the API names them; valid and full_valid are the same here."""
        tokens = max(1, sum(self.tokens))
        loss, accuracy = sum(self.nats) / tokens, sum(self.correct) / tokens
        return {
            "valid_loss": loss,
            "valid_mean_token_accuracy": accuracy,
            "full_valid_loss": loss,
            "full_valid_mean_token_accuracy": accuracy,
            "full_valid_bits_per_character": self.bits_per_character,
        }


# --- Failures -------------------------------------------------------------------------------------


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    while error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__ or error


# What the libraries say; PyTorch says of a full disk no more than that a file is too short.
_DISK_FULL: Final = ("No space left on device", "unexpected pos", "PytorchStreamWriter failed")
_MEMORY_FULL: Final = ("out of memory", "can't allocate memory")


def failure_of(error: BaseException) -> TrainingFailed:
    """An exception of the libraries, as a failure with a code and a remedy."""
    if isinstance(error, TrainingFailed):
        return error
    if isinstance(error, ImportError):
        return TrainingFailed("server_error", f"{error}（必要なもの: {EXTRA}）")
    texts = [str(cause) for cause in _causes(error)]
    if any(mark in text for mark in _DISK_FULL for text in texts):
        return TrainingFailed(
            "disk_full",
            "ディスクの空きがなくなりました。空きを作ってから、ジョブを作り直してください。"
            "全パラメーターの学習では、1つのチェックポイントが重みの約3倍になります。",
        )
    if isinstance(error, MemoryError) or any(m in text for m in _MEMORY_FULL for text in texts):
        return TrainingFailed(
            OUT_OF_MEMORY,
            "メモリが足りません。小さいモデルにする、全パラメーターでなくLoRAを学習する、"
            "GPUを増やして重みを分ける（--local-launcher）、のどれかを試してください。",
        )
    last = str(error).strip().splitlines()
    return TrainingFailed(
        "server_error",
        f"学習が止まりました: {type(error).__name__}: {last[-1] if last else ''}"
        "。詳しくはジョブのフォルダーの trainer.log を見てください。",
    )


# --- The job's folder -----------------------------------------------------------------------------

SPEC, LOCK, LOG = "spec.json", "lock", "trainer.log"
PROGRESS, EVALUATIONS = "progress.jsonl", "validation.jsonl"


def is_held(path: Path) -> bool:
    """Whether another process holds the lock file."""
    lock = hold_lock(path)
    if lock is not None:
        lock.close()
    return lock is None


def _append(path: Path, record: Json) -> None:
    line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
    with path.open("ab", buffering=0) as file:  # one write: a reader sees no line of two writers
        file.write(line.encode("utf-8"))


class _Tail:
    """Reads the whole lines that are added to a file of JSON."""

    def __init__(self, path: Path) -> None:
        self._path, self._position = path, 0

    def read(self) -> list[Json]:
        """What is new; half a line waits for the rest, and one that a kill has cut is left out."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._position)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._position += len(whole)
        return [record for line in whole.splitlines() if (record := _record(line))]


def _record(line: bytes) -> Json | None:
    try:
        record = json.loads(line)
    except ValueError:
        _log.warning("学習の記録に、途中で切れた行があります: %r", line[:80])
        return None
    return record if isinstance(record, dict) else None


def mend(path: Path) -> None:
    """Delete a last line that was cut off, so that more can be appended."""
    if path.exists():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)


@dataclass(frozen=True)
class Progress:
    """``progress.jsonl``: what a trainer has reported."""

    path: Path
    speaks: bool = True  # no other rank than the first writes, but for a failure

    def write(self, kind: str, **fields: Any) -> None:
        """Append a record; whole or not at all for whoever reads meanwhile up to a line's end."""
        if self.speaks or kind == "failed":
            _append(self.path, {"kind": kind, **fields})

    def note(self, message: str, level: str = "info") -> None:
        """Something to tell the user."""
        self.write("note", message=message, level=level)

    def failed(self, failure: TrainingFailed) -> None:
        """The end."""
        self.write("failed", code=failure.code, message=failure.message, param=failure.param)

    def read(self, kind: str) -> list[Json]:
        """The records of a kind."""
        return [record for record in _Tail(self.path).read() if record["kind"] == kind]

    def steps(self) -> dict[int, dict[str, float]]:
        """The metrics of each step; of a step reported twice, the later."""
        return {record["step"]: record["metrics"] for record in self.read("step")}

    def checkpoints(self) -> list[Path]:
        """The whole checkpoints that are still there, the newest last."""
        paths = [Path(record["path"]) for record in self.read("checkpoint")]
        return sorted({p for p in paths if p.is_dir()}, key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


# --- Chat templates -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """What one side says until the other does."""

    role: str
    texts: tuple[str, ...]  # several only where neighbours were merged
    learnt: tuple[bool, ...]  # of each text
    other: Mapping[str, Any]  # tool calls and what else the template may know

    def message(self) -> Json:
        """As a chat template takes it."""
        return {"role": self.role, "content": "\n".join(self.texts), **self.other}


_OPENED: Final = Turn("user", (OPENING_TURN,), (False,), {})


def _text_of(message: Json) -> str:
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if part.get("type") not in ("text", "refusal"):
                raise TrainingFailed(
                    "content_not_supported",
                    f"文字以外の内容（{part.get('type')}）は、このマシンのモデルでは扱えません。発言を文字だけにしてください。",
                    "messages",
                )
        return "".join(part.get("text") or part.get("refusal") or "" for part in content)
    return str(content or message.get("refusal") or "")


def _turn(message: Json) -> Turn:
    """A message of the API's shape; arguments of tool calls as the object that templates expect."""
    role = "system" if message["role"] == "developer" else message["role"]
    other = {k: message[k] for k in ("name", "tool_call_id") if message.get(k) is not None}
    if message.get("tool_calls"):
        other["tool_calls"] = [
            call | {"function": call["function"] | {"arguments": _arguments(call["function"])}}
            for call in message["tool_calls"]
        ]
    learnt = role == "assistant" and message.get("weight") != 0
    return Turn(role, (_text_of(message),), (learnt,), other)


def _arguments(function: Json) -> Any:
    arguments = json.loads(function["arguments"])
    return arguments if isinstance(arguments, dict) else function["arguments"]


def _said(role: str, text: str) -> Json:
    return {"role": role, "content": text}


def _standin(index: int) -> str:
    """A text of characters that mean nothing (private use), to be found again in a rendering."""
    return f"\ue000{index}\ue001"


_PROBES: Final = {
    "system": ("system", "user", "assistant"),
    "late_system": ("user", "assistant", "system", "user", "assistant"),
    "opening": ("assistant", "user", "assistant"),
    "opening_after_system": ("system", "assistant", "user", "assistant"),
    "neighbours": ("user", "user", "assistant", "assistant", "user"),
}


# What a template refuses, as a probe shows, and what is done instead.
_ADAPTED: Final = {
    "system": (" system の発言", "user の発言として渡します"),
    "opening": (" assistant から始まる会話", f"始めに user の発言「{OPENING_TURN}」を置きます"),
    "neighbours": ("同じ役割の発言が続くこと", "続く発言を改行でつないで1つにします"),
}


class Template:
    """A tokenizer's chat template, and how messages are adapted to what it accepts.

    The same in training and answering. A template may refuse or drop a system turn (then it is said
    by the user), an assistant's opening (then the user opens with `OPENING_TURN`) or neighbours of
    one role (then they are one turn of several lines). Thinking is off: where the template opens an
    answer with an empty thought, each learnt turn is opened so too.
    """

    notes: list[str]  # what is adapted, in Japanese
    stop_ids: list[int]  # tokens that end an assistant's turn

    def __init__(self, tokenizer: Any) -> None:
        """TrainingFailed (template_unusable) where there is no template or no use of it."""
        self._tokenizer = tokenizer
        self.notes = []
        if not tokenizer.chat_template:
            raise _unusable(
                "チャットテンプレートがありません。instruct版のモデルを選んでください。"
            )
        if not tokenizer.is_fast:
            raise _unusable(
                "トークナイザーが文字の位置を言いません。tokenizer.json のあるモデルが必要です。"
            )
        self._accepts = {name: self._is_accepted(roles) for name, roles in _PROBES.items()}
        if self._accepts["system"] and not self._accepts["opening_after_system"]:
            self._accepts["opening"] = False
        for name, (refused, instead) in _ADAPTED.items():
            if not self._accepts[name]:
                self.notes.append(
                    f"このモデルのチャットテンプレートは{refused}を受け付けないため、{instead}"
                    "（学習でも応答でも同じです）。"
                )
        self._find_borders()

    def prompt(self, messages: Sequence[Json], tools: Sequence[Json] | None = None) -> list[int]:
        """The ids of the messages and of the opening of the answer."""
        turns = self._adapt(messages)
        if not self._accepts["opening"] and all(turn.role == "system" for turn in turns):
            turns.append(_OPENED)  # the answer will be the assistant's opening
        text = self._render([turn.message() for turn in turns], tools, opened=True)
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def learn(
        self, messages: Sequence[Json], tools: Sequence[Json] | None = None
    ) -> tuple[list[int], list[int]]:
        """The ids of a dialogue and their labels."""
        text, spans = self._spans(self._adapt(messages), tools)
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = list(encoded["input_ids"])
        labels = [IGNORED] * len(ids)
        starts = [start for start, _ in encoded["offset_mapping"]]
        ends = [end for _, end in encoded["offset_mapping"]]
        for span in spans:
            # A token across the border was not the model's to say. Some tokenizers leave spaces out
            # of the positions, so that a token of spaces alone before the border ends on it.
            first = bisect.bisect_left(starts, span.start)
            while first < len(ids) and ends[first] <= span.start:
                first += 1
            after = bisect.bisect_left(starts, span.end, lo=first)
            if span.closed:
                limit = bisect.bisect_left(starts, span.limit, lo=after)
                stops = (k + 1 for k in range(after, limit) if ids[k] in self._closing)
                after = next(stops, after)
            labels[first:after] = ids[first:after]
        return ids, labels

    # How the template is asked

    def _render(
        self, messages: Sequence[Json], tools: Sequence[Json] | None, *, opened: bool
    ) -> str:
        from jinja2.exceptions import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=opened,
                enable_thinking=False,
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise _unusable(f"チャットテンプレートがこの会話を受け付けません: {error}") from error
        return str(text)

    def _is_accepted(self, roles: Sequence[str]) -> bool:
        texts = [_standin(index) for index in range(len(roles))]
        try:
            said = self._render(list(map(_said, roles, texts)), None, opened=False)
        except TrainingFailed:
            return False
        apart = all(one + other not in said for one, other in itertools.pairwise(texts))
        return apart and all(text in said for text in texts)

    def _find_borders(self) -> None:
        """What stands between a prompt and an answer, and what ends an answer."""
        texts = [_standin(index) for index in range(4)]
        talk = list(map(_said, ("user", "assistant", "user", "assistant"), texts))
        whole = self._render(talk, None, opened=False)
        if not all(text in whole for text in texts):
            raise _unusable("チャットテンプレートが発言をそのまま書きません。")
        opened = self._render(talk[:1], None, opened=True)
        before = whole[: whole.index(texts[1])]
        common = _common_length(opened, before)
        self._inserted, self._written = opened[common:], before[common:]
        if self._inserted and self._written:
            raise _unusable("返答の前の書き方が、学習と応答とで違うチャットテンプレートです。")
        if self._inserted.strip():
            self.notes.append(
                f"このモデルは返答の前に {self._inserted.split()[0]} … を置くため、"
                "学習でも各返答の前に同じものを置きます。思考なしの版のほうが向いています。"
            )
        between = whole[whole.index(texts[1]) + len(texts[1]) : whole.index(texts[2])]
        after = whole[whole.index(texts[3]) + len(texts[3]) :]
        special = set(self._tokenizer.all_special_ids) | set(self._tokenizer.added_tokens_decoder)
        self._closing = set()
        for text in (between, after):
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            self._closing |= set(next(([i] for i in ids if i in special), []))
        if not self._closing:
            raise _unusable("返答の終わりを表すトークンがないチャットテンプレートです。")
        eos = self._tokenizer.eos_token_id
        self.stop_ids = sorted(self._closing | ({eos} if eos is not None else set()))

    # How messages are adapted

    def _adapt(self, messages: Sequence[Json]) -> list[Turn]:
        turns: list[Turn] = []
        for turn in map(_turn, messages):
            late = any(before.role != "system" for before in turns)
            if turn.role == "system" and not self._accepts["late_system" if late else "system"]:
                turn = replace(turn, role="user")
            if turn.role == "assistant" and not late and not self._accepts["opening"]:
                turns.append(_OPENED)
            turns.append(turn)
        return turns if self._accepts["neighbours"] else _merged(turns)

    # Where the learnt text is

    def _spans(self, turns: list[Turn], tools: Sequence[Json] | None) -> tuple[str, list[_Span]]:
        """The text to learn from and its learnt spans.

        The texts of the assistant are found between what the template writes around stand-ins of
        theirs, whatever else it does to them (trimming, dropping thoughts, writing tool calls).
        """
        said = [turn.message() for turn in turns]
        own = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
        for index in own:
            said[index] = _said("assistant", _standin(index))
        around = self._render(said, tools, opened=False)
        whole = self._render([turn.message() for turn in turns], tools, opened=False)
        pieces: list[str] = []
        for index in own:
            piece, found, around = around.partition(_standin(index))
            if not found:
                raise _unusable("チャットテンプレートがこの会話の発言を落とします。")
            pieces.append(piece)
        pieces.append(around)
        text, read = "", 0
        spans: list[_Span] = []
        for number, index in enumerate(own):
            if not whole.startswith(pieces[number], read):
                raise _unusable("チャットテンプレートの書く会話の中に、返答が見つかりません。")
            start = read + len(pieces[number])
            last = number + 1 == len(own)
            following = pieces[number + 1]
            end = len(whole) - len(following) if last else whole.find(following, start)
            if end < start or (last and not whole.endswith(following)):
                raise _unusable(
                    "チャットテンプレートの書く会話の中に、返答の終わりが見つかりません。"
                )
            text += whole[read:start]
            turn, written = turns[index], len(self._written)
            if turn.learnt[0] and not text.endswith(self._inserted):
                text += self._inserted
            if not text.endswith(self._written):
                written = 0
            spans += _spans_within(turn, whole[start:end], len(text), written, len(following))
            text += whole[start:end]
            read = end
        return text + whole[read:], spans


class _Span(NamedTuple):
    start: int
    end: int
    closed: bool  # whether the token that ends the turn is learnt too
    limit: int  # where it must have come by


def _unusable(message: str) -> TrainingFailed:
    return TrainingFailed("template_unusable", message, "model")


def _common_length(one: str, other: str) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((k for k, (a, b) in pairs if a != b), min(len(one), len(other)))


def _merged(turns: Sequence[Turn]) -> list[Turn]:
    merged: list[Turn] = []
    for turn in turns:
        last = merged[-1] if merged else None
        plain = not turn.other and last is not None and not last.other
        if last is not None and plain and turn.role == last.role != "tool":
            texts, learnt = last.texts + turn.texts, last.learnt + turn.learnt
            merged[-1] = replace(last, texts=texts, learnt=learnt)
        else:
            merged.append(turn)
    return merged


def _spans_within(
    turn: Turn, region: str, offset: int, written: int, following: int
) -> Iterator[_Span]:
    """The learnt spans of a turn whose text, as the template wrote it, begins at ``offset``.

    What joins two learnt texts is learnt with the second; ``written`` characters before the first
    are the model's too.
    """
    read, was_learnt = 0, False
    for number, (text, learnt) in enumerate(zip(turn.texts, turn.learnt, strict=True)):
        first, last = number == 0, number + 1 == len(turn.texts)
        found = 0 if first else region.find(text.strip(), read)
        end = len(region) if last else found + len(text.strip())
        if found < 0 or end > len(region):
            raise _unusable("チャットテンプレートの書く会話の中に、返答の一部が見つかりません。")
        if learnt:
            start = -written if first else (read if was_learnt else found)
            limit = offset + len(region) + following
            yield _Span(offset + start, offset + end, last, limit)
        read, was_learnt = end, learnt


# --- Examples -------------------------------------------------------------------------------------


def read_examples(path: str, template: Template, context: int | None, param: str) -> list[Example]:
    """The examples of the JSONL file of a parameter; a failure names both, and the line."""
    examples = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            example = example_of(json.loads(line), template)
        except TrainingFailed as failure:
            message = f"{number}行目: {failure.message}"
            raise TrainingFailed(failure.code, message, param) from failure
        if context is not None and len(example.ids) > context:
            raise TrainingFailed(
                "example_too_long",
                f"{number}行目の会話は{len(example.ids):,}トークンで、このモデルの文脈長"
                f"{context:,}を超えます。会話を短くするか、文脈の長いモデルを選んでください。",
                param,
            )
        examples.append(example)
    return examples


def example_of(record: Json, template: Template) -> Example:
    """A line of a training file."""
    ids, labels = template.learn(record["messages"], record.get("tools"))
    characters = 0
    for message in record["messages"]:
        if message["role"] == "assistant" and message.get("weight") != 0:
            characters += len(_text_of(message))
            for call in message.get("tool_calls") or []:
                characters += len(call["function"]["name"]) + len(call["function"]["arguments"])
    return Example(ids, labels, characters)


def schedule(examples: int, epochs: int, batch: int, seed: int) -> list[int]:
    """The order of the examples over all epochs, each a whole number of batches.

    ``examples`` itself stands for an empty example, of which nothing is learnt: it fills an epoch's
    last batch, so that the number of ranks changes nothing.
    """
    order: list[int] = []
    draw = random.Random(seed)
    for _ in range(epochs):
        epoch = list(range(examples))
        draw.shuffle(epoch)
        order += epoch + [examples] * (-examples % batch)
    return order


# --- Models ---------------------------------------------------------------------------------------


def device_of() -> str:
    """What there is to compute on: cuda, mps or cpu."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def has_bfloat16() -> bool:
    """Whether the device computes in bfloat16 itself."""
    import torch

    return device_of() == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


@contextlib.contextmanager
def _from_hub(path: str) -> Iterator[None]:
    from huggingface_hub.errors import GatedRepoError

    try:
        yield
    except (OSError, ValueError) as error:
        if failure_of(error).code != "server_error":
            raise
        if any(isinstance(cause, GatedRepoError) for cause in _causes(error)):
            raise TrainingFailed(
                "model_gated",
                f"モデル {path} は利用の同意が必要です。https://huggingface.co/{path} で同意し、"
                "環境変数 HF_TOKEN にトークンを設定してから、ジョブを作り直してください。",
                "model",
            ) from error
        raise TrainingFailed(
            "model_not_found",
            f"モデル {path} を読めません。名前かフォルダーの綴りと、huggingface.co への接続"
            "（つながらないマシンでは、取得済みの控え）を確かめてください。",
            "model",
        ) from error


ADAPTER: Final = "adapter_config.json"  # what a folder with an adapter has


def _place_of(file: str, path: str) -> str:
    """Where a file of a model is: of an adapter that came without it, where its base is."""
    adapter = Path(path) / ADAPTER
    if not adapter.is_file() or (Path(path) / file).is_file():
        return path
    return str(json.loads(adapter.read_text("utf-8"))["base_model_name_or_path"])


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a model, with a token to pad with."""
    from transformers import AutoTokenizer

    with _from_hub(path):
        tokenizer = AutoTokenizer.from_pretrained(_place_of("tokenizer_config.json", path))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(path: str, *, training: bool) -> Any:
    """A model on the CPU; ``training`` for all of its weights, which keeps them in float32."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # what is loaded in a moment needs none
    dtype = torch.bfloat16 if has_bfloat16() and not training else torch.float32
    with _from_hub(path):
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def context_of(model: Any, tokenizer: Any) -> int | None:
    """The longest sequence of a model, or None where it doesn't say."""
    config = model.config.get_text_config()
    lengths = [getattr(config, "max_position_embeddings", None), tokenizer.model_max_length]
    return min((n for n in lengths if n is not None and n < 10**9), default=None)


# --- The tiny model -------------------------------------------------------------------------------


def build_tiny(model_dir: str, training_file: str, seed: int) -> str:
    """The folder of a small untrained Qwen3 with a vocabulary learnt from the file; built once."""
    folder = Path(model_dir)
    if (folder / "config.json").exists():
        return str(folder)
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_vocabulary(training_file),
        **dict(zip(("pad_token", "bos_token", "eos_token"), TINY_SPECIAL, strict=True)),
        chat_template=TINY_TEMPLATE,
        model_max_length=TINY_CONTEXT,
    )
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=TINY_CONTEXT,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,  # the template writes what opens a turn
    )
    torch.manual_seed(seed)
    built = folder.with_name(f"{folder.name}.{os.getpid()}")
    Qwen3ForCausalLM(config).save_pretrained(built)
    tokenizer.save_pretrained(built)
    built.replace(folder)
    return str(folder)


def _vocabulary(training_file: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    lines = Path(training_file).read_bytes().splitlines()
    messages = [m for line in lines if line.strip() for m in json.loads(line)["messages"]]
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_VOCABULARY,
        min_frequency=2,
        show_progress=False,
        special_tokens=list(TINY_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = [*map(_text_of, messages), "system\nuser\nassistant\n"]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


# --- Figures --------------------------------------------------------------------------------------


def compare_bits(before: Evaluation, after: Evaluation) -> Json:
    """Bits per character before and after, and the 95 % interval of the difference.

    Over dialogues; a ratio of sums, with the standard error of Cochran 1977, "Sampling Techniques",
    2.11. ``low`` and ``high`` are None for fewer dialogues than `MIN_DIALOGUES`.
    """
    difference = after.bits_per_character - before.bits_per_character
    low = high = None
    count = len(after.nats)
    if count >= MIN_DIALOGUES:
        residuals = [
            (new - old) / math.log(2) - difference * size
            for old, new, size in zip(before.nats, after.nats, after.characters, strict=True)
        ]
        mean = sum(after.characters) / count
        variance = math.fsum(r * r for r in residuals) / (count - 1)
        half = student_t(0.975, count - 1) * math.sqrt(variance / count) / mean
        low, high = difference - half, difference + half
    return {
        "before": before.bits_per_character,
        "after": after.bits_per_character,
        "low": low,
        "high": high,
        "examples": count,
    }


# --- The trainer ----------------------------------------------------------------------------------


class Reporter:
    """What a training tells and keeps: steps, evaluations and checkpoints."""

    def __init__(self, folder: Path, progress: Progress, validation: Sequence[Example]) -> None:
        self.progress = progress
        self._file = folder / EVALUATIONS
        self._characters = [example.characters for example in validation]
        self._step: Json | None = None  # done but not written

    def stepped(self, step: int, total: int, loss: float, accuracy: float) -> None:
        """A step is done; it is written with the evaluation that may belong to it."""
        _check_finite(step, loss)
        metrics = {"train_loss": loss, "train_mean_token_accuracy": accuracy}
        self._step = {"step": step, "total_steps": total, "metrics": metrics}

    def evaluated(self, step: int, figures: Sequence[Sequence[float]]) -> Evaluation:
        """The nats, right tokens and tokens of each validation example, in order."""
        nats, correct, tokens = zip(*figures, strict=True)
        _check_finite(step, sum(nats))
        evaluation = Evaluation(
            step, list(nats), list(map(int, correct)), list(map(int, tokens)), self._characters
        )
        if self.progress.speaks:
            _append(self._file, evaluation._asdict())
        if self._step is not None:
            self._step["metrics"] |= evaluation.metrics
            self.write_step()
        return evaluation

    def write_step(self) -> None:
        """Write the step that was done."""
        if self._step is not None:
            self.progress.write("step", **self._step)
            self._step = None

    def saved(self, step: int, path: Path) -> None:
        """A checkpoint is whole; those that are kept no longer go, and their optimisers."""
        if not any(path.glob("*model*.safetensors")):
            raise TrainingFailed(
                "server_error",
                f"{path.name} に、応答に使える重みがありません。FSDPの設定ファイルに "
                "fsdp_state_dict_type: FULL_STATE_DICT を書いてから、ジョブを作り直してください。",
            )
        self.progress.write("checkpoint", step=step, path=str(path))
        if self.progress.speaks:
            kept = self.kept()
            for old in self.progress.checkpoints():
                if _step_of(old) not in kept:
                    shutil.rmtree(old)
                elif old != path:
                    drop_optimiser(old)

    def kept(self) -> list[int]:
        """The steps of the last three epochs and of the least validation loss."""
        steps = [_step_of(path) for path in self.progress.checkpoints()]
        return sorted({*steps[-KEPT_EPOCHS:], *([self.best(steps)] if steps else [])})

    def best(self, steps: Sequence[int]) -> int:
        """The step of the least validation loss; the last where nothing was validated."""
        metrics = self.progress.steps()
        return min(reversed(steps), key=lambda step: metrics[step].get("full_valid_loss", math.inf))

    def evaluation(self, step: int) -> Evaluation | None:
        """The evaluation of a step."""
        found = [record for record in _Tail(self._file).read() if record["step"] == step]
        return Evaluation(**found[-1]) if found else None

    def done(self, trained_tokens: int) -> None:
        """The end."""
        if not self.progress.speaks:
            return
        steps, metrics = self.kept(), self.progress.steps()
        before, after = self.evaluation(0), self.evaluation(steps[-1])
        self.progress.write(
            "done",
            trained_tokens=trained_tokens,
            checkpoints=[{"step": step, "metrics": metrics[step]} for step in steps],
            best=self.best(steps),
            bits_per_character=compare_bits(before, after) if before and after else None,
        )


def _check_finite(step: int, loss: float) -> None:
    if not math.isfinite(loss):
        raise TrainingFailed(
            "training_diverged",
            f"{step}回目の更新で損失が{loss}になりました。learning_rate_multiplier を"
            "小さくして、ジョブを作り直してください。",
            "learning_rate_multiplier",
        )


def drop_optimiser(checkpoint: Path) -> None:
    """Delete what is only there to go on training."""
    for pattern in ("optimizer*", "rng_state*", "scheduler.pt", "scaler.pt", "training_args.bin"):
        for path in checkpoint.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


class _Accuracy:
    """Counts what a model in training predicts right, as a hook of its forward pass."""

    def __init__(self, device: Any) -> None:
        import torch

        self._counts = torch.zeros(2, device=device)

    def __call__(self, module: Any, inputs: Any, outputs: Any) -> None:
        if module.training:
            self._counts[0] += outputs.is_top1.sum()
            self._counts[1] += outputs.label_mask.sum()

    def take(self, accelerator: Any) -> float:
        """The share since the last time, over all ranks."""
        right, tokens = accelerator.reduce(self._counts.clone()).tolist()
        self._counts.zero_()
        return float(right / tokens)


def _trainer_class() -> Any:
    """TRL's trainer, reporting to a `Reporter`."""
    import torch
    from trl import SFTTrainer

    class _Trainer(SFTTrainer):
        def watch(self, reporter: Reporter) -> None:
            self.reporter, self.accuracy = reporter, _Accuracy(self.args.device)
            self.model.register_forward_hook(self.accuracy)
            self.compute_metrics = self._measured

        def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            """The figures of the examples, in place of their loss, logits and labels."""
            inputs = self._prepare_inputs(inputs)
            with torch.no_grad(), self.compute_loss_context_manager():
                seen = model(**inputs, fused_lm_head=True)
            rows = (-seen.log_probs.float(), seen.is_top1.float(), seen.label_mask.float())
            figures = torch.stack([row.sum(dim=1) for row in rows], dim=1)
            return None, figures, figures  # without labels nothing would be measured

        def _measured(self, prediction: Any) -> dict[str, float]:
            figures = prediction.predictions.tolist()
            return self.reporter.evaluated(self.state.global_step, figures).metrics

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            super().log(logs, start_time)
            if "loss" in logs:  # not those of an evaluation or of the whole training
                step, accuracy = self.state.global_step, self.accuracy.take(self.accelerator)
                self.reporter.stepped(step, self.state.max_steps, logs["loss"], accuracy)
                if not self.control.should_evaluate:
                    self.reporter.write_step()

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            step = self.state.global_step
            self.reporter.saved(step, Path(self.args.output_dir) / f"checkpoint-{step}")

    return _Trainer


def _arguments_of(spec: Spec, folder: Path, batch: int, ranks: int, steps: int, epoch: int) -> Any:
    """How to train, by the device: float32 on a CPU, an example a device at a time everywhere."""
    from trl import SFTConfig

    device = device_of()
    return SFTConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=batch // ranks,
        train_sampling_strategy="sequential",
        learning_rate=LEARNING_RATES[spec.method] * spec.learning_rate_multiplier,
        warmup_steps=int(WARMUP * steps),
        seed=spec.seed,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        use_cpu=device == "cpu",
        bf16=has_bfloat16(),
        gradient_checkpointing=device != "cpu",
        dataloader_pin_memory=device == "cuda",
        eval_strategy="steps" if spec.validation_file else "no",
        eval_steps=epoch,
        save_strategy="steps",
        save_steps=epoch,
        logging_steps=1,
        logging_nan_inf_filter=False,
        ddp_find_unused_parameters=False if ranks > 1 else None,
        report_to="none",
        disable_tqdm=True,
    )


def train(spec: Spec, folder: Path, progress: Progress) -> None:
    """Do a job, from its last checkpoint where there is one."""
    from accelerate import PartialState

    if ignored := _leave_one_gpu():
        progress.note(
            f"GPUをもう{ignored}個使えます。使うには torchrun か accelerate launch で起動します"
            "（--local-launcher）。",
        )
    state = PartialState(cpu=device_of() == "cpu")
    ranks = state.num_processes
    if spec.ranks is not None and ranks < spec.ranks:
        raise TrainingFailed(
            "ranks_missing",
            f"{spec.ranks}個のプロセスを頼みましたが、{ranks}個しか動いていません。起動の仕方を"
            "確かめてください（CPUでは accelerate launch でなく torchrun を使います）。",
        )
    path = spec.model
    if spec.model == TINY:
        with state.main_process_first():
            path = build_tiny(spec.model_dir or str(folder / TINY), spec.training_file, spec.seed)
        progress.note(
            "tiny は流れを確かめるための、何も知らない小さなモデルです。答えに意味はありません。"
        )
    tokenizer = load_tokenizer(path)
    template = Template(tokenizer)
    for note in template.notes:
        progress.note(note)
    model = load_model(path, training=spec.method != "lora")
    context = context_of(model, tokenizer)
    training = read_examples(spec.training_file, template, context, "training_file")
    validation: list[Example] = []
    if spec.validation_file is not None:
        validation = read_examples(spec.validation_file, template, context, "validation_file")
    learnt = sum(example.learnt for example in training)
    progress.write(
        "data",
        examples=len(training),
        validation_examples=len(validation),
        tokens=sum(len(example.ids) for example in training),
        learnt_tokens=learnt,
    )
    reporter = Reporter(folder, progress, validation)
    _fit(spec, _Parts(folder, model, tokenizer, training, validation, ranks), reporter)
    if progress.speaks:
        for checkpoint in progress.checkpoints():
            drop_optimiser(checkpoint)
    reporter.done(learnt * spec.n_epochs)  # the last thing: whoever reads it ends this process


def _leave_one_gpu() -> int:
    """Without a launcher a process uses one GPU, and TRL refuses to see more; how many go."""
    import torch

    count = int(torch.cuda.device_count())
    if "WORLD_SIZE" in os.environ or count < 2:
        return 0
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return count - 1


class _Parts(NamedTuple):
    folder: Path
    model: Any
    tokenizer: Any
    training: list[Example]
    validation: list[Example]
    ranks: int


def _fit(spec: Spec, parts: _Parts, reporter: Reporter) -> None:
    from datasets import Dataset
    from peft import LoraConfig

    progress, count = reporter.progress, len(parts.training)
    asked = min(spec.batch_size, count)
    batch = asked + -asked % parts.ranks
    if batch != asked:
        progress.note(f"バッチサイズを、{parts.ranks}個のプロセスで割れる{batch}にします。", "warn")
    order = schedule(count, spec.n_epochs, batch, spec.seed)
    steps, epoch = len(order) // batch, -(-count // batch)
    empty = Example([parts.tokenizer.pad_token_id] * 2, [IGNORED] * 2, 0)
    lora = LoraConfig(
        r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    trainer = _trainer_class()(
        model=parts.model,
        args=_arguments_of(spec, parts.folder, batch, parts.ranks, steps, epoch),
        train_dataset=Dataset.from_dict(_columns([*parts.training, empty])).select(order),
        eval_dataset=Dataset.from_dict(_columns(parts.validation)) if parts.validation else None,
        processing_class=parts.tokenizer,
        peft_config=lora if spec.method == "lora" else None,
    )
    trainer.watch(reporter)
    weights = [(p.numel(), p.requires_grad) for p in trainer.model.parameters()]
    progress.write(
        "ready",
        ranks=parts.ranks,
        device=trainer.args.device.type,
        method="lora" if spec.method == "lora" else "full",
        parameters=sum(size for size, _ in weights),
        trainable=sum(size for size, trained in weights if trained),
        total_steps=steps,
    )
    checkpoints = progress.checkpoints()
    last = checkpoints[-1] if checkpoints else None
    # Not `trainer.evaluate()` before: it would keep the model from being shared between ranks.
    trainer.args.eval_on_start = last is None and bool(parts.validation)
    trainer.train(resume_from_checkpoint=str(last) if last else None)


def _columns(examples: Sequence[Example]) -> dict[str, list[list[int]]]:
    return {
        "input_ids": [example.ids for example in examples],
        "labels": [example.labels for example in examples],
    }


# --- Answering ------------------------------------------------------------------------------------

SMALL_MODEL: Final = 10**7  # parameters below which threads wait for one another by spinning
MAX_BATCH: Final = 16  # questions in one generate
MAX_ANSWER: Final = 4096  # tokens of an answer for which no limit is asked
WHOLE_KEPT: Final = 2  # models in memory: a base, and one trained in full
ADAPTERS_KEPT: Final = 8
LEAST_TEMPERATURE: Final = 1e-4  # below it the likeliest is drawn; a division would overflow
GATHERING_SECONDS: Final = 0.001  # what is asked at once arrives one after the other within it
# Both spellings: OpenAI's models leave the spaces out, Python's json.dumps puts them in, and a
# model answers best as it has learnt.
_JSON_SEPARATORS: Final = {"item_separator": ", ?", "key_separator": ": ?"}


@dataclass
class _Writing:
    """One answer as it is written: what is asked of it, and what there is so far."""

    prompt: list[int]
    limit: int
    temperature: float
    top_p: float
    presence: float
    frequency: float
    stops: list[str]
    stop_ids: frozenset[int]
    generator: Any  # torch.Generator: its own, so that company changes no draw
    matcher: Any  # llguidance.LLMatcher, or None where any text will do
    tokenizer: Any
    written: list[int] = field(default_factory=list)
    finish: Literal["stop", "length"] | None = None

    def go_on(self, scores: Any, best: int) -> int:
        """The next token, from the scores of all; `best` is the likeliest."""
        if self.finish is not None:
            return best  # a row that waits for its batch
        token = best
        if self.temperature or self.matcher or self.presence or self.frequency:
            token = self._choose(scores)
        self.written.append(token)
        if self.matcher:
            self.matcher.consume_token(token)
        ended = token in self.stop_ids or (self.matcher and self.matcher.is_stopped())
        if ended or self._is_stopped():
            self.finish = "stop"
        elif len(self.written) >= self.limit:
            self.finish = "length"
        return token

    def _choose(self, scores: Any) -> int:
        import torch

        scores = scores.clone()
        penalised = self.presence or self.frequency
        for token, times in Counter(self.written).items() if penalised else ():
            scores[token] -= self.presence + self.frequency * times
        if self.matcher:
            scores[~_allowed(self.matcher, scores)] = -torch.inf
        if self.temperature < LEAST_TEMPERATURE:
            return int(scores.argmax())
        chances = torch.softmax(scores / self.temperature, -1)
        if self.top_p < 1:
            ordered, places = chances.sort(descending=True, stable=True)
            before = ordered.cumsum(-1) - ordered
            before[0] = -1  # the likeliest remains, also for a top_p of 0
            ordered[before >= self.top_p] = 0
            chances = torch.zeros_like(chances).scatter(-1, places, ordered)
        return int(torch.multinomial(chances, 1, generator=self.generator))

    def _is_stopped(self) -> bool:
        """Whether a stop sequence has just ended."""
        if not self.stops:
            return False
        reach = max(len(stop.encode()) for stop in self.stops)  # a token has a byte or more
        text = self._text_of(self.written[-reach:])
        return any(stop in text for stop in self.stops)

    def _text_of(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def reply(self) -> Reply:
        """What was written, without the stop sequence and half a character at the end."""
        text = self._text_of(self.written)
        for stop in self.stops:
            text = text.split(stop)[0]
        if self.finish == "length":
            text = text.rstrip("\ufffd")
        return Reply(text, len(self.prompt), len(self.written), self.finish or "length")


def _allowed(matcher: Any, scores: Any) -> Any:
    """Which tokens the grammar allows next, as booleans on the device of the scores."""
    import torch

    packed = torch.frombuffer(bytearray(matcher.compute_bitmask()), dtype=torch.uint8)
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    allowed = torch.zeros(scores.shape[-1], dtype=torch.bool)
    known = bits.flatten()[: len(allowed)].bool()
    allowed[: len(known)] = known
    return allowed.to(scores.device)


def _is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER).exists()


def _number(body: Json, key: str, usual: float, low: float, high: float) -> float:
    value = body.get(key)
    if value is None:
        return usual
    right = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not right:
        raise ApiError(400, f"Invalid '{key}': expected a number from {low} to {high}.", key)
    return float(value)


def _check_question(body: Json) -> None:
    """400 for what would be left out of an answer without a word."""
    for key in ("logprobs", "top_logprobs", "logit_bias", "functions", "audio", "prediction"):
        if body.get(key):
            raise ApiError(400, f"'{key}' is not supported by local models.", key)
    if body.get("tool_choice") not in (None, "auto", "none"):
        message = "Only 'auto' and 'none' are supported by local models."
        raise ApiError(400, f"Invalid 'tool_choice': {message}", "tool_choice")
    for index, message in enumerate(body["messages"]):
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        if any(part.get("type") not in ("text", "refusal") for part in parts):
            where = f"messages[{index}].content"
            raise ApiError(400, f"Invalid '{where}': local models read text only.", where)
    try:
        json.dumps(body["messages"], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError(400, "Invalid 'messages': a lone surrogate.", "messages") from None


def _seed(body: Json) -> int:
    seed = body.get("seed")
    if seed is None:
        return secrets.randbits(63)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ApiError(400, "Invalid 'seed': expected an integer.", "seed")
    return seed % 2**63


def _stops(body: Json) -> list[str]:
    given = body.get("stop")
    stops = [given] if isinstance(given, str) else given or []
    right = isinstance(stops, list) and len(stops) <= 4 and all(isinstance(s, str) for s in stops)
    if not right or "" in stops:
        raise ApiError(400, "Invalid 'stop': expected up to four strings.", "stop")
    return stops


def _wanted_schema(body: Json) -> Json | None:
    """The JSON schema that a ``response_format`` asks for; None where any text will do."""
    given = body.get("response_format") or {"type": "text"}
    kind = given.get("type") if isinstance(given, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    described = given.get("json_schema") if kind == "json_schema" else None
    schema = described.get("schema") if isinstance(described, dict) else None
    if not isinstance(schema, dict):
        message = "Invalid 'response_format': expected text, json_object or a json_schema."
        raise ApiError(400, message, "response_format")
    return schema


class _Loaded:
    """A whole model in memory, with its tokenizer and the adapters put on it."""

    def __init__(self, source: str) -> None:
        import torch
        from transformers import GenerationConfig

        self.tokenizer = load_tokenizer(source)
        self.template = Template(self.tokenizer)
        self.model = load_model(source, training=False).eval().to(device_of())
        if self.model.num_parameters() < SMALL_MODEL:
            torch.set_num_threads(1)
        # A model's own settings (a temperature, a penalty) would fill in what a question leaves
        # open: none is left.
        self.model.generation_config = GenerationConfig()
        self.adapters: OrderedDict[str, None] = OrderedDict()
        self.context = context_of(self.model, self.tokenizer)
        self.vocabulary: int = self.model.config.get_text_config().vocab_size

    @functools.cached_property
    def grammar_tokenizer(self) -> Any:
        """The tokenizer as llguidance reads it, whose making takes a second."""
        from llguidance.hf import from_tokenizer

        stops = self.template.stop_ids
        return from_tokenizer(self.tokenizer, n_vocab=self.vocabulary, eos_token=stops)

    def wear(self, adapter: Path) -> None:
        """Put an adapter on, in place of the one there was."""
        from peft import PeftModel

        name = f"{adapter.parent.name}-{adapter.name}"
        if not self.adapters:
            self.model = PeftModel.from_pretrained(self.model, adapter, adapter_name=name)
            self.model.eval()
        elif name not in self.adapters:
            self.model.load_adapter(adapter, adapter_name=name)
        self.adapters[name] = None
        self.adapters.move_to_end(name)
        self.model.set_adapter(name)
        if len(self.adapters) > ADAPTERS_KEPT:
            self.model.delete_adapter(self.adapters.popitem(last=False)[0])

    def bare(self) -> contextlib.AbstractContextManager[None]:
        """Without any adapter, as long as it lasts."""
        if not self.adapters:
            return contextlib.nullcontext()
        without: contextlib.AbstractContextManager[None] = self.model.disable_adapter()
        return without

    def begin(self, body: Json) -> _Writing:
        """What a question asks for; `ApiError` where it can't be had."""
        import torch

        _check_question(body)
        tools = None if body.get("tool_choice") == "none" else body.get("tools")
        prompt = self.template.prompt(body["messages"], tools)
        generator = torch.Generator(self.model.device)
        generator.manual_seed(_seed(body))
        return _Writing(
            prompt=prompt,
            limit=self._limit(len(prompt), body),
            temperature=_number(body, "temperature", 1, 0, 2),
            top_p=_number(body, "top_p", 1, 0, 1),
            presence=_number(body, "presence_penalty", 0, -2, 2),
            frequency=_number(body, "frequency_penalty", 0, -2, 2),
            stops=_stops(body),
            stop_ids=frozenset(self.template.stop_ids),
            generator=generator,
            matcher=self._matcher(_wanted_schema(body)),
            tokenizer=self.tokenizer,
        )

    def _limit(self, prompt: int, body: Json) -> int:
        """How many tokens an answer may have."""
        asked = body.get("max_completion_tokens") or body.get("max_tokens")
        if self.context is None:
            return asked or MAX_ANSWER
        room = self.context - prompt
        if room < (asked or 1):
            message = (
                f"This model's maximum context length is {self.context} tokens. However, you "
                f"requested {prompt + (asked or 1)} tokens ({prompt} in the messages, "
                f"{asked or 1} in the completion)."
            )
            raise ApiError(400, message, "messages", "context_length_exceeded")
        return asked or min(room, MAX_ANSWER)

    def _matcher(self, schema: Json | None) -> Any:
        from llguidance import LLMatcher

        if schema is None:
            return None
        style: Any = {"whitespace_flexible": False, **_JSON_SEPARATORS}
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides=style)
        matcher = LLMatcher(self.grammar_tokenizer, grammar)
        if matcher.is_error():
            why = f"Invalid schema for response_format: {matcher.get_error()}"
            raise ApiError(400, why, "response_format")
        return matcher

    def write(self, rows: list[_Writing], given_up: threading.Event) -> None:
        """Write all answers at once."""
        import torch
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        def choose(_: Any, scores: Any) -> Any:
            best = scores.argmax(-1).tolist()
            tokens = [row.go_on(scores[i], best[i]) for i, row in enumerate(rows)]
            chosen = torch.tensor(tokens, device=scores.device)[:, None]
            return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)

        def ended(_: Any, scores: Any, **__: Any) -> Any:
            finished = [given_up.is_set() or row.finish is not None for row in rows]
            return torch.tensor(finished, device=self.model.device)

        width = max(len(row.prompt) for row in rows)
        missing = [width - len(row.prompt) for row in rows]
        pairs = list(zip(missing, rows, strict=True))
        filler = self.template.stop_ids[0]
        ids = [[filler] * left + row.prompt for left, row in pairs]
        mask = [[0] * left + [1] * len(row.prompt) for left, row in pairs]
        with torch.inference_mode():
            self.model.generate(
                input_ids=torch.tensor(ids, device=self.model.device),
                attention_mask=torch.tensor(mask, device=self.model.device),
                generation_config=GenerationConfig(
                    do_sample=False,  # `choose` leaves one token, drawn where that is asked for
                    max_new_tokens=max(row.limit for row in rows),
                    pad_token_id=filler,
                ),
                logits_processor=LogitsProcessorList([choose]),
                stopping_criteria=StoppingCriteriaList([ended]),
            )


class _Weights(NamedTuple):
    """Which weights answer: a whole model, and an adapter on it."""

    whole: str
    adapter: Path | None


@dataclass
class _Batch:
    """Questions to the same weights, answered together; `replies` are in their order."""

    weights: _Weights
    questions: list[Json] = field(default_factory=list)
    replies: list[Reply | ApiError] = field(default_factory=list)
    done: concurrent.futures.Future[None] = field(default_factory=concurrent.futures.Future)


class _Answerer:
    """Answers from models in this process; one thread touches the models.

    What is asked while it writes waits in a batch for each of the weights; a batch is answered in
    one go, in the order in which the batches were begun.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._waiting: dict[_Weights, _Batch] = {}
        self._loaded: OrderedDict[str, _Loaded] = OrderedDict()
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "answers")

    def answer(self, weights: _Weights, body: Json) -> Reply:
        """Wait for the answer to a question; `ApiError` where there is none."""
        try:
            with self._lock:
                batch = self._waiting.get(weights)
                if batch is None or len(batch.questions) >= MAX_BATCH:
                    batch = self._waiting[weights] = _Batch(weights)
                    batch.done = self._worker.submit(self._run, batch)
                place = len(batch.questions)
                batch.questions.append(body)
            batch.done.result()
        except TrainingFailed as failure:  # of the model, which can't be loaded
            raise ApiError(400, failure.message, failure.param, failure.code) from None
        except OSError as problem:  # which the endpoint would take for a client that hung up
            message = f"重みを読めません: {problem}"
            raise ApiError(500, message, kind="server_error") from None
        except (concurrent.futures.CancelledError, RuntimeError):
            if not self._closed.is_set():
                raise
            raise ApiError(503, "The endpoint is closing.", kind="server_error") from None
        reply = batch.replies[place]
        if isinstance(reply, ApiError):
            raise reply
        return reply

    def release(self) -> None:
        """Give back the memory of all models, when what is being answered has been."""
        self._worker.submit(self._unload)

    def close(self) -> None:
        """Break off what is being written, and end the thread."""
        self._closed.set()
        self._worker.shutdown(cancel_futures=True)
        self._unload()

    def _run(self, batch: _Batch) -> None:
        come = 0
        while len(batch.questions) > come:
            come = len(batch.questions)
            time.sleep(GATHERING_SECONDS)
        with self._lock:
            if self._waiting.get(batch.weights) is batch:
                del self._waiting[batch.weights]
        whole, adapter = batch.weights
        loaded = self._ready(whole)
        if adapter is not None:
            loaded.wear(adapter)
        with loaded.bare() if adapter is None else contextlib.nullcontext():
            _log.debug("%s: answering %d at once", adapter or whole, len(batch.questions))
            batch.replies = self._replies(loaded, batch.questions)
        if self._closed.is_set():
            raise concurrent.futures.CancelledError

    def _replies(self, loaded: _Loaded, questions: Sequence[Json]) -> list[Reply | ApiError]:
        """The answers to all questions at once; in halves where the memory isn't enough."""
        begun = [self._begin(loaded, body) for body in questions]
        rows = [row for row in begun if isinstance(row, _Writing)]
        try:
            if rows:
                loaded.write(rows, self._closed)
            return [row.reply() if isinstance(row, _Writing) else row for row in begun]
        except RuntimeError as problem:
            if failure_of(problem).code != OUT_OF_MEMORY:
                raise
        _give_back_memory()
        if len(questions) == 1:
            message = (
                "応答を作るメモリが足りません。対話か max_completion_tokens を短くしてください。"
            )
            return [ApiError(400, message, "messages", OUT_OF_MEMORY)]
        half = len(questions) // 2
        return self._replies(loaded, questions[:half]) + self._replies(loaded, questions[half:])

    def _begin(self, loaded: _Loaded, body: Json) -> _Writing | ApiError:
        try:
            return loaded.begin(body)
        except ApiError as problem:
            return problem
        except TrainingFailed as failure:  # of the template, which can't say this
            return ApiError(400, failure.message, failure.param, failure.code)

    def _ready(self, source: str) -> _Loaded:
        if source not in self._loaded:
            while len(self._loaded) >= WHOLE_KEPT:
                self._loaded.popitem(last=False)
            try:
                self._loaded[source] = _Loaded(source)
            except RuntimeError as problem:
                if not self._loaded or failure_of(problem).code != OUT_OF_MEMORY:
                    raise
                self._unload()  # the memory holds one model only
                self._loaded[source] = _Loaded(source)
        self._loaded.move_to_end(source)
        return self._loaded[source]

    def _unload(self) -> None:
        if self._loaded:
            self._loaded.clear()
            _give_back_memory()


def _give_back_memory() -> None:
    import torch

    gc.collect()
    torch.cuda.empty_cache()


# --- Answers of a server --------------------------------------------------------------------------


class _Server:
    """A vLLM server that answers in this process's place; it must see the same files."""

    def __init__(self, url: str) -> None:
        import openai

        key = os.environ.get("VLLM_API_KEY", "none")
        self._client = openai.OpenAI(base_url=url, api_key=key, max_retries=0)
        self._lock = threading.Lock()
        self._lent: set[str] = set()

    def answer(self, base: str, adapter: Path | None, body: Json) -> Reply:
        """The server's answer; it is lent an adapter when it is first asked for."""
        _check_question(body)
        asked = {"chat_template_kwargs": {"enable_thinking": False}, **body, "model": base}
        if adapter is not None:
            asked["model"] = self._lend(adapter)
        try:
            answer = self._post("/chat/completions", asked)
        except ApiError as problem:
            if adapter is None or problem.answer.status != 404:
                raise
            self._lent.clear()  # the server was started anew
            self._lend(adapter)
            answer = self._post("/chat/completions", asked)
        (choice,), usage = answer["choices"], answer["usage"]
        text, reason = choice["message"]["content"] or "", choice["finish_reason"]
        return Reply(text, usage["prompt_tokens"], usage["completion_tokens"], reason)

    def close(self) -> None:
        """End the connections."""
        self._client.close()

    def _lend(self, adapter: Path) -> str:
        """Have the server load an adapter once, by a name without the colons of ours."""
        name = f"{adapter.parent.name}-{adapter.name}"
        with self._lock:
            if name not in self._lent:
                lent = {"lora_name": name, "lora_path": str(adapter)}
                try:
                    self._post("/load_lora_adapter", lent)
                except ApiError as problem:
                    if b"already" not in problem.answer.body:
                        raise
                self._lent.add(name)
        return name

    def _post(self, path: str, body: Json) -> Any:
        """What the server says; `ApiError` with the status of its refusal."""
        import openai

        try:
            return self._client.post(path, cast_to=object, body=body)
        except openai.APIStatusError as problem:
            raise ApiError(problem.status_code, problem.message, problem.param) from None
        except openai.APIConnectionError as problem:
            url = self._client.base_url
            message = (
                f"{url} に接続できません（{problem}）。vllm serve が動いているか確認してください。"
            )
            raise ApiError(503, message, kind="server_error") from None


# --- The engine -----------------------------------------------------------------------------------

POLL_SECONDS: Final = 0.02  # at which the progress file is read
GRACE_SECONDS: Final = 0.2  # between asking a trainer to end and ending it
_LAST: Final = frozenset({"done", "failed"})  # records after which there is none
_KILLED: Final = frozenset({-9, 137})
_IDENTIFIER: Final = re.compile("[A-Za-z0-9_-]{1,100}")


class LocalEngine:
    """Trains a model in a process of its own, and answers from it; see `Engine`.

    `model` is a Hugging Face id, a folder, or "tiny". Each job has a folder in ``state/trainers``:
    ``spec.json`` says what is asked, ``progress.jsonl`` what comes of it, ``trainer.log`` is what
    the trainer said, ``checkpoint-N`` are weights. `launcher` is what starts Python on several
    devices, such as "torchrun --nproc_per_node 8"; `serve_url` is that of a vLLM server, with its
    ``/v1``.
    """

    owner: str = "local"
    shutdown_date: str | None = None

    def __init__(
        self,
        model: str,
        state: Path,
        *,
        launcher: str | None = None,
        serve_url: str | None = None,
        full: bool = False,
    ) -> None:
        if missing := missing_packages():
            raise ModuleNotFoundError(f"{'、'.join(missing)} がありません")
        self._model, self._state, self._full = model, state.resolve(), full
        self._launcher = shlex.split(launcher, posix=os.name != "nt") if launcher else None
        # A folder is called by its name too, which a tuned model's takes up: that shows no path.
        name = Path(model).resolve().name if Path(model).is_dir() else model
        self.base_models: Mapping[str, str] = {name: name, model: name}
        self.learning_rate = LEARNING_RATES[_method(model, full)]
        self._answerer = _Answerer()
        self._server = _Server(serve_url) if serve_url else None

    def train(self, order: Order) -> Generator[Item, None, None]:
        """What comes of a job, as it comes; closing it ends the job's processes.

        A job that an earlier engine began is taken up: its trainer is followed where it lives, else
        it is started again and goes on from its last checkpoint. A trainer that this engine started
        and that dies isn't started again.
        """
        folder, reported = self._folder(order.job_id), 0
        self._answerer.release()
        with contextlib.closing(self._records(folder, order)) as records:
            for item in _items(records):
                reported += item is not None
                if item is None or reported > order.seen:
                    yield item

    def answer(self, model: Model, body: Json) -> Reply:
        """See `Engine`."""
        if model.base not in self.base_models.values():
            message = f"{model.base} から学習したモデルです。--local（--model）に指定してください。"
            raise ApiError(404, message, "model", "model_not_found")
        weights = _Weights(self._base, None)
        if model.job_id is not None:
            checkpoint = self._folder(model.job_id) / f"checkpoint-{model.step or 0:d}"
            if _is_adapter(checkpoint):
                weights = _Weights(self._base, checkpoint)
            else:
                weights = _Weights(str(checkpoint), None)
        if self._is_missing(weights):
            message = f"{model.base} の重みがまだありません。先に学習してください。"
            raise ApiError(404, message, "model", "model_not_found")
        if self._server is None:
            return self._answerer.answer(weights, body)
        if weights.adapter is None and model.job_id is not None:
            message = (
                "全パラメーターを学習したモデルは、--serve-url のサーバーでは切り替えられません。"
                f"vllm serve {weights.whole} で起動して直接使うか、--full なしで学習してください。"
            )
            raise ApiError(400, message, "model", "model_not_available")
        return self._server.answer(self._model, weights.adapter, body)

    def weights(self, model: Model) -> Mapping[str, bytes | Path]:
        """See `Engine`; all that is in the checkpoint's folder."""
        folder = self._folder(str(model.job_id)) / f"checkpoint-{model.step or 0:d}"
        return {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}

    def forget(self, job_id: str) -> None:
        """See `Engine`."""
        folder = self._folder(job_id)
        _end_processes(folder)
        if folder.exists():
            shutil.rmtree(folder)

    def close(self) -> None:
        """See `Engine`; what trains ends as its `train` is closed."""
        self._answerer.close()
        if self._server is not None:
            self._server.close()

    @property
    def _base(self) -> str:
        """Where the base model is."""
        return str(self._state / TINY) if self._model == TINY else self._model

    def _is_missing(self, weights: _Weights) -> bool:
        """Whether weights of this engine's own making aren't there."""
        whole = Path(weights.whole)
        return whole.is_relative_to(self._state) and not (whole / "config.json").exists()

    def _folder(self, job_id: str) -> Path:
        if not _IDENTIFIER.fullmatch(job_id):  # what comes from outside becomes part of a path
            raise ValueError(f"{job_id!r} is not the name of a job")
        return self._state / "trainers" / job_id

    def _records(self, folder: Path, order: Order) -> Generator[Json | None, None, None]:
        """All that trainers of a job write; raises `TrainingFailed` where one died untold."""
        tail, trainer = _Tail(folder / PROGRESS), None
        try:
            while True:
                # Asked before reading: what was written last is read yet.
                lives = trainer.poll() is None if trainer else False
                lives = lives or _is_trained(folder)
                news = tail.read()
                for record in news:
                    if record["kind"] not in _LAST:
                        yield record
                        continue
                    _end_processes(folder, trainer)  # a job that has ended has none
                    yield record
                    return
                if lives:
                    yield None
                    time.sleep(0 if news else POLL_SECONDS)
                elif trainer:
                    raise _death(folder, trainer.returncode)
                else:
                    trainer = self._start(folder, order)
        finally:
            _end_processes(folder, trainer)

    def _start(self, folder: Path, order: Order) -> subprocess.Popen[bytes]:
        """Start a job's trainer in a session of its own, which outlives this process."""
        try:
            self._write_order(folder, order)
            command = self._launcher or [sys.executable]
            own = str(Path(__file__).parent)
            paths = [own, *filter(None, [os.environ.get("PYTHONPATH")])]
            environment = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUTF8": "1"}
            if self._model == TINY:  # see SMALL_MODEL
                environment["OMP_NUM_THREADS"] = "1"
            with (folder / LOG).open("ab") as log:
                return subprocess.Popen(  # noqa: S603  # the launcher is its user's own
                    [*command, "-m", "openai_sft_local", str(folder)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=os.environ | environment,
                    start_new_session=True,  # a Ctrl-C is the endpoint's; Windows needs the flag
                    creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
                )
        except OSError as problem:
            full = problem.errno in (errno.ENOSPC, errno.EDQUOT)
            code = "disk_full" if full else "trainer_not_started"
            remedy = "空き容量" if full else "ランチャーの名前と、フォルダーに書けること"
            message = f"学習を始められません: {problem}。{remedy}を確かめてください。"
            raise TrainingFailed(code, message) from None

    def _write_order(self, folder: Path, order: Order) -> None:
        """What the trainer reads; the specification last: where it is, all is."""
        if (folder / SPEC).exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        training, validation = folder / "training_file.jsonl", folder / "validation_file.jsonl"
        training.write_bytes(order.training)
        if order.validation is not None:
            validation.write_bytes(order.validation)
        spec = Spec(
            job_id=order.job_id,
            model=self._model,
            model_dir=self._base if self._model == TINY else None,
            training_file=str(training),
            validation_file=None if order.validation is None else str(validation),
            n_epochs=order.n_epochs,
            batch_size=order.batch_size,
            learning_rate_multiplier=order.learning_rate_multiplier,
            seed=order.seed,
            full=self._full,
            ranks=_ranks_of(self._launcher or []),
        )
        spec.write(folder / f"{SPEC}.part")
        (folder / f"{SPEC}.part").replace(folder / SPEC)


def _items(records: Iterable[Json | None]) -> Generator[Item, None, None]:
    """What the API tells of a trainer's records; a trainer that was started again repeats some."""
    step, said = 0, set()
    for record in records:
        match record:
            case None:
                yield None
            case {"kind": "step", "step": number} if number > step:
                step = number
                yield Step(record["total_steps"], {"step": step, **record["metrics"]})
            case {"kind": "failed"}:
                raise TrainingFailed(record["code"], record["message"], record.get("param"))
            case {"kind": "done"}:
                yield from _result(record)
            case _:
                note = _note(record)
                if note and note not in said:
                    said.add(note)
                    yield note


def _note(record: Json) -> Note | None:
    match record:
        case {"kind": "note", "message": message, "level": level}:
            return Note(message, level)
        case {"kind": "data", "examples": examples, "tokens": tokens, "learnt_tokens": learnt}:
            validation = record["validation_examples"]
            return Note(
                f"学習例{examples:,}件（{tokens:,}トークン、うち学習するのは {learnt:,}）、"
                f"検証例{validation:,}件"
            )
        case {"kind": "ready", "ranks": ranks, "device": device, "method": method}:
            how = {"lora": "LoRA", "full": "全パラメーター"}[method]
            return Note(
                f"{device} の{ranks}プロセスで学習します（{how}、"
                f"{record['parameters']:,}パラメーターのうち{record['trainable']:,}）。"
            )
    return None


def _result(record: Json) -> Iterator[Note | Kept | Trained]:
    if bits := record.get("bits_per_character"):
        interval = "対話が少なすぎるため区間なし"
        if bits["low"] is not None:
            interval = f"差の95%区間 {bits['low']:+.3f}〜{bits['high']:+.3f}"
        yield Note(
            f"検証データの1文字あたりのビット数: 学習前 {bits['before']:.3f}、学習後 "
            f"{bits['after']:.3f}（{interval}、{bits['examples']}対話）"
        )
    for kept in sorted(record["checkpoints"], key=lambda kept: kept["step"]):
        yield Kept({"step": kept["step"], **kept["metrics"]})
    yield Trained(record["trained_tokens"])


def _ranks_of(launcher: Sequence[str]) -> int | None:
    """How many processes a launcher is asked for; None where it doesn't say."""
    words = " ".join(launcher)
    found = {
        name.replace("-", "_"): int(number)
        for name, number in re.findall(r"--([a-z_-]+)[= ]([0-9]+)(?![^ ])", words)
    }
    if "num_processes" in found:
        return found["num_processes"]
    if "nproc_per_node" in found:
        return found["nproc_per_node"] * found.get("nnodes", 1)
    if config := re.search(r"--config[_-]file[= ](\S+)", words):
        with contextlib.suppress(OSError):
            text = Path(config[1]).read_text(encoding="utf-8")
            if number := re.search(r"^num_processes: *([0-9]+)", text, re.MULTILINE):
                return int(number[1])
    return None


def _processes(folder: Path, own: subprocess.Popen[bytes] | None = None) -> set[psutil.Process]:
    """All processes of a job's trainer, in whatever sessions they are: launcher, ranks, loaders.

    They are known by their command, for a launcher gives its ranks sessions of their own, which
    outlive it. A command can't be read in the moment in which it is started: so the one that this
    process has started and the children of all are added.
    """
    import psutil

    words = {"openai_sft_local", str(folder)}
    running = psutil.process_iter(["cmdline"])
    found = {process for process in running if words <= set(process.info["cmdline"] or ())}
    if own is not None and own.poll() is None:
        found.add(psutil.Process(own.pid))
    for process in list(found):
        with contextlib.suppress(psutil.NoSuchProcess):
            found.update(process.children(recursive=True))
    return found


def _is_trained(folder: Path) -> bool:
    """Whether a trainer lives, be it one of another machine that shares the folder."""
    if not folder.exists():
        return False
    # One that has just begun has no lock yet.
    return is_held(folder / LOCK) or bool(_processes(folder))


def _end_processes(folder: Path, own: subprocess.Popen[bytes] | None = None) -> None:
    """End a job's trainer with all that it has started, at once."""
    import psutil

    asked = False
    while running := _processes(folder, own):
        for process in running:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill() if asked else process.terminate()
        psutil.wait_procs(running, GRACE_SECONDS)
        asked = True


def _death(folder: Path, code: int) -> TrainingFailed:
    """Why a trainer died that couldn't say so itself."""
    log = folder / LOG
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-50:]
    if code in _KILLED or any(re.search(r"exitcode *: -9\b", line) for line in lines):
        return TrainingFailed(
            OUT_OF_MEMORY,
            "学習のプロセスが外から止められました。メモリが足りないときOSがこうします。小さいモデルにする、"
            "長い対話を分ける、--full を外す、のどれかを試してください。",
        )
    said = lines[-1] if lines else "何も出力していません"
    message = f"学習のプロセスが終了コード{code}で終わりました: {said}（{log}）"
    return TrainingFailed("server_error", message)


# --- Export ---------------------------------------------------------------------------------------


def export(checkpoint: Path, target: Path) -> Path:
    """Write a checkpoint as one whole model that needs no adapter, and return its folder.

    Raises FileExistsError where `target` has something in it, FileNotFoundError where the
    checkpoint has no weights.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} は空ではありません。別のフォルダーを指定してください。")
    if not (_is_adapter(checkpoint) or (checkpoint / "config.json").exists()):
        raise FileNotFoundError(
            f"{checkpoint} に重みがありません。ジョブの checkpoint-N を指定してください。"
        )
    source = str(checkpoint)
    if _is_adapter(checkpoint):
        settings = json.loads((checkpoint / ADAPTER).read_text(encoding="utf-8"))
        source = settings["base_model_name_or_path"]
    model = load_model(source, training=False)
    if _is_adapter(checkpoint):
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, checkpoint).merge_and_unload()
    # Beside the target first: a model of which half is written is never taken for one.
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    load_tokenizer(str(checkpoint)).save_pretrained(part)
    if target.exists():
        target.rmdir()
    part.replace(target)
    return target


# --- What is asked before and after ---------------------------------------------------------------

# What LoRA takes beside the weights: the adapter with its optimiser, and the activations of one
# example of a few thousand tokens with checkpointing. An estimate, to warn by.
TRAINING_SHARE: Final = 0.3
CHECK_LAUNCHER: Final = "--local-launcher を確認してください"
Level = Literal["ok", "warn", "fail"]
Checked = tuple[str, Level, str, str]  # what, how it stands, a text, a remedy


def check_machine(model: str, launcher: str | None) -> Iterator[Checked]:
    """Whether this machine can train `model`: packages, device, the model, memory, ranks.

    Of a model of the Hub its configuration is fetched, a small file.
    """
    if missing := missing_packages():
        remedy = f"{EXTRA} を実行してください"
        yield "学習のパッケージ", "fail", f"{'、'.join(missing)} がありません", remedy
        return
    versions = "、".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    yield "学習のパッケージ", "ok", versions, ""
    memory, text = _memory_of_device()
    yield "デバイス", "ok", f"{text}（メモリ {memory / 2**30:.1f}GB）", ""
    parameters = yield from _check_model(model)
    if parameters is not None:
        need = parameters * (2 if has_bfloat16() else 4) * (1 + TRAINING_SHARE)
        text = f"LoRAの学習に約{need / 2**30:.1f}GB（パラメーター数からの目安）"
        if need <= memory:
            yield "学習のメモリ", "ok", text, ""
        else:
            remedy = "小さいモデルを選ぶか、--local-launcher で複数のGPUに分けてください"
            yield "学習のメモリ", "warn", f"{text}で、足りないおそれがあります", remedy
    try:
        words = shlex.split(launcher or sys.executable, posix=os.name != "nt")
    except ValueError as problem:
        yield "学習の起動コマンド", "fail", f"{launcher}: {problem}", CHECK_LAUNCHER
        return
    if shutil.which(words[0]) is None:
        yield "学習の起動コマンド", "fail", f"{words[0]} がありません", CHECK_LAUNCHER
        return
    ranks = _ranks_of(words) if launcher else 1
    told = (
        "起動コマンドからは分かりません（学習の始めに確かめます）" if ranks is None else f"{ranks}"
    )
    yield "学習のプロセス数", "ok", told, ""


def _memory_of_device() -> tuple[int, str]:
    """Bytes of the memory to train in, and what the device is."""
    import psutil
    import torch

    if device_of() != "cuda":
        return psutil.virtual_memory().total, device_of()
    devices = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
    names = "、".join(f"{device.name} × {n}" for device, n in Counter(devices).items())
    return devices[0].total_memory, names


def _check_model(model: str) -> Generator[Checked, None, int | None]:
    """Whether the model can be had; returns its parameters where they are known."""
    name = "学習するモデル"
    if model == TINY:
        yield name, "ok", "tiny（流れを試すための、何も知らない小さなモデル）", ""
        return None
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with _from_hub(model):
            config = AutoConfig.from_pretrained(_place_of("config.json", model))
    except TrainingFailed as failure:
        yield name, "fail", failure.message, "--local を確認してください"
        return None
    with torch.device("meta"):  # its shape alone
        parameters: int = AutoModelForCausalLM.from_config(config).num_parameters()
    yield name, "ok", f"{model}（{parameters / 1e9:.2f}Bパラメーター）", ""
    return parameters


def describe_weights(weights: Path, base: str) -> list[str]:
    """Where the weights of a job are, and the commands that use them."""
    place = shlex.quote(str(weights))
    if not _is_adapter(weights):
        return [
            f"重み: {weights}",
            f"使うには: vllm serve {place} または transformers serve {place}",
        ]
    lora = f"--enable-lora --max-lora-rank {LORA_RANK} --lora-modules tuned={place}"
    return [
        f"重み（LoRAのアダプター）: {weights}",
        f"使うには: vllm serve {shlex.quote(base)} {lora}",
    ]


# --- The command line -----------------------------------------------------------------------------


def run(folder: Path) -> int:
    """Do the job of a folder; the exit code."""
    speaks = os.environ.get("RANK", "0") == "0"
    progress = Progress(folder / PROGRESS, speaks)
    lock = hold_lock(folder / LOCK) if speaks else None
    if speaks and lock is None:
        sys.stderr.write(f"このジョブは、ほかのプロセスが学習中です: {folder}\n")
        return 1
    with lock or contextlib.nullcontext():
        if speaks:
            for path in (progress.path, folder / EVALUATIONS):
                mend(path)
        try:
            train(Spec.read(folder / SPEC), folder, progress)
        except TrainingFailed as failure:
            progress.failed(failure)
            return 1
        except Exception as error:
            progress.failed(failure_of(error))
            raise
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and do the job."""
    parser = argparse.ArgumentParser(
        prog="python -m openai_sft_local", description="1つのジョブを、このマシンで学習する。"
    )
    parser.add_argument("folder", type=Path, metavar="JOBDIR", help="spec.json のあるフォルダー")
    return run(parser.parse_args(argv).folder)


if __name__ == "__main__":
    sys.exit(main())
