"""Data sets from the Hugging Face Hub: what is tried, in what order, and what it comes to.

Nothing is patched. ``datasets`` and ``huggingface_hub`` talk to a Hub on this machine, in
processes of their own: both settle where the Hub and the cache are when they are imported.
"""

from __future__ import annotations

import io
import json
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from fake_hub import FakeHub, Files
from helpers import PROJECT

from openai_sft import TURN_BREAK, parse_dialogue

CONVERSION = "refs/convert/parquet"
CARD = {"README.md": "---\nlicense: mit\n---\n# 対話\n".encode()}

# ── The data sets ────────────────────────────────────────────────────────────────────────────


def kokoro(number: int, *, left: str | None = None, harmful: str | None = None) -> dict[str, Any]:
    """A dialogue of our own in KokoroChat's form: three review fields are null, or else text."""
    return {
        "dialogue": [
            {"role": role, "time": f"2026-01-05T10:{number % 60:02}:{second:02}", "utterance": text}
            for second, (role, text) in enumerate(
                [
                    ("counselor", f"今日は、どうされましたか？\u2028（{number}）"),
                    ("client", "仕事に行けなくて…😢\tそれで"),
                    ("client", "眠れません。\n１２時になっても"),
                    ("counselor", "そうでしたか。つらいですね。"),
                ]
            )
        ],
        "topic": {"main_jp": "仕事", "main_en": "Work", "sub": "職場"},
        "review_by_client_jp": {
            "評価ID": number,
            "評価作成日時": "2026-01-05T11:00:00",
            "点数": 66,
            "無理解と軽率さによる傷つけ発言": harmful,
            "その他の倫理違反が疑われる発言": None,
            "離脱": left,
        },
        "review_by_client_en": {
            "evaluation_id": number,
            "evaluation_created_at": "2026-01-05T11:00:00",
            "client_id": 3,
            "counselor_id": 5,
            "score": 66,
            "harmful_due_to_ignorance": harmful,
            "other_potentially_unethical": None,
            "unwilling_to_continue": left,
        },
    }


ROWS = [
    *map(kokoro, range(101, 110)),
    kokoro(110, left="途中で切れた"),
    kokoro(111, harmful="あり"),
]
EARLIER = [kokoro(201), kokoro(202, left="離席"), kokoro(203)]
ALL_IDS = [str(number) for number in range(101, 112)]
EARLIER_IDS = ["201", "202", "203"]


def as_json(rows: list[dict[str, Any]]) -> dict[str, bytes]:
    """The released form: a folder of files, each of them one object over many lines."""
    return {
        f"kokorochat_dialogues/{row['review_by_client_en']['evaluation_id']}.json": json.dumps(
            row, ensure_ascii=False, indent=2
        ).encode()
        for row in rows
    }


def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def as_converted(rows: list[dict[str, Any]]) -> Files:
    """The Hub's own conversion: made by ``datasets``, which takes the times for timestamps."""

    def timed(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {inner: timed(part, inner) for inner, part in value.items()}
        if isinstance(value, list):
            return [timed(part) for part in value]
        times = ("time", "evaluation_created_at", "評価作成日時")
        return datetime.fromisoformat(value) if key in times else value

    return {"default/train/0000.parquet": as_parquet([timed(row) for row in rows])}


NOTES = {"1.json": b'{"note": null}', "2.json": '{"note": "読めます"}'.encode()}
SCRIPT = b"import datasets\n\nraise SystemExit('a loader script was run')\n"

REPOSITORIES: dict[str, dict[str, Files]] = {
    "koto/parquet": {
        "main": {**CARD, "data/train-00000-of-00001.parquet": as_parquet(ROWS)},
        CONVERSION: as_converted(EARLIER),  # out of date, and nobody's business
    },
    "koto/lines": {"main": {**CARD, "train.jsonl": as_jsonl(ROWS)}},
    "koto/json": {"main": {**CARD, **as_json(ROWS)}, CONVERSION: as_converted(ROWS)},
    "koto/script": {
        "main": {**CARD, **as_json(ROWS), "script.py": SCRIPT},
        CONVERSION: as_converted(ROWS),
        "v1": {**CARD, **as_json(EARLIER), "script.py": SCRIPT},
    },
    "koto/plain": {"main": {**CARD, **as_json(ROWS)}},
    "koto/bad-conversion": {
        "main": {**CARD, **as_json(ROWS)},
        CONVERSION: {"default/train/0000.parquet": b"PAR1, and no more"},
    },
    "koto/pinned": {
        "main": {**CARD, **as_json(ROWS)},
        CONVERSION: as_converted(ROWS),
        "v1": {**CARD, **as_json(EARLIER)},
        "v2": {**CARD, "train.parquet": as_parquet(EARLIER)},
    },
    "koto/bare-script": {"main": {**CARD, "bare-script.py": SCRIPT}},
    "koto/notes": {"main": {**CARD, **NOTES}},
    "koto/empty": {"main": CARD},
    "koto/bad-card": {"main": {"README.md": b"---\nlicense: [mit\n: : :\n---\n", **as_json(ROWS)}},
}

# Each has the configurations ja, of three splits, and en, of one.
CHOICE = """---
configs:
- config_name: ja
  data_files:
  - {split: train, path: ja/train.jsonl}
  - {split: test, path: ja/test.jsonl}
  - {split: hard, path: ja/hard.jsonl}
- config_name: en
  data_files: en/train.jsonl
---
"""
JA, EN, TESTED, HARD = ROWS[:8], EARLIER[:2], ROWS[8:10], [*ROWS[10:], EARLIER[2]]
JA_IDS, EN_IDS = [str(number) for number in range(101, 111)], ["201", "202"]
ALL_JA_IDS = [*JA_IDS, "111", "203"]
FILES = {"ja/train": JA, "ja/test": TESTED, "ja/hard": HARD, "en/train": EN}
LINES = {f"{place}.jsonl": as_jsonl(rows) for place, rows in FILES.items()}
TABLES = {f"{place}/0000.parquet": as_parquet(rows) for place, rows in FILES.items()}
REPOSITORIES |= {
    "koto/several": {"main": {"README.md": CHOICE.encode(), **LINES}},
    "koto/one-default": {
        "main": {
            "README.md": CHOICE.replace("name: en", "name: en\n  default: true").encode(),
            **LINES,
        }
    },
    "koto/several-scripted": {"main": {**CARD, "several-scripted.py": SCRIPT}, CONVERSION: TABLES},
    "koto/several-folders": {"main": {**CARD, "several-folders.py": SCRIPT, **LINES}},
}
SPEAKERS = ("counselor", "client")
REPOSITORIES["koto/turns"] = {
    "main": {
        **CARD,
        "train.parquet": as_parquet(
            [
                {
                    "dialogue_id": f"t{turn % 2}",
                    "speaker": SPEAKERS[turn // 2 % 2],
                    "text": f"{turn}",
                }
                for turn in range(8)
            ]
        ),
    }
}
SEVERAL = ["koto/several", "koto/several-scripted", "koto/several-folders"]
SAME_DATA = ["koto/parquet", "koto/lines", "koto/json", "koto/script", "koto/plain"]

# ── Reading them in another process ──────────────────────────────────────────────────────────

READER = """
import json, logging, sys
from dataclasses import asdict

hosts = set()


def watch(event, arguments):
    if event == "socket.getaddrinfo":
        hosts.add(str(arguments[0]))
    elif event == "socket.connect":
        hosts.add(str(arguments[1][0]))


sys.addaudithook(watch)
from openai_sft import read_dialogues

outcomes = []
for name, revision, config in json.loads(sys.argv[1]):
    log = []
    handler = logging.Handler()
    handler.emit = lambda record, log=log: log.append(record.getMessage())
    logging.getLogger("openai_sft").setLevel("INFO")
    logging.getLogger("openai_sft").handlers = [handler]
    try:
        timeout = float(sys.argv[2])
        found = read_dialogues(name, revision=revision, config=config, hub_timeout=timeout)
        outcomes.append({"dialogues": [asdict(dialogue) for dialogue in found], "error": ""})
    except Exception as error:
        outcomes.append({"dialogues": [], "error": f"{type(error).__name__}: {error}"})
    outcomes[-1]["log"] = log
print(json.dumps({"outcomes": outcomes, "hosts": sorted(hosts)}, default=repr))
"""


@dataclass(frozen=True)
class Outcome:
    """What came of one ``read_dialogues``: the dialogues, or the error's class and text; what
    was logged."""

    dialogues: list[dict[str, Any]]
    error: str
    log: list[str]

    @property
    def ids(self) -> list[str]:
        return sorted(dialogue["id"] for dialogue in self.dialogues)

    def ids_of(self, part: str | None) -> list[str]:
        return sorted(d["id"] for d in self.dialogues if d["part"] == part)


Wanted = tuple[str, str | None] | tuple[str, str | None, str | None]  # name, revision, config


@dataclass(frozen=True)
class Reading:
    """What one process read, the paths it asked of the Hub, the hosts it turned to."""

    outcomes: dict[tuple[str | None, ...], Outcome]
    requests: list[str]
    strays: list[str]
    hosts: list[str]

    def of(self, name: str, revision: str | None = None, config: str | None = None) -> Outcome:
        return self.outcomes[name, revision, config]

    def asked(self, name: str) -> list[str]:
        """The paths of ``name`` that were asked for, without what stands before the name."""
        return [path.partition(name)[2] for path in self.requests if f"{name}/" in path]


def read(
    hub: FakeHub,
    home: Path,
    *wanted: Wanted,
    hub_timeout: float = 30.0,
    **environment: str,
) -> Reading:
    """Read each of ``wanted``, in this order, in one process with its cache in ``home``."""
    seen, strayed = len(hub.requests), len(hub.strays)
    asked = [(*one, None)[:3] for one in wanted]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", READER, json.dumps(asked), str(hub_timeout)],
        env=hub.environment(home) | {"PYTHONPATH": str(PROJECT)} | environment,
        cwd=home,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    outcomes = (Outcome(**outcome) for outcome in result["outcomes"])
    return Reading(
        dict(zip(asked, outcomes, strict=True)),
        hub.requests[seen:],
        hub.strays[strayed:],
        result["hosts"],
    )


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with FakeHub(REPOSITORIES) as running:
        yield running


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes that share a cache have it."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def unpinned(hub: FakeHub, kept: Path) -> Reading:
    """Every data set read once as it is, by one process."""
    return read(hub, kept, *[(name, None) for name in [*REPOSITORIES, "koto/unknown"]])


@pytest.fixture(scope="module")
def again(hub: FakeHub, kept: Path, unpinned: Reading) -> Reading:
    """Data sets that are kept from ``unpinned``, and a revision of one of them that isn't."""
    return read(hub, kept, *[(name, None) for name in SAME_DATA], ("koto/script", "v1"))


@pytest.fixture(scope="module")
def configured(hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Reading:
    """Data sets of several configurations, read by the name of one and by a wrong one."""
    wanted = [(name, None, config) for name in SEVERAL for config in ("ja", "en", "fr")]
    home = tmp_path_factory.mktemp("configured")
    return read(hub, home, *wanted, ("koto/one-default", None), ("koto/parquet", None, "fr"))


@pytest.fixture(scope="module")
def pinned(hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Reading:
    """Revisions of data sets of which nothing was ever read before."""
    return read(
        hub,
        tmp_path_factory.mktemp("pinned"),
        ("koto/pinned", "v1"),
        ("koto/pinned", "v2"),
        ("koto/pinned", hub.commit("koto/pinned", "v1")),
        ("koto/parquet", hub.commit("koto/parquet")),
        ("koto/json", "v9"),
        ("koto/bare-script", "main"),
    )


# ── One way after the other ──────────────────────────────────────────────────────────────────


def test_a_parquet_repository_loads_at_first(unpinned: Reading) -> None:
    asked = unpinned.asked("koto/parquet")

    assert unpinned.of("koto/parquet").ids == ALL_IDS
    assert not any(CONVERSION in path for path in asked)


def test_json_files_of_a_mixed_schema_are_had_from_the_hubs_conversion(
    hub: FakeHub, unpinned: Reading
) -> None:
    commit = hub.commit("koto/json", CONVERSION)
    asked = unpinned.asked("koto/json")

    assert unpinned.of("koto/json").ids == ALL_IDS
    assert f"/resolve/{commit}/default/train/0000.parquet" in asked
    assert "/revision/main" not in asked  # what a snapshot begins with


def test_a_repository_with_a_loader_script_is_had_from_the_hubs_conversion(
    hub: FakeHub, unpinned: Reading
) -> None:
    commit = hub.commit("koto/script", CONVERSION)
    asked = unpinned.asked("koto/script")

    assert unpinned.of("koto/script").ids == ALL_IDS
    assert f"/resolve/{commit}/default/train/0000.parquet" in asked
    assert not any(path.endswith(".json") and "kokorochat" in path for path in asked)


@pytest.mark.parametrize("name", ["koto/plain", "koto/bad-conversion"])
def test_without_a_usable_conversion_the_json_files_are_read_in_whatever_folder_they_are(
    name: str, unpinned: Reading
) -> None:
    assert unpinned.of(name).ids == ALL_IDS
    assert f"/revision/{CONVERSION}" in unpinned.asked(name)


def test_a_data_card_that_cannot_be_parsed_does_not_stand_in_the_way(unpinned: Reading) -> None:
    assert unpinned.of("koto/bad-card").ids == ALL_IDS


@pytest.mark.parametrize("name", SAME_DATA)
def test_the_dialogues_are_the_same_whichever_way_they_came(name: str, unpinned: Reading) -> None:
    records = [parse_dialogue(row, fallback_id="", source="") for row in ROWS]
    expected = {record.id: json.loads(json.dumps(asdict(record))) for record in records}
    found = {dialogue["id"]: dialogue | {"source": ""} for dialogue in unpinned.of(name).dialogues}

    assert found == expected


def test_what_was_read_once_is_read_again_with_the_hub_and_without(
    hub: FakeHub, kept: Path, again: Reading
) -> None:
    wanted = [(name, None) for name in SAME_DATA]
    offline = read(hub, kept, *wanted, HF_HUB_OFFLINE="1")

    assert [again.of(*one).ids for one in wanted] == [ALL_IDS] * len(wanted)
    assert [offline.of(*one).ids for one in wanted] == [ALL_IDS] * len(wanted)
    assert offline.requests == offline.strays == []


@pytest.mark.usefixtures("unpinned")
def test_what_has_changed_on_the_hub_since_is_read_anew(kept: Path, tmp_path: Path) -> None:
    changed: dict[str, dict[str, Files]] = {
        "koto/script": {"main": {"script.py": SCRIPT}, CONVERSION: as_converted(EARLIER)},
        "koto/plain": {"main": as_json(EARLIER)},
    }
    wanted = [(name, None) for name in changed]
    home = shutil.copytree(kept, tmp_path / "home", symlinks=True)
    with FakeHub(changed) as later:
        reading = read(later, home, *wanted)

    assert [reading.of(*one).ids for one in wanted] == [EARLIER_IDS, EARLIER_IDS]


# ── A revision that is given ─────────────────────────────────────────────────────────────────


def test_a_pinned_revision_is_the_one_that_is_read(hub: FakeHub, pinned: Reading) -> None:
    commit = hub.commit("koto/pinned", "v1")

    assert pinned.of("koto/pinned", "v1").ids == EARLIER_IDS
    assert pinned.of("koto/pinned", "v2").ids == EARLIER_IDS
    assert pinned.of("koto/pinned", commit).ids == EARLIER_IDS
    assert pinned.of("koto/parquet", hub.commit("koto/parquet")).ids == ALL_IDS


def test_a_pinned_revision_is_never_had_from_the_conversion_which_follows_main(
    pinned: Reading,
) -> None:
    assert not any("refs/convert" in path for path in pinned.requests)


def test_a_pinned_revision_is_not_answered_from_what_was_kept_of_another(again: Reading) -> None:
    # ``datasets`` falls back to the newest build of that name where it can't load a revision.
    assert again.of("koto/script").ids == ALL_IDS
    assert again.of("koto/script", "v1").ids == EARLIER_IDS


def test_a_revision_that_is_not_there_is_named(pinned: Reading) -> None:
    error = pinned.of("koto/json", "v9").error

    assert error.startswith("DataError: ")
    assert "koto/json" in error
    assert "v9" in error


def test_rows_that_are_single_turns_are_put_together_to_dialogues(unpinned: Reading) -> None:
    outcome = unpinned.of("koto/turns")

    assert outcome.ids == ["t0", "t1"]
    assert outcome.dialogues[1]["texts"].split(TURN_BREAK) == ["1", "3", "5", "7"]


# ── Configurations and splits ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["koto/several", "koto/several-scripted"])
def test_a_data_set_of_several_configurations_stops_with_their_names(
    name: str, unpinned: Reading
) -> None:
    error = unpinned.of(name).error

    assert error.startswith(f"DataError: データセット {name} には構成が複数あります")
    assert "--config" in error
    assert "ja" in error.rpartition("ある構成: ")[2]
    assert "en" in error.rpartition("ある構成: ")[2]


@pytest.mark.parametrize("name", SEVERAL)
def test_a_configuration_is_read_alone_whichever_way_it_comes(
    name: str, configured: Reading
) -> None:
    assert configured.of(name, None, "en").ids == EN_IDS
    assert set(configured.of(name, None, "ja").ids) >= set(JA_IDS)
    assert set(configured.of(name, None, "ja").ids) <= set(ALL_JA_IDS)


@pytest.mark.parametrize("name", SEVERAL)
def test_a_configuration_once_read_is_read_again_without_the_hub(
    hub: FakeHub, name: str, kept: Path
) -> None:
    online, offline = (
        read(hub, kept, (name, None, "en"), **environment)
        for environment in ({}, {"HF_HUB_OFFLINE": "1"})
    )

    assert online.of(name, None, "en").ids == EN_IDS
    assert offline.of(name, None, "en").ids == EN_IDS
    assert offline.requests == []


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("koto/several", ["ja", "en"]),
        ("koto/several-scripted", ["ja", "en"]),
        ("koto/several-folders", ["fr"]),  # nothing tells which there are
        ("koto/parquet", ["default"]),
    ],
)
def test_a_wrong_configuration_is_told_those_there_are(
    name: str, names: list[str], configured: Reading
) -> None:
    outcome = configured.of(name, None, "fr")

    assert outcome.error.startswith("DataError: ")
    assert "構成「fr」" in outcome.error
    assert all(known in outcome.error for known in names)
    assert "試した方法" not in outcome.error or name == "koto/several-folders"


def test_the_default_of_several_configurations_is_read_and_named(configured: Reading) -> None:
    outcome = configured.of("koto/one-default")

    assert outcome.ids == EN_IDS
    assert any("構成「en」" in line and "--config" in line for line in outcome.log)


@pytest.mark.parametrize("name", SEVERAL)
def test_published_splits_are_kept_and_others_are_left_out_by_name(
    name: str, configured: Reading
) -> None:
    outcome = configured.of(name, None, "ja")
    (line,) = [line for line in outcome.log if "使いません" in line]

    assert outcome.ids_of("train") == [str(number) for number in range(101, 109)]
    assert outcome.ids_of("test") == ["109", "110"]
    assert outcome.ids == JA_IDS
    assert "hard" in line
    assert "（2件）" in line
    assert "--resplit" in line


def test_a_data_set_of_one_split_has_no_published_ones(configured: Reading) -> None:
    outcome = configured.of("koto/several", None, "en")

    assert outcome.ids_of(None) == EN_IDS
    assert not any("使いません" in line for line in outcome.log)


def test_the_command_line_ends_with_2_where_a_configuration_is_to_be_chosen(
    hub: FakeHub, kept: Path
) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(PROJECT / "openai_sft_example.py"), "--data-only", *arguments],
            env=hub.environment(kept) | {"PYTHONPATH": str(PROJECT)},
            cwd=kept,
            capture_output=True,
            encoding="utf-8",
            timeout=60,
            check=False,
        )

    unnamed = run("--dataset", "koto/several")
    local = run("--dataset", ".", "--config", "ja")

    assert (unnamed.returncode, local.returncode) == (2, 2)
    assert "エラー: データセット koto/several には構成が複数あります" in unnamed.stderr
    assert "エラー: config はHugging Face Hubのデータにだけ" in local.stderr


# ── When nothing helps ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "reasons"),
    [
        ("koto/bare-script", ["Dataset scripts are no longer supported", CONVERSION, "JSON"]),
        ("koto/notes", ["Couldn't cast array of type string to null", CONVERSION, "対話のJSON"]),
        ("koto/empty", ["doesn't contain any data files", CONVERSION, "JSON"]),
        ("koto/unknown", ["doesn't exist on the Hub", CONVERSION, "Repository Not Found"]),
    ],
)
def test_the_error_names_every_attempt_and_why_it_failed(
    name: str, reasons: list[str], unpinned: Reading
) -> None:
    error = unpinned.of(name).error

    assert error.startswith("DataError: ")
    assert name in error
    assert "load_dataset" in error
    assert [reason for reason in reasons if reason not in error] == []


def test_a_pinned_revision_that_cannot_be_had_names_the_attempts_that_were_made(
    pinned: Reading,
) -> None:
    error = pinned.of("koto/bare-script", "main").error

    assert error.startswith("DataError: ")
    assert "Dataset scripts are no longer supported" in error
    assert "JSON" in error


def test_a_hub_that_may_not_be_asked_is_an_error_and_no_wait(hub: FakeHub, tmp_path: Path) -> None:
    reading = read(hub, tmp_path, ("koto/parquet", None), HF_HUB_OFFLINE="1")
    error = reading.of("koto/parquet").error

    assert error.startswith("DataError: ")
    assert "koto/parquet" in error
    assert reading.requests == reading.strays == reading.hosts == []


@pytest.fixture
def silent() -> Iterator[str]:
    """The URL of a Hub that takes every connection and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_a_hub_that_says_nothing_ends_it_in_time_with_cause_and_remedy(
    hub: FakeHub, tmp_path: Path, silent: str
) -> None:
    wanted = [("koto/parquet", None), ("koto/pinned", "v1")]
    reading = read(hub, tmp_path, *wanted, hub_timeout=0.5, HF_ENDPOINT=silent)

    for name, revision in wanted:
        error = reading.of(name, revision).error
        assert error.startswith(f"DataError: Hugging Face Hub（{silent}）が0.5秒以内に応答せず")
        assert name in error
        assert "--dataset" in error
    assert reading.hosts == ["127.0.0.1"]


@pytest.mark.usefixtures("again")
def test_what_was_read_once_is_read_again_where_the_hub_says_nothing(
    hub: FakeHub, kept: Path, tmp_path: Path, silent: str
) -> None:
    wanted = [(name, None) for name in SAME_DATA]
    home = shutil.copytree(kept, tmp_path / "home", symlinks=True)
    reading = read(hub, home, *wanted, hub_timeout=0.5, HF_ENDPOINT=silent)

    assert [reading.of(*one).ids for one in wanted] == [ALL_IDS] * len(wanted)


# ── The Hub itself ───────────────────────────────────────────────────────────────────────────


def test_nothing_but_the_loopback_hub_is_asked(unpinned: Reading, pinned: Reading) -> None:
    viewers = [url for url in unpinned.strays if url.startswith("http://datasets-server.")]

    assert unpinned.hosts == pinned.hosts == ["127.0.0.1"]
    assert unpinned.strays == viewers
    assert pinned.strays == []


def test_the_hub_sends_a_file_whole_in_part_or_only_its_head(hub: FakeHub) -> None:
    url = f"{hub.url}/datasets/koto/notes/resolve/main/2.json"
    whole = NOTES["2.json"]

    def ask(**options: Any) -> tuple[int, bytes, Any]:
        with urllib.request.urlopen(urllib.request.Request(url, **options)) as answer:
            return answer.status, answer.read(), answer.headers

    for part, expected in (("2-5", whole[2:6]), ("4-", whole[4:]), ("-3", whole[-3:])):
        assert ask(headers={"Range": f"bytes={part}"})[:2] == (206, expected)
    status, body, headers = ask(method="HEAD")
    assert ask()[:2] == (200, whole)
    assert (status, body, headers["Content-Length"]) == (200, b"", str(len(whole)))
    assert headers["X-Repo-Commit"] == hub.commit("koto/notes")


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/api/datasets/koto/unknown", "RepoNotFound"),
        ("/api/datasets/koto/notes/revision/v9", "RevisionNotFound"),
        ("/api/datasets/koto/notes/tree/main/none", "EntryNotFound"),
        ("/datasets/koto/notes/resolve/main/none.json", "EntryNotFound"),
    ],
)
def test_the_hub_says_what_it_does_not_have(path: str, code: str, hub: FakeHub) -> None:
    with pytest.raises(urllib.error.HTTPError) as failure:
        urllib.request.urlopen(hub.url + path)
    failure.value.close()

    assert (failure.value.code, failure.value.headers["X-Error-Code"]) == (404, code)
