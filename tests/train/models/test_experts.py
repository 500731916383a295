"""Mixtures of experts: the products, the router, the balance, their files, and how merge rules see them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.goldens.family_cases import FAMILY_CASES
from helpers.tiny_families import weights
from helpers.tiny_models import config_of, state_of, write_folder
from safetensors.numpy import load_file

import jaxmerge
from train.learn.settings import Step
from train.learn.speed import token_flops
from train.log import UserError
from train.models.balance import Routing, balance, tokens_read
from train.models.config import Experts, Lora
from train.models.experts import (
    block_rows,
    loop_backward,
    loop_forward,
    mix,
    ragged_backward,
    ragged_forward,
    route,
    stacks_of,
)
from train.models.hf import load_hf, named, save_hf
from train.models.hf_config import config_to_hf
from train.models.lora import init_lora
from train.models.open import random_config
from train.models.stacked import stack_layers

MIXTURES = [name for name, a in FAMILY_CASES.items() if "num_experts_per_tok" in a]
R, D, F, E, K = 150, 12, 20, 5, 2
SILU = jax.nn.silu
LOOP, RAGGED = (
    [jax.jit(f, static_argnums=0) for f in pair]
    for pair in ((loop_forward, loop_backward), (ragged_forward, ragged_backward))
)
MIX = jax.jit(mix, static_argnums=(0, 1))


@pytest.fixture(scope="module")
def drawn():
    """Tokens, stacks and scores, float32; expert 3 is never chosen, expert 0 very often."""
    r = np.random.default_rng(0)
    stacks = [(r.standard_normal(shape) / 4).astype(np.float32) for shape in ((E, F, D), (E, F, D), (E, D, F))]
    scores = r.standard_normal((R, E)).astype(np.float32) + np.array([3, 0, 0, -99, 0], np.float32)
    return r.standard_normal((R, D)).astype(np.float32), stacks, scores


def by_hand(x, stacks, scores, *, normalize: bool):
    """The formula in float64, token by token."""
    x, scores = x.astype(np.float64), scores.astype(np.float64)
    gate, up, down = (w.astype(np.float64) for w in stacks)
    out = np.zeros_like(x)
    for i, (token, z) in enumerate(zip(x, scores, strict=True)):
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        best = np.argsort(-z, kind="stable")[:K]
        for e in best:
            a = gate[e] @ token
            share = p[e] / (p[best].sum() if normalize else 1.0)
            out[i] += share * (down[e] @ (a / (1 + np.exp(-a)) * (up[e] @ token)))
    return out


@pytest.mark.parametrize("normalize", [True, False])
def test_the_formula_token_by_token(normalize, drawn):
    x, stacks, scores = drawn
    chosen, shares = route(jnp.asarray(scores), K, normalize=normalize)
    assert chosen.tolist() == np.argsort(-scores, axis=1, kind="stable")[:, :K].tolist()
    found = MIX(SILU, jnp.dtype("float32"), jnp.asarray(x), chosen, shares, *map(jnp.asarray, stacks))
    np.testing.assert_allclose(found, by_hand(x, stacks, scores, normalize=normalize), atol=2e-6)


def test_gradients_are_those_of_the_plain_formula(drawn):
    """Of the tokens, the weights of the experts, and all three stacks: as of every expert on every token."""
    x, stacks, scores = (jax.tree.map(jnp.asarray, part) for part in drawn)
    ahead = jnp.cos(jnp.arange(R * D, dtype=jnp.float32)).reshape(R, D)

    def ours(x, scores, stacks):
        chosen, shares = route(scores, K, normalize=True)
        return jnp.sum(mix(SILU, jnp.dtype("float32"), x, chosen, shares, *stacks) * ahead)

    def plain(x, scores, stacks):
        gate, up, down = stacks
        each = jnp.einsum(
            "ref,edf->red", SILU(jnp.einsum("rd,efd->ref", x, gate)) * jnp.einsum("rd,efd->ref", x, up), down
        )
        chosen, shares = route(scores, K, normalize=True)
        taken = jnp.take_along_axis(each, chosen[..., None], axis=1)
        return jnp.sum(jnp.sum(taken * shares[..., None], axis=1) * ahead)

    found, wanted = (jax.jit(jax.grad(f, argnums=(0, 1, 2)))(x, scores, stacks) for f in (ours, plain))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert [bool(g.any()) for g in found[2][0]] == [True, True, True, False, True]  # an idle expert's is 0


SHARES = {"uneven": (40, 0, 17, 30, 0), "one expert has all": (0, 0, 100, 0, 0), "none is ours": (0, 0, 0, 0, 0)}


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loop_of_cpus_is_ragged_dot(shares, dtype, drawn):
    """What accelerators run and what CPUs run, forward and backward; rows of no expert are 0."""
    rows, (stacks, sizes) = 100, (drawn[1], jnp.asarray(SHARES[shares], jnp.int32))
    r = np.random.default_rng(1)
    x, *stacks = (jnp.asarray(a, dtype) for a in (r.standard_normal((rows, D)), *stacks))
    tolerance = {"atol": 1e-5 if dtype == "float32" else 0.15}
    found, wanted = LOOP[0](SILU, x, *stacks, sizes), RAGGED[0](SILU, x, *stacks, sizes)
    total = sum(SHARES[shares])
    np.testing.assert_allclose(found[0], wanted[0], **tolerance)
    assert found[0].dtype == jnp.float32
    assert not any(made[0][total:].any() for made in (found, wanted))
    g = jnp.asarray(r.standard_normal((rows, D)), jnp.float32)
    saved = (x, *stacks, sizes, *wanted[1:])
    pairs = zip(LOOP[1](SILU, *saved, g), RAGGED[1](SILU, *saved, g), strict=True)
    for a, b in pairs:
        assert a.dtype == b.dtype == x.dtype
        a, b = (np.asarray(z, np.float32) for z in (a, b))
        np.testing.assert_allclose(a[: total or rows], b[: total or rows], **tolerance)


def test_a_token_does_not_depend_on_the_others(drawn):
    """In every bit: in another order, and beside other tokens, as many of them."""
    x, stacks, scores = drawn

    def apply(x, scores):
        return MIX(SILU, jnp.dtype("float32"), x, *route(jnp.asarray(scores), K, normalize=True), *stacks)

    whole = np.asarray(apply(x, scores))
    order = np.random.default_rng(2).permutation(R)
    np.testing.assert_array_equal(apply(x[order], scores[order]), whole[order])
    others, more = x[::-1].copy(), scores[::-1].copy()
    others[:7], more[:7] = x[:7], scores[:7]
    np.testing.assert_array_equal(apply(others, more)[:7], whole[:7])


def test_blocks_are_small_for_few_rows():
    assert [block_rows(n, 8) for n in (1, 256, 1024, 100_000)] == [8, 8, 32, 128]


# --- balance ---


def test_the_balance_and_its_metrics():
    """Formula by hand over two layers, padding left out; even scores give k."""
    r = np.random.default_rng(3)
    scores = [r.standard_normal((2, 6, E)).astype(np.float32) for _ in range(2)]
    read = np.array([[1] * 6, [1] * 3 + [0] * 3], bool)
    loss, metrics = balance(Routing(tuple(map(jnp.asarray, scores)), jnp.asarray(read)), K)
    z = np.stack([s[read] for s in scores]).astype(np.float64)  # [L, tokens, E]
    p = np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)
    taken = np.zeros_like(p)
    np.put_along_axis(taken, np.argsort(-z, axis=-1)[..., :K], 1.0, axis=-1)
    assert abs(float(loss) - E * (taken.mean(axis=(0, 1)) * p.mean(axis=(0, 1))).sum()) < 1e-5
    shares = taken.mean(axis=1) / K
    assert abs(float(metrics["router_max_share"]) - shares.max()) < 1e-6
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.nansum(shares * np.log(shares), axis=1) / np.log(E)
    assert abs(float(metrics["router_entropy"]) - entropy.mean()) < 1e-5
    found = [float(metrics[f"expert_share_{e}"]) for e in range(E)]
    np.testing.assert_allclose(found, shares.mean(axis=0), atol=1e-6)
    even = Routing(jnp.zeros((1, 2, 6, E)), jnp.asarray(read))
    assert abs(float(balance(even, K)[0]) - K) < 1e-5


@pytest.mark.torch
def test_the_balance_is_that_of_transformers():
    import torch
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    scores = np.random.default_rng(4).standard_normal((3, 2, 6, E)).astype(np.float32)
    read = np.array([[1] * 6, [1] * 2 + [0] * 4])
    ours, _ = balance(Routing(jnp.asarray(scores), jnp.asarray(read) > 0), K)
    flat = tuple(torch.tensor(layer.reshape(-1, E)) for layer in scores)
    assert abs(float(ours) - float(load_balancing_loss_func(flat, E, K, torch.tensor(read)))) < 1e-5


def test_tokens_behind_the_last_target_are_not_counted():
    seen = tokens_read(jnp.asarray([[0, 0, 1, 1, 0, 0], [0] * 6, [0, 0, 0, 0, 0, 2.0]]))
    assert seen.tolist() == [[True] * 3 + [False] * 2, [False] * 5, [True] * 5]


# --- files ---


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_stacked_files_are_read_as_published_ones(name, tmp_path):
    """transformers 5 may hold and write the experts of a layer as two tensors."""
    attributes, config = FAMILY_CASES[name], config_of(FAMILY_CASES[name])
    leaves = {n: np.asarray(leaf) for n, leaf in named(weights(config))}
    published, params = load_hf(write_folder(tmp_path / "published", attributes, state=state_of(config, leaves)))
    stacked = {n: leaf for n, leaf in leaves.items() if ".experts." not in n}
    for layer in {n.partition(".experts.")[0] for n in leaves if ".experts." in n}:
        gate, up, down = (leaves[f"{layer}.experts.{kind}_proj.weight"] for kind in ("gate", "up", "down"))
        stacked |= {
            f"{layer}.experts.gate_up_proj": np.concatenate([gate, up], axis=1),
            f"{layer}.experts.down_proj": down,
        }
    found, again = load_hf(write_folder(tmp_path / "stacked", attributes, state=stacked))
    assert found == published == config
    for a, b, c in zip(*map(jax.tree.leaves, (params, again, weights(config))), strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)
    save_hf(tmp_path / "ours", config, again)
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert {n: a.tobytes() for n, a in written.items()} == {n: a.tobytes() for n, a in state_of(config, leaves).items()}


def test_a_missing_expert_is_named(tmp_path):
    lost = "model.layers.0.block_sparse_moe.experts.2.w3.weight"
    folder = write_folder(tmp_path / "model", FAMILY_CASES["mixtral"], **{lost: None})
    with pytest.raises(UserError, match=f"missing: {lost}"):
        load_hf(folder)


def test_both_names_of_the_number_of_experts_are_understood():
    for name in MIXTURES:
        attributes = dict(FAMILY_CASES[name])
        own = next(key for key in ("num_experts", "num_local_experts") if key in attributes)
        count, other = attributes.pop(own), {"num_experts", "num_local_experts"}.difference([own]).pop()
        assert config_of({**attributes, other: count}) == config_of(FAMILY_CASES[name])
        assert own in config_to_hf(config_of(FAMILY_CASES[name]))
        with pytest.raises(UserError, match=f"{own} = {count}.*disagree|{other} = 99.*disagree"):
            config_of({**attributes, other: 99, own: count})


QWEN = {"hidden_size": 2048, "bos_token_id": 151643, "hidden_act": "silu", "initializer_range": 0.02,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "use_sliding_window": False, "use_cache": True,
        "vocab_size": 151936, "torch_dtype": "bfloat16", "decoder_sparse_step": 1, "output_router_logits": False,
        "router_aux_loss_coef": 0.001, "attention_dropout": 0.0, "tie_word_embeddings": False}  # fmt: skip
REAL = {
    "mixtral": ({
        "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False, "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0", "use_cache": True, "vocab_size": 32000,
    }, Experts(8, 2, 14336, balance=0.02)),
    "qwen2_moe": ({
        **QWEN, "architectures": ["Qwen2MoeForCausalLM"], "eos_token_id": 151643, "intermediate_size": 5632,
        "max_position_embeddings": 8192, "max_window_layers": 21, "moe_intermediate_size": 1408,
        "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 60, "num_experts_per_tok": 4,
        "num_hidden_layers": 24, "num_key_value_heads": 16, "shared_expert_intermediate_size": 5632,
        "sliding_window": 32768,
    }, Experts(60, 4, 1408, normalize=False, shared_intermediate_size=5632)),
    "qwen3_moe": ({
        **QWEN, "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "eos_token_id": 151645,
        "head_dim": 128, "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
        "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
        "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
        "rope_scaling": None, "sliding_window": None,
    }, Experts(128, 8, 768)),
    "olmoe": ({
        "architectures": ["OlmoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "clip_qkv": None,
        "eos_token_id": 50279, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 1024, "max_position_embeddings": 4096, "norm_topk_prob": False,
        "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16,
        "num_key_value_heads": 16, "output_router_logits": False, "pad_token_id": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "tie_word_embeddings": False,
        "use_cache": True, "vocab_size": 50304,
    }, Experts(64, 8, 1024, normalize=False, balance=0.01)),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_published_configs_are_understood(name):
    """Mixtral 8x7B, Qwen1.5-MoE-A2.7B, Qwen3-30B-A3B and OLMoE-1B-7B; each layer attends to all before it."""
    attributes, wanted = REAL[name]
    config = config_of({"model_type": name, **attributes})
    assert config.experts == wanted
    assert set(config.layers) == {(None, "global")}
    assert config_of(json.loads(json.dumps(config_to_hf(config)))) == config


REFUSED = {
    "num_experts_per_tok is 0; expected a whole number from 1": ("mixtral", {"num_experts_per_tok": 0}),
    "num_local_experts is 'many'": ("mixtral", {"num_local_experts": "many"}),
    "5 experts a token are chosen, and a layer has 4": ("mixtral", {"num_experts_per_tok": 5}),
    "router_jitter_noise = 0.1 .implemented: 0": ("mixtral", {"router_jitter_noise": 0.1}),
    "norm_topk_prob = True": ("mixtral", {"norm_topk_prob": True}),
    "clip_qkv = 8 .implemented: None": ("olmoe", {"clip_qkv": 8}),
    "norm_topk_prob is 1; expected true or false": ("olmoe", {"norm_topk_prob": 1}),
    "router_aux_loss_coef is 'low'": ("olmoe", {"router_aux_loss_coef": "low"}),
    "router_aux_loss_coef is -0.1; it must be at least 0": ("olmoe", {"router_aux_loss_coef": -0.1}),
    "mlp_only_layers is .0.5.; expected a list of layers": ("qwen2_moe", {"mlp_only_layers": [0.5]}),
    "shared_expert_intermediate_size is None": ("qwen2_moe", {"shared_expert_intermediate_size": None}),
    "decoder_sparse_step is 0": ("qwen3_moe", {"decoder_sparse_step": 0}),
    "n_shared_experts = 2": ("qwen3_moe", {"n_shared_experts": 2}),
    "model_type 'gpt_oss' is not known": ("mixtral", {"model_type": "gpt_oss"}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_understood_is_refused(message):
    name, changes = REFUSED[message]
    with pytest.raises(UserError, match=message) as error:
        config_of({**FAMILY_CASES[name], **changes})
    assert "\n" not in str(error.value)


def test_which_layers_have_experts():
    sparse = {**FAMILY_CASES["qwen3_moe"], "num_hidden_layers": 5, "mlp_only_layers": [3], "decoder_sparse_step": 2}
    config = config_of(sparse)
    assert [config.has_experts(i) for i in range(5)] == [False, True, False, False, False]
    assert config_of(json.loads(json.dumps(config_to_hf(config)))) == config
    params = weights(config_of({**sparse, "num_hidden_layers": 2}))
    with pytest.raises(UserError, match="only alike ones"):
        stack_layers(params)


def test_a_random_mixture_is_one_that_its_family_has():
    sizes = {
        key: value for key, value in FAMILY_CASES["mixtral"].items() if key.startswith(("hidden", "num_h", "num_a"))
    }
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "intermediate_size": 40}
    experts = {"count": 4, "per_token": 2, "intermediate_size": 40}
    assert random_config({**sizes, "family": "mixtral", "experts": experts}).experts == Experts(4, 2, 40)
    with pytest.raises(UserError, match="the family 'llama' has no experts="):
        random_config({**sizes, "family": "llama", "experts": experts})


# --- merging, adapters, figures ---


def test_a_rule_sees_one_expert_at_a_time():
    """SLERP turns each expert's matrix by its own angle, as in files."""
    assert stacks_of(weights(config_of(FAMILY_CASES["mixtral"]))) == ("experts",)
    assert stacks_of(weights(config_of(FAMILY_CASES["qwen2"]))) == ()
    r = np.random.default_rng(5)
    one, two = ({"mlp": {"experts": {"up_proj": r.standard_normal((4, 3, 5)).astype(np.float32)}}} for _ in range(2))
    two["mlp"]["experts"]["up_proj"][0] *= 100
    jaxed = [jax.tree.map(jnp.asarray, tree) for tree in (one, two)]
    found = jaxmerge.slerp(jaxed, t=0.3, stacked=stacks_of(jaxed[0]))
    alone = jaxmerge.slerp([jax.tree.map(lambda leaf: leaf[2], tree) for tree in jaxed], t=0.3)
    together = jaxmerge.slerp(jaxed, t=0.3)
    each, own, loud = (np.asarray(tree["mlp"]["experts"]["up_proj"]) for tree in (found, alone, together))
    np.testing.assert_allclose(each[2], own, rtol=1e-5)
    assert np.abs(loud[2] - own).max() > 0.01


def test_adapters_of_experts_are_refused_and_others_made():
    params = weights(config_of(FAMILY_CASES["qwen2_moe"]))
    with pytest.raises(UserError, match=r"mlp/experts/.*adapters of experts are not known.*self_attn") as error:
        init_lora(Lora(), params, jax.random.key(0))
    assert "\n" not in str(error.value)
    adapter = init_lora(Lora(targets=("self_attn/.*_proj$",)), params, jax.random.key(0))
    assert adapter["model"]["layers"]["0"].keys() == {"self_attn"}


def test_operations_are_of_the_experts_that_a_token_sees():
    config = config_of(FAMILY_CASES["olmoe"])
    fewer = dataclasses.replace(config, experts=dataclasses.replace(config.experts, per_token=1))
    assert token_flops(config)[0] - token_flops(fewer)[0] == 3 * 40 * 32
    more = dataclasses.replace(config, experts=dataclasses.replace(config.experts, count=8))
    assert token_flops(more)[0] - token_flops(config)[0] == 4 * 32  # the router's rows alone


def test_the_coefficient_of_the_balance_is_no_negative_number():
    with pytest.raises(UserError, match="router_aux_loss_coef is -1"):
        Step(router_aux_loss_coef=-1.0)
