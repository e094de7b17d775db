"""Nets of plain PyTorch, converted both ways: same outputs. Files in every form; none executed."""

import argparse
import dataclasses
import pickle

import jax
import numpy as np
import pytest

from resnet_flax import create_model, load_pretrained
from resnet_flax.errors import UserError
from resnet_flax.models import ARCHITECTURES
from resnet_flax.runs import weights
from resnet_flax.tools import convert, torch_file, torch_names
from resnet_flax.training.state import abstract_variables
from tests import pytorch_net
from tests.test_convert import COMMON, assert_equal, outputs, random_variables, run

torch = pytest.importorskip("torch")


def randomise(net, seed=0):
    """Scales and statistics away from 1 and 0, kernels of size, so that each of them matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if value.ndim == 1 and name.endswith(("running_var", "weight")):
                value.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith(("running_mean", "bias")):
                value.normal_(0, 0.1, generator=generator)
            elif value.ndim > 1:
                torch.nn.init.kaiming_normal_(value, generator=generator)
    return net.eval()


def torch_outputs(net, x):
    with torch.no_grad():
        return net(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()


IMAGENET = {"imagenet": True, "option": "B", "classes": 7}
# Name, the net in PyTorch, arguments of `from_torch`.
NETS = {
    "A": ("resnet8", {"option": "A"}, {}),
    "zeros after": ("resnet8", {"option": "A", "zeros": "after"}, {"option_a_zeros": "after"}),
    "B": ("resnet8", {"option": "B"}, {}),
    "bottleneck, zeros after": ("resnet20_bottleneck", {"option": "A", "zeros": "after",
                                "expansion": 4}, {"option_a_zeros": "after"}),
    "resnet18": ("resnet18", IMAGENET, {}),
    "resnet50": ("resnet50", {**IMAGENET, "expansion": 4, "strided": 2}, {}),
    "resnet50 of the paper": ("resnet50", {**IMAGENET, "expansion": 4}, {"stride_in_3x3": False}),
}  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    """Makes a net in PyTorch; the architecture of that name becomes as small."""

    def make(kind):
        name, options, arguments = NETS[kind]
        sizes = (2, 1, 2, 1) if options.get("imagenet") else (2, 1, 1)
        widths = (8, 16, 16, 24)[: len(sizes)]
        net = dataclasses.replace(ARCHITECTURES[name], stage_sizes=sizes, widths=widths)
        monkeypatch.setitem(ARCHITECTURES, name, net)
        return name, randomise(pytorch_net.build(sizes, widths, **options)), arguments

    return make


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.slow] if "of the" in k else []) for k in NETS]
)
def test_outputs_are_equal_both_ways(kind, small, tmp_path):
    name, theirs, arguments = small(kind)
    torch.save({"state_dict": theirs.state_dict(), "best_prec1": 91.7}, tmp_path / "theirs.pth")
    state_dict = torch_file.read(tmp_path / "theirs.pth")[0]
    got = convert.from_torch(state_dict, name, **arguments, **COMMON)
    assert got.model["stride_in_3x3"] is (kind == "resnet50")  # As in torchvision.
    ours = create_model(**got.model)
    x = np.random.RandomState(0).randn(2, 64, 64, 3).astype(np.float32)
    want = torch_outputs(theirs, x)
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(outputs(ours, got.variables, x), want, atol=1e-4, rtol=1e-4)
    if name == "resnet50":
        # With the stride elsewhere it is another net, though every array fits.
        other = ours.clone(stride_in_3x3=not ours.stride_in_3x3)
        assert np.abs(outputs(other, got.variables, x) - want).max() > 0.1

    back = dataclasses.replace(got, variables=random_variables(ours, seed=1))
    weights.save(tmp_path / "ours.safetensors", back)
    zeros = {k: v for k, v in arguments.items() if k == "option_a_zeros"}
    run(tmp_path / "back.pth", to_torch=tmp_path / "ours.safetensors", **zeros)
    theirs.load_state_dict(torch.load(tmp_path / "back.pth", weights_only=True), strict=True)
    mine = outputs(ours, back.variables, x)
    np.testing.assert_allclose(mine, torch_outputs(theirs, x), atol=1e-4, rtol=1e-4)


def test_images_go_the_way_they_go_in_pytorch(tmp_path):
    """From a published file and uint8 images to the same logits."""
    net = randomise(pytorch_net.make_net(8))
    content = {"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}, "epoch": 200}
    torch.save(content, tmp_path / "theirs.th")
    ours = tmp_path / "ours.safetensors"
    run(ours, from_torch=tmp_path / "theirs.th", model="resnet8", preprocess="imagenet")
    images = np.random.RandomState(0).randint(0, 256, (8, 32, 32, 3), np.uint8)
    mean, std = (np.float32(v) for v in convert.PREPROCESS["imagenet"])
    want = torch_outputs(net, (images.astype(np.float32) / 255 - mean) / std)
    got = jax.jit(load_pretrained(ours).logits)(images)
    np.testing.assert_allclose(got, want, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_every_name_and_shape_is_torchvision_s(name):
    net = ARCHITECTURES[name]
    options = {**IMAGENET, "classes": 1000, "expansion": net.block.expansion}
    with torch.device("meta"):
        theirs = pytorch_net.build(net.stage_sizes, (64, 128, 256, 512), **options)
    abstract = abstract_variables(create_model(name))
    no_memory = jax.tree.map(lambda v: np.broadcast_to(np.float32(0), v.shape), abstract)
    ours = torch_names.to_torch(no_memory, "torchvision")
    want = {k: tuple(v.shape) for k, v in theirs.state_dict().items()}
    assert {k: v.shape for k, v in ours.items()} == want


@pytest.fixture(scope="module")
def net():
    return randomise(pytorch_net.make_net(8))


def test_checkpoints_in_the_usual_forms(net, tmp_path):
    plain = net.state_dict()
    zero = {k: torch.zeros_like(v) for k, v in plain.items()}
    averaged = torch.optim.swa_utils.AveragedModel(net).state_dict()
    optimizer = {"state": {0: {"momentum_buffer": plain["conv1.weight"]}}, "param_groups": []}
    numbers = {"acc": np.float64(91.7), "history": np.arange(3), "args": argparse.Namespace(lr=1)}

    def prefixed(prefix):
        return {prefix + k: v for k, v in plain.items()}

    def cast(dtype):
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in plain.items()}

    forms = {
        "plain": plain,
        "compiled": prefixed("_orig_mod."),
        "normalisation first": {"0.mean": torch.zeros(3), **prefixed("1.")},
        "numbers of numpy": {"net": plain, "epoch": np.int64(3), **numbers},
        "wrapped": {"state_dict": prefixed("module."), "epoch": 90, "arch": "resnet18"},
        "averaged": averaged,
        "model_state": {"model_state": plain, "optimizer": optimizer},
        "nested": {"model": {"state_dict": plain}},
        "timm": {"state_dict": zero, "state_dict_ema": plain},
        "unknown names": {"weights": plain, "rate": 0.1},
        "without counters": {k: v for k, v in plain.items() if "num_batches" not in k},
        "float64": cast(torch.float64),
        "bfloat16": cast(torch.bfloat16),
    }

    def converted(state_dict):
        return convert.from_torch(state_dict, "resnet8", **COMMON).variables

    def expected(state_dict):
        return converted({k: v.float().numpy() for k, v in state_dict.items()})

    exact = expected(plain)
    for form, content in forms.items():
        torch.save(content, tmp_path / "theirs.pth")
        state_dict, _, notes = torch_file.read(tmp_path / "theirs.pth")
        want = expected(content) if form == "bfloat16" else exact
        assert_equal(converted(state_dict), want)
        said = ["took state_dict_ema of the file, not state_dict"] if form == "timm" else []
        assert notes == said, form


class Bomb:
    def __init__(self, witness):
        self.witness = str(witness)

    def __reduce__(self):
        return (open, (self.witness, "w"))


def test_other_files_are_refused_and_a_pickle_is_never_executed(net, tmp_path):
    path, witness, plain = tmp_path / "theirs.pth", tmp_path / "witness", net.state_dict()

    def refused(message, content):
        torch.save(content, path)
        with pytest.raises(UserError, match=message) as caught:
            convert.from_torch(torch_file.read(path)[0], "resnet8", **COMMON)
        assert not set("\n\x1b") & set(str(caught.value))

    kernel = plain["conv1.weight"]
    sparse = {**plain, "conv1.weight": kernel.to_sparse()}
    refused("holds tensors that are not plain arrays", sparse)
    for dtype in ("int8", "complex64"):
        changed = {**plain, "conv1.weight": kernel.to(getattr(torch, dtype))}
        refused(rf"conv1\.weight is {dtype}: only floats are read", changed)
    refused("holds no state dict", [1, 2])
    refused("holds no state dict", {"state_dict": {}, "epoch": 3})
    refused("several state dicts: student, teacher", {"student": plain, "teacher": plain})
    # The whole net, not its state dict.
    refused("holds more than weights, torch.nn.modules.linear.Linear, which", torch.nn.Linear(1, 1))
    refused("weights, io.open, which would have to", {"state_dict": Bomb(witness)})
    pickled = pickle.dumps({"state_dict": Bomb(witness)})
    for content in (pickled, pickled[:9]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as weights only"):
            torch_file.read(path)
    assert not witness.exists()
