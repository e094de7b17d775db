"""What README and docs say is what the code does: commands, snippets, links, numbers, the nets."""

import functools
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from resnet_flax import create_model
from resnet_flax.config import base_config, flatten
from resnet_flax.models import ARCHITECTURES, OPTIONS
from tests import commands
from tests.conftest import ROOT

PAGES = ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))]
LINKED = [*PAGES, "launch/README.md", "results/README.md", "results/performance.md"]

# Appended to a command that trains, so that it takes seconds.
_FEW = """
    --config.model.name=resnet8 --config.data.batch_size=16 --config.eval.batch_size=360
    --config.train.total_steps=2 --config.optim.boundaries_steps=1 --config.log.tensorboard=False
    --config.train.cpu_devices=1
""".split()
DIGITS = [*_FEW, "--config.data.name=digits"]
FEW_PHOTOS = ["--config.data.batch_size=4", "--config.data.workers=0"]
WARM = [*DIGITS, "--config.optim.warmup_steps=1"]
TRAIN = "python -m resnet_flax.main --config=configs/"
TOOLS = "predict", "export", "summary", "responses", "report", "ensemble"

# What is appended to each command of the pages to make it short, by how the command begins.
SHORT = {
    f"{TRAIN}finetune_folder.py": ["--config.train.total_steps=1", *FEW_PHOTOS],
    f"{TRAIN}resnet20.py --workdir=runs/photos": [*_FEW, *FEW_PHOTOS],
    f"{TRAIN}resnet20.py --config.train.total_steps": [*DIGITS, "--config.train.total_steps=3"],
    f"{TRAIN}resnet20.py --config.train.num_seeds": DIGITS,
    f"{TRAIN}modern.py": WARM,
    f"{TRAIN}cifar10_short.py": WARM,
    "python -m resnet_flax.main --config=": DIGITS,
    "python -m resnet_flax.main --mode=evaluate --workdir": [],
    "python -m resnet_flax.main --mode=evaluate --weights=runs": [],
    **{f"python -m resnet_flax.tools.{tool}": [] for tool in TOOLS},
    "python -m resnet_flax.tools.reproduce": ["--dry_run"],
}
# And why a command is not run here, by how it begins.
ELSEWHERE = {
    "git clone": "has an address to fill in",
    "python3 -m venv": "needs the network; .ci/run runs the second, which installs the same",
    "pip install": "needs the network",
    "srun": "tests/test_launch_slurm.py",
    "launch/": "tests/test_launch_local.py",
    "python -m resnet_flax.main --config=configs/imagenet.py": "tests/test_data_imagenet.py",
    "python -m resnet_flax.main --mode=evaluate --weights=resnet20": "needs CIFAR-10",
    "python -m resnet_flax.tools.publish": "changes the package; tests/test_pretrained.py",
    "python -m resnet_flax.tools.convert": "tests/test_convert.py",
    "python -m resnet_flax.tools.bench": "tests/test_bench.py",
}


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)


def commands_of(page):
    text = "\n".join(blocks(page, "sh")).replace("\\\n", "")
    lines = (re.sub(r"(^|\s+)#.*", "", line).strip() for line in text.splitlines())
    return [re.sub(r"\s+", " ", line) for line in lines if line]


def beginning(command, table):
    return next((start for start in table if command.startswith(start)), None)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_run_or_has_a_reason(page):
    for command in commands_of(page):
        known = [t for t in (SHORT, ELSEWHERE) if beginning(command, t)]
        assert known, f"{page}: {command} is not in SHORT, nor in ELSEWHERE"


@pytest.mark.parametrize("page", PAGES)
def test_configurations_and_flags_of_training_commands_are_right(page):
    for command in commands_of(page):
        _, *words = command.split()
        if words[:2] == ["-m", "resnet_flax.main"]:
            done = commands.run("resnet_flax.main", *words[2:], "--version")
            assert done.returncode == 0, f"{command}\n{done.stderr}"


@pytest.fixture
def place(tmp_path):
    """A directory like a checkout's, with photographs for the pages to name."""
    for name in ("configs", "results", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    random = np.random.default_rng(0)
    photos = [f"photos/{c}/{i}.png" for c in "ab" for i in range(4)]
    for path in (tmp_path / name for name in ("photo.jpg", "holiday/1.jpg", *photos)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 40, 3), np.uint8)).save(path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if commands_of(p)])
def test_the_commands_of_a_page_run(page, place, undisturbed):
    for run in ("quickstart/seed0", "paper/resnet20/seed0", "paper/resnet110/seed0"):
        shutil.copytree(undisturbed().directory, place / "runs" / run)
    other = "--config=configs/quickstart.py", "--workdir=runs/paper/resnet110/seed1"
    assert commands.run("resnet_flax.main", *other, *DIGITS, cwd=place).returncode == 0
    for command in commands_of(page):
        if (start := beginning(command, SHORT)) is None:
            continue
        words = command.replace('"', "").split()[2:] + SHORT[start]
        words = [str(f.relative_to(place)) for w in words for f in expand(place, w)]
        done = commands.run(*words, cwd=place)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def expand(place, word):
    """A word with a * as the shell has it."""
    if "*" not in word:
        return [place / word]
    return sorted(place.glob(word)) or [place / word]


# What is put in place of a part of a snippet, so that it takes seconds.
SMALLER = {
    'model="resnet20", total_steps=1000': 'model="resnet8", total_steps=4, config=few',
    "model.init(": "traced(model.init, ",
    "model.apply(": "traced(model.apply, ",
}
# Those of which the quick tests run as much elsewhere.
_SLOW = {"docs/images.md": "README.md has `fit`, too; its arguments: tests/test_fitting.py"}
SNIPPETS = [
    pytest.param(page, code, id=page, marks=[pytest.mark.slow] if page in _SLOW else [])
    for page in PAGES
    for code in blocks(page, "python")
    if "jaxexport" not in code  # tests/test_export.py
]


def traced(function, *arguments, **options):
    """The shapes of what a function of arrays returns."""
    return jax.eval_shape(functools.partial(function, **options), *arguments)


@pytest.mark.parametrize(("page", "code"), SNIPPETS)
def test_the_snippets_in_python_run(page, code, place, monkeypatch):
    monkeypatch.chdir(place)
    # As in tests/test_fitting.py, which compiles the same programs.
    images = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), np.uint8)
    few = {"data.batch_size": 8, "train.cpu_devices": 1, "log.tensorboard": False}
    names = {"images": images, "labels": np.arange(24) % 3, "few": few, "traced": traced}
    for old, new in SMALLER.items():
        code = code.replace(old, new)
    exec(code, names)
    for net in {"net", "own"} & set(names):
        assert 0 <= names[net].training["test_error_last"] <= 1
    if "logits" in names:
        assert names["logits"].shape == (8, 10)
        assert "batch_stats" in names["updates"]


@pytest.mark.parametrize("page", LINKED)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)", target.read_text(), re.M) if anchor else ()
        assert anchor in ("", *(h.lower().replace(" ", "-") for h in headings)), link


@pytest.mark.parametrize("page", [*PAGES, "launch/README.md"])
def test_files_and_keys_that_a_page_names_exist(page):
    text = (ROOT / page).read_text()
    for path in re.findall(r"(?:configs|launch|tests)/[\w./]+\.(?:py|sh|sbatch|yaml)", text):
        assert (ROOT / path).exists(), path
    known = flatten(base_config())
    sections = "model|data|optim|train|eval|checkpoint"
    for key in re.findall(rf"(?:--config\.|[`\"])((?:{sections})\.\w+)", text):
        assert key in known, key


@pytest.mark.parametrize("run", ["cifar10/resnet20/seed0", "cifar10/plain20/seed0"])
def test_the_results_in_readme_are_the_recorded_ones(run):
    result = json.loads((ROOT / "results" / run / "result.json").read_text())
    lines = (ROOT / "README.md").read_text().splitlines()
    (row,) = (line for line in lines if f"[results/{run}](" in line)
    assert f"**{100 * result['test_error_last']:.2f} %**" in row.split("|")[2]
    assert f"| {100 * result['train_error_last']:.2f} % |" in row
    assert f"{result['seconds']:.0f} s |" in row


def test_the_short_run_in_readme_is_the_recorded_one():
    result = json.loads((ROOT / "results/cifar10_short/result.json").read_text())
    (line,) = (x for x in (ROOT / "README.md").read_text().splitlines() if "cifar10_short" in x)
    assert f"{100 * result['test_error_last']:.1f} % error" in line


# Under which option a net stands whose shortcuts are a variant of it; the others under A.
OWN_SHORTCUTS = {"bare": "B", "conv_shortcut": "C"}
IMAGE = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)


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
    """The table of docs/nets.md, made from the code."""
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


@pytest.mark.parametrize(
    "name", ["resnet1202", "resnet1001_preact", "resnet110_keras_v2", "resnet152"]
)
def test_blocks_are_counted_as_the_whole_net_has_them(name):
    model = create_model(name, scan=True)
    params = jax.eval_shape(model.init, jax.random.key(0), IMAGE)["params"]
    assert parameters(name, None) == sum(x.size for x in jax.tree.leaves(params))


def test_the_table_of_nets_is_true():
    text = (ROOT / "docs/nets.md").read_text()
    inside = text.split("<!-- nets -->")[1].split("<!-- /nets -->")[0].strip()
    assert inside.split("\n", 2)[2] == net_table()


def test_readme_is_one_screen_and_a_bit():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150
    assert all(pathlib.Path(page).name in (ROOT / "README.md").read_text() for page in PAGES[1:])
