"""From a run's checkpoints back to models: loading one, and writing one as a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxmerge.files.model_card import Card, write_card

from ..log import UserError
from ..models.gguf_write import Type, save_gguf
from ..models.hf import save_hf
from ..models.open import Model, open_model
from ..resolve import build, read_yaml
from ..runtime.journal import Journal
from ..runtime.processes import on_first
from ..runtime.settings import Mesh
from .card import exported_card, run_card
from .origin import write_origin
from .plan import BASE, STORED, Outcome, Plan, plan
from .session import Session
from .settings import Improve


def export(
    run: str,
    out: str,
    *,
    method: str | None = None,
    number: int | None = None,
    dtype: str = "float32",
    gguf: Type | None = None,
    pre: str | None = None,
) -> Path:
    """Write the model a method ended a round with as a Hugging Face folder, or as a folder with a GGUF file.

    Args:
      run: folder of a run, or (without `method`) anything `open_model` reads.
      method: name of a method; probes are made again from the checkpoints they come from.
      number: of the round; the last committed one by default.
      dtype: float32, bfloat16 or float16, cast once.
      gguf: the type of the matrices of a GGUF file; None writes a Hugging Face folder.
      pre: llama.cpp's name of the pre-tokenizer, where `save_gguf` does not find it.

    Returns:
      What was written: the folder, or the GGUF file in it.
    """
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype={dtype!r}; choose float32, bfloat16 or float16")
    place, found = Path(out), None
    if method is None:
        model = open_model(run)
        card = functools.partial(exported_card, place, run)
    else:
        found = find_outcome(Path(run), method, number)
        model = found.model()
        card = functools.partial(found.card, place)
    written = place
    if gguf is None:
        save_hf(out, model.config, model.params, dtype=jnp.dtype(dtype), tokenizer_from=model.tokenizer)
    else:
        written = save_gguf(out, model.config, model.params, model.tokenizer, type=gguf, pre=pre)
    on_first(lambda: write_card(place, card()))
    if found is not None and found.outcome.model != BASE:
        on_first(write_origin, place, found.root, found.outcome.model)
    return written


@dataclasses.dataclass(frozen=True)
class Found:
    """A committed model of a run, and what it takes to load it."""

    root: Path
    config: Improve
    journal: Journal
    todo: Plan
    outcomes: Sequence[Outcome]
    outcome: Outcome

    def model(self) -> Model:
        """Load the model; probes are made again from the checkpoints they come from."""
        root, outcome = self.root, self.outcome
        if outcome.model != BASE and self.todo[outcome.model].kind in STORED:
            if not (root / "checkpoints" / outcome.model).is_dir():
                raise UserError(f"{root}: the weights of {outcome.model} are gone (keep= deletes those of old rounds)")
            return open_model(str(root / "checkpoints" / outcome.model))
        # Read where this is, not on the mesh of the run.
        config = dataclasses.replace(self.config, mesh=Mesh())
        return Session(config, self.journal, self.todo, list(self.outcomes)).weights.model_of(outcome.model)

    def card(self, out: Path) -> Card:
        """Say in a model card what it is and what the run measured of it."""
        before = next((o for o in self.outcomes if o.method == BASE), None)
        return run_card(
            out,
            self.config.model.path,
            method=self.outcome.method,
            round=self.outcome.round,
            settings=(self.root / "config.yaml").read_text(),
            rows=self._rows(self.outcome),
            base=() if before is None else self._rows(before),
        )

    def _rows(self, outcome: Outcome) -> Sequence[Mapping[str, Any]]:
        return (self.journal.committed(outcome.evaluate) or {}).get("rows", ())


def find_outcome(root: Path, method: str, number: int | None) -> Found:
    """Find the model that a method of a run ended a round with."""
    if not (root / "config.yaml").is_file():
        raise UserError(f"{root}: not the folder of a run (no config.yaml); `method=` is of runs")
    config = build(Improve, read_yaml(root / "config.yaml"))
    todo, outcomes = plan(config)
    journal = Journal(root, read_only=True)
    done = [o for o in outcomes if o.model == BASE or journal.committed(o.model) is not None]
    named = [o for o in done if o.method == method]
    if not named:
        raise UserError(
            f"{root}: no committed model of method {method!r}; there are {sorted({o.method for o in done})}"
        )
    found = [o for o in named if number is None or o.round == number]
    if not found:
        raise UserError(f"{root}: {method} has no committed round {number}; there are {[o.round for o in named]}")
    return Found(root, config, journal, todo, outcomes, found[-1])
