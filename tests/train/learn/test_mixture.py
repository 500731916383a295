"""The stream of a mixture: its laws, for one process and for several, from the start and from the middle."""

import numpy as np
import pytest

from train.learn.mixture import Mixture, chairman, permutation
from train.log import UserError


def listed(mixture, start, stop):
    sources, examples = mixture.draw(start, stop)
    return list(zip(sources.tolist(), examples.tolist(), strict=True))


MIXTURES = [
    Mixture((7,), (), 3),
    Mixture((5, 11, 3), (), 3),
    Mixture((40, 9), (0.7, 0.3), 3),
    Mixture((10, 400, 35), (0.5, 0.2, 0.3), 4),
    Mixture((2, 3, 5, 7), (2, 1, 1, 3.5), 5),
]


@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_resumed_reader_sees_what_the_undisturbed_one_does(mixture):
    whole = listed(mixture, 0, 300)
    for start in (0, 1, 17, 150, 299):
        again = Mixture(mixture.sizes, mixture.rates, mixture.seed)  # nothing kept from before
        assert listed(again, start, 300) == whole[start:]
    assert listed(mixture, 5, 5) == []


@pytest.mark.parametrize("mixture", [m for m in MIXTURES if m.rates])
def test_rates_hold_within_one_example_at_every_point(mixture):
    sources = mixture.draw(0, 2000)[0]
    shares = np.array(mixture.rates) / sum(mixture.rates)
    for k, share in enumerate(shares):
        counts = np.cumsum(sources == k)
        n = np.arange(1, 2001)
        assert np.abs(counts - share * n).max() < 1
        assert np.abs(counts / n - share).max() * 2000 > 0.1  # and the bound is not met by drawing nothing
        assert abs(counts[-1] / 2000 - share) < 1 / 2000


@pytest.mark.parametrize("mixture", MIXTURES)
def test_within_a_source_every_example_comes_once_an_epoch(mixture):
    drawn = listed(mixture, 0, 4 * max(mixture.epoch, 10))
    for k, size in enumerate(mixture.sizes):
        mine = [example for source, example in drawn if source == k]
        epochs = [mine[i : i + size] for i in range(0, len(mine) - size + 1, size)]
        assert epochs
        if mixture.rates:
            assert all(sorted(e) == list(range(size)) for e in epochs)
        if mixture.rates and size > 5 and len(epochs) > 1:
            assert epochs[0] != epochs[1]


@pytest.mark.parametrize("mixture", MIXTURES)
def test_an_epoch_is_the_shortest_that_shows_everything(mixture):
    everything = {(k, i) for k, size in enumerate(mixture.sizes) for i in range(size)}
    assert set(listed(mixture, 0, mixture.epoch)) == everything
    assert set(listed(mixture, 0, mixture.epoch - 1)) < everything
    if not mixture.rates:
        for epoch in range(3):
            drawn = listed(mixture, epoch * mixture.epoch, (epoch + 1) * mixture.epoch)
            assert sorted(drawn) == sorted(everything)


def test_seeds_and_epochs_give_other_orders():
    one, other = Mixture((50, 50), (0.5, 0.5), 1), Mixture((50, 50), (0.5, 0.5), 2)
    assert listed(one, 0, 50) != listed(other, 0, 50)
    orders = [permutation(1, source, epoch, 50).tolist() for source in (0, 1) for epoch in (0, 1)]
    assert len({tuple(o) for o in orders}) == 4
    sources, examples = one.draw(0, 100)
    assert examples[sources == 0].tolist() == permutation(1, 0, 0, 50).tolist()


@pytest.mark.parametrize("quotas", [[1], [3, 1], [1, 1, 1], [5, 3, 2], [97, 2, 1], [33, 33, 34], [1, 2, 3, 4, 5, 6]])
def test_the_schedule_keeps_tijdemans_bound(quotas):
    order, total, K = chairman(quotas), sum(quotas), len(quotas)
    assert np.bincount(order, minlength=K).tolist() == quotas
    for k, quota in enumerate(quotas):
        error = np.abs(np.cumsum(order == k) - quota / total * np.arange(1, total + 1))
        assert error.max() <= 1 - 1 / max(2 * K - 2, 1) + 1e-9


@pytest.mark.parametrize(
    ("sizes", "rates", "message"),
    [
        ((), (), "each needs one or more"),
        ((3, 0), (), "each needs one or more"),
        ((3, 4), (1.0,), "1 rates for 2 sources"),
        ((3, 4), (1.0, 0.0), "must be positive"),
        ((3, 4), (0.123456789, 1.0), "with fewer digits"),
    ],
)
def test_wrong_mixtures_are_refused(sizes, rates, message):
    with pytest.raises(UserError, match=message):
        Mixture(sizes, rates)
