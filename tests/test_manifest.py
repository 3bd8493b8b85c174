"""The manifest beside the files: a split that can be shown, rebuilt, and kept to."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from endpoint import Rehearsal
from helpers import posts, read_json, record, records, write_jsonl

import openai_sft_example
from openai_sft import (
    ConfigurationError,
    DataError,
    Example,
    OpenAISFT,
    Selection,
    TokenCounter,
    choose_cases,
    example_line,
    read_dialogues,
    select_dialogues,
    split_dialogues,
    split_long_example,
    to_example,
)

MakeSFT = Callable[..., OpenAISFT]
Log = Callable[[], list[str]]

NAMES = ("train", "test", "valid")
MODEL = "gpt-4.1-2025-04-14"
CHAT = "/chat/completions"
CHOICE: dict[str, Any] = {
    "max_samples": 20,
    "seed": 5,
    "min_score": 50,
    "topics": ["仕事"],
    "exclude_flagged": True,
    "group_by": "client",
}
PROMPT = "傾聴してください。"


@dataclass
class Tuned:
    """A folder with the record of a model that was tuned on a part of ``dataset``."""

    folder: Path
    dataset: str
    manifest: Any

    def ids(self, name: str) -> list[str]:
        return [line["id"] for line in self.manifest["splits"][name]["lines"]]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """Made by the data stages; that a job followed is put into the record by hand."""
    folder = tmp_path_factory.mktemp("tuned")
    rows = [
        {
            **record(n),
            "topic": "仕事" if n % 5 else "家族",
            "review_by_client_en": {"score": 40 + n, "client_id": n // 2, "counselor_id": n % 3},
        }
        for n in range(60)
    ]
    path = write_jsonl(folder / "dialogues.jsonl", [*rows, {**rows[30], "id": "again"}])
    options = {"dataset": str(path), "output_dir": folder / "out", "verbose": False}
    with OpenAISFT(offline=True, system_prompt=PROMPT, **options) as sft:
        files = sft.prepare_data(**CHOICE).files
    outcome = {"fine_tuned_model": MODEL, "job_id": "ftjob-1", "job_status": "succeeded"}
    kept = {**read_json(files["record"]), **outcome}
    Path(files["record"]).write_text(json.dumps(kept), "utf-8")
    return Tuned(folder / "out", str(path), read_json(files["manifest"]))


@pytest.fixture
def tuned(kept: Tuned, tmp_path: Path) -> Tuned:
    """A copy of its own for each test, whose paths in the record are still those of the first."""
    folder = tmp_path / "out"
    shutil.copytree(kept.folder, folder)
    return Tuned(folder, kept.dataset, kept.manifest)


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def asked_ids(results: dict[str, Any], name: str) -> set[str]:
    return {r["case_id"].rpartition(":")[0] for r in results[f"{name}_evaluation"]["responses"]}


# ── What it holds ────────────────────────────────────────────────────────────────────────────


def test_the_files_can_be_made_again_from_the_manifest_alone(kept: Tuned) -> None:
    manifest = kept.manifest
    known = {d.source: d for d in read_dialogues(manifest["dataset"])}
    for name in NAMES:
        part = manifest["splits"][name]
        made = [
            to_example(known[line["source"]], system_prompt=manifest["system_prompt"])
            for line in part["lines"]
        ]
        text = "".join(example_line(example) + "\n" for example in made if example)

        assert [known[line["source"]].id for line in part["lines"]] == kept.ids(name)
        assert text.encode() == (kept.folder / part["file"]).read_bytes()
        assert hashlib.sha256(text.encode()).hexdigest() == part["sha256"]
        assert part["examples"] == len(part["lines"]) == len(made)


def test_the_manifest_tells_with_whom_each_dialogue_was_drawn(kept: Tuned) -> None:
    known = {d.source: d for d in read_dialogues(kept.dataset)}
    groups: dict[str, set[str]] = {}
    for name in NAMES:
        lines = kept.manifest["splits"][name]["lines"]
        groups[name] = {line["group"] for line in lines}

        assert [line["group"] for line in lines] == [
            f"client={known[line['source']].review_en['client_id']}" for line in lines
        ]
    assert sum(map(len, groups.values())) == len(set.union(*groups.values()))


@pytest.mark.parametrize("group_by", ["pair", None])
def test_the_cases_of_the_steps_know_with_whom_their_dialogue_was_drawn(
    make_sft: MakeSFT, kept: Tuned, group_by: Any
) -> None:
    sft = make_sft(dataset=kept.dataset)
    parts = sft.load_and_split_dataset(group_by=group_by)
    test, valid = (sft.prepare_dataset(part, "part") for part in parts[1:])
    sft.evaluate_model_comprehensive(MODEL, test, valid, 0)
    cases = read_json(sft.files["asked"])["cases"]
    people = {d.id: d.review_en for d in read_dialogues(kept.dataset)}

    for case in (*cases["test"], *cases["valid"]):
        who = people[case["dialogue_id"]]
        pair = f"pair={who['client_id']}/{who['counselor_id']}"
        assert case["group"] == (pair if group_by else case["dialogue_id"])


def test_the_parts_of_one_long_dialogue_are_one_group() -> None:
    example: Example = {
        "id": "d",
        "messages": [
            {"role": role, "content": "話" * 50} for _ in range(6) for role in ("user", "assistant")
        ],
    }
    parts = split_long_example(example, TokenCounter(None), 300)
    grouped = split_long_example({**example, "group": "client=1"}, TokenCounter(None), 300)

    assert len(parts) > 1
    assert {case.group for case in choose_cases(parts, max_cases=0)} == {"d"}
    assert {case.group for case in choose_cases(grouped, max_cases=0)} == {"client=1"}
    assert "group" not in example_line(grouped[0])


def test_the_split_can_be_drawn_again_from_the_recorded_choice(kept: Tuned) -> None:
    selection = Selection(**kept.manifest["selection"])
    dialogues, removed = select_dialogues(read_dialogues(kept.manifest["dataset"]), selection)
    splits = split_dialogues(
        dialogues,
        seed=selection.seed,
        max_samples=selection.max_samples,
        group_by=selection.group_by,
    )

    assert [[d.id for d in part] for part in splits] == [kept.ids(name) for name in NAMES]
    assert kept.manifest["removed"] == removed
    assert kept.manifest["selection"] == CHOICE | {"max_score": None}


def test_the_manifest_names_file_and_line_of_each_dialogue_and_the_record_the_same_hashes(
    kept: Tuned,
) -> None:
    record = read_json(only(kept.folder, "run_*.json"))
    lines = [line for name in NAMES for line in kept.manifest["splits"][name]["lines"]]
    rows = Path(kept.dataset).read_text("utf-8").split("\n")
    for line in lines:
        path, _, number = line["source"].rpartition(":")

        assert path == kept.dataset
        assert json.loads(rows[int(number) - 1])["id"] == line["id"]
    for name in NAMES:
        assert record["data"][name]["sha256"] == kept.manifest["splits"][name]["sha256"]
    assert record["selection"] == kept.manifest["selection"]


def test_the_manifest_tells_what_leaks_where_nothing_was_grouped(
    clean_environment: Path,
) -> None:
    rows = [{**row, "review_by_client_en": {"client_id": 1}} for row in records(20)]
    path = write_jsonl(clean_environment / "a.jsonl", rows)
    summary = OpenAISFT(offline=True, dataset=str(path), verbose=False).prepare_data()

    assert read_json(summary.files["manifest"])["leakage"] == summary.leakage == {"client": 1.0}


def test_the_steps_one_by_one_write_the_same_manifest(dataset: Path) -> None:
    def manifest(folder: str) -> Any:
        found = read_json(only(Path(folder), "manifest_*.json"))
        for part in found["splits"].values():
            del part["file"]
        return found

    options: dict[str, Any] = {"offline": True, "dataset": str(dataset), "verbose": False}
    steps = OpenAISFT(output_dir="steps", **options)
    parts = zip(NAMES, steps.load_and_split_dataset(15, seed=7), strict=True)
    steps.save_all_datasets(*(steps.prepare_dataset(part, name) for name, part in parts))
    OpenAISFT(output_dir="whole", **options).prepare_data(max_samples=15, seed=7)

    assert manifest("steps") == manifest("whole")


def test_the_manifest_names_the_choice_of_the_data_that_are_saved_whatever_was_loaded_since(
    dataset: Path,
) -> None:
    sft = OpenAISFT(output_dir="out", offline=True, dataset=str(dataset), verbose=False)
    loads = {seed: sft.load_and_split_dataset(seed=seed) for seed in (1, 2, 3)}
    for seed in (2, 1, 3):
        saved = sft.save_all_datasets(*map(sft.prepare_dataset, loads[seed]))
        manifest = read_json(sft.files["manifest"])
        ids = [[line["id"] for line in manifest["splits"][name]["lines"]] for name in NAMES]

        assert manifest["selection"]["seed"] == seed
        assert read_json(sft.files["record"])["selection"]["seed"] == seed
        assert ids == [list(part["id"]) for part in loads[seed]]
        assert all(line["source"] for name in NAMES for line in manifest["splits"][name]["lines"])
        assert saved.keys() == set(NAMES)


def test_the_manifest_names_no_choice_where_data_of_two_are_mixed(dataset: Path) -> None:
    sft = OpenAISFT(output_dir="out", offline=True, dataset=str(dataset), verbose=False)
    first, second = (sft.load_and_split_dataset(seed=seed) for seed in (1, 2))
    sft.save_all_datasets(*map(sft.prepare_dataset, (first[0], second[1], second[2])))

    assert read_json(sft.files["manifest"])["selection"] is None


# ── Kept to by an evaluation ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("model_id", [None, MODEL], ids=["newest", "named"])
def test_an_evaluation_asks_the_split_the_model_was_tuned_with(
    make_sft: MakeSFT, endpoint: Rehearsal, tuned: Tuned, log: Log, model_id: str | None
) -> None:
    """The data set itself isn't needed any more."""
    sft = make_sft(output_dir=tuned.folder, dataset=None)
    results = sft.run_evaluation(model_id, max_test_cases=0)

    assert results["model_id"] == MODEL
    assert asked_ids(results, "test") == set(tuned.ids("test"))
    assert asked_ids(results, "valid") == set(tuned.ids("valid"))
    assert all(
        e.request["messages"][0] == {"role": "system", "content": PROMPT}
        for e in posts(endpoint, CHAT)
    )
    assert any("記録した分割を使います" in line for line in log())
    assert not any("否定できません" in line for line in log())


def test_a_checkpoint_is_asked_the_split_of_its_own_run(make_sft: MakeSFT, log: Log) -> None:
    with make_sft() as sft:
        first = sft.run_full_pipeline(2, 4, max_samples=15, seed=3, max_test_cases=1)
        checkpoint = read_json(sft.files["record"])["checkpoints"][-1]["model"]
    again = make_sft().run_evaluation(checkpoint, max_test_cases=1)

    assert checkpoint != first["model_id"] == again["model_id"].partition(":ckpt")[0]
    assert asked_ids(again, "test") == asked_ids(first, "test")
    assert not any("否定できません" in line for line in log())


def test_a_run_from_end_to_end_is_evaluated_again_on_the_same_cases(
    make_sft: MakeSFT, dataset: Path
) -> None:
    first = make_sft().run_full_pipeline(1, 4, max_samples=15, seed=3, max_test_cases=1)
    dataset.unlink()
    again = make_sft(dataset=None).run_evaluation(max_test_cases=1)

    def cases(results: dict[str, Any]) -> list[Any]:
        return [
            (r["case_id"], r["input"], r["reference"])
            for name in ("test", "valid")
            for r in results[f"{name}_evaluation"]["responses"]
        ]

    assert again["model_id"] == first["model_id"]
    assert cases(again) == cases(first)


def test_the_options_the_model_was_tuned_with_may_be_given_again(
    make_sft: MakeSFT, tuned: Tuned
) -> None:
    choice = {**CHOICE, "topics": tuple(CHOICE["topics"])}
    sft = make_sft(output_dir=tuned.folder, dataset=tuned.dataset, system_prompt=PROMPT)
    results = sft.run_evaluation(**choice, max_test_cases=0)

    assert asked_ids(results, "test") == set(tuned.ids("test"))


@pytest.mark.parametrize(
    "options",
    [
        {"max_samples": 21},
        {"seed": 42},
        {"seed": 0},
        {"min_score": 51},
        {"min_score": 0},
        {"max_score": 100},
        {"max_score": 0},
        {"topics": ["家族"]},
        {"group_by": "pair"},
    ],
    ids=str,
)
def test_an_option_that_would_change_the_split_is_refused_by_name(
    make_sft: MakeSFT, endpoint: Rehearsal, tuned: Tuned, options: dict[str, Any]
) -> None:
    (name,) = options
    with pytest.raises(ConfigurationError, match=name) as caught:
        make_sft(output_dir=tuned.folder, dataset=None).run_evaluation(**options)

    assert "run_" in str(caught.value)
    assert posts(endpoint) == []


@pytest.mark.parametrize(
    "settings",
    [
        {"dataset": "other.jsonl"},
        {"system_prompt": "別の指示"},
        {"revision": "v2"},
        {"config": "ja"},
        {"resplit": True},
    ],
)
def test_other_data_or_another_prompt_would_change_the_split_too(
    make_sft: MakeSFT, endpoint: Rehearsal, tuned: Tuned, settings: dict[str, Any]
) -> None:
    (name,) = settings
    with pytest.raises(ConfigurationError, match=name):
        make_sft(output_dir=tuned.folder, **({"dataset": None} | settings)).run_evaluation()

    assert posts(endpoint) == []


def test_a_conflict_ends_the_command_line_with_2_before_anything_is_asked(
    tuned: Tuned,
    endpoint: Rehearsal,
    clean_environment: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    usual = ["--evaluate-only", "--yes", "--base-url", endpoint.url]
    usual += ["--output-dir", str(tuned.folder)]
    fine = openai_sft_example.main([*usual, "--quiet", "--seed", "5", "--max-test-cases", "1"])
    capsys.readouterr()
    asked = len(posts(endpoint))
    codes = [
        openai_sft_example.main([*usual, "--quiet", *more])
        for more in (["--seed", "0"], ["--group-by", "pair"], ["--min-score", "0"])
    ]
    errors = capsys.readouterr().err.splitlines()

    assert (fine, codes) == (0, [2, 2, 2])
    assert asked == len(posts(endpoint)) > 0
    assert [line.startswith("エラー: このモデルは") for line in errors] == [True] * 3


# ── Kept safe ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", ["changed", "gone"])
def test_a_file_that_is_not_as_it_was_stops_the_evaluation(
    make_sft: MakeSFT, endpoint: Rehearsal, tuned: Tuned, name: str, change: str
) -> None:
    path = only(tuned.folder, f"{name}_data_*.jsonl")
    if change == "changed":
        path.write_bytes(path.read_bytes() + b"\n")
    else:
        path.unlink()
    with pytest.raises(DataError, match=path.name):
        make_sft(output_dir=tuned.folder, dataset=None).run_evaluation()

    assert posts(endpoint) == []


@pytest.mark.parametrize("change", ["gone", "broken", "shorter", "empty"])
def test_a_manifest_that_is_not_as_it_was_stops_the_evaluation(
    make_sft: MakeSFT, endpoint: Rehearsal, tuned: Tuned, change: str
) -> None:
    path = only(tuned.folder, "manifest_*.json")
    manifest = read_json(path)
    manifest["splits"]["test"]["lines"].pop()
    texts = {"broken": "{", "shorter": json.dumps(manifest), "empty": "{}"}
    if change == "gone":
        path.unlink()
    else:
        path.write_text(texts[change], "utf-8")
    with pytest.raises(DataError, match=path.name):
        make_sft(output_dir=tuned.folder, dataset=None).run_evaluation()

    assert posts(endpoint) == []


def test_a_model_made_elsewhere_is_evaluated_with_a_warning_that_leakage_is_possible(
    make_sft: MakeSFT, tuned: Tuned, dataset: Path, log: Log
) -> None:
    sft = make_sft(output_dir=tuned.folder)
    results = sft.run_evaluation("gpt-4o-2024-08-06", max_samples=15, seed=3, max_test_cases=0)
    splits = split_dialogues(read_dialogues(str(dataset)), seed=3, max_samples=15)

    assert any("否定できません" in line and "gpt-4o-2024-08-06" in line for line in log())
    assert asked_ids(results, "test") == {dialogue.id for dialogue in splits.test}
    assert asked_ids(results, "valid") == {dialogue.id for dialogue in splits.valid}
