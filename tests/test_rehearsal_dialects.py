"""The rehearsal as other services than OpenAI's: through the official client, where it knows."""

from __future__ import annotations

import csv
import http.client
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from calls import (
    BASE,
    ask,
    connected,
    examples,
    finish,
    hyperparameters,
    port_of,
    start_job,
    upload,
    wait_until,
)
from endpoint import Fault, Rehearsal

from openai_sft_rehearsal import ApiError, CharacterEngine, main

PROJECT = Path(__file__).parents[1]
BOM = b"\xef\xbb\xbf"
QWEN = "Qwen/Qwen3-0.6B"
STANDARD = {"trainingType": "Standard"}
DEPLOYMENTS = (
    "/subscriptions/s/resourceGroups/g/providers/Microsoft.CognitiveServices/accounts/a/deployments"
)

Start = Callable[[str], tuple[Rehearsal, openai.OpenAI]]


@pytest.fixture
def start(sdk: openai.OpenAI) -> Iterator[Start]:
    """Starts endpoints of a dialect, each with its client."""
    running: list[Rehearsal] = []

    def begin(dialect: str) -> tuple[Rehearsal, openai.OpenAI]:
        running.append(Rehearsal(dialect=dialect).start())
        return running[-1], connected(sdk, running[-1])

    yield begin
    for endpoint in running:
        endpoint.close()


@pytest.fixture
def azure(start: Start) -> tuple[Rehearsal, openai.OpenAI]:
    return start("azure")


@pytest.fixture
def nebius(start: Start) -> tuple[Rehearsal, openai.OpenAI]:
    return start("nebius")


def processed(client: openai.OpenAI, data: bytes = BOM + examples(12)) -> str:
    """A file that Azure has looked at."""
    file = upload(client, data)
    while client.files.retrieve(file).status in ("pending", "running"):
        pass
    return file


def create(client: openai.OpenAI, file: str, model: str = BASE, **options: Any) -> Any:
    settings: dict[str, Any] = {"model": model, "training_file": file, "seed": 1, **options}
    return client.fine_tuning.jobs.create(**settings)


def azure_job(client: openai.OpenAI, **options: Any) -> Any:
    settings: dict[str, Any] = {"extra_body": STANDARD, **options}
    return create(client, processed(client), **settings)


def nebius_job(client: openai.OpenAI, **options: Any) -> Any:
    return create(client, upload(client, examples(12)), QWEN, **options)


def send(endpoint: Rehearsal, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    """A request to a path that no client knows."""
    connection = http.client.HTTPConnection("127.0.0.1", port_of(endpoint), timeout=10)
    try:
        connection.request(method, path, None if body is None else json.dumps(body))
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def put_deployment(endpoint: Rehearsal, name: str, model: str, **changed: Any) -> tuple[int, Any]:
    properties = {"model": {"format": "OpenAI", "name": model, "version": "1"}}
    body = {"sku": {"name": "standard", "capacity": 1}, "properties": properties, **changed}
    return send(endpoint, "PUT", f"{DEPLOYMENTS}/{name}?api-version=2024-10-01", body)


def said(answer: Any) -> Any:
    return answer.choices[0].message.content


def refusal(caught: pytest.ExceptionInfo[openai.APIStatusError]) -> Any:
    return caught.value.response.json()


# --- Every dialect --------------------------------------------------------------------------------


def test_an_unknown_dialect_is_refused() -> None:
    with pytest.raises(ValueError, match=r"klingon.*azure"):
        Rehearsal(dialect="klingon")


@pytest.mark.parametrize("dialect", ["openai", "azure", "nebius", "litellm"])
def test_a_download_goes_on_from_where_it_stopped(start: Start, dialect: str) -> None:
    _, client = start(dialect)
    file = upload(client, examples(3))
    size = len(examples(3))

    def rest(start: int) -> Any:
        return client.files.content(file, extra_headers={"Range": f"bytes={start}-"})

    assert rest(7).content == examples(3)[7:]
    assert rest(7).response.status_code == 206
    assert rest(7).response.headers["Content-Range"] == f"bytes 7-{size - 1}/{size}"
    assert client.files.content(file).response.status_code == 200
    with pytest.raises(openai.APIStatusError) as caught:
        rest(size)
    assert caught.value.status_code == 416


@pytest.mark.parametrize(
    ("dialect", "models"),
    [
        ("openai", {BASE}),
        ("azure", {BASE}),
        ("litellm", {BASE}),
        ("nebius", {QWEN, "meta-llama/Llama-3.1-8B-Instruct"}),
    ],
)
def test_the_command_speaks_a_dialect(dialect: str, models: set[str]) -> None:
    command = [sys.executable, "-m", "openai_sft_rehearsal", "--port", "0", "--dialect", dialect]
    with subprocess.Popen(
        command, cwd=PROJECT, stderr=subprocess.PIPE, encoding="utf-8", errors="replace"
    ) as process:
        assert process.stderr is not None
        found = re.search(r"http://127\.0\.0\.1:\d+/v1", process.stderr.readline())
        assert found is not None
        with openai.OpenAI(base_url=found.group(), api_key="x", max_retries=0) as client:
            listed = {model.id for model in client.models.list()}
            status = client.files.create(file=("a.jsonl", b"{}"), purpose="fine-tune").status
        process.terminate()

    expected: dict[str, Any] = {"azure": "pending", "nebius": None}
    assert models <= listed
    assert status == expected.get(dialect, "processed")


def test_the_command_knows_no_other_dialect(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--port", "0", "--dialect", "klingon"])

    assert caught.value.code == 2
    assert "litellm" in capsys.readouterr().err


def test_openais_last_day_of_a_model_is_not_that_of_azure(start: Start) -> None:
    _, client = start("azure")

    assert "shutdown_date" not in client.models.retrieve(BASE).to_dict()


@pytest.mark.parametrize(
    ("dialect", "answer"),
    [
        ("azure", {"error": {"code": "500", "message": "The server had an error."}}),
        ("nebius", {"detail": "The server had an error."}),
    ],
)
def test_what_goes_wrong_is_told_in_the_words_of_the_dialect(
    start: Start, dialect: str, answer: Any
) -> None:
    endpoint, client = start(dialect)
    endpoint.inject(Fault("500"))
    with pytest.raises(openai.InternalServerError) as caught:
        client.models.list()

    assert refusal(caught) == answer


@pytest.mark.parametrize("dialect", ["openai", "litellm"])
def test_where_no_model_is_deployed_none_can_be(start: Start, dialect: str) -> None:
    endpoint, _ = start(dialect)

    with pytest.raises(ValueError, match="デプロイ"):
        endpoint.deploy("x", BASE)
    with pytest.raises(ValueError, match="プロジェクト"):
        _ = endpoint.project_url
    for method, path in [("PUT", f"{DEPLOYMENTS}/x?api-version=1"), ("POST", "/v0/models")]:
        assert send(endpoint, method, path, {})[0] == 404
    assert send(endpoint, "GET", "/openai/v1/models")[0] == 404


# --- Azure ----------------------------------------------------------------------------------------


def test_azure_looks_at_a_file_before_a_job_may_have_it(azure: Any) -> None:
    _, client = azure
    file = upload(client, BOM + examples(12))
    with pytest.raises(openai.BadRequestError, match="not in a processed state") as caught:
        create(client, file, extra_body=STANDARD)
    looks = [client.files.retrieve(file).status for _ in range(3)]

    assert refusal(caught).keys() == {"error"}
    assert refusal(caught)["error"].keys() == {"code", "message"}
    assert looks == ["running", "processed", "processed"]
    assert create(client, file, extra_body=STANDARD).status == "pending"


def test_azures_files_of_an_upload_are_looked_at_too(azure: Any, tmp_path: Path) -> None:
    _, client = azure
    (tmp_path / "a.jsonl").write_bytes(BOM + examples(12))
    done = client.uploads.upload_file_chunked(
        file=tmp_path / "a.jsonl", mime_type="application/jsonl", purpose="fine-tune"
    )

    assert done.file.status == "pending"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (examples(12), "byte order mark"),
        (BOM + b"no JSON\n", "Line 1: not valid JSON"),
        (BOM + examples(1) + BOM + examples(1), "Line 2"),
    ],
)
def test_azure_finds_errors_of_a_file_by_itself(azure: Any, data: bytes, why: str) -> None:
    _, client = azure
    file = processed(client, data)
    shown = client.files.retrieve(file)

    assert shown.status == "error"
    assert why in shown.status_details
    with pytest.raises(openai.BadRequestError, match="not in a processed state"):
        create(client, file, extra_body=STANDARD)


def test_a_short_file_is_well_formed_for_azure_but_no_training_file(azure: Any) -> None:
    endpoint, client = azure
    file = processed(client, BOM + examples(9))
    job = finish(endpoint, client, create(client, file, extra_body=STANDARD))

    assert (job.status, job.error.code) == ("failed", "invalid_n_examples")


def test_azure_says_of_a_request_without_a_training_type_that_nothing_can_be_trained(
    azure: Any,
) -> None:
    _, client = azure
    file = processed(client)
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, file)

    message = "The specified base model does not support fine-tuning."
    assert refusal(caught) == {"error": {"code": "invalidPayload", "message": message}}


@pytest.mark.parametrize("kind", ["Standard", "GlobalStandard", "Developer"])
def test_azures_training_types_are_spelt_in_two_ways(azure: Any, kind: str) -> None:
    _, client = azure
    other = "developerTier" if kind == "Developer" else kind[0].lower() + kind[1:]
    for name in (kind, other):
        assert azure_job(client, extra_body={"trainingType": name}).status == "pending"


@pytest.mark.parametrize("kind", ["STANDARD", "developer", "", None, 1, ["Standard"]])
def test_azure_knows_no_other_training_types(azure: Any, kind: Any) -> None:
    _, client = azure
    with pytest.raises(openai.BadRequestError, match="trainingType"):
        azure_job(client, extra_body={"trainingType": kind})


@pytest.mark.parametrize("suffix", ["x" * 19, "v1.2"])
def test_azure_refuses_a_suffix_that_is_long_or_has_a_dot(azure: Any, suffix: str) -> None:
    _, client = azure
    with pytest.raises(openai.BadRequestError, match="suffix"):
        azure_job(client, suffix=suffix)


@pytest.mark.parametrize(
    ("asked", "epochs", "batch"),
    [
        ({"hyperparameters": {"n_epochs": 2}}, 2, "auto"),
        ({"method": hyperparameters(n_epochs=2)}, 2, "auto"),
        ({"method": {"type": "supervised"}, "hyperparameters": {"n_epochs": 2}}, 2, "auto"),
        ({"method": hyperparameters(n_epochs=2), "hyperparameters": {"n_epochs": 2}}, 2, "auto"),
        ({"method": hyperparameters(n_epochs=2), "hyperparameters": {"batch_size": 3}}, 2, 3),
    ],
)
def test_azure_takes_hyperparameters_in_both_places(
    azure: Any, asked: Any, epochs: Any, batch: Any
) -> None:
    _, client = azure
    job = azure_job(client, **asked)

    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (epochs, batch)
    assert job.method.supervised.hyperparameters.to_dict() == job.hyperparameters.to_dict()


def test_azure_refuses_hyperparameters_that_contradict_each_other(azure: Any) -> None:
    _, client = azure
    with pytest.raises(openai.BadRequestError, match="n_epochs"):
        azure_job(client, method=hyperparameters(n_epochs=2), hyperparameters={"n_epochs": 3})


def test_a_job_on_azure_ends_with_a_model_that_answers_once_it_is_deployed(azure: Any) -> None:
    endpoint, client = azure
    endpoint.hold("pending")
    started = azure_job(
        client,
        validation_file=processed(client, BOM + examples(2)),
        suffix="kokoro",
        method=hyperparameters(n_epochs=4, batch_size=4),
        metadata={"for": "試験"},
    )
    held = wait_until(endpoint, client, started, "pending")
    endpoint.release()
    job = finish(endpoint, client, started)
    tuned = job.fine_tuned_model
    points = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    rows = list(csv.reader(io.StringIO(client.files.content(job.result_files[0]).text)))
    full = [row[5] != "" for row in rows[1:]]

    assert (started.status, held.status, job.status) == ("pending", "pending", "succeeded")
    assert re.fullmatch(rf"{BASE}\.ft-[0-9a-f]{{32}}-kokoro", tuned)
    assert [point.fine_tuned_model_checkpoint for point in points] == [
        f"{tuned}:ckpt-step-{step}" for step in (12, 9, 6)
    ]
    assert all(point.id.startswith("ftchkpt-") for point in points)
    assert ",".join(rows[0]) == (
        "step,train_loss,train_mean_token_accuracy,valid_loss,valid_mean_token_accuracy,"
        "full_valid_loss,full_valid_mean_token_accuracy"
    )
    assert full == [False, False, True] * 4
    assert client.files.retrieve(job.result_files[0]).status == "processed"
    assert client.models.retrieve(tuned).id == tuned
    assert [found.id for found in client.fine_tuning.jobs.list(metadata={"for": "x"})] == []
    for name in (BASE, tuned, "mine"):
        with pytest.raises(openai.NotFoundError, match="API deployment") as caught:
            ask(client, name)
        assert refusal(caught)["error"]["code"] == "DeploymentNotFound"
    endpoint.deploy("base", BASE)
    endpoint.deploy("early", f"{tuned}:ckpt-step-6")
    status, shown = put_deployment(endpoint, "mine", tuned)
    assert (status, shown["name"]) == (201, "mine")
    assert shown["properties"]["provisioningState"] == "Succeeded"
    assert said(ask(client, "mine")) == said(ask(client, "early")) != said(ask(client, "base"))


def test_azures_learned_text_has_no_byte_order_mark(azure: Any) -> None:
    """Training on a file with a mark is that on the same file without, elsewhere."""
    endpoint, client = azure
    with Rehearsal() as other:
        plain = client.with_options(base_url=other.url)
        theirs = finish(other, plain, start_job(plain, examples(12)))
        ours = finish(endpoint, client, azure_job(client))

    assert ours.trained_tokens == theirs.trained_tokens


def test_azures_control_plane_refuses_what_it_cannot_deploy(azure: Any) -> None:
    endpoint, _ = azure
    status, shown = put_deployment(endpoint, "x", "gpt-nobody")

    assert (status, shown["error"]["code"]) == (400, "DeploymentModelNotSupported")
    other = {"model": {"format": "Mistral AI", "name": BASE, "version": "1"}}
    assert put_deployment(endpoint, "x", BASE, properties=other)[0] == 400
    assert put_deployment(endpoint, "x", BASE, sku=None)[0] == 400
    assert put_deployment(endpoint, "x", BASE, properties={"model": {"name": BASE}})[0] == 400
    assert send(endpoint, "PUT", f"{DEPLOYMENTS}/x", {})[0] == 400
    assert endpoint.deployments == {}
    with pytest.raises(ApiError, match="gpt-nobody"):
        endpoint.deploy("x", "gpt-nobody")


def test_azure_answers_under_three_paths_and_uploads_under_two(azure: Any) -> None:
    endpoint, client = azure
    other = endpoint.url.replace("/v1", "/openai/v1")
    facts: Any = {"filename": "a.jsonl", "purpose": "fine-tune", "bytes": 1, "mime_type": "x"}
    for url in (endpoint.url, other, endpoint.project_url):
        here = client.with_options(base_url=url)
        file = processed(here)
        assert here.files.retrieve(file).status == "processed"
        assert here.models.retrieve(BASE).id == BASE
        if url == endpoint.project_url:
            with pytest.raises(openai.NotFoundError):
                here.uploads.create(**facts)
        else:
            assert here.uploads.create(**facts).status == "pending"

    assert endpoint.project_url.endswith("/api/projects/rehearsal/openai/v1")
    assert {exchange.path for exchange in endpoint.exchanges} <= {
        *("/files", f"/models/{BASE}", "/uploads"),
        *(f"/files/{file}" for file in endpoint.files),
    }


# --- Nebius ---------------------------------------------------------------------------------------


def test_nebius_has_open_models_alone_under_two_spellings(nebius: Any) -> None:
    endpoint, client = nebius

    assert {model.id for model in client.models.list()} == {
        *(QWEN, "meta-llama/Llama-3.1-8B-Instruct")
    }
    for path in (QWEN, QWEN.replace("/", "%2F")):
        assert send(endpoint, "GET", f"/v1/models/{path}")[1]["id"] == QWEN
    status, shown = send(endpoint, "GET", "/v1/models/a/b")
    assert (status, shown) == (404, {"detail": "The model `a/b` does not exist."})


def test_an_engine_brings_its_own_models_to_any_dialect(sdk: openai.OpenAI) -> None:
    with Rehearsal(engine=CharacterEngine(), dialect="nebius") as endpoint:
        client = connected(sdk, endpoint)
        job = finish(endpoint, client, start_job(client, examples(12)))

    assert (job.model, job.status) == (BASE, "succeeded")


@pytest.mark.parametrize(
    ("asked", "kind", "place"),
    [
        ({"method": hyperparameters(n_epochs=2)}, "extra_forbidden", ["method"]),
        ({"extra_body": STANDARD}, "extra_forbidden", ["trainingType"]),
        (
            {"hyperparameters": {"learning_rate_multiplier": 1}},
            *("extra_forbidden", ["hyperparameters", "learning_rate_multiplier"]),
        ),
        *(
            ({"hyperparameters": {key: value}}, "value_error", ["hyperparameters", key])
            for key, value in [
                *(("n_epochs", "auto"), ("n_epochs", 21), ("n_epochs", 0), ("n_epochs", 1.5)),
                *(("batch_size", "auto"), ("batch_size", 33)),
                *(("learning_rate", 0), ("learning_rate", "auto"), ("lora", 1), ("lora_r", True)),
            ]
        ),
        ({"seed": "x"}, "value_error", ["seed"]),
        ({"training_file": None}, "missing", ["training_file"]),
    ],
)
def test_nebius_refuses_a_malformed_request_as_fastapi_does(
    nebius: Any, asked: Any, kind: str, place: list[str]
) -> None:
    _, client = nebius
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        nebius_job(client, **asked)

    (detail,) = refusal(caught)["detail"]
    assert (detail["type"], detail["loc"]) == (kind, ["body", *place])
    if kind == "extra_forbidden":
        assert detail["msg"] == "Extra inputs are not permitted"


def test_nebius_refuses_other_things_in_a_few_words(nebius: Any) -> None:
    _, client = nebius
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, upload(client, examples(12)), BASE)

    assert refusal(caught) == {"detail": f"Model {BASE} is not available for fine-tuning."}
    with pytest.raises(openai.NotFoundError) as missing:
        ask(client, "nobody")
    assert refusal(missing) == {"detail": "The model `nobody` does not exist."}


def test_nebius_forgets_metadata(nebius: Any) -> None:
    _, client = nebius
    job = nebius_job(client, metadata={"run": "a"})
    jobs = client.fine_tuning.jobs

    assert job.metadata is None
    assert [found.id for found in jobs.list(metadata={"run": "b"})] == [job.id]


def test_a_job_on_nebius_ends_with_weights_of_every_epoch(nebius: Any) -> None:
    endpoint, client = nebius
    started = nebius_job(
        client,
        validation_file=upload(client, examples(2)),
        hyperparameters={"n_epochs": 5, "batch_size": 4, "learning_rate": 2e-5, "lora": True},
    )
    job = finish(endpoint, client, started)
    points = [*client.fine_tuning.jobs.checkpoints.list(job.id)]
    events = [*client.fine_tuning.jobs.list_events(job.id)]
    shown = [client.files.retrieve(file) for file in points[0].result_files]

    assert (started.status, job.status) == ("validating_files", "succeeded")
    assert (job.fine_tuned_model, job.result_files) == (None, points[0].result_files)
    assert (started.method, job.method) == (None, None)
    assert job.hyperparameters.to_dict() == {
        **{"n_epochs": 5, "batch_size": 4, "learning_rate": 2e-5, "lora": True}
    }
    assert [point.step_number for point in points] == [15, 12, 9, 6, 3]
    assert {point.fine_tuned_model_checkpoint for point in points} == {None}
    assert all(point.metrics.full_valid_loss > 0 for point in points)
    assert {event.type for event in events} == {"message"}
    assert not any("loss" in event.message or event.data for event in events)
    assert [file.filename for file in shown] == [
        f"{job.id}/{points[0].id}/{name}"
        for name in ("adapter_config.json", "adapter_model.safetensors")
    ]
    assert {file.status for file in shown} == {None}
    for point in points:
        assert len(client.files.content(point.result_files[1]).content) > 1000
    assert len(client.files.content(shown[1].id).content) == shown[1].bytes


def test_the_same_job_has_the_same_weights_on_nebius(nebius: Any) -> None:
    endpoint, client = nebius
    weights = []
    for seed in (1, 1):
        job = finish(endpoint, client, nebius_job(client, seed=seed))
        weights.append([client.files.content(file).content for file in job.result_files])

    assert weights[0] == weights[1]


def test_nebius_trains_faster_with_a_higher_rate(nebius: Any) -> None:
    endpoint, client = nebius
    losses = []
    for rate in (1e-5, 2e-5):
        asked = {"n_epochs": 2, "learning_rate": rate}
        job = finish(endpoint, client, nebius_job(client, hyperparameters=asked))
        losses.append(client.fine_tuning.jobs.checkpoints.list(job.id).data[0].metrics.train_loss)

    assert losses[1] < losses[0]


def test_a_checkpoint_on_nebius_answers_once_it_is_deployed(nebius: Any) -> None:
    endpoint, client = nebius
    job = finish(endpoint, client, nebius_job(client))
    point = client.fine_tuning.jobs.checkpoints.list(job.id).data[0]
    source = f"{job.id}:{point.id}"
    body = {"source": source, "base_model": QWEN, "name": "kokoro"}
    with pytest.raises(openai.NotFoundError):
        ask(client, source)
    status, made = send(endpoint, "POST", "/v0/models", body)
    endpoint.deploy("mine", source)

    assert (status, made["status"]) == (200, "active")
    assert re.fullmatch(rf"{QWEN}-LoRa:kokoro-[a-zA-Z]{{4}}", made["name"])
    assert said(ask(client, made["name"])) == said(ask(client, "mine")) != said(ask(client, QWEN))
    assert client.models.retrieve(made["name"]).id == made["name"]


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({"source": "ftjob-x:ftckpt_x"}, 404),
        ({"source": QWEN}, 404),
        ({"base_model": "meta-llama/Llama-3.1-8B-Instruct"}, 400),
        ({"name": None}, 422),
    ],
)
def test_nebius_deploys_a_checkpoint_of_its_base_model_alone(
    nebius: Any, changed: Any, status: int
) -> None:
    endpoint, client = nebius
    job = finish(endpoint, client, nebius_job(client))
    point = client.fine_tuning.jobs.checkpoints.list(job.id).data[0]
    body = {"source": f"{job.id}:{point.id}", "base_model": QWEN, "name": "x", **changed}

    assert send(endpoint, "POST", "/v0/models", body)[0] == status
    assert endpoint.deployments == {}


# --- LiteLLM --------------------------------------------------------------------------------------


def test_litellm_drops_what_it_does_not_forward(start: Start) -> None:
    endpoint, client = start("litellm")
    method, metadata = hyperparameters(n_epochs=5), {"run": "a"}
    dropped = start_job(client, method=method, metadata=metadata, suffix="s")
    heard = start_job(client, hyperparameters={"n_epochs": 2}, method=method)
    jobs = client.fine_tuning.jobs

    assert (dropped.hyperparameters.n_epochs, heard.hyperparameters.n_epochs) == ("auto", 2)
    assert (dropped.metadata, dropped.user_provided_suffix) == (None, "s")
    assert [job.id for job in jobs.list(metadata={"run": "b"})] == [heard.id, dropped.id]
    done = finish(endpoint, client, heard)
    assert (done.status, done.hyperparameters.n_epochs) == ("succeeded", 2)
    assert said(ask(client, done.fine_tuned_model))


# --- What is kept ---------------------------------------------------------------------------------


def test_deployments_and_the_states_of_files_outlive_azures_endpoint(
    sdk: openai.OpenAI, tmp_path: Path
) -> None:
    engine = CharacterEngine("azure")
    with Rehearsal(dialect="azure", engine=engine, folder=tmp_path) as endpoint:
        client = connected(sdk, endpoint)
        job = finish(endpoint, client, azure_job(client))
        put_deployment(endpoint, "mine", job.fine_tuned_model)
        answer = said(ask(client, "mine"))
        begun, wrong = upload(client, BOM + examples(1)), processed(client, examples(1))
        client.files.retrieve(begun)
    with Rehearsal(dialect="azure", engine=engine, folder=tmp_path) as endpoint:
        client = connected(sdk, endpoint)

        assert said(ask(client, "mine")) == answer
        assert client.files.retrieve(begun).status == "processed"
        assert "byte order mark" in str(client.files.retrieve(wrong).status_details)
        client.models.delete(job.fine_tuned_model)
    with (
        Rehearsal(dialect="azure", engine=engine, folder=tmp_path) as endpoint,
        pytest.raises(openai.NotFoundError, match="API deployment"),
    ):
        ask(connected(sdk, endpoint), "mine")


def test_deployments_and_weights_outlive_nebius_endpoint(
    sdk: openai.OpenAI, tmp_path: Path
) -> None:
    engine = CharacterEngine("nebius")
    with Rehearsal(dialect="nebius", engine=engine, folder=tmp_path) as endpoint:
        client = connected(sdk, endpoint)
        job = finish(endpoint, client, nebius_job(client))
        point = client.fine_tuning.jobs.checkpoints.list(job.id).data[-1]
        endpoint.deploy("mine", f"{job.id}:{point.id}")
        answer = said(ask(client, "mine"))
        weights = client.files.content(point.result_files[1]).content
    with Rehearsal(dialect="nebius", engine=engine, folder=tmp_path) as endpoint:
        client = connected(sdk, endpoint)

        assert said(ask(client, "mine")) == answer
        assert client.files.content(point.result_files[1]).content == weights
        endpoint.deploy("again", f"{job.id}:{point.id}")
