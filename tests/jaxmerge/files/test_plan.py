"""Models that do not match, dtypes, and what is written beside the weights."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from helpers.llamas import folder, load, make, merged, run, tensors
from safetensors.numpy import load_file

import jaxmerge
from jaxmerge.files import merge
from jaxmerge.files.methods import METHODS


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(["base", "one", "two", "three"]):
        folder(name, tensors(seed))
    return tmp_path


PAIR = (
    "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: one}, {model: odd}]\nparameters: {weight: 1}\n"
)


def test_missing_tensors_are_listed_or_merged_from_the_rest(here):
    arrays = {name: array for name, array in tensors(9).items() if "up_proj" not in name and "norm" not in name}
    folder("odd", arrays)
    with pytest.raises(
        ValueError, match=r"'odd' does not match 'base': lacks 13 tensors .*, … 9 more\).*allow=missing"
    ):
        make(PAIR)
    made = make(PAIR, allow=["missing"])
    found, one = {job.name: run(job) for job in made.jobs}, load("one")
    np.testing.assert_allclose(found["model.norm.weight"], one["model.norm.weight"], rtol=1e-5)
    assert any("odd, beside base, lacks 13 tensors" in note for note in made.notes)
    text = PAIR.replace("task_arithmetic", "model_stock").replace("parameters: {weight: 1}\n", "")
    found = merged(text, allow=["missing"])
    np.testing.assert_array_equal(found["model.norm.weight"], load("base")["model.norm.weight"])
    made = make(text, allow=["missing"], compat="mergekit")
    assert "model.norm.weight" not in {job.name for job in made.jobs}
    assert any("left out, as mergekit does" in note for note in made.notes)


def test_unused_tensors_are_listed_or_left_out(here):
    folder("odd", tensors(9) | {"extra.weight": np.ones(3, np.float32)})
    with pytest.raises(ValueError, match=r"has 1 that it lacks \(extra.weight\); .*allow=unused"):
        make(PAIR)
    for options in ({"allow": ["unused"]}, {"compat": "mergekit"}):
        made = make(PAIR, **options)
        assert "extra.weight" not in {job.name for job in made.jobs}
        assert any("extra.weight); left out" in note for note in made.notes)


def test_unlike_shapes_are_listed_or_copied(here):
    odd: dict = tensors(9)
    odd["model.norm.weight"] = np.ones(5, np.float32)
    odd["lm_head.weight"] = odd["lm_head.weight"].astype(np.int32)
    folder("odd", odd)
    with pytest.raises(ValueError, match=r"of 'odd' is int32, wanted float32 as in 'base'; .*\[5\], wanted \[8\]"):
        make(PAIR)
    made = make(PAIR, allow=["shapes"])
    found, base = {job.name: run(job) for job in made.jobs}, load("base")
    for name in ("model.norm.weight", "lm_head.weight"):
        np.testing.assert_array_equal(found[name], base[name])
    assert any("copied, not merged: 2 tensors" in note for note in made.notes)
    first = {
        job.name: job
        for job in make(PAIR.replace("[{model: one}, {model: odd}]", "[{model: odd}]"), allow=["shapes"]).jobs
    }
    assert first["lm_head.weight"].out_dtype == np.float32
    with pytest.raises(ValueError, match="allow='shape', wanted some of missing, unused, shapes"):
        make(PAIR, allow=["shape"])


def test_other_rows_of_an_embedding_are_another_vocabulary(here):
    odd: dict = tensors(9)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        odd[name] = np.concatenate([odd[name], odd[name][:3]])
    odd["model.layers.0.input_layernorm.weight"] = np.ones(5, np.float32)
    folder("odd", odd)
    with pytest.raises(
        ValueError,
        match=r"^the vocabularies differ; tensor '(model.embed_tokens|lm_head).weight' of 'odd' has shape \[\d+, 8\], "
        r".*; tensor 'model.layers.0.*; give the result one vocabulary, tokenizer_source: union \(or base\) in the "
        r"recipe, or allow it: allow=shapes$",
    ):
        make(PAIR)
    assert any("3 tensors are unlike" in note for note in make(PAIR, allow=["shapes"]).notes)


@pytest.mark.parametrize("prefix", ["", "other."])
def test_where_everything_differs_nothing_is_to_be_allowed(here, prefix):
    """Tensors of other widths, or of other names: allowed, there would be nothing to merge."""
    wide = {name: np.ones([2 * n for n in array.shape], np.float32) for name, array in tensors(9).items()}
    folder("odd", {prefix + name: array for name, array in (tensors(9) if prefix else wide).items()})
    with pytest.raises(
        ValueError, match=r"; no tensor of 'odd' is as in 'base': merge models of one architecture$"
    ) as said:
        make(PAIR)
    assert "allow" not in str(said.value)
    assert "vocabular" not in str(said.value)


def test_integers_are_copied_bit_by_bit(here):
    for name, seed in (("a", 1), ("b", 2)):
        folder(name, tensors(seed) | {"steps": np.array([2**40 + seed]), "mask": np.array([True, False])})
    text = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\nout_dtype: bfloat16\n"
    jobs = {job.name: job for job in make(text).jobs}
    assert jobs["steps"].method is METHODS["passthrough"]
    assert (jobs["steps"].out_dtype, jobs["steps"].dtype) == (np.int64, None)
    np.testing.assert_array_equal(run(jobs["steps"]), [2**40 + 1])


def test_tied_and_untied_heads_together(here):
    folder("odd", tensors(9, head=False), tie_word_embeddings=True)
    made = make(PAIR)
    (head,) = (job for job in made.jobs if job.name == "lm_head.weight")
    assert [i.tensor.name for i in head.inputs] == ["lm_head.weight", "model.embed_tokens.weight"]
    assert any("odd ties its head to its embedding, which is merged as its head" in note for note in made.notes)
    text = PAIR.replace("base_model: base", "base_model: odd")
    with pytest.raises(ValueError, match=r"lm_head.weight\); 'odd' ties its head to its embedding, 'one' does not"):
        make(text)
    assert "lm_head.weight" not in {job.name for job in make(text, allow=["unused"]).jobs}


def test_dtypes_of_the_result(here):
    folder("odd", tensors(9, dtype=ml_dtypes.bfloat16))
    text = "merge_method: linear\nmodels: [{model: odd}, {model: one}]\nparameters: {weight: 1}\n"
    dtypes = lambda **options: {str(job.out_dtype) for job in make(text, **options).jobs}  # noqa: E731
    assert (dtypes(), dtypes(compat="mergekit")) == ({"bfloat16"}, {"float32"})
    text += "dtype: torch.float16\n"
    assert dtypes() == {"float16"}
    assert {str(job.dtype) for job in make(text).jobs} == {"float16"}


def parameters(method, one="{}", two=None, **rest):
    """A recipe of one model or two over the base."""
    models = f"[{{model: one, parameters: {one}}}" + ("]" if two is None else f", {{model: two, parameters: {two}}}]")
    return f"merge_method: {method}\nbase_model: base\nmodels: {models}\nparameters: {rest or '{}'}\n"


NAMED = r"tensor 'model\.layers\.\d\.[\w.]+weight': (the weights \[0.3, -0.3\] )?"
CANCEL = (
    "{weight: [{filter: layers.1.mlp.down_proj, value: 0.3}, {value: 1}]}",
    "{weight: [{filter: down_proj, value: -0.3}, {value: 1}]}",
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (parameters("ties", "{weight: 1, density: [1, 2]}"), "density of model 'one' is 1.3333333333333335, wanted a "),
        (parameters("dare_linear", "{weight: 1, density: [1, -2]}"), "density of model 'one' is -"),
        (parameters("breadcrumbs", "{weight: 1, gamma: [0, 3.3]}"), "gamma of model 'one' is 1"),
        (parameters("della", "{weight: 1, density: [1, 4]}"), "density of model 'one' is 2.0, wanted a share"),
        (parameters("sce", select_topk=[1, 4]), r"select_topk is 2.0, wanted a share in \[0, 1\]"),
        (parameters("imm", drop=[0, 3]), r"drop is 1.0, wanted a share in \[0, 1\)"),
        (
            parameters("linear", *CANCEL).replace("base_model: base\n", ""),
            "of linear sum to zero, which they are divided by; change one, or set normalize: false",
        ),
        (parameters("multislerp", *CANCEL), "of multislerp sum to zero.* or set normalize_weights: false"),
        (parameters("extrapolation_merge", *CANCEL, alpha=1), "of extrapolation_merge sum to zero.* change one$"),
    ],
)
def test_coefficients_no_rule_takes_are_refused_before_a_tensor_is_merged(here, text, words):
    with pytest.raises(ValueError, match=NAMED + words):
        make(text)


@pytest.mark.parametrize("method", ["task_arithmetic", "dare_linear", "breadcrumbs"])
def test_weights_that_cancel_are_divided_by_one(here, method):
    """As mergekit does, in methods of deltas."""
    text = parameters(method, "{weight: 0.3}", "{weight: -0.3}", normalize=True)
    found, plain = (
        next(run(job) for job in make(written).jobs if job.name == "model.norm.weight")
        for written in (text, text.replace("True", "False"))
    )
    np.testing.assert_allclose(found, plain, rtol=1e-6)


def test_weights_that_cancel_but_for_rounding_are_refused(here):
    text = "merge_method: linear\nmodels:\n" + "".join(
        f"  - {{model: {name}, parameters: {{weight: {weight}}}}}\n"
        for name, weight in (("one", 0.1), ("two", 0.2), ("three", -0.3))
    )
    with pytest.raises(ValueError, match="sum to zero"):
        make(text)
    assert make(text + "parameters: {normalize: false}\n").jobs


def test_a_checkpoint_without_tensors_is_named(here):
    folder("odd", {})
    with pytest.raises(ValueError, match="the recipe merges no tensor: 'odd' has 0 tensors; give models with weights"):
        make("merge_method: linear\nmodels: [{model: odd}]\nparameters: {weight: 1}\n")


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64", "int4", "complex64"])
def test_dtypes_of_orbax_are_written_or_named(here, dtype):
    checkpoints = pytest.importorskip("orbax.checkpoint")
    arrays = {"w": np.ones((3, 2), np.float32), "n": np.arange(4).astype(dtype)}
    with checkpoints.PyTreeCheckpointer() as saver:
        saver.save(here / "saved", arrays)
    (here / "recipe.yaml").write_text("merge_method: linear\nmodels: [{model: saved}]\nparameters: {weight: 1}\n")
    if dtype.startswith("uint"):
        merge("recipe.yaml", "out")
        found = load_file("out/model.safetensors")["n"]
        assert found.dtype == dtype
        assert np.array_equal(found, arrays["n"])
    else:
        with pytest.raises(ValueError, match=f"tensor 'n' of .*saved is {dtype}, which safetensors cannot hold; store"):
            merge("recipe.yaml", "out", dry_run=True)


TOKENIZERS = {
    "one": {"chat_template": "{{ one }}"},
    "two": {"chat_template": [{"name": "default", "template": "{{ two }}"}]},
}


def test_tokenizer_and_chat_template_go_along(here):
    for name, config in TOKENIZERS.items():
        (here / name / "tokenizer_config.json").write_text(json.dumps(config))
        (here / name / "tokenizer.json").write_text(f'{{"{name}": 1}}')
        (here / name / "generation_config.json").write_text('{"eos_token_id": 2}')
    (here / "three" / "chat_template.jinja").write_text("{{ two }}\n")
    text = "merge_method: linear\nmodels: [{model: one}, {model: two}, {model: three}]\nparameters: {weight: 1}\n"
    made = make(text)
    made.companions(here)
    assert "three has no tokenizer.json" in made.notes
    assert any("the tokenizers of the models differ" in note for note in made.notes)
    assert (here / "tokenizer.json").read_text() == '{"one": 1}'
    assert not (here / "chat_template.jinja").exists()
    for wanted, template in (("auto", "{{ two }}"), ("'{{ a template of its own }}'", "{{ a template of its own }}")):
        make(text + f"chat_template: {wanted}\n").companions(here)
        assert (here / "chat_template.jinja").read_text() == template
        assert json.loads((here / "tokenizer_config.json").read_text())["chat_template"] == template
        assert (here / "generation_config.json").exists()
    make(text + "chat_template: chatml\n").companions(here)
    assert "<|im_start|>" in (here / "chat_template.jinja").read_text()


def test_a_vocabulary_of_all_tokens(here):
    """Rows that a model lacks come from models of its own slice."""
    tokenizers = pytest.importorskip("tokenizers")
    for name, words in (("one", "abcd"), ("two", "abef"), ("three", "aghe")):
        ids = {word: i for i, word in enumerate(words)}
        tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="a")).save(f"{name}/tokenizer.json")
        config = json.loads((here / name / "config.json").read_text())
        arrays = {key: a[:4] if "embed" in key or "head" in key else a for key, a in tensors(ord(name[1])).items()}
        for file in (here / name).glob("*.safetensors"):
            file.unlink()
        folder(f"{name}.new", arrays, **{**config, "vocab_size": 4})
        (here / name / "tokenizer.json").rename(here / f"{name}.new" / "tokenizer.json")
    text = """
merge_method: linear
slices:
  - sources: [{model: one.new, layer_range: [0, 2]}, {model: two.new, layer_range: [0, 2]}]
  - sources: [{model: three.new, layer_range: [2, 4]}]
parameters: {weight: 1}
tokenizer: {source: union, pad_to_multiple_of: 6}
"""
    made = make(text)
    made.companions(here)
    found = {job.name: run(job) for job in made.jobs}
    ids = tokenizers.Tokenizer.from_file("tokenizer.json").get_vocab()
    assert set(ids) == set("abcdefgh")
    assert json.loads((here / "config.json").read_text())["vocab_size"] == 12
    embed = {name: load(f"{name}.new")["model.embed_tokens.weight"] for name in ("one", "two")}
    rows = found["model.embed_tokens.weight"]
    np.testing.assert_allclose(rows[ids["b"]], (embed["one"][1] + embed["two"][1]) / 2, rtol=1e-6)
    np.testing.assert_allclose(rows[ids["c"]], embed["one"][2], rtol=1e-6)
    np.testing.assert_array_equal(rows[ids["g"]], 0)
    np.testing.assert_allclose(found["lm_head.weight"][ids["g"]], load("three.new")["lm_head.weight"][1], rtol=1e-6)


def test_compat_ignores_what_mergekit_ignores_and_says_so(here):
    text = """
merge_method: slerp
base_model: one
models: [{model: one}, {model: two, parameters: {t: 0.9}}]
parameters: {t: 0.3, density: 0.5}
colour: blue
"""
    made = make(text, compat="mergekit")
    assert made.jobs[0].coefficients == {"t": 0.3}
    assert len([note for note in made.notes if "ignored, as mergekit does" in note]) == 1
    assert len([note for note in made.notes if "no effect" in note]) == 2


def test_folders_of_weights_alone(here):
    for name in ("one", "odd"):
        if name == "odd":
            folder("odd", tensors(9, head=False))
        (here / name / "config.json").unlink()
    text = "merge_method: linear\nmodels: [{model: one}, {model: two}]\nparameters: {weight: 1}\n"
    made = make(text)
    made.companions(here)
    assert {"one has no config.json", "one has no tokenizer.json"} <= set(made.notes)
    assert not (here / "config.json").exists()
    # Nothing says that its head is its embedding.
    with pytest.raises(ValueError, match=r"model 'odd' does not match 'one': lacks 1 tensors \(lm_head.weight\)"):
        make(text.replace("two", "odd"))


def test_layers_are_counted_where_the_config_counts_them(here):
    text = "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [1, 3]}]}]\n"
    folder("a", tensors(1), num_hidden_layers=None)
    config = json.loads((here / "a" / "config.json").read_text())
    del config["num_hidden_layers"]
    for more, wanted in [
        ({"n_layer": 4}, {"n_layer": 2}),
        ({"text_config": {"num_layers": 4}}, {"text_config": {"num_layers": 2}}),
    ]:
        (here / "a" / "config.json").write_text(json.dumps({**config, **more}))
        make(text).companions(here)
        assert wanted.items() <= json.loads((here / "config.json").read_text()).items()
    (here / "a" / "config.json").write_text(json.dumps(config))
    assert any("which key of config.json counts them is not clear" in note for note in make(text).notes)


def test_layers_that_only_another_model_has(here):
    folder("odd", tensors(9) | {"vision.blocks.0.w": np.ones(3, np.float32)})
    text = """
merge_method: linear
slices: [{sources: [{model: one, layer_range: [0, 4]}, {model: odd, layer_range: [0, 4]}]}]
parameters: {weight: 1}
"""
    with pytest.raises(ValueError, match=r"'odd' does not match 'one': has 1 that it lacks \(vision.blocks.0.w\)"):
        make(text)
    modules = "{model: {models: [{model: one}, {model: odd}]}, lm_head: {models: [{model: one}]}}"
    with pytest.raises(ValueError, match=r"1 tensors \(vision.blocks.0.w\) of 'odd' are of no module of the recipe"):
        make(f"merge_method: linear\nmodules: {modules}\nparameters: {{weight: 1}}\n")


@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_keep_probabilities_of_della_must_be_probabilities(here, method):
    text = f"merge_method: {method}\nbase_model: base\nmodels: [{{model: one}}]\nparameters: "
    for density, epsilon in ((0.9, 0.15), (0.1, 0.1), (0.5, 0.5)):
        with pytest.raises(ValueError, match=rf"of model 'one': density {density} with epsilon .*, wanted in \(0, 1\)"):
            make(f"{text}{{weight: 1, density: {density}, epsilon: {epsilon}}}\n")
        with pytest.raises(ValueError, match="wanted in"):
            jaxmerge.della([{}], base={}, key=jax.random.key(0), density=[density], epsilon=epsilon)
    for density in (0, 1):
        make(f"{text}{{weight: 1, density: {density}}}\n")
