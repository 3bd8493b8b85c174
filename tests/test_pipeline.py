"""The whole path: what is written, what is sent, and where it stops before anything is paid."""

from __future__ import annotations

import contextlib
import gc
import json
import re
import stat
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from endpoint import Exchange, Fault, Rehearsal
from faults import Clock
from helpers import examples, posts, read_json, record, recorded_run, records, write_jsonl

from openai_sft import (
    BudgetError,
    ConfigurationError,
    CostEstimate,
    DataError,
    Declined,
    JobFailed,
    OpenAISFT,
    TokenCounter,
    load_vocabulary,
)

MakeSFT = Callable[..., OpenAISFT]
Log = Callable[[], list[str]]

NOON = 1_800_000_000.0
JOBS = "/fine_tuning/jobs"
CHAT = "/chat/completions"
STAMPED = (
    r"(train_data|test_data|valid_data|manifest|run|training_metrics|evaluation"
    r"|comprehensive_evaluation|answers|report)_(\d{8}_\d{6})\.(jsonl|json|csv|html)"
)


def run(sft: OpenAISFT, **options: Any) -> dict[str, Any]:
    return sft.run_full_pipeline(**({"epochs": 1, "batch_size": 4, "max_test_cases": 1} | options))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def messages_of(path: str | Path) -> list[Any]:
    return [json.loads(line)["messages"] for line in Path(path).read_bytes().splitlines()]


# ── From end to end ──────────────────────────────────────────────────────────────────────────


def test_a_rehearsal_runs_from_end_to_end_without_a_key(clean_environment: Path, log: Log) -> None:
    with OpenAISFT(rehearse=True, verbose=False, sleep=lambda _: None) as sft:
        results = sft.run_full_pipeline(epochs=2, batch_size=8, max_test_cases=3)
    folder = clean_environment / "openai_sft_outputs"
    (saved,) = folder.glob("comprehensive_evaluation_*.json")

    assert results["rehearsal"] is True
    assert ":rehearsal:" in results["model_id"]
    assert results["summary"]["total_cases_evaluated"] == 4
    assert all(response["output"] for response in results["test_evaluation"]["responses"])
    assert read_json(saved) == results
    assert read_json(sft.files["record"])["rehearsal"] is True
    assert any("リハーサル" in line and "GPTの性能とは無関係" in line for line in log())
    assert any("実際の課金はありません" in line for line in log())


def test_a_closed_rehearsal_leaves_neither_a_connection_nor_a_thread(
    clean_environment: Path,
) -> None:
    before = set(threading.enumerate())
    with OpenAISFT(rehearse=True, verbose=False) as sft:
        sft.client.models.list()
    del sft
    gc.collect()  # an open socket is warned of here, and a warning is an error

    assert not {thread.name for thread in set(threading.enumerate()) - before} & {
        *("rehearsal", "rehearsal-jobs")
    }


def test_a_tuned_model_answers_otherwise_than_its_base(make_sft: MakeSFT) -> None:
    sft = make_sft()
    tuned = run(sft, max_test_cases=2)
    base = sft.run_evaluation(sft.model, max_test_cases=2)

    def outputs(results: dict[str, Any]) -> dict[str, str]:
        return {r["case_id"]: r["output"] for r in results["test_evaluation"]["responses"]}

    assert outputs(tuned).keys() == outputs(base).keys()
    assert all(outputs(tuned)[case] != output for case, output in outputs(base).items())


def test_the_steps_one_by_one_do_what_the_pipeline_does(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    whole = run(make_sft(output_dir="whole"), max_samples=18, seed=3)
    sft = make_sft(output_dir="steps")
    train, test, valid = sft.load_and_split_dataset(max_samples=18, seed=3)
    train_data = sft.prepare_dataset(train, "train")
    test_data = sft.prepare_dataset(test, "test")
    valid_data = sft.prepare_dataset(valid, "valid")
    filepaths = sft.save_all_datasets(train_data, test_data, valid_data)
    file_id = sft.upload_training_file(filepaths["train"])
    job_id = sft.create_fine_tune_job(file_id, epochs=1, batch_size=4)
    job = sft.monitor_fine_tune_job(job_id)
    assert job.fine_tuned_model
    results = sft.evaluate_model_comprehensive(
        job.fine_tuned_model, test_data, valid_data, max_test_cases=1, seed=3
    )
    path = sft.save_results(results)

    def asked(results: dict[str, Any]) -> list[Any]:
        return [
            (r["case_id"], r["input"], r["reference"])
            for name in ("test", "valid")
            for r in results[f"{name}_evaluation"]["responses"]
        ]

    assert set(filepaths) == {"train", "test", "valid"}
    assert asked(results) == asked(whole)
    assert read_json(path) == results
    assert set(train_data[0]) == {"id", "messages"}


def test_the_service_gets_the_files_that_were_written_and_the_validation_file_too(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    sft = make_sft()
    run(sft, seed=9)
    (created,) = posts(endpoint, JOBS)
    asked = created.request

    assert len(posts(endpoint, "/files")) == 2
    for key, split in (("training_file", "train"), ("validation_file", "valid")):
        content = sft.client.files.content(asked[key]).content
        assert content == Path(sft.files[split]).read_bytes()
    assert asked["seed"] == 9
    assert asked["method"]["supervised"]["hyperparameters"] == {"n_epochs": 1, "batch_size": 4}


def test_options_of_the_job_reach_the_job(make_sft: MakeSFT, endpoint: Rehearsal) -> None:
    results = run(make_sft(), suffix="kokoro", learning_rate_multiplier=0.5)
    (created,) = posts(endpoint, JOBS)

    assert created.request["suffix"] == "kokoro"
    assert created.request["method"]["supervised"]["hyperparameters"][
        "learning_rate_multiplier"
    ] == (0.5)
    assert ":kokoro:" in results["model_id"]


def test_every_dialogue_keeps_its_id_to_the_end_and_is_in_one_split_only(
    make_sft: MakeSFT,
) -> None:
    sft = make_sft()
    results = run(sft, max_test_cases=0)
    asked = [
        {response["case_id"].rpartition(":")[0] for response in part["responses"]}
        for part in (results["test_evaluation"], results["valid_evaluation"])
    ]
    _, test, valid = sft.load_and_split_dataset()

    assert asked == [{row["id"] for row in test}, {row["id"] for row in valid}]


def test_a_system_prompt_is_in_every_line_and_every_question(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    prompt = {"role": "system", "content": "傾聴してください。\u2028"}
    sft = make_sft(system_prompt=prompt["content"])
    run(sft)

    for split in ("train", "test", "valid"):
        assert all(said[0] == prompt for said in messages_of(sft.files[split]))
    assert all(e.request["messages"][0] == prompt for e in posts(endpoint, CHAT))


def test_a_rehearsal_starts_one_endpoint_and_reads_its_own_dialogues_to_the_end(
    clean_environment: Path, log: Log
) -> None:
    with OpenAISFT(rehearse=True, output_dir=clean_environment / "out", verbose=False) as sft:
        sft.run_full_pipeline(epochs=1, max_test_cases=1)
        settings = read_json(sft.files["record"])["settings"]

    assert sum("模擬エンドポイント" in line for line in log()) == 1
    assert settings["base_url"] is None
    assert settings["dataset"] is None


def requests(exchanges: list[Exchange]) -> list[str]:
    """The requests as lines, ids left out; a single look before anything is sent isn't one."""
    lines = [
        re.sub(r"(ftjob|file|ft)[-:][^/]+", r"\1", f"{one.method} {one.path}") for one in exchanges
    ]
    first = next(n for n, line in enumerate(lines) if line.startswith("POST"))
    return lines[1:] if first == 1 else lines


def test_a_run_that_nothing_happens_to_sends_each_request_once_and_looks_nothing_up(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    clock = Clock(endpoint, moment=0.05)
    run(make_sft(clock=clock, sleep=clock.sleep), max_test_cases=2, baseline=True)
    asked = requests(endpoint.exchanges)
    polls = ["GET /fine_tuning/jobs/ftjob", "GET /fine_tuning/jobs/ftjob/events"]
    questions = [(e.request["model"], str(e.request["messages"])) for e in posts(endpoint, CHAT)]

    assert asked == [
        *("POST /files", "POST /files", "POST /fine_tuning/jobs"),
        *polls * (len(clock.slept) + 1),
        *("GET /files/file/content", "GET /fine_tuning/jobs/ftjob/checkpoints", "GET /models/ft"),
        *["POST /chat/completions"] * 8,
    ]
    assert len(set(questions)) == 8
    assert {e.status for e in endpoint.exchanges} == {200}


@pytest.mark.parametrize("known", [True, False], ids=["tuned here", "made elsewhere"])
def test_an_evaluation_that_nothing_happens_to_sends_its_questions_alone_and_each_once(
    make_sft: MakeSFT, endpoint: Rehearsal, known: bool
) -> None:
    model = run(make_sft())["model_id"] if known else "gpt-4.1-2025-04-14"
    before = len(endpoint.exchanges)
    make_sft().run_evaluation(
        model, max_test_cases=2, baseline="gpt-4o-2024-08-06", temperature=0.5
    )
    after = endpoint.exchanges[before:]

    assert requests(after) == ["POST /chat/completions"] * 8
    assert len({(e.request["model"], str(e.request["messages"])) for e in after}) == 8


# ── The files ────────────────────────────────────────────────────────────────────────────────


def test_the_files_of_a_run_carry_one_stamp_are_private_and_nothing_else_is_left(
    make_sft: MakeSFT,
) -> None:
    sft = make_sft(clock=lambda: NOON)
    run(sft)
    sft.close()
    found = {name: re.fullmatch(STAMPED, name) for name in names(sft.output_dir)}

    assert all(found.values()), found.keys()
    assert len({match[2] for match in found.values() if match}) == 1
    assert sorted(match[1] for match in found.values() if match) == sorted(
        STAMPED[1 : STAMPED.index(")")].split("|")
    )
    assert {stat.S_IMODE(p.stat().st_mode) for p in sft.output_dir.iterdir()} == {0o600}
    assert {Path(path).name for path in sft.files.values()} == names(sft.output_dir)


def test_data_files_hold_messages_and_nothing_else(make_sft: MakeSFT) -> None:
    sft = make_sft(offline=True)
    files = sft.prepare_data().files

    for split in ("train", "test", "valid"):
        for line in Path(files[split]).read_text("utf-8").splitlines():
            assert set(json.loads(line)) == {"messages"}


def test_two_runs_of_the_same_second_keep_their_own_files(make_sft: MakeSFT) -> None:
    first = make_sft(clock=lambda: NOON, offline=True)
    first.prepare_data(seed=1)
    first.close()
    before = {path.name: path.read_bytes() for path in first.output_dir.iterdir()}
    second = make_sft(clock=lambda: NOON, offline=True)
    second.prepare_data(seed=2)
    second.close()

    assert len(names(first.output_dir)) == 2 * len(before)
    assert {name: (first.output_dir / name).read_bytes() for name in before} == before
    assert not set(first.files.values()) & set(second.files.values())


def test_a_second_run_of_the_same_instance_starts_new_files(make_sft: MakeSFT) -> None:
    sft = make_sft(clock=lambda: NOON)
    run(sft)
    first = sft.files
    run(sft)
    sft.close()

    assert not set(first.values()) & set(sft.files.values())
    assert len(names(sft.output_dir)) == len(first) + len(sft.files)


def test_the_run_record_tells_all_that_is_needed_to_find_the_model_again(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    sft = make_sft()
    results = run(sft, suffix="心")
    kept = read_json(sft.files["record"])
    (created,) = posts(endpoint, JOBS)

    assert kept["fine_tuned_model"] == results["model_id"]
    assert kept["job_id"] == created.response["id"]
    assert kept["uploads"]["training"]["file_id"] == created.request["training_file"]
    assert kept["uploads"]["validation"]["file_id"] == created.request["validation_file"]
    assert kept["job_intent"]["request"] == {
        key: value for key, value in created.request.items() if key != "metadata"
    }
    assert kept["final_metrics"]["train_loss"] > 0
    assert set(kept["files"]) == set(sft.files) - {"record"}
    assert kept["evaluation"].items() >= results["summary"].items()
    assert kept["settings"]["model"] == sft.model
    assert not kept["rehearsal"]
    assert "心" in Path(sft.files["record"]).read_text("utf-8")


# ── Too few, too dear, not wanted ────────────────────────────────────────────────────────────


def test_eleven_dialogues_are_too_few_and_nothing_is_sent(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    with pytest.raises(DataError, match="12件以上") as caught:
        run(make_sft(), max_samples=11)

    assert "9件" in str(caught.value)
    assert posts(endpoint) == []


def test_twelve_dialogues_are_enough(make_sft: MakeSFT) -> None:
    sft = make_sft()
    results = run(sft, max_samples=12)

    assert len(messages_of(sft.files["train"])) == 10
    assert len(messages_of(sft.files["test"])) == len(messages_of(sft.files["valid"])) == 1
    assert results["summary"]["total_cases_evaluated"] == 2


def test_what_cannot_be_learnt_from_does_not_count_as_an_example(
    make_sft: MakeSFT, endpoint: Rehearsal, clean_environment: Path
) -> None:
    silent = [record(n, ("client", f"もしもし{n}")) for n in range(100, 110)]
    path = write_jsonl(clean_environment / "b.jsonl", [*records(5), *silent])
    with pytest.raises(DataError, match="10件以上"):
        run(make_sft(dataset=str(path)))

    assert posts(endpoint) == []


@pytest.mark.parametrize("options", [{"epochs": 0}, {"batch_size": 257}, {"seed": -1}], ids=str)
def test_a_wrong_option_stops_before_the_data_is_even_read(
    make_sft: MakeSFT, endpoint: Rehearsal, options: dict[str, int]
) -> None:
    (name,) = options
    with pytest.raises(ConfigurationError, match=name):
        run(make_sft(dataset="nothing.json"), **options)

    assert endpoint.exchanges == []


def test_a_negative_number_of_cases_is_refused_before_anything_is_sent(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    with pytest.raises(ConfigurationError, match="max_test_cases"):
        run(make_sft(), max_test_cases=-1)

    assert endpoint.exchanges == []


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({"max_cost_usd": 0.0}, {}),
        ({"max_cost_usd": 0.001}, {"epochs": 50}),
        ({"max_cost_usd": 1000.0, "model": "gpt-4.1-nano-2025-04-14"}, {}),
        ({"max_cost_usd": 0.001}, {"epochs": "auto"}),
    ],
    ids=["free only", "too many epochs", "price unknown", "epochs unknown"],
)
def test_over_the_budget_or_where_the_price_is_unknown_nothing_is_sent(
    make_sft: MakeSFT, endpoint: Rehearsal, options: dict[str, Any], asked: dict[str, Any]
) -> None:
    with pytest.raises(BudgetError, match=r"上限.*中止しました"):
        run(make_sft(confirm=lambda _: True, **options), **asked)

    assert posts(endpoint) == []


def test_without_a_budget_an_unknown_price_does_not_stop_the_run(
    make_sft: MakeSFT, log: Log
) -> None:
    run(make_sft(model="gpt-4.1-nano-2025-04-14"))

    assert "合計: 不明" in log()


def test_the_price_is_shown_and_confirmed_before_anything_is_sent(
    make_sft: MakeSFT, endpoint: Rehearsal, log: Log
) -> None:
    asked: list[CostEstimate] = []

    def confirm(estimate: CostEstimate) -> bool:
        asked.append(estimate)
        assert posts(endpoint) == []
        assert any(line.startswith("合計: $") for line in log())
        return False

    with pytest.raises(Declined):
        run(make_sft(confirm=confirm), epochs=4)
    (estimate,) = asked

    assert posts(endpoint) == []
    assert estimate.epochs == 4
    assert estimate.exact_tokens
    assert estimate.training_usd == pytest.approx(estimate.training_tokens * 4 * 3e-6)
    assert estimate.total_usd
    assert estimate.total_usd > estimate.training_usd > 0


def test_the_price_that_is_confirmed_is_of_the_very_cases_that_will_be_asked(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    asked: list[CostEstimate] = []
    options: dict[str, Any] = {"max_test_cases": 3, "seed": 5}
    with pytest.raises(Declined):
        run(make_sft(confirm=asked.append), **options, eval_turns=2, baseline=True)
    results = run(make_sft(output_dir="again"), **options, eval_turns=2, baseline=True)
    counter = TokenCounter(load_vocabulary())
    inputs = [
        response["input"]
        for name in ("test", "valid")
        for response in results[f"{name}_evaluation"]["responses"]
    ]
    (estimate,) = asked
    tokens = (estimate.evaluation_input_tokens, estimate.evaluation_output_tokens)

    assert len(inputs) == 6
    assert tokens[0] == sum(counter.count(one).total for one in inputs)
    assert estimate.baseline == "gpt-4o-mini-2024-07-18"
    assert estimate.evaluation_usd == pytest.approx(
        (tokens[0] * (0.30 + 0.15) + tokens[1] * (1.20 + 0.60)) / 1e6
    )


def test_the_limit_itself_may_be_reached(make_sft: MakeSFT) -> None:
    asked: list[CostEstimate] = []
    with pytest.raises(Declined):
        run(make_sft(confirm=asked.append))
    with pytest.raises(Declined):
        run(make_sft(confirm=asked.append, max_cost_usd=asked[0].total_usd))

    assert asked[0].total_usd == asked[1].total_usd


def test_an_evaluation_alone_is_paid_too_and_asked_about(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    with pytest.raises(Declined):
        make_sft(confirm=lambda _: False).run_evaluation("ft:gpt-4o-mini-2024-07-18:o::a")
    with pytest.raises(BudgetError):
        make_sft(max_cost_usd=0.0).run_evaluation("ft:gpt-4o-mini-2024-07-18:o::a")

    assert posts(endpoint) == []


# ── A job without a model ────────────────────────────────────────────────────────────────────


def test_a_failed_job_is_raised_with_the_services_code_and_message(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    endpoint.inject(Fault("job_failed", "POST", JOBS))
    sft = make_sft()
    with pytest.raises(JobFailed, match="ファインチューニング失敗: failed") as caught:
        run(sft)
    kept = read_json(sft.files["record"])

    assert caught.value.code == "server_error"
    assert caught.value.message == "The job failed due to an internal error."
    assert caught.value.status == "failed"
    assert caught.value.job_id == kept["job_id"] == posts(endpoint, JOBS)[0].response["id"]
    assert caught.value.message in str(caught.value)
    assert posts(endpoint, CHAT) == []


# ── The newest model ─────────────────────────────────────────────────────────────────────────


def keep(folder: Path, stamp: str, model: str | None, **facts: Any) -> None:
    """A record of a job that was watched here and made elsewhere: nothing is known of its data."""
    facts = {"kind": "job", "settings": {"base_url": None}, "fine_tuned_model": model, **facts}
    recorded_run(folder, stamp, **facts)


def model_asked(sft: OpenAISFT, endpoint: Rehearsal) -> str:
    """The model that an evaluation without a model id turns to; it needn't exist."""
    with contextlib.suppress(openai.NotFoundError):
        sft.run_evaluation(max_test_cases=1)
    return str(posts(endpoint, CHAT)[0].request["model"])


def test_the_newest_model_is_never_a_rehearsals_and_never_an_unfinished_runs(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    sft = make_sft()
    keep(sft.output_dir, "20260101_000000", "ft:old")
    keep(sft.output_dir, "20260102_000000", "ft:new", rehearsal=False)
    keep(sft.output_dir, "20260103_000000", "ft:rehearsed", rehearsal=True)
    keep(sft.output_dir, "20260104_000000", None)

    assert model_asked(sft, endpoint) == "ft:new"


def test_evaluating_without_a_model_takes_the_newest(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    sft = make_sft()
    keep(sft.output_dir, "20260101_000000", "gpt-4o-2024-08-06")
    keep(sft.output_dir, "20260102_000000", "gpt-4.1-2025-04-14")
    results = sft.run_evaluation(max_test_cases=1)

    assert results["model_id"] == "gpt-4.1-2025-04-14"
    assert {e.request["model"] for e in posts(endpoint, CHAT)} == {"gpt-4.1-2025-04-14"}
    assert posts(endpoint, JOBS) == []


def test_a_model_tuned_at_an_endpoint_of_its_own_is_a_run_like_any_other(
    make_sft: MakeSFT,
) -> None:
    sft = make_sft()
    tuned = run(sft)

    assert not read_json(sft.files["record"])["rehearsal"]
    assert make_sft().run_evaluation(max_test_cases=1)["model_id"] == tuned["model_id"]


def test_evaluating_where_nothing_was_tuned_says_how_to_name_a_model(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    with pytest.raises(ConfigurationError, match="--model-id"):
        make_sft().run_evaluation()

    assert endpoint.exchanges == []


# ── Coming back ──────────────────────────────────────────────────────────────────────────────


def test_after_an_interruption_it_is_said_what_goes_on_and_how_to_come_back(
    make_sft: MakeSFT, endpoint: Rehearsal
) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    endpoint.hold("running")
    sft = make_sft(sleep=interrupt)
    before = sft.describe_remote_state()
    with pytest.raises(KeyboardInterrupt):
        run(sft)
    during = sft.describe_remote_state()
    job_id = posts(endpoint, JOBS)[0].response["id"]
    endpoint.release()
    later = make_sft()
    ended = later.monitor_fine_tune_job(job_id)

    assert "続いている処理はありません" in before
    assert job_id in during
    assert "料金" in during
    assert ended.fine_tuned_model
    assert ended.fine_tuned_model in later.describe_remote_state()


def test_two_that_save_in_the_same_second_never_share_a_stamp(make_sft: MakeSFT) -> None:
    def save(sft: OpenAISFT) -> dict[str, str]:
        return sft.save_all_datasets(examples(10), examples(1), [])

    both = [make_sft(clock=lambda: 1_800_000_000.0) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        paths = [Path(path).name for saved in pool.map(save, both) for path in saved.values()]

    assert len(set(paths)) == 12
