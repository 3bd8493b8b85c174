"""Is the tuned model better? Only where swapping whole dialogues seldom makes such a difference."""

from __future__ import annotations

import itertools
import json
import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openai_sft import (
    SWAPS,
    Answer,
    Figure,
    Spread,
    compare_answers,
    compare_figures,
    detectable_difference,
    holm,
    make_response_figures,
    randomise,
    score_answers,
)

QUALITY = ("chrf", "bleu_char", "rouge_l")
NEUTRAL = ("length_ratio", "backchannel_share")
REAL = "それはとてもおつらいですね。眠れない日が続いているのですね。"
OTHER = "ご家族とは最近どのように過ごされていますか、教えてください。"
SWAPPED = {
    **{"better": "worse", "worse": "better", "higher": "lower", "lower": "higher"},
    **{"indistinguishable": "indistinguishable", "too_few": "too_few"},
}

Model = Callable[[random.Random, str], str]


def reference(rng: random.Random) -> str:
    words = [
        "眠れない",
        "仕事",
        "家族",
        "不安",
        "つらい",
        "ですね",
        "のは",
        "もう少し",
        "聞かせて",
        "。",
    ]
    return "".join(rng.choices(words, k=rng.randint(2, 9)))


def listener(rng: random.Random, real: str) -> str:
    """A model that has learned something: about two characters of three are the real ones."""
    return "".join(c for c in real if rng.random() < 0.67) or "は"


def stranger(rng: random.Random, _: str) -> str:
    """A model that says what anybody may hear."""
    return reference(rng)


def halfway(rng: random.Random, real: str) -> str:
    """A model that has learned a little."""
    return listener(rng, real) if rng.random() < 0.15 else reference(rng)


def ask(model: Model, count: int, seed: int = 1, cases: int = 1, luck: int = 0) -> list[Answer]:
    """The model's answers to ``count`` cases; the same cases for every model and luck."""
    rng, answers = random.Random(f"{model.__name__}{seed}{luck}"), []
    for n in range(count):
        real = reference(random.Random(f"{seed}/{n}"))
        answers.append(Answer(f"d{n // cases}:{n}", f"d{n // cases}", model(rng, real), real))
    return answers


def said(*outputs: str, real: str = REAL) -> list[Answer]:
    return [Answer(f"d{n}:1", f"d{n}", output, real) for n, output in enumerate(outputs)]


def figures(tuned: Sequence[Answer], baseline: Sequence[Answer]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = compare_answers(tuned, baseline)["figures"]
    return found


def verdicts(tuned: Sequence[Answer], baseline: Sequence[Answer]) -> dict[str, str]:
    return {name: figure["verdict"] for name, figure in figures(tuned, baseline).items()}


def ratio(totals: Any) -> Any:
    return totals[:, 0] / totals[:, 1]


def means(one: Sequence[float], other: Sequence[float]) -> Figure:
    """A figure that is the mean of one value a dialogue."""
    sums = tuple(np.array([[value, 1.0] for value in side]) for side in (one, other))
    return Figure("mean", "平均", 1, "", sums, ratio, (one, other))


def told(tuned: Sequence[Answer], baseline: Sequence[Answer], main: str = "rouge_l") -> str:
    return str(compare_answers(tuned, baseline, main=main)["sentence"])


# ── The test ─────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=1, max_size=7))
def test_p_is_the_share_of_swaps_with_a_difference_at_least_as_great(
    pairs: list[tuple[int, int]],
) -> None:
    deltas = [one - other for one, other in pairs]
    swapped = [
        sum(sign * delta for sign, delta in zip(signs, deltas, strict=True))
        for signs in itertools.product((1, -1), repeat=len(deltas))
    ]
    extreme = sum(abs(total) >= abs(sum(deltas)) for total in swapped)
    one, other = zip(*pairs, strict=True)

    assert randomise(means(one, other), 1) == pytest.approx(extreme / len(swapped))


def test_of_many_dialogues_that_many_swaps_are_drawn_and_the_sample_counts_as_one() -> None:
    clear = randomise(means([1.0] * 40, [0.0] * 40), 1)

    assert clear == 1 / (1 + SWAPS)


def test_p_of_a_mean_is_near_that_of_students_t() -> None:
    scipy_stats = pytest.importorskip("scipy.stats", reason="scipy isn't installed")
    rng = np.random.default_rng(4)
    one, other = rng.normal(0.3, 1, 60), rng.normal(0, 1, 60)

    assert randomise(means(one.tolist(), other.tolist()), 1) == pytest.approx(
        scipy_stats.ttest_rel(one, other).pvalue, abs=0.02
    )


def test_swaps_come_again_with_the_same_seed() -> None:
    rng = random.Random(1)
    figure = means([rng.gauss(0.2, 1) for _ in range(40)], [rng.gauss(0, 1) for _ in range(40)])

    assert randomise(figure, 1) == randomise(figure, 1) != randomise(figure, 2)


@pytest.mark.parametrize("name", ["chrf", "bleu_char"])
@pytest.mark.parametrize("seed", range(3))
def test_p_is_near_that_of_sacrebleus_own_paired_approximate_randomisation(
    name: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    significance = pytest.importorskip("sacrebleu.significance")
    metrics = pytest.importorskip("sacrebleu.metrics")
    monkeypatch.setenv("SACREBLEU_SEED", "1")
    one, other = ask(halfway, 60, seed), ask(stranger, 60, seed)
    references = [[answer.reference for answer in one]]
    metric = (
        metrics.CHRF(references=references)
        if name == "chrf"
        else metrics.BLEU(tokenize="char", effective_order=True, references=references)
    )
    systems = [(who, [a.output for a in given]) for who, given in (("b", other), ("t", one))]
    _, scores = significance.PairedTest(
        systems, {name: metric}, references=None, test_type="ar", n_samples=SWAPS
    )()
    rival, score = next(results for key, results in scores.items() if key != "System")
    found = figures(one, other)[name]

    assert found["tuned"] == pytest.approx(score.score)
    assert found["baseline"] == pytest.approx(rival.score)
    assert found["p_value"] == pytest.approx(score.p_value, abs=0.025)


def test_answers_of_one_dialogue_are_swapped_together() -> None:
    rng, one, other = random.Random(6), [], []
    for n, case in itertools.product(range(12), range(10)):
        good = random.Random(f"{n}").random() < 0.6  # of the dialogue, in all of its cases
        for answers, hit in ((one, good), (other, not good)):
            output = REAL[: rng.randint(12, 20)] if hit else "はい"
            answers.append(Answer(f"d{n}:{case}", f"d{n}", output, REAL))
    apart = [
        [answer._replace(dialogue_id=answer.case_id) for answer in answers]
        for answers in (one, other)
    ]

    assert figures(*apart)["rouge_l"]["p_value"] < 0.05
    assert figures(one, other)["rouge_l"]["p_value"] > 0.2


def test_answers_of_one_group_are_swapped_together() -> None:
    one, other = ask(listener, 40), ask(stranger, 40)
    alone = compare_answers(one, other, main="rouge_l")
    grouped = compare_answers(
        *([a._replace(group=f"{n % 5}") for n, a in enumerate(side)] for side in (one, other)),
        main="rouge_l",
    )

    assert (alone["dialogues"], grouped["dialogues"]) == (40, 5)
    assert (alone["verdict"], grouped["verdict"]) == ("better", "too_few")


def test_where_nothing_differs_no_number_of_cases_a_dialogue_makes_a_difference() -> None:
    found = [
        figures(ask(stranger, 60, seed, cases=5), ask(stranger, 60, seed, cases=5, luck=1))
        for seed in range(40)
    ]

    assert sum(one["rouge_l"]["p_value"] < 0.05 for one in found) <= 5


# ── Several figures ──────────────────────────────────────────────────────────────────────────


def test_holm_multiplies_the_least_p_by_their_number_and_keeps_the_order() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1, 1]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=9))
def test_an_adjusted_p_is_never_smaller_and_the_order_stays(ps: list[float]) -> None:
    adjusted = holm(ps)
    ordered = [after for _, after in sorted(zip(ps, adjusted, strict=True))]

    assert all(p <= after <= 1 for p, after in zip(ps, adjusted, strict=True))
    assert ordered == sorted(ordered)
    assert not ps or min(adjusted) == pytest.approx(min(1, len(ps) * min(ps)))


def test_details_are_judged_by_the_adjusted_p_and_the_main_figure_by_its_own() -> None:
    one, other = [1.0] * 27 + [-1.0] * 13, [0.0] * 40  # p is .038
    p = randomise(means(one, other), 1)
    assert 0.01 < p < 0.05
    many = [Figure(f"m{n}", "", 1, "", means(one, other).sums, ratio) for n in range(6)]
    found = compare_figures([*many, means(one, other)], seed=1, main="mean")

    assert found["verdict"] == found["figures"]["mean"]["verdict"] == "better"
    assert found["figures"]["m0"]["p_value"] == pytest.approx(p)
    assert found["figures"]["m0"]["p_adjusted"] == pytest.approx(min(1, 7 * p))
    assert found["figures"]["m0"]["verdict"] == "indistinguishable"


def test_among_many_figures_of_equal_models_hardly_ever_one_is_told_apart() -> None:
    pairs = [(ask(stranger, 30, seed), ask(stranger, 30, seed, luck=1)) for seed in range(40)]
    wrong = [pair for pair in pairs if set(verdicts(*pair).values()) - {"indistinguishable"}]

    assert len(wrong) <= 4


# ── The verdict ──────────────────────────────────────────────────────────────────────────────


def test_five_dialogues_are_too_few_however_clear_and_it_is_said() -> None:
    found = compare_answers(said(*[REAL] * 5), said(*[OTHER] * 5), main="chrf")

    assert found["figures"]["chrf"]["p_value"] == pytest.approx(2 / 2**5)
    assert found["verdict"] == found["figures"]["chrf"]["verdict"] == "too_few"
    assert "件数が少なすぎる" in found["sentence"]
    assert "区別できない" in found["sentence"]
    assert "p=0.062" in found["sentence"]


def test_six_are_enough_where_all_are_won() -> None:
    found = compare_answers(said(*[REAL] * 6), said(*[OTHER] * 6), main="chrf")

    assert found["figures"]["chrf"]["p_value"] == pytest.approx(2 / 2**6)
    assert found["verdict"] == "better"


def test_a_smaller_mean_error_is_found_although_most_cases_are_lost() -> None:
    rng = random.Random(1)
    one = [0.9 if rng.random() < 0.3 else 0.2 for _ in range(400)]
    other = [0.3] * 400  # wins in 7 of 10 cases, and is worse on average
    found = compare_figures([means(one, other)], seed=1, main="mean")

    assert found["figures"]["mean"]["losses"] > found["figures"]["mean"]["wins"]
    assert found["verdict"] == "better"


def test_the_verdict_names_the_figure_that_was_named_before() -> None:
    tuned, baseline = ask(listener, 40), ask(stranger, 40)
    found = compare_answers(tuned, baseline, main="chrf")

    assert found["main_figure"] == "chrf"
    assert found["sentence"].startswith("主指標のchrFは基準のモデルより良くなりました")
    assert "sentence" not in compare_answers(tuned, baseline)


def test_where_the_main_figure_cannot_be_computed_there_is_no_verdict_and_it_is_said() -> None:
    tuned, baseline = ask(listener, 40), ask(stranger, 40)
    figures_without = [
        f for f in make_response_figures([tuned, baseline])[0] if f.name != "rouge_l"
    ]
    found = compare_figures(figures_without, seed=1, main="rouge_l")

    assert found["verdict"] is None
    assert "ROUGE-L" in found["sentence"]
    assert "判定しません" in found["sentence"]


def test_what_cannot_be_told_apart_comes_with_what_could_have_been() -> None:
    found = compare_answers(ask(stranger, 30), ask(stranger, 30, luck=1), main="rouge_l")
    figure = found["figures"]["rouge_l"]

    assert found["verdict"] == "indistinguishable"
    assert "と区別できない" in found["sentence"]
    assert f"80%の確率で見つかるのは、{figure['detectable']:.2f}以上の差" in found["sentence"]


def test_the_detectable_difference_is_found_in_80_of_100_samples() -> None:
    rng, found = random.Random(3), 0
    for _ in range(150):
        deltas = [rng.gauss(0, 1) for _ in range(40)]
        # what is found is a true difference of this size beside such noise
        least = detectable_difference(Spread(1 / 40**0.5, 39))
        assert least is not None
        found += randomise(means([delta + least for delta in deltas], [0.0] * 40), 1) < 0.05

    assert 0.7 < found / 150 < 0.9


def test_the_error_of_a_difference_is_that_of_pairs() -> None:
    rng = random.Random(3)
    other = [rng.gauss(0, 10) for _ in range(40)]
    deltas = [rng.gauss(0, 1) for _ in range(40)]
    one = [a + b for a, b in zip(other, deltas, strict=True)]
    figure = compare_figures([means(one, other)], seed=1)["figures"]["mean"]
    error = statistics.stdev(deltas) / 40**0.5

    assert figure["detectable"] == pytest.approx(error * (2.023 + 0.851), rel=2e-2)
    assert figure["high"] - figure["low"] == pytest.approx(2 * 2.023 * error, rel=2e-2)


def test_a_model_known_to_be_better_is_called_better_at_100_cases() -> None:
    found = figures(ask(listener, 100), ask(stranger, 100))

    for name in QUALITY:
        assert found[name]["verdict"] == "better"
        assert "良くなりました" in told(ask(listener, 100), ask(stranger, 100), name)


@pytest.mark.parametrize("count", [10, 100])
def test_an_identical_model_is_not_told_apart(count: int) -> None:
    answers = ask(listener, count)
    found = figures(answers, answers)

    assert set(found) >= {*QUALITY, *NEUTRAL, "dist_1", "dist_2"}
    assert "どの対話でも差が同じです" in told(answers, answers)
    for name, figure in found.items():
        assert figure["verdict"] == "indistinguishable"
        assert (figure["difference"], figure["low"], figure["high"]) == (0, 0, 0)
        if not name.startswith("dist_"):
            assert (figure["wins"], figure["losses"], figure["ties"]) == (0, 0, count)
        assert figure["p_value"] == 1


def test_models_that_are_equally_good_are_rarely_told_apart() -> None:
    pairs = [(ask(stranger, 30, seed), ask(stranger, 30, seed, luck=1)) for seed in range(20)]
    wrong = [pair for pair in pairs if verdicts(*pair)["rouge_l"] != "indistinguishable"]

    assert len(wrong) <= 2  # 1 of 20 is what a level of 5 % allows


def test_a_small_gain_in_every_case_shows_although_the_cases_differ_much() -> None:
    easy_and_hard = [reference(random.Random(n)) for n in range(40)]
    tuned, baseline = (
        [
            Answer(f"d{n}:1", f"d{n}", real[: len(real) * n // 40 + 1 + more], real)
            for n, real in enumerate(easy_and_hard)
        ]
        for more in (1, 0)
    )
    paired = figures(tuned, baseline)["rouge_l"]
    alone, other = (score_answers(answers)[0]["rouge_l"] for answers in (tuned, baseline))

    assert paired["verdict"] == "better"
    assert alone["low"] < other["high"]


@pytest.mark.parametrize("models", [(listener, stranger), (stranger, stranger)])
@pytest.mark.parametrize("seed", range(2))
def test_swapping_the_models_turns_everything_round(seed: int, models: tuple[Model, Model]) -> None:
    one = ask(models[0], 40, seed, cases=2)
    other = ask(models[1], 40, seed, cases=2, luck=1)
    there, back = figures(one, other), figures(other, one)

    for name, figure in there.items():
        assert back[name]["verdict"] == SWAPPED[figure["verdict"]]
        assert back[name]["difference"] == pytest.approx(-figure["difference"])
        assert back[name]["low"] == pytest.approx(-figure["high"])
        assert back[name]["high"] == pytest.approx(-figure["low"])
        assert back[name]["p_value"] == pytest.approx(figure["p_value"])
        if not name.startswith("dist_"):
            assert (back[name]["wins"], back[name]["losses"]) == (figure["losses"], figure["wins"])
            assert figure["wins"] + figure["losses"] + figure["ties"] == 40


def test_a_model_known_to_be_worse_is_called_worse() -> None:
    found = figures(ask(stranger, 100), ask(listener, 100))

    for name in QUALITY:
        assert found[name]["verdict"] == "worse"
        assert "悪くなりました" in told(ask(stranger, 100), ask(listener, 100), name)


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_figure_that_is_good_neither_way_is_higher_or_lower(name: str) -> None:
    short, long = said(*["はい。"] * 20), said(*[OTHER] * 20)
    one, other = (short, long) if name == "backchannel_share" else (long, short)
    higher, lower = figures(one, other)[name], figures(other, one)[name]

    assert (higher["verdict"], lower["verdict"]) == ("higher", "lower")
    assert "高くなりました" in told(one, other, name)
    assert "低くなりました" in told(other, one, name)


def test_the_sentence_carries_the_difference_its_interval_and_p() -> None:
    found = figures(ask(listener, 40), ask(stranger, 40))["chrf"]
    sentence = told(ask(listener, 40), ask(stranger, 40), "chrf")

    for part in (f"{found['difference']:+.2f}", f"{found['low']:+.2f}", f"{found['high']:+.2f}"):
        assert part in sentence
    assert f"p={found['p_value']:.3g}" in sentence


# ── What is compared ─────────────────────────────────────────────────────────────────────────


def test_a_failed_answer_is_a_pair_that_is_lost_and_counted() -> None:
    tuned, baseline = ask(listener, 20), ask(stranger, 20)
    failed = [answer._replace(output="", fault="空") for answer in tuned[:12]]
    found, whole = (
        compare_answers(one, baseline, main="rouge_l") for one in ([*failed, *tuned[12:]], tuned)
    )

    assert (found["pairs"], found["left_out_pairs"], found["failed_pairs"]) == (20, 0, 12)
    assert whole["failed_pairs"] == 0
    assert found["figures"]["rouge_l"]["losses"] > whole["figures"]["rouge_l"]["losses"]
    assert found["figures"]["rouge_l"]["tuned"] < whole["figures"]["rouge_l"]["tuned"] / 2
    assert (whole["verdict"], found["verdict"]) == ("better", "indistinguishable")


def test_a_case_that_one_model_was_not_asked_is_left_out_and_counted() -> None:
    tuned, baseline = ask(listener, 20), ask(stranger, 20)
    found = compare_answers(tuned[3:], baseline[:-2])
    kept = compare_answers(tuned[3:-2], baseline[3:-2])

    assert (found["pairs"], found["left_out_pairs"]) == (15, 5)
    assert found["figures"] == kept["figures"]
    assert (kept["pairs"], kept["left_out_pairs"]) == (15, 0)


def test_the_values_compared_are_the_scores_of_the_answers() -> None:
    tuned, baseline = ask(listener, 30), ask(stranger, 30)
    ours, theirs = score_answers(tuned)[0], score_answers(baseline)[0]
    found = figures(tuned, baseline)

    assert list(found) == list(ours)
    for name, figure in found.items():
        assert figure["tuned"] == pytest.approx(ours[name]["score"])
        assert figure["baseline"] == pytest.approx(theirs[name]["score"])
        assert figure["difference"] == pytest.approx(figure["tuned"] - figure["baseline"])
        assert figure["low"] - 1e-9 <= figure["difference"] <= figure["high"] + 1e-9


def test_answers_meet_by_their_case_in_whatever_order_they_come() -> None:
    tuned, baseline = ask(listener, 30), ask(stranger, 30)
    shuffled = random.Random(1).sample(baseline, 30)

    assert compare_answers(tuned, shuffled) == compare_answers(tuned, baseline)


def test_many_cases_of_few_dialogues_are_less_sure_than_of_many() -> None:
    def spread(cases: int) -> float:
        found = figures(ask(listener, 120, cases=cases), ask(stranger, 120, cases=cases))
        return float(found["rouge_l"]["high"] - found["rouge_l"]["low"])

    assert spread(10) > spread(1)
    with pytest.raises(TypeError):  # 9 dialogues have no interval
        spread(14)


def test_the_same_seed_gives_the_same_comparison() -> None:
    tuned, baseline = ask(halfway, 30), ask(stranger, 30)
    first, again, other = (compare_answers(tuned, baseline, seed=seed) for seed in (1, 1, 2))

    assert first == again
    assert first["figures"]["chrf"]["p_value"] != other["figures"]["chrf"]["p_value"]


@pytest.mark.parametrize("answered", [[], said(REAL)])
def test_where_no_pair_is_left_nothing_is_compared(answered: list[Answer]) -> None:
    found = compare_answers(answered, [])

    assert found == {
        **{"pairs": 0, "left_out_pairs": len(answered), "failed_pairs": 0, "dialogues": 0},
        "figures": {},
    }


def test_a_comparison_can_be_written_as_json() -> None:
    found = compare_answers(ask(listener, 12), ask(stranger, 12))

    assert json.loads(json.dumps(found, allow_nan=False)) == found
