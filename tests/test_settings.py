"""Where settings come from, which are refused, and what each instance may do."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from endpoint import Rehearsal
from helpers import PROJECT, posts

from openai_sft import ConfigurationError, OpenAISFT, OpenAISFTError

pytestmark = pytest.mark.usefixtures("clean_environment")

VARIABLES = {
    "OPENAI_BASE_URL": ("base_url", "http://127.0.0.1:1/v1"),
    "OPENAI_SFT_MODEL": ("model", "gpt-4.1-2025-04-14"),
    "OPENAI_SFT_DATASET": ("dataset", "some/data"),
}


def test_without_a_key_anywhere_the_error_says_how_to_set_it() -> None:
    with pytest.raises(ValueError, match=r"^OpenAI API keyが設定されていません") as caught:
        OpenAISFT()

    assert isinstance(caught.value, ConfigurationError)
    assert isinstance(caught.value, OpenAISFTError)
    assert "OPENAI_API_KEY" in str(caught.value)
    assert ".env" in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"client": openai.OpenAI(api_key="k")},
        {"offline": True},
        {"rehearse": True},
        {"local": "gpt-4o-mini-2024-07-18"},
    ],
    ids=["client", "offline", "rehearse", "local"],
)
def test_a_ready_client_offline_work_and_this_machine_need_no_key(options: dict[str, Any]) -> None:
    sft = OpenAISFT(**options)
    sft.close()

    assert sft.model == "gpt-4o-mini-2024-07-18"


def test_a_model_of_this_machine_is_the_model_wherever_the_environment_leads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable, (_, value) in VARIABLES.items():
        monkeypatch.setenv(variable, value)
    sft = OpenAISFT(local="org/open-model")

    assert (sft.model, sft.base_url, sft.dataset) == ("org/open-model", None, "some/data")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"local": "m", "model": "gpt-4o"}, "model"),
        ({"local": "m", "base_url": "http://127.0.0.1/v1"}, "base_url"),
        ({"local": "m", "rehearse": True}, "rehearse"),
        ({"local": " "}, "local が空です"),
        ({"local_full": True}, "local_full"),
        ({"local_launcher": "torchrun"}, "local_launcher"),
        ({"local_serve_url": "http://127.0.0.1/v1"}, "local_serve_url"),
        ({"local": "m", "local_launcher": ""}, "local_launcher が空です"),
        ({"export_for": "gemma"}, "export_for"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_by_name(
    options: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigurationError, match=named):
        OpenAISFT("k", **options)


def test_the_defaults_are_those_that_were_agreed() -> None:
    sft = OpenAISFT("k")

    assert sft.model == "gpt-4o-mini-2024-07-18"
    assert sft.dataset == "UEC-InabaLab/KokoroChat"
    assert sft.output_dir == Path("openai_sft_outputs")
    assert sft.poll_interval == 10.0
    assert str(sft.client.base_url) == "https://api.openai.com/v1/"


@pytest.mark.parametrize("variable", VARIABLES)
def test_an_argument_beats_the_environment_which_beats_dotenv_which_beats_the_default(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    attribute, value = VARIABLES[variable]

    def seen(**options: Any) -> Any:
        return getattr(OpenAISFT("k", **options), attribute)

    default = seen()
    Path(".env").write_text(f"{variable}={value}/dotenv\n", "utf-8")
    from_dotenv = seen()
    monkeypatch.setenv(variable, f"{value}/environment")
    from_environment = seen()
    from_argument = seen(**{attribute: f"{value}/argument"})

    assert default != from_dotenv
    assert from_dotenv == f"{value}/dotenv"
    assert from_environment == f"{value}/environment"
    assert from_argument == f"{value}/argument"


def test_the_key_follows_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("OPENAI_API_KEY=from-dotenv\n", "utf-8")
    from_dotenv = OpenAISFT().client.api_key
    monkeypatch.setenv("OPENAI_API_KEY", "from-environment")
    from_environment = OpenAISFT().client.api_key

    assert from_dotenv == "from-dotenv"
    assert from_environment == "from-environment"
    assert OpenAISFT("from-argument").client.api_key == "from-argument"


def test_dotenv_is_found_in_a_folder_above_and_leaves_the_environment_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path(".env").write_text("OPENAI_API_KEY=above\nOPENAI_ORG_ID=org-a\nOPENAI_PROJECT_ID=p-b\n")
    inner = Path("one/two")
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    client = OpenAISFT().client

    assert (client.api_key, client.organization, client.project) == ("above", "org-a", "p-b")
    assert "OPENAI_API_KEY" not in os.environ


@pytest.mark.parametrize("variable", ["OPENAI_API_KEY", *VARIABLES])
def test_an_empty_variable_is_no_setting(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("OPENAI_API_KEY=from-dotenv\n", "utf-8")
    plain = OpenAISFT()
    monkeypatch.setenv(variable, "")
    sft = OpenAISFT()

    assert (sft.model, sft.dataset) == (plain.model, plain.dataset)
    assert sft.client.api_key == "from-dotenv"
    assert str(sft.client.base_url) == "https://api.openai.com/v1/"


def test_the_example_dotenv_copied_as_it_is_sets_nothing() -> None:
    shutil.copy(PROJECT / ".env.example", ".env")
    sft = OpenAISFT("k")

    assert sft.model == "gpt-4o-mini-2024-07-18"
    assert sft.dataset == "UEC-InabaLab/KokoroChat"
    assert str(sft.client.base_url) == "https://api.openai.com/v1/"
    with pytest.raises(ConfigurationError):
        OpenAISFT()


def test_the_example_dotenv_names_every_variable_that_is_read_and_no_other() -> None:
    shown = re.findall(r"^#? ?([A-Z_]+)=", (PROJECT / ".env.example").read_text("utf-8"), re.M)
    read = {
        node.value
        for name in ("openai_sft.py", "openai_sft_example.py")
        for node in ast.walk(ast.parse((PROJECT / name).read_text("utf-8")))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(r"OPENAI_[A-Z_]+", node.value)
    }

    assert len(shown) == len(set(shown))
    assert set(shown) == read


@pytest.mark.parametrize("key", ["ｓｋ-全角", "sk-a\nb", "sk-a\r", "sk-\x00", "sk-é"])
def test_a_key_that_no_header_can_carry_is_refused_without_being_shown(key: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        OpenAISFT(key)

    assert "OPENAI_API_KEY" in str(caught.value)
    assert key not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"poll_interval": -1},
        {"poll_interval": float("nan")},
        {"yen_per_dollar": 0},
        {"yen_per_dollar": float("nan")},
        {"max_cost_usd": -0.01},
        {"max_cost_usd": float("nan")},
    ],
    ids=str,
)
def test_a_number_out_of_range_is_refused_by_name(options: dict[str, float]) -> None:
    (name,) = options

    with pytest.raises(ConfigurationError, match=name):
        OpenAISFT("k", **options)  # type: ignore[arg-type]  # the name is a parameter of the test


@pytest.mark.parametrize("url", ["http://[", "http://a b/v1", "127.0.0.1:9/v1", "ftp://x/v1"])
def test_a_base_url_that_is_none_is_a_wrong_setting(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"base_url|base-url|OPENAI_BASE_URL"):
        _ = OpenAISFT("k", base_url=url).client


def test_offline_work_has_no_client() -> None:
    with pytest.raises(ConfigurationError, match="offline"):
        _ = OpenAISFT(offline=True).client


def test_the_client_handed_in_is_the_one_that_is_used(endpoint: Rehearsal, dataset: Path) -> None:
    client = openai.OpenAI(api_key="mine", base_url=endpoint.url, default_headers={"x-mine": "1"})
    sft = OpenAISFT(client=client, base_url="http://127.0.0.1:1/v1", verbose=False)
    sft.evaluate_model_comprehensive(sft.model, [], [])
    listed = sft.client.models.list()

    assert any(model.id == "gpt-4o-mini-2024-07-18" for model in listed.data)
    assert sft.client.default_headers["x-mine"] == "1"


def test_the_client_does_not_retry_on_its_own(endpoint: Rehearsal) -> None:
    client = openai.OpenAI(api_key="mine", base_url=endpoint.url, max_retries=7)

    assert OpenAISFT(client=client).client.max_retries == 0
    assert OpenAISFT("k").client.max_retries == 0
    assert client.max_retries == 7


def test_making_an_instance_sends_nothing_and_writes_nothing(
    make_sft: Callable[..., OpenAISFT], endpoint: Rehearsal, clean_environment: Path
) -> None:
    before = set(clean_environment.iterdir())
    make_sft()
    OpenAISFT(rehearse=True).close()

    assert set(clean_environment.iterdir()) == before
    assert endpoint.exchanges == []


def test_a_rehearsal_ignores_every_key_url_and_proxy_of_the_environment(
    endpoint: Rehearsal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-real")
    monkeypatch.setenv("OPENAI_BASE_URL", endpoint.url)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with OpenAISFT(rehearse=True, base_url=endpoint.url, verbose=False) as sft:
        url = str(sft.client.base_url)
        models = sft.client.models.list()

    assert url.startswith("http://127.0.0.1:")
    assert not url.startswith(endpoint.url)
    assert sft.client.api_key != "sk-real"
    assert models.data
    assert posts(endpoint) == endpoint.exchanges == []
    sft.close()


def test_neither_the_representation_nor_an_error_shows_the_key() -> None:
    assert "sk-secret" not in repr(OpenAISFT("sk-secret"))
    with pytest.raises(ConfigurationError) as caught:
        OpenAISFT("sk-secret", poll_interval=-1)
    assert "sk-secret" not in str(caught.value)


LOGGED = """
import logging, sys
{setup}
from openai_sft import OpenAISFT
for _ in range(2):
    OpenAISFT(offline=True, verbose={verbose})
logging.getLogger("openai_sft").info("進捗😀")
"""


@pytest.mark.parametrize(
    ("setup", "verbose", "lines"),
    [
        ("", True, 1),
        ("", False, 0),
        ("logging.basicConfig(level=logging.INFO, stream=sys.stdout)", True, 0),
        ("logging.getLogger('openai_sft').addHandler(logging.NullHandler())", True, 0),
    ],
    ids=["nothing set up", "not verbose", "the application logs itself", "silenced"],
)
def test_progress_is_seen_on_stderr_once_unless_the_application_set_up_logging(
    setup: str, verbose: bool, lines: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LOGGED.format(setup=setup, verbose=verbose)],
        env={**os.environ, "PYTHONPATH": str(PROJECT), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
    )

    assert done.returncode == 0
    assert done.stderr.count("進捗😀") == lines
