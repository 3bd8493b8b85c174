"""How far the intervals, the test and the verdict of an evaluation can be trusted.

    python tests/bench_statistics.py

Simulates evaluations whose truth is known: samples of dialogues from a population, whose real
answers and scores stand in for models (the counsellor of another dialogue answers, the client
of another dialogue rates). Prints the table that stands in the README as Markdown, and ends with 1
where an interval or the test doesn't keep what it promises. Seeded; it takes about three minutes.
The population is KokoroChat beside the project, or else synthetic dialogues.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from helpers import KOKOROCHAT

from openai_sft import (
    FIGURE_LABELS,
    SCORE_ITEMS,
    SIGNIFICANCE,
    Answer,
    Figure,
    choose_cases,
    jackknife,
    make_response_figures,
    make_score_figures,
    measure_figure,
    randomise,
    read_dialogues,
    t_interval,
    to_example,
    to_score_example,
)

TEXTS, SCORED, CASES, SEED = 1000, 3000, 5, 42
SAMPLED, SAMPLES = (10, 20, 50, 200), 1000  # dialogues, and evaluations, for the intervals
NULL_COUNTS, POWERS = (20, 50, 200), (50, 200, 659)  # 659 is the whole test split of KokoroChat
NULLS, FOUND = 6000, 200  # evaluations of equal models, of unequal ones
HELD = (93.0, 97.0)  # percent
LEVEL = 5 + 300 * math.sqrt(0.05 * 0.95 / NULLS)  # 5 %, and three errors of the simulation
SLOW = ("dist_2", "overall.spearman")
COVERED = (
    *("rouge_l", "chrf", "bleu_char", "dist_1", "dist_2", "length_ratio", "backchannel_share"),
    *("overall.mse", "overall.rmse", "overall.mae", "overall.accuracy", "overall.spearman"),
)
KINDS = {
    "log": "t、対数",
    "chi2": "χ²",
    "root": "χ²の平方根",
    "wilson": "Wilson",
    "fisher": "Fisher z",
}


class Dialogue(NamedTuple):
    """What a dialogue gives: contexts' real answers, and its client's scores."""

    answers: Sequence[str]
    scores: Sequence[int]


def real_dialogues() -> Iterator[Dialogue]:
    for dialogue in read_dialogues(KOKOROCHAT):
        example, rated = to_example(dialogue), to_score_example(dialogue)
        if example is None or rated is None:
            continue
        cases = choose_cases([example], max_cases=0, seed=SEED, turns=CASES)
        if len(cases) == CASES:
            scores = json.loads(rated["messages"][-1]["content"])
            yield Dialogue([case.reference for case in cases], list(scores.values()))


def synthetic_dialogues() -> Iterator[Dialogue]:
    """Dialogues that differ in their talkativeness and in how they are rated."""
    rng = random.Random(SEED)
    words = (
        "眠れない",
        "仕事",
        "家族",
        "不安",
        "つらい",
        "のですね",
        "もう少し",
        "聞かせて",
        "はい",
        "。",
    )
    while True:
        length, mood = rng.lognormvariate(1.5, 0.5), rng.gauss(3.5, 0.8)
        answers = [
            "".join(rng.choices(words, k=1 + int(rng.expovariate(1 / length))))
            for _ in range(CASES)
        ]
        scores = [min(5, max(0, round(rng.gauss(mood, 0.8)))) for _ in SCORE_ITEMS]
        yield Dialogue(answers, scores)


def population() -> list[Dialogue]:
    if KOKOROCHAT.exists():
        kept = list(real_dialogues())
        return random.Random(SEED).sample(kept, len(kept))
    return list(itertools.islice(synthetic_dialogues(), 5000))


def said(
    dialogues: Sequence[Dialogue], shift: int, cases: int = 1, gain: float = 0.0
) -> list[Answer]:
    """Another dialogue's counsellor answers; in a share of ``gain`` of the dialogues the first
    half of the real answer comes before that."""
    answers = []
    for n, one in enumerate(dialogues):
        other = dialogues[(n + shift) % len(dialogues)].answers
        for case, real in enumerate(one.answers[:cases]):
            text = real[: len(real) // 2] if n < gain * len(dialogues) else ""
            text += other[case]
            answers.append(Answer(f"{n}:{case}", f"{n}", text, real))
    return answers


def rated(dialogues: Sequence[Dialogue], own: float, luck: int) -> list[Answer]:
    """A case a dialogue, with scores between the items' means (``own`` = 0) and the client's (1),
    and some noise."""
    real = np.array([one.scores for one in dialogues], dtype=float)
    means, noise = real.mean(axis=0), np.random.default_rng((SEED, luck)).normal(0, 0.5, real.shape)
    guesses = np.clip(np.rint(means + own * (real - means) + noise), 0, 5)

    def scores(values: Any) -> str:
        return json.dumps(dict(zip(SCORE_ITEMS, map(int, values), strict=True)))

    rows = enumerate(zip(guesses, real, strict=True))
    return [Answer(f"{n}", f"{n}", scores(guess), scores(told)) for n, (guess, told) in rows]


def sampled(figure: Figure, rows: Any) -> Figure:
    """The figure of a sample of the dialogues."""
    sums = [own[rows] for own in figure.sums]
    if figure.name.startswith("dist_"):  # most n-grams are in none of them
        there = sum(own.sum(axis=0) for own in sums) > 0
        sums = [own[:, there] for own in sums]
    return replace(figure, sums=tuple(sums), per_case=())


def cover(figure: Figure, samples: int) -> dict[int, float]:
    """Of 100 samples of so many dialogues, in how many the interval holds the truth."""
    rng, truth = np.random.default_rng(SEED), figure.value()
    held = dict.fromkeys(SAMPLED, 0)
    for count, _ in itertools.product(SAMPLED, range(samples)):
        found = measure_figure(sampled(figure, rng.integers(0, figure.units, count)))
        assert found.low is not None
        assert found.high is not None
        held[count] += found.low <= truth <= found.high
    return {count: 100 * hits / samples for count, hits in held.items()}


def cover_difference(figure: Figure) -> dict[int, float]:
    """The same of the paired difference of two models."""
    rng, truth = np.random.default_rng(SEED), figure.value(0) - figure.value(1)
    held = dict.fromkeys(SAMPLED, 0)
    for count, _ in itertools.product(SAMPLED, range(SAMPLES)):
        one = sampled(figure, rng.integers(0, figure.units, count))
        spread = jackknife(one.without_each(0) - one.without_each(1))
        low, high = t_interval(one.value(0) - one.value(1), spread)
        held[count] += low <= truth <= high
    return {count: 100 * hits / SAMPLES for count, hits in held.items()}


def equal(figure: Figure) -> Figure:
    """Two models with the same mean that differ in all else."""
    one, other = figure.sums
    gap = (figure.value(0) - figure.value(1)) / UNIT[figure.name]
    shift = np.stack([gap * one[:, 1], np.zeros(len(one))], axis=1)
    return replace(figure, sums=(one, other + shift))


UNIT = {"rouge_l": 100.0, "overall.mse": 1.0}  # what a figure is at a ratio of 1


def verdicts(figure: Figure, counts: Sequence[int], evaluations: int) -> dict[int, float]:
    """Of 100 evaluations of so many dialogues, in how many the main figure says better or
    worse."""
    rng = np.random.default_rng(SEED)
    told = dict.fromkeys(counts, 0)
    for count, number in itertools.product(counts, range(evaluations)):
        one = sampled(figure, rng.integers(0, figure.units, count))
        told[count] += randomise(one, number) < SIGNIFICANCE
    return {count: 100 * hits / evaluations for count, hits in told.items()}


def exchanged(figure: Figure, counts: Sequence[int], evaluations: int) -> dict[int, float]:
    """The same of two models of which nobody can tell, dialogue by dialogue, which is which."""
    rng = np.random.default_rng(SEED)
    one, other = figure.sums
    told = dict.fromkeys(counts, 0)
    for count, number in itertools.product(counts, range(evaluations)):
        rows, turned = rng.integers(0, figure.units, count), rng.integers(0, 2, (count, 1)) == 1
        sums = np.where(turned, one[rows], other[rows]), np.where(turned, other[rows], one[rows])
        told[count] += randomise(replace(figure, sums=sums, per_case=()), number) < SIGNIFICANCE
    return {count: 100 * hits / evaluations for count, hits in told.items()}


class Row(NamedTuple):
    """A line of the table: what is simulated, by the number of dialogues in percent."""

    name: str
    found: dict[int, float]
    low: float = 0.0
    high: float = 100.0

    @property
    def holds(self) -> bool:
        return all(
            self.low <= round(percent, 1) <= self.high
            for count, percent in self.found.items()
            if count >= 20
        )


def jobs() -> Iterator[tuple[str, Callable[..., dict[int, float]], tuple[Any, ...], float, float]]:
    """All simulations: a name, what to call, and the bounds of what it finds."""
    everyone = population()[:SCORED]
    dialogues = everyone[:TEXTS]
    one, other = said(dialogues, 1), said(dialogues, 2)
    figures = {figure.name: figure for figure in make_response_figures([one, other])[0]}
    scored = [rated(everyone, own, luck) for luck, own in enumerate((0.15, 0.10))]
    figures |= {figure.name: figure for figure in make_score_figures(scored)[0]}
    nods = [a._replace(output="はい。") if n % 2 else a for n, a in enumerate(one)]
    figures["backchannel_share"] = by_name(make_response_figures([nods])[0], "backchannel_share")
    for name in COVERED:
        figure = figures[name]
        label = f"区間 {label_of(name)}（{KINDS[figure.interval]}）"
        samples = SAMPLES // 2 if name in SLOW else SAMPLES
        # A share of 20 answers moves in steps of 5 points, over which no interval holds just 95 %.
        high = 99.0 if figure.interval == "wilson" else HELD[1]
        yield label, cover, (figure, samples), HELD[0], high
    for name in UNIT:
        yield f"区間 {label_of(name)}の差（t）", cover_difference, (figures[name],), *HELD
    for cases in (1, CASES):
        alike = said(dialogues, 1, cases), said(dialogues, 2, cases)
        figure = by_name(make_response_figures(alike)[0], "rouge_l")
        label = f"差がないのに言う {label_of('rouge_l')}、1対話{cases}件"
        yield label, exchanged, (figure, NULL_COUNTS, NULLS), 0.0, LEVEL
    figure = figures["overall.mse"]
    label = f"差がないのに言う {label_of('overall.mse')}"
    yield label, exchanged, (figure, NULL_COUNTS, NULLS), 0.0, LEVEL
    unequal = [rated(everyone, 0.4, 0), rated(everyone, 0.0, 1)]
    figure = equal(by_name(make_score_figures(unequal)[0], "overall.mse"))
    label = "同、平均だけ同じで散らばりが違うモデル"
    yield label, verdicts, (figure, NULL_COUNTS, NULLS), 0.0, 100.0
    better = said(dialogues, 1, gain=0.1), said(dialogues, 2)
    for figure in (
        by_name(make_response_figures(better)[0], "rouge_l"),
        figures["overall.mse"],
    ):
        difference = figure.value(0) - figure.value(1)
        label = f"差を見つける {label_of(figure.name)} {difference:+.2f}"
        yield label, verdicts, (figure, POWERS, FOUND), 0.0, 100.0


def by_name(figures: Sequence[Figure], name: str) -> Figure:
    return next(figure for figure in figures if figure.name == name)


def label_of(name: str) -> str:
    return " ".join(FIGURE_LABELS[part] for part in name.split("."))


def main() -> int:
    began = time.perf_counter()
    rows = [Row(name, run(*given), low, high) for name, run, given, low, high in jobs()]
    counts = sorted({count for row in rows for count in row.found})
    lines = [
        f"| | {' | '.join(f'{count}対話' for count in counts)} |",
        f"|---|{'---:|' * len(counts)}",
    ]
    for row in rows:
        cells = (f"{row.found[count]:.1f} %" if count in row.found else "" for count in counts)
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    sys.stdout.write("\n".join(lines) + "\n")
    for row in rows:
        if not row.holds:
            sys.stderr.write(f"outside {row.low:g}-{row.high:g} %: {row.name}\n")
    sys.stderr.write(f"{time.perf_counter() - began:.0f} s\n")
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
