"""What a notebook shows: tables, short texts, each line of the log once."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from openai_sft import OpenAISFT

MakeSFT = Callable[..., OpenAISFT]
CELLS = (
    "import openai_sft; sft = openai_sft.OpenAISFT(rehearse=True, poll_interval=0)",
    "sft.prepare_data(epochs=2)",
    "results = sft.run_full_pipeline(epochs=2, batch_size=4, baseline=True); results",
    "sft.monitor_fine_tune_job(results['training']['job_id'])",
    "sft.check()",
    "sft.list_runs()",
)
LATER = "import logging; logging.basicConfig(level='INFO', force=True); sft.write_report()"


def execute(*cells: str) -> list[list[dict[str, Any]]]:
    """The outputs of the cells of a notebook that nbconvert executes."""
    for package in ("nbconvert", "ipykernel"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs pip install {package}")
    made = [
        {
            **{"cell_type": "code", "id": f"c{n}", "metadata": {}, "execution_count": None},
            **{"outputs": [], "source": cell},
        }
        for n, cell in enumerate(cells)
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python", "language": "python"}}
    facts = {"nbformat": 4, "nbformat_minor": 5, "metadata": kernel, "cells": made}
    Path("a.ipynb").write_text(json.dumps(facts), "utf-8")
    command = (sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "a.ipynb")
    done = subprocess.run([*command, "--output", "b"], capture_output=True, text=True, timeout=110)

    assert done.returncode == 0, done.stderr
    return [cell["outputs"] for cell in json.loads(Path("b.ipynb").read_text("utf-8"))["cells"]]


def text_of(outputs: list[dict[str, Any]], name: str = "stderr") -> str:
    return "".join("".join(o["text"]) for o in outputs if o.get("name") == name)


def test_an_executed_notebook_shows_loss_lines_and_tables_and_nothing_twice(
    clean_environment: Path,
) -> None:
    *shown, later = execute(*CELLS, LATER)
    run, told = shown[2], text_of(shown[2])
    lines = [line for line in told.splitlines() if "[監視]" not in line and "⚠️" not in line]

    assert all(f"[学習] エポック {n}/2" in told for n in (1, 2))
    assert max(Counter(line[9:] for line in lines).values()) == 1
    for outputs in shown:
        assert "Traceback" not in text_of(outputs)
        assert "Warning" not in text_of(outputs)
    for outputs in shown[1:]:
        data = outputs[-1]["data"]
        assert "<table>" in "".join(data["text/html"])
        assert len("".join(data["text/plain"])) < 1500
    assert "".join(run[-1]["data"]["text/plain"]).startswith("<EvaluationResults モデル ft:")
    assert text_of(later).count("保存しました") == 1


def test_the_texts_are_short_and_nothing_in_them_is_markup(make_sft: MakeSFT) -> None:
    sft = make_sft()
    summary = sft.prepare_data(1, max_test_cases=1)
    results = sft.run_full_pipeline(1, 4, max_test_cases=1, suffix="a")
    results["model_id"] = "<b>"
    rows, items = sft.list_runs(), sft.check()

    assert repr(results).startswith("<EvaluationResults モデル <b>（テスト 1/1件、検証 1/1件）")
    assert "<b>" not in results._repr_html_()
    assert repr(summary).splitlines() == summary.lines()
    assert "<td>学習</td><td>16</td>" in summary._repr_html_()
    assert len(repr(rows).splitlines()) == len(rows) == 2
    assert [line[0] for line in repr(items).splitlines()] == [item.mark for item in items]
    for table in (rows, items):
        assert table._repr_html_().count("<tr>") == len(table) + 1  # type: ignore[attr-defined]


def test_a_log_that_the_application_sets_up_later_has_each_line_once() -> None:
    code = (
        "import logging, openai_sft; sft = openai_sft.OpenAISFT(offline=True)\n"
        "log = logging.getLogger('openai_sft'); log.info('前'); logging.basicConfig(level='INFO')\n"
        "log.info('後')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stderr.count("前") == done.stderr.count("後") == 1
