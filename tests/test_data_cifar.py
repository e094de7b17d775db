import shutil

import numpy as np
import pytest

from resnet_flax import data
from resnet_flax.data import cifar, prepared
from resnet_flax.errors import UserError
from tests import test_data_helpers as helpers

GOLDEN = "5d5cddb2b738b9e365357c5138e5f61f0733cf89317a48aafbb13f160372dc53"
GOLDEN_DRAW = (4, 9, 19, 29, 49)  # the first five of seed 0


@pytest.fixture
def small(tmp_path):
    """A small prepared cifar10, to be damaged."""
    path, layout = helpers.small_archive(tmp_path)
    return helpers.make(tmp_path / "data", archive_path=path, layout=layout)


@pytest.fixture
def offline(monkeypatch):
    """Any network at all is an error."""
    import socket
    import urllib.request

    def refuse(*arguments, **keywords):
        raise urllib.error.URLError("no network in this test")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("offline")
def test_load_without_data_or_network_names_the_ways_out(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(UserError) as caught:
        data.load("cifar10", show_progress=False)
    message = str(caught.value)
    for part in ("data_dir", "archive", "mirror", "cifar-10-binary.tar.gz", str(tmp_path)):
        assert part in message


def test_load_refuses_an_archive_that_is_not_the_published_one(tmp_path):
    path, _ = helpers.small_archive(tmp_path)
    with pytest.raises(UserError, match=r"is not the published cifar-10-binary\.tar\.gz or cifar"):
        data.load("cifar10", data_dir=tmp_path, archive=path)


@pytest.mark.parametrize(
    "data_dir", ["gs://bucket/data", "~nobody-of-that-name/data", "{tmp}/file", "{tmp}/file/below"]
)
@pytest.mark.usefixtures("offline")
def test_a_data_dir_that_cannot_be_is_named(tmp_path, data_dir):
    (tmp_path / "file").touch()
    place = data_dir.format(tmp=tmp_path)
    with pytest.raises(UserError, match=f"data_dir .*{place}"):
        data.load("cifar10", data_dir=place, show_progress=False)


def test_the_data_dir_is_the_given_one_or_that_of_tfds(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    assert prepared.resolve_data_dir(None) == tmp_path / "tensorflow_datasets"
    for name in ("other", "env", "relative"):
        (tmp_path / name).mkdir()
    assert prepared.resolve_data_dir("~/other") == tmp_path / "other"
    monkeypatch.setenv("TFDS_DATA_DIR", "~/env")
    assert prepared.resolve_data_dir("") == tmp_path / "env"
    assert prepared.resolve_data_dir(tmp_path) == tmp_path
    monkeypatch.chdir(tmp_path)
    assert prepared.resolve_data_dir("relative") == tmp_path / "relative"


@pytest.mark.usefixtures("offline")
def test_a_named_data_dir_must_exist(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"^data_dir is .*/mistyped', which does not exist.*mkdir"):
        data.load("cifar10", data_dir=tmp_path / "mistyped", show_progress=False)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "env"))
    with pytest.raises(UserError, match=r"^\$TFDS_DATA_DIR is .*/env', which does not exist"):
        data.load("cifar10", show_progress=False)
    assert not list(tmp_path.iterdir())


def test_a_data_set_is_found_from_its_folder_and_from_those_above(small):
    for folder in (small, small.parent, small.parent.parent):
        assert prepared.find("cifar10", data_dir=folder, version="3.0.2") == small
    assert prepared.find("cifar100", data_dir=small.parent.parent, version="3.0.2") is None
    with pytest.raises(UserError, match="holds the data set 'cifar10', not 'cifar100'"):
        prepared.find("cifar100", data_dir=small, version="3.0.2")
    other = small.rename(small.parent / "3.0.10")
    (small.parent / "3.0.9").mkdir()
    shutil.copy(other / "dataset_info.json", small.parent / "3.0.9")
    (small.parent / "3.0.11").mkdir()  # Not prepared.
    assert prepared.find("cifar10", data_dir=small.parent, version="3.0.2") == other


def record_file(directory, split="test"):
    (path,) = directory.glob(f"cifar10-{split}.array_record*")
    return path


@pytest.mark.parametrize("damage", ["truncated", "empty", "absent", "overwritten"])
def test_a_damaged_record_file_is_named(small, damage):
    path = record_file(small)
    if damage == "absent":
        path.unlink()
    elif damage == "overwritten":
        whole = bytearray(path.read_bytes())
        whole[len(whole) // 4 : len(whole) // 4 + 9000] = bytes(9000)
        path.write_bytes(whole)
    else:
        path.write_bytes(path.read_bytes()[: 70_000 if damage == "truncated" else 0])
    with pytest.raises(UserError, match=f"cannot read {path}"):
        helpers.read(small)


def edit(directory, file, old, new):
    text = (directory / file).read_text()
    assert old in text
    (directory / file).write_text(text.replace(old, new))


def test_a_wrong_number_of_examples_is_named(small):
    with pytest.raises(UserError, match=r"'train' of .* has 50 examples; cifar10 has 50000"):
        helpers.read(small, sizes=cifar.SIZES)
    edit(small, "dataset_info.json", '"20"', '"19"')
    with pytest.raises(UserError, match=r"'test' of .* has 19 examples; cifar10 has 20"):
        helpers.read(small)
    edit(small, "dataset_info.json", '"19"', '"21"')
    with pytest.raises(UserError, match=f"cannot read {record_file(small)}"):
        helpers.read(small, sizes={"train": 50, "test": 21})


def test_a_wrong_image_and_a_wrong_label_are_named(small, monkeypatch):
    with pytest.raises(UserError, match=r"has labels \d\.\.9; those of cifar10 are 0\.\.2"):
        helpers.read(small, classes=3)
    with pytest.raises(UserError, match=r"is uint8 \(32, 32, 3\), not uint8 \(28, 28, 1\)"):
        prepared.read(
            "cifar10", directory=small, sizes=helpers.SIZES, shape=(28, 28, 1), classes=10
        )


def test_a_tfrecord_data_set_is_refused_with_what_to_do(small):
    edit(small, "dataset_info.json", '"array_record"', '"tfrecord"')
    with pytest.raises(UserError, match=r"format tfrecord, which needs TensorFlow.*another data"):
        helpers.read(small)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"name": "cifar10"}', "\xff"])
def test_damaged_metadata_are_named(small, text):
    (small / "dataset_info.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=f"{small} is not a cifar10 prepared by TFDS"):
        data.load("cifar10", data_dir=small)


@pytest.fixture(scope="module")
def real():
    return data.load("cifar10", data_dir=helpers.real_data_dir(), split="45k/5k", seed=0)


def test_the_real_cifar10(real):
    assert real.fingerprint == GOLDEN
    assert real.class_names[:2] == ("airplane", "automobile")
    sizes = {"train": 4500, "validation": 500, "test": 1000}
    for name, size in sizes.items():
        split = getattr(real, name)
        assert split.images.shape == (10 * size, 32, 32, 3)
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int32
        assert np.bincount(split.labels).tolist() == [size] * 10
    assert len(real.validation_draw) == 5000
    assert real.validation_draw[:5] == GOLDEN_DRAW
