"""Whole recipes against mergekit 0.1.5: the same names, shapes, dtypes and values, tensor by tensor.

Run by hand or in CI on Python 3.11 with the extra `oracle`:
`pytest -m oracle tests/jaxmerge/files/test_recipes_oracle.py`.
"""

import json
import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest
import yaml
from helpers.draws import uniform
from helpers.llamas import equal, folder, load, make, merged, tensors

from jaxmerge.files import layers, merge
from jaxmerge.files.chat import TEMPLATES
from jaxmerge.files.checkpoints import shards, source

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(["base", "one", "two", "three"]):
        folder(name, tensors(seed))
    return tmp_path


@pytest.fixture
def oracle():
    """Return mergekit's whole merge: recipe text → the tensors it writes into a folder."""
    pytest.importorskip("torch")
    config = pytest.importorskip("mergekit.config")
    merge = pytest.importorskip("mergekit.merge")
    options = pytest.importorskip("mergekit.options")
    tasks = pytest.importorskip("mergekit.io.tasks")

    def run(text, out="out", **more):
        tasks.LoaderCache().loaders.clear()  # by path: another test's models have the same
        parsed = config.MergeConfiguration.model_validate(yaml.safe_load(text))
        wanted = {"copy_tokenizer": False, "quiet": True, "write_model_card": False, **more}
        merge.run_merge(parsed, out, options=options.MergeOptions(**wanted))
        return {name: source.read(tensor) for name, tensor in shards.open_folder(pathlib.Path(out))[0].items()}

    return run


def both(oracle, text, ours=None, **its):
    """Merge with both and compare tensors; return how many bfloat16 values differ by one step."""
    return equal(merged(text, **(ours or {})), oracle(text, **its))


TWO = "models: [{model: one, parameters: {weight: 0.4}}, {model: two, parameters: {weight: 0.9}}]\n"
BARE = "models: [{model: one}, {model: two}]\n"
FIVE_POINTS = """
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5
"""
CASES = {
    "linear": """
merge_method: linear
models:
  - {model: one, parameters: {weight: 0.3}}
  - {model: two, parameters: {weight: [0.1, 0.9]}}
  - {model: three, parameters: {weight: 1e-1}}
""",
    "linear with a base that is not listed": """
merge_method: linear
base_model: base
models: [{model: one, parameters: {weight: 0.3}}, {model: two}]
parameters: {weight: [1, 0.5], normalize: false}
""",
    "linear, conditions that fall through": """
merge_method: linear
models:
  - {model: one, parameters: {weight: [{filter: mlp, value: [0, 1, 0.5]}, {filter: layers.1, value: 0.25}]}}
  - {model: two}
parameters: {weight: 0.75}
""",
    "ties": """
merge_method: ties
base_model: base
models:
  - model: base
  - model: one
    parameters: {density: [1, 0.7, 0.1], weight: 1.0}
  - model: two
    parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}
  - model: three
    parameters:
      density: 0.33
      weight: [{filter: mlp, value: 0.5}, {value: 0}]
parameters: {normalize: true, int8_mask: true}
""",
    "slerp": f"""
merge_method: slerp
base_model: one
slices:
  - sources:
      - {{model: one, layer_range: [0, 4]}}
      - {{model: two, layer_range: [0, 4]}}
{FIVE_POINTS}""",
    "slerp of whole models, the base last": f"merge_method: slerp\nbase_model: two\n{BARE}{FIVE_POINTS}",
    "nuslerp": f"merge_method: nuslerp\n{TWO}",
    "nuslerp from a base": f"merge_method: nuslerp\nbase_model: base\n{TWO}parameters: {{nuslerp_flatten: 0}}\n",
    "multislerp": f"merge_method: multislerp\nbase_model: base\n{TWO}parameters: {{normalize_weights: 'no'}}\n",
    "karcher": f"merge_method: karcher\nbase_model: base\n{BARE}parameters: {{max_iter: 5}}\n",
    "task_arithmetic": f"merge_method: task_arithmetic\nbase_model: base\n{TWO}parameters: {{lambda: [0.7, 1.2]}}\n",
    "breadcrumbs": """
merge_method: breadcrumbs_ties
base_model: base
models:
  - {model: one, parameters: {weight: 0.4, gamma: 0.05}}
  - {model: two, parameters: {weight: 0.9}}
parameters: {density: 0.6, normalize: [true, false]}
""",
    "sce": f"merge_method: sce\nbase_model: base\n{BARE}parameters: {{select_topk: 0.6}}\n",
    "model_stock": f"merge_method: model_stock\nbase_model: base\n{BARE}",
    "nearswap": "merge_method: nearswap\nbase_model: base\nmodels: [{model: one}]\nparameters: {t: 1e-2}\n",
    "ram": f"merge_method: ramplus_tl\nbase_model: base\n{BARE}parameters: {{epsilon: 5e-2}}\n",
    "dare_linear that keeps all": f"merge_method: dare_linear\nbase_model: base\n{TWO}",
    "slices of slices": """
merge_method: task_arithmetic
base_model: base
slices:
  - sources:
      - {model: one, layer_range: [0, 2], parameters: {weight: [0.1, 0.5]}}
      - {model: base, layer_range: [0, 2]}
      - {model: two, layer_range: [1, 3]}
    parameters: {weight: 2, lambda: 0.3}
  - base_model: three
    sources:
      - {model: three, layer_range: [1, 4]}
      - {model: one, layer_range: [0, 3], parameters: {weight: [{filter: layers.2, value: 0.7}, {value: 0.2}]}}
    parameters: {lambda: [{filter: layers.4.mlp, value: 0.6}, {value: [1, 0.5]}]}
  - sources:
      - {model: two, layer_range: [3, 4], parameters: {weight: [0.1, 0.7]}}
      - {model: base, layer_range: [2, 3]}
  - sources: [{model: base, layer_range: [3, 4]}]
parameters: {weight: 1.5}
""",
    "modules": """
merge_method: linear
modules:
  default:
    slices:
      - sources:
          - {model: one, layer_range: [0, 4], parameters: {weight: 0.4}}
          - {model: two, layer_range: [0, 4]}
    parameters: {weight: 0.2}
parameters: {weight: 0.9}
""",
    "a slice of no layers gives the embedding": """
merge_method: passthrough
slices:
  - sources: [{model: one, layer_range: [0, 0]}]
  - sources: [{model: two, layer_range: [0, 3]}]
  - sources: [{model: three, layer_range: [4, 4]}]
""",
}


@pytest.mark.parametrize("case", CASES)
def test_recipe(here, oracle, case):
    compat = {"compat": "mergekit"} if case in ("sce", "model_stock") else {}
    both(oracle, CASES[case] + "dtype: float32\n", compat)


@pytest.mark.parametrize("case", ["ties", "slerp", "slices of slices", "karcher"])
def test_recipe_through_the_command(here, oracle, case):
    (here / "recipe.yaml").write_text(CASES[case] + "dtype: float32\n")
    merge("recipe.yaml", "ours")
    equal(load("ours"), oracle(CASES[case] + "dtype: float32\n"))
    ours, its = (json.loads((here / path / "config.json").read_text()) for path in ("ours", "out"))
    assert ours["num_hidden_layers"] == its["num_hidden_layers"]


def test_stages(here, oracle):
    multimerge = pytest.importorskip("mergekit.scripts.multimerge")
    testing = pytest.importorskip("click.testing")
    (here / "recipe.yaml").write_text("""
merge_method: linear
models: [{model: second, parameters: {weight: 1}}, {model: three, parameters: {weight: [0, 1]}}]
dtype: float32
---
name: second
merge_method: task_arithmetic
base_model: first
models: [{model: two}]
parameters: {weight: 1.5}
dtype: float32
---
name: first
merge_method: linear
models: [{model: one, parameters: {weight: 1}}, {model: base, parameters: {weight: 2}}]
dtype: float32
""")
    options = ["recipe.yaml", "--out-path", "out", "-I", "between", "--no-copy-tokenizer", "--no-write-model-card"]
    done = testing.CliRunner().invoke(multimerge.main, options)
    assert done.exit_code == 0, done.output
    merge("recipe.yaml", "ours")
    equal(load("ours"), load("out"))


def test_a_union_of_tokens_fills_rows_from_the_slice_they_are_in(here, oracle):
    tokenizers = pytest.importorskip("tokenizers")
    for seed, (name, words) in enumerate([("a", "wxyz"), ("b", "wxuv"), ("c", "wtsu"), ("d", "wtxr")]):
        arrays = {key: a[:4] if "embed" in key or "head" in key else a for key, a in tensors(seed).items()}
        folder(name, arrays, vocab_size=4)
        ids = {word: i for i, word in enumerate(words)}
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="w"))
        backend.save(f"{name}/tokenizer.json")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w"}
        (here / name / "tokenizer_config.json").write_text(json.dumps(config))
    text = """
merge_method: task_arithmetic
base_model: a
slices:
  - sources:
      - {model: a, layer_range: [0, 2]}
      - {model: b, layer_range: [0, 2], parameters: {weight: 0.5}}
      - {model: d, layer_range: [0, 2], parameters: {weight: 0.8}}
  - base_model: c
    sources:
      - {model: b, layer_range: [1, 3], parameters: {weight: 0.7}}
      - {model: c, layer_range: [1, 3]}
      - {model: d, layer_range: [2, 4], parameters: {weight: 0.3}}
tokenizer: {source: union}
dtype: float32
"""
    found, its = merged(text), oracle(text)
    make(text).companions(here)
    ours, theirs = (tokenizers.Tokenizer.from_file(p).get_vocab() for p in ("tokenizer.json", "out/tokenizer.json"))
    assert set(ours) == set(theirs)
    rows = [theirs[word] for word in sorted(ours, key=lambda word: ours[word])]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        its[name] = its[name][rows]
    equal(found, its)


@pytest.mark.parametrize("case", ["linear", "ties", "slerp", "multislerp", "slices of slices"])
def test_bfloat16_from_float32(here, oracle, case):
    """`dtype: float32, out_dtype: bfloat16`: to one step of bfloat16, and that in a value of 250 at most."""
    # Sums of bfloat16 often lie halfway between two of them, and a processor's kernels decide float32's last place.
    text = CASES[case]
    # Of magnitudes that are equal, as many are of bfloat16 deltas, its TIES keeps which its sort likes: not compared.
    stored = np.float32 if case == "ties" else ml_dtypes.bfloat16
    for seed, name in enumerate(["base", "one", "two", "three"]):
        folder(f"half-{name}", tensors(seed, dtype=stored))
        text = text.replace(f"model: {name}", f"model: half-{name}")
    wanted = oracle(text + "dtype: float32\nout_dtype: bfloat16\n")
    differ = equal(merged(text + "dtype: float32\nout_dtype: bfloat16\n"), wanted)
    assert differ <= sum(array.size for array in wanted.values()) // 250


def test_a_stack_of_44_layers(here, oracle):
    folder("deep", tensors(5, layers=12), layers=12)
    ranges = [[0, 11], [1, 12], [0, 11], [1, 12]]
    scale = "parameters: {scale: [{filter: o_proj, value: 0.5}, {filter: down_proj, value: [0, 1]}, {value: 1.0}]}"
    sources = "\n".join(f"  - sources: [{{model: deep, layer_range: {edges}, {scale}}}]" for edges in ranges)
    text = f"merge_method: passthrough\nslices:\n{sources}\ndtype: float32\n"
    both(oracle, text)
    assert len(load("out")) == 44 * 9 + 3
    make(text).companions(here)
    ours, its = (json.loads((path / "config.json").read_text()) for path in (here, here / "out"))
    assert ours["num_hidden_layers"] == its["num_hidden_layers"] == 44


@pytest.mark.parametrize("method", ["dare_ties", "dare_linear", "della"])
def test_random_methods_of_three_with_our_masks(here, oracle, monkeypatch, method):
    torch = pytest.importorskip("torch")
    family = pytest.importorskip("mergekit.merge_methods.generalized_task_arithmetic")
    text = f"""
merge_method: {method}
base_model: base
models:
  - model: base
  - {{model: one, parameters: {{weight: 0.4, density: 0.53}}}}
  - {{model: two, parameters: {{weight: [0.3, 0.6], density: [0.4, 0.8]}}}}
  - {{model: three, parameters: {{weight: 0.9, density: 0.63}}}}
dtype: float32
"""
    draws = []

    def keyed(self, group, /, **parameters):
        path, shape = group.metadata.name.replace(".", "/"), group.base.tensor.shape
        draws[:] = [uniform(jax.random.key(0), path, str(entry.id), shape) for entry in group.non_base]
        return merge_group(self, group, **parameters)

    def bernoulli(p):
        return (torch.from_numpy(draws.pop(0)).reshape(p.shape) < p).to(p.dtype)

    merge_group = family.GeneralizedTaskArithmeticMerge.merge_group
    monkeypatch.setattr(family.GeneralizedTaskArithmeticMerge, "merge_group", keyed)
    monkeypatch.setattr(torch, "bernoulli", bernoulli)
    both(oracle, text)


def test_arcee_fusion(here, oracle):
    """Against its formula in float64: in float32 it selects rounding noise."""
    text = "merge_method: arcee_fusion\nbase_model: base\nmodels: [{model: one}]\nout_dtype: float32\n"
    ours, its = merged(text + "dtype: float32\n"), oracle(text + "dtype: float64\n")
    base = load("base")
    taken, wanted = ({(n, i) for n in m for i in np.flatnonzero(m[n] != base[n])} for m in (ours, its))
    assert len(taken & wanted) / len(taken | wanted) >= 0.99


@pytest.mark.parametrize(("one", "two"), [("bfloat16", "float32"), ("bfloat16", "float16")])
def test_dtypes_that_differ_are_promoted(here, oracle, one, two):
    dtypes = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
    folder("a", tensors(1, dtype=dtypes[one]))
    folder("b", tensors(2, dtype=dtypes[two]))
    text = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: [0.3, 1]}\n"
    both(oracle, text, {"compat": "mergekit"})


@pytest.mark.parametrize("base", ["base", "tied"])
def test_tied_and_untied_together(here, oracle, base):
    folder("tied", tensors(7, head=False), tie_word_embeddings=True)
    folder("tied too", tensors(8, head=False), tie_word_embeddings=True)
    text = f"merge_method: task_arithmetic\nbase_model: {base}\nparameters: {{weight: 0.5}}\ndtype: float32\n"
    both(oracle, text + "models: [{model: one}, {model: tied too}]\n", {"compat": "mergekit"})
    if base == "tied":
        both(oracle, text + "models: [{model: tied too}]\n")


def test_one_layer_and_its_gradient(here, oracle):
    folder("a", tensors(1, layers=1), layers=1)
    folder("b", tensors(2, layers=1), layers=1)
    both(oracle, "merge_method: linear\nmodels: [{model: a, parameters: {weight: [0.3, 0.9]}}, {model: b, "
         "parameters: {weight: 1}}]\ndtype: float32\n")  # fmt: skip


def test_embeddings_cut_to_the_smallest(here, oracle):
    more = tensors(9)
    more |= {name: np.pad(more[name], ((0, 3), (0, 0))) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    folder("more", more, vocab_size=19)
    text = "merge_method: linear\nmodels: [{model: more}, {model: one}]\nparameters: {weight: 1}\ndtype: float32\n"
    both(oracle, text, {"compat": "mergekit", "allow": ["shapes"]}, unsafe_truncate_embeddings=True)
    make(text, compat="mergekit", allow=["shapes"]).companions(here)
    assert json.loads((here / "config.json").read_text())["vocab_size"] == 16


def test_the_last_slice_has_more_sources_than_the_first(here, oracle):
    text = """
merge_method: linear
slices:
  - sources: [{model: one, layer_range: [0, 2]}]
  - sources: [{model: two, layer_range: [2, 4]}, {model: three, layer_range: [2, 4]}]
parameters: {weight: 1}
dtype: float32
"""
    both(oracle, text, {"compat": "mergekit"})
    norm = merged(text)["model.norm.weight"]
    two, three = (load(name)["model.norm.weight"] for name in ("two", "three"))
    np.testing.assert_allclose(norm, (two + three) / 2, rtol=1e-6)


def test_before_and_after_the_layers_are_as_in_its_tables(oracle):
    """The names in mergekit's tables of language models; where `is_before` differs, it says so here."""
    definitions = pytest.importorskip("mergekit.architecture.json_definitions")
    differ = set()
    for architecture in definitions.JSON_ARCHITECTURES:
        if set(architecture.modules) != {"default"}:
            continue
        definition = architecture.modules["default"].architecture.definition
        for before, weights in ((True, definition.pre_weights), (False, definition.post_weights)):
            differ |= {w.name for w in weights if "layers." not in w.name and layers.is_before(w.name) != before}
    assert differ == set()


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi "}]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("system", [True, False])
@pytest.mark.parametrize("prompt", [True, False])
def test_named_chat_templates_but_for_white_space(name, count, system, prompt):
    import importlib.resources

    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    data = importlib.resources.files("mergekit._data.chat_templates")
    turns = [MESSAGES[1], {"role": "assistant", "content": "Ho."}, MESSAGES[1]][: 2 * count - 1]
    messages = MESSAGES[:1] * system + turns
    render = lambda template: utils.render_jinja_template(  # noqa: E731
        [messages], chat_template=template, add_generation_prompt=prompt, bos_token="<s>", eos_token="</s>"
    )[0][0]
    squeezed = lambda template: "".join(render(template).split())  # noqa: E731
    assert squeezed(TEMPLATES[name]) == squeezed(data.joinpath(f"{name}.jinja").read_text())
