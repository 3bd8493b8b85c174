"""Records that the first version has left: each kind of them is listed, resumed and evaluated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from endpoint import Rehearsal
from faults import CHAT, JOBS, asked, made
from helpers import posts, read_json

from openai_sft import DataError, OpenAISFT

MakeSFT = Callable[..., OpenAISFT]

BASE = "gpt-4o-mini-2024-07-18"
TUNED = "gpt-4.1-2025-04-14"  # a model that the endpoint has anyway
EVALUATED = {"max_test_cases": 1, "seed": 7, "baseline": True}
PLAN = {
    "epochs": 2,
    "batch_size": 4,
    "learning_rate_multiplier": "auto",
    "suffix": "窓口",
    "seed": 7,
    "evaluation": EVALUATED,
}
TRAINED: dict[str, Any] = {
    "job_id": "ftjob-1",
    "job_status": "succeeded",
    "job_error": None,
    "fine_tuned_model": TUNED,
    "trained_tokens": 1646,
    "result_files": ["file-1"],
    "checkpoints": [f"{TUNED}:ckpt-step-4"],
    "final_metrics": {"step": 4.0, "train_loss": 0.25, "valid_loss": 0.5},
    "cost": {"training_usd": 0.005, "total_usd": 0.005},
    "training_recorded_at": "2026-11-25T15:00:36+00:00",
}
DONE = {**TRAINED, "plan": PLAN, "finished_at": "2026-11-25T15:00:36+00:00"}


class Left:
    """A record as the first version wrote it, beside data files and without a newer one."""

    def __init__(self, make_sft: MakeSFT, kind: str, **facts: Any) -> None:
        with make_sft() as sft:
            self.files = sft.prepare_data(seed=7).files
        self.path = Path(self.files["record"])
        now = read_json(self.path)
        self.name: str = now["run_id"]
        self.data = now["data"]
        taken = ("run_id", "started_at", "versions", "settings", "data", "selection", "files")
        kept = {key: now[key] for key in taken} | {"exact_tokens": True, "plan": None}
        known = {"version": 1, "rehearsal": False, "kind": kind, **kept, **facts}
        self.write({key: value for key, value in known.items() if value != "absent"})

    def write(self, facts: dict[str, Any]) -> None:
        self.path.write_text(json.dumps(facts, ensure_ascii=False, indent=2), "utf-8")

    def upload(self, part: str, **facts: Any) -> dict[str, Any]:
        """What the first version kept of a file that it sent."""
        name = {"training": "train", "validation": "valid"}[part]
        path = Path(self.files[name])
        return {
            "name": path.name,
            "bytes": path.stat().st_size,
            "sha256": self.data[name]["sha256"],
            "intent_time": 1795618836.2867873,
            "other_content": ["file-other"],
            **facts,
        }


def send(sft: OpenAISFT, path: str) -> str:
    with Path(path).open("rb") as opened:
        return sft.client.files.create(file=opened, purpose="fine-tune").id


# ── A run from end to end ────────────────────────────────────────────────────────────────────


def test_a_run_that_had_sent_nothing_trains_and_asks_as_it_was_planned(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    left = Left(make_sft, "pipeline", plan=PLAN)
    with make_sft() as sft:
        results = sft.resume(left.name)
    (job,) = posts(endpoint, JOBS)
    record = read_json(left.path)

    assert results is not None
    assert job.request["method"]["supervised"]["hyperparameters"] == {
        "n_epochs": 2,
        "batch_size": 4,
        "learning_rate_multiplier": "auto",
    }
    assert (job.request["suffix"], job.request["seed"]) == ("窓口", 7)
    assert results["comparison"]["baseline_model"] == BASE
    assert results["summary"]["total_cases_evaluated"] == 2
    assert {e.request["seed"] for e in asked(endpoint, "POST", CHAT)} == {7}
    assert (record["version"], record["run_id"]) == (2, left.name)
    assert record["fine_tuned_model"] == results["model_id"]
    assert make_sft().resume(left.name) is None


def test_a_run_whose_job_was_made_without_its_learning_so_finds_its_files_and_its_job(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    left = Left(make_sft, "pipeline", plan=PLAN)
    with make_sft() as sft:
        sent = {"training": send(sft, left.files["train"])}
        sent["validation"] = send(sft, left.files["valid"])
        request = {"model": BASE, "training_file": sent["training"], "seed": 7}
        job = sft.client.fine_tuning.jobs.create(
            **request, metadata={"openai_sft_intent": "zeichen"}
        )
        intent = {"token": "zeichen", "at": "2026-11-25T15:00:36+00:00", "request": request}
        uploads = {part: left.upload(part, file_id=sent[part]) for part in sent}
        left.write({**read_json(left.path), "uploads": uploads, "job_intent": intent})
        results = sft.resume()

    assert results is not None
    assert read_json(left.path)["job_id"] == job.id
    assert made(endpoint, JOBS) == 1
    assert made(endpoint, "/files") == 2


def test_an_upload_whose_answer_was_lost_is_looked_for(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    left = Left(make_sft, "pipeline", plan=PLAN)
    with make_sft() as sft:
        file_id = send(sft, left.files["train"])
        left.write({**read_json(left.path), "uploads": {"training": left.upload("training")}})
        assert sft.resume() is not None
    (job,) = posts(endpoint, JOBS)

    assert job.request["training_file"] == file_id
    assert made(endpoint, "/files") == 2


def test_a_trained_run_is_evaluated_within_what_is_left_of_its_limit(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    left = Left(make_sft, "pipeline", **TRAINED, plan=PLAN)
    with make_sft(max_cost_usd=0.006) as sft:
        results = sft.resume()

    assert results is not None
    assert results["model_id"] == TUNED
    assert results["cost"]["training_usd"] == 0.005
    assert results["summary"]["training_cross_entropy"] == 0.25
    assert posts(endpoint, JOBS) == []
    assert read_json(left.path)["finished_at"]


# ── An evaluation ────────────────────────────────────────────────────────────────────────────


def test_an_evaluation_of_a_recorded_split_goes_on_where_it_stopped(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    tuned = Left(make_sft, "pipeline", **DONE)
    plan = {"model_id": TUNED, "split_of": tuned.name, "selection": None, "evaluation": EVALUATED}
    nothing = dict.fromkeys(("data", "selection", "files", "exact_tokens"), "absent")
    left = Left(make_sft, "evaluation", **{**nothing, "plan": plan})
    journal = left.path.with_name(f"evaluation_{left.name.removeprefix('run_')}.jsonl")
    asked_for = {"model_id": TUNED, "baseline": BASE}
    left.write(
        {**read_json(left.path), "files": {"journal": str(journal)}, "evaluation": asked_for}
    )
    with make_sft() as sft:
        results = sft.resume(left.name)
    ids = [line["id"] for line in read_json(tuned.files["manifest"])["splits"]["test"]["lines"]]

    assert results is not None
    assert (results["model_id"], results["comparison"]["baseline_model"]) == (TUNED, BASE)
    assert results["test_evaluation"]["responses"][0]["case_id"].rpartition(":")[0] in ids
    assert len(asked(endpoint, "POST", CHAT)) == 4
    assert make_sft().resume() is None


def test_an_evaluation_of_a_model_made_elsewhere_draws_its_split_again(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    selection = {"max_samples": 15, "seed": 3, "group_by": None, "topics": None}
    plan = {"model_id": TUNED, "split_of": None, "selection": selection, "evaluation": EVALUATED}
    nothing = dict.fromkeys(("data", "selection", "files", "exact_tokens"), "absent")
    left = Left(make_sft, "evaluation", **{**nothing, "plan": plan})
    with make_sft() as sft:
        results = sft.resume(left.name)

    assert results is not None
    assert results["test_evaluation"]["total_test_cases"] == 2
    assert len(asked(endpoint, "POST", CHAT)) == 4


# ── Steps, a job from elsewhere, data alone ──────────────────────────────────────────────────


def test_a_job_of_steps_is_watched_in_its_own_record_and_asked_its_own_split(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    left = Left(make_sft, "steps", plan="absent", exact_tokens="absent")
    with make_sft() as sft:
        sent = send(sft, left.files["train"])
        job = sft.client.fine_tuning.jobs.create(model=BASE, training_file=sent)
        uploads = {"training": left.upload("training", file_id=sent, reused=False)}
        left.write({**read_json(left.path), "uploads": uploads, "job_id": job.id})
        ended = sft.monitor_fine_tune_job(job.id)
        results = sft.run_evaluation(max_test_cases=1)
    record = read_json(left.path)

    assert record["kind"] == "steps"
    assert record["fine_tuned_model"] == ended.fine_tuned_model == results["model_id"]
    assert record["cost"]["training_usd"] > 0
    ids = [line["id"] for line in read_json(left.files["manifest"])["splits"]["test"]["lines"]]
    assert results["test_evaluation"]["responses"][0]["case_id"].rpartition(":")[0] in ids
    assert results["settings"]["seed"] == 7
    assert make_sft().resume() is None


def test_the_model_of_a_job_from_elsewhere_is_evaluated(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    nothing = dict.fromkeys(("data", "selection", "files", "exact_tokens", "plan"), "absent")
    Left(make_sft, "job", **{**nothing, **TRAINED})
    with make_sft() as sft:
        results = sft.run_evaluation(max_test_cases=1)

    assert results["model_id"] == TUNED
    assert results["summary"]["validation_cross_entropy"] == 0.5
    assert make_sft().resume() is None


@pytest.mark.parametrize("files", ["of the first", "none"])
def test_a_plan_that_was_copied_from_the_run_before_is_nobodys(
    make_sft: MakeSFT, endpoint: Rehearsal, files: str
) -> None:
    """A second job or evaluation of one instance took it along, and nobody was to finish it."""
    first = Left(make_sft, "pipeline", **DONE)
    taken = {key: value for key, value in first.files.items() if key != "record"}
    copied = Left(make_sft, "pipeline", plan=PLAN, files=taken if files == "of the first" else {})

    assert make_sft().resume(copied.name) is make_sft().resume() is None
    assert len(make_sft().list_runs()) == 2
    assert posts(endpoint) == []


@pytest.mark.parametrize("kind", ["pipeline", "evaluation", "steps", "job", "data"])
def test_every_kind_is_listed_with_its_job_and_model(
    make_sft: MakeSFT, endpoint: Rehearsal, kind: str
) -> None:
    left = Left(make_sft, kind, **(DONE if kind != "data" else {}))
    (row,) = make_sft().list_runs()

    assert row.run_id == left.name
    assert row.model == (TUNED if kind != "data" else None)
    assert row.job_id == ("ftjob-1" if kind != "data" else None)
    assert make_sft().resume() is None


def test_a_record_of_a_version_to_come_is_refused_and_left_alone(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    left = Left(make_sft, "pipeline", version=3, plan=PLAN)
    before = left.path.read_bytes()
    with pytest.raises(DataError, match="この版では"):
        make_sft().resume(left.name)

    assert make_sft().resume() is None
    assert left.path.read_bytes() == before
    assert endpoint.exchanges == []
