"""Which dialogues are used, and who stands in which split."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import read_json, record, records, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

import openai_sft_example
from openai_sft import (
    GROUPS,
    ConfigurationError,
    DataError,
    Dialogue,
    OpenAISFT,
    Selection,
    Splits,
    measure_leakage,
    parse_dialogue,
    select_dialogues,
    split_dialogues,
)


def row(
    number: int,
    *,
    score: float | None = None,
    topic: Any = None,
    counselor: object = None,
    client: object = None,
    **flags: str | None,
) -> dict[str, Any]:
    review = {"score": score, "counselor_id": counselor, "client_id": client, **flags}
    return {**record(number), "topic": topic, "review_by_client_en": review}


def parse(rows: Iterable[dict[str, Any]]) -> list[Dialogue]:
    return [parse_dialogue(one, fallback_id="", source="here") for one in rows]


def chosen(rows: list[dict[str, Any]], **options: Any) -> tuple[set[str], dict[str, int]]:
    """The ids without their d, and what was counted."""
    kept, removed = select_dialogues(parse(rows), Selection(**options))
    return {dialogue.id.removeprefix("d") for dialogue in kept}, removed


# ── Filters ──────────────────────────────────────────────────────────────────────────────────

SCORED = [row(n, score=score) for n, score in enumerate([0, 69, 69.5, 70, 98, 99, 100, None])]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"min_score": 70}, "3456"),
        ({"max_score": 98}, "01234"),
        ({"min_score": 70, "max_score": 98}, "34"),
        ({"min_score": 0}, "0123456"),
        ({"max_score": 0}, "0"),
        ({}, "01234567"),
    ],
    ids=str,
)
def test_the_bounds_of_the_score_are_inclusive_and_no_score_is_within_none(
    options: dict[str, float], kept: str
) -> None:
    found, removed = chosen(SCORED, **options)

    assert found == set(kept)
    assert sum(removed.values()) == len(SCORED) - len(kept)
    assert list(removed) == list(options)


def test_the_japanese_review_has_a_score_too() -> None:
    rows = [{**record(n), "review_by_client_jp": {"点数": score}} for n, score in enumerate((9, 8))]

    assert chosen(rows, min_score=9) == ({"0"}, {"min_score": 1})


def test_a_topic_is_named_in_japanese_or_english() -> None:
    work, family = (
        {"main_jp": "仕事", "main_en": "Work"},
        {"main_jp": "家族", "main_en": "Family"},
    )
    rows = [row(0, topic=work), row(1, topic=family), row(2, topic="学校"), row(3)]

    assert chosen(rows, topics=["仕事"]) == ({"0"}, {"topics": 3})
    assert chosen(rows, topics=["Work", "家族"]) == ({"0", "1"}, {"topics": 2})
    assert chosen(rows, topics=("学校",)) == ({"2"}, {"topics": 3})
    assert chosen(rows, topics=[]) == (set("0123"), {})


def test_a_topic_that_no_dialogue_has_is_an_error_that_names_those_there_are() -> None:
    rows = [row(0, topic={"main_jp": "仕事", "main_en": "Work"}), row(1)]
    with pytest.raises(DataError, match="「仕亊」") as caught:
        chosen(rows, topics=["仕事", "仕亊"])

    assert "Work、仕事" in str(caught.value)


def test_one_topic_that_is_no_list_is_a_wrong_setting() -> None:
    with pytest.raises(ConfigurationError, match="topics"):
        Selection(topics="仕事")


KOKOROCHAT_FLAGS = (
    *("unwilling_to_continue", "harmful_due_to_ignorance", "other_potentially_unethical"),
)


@pytest.mark.parametrize("flag", KOKOROCHAT_FLAGS)
def test_flagged_dialogues_are_left_out_where_that_is_asked_for(flag: str) -> None:
    rows = [row(0, **{flag: "はい"}), row(1, **{flag: None}), row(2), record(3)]

    assert chosen(rows, exclude_flagged=True) == (set("123"), {"exclude_flagged": 1})
    assert chosen(rows) == (set("0123"), {})


def test_each_filter_counts_what_it_took_of_what_the_ones_before_it_left() -> None:
    rows = [
        row(0, score=10, topic="a", unwilling_to_continue="はい"),
        row(1, score=80, topic="b", unwilling_to_continue="はい"),
        row(2, score=80, topic="a", unwilling_to_continue="はい"),
        row(3, score=99, topic="a"),
        row(4, score=80, topic="a"),
        {**row(4, score=80, topic="a"), "id": "d5"},
    ]
    found, removed = chosen(rows, min_score=70, max_score=98, topics=["a"], exclude_flagged=True)

    assert found == {"4"}
    assert removed == {
        "duplicates": 1,
        "min_score": 1,
        "max_score": 1,
        "topics": 1,
        "exclude_flagged": 1,
    }


@given(st.permutations([*records(6), *[{**one, "id": f"x{one['id']}"} for one in records(4)]]))
def test_of_exact_duplicates_the_same_one_stays_in_whatever_order_they_come(
    rows: list[dict[str, Any]],
) -> None:
    kept, removed = select_dialogues(parse(rows), Selection())

    assert sorted(dialogue.id for dialogue in kept) == [f"d{n}" for n in range(1, 7)]
    assert removed == {"duplicates": 4}


def test_duplicates_never_stand_in_two_splits(clean_environment: Path) -> None:
    rows = [{**one, "id": f"{one['id']}-{n}"} for one in records(12) for n in range(3)]
    path = write_jsonl(clean_environment / "a.jsonl", rows)
    parts = OpenAISFT(offline=True, dataset=str(path), verbose=False).load_and_split_dataset()
    said = [repr(one["dialogue"]) for part in parts for one in part]

    assert len(said) == len(set(said)) == 12


def test_what_each_filter_took_out_is_shown_by_the_command_line(
    clean_environment: Path, capsys: pytest.CaptureFixture[str], log: Callable[[], list[str]]
) -> None:
    rows = [row(n, score=60 + n, topic="仕事" if n % 2 else "家族") for n in range(40)]
    path = write_jsonl(clean_environment / "a.jsonl", [*rows, {**rows[0], "id": "again"}])
    arguments = ["--data-only", "--dataset", str(path), "--min-score", "62", "--max-score", "98"]
    code = openai_sft_example.main(
        [*arguments, "--topics", "仕事", "--exclude-flagged", "--group-by", "pair"]
    )
    told = "除いた対話: 重複 1件、min_score 2件、max_score 1件、topics 19件、exclude_flagged 0件"
    out = capsys.readouterr().out

    assert code == 0
    assert told in out
    assert told in log()
    assert "学習 14件、テスト 2件、検証 2件" in out


def test_filters_that_leave_nothing_are_an_error(clean_environment: Path) -> None:
    path = write_jsonl(clean_environment / "a.jsonl", SCORED)
    with pytest.raises(DataError, match="1件もありません"):
        OpenAISFT(offline=True, dataset=str(path)).prepare_data(min_score=99, max_score=1)


@pytest.mark.parametrize("group_by", ["Counselor", "", "topic"])
def test_a_group_that_nobody_knows_is_a_wrong_setting(group_by: Any) -> None:
    with pytest.raises(ConfigurationError, match="group_by"):
        split_dialogues(parse(records(20)), group_by=group_by)


# ── Groups ───────────────────────────────────────────────────────────────────────────────────

sizes_of_groups = st.lists(st.integers(1, 9) | st.integers(1, 40), min_size=1, max_size=7)


def grouped(sizes: Iterable[int]) -> list[Dialogue]:
    """Dialogues of as many counsellors, each with as many dialogues."""
    who = [number for number, size in enumerate(sizes) for _ in range(size)]
    return parse(row(n, counselor=name, client=n) for n, name in enumerate(who))


def nearest(sizes: list[int], target: int, left: int) -> int:
    """By brute force: how far from ``target`` the best choice of groups is, ``left`` being left."""
    choices = (
        choice
        for count in range(1, len(sizes) - left + 1)
        for choice in itertools.combinations(sizes, count)
    )
    return min(abs(sum(choice) - target) for choice in choices)


@given(sizes_of_groups, st.integers(0, 5), st.randoms())
def test_no_group_stands_in_two_splits_and_their_sizes_are_as_near_as_groups_allow(
    sizes: list[int], seed: int, random: Any
) -> None:
    pool = grouped(sizes)
    if len(sizes) < 3:
        with pytest.raises(DataError, match=f"{len(sizes)}組しかなく"):
            split_dialogues(pool, seed=seed, group_by="counselor")
        return
    splits = split_dialogues(pool, seed=seed, group_by="counselor")
    parts = [Counter(dialogue.group("counselor") for dialogue in part) for part in splits]
    target = max(1, round(len(pool) / 10))
    rest = [size for name, size in enumerate(sizes) if name not in parts[1]]
    shuffled = random.sample(pool, len(pool))

    assert all(parts)
    assert sum(parts, Counter()) == dict(enumerate(sizes))
    assert sum(map(len, parts)) == len(sizes)
    assert abs(len(splits.test) - target) == nearest(sizes, target, left=2)
    assert abs(len(splits.valid) - target) == nearest(rest, target, left=1)
    assert split_dialogues(shuffled, seed=seed, group_by="counselor") == splits


@pytest.mark.parametrize("sizes", [[1, 1, 50], [1, 1, 1], [4, 4, 4], [30, 1, 30], [1, 2, 3, 90]])
def test_groups_of_very_different_sizes_still_make_three_splits(sizes: list[int]) -> None:
    splits = split_dialogues(grouped(sizes), group_by="counselor")

    assert all(splits)
    assert sum(map(len, splits)) == sum(sizes)


def test_many_small_groups_make_8_1_1_exactly() -> None:
    splits = split_dialogues(grouped([1, 2, 3, 4] * 20), group_by="counselor")

    assert [len(part) for part in splits] == [160, 20, 20]


def test_another_seed_puts_others_to_the_test() -> None:
    pool = grouped([1, 2, 3, 4] * 20)
    tested = [
        frozenset(d.id for d in split_dialogues(pool, seed=seed, group_by="counselor").test)
        for seed in range(4)
    ]

    assert len(set(tested)) == 4


@pytest.mark.parametrize("part", ["test", "valid"])
def test_who_has_many_dialogues_is_held_out_no_more_often_than_others(part: str) -> None:
    pool = grouped([24] * 6 + [2] * 128)  # 400; most dialogues that 40 hold is one large group
    sizes = Counter(dialogue.group("counselor") for dialogue in pool)
    held_out = [
        sum(sizes[d.group("counselor")] == 24 for d in getattr(splits, part))
        for splits in (
            split_dialogues(pool, seed=seed, group_by="counselor") for seed in range(100)
        )
    ]

    assert set(held_out) == {0, 24}
    assert 8 < sum(held_out) / 100 < 20  # a part of 40 that is like the whole holds 14.4


def test_a_pair_is_a_client_and_a_counsellor_and_who_is_unknown_stands_alone() -> None:
    (dialogue,) = parse([row(1, counselor=5, client=3)])
    unknown = parse(row(n, counselor=n) for n in range(30))
    strangers = parse(records(30))

    assert [dialogue.group(by) for by in GROUPS] == [5, 3, (3, 5)]  # type: ignore[arg-type]
    assert [len(p) for p in split_dialogues(unknown, group_by="pair")] == [24, 3, 3]
    assert [len(p) for p in split_dialogues(strangers, group_by="client")] == [24, 3, 3]


def test_a_sample_is_drawn_before_it_is_grouped() -> None:
    pool = grouped([2] * 40)
    sample = {d.id for part in split_dialogues(pool, max_samples=30) for d in part}
    splits = split_dialogues(pool, max_samples=30, group_by="counselor")

    assert {dialogue.id for part in splits for dialogue in part} == sample
    assert measure_leakage(splits)["counselor"] == 0


# ── Published splits ─────────────────────────────────────────────────────────────────────────

PARTS = ("train", "test", "valid")


def published(**sizes: int) -> list[Dialogue]:
    """Dialogues that were published in splits of these sizes."""
    names = [name for name, size in sizes.items() for _ in range(size)]
    pool = parse(records(len(names)))
    return [replace(one, part=name) for one, name in zip(pool, names, strict=True)]  # type: ignore[arg-type]


@given(
    sizes=st.fixed_dictionaries(
        {"train": st.integers(2, 40)},
        optional={"test": st.integers(1, 9), "valid": st.integers(1, 9)},
    ),
    data=st.data(),
)
def test_published_parts_stay_whole_and_only_a_missing_one_is_drawn_from_training(
    sizes: dict[str, int], data: st.DataObject
) -> None:
    pool = published(**sizes)
    splits = split_dialogues(pool)
    shuffled = data.draw(st.permutations(pool))
    rounded = {"test": (len(pool) + 5) // 10, "valid": (len(pool) + 1) // 10}
    drawn = {name: count for name, count in rounded.items() if name not in sizes}

    assert split_dialogues(shuffled) == splits
    assert {d.id for part in splits for d in part} == {d.id for d in pool}
    assert len(splits.train) == sizes["train"] - sum(drawn.values())
    assert all(d.part == "train" for d in splits.train)
    for name in ("test", "valid"):
        part = getattr(splits, name)

        assert len(part) == drawn.get(name, sizes.get(name))
        assert {d.part for d in part} <= {"train" if name in drawn else name}


@given(st.integers(3, 130), st.integers(3, 130), st.integers(0, 9))
def test_a_sample_holds_the_same_share_of_each_published_part_and_smaller_ones(
    one: int, other: int, seed: int
) -> None:
    pool = published(train=90, test=30, valid=10)
    small, large = (
        split_dialogues(pool, max_samples=count, seed=seed) for count in sorted((one, other))
    )

    assert sum(map(len, small)) == min(one, other)
    for part, whole, more in zip(small, (90, 30, 10), large, strict=True):
        assert abs(len(part) - whole * min(one, other) / 130) < 2  # for no part is left empty
        assert len(part) >= 1
        assert {d.id for d in part} <= {d.id for d in more}


@given(st.integers(2, 70), st.integers(2, 70), st.sampled_from(["test", "valid"]))
def test_what_is_drawn_for_a_missing_part_lies_inside_that_of_a_larger_sample(
    one: int, other: int, given_part: str
) -> None:
    pool = published(train=50, **{given_part: 20})
    small, large = (split_dialogues(pool, max_samples=count) for count in sorted((one, other)))

    for part, more in zip(small, large, strict=True):
        assert {d.id for d in part} <= {d.id for d in more}
    assert abs(len(small.test + small.valid) - min(one, other) * (20 + 7) / 70) < 2


def test_published_splits_are_not_grouped_by_who_took_part() -> None:
    with pytest.raises(ConfigurationError, match="--resplit"):
        split_dialogues(published(train=20, test=5), group_by="pair")


def test_of_a_dialogue_in_two_published_parts_the_held_out_one_stays() -> None:
    for parts in itertools.permutations(("train", "train", "valid", "test", "test")):
        pool = [replace(d, part=part, digest="same") for d, part in zip(TWINS, parts, strict=True)]
        kept, removed = select_dialogues(pool, Selection())

        assert [dialogue.part for dialogue in kept] == ["test"]
        assert removed == {"duplicates": 2, "held_out": 2}


TWINS = parse(records(5))


def write_parts(folder: Path, layout: dict[str, int]) -> Path:
    """A folder whose files hold so many dialogues each, all different."""
    rows = iter(records(sum(layout.values())))
    for name, count in layout.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(path, itertools.islice(rows, count))
    return folder


@pytest.mark.parametrize(
    "layout",
    [
        {"train.jsonl": 20, "test.jsonl": 3, "validation.jsonl": 4},
        {
            "data/train-00000-of-00002.json": 8,
            "data/train-00001-of-00002.json": 12,
            "data/test-00000-of-00001.json": 3,
            "data/val-00000-of-00001.json": 4,
        },
        {"train/a.jsonl": 9, "train/b.jsonl": 11, "Test/a.jsonl": 3, "valid/a.jsonl": 4},
        {"default/partial-train/0000.jsonl": 20, "default/test/0.jsonl": 3, "val.jsonl": 4},
    ],
    ids=["files", "shards", "folders", "conversion"],
)
def test_a_folder_laid_out_as_on_the_hub_keeps_its_splits(
    clean_environment: Path, log: Callable[[], list[str]], layout: dict[str, int]
) -> None:
    folder = write_parts(clean_environment / "test", layout)  # its own name says nothing
    options: dict[str, Any] = {"dataset": str(folder), "offline": True, "verbose": False}
    summary = OpenAISFT(**options).prepare_data()
    manifest = read_json(summary.files["manifest"])
    again = OpenAISFT(**options, resplit=True).prepare_data()

    assert summary.examples == {"train": 20, "test": 3, "valid": 4}
    for name, pattern in zip(PARTS, ("train", "test", "val"), strict=True):
        for line in manifest["splits"][name]["lines"]:
            assert pattern in line["source"].removeprefix(str(folder)).lower()
    assert manifest["published_splits"] == ["train", "test", "valid"]
    assert any(
        line == "公開時の分割を使います: 学習 20 / テスト 3 / 検証 4"
        "（--resplit で8:1:1に分け直せます）"
        for line in log()
    )
    assert again.examples == {"train": 22, "test": 3, "valid": 2}
    assert read_json(again.files["manifest"])["published_splits"] == []
    assert read_json(again.files["record"])["settings"]["resplit"] is True


@pytest.mark.parametrize(
    "layout",
    [
        {"train.jsonl": 20},
        {"train.jsonl": 15, "more.jsonl": 5},
        {"test.jsonl": 15, "valid.jsonl": 5},
        {"training.jsonl": 15, "testing.jsonl": 5},
    ],
    ids=str,
)
def test_without_training_and_held_out_data_by_name_all_is_split_8_1_1(
    clean_environment: Path, log: Callable[[], list[str]], layout: dict[str, int]
) -> None:
    folder = write_parts(clean_environment / "data", layout)
    summary = OpenAISFT(dataset=str(folder), offline=True, verbose=False).prepare_data()

    assert summary.examples == {"train": 16, "test": 2, "valid": 2}
    assert read_json(summary.files["manifest"])["published_splits"] == []
    assert not any("公開時の" in line for line in log())


def test_what_is_drawn_left_out_and_held_out_is_told_by_the_command_line(
    clean_environment: Path, capsys: pytest.CaptureFixture[str], log: Callable[[], list[str]]
) -> None:
    folder = write_parts(
        clean_environment / "data", {"train.jsonl": 24, "test.jsonl": 6, "hard.jsonl": 5}
    )
    first = (folder / "test.jsonl").read_text("utf-8").split("\n")[0]
    twin = {**json.loads(first), "id": "twin"}
    with (folder / "train.jsonl").open("a") as file:
        file.write(json.dumps(twin) + "\n")
    arguments = ["--data-only", "--dataset", str(folder)]
    codes = [
        openai_sft_example.main([*arguments, *more]) for more in ([], ["--group-by", "client"])
    ]
    out, err = capsys.readouterr()

    assert codes == [0, 2]
    assert "学習 21件、テスト 6件、検証 3件" in out
    assert "除いた対話: 学習のうちテスト・検証にもある対話 1件" in out
    assert "公開時の検証がないため、学習から3件を取り分けました（seed=42）。" in log()
    assert any("hard.jsonl（5件）。--resplit なら" in line for line in log())
    assert "エラー: 公開時の分割を使うデータでは group_by=client" in err
    assert "--resplit" in err


# ── Leakage ──────────────────────────────────────────────────────────────────────────────────


def test_the_leakage_is_the_share_of_test_dialogues_whose_people_were_seen_in_training() -> None:
    train = parse([row(1, counselor="a", client=1), row(2, counselor="b", client=2)])
    test = parse(
        [
            row(3, counselor="a", client=1),  # the pair
            row(4, counselor="a", client=2),  # both, not together
            row(5, counselor="b", client=9),
            row(6, counselor="c", client=9),
            row(7, counselor="b"),  # the client isn't told
            record(8),  # nobody is told
        ]
    )

    assert measure_leakage(Splits(train, test, [])) == pytest.approx(
        {"counselor": 4 / 5, "client": 2 / 4, "pair": 1 / 4}
    )
    assert measure_leakage(Splits(train, test[5:], [])) == {}


def test_who_is_known_from_validation_alone_was_not_seen_in_training() -> None:
    train, test, valid = (
        parse([row(n, counselor=who, client=who)]) for n, who in enumerate((1, 2, 2))
    )

    assert measure_leakage(Splits(train, test, valid)) == dict.fromkeys(GROUPS, 0)


def test_the_leakage_is_told_unless_groups_are_kept_together(
    clean_environment: Path, log: Callable[[], list[str]]
) -> None:
    rows = [row(n, counselor=n % 4, client=n) for n in range(40)]
    path = write_jsonl(clean_environment / "a.jsonl", rows)
    sft = OpenAISFT(offline=True, dataset=str(path), verbose=False)
    loose = sft.prepare_data()
    told = [line for line in log() if "学習データにも現れるものの割合" in line]
    tight = sft.prepare_data(group_by="counselor")

    assert loose.leakage == {"counselor": 1.0, "client": 0.0, "pair": 0.0}
    assert "カウンセラー 100.0%、クライアント 0.0%、同じ組 0.0%" in told[0]
    assert told[0] in loose.lines()
    assert tight.leakage == {}
    assert [line for line in log() if "学習データにも現れるものの割合" in line] == told


# ── KokoroChat itself ────────────────────────────────────────────────────────────────────────


def test_the_bands_of_score_the_paper_names_share_out_kokorochat(
    kokorochat: list[Dialogue],
) -> None:
    def count(**options: Any) -> int:
        return len(select_dialogues(kokorochat, Selection(**options))[0])

    bands = [{"max_score": 69}, {"min_score": 70, "max_score": 98}, {"min_score": 99}]
    shares = [count(**band) / len(kokorochat) for band in bands]

    assert count() == len(kokorochat)
    assert sum(shares) == pytest.approx(1)
    assert shares == pytest.approx([3870 / 6589, 2601 / 6589, 118 / 6589], abs=0.02)


def test_the_flags_of_kokorochat_are_found(kokorochat: list[Dialogue]) -> None:
    flagged = sum(
        any(dialogue.review_en[key] is not None for key in KOKOROCHAT_FLAGS)
        for dialogue in kokorochat
    )
    _, removed = select_dialogues(kokorochat, Selection(exclude_flagged=True))

    assert removed == {"exclude_flagged": flagged}
    assert 150 < flagged <= 209 + 8 + 4


def test_a_plain_split_of_kokorochat_leaks_and_a_grouped_one_does_not(
    kokorochat: list[Dialogue],
) -> None:
    leakage = measure_leakage(split_dialogues(kokorochat))

    assert leakage["counselor"] == pytest.approx(0.987, abs=0.01)
    assert leakage["client"] == pytest.approx(0.98, abs=0.01)
    assert leakage["pair"] == pytest.approx(0.35, abs=0.05)
    for by in GROUPS:
        splits = split_dialogues(kokorochat, group_by=by)  # type: ignore[arg-type]  # one of them

        assert len(splits.test) == len(splits.valid) == round(len(kokorochat) / 10)
        assert measure_leakage(splits)[by] == 0


def test_a_topic_of_kokorochat_can_be_chosen_in_both_languages(
    kokorochat: list[Dialogue],
) -> None:
    topic = kokorochat[0].topic
    by_language = [
        select_dialogues(kokorochat, Selection(topics=[topic[key]]))[0]
        for key in ("main_jp", "main_en")
    ]

    assert 0 < len(by_language[0]) < 6589
    assert by_language[0] == by_language[1]
    assert re.search("[ぁ-んァ-ン一-龠]", topic["main_jp"])
