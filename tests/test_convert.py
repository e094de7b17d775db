"""Weights to and from PyTorch: same names, same numbers, same outputs, nothing executed."""

import argparse
import pickle
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from resnet_flax import create_model, pretrained
from resnet_flax.data import dataset
from resnet_flax.devices import sharding
from resnet_flax.errors import UserError
from resnet_flax.models import blocks
from resnet_flax.runs import weights
from resnet_flax.tools import convert, torch_file, torch_names
from resnet_flax.training import augment, evaluate, steps
from resnet_flax.training.feed import ResidentFeed
from tests import pytorch_net, test_data_helpers
from tests.conftest import ROOT
from tests.test_models import ONCE

COMMON = {"mean": np.zeros(3), "std": np.ones(3)}


def random_variables(model, seed=0):
    """Every array random, statistics and scales positive, so that each of them matters."""
    rng = np.random.RandomState(seed)

    def draw(path, spec):
        if path[-1].key == "kernel":
            fan_in = np.prod(spec.shape[:-1])
            return (rng.randn(*spec.shape) / np.sqrt(fan_in)).astype(np.float32)
        if path[-1].key in ("var", "scale"):
            return rng.uniform(0.5, 1.5, spec.shape).astype(np.float32)
        return (0.1 * rng.randn(*spec.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, convert.abstract_variables(model))


NETS = [
    ("resnet20", {}),
    ("resnet20", {"shortcut": "B"}),
    ("resnet8", {"shortcut": "C"}),
    ("plain20", {}),
    ("resnet18", {}),
    ("resnet50", {"stride_in_3x3": True}),
]


@pytest.mark.parametrize(("name", "options"), NETS)
def test_there_and_back_is_the_same_to_the_bit(name, options):
    model = create_model(name, **options)
    variables = random_variables(model)
    state_dict = torch_names.to_torch(variables)
    back = torch_names.from_torch(state_dict, convert.abstract_variables(model))
    jax.tree.map(np.testing.assert_array_equal, back, variables)


def test_names_are_those_that_pytorch_projects_use():
    names = set(torch_names.to_torch(random_variables(create_model("resnet20", shortcut="B"))))
    assert {
        "conv1.weight", "bn1.running_var", "bn1.num_batches_tracked", "layer1.0.conv1.weight",
        "layer3.2.bn2.bias", "layer2.0.shortcut.0.weight", "layer2.0.shortcut.1.running_mean",
        "linear.weight", "linear.bias",
    } <= names  # fmt: skip
    variables = random_variables(create_model("resnet18"))
    names = set(torch_names.to_torch(variables, shortcut="downsample", head="fc"))
    assert {"layer2.0.downsample.0.weight", "fc.bias"} <= names


def test_prefixes_are_taken_off_and_the_option_is_recognised():
    for option in "ABC":
        variables = random_variables(create_model("resnet20", shortcut=option))
        state_dict = {f"module.{k}": v for k, v in torch_names.to_torch(variables).items()}
        got = convert.from_torch(state_dict, "resnet20", mean=np.zeros(3), std=np.ones(3))
        assert got.model["shortcut"] == option
        jax.tree.map(np.testing.assert_array_equal, got.variables, variables)


def test_another_net_s_state_dict_is_refused_by_name():
    state_dict = torch_names.to_torch(random_variables(create_model("resnet20")))
    common = {"mean": np.zeros(3), "std": np.ones(3)}
    with pytest.raises(UserError, match=r"it lacks layer1\.3\.bn1"):
        convert.from_torch(state_dict, "resnet32", **common)
    with pytest.raises(UserError, match=r"it has layer1\.1\.bn1\.bias, which this one lacks"):
        convert.from_torch(state_dict, "resnet8", **common)
    state_dict["conv1.weight"] = state_dict["conv1.weight"][:8]
    with pytest.raises(UserError, match=r"conv1\.weight is \[3, 3, 3, 8\]"):
        convert.from_torch(state_dict, "resnet20", **common)


def run(*args):
    command = [sys.executable, "-m", "resnet_flax.tools.convert", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_command_line_both_ways_without_torch(tmp_path):
    variables = random_variables(create_model("resnet8"))
    source = tmp_path / "theirs.safetensors"
    safetensors.numpy.save_file(torch_names.to_torch(variables), source)
    ours = tmp_path / "ours.safetensors"
    done = run(
        f"--from_torch={source}", "--model=resnet8", "--preprocess=imagenet", f"--out={ours}"
    )
    assert done.returncode == 0, done.stderr
    loaded = weights.load(ours)
    np.testing.assert_allclose(loaded.mean, [123.675, 116.28, 103.53], rtol=1e-6)
    np.testing.assert_allclose(loaded.std, [58.395, 57.12, 57.375], rtol=1e-6)
    assert loaded.training == {"source": "theirs.safetensors"}
    back = tmp_path / "back.safetensors"
    assert run(f"--to_torch={ours}", f"--out={back}").returncode == 0
    want, got = safetensors.numpy.load_file(source), safetensors.numpy.load_file(back)
    assert want.keys() == got.keys()
    for key in want:
        np.testing.assert_array_equal(want[key], got[key])
    for args, message in (
        ([f"--from_torch={source}", f"--out={ours}"], "needs --model"),
        ([f"--from_torch={source}", "--model=resnet8", f"--out={ours}"], "--preprocess="),
        ([f"--out={ours}"], "either --from_torch=FILE or --to_torch=FILE"),
        ([f"--from_torch={tmp_path}/no.pth", "--model=resnet8", "--preprocess=imagenet",
          f"--out={ours}"], "does not exist"),
        ([f"--from_torch={source}", "--model=resnet8", "--mean=1,2", "--std=1,1,1",
          f"--out={ours}"], "must be three numbers"),
        ([f"--to_torch={source}", f"--out={back}"], "is of format None"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            convert.main(args)
    # What becomes of a UserError.
    done = run(*args)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) <= 2


A_NETS = ["resnet8", "resnet20_bottleneck", "resnet20_preact", "resnet47_preact", "resnet18"]


@pytest.mark.parametrize("name", A_NETS)
def test_zeros_after_the_old_channels_make_the_same_net(name, monkeypatch):
    """`move_zeros` against this package's nets with option A's padding replaced."""
    model = create_model(name, shortcut="A")
    theirs, x = random_variables(model), np.random.RandomState(1).randn(2, 16, 16, 3)

    def outputs(variables):
        return jax.jit(lambda: model.apply(variables, x), compiler_options=ONCE)()

    ours = torch_names.move_zeros(theirs, "split")
    got, wrong = outputs(ours), outputs(theirs)
    jax.tree.map(np.testing.assert_array_equal, torch_names.move_zeros(ours, "after"), theirs)

    def after(x, strides, channels):
        widths = ((0, 0), (0, 0), (0, 0), (0, channels - x.shape[-1]))
        return jax.numpy.pad(x[:, ::strides, ::strides], widths)

    monkeypatch.setattr(blocks, "option_a", after)
    want = outputs(theirs)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert np.abs(wrong - want).max() > 0.01


def test_names_of_other_projects():
    variables = random_variables(create_model("resnet20"))
    renamed = {}
    for name, value in torch_names.to_torch(variables).items():
        for pattern, theirs in (
            (r"^(conv|bn)1", r"\1In"), ("linear", "fcOut"), ("layer1", "stack1"),
            (r"layer(\d)\.0", r"stack\1a"), (r"layer(\d)\.1", r"stack\1b.0"),
            (r"layer(\d)\.2", r"stack\1b.1"),
        ):  # fmt: skip
            name = re.sub(pattern, theirs, name)
        renamed[name] = value
    assert {"bnIn.bias", "stack1.2.bn1.bias", "stack2a.bn1.bias", "stack3b.1.bn1.bias"} < {*renamed}
    got = convert.from_torch(renamed, "resnet20", **COMMON).variables
    jax.tree.map(np.testing.assert_array_equal, got, variables)


def test_a_wrong_model_is_told_which_would_fit():
    state_dict = torch_names.to_torch(random_variables(create_model("resnet20")))
    with pytest.raises(UserError, match="lacks .*; it fits --model=resnet20 or plain20$"):
        convert.from_torch(state_dict, "resnet32", **COMMON)
    for name in ("a", "b"):
        state_dict |= {f"{name}.{k}": v for k, v in state_dict.items() if k.startswith("layer")}
    with pytest.raises(UserError, match=r"is of several nets: .*a\., "):
        convert.from_torch(state_dict, "resnet20", **COMMON)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_published_weights_there_and_back_with_their_preprocessing(suffix, tmp_path, capsys):
    if suffix == "pth":
        pytest.importorskip("torch")
    theirs, ours = tmp_path / f"theirs.{suffix}", tmp_path / "ours.safetensors"
    convert.main([f"--to_torch={next(iter(pretrained.read_index()))}", f"--out={theirs}"])
    assert "expects (pixels - mean) / std" in capsys.readouterr().out
    command = [f"--from_torch={theirs}", f"--out={ours}", "--model=plain20"]
    convert.main(command)
    assert "took the preprocessing that the file has" in capsys.readouterr().out
    want = weights.load(pretrained.locate(next(iter(pretrained.read_index())))[0])
    got = weights.load(ours)
    for name in ("mean", "std", "class_names", "variables"):
        pair = getattr(got, name), getattr(want, name)
        jax.tree.map(np.testing.assert_array_equal, *pair)
    convert.main([*command, "--preprocess=cifar10", "--class_names=a,b,c,d,e,f,g,h,i,j"])
    assert weights.load(ours).mean.shape == (3,)
    assert weights.load(ours).class_names == tuple("abcdefghij")
    for args, message in (
        ([*command, "--class_names=a,b"], "there are 2 class names, but 10 classes"),
        ([*command, "--mean=0,0,0"], "say what the net expects"),
    ):
        with pytest.raises(UserError, match=message):
            convert.main(args)


@pytest.mark.parametrize("said", ["7", '["mean"]', '{"mean": [0, 0, 0], "std": "big"}'])
def test_damaged_preprocessing_of_a_file_is_refused(said, tmp_path):
    arrays = torch_names.to_torch(random_variables(create_model("resnet8")))
    path = tmp_path / "theirs.safetensors"
    safetensors.numpy.save_file(arrays, path, {"resnet_flax": said})
    with pytest.raises(UserError, match="what it says in 'resnet_flax' is no preprocessing"):
        convert.main([f"--from_torch={path}", "--model=resnet8", f"--out={tmp_path}/out"])


def test_a_directory_of_several_seeds_says_to_name_one(tmp_path):
    (tmp_path / "runs" / "seed0").mkdir(parents=True)
    args = [f"--to_torch={tmp_path}/runs", f"--out={tmp_path}/out.safetensors"]
    with pytest.raises(UserError, match="finish the run first"):
        convert.main(args)
    (tmp_path / "runs" / "seed0" / "weights.safetensors").touch()
    with pytest.raises(UserError, match="name one of its runs, .*runs/seed0$"):
        convert.main(args)
    with pytest.raises(UserError, match="seed0/weights.safetensors cannot be read: no safetensors"):
        convert.main([f"--to_torch={tmp_path}/runs/seed0", args[1]])


# From here on PyTorch is needed.


def torch_net(depth, option, zeros="split"):
    """In plain PyTorch, with values that are not those of a beginning."""
    torch = pytest.importorskip("torch")
    net = pytorch_net.make_net(depth, option, zeros)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if name.endswith("running_var") or ("bn" in name and name.endswith("weight")):
                value.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith(("running_mean", "bias")):
                value.normal_(0, 0.1, generator=generator)
    return net.eval()


@pytest.mark.parametrize(("option", "zeros"), [("A", "split"), ("A", "after"), ("B", None)])
def test_outputs_equal_pytorch_s(option, zeros, tmp_path):
    torch = pytest.importorskip("torch")
    net = torch_net(20, option, zeros)
    torch.save({"state_dict": net.state_dict(), "best_prec1": 91.7}, tmp_path / "net.th")
    state_dict = torch_file.read(tmp_path / "net.th")[0]
    got = convert.from_torch(state_dict, "resnet20", option_a_zeros=zeros, **COMMON)
    x = np.random.RandomState(0).randn(8, 32, 32, 3).astype(np.float32)
    with torch.no_grad():
        want = net(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
    model = create_model("resnet20", shortcut=option)
    ours = jax.jit(model.apply)(got.variables, x)
    np.testing.assert_allclose(ours, want, atol=1e-4, rtol=1e-4)


def test_real_images_go_the_way_they_go_in_pytorch(tmp_path):
    """From a published file and uint8 images to the same logits and the same mistakes."""
    torch = pytest.importorskip("torch")
    import tensorflow_datasets as tfds

    builder = tfds.builder("cifar10", data_dir=test_data_helpers.real_data_dir())
    examples = builder.as_data_source(split="test")
    examples = [examples[i] for i in range(100)]
    images = np.stack([e["image"] for e in examples])
    labels = np.array([e["label"] for e in examples], np.int32)
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).float().div(255)  # ToTensor
    mean, std = (torch.tensor(v)[:, None, None] for v in convert.PREPROCESS["imagenet"])
    net = torch_net(8, "A")
    with torch.no_grad():
        # So that it does not take every image for the same class, or two for almost equal.
        net.linear.weight *= 30
        net.linear.bias -= net((x - mean) / std).mean(dim=0)
        want = net((x - mean) / std).numpy()
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}, "epoch": 200},
        tmp_path / "theirs.th",
    )
    convert.main(
        [f"--from_torch={tmp_path}/theirs.th", f"--out={tmp_path}/ours.safetensors",
         "--model=resnet8", "--preprocess=imagenet"]
    )  # fmt: skip
    ours = weights.load(tmp_path / "ours.safetensors")

    model = create_model("resnet8")
    normalized = augment.normalize(images, ours.mean, ours.std)
    got = jax.jit(model.apply, compiler_options=ONCE)(ours.variables, normalized)
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)

    mesh = sharding.make_mesh(jax.devices()[:1], 50)
    split = dataset.Split(images, labels)
    fed = ResidentFeed(split, ours.mean, ours.std, seed=0, mesh=mesh, batch_size=50)
    chunk = steps.make_eval_chunk(model, sharding=sharding.split(mesh))
    score = evaluate.evaluate(chunk, ours.variables, fed, batch_size=50)
    # No two classes are so close that rounding decides between them.
    top = np.sort(want)[:, -2:]
    assert (top[:, 1] - top[:, 0]).min() > 1e-4
    assert score.wrong == np.sum(want.argmax(axis=1) != labels)
    confusion = np.zeros((10, 10), int)
    np.add.at(confusion, (labels, want.argmax(axis=1)), 1)
    np.testing.assert_array_equal(score.confusion, confusion)
    assert np.count_nonzero(confusion.sum(axis=0)) > 5


def test_pytorch_loads_what_we_write(tmp_path):
    torch = pytest.importorskip("torch")
    net = torch_net(20, "B")
    variables = random_variables(create_model("resnet20", shortcut="B"))
    model = {"name": "resnet20", "shortcut": "B", "num_classes": 10, "stride_in_3x3": False}
    file = weights.Weights(model, variables, np.zeros(3), np.ones(3), tuple("0123456789"), {})
    weights.save(tmp_path / "ours.safetensors", file)
    convert.main([f"--to_torch={tmp_path}/ours.safetensors", f"--out={tmp_path}/theirs.pth"])
    net.load_state_dict(torch.load(tmp_path / "theirs.pth", weights_only=True), strict=True)


def test_checkpoints_in_the_usual_forms(tmp_path):
    torch = pytest.importorskip("torch")
    net = pytorch_net.make_net(8)
    averaged = torch.optim.swa_utils.AveragedModel(net)
    plain = net.state_dict()
    zero = {k: torch.zeros_like(v) for k, v in plain.items()}
    optimizer = {"state": {0: {"momentum_buffer": plain["conv1.weight"]}}, "param_groups": []}
    numbers = {"acc": np.float64(91.7), "history": np.arange(3), "args": argparse.Namespace(lr=1)}
    forms = {
        "numbers of numpy": {"net": plain, "epoch": np.int64(3), **numbers},
        "normalisation first": {
            "0.mean": torch.zeros(3),
            **{f"1.{k}": v for k, v in plain.items()},
        },
        "prefix": {f"encoder.{k}": v for k, v in plain.items()},
        "averaged": averaged.state_dict(),
        "model_state": {"model_state": plain, "optimizer": optimizer},
        "nested": {"model": {"state_dict": plain}},
        "timm": {"state_dict": zero, "state_dict_ema": plain},
        "unknown names": {"weights": plain, "rate": 0.1},
    }
    want = convert.from_torch({k: v.numpy() for k, v in plain.items()}, "resnet8", **COMMON)
    for name, content in forms.items():
        torch.save(content, tmp_path / "theirs.pth")
        state_dict, beside = torch_file.read(tmp_path / "theirs.pth")
        got = convert.from_torch(state_dict, "resnet8", **COMMON)
        jax.tree.map(np.testing.assert_array_equal, got.variables, want.variables)
        said = ["took state_dict_ema of the file, not state_dict"] if name == "timm" else []
        assert beside["notes"] == said, name
    torch.save({"student": plain, "teacher": plain}, tmp_path / "theirs.pth")
    with pytest.raises(UserError, match="several state dicts: student, teacher"):
        torch_file.read(tmp_path / "theirs.pth")


def test_a_pickle_is_never_executed(tmp_path):
    torch = pytest.importorskip("torch")
    witness = tmp_path / "witness"

    class Bomb:
        def __reduce__(self):
            return (open, (str(witness), "w"))

    torch.save({"state_dict": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(UserError, match="holds more than weights, io.open, which would have to"):
        torch_file.read(tmp_path / "bomb.pth")
    (tmp_path / "bomb.pth").write_bytes(pickle.dumps({"state_dict": Bomb()}))
    with pytest.raises(UserError, match="cannot be read as weights only"):
        torch_file.read(tmp_path / "bomb.pth")[0]
    assert not witness.exists()
