"""The command line of ``openai_sft``: each flag calls a method of :class:`OpenAISFT`.

Results go to stdout, everything else to stderr. Exit codes: 0 done; 2 bad input, no key, too few
examples, over budget, nobody to agree to the price; 1 the service or a failed job; 130 / 143
Ctrl-C / SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import logging
import math
import re
import shlex
import shutil
import signal
import statistics
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from openai_sft import (
    DIALECTS,
    GROUPS,
    OPENAI_BASE_URL,
    SPLIT_LABELS,
    TRACKERS,
    CheckItem,
    ConfigurationError,
    CostEstimate,
    Declined,
    EvaluationResults,
    FileFindings,
    Finding,
    OpenAISFT,
    OpenAISFTError,
    Price,
    RunOptions,
    RunRow,
    Speakers,
    ToBeDeployed,
    __version__,
    check_file,
    explain_api_error,
    fix_file,
    folder_flag,
    printable,
    printable_lines,
)

if TYPE_CHECKING:
    from types import FrameType

    from openai.types.fine_tuning import FineTuningJob

DESCRIPTION = """\
対話データ（既定: KokoroChat）でチャットモデルを学習させ、評価します。
読み込み、8:1:1分割、変換、料金の確認、アップロード、学習、評価、保存の順です。"""

EXAMPLES = """\
例:
  openai-sft --rehearse                    キーも料金もなしで全体を試す
  openai-sft --data-only                   データと料金を確かめる（キー不要）
  openai-sft --max-samples 20 --epochs 1   少量で本番を試す
  openai-sft                               全データで学習して評価する
  openai-sft --evaluate-only               最後に学習したモデルを評価する
  openai-sft --resume                      中断した実行を再開する

終了コード: 0 完了、1 サービスの失敗、2 入力・設定・予算、130/143 中断"""


class Terminated(KeyboardInterrupt):
    """SIGTERM, brought to the same place as Ctrl-C."""


# What a line is broken between: ASCII words, katakana words, and single characters that keep
# what may not begin a line.
WORDS = r"[!-~]+[）、。」]* ?|[ァ-ヺー]+[）、。」]*|.[ぁぃぅぇぉっゃゅょ）、。」]*"


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Wraps by what a terminal shows: a full-width character takes two columns."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return wrapped(text, width)


def wrapped(text: str, width: int) -> list[str]:
    """``text`` in lines of at most so many columns."""
    lines, line = [], ""
    for word in re.findall(WORDS, text):
        if line and columns(line + word.rstrip()) > width:
            lines.append(line.rstrip())
            line = ""
        line += word
    return [*lines, line.rstrip()]


def columns(text: str) -> int:
    """Columns of a terminal that ``text`` takes."""
    return sum(2 if unicodedata.east_asian_width(c) in "WFA" else 1 for c in text)


class Parser(argparse.ArgumentParser):
    """Speaks Japanese about a wrong command line; exit code 2."""

    MESSAGES = (
        (r"unrecognized arguments: (.*)", r"不明なオプションです: \1"),
        (r"argument (\S+): expected one argument", r"\1 には値が1つ必要です"),
        (r"argument (\S+): expected at least one argument", r"\1 には値が必要です"),
        (r"argument (\S+): invalid choice: (.*) \(choose from (.*)\)", r"\1 は \3 のどれかです"),
        (r"argument (\S+): ignored explicit argument .*", r"\1 に値は付けられません"),
        (r"argument (\S+): not allowed with argument (\S+)", r"\1 と \2 は同時に使えません"),
        (r"argument (\S+): (.*)", r"\1: \2"),
    )

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line, and end."""
        for pattern, japanese in self.MESSAGES:
            if re.fullmatch(pattern, message):
                message = re.sub(pattern, japanese, message)
                break
        self.exit(2, f"エラー: {message}\n使い方: openai-sft --help\n")


def number(kind: Callable[[str], Any], name: str, *, auto: bool = False) -> Callable[[str], Any]:
    """An argparse type for ``kind``; the library checks the range."""

    def parse(text: str) -> Any:
        if auto and text == "auto":
            return text
        try:
            value = kind(text)
            if not math.isfinite(value):
                raise ValueError(text)
            return value
        except ValueError:
            allowed = f"{name}か auto " if auto else name
            raise argparse.ArgumentTypeError(
                f"{allowed}で指定してください（指定: {text}）"
            ) from None

    return parse


def filled(text: str) -> str:
    """The argparse type of a text: an empty one is a shell variable that isn't set."""
    if not text.strip():
        raise argparse.ArgumentTypeError("値が空です")
    return text


def text_of(path: str) -> str:
    """The argparse type of a file, which stands for its text."""
    try:
        text = Path(filled(path)).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(
            f"{printable(path)} をUTF-8のテキストとして読めません（{printable(error)}）"
        ) from None
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{printable(path)} は空です")
    return text


def turns(text: str) -> Any:
    """The argparse type of ``--eval-turns``."""
    return text if text in ("last", "all") else number(int, "整数か last、all ")(text)


# The argparse types of numbers.
INTEGER, REAL = number(int, "整数"), number(float, "数")
INTEGER_OR_AUTO, REAL_OR_AUTO = number(int, "整数", auto=True), number(float, "数", auto=True)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = Parser(
        prog="openai-sft",
        usage="openai-sft [指定 ...]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=lambda prog: HelpFormatter(prog, max_help_position=29, width=80),
        add_help=False,
        allow_abbrev=False,
    )
    add_mode(parser)
    add_data(parser)
    add_choice(parser)
    add_training(parser)
    add_local(parser)
    add_evaluation(parser)
    add_judge(parser)
    add_money(parser)
    add_place(parser)
    return parser


def add_mode(parser: argparse.ArgumentParser) -> None:
    """What is done; one of these, or the whole path."""
    group = parser.add_argument_group("実行する処理（指定しなければ全工程）")
    only = group.add_mutually_exclusive_group()
    only.add_argument(
        "--data-only", action="store_true", help="データの作成と料金の計算だけをする（キー不要）"
    )
    only.add_argument("--evaluate-only", action="store_true", help="学習済みモデルの評価だけをする")
    only.add_argument(
        "--resume",
        type=filled,
        nargs="?",
        const=True,
        metavar="RUN",
        help="中断した実行を続きから再開する（既定: 最新のもの）",
    )
    only.add_argument(
        "--job-id", type=filled, metavar="ID", help="ジョブの完了を待つ（ほかで作成したジョブも可）"
    )
    only.add_argument("--cancel", type=filled, metavar="ID", help="ジョブを取り消す")
    only.add_argument(
        "--list", action="store_true", help="保存先の実行記録とサービスのジョブを一覧表示する"
    )
    only.add_argument(
        "--check", action="store_true", help="いま実行できる状態かを確認する（料金なし）"
    )
    only.add_argument(
        "--check-file",
        type=filled,
        metavar="PATH",
        help="JSONLファイルの問題をすべて挙げる（キー不要）",
    )
    only.add_argument(
        "--report",
        type=filled,
        nargs="?",
        const=True,
        metavar="RUN",
        help="実行のページ（report_*.html）を、保存したファイルから作り直す（既定: 最新のもの）",
    )
    only.add_argument(
        "--export",
        type=filled,
        metavar="DIR",
        help="--local で学習したモデルを、アダプターを統合してフォルダーに書き出す",
    )
    add_details(group)


def add_details(group: argparse._ArgumentGroup) -> None:
    """What goes with some of these."""
    group.add_argument(
        "--fix",
        action="store_true",
        help="--check-file で、直したファイルと直せない行のファイルも作る",
    )
    group.add_argument(
        "--report-without-texts",
        action="store_true",
        help="--report で、対話と応答の文章を含まないページを作る",
    )
    group.add_argument(
        "--json", action="store_true", help="--check、--check-file、--list をJSONで表示する"
    )
    group.add_argument(
        "--model-id", type=filled, metavar="ID", help="評価するモデル（既定: 最後に学習したもの）"
    )
    group.add_argument(
        "--rehearse",
        action="store_true",
        help="ローカルの模擬エンドポイントで全体を試す（キーも料金も不要）",
    )
    group.add_argument(
        "--version", action="version", version=__version__, help="バージョンを表示する"
    )
    group.add_argument("-h", "--help", action="help", help="この説明を表示する")


def add_data(parser: argparse.ArgumentParser) -> None:
    """What is read."""
    group = parser.add_argument_group("データ")
    group.add_argument(
        "--dataset",
        type=filled,
        metavar="SOURCE",
        help="Hubの名前、フォルダー、JSON・JSONL・CSV・Parquetのファイル"
        "（既定: UEC-InabaLab/KokoroChat）",
    )
    group.add_argument(
        "--revision", type=filled, metavar="REV", help="Hubのデータの版（既定: 最新）"
    )
    group.add_argument(
        "--config", type=filled, metavar="NAME", help="Hubのデータの構成（複数あるとき）"
    )
    for flag, whose in (("--assistant", "応答を学習する"), ("--user", "その相手の")):
        group.add_argument(
            flag,
            type=filled,
            nargs="+",
            default=(),
            metavar="NAME",
            help=f"{whose}話者の名前。first は先に話す人、second は次に話す人",
        )
    group.add_argument(
        "--resplit", action="store_true", help="公開時の分割を使わず、全体を8:1:1に分け直す"
    )
    group.add_argument(
        "--skip-unreadable",
        action="store_true",
        help="読めないものが1%%を超えても、名前を挙げて除いて進める",
    )
    group.add_argument(
        "--long-examples",
        choices=("split", "drop", "refuse"),
        default="split",
        metavar="HOW",
        help="上限トークンを超える対話を split（発話の切れ目で分割）、drop（除く）、"
        "refuse（中止）のどれにするか（既定: split）",
    )
    group.add_argument(
        "--export-for",
        choices=("user-first",),
        metavar="FORM",
        help="user-first は、ほかの学習ツール向けに、ユーザーの発話で始まるファイルも作る",
    )
    group.add_argument(
        "--system-prompt", type=filled, metavar="TEXT", help="各対話の先頭に置く指示（既定: なし）"
    )


def add_choice(parser: argparse.ArgumentParser) -> None:
    """How dialogues are chosen and split.

    These are passed on only where they are given: --evaluate-only holds them against the split
    that the model was trained on.
    """
    group = parser.add_argument_group("対話の選び方と分け方", argument_default=argparse.SUPPRESS)
    group.add_argument(
        "--max-samples", type=INTEGER, metavar="N", help="使う対話の数（既定: 全部）"
    )
    group.add_argument("--seed", type=INTEGER, metavar="N", help="乱数の種（既定: 42）")
    for flag, text in (("--min-score", "以上"), ("--max-score", "以下")):
        group.add_argument(
            flag, type=REAL, metavar="X", help=f"評価点（0〜100）がX{text}の対話だけを使う"
        )
    group.add_argument(
        "--topics",
        type=filled,
        nargs="+",
        metavar="TOPIC",
        help="この話題（日本語か英語）の対話だけを使う",
    )
    group.add_argument(
        "--exclude-flagged",
        action="store_true",
        help="離脱や、有害・倫理違反の指摘がある対話を除く",
    )
    group.add_argument(
        "--group-by",
        choices=GROUPS,
        metavar="WHO",
        help="counselor、client、pair のどれかを複数の分割にまたがらせない",
    )


def add_training(parser: argparse.ArgumentParser) -> None:
    """How the model is trained."""
    group = parser.add_argument_group("学習")
    group.add_argument(
        "--task",
        choices=("response", "score"),
        metavar="TASK",
        help="response（応答、既定）か score（クライアントの評価20項目の予測）",
    )
    group.add_argument(
        "--model", type=filled, metavar="NAME", help="元のモデル（既定: gpt-4o-mini-2024-07-18）"
    )
    group.add_argument(
        "--epochs",
        type=INTEGER_OR_AUTO,
        default=10,
        metavar="N",
        help="エポック数、1〜50か auto（既定: 10）",
    )
    group.add_argument(
        "--batch-size",
        type=INTEGER_OR_AUTO,
        default=32,
        metavar="N",
        help="バッチサイズ、1〜256か auto（既定: 32）",
    )
    group.add_argument(
        "--learning-rate-multiplier",
        type=REAL_OR_AUTO,
        metavar="X",
        help="学習率の倍率、正の数か auto（既定: サービスに任せる）",
    )
    group.add_argument(
        "--learning-rate",
        type=REAL,
        metavar="X",
        help="学習率そのもの（nebius。既定: サービスに任せる）",
    )
    group.add_argument(
        "--training-type",
        type=filled,
        metavar="NAME",
        help="学習の種類（azure では必須: Standard、GlobalStandard、Developer など）",
    )
    group.add_argument(
        "--timeout", type=REAL, metavar="SECONDS", help="ジョブを待つ時間の上限（既定: なし）"
    )
    group.add_argument(
        "--suffix", type=filled, metavar="NAME", help="モデル名に付ける名前、64文字まで"
    )


def add_local(parser: argparse.ArgumentParser) -> None:
    """Training on one's own machine."""
    group = parser.add_argument_group("このマシンでの学習（pip install 'openai-sft[local]'）")
    group.add_argument(
        "--local",
        type=filled,
        metavar="MODEL",
        help="OpenAIの代わりに、このモデル（Hubの名前かフォルダー、試すだけなら tiny）をこの"
        "マシンで学習する（キーも料金も不要）",
    )
    group.add_argument(
        "--local-launcher",
        type=filled,
        metavar="CMD",
        help="複数のGPUやマシンで学習するコマンド（例: 'torchrun --nproc_per_node 8'）",
    )
    group.add_argument(
        "--full",
        action="store_true",
        dest="local_full",
        help="LoRAではなく、すべてのパラメーターを学習する",
    )
    group.add_argument(
        "--serve-url",
        type=filled,
        dest="local_serve_url",
        metavar="URL",
        help="応答をまかせるvLLMのURL（既定: このプロセスの中で応答する）",
    )


def add_evaluation(parser: argparse.ArgumentParser) -> None:
    """What is asked of the model."""
    group = parser.add_argument_group("評価")
    group.add_argument(
        "--max-test-cases",
        type=INTEGER,
        default=10,
        metavar="N",
        help="テスト・検証それぞれで評価する件数、0は全部（既定: 10）",
    )
    group.add_argument(
        "--baseline",
        type=filled,
        nargs="?",
        const=True,
        metavar="MODEL",
        help="同じケースを元のモデル（またはMODEL）にも解かせて比べる",
    )
    group.add_argument(
        "--eval-turns",
        type=turns,
        default=1,
        metavar="N",
        help="対話ごとに評価する発話: 件数、last（最後）、all（全部）（既定: 1）",
    )
    group.add_argument(
        "--checkpoint",
        type=filled,
        default=argparse.SUPPRESS,
        metavar="WHICH",
        help="評価するチェックポイント: last（最後）、best（検証の損失が最も低いもの）、ID"
        "（既定: last）",
    )
    group.add_argument(
        "--main-figure",
        type=filled,
        metavar="NAME",
        help="比較の判定をする指標。聞く前に決める（既定: rouge_l、score では overall.mse）",
    )
    add_answering(group)


def add_answering(group: argparse._ArgumentGroup) -> None:
    """How it is asked."""
    group.add_argument(
        "--concurrency",
        type=INTEGER,
        default=8,
        metavar="N",
        help="同時に送るリクエスト数（既定: 8）",
    )
    group.add_argument(
        "--max-tokens",
        type=INTEGER,
        default=1024,
        metavar="N",
        help="1つの応答の最大トークン数（既定: 1024）",
    )
    group.add_argument(
        "--temperature",
        type=REAL,
        default=0.0,
        metavar="X",
        help="応答のばらつき、0〜2（既定: 0）",
    )
    group.add_argument(
        "--timeout-per-answer",
        type=REAL,
        metavar="SECONDS",
        help="1つの応答を待つ時間の上限（既定: 600）",
    )


def add_judge(parser: argparse.ArgumentParser) -> None:
    """Who says which of two answers is better."""
    group = parser.add_argument_group("審査")
    group.add_argument(
        "--judge",
        type=filled,
        metavar="MODEL",
        help="テストの応答を、基準のモデルか実際の応答と2つずつMODELに比べさせる",
    )
    group.add_argument(
        "--judge-base-url",
        type=filled,
        metavar="URL",
        help="審査するモデルの接続先（既定: 評価するモデルと同じ）",
    )
    group.add_argument(
        "--judge-against",
        choices=("baseline", "reference"),
        metavar="WHOM",
        help="比べる相手: baseline（--baseline があれば既定）か reference（実際の応答）",
    )
    group.add_argument(
        "--judge-rubric",
        type=text_of,
        metavar="FILE",
        help="審査の基準を書いたテキストファイル（既定: カウンセリングの基準）",
    )


def add_money(parser: argparse.ArgumentParser) -> None:
    """What it may cost."""
    group = parser.add_argument_group("料金")
    group.add_argument(
        "--max-cost-usd", type=REAL, metavar="X", help="見積もりがこの額（ドル）を超えたら中止する"
    )
    group.add_argument(
        "--yen-per-dollar",
        type=REAL,
        default=150.0,
        metavar="X",
        help="円換算に使う1ドルあたりの円（仮定、既定: 150）",
    )
    for flag, text in (
        ("--price-training", "学習"),
        ("--price-input", "学習済みモデルの入力"),
        ("--price-output", "学習済みモデルの出力"),
        ("--price-base-input", "元のモデル（か比べるMODEL）の入力"),
        ("--price-base-output", "元のモデル（か比べるMODEL）の出力"),
    ):
        group.add_argument(
            flag, type=REAL, metavar="X", help=f"{text}の単価（100万トークンあたりのドル）"
        )
    group.add_argument(
        "--yes", action="store_true", help="料金の確認を省く（端末がないときは支払いに必要）"
    )


def add_place(parser: argparse.ArgumentParser) -> None:
    """Where it is sent and written, and how much is said."""
    group = parser.add_argument_group("接続と出力")
    group.add_argument(
        "--base-url", type=filled, metavar="URL", help="OpenAI互換エンドポイント（既定: OpenAI）"
    )
    group.add_argument(
        "--dialect",
        choices=tuple(DIALECTS),
        metavar="NAME",
        help=f"サービスの方言: {'、'.join(DIALECTS)}（既定: ホスト名で選ぶ）",
    )
    group.add_argument(
        "--deployment",
        type=filled,
        metavar="NAME",
        help="--resume と --evaluate-only で、学習済みモデルを配置（デプロイ）した名前",
    )
    group.add_argument(
        "--download-weights",
        type=filled,
        metavar="DIR",
        help="学習の後に、重みのファイルをフォルダーにダウンロードする（渡すサービスだけ）",
    )
    group.add_argument(
        "--output-dir",
        type=filled,
        default="openai_sft_outputs",
        metavar="DIR",
        help="保存先（既定: openai_sft_outputs）",
    )
    group.add_argument(
        "--poll-interval",
        type=REAL,
        default=10.0,
        metavar="SECONDS",
        help="ジョブを見に行く間隔（既定: 10）",
    )
    group.add_argument(
        "--tables",
        action="store_true",
        help="評価の最後に、指標と比較の表、ファイルの一覧も表示する",
    )
    group.add_argument(
        "--report-to",
        choices=tuple(TRACKERS),
        metavar="WHERE",
        help="損失、指標、ページ（文章なし）を wandb、trackio、tensorboard のどれかにも記録する",
    )
    loudness = group.add_mutually_exclusive_group()
    loudness.add_argument("--quiet", action="store_true", help="警告と結果だけを表示する")
    loudness.add_argument("--verbose", action="store_true", help="詳しい記録も表示する")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of a command line whose flags belong together."""
    parser = build_parser()
    options = parser.parse_args(argv)
    for given, flag, needed, modes in (
        (
            options.model_id,
            "--model-id",
            options.evaluate_only or options.export,
            "--evaluate-only か --export",
        ),
        (
            options.deployment,
            "--deployment",
            options.resume is not None or options.evaluate_only,
            "--resume か --evaluate-only",
        ),
        (
            options.download_weights,
            "--download-weights",
            not any(
                (
                    *(options.check, options.check_file, options.list, options.cancel),
                    *(options.report, options.export, options.data_only, options.evaluate_only),
                )
            ),
            "学習、--resume、--job-id のどれか",
        ),
        (options.fix, "--fix", options.check_file, "--check-file"),
        (options.report_without_texts, "--report-without-texts", options.report, "--report"),
        (
            options.json,
            "--json",
            options.check or options.check_file or options.list,
            "--check、--check-file、--list のどれか",
        ),
    ):
        if given and not needed:
            parser.error(f"{flag} は {modes} と一緒に指定してください")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without ✓ shows ? instead
    options = parse(argv)
    if options.check_file:
        return check(options)
    sft: OpenAISFT | None = None
    try:
        with sigterm_as_interrupt():
            sft = connect(options)
            with sft:
                return run(sft, options)
    except KeyboardInterrupt as interrupt:
        tell("中断しました。" + (sft.describe_remote_state() if sft else ""))
        return 143 if isinstance(interrupt, Terminated) else 130
    except ToBeDeployed as error:
        tell(str(error))
        return 2 if options.evaluate_only else 0
    except OpenAISFTError as error:
        fail(str(error), sft)
        return error.exit_code
    except OSError as error:
        fail(f"ファイルを読み書きできません（{printable(error)}）。", sft)
        return 1
    except Exception as error:
        # The SDK's errors end in one line too; it isn't imported here to name them, for then
        # even --help would wait for it. Anything else is a defect and keeps its traceback.
        if not is_sdk_error(error):
            raise
        fail(explain_api_error(error), sft)
        return 1


def connect(options: argparse.Namespace) -> OpenAISFT:
    """The instance that the flags describe."""
    sft = OpenAISFT(
        model=options.model,
        base_url=options.base_url,
        dialect=options.dialect,
        dataset=options.dataset,
        output_dir=options.output_dir,
        poll_interval=options.poll_interval,
        offline=options.data_only,
        allow_no_key=bool(options.check or options.list or options.export or options.report),
        rehearse=options.rehearse,
        local=options.local,
        local_launcher=options.local_launcher,
        local_full=options.local_full,
        local_serve_url=options.local_serve_url,
        export_for=options.export_for,
        report_to=options.report_to,
        verbose=not options.quiet,
        task=options.task,
        revision=options.revision,
        system_prompt=options.system_prompt,
        long_examples=options.long_examples,
        config=options.config,
        assistant=options.assistant,
        user=options.user,
        resplit=options.resplit,
        skip_unreadable=options.skip_unreadable,
        price=price_from(options),
        max_cost_usd=options.max_cost_usd,
        yen_per_dollar=options.yen_per_dollar,
        confirm=None if options.rehearse else confirm_with(options),
        trust=lambda url: on_terminal() and asks(f"この実行の接続先 {url} にAPIキーを送りますか？"),
    )
    if options.verbose:
        logging.getLogger("openai_sft").setLevel(logging.DEBUG)
    return sft


def fail(reason: str, sft: OpenAISFT | None) -> None:
    """The error, and how to come back where something goes on at the service."""
    tell(f"エラー: {reason}")
    if sft is not None and sft.goes_on_remotely:
        tell(sft.describe_remote_state())


def run(sft: OpenAISFT, options: argparse.Namespace) -> int:
    """Do what the flags ask for, show what comes of it, return the exit code."""
    if options.check:
        return show_check(sft.check(), as_json=options.json)
    if options.list:
        return list_runs(sft, options)
    if options.cancel:
        return cancel(sft, options)
    if options.report:
        named = None if options.report is True else options.report
        show([f"report: {sft.write_report(named, texts=not options.report_without_texts)}"])
        return 0
    if options.export:
        show([f"export: {sft.export_weights(options.export, options.model_id)}"])
        return 0
    names = {"max_samples", "seed", "max_test_cases"} | RunOptions.__annotations__.keys()
    sample = {name: value for name, value in vars(options).items() if name in names}
    if options.data_only:
        show(sft.prepare_data(options.epochs, **sample).lines())
        show_files(sft)
        return 0
    outcome = train_or_evaluate(sft, options, sample)
    if isinstance(outcome, EvaluationResults) and not options.tables:
        show(screen(sft, outcome))
        return 0
    code = show_outcome(outcome)
    show_files(sft)
    if isinstance(outcome, EvaluationResults):
        show(what_now(sft, outcome))
    return code


def train_or_evaluate(
    sft: OpenAISFT, options: argparse.Namespace, sample: dict[str, Any]
) -> EvaluationResults | FineTuningJob | None:
    """Call the method that the flags ask for among those that pay."""
    if options.evaluate_only:
        return sft.run_evaluation(options.model_id, deployment=options.deployment, **sample)
    begun = {name: getattr(options, name) for name in ("timeout", "download_weights")}
    begun["checkpoint"] = sample.get("checkpoint")
    if options.job_id:
        return sft.attach(options.job_id, **begun)
    if options.resume is not None:
        named = None if options.resume is True else options.resume
        places = {name: getattr(options, name) for name in ("judge_base_url", "deployment")}
        return sft.resume(named, **begun, **places)
    return sft.run_full_pipeline(
        options.epochs,
        options.batch_size,
        **sample,
        learning_rate_multiplier=options.learning_rate_multiplier,
        learning_rate=options.learning_rate,
        training_type=options.training_type,
        suffix=options.suffix,
        timeout=options.timeout,
        download_weights=options.download_weights,
    )


def show_outcome(results: EvaluationResults | FineTuningJob | None) -> int:
    """The results of an evaluation, a job, or that there was nothing to resume."""
    if results is None:
        show(["再開する実行はありません。"])
    elif isinstance(results, EvaluationResults):
        show_results(results)
    else:
        show([f"ジョブ: {printable(results.id)}（{printable(results.status)}）"])
        show([f"モデル: {printable(results.fine_tuned_model or 'なし')}"])
        return 0 if results.status == "succeeded" else 1
    return 0


def cancel(sft: OpenAISFT, options: argparse.Namespace) -> int:
    """--cancel: asked about on a terminal; without one it goes on, for it costs nothing."""
    if not agrees(f"ジョブ {options.cancel} を取り消しますか？", options):
        raise Declined("中止しました。")
    show([f"{options.cancel}: {printable(sft.cancel_job(options.cancel).status)}"])
    return 0


def show_check(items: Sequence[CheckItem], *, as_json: bool) -> int:
    """--check: a line an item; 1 where one fails."""
    if as_json:
        show([json.dumps([asdict(item) for item in items], ensure_ascii=False, indent=2)])
    else:
        show(str(item) for item in items)
    return 1 if any(item.level == "fail" for item in items) else 0


def list_runs(sft: OpenAISFT, options: argparse.Namespace) -> int:
    """--list: the runs recorded here at once, then what the endpoint adds to them."""
    if options.json:
        rows = [asdict(row) for row in sft.list_runs()]
        show([json.dumps(rows, ensure_ascii=False, indent=2)])
        return 0
    recorded: list[RunRow] = []

    def show_recorded(rows: list[RunRow]) -> None:
        recorded.extend(rows)
        if rows:
            show_runs(rows)
            sys.stdout.flush()

    added = [row for row in sft.list_runs(first=show_recorded) if row not in recorded]
    if recorded and added:
        show(["", "サービスから分かったこと:"])
    if added or not recorded:
        show_runs(added)
    return 0


def show_runs(rows: Sequence[RunRow]) -> None:
    """A table aligned by what a terminal shows, and cut to fit where it is one."""
    table = [["実行", "ジョブ", "状態", "モデル", "備考"]]
    for row in rows:
        cells = (row.run_id, row.job_id, row.status, row.model, row.note)
        table.append([printable("-" if cell is None else cell) for cell in cells])
    if not any(row.note for row in rows):
        table = [cells[:-1] for cells in table]
    if sys.stdout.isatty():
        table = fitted(table, shutil.get_terminal_size().columns)
    show(padded(table))


def fitted(table: Sequence[Sequence[str]], width: int) -> list[list[str]]:
    """The runs in ``width`` columns: the models are cut first, then the statuses, then the jobs.

    What ``--resume`` takes is never cut.
    """
    widths = widths_of(table)
    excess = sum(widths) + 2 * (len(widths) - 1) - width
    for index, least in ((3, 12), (2, 9), (1, 20)):
        cut = max(0, min(excess, widths[index] - least))
        widths[index] -= cut
        excess -= cut
    return [list(map(without_middle, cells, widths)) for cells in table]


def without_middle(text: str, width: int) -> str:
    """``text``, or its beginning and its end, in at most ``width`` columns."""
    kept, short = len(text), text
    while columns(short) > width:
        kept -= 1
        short = f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}"
    return short


def widths_of(table: Sequence[Sequence[str]]) -> list[int]:
    """How wide each column of a table is on a terminal."""
    return [max(map(columns, column)) for column in zip(*table, strict=True)]


def padded(table: Sequence[Sequence[str]]) -> Iterator[str]:
    """The rows of a table, padded by what a terminal shows."""
    widths = widths_of(table)
    for row in table:
        cells = (c + " " * (w - columns(c)) for c, w in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()


def aligned(table: Sequence[Sequence[str]]) -> Iterator[str]:
    """The rows of a table, padded; a long first column is cut to fit the terminal."""
    rest = sum(width + 2 for width in widths_of(table)[1:])
    room = max(shutil.get_terminal_size().columns - rest, 20)
    return padded([[shortened(head, room), *cells] for head, *cells in table])


def shortened(text: str, width: int) -> str:
    """``text``, or its beginning and two dots, in at most ``width`` columns."""
    if columns(text) <= width:
        return text
    while columns(text) > width - 2:
        text = text[:-1]
    return text + ".."


def check(options: argparse.Namespace) -> int:
    """--check-file: what the file is and what is wrong with it on stdout; 2 where an error is left,
    also after --fix."""
    speakers = Speakers(tuple(options.assistant), tuple(options.user))
    try:
        findings = check_file(options.check_file, speakers=speakers)
        fixed = fix_file(options.check_file, speakers=speakers) if options.fix else None
        left = check_file(fixed[0]) if fixed else findings
    except OpenAISFTError as error:
        tell(f"エラー: {error}")
        return 2
    except OSError as error:
        tell(f"エラー: ファイルを書けません（{printable(error)}）。")
        return 2
    show_findings(findings, as_json=options.json)
    rejected = 0
    if fixed:
        path, rejects, examples, rejected = fixed
        tell(f"直したファイル: {path}（{examples:,}件）、直せないもの: {rejects}（{rejected:,}件）")
        for finding in left.errors:
            tell(f"直したファイルにも残る問題: {finding}")
    if not options.json:
        show(next_command(options, left))
    return 2 if left.errors or rejected else 0


SHOWN_OF_A_KIND = 5


def show_findings(findings: FileFindings, *, as_json: bool) -> None:
    """What a file is, then its findings by their kinds: errors first, the first lines of each."""
    if as_json:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")  # whatever the locale
        show([json.dumps([asdict(f) for f in findings], ensure_ascii=False, indent=2)])
        return
    show([f"{printable(findings.path)}: {findings.description}"])
    kinds: dict[str, list[Finding]] = {}
    for finding in sorted(findings, key=lambda finding: finding.severity):
        kinds.setdefault(finding.code, []).append(finding)
    for code, found in kinds.items():
        label = "エラー" if found[0].severity == "error" else "注意"
        show(["", f"{label} [{code}] {len(found):,}件 → {found[0].remedy}"])
        show(f"  {finding.place}: {finding.text}" for finding in found[:SHOWN_OF_A_KIND])
        if len(found) > SHOWN_OF_A_KIND:
            show([f"  ほか{len(found) - SHOWN_OF_A_KIND:,}件"])
    errors = len(findings.errors)
    total = f"エラー{errors:,}件、注意{len(findings) - errors:,}件"
    show(["", total if findings else "問題はありません。"])


def next_command(options: argparse.Namespace, findings: FileFindings) -> Iterator[str]:
    """What to do after the check, or after the file was mended."""
    codes = {finding.code for finding in findings.errors}
    if "unknown_speaker" in codes:
        yield "次は: " + command("--check-file", options.check_file, "--assistant", "NAME")
    elif codes == {"too_few_examples"}:
        yield "次は: 学習例を増やしてください。"
    elif codes and not options.fix:
        speakers = {"--assistant": options.assistant, "--user": options.user}
        flags = [f for flag, names in speakers.items() if names for f in (flag, *names)]
        yield "次は: " + command("--check-file", options.check_file, *flags, "--fix")
    elif not codes:
        yield "次は: " + command("--data-only", "--dataset", str(findings.path))


def command(*arguments: str) -> str:
    """A command line to copy."""
    return printable("openai-sft " + shlex.join(arguments))


def price_from(options: argparse.Namespace) -> Price | None:
    """The price given by flags: all three, with both of the base model or without; or none."""
    prices = (options.price_training, options.price_input, options.price_output)
    base = (options.price_base_input, options.price_base_output)
    if {*prices, *base} == {None}:
        return None
    if None in prices:
        raise ConfigurationError(
            "単価は --price-training、--price-input、--price-output の3つを指定してください。"
        )
    if None in base and base != (None, None):
        raise ConfigurationError(
            "元のモデルの単価は --price-base-input、--price-base-output の2つを指定してください。"
        )
    return Price(*prices, *base)


def show_files(sft: OpenAISFT) -> None:
    """What was written."""
    show(f"{kind}: {path}" for kind, path in sft.files.items())


def show_results(results: EvaluationResults) -> None:
    """What an evaluation found, figure by figure; the file holds the answers."""
    show([f"モデル: {printable(results['model_id'])}"])
    for name, label in SPLIT_LABELS.items():
        part = results[f"{name}_evaluation"]
        void = f"、うち{part['invalid_cases']}件は無効" if part["invalid_cases"] else ""
        if part["cut_cases"]:
            void += f"、うち{part['cut_cases']}件は途中で切れています（finish_reason: length）"
        show(
            [
                f"{label}: {part['evaluated_cases']}件に応答{void}、{part['failed_cases']}件失敗"
                f"（対話{part['total_test_cases']}件中）"
            ]
        )
    for table in results.tables():
        show(["", *aligned(table)])
    show(f"判定（テスト）: {sentence}" for sentence in results.sentences())
    if "cost" in results:
        show([f"実費: ${results['cost']['total_usd']:,.4f}"])
    if results.get("rehearsal"):
        show([f"注意: {results['note']}"])


# What an evaluation ends with: it fits SCREEN lines, with one for the next prompt.
SCREEN = 24
SPARKS = "▁▂▃▄▅▆▇█"


def screen(sft: OpenAISFT, results: EvaluationResults) -> Iterator[str]:
    """The losses, the verdict, two answers side by side and what now, on one screen."""
    width = min(shutil.get_terminal_size().columns, 100)
    head = list(itertools.chain(*(wrapped(line, width) for line in headlines(results))))
    now = list(what_now(sft, results))  # to be copied: the terminal itself breaks its lines
    taken = len(head) + sum(-(-columns(line) // width) for line in now)
    yield from head
    if shown := list(sample_answers(results, width, SCREEN - 3 - taken)):
        yield from ("", *shown)
    yield from ("", *now)


def headlines(results: EvaluationResults) -> Iterator[str]:
    """What was found, in few lines."""
    yield f"モデル: {printable(results['model_id'])}"
    yield from loss_lines(results.get("training", {}))
    counts = []
    for name, label in SPLIT_LABELS.items():
        part = results[f"{name}_evaluation"]
        asked = part["evaluated_cases"] + part["failed_cases"]
        kinds = (("失敗", "failed"), ("無効", "invalid"), ("途中で切れた応答", "cut"))
        faults = [f"{kind}{part[f'{key}_cases']}件" for kind, key in kinds if part[f"{key}_cases"]]
        told = f"（{'、'.join(faults)}）" if faults else ""
        counts.append(f"{label} {part['evaluated_cases']}/{asked}件{told}")
    cost = f"、実費 ${results['cost']['total_usd']:,.4f}" if "cost" in results else ""
    yield f"応答: {'、'.join(counts)}{cost}"
    sentences = results.sentences()
    yield from (f"判定（テスト）: {sentence}" for sentence in sentences)
    if not sentences:
        yield "判定: 比べる相手がないため、していません（--baseline で元のモデルと比べます）。"
    if results.get("rehearsal"):
        yield f"注意: {results['note']}"


def loss_lines(training: Mapping[str, Any]) -> Iterator[str]:
    """How the losses went, and where that of validation was lowest."""
    rows = training.get("metrics") or ()
    full = any(row.get("full_valid_loss") is not None for row in rows)
    valid = "full_valid_loss" if full else "valid_loss"
    for label, name in (("学習", "train_loss"), ("検証", valid)):
        losses = [row[name] for row in rows if row.get(name) is not None]
        if losses:
            yield f"{label}の損失 {sparkline(losses)} {losses[0]:.4f} → {losses[-1]:.4f}"
    if told := training.get("loss_sentence"):
        yield told


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """The values as bars of eight heights, means of neighbours where there are many."""
    count = min(width, len(values))
    edges = [n * len(values) // count for n in range(count + 1)]
    means = [statistics.fmean(values[a:b]) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    return "".join(SPARKS[round(7 * (x - low) / (high - low or 1))] for x in means)


def sample_answers(results: EvaluationResults, width: int, room: int) -> Iterator[str]:
    """As many answers as there is ``room`` for, two at most: the tuned model's beside the
    baseline's, or beside the real one; the middle one by the main figure, then the worst."""
    if results.get("task") == "score":
        return
    said = [r for r in results["test_evaluation"]["responses"] if "output" in r]
    main = results["settings"]["main_figure"]
    said.sort(key=lambda response: response["scores"].get(main, 0.0))
    rivals = results.get("baseline", {}).get("test_evaluation", {}).get("responses", {})
    column = (width - 3) // 2
    chosen = {id(r): r for r in (said[len(said) // 2], said[0])} if said else {}
    for number, mine in enumerate(chosen.values()):
        lines = min(3, (room - number * 5) - 2)
        if lines < 1:
            return
        heads = ("学習後", "基準のモデル" if rivals else "実際の応答")
        other = (
            rivals.get(mine["case_id"], {}).get("output", "（応答なし）")
            if rivals
            else mine["reference"]
        )
        asked = printable(str(mine["input"][-1].get("content") or ""))
        which = ("中ほどの例", "最も低い例")[number]
        yield shortened(f"{which}（{mine['case_id']}）クライアント: {asked}", width)
        sides = [fitted_text(printable(text), column, lines) for text in (mine["output"], other)]
        for left, right in itertools.zip_longest(
            [heads[0], *sides[0]], [heads[1], *sides[1]], fillvalue=""
        ):
            yield f"{left}{' ' * (column - columns(left))} │ {right}"


def fitted_text(text: str, width: int, lines: int) -> list[str]:
    """``text`` in at most so many lines, its end cut where it doesn't fit."""
    found = wrapped(text, width)
    if len(found) > lines:
        found = [*found[: lines - 1], shortened(found[lines - 1] + "……", width)]
    return found


def what_now(sft: OpenAISFT, results: EvaluationResults) -> Iterator[str]:
    """Where the page is, how to use the model, and the next command."""
    if "report" in sft.files:
        yield f"ページ: {sft.files['report']}"
    if results.get("rehearsal"):
        yield f"次は、本番の件数と料金を確かめる（キー不要）: {command('--data-only')}"
        return
    if "weights" in sft.files:
        yield f"重み: {sft.files['weights']}"
    if sft.settings.local is None and results.get("task") != "score":
        url = printable(results.get("base_url") or "")
        url = "" if url in ("", OPENAI_BASE_URL) else f'base_url="{url}"'
        yield "このモデルを使うには:"
        yield 'from openai import OpenAI; said = [{"role": "user", "content": "眠れません"}]'
        yield f'model = "{printable(results["model_id"])}"'
        create = f"OpenAI({url}).chat.completions.create"
        yield f"{create}(model=model, messages=said).choices[0].message"
    yield from next_step(sft, results)


def next_step(sft: OpenAISFT, results: EvaluationResults) -> Iterator[str]:
    """To ask all cases, with what that costs; else to hand the page on."""
    place = shlex.split(folder_flag(sft.output_dir))
    more = results.get("all_cases")
    if more is None:
        yield "次は、対話と応答の文章を含まない、人に渡せるページを作る:"
        yield command("--report", "--report-without-texts", *place)
        return
    training = results.get("training", {})
    spent = training.get("actual_usd")
    share = f"、学習の{more['usd'] / spent:.1%}" if spent else ""
    price = f"約${more['usd']:,.2f}{share}" if more["usd"] else "無料"
    is_newest = training.get("run_id") == results["run_id"]
    model = () if is_newest else ("--model-id", results["model_id"])
    flags = ("--evaluate-only", *model, "--baseline", "--max-test-cases", "0")
    yield f"次は、全{more['cases']:,}件を {printable(more['baseline'])} と比べる（{price}）:"
    yield command(*flags, *shlex.split(sft.settings.flags), *place)


def show(lines: Sequence[str] | Iterator[str]) -> None:
    """Results, on stdout."""
    for line in lines:
        sys.stdout.write(printable_lines(line) + "\n")


def tell(line: str) -> None:
    """Everything else, on stderr."""
    sys.stderr.write(printable_lines(line) + "\n")


def confirm_with(options: argparse.Namespace) -> Callable[[CostEstimate], bool]:
    """Show the price, and ask on a terminal unless ``--yes``; without one only ``--yes`` pays."""

    def confirm(estimate: CostEstimate) -> bool:
        if options.quiet:
            for line in estimate.lines():
                tell(line)
        if not (options.yes or on_terminal()):
            # Nobody has said no, so the run isn't declined and can be resumed.
            raise ConfigurationError(
                "料金を確認する端末がないため中止しました。この先は何も送信していません。"
                "この料金でよければ --yes を付けてください。"
            )
        return agrees("この料金で進めますか？", options)

    return confirm


def agrees(question: str, options: argparse.Namespace) -> bool:
    """The answer on a terminal; without one, or with ``--yes``, it is yes."""
    return options.yes or not on_terminal() or asks(question)


def asks(question: str) -> bool:
    """The answer of somebody on a terminal."""
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().casefold() in ("y", "yes", "はい")


def on_terminal() -> bool:
    """Whether somebody can be asked."""
    return sys.stdin is not None and sys.stdin.isatty()


def is_sdk_error(error: Exception) -> bool:
    """True for an ``openai.OpenAIError``, without importing openai for it."""
    openai = sys.modules.get("openai")
    return openai is not None and isinstance(error, openai.OpenAIError)


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Within, SIGTERM raises :class:`Terminated`."""

    def terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    sys.exit(main())
