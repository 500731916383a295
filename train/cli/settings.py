"""Keys of the verbs that no program's settings hold: files on disk, the folder of a run, pages written again."""

from __future__ import annotations

import dataclasses
from typing import Literal

from ..learn.decay import Decay
from ..log import UserError
from ..resolve import at_least
from ..studies.settings import Sweep

Dtype = Literal["float32", "bfloat16", "float16"]


def pushed(options: MergeOptions | ExportOptions, verb: str) -> None:
    """Raise where something is to be private that is not pushed."""
    if options.private and options.push is None:
        raise UserError(f"{verb}.private is of what is put on the hub; add push=ORG/NAME")


def of_gguf(options: MergeOptions | ExportOptions, verb: str) -> None:
    """Raise where a key of GGUF files is given for another format."""
    if options.format != "gguf" and (given := [k for k in ("type", "pre") if getattr(options, k) is not None]):
        raise UserError(f"{verb}.{given[0]} is of GGUF files; add format=gguf")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a program writes."""

    out: str | None = None
    """The run is written to this folder; null writes to `runs/` and the config's name."""


@dataclasses.dataclass(frozen=True)
class Result:
    """Where the result of an evaluation is written."""

    out: str | None = None
    """The result is also written to this file, as JSON; null only prints it."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What makes an experiment of a config of `improve`."""

    sweep: Sweep | None = None
    """The block makes the config an experiment of many runs (docs/experiments.md); null is a single run."""


@dataclasses.dataclass(frozen=True)
class PushOptions:
    """Keys of `jaxmerge push`."""

    private: bool = False
    """The hub's repository is made private; one that is there stays as it is."""


@dataclasses.dataclass(frozen=True)
class MergeOptions:
    """Keys of `jaxmerge merge`."""

    seed: int | None = None
    """This seed replaces the recipe's; null keeps the recipe's."""
    compat: Literal["mergekit"] | None = None
    """With mergekit, the merge does as mergekit does wherever the two differ (docs/merge.md); null keeps our way."""
    allow: tuple[str, ...] = ()
    """Tensors are allowed that some models lack (missing), that the base lacks (unused), or whose shapes differ
    (shapes); each kind is refused otherwise. Several words may be given with commas between."""
    format: Literal["safetensors", "orbax", "fp8", "gguf"] = "safetensors"
    """The result is written in this format. fp8 stores the matrices of linear layers as FP8 with a scale for every tile
    of 128 × 128; gguf writes a folder with one GGUF file for llama.cpp."""
    type: Literal["q8_0", "f16", "bf16"] | None = None
    """The matrices of a GGUF file are stored in this type; null takes q8_0."""
    pre: str | None = None
    """The GGUF file names this pre-tokenizer of llama.cpp; null finds the name of those that are known here."""
    device: str | None = None
    """The arithmetic runs on this kind of device (cpu, gpu, tpu); null leaves the choice to jax."""
    max_shard_bytes: int = 5_000_000_000
    """A file of the result holds at most this many bytes, unless one tensor is larger."""
    conflict: bool = False
    """With --dry-run, all weights are read once, and the agreement of the models' changes from the base is printed by
    layer."""
    push: str | None = None
    """The result is also put on the Hugging Face hub under this name, ORG/NAME; null keeps it here."""
    private: bool = False
    """The hub's repository is made private; one that is there stays as it is."""

    def __post_init__(self):
        at_least(self, "merge", max_shard_bytes=1)
        of_gguf(self, "merge")
        pushed(self, "merge")


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Keys of `jaxmerge data`."""

    model: str | None = None
    """The tokenizer and the chat template are those of this model, of which no weights are read; null counts
    characters."""
    examples: int = 5
    """This many examples are shown, from all over the file."""
    split: str = "train"
    """This split of a TFDS version or of a dataset on the hub is read."""
    format: str | None = None
    """The lines have this format; null tells it by their keys."""
    ignore: tuple[str, ...] = ()
    """These keys of the lines are passed over; other unknown keys are errors."""
    learn: Literal["assistant", "last", "each"] = "assistant"
    """These turns of a conversation are learnt, as `data.learn` of `sft` has it."""
    chat_template: str = ""
    """Conversations are rendered with this Jinja file in place of the model's own template."""
    max_length: int = 512
    """What is longer, in tokens, is counted as left out or cut, as `sft.max_length` would."""
    overlong: Literal["drop", "truncate"] = "drop"
    """Longer examples are left out (drop), or cut (truncate)."""

    def __post_init__(self):
        at_least(self, "data", examples=0, max_length=2)


@dataclasses.dataclass(frozen=True)
class InspectOptions:
    """Keys of `jaxmerge inspect`."""

    picture: str | None = None
    """The picture of layers × kinds of matrix is written to this SVG file; null draws none."""
    json: str | None = None
    """The measures of every tensor are written to this JSON file; null writes none."""
    spectrum: int = 0
    """The effective rank of each change is measured, and the overlap of this many leading directions of two changes; 0
    measures neither."""

    def __post_init__(self):
        at_least(self, "inspect", spectrum=0)


@dataclasses.dataclass(frozen=True)
class VerifyOptions:
    """Keys of `jaxmerge verify`."""

    of: str | None = None
    """The folder is compared with this recipe, with `BASE+ADAPTER`, or with a checkpoint of a run; null takes the
    recipe in the folder, or the run that it is of."""
    all: bool = False
    """Every element of every tensor is replayed, not a sample."""
    json: str | None = None
    """The verdicts are written to this JSON file; null writes none."""


@dataclasses.dataclass(frozen=True)
class ExtractOptions:
    """Keys of `jaxmerge extract-lora`."""

    rank: int | None = None
    """Every adapter has this rank: the columns of its first factor. With explained or ratio it is the most that one
    gets; null needs one of these."""
    explained: float | None = None
    """Each matrix gets the smallest rank that holds this share of its change's squared norm; null asks for none."""
    ratio: float | None = None
    """Each matrix gets the singular values that are at least this share of its largest; null asks for none."""
    alpha: float | None = None
    """The adapter's lora_alpha is set to this; null takes the rank, so that the scale is 1."""
    targets: tuple[str, ...] | None = None
    """Weights whose path matches one of these patterns are factored; null factors every matrix of the layers."""
    exclude: tuple[str, ...] = ()
    """Weights whose path matches one of these patterns are not factored, although targets has them."""
    save: tuple[str, ...] = ("**",)
    """Other changed tensors are kept whole if their path matches one of these patterns; `**` keeps all of them."""
    dtype: Dtype = "float32"
    """The factors are written in this precision."""

    def __post_init__(self):
        if self.rank is not None:
            at_least(self, "extract-lora", rank=1)
        elif self.explained is None and self.ratio is None:
            raise UserError("extract-lora: no rank; give rank=16, or explained=0.9 or ratio=0.01 to choose each")


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """Keys of `jaxmerge export`."""

    method: str | None = None
    """The model of this method of the run is written; null reads the first argument as any MODEL."""
    round: int | None = None
    """The model that this round ended with is written; null takes the last round."""
    decay: Decay | None = None
    """The snapshots that fine-tuning kept in blocks (`sft.beside.block`) are merged by this decay of the rate; null
    takes the model as it is."""
    last: float = 1.0
    """With decay, the snapshots of this last share of the fine-tuning are merged."""
    dtype: Dtype = "float32"
    """The weights of a Hugging Face folder are written in this precision."""
    format: Literal["hf", "gguf"] = "hf"
    """With hf, a Hugging Face folder is written; with gguf, a folder with one GGUF file for llama.cpp."""
    type: Literal["q8_0", "f16", "bf16", "f32"] | None = None
    """The matrices of a GGUF file are stored in this type; null takes q8_0."""
    pre: str | None = None
    """The GGUF file names this pre-tokenizer of llama.cpp; null finds the name of those that are known here."""
    push: str | None = None
    """What is written is also put on the Hugging Face hub under this name, ORG/NAME; null keeps it here."""
    private: bool = False
    """The hub's repository is made private; one that is there stays as it is."""

    def __post_init__(self):
        of_gguf(self, "export")
        if self.format == "gguf" and self.dtype != "float32":
            raise UserError(f"export.dtype={self.dtype} is of Hugging Face folders; with format=gguf give type=")
        if self.decay is None and self.last != 1:
            raise UserError(f"export.last={self.last} is of snapshots that are merged; give decay.name=linear")
        if not 0 < self.last <= 1:
            raise UserError(f"export.last is {self.last}; it is a share, above 0 and at most 1")
        pushed(self, "export")


@dataclasses.dataclass(frozen=True)
class ResultsOptions:
    """Keys of `jaxmerge results`."""

    configs: str = "configs/experiments"
    """The experiments are the configs in this folder."""
    folder: str = "docs/results"
    """The rows of the experiments are read from this folder, and the pictures are written there."""
