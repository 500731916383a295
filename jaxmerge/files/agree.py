r"""What models that are merged do not agree on though their tensors match: their configs, and buffers that some lack.

Two models of one shape may still read their weights differently: another base of the rotary angles, heads of another
count, another norm's epsilon. Their weights are merged all the same, under the config of the base (else of the first
model); a note says which keys differ and how.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from jaxmerge.files.checkpoints.source import Source, Tensor

SHOWN = 6  # keys of one note
LONG = 60  # characters of a value
# Keys that change nothing about what the weights of a model compute, or that other notes speak of.
SILENT = re.compile(
    r"(^|\.)(_\w+|architectures|auto_map|transformers_version|dtype|torch_dtype|use_cache|use_bfloat16|"
    r"output_\w+|return_dict\w*|\w*dropout\w*|\w*_pdrop|\w*_drop|initializer_\w+|init_\w+|pretraining_tp|"
    r"\w+_token_ids?|\w+_token_index|\w+_token|tokenizer_class|gradient_checkpointing|router_aux_loss_coef|"
    r"problem_type|finetuning_task|task_specific_params|prefix|model_name|name_or_path|"
    r"max_length|min_length|do_sample|temperature|top_p|num_beams|quantization_config|unsloth_\w+)(\.|$)"
)
COUNTED = re.compile(r"(^|\.)(num_hidden_layers|n_layers?|num_layers|layer_types|max_window_layers)$")
ROWS = re.compile(r"(^|\.)vocab_size$")
# A key that is not there means what its absence means in all versions: no such thing.
ABSENT_COUNTS = re.compile(r"(^|\.)(rope\.\w+|sliding_window|use_sliding_window|\w*softcap\w*)$")
BEFORE = {"rope.rope_theta": 10000.0, "rope.partial_rotary_factor": 1.0, "rope.factor": 1.0}
# Buffers that follow from the config; older versions of transformers stored them. Newer ones do not read them.
BUFFER = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq|attn\.(masked_)?bias|attention\.(masked_)?bias|"
    r"embeddings\.position_ids|rotary_emb\.(cos|sin)_cached)$"
)


def config_notes(sources: Mapping[str, Source], donor: str, *, whole: bool, rows: bool) -> list[str]:
    """Return a note for each model whose config.json says something else than the donor's.

    Args:
      sources: every model by its name.
      donor: whose config the result has.
      whole: whether whole models are merged, not layers of them: else their counts of layers may differ.
      rows: whether rows of embeddings are merged by number: else their counts may differ too.
    """
    wanted = dict(_flat(sources[donor].config))
    notes = []
    for name, source in sources.items():
        found = dict(_flat(source.config))
        if name == donor or not found or not wanted:
            continue
        keys = {
            key for key in {*wanted, *found} if (whole or not COUNTED.search(key)) and (rows or not ROWS.search(key))
        }
        differ = [key for key in sorted(keys) if _differ(key, wanted, found)]
        if not differ:
            continue
        shown = ", ".join(
            f"{key} ({_shown(found.get(key))}, there {_shown(wanted.get(key))})" for key in differ[:SHOWN]
        )
        more = f" and {len(differ) - SHOWN} keys more" if len(differ) > SHOWN else ""
        notes.append(
            f"config.json of {name} differs from that of {donor} in {shown}{more}; the result has {donor}'s, which "
            "may not fit the other's weights"
        )
    return notes


def _differ(key: str, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    if SILENT.search(key):
        return False
    if key in wanted and key in found:
        return wanted[key] != found[key]
    # Either config may come of a version that does not know the key: then it is what it was before there was one.
    value = wanted.get(key, found.get(key))
    before = next((was for end, was in BEFORE.items() if key.endswith(end)), None)
    return bool(ABSENT_COUNTS.search(key)) and value not in (None, False, before)


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys with dots and their values; what versions of transformers call the rotary settings, under one name."""
    for key, value in config.items():
        if key in ("rope_scaling", "rope_parameters") and isinstance(value, Mapping | None):
            yield from ((f"{prefix}rope.{_rope(name)}", of) for name, of in (value or {}).items() if of != "default")
        elif key == "rope_theta":
            yield f"{prefix}rope.rope_theta", value
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _rope(name: str) -> str:
    return "rope_type" if name == "type" else name


def _shown(value: Any) -> str:
    text = "none" if value is None else repr(value)
    return text if len(text) <= LONG else f"{text[:LONG]}…"


def without_buffers(sources: Mapping[str, Source], notes: list[str]) -> dict[str, Source]:
    """Leave out buffers that follow from the config where not every model stores them.

    A model without a kind of buffer was saved by a newer version of its program, which computes it.
    """
    kinds = {
        name: {kind for tensor in source.tensors.values() if (kind := _kind(tensor))}
        for name, source in sources.items()
    }
    partial = set().union(*kinds.values()) - set.intersection(*kinds.values())
    if not partial:
        return dict(sources)
    result = {}
    for name, source in sources.items():
        kept = {n: tensor for n, tensor in source.tensors.items() if _kind(tensor) not in partial}
        lost = [n for n in source.tensors if n not in kept]
        if lost:
            notes.append(
                f"{name} stores {len(lost)} buffers that follow from config.json ({lost[0]}), other models do not: "
                "left out, they are computed where the model is loaded"
            )
        result[name] = dataclasses.replace(source, tensors=kept) if lost else source
    return result


def _kind(tensor: Tensor) -> str | None:
    """The kind of buffer a tensor is, by the end of its name; None if it is none.

    A mask is told from the bias of an attention by its shape: [1, 1, T, T], or a single number.
    """
    found = BUFFER.search(tensor.name)
    if found is None or (found[2].endswith("bias") and tensor.shape[:2] not in ((), (1,), (1, 1))):
        return None
    return found[2]
