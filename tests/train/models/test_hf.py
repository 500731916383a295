"""Hugging Face folders: parity with transformers, bit-exact round trips, and what is refused."""

import dataclasses
import functools
import json
import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers.goldens import GOLDENS
from helpers.goldens.cases import BASE, CASES, LLAMA3, tensor, tokens
from helpers.tiny_models import config_of, logits, relative, write_folder
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from train.log import UserError
from train.models.config import RopeScaling
from train.models.decoder import forward, init, shapes
from train.models.hf import load_hf, named, place, save_hf
from train.models.hf_config import config_to_hf
from train.runtime.mesh import make_mesh, sharding_of
from train.runtime.settings import Mesh

# --- parity ---


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_golden_ones_of_transformers(name, tmp_path):
    config, params = load_hf(write_folder(tmp_path, CASES[name]))
    assert relative(logits(config, params), np.load(GOLDENS / "logits.npz")[name]) < 1e-4


OFF = {
    "theta": {"rope_theta": 10000.0},
    "eps": {"rms_norm_eps": 1e-5},
    "linear": {"rope_scaling": None},
    "llama3": {"rope_scaling": None},
}


@pytest.mark.parametrize("name", OFF)
def test_a_feature_switched_off_changes_the_logits(name, tmp_path):
    config, params = load_hf(write_folder(tmp_path, CASES[name]))
    assert relative(logits(dataclasses.replace(config, **OFF[name]), params), logits(config, params)) > 0.02


@pytest.mark.parametrize("field", ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"])
def test_every_number_of_llama3_scaling_matters(field, tmp_path):
    config, params = load_hf(write_folder(tmp_path, CASES["llama3"]))
    other = dataclasses.replace(config.rope_scaling, **{field: 2 * getattr(config.rope_scaling, field)})
    assert relative(logits(dataclasses.replace(config, rope_scaling=other), params), logits(config, params)) > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_changes_the_logits(name, tmp_path):
    """Biases, norms, each projection: a tensor that never bites would hide a wrong one."""
    config, params = load_hf(write_folder(tmp_path, CASES[name]))
    leaves, tree = jax.tree.flatten(params)

    def loss(params):
        return jnp.square(forward(config, params, jnp.asarray(tokens(config.vocab_size)))).mean()

    gradient = jax.jit(jax.grad(loss))(params)
    # Softmax does not see what is added to all keys alike, rotation aside: the k bias bites least.
    assert {path: float(jnp.abs(g).max()) > 1e-6 for path, g in named(gradient)} == dict.fromkeys(
        dict(named(params)), True
    )
    assert len(leaves) == len(jax.tree.leaves(gradient))
    assert jax.tree.structure(gradient) == tree


def test_grouped_heads_share_as_transformers_does(tmp_path):
    """Query heads 0, 1 use key head 0: swapping the key/value heads changes the logits."""
    config, params = load_hf(write_folder(tmp_path, CASES["grouped"]))
    swapped = jax.tree.map(lambda x: x, params)
    attention = swapped["model"]["layers"]["0"]["self_attn"]
    for kind in ("k_proj", "v_proj"):
        attention[kind] = {"weight": jnp.roll(attention[kind]["weight"], config.head_dim, axis=0)}
    assert relative(logits(config, swapped), logits(config, params)) > 0.02


# --- config.json ---


@pytest.mark.parametrize("name", CASES)
def test_config_round_trips(name):
    config = config_of(CASES[name])
    assert config_of(config_to_hf(config)) == config
    old = {k: v for k, v in config_to_hf(config).items() if k != "rope_parameters"}
    new = {k: v for k, v in config_to_hf(config).items() if k not in ("rope_theta", "rope_scaling")}
    assert config_of(old) == config_of(new) == config


def test_old_and_new_rope_styles_agree():
    new = config_of({**BASE, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}})
    assert new == config_of({**BASE, "rope_theta": 5e5, "rope_scaling": LLAMA3})
    assert new.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 32)


@pytest.mark.parametrize(("value", "ids"), [(None, ()), (2, (2,)), ([2, 5], (2, 5))], ids=["none", "one", "several"])
def test_eos_ids_round_trip(value, ids):
    config = config_of({**BASE, "eos_token_id": value})
    assert config.eos_token_id == ids
    assert config_to_hf(config)["eos_token_id"] == value


REFUSED = {
    "model_type 'qwen9' is not known; known: llama, mistral, qwen2": {"model_type": "qwen9"},
    "model_type None is not known": {"model_type": None},
    "logit_softcap = 30": {"logit_softcap": 30},
    "hidden_act = 'gelu'": {"hidden_act": "gelu"},
    "attention_dropout = 0.1": {"attention_dropout": 0.1},
    "pretraining_tp = 2": {"pretraining_tp": 2},
    "quantization_config": {"quantization_config": {"bits": 4}},
    "sliding_window = 4096": {"sliding_window": 4096},
    "layer_types": {"layer_types": ["full_attention", "sliding_attention"]},
    "rope scaling 'ntk' is not known; known: default, linear, dynamic, llama3, yarn, longrope": {
        "rope_scaling": {"type": "ntk"}
    },
    "takes .'factor'., found ..": {"rope_scaling": {"type": "linear"}},
    "found .'beta', 'factor'": {"rope_scaling": {"type": "linear", "factor": 2.0, "beta": 1}},
    "differ; keep one": {"rope_theta": 1.0, "rope_parameters": {"rope_type": "default", "rope_theta": 2.0}},
    "hidden_size missing": {"hidden_size": None},
    "vocab_size is 61.5; expected a whole number": {"vocab_size": 61.5},
    "cannot share": {"num_key_value_heads": 3},
    "architectures = .'LlamaForSequenceClassification'": {"architectures": ["LlamaForSequenceClassification"]},
    "eos_token_id": {"eos_token_id": "</s>"},
    "rms_norm_eps": {"rms_norm_eps": None},
    "rope_parameters is 3": {"rope_parameters": 3},
    "head_dim is 0": {"hidden_size": 2},
    "rope_theta is -1.0; expected a positive": {"rope_theta": -1.0},
    "takes numbers, found {'factor': 'two'}": {"rope_scaling": {"type": "linear", "factor": "two"}},
    "factor is -1.0; it must be positive": {"rope_scaling": {"type": "linear", "factor": -1.0}},
    "attention_bias is 'no'": {"attention_bias": "no"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_understood_is_refused_by_name(message):
    with pytest.raises(UserError, match=message) as error:
        config_of({**BASE, **REFUSED[message]})
    assert "config.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_mistral_without_a_window_is_a_llama(tmp_path):
    mistral = config_of({**BASE, "model_type": "mistral", "sliding_window": None})
    assert dataclasses.replace(mistral, family="llama") == config_of(BASE)


def test_real_world_attributes_are_known():
    """What SmolLM2, Llama 3 and transformers 4 and 5 write beside the sizes."""
    extra = {
        "_name_or_path": "x", "architectures": ["LlamaForCausalLM"], "attention_dropout": 0.0, "dtype": "bfloat16",
        "hidden_act": "silu", "is_llama_config": True, "pretraining_tp": 1, "rope_interleaved": False,
        "rope_scaling": None, "rope_theta": 10000.0, "torch_dtype": "bfloat16", "transformers_version": "4.42.3",
        "transformers.js_config": {"kv_cache_dtype": {}}, "use_cache": True, "output_hidden_states": False,
        "id2label": {"0": "LABEL_0"}, "is_encoder_decoder": False, "pad_token_id": -1,
    }  # fmt: skip
    assert config_of({**BASE, **extra}) == config_of(BASE)


# --- weights ---


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("max_shard_bytes", [2**30, 9000], ids=["single", "sharded"])
@pytest.mark.parametrize("name", ["tied", "attention_bias"])
def test_folders_round_trip_bit_for_bit(name, dtype, max_shard_bytes, tmp_path):
    wanted = {n: tensor(n, leaf.shape).astype(dtype) for n, leaf in named(shapes(config_of(CASES[name])))}
    config, params = load_hf(write_folder(tmp_path / "theirs", CASES[name], state=wanted))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    save_hf(tmp_path / "ours", config, params, dtype=dtype, max_shard_bytes=max_shard_bytes)
    files = sorted((tmp_path / "ours").glob("*.safetensors"))
    assert (len(files) > 1) == (max_shard_bytes == 9000)
    assert all(file.stat().st_size < 9000 + 4000 for file in files if len(files) > 1)
    written = {key: array for file in files for key, array in load_file(file).items()}
    assert written.keys() == wanted.keys()  # a tied head is not written twice
    for key in wanted:
        assert written[key].dtype == dtype
        assert written[key].tobytes() == wanted[key].tobytes(), key
    again, params2 = load_hf(tmp_path / "ours", dtype=dtype)
    assert again == config
    assert jax.tree.all(jax.tree.map(lambda a, b: (a.astype(dtype) == b).all(), params, params2))
    assert {leaf.dtype for leaf in jax.tree.leaves(params2)} == {jnp.dtype(dtype)}
    assert not [p.name for p in tmp_path.iterdir() if p.name not in ("ours", "theirs")]


def test_exported_files_can_be_read_by_others(tmp_path):
    config = config_of(BASE)
    save_hf(tmp_path / "out", config, init(config, jax.random.key(0)))
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1


def test_tensors_go_straight_to_their_sharding(tmp_path):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = NamedSharding(mesh, P("x")), NamedSharding(mesh, P())
    folder = write_folder(tmp_path, {**BASE, "vocab_size": 64})
    _, plain = load_hf(folder)
    paths = []

    def where(path, _):
        paths.append(path)
        return rows if path.endswith("embed_tokens/weight") else whole

    _, params = load_hf(folder, sharding=where)
    assert "model/layers/1/self_attn/q_proj/weight" in paths
    assert params["model"]["embed_tokens"]["weight"].sharding == rows
    assert params["model"]["norm"]["weight"].sharding == whole
    tree = jax.tree.map(lambda x: x.sharding, params)
    for sharding in (tree, whole):
        _, again = load_hf(folder, sharding=sharding)
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), plain, again))
    assert jax.tree.map(lambda x: x.sharding, load_hf(folder, sharding=tree)[1]) == tree


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_host_memory_holds_one_tensor_at_a_time(dtype):
    """Read from a file of the other dtype onto 8 devices: when the next is read, the one before is gone."""
    config = config_of({**BASE, "vocab_size": 64, "intermediate_size": 64})
    mesh = make_mesh(Mesh(data=1, fsdp=4, tensor=2))
    alive, most = [], []
    stored = np.float32 if dtype == "bfloat16" else ml_dtypes.bfloat16
    found = {name: leaf.shape for name, leaf in named(shapes(config))}

    def read(name):
        alive[:] = [ref for ref in alive if ref() is not None]
        most.append(len(alive))
        array = tensor(name, found[name]).astype(stored)
        alive.append(weakref.ref(array))
        return array

    where = functools.partial(sharding_of, mesh)
    params = place(config, found, read, source="", sharding=where, dtype=jnp.dtype(dtype))
    assert most == [0] * len(found)
    for name, leaf in named(params):
        assert leaf.dtype == dtype
        np.testing.assert_array_equal(np.asarray(leaf), tensor(name, leaf.shape).astype(stored).astype(dtype))
    matrix = params["model"]["layers"]["0"]["mlp"]["up_proj"]["weight"]
    assert {shard.data.shape for shard in matrix.addressable_shards} == {(32, 8)}


def test_generation_config_has_the_last_word_on_eos(tmp_path):
    folder = write_folder(tmp_path, {**BASE, "eos_token_id": 2})
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 9]}')
    assert load_hf(folder)[0].eos_token_id == (2, 9)


def test_a_stored_tied_head_is_accepted_if_identical(tmp_path):
    tied = CASES["tied"]
    embedding = tensor("model.embed_tokens.weight", (61, 32))
    _, params = load_hf(write_folder(tmp_path / "same", tied, **{"lm_head.weight": embedding}))
    assert "lm_head" not in params
    with pytest.raises(UserError, match=r"tie_word_embeddings, but lm_head\.weight differs"):
        load_hf(write_folder(tmp_path / "other", tied, **{"lm_head.weight": embedding + 1}))


def test_old_rotary_buffers_are_passed_over(tmp_path):
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    load_hf(write_folder(tmp_path, BASE, **buffer))


Q = "model.layers.1.self_attn.q_proj.weight"
NAN = np.full((32, 32), np.nan, np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({Q: None}, f"missing: {Q}"),
        ({"model.layers.2.extra": np.ones(3, np.float32)}, "unknown: model.layers.2.extra"),
        ({Q: np.ones((32, 31), np.float32)}, rf"mis-shaped: {Q} \[32, 31\] \(the config says \[32, 32\]\)"),
        ({Q: np.ones((32, 32), np.int8)}, f"{Q} is stored as int8"),
        ({Q: NAN}, f"NaN or infinity in {Q}"),
        ({Q: np.full((32, 32), np.inf, np.float32)}, f"NaN or infinity in {Q}"),
    ],
    ids=["missing", "unknown", "mis-shaped", "integer", "nan", "infinity"],
)
def test_wrong_tensors_are_refused_by_name(changes, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        load_hf(write_folder(tmp_path, BASE, **changes))
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("layers", [3, 10_001, 2**40, 1e400])
def test_layers_that_no_file_holds_are_refused_before_anything_is_built(layers, tmp_path):
    """Three layers of nine tensors each are read of a file that has two; ten thousand would take minutes to list."""
    folder = write_folder(tmp_path, BASE)
    config = json.loads((folder / "config.json").read_text())
    few = dict(list(load_file(folder / "model.safetensors").items())[:2])
    save_file(few, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    with pytest.raises(UserError, match="num_hidden_layers"):
        load_hf(folder)


def test_the_finite_check_can_be_left_out(tmp_path):
    _, params = load_hf(write_folder(tmp_path, BASE, **{Q: NAN}), check_finite=False)
    assert jnp.isnan(params["model"]["layers"]["1"]["self_attn"]["q_proj"]["weight"]).all()


def test_damaged_folders_are_refused_by_file(tmp_path):
    def refused(folder, message):
        with pytest.raises(UserError, match=message) as error:
            load_hf(folder)
        assert "\n" not in str(error.value)

    refused(tmp_path / "nowhere", "nowhere/config.json: no such file")
    folder = write_folder(tmp_path / "a", BASE)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        refused(folder, "a/model.safetensors (is truncated|is no whole safetensors file)")
    file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    refused(folder, "found pytorch_model.bin; save it as safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text("{}")
    refused(folder, "has no weight_map")
    index.write_text('{"weight_map": {"x": "../b.safetensors"}}')
    refused(folder, "b.safetensors.*, wanted the name of a file in this folder")
    index.write_text('{"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}')
    refused(folder, "00001-of-00002.safetensors is missing")
    file.write_bytes(whole)
    file.rename(folder / "model-00001-of-00002.safetensors")
    refused(folder, "the files hold 1 tensors")  # what the index does not name is not read
    (folder / "config.json").write_text('{"model_type": ')
    refused(folder, "a/config.json is no JSON")
    (folder / "config.json").write_text("[]")
    refused(folder, r"config.json is \[\], wanted a JSON object")


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    config = config_of(BASE)
    params = init(config, jax.random.key(0))

    class Breaks:
        def save(self, folder):
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="no space left"):
        save_hf(tmp_path / "out", config, params, tokenizer_from=Breaks())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is no folder"):
        save_hf(tmp_path / "file" / "out", config, params)
    with pytest.raises(UserError, match="already there and not empty"):
        save_hf(tmp_path, config, params)
    with pytest.raises(UserError, match=r"do not fit the config: lm_head\.weight"):
        save_hf(tmp_path / "out", config, {"model": params["model"]})
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    (tmp_path / "out").mkdir()
    save_hf(tmp_path / "out", config, params)  # an empty folder is taken
