r"""Uniform random numbers that are a function of (key, position) alone and cost a few operations an element.

Element j of `uniform(key, shape)` is a hash of (key, j): the same whatever the mesh, the order in which elements are
computed, and the pieces in which they are. The key's two words are well mixed already, by threefry, where keys are
folded with paths and names. What is left to the hash is to tell neighbours apart, and for that a permutation of 32 bits
will do: three rounds of shift, xor and multiplication by a constant. Threefry itself takes a hundred operations: loops
that sum over its numbers took ten times as long, for compilers make no vectors of so much.

The word that is hashed is `position + key[0]`, and `key[1]` is added after the first round, so that the numbers of two
keys are not one sequence shifted. One key gives no 32-bit word twice: among 10⁷ elements the variance of a count is by
10⁷/2³², a quarter of a percent, less than with independent numbers. Keys that differ in a bit or two are not told apart
as well, so a key has to come from a generator, as all of `jax.random.fold_in` do.

References:
  Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (numbers as a function of key and counter)
  Wellons, "Hash function prospector", https://nullprogram.com/blog/2018/07/31/ (the shifts and multipliers)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxmerge.cut import positions
from jaxmerge.tree import Array

ROUNDS = ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB))
LAST = 14
MASKS = "2"  # the version of what is drawn; records without one are of masks by threefry itself
COUNTED = 2**32  # positions that a word tells apart


def scramble(key: tuple[Array, Array], position: Array) -> Array:
    """Return 32 random bits for each position, uint32, under the two words of a key."""
    bits = position + key[0]
    for number, (shift, factor) in enumerate(ROUNDS):
        bits = bits + key[1] if number == 1 else bits
        bits = (bits ^ (bits >> jnp.uint32(shift))) * jnp.uint32(factor)
    return bits ^ (bits >> jnp.uint32(LAST))


def uniform(key: Array, shape: Sequence[int]) -> Array:
    """Draw float32 in [0, 1), multiples of 2⁻²⁴, for every element of `shape`.

    Example:
      >>> whole = uniform(jax.random.key(0), (3, 5))
      >>> bool((whole.reshape(-1) == uniform(jax.random.key(0), (15,))).all())
      True
    """
    if math.prod(shape) > COUNTED:  # a key for each part that can be counted
        keys = jax.vmap(lambda part: jax.random.fold_in(key, part))(jnp.arange(shape[0], dtype=jnp.uint32))
        return jax.vmap(lambda key: uniform(key, shape[1:]))(keys)
    words = jax.random.key_data(key)
    bits = scramble((words[0], words[1]), positions(tuple(shape)))
    return (bits >> jnp.uint32(8)).astype(jnp.int32).astype(jnp.float32) * jnp.float32(2**-24)
