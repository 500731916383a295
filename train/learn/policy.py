r"""Group-relative policy gradients: a sample is as good as it is better than the others to its question.

Of the G samples of a question with rewards $r_i$, sample i has an advantage $A_i$, and what is minimised is

$$-\min\big(\rho_t A_i,\ \mathrm{clip}(\rho_t, 1-\varepsilon_l, 1+\varepsilon_h) A_i\big) + \beta\, k_3(t)$$

of each of its tokens, $\rho_t = p_\theta(y_t) / p_{old}(y_t)$, and $k_3 = e^d - d - 1$ with
$d = \log p_{ref}(y_t) - \log p_\theta(y_t)$ an estimate of KL(p_θ ‖ p_ref). With one update a step p_old is p_θ itself,
so that ρ is exactly 1 and the gradient is REINFORCE's.

References:
  Shao et al., "DeepSeekMath", https://arxiv.org/abs/2402.03300 (GRPO)
  Ahmadian et al., "Back to Basics", https://arxiv.org/abs/2402.14740 (RLOO)
  Liu et al., "Understanding R1-Zero-Like Training", https://arxiv.org/abs/2503.20783 (Dr. GRPO)
  Yu et al., "DAPO", https://arxiv.org/abs/2503.14476
  Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025 (truncated importance
  sampling)
  Schulman, "Approximating KL Divergence", http://joschu.net/blog/kl-approx.html
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from ..generate.settings import Draw
from ..log import UserError
from ..resolve import at_least
from .batches import Batch
from .curriculum import Curriculum, chosen_by_bandit, told_of_categories
from .objectives import Tokens
from .rollouts import Course, Group, Lesson, OnPolicy, to_batch

# --- advantages --------------------------------------------------------------------------------------------


def group(rewards: np.ndarray) -> np.ndarray:
    r"""GRPO's $(r - \bar r) / (s + 10^{-4})$, s with Bessel's correction."""
    return mean(rewards) / (rewards.std(ddof=1) + 1e-4) if len(rewards) > 1 else np.zeros_like(rewards)


def leave_one_out(rewards: np.ndarray) -> np.ndarray:
    r"""RLOO's $r_i - \frac{1}{G-1}\sum_{j \ne i} r_j = \frac{G}{G-1}(r_i - \bar r)$: an unbiased baseline."""
    return mean(rewards) * (len(rewards) / max(1, len(rewards) - 1))


def mean(rewards: np.ndarray) -> np.ndarray:
    r"""Dr. GRPO's $r - \bar r$: dividing by s would give more weight to questions nearly all or none can answer."""
    return rewards - rewards.mean()


ADVANTAGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "group": group,
    "leave_one_out": leave_one_out,
    "mean": mean,
}
"""By name: rewards of a group [G] → advantages [G]."""


def advantages_of(name: str, rewards: np.ndarray) -> np.ndarray:
    """Advantages of those of a group's samples that could be judged (not NaN); 0 for the others."""
    judged = ~np.isnan(rewards)
    found = np.zeros(len(rewards))
    if judged.any():
        found[judged] = ADVANTAGES[name](rewards[judged])
    return found


def overlong(length: int, most: int, cache: int) -> float:
    r"""DAPO's soft punishment, added to a reward: 0 up to $L_{max} - L_{cache}$ tokens, then falling to −1 at L_max."""
    return min(0.0, (most - cache - length) / cache) if cache else 0.0


# --- the loss ----------------------------------------------------------------------------------------------


def by_sequence(each, mask, rows, length, count):
    """GRPO: the mean over sequences of the mean over a sequence's tokens."""
    import jax.numpy as jnp

    del length, count
    return ((each * mask).sum(-1) / jnp.maximum(mask.sum(-1), 1.0)).sum(), rows.sum()


def by_token(each, mask, rows, length, count):
    """DAPO: the mean over all tokens of an update."""
    del rows, length
    return (each * mask).sum(), count


def by_token_of_part(each, mask, rows, length, count):
    """BNPO as TRL has it: the mean over the tokens of a micro-batch, then over micro-batches."""
    import jax.numpy as jnp

    del rows, length
    return (each * mask).sum() / jnp.maximum(count, 1.0), jnp.float32(1)


def by_constant(each, mask, rows, length, count):
    """Dr. GRPO: the sum over tokens by a constant, the longest length, and the mean over sequences."""
    del count
    return (each * mask).sum() / length, rows.sum()


NORMALISE: dict[str, Callable[..., tuple[Any, Any]]] = {
    "dapo": by_token,
    "grpo": by_sequence,
    "dr_grpo": by_constant,
    "bnpo": by_token_of_part,
}
"""By name: losses of tokens [B, K], the mask of those that count, 1 for each sequence [B], the longest length, the
number of tokens → the sum of losses and what it is divided by. With rows of several answers B is [B, G]. Sequences that
are left out of the computation are in the numbers of sequences and of tokens."""
OF_PARTS = ("bnpo",)
"""Those of NORMALISE that depend on which sequences are a micro-batch."""


@dataclasses.dataclass(frozen=True)
class PolicyLoss(Tokens):
    """The loss of this file's head as an objective; see `Policy` for the fields.

    A batch has `advantages` and `rows` (1, or 0 where a row only fills up) of each row, `sampled` of each token, with
    several updates `old`, with β `reference`, and with worked solutions `shown`, 1 where a row is one: its loss is
    −log p. Where samples are left out, `absent` [B] is the number of their tokens, and `rows` counts them.
    """

    joint: ClassVar[bool] = True
    normalise: str = "dapo"
    low: float = 0.2
    high: float = 0.2
    beta: float = 0.0
    cap: float = 0.0
    length: int = 1

    def loss(self, logps, weights, beside):
        import jax
        import jax.numpy as jnp

        mask = (weights > 0).astype(jnp.float32)
        A = beside["advantages"][..., None]
        now = jax.lax.stop_gradient(logps)
        old = beside.get("old", now)

        def log_ratio(a, b):
            return jnp.where(mask > 0, a - b, 0.0)  # elsewhere a row's padding has any value

        ratio = jnp.exp(log_ratio(logps, old))
        clipped = jnp.clip(ratio, 1 - self.low, 1 + self.high)
        each = -jnp.minimum(ratio * A, clipped * A)
        drift = log_ratio(old, beside["sampled"])
        if self.cap:
            each *= jnp.minimum(jnp.exp(drift), self.cap)
        learnt = mask
        found = {
            "clipped": (clipped * A < ratio * A).astype(jnp.float32),
            "entropy": -old,
            "drift_mean": jnp.abs(drift),
            "drift_kl": jnp.exp(drift) - drift - 1,
        }
        if self.beta:
            d = log_ratio(beside["reference"], logps)
            k3 = jnp.exp(d) - d - 1
            each += self.beta * k3
            found["kl"] = k3
        if "shown" in beside:
            shown = beside["shown"][..., None] > 0
            each = jnp.where(shown, -logps, each)
            learnt = jnp.where(shown, 0.0, mask)
        count = mask.sum() + (beside["absent"].sum() if "absent" in beside else 0.0)
        loss, weight = NORMALISE[self.normalise](each, mask, beside["rows"], self.length, count)
        # Means over the tokens computed, whatever the loss is divided by: a run divides them by `weight`.
        metrics = {name: weight * (x * learnt).sum() / jnp.maximum(learnt.sum(), 1.0) for name, x in found.items()}
        metrics["drift_max"] = weight * jnp.max(jnp.abs(drift) * learnt)
        return loss, weight, jax.lax.stop_gradient(metrics)


# --- settings ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Policy(OnPolicy):
    """Group-relative policy gradients; `sampling.samples` are a group, `sft` says how an update is computed."""

    name: Literal["grpo"] = "grpo"  # type: ignore[misc]  # a key here
    """The model learns in this way. The other keys of this block depend on it."""
    advantage: Literal["group", "leave_one_out", "mean"] = "group"
    """A sample's advantage is its reward less the mean of its group, over the group's standard deviation (group,
    GRPO's); less the mean of the others (leave_one_out, RLOO's); or less the mean (Dr. GRPO's)."""
    normalise: Literal["dapo", "grpo", "dr_grpo", "bnpo"] = "dapo"
    """The loss of an update is the mean over all its tokens (dapo), the mean over sequences of their means (grpo), the
    mean over sequences of their sums divided by sampling.max_new_tokens (dr_grpo), or the mean over the tokens of each
    micro-batch (bnpo)."""
    clip_low: float = 0.2
    """If a sample is worse than its group, a token is left out once its probability has fallen below 1 − this times
    what it was when it was drawn."""
    clip_high: float = 0.2
    """If a sample is better than its group, a token is left out once its probability has risen above 1 + this times
    what it was when it was drawn (DAPO takes 0.28)."""
    beta: float = 0.0
    """The divergence from the weights before the first step is added with this factor; 0 leaves it out."""
    importance_cap: float = 0.0
    """Above 0, a token's loss is multiplied by its probability for the trainer divided by that for the sampler, but by
    no more than this. It corrects for a sampler of another precision."""
    overlong: Literal["keep", "mask"] = "keep"
    """Samples that reach sampling.max_new_tokens without an end are learnt like the others (keep), or left out
    (mask)."""
    overlong_cache: int = 0
    """The reward of a sample that comes within this many tokens of sampling.max_new_tokens falls steadily, by 1 at that
    limit; 0 punishes no length."""
    share_prompts: bool = True  # type: ignore[misc]  # a key here
    """The answers to a question share a row with their prompt, which is then computed once, if that takes fewer
    operations; false gives each answer a row of its own. The loss is the same."""
    skip_equal: bool = False  # type: ignore[misc]  # a key here
    """Samples whose advantage is exactly 0, as in a group that is all right or all wrong, are left out of an update's
    computation; the loss and its gradient are the same. The metrics clipped, entropy and drift are of the others."""
    redraws: int = 0  # type: ignore[misc]  # a key here
    """A step asks new questions up to this many more times, until `questions` of them have samples whose rewards
    differ; the others are then left out (DAPO's dynamic sampling). 0 asks once and learns from all."""
    worked: bool = False
    """The worked solutions of questions that no sample of a step answers are learnt after the step's samples, where
    there are any (ReLIFT; the paper saves them until they fill a batch)."""
    curriculum: Curriculum | None = None
    """Families of questions are chosen by how much is learnt from them (SEC); null asks all questions in turn."""

    def __post_init__(self):
        super().__post_init__()
        at_least(self, "improver", clip_low=0, clip_high=0, beta=0, importance_cap=0, overlong_cache=0, redraws=0)

    def check(self, drawing, sft, where):
        super().check(drawing, sft, where)
        if (drawing.temperature, drawing.top_k, drawing.top_p) != (1.0, 0, 1.0):
            raise UserError(
                f"{where}.sampling: temperature is {drawing.temperature:g}, top_k {drawing.top_k}, top_p "
                f"{drawing.top_p:g}; a policy learns from samples of its own distribution: set them to 1, 0 and 1"
            )
        if self.skip_equal and (self.beta or not self.share_prompts):
            raise UserError(
                f"{where}.improver: skip_equal is true, beta is {self.beta:g}, share_prompts is "
                f"{str(self.share_prompts).lower()}; samples without an advantage are learnt from where beta is above "
                "0, and left out of rows that share prompts alone: set beta to 0 and share_prompts to true, or "
                "skip_equal to false"
            )
        if drawing.samples < 2:
            raise UserError(f"{where}.sampling.samples is {drawing.samples}; a group has 2 or more")
        if self.overlong_cache >= drawing.max_new_tokens:
            raise UserError(
                f"{where}.improver.overlong_cache is {self.overlong_cache}; it must be below sampling.max_new_tokens="
                f"{drawing.max_new_tokens}"
            )

    def shares(self, sft):
        parts = sft.micro_batch not in (None, sft.batch)
        return self.share_prompts and not (parts and self.normalise in OF_PARTS)

    def objective(self, drawing):
        return PolicyLoss(
            self.normalise, self.clip_low, self.clip_high, self.beta, self.importance_cap, drawing.max_new_tokens
        )

    def choose(self, course, log, *, seed, step, draw):
        if self.curriculum is None:
            return super().choose(course, log, seed=seed, step=step, draw=draw)
        return chosen_by_bandit(self.curriculum, course.categories, log, self.questions, (seed, step, draw))

    def keeps(self, group):
        return differ(group.rewards)

    def shaped(self, group: Group, drawing: Draw) -> np.ndarray:
        """Rewards with the punishment of long samples."""
        lengths = [len(sample.tokens) for sample in group.samples]
        return group.rewards + [overlong(n, drawing.max_new_tokens, self.overlong_cache) for n in lengths]

    def lesson(self, groups, course):
        learnt = [g for g in groups if self.keeps(g)][: self.questions] if self.redraws else list(groups)
        values = [advantages_of(self.advantage, self.shaped(g, course.drawing)) for g in learnt]
        told = {
            "varied": sum(map(self.keeps, groups)) / len(groups),
            **told_of_categories([course.categories[g.question] for g in learnt], values),
        }
        batch, rows = self.batch(learnt, values, course) if learnt else (None, 0)
        return Lesson(batch, told, self.solutions(groups, course) if self.worked else None, rows)

    def batch(self, groups: Sequence[Group], advantages: Sequence[np.ndarray], course: Course) -> tuple[Batch, int]:
        """What is learnt of groups, and the rows of an update (`Lesson.rows`)."""
        pairs, sampled = [], []
        for group in groups:
            for sample, reward in zip(group.samples, group.rewards, strict=True):
                learnt = not (np.isnan(reward) or (self.overlong == "mask" and sample.reason == "length"))
                pairs.append((group.prompt, sample.tokens if learnt else ()))
                sampled.append(sample.logprobs if learnt else ())
        beside = {"sampled": sampled, "advantages": np.concatenate(advantages), "rows": np.ones(len(pairs))}
        if course.sharing is not None and course.sharing.skips:
            batch, rows = course.sharing.without_equal(pairs, course.pad_id, **beside)
        elif course.sharing is not None and (layout := course.sharing.layout(pairs)) is not None:
            batch, rows = course.sharing.batch(pairs, layout, course.pad_id, **beside), layout.rows
        else:
            batch, rows = to_batch(pairs, course.pad_id, **beside), 0
        if course.several:
            batch["old"] = course.logps(course.student, batch, rows)
        return self.beside(batch, course, rows, shown=0.0), rows

    def solutions(self, groups: Sequence[Group], course: Course):
        """Worked solutions of the questions that all samples failed."""
        failed = [g for g in groups if not np.isnan(g.rewards).all() and np.nanmax(g.rewards) <= 0]
        rows = [(g.prompt, found) for g in failed if (found := course.solutions[g.question]) is not None]
        if not rows:
            return None
        nothing = [np.zeros(len(completion)) for _, completion in rows]
        beside: Mapping[str, Any] = {"sampled": nothing} | ({"old": nothing} if course.several else {})
        numbers = {"advantages": np.zeros(len(rows)), "rows": np.ones(len(rows))}
        return self.beside(to_batch(rows, course.pad_id, **beside, **numbers), course, 0, shown=1.0)

    def beside(self, batch: Batch, course: Course, rows: int, *, shown: float) -> Batch:
        if self.beta:
            batch["reference"] = course.logps(course.reference, batch, rows)
        if self.worked:
            batch["shown"] = np.full(batch["rows"].shape, shown, np.float32)
        return batch


def differ(rewards: np.ndarray) -> bool:
    """Whether samples that could be judged have different rewards."""
    judged = rewards[~np.isnan(rewards)]
    return bool(len(judged) and judged.min() < judged.max())
