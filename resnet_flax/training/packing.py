"""Trees of parameters as two vectors, for a loop of training steps.

An optimizer works number by number. On a net's hundreds of arrays that is hundreds of small
kernels, most of which take longer to start than to run; on vectors it is a few.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def pack(tree: Any) -> Any:
    """Every dict in `tree` (parameters, momentum, …) as {"kernel": …, "other": …}, float32 [n].

    The names are those of the arrays in them, so that what goes by these still does
    (`optim.kernels_only`).
    """
    return jax.tree.map(lambda x: _pack(x) if _is_dict(x) else x, tree, is_leaf=_is_dict)


def slices(vector: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
    """Consecutive parts of a vector."""
    ends = itertools.accumulate(sizes)
    return [vector[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def unpack(packed: Any, like: Any, split: Callable = slices) -> Any:
    """The inverse of `pack`.

    Args:
      packed: from it.
      like: has the shapes of what was packed.
      split: cuts a vector into parts, as `slices` does, for all but the kernels.
    """
    return jax.tree.map(
        lambda x, y: _unpack(y, x, split) if _is_dict(x) else y, like, packed, is_leaf=_is_dict
    )


def _is_dict(node: Any) -> bool:
    return isinstance(node, dict)


def _name(path) -> str:
    return "kernel" if path[-1].key == "kernel" else "other"


def _pack(tree):
    parts = {"kernel": [], "other": []}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        # cuDNN wants a convolution's kernel by output channels.
        x = jnp.moveaxis(x, 3, 0) if x.ndim == 4 else x
        parts[_name(path)].append(x.astype(jnp.float32).ravel())
    return {name: jnp.concatenate(x) for name, x in parts.items() if x}


def _unpack(packed, like, split):
    sizes = {"kernel": [], "other": []}
    for path, x in jax.tree_util.tree_leaves_with_path(like):
        sizes[_name(path)].append(math.prod(x.shape))
    cut = {"kernel": slices, "other": split}
    parts = {name: iter(cut[name](packed[name], sizes[name])) for name in packed}

    def take(path, x):
        part = next(parts[_name(path)])
        if x.ndim != 4:
            return part.reshape(x.shape)
        return jnp.moveaxis(part.reshape(x.shape[3], *x.shape[:3]), 0, 3)

    return jax.tree_util.tree_map_with_path(take, like)
