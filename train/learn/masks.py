r"""Which parameters a run trains: each mask is its settings with the two places at which it may differ.

A mask names parameters that keep their values, which are then as `sft.stay.freeze` has them; and it may name the
entries of others that alone are trained (`sparse.py`). The defaults of `Mask` train everything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np

from ..log import UserError
from ..models.config import ModelConfig
from ..resolve import at_least

if TYPE_CHECKING:  # settings are read without jax, which takes a second
    from .sparse import Entries


class Given(NamedTuple):
    """What a mask may look at when a run, or a round of `improve`, begins."""

    model: ModelConfig
    shapes: dict[str, tuple[int, ...]]
    """Of the parameters, by path."""
    seed: int
    """Of the run and its round."""
    importance: Callable[[int], dict[str, Any]]
    r"""Of the weights for the loss of that many batches, $|w \cdot \partial L/\partial w|$, arrays by path."""


class Mask:
    """Everything is trained; masks override what they change."""

    sparse: ClassVar[bool] = False
    """Whether `entries` is asked: moments are kept of these entries alone."""

    def frozen(self, given: Given) -> list[str]:
        """Paths of the parameters that keep their values."""
        del given
        return []

    def entries(self, given: Given) -> Entries | None:
        """The entries that are trained of parameters that are trained in part; None trains them whole."""
        del given
        return None

    def renews(self, number: int) -> bool:
        """Whether the entries are chosen anew after update `number`."""
        del number
        return False


@dataclasses.dataclass(frozen=True)
class Everything(Mask):
    """All parameters are trained."""

    name: Literal["all"] = "all"
    """The mask is of this kind. The other keys of this block depend on it."""


@dataclasses.dataclass(frozen=True)
class Half(Mask):
    """A random half of every layer is trained; in `improve` another half each round.

    Of four attention matrices two are trained; of three MLP matrices two in a random half of the layers, one in the
    others; of the norms of a layer one half. Embeddings, head and the last norm are trained.

    References:
      Hui et al., "HFT: Half Fine-Tuning for Large Language Models", https://arxiv.org/abs/2404.18466
    """

    name: Literal["half"] = "half"
    """The mask."""

    def frozen(self, given):
        draw = np.random.Generator(np.random.Philox(key=[given.seed, 0x48_46_54]))
        layers = by_layer(given.shapes)
        generous = set(draw.permutation(sorted(layers))[: len(layers) // 2].tolist())
        kept: list[str] = []
        for layer, paths in sorted(layers.items()):
            for part in ("self_attn", "mlp", "norm"):
                modules = sorted({p.rpartition("/")[0] for p in paths if part_of(p) == part})
                # Of an odd number the smaller half is kept, but of MLPs in the layers that are not generous.
                fewer = len(modules) // 2 if part != "mlp" or layer in generous else -(-len(modules) // 2)
                drawn = {modules[i] for i in draw.permutation(len(modules))[:fewer].tolist()}
                kept += [p for p in paths if p.rpartition("/")[0] in drawn]
        return kept


@dataclasses.dataclass(frozen=True)
class Lift(Mask):
    r"""Of every matrix of the layers the entries are trained that are largest in its truncated SVD.

    They are the $k = (m + n) b$ entries of largest $|W_r|$, where $W_r$ is the best approximation of W [m, n] of rank
    r.
    They are chosen anew as the weights move; moments of entries that stay are carried over, and new ones begin at 0.
    All else keeps its value.

    References:
      Liu et al., "LIFT the Veil for the Truth: Principal Weights Emerge after Rank Reduction for Reasoning-Focused
      Supervised Fine-Tuning", https://arxiv.org/abs/2506.00772
    """

    sparse: ClassVar[bool] = True
    name: Literal["lift"] = "lift"
    """The mask."""
    rank: int = 128
    """The entries that are largest in an approximation of this rank are trained."""
    budget: int = 128
    """As many entries are trained as LoRA of this rank would train: (m + n) times this."""
    every: int = 200
    """The entries are chosen anew after every so many updates; 0 keeps the first choice."""

    def __post_init__(self):
        at_least(self, "sft.mask", rank=1, budget=1, every=0)

    def matrices(self, given: Given) -> list[str]:
        return [p for p, shape in given.shapes.items() if layer_of(p) is not None and len(shape) == 2]

    def frozen(self, given):
        return sorted(given.shapes.keys() - set(self.matrices(given)))

    def entries(self, given):
        from .sparse import Principal

        return Principal(tuple(self.matrices(given)), self.rank, self.budget)

    def renews(self, number):
        return self.every > 0 and number % self.every == 0


@dataclasses.dataclass(frozen=True)
class Heads(Mask):
    r"""Some attention heads are trained, and perhaps some MLPs; all else keeps its value.

    A head is its rows of q, its columns of o, and the rows of k and v that it shares with its group. They are given, or
    those are taken without which the loss of the first batches would change most, to first order:
    $\sum_w |w \cdot \partial L/\partial w|$ over a head's q and o, or over an MLP.

    References:
      Zhang et al., "Interpreting and Improving Large Language Models in Arithmetic Calculation",
      https://arxiv.org/abs/2409.01659, whose effects are measured by path patching
    """

    sparse: ClassVar[bool] = True
    name: Literal["heads"] = "heads"
    """The mask."""
    heads: tuple[tuple[int, ...], ...] = ()
    """These heads are trained, each as [layer, head], counted from 0."""
    count: int = 0
    """This many heads, the most important ones, are trained instead of `heads`."""
    mlps: int = 0
    """This many MLPs, the most important ones, are trained too."""
    batches: int = 4
    """Importance is measured on this many batches of the run."""

    def __post_init__(self):
        at_least(self, "sft.mask", count=0, mlps=0, batches=1)
        if bool(self.heads) == bool(self.count):
            raise UserError("sft.mask: give one of heads, a list of [layer, head], and count, a number above 0")
        for pair in self.heads:
            if len(pair) != 2:
                raise UserError(f"sft.mask.heads: {list(pair)} is no head; it is [layer, head]")

    def chosen(self, given: Given) -> list[tuple[int, int]]:
        """(layer, head) of those that are trained."""
        layers, heads = given.model.num_hidden_layers, given.model.num_attention_heads
        for layer, head in self.heads:
            if not (0 <= layer < layers and 0 <= head < heads):
                raise UserError(
                    f"sft.mask.heads: [{layer}, {head}] is not there; the model has layers 0 to {layers - 1} of heads "
                    f"0 to {heads - 1}"
                )
        if self.count > layers * heads:
            raise UserError(f"sft.mask.count is {self.count}; the model has {layers * heads} heads")
        if self.heads:
            return sorted({(layer, head) for layer, head in self.heads})
        found, scores = given.importance(self.batches), {}
        for layer in range(layers):
            for head in range(heads):
                scores[layer, head] = sum(
                    float(found[path].take(np.asarray(at), axis).sum())
                    for path, axis, at in slices_of(given.model, layer, head, shared=False)
                )
        return sorted(largest(scores, self.count))

    def trained_mlps(self, given: Given) -> set[int]:
        if not self.mlps:
            return set()
        if self.mlps > given.model.num_hidden_layers:
            raise UserError(f"sft.mask.mlps is {self.mlps}; the model has {given.model.num_hidden_layers} layers")
        sums = summed(given, self.batches, lambda path: part_of(path) == "mlp")
        return set(largest(sums, self.mlps))

    def frozen(self, given):
        parts, mlps = {path for path, *_ in self.slices(given)}, self.trained_mlps(given)
        return [
            path
            for path in given.shapes
            if path not in parts and not (part_of(path) == "mlp" and layer_of(path) in mlps)
        ]

    def slices(self, given: Given) -> list[tuple[str, int, tuple[int, ...]]]:
        found: dict[tuple[str, int], set[int]] = {}
        for layer, head in self.chosen(given):
            for path, axis, at in slices_of(given.model, layer, head):
                for one in (path, path.removesuffix("weight") + "bias") if axis == 0 else (path,):
                    if one in given.shapes:
                        found.setdefault((one, axis), set()).update(at)
        return [(path, axis, tuple(sorted(at))) for (path, axis), at in found.items()]

    def entries(self, given):
        from .sparse import Slices

        return Slices(tuple(self.slices(given)))


@dataclasses.dataclass(frozen=True)
class Layers(Mask):
    r"""The layers that matter most, or least, are trained; the other layers keep their values.

    The importance of a layer is $\sum_w |w \cdot \partial L/\partial w|$ over its weights for the loss of the first
    batches. Embeddings, head and the last norm are trained; `sft.stay.freeze` can freeze them.

    References:
      Molchanov et al., "Importance Estimation for Neural Network Pruning", https://arxiv.org/abs/1906.10771, without
      its square
    """

    name: Literal["layers"] = "layers"
    """The mask."""
    train: Literal["most", "least"] = "least"
    """These layers are trained, the most or the least important ones."""
    count: int = 1
    """This many layers are trained."""
    batches: int = 4
    """Importance is measured on this many batches of the run."""

    def __post_init__(self):
        at_least(self, "sft.mask", count=1, batches=1)

    def frozen(self, given):
        if self.count > given.model.num_hidden_layers:
            raise UserError(f"sft.mask.count is {self.count}; the model has {given.model.num_hidden_layers} layers")
        sums = summed(given, self.batches, lambda path: layer_of(path) is not None)
        sign = 1 if self.train == "most" else -1
        trained = set(largest({layer: sign * value for layer, value in sums.items()}, self.count))
        return [p for p in given.shapes if (layer := layer_of(p)) is not None and layer not in trained]


Masking = Everything | Half | Lift | Heads | Layers
MASKS: dict[str, type[Mask]] = {"all": Everything, "half": Half, "lift": Lift, "heads": Heads, "layers": Layers}
"""By name: what `sft.mask` may be."""


# --- the parts of a layer ----------------------------------------------------------------------------------


def layer_of(path: str) -> int | None:
    """The layer that a parameter is of.

    Example:
      >>> layer_of("model/layers/3/mlp/up_proj/weight"), layer_of("lm_head/weight")
      (3, None)
    """
    before, _, rest = path.partition("layers/")
    return int(rest.split("/")[0]) if rest and (not before or before.endswith("/")) else None


def by_layer(paths: Iterable[str]) -> dict[int, list[str]]:
    """The paths of each layer."""
    found: dict[int, list[str]] = {}
    for path in paths:
        if (layer := layer_of(path)) is not None:
            found.setdefault(layer, []).append(path)
    return found


def part_of(path: str) -> str:
    """The part of a layer that a parameter is of: norm, self_attn or mlp; "" elsewhere.

    Example:
      >>> part_of("model/layers/0/self_attn/q_norm/weight"), part_of("model/layers/0/mlp/up_proj/bias")
      ('norm', 'mlp')
    """
    if layer_of(path) is None:
        return ""
    return next(part for part in ("norm", "self_attn", "mlp", "") if part in path)


def slices_of(
    model: ModelConfig, layer: int, head: int, *, shared: bool = True
) -> list[tuple[str, int, tuple[int, ...]]]:
    """Where a head is: (path, axis, indices along it), with `shared` also the k and v of its group."""
    size, queries, keys = model.head_dim, model.num_attention_heads, model.num_key_value_heads
    group = head // (queries // keys)
    at = f"model/layers/{layer}/self_attn"

    def rows(number: int) -> tuple[int, ...]:
        return tuple(range(number * size, (number + 1) * size))

    found = [(f"{at}/o_proj/weight", 1, rows(head))]
    if model.fused_projections:
        numbers = [head, queries + group, queries + keys + group] if shared else [head]
        return [*found, *((f"{at}/qkv_proj/weight", 0, rows(number)) for number in numbers)]
    found.append((f"{at}/q_proj/weight", 0, rows(head)))
    return found + [(f"{at}/{name}_proj/weight", 0, rows(group)) for name in ("k", "v") if shared]


def summed(given: Given, batches: int, chosen: Callable[[str], bool]) -> dict[int, float]:
    """Importance by layer, over the parameters whose path is chosen."""
    sums: dict[int, float] = {}
    for path, values in given.importance(batches).items():
        if chosen(path) and (layer := layer_of(path)) is not None:
            sums[layer] = sums.get(layer, 0.0) + float(values.sum())
    return sums


def largest(scores: dict[Any, float], count: int) -> list[Any]:
    """The keys of the `count` largest values; of equal ones the first."""
    return sorted(scores, key=lambda key: (-scores[key], key))[:count]
