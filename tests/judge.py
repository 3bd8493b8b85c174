"""OpenAI's own API description as the judge of recorded exchanges.

The description lies beside the project (``../shared/openapi``); where it is absent, nothing is
found wrong.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from endpoint import Exchange
from jsonschema import Draft202012Validator

DESCRIPTION = Path(__file__).parents[2] / "shared" / "openapi" / "openai-fine-tuning-api.json"

#: Answers that a fault made unreadable on purpose.
_SPOILT = frozenset({"truncated", "malformed"})


@functools.cache
def _description() -> dict[str, Any]:
    described: dict[str, Any] = json.loads(DESCRIPTION.read_text(encoding="utf-8"))
    # Both statuses exist; the description lacks them (see the README beside it).
    job = described["components"]["schemas"]["FineTuningJob"]
    job["properties"]["status"]["enum"] += ["pausing", "paused"]
    # The service refuses what the description lets pass: unknown parameters, long metadata.
    schemas = described["components"]["schemas"]
    for name in ("CreateFineTuningJobRequest", "FineTuneSupervisedHyperparameters"):
        schemas[name]["additionalProperties"] = False
    schemas["Metadata"]["anyOf"][0] |= {
        "maxProperties": 16,
        "propertyNames": {"maxLength": 64},
        "additionalProperties": {"type": "string", "maxLength": 512},
    }
    return described


@functools.cache
def _validator(schema: str) -> Draft202012Validator:
    return Draft202012Validator(
        {"allOf": [json.loads(schema)], "components": _description()["components"]}
    )


def _complaints(value: Any, schema: dict[str, Any], where: str) -> Iterator[str]:
    for problem in _validator(json.dumps(schema)).iter_errors(value):
        yield f"{where}: {problem.json_path}: {problem.message[:300]}"


def _operation(exchange: Exchange) -> dict[str, Any] | None:
    for template, methods in _description()["paths"].items():
        pattern = re.sub(r"\{[^}]*\}", "[^/]+", template)
        if exchange.method.lower() in methods and re.fullmatch(pattern, exchange.path):
            operation: dict[str, Any] = methods[exchange.method.lower()]
            return operation
    return None


def _check(exchange: Exchange) -> Iterator[str]:
    where = f"{exchange.method} {exchange.path} -> {exchange.status}"
    if exchange.status == 0 or exchange.fault in _SPOILT:
        return
    if exchange.status != 200:
        schema = {"$ref": "#/components/schemas/ErrorResponse"}
        yield from _complaints(exchange.response, schema, where)
        return
    operation = _operation(exchange)
    if operation is None:
        yield f"{where}: not described, and answered all the same"
        return
    asked = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if asked:
        yield from _complaints(exchange.request, asked["schema"], f"{where} (request)")
    if exchange.path.endswith("/content"):
        return  # bytes, though the description calls them JSON
    answered = operation["responses"]["200"]["content"].get(exchange.content_type)
    if answered is None:
        yield f"{where}: {exchange.content_type} is not described"
        return
    yield from _complaints(exchange.response, answered["schema"], where)


def check_exchanges(exchanges: Iterable[Exchange]) -> list[str]:
    """Every way in which the exchanges differ from the description; none where it is absent."""
    if not DESCRIPTION.exists():
        return []
    return [complaint for exchange in exchanges for complaint in _check(exchange)]
