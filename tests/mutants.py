"""Break the project in one small way at a time, and see that a test notices.

    python tests/mutants.py [-j N] [--texts] [NAME ...]

A mutant is a text that stands exactly once in a file, and what takes its place. For each one (or
those whose name holds a NAME) a copy of the project is mutated and the test runs that should
fail; where it passes, the whole suite. Prints whether each was killed, and a sum.
Ends with 1 where one survives, can't be imported, or its text isn't there exactly once; with 2
where the tests fail without any mutant. ``--texts`` only looks for the texts. ``-j`` is how many
run at once. Needs what the tests need, and nothing more.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(
    *(".git", "__pycache__", ".venv", ".*_cache", ".hypothesis", "*.egg-info", "build", "dist"),
    "openai_sft_outputs",
)
NAMED_SECONDS, SUITE_SECONDS = 180, 1200  # a run that takes longer hangs


class Mutant(NamedTuple):
    """``old`` becomes ``new``, and ``test`` should notice.

    Where ``old`` stands more than once, ``within`` names the function or class it is meant in.
    """

    name: str
    old: str
    new: str
    test: str
    within: str = ""
    file: str = "openai_sft.py"


EXAMPLE = "openai_sft_example.py"

MONEY = (
    Mutant(
        "reading: whoever speaks second is who speaks first",
        '(people, ("first", "second"), strict=False)',
        '(people, ("second", "first"), strict=False)',
        "test_reading.py::test_the_user_says_who_is_the_assistant",
    ),
    Mutant(
        "reading: a third speaker is taken for the user",
        "other = None if self.assistant and self.user else",
        'other = "user" if self.assistant and self.user else',
        "test_reading.py::test_where_both_sides_are_named_a_third_speaker_stops",
    ),
    Mutant(
        "reading: of speakers that are unknown only the first dialogue is looked at",
        "            unknown = unknown or error\n",
        "            raise\n",
        "test_reading.py::test_unknown_speakers_stop_with_all_of_them_their_keys_and_the_flags",
    ),
    Mutant(
        "reading: SYSTEM is an instruction though it answers",
        '"user" in spoken and "system" in spoken[spoken.index("user") :]',
        "False",
        "test_reading.py::test_every_form_is_read_from_a_table",
    ),
    Mutant(
        "reading: cp932 is guessed where most lines are UTF-8",
        "if sum(map(_is_utf8, foreign)) * 2 > len(foreign):",
        "if not foreign:",
        "test_reading.py::test_lines_in_utf_8_are_not_taken_for_another_encoding_that_could_hold_them_too",
    ),
    Mutant(
        "reading: half-width kana are as good as any",
        "key=lambda name: strange[name]",
        "key=lambda name: -strange[name]",
        "test_reading.py::test_of_two_encodings_that_could_be_the_one_without_strange_kana_is_meant",
    ),
    Mutant(
        "reading: a pretty-printed array is a broken first line",
        "return error.pos >= len(text)",
        "return False",
        "test_reading.py::test_every_form_is_read_from_every_container_in_every_encoding",
    ),
    Mutant(
        "reading: turns of other dialogues are mixed into one",
        'name = str(record.value.get(key)) if key else ""',
        'name = ""',
        "test_reading.py::test_rows_that_share_an_id_are_one_dialogue_however_they_are_mixed",
    ),
    Mutant(
        "reading: a table's tools have the parameters of all",
        "{key: _without_none(v) if isinstance(v, list) else v for key, v in row.items()}",
        "dict(row)",
        "test_reading.py::test_tools_of_a_table_have_no_parameters_of_other_rows_tools",
    ),
    Mutant(
        "reading: an instruction beside the turns is lost",
        "filter(None, (_system_of(record), *instructions))",
        "filter(None, instructions)",
        "test_reading.py::test_every_form_is_read_from_a_table",
    ),
    Mutant(
        "reading: a file for another purpose is a bad record",
        "        except OtherPurpose:\n            raise\n",
        "",
        "test_reading.py::test_a_file_for_another_purpose_is_refused_by_its_name",
    ),
    Mutant(
        "reading: what can be mended is read without a word",
        'reading.notes["直して読みます", text] += 1\n        elif',
        "pass\n        elif",
        "test_reading.py::test_the_encoding_of_a_file_is_said_where_it_is_not_utf_8",
    ),
    Mutant(
        "check: a file of another form passes",
        'problems.append(_Problem("other_form", None, (form.name,)))',
        "pass",
        "test_check_file.py::test_a_problem_is_named_with_its_line_and_message",
    ),
    Mutant(
        "check: an array passes for JSON Lines",
        'if file.layout != "lines":\n        yield',
        "if False:\n        yield",
        "test_check_file.py::test_a_json_array_is_not_what_the_service_takes_whatever_it_is_called",
    ),
    Mutant(
        "check: findings name the file that is not written",
        'place = _source_of(example["id"], self._sources)',
        "place = None",
        "test_check_file.py::test_data_with_an_error_is_refused_before_anything_is_sent",
    ),
    Mutant(
        "check: images are no matter to a model of text",
        "base in PRICES and base not in IMAGE_MODELS",
        "base in PRICES and False",
        "test_reading.py::test_images_are_refused_for_a_model_that_learns_from_text_alone",
    ),
    Mutant(
        "what was spent is forgotten at authorisation",
        "if most + spent > limit:",
        "if most > limit:",
        "test_recovery.py::test_what_the_record_says_was_paid_counts_before_a_job_is_asked_for",
    ),
    Mutant(
        "what training cost is forgotten by the stop over budget",
        "self.spent + (answers_usd or 0) > limit",
        "(answers_usd or 0) > limit",
        "test_recovery.py::test_an_evaluation_stops_where_its_answers_and_the_training_have_passed_the_limit",
    ),
    Mutant(
        "what is answered already is priced again",
        "missing = [item for item in items if item.question.key not in responses]",
        "missing = items",
        "test_asking.py::test_what_is_answered_already_is_not_held_against_the_limit_twice",
        within="Evaluation",
    ),
    Mutant(
        "enough costs what is asked",
        "more = dollars / asked * (enough - asked)",
        "more = 0.0",
        "test_asking.py::test_the_price_of_enough_stands_beside_the_price_before_it_is_asked_for",
    ),
    Mutant(
        "what was had before is paid again in the price of enough",
        "more = dollars / asked * (enough - asked)",
        "more = dollars / asked * enough",
        "test_asking.py::test_the_price_of_enough_stands_beside_the_price_before_it_is_asked_for",
    ),
    Mutant(
        "an answer of an earlier run is paid again",
        "reused = self.earlier(missing)",
        "reused: Mapping[str, Response] = {}",
        "test_asking.py::test_an_answer_that_an_earlier_run_has_had_is_used_and_not_paid_again",
    ),
    Mutant(
        "an answer of an earlier run is billed again",
        'if "reused_from" in line:',
        "if False:",
        "test_asking.py::test_an_answer_that_an_earlier_run_has_had_is_used_and_not_paid_again",
    ),
    Mutant(
        "another model's answer is taken",
        "asked = [self.place, model, list(self.messages), dict(self.options), self.number]",
        "asked = [self.place, list(self.messages), dict(self.options), self.number]",
        "test_asking.py::test_an_answer_to_another_model_or_with_other_settings_is_none",
    ),
    Mutant(
        "another endpoint's answer is taken",
        "asked = [self.place, model, list(self.messages), dict(self.options), self.number]",
        "asked = [model, list(self.messages), dict(self.options), self.number]",
        "test_asking.py::test_an_answer_of_another_endpoint_or_with_other_tools_is_none",
    ),
    Mutant(
        "an answer with other settings is taken",
        "asked = [self.place, model, list(self.messages), dict(self.options), self.number]",
        "asked = [self.place, model, list(self.messages), self.number]",
        "test_asking.py::test_an_answer_to_another_model_or_with_other_settings_is_none",
    ),
    Mutant(
        "an untuned baseline is priced as a tuned model",
        'base = baseline if baseline.startswith("ft:") else None',
        "base = baseline",
        "test_cost.py::test_a_baseline_is_asked_the_same_at_its_own_rate",
    ),
    Mutant(
        "an untuned baseline is paid as a tuned model",
        "return _baseline_rates(model, base, given, prices, is_base=is_base)",
        "return _baseline_rates(model, model, given, prices, is_base=is_base)",
        "test_asking.py::test_tokens_and_dollars_are_of_all_that_was_asked_of_both",
    ),
    Mutant(
        "an estimate has no margin",
        "MAX_EXAMPLE_TOKENS * 9 // 10",
        "MAX_EXAMPLE_TOKENS",
        "test_cost.py::test_without_a_vocabulary_counts_are_marked_as_estimates_and_the_run_goes_on",
    ),
    Mutant(
        "epochs are forgotten in the price",
        "_usd([training_tokens * epochs], [price.training])",
        "_usd([training_tokens], [price.training])",
        "test_cost.py::test_ten_epochs_of_kokorochat_on_4o_mini_cost_348_dollars_and_60_cents",
    ),
    Mutant(
        "answers are priced as questions",
        "rates.usd(evaluation_input_tokens, evaluation_output_tokens)",
        "rates.usd(evaluation_input_tokens + evaluation_output_tokens, 0)",
        "test_cost.py::test_each_known_model_is_priced_by_the_published_table",
    ),
    Mutant(
        "a given price is the baseline's too",
        "if given is not None and model == evaluated:",
        "if given is not None:",
        "test_asking.py::test_a_given_price_is_that_of_the_tuned_model_and_not_of_its_baseline",
        within="Ledger",
    ),
    Mutant(
        "a given price is the estimated baseline's too",
        "is_base=baseline == model",
        "is_base=True",
        "test_cost.py::test_the_base_rates_of_a_given_price_are_not_those_of_another_base_model",
    ),
    Mutant(
        "a given price is no other baseline's",
        "if rates is None and given is not None and given is not FREE:",
        "if False:",
        "test_cost.py::test_the_base_rates_of_a_given_price_are_those_of_a_baseline_that_the_table_does_not_know",
    ),
    Mutant(
        "what this machine does for nothing others do too",
        "if rates is None and given is not None and given is not FREE:",
        "if rates is None and given is not None:",
        "test_cost.py::test_what_this_machine_trains_and_answers_is_free_and_nothing_else",
    ),
    Mutant(
        "a tuned model is free wherever it is",
        '[2:3] == ["local"]',
        '[2:3] != [""]',
        "test_cost.py::test_what_this_machine_trains_and_answers_is_free_and_nothing_else",
    ),
    Mutant(
        "whatever is asked beside a model of this machine is free",
        "free = self._settings.local is not None and estimate.most_usd == 0",
        "free = self._settings.local is not None",
        "test_cost.py::test_a_free_run_passes_the_door_unasked_and_a_judge_elsewhere_does_not",
    ),
    Mutant(
        "a baseline without a price is sent to the flags of training",
        "if all(model == self.model and model not in others for model in self.unpriced):",
        "if self.unpriced:",
        "test_cost.py::test_what_is_unpriced_is_named_with_the_flags_that_price_it",
    ),
    Mutant(
        "rates are by the thousand tokens",
        "zip(tokens, rates, strict=True)) / 1e6",
        "zip(tokens, rates, strict=True)) / 1e3",
        "test_cost.py::test_each_known_model_is_priced_by_the_published_table",
    ),
    Mutant(
        "of two uploaded files the last is priced",
        "uploads[before.file_id] = before",
        "pass",
        "test_edges_money.py::test_of_two_files_that_were_uploaded_the_one_is_priced_that_is_trained_on",
    ),
    Mutant(
        "a file that changed since is priced as it is now",
        "if path and path.is_file() and _sha256_of(path) == upload.sha256:",
        "if path and path.is_file():",
        "test_edges_money.py::test_a_file_that_was_uploaded_and_changed_since_has_no_price_and_does_not_pass_the_limit",
    ),
    Mutant(
        "a file that is uploaded again is recorded twice",
        'uploads.pop(upload.file_id or "", None)',
        "pass",
        "test_edges_money.py::test_a_file_that_is_uploaded_again_after_another_is_the_same_file",
    ),
    Mutant(
        "an evaluation made step by step can not be resumed",
        'run.save(plan=replace(plan, asked=_sha256_of(run.file("asked"))))',
        "pass",
        "test_asking.py::test_an_evaluation_made_step_by_step_that_an_outage_ended_is_resumed_for_the_rest_alone",
    ),
    Mutant(
        "an evaluation made step by step that stopped keeps its record locked",
        "with _released_on_failure(run):\n            results = self._evaluate(run, asked, asking)",
        "with contextlib.nullcontext():\n            results = self._evaluate(run, asked, asking)",
        "test_asking.py::test_an_evaluation_made_step_by_step_that_an_outage_ended_is_resumed_for_the_rest_alone",
    ),
    Mutant(
        "an evaluation made step by step that ended is resumed and asks its failures again",
        "run.save(finished_at=_time_text(self._clock()))",
        "pass",
        "test_asking.py::test_a_second_evaluation_of_one_instance_has_a_record_without_the_plan_of_the_first",
        within="evaluate_model_comprehensive",
    ),
    Mutant(
        "cases that changed are asked",
        "if not path.exists() or _sha256_of(path) != sha256:",
        "if not path.exists():",
        "test_asking.py::test_cases_that_changed_since_an_evaluation_stopped_are_not_asked",
    ),
    Mutant(
        "a resumed evaluation has no mean to compare with",
        'return cls(**{**facts, "cases": cases})',
        'return cls(**{**facts, "cases": cases, "means": None})',
        "test_score_task.py::test_an_evaluation_that_is_resumed_compares_with_the_mean_that_it_began_with",
    ),
    Mutant(
        "a job that failed ends an evaluation beside it",
        'if self.plan.training is not None and self.job_status in ("failed", "cancelled"):',
        'if self.job_status in ("failed", "cancelled"):',
        "test_asking.py::test_a_job_beside_an_unfinished_evaluation_is_watched_and_the_evaluation_is_resumed",
    ),
    Mutant(
        "whoever watches a job pays for the evaluation beside it",
        'if run.kind != "pipeline" or not run.unfinished:',
        "if not run.unfinished:",
        "test_asking.py::test_a_job_beside_an_unfinished_evaluation_is_watched_and_the_evaluation_is_resumed",
    ),
    Mutant(
        "nobody is asked about an evaluation before its watch",
        'if "evaluation" not in run.passed:',
        "if False:",
        "test_edges_money.py::test_where_nobody_can_agree_to_the_evaluation_it_stops_before_the_watch_and_names_the_flag",
    ),
    Mutant(
        "an evaluation is asked about before its watch and after it",
        'self._ledger(run).require(estimate, "evaluation")',
        'self._ledger(run).require(estimate, "training")',
        "test_edges_money.py::test_a_watch_that_is_taken_up_asks_once_and_first_for_the_evaluation_at_the_price_agreed_to",
    ),
    Mutant(
        "before the watch an evaluation has the price of the base model",
        "both = _estimate_run(settings, splits, plan.training, None, plan.asking)",
        "both = _estimate_run(settings, splits, None, None, plan.asking)",
        "test_edges_money.py::test_a_watch_that_is_taken_up_asks_once_and_first_for_the_evaluation_at_the_price_agreed_to",
    ),
    Mutant(
        "an evaluation's price is that of its training",
        'elif "training" in doors or not (self._run.estimate or self._run.job_id):',
        'elif "training" in doors or not self._run.estimate:',
        "test_edges_money.py::test_the_price_of_an_evaluation_is_not_taken_for_that_of_a_training_of_untold_tokens",
    ),
    Mutant(
        "who has nothing left to ask is asked to pay",
        "if estimate.epochs is None and not asks:",
        "if False:",
        "test_asking.py::test_where_nothing_is_left_to_ask_nobody_is_asked_to_pay",
    ),
    Mutant(
        "the total counts itself",
        'cost["total_usd"] = sum(value for key, value in cost.items() if key != "total_usd")',
        'cost["total_usd"] = sum(cost.values())',
        "test_recovery.py::test_checkpoints_the_shutdown_date_and_the_real_cost_beside_the_estimate_are_recorded",
    ),
    Mutant(
        "earlier answers cost nothing",
        "paid = self._ledger.cost_of(self._journal.usage_by_model(), asked.evaluated) or 0.0",
        "paid = 0.0",
        "test_asking.py::test_what_the_answers_so_far_have_cost_counts_before_another_is_asked_for",
    ),
    Mutant(
        "training costs nothing before the evaluation",
        'return self._run.cost.get("training_usd", 0.0)',
        "return 0.0",
        "test_recovery.py::test_the_budget_covers_what_earlier_attempts_of_the_run_have_cost",
    ),
    Mutant(
        "an evaluation over the limit begins",
        "self._require_limit(estimate, spent)",
        '"evaluation" in doors or self._require_limit(estimate, spent)',
        "test_recovery.py::test_the_budget_covers_what_earlier_attempts_of_the_run_have_cost",
    ),
    Mutant(
        "an evaluation never stops over the limit",
        "return limit is not None and bool(answers_usd) and",
        "return False and",
        "test_recovery.py::test_an_evaluation_stops_where_its_answers_and_the_training_have_passed_the_limit",
    ),
    Mutant(
        "the limit itself is too much",
        "if most + spent > limit:",
        "if most + spent >= limit:",
        "test_pipeline.py::test_the_limit_itself_may_be_reached",
    ),
    Mutant(
        "the pool never halves",
        "max(1.0, self._bound / 2)",
        "max(1.0, self._bound)",
        "test_asking.py::test_a_wave_of_refusals_halves_once_what_is_asked_at_once",
    ),
    Mutant(
        "the pool never widens again",
        "self._bound + 1 / self._bound)",
        "self._bound)",
        "test_asking.py::test_answers_widen_again_what_is_asked_at_once",
    ),
    Mutant(
        "the pool halves at every refusal",
        "if wave == self._wave:",
        "if True:",
        "test_asking.py::test_a_wave_of_refusals_halves_once_what_is_asked_at_once",
    ),
    Mutant(
        "Retry-After is not heard",
        "return max(backoff, min(retry_after or 0.0, RETRY_SECONDS))",
        "return backoff",
        "test_recovery.py::test_the_services_own_retry_after_is_honoured_for_every_call",
    ),
    Mutant(
        "waiting does not double",
        "0.5 * 2.0 ** min(attempt, 10)",
        "0.5 * 2.0",
        "test_recovery.py::test_an_outage_of_any_length_is_survived_and_logged_once_with_its_length_and_its_end",
    ),
    Mutant(
        "waiting grows beyond a minute",
        "backoff = min(60.0, ",
        "backoff = min(600.0, ",
        "test_job.py::test_any_other_call_is_given_up_after_ten_minutes",
    ),
    Mutant(
        "a spent quota is tried again",
        '"insufficient_quota"',
        '"nothing"',
        "test_recovery.py::test_what_cannot_succeed_is_tried_once",
        within="is_transient",
    ),
    Mutant(
        "an empty account fails case by case",
        "if isinstance(error, (*final, openai.RateLimitError)):",
        "if isinstance(error, final):",
        "test_asking.py::test_an_error_that_meets_every_case_stops_at_once_and_leaves_no_thread",
    ),
    Mutant(
        "what isn't implemented is tried again",
        "status >= 500 and status not in MISSING_STATUSES",
        "status >= 500",
        "test_recovery.py::test_what_cannot_succeed_is_tried_once",
    ),
    Mutant(
        "training is billed at the rate of asking",
        "actual = _usd([job.trained_tokens], [price.training])",
        "actual = _usd([job.trained_tokens], [price.tuned_input])",
        "test_recovery.py::test_a_job_made_elsewhere_is_watched_to_its_end_and_priced_as_what_it_is",
    ),
    Mutant(
        "a failed job has cost nothing",
        "self._ledger.paid_training(job)  # what was trained",
        "pass  # what was trained",
        "test_recovery.py::test_the_tokens_of_a_job_that_failed_are_a_cost_too",
    ),
    Mutant(
        "the estimate knows no baseline",
        "counted, plan.asking)",
        "counted, replace(plan.asking, baseline=None))",
        "test_pipeline.py::test_the_price_that_is_confirmed_is_of_the_very_cases_that_will_be_asked",
        within="_price_run",
    ),
    Mutant(
        "the estimate knows no turns",
        "counted, plan.asking)",
        "counted, replace(plan.asking, eval_turns=1))",
        "test_pipeline.py::test_the_price_that_is_confirmed_is_of_the_very_cases_that_will_be_asked",
        within="_price_run",
    ),
    Mutant(
        "the estimate draws other cases",
        "counted, plan.asking)",
        "counted, replace(plan.asking, seed=0))",
        "test_pipeline.py::test_the_price_that_is_confirmed_is_of_the_very_cases_that_will_be_asked",
        within="_price_run",
    ),
    Mutant(
        "an example costs nothing besides its messages",
        "overhead = 3 + besides",
        "overhead = besides",
        "test_cost.py::test_tokens_are_counted_by_the_cookbooks_formula",
        within="count_many",
    ),
    Mutant(
        "a name is free",
        "overhead += 4 + besides",
        "overhead += 4",
        "test_cost.py::test_tokens_are_counted_by_the_cookbooks_formula",
    ),
    Mutant(
        "the form by turns is billed for the conversations before",
        "ends[end] - before + besides",
        "ends[end] + besides",
        "test_cost.py::test_the_data_stage_shows_the_spread_and_the_price_of_the_other_format",
        within="count_many",
    ),
    Mutant(
        "tools are free",
        "texts += own\n            overhead = 3 + besides",
        "overhead = 3",
        "test_cost.py::test_the_cookbooks_own_example_of_tools_has_its_101_tokens",
    ),
    Mutant(
        "what the formula for tools does not know is free",
        "return [_dump(rest)] if rest else []",
        "return []",
        "test_cost.py::test_nothing_of_a_tool_is_free",
    ),
    Mutant(
        "tools make no estimate",
        "exact_tokens=exact_tokens and not estimated,",
        "exact_tokens=exact_tokens,",
        "test_cost.py::test_tools_are_paid_for_in_every_example_and_that_is_called_an_estimate",
    ),
    Mutant(
        "a limit holds though images are of unknown size",
        "if estimate.images:\n            raise",
        "if False:\n            raise",
        "test_edges_money.py::test_no_limit_can_be_kept_with_images_and_nothing_is_sent",
    ),
    Mutant(
        "an image is paid for as its base64 text",
        "said = [part for part in value if not _is_image(part)]",
        "said = list(value)",
        "test_cost.py::test_an_image_is_never_counted_as_its_text_and_that_is_said",
    ),
    Mutant(
        "the schema of the scores is free",
        "if cases and request:",
        "if False:",
        "test_score_task.py::test_the_schema_that_goes_with_each_question_is_in_the_estimate",
    ),
    Mutant(
        "an untrained answer is a reference",
        '_is_trained(message["role"], message)\n        and messages',
        'message["role"] == "assistant"\n        and messages',
        "test_evaluation.py::test_an_answer_that_is_not_trained_on_is_context_and_never_a_reference",
    ),
    Mutant(
        "what is said after a tool is not asked",
        '["role"] in ("user", "tool")',
        '["role"] == "user"',
        "test_evaluation.py::test_what_is_said_after_a_tool_is_asked_with_the_tools",
    ),
    Mutant(
        "tool calls are free",
        "isinstance(value, str | list | dict)",
        "isinstance(value, str | dict)",
        "test_cost.py::test_what_a_tool_is_called_with_is_paid_for_as_its_json_text",
    ),
    Mutant(
        "a dollar is always 150 yen",
        "usd * self.yen_per_dollar",
        "usd * 150",
        "test_cost.py::test_yen_are_said_to_be_an_assumption",
    ),
    Mutant(
        "a tuned model's price is its last part's",
        'parts[1] if model.startswith("ft:") and',
        'parts[-1] if model.startswith("ft:") and',
        "test_cost.py::test_an_evaluation_alone_is_priced_at_the_rate_of_the_model_that_answers",
    ),
    Mutant(
        "a price may be negative",
        "math.isfinite(rate) and rate >= 0",
        "math.isfinite(rate)",
        "test_cli.py::test_what_makes_no_sense_together_ends_with_2_before_anything_is_sent",
    ),
    Mutant(
        "confirmation is not heard",
        "not self._confirm(estimate)",
        "self._confirm(estimate) is None",
        "test_pipeline.py::test_the_price_is_shown_and_confirmed_before_anything_is_sent",
    ),
    Mutant(
        "tokens of failed answers are free",
        "totals[name] += tokens",
        'totals[name] += tokens if "error" not in line else 0',
        "test_asking.py::test_an_answer_that_is_none_fails_its_case_and_is_named",
    ),
    Mutant(
        "the baseline of a tuned model is this instance's model",
        'return model.split(":")[1] if model.startswith("ft:") else base_model',
        "return base_model",
        "test_asking.py::test_the_base_model_is_read_from_the_models_name",
    ),
    Mutant(
        "a run without a price may be limited",
        "if limit is None:",
        "if limit is None or most is None:",
        "test_pipeline.py::test_over_the_budget_or_where_the_price_is_unknown_nothing_is_sent",
        within="_require_limit",
    ),
)
STATISTICS = (
    Mutant(
        "p below .1 is enough",
        "SIGNIFICANCE = 0.05",
        "SIGNIFICANCE = 0.1",
        "test_comparison.py::test_details_are_judged_by_the_adjusted_p_and_the_main_figure_by_its_own",
    ),
    Mutant(
        "a share of swaps forgets the sample",
        "(1 + extreme) / (1 + len(swaps))",
        "extreme / len(swaps)",
        "test_comparison.py::test_of_many_dialogues_that_many_swaps_are_drawn_and_the_sample_counts_as_one",
    ),
    Mutant(
        "p has one side",
        "return np.abs(figure.of(totals) -",
        "return (figure.of(totals) -",
        "test_comparison.py::test_p_is_the_share_of_swaps_with_a_difference_at_least_as_great",
    ),
    Mutant(
        "the seed of the swaps is fixed",
        "np.random.default_rng((seed, 1))",
        "np.random.default_rng(1)",
        "test_comparison.py::test_swaps_come_again_with_the_same_seed",
    ),
    Mutant(
        "few dialogues are swapped by chance",
        "exact = 2**units <= SWAPS + 1",
        "exact = False",
        "test_comparison.py::test_six_are_enough_where_all_are_won",
    ),
    Mutant(
        "one model alone is swapped",
        "figure.of(mine + others - totals)",
        "figure.of(others[None])",
        "test_comparison.py::test_p_is_the_share_of_swaps_with_a_difference_at_least_as_great",
    ),
    Mutant(
        "answers are swapped, not dialogues",
        "return self.dialogue_id if self.group is None else self.group",
        "return self.case_id",
        "test_comparison.py::test_answers_of_one_dialogue_are_swapped_together",
    ),
    Mutant(
        "groups are not kept together",
        "return self.dialogue_id if self.group is None else self.group",
        "return self.dialogue_id",
        "test_comparison.py::test_answers_of_one_group_are_swapped_together",
    ),
    Mutant(
        "several figures are judged as one",
        "min(1.0, (len(p_values) - rank) * p_values[index])",
        "min(1.0, p_values[index])",
        "test_comparison.py::test_holm_multiplies_the_least_p_by_their_number_and_keeps_the_order",
    ),
    Mutant(
        "Holm's p may fall",
        "least = max(least, min(1.0,",
        "least = max(0.0, min(1.0,",
        "test_comparison.py::test_holm_multiplies_the_least_p_by_their_number_and_keeps_the_order",
    ),
    Mutant(
        "the main figure is corrected too",
        "p_value if is_main else p_adjusted",
        "p_adjusted",
        "test_comparison.py::test_details_are_judged_by_the_adjusted_p_and_the_main_figure_by_its_own",
    ),
    Mutant(
        "details are not corrected",
        "p_value if is_main else p_adjusted",
        "p_value",
        "test_comparison.py::test_details_are_judged_by_the_adjusted_p_and_the_main_figure_by_its_own",
    ),
    Mutant(
        "five dialogues are enough",
        "2 / 2**units >= SIGNIFICANCE",
        "2 / 2**units >= 1",
        "test_comparison.py::test_five_dialogues_are_too_few_however_clear_and_it_is_said",
    ),
    Mutant(
        "an error is one of n",
        "math.sqrt((units - 1) * variance)",
        "math.sqrt(units * variance)",
        "test_figures.py::test_the_jackknifes_error_of_a_mean_is_the_textbooks",
    ),
    Mutant(
        "a long tail leaves the degrees of freedom",
        "max(MIN_FREEDOM, 2 * units / max(kurtosis - 1, 1e-9))",
        "freedom",
        "test_figures.py::test_an_error_that_rests_on_a_few_dialogues_is_known_with_fewer_degrees_of_freedom",
    ),
    Mutant(
        "an interval is one of 90 %",
        "return student_t(1 - SIGNIFICANCE / 2, self.freedom) * self.error",
        "return student_t(1 - SIGNIFICANCE, self.freedom) * self.error",
        "test_figures.py::test_the_jackknifes_error_of_a_mean_is_the_textbooks",
    ),
    Mutant(
        "the quantile of t is the normal one",
        "return z + math.fsum(",
        "return z + 0 * math.fsum(",
        "test_figures.py::test_the_quantiles_of_t_are_the_tables",
    ),
    Mutant(
        "Wilson's interval takes answers for dialogues",
        "known = spread.error > 0 and",
        "known = False and",
        "test_figures.py::test_the_interval_of_a_share_is_wilsons_with_ts_quantile",
    ),
    Mutant(
        "a mean of squares is as even as a mean",
        "third.error**2 + side",
        "0 * third.error**2 + side",
        "test_figures.py::test_the_interval_of_a_mean_of_squares_is_that_of_chi_square",
    ),
    Mutant(
        "few dialogues have an interval",
        "if figure.units < MIN_DIALOGUES:",
        "if figure.units < 2:",
        "test_figures.py::test_below_ten_dialogues_there_is_no_interval",
    ),
    Mutant(
        "a difference is not paired",
        "jackknife(figure.without_each(0) - figure.without_each(1))",
        "jackknife(figure.without_each(0))",
        "test_comparison.py::test_the_error_of_a_difference_is_that_of_pairs",
    ),
    Mutant(
        "what could be found is found in half of all samples",
        "return spread.half() + student_t(POWER, spread.freedom) * spread.error",
        "return spread.half()",
        "test_comparison.py::test_the_detectable_difference_is_found_in_80_of_100_samples",
    ),
    Mutant(
        "fewer errors are worse",
        "good = figure.better or 1",
        "good = 1",
        "test_score_task.py::test_the_lower_error_is_the_better_one_and_the_higher_accuracy",
    ),
    Mutant(
        "ties are losses",
        "ties = len(deltas) - wins - losses",
        "ties = len(deltas) - wins",
        "test_comparison.py::test_swapping_the_models_turns_everything_round",
    ),
    Mutant(
        "what one side left out is not counted",
        '"left_out_pairs": asked - len(both)',
        '"left_out_pairs": 0',
        "test_comparison.py::test_a_case_that_one_model_was_not_asked_is_left_out_and_counted",
    ),
    Mutant(
        "a pair that failed is not counted",
        "bool(one.fault or other.fault)",
        "bool(one.fault and other.fault)",
        "test_comparison.py::test_a_failed_answer_is_a_pair_that_is_lost_and_counted",
    ),
    Mutant(
        "pairs stand as they come",
        "[others[answer.case_id] for answer in both]",
        "list(others.values())[: len(both)]",
        "test_comparison.py::test_a_case_that_one_model_was_not_asked_is_left_out_and_counted",
    ),
    Mutant(
        "Dist counts all answers",
        "drawn = all_ - counts, DIST_DRAWN",
        "drawn = all_ - counts, int(all_.min())",
        "test_figures.py::test_dist_is_by_hypergeometric_chances",
    ),
    Mutant(
        "letters of another width are others",
        'output="" if answer.fault else unicodedata.normalize("NFKC", answer.output)',
        'output="" if answer.fault else answer.output',
        "test_figures.py::test_what_looks_the_same_is_the_same_in_every_figure",
    ),
    Mutant(
        "what failed says what it said",
        'output="" if answer.fault else',
        "output=",
        "test_figures.py::test_what_a_failed_answer_had_said_does_not_count",
    ),
    Mutant(
        "a back-channel is known by its letters",
        'kana).replace("のです", "んです")',
        "kana)",
        "test_figures.py::test_a_bare_back_channel_is_one_however_it_is_written",
    ),
    Mutant(
        "BLEU counts words",
        '_make_bleu("bleu_char", "char", sides)',
        '_make_bleu("bleu_char", "13a", sides)',
        "test_figures.py::test_chrf_and_bleu_are_what_sacrebleu_says",
    ),
    Mutant(
        "BLEU rewards the short",
        "np.minimum(0, 1 - real",
        "np.minimum(0, 0 * real",
        "test_figures.py::test_chrf_and_bleu_are_what_sacrebleu_says",
    ),
    Mutant(
        "chrF takes precision for recall",
        "np.where(below > 0, 500 * precision",
        "np.where(below > 0, 500 * recall",
        "test_figures.py::test_chrf_and_bleu_of_japanese_answers_are_what_sacrebleu_says",
    ),
    Mutant(
        "an invalid answer is filled with a guess",
        "np.where(2 * self.real > self.largest, 0.0, self.largest)",
        "np.full_like(self.real, self.largest / 2)",
        "test_score_task.py::test_the_worst_in_the_place_of_an_invalid_answer_is_on_the_far_side_of_the_real_score",
    ),
    Mutant(
        "an invalid answer correlates",
        "np.tile(np.arange(columns), (len(answers), 1)), scores.valid",
        "np.tile(np.arange(columns), (len(answers), 1)), scores.valid | True",
        "test_score_task.py::test_an_invalid_answer_is_in_no_correlation",
    ),
    Mutant(
        "the items' correlations are pooled",
        "np.tanh(z.mean(axis=1))",
        "z.mean(axis=1)",
        "test_score_task.py::test_the_correlation_of_all_items_is_the_mean_of_the_items_own_by_fishers_z",
    ),
    Mutant(
        "two points off are within one",
        '"accuracy_within_1": (misses <= 1)',
        '"accuracy_within_1": (misses <= 2)',
        "test_score_task.py::test_the_measures_agree_with_computation_by_hand",
    ),
    Mutant(
        "a prediction is cut, not rounded",
        "misses = np.abs(np.rint(filled) - real)",
        "misses = np.abs(np.floor(filled) - real)",
        "test_score_task.py::test_predictions_that_are_no_integers_are_rounded_for_the_accuracies_alone",
    ),
    Mutant(
        "the mean squared error is absolute",
        '"mse": (filled - real) ** 2',
        '"mse": np.abs(filled - real)',
        "test_score_task.py::test_of_two_errors_of_one_point_and_one_of_two_only_the_square_tells",
    ),
    Mutant(
        "the constant of the absolute error is the mean",
        '"mae": "median"',
        '"mae": "mean"',
        "test_score_task.py::test_each_measure_is_held_against_the_constant_that_does_best_by_it",
    ),
    Mutant(
        "the constant of the accuracy is the median",
        '"accuracy": "mode"',
        '"accuracy": "mean"',
        "test_score_task.py::test_each_measure_is_held_against_the_constant_that_does_best_by_it",
    ),
    Mutant(
        "a failed answer has no fault",
        'fault=response.get("error") or response.get("invalid")',
        'fault=response.get("error")',
        "test_score_task.py::test_a_pair_with_an_invalid_answer_on_either_side_is_counted",
    ),
    Mutant(
        "ROUGE-L is a recall",
        "return 2 * LCSseq.similarity(answer.output, answer.reference) / lengths",
        "return LCSseq.similarity(answer.output, answer.reference) / len(answer.reference)",
        "test_figures.py::test_rouge_l_is_the_mean_f1_of_the_longest_common_subsequence",
    ),
    Mutant(
        "a short answer has no BLEU",
        "effective_order=True",
        "effective_order=False",
        "test_figures.py::test_sacrebleus_own_signature_stands_beside_its_figures",
    ),
    Mutant(
        "ties rank last",
        "(np.cumsum(mass, axis=1) - mass / 2)",
        "np.cumsum(mass, axis=1)",
        "test_score_task.py::test_the_measures_agree_with_computation_by_hand",
    ),
    Mutant(
        "a constant correlates",
        "np.where(spread > 1e-12,",
        "np.where(spread >= 0,",
        "test_score_task.py::test_the_metrics_are_the_textbooks_for_every_group",
    ),
    Mutant(
        "true is a score",
        "return type(value) is int and 0 <= value",
        "return isinstance(value, int) and 0 <= value",
        "test_score_task.py::test_a_dialogue_without_complete_scores_is_left_out_and_counted",
    ),
    Mutant(
        "a percentile skips the last rank",
        "rank = (len(ordered) - 1) * percent / 100",
        "rank = len(ordered) * percent / 100",
        "test_cost.py::test_the_spread_of_tokens_is_by_linear_interpolation",
    ),
    Mutant(
        "the wider loss is the validation's",
        'metrics.get("full_valid_loss", metrics.get("valid_loss"))',
        'metrics.get("valid_loss", metrics.get("full_valid_loss"))',
        "test_score_task.py::test_the_loss_over_all_validation_data_is_taken_where_it_is_told",
    ),
    Mutant(
        "a cut answer is not counted",
        'r.get("finish_reason") == "length"',
        'r.get("finish_reason") == "cut"',
        "test_asking.py::test_a_cut_answer_is_kept_counted_and_named",
    ),
)
RECOVERY = (
    Mutant(
        "a known file of another size is used again",
        "kept.bytes == size and ",
        "",
        "test_recovery.py::test_a_known_file_that_is_not_there_as_it_was_sent_is_uploaded_again",
    ),
    Mutant(
        "a known file that failed is used again",
        ' and kept.status != "error":',
        ":",
        "test_recovery.py::test_a_known_file_that_is_not_there_as_it_was_sent_is_uploaded_again",
    ),
    Mutant(
        "a known file of another endpoint is used again",
        " and known.settings.base_url == run.settings.base_url",
        "",
        "test_recovery.py::test_a_file_that_is_known_at_one_endpoint_is_not_looked_for_at_another",
    ),
    Mutant(
        "a known file of other data is used again",
        "if upload.file_id is not None and upload.sha256 != sha256:",
        "if False:",
        "test_recovery.py::test_other_content_of_the_same_name_and_size_is_never_adopted",
    ),
    Mutant(
        "any file of the name is taken for ours",
        "same = (file.filename, file.bytes) == (upload.name, upload.bytes)",
        "same = file.filename == upload.name",
        "test_recovery.py::test_a_file_of_the_same_name_that_nobody_here_knows_is_never_adopted",
    ),
    Mutant(
        "a file of long ago is taken for ours",
        "late = told is None or told >= upload.intent_time - CLOCK_SKEW_SECONDS",
        "late = True",
        "test_recovery.py::test_a_file_of_the_same_name_that_nobody_here_knows_is_never_adopted",
    ),
    Mutant(
        "other content of the same size is taken for ours",
        " and file.id not in others:",
        ":",
        "test_recovery.py::test_other_content_of_the_same_name_and_size_is_never_adopted",
    ),
    Mutant(
        "any job found is ours",
        "(job.metadata or {}).get(INTENT_KEY) == intent.token",
        '(job.metadata or {}).get(INTENT_KEY) != ""',
        "test_recovery.py::test_an_endpoint_that_ignores_the_filter_has_no_foreign_job_adopted",
    ),
    Mutant(
        "a lost file is looked for once",
        "LOOK_DELAYS = (0.0, 3.0, 3.0)",
        "LOOK_DELAYS = (0.0,)",
        "test_recovery.py::test_a_file_whose_answer_was_lost_is_looked_for_while_the_list_lags",
    ),
    Mutant(
        "a refusal for the rate is looked after",
        "status not in (408, 409)) or cause",
        "status not in (408, 409, 429)) or cause",
        "test_recovery.py::test_a_refusal_for_the_rate_is_not_looked_after_for_nothing_happened",
    ),
    Mutant(
        "a resumed run forgets its intent",
        "found = self._endpoint.look(lambda: self._find(intent), JOB_LOOK_DELAYS)",
        "found = None",
        "test_recovery.py::test_the_job_of_a_lost_answer_is_found_even_where_its_file_is_gone",
    ),
    Mutant(
        "a job with other settings is taken over",
        'if any(sent.get(k) != v for k, v in request.items() if not k.endswith("_file")):',
        "if False:",
        "test_recovery.py::test_a_job_sent_with_other_settings_is_never_taken_for_the_one_that_is_asked",
    ),
    Mutant(
        "a file that was there is deleted by a refusal",
        " and not u.reused]",
        "]",
        "test_recovery.py::test_a_file_that_was_there_before_is_not_deleted_by_a_refusal",
    ),
    Mutant(
        "a cancelled run can be resumed",
        'self.job_status in ("failed", "cancelled")',
        'self.job_status in ("failed",)',
        "test_recovery.py::test_an_instance_cancels_its_own_job_and_has_nothing_left_to_resume",
    ),
    Mutant(
        "a rehearsal can be resumed",
        "return not self.rehearsal and self.next_step is not None",
        "return self.next_step is not None",
        "test_recovery.py::test_a_rehearsal_is_marked_and_never_resumed_nor_the_newest_model",
    ),
    Mutant(
        "a record is not locked",
        "fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        "test_recovery.py::test_two_processes_never_write_one_record",
    ),
    Mutant(
        "half a record stays",
        "left_behind.unlink(missing_ok=True)",
        "pass",
        "test_kill.py::test_a_file_that_a_killed_process_left_half_written_is_cleared_away",
    ),
    Mutant(
        "an answer waits in memory",
        "self._file.flush()",
        "pass",
        "test_kill.py::test_a_run_killed_at_any_moment_is_taken_up_to_the_end_of_one_that_was_not",
        within="Journal",
    ),
    Mutant(
        "a line that was cut swallows the next",
        'if content and not content.endswith(b"\\n"):',
        "if False:",
        "test_kill.py::test_a_file_that_a_killed_process_left_half_written_is_cleared_away",
    ),
    Mutant(
        "a failed case is not asked again",
        'if "error" not in line',
        'if "case_id" in line',
        "test_asking.py::test_a_case_that_failed_is_asked_again_when_an_evaluation_is_resumed",
        within="_take",
    ),
    Mutant(
        "answers to other settings are taken over",
        'if run.plan is not None or "journal" in run.files:',
        "if run.plan is not None:",
        "test_asking.py::test_an_evaluation_that_an_earlier_version_recorded_without_a_plan_gives_no_answers_away",
    ),
    Mutant(
        "a rehearsed model is the newest",
        "tuned = [run for run in every if run.fine_tuned_model and not run.rehearsal]",
        "tuned = [run for run in every if run.fine_tuned_model]",
        "test_pipeline.py::test_the_newest_model_is_never_a_rehearsals_and_never_an_unfinished_runs",
    ),
    Mutant(
        "a checkpoint's model is unknown",
        "named += [checkpoint.model for checkpoint in self.checkpoints]",
        "pass",
        "test_manifest.py::test_a_checkpoint_is_asked_the_split_of_its_own_run",
    ),
    Mutant(
        "events come newest first",
        "unseen = {e.id: e for e in page.data if",
        "unseen = {e.id: e for e in page.data[::-1] if",
        "test_job.py::test_every_event_is_shown_once_and_oldest_first_while_the_job_goes_on",
    ),
    Mutant(
        "only the newest page of events is read",
        "if len(unseen) < len(page.data) or not unseen or not page.has_next_page():",
        "if True:",
        "test_job.py::test_more_events_than_a_page_holds_are_all_shown_in_order",
    ),
    Mutant(
        "a page of events that is missed is forgotten",
        "return [*fresh.values()][::-1], [more] if number or again else []",
        "return [*fresh.values()][::-1], []",
        "test_edges_job.py::test_events_behind_a_page_that_stays_broken_are_read_when_it_is_mended",
    ),
    Mutant(
        "only the first page of jobs is read",
        "if not fresh or not page.has_next_page():",
        "if True:",
        "test_recovery.py::test_more_jobs_than_a_page_holds_are_all_listed",
    ),
    Mutant(
        "an outage ends the watch",
        "if not is_transient(failure) and",
        "if attempt > 30 or not is_transient(failure) and",
        "test_recovery.py::test_an_outage_of_any_length_is_survived_and_logged_once_with_its_length_and_its_end",
    ),
    Mutant(
        "a wait goes on to its next look",
        "self._sleep(min(delay, until - self._timer()))",
        "self._sleep(delay)",
        "test_recovery.py::test_a_wait_that_runs_out_carries_the_job_and_leaves_it_alone",
    ),
    Mutant(
        "an unknown status is an end",
        "if status in TERMINAL_STATUSES",
        "if status in TERMINAL_STATUSES or status not in KNOWN_STATUSES",
        "test_job.py::test_a_status_that_is_no_end_is_said_once_and_waited_out",
        within="watch",
    ),
    Mutant(
        "a model that loads is not waited for",
        "self._timer() + seconds",
        "self._timer()",
        "test_recovery.py::test_a_model_that_is_still_loading_is_waited_for_with_the_first_case_and_no_probe",
        within="expect",
    ),
    Mutant(
        "a cancellation whose answer was lost is an error",
        "if job.status not in TERMINAL_STATUSES",
        "if job.status",
        "test_recovery.py::test_whatever_goes_wrong_ends_well_or_in_a_clear_error_and_never_in_two_jobs",
        within="cancel",
    ),
    Mutant(
        "the parts go up the wrong way round",
        "part_ids=part_ids)",
        "part_ids=part_ids[::-1])",
        "test_recovery.py::test_a_file_above_the_limit_goes_up_in_parts_of_which_one_may_fail",
    ),
    Mutant(
        "a refused job leaves its files",
        "raise TrainingNotAvailable(self._endpoint.url, self._delete_uploads(), said) from error",
        "raise TrainingNotAvailable(self._endpoint.url, [], said) from error",
        "test_recovery.py::test_whatever_goes_wrong_ends_well_or_in_a_clear_error_and_never_in_two_jobs",
    ),
    Mutant(
        "the client tries again by itself",
        "if self._client.max_retries:",
        "if False:",
        "test_settings.py::test_the_client_does_not_retry_on_its_own",
    ),
    Mutant(
        "a job's record is another's",
        "if current.job_id is not None or current.plan is not None:",
        "if False:",
        "test_job.py::test_a_job_made_elsewhere_does_not_take_the_record_of_the_instances_own",
    ),
    Mutant(
        "a resumed run keeps this instance's settings",
        "return replace(self, **changes)",
        "return self",
        "test_recovery.py::test_a_run_goes_on_with_its_recorded_settings",
    ),
    Mutant(
        "another split may be evaluated",
        "if changed",
        "if not asked",
        "test_manifest.py::test_an_option_that_would_change_the_split_is_refused_by_name",
        within="_require_same_split",
    ),
    Mutant(
        "a failed poll forgets Retry-After",
        "_retry_after(failure, self._clock())",
        "None",
        "test_job.py::test_a_watch_outlasts_an_outage_of_hours",
    ),
)
DATA = (
    Mutant(
        "leakage counts validation as training",
        "for dialogue in splits.train}",
        "for dialogue in (*splits.train, *splits.valid)}",
        "test_selection.py::test_who_is_known_from_validation_alone_was_not_seen_in_training",
    ),
    Mutant(
        "a special token passes",
        "endof(?:text|prompt|system)|",
        "endof(?:text|system)|",
        "test_check_file.py::test_every_special_token_is_named_wherever_it_stands",
    ),
    Mutant(
        "five percent may be unreadable",
        "MAX_UNREADABLE_SHARE = 0.01",
        "MAX_UNREADABLE_SHARE = 0.05",
        "test_data.py::test_more_than_one_percent_that_cannot_be_read_stops_the_run",
    ),
    Mutant(
        "ids may be shared",
        "if n > 1}",
        "if n > 2}",
        "test_data.py::test_different_dialogues_with_one_id_are_told_apart_by_what_they_hold",
    ),
    Mutant(
        "the lower bound of the score is left out",
        "d.score >= low",
        "d.score > low",
        "test_selection.py::test_the_bounds_of_the_score_are_inclusive_and_no_score_is_within_none",
    ),
    Mutant(
        "a dialogue without a score has one",
        "lambda d: d.score is not None and d.score <= high",
        "lambda d: (d.score or 0) <= high",
        "test_selection.py::test_the_bounds_of_the_score_are_inclusive_and_no_score_is_within_none",
    ),
    Mutant(
        "one flag is not seen",
        '"other_potentially_unethical")',
        '"other")',
        "test_selection.py::test_flagged_dialogues_are_left_out_where_that_is_asked_for",
    ),
    Mutant(
        "a tenth is cut, not rounded",
        '_ROUNDING = {"test": 5, "valid": 1}',
        '_ROUNDING = {"test": 1, "valid": 0}',
        "test_data.py::test_a_split_is_disjoint_and_complete_in_the_ratio_8_1_1",
    ),
    Mutant(
        "validation is tested",
        "        parts[part].append(dialogue)",
        "        parts[part].append(dialogue)\n"
        '        parts["test"] += [dialogue] if part == "valid" else []',
        "test_data.py::test_a_split_is_disjoint_and_complete_in_the_ratio_8_1_1",
    ),
    Mutant(
        "a sample's size decides on its parts",
        "collections.Counter(d.part for d in shuffled)",
        "collections.Counter(d.part for d in chosen)",
        "test_selection.py::test_what_is_drawn_for_a_missing_part_lies_inside_that_of_a_larger_sample",
        within="split_dialogues",
    ),
    Mutant(
        "a missing part is a tenth of training alone",
        "(places * total + rounding * free) // (10 * free)",
        "(places * free + rounding * free) // (10 * free)",
        "test_selection.py::test_published_parts_stay_whole_and_only_a_missing_one_is_drawn_from_training",
    ),
    Mutant(
        "the order of the files has a say",
        "key=lambda dialogue: (dialogue.digest, dialogue.id)",
        "key=lambda dialogue: 0",
        "test_data.py::test_the_same_seed_gives_the_same_split_in_whatever_order_the_files_come",
        within="split_dialogues",
    ),
    Mutant(
        "duplicates stay",
        "kept = [next(same) for _, same in itertools.groupby(ordered, key=lambda d: d.digest)]",
        "kept = ordered",
        "test_selection.py::test_each_filter_counts_what_it_took_of_what_the_ones_before_it_left",
    ),
    Mutant(
        "what is held out is trained on too",
        "key=lambda d: (d.digest, _PART_ORDER.index(d.part), d.id)",
        "key=lambda d: (d.digest, -_PART_ORDER.index(d.part), d.id)",
        "test_selection.py::test_of_a_dialogue_in_two_published_parts_the_held_out_one_stays",
    ),
    Mutant(
        "the parts of a long dialogue stand for themselves",
        'whole = {"group": example["id"], **example}',
        "whole = dict(example)",
        "test_manifest.py::test_the_parts_of_one_long_dialogue_are_one_group",
    ),
    Mutant(
        "who is drawn together isn't told",
        "if group_by and (group := dialogue.group_name(group_by)):",
        "if group_by == '' and (group := dialogue.group_name(group_by)):",
        "test_manifest.py::test_the_manifest_tells_with_whom_each_dialogue_was_drawn",
    ),
    Mutant(
        "a published test is trained on",
        "        if part not in _ROUNDING:",
        '        if part != "valid":',
        "test_selection.py::test_published_parts_stay_whole_and_only_a_missing_one_is_drawn_from_training",
    ),
    Mutant(
        "a published validation is drawn anew",
        "drawn = [name for name in _ROUNDING if not sizes.get(name)]",
        "drawn = list(_ROUNDING)",
        "test_selection.py::test_published_parts_stay_whole_and_only_a_missing_one_is_drawn_from_training",
    ),
    Mutant(
        "a sample takes as many of each part",
        "shares.append(before[dialogue.part] / sizes[dialogue.part])",
        "shares.append(before[dialogue.part])",
        "test_selection.py::test_a_sample_holds_the_same_share_of_each_published_part_and_smaller_ones",
    ),
    Mutant(
        "groups are torn by published parts",
        "if any(dialogue.part for dialogue in chosen):",
        "if False:",
        "test_selection.py::test_published_splits_are_not_grouped_by_who_took_part",
    ),
    Mutant(
        "what was published beside the splits is trained on",
        "return [dialogue for dialogue in dialogues if dialogue.part is not None]",
        "return dialogues",
        "test_selection.py::test_what_is_drawn_left_out_and_held_out_is_told_by_the_command_line",
    ),
    Mutant(
        "configurations are mixed",
        "if config is None and len(fetched) > 1:",
        "if False:",
        "test_hub.py::test_a_data_set_of_several_configurations_stops_with_their_names",
    ),
    Mutant(
        "the client has the last word",
        'if speaker == "user":',
        'if speaker == "":',
        "test_data.py::test_merged_messages_alternate_and_end_with_the_assistant",
        within="to_example",
    ),
    Mutant(
        "a line separator stays as it is",
        'for character in "\\u2028\\u2029\\x85":',
        'for character in "\\u2028\\u2029":',
        "test_data.py::test_a_written_file_is_one_the_service_takes_and_any_reader_sees_the_same_lines",
    ),
    Mutant(
        "nine examples are enough",
        "MIN_TRAINING_EXAMPLES = 10",
        "MIN_TRAINING_EXAMPLES = 9",
        "test_check_file.py::test_too_few_examples_count_for_training_and_one_is_enough_for_validation",
    ),
    Mutant(
        "the limit of an example is one more",
        "MAX_EXAMPLE_TOKENS = 65_536",
        "MAX_EXAMPLE_TOKENS = 65_537",
        "test_check_file.py::test_the_longest_example_the_service_takes_is_65_536_tokens",
    ),
    Mutant(
        "a long example is cut at any turn",
        'and message["role"] == "user"',
        "",
        "test_check_file.py::test_the_parts_of_a_conversation_fit_end_with_the_assistant_and_lose_nothing",
        within="split_long_example",
    ),
    Mutant(
        "the system's message is not repeated",
        '"messages": [*head, *part]}',
        '"messages": [*(head if n == 1 else []), *part]}',
        "test_check_file.py::test_the_parts_of_a_conversation_fit_end_with_the_assistant_and_lose_nothing",
    ),
    Mutant(
        "a short example may be long",
        "return 4 * sum(map(len, texts)) + besides + 5 * len(messages) + 3 <= MAX_EXAMPLE_TOKENS",
        "return sum(map(len, texts)) <= MAX_EXAMPLE_TOKENS",
        "test_check_file.py::test_a_conversation_is_over_the_limit_of_tokens_however_few_characters_it_has",
    ),
    Mutant(
        "a long example of many short turns passes",
        "return 4 * sum(map(len, texts)) + besides + 5 * len(messages) + 3 <= MAX_EXAMPLE_TOKENS",
        "return 4 * sum(map(len, texts)) <= MAX_EXAMPLE_TOKENS",
        "test_check_file.py::test_a_conversation_is_over_the_limit_of_tokens_however_few_characters_it_has",
    ),
    Mutant(
        "a part with nothing to train stays",
        'if any(_is_trained(m["role"], m) for m in part)',
        "if part",
        "test_check_file.py::test_a_part_with_nothing_to_train_on_is_no_example",
    ),
    Mutant(
        "a weight of 0 is trained",
        "trained or _is_trained(role, message)",
        'trained or role == "assistant"',
        "test_check_file.py::test_a_problem_is_named_with_its_line_and_message",
    ),
    Mutant(
        "a repeated line is not told",
        "if first != number",
        "if first > number",
        "test_check_file.py::test_a_repeated_line_is_a_warning_that_names_the_first",
    ),
    Mutant(
        "mending keeps the client's last word",
        'if "assistant" in roles:',
        'if "" in roles:',
        "test_check_file.py::test_what_can_be_mended_is_mended_and_nothing_else_is_changed",
    ),
    Mutant(
        "a call may go without its result",
        'yield _Problem("unanswered_call", asked, (call_id,))',
        "pass",
        "test_check_file.py::test_a_problem_is_named_with_its_line_and_message",
    ),
    Mutant(
        "a graded line may have its answer",
        'if graded and roles[-1:] == ["user"]',
        "if graded",
        "test_check_file.py::test_a_problem_is_named_with_its_line_and_message",
    ),
    Mutant(
        "a special token is found in the text alone",
        "[*_find_shape_problems(example), *_find_text_problems(line)]",
        "[*_find_shape_problems(example)]",
        "test_check_file.py::test_a_problem_is_named_with_its_line_and_message",
    ),
    Mutant(
        "the farewell is asked",
        "turns.pop()",
        "break",
        "test_asking.py::test_farewells_are_left_out_by_what_they_are",
        within="_turns_to_ask",
    ),
    Mutant(
        "one farewell alone is left out",
        'while len(turns) > 1 and is_farewell(messages[turns[-1]]["content"]):',
        'if len(turns) > 1 and is_farewell(messages[turns[-1]]["content"]):',
        "test_asking.py::test_farewells_are_left_out_by_what_they_are",
    ),
    Mutant(
        "one dialogue is asked twice before another is asked once",
        "ranked.append((order, rank,",
        "ranked.append((0, rank,",
        "test_asking.py::test_no_dialogue_gives_its_second_case_before_each_has_given_its_first",
    ),
    Mutant(
        "the seed has no say in the turns",
        "draw = random.Random(f\"{seed}/{example['id']}/turn\")",
        "draw = random.Random(f\"{example['id']}/turn\")",
        "test_evaluation.py::test_the_choice_depends_on_the_seed_and_differs_between_dialogues",
    ),
    Mutant(
        "the seed has no say in the dialogues",
        "rank = random.Random(f\"{seed}/{example['id']}\").random()",
        "rank = random.Random(f\"{example['id']}\").random()",
        "test_evaluation.py::test_another_seed_asks_other_dialogues",
    ),
    Mutant(
        "the score task reads no English review",
        "dialogue.review_en.get(english) if score is None else score",
        "score",
        "test_score_task.py::test_the_english_review_serves_where_there_is_no_japanese_one",
    ),
    Mutant(
        "a dialogue without all scores is learnt",
        "if not dialogue.turns or not all(map(_is_item_score, scores.values())):",
        "if not dialogue.turns:",
        "test_score_task.py::test_a_dialogue_without_complete_scores_is_left_out_and_counted",
    ),
    Mutant(
        "the topic is Japanese only",
        'or d.topic.get("main_en") in topics',
        "or False",
        "test_selection.py::test_a_topic_is_named_in_japanese_or_english",
    ),
    Mutant(
        "a pair is its counsellor",
        "return None if counselor is None or client is None else (client, counselor)",
        "return counselor",
        "test_selection.py::test_a_pair_is_a_client_and_a_counsellor_and_who_is_unknown_stands_alone",
    ),
    Mutant(
        "what is on the Hub's other revision is read",
        "    if revision is None:\n        ways[",
        "    if True:\n        ways[",
        "test_hub.py::test_a_pinned_revision_is_the_one_that_is_read",
    ),
    Mutant(
        "a NUL ends a turn",
        'TURN_BREAK = "\\ud800"',
        'TURN_BREAK = "\\0"',
        "test_data.py::test_a_nul_in_what_is_said_makes_no_turn_two",
    ),
    Mutant(
        "what is counted last is written first",
        "chunk, counts = ahead.popleft()",
        "chunk, counts = ahead.pop()",
        "test_data.py::test_more_dialogues_than_are_counted_at_once_are_all_written_in_their_order",
    ),
    Mutant(
        "a dialogue that is converted stays",
        "yield items.pop()",
        "yield from items[::-1]; return",
        "test_data.py::test_a_dialogue_is_let_go_once_it_is_converted",
    ),
    Mutant(
        "the mean isn't that of the data stage",
        'if name != "train" or self._settings.task == "score":',
        'if name != "train":',
        "test_score_task.py::test_the_mean_is_by_default_that_of_what_the_data_stage_wrote",
    ),
    Mutant(
        "the manifest's dialogue is that of the first part",
        ' or sources.get(example_id.rpartition("/")[0])',
        "",
        "test_check_file.py::test_an_over_long_conversation_is_split_at_a_turn_by_default_and_that_is_said",
    ),
)
FILES = (
    Mutant(
        "SIGTERM ends as Ctrl-C",
        "return 143 if isinstance(interrupt, Terminated) else 130",
        "return 130",
        "test_recovery.py::test_an_interruption_prints_the_one_command_that_comes_back_and_it_works",
        file=EXAMPLE,
    ),
    Mutant(
        "a failed check ends with 0",
        'return 1 if any(item.level == "fail" for item in items) else 0',
        "return 0",
        "test_check.py::test_the_command_ends_with_1_where_a_line_fails",
        file=EXAMPLE,
    ),
    Mutant(
        "a watched job that failed ends with 0",
        'return 0 if results.status == "succeeded" else 1',
        "return 0",
        "test_cli.py::test_a_watched_job_that_fails_ends_with_1",
        file=EXAMPLE,
    ),
    Mutant(
        "anything is a yes",
        'in ("y", "yes", "はい")',
        'not in ("n", "no", "いいえ")',
        "test_cli.py::test_on_a_terminal_the_price_is_shown_and_asked_about",
        file=EXAMPLE,
    ),
    Mutant(
        "a part of a price is enough",
        "if None in prices",
        "if prices[0] is None",
        "test_cost.py::test_prices_can_be_given_on_the_command_line_for_any_model",
        within="price_from",
        file=EXAMPLE,
    ),
    Mutant(
        "where nobody can be asked it pays",
        "if not (options.yes or on_terminal()):",
        "if False:",
        "test_edges_money.py::test_where_nobody_can_be_asked_it_stops_and_names_the_flag_that_agrees",
        file=EXAMPLE,
    ),
    Mutant(
        "the rates of a baseline are dropped",
        "return Price(*prices, *base)",
        "return Price(*prices)",
        "test_cost.py::test_the_price_of_a_baseline_can_be_given_on_the_command_line",
        file=EXAMPLE,
    ),
    Mutant(
        "half the rates of a baseline are enough",
        "if None in base and base != (None, None):",
        "if False:",
        "test_cost.py::test_the_price_of_a_baseline_can_be_given_on_the_command_line",
        file=EXAMPLE,
    ),
    Mutant(
        "the recorded runs wait for the endpoint",
        "sft.list_runs(first=show_recorded)",
        "sft.list_runs()",
        "test_edges_patience.py::"
        "test_the_command_line_shows_the_local_table_before_the_endpoint_has_answered",
        file=EXAMPLE,
    ),
    Mutant(
        "the recorded runs are listed twice",
        "if row not in recorded]",
        "]",
        "test_cli.py::test_the_list_shows_what_is_recorded_and_then_only_what_the_endpoint_adds",
        file=EXAMPLE,
    ),
    Mutant(
        "the price is hidden with what is said by the way",
        "logging.INFO if shown or not verbose else logging.WARNING",
        "logging.INFO",
        "test_edges_money.py::"
        "test_price_job_and_loss_are_seen_where_the_application_hides_what_is_said_by_the_way",
    ),
    Mutant(
        "a quiet run shows no price",
        "if options.quiet",
        "if not options.quiet",
        "test_cli.py::test_on_a_terminal_the_price_is_shown_and_asked_about",
        within="confirm_with",
        file=EXAMPLE,
    ),
    Mutant(
        "a failure hides the way back",
        "if sft is not None and sft.goes_on_remotely:",
        "if False:",
        "test_cli.py::test_an_error_while_the_job_goes_on_says_so_and_how_to_come_back",
        file=EXAMPLE,
    ),
    Mutant(
        "the data need a key",
        "offline=options.data_only,",
        "offline=False,",
        "test_cli.py::test_the_data_and_the_price_need_no_key",
        file=EXAMPLE,
    ),
    Mutant(
        "the exit code of an error is always 1",
        "return error.exit_code",
        "return 1",
        "test_cli.py::test_without_a_key_one_line_says_how_to_set_it",
        file=EXAMPLE,
    ),
    Mutant(
        "a long column is not cut",
        "return padded([[shortened(head, room), *cells] for head, *cells in table])",
        "return padded(table)",
        "test_score_task.py::test_a_table_fits_its_terminal_by_cutting_the_items",
        file=EXAMPLE,
    ),
    Mutant(
        "a cancellation is not asked about",
        'if not agrees(f"ジョブ {options.cancel} を取り消しますか？", options):',
        "if False:",
        "test_cli.py::test_on_a_terminal_a_cancellation_is_asked_about",
        file=EXAMPLE,
    ),
    Mutant(
        "the environment beats the argument",
        "return argument or os.environ.get(name) or",
        "return os.environ.get(name) or argument or",
        "test_settings.py::test_an_argument_beats_the_environment_which_beats_dotenv_which_beats_the_default",
    ),
    Mutant(
        "a line that the service breaks is broken",
        'printable_lines(text).replace("\\n", " ").strip()',
        "printable_lines(text).strip()",
        "test_job.py::test_a_message_of_the_service_can_neither_break_a_line_nor_colour_the_terminal",
    ),
    Mutant(
        "files are anybody's",
        "os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)",
        "os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)",
        "test_secrets.py::test_every_file_of_a_run_is_the_users_alone",
    ),
    Mutant(
        "a file is written over",
        "os.link(unnamed, path",
        "path.unlink(missing_ok=True), os.link(unnamed, path",
        "test_data.py::test_an_existing_file_is_never_overwritten_and_no_temporary_file_stays",
    ),
    Mutant(
        "a key in an error's body is shown",
        "error.body = json.loads(clean(_dump(error.body)))",
        "pass",
        "test_secrets.py::test_the_key_is_nowhere_even_where_the_endpoint_tells_it",
    ),
    Mutant(
        "a result file in Base64 is not read",
        'content = base64.b64decode(b"".join(content.split()), validate=True)',
        "pass",
        "test_job.py::test_a_result_file_is_read_by_its_header_and_empty_cells_are_no_numbers",
    ),
    Mutant(
        "the first loss is the final one",
        "reversed(rows))))",
        "rows)))",
        "test_recovery.py::test_the_columns_of_azure_are_kept_one_row_a_step",
    ),
    Mutant(
        "ten cases are eleven",
        "max_test_cases: int | None = 10",
        "max_test_cases: int | None = 11",
        "test_evaluation.py::test_ten_of_each_split_are_asked_by_default",
        within="evaluate_model_comprehensive",
    ),
    Mutant(
        "the model's last day is not its end",
        '"warn" if left > 0 else "fail"',
        '"warn" if left > -2 else "fail"',
        "test_check.py::test_a_model_past_its_last_day_fails",
    ),
    Mutant(
        "a symbolic link is followed",
        "if path.is_symlink()",
        "if not path",
        "test_secrets.py::test_a_data_file_that_is_a_link_is_refused",
        within="file",
    ),
    Mutant(
        "a rehearsal uses the environment's proxy",
        "trust_env=not settings.brings_endpoint",
        "trust_env=True",
        "test_settings.py::test_a_rehearsal_ignores_every_key_url_and_proxy_of_the_environment",
    ),
    Mutant(
        "the way back names no folder",
        'return "" if usual else',
        'return "" if True else',
        "test_recovery.py::test_an_interruption_prints_the_one_command_that_comes_back_and_it_works",
    ),
    Mutant(
        "two runs share a stamp",
        'if any(folder.glob(f"*_{stamp}.*"))',
        "if not folder",
        "test_pipeline.py::test_two_runs_of_the_same_second_keep_their_own_files",
        within="claim_stamp",
    ),
)
TRAINED_ON = (
    Mutant(
        "what a model was trained on is asked all the same",
        "[e for e, digest in zip(part, digests[name], strict=True) if digest not in seen]",
        "[e for e, digest in zip(part, digests[name], strict=True) if digest]",
        "test_trained_on.py::test_what_a_model_was_trained_on_is_not_asked_and_told_with_its_counts",
    ),
    Mutant(
        "a baseline may know the cases",
        "trained_by.setdefault(baseline, runs.lineage(baseline))",
        "trained_by.setdefault(baseline, [])",
        "test_trained_on.py::test_a_baseline_that_was_trained_on_a_case_takes_it_from_both",
    ),
    Mutant(
        "what a model was tuned from is forgotten",
        "models += {run.settings.model for run in tuned} - {*models}",
        "models += []",
        "test_trained_on.py::test_what_the_model_was_tuned_from_was_trained_on_counts_as_well",
    ),
    Mutant(
        "another instruction makes another conversation",
        'if message.get("role") != "system"\n    ]\n    return hashlib',
        'if message.get("role")\n    ]\n    return hashlib',
        "test_trained_on.py::test_instructions_and_weights_make_no_other_conversation",
    ),
    Mutant(
        "the last file that was sent was trained on",
        "if sent and upload.file_id == sent), None)",
        "if sent == 0), None)",
        "test_trained_on.py::test_of_several_files_the_one_that_was_trained_on_counts",
    ),
    Mutant(
        "validation that isn't asked isn't sent",
        'if run.data["valid"].examples:',
        "if splits.valid:",
        "test_trained_on.py::test_a_run_whose_validation_was_trained_on_validates_all_the_same",
    ),
    Mutant(
        "an evaluation of nothing goes on",
        'if seen and not kept["test"] and (splits.test or not kept["valid"]):',
        "if seen and not (kept['test'] or kept['valid']):",
        "test_trained_on.py::test_where_nothing_is_left_nobody_is_asked",
    ),
)
CHECKPOINTS = (
    Mutant(
        "the worst checkpoint is the best",
        "key=lambda c: (c.full_valid_loss, -(c.step or 0))",
        "key=lambda c: (-(c.full_valid_loss or 0), -(c.step or 0))",
        "test_checkpoints.py::test_the_best_on_validation_is_asked_and_no_other_and_that_is_said_before",
    ),
    Mutant(
        "the best is asked unless told",
        '    if wanted == "best":\n        logger.info("%sこれ',
        '    if wanted == "last":\n        logger.info("%sこれ',
        "test_checkpoints.py::test_the_last_is_asked_unless_told_and_a_better_one_is_named_before",
    ),
    Mutant(
        "a loss is known by one spelling",
        'in ("fullvalidloss", "fullvalidationloss")',
        'in ("fullvalidloss",)',
        "test_checkpoints.py::test_losses_that_only_the_result_file_tells_are_taken_from_it",
    ),
    Mutant(
        "what a checkpoint tells of itself is ignored",
        'loss = row.get("full_valid_loss", losses.get(step))',
        "loss = losses.get(step)",
        "test_checkpoints.py::test_losses_that_only_the_checkpoints_tell_are_enough",
    ),
    Mutant(
        "the losses of the checkpoints aren't in the table",
        "_merge_metrics(map(_checkpoint_row, checkpoints), heard, results)",
        "_merge_metrics(heard, results)",
        "test_checkpoints.py::test_losses_that_only_the_checkpoints_tell_are_enough",
    ),
    Mutant(
        "the curve of a job that failed is lost",
        "if rows := _merge_metrics(heard.rows, self._endpoint.result_rows(job)):",
        "if rows := []:",
        "test_record.py::test_the_curve_and_the_events_of_a_job_that_failed_are_kept",
    ),
    Mutant(
        "a cell after a blank is run as a formula",
        r'FORMULA = re.compile(r"[\s\x00-\x1f]*[=+',
        r'FORMULA = re.compile(r"[=+',
        "test_answers.py::test_no_cell_is_run_as_a_formula",
    ),
    Mutant(
        "asking all cases is priced as asking one model",
        "sum(known.usd(round(asked), round(answered)) for known in rates if known)",
        "rates[0].usd(round(asked), round(answered))",
        "test_screen.py::test_the_next_command_is_to_ask_all_cases_with_what_that_costs",
    ),
    Mutant(
        "what is left of a job is reckoned from its whole time",
        "elapsed / (step - first) * (total - step)",
        "elapsed / step * (total - step)",
        "test_screen.py::test_what_is_left_is_told_by_the_times_of_the_events_and_before_them_by_the_service",
    ),
    Mutant(
        "a bar that is being made ends the monitor",
        "except AttributeError:  # of a bar that another thread is still making",
        "except EOFError:",
        "test_monitor.py::test_the_monitor_is_heard_and_prints_no_traceback_while_another_thread_makes_a_bar",
    ),
    Mutant(
        "what stays high is warned of at every reading",
        "if now - self._told.get(what, -math.inf) < self.TELL_SECONDS:",
        "if False:",
        "test_monitor.py::test_what_stays_as_it_is_is_logged_once_in_ten_minutes",
    ),
    Mutant(
        "the squared error of a case is called its root",
        'np.sqrt(values) if measure == "rmse" else values',
        "values",
        "test_record.py::test_each_case_has_scores_that_make_the_figures",
    ),
    Mutant(
        "a rehearsed checkpoint answers as the model",
        "Model(base, job.id, step) for known, step in steps.items()",
        "Model(base, job.id, steps[name]) for known in steps",
        "test_rehearsal.py::test_a_checkpoint_answers_with_what_was_learned_by_then",
        file="openai_sft_rehearsal.py",
    ),
    Mutant(
        "the loss rose where it was least",
        "first = steps[steps.index(best) + 1]",
        "first = best",
        "test_checkpoints.py::test_the_validation_loss_of_each_checkpoint_is_recorded_and_from_when_on_it_rose_is_told",
    ),
    Mutant(
        "what is told at the resumption is forgotten",
        "            if checkpoint is not None:\n                _replan",
        "            if checkpoint == '':\n                _replan",
        "test_checkpoints.py::test_a_resumed_run_asks_the_checkpoint_it_was_begun_with_or_is_told_now",
    ),
    Mutant(
        "a job that is watched again hides the split of its run",
        "return next(same, newest)",
        "return newest",
        "test_checkpoints.py::test_a_record_that_tells_no_losses_gets_them_from_a_job_that_is_watched_again",
    ),
)
HOUSE = (
    Mutant(
        "a job is made without passing the door to payment",
        'self._ledger.require(self._price(training.epochs, file_id), "training")',
        "pass",
        "test_edges_money.py::test_a_job_made_step_by_step_is_asked_about_with_its_price",
    ),
    Mutant(
        "a model is asked without passing the door to payment",
        'self._ledger.require(estimate, "evaluation", paid=paid)',
        "pass",
        "test_edges_money.py::test_an_evaluation_made_step_by_step_is_asked_about_with_its_price",
    ),
    Mutant(
        "a door that was agreed to has no limit",
        "self._require_limit(estimate, spent)",
        "agreed or self._require_limit(estimate, spent)",
        "test_edges_money.py::test_a_limit_that_the_training_has_used_up_holds_where_the_evaluation_was_agreed_to",
        within="require",
    ),
    Mutant(
        "each door is asked about although the whole was agreed to",
        "self._run.passed.update(doors)",
        "pass",
        "test_edges_money.py::test_a_whole_run_is_asked_about_once_for_both",
    ),
    Mutant(
        "who agreed to the job has agreed to its evaluation",
        "agreed = self._run.passed.issuperset(doors)",
        "agreed = bool(self._run.passed)",
        "test_edges_money.py::test_who_agreed_to_the_job_is_asked_again_before_its_model_is",
    ),
    Mutant(
        "epochs left to the service can't be held to a limit",
        "limit, most = self._settings.max_cost_usd, estimate.most_usd",
        "limit, most = self._settings.max_cost_usd, estimate.total_usd",
        "test_edges_money.py::test_epochs_left_to_the_service_are_held_to_a_limit_as_the_fifty_they_may_be",
    ),
    Mutant(
        "the service takes ten epochs at most",
        "trained = self.training_tokens * MAX_EPOCHS",
        "trained = self.training_tokens * 10",
        "test_edges_money.py::test_the_most_that_epochs_left_to_the_service_may_cost_includes_the_evaluation",
    ),
    Mutant(
        "the most a run may cost is its training",
        "return _usd([trained], [self.price.training]) + self.asking_usd",
        "return _usd([trained], [self.price.training])",
        "test_edges_money.py::test_the_most_that_epochs_left_to_the_service_may_cost_includes_the_evaluation",
    ),
    Mutant(
        "the baseline's questions ahead cost nothing",
        "for m, (asked, _) in counts.items() if asked.tokens}",
        "for m in counts if m == evaluated}",
        "test_asking.py::test_the_baselines_questions_count_against_the_budget",
    ),
    Mutant(
        "what is ahead is priced as input alone",
        "known.usd(counts[m][0].tokens, counts[m][1])",
        "known.usd(counts[m][0].tokens + counts[m][1], 0)",
        "test_asking.py::test_the_limit_is_held_against_questions_and_answers_at_their_own_rates",
    ),
    Mutant(
        "a model of any name has no base",
        "given, base = self._settings.effective_price, self._base_of(model)",
        'given, base = self._settings.price, model if model.startswith("ft:") else None',
        "test_edges_money.py::test_a_tuned_model_of_any_name_is_priced_as_what_it_was_tuned_from",
    ),
    Mutant(
        "given base rates are nobody's",
        "is_base = model == (self._base_of(evaluated) or self._settings.model)",
        "is_base = False",
        "test_edges_money.py::test_a_given_price_prices_a_baseline_too",
    ),
    Mutant(
        "answers are paid as questions",
        'rates.usd(asked, answered, tokens["cached_tokens"])',
        'rates.usd(asked + answered, 0, tokens["cached_tokens"])',
        "test_asking.py::test_tokens_and_dollars_are_of_all_that_was_asked_of_both",
    ),
    Mutant(
        "cached tokens are paid in full",
        'rates.usd(asked, answered, tokens["cached_tokens"])',
        "rates.usd(asked, answered)",
        "test_asking.py::test_cached_tokens_are_paid_at_their_price",
    ),
    Mutant(
        "cached tokens are paid twice",
        "return _usd([asked - cached, answered, cached], self)",
        "return _usd([asked, answered, cached], self)",
        "test_asking.py::test_cached_tokens_are_paid_at_their_price",
    ),
    Mutant(
        "cached tokens of an unknown price are free",
        "return Rates(asked, answered, asked if cached is None else cached)",
        "return Rates(asked, answered, cached or 0.0)",
        "test_asking.py::test_cached_tokens_are_paid_at_their_price",
    ),
    Mutant(
        "an endpoint tells more cached tokens than were asked",
        "return asked, answered, min(cached, asked)",
        "return asked, answered, cached",
        "test_asking.py::test_a_count_of_cached_tokens_that_is_none_changes_no_price",
    ),
    Mutant(
        "a record of the first version is not read",
        "not in (1, cls.VERSION)",
        "not in (cls.VERSION,)",
        "test_first_version.py::test_a_run_that_had_sent_nothing_trains_and_asks_as_it_was_planned",
    ),
    Mutant(
        "a record of any version is read",
        'if facts["version"] not in (1, cls.VERSION) or not',
        "if not",
        "test_first_version.py::test_a_record_of_a_version_to_come_is_refused_and_left_alone",
    ),
    Mutant(
        "a plan of the first version trains nothing",
        '(_pick(Training, plan) if "epochs" in plan else None)',
        "None",
        "test_first_version.py::test_a_run_that_had_sent_nothing_trains_and_asks_as_it_was_planned",
    ),
    Mutant(
        "a plan of the first version asks by default",
        ' or plan.get("evaluation") or {}',
        " or {}",
        "test_first_version.py::test_a_run_that_had_sent_nothing_trains_and_asks_as_it_was_planned",
    ),
    Mutant(
        "a plan of the first version forgets its split",
        'split_of=plan.get("split_of")',
        "split_of=None",
        "test_first_version.py::test_an_evaluation_of_a_recorded_split_goes_on_where_it_stopped",
    ),
    Mutant(
        "an upload of the first version is not read",
        "k: kind(**_pick(kind, v))",
        "k: kind(**v)",
        "test_first_version.py::test_a_run_whose_job_was_made_without_its_learning_so_finds_its_files_and_its_job",
    ),
    Mutant(
        "a plan that was copied is gone on with",
        'known |= {"kind": "steps", "plan": None}',
        "pass",
        "test_first_version.py::test_a_plan_that_was_copied_from_the_run_before_is_nobodys",
    ),
    Mutant(
        "a run is not priced again when it is resumed",
        'lambda r: bool(r.job_id) or "price" in r.passed',
        "lambda r: bool(r.job_id or r.estimate)",
        "test_edges_money.py::test_a_run_that_nobody_agreed_to_is_asked_about_when_it_is_resumed",
    ),
    Mutant(
        "a sent file is not looked for when a run is resumed",
        'lambda r: bool(r.job_id) or "upload" in r.passed',
        "lambda r: bool(r.job_id or r.uploads)",
        "test_first_version.py::test_an_upload_whose_answer_was_lost_is_looked_for",
    ),
    Mutant(
        "a training is done before it is recorded",
        "lambda r: bool(r.training_recorded_at)",
        'lambda r: r.job_status == "succeeded"',
        "test_kill.py::test_a_run_killed_at_any_moment_is_taken_up_to_the_end_of_one_that_was_not",
    ),
    Mutant(
        "a second job takes the plan along",
        'kept = ("selection", "data", "uploads", "exact_tokens")',
        'kept = ("selection", "data", "uploads", "exact_tokens", "plan")',
        "test_job.py::test_a_second_job_of_one_instance_knows_its_data_and_not_the_plan_of_the_first",
    ),
    Mutant(
        "a second job does not know its split",
        'kept = ("selection", "data", "uploads", "exact_tokens")',
        'kept = ("data", "uploads", "exact_tokens")',
        "test_job.py::test_a_second_job_of_one_instance_knows_its_data_and_not_the_plan_of_the_first",
    ),
    Mutant(
        "a second job takes all files along",
        'if k in (*SPLIT_NAMES, "manifest")}',
        "}",
        "test_asking.py::test_a_second_evaluation_of_one_instance_has_a_record_without_the_plan_of_the_first",
    ),
    Mutant(
        "a second job is made in the record of the first",
        "if run.job_id is not None or (run.plan is not None and run.job_intent is None):",
        "if False:",
        "test_job.py::test_a_second_job_of_one_instance_knows_its_data_and_not_the_plan_of_the_first",
    ),
    Mutant(
        "an evaluation is recorded in the run with the plan",
        'if run.plan is not None or "journal" in run.files:',
        'if "journal" in run.files and run.plan is None:',
        "test_asking.py::test_a_second_evaluation_of_one_instance_has_a_record_without_the_plan_of_the_first",
    ),
    Mutant(
        "the table prices every service",
        "return DIALECTS[self.dialect or _dialect_at(self.base_url)]",
        'return DIALECTS["openai"]',
        "test_cost.py::test_the_prices_of_the_table_are_those_of_one_service_alone",
    ),
    Mutant(
        "a judge elsewhere has the prices of the evaluated model's service",
        "prices = settings.prices_at(asking.judge_base_url)",
        "prices = settings.speaks.prices",
        "test_cost.py::test_a_judge_elsewhere_has_the_prices_of_its_own_service",
    ),
    Mutant(
        "a host that ends like another is taken for it",
        'host.endswith(f".{known}")',
        "host.endswith(known)",
        "test_cost.py::test_the_prices_of_the_table_are_those_of_one_service_alone",
    ),
    Mutant(
        "a recorded limit goes before one of now",
        'for name in ("max_cost_usd", "price"):',
        'for name in ("price",):',
        "test_recovery.py::test_a_limit_or_a_price_of_now_goes_before_the_recorded_one",
    ),
    Mutant(
        "a recorded price goes before one of now",
        'for name in ("max_cost_usd", "price"):',
        'for name in ("max_cost_usd",):',
        "test_recovery.py::test_a_limit_or_a_price_of_now_goes_before_the_recorded_one",
    ),
    Mutant(
        "a recorded limit is forgotten",
        "if getattr(self, name) is not None:",
        "if True:",
        "test_recovery.py::test_a_limit_and_a_price_once_given_hold_for_the_resumed_run",
        within="working_as",
    ),
    Mutant(
        "an instance takes a resumed run's settings over",
        "settings = self.settings.working_as(found.settings)",
        "settings = self.settings = self.settings.working_as(found.settings)",
        "test_recovery.py::test_after_a_resume_the_instance_goes_on_with_its_own_model_data_and_prompt",
    ),
    Mutant(
        "what an instance does next is another run's",
        "if self._run is None or self._run.settings != self.settings.recorded:",
        "if self._run is None:",
        "test_recovery.py::test_after_a_resume_the_instance_goes_on_with_its_own_model_data_and_prompt",
    ),
    Mutant(
        "a lost job is looked for for six seconds",
        "JOB_LOOK_DELAYS = (*LOOK_DELAYS, 5.0, 10.0, 15.0, 20.0, 30.0, 30.0, 34.0)",
        "JOB_LOOK_DELAYS = LOOK_DELAYS",
        "test_edges_job.py::test_a_job_that_turns_up_late_is_found_and_not_made_again",
    ),
    Mutant(
        "a creation is given a minute",
        "CREATION_SECONDS = 180.0",
        "CREATION_SECONDS = 60.0",
        "test_edges_job.py::test_a_creation_is_given_minutes",
    ),
    Mutant(
        "a second request has a token of its own",
        "Intent(first.token, first.at, request)",
        "Intent(uuid.uuid4().hex, first.at, request)",
        "test_edges_job.py::test_a_job_that_an_earlier_process_made_turns_up_by_the_token_that_all_requests_share",
    ),
    Mutant(
        "a second request forgets when the first was sent",
        "Intent(first.token, first.at, request)",
        "Intent(first.token, _time_text(self._clock()), request)",
        "test_edges_job.py::test_a_job_that_an_earlier_process_made_turns_up_by_the_token_that_all_requests_share",
    ),
    Mutant(
        "a job that nobody agrees to goes on",
        "job = self._endpoint.cancel(job.id)",
        "pass",
        "test_dialects.py::test_a_limit_holds_for_the_job_that_there_is",
        within="_require_or_cancel",
    ),
    Mutant(
        "a run whose job may have ended meanwhile is closed",
        'goes_on = "training" in doors and not ended',
        "goes_on = False",
        "test_dialects.py::test_a_job_that_has_ended_while_he_was_asked_is_there_to_be_evaluated",
    ),
    Mutant(
        "a surplus job goes on",
        "job = self._endpoint.cancel(job.id)",
        "pass",
        "test_edges_job.py::test_a_surplus_job_that_turns_up_later_is_cancelled_and_named",
        within="cancel_surplus",
    ),
    Mutant(
        "a job of another model is ours",
        '            and _is_named(job.model, intent.request["model"])\n',
        "",
        "test_edges_job.py::test_a_job_of_another_file_or_model_is_not_taken_for_the_one_that_never_arrived",
    ),
    Mutant(
        "a job is another's as soon as its model has a provider before it",
        'name.rpartition("/")[2] for name in (told or asked, asked)',
        "name for name in (told or asked, asked)",
        "test_dialects.py::test_a_job_is_found_again_whatever_a_gateway_puts_before_the_name_of_its_model",
    ),
    Mutant(
        "a job with the token is looked for by this clock alone",
        ".get(INTENT_KEY) == intent.token\n",
        ".get(INTENT_KEY) == intent.token and job.created_at >= intent.since\n",
        "test_edges_job.py::test_a_clock_that_is_wrong_by_days_hides_no_job",
    ),
    Mutant(
        "tokens below nothing make a training cheaper",
        '0 <= cast("float", value) < math.inf',
        'cast("float", value) < math.inf',
        "test_edges_job.py::test_what_is_of_another_type_than_the_apis_counts_as_not_told",
    ),
    Mutant(
        "any of two jobs is ours",
        "if len(found) > 1 and not found[0].metadata:",
        "if False:",
        "test_edges_job.py::test_where_it_can_not_be_told_which_job_is_ours_nobody_is_billed_again",
    ),
    Mutant(
        "a job of long ago is ours",
        "if (job.created_at is None or job.created_at >= intent.since)",
        "if True",
        "test_edges_job.py::test_a_job_of_the_same_file_and_model_from_long_before_is_not_taken_for_it_either",
    ),
    Mutant(
        "a list is newest first everywhere",
        "newest_first = all(a >= b for a, b in itertools.pairwise(told))",
        "newest_first = True",
        "test_edges_job.py::test_a_job_whose_answer_is_lost_is_found_however_many_are_listed_before_it",
    ),
    Mutant(
        "a search ends at its first page",
        "newest_first and told[-1] < since",
        "newest_first",
        "test_edges_job.py::test_a_job_whose_answer_is_lost_is_found_however_many_are_listed_before_it",
    ),
    Mutant(
        "a training whose tokens are not told is free",
        "self.paid(training_usd=dollars)",
        "pass",
        "test_edges_job.py::test_a_training_whose_tokens_are_not_told_costs_what_was_estimated",
    ),
    Mutant(
        "answers whose tokens are not told are free",
        'told or _estimated_usage(case, response["output"]',
        'told and _estimated_usage(case, response["output"]',
        "test_edges_job.py::test_answers_whose_tokens_are_not_told_cost_what_was_estimated",
    ),
    Mutant(
        "an answer without words is free",
        'told or _estimated_usage(case, "", sent)',
        "told",
        "test_edges_job.py::test_an_answer_without_words_whose_tokens_are_not_told_costs_its_question",
    ),
    Mutant(
        "auto costs one epoch where no tokens are told",
        "_usd([tokens * epochs], [price",
        "_usd([tokens], [price",
        "test_edges_job.py::test_a_training_of_auto_whose_tokens_are_not_told_costs_the_epochs_it_tells_or_the_most",
    ),
    Mutant(
        "a declined run can be resumed",
        "run.save(declined=None if goes_on else True)",
        "pass",
        "test_edges_money.py::test_a_run_that_was_declined_is_closed",
    ),
    Mutant(
        "a declined run that has sent something can be resumed",
        "run.save(declined=None if goes_on else True)",
        "run.save(declined=None if run.has_sent else True)",
        "test_edges_money.py::test_a_run_that_was_declined_when_it_was_resumed_is_closed_too",
    ),
    Mutant(
        "a declined run forgets the job that may be there",
        "run.save(declined=None if goes_on else True)",
        "run.save(declined=True)",
        "test_edges_job.py::test_a_job_that_may_be_there_is_looked_for_again_although_another_was_declined",
    ),
    Mutant(
        "an answer may drip for ever",
        "if self._timer() > self._until:",
        "if False:",
        "test_edges_job.py::test_an_answer_that_drips_is_given_up_wherever_it_comes",
    ),
    Mutant(
        "a watch sends the key anywhere",
        "_require_trust(run, self.settings, self._trust, asked=self._client is not None)\n"
        "            with contextlib",
        "with contextlib",
        "test_edges_job.py::test_no_key_is_sent_to_a_recorded_endpoint_that_is_not_the_one_configured",
    ),
    Mutant(
        "a run that has sent nothing is the newest",
        "if run.unfinished and run.has_sent",
        "if run.unfinished",
        "test_edges_money.py::test_a_run_that_has_sent_nothing_is_taken_up_only_by_its_name",
    ),
    Mutant(
        "a job is sent before its intent is on disk",
        "self._run.save(job_intent=replace(intent, sent=sent) if sent else None)",
        "self._run.job_intent = replace(intent, sent=sent) if sent else None",
        "test_recovery.py::test_the_job_of_a_lost_answer_is_found_even_where_its_file_is_gone",
    ),
    Mutant(
        "a refused job leaves its intent",
        "refused=lambda: self._count(intent, -1)",
        "refused=bool",
        "test_edges_money.py::test_a_creation_that_was_refused_is_not_said_to_have_made_a_job",
    ),
    Mutant(
        "a refusal clears what was lost before it",
        "sent = (self._run.job_intent.sent if self._run.job_intent else 0) + change",
        "sent = max(change, 0)",
        "test_recovery.py::test_a_refusal_after_a_lost_answer_does_not_tell_that_no_job_was_made",
    ),
    Mutant(
        "any failure clears the intent",
        "if _made_nothing(error) or not is_transient(error):",
        "if True:",
        "test_recovery.py::test_a_refusal_after_a_lost_answer_does_not_tell_that_no_job_was_made",
    ),
    Mutant(
        "patience lasts ten times as long",
        "if self._timer() + delay - since > limit:",
        "if self._timer() + delay - since > 10 * limit:",
        "test_recovery.py::test_what_stays_away_is_given_up_after_ten_minutes",
    ),
    Mutant(
        "what was lost is sent again without a look",
        "return find()",
        "return None",
        "test_recovery.py::test_a_lost_answer_never_makes_a_second_job",
        within="_find_lost",
    ),
    Mutant(
        "a page is an answer",
        "if answer is None or isinstance(answer, str | list):",
        "if answer is None:",
        "test_asking.py::test_a_question_that_meets_a_page_instead_of_an_answer_is_asked_again",
    ),
    Mutant(
        "what can't mend itself is waited for",
        "return min(patience, FIRST_CONTACT_SECONDS)",
        "return patience",
        "test_edges_patience.py::test_a_port_that_refuses_ends_it_within_seconds_with_cause_and_remedy",
    ),
    Mutant(
        "a redirect is followed to any host",
        "if host != urllib.parse.urlsplit(here).hostname:",
        "if False:",
        "test_edges_job.py::test_a_redirect_to_another_host_is_refused",
    ),
    Mutant(
        "a date to wait for is not heard",
        "email.utils.parsedate_to_datetime(text).timestamp() - now",
        "0.0",
        "test_edges_patience.py::test_a_retry_after_that_is_a_date_is_waited_for",
    ),
    Mutant(
        "pages are read to their end",
        "MAX_PAGES = 100",
        "MAX_PAGES = 10_000",
        "test_edges_job.py::test_jobs_without_end_are_not_all_read",
    ),
    Mutant(
        "a file that is being processed is refused",
        "passes=_is_being_processed",
        "passes=None",
        "test_edges_patience.py::test_a_file_that_is_still_being_processed_is_waited_for",
    ),
    Mutant(
        "an outage fails case by case",
        "return (since is not None and began >= since) or not self.endpoint.is_up()",
        "return since is not None and began >= since",
        "test_edges_patience.py::test_an_endpoint_that_dies_under_an_evaluation_is_waited_for_once_and_not_for_each_case",
    ),
    Mutant(
        "an endpoint that answers no question is asked them all",
        "return (since is not None and began >= since) or not self.endpoint.is_up()",
        "return not self.endpoint.is_up()",
        "test_edges_patience.py::test_an_endpoint_that_answers_no_question_ends_the_evaluation_within_two_minutes",
    ),
    Mutant(
        "one question that fails ends them all",
        "return (since is not None and began >= since) or not self.endpoint.is_up()",
        "return True",
        "test_edges_patience.py::test_a_question_that_is_never_answered_fails_alone_while_others_are_answered",
    ),
    Mutant(
        "silence is waited out",
        "if self._timer() - self._heard < SILENT_SECONDS:",
        "if True:",
        "test_edges_patience.py::test_an_endpoint_that_falls_silent_ends_the_evaluation_and_one_that_is_slow_does_not",
    ),
    Mutant(
        "whoever is slow is taken for dead",
        "if not self._is_up():",
        "if True:",
        "test_edges_patience.py::test_an_endpoint_that_falls_silent_ends_the_evaluation_and_one_that_is_slow_does_not",
    ),
    Mutant(
        "waits follow a clock that is set",
        "return time.monotonic if clock is time.time else clock",
        "return clock",
        "test_edges_job.py::test_a_clock_that_is_set_back_lengthens_no_wait",
    ),
    Mutant(
        "files that are not written over are anybody's",
        "os.O_WRONLY | os.O_TMPFILE, 0o600)",
        "os.O_WRONLY | os.O_TMPFILE, 0o644)",
        "test_secrets.py::test_every_file_of_a_run_is_the_users_alone",
    ),
    Mutant(
        "a key is sent wherever a record says",
        "if trust is None or not trust(recorded):",
        "if False:",
        "test_edges_job.py::test_no_key_is_sent_to_a_recorded_endpoint_that_is_not_the_one_configured",
    ),
    Mutant(
        "credentials of a URL are kept",
        'return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()',
        "return url",
        "test_edges_job.py::test_credentials_in_a_base_url_are_neither_saved_nor_shown",
    ),
    Mutant(
        "a loss that is no number breaks the record",
        "x if math.isfinite(x) else None",
        "x",
        "test_edges_job.py::test_a_loss_that_is_no_number_leaves_valid_files",
    ),
    Mutant(
        "a part is as long as it is thought to be",
        "if abs(about - limit) > len(messages):",
        "if True:",
        "test_check_file.py::test_a_part_is_counted_as_a_whole_and_not_by_its_rounded_turns",
    ),
    Mutant(
        "a long conversation is counted anew with every turn",
        "if abs(about - limit) > len(messages):",
        "if False:",
        "test_edges_job.py::test_a_long_conversation_is_counted_a_few_times_over_to_be_split",
    ),
    Mutant(
        "a line of the log may control the terminal",
        "logger.addFilter(_Inert())",
        "pass",
        "test_edges_job.py::test_what_data_are_called_is_shown_inert",
    ),
    Mutant(
        "an answer that says nothing is taken",
        "if value is None:",
        "if False:",
        "test_recovery.py::test_an_answer_that_is_no_job_is_a_lost_answer",
        within="_require_shape",
    ),
    Mutant(
        "the manifest names the last load",
        "next((load for load in reversed(self._loads) if load.holds(splits)), None)",
        "self._loads[-1] if self._loads else None",
        "test_manifest.py::test_the_manifest_names_the_choice_of_the_data_that_are_saved_whatever_was_loaded_since",
    ),
    Mutant(
        "a load holds what shares an example with it",
        "return all(",
        "return any(",
        "test_manifest.py::test_the_manifest_names_the_choice_of_the_data_that_are_saved_whatever_was_loaded_since",
        within="holds",
    ),
    Mutant(
        "a load is never found again",
        "return all(",
        "return not all(",
        "test_manifest.py::test_the_steps_one_by_one_write_the_same_manifest",
        within="holds",
    ),
    Mutant(
        "an error throws away what is under way",
        "failure = failure or answer",
        "raise answer",
        "test_asking.py::test_an_answer_that_was_under_way_when_another_was_refused_for_all_is_kept",
    ),
    Mutant(
        "a stop throws away what is under way",
        "while working:",
        "while working and not self._closed:",
        "test_edges_money.py::test_answers_under_way_when_the_limit_stops_an_evaluation_are_kept_and_counted",
    ),
    Mutant(
        "a part that is missing is asked for again",
        "self._lacking.add(part)",
        "pass",
        "test_job.py::test_a_part_of_the_api_that_is_missing_is_logged_once_and_gone_past",
    ),
    Mutant(
        "one object that is gone is a missing part",
        "if error.status_code == 404 and not gone_is_missing:",
        "if False:",
        "test_recovery.py::test_a_file_that_was_deleted_there_is_uploaded_again",
    ),
    Mutant(
        "a job is recorded before it is known to be there",
        "self._endpoint_of(self.settings).job(job_id, patience=patience)",
        "pass",
        "test_edges_money.py::test_a_job_that_is_not_there_neither_goes_on_nor_leaves_a_record",
    ),
    Mutant(
        "a run that failed stays this instance's",
        "run.release()",
        "pass",
        "test_edges_job.py::test_after_an_interrupt_in_a_notebook_a_new_instance_takes_the_run_over",
        within="_released_on_failure",
    ),
    Mutant(
        "an instance does not know its own record",
        "if current is not None and run.path == current.path:",
        "if False:",
        "test_recovery.py::test_an_instance_that_holds_the_record_of_a_job_records_its_cancellation",
    ),
    Mutant(
        "a record does not tell the base model",
        "return run.settings.model if run else None",
        "return None",
        "test_edges_money.py::test_a_tuned_model_of_any_name_is_priced_as_what_it_was_tuned_from",
    ),
    Mutant(
        "any file of the folder is a run",
        'if not re.fullmatch(r"run_\\d{8}_\\d{6}", stem) or not path',
        "if not path",
        "test_recovery.py::test_a_run_that_is_not_recorded_here_is_a_wrong_setting",
    ),
)
JUDGE = (
    Mutant(
        "each pair is judged in one order",
        "enumerate(((tuned, rival), (rival, tuned)), start=1)",
        "enumerate(((tuned, rival), (tuned, rival)), start=1)",
        "test_judge.py::test_each_pair_is_asked_in_both_orders_and_nothing_tells_whose_answers_they_are",
    ),
    Mutant(
        "the first order alone decides a pair",
        'return self.verdicts[0].winner if self.verdicts and self.consistent else "tie"',
        'return self.verdicts[0].winner if self.verdicts else "tie"',
        "test_judge.py::test_a_winner_of_one_order_alone_is_a_tie",
    ),
    Mutant(
        "a verdict of the second order is read as of the first",
        '_verdict_of(next(answers), "tuned"), _verdict_of(next(answers), "rival")',
        '_verdict_of(next(answers), "tuned"), _verdict_of(next(answers), "tuned")',
        "test_judge.py::test_each_pair_is_asked_in_both_orders_and_nothing_tells_whose_answers_they_are",
    ),
    Mutant(
        "a tie is no half of a win",
        '{"tuned": 1.0, "tie": 0.5, "rival": 0.0}',
        '{"tuned": 1.0, "tie": 0.0, "rival": 0.0}',
        "test_judge.py::test_ties_are_half_a_win_and_pairs_without_a_verdict_are_none",
    ),
    Mutant(
        "a pair without a verdict is a tie",
        "        if self.fault is not None:\n            return None\n        return self.verdicts",
        "        return self.verdicts",
        "test_judge.py::test_ties_are_half_a_win_and_pairs_without_a_verdict_are_none",
    ),
    Mutant(
        "pairs that nobody was asked about are consistent",
        '"consistency": _percent(j.consistent for j in asked)',
        '"consistency": _percent(j.consistent for j in counted)',
        "test_judge.py::test_ties_are_half_a_win_and_pairs_without_a_verdict_are_none",
    ),
    Mutant(
        "the win rate has an interval over few dialogues",
        "MIN_DIALOGUES = 10",
        "MIN_DIALOGUES = 0",
        "test_judge.py::test_the_interval_is_over_dialogues_and_there_is_none_of_few",
    ),
    Mutant(
        "the win rate's interval is over cases",
        "[Answer(j.case_id, j.dialogue_id, j.tuned, j.rival, j.group) for j in judgements]",
        "[Answer(str(n), str(n), j.tuned, j.rival) for n, j in enumerate(judgements)]",
        "test_judge.py::test_the_interval_is_over_dialogues_and_there_is_none_of_few",
    ),
    Mutant(
        "a judge is free in the estimate",
        "return self.evaluation_usd + judge_usd",
        "return self.evaluation_usd",
        "test_judge.py::test_the_judge_has_a_line_of_its_own_in_the_price_and_a_part_in_its_sum",
    ),
    Mutant(
        "a judge is priced for one order",
        "[replace(c, tools=None) for c in pairs for _ in range(2)]",
        "[replace(c, tools=None) for c in pairs]",
        "test_judge.py::test_the_judge_has_a_line_of_its_own_in_the_price_and_a_part_in_its_sum",
    ),
    Mutant(
        "a judge without a price isn't named",
        "unpriced = [judge.model] if judge and judge.usd is None else []",
        "unpriced: list[str] = []",
        "test_judge.py::test_a_judge_without_a_price_is_named_refused_under_a_limit_and_priced_by_the_base_flags",
    ),
    Mutant(
        "a judge is not in the price before asking",
        "estimate = estimate.with_judge(judge_ahead(self._tested(items, responses)))",
        "judge_ahead(self._tested(items, responses))",
        "test_judge.py::test_a_judge_over_the_budget_is_refused_before_anything_is_asked",
    ),
    Mutant(
        "the limit isn't held before the judge",
        'asker.ledger.require(estimate, "evaluation", paid=paid)',
        "pass",
        "test_judge.py::test_answers_that_leave_too_little_for_the_judge_stop_before_it_is_asked",
    ),
    Mutant(
        "verdicts had are asked again",
        "missing = [item for item in items if item.question.key not in responses]",
        "missing = items",
        "test_judge.py::test_a_judge_that_stopped_half_way_is_resumed_without_paying_twice",
        within="Judge",
    ),
    Mutant(
        "verdicts had are priced again",
        "self._price([item for item in items if item.question.key not in known])",
        "self._price(items)",
        "test_judge.py::test_a_judge_that_stopped_half_way_is_resumed_without_paying_twice",
    ),
    Mutant(
        "the same answer twice is asked about",
        "self._items([pair for pair in pairs if pair[1] != pair[2]])",
        "self._items(pairs)",
        "test_judge.py::test_the_same_answer_twice_is_a_tie_that_nobody_is_asked_about",
    ),
    Mutant(
        "any key goes to a judge on another host",
        "if not (told and key) and not (trust is not None and trust(url)):",
        "if False:",
        "test_judge.py::test_no_key_goes_to_a_judge_on_another_host_unasked",
    ),
    Mutant(
        "a recorded judge is trusted with its key",
        "if not (told and key) and not (trust is not None and trust(url)):",
        "if not key and not (trust is not None and trust(url)):",
        "test_judge.py::test_a_recorded_judge_gets_no_key_before_its_url_is_told_again",
    ),
    Mutant(
        "the model's key goes to the judge",
        "own = key or settings.api_key",
        "own = settings.api_key",
        "test_judge.py::test_the_judges_own_key_goes_to_the_judge_alone",
    ),
    Mutant(
        "the SDK names an organisation of the environment to the judge",
        "request.headers.pop(name, None)",
        "pass",
        "test_judge.py::test_the_judges_own_key_goes_to_the_judge_alone",
    ),
)

SERVICES = (
    Mutant(
        "another job than was asked for is agreed to before anybody was asked",
        'epochs = told.get("n_epochs", intent.',
        'self._run.save(hyperparameters=told); epochs = told.get("n_epochs", intent.',
        "test_dialects.py::test_who_stops_before_he_has_agreed_to_another_job_is_asked_again",
    ),
    Mutant(
        "who has agreed once has agreed to any job",
        'self._run.passed.discard("training")',
        "pass",
        "test_dialects.py::test_who_does_not_agree_to_another_job_than_he_asked_for_has_it_cancelled",
    ),
    Mutant(
        "who doesn't agree pays for the job all the same",
        "job = self._endpoint.cancel(job.id)",
        "pass",
        "test_dialects.py::test_a_limit_holds_for_the_job_that_there_is",
        within="_require_or_cancel",
    ),
    Mutant(
        "a job that differs is asked about at each look",
        "if not changed or changed.items() <= self._run.hyperparameters.items():",
        "if not changed:",
        "test_dialects.py::test_a_difference_that_was_agreed_to_is_not_asked_about_again",
    ),
    Mutant(
        "the evaluation is left out of what another job costs",
        "estimate = _with_asking(training, self._run.estimate or {})",
        "estimate = training",
        "test_dialects.py::test_the_price_of_another_job_is_held_against_the_limit_with_its_evaluation",
    ),
    Mutant(
        "a corrected price isn't kept",
        "self._run.save(hyperparameters=told, estimate=_shown(estimate))",
        "self._run.save(hyperparameters=told)",
        "test_dialects.py::test_a_job_that_has_ended_with_other_hyperparameters_is_told_of_too",
    ),
    Mutant(
        "hyperparameters at the top aren't held against the job",
        '{**method, **self.request}.get("hyperparameters", {})',
        'method.get("hyperparameters", {})',
        "test_dialects.py::test_hyperparameters_at_the_top_are_held_against_the_job_too",
    ),
    Mutant(
        "whoever couldn't have the job cancelled has declined for good",
        "run.save(declined=None if goes_on else True)",
        "run.save(declined=None if goes_on and not run.job_id else True)",
        "test_dialects.py::test_a_job_that_could_not_be_cancelled_is_still_there_to_be_declined",
    ),
    Mutant(
        "a judge has OpenAI's prices where a model answers on this machine",
        "if url is None or (self.base_url and",
        "if url is None or not self.base_url or (",
        "test_cost.py::test_a_judge_of_a_model_on_this_machine_has_the_prices_of_its_own_service",
    ),
    Mutant(
        "a client's host tells the dialect of a run",
        'if "dialect" in self.given or run.dialect is None:',
        "if self.dialect is not None or run.dialect is None:",
        "test_dialects.py::test_who_began_a_run_tells_its_dialect_better_than_the_host_of_a_client",
    ),
    Mutant(
        "what one dialect has asked for answers another",
        'place = ("model", settings.base_url, settings.dialect)',
        'place = ("model", settings.base_url, None)',
        "test_dialects.py::test_an_instance_that_has_looked_at_the_endpoint_takes_a_run_up_in_the_runs_own_dialect",
    ),
    Mutant(
        "a deployment's name stays another run's",
        "if other.path != run.path and name in other.deployments.values():",
        "if False:",
        "test_dialects.py::test_a_name_is_that_of_the_model_that_was_last_deployed_under_it",
    ),
    Mutant(
        "a deployment's name stays another checkpoint's",
        "{**_without(run.deployments, name), tuned: name}",
        "{**run.deployments, tuned: name}",
        "test_dialects.py::test_two_checkpoints_of_a_run_do_not_share_the_name_of_a_deployment",
    ),
    Mutant(
        "a name that is deployed elsewhere is taken from there",
        "if other.settings.base_url != run.settings.base_url:",
        "if False:",
        "test_dialects.py::test_a_name_that_is_deployed_at_another_endpoint_stays_there",
    ),
    Mutant(
        "an answer is known by the deployment's name",
        "model = self.tuned or self.model",
        "model = self.model",
        "test_dialects.py::test_answers_are_known_by_what_was_deployed_and_not_by_its_name",
    ),
    Mutant(
        "a deployed model is asked by its own name",
        "return model, tuned.deployments.get(model, model)",
        "return model, model",
        "test_dialects.py::test_a_deployed_model_is_evaluated_on_the_split_of_its_own_run",
    ),
    Mutant(
        "a model is waited for where it has to be deployed",
        "if self._settings.speaks.deploying is None:",
        "if True:",
        "test_dialects.py::test_a_run_at_azure_ends_at_once_with_how_to_deploy_its_model",
    ),
    Mutant(
        "a deployment that loads isn't waited for",
        "endpoint.expect(model, DEPLOYMENT_SECONDS)",
        "pass",
        "test_dialects.py::test_a_deployment_that_is_still_loading_is_waited_for",
    ),
    Mutant(
        "a job's checkpoint without a name is nobody's",
        "if model or files:",
        "if model:",
        "test_dialects.py::test_a_job_without_a_model_name_lists_its_checkpoints_and_says_how_to_deploy_one",
    ),
    Mutant(
        "a file goes without its head",
        "_copy_after(head, path) if head else path",
        "path",
        "test_dialects.py::test_azure_gets_a_mark_before_each_file_and_waits_until_it_is_taken_in",
    ),
    Mutant(
        "a sent file's size is told without its head",
        "path.stat().st_size + len(self._settings.speaks.file_head)",
        "path.stat().st_size",
        "test_dialects.py::test_azure_gets_a_mark_before_each_file_and_waits_until_it_is_taken_in",
    ),
    Mutant(
        "a file that was sent isn't waited for",
        "        self._endpoint.take_in(file_id)\n",
        "",
        "test_dialects.py::test_azure_gets_a_mark_before_each_file_and_waits_until_it_is_taken_in",
    ),
    Mutant(
        "a file that can't be used is waited for",
        'if file.status == "error":',
        'if file.status == "failed":',
        "test_dialects.py::test_a_file_that_azure_cannot_use_is_told_in_its_own_words",
    ),
    Mutant(
        "a large file goes in parts where there are none",
        "if size > limit and speaks.whole_files_at and speaks.whole_files_at in self.url:",
        "if False:",
        "test_dialects.py::test_a_large_file_goes_in_parts_where_azure_takes_parts_and_not_to_a_project",
    ),
    Mutant(
        "a download that was cut begins anew",
        "if not had:\n            del wanted",
        "if True:\n            del wanted",
        "test_dialects.py::test_a_download_that_was_cut_goes_on_and_what_is_there_is_not_fetched_again",
    ),
    Mutant(
        "a deployment takes the base model's name",
        "if name == run.settings.model:",
        "if False:",
        "test_dialects.py::test_the_name_of_the_base_model_is_none_of_a_deployment",
    ),
    Mutant(
        "a judge elsewhere has the price of a baseline of its name",
        '("local", settings.local), ("baseline", baseline)',
        '("local", settings.local),',
        "test_cost.py::test_a_judge_elsewhere_of_the_baselines_name_is_refused",
    ),
    Mutant(
        "what comes from the beginning is put after what there was",
        '"ab" if goes_on else "wb"',
        '"ab"',
        "test_dialects.py::test_a_download_that_was_cut_goes_on_and_what_is_there_is_not_fetched_again",
    ),
    Mutant(
        "half a file is taken for a whole one",
        "if size is not None and part.stat().st_size != size:",
        "if False:",
        "test_dialects.py::test_an_id_of_a_file_leads_out_of_no_folder",
    ),
    Mutant(
        "any leftover is the beginning of a file",
        "if size is None or had > size:",
        "if False:",
        "test_dialects.py::test_what_is_left_of_a_download_counts_only_as_the_beginning_of_the_file",
    ),
    Mutant(
        "weights overwrite another file",
        "if path.exists() and _sha256_of(path) != fetched.sha256:",
        "if False:",
        "test_dialects.py::test_no_file_that_is_there_is_overwritten_and_none_lands_outside_of_the_folder",
    ),
    Mutant(
        "weights that are there are fetched again",
        "if known is not None and path.is_file() and _sha256_of(path) == known.sha256:",
        "if False:",
        "test_dialects.py::test_a_download_that_was_cut_goes_on_and_what_is_there_is_not_fetched_again",
    ),
    Mutant(
        "a file of a service goes where its id says",
        'f".{_bare_name(file_id)}.part"',
        'f".{file_id}.part"',
        "test_dialects.py::test_an_id_of_a_file_leads_out_of_no_folder",
    ),
    Mutant(
        "what FastAPI says of a refusal isn't told",
        'body.get("message") or body.get("detail")',
        'body.get("message")',
        "test_dialects.py::test_a_definite_refusal_is_told_in_the_words_of_the_service",
    ),
    Mutant(
        "a refusal is to be tried again",
        "if remedy is None and status and not is_transient(error) and status < 500:",
        "if False:",
        "test_dialects.py::test_a_definite_refusal_is_told_in_the_words_of_the_service",
    ),
    Mutant(
        "auto is sent to who doesn't know it",
        'left_out = (None,) if dialect.takes_auto else (None, "auto")',
        "left_out = (None,)",
        "test_dialects.py::test_what_nebius_may_choose_itself_is_left_out",
    ),
    Mutant(
        "a multiplier is dropped where a rate is wanted",
        "if getattr(self, name) is not None and name != dialect.rate:",
        "if False:",
        "test_dialects.py::test_a_multiplier_is_no_rate_for_nebius",
    ),
    Mutant(
        "the training type isn't sent",
        '"extra_body": told,',
        '"extra_body": None,',
        "test_dialects.py::test_azure_is_told_the_training_type_as_it_was_given",
    ),
    Mutant(
        "a name that Azure refuses is sent",
        "if len(suffix) > dialect.longest_suffix or set(suffix) & set(refused):",
        "if False:",
        "test_dialects.py::test_what_azure_would_refuse_is_refused_before_anything_is_sent",
    ),
)

MUTANTS = (
    *MONEY,
    *STATISTICS,
    *RECOVERY,
    *DATA,
    *FILES,
    *TRAINED_ON,
    *CHECKPOINTS,
    *HOUSE,
    *JUDGE,
    *SERVICES,
)


class Misplaced(Exception):
    """A mutant's text isn't where it should be, or what comes of it isn't Python."""


def mutate(mutant: Mutant, text: str) -> str:
    start, end = 0, len(text)
    if mutant.within:
        heads = list(re.finditer(rf"^( *)(?:def|class) {mutant.within}\b", text, re.MULTILINE))
        if len(heads) != 1:
            raise Misplaced(f"{mutant.within} is defined {len(heads)} times in {mutant.file}")
        start, depth = heads[0].end(), len(heads[0][1])
        following = re.compile(rf"^ {{0,{depth}}}[\w@#\"]", re.MULTILINE).search(text, start)
        end = following.start() if following else end
    if (count := text.count(mutant.old, start, end)) != 1:
        place = mutant.within or mutant.file
        raise Misplaced(f"its text stands {count} times in {place}: {mutant.old}")
    at = text.index(mutant.old, start, end)
    mutated = text[:at] + mutant.new + text[at + len(mutant.old) :]
    try:
        compile(mutated, mutant.file, "exec", dont_inherit=True)
    except SyntaxError as error:
        raise Misplaced(f"it is not Python any more: {error}") from error
    return mutated


class Ended(NamedTuple):
    """How pytest ended: its exit code (``None``: it hung) and the first test that failed."""

    code: int | None
    first: str


def run_tests(folder: Path, tests: Sequence[str], *more: str, seconds: float) -> Ended:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider"]
    # Bytecode is told apart by second and size, which two mutants may have in common.
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        [*command, *more, *(f"tests/{test}" for test in tests)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    try:
        out = process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        return Ended(None, "it hangs")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with all that the tests started
            process.wait()
    found = re.search(r"^(?:FAILED|ERROR) tests/(\S+::\S+)", out, re.MULTILINE)
    if found:
        return Ended(1, found[1])  # whatever xdist makes of being stopped
    return Ended(process.returncode, out.strip()[-300:])


def try_mutant(mutant: Mutant, folder: Path) -> tuple[bool, str]:
    """Whether a test noticed, and which or why not; ``folder`` is left as it was."""
    path = folder / mutant.file
    text = path.read_text("utf-8")
    path.write_text(mutate(mutant, text), "utf-8")
    parallel = ("-n", "2") if importlib.util.find_spec("xdist") else ()
    try:
        ended = run_tests(folder, [mutant.test], seconds=NAMED_SECONDS)
        named = ended.code != 0
        if not named:
            ended = run_tests(folder, [], *parallel, seconds=SUITE_SECONDS)
    finally:
        path.write_text(text, "utf-8")
    if ended.code in (1, None):
        return True, "" if named else f"by {ended.first}, not by {mutant.test}"
    return False, "" if ended.code == 0 else f"pytest ended with {ended.code}: {ended.first}"


def tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def choose(names: Sequence[str]) -> list[Mutant]:
    """The mutants whose names hold one of ``names``, or all of them."""
    return [m for m in MUTANTS if not names or any(name in m.name for name in names)]


def find_places(chosen: Sequence[Mutant]) -> list[Mutant]:
    """Those mutants whose text is in its place and whose test is there; the others are told."""
    sound = []
    for mutant in chosen:
        file, _, name = mutant.test.partition("::")
        try:
            mutate(mutant, (PROJECT / mutant.file).read_text("utf-8"))
            tests = (PROJECT / "tests" / file).read_text("utf-8")
            if not re.search(rf"^def {name}\b", tests, re.MULTILINE):
                raise Misplaced(f"there is no {mutant.test}")
        except Misplaced as error:
            tell(f"MISPLACED  {mutant.name}: {error}")
        else:
            sound.append(mutant)
    return sound


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("-j", type=int, default=1, metavar="N", dest="workers")
    parser.add_argument("--texts", action="store_true")
    options = parser.parse_args(argv)
    for name in options.names:
        if not choose([name]):
            parser.error(f"no mutant is called {name!r}")
    chosen = choose(options.names)
    sound = find_places(chosen)
    if options.texts:
        tell(f"{len(sound)} of {len(chosen)} texts are in their place")
        return 0 if len(sound) == len(chosen) else 1
    killed = 0
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(options.workers) as pool:
        copies: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for number in range(options.workers):
            copy = Path(scratch, str(number), "project")  # alone, as a project is
            copies.put(shutil.copytree(PROJECT, copy, ignore=LEFT_OUT))
        unmutated = run_tests(copy, sorted({m.test for m in sound}), seconds=SUITE_SECONDS)
        if unmutated.code != 0:
            tell(f"without any mutant pytest ends with {unmutated.code}: {unmutated.first}")
            return 2

        def attempt(mutant: Mutant) -> tuple[bool, str, float]:
            folder, began = copies.get(), time.monotonic()
            try:
                return *try_mutant(mutant, folder), time.monotonic() - began
            finally:
                copies.put(folder)

        for mutant, (dead, reason, took) in zip(sound, pool.map(attempt, sound), strict=True):
            killed += dead
            ended = "killed  " if dead else "SURVIVED"
            tell(f"{ended}  {took:4.0f} s  {mutant.name} {reason}".rstrip())
    tell(f"{killed} of {len(chosen)} killed")
    return 0 if killed == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
