"""Runs whose pages are tested: a rehearsal, the same with the texts of an enemy, and larger."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

from helpers import AWKWARD, read_json

from openai_sft import OpenAISFT
from openai_sft_report import render

SPLITS = ("test_evaluation", "valid_evaluation")


class Rehearsed(NamedTuple):
    """What a rehearsal has left."""

    record: dict[str, Any]
    results: dict[str, Any]

    def page(self, **changes: Any) -> str:
        return render(self.record, self.results, **{"files": {}, **changes})


def rehearse(folder: Path, **options: Any) -> Rehearsed:
    own = {name: options.pop(name) for name in ("task", "dataset") if name in options}
    sft = OpenAISFT(rehearse=True, output_dir=folder, verbose=False, **own)
    with sft:
        sft.run_full_pipeline(**{"baseline": True, "max_test_cases": 0, **options})
        files = sft.files
    return Rehearsed(read_json(files["record"]), read_json(files["comprehensive_evaluation"]))


def responses(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """All answers, of both models."""
    for split in SPLITS:
        yield from results[split]["responses"]
        yield from results["baseline"][split]["responses"].values()


HOSTILE = (
    '</script><script>pwned = 1</script><img src=x onerror="pwned = 1"><!-- {{data}} {{policy}} '
    f"]]> &lt;b&gt; \\u003cscript> {AWKWARD}"
)


def poisoned(rehearsed: Rehearsed, text: str = HOSTILE) -> Rehearsed:
    """The same with ``text`` wherever others have the say."""
    record, results = deepcopy(rehearsed.record), deepcopy(rehearsed.results)
    record["settings"] |= {"model": text, "dataset": text, "system_prompt": text}
    record |= {"job_status": "failed", "job_error": {"code": text, "message": text}}
    results |= {"model_id": text, "note": text}
    results["settings"]["main_figure"] = text
    results["baseline"]["model_id"] = text
    results["training"]["checkpoints"][0]["model"] = text
    for response in responses(results):
        response |= {"output": text, "error": text}
    for split in SPLITS:
        for response in results[split]["responses"]:
            response |= {"reference": text, "topic": text, "case_id": response["case_id"] + text}
            response["input"] = [{"role": text, "content": text}, {"role": "user", "content": text}]
        results[split]["missing_metrics"] = [text]
    return Rehearsed(record, results)


def enlarged(rehearsed: Rehearsed, count: int) -> Rehearsed:
    """The same with ``count`` cases as KokoroChat has them: 45 messages of 29 characters before
    the turn, as the mean over its dialogues is, and an answer of 90."""
    results = deepcopy(rehearsed.results)
    likeness = results["test_evaluation"]["responses"][0]
    theirs = results["baseline"]["test_evaluation"]["responses"][likeness["case_id"]]
    results["test_evaluation"]["responses"] = mine = []
    results["baseline"]["test_evaluation"]["responses"] = base = {}
    for number in range(count):
        said = [
            {"role": ("user", "assistant")[n % 2], "content": f"{number:5}:{n:3}" + "言" * 20}
            for n in range(45)
        ]
        case_id = f"{number}:45"
        texts = {"output": f"{number:6}" + "答" * 84, "reference": f"{number:6}" + "真" * 84}
        mine.append({**likeness, **texts, "case_id": case_id, "input": said})
        base[case_id] = {**theirs, "output": texts["output"] + "基"}
    results["valid_evaluation"]["responses"] = []
    return Rehearsed(rehearsed.record, results)
