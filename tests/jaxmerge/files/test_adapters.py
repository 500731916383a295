"""Adapters merged with adapters: what comes out is what the rule makes of the changes, and loads as an adapter."""

import json

import jax
import numpy as np
import pytest
from helpers.tiny_adapters import DOWN, D, F, Q, V, adapter_folder, alike, applied, factors, folder, normal, weights
from safetensors.numpy import load_file, save_file

from jaxmerge.files import merge
from jaxmerge.files.checkpoints import adapter
from jaxmerge.files.held import Held
from jaxmerge.files.methods import METHODS as METHODS_OF
from jaxmerge.files.verdict import Unsure
from jaxmerge.files.verify import verify
from jaxmerge.rules import RULES

EMBEDDING = "model.embed_tokens"
KEYS = {"base_model_name_or_path": "org/base", "task_type": "CAUSAL_LM"}
FIRST = "model.layers.0.mlp.down_proj"
SHARED = {FIRST: (D, F), DOWN: (D, F)}  # of one shape, so that few programs are compiled
SCALES = {FIRST: (2.0, 3 / np.sqrt(2)), DOWN: (2.0, 5 / np.sqrt(4))}


def parts_of(ranks, seed, modules=SHARED):
    """Factors of modules, each of a rank."""
    found = {}
    for (module, shape), rank in zip(modules.items(), ranks, strict=True):
        found |= factors(module, shape, rank, seed)
    return found


def product(arrays, module, scale):
    arrays = {name.removeprefix("base_model.model."): np.asarray(a, np.float64) for name, a in arrays.items()}
    if f"{module}.lora_embedding_A" in arrays:
        return scale * arrays[f"{module}.lora_embedding_B"] @ arrays[f"{module}.lora_embedding_A"]
    return scale * arrays[f"{module}.lora_B.weight"] @ arrays[f"{module}.lora_A.weight"]


@pytest.fixture
def pair(tmp_path):
    """Two adapters of one base, unlike in rank, alpha and rsLoRA; and their changes in float64."""
    one, two = parts_of((3, 3), 9), parts_of((2, 4), 4)
    adapter_folder(tmp_path / "one", one, target_modules=["down_proj"], **KEYS)
    patterns = {"rank_pattern": {"1.mlp.down_proj": 4}, "alpha_pattern": {"layers.0.mlp.down_proj": 3}}
    said = {"r": 2, "lora_alpha": 5, "use_rslora": True, "target_modules": ["down_proj"]}
    adapter_folder(tmp_path / "two", two, **patterns, **said, **KEYS)
    return {m: [product(a, m, s) for a, s in zip((one, two), SCALES[m], strict=True)] for m in SHARED}


def recipe(tmp_path, method="linear", names=("one", "two"), at=None, **keys):
    at = at or [{"weight": 1.0}] * len(names)
    models = [{"model": str(tmp_path / n), **({"parameters": p} if p else {})} for n, p in zip(names, at, strict=True)]
    return {"merge_method": method, "models": models, **keys}


def merged(tmp_path, out="out", allow=(), **keys):
    report = merge(recipe(tmp_path, **keys), tmp_path / out, allow=allow)
    config = json.loads((tmp_path / out / adapter.CONFIG).read_text())
    return load_file(tmp_path / out / adapter.WEIGHTS), config, report


@pytest.mark.parametrize("space", ["core", "knots", "products"])
def test_a_linear_rule_sums_the_changes_in_every_space(tmp_path, pair, space):
    """What PEFT calls cat: nothing is lost, whatever the ranks, the alphas and rsLoRA."""
    arrays, config, report = merged(
        tmp_path, method="task_arithmetic", at=[{"weight": 0.7}, {"weight": -1.3}], adapter=space
    )
    for module, changes in pair.items():
        alike(product(arrays, module, 1.0).astype(np.float32), 0.7 * changes[0] - 1.3 * changes[1], 16.0)
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (7, 7, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {FIRST: 5}
    assert (config["target_modules"], config["base_model_name_or_path"]) == (["down_proj"], "org/base")
    assert report["tensors"] == 2
    assert "100.00 % of the merged change (squared norm) is in the adapter" in report["notes"]


def test_cut_to_a_rank_it_is_the_best_of_that_rank(tmp_path, pair):
    """What PEFT calls svd, without the matrix."""
    arrays, config, report = merged(tmp_path, adapter={"space": "core", "rank": 2})
    assert (config["r"], config["rank_pattern"]) == (2, {})
    kept, every = 0.0, 0.0
    for module, changes in pair.items():
        u, s, v = np.linalg.svd((changes[0] + changes[1]) / 2)
        alike(product(arrays, module, 1.0).astype(np.float32), u[:, :2] * s[:2] @ v[:2], 16.0)
        kept, every = kept + np.sum(s[:2] ** 2), every + np.sum(s**2)
    assert f"{100 * kept / every:.2f} % of the merged change (squared norm) is in the adapter" in report["notes"]


def test_thresholds_choose_the_rank_of_each_module(tmp_path, pair):
    for cut in ({"explained": 0.9}, {"ratio": 0.3}):
        arrays, config, _ = merged(tmp_path, out=next(iter(cut)), adapter={"space": "knots", **cut})
        wanted = {}
        for module, changes in pair.items():
            s = np.linalg.svd(sum(changes), compute_uv=False)
            share = np.cumsum(s**2) / np.sum(s**2)
            wanted[module] = int(np.sum(share < 0.9)) + 1 if "explained" in cut else int(np.sum(s >= 0.3 * s[0]))
            assert arrays[f"base_model.model.{module}.lora_A.weight"].shape[0] == wanted[module]
        assert {m: config["rank_pattern"].get(m, config["r"]) for m in SHARED} == wanted


METHODS = {
    "ties": {"weight": 0.5, "density": 0.4}, "dare_linear": {"weight": 0.5, "density": 0.6}, "iso_c": {"weight": 1.0},
    "breadcrumbs": {"weight": 0.5, "density": 0.3, "gamma": 0.0},
}  # fmt: skip


def by_rule(method, leaves, path="w", **given):
    """What the library's rule makes of leaves whose base is zero, in float64."""
    base = {path: np.zeros(leaves[0].shape, np.float32)}
    found = RULES[method]([{path: np.asarray(leaf, np.float32)} for leaf in leaves], base=base, **given)
    return np.asarray(found[path], np.float64)


@pytest.mark.parametrize("method", METHODS)
def test_a_product_is_what_the_rule_makes_of_the_products(tmp_path, pair, method):
    at = METHODS[method]
    arrays, _, _ = merged(tmp_path, method=method, at=[at] * 2, seed=3, adapter={"space": "products", "rank": D})
    for module, changes in pair.items():
        given = {{"weight": "weights"}.get(key, key): [value] * 2 for key, value in at.items()}
        path = f"{module.replace('.', '/')}/weight"
        if method == "dare_linear":
            names = [str(tmp_path / name) for name in ("one", "two")]
            given |= {"key": jax.random.key(3, impl="threefry2x32"), "names": names, "rescale": "l1"}
        alike(product(arrays, module, 1.0).astype(np.float32), by_rule(method, changes, path, **given), 32.0)


def test_it_is_what_the_models_merge_to_random_masks_included(tmp_path, pair):
    """Base + merged adapter is the merge of base + one and base + two, where the rank is full."""
    base = folder(tmp_path / "base", {f"{module}.weight": normal(D, F) for module in pair})
    models = [
        {"model": f"{base}+{tmp_path / name}", "parameters": {"weight": 0.5, "density": 0.6}} for name in ("one", "two")
    ]
    of = {"merge_method": "dare_linear", "models": models, "base_model": str(base), "seed": 3}
    merge(of, tmp_path / "whole")
    merge(of | {"adapter": {"space": "products", "rank": D}}, tmp_path / "out")
    found, wanted = applied(base, tmp_path / "out"), load_file(tmp_path / "whole" / "model.safetensors")
    for name in wanted:
        alike(found[name], wanted[name], 32.0)


def test_knots_is_the_rule_on_the_shared_basis(tmp_path, pair):
    """[Δ_1 Δ_2] = U·S·[V_1ᵀ V_2ᵀ] of whole matrices; the result is U·rule(S·V_iᵀ)."""
    arrays, _, _ = merged(tmp_path, method="magmax", adapter="knots")
    for module, changes in pair.items():
        rank = sum(np.linalg.matrix_rank(change) for change in changes)
        u, s, v = np.linalg.svd(np.concatenate(changes, axis=1), full_matrices=False)
        leaves = np.split(s[:rank, None] * v[:rank], 2, axis=1)
        wanted = u[:, :rank] @ by_rule("magmax", leaves)
        alike(product(arrays, module, 1.0).astype(np.float32), wanted, 64.0)


def test_core_is_the_rule_on_the_core_matrices(tmp_path, pair):
    """U and V of the stacked factors; M_i = UᵀΔ_iV; the result is U·rule(M_i)·Vᵀ."""
    arrays, _, _ = merged(tmp_path, method="magmax", adapter="core")
    stored = [load_file(tmp_path / name / adapter.WEIGHTS) for name in ("one", "two")]
    for module, changes in pair.items():
        roots = [(np.sqrt(scale), of) for scale, of in zip(SCALES[module], stored, strict=True)]
        a, b = ([root * of[f"base_model.model.{module}.lora_{x}.weight"] for root, of in roots] for x in "AB")
        u = np.linalg.svd(np.concatenate(b, axis=1).astype(np.float64), full_matrices=False)[0]
        v = np.linalg.svd(np.concatenate(a).astype(np.float64), full_matrices=False)[2]
        wanted = u @ by_rule("magmax", [u.T @ change @ v.T for change in changes]) @ v
        alike(product(arrays, module, 1.0).astype(np.float32), wanted, 64.0)


def test_factors_are_merged_apart_with_roots_of_the_weights(tmp_path):
    """What PEFT calls linear; each scale too goes into both factors by its root."""
    parts = [factors(Q, (D, D), 2, seed) for seed in (9, 4)]
    for name, part, alpha in zip(("one", "two"), parts, (4, 6), strict=True):
        adapter_folder(tmp_path / name, part, r=2, lora_alpha=alpha, **KEYS)
    at = [{"weight": 0.5}, {"weight": -0.25}]
    arrays, config, _ = merged(tmp_path, method="task_arithmetic", at=at, adapter="factors", out_dtype="bfloat16")
    a, b = ([part[f"{Q}.lora_{x}.weight"] for part in parts] for x in "AB")
    wanted = (b[0] + np.sqrt(0.75) * b[1]) @ (a[0] - np.sqrt(0.75) * a[1])
    assert {array.dtype.name for array in arrays.values()} == {"bfloat16"}
    alike(product(arrays, Q, 1.0), wanted, 2.0**45)  # of bfloat16 factors, in units of float64
    assert (config["r"], config["target_modules"]) == (2, [Q])


def test_embeddings_and_modules_that_one_adapter_lacks(tmp_path):
    embedding = {f"{EMBEDDING}.lora_embedding_A": normal(2, V), f"{EMBEDDING}.lora_embedding_B": normal(D, 2)}
    adapter_folder(tmp_path / "one", factors(Q, (D, D), 2) | embedding, r=2, lora_alpha=2, **KEYS)
    # The same module, as it is called inside a wrapper, and as older files name its factors.
    wrapped = f"model.language_model.{Q.removeprefix('model.')}"
    parts = {
        k.replace(Q, wrapped).replace(".weight", ".default.weight"): v for k, v in factors(Q, (D, D), 2, 4).items()
    }
    adapter_folder(tmp_path / "two", parts, r=2, lora_alpha=2, **KEYS)
    with pytest.raises(ValueError, match=r"two' lacks 1 modules that another one adapts: model\.embed_tokens; with"):
        merged(tmp_path, adapter="core")
    arrays, config, report = merged(tmp_path, adapter="core", allow=["missing"])
    alike(product(arrays, EMBEDDING, 2.0).astype(np.float32), product(embedding, EMBEDDING, 1.0), 16.0)
    wanted = [product(factors(Q, (D, D), 2, seed), Q, 0.5) for seed in (9, 4)]
    alike(product(arrays, Q, 1.0).astype(np.float32), sum(wanted), 16.0)
    assert any("two changes nothing in 1 modules" in note for note in report["notes"])
    assert config["r"] == 4


def test_what_is_kept_whole_is_copied_where_it_is_alike_and_merged_with_the_base_where_not(tmp_path):
    head, same = normal(V, D, seed=2), normal(D, seed=5)
    base = folder(tmp_path / "base", {f"{Q}.weight": normal(D, D), "model.norm.weight": same, "lm_head.weight": head})
    for name, seed in (("one", 9), ("two", 4)):
        parts = factors(Q, (D, D), 2, seed) | {
            "model.norm.weight": same + 1,
            "model.embed_tokens.base_layer.weight": head,
        }
        parts |= {"lm_head.modules_to_save.weight": head + normal(V, D, seed=seed)} if name == "one" else {}
        kept = ["lm_head", "norm"] if name == "one" else ["norm"]
        adapter_folder(
            tmp_path / name, parts, r=2, modules_to_save=kept, **{**KEYS, "base_model_name_or_path": str(base)}
        )
    arrays, config, _ = merged(tmp_path, adapter="core")
    arrays = {name.removeprefix("base_model.model."): array for name, array in arrays.items()}
    assert np.array_equal(arrays["model.norm.weight"], same + 1)
    assert np.array_equal(arrays["model.embed_tokens.base_layer.weight"], head)
    alike(arrays["lm_head.weight"], head + normal(V, D, seed=9) / 2, 4.0)
    assert config["modules_to_save"] == ["lm_head", "norm"]


def test_the_same_command_again_a_dry_run_and_the_record(tmp_path, pair):
    del pair
    of = recipe(tmp_path, adapter="core", base_model="org/other")
    plan = merge(of, tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists()
    first, again = merge(of, tmp_path / "out"), merge(of, tmp_path / "out")
    assert {key: plan[key] for key in ("tensors", "bytes_in")} == {key: first[key] for key in ("tensors", "bytes_in")}
    assert first["bytes_out"] - plan["bytes_out"] < 2000  # the header
    assert any("is there already" in note for note in again["notes"])
    assert any("'org/other', which the adapters call otherwise" in note for note in first["notes"])
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert (record["base"], record["adapter"]["space"]) == ("org/other", "core")
    assert record["tensors"][DOWN]["rank"] == 7
    card = (tmp_path / "out" / "README.md").read_text()
    assert "2 LoRA adapters of org/other merged with `linear` in the space `core`" in card
    assert "library_name: peft" in card
    assert str(tmp_path) not in card.partition("```yaml")[0]


@pytest.mark.parametrize("space", ["core", "knots", "products"])
def test_verify_replays_the_change_of_every_module(tmp_path, pair, space):
    own = [{"weight": 0.5, "density": 0.6}] * 2
    merge(recipe(tmp_path, method="dare_linear", at=own, adapter=space), tmp_path / "out")
    assert verify(tmp_path / "out")["tensors"] == {"right": 2}
    file = tmp_path / "out" / adapter.WEIGHTS
    arrays = load_file(file)
    turn, first = np.linalg.qr(normal(7, 7))[0], f"base_model.model.{DOWN}.lora_"  # other factors of the same change
    arrays |= {f"{first}A.weight": turn.T @ arrays[f"{first}A.weight"]}
    arrays |= {f"{first}B.weight": np.ascontiguousarray(arrays[f"{first}B.weight"] @ turn)}
    other = f"base_model.model.{FIRST}.lora_B.weight"
    file.unlink()
    save_file(arrays | {other: 2 * arrays[other]}, file)
    report = verify(tmp_path / "out")
    assert [(v.tensor, v.verdict, round(v.strength, 2)) for v in report["wrong"]] == [(FIRST, "wrong strength", 2.0)]
    assert report["code"] == 1
    with pytest.raises(Unsure, match="is no recipe; give of=RECIPE, one with the key 'adapter'"):
        verify(tmp_path / "out", of="base+adapter")


WRONG = {
    "bases": ({"base_model_name_or_path": "org/another"}, {}, "are of different bases: .*'org/base', .*'org/another'"),
    "no base": ({"base_model_name_or_path": None}, {}, "does not say which base it is of"),
    "dora": ({"more": {f"{DOWN}.lora_magnitude_vector": normal(D)}}, {}, "two' is DoRA .* is no product of two"),
    "whole": ({"more": {"lm_head.weight": normal(V, D)}}, {}, r"keep lm_head\.weight whole and differ there"),
    "integers": ({"more": {f"{DOWN}.lora_B.weight": np.ones((D, 2), np.int8)}}, {}, "wanted floats"),
    "lora_bias": ({"more": {f"{DOWN}.lora_B.bias": normal(D)}}, {}, "two' has lora_bias"),
    "kind": ({"peft_type": "IA3"}, {}, "peft_type is 'IA3'"),
    "ranks": ({}, {"adapter": "factors"}, r"has the ranks 3, 2 in the adapters; .* write adapter: core"),
    "shapes": ({"wide": True}, {}, r"is \[12, 21\] in .* and \[12, 20\] in another adapter"),
    "nan": ({"nan": True}, {}, "two.* has NaN or infinite elements"),
    "space": ({}, {"adapter": "cores"}, "unknown space of 'adapter' 'cores'; did you mean 'core'"),
    "key": ({}, {"adapter": {"space": "core", "ranks": 3}}, "unknown key of 'adapter' 'ranks'; did you mean 'rank'"),
    "rank": ({}, {"adapter": {"space": "core", "rank": 0}}, "adapter: rank is 0, wanted a whole number"),
    "share": ({}, {"adapter": {"space": "core", "ratio": 2}}, r"adapter: ratio is 2, wanted a share in \(0, 1\]"),
    "cut": ({}, {"adapter": {"space": "factors", "rank": 2}}, "the result has the adapters' rank; leave rank out"),
    "whole key": ({}, {"tokenizer_source": "union"}, "'tokenizer_source' is of whole models"),
    "count": ({}, {"method": "imm"}, "imm needs 1 model, base.*found 2 adapters"),
    "method": ({}, {"method": "arcee_fusion"}, "arcee_fusion reads the base's own values"),
    "base listed": ({}, {"base_model": "one"}, "stands among the models, which are adapters here"),
    "weights": ({}, {"at": [{"weight": 1}, {"weight": -1}]}, "sum to zero"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused(tmp_path, case):
    config, keys, match = WRONG[case]
    config = dict(config)
    adapter_folder(tmp_path / "one", parts_of((3, 3), 9), **KEYS)
    parts = parts_of((2, 2), 4, {FIRST: (D, F + 1), DOWN: (D, F)} if config.pop("wide", False) else SHARED)
    if config.pop("nan", False):
        parts[f"{DOWN}.lora_A.weight"][0, 0] = np.nan
    adapter_folder(tmp_path / "two", parts | config.pop("more", {}), **{**KEYS, "r": 2, **config})
    if "base_model" in keys:
        keys = keys | {"base_model": str(tmp_path / "one")}
    keys = {"adapter": "core", "method": "linear"} | keys
    keys.setdefault("at", [{"weight": 1.0}] * 2 if "weight" in METHODS_OF[keys["method"]].each else [None, None])
    of = recipe(tmp_path, **keys)
    with pytest.raises(ValueError, match=match):
        merge(of, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_is_no_adapter_stages_and_other_formats(tmp_path, pair):
    del pair
    folder(tmp_path / "base", {f"{DOWN}.weight": normal(D, F)})
    with pytest.raises(ValueError, match="so it is no adapter; a recipe with 'adapter' merges adapters with adapters"):
        merge(recipe(tmp_path, names=("one", "base"), adapter="core"), tmp_path / "out")
    with pytest.raises(ValueError, match="or merge adapters alone with adapter: core"):
        merge(recipe(tmp_path), tmp_path / "out")
    stage = recipe(tmp_path, adapter="core", name="first")
    last = {"merge_method": "passthrough", "models": [{"model": "first"}]}
    with pytest.raises(ValueError, match="recipe of one document"):
        merge([stage, last], tmp_path / "out")
    with pytest.raises(ValueError, match="what is searched is a whole model; name the models as base"):
        Held(recipe(tmp_path, at=[{"weight": {"search": [0.0, 1.0]}}, {"weight": 1}], adapter="core"))
    with pytest.raises(ValueError, match="format='orbax' is for whole models"):
        merge(recipe(tmp_path, adapter="core"), tmp_path / "out", format="orbax")


# --- PEFT (Python 3.11, extra `torch` and peft) -------------------------------------------------------------

# PEFT's combination → method, space, parameters of one adapter. PEFT's ties elects by unweighted factors and divides by
# how many agree, ours by weighted ones and their weights: equal where weights are. Its dare draws other masks.
PEFT = {
    "linear": ("task_arithmetic", "factors", {}),
    "ties": ("ties", "factors", {"density": 0.5}),
    "magnitude_prune": ("breadcrumbs", "factors", {"density": 0.5, "gamma": 0.0}),
    "dare_linear": ("dare_linear", "factors", {"density": 1.0}),
    "cat": ("task_arithmetic", "core", {}),
    "svd": ("task_arithmetic", "knots", {}),
    "ties_svd": ("ties", "products", {"density": 0.5}),
    "dare_linear_svd": ("dare_linear", "products", {"density": 1.0}),
}
WEIGHTED = ("linear", "cat", "svd", "magnitude_prune", "dare_linear", "dare_linear_svd")


@pytest.fixture(scope="module")
def of_peft(tmp_path_factory):
    """A tiny Llama with two adapters that PEFT made and saved: one plain and one with rsLoRA, and an embedding."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    place = tmp_path_factory.mktemp("peft")
    base, model = folder(place / "base", weights(0)), None
    said = {"r": 3, "target_modules": ["embed_tokens", "down_proj"], "task_type": "CAUSAL_LM"}
    for name, more in (("one", {"lora_alpha": 6}), ("two", {"lora_alpha": 2 * 3**0.5, "use_rslora": True})):
        config = peft.LoraConfig(**said, **more)
        if model is None:
            model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.from_numpy(normal(*parameter.shape, seed=i)))
    model.save_pretrained(place)
    return place, model


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("combination", PEFT)
def test_it_is_what_peft_combines_and_peft_loads_it(of_peft, tmp_path, combination):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    place, model = of_peft
    method, space, parameters = PEFT[combination]
    shares = (0.7, -0.4) if combination in WEIGHTED else (1.0, 1.0)
    cut = {"rank": 3} if combination.endswith("svd") else {}
    of = recipe(place, method, at=[{"weight": w} | parameters for w in shares], adapter={"space": space, **cut})
    merge(of, tmp_path / "out")
    given = {"density": parameters["density"]} if parameters else {}
    if cut:
        given |= {"svd_rank": 3, "svd_full_matrices": False}
    model.add_weighted_adapter(["one", "two"], list(shares), combination, combination_type=combination, **given)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "base"), tmp_path / "out")
    found, wanted = dict(loaded.named_modules()), dict(model.named_modules())
    adapted = [name for name, module in found.items() if hasattr(module, "get_delta_weight")]
    assert len(adapted) == 3
    for name in adapted:
        change = wanted[name].get_delta_weight(combination).detach().numpy()
        alike(found[name].get_delta_weight("default").detach().numpy(), change, 64.0)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_peft_loads_ranks_that_differ_by_module(pair, tmp_path):
    pytest.importorskip("peft")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = folder(tmp_path / "base", weights(0))
    merge(recipe(tmp_path, "ties", at=[{"weight": 1.0, "density": 0.5}] * 2, adapter="core"), tmp_path / "out")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    loaded = {name: tensor.detach().numpy() for name, tensor in model.merge_and_unload().state_dict().items()}
    for name, array in applied(base, tmp_path / "out").items():
        alike(loaded[name], array, 8.0)
    assert all(not np.array_equal(loaded[f"{module}.weight"], weights(0)[f"{module}.weight"]) for module in pair)
