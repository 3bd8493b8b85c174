"""How the tests of the endpoint talk to it: through the official client, or over bare HTTP."""

from __future__ import annotations

import http.client
import json
from typing import Any

import openai

from openai_sft_rehearsal import Rehearsal

BASE = "gpt-4o-mini-2024-07-18"
AUTHORIZED = {"Authorization": "Bearer x"}
USER = {"role": "user", "content": "はい"}


def jsonl(*records: Any) -> bytes:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()


def example(number: int) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"{number}日ほど眠れません。仕事が不安です。\r\n\u2028🌙"},
            {"role": "assistant", "content": f"{number}日も。おつらいですね。何が不安ですか？"},
        ]
    }


def examples(count: int) -> bytes:
    return jsonl(*map(example, range(count)))


def connected(sdk: openai.OpenAI, endpoint: Rehearsal) -> openai.OpenAI:
    """A client of this endpoint that tries once."""
    return sdk.with_options(base_url=endpoint.url, max_retries=0, timeout=10)


def upload(client: openai.OpenAI, data: bytes, name: str = "train.jsonl") -> str:
    return client.files.create(file=(name, data), purpose="fine-tune").id


def start_job(client: openai.OpenAI, data: bytes | None = None, **options: Any) -> Any:
    file = upload(client, examples(20) if data is None else data)
    settings: dict[str, Any] = {"model": BASE, "training_file": file, "seed": 1, **options}
    return client.fine_tuning.jobs.create(**settings)


def json_schema(properties: dict[str, Any], name: str = "scores", **more: Any) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
        **more,
    }
    return {
        "type": "json_schema",
        "json_schema": {"name": name, "strict": True, "schema": schema},
    }


def hyperparameters(**values: Any) -> dict[str, Any]:
    return {"type": "supervised", "supervised": {"hyperparameters": values}}


def wait_until(endpoint: Rehearsal, client: openai.OpenAI, job: Any, *wanted: str) -> Any:
    for _ in range(10_000):
        found = client.fine_tuning.jobs.retrieve(job.id)
        if found.status in wanted:
            return found
        assert endpoint.wait_for_progress(10), f"still {found.status}"
    raise AssertionError(f"never {wanted}")


def finish(endpoint: Rehearsal, client: openai.OpenAI, job: Any) -> Any:
    return wait_until(endpoint, client, job, "succeeded", "failed", "cancelled")


def metrics_of(client: openai.OpenAI, job: Any) -> list[dict[str, Any]]:
    events: list[Any] = list(client.fine_tuning.jobs.list_events(job.id))
    return [event.data for event in events[::-1] if event.type == "metrics"]


def ask(client: openai.OpenAI, model: str, text: str = "眠れません", **options: Any) -> Any:
    settings: dict[str, Any] = {"messages": [{"role": "user", "content": text}], **options}
    return client.chat.completions.create(model=model, **settings)


def port_of(endpoint: Rehearsal) -> int:
    return int(endpoint.url.split(":")[2].split("/")[0])


def raw(
    endpoint: Rehearsal,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: dict[str, str] = AUTHORIZED,
) -> tuple[int, Any]:
    """Status and JSON of the answer; 0 and None where the connection ends without one."""
    connection = http.client.HTTPConnection("127.0.0.1", port_of(endpoint), timeout=10)
    try:
        connection.request(method, f"/v1{path}", body, headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    except (ConnectionError, http.client.HTTPException):
        return 0, None
    finally:
        connection.close()
