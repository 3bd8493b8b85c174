"""What a run's record and its results keep, for the page, the table and other tools."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from edges import Forward, Gateway, Reply, Request
from endpoint import Fault, Rehearsal
from faults import JOBS
from helpers import examples, read_json

from openai_sft import JobFailed, OpenAISFT, parse_dialogue, to_score_example
from openai_sft_rehearsal import example_dialogues

MakeSFT = Callable[..., OpenAISFT]
BASE = "gpt-4o-mini-2024-07-18"
SHORT: dict[str, Any] = {"epochs": 2, "batch_size": 4}


def record_of(sft: OpenAISFT) -> dict[str, Any]:
    found: dict[str, Any] = read_json(sft.files["record"])
    return found


def rows_of(sft: OpenAISFT) -> list[dict[str, str]]:
    with Path(sft.files["training_metrics"]).open(encoding="utf-8", newline="") as table:
        return list(csv.DictReader(table))


def moment(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


# ── Results ──────────────────────────────────────────────────────────────────────────────────


def test_each_case_has_scores_that_make_the_figures(make_sft: MakeSFT) -> None:
    results = make_sft().evaluate_model_comprehensive(BASE, examples(6), [], 0)
    part = results["test_evaluation"]
    scores = [response["scores"] for response in part["responses"]]

    for name in ("rouge_l", "backchannel_share"):
        mean = sum(score[name] for score in scores) / len(scores)
        assert mean == pytest.approx(part["metrics"][name]["score"], abs=1e-4)
    assert not {"dist_1", "dist_2"} & scores[0].keys()  # of all answers together

    rated = [
        to_score_example(parse_dialogue(row, fallback_id="x", source="x"))
        for row in example_dialogues()
    ]
    results = make_sft(task="score").evaluate_model_comprehensive(
        BASE, [one for one in rated if one], [], 0
    )
    for response in results["test_evaluation"]["responses"]:
        own = response["scores"]
        assert own["total.rmse"] == pytest.approx(own["total.mse"] ** 0.5, abs=1e-3)
        assert all(name.startswith(("overall.", "total.")) for name in own)


def test_a_context_stands_once_and_the_baselines_answers_are_found_by_case(
    make_sft: MakeSFT, example_file: Path
) -> None:
    sft = make_sft(dataset=str(example_file))
    results = sft.run_full_pipeline(**SHORT, baseline=True, max_test_cases=0)
    text = Path(sft.files["comprehensive_evaluation"]).read_text("utf-8")
    topics = {str(n): row["topic"]["main_jp"] for n, row in enumerate(example_dialogues(), 1)}

    for part in ("test_evaluation", "valid_evaluation"):
        mine, theirs = results[part]["responses"], results["baseline"][part]["responses"]
        assert [response["case_id"] for response in mine] == [*theirs]
        for response in mine:
            last = response["input"][-1]["content"]
            assert text.count(json.dumps(last, ensure_ascii=False)) == 1
            assert response["topic"] == topics[response["dialogue_id"]]
            assert 0 <= response["dialogue_score"] <= 100
            assert not {"input", "reference", "topic"} & theirs[response["case_id"]].keys()
            assert theirs[response["case_id"]]["scores"].keys() == response["scores"].keys()


def test_what_a_dialogue_is_about_outlives_the_process_that_read_it(
    make_sft: MakeSFT, example_file: Path
) -> None:
    first = make_sft(dataset=str(example_file)).run_full_pipeline(**SHORT)
    again = make_sft(dataset=str(example_file)).run_evaluation()

    for name in ("case_id", "topic", "dialogue_score"):
        mine, theirs = (
            [response[name] for response in one["test_evaluation"]["responses"]]
            for one in (first, again)
        )
        assert mine == theirs


def test_results_tell_the_run_the_job_the_data_and_the_price(make_sft: MakeSFT) -> None:
    sft = make_sft()
    results = sft.run_full_pipeline(**SHORT)
    kept, training = record_of(sft), results["training"]
    other = make_sft()
    later = other.run_evaluation()

    assert results["run_id"] == kept["run_id"] == training["run_id"]
    assert training["job_id"] == kept["job_id"]
    assert training["hyperparameters"]["n_epochs"] == 2
    assert training["hyperparameters"]["batch_size"] == 4
    assert isinstance(training["hyperparameters"]["learning_rate_multiplier"], float)
    assert training["actual_usd"] == results["cost"]["training_usd"]
    assert training["estimated_usd"] == results["estimate"]["training_usd"] > 0
    for name in ("train", "test", "valid"):
        content = Path(sft.files[name]).read_bytes()
        assert results["data"][name]["sha256"] == hashlib.sha256(content).hexdigest()
    assert results["data"]["dataset"] == sft.dataset
    assert later["run_id"] == record_of(other)["run_id"] != results["run_id"]
    assert later["training"] == training
    assert later["data"] == results["data"]


# ── The record ───────────────────────────────────────────────────────────────────────────────


def test_the_table_has_the_columns_of_events_checkpoints_and_result_file(
    make_sft: MakeSFT,
) -> None:
    sft = make_sft()
    sft.run_full_pipeline(**SHORT)
    rows, kept = rows_of(sft), record_of(sft)
    steps = [int(row["step"]) for row in rows]

    assert steps == [*range(1, 9)]
    assert next(iter(rows[0])) == "step"
    for name in ("created_at", "train_loss", "train_accuracy", "full_valid_loss", "valid_loss"):
        assert any(row[name] for row in rows)
    assert [row["step"] for row in kept["metrics"]] == steps
    for row, told in zip(kept["metrics"], rows, strict=True):
        assert row == {name: float(x) for name, x in told.items() if x}
    assert [c["metrics"]["full_valid_loss"] for c in kept["checkpoints"]]


def test_a_record_keeps_when_the_job_was_created_started_and_finished_and_what_was_said(
    make_sft: MakeSFT,
) -> None:
    sft = make_sft()
    sft.run_full_pipeline(**SHORT)
    kept = record_of(sft)
    said = [event["message"] for event in kept["events"]]
    times = [event["created_at"] for event in kept["events"]]

    assert any("successfully completed" in message for message in said)
    assert not any(message.startswith("Step ") for message in said)
    assert times == sorted(times)
    created, started, finished = (
        moment(kept[f"job_{name}_at"]) for name in ("created", "started", "finished")
    )
    assert created <= started <= finished


def test_the_curve_and_the_events_of_a_job_that_failed_are_kept(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    endpoint.inject(Fault("job_failed", "POST", JOBS))
    sft = make_sft()
    with pytest.raises(JobFailed):
        sft.run_full_pipeline(**SHORT)
    kept = record_of(sft)

    assert kept["job_status"] == "failed"
    assert kept["metrics"]
    assert len(rows_of(sft)) == len(kept["metrics"])
    assert kept["job_finished_at"]
    assert kept["hyperparameters"]["n_epochs"] == 2
    assert any("failed" in event["message"] for event in kept["events"])
    assert read_json(sft.files["record"]) == kept
    assert make_sft().list_runs()[0].status == "failed"


def test_a_record_keeps_no_more_rows_than_it_can_carry_but_each_full_validation(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    lines = [f"{n},1,{1 if n in (1, 5000) else ''}" for n in range(1, 5001)]
    table = "\n".join(["step,train_loss,full_valid_loss", *lines]).encode()
    endpoint.inject(Fault("404", "GET", "*/events", times=None))
    endpoint.inject(Fault("404", "GET", "*/checkpoints", times=None))

    def serve(request: Request, forward: Forward) -> Reply:
        result = request.path.endswith("/content")
        return Reply(200, table, "application/octet-stream") if result else forward(request)

    with Gateway(endpoint, serve) as gateway:
        sft = make_sft(client=None, base_url=gateway.url)
        sft.run_full_pipeline(**SHORT)
    kept = record_of(sft)["metrics"]

    assert len(rows_of(sft)) == 5000
    assert [row["step"] for row in kept] == [1, *range(3, 5000, 3), 5000]
    assert kept[1] == {"step": 3, "train_loss": 1.0}
