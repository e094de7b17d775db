"""What is kept from run to run: found again, made again when damaged, and not needed."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from resnet_flax.data import decoded
from resnet_flax.devices import cache


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("RESNET_FLAX_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    path.mkdir()
    (path / "a").write_bytes(b"1234")
    (path / "b").write_bytes(b"5678")
    return path


class Loader:
    """Counts how often it is asked."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        names = np.array(["one", "zwei", "três"])
        return {"images": np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3), "names": names}


def _check(arrays):
    assert sorted(arrays) == ["images", "names"]
    np.testing.assert_array_equal(arrays["images"].ravel(), np.arange(48))
    assert arrays["images"].dtype == np.uint8
    assert arrays["names"].tolist() == ["one", "zwei", "três"]


def test_directory_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("RESNET_FLAX_CACHE", str(tmp_path / "mine"))
    assert cache.directory("data") == tmp_path / "mine" / "data"
    monkeypatch.delenv("RESNET_FLAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.directory("data") == tmp_path / "xdg" / "resnet_flax" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.directory("data") == tmp_path / "home" / ".cache" / "resnet_flax" / "data"


def test_no_directory_where_it_is_turned_off_or_cannot_be(tmp_path, monkeypatch):
    monkeypatch.setenv("RESNET_FLAX_CACHE", "")
    assert cache.directory("data") is None
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RESNET_FLAX_CACHE", str(tmp_path / "file"))
    assert cache.directory("data") is None
    monkeypatch.setenv("RESNET_FLAX_CACHE", "~nobody_of_this_name/x")
    assert cache.directory("data") is None


def test_make_room_deletes_the_oldest(tmp_path):
    for i, name in enumerate("cab"):
        (tmp_path / name).write_bytes(bytes(10))
        os.utime(tmp_path / name, (i, i))
    (tmp_path / "folder").mkdir()
    cache.make_room(tmp_path, most=20)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "folder"]
    cache.make_room(tmp_path, most=0)
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    cache.make_room(tmp_path / "missing", most=0)


def test_a_second_process_finds_the_program_of_the_first(kept):
    program = (
        "import jax, resnet_flax.devices.cache as c; c._WORTH_KEEPING = 0.0; c.keep_programs();"
        "hits = []; jax.monitoring.register_event_listener(lambda e, **k: hits.append(e));"
        "jax.jit(lambda x: x @ x.T + 1)(jax.numpy.ones((4, 3))).block_until_ready();"
        "print(sum('cache_hits' in h for h in hits))"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMP", "JAX_PERS"))}
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True
        )
        for _ in range(2)
    ]
    first, second = (int(o.stdout) for o in outputs)
    assert (first, second > 0) == (0, True)
    assert [o.stderr for o in outputs] == ["", ""]
    assert len(list(kept.glob("programs-*/*-cache"))) > 0


def test_the_users_own_compilation_cache_has_its_way(kept, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    for value in ("/somewhere", ""):
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", value)
        cache.keep_programs()
        assert jax.config.jax_compilation_cache_dir == before
    assert not kept.exists()


def test_decoded_once(kept, source):
    load = Loader()
    for _ in range(3):
        _check(decoded.read("digits", source, load))
    assert load.calls == 1
    assert len(list(kept.glob("data/*.npz"))) == len(list(kept.glob("data/*"))) == 1


@pytest.mark.parametrize("change", ["content", "size", "new", "gone", "renamed", "other folder"])
def test_decoded_again_when_the_source_has_changed(kept, source, change):
    load = Loader()
    decoded.read("digits", source, load)
    if change == "content":
        # Replaced, as tools do that write beside and move: even the time may be the old one.
        (source / "c").write_bytes(b"4321")
        stat = (source / "a").stat()
        os.utime(source / "c", ns=(stat.st_atime_ns, stat.st_mtime_ns))
        os.replace(source / "c", source / "a")
    elif change == "size":
        (source / "a").write_bytes(b"12345")
    elif change == "new":
        (source / "c").write_bytes(b"")
    elif change == "gone":
        (source / "b").unlink()
    elif change == "renamed":
        (source / "b").rename(source / "c")
    else:
        source = source.rename(source.parent / "moved")
    _check(decoded.read("digits", source, load))
    assert load.calls == 2


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "pickle", "folder"])
def test_decoded_again_when_what_was_kept_is_damaged(kept, source, damage):
    load = Loader()
    decoded.read("digits", source, load)
    (path,) = kept.glob("data/*")
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[:-40])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "flipped":
        at = whole.index(bytes(range(48))) + 7
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    elif damage == "pickle":
        np.savez(path, images=np.array([{"a": 1}], dtype=object))
    else:
        path.unlink()
        path.mkdir()
    _check(decoded.read("digits", source, load))
    assert load.calls == 2


def test_decoded_without_a_place_to_keep_it(source, monkeypatch, kept):
    load = Loader()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        _check(decoded.read("digits", source, load))
    assert list(kept.glob("data/*")) == []
    monkeypatch.setenv("RESNET_FLAX_CACHE", "")
    _check(decoded.read("digits", source, load))
    assert load.calls == 2
