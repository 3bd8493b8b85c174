"""The page of a run: what Python puts into it. How it works in a browser is tested beside."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import re
import shlex
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from helpers import read_json
from hypothesis import given
from hypothesis import strategies as st
from pages import HOSTILE, SPLITS, Rehearsed, enlarged, poisoned, rehearse, responses

import openai_sft_example
from openai_sft import Answer, OpenAISFT, make_response_figures, make_score_figures
from openai_sft_report import OPTIONS, TEMPLATE, render

MakeSFT = Callable[..., OpenAISFT]


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Rehearsed:
    return rehearse(tmp_path_factory.mktemp("rehearsed"))


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Rehearsed:
    return rehearse(tmp_path_factory.mktemp("scored"), task="score")


class Elements(html.parser.HTMLParser):
    """The elements of a page with their attributes, and what its block of data holds."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[tuple[str, str | None], ...]]] = []
        self.data = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, tuple(attrs)))

    def handle_data(self, data: str) -> None:
        if self.found and ("id", "data") in self.found[-1][1]:
            self.data += data


def block(page: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Elements(page).data)
    return found


# ── Safe ─────────────────────────────────────────────────────────────────────────────────────


def test_nothing_in_the_data_becomes_markup_or_script(rehearsed: Rehearsed) -> None:
    hostile = poisoned(rehearsed)
    page = hostile.page(files={HOSTILE: "0"})
    elements = Elements(page).found
    usual = Elements(rehearsed.page()).found

    assert elements == usual
    data = block(page)
    assert data["cases"]["rows"][0]["tuned"]["text"] == HOSTILE
    assert data["cases"]["messages"] == [[HOSTILE, HOSTILE], ["user", HOSTILE]]
    assert data["files"][0][0] == HOSTILE


@given(st.text(st.characters(), max_size=20))
def test_any_text_is_read_back_as_it_was(rehearsed: Rehearsed, text: str) -> None:
    page = poisoned(rehearsed, text).page()

    assert page.isascii() or page.encode()  # not even half a character hinders writing it
    assert block(page)["cases"]["rows"][0]["tuned"].get("fault", "") == text


def test_the_policy_allows_the_pages_own_style_and_script_only(rehearsed: Rehearsed) -> None:
    page = rehearsed.page()
    elements = Elements(page).found
    (policy,) = (
        dict(attributes)["content"]
        for tag, attributes in elements
        if tag == "meta" and ("http-equiv", "Content-Security-Policy") in attributes
    )
    rules = dict(rule.split(" ", 1) for rule in str(policy).split("; "))

    assert rules["default-src"] == "'none'"
    for tag in ("style", "script"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"
    assert {name for tag, attributes in elements for name, _ in attributes}.isdisjoint(
        {"style", "src", "srcset", "onclick", "onload", "onerror"}
    )


def test_the_template_names_no_address_but_that_of_svg() -> None:
    assert set(re.findall(r"\w+://[^\"'\s]+", TEMPLATE)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", TEMPLATE
    )


# ── True ─────────────────────────────────────────────────────────────────────────────────────


def test_every_figure_of_the_results_stands_in_the_page_as_it_is(rehearsed: Rehearsed) -> None:
    data, results = block(rehearsed.page()), rehearsed.results

    for table in data["figures"]:
        split = f"{table['split']}_evaluation"
        mine, theirs = results[split]["metrics"], results["baseline"][split]["metrics"]
        assert {row["name"]: row["tuned"] for row in table["rows"]} == mine
        assert {row["name"]: row["baseline"] for row in table["rows"]} == theirs
    for part in data["comparisons"]:
        compared = results["comparison"][part["split"]]
        found = {figure.pop("name"): figure for figure in part["figures"]}
        assert found == compared["figures"]
        assert part["pairs"] == compared["pairs"]
    assert data["verdict"]["lines"] == [results["comparison"]["test"]["sentence"]]


def test_every_case_stands_in_the_page_with_its_scores(rehearsed: Rehearsed) -> None:
    data, results = block(rehearsed.page()), rehearsed.results
    cases, messages = data["cases"], data["cases"]["messages"]
    rows = {row["id"]: row for row in cases["rows"]}

    assert cases["figures"][0] == results["settings"]["main_figure"]
    for split in SPLITS:
        for response in results[split]["responses"]:
            row = rows.pop(response["case_id"])
            said = [messages[place] for place in row["context"]]
            assert said == [[m["role"], m["content"]] for m in response["input"]]
            assert row["reference"] == response["reference"]
            assert (row["topic"], row["score"]) == (
                response["topic"],
                response["dialogue_score"],
            )
            rival = results["baseline"][split]["responses"][response["case_id"]]
            for side, told in (("tuned", response), ("baseline", rival)):
                assert row[side]["text"] == told["output"]
                assert (
                    dict(zip(cases["figures"], row[side]["scores"], strict=True)) == told["scores"]
                )
    assert rows == {}


def test_the_curve_has_every_loss_and_says_where_the_validation_loss_was_least(
    rehearsed: Rehearsed,
) -> None:
    data, training = block(rehearsed.page()), rehearsed.results["training"]
    losses = ("step", "train_loss", "valid_loss", "full_valid_loss")

    assert data["curve"]["rows"] == [[row[name] for name in losses] for row in training["metrics"]]
    assert data["curve"]["epochs"] == training["hyperparameters"]["n_epochs"]
    marks = {mark["model"]: mark["step"] for mark in data["curve"]["checkpoints"]}
    assert marks.items() >= {(c["model"], c["step"]) for c in training["checkpoints"]}
    (evaluated,) = (mark for mark in data["curve"]["checkpoints"] if mark["evaluated"])
    assert evaluated["model"] == rehearsed.results["model_id"]
    least = min(training["metrics"], key=lambda row: row["full_valid_loss"])
    rise = f"step {least['step']:g} の {least['full_valid_loss']:.4f} が最も低く"
    assert any(rise in note and "過学習" in note for note in data["notes"])


def test_a_loss_that_is_no_number_is_left_out_of_the_curve(rehearsed: Rehearsed) -> None:
    results = deepcopy(rehearsed.results)
    results["training"]["metrics"][3] |= {"train_loss": None, "valid_loss": float("nan")}

    assert block(render(rehearsed.record, results, files={}))["curve"]["rows"][3][1:3] == [None] * 2


def test_the_page_knows_of_every_figure_which_direction_is_good(
    rehearsed: Rehearsed, scored: Rehearsed
) -> None:
    names = block(rehearsed.page())["names"] | block(scored.page())["names"]
    made = []
    for run, make in ((rehearsed, make_response_figures), (scored, make_score_figures)):
        told = run.results["test_evaluation"]["responses"]
        answers = [
            Answer(r["case_id"], r["dialogue_id"], r["output"], r["reference"]) for r in told
        ]
        made += make([answers])[0]

    assert {f.name: f.better for f in made}.items() <= {
        n: names[n]["better"] for n in names
    }.items()
    assert {f.better for f in made} == {-1, 0, 1}


def test_what_a_reader_must_know_is_noted(rehearsed: Rehearsed) -> None:
    record, results = deepcopy(rehearsed.record), deepcopy(rehearsed.results)
    record["settings"]["dataset"] = "UEC-InabaLab/KokoroChat"
    record["exact_tokens"] = False
    record["leakage"] = results["leakage"] = {"counselor": 0.991, "pair": 0.381}
    results["left_out"] = {"test": 3, "valid": 0}
    results["test_evaluation"] |= {"failed_cases": 1, "cut_cases": 2, "invalid_cases": 0}
    results["baseline"]["valid_evaluation"]["missing_metrics"] = ["chrf"]
    notes = block(render(record, results, files={}))["notes"]

    for wanted in (
        "GPTの性能とは無関係",
        "カウンセラー 99.1%、同じ組 38.1%",
        "学習後（テスト）: 応答なし 1件、長さの上限で切れた応答 2件",
        "計算していない指標: chrF",
        "除きました: テスト 3件",
        "トークン数は推定",
        "2027-01-14 に停止",
        "CC BY-NC-ND 4.0",
    ):
        assert sum(wanted in note for note in notes) == 1, wanted


def test_what_was_estimated_and_what_was_paid_stand_at_the_top(
    make_sft: MakeSFT, example_file: Path
) -> None:
    sft = make_sft(dataset=str(example_file))
    sft.run_full_pipeline(epochs=2, batch_size=4, baseline=True)
    record = read_json(sft.files["record"])
    results = read_json(sft.files["comprehensive_evaluation"])
    facts = dict(block(render(record, results, files={}))["facts"])

    estimate, cost = record["estimate"]["total_usd"], record["cost"]["total_usd"]
    assert 0 < cost < 1
    assert facts["料金"].startswith(f"見積もり ${estimate:.4f} / 実際 ${cost:.4f}（学習 $")
    assert facts["接続先"] == sft.base_url
    assert facts["ジョブ"] == record["job_id"]
    assert facts["学習の設定"].startswith("エポック 2、バッチサイズ 4、")


@pytest.mark.parametrize(
    ("against_the_baseline", "against_a_constant", "tone"),
    [
        ("better", "better", "better"),
        ("better", "indistinguishable", "open"),
        ("better", "worse", "worse"),
        ("too_few", "better", "open"),
    ],
)
def test_the_verdict_is_good_only_where_every_rival_is_beaten(
    scored: Rehearsed, against_the_baseline: str, against_a_constant: str, tone: str
) -> None:
    results = deepcopy(scored.results)
    results["comparison"]["test"]["verdict"] = against_the_baseline
    results["comparison"]["constant_reference"]["test"]["verdict"] = against_a_constant

    assert block(render(scored.record, results, files={}))["verdict"]["tone"] == tone


# ── The score task ───────────────────────────────────────────────────────────────────────────


def test_the_score_task_shows_items_and_totals(scored: Rehearsed) -> None:
    data = block(scored.page())
    row = data["cases"]["rows"][0]
    response = scored.results["test_evaluation"]["responses"][0]
    real, said = json.loads(response["reference"]), json.loads(response["output"])

    assert data["cases"]["items"] == list(real)
    assert (row["items"], row["total"]) == (list(real.values()), sum(real.values()))
    assert row["tuned"]["items"] == [said[item] for item in real]
    assert row["tuned"]["total"] == sum(said.values())
    assert {part["rival"] for part in data["comparisons"]} == {"基準", "定数予測"}
    assert len(data["verdict"]["lines"]) == 2
    (mse,) = (r for r in data["figures"][0]["rows"] if r["name"] == "total.mse")
    assert mse["constant"] == scored.results["constant_reference"]["test"]["total"]["mse"]["score"]


# ── Without texts ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("task", ["response", "score"])
def test_without_texts_no_word_of_a_dialogue_or_an_answer_is_left(
    task: str, request: pytest.FixtureRequest
) -> None:
    rehearsed: Rehearsed = request.getfixturevalue("scored" if task == "score" else "rehearsed")
    results = deepcopy(rehearsed.results)
    results["test_evaluation"]["responses"][0]["error"] = "「実は父と十年話していません」は…"
    page = render(rehearsed.record, results, files={}, texts=False)
    data = block(page)

    words = [response.get("output", "") for response in responses(results)]
    for split in SPLITS:
        for response in results[split]["responses"]:
            words += [response["reference"], response.get("error", "")]
            words += [m["content"] for m in response["input"] if m["role"] != "system"]
    assert [
        word for word in filter(None, words) if json.dumps(word)[1:-1] in json.dumps(data)
    ] == []
    assert "十年話して" not in page
    assert len(data["cases"]["rows"]) == 4
    assert data["cases"]["rows"][1]["tuned"]["scores"][0] is not None
    assert data["texts"] is False


# ── Runs that are no whole ones ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("facts", "told", "tone"),
    [
        ({}, "まだ評価していません", "none"),
        ({"job_status": "running"}, "学習はまだ終わっていません", "none"),
        ({"job_status": "cancelled"}, "学習は取り消されました。", "failed"),
        (
            {"job_status": "failed", "job_error": {"code": "invalid_file", "message": "line 3"}},
            "学習は失敗しました。理由: invalid_file: line 3",
            "failed",
        ),
    ],
)
def test_a_run_without_an_evaluation_has_a_page_with_its_curve(
    rehearsed: Rehearsed, facts: dict[str, Any], told: str, tone: str
) -> None:
    data = block(render({**rehearsed.record, **facts}, None, files={}))

    assert told in data["verdict"]["lines"][0]
    assert data["verdict"]["tone"] == tone
    assert len(data["curve"]["rows"]) == 10
    assert data["curve"]["epochs"] == (None if facts else 10)  # of what stopped midway
    assert data["cases"]["rows"] == []


def test_a_run_that_has_only_begun_has_a_page(rehearsed: Rehearsed) -> None:
    begun = {k: rehearsed.record[k] for k in ("version", "run_id", "kind", "settings")}
    data = block(render(begun, None, files={}))

    assert data["curve"] is None
    assert data["figures"] == data["comparisons"] == []


def test_the_results_of_an_earlier_version_have_a_page(rehearsed: Rehearsed) -> None:
    results = deepcopy(rehearsed.results)
    for name in ("training", "run_id", "data"):
        results.pop(name, None)
    for split in SPLITS:
        theirs = results["baseline"][split]["responses"]
        results["baseline"][split]["responses"] = [
            {**own, "case_id": case_id} for case_id, own in theirs.items()
        ]
    for response in responses({**results, "baseline": {s: {"responses": {}} for s in SPLITS}}):
        for name in ("topic", "dialogue_score", "dialogue_id", "scores"):
            response.pop(name, None)
    data = block(render({"version": 1, "run_id": "run_1", "settings": {}}, results, files={}))

    assert [row["dialogue"] for row in data["cases"]["rows"]] == ["21", "23", "7", "19"]
    assert all("baseline" in row for row in data["cases"]["rows"])
    assert data["curve"] is None


def test_without_a_baseline_the_page_says_that_nothing_was_compared(rehearsed: Rehearsed) -> None:
    results = {k: v for k, v in rehearsed.results.items() if k not in ("baseline", "comparison")}
    data = block(render(rehearsed.record, results, files={}))

    assert "--baseline" in data["verdict"]["lines"][0]
    assert data["verdict"]["tone"] == "none"


# ── The end of the page ──────────────────────────────────────────────────────────────────────


def test_the_command_that_repeats_a_run_is_what_was_typed(tmp_path: Path) -> None:
    plain = rehearse(tmp_path / "plain", baseline=None, max_test_cases=10)
    scores = rehearse(tmp_path / "scores", baseline=None, max_test_cases=10, task="score")
    typed = rehearse(
        tmp_path / "typed",
        max_samples=22,
        epochs=2,
        batch_size=4,
        seed=3,
        eval_turns="last",
        main_figure="chrf",
        temperature=0.5,
        checkpoint="best",
    )

    assert block(plain.page())["command"] == "openai-sft --rehearse"
    assert block(scores.page())["command"] == "openai-sft --rehearse --task score"
    assert block(typed.page())["command"] == (
        "openai-sft --rehearse --max-samples 22 --seed 3 --epochs 2 --batch-size 4 "
        "--max-test-cases 0 --baseline --eval-turns last --checkpoint best --main-figure chrf "
        "--temperature 0.5"
    )


def test_the_command_names_a_model_of_this_machine_once(rehearsed: Rehearsed) -> None:
    settings = {**rehearsed.record["settings"], "local": "org/m", "model": "org/m"}
    record = {**rehearsed.record, "settings": settings, "rehearsal": False}
    command = block(rehearsed._replace(record=record).page())["command"]

    openai_sft_example.parse(words := shlex.split(command)[1:])
    assert words[words.index("--local") + 1] == "org/m"
    assert "--model" not in words  # which is refused beside it


def test_the_command_names_options_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        openai_sft_example.main(["--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))

    assert {option for option, _, _ in OPTIONS} <= known


def test_the_command_can_be_pasted_whatever_the_names_are(rehearsed: Rehearsed) -> None:
    hostile = poisoned(rehearsed, "a b; rm -rf '$HOME'")
    words = shlex.split(block(hostile.page())["command"])

    assert words[words.index("--dataset") + 1] == "a b; rm -rf '$HOME'"


def test_files_stand_with_their_sums(rehearsed: Rehearsed) -> None:
    data = block(rehearsed.page(files={"train_data_1.jsonl": "0a", "run_1.json": "1b"}))

    assert ["run_1.json", "1b"] in data["files"]
    sums = {data["train"]["sha256"] for data in [rehearsed.record["data"]]}
    assert sums <= {sha256 for _, sha256 in data["files"]}


# ── Sizes ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("count", "most"), [(60, 500_000), (1_318, 12_000_000)])
def test_a_page_is_small_enough_to_send(rehearsed: Rehearsed, count: int, most: int) -> None:
    page = enlarged(rehearsed, count).page()

    assert len(block(page)["cases"]["rows"]) == count
    assert len(page.encode()) < most


def test_what_several_contexts_share_stands_once(rehearsed: Rehearsed) -> None:
    results = deepcopy(rehearsed.results)
    first = results["test_evaluation"]["responses"][0]
    longer = {**first, "case_id": "21:6", "input": [*first["input"], *first["input"][:1]]}
    results["test_evaluation"]["responses"].append(longer)
    data = block(render(rehearsed.record, results, files={}))
    messages, rows = data["cases"]["messages"], data["cases"]["rows"]

    assert messages == block(rehearsed.page())["cases"]["messages"]
    (row,) = (row for row in rows if row["id"] == "21:6")
    assert [messages[place][1] for place in row["context"]] == [
        m["content"] for m in longer["input"]
    ]
