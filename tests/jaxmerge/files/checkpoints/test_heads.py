"""Heads tied under any family's names, layers that store [in, out], and names with other words in front."""

import json
import pathlib

import numpy as np
import pytest

from jaxmerge.files import merge
from jaxmerge.files.checkpoints import adapter, safetensors
from jaxmerge.files.checkpoints.open import open_source
from jaxmerge.files.checkpoints.source import read

R = np.random.default_rng(0)
FAMILIES = {
    "llama": ("model.embed_tokens.weight", "lm_head.weight"),
    "gpt2": ("transformer.wte.weight", "lm_head.weight"),
    "gpt2 as published": ("wte.weight", "lm_head.weight"),
    "falcon": ("transformer.word_embeddings.weight", "lm_head.weight"),
    "gpt_neox": ("gpt_neox.embed_in.weight", "embed_out.weight"),
    "opt": ("model.decoder.embed_tokens.weight", "lm_head.weight"),
    "gemma3": ("model.language_model.embed_tokens.weight", "lm_head.weight"),
    "gemma3 as published": ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
    "internlm2": ("model.tok_embeddings.weight", "output.weight"),
    "t5": ("shared.weight", "lm_head.weight"),
}


def normal(*shape: int) -> np.ndarray:
    return R.standard_normal(shape).astype(np.float32)


def folder(path: pathlib.Path, arrays: dict[str, np.ndarray], **config) -> pathlib.Path:
    path.mkdir()
    safetensors.write_file(path / safetensors.SINGLE, arrays)
    (path / "config.json").write_text(json.dumps({"tie_word_embeddings": True, **config}))
    return path


def lora(path: pathlib.Path, arrays: dict[str, np.ndarray], **config) -> pathlib.Path:
    path.mkdir()
    safetensors.write_file(path / adapter.WEIGHTS, {f"base_model.model.{key}": array for key, array in arrays.items()})
    (path / adapter.CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}))
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_stored_twice_is_written_once(tmp_path, family):
    embedding, head = FAMILIES[family]
    weight = normal(8, 4)
    base = folder(tmp_path / "a", {embedding: weight, head: weight})
    assert set(open_source(str(base)).tensors) == {embedding}
    other = folder(tmp_path / "b", {embedding: weight, head: normal(8, 4)})
    with pytest.raises(ValueError, match=f"{head} differs from {embedding}"):
        open_source(str(other))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapted_embedding_leaves_the_head_as_it_was(tmp_path, family):
    embedding, head = FAMILIES[family]
    weight, a, b = normal(8, 4), normal(2, 8), normal(4, 2)
    base = folder(tmp_path / "a", {embedding: weight}, text_config={"tie_word_embeddings": True})
    module = embedding.removesuffix(".weight")
    factors = {f"{module}.lora_embedding_A": a, f"{module}.lora_embedding_B": b}
    apart = open_source(f"{base}+{lora(tmp_path / 'x', factors)}")
    assert np.array_equal(read(apart.tensors[head]), weight)
    assert np.allclose(read(apart.tensors[embedding]), weight + 2 * (b @ a).T, atol=1e-5)
    assert (apart.config["tie_word_embeddings"], apart.config["text_config"]["tie_word_embeddings"]) == (False, False)
    tied = open_source(f"{base}+{lora(tmp_path / 'y', factors, ensure_weight_tying=True)}")
    assert set(tied.tensors) == {embedding}
    assert tied.config["tie_word_embeddings"] is True


def test_a_model_whose_class_has_no_head_gets_none(tmp_path):
    base = folder(tmp_path / "a", {"model.embed_tokens.weight": normal(8, 4)}, architectures=["LlamaModel"])
    saved = lora(tmp_path / "x", {"model.embed_tokens.weight": normal(8, 4)})
    assert set(open_source(f"{base}+{saved}").tensors) == {"model.embed_tokens.weight"}


def test_models_with_and_without_a_head_of_their_own_are_merged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weight, own = normal(8, 4), normal(8, 4)
    folder(tmp_path / "own", {"transformer.wte.weight": weight, "lm_head.weight": own}, tie_word_embeddings=False)
    folder(tmp_path / "tied", {"transformer.wte.weight": weight})
    (tmp_path / "r.yaml").write_text(
        "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: own}, {model: tied}]\n"
    )
    merge("r.yaml", "out")
    found = open_source("out").tensors
    assert np.allclose(read(found["lm_head.weight"]), (own + weight) / 2, atol=1e-6)


# --- [in, out] ---

SQUARE = "transformer.h.0.attn.c_proj"


@pytest.mark.parametrize("said", [True, False])
def test_the_class_of_a_layer_decides_whether_a_square_matrix_is_transposed(tmp_path, said):
    """PEFT writes `fan_in_fan_out` as it was for the last module it adapted: here once of each kind."""
    weight, a, b = normal(4, 4), normal(2, 4), normal(4, 2)
    factors = {f"{SQUARE}.lora_A.weight": a, f"{SQUARE}.lora_B.weight": b}
    saved = lora(tmp_path / "x", factors, fan_in_fan_out=said)
    for kind, delta in (("gpt2", (b @ a).T), ("gpt_bigcode", b @ a)):  # Conv1D, and Linear under the same name
        base = folder(tmp_path / kind, {f"{SQUARE}.weight": weight}, model_type=kind)
        found = read(open_source(f"{base}+{saved}").tensors[f"{SQUARE}.weight"])
        assert np.allclose(found, weight + 2 * delta, atol=1e-5), kind


def test_shapes_decide_for_a_class_that_is_not_known_and_a_square_one_is_refused(tmp_path):
    wide = "h.0.attn.c_attn"
    arrays = {f"{wide}.weight": normal(4, 12), "h.0.attn.c_proj.weight": normal(4, 4)}
    base = folder(tmp_path / "a", arrays, model_type="of their own")
    a, b = normal(2, 4), normal(12, 2)
    factors = {f"{wide}.lora_A.weight": a, f"{wide}.lora_B.weight": b}
    found = read(open_source(f"{base}+{lora(tmp_path / 'x', factors)}").tensors[f"{wide}.weight"])
    assert np.allclose(found, arrays[f"{wide}.weight"] + 2 * (b @ a).T, atol=1e-5)
    factors |= {"h.0.attn.c_proj.lora_A.weight": normal(2, 4), "h.0.attn.c_proj.lora_B.weight": normal(4, 2)}
    with pytest.raises(ValueError, match=r"whether h\.0\.attn\.c_proj\.weight .* cannot be told, because it is square"):
        open_source(f"{base}+{lora(tmp_path / 'y', factors, fan_in_fan_out=True)}")


# --- names ---

DISK = (
    "model.layers.0.q.weight", "model.language_model.layers.0.q.weight", "language_model.model.layers.0.q.weight",
    "transformer.layers.0.q.weight", "layers.0.q.weight",
)  # fmt: skip


@pytest.mark.parametrize("disk", DISK)
@pytest.mark.parametrize("trained", DISK)
def test_words_in_front_of_a_name_do_not_matter(tmp_path, disk, trained):
    weight, a, b = normal(4, 4), normal(2, 4), normal(4, 2)
    other = "vision_tower.layers.0.q.weight"
    base = folder(tmp_path / "a", {disk: weight, other: weight})
    module = trained.removesuffix(".weight")
    source = open_source(f"{base}+{lora(tmp_path / 'x', {f'{module}.lora_A.weight': a, f'{module}.lora_B.weight': b})}")
    assert np.allclose(read(source.tensors[disk]), weight + 2 * b @ a, atol=1e-5)
    assert np.array_equal(read(source.tensors[other]), weight)


def test_a_name_that_may_be_two_tensors_fits_none(tmp_path):
    base = folder(tmp_path / "a", {"model.layers.0.q.weight": normal(4, 4), "layers.0.q.weight": normal(4, 4)})
    factors = {
        "transformer.layers.0.q.lora_A.weight": normal(2, 4),
        "transformer.layers.0.q.lora_B.weight": normal(4, 2),
    }
    with pytest.raises(ValueError, match="2 tensors fit no tensor"):
        open_source(f"{base}+{lora(tmp_path / 'x', factors)}")


def test_an_adapter_of_a_classifier_says_so(tmp_path):
    base = folder(tmp_path / "a", {"model.layers.0.q.weight": normal(4, 4)})
    saved = lora(tmp_path / "x", {"score.modules_to_save.weight": normal(2, 4)}, task_type="SEQ_CLS")
    with pytest.raises(ValueError, match="the adapter is for SEQ_CLS, whose head this model may lack"):
        open_source(f"{base}+{saved}")
