"""The device mesh and where each parameter lies on it: one table of patterns, nothing uncovered."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from .config import Mesh as MeshConfig
from .log import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))

RULES: tuple[tuple[str, PartitionSpec], ...] = (
    # [out, in]: heads, mlp columns and vocabulary over `tensor`, the other axis over `fsdp`.
    (
        r"(q_proj|k_proj|v_proj|qkv_proj|gate_proj|up_proj|gate_up_proj|embed_tokens|lm_head)/weight$",
        PartitionSpec("tensor", "fsdp"),
    ),
    (r"(o_proj|down_proj)/weight$", PartitionSpec("fsdp", "tensor")),
    # The rank of an adapter is everywhere.
    (r"lora_A/weight$", PartitionSpec(None, "fsdp")),
    (r"lora_B/weight$", PartitionSpec("fsdp", None)),
    (r"(norm/weight|/bias)$", PartitionSpec()),
)


def make_mesh(config: MeshConfig) -> jax.sharding.Mesh:
    """The mesh of a run, over the first devices of the platform."""
    if config.cpu_devices is not None:
        request_cpu_devices(config.cpu_devices)
    shape = (config.data, config.fsdp, config.tensor)
    wanted, devices = math.prod(shape), jax.devices()
    if wanted > len(devices):
        raise UserError(
            f"mesh data={config.data} × fsdp={config.fsdp} × tensor={config.tensor} needs {wanted} devices, "
            f"found {len(devices)} ({devices[0].platform}); make the mesh smaller"
            + ("" if devices[0].platform != "cpu" else f" or set mesh.cpu_devices={wanted}")
        )
    # Auto axes: the shardings of inputs and outputs are ours, those in between the compiler's.
    grid = np.array(devices[:wanted]).reshape(shape)
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def request_cpu_devices(count: int) -> None:
    if jax.config.jax_num_cpu_devices == count:
        return
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        if len(jax.devices("cpu")) < count:
            raise UserError(
                f"mesh.cpu_devices={count}, but jax already started with {len(jax.devices('cpu'))}; "
                "it must be set before jax is first used"
            ) from None


def sharding_of(mesh: jax.sharding.Mesh, path: str, shape: tuple[int, ...]) -> NamedSharding:
    """Where the parameter at `path` lies; an uncovered path or an indivisible axis is an error naming both."""
    for pattern, spec in RULES:
        if re.search(pattern, path):
            if "/stacked/" in path:  # the layers, one after another
                spec = PartitionSpec(None, *spec)
            for size, axis in zip(shape, spec, strict=False):
                if axis is not None and size % mesh.shape[axis]:
                    raise UserError(
                        f"{path}: axis of {size} does not divide over mesh.{axis}={mesh.shape[axis]}; "
                        f"choose a divisor of {size}"
                    )
            return NamedSharding(mesh, spec)
    raise UserError(f"{path} {shape}: no sharding rule covers it; add a pattern to RULES in train/mesh.py")


def shardings(mesh: jax.sharding.Mesh, tree: Any) -> Any:
    """The sharding of every leaf of a parameter tree (arrays or shapes)."""

    def leaf(path, value):
        return sharding_of(mesh, "/".join(str(getattr(p, "key", p)) for p in path), value.shape)

    return jax.tree_util.tree_map_with_path(leaf, tree)


@functools.cache
def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh, rows: int) -> NamedSharding:
    """Rows over data and fsdp where they divide, else everywhere the same."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    return NamedSharding(mesh, BATCH) if rows % ways == 0 else replicated(mesh)
