import numpy as np
import pytest

from resnet_flax.data import stream


def test_every_epoch_shows_every_example_once():
    flat = stream.indices(seed=3, step=0, count=50, batch_size=7, size=50).ravel()
    assert len(flat) == 350
    for epoch in range(7):
        assert sorted(flat[50 * epoch : 50 * (epoch + 1)]) == list(range(50))
    assert not np.array_equal(flat[:50], flat[50:100])


@pytest.mark.parametrize("step", [0, 1, 6, 7, 8, 29])
def test_any_piece_equals_the_same_piece_of_the_whole(step):
    whole = stream.indices(seed=0, step=0, count=40, batch_size=7, size=50)
    part = stream.indices(seed=0, step=step, count=10, batch_size=7, size=50)
    np.testing.assert_array_equal(part, whole[step : step + 10])


def test_seeds_differ_and_the_stream_is_golden():
    a = stream.indices(seed=0, step=0, count=1, batch_size=6, size=50_000)
    b = stream.indices(seed=1, step=0, count=1, batch_size=6, size=50_000)
    assert a.dtype == np.int32
    # numpy promises that RandomState's stream never changes: neither may these.
    np.testing.assert_array_equal(a, [GOLDEN_0])
    np.testing.assert_array_equal(b, [GOLDEN_1])


GOLDEN_0 = [32365, 35783, 39571, 29696, 43786, 21797]
GOLDEN_1 = [41506, 22606, 11062, 49180, 15143, 17663]
