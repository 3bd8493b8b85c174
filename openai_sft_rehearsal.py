"""OpenAI's fine-tuning API on one's own machine: no key, no network, no money.

An HTTP endpoint with the shapes of OpenAI's API, over an `Engine` that trains and answers. With
its own engine it is a rehearsal, for trying a whole fine-tuning run and for tests over real
sockets; with ``openai_sft_local`` it trains real models. Standard library only.

    with Rehearsal() as endpoint:
        client = openai.OpenAI(base_url=endpoint.url, api_key="rehearsal")

or, for any client, ``python -m openai_sft_rehearsal --port 8000``.

What is real here and what is not:

- The files are judged as the service judges them, and a job goes through the service's statuses.
- A chat completion is one whole answer. What isn't rehearsed (more choices, streams) is refused
  with a 400. How strict the service is with parameters, sizes and keys isn't rehearsed.
- A checkpoint answers once its job has succeeded, with what had been learned by then.
- Other services that take the same calls differ in much: a `Dialect` says in what.

Of the character engine:

- A job really fits a character n-gram model on the assistant texts with ``weight`` other than 0.
  Every loss (nats a character) and accuracy reported was computed; none says anything about GPT.
- A *token* is a character. ``trained_tokens`` counts the characters of all message contents times
  the epochs; ``usage`` counts characters too.
- A tuned model answers with what it learned is likeliest, whatever temperature and seed; a base
  model has learned nothing and says so. Tools are accepted and have no influence.
- ``response_format`` is obeyed where it asks for scores: see `_wanted_scores`. A model tuned on
  JSON objects of whole numbers fills in what it predicts from the last user text (`ScoreModel`);
  where nothing was learned stands the lowest number allowed. It is obeyed as well where it asks
  which of two answers is better: see `_verdict_text`. Other schemas are refused with a 400.
- Each epoch learns the same texts once more, which changes the losses, but what is likeliest only
  where two characters follow equally often.

Every request passes `Rehearsal.answer` and every job's work `Rehearsal.work`: a subclass can watch
and disturb both.

In reading order: records, checks, the judgement of files, the dialects, what an engine is, the
character engine, the service behind the endpoint, HTTP, `Rehearsal`, the command line, and the
example dialogues.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import hmac
import ipaddress
import json
import logging
import math
import random
import re
import secrets
import signal
import socket
import socketserver
import string
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import UnionType
from typing import (
    Any,
    BinaryIO,
    Final,
    Literal,
    NamedTuple,
    NoReturn,
    Protocol,
    Self,
    TypeVar,
    assert_never,
)
from urllib.parse import parse_qsl, unquote, urlsplit

__all__ = [
    "Answer",
    "ApiError",
    "CharacterEngine",
    "Dialect",
    "DialectName",
    "Engine",
    "FileProblem",
    "Job",
    "Kept",
    "Model",
    "Note",
    "Order",
    "Progress",
    "Rehearsal",
    "Reply",
    "Request",
    "SentFile",
    "Step",
    "Trained",
    "TrainingFailed",
    "build_parser",
    "example_dialogues",
    "hold_lock",
    "judge_training_file",
    "main",
]

_log = logging.getLogger("openai_sft_rehearsal")

Json = dict[str, Any]
Purpose = Literal["training", "validation"]
DialectName = Literal["openai", "azure", "nebius", "litellm", "gateway"]
_Kept = TypeVar("_Kept")

MIN_EXAMPLES: Final[dict[Purpose, int]] = {"training": 10, "validation": 1}

MODEL_ALIASES: Final = {
    "gpt-4o-mini": "gpt-4o-mini-2024-07-18",
    "gpt-4o": "gpt-4o-2024-08-06",
    "gpt-4.1": "gpt-4.1-2025-04-14",
    "gpt-4.1-mini": "gpt-4.1-mini-2025-04-14",
    "gpt-4.1-nano": "gpt-4.1-nano-2025-04-14",
}
FILE_PURPOSES: Final = frozenset({"assistants", "batch", "fine-tune", "vision", "user_data"})
TERMINAL: Final = frozenset({"succeeded", "failed", "cancelled"})
BOM: Final = b"\xef\xbb\xbf"

SPECIAL_TOKEN: Final = re.compile(
    r"<\|(im_(start|end|sep)|endof(text|prompt|system)|fim_(prefix|middle|suffix)"
    r"|startoftext|return|constrain|channel|start|end|message|call|reserved_[0-9]+)\|>"
)
SURROGATE: Final = re.compile("[\ud800-\udfff]")
LINE_KEYS: Final = frozenset({"messages", "tools", "parallel_tool_calls"})
MESSAGE_KEYS: Final = frozenset(
    {"role", "content", "name", "tool_calls", "tool_call_id", "refusal", "audio", "function_call"}
)
MESSAGE_ROLES: Final = frozenset({"system", "user", "assistant", "tool"})
PART_TYPES: Final = {
    "system": {"text"},
    "user": {"text", "image_url", "input_audio", "file"},
    "assistant": {"text", "refusal"},
    "tool": {"text"},
}
FUNCTION_NAME: Final = re.compile(r"[a-zA-Z0-9_-]{1,64}")

UNTRAINED_ANSWER: Final = (
    "（リハーサル用の未学習モデルです。まだ何も学習していないため、相談への返答はできません。）"
)


# --- Records --------------------------------------------------------------------------------------


class FileProblem(NamedTuple):
    """Why a file was refused; `line` counts from 1 and is None where no single line is to blame."""

    code: str
    message: str
    line: int | None


class SentFile(NamedTuple):
    """A file in a form."""

    name: str
    data: bytes


@dataclass(frozen=True)
class Request:
    """A request as it arrived."""

    method: str
    target: str  # as it was sent, such as "/v1/files?limit=2"
    headers: Message
    content: bytes
    connection: socket.socket

    @functools.cached_property
    def path(self) -> str:
        """What follows ``/v1``, readable."""
        path = unquote(urlsplit(self.target).path.rstrip("/"))
        return re.sub("^(/api/projects/[^/]+)?(/openai)?/v1", "", path)

    @functools.cached_property
    def query(self) -> dict[str, str]:
        """What follows the question mark."""
        return dict(parse_qsl(urlsplit(self.target).query, keep_blank_values=True))

    @functools.cached_property
    def body(self) -> Json:
        """The JSON object, or a form's fields and files; `ApiError` where it can't be read."""
        content_type = self.headers.get("Content-Type", "")
        if content_type.startswith("multipart/form-data"):
            return _read_form(content_type, self.content)
        try:
            body = _strict_json(self.content) if self.content else {}
        except (ValueError, RecursionError):
            message = "We could not parse the JSON body of your request."
            raise ApiError(400, message, shape="json_invalid") from None
        if not isinstance(body, dict):
            raise ApiError(400, "The JSON body must be an object.", shape="model_type")
        return body


class Answer(NamedTuple):
    """An answer as it is sent."""

    status: int
    body: bytes
    content_type: str = "application/json"
    headers: Mapping[str, str] = {}


class ApiError(Exception):
    """A refusal; in OpenAI's error shape: `answer`."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
        shape: str | None = None,
    ) -> None:
        """`kind` is the error's ``type``; `shape` is pydantic's, where the request is malformed."""
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.shape = shape
        error = {"message": message, "type": kind, "param": param, "code": code}
        self.answer = _json_answer({"error": error}, status, headers)


def _json_answer(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    # ASCII escapes, so that even a lone surrogate that a client sent can be mirrored back.
    return Answer(status, json.dumps(value).encode("ascii"), headers=headers or {})


# --- Checks ---------------------------------------------------------------------------------------


def _check(
    condition: object, message: str, param: str | None = None, shape: str | None = None
) -> None:
    if not condition:
        raise ApiError(400, message, param, shape=shape)


def _field(
    body: Json,
    key: str,
    kind: type | UnionType,
    limits: tuple[float, float] | None = None,
    *,
    where: str = "",
    needed: bool = False,
) -> Any:
    """A field's value, None where it is absent; 400 for another type or size (texts: length)."""
    value = body.get(key)
    if value is None and not needed:
        return None
    right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if right and limits:
        size: Any = len(value) if isinstance(value, str) else value
        right = limits[0] <= size <= limits[1]
    wanted = getattr(kind, "__name__", str(kind))
    if limits:
        wanted += f" from {limits[0]} to {limits[1]}"
    shape = "missing" if value is None else "value_error"
    _check(right, f"Invalid '{where}{key}': expected {wanted}.", where + key, shape)
    return value


def _strict_json(text: str | bytes) -> Any:
    """`json.loads` without NaN and Infinity; ValueError or RecursionError when it can't be read."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def _message_problem(message: Any, keys: frozenset[str]) -> str | None:
    """What is wrong with the form of one chat message, in a file or in a request."""
    if not isinstance(message, dict):
        return "a message must be an object."
    if unknown := message.keys() - keys:
        return f"unexpected key '{min(unknown)}'."
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in MESSAGE_ROLES:
        return f"unknown role {json.dumps(role)[:80]}."
    if why := _optional_problem(message, role):
        return why
    if role == "tool" and not isinstance(message.get("tool_call_id"), str):
        return "a tool message needs a 'tool_call_id'."
    if content is None:
        calls = message.get("tool_calls") if role == "assistant" else None
        return None if calls and isinstance(calls, list) else "'content' is missing."
    if isinstance(content, str):
        return None
    if isinstance(content, list) and all(_is_part(part, role) for part in content):
        return None
    return f"'content' must be a string or an array of content parts of the role {role}."


def _optional_problem(message: Json, role: str) -> str | None:
    for key in ("name", "weight", "tool_calls", "tool_call_id"):
        if key in message and message[key] in (None, []):
            return f"'{key}' must not be empty."
    if not isinstance(message.get("name", ""), str):
        return "'name' must be a string."
    if "weight" in message and role != "assistant":
        return "'weight' is for assistant messages only."
    weight = message.get("weight", 1)
    if type(weight) is not int or weight not in (0, 1):
        return "'weight' must be 0 or 1."
    return None


def _is_part(part: Any, role: str) -> bool:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        return False
    if part["type"] == "image_url":
        image = part.get("image_url")
        right = isinstance(image, dict) and isinstance(image.get("url"), str)
    else:
        right = part["type"] not in ("text", "refusal") or isinstance(part.get(part["type"]), str)
    return right and part["type"] in PART_TYPES[role]


def _text(message: Json) -> str:
    """The text of a message's content, whether a string or parts."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part["type"] == "text")
    return content if isinstance(content, str) else ""


# --- The judgement of training files --------------------------------------------------------------


def judge_training_file(data: bytes, *, purpose: Purpose) -> FileProblem | None:
    """The first thing wrong with a JSONL file, as the service would find it, or None."""
    lines = data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    for number, raw in enumerate(lines, 1):
        if why := _line_problem(raw):
            message = f"Invalid file format. Line {number}: {why}"
            return FileProblem("invalid_file_format", message, number)
    if len(lines) < MIN_EXAMPLES[purpose]:
        message = (
            f"{purpose.capitalize()} file has {len(lines)} example(s), but must have at least "
            f"{MIN_EXAMPLES[purpose]} examples."
        )
        return FileProblem("invalid_n_examples", message, None)
    return None


def _line_problem(raw: bytes) -> str | None:
    try:
        record = _strict_json(raw.decode("utf-8"))
        text = json.dumps(record, ensure_ascii=False)  # without the escapes that hide characters
    except UnicodeDecodeError:
        return "not valid UTF-8."
    except (ValueError, RecursionError):
        return "not valid JSON."
    if not isinstance(record, dict):
        return "each line must be a JSON object."
    if unknown := record.keys() - LINE_KEYS:
        return f"unexpected key '{min(unknown)}'."
    if SURROGATE.search(text):
        return "a string has a lone surrogate."
    if found := SPECIAL_TOKEN.search(text):
        return f"special token text {found.group()} is not allowed."
    if not isinstance(record.get("parallel_tool_calls", True), bool):
        return "'parallel_tool_calls' must be a boolean."
    return _tools_problem(record.get("tools", [])) or _messages_problem(record.get("messages"))


def _tools_problem(tools: Any) -> str | None:
    if not isinstance(tools, list):
        return "'tools' must be an array."
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or tool.get("type") != "function":
            return f"tool {index}: must be of the type 'function', with a 'function'."
        name = function.get("name")
        if not isinstance(name, str) or not FUNCTION_NAME.fullmatch(name):
            return f"tool {index}: 'name' does not match {FUNCTION_NAME.pattern}."
        for key, kind in {"description": str, "parameters": dict}.items():
            if not isinstance(function.get(key, kind()), kind):
                return f"tool {index}: '{key}' has the wrong type."
        if not isinstance(function.get("strict"), bool | None):
            return f"tool {index}: 'strict' has the wrong type."
    return None


def _messages_problem(messages: Any) -> str | None:
    if not isinstance(messages, list) or not messages:
        return "'messages' must be a non-empty array."
    for index, message in enumerate(messages):
        if why := _message_problem(message, MESSAGE_KEYS | {"weight"}):
            return f"message {index}: {why}"
        if message.get("content") in ("", []):
            return f"message {index}: 'content' must not be empty."
    if not any(m["role"] == "assistant" and m.get("weight") != 0 for m in messages):
        return "there is no assistant message to train on."
    if messages[-1]["role"] != "assistant":
        return "the last message must be from the assistant."
    return _calls_problem(messages)


def _calls_problem(messages: list[Json]) -> str | None:
    """What is wrong with calls and their results; a call that ends the example needs none."""
    unanswered: list[str] = []
    for index, message in enumerate(messages):
        if message["role"] == "tool":
            if message["tool_call_id"] not in unanswered:
                return f"message {index}: 'tool_call_id' is of no unanswered call right before."
            unanswered.remove(message["tool_call_id"])
            continue
        if unanswered:
            return f"message {index}: the call '{unanswered[0]}' before it has no answer."
        if message.get("function_call") is not None:
            return f"message {index}: 'function_call' is no longer taken; use 'tool_calls'."
        calls = message.get("tool_calls", [])
        if not isinstance(calls, list) or (calls and message["role"] != "assistant"):
            return f"message {index}: 'tool_calls' must be an array, of the assistant."
        if not all(map(_is_call, calls)):
            return (
                f"message {index}: a call needs an 'id', 'function', its name and JSON arguments."
            )
        unanswered = [call["id"] for call in calls]
        if len(set(unanswered)) < len(calls):
            return f"message {index}: two calls have the same 'id'."
    return None


def _is_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or call.get("type") != "function":
        return False
    try:
        _strict_json(function["arguments"])
        texts = (call["id"], function["name"], function["arguments"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return False
    return call["id"] != "" and all(isinstance(text, str) for text in texts)


# --- The dialects of other services ---------------------------------------------------------------

_Limits = Mapping[str, tuple[type | UnionType, tuple[float, float] | None]]

_RELATIVE: Final[_Limits] = {
    "n_epochs": (int, (1, 50)),
    "batch_size": (int, (1, 256)),
    "learning_rate_multiplier": (int | float, (1e-6, 1e6)),
}
_ABSOLUTE: Final[_Limits] = {
    "n_epochs": (int, (1, 20)),
    "batch_size": (int, (1, 32)),
    "learning_rate": (int | float, (1e-12, 1e6)),
    "warmup_ratio": (int | float, (0, 1)),
    "weight_decay": (int | float, (0, 1)),
    "lora": (bool, None),
    "lora_r": (int, (1, 1024)),
    "lora_alpha": (int, (1, 1024)),
    "lora_dropout": (int | float, (0, 1)),
    "packing": (bool, None),
    "max_grad_norm": (int | float, (0, 1e6)),
    "context_length": (int, (1, 1_000_000)),
}
_FORWARDED: Final = frozenset(
    {
        *("model", "training_file", "validation_file", "hyperparameters"),
        *("suffix", "integrations", "seed"),
    }
)


def _relative(given: Json, where: str) -> Json:
    """The three hyperparameters; "auto" where none was asked for."""
    return {
        key: "auto"
        if given.get(key) in (None, "auto")
        else _field(given, key, kind, limits, where=where)
        for key, (kind, limits) in _RELATIVE.items()
    }


def _of_method(body: Json) -> Json:
    """The hyperparameters as asked for in `method`."""
    method = _field(body, "method", dict) or {"type": "supervised"}
    only = "Only the supervised method is rehearsed here, with its hyperparameters in 'method'."
    _check(method.get("type") == "supervised" and "hyperparameters" not in body, only, "method")
    supervised = _field(method, "supervised", dict, where="method.") or {}
    given = _field(supervised, "hyperparameters", dict, where="method.supervised.") or {}
    return _relative(given, "method.supervised.hyperparameters.")


def _of_method_or_body(body: Json) -> Json:
    """As `_of_method`; what isn't asked for there counts as the body's own ``hyperparameters``."""
    outer = _relative(_field(body, "hyperparameters", dict) or {}, "hyperparameters.")
    inner = _of_method({key: value for key, value in body.items() if key != "hyperparameters"})
    for key, value in inner.items():
        same = "auto" in (value, outer[key]) or value == outer[key]
        _check(same, f"'{key}' is {value} in 'method' and {outer[key]} outside of it.", "method")
    return {key: outer[key] if value == "auto" else value for key, value in inner.items()}


def _of_body(body: Json) -> Json:
    """The body's ``hyperparameters``, with the learning rate itself; no other names, no "auto"."""
    where = "hyperparameters."
    given = _field(body, "hyperparameters", dict) or {}
    _check_extra(given, frozenset(_ABSOLUTE), where)
    asked = {
        key: _field(given, key, kind, limits, where=where)
        for key, (kind, limits) in _ABSOLUTE.items()
    }
    return {key: value for key, value in asked.items() if value is not None}


def _check_extra(given: Json, known: frozenset[str], where: str = "") -> None:
    if extra := given.keys() - known:
        message = "Extra inputs are not permitted"
        raise ApiError(400, message, where + min(extra), shape="extra_forbidden")


def _azure_refusal(problem: ApiError) -> Answer:
    error = {"code": problem.code or str(problem.status), "message": problem.message}
    return problem.answer._replace(body=_json_answer({"error": error}).body)


def _fastapi_refusal(problem: ApiError) -> Answer:
    """FastAPI's, which tells malformed requests from all others."""
    if problem.shape is None:
        return problem.answer._replace(body=_json_answer({"detail": problem.message}).body)
    place = ["body", *(problem.param or "").split(".")] if problem.param else ["body"]
    detail = {"type": problem.shape, "loc": place, "msg": problem.message}
    return _json_answer({"detail": [detail]}, 422)


def _openai_name(base: str, owner: str, suffix: str, job_id: str) -> str:
    return f"ft:{base}:{owner}:{suffix}:{job_id[-8:]}"


def _azure_name(base: str, owner: str, suffix: str, job_id: str) -> str:
    known = hashlib.sha256(job_id.encode()).hexdigest()[:32]
    return f"{base}.ft-{known}" + (f"-{suffix}" if suffix else "")


class Missing(NamedTuple):
    """What is said of a model that isn't there."""

    message: str
    code: str = "model_not_found"


_MISSING_MODEL: Final = Missing("The model `{}` does not exist or you do not have access to it.")
_Kind = Literal["base", "tuned", "deployed"]


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """What a service does in its own way; the defaults are OpenAI's."""

    # Where it answers, and how it refuses
    roots: tuple[str, ...] = ("/v1",)
    project: str | None = None  # one more root, without uploads
    control: Mapping[str, _Operation] = field(default_factory=dict)  # outside of these roots
    refusal: Callable[[ApiError], Answer] = lambda problem: problem.answer

    # Models
    base_models: Mapping[str, str] = field(  # of the character engine
        default_factory=lambda: {name: name for name in MODEL_ALIASES.values()} | MODEL_ALIASES
    )
    shows_shutdown: bool = True
    lists: tuple[_Kind, ...] = ("base", "tuned")
    answers: tuple[_Kind, ...] = ("base", "tuned")
    missing_model: Missing = _MISSING_MODEL
    missing_answer: Missing = _MISSING_MODEL  # of a chat

    # Files
    file_statuses: tuple[str | None, ...] = ("processed",)  # each look at a file moves it on
    bom: bool = False  # whether training files begin with a byte order mark

    # What a job is asked with
    job_keys: frozenset[str] | None = None  # None: all
    forbids_extra: bool = False  # refuses other keys, which are dropped else
    training_types: frozenset[str] = frozenset()  # one of them is needed where there are any
    hyperparameters: Callable[[Json], Json] = _of_method
    longest_suffix: int = 64
    dots_in_suffix: bool = True
    keeps_metadata: bool = True

    # What comes of a job
    waiting: tuple[str, str] = ("validating_files", "queued")
    absolute_rate: bool = False  # whether it is asked for the learning rate itself
    shows_method: bool = True
    event_metrics: bool = True
    checkpoint_id: str = "ftckpt_"
    kept_epochs: int = 3  # the last ones that leave a checkpoint
    model_name: Callable[[str, str, str, str], str | None] = _openai_name
    result_columns: str | None = (  # None: the weights' files instead of a table
        "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    )


_GATEWAY: Final = Dialect(
    job_keys=_FORWARDED, hyperparameters=_of_method_or_body, keeps_metadata=False
)
DIALECTS: Final[Mapping[DialectName, Dialect]] = {
    "openai": Dialect(),
    "azure": Dialect(
        roots=("/v1", "/openai/v1"),
        project="/api/projects/*/openai/v1",
        control={
            "PUT /subscriptions/*/resourceGroups/*/providers/Microsoft.CognitiveServices/accounts/*"
            "/deployments/*": lambda service, *asked: service.put_deployment(*asked),
        },
        refusal=_azure_refusal,
        shows_shutdown=False,
        answers=("deployed",),
        missing_answer=Missing(
            "The API deployment for this resource does not exist. If you created the deployment "
            "within the last 5 minutes, please wait a moment and try again.",
            "DeploymentNotFound",
        ),
        file_statuses=("pending", "running", "processed"),
        bom=True,
        training_types=frozenset(
            {
                *("Standard", "GlobalStandard", "Developer"),
                *("standard", "globalStandard", "developerTier"),
            }
        ),
        hyperparameters=_of_method_or_body,
        longest_suffix=18,
        dots_in_suffix=False,
        waiting=("pending", "pending"),
        checkpoint_id="ftchkpt-",
        model_name=_azure_name,
        result_columns="step,train_loss,train_mean_token_accuracy,valid_loss,"
        "valid_mean_token_accuracy,full_valid_loss,full_valid_mean_token_accuracy",
    ),
    "nebius": Dialect(
        control={"POST /v0/models": lambda service, *asked: service.deploy_checkpoint(*asked)},
        refusal=_fastapi_refusal,
        base_models={
            name: name for name in ("meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen3-0.6B")
        },
        shows_shutdown=False,
        lists=("base", "deployed"),
        answers=("base", "deployed"),
        missing_model=Missing("The model `{}` does not exist."),
        missing_answer=Missing("The model `{}` does not exist."),
        file_statuses=(None,),
        job_keys=_FORWARDED | {"metadata"},
        forbids_extra=True,
        hyperparameters=_of_body,
        keeps_metadata=False,
        absolute_rate=True,
        shows_method=False,
        event_metrics=False,
        kept_epochs=20,
        model_name=lambda *_: None,
        result_columns=None,
    ),
    "litellm": _GATEWAY,
    "gateway": _GATEWAY,  # whichever: the same is dropped by all that are known to drop something
}


# --- What an engine is ----------------------------------------------------------------------------


class Order(NamedTuple):
    """What a job asks of an engine. `seen` items of its progress were handled before a restart."""

    job_id: str
    model: str
    training: bytes
    validation: bytes | None
    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float
    seed: int
    seen: int
    kept_epochs: int = 3  # the last ones that leave a checkpoint, as OpenAI keeps them


class Note(NamedTuple):
    """Something to tell whoever watches a job."""

    message: str
    level: Literal["info", "warn"] = "info"


class Step(NamedTuple):
    """A step is done; `metrics` has its number under ``step``, and losses in nats a token."""

    total_steps: int
    metrics: Json


class Kept(NamedTuple):
    """A checkpoint that can be asked once the job has succeeded; `metrics` are its step's."""

    metrics: Json


class Trained(NamedTuple):
    """The end; the model is the last checkpoint. `tokens` are those trained on, in all epochs."""

    tokens: int


Progress = Note | Step | Kept | Trained | None  # None: a pause without news


class TrainingFailed(Exception):
    """A job can't go on: the error that the API shows of it."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param


class Model(NamedTuple):
    """Which model is asked: a base model, or what a job had learned by a step."""

    base: str
    job_id: str | None = None
    step: int | None = None


class Reply(NamedTuple):
    """An answer to a chat request, and its size in the engine's tokens."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: Literal["stop", "length"] = "stop"


class Engine(Protocol):
    """What trains and answers behind the endpoint."""

    owner: str  # the third part of a tuned model's name
    base_models: Mapping[str, str]  # by every name that may be asked for
    shutdown_date: str | None  # of the models
    learning_rate: float  # where its multiplier is 1

    def train(self, order: Order) -> Generator[Progress, None, None]:
        """Carry a job out, in short pieces; closing cancels it. Raises `TrainingFailed`."""

    def answer(self, model: Model, body: Json) -> Reply:
        """Answer a chat request that `_check_chat` found nothing wrong with. Raises `ApiError`."""

    def weights(self, model: Model) -> Mapping[str, bytes | Path]:
        """The files of a checkpoint, by their names, from when it is kept."""

    def forget(self, job_id: str) -> None:
        """Let go of all that a job has left."""

    def close(self) -> None:
        """End what was started."""


# --- The character engine: its models -------------------------------------------------------------

_START: Final = "\x02"
_END: Final = "\x03"
_CONTEXT: Final = 3
_UNIFORM: Final = 1 / 0x110000  # before anything is known, every code point is as likely
_LONGEST_ANSWER: Final = 200
_COMMON: Final = 2000  # a pair of characters found in more user texts than this tells little
_OPENING: Final = re.compile(r"[^。！？!?\n]{0,11}.?", re.DOTALL)


class _Node:
    """What followed one context; `shorter` is the context without its oldest character."""

    __slots__ = ("best", "counts", "most", "shorter", "total")

    def __init__(self, shorter: _Node | None) -> None:
        self.counts: dict[str, int] = {}
        self.total = 0
        self.most = 0
        self.best = ""
        self.shorter = shorter


class CharacterModel:
    """Character n-grams, interpolated by Witten and Bell (1991) down to a uniform distribution.

    A shorter context counts a character only where it was new to the longer one ("update
    exclusion", Moffat 1990). So nothing but the longest contexts goes on counting after the first
    epoch, all at the same pace. The predicted character is the most frequent successor of the
    longest known context. `rate` weighs the counts against the unknown.
    """

    def __init__(self, rate: float = 1.0) -> None:
        self._rate = rate
        self._nodes: dict[str, _Node] = {"": _Node(None)}
        self._openings: list[str] = []
        self._by_pair: defaultdict[str, list[int]] = defaultdict(list)

    def measure(self, text: str) -> tuple[float, int, int]:
        """How well `text` (and its end) is predicted now: nats, hits, characters."""
        find, log, rate = self._longest_known, math.log, self._rate
        padded = _START + text + _END
        nats, hits = 0.0, 0
        for i in range(1, len(padded)):
            character = padded[i]
            longest = find(padded[max(0, i - _CONTEXT) : i])
            hits += longest.best == character
            node: _Node | None = longest
            probability, weight = 0.0, 1.0
            while node is not None:
                counts = node.counts
                if kinds := len(counts):
                    weight /= node.total * rate + kinds
                    if character in counts:
                        probability += weight * rate * counts[character]
                    weight *= kinds
                node = node.shorter
            nats -= log(probability + weight * _UNIFORM)
        return nats, hits, len(padded) - 1

    def learn(self, text: str) -> None:
        """Count what followed what, once more."""
        find = self._nodes.get
        padded = _START + text + _END
        for i in range(1, len(padded)):
            character = padded[i]
            context = padded[max(0, i - _CONTEXT) : i]
            node: _Node | None = find(context) or self._add(context)
            while node is not None:
                count = node.counts[character] = node.counts.get(character, 0) + 1
                node.total += 1
                if count > node.most:
                    node.most, node.best = count, character
                node = node.shorter if count == 1 else None

    def _longest_known(self, context: str) -> _Node:
        while (node := self._nodes.get(context)) is None:
            context = context[1:]
        return node

    def _add(self, context: str) -> _Node:
        shorter = self._nodes.get(context[1:]) or self._add(context[1:])
        node = self._nodes[context] = _Node(shorter)
        return node

    def remember_opening(self, user_text: str, answer: str) -> None:
        """Note how an answer to this user text began."""
        opening = _OPENING.match(answer)
        for pair in _pairs(user_text):
            self._by_pair[pair].append(len(self._openings))
        self._openings.append(opening.group() if opening else "")

    def learned(self) -> Learned:
        """What it would answer now, whatever it learns later; the openings are all of the first
        epoch."""
        likeliest = {context: node.best for context, node in self._nodes.items()}
        return Learned(likeliest, self._openings, self._by_pair)


class Learned(NamedTuple):
    """What answers are made of: the likeliest character after each context, and the openings."""

    likeliest: Mapping[str, str]
    openings: Sequence[str]
    by_pair: Mapping[str, Sequence[int]]

    def answer(self, user_text: str) -> str:
        """Begins as the answer to the most similar user text did, goes on as is likeliest."""
        scores: Counter[int] = Counter()
        for pair in _pairs(user_text):
            found = self.by_pair.get(pair, ())
            if len(found) <= _COMMON:
                scores.update(found)
        text = ""
        if scores:  # ties go to the older opening: the order of a set must not decide
            text = self.openings[min(scores, key=lambda index: (-scores[index], index))]
        while len(text) < _LONGEST_ANSWER:
            context = (_START + text)[-_CONTEXT:]
            while context not in self.likeliest:
                context = context[1:]
            if self.likeliest[context] in ("", _END):
                break
            text += self.likeliest[context]
        return text


def _pairs(text: str) -> set[str]:
    return {text[i : i + 2] for i in range(len(text) - 1)}


_CLASSES: Final = tuple(map(re.compile, ("[一-鿿々]", "[？?]", "[！!]", "[ァ-ヶー]", r"\n")))


def _features(text: str) -> list[float]:
    length = max(1, len(text))
    return [math.log(length), *(len(kind.findall(text)) / length for kind in _CLASSES)]


def _slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    square = sum(x * x for x in xs)
    return sum(x * y for x, y in zip(xs, ys, strict=True)) / square if square > 1e-9 else 0.0


class ScoreModel:
    """Least squares of each score on the log of the user text's length and shares of characters.

    The features are made orthogonal (Gram and Schmidt), so that one that says nothing new gets a
    slope of 0. There is one feature for every ten answers: a few answers can't bear more.
    """

    def __init__(self, rows: Sequence[tuple[str, dict[str, int]]]) -> None:
        used = min(len(rows) // 10, len(_features("")))
        seen = [_features(text)[:used] for text, _ in rows]
        self._centre = [sum(column) / len(rows) for column in zip(*seen, strict=True)]
        self._overlaps: list[list[float]] = []
        for column in range(used):
            inner = [self._orthogonal(features) for features in seen]
            ys = [features[column] - self._centre[column] for features in seen]
            self._overlaps.append([_slope(xs, ys) for xs in zip(*inner, strict=True)])
        inner = [self._orthogonal(features) for features in seen]
        self._fits: dict[str, tuple[float, list[float], int, int]] = {}
        for key in rows[0][1]:
            values = [scores[key] for _, scores in rows]
            mean = sum(values) / len(values)
            slopes = [_slope(xs, [y - mean for y in values]) for xs in zip(*inner, strict=True)]
            self._fits[key] = mean, slopes, min(values), max(values)

    def _orthogonal(self, features: Sequence[float]) -> list[float]:
        """As many features as have their overlaps fitted, without what the earlier ones say."""
        found: list[float] = []
        for value, centre, overlaps in zip(features, self._centre, self._overlaps, strict=False):
            found.append(value - centre - sum(map(float.__mul__, overlaps, found)))
        return found

    def predict(self, user_text: str) -> dict[str, float]:
        """A value for each key, never beyond those that were learned from."""
        inner = self._orthogonal(_features(user_text))
        return {
            key: min(max(mean + sum(map(float.__mul__, slopes, inner)), low), high)
            for key, (mean, slopes, low, high) in self._fits.items()
        }


class Example(NamedTuple):
    """One training line: what is learned of it, and its size in this endpoint's tokens."""

    turns: list[tuple[str, str]]  # (the user text before, the assistant text)
    characters: int


def read_examples(data: bytes) -> list[Example]:
    """The examples of a file that `judge_training_file` found nothing wrong with."""
    examples = []
    for line in data.split(b"\n"):
        if not line.strip():
            continue
        turns, user_text, characters = [], "", 0
        for message in json.loads(line)["messages"]:
            text = _text(message)
            characters += len(text)
            if message["role"] == "user":
                user_text = text
            elif message["role"] == "assistant" and message.get("weight") != 0 and text:
                turns.append((user_text, text))
        examples.append(Example(turns, characters))
    return examples


def fit_scores(examples: list[Example]) -> ScoreModel | None:
    """What the answers score, if each is a JSON object of whole numbers under the same keys."""
    rows: list[tuple[str, dict[str, int]]] = []
    for user_text, text in (turn for example in examples for turn in example.turns):
        try:
            scores = _strict_json(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(scores, dict) or not scores:
            return None
        if rows and scores.keys() != rows[0][1].keys():
            return None
        if any(type(v) is not int or abs(v) > 10**9 for v in scores.values()):
            return None
        rows.append((user_text, scores))
    return ScoreModel(rows) if rows else None


# --- The character engine: structured answers -----------------------------------------------------


def _wanted_scores(body: Json) -> dict[str, list[int]] | None:
    """The whole numbers that each score may be, if a ``response_format`` asks for scores.

    Only one form of it is rehearsed, that of the score task: a strict schema of an object with
    nothing but integers, each with its ``enum``.
    """
    given = body.get("response_format") or {"type": "text"}
    if given == {"type": "text"}:
        return None
    scores: dict[str, list[int]] = {}
    name, named, whole = None, None, False
    with contextlib.suppress(AttributeError, KeyError, TypeError):
        name, schema = given["json_schema"]["name"], given["json_schema"]["schema"]
        named = re.fullmatch("[a-zA-Z0-9_-]{1,64}", name)
        scores = {key: item["enum"] for key, item in schema["properties"].items()}
        whole = all(isinstance(s, list) and set(map(type, s)) == {int} for s in scores.values())
    understood = {
        "type": "object",
        "properties": {key: {"type": "integer", "enum": scores[key]} for key in scores},
        "required": list(scores),
        "additionalProperties": False,
    }
    rehearsed = {"name": name, "strict": True, "schema": understood}
    _check(
        named and whole and given == {"type": "json_schema", "json_schema": rehearsed},
        "Only a strict schema of integers with an enum, or of a verdict, is rehearsed here.",
        "response_format",
    )
    return scores


def _score_text(wanted: dict[str, list[int]], predicted: dict[str, float]) -> str:
    """The nearest number allowed to each predicted score; the lowest where there is none."""
    value = {
        key: min(numbers, key=lambda number: abs(number - predicted.get(key, min(numbers))))
        for key, numbers in wanted.items()
    }
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


_VERDICT: Final = {
    "type": "object",
    "properties": {
        "reason": {"type": "string"},
        "winner": {"type": "string", "enum": ["A", "B", "tie"]},
    },
    "required": ["reason", "winner"],
    "additionalProperties": False,
}


def _wants_verdict(body: Json) -> bool:
    """Whether a ``response_format`` asks which of two answers, A and B, is better."""
    given = body.get("response_format")
    described = given.get("json_schema") if isinstance(given, dict) else None
    if not isinstance(described, dict) or described.get("strict") is not True:
        return False
    named = re.fullmatch("[a-zA-Z0-9_-]{1,64}", str(described.get("name")))
    return bool(named) and described.get("schema") == _VERDICT


def _verdict_text(user_text: str, model: CharacterModel | None) -> str:
    """The likelier of two answers, by the mean log-probability of their characters.

    The user text is a JSON object with both, ``A`` and ``B``, and the ``dialogue`` before them. A
    base model, which has learned nothing, measures by what this dialogue alone teaches.
    """
    said: list[str] = []
    answers: dict[str, str] = {}
    with contextlib.suppress(ValueError, RecursionError, KeyError, TypeError):
        asked = _strict_json(user_text)
        said = [message["content"] for message in asked["dialogue"]]
        answers = {name: asked[name] for name in "AB"}
    texts = all(isinstance(text, str) for text in (*said, *answers.values()))
    _check(answers and texts, "Only a JSON of a dialogue, A and B is judged here.", "messages")
    if model is None:
        model = CharacterModel()
        for text in said:
            model.learn(text)
    means: dict[str, float] = {}
    for name, text in answers.items():
        nats, _, characters = model.measure(text)
        means[name] = round(-nats / characters, 4)
    winner = "tie" if means["A"] == means["B"] else max(means, key=means.__getitem__)
    reason = f"1文字あたりの対数確率: A {means['A']}、B {means['B']}（リハーサル）"
    return json.dumps({"reason": reason, "winner": winner}, ensure_ascii=False)


# --- The character engine -------------------------------------------------------------------------


class _Tuned(NamedTuple):
    model: Learned
    scores: ScoreModel | None
    judge: CharacterModel  # as the last epoch left it, also of an earlier checkpoint


class CharacterEngine:
    """The character models behind the API; what they have learned ends with the process."""

    owner: str = "rehearsal"
    shutdown_date: str | None = "2027-01-14"  # OpenAI's deprecations page, announced 2026-10-14
    learning_rate: float = 1e-5

    def __init__(self, dialect: DialectName = "openai") -> None:
        """Has the base models of that service."""
        self.base_models: Mapping[str, str] = DIALECTS[dialect].base_models
        self._tuned: dict[tuple[str, int], _Tuned] = {}

    def train(self, order: Order) -> Generator[Progress, None, None]:
        """See `Engine`."""
        examples = read_examples(order.training)
        validation = read_examples(order.validation or b"")
        epochs, size, rng = order.n_epochs, order.batch_size, random.Random(order.seed)
        sample = rng.sample(validation, min(4, len(validation)))
        per_epoch = math.ceil(len(examples) / size)
        total = per_epoch * epochs
        every = max(1, min(10, total // 10))
        model, scores = CharacterModel(order.learning_rate_multiplier), fit_scores(examples)

        for step in range(1, total + 1):
            epoch, batch_number = divmod(step - 1, per_epoch)
            if batch_number == 0:
                shuffled = rng.sample(examples, len(examples))
            batch = shuffled[batch_number * size : (batch_number + 1) * size]
            metrics: Json = {"step": step}
            metrics |= yield from _measure(model, batch, "train")
            for example in batch:
                for user_text, text in example.turns:
                    model.learn(text)
                    if epoch == 0:
                        model.remember_opening(user_text, text)
                yield None
            epoch_ends = batch_number == per_epoch - 1
            if sample and (step % every == 0 or epoch_ends):
                metrics |= yield from _measure(model, sample, "valid")
            if validation and epoch_ends:
                metrics |= yield from _measure(model, validation, "full_valid")
            yield Step(total, metrics)
            if epoch_ends and epoch >= epochs - order.kept_epochs:
                self._tuned[order.job_id, step] = _Tuned(model.learned(), scores, model)
                yield Kept(metrics)
        yield Trained(epochs * sum(example.characters for example in examples))

    def answer(self, model: Model, body: Json) -> Reply:
        """See `Engine`."""
        tuned = None
        if model.job_id is not None and model.step is not None:
            tuned = self._tuned[model.job_id, model.step]
        texts = [_text(message) for message in body["messages"] if message["role"] == "user"]
        text = _answer_text(body, texts[-1] if texts else "", tuned)
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or len(text)
        asked = sum(map(len, map(_text, body["messages"])))
        cut = text[:limit]
        return Reply(cut, asked, len(cut), "stop" if cut == text else "length")

    def weights(self, model: Model) -> Mapping[str, bytes | Path]:
        """See `Engine`; named as an adapter's, though nothing but this engine has such weights."""
        learned = self._tuned[str(model.job_id), model.step or 0].model
        about = {"base_model_name_or_path": model.base, "peft_type": "CHARACTERS"}
        known = json.dumps({"likeliest": learned.likeliest, "openings": learned.openings})
        return {
            "adapter_config.json": json.dumps(about).encode("ascii"),
            "adapter_model.safetensors": known.encode("ascii"),
        }

    def forget(self, job_id: str) -> None:
        """See `Engine`."""
        self._tuned = {key: tuned for key, tuned in self._tuned.items() if key[0] != job_id}

    def close(self) -> None:
        """See `Engine`."""


def _measure(
    model: CharacterModel, examples: list[Example], name: str
) -> Generator[None, None, Json]:
    """Returns loss and accuracy on the examples' assistant texts; pauses after each example."""
    nats, hits, characters = 0.0, 0, 0
    for example in examples:
        for _, text in example.turns:
            more = model.measure(text)
            nats, hits, characters = nats + more[0], hits + more[1], characters + more[2]
        yield
    return {
        f"{name}_loss": round(nats / max(1, characters), 6),
        f"{name}_mean_token_accuracy": round(hits / max(1, characters), 6),
    }


def _answer_text(body: Json, user_text: str, tuned: _Tuned | None) -> str:
    if _wants_verdict(body):
        return _verdict_text(user_text, tuned.judge if tuned else None)
    if (wanted := _wanted_scores(body)) is not None:
        predicted = tuned.scores.predict(user_text) if tuned and tuned.scores else {}
        return _score_text(wanted, predicted)
    return tuned.model.answer(user_text) if tuned else UNTRAINED_ANSWER


# --- The service: what it keeps -------------------------------------------------------------------


@dataclass
class _Upload:
    shown: Json
    parts: dict[str, bytes] = field(default_factory=dict)


@dataclass
class Job:
    """A job; `shown` is what the API shows of it, `events` are in the order they happened."""

    shown: Json = field(default_factory=dict)
    events: list[Json] = field(default_factory=list)
    checkpoints: list[Json] = field(default_factory=list)
    seen: int = 0  # how many items of the engine's progress stand in it
    work: Generator[None, None, None] | None = None  # what is still to be done

    @property
    def id(self) -> str:
        """Its name."""
        return str(self.shown["id"])

    @property
    def status(self) -> str:
        """Where it is, in the service's words."""
        return str(self.shown["status"])

    @property
    def metrics(self) -> list[Json]:
        """What was measured, by step; a step that was taken twice counts as it went last."""
        measured = (event["data"] for event in self.events if event["type"] == "metrics")
        return list({data["step"]: data for data in measured}.values())


class _Memory:
    """Where files are and changes go; these end with the process."""

    def __init__(self) -> None:
        self._data: dict[str, bytes] = {}

    def read(self) -> Iterator[Json]:
        """All changes from the first."""
        return iter(())

    def add(self, change: Json) -> None:
        """Put down what has changed."""

    def keep(self, file_id: str, data: bytes) -> None:
        """Take the bytes of a file."""
        self._data[file_id] = data

    def data(self, file_id: str) -> bytes:
        """The bytes of a file."""
        return self._data[file_id]

    def drop(self, file_id: str) -> None:
        """Let go of a file."""
        del self._data[file_id]

    def close(self) -> None:
        """Nothing more is kept."""


class _Diary(_Memory):
    """A folder that outlives the endpoint: one line for every change, and the files' bytes.

    Raises OSError where it can't be written, or where another endpoint has it.
    """

    def __init__(self, folder: Path) -> None:
        self._files = folder / "files"
        self._files.mkdir(parents=True, exist_ok=True)
        lock = hold_lock(folder / "lock")
        if lock is None:
            raise BlockingIOError(f"{folder} は、動いている別のエンドポイントが使っています")
        self._lock = lock
        self._lines = (folder / "service.jsonl").open("a+b")

    def read(self) -> Iterator[Json]:
        """All changes from the first; half a line that a kill has left is cut off."""
        self._lines.seek(0)
        whole = 0
        for line in self._lines:
            if line.endswith(b"\n"):
                whole += len(line)
                yield json.loads(line)
        self._lines.truncate(whole)

    def add(self, change: Json) -> None:
        """Put down what has changed."""
        self._lines.write(json.dumps(change).encode("ascii") + b"\n")
        self._lines.flush()

    def keep(self, file_id: str, data: bytes) -> None:
        """Take the bytes of a file."""
        (self._files / file_id).write_bytes(data)

    def data(self, file_id: str) -> bytes:
        """The bytes of a file."""
        return (self._files / file_id).read_bytes()

    def drop(self, file_id: str) -> None:
        """Let go of a file."""
        (self._files / file_id).unlink()

    def close(self) -> None:
        """Let another endpoint have the folder."""
        self._lines.close()
        self._lock.close()


def hold_lock(path: Path) -> BinaryIO | None:
    """An exclusive lock on a file until it is closed or the process ends; None where it is held."""
    file = path.open("a+b")
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def _found(store: Mapping[str, _Kept], name: str, missing: ApiError) -> _Kept:
    if name not in store:
        raise missing
    return store[name]


def _page(items: Sequence[Json], query: dict[str, str], usual: int = 20) -> Json:
    """A page of a list that is already in the order of the answer."""
    limit, most = query.get("limit", str(usual)), max(usual, 100)
    ok = re.fullmatch(r"[0-9]{1,9}", limit) is not None and 1 <= int(limit) <= most
    _check(ok, f"Invalid 'limit': expected an integer from 1 to {most}.", "limit")
    start = 0
    if after := query.get("after"):
        ids = [item["id"] for item in items]
        _check(after in ids, f"Invalid 'after': no item '{after}'.", "after")
        start = ids.index(after) + 1
    data = list(items[start : start + int(limit)])
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else "",
        "last_id": data[-1]["id"] if data else "",
        "has_more": start + len(data) < len(items),
    }


class _Service:
    """Everything behind the endpoint but HTTP. Methods named in `_ROUTES` answer requests.

    All state is guarded by `state`; only the worker and chats compute outside it. What is kept
    changes in `_apply` alone.
    """

    def __init__(
        self,
        engine: Engine,
        dialect: Dialect,
        folder: Path | None,
        api_key: str | None,
        latency: float,
        max_in_flight: int | None,
    ) -> None:
        self.engine, self.dialect, self.api_key = engine, dialect, api_key
        self.routes = [*_routes_of(dialect)]
        self.latency, self.max_in_flight = latency, max_in_flight
        self.state = threading.Condition()
        self.closing = threading.Event()
        self.held: set[str] = set()
        self.moves = 0
        self.in_flight = 0
        self.files: dict[str, Json] = {}
        self.uploads: dict[str, _Upload] = {}
        self.jobs: dict[str, Job] = {}
        self.tuned: dict[str, Model] = {}
        self.deployments: dict[str, Model] = {}
        self.diary = _Diary(folder) if folder else _Memory()
        for change in self.diary.read():
            self._apply(change)

    # The two seams

    def answer(self, request: Request) -> Answer:
        """Answer a request. Override it to watch or to disturb; OSError hangs up without a word."""
        try:
            return self._operate(request)
        except ApiError as problem:
            return self.dialect.refusal(problem)

    def work(self, job: Job) -> Generator[None, None, None]:
        """What is left of a job, in pieces; between two it may be held or cancelled, or `fail`.

        Raises `TrainingFailed` where it can't go on.
        """
        validating, queued = self.dialect.waiting
        if job.status == validating:
            for purpose in MIN_EXAMPLES:
                yield
                data = self._data(job, purpose)
                if data and (problem := judge_training_file(data, purpose=purpose)):
                    return self.fail(job, problem.code, problem.message, f"{purpose}_file")
            yield
            self._say(job, f"Files validated, moving job to {queued} state")
            self.move(job, queued)
        if job.status == queued:
            yield
            self.move(job, "running")
            self._say(job, "Fine-tuning job started")
        yield
        yield from self._train(job)

    def _operate(self, request: Request) -> Answer:
        sent = request.headers.get("Authorization", "").encode()
        if self.api_key and not hmac.compare_digest(sent, f"Bearer {self.api_key}".encode()):
            raise ApiError(401, "Incorrect API key provided.", None, "invalid_api_key")
        operation, name = _route(request, self.routes)
        # A chat computes for a while, and touches no shared state.
        with self._chat_slot() if operation is _Service.chat else self.state:
            result = operation(self, request, name)
            return result if isinstance(result, Answer) else _json_answer(result)

    def _now(self) -> int:
        return int(time.time())

    def _new(self, prefix: str, kind: str, **more: Any) -> Json:
        name = f"{prefix}{secrets.token_hex(12)}"
        return {"id": name, "object": kind, "created_at": self._now(), **more}

    # What is kept

    def _change(self, **change: Any) -> None:
        with self.state:
            self.diary.add(change)
            self._apply(change)
            self.moves += 1
            self.state.notify_all()

    def _apply(self, change: Json) -> None:
        """A file, a job or a deployment is new or changed, a file or a job's models are gone."""
        if file := change.get("file"):
            self.files[file["id"]] = file
        elif name := change.get("deployed"):
            self.deployments[name] = Model(*change["model"])
        elif name := change.get("job"):
            self._apply_to_job(self.jobs.setdefault(name, Job()), change)
        elif name := change.get("deleted"):
            del self.files[name]
        else:
            gone, tuned, deployed = change["forgotten"], self.tuned, self.deployments
            self.tuned = {key: at for key, at in tuned.items() if at.job_id != gone}
            self.deployments = {k: at for k, at in deployed.items() if at.job_id != gone}

    def _apply_to_job(self, job: Job, change: Json) -> None:
        job.shown |= change.get("shown", {})
        job.events += change.get("events", [])
        job.checkpoints += change.get("checkpoints", [])
        job.seen += change.get("seen", 0)
        if job.status not in TERMINAL:
            job.work = job.work or self.work(job)
        elif job.status == "succeeded":
            steps = {
                c["fine_tuned_model_checkpoint"] or f"{job.id}:{c['id']}": c["step_number"]
                for c in job.checkpoints
            }
            if name := job.shown["fine_tuned_model"]:
                steps[name] = job.checkpoints[-1]["step_number"]
            base = job.shown["model"]
            self.tuned |= {known: Model(base, job.id, step) for known, step in steps.items()}

    # Models

    def _models(self, kinds: Sequence[_Kind]) -> dict[str, Model]:
        """The models of these kinds, by their names."""
        known: dict[_Kind, dict[str, Model]] = {
            "base": {name: Model(base) for name, base in self.engine.base_models.items()},
            "tuned": self.tuned,
            "deployed": self.deployments,
        }
        return {name: model for kind in kinds for name, model in known[kind].items()}

    def _shown_model(self, name: str) -> Json:
        """A model by its name; 404 for one that isn't here."""
        job_id = self._asked_model(name, self.dialect.lists).job_id
        created = self.jobs[job_id].shown["finished_at"] if job_id else self._now()
        owner = f"org-{self.engine.owner}" if job_id else self.engine.owner
        shown = {"id": name, "object": "model", "created": created, "owned_by": owner}
        ends = self.engine.shutdown_date if self.dialect.shows_shutdown else None
        return shown | ({"shutdown_date": ends} if ends else {})

    def _asked_model(
        self, name: str, kinds: Sequence[_Kind], missing: Missing | None = None
    ) -> Model:
        message, code = missing or self.dialect.missing_model
        unknown = ApiError(404, message.format(name), "model", code)
        return _found(self._models(kinds), name, unknown)

    def list_models(self, request: Request, name: str) -> Json:
        names = self._models(self.dialect.lists)
        return {"object": "list", "data": [self._shown_model(known) for known in names]}

    def retrieve_model(self, request: Request, name: str) -> Json:
        return self._shown_model(name)

    def delete_model(self, request: Request, name: str) -> Json:
        """A tuned model, and with it the job's checkpoints."""
        job_id = self._asked_model(name, ("base", "tuned")).job_id
        _check(job_id, f"The base model {name} can't be deleted.", "model")
        self._change(forgotten=job_id)
        self.engine.forget(str(job_id))
        return {"id": name, "object": "model", "deleted": True}

    # Deployments

    def deploy(self, name: str, model: str) -> None:
        """Let a model answer under a name; a checkpoint without a name is ``JOBID:CKPTID``.

        Raises `ApiError` for an unknown model, ValueError where the dialect has no deployments.
        """
        if "deployed" not in self.dialect.answers:
            raise ValueError("この方言の接続先に、デプロイはありません")
        with self.state:
            found = self._asked_model(model, ("base", "tuned"))
            self._change(deployed=name, model=list(found))

    def put_deployment(self, request: Request, name: str) -> Answer:
        """As the control plane of Azure does it."""
        _check("api-version" in request.query, "The api-version query parameter is required.")
        body = request.body
        sku = _field(body, "sku", dict, needed=True)
        properties = _field(body, "properties", dict, needed=True)
        model = _field(properties, "model", dict, where="properties.", needed=True)
        for key in ("format", "name", "version"):
            _field(model, key, str, where="properties.model.", needed=True)
        if model["format"] != "OpenAI" or model["name"] not in self._models(("base", "tuned")):
            message = f"The model '{model['name']}' of '{model['format']}' is not supported."
            raise ApiError(400, message, code="DeploymentModelNotSupported")
        self.deploy(name, model["name"])
        shown = {
            "id": urlsplit(request.target).path,
            "type": "Microsoft.CognitiveServices/accounts/deployments",
            "name": name,
            "sku": sku,
            "properties": {"model": model, "provisioningState": "Succeeded"},
        }
        return _json_answer(shown, 201)

    def deploy_checkpoint(self, request: Request, name: str) -> Json:
        """As Nebius does it."""
        keys = ("source", "base_model", "name")
        source, base, asked = (_field(request.body, key, str, needed=True) for key in keys)
        found = self._asked_model(source, ("tuned",), Missing("No such checkpoint: {}"))
        _check(found.base == base, f"{source} was tuned from {found.base}.", "base_model")
        letters = "".join(secrets.choice(string.ascii_letters) for _ in range(4))
        known = f"{base}-LoRa:{asked}-{letters}"
        self.deploy(known, source)
        return {"name": known, "status": "active", "source": source, "base_model": base}

    # Files

    def create_file(self, request: Request, name: str) -> Json:
        file = _field(request.body, "file", SentFile, needed=True)
        purpose = request.body.get("purpose")
        self._check_file(file.name, purpose, len(file.data))
        first = self.dialect.file_statuses[0]
        return self._add_file(file.name, str(purpose), file.data, first)

    def _check_file(self, name: str, purpose: Any, size: int) -> None:
        known = isinstance(purpose, str) and purpose in FILE_PURPOSES
        message = f"Invalid 'purpose': expected one of {sorted(FILE_PURPOSES)}."
        _check(known, message, "purpose", "enum")
        right = purpose != "fine-tune" or name.lower().endswith(".jsonl")
        _check(right, f"Invalid extension of '{name}': fine-tune files must be .jsonl.", "file")
        _check(size > 0, "File is empty.", "file")

    def _add_file(self, name: str, purpose: str, data: bytes, status: str | None) -> Json:
        more = {"bytes": len(data), "filename": name, "purpose": purpose, "status": status}
        shown = self._new("file-", "file", **more)
        self.diary.keep(shown["id"], data)
        self._change(file=shown)
        return shown

    def list_files(self, request: Request, name: str) -> Json:
        wanted = request.query.get("purpose")
        newest_first = reversed(self.files.values())
        files = [shown for shown in newest_first if wanted in (None, shown["purpose"])]
        return _page(files, request.query, usual=10_000)

    def file(self, name: str) -> Json:
        return _found(self.files, name, ApiError(404, f"No such File object: {name}", "id"))

    def retrieve_file(self, request: Request, name: str) -> Json:
        """A file; where a service takes its time with files, this look moves it on."""
        shown, statuses = self.file(name), self.dialect.file_statuses
        if shown["status"] in statuses[:-1]:
            status = statuses[statuses.index(shown["status"]) + 1]
            problem = self._file_problem(shown) if status == statuses[-1] else None
            told = {"status": "error", "status_details": problem} if problem else {"status": status}
            self._change(file=shown | told)
        return self.file(name)

    def _file_problem(self, shown: Json) -> str | None:
        """What a service says of a file that it looks at before any job."""
        if shown["purpose"] != "fine-tune":
            return None
        data = self.diary.data(shown["id"])
        if self.dialect.bom and not data.startswith(BOM):
            return "The file must be UTF-8 encoded with a byte order mark (BOM)."
        problem = judge_training_file(self._without_bom(data), purpose="validation")
        return problem.message if problem else None

    def _without_bom(self, data: bytes) -> bytes:
        return data.removeprefix(BOM) if self.dialect.bom else data

    def file_content(self, request: Request, name: str) -> Answer:
        """The bytes of a file, or those from where a ``Range: bytes=N-`` says."""
        data, kind = self.diary.data(self.file(name)["id"]), "application/octet-stream"
        asked = re.fullmatch("bytes=([0-9]{1,15})-", request.headers.get("Range", ""))
        if asked is None:
            return Answer(200, data, kind)
        start, size = int(asked[1]), len(data)
        if start >= size:
            headers = {"Content-Range": f"bytes */{size}"}
            raise ApiError(416, "Requested range not satisfiable.", headers=headers)
        headers = {"Content-Range": f"bytes {start}-{size - 1}/{size}"}
        return Answer(206, data[start:], kind, headers)

    def delete_file(self, request: Request, name: str) -> Json:
        self.file(name)
        self._change(deleted=name)
        self.diary.drop(name)
        return {"id": name, "object": "file", "deleted": True}

    # Uploads in parts

    def create_upload(self, request: Request, name: str) -> Json:
        body = request.body
        filename = _field(body, "filename", str, needed=True)
        size = _field(body, "bytes", int, needed=True)
        self._check_file(filename, body.get("purpose"), size)
        facts = {"bytes": size, "filename": filename, "purpose": body["purpose"]}
        ends = {"expires_at": self._now() + 3600}
        shown = self._new("upload_", "upload", **facts, status="pending", **ends)
        self.uploads[shown["id"]] = _Upload(shown)
        return shown

    def _upload(self, name: str) -> _Upload:
        """The upload asked for, which must still be open."""
        missing = ApiError(404, f"No such Upload object: {name}", "id")
        upload = _found(self.uploads, name, missing)
        status = upload.shown["status"]
        _check(status == "pending", f"The upload is {status}.", "upload_id")
        return upload

    def add_part(self, request: Request, name: str) -> Json:
        upload, sent = self._upload(name), _field(request.body, "data", SentFile, needed=True)
        part = self._new("part_", "upload.part", upload_id=name)
        upload.parts[part["id"]] = sent.data
        return part

    def complete_upload(self, request: Request, name: str) -> Json:
        upload, ids = self._upload(name), _field(request.body, "part_ids", list, needed=True)
        ok = all(isinstance(part, str) and part in upload.parts for part in ids)
        _check(ok, "Invalid 'part_ids': expected ids of parts of this upload.", "part_ids")
        data, size = b"".join(upload.parts[part] for part in ids), upload.shown["bytes"]
        message = f"The parts have {len(data)} bytes, the upload {size}."
        _check(len(data) == size, message, "part_ids")
        facts = (upload.shown["filename"], upload.shown["purpose"])
        file = self._add_file(*facts, data, self.dialect.file_statuses[0])
        upload.parts.clear()
        upload.shown |= {"status": "completed", "file": file}
        return upload.shown

    # Jobs: requests

    def create_job(self, request: Request, name: str) -> Json:
        body = self._understood(request.body)
        asked = _field(body, "model", str, needed=True)
        metadata = _field(body, "metadata", dict)
        texts = all(isinstance(value, str) for value in (metadata or {}).values())
        _check(texts, "Invalid 'metadata': expected strings.", "metadata", "string_type")
        base = self.engine.base_models.get(asked)
        if base is None:
            message = f"Model {asked} is not available for fine-tuning."
            raise ApiError(400, message, "model", "model_not_available")
        training = self._training_file(body, "training_file")
        given = body.get("validation_file") is not None
        validation = self._training_file(body, "validation_file") if given else None
        chosen, seed = self.dialect.hyperparameters(body), _field(body, "seed", int, (0, 2**31 - 1))
        shown = self._new(
            "ftjob-",
            "fine_tuning.job",
            **dict.fromkeys(("error", "estimated_finish", "fine_tuned_model", "finished_at")),
            **self._shown_hyperparameters(chosen),
            integrations=[],
            metadata=metadata if self.dialect.keeps_metadata else None,
            model=base,
            organization_id=f"org-{self.engine.owner}",
            result_files=[],
            seed=secrets.randbelow(2**31) if seed is None else seed,
            status=self.dialect.waiting[0],
            trained_tokens=None,
            training_file=training,
            user_provided_suffix=self._suffix(body),
            validation_file=validation,
        )
        created = self._event(f"Created fine-tuning job: {shown['id']}")
        validating = self._event(f"Validating training file: {training}")
        self._change(job=shown["id"], shown=shown, events=[created, validating])
        return shown

    def _understood(self, body: Json) -> Json:
        """Of a job's request what the service takes; the rest is dropped, or refused."""
        keys, kinds = self.dialect.job_keys, self.dialect.training_types
        if kinds and "trainingType" not in body:
            message = "The specified base model does not support fine-tuning."
            raise ApiError(400, message, code="invalidPayload")
        if kinds and body["trainingType"] not in sorted(kinds):
            message = f"Invalid 'trainingType': expected one of {sorted(kinds)}."
            raise ApiError(400, message, code="invalidPayload")
        if keys is None:
            return body
        if self.dialect.forbids_extra:
            _check_extra(body, keys)
        return {key: value for key, value in body.items() if key in keys}

    def _suffix(self, body: Json) -> str | None:
        suffix: str | None = _field(body, "suffix", str, (1, self.dialect.longest_suffix))
        right = self.dialect.dots_in_suffix or "." not in (suffix or "")
        _check(right, "Invalid 'suffix': it must have no dots.", "suffix")
        return suffix

    def _shown_hyperparameters(self, chosen: Json) -> Json:
        shown: Json = {"hyperparameters": chosen}
        if self.dialect.shows_method:
            shown["method"] = {"type": "supervised", "supervised": shown.copy()}
        return shown

    def _training_file(self, body: Json, key: str) -> str:
        name: str = _field(body, key, str, needed=True)
        file = _found(self.files, name, ApiError(400, f"invalid {key}: {name}", key))
        _check(file["purpose"] == "fine-tune", f"{key} must have purpose fine-tune.", key)
        if file["status"] != self.dialect.file_statuses[-1]:
            message = f"The file {name} is not in a processed state ({file['status']})."
            raise ApiError(400, message, key, "invalidPayload")
        return name

    def job(self, name: str) -> Job:
        message = f"Could not find fine tune: {name}"
        missing = ApiError(404, message, "fine_tune_id", "fine_tune_not_found")
        return _found(self.jobs, name, missing)

    def list_jobs(self, request: Request, name: str) -> Json:
        found = re.compile(r"metadata\[(.*)\]").fullmatch
        wanted = {match[1]: text for key, text in request.query.items() if (match := found(key))}
        if not self.dialect.keeps_metadata:
            wanted.clear()
        jobs = [
            job.shown
            for job in reversed(self.jobs.values())
            if wanted.items() <= (job.shown["metadata"] or {}).items()
        ]
        return _page(jobs, request.query)

    def list_events(self, request: Request, name: str) -> Json:
        shown = map(self._shown_event, reversed(self.job(name).events))
        return _page(list(shown), request.query)

    def _shown_event(self, event: Json) -> Json:
        if self.dialect.event_metrics or event["type"] != "metrics":
            return event
        message = "Step {step}/{total_steps} completed".format_map(event["data"])
        return event | {"type": "message", "message": message, "data": {}}

    def cancel_job(self, request: Request, name: str) -> Json:
        job = self.job(name)
        _check(job.status not in TERMINAL, f"Job has already {job.status}.")
        said = self._event("The job has been cancelled.")
        shown = {"status": "cancelled", "finished_at": self._now()}
        self._change(job=name, shown=shown, events=[said])
        return job.shown

    # Jobs: the work

    def _run_jobs(self) -> None:
        """The worker: carries the oldest job that may go on one piece further, until closing."""
        while job := self._next_job():
            if job.work and job.status not in TERMINAL:
                self._go_on(job, job.work)
            elif job.work:
                job.work.close()  # which ends what the engine does for it
                job.work = None
                if job.status == "cancelled":
                    self.engine.forget(job.id)
        for job in self.jobs.values():
            if job.work:
                job.work.close()

    def _go_on(self, job: Job, work: Iterator[None]) -> None:
        """One piece of a job; a defect ends the job, for whoever waits for it, and no other."""
        try:
            next(work, None)
        except TrainingFailed as problem:
            self.fail(job, problem.code, problem.message, problem.param)
        except Exception as problem:  # noqa: BLE001  # logged; who waits must be told of any
            _log.exception("ジョブ %s の処理中に想定外の例外が起きました", job.id)
            message = f"The server had an error: {type(problem).__name__}: {problem}"
            self.fail(job, "server_error", message)

    def _next_job(self) -> Job | None:
        """The oldest job with something to do, once there is one; None when all is closing."""
        with self.state:
            while not self.closing.is_set():
                waiting = (job for job in self.jobs.values() if job.work)
                if job := next((job for job in waiting if job.status not in self.held), None):
                    return job
                self.state.wait()
        return None

    def move(self, job: Job, status: str) -> None:
        """Give a job another status, unless it has ended."""
        with self.state:
            if job.status not in TERMINAL:
                self._change(job=job.id, shown={"status": status})

    def _event(self, message: str, level: str = "info", data: Json | None = None) -> Json:
        more: Json = {"level": level, "message": message, "data": data or {}}
        more["type"] = "message" if data is None else "metrics"
        return self._new("ftevent-", "fine_tuning.job.event", **more)

    def _say(self, job: Job, message: str) -> None:
        self._change(job=job.id, events=[self._event(message)])

    def fail(self, job: Job, code: str, message: str, param: str | None = None) -> None:
        """End a job with an error, unless it has ended."""
        with self.state:
            if job.status not in TERMINAL:
                error = {"code": code, "message": message, "param": param}
                shown = {"status": "failed", "error": error, "finished_at": self._now()}
                said = self._event(f"The job failed: {message}", "error")
                self._change(job=job.id, shown=shown, events=[said])

    def _data(self, job: Job, purpose: Purpose) -> bytes | None:
        """The bytes of a job's file; None where it has none. Raises `TrainingFailed`."""
        name = job.shown[f"{purpose}_file"]
        with self.state:
            if name is not None and name not in self.files:
                message = f"The file {name} has been deleted."
                raise TrainingFailed("file_not_found", message, f"{purpose}_file")
            return None if name is None else self._without_bom(self.diary.data(name))

    def _train(self, job: Job) -> Generator[None, None, None]:
        training, validation = self._data(job, "training"), self._data(job, "validation")
        training = training or b""
        examples = sum(1 for line in training.split(b"\n") if line.strip())
        rate, usual = "learning_rate_multiplier", 1.0
        if self.dialect.absolute_rate:
            rate, usual = "learning_rate", self.engine.learning_rate
        chosen = _resolve(job.shown["hyperparameters"], examples, {rate: usual})
        self._change(job=job.id, shown=self._shown_hyperparameters(chosen))
        order = Order(
            *(job.id, job.shown["model"], training, validation),
            *(chosen["n_epochs"], chosen["batch_size"], chosen[rate] / usual),
            seed=job.shown["seed"],
            seen=job.seen,
            kept_epochs=self.dialect.kept_epochs,
        )
        with contextlib.closing(self.engine.train(order)) as pieces:
            for progress in pieces:
                with self.state:
                    if progress is not None and job.status not in TERMINAL:
                        self._report(job, progress)
                yield

    def _report(self, job: Job, progress: Note | Step | Kept | Trained) -> None:
        change: Json = {"job": job.id, "seen": 1}
        match progress:
            case Note(message, level):
                change["events"] = [self._event(message, level)]
            case Step(total, metrics):
                message = f"Step {metrics['step']}/{total}: training loss={metrics['train_loss']}"
                data = {"step": metrics["step"], "total_steps": total, **metrics}
                change["events"] = [self._event(message, data=data)]
            case Kept(metrics):
                change["checkpoints"] = [self._checkpoint(job, metrics)]
            case Trained(tokens):
                change |= self._success(job, tokens)
            case _:
                assert_never(progress)
        self._change(**change)

    def _model_name(self, job: Job) -> str | None:
        suffix = job.shown["user_provided_suffix"] or ""
        return self.dialect.model_name(job.shown["model"], self.engine.owner, suffix, job.id)

    def _checkpoint(self, job: Job, metrics: Json) -> Json:
        step, name = metrics["step"], self._model_name(job)
        shown = self._new(
            self.dialect.checkpoint_id,
            "fine_tuning.job.checkpoint",
            fine_tuned_model_checkpoint=f"{name}:ckpt-step-{step}" if name else None,
            fine_tuning_job_id=job.id,
            metrics=metrics,
            step_number=step,
        )
        if self.dialect.result_columns is None:
            shown["result_files"] = self._add_weights(job, shown)
        return shown

    def _add_weights(self, job: Job, checkpoint: Json) -> list[str]:
        """The ids of a checkpoint's files, which are files like any other from now on."""
        model = Model(job.shown["model"], job.id, checkpoint["step_number"])
        ids = []
        for name, content in self.engine.weights(model).items():
            data = content if isinstance(content, bytes) else content.read_bytes()
            ids.append(self._add_result(f"{job.id}/{checkpoint['id']}/{name}", data))
        return ids

    def _add_result(self, name: str, data: bytes) -> str:
        status = self.dialect.file_statuses[-1]
        return str(self._add_file(name, "fine-tune-results", data, status)["id"])

    def _success(self, job: Job, tokens: int) -> Json:
        name, columns = self._model_name(job), self.dialect.result_columns
        if columns is None:
            results = job.checkpoints[-1]["result_files"]
        else:
            table = _result_csv(job.metrics, columns).encode()
            results = [self._add_result("step_metrics.csv", table)]
        said = [f"New fine-tuned model created: {name}"] if name else []
        shown = {
            "fine_tuned_model": name,
            "finished_at": self._now(),
            "result_files": results,
            "status": "succeeded",
            "trained_tokens": tokens,
        }
        said.append("The job has successfully completed")
        return {"shown": shown, "events": [*map(self._event, said)]}

    # Answers of models

    def chat(self, request: Request, name: str) -> Json:
        body = request.body
        _check_chat(body)
        with self.state:
            dialect = self.dialect
            model = self._asked_model(body["model"], dialect.answers, dialect.missing_answer)
        reply = self.engine.answer(model, body)
        message = {"role": "assistant", "content": reply.text, "refusal": None}
        asked, written = reply.prompt_tokens, reply.completion_tokens
        return {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion",
            "created": self._now(),
            "model": body["model"],
            "choices": [
                {
                    "index": 0,
                    "message": message,
                    "logprobs": None,
                    "finish_reason": reply.finish_reason,
                }
            ],
            "usage": {
                "prompt_tokens": asked,
                "completion_tokens": written,
                "total_tokens": asked + written,
            },
            "system_fingerprint": f"fp_{self.engine.owner}",
        }

    @contextlib.contextmanager
    def _chat_slot(self) -> Iterator[None]:
        """One of the chat completions that may be in flight at a time; 429 when there is none."""
        with self.state:
            if self.max_in_flight is not None and self.in_flight >= self.max_in_flight:
                message = "Rate limit reached for requests."
                raise ApiError(429, message, None, "rate_limit_exceeded", "requests")
            self.in_flight += 1
        try:
            if self.latency:
                self.closing.wait(self.latency)
            yield
        finally:
            with self.state:
                self.in_flight -= 1


def _resolve(asked: Json, examples: int, rate: Mapping[str, float]) -> Json:
    """Numbers for every "auto": three epochs, up to 256 in a batch by a 500th of the examples."""
    usual = {"n_epochs": 3, "batch_size": min(256, max(1, math.ceil(examples / 500))), **rate}
    return usual | {key: value for key, value in asked.items() if value != "auto"}


def _result_csv(rows: list[Json], head: str) -> str:
    """The service's result file; cells of steps without validation stay empty."""
    keys = head.replace("train_accuracy", "train_mean_token_accuracy").split(",")
    lines = (",".join(str(row.get(key, "")) for key in keys) for row in rows)
    return "\n".join([head, *lines, ""])


def _check_chat(body: Json) -> None:
    for key, only in (("n", 1), ("stream", False)):
        rehearsed = body.get(key) is None or body[key] == only
        _check(rehearsed, f"'{key}' other than {only} is not rehearsed here.", key, "value_error")
    _field(body, "model", str, needed=True)
    for key in ("max_completion_tokens", "max_tokens"):
        _field(body, key, int, (1, 1_000_000))
    messages = _field(body, "messages", list, needed=True)
    _check(messages, "Invalid 'messages': expected at least one.", "messages", "too_short")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        why = _message_problem(message, MESSAGE_KEYS)
        _check(why is None, f"Invalid '{where}': {why}", where, "value_error")


# --- HTTP -----------------------------------------------------------------------------------------

_Operation = Callable[[_Service, Request, str], Json | Answer]
_Route = tuple[re.Pattern[str], _Operation]
_ROUTES: Final[dict[str, _Operation]] = {  # under each root of a dialect
    "GET /models": _Service.list_models,
    "GET /models/**": _Service.retrieve_model,
    "DELETE /models/**": _Service.delete_model,
    "POST /files": _Service.create_file,
    "GET /files": _Service.list_files,
    "GET /files/*": _Service.retrieve_file,
    "GET /files/*/content": _Service.file_content,
    "DELETE /files/*": _Service.delete_file,
    "POST /uploads": _Service.create_upload,
    "POST /uploads/*/parts": _Service.add_part,
    "POST /uploads/*/complete": _Service.complete_upload,
    "POST /fine_tuning/jobs": _Service.create_job,
    "GET /fine_tuning/jobs": _Service.list_jobs,
    "GET /fine_tuning/jobs/*": lambda service, _, name: service.job(name).shown,
    "POST /fine_tuning/jobs/*/cancel": _Service.cancel_job,
    "GET /fine_tuning/jobs/*/events": _Service.list_events,
    "GET /fine_tuning/jobs/*/checkpoints": lambda service, request, name: _page(
        service.job(name).checkpoints[::-1], request.query
    ),
    "POST /chat/completions": _Service.chat,
}


def _routes_of(dialect: Dialect) -> Iterator[_Route]:
    """All routes whole, as the dialect has them; compiled once, for every request meets them."""
    routes = [*dialect.control.items()]
    for route, operation in _ROUTES.items():
        roots = [*dialect.roots]
        if dialect.project and " /uploads" not in route:
            roots.append(dialect.project)
        routes += [(route.replace(" ", f" {root}"), operation) for root in roots]
    for route, operation in routes:
        pattern = re.escape(route).replace(r"\*\*", "(.+)").replace(r"\*", "([^/]+)")
        yield re.compile(pattern), operation


def _route(request: Request, routes: Sequence[_Route]) -> tuple[_Operation, str]:
    """The operation of a request, and the last id or name in its path."""
    path = urlsplit(request.target).path
    for pattern, operation in routes:
        if match := pattern.fullmatch(f"{request.method} {path.rstrip('/')}"):
            return operation, unquote("".join(match.groups()[-1:]))
    raise ApiError(404, f"Invalid URL ({request.method} {path})")


def _read_form(content_type: str, body: bytes) -> Json:
    """The fields of a multipart body; each file is copied once."""
    match = re.search(r'boundary="?([^";]+)"?', content_type)
    if match is None:
        raise ApiError(400, "The multipart body has no boundary.")
    mark = b"--" + match[1].encode("latin-1")
    fields: Json = {}
    start = body.find(mark)
    while start >= 0 and not body.startswith(b"--", start + len(mark)):
        head_end = body.find(b"\r\n\r\n", start)
        end = body.find(b"\r\n" + mark, head_end + 2)
        _check(head_end >= 0 and end >= 0, "The multipart body is cut off.")
        head = body[start:head_end].decode("utf-8", "replace")
        content = body[head_end + 4 : end]
        name = re.search(r'[;\s]name="([^"]*)"', head)
        filename = re.search(r'[;\s]filename="([^"]*)"', head)
        if name is None:
            raise ApiError(400, "A part of the form has no name.")
        if filename:
            fields[name[1]] = SentFile(filename[1].replace("%22", '"'), content)
        else:
            fields[name[1]] = content.decode("utf-8", "replace")
        start = end + 2
    return fields


class _Server(socketserver.ThreadingTCPServer):
    """Threads that never hold up the program's end; `hang_up` ends them all at once."""

    daemon_threads = True
    request_queue_size = 128
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], service: _Service) -> None:
        super().__init__(address, _Handler)
        self.service = service
        self._open: set[socket.socket] = set()
        self._changed = threading.Condition()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._changed:
            self._open.add(request)
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._changed:
                self._open.discard(request)
                self._changed.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        problem = sys.exc_info()[1]
        if isinstance(problem, OSError):  # the client hung up, or `hang_up` did
            _log.debug("connection of %s ended: %s", client_address, problem)
        else:
            _log.error("リハーサルの処理中に想定外の例外が起きました", exc_info=problem)

    def hang_up(self) -> None:
        """End every open connection, and with it the thread that serves it."""
        with self._changed:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self._changed.wait_for(lambda: not self._open, timeout=2)


class _Handler(BaseHTTPRequestHandler):
    """Reads a request, lets the service answer it, writes the answer."""

    protocol_version = "HTTP/1.1"
    server_version = "openai-sft-rehearsal"
    wbufsize = -1
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        _log.debug("%s " + format, self.client_address[0], *args)

    def do_GET(self) -> None:
        try:
            content = self._read_body()
            request = Request(self.command, self.path, self.headers, content, self.connection)
            answer = self.server.service.answer(request)
        except ApiError as problem:
            answer = self.server.service.dialect.refusal(problem)
        self._send(answer)

    do_POST = do_PUT = do_DELETE = do_GET

    def finish(self) -> None:
        try:
            super().finish()
        finally:
            self.rfile.close()  # left open by the base class where the rest can't be sent

    def _read_body(self) -> bytes:
        length = self.headers.get("Content-Length", "0")
        if "Transfer-Encoding" in self.headers or not length.isdecimal():
            self.close_connection = True
            raise ApiError(411, "A Content-Length is needed.")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ConnectionAbortedError("the client hung up in the middle of its request")
        return body

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        headers = {
            "Content-Type": answer.content_type,
            "Content-Length": str(len(answer.body)),
            "x-request-id": f"req_{secrets.token_hex(12)}",
            **answer.headers,
            **({"Connection": "close"} if self.close_connection else {}),
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body)


# --- The endpoint ---------------------------------------------------------------------------------


class Rehearsal(_Service):
    """The endpoint: a context manager, or `start` and `close`.

    `engine` trains and answers, `CharacterEngine` unless told; `dialect` names the service whose
    ways it has. What `folder` holds of an earlier
    endpoint is taken up again. With an `api_key` nobody else is answered. `latency` seconds are
    added to each chat completion; more than `max_in_flight` of them at a time get 429.
    """

    def __init__(
        self,
        port: int = 0,
        *,
        host: str = "127.0.0.1",
        engine: Engine | None = None,
        dialect: DialectName = "openai",
        folder: Path | None = None,
        api_key: str | None = None,
        latency: float = 0.0,
        max_in_flight: int | None = None,
    ) -> None:
        """Binds the port; port 0 is any that is free.

        Raises OSError where the port is taken or the folder can't be used, ValueError for a host
        that others reach without an `api_key` and for a dialect that there isn't.
        """
        if dialect not in DIALECTS:
            raise ValueError(f"方言 {dialect} はありません（{'、'.join(DIALECTS)} のどれか）")
        if not (api_key or _is_loopback(host)):
            raise ValueError(f"{host} はほかのマシンからも届くため、APIキーが必要です")
        self._server = _Server((host, port), self)
        try:
            engine, spoken = engine or CharacterEngine(dialect), DIALECTS[dialect]
            super().__init__(engine, spoken, folder, api_key, latency, max_in_flight)
        except OSError:
            self._server.server_close()
            raise
        self._threads: list[threading.Thread] = []
        self._moves_seen = 0

    def start(self) -> Self:
        """Begin to answer and to work."""
        for name, run in (
            ("rehearsal", lambda: self._server.serve_forever(0.005)),
            ("rehearsal-jobs", self._run_jobs),
        ):
            thread = threading.Thread(target=run, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()
        return self

    def close(self) -> None:
        """End every connection and the work; a second call does nothing."""
        self.closing.set()
        self.release()
        if self._threads:  # without one to hear it, `shutdown` would wait for ever
            self._server.shutdown()
        self._server.hang_up()
        self._server.server_close()
        while self._threads:
            self._threads.pop().join(timeout=5)
        self.engine.close()
        self.diary.close()

    def __enter__(self) -> Self:
        """`start`."""
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        """`close`."""
        self.close()

    @property
    def url(self) -> str:
        """What a client takes as its ``base_url``."""
        return f"{self._origin}/v1"

    @property
    def project_url(self) -> str:
        """The same of a project, under which there are no uploads; ValueError where none is."""
        if self.dialect.project is None:
            raise ValueError("この方言の接続先に、プロジェクトのURLはありません")
        return self._origin + self.dialect.project.replace("*", "rehearsal")

    @property
    def _origin(self) -> str:
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}"

    def hold(self, status: str) -> None:
        """Stop every job that is in this status or gets there, until `release`."""
        with self.state:
            self.held.add(status)

    def release(self) -> None:
        """Let all held jobs go on."""
        with self.state:
            self.held.clear()
            self.state.notify_all()

    def wait_for_progress(self, timeout: float) -> bool:
        """Wait until a job has moved on (status, step or event) since the last call.

        True at once if one did already; False when `timeout` seconds passed without.
        """
        with self.state:
            self.state.wait_for(
                lambda: self.moves > self._moves_seen or self.closing.is_set(), timeout
            )
            before, self._moves_seen = self._moves_seen, self.moves
            return self._moves_seen > before


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


# --- The command line -----------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="python -m openai_sft_rehearsal",
        description="OpenAIのファインチューニングAPIの形をした、自分のマシンで動くエンドポイント。"
        "キーも費用も要りません。",
    )
    parser.add_argument("--port", type=int, default=8000, help="待ち受けるポート（0は空きポート）")
    parser.add_argument(
        "--host", default="127.0.0.1", help="待ち受けるアドレス（既定: このマシンだけ）"
    )
    parser.add_argument(
        "--api-key-file", type=Path, help="APIキーの入ったファイル。このキーにだけ答える"
    )
    parser.add_argument(
        "--engine",
        choices=("character", "trl"),
        default="character",
        help="学習と応答をするもの。character は小さな文字モデル、trl は本当のモデル",
    )
    parser.add_argument(
        "--dialect",
        choices=tuple(DIALECTS),
        default="openai",
        help="どのサービスの流儀で答えるか（openai のほかは OpenAI と違うところがある）",
    )
    parser.add_argument("--latency", type=float, default=0.0, help="チャットの応答に加える秒数")
    parser.add_argument("--max-in-flight", type=int, help="同時に受けるチャットの上限")
    real = parser.add_argument_group("--engine trl のとき（pip install 'openai-sft[local]'）")
    real.add_argument(
        "--model", help="学習する元のモデル（Hubの名前かフォルダー、試すだけなら tiny）"
    )
    real.add_argument("--state", type=Path, help="ファイル、ジョブ、重みを置くフォルダー")
    real.add_argument(
        "--launcher", help="学習の前に置くコマンド（torchrun や accelerate launch …）"
    )
    real.add_argument("--serve-url", help="応答をまかせるvLLMのURL")
    real.add_argument("--full", action="store_true", help="LoRAではなく全パラメーターを学習する")
    return parser


def _engine_of(arguments: argparse.Namespace) -> Engine:
    """Raises ValueError for options that don't go together, ImportError without its packages."""
    how = {name: getattr(arguments, name) for name in ("launcher", "serve_url", "full")}
    if arguments.engine == "character":
        if arguments.model or arguments.state or any(how.values()):
            raise ValueError("--engine trl のときの指定があります。--engine trl を足してください")
        return CharacterEngine(arguments.dialect)
    if not (arguments.model and arguments.state):
        raise ValueError("--engine trl には --model と --state が要ります")
    from openai_sft_local import LocalEngine

    return LocalEngine(arguments.model, arguments.state, **how)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C (130) or SIGTERM (143); 2 where it can't be begun."""
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    received: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda got, _: received.append(got)) for number in signals]
    names = ("port", "host", "dialect", "latency", "max_in_flight")
    try:
        with Rehearsal(
            **{name: getattr(arguments, name) for name in names},
            engine=_engine_of(arguments),
            folder=arguments.state,
            api_key=_read_key(arguments.api_key_file),
        ) as endpoint:
            _log.info("エンドポイントを開始しました: %s （Ctrl-Cで終了）", endpoint.url)
            while not received:
                time.sleep(0.1)  # a signal ends the sleep's turn, on Windows too
    except (OSError, ValueError, ImportError) as problem:
        _log.error("エンドポイントを開始できません（ポート%s）: %s", arguments.port, problem)
        return 2
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
    return 128 + received[0]


def _read_key(path: Path | None) -> str | None:
    if path is None:
        return None
    key = path.read_text(encoding="utf-8-sig").strip()
    if not key or not key.isascii():
        raise ValueError(f"{path} にAPIキーがありません（空か、使えない文字を含みます）")
    return key


# --- Example dialogues ----------------------------------------------------------------------------

#: The client's review as KokoroChat spells it: after the first four come the 20 items (0 to 5
#: points each).
_REVIEW: Final = """
    evaluation_id client_id counselor_id score
    felt_heard_and_understood felt_respected gained_new_insights felt_hopeful_or_expectant
    concerns_were_addressed thought_through_concerns_together conversation_had_good_rhythm
    conversation_felt_comfortable felt_appropriate_and_satisfying conversation_was_valuable
    conversation_started_smoothly conversation_ended_well showed_acceptance_and_empathy
    provided_acknowledgment_and_affirmation asked_effective_questions
    summarized_key_points_effectively clarified_issues_cleraly helped_identify_goals
    offered_actionable_suggestions encouraged_and_instilled_hope
    harmful_due_to_ignorance other_potentially_unethical unwilling_to_continue
"""


def example_dialogues() -> list[dict[str, object]]:
    """Two dozen short counselling dialogues, with those of KokoroChat's fields that tell something.

    Written for this project (MIT); the people and scores in them are made up.
    """
    blocks = re.split(r"^@ ", _DIALOGUES, flags=re.MULTILINE)[1:]
    return [
        _dialogue_record(number, *block.strip().split("\n"))
        for number, block in enumerate(blocks, 1)
    ]


def _dialogue_record(number: int, head: str, *lines: str) -> dict[str, object]:
    main_jp, main_en, sub, people, digits, left = (part.strip() for part in head.split("|"))
    client, counselor = map(int, re.findall(r"\d+", people))
    points = [int(digit) for digit in digits]
    left_early = None if left == "-" else left
    review = [number, client, counselor, sum(points), *points, None, None, left_early]
    roles = {"K": "counselor", "C": "client"}
    return {
        "dialogue": [
            {"role": roles[line[0]], "utterance": line[2:].replace("\\n", "\n")} for line in lines
        ],
        "topic": {"main_jp": main_jp, "main_en": main_en, "sub": sub},
        "review_by_client_en": dict(zip(_REVIEW.split(), review, strict=True)),
    }


_DIALOGUES: Final = r"""
@ 職場問題 | Workplace Issues | 上司との話し方に悩んでいる | client=3 counselor=7 | 44545434445355445343 | -
K こんにちは。今日はどんなことでいらっしゃいましたか?
C 上司に話しかけるのが怖くて。
C 報告のたびに手が震えるんです。
K 震えるほど緊張されるのですね。毎日となると、おつらいでしょう。
C 前に皆の前で怒られてから、ずっとです。
K そのときの光景が、今も残っているのでしょうか。
C そうです。声を聞くだけで固まります。
K はい
K 話しかける前、頭にはどんな言葉が浮かびますか?
C 「また怒られる」です。
K その言葉と一緒に毎日働いてこられたんですね。今日はそこから考えてみましょう。
@ 家族関係 | Family Relationships | 母の過干渉がつらい | client=5 counselor=1 | 55545445544555555445 | -
K はじめまして。ゆっくりお話しくださいね。
C 母が毎日LINEしてくるんです。
C 返事が遅いと電話も来ます。
K 毎日の連絡に、少し息苦しさを感じておられるのでしょうか。
C はい。でも冷たくもできなくて。
K お母さまを大切に思う気持ちと、離れたい気持ちの両方があるのですね。
C 両方…そうかもしれません。
K どちらも自然なお気持ちだと思います。
K どのくらいの距離だと楽でしょう。
C 週に２回くらいなら嬉しいです。
C それならちゃんと返せそう。
K 具体的になりましたね。それをどう伝えるか、一緒に考えましょうか。
C はい、お願いします😊
@ 恋愛 | Romance | 別れた恋人が忘れられない | client=8 counselor=4 | 43535534443334225354 | -
K こんばんは、担当の者です。よろしくお願いいたします。
C 半年前に別れた人が忘れられません。
K 半年たっても、心の中に大きくいらっしゃるのですね。
C 写真も消せなくて…
C 情けないですよね。
K 消せないくらい大事な時間だったのだと、私には聞こえました。
C そう言われると泣きそうです。
K 泣いても大丈夫ですよ。どんな場面を一番思い出しますか?
C 一緒に夕飯を作ったことです。
C カレーが得意な人でした。
K 温かい場面ですね。
K 無理に忘れず、少しずつ置き場所を探していけるといいですね。
@ 学業 | Academics | 卒論が進まず焦っている | client=2 counselor=9 | 33333324133233423532 | -
C 卒論が全然書けません。
K 卒論ですか。締め切りはいつなのでしょう?
C １２月です。あと３週間しかなくて。
K まず目次を作って、毎日少しずつ書いてみてはどうですか。
C それができれば苦労しないです…
K そうですよね、急いで提案してしまいました。
K 今、何が一番重く感じますか?
K 思いついたことで構いません。
C PCを開くのが怖いんです。
K 開くこと自体が怖いほど、追いつめられているのですね。
C はい、少し聞いてもらえて楽です。
@ 健康 | Health | 検査結果を待つ不安 | client=11 counselor=2 | 42243453444252334323 | -
K お待たせしました。本日はどうされましたか。
C 検査の結果待ちで不安です。
K 結果が出るまでの時間は長く感じますよね。
C 検索ばかりしてしまいます。
C 悪い情報しか目に入らなくて。
K 安心したくて調べるのに、かえって不安が増してしまうのですね。
C まさにその通りです。
K 少しでも気が紛れる時間はありますか?
C 犬の散歩のときだけは。
C 柴犬なんです🐕
K その時間を、今週は少し長めにとってみるのもよさそうですね。
@ 子育て | Parenting | 子どもに怒鳴ってしまう | client=9 counselor=1 | 55545555555555555555 | -
K こんにちは。お忙しい中、ありがとうございます。
C また子どもに怒鳴ってしまいました。
C 母親失格です。
K ご自分を責めるほど、お子さんを大切に思っておられるのですね。
C でも毎日なんです。
K 毎日お一人で向き合っていらっしゃるのでしょうか。
C 夫は帰りが遅くて、頼れません。
K 頼れる人がいない中で、本当によく踏ん張ってこられましたね。
C …涙が出てきました😢
K どうぞそのままで。
K 少し休めるとしたら、何がしたいですか?
C 一人で温かいコーヒーを飲みたい。
K その時間をどう作れるか、一緒に探してみましょう。
C はい。気持ちが軽くなりました。
@ 介護 | Elder Care | 父の介護で疲れている | client=14 counselor=6 | 34532524444435554344 | -
K はじめまして、どうぞ気楽にお話しください。
C 父の介護でもう限界です。
K 限界と感じるまで、頑張ってこられたのですね。
C 夜中に何度も起こされます。
C 兄は何も手伝いません。
K 体の疲れに加え、お一人で背負う寂しさもおありでしょうか。
C 寂しい…はい、腹も立ちます。
K 腹が立つのも無理のないことだと思います。
K お兄さんには、何を一番わかってほしいですか?
C 大変だねと言ってほしいだけです。
K その一言が欲しかったのですね。本当に大変でしたね。
@ 友人関係 | Friendship | グループで仲間外れにされる | client=1 counselor=3 | 22323213334423231333 | -
K こんにちは。ご相談内容を教えてください。
C 友達のグループから外されました。
K それは何か原因があったのでしょうか。
C わかりません。
C 急にLINEの返事が来なくなって。
K 別の友達を作ってみるのはどうでしょう。
C そんな簡単じゃないです…
K すみません、急ぎすぎましたね。
K 突然のことで、戸惑っておられるのですね。
C はい。学校に行くのも憂うつです。
K その憂うつなお気持ち、もう少し聞かせていただけますか。
@ 睡眠 | Sleep | 夜中に何度も目が覚める | client=12 counselor=8 | 32335325334344333435 | -
K こんばんは。遅い時間までお疲れさまです。
C 夜中に３回は目が覚めます。
K 何度も起きてしまうと、疲れが取れませんよね。
C 昼間も頭がぼんやりして。
K いつ頃から続いているのですか?
C 異動した春からです。
C 関係ありますかね。
K 環境が変わると、眠りにも影響が出ることがあります。
K 目が覚めたとき、何を考えていますか?
C 明日の会議のことばかりです。
K 夜も仕事が続いているような感じなのですね。
@ 転職 | Career Change | 転職すべきか迷っている | client=4 counselor=10 | 43423342232344423534 | -
C 転職するか迷っています。
K 迷っておられるのですね。どんなきっかけがありましたか?
C 同期が次々辞めていくんです。
K 周りが動くと、気持ちも揺れますよね。
C でも今の仕事も嫌いではなくて。
C 決められない自分が嫌です。
K 嫌いではないからこそ、簡単に決められないのではないでしょうか。
C なるほど、そうかも。
K 今の仕事の、どんなところが好きですか?
C お客さんと話すところです。
C "また来るね"が嬉しくて。
K その好きな部分を、軸にして考えてみるのはいかがでしょう。
@ 自己否定 | Self-Criticism | 消えてしまいたいと感じる | client=10 counselor=4 | 54355343555455534555 | -
K こんばんは。どんなお気持ちでここに来られましたか?
C ときどき、消えてしまいたくなります。
K 話してくださってありがとうございます。とてもおつらかったのですね。
C こんなこと言っていいんですか。
K もちろんです。\n大事なことなので、お尋ねしますね。
K 今、ご自分を傷つけたい気持ちはありますか?
C いえ、ただ疲れて休みたいんです。
K 消えたいほど疲れて、休みたいのですね。安全だと聞けて少しほっとしました。
C 誰にも言えませんでした。
K お一人で抱えてこられたのですね。
K もし強くなったら、すぐ話せる人や窓口も一緒に確認しませんか。
C はい、そうしたいです。
@ 職場問題 | Workplace Issues | 残業を断れない | client=13 counselor=3 | 45522332212232121322 | 質問ばかりで気持ちを聞いてもらえなかった
K どうも。では早速始めましょう。
C 残業を断れなくて困っています。
K 月に何時間くらいですか?
C ６０時間くらいです。
K 断ってみたことはありますか?
K 労務に相談はしましたか?
C していません…あの、少し疲れました。
C すみません、今日はもうやめます。
@ 夫婦関係 | Marriage | 夫と会話がない | client=15 counselor=7 | 43444553434535544443 | -
K ごきげんいかがですか。お話を伺いますね。
C 夫と会話がほとんどありません。
K 会話が減っていく中で、どんなお気持ちでいらっしゃいますか?
C 透明人間みたいな気分です。
K そこにいるのに、見てもらえないような…
C そう、それです。
C 髪を切っても気づかないし。
K 気づいてほしかったのですね。
C はい。昔はよく褒めてくれたので。
K 昔の温かさを知っているから、今がいっそう寂しいのかもしれませんね。
C ああ、寂しかったんだ、私。
@ 対人不安 | Social Anxiety | 電話に出るのが怖い | client=16 counselor=12 | 42332353432232435334 | -
K よろしくお願いします。今日のテーマはありますか?
C 会社の電話に出るのが怖いです。
C 先週も一度逃げました。
K 電話が鳴ると、どんなふうになりますか?
C 心臓がﾊﾞｸﾊﾞｸします。
C 頭も真っ白です。
K 体にも強く出るのですね。毎日それでは消耗しますよね。
C 新人なので取らないと、と思うし。
K 怖さと責任感の間で板ばさみなのですね。
C そうなんです!
K はい
K うまくいった電話は、一度でもありましたか?
C 常連さんのときは平気でした。
K 相手がわかると安心できるのですね。よい手がかりです。
@ 進路 | Course Choice | 親と志望校が合わない | client=20 counselor=6 | 45544442535324434434 | -
K 初めまして。進路のことと伺っています。
C 親が勝手に志望校を決めてきます。
K ご自分の希望とは違うのですね。
C 美術をやりたいのに"就職できない"って。
K やりたい気持ちを否定されたようで、悔しかったでしょうか。
C 悔しいし、悲しいです。
K ええ
K 美術のどんなところに惹かれますか?
C 描いている間は自由なんです。
C 時間も忘れます。
K 自由でいられる大切な場所なのですね。\nその思い、ご両親は知っていますか?
C まだ言えていません。
K 伝え方をここで練習してみることもできますよ。
@ 金銭 | Money | つい買い物をしすぎる | client=17 counselor=9 | 12411333333442225252 | -
K こんにちは、今日担当いたします。
C ストレスで買い物が止まりません。
K 家計簿をつけてみてはいかがでしょうか。
C つけても続かなくて。
C 届いた箱も開けてないんです。
K 開けていない箱があるのですね。
K 買うときは、どんな気分なのでしょう。
K 責めているのではありませんよ。
C その瞬間だけホッとします。
K ホッとしたいほど、普段が張りつめているのでしょうか。
C そうかもしれないです。仕事がきつくて。
K では次は、お仕事のことを伺わせてください。
@ 喪失 | Grief | 飼い猫を亡くした | client=5 counselor=1 | 54555554535555555555 | -
K またお会いできましたね。お変わりありませんか。
C １５年一緒の猫が亡くなりました。
K １５年も…。かけがえのない家族だったのですね。
C 周りは「たかが猫」って言うんです。
K その言葉は、胸に刺さったことでしょう。
C 仕事中も涙が出て。
C おかしいですか?
K いいえ。それだけ深く愛しておられた証だと思います。
K よければ、お名前を教えていただけますか。
C モモです🐱
C 三毛の女の子でした。
K モモちゃん。どんな思い出が一番に浮かびますか?
C 膝の上で寝てた重みです。
@ 家族関係 | Family Relationships | 妹と比べられてきた | client=8 counselor=4 | 43354553554455543543 | -
K 先日はありがとうございました。その後いかがですか?
C 実家でまた妹と比べられました。
K また、ということは前から続いているのですね。
C 小さい頃からずっとです。
K 長い間、そのたびに傷ついてこられたのでしょうか。
C 慣れたつもりでした。
C でも帰り道で泣きました。
K 慣れたように見せて、心はちゃんと痛みを感じていたのですね。
C 本当は認めてほしかった。
C 一度でいいから。
K その願いを今、言葉にできましたね。
K 認めてほしいのは、どんなところでしょう?
C 自分なりに頑張ってきたところです。
K ここまでのお話だけでも、その頑張りは私に伝わってきました。
@ 孤独 | Loneliness | 引っ越し先に知人がいない | client=3 counselor=7 | 55555445444455545543 | -
K お久しぶりです。新しい街はいかがですか?
C 引っ越して、知り合いがゼロです。
K 知らない街で、心細い日々をお過ごしなのですね。
C スーパーの店員さんとしか話してません。
K その短いやりとりは、どんな感じがしますか?
C 実は、ちょっと嬉しいです。
C 顔を覚えてくれていて。
K 覚えてもらえることが、温かく感じられたのですね。
C あ、私、覚えてほしいのかも。
K はい
K 大切な気づきですね。ほかにも顔なじみになれそうな場所はありますか?
C 図書館に行ってみようかな📚
C 歩いて５分なので。
K いいですね。次に様子を聞かせてください。
@ 老後 | Later Life | 定年後の生きがいがない | client=14 counselor=2 | 32434422345355444333 | -
K ようこそいらっしゃいました。ご用件を伺います。
C 定年してから張り合いがない。
K 長く続いた毎日が、大きく変わったのですね。
C 朝起きても用事がないんです。
K 用事のない朝は、どんな気分でしょうか。
C 置いていかれた感じです。
C 妻は忙しそうで。
K 奥さまの忙しさが、少しまぶしく見えるのでしょうか。
C はは、まぶしいね。うまいこと言う。
K お仕事では、何をしているときが充実していましたか?
C 若い人に教えるときだね。
@ 将来 | Future | 将来が不安で動けない | client=10 counselor=4 | 55555555555545555555 | -
K こんにちは。前回のあと、どう過ごされましたか?
C 少し眠れました。でも先が不安で。
C 考えると止まりません。
K 眠れた日があったこと、うれしく思います。
K 不安は、どんなときに強くなりますか?
C 日曜の夕方です。
C 胸がｷﾞｭｯとします。
K 一週間が始まる前に、胸が締めつけられるのですね。
C 逃げたくなるけど、逃げ場がない。
K 逃げ場がないと感じるのは、とても苦しいことですね。
C でも、ここでは話せます。
K そう言っていただけて光栄です。ここを一つの居場所にしてください。
C はい。日曜は日記を書いてみます✨
K ご自分で見つけた方法ですね。応援しています。
@ 恋愛 | Romance | 恋人の束縛が気になる | client=20 counselor=3 | 11423122333435333331 | 自分が悪いと言われたように感じた
K ご相談の方ですね。どうぞ。
C 彼が毎日行動を確認してきます。
C 報告しないと怒るんです。
K 報告を忘れないようにはできますか?
C え、私が直すんですか。
K 心配させない工夫も必要かと思います。
C 私が悪いみたいですね…
C もういいです。失礼します。
@ 家族関係 | Family Relationships | 父と和解したい | client=5 counselor=1 | 55555555555555555555 | -
K こんにちは、モモちゃんのお話以来ですね。
C 実は父と十年話していません。
C 先日、入院したと聞いて。
K 十年の時を経て、心が揺れておられるのですね。
C 許せないのに、会いたいんです。
K 許せない気持ちも、会いたい気持ちも、どちらも本当なのですね。
C どちらかに決めなきゃと思ってた。
K 決めないまま会うとしたら、何を話したいですか?
C 元気?だけでいいかも。
K はい
K その一言に、十年分の思いが入っていそうですね。
C …はい。手紙を書いてみます。
K 今日は揺れる心をそのまま話してくださいました。手紙も急がずにどうぞ。
C 来てよかったです。
@ 孤独 | Loneliness | 朝が来るのがつらい | client=17 counselor=9 | 24434344325235332443 | -
C 朝なんて来なければいいのに。
K そう思うほど、おつらいのですね。来てくださってよかったです。
C いなくなっても誰も気づかないし。
K いなくなりたい、というお気持ちもあるのでしょうか。
C 時々。今日は大丈夫です。
K 正直に教えてくださって、ありがとうございます。
K つらい時にそばにいてくれる人はいますか?
K 一人でも、思い浮かべば。
C 姉には、少しだけ話せます。
K お姉さんにも今の気持ちを伝えてみませんか。専門の窓口もご案内できます。
C 今夜、電話してみます。
"""  # noqa: E501 - a header line of the dialogues may be long

if __name__ == "__main__":
    # As the engines import it: a class of `__main__` is another than that of the module.
    import openai_sft_rehearsal

    sys.exit(openai_sft_rehearsal.main())
