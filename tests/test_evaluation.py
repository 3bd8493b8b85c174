"""Which turns a model is asked, what is asked, and what is made of its answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import openai
import pytest
from endpoint import Fault, Rehearsal
from helpers import Script, awkward_text, example, examples, posts, read_json
from hypothesis import given
from hypothesis import strategies as st

from openai_sft import EvaluationFailed, OpenAISFT, choose_cases

MakeSFT = Callable[..., OpenAISFT]

MODEL = "gpt-4o-mini-2024-07-18"
CHAT = "/chat/completions"


@st.composite
def example_lists(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Examples as the conversion makes them: turns alternate, the assistant has the last word."""
    made = []
    for number in range(draw(st.integers(0, 8))):
        texts = draw(st.lists(awkward_text.map(lambda text: text + "。"), min_size=1, max_size=9))
        roles = ("assistant", "user")
        said = [
            {"role": roles[(len(texts) - index - 1) % 2], "content": text}
            for index, text in enumerate(texts)
        ]
        if draw(st.booleans()):
            said.insert(0, {"role": "system", "content": "相談員です"})
        made.append({"id": f"{number}", "messages": said})
    return made


def turns_that_answer(messages: list[dict[str, Any]]) -> list[int]:
    return [
        index
        for index in range(1, len(messages))
        if messages[index]["role"] == "assistant" and messages[index - 1]["role"] == "user"
    ]


def evaluate(sft: OpenAISFT, count: int = 2, **options: Any) -> dict[str, Any]:
    """An evaluation that asks one question at a time, so that the order is known."""
    return sft.evaluate_model_comprehensive(
        MODEL, examples(count), [], **{"concurrency": 1, **options}
    )


# ── The choice of cases ──────────────────────────────────────────────────────────────────────


@given(example_lists(), st.integers(0, 5))
def test_a_case_is_the_context_up_to_an_answer_and_that_answer(
    given_examples: list[dict[str, Any]], seed: int
) -> None:
    by_id = {one["id"]: one["messages"] for one in given_examples}
    for case in choose_cases(given_examples, max_cases=None, seed=seed):
        name, _, index = case.id.rpartition(":")
        messages = by_id[name]
        turns = turns_that_answer(messages)

        assert int(index) in turns
        assert case.input == messages[: int(index)]
        assert case.reference == messages[int(index)]["content"]


@given(example_lists(), st.integers(1, 9), st.integers(0, 5))
def test_each_dialogue_is_asked_at_most_once_and_no_more_than_wanted(
    given_examples: list[dict[str, Any]], wanted: int, seed: int
) -> None:
    askable = sum(bool(turns_that_answer(one["messages"])) for one in given_examples)
    cases = choose_cases(given_examples, max_cases=wanted, seed=seed)

    assert len(cases) == min(wanted, askable)
    assert len({case.id.rpartition(":")[0] for case in cases}) == len(cases)


@given(example_lists(), st.randoms(), st.integers(0, 9), st.integers(0, 5))
def test_the_same_seed_asks_the_same_turns_in_whatever_order_the_dialogues_come(
    given_examples: list[dict[str, Any]], random: Any, wanted: int, seed: int
) -> None:
    expected = choose_cases(given_examples, max_cases=wanted, seed=seed)
    shuffled = random.sample(given_examples, len(given_examples))

    assert choose_cases(shuffled, max_cases=wanted, seed=seed) == expected


@given(example_lists(), st.integers(1, 9), st.integers(1, 9))
def test_fewer_cases_are_the_first_of_more(
    given_examples: list[dict[str, Any]], one: int, other: int
) -> None:
    few, many = sorted((one, other))

    assert (
        choose_cases(given_examples, max_cases=few)
        == (choose_cases(given_examples, max_cases=many))[:few]
    )


def test_an_answer_that_is_not_trained_on_is_context_and_never_a_reference() -> None:
    said = [
        {"role": "user", "content": "質問"},
        {"role": "assistant", "content": "悪い応答", "weight": 0},
        {"role": "user", "content": "もう一度"},
        {"role": "assistant", "content": "良い応答", "weight": 1},
    ]
    (case,) = choose_cases([{"id": "a", "messages": said}], max_cases=None, turns="all")

    assert case.reference == "良い応答"
    assert [message["content"] for message in case.input] == ["質問", "悪い応答", "もう一度"]
    assert not any("weight" in message for message in case.input)


def with_a_tool(name: str) -> dict[str, Any]:
    function = {"name": "weather", "arguments": "{}"}
    said = [
        {"role": "user", "content": "天気は？"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "晴れ"},
        {"role": "assistant", "content": "晴れです。"},
    ]
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    return {"id": name, "messages": said, "tools": tools}


def test_what_is_said_after_a_tool_is_asked_with_the_tools(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    made = with_a_tool("a")
    results = make_sft().evaluate_model_comprehensive(MODEL, [made], [])
    (request,) = (exchange.request for exchange in posts(endpoint, CHAT))
    (response,) = results["test_evaluation"]["responses"]

    assert request["messages"] == made["messages"][:3]
    assert request["tools"] == made["tools"]
    assert (response["case_id"], response["reference"]) == ("a:3", "晴れです。")


def test_data_that_give_no_case_are_told_before_anything_is_asked(
    make_sft: MakeSFT, endpoint: Rehearsal, log: Callable[[], list[str]]
) -> None:
    calls_alone = {**with_a_tool("a"), "messages": with_a_tool("a")["messages"][:2]}
    told: list[str] = []

    def confirm(_: object) -> bool:
        told.extend(line for line in log() if "評価に使える応答がありません" in line)
        assert posts(endpoint) == []
        return True

    sft = make_sft(confirm=confirm)
    results = sft.evaluate_model_comprehensive(MODEL, examples(2), [calls_alone])

    assert len(told) == 1
    assert told[0].startswith("検証データ（1件）")
    assert "assistant" in told[0]
    assert results["summary"]["valid_cases_evaluated"] == 0
    assert results["summary"]["test_cases_evaluated"] == 2


@pytest.mark.parametrize("everything", [0, None, 1000])
def test_zero_or_none_asks_every_dialogue(everything: int | None) -> None:
    assert len(choose_cases(examples(30), max_cases=everything)) == 30


def test_the_choice_depends_on_the_seed_and_differs_between_dialogues() -> None:
    long = [example(f"d{n}", *"あいうえおかきくけこさし") for n in range(20)]
    one, other = (
        {case.id for case in choose_cases(long, max_cases=None, seed=seed)} for seed in (1, 2)
    )

    assert one != other
    assert len({case_id.rpartition(":")[2] for case_id in one}) > 1


def test_another_seed_asks_other_dialogues() -> None:
    drawn = [
        {case.dialogue_id for case in choose_cases(examples(30), max_cases=5, seed=seed)}
        for seed in (1, 2)
    ]

    assert drawn[0] != drawn[1]


def test_the_farewell_is_asked_only_where_there_is_nothing_else() -> None:
    (only,) = choose_cases([example("a", "相談", "お大事に")])
    asked = {
        case.id
        for seed in range(40)
        for case in choose_cases(
            [example("a", "一", "二", "三", "四", "五", "お大事に")], seed=seed
        )
    }

    assert only.id == "a:1"
    assert asked == {"a:1", "a:3"}


def test_a_monologue_is_not_asked() -> None:
    assert choose_cases([{"id": "a", "messages": [{"role": "assistant", "content": "やあ"}]}]) == []


def test_the_weight_of_a_training_message_is_not_sent_to_the_model() -> None:
    weighted = example("a", "一", "二", "三", "四", "五", "六")
    weighted["messages"][1]["weight"] = 0
    contexts = [choose_cases([weighted], seed=seed)[0].input for seed in range(20)]

    assert any(len(context) == 3 for context in contexts)
    assert not any("weight" in message for context in contexts for message in context)


# ── The results ──────────────────────────────────────────────────────────────────────────────


def test_the_results_have_exactly_the_agreed_shape(make_sft: MakeSFT) -> None:
    results = make_sft(clock=lambda: 1_800_000_000.0).evaluate_model_comprehensive(
        MODEL, examples(5), examples(3), max_test_cases=2
    )

    assert list(results)[:5] == [
        "model_id",
        "evaluation_timestamp",
        "test_evaluation",
        "valid_evaluation",
        "summary",
    ]
    assert results["model_id"] == MODEL
    assert datetime.fromisoformat(results["evaluation_timestamp"]).timestamp() == 1_800_000_000
    assert results["summary"] == {
        "test_cases_evaluated": 2,
        "valid_cases_evaluated": 2,
        "total_cases_evaluated": 4,
    }
    for name, total in (("test", 5), ("valid", 3)):
        part = results[f"{name}_evaluation"]
        assert part["dataset_type"] == name
        assert part["total_test_cases"] == total
        assert part["evaluated_cases"] == len(part["responses"]) == 2
        assert part["failed_cases"] == 0


def test_a_response_says_what_was_sent_what_came_and_what_the_counsellor_said(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    data = examples(4)
    results = make_sft().evaluate_model_comprehensive(
        MODEL, data, [], max_test_cases=3, seed=5, concurrency=1
    )
    cases = choose_cases(data, max_cases=3, seed=5)
    responses = results["test_evaluation"]["responses"]

    assert len(responses) == len(posts(endpoint, CHAT)) == 3
    for response, case, asked in zip(responses, cases, posts(endpoint, CHAT), strict=True):
        assert set(response) == {
            *("case_id", "input", "output", "reference", "usage", "latency_seconds"),
            *("finish_reason", "dialogue_id", "scores"),
        }
        assert response["case_id"] == case.id
        assert response["input"] == case.input == asked.request["messages"]
        assert response["reference"] == case.reference
        assert response["output"] == asked.response["choices"][0]["message"]["content"]
        assert response["usage"] == asked.response["usage"]
        assert 0 <= response["latency_seconds"] < 60
        assert asked.request["model"] == MODEL


def test_the_answers_can_be_had_again_temperature_and_seed_are_sent_and_saved(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    results = evaluate(make_sft(), seed=11, temperature=0.5, max_tokens=64)
    sent = posts(endpoint, CHAT)[0].request

    assert (sent["temperature"], sent["seed"], sent["max_tokens"]) == (0.5, 11, 64)
    assert results["settings"]["temperature"] == 0.5
    assert results["settings"]["seed"] == 11


def test_nothing_to_ask_is_nothing_asked(make_sft: MakeSFT, endpoint: Rehearsal) -> None:
    results = make_sft().evaluate_model_comprehensive(MODEL, [], [])

    assert results["summary"]["total_cases_evaluated"] == 0
    assert results["test_evaluation"]["responses"] == []
    assert endpoint.exchanges == []


def test_each_split_has_its_own_number_of_cases(make_sft: MakeSFT) -> None:
    results = make_sft().evaluate_model_comprehensive(
        MODEL, examples(12), examples(1), max_test_cases=0
    )

    assert results["summary"]["test_cases_evaluated"] == 12
    assert results["summary"]["valid_cases_evaluated"] == 1


def test_ten_of_each_split_are_asked_by_default(make_sft: MakeSFT) -> None:
    results = make_sft().evaluate_model_comprehensive(MODEL, examples(12), examples(11))

    assert results["summary"]["total_cases_evaluated"] == 20


def test_scores_of_a_rehearsal_say_that_they_are_no_scores_of_gpt(make_sft: MakeSFT) -> None:
    plain = make_sft().evaluate_model_comprehensive(MODEL, [], [])
    tuned = make_sft().evaluate_model_comprehensive(f"ft:{MODEL}:rehearsal::a", [], [])

    assert "rehearsal" not in plain
    assert tuned["rehearsal"] is True
    assert "GPTの性能とは無関係" in tuned["note"]


def test_a_quiet_evaluation_writes_nothing_to_the_terminal(
    make_sft: MakeSFT, capfd: pytest.CaptureFixture[str]
) -> None:
    evaluate(make_sft())

    assert capfd.readouterr() == ("", "")


# ── Cases that fail ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("fault", ["400", "empty_answer", "refusal"])
def test_a_case_that_fails_carries_its_error_and_the_others_their_answers(
    make_sft: MakeSFT, endpoint: Rehearsal, fault: str
) -> None:
    endpoint.inject(Fault(fault, "POST", CHAT, skip=1))
    part = evaluate(make_sft(), count=3)["test_evaluation"]
    failed = part["responses"][1]

    assert (part["evaluated_cases"], part["failed_cases"]) == (2, 1)
    assert "output" not in failed
    assert failed["error"].strip()
    assert set(failed) >= {"case_id", "input", "reference", "latency_seconds"}
    assert ["error" in response for response in part["responses"]] == [False, True, False]


@pytest.mark.parametrize("fault", ["429", "503", "reset_after", "truncated", "malformed"])
def test_a_passing_fault_costs_no_answer(
    make_sft: MakeSFT, endpoint: Rehearsal, fault: str
) -> None:
    slept: list[float] = []
    endpoint.inject(Fault(fault, "POST", CHAT, times=2))
    results = evaluate(make_sft(sleep=slept.append))

    assert results["test_evaluation"]["failed_cases"] == 0
    assert len(slept) == 2


def test_a_fault_that_does_not_pass_fails_its_case_within_a_minute(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    now = [1_800_000_000.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    endpoint.inject(Fault("malformed", "POST", CHAT, times=None))
    results = evaluate(make_sft(sleep=sleep, clock=lambda: now[0]), count=1)

    assert results["test_evaluation"]["failed_cases"] == 1
    assert now[0] - 1_800_000_000 <= 50


@pytest.mark.parametrize(
    "body",
    [{}, {"choices": []}, {"choices": None}, {"choices": [{"message": None}]}],
    ids=json.dumps,
)
def test_an_answer_that_is_json_but_no_completion_fails_its_case_alone(
    make_sft: MakeSFT, body: Any
) -> None:
    now = [1_800_000_000.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    with Script(**{"/chat/completions": [body]}) as script:
        sft = make_sft(base_url=script.url, sleep=sleep, clock=lambda: now[0])
        part = evaluate(sft)["test_evaluation"]

    assert (part["evaluated_cases"], part["failed_cases"]) == (0, 2)
    assert all(response["error"] for response in part["responses"])


def test_a_model_that_does_not_exist_is_an_error(make_sft: MakeSFT, endpoint: Rehearsal) -> None:
    with pytest.raises(openai.NotFoundError):
        make_sft().evaluate_model_comprehensive(
            "ft:nothing", examples(3), examples(3), concurrency=1
        )

    assert len(posts(endpoint, CHAT)) == 1


def test_when_no_case_is_answered_the_errors_are_saved_and_the_run_fails(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    endpoint.inject(Fault("400", "POST", CHAT, times=None))
    with pytest.raises(EvaluationFailed) as caught:
        make_sft().run_evaluation(MODEL, max_test_cases=1)
    saved = read_json(caught.value.path)

    assert saved["summary"]["total_cases_evaluated"] == 0
    assert saved["test_evaluation"]["responses"][0]["error"]
    assert caught.value.path in str(caught.value)


# ── Saving ───────────────────────────────────────────────────────────────────────────────────


def test_results_are_saved_as_they_are_under_a_stamped_name(make_sft: MakeSFT) -> None:
    sft = make_sft(clock=lambda: datetime(2026, 11, 22, 9, 8, 7).timestamp())
    results = {"model_id": "m", "summary": {}, "text": "心😀\u2028\x85"}
    path = sft.save_results(results)

    assert type(path) is str
    assert Path(path).name == "comprehensive_evaluation_20261122_090807.json"
    assert read_json(path) == results
    assert "心😀" in Path(path).read_text("utf-8")


def test_answers_of_those_who_took_part_are_compared_as_one_where_the_split_was_made_by_it(
    make_sft: MakeSFT,
) -> None:
    data = [{**one, "group": f"counsellor {n % 4}"} for n, one in enumerate(examples(12))]
    alone = evaluate_compared(make_sft(), examples(12))
    grouped = evaluate_compared(make_sft(), data)

    assert (alone["dialogues"], grouped["dialogues"]) == (12, 4)
    assert grouped["verdict"] == "too_few"


def evaluate_compared(sft: OpenAISFT, data: Any) -> dict[str, Any]:
    results = sft.evaluate_model_comprehensive(MODEL, data, [], 0, baseline="gpt-4.1-2025-04-14")
    found: dict[str, Any] = results["comparison"]["test"]
    return found


def test_saving_twice_keeps_both(make_sft: MakeSFT) -> None:
    sft = make_sft(clock=lambda: 1_800_000_000.0)
    first, second = sft.save_results({"a": 1}), sft.save_results({"a": 2})

    assert first != second
    assert (read_json(first), read_json(second)) == ({"a": 1}, {"a": 2})
