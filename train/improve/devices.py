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


DEVICES = {
    "TPU v4": Device(31.75 * GIB, PEAKS["TPU v4"], 1200e9),
    "TPU v5e": Device(15.75 * GIB, PEAKS["TPU v5e"], 819e9),
    "TPU v5p": Device(95.74 * GIB, PEAKS["TPU v5p"], 2765e9),
    "TPU v6e": Device(31.25 * GIB, PEAKS["TPU v6e"], 1638e9),
    "RTX 4090 24 GB": Device(23.5 * GIB, 165e12, 1008e9),
    "L4 24 GB": Device(22.0 * GIB, PEAKS["NVIDIA L4"], 300e9),
    "L40S 48 GB": Device(44.4 * GIB, PEAKS["NVIDIA L40S"], 864e9),
    "A100 80 GB": Device(79.0 * GIB, PEAKS["NVIDIA A100-SXM4-80GB"], 2039e9),
    "H100 80 GB": Device(79.0 * GIB, PEAKS["NVIDIA H100 80GB HBM3"], 3350e9),
    "H200 141 GB": Device(139.0 * GIB, PEAKS["NVIDIA H200"], 4800e9),
}
