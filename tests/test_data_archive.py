import codecs
import io
import os
import pickle
import tarfile

import numpy as np
import pytest

from resnet_flax.data import archive, batch_pickle
from resnet_flax.errors import UserError
from tests import test_data_helpers as helpers


class Calls:
    """Pickles to a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(5))
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, protocol):
    witness = tmp_path / "witness"
    data = pickle.dumps({b"data": Calls(os.system, f"touch {witness}")}, protocol)
    with pytest.raises(batch_pickle.RefusedError, match=r"asks for '\w+\.system'"):
        batch_pickle.read(data)
    assert not witness.exists()
    pickle.loads(data)
    assert witness.exists()  # It would have worked.


@pytest.mark.parametrize(
    "value",
    [
        Calls(eval, "1"),
        Calls(codecs.encode, "x", "rot13"),
        Calls(np.dtype, "O"),
        np.array([object()]),
        np.array([1.5]),
        np.zeros((2, 2), np.int16),
        np.float64(1),
        {1, 2},
        1j,
        (1, 2),
        {b"nested": {b"deep": 1}},
        codecs.lookup,
        np.ndarray,
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_whatever_is_no_batch_is_refused(value, protocol):
    with pytest.raises(batch_pickle.RefusedError):
        batch_pickle.read(pickle.dumps({b"data": value}, protocol))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"0.",
        b"no pickle at all",
        b"}",
        b"}q\x00(U\x01aK\x01",
        b"}(K\x01K\x02u.",  # a key that is a number
        b"}}K\x01s.",  # a key that is a dict
        b"}(U\x01au.",  # a key without value
        b"}U\x01ah\x07s.",  # from a memo that is empty
        b"N.",
        b"(.",
        b"cnumpy\nndarray\n.",
        b"cnumpy\ndtype\n(U\x02u1tR.",
        b"}}b.",
        b"}U\x01aI" + b"9" * 10_000 + b"\ns.",
        b"}U\x01aP1\ns.",  # a persistent id
        b"}U\x01a\x82\x01s.",  # an extension
        b"}U\x01a(ios\nsystem\ns.",  # the protocol 0 way of calling
        b"}U\x01a(cos\nsystem\nos.",
    ],
)
def test_a_broken_pickle_is_refused(data):
    with pytest.raises(batch_pickle.RefusedError):
        batch_pickle.read(data)


def test_every_truncation_and_damaged_byte_of_a_pickle_is_survived():
    data = pickle.dumps({b"data": np.arange(6, dtype=np.uint8), b"labels": [1, 2]}, 2)
    for stop in range(len(data)):
        with pytest.raises(batch_pickle.RefusedError):
            batch_pickle.read(data[:stop])
    random = np.random.RandomState(0)
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] = random.randint(256)
        try:
            batch_pickle.read(bytes(damaged))
        except batch_pickle.RefusedError:
            pass


@pytest.mark.parametrize("protocol", range(5))
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_batch_is_read_as_pickle_would(protocol, order):
    pixels = np.asarray(np.random.RandomState(0).randint(0, 256, (7, 5)), np.uint8, order=order)
    batch = {b"data": pixels, "labels": list(range(-3, 300)), b"name": b"\xffa\n'", "none": None}
    found = batch_pickle.read(pickle.dumps(batch, protocol))
    assert found.pop("data").tolist() == pixels.tolist()
    assert found == {"labels": batch["labels"], "name": b"\xffa\n'", "none": None}


def test_a_python_2_pickle_is_read():
    # As Python 2.7 writes cPickle.dumps({'data': numpy.array([[1, 2]], 'u1'), 'labels': [7]}, 2).
    data = (
        b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\n"
        b"q\x04K\x00\x85U\x01b\x87Rq\x05(K\x01K\x01K\x02\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01"
        b"\x87Rq\x07(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x02\x01\x02tbU"
        b"\x06labelsq\x08]q\x09K\x07au."
    )
    found = batch_pickle.read(data)
    assert found["data"].tolist() == [[1, 2]]
    assert found["labels"] == [7]


def test_an_array_of_another_size_than_its_content_is_refused():
    data = pickle.dumps({b"data": np.zeros((2, 3), np.uint8)}, 2)
    assert b"K\x02K\x03\x86" in data
    for shape in (b"K\x02K\x04\x86", b"K\x02J\xff\xff\xff\xff\x86"):
        with pytest.raises(batch_pickle.RefusedError):
            batch_pickle.read(data.replace(b"K\x02K\x03\x86", shape))


@pytest.mark.parametrize(("name", "binary"), helpers.ALL)
@pytest.mark.parametrize("protocol", [0, 2])
def test_both_layouts_hold_the_same(tmp_path, name, binary, protocol):
    data = helpers.content(name)
    path, layout = helpers.small_archive(
        tmp_path, name, binary=binary, protocol=protocol, data=data
    )
    found = archive.read(path, layout=layout, sizes=helpers.SIZES)
    assert found.names == data.names
    for split in helpers.SIZES:
        np.testing.assert_array_equal(found.images[split], data.images[split])
        assert found.labels[split].keys() == data.labels[split].keys()
        for key, values in data.labels[split].items():
            np.testing.assert_array_equal(found.labels[split][key], values)


@pytest.mark.parametrize("binary", [True, False])
def test_a_truncated_archive_is_named(tmp_path, binary):
    path, layout = helpers.small_archive(tmp_path, binary=binary)
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) * 9 // 10):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=rf"{path} is truncated, or not a {layout.file_name}"):
            archive.read(path, layout=layout, sizes=helpers.SIZES)


@pytest.mark.parametrize("binary", [True, False])
def test_a_foreign_tar_is_named(tmp_path, binary):
    layout = helpers.layout_of("cifar10", binary=binary)
    path = helpers.write_tar(tmp_path / "holiday.tar.gz", {"a/photo.png": b"png"})
    with pytest.raises(UserError, match=rf"{path} .*has no {layout.folder}/"):
        archive.read(path, layout=layout, sizes=helpers.SIZES)


def edited(tmp_path, *, binary=True, **changes):
    """An archive with some of its files replaced, or left out where the replacement is None."""
    layout = helpers.layout_of("cifar10", binary=binary)
    files = {**helpers.members(layout, helpers.content("cifar10")), **changes}
    files = {f"{layout.folder}/{name}": data for name, data in files.items() if data is not None}
    return helpers.write_tar(tmp_path / "edited.tar.gz", files), layout


@pytest.mark.parametrize(
    ("file", "data", "message"),
    [
        ("data_batch_3.bin", None, "has no cifar-10-batches-bin/data_batch_3.bin"),
        ("data_batch_3.bin", b"", "a file of 0 bytes is not made of 3073 each"),
        ("data_batch_3.bin", bytes(3074), "a file of 3074 bytes"),
        ("data_batch_3.bin", bytes(3073), "train set has 41 examples, not 50"),
        ("test_batch.bin", bytes(3073 * 21), "test set has 21 examples, not 20"),
        ("test_batch.bin", b"\x0a" * (3073 * 20), "has the label 10 and 10 names"),
        ("batches.meta.txt", b"cat\ndog\n", "and 2 names"),
        ("batches.meta.txt", b"\xff\xfe", "codec can't decode"),
    ],
)
def test_a_wrong_file_in_a_binary_archive_is_named(tmp_path, file, data, message):
    path, layout = edited(tmp_path, **{file: data})
    with pytest.raises(UserError, match=message):
        archive.read(path, layout=layout, sizes=helpers.SIZES)


PIXELS = np.zeros((20, 3072), np.uint8)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({}, "has no 'data'"),
        ({b"data": PIXELS}, "has no 'labels'"),
        ({b"data": b"x", b"labels": [0]}, "not an array"),
        ({b"data": PIXELS[:, 1:], b"labels": [0] * 20}, "3072 columns"),
        ({b"data": PIXELS, b"labels": [0] * 19}, "not a list of one for each"),
        ({b"data": PIXELS, b"labels": [0] * 19 + [-1]}, "not small numbers"),
        ({b"data": PIXELS, b"labels": [0] * 19 + [b"0"]}, "not small numbers"),
        ({b"data": PIXELS, b"labels": [10] * 20}, "has the label 10"),
        ({b"data": PIXELS, b"labels": None}, "not a list"),
        ({b"data": PIXELS, b"labels": 7}, "not a list"),
        ({b"data": Calls(os.system, "true"), b"labels": []}, "asks for 'posix.system'"),
    ],
)
def test_a_wrong_batch_in_a_python_archive_is_named(tmp_path, batch, message):
    path, layout = edited(tmp_path, binary=False, test_batch=pickle.dumps(batch, 2))
    with pytest.raises(UserError, match=message):
        archive.read(path, layout=layout, sizes=helpers.SIZES)


def test_members_that_are_not_files_are_not_followed(tmp_path):
    layout = helpers.layout_of("cifar10", binary=True)
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(3073))
    path = tmp_path / "links.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name in (*layout.train, *layout.test, "batches.meta.txt", "../../etc/evil"):
            info = tarfile.TarInfo(f"{layout.folder}/{name}")
            info.type, info.linkname = tarfile.SYMTYPE, str(secret)
            tar.addfile(info)
        info = tarfile.TarInfo("/etc/evil")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="has no"):
        archive.read(path, layout=layout, sizes=helpers.SIZES)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_archive_is_known_by_its_checksum_whatever_its_name(tmp_path):
    path, layout = helpers.small_archive(tmp_path)
    other, other_layout = helpers.small_archive(tmp_path, "cifar100")
    layouts = {"cifar10": (layout,), "cifar100": (other_layout,)}
    renamed = path.rename(tmp_path / "some file")
    assert archive.identify(renamed, name="cifar10", layouts=layouts) == (renamed, layout)
    with pytest.raises(UserError, match=r"is cifar-100-binary\.tar\.gz; cifar10 needs cifar-10-b"):
        archive.identify(other, name="cifar10", layouts=layouts)
    renamed.write_bytes(renamed.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"some file is not the published[\s\S]*download it again"):
        archive.identify(renamed, name="cifar10", layouts=layouts)


def test_an_archive_that_cannot_be_read_is_named(tmp_path):
    for path in (tmp_path / "absent.tar.gz", tmp_path, "~nobody-of-that-name/x.tar.gz"):
        with pytest.raises(UserError, match=f"cannot read the archive '{path}'"):
            archive.identify(path, name="cifar10", layouts=archive.LAYOUTS)


def test_the_published_sums_are_those_of_tfds():
    tfds = pytest.importorskip("tensorflow_datasets")
    for name, layouts in archive.LAYOUTS.items():
        (info,) = tfds.builder_cls(name).url_infos.values()
        assert (layouts[0].size, layouts[0].sha256) == (info.size, info.checksum)
