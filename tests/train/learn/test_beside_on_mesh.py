"""Entries of a mask and sums of snapshots on several devices: what one device computes."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from helpers.sft_cases import SFT, SIZES, tune

from train.learn.checkpoints import SftCheckpoints
from train.learn.decay import Beside, Cosine
from train.learn.masks import Lift
from train.models.open import random_model
from train.runtime.mesh import make_mesh
from train.runtime.settings import Mesh


@pytest.mark.skipif(len(jax.devices()) < 2, reason="one device")
def test_a_sharded_run_is_that_of_one_device(rows, tmp_path):
    config = dataclasses.replace(
        SFT, schedule="constant", mask=Lift(rank=4, budget=2, every=3), beside=Beside(every=2, block=2, decay=Cosine())
    )
    found = []
    for name, where in (("one", Mesh()), ("two", Mesh(fsdp=2))):
        mesh = make_mesh(where)
        model = random_model(SIZES, mesh, seed=0)
        kept = SftCheckpoints(tmp_path / name / "state", blocks=tmp_path / name / "blocks")
        found.append(tune(model, rows, config, mesh, checkpoints=kept)[0])
        assert {p.name for p in (tmp_path / name / "blocks").iterdir()} == {"0", "1", "blocks.json"}
    placed = [x.sharding.num_devices for x in jax.tree.leaves(found[1])]
    assert max(placed) == 2
    # An entry at the edge may be chosen on one and not on the other; the mean is not moved by it.
    for one, two in zip(*map(jax.tree.leaves, found), strict=True):
        assert np.abs(np.asarray(one) - np.asarray(two)).mean() < 1e-5
