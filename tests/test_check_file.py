"""Every problem of a training file at once: found, named, mended where that can be."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
from endpoint import Rehearsal
from helpers import (
    PROJECT,
    awkward_text,
    example,
    examples,
    posts,
    records,
    training_file,
    write_jsonl,
)
from hypothesis import assume, given
from hypothesis import strategies as st

import openai_sft_example
from openai_sft import (
    MAX_EXAMPLE_TOKENS,
    PROBLEMS,
    DataError,
    Finding,
    OpenAISFT,
    TokenCounter,
    check_file,
    fix_file,
    load_vocabulary,
    read_examples,
    split_long_example,
)
from openai_sft_rehearsal import judge_training_file

BOM = b"\xef\xbb\xbf"
USER = {"role": "user", "content": "眠れません"}
ANSWER = {"role": "assistant", "content": "つらいですね"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
ASKED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
FOUND = {"role": "tool", "tool_call_id": "c1", "content": "見つかりました"}
TOOL = {"type": "function", "function": {"name": "f"}}
COUNTER = TokenCounter(None)
CASES = PROJECT.parent / "shared" / "cases"


def line(*messages: Any, **more: Any) -> bytes:
    return json.dumps({"messages": messages, **more}).encode()


def calling(*messages: Any, tools: Any = (TOOL,)) -> bytes:
    return line(USER, *messages, ANSWER, tools=tools)


def asked(**more: Any) -> dict[str, Any]:
    """A message that calls, with something else in the call."""
    return {**ASKED, "tool_calls": [{**CALL, **more}]}


def function(**more: Any) -> dict[str, Any]:
    return {"function": {"name": "f", "arguments": "{}", **more}}


def image(url: object, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": [{"type": "image_url", "image_url": {"url": url}}]}


def bad_file(folder: Path, raw: bytes, number: int = 3) -> Path:
    """Twelve good lines, and ``raw`` in the place of one of them."""
    path = training_file(folder)
    lines = path.read_bytes().splitlines()
    lines[number - 1] = raw
    path.write_bytes(b"".join(one + b"\n" for one in lines))
    return path


def codes(findings: list[Finding]) -> list[str]:
    return [finding.code for finding in findings]


def errors(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.severity == "error"]


# ── Each problem by its name ─────────────────────────────────────────────────────────────────

IN_A_LINE: list[tuple[str, bytes, int | None]] = [
    ("encoding", b'{"messages": "\xff\xfe"}', None),
    ("bom", BOM + line(USER, ANSWER), None),
    ("invalid_json", b'{"messages": [', None),
    ("invalid_json", line(USER, ANSWER, tools=[float("nan")]), None),
    ("invalid_json", b"[" * 100_000, None),
    ("trailing_comma", line(USER, ANSWER) + b",", None),
    ("other_form", b'{"prompt": "a", "completion": "b"}', None),
    ("other_form", b'{"conversations": [{"from": "gpt", "value": "b"}]}', None),
    (
        "other_form",
        b'{"messages": "[{\\"role\\": \\"assistant\\", \\"content\\": \\"b\\"}]"}',
        None,
    ),
    ("unknown_speaker", b'{"dialogue": [{"role": "A", "utterance": "b"}]}', None),
    ("blank_line", b" \t\r", None),
    ("not_object", b"[]", None),
    ("not_object", b"null", None),
    ("unknown_key", line(USER, ANSWER, prompt="a"), None),
    ("unknown_key", line(USER, {**ANSWER, "emotion": "calm"}), 1),
    ("missing_messages", b"{}", None),
    ("missing_messages", b'{"messages": "text"}', None),
    ("empty_messages", line(), None),
    ("unknown_key", line(USER, ANSWER, system=7), None),
    ("unknown_key", line(USER, ANSWER, reference_answer="a"), None),
    ("top_level_system", line(USER, ANSWER, system="傾聴"), None),
    ("top_level_system", line(USER, ANSWER, instructions="傾聴"), None),
    ("empty_key", line({**USER, "name": None}, ANSWER), 0),
    ("empty_key", line(USER, {**ANSWER, "weight": None}), 1),
    ("empty_key", line(USER, {**ANSWER, "tool_calls": None}), 1),
    ("empty_key", line(USER, {**ANSWER, "tool_calls": []}), 1),
    ("empty_key", line({**USER, "tool_call_id": None}, ANSWER), 0),
    ("empty_key", line(USER, ANSWER, tools=None), None),
    ("empty_key", line(USER, ANSWER, tools=[{**TOOL, **function(parameters=None)}]), None),
    ("preference_file", b'{"input": {}, "preferred_output": [], "non_preferred_output": []}', None),
    ("preference_file", line(USER, chosen="<|im_end|>", rejected="b"), None),
    ("reinforcement_file", line(USER, reference_answer="a"), None),
    ("reinforcement_file", line(USER, ANSWER, USER, reference_answer="a"), None),
    ("reinforcement_file", line(USER, compliant="yes"), None),
    (
        "batch_file",
        b'{"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {}}',
        None,
    ),
    ("role_spelling", line({**USER, "role": "developer"}, ANSWER), 0),
    ("role_spelling", line({**USER, "role": " user"}, ANSWER), 0),
    ("role_spelling", line({**USER, "role": "human"}, ANSWER), 0),
    ("role_spelling", line({**USER, "role": "クライアント"}, ANSWER), 0),
    ("role_spelling", line(USER, {**ANSWER, "role": "Assistant\u3000"}), 1),
    ("role_spelling", line(USER, {**ANSWER, "role": "ｇｐｔ"}), 1),
    ("unknown_role", line({**USER, "role": "narrator"}, ANSWER), 0),
    ("unknown_role", line({"content": "a"}, ANSWER), 0),
    ("unknown_role", line({"role": ["user"], "content": "a"}, ANSWER), 0),
    ("unknown_role", line({"role": {}, "content": "a"}, ANSWER), 0),
    ("wrong_type", line("text", ANSWER), 0),
    ("wrong_type", line({"role": "user"}, ANSWER), 0),
    ("wrong_type", line({"role": "user", "content": 7}, ANSWER), 0),
    ("wrong_type", line({"role": "user", "content": [{"type": "text"}]}, ANSWER), 0),
    ("wrong_type", line(USER, {"role": "tool", "content": "a"}, ANSWER), 1),
    ("empty_content", line(USER, {**ANSWER, "content": ""}), 1),
    ("empty_content", line({**USER, "content": []}, ANSWER), 0),
    ("blank_content", line({**USER, "content": "\u3000\n"}, ANSWER), 0),
    ("blank_content", line({**USER, "content": [{"type": "text", "text": " "}]}, ANSWER), 0),
    ("blank_content", line(USER, {"role": "assistant", "content": " ", "weight": 0}, ANSWER), 1),
    ("blank_content", calling({**ASKED, "content": " "}, FOUND), 1),
    ("blank_answer", line(USER, {**ANSWER, "content": " \u3000"}), 1),
    ("blank_answer", line(USER, {**ANSWER, "content": "\u200b \ufeff", "weight": 1}), 1),
    ("blank_answer", line(USER, {**ANSWER, "content": "\u200b"}), 1),
    ("blank_answer", line(USER, {**ANSWER, "content": [{"type": "text", "text": "\n"}]}), 1),
    ("wrong_part", line(USER, image("https://example.com/a.png", "assistant")), 1),
    ("wrong_part", line({"role": "system", "content": [{"type": "file"}]}, USER, ANSWER), 0),
    ("wrong_part", line({**USER, "content": [{"type": "image", "image": "a.png"}]}, ANSWER), 0),
    ("wrong_type", line(image(7), ANSWER), 0),
    ("wrong_type", line({**USER, "content": [{"type": "image_url"}]}, ANSWER), 0),
    ("local_image", line(image("C:\\a.png"), ANSWER), 0),
    ("local_image", line(image("file:///a.png"), ANSWER), 0),
    ("wrong_type", line(USER, ANSWER, parallel_tool_calls="no"), None),
    ("wrong_type", line(USER, ANSWER, tools={"name": "f"}), None),
    ("tools_text", line(USER, ANSWER, tools=json.dumps([TOOL])), None),
    ("tools_text", line(USER, ANSWER, tools=[json.dumps(TOOL)]), None),
    ("tools_text", calling(ASKED, FOUND, tools=json.dumps([TOOL])), None),
    ("bad_tool", line(USER, ANSWER, tools=[{"name": "f"}]), None),
    ("bad_tool", line(USER, ANSWER, tools=[{**TOOL, "type": "custom"}]), None),
    ("bad_tool", line(USER, ANSWER, tools=[{"function": TOOL["function"]}]), None),
    ("bad_tool", line(USER, ANSWER, tools=[{**TOOL, **function(name="天気")}]), None),
    ("bad_tool", line(USER, ANSWER, tools=[{**TOOL, **function(name="a" * 65)}]), None),
    ("bad_tool", line(USER, ANSWER, tools=[{**TOOL, **function(parameters="{}")}]), None),
    ("bad_tool_call", calling({**ASKED, "tool_calls": ["f"]}), 1),
    ("bad_tool_call", calling(asked(type="custom"), FOUND), 1),
    ("bad_tool_call", calling(asked(id=None)), 1),
    ("bad_tool_call", calling(asked(**function(name=None)), FOUND), 1),
    ("bad_tool_call", calling(asked(**function(arguments=None)), FOUND), 1),
    ("bad_tool_call", calling(asked(**function(arguments="{'a': 1}")), FOUND), 1),
    ("bad_tool_call", calling(asked(**function(arguments='{"a": NaN}')), FOUND), 1),
    ("bad_tool_call", calling({**ASKED, "tool_calls": [CALL, CALL]}, FOUND), 1),
    ("wrong_type", calling({**ASKED, "tool_calls": {}, "content": "a"}), 1),
    ("wrong_type", calling({**USER, "tool_calls": [CALL]}), 1),
    ("arguments_object", calling(asked(**function(arguments={"a": 1})), FOUND), 1),
    ("unknown_tool", calling(ASKED, FOUND, tools=[]), 1),
    ("unknown_tool", calling(asked(**function(name="g")), FOUND), 1),
    ("unanswered_call", calling(ASKED, USER), 1),
    ("unanswered_call", calling({**ASKED, "tool_calls": [CALL, {**CALL, "id": "c2"}]}, FOUND), 1),
    ("unknown_call_id", calling(FOUND), 1),
    ("unknown_call_id", calling(ASKED, FOUND, {**FOUND, "tool_call_id": "c9"}), 3),
    ("unknown_call_id", calling(ASKED, FOUND, ANSWER, FOUND), 4),
    ("repeated_call_id", calling(ASKED, FOUND, FOUND), 3),
    ("legacy_functions", line(USER, ANSWER, functions=[TOOL["function"]]), None),
    ("legacy_functions", line(USER, {"role": "assistant", "function_call": {"name": "f"}}), 1),
    ("legacy_functions", line(USER, {"role": "function", "name": "f", "content": "a"}, ANSWER), 1),
    ("no_trained_message", line(USER, {**ANSWER, "weight": 0}), None),
    ("last_not_assistant", line(USER, ANSWER, USER), 2),
    ("bad_weight", line({**USER, "weight": 1}, ANSWER), 0),
    ("bad_weight", line(USER, {**ANSWER, "weight": 2}), 1),
    ("weight_type", line(USER, {**ANSWER, "weight": True}), 1),
    ("weight_type", line(USER, {**ANSWER, "weight": 1.0}), 1),
    ("weight_type", line(USER, ANSWER, {**ANSWER, "weight": 0.0}), 2),
    ("weight_type", line(USER, {**ANSWER, "weight": "1"}), 1),
    ("bad_weight", line(USER, {**ANSWER, "weight": 0.5}), 1),
    ("special_token", line({**USER, "content": "a<|im_start|>"}, ANSWER), None),
    ("special_token", line({**USER, "name": "<|fim_suffix|>"}, ANSWER), None),
    (
        "special_token",
        line(USER, ANSWER)
        .replace(b"null", b"")
        .replace(b'"user"', b'"user", "name": "\\u003c|endoftext|>"'),
        None,
    ),
    ("lone_surrogate", line({**USER, "content": "\ud83d"}, ANSWER), None),
]


WARNINGS = {"blank_content", "unknown_tool"}


@pytest.mark.parametrize(
    ("code", "raw", "message_index"),
    IN_A_LINE,
    ids=[str(n) + c for n, (c, *_) in enumerate(IN_A_LINE)],
)
def test_a_problem_is_named_with_its_line_and_message(
    tmp_path: Path, code: str, raw: bytes, message_index: int | None
) -> None:
    number = 1 if code == "bom" else 3
    path = bad_file(tmp_path, raw, number)
    (finding,) = check_file(path)

    assert (finding.code, finding.line, finding.message_index) == (code, number, message_index)
    assert finding.path == str(path)
    assert finding.severity == ("warning" if code in WARNINGS else "error")
    judged = judge_training_file(path.read_bytes(), purpose="training")
    assert (judged is None) == (finding.severity == "warning" or code in OURS_ALONE)
    assert finding.text
    assert finding.remedy
    assert f"{path}:{number}" in str(finding)
    assert str(finding).isprintable()


@pytest.mark.parametrize(
    "name",
    [
        *("im_start", "im_end", "im_sep", "endoftext", "endofprompt"),
        *("fim_prefix", "fim_middle", "fim_suffix"),
        *("endofsystem", "startoftext", "start", "end", "message", "channel", "constrain"),
        *("return", "call", "reserved_200013"),
    ],
)
def test_every_special_token_is_named_wherever_it_stands(tmp_path: Path, name: str) -> None:
    token = f"<|{name}|>"
    path = bad_file(tmp_path, line(USER, {**ANSWER, "content": f"はい{token}。"}))
    (finding,) = check_file(path)

    assert (finding.code, finding.line) == ("special_token", 3)
    assert token in finding.text


def test_the_vocabularies_own_special_tokens_are_all_known(
    tmp_path: Path, vocabulary: Path
) -> None:
    from tiktoken import get_encoding

    names = {*get_encoding("o200k_base").special_tokens_set}
    names |= get_encoding("o200k_harmony").special_tokens_set
    findings = check_file(bad_file(tmp_path, line(USER, {**ANSWER, "content": " ".join(names)})))

    assert {found.code for found in findings} == {"special_token"}
    assert len(findings) == len(names) > 1000


@pytest.mark.parametrize(
    "text", ["<|笑|>", "<|ENDOFTEXT|>", "<|other|>", "< |end| >", "<||>", "|>"]
)
def test_what_only_looks_like_a_special_token_is_none(tmp_path: Path, text: str) -> None:
    assert check_file(bad_file(tmp_path, line(USER, {**ANSWER, "content": text}))) == []


def test_tools_count_towards_the_limit_of_an_example(tmp_path: Path) -> None:
    described = "条件を指定してください。" * 6000
    tools = [{"type": "function", "function": {"name": "f", "description": described}}]
    one = {"messages": [USER, ANSWER] * 2}
    counter = TokenCounter(load_vocabulary())
    each = counter.count([], tools).total
    path = bad_file(tmp_path, json.dumps({**one, "tools": tools}).encode())
    example: Any = {"id": "a", "tools": tools, "messages": [USER, ANSWER] * 300}
    sft = OpenAISFT(offline=True, long_examples="drop", verbose=False)
    parts = split_long_example(example, counter, each + 300)

    assert each < MAX_EXAMPLE_TOKENS
    assert [found.code for found in check_file(path, max_tokens=each)] == ["too_long"]
    assert check_file(path, max_tokens=each + 100) == []
    long = {**example, "messages": [USER, ANSWER] * 3000}
    assert sft.prepare_dataset([long]) == []
    assert sft.prepare_dataset([{**long, "tools": []}]) != []
    assert all(part["tools"] == tools for part in parts)
    assert all(counter.count(part["messages"], tools).total <= each + 300 for part in parts)
    assert sum(len(part["messages"]) for part in parts) == 600


def test_an_example_over_the_limit_of_tokens_is_found_and_one_at_the_limit_is_not(
    tmp_path: Path, vocabulary: Path
) -> None:
    from tiktoken import get_encoding

    path = bad_file(tmp_path, line(USER, {**ANSWER, "content": "ねむれ" * 90}))
    said = [one["messages"] for one in read_examples(path)]
    tokens = sorted(TokenCounter(get_encoding("o200k_base")).count(one).total for one in said)

    assert check_file(path, max_tokens=tokens[-1]) == []
    (finding,) = check_file(path, max_tokens=tokens[-1] - 1)
    assert (finding.code, finding.line, finding.severity) == ("too_long", 3, "error")
    assert f"{tokens[-1]:,}" in finding.text


@pytest.mark.parametrize(
    "also", [{"content": " "}, {"content": "a", "emotion": "calm"}], ids=["warning", "error"]
)
def test_an_example_over_the_limit_is_found_beside_what_else_is_wrong_with_it(
    tmp_path: Path, also: dict[str, str]
) -> None:
    path = bad_file(tmp_path, line({"role": "user", **also}, {**ANSWER, "content": "ねむれ" * 90}))

    assert "too_long" in codes(check_file(path, max_tokens=100))


def test_too_few_examples_count_for_training_and_one_is_enough_for_validation(
    tmp_path: Path,
) -> None:
    nine, none = training_file(tmp_path, 9), training_file(tmp_path, 0)
    (finding,) = check_file(nine)

    assert (finding.code, finding.line, finding.severity) == ("too_few_examples", None, "error")
    assert "9件" in finding.text
    assert "10件" in finding.remedy
    assert check_file(nine, kind="validation") == []
    assert codes(check_file(none, kind="validation")) == ["too_few_examples"]


def test_a_file_over_the_limit_of_bytes_is_found(tmp_path: Path) -> None:
    path = training_file(tmp_path)
    (finding,) = check_file(path, max_bytes=path.stat().st_size - 1)

    assert (finding.code, finding.line, finding.severity) == ("file_too_large", None, "error")
    assert check_file(path, max_bytes=path.stat().st_size) == []


def test_a_repeated_line_is_a_warning_that_names_the_first(tmp_path: Path) -> None:
    path = training_file(tmp_path)
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines, lines[3], lines[3]]) + b"\n")
    findings = check_file(path)

    assert [(f.code, f.line, f.severity) for f in findings] == [
        ("duplicate_line", 13, "warning"),
        ("duplicate_line", 14, "warning"),
    ]
    assert all("4行目" in finding.text for finding in findings)


def test_a_conversation_in_training_and_validation_is_a_warning_that_names_its_line(
    tmp_path: Path,
) -> None:
    trained = training_file(tmp_path)
    messages = json.loads(trained.read_text("utf-8").splitlines()[6])["messages"]
    swapped = [dict(reversed(message.items())) for message in messages]
    other = write_jsonl(tmp_path / "v.jsonl", [{"messages": [USER, ANSWER]}, {"messages": swapped}])
    (finding,) = check_file(other, kind="validation", compare_with=trained)

    assert (finding.code, finding.line, finding.severity) == ("shared_conversation", 2, "warning")
    assert "7行目" in finding.text


@pytest.mark.parametrize(
    "form",
    [
        {"conversations": [*({**m, "mood": "m"} for m in (USER, ANSWER)), USER]},
        {"messages": json.dumps([*({**m, "mood": "m"} for m in (USER, ANSWER)), USER])},
        {"dialogue": [{"role": m["role"], "utterance": "話"} for m in (USER, ANSWER, USER)]},
    ],
    ids=["conversations", "text", "dialogue"],
)
def test_what_a_change_of_form_leaves_out_is_said(
    tmp_path: Path, log: Callable[[], list[str]], form: dict[str, Any]
) -> None:
    fix_file(write_jsonl(tmp_path / "a.jsonl", [{**form, "note": "memo"}]))
    told = "\n".join(log())

    assert "note（1件）" in told
    assert "最後の assistant より後の発話（user）を除きました（1件）" in told
    assert ("mood" in told) == ("mood" in json.dumps(form))


REPEATS = {"duplicate_line", "shared_conversation"}


def test_every_problem_there_is_has_a_test_above() -> None:
    apart = {
        "model_without_images",
        "not_jsonl",
        "foreign_encoding",
        "too_long",
        "too_few_examples",
        "file_too_large",
    }

    assert {code for code, *_ in IN_A_LINE} | apart | REPEATS == set(PROBLEMS)


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_is_not_what_the_service_takes_whatever_it_is_called(
    tmp_path: Path, indent: int | None
) -> None:
    path = tmp_path / "a.jsonl"
    sound = [{"messages": one["messages"]} for one in examples(10)]
    path.write_text(json.dumps(sound, indent=indent), encoding="utf-8")

    assert [(f.line, f.code, f.severity) for f in check_file(path)] == [(1, "not_jsonl", "error")]


def test_all_problems_of_a_file_are_told_at_once_in_the_order_of_the_lines(
    tmp_path: Path,
) -> None:
    raw = [BOM + b"{", b"", line({**USER, "role": "x", "a": 1}, USER), b"\xff"]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(raw))
    findings = check_file(path)

    assert [(f.line, f.code) for f in findings] == [
        (1, "bom"),
        (1, "invalid_json"),
        (2, "blank_line"),
        (3, "unknown_key"),
        (3, "unknown_role"),
        (3, "no_trained_message"),
        (3, "last_not_assistant"),
        (4, "encoding"),
        (None, "too_few_examples"),
    ]


@pytest.mark.parametrize(
    "raw",
    [
        line(USER, ANSWER),
        line({"role": "system", "content": "傾聴"}, USER, {**ANSWER, "weight": 0}, USER, ANSWER),
        line(USER, ASKED, FOUND, ANSWER, tools=[TOOL], parallel_tool_calls=False),
        line(USER, ASKED, tools=[TOOL]),
        line(USER, ASKED, FOUND, {**ANSWER, "weight": 0}, USER, ASKED, FOUND, ASKED, tools=[TOOL]),
        line(USER, ANSWER, tools=[{**TOOL, **function(parameters={}, strict=None)}]),
        line(USER, {**ANSWER, "function_call": None, "refusal": None}),
        line(image("https://example.com/a.png"), ANSWER),
        line(image("data:image/png;base64,AAAA"), ANSWER),
        line(USER, {**ANSWER, "content": "「\u3000」"}),
        line({**USER, "content": [{"type": "text", "text": "a"}]}, ANSWER),
        line({**USER, "name": "taro"}, {**ANSWER, "weight": 1}),
        line(USER, {**ANSWER, "content": "<|im_start <|im_start| > <|other|>"}),
        line(USER, ANSWER) + b"\r",
    ],
)
def test_what_the_service_takes_has_no_finding(tmp_path: Path, raw: bytes) -> None:
    path = bad_file(tmp_path, raw)

    assert check_file(path) == []
    assert judge_training_file(path.read_bytes(), purpose="training") is None


@pytest.mark.parametrize("name", ["nothing.jsonl", "."])
def test_a_file_that_cannot_be_read_is_an_error_of_the_data(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="読めません"):
        check_file(tmp_path / name)


# ── Against the endpoint's own judgement ─────────────────────────────────────────────────────

odd = st.sampled_from([None, 0, 1, True, 0.0, "", "x", [], {}, ["user"]])
contents = (
    awkward_text
    | odd
    | st.sampled_from(["a<|endoftext|>", "\ud800", "<|im_sep|"])
    | st.lists(
        st.fixed_dictionaries(
            {"type": st.sampled_from(["text", "image_url"])},
            optional={"text": st.sampled_from(["a", "", 3])},
        ),
        max_size=2,
    )
)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "assistant", "system", "tool"]) | odd},
    optional={
        "content": contents,
        "weight": st.sampled_from([0, 1]) | odd,
        "name": awkward_text,
        "tool_call_id": st.sampled_from(["c1", 3]),
        "tool_calls": st.sampled_from([[CALL], [], None]),
        "emotion": st.just("calm"),
    },
)
sound = st.lists(awkward_text.filter(bool), min_size=1, max_size=3).map(
    lambda texts: [USER, *({"role": "assistant", "content": text} for text in texts)]
)
values = st.fixed_dictionaries(
    {"messages": sound | sound | st.lists(messages | odd, max_size=4) | odd},
    optional={"tools": st.just([]), "id": st.just("d1")},
)
# Calls and their results, right and wrong, in any order.
said = st.sampled_from(
    [
        *(USER, USER, ANSWER, ANSWER, ASKED, ASKED, FOUND, FOUND),
        {**ASKED, "tool_calls": [CALL, {**CALL, "id": "c2"}]},
        {**FOUND, "tool_call_id": "c2"},
        {**ANSWER, "tool_calls": [CALL]},
        asked(**function(arguments={})),
        asked(**function(arguments="{")),
        asked(**function(name="g")),
        asked(id=""),
        {**ASKED, "tool_calls": None},
        {**USER, "tool_calls": [CALL]},
        {**USER, "name": None},
        {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "a"},
        {**ANSWER, "function_call": {"name": "f"}},
        image("https://example.com/a.png"),
        image("a.png", "assistant"),
    ]
)
tools = st.sampled_from(
    [
        *([TOOL], [TOOL], [TOOL, {**TOOL, **function(name="g", parameters={})}]),
        *([], None, "[]", [json.dumps(TOOL)], {}, [TOOL["function"]]),
        [{**TOOL, **function(name="天気")}],
        [{**TOOL, **function(description=None, strict=None)}],
    ]
)
called = st.fixed_dictionaries(
    {"messages": st.lists(said, max_size=4).map(lambda few: [USER, *few, ANSWER])},
    optional={"tools": tools, "parallel_tool_calls": st.sampled_from([True, None, 1])},
)
others = st.fixed_dictionaries(
    {"messages": st.just([USER]) | sound},
    optional={
        **dict.fromkeys(("system", "reference_answer", "chosen", "rejected"), st.just("a")),
        **{"functions": st.just([TOOL["function"]]), "function_call": st.just("auto")},
    },
)
raw_lines = st.one_of(
    (called | others).map(lambda value: json.dumps(value).encode()),
    values.map(lambda value: json.dumps(value).encode()),
    values.map(lambda value: json.dumps(value).encode()),
    values.map(
        lambda value: json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    ),
    st.sampled_from([b"", b" ", b"{", b"null", b"7", b"\xff", BOM, b'{"messages": NaN}', b"\r"]),
)


@st.composite
def bad_files(draw: st.DrawFn) -> bytes:
    """Mostly good lines, some of them bad in some way, with or without a mark and an end."""
    good = [line(*one["messages"]) for one in examples(draw(st.sampled_from([0, 3, 10, 12])))]
    lines = [*good, *draw(st.lists(raw_lines, max_size=3))]
    end = draw(st.sampled_from([b"", b"\n", b"\r\n", b"\n\n"]))
    return draw(st.sampled_from([b"", b"", BOM])) + b"\n".join(draw(st.permutations(lines))) + end


# What the service takes for all that is known, and nobody means.
OURS_ALONE = {"blank_answer", "local_image"}


@given(bad_files(), st.sampled_from(["training", "validation"]))
def test_a_file_has_an_error_where_the_endpoint_finds_one_and_nowhere_else(
    content: bytes, kind: Literal["training", "validation"]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.jsonl")
        path.write_bytes(content)
        found = [f for f in errors(check_file(path, kind=kind)) if f.code not in OURS_ALONE]
    judged = judge_training_file(content, purpose=kind)

    assert bool(found) == (judged is not None), (codes(found), judged)
    if judged is not None and judged.line is not None:
        assert found[0].line == judged.line


@given(st.lists(called, min_size=1, max_size=2))
def test_what_the_check_passes_the_endpoint_takes(values: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write_jsonl(Path(folder, "a.jsonl"), values)
        passed = errors(check_file(path, kind="validation")) == []
        judged = judge_training_file(path.read_bytes(), purpose="validation")

    assert judged is None or not passed


@pytest.mark.skipif(not CASES.exists(), reason="the small inputs lie beside the project")
@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("ends_with_tool_call", []),
        ("tools_definitions_6_large", []),
        ("weight0_first_answer", []),
        ("dpo_preferred_output", ["preference_file"]),
        ("image_in_assistant", ["wrong_part"]),
        ("legacy_functions_function_call", ["legacy_functions"]),
        ("role_trailing_space", ["role_spelling"]),
        ("tool_call_arguments_object", ["arguments_object"]),
        ("tool_call_unanswered_then_user", ["unanswered_call"]),
        ("tool_message_wrong_call_id", ["unknown_call_id", "unanswered_call"]),
        ("tools_as_json_string", ["tools_text"]),
        ("weight_float_from_pandas", ["weight_type"]),
        ("whitespace_assistant", ["blank_answer"]),
    ],
)
def test_a_file_that_was_seen_has_its_one_finding(name: str, found: list[str]) -> None:
    findings = check_file(CASES / f"{name}.jsonl")

    assert codes(findings) == found
    assert all(finding.line == 2 for finding in findings)


@pytest.mark.parametrize("role", ["user ", "user\u3000", "user\u200b"])
def test_a_blank_in_a_role_is_shown(tmp_path: Path, role: str) -> None:
    (finding,) = check_file(bad_file(tmp_path, line({**USER, "role": role}, ANSWER)))

    assert "「user␣」" in finding.text


def test_the_id_of_a_call_is_named(tmp_path: Path) -> None:
    (finding,) = check_file(bad_file(tmp_path, calling(ASKED, USER)))
    (stray,) = check_file(bad_file(tmp_path, calling({**FOUND, "tool_call_id": "c9"})))

    assert " c1 " in finding.text
    assert "c9 " in stray.text


def test_the_same_conversation_with_its_keys_in_another_order_is_a_repeated_line(
    tmp_path: Path,
) -> None:
    one = {"messages": [USER, ASKED, FOUND, ANSWER], "tools": [TOOL]}
    turned = {
        "tools": [dict(reversed(TOOL.items()))],
        "messages": [dict(reversed(message.items())) for message in (USER, ASKED, FOUND, ANSWER)],
    }
    other = {**one, "tools": [{**TOOL, **function(strict=True)}, TOOL]}
    path = write_jsonl(tmp_path / "a.jsonl", [one, other, turned])
    (finding,) = check_file(path, kind="validation")
    fixed, _, kept, _ = fix_file(path)

    assert (finding.code, finding.line) == ("duplicate_line", 3)
    assert "1行目" in finding.text
    assert kept == 2
    assert Path(fixed).read_text("utf-8").splitlines() == path.read_text("utf-8").splitlines()[:2]


# ── Mending ──────────────────────────────────────────────────────────────────────────────────


@given(bad_files())
def test_what_is_fixed_passes_the_check_the_rejects_hold_the_rest_and_the_original_stays(
    content: bytes,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.jsonl")
        path.write_bytes(content)
        bad = {f.line for f in errors(check_file(path))}
        fixed, rejects, examples_kept, examples_lost = fix_file(path)
        kept = Path(fixed).read_bytes().splitlines()
        lost = [json.loads(one) for one in Path(rejects).read_bytes().splitlines()]
        after = check_file(fixed, kind="validation")
        names = {one.name for one in Path(folder).iterdir()}
        untouched = path.read_bytes() == content
    lines = content.removeprefix(BOM).split(b"\n")

    assert untouched
    assert names == {"a.jsonl", "a.fixed.jsonl", "a.rejects.jsonl"}
    assert (len(kept), len(lost)) == (examples_kept, examples_lost)
    assert set(codes(errors(after))) <= {"too_few_examples"}
    assert "duplicate_line" not in codes(after)
    assert {one["line"] for one in lost} <= bad
    saved = [json.loads(one) for one in kept]
    for number, raw in enumerate(lines, 1):
        if number not in bad and raw.strip():
            assert json.loads(raw) in saved
    for one in lost:
        assert one["codes"]
        assert set(one["codes"]) <= set(PROBLEMS)
        raw = lines[one["line"] - 1].rstrip(b"\r\n").decode(errors="backslashreplace")
        assert one["raw"] in (raw, "\ufeff" + raw)


def test_what_can_be_mended_is_mended_and_nothing_else_is_changed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b"\n".join(
            [
                BOM + line(USER, ANSWER),
                b"",
                line(USER, {**ANSWER, "emotion": "calm"}, prompt="a"),
                line(USER, ANSWER),
                line({**USER, "name": "a"}, {**ANSWER, "weight": 0}, USER, ANSWER, USER, USER),
                line({**USER, "role": "narrator"}, ANSWER),
            ]
        )
    )
    fixed, rejects, kept, lost = fix_file(path)
    (reject,) = [json.loads(one) for one in Path(rejects).read_text("utf-8").splitlines()]

    assert (kept, lost) == (2, 1)
    assert [one["messages"] for one in read_examples(fixed)] == [
        [USER, ANSWER],
        [{**USER, "name": "a"}, {**ANSWER, "weight": 0}, USER, ANSWER],
    ]
    assert (reject["line"], reject["codes"]) == (6, ["unknown_role"])
    assert json.loads(reject["raw"])["messages"][0]["role"] == "narrator"


MENDED: list[tuple[str, bytes, bytes]] = [
    ("role「user␣」を user", line({**USER, "role": "user "}, ANSWER), line(USER, ANSWER)),
    ("role「human」を user", line({**USER, "role": "human"}, ANSWER), line(USER, ANSWER)),
    (
        "role「developer」を system",
        line({"role": "developer", "content": "傾聴"}, USER, ANSWER),
        line({"role": "system", "content": "傾聴"}, USER, ANSWER),
    ),
    ("role「GPT」を assistant", line(USER, {**ANSWER, "role": "GPT"}), line(USER, ANSWER)),
    (
        "weight 1.0 を",
        line(USER, {**ANSWER, "weight": 1.0}),
        line(USER, {**ANSWER, "weight": 1}),
    ),
    (
        "weight false を",
        line(USER, {**ANSWER, "weight": False}, ANSWER),
        line(USER, {**ANSWER, "weight": 0}, ANSWER),
    ),
    ("空の name を", line({**USER, "name": None}, ANSWER), line(USER, ANSWER)),
    ("空の weight を", line({**USER, "weight": None}, ANSWER), line(USER, ANSWER)),
    ("空の tool_calls を", line(USER, {**ANSWER, "tool_calls": None}), line(USER, ANSWER)),
    ("空の tools を", line(USER, ANSWER, tools=None), line(USER, ANSWER)),
    (
        "空の tools[0].function.description を",
        line(USER, ANSWER, tools=[{**TOOL, "function": {"name": "f", "description": None}}]),
        line(USER, ANSWER, tools=[TOOL]),
    ),
    (
        "文字列の tools を",
        line(USER, ANSWER, tools=json.dumps([TOOL])),
        line(USER, ANSWER, tools=[TOOL]),
    ),
    (
        "オブジェクトの arguments を",
        calling(asked(**function(arguments={"町": "東京"})), FOUND),
        calling(asked(**function(arguments='{"町": "東京"}')), FOUND),
    ),
    (
        "system を system の発話",
        line(USER, ANSWER, system="傾聴"),
        line({"role": "system", "content": "傾聴"}, USER, ANSWER),
    ),
    ("使えないキー prompt を", line(USER, ANSWER, prompt="a"), line(USER, ANSWER)),
    ("後の発話（user）を", line(USER, ANSWER, USER), line(USER, ANSWER)),
    (
        "functions と function_call を",
        line(
            USER,
            {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}, "weight": 0},
            {"role": "function", "name": "f", "content": "あり"},
            {"role": "assistant", "function_call": {"name": "f", "arguments": {}}},
            {"role": "function", "name": "f", "content": "なし"},
            ANSWER,
            functions=[TOOL["function"]],
        ),
        line(
            USER,
            {"role": "assistant", "weight": 0, "tool_calls": [{**CALL, "id": "call_1"}]},
            {"role": "tool", "tool_call_id": "call_1", "content": "あり"},
            {"role": "assistant", "tool_calls": [{**CALL, "id": "call_2"}]},
            {"role": "tool", "tool_call_id": "call_2", "content": "なし"},
            ANSWER,
            tools=[TOOL],
        ),
    ),
]


@pytest.mark.parametrize(("said", "raw", "mended"), MENDED, ids=[one for one, *_ in MENDED])
def test_what_needs_no_guess_is_mended_and_said(
    tmp_path: Path, log: Callable[[], list[str]], said: str, raw: bytes, mended: bytes
) -> None:
    path = bad_file(tmp_path, raw)
    fixed, _, kept, lost = fix_file(path)
    (told,) = [text for text in log() if said in text]

    assert (kept, lost) == (12, 0)
    assert json.loads(Path(fixed).read_bytes().splitlines()[2]) == json.loads(mended)
    assert "（1件）" in told
    assert errors(check_file(path)) != []
    assert check_file(fixed) == []


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (line(USER, {"role": "function", "name": "f", "content": "a"}, ANSWER), "legacy_functions"),
        (
            line(
                USER,
                {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
                {"role": "function", "name": "g", "content": "a"},
                ANSWER,
                functions=[TOOL["function"]],
            ),
            "legacy_functions",
        ),
        (line(USER, ANSWER, functions=[TOOL["function"]], tools=[TOOL]), "legacy_functions"),
        (line(USER, {"function_call": {"name": "f", "arguments": "{}"}}), "unknown_role"),
        (line({"role": "system", "content": "a"}, USER, ANSWER, system="b"), "top_level_system"),
        (line(USER, ANSWER, tools="天気"), "tools_text"),
        (line(USER, ANSWER, tools='{"name": "f"}'), "tools_text"),
        (line(USER, {**ANSWER, "content": " "}), "blank_answer"),
        (line(USER, reference_answer="a"), "reinforcement_file"),
        (calling(ASKED, USER), "unanswered_call"),
    ],
)
def test_what_needs_a_guess_is_rejected_by_its_name(tmp_path: Path, raw: bytes, code: str) -> None:
    _, rejects, kept, lost = fix_file(bad_file(tmp_path, raw))
    (reject,) = [json.loads(one) for one in Path(rejects).read_text("utf-8").splitlines()]

    assert (kept, lost) == (11, 1)
    assert code in reject["codes"]
    assert reject["raw"] == raw.decode()


@given(called | others | values)
def test_mending_leaves_out_no_text_but_of_keys_and_of_what_follows_the_last_answer(
    value: dict[str, Any],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write_jsonl(Path(folder, "a.jsonl"), [value])
        found = codes(check_file(path, kind="validation"))
        fixed, _, kept, _ = fix_file(path)
        written = Path(fixed).read_text("utf-8")

    def texts(item: object) -> Iterator[str]:
        if isinstance(item, dict):
            for key, inner in item.items():
                yield from () if key in ("role", "weight", "arguments") else texts(inner)
        elif isinstance(item, list):
            for inner in item:
                yield from texts(inner)
        elif isinstance(item, str) and not item.startswith("["):  # tools as text
            yield json.dumps(item, ensure_ascii=False)

    if kept and not {"unknown_key", "last_not_assistant"} & set(found):
        assert [text for text in texts(value) if text not in written] == []


def test_mending_never_writes_over_a_file_that_is_there(tmp_path: Path) -> None:
    path = training_file(tmp_path)
    fixed, _, _, _ = fix_file(path)
    Path(fixed).write_text("mine")
    with pytest.raises(DataError, match="fixed"):
        fix_file(path)

    assert Path(fixed).read_text() == "mine"


def test_a_number_beyond_all_numbers_is_no_reason_to_crash(tmp_path: Path) -> None:
    path = bad_file(tmp_path, line(USER, ANSWER, tools=[1]).replace(b"[1]", b"[1e999]"))
    fixed, _, kept, lost = fix_file(path)

    assert kept + lost == 12
    assert errors(check_file(fixed, kind="validation")) == []


# ── The command line ─────────────────────────────────────────────────────────────────────────


@pytest.fixture
def cli(
    capsys: pytest.CaptureFixture[str], clean_environment: Path
) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: object) -> tuple[int, str, str]:
        code = openai_sft_example.main(["--check-file", *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_a_good_file_is_said_to_be_good_without_a_key(
    cli: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    path = training_file(tmp_path)

    code, out, err = cli(path)

    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"{path}: JSON Lines、UTF-8、12件（messages 12件）",
        "",
        "問題はありません。",
        f"次は: openai-sft --data-only --dataset {path}",
    ]
    assert cli(path, "--json") == (0, "[]\n", "")


def test_the_next_command_names_all_speakers_that_were_named(
    cli: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    said = [{"role": name, "utterance": "話"} for name in "ABC"]
    path = write_jsonl(tmp_path / "a.jsonl", [{"dialogue": said}])
    _, out, _ = cli(path, "--assistant", "B", "C", "--user", "A")

    assert out.endswith(f"--check-file {path} --assistant B C --user A --fix\n")


def test_an_error_ends_with_2_and_a_warning_with_0(
    cli: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    path = bad_file(tmp_path, line({**USER, "content": " "}, ANSWER))
    warned, out, _ = cli(path)
    path = bad_file(tmp_path, line(USER))
    failed, _, _ = cli(path)

    assert (warned, failed) == (0, 2)
    assert "注意 [blank_content]" in out


def test_the_findings_are_json_on_stdout_and_nothing_else(
    cli: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    path = bad_file(tmp_path, line({**USER, "role": "client"}))
    code, out, err = cli(path, "--json", "--fix")

    assert code == 2
    assert json.loads(out) == [asdict(finding) for finding in check_file(path)]
    assert set(json.loads(out)[0]) == {
        *("path", "line", "message_index", "code", "severity", "text", "remedy")
    }
    assert "examples-12.fixed.jsonl" in err
    assert "11件" in err
    assert "examples-12.rejects.jsonl" in err
    assert "1件" in err


@pytest.mark.parametrize("case", ["missing", "fixed before", "no room for the name"])
def test_what_cannot_be_checked_or_written_is_one_line(
    cli: Callable[..., tuple[int, str, str]], tmp_path: Path, case: str
) -> None:
    path = tmp_path / "nothing.jsonl"
    if case == "fixed before":
        fix_file(path := training_file(tmp_path))
    elif case == "no room for the name":
        path = training_file(tmp_path).rename(tmp_path / ("a" * 244 + ".jsonl"))
    code, out, err = cli(path, "--fix")

    assert code in (1, 2)
    assert out == ""
    assert err.startswith("エラー: ")
    assert err.count("\n") == 1


# ── Before anything is saved or sent ─────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "bad",
    [
        {"messages": [USER]},
        {"messages": []},
        {"messages": [{**USER, "content": "<|im_end|>"}, ANSWER]},
        {"messages": [{**USER, "content": "\udc00"}, ANSWER]},
        {"messages": [USER, ANSWER], "emotion": "calm"},
        {"messages": [{**USER, "role": []}, ANSWER]},
    ],
    ids=lambda bad: str(bad)[:40].encode("ascii", "replace").decode(),
)
def test_what_the_service_would_refuse_is_told_with_its_place_and_never_saved(
    clean_environment: Path, bad: dict[str, Any]
) -> None:
    sft = OpenAISFT(offline=True, output_dir="out", verbose=False)
    with pytest.raises(DataError, match=r"valid\[2\]（x）"):
        sft.save_all_datasets(examples(10), examples(1), [*examples(1), {"id": "x", **bad}])

    assert [path for path in Path("out").rglob("*") if "data" in path.name] == []


def test_data_with_an_error_is_refused_before_anything_is_sent(
    make_sft: Callable[..., OpenAISFT], endpoint: Rehearsal, tmp_path: Path
) -> None:
    path = write_jsonl(
        tmp_path / "chat.jsonl",
        [{"messages": [{**USER, "content": f"<|im_start|>{n}"}, ANSWER]} for n in range(12)],
    )
    with pytest.raises(DataError, match="special_token"):
        make_sft(dataset=str(path)).run_full_pipeline(1, 4)
    with pytest.raises(DataError, match=r"chat\.jsonl:1.*special_token"):
        make_sft().upload_training_file(path)

    assert posts(endpoint) == []


def test_the_same_example_twice_is_told_before_it_is_paid_for(
    clean_environment: Path, log: Callable[[], list[str]]
) -> None:
    """Two dialogues may differ only in what is cut at their end."""
    rows = records(12)
    for number in range(3):
        row = {**rows[0], "id": f"again{number}"}
        row["dialogue"] = [*row["dialogue"], {"role": "client", "utterance": f"では{number}"}]
        rows.append(row)
    path = write_jsonl(Path("a.jsonl"), rows)
    OpenAISFT(offline=True, dataset=str(path), verbose=False).prepare_data()

    assert any("duplicate_line" in one or "shared_conversation" in one for one in log())


# ── Over-long conversations ──────────────────────────────────────────────────────────────────

talks = st.lists(
    st.tuples(st.sampled_from(["user", "assistant"]), awkward_text.map(lambda text: text + "。")),
    min_size=1,
    max_size=10,
)


@given(talks, st.sampled_from([[], [{"role": "system", "content": "傾聴"}]]), st.integers(10, 90))
def test_the_parts_of_a_conversation_fit_end_with_the_assistant_and_lose_nothing(
    said: list[tuple[str, str]], head: list[dict[str, str]], limit: int
) -> None:
    body = [{"role": role, "content": text} for role, text in [*said, ("assistant", "はい")]]
    whole: Any = {"id": "d1", "messages": [*head, *body], "tools": []}
    assume(COUNTER.count(whole["messages"]).total > limit)
    try:
        parts = split_long_example(whole, COUNTER, limit)
    except DataError as error:
        refusal = str(error)
    else:
        refusal = None
    if refusal is not None:
        assert "d1" in refusal
        return
    bodies = [part["messages"][len(head) :] for part in parts]

    assert all(COUNTER.count(part["messages"]).total <= limit for part in parts)
    assert all(part["messages"][-1]["role"] == "assistant" for part in parts)
    assert all(part["messages"][: len(head)] == head for part in parts)
    assert all(part["tools"] == [] for part in parts)
    assert all(part[0]["role"] == "user" for part in bodies[1:])
    assert [message for part in bodies for message in part] == body
    assert [part["id"] for part in parts] == [f"d1/{n}" for n in range(1, len(parts) + 1)]
    for one, following in pairwise(bodies):  # no part is shorter than it has to be
        upto = next(
            (
                n
                for n, m in enumerate(following[1:], 1)
                if m["role"] == "user" and following[n - 1]["role"] == "assistant"
            ),
            len(following),
        )
        assert COUNTER.count([*head, *one, *following[:upto]]).total > limit


@pytest.mark.parametrize(
    ("said", "less", "sizes"),
    [(("ab", "cdefg"), 0, [4, 4]), (("a", "b"), 1, [2, 2, 2, 2])],
    ids=["that would add up to more", "that would add up to less"],
)
def test_a_part_is_counted_as_a_whole_and_not_by_its_rounded_turns(
    said: tuple[str, str], less: int, sizes: list[int]
) -> None:
    exchange: Any = example("a", *said)["messages"]
    limit = COUNTER.count(exchange * 2).total - less
    parts = split_long_example({"id": "a", "messages": exchange * 4}, COUNTER, limit)

    assert [len(part["messages"]) for part in parts] == sizes


def test_a_tools_answer_is_never_cut_from_its_question() -> None:
    exchange = [USER, ASKED, FOUND, ANSWER]
    limit = COUNTER.count(exchange).total + 1
    parts = split_long_example({"id": "a", "messages": exchange * 3}, COUNTER, limit)

    assert [part["messages"] for part in parts] == [exchange] * 3


def test_a_part_may_be_as_long_as_the_limit() -> None:
    exchange = [USER, ANSWER]
    limit = COUNTER.count(exchange * 2).total
    parts = split_long_example({"id": "a", "messages": exchange * 3}, COUNTER, limit)

    assert [part["messages"] for part in parts] == [exchange * 2, exchange]


def talk(name: str, exchanges: int, **first: Any) -> dict[str, Any]:
    """About 4,000 tokens an exchange."""
    said = []
    for number in range(exchanges):
        words = " ".join(str(n) for n in range(number, number + 2000))
        said += [{"role": "user", "content": f"{name} {number}"}]
        said += [{"role": "assistant", "content": words, **(first if number < 16 else {})}]
    return {"id": name, "messages": said}


@pytest.fixture(scope="module")
def long_file(tmp_path_factory: pytest.TempPathFactory, vocabulary: Path) -> Path:
    """One conversation in the middle of the file is over the service's limit."""
    rows = [*examples(12), talk("long", 20)]
    return write_jsonl(tmp_path_factory.mktemp("long") / "a.jsonl", rows)


def test_an_over_long_conversation_is_split_at_a_turn_by_default_and_that_is_said(
    long_file: Path, clean_environment: Path, log: Callable[[], list[str]]
) -> None:
    sft = OpenAISFT(offline=True, dataset=str(long_file), output_dir="out", verbose=False)
    files = sft.prepare_data().files
    written = [
        one["messages"] for name in ("train", "test", "valid") for one in read_examples(files[name])
    ]
    parts = [one for one in written if one[0]["content"].startswith("long ")]

    assert len(written) == 12 + 2
    assert [m for one in parts for m in one] == talk("long", 20)["messages"]
    assert all(
        codes(check_file(files[name], kind="validation")) == []
        for name in ("train", "test", "valid")
    )
    assert any("long" in one and f"{MAX_EXAMPLE_TOKENS:,}" in one and "2件" in one for one in log())
    manifest = json.loads(Path(files["manifest"]).read_text("utf-8"))
    lines = [one for part in manifest["splits"].values() for one in part["lines"]]
    assert [one["source"] for one in lines if one["id"].startswith("long/")] == [
        f"{long_file}:13"
    ] * 2


def test_the_longest_example_the_service_takes_is_65_536_tokens(tmp_path: Path) -> None:
    def found(tokens: int) -> list[Finding]:
        said = [USER, {**ANSWER, "content": " a" * (tokens - 3 - 4 - 4 - user)}]
        return check_file(bad_file(tmp_path, line(*said)))

    user = TokenCounter(load_vocabulary()).count([USER]).total - 3 - 4
    (finding,) = found(65_537)

    assert found(65_536) == []
    assert "65,537" in finding.text
    assert "65,536" in finding.text


@pytest.mark.parametrize(
    ("exchanges", "text"), [(30, "\U0002a700" * 300), (8000, "a")], ids=["rare", "many"]
)
def test_a_conversation_is_over_the_limit_of_tokens_however_few_characters_it_has(
    exchanges: int, text: str
) -> None:
    said = [{**USER, "content": text}, {**ANSWER, "content": text}] * exchanges
    sft = OpenAISFT(offline=True, long_examples="drop", verbose=False)

    assert TokenCounter(load_vocabulary()).count(said).total > MAX_EXAMPLE_TOKENS
    assert sft.prepare_dataset([{"id": "d1", "messages": said}]) == []


def test_an_over_long_conversation_can_be_dropped_or_refused(
    long_file: Path, clean_environment: Path, log: Callable[[], list[str]]
) -> None:
    def prepare(how: Any) -> int:
        sft = OpenAISFT(
            offline=True, dataset=str(long_file), long_examples=how, output_dir=how, verbose=False
        )
        return sum(sft.prepare_data().examples.values())

    assert prepare("drop") == 12
    assert any("long" in one and "除きました" in one for one in log())
    with pytest.raises(DataError, match="「long」"):
        prepare("refuse")


def test_fixing_splits_an_over_long_conversation_into_parts_that_pass(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(line(*talk("long", 20)["messages"]) + b"\n" + line(USER, ANSWER))
    before = codes(check_file(path, kind="validation"))
    fixed, _, kept, lost = fix_file(path)

    assert before == ["too_long"]
    assert (kept, lost) == (3, 0)
    assert check_file(fixed, kind="validation") == []


def test_fixing_rejects_an_exchange_that_alone_is_too_long(tmp_path: Path) -> None:
    said = talk("long", 20)["messages"][1::2]
    monologue = {**ANSWER, "content": " ".join(message["content"] for message in said)}
    path = tmp_path / "a.jsonl"
    path.write_bytes(line(USER, monologue))
    _, rejects, kept, lost = fix_file(path)

    assert (kept, lost) == (0, 1)
    assert json.loads(Path(rejects).read_text("utf-8"))["codes"] == ["too_long"]


def test_a_part_with_nothing_to_train_on_is_no_example(
    tmp_path: Path, clean_environment: Path
) -> None:
    """What is weighted 0 throughout the first part was context and not to be learnt."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(line(*talk("long", 20, weight=0)["messages"]))
    fixed, _, _, _ = fix_file(path)
    rows = [*examples(12), talk("long", 20, weight=0)]
    data = write_jsonl(tmp_path / "b.jsonl", rows)
    summary = OpenAISFT(offline=True, dataset=str(data), verbose=False).prepare_data()

    assert check_file(fixed, kind="validation") == []
    assert sum(summary.examples.values()) >= 13


def test_the_original_is_named_by_its_hash_after_everything(tmp_path: Path) -> None:
    path = bad_file(tmp_path, b"{")
    before = hashlib.sha256(path.read_bytes()).digest()
    check_file(path)
    fix_file(path)

    assert hashlib.sha256(path.read_bytes()).digest() == before


def test_an_example_with_all_that_is_allowed_comes_through_unchanged(tmp_path: Path) -> None:
    rows = [example(f"d{n}", f"相談{n}", "はい") for n in range(12)]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": one["messages"]} for one in rows])
    fixed, _, kept, lost = fix_file(path)

    assert (kept, lost) == (12, 0)
    assert Path(fixed).read_bytes() == path.read_bytes()
