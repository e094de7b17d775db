"""The order of training examples: a pure function of (seed, step)."""

import functools

import numpy as np


@functools.lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of epoch `epoch` (from 0): int32 [size].

    RandomState, because numpy promises never to change its stream.
    """
    order = np.random.RandomState([seed, epoch]).permutation(size).astype(np.int32)
    order.flags.writeable = False
    return order


def indices(seed: int, step: int, count: int, batch_size: int, size: int) -> np.ndarray:
    """Positions of the examples of steps `step` to `step + count - 1`: int32 [count, batch_size].

    The stream is the endless concatenation of the epochs' permutations, cut into batches: within an
    epoch no example is left out or seen twice, and a batch may end one epoch and begin the next.
    """
    start, stop = step * batch_size, (step + count) * batch_size
    parts = []
    while start < stop:
        epoch, offset = divmod(start, size)
        part = permutation(seed, epoch, size)[offset : offset + stop - start]
        parts.append(part)
        start += len(part)
    return np.concatenate(parts).reshape(count, batch_size)
