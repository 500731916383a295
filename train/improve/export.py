"""From a run's checkpoints back to models: loading one, and writing one as a Hugging Face folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax.numpy as jnp

from ..log import UserError
from ..models.hf import save_hf
from ..models.open import Model, open_model
from ..resolve import build, read_yaml
from ..runtime.journal import Journal
from ..runtime.settings import Mesh
from .plan import BASE, plan
from .session import Session
from .settings import Improve


def export(run: str, out: str, *, method: str | None = None, number: int | None = None, dtype: str = "float32") -> None:
    """Write the model a method ended a round with as a Hugging Face folder.

    Args:
      run: folder of a run, or (without `method`) anything `open_model` reads.
      method: name of a method; probes are made again from the checkpoints they come from.
      number: of the round; the last committed one by default.
      dtype: float32, bfloat16 or float16, cast once.
    """
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype={dtype!r}; choose float32, bfloat16 or float16")
    model = open_model(run) if method is None else method_model(Path(run), method, number)
    save_hf(out, model.config, model.params, dtype=jnp.dtype(dtype), tokenizer_from=model.tokenizer)


def method_model(root: Path, method: str, number: int | None) -> Model:
    if not (root / "config.yaml").is_file():
        raise UserError(f"{root}: not the folder of a run (no config.yaml); `method=` is of runs")
    todo, outcomes = plan(build(Improve, read_yaml(root / "config.yaml")))
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
    outcome = found[-1]
    if outcome.model != BASE and todo[outcome.model].kind in ("sft", "merge"):
        if not (root / "checkpoints" / outcome.model).is_dir():
            raise UserError(f"{root}: the weights of {outcome.model} are gone (keep= deletes those of old rounds)")
        return open_model(str(root / "checkpoints" / outcome.model))
    # Read where this is, not on the mesh of the run.
    config = dataclasses.replace(build(Improve, read_yaml(root / "config.yaml")), mesh=Mesh())
    return Session(config, journal, todo, outcomes).weights.model_of(outcome.model)
