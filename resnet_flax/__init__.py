"""The residual networks of He et al. (arXiv:1512.03385, arXiv:1603.05027) in JAX and Flax."""

import importlib
import sys

__all__ = ["create_model", "fit", "load_pretrained"]

_PLACES = {"create_model": "models", "fit": "fitting", "load_pretrained": "pretrained"}

if sys.argv[:1] == ["-m"]:
    # `python -m resnet_flax.…` is about to import the program, which takes seconds.
    importlib.import_module("resnet_flax.commands").begin(sys.orig_argv)


def __getattr__(name: str):
    # Imported when they are asked for: a mistyped flag need not wait for jax.
    if name in _PLACES:
        return getattr(importlib.import_module(f"resnet_flax.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
