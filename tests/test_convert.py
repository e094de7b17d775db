"""Weights to and from PyTorch: names, numbers, refusals. `test_convert_torch` needs PyTorch."""

import dataclasses
import functools
import re

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from resnet_flax import create_model, models
from resnet_flax.errors import UserError
from resnet_flax.models import blocks, deferred
from resnet_flax.runs import published, weights
from resnet_flax.tools import convert, torch_file, torch_names
from resnet_flax.training.state import abstract_variables

COMMON = {"mean": np.zeros(3), "std": np.ones(3)}
ONCE = {"xla_backend_optimization_level": 0}  # Compiles fast what runs once.


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

    return jax.tree_util.tree_map_with_path(draw, abstract_variables(model))


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@functools.cache
def _compiled(model):
    return jax.jit(model.apply, compiler_options=ONCE)


def outputs(model, variables, x):
    return _compiled(model)(variables, x)


@pytest.fixture
def shallow(monkeypatch):
    """All nets with a narrow block in each stage, two in the first: no less tells B from C."""
    for name, net in models.ARCHITECTURES.items():
        first, *rest = net.stage_sizes
        sizes = (min(first, 2), *(1 for _ in rest))
        small = {"stage_sizes": sizes, "widths": (8, 16, 16, 24)[: len(sizes)]}
        monkeypatch.setitem(models.ARCHITECTURES, name, dataclasses.replace(net, **small))


def run(out, **flags):
    convert.main([f"--out={out}", *(f"--{name}={value}" for name, value in flags.items())])


def state_dict_of(name):
    return torch_names.to_torch(random_variables(create_model(name)))


def save_ours(path, name, variables=None, **model):
    model = {"name": name, "shortcut": models.resolve_shortcut(name, None), "num_classes": 10,
             "stride_in_3x3": False, **model}  # fmt: skip
    if variables is None:
        variables = random_variables(create_model(name))
    content = weights.Weights(model, variables, np.zeros(3), np.ones(3), (*"0123456789",), {})
    weights.save(path, content)


@pytest.mark.parametrize(
    ("name", "shortcut"),
    [
        ("resnet8", "A"), ("resnet8", "B"), ("resnet8", "C"), ("plain20", "none"),
        ("resnet18", "B"), ("resnet20_bottleneck", "B"), ("resnet20_preact", "B"),
    ],
)  # fmt: skip
def test_there_and_back_is_the_same_to_the_bit(name, shortcut, shallow):
    variables = random_variables(create_model(name, shortcut=shortcut))
    for style in torch_names.STYLES:
        state_dict = torch_names.to_torch(variables, style)
        prefixed = {f"module.{k}": v for k, v in state_dict.items()}
        back = convert.from_torch(prefixed, name, **COMMON)
        assert back.model["shortcut"] == shortcut
        assert_equal(back.variables, variables)


def test_names_are_those_that_pytorch_projects_use():
    variables = random_variables(create_model("resnet20", shortcut="B"))
    assert {
        "conv1.weight", "bn1.running_var", "bn1.num_batches_tracked", "layer1.0.conv1.weight",
        "layer3.2.bn2.bias", "layer2.0.shortcut.0.weight", "layer2.0.shortcut.1.running_mean",
        "linear.weight", "linear.bias",
    } <= set(torch_names.to_torch(variables))  # fmt: skip
    renamed = {}
    for name, value in state_dict_of("resnet20").items():
        for pattern, theirs in (
            (r"^(conv|bn)1", r"\1In"), ("linear", "fcOut"), ("layer1", "stack1"),
            (r"layer(\d)\.0", r"stack\1a"), (r"layer(\d)\.1", r"stack\1b.0"),
            (r"layer(\d)\.2", r"stack\1b.1"),
        ):  # fmt: skip
            name = re.sub(pattern, theirs, name)
        renamed[name] = value
    assert {"bnIn.bias", "stack1.2.bn1.bias", "stack2a.bn1.bias", "stack3b.1.bn1.bias"} < {*renamed}
    got = convert.from_torch(renamed, "resnet20", **COMMON).variables
    assert_equal(got, random_variables(create_model("resnet20")))


def test_state_dicts_of_other_nets_are_refused(monkeypatch):
    few = "resnet8", "resnet20", "resnet32", "plain20"
    monkeypatch.setattr(models, "ARCHITECTURES", {n: models.ARCHITECTURES[n] for n in few})
    state_dict = state_dict_of("resnet20")

    def refused(message, name="resnet20", **changes):
        with pytest.raises(UserError, match=message):
            convert.from_torch(state_dict | changes, name, **COMMON)

    refused(r"lacks layer1\.3\.bn1.*; it fits --model=resnet20 or plain20$", "resnet32")
    refused(r"it has layer1\.1\.bn1\.bias, which this one lacks", "resnet8")
    blocks = {k: v for k, v in state_dict.items() if k.startswith("layer")}
    refused(r"is of several nets: .*a\.", **{f"a.{k}": v for k, v in blocks.items()})
    for array, message in (
        (np.ones(8, np.float32), r"bn1\.weight is float32 \[8\]"),
        (np.full(16, np.nan, np.float32), "bn1.weight is not finite"),
        (np.full(16, 1e300), "bn1.weight is not finite throughout in float32"),
        (np.ones(16, np.int8), "bn1.weight is int8: only floats are read"),
    ):
        refused(message, **{"bn1.weight": array})


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_other_floats_are_read(dtype, tmp_path):
    state_dict = {k: v.astype(dtype) for k, v in state_dict_of("resnet8").items()}
    safetensors.numpy.save_file(state_dict, tmp_path / "theirs.safetensors")
    read = torch_file.read(tmp_path / "theirs.safetensors")[0]
    got = convert.from_torch(read, "resnet8", **COMMON).variables
    assert {v.dtype for v in jax.tree.leaves(got)} == {np.dtype(np.float32)}
    variables = random_variables(create_model("resnet8"))
    assert_equal(got, jax.tree.map(lambda v: v.astype(dtype).astype(np.float32), variables))


def test_zeros_after_the_old_channels_make_the_same_net(shallow):
    def pad_after(block, x):
        new = block.out_features - x.shape[-1]
        x = deferred.array(x)[:, :: block.strides, :: block.strides]
        return jax.numpy.pad(x, ((0, 0), (0, 0), (0, 0), (0, new)))

    model = create_model("resnet20_preact", shortcut="A")
    theirs, x = random_variables(model), np.random.RandomState(1).randn(2, 16, 16, 3)
    ours = torch_names.move_zeros(theirs, "split")
    assert_equal(torch_names.move_zeros(ours, "after"), theirs)
    got, wrong = outputs(model, ours, x), outputs(model, theirs, x)
    want = outputs(model.clone(shortcuts=(pad_after, blocks.identity)), theirs, x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert np.abs(wrong - got).max() > 0.01


# The command line.


@pytest.fixture
def theirs(tmp_path):
    safetensors.numpy.save_file(state_dict_of("resnet8"), tmp_path / "theirs.safetensors")
    return tmp_path / "theirs.safetensors"


def test_command_line_both_ways_without_torch(theirs, tmp_path):
    ours, back = tmp_path / "new/ours.safetensors", tmp_path / "back.safetensors"
    run(ours, from_torch=theirs, model="resnet8", preprocess="imagenet")
    loaded = weights.load(ours)
    np.testing.assert_allclose(loaded.mean, [123.675, 116.28, 103.53], rtol=1e-6)
    np.testing.assert_allclose(loaded.std, [58.395, 57.12, 57.375], rtol=1e-6)
    assert loaded.training == {"source": "theirs.safetensors"}
    run(back, to_torch=ours)
    assert_equal(safetensors.numpy.load_file(back), safetensors.numpy.load_file(theirs))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("", "either --from_torch=FILE or --to_torch=FILE"),
        ("--to_torch={file}", "weights file .* is of format None, not 'resnet_flax 1'"),
        ("--from_torch={file}", "needs --model"),
        ("--from_torch={file} --model=resnet8", "--preprocess="),
        ("--from_torch=no.pth --model=resnet8 --mean=0,0,0 --std=1,1,1", "does not exist"),
        ("--from_torch={file} --model=resnet8 --mean=1,2 --std=1,1,1", "must be three numbers"),
        ("--from_torch={file} --model=resnet8 --mean=0,0,0 --std=1,0,1",
         "--std=1,0,1 must be three positive numbers"),
        ("--from_torch={file} --model=resnet8 --mean=0,0,0", "give both --mean"),
        ("--from_torch={file} --model=resnet8 --preprocess=cifar10 --std=1,1,1", "not both"),
        *(("--to_torch={file} --" + flag, f"--{flag.split('=')[0]} means nothing to --to_")
          for flag in ("model=resnet20", "stride_in_3x3=true", "preprocess=cifar10", "mean=0,0,0",
                       "std=1,1,1")),
    ],
)  # fmt: skip
def test_what_the_command_line_refuses(args, message, theirs, tmp_path):
    with pytest.raises(UserError, match=message):
        convert.main([*args.format(file=theirs).split(), f"--out={tmp_path}/out"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_published_weights_there_and_back_with_their_preprocessing(suffix, tmp_path, capsys):
    if suffix == "pth":
        pytest.importorskip("torch")
    theirs, ours = tmp_path / f"theirs.{suffix}", tmp_path / "ours.safetensors"
    run(theirs, to_torch="plain20")
    assert "expects (pixels - mean) / std" in capsys.readouterr().out
    back = {"from_torch": theirs, "model": "plain20"}
    run(ours, **back)
    assert "took the preprocessing that the file has" in capsys.readouterr().out
    want, got = weights.load(published.locate("plain20")[0]), weights.load(ours)
    for name in ("mean", "std", "class_names", "variables"):
        assert_equal(getattr(got, name), getattr(want, name))
    run(ours, **back, preprocess="cifar10", class_names="a,b,c,d,e,f,g,h,i,j")
    assert weights.load(ours).mean.shape == (3,)
    assert weights.load(ours).class_names == tuple("abcdefghij")
    with pytest.raises(UserError, match="there are 2 class names, but 10 classes"):
        run(ours, **back, class_names="a,b")


@pytest.mark.parametrize("said", ["7", '["mean"]', '{"mean": [0, 0, 0], "std": "big"}'])
def test_damaged_preprocessing_of_a_file_is_refused(said, theirs, tmp_path):
    safetensors.numpy.save_file(safetensors.numpy.load_file(theirs), theirs, {"resnet_flax": said})
    with pytest.raises(UserError, match="what it says in 'resnet_flax' is no preprocessing"):
        run(tmp_path / "out", from_torch=theirs, model="resnet8")


def test_nets_that_pytorch_s_names_do_not_express_are_refused_both_ways(theirs, tmp_path):
    out, ours = tmp_path / "new" / "out.safetensors", tmp_path / "ours.safetensors"
    kinds = r"highway\d+|resnet\d+_keras_v\d|resnet110_(?!preact|bottleneck)\w+"
    foreign = [name for name in models.ARCHITECTURES if re.fullmatch(kinds, name)]
    # The arrays are not looked at: resnet110's would fit some of these nets.
    for name in foreign:
        save_ours(ours, name, {"params": {}, "batch_stats": {}})
        for flags in (
            {"to_torch": ours},
            {"from_torch": theirs, "model": name, "preprocess": "imagenet"},
        ):
            with pytest.raises(UserError, match=f"model {name!r} cannot be converted"):
                run(out, **flags)
    assert not out.parent.exists()
    others = models.ARCHITECTURES.keys() - foreign
    for name in others:
        convert.check_expressible(name)
    assert (len(foreign), len(others)) == (20, 31)


@pytest.mark.parametrize("name", ["resnet8", "resnet20_bottleneck", "resnet20_preact"])
def test_stochastic_depth_is_folded_into_the_arrays(name, shallow, tmp_path):
    net, plain = create_model(name, survival=0.5), create_model(name)
    variables = random_variables(net)
    save_ours(tmp_path / "ours.safetensors", name, variables, survival=0.5)
    theirs = tmp_path / "theirs.safetensors"
    run(theirs, to_torch=tmp_path / "ours.safetensors")
    back = convert.from_torch(torch_file.read(theirs)[0], name, stride_in_3x3=False, **COMMON)
    assert "survival" not in back.model
    x = np.random.RandomState(0).randn(4, 8, 8, 3).astype(np.float32)
    want = outputs(net, variables, x)
    np.testing.assert_allclose(outputs(plain, back.variables, x), want, rtol=1e-4, atol=1e-4)
    assert np.abs(outputs(plain, variables, x) - want).max() > 0.01


def test_what_a_state_dict_does_not_show_is_said(shallow, tmp_path, capsys):
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    for name, said in (
        ("resnet8", "option A), the zeros of new channels half before and half after"),
        ("plain20", "taken to have no shortcuts"),
        ("resnet20_preact", "before branch and shortcut split"),
        ("resnet20_bottleneck", "stride of its bottlenecks in the first 1x1"),
    ):
        save_ours(ours, name)
        run(theirs, to_torch=ours)
        assert said in capsys.readouterr().out
    back = {"model": "resnet20_bottleneck", "preprocess": "cifar10", "stride_in_3x3": "true"}
    run(ours, from_torch=theirs, **back)
    assert "in the 3x3 convolution" in capsys.readouterr().out
    assert weights.load(ours).model["stride_in_3x3"] is True
    with pytest.raises(UserError, match="--option_a_zeros means nothing to resnet20_bottleneck"):
        run(theirs, to_torch=ours, option_a_zeros="after")
