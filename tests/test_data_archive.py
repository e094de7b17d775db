import codecs
import os
import pickle

import numpy as np
import pytest

from resnet_flax.data import archives
from resnet_flax.errors import UserError
from tests import test_data_helpers as helpers


class Calls:
    """Pickles to a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def read_with(tmp_path, monkeypatch, **changes):
    """Reads a Python archive of CIFAR-10 in which files are replaced."""
    files = helpers.archive_files("cifar10", "python") | changes
    path = helpers.write_tar(tmp_path / "changed.tar.gz", files)
    helpers.publish(monkeypatch, "cifar10", path)
    return archives.read(path, "cifar10")


@pytest.mark.parametrize("protocol", range(6))
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, monkeypatch, protocol):
    witness = tmp_path / "witness"
    data = pickle.dumps({b"data": Calls(os.system, f"touch {witness}")}, protocol)
    with pytest.raises(UserError, match=r"changed.tar.gz: it asks for '\w+\.system'"):
        read_with(tmp_path, monkeypatch, test_batch=data)
    assert not witness.exists()
    pickle.loads(data)
    assert witness.exists()  # It would have worked.


@pytest.mark.parametrize(
    "pixels",
    [
        Calls(eval, "1"),
        Calls(codecs.encode, "x", "rot13"),
        Calls(np.dtype, "O"),
        np.array([[object()]]),
        np.zeros((20, 3072), np.int16),
        np.float64(1),
        codecs.lookup,
        np.ndarray,
        b"x",
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_whatever_is_no_batch_is_refused(tmp_path, monkeypatch, pixels, protocol):
    batch = {b"data": pixels, b"labels": [0] * 20}
    with pytest.raises(UserError, match=r"cannot read the archive .*/changed.tar.gz: "):
        read_with(tmp_path, monkeypatch, test_batch=pickle.dumps(batch, protocol))


BROKEN = [
    b"no pickle at all",
    b"}q\x00(U\x01aK\x01",  # cut off
    b"(.",
    b"cnumpy\ndtype\n}b.",  # fills a class
    b"c_codecs\nencode\n(N}X\x01\x00\x00\x00aK\x01stb.",  # sets an attribute of a function
    b"}U\x01aP1\ns.",  # a persistent id
    b"}U\x01a\x82\x01s.",  # an extension
    b"}U\x01a(ios\nsystem\ns.",  # the protocol 0 way of calling
    b"}U\x01a(cos\nsystem\nos.",
]


@pytest.mark.parametrize("data", BROKEN)
def test_a_broken_pickle_is_refused(tmp_path, monkeypatch, data):
    with pytest.raises(UserError, match=r"cannot read the archive .*/changed.tar.gz: "):
        read_with(tmp_path, monkeypatch, test_batch=data)


def test_a_python_2_pickle_is_read():
    # As Python 2.7 writes cPickle.dumps({'data': numpy.array([[1, 2]], 'u1'), 'labels': [7]}, 2).
    data = (
        b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\n"
        b"q\x04K\x00\x85U\x01b\x87Rq\x05(K\x01K\x01K\x02\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01"
        b"\x87Rq\x07(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x02\x01\x02tbU"
        b"\x06labelsq\x08]q\x09K\x07au."
    )
    found = archives._unpickle(data)
    assert found["data"].values.tolist() == [[1, 2]]
    assert found["labels"] == [7]


@pytest.mark.parametrize(("name", "kind"), helpers.KINDS)
@pytest.mark.parametrize("protocol", [0, 4])
def test_both_layouts_hold_the_same(tmp_path, monkeypatch, name, kind, protocol):
    path = helpers.small_archive(tmp_path, name, kind, protocol=protocol)
    helpers.publish(monkeypatch, name, path)
    found, expected = archives.read(path, name), helpers.content(name)
    assert found.class_names == expected.class_names
    for split in helpers.SIZES:
        np.testing.assert_array_equal(found.images[split], expected.images[split])
        assert found.images[split].dtype == np.uint8
        for key, values in expected.labels[split].items():
            np.testing.assert_array_equal(found.labels[split][key], values)


@pytest.mark.parametrize("kind", ["binary", "python"])
def test_a_damaged_archive_is_named(tmp_path, monkeypatch, kind):
    path = helpers.small_archive(tmp_path, kind=kind)
    whole = path.read_bytes()
    contents = [whole[:size] for size in (0, 5, len(whole) // 2, len(whole) * 9 // 10)]
    photo = helpers.write_tar(tmp_path / "photo.tar.gz", {"photo.png": b"png"})
    for content in (*contents, photo.read_bytes()):
        path.write_bytes(content)
        helpers.publish(monkeypatch, "cifar10", path)
        with pytest.raises(UserError, match=f"cannot read the archive {path}: "):
            archives.read(path, "cifar10")


def test_an_archive_is_known_by_its_checksum_whatever_its_name(tmp_path, monkeypatch):
    paths = [helpers.small_archive(tmp_path, name) for name in ("cifar10", "cifar100")]
    helpers.publish(monkeypatch, "cifar10", paths[0])
    helpers.publish(monkeypatch, "cifar100", paths[1])
    renamed = paths[0].rename(tmp_path / "some file")
    assert archives.read(renamed, "cifar10").class_names
    with pytest.raises(UserError, match=r"is cifar-100-binary\.tar\.gz; cifar10 needs the publish"):
        archives.read(paths[1], "cifar10")
    renamed.write_bytes(renamed.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"some file is damaged.* published cifar-10-binary\.tar"):
        archives.read(renamed, "cifar10")
    for path in (tmp_path / "absent.tar.gz", tmp_path, "~nobody-of-that-name/x.tar.gz"):
        with pytest.raises(UserError, match=f"cannot read the archive '{path}'"):
            archives.read(path, "cifar10")


def test_the_published_sums_are_those_of_tfds():
    import tensorflow_datasets as tfds

    for name, sums in archives.ARCHIVES.items():
        ((url, info),) = tfds.builder_cls(name).url_infos.items()
        (stem,) = [stem for stem in sums if url.endswith(f"/{stem}.tar.gz")]
        assert sums[stem] == info.checksum
