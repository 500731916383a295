"""Twelve kinds of file that strangers give us: how a small valid one is made, read here, and refused elsewhere."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import gguf
import jax
import jinja2
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import safetensors.numpy
import tokenizers
import yaml
from helpers.goldens.cases import BASE
from helpers.tiny_gguf import write_gguf
from helpers.tiny_models import config_of
from helpers.tiny_tokenizers import CHATML, CHATS, byte_level
from helpers.tiny_tokenizers import write_folder as write_tokenizer

from jaxmerge.files import plan as planning
from jaxmerge.files import recipe
from jaxmerge.files.checkpoints.open import open_source
from jaxmerge.files.checkpoints.source import read
from train.data.formats import read_row
from train.data.versions import read_version, write_version
from train.improve.settings import Improve
from train.models.decoder import init
from train.models.hf import load_hf, save_hf
from train.models.open import load_model
from train.models.tokenizer import Tokenizer
from train.resolve import load
from train.runtime.jsonl import read_jsonl

JINJA = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL = {**BASE, "vocab_size": 400, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of file.

    make: writes a valid folder. files: patterns of the files in it to damage, one at a time. read: what a verb does
    first with it. refuses: raises where the reference library, or a rule of the format, does not take the damaged file.
    """

    make: Callable[[pathlib.Path], None]
    files: tuple[str, ...]
    read: Callable[[pathlib.Path], Any]
    refuses: Callable[[pathlib.Path], Any]


@functools.cache
def params() -> tuple[Any, Any]:
    config = config_of(MODEL)
    return config, init(config, jax.random.key(0))


def make_model(folder: pathlib.Path, **shards: int) -> None:
    save_hf(folder / "m", *params(), tokenizer_from=Tokenizer.from_folder(_tokenizer(folder)), **shards)


def _tokenizer(folder: pathlib.Path) -> pathlib.Path:
    place = folder / "t"
    place.mkdir(exist_ok=True)
    special = {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>", "pad_token": "<|im_end|>"}
    return write_tokenizer(place, byte_level(), chat_template=CHATML, **special)


def read_all(name: pathlib.Path | str) -> None:
    for tensor in open_source(str(name)).tensors.values():
        read(tensor)


def read_tokenizer(folder: pathlib.Path) -> None:
    tokenizer = Tokenizer.from_folder(folder / "t")
    tokenizer.decode(tokenizer.encode("2 + 3 = <|im_end|>"))
    for messages in CHATS:
        if tokenizer.has_chat_template:
            tokenizer.encode(tokenizer.chat(messages))


def make_gguf(folder: pathlib.Path) -> None:
    write_gguf(folder / "a.gguf", *params(), kind=gguf.GGMLQuantizationType.Q8_0)


def make_peft(folder: pathlib.Path) -> None:
    make_model(folder)
    (folder / "x").mkdir()
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    width = MODEL["hidden_size"]
    a, b = np.ones((2, width), np.float32), np.ones((width, 2), np.float32)
    factors = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    safetensors.numpy.save_file(factors, folder / "x/adapter_model.safetensors")
    said = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "rank_pattern": {"k_proj": 3},
        "alpha_pattern": {"^model.layers.1.mlp": 8}, "fan_in_fan_out": False, "modules_to_save": None,
    }  # fmt: skip
    (folder / "x/adapter_config.json").write_text(json.dumps(said))


def make_orbax(folder: pathlib.Path) -> None:
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save((folder / "o").absolute(), {"model": {"a": np.ones((4, 4), np.float32), "b": np.ones(3)}})


RECIPE = """merge_method: ties
base_model: m
models:
  - model: m
  - {model: n, parameters: {weight: [0.5, 1], density: [{filter: mlp, value: 0.5}, {value: 1}]}}
parameters: {lambda: 0.9, normalize: true}
dtype: float32
out_dtype: bfloat16
tokenizer: {source: base}
chat_template: chatml
seed: 3
"""


def make_recipe(folder: pathlib.Path) -> None:
    make_model(folder)
    save_hf(folder / "n", *params(), tokenizer_from=Tokenizer.from_folder(_tokenizer(folder)))
    (folder / "r.yaml").write_text(RECIPE)


@functools.cache
def _opened(folder: pathlib.Path) -> dict[str, Any]:
    del folder  # the current one: a recipe names models as they are called there
    return {name: open_source(name) for name in "mn"}


def read_recipe(folder: pathlib.Path) -> None:
    for of in recipe.read(folder / "r.yaml"):
        opened = _opened(folder)
        planning.make(of, {name: opened[name] for name in of.sources if name in opened})


LINES = (
    {"messages": [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}]},
    {"prompt": "2 + 3 =", "completion": " 5"},
    {"instruction": "Add.", "input": "2 and 3", "output": "5"},
    {"question": "2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"},
    {"question": "Which?", "choices": ["one", "two"], "answer": 1},
)


def make_lines(folder: pathlib.Path) -> None:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in LINES))


def make_tfds(folder: pathlib.Path) -> None:
    row = {
        "question_id": "q", "family": "f", "prompt": "p", "completion": "c", "tokens": [1, 2], "prompt_length": 1,
        "score": 1.0, "weight": 1.0, "sample": 0,
    }  # fmt: skip
    write_version(folder / "d", "sums", "1.0.0", [row], {"round": 1})


def read_template(folder: pathlib.Path) -> None:
    tokenizer = Tokenizer.from_folder(folder / "t")
    for messages in CHATS:
        tokenizer.chat(messages)


def check_json(*names: str) -> Callable[[pathlib.Path], None]:
    def check(folder: pathlib.Path) -> None:
        for name in names:
            assert isinstance(json.loads((folder / name).read_bytes()), dict)

    return check


def check_index(folder: pathlib.Path) -> None:
    placed = json.loads((folder / "m/model.safetensors.index.json").read_bytes())["weight_map"]
    for name, file in placed.items():
        with safetensors.safe_open(folder / "m" / pathlib.PurePath(file).name, "np") as opened:
            opened.get_slice(name)


def load_safetensors(path: pathlib.Path) -> None:
    safetensors.numpy.load_file(path)


KINDS: dict[str, Kind] = {
    "safetensors": Kind(
        make_model, ("m/*.safetensors",), lambda f: read_all(f / "m"),
        lambda f: load_safetensors(f / "m/model.safetensors"),
    ),
    "index": Kind(
        lambda f: make_model(f, max_shard_bytes=20_000), ("m/*.index.json",), lambda f: load_hf(f / "m"), check_index
    ),
    "config": Kind(
        make_model, ("m/config.json", "m/generation_config.json"), lambda f: load_model(f / "m"),
        check_json("m/config.json", "m/generation_config.json"),
    ),
    "tokenizer": Kind(
        lambda f: _tokenizer(f) and None, ("t/*.json",), read_tokenizer,
        lambda f: tokenizers.Tokenizer.from_file(str(f / "t/tokenizer.json")),
    ),
    "gguf": Kind(make_gguf, ("*.gguf",), lambda f: load_model(f / "a.gguf"), lambda f: gguf.GGUFReader(f / "a.gguf")),
    "peft": Kind(
        make_peft, ("x/*",), lambda f: read_all(f"{f / 'm'}+{f / 'x'}"),
        lambda f: (check_json("x/adapter_config.json")(f), load_safetensors(f / "x/adapter_model.safetensors")),
    ),
    "orbax": Kind(make_orbax, ("o/*METADATA*",), lambda f: read_all(f / "o"), check_json("o/_METADATA")),
    "recipe": Kind(
        make_recipe, ("r.yaml",), read_recipe, lambda f: list(yaml.safe_load_all((f / "r.yaml").read_text()))
    ),
    "yaml": Kind(
        lambda f: (f / "c.yaml").write_bytes((ROOT / "configs/tiny.yaml").read_bytes()) and None, ("c.yaml",),
        lambda f: load(Improve, f / "c.yaml"), lambda f: yaml.safe_load((f / "c.yaml").read_text()),
    ),
    "jsonl": Kind(
        make_lines, ("a.jsonl",), lambda f: [read_row(row) for row in read_jsonl(f / "a.jsonl")],
        lambda f: [json.loads(line) for line in (f / "a.jsonl").read_bytes().split(b"\n") if line.strip()],
    ),
    "tfds": Kind(
        make_tfds, ("d/sums/1.0.0/*",), lambda f: read_version(f / "d", "sums", "1.0.0"),
        check_json("d/sums/1.0.0/metadata.json", "d/sums/1.0.0/checksums.json"),
    ),
    "template": Kind(
        lambda f: (_tokenizer(f) / "chat_template.jinja").write_text(CHATML) and None, ("t/chat_template.jinja",),
        read_template,
        lambda f: JINJA.parse((f / "t/chat_template.jinja").read_text()),
    ),
}  # fmt: skip
