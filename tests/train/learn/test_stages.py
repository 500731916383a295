"""Examples in stages: what a stage holds is counted, and no stage begins before the one before it ends."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
from helpers.sft_cases import SFT

from train.learn.batches import batches, to_drawn
from train.learn.settings import Data
from train.learn.stages import staged
from train.log import UserError
from train.models.characters import PAD_ID
from train.resolve import build

DMT = ((1.0, 1 / 8), (0.0, 1.0))


def test_every_stage_has_its_shares_and_a_smaller_share_is_part_of_a_larger_one():
    sizes, shares, epochs = (64, 40, 7), ((1.0, 0.125, 0.25), (0.0, 1.0, 0.0), (0.01, 0.5, 1.0)), 3
    passes = [one for group in staged(sizes, shares, epochs, seed=5) for one in group]
    counts = ({0: 64, 2: 1}, {0: 8, 1: 40, 2: 4}, {0: 16, 2: 7})
    assert [Counter(sources.tolist()) for sources, _ in passes] == [c for c in counts for _ in range(epochs)]
    seen = [{(k, i) for k, i in zip(*map(np.ndarray.tolist, one), strict=True)} for one in passes]
    assert all(len(s) == len(sources) for s, (sources, _) in zip(seen, passes, strict=True)), "no example twice"
    assert seen[0] == seen[1] == seen[2]
    assert not np.array_equal(passes[0][1], passes[1][1]), "each epoch has an order of its own"
    special = [{e for e in s if e[0] == 0} for s in (seen[3], seen[6], seen[0])]
    assert special[0] < special[1] < special[2]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("epochs", [1, 3])
def test_the_batches_of_a_run_go_through_the_stages(examples, packing, epochs):
    """Of two sources told apart by their first token."""
    special = [{**e, "tokens": [7, *e["tokens"][1:]]} for e in examples[:16]]
    general = [{**e, "tokens": [9, *e["tokens"][1:]]} for e in examples[16:28]]
    config = dataclasses.replace(SFT, batch=4, epochs=epochs, packing=packing, max_length=96)
    rows = to_drawn([special, general], config, PAD_ID, stages=DMT, seed=3)
    order = []
    for batch in batches(rows, config, seed=3):
        for row, segments in zip(batch["tokens"], batch.get("segments", (batch["tokens"] > 0) * 1), strict=True):
            order += [int(row[np.argmax(segments == s)]) for s in range(1, segments.max() + 1)]
    assert Counter(order[: 16 * epochs]) == {7: 16 * epochs}
    assert Counter(order[16 * epochs :]) == {9: 12 * epochs, 7: 2 * epochs}
    again = to_drawn([special, general], config, PAD_ID, stages=DMT, seed=3)
    assert again.epochs == rows.epochs


def test_errors_name_the_parts_and_the_stage():
    def data(*stages, **more):
        return build(Data, {"parts": [{"path": f"p{i}", "stages": s, **more} for i, s in enumerate(stages)]})

    assert data([1, 0.1], [0, 1]).parts[0].stages == (1.0, 0.1)
    for stages, more, match in (
        (([1, 2], [0, 1]), {}, r"stages of p0 are \[1.0, 2.0\]; shares, 0 to 1"),
        (([1, 0.1], [1]), {}, r"the parts have \[1, 2\] stages; give each as many"),
        (([1, 0.1], []), {}, r"the parts have \[0, 2\] stages"),
        (([1, 0], [0.5, 0]), {}, "no part has a share in stage 2"),
        (([1], [1]), {"rate": 1.0}, "leave out rate and draws"),
    ):
        with pytest.raises(UserError, match=match):
            data(*stages, **more)
