import hashlib
import io
import json
import multiprocessing
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap

import numpy as np
import pytest
from PIL import Image

from resnet_flax.data import imagenet, imagenet_archive, prepared
from resnet_flax.errors import UserError

SYNSETS = ("n02105855", "n01440764", "n03018349")  # Not in the order of the alphabet.
IMAGES = {"n01440764": [10, 2, 7, 31], "n02105855": [2933, 5, 6], "n03018349": [4028, 1]}
CMYK, PNG, GREY = "n03018349_4028.JPEG", "n02105855_2933.JPEG", "n01440764_7.JPEG"
VALIDATION = (2, 0, 1, 1, 0)


def picture(seed):
    y, x = np.mgrid[: 20 + seed % 7, :24]
    return Image.fromarray(np.stack([x * 9, y * 8, (x + y + seed) % 200], -1).astype(np.uint8))


def encode(image, kind="JPEG"):
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=90)
    return buffer.getvalue()


def train_files():
    """The content of the archive of the training set: for each synset, files by name."""
    result = {}
    for synset, numbers in IMAGES.items():
        result[synset] = {}
        for number in numbers:
            name, image = f"{synset}_{number}.JPEG", picture(number)
            content = {
                CMYK: lambda i: encode(i.convert("CMYK")),
                PNG: lambda i: encode(i, "PNG"),
                GREY: lambda i: encode(i.convert("L")),
            }.get(name, encode)(image)
            result[synset][name] = content
    return result


def files_by_name():
    return {name: content for inner in train_files().values() for name, content in inner.items()}


def validation_files():
    names = [f"ILSVRC2012_val_{index + 1:08d}.JPEG" for index in range(len(VALIDATION))]
    contents = {name: encode(picture(index + 50)) for index, name in enumerate(names)}
    return {name: contents[name] for name in reversed(names)}  # Not in order in the archive.


def tar_of(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def train_tar(files):
    return tar_of({f"{synset}.tar": tar_of(inner) for synset, inner in files.items()})


def write_archives(folder, *, train=None, validation=None):
    folder.mkdir(parents=True, exist_ok=True)
    train = train_tar(train_files()) if train is None else train
    validation = tar_of(validation_files()) if validation is None else validation
    (folder / "ILSVRC2012_img_train.tar").write_bytes(train)
    (folder / "ILSVRC2012_img_val.tar").write_bytes(validation)
    return folder


def make_small(setattr_, folder):
    """Makes an ImageNet of three classes out of TFDS's of a thousand."""
    import tensorflow_datasets as tfds

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "labels.txt").write_text("\n".join(SYNSETS) + "\n")
    lines = [SYNSETS[label] for label in VALIDATION]
    (folder / "validation_labels.txt").write_text("\n".join(lines) + "\n")
    original = tfds.core.tfds_path

    def tfds_path(*parts):
        path = pathlib.PurePath(*parts)
        if path.parent == pathlib.PurePath("datasets/imagenet2012") and path.suffix == ".txt":
            replaced = folder / path.name
            return replaced if replaced.exists() else original(*parts)
        return original(*parts)

    setattr_(tfds.core, "tfds_path", tfds_path)
    setattr_(imagenet, "SIZES", {"train": 9, "validation": 5})
    setattr_(imagenet, "CLASSES", 3)


@pytest.fixture
def small(monkeypatch, tmp_path):
    make_small(monkeypatch.setattr, tmp_path / "lists")


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """A prepared ImageNet of three classes, to be copied by whoever changes it."""
    folder = tmp_path_factory.mktemp("imagenet")
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch.setattr, folder / "lists")
        write_archives(folder / "archives")
        made = imagenet.make(
            data_dir=folder / "data", archives=folder / "archives", show_progress=False
        )
    assert made == folder / "data" / "imagenet2012" / "5.1.0"
    return folder / "data"


def load(data_dir, archives=None):
    data_dir.mkdir(exist_ok=True)
    return imagenet.load(data_dir=data_dir, archives=archives, show_progress=False)


def tfds_order(split, names):
    """TFDS's: by the md5 of the split's name and the key."""
    return sorted(names, key=lambda name: hashlib.md5((split + name).encode()).hexdigest())


@pytest.mark.usefixtures("small")
def test_preparing_from_the_archives_and_reading(tmp_path, capfd):
    archives = write_archives(tmp_path / "archives")
    train, test, names, fingerprint = load(tmp_path / "data", str(archives))
    assert names == SYNSETS
    assert (len(train), len(test)) == (9, 5)
    files = files_by_name()
    order = tfds_order("train", files)
    for index, name in enumerate(order):
        content, label = train.read(index)
        assert train.name(index).startswith(f"{name} (example {index} of 'train' in ")
        assert label == SYNSETS.index(name.split("_")[0])
        if name in (CMYK, PNG):
            assert content != files[name]
            with Image.open(io.BytesIO(content)) as image:
                assert (image.format, image.mode) == ("JPEG", "RGB")
                original = picture(int(name.split("_")[1].split(".")[0]))
                assert image.size == original.size
                difference = np.abs(np.asarray(image).astype(int) - np.asarray(original))
                assert difference.mean() < 6
        else:
            assert content == files[name]
    labels = train.labels()
    assert labels.dtype == np.int32
    assert labels.tolist() == [SYNSETS.index(name.split("_")[0]) for name in order]
    files = validation_files()
    order = tfds_order("validation", files)
    assert [test.read(index)[0] for index in range(5)] == [files[name] for name in order]
    numbers = [int(name.split("_")[2].split(".")[0]) - 1 for name in order]
    assert test.labels().tolist() == [VALIDATION[number] for number in numbers]
    root = tmp_path / "data"
    assert sorted(p.name for p in root.iterdir()) == [".imagenet2012.lock", "imagenet2012"]
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    shutil.rmtree(archives)  # They are not needed again.
    assert load(root)[3] == fingerprint


@pytest.mark.usefixtures("small")
def test_stock_tfds_reads_it(ready):
    import tensorflow_datasets as tfds

    stock = tfds.builder_cls("imagenet2012")
    for builder in (
        tfds.builder("imagenet2012", data_dir=ready),
        tfds.builder_from_directory(ready / "imagenet2012" / "5.1.0"),
    ):
        assert builder.info.full_name == "imagenet2012/5.1.0"
        assert builder.info.supervised_keys == ("image", "label")
        expected = stock(data_dir="/nowhere").info.features
        assert repr(builder.info.features) == repr(expected)
        assert builder.info.features["image"].encoding_format == "jpeg"
        assert builder.info.features["label"].names == list(SYNSETS)
        assert set(builder.info.splits) == {"train", "validation"}
        found = {e["file_name"].decode(): e for e in builder.as_data_source("train")}
        assert set(found) == set(files_by_name())
        for name, example in found.items():
            assert example["label"] == SYNSETS.index(name.split("_")[0])
            expected = np.asarray(picture(int(name.split("_")[1].split(".")[0])).convert("RGB"))
            if name != GREY:
                assert np.abs(example["image"].astype(int) - expected).mean() < 6
        assert len(builder.as_data_source("validation")) == 5
    info = json.loads((ready / "imagenet2012" / "5.1.0" / "dataset_info.json").read_text())
    assert info["moduleName"] == stock.__module__


@pytest.mark.usefixtures("small")
def test_many_files_are_those_tfds_would_write(tmp_path, monkeypatch):
    from tensorflow_datasets.core.utils import shard_utils

    # With files of 64 MiB to 1 GiB, 1024 and 64 as in TFDS's own.
    number = shard_utils.ShardConfig().get_number_shards
    assert number(146_000_000_000, 1_281_167) == 1024
    assert number(6_700_000_000, 50_000) == 64
    monkeypatch.setattr(shard_utils.ShardConfig, "min_shard_size", 1_000)
    monkeypatch.setattr(shard_utils.ShardConfig, "max_shard_size", 4_000)
    train, *_ = load(tmp_path / "data", write_archives(tmp_path / "archives"))
    folder = tmp_path / "data" / "imagenet2012" / "5.1.0"
    info = json.loads((folder / "dataset_info.json").read_text())
    lengths = [int(length) for length in info["splits"][0]["shardLengths"]]
    assert lengths == [2, 2, 3, 2]  # round(9 * i / 4) are the ends.
    assert len(list(folder.glob("imagenet2012-train.array_record-0000?-of-00004"))) == 4
    found = [train.name(index).split(" ")[0] for index in range(9)]
    assert found == tfds_order("train", files_by_name())


def child(source, index):
    return source.read(index), source.labels().tolist(), "tensorflow" in sys.modules


@pytest.mark.usefixtures("small")
def test_a_source_is_sent_to_another_process(ready):
    train, *_ = load(ready)
    expected = train.read(3), train.labels().tolist()
    pickled = pickle.dumps(train)
    assert len(pickled) < 1_000  # Neither open files nor labels.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        *found, tensorflow = pool.apply(child, (train, 3))
    assert tuple(found) == expected
    assert not tensorflow
    assert "tensorflow" not in sys.modules


@pytest.mark.usefixtures("small")
def test_the_fingerprint_is_of_what_was_prepared_and_not_of_where(ready, tmp_path):
    original = load(ready)[3]
    shutil.copytree(ready, tmp_path / "copy")
    assert load(tmp_path / "copy")[3] == original
    assert load(tmp_path / "copy" / "imagenet2012" / "5.1.0")[3] == original
    path = tmp_path / "copy" / "imagenet2012" / "5.1.0" / "dataset_info.json"
    info = json.loads(path.read_text())
    splits = {
        split["name"]: [[int(n) for n in split["shardLengths"]], int(split["numBytes"])]
        for split in info["splits"]
    }
    content = {"name": "imagenet2012", "version": "5.1.0", "splits": splits}
    text = json.dumps(content, sort_keys=True)
    assert original == hashlib.sha256(text.encode()).hexdigest()
    info["splits"][0]["numBytes"] = "1"
    path.write_text(json.dumps(info))
    assert load(tmp_path / "copy")[3] != original


def test_tfds_own_lists():
    synsets, labels = imagenet._lines("labels.txt"), imagenet._lines("validation_labels.txt")
    assert len(synsets) == len(set(synsets)) == imagenet.CLASSES == 1000
    assert synsets[:2] == ("n01440764", "n01443537")
    assert len(labels) == imagenet.SIZES["validation"] == 50_000
    assert labels[0] == "n01751748"
    assert {labels.count(synset) for synset in synsets} == {50}


def test_neither_data_nor_archives(tmp_path):
    with pytest.raises(UserError, match=f"no prepared imagenet2012 in {tmp_path}") as caught:
        load(tmp_path)
    message = str(caught.value)
    for text in ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "image-net.org"):
        assert text in message
    assert "--config.data.archive=FOLDER" in message
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_place_for_archives_is_named(tmp_path):
    data = tmp_path / "data"
    with pytest.raises(UserError, match="no/such', which is not there; it must be the folder"):
        load(data, "/no/such")
    folder = write_archives(tmp_path / "archives")
    with pytest.raises(UserError, match="which is a file; it must be the folder that holds"):
        load(data, folder / "ILSVRC2012_img_train.tar")
    (folder / "ILSVRC2012_img_val.tar").unlink()
    with pytest.raises(UserError, match=f"ILSVRC2012_img_val.tar is not in {folder}"):
        load(data, folder)
    assert not any(data.iterdir())


@pytest.mark.usefixtures("small")
def test_archives_are_found_where_tfds_looks_for_them(tmp_path):
    write_archives(tmp_path / "downloads" / "manual")
    assert len(load(tmp_path)[0]) == 9


def changed(synset, **files):
    result = train_files()
    result[synset] = {**result.get(synset, {}), **files}
    return result


def without(synset, *, name=None):
    result = train_files()
    if name is None:
        del result[synset]
    else:
        del result[synset][name]
    return result


JPEG = b"\xff\xd8\xff not really"
DAMAGES = {
    "cut in the middle": (lambda: train_tar(train_files())[:9000], "unexpected end of data"),
    "cut in an image": (lambda: train_tar(train_files())[:1600], "unexpected end of data"),
    "cut between classes": (
        lambda: tar_of({"n01440764.tar": tar_of(train_files()["n01440764"])}),
        "it holds no n02105855.tar",
    ),
    "text": (lambda: b"<html>Please log in</html>" * 99, "truncated, or not ILSVRC2012_img_tr"),
    "empty": (lambda: b"", "It has 0 bytes, the published one 147,897,477,120"),
    "a class is missing": (lambda: train_tar(without("n03018349")), "it holds no n03018349.tar"),
    "another class": (lambda: train_tar(changed("n09999999", a=b"1")), "it holds n09999999.tar"),
    "an image is missing": (
        lambda: train_tar(without("n01440764", name=GREY)),
        "it has 8 images, not 9",
    ),
    "an image too many": (
        lambda: train_tar(changed("n01440764", **{"n01440764_99.JPEG": JPEG})),
        "it has 10 images, not 9",
    ),
    "of another class": (
        lambda: train_tar(changed("n01440764", **{"n03018349_1.JPEG": JPEG})),
        "n01440764.tar holds n03018349_1.JPEG",
    ),
    "the validation set": (lambda: tar_of(validation_files()), "it holds ILSVRC2012_val_0000"),
    "no tar inside": (
        lambda: tar_of({"n01440764.tar": b"abc" * 999}),
        "n01440764.tar in it: ",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.usefixtures("small")
def test_a_wrong_train_archive_is_refused(tmp_path, damage):
    make, message = DAMAGES[damage]
    archives = write_archives(tmp_path / "archives", train=make())
    with pytest.raises(UserError, match=str(archives)) as caught:
        load(tmp_path / "data", archives)
    assert message in str(caught.value)
    assert "download it again" in str(caught.value)
    assert [p.name for p in (tmp_path / "data").iterdir()] == [".imagenet2012.lock"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tar_of(validation_files())[:2000], "it has 1 images, not 5"),
        (lambda: tar_of(validation_files())[:1000], "unexpected end of data"),
        (lambda: tar_of(dict(list(validation_files().items())[1:])), "it has 4 images, not 5"),
        (lambda: tar_of({**validation_files(), "n01.JPEG": JPEG}), "it holds n01.JPEG"),
        (lambda: train_tar(train_files()), "it holds n01440764.tar"),
        (lambda: tar_of(dict.fromkeys(validation_files(), b"")), "not a plain file, or is empty"),
    ],
)
@pytest.mark.usefixtures("small")
def test_a_wrong_validation_archive_is_refused(tmp_path, make, message):
    archives = write_archives(tmp_path / "archives", validation=make())
    with pytest.raises(UserError, match="6,744,924,160; download it again") as caught:
        load(tmp_path / "data", archives)
    assert message in str(caught.value)
    assert [p.name for p in (tmp_path / "data").iterdir()] == [".imagenet2012.lock"]


@pytest.mark.usefixtures("small")
def test_an_image_that_is_there_twice_is_refused(tmp_path):
    files = train_files()
    inner = tar_of(without("n01440764", name=GREY)["n01440764"])
    end = len(inner) - inner.rindex(b"\xff\xd9")  # What comes after the last image.
    tars = {f"{synset}.tar": tar_of(content) for synset, content in files.items()}
    one = tar_of({"n01440764_2.JPEG": files["n01440764"]["n01440764_2.JPEG"]})
    header = inner[: len(inner) - end + 2]
    tars["n01440764.tar"] = header + b"\0" * (-len(header) % 512) + one
    archives = write_archives(tmp_path / "archives", train=tar_of(tars))
    with pytest.raises(UserError, match="it has 1 images twice"):
        load(tmp_path / "data", archives)


@pytest.mark.parametrize("content", [JPEG, b"text", encode(picture(1), "PNG")[:60]])
@pytest.mark.usefixtures("small")
def test_a_broken_image_is_named_and_nothing_is_left(tmp_path, content):
    train = train_tar(changed("n01440764", **{"n01440764_31.JPEG": content}))
    archives = write_archives(tmp_path / "archives", train=train)
    with pytest.raises(UserError, match="cannot read n01440764_31.JPEG in .*train.tar: it "):
        load(tmp_path / "data", archives)
    assert [p.name for p in (tmp_path / "data").iterdir()] == [".imagenet2012.lock"]


@pytest.mark.usefixtures("small")
def test_a_full_disk_is_said_beforehand(tmp_path, monkeypatch):
    archives = write_archives(tmp_path / "archives")
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="has 0 MB free; preparing imagenet2012 takes"):
        load(tmp_path / "data", archives)


KILLED = """
    import pathlib, time
    from resnet_flax.data import imagenet, imagenet_archive
    from tests import test_data_imagenet as helpers
    folder = pathlib.Path({folder!r})
    helpers.make_small(setattr, folder / "lists")
    original, count = imagenet_archive.Archive.read, [0]
    def slow(*arguments):
        count[0] += 1
        if count[0] == 12:  # The training set is written, and part of the validation set.
            print("half", flush=True)
            time.sleep(60)
        return original(*arguments)
    imagenet_archive.Archive.read = slow
    helpers.load(folder / "data", folder / "archives")
"""


@pytest.mark.usefixtures("small")
def test_a_killed_preparation_passes_for_nothing(tmp_path):
    write_archives(tmp_path / "archives")
    code = textwrap.dedent(KILLED.format(folder=str(tmp_path)))
    root = pathlib.Path(__file__).resolve().parents[1]
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root
    ) as process:
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
    data = tmp_path / "data"
    assert list((data / ".imagenet2012.preparing").rglob("*array_record*"))
    assert prepared.find("imagenet2012", data_dir=data, version="5.1.0") is None
    with pytest.raises(UserError, match="there is no prepared imagenet2012"):
        load(data)
    assert load(data, tmp_path / "archives")[0].labels().shape == (9,)
    assert sorted(p.name for p in data.iterdir()) == [".imagenet2012.lock", "imagenet2012"]


@pytest.mark.usefixtures("small")
def test_something_else_in_its_place_is_named(tmp_path):
    archives = write_archives(tmp_path / "archives")
    final = tmp_path / "data" / "imagenet2012" / "5.1.0"
    final.mkdir(parents=True)
    (final / "mine.txt").touch()
    with pytest.raises(UserError, match=f"{final} is there but has no dataset_info.json"):
        load(tmp_path / "data", archives)


@pytest.mark.usefixtures("small")
def test_damage_after_preparing(ready, tmp_path, monkeypatch):
    shutil.copytree(ready, tmp_path / "data")
    folder = tmp_path / "data" / "imagenet2012" / "5.1.0"
    (path,) = folder.glob("imagenet2012-train.array_record*")
    train, *_ = load(tmp_path / "data")
    for index in (-1, 9):
        with pytest.raises(IndexError, match="of 9 examples"):
            train.read(index)
    content = path.read_bytes()
    path.write_bytes(content[:100] + b"\xff" * (len(content) - 100))
    with pytest.raises(OSError, match=".") as caught:
        train.read(0)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=f"cannot read the labels of 'train' in {folder}: .*\nDele"):
        train.labels()
    assert train.name(2) == f"example 2 of 'train' in {folder}"
    path.unlink()
    with pytest.raises(UserError, match=f"1 of the 2 files of {folder} are not there"):
        load(tmp_path / "data")
    path.write_bytes(content)
    monkeypatch.setattr(imagenet, "SIZES", {"train": 9, "validation": 6})
    with pytest.raises(UserError, match="'validation' of .* has 5 examples; imagenet2012 has 6"):
        load(tmp_path / "data")
    monkeypatch.setattr(imagenet, "SIZES", {"train": 9, "validation": 5})
    monkeypatch.setattr(imagenet, "CLASSES", 2)
    with pytest.raises(UserError, match="has 3 classes; imagenet2012 has 2"):
        load(tmp_path / "data")
    source = imagenet.Source(folder, split="train", size=9)
    message = r"there is the label 2; those of imagenet2012 are 0..1"
    with pytest.raises(UserError, match=message):
        source.labels()
    wrong = tfds_order("train", files_by_name()).index("n03018349_1.JPEG")
    with pytest.raises(ValueError, match=message):
        source.read(wrong)


def test_an_archive_is_read_in_any_order_and_cut_off_later(tmp_path):
    path = write_archives(tmp_path) / "ILSVRC2012_img_train.tar"
    archive = imagenet_archive.index_train(path, synsets=SYNSETS, size=9, show_progress=False)
    files = files_by_name()
    assert [member.name for member in archive.members] == list(files)
    for index in (8, 0, 5):
        member = archive.members[index]
        assert member.size == len(files[member.name])
        if member.name not in (CMYK, PNG):
            assert archive.read(index) == files[member.name]
    path.write_bytes(path.read_bytes()[: archive.members[8].offset + 5])
    with pytest.raises(UserError, match="n03018349_1.JPEG .*: it ends after 5 of"):
        archive.read(8)
