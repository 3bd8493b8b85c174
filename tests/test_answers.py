"""The table of an evaluation's answers for spreadsheets, and the page that is written beside it."""

from __future__ import annotations

import csv
import hashlib
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from endpoint import Fault, Rehearsal
from faults import CHAT, JOBS
from helpers import Ended, example, examples, read_json, recorded_run

from openai_sft import ConfigurationError, EvaluationFailed, JobFailed, OpenAISFT

MakeSFT = Callable[..., OpenAISFT]
BASE = "gpt-4o-mini-2024-07-18"
SHORT: dict[str, Any] = {"epochs": 1, "batch_size": 4}
FORMULAS = ("=1+1", "+81-3", "-1", "@SUM(A1)", "\t=1+1", " =1+1", "\r=1+1", "＝１+1", "－1")


def rows_of(path: str | Path) -> list[dict[str, str]]:
    with Path(path).open(encoding="utf-8-sig", newline="") as table:
        return list(csv.DictReader(table))


def evaluated(sft: OpenAISFT, data: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    results = sft.evaluate_model_comprehensive(BASE, data, [], 0, **options)
    sft.save_results(results)
    return results


# ── The table ────────────────────────────────────────────────────────────────────────────────


def test_the_table_has_a_row_a_case_with_what_each_has_said(
    make_sft: MakeSFT, example_file: Path
) -> None:
    sft = make_sft(dataset=str(example_file))
    results = sft.run_full_pipeline(**SHORT, max_test_cases=0, baseline=True)
    path = Path(sft.files["answers"])
    rows, parts = rows_of(path), ("test", "valid")
    asked = [(p, r) for p in parts for r in results[f"{p}_evaluation"]["responses"]]

    assert path.read_bytes().startswith(b"\xef\xbb\xbf")  # by which Excel knows UTF-8
    assert len(rows) == len(asked) == 4
    for row, (split, response) in zip(rows, asked, strict=True):
        theirs = results["baseline"][f"{split}_evaluation"]["responses"][response["case_id"]]
        assert (row["split"], row["topic"]) == (split, response["topic"])
        assert f"{row['dialogue_id']}:{row['turn']}" == response["case_id"]
        assert float(row["dialogue_score"]) == response["dialogue_score"]
        assert row["client"] == response["input"][-1]["content"]
        assert row["reference"] == response["reference"]
        assert (row["tuned"], row["baseline"]) == (response["output"], theirs["output"])
        assert int(row["completion_tokens"]) == response["usage"]["completion_tokens"]
        assert float(row["latency_seconds"]) == response["latency_seconds"]
        for name, score in response["scores"].items():
            assert float(row[name]) == score
            assert float(row[f"baseline_{name}"]) == theirs["scores"][name]
        assert row["error"] == row["baseline_error"] == ""


def test_a_case_without_an_answer_keeps_its_row_and_says_why(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    endpoint.inject(Fault("400", "POST", CHAT))
    sft = make_sft()
    evaluated(sft, examples(3), concurrency=1)
    rows = rows_of(sft.files["answers"])

    assert [bool(row["error"]) for row in rows] == [True, False, False]
    assert [bool(row["tuned"]) for row in rows] == [False, True, True]


@pytest.mark.parametrize("formula", FORMULAS, ids=ascii)
def test_no_cell_is_run_as_a_formula(make_sft: MakeSFT, formula: str) -> None:
    sft = make_sft()
    evaluated(sft, [example(f"={n}", formula, formula) for n in range(2)])

    for row in rows_of(sft.files["answers"]):
        assert row["client"] == row["reference"] == f"'{formula}"
        assert row["dialogue_id"].startswith("'=")
        assert float(row["rouge_l"]) >= 0


@pytest.mark.skipif(shutil.which("soffice") is None, reason="needs LibreOffice")
def test_a_spreadsheet_shows_every_row_and_runs_none(make_sft: MakeSFT, out: Path) -> None:
    sft = make_sft()
    texts = [*FORMULAS, '二行\nと"引用",', "😀\u2028\x85"]
    evaluated(sft, [example(f"d{n}", text, text) for n, text in enumerate(texts)])
    path = Path(sft.files["answers"])
    home = f"-env:UserInstallation={(out / 'office').as_uri()}"
    filters = [
        "--infilter=CSV:44,34,76,1",
        "--convert-to",
        "csv:Text - txt - csv (StarCalc):44,34,76",
    ]
    subprocess.run(
        ["soffice", home, "--headless", *filters, "--outdir", out / "shown", path],
        check=True,
        capture_output=True,
        timeout=110,
    )
    shown, written = rows_of(out / "shown" / path.name), rows_of(path)

    def texts_of(rows: list[dict[str, str]]) -> list[str]:
        return [row["reference"].replace("\r", "\n").strip() for row in rows]

    assert texts_of(shown) == texts_of(written)


# ── The page ─────────────────────────────────────────────────────────────────────────────────


def test_every_evaluation_writes_a_page_also_one_in_which_nothing_was_answered(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    sft = make_sft()
    results = sft.run_full_pipeline(**SHORT)
    page = Path(sft.files["report"]).read_text("utf-8")
    endpoint.inject(Fault("400", "POST", CHAT, times=None))
    other = make_sft()
    with pytest.raises(EvaluationFailed):
        other.run_evaluation(BASE)

    assert results["model_id"] in page
    assert results["test_evaluation"]["responses"][0]["reference"] in page
    assert hashlib.sha256(Path(sft.files["train"]).read_bytes()).hexdigest() in page
    assert Path(other.files["report"]).exists()
    assert "finished_at" not in read_json(other.files["record"])
    assert [row["tuned"] for row in rows_of(other.files["answers"])] == ["", "", "", ""]


def test_the_page_is_made_again_from_the_files_alone(make_sft: MakeSFT, out: Path) -> None:
    with make_sft() as sft:
        sft.run_full_pipeline(**SHORT)
        path, run = Path(sft.files["report"]), Path(sft.files["record"]).stem
    page = path.read_text("utf-8")
    path.unlink()
    with OpenAISFT(output_dir=out, allow_no_key=True, verbose=False) as reader:
        again = [reader.write_report(name) for name in (None, run)]

        assert reader.files == {}  # none of its own
    assert again == [str(path)] * 2
    assert path.read_text("utf-8") == page


def test_a_page_without_texts_holds_no_dialogue_and_no_answer_and_has_a_name_of_its_own(
    make_sft: MakeSFT,
) -> None:
    sft = make_sft()
    results = sft.run_full_pipeline(**SHORT, baseline=True)
    whole = Path(sft.files["report"]).read_text("utf-8")
    path = Path(sft.write_report(texts=False))
    page = path.read_text("utf-8")

    assert path.name.startswith("report_without_texts_")
    for response in results["test_evaluation"]["responses"]:
        for text in (response["output"], response["reference"], response["input"][-1]["content"]):
            assert text.splitlines()[0] in whole
            assert text.splitlines()[0] not in page
    assert Path(sft.files["report"]).read_text("utf-8") == whole


def test_a_job_that_failed_has_a_page(make_sft: MakeSFT, endpoint: Rehearsal) -> None:
    endpoint.inject(Fault("job_failed", "POST", JOBS))
    sft = make_sft()
    with pytest.raises(JobFailed) as failed:
        sft.run_full_pipeline(**SHORT)
    page = Path(sft.write_report()).read_text("utf-8")

    assert failed.value.message in page


def test_a_run_that_is_not_here_has_no_page(out: Path) -> None:
    reader = OpenAISFT(output_dir=out, allow_no_key=True, verbose=False)
    with pytest.raises(ConfigurationError, match="保存先にありません"):
        reader.write_report()
    with pytest.raises(ConfigurationError, match="--list"):
        reader.write_report("run_20260101_000000")


def test_an_old_record_has_a_page(out: Path) -> None:
    recorded_run(out, "20260101_000000", job_id="ftjob-1", job_status="succeeded")
    reader = OpenAISFT(output_dir=out, allow_no_key=True, verbose=False)

    assert "ftjob-1" in Path(reader.write_report()).read_text("utf-8")


def test_the_command_line_makes_the_page_without_a_key(
    make_sft: MakeSFT, cli: Callable[..., Ended]
) -> None:
    with make_sft() as sft:
        sft.run_full_pipeline(**SHORT)
        run = Path(sft.files["record"]).stem
    newest = cli("--output-dir", "out", "--report")
    named = cli("--output-dir", "out", "--report", run, "--report-without-texts")
    alone = cli("--report-without-texts")

    assert (newest.code, newest.out) == (0, f"report: out/report_{run[4:]}.html\n")
    assert named.out == f"report: out/report_without_texts_{run[4:]}.html\n"
    assert alone.code == 2
    assert "--report と一緒に" in alone.err
