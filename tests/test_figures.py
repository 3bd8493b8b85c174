"""Figures of answers: what sacrebleu says of them, what a pencil says, and how sure they are."""

from __future__ import annotations

import functools
import json
import math
import os
import random
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from endpoint import Rehearsal
from helpers import PROJECT
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from openai_sft import (
    DIST_DRAWN,
    Answer,
    Spread,
    chi2_interval,
    compare_answers,
    is_backchannel,
    jackknife,
    score_answers,
    student_t,
    t_interval,
    wilson_interval,
)

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


def nfkc(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


def figures(given_answers: list[Answer]) -> dict[str, dict[str, Any]]:
    metrics, missing = score_answers(given_answers)
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
    outputs = [nfkc(answer.output) for answer in given_answers]
    references = [[nfkc(answer.reference) for answer in given_answers]]
    bleu = BLEU(tokenize="char").corpus_score(outputs, references)

    assert found["chrf"]["score"] == pytest.approx(CHRF().corpus_score(outputs, references).score)
    # Where no answer has four characters BLEU is undefined; only there sacrebleu says 0.
    if bleu.totals[3]:
        assert found["bleu_char"]["score"] == pytest.approx(bleu.score)


def test_chrf_and_bleu_of_japanese_answers_are_what_sacrebleu_says() -> None:
    found = scores(*SAID)
    outputs, references = [nfkc(a) for a, _ in SAID], [[nfkc(b) for _, b in SAID]]
    chrf, bleu = CHRF(), BLEU(tokenize="char")

    assert found["chrf"] == pytest.approx(chrf.corpus_score(outputs, references).score)
    assert found["bleu_char"] == pytest.approx(bleu.corpus_score(outputs, references).score)
    assert 0 < found["bleu_char"] < 100


def test_sacrebleus_own_signature_stands_beside_its_figures() -> None:
    found = figures(answers(*SAID))
    chrf, bleu = CHRF(), BLEU(tokenize="char", effective_order=True)
    for metric in (chrf, bleu):
        metric.corpus_score([a for a, _ in SAID], [[b for _, b in SAID]])

    assert found["chrf"]["signature"] == f"{chrf.get_signature().format()}|norm:NFKC"
    assert found["bleu_char"]["signature"] == f"{bleu.get_signature().format()}|norm:NFKC"
    assert "tok:char" in found["bleu_char"]["signature"]


def test_bleu_of_japanese_words_is_what_sacrebleu_says() -> None:
    pytest.importorskip("MeCab", reason="the extra `all` isn't installed")
    outputs, references = [nfkc(a) for a, _ in SAID], [[nfkc(b) for _, b in SAID]]
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
    assert "Hurlbert 1971" in found["dist_2"]["signature"]
    assert all("NFKC" in figure["signature"] for figure in found.values())


# ── A pencil's word ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("said", ["は", "はい", "はい。", "眠れないのですね。", "ok", "😢", "あ b"])
def test_an_identical_pair_scores_100_and_never_0(said: str) -> None:
    alone, ten = figures(answers((said, said))), figures(answers(*[(said, said)] * 10))

    for name in WITH_THE_EXTRA | {"length_ratio"}:
        assert alone[name]["score"] == pytest.approx(100)
        for key in ("score", "low", "high"):
            assert ten[name][key] == pytest.approx(100)


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
def test_rouge_l_and_length_ratio_are_their_definitions(given_answers: list[Answer]) -> None:
    found = {name: figure["score"] for name, figure in figures(given_answers).items()}
    pairs = [(nfkc(answer.output), nfkc(answer.reference)) for answer in given_answers]
    f1 = [2 * longest_common(a, b) / (len(a) + len(b)) for a, b in pairs]

    assert found["rouge_l"] == pytest.approx(100 * sum(f1) / len(f1))
    assert found["length_ratio"] == pytest.approx(
        100 * sum(len(a) for a, _ in pairs) / sum(len(b) for _, b in pairs)
    )


def test_what_looks_the_same_is_the_same_in_every_figure() -> None:
    wide, narrow = ("ｶﾞﾝﾊﾞﾘ１００", "ｶﾞﾝﾊﾞﾘ１００"), ("ガンバリ100", "ガンバリ100")
    crossed = scores((wide[0], narrow[1]))

    assert crossed == scores(wide) == scores(narrow)
    assert crossed["rouge_l"] == crossed["length_ratio"] == pytest.approx(100)


# ── Dist at equal length ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("n", [1, 2])
def test_dist_is_what_drawing_that_many_of_all_answers_gives_on_average(n: int) -> None:
    rng = random.Random(3)
    said = [
        "".join(rng.choices("はいええ眠れないのですね", k=rng.randint(4, 30))) for _ in range(9)
    ]
    grams = [one[i : i + n] for one in said for i in range(len(one) - n + 1)]
    drawn = [len(set(rng.sample(grams, DIST_DRAWN))) for _ in range(3000)]
    expected = 100 * sum(drawn) / len(drawn) / DIST_DRAWN

    assert scores(*((one, "はい") for one in said))[f"dist_{n}"] == pytest.approx(
        expected, rel=0.01
    )


def test_dist_is_by_hypergeometric_chances() -> None:
    counts = {"あ": 40, "い": 20, "う": 1}
    text = "".join(character * count for character, count in counts.items())
    missed = [
        math.comb(61 - count, DIST_DRAWN) / math.comb(61, DIST_DRAWN) for count in (40, 20, 1)
    ]
    expected = 100 * sum(1 - chance for chance in missed) / DIST_DRAWN

    assert scores((text, "はい"))["dist_1"] == pytest.approx(expected)


def test_of_too_few_characters_there_is_no_dist_and_no_error() -> None:
    found = figures(answers(("は" * (DIST_DRAWN - 1), "はい")))

    assert (found["dist_1"]["score"], found["dist_1"]["low"]) == (None, None)
    assert scores(("は" * DIST_DRAWN, "はい"))["dist_1"] == pytest.approx(100 / DIST_DRAWN)


def test_the_same_answers_cut_in_half_come_out_no_better_in_dist() -> None:
    rng = random.Random(1)
    words = ["眠れない", "仕事", "家族", "不安", "つらい", "のですね", "もう少し", "聞かせて", "。"]
    said = ["".join(rng.choices(words, k=rng.randint(4, 12))) for _ in range(80)]
    whole = answers(*((one, "はい") for one in said))
    half = answers(*((one[: len(one) // 2], "はい") for one in said))
    compared = compare_answers(half, whole)["figures"]

    for name in ("dist_1", "dist_2"):
        assert compared[name]["verdict"] == "indistinguishable"
        assert compared[name]["difference"] == pytest.approx(0, abs=2)


def test_one_answer_for_all_is_less_varied_than_answers_of_many() -> None:
    rng = random.Random(1)
    words = ["眠れない", "仕事", "家族", "不安", "つらい", "のですね", "もう少し", "聞かせて", "。"]
    varied = answers(*(("".join(rng.choices(words, k=6)), "はい") for _ in range(60)))
    always = [answer._replace(output="そうなんですね") for answer in varied]
    compared = compare_answers(always, varied)["figures"]

    assert compared["dist_1"]["verdict"] == compared["dist_2"]["verdict"] == "worse"


# ── Lengths and back-channels ────────────────────────────────────────────────────────────────


def test_the_length_ratio_is_of_all_characters_together() -> None:
    assert scores(("あいう", "あいうえおか"), ("あ", "かき"))["length_ratio"] == 50


def test_the_share_of_back_channels_counts_answers_that_are_nothing_else() -> None:
    found = scores(("はい。", "眠れない"), ("ええ", "はい"), ("はい、眠れない", "え"), ("眠", "夢"))

    assert found["backchannel_share"] == 50


@pytest.mark.parametrize(
    "said",
    [
        *(
            "はい",
            "ええ",
            "はい。",
            " はい！\n",
            "はーい",
            "うん、うん",
            "ええ、ええ。",
            "はいはい",
        ),
        *(
            "そうなのですね。",
            "そうなんですね",
            "ハイ",
            "ﾊｲ。",
            "成る程。",
            "ええ、そうなのですか？",
        ),
    ],
)
def test_a_bare_back_channel_is_one_however_it_is_written(said: str) -> None:
    assert is_backchannel(said)


@pytest.mark.parametrize(
    "said", ["はい、眠れません", "いいえ", "。", "", "灰", "ええと", "うんざり"]
)
def test_an_answer_that_says_something_is_no_back_channel(said: str) -> None:
    assert not is_backchannel(said)


# ── Answers that are none ────────────────────────────────────────────────────────────────────


def test_an_answer_that_failed_scores_0_by_what_it_should_have_said() -> None:
    given_answers = answers(*SAID)
    failed = [*given_answers[:2], *(a._replace(output="", fault="空") for a in given_answers[2:])]
    found, whole = figures(failed), figures(given_answers[:2])

    assert found["rouge_l"]["score"] == pytest.approx(whole["rouge_l"]["score"] / 2)
    assert found["chrf"]["score"] < whole["chrf"]["score"]
    assert found["bleu_char"]["score"] < whole["bleu_char"]["score"]
    assert found["length_ratio"]["score"] == pytest.approx(whole["length_ratio"]["score"])
    assert found["backchannel_share"]["score"] == whole["backchannel_share"]["score"] == 50


def test_what_a_failed_answer_had_said_does_not_count() -> None:
    failed = [answer._replace(output=answer.reference, fault="拒否") for answer in answers(*SAID)]
    found = figures(failed)

    assert found["rouge_l"]["score"] == found["chrf"]["score"] == found["bleu_char"]["score"] == 0
    assert found["length_ratio"]["score"] is found["dist_1"]["score"] is None


# ── How sure they are ────────────────────────────────────────────────────────────────────────


@given(answer_lists)
@settings(max_examples=15)
def test_an_interval_holds_its_score_and_stays_on_the_scale(given_answers: list[Answer]) -> None:
    ten = [
        answer._replace(dialogue_id=f"{answer.dialogue_id}/{n}", case_id=f"{answer.case_id}/{n}")
        for answer in given_answers
        for n in range(10)
    ]
    for name, figure in figures(ten).items():
        if figure["low"] is None:  # of a few characters there is no Dist
            assert name in ("dist_1", "dist_2")
            continue
        assert figure["low"] - 1e-9 <= figure["score"] <= figure["high"] + 1e-9
        assert all(math.isfinite(figure[key]) for key in ("score", "low", "high"))
        if name in SHARES:
            assert figure["low"] >= -1e-9
            assert figure["high"] <= 100 + 1e-9


@pytest.mark.parametrize("dialogues", [1, 9, 10])
def test_below_ten_dialogues_there_is_no_interval(dialogues: int) -> None:
    given_answers = [
        Answer(f"d{n % dialogues}:{n}", f"d{n % dialogues}", *SAID[n % 4]) for n in range(40)
    ]
    found = figures(given_answers)

    for name in WITH_THE_EXTRA | {"length_ratio", "backchannel_share"}:
        assert (found[name]["low"] is None) == (found[name]["high"] is None) == (dialogues < 10)


def test_answers_of_a_group_are_drawn_together() -> None:
    given_answers = [
        Answer(f"d{n}:1", f"d{n}", *SAID[n % 4], group=f"counsellor {n % 12}") for n in range(48)
    ]
    grouped, apart = (
        figures(given_answers),
        figures([a._replace(group=None) for a in given_answers]),
    )
    nine = figures([a._replace(group=f"{n % 9}") for n, a in enumerate(given_answers)])

    assert grouped["rouge_l"]["score"] == pytest.approx(apart["rouge_l"]["score"])
    assert width(grouped["rouge_l"]) > 1.2 * width(apart["rouge_l"])
    assert nine["rouge_l"]["low"] is None


@pytest.mark.parametrize("freedom", [5, 9, 19, 49, 658])
@pytest.mark.parametrize("probability", [0.8, 0.975])
def test_the_quantiles_of_t_are_scipys(freedom: int, probability: float) -> None:
    scipy_stats = pytest.importorskip("scipy.stats", reason="scipy isn't installed")

    assert student_t(probability, freedom) == pytest.approx(
        scipy_stats.t.ppf(probability, freedom), abs=2e-3
    )


def test_the_quantiles_of_t_are_the_tables() -> None:
    assert student_t(0.975, 9) == pytest.approx(2.262, abs=1e-3)
    assert student_t(0.975, 19) == pytest.approx(2.093, abs=1e-3)
    assert student_t(0.8, 9) == pytest.approx(0.883, abs=1e-3)
    assert student_t(0.975, 5) == pytest.approx(2.571, abs=2e-3)


def test_the_jackknifes_error_of_a_mean_is_the_textbooks() -> None:
    values = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    without_each = np.array([(values.sum() - value) / 4 for value in values])

    assert jackknife(without_each).error == pytest.approx(values.std(ddof=1) / math.sqrt(5))
    assert t_interval(6.2, Spread(1.0, 9)) == pytest.approx((6.2 - 2.262, 6.2 + 2.262), abs=1e-3)


def test_an_error_that_rests_on_a_few_dialogues_is_known_with_fewer_degrees_of_freedom() -> None:
    even = jackknife(np.array([0.0, 1.0] * 10))
    tailed = jackknife(np.array([0.0] * 17 + [1.0, 2.0, 6.0]))
    values = np.array([0.0] * 17 + [1.0, 2.0, 6.0])
    kurtosis = ((values - values.mean()) ** 4).mean() / values.var() ** 2

    assert even.freedom == 19
    assert tailed.freedom == pytest.approx(max(5, 40 / (kurtosis - 1)))
    assert math.isnan(jackknife(np.array([1.0, math.nan])).error)


def test_the_interval_of_a_share_is_wilsons_with_ts_quantile() -> None:
    count, share, z = 40, 0.5, student_t(0.975, 39)
    error = math.sqrt(share * (1 - share) / count)  # as single draws have it
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)

    assert wilson_interval(share, Spread(error, 39), 40) == pytest.approx((0.5 - half, 0.5 + half))
    assert wilson_interval(0.0, Spread(0.0, 39), 40)[0] == 0
    assert 0.05 < wilson_interval(0.0, Spread(0.0, 39), 40)[1] < 0.15
    # twice the error is as of a quarter of the answers
    wide = wilson_interval(share, Spread(2 * error, 39), 40)
    assert wide[1] > wilson_interval(share, Spread(error, 39), 40)[1]


def test_the_interval_of_a_mean_of_squares_is_that_of_chi_square() -> None:
    low, high = chi2_interval(1.0, Spread(math.sqrt(2 / 50), 1e6), 25.0)  # 50 degrees of freedom

    assert (low, high) == pytest.approx((50 / 71.42, 50 / 32.36), rel=1e-3)
    assert chi2_interval(1.0, Spread(2.0, 9), 25.0)[1] == 25


def test_the_interval_of_a_share_is_the_textbooks() -> None:
    found = figures(answers(*[("はい", "眠れない"), ("眠れますか", "眠れない")] * 200))
    textbook = 2 * 1.96 * math.sqrt(0.5 * 0.5 / 400) * 100

    assert width(found["backchannel_share"]) == pytest.approx(textbook, rel=0.02)


def test_the_interval_of_a_mean_is_ts_on_the_scale_of_logarithms() -> None:
    given_answers = answers(*[SAID[0], ("眠れますか", "眠れない")] * 50)
    found = figures(given_answers)["rouge_l"]
    values = [
        figure["rouge_l"]["score"] for one in given_answers[:2] for figure in [figures([one])]
    ]
    error = abs(values[0] - values[1]) / 2 / math.sqrt(99)

    assert found["score"] == pytest.approx(sum(values) / 2)
    assert math.log(found["high"] / found["low"]) == pytest.approx(
        2 * student_t(0.975, 99) * error / found["score"], rel=0.01
    )


def test_more_dialogues_make_the_interval_narrower() -> None:
    few, many = figures(answers(*SAID * 3)), figures(answers(*SAID * 30))

    for name in WITH_THE_EXTRA | {"length_ratio", "backchannel_share"}:
        assert many[name]["score"] == pytest.approx(few[name]["score"])
        assert width(many[name]) < 0.5 * width(few[name])


def test_more_cases_of_the_same_dialogues_do_not() -> None:
    one, ten = figures(answers(*SAID * 3)), figures(answers(*SAID * 3, cases=10))

    for name in ("chrf", "rouge_l", "length_ratio", "backchannel_share"):
        for key in ("score", "low", "high"):
            assert ten[name][key] == pytest.approx(one[name][key])


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
