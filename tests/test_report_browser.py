"""The page of a run in a real browser: what it shows, and how it is read.

Needs the extra ``browser`` and a Chromium (Debian's package will do); skipped without them.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from helpers import records, write_jsonl
from pages import SPLITS, Rehearsed, enlarged, poisoned, rehearse

from openai_sft import FIGURE_LABELS, VERDICT_LABELS

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Of Chromium as root and without a network of its own.
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--disable-sync")


def require_browser() -> str:
    """The path of a browser. Without one, or without Playwright, the module is skipped; where it
    has to be run it fails."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    missing = [] if found else [f"no {' or '.join(BROWSERS[:2])}"]
    if importlib.util.find_spec("playwright") is None:
        missing.append("no playwright (pip install 'openai-sft[browser]')")
    if not missing:
        return str(found)
    if os.environ.get("OPENAI_SFT_NEEDS_BROWSER"):
        pytest.fail(", ".join(missing), pytrace=False)
    pytest.skip(", ".join(missing), allow_module_level=True)


BROWSER = require_browser()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = importlib.import_module("playwright.sync_api")
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=BROWSER, args=[*FLAGS])
        yield running
        running.close()


Open = Callable[..., AbstractContextManager[Any]]


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Open:
    """Opens a page's HTML; it may say nothing on the console and ask for nothing but itself."""

    @contextmanager
    def open_page(text: str, case: str = "", **options: Any) -> Iterator[Any]:
        path = tmp_path / "report.html"
        path.write_text(text, "utf-8")
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        page = context.new_page()
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url))
        url = path.as_uri() + (f"#case={quote(case, safe='')}" if case else "")
        page.goto(url)
        yield page
        context.close()

        assert said == [path.as_uri()]

    return open_page


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Rehearsed:
    """The README's rehearsal, with a baseline and every case."""
    return rehearse(tmp_path_factory.mktemp("rehearsed"))


@pytest.fixture(scope="module")
def rehearsed_300(tmp_path_factory: pytest.TempPathFactory) -> Rehearsed:
    folder = tmp_path_factory.mktemp("rehearsed-300")
    rows = records(300)
    for number, row in enumerate(rows):
        topic = ("職場問題", "家族関係", "健康")[number % 3]
        row |= {"topic": {"main_jp": topic}, "review_by_client_jp": {"点数": 40 + number % 60}}
    data = write_jsonl(folder / "300.jsonl", rows)
    return rehearse(folder, dataset=str(data), epochs=3)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Rehearsed:
    return rehearse(tmp_path_factory.mktemp("scored"), task="score")


@pytest.fixture(params=["rehearsed", "rehearsed_300"])
def run(request: pytest.FixtureRequest) -> Rehearsed:
    found: Rehearsed = request.getfixturevalue(request.param)
    return found


def ids(page: Any) -> list[str]:
    """The cases in the order in which they stand."""
    found: list[str] = page.eval_on_selector_all(".case", "all => all.map(one => one.id)")
    return [name.removeprefix("case=") for name in found]


def focused(page: Any) -> str:
    return str(page.evaluate("document.activeElement.id")).removeprefix("case=")


def until(page: Any, holds: str) -> None:
    """Wait for it; Playwright's own way to is refused by the page's policy."""
    for _ in range(400):
        if page.evaluate(holds):
            return
        page.wait_for_timeout(25)
    raise AssertionError(f"it never came to that: {holds}")


def differences(results: Mapping[str, Any], name: str) -> dict[str, float]:
    """How much more each case has of a figure than the baseline."""
    return {
        r["case_id"]: r["scores"][name]
        - results["baseline"][split]["responses"][r["case_id"]]["scores"][name]
        for split in SPLITS
        for r in results[split]["responses"]
    }


def short(value: float | None, sign: str = "") -> str:
    if value is None:
        return "-"
    digits = 2 if abs(value) < 100 else 1 if abs(value) < 1000 else 0
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}"


# ── What it shows ────────────────────────────────────────────────────────────────────────────


def test_the_numbers_on_the_page_are_those_of_the_results(run: Rehearsed, opened: Open) -> None:
    with opened(run.page()) as page:
        page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        tables = page.evaluate(
            """() => [...document.querySelectorAll('#comparisons table')].map(
                table => [...table.tBodies[0].rows].map(
                    row => [...row.cells].map(cell => cell.textContent)))"""
        )

    parts = [run.results["comparison"][split.partition("_")[0]] for split in SPLITS]
    assert len(tables) == len(parts)
    for rows, part in zip(tables, parts, strict=True):
        for row, (name, figure) in zip(rows, part["figures"].items(), strict=True):
            is_main = name == part.get("main_figure")
            p = figure["p_value" if is_main else "p_adjusted"]
            spans = (
                [] if figure["low"] is None else [short(figure[n], "+") for n in ("low", "high")]
            )
            counts = [figure[n] for n in ("wins", "losses", "ties")]
            assert row[0] == ("★ " if is_main else "") + FIGURE_LABELS[name]
            assert row[1:4] == [
                short(figure["tuned"]),
                short(figure["baseline"]),
                short(figure["difference"], "+"),
            ]
            if spans:
                assert row[5] == "〜".join(spans)
            assert row[-3] == ("-" if counts[0] is None else "–".join(map(str, counts)))
            assert float(row[-2]) == pytest.approx(p, rel=0.05)
            assert row[-1] == VERDICT_LABELS[figure["verdict"]]


def test_the_verdict_stands_before_everything_else_that_was_measured(
    run: Rehearsed, opened: Open
) -> None:
    with opened(run.page()) as page:
        assert page.inner_text("#verdict") == run.results["comparison"]["test"]["sentence"]
        assert page.title() == page.inner_text("h1")
        assert page.is_visible("#verdict")
        assert page.get_attribute("html", "lang") == "ja"


def test_the_curve_circles_the_least_validation_loss(run: Rehearsed, opened: Open) -> None:
    rows = run.results["training"]["metrics"]
    least = min((r for r in rows if "full_valid_loss" in r), key=lambda r: r["full_valid_loss"])
    with opened(run.page()) as page:
        (place,) = page.evaluate(
            """() => [...document.querySelectorAll('#curve-plot .ring')].map(
                ring => [Number(ring.getAttribute('cx')), Number(ring.getAttribute('cy'))])"""
        )
        page.locator("#curve-plot").scroll_into_view_if_needed()
        box = page.locator("#curve-plot").bounding_box()
        page.mouse.move(box["x"] + place[0], box["y"] + place[1])
        reading = page.inner_text("#curve-reading")
        assert reading.startswith(f"step {least['step']:g}（エポック ")
        assert f"検証（全件） {least['full_valid_loss']:.4f}" in reading
        assert f"最小 {least['full_valid_loss']:.4f}" in page.inner_text("#curve-plot")
        page.click("#curve >> summary")
        until(page, f"document.querySelectorAll('#curve-table tbody tr').length === {len(rows)}")


def test_the_curve_is_read_by_arrow_keys_and_its_scale_can_be_changed(
    rehearsed: Rehearsed, opened: Open
) -> None:
    rows = rehearsed.results["training"]["metrics"]
    with opened(rehearsed.page()) as page:
        page.focus("#curve-plot")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        assert f"学習 {rows[1]['train_loss']:.4f}" in page.inner_text("#curve-reading")
        before = page.get_attribute("#curve-plot .full", "d")
        page.click("#curve-scale")
        assert page.get_attribute("#curve-plot .full", "d") != before


def test_text_of_others_is_shown_and_never_run(rehearsed: Rehearsed, opened: Open) -> None:
    with opened(poisoned(rehearsed).page()) as page:
        assert page.evaluate("typeof pwned") == "undefined"
        assert page.locator("img").count() == 0
        assert "</script><script>pwned = 1</script>" in page.inner_text("h1")
        page.keyboard.press("j")
        page.click(".case >> nth=0 >> summary")
        until(page, "document.querySelector('.case .said') !== null")
        assert "<img src=x onerror=" in page.inner_text(".case >> nth=0 >> .said >> nth=0")


# ── The cases ────────────────────────────────────────────────────────────────────────────────


def test_the_worst_difference_stands_first_and_the_order_can_be_turned(
    run: Rehearsed, opened: Open
) -> None:
    gaps = differences(run.results, run.results["settings"]["main_figure"])
    with opened(run.page()) as page:
        assert [gaps[name] for name in ids(page)] == sorted(gaps.values())
        page.select_option("#order", "best")
        assert [gaps[name] for name in ids(page)] == sorted(gaps.values(), reverse=True)
        page.select_option("#order", "worst")
        page.select_option("#figure", label=FIGURE_LABELS["chrf"])
        others = differences(run.results, "chrf")
        assert [others[name] for name in ids(page)] == sorted(others.values())
        page.keyboard.press("j")
        assert page.inner_text(".case >> nth=0 >> .delta") == short(min(others.values()), "+")


def test_an_error_that_grew_is_the_worst(scored: Rehearsed, opened: Open) -> None:
    gaps = differences(scored.results, "overall.mse")
    with opened(scored.page()) as page:
        assert [gaps[name] for name in ids(page)] == sorted(gaps.values(), reverse=True)
        page.keyboard.press("j")
        for case, gap in zip(
            page.locator(".case").all(), sorted(gaps.values(), reverse=True), strict=True
        ):
            assert case.locator(".delta.better").count() == (gap < 0)


def test_a_case_shows_what_was_asked_and_the_three_answers(run: Rehearsed, opened: Open) -> None:
    response = run.results["valid_evaluation"]["responses"][1]
    rival = run.results["baseline"]["valid_evaluation"]["responses"][response["case_id"]]
    with opened(run.page(), case=response["case_id"]) as page:
        assert focused(page) == response["case_id"]
        case = page.locator(".case:focus")
        assert case.locator(".answer h4").all_inner_texts() == ["実際", "学習後", "基準"]
        texts = [response["reference"], response["output"], rival["output"]]
        for answer, text in zip(case.locator(".answer").all(), texts, strict=True):
            assert text.strip() in answer.text_content()
        assert response["topic"] in case.inner_text()
        assert f"評価点 {response['dialogue_score']}" in case.inner_text()
        assert case.locator(".said").count() == 0
        page.keyboard.press("o")
        wanted = len(response["input"])
        until(page, f"document.querySelectorAll('.case:focus .said').length === {wanted}")
        said = case.locator(".said").all()
        for shown, message in zip(said, response["input"], strict=True):
            assert message["content"] in shown.text_content()


def test_cases_are_found_by_split_topic_score_and_text(run: Rehearsed, opened: Open) -> None:
    everything = [r for split in SPLITS for r in run.results[split]["responses"]]
    one = everything[-1]
    with opened(run.page()) as page:

        def must_be(fits: Callable[[Any], bool]) -> None:
            wanted = sorted(r["case_id"] for r in everything if fits(r))
            own = "[...document.querySelectorAll('.case')].map((one) => one.id.slice(5)).sort()"
            until(page, f"JSON.stringify({own}) === JSON.stringify({json.dumps(wanted)})")

        page.select_option("#split", "valid")
        tested = {r["case_id"] for r in run.results["test_evaluation"]["responses"]}
        must_be(lambda r: r["case_id"] not in tested)
        page.select_option("#split", "")
        page.select_option("#topic", one["topic"])
        must_be(lambda r: r["topic"] == one["topic"])
        page.select_option("#topic", "")
        score = one["dialogue_score"]
        page.fill("#least", str(score))
        must_be(lambda r: r["dialogue_score"] >= score)
        page.fill("#most", str(score))
        must_be(lambda r: r["dialogue_score"] == score)
        page.fill("#least", "")
        page.fill("#most", "")
        word = one["input"][0]["content"][:12]
        page.fill("#words", word)
        must_be(
            lambda r: any(
                word in text
                for text in (r["output"], r["reference"], *(m["content"] for m in r["input"]))
            )
        )
        assert page.inner_text("#count") == f"{len(ids(page))} / {len(everything)}件"
        page.fill("#words", "")
        page.select_option("#outcome", "worse")
        gaps = differences(run.results, run.results["settings"]["main_figure"])
        must_be(lambda r: gaps[r["case_id"]] < 0)


def test_j_and_k_walk_through_the_cases_and_the_address_follows(
    run: Rehearsed, opened: Open
) -> None:
    with opened(run.page()) as page:
        order = ids(page)
        for key, place in (("j", 0), ("j", 1), ("j", 2), ("k", 1)):
            page.keyboard.press(key)
            assert focused(page) == order[place]
            assert page.url.endswith(f"#case={quote(order[place], safe='')}")
            until(page, "Math.abs(document.activeElement.getBoundingClientRect().top) < 200")
        page.keyboard.press("/")
        page.keyboard.type("jk")
        assert page.input_value("#words") == "jk"
        assert focused(page) == "words"


def test_a_link_to_a_case_finds_it_though_it_is_filtered_out(run: Rehearsed, opened: Open) -> None:
    tested = run.results["test_evaluation"]["responses"][0]["case_id"]
    with opened(run.page()) as page:
        page.select_option("#split", "valid")
        page.evaluate(f"location.hash = {json.dumps('case=' + quote(tested, safe=''))}")
        until(page, f"document.activeElement.id === {json.dumps('case=' + tested)}")
        assert page.input_value("#split") == ""


def test_a_case_without_a_value_stands_at_the_end(rehearsed: Rehearsed, opened: Open) -> None:
    results = deepcopy(rehearsed.results)
    failed = results["test_evaluation"]["responses"][0]
    del failed["scores"], failed["output"]
    failed["error"] = "接続できませんでした"
    with opened(Rehearsed(rehearsed.record, results).page()) as page:
        assert ids(page)[-1] == failed["case_id"]
        page.select_option("#outcome", "fault")
        assert ids(page) == [failed["case_id"]]
        page.evaluate("document.activeElement.blur()")
        page.keyboard.press("j")
        assert page.inner_text(".case .fault") == "接続できませんでした"


def test_a_page_of_1318_cases_makes_only_the_rows_that_come_into_view(
    rehearsed: Rehearsed, opened: Open
) -> None:
    filled = "[...document.querySelectorAll('.case')].filter(one => one.firstChild).length"
    with opened(enlarged(rehearsed, 1_318).page()) as page:
        assert len(ids(page)) == 1_318
        assert page.evaluate(filled) < 60
        page.evaluate("document.querySelectorAll('.case')[700].scrollIntoView()")
        until(
            page,
            """() => [...document.querySelectorAll('.case')].some(one => {
                const place = one.getBoundingClientRect();
                return place.top > 0 && place.bottom < innerHeight && one.firstChild; })""",
        )
        assert page.evaluate(filled) < 120
        page.fill("#words", "1317:")
        until(page, "document.querySelectorAll('.case').length === 1")
        until(page, "document.querySelector('.case').firstChild !== null")


def test_scrolling_through_1318_cases_leaves_time_in_every_frame(
    rehearsed: Rehearsed, opened: Open
) -> None:
    frames, a_frame = 200, 1 / 60
    with opened(enlarged(rehearsed, 1_318).page()) as page:
        tools = page.context.new_cdp_session(page)
        # The time that the page's thread has worked, whatever else the machine does.
        tools.send("Performance.enable", {"timeDomain": "threadTicks"})

        def worked() -> float:
            metrics = tools.send("Performance.getMetrics")["metrics"]
            return float(next(m["value"] for m in metrics if m["name"] == "TaskDuration"))

        before = worked()
        page.evaluate(
            """async (frames) => {
                for (let n = 0; n < frames; n++) {
                    await new Promise(requestAnimationFrame);
                    scrollBy(0, 200);
                }
            }""",
            frames,
        )

        assert (worked() - before) / frames < a_frame


# ── Every reader ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("which", ["rehearsed", "rehearsed_300", "scored"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_in_either_scheme(
    which: str, scheme: str, opened: Open, request: pytest.FixtureRequest
) -> None:
    run: Rehearsed = request.getfixturevalue(which)
    size = {"width": 360, "height": 740}
    with opened(run.page(), viewport=size, color_scheme=scheme) as page:
        page.keyboard.press("j")
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        lightness = [int(part) for part in ground.strip("rgb()").split(",")]
        assert all(part > 200 if scheme == "light" else part < 60 for part in lightness)


def test_every_text_can_be_told_from_its_ground(rehearsed: Rehearsed, opened: Open) -> None:
    contrasts = """() => {
        const parts = (color) => color.match(/[\\d.]+/g).map(Number);
        const light = (color) => parts(color).slice(0, 3).map((value) => value / 255)
            .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            .reduce((sum, v, n) => sum + v * [0.2126, 0.7152, 0.0722][n], 0);
        const ground = (node) => { const own = getComputedStyle(node).backgroundColor;
            return parts(own)[3] === 0 ? ground(node.parentElement) : own; };
        return [...document.querySelectorAll('main *')].filter((node) => node.checkVisibility()
            && [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()))
            .map((node) => [node.textContent, getComputedStyle(node).color, ground(node)])
            .map(([text, ink, paper]) => [text, light(ink), light(paper)])
            .map(([text, a, b]) => [text, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)]);
    }"""
    for scheme in ("light", "dark"):
        with opened(rehearsed.page(), color_scheme=scheme) as page:
            page.keyboard.press("j")
            found = page.evaluate(contrasts)
            assert [(text, ratio) for text, ratio in found if ratio < 4.5] == []


def test_the_page_can_be_printed_with_its_cases(rehearsed: Rehearsed, opened: Open) -> None:
    with opened(enlarged(rehearsed, 150).page()) as page:
        page.emulate_media(media="print", color_scheme="dark")
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        shown = "[...document.querySelectorAll('.case')].filter(one => one.checkVisibility())"
        assert page.evaluate(f"{shown}.length") == 100
        assert page.evaluate(f"{shown}.every(one => one.firstChild)")
        assert "先頭の100件" in page.inner_text("#printed")
        assert not page.is_visible(".tools")
        assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert page.evaluate(f"{shown}.length") == 150


# ── Other pages ──────────────────────────────────────────────────────────────────────────────


def test_the_score_task_shows_items_and_predicted_against_real(
    scored: Rehearsed, opened: Open
) -> None:
    metrics = scored.results["test_evaluation"]["metrics"]
    response = scored.results["test_evaluation"]["responses"][0]
    with opened(scored.page(), case=response["case_id"]) as page:
        assert page.locator("#totals-plot .tuned-dot").count() == 4
        assert page.locator("#totals-plot .base-dot").count() == 4
        rows = page.locator("#figures table >> nth=1 >> tbody tr").all()
        assert len(rows) == 20
        for row in rows:
            cells = row.locator("td").all_inner_texts()
            assert cells[1] == short(metrics[cells[0]]["mse"]["score"])
        page.locator(".case:focus details >> nth=1").locator("summary").click()
        items = page.locator(".case:focus table tbody tr").all()
        real, said = json.loads(response["reference"]), json.loads(response["output"])
        for item in items:
            name, *values = item.locator("td").all_inner_texts()
            assert values[:2] == [str(real[name]), str(said[name])]


def test_a_page_without_texts_still_compares_the_cases(rehearsed: Rehearsed, opened: Open) -> None:
    gaps = differences(rehearsed.results, "rouge_l")
    with opened(rehearsed.page(texts=False)) as page:
        assert [gaps[name] for name in ids(page)] == sorted(gaps.values())
        page.keyboard.press("j")
        assert page.locator(".case >> nth=0 >> details").count() == 0
        assert short(min(gaps.values()), "+") in page.inner_text(".case >> nth=0")
        assert page.locator(".case h4", has_text="実際").count() == 0


@pytest.mark.parametrize("facts", [{}, {"job_status": "failed", "job_error": {"message": "x"}}])
def test_a_run_without_an_evaluation_shows_its_curve(
    rehearsed: Rehearsed, opened: Open, facts: dict[str, Any]
) -> None:
    record = {**rehearsed.record, **facts}
    with opened(Rehearsed(record, {}).page()) as page:
        assert page.is_visible("#curve-plot .full")
        assert not page.is_visible("#cases")
        assert not page.is_visible("#comparisons")


def test_a_judges_verdicts_stand_beside_their_cases(
    tmp_path_factory: pytest.TempPathFactory, opened: Open
) -> None:
    judged = rehearse(tmp_path_factory.mktemp("judged"), judge="gpt-4o-mini-2024-07-18")
    judge = judged.results["judge"]
    one = judge["judgements"][0]
    winners = {"tuned": "勝ち", "rival": "負け", "tie": "引き分け", None: "判定なし"}
    with opened(judged.page(), case=one["case_id"]) as page:
        assert f"審査: {winners[one['winner']]}" in page.inner_text(".case:focus")
        counts = "–".join(str(judge[name]) for name in ("wins", "losses", "ties"))
        assert counts in page.inner_text("#judge")
        worth = {
            one["case_id"]: ("rival", "tie", "tuned").index(one["winner"])
            for one in judge["judgements"]
        }
        ranks = [worth[name] for name in ids(page) if name in worth]
        assert ranks == sorted(ranks)
