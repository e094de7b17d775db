"""The order of training examples: a pure function of (seed, step)."""

import functools

import numpy as np


@functools.lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of epoch `epoch`, counted from 0: int32 [size].

    `np.random.RandomState` draws it because numpy never changes its stream (NEP 19).
    """
    order = np.random.RandomState([seed, epoch]).permutation(size).astype(np.int32)
    order.flags.writeable = False
    return order


def indices(seed: int, step: int, count: int, batch_size: int, size: int) -> np.ndarray:
    """The examples of steps `step` to `step + count - 1`: int32 [count, batch_size].

    The epochs' permutations follow one another without a gap, and are cut into batches: a batch may
    end one epoch and begin the next.
    """
    start, stop = step * batch_size, (step + count) * batch_size
    parts = []
    while start < stop:
        epoch, offset = divmod(start, size)
        parts.append(permutation(seed, epoch, size)[offset : offset + stop - start])
        start += len(parts[-1])
    return np.concatenate(parts).reshape(count, batch_size)
