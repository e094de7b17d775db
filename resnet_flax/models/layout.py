"""One canonical layout of variables, whether a net is unrolled or scanned.

Canonical: every block has its own entry, `stage<s>_block<b>`. Scanned: blocks 2 to n of a stage are
stacked along a new first axis under `stage<s>_rest`. Checkpoints and weight files are canonical.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def to_canonical(tree: Any) -> Any:
    """Unstacks every scanned stage in any dict of `tree` (parameters, optimizer state, …)."""

    def unstack(node):
        out = {}
        for name, child in node.items():
            if match := re.fullmatch(r"(stage\d+)_rest", name):
                for i in range(jax.tree.leaves(child)[0].shape[0]):
                    out[f"{match[1]}_block{i + 2}"] = jax.tree.map(lambda x, i=i: _row(x, i), child)
            else:
                out[name] = to_canonical(child)
        return out

    return _map_dicts(unstack, tree)


def to_scanned(tree: Any) -> Any:
    """Stacks blocks 2 to n of every stage: the inverse of `to_canonical`."""

    def stack(node):
        out, rest = {}, {}
        for name, child in node.items():
            match = re.fullmatch(r"(stage\d+)_block(\d+)", name)
            if match and int(match[2]) > 1:
                rest.setdefault(f"{match[1]}_rest", {})[int(match[2])] = child
            else:
                out[name] = to_scanned(child)
        for name, blocks in rest.items():
            out[name] = jax.tree.map(_stack, *(blocks[b] for b in sorted(blocks)))
        return out

    return _map_dicts(stack, tree)


def _map_dicts(function: Callable[[dict], dict], tree: Any) -> Any:
    """`tree` with `function` of every dict that lies in no other dict."""

    def is_dict(node):
        return isinstance(node, dict)

    return jax.tree.map(lambda x: function(x) if is_dict(x) else x, tree, is_leaf=is_dict)


def _row(x, i):
    is_abstract = isinstance(x, jax.ShapeDtypeStruct)
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype) if is_abstract else x[i]


def _stack(*rows):
    return (np if isinstance(rows[0], np.ndarray) else jnp).stack(rows)
