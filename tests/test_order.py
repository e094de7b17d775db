import numpy as np
import pytest

from resnet_flax.data import order


def test_every_epoch_shows_every_example_once():
    flat = order.indices(seed=3, step=0, count=50, batch_size=7, size=50).reshape(7, 50)
    assert all(sorted(epoch) == list(range(50)) for epoch in flat.tolist())
    assert not np.array_equal(flat[0], flat[1])


@pytest.mark.parametrize("step", [0, 1, 6, 7, 8, 29])
def test_any_piece_equals_the_same_piece_of_the_whole(step):
    whole = order.indices(seed=0, step=0, count=40, batch_size=7, size=50)
    part = order.indices(seed=0, step=step, count=10, batch_size=7, size=50)
    np.testing.assert_array_equal(part, whole[step : step + 10])


@pytest.mark.parametrize(
    ("seed", "golden"),
    [
        (0, [32365, 35783, 39571, 29696, 43786, 21797]),
        (1, [41506, 22606, 11062, 49180, 15143, 17663]),
    ],
)
def test_the_order_is_the_same_for_ever(seed, golden):
    found = order.indices(seed=seed, step=0, count=1, batch_size=6, size=50_000)
    assert found.dtype == np.int32
    assert found.tolist() == [golden]
