import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from resnet_flax.data import cifar, dataset, prepare, prepared
from resnet_flax.errors import UserError
from tests import test_data_helpers as helpers


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


@pytest.mark.parametrize(("name", "binary"), helpers.ALL)
@pytest.mark.usefixtures("offline")
def test_what_is_prepared_is_read_by_stock_tfds(tmp_path, name, binary, capfd):
    import tensorflow_datasets as tfds

    content = helpers.content(name)
    path, layout = helpers.small_archive(tmp_path, name, binary=binary, data=content)
    root = tmp_path / "data"
    made = helpers.make(root, archive_path=path, layout=layout, name=name)
    assert made == root / name / "3.0.2"
    builders = (tfds.builder(name, data_dir=root), tfds.builder_from_directory(made))
    for builder in builders:
        assert builder.info.full_name == f"{name}/3.0.2"
        assert builder.info.file_format.value == "array_record"
        for key, names in content.names.items():
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
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_order_is_that_of_tfds_own_writer(tmp_path, name):
    """What TFDS writes where it sorts in memory, which needs no TensorFlow."""
    import tensorflow_datasets as tfds

    content = helpers.content(name)
    base = tfds.builder_cls(name)
    stock_name = name

    class Stock(base, skip_registration=True):
        name = stock_name

        def _split_generators(self, dl_manager):
            for key, names in content.names.items():
                self.info.features[key].names = list(names)
            return {split: self._stock(split) for split in content.images}

        def _stock(self, split):
            for index in range(helpers.SIZES[split]):
                yield index, cifar.examples(content, split=split).read(index)

        def _log_download_bytes(self):
            pass

        def _log_download_done(self):
            pass

    builder = Stock(data_dir=tmp_path / "stock")
    with prepare._quiet_tfds():
        builder.download_and_prepare(
            file_format="array_record",
            download_config=tfds.download.DownloadConfig(try_download_gcs=False),
        )
    path, layout = helpers.small_archive(tmp_path, name, data=content)
    made = helpers.make(tmp_path / "data", archive_path=path, layout=layout, name=name)
    for split in helpers.SIZES:
        ids = [
            [example["id"] for example in found.as_data_source(split)]
            for found in (builder, tfds.builder_from_directory(made))
        ]
        assert ids[0] == ids[1]
    mine, theirs = (
        sorted(p.name for p in pathlib.Path(d).iterdir()) for d in (made, builder.data_dir)
    )
    assert mine == theirs


def test_preparing_changes_nothing_in_tfds(tmp_path):
    path, layout = helpers.small_archive(tmp_path)
    helpers.make(tmp_path / "data", archive_path=path, layout=layout)
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.utils import tqdm_utils

    stock = tfds.builder_cls("cifar10")
    assert stock.__name__ == "Cifar10"
    assert stock is tfds.image_classification.cifar.Cifar10
    assert tqdm_utils._active


def test_the_order_does_not_depend_on_how_it_was_prepared(tmp_path):
    found = []
    for binary in (True, False):
        path, layout = helpers.small_archive(tmp_path, binary=binary)
        arrays, _ = helpers.read(
            helpers.make(tmp_path / str(binary), archive_path=path, layout=layout)
        )
        splits = [dataset.canonical(*arrays[split]) for split in ("train", "test")]
        found.append(dataset.fingerprint(*splits))
    content = helpers.content("cifar10")
    direct = [
        dataset.canonical(content.images[s], content.labels[s]["label"]) for s in content.images
    ]
    assert found == [dataset.fingerprint(*direct)] * 2


@pytest.mark.parametrize("damage", ["truncated", "foreign", "absent"])
def test_a_wrong_archive_is_refused_before_anything_is_written(tmp_path, damage):
    path, layout = helpers.small_archive(tmp_path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "foreign":
        helpers.write_tar(path, {"photo.png": b"png"})
        layout = helpers.published(path, layout)
    else:
        path.unlink()
    with pytest.raises(UserError, match=str(path)):
        helpers.make(tmp_path / "data", archive_path=path, layout=layout)
    assert not (tmp_path / "data").exists()


def test_a_folder_in_the_way_is_named(tmp_path):
    path, layout = helpers.small_archive(tmp_path)
    final = tmp_path / "data" / "cifar10" / "3.0.2"
    final.mkdir(parents=True)
    (final / "mine.txt").touch()
    with pytest.raises(UserError, match=f"{final} is there but has no dataset_info.json"):
        helpers.make(tmp_path / "data", archive_path=path, layout=layout)
    (final / "mine.txt").unlink()
    assert helpers.make(tmp_path / "data", archive_path=path, layout=layout) == final


def test_a_failed_preparation_leaves_nothing(tmp_path, monkeypatch):
    path, layout = helpers.small_archive(tmp_path)

    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("PIL.Image.Image.save", full)
        with pytest.raises(UserError, match=r"cannot prepare cifar10 in .*No space left"):
            helpers.make(tmp_path / "data", archive_path=path, layout=layout)
    assert [p.name for p in (tmp_path / "data").iterdir()] == [".cifar10.lock"]
    assert helpers.make(tmp_path / "data", archive_path=path, layout=layout).is_dir()


def test_a_full_disk_is_said_beforehand(tmp_path, monkeypatch):
    path, layout = helpers.small_archive(tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="has 0 MB free; preparing cifar10 takes"):
        helpers.make(tmp_path / "data", archive_path=path, layout=layout)


PROCESS = """
    import pathlib, time
    from tests import test_data_helpers as helpers
    from resnet_flax.data import cifar, prepare
    path = pathlib.Path({path!r})
    layout = helpers.published(path, helpers.layout_of("cifar10", binary=True))
    original = prepare.prepare
    def slow(*arguments, staging, **keywords):
        (staging / "left").write_text("over")
        print("preparing", flush=True)
        while {wait} and not path.with_name("go").exists():
            time.sleep(0.02)
        return original(*arguments, staging=staging, **keywords)
    prepare.prepare = slow
    cifar.make("cifar10", data_dir=pathlib.Path({root!r}), archive_path=path, mirror=None,
               show_progress=True, sizes=helpers.SIZES, layouts={{"cifar10": (layout,)}})
"""


def start(path, root, *, wait):
    code = PROCESS.format(path=str(path), root=str(root), wait=wait)
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=pathlib.Path(__file__).resolve().parents[1],
    )


def test_a_second_process_waits_for_the_first(tmp_path):
    path, _ = helpers.small_archive(tmp_path)
    with start(path, tmp_path / "data", wait=True) as first:
        assert first.stdout.readline() == "preparing\n"
        with start(path, tmp_path / "data", wait=False) as second:
            said = second.stderr.readline()
            path.with_name("go").touch()
            out, err = second.communicate(timeout=120)
        assert first.wait(120) == second.returncode == 0, err
    assert out == ""  # It found what the first had prepared.
    assert "Another process prepares cifar10" in said
    helpers.read(tmp_path / "data" / "cifar10" / "3.0.2")


def test_what_another_process_has_just_finished_is_taken(tmp_path):
    path, layout = helpers.small_archive(tmp_path)
    # Both have looked, and found nothing; then each prepares it.
    made = [helpers.make(tmp_path / "data", archive_path=path, layout=layout) for _ in range(2)]
    assert made[0] == made[1]
    helpers.read(made[1])


def test_what_a_killed_process_left_is_removed(tmp_path):
    path, layout = helpers.small_archive(tmp_path)
    root = tmp_path / "data"
    with start(path, root, wait=True) as process:
        assert process.stdout.readline() == "preparing\n"
        process.send_signal(signal.SIGKILL)
    assert (root / ".cifar10.preparing" / "left").is_file()
    foreign = root / "cifar10" / "incomplete.ABCDEF_3.0.2"  # Another program may be at work.
    foreign.mkdir(parents=True)
    assert prepared.find("cifar10", data_dir=root, version="3.0.2") is None
    helpers.read(helpers.make(root, archive_path=path, layout=layout))
    assert sorted(os.listdir(root)) == [".cifar10.lock", "cifar10"]
    assert foreign.is_dir()


def test_without_locks_each_process_prepares_for_itself(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with prepare.exclusive(tmp_path, name="cifar10", show_progress=False) as staging:
        monkeypatch.setattr(os, "getpid", lambda: 2)
        path, layout = helpers.small_archive(tmp_path)
        first = helpers.make(tmp_path, archive_path=path, layout=layout)
        content = helpers.content("cifar10")
        second = prepare.prepare(
            "cifar10",
            splits={split: cifar.examples(content, split=split) for split in content.images},
            names=content.names,
            data_dir=tmp_path,
            staging=staging,
            show_progress=False,
        )
        assert first == second
    helpers.read(first)
    assert sorted(os.listdir(tmp_path)) == [".cifar10.lock", path.name, "cifar10"]
