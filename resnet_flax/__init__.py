"""The residual networks of He et al. (arXiv:1512.03385, arXiv:1603.05027) in JAX and Flax."""

from resnet_flax.models import create_model

__all__ = ["create_model", "load_pretrained"]


def __getattr__(name: str):
    # Imported when it is asked for: it brings with it the reading of images and of files.
    if name == "load_pretrained":
        from resnet_flax.pretrained import load_pretrained

        return load_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
