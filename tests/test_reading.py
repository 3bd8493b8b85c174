"""Any chat data, read as its owner means it: forms, containers, encodings, speakers."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from helpers import awkward_text, record, records, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

import openai_sft_example
from openai_sft import (
    ConfigurationError,
    DataError,
    Dialogue,
    OpenAISFT,
    OtherPurpose,
    Reading,
    Speakers,
    UnknownRole,
    dialogue_row,
    parse_dialogue,
    read_dialogues,
    to_example,
)

Said = Sequence[tuple[str, str]]  # role and text, the system's first
TALK: Said = (
    ("system", "傾聴してください。"),
    ("user", "最近よく眠れません。"),
    ("assistant", "それはつらいですね。"),
    ("user", "はい、もう三週間です。"),
    ("assistant", "何かきっかけはありましたか？"),
)
PAIR: Said = (TALK[0], TALK[1], TALK[2])


def renamed(said: Said, role: str, text: str, **names: str) -> list[dict[str, str]]:
    return [{role: names.get(who, who), text: what} for who, what in said]


def columns(rows: list[dict[str, str]]) -> dict[str, list[str]]:
    return {key: [row[key] for row in rows] for key in rows[0]}


def without_system(said: Said) -> Said:
    return [turn for turn in said if turn[0] != "system"]


def beside(said: Said, key: str = "system") -> dict[str, str]:
    texts = [text for role, text in said if role == "system"]
    return {key: texts[0]} if texts else {}


# Each way in which people write a conversation, as a record.
WRITTEN: dict[str, Callable[[Said], dict[str, Any]]] = {
    "kokorochat": lambda said: {
        "dialogue": renamed(said, "role", "utterance", user="client", assistant="counselor")
    },
    "utterances": lambda said: {
        "dialogue_id": 7,
        "utterances": renamed(said, "interlocutor_id", "text", user="user", assistant="bot"),
    },
    "turns": lambda said: {
        "turns": renamed(said, "speaker", "text", user="seeker", assistant="supporter")
    },
    "sharegpt": lambda said: {
        "conversations": renamed(said, "from", "value", user="human", assistant="gpt")
    },
    "conversation": lambda said: {"conversation": renamed(said, "role", "content")},
    "dialog in capitals": lambda said: {
        "dialog": renamed(without_system(said), "speaker", "text", user="USER", assistant="SYSTEM"),
        **beside(said),
    },
    "messages": lambda said: {"messages": renamed(said, "role", "content")},
    "messages in other spellings": lambda said: {
        "messages": renamed(
            said, "role", "content", system="developer", user=" User", assistant="ASSISTANT"
        )
    },
    "messages as text": lambda said: {
        "messages": json.dumps(renamed(said, "role", "content"), ensure_ascii=False)
    },
    "messages in columns": lambda said: {"messages": columns(renamed(said, "role", "content"))},
    "an instruction beside": lambda said: {
        "messages": renamed(without_system(said), "role", "content"),
        **beside(said, "instructions"),
    },
}
PAIRED: dict[str, Callable[[Said], dict[str, Any]]] = {
    "prompt": lambda said: {"prompt": said[-2][1], "completion": said[-1][1], **beside(said)},
    "alpaca": lambda said: {
        "instruction": said[-2][1],
        "input": "",
        "output": said[-1][1],
        **beside(said),
    },
    "question": lambda said: {"question": said[-2][1], "answer": said[-1][1], **beside(said)},
    "prompts of messages": lambda said: {
        "prompt": renamed(said[:-1], "role", "content"),
        "completion": renamed(said[-1:], "role", "content"),
    },
}


def cells(row: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in row.items()
    }


def to_csv(rows: list[dict[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(map(cells, rows))
    return file.getvalue()


def lines(rows: list[dict[str, Any]], **options: Any) -> str:
    return "".join(json.dumps(row, ensure_ascii=False, **options) + "\n" for row in rows)


CONTAINERS: dict[str, Callable[[list[dict[str, Any]]], str]] = {
    "a.jsonl": lines,
    "a.ndjson": lines,
    "lines.json": lines,
    "A.JSONL": lambda rows: lines(rows).replace("\n", "\r\n"),
    "a.json": lambda rows: json.dumps(rows, ensure_ascii=False),
    "pretty.json": lambda rows: json.dumps(rows, ensure_ascii=False, indent=2),
    "array.jsonl": lambda rows: json.dumps(rows, ensure_ascii=False, indent=1),
    "data.json": lambda rows: json.dumps({"version": 1, "data": rows}, ensure_ascii=False),
    "named.json": lambda rows: json.dumps(
        {f"n{number}": row for number, row in enumerate(rows)}, ensure_ascii=False
    ),
    "concatenated.jsonl": lambda rows: lines(rows, indent=2),
    "a.csv": to_csv,
}
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp932", "euc_jp")


def said_in(dialogue: Dialogue) -> list[tuple[str, str]]:
    example = to_example(dialogue)
    assert example is not None
    return [(message["role"], message["content"]) for message in example["messages"]]


def talks(count: int = 4, said: Said = TALK) -> list[list[tuple[str, str]]]:
    return [[(role, f"{text}{number}") for role, text in said] for number in range(count)]


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("form", [*WRITTEN, *PAIRED])
def test_every_form_is_read_from_every_container_in_every_encoding(
    tmp_path: Path, form: str, container: str
) -> None:
    expected = talks(said=PAIR if form in PAIRED else TALK)
    rows = [{**WRITTEN, **PAIRED}[form](said) for said in expected]
    for encoding, packed in itertools.product(ENCODINGS, (False, True)):
        content = CONTAINERS[container](rows).encode(encoding)
        path = tmp_path / (container + ".gz" * packed)
        path.write_bytes(gzip.compress(content) if packed else content)

        assert [said_in(dialogue) for dialogue in read_dialogues(str(path))] == expected, encoding


@pytest.mark.parametrize("form", [*WRITTEN, *PAIRED])
def test_every_form_is_read_from_a_table(tmp_path: Path, form: str) -> None:
    expected = talks(said=PAIR if form in PAIRED else TALK)
    rows = [{**WRITTEN, **PAIRED}[form](said) for said in expected]
    path = tmp_path / "a.Parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)

    assert [said_in(dialogue) for dialogue in read_dialogues(str(path))] == expected


def test_tools_of_a_table_have_no_parameters_of_other_rows_tools(tmp_path: Path) -> None:
    def calling(name: str) -> dict[str, Any]:
        properties = {name: {"type": "string"}}
        function = {"name": "f", "parameters": {"type": "object", "properties": properties}}
        tool = {"type": "function", "function": function}
        return {"messages": renamed(TALK, "role", "content"), "tools": [tool]}

    rows = [calling("a"), calling("b")]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    read = read_dialogues(str(path))

    assert [dialogue.chat and dialogue.chat["tools"] for dialogue in read] == [
        row["tools"] for row in rows
    ]


written_talk = st.lists(
    st.tuples(awkward_text.filter(str.strip), awkward_text.filter(str.strip)),
    min_size=1,
    max_size=4,
)


@given(written_talk, st.sampled_from(list(WRITTEN)))
def test_what_was_written_is_what_is_read(pairs: list[tuple[str, str]], form: str) -> None:
    said = [turn for ask, say in pairs for turn in (("user", ask), ("assistant", say))]
    read = parse_dialogue(WRITTEN[form](said), fallback_id="1", source="here")

    assert said_in(read) == said
    assert said_in(parse_dialogue(dialogue_row(read), fallback_id="1", source="")) == said


@given(written_talk, st.sampled_from(list(PAIRED)))
def test_a_question_and_its_answer_are_read_as_they_were_written(
    pairs: list[tuple[str, str]], form: str
) -> None:
    said = [("user", pairs[0][0]), ("assistant", pairs[0][1])]
    read = parse_dialogue(PAIRED[form](said), fallback_id="1", source="here")

    assert said_in(read) == said


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_byte_order_mark_is_named_in_every_container(
    tmp_path: Path, log: Callable[[], list[str]], name: str
) -> None:
    rows = [WRITTEN["messages"](said) for said in talks()]
    (tmp_path / name).write_bytes(CONTAINERS[name](rows).encode("utf-8-sig"))
    read_dialogues(str(tmp_path / name))

    assert any("BOM" in line for line in log())


def test_rows_that_share_an_id_are_one_dialogue_however_they_are_mixed(tmp_path: Path) -> None:
    rows = [
        {"dialogue_id": name, "speaker": who, "text": f"{name}{turn}"}
        for turn, who in enumerate(("client", "counselor") * 2)
        for name in "ab"
    ]
    (tmp_path / "a.csv").write_text(to_csv(rows), "utf-8")
    write_jsonl(tmp_path / "a.jsonl", rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.csv", "a.jsonl", "a.parquet"):
        read = read_dialogues(str(tmp_path / name))

        assert [dialogue.id for dialogue in read] == ["a", "b"]
        assert [text for _, text in read[1].turns] == ["b0", "b1", "b2", "b3"]


def test_a_file_of_turns_without_ids_is_one_dialogue(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("role,content\nuser,眠れません\nassistant,はい\n", "utf-8")
    (dialogue,) = read_dialogues(str(tmp_path / "a.csv"))

    assert said_in(dialogue) == [("user", "眠れません"), ("assistant", "はい")]


# ── Speakers ─────────────────────────────────────────────────────────────────────────────────


def spoken(*names: str) -> dict[str, Any]:
    return {"dialogue": [{"role": n, "utterance": f"{k}"} for k, n in enumerate(names)]}


def roles(speakers: Speakers, *names: str) -> list[str]:
    read = parse_dialogue(spoken(*names), fallback_id="", source="", reading=Reading(speakers))
    return [role for role, _ in read.turns]


@pytest.mark.parametrize(
    ("speakers", "names", "expected"),
    [
        (Speakers(assistant=("B",)), "ABAB", "user assistant user assistant"),
        (Speakers(user=("B",)), "ABAB", "assistant user assistant user"),
        (Speakers(assistant=("B", "D")), "ABCD", "user assistant user assistant"),
        (Speakers(assistant=("A",), user=("B",)), "AB", "assistant user"),
        (Speakers(assistant=("first",)), "ABA", "assistant user assistant"),
        (Speakers(assistant=("second",)), "BAB", "user assistant user"),
        (Speakers(user=("second",)), "BAB", "assistant user assistant"),
    ],
)
def test_the_user_says_who_is_the_assistant(speakers: Speakers, names: str, expected: str) -> None:
    assert roles(speakers, *names) == expected.split()


def test_names_that_are_known_are_turned_round_where_the_user_says_so() -> None:
    assert roles(Speakers(assistant=("client",)), "client", "counselor") == ["assistant", "user"]


def test_where_both_sides_are_named_a_third_speaker_stops() -> None:
    with pytest.raises(UnknownRole, match="「C」"):
        roles(Speakers(assistant=("A",), user=("B",)), "A", "B", "C")


def test_a_name_on_both_sides_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="両方"):
        Speakers(assistant=("A",), user=("A",))


def test_unknown_speakers_stop_with_all_of_them_their_keys_and_the_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": n, "situation": "試験", **spoken("A", "B")} for n in range(14)]
    path = write_jsonl(tmp_path / "a.jsonl", [*rows, {"id": 14, **spoken("A", "ナレーター")}])
    code = openai_sft_example.main(["--data-only", "--dataset", str(path)])
    told = capsys.readouterr().err

    assert code == 2
    for part in (
        "a.jsonl:1",
        "A（15件）",
        "B（14件）",
        "ナレーター（1件）",
        "situation",
        "--assistant",
    ):
        assert part in told
    assert told.count("エラー") == 1


@pytest.mark.parametrize(
    "flags", [["--assistant", "B"], ["--user", "A"], ["--assistant", "second"]], ids=" ".join
)
def test_a_flag_settles_who_is_who(clean_environment: Path, flags: list[str]) -> None:
    rows = [
        {"dialogue": renamed(said, "role", "utterance", user="A", assistant="B")}
        for said in talks(20, TALK[1:])
    ]
    path = write_jsonl(clean_environment / "a.jsonl", rows)

    assert openai_sft_example.main(["--data-only", "--dataset", str(path), *flags]) == 0
    written = "".join(p.read_text("utf-8") for p in Path("openai_sft_outputs").glob("*.jsonl"))
    assert written.count('{"role": "assistant", "content": "それはつらいですね。') == 20


def test_a_speaker_who_is_not_there_is_named_beside_those_who_are(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [spoken("A", "B")])
    with pytest.raises(UnknownRole, match=r"「Z」.*A（1件）、B（1件）"):
        read_dialogues(str(path), speakers=Speakers(assistant=("Z",)))


# ── What is no training data, and what is passed over ────────────────────────────────────────


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"custom_id": "1", "method": "POST", "url": "/v1/x", "body": {"messages": []}}, "Batch"),
        ({"input": {"messages": []}, "preferred_output": [], "non_preferred_output": []}, "DPO"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "DPO"),
        ({"messages": [{"role": "user", "content": "a"}], "reference_answer": "b"}, "RFT"),
    ],
)
def test_a_file_for_another_purpose_is_refused_by_its_name(
    tmp_path: Path, row: dict[str, Any], name: str
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*records(200), row])
    with pytest.raises(OtherPurpose, match=rf"a\.jsonl:201: .*{name}"):
        read_dialogues(str(path))


def test_texts_that_are_left_out_are_named_once_with_their_count(
    tmp_path: Path, log: Callable[[], list[str]]
) -> None:
    rows = [{**record(n), "emotion": "不安", "note": "" if n else "メモ"} for n in range(5)]
    read_dialogues(str(write_jsonl(tmp_path / "a.jsonl", rows)))
    told = [line for line in log() if "使わない" in line]

    assert len(told) == 2
    assert any("emotion（5件）" in line for line in told)


def test_a_folder_is_read_with_its_subfolders_and_what_is_passed_over_is_named(
    tmp_path: Path, log: Callable[[], list[str]]
) -> None:
    for name in ("data/sub/A.JSON", "b.json.gz", ".git/config.json", "LICENSE", "data/readme.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps([record(len(name))]).encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)

    assert len(read_dialogues(str(tmp_path))) == 2
    (told,) = [line for line in log() if "読みません" in line]
    assert "2件" in told
    assert "LICENSE" in told
    assert "data/readme.md" in told


def test_the_encoding_of_a_file_is_said_where_it_is_not_utf_8(
    tmp_path: Path, log: Callable[[], list[str]]
) -> None:
    row = {"messages": renamed(TALK, "role", "content")}
    (tmp_path / "a.jsonl").write_bytes(lines([row] * 3).encode("cp932"))
    read_dialogues(str(tmp_path / "a.jsonl"))

    assert [line for line in log() if "cp932" in line and "3件" in line]


def test_a_line_that_is_not_utf_8_among_many_that_are_is_named(tmp_path: Path) -> None:
    good = [json.dumps({"messages": renamed(TALK, "role", "content")}, ensure_ascii=False)] * 3
    content = "\n".join(good).encode() + b"\n" + good[0].encode("cp932")
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.jsonl:4: UTF-8"):
        read_dialogues(str(tmp_path / "a.jsonl"))


def test_a_damaged_archive_or_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}' * 99)[:-9])
    (tmp_path / "b.csv").write_bytes(b"a,b\n" + b"\xff\xff,1\n")
    for name in ("a.jsonl.gz", "b.csv"):
        with pytest.raises(DataError, match=name):
            read_dialogues(str(tmp_path / name))


@pytest.mark.parametrize(
    ("model", "fits"), [("gpt-4o-mini", False), ("gpt-4o", True), ("somebodys-own", True)]
)
def test_images_are_refused_for_a_model_that_learns_from_text_alone(
    clean_environment: Path, model: str, fits: bool
) -> None:
    image = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    rows = [
        {
            "messages": [
                {"role": "user", "content": [image, {"type": "text", "text": f"{n}"}]},
                {"role": "assistant", "content": "猫です"},
            ]
        }
        for n in range(12)
    ]
    path = write_jsonl(clean_environment / "a.jsonl", rows)
    sft = OpenAISFT(offline=True, verbose=False, dataset=str(path), model=model)
    if fits:
        sft.prepare_data(1)
    else:
        with pytest.raises(DataError, match=r"a\.jsonl:\d+: .*model_without_images"):
            sft.prepare_data(1)


def test_a_conversation_without_messages_is_an_error_at_its_line(clean_environment: Path) -> None:
    rows: list[dict[str, Any]] = [WRITTEN["messages"](said) for said in talks(12)]
    path = write_jsonl(clean_environment / "a.jsonl", [*rows, {"messages": []}])
    with pytest.raises(DataError, match=r"a\.jsonl:13: .*empty_messages"):
        OpenAISFT(offline=True, verbose=False, dataset=str(path)).prepare_data(1)


def test_lines_in_utf_8_are_not_taken_for_another_encoding_that_could_hold_them_too(
    tmp_path: Path,
) -> None:
    said = [("user", "ああ"), ("assistant", "ああ")]  # whose bytes are valid cp932 too
    good = json.dumps(WRITTEN["messages"](said), ensure_ascii=False)
    content = (good + "\n").encode() * 3 + good.encode("cp932")
    assert content.decode("cp932")
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.jsonl:4: UTF-8"):
        read_dialogues(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("encoding", ["cp932", "euc_jp"])
def test_of_two_encodings_that_could_be_the_one_without_strange_kana_is_meant(
    tmp_path: Path, encoding: str
) -> None:
    said = [("user", "テスト"), ("assistant", "はい")]
    content = lines([WRITTEN["messages"](said)]).encode(encoding)
    (tmp_path / "a.jsonl").write_bytes(content)
    (dialogue,) = read_dialogues(str(tmp_path / "a.jsonl"))

    assert said_in(dialogue) == said
