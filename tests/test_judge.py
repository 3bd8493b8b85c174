"""A judge beside the figures: what it is asked, what its verdicts come to, what it costs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from edges import Forward, Gateway, Reply, Request, saying
from endpoint import Rehearsal
from faults import CHAT
from helpers import Ended, examples, posts, read_json

from openai_sft import (
    TASKS,
    Asking,
    BudgetError,
    ConfigurationError,
    CostEstimate,
    Judgement,
    OpenAISFT,
    Price,
    Splits,
    Verdict,
    count_judgements,
)

MakeSFT = Callable[..., OpenAISFT]
Choose = Callable[[str, str], str]

BASE = "gpt-4o-mini-2024-07-18"
TUNED = f"ft:{BASE}:org::abc"
JUDGE = "gpt-4.1-2025-04-14"
KEY, JUDGE_KEY = "sk-recognisable-0123456789-wxyz", "sk-the-judges-own-987654321"


class Court:
    """A gateway's reply: what the two models answer, and how a judge chooses between A and B.

    ``choose`` gives the winner, or the whole text of the judge's answer, or a status.
    """

    def __init__(self, choose: Callable[[str, str], Any]) -> None:
        self.choose = choose
        self.asked: list[dict[str, Any]] = []  # what the judge was asked

    def __call__(self, request: Request, forward: Forward) -> Reply:
        if request.line != ("POST", CHAT):
            return saying({"id": BASE, "object": "model", "created": 1, "owned_by": "x"}, 200)
        body = request.json
        if body["model"] != JUDGE:
            mine = "長めの応答です。" if body["model"] == TUNED else "短い。"
            return saying(completion(mine + body["messages"][-1]["content"]), 200)
        self.asked.append(body)
        shown = json.loads(body["messages"][-1]["content"])
        said = self.choose(shown["A"], shown["B"])
        if isinstance(said, int):
            return saying({"error": {"message": "no", "type": "", "code": None}}, said)
        if said in ("A", "B", "tie"):
            said = json.dumps({"reason": "理由", "winner": said}, ensure_ascii=False)
        return saying(completion(said), 200)


def completion(text: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": text, "refusal": None}
    return {
        "id": "chatcmpl-court",
        "object": "chat.completion",
        "created": 1,
        "model": BASE,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }


def longer(a: str, b: str) -> str:
    return "A" if len(a) > len(b) else "B"


def first(a: str, b: str) -> str:
    return "A"


@pytest.fixture
def make_at(make_sft: MakeSFT, sdk: openai.OpenAI) -> MakeSFT:
    """Makes instances that talk to the endpoint at a URL and never wait."""

    def make(url: str, **options: Any) -> OpenAISFT:
        client = None if "api_key" in options else sdk.with_options(base_url=url)
        return make_sft(client=client, base_url=url, sleep=lambda _: None, **options)

    return make


def judged(sft: OpenAISFT, cases: int = 3, **options: Any) -> Any:
    asked = {"judge": JUDGE, "baseline": BASE, "concurrency": 2} | options
    return sft.evaluate_model_comprehensive(TUNED, examples(cases), [], 0, **asked)


# ── What it is asked ─────────────────────────────────────────────────────────────────────────


def test_each_pair_is_asked_in_both_orders_and_nothing_tells_whose_answers_they_are(
    make_at: MakeSFT,
) -> None:
    with Gateway(None, court := Court(longer)) as gateway:
        results = judged(make_at(gateway.url))
    shown = [json.loads(body["messages"][-1]["content"]) for body in court.asked]
    pairs = {(json.dumps(one["dialogue"]), one["A"], one["B"]) for one in shown}

    assert len(court.asked) == len(pairs) == 6
    assert {(said, b, a) for said, a, b in pairs} == pairs
    for body, one in zip(court.asked, shown, strict=True):
        assert set(one) == {"dialogue", "A", "B"}
        texts = json.dumps(body["messages"], ensure_ascii=False)
        assert not any(name in texts for name in (TUNED, BASE, JUDGE, "tuned", "baseline"))
        assert body["temperature"] == 0
        assert body["response_format"]["json_schema"]["strict"] is True
        assert "受容・共感" in body["messages"][0]["content"]
    judge = results["judge"]
    assert (judge["wins"], judge["losses"], judge["ties"]) == (3, 0, 0)
    assert (judge["model"], judge["against"], judge["rival"]) == (JUDGE, "baseline", BASE)
    assert judge["instructions"] + judge["rubric"] == court.asked[0]["messages"][0]["content"]
    assert [v["reason"] for j in judge["judgements"] for v in j["verdicts"]] == ["理由"] * 6


def test_a_winner_of_one_order_alone_is_a_tie(make_at: MakeSFT) -> None:
    with Gateway(None, Court(first)) as gateway:
        judge = judged(make_at(gateway.url))["judge"]

    assert (judge["wins"], judge["losses"], judge["ties"]) == (0, 0, 3)
    assert (judge["consistency"], judge["first_share"], judge["longer_share"]) == (0, 100, None)
    assert judge["win_rate"]["score"] == 50


def test_it_compares_with_the_real_answer_without_a_baseline_or_where_it_is_asked_to(
    make_at: MakeSFT,
) -> None:
    with Gateway(None, court := Court(longer)) as gateway:
        alone = judged(make_at(gateway.url), baseline=None)
        told = judged(make_at(gateway.url), judge_against="reference", judge_rubric="短いほど良い")
    rivals = {j["rival"] for r in (alone, told) for j in r["judge"]["judgements"]}

    assert {alone["judge"]["against"], told["judge"]["against"]} == {"reference"}
    assert rivals <= {"はい", *(f"それは{n}" for n in range(1, 4))}
    assert "短いほど良い" in court.asked[-1]["messages"][0]["content"]
    assert "受容・共感" not in court.asked[-1]["messages"][0]["content"]


def test_the_same_answer_twice_is_a_tie_that_nobody_is_asked_about(make_at: MakeSFT) -> None:
    def reply(request: Request, forward: Forward) -> Reply:
        assert request.json["model"] != JUDGE
        return saying(completion("はい"), 200)

    with Gateway(None, reply) as gateway:
        judge = judged(make_at(gateway.url))["judge"]

    assert (judge["ties"], judge["identical_pairs"], judge["consistency"]) == (3, 3, None)


def test_what_the_judge_refuses_of_its_options_is_left_out_and_recorded(make_at: MakeSFT) -> None:
    court = Court(longer)
    error = {"message": "no", "type": "x", "param": "temperature", "code": "unsupported_value"}

    def reply(request: Request, forward: Forward) -> Reply:
        if b'"temperature"' in request.body and request.json["model"] == JUDGE:
            return saying({"error": error}, 400)
        return court(request, forward)

    with Gateway(None, reply) as gateway:
        results = judged(make_at(gateway.url))

    assert results["judge"]["wins"] == 3
    assert results["judge"]["refused_options"] == {"temperature": None}
    assert "refused_options" not in results["settings"]


@pytest.mark.parametrize(
    "said",
    [
        *("A です", '{"winner": "A"}', '{"reason": "x", "winner": "C"}', "[]"),
        *('{"reason": 1, "winner": "A"}', '{"reason": "x", "winner": "A", "score": 5}', 400),
    ],
)
def test_a_verdict_that_is_none_leaves_its_pair_out_and_is_counted_and_named(
    make_at: MakeSFT, said: Any
) -> None:
    def choose(a: str, b: str) -> Any:
        return said if "相談2" in a and len(a) > len(b) else longer(a, b)

    with Gateway(None, Court(choose)) as gateway:
        judge = judged(make_at(gateway.url), eval_turns="all")["judge"]
    faults = [v["fault"] for j in judge["judgements"] for v in j["verdicts"] if v["fault"]]

    assert judge["failed_pairs"] == len(faults) == 1
    assert judge["pairs"] == judge["wins"] == len(judge["judgements"]) - 1


def test_an_answer_that_failed_leaves_its_pair_out(make_at: MakeSFT) -> None:
    court = Court(longer)

    def reply(request: Request, forward: Forward) -> Reply:
        body = request.body.decode("unicode_escape", "ignore") + request.body.decode()
        if request.line == ("POST", CHAT) and request.json["model"] == BASE and "相談2" in body:
            return saying({"error": {"message": "no", "type": "", "code": None}}, 400)
        return court(request, forward)

    with Gateway(None, reply) as gateway:
        judge = judged(make_at(gateway.url))["judge"]

    assert (judge["left_out_pairs"], judge["pairs"], len(court.asked)) == (1, 2, 4)


def test_a_judge_that_is_not_there_is_told_before_anything_is_paid(
    make_at: Callable[[str], OpenAISFT], endpoint: Rehearsal
) -> None:
    with pytest.raises(ConfigurationError, match=r"審査のモデル nobody .*--judge"):
        make_at(endpoint.url).evaluate_model_comprehensive(
            BASE, examples(3), [], judge="nobody", judge_against="reference"
        )

    assert posts(endpoint, CHAT) == []


# ── What verdicts come to ────────────────────────────────────────────────────────────────────


def judgement(
    number: int, *winners: Any, tuned: str = "長い応答", rival: str = "短い"
) -> Judgement:
    verdicts = tuple(map(Verdict, ("tuned", "rival"), winners))
    return Judgement(f"d{number}:1", f"d{number}", tuned, rival, verdicts)


def test_ties_are_half_a_win_and_pairs_without_a_verdict_are_none() -> None:
    figures = count_judgements(
        [
            judgement(1, "tuned", "tuned"),
            judgement(2, "tuned", "tuned", rival="とても長い応答"),
            judgement(3, "tuned", "rival"),
            judgement(4, "rival", "rival"),
            judgement(5, "tie", "tie"),
            judgement(6, "tie", "tuned"),
            judgement(7, tuned="同じ", rival="同じ"),
            Judgement(
                "d8:1", "d8", "a", "b", (Verdict("tuned", "tuned"), Verdict("rival", fault="x"))
            ),
        ]
    )

    assert (figures["wins"], figures["losses"], figures["ties"]) == (2, 1, 4)
    assert (figures["pairs"], figures["failed_pairs"], figures["identical_pairs"]) == (7, 1, 1)
    assert figures["win_rate"]["score"] == pytest.approx(100 * 4 / 7)
    assert figures["consistency"] == pytest.approx(100 * 4 / 6)
    # Winners: first, second; first, second; first, first; second, first; none; second.
    assert figures["first_share"] == pytest.approx(100 * 5 / 9)
    assert figures["longer_share"] == pytest.approx(100 * 1 / 3)


def test_the_interval_is_over_dialogues_and_there_is_none_of_few() -> None:
    sides = ["tuned", "rival"] * 10
    single = [judgement(n, side, side) for n, side in enumerate(sides)]
    often = [j for j in single for _ in range(5)]
    few = count_judgements(single[:9])["win_rate"]
    rate, repeated = (count_judgements(some)["win_rate"] for some in (single, often))

    assert few["score"] is not None
    assert (few["low"], few["high"]) == (None, None)
    assert rate["low"] < 40 < 60 < rate["high"]
    assert (repeated["low"], repeated["high"]) == (rate["low"], rate["high"])


def test_nothing_judged_is_no_figure() -> None:
    figures = count_judgements([])

    assert [figures["win_rate"][name] for name in ("score", "low", "high")] == [None] * 3
    assert figures["comparison"]["verdict"] is None
    assert "判定しません" in figures["comparison"]["sentence"]


@pytest.mark.parametrize(
    ("winner", "count", "verdict"),
    [
        *(("tuned", 12, "better"), ("rival", 12, "worse")),
        *(("tie", 12, "indistinguishable"), ("tuned", 5, "too_few")),
    ],
)
def test_the_verdict_is_by_swapping_whole_dialogues(winner: Any, count: int, verdict: str) -> None:
    figures = count_judgements([judgement(n, winner, winner) for n in range(count)])

    assert figures["comparison"]["verdict"] == verdict
    assert "審査の勝率" in figures["comparison"]["sentence"]


def test_a_judge_that_is_asked_carries_the_verdict_unless_another_figure_is_named() -> None:
    task = TASKS["response"]

    assert task.main_figure(Asking()) == "rouge_l"
    assert task.main_figure(Asking(judge=JUDGE)) == "judge"
    assert task.main_figure(Asking(judge=JUDGE, main_figure="chrf")) == "chrf"
    with pytest.raises(ConfigurationError, match="main_figure"):
        task.main_figure(Asking(main_figure="judge"))


# ── What it costs ────────────────────────────────────────────────────────────────────────────


def test_the_judge_has_a_line_of_its_own_in_the_price_and_a_part_in_its_sum(
    make_sft: MakeSFT,
) -> None:
    sft, splits = make_sft(), Splits([], examples(5), [])
    plain = sft.estimate(splits, None, model=TUNED, baseline=BASE)
    with_judge = sft.estimate(splits, None, model=TUNED, baseline=BASE, judge=JUDGE)
    judge = with_judge.judge
    (line,) = (line for line in with_judge.lines() if line.startswith("審査"))

    assert judge is not None
    assert (judge.model, judge.questions, judge.output_tokens) == (JUDGE, 10, 2000)
    assert judge.usd == pytest.approx((judge.input_tokens * 2 + 2000 * 8) / 1e6)
    assert with_judge.total_usd == pytest.approx(plain.total_usd + judge.usd)
    assert with_judge.most_usd == with_judge.total_usd
    assert JUDGE in line
    assert f"${judge.usd:,.4f}" in line
    assert not any(line.startswith("審査") for line in plain.lines())


def test_a_judge_without_a_price_is_named_refused_under_a_limit_and_priced_by_the_base_flags(
    make_sft: MakeSFT,
) -> None:
    splits, price = Splits([], examples(5), []), Price(1, 1, 1, 2, 3)
    unknown = make_sft().estimate(splits, None, model=TUNED, judge="gpt-4.1-nano")
    known = make_sft(price=price).estimate(splits, None, model=TUNED, judge="gpt-4.1-nano")
    with pytest.raises(BudgetError, match=r"gpt-4.1-nano の単価が不明.*--price-base-input"):
        judged(make_sft(max_cost_usd=9.0), judge="gpt-4.1-nano")

    assert unknown.unpriced == ("gpt-4.1-nano",)
    assert unknown.total_usd is None
    assert known.judge is not None
    tokens = known.judge.input_tokens
    assert known.judge.usd == pytest.approx((tokens * 2 + known.judge.output_tokens * 3) / 1e6)


def test_a_judge_over_the_budget_is_refused_before_anything_is_asked(make_at: MakeSFT) -> None:
    with Gateway(None, court := Court(longer)) as gateway:
        expected = make_at(gateway.url).estimate(
            Splits([], examples(3), []), None, model=TUNED, baseline=BASE, judge=JUDGE
        )
        limit = (expected.total_usd or 0) - 1e-6
        with pytest.raises(BudgetError):
            judged(make_at(gateway.url, max_cost_usd=limit))

        assert gateway.of("POST", CHAT) == []
    assert court.asked == []


def test_answers_that_leave_too_little_for_the_judge_stop_before_it_is_asked(
    make_at: MakeSFT,
) -> None:
    court = Court(longer)

    def reply(request: Request, forward: Forward) -> Reply:
        if request.line == ("POST", CHAT) and request.json["model"] == TUNED:
            return saying(completion("とても長い応答です。" * 300), 200)
        return court(request, forward)

    with Gateway(None, reply) as gateway:
        sft = make_at(gateway.url, max_cost_usd=0.02)
        with pytest.raises(BudgetError):
            judged(sft)

        assert len(gateway.of("POST", CHAT)) == 6
    assert court.asked == []


def test_what_the_judge_takes_is_paid_at_its_rate(make_at: MakeSFT) -> None:
    with Gateway(None, Court(longer)) as gateway:
        results = judged(make_at(gateway.url))
    usage = results["usage"]["by_model"][JUDGE]

    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (600, 60)
    answered = 3 * (100 * 0.30 + 10 * 1.20) + 3 * (100 * 0.15 + 10 * 0.60)
    assert results["cost"]["evaluation_usd"] == pytest.approx(
        (answered + 600 * 2.00 + 60 * 8.00) / 1e6
    )


def test_a_judge_that_stopped_half_way_is_resumed_without_paying_twice(make_at: MakeSFT) -> None:
    court = Court(longer)

    def choose(a: str, b: str) -> Any:
        return longer(a, b) if len(court.asked) <= 3 else 401

    asked_about: list[CostEstimate] = []
    with Gateway(None, court) as gateway:
        court.choose = choose
        sft = make_at(gateway.url)
        with pytest.raises(openai.AuthenticationError):
            judged(sft, concurrency=1)
        sft.close()
        court.choose, before = longer, len(gateway.of("POST", CHAT))
        again = make_at(gateway.url, confirm=lambda e: asked_about.append(e) or True)
        results = again.resume()
        asked = len(gateway.of("POST", CHAT)) - before

    assert results is not None
    assert asked == 3
    (estimate,) = asked_about
    assert estimate.evaluation_input_tokens == 0
    assert estimate.judge is not None
    assert estimate.judge.questions == 3
    assert results["judge"]["wins"] == 3
    assert results["usage"]["by_model"][JUDGE]["prompt_tokens"] == 600


def test_verdicts_that_an_earlier_run_has_had_are_used(make_at: MakeSFT) -> None:
    with Gateway(None, court := Court(longer)) as gateway:
        one = judged(make_at(gateway.url))
        two = judged(make_at(gateway.url))

        assert len(gateway.of("POST", CHAT)) == 12
    assert len(court.asked) == 6
    assert one["judge"]["judgements"] == two["judge"]["judgements"]
    assert two["cost"]["total_usd"] == 0


# ── Where it is asked ────────────────────────────────────────────────────────────────────────


@pytest.fixture
def elsewhere() -> Iterator[tuple[Gateway, Court]]:
    """An endpoint of another host, where the judge is."""
    with Gateway(None, court := Court(longer)) as gateway:
        yield gateway, court


@pytest.fixture
def here() -> Iterator[Gateway]:
    with Gateway(None, Court(lambda a, b: 400)) as gateway:
        yield gateway


def keys(gateway: Gateway) -> set[str]:
    return {request.headers["authorization"].removeprefix("Bearer ") for request in gateway.asked}


def test_no_key_goes_to_a_judge_on_another_host_unasked(
    make_at: MakeSFT, here: Gateway, elsewhere: tuple[Gateway, Court]
) -> None:
    there, _ = elsewhere
    with pytest.raises(ConfigurationError, match="OPENAI_SFT_JUDGE_API_KEY"):
        judged(make_at(here.url, api_key=KEY), judge_base_url=there.url)

    assert there.asked == here.asked == []


def test_whoever_is_asked_may_send_his_key_to_the_judge(
    make_at: MakeSFT, here: Gateway, elsewhere: tuple[Gateway, Court]
) -> None:
    there, _ = elsewhere
    told: list[str] = []
    sft = make_at(here.url, api_key=KEY, trust=lambda url: told.append(url) or True)
    results = judged(sft, judge_base_url=there.url)

    assert told == [there.url]
    assert keys(there) == {KEY}
    assert results["judge"]["base_url"] == f"{there.url}/"


def test_the_judges_own_key_goes_to_the_judge_alone(
    make_at: MakeSFT,
    here: Gateway,
    elsewhere: tuple[Gateway, Court],
    monkeypatch: pytest.MonkeyPatch,
    out: Path,
) -> None:
    there, court = elsewhere
    monkeypatch.setenv("OPENAI_SFT_JUDGE_API_KEY", JUDGE_KEY)
    monkeypatch.setenv("OPENAI_ORG_ID", "org-mine")
    sft = make_at(here.url, api_key=KEY)
    results = judged(sft, judge_base_url=there.url)

    assert (keys(here), keys(there)) == ({KEY}, {JUDGE_KEY})
    assert not any("openai-organization" in request.headers for request in there.asked)
    assert len(court.asked) == 6
    assert results["judge"]["wins"] == 3
    assert JUDGE_KEY not in repr(sft.settings)
    assert not any(JUDGE_KEY in path.read_text("utf-8") for path in out.iterdir())


def test_a_recorded_judge_gets_no_key_before_its_url_is_told_again(
    make_at: MakeSFT,
    here: Gateway,
    elsewhere: tuple[Gateway, Court],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there, court = elsewhere
    monkeypatch.setenv("OPENAI_SFT_JUDGE_API_KEY", JUDGE_KEY)
    court.choose = lambda a, b: 401
    with (
        make_at(here.url, api_key=KEY) as sft,
        pytest.raises(openai.AuthenticationError),
    ):
        judged(sft, judge_base_url=there.url)
    told = sft.describe_remote_state()
    there.asked.clear()
    court.choose = longer
    with pytest.raises(ConfigurationError, match=f"--judge-base-url {there.url}"):
        make_at(here.url, api_key=KEY).resume()

    assert f" --judge-base-url {there.url}" in told
    assert there.asked == []
    results = make_at(here.url, api_key=KEY).resume(judge_base_url=there.url)
    assert results is not None
    assert results["judge"]["wins"] == 3


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"judge": None, "judge_against": "reference"}, "judge_against"),
        ({"judge": None, "judge_base_url": "http://x/v1"}, "judge_base_url"),
        ({"judge": None, "judge_rubric": "x"}, "judge_rubric"),
        ({"judge": " "}, "judge"),
        ({"judge_against": "baseline", "baseline": None}, "baseline"),
        ({"judge_against": "nobody"}, "judge_against"),
        ({"judge_base_url": "ftp://x"}, "judge_base_url"),
        ({"judge_base_url": "https://me:secret@x/v1"}, "judge_base_url"),
    ],
)
def test_an_option_of_the_judge_that_makes_no_sense_is_refused(
    make_sft: MakeSFT, endpoint: Rehearsal, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigurationError, match=named) as caught:
        judged(make_sft(), **options)

    assert "secret" not in str(caught.value)
    assert posts(endpoint) == []


def test_scores_are_not_judged(make_sft: MakeSFT, endpoint: Rehearsal) -> None:
    with pytest.raises(ConfigurationError, match="score"):
        make_sft(task="score").run_full_pipeline(judge=JUDGE)

    assert posts(endpoint) == []


# ── On the command line ──────────────────────────────────────────────────────────────────────


def test_a_rehearsal_judges_too(
    cli: Callable[..., Ended], clean_environment: Path, log: Callable[[], list[str]]
) -> None:
    rubric = clean_environment / "rubric.txt"
    rubric.write_text("遮らないこと。", "utf-8")
    ended = cli(
        *("--rehearse", "--epochs", "1", "--max-test-cases", "0", "--eval-turns", "all"),
        *("--baseline", "--judge", JUDGE, "--judge-rubric", rubric),
    )
    (path,) = Path("openai_sft_outputs").glob("comprehensive_evaluation_*.json")
    results = read_json(path)
    (record,) = Path("openai_sft_outputs").glob("run_*.json")

    assert ended.code == 0
    assert "判定（テスト）: 主指標の審査の勝率は基準のモデル" in ended.out
    assert sum(line.startswith("審査: 入力") for line in log()) == 1
    assert results["judge"]["rubric"] == "遮らないこと。"
    assert results["judge"]["pairs"] == results["test_evaluation"]["evaluated_cases"]
    assert results["judge"]["consistency"] == 100
    assert {j["winner"] for j in results["judge"]["judgements"]} <= {"tuned", "rival", "tie"}
    assert results["summary"]["judge_win_rate"] == results["judge"]["win_rate"]["score"]
    assert read_json(record)["plan"]["asking"]["judge_rubric"] == "遮らないこと。"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--judge-rubric", "missing.txt"), "missing.txt"),
        (("--judge-against", "me"), "--judge-against"),
        (("--judge-base-url", "http://127.0.0.1:1/v1"), "リハーサル"),
    ],
)
def test_a_flag_of_the_judge_that_makes_no_sense_ends_with_2(
    cli: Callable[..., Ended], arguments: tuple[str, ...], named: str
) -> None:
    ended = cli("--rehearse", "--judge", JUDGE, *arguments)

    assert ended.code == 2
    assert named in ended.err
