"""Tokens and money: what a run costs before it is paid."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from endpoint import Rehearsal
from helpers import PROJECT, awkward_text, example, read_json, record, records, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

import openai_sft_example
from openai_sft import (
    FREE,
    BudgetError,
    ConfigurationError,
    CostEstimate,
    Declined,
    Dialogue,
    Ledger,
    OpenAISFT,
    Price,
    Runs,
    Splits,
    TokenCounter,
    Tokens,
    choose_cases,
    estimate_cost,
    load_vocabulary,
    parse_dialogue,
    percentile,
    price_of,
    read_examples,
    to_example,
    token_stats,
)
from openai_sft_rehearsal import example_dialogues

MakeSFT = Callable[..., OpenAISFT]

MINI = "gpt-4o-mini-2024-07-18"

messages = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["system", "user", "assistant"]),
            "content": awkward_text | st.sampled_from(["<|endoftext|>", "a<|endoftext", "|>"]),
        },
        optional={"name": st.just("taro")},
    ),
    max_size=6,
)


@pytest.fixture(scope="module")
def encoding() -> Any:
    found = load_vocabulary()
    assert found is not None
    return found


def examples_of(rows: list[Any]) -> list[Any]:
    dialogues = [parse_dialogue(row, fallback_id=str(n), source="") for n, row in enumerate(rows)]
    return [example for dialogue in dialogues if (example := to_example(dialogue))]


def total(counter: TokenCounter, conversations: list[Any]) -> int:
    return sum(counter.count(said).total for said in conversations)


# ── Counting ─────────────────────────────────────────────────────────────────────────────────


@given(messages)
def test_tokens_are_counted_by_the_cookbooks_formula(said: list[dict[str, str]]) -> None:
    exact = tiktoken.get_encoding("o200k_base")
    expected = 3 + sum(
        3 + sum(len(exact.encode_ordinary(text)) for text in one.values()) + ("name" in one)
        for one in said
    )

    assert TokenCounter(exact).count(said).total == expected


def test_a_conversation_counted_by_hand_has_that_many_tokens(encoding: Any) -> None:
    said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello world"}]

    # 3 for the example, 3 for each message, 1 for each role, 1 + 2 for the words
    assert TokenCounter(encoding).count(said).total == 3 + 3 * 2 + 2 + 3


def test_what_a_tool_is_called_with_is_paid_for_as_its_json_text(encoding: Any) -> None:
    calls = [{"id": "c1", "type": "function", "function": {"name": "探す", "arguments": "{}"}}]
    said = [{"role": "assistant", "content": None, "tool_calls": calls}]
    text = json.dumps(calls, ensure_ascii=False)

    assert TokenCounter(encoding).count(said).total == 3 + 3 + 1 + len(encoding.encode(text))


WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_current_weather",
        "description": "Get the current weather in a given location",
        "parameters": {
            "type": "object",
            "properties": {
                "location": {
                    "type": "string",
                    "description": "The city and state, e.g. San Francisco, CA",
                },
                "unit": {
                    "type": "string",
                    "description": "The unit of temperature to return",
                    "enum": ["celsius", "fahrenheit"],
                },
            },
            "required": ["location"],
        },
    },
}
QUESTION = [
    {
        "role": "system",
        "content": "You are a helpful assistant that can answer to questions about the weather.",
    },
    {"role": "user", "content": "What's the weather like in San Francisco?"},
]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text("aあ."),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab"), inner, max_size=3),
    max_leaves=6,
)
schemas = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["string", "object", ["string", "null"]]) | json_values,
        "description": st.text("aあ.") | json_values,
        "enum": st.lists(st.text("aあ")) | json_values,
        "items": json_values,
        "properties": json_values,
    },
)
tools_of_all_kinds = (
    st.fixed_dictionaries(
        {},
        optional={
            "type": st.just("function"),
            "function": st.fixed_dictionaries(
                {},
                optional={
                    "name": st.text("ab_") | json_values,
                    "description": st.text("aあ.") | json_values,
                    "parameters": st.fixed_dictionaries(
                        {"properties": st.dictionaries(st.text("ab"), schemas, max_size=3)},
                        optional={"required": json_values, "$defs": json_values},
                    )
                    | json_values,
                },
            )
            | json_values,
        },
    )
    | json_values
)


def test_the_cookbooks_own_example_of_tools_has_its_101_tokens(encoding: Any) -> None:
    assert TokenCounter(encoding).count(QUESTION, [WEATHER]).total == 101
    assert TokenCounter(encoding).count(QUESTION, [WEATHER]).tools
    assert not TokenCounter(encoding).count(QUESTION, []).tools


@given(st.lists(tools_of_all_kinds, max_size=4), tools_of_all_kinds, st.booleans())
def test_one_more_tool_never_makes_an_example_shorter_whatever_it_looks_like(
    tools: list[Any], more: Any, exact: bool
) -> None:
    counter = TokenCounter(tiktoken.get_encoding("o200k_base") if exact else None)
    before = counter.count(QUESTION, tools).total

    assert counter.count(QUESTION, [*tools, more]).total >= before + 7


@given(st.lists(tools_of_all_kinds, min_size=1, max_size=4))
def test_several_tools_are_the_sum_of_each(tools: list[Any]) -> None:
    counter = TokenCounter(tiktoken.get_encoding("o200k_base"))
    none = counter.count(QUESTION).total
    alone = [counter.count(QUESTION, [tool]).total - none - 12 for tool in tools]

    assert counter.count(QUESTION, tools).total == none + 12 + sum(alone)


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ((), {"strictness": "とても長い説明"}),
        (("function",), {"returns": {"type": "string", "description": "とても長い説明"}}),
        (("function", "parameters"), {"$defs": {"住所": {"description": "とても長い説明"}}}),
        (
            ("function", "parameters", "properties"),
            {"address": {"type": "object", "properties": {"町": {"description": "長い説明"}}}},
        ),
        (
            ("function", "parameters", "properties", "unit"),
            {"items": {"type": "string", "enum": ["とても", "長い"]}},
        ),
        (("function", "parameters", "properties", "unit"), {"enum": [1, 2, 3, None, 4, 5, 6]}),
        (("function", "parameters", "properties"), {"bare": True}),
    ],
    ids=["tool", "function", "parameters", "nested", "array", "numbers", "no schema"],
)
def test_nothing_of_a_tool_is_free(
    encoding: Any, where: tuple[str, ...], what: dict[str, Any]
) -> None:
    tool = json.loads(json.dumps(WEATHER))
    part = tool
    for key in where:
        part = part[key]
    replaced = {key: part.pop(key) for key in what if key in part}
    before = TokenCounter(encoding).count(QUESTION, [tool]).total
    part |= what
    after = TokenCounter(encoding).count(QUESTION, [tool]).total
    text = json.dumps(what, ensure_ascii=False)

    assert not replaced or list(replaced) == ["enum"]
    assert after - before >= 0.5 * len(encoding.encode(text))


@pytest.mark.parametrize(
    "tools",
    ["[]とても長い文字列", {"type": "function"}, [None], [[]], ["text"], [{"function": "f"}]],
)
def test_tools_of_no_known_form_are_paid_for_as_their_json_text(encoding: Any, tools: Any) -> None:
    inner = tools[0] if isinstance(tools, list) else tools
    text = inner if isinstance(inner, str) else json.dumps(inner, ensure_ascii=False)
    each = 7 if isinstance(tools, list) else 0
    counter = TokenCounter(encoding)

    assert counter.count(QUESTION, tools).total == counter.count(QUESTION).total + 12 + each + len(
        encoding.encode(text)
    )


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "iVBORw0K" * 9000}}


def test_an_image_is_never_counted_as_its_text_and_that_is_said(encoding: Any) -> None:
    asked = {"type": "text", "text": "これは何ですか。"}
    answer = {"role": "assistant", "content": "猫です。"}
    plain = [{"role": "user", "content": asked["text"]}, answer]
    said = [{"role": "user", "content": [asked, IMAGE, {**IMAGE, "type": "image"}]}, answer]
    count = TokenCounter(encoding).count(said)
    sft = OpenAISFT(offline=True, model=MINI)
    train = [{"id": f"{n}", "messages": said} for n in range(10)]
    cost = sft.estimate(Splits(train, train[:3], []), 2)

    assert (count.total, count.images) == (TokenCounter(encoding).count(plain).total, 2)
    assert cost.training_tokens == 10 * count.total
    assert cost.images == 26
    assert cost.most_usd is None
    assert any("画像（延べ26枚）" in line and "含まれていません" in line for line in cost.lines())


@pytest.mark.parametrize("text", [" ", "\n", "あ", "a", "\t", "\u3000", "\r\n", "-", "1"])
def test_a_million_characters_in_a_row_are_counted_to_a_few_tokens(
    encoding: Any, text: str
) -> None:
    counter = TokenCounter(encoding)
    part = len(encoding.encode_ordinary(text * 30_720))
    whole = counter.count_texts([f"はい{text * 1_000_000}はい", "はい"])

    assert whole == pytest.approx(part * 1_000_000 / 30_720, abs=20)


@pytest.mark.parametrize("exact", [True, False])
def test_half_an_emoji_is_counted(encoding: Any, exact: bool) -> None:
    counter = TokenCounter(encoding if exact else None)

    assert counter.count_texts(["眠れない\ud83d"]) == counter.count_texts(["眠れない?"])


@given(st.lists(awkward_text, min_size=1, max_size=4), st.integers(0, 3))
def test_a_long_run_does_not_change_how_the_texts_beside_it_are_counted(
    texts: list[str], place: int
) -> None:
    counter = TokenCounter(tiktoken.get_encoding("o200k_base"))
    long = "a " * 40_000
    with_it = [*texts[:place], long, *texts[place:]]

    assert counter.count_texts(with_it) == counter.count_texts(texts) + counter.count_texts([long])


def test_the_vocabulary_is_that_of_4o_mini_and_its_count_is_called_exact(encoding: Any) -> None:
    assert encoding.name == tiktoken.encoding_for_model("gpt-4o-mini").name == "o200k_base"
    assert TokenCounter(encoding).exact
    assert not TokenCounter(None).exact


@given(messages, messages)
def test_more_text_is_never_estimated_at_less(
    said: list[dict[str, str]], more: list[dict[str, str]]
) -> None:
    counter = TokenCounter(None)

    assert counter.count(said).total >= 3 + 3 * len(said)
    assert counter.count(said + more).total >= counter.count(said).total


@given(messages, st.booleans())
def test_one_example_a_turn_repeats_all_that_came_before(
    said: list[dict[str, str]], exact: bool
) -> None:
    counter = TokenCounter(tiktoken.get_encoding("o200k_base") if exact else None)
    expected = sum(
        counter.count(said[: index + 1]).total
        for index, message in enumerate(said)
        if message["role"] == "assistant"
    )

    assert counter.count(said).per_turn_format == pytest.approx(expected, abs=0 if exact else 9)


@given(st.lists(st.integers(0, 70_000), min_size=2, max_size=60))
def test_the_spread_of_tokens_is_by_linear_interpolation(sizes: list[int]) -> None:
    cuts = statistics.quantiles(sizes, n=20, method="inclusive")
    stats = token_stats([Tokens(size, 2 * size) for size in sizes])

    assert (stats.p5, stats.p95) == pytest.approx((cuts[0], cuts[-1]), abs=0.51)
    assert stats.p50 == pytest.approx(statistics.median(sizes), abs=0.51)
    assert (stats.max, stats.total) == (max(sizes), sum(sizes))
    assert stats.per_turn_format == 2 * sum(sizes)


def test_a_hundred_and_one_conversations_have_the_percentiles_of_their_ranks() -> None:
    stats = token_stats([Tokens(size, 0) for size in reversed(range(101))])

    assert (stats.p5, stats.p50, stats.p95, stats.max) == (5, 50, 95, 100)
    assert percentile([], 50) == percentile([0], 95) == 0
    assert token_stats([]).total == token_stats([]).max == 0


def test_the_estimate_is_within_5_percent_of_the_exact_count_on_kokorochat(
    encoding: Any,
    kokorochat: list[Dialogue],
) -> None:
    made = [to_example(dialogue) for dialogue in kokorochat[::20]]
    said = [example["messages"] for example in made if example]
    exact = total(TokenCounter(encoding), said)
    estimate = total(TokenCounter(None), said)

    assert len(said) > 200
    assert abs(estimate / exact - 1) < 0.05


def test_the_estimate_is_within_10_percent_on_the_projects_own_short_dialogues(
    encoding: Any,
) -> None:
    said = [example["messages"] for example in examples_of(example_dialogues())]
    exact = total(TokenCounter(encoding), said)
    estimate = total(TokenCounter(None), said)

    assert abs(estimate / exact - 1) < 0.10


def run_without_vocabulary(
    code: list[str], proxy: int, folder: Path
) -> subprocess.CompletedProcess[str]:
    """Run Python where the vocabulary can't be had but through a port of this machine."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("OPENAI_") and "proxy" not in name.lower()
    }
    environment |= {
        "TIKTOKEN_CACHE_DIR": str(folder),
        "HTTPS_PROXY": f"http://127.0.0.1:{proxy}",
        "PYTHONPATH": str(PROJECT),
    }
    return subprocess.run(
        [sys.executable, *code],
        env=environment,
        cwd=folder,
        capture_output=True,
        encoding="utf-8",
        timeout=30,
    )


def test_without_a_vocabulary_counts_are_marked_as_estimates_and_the_run_goes_on(
    tmp_path: Path,
) -> None:
    long = record(99, *[("client", "眠れません"), ("counselor", "あ" * 2266)] * 40)
    path = write_jsonl(tmp_path / "a.jsonl", [*records(20), long])
    with socket.create_server(("127.0.0.1", 0)) as refused:
        port = refused.getsockname()[1]
    arguments = ["--data-only", "--dataset", str(path), "--output-dir", str(tmp_path / "out")]
    done = run_without_vocabulary(
        [str(PROJECT / "openai_sft_example.py"), *arguments], port, tmp_path
    )

    assert done.returncode == 0
    assert "トークン（推定）" in done.stdout
    # Estimated at 62,600 tokens, which may be more than the limit of 65,536.
    assert "「d99」" in done.stderr
    assert "2件に分けました" in done.stderr
    assert "o200k_base" in done.stderr
    assert "秒で打ち切り" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_vocabulary_that_never_arrives_hangs_nothing(tmp_path: Path) -> None:
    code = "import openai_sft; print(openai_sft.load_vocabulary(timeout=0.2))"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        done = run_without_vocabulary(["-c", code], silent.getsockname()[1], tmp_path)
        took = time.monotonic() - started

    assert done.stdout.strip() == "None"
    assert "0.2秒" in done.stderr
    assert took < 10


# ── Pricing ──────────────────────────────────────────────────────────────────────────────────


def test_ten_epochs_of_kokorochat_on_4o_mini_cost_348_dollars_and_60_cents() -> None:
    cost = estimate_cost(11_620_000, 10, model=MINI)

    assert cost.training_usd == pytest.approx(348.60)
    assert cost.evaluation_usd == 0
    assert cost.total_usd == pytest.approx(348.60)
    # 7.5 times what the original description said, which took the input price for the training's
    assert cost.total_usd == pytest.approx(7.5 * 11_620_000 * 10 * 0.40 / 1e6)
    assert "$348.6000（約52,290円）" in "\n".join(cost.lines())


@pytest.mark.parametrize(
    ("model", "training", "tuned_input", "tuned_output"),
    [
        (MINI, 3, 0.30, 1.20),
        ("gpt-4o-2024-08-06", 25, 3.75, 15),
        ("gpt-4.1-2025-04-14", 25, 3, 12),
        ("gpt-4.1-mini-2025-04-14", 5, 0.80, 3.20),
    ],
)
def test_each_known_model_is_priced_by_the_published_table(
    model: str, training: float, tuned_input: float, tuned_output: float
) -> None:
    cost = estimate_cost(
        1_000_000,
        2,
        model=model,
        evaluation_input_tokens=1_000_000,
        evaluation_output_tokens=2_000_000,
    )

    assert cost.training_usd == pytest.approx(2 * training)
    assert cost.evaluation_usd == pytest.approx(tuned_input + 2 * tuned_output)
    assert cost.total_usd == pytest.approx(2 * training + tuned_input + 2 * tuned_output)


def test_an_evaluation_alone_is_priced_at_the_rate_of_the_model_that_answers() -> None:
    def price(model: str) -> float | None:
        return estimate_cost(
            9_999_999,
            None,
            model=model,
            evaluation_input_tokens=1_000_000,
            evaluation_output_tokens=1_000_000,
        ).total_usd

    assert price(f"ft:{MINI}:org::abc") == pytest.approx(0.30 + 1.20)
    assert price(MINI) == pytest.approx(0.15 + 0.60)
    assert price("gpt-4o-2024-08-06") == pytest.approx(2.50 + 10)
    assert price("gpt-4.1-nano-2025-04-14") is None


@pytest.mark.parametrize("epochs", [None, 3])
def test_a_baseline_is_asked_the_same_at_its_own_rate(epochs: int | None) -> None:
    def evaluation(baseline: str | None, price: Price | None = None) -> float | None:
        return estimate_cost(
            0,
            epochs,
            model=f"ft:{MINI}:org::abc" if epochs is None else MINI,
            baseline=baseline,
            evaluation_input_tokens=1_000_000,
            evaluation_output_tokens=1_000_000,
            price=price,
        ).evaluation_usd

    alone = 0.30 + 1.20

    assert evaluation(None) == pytest.approx(alone)
    assert evaluation(MINI) == pytest.approx(alone + 0.15 + 0.60)
    assert evaluation("ft:gpt-4.1-mini-2025-04-14:org::b") == pytest.approx(alone + 0.80 + 3.20)
    assert evaluation("llama-3.1-8b") is None
    assert evaluation(MINI, Price(9, 7, 5)) == pytest.approx(7 + 5 + 0.15 + 0.60)


def test_the_base_rates_of_a_given_price_are_not_those_of_another_base_model() -> None:
    given = Price(25.0, 3.0, 12.0, 100.0, 100.0)
    options: dict[str, Any] = {"evaluation_input_tokens": 1_000_000, "price": given}
    model = "gpt-4.1-2025-04-14"
    own = estimate_cost(0, 1, model=model, baseline=model, **options)
    another = estimate_cost(0, 1, model=model, baseline="gpt-4o-mini-2024-07-18", **options)

    assert own.evaluation_usd == pytest.approx(3.0 + 100.0)
    assert another.evaluation_usd == pytest.approx(3.0 + 0.15)


OTHER = "謎のモデル-7b"
GIVEN_BASE = Price(3.0, 0.3, 1.2, base_input=0.5, base_output=2.0)


def test_the_base_rates_of_a_given_price_are_those_of_a_baseline_that_the_table_does_not_know() -> (
    None
):
    cost = estimate_cost(
        0,
        1,
        model=MINI,
        baseline=OTHER,
        evaluation_input_tokens=1_000_000,
        evaluation_output_tokens=1_000_000,
        price=GIVEN_BASE,
    )

    assert cost.unpriced == ()
    assert cost.evaluation_usd == pytest.approx(0.3 + 1.2 + 0.5 + 2.0)


@pytest.mark.parametrize(
    ("model", "baseline", "price", "base_flags"),
    [
        (MINI, OTHER, None, True),
        (MINI, OTHER, Price(3.0, 0.3, 1.2), True),
        (OTHER, OTHER, Price(3.0, 0.3, 1.2), True),
        (OTHER, OTHER, None, True),
        (OTHER, MINI, None, False),
        (OTHER, None, None, False),
    ],
)
def test_what_is_unpriced_is_named_with_the_flags_that_price_it(
    model: str, baseline: str | None, price: Price | None, base_flags: bool
) -> None:
    lines = estimate_cost(10, 1, model=model, baseline=baseline, price=price).lines()
    (unknown,) = (line for line in lines if "単価は不明" in line)

    assert OTHER in unknown
    assert MINI not in unknown
    assert ("--price-base-input" in unknown, "--price-base-output" in unknown) == (
        base_flags,
        base_flags,
    )
    assert "--price-training" in unknown


def test_aliases_and_tuned_models_have_the_price_of_their_base() -> None:
    assert price_of("gpt-4o-mini") == price_of(MINI) is not None
    assert price_of(f"ft:{MINI}:org:suffix:abc:ckpt-step-3") == price_of(MINI)
    assert price_of("gpt-4.1") != price_of("gpt-4.1-mini")


def test_what_this_machine_trains_and_answers_is_free_and_nothing_else() -> None:
    asked: dict[str, Any] = {"evaluation_input_tokens": 1_000_000, "price": FREE}
    own = estimate_cost(10**9, 50, model="org/m", baseline="org/m", **asked)
    other = estimate_cost(10**9, 50, model="org/m", baseline="another/m", **asked)

    assert own.total_usd == 0
    assert (other.total_usd, other.unpriced) == (None, ("another/m",))
    assert price_of("ft:org/m:local::abc:ckpt-step-3") == FREE
    assert price_of(f"ft:{MINI}:local::abc") == price_of(MINI)
    assert price_of("org/m") is price_of("ft:org/m:elsewhere::abc") is None


def test_a_judge_elsewhere_costs_what_it_costs_though_the_model_is_of_this_machine() -> None:
    said: Any = [{"role": "user", "content": "やあ"}, {"role": "assistant", "content": "はい"}]
    test = [{"id": "a", "messages": said}]
    sft = OpenAISFT(local="org/m")
    for judge, dollars in (("gpt-4.1-mini", 1e-9), ("another/m", None), ("org/m", 0.0)):
        estimate = sft.estimate(Splits([], test, []), 1, 100, judge=judge)
        assert estimate.judge is not None
        assert estimate.evaluation_usd == estimate.training_usd == 0
        if dollars:
            assert estimate.judge.usd is not None
            assert estimate.judge.usd > dollars
        else:
            assert estimate.judge.usd == dollars


@pytest.mark.parametrize(
    ("judge", "limit", "ends"),
    [
        (None, 0.0, None),
        ("org/m", 0.0, None),
        ("gpt-4.1-mini", None, Declined),
        ("gpt-4.1-mini", 0.0, BudgetError),
        ("another/m", None, Declined),
        ("another/m", 1.0, BudgetError),
    ],
)
def test_a_free_run_passes_the_door_unasked_and_a_judge_elsewhere_does_not(
    tmp_path: Path, judge: str | None, limit: float | None, ends: type[Exception] | None
) -> None:
    said: Any = [{"role": "user", "content": "やあ"}, {"role": "assistant", "content": "はい"}]
    options: Any = {"local": "org/m", "max_cost_usd": limit, "output_dir": tmp_path}
    sft = OpenAISFT(**options)
    estimate = sft.estimate(Splits([], [{"id": "a", "messages": said}], []), 1, 100, judge=judge)
    run = Runs(tmp_path).create("pipeline", sft.settings)
    asked: list[CostEstimate] = []

    def decline(shown: CostEstimate) -> bool:
        asked.append(shown)
        return False

    ledger = Ledger(run, sft.settings, decline, lambda _: None)
    with pytest.raises(ends) if ends else contextlib.nullcontext():
        ledger.require(estimate, "training", "evaluation")
    assert bool(asked) == (ends is Declined)


@pytest.mark.parametrize("model", ["", "ft:", "ft:unknown:a", "llama-3.1-8b", "gpt-4o-mini-2"])
def test_a_model_that_is_not_in_the_table_has_no_price(model: str) -> None:
    cost = estimate_cost(1_000, 1, model=model)

    assert price_of(model) is None
    assert cost.total_usd is cost.training_usd is None
    assert "合計: 不明" in cost.lines()
    assert "$0" not in "\n".join(cost.lines())


def test_epochs_chosen_by_the_service_leave_the_price_unknown_and_say_why() -> None:
    cost = estimate_cost(1_000, "auto", model=MINI)

    assert cost.total_usd is None
    assert any("auto" in line and "事前に分かりません" in line for line in cost.lines())


def test_yen_are_said_to_be_an_assumption() -> None:
    text = "\n".join(estimate_cost(1_000_000, 1, model=MINI, yen_per_dollar=147.5).lines())

    assert "約442円" in text or "約443円" in text
    assert "1ドル=147.5円と仮定" in text


def test_estimated_tokens_are_marked_and_exact_ones_are_not() -> None:
    marked = "\n".join(estimate_cost(1_234, 1, model=MINI, exact_tokens=False).lines())
    exact = "\n".join(estimate_cost(1_234, 1, model=MINI).lines())

    assert "1,234トークン（推定）" in marked
    assert "推定" not in exact


@given(st.integers(0, 10**9), st.integers(1, 50), st.integers(0, 10**6), st.integers(0, 10**6))
def test_the_price_of_training_is_tokens_times_epochs_and_the_total_is_the_sum(
    tokens: int, epochs: int, asked: int, answered: int
) -> None:
    cost = estimate_cost(
        tokens,
        epochs,
        model=MINI,
        evaluation_input_tokens=asked,
        evaluation_output_tokens=answered,
    )

    assert cost.training_usd == pytest.approx(tokens * epochs * 3e-6)
    assert cost.evaluation_usd == pytest.approx(asked * 3e-7 + answered * 12e-7)
    assert cost.total_usd == pytest.approx((cost.training_usd or 0) + (cost.evaluation_usd or 0))


def test_only_the_training_split_is_paid_for_as_training(encoding: Any) -> None:
    made = examples_of(records(30))
    sft = OpenAISFT(offline=True, model=MINI)
    counter = TokenCounter(encoding)
    tokens = total(counter, [one["messages"] for one in made[:20]])
    cost = sft.estimate(Splits(made[:20], made[20:25], made[25:]), 3, tokens, max_test_cases=2)
    cases = choose_cases(made[20:25], max_cases=2) + choose_cases(made[25:], max_cases=2)

    assert cost.training_tokens == tokens
    assert cost.training_usd == pytest.approx(tokens * 3 * 3e-6)
    assert cost.evaluation_input_tokens == total(counter, [case.input for case in cases])
    assert cost.evaluation_output_tokens >= sum(
        len(encoding.encode_ordinary(case.reference)) for case in cases
    )
    assert cost.exact_tokens


def test_tools_are_paid_for_in_every_example_and_that_is_called_an_estimate(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = [{"messages": one["messages"], "tools": [WEATHER]} for one in examples_of(records(20))]
    source = write_jsonl(dataset.parent / "tools.jsonl", said)
    with_tools = OpenAISFT(offline=True, dataset=str(source), output_dir="a", verbose=False)
    summary = with_tools.prepare_data(epochs=3)
    cost = summary.estimate
    written = read_examples(summary.files["train"])
    counter = TokenCounter(load_vocabulary())
    plain = total(counter, [one["messages"] for one in written])
    each = counter.count([], [WEATHER]).total - 3
    again = with_tools.estimate(Splits(written, [], []), 3)

    assert each > 50
    assert cost.training_tokens == plain + each * len(written) == again.training_tokens
    assert cost.training_usd == pytest.approx(cost.training_tokens * 3 * 3e-6)
    assert not cost.exact_tokens
    assert cost.evaluation_input_tokens > each * 2
    assert any("トークン（推定） × 3エポック" in line for line in summary.lines())
    assert any("tools のトークン数は" in line and "推定" in line for line in summary.lines())
    assert read_json(summary.files["record"])["data"]["train"]["tools"] is True


def test_a_system_prompt_is_paid_for_in_every_example(encoding: Any) -> None:
    dialogue = parse_dialogue(record(1), fallback_id="", source="")
    plain, prompted = to_example(dialogue), to_example(dialogue, system_prompt="hello")
    counter = TokenCounter(encoding)

    assert plain
    assert prompted
    assert total(counter, [prompted["messages"]]) == total(counter, [plain["messages"]]) + 3 + 1 + 1


# ── Prices that are given ────────────────────────────────────────────────────────────────────

GIVEN = ["--price-training", "2", "--price-input", "0.5", "--price-output", "4"]
BASE_RATES = ["--price-base-input", "250", "--price-base-output", "2000"]


def test_a_given_price_replaces_the_tables_and_that_is_said() -> None:
    cost = estimate_cost(
        1_000_000,
        2,
        model=MINI,
        evaluation_input_tokens=1_000_000,
        evaluation_output_tokens=1_000_000,
        price=Price(2, 0.5, 4),
    )

    assert (cost.training_usd, cost.evaluation_usd) == pytest.approx((4, 4.5))
    assert any("指定された単価" in line for line in cost.lines())
    assert not any("openai.com" in line for line in cost.lines())


@pytest.mark.parametrize("model", ["ft:llama:a", "my-deployment", MINI])
def test_a_given_price_is_that_of_the_evaluated_model_whatever_its_name(model: str) -> None:
    cost = estimate_cost(
        0,
        None,
        model=model,
        evaluation_input_tokens=1_000_000,
        evaluation_output_tokens=1_000_000,
        price=Price(2, 0.5, 4),
    )

    assert cost.total_usd == pytest.approx(4.5)


@pytest.mark.parametrize("rate", [-0.01, float("nan"), float("inf")])
@pytest.mark.parametrize("place", range(7))
def test_a_price_that_is_none_is_refused_and_nothing_may_cost_nothing(
    place: int, rate: float
) -> None:
    with pytest.raises(ConfigurationError, match="0以上"):
        Price(*(rate if n == place else 1.0 for n in range(7)))

    assert Price(0, 0, 0, 0, 0).rates(tuned=False) == (0, 0, 0)
    assert Price(1, 1, 1, 1).rates(tuned=False) is None


def test_the_price_source_is_dated() -> None:
    cost = estimate_cost(1, 1, model=MINI)

    assert "https://platform.openai.com/docs/pricing" in cost.price_source
    assert re.search(r"20\d\d-\d\d", cost.price_source)


def prepared(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = openai_sft_example.main(["--data-only", "--quiet", *arguments])
    return code, *capsys.readouterr()


def test_prices_can_be_given_on_the_command_line_for_any_model(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--dataset", str(dataset), "--model", "llama-3.1-8b"]
    unknown, without, _ = prepared(capsys, *asked)
    known, given_out, _ = prepared(capsys, *asked, *GIVEN)
    partly, _, error = prepared(capsys, *asked, *GIVEN[:2])

    assert (unknown, known, partly) == (0, 0, 2)
    assert "合計: 不明" in without
    assert "--price-training" in without
    assert "合計: $" in given_out
    assert "指定された単価" in given_out
    assert "--price-output" in error


def test_the_price_of_a_baseline_can_be_given_on_the_command_line(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def evaluation(*arguments: str) -> float:
        asked = ["--dataset", str(dataset), "--model", "llama-3.1-8b", *arguments]
        _, out, _ = prepared(capsys, *asked)
        (dollars,) = re.findall(r"^評価: .* = \$([\d.]+)", out, re.M)
        return float(dollars)

    # A thousand times as dear, for four decimals are shown.
    given = ["--price-training", "2", "--price-input", "500", "--price-output", "4000"]
    tuned = evaluation(*given)
    same = evaluation(*given, "--baseline", *BASE_RATES)
    half, _, error = prepared(capsys, *given, *BASE_RATES[:2])
    alone, _, incomplete = prepared(capsys, *BASE_RATES)

    assert same == pytest.approx(1.5 * tuned, abs=2e-4)
    assert (half, alone) == (2, 2)
    assert "--price-base-output" in error
    assert "--price-training" in incomplete


def test_the_data_stage_shows_the_spread_and_the_price_of_the_other_format(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sft = OpenAISFT(offline=True, dataset=str(dataset), output_dir="a", verbose=False)
    summary = sft.prepare_data(epochs=3)
    stats = summary.tokens["train"]
    counter = TokenCounter(load_vocabulary())
    written = [one["messages"] for one in read_examples(summary.files["train"])]
    sizes = sorted(counter.count(said).total for said in written)
    _, out, _ = prepared(capsys, "--dataset", str(dataset), "--epochs", "3")

    assert stats.total == summary.estimate.training_tokens == sum(sizes)
    assert (stats.p50, stats.max) == (percentile(sizes, 50), sizes[-1])
    assert stats.per_turn_format == sum(counter.count(said).per_turn_format for said in written)
    assert f"5% {stats.p5:,} | 中央 {stats.p50:,} | 95% {stats.p95:,} | 最大 {stats.max:,}" in out
    dollars = stats.per_turn_format * 3 * 3e-6
    assert f"{stats.per_turn_format:,}トークン" in out
    assert f"学習 ${dollars:,.2f}" in out


@pytest.mark.parametrize(
    ("url", "dialect", "priced"),
    [
        ("https://api.openai.com/v1", None, True),
        ("https://eu.api.openai.com/v1", None, True),
        ("https://proxy.example.com/v1", "openai", True),
        ("https://proxy.example.com/v1", None, False),
        ("https://api.openai.com.example.com/v1", None, False),
        ("https://notapi.openai.com/v1", None, False),
        ("http://127.0.0.1:8000/v1", None, False),
        ("https://r.openai.azure.com/openai/v1/", None, False),
        ("https://api.openai.com/v1", "azure", False),
        ("https://api.tokenfactory.nebius.com/v1/", None, False),
    ],
)
def test_the_prices_of_the_table_are_those_of_one_service_alone(
    dataset: Path, tmp_path: Path, url: str, dialect: Any, priced: bool
) -> None:
    sft = OpenAISFT(
        offline=True,
        base_url=url,
        dialect=dialect,
        dataset=str(dataset),
        output_dir=tmp_path,
        verbose=False,
    )
    estimate = sft.prepare_data().estimate
    lines = "\n".join(estimate.lines())

    assert (estimate.total_usd is not None) is priced
    assert ("platform.openai.com" in lines) is priced
    assert ("単価: 不明" in lines) is not priced


def test_a_limit_where_no_price_is_known_stops_before_anything_is_sent(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    with pytest.raises(BudgetError, match="単価が不明"):
        make_sft(dialect=None, max_cost_usd=1000.0).run_full_pipeline(1, 4)

    assert [e for e in endpoint.exchanges if e.method == "POST"] == []


def test_a_price_that_is_given_counts_whatever_the_service(make_sft: MakeSFT) -> None:
    price = Price(2.0, 0.5, 1.0)
    results = make_sft(dialect=None, price=price).run_full_pipeline(1, 4, max_test_cases=1)

    assert results["cost"]["training_usd"] == pytest.approx(results["training"]["actual_usd"])
    assert results["cost"]["evaluation_usd"] > 0


def test_a_judge_elsewhere_has_the_prices_of_its_own_service(make_sft: MakeSFT) -> None:
    sft = make_sft(offline=True, dialect="nebius", price=None)
    splits = Splits(
        *map(
            list,
            ([example(f"d{n}", "眠れません", "そうですか") for n in range(3)] for _ in range(3)),
        )
    )
    options: dict[str, Any] = {"judge": MINI, "judge_against": "reference"}
    there = sft.estimate(splits, 1, judge_base_url="https://api.openai.com/v1", **options)
    here = sft.estimate(splits, 1, **options)

    assert there.judge is not None
    assert here.judge is not None
    assert there.judge.usd == pytest.approx(
        (there.judge.input_tokens * 0.15 + there.judge.output_tokens * 0.60) / 1e6
    )
    assert here.judge.usd is None


def test_a_judge_of_a_model_on_this_machine_has_the_prices_of_its_own_service(
    clean_environment: Path,
) -> None:
    sft = OpenAISFT(local="tiny", output_dir=clean_environment, verbose=False)
    splits = Splits(*([example("d", "眠れません", "そうですか")] for _ in range(3)))
    options: dict[str, Any] = {"judge": MINI, "judge_against": "reference"}

    def priced(url: str) -> bool:
        judge = sft.estimate(splits, 1, judge_base_url=url, **options).judge
        return judge is not None and judge.usd is not None

    assert priced("https://api.openai.com/v1")
    assert not priced("https://api.studio.nebius.com/v1")


@pytest.mark.parametrize("baseline", [MINI, True])
def test_a_judge_elsewhere_of_the_baselines_name_is_refused(
    make_sft: MakeSFT, baseline: str | bool
) -> None:
    sft = make_sft(price=Price(2.0, 0.5, 1.0, 0.5, 1.0))
    options: dict[str, Any] = {"judge": MINI, "judge_base_url": "https://api.openai.com/v1"}
    with pytest.raises(ConfigurationError, match="料金を区別"):
        sft.run_full_pipeline(1, 4, baseline=baseline, **options)
