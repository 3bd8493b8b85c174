"""The README's code and commands are what they say."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import openai_sft_rehearsal
from openai_sft_example import build_parser

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def block(marker: str) -> str:
    """The code block under an HTML comment that names it."""
    found = re.search(rf"<!-- {marker} -->\n```\w+\n(.*?)```", README, re.DOTALL)
    assert found, f"README has no block {marker}"
    return found.group(1)


def test_the_step_by_step_code_runs_as_written(
    endpoint, clean_environment, example_file, tmp_path, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setenv("OPENAI_BASE_URL", endpoint.url)
    monkeypatch.setenv("OPENAI_SFT_DATASET", str(example_file))
    names: dict[str, object] = {}

    exec(compile(block("step-by-step"), "README.md", "exec"), names)

    assert names["job"].status == "succeeded"
    assert names["results"]["summary"]["test_cases_evaluated"] == 2
    assert len(list((tmp_path / "openai_sft_outputs").glob("comprehensive_evaluation_*.json"))) == 1


def test_every_flag_the_readme_names_exists():
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", README))
    known = {flag for action in build_parser()._actions for flag in action.option_strings}

    server = openai_sft_rehearsal.build_parser()
    known |= {flag for action in server._actions for flag in action.option_strings}
    others = {
        "--rounds",
        "--features",
        "--copies",
        "--dialogues",
        "--strict",
    }  # the benchmarks' and mypy's
    commands = re.findall(r"pip install [^`\n]*|--local-launcher '[^']*'|vllm serve [^`]*", README)
    assert flags - known - set(re.findall(r"--[a-z_-]+", " ".join(commands))) <= others


@pytest.mark.parametrize("marker", ["rehearse-command", "test-command"])
def test_the_two_commands_are_single_lines_that_make_their_own_environment(marker):
    command = block(marker).strip()

    assert "\n" not in command
    assert shlex.split(command)[:4] == ["python3", "-m", "venv", ".venv"]
