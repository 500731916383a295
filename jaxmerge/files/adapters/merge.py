"""Merge adapters of one base into an adapter, module by module: no weight of the base is read.

Memory holds the factors of all adapters of one module, what the space makes of them, and the factors of the result.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import xxhash

from jaxmerge.files import card, layers, model_card
from jaxmerge.files.adapters import whole
from jaxmerge.files.adapters.folder import KINDS, PREFIX, Module, base_of, modules_of, open_adapter
from jaxmerge.files.adapters.options import Options
from jaxmerge.files.adapters.parts import Merged, Parts
from jaxmerge.files.adapters.spaces import SPACES, Pair, Rule
from jaxmerge.files.checkpoints import safetensors
from jaxmerge.files.checkpoints.adapter import CONFIG, WEIGHTS
from jaxmerge.files.checkpoints.handles import check_unchanged, stamps
from jaxmerge.files.checkpoints.source import Tensor, read
from jaxmerge.files.coefficients import Of, coefficients
from jaxmerge.files.factors import ranks_in_config
from jaxmerge.files.journal import stamp, unfinished
from jaxmerge.files.recipe import Recipe

Progress = Callable[[int, int, str], None]
NARROWED = ("layers_to_transform", "layers_pattern", "exclude_modules")
"""Keys of a config that leave out modules whose names target_modules has."""
SPARE = 3  # leaves beside the adapters': the base of zeros, the result, and one that a rule makes


class AdapterWork:
    """A recipe with the key `adapter` on its way to a folder, and its adapters, open."""

    def __init__(
        self, recipe: Recipe, options: Options, *, seed: int | None, allow: Sequence[str], device: Any,
        progress: Progress | None, headers_only: bool,
    ):  # fmt: skip
        self.recipe, self.options, self.device, self.progress = recipe, options, device, progress
        self.seed = recipe.seed if seed is None else seed
        self.adapters = [open_adapter(name, headers_only=headers_only) for name in recipe.sources]
        self.notes = [*recipe.notes, *(note for adapter in self.adapters for note in adapter.notes)]
        self.base = base_of(self.adapters, recipe.base, self.notes)
        self.modules = modules_of(self.adapters, allow_missing="missing" in allow, notes=self.notes)
        self.ranks = {key: self._rank(key) for key in self.modules}
        self.whole = whole.kept_by(self.adapters)
        self.depths = layers.depths([*(f"{module.name}.weight" for module in self.modules.values()), *self.whole])
        self.rules = {key: self._rule(f"{module.name}.weight") for key, module in self.modules.items()}
        self.based = self._base_tensors(headers_only)
        self.files = sorted({file for adapter in self.adapters for file in adapter.files} | {*self.base_files})
        self.before = stamps(self.files)
        self.allow = sorted(allow)

    @functools.cached_property
    def digest(self) -> str:
        """Digest all that decides the result; files that are not here have no stamp, so a dry run must not ask."""
        return xxhash.xxh3_128_hexdigest(json.dumps([*self._said(), list(map(stamp, self.files))]).encode())

    def _said(self) -> list[Any]:
        """What decides the result beside the adapters' files."""
        return [self.recipe.text, self.seed, self.allow, self.device.platform, card.versions()]

    def _base_tensors(self, headers_only: bool) -> dict[str, Tensor]:
        """The base's tensors where adapters keep unlike ones whole; without such, the base is not opened."""
        self.base_files: tuple[pathlib.Path, ...] = ()
        unlike = {name: kept for name, kept in self.whole.items() if not whole.is_copied(name, kept)}
        if not unlike:
            return {}
        source = whole.open_base(self.base, list(unlike), headers_only=headers_only)
        self.base_files = source.files
        return whole.base_tensors(source, unlike)

    def _of(self, key: str) -> list[Module]:
        """A module in the adapters that have it."""
        return [adapter.modules[key] for adapter in self.adapters if key in adapter.modules]

    def _rank(self, key: str) -> int:
        """The rank that the result has in a module, if no threshold makes it smaller."""
        module, ranks = self.modules[key], [of.rank for of in self._of(key)]
        space, cut = SPACES[self.options.space], self.options.cut
        if not space.one_rank:
            summed = min(sum(ranks), *module.shape)
            most = summed if space.spans else min(module.shape)
            return min(most, cut.rank or (most if cut.varies else summed))
        if len(set(ranks)) > 1:
            raise ValueError(
                f"module {module.name!r} has the ranks {', '.join(map(str, ranks))} in the adapters; the space "
                f"{self.options.space!r} merges factors of one rank, the others merge any: write adapter: core"
            )
        return ranks[0]

    def _rule(self, name: str) -> Rule:
        """The rule with its coefficients for a tensor of this name."""
        recipe = self.recipe
        entries = recipe.modules[0].slices[0].sources
        inputs = [Of(entry.model, name, entry.parameters) for entry in entries]
        given = coefficients(recipe, name, self.depths[name], inputs, [recipe.parameters])
        return Rule(recipe.method.rule, name.replace(".", "/"), given, recipe.sources, self.seed)

    def plan(self, out: pathlib.Path) -> dict[str, Any]:
        """Return the report as far as it is known before the merge; the result has at most these bytes."""
        del out  # for `_Work` of whole models, which has a plan too
        space = SPACES[self.options.space]
        leaves = [space.elements(of.shape, sum(m.rank for m in self._of(key))) for key, of in self.modules.items()]
        made = sum(rank * sum(self.modules[key].shape) for key, rank in self.ranks.items()) * self._dtype().itemsize
        made += sum(max(tensor.size for tensor in kept if tensor is not None) for kept in self.whole.values())
        return {
            "merge_method": self.recipe.merge_method, "tensors": len(self.modules), "files": [WEIGHTS],
            "bytes_in": sum(of.size for key in self.modules for of in self._of(key)), "bytes_out": made,
            "bytes_memory": made + 4 * (len(self.adapters) + SPARE) * max(leaves), "notes": self.notes,
        }  # fmt: skip

    def _dtype(self) -> np.dtype:
        stored = next(iter(self.adapters[0].modules.values())).a.dtype
        return np.dtype(self.recipe.out_dtype or self.recipe.dtype or stored)

    def run(self, out: pathlib.Path) -> dict[str, Any]:
        """Merge, and write the folder whole or not at all; what an interrupted merge did is kept for the next."""
        report = self.plan(out)
        said = xxhash.xxh3_128_hexdigest(json.dumps([*self._said(), list(self.modules)]).encode())
        # The modules are there twice for a while.
        with unfinished(out, said, dict(map(stamp, self.files)), 2 * report["bytes_out"]) as journal:
            parts = Parts(journal, self.modules, self.adapters, self._dtype())
            merged = self._modules(parts, report["bytes_in"])
            parts.tell()
            total = math.fsum(of.square / of.explained for of in merged.values())
            explained = math.fsum(of.square for of in merged.values()) / total if total else 1.0
            report["notes"] = [
                *self.notes,
                f"{100 * explained:.2f} % of the merged change (squared norm) is in the adapter",
            ]
            tensors = {}
            for key, found in merged.items():
                module = self.modules[key]
                names = (f"{PREFIX}{module.name}.{end}" for end in KINDS[module.kind])
                tensors |= dict(zip(names, (found.a, found.b), strict=True))
            tensors |= {f"{PREFIX}{name}": self.kept(name) for name in self.whole}
            check_unchanged(self.before)
            folder = journal.result
            (folder / WEIGHTS).unlink(missing_ok=True)  # of a try that ended between these lines
            safetensors.write_file(folder / WEIGHTS, tensors)
            report["bytes_out"] = (folder / WEIGHTS).stat().st_size
            config = self._config({self.modules[key].name: len(of.a) for key, of in merged.items()})
            (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
            self._describe(folder, out.name, report, merged)
        return report | {"notes": [*report["notes"], *journal.notes]}

    def _modules(self, parts: Parts, size: int) -> dict[str, Merged]:
        """Merge every module that an earlier try has not."""
        merged, read = {}, 0
        with jax.default_device(self.device):
            for key, module in self.modules.items():
                merged[key] = parts.take(key, self.merged)
                read += sum(of.size for of in self._of(key))
                if self.progress is not None:
                    self.progress(read, size, module.name)
        return merged

    def merged(self, key: str) -> Merged:
        """Merge a module."""
        module, rank = self.modules[key], self.ranks[key]
        pairs = [of.modules[key].read() if key in of.modules else _nothing(module, rank) for of in self.adapters]
        cut = dataclasses.replace(self.options.cut, rank=rank)
        made = SPACES[self.options.space].merge(pairs, self.rules[key], cut)
        a, b, dtype = made.a, made.b, self._dtype()
        if not cut.varies:
            # Directions that are none would make ranks unlike, which not every reader of adapters takes.
            a, b = np.pad(a, ((0, rank - len(a)), (0, 0))), np.pad(b, ((0, 0), (0, rank - len(a))))
        a, b = a.astype(dtype), b.astype(dtype)
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise ValueError(f"module {module.name!r}: the result is not finite as {dtype}; choose a wider out_dtype")
        square = float(np.sum((b.astype(np.float64).T @ b.astype(np.float64)) * (a.astype(np.float64) @ a.T)))
        return Merged(a, b, float(made.explained), square)

    def kept(self, name: str) -> np.ndarray:
        """Merge a tensor that adapters keep whole."""
        kept = self.whole[name]
        if name in self.based:
            return whole.merge_whole(kept, self.based[name], self._rule(name))
        return read(next(tensor for tensor in kept if tensor is not None))

    def _config(self, ranks: Mapping[str, int]) -> dict[str, Any]:
        """What PEFT reads; alpha is the rank of each module, so that all scales are 1."""
        configs, said = [adapter.config for adapter in self.adapters], ranks_in_config(ranks)
        first, saved = configs[0], {name for config in configs for name in _texts(config.get("modules_to_save"))}
        return {
            "peft_type": "LORA",
            "task_type": first.get("task_type"),
            "base_model_name_or_path": self.base,
            **said,
            "lora_alpha": said["r"],
            "alpha_pattern": said["rank_pattern"],
            "target_modules": self._targets(),
            "modules_to_save": sorted(saved) or None,
            "bias": next((said for config in configs if (said := config.get("bias", "none")) != "none"), "none"),
            **({"ensure_weight_tying": True} if any(config.get("ensure_weight_tying") for config in configs) else {}),
            "fan_in_fan_out": bool(first.get("fan_in_fan_out")),
            "lora_dropout": 0.0,
            "use_rslora": False,
            "inference_mode": True,
        }

    def _targets(self) -> list[str]:
        """The ends of names that all adapters say, where they say just that; else the modules' names in full."""
        configs = [adapter.config for adapter in self.adapters]
        said = [sorted(_texts(config.get("target_modules"))) for config in configs]
        narrowed = any(config.get(key) for config in configs for key in NARROWED)
        whole = all(len(adapter.modules) == len(self.modules) for adapter in self.adapters)
        if said[0] and whole and not narrowed and all(of == said[0] for of in said):
            return said[0]
        return [module.name for module in self.modules.values()]

    def _describe(
        self, folder: pathlib.Path, title: str, report: Mapping[str, Any], merged: Mapping[str, Merged]
    ) -> None:
        """Write merge.json, the recipe and the card."""
        recipe = self.recipe
        ingredients = [model_card.ingredient(adapter.name, [adapter.folder]) for adapter in self.adapters]
        record = {
            "merge_method": recipe.merge_method, "rule": recipe.method.rule, "recipe": recipe.text, "seed": self.seed,
            "adapter": dataclasses.asdict(self.options), "base": self.base, "versions": card.versions(),
            "inputs": {a.name: dataclasses.asdict(i) for a, i in zip(self.adapters, ingredients, strict=True)},
            "command": self.digest, "report": report, "notes": report["notes"], "allow": self.allow,
            "tensors": {
                self.modules[key].name: {
                    "rank": len(of.a), "explained": of.explained, "norm": math.sqrt(max(of.square, 0.0)),
                }
                for key, of in merged.items()
            },
        }  # fmt: skip
        (folder / "merge.json").write_text(json.dumps(record, indent=1) + "\n")
        (folder / card.RECIPE).write_text(recipe.text.rstrip() + "\n")
        made_of = card.merged_adapter_card(record, title, model_card.ingredient(self.base), ingredients)
        model_card.write_card(folder, made_of)


def _texts(value: Any) -> list[str]:
    """The texts of a list in a config; none of what is no list."""
    return [entry for entry in value if isinstance(entry, str)] if isinstance(value, list) else []


def _nothing(module: Module, rank: int) -> Pair:
    """What an adapter changes of a module that it does not adapt."""
    return Pair(np.zeros((module.shape[0], rank)), np.zeros((rank, module.shape[1])))
