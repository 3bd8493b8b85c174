"""Money at the edges: both doors that cost are guarded, whoever comes through them."""

from __future__ import annotations

import inspect
import json
import logging
import re
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from edges import Forward, Gateway, Reply, Request, refusal, saying
from endpoint import Fault, Rehearsal
from faults import CHAT, JOBS, asked, made, until
from helpers import Ended, examples, posts, read_json, records, training_file, write_jsonl

from openai_sft import (
    BudgetError,
    ConfigurationError,
    CostEstimate,
    Declined,
    OpenAISFT,
    OpenAISFTError,
    Price,
    Splits,
    TokenCounter,
    TrainingNotAvailable,
    estimate_cost,
    load_vocabulary,
    read_examples,
)

MakeSFT = Callable[..., OpenAISFT]
Log = Callable[[], list[str]]

BASE = "gpt-4o-mini-2024-07-18"
SHORT: dict[str, Any] = {"epochs": 1, "batch_size": 4, "max_test_cases": 1}
Cli = Callable[..., Ended]


def tokens_of(path: str | Path) -> int:
    counter = TokenCounter(load_vocabulary())
    return sum(counter.count(one["messages"]).total for one in read_examples(path))


def interrupt(*_: object) -> bool:
    raise KeyboardInterrupt


# ── Words that no method knows ───────────────────────────────────────────────────────────────

UNKNOWN: list[tuple[str, dict[str, Any], str]] = [
    ("run_full_pipeline", {"max_sample": 12}, "max_samples"),
    ("run_full_pipeline", {"epoch": 1}, "epochs"),
    ("run_full_pipeline", {"group_bye": "pair"}, "group_by"),
    ("prepare_data", {"epoch": 1}, "epochs"),
    ("run_evaluation", {"model_id": BASE, "max_test_case": 1}, "max_test_cases"),
    ("load_and_split_dataset", {"min_scores": 5}, "min_score"),
    ("prepare_dataset", {"dataset": [], "splits": "train"}, "split"),
    ("estimate", {"splits": Splits([], [], []), "epochs": 1, "eval_turn": 1}, "eval_turns"),
    ("create_fine_tune_job", {"file_id": "file-1", "epoch": 1}, "epochs"),
    ("monitor_fine_tune_job", {"job_id": "ftjob-1", "time_out": 1}, "timeout"),
    ("attach", {"job_id": "ftjob-1", "time_out": 1}, "timeout"),
    ("resume", {"runs": "run_20260101_000000"}, "run"),
    (
        "evaluate_model_comprehensive",
        {"model_id": BASE, "test_data": examples(1), "valid_data": [], "temprature": 1},
        "temperature",
    ),
]


@pytest.mark.parametrize(
    ("method", "options", "nearest"),
    [pytest.param(*case, id=f"{case[0]} {list(case[1])[-1]}") for case in UNKNOWN],
)
def test_a_keyword_that_no_method_knows_is_refused_at_once_and_the_nearest_is_named(
    make_sft: MakeSFT,
    endpoint: Rehearsal,
    out: Path,
    method: str,
    options: dict[str, Any],
    nearest: str,
) -> None:
    with pytest.raises((OpenAISFTError, TypeError)) as caught:
        getattr(make_sft(), method)(**options)

    assert re.search(rf"\b{nearest}\b", str(caught.value), re.ASCII)
    assert endpoint.exchanges == []
    assert not out.exists() or list(out.iterdir()) == []


PUBLIC = {
    name: method
    for name, method in vars(OpenAISFT).items()
    if callable(method) and not name.startswith("_")
}


@pytest.mark.parametrize("method", PUBLIC)
def test_every_public_method_refuses_a_keyword_that_it_does_not_know(
    make_sft: MakeSFT, endpoint: Rehearsal, out: Path, method: str
) -> None:
    _, *known = inspect.signature(PUBLIC[method]).parameters
    nearest = rf"「{known[0]}」のことですか" if known else ""
    with pytest.raises(ConfigurationError, match=f"{method} に.*{nearest}"):
        getattr(make_sft(), method)(**{f"{known[0] if known else ''}_s": 1})

    assert endpoint.exchanges == []
    assert not out.exists()


def test_a_setting_that_is_none_is_refused_and_the_nearest_is_named(make_sft: MakeSFT) -> None:
    with pytest.raises((OpenAISFTError, TypeError), match=r"\bmax_cost_usd\b"):
        make_sft(max_cost=0.01)


# ── The first door: creating a job ───────────────────────────────────────────────────────────


def test_a_job_made_step_by_step_is_asked_about_with_its_price(
    make_sft: MakeSFT, endpoint: Rehearsal, file: Path, log: Log
) -> None:
    estimates: list[CostEstimate] = []

    def confirm(estimate: CostEstimate) -> bool:
        estimates.append(estimate)
        assert any(re.search(r"× 3エポック = \$\d", line) for line in log())
        return False

    sft = make_sft(confirm=confirm)
    file_id = sft.upload_training_file(file)
    with pytest.raises(Declined):
        sft.create_fine_tune_job(file_id, 3, 4)
    (estimate,) = estimates

    assert posts(endpoint, JOBS) == []
    assert (estimate.epochs, estimate.training_tokens) == (3, tokens_of(file))
    assert estimate.training_usd == pytest.approx(tokens_of(file) * 3 * 3e-6)


def test_the_price_of_a_job_made_step_by_step_is_shown_where_nobody_asks(
    make_sft: MakeSFT, file: Path, log: Log
) -> None:
    sft = make_sft()
    sft.create_fine_tune_job(sft.upload_training_file(file), 3, 4)
    price = f"${tokens_of(file) * 3 * 3e-6:.4f}"

    assert any(price in line and "3エポック" in line for line in log())


@pytest.mark.parametrize("epochs", [10, "auto"])
def test_a_job_made_step_by_step_keeps_the_limit(
    make_sft: MakeSFT, endpoint: Rehearsal, file: Path, epochs: Any
) -> None:
    ten = tokens_of(file) * 10 * 3e-6
    with make_sft(max_cost_usd=0.9 * ten, confirm=lambda _: True) as sft:
        file_id = sft.upload_training_file(file)
        with pytest.raises(BudgetError, match="上限"):
            sft.create_fine_tune_job(file_id, epochs, 4)
    before = len(posts(endpoint, JOBS))
    with make_sft(max_cost_usd=1.5 * ten) as within:
        within.create_fine_tune_job(within.upload_training_file(file), 10, 4)

    assert before == 0
    assert made(endpoint, JOBS) == 1


def test_a_file_that_was_uploaded_elsewhere_does_not_pass_the_limit_either(
    make_sft: MakeSFT, endpoint: Rehearsal, file: Path
) -> None:
    sft = make_sft(max_cost_usd=0.000_001)
    sent = sft.client.files.create(file=("別.jsonl", file.read_bytes()), purpose="fine-tune")
    with pytest.raises(BudgetError, match="中止しました。--max-cost-usd を外して"):
        sft.create_fine_tune_job(sent.id, 10, 4)

    assert posts(endpoint, JOBS) == []


def upload_two(sft: OpenAISFT, folder: Path) -> tuple[list[Path], list[str]]:
    """Two training files sent by one instance: the second, much longer, is the later one."""
    files = [training_file(folder, 12), training_file(folder, 40)]
    return files, [sft.upload_training_file(one) for one in files]


@pytest.mark.parametrize("asked_for", [0, 1])
def test_of_two_files_that_were_uploaded_the_one_is_priced_that_is_trained_on(
    make_sft: MakeSFT, endpoint: Rehearsal, clean_environment: Path, asked_for: int
) -> None:
    estimates: list[CostEstimate] = []
    sft = make_sft(max_cost_usd=5, confirm=lambda estimate: not estimates.append(estimate))
    files, ids = upload_two(sft, clean_environment)
    sft.create_fine_tune_job(ids[asked_for], 3, 4)
    (job,) = posts(endpoint, JOBS)

    assert len(set(ids)) == 2
    assert job.request["training_file"] == ids[asked_for]
    assert [one.training_tokens for one in estimates] == [tokens_of(files[asked_for])]


def test_both_of_two_uploaded_files_can_be_trained_on_by_another_instance_too(
    make_sft: MakeSFT, clean_environment: Path
) -> None:
    estimates: list[CostEstimate] = []
    with make_sft() as sender:
        files, ids = upload_two(sender, clean_environment)
    sft = make_sft(max_cost_usd=5, confirm=lambda estimate: not estimates.append(estimate))
    for file_id in reversed(ids):
        sft.create_fine_tune_job(file_id, 3, 4)

    assert [one.training_tokens for one in estimates] == [tokens_of(f) for f in reversed(files)]


def test_a_file_that_was_uploaded_and_changed_since_has_no_price_and_does_not_pass_the_limit(
    make_sft: MakeSFT, endpoint: Rehearsal, clean_environment: Path
) -> None:
    sft = make_sft(max_cost_usd=5)
    (first, _), ids = upload_two(sft, clean_environment)
    first.write_bytes(training_file(clean_environment, 14).read_bytes())
    with pytest.raises(BudgetError, match="トークン数が不明"):
        sft.create_fine_tune_job(ids[0], 3, 4)

    assert posts(endpoint, JOBS) == []


def test_a_file_that_is_uploaded_again_after_another_is_the_same_file(
    make_sft: MakeSFT, endpoint: Rehearsal, clean_environment: Path
) -> None:
    sft = make_sft()
    (first, _), ids = upload_two(sft, clean_environment)
    again = sft.upload_training_file(first)
    endpoint.inject(Fault("training_not_available", "POST", JOBS))
    with pytest.raises(TrainingNotAvailable) as caught:
        sft.create_fine_tune_job(again, 3, 4)

    assert again == ids[0]
    assert sorted(caught.value.deleted) == sorted(ids)
    assert made(endpoint, "/files") == 2


# ── The second door: asking a model ──────────────────────────────────────────────────────────


def test_an_evaluation_made_step_by_step_is_asked_about_with_its_price(
    make_sft: MakeSFT, endpoint: Rehearsal, log: Log
) -> None:
    estimates: list[CostEstimate] = []

    def confirm(estimate: CostEstimate) -> bool:
        estimates.append(estimate)
        assert any(line.startswith("評価: ") and "$" in line for line in log())
        return False

    with pytest.raises(Declined):
        make_sft(confirm=confirm).evaluate_model_comprehensive(BASE, examples(5), [], baseline=True)
    (estimate,) = estimates
    expected = make_sft().estimate(Splits([], examples(5), []), None, baseline=True)

    assert endpoint.exchanges == []
    assert estimate.evaluation_usd == pytest.approx(expected.evaluation_usd)
    assert estimate.total_usd == estimate.evaluation_usd > 0


def test_the_price_of_what_is_left_is_shown_when_an_evaluation_is_resumed(
    make_sft: MakeSFT, endpoint: Rehearsal, log: Log
) -> None:
    endpoint.inject(Fault("insufficient_quota", "POST", CHAT))
    with make_sft() as sft, pytest.raises(openai.RateLimitError):
        sft.run_full_pipeline(**SHORT)
    before = len(log())
    make_sft().resume()

    assert any(line.startswith("評価: ") and "$" in line for line in log()[before:])


def test_a_whole_run_is_asked_about_once_for_both(make_sft: MakeSFT) -> None:
    estimates: list[CostEstimate] = []
    sft = make_sft(confirm=lambda estimate: not estimates.append(estimate))
    sft.run_full_pipeline(**SHORT)
    (estimate,) = estimates

    assert estimate.training_usd
    assert estimate.evaluation_usd


def test_who_agreed_to_the_job_is_asked_again_before_its_model_is(
    make_sft: MakeSFT, endpoint: Rehearsal, file: Path
) -> None:
    estimates: list[CostEstimate] = []
    sft = make_sft(confirm=lambda estimate: not estimates.append(estimate))
    sft.monitor_fine_tune_job(sft.create_fine_tune_job(sft.upload_training_file(file), 1, 4))
    sft.evaluate_model_comprehensive(BASE, examples(5), [])

    assert [estimate.epochs for estimate in estimates] == [1, None]


def test_a_limit_that_the_training_has_used_up_holds_where_the_evaluation_was_agreed_to(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    def dear(request: Request, forward: Forward) -> Reply:
        """Says that far more tokens were trained than were estimated: three dollars' worth."""
        reply = forward(request)
        if "/ftjob-" not in request.path or reply.json.get("object") != "fine_tuning.job":
            return reply
        return saying({**reply.json, "trained_tokens": 1_000_000})

    options: dict[str, Any] = {"client": None, "max_cost_usd": 1, "confirm": lambda _: True}
    with (
        Gateway(endpoint, dear) as gateway,
        make_sft(base_url=gateway.url, **options) as sft,
        pytest.raises(BudgetError, match=r"3\.0000.*学習済みモデルは残っています"),
    ):
        sft.run_full_pipeline(**SHORT)

    assert posts(endpoint, CHAT) == []


@pytest.mark.parametrize("answered", [0, 1])
def test_the_most_that_epochs_left_to_the_service_may_cost_includes_the_evaluation(
    answered: int,
) -> None:
    options: dict[str, Any] = {"price": Price(3.0, 0.3, 1.2)}
    options["evaluation_input_tokens"] = options["evaluation_output_tokens"] = answered * 1_000_000
    auto = estimate_cost(1_000_000, "auto", **options)
    fifty = estimate_cost(1_000_000, 50, **options)

    assert auto.total_usd is None
    assert auto.most_usd == fifty.most_usd == fifty.total_usd == 150 + 1.5 * answered


IMAGE = {"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}}


def test_no_limit_can_be_kept_with_images_and_nothing_is_sent(
    make_sft: MakeSFT, endpoint: Rehearsal, clean_environment: Path
) -> None:
    said = examples(12)
    for one in said:
        one["messages"][0]["content"] = [{"type": "text", "text": "これは？"}, IMAGE]
    source = write_jsonl(
        clean_environment / "seen.jsonl", [{"messages": one["messages"]} for one in said]
    )
    with (
        make_sft(dataset=str(source), max_cost_usd=1000, model="gpt-4o") as sft,
        pytest.raises(BudgetError, match=r"画像\d+枚のトークン数が不明"),
    ):
        sft.run_full_pipeline(**SHORT)
    with pytest.raises(BudgetError, match=r"画像\d+枚のトークン数が不明"):
        make_sft(max_cost_usd=1000).evaluate_model_comprehensive(BASE, said, [])

    assert posts(endpoint) == []


# ── The estimate ─────────────────────────────────────────────────────────────────────────────


def test_an_estimate_of_splits_prices_their_training() -> None:
    train = examples(30)
    counter = TokenCounter(load_vocabulary())
    tokens = sum(counter.count(one["messages"]).total for one in train)
    sft = OpenAISFT(offline=True, model=BASE)
    estimate = sft.estimate(Splits(train, examples(3), examples(4)), 10)

    assert estimate.training_tokens == tokens
    assert estimate.training_usd == pytest.approx(tokens * 10 * 3e-6)


@pytest.mark.parametrize(
    ("model", "asking", "answering"),
    [
        ("gpt-4o-2024-08-06", 2.50, 10),
        ("gpt-4o", 2.50, 10),
        ("gpt-4.1-2025-04-14", 2, 8),
        ("gpt-4.1-mini-2025-04-14", 0.40, 1.60),
    ],
)
def test_a_base_model_is_priced_by_its_own_rates(
    model: str, asking: float, answering: float
) -> None:
    def price(**options: Any) -> float | None:
        return estimate_cost(
            0,
            None,
            evaluation_input_tokens=1_000_000,
            evaluation_output_tokens=1_000_000,
            **options,
        ).evaluation_usd

    assert price(model=model) == pytest.approx(asking + answering)
    assert price(model=f"ft:{BASE}:o::a", baseline=model) == pytest.approx(
        0.30 + 1.20 + asking + answering
    )


def test_a_given_price_prices_a_baseline_too(make_sft: MakeSFT, endpoint: Rehearsal) -> None:
    given = Price(2.0, 0.5, 4.0, base_input=0.25, base_output=1.5)
    sft = make_sft(model="なにか-8b", price=given, max_cost_usd=5)
    with Gateway(endpoint, answering_anything) as gateway:
        client = sft.client.with_options(base_url=gateway.url)
        asking = make_sft(model="なにか-8b", price=given, max_cost_usd=5, client=client)
        results = asking.evaluate_model_comprehensive("わたしの-8b", examples(4), [], baseline=True)

    # Four questions to each, of 100 tokens read and 10 written.
    assert results["cost"]["evaluation_usd"] == pytest.approx(
        4 * (100 * 0.5 + 10 * 4.0 + 100 * 0.25 + 10 * 1.5) / 1e6
    )


def test_with_all_flags_of_the_price_given_a_baseline_is_priced(cli: Cli, dataset: Path) -> None:
    shown = cli("--help").out
    flags = sorted(set(re.findall(r"--price-[a-z-]+", shown)))
    prices = [part for flag in flags for part in (flag, "1.5")]
    ended = cli(
        *("--data-only", "--quiet", "--dataset", dataset, "--model", "llama-3.1-8b"),
        *("--baseline", *prices),
    )

    assert ended.code == 0
    assert "合計: $" in ended.out


def test_where_the_price_of_a_baseline_is_unknown_it_is_the_baseline_that_is_blamed() -> None:
    lines = estimate_cost(10, 1, model=BASE, baseline="謎のモデル-7b").lines()
    (unknown,) = (line for line in lines if "単価は不明" in line)

    assert "謎のモデル-7b" in unknown
    assert BASE not in unknown


def test_epochs_left_to_the_service_are_held_to_a_limit_as_the_fifty_they_may_be(
    make_sft: MakeSFT, endpoint: Rehearsal, dataset: Path
) -> None:
    one = OpenAISFT(offline=True, dataset=str(dataset), verbose=False).prepare_data(1)
    training, evaluation = one.estimate.training_usd, one.estimate.evaluation_usd
    assert training
    assert evaluation
    most = 50 * training + evaluation
    options: dict[str, Any] = {"epochs": "auto", "batch_size": 4}
    enough = make_sft(max_cost_usd=1.5 * most).run_full_pipeline(**options)
    (job,) = posts(endpoint, JOBS)
    with pytest.raises(BudgetError, match="上限"):
        make_sft(max_cost_usd=0.9 * most).run_full_pipeline(**options)

    assert enough["summary"]["total_cases_evaluated"] == 4
    assert job.request["method"]["supervised"]["hyperparameters"]["n_epochs"] == "auto"
    assert len(posts(endpoint, JOBS)) == 1


# ── A name that doesn't begin with ft: ───────────────────────────────────────────────────────

DEPLOYED = "kokoro-ボット.v3"


def answering_anything(request: Request, forward: Forward) -> Reply:
    """Gives the tuned model a name of its own, and lets whatever model is asked answer."""
    if request.line == ("POST", CHAT):
        message = {"role": "assistant", "content": "眠れないのですね。", "refusal": None}
        return saying(
            {
                "id": "chatcmpl-1",
                "object": "chat.completion",
                "created": 1,
                "model": request.json["model"],
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
            }
        )
    reply = forward(request)
    if reply.status == 200 and reply.content_type == "application/json":
        text = reply.body.decode()
        named = re.sub(r'"fine_tuned_model": "[^"]+"', f'"fine_tuned_model": "{DEPLOYED}"', text)
        return reply._replace(body=named.encode())
    return reply


def test_a_tuned_model_of_any_name_is_priced_as_what_it_was_tuned_from(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    with Gateway(endpoint, answering_anything) as gateway:
        options: dict[str, Any] = {"client": None, "base_url": gateway.url, "max_cost_usd": 1}
        with make_sft(**options) as sft:
            results = sft.run_full_pipeline(**SHORT)
        with make_sft(**options) as later:
            again = later.run_evaluation(max_test_cases=1, temperature=0.5)

    for one in (results, again):
        assert one["model_id"] == DEPLOYED
        assert one["cost"]["evaluation_usd"] == pytest.approx(2 * (100 * 0.30 + 10 * 1.20) / 1e6)


# ── Nobody at the terminal ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "deed", [[], ["--evaluate-only", "--model-id", BASE]], ids=["whole run", "evaluation"]
)
def test_where_nobody_can_be_asked_it_stops_and_names_the_flag_that_agrees(
    cli: Cli, place: Callable[[str], tuple[str, ...]], endpoint: Rehearsal, deed: list[str]
) -> None:
    ended = cli(*place(endpoint.url), *deed)

    assert ended.code == 2
    assert "--yes" in ended.err
    assert posts(endpoint) == []


def test_with_yes_it_goes_on_where_nobody_can_be_asked(
    cli: Cli, place: Callable[[str], tuple[str, ...]], endpoint: Rehearsal
) -> None:
    ended = cli(*place(endpoint.url), "--yes")

    assert ended.code == 0
    assert len(posts(endpoint, JOBS)) == 1


# ── The evaluation behind a watch that is taken up again ─────────────────────────────────────


def interrupted_watch(make_sft: MakeSFT, endpoint: Rehearsal) -> tuple[Path, CostEstimate]:
    """The record of a run that was stopped while its job ran, and what had been agreed to."""
    estimates: list[CostEstimate] = []
    endpoint.hold("running")
    sft = make_sft(sleep=interrupt, confirm=lambda estimate: not estimates.append(estimate))
    with sft, pytest.raises(KeyboardInterrupt):
        sft.run_full_pipeline(**SHORT, baseline=True)
    endpoint.release()
    (estimate,) = estimates
    return Path(sft.files["record"]), estimate


def polls(endpoint: Rehearsal) -> int:
    return sum(e.method == "GET" and e.path.startswith(f"{JOBS}/") for e in endpoint.exchanges)


@pytest.mark.parametrize("flag", ["--resume", "--job-id"])
def test_where_nobody_can_agree_to_the_evaluation_it_stops_before_the_watch_and_names_the_flag(
    make_sft: MakeSFT,
    cli: Cli,
    place: Callable[[str], tuple[str, ...]],
    endpoint: Rehearsal,
    flag: str,
) -> None:
    record, _ = interrupted_watch(make_sft, endpoint)
    deed = (flag, record.stem if flag == "--resume" else read_json(record)["job_id"])
    before = polls(endpoint)
    stopped = cli(*place(endpoint.url), *deed)
    watched = polls(endpoint) - before
    gone_on = cli(*place(endpoint.url), *deed, "--yes")

    assert (stopped.code, gone_on.code) == (2, 0)
    assert "--yes" in stopped.errors[0]
    assert f"--resume {record.stem}" in stopped.err
    assert watched == 0
    assert made(endpoint, JOBS) == 1


def test_a_watch_that_is_taken_up_asks_once_and_first_for_the_evaluation_at_the_price_agreed_to(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    _, agreed = interrupted_watch(make_sft, endpoint)
    before = polls(endpoint)
    asked_at: list[tuple[CostEstimate, int]] = []
    sft = make_sft(confirm=lambda estimate: not asked_at.append((estimate, polls(endpoint))))
    results = sft.resume()
    ((estimate, polled),) = asked_at

    assert results is not None
    assert polled == before
    assert estimate.evaluation_usd == pytest.approx(agreed.evaluation_usd)
    assert estimate.total_usd == estimate.evaluation_usd
    assert not any(line.startswith("学習") for line in estimate.lines())


def test_a_limit_below_the_evaluation_stops_a_watch_that_is_taken_up_before_it_begins(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    _, agreed = interrupted_watch(make_sft, endpoint)
    before = polls(endpoint)
    with pytest.raises(BudgetError, match="上限"):
        make_sft(max_cost_usd=0.9 * (agreed.evaluation_usd or 0.0)).resume()

    assert polls(endpoint) == before


def test_the_price_of_an_evaluation_is_not_taken_for_that_of_a_training_of_untold_tokens(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    def untold(request: Request, forward: Forward) -> Reply:
        reply = forward(request)
        is_job = reply.status == 200 and b'"fine_tuning.job"' in reply.body
        return saying({**reply.json, "trained_tokens": None}) if is_job else reply

    path, _ = interrupted_watch(make_sft, endpoint)
    record = read_json(path)
    del record["estimate"]  # of an earlier version
    path.write_text(json.dumps(record), "utf-8")
    with Gateway(endpoint, untold) as gateway:
        client = make_sft().client.with_options(base_url=gateway.url)
        results = make_sft(client=client).resume()

    assert results is not None
    assert read_json(path)["cost"].keys() == {"evaluation_usd", "total_usd"}


# ── What is seen ─────────────────────────────────────────────────────────────────────────────


def test_price_job_and_loss_are_seen_where_the_application_hides_what_is_said_by_the_way(
    make_sft: MakeSFT, endpoint: Rehearsal, capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    seen: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    root.addHandler(handler)
    try:
        make_sft(verbose=True).run_full_pipeline(**SHORT)
    finally:
        root.removeHandler(handler)
    text = "\n".join([*seen, capsys.readouterr().err])

    assert re.search(r"合計: \$\d", text)
    assert posts(endpoint, JOBS)[0].response["id"] in text
    assert re.search(r"(?:損失|loss)\D{0,20}\d", text)


# ── Runs that sent nothing ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("deed", ["whole run", "evaluation"])
def test_a_run_that_was_declined_is_closed(
    make_sft: MakeSFT, endpoint: Rehearsal, deed: str
) -> None:
    with make_sft(confirm=lambda _: False) as sft:
        start = {
            "whole run": lambda: sft.run_full_pipeline(**SHORT),
            "evaluation": lambda: sft.run_evaluation(BASE, max_test_cases=1),
        }[deed]
        with pytest.raises(Declined):
            start()
    name = Path(sft.files["record"]).stem

    assert make_sft().resume() is None
    assert make_sft().resume(name) is None
    assert posts(endpoint) == []


@pytest.mark.parametrize(
    ("refused", "kept"),
    [(Fault("401", "POST", JOBS), None), (Fault("insufficient_quota", "POST", CHAT), "ft:gpt-4o")],
    ids=["files are sent", "a model is trained"],
)
def test_a_run_that_was_declined_when_it_was_resumed_is_closed_too(
    make_sft: MakeSFT, endpoint: Rehearsal, refused: Fault, kept: str
) -> None:
    endpoint.inject(refused)
    with make_sft() as sft, pytest.raises(openai.APIStatusError):
        sft.run_full_pipeline(**SHORT)
    with make_sft(confirm=lambda _: False) as later, pytest.raises(Declined, match=kept):
        later.resume()
    before = len(posts(endpoint))

    assert make_sft().resume() is None
    assert make_sft().resume(Path(sft.files["record"]).stem) is None
    assert len(posts(endpoint)) == before
    if kept:  # what was trained can be asked all the same
        assert make_sft().run_evaluation(max_test_cases=1)["model_id"].startswith(kept)


@pytest.mark.parametrize("end", ["interrupted", "too dear"])
def test_a_run_that_has_sent_nothing_is_taken_up_only_by_its_name(
    make_sft: MakeSFT, endpoint: Rehearsal, end: str
) -> None:
    endpoint.inject(Fault("401", "POST", JOBS))
    with make_sft() as begun, pytest.raises(openai.AuthenticationError):
        begun.run_full_pipeline(**SHORT)
    stop: dict[str, Any] = {"confirm": interrupt} if end == "interrupted" else {"max_cost_usd": 0}
    with make_sft(**stop) as sent_nothing, pytest.raises((KeyboardInterrupt, BudgetError)):
        sent_nothing.run_full_pipeline(**SHORT)
    sent = len(posts(endpoint))
    older, newer = (Path(sft.files["record"]).stem for sft in (begun, sent_nothing))
    with make_sft() as sft:
        results = sft.resume()
        taken = Path(sft.files["record"]).stem

    assert results is not None
    assert (taken, len(posts(endpoint)) > sent) == (older, True)
    assert make_sft().resume() is None
    named = make_sft(max_cost_usd=1, confirm=lambda _: True)
    assert named.resume(newer) is not None
    assert made(endpoint, JOBS) == 2


def test_a_run_that_nobody_agreed_to_is_asked_about_when_it_is_resumed(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    with make_sft(confirm=interrupt) as sft, pytest.raises(KeyboardInterrupt):
        sft.run_full_pipeline(**SHORT)
    name = Path(sft.files["record"]).stem
    with pytest.raises(Declined):
        make_sft(confirm=lambda _: False).resume(name)

    assert posts(endpoint) == []


# ── Stopped by the limit ─────────────────────────────────────────────────────────────────────


def asking_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("openai-sft-ask")]


def test_answers_under_way_when_the_limit_stops_an_evaluation_are_kept_and_counted(
    make_sft: MakeSFT, endpoint: Rehearsal, clean_environment: Path
) -> None:
    many = write_jsonl(clean_environment / "many.jsonl", records(100))
    meeting = threading.Barrier(8, timeout=10)
    dear = [True] * 8

    def serve(request: Request, forward: Forward) -> Reply:
        reply = forward(request)
        if request.line != ("POST", CHAT) or not dear:
            return reply
        dear.pop()
        meeting.wait()  # so that all eight are under way when the first of them is dear
        usage = {"prompt_tokens": 1_000_000, "completion_tokens": 0, "total_tokens": 1_000_000}
        return saying({**reply.json, "usage": usage})

    with Gateway(endpoint, serve) as gateway:
        options: dict[str, Any] = {"client": None, "base_url": gateway.url, "dataset": str(many)}
        with make_sft(max_cost_usd=0.1, **options) as sft:
            with pytest.raises(BudgetError):
                sft.run_evaluation(BASE, max_test_cases=10, concurrency=8)
            until(lambda: not asking_threads())
            record = read_json(sft.files["record"])
            kept = Path(sft.files["journal"]).read_text("utf-8").split("\n")[:-1]
        billed = [e.response["usage"] for e in asked(endpoint, "POST", CHAT)]
        with make_sft(max_cost_usd=100, **options) as later:
            results = later.resume()
    questions = Counter(json.dumps(e.request["messages"]) for e in asked(endpoint, "POST", CHAT))

    assert len(kept) == len(billed) >= 8
    assert record["cost"]["evaluation_usd"] >= 8 * 0.15
    assert results is not None
    assert results["summary"]["total_cases_evaluated"] == 20
    assert questions.most_common(1)[0][1] == 1


# ── Refused, so not made ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("status", "code"),
    [(400, None), (403, None), (403, "training_not_available"), (404, None), (422, "無効")],
)
def test_a_creation_that_was_refused_is_not_said_to_have_made_a_job(
    cli: Cli,
    place: Callable[[str], tuple[str, ...]],
    endpoint: Rehearsal,
    status: int,
    code: str | None,
) -> None:
    def serve(request: Request, forward: Forward) -> Reply:
        refused = request.line == ("POST", JOBS)
        return refusal(status, code=code) if refused else forward(request)

    with Gateway(endpoint, serve) as gateway:
        ended = cli(*place(gateway.url), "--yes")

    assert ended.code == 1
    assert "作られている可能性" not in ended.err
    assert made(endpoint, JOBS) == 0


def test_a_job_that_is_not_there_neither_goes_on_nor_leaves_a_record(
    cli: Cli, place: Callable[[str], tuple[str, ...]], endpoint: Rehearsal, out: Path
) -> None:
    ended = cli(*place(endpoint.url), "--job-id", "ftjob-nosuch")

    assert ended.code == 1
    assert "見つかりません" in ended.err
    assert "続いて" not in ended.err
    assert "料金" not in ended.err
    assert list(out.glob("run_*.json")) == []
