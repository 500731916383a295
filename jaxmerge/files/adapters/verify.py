"""Say of an adapter, module by module, whether it is what a recipe with the key `adapter` makes of its adapters."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxmerge.files import recipe as recipes
from jaxmerge.files.adapters.folder import open_adapter
from jaxmerge.files.adapters.merge import AdapterWork
from jaxmerge.files.card import has_our_masks
from jaxmerge.files.checkpoints.source import read
from jaxmerge.files.documents import parse_yaml, read_json
from jaxmerge.files.recipe import Recipe
from jaxmerge.files.verdict import Triple, Unsure, Verdict, judge, summarise
from jaxmerge.rules import RULES

Progress = Callable[[int, int, str], None]


def verify_adapter(
    folder: pathlib.Path, *, of: str | pathlib.Path | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Compare the change B·A of every module, and what is kept whole, with what the recipe makes.

    Args, returns and raises as for `jaxmerge.files.verify.verify`; every module is replayed. The factors themselves are
    not compared, because a decomposition has more than one pair.
    """
    record = read_json(folder / "merge.json")
    work = _work(folder, record, of)
    if RULES[work.recipe.method.rule].needs.key != "none" and not has_our_masks(record):
        raise Unsure(f"the random masks of {folder} were drawn by another version")
    found = open_adapter(str(folder))
    verdicts = []
    for i, (key, module) in enumerate(work.modules.items()):
        if progress is not None:
            progress(i + 1, len(work.modules), module.name)
        if key not in found.modules:
            verdicts.append(Verdict(module.name, "missing", detail="the adapter has no such module"))
            continue
        with jax.default_device(work.device):
            made = work.merged(key)
        pair = found.modules[key].read()
        triple = _beside_zero(pair.b @ pair.a, made.b.astype(np.float64) @ made.a.astype(np.float64))
        verdicts.append(_judged(module.name, found.modules[key].a.dtype, triple))
    for name in work.whole:
        if name not in found.whole:
            verdicts.append(Verdict(name, "missing", detail="the adapter keeps no such tensor"))
        else:
            wanted = work.kept(name)
            verdicts.append(_judged(name, found.whole[name].dtype, _beside_zero(read(found.whole[name]), wanted)))
    extra = [*(m.name for key, m in found.modules.items() if key not in work.modules)]
    return summarise(str(folder), verdicts, [], sorted([*extra, *(set(found.whole) - set(work.whole))]))


def _work(folder: pathlib.Path, record: dict[str, Any], of: str | pathlib.Path | None) -> AdapterWork:
    """The recipe that made a folder, its adapters open."""
    if of is not None and pathlib.Path(of).suffix not in (".yaml", ".yml"):
        raise Unsure(
            f"{folder} is an adapter, and {str(of)!r} is no recipe; give of=RECIPE, one with the key 'adapter'"
        )
    if of is None and "recipe" not in record:
        raise Unsure(f"{folder} has no merge.json with a recipe; give of=RECIPE")
    try:
        documents = (
            recipes.read(pathlib.Path(of)) if of is not None else [recipes.parse(_document(record["recipe"], folder))]
        )
        last = documents[-1]
        if len(documents) > 1 or not isinstance(last, Recipe) or last.adapter is None:
            raise Unsure(f"the recipe makes a whole model, and {folder} is an adapter; give of=RECIPE of the adapter")
        return AdapterWork(
            last, last.adapter, seed=record.get("seed") if of is None else None, allow=record.get("allow", ()),
            device=jax.devices("cpu")[0], progress=None, headers_only=False,
        )  # fmt: skip
    except ValueError as error:
        raise error if isinstance(error, Unsure) else Unsure(str(error)) from error


def _document(text: str, folder: pathlib.Path) -> Any:
    """The one document of a recipe in a record."""
    documents = parse_yaml(text, folder / "merge.json")
    if len(documents) != 1:
        raise Unsure(f"the recipe of {folder} has {len(documents)} documents, wanted one")
    return documents[0]


def _beside_zero(got: np.ndarray, wanted: np.ndarray) -> Triple:
    return got, wanted, np.zeros(wanted.shape)


def _judged(name: str, dtype: np.dtype, triple: Triple) -> Verdict:
    got, wanted, _ = triple
    if got.shape != wanted.shape:
        return Verdict(name, "different", detail=f"shape {list(got.shape)}, wanted {list(wanted.shape)}")
    return judge(name, wanted.shape, dtype, [triple], lambda: triple)
