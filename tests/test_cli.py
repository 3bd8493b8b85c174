"""The command line: what it prints, where, and what it ends with."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from endpoint import Fault, Rehearsal
from faults import until
from helpers import (
    PROJECT,
    Ended,
    hearing_interrupts,
    posts,
    read_json,
    recorded_run,
    records,
    training_file,
    write_jsonl,
)

from openai_sft import OpenAISFT

pytestmark = pytest.mark.usefixtures("clean_environment")

HELP = Path(__file__).with_name("help.txt")
CHANGELOG = PROJECT / "CHANGELOG.md"
SCRIPT = str(PROJECT / "openai_sft_example.py")
JOBS = "/fine_tuning/jobs"
HEAVY = ("openai", "datasets", "tiktoken", "pyarrow", "psutil", "tqdm", "dotenv", "numpy")


@pytest.fixture
def asked(
    endpoint: Rehearsal, monkeypatch: pytest.MonkeyPatch, dataset: Path
) -> tuple[str | Path, ...]:
    """Arguments and a key for a short run against ``endpoint``, which asks before it pays."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    return (
        *("--base-url", endpoint.url, "--dialect", "openai", "--dataset", dataset),
        *("--poll-interval", "0"),
        *("--epochs", "1", "--batch-size", "4", "--max-test-cases", "1", "--output-dir", "out"),
    )


@pytest.fixture
def online(asked: tuple[str | Path, ...]) -> tuple[str | Path, ...]:
    """Arguments and a key for a short run that is agreed to."""
    return (*asked, "--yes")


def shell(
    *arguments: str | Path, program: Sequence[str] = (SCRIPT,), **options: Any
) -> subprocess.Popen[str]:
    """The command line in a process of its own, warnings being errors there too."""
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "PYTHONWARNINGS": "error"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    with hearing_interrupts():
        return subprocess.Popen(
            [sys.executable, *program, *map(str, arguments)],
            **(streams | options),
            env=environment,
            encoding="utf-8",
        )


def wait(process: subprocess.Popen[str]) -> Ended:
    try:
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    return Ended(process.returncode, out, err)


# ── Help ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("columns", ["20", "80", "300"])
def test_the_help_is_word_for_word_as_agreed_however_wide_the_terminal(
    cli: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)

    assert cli("--help") == cli("-h") == Ended(0, HELP.read_text("utf-8"), "")


def test_no_line_of_the_help_is_wider_than_a_terminal() -> None:
    for line in HELP.read_text("utf-8").splitlines():
        width = sum(2 if unicodedata.east_asian_width(c) in "WFA" else 1 for c in line)

        assert width <= 80, line


def test_the_help_names_every_flag_that_was_agreed() -> None:
    agreed = (
        "--epochs --batch-size --max-samples --seed --max-test-cases --data-only --evaluate-only "
        "--model-id --dataset --model --base-url --output-dir --suffix --yen-per-dollar "
        "--learning-rate-multiplier --system-prompt --poll-interval --rehearse --yes "
        "--max-cost-usd --quiet --verbose --revision --long-examples --min-score --max-score "
        "--topics --exclude-flagged --group-by --check-file --fix --json --check --resume --job-id "
        "--cancel --list --timeout --price-training --price-input --price-output "
        "--price-base-input --price-base-output --max-tokens --temperature --timeout-per-answer"
    )

    assert set(agreed.split()) <= set(re.findall(r"--[a-z-]+", HELP.read_text("utf-8")))


def test_how_it_is_asked_can_be_told_on_the_command_line(
    cli: Callable[..., Ended], place: Callable[[str], tuple[str, ...]], endpoint: Rehearsal
) -> None:
    how = ("--max-tokens", "77", "--temperature", "0.5", "--timeout-per-answer", "30")
    ended = cli(
        *place(endpoint.url),
        "--evaluate-only",
        "--model-id",
        OpenAISFT(offline=True).model,
        "--yes",
        *how,
    )
    sent = [exchange.request for exchange in posts(endpoint, "/chat/completions")]
    (record,) = Path("out").glob("run_*.json")

    assert ended.code == 0
    assert {(one["max_tokens"], one["temperature"]) for one in sent} == {(77, 0.5)}
    assert read_json(record)["plan"]["asking"]["timeout_per_answer"] == 30


def test_the_version_is_the_changelogs_newest(cli: Callable[..., Ended]) -> None:
    newest = re.search(r"^## \[(\d.*?)\] - \d{4}-\d\d-\d\d$", CHANGELOG.read_text("utf-8"), re.M)

    assert newest is not None
    assert cli("--version") == Ended(0, newest[1] + "\n", "")


def test_the_library_run_as_a_module_is_the_command_line() -> None:
    def run(*arguments: str) -> Ended:
        return wait(shell(*arguments, program=("-m", "openai_sft"), cwd=PROJECT))

    wrong = run("--epoch", "3")

    assert run("-h") == Ended(0, HELP.read_text("utf-8"), "")
    assert (wrong.code, wrong.out, len(wrong.errors)) == (2, "", 1)


def test_the_help_is_there_at_once() -> None:
    # What is installed has its bytecode.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}

    def seconds() -> float:
        before = os.times()
        command = [sys.executable, SCRIPT, "--help"]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True, env=environment)
        after = os.times()
        return (
            after.children_user
            - before.children_user
            + (after.children_system - before.children_system)
        )

    assert min(seconds() for _ in range(3)) < 0.2


def test_the_help_waits_for_no_heavy_import() -> None:
    code = (
        "import sys, runpy\n"
        f"sys.argv = [{SCRIPT!r}, '--help']\n"
        "try:\n"
        f"    runpy.run_path({SCRIPT!r}, run_name='__main__')\n"
        "finally:\n"
        f"    sys.stderr.write(' '.join(m for m in {HEAVY!r} if m in sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(PROJECT), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
    )

    assert done.returncode == 0
    assert done.stdout == HELP.read_text("utf-8")
    assert done.stderr == ""


# ── Exit 0 ───────────────────────────────────────────────────────────────────────────────────


def test_the_data_and_the_price_need_no_key(cli: Callable[..., Ended], dataset: Path) -> None:
    ended = cli("--data-only", "--dataset", dataset, "--output-dir", "out", "--epochs", "3")
    files = sorted(path.name.split("_data_")[0] for path in Path("out").glob("*_data_*.jsonl"))

    assert ended.code == 0
    assert ended.err == ""
    assert files == ["test", "train", "valid"]
    assert "学習 16件、テスト 2件、検証 2件" in ended.out
    assert re.search(r"学習: [\d,]+トークン × 3エポック = \$0\.\d{4}（約\d+円）", ended.out)
    assert re.search(r"評価: .*\$0\.\d{4}", ended.out)
    assert re.search(r"合計: \$0\.\d{4}（約\d+円）", ended.out)
    assert "1ドル=150円と仮定" in ended.out
    assert "推定" not in ended.out
    for path in Path("out").glob("*_data_*.jsonl"):
        assert str(path) in ended.out


def test_a_rehearsal_runs_in_a_fresh_process_without_a_key_a_warning_or_a_terminal() -> None:
    ended = wait(shell("--rehearse", "--epochs", "1", "--max-test-cases", "1"))
    (saved,) = Path("openai_sft_outputs").glob("comprehensive_evaluation_*.json")

    assert ended.code == 0
    assert ended.errors == []
    assert "Traceback" not in ended.err
    assert "Warning" not in ended.err
    assert "[監視] CPU: " in ended.err
    assert ":rehearsal:" in ended.out
    assert "GPTの性能とは無関係" in ended.out
    assert read_json(saved)["rehearsal"] is True


def test_a_whole_run_shows_its_results_on_stdout(
    cli: Callable[..., Ended], online: tuple[str, ...], endpoint: Rehearsal
) -> None:
    ended = cli(*online, "--suffix", "kokoro", "--seed", "7", "--tables")
    (saved,) = Path("out").glob("comprehensive_evaluation_*.json")
    created = posts(endpoint, JOBS)[0].request

    assert ended.code == 0
    assert ended.err == ""
    assert f"モデル: {read_json(saved)['model_id']}" in ended.out
    assert "テスト: 1件に応答、0件失敗" in ended.out
    assert str(saved) in ended.out
    assert (created["suffix"], created["seed"]) == ("kokoro", 7)


def test_every_option_of_training_reaches_the_service(
    cli: Callable[..., Ended], online: tuple[str, ...], endpoint: Rehearsal
) -> None:
    ended = cli(
        *online,
        *("--epochs", "auto", "--batch-size", "auto", "--learning-rate-multiplier", "auto"),
        *("--model", "gpt-4.1-mini-2025-04-14", "--system-prompt", "傾聴", "--max-samples", "15"),
    )
    (created,) = posts(endpoint, JOBS)

    assert ended.code == 0
    assert created.request["model"] == "gpt-4.1-mini-2025-04-14"
    assert set(created.request["method"]["supervised"]["hyperparameters"].values()) == {"auto"}
    (train,) = Path("out").glob("train_data_*.jsonl")
    lines = train.read_text("utf-8").splitlines()
    assert len(lines) == 12
    assert all(
        json.loads(line)["messages"][0] == {"role": "system", "content": "傾聴"} for line in lines
    )


def test_an_evaluation_alone_trains_nothing(
    cli: Callable[..., Ended], online: tuple[str, ...], endpoint: Rehearsal
) -> None:
    recorded_run(Path("out"), "20260101_000000", fine_tuned_model="gpt-4o-2024-08-06")
    newest = cli(*online, "--evaluate-only")
    named = cli(*online, "--evaluate-only", "--model-id", "gpt-4o-mini-2024-07-18")

    assert (newest.code, named.code) == (0, 0)
    assert "モデル: gpt-4o-2024-08-06" in newest.out
    assert "モデル: gpt-4o-mini-2024-07-18" in named.out
    assert posts(endpoint, JOBS) == posts(endpoint, "/files") == []


# ── Exit 2 ───────────────────────────────────────────────────────────────────────────────────


def test_without_a_key_one_line_says_how_to_set_it(cli: Callable[..., Ended]) -> None:
    ended = cli()

    assert ended.code == 2
    assert ended.out == ""
    assert ended.err.startswith("エラー: OpenAI API keyが設定されていません")
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--epochs", "0"], "epochs"),
        (["--epochs", "many"], "--epochs"),
        (["--epochs", "51"], "epochs"),
        (["--batch-size", "1.5"], "--batch-size"),
        (["--batch-size", "257"], "batch_size"),
        (["--learning-rate-multiplier", "-1"], "learning"),
        (["--learning-rate-multiplier", "nan"], "learning"),
        (["--suffix", "あ" * 65], "suffix"),
        (["--seed", "-1"], "seed"),
        (["--max-samples", "0"], "max_samples"),
        (["--max-samples", "auto"], "--max-samples"),
        (["--max-test-cases", "-1"], "max_test_cases"),
        (["--poll-interval", "-1"], "poll_interval"),
        (["--max-cost-usd", "-1"], "max_cost_usd"),
        (["--yen-per-dollar", "0"], "yen_per_dollar"),
        (["--system-prompt", "\udcff"], "system"),
        (["--base-url", "http://["], "base"),
        (["--data-only", "--epochs", "0"], "epochs"),
        (["--data-only", "--evaluate-only"], "同時に使えません"),
        (["--quiet", "--verbose"], "同時に使えません"),
        (["--epoch", "3"], "--epoch"),
        (["--unknown"], "--unknown"),
        (["stray"], "stray"),
        (["--seed"], "--seed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_option_is_one_clear_line_and_nothing_is_sent(
    cli: Callable[..., Ended],
    online: tuple[str, ...],
    endpoint: Rehearsal,
    arguments: list[str],
    words: str,
) -> None:
    ended = cli(*online, *arguments)

    assert ended.code == 2
    assert len(ended.errors) == 1
    assert words in ended.errors[0]
    assert "Traceback" not in ended.err
    assert posts(endpoint) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dataset", "nothing.json"], "nothing.json"),
        (["--dataset", "."], "対話が1件もありません"),
        (["--max-samples", "11"], "12件以上"),
        (["--max-cost-usd", "0"], "上限"),
        (["--max-cost-usd", "9", "--model", "gpt-4.1-nano-2025-04-14"], "不明"),
        (["--max-cost-usd", "0.001", "--epochs", "auto"], "上限"),
        (["--evaluate-only"], "--model-id"),
        (["--output-dir", "taken"], "taken"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_too_few_examples_and_too_high_a_price_end_with_2_before_the_upload(
    cli: Callable[..., Ended],
    online: tuple[str, ...],
    endpoint: Rehearsal,
    arguments: list[str],
    words: str,
) -> None:
    Path("taken").write_text("a file, not a folder")
    if arguments == ["--dataset", "."]:
        for path in Path.cwd().glob("*.jsonl"):
            path.unlink()
    ended = cli(*online, *arguments)

    assert ended.code == 2
    assert len(ended.errors) == 1
    assert words in ended.errors[0]
    assert posts(endpoint) == []


def test_data_that_cannot_be_read_is_named_with_its_line(
    cli: Callable[..., Ended], clean_environment: Path
) -> None:
    path = write_jsonl(clean_environment / "a.jsonl", records(12))
    path.write_text(path.read_text("utf-8") + '{"dialogue": [', "utf-8")
    ended = cli("--data-only", "--dataset", path)

    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert "a.jsonl:13" in ended.err


# ── Exit 1 ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("job_failed", "POST", JOBS), "server_error"),
        (Fault("training_not_available", "POST", JOBS), "training_not_available"),
        (Fault("401", "POST", "/files"), "OPENAI_API_KEY"),
        (Fault("403", "POST", JOBS), "許可"),
        (Fault("insufficient_quota", "POST", "/chat/completions"), "支払い"),
        (Fault("400", "POST", "/chat/completions", times=None), "すべて"),
    ],
    ids=lambda value: value.kind if isinstance(value, Fault) else "",
)
def test_what_the_service_fails_at_ends_with_1_and_one_clear_line(
    cli: Callable[..., Ended],
    online: tuple[str, ...],
    endpoint: Rehearsal,
    fault: Fault,
    words: str,
) -> None:
    endpoint.inject(fault)
    ended = cli(*online)

    assert ended.code == 1
    assert len(ended.errors) == 1
    assert words in ended.errors[0]
    assert "Traceback" not in ended.err
    assert "sk-secret" not in ended.err


def test_a_watched_job_that_fails_ends_with_1(
    cli: Callable[..., Ended], online: tuple[str, ...], endpoint: Rehearsal
) -> None:
    endpoint.inject(Fault("job_failed", "POST", JOBS))
    made = cli(*online)
    job_id = posts(endpoint, JOBS)[0].response["id"]
    watched = cli(*online, "--job-id", job_id)

    assert made.code == 1
    assert watched.code == 1
    assert f"{job_id}（failed）" in watched.out


def test_an_error_while_the_job_goes_on_says_so_and_how_to_come_back(
    cli: Callable[..., Ended], online: tuple[str, ...], endpoint: Rehearsal
) -> None:
    endpoint.hold("running")
    endpoint.inject(Fault("401", "GET", f"{JOBS}/*", skip=2))
    ended = cli(*online)
    job_id = posts(endpoint, JOBS)[0].response["id"]

    assert ended.code == 1
    assert len(ended.errors) == 1
    assert job_id in ended.err
    assert "料金" in ended.err
    back = rf"openai-sft --resume run_\d{{8}}_\d{{6}} --base-url {endpoint.url}"
    back += " --dialect openai --output-dir out"
    assert re.search(back, ended.err)


# ── Asking on a terminal ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("answer", "code"), [("\n", 2), ("はい\n", 0)], ids=["nothing", "yes"])
def test_on_a_terminal_the_price_is_shown_and_asked_about(
    asked: tuple[str, ...], endpoint: Rehearsal, answer: str, code: int
) -> None:
    terminal, inner = pty.openpty()
    try:
        process = shell(*asked, "--quiet", stdin=inner)
        os.write(terminal, answer.encode())
        ended = wait(process)
    finally:
        os.close(terminal)
        os.close(inner)

    assert ended.code == code
    assert "合計: $" in ended.err
    assert ended.err.index("合計: $") < ended.err.index("[y/N]")
    assert len(posts(endpoint, JOBS)) == (code == 0)
    assert code == 0 or posts(endpoint) == []


def test_yes_asks_nothing(online: tuple[str, ...], endpoint: Rehearsal) -> None:
    terminal, inner = pty.openpty()
    try:
        ended = wait(shell(*online, stdin=inner))
    finally:
        os.close(terminal)
        os.close(inner)

    assert ended.code == 0
    assert "[y/N]" not in ended.err
    assert len(posts(endpoint, JOBS)) == 1


@pytest.mark.parametrize(("answer", "status"), [("\n", "running"), ("y\n", "cancelled")])
def test_on_a_terminal_a_cancellation_is_asked_about(
    asked: tuple[str, ...], endpoint: Rehearsal, answer: str, status: str
) -> None:
    endpoint.hold("running")
    with OpenAISFT("k", base_url=endpoint.url, output_dir="out", verbose=False) as sft:
        file_id = sft.upload_training_file(training_file(Path.cwd()))
        job_id = sft.create_fine_tune_job(file_id, 1, 4)
        jobs = sft.client.fine_tuning.jobs
        until(lambda: jobs.retrieve(job_id).status == "running")
    terminal, inner = pty.openpty()
    try:
        process = shell(*asked, "--cancel", job_id, stdin=inner)
        os.write(terminal, answer.encode())
        ended = wait(process)
    finally:
        os.close(terminal)
        os.close(inner)
    with OpenAISFT("k", base_url=endpoint.url, output_dir="out", verbose=False) as sft:
        found = sft.client.fine_tuning.jobs.retrieve(job_id).status

    assert f"{job_id} を取り消しますか？ [y/N]" in ended.err
    assert (ended.code, found) == (0 if status == "cancelled" else 2, status)


# ── Nobody to ask ────────────────────────────────────────────────────────────────────────────


def test_a_run_that_stops_for_want_of_a_yes_has_shown_its_price(
    asked: tuple[str, ...], endpoint: Rehearsal
) -> None:
    ended = wait(shell(*asked, "--quiet"))

    assert ended.code == 2
    assert re.search(r"合計: \$\d", ended.err)
    assert ended.err.index("合計: $") < ended.err.index("エラー: ")
    assert "Traceback" not in ended.err
    assert posts(endpoint) == []


def test_an_evaluation_that_nobody_agrees_to_is_left_for_resume_with_its_training(
    cli: Callable[..., Ended], asked: tuple[str, ...], endpoint: Rehearsal
) -> None:
    endpoint.inject(Fault("insufficient_quota", "POST", "/chat/completions"))
    cli(*asked, "--yes")
    questions = len(posts(endpoint, "/chat/completions"))
    stopped = cli("--resume", *asked)
    unanswered = len(posts(endpoint, "/chat/completions"))
    gone_on = cli("--resume", *asked, "--yes")

    assert (stopped.code, gone_on.code) == (2, 0)
    assert len(stopped.errors) == 1
    assert "--yes" in stopped.err
    assert unanswered == questions
    assert len(posts(endpoint, JOBS)) == 1


def test_what_costs_nothing_needs_no_yes(
    cli: Callable[..., Ended], asked: tuple[str, ...], endpoint: Rehearsal
) -> None:
    endpoint.hold("running")
    with OpenAISFT("k", base_url=endpoint.url, output_dir="out", verbose=False) as sft:
        job_id = sft.create_fine_tune_job(sft.upload_training_file(training_file(Path.cwd())), 1, 4)
    ended = [cli(*asked, *deed) for deed in (["--list"], ["--data-only"], ["--cancel", job_id])]
    watched = cli(*asked, "--job-id", job_id)

    assert [one.code for one in ended] == [0, 0, 0]
    assert watched.code == 1
    assert f"{job_id}（cancelled）" in watched.out


# ── The list ─────────────────────────────────────────────────────────────────────────────────


def test_the_list_shows_what_is_recorded_and_then_only_what_the_endpoint_adds(
    cli: Callable[..., Ended], asked: tuple[str, ...], endpoint: Rehearsal
) -> None:
    def job_of(folder: str) -> str:
        with OpenAISFT("k", base_url=endpoint.url, output_dir=folder, verbose=False) as sft:
            file_id = sft.upload_training_file(training_file(Path.cwd()))
            return sft.cancel_job(sft.create_fine_tune_job(file_id, 1, 4)).id

    endpoint.hold("running")
    known, foreign = job_of("out"), job_of("elsewhere")
    recorded_run(Path("out"), "20260101_000000", job_id="ftjob-gone", job_status="running")
    shown = cli("--list", *asked)
    before, heading, after = shown.out.partition("サービスから分かったこと:")
    rows = json.loads(cli("--list", "--json", *asked).out)

    assert shown.code == 0
    assert [known in before, "ftjob-gone" in before, foreign in before] == [True, True, False]
    assert "記録なし" not in before
    assert "ジョブなし" not in before
    assert heading
    assert [known in after, "ftjob-gone" in after, foreign in after] == [False, True, True]
    assert re.search(r"ftjob-gone .*ジョブなし", after)
    assert re.search(rf"{foreign} .*記録なし", after)
    assert sorted(row["job_id"] for row in rows) == sorted([known, foreign, "ftjob-gone"])


def test_a_list_to_which_the_endpoint_adds_nothing_is_one_table(
    cli: Callable[..., Ended], asked: tuple[str, ...]
) -> None:
    empty = cli("--list", *asked)
    recorded_run(Path("out"), "20260101_000000")
    one = cli("--list", *asked)

    assert [len(shown.out.splitlines()) for shown in (empty, one)] == [1, 2]
    assert "run_20260101_000000" in one.out


TUNED = "ft:gpt-4o-mini-2024-07-18:こころ相談室株式会社:kokorochat-counselling-v2:AbCd1234"


def listed_on_a_terminal(*arguments: str | Path) -> list[str]:
    terminal, inner = pty.openpty()
    try:
        ended = wait(shell(*arguments, "--list", stdout=inner))
        shown = os.read(terminal, 65536).decode()
    finally:
        os.close(terminal)
        os.close(inner)
    assert ended.code == 0, ended.err
    return shown.splitlines()


@pytest.mark.parametrize("width", [80, 100, 200])
def test_the_list_fits_its_terminal_and_is_whole_elsewhere(
    cli: Callable[..., Ended],
    asked: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    width: int,
) -> None:
    job_id = f"ftjob-{'AbCdEfGh' * 3}"
    for number, status in enumerate(["succeeded", "validating_files"]):
        facts = {"job_id": job_id, "job_status": status, "fine_tuned_model": TUNED}
        recorded_run(Path("out"), f"20260101_00000{number}", **facts)
    monkeypatch.setenv("COLUMNS", str(width))
    lines = listed_on_a_terminal(*asked)
    elsewhere = cli("--list", *asked).out
    widths = [sum(1 + (unicodedata.east_asian_width(c) in "WFA") for c in line) for line in lines]
    rows = [line for line in lines if line.startswith("run_2026")]

    assert len(rows) == 4  # recorded, and then without a job at the endpoint
    assert max(widths) <= width
    assert all(re.match(r"run_20260101_00000\d  ftjob-AbC", row) for row in rows)
    assert all(("  ft:g" in row and "1234" in row) for row in rows)
    assert [TUNED in row for row in rows] == [width == 200] * 4
    assert [job_id in row for row in rows] == [True, True, width > 80, width > 80]
    assert elsewhere.count(TUNED) == elsewhere.count(job_id) == 4
    assert "…" not in elsewhere


# ── Loudness ─────────────────────────────────────────────────────────────────────────────────


def test_quiet_shows_the_results_alone_and_verbose_more_than_usual(dataset: Path) -> None:
    def run(*loudness: str) -> Ended:
        return wait(shell("--data-only", "--dataset", dataset, *loudness))

    quiet, usual = run("--quiet"), run()

    assert quiet.code == usual.code == 0
    assert quiet.err == ""
    assert "保存しました" in usual.err
    assert quiet.out.splitlines()[:4] == usual.out.splitlines()[:4]


# ── Flags that belong together ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("flags", "needed"),
    [
        (("--model-id", "ft:x"), "--evaluate-only"),
        (("--fix",), "--check-file"),
        (("--json",), "--list"),
        (("--timeout", "nan"), "数"),
        (("--poll-interval", "inf"), "数"),
        (("--rehearse", "--resume"), "リハーサル"),
        (("--rehearse", "--job-id", "ftjob-1"), "リハーサル"),
        (("--concurrency", "0"), "concurrency"),
        (("--max-tokens", "0"), "max_tokens"),
        (("--temperature", "2.5"), "temperature"),
        (("--timeout-per-answer", "0"), "timeout_per_answer"),
        (("--eval-turns", "0"), "eval_turns"),
        (("--price-training", "-1", "--price-input", "1", "--price-output", "1"), "単価"),
    ],
)
def test_what_makes_no_sense_together_ends_with_2_before_anything_is_sent(
    cli: Callable[..., Ended],
    online: tuple[str, ...],
    endpoint: Rehearsal,
    flags: tuple[str, ...],
    needed: str,
) -> None:
    ended = cli(*online, *flags)

    assert ended.code == 2
    assert needed in ended.err
    assert endpoint.exchanges == []
