"""Memory, operations and traffic of the three programs by arithmetic: what docs/scale.md derives, a device.

P parameters, f·t the devices they lie over, R rows of a device at a time, T positions of a row, D model, F mlp,
V vocabulary, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax

from ..learn.speed import step_flops, token_flops
from ..models.config import ModelConfig
from ..models.decoder import shapes

Shape = Mapping[str, int]
"""{"data": …, "fsdp": …, "tensor": …}."""
WIDTH = {"float32": 4, "bfloat16": 2}


def parameters(model: ModelConfig) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes(model)))


def masters(model: ModelConfig, mesh: Shape, copies: int = 1) -> float:
    """Bytes of whole models in float32, spread over fsdp and tensor."""
    return 4.0 * copies * parameters(model) / (mesh["fsdp"] * mesh["tensor"])


def sft_memory(model: ModelConfig, plan: Any, mesh: Shape) -> dict[str, float]:
    r"""Bytes of a device while it takes a step.

    State $(m + 8)P/ft$ (m 4 or 2 bytes of a master, Adam's moments), gradients $4P/ft$; of each layer what
    the backward pass starts from, $4LRTD$, and with less remat the results of its products; one layer at work;
    and the head, whole but for `tensor`: $VD/t$ in the operands' type, and its gradient twice in float32 (what
    is there and what a chunk adds).
    """
    P, ways, t = parameters(model), mesh["fsdp"] * mesh["tensor"], mesh["tensor"]
    D, F, V, L = model.hidden_size, model.intermediate_size, model.vocab_size, model.num_hidden_layers
    heads = (model.num_attention_heads + 2 * model.num_key_value_heads) * model.head_dim
    rows = (plan.micro_batch or plan.batch) / (mesh["data"] * mesh["fsdp"])
    tokens, width = rows * plan.length, WIDTH[plan.dtype]
    layer = token_flops(model)[0] / L
    products = {"full": 0.0, "dots": 1.0, "none": 2.0}[plan.remat] * (heads + 2 * F) / t
    return {
        "masters": WIDTH[plan.masters] * P / ways,
        "moments": 8 * P / ways,
        "gradients": 4 * P / ways,
        "layer inputs": 4 * L * tokens * (D + products),
        "a layer": 2 * width * layer / t + 4 * tokens * (3 * F / t + 2 * D),
        "head": (width + 8) * V * D / t + 8 * min(plan.logits_at_once, tokens) * V / t,
    }


def decode_memory(model: ModelConfig, plan: Any, mesh: Shape) -> dict[str, float]:
    r"""Bytes of a device while it decodes: weights $2P/ft$, caches $4\,L\,(n/df)\,(K/t)\,S\,H$.

    And where weights lie over fsdp, the matrices that are whole while they are used: the table looked up in, the
    head, a layer.
    """
    width, t = WIDTH[plan.dtype], mesh["tensor"]
    cache = 2 * width * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * plan.length / t
    table = model.vocab_size * model.hidden_size
    spread = mesh["fsdp"] if not plan.gather else 1
    gathered = 0.0 if spread == 1 else width * (2 * table + token_flops(model)[0] / model.num_hidden_layers) / t
    return {
        "weights": width * parameters(model) / (spread * t),
        "caches": cache * plan.slots / (mesh["data"] * mesh["fsdp"]),
        "gathered": gathered,
    }


def merge_memory(model: ModelConfig, plan: Any, mesh: Shape) -> dict[str, float]:
    """Bytes of a device while it merges: the anchor, the tuned model, and what comes out."""
    del plan
    return {"anchor": masters(model, mesh), "tuned": masters(model, mesh), "merged": masters(model, mesh)}


MEMORY = {"sft": sft_memory, "decode": decode_memory, "merge": merge_memory}


def flops(model: ModelConfig, plan: Any) -> float:
    r"""Operations of all devices together: of a step $6PT$ and attention, of a decoded token $2P$."""
    if plan.step == "merge":
        return 3.0 * parameters(model)
    if plan.step == "sft":
        return step_flops(model, plan.batch, plan.length, plan.batch * plan.length)
    every, head = token_flops(model)
    attention = 4 * model.num_hidden_layers * model.num_attention_heads * model.head_dim * plan.length
    return plan.slots * (2.0 * (every + head) + attention)


def sft_traffic(model: ModelConfig, plan: Any, mesh: Shape) -> float:
    r"""Bytes that reach a device in a step.

    Over fsdp: a layer's weights forward, again for remat, again backward, in the operands' type, and their gradients
    in float32: $(3w + 4)P/t$ a micro-batch. Over data the gradients once more, $8P/ft$. Over tensor four
    sums of activations a layer (two forward, two backward; two more with remat), each twice $4RTD$.
    """
    f, t, d = mesh["fsdp"], mesh["tensor"], mesh["data"]
    parts = plan.batch // (plan.micro_batch or plan.batch)
    tokens = plan.batch * plan.length / (d * f)
    times = 3 if plan.remat == "full" else 2
    over_fsdp = (f - 1) / f * (times * WIDTH[plan.dtype] + 4) * parameters(model) / t * parts
    over_data = 2 * (d - 1) / d * 4 * parameters(model) / (f * t)
    sums = (6 if plan.remat == "full" else 4) * model.num_hidden_layers
    over_tensor = 2 * (t - 1) / t * sums * 4 * tokens * model.hidden_size
    return over_fsdp + over_data + over_tensor
