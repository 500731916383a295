"""Every family: logits of transformers, windows and scalings under padding and packing, config.json both ways."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers.goldens import GOLDENS
from helpers.goldens.cases import tensor
from helpers.goldens.family_cases import FAMILY_CASES, FULL, KEPT, LLAMA, OFF, SIZES, SLIDING
from helpers.tiny_families import IDS, logits, pack, run_engine, weights
from helpers.tiny_models import config_of, relative, state_of, write_folder
from safetensors.numpy import load_file

from train.generate.engine import Decoding, Engine
from train.generate.slots import Request
from train.log import UserError
from train.models.decoder import forward, init, shapes
from train.models.families import FAMILIES
from train.models.hf import load_hf, named, save_hf
from train.models.hf_config import config_to_hf
from train.models.open import random_config
from train.models.rope import sequence_lengths

# --- parity ---


@pytest.fixture(scope="module")
def expected():
    """Our logits of every case, which the golden ones of transformers are compared with first."""
    goldens = {**np.load(GOLDENS / "families.npz"), **np.load(GOLDENS / "experts.npz")}
    found = {}
    for name, attributes in FAMILY_CASES.items():
        config = config_of(attributes)
        found[name] = config, weights(config), logits(config, weights(config))
        assert relative(found[name][2][:, KEPT], goldens[name]) < 1e-4, name
    return found


def test_every_family_has_a_golden_case(expected):
    assert {config.family for config, _, _ in expected.values()} | {"llama"} == set(FAMILIES)
    assert OFF.keys() == FAMILY_CASES.keys()


@pytest.mark.parametrize(("name", "feature"), [(n, f) for n in OFF for f in OFF[n]])
def test_a_feature_switched_off_changes_the_logits(name, feature, expected):
    _, params, wanted = expected[name]
    assert relative(logits(config_of({**FAMILY_CASES[name], **OFF[name][feature]}), params), wanted) > 0.005


PRE_NORMS = ("input_layernorm", "", "post_attention_layernorm", "")
FIXED = {
    "gemma2": {"block_norms": PRE_NORMS, "unit_offset_norms": False, "scaled_embedding": False},
    "gemma3": {"qk_norm": False, "scaled_embedding": False},
    "qwen2": {"qkv_bias": False},
    "qwen3": {"qk_norm": False},
    "olmoe": {"qk_norm_all": False},
    "olmo2": {"qk_norm_all": False, "block_norms": ("", "post_attention_layernorm", "", "")},
    "glm": {"rope_interleaved": False, "qkv_bias": False},
    "glm4": {"rope_interleaved": False, "block_norms": PRE_NORMS},
}


@pytest.mark.parametrize(("name", "field"), [(n, f) for n in FIXED for f in FIXED[n]])
def test_what_a_family_fixes_changes_the_logits(name, field, expected):
    config, params, wanted = expected[name]
    config = dataclasses.replace(config, **{field: FIXED[name][field]})
    kept = dict(named(shapes(config)))
    leaves = {n: leaf for n, leaf in named(params) if n in kept}
    tree = jax.tree.unflatten(jax.tree.structure(shapes(config)), [leaves[n] for n in in_tree_order(config)])
    assert relative(logits(config, tree), wanted) > 0.02


def in_tree_order(config):
    paths = jax.tree_util.tree_flatten_with_path(shapes(config))[0]
    return [".".join(entry.key for entry in path) for path, _ in paths]


@pytest.mark.parametrize("name", ["gemma3", "phi3_long"])
def test_every_tensor_changes_the_logits(name, expected):
    config, params, _ = expected[name]
    loss = jax.jit(jax.grad(lambda p: jnp.square(forward(config, p, jnp.asarray(IDS))).mean()))
    small = [path for path, g in named(loss(params)) if not float(jnp.abs(g).max()) > 1e-6]
    assert small == []


# --- padding and packing ---

LENGTHS = (13, 27)


@pytest.mark.parametrize("name", FAMILY_CASES)
def test_padding_and_packing_are_the_same(name, expected):
    """Two sequences, one on each side of every window and context: padded, and packed in one row."""
    config, params, whole = expected[name]
    ids = IDS.copy()
    for row, n in zip(ids, LENGTHS, strict=True):
        row[n:] = 0
    padded = logits(config, params, ids, lengths=LENGTHS)
    tokens, options = pack(ids, LENGTHS)
    packed = logits(config, params, tokens, **options)
    for row in packed:
        assert relative(row, np.concatenate([padded[i, :n] for i, n in enumerate(LENGTHS)])) < 1e-4
    if config.rope_scaling is None:  # causal: what follows a token changes nothing
        assert relative(padded[1, : LENGTHS[1]], whole[1, : LENGTHS[1]]) < 1e-4


@pytest.mark.parametrize("name", ["llama_dynamic", "phi3_long"])
def test_padding_does_not_lengthen_a_sequence(name, expected):
    """Scalings that look at the length: alone is as padded, and as many positions more are another thing."""
    config, params, whole = expected[name]
    alone = logits(config, params, IDS[:, :13])
    assert relative(logits(config, params, IDS, lengths=(13, 13))[:, :13], alone) < 1e-4
    assert relative(whole[:, :13], alone) > 0.01


def test_lengths_are_read_off_positions():
    rows = [[0, 1, 2, 0, 1, 1, 1], [0, 1, 2, 3, 4, 5, 6], [0, 0, 1, 2, 0, 1, 0]]
    wanted = [[3, 3, 3, 2, 2, 2, 2], [7] * 7, [3, 3, 3, 3, 2, 2, 1]]
    np.testing.assert_array_equal(sequence_lengths(jnp.asarray(rows)), wanted)
    assert sequence_lengths(jnp.asarray([[5], [0]])).tolist() == [[6], [1]]


# --- generating ---


@pytest.mark.parametrize(
    "name", ["mistral", "qwen3", "qwen2_moe", "gemma3", "smollm3_windows", "phi3_long", "phi3_short", "glm4"]
)
def test_greedy_decoding_equals_whole_passes(name, expected):
    """Windows in the cache, rotations by kind of layer, caps: at every step the argmax of a pass without a cache.

    phi3_long: the second sequence passes the context of 16 tokens on its way, and all its keys are turned anew.
    """
    config, params, _ = expected[name]
    prompts = [IDS[0, :5].tolist(), IDS[1, :12].tolist(), IDS[1, :21].tolist()]
    for prompt, new in zip(prompts, run_engine(config, params, prompts, 9), strict=True):
        ids = np.zeros((2, 40), np.int32)
        ids[:, : len(prompt) + len(new)] = [*prompt, *new]
        lengths = [len(prompt) + len(new)] * 2
        if name == "phi3_long" and len(prompt) == 12:
            steps = [logits(config, params, ids, lengths=[n] * 2)[0, n - 1] for n in range(12, 21)]
            assert relative(logits(config, params, ids, lengths=lengths)[0, 13], steps[2]) > 0.01
        else:
            steps = logits(config, params, ids, lengths=lengths)[0, len(prompt) - 1 : lengths[0] - 1]
        assert list(new) == np.argmax(steps, axis=-1).tolist()


def test_a_sequence_that_turns_is_sampled_as_if_it_had_not_been_put_back(expected):
    """Keys go on with the step they stand at, neighbours do not matter, a limit at the turn ends there."""
    config, params, _ = expected["phi3_long"]
    how = Decoding(greedy=False)

    def run(prompts, new, slots):
        engine = Engine(config, params, slots=slots, how=how, eos=(), temperature=1.0)
        made = [Request(i, tuple(p), np.array([i, 7], np.uint32), new) for i, p in enumerate(prompts)]
        return {c.id: c for c in engine.run(made)}

    prompts = [IDS[i % 2, : 4 + i].tolist() for i in range(12)]
    many, few = run(prompts, 14, 8), run(prompts[:5], 14, 8)  # twelve in eight slots: some wait for others
    assert {i: c.tokens for i, c in few.items()} == {i: many[i].tokens for i in few}
    assert {len(c.tokens) for c in many.values()} == {14}
    short = run(prompts, 13, 8)  # the first prompt, of 4 tokens, turns at 17: with its last
    assert {i: c.tokens for i, c in short.items()} == {i: c.tokens[:13] for i, c in many.items()}
    for i, c in many.items():  # log-probabilities of a whole pass at each step's own length
        for step in (0, 9, 13):
            n = len(prompts[i]) + step
            ids = np.zeros((2, 40), np.int32)
            ids[:, :n] = [*prompts[i], *c.tokens[:step]]
            row = jax.nn.log_softmax(logits(config, params, ids, lengths=[n] * 2)[0, n - 1])
            assert abs(float(row[c.tokens[step]]) - c.logprobs[step]) < 1e-4


# --- config.json ---


@pytest.mark.parametrize("name", FAMILY_CASES)
def test_config_round_trips(name):
    config = config_of(FAMILY_CASES[name])
    written = json.loads(json.dumps(config_to_hf(config)))
    assert written["model_type"] == FAMILY_CASES[name]["model_type"]
    assert config_of(written) == config
    old = {k: v for k, v in written.items() if k != "rope_parameters"}
    new = {k: v for k, v in written.items() if k not in ("rope_theta", "rope_scaling", "rope_local_base_freq")}
    assert config_of(old) == config_of(new) == config


QWEN = {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2}  # fmt: skip
REAL = {
    "qwen2": {
        **QWEN, "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "hidden_act": "silu", "max_position_embeddings": 32768, "max_window_layers": 21,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "transformers_version": "4.43.1", "use_cache": True, "use_sliding_window": False,
    },
    "qwen3": {
        **QWEN, "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128,
        "attention_dropout": 0.0,
        "max_position_embeddings": 40960, "max_window_layers": 28, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": None, "use_sliding_window": False, "tie_word_embeddings": True,
    },
    "mistral": {
        "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
        "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32000,
    },
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 107],
        "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "initializer_range": 0.02,
        "intermediate_size": 9216, "max_position_embeddings": 8192, "num_attention_heads": 8, "num_hidden_layers": 26,
        "num_key_value_heads": 4, "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 256000,
    },
    "gemma3_text": {
        "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attn_logit_softcapping": None,
        "cache_implementation": "hybrid", "final_logit_softcapping": None, "head_dim": 256, "hidden_size": 1152,
        "hidden_activation": "gelu_pytorch_tanh", "intermediate_size": 6912, "max_position_embeddings": 32768,
        "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1, "query_pre_attn_scalar": 256,
        "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
        "sliding_window_pattern": 6, "vocab_size": 262144,
    },
    "smollm3": {
        "architectures": ["SmolLM3ForCausalLM"], "hidden_size": 2048, "intermediate_size": 11008,
        "layer_types": [FULL] * 36,
        "max_position_embeddings": 65536, "max_window_layers": 28, "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16, "num_hidden_layers": 36,
        "num_key_value_heads": 4, "pretraining_tp": 2, "rope_scaling": None, "rope_theta": 5000000.0,
        "sliding_window": None, "use_sliding_window": False, "vocab_size": 128256,
    },
    "phi3": {
        "architectures": ["Phi3ForCausalLM"], "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
        "attention_bias": False, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "hidden_size": 3072, "intermediate_size": 8192,
        "max_position_embeddings": 131072, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-05,
        "rope_scaling": {"type": "su", "long_factor": [1.5] * 48, "short_factor": [1.0] * 48}, "rope_theta": 10000.0,
        "sliding_window": 262144, "vocab_size": 32064,
    },
    "olmo3": {
        "architectures": ["Olmo3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "eos_token_id": 100257, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008,
        "layer_types": [SLIDING, SLIDING, SLIDING, FULL] * 8, "max_position_embeddings": 65536,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "pad_token_id": 100277,
        "rms_norm_eps": 1e-06, "rope_theta": 500000, "sliding_window": 4096, "tie_word_embeddings": False,
        "rope_scaling": {
            "attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0,
            "original_max_position_embeddings": 8192, "rope_type": "yarn",
        },
        "vocab_size": 100278,
    },
    "granite": {
        "architectures": ["GraniteForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "attention_multiplier": 0.0078125, "bos_token_id": 0, "embedding_multiplier": 12.0, "eos_token_id": 0,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 12800,
        "logits_scaling": 16.0, "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32,
        "num_hidden_layers": 40, "num_key_value_heads": 8, "pad_token_id": 0, "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000000.0, "tie_word_embeddings": True,
        "use_cache": True, "vocab_size": 49159,
    },
    "glm4": {
        "architectures": ["Glm4ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "eos_token_id": [151329, 151336, 151338], "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 13696, "max_position_embeddings": 32768, "num_attention_heads": 32,
        "num_hidden_layers": 40, "num_key_value_heads": 2, "pad_token_id": 151329, "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "tie_word_embeddings": False, "vocab_size": 151552,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_published_configs_are_understood(name):
    """What the families' own config.json files say, and what follows from it."""
    config = config_of({"model_type": name, **REAL[name]})
    assert config_of(json.loads(json.dumps(config_to_hf(config)))) == config
    windows = [window for window, _ in config.layers]
    ropes = [rope for _, rope in config.layers]
    assert (windows[:7], ropes[:7]) == {
        "qwen2": ([None] * 7, ["global"] * 7),
        "qwen3": ([None] * 7, ["global"] * 7),
        "mistral": ([4096] * 7, ["global"] * 7),
        "gemma2": ([4096, None, 4096, None, 4096, None, 4096], ["global"] * 7),
        "gemma3_text": ([*[512] * 5, None, 512], [*["local"] * 5, "global", "local"]),
        "smollm3": ([None] * 7, ["global", "global", "global", "none", "global", "global", "global"]),
        "phi3": ([262144] * 7, ["global"] * 7),
        "olmo3": ([4096, 4096, 4096, None, 4096, 4096, 4096], [*["local"] * 3, "global", *["local"] * 3]),
        "granite": ([None] * 7, ["global"] * 7),
        "glm4": ([None] * 7, ["global"] * 7),
    }[name]
    if name == "phi3":
        assert config.rope_scaling is not None
        assert (config.rope_scaling.kind, config.rope_scaling.factor) == ("longrope", 32.0)


REFUSED = {
    "known: llama, mistral, qwen2, qwen3, mixtral, qwen2_moe, qwen3_moe, olmoe, gemma2, gemma3_text, smollm3, phi3": {
        "model_type": "gemma3"
    },
    "'qwen3_5_text' cannot be loaded: .* linear attention .*; known: llama": {
        "model_type": "qwen3_5_text",
        "layer_types": ["linear_attention"] * 2,
    },
    "'gemma4_text' cannot be loaded: its layers differ in head size": {"model_type": "gemma4_text"},
    "'granitemoehybrid' cannot be loaded: Mamba-2": {"model_type": "granitemoehybrid"},
    "rope_theta is 100.0, and releases of transformers differ": {"model_type": "olmo3", "rope_theta": 100.0},
    "clip_qkv = 8": {"model_type": "olmo2", "clip_qkv": 8},
    "layer_rope_theta = .0, 1.": {"model_type": "granite", "layer_rope_theta": [0, 1]},
    "logits_scaling is None; expected a number": {"model_type": "granite", "logits_scaling": None},
    "residual_multiplier is 0.0; it must be positive": {"model_type": "granite", "residual_multiplier": 0},
    "sliding_window = 4 .implemented: None": {"model_type": "glm4", "sliding_window": 4},
    "attn_logit_softcapping = 50.0 .implemented: None": {"model_type": "gemma3_text", "attn_logit_softcapping": 50.0},
    "use_bidirectional_attention = True": {"model_type": "gemma3_text", "use_bidirectional_attention": True},
    "hidden_activation = 'relu'": {"model_type": "gemma2", "hidden_activation": "relu"},
    "no sliding_window is switched on": {"model_type": "gemma2", "sliding_window": None},
    "layer_types ..chunked_attention.. are not known": {
        "model_type": "qwen3",
        "layer_types": ["chunked_attention"] * 2,
    },
    "layer_types has 1 entries for 2 layers": {"model_type": "gemma2", "layer_types": [SLIDING]},
    "layer_types = .'full_attention'": {"model_type": "mistral", "layer_types": [FULL, FULL]},
    "of layers with a window is not": {
        "model_type": "gemma3_text",
        "rope_parameters": {SLIDING: {"rope_type": "linear", "factor": 2.0}, FULL: {"rope_type": "default"}},
    },
    "this family has one": {"model_type": "qwen3", "rope_parameters": {FULL: {"rope_theta": 1.0}}},
    "partial_rotary_factor = 0.5": {"model_type": "llama", "partial_rotary_factor": 0.5},
    "short_factor has 3 entries, one for each of 4": {
        "model_type": "phi3",
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 3, "long_factor": [1.0] * 4},
    },
    "takes .'factor'. and may take .*'truncate'.*found .'beta', 'factor'": {
        "model_type": "llama",
        "rope_scaling": {"type": "yarn", "factor": 2.0, "beta": 1},
    },
    "resid_pdrop = 0.1": {"model_type": "phi3", "resid_pdrop": 0.1},
    "sliding_window is 'wide'": {"model_type": "mistral", "sliding_window": "wide"},
    "sliding_window is 0; it must be positive": {"model_type": "mistral", "sliding_window": 0},
    "no_rope_layers is .2, 3.": {"model_type": "smollm3", "no_rope_layers": [2, 3]},
    "layer_types has 3 entries for 2 layers": {"model_type": "smollm3", "no_rope_layers": [1, 0, 1]},
    "query_pre_attn_scalar is None": {"model_type": "gemma2", "query_pre_attn_scalar": None},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_a_family_cannot_say_is_refused(message):
    with pytest.raises(UserError, match=message) as error:
        config_of({**SIZES, **REFUSED[message]})
    assert "\n" not in str(error.value)


def test_a_config_without_words_in_its_family_is_not_written():
    config = dataclasses.replace(config_of(LLAMA), qk_norm=True, sliding_window=7)
    with pytest.raises(UserError, match="family 'llama' has no sliding_window=7, qk_norm=True"):
        config_to_hf(config)
    with pytest.raises(UserError, match="family 'nobody' is not known"):
        config_to_hf(dataclasses.replace(config, family="nobody"))
    with pytest.raises(UserError, match="family 'llama' has no o_bias=False"):
        config_to_hf(dataclasses.replace(config_of(LLAMA), qkv_bias=True))


def test_a_random_model_has_what_its_family_fixes():
    sizes = {k: v for k, v in SIZES.items() if not k.endswith("token_id")} | {"head_dim": 8, "family": "qwen3"}
    assert random_config(sizes).qk_norm
    with pytest.raises(UserError, match="family 'qwen3' has no fused_mlp"):
        random_config({**sizes, "fused_mlp": True})


def test_gemma_starts_with_norms_of_one():
    config = config_of(FAMILY_CASES["gemma2"])
    params = init(config, jax.random.key(0))
    assert not params["model"]["norm"]["weight"].any()
    assert init(config_of(LLAMA), jax.random.key(0))["model"]["norm"]["weight"].all()


# --- weights ---


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILY_CASES)
def test_folders_round_trip_bit_for_bit(name, dtype, tmp_path: pathlib.Path):
    config = config_of(FAMILY_CASES[name])
    wanted = state_of(config, {n: tensor(n, leaf.shape).astype(dtype) for n, leaf in named(shapes(config))})
    found, params = load_hf(write_folder(tmp_path / "theirs", FAMILY_CASES[name], state=wanted))
    assert found == config
    save_hf(tmp_path / "ours", config, params, dtype=dtype)
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert {n: (a.dtype, a.tobytes()) for n, a in written.items()} == {
        n: (a.dtype, a.tobytes()) for n, a in wanted.items()
    }
    assert load_hf(tmp_path / "ours")[0] == config
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"] == [
        FAMILIES[config.family].architecture
    ]
