r"""Recipes as they are published, merged by mergekit and here: python benchmarks/recipes.py [WORD …]

The recipes are those of benchmarks/recipes.yaml; words pick the ones that hold them in their names. It needs mergekit
0.1.5 (the extra `oracle`, Python 3.11) and runs offline, on the CPU, in minutes.

Each recipe is merged by both as it is written and, where its dtype is a narrow one, once more with `dtype: float32`, in
which both compute alike. It is

  right      what we write has mergekit's names, shapes and dtypes, and in float32 its values to 2·10⁻⁶
  random     a method with random masks, which are not the same by design: names, shapes and dtypes are compared
  refused    mergekit merges it, we do not
  wrong      names, shapes, dtypes or values differ
  both       refused by both

The program ends with the counts, and with exit code 1 if a value is wrong or more than 3 % are refused.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import pathlib
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from typing import Any

import ml_dtypes
import numpy as np
import yaml
from safetensors.numpy import save_file

from jaxmerge.files import merge
from jaxmerge.files.checkpoints import safetensors
from jaxmerge.files.checkpoints.source import read

RECIPES = pathlib.Path(__file__).with_name("recipes.yaml")
LAYERS, WIDE, FFN = 4, 16, 24
TOLERANCE = 2e-6
ALLOWED = 0.03  # of the recipes that mergekit merges
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
WORDS = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(29))]


def shapes(rows: int, head: bool) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, WIDE)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        found |= {f"{prefix}self_attn.{part}_proj.weight": (WIDE, WIDE) for part in "qkvo"}
        found |= {f"{prefix}mlp.{part}_proj.weight": (FFN, WIDE) for part in ("gate", "up")}
        found |= {f"{prefix}mlp.down_proj.weight": (WIDE, FFN)}
        found |= {f"{prefix}{part}_layernorm.weight": (WIDE,) for part in ("input", "post_attention")}
    return found | {"model.norm.weight": (WIDE,)} | ({"lm_head.weight": (rows, WIDE)} if head else {})


def write_model(
    name: str,
    seed: int,
    *,
    dtype: Any = np.float32,
    words: list[str] = WORDS,
    rows: int = 0,
    tied: bool = False,
    **more,
) -> None:
    """Write a Llama near acme/base, its deltas a tenth of the weights, with a tokenizer of whole words."""
    import tokenizers

    folder = pathlib.Path(name)
    folder.mkdir(parents=True)
    rows = rows or len(words)
    near, own = np.random.default_rng(0), np.random.default_rng(seed)
    arrays = {}
    for tensor, shape in shapes(rows, not tied).items():
        start = near.standard_normal((len(WORDS), *shape[1:]) if rows in shape else shape)
        base = np.resize(start, shape)
        arrays[tensor] = (base + (seed > 0) * 0.1 * own.standard_normal(shape)).astype(dtype)
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": LAYERS, "hidden_size": WIDE,
        "intermediate_size": FFN, "vocab_size": rows, "num_attention_heads": 2, "num_key_value_heads": 2,
        "tie_word_embeddings": tied, "torch_dtype": np.dtype(dtype).name, "rope_theta": 10000.0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | more))
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    backend = tokenizers.Tokenizer(model)
    backend.add_special_tokens([word for word in words if word.startswith("<")])
    backend.save(str(folder / "tokenizer.json"))
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    template = {"chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **roles, **template})
    )


def write_models() -> None:
    for seed, name in enumerate(["acme/base", "acme/chat", "acme/math", "acme/code"]):
        write_model(name, seed)
    write_model("acme/theta", 5, rope_theta=500000.0)
    write_model("acme/chatml", 6, words=[*WORDS, "<|im_start|>", "<|im_end|>"])
    write_model("acme/padded", 7, rows=len(WORDS) + 8)
    write_model("acme/half", 8, dtype=ml_dtypes.bfloat16)
    write_model("acme/tied", 9, tied=True)
    write_model("acme/tied2", 10, tied=True)
    folder, rng = pathlib.Path("acme/lora"), np.random.default_rng(11)
    folder.mkdir()
    factors = {}
    for layer in range(LAYERS):
        module = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        factors[f"{module}.lora_A.weight"] = rng.standard_normal((2, WIDE)).astype(np.float32)
        factors[f"{module}.lora_B.weight"] = rng.standard_normal((WIDE, 2)).astype(np.float32)
    save_file(factors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "acme/base"}))


def by_mergekit(document: dict, out: str) -> dict[str, np.ndarray]:
    # Not installed where this file is checked.
    config, tasks, peer, settings = (
        importlib.import_module(f"mergekit.{name}") for name in ("config", "io.tasks", "merge", "options")
    )
    tasks.LoaderCache().loaders.clear()
    options = settings.MergeOptions(
        copy_tokenizer=False, quiet=True, write_model_card=False, lora_merge_cache="adapted"
    )
    peer.run_merge(config.MergeConfiguration.model_validate(document), out, options=options)
    return tensors(out)


def by_us(text: str, out: str) -> dict[str, np.ndarray]:
    pathlib.Path("recipe.yaml").write_text(text)
    merge("recipe.yaml", out)
    return tensors(out)


def tensors(folder: str) -> dict[str, np.ndarray]:
    return {name: read(stored) for name, stored in safetensors.open_folder(pathlib.Path(folder)).items()}


def is_random(document: dict) -> bool:
    """Whether the method draws masks for this recipe: densities below one are written in it."""
    kept = yaml.safe_dump(document).replace("density: 1.0", "").replace("density: 1\n", "").replace("density: '1'", "")
    return document["merge_method"] in RANDOM and "density" in kept


def differ(ours: dict[str, np.ndarray], its: dict[str, np.ndarray], values: bool) -> str:
    """What is unlike, of names, shapes, dtypes and, if wanted, values; nothing where all is alike."""
    if set(ours) != set(its):
        return f"names: {sorted(set(ours) ^ set(its))[:3]}"
    for name, array in its.items():
        found = ours[name]
        if (found.dtype, found.shape) != (array.dtype, array.shape):
            return f"{name}: {found.dtype}{list(found.shape)}, mergekit {array.dtype}{list(array.shape)}"
        error = np.abs(found.astype(np.float64) - array.astype(np.float64)) if values else np.zeros(1)
        if (error > TOLERANCE * (1 + np.abs(array.astype(np.float64)))).any():
            return f"{name}: {error.max():.3g} apart"
    return ""


def compare(text: str, number: int) -> tuple[str, str]:
    """Merge a recipe with both, as it is and in float32; the verdict and why."""
    document = yaml.safe_load(text)
    wide = {**{key: value for key, value in document.items() if key != "out_dtype"}, "dtype": "float32"}
    # Most models are stored in float32: then a recipe that says nothing else is computed in it as it stands.
    forms = [wide] if document.get("dtype") in (None, "float32") and "half" not in text else [document, wide]
    why = ""
    try:
        its = [by_mergekit(of, f"its{number}{i}") for i, of in enumerate(forms)]
    except Exception as error:  # whatever a peer raises says that it does not merge this recipe
        its, why = None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    try:
        # The text itself where nothing is changed in it: the odd grammar is part of the recipe.
        texts = [text if len(forms) == 1 or of is document else yaml.safe_dump(of) for of in forms]
        ours = [by_us(of, f"ours{number}{i}") for i, of in enumerate(texts)]
    except ValueError as error:
        return ("both" if its is None else "refused"), str(error)[:300]
    if its is None:
        return "ours alone", why
    for i, (mine, other) in enumerate(zip(ours, its, strict=True)):
        if found := differ(mine, other, values=i == len(forms) - 1 and not is_random(document)):
            return "wrong", found
    return ("random" if is_random(document) else "right"), ""


def main(words: list[str]) -> int:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    recipes = yaml.safe_load(RECIPES.read_text())
    start, work = pathlib.Path.cwd(), tempfile.mkdtemp(prefix="recipes-")
    os.chdir(work)
    write_models()
    counts: Counter[str] = Counter()
    try:
        for number, (name, text) in enumerate(recipes.items()):
            if words and not any(word in name for word in words):
                continue
            verdict, why = compare(text, number)
            counts[verdict] += 1
            print(f"{verdict:<10} {name}{': ' * bool(why)}{why}", flush=True)
    finally:
        os.chdir(start)
        shutil.rmtree(work)
    merged = sum(counts[verdict] for verdict in ("right", "random", "refused", "wrong"))
    share = counts["refused"] / max(merged, 1)
    print(f"\n{sum(counts.values())} recipes, {merged} of them merged by mergekit: {dict(counts)}")
    print(f"refused here: {counts['refused']} of {merged} ({100 * share:.1f} %), wrong: {counts['wrong']}")
    return int(counts["wrong"] > 0 or share > ALLOWED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
