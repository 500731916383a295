"""What accelerators have, by their vendors' data sheets: for plans, which are arithmetic.

Cloud TPU's pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e"; NVIDIA's data sheets of the L4, the L40S, the A100, the
H100 and the H200; of the RTX 4090 the whitepaper of its architecture.
"""

from __future__ import annotations

from typing import NamedTuple

from ..learn.speed import PEAKS

GIB = 2**30


class Device(NamedTuple):
    """One device.

    Attributes:
      hbm: bytes a program may use: of TPUs what the compiler says is available, a little less than the page says; of
        GPUs what the driver leaves of the published size.
      flops: bfloat16 products a second, dense, with float32 sums.
      hbm_rate: bytes a second between its memory and the chip.
    """

    hbm: float
    flops: float
    hbm_rate: float


BANDWIDTHS = {
    "NVIDIA A100-SXM4-40GB": 1555e9, "NVIDIA A100-SXM4-80GB": 2039e9, "NVIDIA A100 80GB PCIe": 1935e9,
    "NVIDIA H100 80GB HBM3": 3350e9, "NVIDIA H100 PCIe": 2000e9, "NVIDIA H200": 4800e9, "NVIDIA L4": 300e9,
    "NVIDIA L40S": 864e9, "TPU v4": 1200e9, "TPU v5 lite": 819e9, "TPU v5e": 819e9, "TPU v5": 2765e9,
    "TPU v5p": 2765e9, "TPU v6 lite": 1638e9, "TPU v6e": 1638e9,
}  # fmt: skip
"""Bytes a second between a device and its memory, by `device_kind`."""


def known(hbm: float, kind: str) -> Device:
    """A device whose rates are in the tables."""
    return Device(hbm, PEAKS[kind], BANDWIDTHS[kind])


DEVICES = {
    "TPU v4": known(31.75 * GIB, "TPU v4"),
    "TPU v5e": known(15.75 * GIB, "TPU v5e"),
    "TPU v5p": known(95.74 * GIB, "TPU v5p"),
    "TPU v6e": known(31.25 * GIB, "TPU v6e"),
    "RTX 4090 24 GB": Device(23.5 * GIB, 165e12, 1008e9),
    "L4 24 GB": known(22.0 * GIB, "NVIDIA L4"),
    "L40S 48 GB": known(44.4 * GIB, "NVIDIA L40S"),
    "A100 80 GB": known(79.0 * GIB, "NVIDIA A100-SXM4-80GB"),
    "H100 80 GB": known(79.0 * GIB, "NVIDIA H100 80GB HBM3"),
    "H200 141 GB": known(139.0 * GIB, "NVIDIA H200"),
}
