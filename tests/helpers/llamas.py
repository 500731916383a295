"""Tiny Llama folders, recipes over them, and the plainest way to do what a plan says: for tests of recipes."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import yaml
from safetensors.numpy import save_file

from jaxmerge.files import plan, recipe
from jaxmerge.files.checkpoints import source
from jaxmerge.files.checkpoints.open import open_source
from jaxmerge.rules import RULES

WIDE, MLP, VOCABULARY = 8, 12, 16


def names_of(layers, head=True):
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDE)}
    for l in range(layers):
        for part, shape in {
            "input_layernorm": (WIDE,),
            "self_attn.q_proj": (WIDE, WIDE),
            "self_attn.k_proj": (WIDE, WIDE),
            "self_attn.v_proj": (WIDE, WIDE),
            "self_attn.o_proj": (WIDE, WIDE),
            "post_attention_layernorm": (WIDE,),
            "mlp.up_proj": (MLP, WIDE),
            "mlp.gate_proj": (MLP, WIDE),
            "mlp.down_proj": (WIDE, MLP),
        }.items():
            shapes[f"model.layers.{l}.{part}.weight"] = shape
    shapes["model.norm.weight"] = (WIDE,)
    return shapes | ({"lm_head.weight": (VOCABULARY, WIDE)} if head else {})


def tensors(seed, layers=4, dtype: Any = np.float32, head=True):
    """A model near the one of seed 0, its deltas a tenth of the weights."""
    rng, base = np.random.default_rng(seed), np.random.default_rng(0)
    near = {name: base.standard_normal(shape) for name, shape in names_of(layers, head).items()}
    return {name: (b + (seed > 0) * 0.1 * rng.standard_normal(b.shape)).astype(dtype) for name, b in near.items()}


def folder(path, arrays, layers=4, **more):
    path = pathlib.Path(path)
    path.mkdir()
    save_file(arrays, path / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers,
        "hidden_size": WIDE, "intermediate_size": MLP, "vocab_size": VOCABULARY, "num_attention_heads": 2,
        "num_key_value_heads": 2, "tie_word_embeddings": False, "torch_dtype": "float32",
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config | more))
    return path


class Reluctant:
    """A tensor whose every read costs as much as reading all."""

    chunked = False

    def __init__(self, tensor):
        self.tensor, self.reads = tensor, 0

    def __getattr__(self, name):
        return getattr(self.tensor, name)

    def read_into(self, buffer, start=0):
        self.reads += 1
        self.tensor.read_into(buffer, start)


def read(text, **options):
    pathlib.Path("recipe.yaml").write_text(text if isinstance(text, str) else yaml.safe_dump(text, sort_keys=False))
    return recipe.read(pathlib.Path("recipe.yaml"), **options)


def make(text, **options):
    (found,) = read(text, **({"compat": options["compat"]} if "compat" in options else {}))
    return plan.make(found, {name: open_source(name) for name in found.sources}, **options)


def run(job, seed=0):
    """Do a job in memory, the plain way."""
    load = lambda i: jnp.asarray(source.read(i.tensor))  # noqa: E731
    if not jnp.issubdtype(job.out_dtype, jnp.floating):
        return source.read(job.inputs[0].tensor)

    def operand(i):
        array = load(i) if job.dtype is None else load(i).astype(job.dtype)
        return {job.path: array.astype(jnp.float32)}

    rule = RULES[job.method.rule]
    keywords = dict(job.coefficients)
    if job.base is not None:
        keywords["base"] = operand(job.base)
    if rule.needs.key != "none":
        keywords |= {"key": jax.random.key(seed), "names": [i.model for i in job.inputs]}
    merged = rule([operand(i) for i in job.inputs], **keywords)[job.path]
    return np.asarray(merged.astype(job.out_dtype))


def merged(text, **options):
    return {job.name: run(job) for job in make(text, **options).jobs}


def load(name):
    return {key: source.read(tensor) for key, tensor in open_source(name).tensors.items()}


def ordinals(array):
    """Number the values of a 16-bit float dtype in order, so that neighbours are one apart."""
    bits = array.view(np.int16).astype(np.int32)
    return np.where(bits < 0, -(bits & 0x7FFF), bits)


def equal(found, wanted, rtol=2e-6):
    """Compare two models: float32 to `rtol`, bfloat16 to one step; return how many of the latter differ."""
    differ = 0
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        assert found[name].shape == array.shape, name
        assert found[name].dtype == array.dtype, name
        if array.dtype == ml_dtypes.bfloat16:
            ours, its = ordinals(found[name]), ordinals(array)
            assert np.abs(ours - its).max() <= 1, name
            differ += int((ours != its).sum())
            continue
        np.testing.assert_allclose(found[name], array, rtol=rtol, atol=2e-6, err_msg=name)
    return differ
