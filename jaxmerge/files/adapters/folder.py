"""Open adapters to merge: the factors of each module by the module's name, nothing read but headers."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmerge.files.adapters.spaces import Pair
from jaxmerge.files.checkpoints.adapter import CONFIG, FACTOR, WEIGHTS, read_config, scale_of, without_wrappers
from jaxmerge.files.checkpoints.open import find_adapter
from jaxmerge.files.checkpoints.source import Tensor, read
from jaxmerge.files.documents import some

PREFIX = "base_model.model."
KINDS = {"lora_A": ("lora_A.weight", "lora_B.weight"), "lora_embedding_A": ("lora_embedding_A", "lora_embedding_B")}
"""How the two factors of a module are called in the file, by the kind of the first."""
LISTED = 4  # names in a message
WAY_OUT = "merge the models as base+adapter, without the key 'adapter', then use jaxmerge extract-lora"
_SAVED = re.compile(r"\.modules_to_save(\.default)?(?=\.)")


@dataclasses.dataclass(frozen=True)
class Module:
    """The factors of an adapted module, A [r, in] and B [out, r]. name: as the adapter has it. kind: of KINDS."""

    name: str
    kind: str
    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of B·A: [out, in]."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def size(self) -> int:
        """Bytes of both factors."""
        return self.a.size + self.b.size

    def read(self) -> Pair:
        """Read the factors.

        Raises:
          ValueError: they are not finite.
        """
        pair = Pair.of(read(self.b), read(self.a), self.scale)
        if not (np.isfinite(pair.a).all() and np.isfinite(pair.b).all()):
            raise ValueError(f"module {self.name!r} of {self.a.where} has NaN or infinite elements; wanted finite ones")
        return pair


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An open adapter. name: as the recipe writes it. modules: by name, but for what a wrapper puts in front.

    whole: what is no factor, by name. base: the model it was trained on, as the recipe or else its config says; ""
    where neither does. notes: on what of it is not here.
    """

    name: str
    folder: pathlib.Path
    base: str
    config: Mapping[str, Any]
    modules: Mapping[str, Module]
    whole: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[pathlib.Path, ...]:
        return self.folder / CONFIG, self.folder / WEIGHTS


def open_adapter(name: str, *, headers_only: bool = False) -> Adapter:
    """Open `adapter`, or `base+adapter`: a folder or a hub name.

    Args:
      name: as the recipe writes it.
      headers_only: of a hub's adapter that is not here, headers are fetched; its tensors cannot be read.

    Raises:
      ValueError: there is none, or it is more than factors of matrices; says what to do.
    """
    base, plus, adapter = name.rpartition("+")
    if not plus or pathlib.Path(name).expanduser().exists():
        base, adapter = "", name
    folder, weights, notes = find_adapter(adapter, name, headers_only=headers_only)
    if not (folder / CONFIG).exists():
        raise ValueError(
            f"model {name!r} has no {CONFIG}, so it is no adapter; a recipe with 'adapter' merges adapters with "
            "adapters, leave the key out to merge whole models"
        )
    config, path = read_config(folder), folder / WEIGHTS
    if not weights.has(WEIGHTS):
        raise ValueError(f"adapter {name!r} has no {WEIGHTS}; save it as safetensors (PEFT's default)")
    base = base or str(config.get("base_model_name_or_path") or "")
    return Adapter(name, folder, base, config, *_modules(name, config, path, weights.header(WEIGHTS)), notes)


def _modules(
    name: str, config: Mapping[str, Any], path: pathlib.Path, stored: Mapping[str, Tensor]
) -> tuple[dict[str, Module], dict[str, Tensor]]:
    """The factors by module, and what is kept whole by its name."""
    parts: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for key, tensor in stored.items():
        found = FACTOR.fullmatch(key.removeprefix(PREFIX))
        if found is None:
            whole[_SAVED.sub("", key.removeprefix(PREFIX))] = tensor
        elif found["kind"] == "lora_magnitude_vector":
            raise ValueError(
                f"adapter {name!r} is DoRA ({key}): its change depends on the base's weights and is no product of two "
                f"factors; {WAY_OUT}"
            )
        elif found["leaf"] == "bias":
            raise ValueError(f"adapter {name!r} has lora_bias ({key}), which is no factor of a matrix; {WAY_OUT}")
        else:
            parts.setdefault(found["module"], {})[found["kind"]] = tensor
    modules = {without_wrappers(module): _module(path, config, module, given) for module, given in parts.items()}
    if not modules or len(modules) < len(parts):
        what = "no factors" if not modules else "two modules that differ only in what a wrapper puts before their names"
        raise ValueError(f"{path} has {what}; give the folder of a PEFT LoRA adapter")
    return modules, whole


def _module(path: pathlib.Path, config: Mapping[str, Any], module: str, parts: Mapping[str, Tensor]) -> Module:
    kind = "lora_embedding_A" if "lora_embedding_A" in parts else "lora_A"
    wanted = {key.partition(".")[0] for key in KINDS[kind]}
    found = sorted(part.name for part in parts.values())
    if set(parts) != wanted:
        raise ValueError(f"{path}: module {module!r} has {found}, wanted its A and its B; the file is incomplete")
    a, b = parts[kind], parts[kind.replace("_A", "_B")]
    is_matrix = len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1] and a.size and b.size
    if not (is_matrix and all(jnp.issubdtype(of.dtype, jnp.floating) for of in (a, b))):
        raise ValueError(
            f"{path}: module {module!r} has factors {a.dtype}{list(a.shape)} and {b.dtype}{list(b.shape)}; wanted "
            "floats [r, in] and [out, r], factors of a matrix"
        )
    return Module(module, kind, a, b, scale_of(config, module, a.shape[0], path))


def base_of(adapters: Sequence[Adapter], said: str | None, notes: list[str]) -> str:
    """Return the base that all adapters are of: what the recipe says, else what they say.

    Raises:
      ValueError: they are of different bases, or none says of which.
    """
    bases = dict.fromkeys(adapter.base for adapter in adapters)
    listed = ", ".join(f"{adapter.name!r} of {adapter.base or 'an unknown one'!r}" for adapter in adapters)
    if said is not None:
        if set(bases) - {said, ""}:
            notes.append(f"base_model is {said!r}, which the adapters call otherwise: {listed}")
        return said
    if not all(bases):
        raise ValueError(
            f"an adapter does not say which base it is of (base_model_name_or_path): {listed}; write base_model in the "
            "recipe"
        )
    if len(bases) > 1:
        raise ValueError(
            f"the adapters are of different bases: {listed}; give adapters of one base, or, if these are one model "
            "under several names, write base_model in the recipe"
        )
    return next(iter(bases))


def modules_of(adapters: Sequence[Adapter], *, allow_missing: bool, notes: list[str]) -> dict[str, Module]:
    """Return every module that is merged, as the first adapter has it that adapts it.

    Raises:
      ValueError: adapters adapt different modules, unless that is allowed, or modules of different shapes.
    """
    every: dict[str, Module] = {}
    for adapter in adapters:
        for key, module in adapter.modules.items():
            first = every.setdefault(key, module)
            if (module.shape, module.kind) != (first.shape, first.kind):
                raise ValueError(
                    f"module {module.name!r} is {list(module.shape)} in {adapter.name!r} and {list(first.shape)} in "
                    "another adapter; they are of different bases"
                )
    for adapter in adapters:
        lacking = [module.name for key, module in every.items() if key not in adapter.modules]
        if lacking and not allow_missing:
            raise ValueError(
                f"adapter {adapter.name!r} lacks {len(lacking)} modules that another one adapts: "
                f"{some(lacking, LISTED)}; with allow=missing it changes nothing there"
            )
        if lacking:
            notes.append(f"{adapter.name} changes nothing in {len(lacking)} modules: {some(lacking, LISTED)}")
    return every
