"""An evaluation from the choice of its cases to its table, over real sockets."""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import json
import re
import sys
import threading
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import openai
import pytest
from edges import Forward, Gateway, Reply, Request, refusal, saying
from endpoint import Fault, Rehearsal
from faults import CHAT, Clock, until
from helpers import (
    Ended,
    LoopbackHandler,
    LoopbackServer,
    example,
    examples,
    posts,
    read_json,
    records,
    write_jsonl,
)
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from openai_sft import (
    BudgetError,
    ConfigurationError,
    CostEstimate,
    DataError,
    Declined,
    Dialogue,
    OpenAISFT,
    Price,
    Splits,
    TokenCounter,
    choose_cases,
    is_farewell,
    load_vocabulary,
    to_example,
)

MakeSFT = Callable[..., OpenAISFT]
Says = Callable[[dict[str, Any]], Any]

BASE = "gpt-4o-mini-2024-07-18"
TUNED = f"ft:{BASE}:org::abc"
EVERY_TURN = {"max_test_cases": 0, "eval_turns": "all"}


class Counsellor:
    """A loopback endpoint whose ``reply`` makes the text, or the whole body, of each answer.

    A reply that is a number refuses with that status. ``asked`` holds the requests; ``most`` is
    the greatest number that was under way at once. With ``together`` an answer waits until that
    many questions are there.
    """

    def __init__(self, reply: Says, *, together: int = 1) -> None:
        self.asked: list[dict[str, Any]] = []
        self.most = self._under_way = 0
        self._reply, self._lock = reply, threading.Lock()
        self._meeting = threading.Barrier(together, timeout=10)
        counsellor = self

        class Handler(LoopbackHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                answer = counsellor.answer(request)
                refused = isinstance(answer, int)
                error = {"error": {"message": "no", "type": "", "param": None, "code": None}}
                content = json.dumps(error if refused else answer).encode()
                self.send_response(answer if refused else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        self.server = LoopbackServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def answer(self, request: dict[str, Any]) -> Any:
        with self._lock:
            self.asked.append(request)
            self._under_way += 1
            self.most = max(self.most, self._under_way)
        self._meeting.wait()
        said = self._reply(request)
        with self._lock:
            self._under_way -= 1
        return completion(said) if isinstance(said, str) else said

    def __enter__(self) -> Self:
        threading.Thread(target=self.server.serve_forever, args=(0.002,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def completion(text: Any, finish_reason: str = "stop", **facts: Any) -> dict[str, Any]:
    """A chat completion as the API shows it; 100 tokens were read and 10 written."""
    message = {"role": "assistant", "content": text, "refusal": facts.pop("refusal", None)}
    return {
        "id": "chatcmpl-script",
        "object": "chat.completion",
        "created": 1,
        "model": BASE,
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
        **facts,
    }


@pytest.fixture
def make_at(make_sft: MakeSFT, sdk: openai.OpenAI) -> MakeSFT:
    """Makes instances that talk to the endpoint at a URL and never wait."""

    def make(url: str, **options: Any) -> OpenAISFT:
        usual = {"client": sdk.with_options(base_url=url), "base_url": url}
        return make_sft(**(usual | {"sleep": lambda _: None} | options))

    return make


def talk(name: str, turns: int) -> dict[str, Any]:
    """A dialogue of so many exchanges, the last a farewell."""
    said = [f"{name}の{kind}{n}" for n in range(turns) for kind in ("話", "返事")]
    return example(name, *said[:-1], f"{name}、失礼します{turns}")


def dialogues(count: int, turns: int = 4) -> list[dict[str, Any]]:
    return [talk(f"d{n}", turns) for n in range(count)]


def case_ids(data: list[dict[str, Any]], **options: Any) -> list[str]:
    return [case.id for case in choose_cases(data, **options)]


def responses(results: dict[str, Any], part: str = "test") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = results[f"{part}_evaluation"]["responses"]
    return found


def asking_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("openai-sft-ask")]


def questions(asked: list[dict[str, Any]]) -> Counter[str]:
    return Counter(json.dumps(request["messages"]) for request in asked)


# ── Which turns ──────────────────────────────────────────────────────────────────────────────

lengths = st.lists(st.integers(1, 7), max_size=6)


@given(lengths, st.integers(0, 3))
def test_all_turns_are_all_but_the_farewell(turns: list[int], seed: int) -> None:
    data = [talk(f"d{n}", count) for n, count in enumerate(turns)]
    expected = {
        f"d{n}:{2 * turn + 1}" for n, count in enumerate(turns) for turn in range(max(1, count - 1))
    }
    found = case_ids(data, max_cases=None, seed=seed, turns="all")

    assert len(found) == len(set(found))
    assert set(found) == expected


@given(lengths, st.integers(0, 3))
def test_the_last_turn_is_the_one_before_the_farewell(turns: list[int], seed: int) -> None:
    data = [talk(f"d{n}", count) for n, count in enumerate(turns)]

    assert set(case_ids(data, max_cases=None, seed=seed, turns="last")) == {
        f"d{n}:{max(1, 2 * count - 3)}" for n, count in enumerate(turns)
    }


FAREWELLS = (
    "ありがとうございました。",
    "（ロープレありがとうございました。大変勉強になりました。これにて終了させていただきます。）",
    "では、失礼いたします。",
    "こちらこそ、よろしくお願いいたします！",
    "お気をつけて。またいつでもお話にいらしてくださいね😊",
    "お時間になってしまいました",
    "どうぞお大事に。12",
    "有難うございました。",
    "Thank you. Good-bye!",
)
NO_FAREWELLS = (
    "はい",
    "それは良かったです。",
    "お辛いですね。もう少し聞かせていただけますか？",
    "大変失礼いたしました。どんなお気持ちでしたか？",
    "また眠れなくなったのですね",
    "話してくださってありがとうございます。眠れないのはいつからですか？",
    "。",
    "",
)


@pytest.mark.parametrize("text", FAREWELLS)
def test_a_farewell_is_known_by_its_last_sentence(text: str) -> None:
    assert is_farewell(text)


@pytest.mark.parametrize("text", NO_FAREWELLS)
def test_what_asks_or_answers_is_no_farewell(text: str) -> None:
    assert not is_farewell(text)


@pytest.mark.parametrize("turns", ["last", "all", 9])
def test_farewells_are_left_out_by_what_they_are(turns: Any) -> None:
    """However many there are, and where the client has the last word too."""
    said = ("相談です", "では失礼します", "まだあります", "どんなことですか", "やっぱりいいです")
    several = example("a", *said, "ありがとうございました", "また来ます", "お大事に", "はい")
    none = example("b", "相談です", "聞かせてください", "眠れません", "それはお辛いですね")
    only = example("c", "終わります", "では失礼します", "はい", "終了します")
    found = case_ids([several, none, only], max_cases=0, turns=turns)
    wanted = {"a:3", "b:3", "c:1"} if turns == "last" else {"a:1", "a:3", "b:1", "b:3", "c:1"}

    assert set(found) == wanted


def test_nearly_all_last_turns_of_kokorochat_are_farewells_and_few_others(
    kokorochat: list[Dialogue],
) -> None:
    last, others = [], []
    for dialogue in kokorochat[::10]:
        messages = (to_example(dialogue) or {"messages": []})["messages"]
        said = [m["content"] for m in messages if m["role"] == "assistant"]
        last += [is_farewell(text) for text in said[-1:]]
        others += [is_farewell(text) for text in said[:-8]]  # the last are of the closing

    assert sum(last) / len(last) > 0.9
    assert sum(others) / len(others) < 0.02


@given(lengths, st.integers(1, 9), st.integers(0, 3))
def test_so_many_turns_of_each_dialogue_are_asked_or_all_it_has(
    turns: list[int], wanted: int, seed: int
) -> None:
    data = [talk(f"d{n}", count) for n, count in enumerate(turns)]
    found = case_ids(data, max_cases=None, seed=seed, turns=wanted)
    each = Counter(case_id.partition(":")[0] for case_id in found)

    assert set(found) <= set(case_ids(data, max_cases=None, turns="all"))
    assert len(found) == len(set(found))
    assert each == {f"d{n}": min(wanted, max(1, c - 1)) for n, c in enumerate(turns)}


@given(lengths, st.integers(1, 12), st.sampled_from([1, 3, "last", "all"]))
def test_no_dialogue_gives_its_second_case_before_each_has_given_its_first(
    turns: list[int], wanted: int, which: Any
) -> None:
    data = [talk(f"d{n}", count) for n, count in enumerate(turns)]
    found = case_ids(data, max_cases=wanted, turns=which)
    names = {case_id.partition(":")[0] for case_id in found}

    assert len(found) == min(wanted, len(case_ids(data, max_cases=None, turns=which)))
    assert len(names) == min(len(data), len(found))


@given(lengths, st.integers(0, 5), st.sampled_from([1, 2, "last", "all"]))
def test_dialogues_that_are_added_change_nothing_about_the_others(
    turns: list[int], added: int, which: Any
) -> None:
    data = [talk(f"d{n}", count) for n, count in enumerate(turns)]
    more = [*data, *(talk(f"new{n}", 5) for n in range(added))]
    before = case_ids(data, max_cases=None, turns=which)
    after = case_ids(more, max_cases=None, turns=which)

    assert sorted(before) == sorted(case for case in after if not case.startswith("new"))


@given(lengths, st.integers(0, 5), st.integers(1, 8))
def test_a_bounded_draw_keeps_its_order_when_dialogues_are_added(
    turns: list[int], added: int, wanted: int
) -> None:
    data = [talk(f"d{n}", count) for n, count in enumerate(turns)]
    more = [*data, *(talk(f"new{n}", 5) for n in range(added))]
    kept = [case for case in case_ids(more, max_cases=wanted) if not case.startswith("new")]

    assert kept == case_ids(data, max_cases=wanted)[: len(kept)]


@pytest.mark.parametrize("turns", [0, -1, True, 1.5, "first", "", None])
def test_a_number_of_turns_that_makes_no_sense_is_refused(
    make_sft: MakeSFT, endpoint: Rehearsal, turns: Any
) -> None:
    with pytest.raises(ConfigurationError, match="eval_turns"):
        make_sft().evaluate_model_comprehensive(BASE, examples(2), [], eval_turns=turns)

    assert endpoint.exchanges == []


@pytest.mark.parametrize(
    "wrong",
    [
        *({"concurrency": 0}, {"max_test_cases": -1}, {"max_tokens": 0}, {"max_tokens": 1.5}),
        *({"temperature": -0.1}, {"temperature": 2.1}, {"timeout_per_answer": 0}),
        *({"timeout_per_answer": float("inf")}, {"timeout_per_answer": float("nan")}),
    ],
    ids=str,
)
def test_an_option_of_the_questions_out_of_range_is_refused(
    make_sft: MakeSFT, endpoint: Rehearsal, wrong: dict[str, Any]
) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        make_sft().evaluate_model_comprehensive(BASE, examples(2), [], **wrong)

    assert endpoint.exchanges == []


def test_two_runs_meet_on_the_same_cases(make_sft: MakeSFT) -> None:
    first, second = (
        make_sft().evaluate_model_comprehensive(model, dialogues(20), [], eval_turns=2)
        for model in (BASE, "gpt-4.1-2025-04-14")
    )

    assert [r["case_id"] for r in responses(first)] == [r["case_id"] for r in responses(second)]
    assert len(responses(first)) == 10


def test_a_turn_whose_real_answer_is_no_text_is_not_asked(make_at: MakeSFT) -> None:
    data = [talk("d1", 3)]
    data[0]["messages"][1]["content"] = [{"type": "text", "text": "眠れないのですね"}]
    with Counsellor(lambda _: "はい") as counsellor:
        results = make_at(counsellor.url).evaluate_model_comprehensive(BASE, data, [], **EVERY_TURN)

    assert [response["case_id"] for response in responses(results)] == ["d1:3"]
    assert "chrf" in results["test_evaluation"]["metrics"]


# ── What is asked, and of whom ───────────────────────────────────────────────────────────────


def test_without_a_baseline_nothing_is_asked_but_the_cases(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    results = make_sft().evaluate_model_comprehensive(
        BASE, dialogues(8), dialogues(5), **EVERY_TURN
    )
    cases = [*choose_cases(dialogues(8), max_cases=None, turns="all")]
    cases += choose_cases(dialogues(5), max_cases=None, turns="all")

    assert [(e.method, e.path) for e in endpoint.exchanges] == [("POST", CHAT)] * len(cases)
    assert questions([e.request for e in endpoint.exchanges]) == Counter(
        json.dumps(case.input) for case in cases
    )
    assert "comparison" not in results
    assert "baseline" not in results


def test_the_baseline_is_asked_the_same_in_the_same_way(make_at: MakeSFT) -> None:
    with Counsellor(lambda _: "はい") as counsellor:
        results = make_at(counsellor.url).evaluate_model_comprehensive(
            TUNED, dialogues(12), dialogues(11), baseline=True, eval_turns=2
        )
        ours, theirs = (
            [request for request in counsellor.asked if request["model"] == model]
            for model in (TUNED, BASE)
        )

    assert len(ours) + len(theirs) == len(counsellor.asked)
    assert questions(ours) == questions(theirs)
    assert len(ours) == 20
    assert {(r["temperature"], r["seed"], r["max_tokens"]) for r in ours} == {
        (r["temperature"], r["seed"], r["max_tokens"]) for r in theirs
    }
    assert results["baseline"]["model_id"] == results["comparison"]["baseline_model"] == BASE
    assert [r["case_id"] for r in responses(results)] == [*responses(results["baseline"])]
    assert results["comparison"]["test"]["pairs"] == 10


def test_a_baseline_that_is_named_is_the_one_asked(make_at: MakeSFT) -> None:
    with Counsellor(lambda _: "はい") as counsellor:
        results = make_at(counsellor.url).evaluate_model_comprehensive(
            TUNED, examples(3), [], baseline="another-model"
        )

    assert {request["model"] for request in counsellor.asked} == {TUNED, "another-model"}
    assert results["comparison"]["baseline_model"] == "another-model"


@pytest.mark.parametrize(
    ("model", "base"),
    [
        (f"ft:{BASE}:org::abc:ckpt-step-10", BASE),
        ("ft:gpt-4.1-2025-04-14:org:name:abc", "gpt-4.1-2025-04-14"),
        ("my-deployment", BASE),
    ],
)
def test_the_base_model_is_read_from_the_models_name(
    make_at: MakeSFT, model: str, base: str
) -> None:
    with Counsellor(lambda _: "はい") as counsellor:
        make_at(counsellor.url).evaluate_model_comprehensive(
            model, examples(1), [], baseline=True, concurrency=1
        )

    assert [request["model"] for request in counsellor.asked] == [model, base]


def test_the_settings_are_sent_and_recorded_and_nothing_is_left_to_chance(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    results = make_sft().evaluate_model_comprehensive(
        BASE, dialogues(9), [], max_test_cases=7, eval_turns="last", concurrency=3, seed=5
    )

    chosen = {"max_test_cases": 7, "eval_turns": "last", "concurrency": 3}
    recorded = {key: results["settings"][key] for key in ("temperature", "seed", "max_tokens")}

    assert recorded.items() >= {"temperature": 0, "seed": 5}.items()
    assert results["settings"].items() >= chosen.items()
    assert len(posts(endpoint, CHAT)) == 7
    for exchange in posts(endpoint, CHAT):
        assert exchange.request.items() >= recorded.items()


MESSAGES = {
    "max_tokens": "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
    "'max_completion_tokens' instead.",
    "temperature": "Unsupported value: 'temperature' does not support 0 with this model.",
    "seed": "Unsupported parameter: 'seed' is not supported with this model.",
}


KEY = "sk-recognisable-0123456789-wxyz"  # what is taken out of an error must not be a word of it


class Refusing:
    """A gateway's reply of an endpoint whose ``models`` take none of these options."""

    def __init__(self, *names: str, models: tuple[str, ...] = (BASE,), tells: bool = True) -> None:
        self.names, self.models, self.tells = names, models, tells
        self.refused: list[str] = []

    def __call__(self, request: Request, forward: Forward) -> Reply:
        if request.line != ("POST", CHAT) or request.json["model"] not in self.models:
            return forward(request)
        for name in self.names:
            if name in request.json:
                self.refused.append(name)
                kind = "value" if name == "temperature" else "parameter"
                param = name if self.tells else None
                error = {"message": MESSAGES[name], "type": "invalid_request_error"}
                return saying(
                    {"error": error | {"param": param, "code": f"unsupported_{kind}"}}, 400
                )
        return forward(request)


@pytest.mark.parametrize("tells", [True, False], ids=["by its param", "by its message"])
def test_what_a_model_refuses_is_left_out_once_and_for_all_said_and_recorded(
    make_sft: MakeSFT, endpoint: Rehearsal, log: Callable[[], list[str]], tells: bool
) -> None:
    refusing = Refusing("max_tokens", "temperature", "seed", tells=tells)
    with Gateway(endpoint, refusing) as gateway:
        results = make_sft(api_key=KEY, base_url=gateway.url).evaluate_model_comprehensive(
            BASE, examples(6), examples(9)[6:], 0, baseline=RIVAL, concurrency=1, max_tokens=77
        )
        sent = [r.json for r in gateway.asked if r.line == ("POST", CHAT)]
    changed = {"max_tokens": "max_completion_tokens", "temperature": None, "seed": None}
    own = [s for s in sent if s["model"] == BASE][3:]

    assert refusing.refused == ["max_tokens", "temperature", "seed"]
    assert len(own) == 9
    assert all(s["max_completion_tokens"] == 77 for s in own)
    assert all(s.keys() == {"model", "messages", "max_completion_tokens"} for s in own)
    assert all(
        {"max_tokens", "temperature", "seed"} <= s.keys() for s in sent if s["model"] != BASE
    )
    assert sum("受け付けない" in line for line in log()) == 3
    assert results["settings"]["refused_options"] == {BASE: changed}
    assert results["settings"]["max_tokens"] == 77
    assert all(r["refused_options"] == changed for r in responses(results))
    assert results["summary"]["total_cases_evaluated"] == 9


def test_many_at_once_are_refused_no_more_than_once_each(
    make_sft: MakeSFT, endpoint: Rehearsal, log: Callable[[], list[str]]
) -> None:
    refusing = Refusing("max_tokens", "temperature")
    with Gateway(endpoint, refusing) as gateway:
        results = make_sft(api_key=KEY, base_url=gateway.url).evaluate_model_comprehensive(
            BASE, examples(40), [], 0, concurrency=4
        )

    assert results["test_evaluation"]["failed_cases"] == 0
    assert len(refusing.refused) <= 2 * 4
    assert sum("受け付けない" in line for line in log()) == 2


def test_an_answer_had_without_an_option_is_used_later_and_tells_it(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    with Gateway(endpoint, Refusing("seed")) as gateway:
        make_sft(api_key=KEY, base_url=gateway.url).evaluate_model_comprehensive(
            BASE, examples(3), [], 0
        )
        results = make_sft(api_key=KEY, base_url=gateway.url).evaluate_model_comprehensive(
            BASE, examples(3), [], 0
        )

    assert len(posts(endpoint, CHAT)) == 3
    assert results["settings"]["refused_options"] == {BASE: {"seed": None}}


@pytest.mark.parametrize(
    ("name", "code"), [("messages", "unsupported_value"), ("temperature", "invalid_type")]
)
def test_any_other_refusal_fails_its_case_and_is_not_asked_again(
    make_at: MakeSFT, name: str, code: str
) -> None:
    error = {"message": f"'{name}' is wrong", "type": "x", "param": name, "code": code}

    def reply(request: Request, forward: Forward) -> Reply:
        return saying({"error": error}, 400)

    with Gateway(None, reply) as gateway:
        results = make_at(gateway.url).evaluate_model_comprehensive(BASE, examples(2), [], 0)
        asked = [r for r in gateway.asked if r.line == ("POST", CHAT)]

    assert len(asked) == 2 == results["test_evaluation"]["failed_cases"]


def test_a_model_known_to_be_better_is_called_better_end_to_end(make_at: MakeSFT) -> None:
    data = dialogues(100)
    real = {json.dumps(case.input): case.reference for case in choose_cases(data, max_cases=None)}

    def reply(request: dict[str, Any]) -> str:
        return real[json.dumps(request["messages"])] if request["model"] == TUNED else "そうですか"

    with Counsellor(reply) as counsellor:
        results = make_at(counsellor.url).evaluate_model_comprehensive(
            TUNED, data, [], 0, baseline=True
        )
    found = results["comparison"]["test"]

    assert (found["pairs"], found["left_out_pairs"]) == (100, 0)
    for name in ("chrf", "bleu_char", "rouge_l"):
        assert found["figures"][name]["tuned"] == pytest.approx(100)
        assert found["figures"][name]["verdict"] == "better"


def test_a_model_that_says_the_same_is_not_told_apart_end_to_end(make_at: MakeSFT) -> None:
    def reply(request: dict[str, Any]) -> str:
        return f"{request['messages'][-1]['content']}のですね。"

    with Counsellor(reply) as counsellor:
        results = make_at(counsellor.url).evaluate_model_comprehensive(
            TUNED, examples(10), [], baseline=True
        )

    for figure in results["comparison"]["test"]["figures"].values():
        assert figure["verdict"] == "indistinguishable"
    assert "区別できない" in results["comparison"]["test"]["sentence"]


def test_a_pair_with_an_error_on_either_side_or_both_is_counted(
    make_at: MakeSFT,
) -> None:
    data = dialogues(10)
    contexts = [json.dumps(case.input) for case in choose_cases(data, max_cases=None)]
    silent = {TUNED: contexts[:3], BASE: contexts[2:4]}

    def reply(request: dict[str, Any]) -> Any:
        hushed = json.dumps(request["messages"]) in silent[request["model"]]
        return completion(None, refusal="いいえ") if hushed else "そうですか"

    with Counsellor(reply) as counsellor:
        clock = iter(range(0, 10**9, 1000))  # a broken answer is asked for again for ten minutes
        results = make_at(
            counsellor.url, clock=lambda: 1_800_000_000.0 + next(clock)
        ).evaluate_model_comprehensive(TUNED, data, [], 0, baseline=True)
    found = results["comparison"]["test"]

    assert results["test_evaluation"]["failed_cases"] == 3
    assert results["baseline"]["test_evaluation"]["failed_cases"] == 2
    assert (found["pairs"], found["left_out_pairs"], found["failed_pairs"]) == (10, 0, 4)


# ── Answers that are none ────────────────────────────────────────────────────────────────────


def test_an_answer_that_takes_too_long_fails_its_case_alone(
    make_at: MakeSFT, endpoint: Rehearsal
) -> None:
    ended = threading.Event()

    def reply(request: Request, forward: Forward) -> Reply:
        if request.line == ("POST", CHAT) and "相談2".encode() in request.body:
            ended.wait(20)
        return forward(request)

    with Gateway(endpoint, reply) as gateway:
        results = make_at(gateway.url).evaluate_model_comprehensive(
            BASE, examples(3), [], 0, concurrency=3, timeout_per_answer=0.3
        )
        ended.set()
    (failed,) = (response for response in responses(results) if "error" in response)

    assert failed["case_id"].startswith("d2:")
    assert results["test_evaluation"]["evaluated_cases"] == 2


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (completion(None, refusal="お答えできません"), ("拒否", "お答えできません")),
        (completion(""), ("空", "finish_reason: stop")),
        (completion(None), ("空", "finish_reason: stop")),
        (completion(" \n　"), ("空", "finish_reason: stop")),
        (completion("", "length"), ("空", "finish_reason: length")),
        (completion("途中", "content_filter"), ("フィルター", "finish_reason: content_filter")),
    ],
    ids=["refused", "empty", "none", "blank", "cut to nothing", "filtered"],
)
def test_an_answer_that_is_none_fails_its_case_and_is_named(
    make_at: MakeSFT, body: dict[str, Any], named: tuple[str, ...]
) -> None:
    with Counsellor(lambda _: body) as counsellor:
        results = make_at(counsellor.url).evaluate_model_comprehensive(BASE, examples(2), [])

    for response in responses(results):
        assert "output" not in response
        assert all(word in response["error"] for word in named)
    assert results["test_evaluation"]["failed_cases"] == 2
    assert results["usage"]["completion_tokens"] == 10 * len(counsellor.asked)


def test_a_cut_answer_is_kept_counted_and_named(make_sft: MakeSFT, endpoint: Rehearsal) -> None:
    endpoint.inject(Fault("length", "POST", CHAT))
    part = make_sft().evaluate_model_comprehensive(BASE, examples(3), [], concurrency=1)
    found = part["test_evaluation"]

    assert [r["finish_reason"] for r in found["responses"]] == ["length", "stop", "stop"]
    assert all(response["output"] for response in found["responses"])
    assert (found["cut_cases"], found["failed_cases"]) == (1, 0)


@pytest.mark.parametrize("body", [b"<html>\xe3\x81\x82</html>", b"[]", b"null"], ids=str)
def test_a_question_that_meets_a_page_instead_of_an_answer_is_asked_again(
    make_sft: MakeSFT, endpoint: Rehearsal, body: bytes
) -> None:
    pages = [Reply(200, body, "text/html" if b"<" in body else "application/json")]

    def serve(request: Request, forward: Forward) -> Reply:
        return pages.pop() if request.line == ("POST", CHAT) and pages else forward(request)

    with (
        Gateway(endpoint, serve) as gateway,
        make_sft(client=None, base_url=gateway.url) as sft,
    ):
        results = sft.evaluate_model_comprehensive(BASE, examples(3), [], concurrency=1)

    assert pages == []
    assert results["test_evaluation"]["evaluated_cases"] == 3
    assert results["test_evaluation"]["failed_cases"] == 0


@pytest.mark.parametrize("text", ["眠れない\ud83d", "\udc00"], ids=["cut emoji", "surrogate"])
def test_half_an_emoji_loses_no_answer(make_at: MakeSFT, text: str) -> None:
    with Counsellor(lambda _: f"そうです{text}") as counsellor:
        sft = make_at(counsellor.url)
        results = sft.evaluate_model_comprehensive(BASE, examples(2), [])
        path = sft.save_results(results)

    assert results["summary"]["total_cases_evaluated"] == 2
    assert all(response["output"].startswith("そうです") for response in responses(results))
    assert read_json(path) == results


@pytest.mark.parametrize(
    "usage", [None, "x", {}, [], {"prompt_tokens": "many", "completion_tokens": None}]
)
def test_a_usage_that_is_none_loses_no_answer(make_at: MakeSFT, usage: Any) -> None:
    with Counsellor(lambda _: completion("はい", usage=usage)) as counsellor:
        results = make_at(counsellor.url).evaluate_model_comprehensive(BASE, examples(2), [])

    assert results["summary"]["total_cases_evaluated"] == 2
    assert all(response["usage"]["estimated"] for response in responses(results))
    assert results["usage"]["completion_tokens"] == 2 * TokenCounter(load_vocabulary()).count_texts(
        ["はい"]
    )


# ── Several at once ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("concurrency", [1, 5])
def test_so_many_are_asked_at_once_and_never_more(make_at: MakeSFT, concurrency: int) -> None:
    with Counsellor(lambda _: "はい", together=concurrency) as counsellor:
        results = make_at(counsellor.url).evaluate_model_comprehensive(
            BASE, examples(10), examples(5), concurrency=concurrency
        )

    assert counsellor.most == concurrency
    assert results["summary"]["total_cases_evaluated"] == 15
    until(lambda: not asking_threads(), timeout=2)


def test_both_splits_and_both_models_are_asked_together(make_at: MakeSFT) -> None:
    with Counsellor(lambda _: "はい", together=8) as counsellor:
        results = make_at(counsellor.url).evaluate_model_comprehensive(
            TUNED, examples(2), examples(4)[2:], baseline=True, concurrency=8
        )

    assert counsellor.most == 8
    assert results["summary"]["total_cases_evaluated"] == 4
    assert results["baseline"]["test_evaluation"]["evaluated_cases"] == 2


def test_what_stops_half_way_has_asked_both_models_the_same(make_at: MakeSFT) -> None:
    with Counsellor(lambda _: "はい") as counsellor:
        sft = make_at(counsellor.url, max_cost_usd=1e-4, price=Price(0, 0, 0, 0, 0))
        sft.evaluate_model_comprehensive(TUNED, examples(3), [], 0, baseline=BASE, concurrency=1)

    asked = [(request["messages"][0]["content"], request["model"]) for request in counsellor.asked]
    assert [model for _, model in asked] == [TUNED, BASE] * 3
    assert [said for said, _ in asked[::2]] == [said for said, _ in asked[1::2]]


def test_what_is_asked_never_keeps_the_program_from_ending(make_at: MakeSFT) -> None:
    waited_for: list[bool] = []

    def reply(_: dict[str, Any]) -> str:
        waited_for.extend(not thread.daemon for thread in asking_threads())
        return "はい"

    with Counsellor(reply) as counsellor:
        make_at(counsellor.url).evaluate_model_comprehensive(BASE, examples(2), [])

    assert waited_for
    assert not any(waited_for)


def test_answers_stand_in_the_order_of_their_cases_however_they_come(make_at: MakeSFT) -> None:
    data = dialogues(10)
    order = [json.dumps(case.input) for case in choose_cases(data, max_cases=None)]
    waits = [threading.Event() for _ in order]
    waits[-1].set()

    def reply(request: dict[str, Any]) -> str:
        place = order.index(json.dumps(request["messages"]))
        waits[place].wait(10)  # for the case after it: they are answered from the last
        if place:
            waits[place - 1].set()
        return f"{place}番"

    with Counsellor(reply) as counsellor:
        results = make_at(counsellor.url).evaluate_model_comprehensive(
            BASE, data, [], concurrency=10
        )

    assert [response["output"] for response in responses(results)] == [
        f"{place}番" for place in range(10)
    ]


def test_a_limit_of_six_slows_sixteen_down_and_loses_none(make_at: MakeSFT) -> None:
    with Rehearsal(latency=0.01, max_in_flight=6) as endpoint:
        results = make_at(endpoint.url).evaluate_model_comprehensive(
            BASE, examples(150), [], 0, concurrency=16
        )
        told = Counter(exchange.status for exchange in endpoint.exchanges)

    assert results["test_evaluation"]["failed_cases"] == 0
    assert told[200] == results["summary"]["total_cases_evaluated"] == 150
    assert 1 <= told[429] <= 40  # ten of them before the first of them is heard


def test_as_many_as_the_limit_never_meet_it(make_at: MakeSFT) -> None:
    with Rehearsal(latency=0.005, max_in_flight=4) as endpoint:
        make_at(endpoint.url).evaluate_model_comprehensive(BASE, examples(60), [], 0, concurrency=4)

        assert {exchange.status for exchange in endpoint.exchanges} == {200}


def meet(barrier: threading.Barrier) -> None:
    with contextlib.suppress(threading.BrokenBarrierError):  # the test asks whether it is broken
        barrier.wait()


def test_a_wave_of_refusals_halves_once_what_is_asked_at_once(make_at: MakeSFT) -> None:
    places = itertools.count()
    eight, four = threading.Barrier(8, timeout=10), threading.Barrier(4, timeout=2)
    over, fifth = threading.Event(), threading.Event()

    def reply(_: dict[str, Any]) -> Any:
        place = next(places)
        if place < 8:
            meet(eight)
            return 429
        if place < 12:
            meet(four)
            fifth.wait(0.1)  # which must not come
            over.set()
        elif not over.is_set():
            fifth.set()
        return "はい"

    with Counsellor(reply) as counsellor:
        results = make_at(counsellor.url).evaluate_model_comprehensive(
            BASE, examples(16), [], 0, concurrency=8
        )

    assert results["summary"]["total_cases_evaluated"] == 16
    assert not four.broken
    assert not fifth.is_set()


def test_answers_widen_again_what_is_asked_at_once(make_at: MakeSFT) -> None:
    places, two = itertools.count(), threading.Barrier(2, timeout=2)
    over, second = threading.Event(), threading.Event()

    def reply(_: dict[str, Any]) -> Any:
        place = next(places)
        if place == 2:  # alone, after two were refused
            second.wait(0.1)  # which must not come
            over.set()
            return "はい"
        if place == 3 and not over.is_set():
            second.set()
        meet(two)
        return 429 if place < 2 else "はい"

    with Counsellor(reply) as counsellor:
        results = make_at(counsellor.url).evaluate_model_comprehensive(
            BASE, examples(3), [], 0, concurrency=2
        )

    assert results["summary"]["total_cases_evaluated"] == 3
    assert not two.broken
    assert not second.is_set()


def test_the_endpoints_own_wait_is_kept(make_at: MakeSFT, endpoint: Rehearsal) -> None:
    slept: list[float] = []
    endpoint.inject(Fault("429", "POST", CHAT, times=3, seconds=7))
    results = make_at(endpoint.url, sleep=slept.append).evaluate_model_comprehensive(
        BASE, examples(6), [], concurrency=3
    )

    assert results["test_evaluation"]["failed_cases"] == 0
    assert len(slept) == 3
    assert min(slept) >= 7


@pytest.mark.parametrize("fault", ["401", "403", "404", "insufficient_quota"])
def test_an_error_that_meets_every_case_stops_at_once_and_leaves_no_thread(
    make_sft: MakeSFT, endpoint: Rehearsal, fault: str
) -> None:
    endpoint.inject(Fault(fault, "POST", CHAT, times=None))
    with pytest.raises(openai.APIStatusError):
        make_sft().evaluate_model_comprehensive(BASE, examples(100), [], 0, concurrency=4)

    until(lambda: not asking_threads(), timeout=2)
    assert 1 <= len(posts(endpoint, CHAT)) <= 4


def test_one_client_and_one_endpoint_serve_all_questions(
    clean_environment: Any, make_sft: MakeSFT
) -> None:
    def endpoints() -> int:
        return sum(thread.name == "rehearsal" for thread in threading.enumerate())

    before = endpoints()
    sft = make_sft(client=None, rehearse=True)
    sft.evaluate_model_comprehensive(BASE, examples(16), [], 0, concurrency=16)
    during = endpoints()
    sft.close()

    assert during == before + 1
    assert endpoints() == before


def test_a_model_that_is_still_loading_is_waited_for_by_one_question(
    make_sft: MakeSFT, endpoint: Rehearsal, log: Callable[[], list[str]]
) -> None:
    clock = Clock(endpoint)
    endpoint.inject(Fault("404", "POST", CHAT, times=3))
    results = make_sft(clock=clock, sleep=clock.sleep).run_full_pipeline(1, 4, max_test_cases=2)
    asked = posts(endpoint, CHAT)

    assert results["summary"]["total_cases_evaluated"] == 4
    assert [exchange.status for exchange in asked] == [404, 404, 404, 200, 200, 200, 200]
    assert len({json.dumps(exchange.request) for exchange in asked[:4]}) == 1
    assert sum("準備を待っています" in line for line in log()) == 1


# ── Resuming ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def many(clean_environment: Any) -> str:
    """A hundred dialogues, of which ten are test and ten validation."""
    return str(write_jsonl(clean_environment / "many.jsonl", records(100)))


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_resumed_evaluation_asks_only_what_is_missing_and_counts_all_tokens(
    make_sft: MakeSFT, endpoint: Rehearsal, many: str, concurrency: int
) -> None:
    endpoint.inject(Fault("401", "POST", CHAT, skip=25))
    options: dict[str, Any] = {"baseline": "gpt-4.1-2025-04-14", "concurrency": concurrency}
    first = make_sft(dataset=many)
    with pytest.raises(openai.AuthenticationError):
        first.run_evaluation(BASE, max_test_cases=10, **options)
    until(lambda: not asking_threads(), timeout=2)
    lines = Path(first.files["journal"]).read_text("utf-8").split("\n")
    kept = [json.loads(line) for line in lines if line]
    first.close()
    before = len(posts(endpoint, CHAT))
    results = make_sft(dataset=many).resume()
    after = posts(endpoint, CHAT)[before:]

    assert results is not None
    assert len(kept) + len(after) == 40
    assert len(kept) >= 25 - concurrency
    asked_now = {(e.request["model"], json.dumps(e.request["messages"])) for e in after}
    assert not asked_now & {(line["model_id"], json.dumps(line["input"])) for line in kept}
    assert results["summary"]["total_cases_evaluated"] == 20
    assert results["comparison"]["test"]["pairs"] == results["comparison"]["valid"]["pairs"] == 10
    for key in ("prompt_tokens", "completion_tokens"):
        now = sum(exchange.response["usage"][key] for exchange in after)
        assert results["usage"][key] == sum(line["usage"][key] for line in kept) + now
        assert results["usage"][key] == sum(
            of_model[key] for of_model in results["usage"]["by_model"].values()
        )


def test_a_case_that_failed_is_asked_again_when_an_evaluation_is_resumed(
    make_sft: MakeSFT, endpoint: Rehearsal, many: str
) -> None:
    endpoint.inject(Fault("400", "POST", CHAT, skip=2))
    endpoint.inject(Fault("401", "POST", CHAT, skip=5))
    first = make_sft(dataset=many)
    with pytest.raises(openai.AuthenticationError):
        first.run_evaluation(BASE, concurrency=1)
    first.close()
    before = len(posts(endpoint, CHAT))
    results = make_sft(dataset=many).resume()

    assert results is not None
    assert results["summary"]["total_cases_evaluated"] == 20
    answered_before = sum(e.status == 200 for e in posts(endpoint, CHAT)[:before])
    assert len(posts(endpoint, CHAT)) - before == 20 - answered_before


def test_what_is_answered_already_is_not_held_against_the_limit_twice(
    make_sft: MakeSFT, endpoint: Rehearsal, many: str
) -> None:
    endpoint.inject(Fault("401", "POST", CHAT, skip=15))
    first = make_sft(dataset=many)
    with pytest.raises(openai.AuthenticationError):
        first.run_evaluation(BASE, concurrency=1)
    first.close()
    estimate = read_json(first.files["record"])["estimate"]["total_usd"]
    usages = [e.response["usage"] for e in posts(endpoint, CHAT) if e.status == 200]
    paid = sum(u["prompt_tokens"] * 0.15 + u["completion_tokens"] * 0.60 for u in usages) / 1e6
    results = make_sft(dataset=many, max_cost_usd=estimate + 0.9 * paid).resume()

    assert results is not None
    assert results["summary"]["total_cases_evaluated"] == 20


def test_what_the_answers_so_far_have_cost_counts_before_another_is_asked_for(
    make_sft: MakeSFT, endpoint: Rehearsal, many: str
) -> None:
    """They were far longer than was estimated: 20 cents each."""

    def long(request: Request, forward: Forward) -> Reply:
        reply = forward(request)
        if reply.status != 200:
            return reply
        usage = {"prompt_tokens": 1_333_333, "completion_tokens": 0, "total_tokens": 1_333_333}
        return saying({**reply.json, "usage": usage})

    endpoint.inject(Fault("401", "POST", CHAT, skip=3))
    with Gateway(endpoint, long) as gateway:
        options = {"dataset": many, "client": None, "base_url": gateway.url}
        with make_sft(**options) as first, pytest.raises(openai.AuthenticationError):
            first.run_evaluation(BASE, concurrency=1)
        before = len(posts(endpoint, CHAT))
        with make_sft(**options, max_cost_usd=0.5) as later, pytest.raises(BudgetError):
            later.resume()

    assert len(posts(endpoint, CHAT)) == before


def test_an_answer_that_an_earlier_run_has_had_is_used_and_not_paid_again(
    make_at: MakeSFT, log: Callable[[], list[str]]
) -> None:
    price = Price(0, 1, 1, 1, 1)
    with Counsellor(lambda request: f"答え{len(request['messages'])}") as counsellor:
        few = make_at(counsellor.url, price=price).evaluate_model_comprehensive(
            TUNED, examples(9), [], 3, baseline=True
        )
        estimates: list[CostEstimate] = []
        later = make_at(counsellor.url, price=price, confirm=lambda one: not estimates.append(one))
        more = later.evaluate_model_comprehensive(TUNED, examples(9), [], 5, baseline=True)
        again = make_at(counsellor.url).evaluate_model_comprehensive(
            TUNED, examples(9), [], 5, baseline=True
        )
    reused = [r for r in responses(more) if "reused_from" in r]

    assert len(counsellor.asked) == 10 == sum(questions(counsellor.asked).values())
    assert set(questions(counsellor.asked).values()) == {2}
    assert "以前の実行の応答6件を使います（料金はかかりません）。" in log()
    assert [r["output"] for r in responses(more)[:3]] == [r["output"] for r in responses(few)]
    assert len(reused) == 3
    assert more["usage"]["prompt_tokens"] == 4 * 100
    assert more["cost"]["evaluation_usd"] == pytest.approx(4 * 110 / 1e6)
    assert again["cost"]["evaluation_usd"] == again["usage"]["prompt_tokens"] == 0
    assert [r["output"] for r in responses(again)] == [r["output"] for r in responses(more)]
    assert len(estimates) == 1
    assert (estimates[0].evaluation_usd or 0) < 6 * 110 / 1e6


@pytest.mark.parametrize(
    "other", [{"temperature": 0.5}, {"seed": 7}, {"max_tokens": 9}, {"model": BASE}], ids=str
)
def test_an_answer_to_another_model_or_with_other_settings_is_none(
    make_at: MakeSFT, other: dict[str, Any]
) -> None:
    model, data = other.get("model", TUNED), examples(2)
    options = {key: value for key, value in other.items() if key != "model"}
    with Counsellor(lambda _: "はい") as counsellor:
        make_at(counsellor.url).evaluate_model_comprehensive(TUNED, data, [], 0)
        make_at(counsellor.url).evaluate_model_comprehensive(model, data, [], 0, **options)

    assert len(counsellor.asked) == 4


def test_an_answer_of_another_endpoint_or_with_other_tools_is_none(make_at: MakeSFT) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    data = examples(2)
    with Counsellor(lambda _: "はい") as one, Counsellor(lambda _: "はい") as two:
        make_at(one.url).evaluate_model_comprehensive(TUNED, data, [], 0)
        make_at(two.url).evaluate_model_comprehensive(TUNED, data, [], 0)
        with_tools = [example | {"tools": [tool]} for example in data]
        make_at(two.url).evaluate_model_comprehensive(TUNED, with_tools, [], 0)

    assert (len(one.asked), len(two.asked)) == (2, 4)


def test_a_question_that_comes_twice_is_asked_twice_and_both_answers_are_used_later(
    make_at: MakeSFT,
) -> None:
    data = [example(name, "こんにちは", "はい", "では", "お大事に") for name in ("a", "b", "c")]
    with Counsellor(lambda _: f"{len(counsellor.asked)}番目") as counsellor:
        make_at(counsellor.url).evaluate_model_comprehensive(
            TUNED, data[:1], data[1:], 0, temperature=1.0, concurrency=1, seed=7
        )
        results = make_at(counsellor.url).evaluate_model_comprehensive(
            TUNED, data, [], 0, temperature=1.0, concurrency=1, seed=7
        )

    assert len(counsellor.asked) == 3
    assert {r["output"] for r in responses(results)} == {"1番目", "2番目", "3番目"}
    assert {r["case_id"] for r in responses(results)} == {"a:1", "b:1", "c:1"}


def test_an_error_and_a_journal_that_is_a_link_give_no_answer(
    make_at: MakeSFT, endpoint: Rehearsal, out: Path, log: Callable[[], list[str]]
) -> None:
    endpoint.inject(Fault("refusal", times=1))
    make_at(endpoint.url).evaluate_model_comprehensive(BASE, examples(2), [], 0, concurrency=1)
    make_at(endpoint.url).evaluate_model_comprehensive(BASE, examples(2), [], 0)
    for path in out.glob("evaluation_*.jsonl"):
        path.rename(path.with_suffix(".kept"))
        path.symlink_to(path.with_suffix(".kept"))
    make_at(endpoint.url).evaluate_model_comprehensive(BASE, examples(2), [], 0)

    assert len(posts(endpoint, CHAT)) == 2 + 1 + 2
    assert sum("応答は使えません" in line for line in log()) == 2


def test_other_settings_are_asked_anew_and_nothing_is_taken_from_the_run_before(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    endpoint.inject(Fault("401", "POST", CHAT, skip=1))
    with make_sft() as first, pytest.raises(openai.AuthenticationError):
        first.run_evaluation(BASE)
    later = make_sft()
    later.resume()
    before = len(posts(endpoint, CHAT))
    parts = [later.prepare_dataset(part) for part in later.load_and_split_dataset()]
    for temperature in (1.0, 0.5):
        later.evaluate_model_comprehensive(BASE, parts[1], parts[2], temperature=temperature)
    after = posts(endpoint, CHAT)[before:]

    assert [e.request["temperature"] for e in after] == [1.0] * 4 + [0.5] * 4


def test_an_evaluation_that_an_earlier_version_recorded_without_a_plan_gives_no_answers_away(
    make_sft: MakeSFT, endpoint: Rehearsal, file: Path
) -> None:
    with make_sft() as first:
        job_id = first.create_fine_tune_job(first.upload_training_file(file), 1, 4)
        first.monitor_fine_tune_job(job_id)
        first.evaluate_model_comprehensive(BASE, examples(5), [], temperature=1.0)
    path = Path(first.files["record"])
    record = read_json(path)
    path.write_text(
        json.dumps({k: v for k, v in record.items() if k not in ("plan", "finished_at")}), "utf-8"
    )
    journal = Path(first.files["journal"])  # whose answers had no keys then
    lines = [json.loads(line) for line in journal.read_text("utf-8").splitlines()]
    keyless = ({k: v for k, v in line.items() if k != "key"} for line in lines)
    journal.write_text("".join(f"{json.dumps(line)}\n" for line in keyless), "utf-8")
    later = make_sft()
    later.monitor_fine_tune_job(job_id)
    later.evaluate_model_comprehensive(BASE, examples(5), [], temperature=0.5)

    assert [e.request["temperature"] for e in posts(endpoint, CHAT)] == [1.0] * 5 + [0.5] * 5


def test_a_second_evaluation_of_one_instance_has_a_record_without_the_plan_of_the_first(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    sft = make_sft()
    sft.run_full_pipeline(1, 4, max_test_cases=1)
    path = Path(sft.files["record"])
    before = path.read_bytes()
    results = sft.evaluate_model_comprehensive(BASE, examples(5), [], max_test_cases=2)
    saved = Path(sft.save_results(results))
    kept = read_json(sft.files["record"])

    assert path.read_bytes() == before
    assert kept["kind"] == "steps"
    assert {"job_id", "fine_tuned_model"} & kept.keys() == set()
    assert {key for key, value in kept["plan"].items() if value is not None} == {
        *("asking", "model_id", "asked")
    }
    assert (kept["plan"]["model_id"], kept["plan"]["asking"]["max_test_cases"]) == (BASE, 2)
    assert kept["finished_at"]
    assert kept["files"].keys() == {
        *("train", "test", "valid", "manifest"),
        *("asked", "journal", "comprehensive_evaluation", "answers", "report"),
    }
    assert kept["files"]["comprehensive_evaluation"] == str(saved)
    assert kept["cost"].keys() == {"evaluation_usd", "total_usd"}
    assert len(Path(kept["files"]["journal"]).read_text("utf-8").splitlines()) == 2
    assert len(make_sft().list_runs()) == 2
    assert make_sft().resume() is None


RIVAL = "gpt-4.1-2025-04-14"


class Outage:
    """A gateway's reply: answers five questions, and is then down until it is told otherwise."""

    def __init__(self) -> None:
        self.left: float = 5

    def __call__(self, request: Request, forward: Forward) -> Reply:
        if request.line == ("POST", CHAT):
            self.left -= 1
            if self.left < 0:
                return refusal(503)
        return forward(request)

    def end(self) -> None:
        self.left = float("inf")


def evaluate_until(outage: Outage, sft: OpenAISFT, **options: Any) -> None:
    """An evaluation of data that nobody saved, step by step, ended by ``outage``."""
    with pytest.raises(openai.InternalServerError):
        sft.evaluate_model_comprehensive(
            BASE, examples(7), examples(11)[7:], 3, baseline=RIVAL, concurrency=1, seed=7, **options
        )
    outage.end()


@pytest.mark.parametrize("who", ["the same instance", "another", "the command line"])
def test_an_evaluation_made_step_by_step_that_an_outage_ended_is_resumed_for_the_rest_alone(
    make_sft: MakeSFT, endpoint: Rehearsal, cli: Callable[..., Ended], who: str, out: Path
) -> None:
    outage = Outage()
    with Gateway(endpoint, outage) as gateway:
        options: dict[str, Any] = {"client": None, "base_url": gateway.url}
        sft = make_sft(**options)
        evaluate_until(outage, sft, temperature=0.5, max_tokens=77)
        name = Path(sft.files["record"]).stem
        told = sft.describe_remote_state()
        if who == "the command line":
            place = ("--base-url", gateway.url, "--output-dir", out, "--yes")
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("OPENAI_API_KEY", "k")
                ended = cli("--resume", name, *place)
            assert ended.code == 0
        else:
            later = sft if who == "the same instance" else make_sft(**options)
            assert later.resume(name)
    record = read_json(out / f"{name}.json")
    results = read_json(record["files"]["comprehensive_evaluation"])
    answered = [e for e in posts(endpoint, CHAT) if e.status == 200]
    whole = make_sft().evaluate_model_comprehensive(
        *(BASE, examples(7), examples(11)[7:], 3),
        **{"baseline": RIVAL, "seed": 7, "temperature": 0.5, "max_tokens": 77},
    )

    assert f"--resume {name}" in told
    assert len(answered) == len({json.dumps(e.request) for e in answered}) == 12
    for part in ("test_evaluation", "valid_evaluation"):
        outputs = [[r["case_id"], r["input"], r["output"]] for r in results[part]["responses"]]
        assert outputs == [
            [r["case_id"], r["input"], r["output"]] for r in whole[part]["responses"]
        ]
        assert results[part]["total_test_cases"] == whole[part]["total_test_cases"]
    assert results["usage"] == whole["usage"]
    assert record["cost"]["evaluation_usd"] == pytest.approx(whole["cost"]["evaluation_usd"])
    assert record["finished_at"]
    assert make_sft().resume() is None


def test_the_rest_of_an_evaluation_made_step_by_step_passes_the_door_to_payment(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    estimates: list[CostEstimate] = []
    outage = Outage()
    with Gateway(endpoint, outage) as gateway:
        options: dict[str, Any] = {"client": None, "base_url": gateway.url}
        first = make_sft(confirm=lambda one: not estimates.append(one), **options)
        evaluate_until(outage, first)
        before = len(posts(endpoint, CHAT))
        with pytest.raises(BudgetError):
            make_sft(max_cost_usd=1e-9, **options).resume()
        with pytest.raises(Declined):  # which closes it
            make_sft(confirm=estimates.append, **options).resume()
    whole, rest = estimates

    assert len(posts(endpoint, CHAT)) == before == 5
    assert 0 < (rest.evaluation_usd or 0.0) < (whole.evaluation_usd or 0.0)


def test_cases_that_changed_since_an_evaluation_stopped_are_not_asked(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    endpoint.inject(Fault("401", "POST", CHAT, skip=2))
    with make_sft() as sft, pytest.raises(openai.AuthenticationError):
        sft.evaluate_model_comprehensive(BASE, examples(5), [], concurrency=1)
    path = Path(sft.files["asked"])
    path.write_text(path.read_text("utf-8").replace("相談", "質問"), "utf-8")
    before = len(posts(endpoint))
    with pytest.raises(DataError, match=re.escape(path.name)):
        make_sft().resume()

    assert len(posts(endpoint)) == before


@pytest.mark.parametrize("end", ["succeeded", "failed"])
def test_a_job_beside_an_unfinished_evaluation_is_watched_and_the_evaluation_is_resumed(
    make_sft: MakeSFT, endpoint: Rehearsal, file: Path, end: str
) -> None:
    if end == "failed":
        endpoint.inject(Fault("job_failed"))
    endpoint.inject(Fault("401", "POST", CHAT, skip=1))
    with make_sft() as sft:
        job_id = sft.create_fine_tune_job(sft.upload_training_file(file), 1, 4)
        sft.monitor_fine_tune_job(job_id)
        with pytest.raises(openai.AuthenticationError):
            sft.evaluate_model_comprehensive(BASE, examples(5), [], concurrency=1)
    job = make_sft().attach(job_id)
    results = make_sft().resume()

    assert getattr(job, "status", None) == end
    assert results is not None
    assert results["summary"]["total_cases_evaluated"] == 5


def test_where_nothing_is_left_to_ask_nobody_is_asked_to_pay(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    asked: list[CostEstimate] = []
    results = make_sft(confirm=asked.append).evaluate_model_comprehensive(BASE, [], [])

    assert results["summary"]["total_cases_evaluated"] == 0
    assert asked == []


def test_an_answer_that_was_under_way_when_another_was_refused_for_all_is_kept(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    refused, turn = threading.Event(), iter((True, False))

    def serve(request: Request, forward: Forward) -> Reply:
        if request.line != ("POST", CHAT):
            return forward(request)
        if next(turn):
            refused.wait(10)
            return forward(request)
        until(lambda: len(gateway.of("POST", CHAT)) == 2)
        threading.Timer(0.1, refused.set).start()
        return refusal(401)

    with (
        Gateway(endpoint, serve) as gateway,
        make_sft(client=None, base_url=gateway.url) as sft,
    ):
        with pytest.raises(openai.AuthenticationError):
            sft.evaluate_model_comprehensive(BASE, examples(20), [], 0, concurrency=2)
        kept = Path(sft.files["journal"]).read_text("utf-8").split("\n")[:-1]
        cost = read_json(sft.files["record"])["cost"]
    (answer,) = posts(endpoint, CHAT)

    assert [json.loads(line)["usage"] for line in kept] == [answer.response["usage"]]
    assert cost["evaluation_usd"] > 0


# ── The results ──────────────────────────────────────────────────────────────────────────────


def test_the_results_keep_their_shape_and_gain_figures_comparison_usage_cost_and_settings(
    make_at: MakeSFT,
) -> None:
    with Counsellor(lambda _: "はい、眠れないのですね。") as counsellor:
        results = make_at(counsellor.url).evaluate_model_comprehensive(
            TUNED, dialogues(5), dialogues(3), max_test_cases=2, baseline=True
        )

    assert set(results) >= {
        *("model_id", "evaluation_timestamp", "test_evaluation", "valid_evaluation", "summary")
    }
    assert set(results) >= {"baseline", "comparison", "usage", "cost", "settings"}
    for name, total in (("test", 5), ("valid", 3)):
        part = results[f"{name}_evaluation"]
        assert part["dataset_type"] == name
        assert (part["total_test_cases"], part["evaluated_cases"]) == (total, 2)
        assert set(part["metrics"]) >= {
            *("chrf", "bleu_char", "rouge_l", "dist_1", "dist_2"),
            *("length_ratio", "backchannel_share"),
        }
        told = {key for key, figure in part["metrics"].items() if figure["score"] is not None}
        assert set(results["comparison"][name]["figures"]) == told
        assert part["missing_metrics"] == []
        for response in part["responses"]:
            assert set(response) >= {
                *("case_id", "input", "output", "reference", "usage", "latency_seconds"),
                "finish_reason",
            }


def test_tokens_and_dollars_are_of_all_that_was_asked_of_both(make_at: MakeSFT) -> None:
    with Counsellor(lambda _: "はい") as counsellor:
        results = make_at(counsellor.url).evaluate_model_comprehensive(
            TUNED, examples(10), [], baseline=True
        )
    each = {"prompt_tokens": 1000, "completion_tokens": 100, "cached_tokens": 0}

    assert results["usage"] == {
        "prompt_tokens": 2000,
        "completion_tokens": 200,
        "cached_tokens": 0,
        "by_model": {TUNED: each, BASE: each},
    }
    dollars = (1000 * 0.30 + 100 * 1.20 + 1000 * 0.15 + 100 * 0.60) / 1e6
    assert results["cost"]["evaluation_usd"] == pytest.approx(dollars)
    assert results["cost"]["total_usd"] == pytest.approx(dollars)


def with_cached(tokens: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return completion("はい", usage=usage | {"prompt_tokens_details": tokens})


@pytest.mark.parametrize(
    ("price", "tuned", "base"),
    [
        (None, 40 * 0.30 + 60 * 0.15 + 10 * 1.20, 40 * 0.15 + 60 * 0.075 + 10 * 0.60),
        (Price(9, 7, 5, 3, 2), 100 * 7 + 10 * 5, 100 * 3 + 10 * 2),
        (Price(9, 7, 5, 3, 2, 1, 0), 40 * 7 + 60 * 1 + 10 * 5, 40 * 3 + 10 * 2),
    ],
    ids=["the table's", "given without", "given"],
)
def test_cached_tokens_are_paid_at_their_price(
    make_at: MakeSFT,
    log: Callable[[], list[str]],
    price: Price | None,
    tuned: float,
    base: float,
) -> None:
    with Counsellor(lambda _: with_cached({"cached_tokens": 60})) as counsellor:
        results = make_at(counsellor.url, price=price).evaluate_model_comprehensive(
            TUNED, examples(5), [], baseline=True
        )

    assert results["cost"]["evaluation_usd"] == pytest.approx(5 * (tuned + base) / 1e6)
    assert results["usage"]["cached_tokens"] == 600
    assert any("評価の実費" in line and "600トークン" in line for line in log())


@pytest.mark.parametrize(
    "tokens", [None, {}, {"cached_tokens": None}, {"cached_tokens": -5}, {"cached_tokens": "many"}]
)
def test_a_count_of_cached_tokens_that_is_none_changes_no_price(
    make_at: MakeSFT, tokens: Any
) -> None:
    with Counsellor(lambda _: with_cached(tokens)) as counsellor:
        results = make_at(counsellor.url).evaluate_model_comprehensive(TUNED, examples(5), [])
    with Counsellor(lambda _: with_cached({"cached_tokens": 999})) as counsellor:
        most = make_at(counsellor.url).evaluate_model_comprehensive(TUNED, examples(5), [])

    assert results["cost"]["evaluation_usd"] == pytest.approx(5 * (100 * 0.3 + 10 * 1.2) / 1e6)
    assert most["cost"]["evaluation_usd"] == pytest.approx(5 * (100 * 0.15 + 10 * 1.2) / 1e6)


def test_what_was_under_way_when_the_budget_ran_out_is_kept_and_shown(
    make_at: MakeSFT, out: Path
) -> None:
    """Four are asked at once of which the first alone is over the limit."""
    price = Price(0, 1000, 1000, 0, 0)
    with Counsellor(lambda _: "はい", together=4) as counsellor:
        sft = make_at(counsellor.url, price=price, max_cost_usd=0.1)
        with pytest.raises(BudgetError, match=re.escape("$0.4400")):
            sft.evaluate_model_comprehensive(TUNED, examples(2), examples(9)[2:4], concurrency=4)
        later = make_at(counsellor.url, price=price)
        results = later.resume()
    (journal,) = out.glob("evaluation_*.jsonl")

    assert len(counsellor.asked) == len(journal.read_text("utf-8").splitlines()) == 4
    assert results is not None
    assert results["cost"]["evaluation_usd"] == pytest.approx(0.44)


def test_a_given_price_is_that_of_the_tuned_model_and_not_of_its_baseline(
    make_at: MakeSFT,
) -> None:
    with Counsellor(lambda _: "はい") as counsellor:
        results = make_at(counsellor.url, price=Price(9, 7, 5)).evaluate_model_comprehensive(
            TUNED, examples(10), [], baseline=True
        )

    dollars = (1000 * 7 + 100 * 5 + 1000 * 0.15 + 100 * 0.60) / 1e6
    assert results["cost"]["evaluation_usd"] == pytest.approx(dollars)


def test_the_figures_are_sacrebleus_of_the_saved_answers(make_at: MakeSFT) -> None:
    with Counsellor(lambda r: f"{r['messages'][-1]['content']}のですね。") as counsellor:
        sft = make_at(counsellor.url)
        results = sft.evaluate_model_comprehensive(BASE, dialogues(30), dialogues(9), 0)
        path = sft.save_results(results)
    saved = read_json(path)

    assert saved == results
    for part in ("test", "valid"):
        metrics = saved[f"{part}_evaluation"]["metrics"]
        outputs = [response["output"] for response in responses(saved, part)]
        real = [[response["reference"] for response in responses(saved, part)]]
        bleu = BLEU(tokenize="char").corpus_score(outputs, real)
        assert metrics["chrf"]["score"] == pytest.approx(CHRF().corpus_score(outputs, real).score)
        assert metrics["bleu_char"]["score"] == pytest.approx(bleu.score)


def test_the_results_are_a_dict_that_json_can_write(make_sft: MakeSFT) -> None:
    results = make_sft().evaluate_model_comprehensive(
        BASE, examples(12), [], baseline="gpt-4.1-2025-04-14"
    )

    assert isinstance(results, dict)
    assert json.loads(json.dumps(results, allow_nan=False)) == results


def test_a_notebook_shows_a_table_in_which_hostile_text_is_text(make_at: MakeSFT) -> None:
    hostile = "<script>alert('&')</script>"
    with Counsellor(lambda _: f"{hostile}です") as counsellor:
        results = make_at(counsellor.url).evaluate_model_comprehensive(
            f"ft:{hostile}:rehearsal::a", examples(6), examples(6), baseline=hostile
        )
    shown = results._repr_html_()

    assert "<script" not in shown
    assert "&lt;script&gt;alert(&#x27;&amp;&#x27;)&lt;/script&gt;" in shown
    assert shown.count("<table>") == shown.count("</table>") == 3
    assert all(label in shown for label in ("chrF", "ROUGE-L", "区別できない", "95%区間"))
    assert "性能とは無関係" in shown


def test_a_notebook_shows_results_without_any_answer_too(make_sft: MakeSFT) -> None:
    results = make_sft().evaluate_model_comprehensive(BASE, [], [], baseline="other")

    assert BASE in results._repr_html_()


def test_the_printed_tables_stand_in_columns(
    make_at: MakeSFT, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(text: str) -> int:
        return sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in text)

    def reply(request: dict[str, Any]) -> str:
        return (
            "そうですか、もう少し聞かせてください。"
            if request["model"] == TUNED
            else "ええ、はい。"
        )

    with Counsellor(reply) as counsellor:
        results = make_at(counsellor.url).evaluate_model_comprehensive(
            TUNED, dialogues(12), dialogues(12), baseline=True
        )
    importlib.import_module("openai_sft_example").show_results(results)
    blocks = capsys.readouterr().out.split("\n\n")[1:]

    assert len(blocks) == 3
    for block in blocks:
        rows = [line for line in block.splitlines() if "  " in line]
        starts = {
            tuple(start(row[: cell.start()]) for cell in re.finditer(r"\S+(?: \S+)*", row))
            for row in rows
        }
        assert len(rows) >= 8
        assert len(starts) == 1
    assert blocks[0].splitlines()[0].split() == [
        *("指標", "テスト（10/10件）", "95%区間", "検証（10/10件）", "95%区間")
    ]
    assert blocks[1].splitlines()[0].startswith("比較（テスト、10組）")
    assert "判定" in blocks[1].splitlines()[0]
    assert any(line.startswith("ROUGE-L（文字）*") for line in blocks[1].splitlines())
    assert f"判定（テスト）: {results.sentences()[0]}" in blocks[2].splitlines()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_progress_bar_shows_errors_and_what_was_spent(
    make_at: MakeSFT, endpoint: Rehearsal, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    endpoint.inject(Fault("400", "POST", CHAT, times=2))
    results = make_at(endpoint.url, verbose=True).evaluate_model_comprehensive(
        BASE, examples(12), [], 0
    )
    last = terminal.getvalue().replace("\n", "\r").split("\r評価")[-1]

    assert "12/12" in last
    assert "失敗=2" in last
    assert f"$={results['cost']['evaluation_usd']:.4f}" in last


def test_the_progress_bar_of_a_rehearsal_shows_no_dollars(
    make_sft: MakeSFT, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    sft = make_sft(client=None, rehearse=True, verbose=True)
    results = sft.evaluate_model_comprehensive(BASE, examples(3), [])

    assert "3/3" in terminal.getvalue()
    assert "$" not in terminal.getvalue()
    assert "cost" not in results


# ── The budget ───────────────────────────────────────────────────────────────────────────────


def test_an_evaluation_over_the_budget_stops_before_its_first_question(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    with pytest.raises(BudgetError, match="上限"):
        make_sft(max_cost_usd=0.000_001).evaluate_model_comprehensive(BASE, examples(5), [])

    assert endpoint.exchanges == []


def test_the_price_of_enough_stands_beside_the_price_before_it_is_asked_for(
    make_at: MakeSFT,
) -> None:
    """All dialogues are as long; of 250 and 30 of them 200 and 30 are enough."""
    price, shown = Price(0, 1, 1, 1, 1), []
    data = [example(f"d{n:03}", f"相談{n:03}です", "眠れないのですね") for n in range(280)]

    def confirm(estimate: CostEstimate) -> bool:
        shown.append(estimate)
        return len(shown) < 3

    with Counsellor(lambda _: "はい") as counsellor:
        for count in (10, 20, 0):
            sft = make_at(counsellor.url, price=price, confirm=confirm)
            with contextlib.suppress(Declined):
                sft.evaluate_model_comprehensive(
                    TUNED, data[:250], data[250:], count, baseline=BASE
                )
    few, more, whole = shown
    each = (few.evaluation_usd or 0) / 20

    assert few.enough_cases == more.enough_cases == 230
    assert few.enough_usd == pytest.approx(230 * each, rel=0.02)
    assert more.evaluation_usd == pytest.approx(20 * each, rel=0.02)  # 20 were had before
    assert more.enough_usd == pytest.approx(210 * each, rel=0.02)
    assert whole.enough_cases is None
    (line,) = (line for line in few.lines() if "--max-test-cases 200" in line)
    assert f"${few.enough_usd:,.4f}" in line
    assert not any("--max-test-cases" in line for line in whole.lines())


def test_the_price_of_enough_is_shown_with_the_data_too(make_sft: MakeSFT, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "many.jsonl", records(100))
    summary = make_sft(dataset=str(source)).prepare_data(max_test_cases=3)
    small = make_sft(dataset=str(source)).prepare_data(max_test_cases=0)

    assert summary.estimate.enough_cases == 20
    assert any("計20件" in line for line in summary.lines())
    assert (summary.estimate.enough_usd or 0) == pytest.approx(
        small.estimate.evaluation_usd, rel=0.2
    )
    assert small.estimate.enough_cases is None


@pytest.mark.parametrize(("baseline", "stops"), [(None, False), (True, True)])
def test_the_baselines_questions_count_against_the_budget(
    make_at: MakeSFT, baseline: bool | None, stops: bool
) -> None:
    data = dialogues(20)
    with Counsellor(lambda _: "はい") as counsellor:
        alone = make_at(counsellor.url).estimate(Splits([], data, []), None, model=TUNED)
        assert alone.evaluation_usd
        # The service counts more tokens than were estimated, so there has to be some room.
        room = 1.25 if stops else 10
        sft = make_at(counsellor.url, max_cost_usd=room * alone.evaluation_usd)
        if stops:  # the base model costs half as much again
            with pytest.raises(BudgetError):
                sft.evaluate_model_comprehensive(TUNED, data, [], baseline=baseline)
        else:
            sft.evaluate_model_comprehensive(TUNED, data, [], baseline=baseline)

    assert len(counsellor.asked) == (0 if stops else 10)


@pytest.mark.parametrize(
    ("room", "price"),
    [
        *((0.98, None), (1.02, None)),
        *((0.98, Price(0, 1, 9)), (1.02, Price(0, 1, 9)), (0.98, Price(0, 9, 1))),
        (1.02, Price(0, 9, 1)),
    ],
    ids=str,
)
def test_the_limit_is_held_against_questions_and_answers_at_their_own_rates(
    make_at: MakeSFT, room: float, price: Price | None
) -> None:
    data = dialogues(20)
    free = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    with Counsellor(lambda _: completion("はい", usage=free)) as counsellor:
        estimate = make_at(counsellor.url, price=price).estimate(
            Splits([], data, []), None, model=TUNED
        )
        assert estimate.evaluation_usd
        sft = make_at(counsellor.url, price=price, max_cost_usd=room * estimate.evaluation_usd)
        with pytest.raises(BudgetError) if room < 1 else contextlib.nullcontext():
            sft.evaluate_model_comprehensive(TUNED, data, [])

    assert len(counsellor.asked) == (0 if room < 1 else 10)


def test_a_budget_can_not_be_kept_where_the_price_is_unknown(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    with pytest.raises(BudgetError, match="単価が不明"):
        make_sft(max_cost_usd=100).evaluate_model_comprehensive("no-such-model", examples(2), [])

    assert endpoint.exchanges == []


def test_a_baseline_without_a_price_is_refused_by_its_name_with_the_flags_that_price_it(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    data = examples(2)
    with pytest.raises(BudgetError, match=r"謎の-7b の単価が不明.*--price-base-input"):
        make_sft(max_cost_usd=100).evaluate_model_comprehensive(BASE, data, [], baseline="謎の-7b")
    dear = Price(3, 0.3, 1.2, base_input=1e9, base_output=0)
    with pytest.raises(BudgetError, match="を超えるため"):
        make_sft(max_cost_usd=100, price=dear).evaluate_model_comprehensive(
            BASE, data, [], baseline="謎の-7b"
        )

    assert endpoint.exchanges == []


def test_a_whole_evaluation_over_the_budget_stops_before_its_first_question(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    with pytest.raises(BudgetError):
        make_sft(max_cost_usd=0.000_001).run_evaluation(BASE, baseline=True)

    assert posts(endpoint) == []
