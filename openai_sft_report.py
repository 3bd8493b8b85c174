"""One HTML page of a run: what was tuned, whether it got better, the loss curve, every case.

The page is one file that asks nothing of a network. :data:`TEMPLATE`, at the end, is the whole of
it: a designer may change its HTML, CSS and script freely. Python fills in three things: the title,
the Content-Security-Policy with the hashes of that style and that script, and one JSON block
(:class:`Page`), of which the script makes text and shapes, never markup.

In reading order: the block and its parts, what each part is made of, the page, the template.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, TypedDict

from openai_sft import (
    DEFAULT_DATASET,
    DEFAULT_MODEL,
    ERRORS,
    FIGURE_LABELS,
    JUDGE_FIGURE,
    KOKOROCHAT_LICENCE,
    NEUTRAL_FIGURES,
    OPENAI_BASE_URL,
    SCORE_ITEMS,
    SPLIT_LABELS,
    VERDICT_LABELS,
    EvaluationResults,
    parse_scores,
)

__all__ = ["TEMPLATE", "render"]

Json = Mapping[str, Any]  # what a run's files hold

# ── The block ────────────────────────────────────────────────────────────────────────────────

Tone = Literal["better", "worse", "open", "none", "failed"]
Pairs = list[tuple[str, str]]


class Verdict(TypedDict):
    """The sentence that a reader takes home, and what it is about."""

    tone: Tone
    lines: list[str]


class Tile(TypedDict):
    """One number, with what it is and what it rests on."""

    label: str
    value: str
    detail: str


class Mark(TypedDict):
    """A checkpoint on the curve."""

    step: float
    model: str
    loss: float | None
    evaluated: bool


LossRow = tuple[float, float | None, float | None, float | None]


class Curve(TypedDict):
    """By step the losses: training, validation on a batch, on all of the validation data."""

    rows: list[LossRow]
    checkpoints: list[Mark]
    epochs: float | None


class Naming(TypedDict):
    """What a figure is called, and the sign of a good difference (0: neither is)."""

    label: str
    better: int


class FigureRow(TypedDict):
    """A figure of a split: of the evaluated model and of its baseline."""

    name: str
    tuned: Json | None
    baseline: Json | None
    constant: float | None


class FigureTable(TypedDict):
    """The figures of a split."""

    split: str
    answered: str
    rows: list[FigureRow]


class Comparison(TypedDict):
    """The evaluated model beside a rival on a split, figure by figure."""

    split: str
    rival: str
    pairs: int
    failed: int
    left_out: int
    dialogues: int
    main: str | None
    figures: list[Json]


class Said(TypedDict, total=False):
    """What a model made of a case: a text or, in the score task, items."""

    text: str
    items: list[int]
    total: int
    fault: str
    cut: bool
    tokens: int | None
    seconds: float | None
    scores: list[float | None]


class CaseRow(TypedDict, total=False):
    """One case; ``context`` are places in the page's messages."""

    id: str
    split: str
    dialogue: str
    topic: str
    score: float
    context: list[int]
    reference: str
    items: list[int]
    total: int
    tuned: Said
    baseline: Said
    judge: str
    reasons: list[str]


class Cases(TypedDict):
    """All cases; a message that several contexts share stands once."""

    figures: list[str]
    main: str | None
    items: list[str]
    messages: list[tuple[str, str]]
    rows: list[CaseRow]


class Section(TypedDict):
    """Names and values under a heading."""

    title: str
    rows: Pairs


class Page(TypedDict):
    """All that the page shows."""

    title: str
    facts: Pairs
    verdict: Verdict
    notes: list[str]
    tiles: list[Tile]
    curve: Curve | None
    names: dict[str, Naming]
    verdicts: dict[str, str]
    figures: list[FigureTable]
    comparisons: list[Comparison]
    judge: Section | None
    texts: bool
    cases: Cases
    settings: list[Section]
    files: Pairs
    command: str


# ── What was run ─────────────────────────────────────────────────────────────────────────────


def _facts(record: Json, results: Json) -> Pairs:
    """What was tuned on what, when, for how much, where."""
    settings, data = record.get("settings", {}), record.get("data", {})
    training = _training(record, results)
    tuned = results.get("model_id") or record.get("fine_tuned_model")
    counts = [
        f"{label} {data[name]['examples']:,}件"
        for name, label in (("train", "学習"), ("test", "テスト"), ("valid", "検証"))
        if name in data
    ]
    told = _told_hyperparameters(record, training)
    baseline = results.get("baseline", {}).get("model_id")
    facts = (
        ("元のモデル", settings.get("local") or settings.get("model")),
        ("評価したモデル" if results else "学習後のモデル", tuned),
        ("比べる相手", baseline),
        ("データ", _dataset_of(record)),
        ("件数", "、".join(counts)),
        ("学習の設定", "、".join(f"{name} {value}" for name, value in told)),
        ("期間", _period(record)),
        ("接続先", _endpoint_of(record)),
        ("料金", _cost_line(record)),
        ("実行", record.get("run_id")),
        ("ジョブ", training.get("job_id")),
    )
    return [(label, str(value)) for label, value in facts if value]


def _dataset_of(record: Json) -> str:
    settings = record.get("settings", {})
    parts = [settings.get("dataset"), settings.get("config"), settings.get("revision")]
    named = " ".join(str(part) for part in parts if part)
    return named or ("リハーサルの対話" if record.get("rehearsal") else "")


def _endpoint_of(record: Json) -> str:
    settings = record.get("settings", {})
    if record.get("rehearsal"):
        return "リハーサル（このマシンの中）"
    if settings.get("local"):
        return "このマシン"
    return str(settings.get("base_url") or "")


def _told_hyperparameters(record: Json, training: Json) -> Pairs:
    """The hyperparameters as the service settled them, else as they were asked for."""
    asked = (record.get("plan") or {}).get("training") or {}
    settled = training.get("hyperparameters") or {}
    names = {
        "エポック": ("n_epochs", "epochs"),
        "バッチサイズ": ("batch_size", "batch_size"),
        "学習率の倍率": ("learning_rate_multiplier", "learning_rate_multiplier"),
        "seed": ("seed", "seed"),
    }
    found = ((label, settled.get(a, asked.get(b))) for label, (a, b) in names.items())
    return [(label, str(value)) for label, value in found if value is not None]


def _training(record: Json, results: Json) -> Json:
    """What is known of the training of the evaluated model, else of this run's."""
    if "training" in results:
        return {**results["training"], "status": "succeeded"}
    names = {"created_at": "job_created_at", "started_at": "job_started_at"}
    names |= {"finished_at": "job_finished_at", "status": "job_status"}
    own = ("job_id", "hyperparameters", "trained_tokens", "shutdown_date", "checkpoints", "metrics")
    return {name: record.get(names.get(name, name)) for name in (*own, *names)}


def _moment(text: object) -> datetime | None:
    try:
        return datetime.fromisoformat(str(text))
    except ValueError:
        return None


def _seconds(training: Json) -> float | None:
    """How long the job took."""
    began = _moment(training.get("started_at") or training.get("created_at"))
    ended = _moment(training.get("finished_at"))
    return (ended - began).total_seconds() if began and ended else None


def _period(record: Json) -> str:
    began, ended = _moment(record.get("started_at")), _moment(record.get("finished_at"))
    if began is None:
        return ""
    shown = f"{began:%Y-%m-%d %H:%M}"
    if ended is not None:
        same_day = began.date() == ended.date()
        shown += f"〜{ended:%H:%M}" if same_day else f"〜{ended:%Y-%m-%d %H:%M}"
    return f"{shown}（{began:%Z}）"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole}秒" if whole else "1秒未満"
    if whole < 3600:
        return f"{whole // 60}分{whole % 60}秒"
    return f"{whole // 3600}時間{whole % 3600 // 60}分"


def _dollars(value: object) -> str:
    if not isinstance(value, int | float):
        return "不明"
    return f"${value:,.2f}" if value >= 1 else f"${value:,.4f}"


def _cost_line(record: Json) -> str:
    if record.get("rehearsal"):
        return "なし（リハーサル）"
    estimate, cost = record.get("estimate") or {}, record.get("cost") or {}
    if record.get("settings", {}).get("local") and not cost.get("total_usd"):
        return "なし（このマシン）"
    parts = []
    if estimate:
        parts.append(f"見積もり {_dollars(estimate.get('total_usd'))}")
    if cost:
        kinds = {"training_usd": "学習", "evaluation_usd": "評価"}
        told = "、".join(f"{kinds[k]} {_dollars(v)}" for k, v in cost.items() if k in kinds)
        parts.append(f"実際 {_dollars(cost.get('total_usd'))}" + (f"（{told}）" if told else ""))
    return " / ".join(parts)


# ── The verdict and what to know ─────────────────────────────────────────────────────────────


def _verdict(record: Json, results: EvaluationResults) -> Verdict:
    if lines := results.sentences():
        main_first = sorted(lines, key=lambda line: not line.startswith("主指標"))
        return Verdict(tone=_tone(results), lines=main_first)
    status = record.get("job_status")
    if status in ("failed", "cancelled"):
        error = record.get("job_error") or {}
        reason = ": ".join(str(error[key]) for key in ("code", "message") if error.get(key))
        told = "学習は失敗しました。" if status == "failed" else "学習は取り消されました。"
        return Verdict(tone="failed", lines=[told + (f"理由: {reason}" if reason else "")])
    if results:
        told = "比べる相手がないため、良くなったかは判定していません（--baseline で比べられます）。"
    elif status == "succeeded":
        told = "学習は終わりました。まだ評価していません（--evaluate-only で評価できます）。"
    else:
        told = "学習はまだ終わっていません。"
    return Verdict(tone="none", lines=[told])


def _tone(results: Json) -> Tone:
    """Good where the main figure is better than every rival's, bad where it is worse than one's."""
    verdicts = {part["verdict"] for part in _main_comparisons(results).values()}
    if "worse" in verdicts:
        return "worse"
    return "better" if verdicts == {"better"} else "open"


def _main_comparisons(results: Json) -> dict[str, Json]:
    """By rival the comparisons in which the main figure has its verdict."""
    compared, judge = results.get("comparison", {}), results.get("judge", {})
    judged = "基準" if judge.get("against") == "baseline" else "実際の応答"
    parts = {
        "基準": compared.get("test", {}),
        "定数予測": compared.get("constant_reference", {}).get("test", {}),
    }
    if results.get("settings", {}).get("main_figure") == JUDGE_FIGURE:
        parts = {judged: judge.get("comparison", {})}
    return {rival: part for rival, part in parts.items() if part.get("verdict")}


def _notes(record: Json, results: Json, curve: Curve | None) -> Iterator[str]:
    """What a reader has to know before believing a number."""
    if record.get("rehearsal") or results.get("rehearsal"):
        note = results.get("note", "リハーサルの小さな文字モデルです。GPTの性能とは無関係です。")
        yield f"リハーサル: {note}"
    if curve is not None and (rise := _rise(curve)):
        yield rise
    leakage = {**(record.get("leakage") or {}), **(results.get("leakage") or {})}
    labels = {"counselor": "カウンセラー", "client": "クライアント", "pair": "同じ組"}
    if shares := "、".join(f"{labels.get(k, k)} {share:.1%}" for k, share in leakage.items()):
        yield f"テスト対話の相手が学習データにも現れる割合: {shares}（--group-by で分けられます）。"
    yield from _case_notes(record, results)
    if record.get("exact_tokens") is False:
        yield "トークン数は推定です（語彙を取得できませんでした）。"
    if shutdown := _training(record, results).get("shutdown_date"):
        yield f"学習済みモデルは {shutdown} に停止します。"
    if "kokorochat" in str(record.get("settings", {}).get("dataset") or "").casefold():
        yield KOKOROCHAT_LICENCE


def _rise(curve: Curve) -> str:
    """Whether the loss on all of the validation data rose after its least."""
    full = _losses(curve)[0]
    if not full or full[-1] == (lowest := _lowest(full)):
        return ""
    (best, least), last = lowest, full[-1]
    return (
        f"検証の損失は step {best:g} の {least:.4f} が最も低く、その後上がりました"
        f"（最後は step {last[0]:g} の {last[1]:.4f}）。学習しすぎ（過学習）かもしれません。"
    )


def _case_notes(record: Json, results: Json) -> Iterator[str]:
    """Cases that failed, were cut, are invalid or were left out; figures that are missing."""
    missing: dict[str, None] = {}
    for model, part in _parts(results):
        counts = (
            ("応答なし", part["failed_cases"]),
            ("無効な応答", part["invalid_cases"]),
            ("長さの上限で切れた応答", part["cut_cases"]),
        )
        if told := "、".join(f"{label} {count:,}件" for label, count in counts if count):
            where = f"{model}（{SPLIT_LABELS[part['dataset_type']]}）"
            yield f"{where}: {told}。応答なしと無効は誤りとして数えています。"
        missing |= dict.fromkeys(part.get("missing_metrics", ()))
    if missing:
        named = "、".join(map(_label, missing))
        yield f"計算していない指標: {named}（openai-sft[eval] で計算できます）。"
    left_out = record.get("left_out") or results.get("left_out") or {}
    if any(left_out.values()):
        told = "、".join(f"{SPLIT_LABELS.get(k, k)} {n:,}件" for k, n in left_out.items() if n)
        yield f"学習に使われた対話を評価から除きました: {told}。"


def _parts(results: Json) -> Iterator[tuple[str, Json]]:
    """The evaluation of each split, of the evaluated model and of its baseline."""
    for side, name in ((results, "学習後"), (results.get("baseline", {}), "基準")):
        for split in SPLIT_LABELS:
            if f"{split}_evaluation" in side:
                yield name, side[f"{split}_evaluation"]


def _tiles(record: Json, results: Json, curve: Curve | None) -> Iterator[Tile]:
    yield from _main_tiles(results)
    if curve is not None:
        full, batch = _losses(curve)
        if losses := full or batch:
            step, least = _lowest(losses)
            kind = "全件" if full else "バッチ"
            detail = f"step {step:g}（最後は {losses[-1][1]:.4f}）"
            yield Tile(label=f"検証の損失の最小（{kind}）", value=f"{least:.4f}", detail=detail)
    for split in SPLIT_LABELS:
        part = results.get(f"{split}_evaluation")
        if part and (asked := part["evaluated_cases"] + part["failed_cases"]):
            valid = part["evaluated_cases"] - part["invalid_cases"]
            detail = f"{SPLIT_LABELS[split]}データ {part['total_test_cases']:,}件から"
            label = f"有効な応答（{SPLIT_LABELS[split]}）"
            yield Tile(label=label, value=f"{valid:,} / {asked:,}", detail=detail)
    training = _training(record, results)
    if (seconds := _seconds(training)) is not None:
        tokens = training.get("trained_tokens")
        detail = f"{tokens:,}トークン" if tokens else ""
        yield Tile(label="学習の時間", value=_duration(seconds), detail=detail)
    estimate, cost = record.get("estimate") or {}, record.get("cost") or {}
    if cost:
        detail = f"見積もり {_dollars(estimate.get('total_usd'))}" if estimate else ""
        yield Tile(label="料金", value=_dollars(cost.get("total_usd")), detail=detail)


def _main_tiles(results: Json) -> Iterator[Tile]:
    """The main figure on the test data, and its difference."""
    main = results.get("settings", {}).get("main_figure")
    measured = _measured(results.get("test_evaluation", {}).get("metrics", {}))
    if main in measured and measured[main]["score"] is not None:
        figure = measured[main]
        label = f"主指標: {_label(main)}（テスト）"
        yield Tile(label=label, value=_short(figure["score"]), detail=_interval(figure))
    for rival, part in _main_comparisons(results).items():
        figure = part["figures"][part["main_figure"]]
        detail = f"{_interval(figure, '+')}、p={figure['p_value']:.3g}"
        yield Tile(label=f"{rival}との差", value=_short(figure["difference"], "+"), detail=detail)
        if figure["wins"] is not None:
            counts = "–".join(str(figure[name]) for name in ("wins", "losses", "ties"))
            label = f"{rival}との勝ち–負け–引き分け"
            yield Tile(label=label, value=counts, detail=_sizes(part))


def _sizes(part: Json) -> str:
    """Of how many pairs and dialogues a comparison is; a judge's says neither."""
    return f"{part['pairs']:,}組、{part['dialogues']:,}対話" if "dialogues" in part else ""


def _interval(figure: Json, sign: str = "") -> str:
    if figure["low"] is None:
        return "95%区間: 対話が少なすぎます"
    return f"95%区間 {_short(figure['low'], sign)}〜{_short(figure['high'], sign)}"


def _short(value: float, sign: str = "") -> str:
    """Two decimals, fewer for large values; never -0.00. The script has the same rule."""
    digits = 2 if abs(value) < 100 else 1 if abs(value) < 1000 else 0
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}"


def _label(name: str) -> str:
    group, _, measure = name.partition(".")
    return " ".join(FIGURE_LABELS.get(part, part) for part in (group, measure) if part)


# ── The curve ────────────────────────────────────────────────────────────────────────────────


def _curve(record: Json, results: Json) -> Curve | None:
    """The losses of the run that trained; checkpoints tell theirs where the rows don't."""
    columns = ("train_loss", "valid_loss", "full_valid_loss")
    by_step: dict[float, tuple[float | None, float | None, float | None]] = {}
    training = _training(record, results)
    for row in training.get("metrics") or ():
        if isinstance(step := row.get("step"), int | float):
            train, batch, full = (_finite(row.get(name)) for name in columns)
            by_step[step] = train, batch, full
    marks = []
    for told in training.get("checkpoints") or ():
        if (step := told.get("step")) is None:
            continue
        loss = _finite(told.get("full_valid_loss"))
        train, batch, full = by_step.get(step, (None, None, None))
        by_step[step] = train, batch, loss if full is None else full
        evaluated = told["model"] == results.get("model_id")
        marks.append(Mark(step=step, model=told["model"], loss=loss, evaluated=evaluated))
    rows: list[LossRow] = [(step, *by_step[step]) for step in sorted(by_step)]
    if rows and "training" in results and not any(mark["evaluated"] for mark in marks):
        last = max(by_step)
        loss = by_step[last][2]
        marks.append(Mark(step=last, model=results["model_id"], loss=loss, evaluated=True))
    if not any(loss is not None for row in rows for loss in row[1:]):
        return None
    epochs = (training.get("hyperparameters") or {}).get("n_epochs")
    # The last step of a job that stopped before its end isn't that of its last epoch.
    whole = epochs if isinstance(epochs, int) and training["status"] == "succeeded" else None
    return Curve(rows=rows, checkpoints=sorted(marks, key=lambda m: m["step"]), epochs=whole)


def _losses(curve: Curve) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Steps and validation losses: on all of the data, on a batch."""
    full = [(step, loss) for step, _, _, loss in curve["rows"] if loss is not None]
    return full, [(step, loss) for step, _, loss, _ in curve["rows"] if loss is not None]


def _lowest(losses: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The last step with the least loss, and that loss."""
    return min(losses, key=lambda pair: (pair[1], -pair[0]))


def _finite(value: object) -> float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None


# ── The figures ──────────────────────────────────────────────────────────────────────────────


def _measured(metrics: Json) -> dict[str, Json]:
    """The figures of a split by their full names (``overall.mse``), without counts."""
    found: dict[str, Json] = {}
    for name, value in metrics.items():
        if "score" in value:
            found[name] = value
        elif name != "coverage":
            found |= {f"{name}.{measure}": figure for measure, figure in value.items()}
    return found


def _figure_tables(results: Json) -> Iterator[FigureTable]:
    constants = results.get("constant_reference", {})
    for split in SPLIT_LABELS:
        part = results.get(f"{split}_evaluation")
        if not part or not part.get("metrics"):
            continue
        tuned = _measured(part["metrics"])
        other = results.get("baseline", {}).get(f"{split}_evaluation", {}).get("metrics", {})
        rival, constant = _measured(other), _measured(constants.get(split, {}))
        asked = part["evaluated_cases"] + part["failed_cases"]
        rows = [
            FigureRow(
                name=name,
                tuned=tuned.get(name),
                baseline=rival.get(name),
                constant=constant[name]["score"] if name in constant else None,
            )
            for name in dict.fromkeys((*tuned, *rival))
        ]
        valid = part["evaluated_cases"] - part["invalid_cases"]
        yield FigureTable(split=split, answered=f"{valid:,}/{asked:,}件", rows=rows)


def _comparisons(results: Json) -> Iterator[Comparison]:
    compared = results.get("comparison", {})
    rivals = {"基準": compared, "定数予測": compared.get("constant_reference", {})}
    for split in SPLIT_LABELS:
        for rival, by_split in rivals.items():
            if split in by_split and by_split[split]["figures"]:
                part = by_split[split]
                yield Comparison(
                    split=split,
                    rival=rival,
                    pairs=part["pairs"],
                    failed=part["failed_pairs"],
                    left_out=part["left_out_pairs"],
                    dialogues=part["dialogues"],
                    main=part.get("main_figure"),
                    figures=[{"name": name, **f} for name, f in part["figures"].items()],
                )


def _better(name: str) -> int:
    """The sign of a good difference; 0 where neither direction is good by itself."""
    measure = name.rpartition(".")[2]
    return 0 if measure in NEUTRAL_FIGURES else -1 if measure in ERRORS else 1


def _judge(results: Json) -> Section | None:
    judge = results.get("judge")
    if not judge:
        return None
    win_rate = judge["win_rate"]
    shares = {
        "順序を入れ替えても同じ": "consistency",
        "先の応答を選ぶ": "first_share",
        "長い方を選ぶ": "longer_share",
    }
    rows = [
        ("審査するモデル", str(judge["model"])),
        ("比べる相手", "基準のモデル" if judge["against"] == "baseline" else "実際の応答"),
        ("勝率（%）", "-" if win_rate["score"] is None else _short(win_rate["score"])),
        ("勝率の95%区間", _interval(win_rate).removeprefix("95%区間").lstrip(": ")),
        ("勝ち–負け–引き分け", "–".join(str(judge[n]) for n in ("wins", "losses", "ties"))),
        *((label, _percent(judge[name])) for label, name in shares.items()),
        ("判定できない組", str(judge["failed_pairs"] + judge["left_out_pairs"])),
    ]
    return Section(title="審査（テスト）", rows=rows)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} %"


# ── The cases ────────────────────────────────────────────────────────────────────────────────


class _Messages:
    """Every message once, in the order in which contexts first say it."""

    def __init__(self) -> None:
        self.said: dict[tuple[str, str], int] = {}

    def places(self, messages: Iterable[Json]) -> list[int]:
        """Where the messages stand, each added where it is new."""
        keys = [(str(message.get("role", "")), _text_of(message)) for message in messages]
        return [self.said.setdefault(key, len(self.said)) for key in keys]


def _text_of(message: Json) -> str:
    """What a message says; of what isn't text its JSON."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    texts = [_part_text(part) for part in parts if part is not None]
    if calls := message.get("tool_calls"):
        texts.append(json.dumps(calls, ensure_ascii=False))
    return "\n".join(texts)


def _part_text(part: object) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return str(part["text"])
    if isinstance(part, dict) and "image_url" in part:
        return "（画像）"
    return json.dumps(part, ensure_ascii=False)


def _cases(results: Json, *, texts: bool) -> Cases:
    figures, said = _case_figures(results), _Messages()
    judged = {one["case_id"]: one for one in results.get("judge", {}).get("judgements", ())}
    is_score = results.get("task") == "score"
    rows = []
    for split in SPLIT_LABELS:
        rival = _by_case(results.get("baseline", {}).get(f"{split}_evaluation", {}))
        for response in results.get(f"{split}_evaluation", {}).get("responses", ()):
            case_id = response["case_id"]
            row = _case_row(response, split)
            row["tuned"] = _said(response, figures, is_score, texts)
            if case_id in rival:
                row["baseline"] = _said(rival[case_id], figures, is_score, texts)
            _add_reference(row, response["reference"], is_score, texts)
            if texts:
                row["context"] = said.places(response["input"])
            if split == "test" and case_id in judged:
                _add_judgement(row, judged[case_id], texts=texts)
            rows.append(row)
    return Cases(
        figures=figures,
        main=results.get("settings", {}).get("main_figure"),
        items=list(SCORE_ITEMS) if is_score else [],
        messages=list(said.said),
        rows=rows,
    )


def _case_row(response: Json, split: str) -> CaseRow:
    case_id = response["case_id"]
    dialogue = response.get("dialogue_id") or case_id.rpartition(":")[0]
    row = CaseRow(id=case_id, split=split, dialogue=dialogue)
    if response.get("topic"):
        row["topic"] = response["topic"]
    if response.get("dialogue_score") is not None:
        row["score"] = response["dialogue_score"]
    return row


def _add_reference(row: CaseRow, reference: str, is_score: bool, texts: bool) -> None:
    """The real answer: in the score task its items, of which their sum is no text."""
    real = parse_scores(reference) if is_score else ""
    if not isinstance(real, str):
        row["total"] = sum(real.values())
        if texts:
            row["items"] = list(real.values())
    elif texts:
        row["reference"] = reference


def _by_case(part: Json) -> Json:
    """The answers of a part by case: the baseline's already stand so."""
    responses = part.get("responses", {})
    if isinstance(responses, Mapping):
        return responses
    return {response["case_id"]: response for response in responses}


def _case_figures(results: Json) -> list[str]:
    """The figures that a case has a value of, the main one first."""
    sides = [part for _, part in _parts(results)]
    found = dict.fromkeys(
        name
        for part in sides
        for one in _by_case(part).values()
        for name in one.get("scores") or ()
    )
    main = results.get("settings", {}).get("main_figure")
    return sorted(found, key=lambda name: name != main)


def _said(response: Json, figures: Sequence[str], is_score: bool, texts: bool) -> Said:
    scores = response.get("scores") or {}
    said = Said(scores=[_finite(scores.get(name)) for name in figures])
    output = response.get("output", "")
    fault = response.get("error") or response.get("invalid")
    if fault:  # it may quote what was asked
        said["fault"] = fault if texts else "応答なし" if response.get("error") else "無効"
    parsed = parse_scores(output) if is_score else ""
    if not isinstance(parsed, str):
        said["total"] = sum(parsed.values())
        if texts:
            said["items"] = list(parsed.values())
    elif texts:
        said["text"] = output
    if response.get("finish_reason") == "length":
        said["cut"] = True
    usage = response.get("usage") or {}
    if usage.get("completion_tokens") is not None:
        said["tokens"] = usage["completion_tokens"]
    if response.get("latency_seconds") is not None:
        said["seconds"] = response["latency_seconds"]
    return said


def _add_judgement(row: CaseRow, judged: Json, *, texts: bool) -> None:
    winners = {"tuned": "勝ち", "rival": "負け", "tie": "引き分け", None: "判定なし"}
    row["judge"] = winners[judged["winner"]]
    if texts:
        row["reasons"] = [v["reason"] for v in judged["verdicts"] if v.get("reason")]


# ── The end of the page ──────────────────────────────────────────────────────────────────────


def _settings(record: Json, results: Json) -> Iterator[Section]:
    """Settings, versions and signatures, as they are recorded."""
    plan = record.get("plan") or {}
    groups = (
        ("接続先とデータ", record.get("settings")),
        ("対話の選び方", record.get("selection")),
        ("学習（頼んだもの）", plan.get("training")),
        ("学習（サービスが決めたもの）", _training(record, results).get("hyperparameters")),
        ("評価", results.get("settings") or plan.get("asking")),
        ("版", record.get("versions")),
        ("ジョブの知らせ", dict(enumerate(map(_event, record.get("events") or ()), 1))),
    )
    for title, values in groups:
        rows = [(str(k), _value(v)) for k, v in (values or {}).items() if v not in (None, [], ())]
        if rows:
            yield Section(title=title, rows=rows)
    signatures = {
        _label(name): figure["signature"]
        for split in SPLIT_LABELS
        for name, figure in _measured(
            results.get(f"{split}_evaluation", {}).get("metrics", {})
        ).items()
        if name.partition(".")[0] not in SCORE_ITEMS
    }
    if signatures:
        yield Section(title="指標の定義", rows=list(signatures.items()))


def _event(event: Json) -> str:
    when = event.get("created_at")
    told = f"{datetime.fromtimestamp(when, UTC):%Y-%m-%d %H:%M:%S} " if when else ""
    return f"{told}{event['message']}"


def _value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _files(record: Json, files: Mapping[str, str]) -> Pairs:
    """Each file with its sha256; those of the data also where they aren't beside the page."""
    data = record.get("data", {})
    named = {
        re.split(r"[\\/]", str(path))[-1]: data[kind]["sha256"]
        for kind, path in record.get("files", {}).items()
        if kind in data
    }
    return sorted({**named, **files}.items())


# Of the command line: the option, where the record has its value, and what it is without it.
OPTIONS: tuple[tuple[str, tuple[str, ...], tuple[object, ...]], ...] = (
    ("--base-url", ("settings", "base_url"), (OPENAI_BASE_URL,)),
    ("--dialect", ("settings", "dialect"), ()),
    ("--local", ("settings", "local"), ()),
    ("--local-launcher", ("settings", "local_launcher"), ()),
    ("--full", ("settings", "local_full"), ()),
    ("--serve-url", ("settings", "local_serve_url"), ()),
    ("--model", ("settings", "model"), (DEFAULT_MODEL,)),
    ("--dataset", ("settings", "dataset"), (DEFAULT_DATASET,)),
    ("--config", ("settings", "config"), ()),
    ("--revision", ("settings", "revision"), ()),
    ("--task", ("settings", "task"), ("response",)),
    ("--assistant", ("settings", "assistant"), ([],)),
    ("--user", ("settings", "user"), ([],)),
    ("--resplit", ("settings", "resplit"), ()),
    ("--skip-unreadable", ("settings", "skip_unreadable"), ()),
    ("--system-prompt", ("settings", "system_prompt"), ()),
    ("--long-examples", ("settings", "long_examples"), ("split",)),
    ("--max-samples", ("selection", "max_samples"), ()),
    ("--seed", ("selection", "seed"), (42,)),
    ("--min-score", ("selection", "min_score"), ()),
    ("--max-score", ("selection", "max_score"), ()),
    ("--topics", ("selection", "topics"), ()),
    ("--exclude-flagged", ("selection", "exclude_flagged"), ()),
    ("--group-by", ("selection", "group_by"), ()),
    ("--epochs", ("plan", "training", "epochs"), (10,)),
    ("--batch-size", ("plan", "training", "batch_size"), (32,)),
    (
        "--learning-rate-multiplier",
        ("plan", "training", "learning_rate_multiplier"),
        (),
    ),
    ("--learning-rate", ("plan", "training", "learning_rate"), ()),
    ("--training-type", ("plan", "training", "training_type"), ()),
    ("--suffix", ("plan", "training", "suffix"), ()),
    ("--max-test-cases", ("plan", "asking", "max_test_cases"), (10,)),
    ("--baseline", ("plan", "asking", "baseline"), ()),
    ("--eval-turns", ("plan", "asking", "eval_turns"), (1,)),
    ("--checkpoint", ("plan", "asking", "checkpoint"), ("last",)),
    ("--main-figure", ("plan", "asking", "main_figure"), ("rouge_l", "overall.mse", "judge")),
    ("--max-tokens", ("plan", "asking", "max_tokens"), (1024,)),
    ("--temperature", ("plan", "asking", "temperature"), (0.0,)),
    ("--judge", ("plan", "asking", "judge"), ()),
    ("--judge-base-url", ("plan", "asking", "judge_base_url"), ()),
    ("--judge-against", ("plan", "asking", "judge_against"), ()),
    ("--judge-rubric", ("plan", "asking", "judge_rubric"), ()),
)


def _command(record: Json) -> str:
    """The command line that repeats the run, without what is as it is anyway."""
    words = ["openai-sft"]
    if record.get("rehearsal"):
        words.append("--rehearse")
    if model_id := (record.get("plan") or {}).get("model_id"):
        words += ["--evaluate-only", "--model-id", str(model_id)]
    local = record.get("settings", {}).get("local")
    for option, path, usual in OPTIONS:
        value: Any = record
        for name in path:
            value = (value or {}).get(name)
        if value is None or value is False or value in usual:
            continue
        if option == "--model" and value == local:
            continue  # `--local` has named it
        if value is True:
            words.append(option)
        else:
            words += [option, *map(str, value if isinstance(value, list | tuple) else [value])]
    return shlex.join(words)


# ── The page ─────────────────────────────────────────────────────────────────────────────────


def _page(record: Json, found: Json | None, files: Mapping[str, str], *, texts: bool) -> Page:
    results = EvaluationResults(found or {})
    curve = _curve(record, results)
    figures, comparisons = list(_figure_tables(results)), list(_comparisons(results))
    cases = _cases(results, texts=texts)
    names = {row["name"] for table in figures for row in table["rows"]}
    names |= {figure["name"] for part in comparisons for figure in part["figures"]}
    model = record.get("settings", {}).get("local") or record.get("settings", {}).get("model")
    # Of a path its last part, of a name on the Hub all.
    dataset = re.sub(r"^(?:[./\\]|[A-Za-z]:).*[/\\](?=[^/\\]+)", "", _dataset_of(record))
    return Page(
        title=f"{model} を {dataset} で学習" if dataset else str(model),
        facts=_facts(record, results),
        verdict=_verdict(record, results),
        notes=list(_notes(record, results, curve)),
        tiles=list(_tiles(record, results, curve)),
        curve=curve,
        names={
            name: Naming(label=_label(name), better=_better(name))
            for name in sorted(names | set(cases["figures"]))
        },
        verdicts=dict(VERDICT_LABELS),
        figures=figures,
        comparisons=comparisons,
        judge=_judge(results),
        texts=texts,
        cases=cases,
        settings=list(_settings(record, results)),
        files=_files(record, files),
        command=_command(record),
    )


def _embedded(value: object) -> str:
    """JSON that can stand in a page's script element: no markup, no lone half of a character."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _policy() -> str:
    """Nothing but the template's own style and script: by their hashes."""

    def source(tag: str) -> str:
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", TEMPLATE, re.DOTALL)
        digest = hashlib.sha256(text.encode()).digest()
        return f"'sha256-{base64.b64encode(digest).decode()}'"

    return (
        f"default-src 'none'; script-src {source('script')}; style-src {source('style')}; "
        "img-src data:; base-uri 'none'; form-action 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )


def render(
    record: Json, results: Json | None, *, files: Mapping[str, str], texts: bool = True
) -> str:
    """The page of a run as HTML.

    ``record`` is the JSON of ``run_*.json``, ``results`` that of its
    ``comprehensive_evaluation_*.json`` (``None`` where nothing was evaluated), ``files`` the names
    of the run's files with their sha256. Without ``texts`` dialogues and answers are left out.
    """
    page = _page(record, results, files, texts=texts)
    filled = {
        "{{title}}": html.escape(page["title"]),
        "{{policy}}": html.escape(_policy()),
        "{{data}}": _embedded(page),
    }
    return re.sub("|".join(map(re.escape, filled)), lambda found: filled[found[0]], TEMPLATE)


# ── The template ─────────────────────────────────────────────────────────────────────────────

TEMPLATE = r"""<!DOCTYPE html>
<html lang="ja">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{{policy}}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<title>{{title}}</title>
<style>
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ground: #f6f7f9; --ink: #1b1f24; --soft: #57606a; --line: #d8dee4;
  --train: #2563a8; --valid: #b45309; --better: #0f766e; --worse: #b42318; --accent: #2563a8;
  --note: #fff8dc; --note-line: #d4a72c; --note-ink: #4d3800;
  --good-side: #e3f3f0; --better-ground: #e3f3f0; --worse-ground: #fdebe8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #171b21; --ground: #0f1216; --ink: #e6e9ed; --soft: #9aa4af; --line: #343c46;
    --train: #74aef0; --valid: #f0a552; --better: #4fc3b0; --worse: #ff8d7e; --accent: #74aef0;
    --note: #2d2610; --note-line: #8a6d1b; --note-ink: #f1dfa6;
    --good-side: #17302d; --better-ground: #17302d; --worse-ground: #3a1f1c;
  }
}
@media print {
  :root {
    color-scheme: light;
    --paper: #fff; --ground: #fff; --ink: #000; --soft: #444; --line: #bbb;
    --train: #2563a8; --valid: #b45309; --better: #0f766e; --worse: #b42318;
    --note: #fff8dc; --note-line: #d4a72c; --note-ink: #000;
    --good-side: #e3f3f0; --better-ground: #e3f3f0; --worse-ground: #fdebe8;
  }
}
* { box-sizing: border-box; }
html { scroll-padding-top: 1rem; }
body {
  margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.65 system-ui, "Hiragino Sans", "Noto Sans JP", "Noto Sans CJK JP", "Yu Gothic UI",
    Meiryo, sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere;
}
main { max-width: 1180px; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.45rem; line-height: 1.35; margin: 0 0 .75rem; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: .95rem; margin: 1.25rem 0 .35rem; }
p { margin: .35rem 0; }
a { color: var(--accent); }
.soft, figcaption, .hint { color: var(--soft); font-size: .85rem; }
dl.facts {
  display: grid; grid-template-columns: 1fr 1fr; gap: .1rem 1.5rem; margin: 0; font-size: .9rem;
}
dl.facts div { display: grid; grid-template-columns: 7rem 1fr; }
dt { color: var(--soft); }
dd { margin: 0; }
.verdict {
  margin: 1.25rem 0 .75rem; padding: .8rem 1rem; background: var(--paper);
  border: 1px solid var(--line); border-left: 6px solid var(--soft); border-radius: 6px;
  font-size: 1.1rem; font-weight: 600;
}
.verdict.better { border-left-color: var(--better); }
.verdict.worse, .verdict.failed { border-left-color: var(--worse); }
.verdict p + p { font-size: .95rem; }
.notes { list-style: none; margin: 0 0 1rem; padding: 0; display: grid; gap: .4rem; }
.notes li {
  background: var(--note); color: var(--note-ink); border-left: 4px solid var(--note-line);
  padding: .35rem .75rem; border-radius: 4px; font-size: .9rem;
}
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(148px, 1fr)); gap: .6rem; }
.tile {
  background: var(--paper); border: 1px solid var(--line); border-radius: 6px; padding: .6rem .8rem;
}
.tile b { display: block; font-size: 1.35rem; line-height: 1.3; }
.tile span { display: block; color: var(--soft); font-size: .8rem; }
.sheet {
  background: var(--paper); border: 1px solid var(--line); border-radius: 6px; padding: .75rem;
  overflow-x: auto;
}
.sheet + .sheet { margin-top: .6rem; }
figure { margin: 0; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; }
th, td {
  padding: .3rem .6rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line);
}
th { color: var(--soft); font-weight: 500; }
th:first-child, td:first-child { text-align: left; }
th:first-child, td:first-child { white-space: normal; min-width: 7rem; }
td.wide { text-align: left; white-space: normal; }
td.bar { padding: .1rem .6rem; }
tr.main td { font-weight: 650; }
.verdict-word.better { color: var(--better); font-weight: 650; }
.verdict-word.worse { color: var(--worse); font-weight: 650; }
svg { display: block; }
svg text { fill: var(--soft); font-size: 12px; }
.grid { stroke: var(--line); }
.grid.epoch { stroke-dasharray: 1 4; }
.train, .valid, .full { fill: none; stroke-width: 1.75; }
.train { stroke: var(--train); }
.train.raw { stroke-width: 1; opacity: .35; }
.valid { stroke: var(--valid); stroke-width: 1; opacity: .6; }
.full { stroke: var(--valid); }
.dot { fill: var(--valid); }
.ring { fill: none; stroke: var(--ink); stroke-width: 1.75; }
.mark { fill: var(--paper); stroke: var(--ink); }
.mark.evaluated { fill: var(--ink); }
.cross { stroke: var(--soft); stroke-dasharray: 3 3; }
text.told { fill: var(--ink); paint-order: stroke; stroke: var(--paper); stroke-width: 4px; }
.good-side { fill: var(--good-side); }
.whisker { stroke: var(--soft); stroke-width: 2; }
.point { fill: var(--soft); }
.better .whisker { stroke: var(--better); } .better .point { fill: var(--better); }
.worse .whisker { stroke: var(--worse); } .worse .point { fill: var(--worse); }
.base-dot { fill: none; stroke: var(--valid); stroke-width: 1.5; }
.tuned-dot { fill: var(--train); opacity: .75; }
.legend {
  display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; font-size: .85rem; color: var(--soft);
}
.legend svg { display: inline-block; vertical-align: middle; margin-right: .35rem; }
.reading { min-height: 1.6em; font-size: .85rem; }
button, select, input {
  font: inherit; font-size: .88rem; color: inherit; background: var(--paper);
  border: 1px solid var(--line); border-radius: 5px; padding: .2rem .5rem; max-width: 100%;
}
button { cursor: pointer; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px; }
.tools {
  position: sticky; top: 0; z-index: 1; background: var(--ground); padding: .6rem 0;
  border-bottom: 1px solid var(--line); display: flex; flex-wrap: wrap; gap: .4rem .7rem;
  align-items: center;
}
.tools label {
  font-size: .85rem; color: var(--soft); display: inline-flex; gap: .3rem; align-items: center;
}
.tools input[type=search] { min-width: 12rem; flex: 1; }
.tools input[type=number] { width: 4.5rem; }
.case {
  background: var(--paper); border: 1px solid var(--line); border-radius: 6px; margin: .7rem 0;
  padding: .6rem .8rem; scroll-margin-top: 4.5rem; contain: content;
}
.case header {
  display: flex; flex-wrap: wrap; gap: .15rem .9rem; align-items: baseline; font-size: .85rem;
}
.case header .id { font-weight: 650; text-decoration: none; }
.case header .scores { margin-left: auto; }
.delta { padding: 0 .4rem; border-radius: 4px; font-weight: 650; }
.delta.better { color: var(--better); background: var(--better-ground); }
.delta.worse { color: var(--worse); background: var(--worse-ground); }
section > details > summary { cursor: pointer; color: var(--soft); margin: .5rem 0; }
.case details { margin: .35rem 0; font-size: .88rem; }
.case summary { cursor: pointer; color: var(--soft); }
.said {
  margin: .3rem 0 .3rem .75rem; padding-left: .6rem; border-left: 3px solid var(--line);
  white-space: pre-wrap;
}
.said.assistant { border-left-color: var(--train); }
.said small { display: block; color: var(--soft); }
.answers {
  display: grid; gap: .5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr));
}
.answer { white-space: pre-wrap; min-width: 0; }
.answer h4 { margin: 0; font-size: .8rem; font-weight: 600; color: var(--soft); }
.answer .fault { color: var(--worse); }
.answer small { color: var(--soft); }
pre {
  white-space: pre-wrap; background: var(--paper); border: 1px solid var(--line);
  border-radius: 5px; padding: .5rem .7rem; margin: .35rem 0; font-size: .85rem;
}
.settings td { text-align: left; white-space: normal; vertical-align: top; }
.settings td:first-child { white-space: nowrap; color: var(--soft); width: 1%; }
code { font-size: .85em; }
.only-print { display: none; }
@media (max-width: 560px) {
  main { padding: 1rem .75rem 3rem; }
  dl.facts { grid-template-columns: 1fr; }
  .tiles { grid-template-columns: 1fr 1fr; }
  .tools { position: static; }
  .case { scroll-margin-top: .5rem; }
  .case header .scores { margin-left: 0; }
}
@media print {
  body { font-size: 11px; }
  main { max-width: none; padding: 0; }
  .tools, .hint, button { display: none; }
  .only-print { display: block; }
  .case, .tile, .verdict, figure { break-inside: avoid; }
  .sheet { overflow: visible; border: 0; padding: 0; }
}
</style>
</head>
<body>
<main>
<h1>{{title}}</h1>
<dl class="facts" id="facts"></dl>
<div class="verdict" id="verdict"></div>
<ul class="notes" id="notes"></ul>
<div class="tiles" id="tiles"></div>
<section id="curve" hidden>
  <h2>損失</h2>
  <figure class="sheet">
    <div class="legend" id="curve-legend"></div>
    <div id="curve-plot" tabindex="0" aria-label="損失の曲線。左右の矢印キーで値を読めます"></div>
    <div class="reading soft" id="curve-reading" aria-live="polite"></div>
    <button id="curve-scale" type="button"></button>
  </figure>
  <details>
    <summary>値の表</summary>
    <div class="sheet" id="curve-table"></div>
  </details>
</section>
<section id="comparisons" hidden>
  <h2>比較</h2>
  <p class="soft">棒は差の95%区間、点は差、縦線は0です。
  目盛りは指標ごとで、薄い緑が良くなる側です。
  pは対話（か組）を単位とする無作為化検定のものです。
  主指標（★）のpは補正せず、ほかはHolmの方法で補正しています。
  区間は補正していないため、0を含まなくても「区別できない」ことがあります。
  勝ち–負け–引き分けは件数で、検定には使っていません。</p>
</section>
<section id="judge" hidden><h2></h2></section>
<section id="figures" hidden><h2>指標</h2></section>
<section id="totals" hidden>
  <h2>予測した合計点と実際の合計点</h2>
  <figure class="sheet">
    <div class="legend" id="totals-legend"></div>
    <div id="totals-plot"></div>
  </figure>
</section>
<section id="cases" hidden>
  <h2>応答</h2>
  <p class="hint">j / k で次 / 前、o で文脈、/ で検索。
  ブラウザーの検索は画面に出た応答だけを探します。
  すべてから探すには下の欄を使ってください。</p>
  <div class="tools" role="search">
    <label>並び <select id="order"></select></label>
    <label id="figure-label">点 <select id="figure"></select></label>
    <label>分割 <select id="split"></select></label>
    <label id="topic-label">話題 <select id="topic"></select></label>
    <label id="outcome-label">結果 <select id="outcome"></select></label>
    <label id="score-label">評価点
      <input id="least" type="number" aria-label="評価点の下限">〜
      <input id="most" type="number" aria-label="評価点の上限">
    </label>
    <input id="words" type="search" placeholder="本文、ID、話題" aria-label="文を探す">
    <span class="soft" id="count" aria-live="polite"></span>
  </div>
  <p class="only-print" id="printed"></p>
  <div id="list"></div>
</section>
<section id="settings"><h2>設定と再現</h2></section>
<noscript>
  <p>見るには、ブラウザーのJavaScriptを有効にしてください（通信はしません）。</p>
</noscript>
</main>
<script id="data" type="application/json">{{data}}</script>
<script>
"use strict";
const page = JSON.parse(document.getElementById("data").textContent);
const SPLITS = { test: "テスト", valid: "検証" };
const ROLES = { system: "指示", user: "ユーザー", assistant: "アシスタント", tool: "ツール" };
const at = (id) => document.getElementById(id);

// What the data say becomes text and attributes only; nothing here reads markup.
function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}
const el = (tag, attributes = {}, ...children) =>
  fill(document.createElement(tag), attributes, children);
const shape = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

function short(value, sign = "") {
  if (value === null || value === undefined) return "-";
  const size = Math.abs(value);
  const text = value.toFixed(size < 100 ? 2 : size < 1000 ? 1 : 0).replace(/^-(?=[0.]*$)/, "");
  return sign && !text.startsWith("-") ? sign + text : text;
}
const few = (value, digits) => String(Number(value.toPrecision(digits)));
const naming = (name) => page.names[name] || { label: name, better: 1 };
const tone = (name, difference) => {
  const good = naming(name).better * difference;
  return good > 0 ? "better" : good < 0 ? "worse" : "";
};

function table(head, rows, kinds = []) {
  const cells = (row, tag) =>
    row.map((cell, n) =>
      cell instanceof Node && cell.nodeName === "TD" ? cell : el(tag, kinds[n] || {}, cell),
    );
  const body = rows.map((row) => el("tr", row.attributes || {}, ...cells(row, "td")));
  const top = head ? el("thead", {}, el("tr", {}, ...cells(head, "th"))) : null;
  return el("table", {}, top, el("tbody", {}, ...body));
}

// The top ------------------------------------------------------------------------------------

for (const [label, value] of page.facts)
  at("facts").append(el("div", {}, el("dt", {}, label), el("dd", {}, value)));
at("verdict").classList.add(page.verdict.tone);
at("verdict").append(...page.verdict.lines.map((line) => el("p", {}, line)));
at("notes").append(...page.notes.map((note) => el("li", {}, note)));
at("tiles").append(
  ...page.tiles.map((tile) =>
    el(
      "div",
      { class: "tile" },
      el("span", {}, tile.label),
      el("b", {}, tile.value),
      el("span", {}, tile.detail),
    ),
  ),
);

// The loss curve -----------------------------------------------------------------------------

function ticks(low, high, wanted) {
  const rough = (high - low || 1) / wanted,
    power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough * 0.999);
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++)
    found.push(n * step);
  return found;
}

function decades(low, high) {
  const found = [];
  const steps = high / low < 30 ? [1, 1.5, 2, 3, 4, 5, 7] : [1, 2, 5];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
    for (const n of steps) found.push(n * 10 ** power);
  return found.filter((value) => value >= low && value <= high);
}

// The mean of the values around each step; as it is where there are few.
function smoothed(points) {
  const half = Math.floor(points.length / 100);
  if (half < 2) return null;
  const means = points.map(([x], n) => {
    const near = points.slice(Math.max(0, n - half), n + half + 1);
    return [x, near.reduce((sum, point) => sum + point[1], 0) / near.length];
  });
  return Object.assign(means, { width: 2 * half + 1 });
}

function readCurve({ rows, checkpoints, epochs }) {
  const column = (n) => rows.filter((row) => row[n] !== null).map((row) => [row[0], row[n]]);
  const [train, batch, full] = [1, 2, 3].map(column);
  const losses = [...train, ...batch, ...full].map(([, loss]) => loss);
  const measured = full.length ? full : batch;
  const last = rows.at(-1)[0];
  return {
    rows, checkpoints, epochs, train, batch, full, last,
    first: Math.min(rows[0][0], 1),
    lowest: Math.min(...losses),
    highest: Math.max(...losses),
    mean: smoothed(train),
    best: measured.reduce((a, b) => (a && a[1] < b[1] ? a : b), null),
    epochOf: (step) => (epochs ? (step * epochs) / last : null),
  };
}

function curveLegend(curve) {
  const line = (kind) => shape("path", { class: kind, d: "M0 6H26" });
  const dot = (kind, r) => shape("circle", { class: kind, cx: 13, cy: 6, r });
  const entries = [
    [curve.train.length, "学習（バッチ）", line(curve.mean ? "train raw" : "train")],
    [curve.mean, `その移動平均（${curve.mean && curve.mean.width}点）`, line("train")],
    [curve.batch.length, "検証（バッチ）", line("valid")],
    [curve.full.length, "検証（全件）", line("full"), dot("dot", 3.5)],
    [curve.best, "検証の最小", dot("ring", 5)],
    [
      curve.checkpoints.length, "チェックポイント（塗ったものを評価）",
      shape("path", { class: "mark evaluated", d: "M13 1l6 10h-12z" }),
    ],
  ];
  for (const [there, text, ...drawn] of entries)
    if (there)
      at("curve-legend").append(
        el("span", {}, shape("svg", { width: 26, height: 12 }, ...drawn), text),
      );
}

// Where a step and a loss stand in a plot of this width.
function curveSpace(curve, width, isLog) {
  const [left, right, top, base] = [46, width - 14, 10, 268];
  const pad = (curve.highest - curve.lowest) * 0.06 || 0.5;
  const low = isLog ? curve.lowest / 1.12 : Math.max(0, curve.lowest - pad);
  const high = isLog ? curve.highest * 1.12 : curve.highest + pad;
  const scale = isLog ? Math.log : (value) => value;
  const { first, last } = curve;
  const part = (step) => (last === first ? 0.5 : (step - first) / (last - first));
  return {
    width, left, right, top, base, low, high, isLog,
    x: (step) => left + (right - left) * part(step),
    y: (loss) =>
      base - ((base - top) * (scale(loss) - scale(low))) / (scale(high) - scale(low)),
  };
}

const label = (x, y, anchor, text, kind = "") =>
  shape("text", { x, y, "text-anchor": anchor, class: kind }, text);

function curveFrame(curve, { width, left, right, top, base, low, high, isLog, x, y }) {
  const drawn = [shape("path", { class: "grid", d: `M${left} ${base}H${right}` })];
  for (const value of isLog ? decades(low, high) : ticks(low, high, 6))
    drawn.push(
      shape("path", { class: "grid", d: `M${left} ${y(value)}H${right}` }),
      label(left - 6, y(value) + 4, "end", few(value, 3)),
    );
  drawn.push(label(4, base + 18, "start", "step"));
  for (const step of ticks(curve.first, curve.last, Math.min(8, width / 90)))
    if (Number.isInteger(step))
      drawn.push(
        shape("path", { class: "grid", d: `M${x(step)} ${base}v5` }),
        label(x(step), base + 18, "middle", String(step)),
      );
  if (curve.epochs) drawn.push(label(4, base + 36, "start", "エポック"));
  const every = Math.ceil(curve.epochs / (width / 50));
  for (let epoch = 1; epoch <= curve.epochs; epoch++) {
    const place = x((epoch * curve.last) / curve.epochs);
    drawn.push(shape("path", { class: "grid epoch", d: `M${place} ${top}V${base}` }));
    if (epoch % every === 0 && place > left + 20)
      drawn.push(label(place, base + 36, "middle", String(epoch)));
  }
  drawn.push(label(left + 6, top + 10, "start", isLog ? "損失（対数）" : "損失"));
  return drawn;
}

function curveLines({ train, batch, full, mean, checkpoints, best }, { width, top, base, x, y }) {
  const point = ([step, loss]) => `${x(step).toFixed(1)} ${y(loss).toFixed(1)}`;
  const path = (kind, line) =>
    line && line.length ? shape("path", { class: kind, d: "M" + line.map(point).join("L") }) : null;
  const drawn = [
    path(mean ? "train raw" : "train", train),
    path("valid", batch),
    path("train", mean),
    path("full", full),
  ];
  if (full.length <= 60)
    for (const [step, loss] of full)
      drawn.push(shape("circle", { class: "dot", cx: x(step), cy: y(loss), r: 3.5 }));
  for (const { step, model, evaluated } of checkpoints)
    drawn.push(
      shape(
        "path",
        { class: evaluated ? "mark evaluated" : "mark", d: `M${x(step)} ${base - 11}l6 10h-12z` },
        shape("title", {}, `${model}（step ${step}）`),
      ),
    );
  if (best) {
    const place = [x(best[0]), y(best[1])];
    const [side, anchor] = place[0] > width - 150 ? [-12, "end"] : [12, "start"];
    const height = Math.max(top + 10, place[1] - 10);
    drawn.push(
      shape("circle", { class: "ring", cx: place[0], cy: place[1], r: 7 }),
      label(place[0] + side, height, anchor, `最小 ${best[1].toFixed(4)}`, "told"),
    );
  }
  return drawn.filter((one) => one);
}

function curveTable({ rows, checkpoints, epochOf }) {
  const cell = (value, digits = 4) => (value === null ? "-" : value.toFixed(digits));
  const models = new Map(checkpoints.map((mark) => [mark.step, mark.model]));
  return table(
    ["step", "エポック", "学習", "検証（バッチ）", "検証（全件）", "チェックポイント"],
    rows.map(([step, ...losses]) => [
      String(step), cell(epochOf(step), 2), ...losses.map((loss) => cell(loss)),
      models.get(step) || "",
    ]),
  );
}

function showCurve(curve) {
  const plot = at("curve-plot");
  let isLog = curve.lowest > 0 && curve.highest / curve.lowest > 8;
  let space = null;
  let place = -1;

  function draw() {
    space = curveSpace(curve, Math.max(280, plot.clientWidth), isLog);
    plot.replaceChildren(
      shape(
        "svg", { width: space.width, height: 320, role: "img", "aria-label": "損失の曲線" },
        ...curveFrame(curve, space), ...curveLines(curve, space),
        shape("path", { class: "cross", id: "cross" }),
      ),
    );
    at("curve-scale").textContent = isLog ? "縦軸を等間隔にする" : "縦軸を対数にする";
    at("curve-scale").hidden = curve.lowest <= 0;
  }

  function read(index) {
    place = Math.max(0, Math.min(curve.rows.length - 1, index));
    const [step, ...losses] = curve.rows[place];
    const epoch = curve.epochs ? `（エポック ${curve.epochOf(step).toFixed(2)}）` : "";
    const told = ["学習", "検証（バッチ）", "検証（全件）"]
      .map((name, n) => (losses[n] === null ? "" : `${name} ${losses[n].toFixed(4)}`))
      .filter((text) => text);
    at("curve-reading").textContent = `step ${step}${epoch}: ${told.join("、")}`;
    at("cross").setAttribute("d", `M${space.x(step)} ${space.top}V${space.base}`);
  }

  plot.addEventListener("pointermove", (event) => {
    const from = event.clientX - plot.getBoundingClientRect().left;
    const gaps = curve.rows.map(([step]) => Math.abs(space.x(step) - from));
    read(gaps.indexOf(Math.min(...gaps)));
  });
  plot.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    read(place + move);
    event.preventDefault();
  });
  at("curve-scale").addEventListener("click", () => {
    isLog = !isLog;
    draw();
  });
  at("curve-table").parentNode.addEventListener("toggle", () => {
    if (!at("curve-table").firstChild) at("curve-table").append(curveTable(curve));
  });
  at("curve").hidden = false;
  draw();
  curveLegend(curve);
  new ResizeObserver(draw).observe(plot);
}
if (page.curve) showCurve(readCurve(page.curve));

// Figures and comparisons --------------------------------------------------------------------

function intervalBar(figure) {
  const width = 190,
    height = 30,
    middle = width / 2;
  const reach =
    1.1 * Math.max(...[figure.low, figure.high, figure.difference].map((n) => Math.abs(n || 0))) ||
    1;
  const x = (value) => middle + (value / reach) * (middle - 6);
  const better = naming(figure.name).better;
  const bar = shape("svg", {
    width,
    height,
    class: figure.verdict,
    role: "img",
    "aria-label": `差 ${short(figure.difference, "+")}`,
  });
  if (better)
    bar.append(
      shape("rect", {
        class: "good-side",
        x: better > 0 ? middle : 0,
        y: 0,
        width: middle,
        height,
      }),
    );
  bar.append(shape("path", { class: "grid", d: `M${middle} 0V${height}`, "stroke-width": 1.5 }));
  if (figure.low !== null)
    bar.append(
      shape("path", {
        class: "whisker",
        d: `M${x(figure.low)} 15H${x(figure.high)}M${x(figure.low)} 10v10M${x(figure.high)} 10v10`,
      }),
    );
  bar.append(shape("circle", { class: "point", cx: x(figure.difference), cy: 15, r: 4.5 }));
  return bar;
}
const span = (figure, sign = "") =>
  figure.low === null ? "-" : `${short(figure.low, sign)}〜${short(figure.high, sign)}`;

const FEW = "対話が少なすぎるため、95%区間は計算していません。";

// The test data's tables stand open; those of the validation data are opened.
function place(section, split, title, ...content) {
  at(section).hidden = false;
  at(section).append(
    split === "test"
      ? el("div", {}, el("h3", {}, title), ...content)
      : el("details", {}, el("summary", {}, title), ...content),
  );
}

for (const part of page.comparisons) {
  const known = part.figures.some((figure) => figure.low !== null);
  const rows = part.figures.map((figure) => {
    const isMain = figure.name === part.main,
      name = naming(figure.name);
    const row = [
      (isMain ? "★ " : "") + name.label + (name.better < 0 ? " ↓" : ""),
      short(figure.tuned),
      short(figure.baseline),
      short(figure.difference, "+"),
      ...(known
        ? [
            el("td", { class: "bar" }, figure.low === null ? "" : intervalBar(figure)),
            span(figure, "+"),
          ]
        : []),
      figure.wins === null ? "-" : `${figure.wins}–${figure.losses}–${figure.ties}`,
      few(isMain ? figure.p_value : figure.p_adjusted, 2),
      el(
        "span",
        { class: `verdict-word ${figure.verdict}` },
        page.verdicts[figure.verdict] || figure.verdict,
      ),
    ];
    row.attributes = isMain ? { class: "main" } : {};
    return row;
  });
  const left = [
    part.failed ? `うち応答なし・無効 ${part.failed}組` : "",
    part.left_out ? `除いた組 ${part.left_out}` : "",
  ];
  const counts = [`${part.pairs}組`, `${part.dialogues}対話`, ...left]
    .filter((text) => text)
    .join("、");
  const head = [
    "指標（↓は小さいほど良い）",
    "学習後",
    part.rival,
    "差",
    ...(known ? ["差の95%区間", ""] : []),
    "勝–負–分",
    "p",
    "判定",
  ];
  place(
    "comparisons",
    part.split,
    `${SPLITS[part.split]}: 学習後と${part.rival}（${counts}）`,
    el("div", { class: "sheet" }, table(head, rows)),
    known ? null : el("p", { class: "soft" }, FEW),
  );
}

if (page.judge) {
  at("judge").hidden = false;
  at("judge").firstChild.textContent = page.judge.title;
  at("judge").append(el("div", { class: "sheet settings" }, table(null, page.judge.rows)));
}

for (const part of page.figures) {
  const has = (side) => part.rows.some((row) => row[side] !== null);
  const known = part.rows.some((row) => row.tuned && row.tuned.low !== null);
  const spans = (figure) => (!known ? [] : [figure && figure.score !== null ? span(figure) : "-"]);
  const cells = (figure) => [short(figure && figure.score), ...spans(figure)];
  const head = ["指標", "学習後", ...(known ? ["95%区間"] : [])];
  if (has("baseline")) head.push("基準", ...(known ? ["95%区間"] : []));
  if (has("constant")) head.push("定数予測");
  const rows = part.rows.map((row) => [
    naming(row.name).label,
    ...cells(row.tuned),
    ...(has("baseline") ? cells(row.baseline) : []),
    ...(has("constant") ? [short(row.constant)] : []),
  ]);
  const items = part.rows.length > 30;
  const whole = rows.filter((_, n) => !items || /^(overall|total)\./.test(part.rows[n].name));
  place(
    "figures",
    part.split,
    `${SPLITS[part.split]}（有効な応答 ${part.answered}）`,
    el("div", { class: "sheet" }, table(head, whole)),
    items ? itemTable(part, known) : null,
    known ? null : el("p", { class: "soft" }, FEW),
  );
}

// The score task: an item a row, its measures side by side.
function itemTable(part, known) {
  const found = new Map(part.rows.map((row) => [row.name, row]));
  const value = (item, measure, side) => {
    const row = found.get(`${item}.${measure}`);
    return row && row[side] ? short(row[side].score) : "-";
  };
  const rows = page.cases.items.map((item) => {
    const mse = found.get(`${item}.mse`);
    return [
      item,
      value(item, "mse", "tuned"),
      ...(known ? [mse && mse.tuned ? span(mse.tuned) : "-"] : []),
      value(item, "mse", "baseline"),
      mse ? short(mse.constant) : "-",
      value(item, "mae", "tuned"),
      value(item, "accuracy", "tuned"),
      value(item, "accuracy_within_1", "tuned"),
      value(item, "spearman", "tuned"),
    ];
  });
  return el(
    "div",
    { class: "sheet" },
    table(
      [
        "項目",
        "MSE",
        ...(known ? ["95%区間"] : []),
        "基準のMSE",
        "定数予測のMSE",
        "MAE",
        "一致率",
        "1点差以内",
        "順位相関",
      ],
      rows,
    ),
  );
}

function drawTotals(rows) {
  const size = Math.min(420, Math.max(280, at("totals-plot").clientWidth)),
    left = 40,
    bottom = 40;
  const x = (value) => left + ((size - left - 10) * value) / 100,
    y = (value) => size - bottom - ((size - bottom - 10) * value) / 100;
  const plot = shape("svg", {
    width: size,
    height: size,
    role: "img",
    "aria-label": "予測した合計点と実際の合計点",
  });
  for (let value = 0; value <= 100; value += 20)
    plot.append(
      shape("path", {
        class: "grid",
        d: `M${x(value)} ${y(0)}V${y(100)}M${x(0)} ${y(value)}H${x(100)}`,
      }),
      shape("text", { x: x(value), y: y(0) + 16, "text-anchor": "middle" }, String(value)),
      shape("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, String(value)),
    );
  plot.append(
    shape("path", { class: "cross", d: `M${x(0)} ${y(0)}L${x(100)} ${y(100)}` }),
    shape(
      "text",
      { x: x(50), y: size - 6, "text-anchor": "middle" },
      "実際（横）と予測（縦）。点線は一致",
    ),
  );
  for (const row of rows)
    for (const [side, kind] of [
      ["baseline", "base-dot"],
      ["tuned", "tuned-dot"],
    ])
      if (row[side] && row[side].total !== undefined)
        plot.append(
          shape(
            "circle",
            { class: kind, cx: x(row.total), cy: y(row[side].total), r: 4 },
            shape("title", {}, `${row.id}: 実際 ${row.total}、予測 ${row[side].total}`),
          ),
        );
  at("totals-plot").append(plot);
}
const withTotals = page.cases.rows.filter((row) => row.total !== undefined);
if (withTotals.length) {
  at("totals").hidden = false;
  const dot = (kind) =>
    shape("svg", { width: 12, height: 12 }, shape("circle", { class: kind, cx: 6, cy: 6, r: 4 }));
  at("totals-legend").append(el("span", {}, dot("tuned-dot"), "学習後"));
  if (withTotals.some((row) => row.baseline))
    at("totals-legend").append(el("span", {}, dot("base-dot"), "基準"));
  drawTotals(withTotals);
}

// The cases: an empty box for each, filled as it comes near the view --------------------------

const { rows: all, messages, figures } = page.cases;
const hasRival = all.some((row) => row.baseline);
let shown = [],
  boxes = [],
  current = -1,
  figure = 0;

const pointOf = (row, side) =>
  row[side] && row[side].scores ? (row[side].scores[figure] ?? null) : null;
function difference(row) {
  const [a, b] = [pointOf(row, "tuned"), pointOf(row, "baseline")];
  return a === null || b === null ? null : a - b;
}
const sign = () => (figures.length ? naming(figures[figure]).better || 1 : 1);
// What cases are sorted by: how much worse than the baseline's the answer is, else how bad.
const badness = (row) => -sign() * ((hasRival ? difference(row) : pointOf(row, "tuned")) ?? NaN);

const JUDGED = ["負け", "引き分け", "勝ち", "判定なし", undefined];
const ORDERS = {
  worst: [hasRival ? "差が悪い順" : "点が悪い順", (a, b) => badness(b) - badness(a)],
  best: [hasRival ? "差が良い順" : "点が良い順", (a, b) => badness(a) - badness(b)],
  low: ["学習後の点が悪い順", (a, b) => sign() * (pointOf(a, "tuned") - pointOf(b, "tuned"))],
  score: ["評価点が低い順", (a, b) => a.score - b.score],
  judge: ["審査で負けた順", (a, b) => JUDGED.indexOf(a.judge) - JUDGED.indexOf(b.judge)],
  data: ["データの順", () => 0],
};
const OUTCOMES = {
  worse: ["悪くなった", (row) => sign() * difference(row) < 0],
  better: ["良くなった", (row) => sign() * difference(row) > 0],
  same: ["同じ", (row) => difference(row) === 0],
  fault: [
    "応答なし・無効・途中で切れた",
    (row) => ["tuned", "baseline"].some((side) => row[side] && (row[side].fault || row[side].cut)),
  ],
};

function options(select, pairs) {
  at(select).append(...pairs.map(([value, label]) => el("option", { value }, label)));
}
const folded = (text) => text.normalize("NFKC").toLowerCase();
let haystacks = null;
function haystack(row, n) {
  haystacks ??= messages.map(([, text]) => folded(text));
  const own = [row.id, row.topic, row.reference, row.tuned.text, row.baseline && row.baseline.text];
  return (
    own.some((text) => text && folded(text).includes(n)) ||
    (row.context || []).some((place) => haystacks[place].includes(n))
  );
}

function chosen() {
  const [split, topic, outcome] = ["split", "topic", "outcome"].map((id) => at(id).value);
  const least = at("least").value,
    most = at("most").value,
    words = folded(at("words").value).split(/\s+/).filter(Boolean);
  const found = all.filter(
    (row) =>
      (!split || row.split === split) &&
      (!topic || row.topic === topic) &&
      (!outcome || OUTCOMES[outcome][1](row)) &&
      (least === "" || row.score >= Number(least)) &&
      (most === "" || row.score <= Number(most)) &&
      words.every((word) => haystack(row, word)),
  );
  const compare = ORDERS[at("order").value][1];
  // What has no value to sort by stands at the end.
  return found.sort((a, b) => {
    const order = compare(a, b);
    return Number.isNaN(order) ? missing(a) - missing(b) : order;
  });
}
function missing(row) {
  const value = at("order").value === "score" ? row.score : badness(row);
  return value === undefined || Number.isNaN(value) ? 1 : 0;
}

const link = (id) => "#case=" + encodeURIComponent(id);
function guessedHeight(row) {
  const length = Math.max(
    ...[row.reference, row.tuned.text, row.baseline && row.baseline.text].map(
      (text) => (text || "").length,
    ),
  );
  return page.cases.items.length ? 60 : 84 + 25 * Math.ceil(length / 22);
}
const watcher = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) if (entry.isIntersecting) fillBox(entry.target);
  },
  { rootMargin: "1500px" },
);

function list() {
  shown = chosen();
  watcher.disconnect();
  boxes = shown.map((row, n) => {
    const box = el("article", { class: "case", tabindex: "-1", id: "case=" + row.id });
    box.style.minHeight = guessedHeight(row) + "px";
    box.number = n;
    return box;
  });
  at("list").replaceChildren(...boxes);
  boxes.forEach((box) => watcher.observe(box));
  current = -1;
  at("count").textContent = `${shown.length} / ${all.length}件`;
}

function fillBox(box) {
  if (box.firstChild) return;
  watcher.unobserve(box);
  box.style.minHeight = "";
  box.append(...drawCase(shown[box.number]));
}

function drawCase(row) {
  const parts = [
    el("a", { class: "id", href: link(row.id) }, row.id),
    el("span", { class: "soft" }, SPLITS[row.split]),
  ];
  if (row.topic) parts.push(el("span", {}, row.topic));
  if (row.score !== undefined) parts.push(el("span", { class: "soft" }, `評価点 ${row.score}`));
  if (row.judge) parts.push(el("span", {}, `審査: ${row.judge}`));
  if (figures.length) {
    const gap = difference(row),
      name = figures[figure];
    const told = [`${naming(name).label} ${short(pointOf(row, "tuned"))}`];
    if (row.baseline) told.push(`基準 ${short(pointOf(row, "baseline"))}`);
    parts.push(
      el(
        "span",
        { class: "scores" },
        told.join("、"),
        " ",
        gap === null ? null : el("span", { class: "delta " + tone(name, gap) }, short(gap, "+")),
      ),
    );
  }
  const made = [el("header", {}, ...parts)];
  if (row.context) made.push(drawContext(row));
  made.push(page.cases.items.length && row.items ? drawItems(row) : drawAnswers(row));
  if (row.reasons && row.reasons.length)
    made.push(
      el(
        "details",
        {},
        el("summary", {}, "審査の理由"),
        ...row.reasons.map((reason) => el("div", { class: "said" }, reason)),
      ),
    );
  return made;
}

function drawContext(row) {
  const said = row.context.map((place) => messages[place]);
  const last = said.length ? said[said.length - 1][1].replace(/\s+/g, " ") : "";
  const box = el(
    "details",
    {},
    el(
      "summary",
      {},
      `文脈 ${said.length}発話 — ${last.length > 60 ? last.slice(0, 60) + "…" : last}`,
    ),
  );
  box.addEventListener("toggle", () => {
    if (box.childNodes.length > 1) return;
    box.append(
      ...said.map(([role, text]) =>
        el(
          "div",
          { class: "said " + (role === "assistant" ? role : "") },
          el("small", {}, ROLES[role] || role),
          text,
        ),
      ),
    );
  });
  return box;
}

function drawAnswer(title, said) {
  const more = [
    said.tokens === undefined ? "" : `${said.tokens}トークン`,
    said.seconds === undefined ? "" : `${said.seconds.toFixed(2)}秒`,
    said.cut ? "途中で切れています" : "",
  ].filter(Boolean);
  return el(
    "div",
    { class: "answer" },
    el("h4", {}, title),
    said.text || null,
    said.fault ? el("div", { class: "fault" }, said.fault) : null,
    more.length ? el("div", {}, el("small", {}, more.join("、"))) : null,
  );
}

function drawAnswers(row) {
  const box = el("div", { class: "answers" });
  if (row.reference !== undefined)
    box.append(el("div", { class: "answer" }, el("h4", {}, "実際"), row.reference));
  box.append(drawAnswer("学習後", row.tuned));
  if (row.baseline) box.append(drawAnswer("基準", row.baseline));
  return box;
}

function drawItems(row) {
  const of = (said, n) => (said && said.items ? String(said.items[n]) : "-");
  const lines = page.cases.items.map((item, n) => [
    item,
    String(row.items[n]),
    of(row.tuned, n),
    ...(row.baseline ? [of(row.baseline, n)] : []),
  ]);
  const total = (said) =>
    said && said.total !== undefined ? String(said.total) : said && said.fault ? said.fault : "-";
  const head = ["合計点", `実際 ${row.total}`, `学習後 ${total(row.tuned)}`];
  if (row.baseline) head.push(`基準 ${total(row.baseline)}`);
  return el(
    "details",
    {},
    el("summary", {}, head.join(" / ")),
    table(["項目", "実際", "学習後", ...(row.baseline ? ["基準"] : [])], lines),
  );
}

function go(index) {
  if (!boxes.length) return;
  current = Math.max(0, Math.min(boxes.length - 1, index));
  for (let n = Math.max(0, current - 12); n < Math.min(boxes.length, current + 13); n++)
    fillBox(boxes[n]);
  boxes[current].scrollIntoView({ block: "start" });
  boxes[current].focus({ preventScroll: true });
  history.replaceState(null, "", link(shown[current].id));
}

function follow() {
  if (!location.hash.startsWith("#case=")) return;
  const id = decodeURIComponent(location.hash.slice(6));
  let index = shown.findIndex((row) => row.id === id);
  if (index < 0 && all.some((row) => row.id === id)) {
    for (const box of ["split", "topic", "outcome", "least", "most", "words"]) at(box).value = "";
    list();
    index = shown.findIndex((row) => row.id === id);
  }
  if (index >= 0) go(index);
}

if (all.length) {
  at("cases").hidden = false;
  const unique = (values) => [...new Set(values)].filter((value) => value !== undefined);
  const hasScores = figures.length > 0;
  const hasOwn = all.some((row) => row.score !== undefined);
  const possible = {
    worst: hasScores, best: hasScores, low: hasScores && hasRival, score: hasOwn, data: true,
    judge: all.some((row) => row.judge),
  };
  options(
    "order",
    Object.entries(ORDERS)
      .filter(([name]) => possible[name])
      .map(([value, [label]]) => [value, label]),
  );
  if (page.cases.main === "judge") at("order").value = "judge";
  options(
    "figure",
    figures.map((name, n) => [n, naming(name).label]),
  );
  options("split", [
    ["", "すべて"],
    ...unique(all.map((row) => row.split)).map((split) => [split, SPLITS[split]]),
  ]);
  options("topic", [
    ["", "すべて"],
    ...unique(all.map((row) => row.topic))
      .sort()
      .map((topic) => [topic, topic]),
  ]);
  options("outcome", [
    ["", "すべて"],
    ...Object.entries(OUTCOMES)
      .filter(([name]) => name === "fault" || (hasRival && hasScores))
      .map(([value, [label]]) => [value, label]),
  ]);
  at("figure-label").hidden = figures.length < 2;
  at("topic-label").hidden = !all.some((row) => row.topic);
  at("score-label").hidden = !hasOwn;
  for (const id of ["order", "split", "topic", "outcome"]) at(id).addEventListener("change", list);
  at("figure").addEventListener("change", () => {
    figure = Number(at("figure").value);
    list();
  });
  let wait = 0;
  for (const id of ["least", "most", "words"])
    at(id).addEventListener("input", () => {
      clearTimeout(wait);
      wait = setTimeout(list, 150);
    });
  list();
  addEventListener("hashchange", follow);
  addEventListener("keydown", (event) => {
    if (
      event.ctrlKey ||
      event.metaKey ||
      event.altKey ||
      /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.nodeName)
    )
      return;
    if (event.key === "j") go(current + 1);
    else if (event.key === "k") go(current - 1);
    else if (event.key === "/") {
      at("words").focus();
      event.preventDefault();
    } else if (event.key === "o" && current >= 0) {
      const context = boxes[current].querySelector("details");
      if (context) context.open = !context.open;
    }
  });
  const PRINTED = 100;
  addEventListener("beforeprint", () => {
    boxes.slice(0, PRINTED).forEach(fillBox);
    boxes.forEach((box, n) => {
      box.hidden = n >= PRINTED;
    });
    at("printed").textContent =
      shown.length > PRINTED
        ? `先頭の${PRINTED}件を印刷しています（絞り込むと、その結果を印刷します）。`
        : "";
  });
  addEventListener("afterprint", () =>
    boxes.forEach((box) => {
      box.hidden = false;
    }),
  );
  follow();
}

// The end ------------------------------------------------------------------------------------

at("settings").append(el("h3", {}, "同じ実行をするコマンド"), el("pre", {}, page.command));
for (const part of page.settings)
  at("settings").append(
    el(
      "details",
      { class: "settings" },
      el("summary", {}, part.title),
      el("div", { class: "sheet" }, table(null, part.rows)),
    ),
  );
if (page.files.length)
  at("settings").append(
    el(
      "details",
      { class: "settings" },
      el("summary", {}, "ファイルとsha256"),
      el(
        "div",
        { class: "sheet" },
        table(
          null,
          page.files.map(([name, sum]) => [name, el("code", {}, sum)]),
        ),
      ),
    ),
  );
</script>
</body>
</html>
"""
