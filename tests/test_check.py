"""One command that says whether a run can work today."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import openai
import pytest
from endpoint import Fault, Rehearsal
from faults import CHAT, asked
from helpers import PROJECT, posts

import openai_sft_example
from openai_sft import CheckItem, ConfigurationError, OpenAISFT, Price

MakeSFT = Callable[..., OpenAISFT]

SCRIPT = str(PROJECT / "openai_sft_example.py")
KEY = "sk-recognisable-0123456789-wxyz"


def at(text: str) -> Callable[[], float]:
    """A clock that stands at noon of a day, here."""
    return lambda: datetime.fromisoformat(f"{text}T12:00:00").timestamp()


@pytest.fixture
def cli(
    capsys: pytest.CaptureFixture[str], clean_environment: Path
) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: str) -> tuple[int, str, str]:
        code = openai_sft_example.main(["--check", *arguments])
        return (code, *capsys.readouterr())

    return run


def named(items: list[CheckItem], name: str) -> CheckItem:
    (item,) = (item for item in items if item.name == name)
    return item


def test_all_that_is_well_is_ticked_and_nothing_is_paid(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    items = make_sft(api_key=KEY, client=None, clock=at("2026-11-22")).check()
    names = {item.name for item in items}

    assert all(item.level != "fail" for item in items)
    assert {"APIキー", "エンドポイント", "モデル", "料金表", "ディスク", "保存先"} <= names
    assert {"トークンの語彙", "バージョン"} <= names
    assert endpoint.url in named(items, "エンドポイント").text
    assert posts(endpoint) == []


def test_each_line_has_its_mark_and_what_fails_its_remedy(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    endpoint.inject(Fault("401", "GET", "/models/*"))
    items = make_sft(clock=at("2026-11-22")).check()
    marks = {"ok": "✓", "warn": "⚠", "fail": "✗"}

    assert [str(item)[0] for item in items] == [marks[item.level] for item in items]
    assert any(item.level == "fail" for item in items)
    assert all(item.remedy for item in items if item.level == "fail")
    assert all(str(item).isprintable() for item in items)


@pytest.mark.parametrize("way", ["argument", "environment", "file"])
def test_of_the_key_only_where_it_comes_from_and_its_last_four_characters_are_shown(
    make_sft: MakeSFT, clean_environment: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    if way == "environment":
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
    elif way == "file":
        (clean_environment / ".env").write_text(f"OPENAI_API_KEY={KEY}\n", "utf-8")
    sft = make_sft(api_key=KEY if way == "argument" else None, client=None)
    text = "\n".join(map(str, sft.check()))
    source = {"argument": "引数", "environment": "OPENAI_API_KEY", "file": ".env"}[way]

    assert "wxyz" in text
    assert KEY[-5:] not in text
    assert "recognisable" not in text
    assert source in text


def test_a_key_too_short_to_be_one_is_not_shown_at_all(make_sft: MakeSFT) -> None:
    text = "\n".join(map(str, make_sft(api_key="abcdefg", client=None).check()))

    assert "defg" not in text


def test_the_models_last_day_is_shown_with_the_days_left(make_sft: MakeSFT) -> None:
    item = named(make_sft(clock=at("2026-12-15")).check(), "モデル")

    assert item.level == "warn"
    assert "2027-01-14" in item.text
    assert "あと30日" in item.text


def test_a_model_past_its_last_day_fails(make_sft: MakeSFT) -> None:
    item = named(make_sft(clock=at("2027-01-15")).check(), "モデル")

    assert item.level == "fail"
    assert item.remedy


def test_the_days_of_the_platforms_end_are_shown_where_it_is_openais(
    make_sft: MakeSFT, endpoint: Rehearsal, sdk: openai.OpenAI
) -> None:
    client = sdk.with_options(base_url=endpoint.url)
    openais = make_sft(
        base_url="https://api.openai.com/v1", client=client, clock=at("2026-12-07")
    ).check()
    others = make_sft(dialect=None, clock=at("2026-12-07")).check()
    text = "\n".join(map(str, openais))

    assert "2027-01-06" in text
    assert "あと30日" in text
    assert "2027-01-14" in text
    assert "2027-01-06" not in "\n".join(map(str, others))


def test_after_the_platforms_end_a_run_is_warned_and_pointed_elsewhere(
    make_sft: MakeSFT, endpoint: Rehearsal, sdk: openai.OpenAI
) -> None:
    client = sdk.with_options(base_url=endpoint.url)
    items = make_sft(
        base_url="https://api.openai.com/v1", client=client, clock=at("2027-01-10")
    ).check()
    (line,) = (item for item in items if "2027-01-06" in item.text)

    assert line.level == "warn"
    assert "--base-url" in line.remedy


def test_an_endpoint_without_models_is_a_warning(make_sft: MakeSFT, endpoint: Rehearsal) -> None:
    endpoint.inject(Fault("404", "GET", "/models/*", times=None))
    items = make_sft(clock=at("2026-11-22")).check()

    assert named(items, "モデル").level == "warn"
    assert not any(item.level == "fail" for item in items)


def test_a_model_the_endpoint_does_not_know_fails(make_sft: MakeSFT) -> None:
    item = named(make_sft(model="gpt-nothing").check(), "モデル")

    assert item.level == "fail"
    assert "gpt-nothing" in item.text
    assert "--model" in item.remedy


@pytest.mark.parametrize("fault", ["503", "reset_before", "malformed", "403"])
def test_an_endpoint_that_does_not_work_fails_within_seconds(
    make_sft: MakeSFT, endpoint: Rehearsal, fault: str
) -> None:
    endpoint.inject(Fault(fault, "GET", "/models/*", times=None))
    now = [at("2026-11-22")()]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    items = make_sft(clock=lambda: now[0], sleep=sleep).check()

    assert named(items, "エンドポイント").level == "fail"
    assert now[0] - at("2026-11-22")() <= 10


@pytest.mark.parametrize("option", ["config", "revision"])
def test_what_only_the_hub_has_fails_for_data_here(make_sft: MakeSFT, option: str) -> None:
    assert named(make_sft().check(), "データ").level == "ok"
    assert named(make_sft(**{option: "ja"}).check(), "データ").level == "fail"


def test_the_age_of_the_price_table_is_told_and_grows_to_a_warning(make_sft: MakeSFT) -> None:
    today = named(make_sft(clock=at("2026-11-22")).check(), "料金表")
    later = named(make_sft(clock=at("2027-11-22")).check(), "料金表")
    given = named(make_sft(clock=at("2027-11-22"), price=Price(1, 1, 1)).check(), "料金表")

    assert (today.level, later.level, given.level) == ("ok", "warn", "ok")
    assert "82日前" in today.text


def test_an_output_folder_that_cannot_be_is_a_line_and_no_crash(
    make_sft: MakeSFT, clean_environment: Path
) -> None:
    (clean_environment / "file").write_text("")
    item = named(make_sft(output_dir=clean_environment / "file" / "out").check(), "保存先")

    assert item.level == "fail"
    assert "--output-dir" in str(item)


def test_a_missing_vocabulary_is_a_warning(
    endpoint: Rehearsal, clean_environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of its own, for a vocabulary once loaded stays."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(clean_environment / "empty"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    done = subprocess.run(
        [sys.executable, SCRIPT, "--check", "--json", "--base-url", endpoint.url],
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    lines = {item["name"]: item["level"] for item in json.loads(done.stdout)}

    assert done.returncode == 0
    assert lines["トークンの語彙"] == "warn"


# ── The command ──────────────────────────────────────────────────────────────────────────────


def test_the_command_prints_a_line_an_item_and_ends_with_0(
    cli: Callable[..., tuple[int, str, str]],
    endpoint: Rehearsal,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    code, out, err = cli("--base-url", endpoint.url)

    assert code == 0
    assert all(line[0] in "✓⚠" for line in out.splitlines())
    assert len(out.splitlines()) >= 7
    assert KEY not in out + err


def test_the_command_as_json_is_json_alone(
    cli: Callable[..., tuple[int, str, str]],
    endpoint: Rehearsal,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    code, out, _ = cli("--base-url", endpoint.url, "--json")
    items = json.loads(out)

    assert code == 0
    assert all(set(item) == {"name", "level", "text", "remedy"} for item in items)
    assert {item["level"] for item in items} <= {"ok", "warn", "fail"}


def test_the_command_ends_with_1_where_a_line_fails(
    cli: Callable[..., tuple[int, str, str]],
    endpoint: Rehearsal,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    code, out, _ = cli("--base-url", endpoint.url, "--model", "gpt-nothing")

    assert code == 1
    assert "✗ モデル" in out


def test_without_a_key_the_command_says_so_in_its_line_and_goes_on(
    cli: Callable[..., tuple[int, str, str]], endpoint: Rehearsal
) -> None:
    code, out, _ = cli("--base-url", endpoint.url)

    assert code == 1
    assert "✗ APIキー" in out
    assert "OPENAI_API_KEY" in out
    assert "ディスク" in out


# ── Before a run ─────────────────────────────────────────────────────────────────────────────


def test_a_run_makes_the_cheap_part_of_the_check_first(
    make_sft: MakeSFT, endpoint: Rehearsal, clean_environment: Path
) -> None:
    (clean_environment / "file").write_text("")
    sft = make_sft(output_dir=clean_environment / "file" / "out")
    with pytest.raises(ConfigurationError, match="--output-dir"):
        sft.run_full_pipeline(1)

    assert endpoint.exchanges == []


def test_a_warning_of_the_check_stops_no_run(
    make_sft: MakeSFT, endpoint: Rehearsal, log: Callable[[], list[str]]
) -> None:
    sft = make_sft(model="gpt-4o-mini", clock=at("2027-11-22"))
    sft.run_full_pipeline(1, 4, max_test_cases=1)

    assert any("⚠ 料金表" in line for line in log())
    assert len(asked(endpoint, "POST", CHAT)) == 2
