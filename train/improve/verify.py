"""Say, tensor by tensor, whether a model of a run is what the run's own merge makes: `jaxmerge verify RUN`.

The merge of a round is replayed by the config in the run's folder, from the anchor and the tuned checkpoint of that
round, with the random masks of that round. Of rules that work element by element a sample of each tensor is replayed
first, and everything where that shows a fault. Checkpoints that it rests on are held to the digests that the run
recorded of them, so that what is found wrong is the merge and not its inputs.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxmerge
from jaxmerge.draw import MASKS
from jaxmerge.files.checkpoints.open import open_source
from jaxmerge.files.checkpoints.source import read
from jaxmerge.files.verdict import (
    RIGHT,
    UNSURE,
    WRONG,
    Triple,
    Unsure,
    Verdict,
    elsewhere,
    judge,
    judge_shape,
    runs,
    summarise,
)

from ..log import UserError
from ..models.decoder import Params
from ..models.hf import named
from ..resolve import build, read_yaml
from ..runtime import checkpoint
from ..runtime.journal import Journal
from ..runtime.mesh import make_mesh
from ..runtime.settings import Mesh
from . import merge as combine
from .origin import Origin
from .plan import BASE, TUNES, Phase, Plan, plan
from .rehearse import read_reference
from .settings import Improve, Merge
from .weights import Weights, joined

Progress = Callable[[int, int, str], None]
Leaves = dict[str, Any]
"""Arrays by their names in Hugging Face files."""


def verify(out: str, origin: Origin, *, everything: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Compare a run's models with what the run's merges make of its checkpoints.

    Args:
      out: a folder of the run, or one that `export` wrote.
      origin: which model of which run that is.
      everything: replay every element of every tensor.
      progress: called with tensors done, tensors in all and a tensor's name.

    Returns:
      {"out", "models": [report as of `jaxmerge.files.verify`, …], "unsure": {model: why it cannot be told}, "code"}.

    Raises:
      Unsure: what the run's merge was cannot be told.
      ValueError, UserError: what should be compared cannot be read.
    """
    run = open_run(origin.root)
    exported = (Path(out) / "config.json").is_file()
    names = chosen(run, origin.model)
    if exported and len(names) > 1:
        raise Unsure(
            f"{out} does not say which model of {run.root} it is; give of={run.root}/checkpoints/MODEL, a model being "
            f"one of {', '.join(names)}"
        )
    reports: list[dict[str, Any]] = []
    unsure: dict[str, str] = {}
    for name in names:
        try:
            reports.append(check(run, run.todo[name], out if exported else None, everything, progress))
        except Unsure as error:
            if len(names) == 1:
                raise
            unsure[name] = str(error)
    codes = [report["code"] for report in reports] + [UNSURE] * len(unsure)
    code = WRONG if WRONG in codes else max(codes, default=RIGHT)
    return {"out": out, "models": reports, "unsure": unsure, "code": code}


@dataclasses.dataclass(frozen=True)
class Run:
    """What a finished or unfinished run left: its config, what it planned, what it committed, and its weights."""

    root: Path
    config: Improve
    journal: Journal
    todo: Plan
    weights: Weights


def open_run(root: Path) -> Run:
    if not (root / "config.yaml").is_file():
        raise Unsure(f"the run's folder {root} is not there; give it with of=RUN")
    values = read_yaml(root / "config.yaml")
    if "methods" not in values:
        raise Unsure(f"{root} is no run of `jaxmerge improve` (its config.yaml has no methods): it has no merges")
    config = dataclasses.replace(build(Improve, values), mesh=Mesh())  # replayed here, not on the mesh of the run
    todo, _ = plan(config)
    journal = Journal(root, read_only=True)
    return Run(root, config, journal, todo, Weights(config, journal, todo, make_mesh(config.mesh)))


def chosen(run: Run, model: str) -> list[str]:
    """Return the phases whose models are to be compared: the one that is named, or all merges."""
    made = [phase for phase in run.todo.phases if phase.makes_weights and run.journal.committed(phase.name)]
    merges = [phase.name for phase in made if phase.kind in ("join", "merge")]
    if not model:
        if not merges:
            raise Unsure(f"{run.root} has no merge that is committed")
        return merges
    known = [phase.name for phase in made]
    found = next(
        (name for name in (model, *(f"{model}/{kind}" for kind in ("merge", "join", *TUNES))) if name in known), None
    )
    if found is None:
        raise Unsure(f"{run.root} has committed no model {model!r}; there are {', '.join(known) or 'none'}")
    return [found]


def check(run: Run, phase: Phase, folder: str | None, everything: bool, progress: Progress | None) -> dict[str, Any]:
    """Compare one model: its checkpoint, or the folder it was exported to."""
    where = folder or str(run.root / "checkpoints" / phase.name)
    found, digest = found_in(folder) if folder else checkpoint_of(run, phase)
    recorded = run.weights.digest(phase.name)
    altered = None
    if digest not in (None, recorded):
        said = f"its digest is {digest}, the run recorded {recorded}"
        altered = Verdict("(the checkpoint)", "different", detail=f"{said}: it was changed after the run wrote it")
    if (phase.tunes or phase.kind == "graft") and folder is None:
        if altered is not None:
            return summarise(where, [altered], (), ())
        raise Unsure(f"{phase.name} is no merge: training cannot be replayed; its digest is the one the run recorded")
    sampled = not everything and is_elementwise(phase)
    report = compare(where, replay(run, phase, sampled), found, sampled, progress)
    if sampled and (report["code"] == WRONG or altered is not None):
        report = compare(where, replay(run, phase, False), found, False, progress)
    if is_random(phase) and set(report["tensors"]) == {"different"}:
        check_versions(run.root, phase.name)
    if altered is not None and report["code"] == RIGHT:  # by less than rounding
        report |= {"wrong": [altered], "code": WRONG}
    return report


# --- what is found ---


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A tensor that is not read yet."""

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]


Found = Mapping[str, Leaf]


def found_in(folder: str) -> tuple[Found, None]:
    tensors = open_source(folder).tensors
    return {name: Leaf(tuple(t.shape), np.dtype(t.dtype), partial(read, t)) for name, t in tensors.items()}, None


def checkpoint_of(run: Run, phase: Phase) -> tuple[Found, str]:
    """The tensors of a checkpoint, and its digest."""
    place = run.weights.folder(phase.name)
    if phase.kind == "probe":
        raise Unsure(f"{phase.name} is a probe, which has no checkpoint; export it and verify that folder")
    if not place.is_dir():
        raise Unsure(f"{phase.name}: its checkpoint is gone ({gone(run)})")
    params = run.weights.read(place / "weights")
    leaves = {name: Leaf(leaf.shape, np.dtype(leaf.dtype), partial(np.asarray, leaf)) for name, leaf in named(params)}
    return leaves, checkpoint.digest(params)


def gone(run: Run) -> str:
    return "deleted by hand" if run.config.keep is None else f"keep={run.config.keep} deletes those of older rounds"


# --- what is wanted ---


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a merge makes, and what changes are counted from; leaves are flat samples, or whole, of `shapes`."""

    leaves: Leaves
    reference: Leaves
    shapes: dict[str, tuple[int, ...]]


def is_elementwise(phase: Phase) -> bool:
    """Whether elements can be replayed alone."""
    if phase.kind != "merge":
        return False
    config = build(Merge, phase.settings["merge"], "merge")
    return jaxmerge.RULES[config.rule].needs.elementwise or (config.rule == "imm" and not config.drop)


def is_random(phase: Phase) -> bool:
    if phase.kind != "merge":
        return False
    config = build(Merge, phase.settings["merge"], "merge")
    return jaxmerge.RULES[config.rule].needs.key == "required" or bool(config.drop)


def replay(run: Run, phase: Phase, sampled: bool) -> Wanted:
    """Make a model again from its inputs.

    Raises:
      Unsure: an input is gone, or is not what the run made.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def taken(name: str) -> Params:
        params = read_input(run, name)
        shapes.update((leaf, tuple(x.shape)) for leaf, x in named(params))
        return jax.tree.map(sample, params) if sampled else params

    try:
        if phase.kind == "merge":
            made, reference = remerge(run, phase, taken, sampled)
        elif phase.kind == "join":
            made, reference = joined(phase, taken), taken(phase.inputs["model"])
        elif phase.tunes or phase.kind == "graft":
            made, reference = taken(phase.name), taken(BASE)
        else:
            made, reference = run.weights.make_probe(phase)[0], taken(BASE)
    except (UserError, ValueError) as error:
        raise error if isinstance(error, Unsure) else Unsure(f"{phase.name}: {error}") from error
    return Wanted(dict(named(made)), dict(named(reference)), shapes)


def remerge(run: Run, phase: Phase, taken: Callable[[str], Params], sampled: bool) -> tuple[Params, Params]:
    """Return what the merge of a round makes, and its anchor."""
    config = build(Merge, phase.settings["merge"], "merge")
    alphas = combine.candidates(config, phase.round, run.config.rounds)
    alpha = alphas[0]
    if len(alphas) > 1 or combine.importance_span(alpha):  # chosen by measuring, which the record keeps
        alpha = (run.journal.committed(phase.name) or {})["coefficients"]["alpha"]
    anchors = [taken(name) for role, name in phase.inputs.items() if role.startswith("anchor")]
    reference = None
    if config.reference != "anchor":
        reference = read_reference(run.weights, config.reference)
        reference = jax.tree.map(sample, reference) if sampled else reference
    anchor = combine.running_average(anchors)
    key = combine.key_of(jax.random.key(run.config.seed), phase.round)
    return combine.merged(anchor, taken(phase.inputs["tuned"]), config, alpha, reference=reference, key=key), anchor


def read_input(run: Run, name: str) -> Params:
    """The weights of an input, held to the digest that the run recorded."""
    if name == BASE:
        return run.weights.get(BASE)
    if not run.weights.folder(name).is_dir():
        raise Unsure(f"the checkpoint of {name}, which the merge is made of, is gone ({gone(run)})")
    params = run.weights.read(run.weights.folder(name) / "weights")
    recorded, digest = run.weights.digest(name), checkpoint.digest(params)
    if recorded != digest:
        raise Unsure(
            f"the checkpoint of {name} is not what the run made: its digest is {digest}, the run recorded {recorded}"
        )
    return params


def check_versions(root: Path, name: str) -> None:
    """Random masks of another version of jax, or of the generator here, may be other masks."""
    path = root / "summary.json"
    versions = json.loads(path.read_text()).get("versions", {}) if path.is_file() else {}
    then, now = versions.get("jax"), importlib.metadata.version("jax")
    if versions and versions.get("masks") != MASKS:
        raise Unsure(
            f"{name} draws random masks, of another generator when it was made (version {versions.get('masks', '1')}) "
            f"than here (version {MASKS}), and no tensor is what these masks give; verify it with that jaxmerge"
        )
    if then not in (None, now):
        raise Unsure(
            f"{name} draws random masks, by jax {then} when it was made and by jax {now} here, and no tensor is what "
            f"these masks give; verify it with jax {then}"
        )


# --- compared ---


def sample(leaf: Any) -> np.ndarray:
    """Return runs of a leaf's elements, one behind the other."""
    flat = np.asarray(leaf).reshape(-1)
    return np.concatenate([flat[start : start + count] for start, count in runs(flat.size, False)] or [flat])


def compare(out: str, wanted: Wanted, found: Found, sampled: bool, progress: Progress | None) -> dict[str, Any]:
    verdicts: list[Verdict] = []
    for i, name in enumerate(wanted.leaves):
        if progress is not None:
            progress(i + 1, len(wanted.leaves), name)
        verdicts.append(compare_leaf(name, wanted, found, sampled))
    return summarise(out, verdicts, (), sorted(set(found) - set(wanted.leaves)))


def compare_leaf(name: str, wanted: Wanted, found: Found, sampled: bool) -> Verdict:
    shape, leaf = wanted.shapes[name], found.get(name)
    if leaf is None:
        return Verdict(name, "missing", detail=elsewhere(name, shape, found))

    def triple(take: Callable[[Any], np.ndarray] = np.asarray) -> Triple:
        return take(leaf.load()), np.asarray(wanted.leaves[name]).astype(leaf.dtype), np.asarray(wanted.reference[name])

    if leaf.shape != shape:
        if sampled:  # it is looked at whole once a fault shows
            return Verdict(name, "different", detail=f"shape {list(leaf.shape)}, wanted {list(shape)}")
        return judge_shape(name, leaf.shape, shape, leaf.dtype, triple)
    return judge(name, () if sampled else shape, leaf.dtype, [triple(sample if sampled else np.asarray)], triple)
