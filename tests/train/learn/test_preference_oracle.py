"""DPO, IPO, KTO, ORPO and CPO against TRL 1.16.0 on the same log-probabilities (Python 3.11, extra `oracle`)."""

import collections
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.learn.preferences import Cpo, Dpo, Ipo, Kto, Orpo

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

B, T = 6, 9
"""Tokens of a row: two of the prompt, then the answer."""


class Accelerator:
    """One process: what is gathered is what is there."""

    device, num_processes, sync_gradients = "cpu", 1, True

    def gather(self, x):
        return x

    gather_for_metrics = reduce = gather


@pytest.fixture(scope="module")
def case():
    """Log-probabilities of tokens 1 … of [B, 2] answers and their reference's, and where the answers are."""
    random = np.random.default_rng(0)
    logps = -random.gamma(1.0, 1.0, (B, 2, T - 1)).astype(np.float32)
    ends = random.integers(4, T + 1, (B, 2))
    learnt = (np.arange(1, T) >= 2) & (np.arange(1, T) < ends[..., None])
    reference = (logps + 0.3 * random.normal(size=logps.shape)).astype(np.float32)
    return logps, learnt.astype(np.float32), reference, np.array([1, 0, 1, 1, 0, 0], np.float32)


def ours(objective: Any, case):
    """Loss and its gradient by the tokens' log-probabilities."""
    logps, learnt, reference, label = case
    beside = {"reference": jnp.asarray(reference), "label": jnp.asarray(2 * label - 1)}

    def mean(x):
        loss, weight, _ = objective.loss(x, jnp.asarray(learnt), beside)
        return loss / weight

    return jax.value_and_grad(mean)(jnp.asarray(logps))


def close(found, theirs):
    np.testing.assert_allclose(found[0], theirs[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], theirs[1], atol=1e-6)


def outputs_of(rows):
    """What TRL's patched model returns of sequences [N, T − 1]."""
    import torch

    zeros = torch.zeros_like(rows)
    return types.SimpleNamespace(log_probs=rows, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def stub(**fields):
    return types.SimpleNamespace(
        model=types.SimpleNamespace(training=True), accelerator=Accelerator(), aux_loss_enabled=False,
        precompute_ref_logps=True, _metrics={"train": collections.defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
        **fields,
    )  # fmt: skip


def mask_of(learnt):
    """[N, T]: TRL's masks have the first token too."""
    import torch

    return torch.nn.functional.pad(torch.tensor(learnt), (1, 0)).long()


@pytest.mark.parametrize(
    ("objective", "kind"), [(Dpo(beta=0.3), "sigmoid"), (Ipo(beta=0.3, length_normalised=True), "ipo")]
)
def test_dpo_and_ipo(case, objective, kind):
    import torch
    from trl import DPOTrainer

    logps, learnt, reference, _ = case

    def stacked(x):  # the chosen first
        return torch.tensor(np.concatenate([x[:, 0], x[:, 1]]))

    leaf = stacked(logps).requires_grad_()
    mask = mask_of(np.concatenate([learnt[:, 0], learnt[:, 1]]))
    reference_sums = (stacked(reference) * mask[:, 1:]).sum(1)
    inputs = {
        "input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask,
        "ref_chosen_logps": reference_sums[:B], "ref_rejected_logps": reference_sums[B:],
    }  # fmt: skip
    self = stub(
        ld_alpha=None, f_divergence_type="reverse_kl", loss_types=[kind], loss_weights=[1.0], beta=0.3,
        use_weighting=False,
    )  # fmt: skip
    loss = DPOTrainer._compute_loss(self, lambda **_: outputs_of(leaf * mask[:, 1:]), inputs, False)
    loss.backward()
    slope = leaf.grad.numpy()
    close(ours(objective, case), (loss.item(), np.stack([slope[:B], slope[B:]], axis=1)))


def test_kto(case):
    """TRL's mismatched answers are given as the second of our groups."""
    import torch
    from trl import KTOTrainer

    logps, learnt, reference, label = case
    leaf = torch.tensor(logps[:, 0]).requires_grad_()
    mask, other = mask_of(learnt[:, 0]), mask_of(learnt[:, 1])
    sums = (torch.tensor(reference) * torch.tensor(learnt)).sum(-1)
    batch = {
        "input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask,
        "KL_completion_mask": other, "label": torch.tensor(label).bool(),
        "ref_logps": sums[:, 0], "ref_KL_logps": sums[:, 1],
    }  # fmt: skip
    self = stub(calculate_KL=True, loss_type="kto", beta=0.2, desirable_weight=1.5, undesirable_weight=1.0)
    self._compute_kl_logps = lambda model, batch: (torch.tensor(logps[:, 1]) * other[:, 1:]).sum(-1)
    loss = KTOTrainer._compute_loss(self, lambda **_: outputs_of(leaf * mask[:, 1:]), batch, False)
    loss.backward()
    found = ours(Kto(beta=0.2, desirable=1.5), case)
    close((found[0], found[1][:, 0]), (loss.item(), leaf.grad.numpy()))
    assert not np.any(found[1][:, 1])  # no gradient through the estimate


def summed(case, *, means):
    import torch

    logps, learnt, *_ = case
    leaf = torch.tensor(logps).requires_grad_()
    mask = torch.tensor(learnt)
    sums = (leaf * mask).sum(-1)
    return leaf, (sums / mask.sum(-1) if means else sums), -(leaf * mask).sum(-1)[:, 0] / mask.sum(-1)[:, 0]


@pytest.mark.parametrize("name", ["orpo", "cpo", "simpo"])
def test_orpo_and_cpo(case, name):
    """The terms of pairs; TRL's loss of the chosen answer is a mean over all tokens of a batch, ours of each pair."""
    import torch
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    leaf, scores, nll = summed(case, means=name != "cpo")
    fields = {"accelerator": Accelerator(), "label_smoothing": 0.0, "alpha": 0.0, "simpo_gamma": 0.5}
    if name == "orpo":
        self = types.SimpleNamespace(beta=0.4, **fields)
        loss = nll.mean() - ORPOTrainer.odds_ratio_loss(self, scores[:, 0], scores[:, 1])[0].mean()
        objective: Any = Orpo(weight=0.4)
    elif name == "cpo":
        self = types.SimpleNamespace(beta=0.2, loss_type="sigmoid", **fields)
        loss = CPOTrainer.cpo_loss(self, scores[:, 0], scores[:, 1])[0].mean() + 0.7 * nll.mean()
        objective = Cpo(beta=0.2, nll=0.7)
    else:
        self = types.SimpleNamespace(beta=2.0, loss_type="simpo", **fields)
        loss = CPOTrainer.cpo_loss(self, scores[:, 0], scores[:, 1])[0].mean()
        objective = Cpo(beta=2.0, nll=0.0, length_normalised=True, margin=0.5)
    loss.backward()
    assert isinstance(leaf.grad, torch.Tensor)
    close(ours(objective, case), (loss.item(), leaf.grad.numpy()))
