"""How much of the device a step uses: its floating-point operations, and the most the device can do."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ..models.config import ModelConfig
from ..models.decoder import shapes

# FLOP/s of dense bfloat16 products with float32 sums, by `device_kind`, from the vendors' data sheets. float32 runs
# at a fraction of it that depends on settings, so MFU is always of this peak on accelerators.
PEAKS = {
    "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H200": 989e12, "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12, "NVIDIA GH200 480GB": 989e12, "NVIDIA B200": 2250e12,
    "TPU v3": 123e12, "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5": 459e12, "TPU v5p": 459e12,
    "TPU v6 lite": 918e12, "TPU v6e": 918e12,
}  # fmt: skip


def token_flops(model: ModelConfig) -> tuple[int, int]:
    """Parameters that multiply every token, and those of the head, which multiply every target.

    Embedding rows are looked up, not multiplied; norms and biases are no matrices.
    """
    head = model.vocab_size * model.hidden_size
    embeddings = head if model.tie_word_embeddings else 2 * head
    everything = sum(multiplying(model, leaf.shape) for leaf in jax.tree.leaves(shapes(model)) if len(leaf.shape) > 1)
    return everything - embeddings, head


def multiplying(model: ModelConfig, shape: tuple[int, ...]) -> int:
    """Numbers of a matrix, or of the matrices of those experts that a token sees."""
    if model.experts is None or len(shape) < 3:
        return math.prod(shape)
    return math.prod(shape[1:]) * model.experts.per_token


def step_flops(model: ModelConfig, rows: int, length: int, targets: int, *, frozen: bool = False) -> float:
    r"""Operations of one update: $6(P\,BT + P_h\,K) + 12\,L\,N\,H\,B\,T^2$.

    2 a multiply-add, forward once and backward twice; attention's two products over the whole square, the convention
    of PaLM (https://arxiv.org/abs/2204.02311, appendix B). What remat computes again is not counted.

    Args:
      rows: B. length: T, positions a row. targets: K, positions whose logits are computed.
      frozen: the weights are not trained (LoRA): 4 in place of 6; the adapter's own few are not counted.

    Example:
      >>> tiny = ModelConfig(8, 4, 8, 1, 1, 1, 4, 16, tie_word_embeddings=True)
      >>> step_flops(tiny, rows=1, length=2, targets=2)  # P = 4·4·4 + 3·4·8 = 160, P_h = 32
      2496.0
    """
    every, head = token_flops(model)
    attention = 12 * model.num_hidden_layers * model.num_attention_heads * model.head_dim * rows * length**2
    return float((4 if frozen else 6) * (every * rows * length + head * targets) + attention)


def batch_flops(model: ModelConfig, batch: Mapping[str, Any], *, frozen: bool = False) -> float:
    """Operations of an update on this batch, padding included: what the device is asked to do."""
    *rows_of, length = batch["tokens"].shape
    if "sources" in batch:  # rows that branch: every position is read
        return step_flops(model, math.prod(rows_of), length, batch["sources"].size, frozen=frozen)
    rows, length = math.prod(rows_of), length - 1
    targets = batch["targets"].size if "targets" in batch else rows * length
    return step_flops(model, rows, length, targets, frozen=frozen)


def tokens_of(batch: Mapping[str, Any]) -> jax.Array:
    """Tokens of a batch that are read: of packed rows all but padding, of others those before the last target."""
    if "segments" in batch:
        return jnp.sum(batch["segments"] > 0)
    weights = batch["weights"]
    return jnp.sum(jnp.max(jnp.where(weights != 0, jnp.arange(weights.shape[-1]), 0), axis=-1))


@functools.cache
def peak_flops(dtype: str, devices: int = 1) -> tuple[float, str]:
    """FLOP/s that the devices of a run can do together (NaN where unknown), and where the number is from."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return measured_peak(dtype), f"measured: {dtype} product of 1024 × 1024 on the CPU"
    if device.device_kind not in PEAKS:
        return math.nan, f"unknown: {device.device_kind} is not in train/learn/speed.py"
    return PEAKS[device.device_kind] * devices, f"{devices} × {device.device_kind}, data sheet"


def measured_peak(dtype: str, size: int = 1024) -> float:
    """FLOP/s of a square product with float32 sums on the first device: the best of eight, for noise only slows."""
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x, y: jnp.matmul(x, y, preferred_element_type=jnp.float32))
    product(a, a).block_until_ready()
    times = []
    for _ in range(8):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)
