"""Finds the original archives of CIFAR in the download directory, or downloads them."""

import contextlib
import pathlib
import re
import sys
import time
import urllib.parse
import urllib.request

from resnet_flax.data.archives import ARCHIVES, sha256_of
from resnet_flax.errors import UserError, first_line

ORIGIN = "https://www.cs.toronto.edu/~kriz/"
TIMEOUTS = 5.0, 20.0  # seconds without a connection, and without a byte
ATTEMPTS = 6  # to go on after a dropped connection, with a pause that doubles each time
PAUSE = 1.0  # seconds


class _SourceError(Exception):
    """A URL does not have the archive, or cannot be reached; another one may."""


def list_sources(name: str, mirror: str | None) -> list[tuple[str, str]]:
    """The URLs to try for a data set, and which of `ARCHIVES` is expected at each.

    `mirror` is the URL of an archive or of a directory of archives.

    Raises:
      UserError: `mirror` is not a URL that can be opened.
    """
    known = list(ARCHIVES[name])
    origin = f"{ORIGIN}{known[0]}.tar.gz", known[0]
    if not mirror:
        return [origin]
    parts = re.fullmatch(r"(file://(?=/)|https?://[^/?#]+)([^?#]*)(\?.*)?", str(mirror))
    if parts is None:
        raise UserError(
            f"config.data.mirror is {mirror!r}; it must be an http://, https:// or file:// URL"
        )
    base, query = (parts[1] + parts[2]).rstrip("/"), parts[3] or ""
    named = [(mirror, stem) for stem in known if base.endswith(f"/{stem}.tar.gz")]
    return [*(named or [(f"{base}/{stem}.tar.gz{query}", stem) for stem in known]), origin]


def obtain(name: str, sources: list[tuple[str, str]], data_dir: pathlib.Path) -> pathlib.Path:
    """Returns the path of an archive, downloaded where it is not there yet.

    It is looked for in downloads and downloads/manual of `data_dir`, where TFDS has such files, and
    downloaded into the first from `sources`. Only one process may do this at a time.

    Raises:
      UserError: no source has the archive, or it cannot be written.
    """
    folder = data_dir / "downloads"
    for stem, sha256 in ARCHIVES[name].items():
        for path in (folder / f"{stem}.tar.gz", folder / "manual" / f"{stem}.tar.gz"):
            if _has(path, sha256):
                return path
    failures = []
    for url, stem in sources:
        if failures:
            print(f"Cannot download: {failures[-1]}", file=sys.stderr)
        try:
            return _fetch(url, ARCHIVES[name][stem], folder / f"{stem}.tar.gz")
        except _SourceError as error:
            failures.append(str(error))
        except OSError as error:
            raise UserError(f"cannot download into {folder}: {first_line(error)}") from error
    files = " or ".join(f"{stem}.tar.gz" for stem in ARCHIVES[name])
    raise UserError(
        f"there is no prepared {name} in {data_dir}, and it cannot be downloaded: "
        f"{'; '.join(failures)}\n"
        "set config.data.data_dir to a directory of prepared TFDS data sets, config.data.archive "
        f"to a downloaded {files}, or config.data.mirror to the URL of a copy"
    )


def _has(path: pathlib.Path, sha256: str) -> bool:
    with contextlib.suppress(OSError):
        return path.is_file() and sha256_of(path) == sha256
    return False


def _fetch(url: str, sha256: str, path: pathlib.Path) -> pathlib.Path:
    """Downloads a file to `path`, continuing what an earlier attempt has left."""
    if url.startswith("file:"):
        there = pathlib.Path(urllib.request.url2pathname(urllib.parse.urlsplit(url).path))
        if not _has(there, sha256):
            raise _SourceError(f"{url} is absent, or not the published archive")
        return there
    # They take a tenth of a second to import, and are rarely needed.
    import requests
    import urllib3
    from tqdm import tqdm

    print(f"Downloading {url} to {path.parent}", file=sys.stderr)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    # disable=None: shown where stderr is a terminal.
    with requests.Session() as session, tqdm(unit="B", unit_scale=True, disable=None) as bar:
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(PAUSE * 2 ** (attempt - 1))
            start = _size(part)
            try:
                _append(session, url, part, bar)
            except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
                # requests wraps the reason in the names of its own objects.
                reason = first_line(getattr(error.args[0] if error.args else None, "reason", error))
                if not attempt and _size(part) <= start:
                    break
                continue
            if sha256_of(part) == sha256:
                return part.replace(path)
            part.unlink()
            if not start:  # Else the beginning may have been of another file.
                raise _SourceError(f"{url} is not the published archive (wrong sha256); deleted")
    kept = f"; {_size(part):,} bytes of it are kept in {part}" if part.exists() else ""
    raise _SourceError(f"{url}: {reason}{kept}")


def _size(path: pathlib.Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _append(session, url: str, part: pathlib.Path, bar) -> None:
    start = _size(part)
    headers = {"Range": f"bytes={start}-", "Accept-Encoding": "identity"}
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUTS) as response:
        if response.status_code == 416:  # There is no more.
            return
        if not response.ok:
            raise _SourceError(f"{url}: {response.status_code} {response.reason}")
        if response.status_code != 206:  # The server sends only whole files.
            start = 0
        bar.total = start + int(response.headers.get("Content-Length", 0))
        bar.update(start - bar.n)
        with part.open("ab" if start else "wb") as file:
            # Not decoded: some servers call gzip an encoding of the archive.
            for block in response.raw.stream(1 << 16, decode_content=False):
                file.write(block)
                bar.update(len(block))
