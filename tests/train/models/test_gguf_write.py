"""GGUF files that are written: read back by our reader, by the gguf package and by transformers on torch."""

import json
import pathlib

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from helpers.goldens.family_cases import FAMILY_CASES, FULL, GRANITE, SIZES, SLIDING
from helpers.tiny_families import weights
from helpers.tiny_models import config_of, logits, relative, tokens
from helpers.tiny_tokenizers import CHATML, TEXTS, byte_level, pieces
from tokenizers import Regex, models, normalizers, pre_tokenizers

from jaxmerge.files.checkpoints import gguf_config
from jaxmerge.files.checkpoints.gguf_tokenizer import PRE_TOKENIZERS, halves
from jaxmerge.files.checkpoints.open import open_source
from train.log import UserError
from train.models.characters import write_tokenizer
from train.models.decoder import shapes
from train.models.families import FAMILIES
from train.models.gguf_write import OF_FAMILY, model_metadata, save_gguf
from train.models.hf import named
from train.models.hf_config import config_from_hf, differences
from train.models.open import load_model
from train.models.stored import parts
from train.models.tokenizer import Tokenizer

PADDED = 3  # rows of the embedding that are no token's
SMALL = {
    **SIZES, "vocab_size": 400 + PADDED, "hidden_size": 64, "intermediate_size": 96,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.3, 2.0, 2.5], "long_factor": [1.5, 3.0, 9.0, 9.5]}
GEMMA = {"head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 8}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2}
CASES = {
    "llama": {"model_type": "llama", **SMALL, "attention_bias": True, "mlp_bias": True},
    "llama3": {
        "model_type": "llama", **SMALL, "rope_theta": 500000.0, "tie_word_embeddings": True,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, **LLAMA3},
    },
    "mistral": {"model_type": "mistral", **SMALL, "sliding_window": None, "head_dim": 12},
    "qwen2": {"model_type": "qwen2", **SMALL, "tie_word_embeddings": True, "rope_theta": 1e6},
    "qwen3": {
        "model_type": "qwen3", **SMALL, "head_dim": 128,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    },
    "gemma2": {"model_type": "gemma2", **SMALL, **GEMMA, "num_hidden_layers": 3},
    "gemma3": {
        "model_type": "gemma3_text", **SMALL, **GEMMA, "num_hidden_layers": 7,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "smollm3": {"model_type": "smollm3", **SMALL, "num_hidden_layers": 5},
    "phi3": {"model_type": "phi3", **SMALL, "sliding_window": 8},
    "phi3_long": {
        "model_type": "phi3", **SMALL, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 16,
        "rope_scaling": LONGROPE,
    },
    "ministral": {"model_type": "ministral", **SMALL, "sliding_window": None},
    "olmo2": {"model_type": "olmo2", **SMALL, "rope_theta": 500000.0},
    "olmo3": {
        "model_type": "olmo3", **SMALL, "num_hidden_layers": 5, "sliding_window": 8, "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192,
            "attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0,
        },
    },
    "granite": {"model_type": "granite", **SMALL, **GRANITE, "attention_bias": True, "tie_word_embeddings": True},
    "glm": {"model_type": "glm", **SMALL, "head_dim": 16},
    "mixtral": {"model_type": "mixtral", **SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "model_type": "qwen2_moe", **SMALL, **EXPERTS, "moe_intermediate_size": 32, "router_aux_loss_coef": 0.01,
        "shared_expert_intermediate_size": 64,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe", **SMALL, **EXPERTS, "moe_intermediate_size": 32, "norm_topk_prob": True,
        "head_dim": 16,
    },
    "olmoe": {"model_type": "olmoe", **SMALL, **EXPERTS},
    "glm4": {"model_type": "glm4", **SMALL, "attention_bias": False, "head_dim": 16, "partial_rotary_factor": 0.25},
}  # fmt: skip
NAMES = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def fitted(config, backend=None, **more) -> Tokenizer:
    tokenizer = Tokenizer(backend or byte_level(), NAMES, **{"chat_template": CHATML, **more})
    return tokenizer.fitted(vocab_size=config.vocab_size, eos_ids=config.eos_token_id)


def model(case, dtype=jnp.bfloat16):
    """Weights that `dtype` holds exactly, so that writing them in it loses nothing."""
    config = config_of(CASES[case])
    return config, jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), weights(config))


def write(tmp_path, case, tokenizer=None, *, dtype=jnp.bfloat16, type="bf16", **more):
    config, params = model(case, dtype)
    return save_gguf(tmp_path / case, config, params, tokenizer or fitted(config), type=type, **more)


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_the_same_model(case, tmp_path):
    config, params = model(case)
    found = load_model(write(tmp_path, case))
    # What the file does not say: how it is the same computation, and a coefficient of training.
    llama = {"model_type": "llama"}
    unsaid = {"mistral": llama, "ministral": llama, "qwen2_moe": {"router_aux_loss_coef": 0.001}}.get(case, {})
    assert differences(config_of({**CASES[case], **unsaid}), found.config) == []
    assert found.config.family == {**CASES[case], **unsaid}["model_type"]
    for (name, a), (other, b) in zip(named(params), named(found.params), strict=True):
        assert name == other
        # 1 + w is what the file holds of Gemma's norms.
        np.testing.assert_allclose(b, a, rtol=0, atol=6e-8 if config.unit_offset_norms and a.ndim == 1 else 0)
    assert (
        relative(logits(found.config, found.params), logits(config, params)) < 1e-4 * config.unit_offset_norms + 1e-12
    )
    # The folder is a checkpoint too: of merges, and of every verb.
    assert load_model(tmp_path / case).config == found.config
    assert set(open_source(str(tmp_path / case)).tensors) == set(parts(config, dict(named(params))))


def test_every_family_is_written_and_read():
    assert {case["model_type"] for case in CASES.values()} == set(FAMILIES) == set(OF_FAMILY)


def test_experts_are_one_tensor_and_gates_are_never_rounded(tmp_path):
    config, _ = model("qwen2_moe")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(write(tmp_path, "qwen2_moe", type="q8_0")).tensors}
    kinds = {name.removeprefix("blk.1.ffn_"): (list(t.shape), t.tensor_type.name) for name, t in tensors.items()}
    wide, narrow, shared = config.hidden_size, 32, 64
    assert kinds["gate_exps.weight"] == kinds["up_exps.weight"] == ([wide, narrow, 5], "Q8_0")
    assert kinds["down_exps.weight"] == ([narrow, wide, 5], "Q8_0")
    assert kinds["down_shexp.weight"] == ([shared, wide], "Q8_0")
    assert kinds["gate_inp.weight"] == ([wide, 5], "F32")
    assert kinds["gate_inp_shexp.weight"] == ([wide], "F32")


def test_experts_of_old_files_have_a_tensor_each():
    name = gguf_config.ARCHITECTURES["llama"].hf_name
    assert name("blk.1.ffn_down.3.weight") == "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    assert name("blk.1.ffn_up_exps.weight") == "model.layers.1.block_sparse_moe.experts.{}.w3.weight"
    dense = gguf_config.ARCHITECTURES["qwen2"].hf_name
    assert dense("blk.1.ffn_down.3.weight") == "blk.1.ffn_down.3.weight"  # unknown, and refused by name later


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("qwen3_moe", {"expert_weights_norm": False}, "a.gguf: expert_weights_norm is False; implemented: True"),
        ("olmoe", {"expert_gating_func": 2}, "a.gguf: expert_gating_func is 2; implemented: 1"),
        ("qwen2_moe", {"expert_weights_scale": 2.5}, "a.gguf: expert_weights_scale is 2.5; implemented: 1.0"),
        ("mixtral", {"expert_used_count": None}, "expert_used_count missing from the metadata of a mixture"),
    ],
)
def test_other_weights_of_experts_are_refused(case, changes, message):
    config = config_of(CASES[case])
    written, _ = model_metadata(config, pathlib.Path("a.gguf"))
    arch = OF_FAMILY[CASES[case]["model_type"]]
    metadata = {"general.architecture": arch, **written, **{f"{arch}.{key}": value for key, value in changes.items()}}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        gguf_config.config_of(metadata, {name for name, _ in named(shapes(config))}, {}, source="a.gguf")


def test_keys_that_only_llama_cpps_converter_writes_are_read():
    """Of OLMo 3: the θ of its windows, and YaRN's factor, which llama.cpp computes anew whatever the file says."""
    config = config_of(CASES["olmo3"])
    metadata, _ = model_metadata(config, pathlib.Path("a.gguf"))
    metadata |= {"general.architecture": "olmo2", "olmo2.rope.freq_base_swa": 500000.0}
    metadata |= {"olmo2.rope.scaling.yarn_attn_factor": 1.2079441547393799, "olmo2.rope.scaling.yarn_beta_fast": 32.0}
    names = {name for name, _ in named(shapes(config))}
    found = config_from_hf(gguf_config.config_of(metadata, names, {}, source="a.gguf"), source="a.gguf")
    assert {*differences(config, found)} <= {"bos_token_id", "eos_token_id", "pad_token_id"}
    metadata["olmo2.rope.scaling.yarn_attn_factor"] = 1.5
    with pytest.raises(ValueError, match=r"a.gguf: olmo2.rope.scaling.yarn_attn_factor is 1.5; implemented: 1.20794"):
        gguf_config.config_of(metadata, names, {}, source="a.gguf")


@pytest.mark.parametrize("type", ["f32", "f16", "bf16", "q8_0"])
def test_types_are_those_of_the_format(type, tmp_path):
    dtype = {"f32": jnp.float32, "f16": jnp.float16}.get(type, jnp.bfloat16)
    _, params = model("llama3", dtype)
    reader = gguf.GGUFReader(write(tmp_path, "llama3", dtype=dtype, type=type))
    stored = {tensor.name: tensor for tensor in reader.tensors}
    wanted = dict(named(params))
    assert reader.get_field("general.file_type").contents() == {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}[type]
    assert {stored[n].tensor_type.name for n in ("blk.1.attn_norm.weight", "rope_freqs.weight")} == {"F32"}
    for ours, its in [("mlp.down_proj", "ffn_down"), ("mlp.gate_proj", "ffn_gate"), ("self_attn.v_proj", "attn_v")]:
        tensor, weight = stored[f"blk.1.{its}.weight"], np.asarray(wanted[f"model.layers.1.{ours}.weight"])
        assert tensor.tensor_type.name == type.upper()
        assert list(tensor.shape) == list(weight.shape[::-1])
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        # A block's largest weight is 127 steps, rounding is half of one, and the step itself is float16.
        blocks = np.abs(weight).reshape(weight.shape[0], -1, 32).max(-1).repeat(32, axis=-1)
        assert (np.abs(found - weight) <= (blocks * (0.5 / 127 + 2**-11) if type == "q8_0" else 0)).all()
    assert "output.weight" not in stored  # a tied head


def test_rows_that_blocks_do_not_divide_are_f16(tmp_path):
    config = config_of({**CASES["llama"], "intermediate_size": 40})
    file = save_gguf(tmp_path / "a", config, weights(config), fitted(config), type="q8_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"
    load_model(file)


def test_a_weight_beyond_f16_is_named_and_nothing_is_left(tmp_path):
    config, params = model("llama")
    params["model"]["layers"]["1"]["mlp"]["up_proj"]["weight"] = jnp.full((96, 64), 70000.0)
    with pytest.raises(UserError, match=r"a-F16.gguf: model.layers.1.mlp.up_proj.weight holds 7e\+04, more than f16"):
        save_gguf(tmp_path / "a", config, params, fitted(config), type="f16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("mistral", {"sliding_window": 8}, "'llama' has no words for sliding_window=8"),
        ("gemma2", {"attn_logit_softcapping": None}, "'gemma2' has no words for attn_logit_softcapping=None"),
        ("gemma2", {"query_pre_attn_scalar": 20}, "no words for query_pre_attn_scalar=20"),
        ("gemma3", {"final_logit_softcapping": 3.0}, "no words for final_logit_softcapping=3.0"),
        ("gemma3", {"sliding_window_pattern": 3}, "no words for sliding_window=8"),
        ("gemma3", {"rope_local_base_freq": 50.0}, "rope_local_base_freq is 50.0, and llama.cpp takes 10000.0"),
        ("smollm3", {"no_rope_layer_interval": 2}, "has no words for"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 3.0}}, "GGUF has no rope scaling 'dynamic'"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, **LLAMA3, "low_freq_factor": 2.0}},
         "holds no Llama 3 scaling"),
        ("qwen3", {"rope_scaling": {**FAMILY_CASES["llama_yarn"]["rope_scaling"]}}, "no words for rope_scaling="),
        ("ministral", {"sliding_window": 8}, "'llama' has no words for sliding_window=8"),
        ("olmo2", {"attention_bias": True}, "'olmo2' has no words for qkv_bias=True, o_bias=True"),
        ("olmo2", {"tie_word_embeddings": True}, "'olmo2' has no words for tie_word_embeddings=True"),
        ("olmo2", {"head_dim": 12}, "'olmo2' has no words for head_dim=12"),
        ("glm", {"head_dim": 12}, "'chatglm' has no words for head_dim=12"),
        ("olmo3", {"layer_types": [FULL] + [SLIDING] * 4}, "implemented: windows in all but every fourth"),
        ("olmo3", {"rope_theta": None, "rope_scaling": None, "rope_parameters": {
            FULL: {"rope_theta": 100.0}, SLIDING: {"rope_theta": 50.0}}}, "no words for local_rope_theta=50.0"),
        ("glm4", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, **LLAMA3}}, "'llama3' is not known of glm4"),
        ("qwen2_moe", {"mlp_only_layers": [1]}, "'qwen2moe' has no words for experts="),
        ("qwen3_moe", {"norm_topk_prob": False}, "'qwen3moe' has no words for experts="),
        ("mixtral", {"sliding_window": 8}, "'llama' has no words for sliding_window=8"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "no words for sliding"),
    ],
)  # fmt: skip
def test_what_the_format_has_no_words_for_is_refused(case, changes, message, tmp_path):
    config = config_of({**CASES[case], **changes})
    with pytest.raises(UserError, match=message) as error:
        save_gguf(tmp_path / "a", config, weights(config), fitted(config))
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


# --- tokenizers ---


def cut_by(name) -> tokenizers.Tokenizer:
    """The small byte-level BPE, its words cut as the named pre-tokenizer does, spelt by the library itself."""
    backend = byte_level()
    if name == "gpt-2":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name in ("llama-bpe", "qwen2"):
        regex = PRE_TOKENIZERS[name].steps[0]["pattern"]["Regex"]
        steps = [pre_tokenizers.Split(Regex(regex), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if name == "qwen2":
        backend.normalizer = normalizers.NFC()
    if name == "llama-bpe":
        backend.model = models.BPE(backend.get_vocab(with_added_tokens=False), merges_of(backend), ignore_merges=True)
    return backend


def merges_of(backend):
    return [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_a_pre_tokenizer_is_named_by_what_it_does(name, tmp_path):
    config, _ = model("llama")
    tokenizer = fitted(config, cut_by(name))
    found = load_model(write(tmp_path, "llama", tokenizer)).tokenizer
    assert gguf.GGUFReader(tmp_path / "llama/llama-BF16.gguf").get_field("tokenizer.ggml.pre").contents() == name
    for text in TEXTS:
        assert found.encode(text, special=True) == tokenizer.encode(text, special=True)
        assert found.decode(found.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert (found.special, found.chat_template) == (tokenizer.special, CHATML)
    assert found.vocab_size == 400  # rows that only pad the embedding are no tokens


@pytest.mark.parametrize("prefix", [True, False])
def test_pieces_are_told_by_scores(prefix, tmp_path):
    config = config_of({**CASES["gemma2"], "eos_token_id": [2, 300], "vocab_size": 520})
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = Tokenizer(pieces(prefix=prefix), names).fitted(vocab_size=520, eos_ids=(300, 2))
    file = save_gguf(tmp_path / "a", config, weights(config), tokenizer, type="bf16")
    found, metadata = load_model(file).tokenizer, gguf.GGUFReader(file)
    for text in [*TEXTS, "A: yes</s> no", "<s>Paris"]:
        assert found.encode(text, special=True) == tokenizer.encode(text, special=True), text
        assert found.decode(found.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert found.eos_ids == (2, 300)  # the tokenizer's own first, the other as the end of a turn
    values = {key: metadata.get_field(f"tokenizer.ggml.{key}").contents() for key in
              ("model", "add_bos_token", "add_space_prefix", "token_type", "eot_token_id")}  # fmt: skip
    assert values.pop("token_type")[:5] == [2, 3, 3, 6, 6]
    assert values == {"model": "llama", "add_bos_token": True, "add_space_prefix": prefix, "eot_token_id": 300}


def odd(change) -> tokenizers.Tokenizer:
    backend = byte_level()
    change(backend)
    return backend


def strange_words(backend):
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(False)])


def test_a_tokenizer_that_cannot_be_written_is_refused_by_what_it_is(tmp_path):
    config = config_of({**CASES["llama"], "vocab_size": 520})
    params = weights(config)
    fewer = json.loads(pieces().to_str())
    fewer["model"]["merges"].pop()
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    write_tokenizer(tmp_path / "characters")
    refused = {
        "none of those known here": fitted(config, odd(strange_words)),
        "do not follow from one score for each": Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(fewer)), names),
        "its model is WordLevel": Tokenizer.from_folder(tmp_path / "characters"),
        "neither byte-level words nor bytes": fitted(config, odd(lambda b: setattr(b, "pre_tokenizer", None))),
    }
    for message, tokenizer in refused.items():
        with pytest.raises(UserError, match=f"the tokenizer cannot be written as GGUF: .*{message}") as error:
            save_gguf(tmp_path / "a", config, params, tokenizer)
        assert "convert_hf_to_gguf.py" in str(error.value)
    # The way out: llama.cpp's own name, which is taken as it is.
    file = save_gguf(tmp_path / "a", config, params, refused["none of those known here"], pre="viking")
    assert gguf.GGUFReader(file).get_field("tokenizer.ggml.pre").contents() == "viking"


def test_halves_are_of_known_tokens():
    assert halves("abc", {"a": 0, "bc": 2, "ab": 1, "c": 3, "abc": 4}) == [["a", "bc"], ["ab", "c"]]


# --- transformers ---


@pytest.mark.torch
@pytest.mark.parametrize("case", ["llama3", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"])
def test_transformers_reads_the_same_weights(case, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    file = write(tmp_path, case)
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    config, params = model(case)
    for name, leaf in named(params):
        np.testing.assert_allclose(
            state[name], leaf, rtol=0, atol=6e-8 if config.unit_offset_norms else 0, err_msg=name
        )


@pytest.mark.torch
@pytest.mark.parametrize(
    ("case", "widths"),
    [
        ("qwen2_moe", {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632}),
        ("qwen3_moe", {"moe_intermediate_size": 768}),
    ],
)
def test_transformers_computes_the_same_with_experts(case, widths, tmp_path):
    """The widths are its defaults: transformers 5.23 does not read them from a file (findings/)."""
    import torch
    from transformers import AutoModelForCausalLM

    config = config_of({**CASES[case], **widths})
    params = weights(config)
    file = save_gguf(tmp_path / case, config, params, fitted(config), type="f32")
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = theirs(torch.asarray(tokens(config.vocab_size))).logits.numpy()
    assert relative(logits(config, params), wanted) < 1e-5
