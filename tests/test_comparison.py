"""Is the tuned model better? Only where the interval and the sign test both say so."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openai_sft import Answer, compare_answers, score_answers, sign_test

QUALITY = ("chrf", "bleu_char", "rouge_l")
NEUTRAL = ("length_ratio", "backchannel_share")
REAL = "それはとてもおつらいですね。眠れない日が続いているのですね。"
OTHER = "ご家族とは最近どのように過ごされていますか、教えてください。"
SWAPPED = {
    **{"better": "worse", "worse": "better", "higher": "lower", "lower": "higher"},
    "indistinguishable": "indistinguishable",
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


# ── The sign test ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("wins", "losses"), [*itertools.combinations_with_replacement(range(7), 2)]
)
def test_the_sign_test_is_the_share_of_coin_throws_at_least_as_uneven(
    wins: int, losses: int
) -> None:
    throws = list(itertools.product((1, -1), repeat=wins + losses))
    uneven = sum(abs(sum(throw)) >= abs(wins - losses) for throw in throws)

    assert sign_test(wins, losses) == pytest.approx(uneven / len(throws))


@given(st.integers(0, 400), st.integers(0, 400))
def test_the_sign_test_is_a_probability_and_takes_no_side(wins: int, losses: int) -> None:
    assert 0 < sign_test(wins, losses) <= 1
    assert sign_test(wins, losses) == sign_test(losses, wins)


def test_the_sign_test_bears_every_turn_of_a_large_data_set() -> None:
    clear, close = sign_test(6_000, 5_400), sign_test(5_750, 5_650)

    assert clear < 1e-6 < 0.05 < close < 1


# ── The verdict ──────────────────────────────────────────────────────────────────────────────


def test_a_verdict_needs_the_sign_test_too() -> None:
    found = figures(said(*[REAL] * 5), said(*[OTHER] * 5))["chrf"]

    assert found["low"] > 0
    assert (found["wins"], found["losses"], found["ties"]) == (5, 0, 0)
    assert found["p_value"] == pytest.approx(2 / 2**5)
    assert found["verdict"] == "indistinguishable"


def test_one_case_more_is_enough_for_both() -> None:
    found = figures(said(*[REAL] * 6), said(*[OTHER] * 6))["chrf"]

    assert found["p_value"] == pytest.approx(2 / 2**6)
    assert found["verdict"] == "better"


def test_a_verdict_needs_the_interval_too() -> None:
    tuned = said(*["あいうえおか"] * 11, "ん", real="あいうえおかきくけこ")
    baseline = said(*["あいうえお"] * 11, "あいうえおかきくけこ", real="あいうえおかきくけこ")
    found = figures(tuned, baseline)["rouge_l"]

    assert found["p_value"] < 0.05
    assert found["low"] < 0 < found["high"]
    assert found["verdict"] == "indistinguishable"


def test_many_small_wins_and_a_few_great_losses_are_neither_better_nor_worse() -> None:
    tuned = said(*["あいうえおか"] * 30, *["ん"] * 10, real="あいうえおかきくけこ")
    baseline = said(
        *["あいうえお"] * 30, *["あいうえおかきくけこ"] * 10, real="あいうえおかきくけこ"
    )
    found = figures(tuned, baseline)["rouge_l"]

    assert found["p_value"] < 0.05
    assert found["wins"] > found["losses"]
    assert found["high"] < 0
    assert found["verdict"] == "indistinguishable"


def test_a_model_known_to_be_better_is_called_better_at_100_cases() -> None:
    found = figures(ask(listener, 100), ask(stranger, 100))

    for name in QUALITY:
        assert found[name]["verdict"] == "better"
        assert "良くなりました" in found[name]["sentence"]


@pytest.mark.parametrize("count", [10, 100])
def test_an_identical_model_is_not_told_apart(count: int) -> None:
    answers = ask(listener, count)
    found = figures(answers, answers)

    assert set(found) >= {*QUALITY, *NEUTRAL, "dist_1", "dist_2"}
    for figure in found.values():
        assert figure["verdict"] == "indistinguishable"
        assert "区別できない" in figure["sentence"]
        assert (figure["difference"], figure["low"], figure["high"]) == (0, 0, 0)
        assert (figure["wins"], figure["losses"], figure["ties"]) == (0, 0, count)
        assert figure["p_value"] == 1


def test_models_that_are_equally_good_are_rarely_told_apart() -> None:
    pairs = [(ask(stranger, 30, seed), ask(stranger, 30, seed, luck=1)) for seed in range(20)]
    told = [pair for pair in pairs if verdicts(*pair)["rouge_l"] != "indistinguishable"]

    assert len(told) <= 2  # 1 of 20 is what a level of 5 % allows


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
        assert (back[name]["wins"], back[name]["losses"]) == (figure["losses"], figure["wins"])
        assert back[name]["p_value"] == figure["p_value"]
        assert figure["wins"] + figure["losses"] + figure["ties"] == 40


def test_a_model_known_to_be_worse_is_called_worse() -> None:
    found = figures(ask(stranger, 100), ask(listener, 100))

    for name in QUALITY:
        assert found[name]["verdict"] == "worse"
        assert "悪くなりました" in found[name]["sentence"]


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_figure_that_is_good_neither_way_is_higher_or_lower(name: str) -> None:
    short, long = said(*["はい。"] * 20), said(*[OTHER] * 20)
    one, other = (short, long) if name == "backchannel_share" else (long, short)
    higher, lower = figures(one, other)[name], figures(other, one)[name]

    assert (higher["verdict"], lower["verdict"]) == ("higher", "lower")
    assert "高くなりました" in higher["sentence"]
    assert "低くなりました" in lower["sentence"]
    for figure in (higher, lower):
        assert not any(word in figure["sentence"] for word in ("良く", "悪く"))


def test_the_sentence_carries_the_difference_its_interval_and_p() -> None:
    found = figures(ask(listener, 40), ask(stranger, 40))["chrf"]

    for part in (f"{found['difference']:+.2f}", f"{found['low']:+.2f}", f"{found['high']:+.2f}"):
        assert part in found["sentence"]
    assert f"p={found['p_value']:.3g}" in found["sentence"]
    assert found["sentence"].startswith("chrF")


# ── What is compared ─────────────────────────────────────────────────────────────────────────


def test_a_pair_with_an_error_on_either_side_is_left_out_and_counted() -> None:
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
        assert figure["tuned"] == ours[name]["score"]
        assert figure["baseline"] == theirs[name]["score"]
        assert figure["difference"] == pytest.approx(figure["tuned"] - figure["baseline"])
        assert figure["low"] - 1e-9 <= figure["difference"] <= figure["high"] + 1e-9


def test_answers_meet_by_their_case_in_whatever_order_they_come() -> None:
    tuned, baseline = ask(listener, 30), ask(stranger, 30)
    shuffled = random.Random(1).sample(baseline, 30)

    assert compare_answers(tuned, shuffled) == compare_answers(tuned, baseline)


def test_many_cases_of_few_dialogues_are_less_sure_than_of_many() -> None:
    def spread(cases: int) -> float:
        found = figures(ask(listener, 60, cases=cases), ask(stranger, 60, cases=cases))
        return float(found["rouge_l"]["high"] - found["rouge_l"]["low"])

    assert spread(60) == pytest.approx(0)  # one dialogue says nothing about another
    assert spread(1) > 0


def test_the_same_seed_gives_the_same_comparison() -> None:
    tuned, baseline = ask(listener, 30), ask(stranger, 30)
    first, again, other = (compare_answers(tuned, baseline, seed=seed) for seed in (1, 1, 2))

    assert first == again
    assert first["figures"]["chrf"]["low"] != other["figures"]["chrf"]["low"]


@pytest.mark.parametrize("answered", [[], said(REAL)])
def test_where_no_pair_is_left_nothing_is_compared(answered: list[Answer]) -> None:
    found = compare_answers(answered, [])

    assert found == {"pairs": 0, "left_out_pairs": len(answered), "figures": {}}


def test_a_comparison_can_be_written_as_json() -> None:
    found = compare_answers(ask(listener, 12), ask(stranger, 12))

    assert json.loads(json.dumps(found, allow_nan=False)) == found
