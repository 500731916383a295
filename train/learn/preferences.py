r"""Objectives that compare answers: a better with a worse one of the same prompt, or good and bad ones of many.

$\ell(y) = \sum_t \log p_\theta(y_t \mid x, y_{<t})$ is an answer's log-probability, $s(y) = \ell(y)/|y|$ its mean over
the answer's tokens, $\ell_0$ that of the reference: the model that the training, or the run, began with. w is the
chosen and l the rejected answer, $\Delta = \ell - \ell_0$. The loss is the mean over pairs. Where these differ from TRL
1.16 is said at each.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np

from ..log import UserError
from .objectives import Tokens

Reference = Literal["start", "original"]


def above(name: str, **values: float) -> None:
    """Refuse values that are not above 0."""
    for key, value in values.items():
        if not value > 0:
            raise UserError(f"sft.objective.{key} is {value}; {name} needs it above 0")


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a batch says of its answers: [B, G] each, G = 2."""

    logps: Any
    """ℓ: sums over the answer's tokens."""
    reference: Any
    """ℓ_0, or None."""
    lengths: Any
    """Tokens of the answer; 1 where there is none."""
    pair: Any
    """[B] The weight of a pair; 0 for those that fill up a batch."""

    @property
    def means(self):
        """s."""
        return self.logps / self.lengths

    @property
    def deltas(self):
        """Δ."""
        return self.logps - self.reference


def answers(logps: Any, weights: Any, beside: Mapping[str, Any]) -> Answers:
    """Sums over tokens; a pair that fills up a batch has the log-probabilities −1, which no formula stumbles over."""
    import jax.numpy as jnp

    learnt = weights > 0
    pair = jnp.max(weights[:, 0], axis=-1)

    def total(values):
        return jnp.where(pair[:, None] > 0, jnp.sum(jnp.where(learnt, values, 0.0), axis=-1), -1.0)

    reference = total(beside["reference"]) if "reference" in beside else None
    lengths = jnp.maximum(jnp.sum(learnt, axis=-1), 1).astype(logps.dtype)
    return Answers(total(logps), reference, lengths, pair)


class Pairs(Tokens):
    """The mean over pairs of a function of their two answers."""

    joint: ClassVar[bool] = True
    learns: ClassVar[str] = "pairs"
    counts: ClassVar[str] = "pairs"

    def rewards(self, found: Answers) -> Any:
        """What the objective holds an answer to be worth, [B, 2]; for the metrics."""
        return found.logps if found.reference is None else found.deltas

    def each(self, found: Answers) -> Any:
        """The loss of each pair, [B]."""
        raise NotImplementedError

    def loss(self, logps, weights, beside):
        import jax.numpy as jnp

        found = answers(logps, weights, beside)
        margin = jnp.subtract(*self.rewards(found).T)
        metrics = {
            "preferred": (margin > 0).astype(margin.dtype),
            "margin": margin,
            "chosen_logp": found.logps[:, 0],
            "rejected_logp": found.logps[:, 1],
        }
        sums = {name: jnp.sum(found.pair * value) for name, value in metrics.items()}
        return jnp.sum(found.pair * self.each(found)), jnp.sum(found.pair), sums


@dataclasses.dataclass(frozen=True)
class Dpo(Pairs):
    r"""Direct preference optimisation: $-\log \sigma(\beta(\Delta_w - \Delta_l))$.

    `smoothing` ε is the share of pairs that are thought to be labelled the wrong way round:
    $-(1-\varepsilon)\log\sigma(\beta m) - \varepsilon\log\sigma(-\beta m)$, $m = \Delta_w - \Delta_l$.

    References:
      Rafailov et al., "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
      https://arxiv.org/abs/2305.18290
    """

    name: Literal["dpo"] = "dpo"
    """The objective."""
    beta: float = 0.1
    """β: the larger, the nearer the model stays to the reference."""
    smoothing: float = 0.0
    """ε: this share of the pairs is assumed to be labelled the wrong way round."""
    reference: Reference = "start"
    """The reference is the model that this training starts from (start), or the run's original model (original)."""

    def __post_init__(self):
        above("dpo", beta=self.beta)
        if not 0 <= self.smoothing < 0.5:
            raise UserError(f"sft.objective.smoothing is {self.smoothing}; it must be at least 0 and below 0.5")

    def reference_model(self):
        return self.reference

    def each(self, found):
        import jax

        margin = self.beta * (found.deltas[:, 0] - found.deltas[:, 1])
        right, wrong = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
        return -(1 - self.smoothing) * right - self.smoothing * wrong


@dataclasses.dataclass(frozen=True)
class Ipo(Pairs):
    r"""Identity preference optimisation: $(\Delta_w - \Delta_l - \frac{1}{2\beta})^2$.

    Its optimum is finite, $\Delta_w - \Delta_l = 1/(2\beta)$, also where a pair is always decided the same way. The
    paper's τ is β here. With `length_normalised` each Δ is divided by its answer's tokens, as TRL does.

    References:
      Azar et al., "A General Theoretical Paradigm to Understand Learning from Human Preferences",
      https://arxiv.org/abs/2310.12036, equation 17
    """

    name: Literal["ipo"] = "ipo"
    """The objective."""
    beta: float = 0.1
    """β: the log-ratios of the two answers are drawn to a distance of 1/(2β)."""
    length_normalised: bool = False
    """The log-ratio of an answer is divided by the number of its tokens."""
    reference: Reference = "start"
    """The reference is the model that this training starts from (start), or the run's original model (original)."""

    def __post_init__(self):
        above("ipo", beta=self.beta)

    def reference_model(self):
        return self.reference

    def each(self, found):
        deltas = found.deltas / found.lengths if self.length_normalised else found.deltas
        return (deltas[:, 0] - deltas[:, 1] - 1 / (2 * self.beta)) ** 2


@dataclasses.dataclass(frozen=True)
class Orpo(Pairs):
    r"""Fine-tuning and an odds ratio at once: $-s_w - \lambda\log\sigma(\log\frac{o_w}{o_l})$, $o = e^s/(1-e^s)$.

    No reference. The loss of fine-tuning is the mean of each chosen answer, then over pairs: a pair's loss does not
    depend on its batch. TRL takes the mean over the tokens of a batch, of the prompts too.

    References:
      Hong et al., "ORPO: Monolithic Preference Optimization without Reference Model",
      https://arxiv.org/abs/2403.07691
    """

    name: Literal["orpo"] = "orpo"
    """The objective."""
    weight: float = 0.1
    """λ: the loss is that of the chosen answer and λ times the term of the odds ratio."""

    def __post_init__(self):
        above("orpo", weight=self.weight)

    def each(self, found):
        import jax
        import jax.numpy as jnp

        s = jnp.minimum(found.means, -1e-6)  # the odds of a certain answer are infinite
        near = s > -0.693  # log(1 − e^s) without loss of digits on either side of −log 2
        rest = jnp.where(near, jnp.log(-jnp.expm1(s)), jnp.log1p(-jnp.exp(jnp.where(near, -1.0, s))))
        odds = s - rest
        return -found.means[:, 0] - self.weight * jax.nn.log_sigmoid(odds[:, 0] - odds[:, 1])


@dataclasses.dataclass(frozen=True)
class Cpo(Pairs):
    r"""Contrastive preference optimisation: $-\log\sigma(\beta(\ell_w - \ell_l) - \gamma) - \lambda s_w$; no reference.

    SimPO is `{length_normalised: true, nll: 0}` with β about 2 and a margin γ of about 1: s in place of ℓ. The loss of
    the chosen answer is the mean over its tokens, then over pairs; TRL takes the mean over the tokens of a batch.

    References:
      Xu et al., "Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine
      Translation", https://arxiv.org/abs/2401.08417; Meng et al., "SimPO: Simple Preference Optimization with a
      Reference-Free Reward", https://arxiv.org/abs/2405.14734
    """

    name: Literal["cpo"] = "cpo"
    """The objective."""
    beta: float = 0.1
    """β: log-probabilities are multiplied by it."""
    nll: float = 1.0
    """λ: the mean loss of the chosen answer is added this many times."""
    length_normalised: bool = False
    """The log-probability of an answer is divided by the number of its tokens (SimPO)."""
    margin: float = 0.0
    """γ: the chosen answer should be ahead by this much (SimPO)."""

    def __post_init__(self):
        above("cpo", beta=self.beta)
        if self.nll < 0:
            raise UserError(f"sft.objective.nll is {self.nll}; it must be at least 0")

    def rewards(self, found):
        return found.means if self.length_normalised else found.logps

    def each(self, found):
        import jax

        scores = self.rewards(found)
        ahead = self.beta * (scores[:, 0] - scores[:, 1]) - self.margin
        return -jax.nn.log_sigmoid(ahead) - self.nll * found.means[:, 0]


@dataclasses.dataclass(frozen=True)
class Aft(Pairs):
    r"""Alignment fine-tuning: $-s_w + \log(1 + e^{s_l - s_w})$, with a constraint on how far $s_l$ falls.

    detached: no gradient flows through $s_l$. boundary: $e^{T - s_l}$ is added within the logarithm, with
    $T = s_w - 2\beta$ held constant, so that $s_l$ is pushed down while above $s_w - \beta$ and up while below.
    none: neither. The paper sums over all right and wrong answers of a question; a pair has one of each. The
    boundary's form is from memory: the paper's text was not at hand.

    References:
      Wang et al., "Making Large Language Models Better Reasoners with Alignment", https://arxiv.org/abs/2309.02144
    """

    name: Literal["aft"] = "aft"
    """The objective."""
    constraint: Literal["detached", "boundary", "none"] = "detached"
    """The worse answer's score gets no gradient (detached), is held near a boundary below the better one's, or falls
    freely (none)."""
    beta: float = 0.5
    """boundary: the worse answer's mean log-probability is drawn to this distance below the better one's."""

    def __post_init__(self):
        above("aft", beta=self.beta)

    @property
    def looks(self):
        return self.constraint == "detached"

    def rewards(self, found):
        return found.means

    def each(self, found):
        import jax
        import jax.numpy as jnp

        better, worse = found.means.T
        if self.constraint == "detached":
            worse = jax.lax.stop_gradient(worse)
        terms = [jnp.zeros_like(better), worse - better]
        if self.constraint == "boundary":
            terms.append(jax.lax.stop_gradient(better) - 2 * self.beta - worse)
        return -better + jax.nn.logsumexp(jnp.stack(terms), axis=0)


@dataclasses.dataclass(frozen=True)
class Kto(Tokens):
    r"""Answers that are good or bad, without a partner: $\lambda_y (1 - \sigma(\pm\beta(\Delta - z)))$.

    The sign is + for a good answer. $z = \max(0, \mathrm{mean}\,\Delta(y'|x))$ estimates the divergence from the
    reference; y' is the answer of another prompt of the data, the same one for an x in every epoch, and no gradient
    flows through z. The mean is over the rows of a forward pass on all devices: with `micro_batch` over those of one.
    TRL shifts the answers within a batch.

    References:
      Ethayarajh et al., "KTO: Model Alignment as Prospect Theoretic Optimization", https://arxiv.org/abs/2402.01306
    """

    joint: ClassVar[bool] = True
    learns: ClassVar[str] = "labels"
    counts: ClassVar[str] = "answers"
    name: Literal["kto"] = "kto"
    """The objective."""
    beta: float = 0.1
    """β: the larger, the nearer the model stays to the reference."""
    desirable: float = 1.0
    """The loss of good answers is multiplied by this λ."""
    undesirable: float = 1.0
    """The loss of bad answers is multiplied by this λ."""
    reference: Reference = "start"
    """The reference is the model that this training starts from (start), or the run's original model (original)."""

    def __post_init__(self):
        above("kto", beta=self.beta, desirable=self.desirable, undesirable=self.undesirable)

    @property
    def looks(self):
        return True

    def reference_model(self):
        return self.reference

    def loss(self, logps, weights, beside):
        import jax
        import jax.numpy as jnp

        found = answers(logps, weights, beside)
        own, other = found.deltas.T
        real = found.pair > 0
        count = jnp.maximum(jnp.sum(real.astype(own.dtype)), 1)
        kl = jax.lax.stop_gradient(jnp.maximum(jnp.sum(jnp.where(real, other, 0.0)) / count, 0.0))
        good = beside["label"] > 0
        worth = jax.nn.sigmoid(self.beta * jnp.where(good, own - kl, kl - own))
        each = jnp.where(good, self.desirable * (1 - worth), self.undesirable * (1 - worth))
        sums = {"kl": kl * jnp.sum(found.pair), "good": jnp.sum(jnp.where(good, found.pair, 0.0))}
        return jnp.sum(found.pair * each), jnp.sum(found.pair), sums


@dataclasses.dataclass(frozen=True)
class Fait(Tokens):
    r"""The loss of the chosen answer, its tokens that the rejected one lacks weighing more: $w_t \in \{1, \lambda\}$.

    The two answers are compared as sequences of tokens. Where the rejected one only has more, the next token of the
    chosen one weighs more. The paper compares lines too and derives the weight from probabilities of both programs;
    its formula was not at hand, so λ is a key.

    References:
      Fan et al., "FAIT: Fault-Aware Fine-Tuning for Better Code Generation", https://arxiv.org/abs/2503.16913
    """

    learns: ClassVar[str] = "better"
    name: Literal["fait"] = "fait"
    """The objective."""
    factor: float = 2.0
    """λ: a token that differs counts as much as this many others."""

    def __post_init__(self):
        above("fait", factor=self.factor)

    def weight_of(self, example):
        start = example["prompt_length"]
        differs = differing(example["tokens"][start:], example["rejected"][start:])
        factors = np.concatenate([np.ones(start, np.float32), np.where(differs, np.float32(self.factor), 1.0)])
        return super().weight_of(example) * factors


def differing(ours: list[int], theirs: list[int]) -> np.ndarray:
    """Which tokens of one sequence the other lacks, by difflib.

    Example:
      >>> differing([1, 2, 3, 4], [1, 9, 3, 4]).tolist(), differing([1, 2, 3], [1, 7, 2, 3]).tolist()
      ([False, True, False, False], [False, True, False])
    """
    found = np.zeros(len(ours), bool)
    for kind, _, _, start, end in difflib.SequenceMatcher(None, theirs, ours, autojunk=False).get_opcodes():
        if kind != "equal":
            found[start : max(end, start + 1)] = True
    return found
