"""The nets: `create_model` builds one by name."""

from resnet_flax.models.zoo import (
    ARCHITECTURES,
    OPTIONS,
    create_model,
    get_architecture,
    resolve_shortcut,
)

__all__ = ["ARCHITECTURES", "OPTIONS", "create_model", "get_architecture", "resolve_shortcut"]
