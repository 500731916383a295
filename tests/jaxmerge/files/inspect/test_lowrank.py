"""LoRA adapters extracted: the best factors, what is left out is said, and back to the tuned model."""

import dataclasses
import json
import math

import ml_dtypes
import numpy as np
import pytest
from helpers.tiny_adapters import MODULES, NORMS, D, Q, V, alike, applied, folder, normal, weights
from safetensors import safe_open
from safetensors.numpy import load_file

from jaxmerge.files.checkpoints import adapter
from jaxmerge.files.checkpoints.open import open_source
from jaxmerge.files.inspect import lowrank


@pytest.fixture
def base(tmp_path):
    return folder(tmp_path / "base", weights(0))


def low_rank(shape: tuple[int, int], decay: float, seed: int = 0) -> np.ndarray:
    """A matrix with singular values e^{−decay·i}."""
    r = np.random.default_rng(seed)
    small = min(shape)
    u, v = (np.linalg.qr(r.standard_normal((n, small)))[0] for n in shape)
    return ((u * np.exp(-decay * np.arange(small))) @ v.T).astype(np.float32)


class Held:
    """A tensor in memory."""

    name, where, chunked = "model.norm.weight", "memory", True

    def __init__(self, array):
        self.array, self.dtype, self.shape, self.size = array, array.dtype, array.shape, array.nbytes

    def read_into(self, buffer, start=0):
        buffer[:] = self.array.view(np.uint8)[start : start + buffer.size]


def best(delta: np.ndarray, rank: int) -> float:
    s = np.linalg.svd(delta.astype(np.float64), compute_uv=False) ** 2
    return s[:rank].sum() / s.sum()


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (5, 7)])
@pytest.mark.parametrize("scale", [1.0, 0.25, 4.0])
def test_exact_factors_are_the_best(shape, scale):
    delta = low_rank(shape, 0.1)
    a, b, facts = lowrank.factor(delta, 6, scale)
    assert a.shape == (6, shape[1])
    assert b.shape == (shape[0], 6)
    rest = np.square(delta - scale * b @ a).sum() / np.square(delta).sum()
    assert facts["method"] == "exact"
    assert facts["explained"] == pytest.approx(best(delta, 6), abs=1e-5)
    assert 1 - rest == pytest.approx(facts["explained"], abs=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.01, 0.1])
@pytest.mark.parametrize("size", [1.0, 1e-25])
def test_randomised_factors_say_what_they_explain(decay, size):
    delta = np.float32(size) * low_rank((600, 700), decay)
    if decay == 0.0:  # the hardest: all directions nearly alike
        delta = np.float32(size) * normal(600, 700)
    a, b, facts = lowrank.factor(delta, 20)
    assert facts["method"] == "randomised"
    wide = delta.astype(np.float64) / size
    rest = np.square(wide - b.astype(np.float64) / size @ a).sum() / np.square(wide).sum()
    assert 1 - rest == pytest.approx(facts["explained"], abs=1e-5)
    assert facts["gain"] < 0.005
    assert best(wide, 20) - facts["explained"] < max(5 * facts["gain"], 1e-4)


def test_zero_delta_and_padding():
    a, b, facts = lowrank.factor(np.zeros((4, 6), np.float32), 9)
    assert not a.any()
    assert not b.any()
    assert (facts["explained"], facts["rank"]) == (1.0, 4)


def trained(seed: int, names, amount: float = 0.05, dtype: type = np.float32, tied: bool = False):
    """Weights with a change in the tensors of these ends."""
    base, other = weights(0, dtype, tied), weights(seed, np.float32, tied)
    return {
        n: (w.astype(np.float32) + amount * other[n]).astype(dtype) if n.endswith(tuple(names)) else w
        for n, w in base.items()
    }


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("alpha", [None, 5.5])
def test_base_and_full_rank_adapter_are_the_tuned_model(tmp_path, dtype, alpha):
    tuned = trained(1, [".weight"], dtype=dtype)
    base = folder(tmp_path / "base", weights(0, dtype))
    tuned_folder = folder(tmp_path / "tuned", tuned)
    seen = []
    report = lowrank.extract_lora(
        open_source(str(base)), open_source(str(tuned_folder)), tmp_path / "lora", rank=500, alpha=alpha,
        progress=lambda *args: seen.append(args),
    )  # fmt: skip
    assert report["rank"] == D  # the largest that a matrix has
    assert report["explained"] == pytest.approx(1.0, abs=1e-5)
    assert set(report["tensors"]) == {f"{m}.weight" for m in MODULES}
    assert set(report["whole"]) == set(tuned) - set(report["tensors"])
    assert not report["left_out"]
    assert seen[-1][:2] == (len(MODULES), len(MODULES))
    json.dumps(report)
    found = applied(base, tmp_path / "lora")
    for name, wanted in tuned.items():
        alike(found[name], wanted, 8.0 if dtype == np.float32 else 1.0)
        if name in report["whole"]:
            assert np.array_equal(found[name], wanted)


def test_the_adapter_has_a_card(tmp_path, base):
    tuned = folder(tmp_path / "tuned", trained(1, ["q_proj.weight"]))
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    report = lowrank.extract_lora(open_source(str(base)), open_source(str(tuned)), tmp_path / "lora", rank=1)
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "library_name: peft" in card
    assert "license:" not in card  # the tuned model states none
    assert f"rank 1 (lora_alpha 1). {100 * report['explained']:.1f} % of the squared norm" in card
    assert 'PeftModel.from_pretrained(base, "lora")' in card
    assert str(tmp_path) not in card


def test_what_is_left_out_is_said(tmp_path, base):
    tuned = folder(tmp_path / "tuned", trained(1, ["q_proj.weight", "norm.weight", "lm_head.weight"]))
    sources = open_source(str(base)), open_source(str(tuned))
    report = lowrank.extract_lora(*sources, tmp_path / "lora", rank=2, save=["lm_head"], dtype="bfloat16")
    assert set(report["tensors"]) == {f"model.layers.{l}.self_attn.q_proj.weight" for l in range(2)}
    assert set(report["whole"]) == {"lm_head.weight"}
    assert set(report["left_out"]) == {f"{n}.weight" for n in [*NORMS, "model.norm"]}
    assert all(0.03 < share < 0.08 for share in report["left_out"].values())
    found, wanted, start = (
        applied(base, tmp_path / "lora"),
        trained(1, ["q_proj.weight", "norm.weight", "lm_head.weight"]),
        weights(0),
    )
    lost = sum(np.square(found[n] - wanted[n]).sum() for n in found)
    assert report["lost"] == pytest.approx(math.sqrt(lost / sum(np.square(w).sum() for w in start.values())), rel=0.01)
    moved = sum(np.square(start[n] - wanted[n]).sum() for n in found)
    assert report["explained"] == pytest.approx(1 - lost / moved, abs=0.01)
    config = json.loads((tmp_path / "lora" / adapter.CONFIG).read_text())
    assert (config["target_modules"], config["modules_to_save"], config["r"]) == (["q_proj"], ["lm_head"], 2)
    with safe_open(tmp_path / "lora" / adapter.WEIGHTS, "numpy") as file:
        assert {file.get_slice(k).get_dtype() for k in file.keys() if "lora_" in k} == {"BF16"}  # noqa: SIM118 (no dict)


def test_modules_are_named_in_full_where_the_end_means_others(tmp_path, base):
    tuned = folder(tmp_path / "tuned", trained(1, ["1.self_attn.q_proj.weight", "model.norm.weight"]))
    lowrank.extract_lora(open_source(str(base)), open_source(str(tuned)), tmp_path / "lora", rank=2)
    config = json.loads((tmp_path / "lora" / adapter.CONFIG).read_text())
    assert config["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    assert config["modules_to_save"] == ["model.norm"]  # `norm` would be every layer norm to PEFT


def test_targets_embeddings_and_transposed_weights(tmp_path):
    arrays = {"h.0.attn.c_attn.weight": normal(D, 3 * D), "wte.weight": normal(V, D, seed=3)}
    other = {n: (a + np.float32(0.1) * normal(*a.shape, seed=5)).astype(np.float32) for n, a in arrays.items()}
    base = folder(tmp_path / "base", arrays, model_type="gpt2")
    tuned = folder(tmp_path / "tuned", other, model_type="gpt2")
    sources = open_source(str(base)), open_source(str(tuned))
    report = lowrank.extract_lora(*sources, tmp_path / "lora", rank=D, targets=["c_attn", "wte"])
    assert set(report["tensors"]) == set(arrays)
    found = load_file(tmp_path / "lora" / adapter.WEIGHTS)
    assert found["base_model.model.transformer.wte.lora_embedding_A"].shape == (D, V)
    for name, array in applied(base, tmp_path / "lora").items():
        alike(array, other[name], 8.0)


@pytest.mark.parametrize("cut", [{"explained": 0.9}, {"ratio": 0.3}, {"explained": 0.99, "rank": 4}])
def test_thresholds_choose_the_rank_of_each_matrix(tmp_path, base, cut):
    """The smallest rank that holds the share, or the values above a share of the largest; `rank` is the most."""
    tuned = folder(tmp_path / "tuned", trained(1, ["proj.weight"]))
    sources = open_source(str(base)), open_source(str(tuned))
    report = lowrank.extract_lora(*sources, tmp_path / "lora", alpha=None if "ratio" in cut else 5.0, **cut)
    found, wanted, start = applied(base, tmp_path / "lora"), trained(1, ["proj.weight"]), weights(0)
    config = json.loads((tmp_path / "lora" / adapter.CONFIG).read_text())
    for module in MODULES:
        delta = (wanted[f"{module}.weight"] - start[f"{module}.weight"]).astype(np.float64)
        u, s, v = np.linalg.svd(delta)
        share = np.cumsum(s**2) / np.sum(s**2)
        rank = int(np.sum(s >= 0.3 * s[0])) if "ratio" in cut else int(np.sum(share < cut["explained"])) + 1
        rank = min(rank, cut.get("rank", D))
        assert report["tensors"][f"{module}.weight"]["rank"] == config["rank_pattern"].get(module, config["r"]) == rank
        made = found[f"{module}.weight"] - start[f"{module}.weight"]
        assert np.abs(made - u[:, :rank] * s[:rank] @ v[:rank]).max() < 1e-5
    assert report["rank"] == max(facts["rank"] for facts in report["tensors"].values())


def test_excluded_weights_are_not_factored(tmp_path, base):
    tuned = folder(tmp_path / "tuned", trained(1, ["proj.weight", "embed_tokens.weight", "lm_head.weight"]))
    sources = open_source(str(base)), open_source(str(tuned))
    report = lowrank.extract_lora(
        *sources, tmp_path / "lora", rank=2, targets=["mlp", "embed_tokens"], exclude=["layers/1", "up_proj"],
        save=["lm_head"],
    )  # fmt: skip
    assert set(report["tensors"]) == {
        "model.embed_tokens.weight", *(f"model.layers.0.mlp.{p}_proj.weight" for p in ("gate", "down")),
    }  # fmt: skip
    assert set(report["whole"]) == {"lm_head.weight"}
    assert "model.layers.1.mlp.up_proj.weight" in report["left_out"]


NAMES_IN_MEMORY = {
    "gpt2 as published": ("GPT2LMHeadModel", "wte", "h.0.mlp.c_fc", "transformer.wte", "transformer.h.0.mlp.c_fc"),
    "a bare decoder": ("LlamaForCausalLM", "embed_tokens", "layers.0.q", "model.embed_tokens", "model.layers.0.q"),
    "of its own class": ("LlamaModel", "embed_tokens", "layers.0.q", "embed_tokens", "layers.0.q"),
    "a wrapper as published": (
        "Gemma3ForConditionalGeneration", "language_model.model.embed_tokens", "language_model.model.layers.0.q",
        "model.language_model.embed_tokens", "model.language_model.layers.0.q",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NAMES_IN_MEMORY)
def test_modules_are_named_as_they_are_in_memory(tmp_path, case):
    """PEFT passes over what is named as in the files, without an error."""
    architecture, embedding, matrix, saved, adapted = NAMES_IN_MEMORY[case]
    arrays = {f"{embedding}.weight": normal(V, D), f"{matrix}.weight": normal(D, D)}
    changed = {name: array + normal(*array.shape, seed=4) for name, array in arrays.items()}
    said = {"architectures": [architecture], "model_type": "x"}
    one, two = folder(tmp_path / "one", arrays, **said), folder(tmp_path / "two", changed, **said)
    lowrank.extract_lora(open_source(str(one)), open_source(str(two)), tmp_path / "lora", rank=D)
    keys = set(load_file(tmp_path / "lora" / adapter.WEIGHTS))
    assert f"base_model.model.{adapted}.lora_A.weight" in keys
    assert f"base_model.model.{saved}.weight" in keys
    found = applied(one, tmp_path / "lora")
    assert all(np.allclose(found[name], array, atol=1e-4) for name, array in changed.items())


def test_parameters_that_peft_cannot_keep_alone_are_left_out_and_said(tmp_path):
    """A parameter beside adapted modules in one module, and one in no module at all."""
    arrays = {
        "model.layers.0.self_attn.q.weight": normal(D, D), "model.layers.0.self_attn.sinks": normal(4),
        "model.layers.0.norm.weight": normal(D), "A_log": normal(3),
    }  # fmt: skip
    changed = {name: array + 1 for name, array in arrays.items()}
    one, two = folder(tmp_path / "one", arrays), folder(tmp_path / "two", changed)
    report = lowrank.extract_lora(open_source(str(one)), open_source(str(two)), tmp_path / "lora", rank=2)
    assert set(report["left_out"]) == {"model.layers.0.self_attn.sinks", "A_log"}
    assert set(report["whole"]) == {"model.layers.0.norm.weight"}


def test_extraction_refuses(tmp_path, base):
    same = folder(tmp_path / "same", weights(0))
    sources = open_source(str(base)), open_source(str(same))
    with pytest.raises(ValueError, match=r"differs from .* in nothing"):
        lowrank.extract_lora(*sources, tmp_path / "lora", rank=2)
    norms = open_source(str(folder(tmp_path / "norms", trained(1, ["norm.weight"]))))
    with pytest.raises(ValueError, match="only 5 tensors that save= leaves out"):
        lowrank.extract_lora(sources[0], norms, tmp_path / "lora", rank=2, save=())
    with pytest.raises(ValueError, match="matches none of the"):
        lowrank.extract_lora(sources[0], norms, tmp_path / "lora", rank=2, targets="experts")
    with pytest.raises(ValueError, match="no rank; give rank=16, or explained"):
        lowrank.extract_lora(*sources, tmp_path / "lora")
    with pytest.raises(ValueError, match=r"explained is 1\.5, wanted a share"):
        lowrank.extract_lora(*sources, tmp_path / "lora", explained=1.5)
    for wrong in ({"rank": 0}, {"rank": 2, "dtype": "int8"}):
        with pytest.raises(ValueError, match=r"rank is 0, wanted a whole|dtype 'int8'; wanted one of"):
            lowrank.extract_lora(*sources, tmp_path / "lora", **wrong)
    with pytest.raises(ValueError, match="alpha is -1"):
        lowrank.extract_lora(sources[0], norms, tmp_path / "lora", rank=2, alpha=-1)
    arrays = trained(1, ["q_proj.weight"])
    arrays[f"{Q}.weight"][0, 0] = np.nan
    bad = open_source(str(folder(tmp_path / "bad", arrays)))
    with pytest.raises(ValueError, match="has 1 NaN and 0 infinite"):
        lowrank.extract_lora(sources[0], bad, tmp_path / "lora", rank=2)
    wide = folder(tmp_path / "wide", weights(0) | {"lm_head.weight": normal(V + 1, D)})
    with pytest.raises(ValueError, match=r"lm_head.weight.*has shape \[32, 12\], wanted \[31, 12\]"):
        lowrank.extract_lora(sources[0], open_source(str(wide)), tmp_path / "lora", rank=2)
    more = folder(tmp_path / "more", weights(0) | {"score.weight": normal(2, D)})
    with pytest.raises(ValueError, match="has 1 that it lacks"):
        lowrank.extract_lora(sources[0], open_source(str(more)), tmp_path / "lora", rank=2)
    held = np.dtype(ml_dtypes.float8_e4m3b11fnuz)
    odd = [
        dataclasses.replace(of, tensors={**of.tensors, "model.norm.weight": Held(np.full(D, value, held))})
        for of, value in zip(sources, (1, 2), strict=True)
    ]
    with pytest.raises(ValueError, match=r"norm\.weight' of memory is float8_e4m3b11fnuz, which safetensors cannot"):
        lowrank.extract_lora(odd[0], odd[1], tmp_path / "lora", rank=2)
    assert not (tmp_path / "lora").exists()


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["all", "tied", "some", "biases", "ranks"])
def test_peft_loads_what_is_extracted(tmp_path, case):
    pytest.importorskip("peft")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tied, biases = case == "tied", case == "biases"
    ends = ["1.self_attn.q_proj.weight", "mlp.up_proj.weight", "model.norm.weight"] if case == "some" else [""]
    start, other = weights(0, tied=tied), weights(1, tied=tied)
    if biases:
        start |= {f"{m}.bias": normal(s[0]) for m, s in MODULES.items()}
        other |= {f"{m}.bias": normal(s[0], seed=4) for m, s in MODULES.items()}
    tuned = {n: w + np.float32(0.1) * other[n] if n.endswith(tuple(ends)) else w for n, w in start.items()}
    settings = {"tie_word_embeddings": tied, "attention_bias": biases, "mlp_bias": biases}
    base = folder(tmp_path / "base", start, **settings)
    sources = open_source(str(base)), open_source(str(folder(tmp_path / "tuned", tuned, **settings)))
    # Shares so near to 1 that ranks differ and nothing is lost.
    cut = {"explained": 0.999999} if case == "ranks" else {"rank": D, "alpha": 7}
    lowrank.extract_lora(*sources, tmp_path / "lora", **cut)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora")
    merged = {k: v.detach().numpy() for k, v in model.merge_and_unload().state_dict().items()}
    for name, wanted in tuned.items():
        alike(merged[name], wanted, 8e4 if case == "ranks" else 8.0)
    if tied:
        alike(merged["lm_head.weight"], tuned["model.embed_tokens.weight"])
