"""The nets: `create_model` builds one by name."""

from resnet_flax.models.zoo import ARCHITECTURES, create_model, get_architecture, resolve_shortcut

__all__ = ["ARCHITECTURES", "create_model", "get_architecture", "resolve_shortcut"]
