import dataclasses
import hashlib
import io
import itertools
import json
import multiprocessing
import pathlib
import pickle
import shutil
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from resnet_flax import data
from resnet_flax.data import imagenet, streaming, tfds_files
from resnet_flax.errors import UserError

SYNSETS = ("n02105855", "n01440764", "n03018349")  # Not in the order of the alphabet.
NUMBERS = {"n01440764": [10, 2, 7, 31], "n02105855": [2933, 5, 6], "n03018349": [4028, 1]}
SEVEN = "n01440764_7.JPEG"
VALIDATION = (2, 0, 1, 1, 0)
SIZES = {"train": 9, "validation": 5}


def picture(seed, kind="JPEG", mode="RGB"):
    y, x = np.mgrid[: 20 + seed % 7, :24]
    image = Image.fromarray(np.stack([x * 9, y * 8, (x + y + seed) % 200], -1).astype(np.uint8))
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, kind, quality=90)
    return buffer.getvalue()


def files_of(split):
    """Images by name, in the order of the archive."""
    if split == "validation":
        return {f"ILSVRC2012_val_{n:08d}.JPEG": picture(n) for n in (5, 4, 3, 2, 1)}
    files = {f"{s}_{n}.JPEG": picture(n) for s, numbers in NUMBERS.items() for n in numbers}
    # A few of the real ones are no ordinary JPEG.
    files["n03018349_4028.JPEG"] = picture(4028, mode="CMYK")
    files["n02105855_2933.JPEG"] = picture(2933, "PNG")
    return files


def label_of(name):
    first, *_, last = name.removesuffix(".JPEG").split("_")
    return SYNSETS.index(first) if first in SYNSETS else VALIDATION[int(last) - 1]


def in_order(split):
    """Names in the order of TFDS: by the md5 of the split's name and the file's."""
    return sorted(files_of(split), key=lambda n: hashlib.md5((split + n).encode()).hexdigest())


def tar_of(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def archive_of(split, changes=(), reverse=False):
    """An archive with some files replaced, added, or left out where the replacement is empty."""
    changed = (files_of(split) | dict(changes)).items()
    files = sorted(((name, content) for name, content in changed if content), reverse=reverse)
    if split == "validation":
        return tar_of(files)
    classes = itertools.groupby(files, lambda file: file[0].partition("_")[0])
    return tar_of((f"{synset}.tar", tar_of(inner)) for synset, inner in classes)


@pytest.fixture
def archives(tmp_path):
    folder = tmp_path / "archives"
    folder.mkdir()
    for split, name in imagenet.ARCHIVES.items():
        (folder / name).write_bytes(archive_of(split))
    return folder


@pytest.fixture(autouse=True)
def _small(monkeypatch, tmp_path_factory):
    """Makes an ImageNet of three classes out of TFDS's of a thousand."""
    import tensorflow_datasets as tfds

    lists = tmp_path_factory.mktemp("lists")
    (lists / "labels.txt").write_text("\n".join(SYNSETS) + "\n")
    lines = [SYNSETS[label] for label in VALIDATION]
    (lists / "validation_labels.txt").write_text("\n".join(lines) + "\n")
    original = tfds.core.tfds_path

    def tfds_path(*parts):
        path = lists / pathlib.PurePath(*parts).name
        return path if path.exists() else original(*parts)

    monkeypatch.setattr(tfds.core, "tfds_path", tfds_path)
    monkeypatch.setattr(imagenet, "SIZES", SIZES)
    monkeypatch.setattr(imagenet, "CLASSES", 3)


@pytest.fixture
def prepared(tmp_path):
    """The directory of a version that TFDS wrote."""
    examples = {
        split: (
            (name, {"image": content, "label": label_of(name), "file_name": name})
            for name, content in files_of(split).items()
        )
        for split in SIZES
    }
    version, place = imagenet.VERSION, tmp_path / "data"
    return tfds_files.prepare(
        imagenet.NAME, version=version, data_dir=place, obtain=lambda: (examples, {})
    )


def load(data_dir, archives=None):
    data_dir.mkdir(exist_ok=True)
    found = imagenet.load(data_dir, archives, None)
    return found.train.source, found.test.source, found.class_names, found.fingerprint


@pytest.mark.parametrize("kind", ["archives", "prepared"])
def test_both_kinds_hold_the_same_in_the_same_order(tmp_path, request, kind, capfd):
    place, data_dir = request.getfixturevalue(kind), tmp_path / "data"
    archive = place if kind == "archives" else None
    *sources, names, fingerprint = load(data_dir, archive)
    assert names == SYNSETS
    for split, source in zip(SIZES, sources, strict=True):
        files, order = files_of(split), in_order(split)
        assert len(source) == len(order)
        assert source.labels.tolist() == [label_of(name) for name in order]
        assert source.labels.dtype == np.int32
        for index in reversed(range(len(order))):
            name = order[index]
            assert source.read(index) == (files[name], label_of(name))
            assert source.name(index).startswith(name)
            assert str(place) in source.name(index)
        with pytest.raises(IndexError if kind == "archives" else OSError, match="."):
            source.read(len(source))
    geometry = streaming.Geometry(16, (16, 20), 18, 18)
    dataset = data.load(
        imagenet.NAME, data_dir=data_dir, archive=archive, split="45k/5k", geometry=geometry
    )
    assert dataset.fingerprint == fingerprint
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (6, 3, 5)
    for split in dataset.train, dataset.validation, dataset.test:
        for index in range(len(split)):  # The CMYK and the PNG, too.
            assert split.example(index, np.random.RandomState(0))[0].shape == split.image_shape
    assert capfd.readouterr() == ("", "")
    assert any(data_dir.iterdir()) == (kind == "prepared")


def test_archives_are_found_where_tfds_looks_for_them(tmp_path, archives):
    fingerprint = load(tmp_path / "data", archives)[3]
    manual = tmp_path / "data" / "downloads" / "manual"
    shutil.copytree(archives, manual)
    assert load(tmp_path / "data")[3] == fingerprint


def test_archives_are_indexed_once(tmp_path, archives, monkeypatch):
    monkeypatch.setenv("RESNET_FLAX_CACHE", str(tmp_path / "cache"))
    first, *_ = load(tmp_path / "data", archives)
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", None)
        second, *_ = load(tmp_path / "data", archives)
    assert second.name(3) == first.name(3)
    (archives / "ILSVRC2012_img_train.tar").write_bytes(b"something else")
    with pytest.raises(UserError, match="is truncated, or not ILSVRC2012_img_train.tar"):
        load(tmp_path / "data", archives)


def child(source, index):
    return source.read(index), source.labels.tolist(), "tensorflow" in sys.modules


@pytest.mark.parametrize("kind", ["archives", "prepared"])
def test_a_source_is_sent_to_another_process(tmp_path, request, kind):
    place = request.getfixturevalue(kind)
    source, *_ = load(tmp_path / "data", place if kind == "archives" else None)
    expected = source.read(3), source.labels.tolist()
    assert len(pickle.dumps(source)) < 1_000  # No open files.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        *found, tensorflow = pool.apply(child, (source, 3))
    assert tuple(found) == expected
    assert not tensorflow
    assert "tensorflow" not in sys.modules


def test_the_fingerprint_is_of_what_was_prepared_and_not_of_where(prepared, tmp_path):
    *_, original = load(prepared)
    (tmp_path / "copy").mkdir()
    shutil.copytree(prepared.parent, tmp_path / "copy" / "imagenet2012")
    assert load(tmp_path / "copy")[3] == original
    path = tmp_path / "copy" / "imagenet2012" / "5.1.0" / "dataset_info.json"
    info = json.loads(path.read_text())
    splits = {
        split["name"]: [[int(n) for n in split["shardLengths"]], int(split["numBytes"])]
        for split in info["splits"]
    }
    content = {"name": "imagenet2012", "version": "5.1.0", "splits": splits}
    text = json.dumps(content, sort_keys=True).encode()
    assert original == hashlib.sha256(text).hexdigest()
    info["splits"][0]["numBytes"] = "1"
    path.write_text(json.dumps(info))
    assert load(tmp_path / "copy")[3] != original


def test_the_fingerprint_of_archives_is_of_names_and_sizes(tmp_path, archives):
    *_, original = load(tmp_path / "data", archives)
    digest = hashlib.sha256()
    for split in SIZES:
        lines = [f"{n} {len(files_of(split)[n])} {label_of(n)}\n" for n in in_order(split)]
        digest.update(hashlib.sha256((split + "".join(lines)).encode()).digest())
    assert original == digest.hexdigest()
    path = archives / "ILSVRC2012_img_train.tar"
    path.write_bytes(archive_of("train", reverse=True))
    assert load(tmp_path / "data", archives)[3] == original
    path.write_bytes(archive_of("train", {SEVEN: picture(7) + b"?"}))
    assert load(tmp_path / "data", archives)[3] != original


def test_tfds_own_lists(monkeypatch):
    monkeypatch.undo()
    synsets = imagenet._tfds_lines("labels.txt")
    labels = imagenet._tfds_lines("validation_labels.txt")
    assert len(synsets) == len(set(synsets)) == imagenet.CLASSES == 1000
    assert synsets[:2] == ("n01440764", "n01443537")
    assert len(labels) == imagenet.SIZES["validation"] == 50_000
    assert labels[0] == "n01751748"
    assert {labels.count(synset) for synset in synsets} == {50}


def test_absent_data_and_archives_are_named(tmp_path, archives):
    data_dir = tmp_path / "data"
    train, validation = imagenet.ARCHIVES.values()
    (archives / validation).unlink()
    cases = (None, train), ("/no/such", train), (archives / train, train), (archives, validation)
    for folder, file in cases:
        place = folder or data_dir / "downloads" / "manual"
        message = f"no prepared imagenet2012 in {data_dir} and no {file} in {place}.\n"
        with pytest.raises(UserError, match=f"{message}.*{train} and {validation}.*image-net.org"):
            load(data_dir, folder)


TRAIN, VAL = archive_of("train"), archive_of("validation")
EIGHT = "n01440764_8.JPEG"
WRONG = {
    "cut in the middle": ("train", TRAIN[:9000], "unexpected end of data"),
    "cut in an image": ("train", TRAIN[:1600], "unexpected end of data"),
    "cut in a validation image": ("validation", VAL[:1000], "unexpected end of data"),
    "cut between images": ("validation", VAL[:2000], "it has 1 images, not 5"),
    "text": ("train", b"<html>Please log in</html>" * 99, "or not ILSVRC2012_img_train.tar"),
    "empty": ("train", b"", "It has 0 bytes, the published one 147,897,477,120"),
    "another class": ("train", archive_of("train", {"n9_1.JPEG": b"1"}), "n9_1.JPEG does not bel"),
    "too few": ("train", archive_of("train", {SEVEN: None}), "it has 8 images, not 9"),
    "too many": ("train", archive_of("train", {EIGHT: b"1"}), "it has 10 images, not 9"),
    "twice": ("validation", tar_of([*files_of("validation").items()] * 2), "or is there twice"),
    "the other archive": ("train", VAL, "ILSVRC2012_val_00000001.JPEG in it: "),
    "the other archive, too": ("validation", TRAIN, "n01440764.tar does not belong there"),
    "no tar inside": ("train", tar_of([("n01440764.tar", b"?")]), "n01440764.tar in it: "),
}


@pytest.mark.parametrize("damage", WRONG)
def test_a_wrong_archive_is_refused(tmp_path, archives, damage):
    split, content, message = WRONG[damage]
    (archives / imagenet.ARCHIVES[split]).write_bytes(content)
    with pytest.raises(UserError, match=f"the archive {archives}.*\n.*download it") as caught:
        load(tmp_path / "data", archives)
    assert message in str(caught.value)


def test_an_archive_that_is_cut_off_later(tmp_path, archives):
    train, *_ = load(tmp_path / "data", archives)
    last = int(train.offsets.argmax())
    train.path.write_bytes(train.path.read_bytes()[: train.offsets[last] + 5])
    with pytest.raises(OSError, match="ends within the image"):
        train.read(last)
    train.path.write_bytes(b"")
    assert train.name(last) == f"example {last} in {train.path}"
    gone = dataclasses.replace(train, path=tmp_path / "gone")
    with pytest.raises(OSError, match="gone"):
        gone.read(0)


def test_damage_after_preparing(prepared, tmp_path, monkeypatch):
    (path,) = prepared.glob("imagenet2012-train.array_record*")
    train, *_ = load(tmp_path / "data")
    content = path.read_bytes()
    path.write_bytes(content[:100] + b"\xff" * (len(content) - 100))
    with pytest.raises(OSError, match=".") as caught:
        train.read(0)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=f"cannot read the labels of 'train' in {prepared}: "):
        _ = train.labels
    assert train.name(2) == f"example 2 of 'train' in {prepared}"
    path.unlink()
    with pytest.raises(UserError, match=f"1 of the 2 files of {prepared} are not there"):
        load(tmp_path / "data")
    path.write_bytes(content)
    monkeypatch.setattr(imagenet, "CLASSES", 2)
    with pytest.raises(UserError, match="of 3 classes; imagenet2012 has .* of 2"):
        load(tmp_path / "data")
