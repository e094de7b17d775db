"""Command-line tools beside training: `python -m resnet_flax.tools.<name> --help`."""
