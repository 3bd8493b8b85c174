"""What an asked model was trained on in this folder isn't evaluated, and that is told."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from endpoint import Rehearsal
from faults import CHAT, asked
from helpers import (
    Ended,
    examples,
    posts,
    read_json,
    recorded_run,
    records,
    training_file,
    write_jsonl,
)

from openai_sft import DataError, OpenAISFT

MakeSFT = Callable[..., OpenAISFT]
Log = Callable[[], list[str]]

BASE, OTHER = "gpt-4o-mini-2024-07-18", "gpt-4.1-2025-04-14"  # both answer without being tuned


def tune(sft: OpenAISFT, file: Path) -> str:
    """A model that is tuned on a file, step by step."""
    job_id = sft.create_fine_tune_job(sft.upload_training_file(file), 1, 4)
    return str(sft.monitor_fine_tune_job(job_id).fine_tuned_model)


def told(log: Log) -> list[str]:
    return [line for line in log() if "学習に使って" in line]


def asked_dialogues(endpoint: Rehearsal) -> set[str]:
    """The first words of the conversations that were asked."""
    return {
        next(m["content"] for m in e.request["messages"] if m["role"] == "user")
        for e in asked(endpoint, "POST", CHAT)
    }


def other_is_tuned(out: Path, file: Path, base: str = BASE) -> None:
    """A record that says that ``OTHER`` was tuned on a file."""
    upload = {
        "name": file.name,
        "bytes": file.stat().st_size,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "intent_time": 1.0,
        "file_id": "file-1",
        "path": str(file),
    }
    recorded_run(
        out,
        "20260101_000000",
        settings={"model": base},
        job_id="ftjob-1",
        job_status="succeeded",
        fine_tuned_model=OTHER,
        uploads={"training": upload},
    )


def test_what_a_model_was_trained_on_is_not_asked_and_told_with_its_counts(
    make_sft: MakeSFT, endpoint: Rehearsal, file: Path, log: Log
) -> None:
    sft = make_sft()
    model = tune(sft, file)
    results = sft.evaluate_model_comprehensive(model, examples(15), examples(14)[10:], 0)
    (line,) = told(log)

    assert asked_dialogues(endpoint) == {"相談13", "相談14", "相談15"}
    assert results["summary"]["test_cases_evaluated"] == 3
    assert results["test_evaluation"]["total_test_cases"] == 3
    assert results["left_out"] == {"test": 12, "valid": 2}
    assert f"{model}（run_" in line
    assert "（テスト12件、検証2件）" in line


@pytest.mark.parametrize("baseline", [True, False])
def test_a_baseline_that_was_trained_on_a_case_takes_it_from_both(
    make_sft: MakeSFT, endpoint: Rehearsal, file: Path, log: Log, baseline: bool
) -> None:
    sft = make_sft()
    model = tune(sft, file)
    test = examples(15)
    results = sft.evaluate_model_comprehensive(
        OTHER, test, [], 0, baseline=model if baseline else None
    )

    assert len(told(log)) == baseline
    assert results["test_evaluation"]["evaluated_cases"] == (3 if baseline else 15)
    assert ("left_out" in results) == baseline


def test_what_the_model_was_tuned_from_was_trained_on_counts_as_well(
    make_sft: MakeSFT, out: Path, file: Path, log: Log, clean_environment: Path
) -> None:
    with make_sft() as sft:
        first = tune(sft, file)
    folder = clean_environment / "second"
    folder.mkdir()
    rows = [{"messages": one["messages"]} for one in examples(30)[18:]]
    other_is_tuned(out, write_jsonl(folder / "second.jsonl", rows), base=first)
    results = make_sft().evaluate_model_comprehensive(OTHER, examples(30), [], 0)

    assert results["left_out"] == {"test": 24, "valid": 0}
    assert "（テスト24件、検証0件）" in told(log)[0]
    assert first.startswith("ft:")


def test_instructions_and_weights_make_no_other_conversation(
    make_sft: MakeSFT, out: Path, file: Path
) -> None:
    other_is_tuned(out, file)
    test = examples(13)
    for one in test:
        one["messages"].insert(0, {"role": "system", "content": "傾聴してください。"})
        one["messages"][2]["weight"] = 0
    results = make_sft().evaluate_model_comprehensive(OTHER, test, [], 0)

    assert results["left_out"] == {"test": 12, "valid": 0}


def test_where_nothing_is_left_nobody_is_asked(
    make_sft: MakeSFT, endpoint: Rehearsal, out: Path, file: Path
) -> None:
    other_is_tuned(out, file)
    with pytest.raises(DataError, match="12件すべて"):
        make_sft().evaluate_model_comprehensive(OTHER, examples(12), examples(20))
    results = make_sft().evaluate_model_comprehensive(OTHER, [], examples(13), 0)

    assert results["left_out"] == {"test": 0, "valid": 12}
    assert asked_dialogues(endpoint) == {"相談13"}


def test_a_base_model_that_knows_all_of_the_test_is_refused_before_anything_is_sent(
    make_sft: MakeSFT,
    endpoint: Rehearsal,
    out: Path,
    cli: Callable[..., Ended],
    place: Callable[[str], tuple[str, ...]],
) -> None:
    with make_sft() as sft:
        files = sft.prepare_data(seed=1).files
    other_is_tuned(out, Path(files["test"]))
    ended = cli(*place(endpoint.url), "--seed", "1", "--yes", "--model", OTHER)

    assert ended.code == 2
    assert "評価できるテストデータが残りません。2件すべて" in ended.errors[0]
    assert posts(endpoint) == []


def test_a_run_whose_validation_was_trained_on_validates_all_the_same(
    make_sft: MakeSFT, endpoint: Rehearsal, out: Path, dataset: Path
) -> None:
    with make_sft() as sft:
        other_is_tuned(out, Path(sft.prepare_data(seed=1).files["valid"]))
    sft = make_sft()
    results = sft.run_full_pipeline(1, 4, seed=1, baseline=OTHER, max_test_cases=0)
    record = read_json(sft.files["record"])

    assert results["left_out"] == record["left_out"] == {"test": 0, "valid": 2}
    assert results["summary"]["valid_cases_evaluated"] == 0
    assert record["uploads"]["validation"]["file_id"]


def test_a_model_of_another_split_of_the_same_data_is_found_out(
    make_sft: MakeSFT, endpoint: Rehearsal, clean_environment: Path, log: Log
) -> None:
    path = write_jsonl(clean_environment / "many.jsonl", records(40))
    with make_sft(dataset=str(path)) as sft:
        first = sft.run_full_pipeline(1, 4, seed=1, max_test_cases=1)["model_id"]
        trained = Path(sft.files["train"]).read_text("utf-8").splitlines()
    with make_sft(dataset=str(path)) as sft:
        results = sft.run_full_pipeline(1, 4, seed=2, max_test_cases=0, baseline=first)
        test, valid = (
            Path(sft.files[name]).read_text("utf-8").splitlines() for name in ("test", "valid")
        )
    known = {"test": len({*test} & {*trained}), "valid": len({*valid} & {*trained})}

    assert results["left_out"] == known
    assert results["test_evaluation"]["evaluated_cases"] == len(test) - known["test"]
    assert first in told(log)[-1]


def test_of_a_smaller_sample_nothing_has_to_be_left_out(
    make_sft: MakeSFT, clean_environment: Path, log: Log
) -> None:
    path = write_jsonl(clean_environment / "many.jsonl", records(40))
    with make_sft(dataset=str(path)) as sft:
        first = sft.run_full_pipeline(1, 4, 15, max_test_cases=1)["model_id"]
    with make_sft(dataset=str(path)) as sft:
        results = sft.run_full_pipeline(1, 4, max_test_cases=1, baseline=first)

    assert "left_out" not in results
    assert told(log) == []


def test_only_the_files_of_asked_models_are_read_and_one_that_is_gone_is_named(
    make_sft: MakeSFT, out: Path, clean_environment: Path, log: Log
) -> None:
    gone = training_file(clean_environment, 13)
    other_is_tuned(out, gone)
    gone.unlink()
    make_sft().evaluate_model_comprehensive(BASE, examples(3), [])
    before = [line for line in log() if gone.name in line]
    make_sft().evaluate_model_comprehensive(OTHER, examples(3), [])
    after = [line for line in log() if gone.name in line]

    assert before == []
    assert ["確かめられません" in line for line in after] == [True]


def test_of_several_files_the_one_that_was_trained_on_counts(
    make_sft: MakeSFT, clean_environment: Path, file: Path
) -> None:
    sft = make_sft()
    others = [{"messages": one["messages"]} for one in examples(30)[15:]]
    first = sft.upload_training_file(file)
    sft.upload_training_file(write_jsonl(clean_environment / "others.jsonl", others))
    job = sft.monitor_fine_tune_job(sft.create_fine_tune_job(first, 1, 4))
    results = sft.evaluate_model_comprehensive(str(job.fine_tuned_model), examples(30), [], 1)

    assert results["left_out"] == {"test": 12, "valid": 0}
