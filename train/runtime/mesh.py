"""The device mesh and where each parameter lies on it: one table of patterns, nothing uncovered."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ..log import UserError
from .settings import Mesh as MeshConfig

AXES = ("data", "fsdp", "expert", "tensor")
ROWS = ("data", "fsdp", "expert")
"""Axes of the mesh that rows of a batch lie over."""
BATCH = PartitionSpec(ROWS)

RULES: tuple[tuple[str, PartitionSpec], ...] = (
    # Mixtures of experts, [E, out, in]; every device routes every token it has.
    (r"experts/(gate_proj|up_proj)/weight$", PartitionSpec("expert", "tensor", "fsdp")),
    (r"experts/down_proj/weight$", PartitionSpec("expert", "fsdp", "tensor")),
    (r"mlp/(gate|shared_expert_gate)/weight$", PartitionSpec()),
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
    shape = (config.data, config.fsdp, config.expert, config.tensor)
    wanted, devices = math.prod(shape), jax.devices()
    named = " × ".join(f"{axis}={n}" for axis, n in zip(AXES, shape, strict=True) if axis != "expert" or n > 1)
    if jax.process_count() > 1 and wanted != len(devices):
        raise UserError(
            f"mesh {named} has {wanted} devices, and "
            f"{jax.process_count()} processes have {len(devices)} together: every one must be used, e.g. mesh.fsdp="
            f"{len(devices)}"
        )
    if wanted > len(devices):
        raise UserError(
            f"mesh {named} needs {wanted} devices, "
            f"found {len(devices)} ({devices[0].platform}); make the mesh smaller"
            + ("" if devices[0].platform != "cpu" else f" or set mesh.cpu_devices={wanted}")
        )
    return lay(shape, devices[:wanted])


def lay(shape: tuple[int, int, int, int], devices: Sequence[Any]) -> jax.sharding.Mesh:
    """The mesh of `shape` over these devices: on TPUs along their torus, an axis over several of its dimensions."""
    # Without the option most meshes are refused on v4, v5p and v6e, 2 × 32 of v6e:8x8 for one.
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    # Auto axes: the shardings of inputs and outputs are ours, those in between the compiler's.
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


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
    raise UserError(f"{path} {shape}: no sharding rule covers it; add a pattern to RULES in train/runtime/mesh.py")


def shardings(mesh: jax.sharding.Mesh, tree: Any) -> Any:
    """The sharding of every leaf of a parameter tree (arrays or shapes)."""

    def leaf(path, value):
        return sharding_of(mesh, "/".join(str(getattr(p, "key", p)) for p in path), value.shape)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def without_fsdp(sharding: NamedSharding) -> NamedSharding:
    """The same place, whole over fsdp."""
    spec = (None if axis == "fsdp" else axis for axis in sharding.spec)
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


@functools.cache
def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh, rows: int) -> NamedSharding:
    """Rows over data, fsdp and expert where they divide, else everywhere the same."""
    return NamedSharding(mesh, BATCH) if rows % row_ways(mesh) == 0 else replicated(mesh)


def row_ways(mesh: jax.sharding.Mesh | None) -> int:
    """Parts that the rows of a batch are cut into."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ROWS)


def mesh_of(params: Any) -> jax.sharding.Mesh | None:
    """The mesh that parameters lie on; None where it is one device, and nothing has to be said of activations."""
    mesh = getattr(jax.tree.leaves(params)[0].sharding, "mesh", None)
    return mesh if isinstance(mesh, jax.sharding.Mesh) and mesh.size > 1 else None


def put(host: np.ndarray, sharding: Any) -> jax.Array:
    """An array every process has whole, to its place; `device_put` would first compare theirs over the network."""
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(host, sharding)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


# --- activations -------------------------------------------------------------------------------------------

_activations: contextvars.ContextVar[jax.sharding.Mesh | None] = contextvars.ContextVar("activations", default=None)


@contextlib.contextmanager
def activations_on(mesh: jax.sharding.Mesh | None) -> Iterator[None]:
    """While a function is traced: where `spread` puts what is computed in it. None leaves that to the compiler."""
    token = _activations.set(mesh)
    try:
        yield
    finally:
        _activations.reset(token)


def active_mesh() -> jax.sharding.Mesh | None:
    """The mesh that a function which is being traced lays its activations on."""
    return _activations.get()


def spread(x: jax.Array, tensor: int | None = None, rows: int = 0) -> jax.Array:
    """x with its axis `rows` over data, fsdp and expert and its axis `tensor`, if any, over tensor, where they divide.

    Without this the compiler is free to follow the weights, which lie over fsdp along a model axis, and to gather
    activations in place of weights.
    """
    mesh = _activations.get()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, spread_sharding(mesh, x.shape, tensor, rows))


def gathered(table: jax.Array) -> jax.Array:
    """A table [V, D] whole along D on every device: to be looked up in, or the rows found lie as the table does."""
    mesh = _activations.get()
    if mesh is None:
        return table
    return jax.lax.with_sharding_constraint(table, NamedSharding(mesh, PartitionSpec("tensor")))


def spread_sharding(
    mesh: jax.sharding.Mesh, shape: tuple[int, ...], tensor: int | None = None, rows: int = 0
) -> NamedSharding:
    spec: list[Any] = [None] * len(shape)
    if shape[rows] % row_ways(mesh) == 0:
        spec[rows] = ROWS
    if tensor is not None and shape[tensor] % mesh.shape["tensor"] == 0:
        spec[tensor] = "tensor"
    return NamedSharding(mesh, PartitionSpec(*spec))


def everywhere(x: jax.Array) -> jax.Array:
    """x on every device: what the host reads, whichever process it is of."""
    mesh = _activations.get()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, replicated(mesh))
