"""The score task: 20 feedback scores are learnt, predicted, measured and held against the mean."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import east_asian_width

import numpy as np
import openai
import pytest
from edges import Forward, Gateway, Reply, Request
from endpoint import Fault, Rehearsal
from faults import Clock
from helpers import (
    KOKOROCHAT,
    Ended,
    Script,
    awkward_text,
    examples,
    posts,
    read_json,
    record,
    training_file,
    turns,
    write_jsonl,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

import openai_sft_example
from openai_sft import (
    SCORE_ITEMS,
    Answer,
    ConfigurationError,
    DataError,
    EvaluationFailed,
    EvaluationResults,
    OpenAISFT,
    Splits,
    TokenCounter,
    check_file,
    choose_cases,
    compare_answers,
    constant_scores,
    example_line,
    load_vocabulary,
    make_score_figures,
    parse_dialogue,
    parse_scores,
    read_examples,
    score_predictions,
    to_score_example,
)
from openai_sft_rehearsal import example_dialogues

MakeSFT = Callable[..., OpenAISFT]
Log = Callable[[], list[str]]

MODEL = "gpt-4o-mini-2024-07-18"
JOBS = "/fine_tuning/jobs"
CHAT = "/chat/completions"
ITEMS = tuple(SCORE_ITEMS)
FIRST, SECOND = ITEMS[:2]
MEASURES = {"mse", "rmse", "mae", "accuracy", "accuracy_within_1", "spearman", "pearson"}
SHORT: dict[str, Any] = {"epochs": 1, "batch_size": 4, "max_test_cases": 0}

score_lists = st.lists(st.integers(0, 5), min_size=20, max_size=20)


def scores_of(*points: int, others: int = 3) -> dict[str, int]:
    """Scores of the first items as given; every other item has ``others``."""
    return {item: points[n] if n < len(points) else others for n, item in enumerate(ITEMS)}


def rated(number: int, *points: int, others: int = 3) -> dict[str, Any]:
    """A dialogue with a review in Japanese, as KokoroChat has it."""
    scores = scores_of(*points, others=others)
    review = {"評価ID": number, "点数": sum(scores.values()), **scores, "離脱": None}
    return {**record(number), "review_by_client_jp": review}


def in_english(row: dict[str, Any]) -> dict[str, Any]:
    """The same dialogue with its review in English alone."""
    review = {english: row["review_by_client_jp"][item] for item, english in SCORE_ITEMS.items()}
    kept = {key: value for key, value in row.items() if key != "review_by_client_jp"}
    return {**kept, "review_by_client_en": review}


def varied(count: int) -> list[dict[str, Any]]:
    return [rated(n, *((n * k) % 6 for k in range(1, 21))) for n in range(1, count + 1)]


def rated_examples(count: int, *points: int, others: int = 3) -> list[dict[str, Any]]:
    made = [
        to_score_example(converted(rated(n, *points, others=others))) for n in range(1, count + 1)
    ]
    return [dict(one) for one in made if one is not None]


def converted(row: dict[str, Any]) -> Any:
    return parse_dialogue(row, fallback_id="x", source="x")


def written(scores: Any) -> str:
    return json.dumps(scores, ensure_ascii=False)


def answer(name: str, predicted: dict[str, Any], real: dict[str, int], turn: int = 2) -> Answer:
    return Answer(f"{name}:{turn}", name, written(predicted), written(real))


def answers(predicted: Sequence[int], real: Sequence[int]) -> list[Answer]:
    """A dialogue a pair, which stands in the first item; the other items are met exactly."""
    pairs = enumerate(zip(predicted, real, strict=True))
    return [answer(f"d{n}", scores_of(x), scores_of(y)) for n, (x, y) in pairs]


def measured(predicted: Sequence[float], real: Sequence[float]) -> dict[str, float]:
    """The measures of a sample of one value a dialogue."""
    pairs = enumerate(zip(predicted, real, strict=True))
    given = [
        answer(f"d{n}", {**scores_of(), FIRST: x}, {**scores_of(), FIRST: y}) for n, (x, y) in pairs
    ]
    found = score_predictions(given)[0][FIRST]
    return {name: math.nan if f["score"] is None else f["score"] for name, f in found.items()}


def completion(content: str) -> dict[str, Any]:
    """An answer as the API gives it."""
    message = {"role": "assistant", "content": content, "refusal": None}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": MODEL,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12},
    }


def strict_json(path: str | Path) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(Path(path).read_text("utf-8"), parse_constant=refuse)


@pytest.fixture
def evaluate(make_sft: MakeSFT) -> Callable[..., EvaluationResults]:
    """Evaluates by an endpoint that gives these answers one after the other."""

    def run(said: Sequence[str], data: Sequence[Any], **options: Any) -> EvaluationResults:
        with Script(**{CHAT: [completion(text) for text in said]}) as script:
            sft = make_sft(task="score", base_url=script.url)
            results = sft.evaluate_model_comprehensive(
                MODEL, data, [], 0, concurrency=1, **({"train_data": data} | options)
            )
            assert strict_json(sft.save_results(results)) == results
        return results

    return run


class Finished(NamedTuple):
    """A run of the score task at an endpoint that is still there."""

    endpoint: Rehearsal
    folder: Path
    results: EvaluationResults
    files: dict[str, str]
    exchanges: list[Any]

    def copy(self, folder: Path) -> Path:
        return Path(shutil.copytree(self.folder, folder / "copied"))


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, sdk: openai.OpenAI, vocabulary: Path
) -> Iterator[Finished]:
    folder = tmp_path_factory.mktemp("score")
    dialogues = write_jsonl(folder / "dialogues.jsonl", [*varied(20), record(21)])
    with Rehearsal() as endpoint:
        clock = Clock(endpoint, moment=0.05)
        with OpenAISFT(
            task="score",
            model=MODEL,
            client=sdk.with_options(base_url=endpoint.url),
            base_url=endpoint.url,
            dialect="openai",
            dataset=str(dialogues),
            output_dir=folder / "out",
            verbose=False,
            clock=clock,
            sleep=clock.sleep,
        ) as sft:
            results = sft.run_full_pipeline(**SHORT)
            files = sft.files
        yield Finished(endpoint, folder / "out", results, files, list(endpoint.exchanges))


# ── The example ──────────────────────────────────────────────────────────────────────────────


def test_the_items_are_those_of_the_review_in_its_order() -> None:
    review = example_dialogues()[0]["review_by_client_en"]
    assert isinstance(review, dict)

    assert [key for key in review if key in SCORE_ITEMS.values()] == list(SCORE_ITEMS.values())
    assert len(ITEMS) == 20


@pytest.mark.skipif(not KOKOROCHAT.is_dir(), reason="KokoroChat isn't beside the project")
def test_a_dialogue_of_the_real_data_becomes_its_scores_in_the_order_of_the_review() -> None:
    for path in sorted(KOKOROCHAT.glob("*.json"))[:20]:
        row = read_json(path)
        review = row["review_by_client_jp"]
        example = to_score_example(converted(row))

        assert example is not None
        target = json.loads(example["messages"][-1]["content"])
        assert list(target.items()) == [item for item in review.items() if item[0] in SCORE_ITEMS]
        assert sum(target.values()) == review["点数"]


def test_an_example_is_the_task_the_marked_dialogue_and_the_scores() -> None:
    row = rated(1, 0, 5, 1)
    example = to_score_example(converted(row))

    assert example is not None
    assert example["id"] == "d1"
    system, user, assistant = example["messages"]
    assert [system["role"], user["role"], assistant["role"]] == ["system", "user", "assistant"]
    assert all(item in system["content"] for item in ITEMS)
    positions = [system["content"].index(f"- {item}") for item in ITEMS]
    assert positions == sorted(positions)
    assert "0" in system["content"]
    assert "5" in system["content"]
    assert "JSON" in system["content"]
    assert user["content"].startswith("クライアント: 相談1です。眠れません。\nカウンセラー: 眠れ")
    assert user["content"].endswith("\nカウンセラー: どうぞお大事に。")
    assert user["content"].count("カウンセラー: ") == 4
    assert "client" not in user["content"]
    assert "counselor" not in user["content"]
    assert list(json.loads(assistant["content"]).items()) == list(scores_of(0, 5, 1).items())
    assert "\\u" not in assistant["content"]


def test_what_the_client_says_last_is_kept_for_it_bears_on_the_score() -> None:
    row = rated(1) | {"dialogue": record(1, ("counselor", "はい"), ("client", "最悪"))["dialogue"]}
    example = to_score_example(converted(row))

    assert example is not None
    assert example["messages"][1]["content"] == "カウンセラー: はい\nクライアント: 最悪"


@given(turns, score_lists)
def test_awkward_text_comes_back_whole_from_the_file(
    said: list[tuple[str, str]], points: list[int]
) -> None:
    row = rated(1, *points) | {"dialogue": record(1, *said)["dialogue"]}
    dialogue = converted(row)
    example = to_score_example(dialogue)
    if not any(text.strip() for _, text in said):
        assert example is None
        return

    assert example is not None
    line = example_line(example)
    assert len(line.splitlines()) == 1
    read = json.loads(line)["messages"]
    assert read == example["messages"]
    marks = {"counselor": "カウンセラー: ", "client": "クライアント: "}
    kept = [marks[role] + text for role, text in said if text.strip()]
    assert read[1]["content"] == "\n".join(kept)
    assert parse_scores(read[2]["content"]) == dict(zip(ITEMS, points, strict=True))


def test_the_english_review_serves_where_there_is_no_japanese_one() -> None:
    row = rated(1, 5, 0, 2)

    assert to_score_example(converted(in_english(row))) == to_score_example(converted(row))


def test_the_japanese_review_has_the_word_where_there_are_both() -> None:
    row = in_english(rated(1, others=1)) | {
        "review_by_client_jp": rated(1, others=4)["review_by_client_jp"]
    }
    example = to_score_example(converted(row))

    assert example is not None
    assert set(json.loads(example["messages"][2]["content"]).values()) == {4}


def test_reviews_in_either_language_survive_the_table_of_the_data_set(
    make_sft: MakeSFT, clean_environment: Path
) -> None:
    rows = [in_english(row) if n % 2 else row for n, row in enumerate(varied(24))]
    source = write_jsonl(clean_environment / "mixed.jsonl", rows)
    sft = make_sft(task="score", offline=True, dataset=str(source))
    parts = sft.load_and_split_dataset()
    made = [one for part in parts for one in sft.prepare_dataset(part)]

    assert {one["id"] for one in made} == {row["id"] for row in rows}


@pytest.mark.parametrize(
    "wrong", [None, -1, 6, 50, True, False, "3", "", 2.5, [3]], ids=lambda value: repr(value)
)
def test_a_dialogue_without_complete_scores_is_left_out_and_counted(
    make_sft: MakeSFT, log: Log, wrong: Any
) -> None:
    broken = rated(2)
    broken["review_by_client_jp"][ITEMS[11]] = wrong
    made = make_sft(task="score", offline=True).prepare_dataset([rated(1), broken, rated(3)])

    assert [one["id"] for one in made] == ["d1", "d3"]
    (line,) = [line for line in log() if "除きました" in line]
    assert "1件" in line
    assert "d2" in line
    assert "20項目" in line


def test_neither_a_missing_item_nor_a_missing_review_is_filled_in(
    make_sft: MakeSFT, log: Log
) -> None:
    broken = rated(2)
    del broken["review_by_client_jp"][ITEMS[0]]
    ready = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    silent = rated(4) | {"dialogue": []}
    made = make_sft(task="score", offline=True).prepare_dataset(
        [rated(1), broken, record(3), silent, {"id": "d5", **ready}], "test"
    )

    assert [one["id"] for one in made] == ["d1"]
    assert any("4件" in line and all(f"d{n}" in line for n in (2, 3, 4, 5)) for line in log())


def test_a_dialogue_that_is_too_long_is_never_cut_in_two(make_sft: MakeSFT) -> None:
    long = rated(1) | {"dialogue": record(1, ("client", "雨が降る。" * 14_000))["dialogue"]}

    with pytest.raises(DataError, match="d1"):
        make_sft(task="score", offline=True).prepare_dataset([long])
    kept = make_sft(task="score", offline=True, long_examples="drop").prepare_dataset([long])
    assert kept == []


# ── The same path ────────────────────────────────────────────────────────────────────────────


def test_the_files_hold_one_example_a_dialogue_and_pass_the_same_checks(
    finished: Finished,
) -> None:
    counts = {}
    for name in ("train", "test", "valid"):
        made = read_examples(finished.files[name])
        counts[name] = len(made)
        for one in made:
            assert [m["role"] for m in one["messages"]] == ["system", "user", "assistant"]
            assert isinstance(parse_scores(one["messages"][2]["content"]), dict)
        found = [f for f in check_file(finished.files[name]) if f.severity == "error"]
        assert name != "train" or found == []

    assert sum(counts.values()) == 20  # of 21, one has no scores
    assert min(counts.values()) >= 1


def test_what_was_written_is_what_is_uploaded_and_trained_on(finished: Finished) -> None:
    (created,) = [e for e in finished.exchanges if (e.method, e.path) == ("POST", JOBS)]
    with openai.OpenAI(api_key="k", base_url=finished.endpoint.url, max_retries=0) as client:
        for key, name in (("training_file", "train"), ("validation_file", "valid")):
            content = client.files.content(created.request[key]).content
            assert content == Path(finished.files[name]).read_bytes()

    assert created.request["method"]["supervised"]["hyperparameters"] == {
        "n_epochs": 1,
        "batch_size": 4,
    }


def test_the_record_and_the_manifest_tell_the_task_the_ids_and_the_mse(finished: Finished) -> None:
    kept = strict_json(finished.files["record"])
    manifest = strict_json(finished.files["manifest"])

    assert (kept["kind"], kept["settings"]["task"]) == ("pipeline", "score")
    assert kept["fine_tuned_model"] == finished.results["model_id"]
    assert kept["evaluation"]["mse"] == finished.results["summary"]["mse"]
    assert kept["data"]["train"]["tokens"] > 0
    assert kept["estimate"]["training_usd"] > 0
    assert "finished_at" in kept
    for name in ("train", "test", "valid"):
        lines = manifest["splits"][name]["lines"]
        assert len(lines) == manifest["splits"][name]["examples"]
        assert len(lines) == len(read_examples(finished.files[name]))
        assert {line["id"] for line in lines} <= {f"d{n}" for n in range(1, 21)}


def test_every_dialogue_of_a_split_is_asked_once(finished: Finished) -> None:
    manifest = read_json(finished.files["manifest"])
    for name in ("test", "valid"):
        part = finished.results[f"{name}_evaluation"]
        asked = [response["case_id"].rpartition(":")[0] for response in part["responses"]]

        assert sorted(asked) == sorted(line["id"] for line in manifest["splits"][name]["lines"])
        assert part["metrics"]["coverage"] == {"valid": len(asked), "asked": len(asked)}


def test_a_question_asks_for_the_twenty_scores_as_strict_json_and_does_not_tell_them(
    finished: Finished,
) -> None:
    asked = [e.request for e in finished.exchanges if e.path == CHAT]
    wanted = asked[0]["response_format"]
    schema = wanted["json_schema"]["schema"]
    validator = Draft202012Validator(schema)

    assert all(one["response_format"] == wanted for one in asked)
    assert wanted["type"] == "json_schema"
    assert wanted["json_schema"]["strict"] is True
    assert schema["required"] == list(schema["properties"]) == list(ITEMS)
    assert schema["additionalProperties"] is False
    for value in range(6):
        assert validator.is_valid(scores_of(value))
    for wrong in (-1, 6, 2.5, "3", True, None):
        assert not validator.is_valid(scores_of() | {FIRST: wrong})
    assert not validator.is_valid(scores_of() | {"感想": 3})
    assert not validator.is_valid(dict.fromkeys(ITEMS[1:], 3))
    for one in asked:
        assert [message["role"] for message in one["messages"]] == ["system", "user"]


def test_the_schema_that_goes_with_each_question_is_in_the_estimate(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    data = rated_examples(6)
    estimates = {}
    for task in ("score", "response"):
        sft = OpenAISFT(offline=True, task=task, model=MODEL, verbose=False)
        estimates[task] = sft.estimate(Splits(data, data[:2], []), None)
    make_sft(task="score").evaluate_model_comprehensive(MODEL, data[:1], [], train_data=data)
    (asked,) = posts(endpoint, CHAT)
    schema = written({"response_format": asked.request["response_format"]})
    each = TokenCounter(load_vocabulary()).count_texts([schema])
    tokens = {task: one.evaluation_input_tokens for task, one in estimates.items()}

    assert each > 300
    assert tokens["score"] == tokens["response"] + 2 * each
    assert any("response_format のトークン数は" in line for line in estimates["score"].lines())
    assert not estimates["score"].exact_tokens
    assert estimates["response"].exact_tokens


def test_openais_own_description_finds_nothing_wrong_with_what_was_sent(finished: Finished) -> None:
    judge = pytest.importorskip("judge")
    if not judge.DESCRIPTION.exists():
        pytest.skip("the description isn't beside the project")

    assert judge.check_exchanges(finished.exchanges) == []


def test_the_response_task_asks_for_no_json(make_sft: MakeSFT, endpoint: Rehearsal) -> None:
    make_sft().evaluate_model_comprehensive(MODEL, examples(1), [])
    (asked,) = posts(endpoint, CHAT)

    assert "response_format" not in asked.request


def test_an_interrupted_run_goes_on_as_the_task_it_was_begun_with(
    make_sft: MakeSFT, endpoint: Rehearsal, clean_environment: Path
) -> None:
    source = write_jsonl(clean_environment / "rated.jsonl", varied(16))
    endpoint.inject(Fault("insufficient_quota", "POST", CHAT))
    with make_sft(task="score", dataset=str(source)) as sft, pytest.raises(openai.RateLimitError):
        sft.run_full_pipeline(**SHORT)
    before = len(posts(endpoint, CHAT))
    results = make_sft().resume()

    assert results is not None
    assert results["task"] == "score"
    assert results["summary"]["mse"] >= 0
    assert set(results["constant_reference"]) == {"scores", "test", "valid"}
    assert all("response_format" in e.request for e in posts(endpoint, CHAT)[before:])
    assert len(posts(endpoint, JOBS)) == 1


def test_an_evaluation_alone_takes_the_recorded_task_and_split(
    finished: Finished, make_sft: MakeSFT, clean_environment: Path
) -> None:
    folder = finished.copy(clean_environment)
    sft = make_sft(base_url=finished.endpoint.url, output_dir=folder, dataset=None)
    results = sft.run_evaluation(max_test_cases=0)
    kept = strict_json(sft.files["record"])

    assert results["model_id"] == finished.results["model_id"]
    assert results["task"] == "score"
    assert (kept["kind"], kept["settings"]["task"]) == ("evaluation", "score")
    for part in ("test_evaluation", "valid_evaluation"):
        assert results[part]["metrics"] == finished.results[part]["metrics"]
    assert results["constant_reference"] == finished.results["constant_reference"]
    assert results["summary"]["mse"] == finished.results["summary"]["mse"]


@pytest.mark.parametrize("command", [["--evaluate-only"], ["--resume"]], ids=lambda c: c[0])
@pytest.mark.parametrize("given_task", ["response", "score"])
def test_another_task_than_the_recorded_one_ends_with_2_before_anything_is_asked(
    finished: Finished,
    clean_environment: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    given_task: str,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    folder = finished.copy(clean_environment)
    path = folder / Path(finished.files["record"]).name
    if command == ["--resume"]:
        kept = read_json(path)
        del kept["finished_at"]
        path.write_text(json.dumps(kept), "utf-8")
    before = len(finished.endpoint.exchanges)
    code = openai_sft_example.main(
        [
            *(
                *command,
                "--task",
                given_task,
                "--base-url",
                finished.endpoint.url,
                "--quiet",
                "--yes",
            ),
            *("--output-dir", str(folder), "--max-test-cases", "1"),
        ]
    )
    said = capsys.readouterr()

    if given_task == "score":
        assert code == 0
    else:
        assert code == 2
        assert [line for line in said.err.splitlines() if line.startswith("エラー: ")]
        assert "task" in said.err
        assert "score" in said.err
        assert not [e for e in finished.endpoint.exchanges[before:] if e.method == "POST"]


def test_a_system_prompt_of_ones_own_is_refused_for_the_task_has_its_own(
    clean_environment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigurationError, match="system_prompt"):
        OpenAISFT(task="score", system_prompt="傾聴してください。", offline=True, verbose=False)
    code = openai_sft_example.main(["--data-only", "--task", "score", "--system-prompt", "x"])

    assert code == 2
    assert "エラー: " in capsys.readouterr().err
    assert list(clean_environment.iterdir()) == []


def test_a_task_that_does_not_exist_is_refused(
    clean_environment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigurationError, match="response、score"):
        OpenAISFT(task="summary", offline=True)  # type: ignore[arg-type]
    with pytest.raises(SystemExit) as end:
        openai_sft_example.main(["--data-only", "--task", "summary"])

    assert end.value.code == 2
    assert "--task" in capsys.readouterr().err


# ── What is no answer ────────────────────────────────────────────────────────────────────────

NO_ANSWERS = {
    "text": "3点だと思います",
    "a fence": f"```json\n{written(scores_of())}\n```",
    "cut": written(scores_of())[:-9],
    "an array": written(list(scores_of().values())),
    "a number": "3",
    "null": "null",
    "a missing item": written(dict.fromkeys(ITEMS[:-1], 3)),
    "english keys": written(dict.fromkeys(SCORE_ITEMS.values(), 3)),
    "six": written(scores_of(6)),
    "below": written(scores_of(-1)),
    "huge": written(scores_of(10**400)),
    "a fraction": written(scores_of() | {FIRST: 3.5}),
    "3.0": written(scores_of() | {FIRST: 3.0}),
    "true": written(scores_of() | {FIRST: True}),
    "a string": written(scores_of() | {FIRST: "3"}),
    "nothing": written(scores_of() | {FIRST: None}),
    "NaN": written(scores_of() | {FIRST: math.nan}),
    "nested": written(scores_of() | {FIRST: {"score": 3}}),
    "half an emoji": json.dumps(scores_of() | {FIRST: "\ud83d"}),
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("text", NO_ANSWERS.values(), ids=NO_ANSWERS.keys())
def test_an_answer_that_is_no_score_is_invalid_and_the_reason_is_named(text: str) -> None:
    reason = parse_scores(text)

    assert isinstance(reason, str)
    assert reason.strip()


@given(score_lists)
def test_twenty_whole_numbers_of_the_scale_are_an_answer_in_any_order(points: list[int]) -> None:
    scores = dict(zip(ITEMS, points, strict=True))
    turned = dict(reversed(scores.items()))

    assert parse_scores(written(scores)) == parse_scores(json.dumps(turned, indent=1)) == scores


def test_invalid_answers_are_counted_never_clipped_and_have_the_greatest_error(
    evaluate: Callable[..., EvaluationResults],
) -> None:
    data = rated_examples(len(NO_ANSWERS) + 2)  # 3 everywhere: the worst is 0
    said = [written(scores_of(4)), *NO_ANSWERS.values(), written(scores_of(5))]
    results = evaluate(said, data)
    part = results["test_evaluation"]
    invalid = [r for r in part["responses"] if "invalid" in r]
    count = len(NO_ANSWERS)

    assert part["invalid_cases"] == len(invalid) == count
    assert part["failed_cases"] == 0
    assert part["metrics"]["coverage"] == {"valid": 2, "asked": len(said)}
    assert [r["output"] for r in part["responses"]] == said
    assert "invalid" not in part["responses"][0]
    assert part["metrics"][FIRST]["mse"]["score"] == pytest.approx(
        (1 + 4 + 9 * count) / (count + 2)
    )
    assert part["metrics"]["total"]["mae"]["score"] == pytest.approx(
        (1 + 2 + 60 * count) / (count + 2)
    )
    assert part["metrics"]["overall"]["accuracy"]["score"] == pytest.approx(38 / 20 / (count + 2))
    assert results["summary"]["mse"] == pytest.approx((5 + 180 * count) / 20 / (count + 2))
    assert results["summary"]["mse"] == part["metrics"]["overall"]["mse"]["score"]
    assert results.tables()[0][0][0] == f"項目（テスト、2/{len(said)}件）"


def test_the_worst_in_the_place_of_an_invalid_answer_is_on_the_far_side_of_the_real_score() -> None:
    real = scores_of(0, 2, 3, 5)  # the others 3
    metrics, _ = score_predictions([answer("a", scores_of(), real)._replace(fault="無効")])

    found = [metrics[item]["mae"]["score"] for item in ITEMS[:4]]
    assert found == [5, 3, 3, 5]
    assert metrics["total"]["mae"]["score"] == sum(real.values())
    assert metrics[FIRST]["accuracy"]["score"] == 0


def test_being_invalid_where_it_would_be_wrong_makes_no_predictor_better() -> None:
    rng = np.random.default_rng(1)
    honest = [
        answer(f"d{n}", scores_of(), scores_of(*map(int, rng.integers(0, 6, 20))))
        for n in range(40)
    ]
    errors = [score_predictions([one])[0]["overall"]["mse"]["score"] for one in honest]
    sly = [
        one._replace(output="?", fault="無効") if error > 2.5 else one
        for one, error in zip(honest, errors, strict=True)
    ]

    assert any(one.fault for one in sly)
    assert (
        score_predictions(sly)[0]["overall"]["mse"]["score"]
        > score_predictions(honest)[0]["overall"]["mse"]["score"]
    )


def test_an_invalid_answer_is_in_no_correlation() -> None:
    given = answers([0, 1, 5, 3], [1, 2, 3, 4])
    failed = [*given[:3], given[3]._replace(output="?", fault="無効")]

    for name in ("spearman", "pearson"):
        assert (
            score_predictions(failed)[0][FIRST][name]
            == score_predictions(given[:3])[0][FIRST][name]
        )


def test_constants_are_held_against_the_model_on_all_cases_and_a_failed_one_is_lost(
    evaluate: Callable[..., EvaluationResults],
) -> None:
    data = rated_examples(12)
    order = [case.dialogue_id for case in choose_cases(data, max_cases=0)]
    said = [written(scores_of()) if name in ("d1", "d2", "d3") else "?" for name in order]
    results = evaluate(said, data, train_data=rated_examples(2, others=5))
    comparison = results["comparison"]["constant_reference"]["test"]

    assert results["constant_reference"]["test"]["overall"]["mse"]["score"] == pytest.approx(4)
    assert (comparison["pairs"], comparison["failed_pairs"]) == (12, 9)
    assert comparison["figures"]["overall.mse"]["baseline"] == pytest.approx(4)
    assert comparison["figures"]["overall.mse"]["tuned"] == pytest.approx(9 * 9 / 12)
    assert comparison["figures"]["overall.mse"]["losses"] == 9
    assert results.tables()[1][0][0] == "比較（テスト、12組、うち応答なし・無効9組）"


def test_where_no_answer_is_valid_the_figures_are_the_worst_and_the_results_are_saved(
    evaluate: Callable[..., EvaluationResults],
) -> None:
    results = evaluate(["わかりません"], rated_examples(3))

    assert results["test_evaluation"]["metrics"]["coverage"] == {"valid": 0, "asked": 3}
    assert results["summary"]["mse"] == 9
    assert results["test_evaluation"]["metrics"]["overall"]["spearman"]["score"] is None


def test_failed_and_invalid_answers_are_told_apart(
    evaluate: Callable[..., EvaluationResults],
) -> None:
    results = evaluate(["", "?", written(scores_of())], rated_examples(3))
    part = results["test_evaluation"]

    assert (part["evaluated_cases"], part["failed_cases"], part["invalid_cases"]) == (2, 1, 1)
    assert part["metrics"]["coverage"] == {"valid": 1, "asked": 3}


def test_data_of_the_other_task_is_refused_before_anything_is_asked(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    with pytest.raises(DataError):
        make_sft(task="score").evaluate_model_comprehensive(MODEL, examples(3), [])

    assert posts(endpoint, CHAT) == []


def test_training_data_without_scores_are_refused_before_anything_is_asked(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    with pytest.raises(DataError):
        make_sft(task="score").evaluate_model_comprehensive(
            MODEL, rated_examples(3), [], train_data=examples(3)
        )

    assert posts(endpoint, CHAT) == []


def test_when_no_case_is_answered_at_all_the_run_fails(
    make_sft: MakeSFT, endpoint: Rehearsal, clean_environment: Path
) -> None:
    source = write_jsonl(clean_environment / "rated.jsonl", varied(12))
    endpoint.inject(Fault("400", "POST", CHAT, times=None))
    with pytest.raises(EvaluationFailed) as caught:
        make_sft(task="score", dataset=str(source)).run_evaluation(MODEL)

    assert strict_json(caught.value.path)["test_evaluation"]["metrics"]["coverage"]["valid"] == 0


# ── The figures ──────────────────────────────────────────────────────────────────────────────


def test_the_measures_agree_with_computation_by_hand() -> None:
    found = measured([1, 2, 2, 5], [1, 3, 1, 3])  # errors 0, -1, 1, 2; ties in both

    assert found == pytest.approx(
        {
            "mse": 6 / 4,
            "rmse": math.sqrt(1.5),
            "mae": 4 / 4,
            "accuracy": 1 / 4,
            "accuracy_within_1": 3 / 4,
            # deviations (-1.5, -.5, -.5, 2.5) and (-1, 1, -1, 1): 4 / √(9 · 4)
            "pearson": 4 / 6,
            # ranks (1, 2.5, 2.5, 4) and (1.5, 3.5, 1.5, 3.5): 3 / √(4.5 · 4)
            "spearman": 3 / math.sqrt(18),
        }
    )


def test_a_perfect_and_a_reversed_order_have_correlations_of_one_and_minus_one() -> None:
    straight, reversed_ = measured([0, 1, 5], [1, 2, 3]), measured([5, 1, 0], [1, 2, 3])

    assert straight["spearman"] == pytest.approx(1)
    assert reversed_["spearman"] == pytest.approx(-1)
    assert 0 < straight["pearson"] < 1


def test_predictions_that_are_no_integers_are_rounded_for_the_accuracies_alone() -> None:
    found = measured([2.4, 2.6, 4.6], [2, 2, 3])

    assert found["mse"] == pytest.approx((0.16 + 0.36 + 2.56) / 3)
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["accuracy_within_1"] == pytest.approx(2 / 3)


def by_definition(x: Any, y: Any) -> dict[str, float]:
    """The measures as a textbook has them."""

    def ranks(values: Any) -> Any:
        return np.array([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values])

    def correlation(a: Any, b: Any) -> float:
        constant = len(set(a)) == 1 or len(set(b)) == 1
        return math.nan if constant else float(np.corrcoef(a, b)[0, 1])

    return {
        "mse": float(np.mean((x - y) ** 2)),
        "rmse": math.sqrt(np.mean((x - y) ** 2)),
        "mae": float(np.mean(np.abs(x - y))),
        "accuracy": float(np.mean(x == y)),
        "accuracy_within_1": float(np.mean(np.abs(x - y) <= 1)),
        "spearman": correlation(ranks(x), ranks(y)),
        "pearson": correlation(x, y),
    }


@pytest.mark.parametrize("constant", [3, 100 / 7])
def test_a_correlation_with_a_constant_is_not_there_and_no_warning(constant: float) -> None:
    real = list(range(60))
    found = measured([constant] * 60, real)

    assert math.isnan(found["pearson"])
    assert math.isnan(found["spearman"])
    assert math.isnan(measured(real, [constant] * 60)["pearson"])
    assert found["mse"] > 0


def test_what_is_undefined_is_none_in_the_metrics() -> None:
    metrics, missing = score_predictions(answers([3, 3, 3], [1, 2, 3]))

    assert missing == []
    for name in ("pearson", "spearman"):
        assert [metrics[FIRST][name][key] for key in ("score", "low", "high")] == [None] * 3
    assert metrics[SECOND]["mse"]["score"] == 0
    json.dumps(metrics, allow_nan=False)


def test_every_item_all_items_and_the_total_have_every_measure_with_an_interval() -> None:
    metrics, _ = score_predictions(answers([1, 2, 2, 5], [1, 3, 1, 3]))

    assert set(metrics) == {"overall", "total", *ITEMS}
    for measures in metrics.values():
        assert set(measures) == MEASURES
        for figure in measures.values():
            assert set(figure) >= {"score", "low", "high"}
    assert metrics[FIRST]["mse"]["score"] == pytest.approx(1.5)
    assert metrics[FIRST]["spearman"]["score"] == pytest.approx(3 / math.sqrt(18))


def test_overall_pools_the_items_and_total_sums_them() -> None:
    predicted, real = scores_of(4, 2), scores_of(3, 3)  # +1 and -1: the sums are equal
    metrics, _ = score_predictions(
        [answer("a", predicted, real), answer("b", scores_of(5, 5), scores_of(3, 4))]
    )

    assert metrics["overall"]["mse"]["score"] == pytest.approx((1 + 1 + 4 + 1) / 40)
    assert metrics["overall"]["mae"]["score"] == pytest.approx((1 + 1 + 2 + 1) / 40)
    assert metrics["overall"]["rmse"]["score"] == pytest.approx(math.sqrt(7 / 40))
    assert metrics["overall"]["accuracy"]["score"] == pytest.approx(36 / 40)
    assert metrics["overall"]["accuracy_within_1"]["score"] == pytest.approx(39 / 40)
    assert metrics["total"]["mse"]["score"] == pytest.approx((0 + 3**2) / 2)
    assert metrics["total"]["mae"]["score"] == pytest.approx(3 / 2)
    assert metrics["total"]["accuracy"]["score"] == pytest.approx(1 / 2)
    assert metrics["total"]["pearson"]["score"] == pytest.approx(1)


@settings(max_examples=12)
@given(st.lists(st.tuples(score_lists, score_lists), min_size=1, max_size=5))
def test_the_metrics_are_the_textbooks_for_every_group(
    pairs: list[tuple[list[int], list[int]]],
) -> None:
    x, y = (np.array(side, dtype=float) for side in zip(*pairs, strict=True))
    metrics, _ = score_predictions(
        [
            answer(f"d{n}", scores_of(*predicted), scores_of(*real))
            for n, (predicted, real) in enumerate(pairs)
        ]
    )
    groups = {"overall": (x.ravel(), y.ravel()), "total": (x.sum(axis=1), y.sum(axis=1))}
    for group, sides in {**groups, ITEMS[7]: (x[:, 7], y[:, 7])}.items():
        for name, value in by_definition(*sides).items():
            if group == "overall" and name in ("spearman", "pearson"):
                continue
            found = metrics[group][name]["score"]
            assert (math.nan if found is None else found) == pytest.approx(
                value, nan_ok=True, abs=1e-9
            )
    json.dumps(metrics, allow_nan=False)


def test_the_correlation_of_all_items_is_the_mean_of_the_items_own_by_fishers_z() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.integers(0, 6, (30, 20)), rng.integers(0, 6, (30, 20))
    y[:, :10] = x[:, :10] // 2 + 1
    given = [
        answer(f"d{n}", scores_of(*map(int, x[n])), scores_of(*map(int, y[n]))) for n in range(30)
    ]
    metrics, _ = score_predictions(given)
    for name in ("spearman", "pearson"):
        own = [metrics[item][name]["score"] for item in ITEMS]
        z = sum(math.atanh(min(value, 1 - 1e-6)) for value in own) / 20
        assert metrics["overall"][name]["score"] == pytest.approx(math.tanh(z))


def test_saying_the_same_of_every_dialogue_is_no_correlation_over_all_items() -> None:
    rng = np.random.default_rng(2)
    same = scores_of(0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5)
    given = [
        answer(
            f"d{n}", same, scores_of(*(min(5, v + int(rng.integers(0, 2))) for v in same.values()))
        )
        for n in range(30)
    ]
    metrics, _ = score_predictions(given)

    assert metrics["overall"]["pearson"]["score"] is None
    assert metrics["overall"]["spearman"]["score"] is None


def test_an_item_that_is_predicted_by_a_constant_adds_no_correlation() -> None:
    metrics, _ = score_predictions(answers([0, 1, 2, 3], [1, 3, 2, 4]))  # the others are constant
    own = metrics[FIRST]["pearson"]["score"]

    assert metrics["overall"]["pearson"]["score"] == pytest.approx(math.tanh(math.atanh(own) / 20))


def test_intervals_are_over_dialogues_and_not_over_items() -> None:
    alike = [answer(f"d{n}", scores_of(5, 1), scores_of()) for n in range(12)]
    metrics, _ = score_predictions(alike)
    interval = metrics["overall"]["mse"]

    assert interval["score"] == pytest.approx(8 / 20)
    assert (interval["low"], interval["high"]) == pytest.approx((8 / 20, 8 / 20))


def test_the_interval_of_a_share_of_scores_is_the_textbooks() -> None:
    metrics, _ = score_predictions(answers([3, 4] * 200, [3, 3] * 200))
    found = metrics["total"]["accuracy"]
    textbook = 2 * 1.96 * math.sqrt(0.5 * 0.5 / 400)

    assert found["score"] == pytest.approx(0.5)
    assert found["high"] - found["low"] == pytest.approx(textbook, rel=0.02)


def test_answers_of_one_dialogue_are_drawn_together() -> None:
    answered = [
        answer(f"d{n}", scores_of(predicted), scores_of(3), turn)
        for n in range(12)
        for turn, predicted in ((2, 3), (4, 5))
    ]
    interval = score_predictions(answered)[0][FIRST]["mse"]

    assert interval["score"] == pytest.approx(2)
    assert (interval["low"], interval["high"]) == pytest.approx((2, 2))


def test_the_intervals_of_the_error_and_of_its_root_are_one() -> None:
    rng = np.random.default_rng(3)
    metrics, _ = score_predictions(
        answers(rng.integers(0, 6, 40).tolist(), rng.integers(0, 6, 40).tolist())
    )
    for group in ("overall", "total", FIRST):
        square, root = metrics[group]["mse"], metrics[group]["rmse"]
        assert 0 < square["low"] < square["score"] < square["high"]
        for key in ("score", "low", "high"):
            assert root[key] ** 2 == pytest.approx(square[key], rel=0.05)


def test_the_interval_of_a_correlation_is_fishers() -> None:
    rng = np.random.default_rng(3)
    x = rng.integers(0, 6, 200)
    y = np.clip(x + rng.integers(-2, 3, 200), 0, 5)
    found = score_predictions(answers(x.tolist(), y.tolist()))[0][FIRST]["pearson"]
    half = (math.atanh(found["high"]) - math.atanh(found["low"])) / 2

    assert found["low"] < found["score"] < found["high"] < 1
    assert half == pytest.approx(1.97 / math.sqrt(197), rel=0.25)


def test_nothing_answered_has_no_metrics() -> None:
    assert score_predictions([]) == ({}, [])
    assert make_score_figures([[]]) == ([], [])


# ── The references ───────────────────────────────────────────────────────────────────────────


def test_the_constants_are_those_of_each_item_and_the_total_over_the_training_examples() -> None:
    train = [*rated_examples(1, 5, 0), *rated_examples(2, 4, 0), *rated_examples(1, 1, 0)]
    constants = constant_scores(train)

    assert constants["mean"][FIRST] == pytest.approx(14 / 4)
    assert (constants["median"][FIRST], constants["mode"][FIRST]) == (4, 4)
    assert [constants[kind][SECOND] for kind in ("mean", "median", "mode")] == [0, 0, 0]
    assert constants["mean"]["total"] == pytest.approx(54 + 14 / 4)
    assert (constants["median"]["total"], constants["mode"]["total"]) == (58, 58)


def test_each_measure_is_held_against_the_constant_that_does_best_by_it(
    evaluate: Callable[..., EvaluationResults],
) -> None:
    points = [0, 0, 0, 0, 0, 2, 3, 3, 4, 5, 5, 5]  # mean 2.25, median 2.5, mode 0
    train = [one for value in points for one in rated_examples(1, value)]
    test = [{**one, "id": f"t{n}"} for n, one in enumerate(train)]
    results = evaluate([written(scores_of())], test, train_data=train)
    found = results["constant_reference"]["test"][FIRST]

    mean = sum(points) / len(points)
    assert found["mse"]["score"] == pytest.approx(sum((p - mean) ** 2 for p in points) / 12)
    assert found["mae"]["score"] == pytest.approx(sum(abs(p - 2.5) for p in points) / 12)
    assert found["accuracy"]["score"] == pytest.approx(5 / 12)
    assert set(found) == {"mse", "rmse", "mae", "accuracy", "accuracy_within_1"}


def test_the_constant_reference_is_the_training_mean_measured_on_the_test_cases(
    evaluate: Callable[..., EvaluationResults],
) -> None:
    train = [*rated_examples(1, 5), *rated_examples(2, 2)]  # first item 5, 2, 2: the mean is 3
    test = [*rated_examples(1, 0), *rated_examples(4, 4)[2:]]  # 0, 4, 4: errors 3, -1, -1
    results = evaluate([written(scores_of())], test, train_data=train)
    reference = results["constant_reference"]

    assert reference["scores"]["mean"] == pytest.approx({**scores_of(3), "total": 60})
    assert reference["test"][FIRST]["mse"]["score"] == pytest.approx(11 / 3)
    assert reference["test"]["overall"]["mse"]["score"] == pytest.approx(11 / 60)
    assert reference["valid"] == {}


def test_the_mean_is_by_default_that_of_what_this_instance_prepared(make_sft: MakeSFT) -> None:
    sft = make_sft(task="score")
    sft.prepare_dataset([rated(1, 5), rated(2, 4)], "train")
    test = sft.prepare_dataset([rated(3, 0)], "test")
    results = sft.evaluate_model_comprehensive(MODEL, test, [])

    assert results["constant_reference"]["scores"]["mean"][FIRST] == pytest.approx(4.5)


def test_the_mean_is_by_default_that_of_what_the_data_stage_wrote(
    make_sft: MakeSFT, clean_environment: Path
) -> None:
    path = write_jsonl(clean_environment / "rated.jsonl", varied(20))
    sft = make_sft(task="score", dataset=str(path))
    files = sft.prepare_data().files
    rows = [json.loads(one["messages"][2]["content"]) for one in read_examples(files["train"])]
    results = sft.evaluate_model_comprehensive(MODEL, rated_examples(2), [])

    expected = sum(row[FIRST] for row in rows) / len(rows)
    assert results["constant_reference"]["scores"]["mean"][FIRST] == pytest.approx(expected)


def test_the_mean_of_a_run_is_that_of_its_training_file(finished: Finished) -> None:
    rows = [
        json.loads(one["messages"][2]["content"]) for one in read_examples(finished.files["train"])
    ]
    expected = {item: sum(row[item] for row in rows) / len(rows) for item in ITEMS}

    found = finished.results["constant_reference"]["scores"]["mean"]
    assert {item: found[item] for item in ITEMS} == pytest.approx(expected)


def test_a_fresh_instance_takes_the_mean_of_the_recorded_split(
    finished: Finished, make_sft: MakeSFT, clean_environment: Path
) -> None:
    folder = finished.copy(clean_environment)
    sft = make_sft(task="score", base_url=finished.endpoint.url, output_dir=folder)
    results = sft.evaluate_model_comprehensive(finished.results["model_id"], rated_examples(2), [])

    assert (
        results["constant_reference"]["scores"] == finished.results["constant_reference"]["scores"]
    )


def test_an_evaluation_that_is_resumed_compares_with_the_mean_that_it_began_with(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    endpoint.inject(Fault("401", "POST", "/chat/completions", skip=1))
    with make_sft(task="score") as first, pytest.raises(openai.AuthenticationError):
        first.evaluate_model_comprehensive(
            MODEL, rated_examples(3), [], train_data=rated_examples(2, 1), concurrency=1
        )
    results = make_sft().resume()
    whole = make_sft(task="score").evaluate_model_comprehensive(
        MODEL, rated_examples(3), [], train_data=rated_examples(2, 1)
    )

    assert results is not None
    assert results["summary"]["total_cases_evaluated"] == 3
    assert results["constant_reference"] == whole["constant_reference"]


def test_without_training_data_the_mean_is_left_out_and_it_is_said(
    make_sft: MakeSFT, log: Log
) -> None:
    results = make_sft(task="score").evaluate_model_comprehensive(MODEL, rated_examples(2), [])

    assert "constant_reference" not in results
    assert results["summary"]["mse"] >= 0
    assert any("定数予測" in line for line in log())


def test_the_mean_stands_beside_each_item_in_the_table(
    evaluate: Callable[..., EvaluationResults],
) -> None:
    results = evaluate([written(scores_of(5))], rated_examples(8), train_data=rated_examples(2, 1))
    head, *rows = results.tables()[0]
    column = head.index("定数予測")
    by_item = {row[0]: row for row in rows}

    assert list(by_item)[-20:] == list(ITEMS)
    assert set(by_item) == {"全項目", "合計点", *ITEMS}
    assert (by_item[FIRST][1], by_item[FIRST][column]) == ("4.00", "4.00")
    assert (by_item[SECOND][1], by_item[SECOND][column]) == ("0.00", "0.00")
    assert all(item in results._repr_html_() for item in ITEMS)


def test_a_table_fits_its_terminal_by_cutting_the_items(
    evaluate: Callable[..., EvaluationResults],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    results = evaluate([written(scores_of(5))], rated_examples(8))
    monkeypatch.setenv("COLUMNS", "90")
    openai_sft_example.show_results(results)
    rows = [line for line in capsys.readouterr().out.splitlines() if "  " in line]
    widths = [sum(1 + (east_asian_width(c) in "WF") for c in row) for row in rows]
    long = next(row for row in rows if row.startswith("相談終了のタイミング"))

    assert len(rows) >= 23
    assert max(widths) <= 90
    assert ".." in long


def compared(tuned: Sequence[int], other: Sequence[int], real: Sequence[int]) -> dict[str, Any]:
    compared = compare_answers(answers(tuned, real), answers(other, real), make=make_score_figures)
    figures: dict[str, Any] = compared["figures"]
    return figures


def test_the_lower_error_is_the_better_one_and_the_higher_accuracy() -> None:
    real = [1, 2, 3, 4] * 3
    good, bad = compared(real, [0] * 12, real), compared([0] * 12, real, real)

    for name in ("mse", "rmse", "mae", "accuracy", "accuracy_within_1"):
        assert f"overall.{name}" in good
        assert f"total.{name}" in good
    for name in ("overall.mse", "overall.mae", "total.mse", "overall.accuracy"):
        assert (good[name]["verdict"], bad[name]["verdict"]) == ("better", "worse")
        assert (good[name]["wins"], good[name]["losses"]) == (12, 0)
        assert (bad[name]["wins"], bad[name]["losses"]) == (0, 12)
        assert good[name]["difference"] == pytest.approx(-bad[name]["difference"])
    assert good["overall.mse"]["difference"] == pytest.approx(-7.5 / 20)  # 1, 4, 9, 16 thrice
    assert good["total.mse"]["difference"] == pytest.approx(-7.5)
    assert good["overall.accuracy"]["difference"] == pytest.approx(1 / 20)
    assert good["overall.mse"]["high"] < 0 < bad["overall.mse"]["low"]
    assert good["overall.mse"]["p_value"] == pytest.approx(2 / 2**12)


def test_of_two_errors_of_one_point_and_one_of_two_only_the_square_tells() -> None:
    real = written(scores_of(1, 1))
    one_of_two, two_of_one = (
        [Answer("d1:2", "d1", written(scores_of(*points)), real)] for points in ((3, 1), (2, 2))
    )
    figures = compare_answers(two_of_one, one_of_two, make=make_score_figures)["figures"]

    assert [figures["overall.mse"][key] for key in ("wins", "ties")] == [1, 0]
    assert [figures["overall.rmse"][key] for key in ("wins", "ties")] == [1, 0]
    assert [figures["overall.mae"][key] for key in ("wins", "ties")] == [0, 1]
    assert [figures["overall.accuracy"][key] for key in ("wins", "losses")] == [0, 1]
    assert [figures["overall.accuracy_within_1"][key] for key in ("wins", "losses")] == [1, 0]


@settings(max_examples=12)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=6))
def test_a_model_never_differs_from_itself(pairs: list[tuple[int, int]]) -> None:
    predicted, real = zip(*pairs, strict=True)

    for figure in compared(predicted, predicted, real).values():
        assert figure["difference"] == 0
        assert figure["p_value"] == 1
        assert figure["verdict"] in ("indistinguishable", "too_few")


@pytest.mark.parametrize(
    ("tuned", "untuned", "verdict", "word"),
    [
        (3, 5, "better", "良く"),
        (5, 3, "worse", "悪く"),
        (4, 4, "indistinguishable", "区別できない"),
    ],
)
def test_both_references_are_told_in_a_plain_sentence(
    evaluate: Callable[..., EvaluationResults], tuned: int, untuned: int, verdict: str, word: str
) -> None:
    said = [written(scores_of(value)) for value in (tuned, untuned) * 8]
    results = evaluate(
        said, rated_examples(8), baseline="gpt-4.1-mini-2025-04-14",
        train_data=rated_examples(2, untuned),
    )  # fmt: skip
    comparison = results["comparison"]
    for rival, name in ((comparison, "基準"), (comparison["constant_reference"], "定数予測")):
        figure = rival["test"]["figures"]["overall.mse"]

        assert figure["tuned"] == pytest.approx((tuned - 3) ** 2 / 20)
        assert figure["baseline"] == pytest.approx((untuned - 3) ** 2 / 20)
        assert figure["verdict"] == verdict
        assert rival["test"]["verdict"] == verdict
        assert all(part in rival["test"]["sentence"] for part in ("全項目のMSE", name, word))
        assert rival["test"]["sentence"] in results.sentences()
        assert "sentence" not in rival["valid"]
    assert comparison["baseline_model"] == results["baseline"]["model_id"]
    assert results["baseline"]["test_evaluation"]["metrics"]["coverage"]["valid"] == 8


def test_a_pair_with_an_invalid_answer_on_either_side_is_counted(
    evaluate: Callable[..., EvaluationResults],
) -> None:
    good = written(scores_of())
    said = ["?", "?", *[good] * 6, "?", good, "?", *[good] * 5]
    results = evaluate(said, rated_examples(8), baseline="gpt-4.1-mini-2025-04-14")
    found = results["comparison"]["test"]

    assert (found["pairs"], found["left_out_pairs"], found["failed_pairs"]) == (8, 0, 3)


@pytest.mark.parametrize(("task", "figure"), [("score", "rouge_l"), ("response", "overall.mse")])
def test_a_main_figure_of_another_task_is_refused_before_anything_is_read(
    make_sft: MakeSFT, endpoint: Rehearsal, task: Any, figure: str
) -> None:
    sft = make_sft(task=task)
    for call in (
        lambda: sft.run_full_pipeline(1, 4, main_figure=figure),
        lambda: sft.run_evaluation(MODEL, main_figure=figure),
        lambda: sft.prepare_data(main_figure=figure),
        lambda: sft.evaluate_model_comprehensive(MODEL, examples(1), [], main_figure=figure),
    ):
        with pytest.raises(ConfigurationError, match="--main-figure"):
            call()

    assert posts(endpoint) == []


def test_the_main_figure_is_recorded_before_anything_is_asked(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    endpoint.inject(Fault("401", "POST", CHAT, skip=1))
    with make_sft(task="score") as sft, pytest.raises(openai.AuthenticationError):
        sft.evaluate_model_comprehensive(
            MODEL,
            rated_examples(3),
            [],
            main_figure="total.mae",
            baseline="gpt-4.1-2025-04-14",
            concurrency=1,
        )
    kept = read_json(sft.files["record"])
    results = make_sft().resume()

    assert kept["evaluation"]["main_figure"] == "total.mae"
    assert results is not None
    assert results["settings"]["main_figure"] == "total.mae"
    assert results["comparison"]["test"]["main_figure"] == "total.mae"


# ── The loss of the job ──────────────────────────────────────────────────────────────────────


def test_the_response_tasks_summary_has_the_jobs_last_cross_entropies_and_never_an_mse(
    make_sft: MakeSFT,
) -> None:
    sft = make_sft()
    results = sft.run_full_pipeline(1, 4, max_test_cases=1)
    with Path(sft.files["training_metrics"]).open(encoding="utf-8", newline="") as table:
        rows = list(csv.DictReader(table))
    last = {key: value for row in rows for key, value in row.items() if value}

    summary = results["summary"]
    assert summary["training_cross_entropy"] == float(last["train_loss"])
    assert summary["validation_cross_entropy"] == float(last["valid_loss"])
    assert "mse" not in json.dumps(results, ensure_ascii=False).casefold()


def test_an_empty_cell_is_no_cross_entropy(make_sft: MakeSFT, endpoint: Rehearsal) -> None:
    endpoint.inject(Fault("404", "GET", "*/events", times=None))
    endpoint.inject(Fault("404", "GET", "*/checkpoints", times=None))

    def bend(request: Request, forward: Forward) -> Reply:
        if not request.path.endswith("/content"):
            return forward(request)
        content = b"step,train_loss,valid_loss\n1,2.5,1.75\n2,1.5,1.25\n3,0.5,\n4,,\n"
        return Reply(200, content, "application/octet-stream")

    with Gateway(endpoint, bend) as gateway:
        results = make_sft(base_url=gateway.url).run_full_pipeline(1, 4, max_test_cases=1)

    assert results["summary"]["training_cross_entropy"] == 0.5
    assert results["summary"]["validation_cross_entropy"] == 1.25


def test_the_loss_over_all_validation_data_is_taken_where_it_is_told(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    endpoint.inject(Fault("404", "GET", "*/events", times=None))
    endpoint.inject(Fault("404", "GET", "*/checkpoints", times=None))

    def azure(request: Request, forward: Forward) -> Reply:
        content = b"step,train_loss,valid_loss,full_valid_loss\n1,2.5,1.75,1.8\n"
        result = request.path.endswith("/content")
        return Reply(200, content, "application/octet-stream") if result else forward(request)

    with Gateway(endpoint, azure) as gateway:
        results = make_sft(base_url=gateway.url).run_full_pipeline(1, 4, max_test_cases=1)

    assert results["summary"]["validation_cross_entropy"] == 1.8


def test_an_evaluation_alone_tells_the_cross_entropies_of_its_models_own_job(
    make_sft: MakeSFT,
) -> None:
    with make_sft() as sft:
        trained = sft.run_full_pipeline(1, 4, max_test_cases=1)["summary"]
    again = make_sft().run_evaluation(max_test_cases=1)["summary"]
    other = make_sft().run_evaluation(MODEL, max_test_cases=1)["summary"]

    assert again == trained
    assert "training_cross_entropy" not in other
    assert "validation_cross_entropy" not in other


def test_the_cross_entropies_of_one_job_never_stand_beside_another_model(
    make_sft: MakeSFT, clean_environment: Path
) -> None:
    sft = make_sft()
    file_id = sft.upload_training_file(training_file(clean_environment))
    job = sft.monitor_fine_tune_job(sft.create_fine_tune_job(file_id, 1, 4))
    other = sft.evaluate_model_comprehensive(MODEL, examples(13)[12:], [])["summary"]
    own = sft.evaluate_model_comprehensive(str(job.fine_tuned_model), examples(13)[12:], [])[
        "summary"
    ]

    assert "training_cross_entropy" not in other
    assert own["training_cross_entropy"] > 0


# ── From end to end ──────────────────────────────────────────────────────────────────────────


def test_a_rehearsal_learns_the_scores_of_the_example_dialogues(clean_environment: Path) -> None:
    with OpenAISFT(
        rehearse=True, task="score", model=MODEL, verbose=False, sleep=lambda _: None
    ) as sft:
        results = sft.run_full_pipeline(epochs=2, batch_size=8, max_test_cases=0, baseline=True)
        kept = strict_json(sft.files["record"])
    folder = clean_environment / "openai_sft_outputs"
    (saved,) = folder.glob("comprehensive_evaluation_*.json")
    tuned, untuned = results["test_evaluation"], results["baseline"]["test_evaluation"]

    assert (results["task"], kept["settings"]["task"]) == ("score", "score")
    assert results["rehearsal"] is True
    assert strict_json(saved) == results
    assert tuned["metrics"]["coverage"]["valid"] == tuned["evaluated_cases"] > 0
    assert set(tuned["metrics"]) == {"coverage", "overall", "total", *ITEMS}
    assert results["summary"]["mse"] == tuned["metrics"]["overall"]["mse"]["score"]
    assert results["summary"]["mse"] < untuned["metrics"]["overall"]["mse"]["score"]
    assert set(results["comparison"]) == {"baseline_model", "test", "valid", "constant_reference"}


def test_the_command_line_ends_with_the_table_of_twenty_items(
    cli: Callable[..., Ended], clean_environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    ended = cli(
        "--rehearse", "--task", "score", "--epochs", "1", "--max-test-cases", "0", "--tables"
    )
    (saved,) = (clean_environment / "openai_sft_outputs").glob("comprehensive_evaluation_*.json")
    results = strict_json(saved)
    lines = ended.out.splitlines()
    (head,) = [n for n, line in enumerate(lines) if line.startswith("項目（テスト、")]
    rows = [line.split() for line in lines[head + 1 : head + 23]]
    metrics = results["test_evaluation"]["metrics"]

    assert ended.code == 0
    assert [row[0] for row in rows] == ["全項目", "合計点", *ITEMS]
    for row, group in zip(rows, ("overall", "total", *ITEMS), strict=True):
        mse = metrics[group]["mse"]["score"]
        assert row[1] == (f"{mse:.2f}" if mse < 100 else f"{mse:.1f}")
    assert "定数予測" in lines[head]
    assert f"モデル: {results['model_id']}" in lines
    assert results["summary"]["mse"] == metrics["overall"]["mse"]["score"]


@given(awkward_text)
def test_whatever_a_model_says_is_scores_or_a_reason(text: str) -> None:
    found = parse_scores(text)

    assert isinstance(found, str) or found.keys() == SCORE_ITEMS.keys()
