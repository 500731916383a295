"""Adapters as PEFT's folders: adapter_config.json and adapter_model.safetensors, both ways."""

from __future__ import annotations

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.files.checkpoints.safetensors import read_header, write_file
from jaxmerge.files.checkpoints.source import read

from ..log import UserError, mistakes
from ..runtime.disk import new_folder
from ..runtime.processes import on_first, to_host
from .config import Lora
from .hf import named, read_json, write_json
from .lora import Params, modules, pairs, set_at
from .stacked import unstack_layers

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def save_lora(
    folder: str | os.PathLike[str], lora: Lora, adapter: Params, params: Params, *, base: str = "", dtype=jnp.float32
) -> None:
    """Write a folder that `peft` loads, and that a merge reads as `model+adapter`; whole or not at all.

    Args:
      params: of the model (arrays or shapes): which of its modules have no adapter decides how the others are named.
      base: where the model is found, for `base_model_name_or_path`.
    """
    adapter, params = unstack_layers(adapter), unstack_layers(params)
    tensors = {PREFIX + name: to_host(leaf.astype(dtype)) for name, leaf in named(adapter)}
    on_first(_write_lora, pathlib.Path(folder), lora, target_modules(adapter, params), tensors, base)


def _write_lora(
    folder: pathlib.Path, lora: Lora, targets: list[str], tensors: dict[str, np.ndarray], base: str | None
) -> None:
    with new_folder(folder) as temporary:
        write_json(
            temporary / CONFIG,
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": base,
                "r": lora.rank,
                "lora_alpha": lora.alpha,
                "lora_dropout": lora.dropout,
                "target_modules": targets,
                "bias": "none",
                "fan_in_fan_out": False,
                "init_lora_weights": True,
                "inference_mode": True,
                "use_rslora": False,
            },
        )
        write_file(temporary / WEIGHTS, tensors)


def target_modules(adapter: Params, params: Params) -> list[str]:
    """Names that PEFT, which compares the ends, matches with the adapted modules and no others: short if they can."""
    adapted = {path for path, _, _ in pairs(adapter)}
    ends = {path[-1] for path in adapted}
    if all(path in adapted for path, _ in modules(params) if path[-1] in ends):
        return sorted(ends)
    return sorted(".".join(path) for path in adapted)


def load_lora(folder: str | os.PathLike[str], *, dtype=jnp.float32) -> tuple[Lora, Params]:
    """Read a folder that `save_lora` or PEFT wrote: one rank, one alpha, matrices alone.

    Returns:
      The settings (targets: the modules there are) and the adapter.
    """
    folder = pathlib.Path(folder)
    config = read_json(folder / CONFIG)
    plain = {
        "peft_type": ("LORA",), "bias": ("none",), "use_rslora": (False,), "use_dora": (False,), "rank_pattern": ({},),
        "alpha_pattern": ({},), "fan_in_fan_out": (False,), "modules_to_save": (None, []), "lora_bias": (False,),
    }  # fmt: skip
    if bad := [f"{k} = {config[k]!r}" for k, fits in plain.items() if config.get(k, fits[0]) not in (*fits, None)]:
        raise UserError(f"{folder / CONFIG}: {'; '.join(bad)} is not known here; merge the adapter with PEFT first")
    adapter: Params = {}
    with mistakes():
        stored = read_header(folder / WEIGHTS)
    for name, tensor in stored.items():
        path = tuple(name.removeprefix(PREFIX).split("."))
        if path[-2:] not in (("lora_A", "weight"), ("lora_B", "weight")):
            raise UserError(f"{folder / WEIGHTS}: {name} is no lora_A or lora_B; merge the adapter with PEFT first")
        set_at(adapter, path, jax.device_put(read(tensor).astype(dtype)))
    targets = tuple(f"^{'/'.join(path)}$" for path, _, _ in pairs(adapter))
    return Lora(int(config["r"]), float(config["lora_alpha"]), targets, float(config.get("lora_dropout", 0.0))), adapter
