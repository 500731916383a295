r"""What fine-tuning minimises: each objective is its settings with the three places at which it may differ.

The loss is $\sum_t w_t\,(-\log p_\theta(y_t \mid \tilde y_{<t})) / \sum_t w_t$, or any function of these
log-probabilities. An objective says what weight w an example has, which inputs $\tilde y$ the model sees in place of
the tokens, and what is computed from the log-probabilities. The defaults of `Tokens` change nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np

from ..generate.settings import COLDEST
from ..log import UserError


class Tokens:
    """The loss of every learnt token, each by itself; objectives override what they change."""

    joint: ClassVar[bool] = False
    """Whether `loss` is asked; elsewhere the weighted losses are summed, which computes the logits once, not twice."""
    learns: ClassVar[str] = "answers"
    """What a row of a batch is: a key of `BUILDERS` of pairs.py."""
    counts: ClassVar[str] = "tokens"
    """What the sum of losses is divided by the number of."""

    @property
    def looks(self) -> bool:
        """Whether `loss` lets no gradient flow through the second sequence of a row, so that none is computed."""
        return False

    def check(self, vocab_size: int) -> None:
        """Raise what does not fit the model."""
        del vocab_size

    def reference_model(self) -> Literal["start", "original"] | None:
        """Whose log-probabilities `loss` finds as `reference` beside its own, of the same shape; None is nobody's."""
        return None

    def weight_of(self, example: Mapping[str, Any]) -> Any:
        """The weight w of an example's tokens, one number or one for each token.

        It is 0 or more, and of either sign for the objective `signed`.
        """
        weight = example.get("weight", 1.0)
        if weight < 0:
            raise UserError(
                f"an example has the weight {weight:g}; weights below 0 are learnt by sft.objective={{name: signed}}, "
                "without sft.watch.held_out"
            )
        return weight

    def inputs(
        self, tokens: np.ndarray, weights: np.ndarray, *, numbers: np.ndarray, seed: int, done: float
    ) -> np.ndarray | None:
        """What the model sees in place of `tokens` [B, T] int32; None is the tokens themselves.

        Args:
          weights: [B, T], not 0 where a token is learnt.
          numbers: of the rows in the run [B], so that a resumed run draws what an undisturbed one does.
          done: share of the steps that are behind.
        """
        del tokens, weights, numbers, seed, done
        return None

    def loss(self, logps: Any, weights: Any, beside: Mapping[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
        """Sum of losses, sum of weights, sums of metrics: `Objective` of models/loss.py, which says the shapes."""
        del beside
        return -(weights * logps).sum(), weights.sum(), {}


@dataclasses.dataclass(frozen=True)
class ResponseOnly(Tokens):
    r"""The mean loss of the completion's tokens: $-\log p_\theta(y_t \mid y_{<t})$."""

    name: Literal["response_only"] = "response_only"
    """This objective is minimised. The other keys of this block depend on it."""


@dataclasses.dataclass(frozen=True)
class MaskedThought(Tokens):
    r"""The loss where the model does not see some of the completion's tokens: $-\log p_\theta(y_t \mid \tilde y_{<t})$.

    $\tilde y_s$ is a mask token with probability p, else $y_s$; the labels stay. p rises along a line.

    References:
      Chen et al., "Masked Thought: Simply Masking Partial Reasoning Steps Can Improve Mathematical Reasoning Learning
      of Language Models", https://arxiv.org/abs/2403.02178
    """

    name: Literal["masked_thought"] = "masked_thought"
    """The objective."""
    token: int | None = None
    """The token of this number hides others. It must be given: take the tokenizer's mask or padding token."""
    probability: float = 0.4
    """This share of the completion's tokens is hidden at last; it rises from 0."""
    rise: float = 0.667
    """The share of hidden tokens rises over this share of the steps."""

    def __post_init__(self):
        if self.token is None or self.token < 0:
            raise UserError(
                f"sft.objective.token is {self.token}; masked_thought needs the number of the tokenizer's mask or "
                "padding token"
            )
        if not 0 <= self.probability <= 1 or not 0 <= self.rise <= 1:
            raise UserError(
                f"sft.objective: probability is {self.probability}, rise is {self.rise}; both are shares, 0 to 1"
            )

    def check(self, vocab_size: int) -> None:
        if self.token is not None and self.token >= vocab_size:
            raise UserError(f"sft.objective.token is {self.token}; the model has {vocab_size} tokens, from 0 on")

    def inputs(self, tokens, weights, *, numbers, seed, done):
        p = self.probability * min(1.0, done / self.rise if self.rise else 1.0)
        # Orders are drawn from keys below 2^62 and above 2^63 (batches.py).
        draws = [np.random.Generator(np.random.Philox(key=[seed, (1 << 62) + int(n)])) for n in numbers]
        hidden = np.stack([draw.random(tokens.shape[1]) for draw in draws]) < p
        return np.where(hidden & (weights != 0), np.int32(self.token or 0), tokens)


@dataclasses.dataclass(frozen=True)
class RewardWeighted(Tokens):
    r"""The loss with examples weighted by their rewards: $w = \exp(r / \tau)$ for every token of an example.

    The mean is over Σ w, so a constant added to all rewards changes nothing. r is the key `reward` of an example, or
    the score of a sample of a run; without either it is 0.

    References:
      Qu et al., "Recursive Introspection: Teaching Language Model Agents How to Self-Improve",
      https://arxiv.org/abs/2407.18219 (RISE)
    """

    name: Literal["reward_weighted"] = "reward_weighted"
    """The objective."""
    temperature: float = 1.0
    """If the rewards of two examples differ by this τ, their weights differ by the factor e."""

    def __post_init__(self):
        if not self.temperature > 0:
            raise UserError(f"sft.objective.temperature is {self.temperature}; it must be above 0")

    def weight_of(self, example):
        exponent = example.get("reward", example.get("score", 0.0)) / self.temperature
        if abs(exponent) > 50:  # float32 sums of such weights are no longer exact, or overflow
            raise UserError(
                f"sft.objective: a reward is {exponent * self.temperature:g}, {exponent:g} times the temperature; "
                "exp(reward/temperature) needs at most 50: raise sft.objective.temperature or scale the rewards"
            )
        return super().weight_of(example) * math.exp(exponent)


@dataclasses.dataclass(frozen=True)
class Talr(Tokens):
    r"""The loss with unlikely tokens weighted down: $c_t = \max(p_\theta(y_t)^{1/\tau}, c_{\min})$.

    No gradient flows through c. $p^{1/\tau} = \exp(-\ell/\tau)$ is, up to its sum, the minimum over weights of the
    weighted loss less τ times their entropy. The paper's τ is the median over a batch of the examples' mean losses
    (`temperature: null`); here 1 is the default, with which an example's loss does not depend on the others of its
    batch. The mean is over the number of tokens and not over Σ c: a batch of unlikely tokens moves the parameters less.
    The paper's text was not at hand: τ is from summaries of it, the floor is a key.

    References:
      Lin et al., "SFT Doesn't Always Hurt General Capabilities: Revisiting Domain-Specific Fine-Tuning in LLMs",
      https://arxiv.org/abs/2509.20758 (token-adaptive loss reweighting)
    """

    joint: ClassVar[bool] = True
    name: Literal["talr"] = "talr"
    """The objective."""
    temperature: float | None = 1.0
    """A token whose loss is this τ counts 1/e times as much as one whose loss is 0; null takes the median of the mean
    losses of a forward pass's rows."""
    floor: float = 0.01
    """No token counts less than this times as much as one whose loss is 0."""

    def __post_init__(self):
        if (self.temperature is not None and not self.temperature >= COLDEST) or not 0 <= self.floor <= 1:
            raise UserError(
                f"sft.objective: temperature is {self.temperature} (above {COLDEST:g}, or null), floor is "
                f"{self.floor} (a share, 0 to 1)"
            )

    def loss(self, logps, weights, beside):
        import jax  # settings are read without jax, which takes a second
        import jax.numpy as jnp

        held, temperature = jax.lax.stop_gradient(logps), self.temperature
        if temperature is None:
            counts = jnp.sum((weights > 0).astype(held.dtype), axis=-1)
            means = -jnp.sum(jnp.where(weights > 0, held, 0.0), axis=-1) / jnp.maximum(counts, 1)
            ordered, real = jnp.sort(jnp.where(counts > 0, means, jnp.inf)), jnp.sum(counts > 0)
            middle = ordered[jnp.maximum(real - 1, 0) // 2] + ordered[real // 2]
            temperature = jnp.maximum(jnp.where(real > 0, middle / 2, 1.0), 1e-6)
        factors = jnp.maximum(jnp.exp(held / temperature), self.floor)
        return super().loss(logps, weights * factors, beside)[0], weights.sum(), {}


@dataclasses.dataclass(frozen=True)
class Signed(Tokens):
    r"""The loss with weights of either sign, over n learnt tokens: $\frac1n\sum_t w_t (-\log p_\theta(y_t))$.

    An example of negative weight is made less likely. Elsewhere Σ w divides the loss, and a common factor of all
    weights cancels; here it stays, as the control variate of TRICE needs, whose weights vanish when all answers are
    right. w is the key `reward` of a line, or the weight of a sample of a run. An example of weight 0 is left out.

    References:
      Phan et al., "Training Chain-of-Thought via Latent-Variable Inference", https://arxiv.org/abs/2312.02179
    """

    joint: ClassVar[bool] = True
    name: Literal["signed"] = "signed"
    """The objective."""

    def weight_of(self, example):
        return example.get("reward", example.get("weight", 1.0))

    def loss(self, logps, weights, beside):
        return super().loss(logps, weights, beside)[0], (weights != 0).astype(logps.dtype).sum(), {}
