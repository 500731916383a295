"""Attention for training behind one choice: cuDNN's on NVIDIA GPUs, splash attention on TPUs, tiles on CPUs.

The plain path (`attend` in attention.py) holds the scores, [B, N, T, T]; a kernel holds a tile of them. A kernel wants
to know what the mask [B, T, T] says in words, so training hands the decoder a `Causal` in the mask's place.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ..runtime.mesh import BATCH, ROWS
from . import tiled
from .config import ModelConfig

LANES = 128
"""Splash attention's tiles are multiples of it; shorter rows are filled up, for no query sees what comes later."""
BLOCKS = (512, 256, 128)
EVEN = 8
"""cuDNN's packed rows are filled up to multiples of it: even, and 16 bytes of bfloat16."""
GPUS = ("gpu", "cuda")


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["segments"], meta_fields=["kernel", "window", "mesh", "interpret"]
)
@dataclasses.dataclass(frozen=True)
class Causal:
    """A query sees itself and what came before it in its segment, `window` keys at most; query t has index t.

    Attributes:
      segments: [B, T] ids, equal for the tokens of one packed sequence; None: a row is one sequence.
      kernel: "tiled", "cudnn" or "splash".
      window: keys a query sees, itself included; None is all.
      mesh: a kernel runs a device's rows and heads on that device; None where there is one device.
      interpret: run splash attention without a TPU, slowly: for tests.
    """

    segments: jax.Array | None
    kernel: str
    window: int | None = None
    mesh: jax.sharding.Mesh | None = None
    interpret: bool = False

    def within(self, window: int | None) -> Causal:
        return dataclasses.replace(self, window=window)


def choose(
    wanted: str, config: ModelConfig, *, platform: str, dtype, stacked: bool = False, mesh: jax.sharding.Mesh | None
) -> str:
    """The attention of a run, "xla" or one of OBSTACLES: what is wanted, or for "auto" the best there is.

    Raises:
      ValueError: a kernel is wanted that cannot do this, saying why.
    """
    if wanted in ("xla", "auto"):
        kernels = () if wanted == "xla" else tuple(OBSTACLES)
        return next((k for k in kernels if not obstacle(k, config, platform, dtype, stacked, mesh)), "xla")
    if wanted not in OBSTACLES:
        raise ValueError(f"attention {wanted!r} is not known; known: auto, xla, {', '.join(OBSTACLES)}")
    if reason := obstacle(wanted, config, platform, dtype, stacked, mesh):
        raise ValueError(f"attention={wanted} cannot be used: {reason}; take auto or xla")
    return wanted


def obstacle(kernel: str, config: ModelConfig, platform: str, dtype, stacked: bool, mesh) -> str | None:
    """Why a kernel cannot be used, or None."""
    if reason := OBSTACLES[kernel](config, platform, jnp.dtype(dtype)):
        return reason
    if stacked and len(set(config.layers)) > 1:
        return "stacked layers of several kinds share one compiled layer, a kernel's window is compiled in"
    ways = 1 if mesh is None else mesh.shape.get("tensor", 1)
    if config.num_key_value_heads % ways:
        return f"{config.num_key_value_heads} key/value heads do not divide over mesh.tensor={ways}"
    return None


def _tiled_obstacle(config: ModelConfig, platform: str, dtype) -> str | None:
    del dtype
    if platform != "cpu":
        return f"tiles pay on CPUs, this is {platform}"
    if config.attn_logit_softcapping is not None:
        return f"tiles know no soft cap of the scores, the model's is {config.attn_logit_softcapping}"
    return None


def _cudnn_obstacle(config: ModelConfig, platform: str, dtype) -> str | None:
    if platform not in GPUS:
        return f"cuDNN runs on NVIDIA GPUs, this is {platform}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN's attention multiplies bfloat16, the operands are {dtype} (set model.dtype=bfloat16)"
    if config.attn_logit_softcapping is not None:
        return f"cuDNN's attention has no soft cap of the scores, the model's is {config.attn_logit_softcapping}"
    if config.head_dim % 8 or config.head_dim > 128:
        return f"cuDNN's attention takes heads of a multiple of 8 up to 128, the model's are {config.head_dim}"
    return None


def _splash_obstacle(config: ModelConfig, platform: str, dtype) -> str | None:
    if platform != "tpu":
        return f"splash attention runs on TPUs, this is {platform}"
    if config.head_dim % 64:
        return f"splash attention is used for heads of a multiple of 64, the model's are {config.head_dim}"
    del dtype  # it takes both
    return None


OBSTACLES = {"tiled": _tiled_obstacle, "cudnn": _cudnn_obstacle, "splash": _splash_obstacle}


def attend(q: jax.Array, k: jax.Array, v: jax.Array, seen: Causal, *, scale: float, softcap: float | None) -> jax.Array:
    """As `attention.attend`: q [B, N, T, H], k and v [B, K, T, H] → [B, N, T, H], by a kernel."""
    if seen.kernel != "splash" and softcap is not None:
        raise ValueError(f"{seen.kernel} attention has no soft cap, found {softcap}; take attention=xla")
    if seen.kernel == "tiled":
        return tiled.attend(q, k, v, seen.segments, scale=scale, window=seen.window)
    if seen.kernel == "cudnn":  # jax partitions it over a mesh by itself
        return _cudnn(q, k, v, seen.segments, scale=scale, window=seen.window)
    kernel = functools.partial(_splash, scale=scale, softcap=softcap, window=seen.window, interpret=seen.interpret)
    if seen.mesh is None or seen.mesh.size == 1:
        return kernel(q, k, v, seen.segments)
    rows, heads = BATCH, PartitionSpec(ROWS, "tensor")
    segments = () if seen.segments is None else (seen.segments,)
    local = jax.shard_map(
        lambda q, k, v, *segments: kernel(q, k, v, segments[0] if segments else None),
        mesh=seen.mesh,
        in_specs=(heads, heads, heads, *(rows for _ in segments)),
        out_specs=heads,
        check_vma=False,  # pallas calls do not say over which axes their results vary
    )
    return local(q, k, v, *segments)


def _cudnn(q, k, v, segments, *, scale: float, window: int | None) -> jax.Array:
    T = q.shape[2]
    mask = None
    if segments is not None:
        # A row of T tokens has T − 1 positions, and with a bias the backward pass takes even lengths only. What is
        # filled up is a segment of its own behind all others: no query sees it, and it sees itself.
        more = -T % EVEN
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))) for x in (q, k, v))
        segments = jnp.pad(segments, ((0, 0), (0, more)), constant_values=-1)
        mask = (segments[:, :, None] == segments[:, None, :])[:, None]
    out = jax.nn.dot_product_attention(
        *(x.swapaxes(1, 2) for x in (q, k, v)),
        mask=mask,  # becomes a bias: the kernel still skips what is in the future, not what is in other segments
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
    return out.swapaxes(1, 2)[:, :, :T].astype(jnp.float32)


def _splash(
    q, k, v, segments, *, scale: float, softcap: float | None, window: int | None, interpret: bool
) -> jax.Array:
    T = q.shape[2]
    more = -T % LANES
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))) for x in (q, k, v))
    q = (q * scale).astype(q.dtype)
    kernel = _splash_kernel(q.shape[1], T + more, window, softcap, interpret)
    if segments is None:
        out = jax.vmap(kernel)(q, k, v)
    else:
        from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

        ids = jnp.pad(segments, ((0, 0), (0, more)), constant_values=-1)
        out = jax.vmap(kernel)(q, k, v, SegmentIds(ids, ids))
    return jnp.asarray(out)[:, :, :T].astype(jnp.float32)  # residuals, which it can return beside, are not asked for


def _splash_kernel(heads: int, length: int, window: int | None, softcap: float | None, interpret: bool):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    square = (length, length)
    one = splash.CausalMask(square) if window is None else splash.LocalMask(square, (window - 1, 0), 0)
    block = next(b for b in BLOCKS if length % b == 0)
    return splash.make_splash_mha(
        splash.MultiHeadMask([one] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
        ),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )
