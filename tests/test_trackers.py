"""Sending the losses, the final figures and the page to a tracker."""

from __future__ import annotations

import importlib.util
import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import PROJECT, Ended, read_json

from openai_sft import TRACKERS, ConfigurationError, OpenAISFT

READ_EVENTS = """
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
read = EventAccumulator(sys.argv[1]).Reload()
tags = read.Tags()["scalars"]
print(json.dumps({tag: [[e.step, e.value] for e in read.Scalars(tag)] for tag in tags}))
"""


def needs(tracker: str) -> None:
    packages = {TRACKERS[tracker], tracker}  # type: ignore[index]
    if not all(map(importlib.util.find_spec, packages)):
        pytest.skip(f"needs pip install 'openai-sft[{tracker}]'")


def rehearse(*flags: str) -> str:
    """A rehearsal in a process of its own, for these packages start threads and servers."""
    command = (sys.executable, PROJECT / "openai_sft_example.py", "--rehearse", "--epochs", "2")
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=110)

    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.startswith("モデル: ")  # nothing but the results
    return done.stderr


def saved() -> tuple[dict[str, object], list[dict[str, float]]]:
    (path,) = Path("openai_sft_outputs").glob("comprehensive_evaluation_*.json")
    results = read_json(path)
    return results["test_evaluation"]["metrics"], results["training"]["metrics"]


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_tracker_that_is_not_installed_is_told_of_before_anything_is_done(
    cli: Callable[..., Ended], tracker: str
) -> None:
    if importlib.util.find_spec(TRACKERS[tracker]):  # type: ignore[index]
        pytest.skip(f"{tracker} is here")
    ended = cli("--rehearse", "--report-to", tracker)

    assert ended.code == 2
    assert f"pip install 'openai-sft[{tracker}]'" in ended.err
    assert not Path("openai_sft_outputs").exists()


def test_a_tracker_that_nobody_knows_is_refused(clean_environment: Path) -> None:
    with pytest.raises(ConfigurationError, match="wandb、trackio、tensorboard"):
        OpenAISFT(offline=True, report_to="mlflow")  # type: ignore[arg-type]


def test_a_rehearsal_sends_nothing_to_wandb(cli: Callable[..., Ended]) -> None:
    needs("wandb")
    ended = cli("--rehearse", "--report-to", "wandb")

    assert ended.code == 2
    assert "WANDB_MODE=offline" in ended.err


def test_tensorboard_has_the_losses_and_the_figures(clean_environment: Path) -> None:
    needs("tensorboard")
    told = rehearse("--report-to", "tensorboard")
    (folder,) = Path("openai_sft_outputs/tensorboard").iterdir()
    read = subprocess.run(
        [sys.executable, "-c", READ_EVENTS, folder], capture_output=True, text=True, check=True
    )
    scalars = json.loads(read.stdout)
    metrics, rows = saved()

    assert "tensorboard --logdir openai_sft_outputs/tensorboard" in told
    assert scalars["train/train_loss"] == [
        [row["step"], pytest.approx(row["train_loss"])] for row in rows
    ]
    assert scalars["test/rouge_l"][0][1] == pytest.approx(metrics["rouge_l"]["score"])  # type: ignore[index]


def test_trackio_has_the_losses_the_figures_and_the_page_without_a_network(
    clean_environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(clean_environment / "trackio"))
    rehearse("--report-to", "trackio")
    (path,) = Path("trackio").glob("*.db")
    with sqlite3.connect(path) as database:
        logged = [json.loads(row[0]) for row in database.execute("SELECT metrics FROM metrics")]
    _, rows = saved()
    pages = [page.read_text("utf-8") for page in Path("trackio").rglob("*.html")]

    assert [row["train/train_loss"] for row in logged[:-1]] == [row["train_loss"] for row in rows]
    assert "test/rouge_l" in logged[-1]
    assert any("<title>" in page for page in pages)


def test_wandb_keeps_a_run_offline(
    clean_environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    rehearse("--report-to", "wandb")

    assert list(Path("wandb").glob("offline-run-*/*.wandb"))
    assert list(Path("wandb").rglob("*.html"))
