import dataclasses
import http.server
import os
import socket
import threading
import time

import pytest

from resnet_flax.data import archive, cifar, download
from resnet_flax.errors import UserError
from tests import test_data_helpers as helpers

BODY = bytes(range(256)) * 4096  # 1 MiB, several blocks
MIDDLE = 700_000


class Server:
    """A web server of this test: what it has, how it misbehaves, and what it was asked."""

    def __init__(self):
        self.files = {}
        self.ranges = True
        self.drops = []  # Bytes after which the connection is closed, one for each answer.
        self.headers = {}
        self.asked = []  # Path and Range header.
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.answer(self)

            def log_message(self, *arguments):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,))
        self.thread.start()

    def answer(self, request):
        asked = request.headers.get("Range")
        self.asked.append((request.path, asked))
        body = self.files.get(request.path)
        if body is None:
            request.send_error(404)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.ranges else 0
        request.send_response(206 if start else 200)
        headers = {"Content-Length": str(len(body) - start)}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        for key, value in {**headers, **self.headers}.items():
            request.send_header(key, value)
        request.end_headers()
        drop = self.drops.pop(0) if self.drops else None
        request.wfile.write(body[start:] if drop is None else body[start : start + drop])

    def close(self):
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@pytest.fixture
def server():
    running = Server()
    yield running
    running.close()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def layout(tmp_path):
    path = tmp_path / "body"
    path.write_bytes(BODY)
    return helpers.published(path, helpers.layout_of("cifar10", binary=True))


def fetch(url, *, layout, folder, **changes):
    arguments = {"show_progress": False, "open_seconds": 5.0, "pause_seconds": 0.01, **changes}
    return download.fetch(url, layout=layout, folder=folder, **arguments)


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_download_is_whole_verified_and_leaves_no_part(tmp_path, server, layout, capsys):
    server.files["/x"] = BODY
    path = fetch(server.url + "x", layout=layout, folder=tmp_path / "new", show_progress=True)
    assert path.read_bytes() == BODY
    assert [p.name for p in (tmp_path / "new").iterdir()] == [layout.file_name]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"Downloading {server.url}x to {tmp_path / 'new'} (1 MB)\n"


def test_a_dropped_connection_is_resumed(tmp_path, server, layout):
    server.files["/x"] = BODY
    server.drops = [MIDDLE, 100_000]
    assert fetch(server.url + "x", layout=layout, folder=tmp_path).read_bytes() == BODY
    assert server.asked == [
        ("/x", None),
        ("/x", f"bytes={MIDDLE}-"),
        ("/x", f"bytes={MIDDLE + 100_000}-"),
    ]


def test_a_dropped_connection_starts_anew_where_there_are_no_ranges(tmp_path, server, layout):
    server.files["/x"] = BODY
    server.ranges = False
    server.drops = [MIDDLE, 100_000]
    assert fetch(server.url + "x", layout=layout, folder=tmp_path).read_bytes() == BODY
    assert len(server.asked) == 3


def test_a_later_process_goes_on_with_the_part(tmp_path, server, layout):
    server.files["/x"] = BODY
    server.drops = [1000] * download.ATTEMPTS
    with pytest.raises(UserError, match=r"broke off 6 times[\s\S]*6,000 of 1,048,576 bytes are"):
        fetch(server.url + "x", layout=layout, folder=tmp_path)
    assert (tmp_path / f"{layout.file_name}.part").read_bytes() == BODY[:6000]
    server.asked.clear()
    assert fetch(server.url + "x", layout=layout, folder=tmp_path).read_bytes() == BODY
    assert server.asked == [("/x", "bytes=6000-")]


@pytest.mark.parametrize("size", [1000, len(BODY), len(BODY) + 1])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_part_of_another_file_does_no_harm(tmp_path, server, layout, size, ranges):
    server.files["/x"] = BODY
    server.ranges = ranges
    (tmp_path / f"{layout.file_name}.part").write_bytes(b"?" * size)
    assert fetch(server.url + "x", layout=layout, folder=tmp_path).read_bytes() == BODY


def test_a_wrong_checksum_is_deleted_and_said(tmp_path, server, layout):
    server.files["/x"] = BODY[:-1] + b"?"
    with pytest.raises(download.SourceError, match=r"x is not the published .*deleted"):
        fetch(server.url + "x", layout=layout, folder=tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
    assert len(server.asked) == 1  # Loaded once, not twice.


def test_a_file_of_another_size_is_not_downloaded(tmp_path, server, layout):
    server.files["/x"] = b"<html>Please log in to the hotel</html>"
    with pytest.raises(download.SourceError, match=r"has 39 bytes; cifar-10-.* has 1,048,576"):
        fetch(server.url + "x", layout=layout, folder=tmp_path / "new")


def test_a_server_that_sends_another_range_is_refused(tmp_path, server, layout):
    server.files["/x"] = BODY
    server.drops = [MIDDLE]
    server.headers = {"Content-Range": f"bytes 5-{len(BODY) - 1}/{len(BODY)}"}
    with pytest.raises(download.SourceError, match="sends the range"):
        fetch(server.url + "x", layout=layout, folder=tmp_path)


def test_a_file_url(tmp_path, layout):
    (tmp_path / "x").write_bytes(BODY)
    url = (tmp_path / "x").as_uri()
    assert fetch(url, layout=layout, folder=tmp_path / "new").read_bytes() == BODY
    with pytest.raises(download.SourceError, match="absent"):
        fetch((tmp_path / "absent").as_uri(), layout=layout, folder=tmp_path / "new")


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, server, layout):
    server.files["/x"] = BODY
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"cannot download into {tmp_path}/file/downloads"):
        fetch(server.url + "x", layout=layout, folder=tmp_path / "file" / "downloads")


def test_a_silent_server_is_given_up(tmp_path, layout):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x"
        started = time.monotonic()
        with pytest.raises(download.SourceError, match=r"no answer in 0\.3 seconds"):
            fetch(url, layout=layout, folder=tmp_path, open_seconds=0.3)
        assert time.monotonic() - started < 2


def test_a_hanging_look_up_is_given_up(tmp_path, layout, monkeypatch):
    release = threading.Event()

    def hang(*arguments, **keywords):
        release.wait(20)
        raise socket.gaierror("no such name")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    with pytest.raises(download.SourceError, match="no answer"):
        fetch("http://example.invalid/x", layout=layout, folder=tmp_path, open_seconds=0.3)
    release.set()


def test_the_addresses_to_try():
    layouts = archive.LAYOUTS["cifar10"]
    binary, python = layouts

    def urls(mirror):
        return download.candidates(mirror, layouts=layouts, origin="https://origin/")

    origin = ("https://origin/cifar-10-binary.tar.gz", binary)
    assert urls(None) == urls("") == [origin]
    url = "https://host/a/cifar-10-python.tar.gz?token=1"
    assert urls(url) == [(url, python), origin]
    both = [
        ("http://host:81/a/cifar-10-binary.tar.gz", binary),
        ("http://host:81/a/cifar-10-python.tar.gz", python),
        origin,
    ]
    assert urls("http://host:81/a") == urls("http://host:81/a/") == both
    assert urls("file:///a")[0] == ("file:///a/cifar-10-binary.tar.gz", binary)


@pytest.mark.parametrize(
    "mirror", ["ftp://host/a", "host/a", "/a/b", "https://", "http://[", "https://h/x.zip", 7]
)
def test_a_wrong_mirror_is_named(mirror):
    with pytest.raises(UserError, match=r"config\.data\.mirror is "):
        download.candidates(mirror, layouts=archive.LAYOUTS["cifar10"])


def make(tmp_path, *, mirror, origin, layouts):
    return cifar.make(
        "cifar10",
        data_dir=tmp_path / "data",
        archive_path=None,
        mirror=mirror,
        show_progress=False,
        sizes=helpers.SIZES,
        layouts={"cifar10": layouts},
        origin=origin,
    )


def test_no_network_is_said_fast_with_the_ways_out(tmp_path):
    nowhere = f"http://127.0.0.1:{closed_port()}/"
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        make(
            tmp_path,
            mirror=nowhere,
            origin="http://no-such-host.invalid/",
            layouts=archive.LAYOUTS["cifar10"],
        )
    assert time.monotonic() - started < 10
    message = str(caught.value)
    for way in ("config.data.data_dir", "config.data.archive", "config.data.mirror"):
        assert way in message
    assert nowhere in message
    assert len(message.splitlines()) == 2


def test_no_answer_is_said_fast_however_many_sources_there_are(tmp_path, monkeypatch):
    assert download.OPEN_SECONDS < 9
    monkeypatch.setattr(download, "OPEN_SECONDS", 0.9)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        started = time.monotonic()
        with pytest.raises(UserError, match=r"no answer in 0\.3 seconds"):
            make(tmp_path, mirror=url, origin=url, layouts=archive.LAYOUTS["cifar10"])
        assert time.monotonic() - started < 2


def test_a_mirror_comes_before_the_origin_and_either_layout_will_do(tmp_path, server):
    path, layout = helpers.small_archive(tmp_path, binary=False)
    layouts = (dataclasses.replace(layout, file_name="cifar-10-binary.tar.gz"), layout)
    server.files["/mirror/cifar-10-python.tar.gz"] = path.read_bytes()
    made = make(tmp_path, mirror=server.url + "mirror", origin=server.url, layouts=layouts)
    assert [asked[0] for asked in server.asked] == [
        "/mirror/cifar-10-binary.tar.gz",
        "/mirror/cifar-10-python.tar.gz",
    ]
    assert (made / "dataset_info.json").is_file()
    assert (tmp_path / "data" / "downloads" / layout.file_name).is_file()


def test_the_origin_is_taken_where_the_mirror_fails_and_a_download_is_kept(tmp_path, server):
    path, layout = helpers.small_archive(tmp_path)
    server.files[f"/{layout.file_name}"] = path.read_bytes()
    nowhere = f"http://127.0.0.1:{closed_port()}/{layout.file_name}"
    made = make(tmp_path, mirror=nowhere, origin=server.url, layouts=(layout,))
    made.rename(tmp_path / "elsewhere")
    make(tmp_path, mirror=nowhere, origin=nowhere, layouts=(layout,))
    assert len(server.asked) == 1
