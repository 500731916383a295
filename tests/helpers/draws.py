"""The random numbers of masks by their definition, in NumPy: what `jaxmerge.draw` computes in jax."""

import zlib

import jax
import numpy as np


def words(seed_key, path, name):
    """The two words of the key of a leaf of a model."""
    key = jax.random.fold_in(seed_key, zlib.crc32(path.encode()))
    return [int(word) for word in jax.random.key_data(jax.random.fold_in(key, zlib.crc32(name.encode())))]


def bits(first, second, positions):
    """32 bits of each position, in Python's integers modulo 2^32."""
    word = (np.asarray(positions, np.uint64) + first) % 2**32
    word = (word ^ word >> 17) * 0xED5AD4BB % 2**32
    word = (word + second) % 2**32
    word = (word ^ word >> 11) * 0xAC4C1B51 % 2**32
    word = (word ^ word >> 15) * 0x31848BAB % 2**32
    return word ^ word >> 14


def uniform(seed_key, path, name, shape):
    """Float32 in [0, 1) for each element of a leaf."""
    found = bits(*words(seed_key, path, name), np.arange(np.prod(shape, dtype=int)))
    return ((found >> 8) / 2**24).astype(np.float32).reshape(shape)
