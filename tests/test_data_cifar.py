import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from unittest import mock

import numpy as np
import pytest

from resnet_flax import data
from resnet_flax.data import cifar, dataset, tfds_files
from resnet_flax.errors import UserError
from tests import test_data_helpers as helpers

GOLDEN = "5d5cddb2b738b9e365357c5138e5f61f0733cf89317a48aafbb13f160372dc53"
GOLDEN_DRAW = (4, 9, 19, 29, 49)  # the first five of seed 0


@pytest.fixture
def archive(tmp_path, monkeypatch):
    path = helpers.small_archive(tmp_path)
    helpers.publish(monkeypatch, "cifar10", path)
    return path


@pytest.fixture
def offline(monkeypatch):
    refuse = mock.Mock(side_effect=socket.gaierror("no network in this test"))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def load(data_dir, archive=None, name="cifar10", **options):
    data_dir.mkdir(exist_ok=True)
    return data.load(name, data_dir=data_dir, archive=archive, **options)


@pytest.fixture
def small(archive, tmp_path):
    """The directory of a small prepared cifar10, to be damaged."""
    load(tmp_path / "data", archive)
    return tmp_path / "data" / "cifar10" / "3.0.2"


@pytest.mark.parametrize(("name", "kind"), helpers.KINDS)
@pytest.mark.usefixtures("offline")
def test_what_is_prepared_is_read_by_stock_tfds(tmp_path, monkeypatch, name, kind, capfd):
    import tensorflow_datasets as tfds

    path = helpers.small_archive(tmp_path, name, kind)
    helpers.publish(monkeypatch, name, path)
    root = tmp_path / "data"
    loaded = load(root, path, name)
    said = f"Preparing {name} in {root} (once; less than a minute)\n"
    assert capfd.readouterr() == ("", said)
    content = helpers.content(name)
    splits = [
        dataset.canonical(content.images[s], content.labels[s]["label"]) for s in helpers.SIZES
    ]
    assert loaded.fingerprint == dataset.fingerprint(*splits)
    assert loaded.class_names == content.class_names["label"]
    made = root / name / "3.0.2"
    for builder in (tfds.builder(name, data_dir=root), tfds.builder_from_directory(made)):
        assert builder.info.full_name == f"{name}/3.0.2"
        assert builder.info.file_format.value == "array_record"
        for key, names in content.class_names.items():
            assert tuple(builder.info.features[key].names) == names
        for split, size in helpers.SIZES.items():
            found = {example["id"]: example for example in builder.as_data_source(split)}
            assert len(found) == builder.info.splits[split].num_examples == size
            for index in range(size):
                example = found[f"{split}_{index:05d}".encode()]
                np.testing.assert_array_equal(example["image"], content.images[split][index])
                for key, values in content.labels[split].items():
                    assert example[key] == values[index]
    info = json.loads((made / "dataset_info.json").read_text())
    assert info["moduleName"] == "tensorflow_datasets.image_classification.cifar"
    assert sorted(p.name for p in root.iterdir()) == [f".{name}.lock", name]
    assert [p.name for p in (root / name).iterdir()] == ["3.0.2"]


def test_a_wrong_archive_is_refused_before_anything_is_written(tmp_path):
    archive = tmp_path / "archive.tar.gz"
    for make in (lambda: None, lambda: helpers.write_tar(archive, {"photo.png": b"png"})):
        make()
        with pytest.raises(UserError, match=str(archive)):
            load(tmp_path / "data", archive)
        assert not list((tmp_path / "data").iterdir())


def test_a_folder_in_the_way_is_named(tmp_path, archive):
    final = tmp_path / "data" / "cifar10" / "3.0.2"
    final.mkdir(parents=True)
    (final / "mine.txt").touch()
    with pytest.raises(UserError, match=f"{final} has no dataset_info.json"):
        load(tmp_path / "data", archive)
    (final / "mine.txt").unlink()
    assert len(load(tmp_path / "data", archive).train) == 50


def test_a_failed_preparation_leaves_nothing(tmp_path, archive, monkeypatch):
    full = OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr("PIL.Image.Image.save", mock.Mock(side_effect=full))
        with pytest.raises(UserError, match=r"cannot prepare cifar10 in .*No space left"):
            load(tmp_path / "data", archive)
    assert [p.name for p in (tmp_path / "data").iterdir()] == [".cifar10.lock"]
    assert len(load(tmp_path / "data", archive).train) == 50


PROCESS = """
    import pathlib, sys
    import pytest
    from resnet_flax import data
    from resnet_flax.data import cifar
    from tests import test_data_helpers as helpers
    path = pathlib.Path({path!r})
    helpers.publish(pytest.MonkeyPatch(), "cifar10", path)
    original = cifar._examples
    def slow(*arguments):
        yield from original(*arguments)
        print("preparing", flush=True)
        sys.stdin.read()
    cifar._examples = slow
    data.load("cifar10", data_dir={root!r}, archive=path)
"""


def start(path, root):
    root.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROCESS.format(path=str(path), root=str(root)))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=pathlib.Path(__file__).resolve().parents[1],
    )


def test_a_second_process_waits_for_the_first(tmp_path, archive):
    with start(archive, tmp_path / "data") as first:
        assert first.stdout.readline() == "preparing\n"
        with start(archive, tmp_path / "data") as second:
            assert "Another process prepares cifar10" in second.stderr.readline()
            first.communicate()
            out, err = second.communicate()
        assert first.returncode == second.returncode == 0, err
    assert out == ""  # It found what the first had prepared.
    assert len(load(tmp_path / "data").train) == 50


def test_what_a_killed_process_left_is_removed(tmp_path, archive):
    root = tmp_path / "data"
    with start(archive, root) as process:
        assert process.stdout.readline() == "preparing\n"
        process.send_signal(signal.SIGKILL)
    assert any((root / ".cifar10.preparing" / "cifar10").iterdir())
    foreign = root / "cifar10" / "incomplete.ABCDEF_3.0.2"  # Another program may be at work.
    foreign.mkdir(parents=True)
    assert len(load(root, archive).train) == 50
    assert sorted(os.listdir(root)) == [".cifar10.lock", "cifar10"]
    assert foreign.is_dir()


def test_without_locks_each_process_prepares_for_itself(tmp_path, archive, monkeypatch):
    refuse = mock.Mock(side_effect=OSError(38, "Function not implemented"))
    monkeypatch.setattr("fcntl.flock", refuse)
    root, original, loaded = tmp_path / "data", cifar._examples, []

    def slow(*arguments):
        if not loaded:  # Meanwhile another process prepares the same.
            loaded.append(None)
            with monkeypatch.context() as patch:
                patch.setattr(os, "getpid", lambda: 1)
                loaded[0] = load(root, archive).fingerprint
        yield from original(*arguments)

    monkeypatch.setattr(cifar, "_examples", slow)
    assert load(root, archive).fingerprint == loaded[0]
    assert sorted(os.listdir(root)) == [".cifar10.lock", "cifar10"]


@pytest.mark.usefixtures("offline")
def test_a_data_dir_that_cannot_be_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for wrong in ("gs://bucket/data", "~nobody-of-that-name/x", tmp_path / "file", tmp_path / "no"):
        with pytest.raises(UserError, match=f"^data_dir is '{wrong}'"):
            data.load("cifar10", data_dir=wrong)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "no"))
    with pytest.raises(UserError, match=r"^\$TFDS_DATA_DIR is .*/no', which does not .*mkdir -p"):
        data.load("cifar10")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_data_dir_is_the_given_one_or_that_of_tfds(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    assert tfds_files.resolve_data_dir(None) == tmp_path / "tensorflow_datasets"
    for name in ("other", "env", "relative"):
        (tmp_path / name).mkdir()
    assert tfds_files.resolve_data_dir("~/other") == tmp_path / "other"
    monkeypatch.setenv("TFDS_DATA_DIR", "~/env")
    assert tfds_files.resolve_data_dir("") == tmp_path / "env"
    monkeypatch.chdir(tmp_path)
    assert tfds_files.resolve_data_dir("relative") == tmp_path / "relative"


def test_a_data_set_is_found_from_its_folder_and_from_those_above(small):
    expected = load(small).fingerprint
    for folder in (small.parent, small.parent.parent):
        assert load(folder).fingerprint == expected
    with pytest.raises(UserError, match="holds the data set 'cifar10', not 'cifar100'"):
        load(small, name="cifar100")
    other = small.rename(small.parent / "3.0.10")
    (small.parent / "3.0.9").mkdir()
    shutil.copy(other / "dataset_info.json", small.parent / "3.0.9")
    (small.parent / "3.0.11").mkdir()  # Not prepared.
    assert tfds_files.find("cifar10", data_dir=small.parent, version="3.0.2") == other


def test_a_damaged_record_file_is_named(small):
    (path,) = small.glob("cifar10-test.array_record*")
    whole = path.read_bytes()
    at = len(whole) // 4
    for content in (whole[:70_000], b"", whole[:at] + bytes(9000) + whole[at + 9000 :], None):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        said = f"cannot read {path}: .*\nDelete {small} to have cifar10"
        with pytest.raises(UserError, match=said):
            load(small)


def test_what_is_not_the_data_set_is_named(small, monkeypatch):
    info = small / "dataset_info.json"
    original = info.read_text()

    def refused(match, old='"20"', new='"20"'):
        assert old in original
        info.write_text(original.replace(old, new), errors="surrogateescape")
        with pytest.raises(UserError, match=match):
            load(small)

    refused("has .*'test': 19.* of 10 classes; cifar10 has .*: 20", new='"19"')
    refused("format tfrecord, which needs TensorFlow.*another config", "array_record", "tfrecord")
    for text in ("", "{", "[]", '{"name": "cifar10"}', "\udcff"):
        refused(f"{small} is not a cifar10 prepared by TFDS", original, text)
    with monkeypatch.context() as patch:
        patch.setattr(cifar, "SIZES", {"train": 50, "test": 21})
        refused(r"cannot read .*cifar10-test\.array_record", new='"21"')
    monkeypatch.setattr(cifar, "SHAPE", (28, 28, 1))
    refused(r"is uint8 \(32, 32, 3\), not \(28, 28, 1\)")


@pytest.mark.slow
def test_the_real_cifar10():
    real = data.load("cifar10", data_dir=helpers.real_data_dir(), split="45k/5k", seed=0)
    assert real.fingerprint == GOLDEN
    assert real.class_names[:2] == ("airplane", "automobile")
    for name, size in {"train": 4500, "validation": 500, "test": 1000}.items():
        split = getattr(real, name)
        assert split.images.shape == (10 * size, 32, 32, 3)
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int32
        assert np.bincount(split.labels).tolist() == [size] * 10
    assert len(real.validation_draw) == 5000
    assert real.validation_draw[:5] == GOLDEN_DRAW
