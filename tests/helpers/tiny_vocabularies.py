"""Tiny models whose vocabularies differ."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from jaxmerge.files import vocabulary
from jaxmerge.files.checkpoints.open import open_source
from jaxmerge.files.checkpoints.source import read

EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"

D = 8


LAYER = {
    "input_layernorm.weight": (D,),
    "self_attn.q_proj.weight": (D, D),
    "self_attn.k_proj.weight": (D, D),
    "self_attn.v_proj.weight": (D, D),
    "self_attn.o_proj.weight": (D, D),
    "post_attention_layernorm.weight": (D,),
    "mlp.gate_proj.weight": (16, D),
    "mlp.up_proj.weight": (16, D),
    "mlp.down_proj.weight": (D, 16),
}


def words(vocab, added=(), special=("<s>", "</s>"), marked=True):
    """A word-level tokenizer: `vocab` in order, `added` behind it; marked: special tokens are known as such."""
    ids = {word: i for i, word in enumerate(["<unk>", *special, *vocab])}
    backend = tokenizers.Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<unk>", *special] if marked else [])
    backend.add_special_tokens([token for token in added if token.startswith("<|")])
    backend.add_tokens([token for token in added if not token.startswith("<|")])
    return backend


def pieces(text, size, added=()):
    """A byte-level BPE trained on `text`."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False, initial_alphabet=list("abcdefgĠ")
    )
    backend.train_from_iterator([text] * 4, trainer)
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens(list(added))
    return backend


def folder(path, backend, seed, *, rows=None, dtype: type = np.float32, tied=False, **config):
    """A Llama of one layer that mergekit knows; `rows` of the embedding, by default one a token."""
    path.mkdir()
    rows = rows or (backend.get_vocab_size() if backend else 9)
    rng = np.random.default_rng(seed)
    shapes = {EMBED: (rows, D), NORM: (D,), **{f"model.layers.0.{name}": shape for name, shape in LAYER.items()}}
    shapes |= {} if tied else {HEAD: (rows, D)}
    save_file({n: rng.standard_normal(s).astype(dtype) for n, s in shapes.items()}, path / "model.safetensors")
    sizes = {"hidden_size": D, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": rows, **sizes}
    settings |= {"num_key_value_heads": 2, "tie_word_embeddings": tied, "torch_dtype": np.dtype(dtype).name}
    (path / "config.json").write_text(json.dumps({**settings, **config}))
    (path / "generation_config.json").write_text('{"eos_token_id": 2}')
    if backend is not None:
        backend.save(str(path / "tokenizer.json"))
        roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        (path / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64, **roles})
        )
    return path


NAMES = ("base", "one", "two")


def sources(names=NAMES):
    return {str(name): open_source(str(name)) for name in names}


def ids(path):
    return tokenizers.Tokenizer.from_file(str(pathlib.Path(path) / "tokenizer.json")).get_vocab()


def row(model, token, name=EMBED):
    return read(open_source(model).tensors[name])[ids(model)[token]]


def built(options, names=NAMES, base: str | None = "base", **more):
    opened = sources(names)
    vocab = vocabulary.build(options, opened, base, **more)
    return vocab, {name: vocab.apply(source) for name, source in opened.items()}


def written(vocab, path):
    path.mkdir()
    for name, content in vocab.tokenizer.files.items():
        (path / name).write_bytes(content)
    return tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
