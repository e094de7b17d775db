"""The ImageNet nets against plain PyTorch ones under torchvision's names. Needs PyTorch."""

import dataclasses

import jax
import numpy as np
import pytest

from resnet_flax import create_model
from resnet_flax.errors import UserError
from resnet_flax.models import ARCHITECTURES
from resnet_flax.runs import weights
from resnet_flax.tools import convert, torch_file, torch_names
from tests.test_convert import random_variables
from tests.test_models import ONCE

torch = pytest.importorskip("torch")
nn, functional = torch.nn, torch.nn.functional
COMMON = {"mean": np.zeros(3), "std": np.ones(3)}


class Block(nn.Module):
    """Basic (expansion 1) or bottleneck (expansion 4); the stride in `strided`, counted from 1."""

    def __init__(self, width_in, width, stride, expansion, strided):
        super().__init__()
        kernels = (3, 3) if expansion == 1 else (1, 3, 1)
        widths = [width] * (len(kernels) - 1) + [width * expansion]
        before = width_in
        for i, (kernel, after) in enumerate(zip(kernels, widths, strict=True), 1):
            s = stride if i == strided else 1
            setattr(self, f"conv{i}", nn.Conv2d(before, after, kernel, s, kernel // 2, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(after))
            before = after
        self.layers = len(kernels)
        self.downsample = None
        if stride != 1 or width_in != width * expansion:
            conv = nn.Conv2d(width_in, width * expansion, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(width * expansion))

    def forward(self, x):
        y = x
        for i in range(1, self.layers + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = functional.relu(y) if i < self.layers else y
        return functional.relu(y + (x if self.downsample is None else self.downsample(x)))


class Net(nn.Module):
    def __init__(self, sizes, expansion, strided, widths=(64, 128, 256, 512), classes=1000):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        before = widths[0]
        for stage, (size, width) in enumerate(zip(sizes, widths, strict=True), 1):
            rest = []
            for block in range(size):
                stride = 2 if stage > 1 and block == 0 else 1
                rest.append(Block(before, width, stride, expansion, strided))
                before = width * expansion
            setattr(self, f"layer{stage}", nn.Sequential(*rest))
        self.fc = nn.Linear(before, classes)

    def forward(self, x):
        x = functional.relu(self.bn1(self.conv1(x)))
        x = functional.max_pool2d(x, 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean(dim=(2, 3)))


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
                nn.init.kaiming_normal_(value, generator=generator)
    return net.eval()


SIZES, WIDTHS = (2, 1, 2, 1), (8, 16, 16, 24)
# Ours, with small stages: PyTorch's expansion, and the layer that has the stride there.
KINDS = {
    "resnet18": (False, 1, 1),
    "resnet50": (True, 4, 2),
    "resnet50 with the stride in the first 1x1": (False, 4, 1),
}


@pytest.fixture
def small(monkeypatch):
    """Makes a small net of a kind, in both libraries; ours is called by the kind's first word."""

    def make(kind):
        in_3x3, expansion, strided = KINDS[kind]
        name = kind.split()[0]
        net = dataclasses.replace(ARCHITECTURES[name], stage_sizes=SIZES, widths=WIDTHS)
        monkeypatch.setitem(ARCHITECTURES, name, net)
        theirs = randomise(Net(SIZES, expansion, strided, WIDTHS, classes=7))
        ours = create_model(name, 7, stride_in_3x3=in_3x3)
        return name, in_3x3, ours, theirs

    return make


def outputs(ours, variables, theirs):
    """Both libraries' logits of the same two images of 64 x 64."""
    x = np.random.RandomState(0).randn(2, 64, 64, 3).astype(np.float32)
    with torch.no_grad():
        want = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
    return jax.jit(ours.apply, compiler_options=ONCE)(variables, x), want


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_equal_both_ways(kind, small, tmp_path):
    name, in_3x3, ours, theirs = small(kind)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    state_dict = torch_file.read(tmp_path / "theirs.pth")[0]
    got = convert.from_torch(state_dict, name, stride_in_3x3=in_3x3, **COMMON)
    assert got.model == {
        "name": name,
        "shortcut": "B",
        "num_classes": 7,
        "stride_in_3x3": in_3x3,
    }
    mine, want = outputs(ours, got.variables, theirs)
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(mine, want, atol=1e-4, rtol=1e-4)
    if name == "resnet50":
        # With the stride elsewhere it is another net, though every array fits.
        other, _ = outputs(ours.clone(stride_in_3x3=not in_3x3), got.variables, theirs)
        assert np.abs(other - want).max() > 0.1

    back = dataclasses.replace(got, variables=random_variables(ours, seed=1))
    weights.save(tmp_path / "ours.safetensors", back)
    convert.main([f"--to_torch={tmp_path}/ours.safetensors", f"--out={tmp_path}/back.pth"])
    theirs.load_state_dict(torch.load(tmp_path / "back.pth", weights_only=True), strict=True)
    mine, want = outputs(ours, back.variables, theirs)
    np.testing.assert_allclose(mine, want, atol=1e-4, rtol=1e-4)


def test_the_stride_is_torchvision_s_unless_asked_otherwise(small):
    name, _, _, theirs = small("resnet50")
    state_dict = {k: v.numpy() for k, v in theirs.state_dict().items()}
    assert convert.from_torch(state_dict, name, **COMMON).model["stride_in_3x3"] is True


@pytest.mark.parametrize(
    ("name", "sizes", "expansion"),
    [
        ("resnet18", (2, 2, 2, 2), 1),
        ("resnet34", (3, 4, 6, 3), 1),
        ("resnet50", (3, 4, 6, 3), 4),
        ("resnet101", (3, 4, 23, 3), 4),
        ("resnet152", (3, 8, 36, 3), 4),
    ],
)
def test_every_name_and_shape_is_torchvision_s(name, sizes, expansion):
    with torch.device("meta"):
        theirs = Net(sizes, expansion, 1).state_dict()
    abstract = convert.abstract_variables(create_model(name))
    no_memory = jax.tree.map(lambda v: np.broadcast_to(np.float32(0), v.shape), abstract)
    ours = torch_names.to_torch(no_memory, shortcut="downsample", head="fc")
    assert {k: v.shape for k, v in ours.items()} == {k: tuple(v.shape) for k, v in theirs.items()}


def changed(state_dict, how):
    """A state dict as it may come from elsewhere."""
    if how == "DataParallel":
        return {f"module.{k}": v for k, v in state_dict.items()}
    if how == "wrapped":
        return {"state_dict": state_dict, "epoch": 90, "best_acc1": 69.8, "arch": "resnet18"}
    if how == "wrapped DataParallel":
        return changed(changed(state_dict, "DataParallel"), "wrapped")
    if how == "compiled":
        return {f"_orig_mod.{k}": v for k, v in state_dict.items()}
    if how == "without counters":
        return {k: v for k, v in state_dict.items() if not k.endswith("num_batches_tracked")}
    dtype = getattr(torch, how)
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in state_dict.items()}


@pytest.mark.parametrize(
    ("how", "tolerance"),
    [
        ("DataParallel", 0),
        ("wrapped", 0),
        ("wrapped DataParallel", 0),
        ("compiled", 0),
        ("without counters", 0),
        ("float64", 0),
        ("float16", 1e-3),
        ("bfloat16", 1e-2),
    ],
)
def test_forms_in_which_state_dicts_come(how, tolerance, small, tmp_path):
    name, _, _, theirs = small("resnet18")
    torch.save(changed(theirs.state_dict(), how), tmp_path / "theirs.pth")
    got = convert.from_torch(torch_file.read(tmp_path / "theirs.pth")[0], name, **COMMON)
    plain = {k: v.numpy() for k, v in theirs.state_dict().items()}
    want = convert.from_torch(plain, name, **COMMON)
    assert {v.dtype for v in jax.tree.leaves(got.variables)} == {np.dtype(np.float32)}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        got.variables,
        want.variables,
    )


def test_what_is_no_state_dict_of_floats_is_refused(small, tmp_path):
    name, _, _, theirs = small("resnet18")
    state_dict = theirs.state_dict()
    path = tmp_path / "theirs.pth"

    def convert_file(content):
        torch.save(content, path)
        convert.from_torch(torch_file.read(path)[0], name, **COMMON)

    sparse = {"conv1.weight": state_dict["conv1.weight"].to_sparse()}
    with pytest.raises(UserError, match="holds tensors that are not plain arrays"):
        convert_file({**state_dict, **sparse})
    with pytest.raises(UserError, match=r"conv1\.weight is int8: only floats are read"):
        convert_file({**state_dict, "conv1.weight": state_dict["conv1.weight"].to(torch.int8)})
    with pytest.raises(UserError, match=r"conv1\.weight is complex64: only floats are read"):
        convert_file({**state_dict, "conv1.weight": state_dict["conv1.weight"].to(torch.cfloat)})
    with pytest.raises(UserError, match="holds no state dict"):
        convert_file([1, 2])
    with pytest.raises(UserError, match="holds no state dict"):
        convert_file({"state_dict": {}, "epoch": 3})
    with pytest.raises(
        UserError, match="weights, tests.test_convert_imagenet.Net, which"
    ) as caught:
        convert_file(theirs)
    assert not set("\n\x1b") & set(str(caught.value))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read as weights only"):
        torch_file.read(path)[0]
