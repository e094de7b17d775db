"""Trees of parameters as two vectors, for a loop of training steps.

An optimizer that updates hundreds of arrays is hundreds of small GPU programs, most of which take
longer to start than to run; on vectors it is a few.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def pack(tree: Any) -> Any:
    """Every dict in `tree` (parameters, momentum, …) as {"kernel": …, "other": …}, float32 [n].

    Arrays called "kernel" go into the first, so that `optim.kernels_only` still tells them apart.
    """

    def pack_dict(node):
        if not isinstance(node, dict):
            return node
        parts = {"kernel": [], "other": []}
        for path, x in jax.tree.leaves_with_path(node):
            # cuDNN wants a convolution's kernel by output channels.
            x = jnp.moveaxis(x, 3, 0) if x.ndim == 4 else x
            parts[_name(path)].append(x.astype(jnp.float32).ravel())
        return {name: jnp.concatenate(x) for name, x in parts.items() if x}

    return jax.tree.map(pack_dict, tree, is_leaf=_is_dict)


def slices(vector: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
    """Consecutive parts of a vector."""
    ends = itertools.accumulate(sizes)
    return [vector[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def unpack(packed: Any, like: Any, split: Callable = slices) -> Any:
    """The inverse of `pack`; `like` has the shapes, `split` cuts all vectors but the kernels'."""

    def unpack_dict(node, vectors):
        if not isinstance(node, dict):
            return vectors
        sizes = {"kernel": [], "other": []}
        for path, x in jax.tree.leaves_with_path(node):
            sizes[_name(path)].append(math.prod(x.shape))
        cuts = {"kernel": slices, "other": split}
        parts = {name: iter(cuts[name](x, sizes[name])) for name, x in vectors.items()}

        def take(path, x):
            part = next(parts[_name(path)])
            if x.ndim != 4:
                return part.reshape(x.shape)
            return jnp.moveaxis(part.reshape(x.shape[3], *x.shape[:3]), 0, 3)

        return jax.tree.map_with_path(take, node)

    return jax.tree.map(unpack_dict, like, packed, is_leaf=_is_dict)


def _is_dict(node):
    return isinstance(node, dict)


def _name(path):
    return "kernel" if path[-1].key == "kernel" else "other"
