"""The checkpoints of a job: what is known of each, and which one is asked."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from edges import Forward, Gateway, Reply, Request
from endpoint import Fault, Rehearsal
from faults import CHAT, JOBS, asked
from helpers import Ended, examples, posts, read_json, record, records, write_jsonl

from openai_sft import Checkpoint, ConfigurationError, OpenAISFT

MakeSFT = Callable[..., OpenAISFT]
Log = Callable[[], list[str]]

# Of five epochs on the twenty dialogues the second is the best, of the last three the first.
LONG: dict[str, Any] = {"epochs": 5, "batch_size": 4, "max_test_cases": 1}


def asked_models(endpoint: Rehearsal) -> list[str]:
    return [e.request["model"] for e in asked(endpoint, "POST", CHAT)]


def checkpoints_of(sft: OpenAISFT) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_json(sft.files["record"])["checkpoints"]
    return found


def best_of(checkpoints: list[dict[str, Any]]) -> dict[str, Any]:
    return min(checkpoints, key=lambda checkpoint: checkpoint["full_valid_loss"])


def at_checkpoints(change: Callable[[dict[str, Any]], object]) -> Any:
    """What a gateway does that lets ``change`` work on each checkpoint in a list of them."""

    def serve(request: Request, forward: Forward) -> Reply:
        reply = forward(request)
        if request.path.endswith("/checkpoints") and reply.status == 200:
            page = json.loads(reply.body)
            for checkpoint in page["data"]:
                change(checkpoint)
            reply = Reply(200, json.dumps(page).encode(), "application/json")
        return reply

    return serve


# ── What is recorded and told ────────────────────────────────────────────────────────────────


def test_the_validation_loss_of_each_checkpoint_is_recorded_and_from_when_on_it_rose_is_told(
    make_sft: MakeSFT, log: Log
) -> None:
    sft = make_sft()
    results = sft.run_full_pipeline(**LONG)
    job_id = read_json(sft.files["record"])["job_id"]
    served = list(sft.client.fine_tuning.jobs.checkpoints.list(job_id))
    events = sft.client.fine_tuning.jobs.list_events(job_id, limit=100)
    losses: dict[int, float] = {
        event.data["step"]: event.data["full_valid_loss"]  # type: ignore[index]  # a metrics event
        for event in events
        if "full_valid_loss" in (event.data or ())  # type: ignore[operator]  # a mapping
    }
    (rise,) = [line for line in log() if "過学習" in line]

    assert [Checkpoint(**facts) for facts in checkpoints_of(sft)] == [
        Checkpoint(
            c.fine_tuned_model_checkpoint,
            c.id,
            c.step_number,
            c.metrics.full_valid_loss,
            c.metrics.model_dump(),
        )
        for c in served
    ]
    assert min(losses, key=losses.__getitem__) == 8
    assert "エポック3、step 12から" in rise
    assert f"最も低いのはエポック2、step 8の{losses[8]:.4f}" in rise
    assert f"最後は{losses[20]:.4f}" in rise
    assert "checkpoint" not in results


def test_a_validation_loss_that_only_falls_is_nothing_to_tell(make_sft: MakeSFT, log: Log) -> None:
    make_sft().run_full_pipeline(2, 4, max_test_cases=1)

    assert not any("過学習" in line for line in log())
    assert any("最後のチェックポイントが最も低く" in line for line in log())


SPELLINGS = ["full_valid_loss", "full_validation_loss", "Full Valid Loss", "fullValidLoss"]


@pytest.mark.parametrize("column", SPELLINGS)
def test_losses_that_only_the_result_file_tells_are_taken_from_it(
    make_sft: MakeSFT, endpoint: Rehearsal, column: str
) -> None:
    table = f"step,train_loss,{column}\n12,1,0.75\n15,1,\n16,1,0.5\n20,1,0.625\n".encode()
    without_metrics = at_checkpoints(lambda checkpoint: checkpoint.pop("metrics"))

    def serve(request: Request, forward: Forward) -> Reply:
        result = request.path.endswith("/content")
        csv = Reply(200, table, "application/octet-stream")
        return csv if result else without_metrics(request, forward)

    with Gateway(endpoint, serve) as gateway:
        sft = make_sft(client=None, base_url=gateway.url)
        results = sft.run_full_pipeline(**LONG, checkpoint="best")

    assert [c["full_valid_loss"] for c in checkpoints_of(sft)] == [0.625, 0.5, 0.75]
    assert results["checkpoint"]["step"] == 16


def test_losses_that_only_the_checkpoints_tell_are_enough(
    make_sft: MakeSFT, endpoint: Rehearsal, log: Log
) -> None:
    endpoint.inject(Fault("404", "GET", "*/events", times=None))
    sft = make_sft()
    results = sft.run_full_pipeline(**LONG, checkpoint="best")

    assert results["checkpoint"] == best_of(checkpoints_of(sft))
    assert results["checkpoint"]["step"] == 12
    assert any("エポック4、step 16から" in line for line in log())


def test_a_last_checkpoint_of_unknown_loss_is_not_taken_for_the_best(
    make_sft: MakeSFT, endpoint: Rehearsal, log: Log
) -> None:
    endpoint.inject(Fault("404", "GET", "*/events", times=None))

    def change(checkpoint: dict[str, Any]) -> None:
        if checkpoint["step_number"] == 20:
            checkpoint["metrics"].pop("full_valid_loss")

    with Gateway(endpoint, at_checkpoints(change)) as gateway:
        sft = make_sft(client=None, base_url=gateway.url)
        results = sft.run_full_pipeline(**LONG, checkpoint="best")

    assert results["checkpoint"]["step"] == 12
    assert any("最後（不明）ではなく" in line for line in log())


# ── Which one is asked ───────────────────────────────────────────────────────────────────────


def test_the_best_on_validation_is_asked_and_no_other_and_that_is_said_before(
    make_sft: MakeSFT, endpoint: Rehearsal, log: Log
) -> None:
    said: list[str] = []
    sft = make_sft(confirm=lambda estimate: not said.extend(log()))
    results = sft.run_full_pipeline(**LONG, checkpoint="best")
    best, last = best_of(checkpoints_of(sft)), checkpoints_of(sft)[0]
    lines = log()
    told = next(n for n, line in enumerate(lines) if "これを評価します" in line)
    first = next(n for n, line in enumerate(lines) if "件を評価します" in line)

    assert set(asked_models(endpoint)) == {best["model"]}
    assert results["model_id"] == best["model"] != last["model"]
    assert results["checkpoint"] == best
    assert f"{best['full_valid_loss']:.4f}" in lines[told]
    assert f"最後（{last['full_valid_loss']:.4f}）" in lines[told]
    assert told < first
    assert read_json(sft.files["record"])["plan"]["asking"]["checkpoint"] == "best"


def test_the_last_is_asked_unless_told_and_a_better_one_is_named_before(
    make_sft: MakeSFT, endpoint: Rehearsal, log: Log
) -> None:
    sft = make_sft()
    results = sft.run_full_pipeline(**LONG)
    best = best_of(checkpoints_of(sft))

    assert set(asked_models(endpoint)) == {results["model_id"]}
    assert results["model_id"] == read_json(sft.files["record"])["fine_tuned_model"]
    assert any(best["model"] in line and "--checkpoint best" in line for line in log())


@pytest.mark.parametrize("named_by", ["best", "id", "model", "step"])
def test_an_evaluation_alone_asks_the_checkpoint_that_it_is_told(
    make_sft: MakeSFT, endpoint: Rehearsal, named_by: str
) -> None:
    with make_sft() as first:
        first.run_full_pipeline(**LONG)
    wanted = best_of(checkpoints_of(first))
    before = len(asked_models(endpoint))
    name = "best" if named_by == "best" else str(wanted[named_by])
    again = make_sft().run_evaluation(max_test_cases=1, checkpoint=name)

    assert set(asked_models(endpoint)[before:]) == {wanted["model"]} == {again["model_id"]}
    assert again["checkpoint"] == wanted
    assert again["summary"]["total_cases_evaluated"] == 2


def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(
    make_sft: MakeSFT, endpoint: Rehearsal, cli: Callable[..., Ended], out: Path
) -> None:
    with make_sft() as sft:
        sft.run_full_pipeline(**LONG)
    before = len(posts(endpoint))
    with pytest.raises(ConfigurationError) as refused:
        make_sft().run_evaluation(checkpoint="ftckpt_none")

    for checkpoint in checkpoints_of(sft):
        assert f"{checkpoint['id']}（step {checkpoint['step']}）" in str(refused.value)
    assert len(posts(endpoint)) == before
    assert len(list(out.glob("run_*.json"))) == 1


def test_the_command_line_names_a_checkpoint_and_is_told_of_a_wrong_one(
    make_sft: MakeSFT,
    endpoint: Rehearsal,
    cli: Callable[..., Ended],
    place: Callable[[str], tuple[str, ...]],
) -> None:
    with make_sft() as sft:
        sft.run_full_pipeline(**LONG)
    best = best_of(checkpoints_of(sft))
    usual = ("--base-url", endpoint.url, "--max-test-cases", "1", "--output-dir", "out", "--yes")
    place(endpoint.url)
    done = cli("--evaluate-only", "--checkpoint", "best", *usual)
    wrong = cli("--evaluate-only", "--checkpoint", "999", *usual)

    assert (done.code, wrong.code) == (0, 2)
    assert f"モデル: {best['model']}" in done.out
    assert "チェックポイント 999 は" in wrong.errors[0]
    assert best["id"] in wrong.errors[0]


def test_what_nobody_can_know_before_training_is_refused_before_anything_is_sent(
    make_sft: MakeSFT, endpoint: Rehearsal, out: Path
) -> None:
    with pytest.raises(ConfigurationError, match="best か last"):
        make_sft().run_full_pipeline(**LONG, checkpoint="ftckpt_1")

    assert posts(endpoint) == []
    assert not list(out.glob("*"))


def test_a_checkpoint_named_as_the_model_is_not_another_checkpoint_as_well(
    make_sft: MakeSFT,
) -> None:
    with make_sft() as sft:
        sft.run_full_pipeline(**LONG)
    name = checkpoints_of(sft)[-1]["model"]
    with pytest.raises(ConfigurationError, match="チェックポイントです"):
        make_sft().run_evaluation(name, checkpoint="best")
    with pytest.raises(ConfigurationError, match="学習記録が、この保存先にありません"):
        make_sft().run_evaluation("gpt-4o-2024-08-06", checkpoint="best")


# ── After an interruption ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("begun", "resumed"), [("best", None), ("last", "best")])
def test_a_resumed_run_asks_the_checkpoint_it_was_begun_with_or_is_told_now(
    make_sft: MakeSFT, endpoint: Rehearsal, begun: str, resumed: str | None
) -> None:
    endpoint.inject(Fault("insufficient_quota", "POST", CHAT))
    with make_sft() as sft, pytest.raises(openai.RateLimitError):
        sft.run_full_pipeline(**LONG, checkpoint=begun)
    before = len(asked_models(endpoint))
    results = make_sft().resume(checkpoint=resumed)
    best = best_of(checkpoints_of(sft))

    assert results is not None
    assert results["checkpoint"] == best
    assert set(asked_models(endpoint)[before:]) == {best["model"]}


def test_a_resumed_evaluation_alone_goes_to_the_checkpoint_it_is_told_now(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    with make_sft() as sft:
        sft.run_full_pipeline(**LONG)
    newest, middle, _ = checkpoints_of(sft)
    endpoint.inject(Fault("insufficient_quota", "POST", CHAT, skip=1))
    with make_sft() as again, pytest.raises(openai.RateLimitError):
        again.run_evaluation(max_test_cases=0, concurrency=1, checkpoint="best")
    with pytest.raises(ConfigurationError, match=re.escape(newest["id"])):
        make_sft().resume(checkpoint="nothing")
    results = make_sft().resume(checkpoint=middle["id"])

    assert results is not None
    assert results["model_id"] == middle["model"]


@pytest.mark.parametrize("wanted", ["best", None])
def test_an_attached_job_of_a_run_here_ends_with_the_checkpoint_that_is_wanted(
    make_sft: MakeSFT, endpoint: Rehearsal, wanted: str | None
) -> None:
    endpoint.hold("running")
    endpoint.inject(Fault("401", "GET", f"{JOBS}/*"))
    with make_sft() as sft, pytest.raises(openai.AuthenticationError):
        sft.run_full_pipeline(**LONG)
    endpoint.release()
    job_id = read_json(sft.files["record"])["job_id"]
    with pytest.raises(ConfigurationError, match="best か last"):
        make_sft().attach(job_id, checkpoint="12")
    results = make_sft().attach(job_id, checkpoint=wanted)
    models = [best_of(checkpoints_of(sft))["model"]] if wanted else []

    assert isinstance(results, dict)
    assert results["model_id"] in (models or [read_json(sft.files["record"])["fine_tuned_model"]])


def test_a_job_made_elsewhere_is_evaluated_at_its_best_checkpoint_once_it_was_watched(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    with make_sft() as sft:
        files = sft.prepare_data(5).files
        sent = [
            sft.client.files.create(file=Path(files[name]), purpose="fine-tune").id
            for name in ("train", "valid")
        ]
        training, validation = sent
        hyperparameters = {"n_epochs": 5, "batch_size": 4}
        job = sft.client.fine_tuning.jobs.create(
            model="gpt-4o-mini-2024-07-18",
            training_file=training,
            validation_file=validation,
            seed=1,
            method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},  # type: ignore[typeddict-item]  # plain numbers
        )
    with make_sft() as watching:
        with pytest.raises(ConfigurationError, match="--evaluate-only"):
            watching.attach(job.id, checkpoint="best")
        watching.attach(job.id)
        best = best_of(checkpoints_of(watching))
    results = make_sft().run_evaluation(max_test_cases=1, checkpoint="best")

    assert best["step"] != 20
    assert results["checkpoint"] == best


def test_a_record_that_tells_no_losses_gets_them_from_a_job_that_is_watched_again(
    make_sft: MakeSFT,
) -> None:
    with make_sft() as sft:
        sft.run_full_pipeline(**LONG, seed=1)
    record = read_json(sft.files["record"])
    tested = read_json(sft.files["manifest"])["splits"]["test"]["lines"]
    best = best_of(record["checkpoints"])
    record["checkpoints"] = [checkpoint["model"] for checkpoint in record["checkpoints"]]
    Path(sft.files["record"]).write_text(json.dumps(record), "utf-8")
    with pytest.raises(ConfigurationError, match=re.escape(best["model"])):
        make_sft().run_evaluation(checkpoint="best")
    named = make_sft().run_evaluation(max_test_cases=1, checkpoint=best["model"])
    with make_sft() as again:
        again.attach(record["job_id"])
    results = make_sft().run_evaluation(max_test_cases=0, checkpoint="best")
    asked = results["test_evaluation"]["responses"]

    assert named["model_id"] == results["model_id"] == best["model"]
    assert results["checkpoint"] == best
    # The split is still that of the run.
    assert {r["case_id"].partition(":")[0] for r in asked} == {line["id"] for line in tested}


def test_without_validation_data_the_best_is_refused_before_anything_is_sent(
    make_sft: MakeSFT, endpoint: Rehearsal, clean_environment: Path
) -> None:
    folder = clean_environment / "published"
    folder.mkdir()
    rows = records(24)
    silent = [record(number, ("client", f"相談{number}")) for number in (90, 91)]
    for name, part in {"train": rows[:20], "test": rows[20:], "valid": silent}.items():
        write_jsonl(folder / f"{name}.jsonl", part)
    sft = make_sft(dataset=str(folder))
    with pytest.raises(ConfigurationError, match="検証データが0件"):
        sft.run_full_pipeline(**LONG, checkpoint="best")

    assert posts(endpoint) == []
    assert make_sft(dataset=str(folder)).run_full_pipeline(**LONG)["model_id"]


def test_an_evaluation_of_a_named_model_takes_no_checkpoint_when_it_is_resumed(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    endpoint.inject(Fault("insufficient_quota", "POST", CHAT, skip=1))
    with make_sft() as sft, pytest.raises(openai.RateLimitError):
        sft.evaluate_model_comprehensive("gpt-4o-2024-08-06", examples(4), [], concurrency=1)
    with pytest.raises(ConfigurationError, match="名指しした評価"):
        make_sft().resume(checkpoint="best")

    assert make_sft().resume() is not None


def test_without_losses_the_best_is_refused_after_training_and_the_last_can_be_had(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    lost = at_checkpoints(lambda checkpoint: checkpoint["metrics"].pop("full_valid_loss"))

    def serve(request: Request, forward: Forward) -> Reply:
        if request.path.endswith("/events"):
            return Reply(404, b"{}", "application/json")
        return lost(request, forward)

    with Gateway(endpoint, serve) as gateway:
        options: dict[str, Any] = {"client": None, "base_url": gateway.url}
        sft = make_sft(**options)
        with pytest.raises(ConfigurationError, match="損失の記録がありません"):
            sft.run_full_pipeline(**LONG, checkpoint="best")
        sft.close()
        before = len(asked_models(endpoint))
        results = make_sft(**options).resume(checkpoint="last")

    assert before == 0
    assert results is not None
    assert results["summary"]["total_cases_evaluated"] == 2
