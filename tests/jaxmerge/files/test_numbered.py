"""Keys of a config that speak of layers by number, for layers in a new order."""

import re

import pytest

from jaxmerge.files.numbered import Order, rewrite


def rewritten(part, layers, had, others=None, notes=None):
    """Rewrite the config of "a", which has `had` layers; `layers`: of it, or (model, layer)."""
    layers = [layer if isinstance(layer, tuple) else ("a", layer) for layer in layers]
    parts = {"a": part, **(others or {})}
    counts = {model: own.get("num_hidden_layers", had) for model, own in parts.items()}
    order = Order(layers, parts, counts, had)
    return rewrite(part, order, "num_hidden_layers", [] if notes is None else notes)


def test_lists_with_an_entry_a_layer_follow_their_layers():
    part = {"num_hidden_layers": 4, "layer_types": list("abcd"), "no_rope_layers": [1, 1, 1, 0], "eos": [1, 2]}
    part |= {"hybrid_override_pattern": "M*-E"}
    found = rewritten(part, [3, 0, 0], 4)
    assert found["layer_types"] == ["d", "a", "a"]
    assert found["no_rope_layers"] == [0, 1, 1]
    assert found["hybrid_override_pattern"] == "EMM"
    assert (found["num_hidden_layers"], found["eos"]) == (3, [1, 2])


def test_numbers_of_layers_are_those_of_the_result():
    part = {"num_hidden_layers": 4, "mlp_only_layers": [0, 3], "num_experts": 8}
    other = {"b": {"num_hidden_layers": 4, "mlp_only_layers": [1]}}
    assert rewritten(part, [3, 1, 0, 2, 3], 4)["mlp_only_layers"] == [0, 2, 4]
    assert rewritten(part, [0, ("b", 1), ("b", 3)], 4, other)["mlp_only_layers"] == [0, 1]
    # Four numbers and four layers are still numbers.
    assert rewritten({**part, "mlp_only_layers": [0, 1, 2, 3]}, [1, 0], 4)["mlp_only_layers"] == [0, 1]


def test_layers_at_the_start_are_counted_again_or_refused():
    part = {"num_hidden_layers": 6, "first_k_dense_replace": 2}
    assert rewritten(part, [0, 2, 3], 6)["first_k_dense_replace"] == 1
    assert rewritten(part, [0, 1, 0, 1, 4, 5], 6)["first_k_dense_replace"] == 4
    assert rewritten(part, [3, 4], 6)["first_k_dense_replace"] == 0
    assert rewritten(part, [0, 1], 6)["first_k_dense_replace"] == 2
    with pytest.raises(ValueError, match=r"first_k_dense_replace: 2, and .* would stand at \[0, 1, 4, 5\]"):
        rewritten(part, [0, 1, 2, 3, 0, 1, 2], 6)
    plain = {"num_hidden_layers": 6, "max_window_layers": 6, "use_sliding_window": False}
    assert rewritten(plain, [3, 1], 6)["max_window_layers"] == 6


def test_a_step_of_experts_becomes_a_list():
    part = {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [5]}
    found = rewritten(part, [1, 0, 5, 3], 6)  # experts, none, none, experts
    assert (found["decoder_sparse_step"], found["mlp_only_layers"]) == (1, [1, 2])
    assert rewritten({**part, "mlp_only_layers": []}, [2, 3, 0, 1], 6)["decoder_sparse_step"] == 2


def test_a_step_of_0_is_looked_at_where_transformers_divides_by_it():
    part = {"num_hidden_layers": 2, "decoder_sparse_step": 0, "num_experts": 8}
    said = "model 'a': config.json says decoder_sparse_step: {}, wanted a whole number but 0"
    for step in (0, None, "2", 1.5, [1]):
        with pytest.raises(ValueError, match=re.escape(said.format(repr(step)))):
            rewritten({**part, "decoder_sparse_step": step}, [1, 0], 2)
    assert rewritten(part, [0, 1], 2)["decoder_sparse_step"] == 0  # nothing of it changes
    dense = {"decoder_sparse_step": 1, "mlp_only_layers": [0, 1]}
    for more in ({"num_experts": 0}, {"mlp_only_layers": [0, 1]}):
        found = rewritten({**part, **more}, [1, 0], 2)
        assert {key: found[key] for key in dense} == dense
    other = {"b": {"num_hidden_layers": 2, "decoder_sparse_step": 0}}
    with pytest.raises(ValueError, match=re.escape(said.format(0).replace("'a'", "'b'"))):
        rewritten({**part, "decoder_sparse_step": 2}, [0, ("b", 1)], 2, other)


@pytest.mark.parametrize(
    ("key", "own", "wrong"),
    [
        ("mlp_only_layers", [0], 3), ("first_k_dense_replace", 1, "2"), ("first_k_dense_replace", 1, None),
        ("moe_layer_freq", 2, [0, 1]), ("layer_types", ["a", "b"], 7), ("hybrid_override_pattern", "M*", ["M"]),
    ],
)  # fmt: skip
def test_what_another_model_says_in_another_form_is_refused_by_name(key, own, wrong):
    part = {"num_hidden_layers": 2, key: own}
    with pytest.raises(ValueError, match=f"config.json says {key}: ") as caught:
        rewritten(part, [("b", 1), 0], 2, {"b": {"num_hidden_layers": 2, key: wrong}})
    assert "\n" not in str(caught.value)


def test_a_layer_in_its_place_of_another_model_is_what_that_model_says():
    part, other = (
        {"num_hidden_layers": 2, "mlp_only_layers": only, "dtype": name} for only, name in (([], "x"), ([1], "y"))
    )
    assert rewritten(part, [0, ("b", 1)], 2, {"b": other})["mlp_only_layers"] == [1]
    assert rewritten(part, [0, ("b", 1)], 2, {"b": {**part, "dtype": "y", "num_kv_shared_layers": None}}) == part


def test_layers_of_switch_transformers_stay():
    """Its class makes both steps of these numbers, anew for every number of layers."""
    part = {"num_hidden_layers": 4, "decoder_sparse_step": 2, "num_sparse_decoder_layers": 2}
    with pytest.raises(ValueError, match="num_sparse_decoder_layers: 2, and no other order"):
        rewritten(part, [0, 2], 4)


@pytest.mark.parametrize(
    ("key", "listed"),
    [("sliding_window_pattern", "layer_types"), ("moe_layer_freq", "mlp_layer_types"), ("attn_layer_period", None)],
)
def test_a_period_holds_or_is_written_out_or_is_refused(key, listed):
    part = {"num_hidden_layers": 6, key: 3}
    assert rewritten(part, [3, 4, 5, 0, 1, 2], 6)[key] == 3
    assert rewritten({**part, key: 1}, [3, 1], 6)[key] == 1
    with pytest.raises(ValueError, match=f"{key}: 3, and the layers would not be where they were"):
        rewritten(part, [0, 1, 1, 2], 6)
    if listed:
        found = rewritten({**part, listed: list("abcabc")}, [0, 1, 1, 2], 6)
        assert found[listed] == list("abbc")


def test_layers_that_predict_further_ahead_are_left_out_and_said():
    part = {"num_hidden_layers": 4, "num_nextn_predict_layers": 1, "layer_types": list("abcd")}
    notes: list[str] = []
    found = rewritten(part, [3, 0], 4, notes=notes)
    assert (found["num_nextn_predict_layers"], found["layer_types"]) == (0, ["d", "a"])
    assert "it is 0 now" in notes[0]
    with pytest.raises(ValueError, match="layer 4 of 'a' is one of its num_nextn_predict_layers"):
        rewritten(part, [0, 4], 4)


def test_what_cannot_be_said_of_another_order_is_refused_by_name():
    part = {"num_hidden_layers": 4, "num_kv_shared_layers": 2}
    assert rewritten(part, [0, 1, 2, 3], 4) == part
    assert rewritten({**part, "num_kv_shared_layers": 0}, [1, 0], 4)["num_kv_shared_layers"] == 0
    with pytest.raises(ValueError, match="num_kv_shared_layers: 2, and no other order"):
        rewritten(part, [1, 0, 2, 3], 4)


SLIDING, FULL = "sliding_attention", "full_attention"


def test_what_a_class_fills_in_by_number_is_written_out():
    """Gemma 2 alternates and says so nowhere: the first layer of a slice may be a full one."""
    part = {"model_type": "gemma2", "num_hidden_layers": 4}
    notes: list[str] = []
    assert rewritten(part, [1, 2, 3], 4, notes=notes)["layer_types"] == [FULL, SLIDING, FULL]
    assert "layer_types is written out" in notes[0]
    assert "layer_types" not in rewritten(part, [2, 3, 0, 1], 4)
    assert rewritten({**part, "layer_types": [FULL] * 4}, [1, 2], 4)["layer_types"] == [FULL] * 2
    pattern = {"model_type": "gemma3_text", "num_hidden_layers": 6, "sliding_window_pattern": 3}
    found = rewritten(pattern, [0, 1, 1, 2], 6)
    assert found["layer_types"] == [SLIDING, SLIDING, SLIDING, FULL]
    other = {"b": {"model_type": "gemma2", "num_hidden_layers": 4}}
    assert rewritten(part, [0, ("b", 0)], 4, other)["layer_types"] == [SLIDING, SLIDING]


def test_models_whose_layers_are_alike_are_left_alone():
    for kind in ("llama", "mistral", "qwen2", "qwen3"):
        part = {"model_type": kind, "num_hidden_layers": 4, "hidden_size": 8, "num_attention_heads": 2}
        notes: list[str] = []
        assert rewritten(part, [0, 1, 1, 3], 4, notes=notes) == part
        assert notes == []


def test_a_class_that_is_not_known_is_noted():
    notes: list[str] = []
    rewritten({"model_type": "nobody", "num_hidden_layers": 4, "sliding_window": 8}, [1, 0], 4, notes=notes)
    assert "is not known" in notes[0]


def test_no_layer_at_all():
    """A recipe may take none: mergekit merges `layer_range: [0, 0]`."""
    assert rewritten({"num_hidden_layers": 3}, [], 3)["num_hidden_layers"] == 0
