"""From files to examples: reading, splitting, converting, and the files that are written."""

from __future__ import annotations

import gc
import itertools
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from helpers import KOKOROCHAT, PROJECT, awkward_text, record, records, turns, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

import openai_sft_example
from openai_sft import (
    ROLES,
    ConfigurationError,
    DataError,
    Dialogue,
    OpenAISFT,
    Preparation,
    Selection,
    UnknownRole,
    dialogue_row,
    example_line,
    parse_dialogue,
    read_dialogues,
    read_examples,
    split_dialogues,
    to_example,
    with_user_first,
    write_new_file,
)
from openai_sft_rehearsal import example_dialogues, judge_training_file


def parse(row: object) -> Dialogue:
    return parse_dialogue(row, fallback_id="7", source="here")


def spoken(*said: tuple[str, str]) -> Dialogue:
    return parse(record(1, *said))


def dialogues(count: int) -> list[Dialogue]:
    return [parse(row) for row in records(count)]


def ids(part: list[Any]) -> list[str]:
    return [dialogue.id for dialogue in part]


POOL = dialogues(60)

# ── Reading ──────────────────────────────────────────────────────────────────────────────────


def test_a_folder_and_each_kind_of_file_give_the_same_dialogues(tmp_path: Path) -> None:
    rows = example_dialogues()
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, row in enumerate(rows):
        (folder / f"{number}.json").write_text(json.dumps(row, ensure_ascii=False), "utf-8")
    (folder / "README.md").write_text("# not data")
    (folder / ".hidden.json").write_text("not JSON")
    (tmp_path / "list.json").write_text(json.dumps(rows), "utf-8")
    write_jsonl(tmp_path / "lines.jsonl", rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "table.parquet")

    def content(source: str) -> set[tuple[str, str]]:
        return {(d.id, d.digest) for d in read_dialogues(str(tmp_path / source))}

    assert len(content("folder")) == len(rows)
    assert content("list.json") == content("folder")
    assert content("lines.jsonl") == content("folder")
    assert content("table.parquet") == content("folder")


def test_one_dialogue_in_one_json_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps(record(3)), "utf-8")

    assert ids(read_dialogues(str(tmp_path / "one.json"))) == ["d3"]


def test_a_byte_order_mark_crlf_and_blank_lines_in_a_jsonl_file_are_no_hindrance(
    tmp_path: Path,
) -> None:
    lines = [json.dumps(record(n), ensure_ascii=False) for n in (1, 2)]
    (tmp_path / "a.jsonl").write_bytes(
        b"\xef\xbb\xbf" + f"{lines[0]}\r\n\r\n  \r\n{lines[1]}".encode()
    )

    assert ids(read_dialogues(str(tmp_path / "a.jsonl"))) == ["d1", "d2"]


def test_a_line_separator_inside_a_text_does_not_end_a_line_of_jsonl(tmp_path: Path) -> None:
    row = record(1, ("client", "一\u2028二\x85三\u2029四"), ("counselor", "はい"))
    write_jsonl(tmp_path / "a.jsonl", [row])

    (dialogue,) = read_dialogues(str(tmp_path / "a.jsonl"))

    assert dialogue.turns[0] == ("user", "一\u2028二\x85三\u2029四")


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("broken.jsonl", b'{"dialogue": []}\n{"dialogue": [', "broken.jsonl:"),
        ("broken.json", b'{\n"dialogue": [\n}', "broken.json:3"),
        ("deep.json", b"[" * 100_000, "deep.json:1"),
        ("bytes.json", b'{"dialogue": "\xff\xfe"}', "bytes.json"),
        ("number.json", b"7", "number.json"),
        ("text.jsonl", '\n\n"対話"'.encode(), "text.jsonl:3"),
        ("nothing.json", b"{}", "nothing.json"),
        ("string.json", b'{"dialogue": "hello"}', "string.json"),
        ("turn.json", b'{"dialogue": [{"role": "client"}]}', "turn.json"),
        ("null.json", b'{"dialogue": [{"role": "client", "utterance": null}]}', "null.json"),
        ("plain.json", b'{"dialogue": ["hello"]}', "plain.json"),
        ("half.json", b'{"dialogue": [{"role": "client", "utterance": "\\ud83d"}]}', "half.json"),
        ("empty.jsonl", b"", "empty.jsonl"),
        ("table.parquet", b"PAR1 no", "table.parquet"),
    ],
)
def test_what_is_no_dialogue_stops_with_an_error_that_names_the_place(
    tmp_path: Path, name: str, content: bytes, place: str
) -> None:
    (tmp_path / name).write_bytes(content)

    with pytest.raises(DataError) as caught:
        read_dialogues(str(tmp_path / name))

    assert place in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_broken_line_of_a_jsonl_file_is_named_by_its_number(tmp_path: Path) -> None:
    good = json.dumps(record(1))
    (tmp_path / "a.jsonl").write_text(f"{good}\n\n{{oops\n", "utf-8")

    with pytest.raises(DataError, match=r"a\.jsonl:3:"):
        read_dialogues(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("name", ["nothing.json", "./nothing", "a/b/c", "~/no-such-folder-here"])
def test_a_path_that_is_not_there_is_never_looked_up_on_the_hub(
    clean_environment: Path, name: str
) -> None:
    with pytest.raises(DataError, match="データがありません") as caught:
        read_dialogues(name)

    assert name in str(caught.value)


def many(count: int, *bad: str) -> str:
    good = [json.dumps(record(number), ensure_ascii=False) for number in range(count)]
    return "\n".join([*good[:50], *bad, *good[50:]])


def test_up_to_one_percent_that_cannot_be_read_is_named_counted_and_left_out(
    tmp_path: Path, log: Callable[[], list[str]]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(many(198, "{oops", '{"dialogue": 7}'), "utf-8")
    found = read_dialogues(str(path))
    told = [line for line in log() if "a.jsonl:5" in line]

    assert len(found) == 198
    assert [line.split("a.jsonl:")[1][:2] for line in told] == ["51", "52"]
    assert any("2件を除きました" in line for line in log())


def test_more_than_one_percent_that_cannot_be_read_stops_the_run(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(many(196, "{oops", "7"), "utf-8")
    with pytest.raises(DataError, match=r"198件のうち2件.*a\.jsonl:51"):
        read_dialogues(str(path))


def test_on_demand_everything_that_cannot_be_read_is_named_and_left_out(
    clean_environment: Path, capsys: pytest.CaptureFixture[str], log: Callable[[], list[str]]
) -> None:
    (clean_environment / "a.jsonl").write_text(many(60, *["{oops"] * 25), "utf-8")
    arguments = ["--data-only", "--dataset", "a.jsonl"]

    def named() -> list[str]:
        return [line.split(":")[2] for line in log() if line.startswith("除外: a.jsonl:")]

    refused = openai_sft_example.main(arguments)
    error = capsys.readouterr().err
    before = named()
    code = openai_sft_example.main([*arguments, "--skip-unreadable"])

    assert (refused, code) == (2, 0)
    assert "85件のうち25件" in error
    assert "--skip-unreadable" in error
    assert before == [str(line) for line in range(51, 61)]
    assert named()[len(before) :] == [str(line) for line in range(51, 76)]
    assert any("対話として読めない25件を除きました" in line for line in log())
    assert "学習 48件、テスト 6件、検証 6件" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["config", "revision"])
def test_what_only_the_hub_has_is_refused_for_a_path(dataset: Path, option: str) -> None:
    for place in (dataset, dataset.parent, "./not-here.jsonl"):
        with pytest.raises(ConfigurationError, match=f"^{option} はHugging Face Hubのデータにだけ"):
            read_dialogues(str(place), **{option: "ja"})
    with (
        OpenAISFT(rehearse=True, verbose=False, **{option: "ja"}) as sft,
        pytest.raises(ConfigurationError, match=f"^{option} は.*リハーサル用の対話"),
    ):
        sft.prepare_data()


def test_an_unknown_role_stops_however_many_dialogues_are_good(tmp_path: Path) -> None:
    bad = json.dumps(record(777, ("supervisor", "はい")))
    path = tmp_path / "a.jsonl"
    path.write_text(many(300, bad), "utf-8")
    with pytest.raises(UnknownRole, match=r"a\.jsonl:51.*「d777」.*「supervisor」"):
        read_dialogues(str(path))


def test_files_of_a_folder_that_cannot_be_read_are_named_and_left_out(
    tmp_path: Path, log: Callable[[], list[str]]
) -> None:
    write_jsonl(tmp_path / "good.jsonl", records(300))
    (tmp_path / "broken.json").write_text("{\n\n,", "utf-8")
    (tmp_path / "latin.json").write_bytes(b'{\n"dialogue": "caf\xe9"}')
    (tmp_path / "gone.json").symlink_to(tmp_path / "nowhere")

    assert len(read_dialogues(str(tmp_path))) == 300
    for place in ("broken.json:3", "latin.json:2", "gone.json"):
        assert any(f"{tmp_path / place}" in line for line in log())


@pytest.mark.parametrize(
    ("name", "reviewed"), [("kokorochat_dialogues.jsonl", False), ("a.jsonl", True)]
)
def test_the_licence_of_kokorochat_is_told_once_where_it_is_used(
    clean_environment: Path, log: Callable[[], list[str]], name: str, reviewed: bool
) -> None:
    review = {"review_by_client_en": {"score": 7}} if reviewed else {}
    path = write_jsonl(clean_environment / name, [{**row, **review} for row in records(20)])
    sft = OpenAISFT(offline=True, dataset=str(path), verbose=False)
    sft.load_and_split_dataset()
    sft.prepare_data()
    told = [line for line in log() if "CC BY-NC-ND 4.0" in line]

    assert len(told) == 1
    assert "Qi et al. (ACL 2025)" in told[0]


def test_other_data_have_a_licence_of_their_own(
    dataset: Path, log: Callable[[], list[str]]
) -> None:
    OpenAISFT(offline=True, dataset=str(dataset), verbose=False).prepare_data()

    assert not any("CC BY" in line for line in log())


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1件もありません"):
        read_dialogues(str(tmp_path))


def test_different_dialogues_with_one_id_are_told_apart_by_what_they_hold(tmp_path: Path) -> None:
    rows = [{**record(1), "id": "a"}, {**record(2), "id": "b"}, {**record(3), "id": "a"}]

    def named(*order: int) -> dict[str, str]:
        path = write_jsonl(tmp_path / "a.jsonl", [rows[number] for number in order])
        return {dialogue.digest: dialogue.id for dialogue in read_dialogues(str(path))}

    assert named(0, 1, 2) == named(2, 0, 1)
    assert sorted(named(0, 1, 2).values()) == sorted(
        ["b", *(f"a#{parse(rows[number]).digest[:8]}" for number in (0, 2))]
    )


def test_the_same_dialogue_twice_keeps_its_id(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [record(1), record(2), record(1)])

    assert ids(read_dialogues(str(path))) == ["d1", "d2", "d1"]


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"id": "x", "review_by_client_en": {"evaluation_id": 5}}, "x"),
        ({"id": 0}, "0"),
        ({"review_by_client_en": {"evaluation_id": 5}}, "5"),
        ({"review_by_client_en": None}, "7"),
        ({}, "7"),
    ],
)
def test_a_dialogue_keeps_its_own_id_or_kokorochats_or_gets_the_name_of_its_place(
    facts: dict[str, Any], expected: str
) -> None:
    row = {"dialogue": record(1)["dialogue"], **facts}

    assert parse(row).id == expected


def test_a_dialogue_of_blank_utterances_goes_through_a_dataset_and_is_left_out(
    clean_environment: Path, log: Callable[[], list[str]]
) -> None:
    blank = record(99, ("client", " "), ("counselor", "\u3000"))
    path = write_jsonl(Path("a.jsonl"), [*records(11), blank])
    sft = OpenAISFT(offline=True, dataset=str(path))
    made = [
        example
        for part in sft.load_and_split_dataset()
        for example in sft.prepare_dataset(part, "train")
    ]

    assert len(made) == 11
    assert any("d99" in line for line in log())


def test_a_topic_that_is_plain_text_is_read(clean_environment: Path) -> None:
    path = write_jsonl(Path("a.jsonl"), [{**row, "topic": "仕事"} for row in records(12)])

    parts = OpenAISFT(offline=True, dataset=str(path)).load_and_split_dataset()

    assert sum(map(len, parts)) == 12


@pytest.mark.parametrize("key", ["review_by_client_jp", "review_by_client_en"])
def test_a_review_that_is_plain_text_is_refused_with_its_line(
    clean_environment: Path, key: str
) -> None:
    path = write_jsonl(Path("a.jsonl"), [{**row, key: "仕事"} for row in records(12)])

    with pytest.raises(DataError, match=rf"a\.jsonl:1: {key} はオブジェクト"):
        OpenAISFT(offline=True, dataset=str(path)).load_and_split_dataset()


# ── Data in the service's own form ───────────────────────────────────────────────────────────

CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": null}'}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"default": None, "a": [1]}}}


def chat(number: int, **more: Any) -> dict[str, Any]:
    said = [
        {"role": "user", "content": f" 相談{number}\r\n\u2028"},
        {"role": "user", "content": "続き"},
        {"role": "assistant", "content": "はい。", "weight": 0},
        {"role": "user", "content": "どう\tすれば", "name": "taro"},
        {"role": "assistant", "content": f"それは{number}", "weight": 1},
    ]
    return {"messages": said, **more}


def called(number: int) -> dict[str, Any]:
    asked = {"role": "assistant", "tool_calls": [CALL]}
    found = {"role": "tool", "tool_call_id": "c1", "content": f"{number}件"}
    start, end = {"role": "user", "content": "?"}, {"role": "assistant", "content": "あります"}
    said = [{"role": "system", "content": "傾聴"}, start, asked, found, end]
    return {"messages": said, "tools": [TOOL], "parallel_tool_calls": False}


CHATS = [*(chat(n) for n in range(10)), *(called(n) for n in range(10))]


def test_messages_pass_unchanged_through_the_files(clean_environment: Path) -> None:
    path = write_jsonl(Path("chat.jsonl"), [{"id": f"c{n}", **c} for n, c in enumerate(CHATS)])
    sft = OpenAISFT(offline=True, dataset=str(path), output_dir="out", verbose=False)
    files = sft.prepare_data().files
    written = [
        json.loads(line)
        for name in ("train", "test", "valid")
        for line in Path(files[name]).read_text("utf-8").split("\n")[:-1]
    ]

    assert sorted(written, key=repr) == sorted(CHATS, key=repr)


@pytest.mark.parametrize("order", [1, -1], ids=["plain first", "tools first"])
def test_messages_pass_unchanged_through_a_dataset(clean_environment: Path, order: int) -> None:
    path = write_jsonl(Path("chat.jsonl"), CHATS[::order])
    sft = OpenAISFT(offline=True, dataset=str(path), verbose=False)
    parts = sft.load_and_split_dataset()
    made = [
        {key: value for key, value in example.items() if key != "id"}
        for part in parts
        for example in sft.prepare_dataset(part, "train")
    ]

    assert sorted(made, key=repr) == sorted(CHATS, key=repr)


def test_parts_of_content_and_dialogues_beside_chats_go_through_a_dataset_too(
    clean_environment: Path,
) -> None:
    parted = chat(50)
    parted["messages"][0]["content"] = [{"type": "text", "text": "見て"}]
    path = write_jsonl(Path("chat.jsonl"), [*CHATS, parted, *records(5)])
    sft = OpenAISFT(offline=True, dataset=str(path), verbose=False)
    parts = sft.load_and_split_dataset()
    made = [e["messages"] for part in parts for e in sft.prepare_dataset(part, "train")]
    expected = [c["messages"] for c in [*CHATS, parted]]
    expected += [e["messages"] for e in map(to_example, dialogues(5)) if e]

    assert sorted(made, key=repr) == sorted(expected, key=repr)


def test_a_system_prompt_is_put_before_chats_that_have_none(clean_environment: Path) -> None:
    plain = to_example(parse(chat(1)), system_prompt="傾聴して")
    own = to_example(parse(called(1)), system_prompt="傾聴して")

    assert plain
    assert own
    assert plain["messages"] == [
        {"role": "system", "content": "傾聴して"},
        *chat(1)["messages"],
    ]
    assert own["messages"] == called(1)["messages"]


def test_chats_are_the_same_from_an_array_lines_and_a_table(tmp_path: Path) -> None:
    rows = [{"id": f"c{n}", **chat(n)} for n in range(5)]
    (tmp_path / "a.json").write_text(json.dumps(rows), "utf-8")
    write_jsonl(tmp_path / "a.jsonl", rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")

    def content(name: str) -> list[tuple[str, str, Any]]:
        return [(d.id, d.digest, d.chat) for d in read_dialogues(str(tmp_path / name))]

    assert content("a.json") == content("a.jsonl") == content("a.parquet")


@pytest.mark.parametrize("role", ["supervisor", "", None, 3, [], {}])
def test_an_unknown_role_of_a_message_always_stops(role: Any) -> None:
    with pytest.raises(UnknownRole, match="「d1」の2番目") as caught:
        parse({"id": "d1", "messages": [*chat(1)["messages"][:1], {"role": role, "content": "a"}]})

    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "more",
    [
        {"messages": "text"},
        {"messages": {"role": "user"}},
        {"tools": ["no JSON"]},
        {"tools": 3},
        {"tools": {"a": 1}},
    ],
    ids=str,
)
def test_a_chat_that_is_none_is_named_and_left_out(
    tmp_path: Path, more: dict[str, Any], log: Callable[[], list[str]]
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*map(chat, range(100)), {**chat(101), **more}])

    assert len(read_dialogues(str(path))) == 100
    assert any("a.jsonl:101" in line for line in log())


# ── Roles and rows ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("counselor", "assistant"),
        ("counsellor", "assistant"),
        ("カウンセラー", "assistant"),
        ("therapist", "assistant"),
        ("assistant", "assistant"),
        ("client", "user"),
        ("クライアント", "user"),
        ("user", "user"),
        (" Counselor ", "assistant"),
        ("ＣＬＩＥＮＴ", "user"),
        ("ｶｳﾝｾﾗｰ", "assistant"),
    ],
)
def test_the_roles_people_write_are_known(name: str, role: str) -> None:
    assert spoken((name, "はい")).turns == ((role, "はい"),)


@pytest.mark.parametrize("name", ["supervisor", "", "coun selor", "カウンセラ", "tool", "0"])
def test_an_unknown_role_stops_with_an_error_that_names_the_dialogue_and_the_turn(
    name: str,
) -> None:
    with pytest.raises(DataError) as caught:
        spoken(("client", "はい"), (name, "はい"))

    assert "d1" in str(caught.value)
    assert "2番目" in str(caught.value)
    assert f"「{name}」" in str(caught.value)


@given(turns, st.dictionaries(awkward_text, awkward_text, max_size=3), awkward_text)
def test_a_row_read_back_is_the_dialogue_it_was_made_of(
    said: list[tuple[str, str]], topic: dict[str, str], name: str
) -> None:
    row = {**record(1, *said), "id": name, "topic": topic, "review_by_client_en": {"score": 3}}
    dialogue = parse(row)

    assert parse(dialogue_row(dialogue)) == dialogue


@given(turns)
def test_every_utterance_is_kept_in_order_as_it_is_written_and_none_is_blank(
    said: list[tuple[str, str]],
) -> None:
    expected = [(ROLES[role], text) for role, text in said if text.strip()]

    assert list(spoken(*said).turns) == expected


def test_a_nul_in_what_is_said_makes_no_turn_two() -> None:
    said = spoken(("client", "a\0assistant\0b"), ("counselor", "\0c"))

    assert said.turns == (("user", "a\0assistant\0b"), ("assistant", "\0c"))


# ── Splitting ────────────────────────────────────────────────────────────────────────────────


@given(st.integers(0, 60), st.integers())
def test_a_split_is_disjoint_and_complete_in_the_ratio_8_1_1(count: int, seed: int) -> None:
    pool = POOL[:count]
    train, test, valid = split_dialogues(pool, seed=seed)

    assert len(test) == sum(place % 10 == 4 for place in range(count))
    assert len(valid) == sum(place % 10 == 8 for place in range(count))
    assert sorted(ids(train) + ids(test) + ids(valid)) == sorted(ids(pool))


def test_the_6589_dialogues_of_kokorochat_become_5271_659_and_659() -> None:
    pool = [replace(POOL[0], id=str(number)) for number in range(6589)]

    assert [len(part) for part in split_dialogues(pool)] == [5271, 659, 659]


@given(st.permutations(POOL[:25]), st.integers(0, 3), st.none() | st.integers(1, 30))
def test_the_same_seed_gives_the_same_split_in_whatever_order_the_files_come(
    shuffled: list[Dialogue], seed: int, max_samples: int | None
) -> None:
    expected = split_dialogues(POOL[:25], seed=seed, max_samples=max_samples)

    assert split_dialogues(shuffled, seed=seed, max_samples=max_samples) == expected


def test_the_names_of_the_files_have_no_say_in_the_split() -> None:
    rows = [{"dialogue": row["dialogue"]} for row in records(30)]
    named = [parse_dialogue(r, fallback_id=f"{n:03}", source="a") for n, r in enumerate(rows)]
    renamed = [parse_dialogue(r, fallback_id=f"{99 - n}", source="b") for n, r in enumerate(rows)]

    assert [[d.turns for d in part] for part in split_dialogues(named)] == [
        [d.turns for d in part] for part in split_dialogues(renamed)
    ]


def test_the_split_of_seed_42_is_the_same_on_every_machine() -> None:
    train, test, valid = split_dialogues(dialogues(20), seed=42)

    assert (ids(test), ids(valid), ids(train)) == (
        ["d10", "d11"],
        ["d19", "d17"],
        [
            *("d13", "d15", "d20", "d16", "d1", "d2", "d14", "d7"),
            *("d8", "d12", "d6", "d5", "d4", "d18", "d3", "d9"),
        ],
    )


@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 99))
def test_a_smaller_sample_is_part_of_a_larger_one(one: int, other: int, seed: int) -> None:
    small, large = sorted((one, other))

    def sample(size: int) -> set[str]:
        return {i for part in split_dialogues(POOL, seed=seed, max_samples=size) for i in ids(part)}

    assert len(sample(small)) == min(small, len(POOL))
    assert sample(small) <= sample(large)


@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 99), st.permutations(POOL[:30]))
def test_each_part_of_a_smaller_sample_lies_inside_the_same_part_of_a_larger_one(
    one: int, other: int, seed: int, shuffled: list[Dialogue]
) -> None:
    pool = [*shuffled, *POOL[30:]]
    small, large = (
        split_dialogues(pool, seed=seed, max_samples=size) for size in sorted((one, other))
    )

    for part, more in zip(small, large, strict=True):
        assert set(ids(part)) <= set(ids(more))
    assert sum(map(len, small)) == min(one, other, len(POOL))


def test_from_nine_dialogues_on_there_is_one_to_test_and_one_to_validate() -> None:
    sizes = [[len(part) for part in split_dialogues(POOL[:count])] for count in (4, 9, 12)]

    assert sizes == [[4, 0, 0], [7, 1, 1], [10, 1, 1]]


def test_another_seed_draws_another_split_and_another_sample() -> None:
    assert set(ids(split_dialogues(POOL, seed=1).test)) != set(ids(split_dialogues(POOL).test))
    assert {i for part in split_dialogues(POOL, seed=1, max_samples=9) for i in ids(part)} != {
        i for part in split_dialogues(POOL, seed=2, max_samples=9) for i in ids(part)
    }


@pytest.mark.parametrize("count", [0, -1])
def test_a_sample_of_nothing_is_refused(count: int) -> None:
    with pytest.raises(ConfigurationError, match="max_samples"):
        split_dialogues(POOL, max_samples=count)


def test_asking_for_more_than_there_is_takes_all_and_says_so(
    dataset: Path, log: Callable[[], list[str]]
) -> None:
    parts = OpenAISFT(offline=True, dataset=str(dataset)).load_and_split_dataset(1_000)

    assert [len(part) for part in parts] == [16, 2, 2]
    assert any("max_samples=1,000" in line and "20件" in line for line in log())


# ── Converting ───────────────────────────────────────────────────────────────────────────────


@given(turns)
def test_merged_messages_alternate_and_end_with_the_assistant(
    said: list[tuple[str, str]],
) -> None:
    example = to_example(spoken(*said))
    roles = [message["role"] for message in example["messages"]] if example else ["assistant"]

    assert roles[-1] == "assistant"
    assert all(one != following for one, following in pairwise(roles))


@given(turns)
def test_an_example_holds_all_that_is_said_up_to_the_counsellors_last_word(
    said: list[tuple[str, str]],
) -> None:
    dialogue = spoken(*said)
    example = to_example(dialogue)
    kept = list(dialogue.turns)
    while kept and kept[-1][0] == "user":
        kept.pop()

    assert (example is None) == (not kept)
    if example:
        assert example["id"] == "d1"
        assert "\n".join(m["content"] for m in example["messages"]) == "\n".join(
            text for _, text in kept
        )
        assert sum(m["role"] == "assistant" for m in example["messages"]) == sum(
            role == "assistant" and (not n or kept[n - 1][0] == "user")
            for n, (role, _) in enumerate(kept)
        )


def test_consecutive_turns_are_one_message_and_the_clients_last_turns_are_cut() -> None:
    dialogue = spoken(
        ("client", " あの "), ("client", "相談です"), ("counselor", "はい"), ("client", "では")
    )
    example = to_example(dialogue)

    assert example == {
        "id": "d1",
        "messages": [
            {"role": "user", "content": " あの \n相談です"},
            {"role": "assistant", "content": "はい"},
        ],
    }


def test_a_system_prompt_comes_first_and_there_is_none_by_default() -> None:
    dialogue = spoken(("client", "やあ"), ("counselor", "はい"))
    prompted = to_example(dialogue, system_prompt="傾聴してください。")
    plain = to_example(dialogue)

    assert prompted
    assert plain
    assert prompted["messages"][0] == {"role": "system", "content": "傾聴してください。"}
    assert prompted["messages"][1:] == plain["messages"]


def test_a_dialogue_with_nothing_to_learn_from_is_left_out_counted_and_named(
    clean_environment: Path, log: Callable[[], list[str]]
) -> None:
    silent = record(99, ("client", "もしもし"), ("counselor", " \u3000\n"))
    sft = OpenAISFT(offline=True)
    made = sft.prepare_dataset([parse(record(1)), silent, record(2)], "test")

    assert [example["id"] for example in made] == ["d1", "d2"]
    assert [line for line in log() if "test" in line and "1件" in line and "d99" in line]


# ── Files ────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(turns, min_size=1, max_size=4), st.sampled_from(["", "相談員\u2028です\r\n"]))
def test_convert_write_and_read_back_loses_nothing(
    talks: list[list[tuple[str, str]]], prompt: str
) -> None:
    made = [to_example(spoken(*said), system_prompt=prompt or None) for said in talks]
    kept = [example for example in made if example]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train.jsonl")
        write_new_file(path, "".join(example_line(example) + "\n" for example in kept))
        read = read_examples(path)
        content = path.read_bytes()

    assert [example["messages"] for example in read] == [example["messages"] for example in kept]
    assert all(set(json.loads(line)) == {"messages"} for line in content.split(b"\n")[:-1])


@given(st.lists(turns, min_size=1, max_size=4))
def test_a_written_file_is_one_the_service_takes_and_any_reader_sees_the_same_lines(
    talks: list[list[tuple[str, str]]],
) -> None:
    made = [to_example(spoken(*said)) for said in talks]
    text = "".join(example_line(example) + "\n" for example in made if example)

    assert len(text.splitlines()) == text.count("\n") == sum(map(bool, made))
    if text:
        assert judge_training_file(text.encode(), purpose="validation") is None


def test_japanese_is_written_as_it_is_and_not_as_escapes() -> None:
    example = to_example(spoken(("counselor", "こんにちは😀")))

    assert example
    assert "こんにちは😀" in example_line(example)


def test_lines_that_are_no_examples_are_refused_with_their_place(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": []}\n{"prompt": "x"}\n', "utf-8")

    with pytest.raises(DataError, match=r"a\.jsonl:2"):
        read_examples(path)


def test_an_existing_file_is_never_overwritten_and_no_temporary_file_stays(
    tmp_path: Path,
) -> None:
    write_new_file(tmp_path / "a", "一")

    with pytest.raises(FileExistsError):
        write_new_file(tmp_path / "a", "二")
    with pytest.raises(UnicodeEncodeError):
        write_new_file(tmp_path / "b", "\ud800")

    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text("utf-8") == "一"


# ── Through the class ────────────────────────────────────────────────────────────────────────


def test_the_datasets_of_the_steps_give_the_files_that_the_data_stage_writes(
    dataset: Path,
) -> None:
    sft = OpenAISFT(offline=True, dataset=str(dataset), output_dir="steps")
    parts = zip(("train", "test", "valid"), sft.load_and_split_dataset(15, seed=7), strict=True)
    paths = sft.save_all_datasets(*(sft.prepare_dataset(part, name) for name, part in parts))
    whole = OpenAISFT(offline=True, dataset=str(dataset), output_dir="whole")
    summary = whole.prepare_data(max_samples=15, seed=7)

    assert set(paths) == {"train", "test", "valid"}
    for name, path in paths.items():
        assert type(path) is str
        assert Path(path).read_bytes() == Path(summary.files[name]).read_bytes()
    assert summary.examples == {"train": 12, "test": 2, "valid": 1}


def test_more_dialogues_than_are_counted_at_once_are_all_written_in_their_order(
    clean_environment: Path,
) -> None:
    path = write_jsonl(clean_environment / "many.jsonl", records(1500))
    summary = OpenAISFT(offline=True, dataset=str(path), verbose=False).prepare_data()
    splits = split_dialogues(read_dialogues(str(path)))

    for name, part in zip(("train", "test", "valid"), splits, strict=True):
        lines = Path(summary.files[name]).read_text("utf-8").splitlines()
        assert lines == [example_line(one) for one in map(to_example, part) if one]


def test_a_dialogue_is_let_go_once_it_is_converted(clean_environment: Path) -> None:
    silent = [record(number, ("client", str(number))) for number in range(50)]
    path = write_jsonl(clean_environment / "some.jsonl", [*silent, *records(50)])
    held: dict[str, int] = {}

    def look(line: logging.LogRecord) -> bool:
        known = [one for one in gc.get_objects() if isinstance(one, Dialogue)]
        name = line.getMessage().partition(":")[0]  # of the split whose conversion has ended
        held[name] = sum(one.source.startswith(str(path)) for one in known)
        return True

    logger = logging.getLogger("openai_sft")
    logger.addFilter(look)
    try:
        OpenAISFT(offline=True, dataset=str(path), verbose=False).prepare_data()
    finally:
        logger.removeFilter(look)

    assert [held[name] for name in ("train", "test", "valid")] == [21, 11, 1]  # and the last one


def test_training_examples_are_kept_as_their_lines_alone(dataset: Path) -> None:
    sft = OpenAISFT(offline=True, dataset=str(dataset), verbose=False)
    prepared = Preparation(sft.settings).prepare(Selection())

    assert [len(lines.encoded) for lines in prepared.lines.values()] == [16, 2, 2]
    assert [len(part) for part in prepared.splits] == [0, 2, 2]


def test_the_three_datasets_are_datasets_with_ids_and_turns(dataset: Path) -> None:
    from datasets import Dataset

    train, test, valid = OpenAISFT(offline=True, dataset=str(dataset)).load_and_split_dataset()

    assert all(isinstance(part, Dataset) for part in (train, test, valid))
    assert [len(part) for part in (train, test, valid)] == [16, 2, 2]
    assert {row["id"] for part in (train, test, valid) for row in part} == {
        f"d{n}" for n in range(1, 21)
    }
    assert train[0]["dialogue"][0]["role"] == "user"


def test_awkward_text_goes_through_a_dataset_unchanged(clean_environment: Path) -> None:
    said = (("client", "a\r\nb\tc\u2028d\x85e\0f１２😀"), ("counselor", "は\0い\u2029ね"))
    rows = [
        {**record(n, *said, ("client", str(n)), ("counselor", "はい")), "topic": {"main_jp": None}}
        for n in range(12)
    ]
    path = write_jsonl(Path("a.jsonl"), rows)
    sft = OpenAISFT(offline=True, dataset=str(path))
    train, _, _ = sft.load_and_split_dataset()
    made = sft.prepare_dataset(train, "train")

    assert [[m["content"] for m in one["messages"][:2]] for one in made] == [
        [text for _, text in said]
    ] * 10


@pytest.mark.parametrize("count", [1, 4])
def test_a_handful_of_dialogues_is_all_for_training(dataset: Path, count: int) -> None:
    sft = OpenAISFT(offline=True, dataset=str(dataset), verbose=False)

    assert [len(part) for part in sft.load_and_split_dataset(max_samples=count)] == [count, 0, 0]


UNGUARDED = """
import sys
print("executed", __name__)
from openai_sft import OpenAISFT

sft = OpenAISFT(offline=True, dataset=sys.argv[1], output_dir="out", verbose=False)
print(sft.prepare_data().tokens["train"].total)
"""


def test_a_script_without_a_guard_is_executed_once(clean_environment: Path) -> None:
    """Workers that import the user's script again would run all of it again."""
    path = write_jsonl(clean_environment / "a.jsonl", records(400))
    script = clean_environment / "script.py"
    script.write_text(UNGUARDED, "utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), str(path)],
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    lines = done.stdout.splitlines()

    assert (done.returncode, done.stderr) == (0, "")
    assert lines[:1] == ["executed __main__"]
    assert len(lines) == 2
    assert int(lines[1]) > 0


# ── Other trainers ───────────────────────────────────────────────────────────────────────────


@given(
    st.lists(st.builds(dict, role=st.just("system"), content=awkward_text), max_size=2),
    st.lists(
        st.builds(dict, role=st.sampled_from(["user", "assistant"]), content=awkward_text),
        min_size=1,
    ),
)
def test_with_the_user_first_speakers_take_turns_and_no_word_is_lost(
    head: list[Any], talk: list[Any]
) -> None:
    turned: Any = with_user_first([*head, *talk])
    spoken = turned[len(head) :]

    assert turned[: len(head)] == head
    assert [turn["role"] for turn in spoken[:2]] == ["user", "assistant"][: len(spoken)]
    assert all(one["role"] != next_one["role"] for one, next_one in itertools.pairwise(spoken))
    if talk[0]["role"] == "assistant":
        assert spoken.pop(0)["content"] == "（相談開始）"
    for role in ("user", "assistant"):
        texts = ([m["content"] for m in said if m["role"] == role] for said in (spoken, talk))
        assert "\n".join(next(texts)) == "\n".join(next(texts))


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": "a", "weight": 0},
        {"role": "assistant", "content": None},
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "tool", "content": "a"},
    ],
)
def test_what_turns_cannot_say_is_not_put_into_turns(message: Any) -> None:
    assert with_user_first([{"role": "user", "content": "u"}, message]) is None


def test_the_data_are_also_written_with_the_user_first(
    tmp_path: Path, clean_environment: Path, log: Callable[[], list[str]]
) -> None:
    said = [{"role": "assistant", "content": "こんにちは"}, {"role": "user", "content": "どうも"}]
    chats = [{"messages": [*said, {"role": "assistant", "content": f"{n}"}]} for n in range(29)]
    weighed = {"role": "assistant", "content": "x", "weight": 1}
    source = write_jsonl(tmp_path / "a.jsonl", [*chats, {"messages": [*said, weighed]}])
    options: Any = {"offline": True, "dataset": str(source), "verbose": False}
    files = OpenAISFT(**options, export_for="user-first").prepare_data().files
    again = {
        name: read_examples(files[f"{name}_user_first"]) for name in ("train", "test", "valid")
    }
    plain = {name: read_examples(files[name]) for name in again}

    assert sum(map(len, again.values())) == 29
    assert any("1件を除きました（weight" in line for line in log())
    for name, examples in again.items():
        kept = [one for one in plain[name] if not any("weight" in m for m in one["messages"])]
        turned = [with_user_first(one["messages"]) for one in kept]
        assert [one["messages"] for one in examples] == turned
    assert not any("user_first" in n for n in OpenAISFT(**options).prepare_data().files)


# ── KokoroChat itself ────────────────────────────────────────────────────────────────────────


def test_the_released_kokorochat_is_read_whole_split_and_converted(
    kokorochat: list[Dialogue],
) -> None:
    files = sorted(KOKOROCHAT.glob("*.json"))
    raw = {str(path): json.loads(path.read_bytes()) for path in files[::20]}
    some = [dialogue for dialogue in kokorochat if dialogue.source in raw]
    splits = split_dialogues(kokorochat, seed=42)
    made = [to_example(dialogue) for dialogue in some]
    merged = sum(
        len(list(groupby(turn["role"] for turn in row["dialogue"]))) for row in raw.values()
    )
    clients_last_word = sum(row["dialogue"][-1]["role"] == "client" for row in raw.values())

    assert len(kokorochat) == len(files)
    assert len(splits.test) == len(splits.valid) == round(len(files) / 10)
    assert sum(map(len, splits)) == len(files)
    assert [len(d.turns) for d in some] == [len(raw[d.source]["dialogue"]) for d in some]
    assert None not in made
    assert sum(len(one["messages"]) for one in made if one) == merged - clients_last_word


def test_a_folder_of_kokorochats_own_files_becomes_three_datasets(
    clean_environment: Path, kokorochat: list[Dialogue]
) -> None:
    """Review fields are null in most of the files and text in a few, as in the released folder."""
    left = [d for d in kokorochat if d.review_en.get("unwilling_to_continue") is not None]
    folder = clean_environment / "some"
    folder.mkdir()
    for dialogue in [*left[:5], *kokorochat[:100]][:100]:
        path = Path(dialogue.source)
        (folder / path.name).symlink_to(path)
    count = len(list(folder.iterdir()))
    sft = OpenAISFT(offline=True, dataset=str(folder), output_dir="out", verbose=False)
    train, test, valid = sft.load_and_split_dataset()
    made = sft.prepare_dataset(train, "train")

    assert sum(map(len, (train, test, valid))) == count
    assert len(test) == len(valid) == round(count / 10)
    assert {example["id"] for example in made} == {str(row["id"]) for row in train}
