"""Whole runs at services that speak the API in their own ways, as the rehearsal plays them."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shlex
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from edges import Forgetful, Forward, Gateway, Reply, Request, saying
from endpoint import Fault, Rehearsal
from faults import CHAT, JOBS, asked, made, until
from helpers import Ended, posts, read_json, records, training_file, write_jsonl
from services import LLAMA, MINI, SHORT, Service, service

from openai_sft import (
    DIALECTS,
    BrokenAnswer,
    BudgetError,
    ConfigurationError,
    CostEstimate,
    DataError,
    Declined,
    JobFailed,
    OpenAISFT,
    Price,
    RunSettings,
    ToBeDeployed,
    WaitTimeout,
    check_file,
    explain_api_error,
)
from openai_sft_rehearsal import CharacterEngine, Order, Progress

BOM = b"\xef\xbb\xbf"
PRICE = Price(10.0, 1.0, 2.0, 1.0, 2.0)

Log = Callable[[], list[str]]
Cli = Callable[..., Ended]


@pytest.fixture
def azure(sdk: openai.OpenAI, clean_environment: Path, dataset: Path) -> Iterator[Service]:
    with service("azure", sdk, clean_environment, dataset) as running:
        yield running


@pytest.fixture
def nebius(sdk: openai.OpenAI, clean_environment: Path, dataset: Path) -> Iterator[Service]:
    with service("nebius", sdk, clean_environment, dataset) as running:
        yield running


@pytest.fixture
def litellm(sdk: openai.OpenAI, clean_environment: Path, dataset: Path) -> Iterator[Service]:
    with service("litellm", sdk, clean_environment, dataset) as running:
        yield running


def trained(place: Service, **settings: Any) -> ToBeDeployed:
    """What a run ends with that can't be evaluated yet."""
    with pytest.raises(ToBeDeployed) as ended:
        place.make(**settings).run_full_pipeline(**place.options)
    return ended.value


def only_run(folder: Path) -> Path:
    """The record of the one run that made a job."""
    (path,) = (path for path in folder.glob("run_*.json") if "job_id" in read_json(path))
    return path


def record_of(place: Service) -> Any:
    return read_json(only_run(place.make().output_dir))


def job_request(endpoint: Rehearsal) -> Any:
    (exchange,) = asked(endpoint, "POST", JOBS)
    return exchange.request


# Who speaks how


@pytest.mark.parametrize(
    ("url", "label"),
    [
        ("https://api.openai.com/v1", "OpenAI"),
        ("https://us.api.openai.com/v1", "OpenAI"),
        ("https://res.openai.azure.com/openai/v1/", "Azure"),
        ("https://RES.OpenAI.Azure.com/openai/v1/", "Azure"),
        ("https://res.services.ai.azure.com/api/projects/p/openai/v1/", "Azure"),
        ("https://res.cognitiveservices.azure.com/openai/v1/", "Azure"),
        ("https://api.tokenfactory.nebius.com/v1/", "Nebius"),
        ("https://api.studio.nebius.com/v1/", "Nebius"),
        ("https://openai.azure.com.example.com/v1", "OpenAI互換のエンドポイント"),
        ("http://127.0.0.1:4000", "OpenAI互換のエンドポイント"),
    ],
)
def test_the_host_tells_the_dialect(tmp_path: Path, url: str, label: str) -> None:
    own = OpenAISFT("k", base_url=url, output_dir=tmp_path)
    given = OpenAISFT("k", base_url=url, output_dir=tmp_path, dialect="litellm")
    with openai.OpenAI(api_key="k", base_url=url) as client:
        ready = OpenAISFT(client=client, output_dir=tmp_path)

    assert own.settings.speaks.label == label
    assert ready.settings.speaks.label == label
    assert given.settings.speaks is DIALECTS["litellm"]


def test_a_dialect_that_there_is_not_is_refused_by_the_names_that_there_are() -> None:
    with pytest.raises(
        ConfigurationError, match="openai、azure、nebius、litellm、gateway のどれか"
    ):
        OpenAISFT("k", dialect="klingon")  # type: ignore[arg-type]


def test_a_model_on_this_machine_has_no_dialect() -> None:
    with pytest.raises(ConfigurationError, match="dialect"):
        OpenAISFT(local="tiny", dialect="azure")


def test_who_began_a_run_tells_its_dialect_better_than_the_host_of_a_client(
    litellm: Service, sdk: openai.OpenAI, tmp_path: Path
) -> None:
    begun = RunSettings(base_url=litellm.endpoint.url, dialect="litellm")
    client = sdk.with_options(base_url=litellm.endpoint.url)
    later = OpenAISFT(client=client, output_dir=tmp_path)
    given = OpenAISFT(client=client, output_dir=tmp_path, dialect="azure")

    assert later.settings.speaks is DIALECTS["gateway"]
    assert later.settings.working_as(begun).speaks is DIALECTS["litellm"]
    assert given.settings.working_as(begun).speaks is DIALECTS["azure"]


def test_an_instance_that_has_looked_at_the_endpoint_takes_a_run_up_in_the_runs_own_dialect(
    azure: Service,
) -> None:
    azure.endpoint.inject(Fault("403", "POST", "/files"))
    with pytest.raises(openai.PermissionDeniedError):
        azure.make().run_full_pipeline(**azure.options)
    (path,) = azure.make().output_dir.glob("run_*.json")
    sft = azure.make(dialect=None)
    sft.check()
    with pytest.raises(ToBeDeployed):
        sft.resume(path.stem)

    assert {azure.endpoint.diary.data(name)[:3] for name in names(azure)} == {BOM}


# Azure


def test_azure_gets_a_mark_before_each_file_and_waits_until_it_is_taken_in(azure: Service) -> None:
    trained(azure)
    record = record_of(azure)
    sent = [
        json.loads(azure.endpoint.diary.data(name)[3:].splitlines()[0]) for name in names(azure)
    ]
    heads = {azure.endpoint.diary.data(name)[:3] for name in names(azure)}

    assert heads == {BOM}
    assert all(set(line) == {"messages"} for line in sent)
    for part, kind in (("training", "train"), ("validation", "valid")):
        path = Path(record["files"][kind])
        assert not path.read_bytes().startswith(BOM)
        assert check_file(path, kind="validation").errors == []
        assert record["uploads"][part]["bytes"] == path.stat().st_size + 3
        assert record["uploads"][part]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def names(place: Service) -> list[str]:
    """The files that were sent."""
    sent = asked(place.endpoint, "POST", "/files")
    return [e.response["id"] for e in sent if e.status == 200]


@pytest.mark.parametrize("kind", ["Standard", "GlobalStandard", "developerTier"])
def test_azure_is_told_the_training_type_as_it_was_given(azure: Service, kind: str) -> None:
    azure.make().prepare_data()
    with pytest.raises(ToBeDeployed):
        azure.make().run_full_pipeline(
            **{**azure.options, "training_type": kind, "suffix": "kokoro"}
        )
    body = job_request(azure.endpoint)
    wanted = {"n_epochs": 2, "batch_size": 4}

    assert body["trainingType"] == kind
    assert body["hyperparameters"] == wanted
    assert body["method"] == {"type": "supervised", "supervised": {"hyperparameters": wanted}}
    assert body["suffix"] == "kokoro"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"training_type": None}, "--training-type"),
        ({"suffix": "a.b"}, "18文字"),
        ({"suffix": "a" * 19}, "18文字"),
        ({"learning_rate": 1e-5}, "--learning-rate-multiplier"),
        ({"baseline": True}, "--baseline NAME"),
    ],
)
def test_what_azure_would_refuse_is_refused_before_anything_is_sent(
    azure: Service, wrong: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        azure.make().run_full_pipeline(**{**azure.options, **wrong})

    assert azure.endpoint.exchanges == []


def test_a_suffix_of_eighteen_characters_is_taken(azure: Service) -> None:
    with pytest.raises(ToBeDeployed) as ended:
        azure.make().run_full_pipeline(**{**azure.options, "suffix": "a" * 18})

    assert ended.value.model.endswith("a" * 18)


def test_a_large_file_goes_in_parts_where_azure_takes_parts_and_not_to_a_project(
    azure: Service,
) -> None:
    small: dict[str, Any] = {"max_single_upload_bytes": 1000, "client": None}
    with pytest.raises(ConfigurationError, match="/openai/v1/"):
        azure.make(base_url=azure.endpoint.project_url, **small).run_full_pipeline(**azure.options)
    assert posts(azure.endpoint) == []
    with pytest.raises(ToBeDeployed):
        azure.make(**small, output_dir=azure.make().output_dir / "2").run_full_pipeline(
            **azure.options
        )

    assert made(azure.endpoint, "/uploads") == 2
    assert made(azure.endpoint, JOBS) == 1


def test_a_file_that_azure_cannot_use_is_told_in_its_own_words(
    azure: Service, clean_environment: Path
) -> None:
    def serve(request: Request, forward: Forward) -> Reply:
        reply = forward(request)
        if request.method == "GET" and request.path.startswith("/files/"):
            return saying(reply.json | {"status": "error", "status_details": "行12が長すぎます😢"})
        return reply

    with Gateway(azure.endpoint, serve) as gateway:
        sft = azure.make(client=None, base_url=gateway.url)
        with pytest.raises(DataError, match="行12が長すぎます😢"):
            sft.upload_training_file(training_file(clean_environment))


def test_a_file_that_is_never_taken_in_ends_the_wait(
    azure: Service, clean_environment: Path
) -> None:
    def serve(request: Request, forward: Forward) -> Reply:
        reply = forward(request)
        is_look = request.method == "GET" and request.path.startswith("/files/")
        return saying(reply.json | {"status": "pending"}) if is_look else reply

    azure.clock.moment = 0.0
    with Gateway(azure.endpoint, serve) as gateway:
        sft = azure.make(client=None, base_url=gateway.url)
        with pytest.raises(BrokenAnswer, match="30分"):
            sft.upload_training_file(training_file(clean_environment))

    assert 1800 <= sum(azure.clock.slept) < 1900


def test_a_run_at_azure_ends_at_once_with_how_to_deploy_its_model(azure: Service) -> None:
    ended = trained(azure)
    slept = sum(azure.clock.slept)
    record = record_of(azure)
    (command,) = (line for line in ended.commands if "az cognitiveservices" in line)
    words = shlex.split(command)
    given = dict(zip(words[5::2], words[6::2], strict=True))

    assert ended.model == record["fine_tuned_model"]
    assert words[:5] == ["az", "cognitiveservices", "account", "deployment", "create"]
    assert given == {
        "--name": "RESOURCE",
        "--resource-group": "RESOURCE_GROUP",
        "--deployment-name": record["run_id"].replace("_", "-"),
        "--model-name": ended.model,
        "--model-version": "1",
        "--model-format": "OpenAI",
        "--sku-name": "Standard",
        "--sku-capacity": "50",
    }
    assert f"--deployment {given['--deployment-name']}" in ended.commands[-1]
    assert slept < 60
    assert "finished_at" not in record


@pytest.mark.parametrize(
    ("url", "base", "resource", "form"),
    [
        ("https://res.openai.azure.com/openai/v1/", "gpt-4.1-mini", "res", "OpenAI"),
        ("https://r2.services.ai.azure.com/api/projects/p/openai/v1", "o4-mini", "r2", "OpenAI"),
        ("https://res.openai.azure.com/openai/v1/", "gpt-oss-20b", "res", "OpenAI-OSS"),
        ("https://res.openai.azure.com/openai/v1/", "Ministral-3B", "res", "OpenAI-OSS"),
    ],
)
def test_the_line_that_deploys_names_the_resource_and_the_form_of_the_model(
    url: str, base: str, resource: str, form: str
) -> None:
    deploying = DIALECTS["azure"].deploying
    assert deploying is not None
    words = shlex.split(deploying(f"{base}.ft-1", base, "n", url).command)

    assert words[words.index("--name") + 1] == resource
    assert words[words.index("--model-format") + 1] == form


def test_a_deployed_model_is_evaluated_on_the_split_of_its_own_run(azure: Service) -> None:
    ended = trained(azure)
    azure.endpoint.deploy("相談-1", ended.model)
    results = azure.make().resume(deployment="相談-1")
    record = record_of(azure)
    again = azure.make(dataset=None).run_evaluation("相談-1", max_test_cases=1)

    assert results is not None
    assert results["model_id"] == again["model_id"] == "相談-1"
    assert results["deployment_of"] == ended.model
    assert results["training"]["base_model"] == MINI
    assert results["data"]["test"] == again["data"]["test"]
    assert record["deployments"] == {ended.model: "相談-1"}
    assert record["finished_at"]
    assert azure.make().resume() is None
    assert {e.request["model"] for e in asked(azure.endpoint, "POST", CHAT)} == {
        ended.model,
        "相談-1",
    }


def test_an_evaluation_alone_takes_the_deployment_too(azure: Service) -> None:
    ended = trained(azure)
    with pytest.raises(ToBeDeployed) as told:
        azure.make().run_evaluation(max_test_cases=1)
    azure.endpoint.deploy("d", ended.model)
    results = azure.make().run_evaluation(deployment="d", max_test_cases=1)
    later = azure.make().run_evaluation(max_test_cases=1)

    assert "--evaluate-only" in told.value.commands[-1]
    assert results["model_id"] == later["model_id"] == "d"


def test_the_best_checkpoint_is_the_one_to_deploy_where_it_is_asked_for(
    azure: Service, example_file: Path
) -> None:
    with pytest.raises(ToBeDeployed) as ended:
        azure.make(dataset=str(example_file)).run_full_pipeline(
            **{**azure.options, "checkpoint": "best"}
        )
    record = record_of(azure)
    best = min(record["checkpoints"], key=lambda c: c["full_valid_loss"])

    assert best["step"] == 5
    assert ended.value.model == best["model"]
    assert all(c["id"].startswith("ftchkpt-") for c in record["checkpoints"])
    azure.endpoint.deploy("best", best["model"])
    results = azure.make().resume(deployment="best")
    assert results is not None
    assert results["checkpoint"]["id"] == best["id"]
    assert record_of(azure)["deployments"] == {best["model"]: "best"}


def test_a_checkpoint_is_named_by_the_id_that_azure_gives_it(azure: Service) -> None:
    trained(azure)
    first = min(record_of(azure)["checkpoints"], key=lambda c: c["step"])
    azure.endpoint.deploy("first", first["model"])
    with pytest.raises(ToBeDeployed) as told:
        azure.make().run_evaluation(checkpoint=first["id"], max_test_cases=1)

    assert told.value.model == first["model"]


def test_a_deployment_that_is_not_there_is_named_within_minutes(azure: Service) -> None:
    trained(azure)
    before = sum(azure.clock.slept)
    with pytest.raises(ConfigurationError, match="typo"):
        azure.make().resume(deployment="typo")

    assert sum(azure.clock.slept) - before < 200
    assert record_of(azure)["evaluation"]


def test_a_deployment_that_is_still_loading_is_waited_for(azure: Service) -> None:
    ended = trained(azure)
    azure.endpoint.deploy("d", ended.model)
    azure.endpoint.inject(Fault("404", "POST", CHAT, times=3))

    assert azure.make().resume(deployment="d") is not None


def test_a_deployment_that_is_not_there_is_waited_for_as_long_as_is_said(
    azure: Service, log: Log
) -> None:
    trained(azure)
    with pytest.raises(ConfigurationError, match="typo"):
        azure.make().resume(deployment="typo")
    (told,) = (line for line in log() if "やり直します" in line)

    assert told.startswith("最大2分")


def test_a_judge_that_is_not_deployed_is_named(azure: Service) -> None:
    ended = trained(azure)
    azure.endpoint.deploy("d", ended.model)
    with pytest.raises(ConfigurationError, match=r"nobody は .*--judge"):
        azure.make().run_evaluation(
            deployment="d", max_test_cases=1, judge="nobody", judge_against="reference"
        )


def test_a_name_for_a_run_that_has_ended_is_not_passed_over(
    azure: Service, clean_environment: Path
) -> None:
    azure.endpoint.deploy("d", trained(azure).model)
    azure.make().resume(deployment="d")
    run = only_run(azure.make().output_dir).stem

    assert azure.make().resume(run, deployment="d") is None
    for name in (run, None):
        with pytest.raises(ConfigurationError, match="--evaluate-only"):
            azure.make().resume(name, deployment="e")
        with pytest.raises(ConfigurationError, match="--job-id"):
            azure.make().resume(name, download_weights=clean_environment / "w")


def test_a_new_name_for_an_evaluation_that_was_cut_is_told_how_to_go_on(azure: Service) -> None:
    ended = trained(azure)
    azure.endpoint.deploy("d", ended.model)
    azure.endpoint.deploy("mini", MINI)
    azure.endpoint.inject(Fault("401", "POST", CHAT, skip=3))
    with azure.make() as sft, pytest.raises(openai.AuthenticationError):
        sft.run_evaluation(deployment="d", max_test_cases=2, concurrency=1, baseline="mini")
    azure.endpoint.deploy("e", ended.model)
    with pytest.raises(ConfigurationError, match="--evaluate-only"):
        azure.make().resume(deployment="e")
    before = len(asked(azure.endpoint, "POST", CHAT))
    azure.make().run_evaluation(deployment="e", max_test_cases=2, concurrency=1, baseline="mini")

    assert len(asked(azure.endpoint, "POST", CHAT)) - before == 5


def test_an_evaluation_that_was_called_by_itself_goes_on_under_the_name_too(
    azure: Service,
) -> None:
    sft = azure.make()
    train, test, valid = sft.load_and_split_dataset()
    held_out = sft.prepare_dataset(test), sft.prepare_dataset(valid)
    files = sft.save_all_datasets(sft.prepare_dataset(train), *held_out)
    uploaded = sft.upload_training_file(files["train"])
    job_id = sft.create_fine_tune_job(uploaded, 2, 4, training_type="Standard")
    model = sft.monitor_fine_tune_job(job_id).fine_tuned_model
    assert model is not None
    with pytest.raises(ToBeDeployed):
        sft.evaluate_model_comprehensive(model, *held_out)
    azure.endpoint.deploy("d", model)
    results = sft.resume(deployment="d")

    assert results is not None
    assert (results["model_id"], results["deployment_of"]) == ("d", model)


def test_checkpoints_of_a_model_are_deployed_under_different_names(azure: Service) -> None:
    def name(ended: ToBeDeployed) -> str:
        (command,) = (line for line in ended.commands if "az cognitiveservices" in line)
        words = shlex.split(command)
        return words[words.index("--deployment-name") + 1]

    last = trained(azure)
    first = min(record_of(azure)["checkpoints"], key=lambda c: c["step"])
    with pytest.raises(ToBeDeployed) as other:
        azure.make().run_evaluation(checkpoint=first["id"], max_test_cases=1)

    assert name(other.value) == f"{name(last)}-{first['step']}"
    assert other.value.commands[-1].endswith(name(other.value))


def test_which_checkpoint_is_best_is_told_once_by_each_command(
    nebius: Service, azure: Service, example_file: Path, clean_environment: Path, log: Log
) -> None:
    def told(act: Callable[[], object]) -> int:
        before = len(log())
        act()
        return sum("検証の損失が最も低いのは、" in line for line in log()[before:])

    def with_weights() -> None:
        with pytest.raises(ToBeDeployed):
            nebius.make(**there).run_full_pipeline(
                **nebius.options, download_weights=clean_environment / "w"
            )

    there = {"dataset": str(example_file), "output_dir": clean_environment / "n"}
    azure.endpoint.deploy("d", trained(azure, dataset=str(example_file)).model)

    assert told(with_weights) == 1
    with azure.make(dataset=str(example_file)) as sft:
        assert told(lambda: sft.resume(deployment="d")) == 1
        assert told(lambda: sft.run_evaluation(deployment="d")) == 1


def test_a_name_is_that_of_the_model_that_was_last_deployed_under_it(azure: Service) -> None:
    first = trained(azure).model
    azure.endpoint.deploy("d", first)
    with azure.make() as sft:
        assert sft.resume(deployment="d") is not None
        second = trained(azure).model
        azure.endpoint.deploy("d", second)
        assert sft.run_evaluation(second, deployment="d", max_test_cases=1)["model_id"] == "d"
    with pytest.raises(ToBeDeployed) as ended:
        azure.make().run_evaluation(first, max_test_cases=2)
    azure.endpoint.deploy("d", first)
    again = azure.make().run_evaluation(first, deployment="d", max_test_cases=1)
    later = azure.make().run_evaluation("d", max_test_cases=1)

    assert ended.value.model == first
    assert again["deployment_of"] == later["deployment_of"] == first
    assert later["training"]["run_id"] == again["training"]["run_id"]


def test_a_name_that_is_deployed_at_another_endpoint_stays_there(azure: Service) -> None:
    first = trained(azure).model
    azure.endpoint.deploy("d", first)
    azure.make().resume(deployment="d")
    path = only_run(azure.make().output_dir)
    run = read_json(path)
    run["settings"]["base_url"] = "https://other.openai.azure.com/openai/v1/"
    path.write_text(json.dumps(run, ensure_ascii=False), "utf-8")
    with pytest.raises(ToBeDeployed) as second:
        azure.make().run_full_pipeline(**azure.options)
    azure.endpoint.deploy("d", second.value.model)
    azure.make().resume(deployment="d")

    assert read_json(path)["deployments"] == {first: "d"}


def test_the_name_of_the_base_model_is_none_of_a_deployment(azure: Service) -> None:
    trained(azure)
    with pytest.raises(ConfigurationError, match="元のモデルの名前"):
        azure.make().resume(deployment=MINI)

    assert "deployments" not in record_of(azure)


def test_two_checkpoints_of_a_run_do_not_share_the_name_of_a_deployment(azure: Service) -> None:
    last = trained(azure).model
    early = min(record_of(azure)["checkpoints"], key=lambda c: c["step"])
    azure.endpoint.deploy("d", last)
    azure.make().run_evaluation(deployment="d", max_test_cases=1)
    azure.endpoint.deploy("d", early["model"])
    results = azure.make().run_evaluation(checkpoint=early["id"], deployment="d", max_test_cases=1)

    assert results["deployment_of"] == early["model"]
    assert record_of(azure)["deployments"] == {early["model"]: "d"}


def test_who_deploys_under_the_name_that_was_proposed_needs_not_tell_it(
    azure: Service, log: Log
) -> None:
    ended = trained(azure)
    record = record_of(azure)
    name = record["run_id"].replace("_", "-")
    (waiting,) = azure.make().list_runs()
    azure.endpoint.deploy(name, ended.model)
    results = azure.make().run_evaluation(name, max_test_cases=1)
    (row,) = (row for row in azure.make().list_runs() if row.run_id == record["run_id"])

    assert waiting.to_be_deployed
    assert waiting.note == "配置待ち"
    assert not row.to_be_deployed
    assert results["deployment_of"] == ended.model
    assert record_of(azure)["deployments"] == {ended.model: name}
    assert not any("学習記録がない" in line for line in log())


def test_a_deployment_before_the_end_of_training_is_refused(azure: Service) -> None:
    azure.endpoint.hold("running")
    with azure.make() as sft, pytest.raises(WaitTimeout):
        sft.run_full_pipeline(**azure.options, timeout=5)
    with pytest.raises(ConfigurationError, match="まだ終わっていません"):
        azure.make().resume(deployment="d")
    azure.endpoint.release()


def test_answers_are_known_by_what_was_deployed_and_not_by_its_name(
    azure: Service, log: Log
) -> None:
    def answered() -> int:
        return sum(e.status == 200 for e in asked(azure.endpoint, "POST", CHAT))

    def resume(name: str) -> None:
        with azure.make() as sft:
            assert sft.resume(deployment=name) is not None

    first = trained(azure).model
    azure.endpoint.deploy("d", first)
    resume("d")
    count = answered()
    azure.endpoint.deploy("e", first)
    azure.make().run_evaluation(first, deployment="e", max_test_cases=1)
    assert answered() == count
    second = trained(azure).model
    azure.endpoint.deploy("e", second)
    assert not any("前に" in line for line in log())
    resume("e")

    assert any(f"e は、前に {first} の名前でした" in line for line in log())
    assert first != second
    assert answered() == 2 * count


def test_the_command_line_says_how_to_deploy_and_ends_well(
    azure: Service, cli: Cli, place: Callable[[str], tuple[str, ...]]
) -> None:
    flags = tuple(f for f in place(azure.endpoint.url) if f != "openai")
    flags = (*flags[:2], "--dialect", "azure", *flags[3:], "--yes")
    ended = cli(*flags, "--training-type", "Standard", "--max-test-cases", "1")
    command = re.findall(r"openai-sft (.*--deployment \S+)", ended.err)[-1]
    name = re.findall(r"--deployment-name (\S+)", ended.err)[-1]
    model = re.findall(r"--model-name (\S+)", ended.err)[-1]
    early = cli("--evaluate-only", *flags[:4], "--output-dir", "out", "--yes")
    azure.endpoint.deploy(name, model)
    later = cli(*shlex.split(command), "--yes")

    assert ended.code == 0
    assert ended.errors == []
    assert early.code == 2
    assert later.code == 0
    assert f"モデル: {name}" in later.out


def test_a_deployment_goes_with_the_commands_that_ask(cli: Cli) -> None:
    assert "--resume か --evaluate-only" in cli("--deployment", "d").err
    assert cli("--list", "--download-weights", "d").code == 2


# Nebius


def test_nebius_is_asked_for_hyperparameters_at_the_top_with_the_rate_itself(
    nebius: Service,
) -> None:
    trained(nebius)
    body = job_request(nebius.endpoint)

    assert body["hyperparameters"] == {
        "n_epochs": 2,
        "batch_size": 4,
        "learning_rate": 2e-5,
        "lora": True,
    }
    assert not {"method", "trainingType"} & body.keys()


def test_what_nebius_may_choose_itself_is_left_out(nebius: Service) -> None:
    with pytest.raises(ToBeDeployed):
        nebius.make().run_full_pipeline("auto", "auto", max_test_cases=1)

    assert job_request(nebius.endpoint)["hyperparameters"] == {"lora": True}


def test_a_multiplier_is_no_rate_for_nebius(nebius: Service) -> None:
    with pytest.raises(ConfigurationError, match="--learning-rate "):
        nebius.make().run_full_pipeline(1, 4, learning_rate_multiplier=2.0)

    assert nebius.endpoint.exchanges == []


def test_the_curve_of_nebius_comes_from_the_checkpoints_and_no_weights_are_read_for_it(
    nebius: Service,
) -> None:
    trained(nebius)
    record = record_of(nebius)
    table = Path(record["files"]["training_metrics"]).read_text("utf-8")
    rows = list(csv.DictReader(table.splitlines()))
    losses = [checkpoint["full_valid_loss"] for checkpoint in record["checkpoints"]]

    assert [float(row["full_valid_loss"]) for row in rows] == losses[::-1]
    assert [e for e in nebius.endpoint.exchanges if e.path.endswith("/content")] == []


def test_a_job_without_a_model_name_lists_its_checkpoints_and_says_how_to_deploy_one(
    nebius: Service, log: Log
) -> None:
    ended = trained(nebius)
    record = record_of(nebius)
    (command,) = (line for line in ended.commands if "/v0/models" in line)
    words = shlex.split(command)
    body = json.loads(words[-1])

    assert ended.model == body["source"] == record["checkpoints"][0]["model"]
    assert body["base_model"] == LLAMA
    assert words[3] == nebius.endpoint.url.replace("/v1", "/v0/models")
    assert asked(nebius.endpoint, "POST", CHAT) == []
    assert sum("チェックポイント: " in line for line in log()) == 2
    assert any("--download-weights DIR" in line for line in ended.commands)


def test_a_trained_model_whose_checkpoints_were_not_told_is_asked_for_again(
    nebius: Service,
) -> None:
    nebius.endpoint.inject(Fault("404", "GET", "/fine_tuning/jobs/*/checkpoints"))
    with pytest.raises(BrokenAnswer, match="モデル名を返しませんでした"):
        nebius.make().run_full_pipeline(**nebius.options)
    with pytest.raises(ToBeDeployed) as ended:
        nebius.make().resume()

    assert ended.value.model == record_of(nebius)["checkpoints"][0]["model"]
    assert len(nebius.endpoint.jobs) == 1


def test_weights_are_deployed_by_their_checkpoint_even_where_it_has_a_name(nebius: Service) -> None:
    def serve(request: Request, forward: Forward) -> Reply:
        reply = forward(request)
        if not request.path.endswith("/checkpoints"):
            return reply
        told = [
            {**one, "fine_tuned_model_checkpoint": f"llama-{one['step_number']}"}
            for one in reply.json["data"]
        ]
        return saying({**reply.json, "data": told})

    with Gateway(nebius.endpoint, serve) as gateway:
        ended = trained(nebius, client=None, base_url=gateway.url)
    last = record_of(nebius)["checkpoints"][0]
    (command,) = (line for line in ended.commands if "/v0/models" in line)

    assert ended.model == last["model"] == f"llama-{last['step']}"
    source = json.loads(shlex.split(command)[-1])["source"]
    assert source == f"{record_of(nebius)['job_id']}:{last['id']}"


def test_what_was_deployed_at_nebius_is_evaluated_under_the_name_it_got(
    nebius: Service, sdk: openai.OpenAI
) -> None:
    ended = trained(nebius)
    (command,) = (line for line in ended.commands if "/v0/models" in line)
    client = sdk.with_options(base_url=nebius.endpoint.url.replace("/v1", "/v0"))
    told: Any = client.post("/models", body=json.loads(shlex.split(command)[-1]), cast_to=object)
    results = nebius.make().resume(deployment=told["name"])
    again = nebius.make().run_evaluation(told["name"], max_test_cases=1, baseline=True)

    assert results is not None
    assert results["model_id"] == told["name"]
    assert results["deployment_of"] == ended.model
    assert again["baseline"]["model_id"] == LLAMA
    assert again["data"]["test"] == results["data"]["test"]


def weights_at(place: Service) -> dict[str, bytes]:
    """The weights of the last checkpoint as the service has them."""
    last = max(record_of(place)["checkpoints"], key=lambda c: c["step"])
    shown = {name: place.endpoint.files[name]["filename"] for name in last["files"]}
    return {Path(n).name: place.endpoint.diary.data(name) for name, n in shown.items()}


def test_weights_are_downloaded_after_the_training_and_their_hashes_recorded(
    nebius: Service, clean_environment: Path
) -> None:
    target = clean_environment / "重み"
    with pytest.raises(ToBeDeployed):
        nebius.make().run_full_pipeline(**nebius.options, download_weights=target)
    wanted = weights_at(nebius)
    record = record_of(nebius)

    assert {path.name: path.read_bytes() for path in target.iterdir()} == wanted
    assert {w["name"]: w["sha256"] for w in record["weights"]} == {
        name: hashlib.sha256(data).hexdigest() for name, data in wanted.items()
    }


@pytest.mark.parametrize("ranged", [True, False])
def test_a_download_that_was_cut_goes_on_and_what_is_there_is_not_fetched_again(
    nebius: Service, clean_environment: Path, ranged: bool
) -> None:
    trained(nebius)
    target = clean_environment / "w"
    cuts = iter([5, 1000])

    def serve(request: Request, forward: Forward) -> Reply:
        reply = forward(request)
        if not request.path.endswith("/content"):
            return reply
        start = re.fullmatch(r"bytes=(\d+)-", request.headers.get("range", ""))
        at = int(start[1]) if start and ranged else 0
        status = 206 if at else 200
        cut = next(cuts, None) if len(reply.body) > 5000 else None
        body = reply.body[at:]
        if cut is not None and cut < len(body):
            return Reply(
                status, headers={"Content-Length": str(len(body))}, pieces=iter([body[:cut]])
            )
        return Reply(status, body)

    with Gateway(nebius.endpoint, serve) as gateway:
        run = record_of(nebius)
        place = {"client": None, "base_url": gateway.url}
        sft = nebius.make(**place)
        # The same service, under another address.
        path = only_run(sft.output_dir)
        run["settings"]["base_url"] = gateway.url
        path.write_text(json.dumps(run, ensure_ascii=False), "utf-8")
        for _ in range(2):
            with pytest.raises(ToBeDeployed):
                nebius.make(**place).resume(download_weights=target)
        fetched = [r for r in gateway.asked if r.path.endswith("/content")]

    assert {path.name: path.read_bytes() for path in target.iterdir()} == weights_at(nebius)
    assert len(fetched) == 4  # two files, one of them cut twice; the second time none
    assert sum("range" in request.headers for request in fetched) == 2
    assert {request.headers["accept-encoding"] for request in fetched} == {"identity"}


def test_no_file_that_is_there_is_overwritten_and_none_lands_outside_of_the_folder(
    nebius: Service, clean_environment: Path
) -> None:
    trained(nebius)
    for shown in nebius.endpoint.files.values():
        if "adapter_config" in shown["filename"]:
            shown["filename"] = "../../../adapter_config.json"
    target = clean_environment / "a" / "b" / "w"
    target.mkdir(parents=True)
    (target / "adapter_model.safetensors").write_text("私のもの", "utf-8")
    with pytest.raises(ConfigurationError, match="別のファイル"):
        nebius.make().resume(download_weights=target)

    assert (target / "adapter_model.safetensors").read_text("utf-8") == "私のもの"
    assert (target / "adapter_config.json").is_file()
    assert not (clean_environment / "adapter_config.json").exists()


def renamed(place: Service, **facts: Any) -> str:
    """The id of the first file of weights, which the service shows with other ``facts``."""
    last = max(record_of(place)["checkpoints"], key=lambda c: c["step"])
    first = str(last["files"][0])
    place.endpoint.files[first] |= facts
    return first


@pytest.mark.parametrize("told", ["..", "w/..", ".", "", None, "a/", "C:\\w\\..", "\0", "\n"])
def test_a_name_that_is_none_of_a_file_gives_way_to_the_id(
    nebius: Service, clean_environment: Path, told: str | None
) -> None:
    trained(nebius)
    first = renamed(nebius, filename=told)
    target = clean_environment / "w"
    with pytest.raises(ToBeDeployed):
        nebius.make().resume(download_weights=target)
    found = {path.name for path in target.iterdir()}

    assert len(found) == 2
    assert "adapter_model.safetensors" in found
    assert found & {first, "_"}


def test_an_id_of_a_file_leads_out_of_no_folder(nebius: Service, clean_environment: Path) -> None:
    trained(nebius)
    path = only_run(nebius.make().output_dir)
    target = clean_environment / "a" / "w"
    run = read_json(path)
    last = max(run["checkpoints"], key=lambda c: c["step"])
    last["files"] = ["/../../file"]

    def serve(request: Request, forward: Forward) -> Reply:
        if not request.path.startswith("/files/"):
            return forward(request)
        is_content = request.path.endswith("/content")
        return Reply(200, b"w") if is_content else saying({"id": "x", "bytes": 2})  # always cut

    with Gateway(nebius.endpoint, serve) as gateway:
        run["settings"]["base_url"] = gateway.url
        path.write_text(json.dumps(run, ensure_ascii=False), "utf-8")
        with pytest.raises(BrokenAnswer, match="2バイトのはず"):
            nebius.make(client=None, base_url=gateway.url).resume(download_weights=target)

    assert [part.parent for part in clean_environment.rglob("*.part")] == [target]


@pytest.mark.parametrize("size", ["too long", "untold", "nothing"])
def test_what_is_left_of_a_download_counts_only_as_the_beginning_of_the_file(
    nebius: Service, clean_environment: Path, size: str
) -> None:
    trained(nebius)
    target = clean_environment / "w"
    target.mkdir()
    first = renamed(nebius)
    if size == "untold":
        renamed(nebius, bytes=None)
    if size == "nothing":
        renamed(nebius, bytes=0)
        nebius.endpoint.diary.keep(first, b"")
    else:
        (target / f".{first}.part").write_bytes(b"x" * 10**6)
    with pytest.raises(ToBeDeployed):
        nebius.make().resume(download_weights=target)

    assert {path.name: path.read_bytes() for path in target.iterdir()} == weights_at(nebius)


def test_a_job_that_failed_is_given_back_and_not_searched_for_weights(
    nebius: Service, clean_environment: Path
) -> None:
    nebius.endpoint.inject(Fault("job_failed", "POST", JOBS))
    with pytest.raises(JobFailed):
        nebius.make().run_full_pipeline(**nebius.options)
    (job_id,) = nebius.endpoint.jobs
    out = clean_environment / "elsewhere"
    job = nebius.make(output_dir=out).attach(job_id, download_weights=clean_environment / "w")

    assert getattr(job, "status", None) == "failed"
    assert not (clean_environment / "w").exists()


def test_weights_that_are_asked_where_they_are_not_are_named_like_any_other_model(
    nebius: Service, clean_environment: Path
) -> None:
    target = clean_environment / "w"
    with pytest.raises(ToBeDeployed):
        nebius.make().run_full_pipeline(**nebius.options, download_weights=target)
    with pytest.raises(ConfigurationError, match="--model-id"):
        nebius.make().run_evaluation(str(target), max_test_cases=1)


def test_a_job_watched_by_its_id_gives_its_weights_too(
    nebius: Service, clean_environment: Path
) -> None:
    trained(nebius)
    job_id = record_of(nebius)["job_id"]
    out = clean_environment / "elsewhere"
    job = nebius.make(output_dir=out).attach(job_id, download_weights=clean_environment / "w")

    assert getattr(job, "id", None) == job_id
    assert len(list((clean_environment / "w").iterdir())) == 2


def test_where_no_weights_are_given_away_that_is_said_before_anything_is_paid(
    azure: Service, litellm: Service
) -> None:
    with pytest.raises(ConfigurationError, match="重みを渡しません"):
        azure.make().run_full_pipeline(**azure.options, download_weights="w")
    with pytest.raises(ConfigurationError, match="重みのファイルは"):
        litellm.make().run_full_pipeline(**litellm.options, download_weights="w")

    assert azure.endpoint.exchanges == []
    assert record_of(litellm)["fine_tuned_model"]


# Gateways


def test_a_gateway_that_knows_the_top_alone_gets_its_hyperparameters_there(
    litellm: Service, log: Log
) -> None:
    results = litellm.make().run_full_pipeline(**litellm.options)

    assert results["training"]["hyperparameters"]["n_epochs"] == 2
    assert not any("依頼したものと違います" in line for line in log())


class Waiting(CharacterEngine):
    """Trains once it may."""

    def __init__(self) -> None:
        super().__init__()
        self.may = False

    def train(self, order: Order) -> Generator[Progress, None, None]:
        while not self.may:
            yield None
        yield from super().train(order)


@pytest.fixture
def patient(
    sdk: openai.OpenAI, clean_environment: Path, dataset: Path
) -> Iterator[tuple[Service, Waiting]]:
    """A gateway that drops the method, whose job waits until it may train."""
    engine = Waiting()
    with service("litellm", sdk, clean_environment, dataset, engine=engine) as running:
        yield running, engine
        engine.may = True


def test_a_job_with_other_hyperparameters_is_told_of_and_its_price_corrected(
    patient: tuple[Service, Waiting], log: Log
) -> None:
    place, engine = patient
    seen: list[CostEstimate] = []

    def confirm(estimate: CostEstimate) -> bool:
        seen.append(estimate)
        engine.may = estimate.epochs == 3
        return True

    sft = place.make(dialect="gateway", price=PRICE, confirm=confirm)
    results = sft.run_full_pipeline(**{**place.options, "epochs": 10})
    told = [line for line in log() if "依頼したものと違います" in line]
    record = record_of(place)

    assert "n_epochs 10 → auto" in told[0]
    assert "--dialect litellm" in told[0]
    assert f"--cancel {record['job_id']}" in told[0]
    assert "n_epochs 10 → 3" in told[1]
    assert len(told) == 2
    assert [estimate.epochs for estimate in seen] == [10, "auto", 3]
    assert seen[2].training_usd == pytest.approx(0.3 * (seen[0].training_usd or 0))
    assert record["estimate"]["epochs"] == 3
    assert record["estimate"]["total_usd"] == pytest.approx(
        (seen[0].total_usd or 0) - 0.7 * (seen[0].training_usd or 0)
    )
    assert results["cost"]["training_usd"] > 0


@pytest.mark.parametrize(("rate", "is_told"), [(1.9999999494757503e-05, False), (2.1e-5, True)])
def test_a_rate_that_was_only_rounded_is_the_one_that_was_asked_for(
    nebius: Service, log: Log, rate: float, is_told: bool
) -> None:
    def serve(request: Request, forward: Forward) -> Reply:
        reply = forward(request)
        if not re.fullmatch(rf"{JOBS}(/ftjob-[^/]+)?", request.path) or "data" in reply.json:
            return reply
        hyperparameters = {**reply.json["hyperparameters"], "learning_rate": rate}
        return saying({**reply.json, "hyperparameters": hyperparameters})

    with Gateway(nebius.endpoint, serve) as gateway:
        sft = nebius.make(client=None, base_url=gateway.url)
        with pytest.raises(ToBeDeployed):
            sft.run_full_pipeline(**nebius.options)

    assert any("依頼したものと違います" in line for line in log()) is is_told


def test_who_does_not_agree_to_another_job_than_he_asked_for_has_it_cancelled(
    patient: tuple[Service, Waiting],
) -> None:
    place, _ = patient
    answers = iter([True, False])
    sft = place.make(dialect="gateway", price=PRICE, confirm=lambda _: next(answers))
    with pytest.raises(Declined, match="取り消しました") as declined:
        sft.run_full_pipeline(**place.options)
    (job,) = place.endpoint.jobs.values()

    assert job.status == "cancelled"
    assert "続いて" not in str(declined.value)
    assert record_of(place)["job_status"] == "cancelled"
    assert place.make().resume() is None


def test_a_job_that_has_ended_while_he_was_asked_is_there_to_be_evaluated(
    patient: tuple[Service, Waiting],
) -> None:
    place, engine = patient
    asked_before: list[CostEstimate] = []

    def confirm(estimate: CostEstimate) -> bool:
        asked_before.append(estimate)
        if len(asked_before) == 2:
            engine.may = True
            (job,) = place.endpoint.jobs.values()
            until(lambda: job.status == "succeeded")
        return len(asked_before) == 1

    with (
        place.make(dialect="gateway", price=PRICE, confirm=confirm) as sft,
        pytest.raises(Declined, match="終わっていました"),
    ):
        sft.run_full_pipeline(**place.options)

    assert place.make(dialect="gateway", price=PRICE).resume() is not None


def test_a_limit_holds_for_the_job_that_there_is(patient: tuple[Service, Waiting]) -> None:
    place, _ = patient
    sft = place.make(dialect="gateway", price=PRICE, max_cost_usd=0.1)
    with pytest.raises(BudgetError, match="取り消しました"):
        sft.run_full_pipeline(**{**place.options, "epochs": 1})
    (job,) = place.endpoint.jobs.values()

    assert job.status == "cancelled"


def test_a_difference_that_was_agreed_to_is_not_asked_about_again(
    patient: tuple[Service, Waiting],
) -> None:
    place, engine = patient
    seen: list[CostEstimate] = []
    agree = {"dialect": "gateway", "price": PRICE, "confirm": lambda e: not seen.append(e)}
    with place.make(**agree) as sft, pytest.raises(WaitTimeout):
        sft.run_full_pipeline(**place.options, timeout=5)
    engine.may = True
    place.make(**agree).resume()

    assert [e.epochs for e in seen if e.epochs is not None] == [2, "auto", 3]


def test_who_stops_before_he_has_agreed_to_another_job_is_asked_again(
    patient: tuple[Service, Waiting],
) -> None:
    place, _ = patient
    answers = iter([True, KeyboardInterrupt(), True, False])
    place.endpoint.hold("validating_files")  # so that nothing of it changes

    def confirm(_: CostEstimate) -> bool:
        answer = next(answers)
        if isinstance(answer, KeyboardInterrupt):
            raise answer
        return answer

    agree = {"dialect": "gateway", "price": PRICE, "confirm": confirm}
    with place.make(**agree) as sft, pytest.raises(KeyboardInterrupt):
        sft.run_full_pipeline(**place.options)
    with pytest.raises(Declined, match="取り消しました"):
        place.make(**agree).resume(timeout=60)
    place.endpoint.release()
    (job,) = place.endpoint.jobs.values()

    assert job.status == "cancelled"


def test_a_job_that_could_not_be_cancelled_is_still_there_to_be_declined(
    patient: tuple[Service, Waiting],
) -> None:
    place, _ = patient
    answers = iter([True, False, True, False])
    agree = {"dialect": "gateway", "price": PRICE, "confirm": lambda _: next(answers)}
    place.endpoint.inject(Fault("403", "POST", f"{JOBS}/*/cancel"))
    with place.make(**agree) as sft, pytest.raises(openai.PermissionDeniedError):
        sft.run_full_pipeline(**place.options)
    with pytest.raises(Declined) as declined:
        place.make(**agree).resume()
    (job,) = place.endpoint.jobs.values()

    assert job.status == "cancelled"
    assert "続いていて" not in str(declined.value)


def test_the_price_of_another_job_is_held_against_the_limit_with_its_evaluation(
    patient: tuple[Service, Waiting],
) -> None:
    place, _ = patient
    seen: list[CostEstimate] = []

    def confirm(estimate: CostEstimate) -> bool:
        seen.append(estimate)
        return len(seen) < 2

    sft = place.make(dialect="gateway", price=PRICE, confirm=confirm)
    with pytest.raises(Declined):
        sft.run_full_pipeline(**place.options)

    assert [estimate.epochs for estimate in seen] == [2, "auto"]
    assert seen[0].asking_usd == seen[1].asking_usd
    assert (seen[1].asking_usd or 0) > 0


@pytest.mark.parametrize(
    ("epochs", "priced"), [(-1, "auto"), (2.5, "auto"), (100, 100), ("3", 3), (None, 2)]
)
def test_whatever_a_job_calls_its_epochs_its_price_is_asked_about(
    litellm: Service, epochs: object, priced: object
) -> None:
    def serve(request: Request, forward: Forward) -> Reply:
        reply = forward(request)
        if request.line == ("POST", JOBS) and reply.status == 200:
            told = {**reply.json["hyperparameters"], "n_epochs": epochs, "batch_size": 9}
            return saying(reply.json | {"hyperparameters": told})
        return reply

    seen: list[CostEstimate] = []
    with Gateway(litellm.endpoint, serve) as gateway:
        place = {"client": None, "base_url": gateway.url, "price": PRICE}
        sft = litellm.make(**place, confirm=lambda e: seen.append(e) or len(seen) < 2)
        with pytest.raises(Declined, match="ジョブ"):
            sft.run_full_pipeline(**litellm.options)

    assert seen[1].epochs == priced


def test_hyperparameters_at_the_top_are_held_against_the_job_too(
    litellm: Service, log: Log
) -> None:
    def serve(request: Request, forward: Forward) -> Reply:
        reply = forward(request)
        if request.line == ("POST", JOBS):
            return saying(reply.json | {"hyperparameters": {"n_epochs": 7}})
        return reply

    with Gateway(litellm.endpoint, serve) as gateway:
        litellm.make(client=None, base_url=gateway.url).run_full_pipeline(**litellm.options)

    assert any("n_epochs 2 → 7" in line for line in log())


def test_a_job_that_has_ended_with_other_hyperparameters_is_told_of_too(
    litellm: Service, log: Log
) -> None:
    litellm.make(dialect="gateway", price=PRICE).run_full_pipeline(**litellm.options)

    assert any("n_epochs 2 → 3" in line for line in log())
    assert record_of(litellm)["estimate"]["epochs"] == 3


@pytest.mark.parametrize("fault", ["500_after", "reset_after", "truncated"])
def test_one_job_is_made_where_its_answer_is_lost_and_no_metadata_is_kept(
    litellm: Service, fault: str
) -> None:
    litellm.endpoint.inject(Fault(fault, "POST", JOBS))
    results = litellm.make().run_full_pipeline(**litellm.options)

    assert len(litellm.endpoint.jobs) == 1
    assert results["training"]["job_id"] in litellm.endpoint.jobs


@pytest.mark.parametrize(
    ("asked_for", "told"),
    [
        (MINI, f"openai/{MINI}"),
        (f"openai/{MINI}", MINI),
        ("openai/gpt-4o-mini", f"azure/{MINI}"),
        (MINI, None),
    ],
)
def test_a_job_is_found_again_whatever_a_gateway_puts_before_the_name_of_its_model(
    litellm: Service, asked_for: str, told: str | None
) -> None:
    forgetful = Forgetful("answer")

    def serve(request: Request, forward: Forward) -> Reply:
        if request.line == ("POST", JOBS):
            body = json.dumps({**request.json, "model": MINI}).encode()
            return forgetful(request._replace(body=body), forward)
        reply = forgetful(request, forward)
        return reply._replace(body=reply.body.replace(f'"model": "{MINI}"'.encode(), renamed))

    renamed = f'"model": {json.dumps(told)}'.encode()
    with Gateway(litellm.endpoint, serve) as gateway:
        sft = litellm.make(client=None, base_url=gateway.url, model=asked_for)
        results = sft.run_full_pipeline(**litellm.options)

    (job_id,) = litellm.endpoint.jobs
    assert results["training"]["job_id"] == job_id


# Refusals


SAYINGS = [
    ({"error": {"message": "モデルが違います😢", "type": "x", "param": None, "code": None}}, None),
    ({"detail": "モデルが違います😢"}, None),
    (
        {"detail": [{"type": "x", "loc": ["body", "model"], "msg": "モデルが違います😢"}]},
        "body.model",
    ),
    ({"error": "モデルが違います😢"}, None),
    ({"message": "モデルが違います😢"}, None),
    ({"detail": {"error": "モデルが違います😢", "code": "x"}}, "404: モデル"),
    ({"errors": [{"text": "モデルが違います😢"}]}, "errors"),
]


@pytest.mark.parametrize("path", [JOBS, "/files"])
@pytest.mark.parametrize(
    ("status", "body", "where"),
    [
        (status, *said)
        for status, said in zip((400, 403, 413, 422, 404, 404, 403), SAYINGS, strict=True)
    ],
)
def test_a_definite_refusal_is_told_in_the_words_of_the_service(
    azure: Service, path: str, status: int, body: Any, where: str | None
) -> None:
    def serve(request: Request, forward: Forward) -> Reply:
        return saying(body, status) if request.line == ("POST", path) else forward(request)

    with Gateway(azure.endpoint, serve) as gateway:
        sft = azure.make(client=None, base_url=gateway.url)
        with pytest.raises(openai.APIStatusError) as refused:
            sft.run_full_pipeline(**azure.options)
        said = explain_api_error(refused.value) + sft.describe_remote_state()

    assert "モデルが違います😢" in said
    assert where is None or where in said
    assert str(status) in said
    assert "やり直し" not in said
    assert "可能性" not in said
    assert len(gateway.of("POST", path)) == 1
    (record,) = azure.make().output_dir.glob("run_*.json")
    assert "job_intent" not in read_json(record)


def test_a_job_that_fails_at_another_service_fails_in_its_words(azure: Service) -> None:
    azure.endpoint.inject(Fault("job_failed", "POST", JOBS))
    with pytest.raises(JobFailed):
        azure.make().run_full_pipeline(**azure.options)


# The rehearsal


@pytest.mark.parametrize("dialect", ["azure", "nebius"])
def test_a_rehearsal_speaks_the_dialect_it_is_told(clean_environment: Path, dialect: Any) -> None:
    options: dict[str, Any] = {"training_type": "Standard"} if dialect == "azure" else {}
    data = write_jsonl(clean_environment / "d.jsonl", records(20))
    model = LLAMA if dialect == "nebius" else None
    with (
        OpenAISFT(
            rehearse=True, dialect=dialect, model=model, dataset=str(data), verbose=False
        ) as sft,
        pytest.raises(ToBeDeployed) as ended,
    ):
        sft.run_full_pipeline(**SHORT, **options)

    assert ended.value.model
    assert "リハーサルはここまで" in ended.value.commands[-1]
    assert not any("openai-sft" in line for line in ended.value.commands)
