"""`jaxmerge sample`: a line of JSON a prompt in, a line out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from ..log import UserError, progress
from ..models.open import Model, open_model
from ..runtime.jsonl import read_jsonl, write_jsonl
from ..runtime.mesh import make_mesh
from ..runtime.processes import on_first
from .rollout import Prompt, rollout
from .settings import SampleOptions


def sample_file(path: str, source: Path, out: Path, options: SampleOptions) -> int:
    """Generate for every line of `source`; the answers appear in `out` only when all are there."""
    lines = read_jsonl(source)
    if not out.parent.is_dir():
        raise UserError(f"{out.parent}: no such folder; make it first")
    model = open_model(path, make_mesh(options.mesh))
    prompts = [to_prompt(model, line, options.chat, f"{source} line {i}") for i, line in enumerate(lines, 1)]
    settings = options.settings(dtype=options.dtype, gather=options.mesh.gather_to_decode)
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
