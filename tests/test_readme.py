"""What README says is what the code does."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import pytest

from resnet_flax import create_model
from resnet_flax.config import base_config, flatten
from resnet_flax.models import ARCHITECTURES, OPTIONS
from tests.conftest import ROOT

# Under which option a net stands whose shortcuts are a variant of it; the others under A.
OWN_SHORTCUTS = {"bare": "B", "conv_shortcut": "C"}
IMAGE = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)


@pytest.fixture(scope="module")
def readme():
    return (ROOT / "README.md").read_text()


@functools.cache
def parts(model):
    """The parameters of the stem, of each block and of the head, by name."""
    params = jax.eval_shape(model.init, jax.random.key(0), IMAGE)["params"]
    return {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in params.items()}


def parameters(name, shortcut):
    """Of the net with two blocks a stage, the second of them as often as the net has it."""
    model = create_model(name, shortcut=shortcut)
    sizes = parts(model.clone(stage_sizes=(2,) * len(model.stage_sizes)))
    more = {f"stage{s}_block2": n - 2 for s, n in enumerate(model.stage_sizes, 1)}
    return sum(sizes.values()) + sum(sizes[block] * times for block, times in more.items())


def net_table():
    """The table of README, made from the code."""
    rows = []
    for name, architecture in ARCHITECTURES.items():
        cells = []
        for option in ("A", "B", "C"):
            if architecture.shortcut not in OPTIONS:
                own = option == OWN_SHORTCUTS.get(architecture.shortcut, "A")
                cells.append(f"**{parameters(name, None):,}**" if own else "\N{EN DASH}")
            else:
                count = f"{parameters(name, option):,}"
                cells.append(f"**{count}**" if option == architecture.shortcut else count)
        rows.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(rows)


def test_the_table_of_nets_is_true(readme):
    inside = readme.split("<!-- nets -->")[1].split("<!-- /nets -->")[0].strip()
    assert inside.split("\n", 2)[2] == net_table()


@pytest.mark.parametrize("file", ["README.md", "launch/README.md"])
def test_files_and_keys_that_it_names_exist(file):
    text = (ROOT / file).read_text()
    for path in re.findall(r"\]\((?!http)([^)\s]+/[^)\s]+)\)", text):
        assert (ROOT / file).parent.joinpath(path).exists(), path
    for path in re.findall(r"(?:configs|launch|tests)/[\w./]+\.(?:py|sh|sbatch|yaml)", text):
        assert (ROOT / path).exists(), path
    known = flatten(base_config())
    sections = "model|data|optim|train|eval|checkpoint"
    for key in re.findall(rf"(?:--config\.|`)((?:{sections})\.\w+)", text):
        assert key in known, key


@pytest.mark.parametrize(
    "folder",
    ["cifar10/resnet20/seed0", "cifar10/plain20/seed0", "cifar10_short", "cifar10_short_plain20"],
)
def test_the_results_that_readme_quotes_are_the_recorded_ones(readme, folder):
    result = json.loads((ROOT / "results" / folder / "result.json").read_text())
    row = next(
        line for line in readme.splitlines() if f"[results/{folder}](" in line and "|" in line
    )
    assert f"{100 * result['test_error_last']:.2f} %" in row.split("|")[2]
    assert f"| {100 * result['train_error_last']:.2f} % |" in row


def test_the_snippet_on_nets_runs(readme):
    code = re.search(r"## The nets\n\n```python\n(.*?)```", readme, re.DOTALL)[1]
    code, names = code.replace("resnet56", "resnet8").replace("(8, 32, 32, 3)", "(2, 8, 8, 3)"), {}
    with jax.default_prng_impl("rbg"):  # Its random numbers compile faster.
        exec(code, names)
    assert names["logits"].shape == (2, 10)
    assert "batch_stats" in names["updates"]
