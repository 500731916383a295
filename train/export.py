"""From a run's checkpoints back to models: loading one, and writing one as a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp

from . import checkpoint
from .config import Mesh
from .journal import write_durably
from .log import UserError
from .mesh import make_mesh, sharding_of, shardings
from .models.decoder import shapes
from .models.hf import save_hf
from .models.hf_config import config_from_hf, config_to_hf
from .models.load import Model, load_model
from .models.tokenizer import Tokenizer


def describe(model: Model, folder: Path) -> None:
    """Write config.json and the tokenizer's files: what a checkpoint of weights needs to be a model again."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_durably(temporary / "config.json", json.dumps(config_to_hf(model.config), indent=2))
    model.tokenizer.save(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def open_model(path: str, mesh: jax.sharding.Mesh | None = None) -> Model:
    """A model from anything that holds one: what `load_model` reads, or a checkpoint of a run."""
    local = Path(path)
    root = next((p for p in (local, *local.parents) if (p / "model" / "config.json").is_file()), None)
    if not local.is_dir() or (local / "config.json").is_file() or root is None:
        return load_model(path, sharding=None if mesh is None else functools.partial(sharding_of, mesh))
    # A merge written as Orbax has one model, in `weights`; a run has many, in `checkpoints`.
    if local == root and not (local / "weights" / "_METADATA").is_file():
        found = ", ".join(sorted(str(p.parent) for p in root.glob("checkpoints/*/*/*/weights"))) or "none yet"
        raise UserError(f"{path} is a run with several models; name one of its checkpoints: {found}")
    candidates = [local, local / "weights", local / "merge" / "weights", local / "sft" / "weights"]
    weights = next((p for p in candidates if (p / "_METADATA").is_file()), None)
    if weights is None:
        raise UserError(f"{path}: no complete checkpoint there; looked for {', '.join(str(c) for c in candidates)}")
    config = config_from_hf(json.loads((root / "model" / "config.json").read_text()), source=root / "model")
    like = shapes(config)
    where = shardings(mesh or make_mesh(Mesh()), like)
    params = checkpoint.load_weights(weights, checkpoint.abstract(like, where))
    tokenizer = Tokenizer.from_folder(root / "model")
    fitted = tokenizer.fitted(vocab_size=config.vocab_size, eos_ids=config.eos_token_id, source=root / "model")
    return Model(config, params, fitted)


def export(run: str, out: str, *, method: str | None = None, round: int | None = None, dtype: str = "float32") -> None:
    """Write the model a method ended a round with as a Hugging Face folder.

    Args:
      run: folder of a run, or (without `method`) anything `open_model` reads.
      method: name of a method; probes are made again from the checkpoints they come from.
      round: the last committed one by default.
      dtype: float32, bfloat16 or float16, cast once.
    """
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype={dtype!r}; choose float32, bfloat16 or float16")
    model = open_model(run) if method is None else method_model(Path(run), method, round)
    save_hf(out, model.config, model.params, dtype=jnp.dtype(dtype), tokenizer_from=model.tokenizer)


def method_model(root: Path, method: str, round: int | None) -> Model:
    from .config import Improve
    from .journal import Journal
    from .plan import BASE, plan
    from .resolve import build, read_yaml
    from .run import Run

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
    found = [o for o in named if round is None or o.round == round]
    if not found:
        raise UserError(f"{root}: {method} has no committed round {round}; there are {[o.round for o in named]}")
    outcome = found[-1]
    if todo_kind(todo, outcome.model) in ("sft", "merge"):
        if not (root / "checkpoints" / outcome.model).is_dir():
            raise UserError(f"{root}: the weights of {outcome.model} are gone (keep= deletes those of old rounds)")
        return open_model(str(root / "checkpoints" / outcome.model))
    # Read where this is, not on the mesh of the run.
    config = dataclasses.replace(build(Improve, read_yaml(root / "config.yaml")), mesh=Mesh())
    run = Run(config, journal, todo, outcomes)
    return Model(run.model.config, run.weights(outcome.model), run.model.tokenizer)


def todo_kind(todo, name: str) -> str | None:
    from .plan import BASE

    return None if name == BASE else todo[name].kind
