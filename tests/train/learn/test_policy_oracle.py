"""The losses of group-relative policy gradients against TRL's on the same log-probabilities."""

from collections import defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.policies import batch_of

from train.learn.policy import NORMALISE, PolicyLoss, advantages_of

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]
LENGTH = 6


class Accelerator:
    """What TRL asks of accelerate on one device."""

    num_processes, sync_gradients, device = 1, True, "cpu"

    def gather(self, x):
        return x

    gather_for_metrics = gather

    def reduce(self, x, reduction="sum"):
        return x


def of_trl(name, logps, batch, *, low, high, beta, cap):
    """TRL's loss and its gradient."""
    import torch
    from trl import GRPOTrainer

    given = torch.tensor(logps, dtype=torch.float32, requires_grad=True)
    mask = torch.tensor(batch["weights"])
    stub = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=Accelerator(), aux_loss_enabled=False,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level="token", beta=beta,
        loss_type=name, epsilon_low=low, epsilon_high=high,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1), use_vllm=bool(cap),
        vllm_importance_sampling_correction=True, current_gradient_accumulation_steps=1, max_completion_length=LENGTH,
        _entropy_bonus_enabled=False, _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *a, **k: (given, torch.zeros_like(given), None),
    )  # fmt: skip
    old, sampled, reference = (torch.tensor(batch[k]) for k in ("old", "sampled", "reference"))
    ones = torch.ones_like(mask, dtype=torch.long)
    inputs = {
        "prompt_ids": ones, "prompt_mask": ones, "completion_ids": ones, "completion_mask": mask,
        "advantages": torch.tensor(batch["advantages"]), "old_per_token_logps": old, "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    if cap:
        inputs["importance_sampling_ratio"] = torch.clamp(torch.exp(old - sampled), max=cap)
    loss = GRPOTrainer._compute_loss(stub, None, inputs)
    loss.backward()
    return float(loss), given.grad.numpy()


@pytest.mark.parametrize("name", NORMALISE)
@pytest.mark.parametrize(
    "options",
    [
        {"low": 0.2, "high": 0.2, "beta": 0.0, "cap": 0.0},
        {"low": 0.1, "high": 0.28, "beta": 0.04, "cap": 0.0},
        {"low": 0.2, "high": 0.28, "beta": 0.3, "cap": 1.1},
    ],
    ids=str,
)
def test_losses_are_those_of_trl(name, options):
    logps, batch = batch_of(seed=7)

    def ours(logps):
        beside = {k: v for k, v in batch.items() if k != "weights"}
        loss, weight, _ = PolicyLoss(normalise=name, length=LENGTH, **options).loss(logps, batch["weights"], beside)
        return loss / weight

    loss, slope = jax.value_and_grad(ours)(jnp.asarray(logps, jnp.float32))
    wanted, theirs = of_trl(name, logps, batch, **options)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    np.testing.assert_allclose(slope, theirs, atol=1e-6)


def test_the_groups_advantages_are_those_of_trl():
    """(r − mean) / (std + 1e-4), std with Bessel's correction, as its trainer writes it."""
    import torch
    from trl.trainer.utils import nanstd

    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 0.5, 0.0, 0.0]])
    wanted = (rewards - torch.nanmean(rewards, dim=1, keepdim=True)) / (nanstd(rewards, dim=1)[:, None] + 1e-4)
    ours = np.stack([advantages_of("group", group) for group in rewards.numpy().astype(float)])
    np.testing.assert_allclose(ours, wanted, rtol=1e-5)
