"""Checkpoints as pytrees: what is read is what lies there, what is written is read again, heads stay tied."""

import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxmerge
import jaxmerge.files
from jaxmerge.tree import named_leaves

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tensors(seed: int, *, head: bool = True) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {EMBEDDING: (8, 4), "model.layers.0.mlp.up_proj.weight": (6, 4), "model.norm.weight": (4,)}
    shapes |= {HEAD: (8, 4)} if head else {}
    return {name: rng.standard_normal(shape).astype(ml_dtypes.bfloat16) for name, shape in shapes.items()}


def folder(path: pathlib.Path, arrays: dict[str, np.ndarray], **config) -> pathlib.Path:
    path.mkdir()
    save_file(arrays, path / "model.safetensors")
    attributes = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16", **config}
    (path / "config.json").write_text(json.dumps(attributes))
    (path / "tokenizer.json").write_text('{"model": {}}')
    (path / "generation_config.json").write_text('{"eos_token_id": 2}')
    (path / "training_args.bin").write_bytes(b"no companion")
    return path


def flat(tree) -> dict[str, np.ndarray]:
    return {name.replace("/", "."): np.asarray(leaf) for name, leaf in named_leaves(tree).items()}


def same(tree, wanted: dict[str, np.ndarray]) -> None:
    found = flat(tree)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == np.ascontiguousarray(array).tobytes(), name


@pytest.mark.parametrize("format", ["safetensors", "orbax"])
@pytest.mark.parametrize("limit", [5_000_000_000, 80])
def test_a_folder_comes_back_bit_for_bit_with_what_belongs_to_it(tmp_path, format, limit):
    given = tensors(0)
    base = folder(tmp_path / "base", given, rope_theta=5e5)
    params = jaxmerge.files.load(base)
    same(params, given)
    assert isinstance(params["model"]["layers"]["0"]["mlp"]["up_proj"]["weight"], jax.Array)
    out = jaxmerge.files.save(params, tmp_path / "out", like=base, format=format, max_shard_bytes=limit)
    same(jaxmerge.files.load(out), given)
    beside = out / "model" if format == "orbax" else out
    assert json.loads((beside / "config.json").read_text()) == json.loads((base / "config.json").read_text())
    assert (beside / "tokenizer.json").read_text() == '{"model": {}}'
    assert (beside / "generation_config.json").exists()
    assert not (beside / "training_args.bin").exists()
    assert (out / "model.safetensors.index.json").exists() == (format == "safetensors" and limit == 80)


def test_merged_in_memory_and_saved_is_merged_on_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [str(folder(tmp_path / name, tensors(i))) for i, name in enumerate(("base", "one", "two"))]
    base, one, two = map(jaxmerge.files.load, names)
    merged = jaxmerge.task_arithmetic([one, two], base=base, weights=[0.5, 0.25])
    jaxmerge.files.save(merged, "memory", like=names[0])
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": pathlib.Path(names[0]),
        "models": [
            {"model": names[1], "parameters": {"weight": 0.5}},
            {"model": names[2], "parameters": {"weight": 0.25}},
        ],
    }
    jaxmerge.files.merge(recipe, "disk")
    same(jaxmerge.files.load("memory"), flat(jaxmerge.files.load("disk")))
    assert json.loads(pathlib.Path("memory/config.json").read_text()) == json.loads(
        pathlib.Path("disk/config.json").read_text()
    )


def test_a_recipe_as_data_is_the_recipe_as_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("one", "two", "three")):
        folder(tmp_path / name, tensors(i))
    stages = [
        {"name": "half", "merge_method": "linear", "models": [
            {"model": name, "parameters": {"weight": 1}} for name in ("one", "two")]},
        {"merge_method": "slerp", "base_model": "half", "models": ({"model": "half"}, {"model": "three"}),
         "parameters": {"t": [0.25, 0.75]}},
    ]  # fmt: skip
    report = jaxmerge.files.merge(stages, "data")
    jaxmerge.files.merge("data/mergekit_config.yml", "again")
    assert load_file("data/model.safetensors").keys() == load_file("again/model.safetensors").keys()
    assert pathlib.Path("data/model.safetensors").read_bytes() == pathlib.Path("again/model.safetensors").read_bytes()
    assert report["merge_method"] == "slerp"
    with pytest.raises(ValueError, match=r"the recipe holds what YAML cannot .*; give dictionaries"):
        jaxmerge.files.merge({"merge_method": object()}, "no")
    with pytest.raises(ValueError, match=r"^model 'nowhere' is no folder or file here"):
        jaxmerge.files.merge({"merge_method": "linear", "models": [{"model": "nowhere"}]}, "no")


def test_heads_stay_tied_while_they_are_the_embedding(tmp_path):
    base = folder(tmp_path / "base", tensors(0, head=False), tie_word_embeddings=True)
    params = jaxmerge.files.load(base)
    assert "lm_head" not in params
    twice = {**params, "lm_head": {"weight": params["model"]["embed_tokens"]["weight"]}}
    out = jaxmerge.files.save(twice, tmp_path / "tied", like=base)
    assert HEAD not in load_file(out / "model.safetensors")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True
    apart = {**params, "lm_head": {"weight": -params["model"]["embed_tokens"]["weight"]}}
    out = jaxmerge.files.save(apart, tmp_path / "apart", like=base)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    same(jaxmerge.files.load(out), flat(apart))


def test_dtypes_are_kept_or_cast(tmp_path):
    given = {"w": np.arange(3, dtype=np.float16), "count": np.arange(3), "f8": np.ones(2, ml_dtypes.float8_e4m3fn)}
    path = jaxmerge.files.save(given, tmp_path / "a.safetensors")
    same(jaxmerge.files.load(path), given)
    cast = jaxmerge.files.load(path, dtype=jnp.float32)
    assert {name: str(leaf.dtype) for name, leaf in cast.items()} == {"w": "float32", "count": "int64", "f8": "float32"}
    base = folder(tmp_path / "base", tensors(0))
    out = jaxmerge.files.save(jaxmerge.files.load(base), tmp_path / "out", like=base, dtype=jnp.float32)
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float32"
    assert {str(array.dtype) for array in load_file(out / "model.safetensors").values()} == {"float32"}


def test_other_pytrees_and_layouts_are_written_by_their_paths(tmp_path):
    tree = {"params": [{"kernel": jnp.arange(6.0).reshape(2, 3)}, {"kernel": np.arange(6.0).reshape(2, 3).T}]}
    out = jaxmerge.files.save(tree, tmp_path / "out")
    same(jaxmerge.files.load(out), {"params.0.kernel": np.arange(6, dtype=np.float32).reshape(2, 3),
                                    "params.1.kernel": np.arange(6.0).reshape(2, 3).T})  # fmt: skip
    assert sorted(path.name for path in out.iterdir()) == ["model.safetensors"]


def test_leaves_go_where_they_are_told(tmp_path):
    path = jaxmerge.files.save({"a": {"w": jnp.ones((8, 2))}, "b": jnp.ones(4)}, tmp_path / "a.safetensors")
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    over, whole = (jax.NamedSharding(mesh, jax.P(*spec)) for spec in (("x",), ()))
    tree = jaxmerge.files.load(path, sharding=lambda name, shape: over if (name, shape) == ("a/w", (8, 2)) else whole)
    assert (tree["a"]["w"].sharding, tree["b"].sharding) == (over, whole)
    again = jaxmerge.files.save(tree, tmp_path / "again.safetensors")
    assert path.read_bytes() == again.read_bytes()


def test_what_cannot_be_saved_is_refused_by_name(tmp_path):
    base = folder(tmp_path / "base", tensors(0))
    params = jaxmerge.files.load(base)
    del params["model"]["norm"]
    params["lm_head"]["weight"] = params["lm_head"]["weight"][:7]
    message = r"missing: model.norm.weight; of another shape: lm_head.weight \[7, 4\], wanted \[8, 4\]; name the model"
    with pytest.raises(ValueError, match=message):
        jaxmerge.files.save(params, tmp_path / "out", like=base)
    for tree, words in [
        ({"a": {"b": "text"}}, "leaf 'a.b' is 'text', wanted an array"),
        ({"key": jax.random.key(0)}, "leaf 'key' is .*, wanted an array"),
        ({"a.b": np.ones(1), "a": {"b": np.ones(1)}}, "two leaves are both named 'a.b' on disk"),
        ({"c": np.ones(1, np.complex64)}, "tensor 'c' of params is complex64, which safetensors cannot hold"),
        ({}, "params hold no array"),
    ]:
        with pytest.raises(ValueError, match=words):
            jaxmerge.files.save(tree, tmp_path / "out")
    with pytest.raises(ValueError, match="format='gguf', wanted one of safetensors, orbax"):
        jaxmerge.files.save({"w": np.ones(1)}, tmp_path / "out", format="gguf")
    with pytest.raises(ValueError, match=r"a file of weights alone; give the name of a folder, or leave out like="):
        jaxmerge.files.save({"w": np.ones(1)}, tmp_path / "out.safetensors", like=base)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]
    for name in ("base", "a.safetensors"):
        (tmp_path / "a.safetensors").touch()
        with pytest.raises(ValueError, match=f"{name} exists already"):
            jaxmerge.files.save({"w": np.ones(1)}, tmp_path / name)
