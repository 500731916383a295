"""What stands beside the weights of a merge, and what is said where models do not agree."""

import json

import numpy as np
import pytest
from helpers.llamas import folder, load, make, tensors
from helpers.tiny_vocabularies import folder as with_tokenizer
from helpers.tiny_vocabularies import words
from safetensors.numpy import save_file

from jaxmerge.files import merge
from jaxmerge.files.checkpoints.open import open_source

LINEAR = "merge_method: linear\nmodels: [{model: one}, {model: two}]\nparameters: {weight: 1}\n"
FILES = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model", "small.tiktoken", "tekken.json", "source.spm", "bpe.codes", "normalizer.json",
    "additional_chat_templates/tool.jinja", "sentence_bert_config.json", "config_sentence_transformers.json",
)  # fmt: skip
CODE = ("modeling_small.py", "tokenization_small.py")
OTHERS = ("trainer_state.json", "optimizer.pt", "adapter_config.json", "quantize.json", "README.txt", "deep/vocab.txt")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(["base", "one", "two"]):
        folder(name, tensors(seed))
    return tmp_path


def put(place, *names, text="{}"):
    for name in names:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(f"{text}{name}" if name.endswith(".py") else text)


def change(place, **config):
    path = place / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


def there(place):
    return {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}


def test_files_of_the_first_model_go_with_it(here):
    put(here / "one", *FILES, *OTHERS)
    put(here / "two", "image_processor_config.json")
    (here / "recipe.yaml").write_text(LINEAR)
    merge("recipe.yaml", "out")
    found = there(here / "out")
    assert set(FILES) <= found
    assert not found & {*OTHERS, "image_processor_config.json"}
    again = merge("recipe.yaml", "checkpoint", format="orbax")
    assert again["tensors"] > 0
    assert set(FILES) <= there(here / "checkpoint" / "model")


@pytest.mark.parametrize(
    ("place", "auto_map", "copied"),
    [
        ("config.json", {"AutoConfig": "configuration_small.C", "AutoModel": "modeling_small.M"}, True),
        ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_small.T", None]}, True),
        ("config.json", {"AutoModel": "org/other--modeling_small.M"}, False),
        ("config.json", None, False),
    ],
)
def test_code_goes_with_the_config_that_names_it(here, place, auto_map, copied):
    put(here / "one", *CODE, text="raise SystemExit  # ")
    put(here / "one", "tokenizer_config.json")
    (here / "one" / place).write_text(
        json.dumps({**json.loads((here / "one" / place).read_text()), "auto_map": auto_map})
    )
    made = make(LINEAR)
    made.companions(here / "one")
    assert {name for name in made.files if name.endswith(".py")} == ({*CODE} if copied else set())


def test_modules_of_a_sentence_model_are_folders(here):
    put(here / "one", "1_Pooling/config.json", "2_Dense/config.json", "deep/er/config.json", "outside/config.json")
    save_file({"linear.weight": np.ones((2, 2), np.float32)}, here / "one" / "2_Dense" / "model.safetensors")
    modules = [{"path": path} for path in ("", "1_Pooling", "2_Dense", "deep/er", "../two", "/etc")]
    (here / "one" / "modules.json").write_text(json.dumps(modules))
    made = make(LINEAR)
    assert {"1_Pooling/config.json", "2_Dense/model.safetensors", "deep/er/config.json"} <= set(made.files)
    assert not [name for name in made.files if name.startswith(("..", "/", "outside"))]
    assert "2_Dense/model.safetensors is copied from one, not merged" in made.notes


def test_a_merge_that_begins_again_removes_folders_too(here):
    put(here / "one", "1_Pooling/config.json", "modules.json")
    (here / "recipe.yaml").write_text(LINEAR)
    left = here / ".out.merging"
    (left / "result" / "1_Pooling").mkdir(parents=True)
    put(left / "result", "1_Pooling/config.json", "2_Old/config.json")
    merge("recipe.yaml", "out")
    assert {"1_Pooling/config.json"} == {name for name in there(here / "out") if "/" in name}


def test_another_vocabulary_leaves_out_what_would_contradict_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with_tokenizer(tmp_path / "one", words(["a", "b"], ["<|im|>"]), 0)
    with_tokenizer(tmp_path / "two", words(["b", "c"]), 1)
    put(tmp_path / "one", "vocab.txt", "spiece.model", "small.tiktoken", "tekken.json", "preprocessor_config.json")
    assert {"vocab.txt", "tekken.json"} <= set(make(LINEAR + "tokenizer: {source: base}\n").files)
    found = set(make(LINEAR + "tokenizer_source: union\n").files)
    assert "preprocessor_config.json" in found
    assert not found & {"vocab.txt", "spiece.model", "small.tiktoken", "tekken.json"}


def test_the_code_of_a_tokenizer_goes_with_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, vocab in (("one", ["a", "b"]), ("two", ["b", "c"])):
        place = with_tokenizer(tmp_path / name, words(vocab), 0)
        put(place, f"tokenization_{name}.py", f"modeling_{name}.py")
        named = {"auto_map": {"AutoTokenizer": [f"tokenization_{name}.T", None]}}
        config = json.loads((place / "tokenizer_config.json").read_text())
        (place / "tokenizer_config.json").write_text(json.dumps({**config, **named}))
    found = {name for name in make(LINEAR + "tokenizer_source: two\n").files if name.endswith(".py")}
    assert found == {"modeling_one.py", "tokenization_two.py"}


def wrapped(name, backend, seed, **text):
    """A model of several parts: its language model is described in text_config alone."""
    place = with_tokenizer(name, backend, seed)
    config = json.loads((place / "config.json").read_text())
    rows = config.pop("vocab_size")
    outer = {"model_type": "wrapper", "image_token_index": 3, "tie_word_embeddings": False}
    (place / "config.json").write_text(json.dumps({**outer, "text_config": {**config, "eos_token_id": 4, **text}}))
    return rows


def test_a_wrapper_is_told_the_size_and_the_ids_of_its_vocabulary(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrapped(tmp_path / "one", words(["<|image|>", "end", "c"]), 0)
    wrapped(tmp_path / "two", words(["x", "y", "end", "<|image|>", "z", "q"]), 1)
    made = make(LINEAR + "tokenizer_source: union\n")
    config = json.loads(made.files["config.json"])
    (embedding,) = (job for job in made.jobs if job.name == "model.embed_tokens.weight")
    assert "vocab_size" not in config
    assert config["text_config"]["vocab_size"] == embedding.shape[0] == 10
    # In the second model's vocabulary the same tokens have other numbers.
    config = json.loads(make(LINEAR + "tokenizer_source: two\n").files["config.json"])
    assert (config["image_token_index"], config["text_config"]["eos_token_id"]) == (6, 5)
    assert config["text_config"]["vocab_size"] == 9


def test_rows_of_padding_that_go_are_counted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with_tokenizer(tmp_path / "one", words(["a", "b"]), 0, rows=12)
    with_tokenizer(tmp_path / "two", words(["b", "c"]), 1)
    made = make(LINEAR + "tokenizer_source: union\n")
    assert any("one: the last 7 of 12 rows of its embedding belong to no token" in note for note in made.notes)
    padded = make(LINEAR + "tokenizer: {source: union, pad_to_multiple_of: 12}\n")
    assert not any("belong to no token" in note for note in padded.notes)


def notes(*, slices=False, **config):
    text = (
        LINEAR if not slices else "merge_method: passthrough\nslices: [{sources: [{model: one, layer_range: [0, 2]}]}, "
    )
    text += "{sources: [{model: two, layer_range: [0, 4]}]}]\n" if slices else ""
    return [note for note in make(text).notes if "config.json of two differs" in note]


def test_configs_that_disagree_are_told_key_and_values(here):
    assert notes() == []
    change(here / "one", rope_theta=10000.0, rms_norm_eps=1e-5, text_config={"head_dim": 4})
    change(here / "two", rope_theta=500000.0, rms_norm_eps=1e-6, num_attention_heads=4, text_config={"head_dim": 8})
    (note,) = notes()
    for said in (
        "rope.rope_theta (500000.0, there 10000.0)", "num_attention_heads (4, there 2)",
        "rms_norm_eps (1e-06, there 1e-05)", "text_config.head_dim (8, there 4)", "the result has one's",
    ):  # fmt: skip
        assert said in note


@pytest.mark.parametrize(
    ("one", "two"),
    [
        # What two versions of transformers write for the same model.
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}),
        ({}, {"rope_theta": 10000.0, "attention_bias": False, "rope_scaling": None}),
        (
            {"attention_dropout": 0.1, "eos_token_id": 2, "_name_or_path": "a"},
            {"attention_dropout": 0.0, "use_cache": 1},
        ),
        ({"torch_dtype": "float32", "transformers_version": "4.40"}, {"torch_dtype": "bfloat16"}),
    ],
)
def test_configs_that_say_the_same_are_not_told(here, one, two):
    change(here / "one", **one)
    change(here / "two", **two)
    assert notes() == []


def test_scalings_of_one_model_only_are_told(here):
    change(here / "two", rope_scaling={"type": "linear", "factor": 4.0}, sliding_window=128, vocab_size=40)
    (note,) = notes()
    for said in ("rope.factor (4.0, there none)", "rope.rope_type", "sliding_window (128", "vocab_size (40"):
        assert said in note
    change(here / "two", num_hidden_layers=6, layer_types=["full"] * 6)
    (sliced,) = notes(slices=True)
    assert "num_hidden_layers" not in sliced


INV_FREQ = "model.layers.{}.self_attn.rotary_emb.inv_freq"


def test_rotary_buffers_of_one_model_only_are_left_out(here):
    buffers = {INV_FREQ.format(l): np.arange(4, dtype=np.float32) for l in range(4)}
    mask = {"h.0.attn.bias": np.ones((1, 1, 2, 2), np.float32)}
    folder("old", tensors(3) | buffers | mask)
    text = LINEAR.replace("two", "old")
    for order in (text, text.replace("one", "x").replace("old", "one").replace("x", "old")):
        made = make(order)
        assert {job.name for job in made.jobs} == set(load("one"))
        assert any("old stores 5 buffers that follow from config.json" in note for note in made.notes)
    folder("older", tensors(4) | buffers)
    both = make(text.replace("one", "older"))
    assert {job.name for job in both.jobs} == {*load("one"), *buffers}
    # A parameter of that name is none: its shape says so.
    folder("biased", tensors(5) | {"h.0.attn.bias": np.ones(8, np.float32)})
    with pytest.raises(ValueError, match=r"has 1 that it lacks \(h.0.attn.bias\)"):
        make(LINEAR.replace("two", "biased"))


def test_a_file_of_safetensors_is_a_model(here):
    save_file(tensors(7), here / "loose.safetensors")
    made = make(LINEAR.replace("two", "loose.safetensors"))
    assert {job.name for job in made.jobs} == set(load("one"))
    assert "loose.safetensors is a file alone, without config.json" not in made.notes  # it is alone in its folder
    save_file(tensors(8), here / "another.safetensors")
    assert open_source("another.safetensors").notes == ("another.safetensors is a file alone, without config.json",)
    named = open_source("one/model.safetensors")
    assert named.config["model_type"] == "llama"
    (here / "one" / "model.safetensors").rename(here / "one" / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(tensors(1), "model-00001-of-00001.safetensors")}
    (here / "one" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"is one of the shards that model.safetensors.index.json names; give the fol"):
        open_source("one/model-00001-of-00001.safetensors")
