"""`python -m resnet_flax` lists the commands."""

from resnet_flax import commands

for name, purpose in commands.find().items():
    print(f"python -m {name:<32} {purpose}")
