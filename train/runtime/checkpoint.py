"""Orbax behind two nouns: the weights of a phase, and the resumable state of a fine-tuning run."""

from __future__ import annotations

import contextlib
import errno
import gc
import glob
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxmerge.files.checkpoints.orbax import one_error
from jaxmerge.tree import PyTree

from ..log import UserError


def save_weights(path: Path, params: PyTree) -> None:
    """Write parameters to `path`; the folder appears under its name only when whole."""
    with failure_named(path), ocp.StandardCheckpointer() as checkpointer:
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpointer.save(path.absolute(), params, force=True)


@contextlib.contextmanager
def failure_named(path: Path) -> Iterator[None]:
    """A full disk, or a folder that is gone, reaches us from Orbax's own writers as errors of many kinds.

    The first of them is raised, and what was written half is removed; the others are passed over.
    """
    try:
        with one_error():
            yield
    except Exception as error:
        first = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        first = "no space left" if os.strerror(errno.ENOSPC) in str(error) else first
        error.__traceback__ = None  # it holds the other writers' errors, which are told when they are let go of
        gc.collect()
        if jax.process_index() == 0:
            for left in path.parent.glob(f"{glob.escape(path.name)}.orbax-checkpoint-tmp*"):
                shutil.rmtree(left, ignore_errors=True)
        raise UserError(f"{path}: the checkpoint could not be written ({first}); is the disk full, or gone?") from error


def load_weights(path: Path, like: Any) -> PyTree:
    """Read parameters straight to the shapes, dtypes and shardings of `like` (ShapeDtypeStructs)."""
    if not path.is_dir():
        raise UserError(f"{path}: no checkpoint there")
    with damage_named(path), ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path.absolute(), like)


@contextlib.contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Orbax raises many kinds of errors for a damaged checkpoint; all mean the same to the user."""
    try:
        with one_error():
            yield
    except Exception as error:
        first = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{path}: the checkpoint is damaged or of another model ({first}); remove it to make it again"
        ) from error


def abstract(params: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs of `params` with the given shardings: what `load_weights` restores to."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, shardings)


def digest(params: PyTree) -> str:
    """32 hex digits of paths, dtypes, shapes and bits: other digests are other weights.

    Computed where the weights lie, a leaf at a time, and the same on every mesh: sums of integers, which no order or
    grouping changes. Equal digests are equal weights but for chance (2⁻¹²⁸) or an adversary, whom this does not stop.
    """
    total = hashlib.sha256()
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    for path, leaf in sorted(leaves.items()):
        # Fetched before the next is sent off: jax 0.10's CPU client hangs on many programs with collectives at a time.
        total.update(f"{path} {leaf.dtype} {leaf.shape} {np.asarray(bit_sums(leaf)).tolist()}".encode())
    return total.hexdigest()[:32]


@jax.jit
def bit_sums(x: jax.Array) -> jax.Array:
    """Four sums mod 2³² over the elements, each of its bits and its place in the leaf, mixed: uint32 [4]."""
    size = x.dtype.itemsize
    bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[size]).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, length in enumerate(x.shape):
        place = place * np.uint32(length) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    sums = []
    for lane in (0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F):
        # An element that moves changes the sum as much as one that changes: the place is mixed before the bits are.
        sums.append(jnp.sum(mixed(bits + mixed(place ^ np.uint32(lane))), dtype=jnp.uint32))
    return jnp.stack(sums)


def mixed(h: jax.Array) -> jax.Array:
    """MurmurHash3's finaliser: a bijection of 32 bits in which every bit depends on every other.

    References:
      Appleby, MurmurHash3, https://github.com/aappleby/smhasher, fmix32.
    """
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
