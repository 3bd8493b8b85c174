"""What a person sees while a job trains and at its end, on a terminal and in a log file."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from endpoint import Rehearsal
from helpers import Ended, Script, job, read_json

import openai_sft_example
from openai_sft import PRICES, EvaluationResults, OpenAISFT

MakeSFT = Callable[..., OpenAISFT]
Log = Callable[[], list[str]]
LONG: dict[str, Any] = {"epochs": 5, "batch_size": 4, "max_test_cases": 2}


def metrics(step: int, total: int, moment: int, **losses: float) -> dict[str, Any]:
    data = {"step": step, "total_steps": total, **losses}
    return {
        **{"id": f"ftevent-{step}", "object": "fine_tuning.job.event", "level": "info"},
        **{"created_at": moment, "message": f"Step {step}", "type": "metrics", "data": data},
    }


def screen_of(sft: OpenAISFT, results: EvaluationResults) -> list[str]:
    return list(openai_sft_example.screen(sft, results))


# ── While it runs ────────────────────────────────────────────────────────────────────────────


def test_each_epoch_ends_in_one_line_with_its_losses(make_sft: MakeSFT, log: Log) -> None:
    sft = make_sft()
    sft.run_full_pipeline(**LONG)
    told = [line for line in log() if line.startswith("[学習]")]
    rows = {row["step"]: row for row in read_json(sft.files["record"])["metrics"]}

    assert len(told) == 5
    for epoch, line in enumerate(told, 1):
        row = rows[4 * epoch]
        assert line.startswith(f"[学習] エポック {epoch}/5（step {4 * epoch}/20）: ")
        assert (
            f"学習の損失 {row['train_loss']:.4f}、検証の損失 {row['full_valid_loss']:.4f}" in line
        )
        assert "経過 " in line
        assert ("残り約" in line) == (epoch < 5)


def test_what_is_left_is_told_by_the_times_of_the_events_and_before_them_by_the_service(
    make_sft: MakeSFT, log: Log
) -> None:
    finish = datetime(2026, 12, 24, 18, 30).astimezone()
    events = [metrics(50, 300, 1000, train_loss=2.0), metrics(100, 300, 4600, train_loss=1.5)]
    events[1]["data"]["valid_loss"] = 1.75
    running = job("running", estimated_finish=finish.timestamp(), hyperparameters={"n_epochs": 3})
    page = {"object": "list", "data": events[::-1], "has_more": False}
    answers = {
        "/jobs/ftjob-script/events": [{**page, "data": []}, page],
        "/jobs/ftjob-script": [running, running, job("succeeded")],
    }
    with Script(**answers) as script:
        make_sft(base_url=script.url, client=None, sleep=lambda _: None).monitor_fine_tune_job(
            "ftjob-script"
        )

    assert [line for line in log() if "見込み" in line] == [
        "学習が終わる見込み（サービスの推定）: 2026-12-24 18:30"
    ]
    assert [line for line in log() if line.startswith("[学習]")] == [
        "[学習] エポック 1/3（step 100/300）: 学習の損失 1.5000、検証の損失 1.7500、"
        "経過 1時間00分、残り約4時間00分"
    ]


def test_a_moment_that_no_calendar_has_is_not_told(make_sft: MakeSFT, log: Log) -> None:
    answers = {
        "/jobs/ftjob-script/events": [{"object": "list", "data": [], "has_more": False}],
        "/jobs/ftjob-script": [job("running", estimated_finish=10**18), job("succeeded")],
    }
    with Script(**answers) as script:
        done = make_sft(
            base_url=script.url, client=None, sleep=lambda _: None
        ).monitor_fine_tune_job("ftjob-script")

    assert done.status == "succeeded"
    assert not any("見込み" in line for line in log())


def test_where_the_validation_loss_was_lowest_is_told_in_the_end(
    make_sft: MakeSFT, log: Log
) -> None:
    make_sft().run_full_pipeline(2, 4, max_test_cases=1)
    falling = [line for line in log() if "が最も低く、途中から上がってはいません" in line]
    results = make_sft().run_full_pipeline(**LONG)
    (rising,) = [line for line in log() if "途中から上がりました" in line]

    assert len(falling) == 1
    assert falling[0].startswith("検証の損失は最後（エポック2、step 8）の0.")
    assert results["training"]["loss_sentence"] == rising


# ── The last screen ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("options", [{}, {"baseline": True, "max_test_cases": 0}], ids=str)
@pytest.mark.parametrize("task", ["response", "score"])
def test_the_last_screen_fits_24_lines_of_80_columns(
    example_file: Path,
    make_sft: MakeSFT,
    monkeypatch: pytest.MonkeyPatch,
    task: Any,
    options: dict[str, Any],
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    sft = make_sft(dataset=str(example_file), task=task)
    results = sft.run_full_pipeline(**(LONG | options))
    long = "とても長い応答です。" * 50
    for response in results["test_evaluation"]["responses"]:
        response |= {"output": long, "reference": long}
    for note in (True, False):
        if not note:
            results.pop("rehearsal")
        lines = screen_of(sft, results)

        assert sum(-(-openai_sft_example.columns(line) // 80) for line in lines) < 24
        assert lines[0] == f"モデル: {results['model_id']}"
        assert any("学習の損失 █" in line for line in lines)
        assert any(line == f"ページ: {sft.files['report']}" for line in lines)
        assert any("判定" in line for line in lines)
        assert ("学習後" in "".join(lines)) == (task == "response")


def test_the_screen_shows_two_answers_side_by_side(make_sft: MakeSFT, example_file: Path) -> None:
    sft = make_sft(dataset=str(example_file))
    results = sft.run_full_pipeline(**LONG, baseline=True)
    pairs = [line.split(" │ ") for line in screen_of(sft, results) if " │ " in line]
    shown = ["".join(side) for side in zip(*pairs, strict=True)]
    responses = results["test_evaluation"]["responses"]
    rivals = results["baseline"]["test_evaluation"]["responses"]

    assert [cell.strip() for cell in pairs[0]] == ["学習後", "基準のモデル"]
    for response in responses:
        assert response["output"][:10] in shown[0].replace(" ", "")
        assert rivals[response["case_id"]]["output"][:10] in shown[1]


def test_the_next_command_is_to_ask_all_cases_with_what_that_costs(
    make_sft: MakeSFT, endpoint: Rehearsal, example_file: Path
) -> None:
    sft = make_sft(dataset=str(example_file))
    results = sft.run_full_pipeline(**(LONG | {"max_test_cases": 1}))
    results.pop("rehearsal")
    lines = screen_of(sft, results)
    whole = sft.run_evaluation(max_test_cases=0, baseline=True)
    cost = results["all_cases"]["usd"]
    said = [results[f"{name}_evaluation"]["responses"][0]["usage"] for name in ("test", "valid")]
    asked, answered = (sum(u[f"{kind}_tokens"] for u in said) for kind in ("prompt", "completion"))
    rates = [PRICES[sft.model].rates(tuned=tuned) for tuned in (True, False)]

    assert results["all_cases"]["cases"] == 4
    assert cost == pytest.approx(sum(rate.usd(2 * asked, 2 * answered) for rate in rates if rate))
    assert f"学習の{cost / results['cost']['training_usd']:.1%}" in lines[-2]
    assert lines[-1] == (
        f"openai-sft --evaluate-only --baseline --max-test-cases 0 --base-url {endpoint.url}"
        f" --dialect openai --output-dir {sft.output_dir}"
    )
    assert any(f'OpenAI(base_url="{endpoint.url}")' in line for line in lines)
    assert "all_cases" not in whole


def test_the_command_line_ends_with_the_screen_and_prints_the_tables_where_asked(
    cli: Callable[..., Ended],
) -> None:
    usual = cli("--rehearse", "--epochs", "1", "--max-test-cases", "1")
    tables = cli("--rehearse", "--epochs", "1", "--max-test-cases", "1", "--tables")

    assert usual.code == tables.code == 0
    assert "95%区間" not in usual.out
    assert "95%区間" in tables.out
    assert "comprehensive_evaluation: openai_sft_outputs/" in tables.out
    for ended in (usual, tables):
        assert "ページ: openai_sft_outputs/report_" in ended.out
        assert "openai-sft --data-only" in ended.out
