r"""A mixture of experts in the place of an MLP: a router chooses k of E expert MLPs for each token.

$y = \sum_{e \in \mathrm{top}_k(z)} p_e(z)\, W^d_e\,(\phi(W^g_e x) \odot W^u_e x)$ with the router's scores $z = W x$
(Shazeer et al., https://arxiv.org/abs/1701.06538; Mixtral, https://arxiv.org/abs/2401.04088). p is the softmax over
the chosen scores, or over all of them. No token is ever dropped, and what a token becomes does not depend on the
others. An expert's matrices are slices of arrays [E, out, in].

Tokens are sorted by expert, so that each expert's rows lie together. On accelerators `jax.lax.ragged_dot` multiplies
them. XLA has no kernel for it on CPUs, where it is an order of magnitude slower than plain products
(`benchmarks/experts.py`), so there a loop goes over the experts that have rows, a block of rows at a time.

Shapes: R tokens, N = R·k rows, E experts, D model, F mlp.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from ..runtime.mesh import ROWS, active_mesh, row_ways
from .config import Experts

Activation = Callable[[jax.Array], jax.Array]
LARGEST_BLOCK = 128
"""Rows of one product on a CPU; half as many waste less at an expert's end, twice as many leave the cache."""
SMALLEST_BLOCK = 8


class Matrix(nnx.Module):
    """A weight alone, used by the module it is a part of."""

    def __init__(self, *shape: int):
        self.weight = nnx.Param(jnp.zeros(shape))


class Stacks(nnx.Module):
    def __init__(self, e: Experts, hidden_size: int):
        self.gate_proj = Matrix(e.count, e.intermediate_size, hidden_size)
        self.up_proj = Matrix(e.count, e.intermediate_size, hidden_size)
        self.down_proj = Matrix(e.count, hidden_size, e.intermediate_size)


class ExpertMLP(nnx.Module):
    """x [B, T, D] → ([B, T, D] float32, the router's scores [B, T, E] float32)."""

    def __init__(self, e: Experts, hidden_size: int, activation: Activation, shared: nnx.Module | None):
        self.sizes, self.activation = e, activation
        self.gate = Matrix(e.count, hidden_size)
        self.experts = Stacks(e, hidden_size)
        self.shared_expert = shared
        self.shared_expert_gate = None if shared is None else Matrix(1, hidden_size)

    def __call__(self, x: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
        scores = narrow(x, self.gate.weight[...])
        chosen, weights = route(scores, self.sizes.per_token, normalize=self.sizes.normalize)
        stacks = [m.weight[...] for m in (self.experts.gate_proj, self.experts.up_proj, self.experts.down_proj)]
        y = spread_experts(self.activation, jnp.dtype(dtype), x, chosen, weights, stacks)
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            y += jax.nn.sigmoid(narrow(x, self.shared_expert_gate.weight[...])) * self.shared_expert(x, dtype)
        return y, scores


def narrow(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [..., D] · weight [few, D]ᵀ in float32, whatever the operands of other products: it decides who is chosen."""
    wide = x.astype(jnp.float32), weight.astype(jnp.float32)
    return lax.dot_general(*wide, (((x.ndim - 1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)


def route(scores: jax.Array, k: int, *, normalize: bool) -> tuple[jax.Array, jax.Array]:
    """Choose the k largest of scores [..., E]: (experts [..., k] int32, their weights [..., k], the largest first).

    Args:
      normalize: the softmax is over the chosen scores, which is the softmax over all divided by the sum of the chosen.

    Example:
      >>> experts, weights = route(jnp.log(jnp.array([0.5, 0.1, 0.3, 0.1])), 2, normalize=False)
      >>> experts.tolist(), weights.round(3).tolist()
      ([0, 2], [0.5, 0.30000001192092896])
    """
    largest, chosen = lax.top_k(scores, k)
    total = largest if normalize else scores
    return chosen, jnp.exp(largest - jax.nn.logsumexp(total, axis=-1, keepdims=True))


def spread_experts(
    activation: Activation, dtype: jnp.dtype, x: jax.Array, chosen: jax.Array, weights: jax.Array, stacks: Sequence
) -> jax.Array:
    """Every token through its experts, each where it lies: x [B, T, D], chosen and weights [B, T, k] → [B, T, D].

    Over the mesh's axis `expert` rows of the batch are gathered, go through the experts of a device, and what they add
    up to is scattered back; over `tensor` each device has a part of F, and the parts are summed.
    """
    apply = functools.partial(mix, activation, dtype)
    mesh = active_mesh()
    if mesh is None:
        return apply(x, chosen, weights, *stacks)
    together = len(x) % row_ways(mesh) == 0

    def local(x, chosen, weights, *stacks):
        gather = together and mesh.shape["expert"] > 1
        if gather:
            x, chosen, weights = (lax.all_gather(a, "expert", tiled=True) for a in (x, chosen, weights))
        y = apply(x, chosen, weights, *stacks, first=lax.axis_index("expert") * len(stacks[0]))
        if gather:
            return lax.psum_scatter(lax.psum(y, "tensor"), "expert", tiled=True)
        return lax.psum(y, ("expert", "tensor"))

    rows = PartitionSpec(ROWS) if together else PartitionSpec()
    inner, outer = PartitionSpec("expert", "tensor"), PartitionSpec("expert", None, "tensor")
    return jax.shard_map(
        local, mesh=mesh, in_specs=(rows, rows, rows, inner, inner, outer), out_specs=rows, check_vma=False
    )(x, chosen, weights, *(stack.astype(dtype) for stack in stacks))  # gathered over fsdp in the operands' dtype


def mix(activation: Activation, dtype: jnp.dtype, x, chosen, weights, gate, up, down, first: jax.Array | int = 0):
    """`spread_experts` of one device: experts `first`, `first` + 1, …; those of others add nothing."""
    k, (count, _, D) = chosen.shape[-1], gate.shape
    own = chosen.reshape(-1) - first
    own = jnp.where((own >= 0) & (own < count), own, count)
    order = jnp.argsort(own, stable=True)
    back = jnp.argsort(order)
    sizes = jnp.sum(own[:, None] == jnp.arange(count), axis=0, dtype=jnp.int32)
    repeated = jnp.broadcast_to(x.reshape(-1, 1, D), (x.size // D, k, D)).reshape(-1, D)
    rows = permuted(repeated.astype(dtype), order, back)
    made = permuted(
        multiply(activation, rows, gate.astype(dtype), up.astype(dtype), down.astype(dtype), sizes), back, order
    )
    return jnp.sum(made.reshape(*chosen.shape, D) * weights[..., None], axis=-2)


@jax.custom_vjp
def permuted(x: jax.Array, order: jax.Array, back: jax.Array) -> jax.Array:
    """x[order]; back is the inverse of order, so that the gradient is looked up too and not added up row by row."""
    del back
    return x[order]


permuted.defvjp(lambda x, order, back: (x[order], back), lambda back, g: (g[back], None, None))


# --- the products ------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def multiply(activation: Activation, x, gate, up, down, sizes) -> jax.Array:
    """Rows sorted by expert, each through its expert.

    Args:
      x: [N, D]. gate, up: [E, F, D]. down: [E, D, F], all of one dtype; sums are float32.
      sizes: [E] int32, rows of each expert; what follows their sum is of none.

    Returns:
      [N, D] float32; 0 in the rows of no expert.
    """
    return _forward(activation, x, gate, up, down, sizes)[0]


def _forward(activation: Activation, x, gate, up, down, sizes):
    by = functools.partial
    y, a, b = lax.platform_dependent(
        x, gate, up, down, sizes, cpu=by(loop_forward, activation), default=by(ragged_forward, activation)
    )
    return y, (x, gate, up, down, sizes, a, b)


def _backward(activation: Activation, saved, g: jax.Array):
    by = functools.partial
    grads = lax.platform_dependent(
        *saved, g, cpu=by(loop_backward, activation), default=by(ragged_backward, activation)
    )
    return *grads, None


multiply.defvjp(_forward, _backward)


def ragged_forward(activation: Activation, x, gate, up, down, sizes) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(Outputs [N, D], what the gates' products and the ups' are, [N, F] float32), by `ragged_dot`."""
    real = (jnp.arange(len(x)) < jnp.sum(sizes))[:, None]
    dot = functools.partial(lax.ragged_dot, group_sizes=sizes, preferred_element_type=jnp.float32)
    a, b = (jnp.where(real, dot(x, w.swapaxes(1, 2)), 0.0) for w in (gate, up))
    y = dot((activation(a) * b).astype(x.dtype), down.swapaxes(1, 2))
    return jnp.where(real, y, 0.0), a, b


# A sum over the rows of each expert, [N, out] and [N, in] → [E, out, in].
BY_EXPERT = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[])


def ragged_backward(activation: Activation, x, gate, up, down, sizes, a, b, g):
    """Gradients of x, gate, up and down; operands of all products are of their dtype."""
    real = (jnp.arange(len(x)) < jnp.sum(sizes))[:, None]

    def through(g, w):
        """Gradient of h by g of h · wᵀ."""
        return jnp.where(real, lax.ragged_dot(g, w, sizes, preferred_element_type=jnp.float32), 0.0)

    def outer(g, h):
        made = lax.ragged_dot_general(g, h, sizes, BY_EXPERT, preferred_element_type=jnp.float32)
        return made.astype(x.dtype)

    g = jnp.where(real, g, 0.0).astype(x.dtype)
    h, gated = jax.vjp(lambda a, b: activation(a) * b, a, b)
    d_a, d_b = (d.astype(x.dtype) for d in gated(through(g, down)))
    d_x = (through(d_a, gate) + through(d_b, up)).astype(x.dtype)
    return d_x, outer(d_a, x), outer(d_b, x), outer(g, h.astype(x.dtype))


def block_rows(rows: int, experts: int) -> int:
    """Rows of one product on a CPU: a power of two, so that an expert of mean size takes four or so.

    Example:
      >>> block_rows(4096, 8), block_rows(16, 8)
      (128, 8)
    """
    size = SMALLEST_BLOCK
    while size < LARGEST_BLOCK and 4 * size * experts < rows:
        size *= 2
    return size


def over_blocks(sizes: jax.Array, size: int, pick: Callable, block: Callable, start):
    """Fold `block(at, end, picked, carry)` over the blocks of every expert that has rows, in their order.

    The last block of an expert runs over into the rows of the next, which come later and are written over then.

    Args:
      pick: expert → what its blocks need, once an expert. block: returns the carry.
    """
    ends = jnp.cumsum(sizes)
    busy = jnp.argsort(sizes == 0, stable=True)  # no weight of an idle expert is read

    def expert(i, carry):
        e = busy[i]
        picked, end = pick(e), ends[e]

        def step(state):
            at, carry = state
            return at + size, block(e, at, end, picked, carry)

        return lax.while_loop(lambda state: state[0] < end, step, (end - sizes[e], carry))[1]

    return lax.fori_loop(0, jnp.sum(sizes > 0), expert, start)


def _rows(x: jax.Array, at, size: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, at, size)


def _write(x: jax.Array, rows: jax.Array, at) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x, rows.astype(x.dtype), at, 0)


def _dot(x: jax.Array, w: jax.Array, x_axis: int, w_axis: int) -> jax.Array:
    return lax.dot_general(x, w, (((x_axis,), (w_axis,)), ((), ())), preferred_element_type=jnp.float32)


def _outer(g: jax.Array, x: jax.Array) -> jax.Array:
    """gᵀ · x of a block; of bfloat16 contracted over two axes, for which XLA has a kernel (matmul.py)."""
    if x.dtype == jnp.float32:
        return _dot(g, x, 0, 0)
    g, x = (z.reshape(2, -1, z.shape[1]) for z in (g, x))
    return lax.dot_general(g, x, (((0, 1), (0, 1)), ((), ())), preferred_element_type=jnp.float32)


def loop_forward(activation: Activation, x, gate, up, down, sizes) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `ragged_forward`, by a loop over blocks of rows."""
    N, size = len(x), block_rows(len(x), len(sizes))
    padded = jnp.pad(x, ((0, size), (0, 0)))

    def block(e, at, end, weights, carry):
        del e
        y, a, b = carry
        rows, (w_gate, w_up, w_down) = _rows(padded, at, size), weights
        a_rows, b_rows = _dot(rows, w_gate, 1, 1), _dot(rows, w_up, 1, 1)
        y_rows = _dot((activation(a_rows) * b_rows).astype(x.dtype), w_down, 1, 1)
        real = (at + jnp.arange(size) < end)[:, None]
        return _write(y, jnp.where(real, y_rows, 0.0), at), _write(a, a_rows, at), _write(b, b_rows, at)

    F, D = gate.shape[1:]
    start = tuple(jnp.zeros((N + size, width), jnp.float32) for width in (D, F, F))
    y, a, b = over_blocks(sizes, size, lambda e: (gate[e], up[e], down[e]), block, start)
    return y[:N], a[:N], b[:N]


def loop_backward(activation: Activation, x, gate, up, down, sizes, a, b, g):
    """As `ragged_backward`, by a loop over blocks of rows."""
    N, size = len(x), block_rows(len(x), len(sizes))
    x_all, a_all, b_all, g_all = (jnp.pad(z, ((0, size), (0, 0))) for z in (x, a, b, g))

    def block(e, at, end, weights, carry):
        d_x, d_stacks = carry
        w_gate, w_up, w_down = weights
        real = (at + jnp.arange(size) < end)[:, None]
        rows, g_rows = _rows(x_all, at, size), jnp.where(real, _rows(g_all, at, size), 0.0).astype(x.dtype)
        h, gated = jax.vjp(lambda a, b: activation(a) * b, _rows(a_all, at, size), _rows(b_all, at, size))
        d_a, d_b = (d.astype(x.dtype) for d in gated(_dot(g_rows, w_down, 1, 0)))
        d_rows = _dot(d_a, w_gate, 1, 0) + _dot(d_b, w_up, 1, 0)
        made = _outer(d_a, rows), _outer(d_b, rows), _outer(g_rows, h.astype(x.dtype))
        return _write(d_x, d_rows, at), tuple(d.at[e].add(m) for d, m in zip(d_stacks, made, strict=True))

    start = jnp.zeros((N + size, x.shape[1]), x.dtype), tuple(jnp.zeros(w.shape, jnp.float32) for w in (gate, up, down))
    d_x, d_stacks = over_blocks(sizes, size, lambda e: (gate[e], up[e], down[e]), block, start)
    return d_x[:N], *(d.astype(w.dtype) for d, w in zip(d_stacks, (gate, up, down), strict=True))


def stacks_of(params) -> tuple[str, ...]:
    """What a merge rule is to take as `stacked`: it sees one expert's matrix at a time, as it does in files."""
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    # (Samples of leaves, which verify replays, are flat and have no axis of experts.)
    found = any("experts" in [str(getattr(p, "key", p)) for p in path] and leaf.ndim > 2 for path, leaf in paths)
    return ("experts",) if found else ()
