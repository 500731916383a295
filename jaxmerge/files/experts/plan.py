"""From a recipe of experts and its open models to jobs: one a tensor of the result, in the order of its layers.

An expert's matrix is a copy, times `residual_scale` where the recipe has one, and so goes through the engine as any
merge does: a few tensors in memory, a journal, the same bytes after an interruption. Gates are made before that.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.files import companions
from jaxmerge.files.checkpoints import safetensors
from jaxmerge.files.checkpoints.source import MadeByRows, Source, Tensor, main_dtype, read
from jaxmerge.files.experts import families, gates
from jaxmerge.files.experts.families import PARTS, RESIDUAL, SHARED, SHARED_GATE, Architecture
from jaxmerge.files.experts.recipe import Expert, Experts
from jaxmerge.files.methods import COPY
from jaxmerge.files.operands import listed
from jaxmerge.files.plan import Input, Job, Plan


@dataclasses.dataclass(frozen=True, eq=False)
class Made(MadeByRows):
    """A float32 tensor that is in no file: `make` gives all of it, which is small."""

    name: str
    shape: tuple[int, ...]
    where: str
    make: Callable[[], np.ndarray]

    def _rows(self, first: int, last: int) -> np.ndarray:
        rows = np.asarray(self.make(), np.float32)
        return rows[first:last] if self.shape else rows


@dataclasses.dataclass(frozen=True, eq=False)
class Noisy(MadeByRows):
    r"""$\theta + s\,\epsilon$ in float32; row r of $\epsilon$ is drawn with the key of the tensor, folded with r."""

    name: str
    shape: tuple[int, ...]
    where: str
    tensor: Tensor
    scale: float
    key: jax.Array

    @property
    def chunked(self) -> bool:
        return self.tensor.chunked

    def read_into(self, buffer: np.ndarray, start: int = 0) -> None:
        """Fill `buffer` (uint8, C order) with the bytes from byte `start` of the tensor on."""
        if self.chunked:
            super().read_into(buffer, start)
        else:
            whole = self._noisy(read(self.tensor), 0)
            buffer[:] = whole.reshape(-1).view(np.uint8)[start : start + buffer.size]

    def _rows(self, first: int, last: int) -> np.ndarray:
        width = self.tensor.size // self.shape[0]
        rows = np.empty((last - first) * width, np.uint8)
        self.tensor.read_into(rows, first * width)
        return self._noisy(rows.view(self.tensor.dtype).reshape(-1, *self.shape[1:]), first)

    def _noisy(self, rows: np.ndarray, first: int) -> np.ndarray:
        drawn = _draw_rows(self.key, jnp.arange(first, first + len(rows)), math.prod(self.shape[1:]))
        return rows.astype(np.float32) + np.float32(self.scale) * np.asarray(drawn).reshape(rows.shape)


@functools.partial(jax.jit, static_argnums=2)
def _draw_rows(key: jax.Array, numbers: jax.Array, width: int) -> jax.Array:
    return jax.vmap(lambda number: jax.random.normal(jax.random.fold_in(key, number), (width,)))(numbers)


def make(
    recipe: Experts, sources: Mapping[str, Source], *, seed: int, states: gates.States | None, dry_run: bool = False
) -> Plan:
    """Resolve a recipe of experts for open checkpoints.

    Args:
      recipe: a checked recipe.
      sources: every model of `recipe.sources`, open.
      seed: of random gates and of noise.
      states: gives the states of the base model, for gate modes that need them.
      dry_run: check everything, and make gates only when they are read.

    Raises:
      ValueError: the models become no mixture of experts, or its gates cannot be made.
    """
    base = sources[recipe.base]
    notes = [*recipe.notes, *(note for source in sources.values() for note in source.notes)]
    kinds = {name: source.config.get("model_type") for name, source in sources.items()}
    family = families.choose(kinds, len(recipe.shared), recipe.architecture)
    config = families.filled(base.config)
    for name, source in sources.items():
        families.check_config(name, source.config)
    layers = config["num_hidden_layers"]
    _check_base(base, family, layers, config["hidden_size"])
    for expert in recipe.all_experts:
        _check_expert(sources[expert.model], config, layers)
    stored = main_dtype((base.natural.get(name, t.dtype), t.size) for name, t in base.tensors.items())
    dtype = recipe.dtype or stored
    if dtype is None:
        raise ValueError(f"{base.name} holds no floating weights; give a model whose weights are floats")
    rows = _gates(recipe, base, config, seed, states, dry_run)
    if not dry_run:
        notes += gates.parallel_notes(rows())
    planner = _Planner(recipe, sources, family, dtype, seed)
    jobs = tuple(planner.jobs(layers, rows))
    made = family.config(base.config, len(recipe.experts), recipe.per_token)
    made["dtype" if "dtype" in made else "torch_dtype"] = str(dtype)
    made["tie_word_embeddings"] = "lm_head.weight" not in base.tensors
    if not family.windowed and (window := families.window_of(base.config)) is not None:
        notes.append(
            f"{base.name} attends within {window} tokens, {family.title} to all: longer texts are read otherwise"
        )
    return Plan(jobs, companions.contents(base, made, None), "", tuple(dict.fromkeys(notes)))


def _gates(
    recipe: Experts, base: Source, config: families.Config, seed: int, states: gates.States | None, dry_run: bool
) -> Callable[[], np.ndarray]:
    """Check all that gates [L, E, D] need, and return what gives them: made at once, but for a dry run."""
    gates.check_states(recipe.gate_mode, recipe.base, states)
    mode, everyone = gates.GATES[recipe.gate_mode], recipe.all_experts
    prompts: list[tuple[list[list[int]], list[list[int]]]] = []
    if mode.prompts:
        texts = [text for expert in everyone for text in (*expert.positive, *expert.negative)]
        found = iter(gates.tokens_of(base, texts, base.tensors["model.embed_tokens.weight"].shape[0]))
        prompts = [([next(found) for _ in e.positive], [next(found) for _ in e.negative]) for e in everyone]
    size = (config["num_hidden_layers"], len(everyone), config["hidden_size"])
    asked = gates.Asked(base, size[0], size[2], prompts, size[1], seed, states)

    def give() -> np.ndarray:
        rows = mode.make(asked)
        if rows.shape != size or not np.isfinite(rows).all():
            raise ValueError(f"gates of {recipe.base} are {list(rows.shape)} or not finite, wanted {list(size)}")
        return rows

    if dry_run:
        return give
    rows = give()
    return lambda: rows


def _check_base(base: Source, family: Architecture, layers: int, wide: int) -> None:
    """Raise unless every tensor of the base has a place in the family, and every layer has its tensors."""
    if layers > len(base.tensors):
        raise ValueError(
            f"{base.name}: config.json says num_hidden_layers {layers}, there are {len(base.tensors)} tensors"
        )
    others = [
        name
        for name in base.tensors
        if not (family.keeps(name) or families.MLP.fullmatch(name) or families.COMPUTED.fullmatch(name))
    ]
    if others:
        raise ValueError(f"{base.name} has {listed(others)} for which {family.title} has no place")
    parts = ("input_layernorm", "post_attention_layernorm", *(f"self_attn.{kind}_proj" for kind in "qkvo"))
    wanted = ["model.embed_tokens.weight", "model.norm.weight"]
    wanted += [f"model.layers.{layer}.{part}.weight" for layer in range(layers) for part in parts]
    if missing := [name for name in wanted if name not in base.tensors]:
        raise ValueError(f"{base.name} lacks {listed(missing)}; copy the whole model")
    if (shape := base.tensors["model.embed_tokens.weight"].shape)[1:] != (wide,):
        raise ValueError(
            f"{base.name}: its embedding is {list(shape)}, and config.json says hidden_size {wide}; mend that"
        )
    beyond = [n for n in base.tensors if (found := re.match(families.LAYER, n)) and int(found["layer"]) >= layers]
    if beyond:
        raise ValueError(f"{base.name} has {listed(beyond)} beyond the {layers} layers that its config.json says")


def _check_expert(source: Source, config: families.Config, layers: int) -> None:
    """Raise unless a model has the MLPs of every layer, in the base's sizes."""
    if (counted := source.config["num_hidden_layers"]) != layers:
        raise ValueError(f"{source.name} has {counted} layers, wanted {layers}, as many as the base has")
    wide, mlp = config["hidden_size"], config["intermediate_size"]
    for layer in range(layers):
        for part in PARTS:
            name, wanted = _mlp(layer, part), (wide, mlp) if part == RESIDUAL else (mlp, wide)
            if name not in source.tensors:
                raise ValueError(f"{source.name} has no tensor {name!r}, which an expert has; copy the whole model")
            if (found := source.tensors[name].shape) != wanted:
                raise ValueError(
                    f"tensor {name!r} of {source.name} has shape {list(found)}, wanted {list(wanted)} as in the base; "
                    "experts have its sizes"
                )


def _mlp(layer: int, part: str) -> str:
    return f"model.layers.{layer}.mlp.{part}.weight"


@dataclasses.dataclass(frozen=True)
class _Planner:
    """One recipe on its way to jobs."""

    recipe: Experts
    sources: Mapping[str, Source]
    family: Architecture
    dtype: np.dtype
    seed: int

    def jobs(self, layers: int, rows: Callable[[], np.ndarray]) -> Iterator[Job]:
        """The tensors of the result: what stands before the layers, the layers, and the rest."""
        base = self.sources[self.recipe.base]
        for name, tensor in base.tensors.items():
            if name == "model.embed_tokens.weight":
                yield self._job(name, self.recipe.base, tensor)
        for layer in range(layers):
            front = f"model.layers.{layer}."
            for name, tensor in base.tensors.items():
                if name.startswith(front) and self.family.keeps(name):
                    yield self._job(name, self.recipe.base, tensor)
            yield from self._biases(front)
            yield from self._experts(layer, front, rows)
        for name, tensor in base.tensors.items():
            if not name.startswith("model.layers.") and name != "model.embed_tokens.weight":
                yield self._job(name, self.recipe.base, tensor)

    def _biases(self, front: str) -> Iterator[Job]:
        base = self.sources[self.recipe.base]
        for bias in self.family.biases:
            if (name := front + bias) not in base.tensors:
                shape = base.tensors[front + bias.replace(".bias", ".weight")].shape[:1]
                zeros = Made(name, shape, base.name, lambda shape=shape: np.zeros(shape))
                yield self._job(name, self.recipe.base, zeros)

    def _experts(self, layer: int, front: str, rows: Callable[[], np.ndarray]) -> Iterator[Job]:
        count = len(self.recipe.experts)
        yield self._gate(front + self.family.gate, layer, slice(0, count), rows)
        for i, expert in enumerate(self.recipe.experts):
            for part in PARTS:
                yield self._expert(self.family.expert(layer, i, part), expert, layer, i, part)
        for i, expert in enumerate(self.recipe.shared):
            yield self._gate(front + SHARED_GATE, layer, slice(count + i, count + i + 1), rows)
            for part in PARTS:
                yield self._expert(f"{front}{SHARED}.{part}.weight", expert, layer, count + i, part)

    def _gate(self, name: str, layer: int, which: slice, rows: Callable[[], np.ndarray]) -> Job:
        base = self.sources[self.recipe.base]
        shape = (which.stop - which.start, base.tensors["model.embed_tokens.weight"].shape[1])
        return self._job(name, self.recipe.base, Made(name, shape, base.name, lambda: rows()[layer, which]))

    def _expert(self, name: str, expert: Expert, layer: int, number: int, part: str) -> Job:
        tensor: Tensor = self.sources[expert.model].tensors[_mlp(layer, part)]
        if expert.noise:
            own = (tensor.name, tensor.shape, tensor.where, tensor)
            tensor = Noisy(*own, expert.noise, gates.key_of(self.seed, layer, number, 1 + PARTS.index(part)))
        return self._job(name, expert.model, tensor, expert.residual if part == RESIDUAL else 1.0)

    def _job(self, name: str, model: str, tensor: Tensor, scale: float = 1.0) -> Job:
        dtype = self.dtype if jnp.issubdtype(tensor.dtype, jnp.floating) else tensor.dtype
        safetensors.check_dtype(dtype, name, tensor.where)
        inputs = (Input(model, tensor),)
        return Job(name, name.replace(".", "/"), COPY, inputs, None, {"scale": scale}, None, dtype, tuple(tensor.shape))
