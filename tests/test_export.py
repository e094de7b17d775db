"""`tools.export`: programs that compute what the net does, without the package."""

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
from jax import export as jax_export

from resnet_flax import pretrained
from resnet_flax.errors import UserError
from resnet_flax.runs import weights
from resnet_flax.tools import export
from tests.test_docs import blocks
from tests.test_pretrained import small_weights


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    weights.save(path, small_weights())
    return path


@pytest.fixture(scope="module")
def exported(file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "new/exported"
    export.main([f"--weights={file}", f"--out={folder}", "--batch_size=2"])
    return folder


def test_any_number_of_images_runs_without_the_package(file, exported, tmp_path):
    """By the snippet of the documentation, in a process of its own."""
    images = np.random.RandomState(3).randint(0, 256, (5, 8, 8, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    (tmp_path / "exported").symlink_to(exported)
    (snippet,) = (s for s in blocks("docs/weights.md", "python") if "jaxexport" in s)
    code = snippet.replace("(4, 32, 32, 3)", "(4, 8, 8, 3)") + (
        "import sys\n"
        "assert probabilities.shape == (4, 3)\n"
        "images = np.load('images.npy')\n"
        "np.save('got.npy', np.concatenate([net.call(images), net.call(images[:1])]))\n"
        "assert net.platforms == ('cpu', 'cuda', 'tpu')\n"
        "assert 'resnet_flax' not in sys.modules and 'flax' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    want = pretrained.load_pretrained(file).probabilities(images)
    got = np.load(tmp_path / "got.npy")
    np.testing.assert_allclose(got, np.concatenate([want, want[:1]]), atol=1e-5)


def test_the_portable_program_has_one_argument_and_no_calls_of_jax_s_own(exported):
    stablehlo = pytest.importorskip("jaxlib.mlir.dialects.stablehlo")
    from jaxlib.mlir import ir

    content = (exported / "model.stablehlo").read_bytes()
    with ir.Context() as context:
        stablehlo.register_dialect(context)
        text = str(stablehlo.deserialize_portable_artifact(context, content))
    (main,) = [line for line in text.splitlines() if "func.func public @main" in line]
    assert "(%arg0: tensor<2x8x8x3xui8>) -> (tensor<2x3xf32>" in main
    assert "custom_call" not in text


def test_the_description(file, exported, capsys):
    description = json.loads((exported / "model.json").read_text())
    assert description["weights"] == "net.safetensors"  # Not where it lay.
    assert description["weights_sha256"] == pretrained.load_pretrained(file).sha256
    assert description["class_names"] == ["ant", "bee", "cat"]
    for name, batch in (("jaxexport", "b"), ("stablehlo", 2)):
        file = description["files"][f"model.{name}"]
        assert (file["input"]["shape"], file["output"]["shape"]) == ([batch, 8, 8, 3], [batch, 3])
    export.main([f"--check={exported}"])
    assert "net.safetensors, written by jax" in capsys.readouterr().out


def test_logits_of_a_net_that_may_be_any(tmp_path, monkeypatch):
    logits = lambda images: images.astype(np.float32).mean(axis=(1, 2))  # noqa: E731
    about = {"name": "net", "size": 8, "short_side": 8, "sha256": "", "training": {}}
    net = types.SimpleNamespace(**about, logits=logits, class_names=["ant", "bee", "cat"])
    monkeypatch.setattr(pretrained, "load_pretrained", lambda _: net)
    export.main(["--weights=net", f"--out={tmp_path}/out", "--output=logits"])
    images = np.random.RandomState(4).randint(0, 256, (2, 8, 8, 3), np.uint8)
    program = jax_export.deserialize((tmp_path / "out/model.jaxexport").read_bytes())
    np.testing.assert_allclose(program.call(images), logits(images), rtol=1e-4, atol=1e-4)
    (tmp_path / "taken").touch()
    with pytest.raises(UserError, match="cannot write .*taken: File exists"):
        export.main(["--weights=net", f"--out={tmp_path}/taken"])


def test_a_program_that_differs_is_not_written(file, tmp_path, monkeypatch):
    program = types.SimpleNamespace(call=lambda images: np.full((len(images), 3), 1 / 3))
    monkeypatch.setattr(jax_export, "deserialize", lambda _: program)
    with pytest.raises(UserError, match=r"jaxexport differs from .*net\.safetensors by 0\.\d+: "):
        export.main([f"--weights={file}", f"--out={tmp_path}/out"])
    assert not list(tmp_path.iterdir())


def test_what_is_damaged_or_cannot_be_read(exported, tmp_path):
    folder = tmp_path / "copy"

    def refused(message, **contents):
        shutil.copytree(exported, folder, dirs_exist_ok=True)
        for name, content in contents.items():
            (folder / f"model.{name}").write_bytes(content)
        with pytest.raises(UserError, match=message):
            export.main([f"--check={folder}"])

    refused("model.stablehlo is damaged: its SHA-256 is another", stablehlo=b"x")
    refused("model.json is damaged", json=b"{")
    refused("model.json is damaged: 'files'", json=b"{}")
    refused("model.json is damaged", json=b'{"files": [1]}')
    program = jax_export.deserialize((exported / "model.jaxexport").read_bytes())
    newer = dataclasses.replace(program, mlir_module_serialized=b"not yet")
    for content in (b"made by a jax of the future", bytes(newer.serialize())):
        description = json.loads((exported / "model.json").read_text())
        digest = hashlib.sha256(content).hexdigest()
        description["files"]["model.jaxexport"]["sha256"] = digest
        description["versions"]["jax"] = "99.0"
        refused(
            r"does not run with jax .*; it was written by jax 99\.0: take that one or a later one",
            jaxexport=content,
            json=json.dumps(description).encode(),
        )
    (folder / "model.stablehlo").unlink()
    with pytest.raises(UserError, match=r"model\.stablehlo cannot be read: No such file"):
        export.check(folder)
    with pytest.raises(UserError, match=r"holds no model\.json"):
        export.check(tmp_path)


def test_wrong_arguments(file, tmp_path):
    for args, message in (
        ([], "give --weights=NAME|FILE and --out=FOLDER, or --check=FOLDER"),
        ([f"--weights={file}"], "give --weights"),
        ([f"--check={tmp_path}", f"--weights={file}"], "--check goes without"),
        (["--weights=resnet32", f"--out={tmp_path}"], "no weights are published for"),
        ([f"--weights={file}", f"--out={tmp_path}", "--batch_size=0"], "must be at least 1"),
        ([f"--weights={file}", f"--out={tmp_path}", "--output=x"], "invalid choice: 'x'"),
    ):
        with pytest.raises(UserError, match=message):
            export.main(args)
    assert not list(tmp_path.iterdir())
