"""Random configs of every family against transformers on torch: logits, padding, packing, greedy, both ways."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.goldens.family_cases import FAMILY_CASES, OFF
from helpers.tiny_families import IDS, logits, pack, run_engine, weights
from helpers.tiny_models import config_of, relative

from train.cli import __main__ as cli
from train.models.balance import Routing, balance
from train.models.characters import SYMBOLS, write_tokenizer
from train.models.families import FAMILIES
from train.models.hf import load_hf, save_hf

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def reference():
    """`reference(attributes)`: the model of transformers that the golden logits come from."""

    from helpers.goldens.make import reference

    return reference


def theirs(model, ids, **options) -> np.ndarray:
    """Logits of a copy: transformers keeps the frequencies of the longest sequence a model has seen."""
    import torch

    with torch.no_grad():
        inputs = {k: torch.tensor(np.asarray(v)) for k, v in {"input_ids": ids, **options}.items()}
        return copy.deepcopy(model)(**inputs).logits.numpy()


def pick(r, *options):
    return options[int(r.integers(len(options)))]


def random_rope(r, rotary: int, longest: int) -> dict:
    """Any scaling, in either style, with a context shorter than the sequences where there is one."""
    theta = float(pick(r, 100.0, 10000.0))
    original = int(r.integers(8, 36))
    scaling = pick(
        r,
        None,
        {"type": "linear", "factor": float(r.uniform(1.5, 8))},
        {"type": "dynamic", "factor": float(r.uniform(1.5, 4))},
        {"rope_type": "yarn", "factor": float(r.uniform(2, 9)), "original_max_position_embeddings": original},
        {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": original, "beta_fast": 6.0,
            "beta_slow": 0.5, "truncate": bool(r.integers(2)), "attention_factor": float(r.uniform(0.7, 2)),
        },
        {
            "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0,
            "original_max_position_embeddings": original,
        },
        {
            "rope_type": "longrope", "short_factor": r.uniform(1, 2, rotary // 2).tolist(),
            "long_factor": r.uniform(1, 9, rotary // 2).tolist(), "original_max_position_embeddings": original,
        },
    )  # fmt: skip
    if scaling is not None and r.integers(2):
        return {"rope_parameters": {**scaling, "rope_theta": theta}}
    return {"rope_theta": theta, **({} if scaling is None else {"rope_scaling": scaling})}


def random_attributes(family: str, seed: int) -> dict:
    """Any mixture of what the family has; the sizes are the seed's, so that families share compiled operations."""
    r = np.random.default_rng(seed)
    kv = int(r.integers(1, 3))
    heads, layers, longest = kv * int(r.integers(1, 4)), int(r.integers(2, 5)), int(r.integers(24, 64))
    head, wide = 2 * int(r.integers(2, 7)), heads * 2 * int(r.integers(4, 8))
    tall, r = 4 * int(r.integers(3, 15)), np.random.default_rng([seed, *family.encode()])
    absent = FAMILIES[family].absent
    a = {
        "model_type": family, "vocab_size": 61, "hidden_size": wide, "intermediate_size": tall,
        "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "head_dim": head, "max_position_embeddings": longest,
        "rms_norm_eps": float(10 ** r.uniform(-6, -2)), "tie_word_embeddings": bool(r.integers(2)),
        "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    random = {
        "attention_bias": lambda: bool(r.integers(2)),
        "mlp_bias": lambda: bool(r.integers(2)),
        "use_sliding_window": lambda: True,
        "sliding_window": lambda: int(r.integers(2, 20)),
        "max_window_layers": lambda: int(r.integers(0, layers + 1)),
        "sliding_window_pattern": lambda: int(r.integers(2, 4)),
        "no_rope_layer_interval": lambda: int(r.integers(2, 4)),
        "query_pre_attn_scalar": lambda: int(r.integers(4, 40)),
        "attn_logit_softcapping": lambda: pick(r, None, 2.0, 5.0),
        "final_logit_softcapping": lambda: pick(r, None, 3.0, 9.0),
        "rope_local_base_freq": lambda: float(r.uniform(20, 5000)),
        "qkv_bias": lambda: bool(r.integers(2)),
        "num_experts": lambda: int(r.integers(3, 9)),
        "num_local_experts": lambda: int(r.integers(3, 9)),
        "num_experts_per_tok": lambda: int(r.integers(1, 4)),
        "moe_intermediate_size": lambda: int(r.integers(5, 40)),
        "shared_expert_intermediate_size": lambda: int(r.integers(5, 40)),
        "norm_topk_prob": lambda: bool(r.integers(2)),
        "decoder_sparse_step": lambda: int(r.integers(1, 3)),
        "mlp_only_layers": lambda: [int(r.integers(0, layers))],
        "partial_rotary_factor": lambda: pick(r, 1.0, 4 / head),
        "attention_multiplier": lambda: float(r.uniform(0.1, 1)),
        "embedding_multiplier": lambda: float(r.uniform(0.5, 9)),
        "residual_multiplier": lambda: float(r.uniform(0.2, 1)),
        "logits_scaling": lambda: float(r.uniform(0.5, 4)),
    }
    a |= {name: draw() for name, draw in random.items() if name in absent}
    if "num_experts_per_tok" in a:  # torch multiplies by expert where rows are of multiples of 16 bytes
        a["hidden_size"] *= 2
        wide = [name for name in a if name.endswith("intermediate_size")]
        a |= {name: -(-a[name] // 4) * 4 for name in wide}
    if family == "olmoe":  # its heads are as wide as the model allows
        a["head_dim"] = head = a["hidden_size"] // heads
    if isinstance(absent.get("eos_token_id"), list):
        a["eos_token_id"] = 2  # transformers takes null for the ends that GLM has
    if family == "phi3":
        a["head_dim"] = head = a["hidden_size"] // heads
        a["partial_rotary_factor"] = pick(r, 1.0, 4 / head)
        a["original_max_position_embeddings"] = int(r.integers(8, 36))
        rotary = int(head * a["partial_rotary_factor"])
        scaling = {name: r.uniform(1, 4, rotary // 2).tolist() for name in ("short_factor", "long_factor")}
        return a | pick(r, {}, {"rope_scaling": {"type": "longrope", **scaling}})
    if family == "gemma3_text":
        return a | {"rope_theta": 1000.0, "rope_scaling": pick(r, None, {"rope_type": "linear", "factor": 4.0})}
    if family == "olmo3":
        full = {"rope_theta": 700.0, **pick(r, {"rope_type": "default"}, {"rope_type": "linear", "factor": 4.0})}
        sliding = {"rope_theta": float(r.uniform(20, 5000)), "rope_type": "default"}
        return a | {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}
    return a | random_rope(r, int(head * a.get("partial_rotary_factor", 1.0)), longest)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("family", FAMILIES)
def test_random_configs_equal_transformers_both_ways(family, seed, reference, tmp_path):
    """Alone, padded, packed; their folder here, ours there: the same logits, and bit for bit the same weights."""
    import torch
    from transformers import AutoModelForCausalLM

    attributes = random_attributes(family, seed)
    model = reference(attributes)
    model.save_pretrained(tmp_path / "theirs")
    config, params = load_hf(tmp_path / "theirs")
    assert config == config_of(attributes)

    lengths = (11, 29)  # together as long as IDS: one shape, compiled once
    ids = IDS.copy()
    for row, n in zip(ids, lengths, strict=True):
        row[n:] = 0
    alone = [theirs(model, ids[i : i + 1, :n])[0] for i, n in enumerate(lengths)]
    padded = logits(config, params, ids, lengths=lengths)
    tokens, options = pack(ids, lengths)
    packed = logits(config, params, tokens, **options)
    assert relative(packed[0], np.concatenate(alone)) < 1e-4
    for i, n in enumerate(lengths):
        assert relative(padded[i, :n], alone[i]) < 1e-4
    assert relative(logits(config, params), theirs(model, IDS)) < 1e-4
    if config.rope_scaling is None or config.rope_scaling.kind not in ("dynamic", "longrope"):
        # (Those look at the longest of the batch there, at each sequence here.)
        masked = theirs(model, ids, attention_mask=np.arange(ids.shape[1]) < np.array(lengths)[:, None])
        for i, n in enumerate(lengths):
            assert relative(padded[i, :n], masked[i, :n]) < 1e-4

    save_hf(tmp_path / "ours", config, params)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="float32", attn_implementation="eager").eval()
    assert type(back) is type(model)
    for (name, a), (_, b) in zip(model.named_parameters(), back.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert relative(theirs(back, IDS), theirs(model, IDS)) < 1e-6


GREEDY = {family: random_attributes(family, 2) for family in FAMILIES} | {
    # Contexts of 16, 48 and 24 tokens: prompts before them, continuations that go past them, and prompts after them.
    name: FAMILY_CASES[name]
    for name in ("phi3_long", "phi3_short", "llama_dynamic")
}


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_continuations_are_identical(name, reference):
    import torch

    model, config = reference(GREEDY[name]), config_of(GREEDY[name])
    # When a sequence grows past the short context, keys are to turn by the long factors. Phi-3 alone computes them anew
    # there; other models of transformers keep them in the cache as they were, which is not what a whole pass computes.
    scaling = config.rope_scaling
    cached = scaling is None or scaling.kind != "longrope" or model.config.model_type == "phi3"
    prompts = [IDS[0, :3].tolist(), IDS[1, :15].tolist(), IDS[0, :38].tolist()]
    found = run_engine(config, weights(config), prompts, 12)
    for prompt, tokens in zip(prompts, found, strict=True):
        out = copy.deepcopy(model).generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=12,
            do_sample=False, pad_token_id=0, eos_token_id=None, use_cache=cached,
        )  # fmt: skip
        assert list(tokens) == out[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("name", "feature"), [(n, f) for n in OFF for f in OFF[n]])
def test_a_feature_switched_off_in_the_reference_changes_what_is_expected(name, feature, reference):
    """And to the same other thing here: neither side passes the feature over."""
    off = {**FAMILY_CASES[name], **OFF[name][feature]}
    changed = theirs(reference(off), IDS)
    assert relative(changed, theirs(reference(FAMILY_CASES[name]), IDS)) > 0.005
    config = config_of(off)
    assert relative(logits(config, weights(config)), changed) < 1e-4


FIXED = {
    "(1 + w) norms": ("gemma2", "norm"),
    "post-norms": ("gemma2", "post_feedforward_layernorm"),
    "norm after attention": ("gemma3", "post_attention_layernorm"),
    "query norm": ("gemma3", "q_norm"),
    "key norm": ("qwen3", "k_norm"),
    "embedding scale": ("gemma2", "embed_scale"),
    "embedding scale of Gemma 3": ("gemma3", "embed_scale"),
    "query bias": ("qwen2", "q_proj.bias"),
    "key bias": ("qwen2", "k_proj.bias"),
    "value bias": ("qwen2", "v_proj.bias"),
    "norm after OLMo's attention": ("olmo2", "post_attention_layernorm"),
    "norm of all queries": ("olmo2", "q_norm"),
    "norm after GLM's MLP": ("glm4", "post_mlp_layernorm"),
}


@pytest.mark.parametrize("feature", FIXED)
def test_what_a_family_fixes_bites_in_the_reference(feature, reference):
    """No attribute names these: they are taken out of the modules."""
    import torch

    name, part = FIXED[feature]
    model = reference(FAMILY_CASES[name])
    before = theirs(model, IDS)
    with torch.no_grad():
        if part == "norm":  # w in place of 1 + w
            model.model.norm.weight -= 1
        elif part == "embed_scale":
            model.model.embed_tokens.embed_scale.fill_(1.0)
        elif part.endswith("bias"):
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith(part):
                    parameter.zero_()
        else:
            for layer in model.model.layers:
                owner = layer.self_attn if hasattr(layer.self_attn, part) else layer
                setattr(owner, part, torch.nn.Identity())
    assert relative(theirs(model, IDS), before) > 1e-3


@pytest.mark.parametrize("name", ["gemma3", "phi3_long", "qwen2", "smollm3", "glm4"])
def test_a_bfloat16_export_is_what_transformers_rounds_to(name, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    config = config_of(FAMILY_CASES[name])
    params = weights(config)
    save_hf(tmp_path / "out", config, params, dtype=jnp.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        stored = model.get_parameter(".".join(entry.key for entry in path))
        assert torch.equal(stored, torch.tensor(np.asarray(leaf)).to(torch.bfloat16))


@pytest.mark.parametrize("name", ["gemma3", "phi3_long"])
def test_the_verb_sample_says_what_transformers_does(name, reference, tmp_path):
    """From outside: a folder that transformers wrote, prompts in, greedy texts out."""
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    attributes = {**FAMILY_CASES[name], "vocab_size": len(SYMBOLS), "max_position_embeddings": 96}
    folder = tmp_path / "model"
    reference(attributes).save_pretrained(folder)
    write_tokenizer(folder)
    texts = ["7", "12+30=?", "what is the capital of france?", "(a+b)*c ; " * 4]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    words = ["sample", str(folder), str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")]
    assert cli.main([*words, "temperature=0", "max_new_tokens=32", "chat=false", "dtype=float32"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    for text, row in zip(texts, rows, strict=True):
        ids = tokenizer(text, return_tensors="pt")
        out = model.generate(
            **ids, max_new_tokens=32, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=0
        )
        new = out[0, ids["input_ids"].shape[1] :].tolist()
        assert row["tokens"] == new
        assert row["text"] == tokenizer.decode(new, skip_special_tokens=True)


def test_the_balance_of_a_router_is_that_of_transformers():
    import torch
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    scores = np.random.default_rng(4).standard_normal((3, 2, 6, 5)).astype(np.float32)
    read = np.array([[1] * 6, [1] * 2 + [0] * 4])
    ours, _ = balance(Routing(jnp.asarray(scores), jnp.asarray(read) > 0), 2)
    flat = tuple(torch.tensor(layer.reshape(-1, 5)) for layer in scores)
    assert abs(float(ours) - float(load_balancing_loss_func(flat, 5, 2, torch.tensor(read)))) < 1e-5
