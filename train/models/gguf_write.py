"""(ModelConfig, Params, Tokenizer) to a GGUF file that llama.cpp and what is built on it run.

What is written is read back before any weight is: a config or a tokenizer that the format has no words for, or that
llama.cpp would take for another, is refused by name, and no file says less than the model is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from jaxmerge.files.checkpoints import gguf_config, gguf_rope, gguf_tokenizer
from jaxmerge.files.checkpoints.gguf import permute
from jaxmerge.files.checkpoints.gguf_config import ARCHITECTURES, EXPERTS, PATTERN, SHARED_WIDE, WIDE
from jaxmerge.files.checkpoints.gguf_rope import FACTORS, WINDOW

from ..log import UserError, is_first_process, say
from ..runtime.disk import new_folder
from ..runtime.processes import broadcast, on_first, to_host
from .config import ModelConfig
from .decoder import Params, shapes
from .families import LOCAL_THETA
from .hf import named
from .hf_config import config_from_hf, differences
from .rope import llama3
from .stacked import unstack_layers
from .tokenizer import Tokenizer

Type = Literal["f32", "f16", "bf16", "q8_0"]
KINDS = {"f32": ("F32", 0), "f16": ("F16", 1), "bf16": ("BF16", 32), "q8_0": ("Q8_0", 7)}
"""Type → its name in the gguf package and its number as the type of a whole file."""
F16_OVERFLOWS = 65520  # rounds to infinity
ROUTER, SHARED_GATE = ".mlp.gate.weight", ".mlp.shared_expert_gate.weight"
BLOCK = 32  # weights of a row that Q8_0 gives one scale
OF_FAMILY = {arch.family: name for name, arch in ARCHITECTURES.items()} | {
    "mistral": "llama", "ministral": "llama", "mixtral": "llama", "olmo3": "olmo2",
}  # fmt: skip
PROBES = (
    "Hello world", "<|im_start|>", " two  spaces,\ta tab\n\n and lines", "1234567890 3.14159 1,000,000",
    "don't we'll I'm CAN'T",
    "naïve café, Straße, 日本語, Привет, مرحبا, 👩‍👩‍👧 😀", "def f(x):\n    return x ** 2  # squared\r\n",
)  # fmt: skip
"""Texts that the tokenizer of a file must cut as the model's own does."""


def save_gguf(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    *,
    type: Type = "q8_0",
    pre: str | None = None,
) -> pathlib.Path:
    """Write a folder with one GGUF file, whole or not at all; host memory holds one tensor, never the model.

    Matrices are stored in `type`, and vectors in float32, as llama.cpp has them.

    Args:
      folder: must not exist, or be empty; the file has its name and the type's.
      tokenizer: fitted to the model.
      type: f32 loses nothing; f16 and bf16 round once; q8_0 gives 32 weights of a row one scale, and rows that 32 does
        not divide are f16.
      pre: llama.cpp's name of how the tokenizer cuts words, where it is none that is known here.

    Returns:
      The file.

    Raises:
      UserError: a family, setting or tokenizer that the format has no words for.
    """
    if type not in KINDS:
        raise UserError(f"type={type!r}; choose {', '.join(KINDS)}")
    folder, params = pathlib.Path(folder), unstack_layers(params)
    kind, number = KINDS[type]
    file = file_of(folder, kind)
    metadata, factors = prepare(config, tokenizer, file, pre=pre)
    general = {
        "general.type": "model",
        "general.name": folder.name,
        "general.file_type": number,
        "general.quantization_version": 2,
    }
    with new_folder(folder) if is_first_process() else contextlib.nullcontext(folder) as temporary:
        _write(temporary / file.name, config, params, general | metadata, factors, kind)
    broadcast(None)
    return file


def file_of(folder: pathlib.Path, kind: str) -> pathlib.Path:
    """The file in a folder, which has the folder's name and the type's."""
    return folder / f"{folder.name}-{kind}.gguf"


def prepare(
    config: ModelConfig, tokenizer: Tokenizer, file: pathlib.Path, *, pre: str | None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(metadata of a file, factors of its rotary frequencies), checked; arguments and errors as of `save_gguf`."""
    metadata, factors = model_metadata(config, file)
    metadata |= tokenizer_metadata(config, tokenizer, file, pre=pre)
    check_config(config, metadata, factors, file)
    return metadata, factors


# --- sizes and switches ---


def model_metadata(config: ModelConfig, file: pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(metadata of the architecture, the tensors that are factors of its rotary frequencies)."""
    arch = OF_FAMILY.get(config.family)
    if arch is None:
        raise UserError(f"{file}: GGUF is not written of {config.family!r}; known: {', '.join(OF_FAMILY)}")
    own: dict[str, Any] = {}
    if arch in ("gemma2", "gemma3", "phi3"):
        own[WINDOW] = config.sliding_window or 0
    if arch == "phi3" and config.sliding_window:
        say(f"note: llama.cpp leaves out the window of {config.sliding_window} keys that this Phi-3 has")
    own |= {key: getattr(config, attribute) for key, attribute in ARCHITECTURES[arch].words.items()}
    own |= _experts(config, arch)
    if ARCHITECTURES[arch].rope.local and config.sliding_window:
        own[WINDOW] = config.sliding_window
        own[PATTERN] = [window is not None for window, _ in config.layers]
    if arch == "gemma3":
        if config.local_rope_theta != LOCAL_THETA:
            raise UserError(
                f"{file}: rope_local_base_freq is {config.local_rope_theta}, and llama.cpp takes {LOCAL_THETA} for "
                "every Gemma 3; write a Hugging Face folder"
            )
        own["rope.freq_base_swa"] = LOCAL_THETA
    rope, factors = _rope(config, file)
    numbers = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": config.rotary_dim,
        "rope.freq_base": config.rope_theta,
        "vocab_size": config.vocab_size,
        **own,
        **rope,
    }
    return {f"{arch}.{key}": value for key, value in numbers.items() if value is not None}, factors


def _experts(config: ModelConfig, arch: str) -> dict[str, Any]:
    """Sizes of a mixture of experts."""
    e = config.experts
    if e is None:
        return {}
    sizes = {WIDE: e.intermediate_size, SHARED_WIDE: e.shared_intermediate_size}
    own = {key: value for key, value in sizes.items() if key in ARCHITECTURES[arch].needed}
    return {**dict(zip(EXPERTS, (e.count, e.per_token), strict=True)), **own}


def _rope(config: ModelConfig, file: pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    s, where = config.rope_scaling, "rope.scaling."
    if s is None:
        return {}, {}
    if s.kind == "linear":
        return {f"{where}type": "linear", f"{where}factor": s.factor}, {}
    if s.kind == "yarn":
        betas = {"yarn_beta_fast": (s.beta_fast, 32.0), "yarn_beta_slow": (s.beta_slow, 1.0)}
        more = {f"{where}{name}": value for name, (value, usual) in betas.items() if value != usual}
        original = {f"{where}original_context_length": s.original_max_position_embeddings}
        return {f"{where}type": "yarn", f"{where}factor": s.factor, **original, **more}, {}
    if s.kind == "llama3":
        plain, _ = llama3(config, config.rope_theta, dataclasses.replace(s, factor=1.0), None)
        scaled, _ = llama3(config, config.rope_theta, s, None)
        return {}, {FACTORS[0]: np.asarray(plain / scaled, np.float32)}
    if s.kind == "longrope":
        original = s.original_max_position_embeddings
        follows = gguf_rope.attention_factor(config.max_position_embeddings, original)
        factor = follows if s.attention_factor is None else s.attention_factor
        both = zip(FACTORS[1:], (s.long_factor, s.short_factor), strict=True)
        numbers = {f"{where}original_context_length": original, f"{where}attn_factor": factor}
        return numbers, {name: np.asarray(values, np.float32) for name, values in both}
    raise UserError(f"{file}: GGUF has no rope scaling {s.kind!r}; write a Hugging Face folder")


def check_config(
    config: ModelConfig, metadata: Mapping[str, Any], factors: Mapping[str, np.ndarray], file: pathlib.Path
) -> None:
    """Raise unless the metadata, as llama.cpp takes them, stand for this config and no other."""
    arch = OF_FAMILY[config.family]
    names = {name for name, _ in named(shapes(config))}
    try:
        read = gguf_config.config_of({"general.architecture": arch, **metadata}, names, factors, source=file)
    except ValueError as error:
        raise UserError(f"{error}; the model cannot be written as GGUF") from error
    found = config_from_hf(read, source=file)
    free = ("family", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id")
    alike = _in_float32(dataclasses.replace(found, **{name: getattr(config, name) for name in free}))
    if alike.experts is not None and config.experts is not None:  # a coefficient of training alone
        experts = dataclasses.replace(alike.experts, balance=config.experts.balance)
        alike = dataclasses.replace(alike, experts=experts)
    if differ := differences(_in_float32(config), alike):
        said = ", ".join(f"{name}={getattr(config, name)!r:.120}" for name in differ)
        raise UserError(
            f"{file}: GGUF's architecture {arch!r} has no words for {said}, and llama.cpp would compute something else;"
            " write a Hugging Face folder"
        )


def _in_float32(config: ModelConfig) -> ModelConfig:
    """A config with its numbers as a file holds them."""

    def single(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(single(x) for x in value)
        return float(np.float32(value)) if isinstance(value, float) else value

    def of(settings: Any) -> dict[str, Any]:
        return {field.name: single(getattr(settings, field.name)) for field in dataclasses.fields(settings)}

    scaling = (
        None if config.rope_scaling is None else dataclasses.replace(config.rope_scaling, **of(config.rope_scaling))
    )
    return dataclasses.replace(config, **{**of(config), "rope_scaling": scaling})


# --- the tokenizer ---


def tokenizer_metadata(
    config: ModelConfig, tokenizer: Tokenizer, file: pathlib.Path, *, pre: str | None
) -> dict[str, Any]:
    """Metadata of a tokenizer, checked: what is read back from them cuts texts as it does."""
    state = json.loads(tokenizer.backend.to_str())
    try:
        metadata = gguf_tokenizer.metadata_of(state, size=config.vocab_size, pre=pre)
    except ValueError as error:
        raise UserError(f"{file}: the tokenizer cannot be written as GGUF: {error}") from error
    for role, name in gguf_tokenizer.ROLES.items():
        if role in tokenizer.special:
            metadata[f"tokenizer.ggml.{name}_token_id"] = tokenizer.id_of(role)
    metadata |= _ends(tokenizer)
    opening, bos = tokenizer.opening, tokenizer.special.get("bos_token")
    if opening not in ((), (tokenizer.id_of("bos_token"),) if bos else ()):
        raise UserError(f"{file}: the tokenizer puts {opening} before a text, and GGUF has words for a BOS alone")
    metadata["tokenizer.ggml.add_bos_token"] = bool(opening)
    metadata["tokenizer.ggml.add_eos_token"] = _closes(tokenizer)
    if tokenizer.chat_template is not None:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    stripping = [t["content"] for t in state["added_tokens"] if t["lstrip"] or t["rstrip"]]
    if stripping:
        say(f"note: GGUF does not say that blanks beside {', '.join(stripping[:4])} are dropped; llama.cpp keeps them")
    if pre is None:
        _check_tokenizer(tokenizer, metadata, file)
    return metadata


def _ends(tokenizer: Tokenizer) -> dict[str, int]:
    """The ends of a text: the tokenizer's own and one more; llama.cpp finds others by their spelling."""
    own = tokenizer.id_of("eos_token") if "eos_token" in tokenizer.special else None
    ends = sorted(tokenizer.eos_ids, key=lambda i: i != own)
    if ends[2:]:
        spelt = ", ".join(repr(tokenizer.backend.id_to_token(i)) for i in ends[2:])
        say(f"note: GGUF names two ends of a text, and this model has {len(ends)}; {spelt} are not in the file")
    names = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    return dict(zip(names, ends, strict=False))


def _closes(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer puts an EOS behind a text by itself."""
    ids = tokenizer.backend.encode("a").ids
    return bool(ids) and ids[-1] in tokenizer.eos_ids and tokenizer.encode("a")[-1:] != ids[-1:]


def _check_tokenizer(tokenizer: Tokenizer, metadata: Mapping[str, Any], file: pathlib.Path) -> None:
    rebuilt = Tokenizer.from_gguf(metadata, source=file)
    for text in PROBES:
        if rebuilt.encode(text, special=True) != tokenizer.encode(text, special=True):
            raise UserError(
                f"{file}: the tokenizer cannot be written as GGUF: read back, it cuts {text!r} otherwise; "
                f"{gguf_tokenizer.WAY_OUT}"
            )


# --- the tensors ---


def _write(
    file: pathlib.Path,
    config: ModelConfig,
    params: Params,
    metadata: Mapping[str, Any],
    factors: Mapping[str, np.ndarray],
    kind: str,
) -> None:
    import gguf

    types, arch = gguf.GGMLQuantizationType, OF_FAMILY[config.family]
    leaves = dict(named(params))
    names = {name: gguf_name(arch, config.num_hidden_layers, name) for name in leaves}
    sizes = {name: _shape(name, leaf.shape) for name, leaf in leaves.items()}
    stored = {name: types[_kind(name, shape, kind)] for name, shape in sizes.items()}
    writer = gguf.GGUFWriter(file, arch) if is_first_process() else None
    with contextlib.closing(writer) if writer is not None else contextlib.nullcontext():
        if writer is not None:
            for key, value in metadata.items():
                _add(writer, key, value)
            for name, values in factors.items():
                writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
            for name in leaves:
                shape = gguf.quant_shape_to_byte_shape(sizes[name], stored[name])
                size = math.prod(shape)
                writer.add_tensor_info(names[name], shape, np.dtype(np.uint8), size, raw_dtype=stored[name])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for values in factors.values():
                writer.write_tensor_data(values)

        def write(name: str, weight: np.ndarray) -> None:
            assert writer is not None
            array = arrange(config, name, weight).reshape(sizes[name])
            if stored[name] == types.F16 and np.abs(array).max() >= F16_OVERFLOWS:
                largest = f"{np.abs(array).max():.4g}"
                raise UserError(f"{file.name}: {name} holds {largest}, more than f16 can; write type=bf16")
            writer.write_tensor_data(np.ascontiguousarray(gguf.quants.quantize(array, stored[name])))

        # Every process takes part in reading an array that is spread over their devices; the first one writes.
        for name in leaves:
            on_first(write, name, to_host(leaves[name].astype(np.float32)))


def _shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that llama.cpp has of a weight: the gate of a shared expert is a vector there."""
    return shape[-1:] if name.endswith(SHARED_GATE) else shape


def _kind(name: str, shape: tuple[int, ...], kind: str) -> str:
    if len(shape) < 2 or name.endswith(ROUTER):  # llama.cpp's converter never rounds a router
        return "F32"
    return "F16" if kind == "Q8_0" and shape[-1] % BLOCK else kind


def gguf_name(arch: str, layers: int, name: str) -> str:
    """Hugging Face name → the name that llama.cpp has for it.

    Example:
      >>> gguf_name("llama", 4, "model.layers.3.mlp.down_proj.weight")
      'blk.3.ffn_down.weight'
    """
    import gguf

    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    found = gguf.get_tensor_name_map(number, layers).get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise UserError(f"GGUF's architecture {arch!r} has no tensor for {name}; write a Hugging Face folder")
    return found


def arrange(config: ModelConfig, name: str, weight: np.ndarray) -> np.ndarray:
    """A weight as llama.cpp's architecture has it: rows of q and k in pairs, 1 added to Gemma's norms; float32."""
    arch = ARCHITECTURES[OF_FAMILY[config.family]]
    module = name.split(".")[-2]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    if arch.permuted and module in heads:
        weight = permute(weight, heads[module])
    if arch.offset and module.endswith("norm"):
        weight = weight + np.float32(1)
    return np.asarray(weight, np.float32)


def _add(writer: Any, key: str, value: Any) -> None:
    """Add a value under the type that llama.cpp reads it as."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)
