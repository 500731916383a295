"""What a model string opens: folders, GGUF files, Orbax checkpoints, adapters, downloads; and what it refuses."""

import json
import pathlib
import shutil
import sys

import gguf as gguf_package
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers.goldens.cases import BASE
from helpers.tiny_gguf import write_gguf
from helpers.tiny_models import config_of
from helpers.tiny_tokenizers import FULL, TEXTS, byte_level, gguf_metadata
from helpers.tiny_tokenizers import write_folder as write_tokenizer
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import save_file

from jaxmerge.files.checkpoints import gguf_tokenizer, orbax, source
from jaxmerge.files.checkpoints.open import open_source
from jaxmerge.files.checkpoints.source import read
from train.models.decoder import init
from train.models.hf import named, save_hf
from train.models.open import load_model, open_model
from train.models.tokenizer import Tokenizer
from train.runtime import checkpoint

SMALL = {**BASE, "vocab_size": 400, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def model(seed=0, **changes):
    config = config_of({**SMALL, **changes})
    return config, init(config, jax.random.key(seed))


def folder(path, arrays, **config):
    path.mkdir(parents=True, exist_ok=True)
    save_file(arrays, path / "model.safetensors")
    if config:
        (path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return path


def heads(same=True):
    rng = np.random.default_rng(0)
    embedding = rng.standard_normal((50, 6)).astype(np.float32)
    head = embedding.copy()
    head[-1, -1] += 0 if same else 1
    return {EMBEDDING: embedding, HEAD: head, "model.norm.weight": np.ones(6, np.float32)}


def pieces_of(tensor):
    """Read it in runs that fit nothing: the law of `read_into`."""
    whole = read(tensor).reshape(-1).view(np.uint8)
    item = tensor.dtype.itemsize
    half = whole.size // 2 // item * item
    for start, count in ((0, item), (item, 5 * item), (half, whole.size // 4), (0, whole.size)):
        buffer = np.empty(min(count, whole.size - start), np.uint8)
        tensor.read_into(buffer, start)
        assert np.array_equal(buffer, whole[start : start + buffer.size])
    return read(tensor)


# --- folders ---


def test_a_folder_opens_lazily_with_what_belongs_to_it(tmp_path):
    folder(tmp_path / "a", heads(), vocab_size=50)
    write_tokenizer(tmp_path / "a", byte_level(), **FULL)
    (tmp_path / "a" / "generation_config.json").write_text("{}")
    (tmp_path / "a" / "notes.txt").write_text("mine")
    found = open_source(str(tmp_path / "a"))
    assert (found.name, found.folder) == (str(tmp_path / "a"), tmp_path / "a")
    assert found.files == (tmp_path / "a" / "model.safetensors",)
    assert found.config["vocab_size"] == 50
    assert found.notes == ()
    assert sorted(found.companions()) == ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    for name, array in heads().items():
        assert np.array_equal(pieces_of(found.tensors[name]), array)
    folder(tmp_path / "bare", heads())
    assert open_source(str(tmp_path / "bare")).notes == (f"{tmp_path / 'bare'} has no config.json",)


@pytest.mark.parametrize("block", [source.BLOCK_BYTES, 64])
def test_tied_heads_are_read_once_or_refused(tmp_path, monkeypatch, block):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(source, "BLOCK_BYTES", block)
    folder(tmp_path / "twice", heads(), tie_word_embeddings=True)
    folder(tmp_path / "torn", heads(same=False), tie_word_embeddings=True)
    folder(tmp_path / "inner", heads(), text_config={"tie_word_embeddings": True})
    folder(tmp_path / "apart", heads(same=False), tie_word_embeddings=False)
    for name in ("twice", "inner"):
        found = open_source(name)
        assert HEAD not in found.tensors
        assert found.notes == (f"{name}: {HEAD} is tied to the embedding and stored twice; written once",)
    assert HEAD in open_source("apart").tensors
    with pytest.raises(ValueError, match=r"torn: config.json says tie_word_embeddings, but lm_head.weight differs"):
        open_source("torn")
    head = heads()[HEAD]
    folder(tmp_path / "half", {**heads(), HEAD: head.astype(np.float16)}, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="differs from"):
        open_source("half")


def test_names_that_lead_nowhere_say_what_was_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, files in {
        "old": ["pytorch_model.bin", "config.json"],
        "lora": ["adapter_config.json", "adapter_model.safetensors"],
        "quants": ["a.gguf", "b.gguf"],
        "empty": [],
        "other": ["readme.txt"],
        "several": ["x/_METADATA", "y/_METADATA"],
        "run": [
            "model/config.json",
            "checkpoints/r/m/sft/weights/_METADATA",
            "checkpoints/r/m/merge/weights/_METADATA",
        ],
    }.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text("{}")
    for name, words in {
        "nothing": "model 'nothing' is no folder or file here; give a Hugging Face folder, a .gguf file",
        "": "model '' is no folder",
        "nothing.gguf": "no folder or file here",
        "old": r"holds pytorch_model.bin but no \*.safetensors; convert it to safetensors first",
        "old/config.json": "is a .json file; give the folder that holds config.json",
        "lora": "is an adapter, without the model it adapts; write it as 'model\\+adapter'",
        "quants": "holds 2 .gguf files; name one of quants/a.gguf, quants/b.gguf",
        "empty": "holds no .*; found nothing",
        "other": r"holds no \*.safetensors, no .gguf file and no Orbax checkpoint; found readme.txt",
        "several": "several holds 2 Orbax checkpoints; name one of several/x, several/y",
        "run": "run holds 2 Orbax checkpoints; name one of run/checkpoints/r/m/merge/weights, run",
        "old+nothing": r"'old\+nothing': the adapter 'nothing' is no folder here",
        "nothing+lora": "model 'nothing' is no folder",
    }.items():
        with pytest.raises(ValueError, match=words) as error:
            open_source(name)
        assert "\n" not in str(error.value)


def test_adapters_are_split_off_at_the_last_plus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "c++", heads(), vocab_size=50)
    (tmp_path / "lora").mkdir()
    applied = []
    monkeypatch.setattr(
        "jaxmerge.files.checkpoints.adapter.apply",
        lambda opened, path, _: applied.append((opened.name, path)) or opened,
    )
    assert open_source("c++").name == "c++"
    assert open_source("c+++lora").name == "c+++lora"
    assert open_source("c+++lora+lora").name == "c+++lora+lora"
    assert applied == [("c++", pathlib.Path("lora"))] * 2 + [("c+++lora", pathlib.Path("lora"))]


# --- GGUF ---


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1"])
def test_gguf_tensors_are_hugging_faces(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(source, "BLOCK_BYTES", 1000)
    config, params = model(num_key_value_heads=2)
    file = write_gguf(tmp_path / "a.gguf", config, params, kind=gguf_package.GGMLQuantizationType[kind])
    found = open_source(str(tmp_path))  # the folder of one file
    assert found.files == (file,)
    assert set(found.tensors) == {name for name, _ in named(params)}
    for name, leaf in named(params):
        tensor, wanted = found.tensors[name], np.asarray(leaf)
        array = pieces_of(tensor)
        assert (array.dtype, tensor.where) == (np.float32, str(file))
        if kind == "F32":
            assert np.array_equal(array, wanted)
        assert np.abs(array - wanted).max() <= np.abs(wanted).max() / 8


def test_a_gguf_becomes_a_hugging_face_folder(tmp_path):
    config, params = model(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0})
    file = write_gguf(tmp_path / "a.gguf", config, params)
    found = open_source(str(file))
    assert found.notes == ()
    out = folder(tmp_path / "out", {name: read(tensor) for name, tensor in found.tensors.items()})
    (out / "config.json").write_text(json.dumps(found.config))
    for name, content in found.companions().items():
        (out / name).write_bytes(content)
    ours, theirs = load_model(out), load_model(file)
    assert ours.config == theirs.config == config
    assert jax.tree.all(jax.tree.map(np.array_equal, ours.params, theirs.params))
    for attribute in ("special", "chat_template"):
        assert getattr(ours.tokenizer, attribute) == getattr(theirs.tokenizer, attribute)
    backend = byte_level()
    for text in TEXTS:
        assert ours.tokenizer.encode(text) == backend.encode(text).ids
    # The JSON is what the library itself writes of such a tokenizer.
    rebuilt = Tokenizer.from_gguf(gguf_metadata(backend), source="a.gguf").backend
    assert json.loads(rebuilt.to_str()) == gguf_tokenizer.tokenizer_json(gguf_metadata(backend))


def test_a_gguf_with_an_unknown_tokenizer_has_none(tmp_path):
    config, params = model()
    file = write_gguf(tmp_path / "a.gguf", config, params, keys={"tokenizer.ggml.pre": "viking"})
    found = open_source(str(file))
    assert "counts as a model without tokenizer" in found.notes[0]
    assert "'viking' is not known; known: smollm" in found.notes[0]
    assert list(found.companions()) == ["generation_config.json"]


def test_damaged_gguf_files_are_named(tmp_path, monkeypatch):
    config, params = model()
    file = write_gguf(tmp_path / "a.gguf", config, params, keys={"llama.experts_per_group": 2})
    with pytest.raises(ValueError, match=r"a\.gguf: not understood: llama.experts_per_group = 2"):
        open_source(str(file))
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"a\.gguf: truncated or not a GGUF file"):
        open_source(str(file))
    config, params = model(num_attention_heads=3, num_key_value_heads=3, head_dim=8)
    file = write_gguf(tmp_path / "b.gguf", config, params, keys={"llama.attention.head_count": 5})
    with pytest.raises(ValueError, match=r"attn_q.weight has 24 rows, not a multiple of two a head \(5\)"):
        open_source(str(file))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"need the package gguf; .*pip install 'jaxmerge\[train\]'"):
        open_source(str(file))


# --- Orbax ---

TREE = {
    "model": {"layers": {"0": {"w": np.arange(24.0, dtype=np.float32).reshape(4, 6)}}, "odd": np.ones(7, np.float16)},
    "list": [np.arange(3), np.zeros((2, 2, 2))],
    "half": np.arange(12).reshape(3, 4).astype(ml_dtypes.bfloat16),
    "step": 7,
    "none": None,
}
NAMED = {
    "model.layers.0.w": TREE["model"]["layers"]["0"]["w"],
    "model.odd": TREE["model"]["odd"],
    "list.0": TREE["list"][0],
    "list.1": TREE["list"][1],
    "half": TREE["half"],
    "step": np.asarray(7),
}


def save_plain(path, tree):
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def save_standard(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def save_as(**format):
    def save(path, tree):
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**format)) as checkpointer:
            checkpointer.save(path, tree)

    return save


def save_step(path, tree):
    with ocp.CheckpointManager(path) as manager:
        manager.save(3, args=ocp.args.StandardSave(tree))
        manager.wait_until_finished()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "save",
    [save_plain, save_standard, save_as(use_ocdbt=False), save_as(use_zarr3=True), save_step],
    ids=["plain", "standard", "files", "zarr3", "step"],
)
def test_any_pytree_of_orbax_is_read(tmp_path, save):
    save(tmp_path / "a b", TREE)
    found = open_source(str(tmp_path / "a b"))
    assert set(found.tensors) == set(NAMED)
    for name, wanted in NAMED.items():
        array = pieces_of(found.tensors[name]) if wanted.ndim else read(found.tensors[name])
        assert array.dtype == wanted.dtype
        assert np.array_equal(array, wanted)
        assert str(tmp_path / "a b") in found.tensors[name].where
    assert any(file.name == "_METADATA" for file in found.files)
    assert found.notes == (f"{tmp_path / 'a b'} has no config.json",)


def test_sharded_arrays_of_orbax_are_read(tmp_path):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    array = np.arange(64.0, dtype=np.float32).reshape(8, 8)
    tree = {"w": jax.device_put(array, NamedSharding(mesh, P("x", "y"))), "v": jnp.arange(8, dtype=jnp.bfloat16)}
    save_standard(tmp_path / "a", tree)
    found = open_source(str(tmp_path / "a"))
    assert np.array_equal(pieces_of(found.tensors["w"]), array)
    assert np.array_equal(read(found.tensors["v"]), np.asarray(tree["v"]))


def test_checkpoints_of_a_run_are_models(tmp_path):
    config, params = model(tie_word_embeddings=True)
    (tmp_path / "run").mkdir()
    described = tmp_path / "run" / "model"
    save_hf(
        described, config, params, tokenizer_from=Tokenizer.from_folder(write_tokenizer(tmp_path, byte_level(), **FULL))
    )
    (described / "model.safetensors").unlink()
    weights = tmp_path / "run" / "checkpoints" / "round-1" / "plain" / "sft" / "weights"
    checkpoint.save_weights(weights, params)
    for path in (weights, weights.parent, tmp_path / "run"):
        found = open_source(str(path))
        assert found.folder == described
        assert found.config["vocab_size"] == 400
        assert "tokenizer.json" in found.companions()
        assert {name: read(t).tobytes() for name, t in found.tensors.items()} == {
            name: np.asarray(leaf).tobytes() for name, leaf in named(params)
        }


def test_damaged_checkpoints_of_orbax_are_named(tmp_path, monkeypatch):
    save_plain(tmp_path / "text", {"a": np.ones(3), "b": "words"})
    with pytest.raises(ValueError, match="'b' is a string, wanted arrays; save it without"):
        open_source(str(tmp_path / "text"))
    save_plain(tmp_path / "a", TREE)
    found = open_source(str(tmp_path / "a"))
    for file in (tmp_path / "a" / "d").iterdir():
        file.write_bytes(file.read_bytes()[:10])
    for file in (tmp_path / "a").glob("ocdbt.process_0/d/*"):
        file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(ValueError, match="array 'half' is damaged") as error:
        read(found.tensors["half"])
    assert "\n" not in str(error.value)
    (tmp_path / "a" / "_METADATA").write_text("{")
    with pytest.raises(ValueError, match="no readable Orbax checkpoint"):
        open_source(str(tmp_path / "a"))
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ValueError, match=r"need orbax-checkpoint; install it with .*pip install 'jaxmerge\[train\]'"):
        open_source(str(tmp_path / "a"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_written_as_orbax_is_a_model_of_train(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(orbax, "CHUNK_BYTES", 4096)  # arrays of several pieces
    tokenizer = Tokenizer.from_folder(write_tokenizer(tmp_path, byte_level(), **FULL))
    save_hf(tmp_path / "a", *model(), dtype=jnp.dtype(dtype), tokenizer_from=tokenizer)
    (tmp_path / "a" / "merge.json").write_text("{}")
    orbax.write(tmp_path / "a", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["merge.json", "model", "weights"]
    before, after = open_source(str(tmp_path / "a")), open_source(str(tmp_path / "out"))
    assert before.config == after.config
    assert before.companions() == after.companions()
    assert {name: (t.dtype, read(t).tobytes()) for name, t in before.tensors.items()} == {
        name: (t.dtype, read(t).tobytes()) for name, t in after.tensors.items()
    }
    wanted = load_model(tmp_path / "a")
    for found in (open_model(str(tmp_path / "out")), open_model(str(tmp_path / "out" / "weights"))):
        assert found.config == wanted.config
        assert jax.tree.all(jax.tree.map(np.array_equal, found.params, wanted.params))
        assert found.tokenizer.encode(TEXTS[2]) == wanted.tokenizer.encode(TEXTS[2])


def test_what_orbax_cannot_hold_is_refused(tmp_path):
    folder(tmp_path / "a", {"w": np.ones(2, np.float32), "w.scale": np.ones(2, np.float32)})
    with pytest.raises(ValueError, match=r"'w\.scale' lies below another one, 'w'; no pytree holds both"):
        orbax.write(tmp_path / "a", tmp_path / "out")
    shutil.rmtree(tmp_path / "a")
    folder(tmp_path / "a", {"w": np.ones((0, 2), np.float32)})
    with pytest.raises(ValueError, match=r"the checkpoint could not be written .*zero size"):
        orbax.write(tmp_path / "a", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
