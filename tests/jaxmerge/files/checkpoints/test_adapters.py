"""LoRA adapters: applied as the formula says, and as PEFT does."""

import math
import os
import pathlib
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from helpers.llamas import Reluctant
from helpers.tiny_adapters import (
    DOWN,
    MODULES,
    D,
    F,
    Q,
    R,
    V,
    adapter_folder,
    alike,
    applied,
    factors,
    folder,
    normal,
    weights,
)

from jaxmerge.files.checkpoints import adapted, adapter
from jaxmerge.files.checkpoints import source as source_module
from jaxmerge.files.checkpoints.open import open_source
from jaxmerge.files.checkpoints.source import read


@pytest.fixture
def base(tmp_path):
    return folder(tmp_path / "base", weights(0))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16, np.float64])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_formula(tmp_path, dtype, rslora):
    arrays = weights(0, dtype)
    base = folder(tmp_path / "base", arrays)
    parts = factors(Q, MODULES[Q]) | factors(DOWN, MODULES[DOWN], 5)
    config = {"rank_pattern": {"mlp.down_proj": 5}, "alpha_pattern": {r"layers\.1\.mlp.down_proj": 40}}
    found = applied(base, adapter_folder(tmp_path / "lora", parts, use_rslora=rslora, **config))
    assert list(found) == list(open_source(str(base)).tensors)
    for module, rank, alpha in ((Q, R, 6), (DOWN, 5, 40)):
        scale = alpha / (math.sqrt(rank) if rslora else rank)
        a, b = (parts[f"{module}.lora_{x}.weight"].astype(np.float64) for x in "AB")
        name = f"{module}.weight"
        assert found[name].dtype == dtype
        alike(found[name], arrays[name].astype(np.float64) + scale * b @ a, 4.0)
    for name in set(arrays) - {f"{Q}.weight", f"{DOWN}.weight"}:
        assert np.array_equal(found[name], arrays[name])


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_any_run_of_elements_is_what_the_whole_has(tmp_path, base, dtype):
    base = folder(tmp_path / "other", weights(0, dtype))
    parts = factors(DOWN, MODULES[DOWN]) | {"lm_head.weight": normal(V, D)}
    parts |= {"model.embed_tokens.lora_embedding_A": normal(R, V), "model.embed_tokens.lora_embedding_B": normal(D, R)}
    tensors = open_source(f"{base}+{adapter_folder(tmp_path / 'lora', parts)}").tensors
    for name in (f"{DOWN}.weight", "lm_head.weight", "model.embed_tokens.weight"):
        tensor = tensors[name]
        assert tensor.chunked
        assert tensor.name == name
        whole, width = read(tensor).reshape(-1), tensor.dtype.itemsize
        for start, stop in ((0, 1), (7, 19), (11, 12), (20, 200), (239, 240)):
            buffer = np.empty((stop - start) * width, np.uint8)
            tensor.read_into(buffer, start * width)
            assert np.array_equal(buffer.view(tensor.dtype), whole[start:stop])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("rows", "rank", "columns"), [(70, 1, 9000), (70, 4, 12), (130, 16, 1100), (33, 300, 64), (5, 3, 1)]
)
def test_any_rows_of_a_product_are_what_the_whole_has(rows, rank, columns, dtype):
    """As `left[first:last] @ right` would not be on every processor; `.ci/run numeric` holds it to others than this."""
    r = np.random.default_rng(0)
    left = r.standard_normal((-(-rows // adapted.TILE_ROWS) * adapted.TILE_ROWS, rank)).astype(dtype)
    right = r.standard_normal((rank, columns)).astype(dtype)
    whole = adapted.multiply_rows(left, right, 0, rows)
    assert whole.dtype == dtype
    alike(whole, (left.astype(np.longdouble) @ right)[:rows], 4.0 + math.sqrt(rank))
    for first, last in [*((i, i + 1) for i in range(rows)), (0, min(3, rows)), (rows // 2, rows), (1, rows - 1)]:
        assert np.array_equal(adapted.multiply_rows(left, right, first, last), whole[first:last])


def test_the_number_of_threads_changes_no_bit_of_a_product():
    program = (
        "import numpy as np, zlib; from jaxmerge.files.checkpoints.adapted import multiply_rows\n"
        "r = np.random.default_rng(0)\n"
        "for rank in (16, 256, 1000):\n"
        "  left, right = (r.standard_normal(s, np.float32) for s in ((2048, rank), (rank, 700)))\n"
        "  print(zlib.crc32(multiply_rows(left, right, 0, 2048)))"
    )
    found = [
        subprocess.run(
            [sys.executable, "-c", program], env=os.environ | {"OPENBLAS_NUM_THREADS": threads}, check=True,
            capture_output=True, text=True,
        ).stdout.split()
        for threads in ("1", "2")
    ]  # fmt: skip
    assert len(found[0]) == 3
    assert found[0] == found[1]


def test_a_base_that_cannot_be_read_in_parts_is_read_once(tmp_path, base, monkeypatch):
    monkeypatch.setattr(source_module, "BLOCK_BYTES", 64)
    lora = adapter_folder(tmp_path / "lora", factors(DOWN, MODULES[DOWN]))
    wanted = applied(base, lora)[f"{DOWN}.weight"]
    source = open_source(str(base))
    source.tensors[f"{DOWN}.weight"] = slow = Reluctant(source.tensors[f"{DOWN}.weight"])
    tensor = adapter.apply(source, lora).tensors[f"{DOWN}.weight"]
    assert not tensor.chunked
    assert np.array_equal(read(tensor), wanted)
    assert slow.reads == 1


def test_two_adapters(tmp_path, base):
    one = adapter_folder(tmp_path / "one", factors(Q, MODULES[Q]))
    two = adapter_folder(tmp_path / "two", factors(Q, MODULES[Q], seed=4))
    found = {n: read(t) for n, t in open_source(f"{base}+{one}+{two}").tensors.items()}[f"{Q}.weight"]
    parts = [factors(Q, MODULES[Q], seed=seed) for seed in (9, 4)]
    wanted = weights(0)[f"{Q}.weight"] + sum(2.0 * p[f"{Q}.lora_B.weight"] @ p[f"{Q}.lora_A.weight"] for p in parts)
    alike(found, wanted, 4.0)


def test_embeddings_transposed_weights_and_biases(tmp_path):
    arrays = {"h.0.attn.c_attn.weight": normal(D, 3 * D), "h.0.attn.c_attn.bias": normal(3 * D)}
    arrays["wte.weight"] = normal(V, D, seed=3)
    base = folder(tmp_path / "base", arrays, model_type="gpt2")
    c = "h.0.attn.c_attn"
    parts = factors(c, (3 * D, D)) | {f"{c}.lora_B.bias": normal(3 * D, seed=2)}
    parts |= {"wte.lora_embedding_A": normal(R, V), "wte.lora_embedding_B": normal(D, R)}
    found = applied(base, adapter_folder(tmp_path / "lora", parts, fan_in_fan_out=True, lora_bias=True))
    a, b = parts[f"{c}.lora_A.weight"], parts[f"{c}.lora_B.weight"]
    alike(found[f"{c}.weight"], arrays[f"{c}.weight"] + 2.0 * (b @ a).T)
    alike(found[f"{c}.bias"], arrays[f"{c}.bias"] + 2.0 * parts[f"{c}.lora_B.bias"])
    a, b = parts["wte.lora_embedding_A"], parts["wte.lora_embedding_B"]
    alike(found["wte.weight"], arrays["wte.weight"] + 2.0 * (b @ a).T)


def test_dora(tmp_path, base):
    parts = factors(Q, MODULES[Q]) | {f"{Q}.lora_magnitude_vector": np.abs(normal(D))}
    found = applied(base, adapter_folder(tmp_path / "lora", parts, use_dora=True))[f"{Q}.weight"]
    made = weights(0)[f"{Q}.weight"] + 2.0 * parts[f"{Q}.lora_B.weight"] @ parts[f"{Q}.lora_A.weight"]
    wanted = made * (parts[f"{Q}.lora_magnitude_vector"] / np.linalg.norm(made, axis=1))[:, None]
    alike(found, wanted, 4.0)


def test_modules_to_save_take_the_models_dtype(tmp_path):
    base = folder(tmp_path / "base", weights(0, ml_dtypes.bfloat16))
    parts = {"model.norm.weight": normal(D), "lm_head.modules_to_save.default.weight": normal(V, D)}
    found = applied(base, adapter_folder(tmp_path / "lora", parts))
    assert np.array_equal(found["model.norm.weight"], parts["model.norm.weight"].astype(ml_dtypes.bfloat16))
    assert np.array_equal(found["lm_head.weight"], normal(V, D).astype(ml_dtypes.bfloat16))


def test_tied_head(tmp_path):
    base = folder(tmp_path / "base", weights(0, tied=True), tie_word_embeddings=True)
    e = "model.embed_tokens"
    both = {f"{e}.weight": normal(V, D), "lm_head.weight": normal(V, D)}
    same = open_source(f"{base}+{adapter_folder(tmp_path / 'same', both)}")
    assert "lm_head.weight" not in same.tensors
    assert same.config["tie_word_embeddings"] is True
    new = {f"{e}.weight": normal(V, D)}
    embedding = open_source(f"{base}+{adapter_folder(tmp_path / 'one', new)}")  # PEFT's forward pass: the head stays
    assert np.array_equal(read(embedding.tensors["lm_head.weight"]), weights(0, tied=True)[f"{e}.weight"])
    assert np.array_equal(read(embedding.tensors[f"{e}.weight"]), normal(V, D))
    assert embedding.config["tie_word_embeddings"] is False
    assert "now they are apart" in embedding.notes[-1]
    ensured = adapter_folder(tmp_path / "ensured", new, ensure_weight_tying=True)
    kept = open_source(f"{base}+{ensured}")
    assert "lm_head.weight" not in kept.tensors
    assert kept.config["tie_word_embeddings"] is True
    assert "both change" in kept.notes[-1]
    apart = open_source(f"{base}+{adapter_folder(tmp_path / 'apart', factors('lm_head', (V, D)))}")
    assert apart.config["tie_word_embeddings"] is False
    assert "adapts the head" in apart.notes[-1]
    own = weights(0, tied=True)[f"{e}.weight"]
    assert np.array_equal(read(apart.tensors[f"{e}.weight"]), own)
    alike(read(apart.tensors["lm_head.weight"]), own + 2.0 * normal(V, R) @ normal(R, D))
    plain = open_source(f"{base}+{adapter_folder(tmp_path / 'plain', factors(Q, MODULES[Q]))}")
    assert not plain.notes
    assert "lm_head.weight" not in plain.tensors


def test_names_of_a_bare_decoder(tmp_path, base):
    parts = factors(Q.removeprefix("model."), MODULES[Q])
    found = applied(base, adapter_folder(tmp_path / "lora", parts))
    assert not np.array_equal(found[f"{Q}.weight"], weights(0)[f"{Q}.weight"])


def test_files_are_watched(tmp_path, base):
    lora = adapter_folder(tmp_path / "lora", factors(Q, MODULES[Q]))
    source = open_source(f"{base}+{lora}")
    assert {f.name for f in source.files} == {"model.safetensors", adapter.CONFIG, adapter.WEIGHTS}
    assert str(lora / adapter.WEIGHTS) in source.tensors[f"{Q}.weight"].where


WRONG = {
    "another model": (factors("model.layers.7.mlp.up_proj", (F, D)), {}, r"2 tensors fit no tensor.*layers\.7\.mlp"),
    "half": ({f"{Q}.lora_A.weight": normal(R, D)}, {}, "wanted its A and its B"),
    "kind": ({}, {"peft_type": "IA3"}, "peft_type is 'IA3'"),
    "pissa": ({}, {"init_lora_weights": "pissa_niter_4"}, "changed the base's weights too"),
    "qalora": ({}, {"use_qalora": True}, "use_qalora=True is not known"),
    "rank": (factors(Q, (D, D), 5), {}, "has rank 5, .* says 3"),
    "alpha": (factors(Q, (D, D)), {"lora_alpha": None}, "lora_alpha is None"),
    "width": (factors(Q, (D, D + 1)), {}, r"has shape \[3, 13\], wanted \[3, 12\]"),
    "vocabulary": ({"lm_head.weight": normal(V + 2, D)}, {}, "vocabulary was extended"),
    "vector": (factors("model.norm", (D, D)), {}, "only matrices"),
    "bias": (factors(Q, (D, D)) | {f"{Q}.lora_B.bias": normal(D)}, {}, "1 tensors fit no tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused(tmp_path, base, case):
    parts, config, match = WRONG[case]
    lora = adapter_folder(tmp_path / "lora", parts or factors(Q, MODULES[Q]), **config)
    with pytest.raises(ValueError, match=match):
        open_source(f"{base}+{lora}")


def test_no_adapter_there(tmp_path, base):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no adapter_config\.json"):
        adapter.apply(open_source(str(base)), tmp_path / "empty")
    lora = adapter_folder(tmp_path / "lora", factors(Q, MODULES[Q]))
    (lora / adapter.WEIGHTS).unlink()
    with pytest.raises(ValueError, match="save it as safetensors"):
        adapter.apply(open_source(str(base)), lora)


# --- PEFT (Python 3.11, extra `torch` and peft) -------------------------------------------------------------


def peft_adapter(base: pathlib.Path, out: pathlib.Path, dtype: str, **config) -> dict[str, np.ndarray]:
    """Let PEFT make an adapter with random weights, save it and merge it; the merged tensors."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    model = get_peft_model(model, LoraConfig(r=R, lora_alpha=6, task_type="CAUSAL_LM", **config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(out)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype)), out)
    return {k: v.detach().float().numpy() for k, v in model.merge_and_unload().state_dict().items()}


PEFT = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"up_proj": 5, "layers.1.self_attn.q_proj": 4},
        "alpha_pattern": {"q_proj": 11},
    },
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "saved": {"target_modules": ["o_proj"], "modules_to_save": ["lm_head", "norm"]},
    "dora": {"target_modules": ["gate_proj", "o_proj"], "use_dora": True},
    "bias": {"target_modules": ["q_proj", "up_proj"], "bias": "lora_only"},
    "biases": {"target_modules": ["q_proj"], "bias": "all"},
    "lora_bias": {"target_modules": ["q_proj"], "lora_bias": True},
}


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", PEFT)
def test_applied_is_what_peft_merges(tmp_path, case, dtype):
    pytest.importorskip("peft")
    arrays = weights(0, np.float32 if dtype == "float32" else ml_dtypes.bfloat16)
    with_bias = "bias" in case
    if with_bias:
        arrays |= {f"{m}.bias": normal(s[0]).astype(arrays[f"{m}.weight"].dtype) for m, s in MODULES.items()}
    base = folder(tmp_path / "base", arrays, attention_bias=with_bias, mlp_bias=with_bias)
    wanted = peft_adapter(base, tmp_path / "lora", dtype, **PEFT[case])
    found = applied(base, tmp_path / "lora")
    assert set(found) == set(wanted)
    changed = 0
    for name, array in found.items():
        # DoRA's norms are taken in the weight's dtype there.
        alike(array, wanted[name], 8.0 if dtype == "float32" else 3.0 if case == "dora" else 1.0)
        changed += not np.array_equal(array, arrays[name])
    assert changed >= 2


def test_a_pattern_of_an_adapter_takes_no_time(tmp_path, base):
    parts = factors(Q, MODULES[Q])
    slow = adapter_folder(tmp_path / "slow", parts, alpha_pattern={r"(\w+\.?)+!": 9})
    assert applied(base, slow)
    odd = adapter_folder(tmp_path / "odd", parts, rank_pattern={"(?=q)q_proj": 9})
    with pytest.raises(ValueError, match=r"odd/adapter_config.json: rank_pattern: pattern .* cannot be matched safely"):
        applied(base, odd)
