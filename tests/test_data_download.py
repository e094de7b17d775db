import http.server
import os
import re
import socket
import threading
import types

import pytest

from resnet_flax import data
from resnet_flax.data import archives, download
from resnet_flax.errors import UserError
from tests import test_data_helpers as helpers

BODY = os.urandom(1 << 20)
STEM = "cifar-10-binary"


@pytest.fixture
def server():
    """A web server: what it has, how it misbehaves, and what it was asked."""
    this = types.SimpleNamespace(files={}, ranges=True, headers={})
    this.drops = []  # Bytes after which the connection is closed, one for each answer.
    this.asked = []  # Path and first byte.

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            this.asked.append((self.path, start))
            body = this.files.get(self.path)
            if body is None:
                return self.send_error(404)
            if this.ranges and start >= len(body):
                return self.send_error(416)
            start = start if this.ranges else 0
            self.send_response(206 if start else 200)
            for key, value in {"Content-Length": str(len(body) - start), **this.headers}.items():
                self.send_header(key, value)
            self.end_headers()
            drop = this.drops.pop(0) if this.drops else len(body)
            self.wfile.write(body[start : start + drop])

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        this.url = f"http://127.0.0.1:{running.server_port}/"
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield this
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _direct(monkeypatch, tmp_path):
    """No proxies, no pauses; BODY is what is published."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(download, "PAUSE", 0)
    (tmp_path / f"{STEM}.tar.gz").write_bytes(BODY)
    helpers.publish(monkeypatch, "cifar10", tmp_path / f"{STEM}.tar.gz")


def obtain(url, tmp_path):
    path = download.obtain("cifar10", [(url, STEM)], tmp_path)
    assert path.read_bytes() == BODY
    return path


def part_of(tmp_path):
    (tmp_path / "downloads").mkdir(exist_ok=True)
    return tmp_path / "downloads" / f"{STEM}.tar.gz.part"


def closed_url():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/"


# Servers may wrongly call the compression of the archive one of the transfer.
@pytest.mark.parametrize("headers", [{}, {"Content-Encoding": "gzip"}])
def test_a_download_is_whole_and_kept(tmp_path, server, capsys, headers):
    server.files["/x"] = BODY
    server.headers = headers
    path = obtain(server.url + "x", tmp_path)
    assert [p.name for p in path.parent.iterdir()] == [f"{STEM}.tar.gz"]
    assert capsys.readouterr() == ("", f"Downloading {server.url}x to {path.parent}\n")
    assert obtain(server.url + "x", tmp_path) == path
    assert len(server.asked) == 1


@pytest.mark.parametrize("ranges", [True, False])
def test_a_dropped_connection_is_resumed(tmp_path, server, ranges):
    server.files["/x"] = BODY
    server.ranges = ranges
    server.drops = [700_000, 100_000]
    obtain(server.url + "x", tmp_path)
    first, second, third = [start for _, start in server.asked]
    assert first == 0 < second <= 700_000
    assert (third > second) == ranges


def test_a_later_process_continues(tmp_path, server):
    server.files["/x"] = BODY
    server.drops = [100_000] * download.ATTEMPTS
    with pytest.raises(UserError, match=r"bytes of it are kept in .*\.part"):
        obtain(server.url + "x", tmp_path)
    kept = part_of(tmp_path).stat().st_size
    server.asked.clear()
    obtain(server.url + "x", tmp_path)
    assert server.asked == [("/x", kept)]
    assert kept > 100_000


@pytest.mark.parametrize("size", [1000, len(BODY), len(BODY) + 1])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_part_of_another_file_does_no_harm(tmp_path, server, size, ranges):
    server.files["/x"] = BODY
    server.ranges = ranges
    part_of(tmp_path).write_bytes(b"?" * size)
    obtain(server.url + "x", tmp_path)


@pytest.mark.parametrize("body", [BODY[:-1] + b"?", b"<html>Please log in to the hotel</html>"])
def test_another_file_is_deleted_and_said(tmp_path, server, body):
    server.files["/x"] = body
    with pytest.raises(UserError, match=r"/x is not the published archive .*deleted"):
        obtain(server.url + "x", tmp_path)
    assert list((tmp_path / "downloads").iterdir()) == []
    assert len(server.asked) == 1


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, server):
    server.files["/x"] = BODY
    (tmp_path / "downloads").touch()
    with pytest.raises(UserError, match=f"cannot download into {tmp_path}/downloads: "):
        obtain(server.url + "x", tmp_path)


def test_a_silent_server_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUTS", (0.2, 0.2))
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x"
        with pytest.raises(UserError, match=rf"{url}: .*timed out"):
            obtain(url, tmp_path)


def test_the_addresses_to_try(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(download, "ORIGIN", "https://origin/")
    binary, python = archives.ARCHIVES["cifar10"]
    origin = ("https://origin/cifar-10-binary.tar.gz", binary)
    url = "https://host/a/cifar-10-python.tar.gz?token=1"
    for mirror, expected in {
        None: [],
        url: [(url, python)],
        "http://host:81/a/?b=1": [
            ("http://host:81/a/cifar-10-binary.tar.gz?b=1", binary),
            ("http://host:81/a/cifar-10-python.tar.gz?b=1", python),
        ],
    }.items():
        assert download.list_sources("cifar10", mirror) == [*expected, origin]


@pytest.mark.parametrize("mirror", ["ftp://host/a", "host/a", "/a/b", "https://", "file://", 7])
def test_a_wrong_mirror_is_named(tmp_path, mirror):
    with pytest.raises(UserError, match=r"config\.data\.mirror is "):
        data.load("cifar10", data_dir=tmp_path, mirror=mirror)
    assert not (tmp_path / "cifar10").exists()


def test_no_network_is_said_with_the_ways_out(tmp_path, monkeypatch):
    mirror, origin = closed_url(), closed_url()
    monkeypatch.setattr(download, "ORIGIN", origin)
    with pytest.raises(UserError) as caught:
        data.load("cifar10", data_dir=tmp_path, mirror=mirror)
    said = [rf"{url}{STEM}\.tar\.gz: HTTPC[^;]*refused" for url in (mirror, origin)]
    ways = "config.data.data_dir .*, config.data.archive .* config.data.mirror "
    assert re.fullmatch(f".*{said[0]}.*; {said[1]}.*\n.*{ways}.*", str(caught.value))


@pytest.mark.parametrize("place", ["mirror", "origin", "disk"])
def test_mirror_then_origin_and_either_archive_will_do(tmp_path, server, monkeypatch, place):
    path = helpers.small_archive(tmp_path, kind="python")
    other = helpers.small_archive(tmp_path)
    helpers.publish(monkeypatch, "cifar10", other, path)
    monkeypatch.setattr(download, "ORIGIN", server.url)
    mirror = server.url + "mirror"
    server.files[f"/mirror/{path.name}"] = path.read_bytes()
    expected = [f"/mirror/{other.name}", f"/mirror/{path.name}"]
    if place == "origin":
        mirror = f"{closed_url()}{path.name}"
        server.files[f"/{other.name}"] = other.read_bytes()
        expected = [f"/{other.name}"]
    elif place == "disk":
        other.rename(tmp_path / "moved")
        mirror, expected = tmp_path.as_uri(), []
    (tmp_path / "data").mkdir()
    dataset = data.load("cifar10", data_dir=tmp_path / "data", mirror=mirror)
    assert len(dataset.train) == 50
    assert [asked for asked, _ in server.asked] == expected
