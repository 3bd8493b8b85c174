"""Figures of answers: what sacrebleu says of them, what a pencil says, and how sure they are."""

from __future__ import annotations

import functools
import json
import math
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from endpoint import Rehearsal
from helpers import PROJECT
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from openai_sft import Answer, is_backchannel, score_answers

ALWAYS = {"dist_1", "dist_2", "length_ratio", "backchannel_share"}
WITH_SACREBLEU = {"chrf", "bleu_char"}
WITH_THE_EXTRA = WITH_SACREBLEU | {"rouge_l"}
SHARES = WITH_THE_EXTRA | {"dist_1", "dist_2", "backchannel_share"}

text = st.text(st.sampled_from("はいええ眠れないのですね。、仕事 ab1１"), min_size=1, max_size=14)
spoken = text.filter(str.strip)
answer_lists = st.lists(st.tuples(st.integers(0, 4), spoken, spoken), min_size=1, max_size=10).map(
    lambda rows: [
        Answer(f"{dialogue}:{n}", f"{dialogue}", output, reference)
        for n, (dialogue, output, reference) in enumerate(rows)
    ]
)


def answers(*pairs: tuple[str, str], cases: int = 1) -> list[Answer]:
    """An answer beside the real one for each pair, each in ``cases`` cases of its own dialogue."""
    return [
        Answer(f"d{n}:{case}", f"d{n}", output, reference)
        for n, (output, reference) in enumerate(pairs)
        for case in range(cases)
    ]


def figures(given_answers: list[Answer], seed: int = 42) -> dict[str, dict[str, Any]]:
    metrics, missing = score_answers(given_answers, seed=seed)
    assert missing == []
    return metrics


def scores(*pairs: tuple[str, str]) -> dict[str, float]:
    return {name: figure["score"] for name, figure in figures(answers(*pairs)).items()}


def width(figure: dict[str, Any]) -> float:
    return float(figure["high"] - figure["low"])


def longest_common(one: str, other: str) -> int:
    """Length of the longest common subsequence, as its definition has it."""

    @functools.cache
    def longest(i: int, j: int) -> int:
        if i == len(one) or j == len(other):
            return 0
        taken = 1 + longest(i + 1, j + 1) if one[i] == other[j] else 0
        return max(taken, longest(i + 1, j), longest(i, j + 1))

    return longest(0, 0)


SAID = (
    ("眠れないのですね。", "眠れないのは、つらいですね。"),
    ("はい", "はい"),
    ("お仕事のことが気になるのですね。", "もう少し聞かせてください。"),
    ("ええ、そうですか。上司が①こわい😢", "こわいと感じるのですね。"),
)


# ── sacrebleu's word ─────────────────────────────────────────────────────────────────────────


@given(answer_lists)
@settings(max_examples=25)
def test_chrf_and_bleu_are_what_sacrebleu_says(given_answers: list[Answer]) -> None:
    found = figures(given_answers)
    outputs = [answer.output for answer in given_answers]
    references = [[answer.reference for answer in given_answers]]
    bleu = BLEU(tokenize="char").corpus_score(outputs, references)

    assert found["chrf"]["score"] == pytest.approx(CHRF().corpus_score(outputs, references).score)
    # Where no answer has four characters BLEU is undefined; only there sacrebleu says 0.
    if bleu.totals[3]:
        assert found["bleu_char"]["score"] == pytest.approx(bleu.score)


def test_chrf_and_bleu_of_japanese_answers_are_what_sacrebleu_says() -> None:
    found = scores(*SAID)
    outputs, references = [a for a, _ in SAID], [[b for _, b in SAID]]
    chrf, bleu = CHRF(), BLEU(tokenize="char")

    assert found["chrf"] == pytest.approx(chrf.corpus_score(outputs, references).score)
    assert found["bleu_char"] == pytest.approx(bleu.corpus_score(outputs, references).score)
    assert 0 < found["bleu_char"] < 100


def test_sacrebleus_own_signature_stands_beside_its_figures() -> None:
    found = figures(answers(*SAID))
    chrf, bleu = CHRF(), BLEU(tokenize="char", effective_order=True)
    for metric in (chrf, bleu):
        metric.corpus_score([a for a, _ in SAID], [[b for _, b in SAID]])

    assert found["chrf"]["signature"] == chrf.get_signature().format()
    assert found["bleu_char"]["signature"] == bleu.get_signature().format()
    assert "tok:char" in found["bleu_char"]["signature"]


def test_bleu_of_japanese_words_is_what_sacrebleu_says() -> None:
    pytest.importorskip("MeCab", reason="the extra `all` isn't installed")
    outputs, references = [a for a, _ in SAID], [[b for _, b in SAID]]
    bleu = BLEU(tokenize="ja-mecab", effective_order=True)
    expected = bleu.corpus_score(outputs, references).score

    assert scores(*SAID)["bleu_ja_mecab"] == pytest.approx(expected)
    assert 0 < expected < 100


def test_every_figure_says_where_its_formula_comes_from() -> None:
    found = figures(answers(*SAID))

    assert set(found) - {"bleu_ja_mecab"} == WITH_THE_EXTRA | ALWAYS
    assert all(set(figure) == {"score", "low", "high", "signature"} for figure in found.values())
    assert all(figure["signature"].strip() for figure in found.values())
    assert "Lin 2004" in found["rouge_l"]["signature"]
    assert "Li et al. 2016" in found["dist_1"]["signature"]


# ── A pencil's word ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("said", ["は", "はい", "はい。", "眠れないのですね。", "ok", "😢", "あ b"])
def test_an_identical_pair_scores_100_and_never_0(said: str) -> None:
    found = figures(answers((said, said)))

    for name in WITH_THE_EXTRA | {"length_ratio"}:
        for key in ("score", "low", "high"):
            assert found[name][key] == pytest.approx(100)


@given(st.lists(spoken, min_size=1, max_size=6))
@settings(max_examples=10)
def test_answers_that_are_the_real_ones_score_100(said: list[str]) -> None:
    found = scores(*((one, one) for one in said))

    for name in WITH_THE_EXTRA:
        assert found[name] == pytest.approx(100)


def test_answers_with_nothing_in_common_score_0() -> None:
    found = scores(("あいうえお", "かきくけこ"), ("さし", "たち"))

    assert [found[name] for name in sorted(WITH_THE_EXTRA)] == [0, 0, 0]


def test_rouge_l_is_the_mean_f1_of_the_longest_common_subsequence() -> None:
    first = 100 * 2 * 8 / (8 + 13)  # 眠れないの and ですね are common, in order

    assert scores(("眠れないのですね", "眠れないのは、つらいですね"))["rouge_l"] == (
        pytest.approx(first)
    )
    assert scores(("眠れないのですね", "眠れないのは、つらいですね"), ("う", "え"))["rouge_l"] == (
        pytest.approx(first / 2)
    )


@given(answer_lists)
@settings(max_examples=15)
def test_rouge_l_dist_and_length_ratio_are_their_definitions(given_answers: list[Answer]) -> None:
    found = {name: figure["score"] for name, figure in figures(given_answers).items()}
    pairs = [(answer.output, answer.reference) for answer in given_answers]
    f1 = [2 * longest_common(a, b) / (len(a) + len(b)) for a, b in pairs]

    assert found["rouge_l"] == pytest.approx(100 * sum(f1) / len(f1))
    assert found["length_ratio"] == pytest.approx(
        100 * sum(len(a) for a, _ in pairs) / sum(len(b) for _, b in pairs)
    )
    for n in (1, 2):
        grams = [a[i : i + n] for a, _ in pairs for i in range(len(a) - n + 1)]
        distinct = 100 * len(set(grams)) / len(grams) if grams else 0
        assert found[f"dist_{n}"] == pytest.approx(distinct)


def test_dist_is_the_share_of_distinct_characters_and_pairs_in_all_answers() -> None:
    found = scores(("はいはい", "そう"), ("はい", "そう"))

    assert found["dist_1"] == pytest.approx(100 * 2 / 6)
    assert found["dist_2"] == pytest.approx(100 * 2 / 4)


def test_the_length_ratio_is_of_all_characters_together() -> None:
    assert scores(("あいう", "あいうえおか"), ("あ", "かき"))["length_ratio"] == 50


def test_the_share_of_back_channels_counts_answers_that_are_nothing_else() -> None:
    found = scores(("はい。", "眠れない"), ("ええ", "はい"), ("はい、眠れない", "え"), ("眠", "夢"))

    assert found["backchannel_share"] == 50


@pytest.mark.parametrize(
    "said",
    ["はい", "ええ", "はい。", " はい！\n", "はーい", "うん、うん", "ええ、ええ。", "はいはい"],
)
def test_a_bare_back_channel_is_one_however_it_is_written(said: str) -> None:
    assert is_backchannel(said)


@pytest.mark.parametrize(
    "said", ["はい、眠れません", "いいえ", "。", "", "灰", "ええと", "うんざり"]
)
def test_an_answer_that_says_something_is_no_back_channel(said: str) -> None:
    assert not is_backchannel(said)


# ── How sure they are ────────────────────────────────────────────────────────────────────────


@given(answer_lists)
@settings(max_examples=15)
def test_an_interval_holds_its_score_and_stays_on_the_scale(given_answers: list[Answer]) -> None:
    for name, figure in figures(given_answers).items():
        assert figure["low"] - 1e-9 <= figure["score"] <= figure["high"] + 1e-9
        assert all(math.isfinite(figure[key]) for key in ("score", "low", "high"))
        if name in SHARES:
            assert figure["low"] >= -1e-9
            assert figure["high"] <= 100 + 1e-9


def test_the_interval_of_dist_stays_on_the_scale_where_every_character_is_new() -> None:
    found = figures(answers(("あ", "い"), ("い", "い")))["dist_1"]

    assert found["score"] == 100
    assert 0 <= found["low"] <= 100 == found["high"]


def test_the_interval_of_a_share_is_the_textbooks() -> None:
    found = figures(answers(*[("はい", "眠れない"), ("眠れますか", "眠れない")] * 200))
    textbook = 2 * 1.96 * math.sqrt(0.5 * 0.5 / 400) * 100

    assert width(found["backchannel_share"]) == pytest.approx(textbook, rel=0.1)


def test_the_interval_of_dist_is_196_deviations_of_resampled_answers_each_way() -> None:
    rng = random.Random(5)
    said = [
        "".join(rng.choices("はいええ眠れないのですね仕事", k=rng.randint(1, 9))) for _ in range(60)
    ]
    resampled = [rng.choices(said, k=60) for _ in range(2000)]
    values = [100 * len(set("".join(one))) / len("".join(one)) for one in resampled]
    found = figures(answers(*((one, "はい") for one in said)))["dist_1"]

    assert width(found) == pytest.approx(2 * 1.96 * statistics.stdev(values), rel=0.1)


def test_the_same_seed_gives_the_same_figures_and_another_seed_other_intervals() -> None:
    given_answers = answers(*SAID)
    first, again, other = (figures(given_answers, seed) for seed in (1, 1, 2))

    assert first == again
    assert first["chrf"]["score"] == other["chrf"]["score"]
    assert (first["chrf"]["low"], first["chrf"]["high"]) != (
        other["chrf"]["low"],
        other["chrf"]["high"],
    )


def test_more_dialogues_make_the_interval_narrower() -> None:
    few, many = figures(answers(*SAID * 3)), figures(answers(*SAID * 30))

    for name in WITH_THE_EXTRA | {"length_ratio", "backchannel_share"}:
        assert many[name]["score"] == pytest.approx(few[name]["score"])
        assert width(many[name]) < 0.5 * width(few[name])


def test_more_cases_of_the_same_dialogues_do_not() -> None:
    one, ten = figures(answers(*SAID)), figures(answers(*SAID, cases=10))

    for name in ("chrf", "rouge_l", "length_ratio", "backchannel_share"):
        for key in ("score", "low", "high"):
            assert ten[name][key] == pytest.approx(one[name][key])


def test_the_cases_of_one_dialogue_tell_nothing_about_others() -> None:
    alone = [Answer(f"d:{n}", "d", output, real) for n, (output, real) in enumerate(SAID)]

    assert all(width(figure) == pytest.approx(0) for figure in figures(alone).values())


def test_the_figures_can_be_written_as_json() -> None:
    metrics = figures(answers(*SAID))

    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


def test_of_no_answers_there_are_no_figures() -> None:
    assert score_answers([]) == ({}, [])


# ── Without the extra ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("gone", "missing"), [("sacrebleu", WITH_SACREBLEU), ("rapidfuzz", {"rouge_l"})]
)
def test_a_missing_package_holds_back_its_own_figures_only(
    monkeypatch: pytest.MonkeyPatch, gone: str, missing: set[str]
) -> None:
    for name in (gone, *(name for name in sys.modules if name.startswith(f"{gone}."))):
        monkeypatch.setitem(sys.modules, name, None)
    metrics, named = score_answers(answers(*SAID))

    assert set(named) == missing
    assert set(metrics) - {"bleu_ja_mecab"} == (WITH_THE_EXTRA | ALWAYS) - missing


BARE = """
import json, sys
from openai_sft import OpenAISFT
sys.path.append(sys.argv[1])
from helpers import examples
for valid in (examples(2), []):
    with OpenAISFT("k", base_url=sys.argv[2], output_dir="out") as sft:
        results = sft.evaluate_model_comprehensive(
            sft.model, examples(3), valid, baseline="gpt-4.1-2025-04-14"
        )
        sft.save_results(results)
        print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def bare(
    vocabulary: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[dict[str, Any]], str]:
    """Two evaluations, with and without validation data, where the extra isn't installed."""
    folder = tmp_path_factory.mktemp("bare")
    for name in ("sacrebleu", "rapidfuzz"):
        (folder / f"{name}.py").write_text("raise ImportError\n", "utf-8")
    environment = {k: v for k, v in os.environ.items() if not k.upper().endswith("_PROXY")}
    with Rehearsal() as endpoint:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", BARE, str(PROJECT / "tests"), endpoint.url],
            env={
                **environment,
                "PYTHONPATH": os.pathsep.join([str(folder), str(PROJECT)]),
                "PYTHONIOENCODING": "utf-8",
            },
            cwd=folder,
            capture_output=True,
            encoding="utf-8",
            timeout=60,
        )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


Bare = tuple[list[dict[str, Any]], str]


def test_without_the_extra_the_answers_are_still_collected(bare: Bare) -> None:
    for results, valid in zip(bare[0], (2, 0), strict=True):
        assert results["summary"]["test_cases_evaluated"] == 3
        assert results["summary"]["valid_cases_evaluated"] == valid
        assert all(response["output"] for response in results["test_evaluation"]["responses"])


def test_without_the_extra_the_other_figures_are_there_and_compared(bare: Bare) -> None:
    for results in bare[0]:
        part = results["test_evaluation"]

        assert set(part["metrics"]) - {"bleu_ja_mecab"} == ALWAYS
        assert set(part["missing_metrics"]) == WITH_THE_EXTRA
        assert set(results["comparison"]["test"]["figures"]) - {"bleu_ja_mecab"} == ALWAYS


def test_without_the_extra_it_is_said_once_what_is_missing_and_how_to_get_it(bare: Bare) -> None:
    told = [line for line in bare[1].splitlines() if "pip install 'openai-sft[eval]'" in line]

    assert len(told) == 2  # once in each of the two evaluations
    for line in told:
        assert all(label in line for label in ("chrF", "BLEU（文字）", "ROUGE-L"))
