r"""Which models decide a token together: each method is its settings with the formula of the composed logits.

A formula takes the logits of MODEL, then those of the models that the settings name, and gives logits; the next token
is drawn from their softmax as from one model's. Logits and log-probabilities differ by a constant at each position,
which the softmax takes out: a formula that is linear in log-probabilities is written with logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from ..log import UserError

if TYPE_CHECKING:
    import jax

    Formula = Callable[[Sequence[jax.Array], Mapping[str, jax.Array]], jax.Array]
    """(logits of each model [B, V], the numbers of the settings) → logits [B, V]; compiled into the decode step."""


class Decoding:
    """MODEL by itself; methods override what they change."""

    block: ClassVar[str] = "decode"
    """The key's name in messages."""

    @property
    def paths(self) -> Mapping[str, str]:
        """The other models: what reads each (the key, as messages name it) and its path."""
        return {}

    @property
    def numbers(self) -> Mapping[str, float | tuple[float, ...]]:
        """Numbers that the formula reads; arguments of the program, so that another value compiles nothing."""
        return {}

    @property
    def formula(self) -> Formula:
        """What becomes of the logits; not asked where there are no other models."""
        raise NotImplementedError(type(self).__name__)


@dataclasses.dataclass(frozen=True)
class Alone(Decoding):
    """MODEL decides every token by itself."""

    name: Literal["alone"] = "alone"
    """The models decide a token together in this way. The other keys of this block depend on it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProxyTuning(Decoding):
    r"""Tune MODEL by a small model's change: $s = s_M + \alpha (s_{M^+} - s_{M^-})$ of logits.

    $M^+$ is a small model that was tuned, the expert, and $M^-$ the same model before that, the anti-expert. α is 1
    in most of the paper. With α = 0 nothing is changed, and neither is it where both are one model.

    References:
      Liu et al., "Tuning Language Models by Proxy", https://arxiv.org/abs/2401.08565
    """

    name: Literal["proxy_tuning"] = "proxy_tuning"
    """The method."""
    expert: str
    """This is the small model that was tuned; it is named like MODEL."""
    antiexpert: str
    """This is the small model before it was tuned."""
    alpha: float = 1.0
    """The change of the small model is added this many times; 0 leaves MODEL as it is."""

    @property
    def paths(self):
        return {"expert": self.expert, "antiexpert": self.antiexpert}

    @property
    def numbers(self):
        return {"alpha": self.alpha}

    @property
    def formula(self):
        return proxy_tuning


def proxy_tuning(logits, numbers):
    base, expert, antiexpert = logits
    return base + numbers["alpha"] * (expert - antiexpert)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmulatedFineTuning(Decoding):
    r"""Emulate the tuning of MODEL, a large pretrained model, by small models.

    $\log \tilde\pi = \log \pi_L + \sum_i w_i (\log \pi_{t_i} - \log \pi_s) - \log Z$, where $\pi_L$ is MODEL, $\pi_s$ a
    small pretrained model and $\pi_{t_i}$ this small model tuned.

    Tuning is seen as RL under a KL penalty. The reward that the small model was tuned for is then
    $r = \beta \log (\pi_t / \pi_s)$, and the large model tuned for it is proportional to $\pi_L \exp(r / \beta)$, so
    that β cancels. With one tuned model this is up-scaling. With several, tuned for different things, the weights
    choose between these at test time.

    Below 1, `top_p` filters the up-scaling weights $\pi_L / \pi_s$, which are noise where both are small:
    $\log \tilde\pi = \log \pi_t + 1[y \in S] (\log \pi_L - \log \pi_s) - \log Z$, S being the smallest set of tokens to
    which $\pi_t$ gives this probability. We wrote the filter (the paper's conservative decoding) from memory. The
    paper's speculative sampling, which draws from the same distribution faster, is not here.

    References:
      Mitchell et al., "An Emulator for Fine-Tuning Large Language Models using Small Language Models",
      https://arxiv.org/abs/2310.12962
    """

    name: Literal["emulated_fine_tuning"] = "emulated_fine_tuning"
    """The method."""
    tuned: tuple[str, ...]
    """These are the small models that were tuned, most often one; they are named like MODEL."""
    small: str
    """This is the small model before it was tuned."""
    weights: tuple[float, ...] = ()
    """The change of each tuned model counts this much; () counts each once."""
    top_p: float = 1.0
    """MODEL has a say on the likeliest tokens of the tuned model, whose probabilities reach this sum, and the tuned
    model alone decides on the others; 1 gives MODEL a say on all."""

    def __post_init__(self):
        check_weights(self.block, "tuned", self.tuned, self.weights)
        if not 0 < self.top_p <= 1:
            raise UserError(f"{self.block}.top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.top_p < 1 and (len(self.tuned) != 1 or self.weights not in ((), (1.0,))):
            raise UserError(
                f"{self.block}.top_p is {self.top_p}: the filter is of one tuned model of weight 1; set top_p to 1, or "
                "leave the others and weights out"
            )

    @property
    def paths(self):
        return {"small": self.small} | {f"tuned[{i}]": path for i, path in enumerate(self.tuned)}

    @property
    def numbers(self):
        filtered = {"top_p": self.top_p} if self.top_p < 1 else {}
        return filtered or {"weights": self.weights or (1.0,) * len(self.tuned)}

    @property
    def formula(self):
        return up_scaling if self.top_p < 1 else emulated_fine_tuning


def emulated_fine_tuning(logits, numbers):
    large, small, *tuned = logits
    return large + sum(w * (t - small) for w, t in zip(numbers["weights"], tuned, strict=True))


def up_scaling(logits, numbers):
    import jax  # settings are read without jax, which takes a second

    from .sample import least_of

    large, small, tuned = map(jax.nn.log_softmax, logits)
    return tuned + jax.numpy.where(tuned >= least_of(tuned, numbers["top_p"]), large - small, 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniR(Decoding):
    r"""Guide MODEL by small reasoners: $\log \pi = \log \pi_{\text{base}} + \sum_i w_i \log \pi_{r, i} - \log Z$.

    A reasoner was trained with a reward, so that the sum of its log-probabilities is the reward up to a scale; the
    authors' code adds its logits to those of the frozen model. Reasoners of several tasks are added up.

    References:
      Kim et al., "Universal Reasoner: A Single, Composable Plug-and-Play Reasoner for Frozen LLMs",
      https://arxiv.org/abs/2505.19075
    """

    name: Literal["unir"] = "unir"
    """The method."""
    reasoners: tuple[str, ...]
    """These are the reasoners; they are named like MODEL."""
    weights: tuple[float, ...] = ()
    """Each reasoner's log-probabilities count this much; () counts each once, as in the paper."""

    def __post_init__(self):
        check_weights(self.block, "reasoners", self.reasoners, self.weights)

    @property
    def paths(self):
        return {f"reasoners[{i}]": path for i, path in enumerate(self.reasoners)}

    @property
    def numbers(self):
        return {"weights": self.weights or (1.0,) * len(self.reasoners)}

    @property
    def formula(self):
        return unir


def unir(logits, numbers):
    base, *reasoners = logits
    return base + sum(w * r for w, r in zip(numbers["weights"], reasoners, strict=True))


def check_weights(block: str, key: str, paths: Sequence[str], weights: Sequence[float]) -> None:
    if not paths:
        raise UserError(f"{block}.{key} is an empty list; name one model or more")
    if weights and len(weights) != len(paths):
        raise UserError(
            f"{block}.weights has {len(weights)} numbers for {len(paths)} {key}; give one for each, or leave it out"
        )


Decode = Alone | ProxyTuning | EmulatedFineTuning | UniR
DECODINGS: dict[str, type[Decoding]] = {
    "alone": Alone,
    "proxy_tuning": ProxyTuning,
    "emulated_fine_tuning": EmulatedFineTuning,
    "unir": UniR,
}
"""By name: what `decode` may be."""
