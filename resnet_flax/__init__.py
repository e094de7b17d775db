"""The residual networks of He et al. (arXiv:1512.03385, arXiv:1603.05027) in JAX and Flax."""

from resnet_flax.models import create_model

__all__ = ["create_model"]
