"""What the configs for real models name, played: datasets of their form, and their models, whole or made small."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from helpers import ROOT
from helpers.line_cases import CHOICES, GSM8K, MBPP
from helpers.played_hub import PlayedHub, as_lines, as_parquet
from helpers.tiny_tokenizers import CHATML, byte_level
from tpu.presets import PRESETS
from train.improve.budget import models_beside
from train.improve.plan import plan
from train.improve.settings import Improve
from train.models.decoder import init
from train.models.hf import save_hf
from train.models.hf_config import config_from_hf
from train.models.tokenizer import Tokenizer
from train.resolve import load

MODELS = {
    "qwen2.5-0.5b-gsm8k": ("Qwen/Qwen2.5-0.5B-Instruct", "qwen2.5-0.5b"),
    "llama-3.2-1b-gsm8k": ("meta-llama/Llama-3.2-1B-Instruct", "llama-3.2-1b"),
    "qwen2.5-7b-gsm8k": ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"),
    "exme-instruct": ("Qwen/Qwen2.5-1.5B-Instruct", "qwen2.5-1.5b"),
    "mbpp-search": ("google/gemma-2-2b-it", "gemma-2-2b"),
}
"""Config → its model on the hub, and that model's preset."""
_SPREAD = ["mesh.fsdp=8", "mesh.gather_to_decode=true"]
SLICES: dict[str, dict[str, tuple[str, str, list[str]]]] = {
    "qwen2.5-0.5b-gsm8k": {"v5e-8": ("TPU v5e", "v5e:2x4", _SPREAD)},
    "llama-3.2-1b-gsm8k": {"v5e-8": ("TPU v5e", "v5e:2x4", _SPREAD)},
    "qwen2.5-7b-gsm8k": {
        "v5e-16": ("TPU v5e", "v5e:4x4", []),
        "v5p-8": ("TPU v5p", "v5p:2x2x1", ["mesh.fsdp=4", "mesh.tensor=1"]),
    },
    "exme-instruct": {"v5e-8": ("TPU v5e", "v5e:2x4", _SPREAD)},
    "mbpp-search": {"v5e-8": ("TPU v5e", "v5e:2x4", _SPREAD)},
}
"""Config → slice that its head names → its device, its topology, and the keys of the command there."""
Rows = Sequence[dict[str, Any]]


def path_of(name: str) -> str:
    return str(ROOT / "configs" / f"{name}.yaml")


def to_compile(name: str, where: str) -> list[str]:
    """The words with which `tpu.aot` compiles the step of a config for a slice."""
    _, topology, keys = SLICES[name][where]
    config = load(Improve, path_of(name), keys)
    sft, axes = config.sft, {axis: getattr(config.mesh, axis) for axis in ("data", "fsdp", "tensor")}
    plain = {"batch": sft.batch, "micro_batch": sft.micro_batch, "length": sft.max_length, "remat": sft.step.remat}
    beside = models_beside(config, plan(config)[0])["sft"]
    about = {"topology": topology, "model": MODELS[name][1], "layers": sft.step.layers, "beside": beside}
    return [f"{key}={value}" for key, value in (about | plain | {f"mesh.{a}": n for a, n in axes.items()}).items()]


def numbered(row: dict[str, Any], key: str, count: int, mark: str) -> Rows:
    """The same example over and over, no two with one question."""
    return [{**row, key: f"{mark} {i}. {row[key]}"} for i in range(count)]


def choices(count: int, mark: str, **more: Any) -> Rows:
    """Rows in the form of ARC, whose choices are a struct."""
    options = {"text": CHOICES["choices"], "label": ["A", "B", "C"]}
    row = {"id": "x", "question": CHOICES["question"], "choices": options, "answerKey": CHOICES["answer"], **more}
    return [{**r, "id": f"{mark}-{i}"} for i, r in enumerate(numbered(row, "question", count, mark))]


def datasets(share: float = 1.0) -> dict[str, dict[str, bytes]]:
    """Repository → file → bytes, each split with this share of its published examples."""

    def many(count: int) -> int:
        return max(4, round(count * share))

    def files(subset: str, rows: dict[str, Rows]) -> dict[str, bytes]:
        return {f"{subset}/{split}-00000-of-00001.parquet": as_parquet(found) for split, found in rows.items()}

    gsm8k = {"train": numbered(GSM8K, "question", many(7473), "train"),
             "test": numbered(GSM8K, "question", many(1319), "test")}  # fmt: skip
    arc = {split: choices(many(n), split) for split, n in {"train": 1119, "validation": 299, "test": 1172}.items()}
    sense = {"validation": choices(many(1221), "sense", question_concept="metal")}
    mbpp = {split: numbered(MBPP, "text", many(n), split) for split, n in {"train": 374, "test": 500}.items()}
    problem = {"problem": "What is $3 + 4$?", "solution": "It is $\\boxed{7}$.", "answer": "7", "subject": "Algebra"}
    hard = [{**r, "unique_id": f"t/{i}.json", "level": 1}
            for i, r in enumerate(numbered(problem, "problem", many(500), "No."))]  # fmt: skip
    return {
        "datasets/openai/gsm8k": files("main", gsm8k),
        "datasets/allenai/ai2_arc": files("ARC-Challenge", arc),
        "datasets/tau/commonsense_qa": files("data", sense),
        "datasets/google-research-datasets/mbpp": files("full", mbpp),
        "datasets/HuggingFaceH4/MATH-500": {"test.jsonl": as_lines(hard)},
    }


def serve(hub: PlayedHub, *, share: float = 1.0) -> None:
    """Put all of it on a played hub; of the models their config.json alone, so that no weights can be fetched."""
    for name, files in datasets(share).items():
        hub.add(name, files)
    for model, preset in MODELS.values():
        hub.add(f"models/{model}", {"config.json": json.dumps(PRESETS[preset])})


SMALL = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 4096,
}  # fmt: skip


def serve_small(hub: PlayedHub, name: str, folder: Path) -> None:
    """Put the model of a config on a played hub, made small: the switches of its architecture, random weights."""
    model, preset = MODELS[name]
    given = {**PRESETS[preset], **SMALL}
    if "sliding_window" in given:
        given["sliding_window"] = 16
    tokenizer = Tokenizer(byte_level(), {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, chat_template=CHATML)
    config = config_from_hf(given | {"eos_token_id": list(tokenizer.eos_ids)}, source=preset)
    save_hf(folder, config, init(config, jax.random.key(0)), tokenizer_from=tokenizer)
    hub.add(f"models/{model}", {p.name: p.read_bytes() for p in folder.iterdir()})
