"""The engine of real models: how it answers, how it carries a job out, and what it lends.

Most models here are made to speak: their weights say one letter after the other.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from calls import (
    ask,
    connected,
    examples,
    finish,
    json_schema,
    metrics_of,
    start_job,
    wait_until,
)
from endpoint import Rehearsal
from faults import until
from helpers import LoopbackHandler, LoopbackServer, require_local

from openai_sft_local import LocalEngine, export, load_model
from openai_sft_rehearsal import ApiError, Model, Order, Reply

require_local()

# PEFT's own way of asking Transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

PROJECT = Path(__file__).parents[1]
JOB = "ftjob-0123456789abcdef01234567"
END = "<|im_end|>"
CONTEXT = 256
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# --- Models ---------------------------------------------------------------------------------------


def tokenizer() -> Any:
    """Every token is a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", END]
    bare.train_from_iterator(
        [], trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=special)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bare, eos_token=END, pad_token=special[0], chat_template=TEMPLATE
    )


def make_model(folder: Path, says: str | None = None, *, width: int = 64) -> Path:
    """A small Qwen3 that answers with a text of different bytes, or at random with None."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    words = tokenizer()
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(words),
            hidden_size=64,
            intermediate_size=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=CONTEXT,
            initializer_range=0.2,
            tie_word_embeddings=False,
        )
    )
    if says is not None:
        speak(model, [*words("\n" + says)["input_ids"], words.eos_token_id])
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def speak(model: Any, chain: list[int]) -> None:
    """Have each token of a chain follow the one before it."""
    import torch

    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "layers" in name and "norm" not in name:
                weights.zero_()  # the last token alone decides
        model.lm_head.weight.zero_()
        for before, after in itertools.pairwise(chain):
            model.lm_head.weight[after] += model.model.embed_tokens.weight[before]


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "random")


@pytest.fixture(scope="session")
def speaking_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "speaking", says="abcあdef, ghi")


@pytest.fixture(scope="session")
def engines(
    random_model: Path, speaking_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, LocalEngine]]:
    made = {
        path.name: LocalEngine(str(path), tmp_path_factory.mktemp("state"))
        for path in (random_model, speaking_model)
    }
    yield made
    for engine in made.values():
        engine.close()


@pytest.fixture(scope="session")
def clients(engines: dict[str, LocalEngine], sdk: openai.OpenAI) -> Iterator[dict[str, Any]]:
    """Clients of endpoints that stay for all tests: a model is loaded once."""
    running = {name: Rehearsal(engine=engine).start() for name, engine in engines.items()}
    yield {name: connected(sdk, endpoint) for name, endpoint in running.items()}
    for endpoint in running.values():
        endpoint.close()


@pytest.fixture
def say(clients: dict[str, Any]) -> Callable[..., Any]:
    """Ask the model that speaks, which answers with what is likeliest."""

    def asked(text: str = "眠れません", **options: Any) -> Any:
        return ask(clients["speaking"], "speaking", text, **{"temperature": 0, **options})

    return asked


@pytest.fixture
def draw(clients: dict[str, Any]) -> Callable[..., str]:
    """Ask the model that answers at random, for forty tokens."""

    def asked(text: str = "眠れません", **options: Any) -> str:
        answer = ask(clients["random"], "random", text, **{"max_tokens": 40, **options})
        return str(answer.choices[0].message.content)

    return asked


def at_once(count: int, asked: Callable[[int], Any]) -> list[Any]:
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return list(pool.map(asked, range(count)))


# --- Answers --------------------------------------------------------------------------------------


def test_an_answer_ends_where_the_model_ends_its_turn(say: Callable[..., Any]) -> None:
    answer = say()

    assert answer.choices[0].message.content == "abcあdef, ghi"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == len("abcあdef, ghi".encode()) + 1  # and the end
    asked = "<|im_start|>user\n眠れません<|im_end|>\n<|im_start|>assistant\n"
    assert answer.usage.prompt_tokens == len(tokenizer()(asked)["input_ids"])


@pytest.mark.parametrize(
    ("limit", "text"), [(2, "ab"), (4, "abc"), (6, "abcあ"), (14, "abcあdef, ghi")]
)
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_limited_answer_ends_with_a_whole_character(
    say: Callable[..., Any], limit: int, text: str, name: str
) -> None:
    answer = say(**{name: limit})

    assert answer.choices[0].message.content == text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == limit


@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [
        ("あ", "abc", 6),
        ("def, ", "abcあ", 11),
        (["f, ", "nothing"], "abcあde", 11),
        (["ghi", "d"], "abcあ", 7),
        ("z", "abcあdef, ghi", 15),
    ],
)
def test_a_stop_sequence_ends_the_answer_and_is_left_out(
    say: Callable[..., Any], stop: str | list[str], text: str, tokens: int
) -> None:
    answer = say(stop=stop)

    assert answer.choices[0].message.content == text
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == tokens


def test_questions_of_a_moment_are_answered_together_and_as_if_alone(
    draw: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "openai_sft_local")
    questions = ["長い相談。" * n + "眠れません" for n in range(8)]
    limits = [40, 3, 17, 40, 25, 1, 40, 9]

    def asked(n: int) -> str:
        return draw(questions[n], temperature=0, max_tokens=limits[n])

    alone = [asked(n) for n in range(8)]
    caplog.clear()
    together = at_once(8, asked)

    assert together == alone
    assert len(set(alone)) == 8
    assert 1 <= sum("at once" in message for message in caplog.messages) < 8


def test_a_seed_draws_the_same_answer_whoever_else_is_asked(draw: Callable[..., str]) -> None:
    alone = draw(seed=3)
    together = at_once(6, lambda n: draw(seed=n))

    assert together[3] == alone == draw(seed=3)
    assert len(set(together)) == 6
    assert draw() != draw()  # OpenAI's temperature is 1 unless told


def test_only_the_likeliest_is_drawn_where_nothing_else_may_be(draw: Callable[..., str]) -> None:
    likeliest = draw(temperature=0)

    assert draw(temperature=0, seed=9) == likeliest
    assert draw(top_p=0) == likeliest
    assert draw(top_p=1e-9, temperature=2) == likeliest
    assert draw(temperature=0.001) == likeliest
    assert draw(temperature=1e-40) == likeliest
    assert draw(top_p=0.95, seed=1) != likeliest


def test_a_low_top_p_draws_from_few(clients: dict[str, Any]) -> None:
    def first(top_p: float, seed: int) -> str:
        options: dict[str, Any] = {"top_p": top_p, "seed": seed, "temperature": 2, "max_tokens": 1}
        answer = ask(clients["random"], "random", **options)
        return str(answer.choices[0].message.content) + str(answer.usage)

    few, many = ({first(top_p, seed) for seed in range(20)} for top_p in (0.03, 1.0))

    assert len(few) < len(many)


def test_what_was_said_is_said_less_where_that_is_asked(draw: Callable[..., str]) -> None:
    plain = draw(temperature=0)

    assert draw(temperature=0, frequency_penalty=2) != plain
    assert draw(temperature=0, presence_penalty=2) != plain


def test_a_models_own_settings_change_no_answer(
    speaking_model: Path, tmp_path: Path, sdk: openai.OpenAI
) -> None:
    folder = shutil.copytree(speaking_model, tmp_path / "speaking")
    own = {"do_sample": True, "temperature": 9.0, "suppress_tokens": tokenizer()("d")["input_ids"]}
    settings = {**own, "min_new_tokens": 60, "repetition_penalty": 9.0, "max_new_tokens": 3}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    engine = LocalEngine(str(folder), tmp_path / "state")
    with Rehearsal(engine=engine) as endpoint:
        answer = ask(connected(sdk, endpoint), "speaking", temperature=0)

    assert answer.choices[0].message.content == "abcあdef, ghi"


def schema(name: str = "s", **properties: Any) -> dict[str, Any]:
    return json_schema(properties, name)


def test_a_strict_schema_is_obeyed_in_any_company(draw: Callable[..., str]) -> None:
    scores = {f"score_{n}": {"type": "integer", "enum": [0, 1, 2, 3]} for n in range(3)}

    def asked(n: int) -> str:
        form = schema(**scores) if n % 2 else {"type": "text"}
        return draw(response_format=form, seed=n, max_tokens=200)

    answers = [json.loads(text) for text in at_once(8, asked)[1::2]]

    assert [list(answer) for answer in answers] == [list(scores)] * 4
    assert {type(v) for answer in answers for v in answer.values()} == {int}
    assert all(0 <= v <= 3 for answer in answers for v in answer.values())
    assert len({json.dumps(answer) for answer in answers}) > 1


def test_an_answer_by_a_schema_ends_with_it(clients: dict[str, Any]) -> None:
    form: Any = schema(winner={"type": "string", "enum": ["A", "tie"]})
    answer = ask(clients["random"], "random", response_format=form)

    assert json.loads(answer.choices[0].message.content)["winner"] in ("A", "tie")
    assert answer.choices[0].finish_reason == "stop"


def test_json_is_written_as_the_model_has_learnt_to(say: Callable[..., Any]) -> None:
    form = schema(**{"0": {"type": "string", "enum": ["1"]}, "2": {"type": "integer", "enum": [3]}})
    # Both spellings are allowed; this model knows neither, and takes the lowest of equal tokens.
    text = say(response_format=form).choices[0].message.content

    assert json.loads(text) == {"0": "1", "2": 3}


def test_a_json_object_is_one(draw: Callable[..., str]) -> None:
    texts = [
        draw(response_format={"type": "json_object"}, seed=seed, max_tokens=8) for seed in range(20)
    ]

    assert {text[:2] for text in texts} <= {'{"', "{}"}  # a model that fills it with spaces may not


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"response_format": {"type": "grammar"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": 1}}, "response_format"),
        ({"response_format": schema(a={"type": "colour"})}, "response_format"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": "low"}, "top_p"),
        ({"presence_penalty": True}, "presence_penalty"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"logprobs": True}, "logprobs"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"seed": "x"}, "seed"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": {"url": "data:,"}}],
                    }
                ]
            },
            "messages[0].content",
        ),
    ],
)
def test_what_cannot_be_had_is_refused(
    say: Callable[..., Any], options: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        say(**options)

    assert refused.value.param == param


@pytest.mark.parametrize("options", [{}, {"max_tokens": 200}])
def test_a_question_longer_than_the_context_is_refused(
    say: Callable[..., Any], options: dict[str, Any]
) -> None:
    length = 60 if options else 300
    with pytest.raises(openai.BadRequestError) as refused:
        say("a" * length, **options)

    assert refused.value.code == "context_length_exceeded"


def test_a_refused_question_harms_none_that_came_with_it(say: Callable[..., Any]) -> None:
    def asked(n: int) -> str:
        try:
            return str(say("a" * 300 if n % 2 else "a").choices[0].message.content)
        except openai.BadRequestError as problem:
            return str(problem.code)

    assert at_once(6, asked) == ["abcあdef, ghi", "context_length_exceeded"] * 3


def test_an_answer_under_way_is_broken_off_when_the_endpoint_closes(
    random_model: Path, tmp_path: Path, sdk: openai.OpenAI
) -> None:
    config = json.loads((random_model / "config.json").read_text())
    folder = shutil.copytree(random_model, tmp_path / "random")
    config |= {"max_position_embeddings": 10**6}
    (folder / "config.json").write_text(json.dumps(config))
    engine = LocalEngine(str(folder), tmp_path / "state")
    with Rehearsal(engine=engine) as endpoint, concurrent.futures.ThreadPoolExecutor(1) as pool:
        client = connected(sdk, endpoint)
        ask(client, "random", max_tokens=1)
        answer = pool.submit(ask, client, "random", max_tokens=900_000)
        until(lambda: endpoint.in_flight)
        endpoint.close()

        assert isinstance(answer.exception(10), openai.APIError)


def test_half_a_character_is_refused(engines: dict[str, LocalEngine]) -> None:
    content = json.loads('"\\ud800"')

    with pytest.raises(ApiError) as refused:
        engines["speaking"].answer(
            Model("speaking"), {"messages": [{"role": "user", "content": content}]}
        )

    assert refused.value.answer.status == 400


#: Answers eight questions at once with memory for fewer, then one for which there is none.
SHORT_OF_MEMORY = """
import concurrent.futures, json, logging, resource, sys
from pathlib import Path
from openai_sft_local import LocalEngine
from openai_sft_rehearsal import ApiError, Model

engine = LocalEngine(sys.argv[1], Path(sys.argv[2]))
logging.basicConfig(level=logging.DEBUG)

def asked(n):
    body = {"messages": [{"role": "user", "content": "a" * (150 + n)}], "temperature": 0}
    try:
        return engine.answer(Model("wide"), body).text
    except ApiError as problem:
        return json.loads(problem.answer.body)["error"]["code"]

def limit(megabytes):
    written = next(line for line in open("/proc/self/status") if line.startswith("VmData"))
    most = int(written.split()[1]) * 1024 + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (most, resource.RLIM_INFINITY))

with concurrent.futures.ThreadPoolExecutor(8) as pool:
    asked(0)
    limit(200)
    answers = list(pool.map(asked, range(8)))
    limit(20)
    print(json.dumps([answers, asked(0)]))
engine.close()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_DATA as Linux has it")
def test_questions_are_answered_in_halves_where_memory_is_short(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "wide", says="abc", width=2**15)
    command = [sys.executable, "-c", SHORT_OF_MEMORY, str(folder), str(tmp_path / "state")]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PROJECT)

    assert json.loads(ended.stdout) == [["abc"] * 8, "out_of_memory"]


# --- What jobs have left --------------------------------------------------------------------------

QUESTION: dict[str, Any] = {
    "messages": [{"role": "user", "content": "眠れません"}],
    "temperature": 0,
    "max_tokens": 30,
}


def make_adapter(base: Path, folder: Path, seed: int) -> Path:
    """An adapter that was drawn, not learnt, in the place of a job's checkpoint."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(load_model(str(base), training=False), config)
    adapted.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def left(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state of an engine whose job has left ten adapters and a whole model."""
    state = tmp_path_factory.mktemp("left")
    job = state / "trainers" / JOB
    for step in range(1, 11):
        make_adapter(random_model, job / f"checkpoint-{step}", step)
    make_model(job / "checkpoint-20", says="whole")
    return state


@pytest.fixture(scope="session")
def old_engine(random_model: Path, left: Path) -> Iterator[LocalEngine]:
    engine = LocalEngine(str(random_model), left)
    yield engine
    engine.close()


def test_an_adapter_alone_answers_from_its_folder_with_the_tokenizer_of_its_base(
    old_engine: LocalEngine, left: Path, tmp_path: Path
) -> None:
    checkpoint = left / "trainers" / JOB / "checkpoint-3"
    folder = tmp_path / "downloaded"
    folder.mkdir()
    for path in checkpoint.glob("adapter_*"):
        (folder / path.name).write_bytes(path.read_bytes())
    with contextlib.closing(LocalEngine(str(folder), tmp_path / "state")) as engine:
        alone = engine.answer(Model("downloaded"), QUESTION)

    assert alone.text == old_engine.answer(Model("random", JOB, 3), QUESTION).text
    assert alone.text != old_engine.answer(Model("random"), QUESTION).text


def test_each_adapter_answers_as_itself_and_the_base_without_any(
    old_engine: LocalEngine, draw: Callable[..., str]
) -> None:
    base = draw(temperature=0, max_tokens=30)
    steps = [*range(1, 11), *range(1, 4)]  # more than are kept in memory
    answers = [old_engine.answer(Model("random", JOB, step), QUESTION).text for step in steps]

    assert len({base, *answers[:10]}) == 11
    assert answers[10:] == answers[:3]
    assert old_engine.answer(Model("random"), QUESTION).text == base


def test_adapters_that_are_asked_at_once_keep_apart(old_engine: LocalEngine) -> None:
    def asked(n: int) -> str:
        model = Model("random", JOB, n % 3) if n % 3 else Model("random")
        return old_engine.answer(model, QUESTION).text

    alone = [asked(n) for n in range(3)]

    assert at_once(9, asked) == alone * 3


def test_a_model_that_was_trained_whole_answers(old_engine: LocalEngine) -> None:
    whole = old_engine.answer(Model("random", JOB, 20), QUESTION)

    assert whole == Reply("whole", whole.prompt_tokens, 6, "stop")


def test_weights_that_are_gone_are_said_to_be_missing(old_engine: LocalEngine) -> None:
    with pytest.raises(ApiError) as refused:
        old_engine.answer(Model("random", JOB, 77), QUESTION)

    assert refused.value.answer.status == 404


@pytest.mark.parametrize("name", ["../../etc", "a/b", "", "ftjob-1\n"])
def test_a_name_from_outside_is_no_path(old_engine: LocalEngine, name: str) -> None:
    with pytest.raises(ValueError, match="name of a job"):
        old_engine.forget(name)


def test_the_tiny_model_is_missing_until_something_was_trained(tmp_path: Path) -> None:
    engine = LocalEngine("tiny", tmp_path)

    with pytest.raises(ApiError) as refused:
        engine.answer(Model("tiny"), QUESTION)

    assert refused.value.answer.status == 404
    engine.close()


def test_a_model_that_is_nowhere_is_told_in_the_users_language(tmp_path: Path) -> None:
    name = f"{tmp_path}/nothing"
    engine = LocalEngine(name, tmp_path / "state")

    with pytest.raises(ApiError, match="nothing を読めません") as refused:
        engine.answer(Model(name), QUESTION)

    assert refused.value.answer.status == 400
    engine.close()


# --- Export ---------------------------------------------------------------------------------------


def test_an_exported_model_answers_as_the_adapter_on_its_base(
    old_engine: LocalEngine, left: Path, tmp_path: Path
) -> None:
    exported = export(left / "trainers" / JOB / "checkpoint-1", tmp_path / "merged")
    engine = LocalEngine(str(exported), tmp_path / "state")

    assert engine.answer(Model("merged"), QUESTION) == old_engine.answer(
        Model("random", JOB, 1), QUESTION
    )
    assert not (exported / "adapter_config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    engine.close()


def test_a_whole_model_is_exported_too(left: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    exported = export(left / "trainers" / JOB / "checkpoint-20", tmp_path / "empty")
    engine = LocalEngine(str(exported), tmp_path / "state")

    assert engine.answer(Model("empty"), QUESTION).text == "whole"
    engine.close()


def test_nothing_is_exported_over_something_or_from_nothing(left: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()

    with pytest.raises(FileExistsError, match="空ではありません"):
        export(left / "trainers" / JOB / "checkpoint-1", tmp_path)
    with pytest.raises(FileNotFoundError, match="重みがありません"):
        export(left / "trainers" / JOB, tmp_path / "new")


# --- Jobs -----------------------------------------------------------------------------------------

#: A trainer that plays what it is told to, in the place of the real one.
TRAINER = """
import contextlib, json, os, pathlib, signal, subprocess, sys, time
from openai_sft_rehearsal import hold_lock

mode, *_, folder = sys.argv[1:]
job = pathlib.Path(folder)
spec = json.loads((job / "spec.json").read_text("utf-8"))
lock = hold_lock(job / "lock")
assert lock
progress = job / "progress.jsonl"
begun_before = progress.exists()

def say(kind, **more):
    with progress.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"kind": kind, **more}, ensure_ascii=False) + "\\n")

def step(number):
    metrics = {"train_loss": 5 - number, "train_mean_token_accuracy": 0.5}
    say("step", step=number, total_steps=4, metrics=metrics)

def wait():
    while not (job.parent / "go").exists():
        time.sleep(0.005)

print("the trainer speaks", os.getpid())
say("note", message="tiny は何も知りません", level="warn")
size = sum(1 for line in open(spec["training_file"], encoding="utf-8"))
say("data", examples=size, validation_examples=0, tokens=1000, learnt_tokens=400)
say("ready", ranks=spec["ranks"] or 1, device="cpu", method="lora", parameters=2000, trainable=20,
    total_steps=4)
for number in range(2 if begun_before else 1, 3):
    step(number)
if mode == "killed" or (mode == "killed once" and not begun_before):
    progress.open("a").write('{"kind": "st')
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "crashes":
    sys.exit("RuntimeError: something is odd")
if mode == "fails":
    say("failed", code="example_too_long", message="3行目が長すぎます", param="training_file")
    sys.exit(1)
if mode == "ranks":
    rank = [sys.executable, "-c", "import time; time.sleep(600)", "openai_sft_local", folder]
    subprocess.Popen(rank, start_new_session=True)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if mode in ("waits", "ranks"):
    wait()
step(3)
step(4)
kept = [{"step": n, "metrics": {"train_loss": 5 - n, "full_valid_loss": n}} for n in (4, 2)]
bits = {"before": 5, "after": 3.5, "low": -2, "high": -1, "examples": 9}
say("done", trained_tokens=1200, checkpoints=kept, best=2, bits_per_character=bits)
time.sleep(mode == "lingers" and 600)
"""


@pytest.fixture
def launcher(tmp_path: Path) -> Callable[[str], str]:
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER, encoding="utf-8")
    return lambda mode: shlex.join([sys.executable, str(script), mode])


def order(**changes: Any) -> Order:
    return Order(JOB, "m", examples(12), None, 1, 4, 1.0, seed=5, seen=0)._replace(**changes)


def alive(folder: Path) -> list[str]:
    """The processes that were told of a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if str(folder).encode() in words:
            found.append(path.parent.name)
    return found


def test_a_job_is_carried_out_by_a_trainer_of_its_own(
    launcher: Callable[[str], str], tmp_path: Path, sdk: openai.OpenAI
) -> None:
    engine = LocalEngine("org/model", tmp_path / "state", launcher=launcher("whole"), full=True)
    with Rehearsal(engine=engine) as endpoint:
        client = connected(sdk, endpoint)
        started = start_job(client, examples(12), model="org/model", seed=7, suffix="x")
        job = finish(endpoint, client, started)
        events = list(client.fine_tuning.jobs.list_events(job.id))[::-1]
        last, first = client.fine_tuning.jobs.checkpoints.list(job.id)
        folder = tmp_path / "state" / "trainers" / job.id

        assert job.fine_tuned_model == f"ft:org/model:local:x:{job.id[-8:]}"
        assert job.trained_tokens == 1200
        assert [metrics["step"] for metrics in metrics_of(client, job)] == [1, 2, 3, 4]
        assert (last.step_number, first.step_number) == (4, 2)
        said = [(event.level, event.message) for event in events]
        assert ("warn", "tiny は何も知りません") in said
        assert any("学習例12件" in message for _, message in said)
        assert any("学習前 5.000、学習後 3.500" in message for _, message in said)
        assert "the trainer speaks" in (folder / "trainer.log").read_text()
        spec = json.loads((folder / "spec.json").read_text("utf-8"))
        assert Path(spec.pop("training_file")).read_bytes() == examples(12)
        assert spec == {
            **{"job_id": job.id, "model": "org/model", "model_dir": None, "full": True, "seed": 7},
            **{"validation_file": None, "n_epochs": 3, "batch_size": 1, "ranks": None},
            "learning_rate_multiplier": 1.0,
        }
        until(lambda: not alive(folder))

        client.models.delete(job.fine_tuned_model)
        assert not folder.exists()


def test_a_trainer_that_lingers_after_its_last_word_is_ended(
    launcher: Callable[[str], str], tmp_path: Path
) -> None:
    engine = LocalEngine("org/model", tmp_path, launcher=launcher("lingers"))
    assert [item for item in engine.train(order()) if item][-1] == (1200,)
    assert not alive(tmp_path / "trainers" / JOB)
    engine.close()


@pytest.mark.parametrize(
    ("mode", "code", "said"),
    [
        ("killed", "out_of_memory", "メモリが足りない"),
        ("crashes", "server_error", "RuntimeError: something is odd"),
        ("fails", "example_too_long", "3行目が長すぎます"),
    ],
)
def test_a_trainer_that_dies_fails_the_job_with_a_reason(
    launcher: Callable[[str], str],
    tmp_path: Path,
    sdk: openai.OpenAI,
    mode: str,
    code: str,
    said: str,
) -> None:
    engine = LocalEngine("org/model", tmp_path / "state", launcher=launcher(mode))
    with Rehearsal(engine=engine) as endpoint:
        client = connected(sdk, endpoint)
        job = finish(endpoint, client, start_job(client, model="org/model"))

    assert (job.status, job.error.code) == ("failed", code)
    assert said in job.error.message


def test_a_launcher_that_is_nowhere_fails_the_job(tmp_path: Path, sdk: openai.OpenAI) -> None:
    engine = LocalEngine("org/model", tmp_path / "state", launcher="no-such-launcher --x")
    with Rehearsal(engine=engine) as endpoint:
        client = connected(sdk, endpoint)
        job = finish(endpoint, client, start_job(client, model="org/model"))

    assert job.error.code == "trainer_not_started"
    assert "no-such-launcher" in job.error.message


def test_cancelling_ends_all_processes_whatever_sessions_they_are_in(
    launcher: Callable[[str], str], tmp_path: Path, sdk: openai.OpenAI
) -> None:
    engine = LocalEngine("org/model", tmp_path / "state", launcher=launcher("ranks"))
    with Rehearsal(engine=engine) as endpoint:
        client = connected(sdk, endpoint)
        job = wait_until(endpoint, client, start_job(client, model="org/model"), "running")
        folder = tmp_path / "state" / "trainers" / job.id
        until(lambda: len(alive(folder)) == 2 and metrics_of(client, job))
        client.fine_tuning.jobs.cancel(job.id)
        until(lambda: not folder.exists(), 5)

        assert alive(folder) == []
        assert client.fine_tuning.jobs.retrieve(job.id).status == "cancelled"


def test_an_endpoint_that_closes_ends_its_trainer(
    launcher: Callable[[str], str], tmp_path: Path, sdk: openai.OpenAI
) -> None:
    engine = LocalEngine("org/model", tmp_path / "state", launcher=launcher("waits"))
    with Rehearsal(engine=engine) as endpoint:
        client = connected(sdk, endpoint)
        job = wait_until(endpoint, client, start_job(client, model="org/model"), "running")
        folder = tmp_path / "state" / "trainers" / job.id
        until(lambda: metrics_of(client, job))

    assert alive(folder) == []


def begin(engine: LocalEngine, told: list[Any], wanted: int, **changes: Any) -> Any:
    """Carry a job out until so many things have been told of it."""
    pieces = engine.train(order(**changes))
    for item in pieces:
        if item is not None:
            told.append(item)
        if len(told) == wanted:
            break
    return pieces


def test_a_job_goes_on_where_a_killed_trainer_was_and_tells_nothing_twice(
    launcher: Callable[[str], str], tmp_path: Path
) -> None:
    first = LocalEngine("org/model", tmp_path, launcher=launcher("waits"))
    told: list[Any] = []
    begin(first, told, 5).close()
    with (tmp_path / "trainers" / JOB / "progress.jsonl").open("a") as file:
        file.write('{"kind": "st\n')  # as a kill leaves it
    second = LocalEngine("org/model", tmp_path, launcher=launcher("whole"), full=True)
    rest = [item for item in second.train(order(seen=len(told))) if item]
    afresh = [item for item in second.train(order(seen=0)) if item]

    steps = [item.metrics["step"] for item in (*told, *rest) if hasattr(item, "total_steps")]
    spec = json.loads((tmp_path / "trainers" / JOB / "spec.json").read_text("utf-8"))
    assert spec["full"] is False  # as the job was begun
    assert steps == [1, 2, 3, 4]
    assert told + rest == afresh
    assert len(set(map(str, afresh))) == len(afresh)


def test_a_trainer_that_outlived_its_endpoint_is_followed_and_not_doubled(
    launcher: Callable[[str], str], tmp_path: Path, sdk: openai.OpenAI
) -> None:
    program = f"""
import sys
from pathlib import Path
from openai_sft_local import LocalEngine
from openai_sft_rehearsal import Rehearsal
state = Path({str(tmp_path / "state")!r})
engine = LocalEngine("org/model", state, launcher={launcher("waits")!r})
endpoint = Rehearsal(engine=engine, folder=state)
print(endpoint.start().url, flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", program]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=PROJECT, **pipes) as endpoint:
        client = sdk.with_options(base_url=endpoint.stdout.readline().strip(), max_retries=0)
        job = start_job(client, model="org/model")
        until(lambda: len(metrics_of(client, job)) == 2)
        endpoint.kill()
    folder = tmp_path / "state" / "trainers" / job.id
    before = [int(name) for name in alive(folder)]
    session = [os.getsid(process) for process in before]
    engine = LocalEngine("org/model", tmp_path / "state", launcher=launcher("crashes"))
    with Rehearsal(engine=engine, folder=tmp_path / "state") as second:
        client = connected(sdk, second)
        until(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "running")
        (folder.parent / "go").touch()
        finished = finish(second, client, job)

        assert len(before) == 1
        assert session == before  # out of reach of a Ctrl-C
        assert finished.status == "succeeded"
        assert [metrics["step"] for metrics in metrics_of(client, job)] == [1, 2, 3, 4]
        assert (folder / "trainer.log").read_text().count("the trainer speaks") == 1


@pytest.mark.parametrize(
    ("words", "ranks"),
    [
        ("torchrun --nproc_per_node 8", 8),
        ("torchrun --nnodes=2 --nproc-per-node=4", 8),
        ("accelerate launch --num_processes 3 --num_machines 1", 3),
        ("torchrun --nproc_per_node gpu", None),
        ("accelerate launch --config_file {config}", 16),
        ("accelerate launch --config_file missing.yaml", None),
        ("", None),
    ],
)
def test_the_ranks_that_a_launcher_is_asked_for_are_told_to_the_trainer(
    launcher: Callable[[str], str], words: str, ranks: int | None, tmp_path: Path
) -> None:
    config = tmp_path / "fsdp.yaml"
    config.write_text("distributed_type: FSDP\nnum_machines: 2\nnum_processes: 16\n")
    command = f"{launcher('waits')} {words.format(config=config)}"
    engine = LocalEngine("org/model", tmp_path, launcher=command)
    pieces = engine.train(order())
    next(pieces)
    pieces.close()

    spec = json.loads((tmp_path / "trainers" / JOB / "spec.json").read_text("utf-8"))
    assert spec["ranks"] == ranks
    engine.close()


# --- A server's answers ---------------------------------------------------------------------------


class Vllm:
    """What vLLM says to loading an adapter and to a chat, and what it was asked."""

    def __init__(self) -> None:
        self.adapters: dict[str, str] = {}
        self.asked: list[tuple[str, Any]] = []
        vllm = self

        class Handler(LoopbackHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                vllm.asked.append((self.path, body))
                status, answer = vllm.answer(self.path, body)
                kind = "text/plain" if isinstance(answer, str) else "application/json"
                content = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        self.server = LoopbackServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.002,), daemon=True).start()

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        if path == "/v1/load_lora_adapter":
            name = body["lora_name"]
            if name in self.adapters:
                said = f"The lora adapter '{name}' has already been loaded."
                return 400, {"error": {"message": said, "type": "InvalidUserInput", "code": 400}}
            self.adapters[name] = body["lora_path"]
            return 200, f"Success: LoRA adapter '{name}' added successfully."
        if body["model"] not in ("org/model", *self.adapters):
            message = f"The model `{body['model']}` does not exist."
            return 404, {"error": {"message": message, "type": "NotFoundError", "code": 404}}
        if body.get("max_tokens") == 9999:
            return 400, {"error": {"message": "too long", "param": "max_tokens", "code": 400}}
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": f"{body['model']} says"},
            "finish_reason": "length",
        }
        return 200, {"choices": [choice], "usage": {"prompt_tokens": 5, "completion_tokens": 3}}

    def paths(self) -> list[str]:
        return [path.removeprefix("/v1/") for path, _ in self.asked]


@pytest.fixture
def vllm() -> Iterator[Vllm]:
    server = Vllm()
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture
def served(vllm: Vllm, left: Path) -> Iterator[LocalEngine]:
    engine = LocalEngine("org/model", left, serve_url=vllm.url)
    yield engine
    engine.close()


def test_a_server_answers_with_an_adapter_that_it_is_lent_once(
    served: LocalEngine, vllm: Vllm, left: Path
) -> None:
    tuned = Model("org/model", JOB, 3)
    form = schema(a={"type": "integer"})
    base = served.answer(Model("org/model"), QUESTION)
    replies = at_once(4, lambda _: served.answer(tuned, {**QUESTION, "response_format": form}))

    name = f"{JOB}-checkpoint-3"
    assert base == Reply("org/model says", 5, 3, "length")
    assert replies == [Reply(f"{name} says", 5, 3, "length")] * 4
    assert vllm.adapters == {name: str(left / "trainers" / JOB / "checkpoint-3")}
    assert vllm.paths().count("load_lora_adapter") == 1
    asked = vllm.asked[-1][1]
    assert (asked["response_format"], asked["messages"]) == (form, QUESTION["messages"])
    assert asked["chat_template_kwargs"] == {"enable_thinking": False}


def test_a_server_that_was_started_anew_is_lent_the_adapter_again(
    served: LocalEngine, vllm: Vllm
) -> None:
    tuned = Model("org/model", JOB, 3)
    served.answer(tuned, QUESTION)
    vllm.adapters.clear()

    assert served.answer(tuned, QUESTION).text == f"{JOB}-checkpoint-3 says"


def test_an_adapter_that_the_server_has_already_will_do(served: LocalEngine, vllm: Vllm) -> None:
    vllm.adapters[f"{JOB}-checkpoint-3"] = "of an earlier endpoint"

    assert served.answer(Model("org/model", JOB, 3), QUESTION).text == f"{JOB}-checkpoint-3 says"


def test_a_servers_refusal_is_told(served: LocalEngine) -> None:
    with pytest.raises(ApiError, match="too long") as refused:
        served.answer(Model("org/model"), {**QUESTION, "max_tokens": 9999})

    assert refused.value.answer.status == 400
    assert json.loads(refused.value.answer.body)["error"]["param"] == "max_tokens"


def test_a_server_that_is_not_there_is_told_with_what_to_do(tmp_path: Path) -> None:
    engine = LocalEngine("org/model", tmp_path, serve_url="http://127.0.0.1:9/v1")

    with pytest.raises(ApiError, match="vllm serve") as absent:
        engine.answer(Model("org/model"), QUESTION)

    assert absent.value.answer.status == 503
    engine.close()


def test_a_model_that_was_trained_whole_is_no_adapter_to_lend(served: LocalEngine) -> None:
    with pytest.raises(ApiError) as refused:
        served.answer(Model("org/model", JOB, 20), QUESTION)

    assert "--serve-url" in str(refused.value)
