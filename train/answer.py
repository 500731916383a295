"""The verbs `sample` and `evaluate`: one model, prompts or questions in, texts or accuracies out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from . import evaluate, round
from .config import Improve, SampleOptions
from .generate.rollout import Prompt, Settings, rollout
from .log import UserError, format_percent, progress, say
from .models.open import Model, open_model
from .report.rows import DOMAIN_NAMES, print_table
from .runtime.jsonl import read_jsonl, write_jsonl
from .runtime.mesh import make_mesh
from .runtime.processes import on_first
from .tasks import STOP_STRINGS, Question, Suite, build_suite


def sample_file(path: str, source: Path, out: Path, options: SampleOptions) -> int:
    """Generate for every line of `source`; the answers appear in `out` only when all are there."""
    lines = read_jsonl(source)
    if not out.parent.is_dir():
        raise UserError(f"{out.parent}: no such folder; make it first")
    model = open_model(path, make_mesh(options.mesh))
    prompts = [to_prompt(model, line, options.chat, f"{source} line {i}") for i, line in enumerate(lines, 1)]
    settings = Settings(
        options.samples,
        options.temperature,
        options.top_k,
        options.top_p,
        options.max_new_tokens,
        options.stop,
        options.slots,
        options.dtype,
        options.mesh.gather_to_decode,
    )
    with progress("sample", total=len(prompts) * options.samples, unit="samples") as bar:
        samples = rollout(
            model.config,
            model.params,
            model.tokenizer,
            prompts,
            settings,
            jax.random.key(options.seed),
            on_sample=lambda tokens: bar.advance(1),
        )
    rows = []
    for i, line in enumerate(lines):
        mine = samples[i * options.samples : (i + 1) * options.samples]
        fields: dict[str, list[Any]] = {
            "text": [s.text for s in mine],
            "tokens": [list(s.tokens) for s in mine],
            "logprobs": [list(s.logprobs) for s in mine],
            "reason": [s.reason for s in mine],
        }
        single = options.samples == 1
        rows.append({**line, **{name: values[0] if single else values for name, values in fields.items()}})
    on_first(write_jsonl, out, rows)
    return len(rows)


def to_prompt(model: Model, line: dict[str, Any], chat: bool | None, where: str) -> Prompt:
    """The tokens of a line {"prompt"} or {"messages"}; its "id", else its text, keys its random draws."""
    tokenizer = model.tokenizer
    if chat and not tokenizer.has_chat_template:
        raise UserError("chat=true, but this model has no chat template; set chat=false")
    if not isinstance(line.get("prompt", ""), str) or not isinstance(line.get("messages", []), list):
        raise UserError(f"{where}: prompt must be a text, messages a list")
    rendered = "messages" in line
    if "messages" in line:
        if not tokenizer.has_chat_template:
            raise UserError(f"{where} has messages, but this model has no chat template; give a prompt instead")
        text = tokenizer.chat(line["messages"])
    elif "prompt" in line:
        text = line["prompt"]
        if chat or (chat is None and tokenizer.has_chat_template):
            text, rendered = tokenizer.chat([{"role": "user", "content": text}]), True
    else:
        raise UserError(f"{where}: found the keys {sorted(line)}; wanted prompt or messages")
    return Prompt(str(line.get("id", text)), tuple(tokenizer.encode(text, special=not rendered)))


def evaluate_model(path: str, config: Improve) -> dict[str, Any]:
    """Rows of accuracy of a model on the questions of a config; printed as a table."""
    suite = build_suite(config.tasks.families, seed=config.tasks.seed, style=config.tasks.style)
    questions = [q for split in config.evaluation.splits for q in suite.questions(split)]
    if not questions:
        raise UserError(f"evaluation.splits={list(config.evaluation.splits)}: no family has such questions")
    model = open_model(path, make_mesh(config.mesh))
    block = config.evaluation
    settings = Settings(
        max_new_tokens=block.max_new_tokens,
        stop=block.stop + (STOP_STRINGS if config.tasks.few_shot else ()),
        slots=block.slots,
        dtype=config.model.dtype,
        gather=config.mesh.gather_to_decode,
    )
    few_shot = config.tasks.few_shot
    rows, _ = ask(model, suite, questions, settings, seed=config.seed, name=Path(path).name, few_shot=few_shot)
    result = {"name": path, "finished": True, "rows": rows, "paired": [], "majority": suite.majority_baselines()}
    print_table(result)
    if block.samples:
        settings = dataclasses.replace(settings, samples=block.samples, temperature=block.temperature)
        right = successes(model, suite, questions, settings, seed=config.seed, few_shot=few_shot)
        result["pass_at"] = tell_pass_rates(questions, right, block.samples)
    return result


def successes(
    model: Model, suite: Suite, questions: list[Question], settings: Settings, *, seed: int, few_shot: int = 0
) -> dict[str, int]:
    """How many of `settings.samples` samples of each question are right."""
    prompts = round.prompts(suite, model.tokenizer, questions, few_shot)
    key = jax.random.fold_in(jax.random.key(seed), np.uint32(evaluate.SAMPLED))
    with progress("sample for pass@k", total=len(prompts) * settings.samples, unit="samples") as bar:
        samples = rollout(
            model.config, model.params, model.tokenizer, prompts, settings, key, on_sample=lambda tokens: bar.advance(1)
        )
    texts = [{"question_id": s.prompt_id, "text": s.text, "reason": s.reason} for s in samples]
    right = dict.fromkeys((q.id for q in questions), 0)
    for row in round.verify(suite, {q.id: q for q in questions}, texts):
        right[row["question_id"]] += row["score"] == 1.0
    return right


def tell_pass_rates(questions: Sequence[Question], right: Mapping[str, int], samples: int) -> list[dict[str, Any]]:
    """pass@k of each family, said and returned."""
    rows = evaluate.pass_rates(questions, right, samples)
    for row in rows:
        mean, low, high = map(format_percent, row["value"])
        name = f"{row['family']} ({DOMAIN_NAMES[row['domain']]})"
        say(f"{name}  pass@{row['k']} {mean} [{low}, {high}], {row['n']} questions × {samples} samples")
    return rows


def ask(
    model: Model,
    suite: Suite,
    questions: list[Question],
    settings: Settings,
    *,
    seed: int,
    name: str,
    few_shot: int = 0,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Answer every question once: rows of accuracy under `name`, and the answers with their scores."""
    prompts = round.prompts(suite, model.tokenizer, questions, few_shot)
    start = time.perf_counter()
    with progress("evaluate", total=len(prompts), unit="questions") as bar:
        samples = rollout(
            model.config,
            model.params,
            model.tokenizer,
            prompts,
            settings,
            jax.random.key(seed),
            on_sample=lambda tokens: bar.advance(1),
        )
    texts = [{"question_id": s.prompt_id, "text": s.text, "reason": s.reason} for s in samples]
    scored = round.verify(suite, {q.id: q for q in questions}, texts)
    scores = {row["question_id"]: float(row["score"] == 1.0) for row in scored}
    seconds = time.perf_counter() - start
    return evaluate.rows(questions, scores, method=name, round=0, seconds=seconds), scored
