"""What cannot be converted is refused, with a word on why, and nothing is written."""

import dataclasses

import jax
import numpy as np
import pytest
import safetensors.numpy

from resnet_flax import create_model, models
from resnet_flax.errors import UserError
from resnet_flax.models import ARCHITECTURES
from resnet_flax.models.resnet import without_survival
from resnet_flax.runs import weights
from resnet_flax.tools import convert, torch_file, torch_names
from tests.test_convert import random_variables
from tests.test_models import ONCE

COMMON = {"mean": np.zeros(3), "std": np.ones(3)}
FOREIGN = [
    *(f"highway{depth}" for depth in (20, 32, 44, 56, 110)),
    *(f"resnet{depth}_keras_v1" for depth in (20, 32, 44, 56, 110)),
    *(f"resnet{depth}_keras_v2" for depth in (56, 110)),
    "resnet110_dropout_shortcut",
    "resnet110_bn_after_addition",
    "resnet110_relu_before_addition",
    "resnet110_relu_only_preact",
    "resnet110_constant_scaling",
    "resnet110_exclusive_gating",
    "resnet110_shortcut_gating",
    "resnet110_conv_shortcut",
]


def file_of(name, variables, **model):
    model = {
        "name": name,
        "shortcut": models.resolve_shortcut(name, None),
        "num_classes": 10,
        "stride_in_3x3": False,
        **model,
    }
    return weights.Weights(model, variables, np.zeros(3), np.ones(3), tuple("0123456789"), {})


@pytest.mark.parametrize("name", FOREIGN)
def test_nets_that_pytorch_s_names_do_not_express_are_refused_both_ways(name, tmp_path):
    out = tmp_path / "new" / "out.safetensors"
    # What is in the files does not come into it: those of resnet110 would fit some of these nets.
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    weights.save(ours, file_of(name, {"params": {}, "batch_stats": {}}))
    safetensors.numpy.save_file({"conv1.weight": np.zeros((16, 3, 3, 3), np.float32)}, theirs)
    for args in (
        [f"--to_torch={ours}"],
        [f"--from_torch={theirs}", f"--model={name}", "--preprocess=imagenet"],
    ):
        with pytest.raises(UserError, match=f"model {name!r} cannot be converted"):
            convert.main([*args, f"--out={out}"])
    assert not out.parent.exists()


def test_all_others_can_be_converted():
    rest = set(ARCHITECTURES) - set(FOREIGN)
    for name in rest:
        convert.check_expressible(name)
    assert {"resnet20", "plain20", "resnet164_preact", "resnet47_bottleneck", "resnet50"} <= rest
    assert len(rest) == 31


@pytest.mark.parametrize("name", ["resnet8", "resnet20_bottleneck", "resnet20_preact"])
def test_stochastic_depth_is_folded_into_the_arrays(name, tmp_path):
    net = create_model(name, survival=0.5)
    variables = random_variables(net)
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    weights.save(ours, file_of(name, variables, survival=0.5))
    convert.main([f"--to_torch={ours}", f"--out={theirs}"])
    back = convert.from_torch(torch_file.read(theirs)[0], name, stride_in_3x3=False, **COMMON)
    assert "survival" not in back.model
    x = np.random.RandomState(0).randn(4, 8, 8, 3).astype(np.float32)
    want = jax.jit(net.apply, compiler_options=ONCE)(variables, x)
    plain = jax.jit(create_model(name).apply, compiler_options=ONCE)
    got = plain(back.variables, x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    # And that is not what the arrays as they were would have made.
    assert np.abs(plain(variables, x) - want).max() > 0.01


def test_without_stochastic_depth_nothing_is_touched():
    model = create_model("resnet20")
    variables = random_variables(model)
    jax.tree.map(np.testing.assert_array_equal, without_survival(model, variables), variables)


def test_files_that_are_not_what_they_say_are_refused(tmp_path):
    ours, out = tmp_path / "ours.safetensors", tmp_path / "out.safetensors"
    variables = random_variables(create_model("resnet8"))
    good = file_of("resnet8", variables)
    for change, message in (
        ({"name": "resnet20"}, "is of another net: it lacks batch_stats/stage1_block2"),
        ({"name": "resnet21"}, "unknown model 'resnet21'"),
        ({"shortcut": "B"}, "it lacks batch_stats/stage2_block1/proj_bn"),
        ({"survival": "often"}, "is damaged: its net is"),
        ({"dropout": 0.5}, "is damaged: its net is"),
        ({"num_classes": 100}, r"params/head/bias is \[10\]"),
    ):
        weights.save(ours, dataclasses.replace(good, model={**good.model, **change}))
        with pytest.raises(UserError, match=message):
            convert.main([f"--to_torch={ours}", f"--out={out}"])
    assert not out.exists()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full(16, np.nan, np.float32), "bn1.weight is not finite"),
        (np.full(16, 1e300), "bn1.weight is not finite throughout in float32"),
        (np.ones(16, np.int8), "bn1.weight is int8: only floats are read"),
    ],
)
def test_arrays_that_are_no_weights_are_refused(array, message):
    state_dict = torch_names.to_torch(random_variables(create_model("resnet8")))
    with pytest.raises(UserError, match=message):
        convert.from_torch({**state_dict, "bn1.weight": array}, "resnet8", **COMMON)


def test_flags_of_the_other_way_and_preprocessing_that_contradicts_itself(tmp_path):
    file, out = tmp_path / "a.safetensors", f"--out={tmp_path}/b.safetensors"
    for flag in ("model=resnet20", "shortcut=A", "stride_in_3x3=true", "preprocess=cifar10",
                 "mean=0,0,0", "std=1,1,1"):  # fmt: skip
        with pytest.raises(UserError, match=f"--{flag.split('=')[0]} means nothing to --to_torch"):
            convert.main([f"--to_torch={file}", out, f"--{flag}"])
    common = [f"--from_torch={file}", out, "--model=resnet20"]
    with pytest.raises(UserError, match="--names means nothing to --from_torch"):
        convert.main([*common, "--names=cifar"])
    with pytest.raises(UserError, match="not both"):
        convert.main([*common, "--preprocess=cifar10", "--std=1,1,1"])
    with pytest.raises(UserError, match="--std=1,0,1 must be three positive numbers"):
        convert.main([*common, "--mean=0,0,0", "--std=1,0,1"])


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats_are_read(dtype):
    variables = random_variables(create_model("resnet8"))
    state_dict = {k: v.astype(dtype) for k, v in torch_names.to_torch(variables).items()}
    got = convert.from_torch(state_dict, "resnet8", **COMMON).variables
    assert {v.dtype for v in jax.tree.leaves(got)} == {np.dtype(np.float32)}
    want = jax.tree.map(lambda v: v.astype(dtype).astype(np.float32), variables)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_bfloat16_safetensors_are_read(tmp_path):
    import ml_dtypes

    variables = random_variables(create_model("resnet8"))
    state_dict = torch_names.to_torch(variables)
    rounded = {k: v.astype(ml_dtypes.bfloat16) for k, v in state_dict.items()}
    safetensors.numpy.save_file(rounded, tmp_path / "b.safetensors")
    read = torch_file.read(tmp_path / "b.safetensors")[0]
    got = convert.from_torch(read, "resnet8", **COMMON).variables
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2), got, variables)


def test_what_a_state_dict_does_not_show_is_said(tmp_path, capsys):
    for name, said in (
        ("resnet8", "option A), the zeros of new channels half before and half after"),
        ("plain20", "taken to have no shortcuts"),
        ("resnet20_bottleneck", "stride of its bottlenecks in the first 1x1"),
        ("resnet20_preact", "before branch and shortcut split"),
    ):
        ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
        weights.save(ours, file_of(name, random_variables(create_model(name))))
        convert.main([f"--to_torch={ours}", f"--out={theirs}"])
        printed = capsys.readouterr().out
        assert said in printed
    common = ["--model=resnet20_bottleneck", "--preprocess=cifar10", "--stride_in_3x3=true"]
    state_dict = torch_names.to_torch(random_variables(create_model("resnet20_bottleneck")))
    safetensors.numpy.save_file(state_dict, theirs)
    convert.main([f"--from_torch={theirs}", f"--out={ours}", *common])
    assert "in the 3x3 convolution" in capsys.readouterr().out
    assert weights.load(ours).model["stride_in_3x3"] is True


def test_presets_are_pytorch_s_preprocessing():
    """ToTensor and Normalize: (x / 255 - mean) / std."""
    from resnet_flax.training import augment

    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    for mean, std in convert.PREPROCESS.values():
        ours = augment.normalize(pixels, 255 * np.float32(mean), 255 * np.float32(std))
        theirs = (np.float32(pixels) / 255 - np.float32(mean)) / np.float32(std)
        np.testing.assert_allclose(ours, theirs, atol=1e-6, rtol=1e-6)
