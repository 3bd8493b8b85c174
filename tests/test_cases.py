"""The inputs of ``../shared/cases``, each with what ``CASES.md`` there says that it must give."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from openai_sft import OpenAISFT, check_file
from openai_sft_example import main

CASES = Path(__file__).parents[2] / "shared" / "cases"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="needs ../shared/cases")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    clean_environment: Path, capsys: pytest.CaptureFixture[str], log: Callable[[], list[str]]
) -> Run:
    """The command line in an empty folder: exit code, stdout, stderr and the log."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(list(arguments))
        told = capsys.readouterr()
        return code, told.out, "\n".join([*log(), told.err])

    return run


def written() -> list[list[dict[str, Any]]]:
    """The messages of all examples in the three files."""
    lines = [
        line
        for path in sorted(Path("openai_sft_outputs").glob("*_data_*.jsonl"))
        for line in path.read_text("utf-8").splitlines()
    ]
    return [json.loads(line)["messages"] for line in lines]


def tuples(messages: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


SYSTEM = ("system", "指示")
EXCHANGE = [("user", "q{0}"), ("assistant", "a")]
READ: dict[str, tuple[int, list[tuple[str, str]]]] = {
    "sharegpt.json": (
        20,
        [
            ("system", "あなたは相談員です。"),
            ("user", "最近眠れません{0}"),
            ("assistant", "つらいですね{0}"),
        ],
    ),
    "alpaca.json": (20, [("user", "俳句を作る{0}"), ("assistant", "古池や{0}")]),
    "prompt_completion.jsonl": (20, [("user", "問い{0}"), ("assistant", "答え{0}")]),
    "messages_developer.jsonl": (20, [SYSTEM, *EXCHANGE]),
    "dialogue_with_system_role.json": (20, [SYSTEM, *EXCHANGE]),
    "kokoro_rows.csv": (
        20,
        [(role, f"発話{{0}}-{n}") for n, role in enumerate(("user", "assistant") * 2)],
    ),
    "dialogue_struct_of_lists.parquet": (
        20,
        [("user", "眠れない{0}"), ("assistant", "そうですか")],
    ),
    "messages.jsonl.gz": (20, EXCHANGE),
    "array_pretty.jsonl": (20, EXCHANGE),
    "upperfolder": (20, EXCHANGE),
    "nested": (20, EXCHANGE),
}


@pytest.mark.parametrize("name", READ)
def test_every_conversation_is_read_as_its_owner_wrote_it(run: Run, name: str) -> None:
    count, said = READ[name]
    code, _, err = run("--data-only", "--dataset", str(CASES / name))
    expected = [[(role, text.format(n)) for role, text in said] for n in range(count)]

    assert code == 0, err
    assert sorted(map(tuples, written())) == sorted(expected)


@pytest.mark.parametrize(
    ("name", "speakers", "flag"),
    [("jempathetic.json", ("A", "B"), "B"), ("realpersonachat", ("AA", "AB"), "second")],
)
def test_speakers_that_nobody_can_know_stop_until_the_user_says_who_they_are(
    run: Run, name: str, speakers: tuple[str, str], flag: str
) -> None:
    code, _, err = run("--data-only", "--dataset", str(CASES / name))

    assert code == 2
    for part in (*speakers, "--assistant"):
        assert part in err
    assert Path("openai_sft_outputs").exists() is False

    code, _, err = run("--data-only", "--dataset", str(CASES / name), "--assistant", flag)

    assert code == 0, err
    assert len(written()) == 20 if name == "jempathetic.json" else 15
    assert all(messages[0]["role"] == "user" for messages in written())


def checked(name: str) -> list[tuple[int | None, str]]:
    return [(finding.line, finding.code) for finding in check_file(CASES / name)]


FOUND = {
    "cp932_from_windows.jsonl": "foreign_encoding",
    "bom_mid_file.jsonl": "bom",
    "trailing_comma_line.jsonl": "trailing_comma",
    "weight_float_from_pandas.jsonl": "weight_type",
    "role_trailing_space.jsonl": "role_spelling",
    "tool_call_arguments_object.jsonl": "arguments_object",
    "tools_as_json_string.jsonl": "tools_text",
    "legacy_functions_function_call.jsonl": "legacy_functions",
}


@pytest.mark.parametrize("name", FOUND)
def test_what_is_mechanical_is_found_once_and_mended_with_nothing_lost_unsaid(
    run: Run, name: str, clean_environment: Path
) -> None:
    path = shutil.copy(CASES / name, clean_environment)
    code, out, _ = run("--check-file", name)

    assert code == 2
    assert out.count(f"[{FOUND[name]}] 1件") == 1
    assert out.count("エラー [") == 1

    code, out, err = run("--check-file", name, "--fix")
    fixed = clean_environment / name.replace(".jsonl", ".fixed.jsonl")

    assert code == 0, out + err
    assert not [f for f in check_file(fixed) if f.severity == "error"]
    assert len(fixed.read_text("utf-8").splitlines()) == len(Path(path).read_bytes().splitlines())
    assert "0件" in err.partition("直せないもの")[2]


@pytest.mark.parametrize("name", FOUND)
def test_what_is_mechanical_is_read_as_a_data_set_with_a_word(run: Run, name: str) -> None:
    code, _, err = run("--data-only", "--dataset", str(CASES / name))

    assert code == 0, err
    assert "直して読みます" in err


def test_the_blank_of_a_role_is_shown(run: Run) -> None:
    _, out, _ = run("--check-file", str(CASES / "role_trailing_space.jsonl"))

    assert "user␣" in out


REFUSED = {
    "single_quotes_python_repr.jsonl": "invalid_json",
    "whitespace_assistant.jsonl": "blank_answer",
    "tool_message_wrong_call_id.jsonl": "unknown_call_id",
    "tool_call_unanswered_then_user.jsonl": "unanswered_call",
    "image_in_assistant.jsonl": "wrong_part",
    "dpo_preferred_output.jsonl": "preference_file",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_a_guess_is_found_at_its_line_and_rejected(
    run: Run, name: str, clean_environment: Path
) -> None:
    shutil.copy(CASES / name, clean_environment)
    found = [(line, code) for line, code in checked(name) if code == REFUSED[name]]

    assert found == [(2, REFUSED[name])]

    run("--check-file", name, "--fix")
    rejects = clean_environment / name.replace(".jsonl", ".rejects.jsonl")
    (reject,) = map(json.loads, rejects.read_text("utf-8").splitlines())

    assert reject["line"] == 2
    assert REFUSED[name] in reject["codes"]
    assert reject["raw"] == (CASES / name).read_text("utf-8").splitlines()[1]


def test_a_preference_file_is_named_once(run: Run) -> None:
    code, _, err = run("--data-only", "--dataset", str(CASES / "dpo_preferred_output.jsonl"))

    assert code == 2
    assert err.count("選好（DPO）") == 1


def test_a_line_that_ends_with_the_user_is_trimmed_and_that_is_said(run: Run) -> None:
    code, _, err = run("--data-only", "--dataset", str(CASES / "one_ends_with_user.jsonl"))

    assert code == 0, err
    assert "最後の assistant より後の発話（user）を除きました（1件）" in err
    assert all(messages[-1]["role"] == "assistant" for messages in written())
    assert (8, "last_not_assistant") in checked("one_ends_with_user.jsonl")


def test_keys_of_messages_that_are_left_out_are_named_once_with_their_count(run: Run) -> None:
    path = CASES / "message_level_extra_keys.jsonl"
    code, _, err = run("--data-only", "--dataset", str(path))

    assert code == 0, err
    assert err.count("timestamp") == 1
    assert f"{len(path.read_text('utf-8').splitlines())}件" in err
    assert all(set(message) == {"role", "content"} for m in written() for message in m)


def test_a_call_that_ends_an_example_is_right() -> None:
    assert checked("ends_with_tool_call.jsonl") == []


def test_tools_of_a_table_have_no_parameters_of_other_tools(run: Run) -> None:
    code, _, err = run("--data-only", "--dataset", str(CASES / "messages_tools_struct.parquet"))
    text = "".join(p.read_text("utf-8") for p in Path("openai_sft_outputs").glob("*.jsonl"))

    assert code == 0, err
    assert "null" not in text
    assert text.count('"query": {') == text.count('"name": "search"')


def test_tools_are_seen_by_the_count_the_price_and_the_cases(clean_environment: Path) -> None:
    sft = OpenAISFT(
        offline=True,
        verbose=False,
        dataset=str(CASES / "tools_definitions_6_large.jsonl"),
    )
    summary = sft.prepare_data(1)
    total = summary.tokens["train"]

    assert total.p50 > 1000
    assert summary.estimate is not None
    assert not summary.estimate.exact_tokens
    assert summary.estimate.evaluation_output_tokens > 0


def test_a_text_of_weight_0_is_never_a_reference(clean_environment: Path) -> None:
    sft = OpenAISFT(offline=True, verbose=False, dataset=str(CASES / "weight0_first_answer.jsonl"))
    sft.prepare_data(1)
    from openai_sft import choose_cases, read_examples

    for name in ("test", "valid"):
        for case in choose_cases(read_examples(sft.files[name]), max_cases=0, turns="all"):
            assert case.reference == "これは良い応答です"


def test_an_env_file_of_powershell_is_read(
    run: Run, clean_environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(CASES / "dotenv_utf16le_powershell.env", clean_environment / ".env")
    sft = OpenAISFT(verbose=False)

    assert sft.settings.api_key
    assert sft.settings.api_key_source == ".env"
