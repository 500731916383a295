"""Divergences of distillation against TRL 1.16.0 on the same logits (Python 3.11, extra `oracle`)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.learn.distill import Distill, ForwardKL, GeneralisedJSD, ReverseKL

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

B, T, V = 3, 5, 11
BETAS = {0.0: ForwardKL(), 0.1: GeneralisedJSD(beta=0.1), 0.5: GeneralisedJSD(), 1.0: ReverseKL()}
"""TRL's beta, whose ends are the KL divergences and no limits of its JSD."""


@pytest.fixture(scope="module")
def case():
    """Logits of student and teacher, and the tokens that are learnt."""
    random = np.random.default_rng(0)
    student, teacher = (2 * random.normal(size=(B, T, V)).astype(np.float32) for _ in range(2))
    return student, teacher, random.random((B, T)) < 0.6


def ours(divergence, temperature, case):
    student, teacher, mask = case
    learnt = mask.astype(np.float32)
    apart = Distill(divergence=divergence, temperature=temperature).apart

    def mean(z):
        each = apart(jax.nn.log_softmax(z), jax.nn.log_softmax(jnp.asarray(teacher)), None)
        return (each * learnt).sum() / learnt.sum()

    return jax.value_and_grad(mean)(jnp.asarray(student))


def theirs(loss, student):
    import torch

    z = torch.tensor(student, requires_grad=True)
    value = loss(z)
    value.backward()
    assert z.grad is not None
    return value.item(), z.grad.numpy()


def close(found, wanted):
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], wanted[1], atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("beta", BETAS)
def test_gkd(case, beta, temperature):
    """`GKDTrainer.generalized_jsd_loss` with labels that mask tokens; it adds the vocabulary up and takes the mean."""
    import torch
    from trl.experimental.gkd import GKDTrainer

    student, teacher, learnt = case
    labels = torch.tensor(np.where(learnt, 1, -100))

    def loss(z):
        return GKDTrainer.generalized_jsd_loss(z, torch.tensor(teacher), labels, beta=beta, temperature=temperature)

    close(ours(BETAS[beta], temperature, case), theirs(loss, student))


@pytest.mark.parametrize("alpha", BETAS)
def test_sdft(case, alpha):
    """The full-vocabulary loss of `SDFTTrainer`, a number a token."""
    import torch
    from trl.experimental.sdft.loss_utils import compute_full_logit_self_distillation_loss

    student, teacher, learnt = case

    def loss(z):
        each = compute_full_logit_self_distillation_loss(z, torch.tensor(teacher), distillation_alpha=alpha)
        return each[torch.tensor(learnt)].mean()

    close(ours(BETAS[alpha], 1.0, case), theirs(loss, student))
