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
    (tmp_path / "source").mkdir()
    (tmp_path / "source/a").write_bytes(b"1234")
    (tmp_path / "source/b").write_bytes(b"5678")
    return tmp_path / "source"


IMAGES = np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3)


def times_loaded(*sources):
    """Reads each source's data, checks them, and counts how often they had to be decoded."""
    calls = []

    def load():
        calls.append(1)
        return {"images": IMAGES, "names": np.array(["one", "zwei", "três"])}

    for source in sources:
        arrays = decoded.read("digits", source, load)
        assert sorted(arrays) == ["images", "names"]
        np.testing.assert_array_equal(arrays["images"], IMAGES, strict=True)
        assert arrays["names"].tolist() == ["one", "zwei", "três"]
    return len(calls)


def test_the_directory_is_where_the_environment_says(tmp_path, monkeypatch):
    for name, home in [
        ("RESNET_FLAX_CACHE", "mine"),
        ("XDG_CACHE_HOME", "xdg/resnet_flax"),
        ("HOME", "home/.cache/resnet_flax"),
    ]:
        monkeypatch.setenv(name, str(tmp_path / home.split("/")[0]))
        assert cache.directory("data") == tmp_path / home / "data"
        monkeypatch.delenv(name)


def test_no_directory_where_it_is_turned_off_or_cannot_be(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for value in ("", str(tmp_path / "file"), "~nobody_of_this_name/x"):
        monkeypatch.setenv("RESNET_FLAX_CACHE", value)
        assert cache.directory("data") is None


def test_make_room_deletes_the_oldest(tmp_path):
    for i, name in enumerate("cab"):
        (tmp_path / name).write_bytes(bytes(10))
        os.utime(tmp_path / name, (i, i))
    (tmp_path / "folder").mkdir()
    for most, left in ((20, ["a", "b", "folder"]), (0, ["folder"])):
        cache.make_room(tmp_path, most)
        assert sorted(p.name for p in tmp_path.iterdir()) == left
    cache.make_room(tmp_path / "missing", most=0)


def test_a_second_process_finds_the_program_of_the_first(kept):
    program = (
        "import jax, resnet_flax.devices.cache as c; c._WORTH_KEEPING = 0.0; c.keep_programs();"
        "hits = []; jax.monitoring.register_event_listener(lambda e, **k: hits.append(e));"
        "jax.jit(lambda x: x @ x.T + 1)(jax.numpy.ones((4, 3))).block_until_ready();"
        "print(sum('cache_hits' in h for h in hits) > 0)"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMP", "JAX_PERS"))}
    for hit in ("False\n", "True\n"):
        done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True)
        assert (done.stdout.decode(), done.stderr) == (hit, b"")
    assert list(kept.glob("programs-*/*-cache"))


def test_the_users_own_compilation_cache_goes_before(kept, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    for value in ("/somewhere", ""):
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", value)
        cache.keep_programs()
        assert jax.config.jax_compilation_cache_dir == before
    assert not kept.exists()


def test_data_are_decoded_once(kept, source):
    assert times_loaded(source, source, source) == 1
    assert len(list(kept.glob("data/*.npz"))) == len(list(kept.glob("data/*"))) == 1


def replace(source):
    # As tools do that write beside and move: even the time may be the same.
    stat = (source / "a").stat()
    (source / "c").write_bytes(b"4321")
    os.utime(source / "c", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(source / "c", source / "a")


def test_data_are_decoded_again_when_the_source_has_changed(kept, source):
    assert times_loaded(source) == 1
    for change in (
        replace,
        lambda source: (source / "a").write_bytes(b"12345"),
        lambda source: (source / "c").write_bytes(b""),
        lambda source: (source / "b").rename(source / "d"),
        lambda source: (source / "d").unlink(),
    ):
        change(source)
        assert times_loaded(source) == 1
    assert times_loaded(source.rename(source.parent / "moved")) == 1


def flip(path):
    whole = bytearray(path.read_bytes())
    whole[whole.index(IMAGES.tobytes()) + 7] ^= 1
    path.write_bytes(whole)


def become_a_folder(path):
    path.unlink()
    path.mkdir()


def test_data_are_decoded_again_when_what_was_kept_is_damaged(kept, source):
    assert times_loaded(source) == 1
    (path,) = kept.glob("data/*")
    for damage in (
        lambda path: path.write_bytes(path.read_bytes()[:-40]),
        lambda path: path.write_bytes(b""),
        flip,
        lambda path: np.savez(path, images=np.array([{"a": 1}], dtype=object)),
        become_a_folder,
    ):
        damage(path)
        assert times_loaded(source) == 1


def test_data_are_decoded_where_they_cannot_be_kept(kept, source, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        assert times_loaded(source) == 1
    assert list(kept.glob("data/*")) == []
    monkeypatch.setenv("RESNET_FLAX_CACHE", "")
    assert times_loaded(source) == 1
