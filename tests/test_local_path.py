"""Training on one's own machine from the data to the report, by the class and the command line."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import openai
import psutil
import pytest
from calls import ask, connected, examples, hyperparameters, metrics_of, start_job
from endpoint import Rehearsal
from faults import until
from helpers import (
    PROJECT,
    Ended,
    Script,
    hearing_interrupts,
    read_json,
    recorded_run,
    require_local,
    write_jsonl,
)

from openai_sft import (
    ConfigurationError,
    CostEstimate,
    EvaluationResults,
    OpenAISFT,
    ToBeDeployed,
)
from openai_sft_local import LocalEngine, load_model
from openai_sft_rehearsal import example_dialogues, hold_lock

require_local()

# PEFT's own way of asking Transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

CLI = Callable[..., Ended]
SECRETS = {
    "OPENAI_API_KEY": "sk-recognisable-0123456789-wxyz",
    "OPENAI_ORG_ID": "org-recognisable",
    "OPENAI_PROJECT_ID": "proj_recognisable",
}
# Drawn, for what an untrained model takes for likeliest is often no text at all.
BRIEFLY: Any = {"max_test_cases": 2, "max_tokens": 12, "temperature": 1}
FLAGS = ("--max-test-cases", "2", "--max-tokens", "12", "--temperature", "1")


def make_data(folder: Path) -> Path:
    """The example dialogues, of which enough validate for an interval."""
    folder.mkdir()
    dialogues = example_dialogues()
    parts = {"train": slice(12), "validation": slice(12, 22), "test": slice(22, 24)}
    for name, part in parts.items():
        write_jsonl(folder / f"{name}.jsonl", dialogues[part])
    return folder


@pytest.fixture
def data(clean_environment: Path) -> Path:
    return make_data(clean_environment / "data")


# --- One run, and what it leaves ------------------------------------------------------------------


class Trained(NamedTuple):
    """A run that has ended, and what was said and asked meanwhile."""

    out: Path
    data: Path
    results: EvaluationResults
    files: dict[str, str]
    log: list[str]
    asked: list[CostEstimate]
    elsewhere: list[str]
    key: str

    @property
    def record(self) -> Any:
        return read_json(self.files["record"])

    @property
    def losses(self) -> list[float]:
        """Of the whole validation file, an epoch after the other."""
        lines = (self.trainer / "progress.jsonl").read_text("utf-8").splitlines()
        metrics = [record["metrics"] for record in map(json.loads, lines) if "metrics" in record]
        return [m["full_valid_loss"] for m in metrics if "full_valid_loss" in m]

    @property
    def trainer(self) -> Path:
        return self.out / "local" / "trainers" / self.record["job_id"]


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture(scope="module")
def trained(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    home = tmp_path_factory.mktemp("home")
    data, out, asked, kept = make_data(home / "data"), home / "out", list[CostEstimate](), Kept()

    def confirm(estimate: CostEstimate) -> bool:
        asked.append(estimate)
        return False

    with pytest.MonkeyPatch.context() as patch, Script() as elsewhere:
        for name, value in {**SECRETS, "OPENAI_BASE_URL": elsewhere.url}.items():
            patch.setenv(name, value)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.chdir(home)
        logger = logging.getLogger("openai_sft")
        level = logger.level
        logger.setLevel(logging.INFO)
        logger.addHandler(kept)
        with OpenAISFT(
            local="tiny",
            dataset=str(data),
            output_dir=out,
            confirm=confirm,
            poll_interval=0.05,
            verbose=False,
        ) as sft:
            results = sft.run_full_pipeline(6, 4, baseline=True, seed=1, **BRIEFLY)
            key = sft.client.api_key
        logger.removeHandler(kept)
        logger.setLevel(level)
    return Trained(out, data, results, sft.files, kept.lines, asked, elsewhere.asked, key)


def test_a_model_learns_on_this_machine_and_beats_its_untrained_self(trained: Trained) -> None:
    losses = trained.losses
    told = re.search(
        r"ビット数: 学習前 ([\d.]+)、学習後 ([\d.]+)（差の95%区間 (-[\d.]+)〜(-[\d.]+)、10対話）",
        "\n".join(trained.log),
    )
    assert told, trained.log
    before, after, low, high = map(float, told.groups())

    assert len(losses) == 6
    assert min(losses[3:]) < losses[0]
    assert losses[:3] == sorted(losses[:3], reverse=True)
    assert low < after - before < high < 0
    assert trained.record["final_metrics"]["valid_loss"] == losses[-1]


def test_both_models_answer_and_nothing_is_paid_or_asked(trained: Trained) -> None:
    results = trained.results

    assert results["model_id"] == trained.record["fine_tuned_model"]
    assert results["model_id"].startswith("ft:tiny:local::")
    assert results["baseline"]["model_id"] == "tiny"
    for part in (results, results["baseline"]):
        assert part["test_evaluation"]["evaluated_cases"] == 2
        assert part["valid_evaluation"]["evaluated_cases"] == 2
    assert results["cost"]["total_usd"] == 0
    assert trained.asked == []
    assert any("料金はかかりません" in line for line in trained.log)


def test_the_run_tells_where_the_weights_are_and_keeps_what_it_was_told(trained: Trained) -> None:
    weights, settings = Path(trained.files["weights"]), trained.record["settings"]

    assert (weights / "model.safetensors").exists()
    assert any(f"vllm serve {weights}" in line for line in trained.log)
    assert (settings["local"], settings["model"], settings["base_url"]) == ("tiny", "tiny", None)
    assert not any("KokoroChatで学習した重み" in line for line in trained.log)


def test_what_the_environment_has_for_elsewhere_goes_nowhere(trained: Trained) -> None:
    written = b"".join(path.read_bytes() for path in trained.out.rglob("*") if path.is_file())

    assert trained.elsewhere == []
    assert trained.key == "local"
    for secret in SECRETS.values():
        assert secret.encode() not in written


# --- The weights ----------------------------------------------------------------------------------


def test_the_weights_are_exported_as_a_model_that_loads(
    trained: Trained, cli: CLI, tmp_path: Path
) -> None:
    ended = cli("--export", tmp_path / "mine", "--output-dir", trained.out)

    assert (ended.code, ended.out) == (0, f"export: {tmp_path / 'mine'}\n")
    model, source = (
        load_model(str(p), training=False) for p in (tmp_path / "mine", trained.files["weights"])
    )
    assert all((a == b).all() for a, b in zip(model.parameters(), source.parameters(), strict=True))


def test_a_checkpoint_is_exported_by_its_name(trained: Trained, tmp_path: Path) -> None:
    first = min(trained.record["checkpoints"], key=lambda checkpoint: checkpoint["step"])
    weights = trained.trainer / f"checkpoint-{first['step']}" / "model.safetensors"
    with OpenAISFT(output_dir=trained.out, allow_no_key=True, verbose=False) as sft:
        folder = sft.export_weights(tmp_path / "first", first["model"])

    assert (folder / "model.safetensors").read_bytes() == weights.read_bytes()


def test_nothing_is_exported_over_files_or_from_a_model_of_elsewhere(
    trained: Trained, cli: CLI, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    recorded_run(tmp_path / "runs", "20260101_000000", fine_tuned_model="ft:gpt:org::1")
    with OpenAISFT(output_dir=trained.out, allow_no_key=True, verbose=False) as sft:
        with pytest.raises(ConfigurationError, match="空ではありません"):
            sft.export_weights(tmp_path / "mine")
        with pytest.raises(ConfigurationError, match="ft:gpt:org::1 がありません"):
            sft.export_weights(tmp_path / "new", "ft:gpt:org::1")
    ended = cli("--export", tmp_path / "new", "--output-dir", tmp_path / "runs")

    assert ended.code == 2
    assert "このマシンで学習したモデルがありません" in ended.err
    assert not (tmp_path / "new").exists()


# --- The model again ------------------------------------------------------------------------------


@pytest.fixture
def used(trained: Trained) -> Iterator[Trained]:
    """The run with a newer one of elsewhere beside it."""
    newer = recorded_run(trained.out, "20990101_000000", fine_tuned_model="ft:gpt:org::1")
    yield trained
    newer.unlink()


def test_the_newest_model_that_was_trained_here_is_evaluated_here(
    used: Trained, cli: CLI, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Script() as elsewhere:
        monkeypatch.setenv("OPENAI_BASE_URL", elsewhere.url)
        monkeypatch.setenv("OPENAI_API_KEY", SECRETS["OPENAI_API_KEY"])
        place = ("--evaluate-only", "--output-dir", used.out, "--dataset", used.data)
        ended = cli("--local", "tiny", *place, *FLAGS)
        named = cli("--model-id", used.results["model_id"], *place, *FLAGS)

        assert elsewhere.asked == []
    for one in (ended, named):
        assert one.code == 0, one.err
        assert f"モデル: {used.results['model_id']}\n" in one.out


def test_a_model_of_another_base_is_not_asked_on_this_one(used: Trained, cli: CLI) -> None:
    place = ("--local", "org/other", "--evaluate-only", "--output-dir", used.out)
    ended = cli(*place, "--dataset", used.data, *FLAGS)
    named = cli(*place, "--dataset", used.data, *FLAGS, "--model-id", used.results["model_id"])

    assert ended.code == 2
    assert "評価するモデルがありません" in ended.err
    assert named.code == 1
    assert "tiny から学習したモデルです" in named.err


def test_a_folder_that_another_process_has_is_refused(trained: Trained, cli: CLI) -> None:
    lock = hold_lock(trained.out / "local" / "lock")
    assert lock
    with lock:
        ended = cli("--local", "tiny", "--dataset", trained.data, "--output-dir", trained.out)

    assert ended.code == 2
    (error,) = ended.errors
    assert "動いている別のエンドポイントが使っています" in error


# --- Interrupted ----------------------------------------------------------------------------------


def trainers(folder: Path) -> list[psutil.Process]:
    """The trainers of the jobs in a folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "openai_sft_local" in words and words[-1].startswith(str(folder)):
            found.append(process)
    return found


def progress(out: Path, kind: str) -> list[Any]:
    """What the trainer of the only job has written."""
    (path,) = (out / "local" / "trainers").glob("*/progress.jsonl")
    records = map(json.loads, path.read_bytes().rpartition(b"\n")[0].splitlines())
    return [record for record in records if record["kind"] == kind]


@contextlib.contextmanager
def begun(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """The command line as a process, killed at the end."""
    with (
        hearing_interrupts(),
        subprocess.Popen(
            [sys.executable, "-m", "openai_sft_example", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"},
        ) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_training_goes_on_after_ctrl_c_and_after_a_kill(data: Path, cli: CLI) -> None:
    out = data.parent / "out"
    place = ("--local", "tiny", "--output-dir", out, "--poll-interval", "0.05")
    jobs = out / "local" / "trainers"

    def saved(step: int) -> bool:
        """Whether a later checkpoint than that of a step is there, and no end."""
        found = list(jobs.glob("*/progress.jsonl"))
        return bool(found) and any(c["step"] > step for c in progress(out, "checkpoint"))

    with begun("--dataset", data, "--epochs", "12", "--batch-size", "2", *FLAGS, *place) as first:
        until(lambda: saved(0), 60)
        first.send_signal(signal.SIGINT)
        said, _ = first.communicate(timeout=30)

        assert first.returncode == 130
        assert "学習は、最後のチェックポイントから続けられます。続きから再開するには: " in said
        assert f"--local tiny --output-dir {out}" in said
        assert trainers(out) == []
        assert progress(out, "done") == []
        reached = progress(out, "checkpoint")[-1]["step"]
    with begun("--resume", *place) as second:
        until(lambda: saved(reached), 60)
        (trainer,) = trainers(out)
        trainer.suspend()
        second.kill()
        second.wait()

        assert progress(out, "done") == []
        assert trainer.is_running()
        trainer.resume()
    ended = cli("--resume", *place)
    steps = [record["step"] for record in progress(out, "step")]

    assert ended.code == 0, ended.err
    assert [path.name for path in jobs.iterdir()] == [read_json(*out.glob("run_*"))["job_id"]]
    assert {*steps} == {*range(1, 73)}
    assert len(steps) - 72 < 6  # an epoch at most was taken twice
    assert len(progress(out, "ready")) == 2  # the killed command's trainer lived on
    assert len(progress(out, "done")) == 1


# --- Scores ---------------------------------------------------------------------------------------


def test_of_the_score_task_every_answer_is_valid(
    clean_environment: Path, cli: CLI, log: Callable[[], list[str]]
) -> None:
    data = write_jsonl(clean_environment / "kokorochat.jsonl", example_dialogues())
    place = ("--local", "tiny", "--output-dir", "out", "--poll-interval", "0.05")
    run = ("--task", "score", "--epochs", "1", "--batch-size", "4", "--max-test-cases", "2")
    ended = cli("--dataset", data, *run, *place, "--baseline")
    results = read_json(*Path("out").glob("comprehensive_evaluation_*.json"))

    assert ended.code == 0, ended.err
    assert any("KokoroChatで学習した重みの利用と配布は、" in line for line in log())
    for part in (results, results["baseline"]):
        for name in ("test_evaluation", "valid_evaluation"):
            counts = part[name]
            assert (counts["evaluated_cases"], counts["invalid_cases"]) == (2, 0)


# --- Any client -----------------------------------------------------------------------------------


def ended(client: openai.OpenAI, job: Any) -> Any:
    """The job once it has ended; a trainer's beginning alone takes seconds."""
    for _ in range(1_000):
        found = client.fine_tuning.jobs.retrieve(job.id)
        if found.status not in ("validating_files", "queued", "running"):
            return found
        time.sleep(0.05)
    raise AssertionError("it never ended")


def test_weights_trained_here_are_files_where_a_service_gives_them(
    sdk: openai.OpenAI, tmp_path: Path
) -> None:
    engine = LocalEngine("tiny", tmp_path)
    with Rehearsal(engine=engine, dialect="nebius", folder=tmp_path) as endpoint:
        client = connected(sdk, endpoint).with_options(timeout=60)
        asked = {"n_epochs": 2, "batch_size": 4, "learning_rate": 2 * engine.learning_rate}
        started = start_job(client, examples(12), model="tiny", hyperparameters=asked)
        job = ended(client, started)
        last, first = client.fine_tuning.jobs.checkpoints.list(job.id)
        found = {
            client.files.retrieve(file).filename: client.files.content(file).content
            for file in last.result_files
        }
        endpoint.deploy("mine", f"{job.id}:{last.id}")
        answer = ask(client, "mine", max_tokens=4, seed=1)

    folder = tmp_path / "trainers" / job.id
    here = folder / f"checkpoint-{last.step_number}"
    assert job.result_files == last.result_files
    assert len(first.result_files) == len(found)
    assert found == {
        f"{job.id}/{last.id}/{path.name}": path.read_bytes() for path in here.iterdir()
    }
    assert f"{job.id}/{last.id}/model.safetensors" in found
    assert json.loads((folder / "spec.json").read_text())["learning_rate_multiplier"] == 2
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_weights_that_a_service_gives_away_answer_here_on_the_split_of_their_run(
    sdk: openai.OpenAI, tmp_path: Path, data: Path
) -> None:
    weights = tmp_path / "重み"
    options: Any = {"dataset": str(data), "output_dir": tmp_path / "out", "verbose": False}
    engine = LocalEngine("tiny", tmp_path / "state")
    with Rehearsal(engine=engine, dialect="nebius") as endpoint:
        place: Any = {"base_url": endpoint.url, "dialect": "nebius", "model": "tiny"}
        with (
            OpenAISFT("k", **place, **options, poll_interval=0.1) as sft,
            pytest.raises(ToBeDeployed),
        ):
            sft.run_full_pipeline(1, 4, **BRIEFLY, download_weights=weights)
    with OpenAISFT(local=str(weights), **options) as sft:
        results = sft.run_evaluation(str(weights), **BRIEFLY)

    records = map(read_json, (tmp_path / "out").glob("run_*.json"))
    (run,) = (record for record in records if "job_id" in record)
    assert results["model_id"] == str(weights)
    assert results["data"]["test"] == {
        name: run["data"]["test"][name] for name in ("sha256", "examples")
    }
    assert results["training"]["job_id"] == run["job_id"]


def test_a_plain_client_trains_and_is_answered_as_openai_describes_it(
    sdk: openai.OpenAI, tmp_path: Path
) -> None:
    judge = pytest.importorskip("judge")
    with Rehearsal(engine=LocalEngine("tiny", tmp_path), folder=tmp_path) as endpoint:
        client = connected(sdk, endpoint).with_options(timeout=60)
        file = client.files.create(file=("valid.jsonl", examples(6)), purpose="fine-tune")
        method = hyperparameters(n_epochs=2, batch_size=4)
        started = start_job(
            client, examples(12), model="tiny", validation_file=file.id, method=method, suffix="x"
        )
        job = ended(client, started)
        events = [event.message for event in client.fine_tuning.jobs.list_events(job.id)]
        last, first = client.fine_tuning.jobs.checkpoints.list(job.id)
        names = {model.id for model in client.models.list()}
        rows = client.files.content(job.result_files[0]).text.splitlines()
        answers = [ask(client, m, max_tokens=4, seed=1) for m in ("tiny", job.fine_tuned_model)]
        with pytest.raises(openai.NotFoundError):
            ask(client, "ft:tiny:local::nobody")

        assert job.status == "succeeded"
        assert job.fine_tuned_model == f"ft:tiny:local:x:{job.id[-8:]}"
        assert job.trained_tokens > 0
        assert [m["step"] for m in metrics_of(client, job)] == [1, 2, 3, 4, 5, 6]
        assert (first.step_number, last.step_number) == (3, 6)
        assert last.metrics.full_valid_loss < first.metrics.full_valid_loss
        assert any("tiny は流れを確かめるための" in message for message in events)
        assert {"tiny", job.fine_tuned_model, last.fine_tuned_model_checkpoint} <= names
        assert len(rows) == 7
        assert [answer.model for answer in answers] == ["tiny", job.fine_tuned_model]
        for answer in answers:
            assert 0 < answer.usage.completion_tokens <= 4
        assert judge.check_exchanges(endpoint.exchanges) == []


@contextlib.contextmanager
def serving(key: Path, state: Path) -> Iterator[str]:
    """The endpoint as a process of its own; its URL."""
    flags = ("--engine", "trl", "--model", "tiny", "--state", state, "--api-key-file", key)
    command = [sys.executable, "-m", "openai_sft_rehearsal", "--port", "0", *map(str, flags)]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, encoding="utf-8", env=environment
    ) as process:
        try:
            assert process.stderr
            found = re.search(r"http://127\.0\.0\.1:\d+/v1", process.stderr.readline())
            assert found
            yield found.group()
        finally:
            process.terminate()
            process.communicate(timeout=20)


def test_a_machine_that_others_reach_asks_for_the_key_and_keeps_its_models(
    sdk: openai.OpenAI, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    key.write_text("sk-of-this-machine\n", encoding="ascii")

    def connect(url: str) -> openai.OpenAI:
        return sdk.with_options(
            base_url=url, api_key="sk-of-this-machine", max_retries=0, timeout=60
        )

    with serving(key, tmp_path / "state") as url:
        client = connect(url)
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="another").models.list()
        started = start_job(client, model="tiny", method=hyperparameters(n_epochs=1, batch_size=8))
        trained = ended(client, started)
    with serving(key, tmp_path / "state") as url:
        answer = ask(connect(url), trained.fine_tuned_model, max_tokens=4)

    assert trained.status == "succeeded"
    assert answer.usage.completion_tokens > 0


# --- What it needs --------------------------------------------------------------------------------


def test_a_check_tells_that_this_machine_can_train(data: Path, cli: CLI) -> None:
    ended = cli("--check", "--local", "tiny", "--dataset", data)

    assert ended.code == 0, ended.out
    assert "✓ 料金表: このマシンでの学習と応答に料金はかかりません" in ended.out
    assert "✓ 学習するモデル: tiny" in ended.out
    assert "✓ 学習のパッケージ: torch " in ended.out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--local", "no/such/model"), "✗ 学習するモデル: モデル no/such/model を読めません"),
        (
            ("--local", "tiny", "--local-launcher", "no-such-command --n 2"),
            "✗ 学習の起動コマンド: no-such-command がありません → --local-launcher を",
        ),
        (("--local", "tiny", "--local-launcher", "run 'it"), "✗ 学習の起動コマンド: run 'it: "),
    ],
    ids=["model", "launcher", "quotes"],
)
def test_a_check_names_what_cannot_be_had(
    data: Path, cli: CLI, flags: tuple[str, ...], said: str
) -> None:
    ended = cli("--check", "--dataset", data, *flags)

    assert ended.code == 1
    assert said in ended.out


#: The command line where torch isn't installed.
WITHOUT_TORCH = """
import sys
import time
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] == "torch"
        return None if hidden else super().find_spec(name, path, target)

sys.meta_path = [Without() if finder is PathFinder else finder for finder in sys.meta_path]
from openai_sft_example import main
codes = [main(line.split()) for line in sys.stdin]
sys.exit(f"codes: {codes}")
"""


def test_where_the_packages_are_missing_the_extra_is_named(trained: Trained) -> None:
    place = f"--output-dir {trained.out} --dataset {trained.data}"
    orders = (f"--local tiny {place}", f"--export {trained.out}/new {place}")
    checked = f"--check --local tiny {place}"
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH],
        input="\n".join([*orders, checked]),
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
    )
    errors = Ended(ended.returncode, ended.stdout, ended.stderr).errors

    assert "codes: [2, 2, 1]" in ended.stderr
    assert len(errors) == 2
    for error in errors:
        assert "torch" in error
        assert "pip install 'openai-sft[local]'" in error
    assert "✗ 学習のパッケージ: torch がありません" in ended.stdout
