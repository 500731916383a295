"""`jaxmerge sample`: a line of JSON a prompt in, a line out."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from ..data.records import check_messages
from ..log import UserError, progress
from ..models.open import Model, open_model
from ..models.tokenizer import Tokenizer
from ..runtime.jsonl import numbered_jsonl, write_jsonl
from ..runtime.mesh import make_mesh
from ..runtime.processes import on_first
from .rollout import Prompt, Sample, batched, rollout
from .settings import SampleOptions
from .together import compose


def sample_file(path: str, source: Path, out: Path, options: SampleOptions) -> int:
    """Generate for every line of `source`; the answers appear in `out` only when all are there."""
    numbered = numbered_jsonl(source)
    lines = [line for _, line in numbered]
    places = [f"{source}:{number}" for number, _ in numbered]
    if not out.parent.is_dir():
        raise UserError(f"{out.parent}: no such folder; make it first")
    model = open_model(path, make_mesh(options.mesh))
    with progress("sample", total=len(lines) * options.samples, unit="samples") as bar:
        samples = generate(model, lines, places, options, on_sample=lambda tokens: bar.advance(1))
    rows = []
    for line, mine in zip(lines, samples, strict=True):
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


def generate(
    model: Model,
    lines: Sequence[dict[str, Any]],
    places: Sequence[str],
    options: SampleOptions,
    *,
    on_sample: Callable[[int], None] = lambda tokens: None,
) -> list[list[Sample]]:
    """Generate `options.samples` completions of each line {"prompt"} or {"messages"}.

    Args:
      places: what an error calls each line.
      on_sample: called with the length of each completion as it ends.
    """
    date = datetime.date.fromisoformat(options.date or on_first(lambda: datetime.date.today().isoformat()))
    model = dataclasses.replace(model, tokenizer=dataclasses.replace(model.tokenizer, date=date))
    model = compose(model, options.decode)
    prompts = [to_prompt(model, line, options.chat, place) for line, place in zip(lines, places, strict=True)]
    settings = options.settings(dtype=options.dtype, gather=options.mesh.gather_to_decode)
    samples = rollout(
        model.config,
        model.params,
        model.tokenizer,
        prompts,
        settings,
        jax.random.key(options.seed),
        on_sample=on_sample,
    )
    return [list(mine) for mine in batched(samples, options.samples)]


def to_prompt(model: Model, line: dict[str, Any], chat: bool | None, where: str) -> Prompt:
    """The tokens of a line {"prompt"} or {"messages"}; its "id", else its text, keys its random draws.

    Messages that end with the assistant's are gone on with.
    """
    tokenizer = model.tokenizer
    if chat and not tokenizer.has_chat_template:
        raise UserError("chat=true, but this model has no chat template; set chat=false")
    rendered = "messages" in line
    if "messages" in line:
        if not tokenizer.has_chat_template:
            raise UserError(f"{where} has messages, but this model has no chat template; give a prompt instead")
        try:
            text = chat_text(tokenizer, line["messages"])
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    elif "prompt" in line:
        text = line["prompt"]
        if not isinstance(text, str):
            raise UserError(f"{where}: prompt is {text!r:.60}; a text is wanted")
        if chat or (chat is None and tokenizer.has_chat_template):
            text, rendered = tokenizer.chat([{"role": "user", "content": text}]), True
    else:
        raise UserError(f"{where}: found the keys {sorted(line)}; wanted prompt or messages")
    return Prompt(str(line.get("id", text)), tuple(tokenizer.encode(text, special=not rendered)))


def chat_text(tokenizer: Tokenizer, messages: Any) -> str:
    """A conversation up to the opening of an answer, or to where an answer that was begun goes on."""
    check_messages(messages)
    unfinished = messages[-1]["role"] == "assistant"
    return tokenizer.chat_to_continue(messages) if unfinished else tokenizer.chat(messages)
