"""Groups of samples made by hand, and the loss of group-relative policy gradients in NumPy."""

from __future__ import annotations

import numpy as np

from train.generate.rollout import Prompt, Sample
from train.generate.settings import Settings
from train.learn.rollouts import Course, Group

PROMPT = (7, 8)
COURSE = Course(
    prompts=[Prompt(str(i), PROMPT) for i in range(3)], categories=["a", "a", "b"],
    solutions=[(11, 12), (21, 22, 23), None], drawing=Settings(samples=2, temperature=1.0, max_new_tokens=6), pad_id=0,
    shown=[PROMPT] * 3, reference={}, student={}, average=dict, several=False,
    logps=lambda params, batch, rows=0: np.zeros(batch["weights"].shape, np.float32),
)  # fmt: skip


def group_of(rewards, *, question=0, lengths=None, reasons=None, seed=0) -> Group:
    """A group of samples with random tokens."""
    draw = np.random.default_rng(seed)
    lengths, reasons = lengths or [4] * len(rewards), reasons or ["eos"] * len(rewards)
    samples = [
        Sample(
            str(question), i, "", tuple(draw.integers(10, 60, n).tolist()), tuple((-draw.random(n)).tolist()), reason
        )
        for i, (n, reason) in enumerate(zip(lengths, reasons, strict=True))
    ]
    return Group(question, PROMPT, samples, np.array(rewards, float))


def batch_of(*, seed: int):
    """Log-probabilities [4, 6] in float64, and a batch whose ratios are on both sides of every clip."""
    draw = np.random.default_rng(seed)
    lengths = [6, 3, 5, 1]
    weights = (np.arange(6) < np.array(lengths)[:, None]).astype(np.float32)
    old = (-2 * draw.random((4, 6))).astype(np.float32)
    logps = old + draw.normal(size=(4, 6)) * 0.3
    return logps, {
        "weights": weights,
        "advantages": np.array([1.0, -0.5, 0.7, -1.2], np.float32),
        "rows": np.ones(4, np.float32),
        "old": old,
        "sampled": (old + 0.2 * draw.normal(size=(4, 6))).astype(np.float32),
        "reference": (old + 0.5 * draw.normal(size=(4, 6))).astype(np.float32),
    }


def loss_in_numpy(options, logps, batch, *, length: int) -> float:
    """The mean loss, token by token, in float64."""
    low, high = options.get("low", 0.2), options.get("high", 0.2)
    each = np.zeros(logps.shape)
    for at in np.argwhere(batch["weights"] > 0):
        i, t = at
        A, old = float(batch["advantages"][i]), float(batch["old"][i, t])
        ratio = np.exp(logps[i, t] - old)
        each[i, t] = -min(ratio * A, min(max(ratio, 1 - low), 1 + high) * A)
        if cap := options.get("cap", 0.0):
            each[i, t] *= min(np.exp(old - float(batch["sampled"][i, t])), cap)
        if beta := options.get("beta", 0.0):
            d = float(batch["reference"][i, t]) - logps[i, t]
            each[i, t] += beta * (np.exp(d) - d - 1)
    counts = batch["weights"].sum(axis=1)
    return {
        "dapo": lambda: each.sum() / counts.sum(),
        "bnpo": lambda: each.sum() / counts.sum(),
        "grpo": lambda: (each.sum(axis=1) / counts).mean(),
        "dr_grpo": lambda: each.sum() / (len(each) * length),
    }[options.get("normalise", "dapo")]()
