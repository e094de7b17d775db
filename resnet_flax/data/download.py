"""Downloads the original archives: resumed, verified, and never long in saying that it cannot."""

import http.client
import pathlib
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

from resnet_flax.data import archive
from resnet_flax.errors import UserError

ORIGIN = "https://www.cs.toronto.edu/~kriz/"
OPEN_SECONDS = 8.0  # for name, connection and answer of all sources together
STALL_SECONDS = 30.0  # without a byte, after which a transfer counts as dropped
ATTEMPTS = 6  # to go on after a dropped connection
PAUSE_SECONDS = 1.0  # before the second attempt; twice as long before each one after it
_BLOCK = 1 << 18  # bytes


class SourceError(Exception):
    """A source does not have the file, or cannot be reached; another one may."""


def candidates(
    mirror: str | None,
    *,
    layouts: tuple[archive.Layout, ...],
    origin: str = ORIGIN,
) -> list[tuple[str, archive.Layout]]:
    """Returns the addresses to try, in order, each with the archive that is expected there.

    Args:
      mirror: URL of an archive, or of a folder of them, or None or "".
      layouts: the archives of the data set.
      origin: URL of the folder of the authors, in which only the first layout is tried.

    Raises:
      UserError: `mirror` is not a URL that can be opened, or is an archive of another name.
    """
    found = []
    if mirror:
        try:
            parts = urllib.parse.urlsplit(str(mirror))
        except ValueError:
            parts = urllib.parse.SplitResult("", "", "", "", "")
        # A file has a path and no host, a page has a host.
        if not {"http": parts.netloc, "https": parts.netloc, "file": parts.path}.get(parts.scheme):
            raise UserError(
                f"config.data.mirror is {mirror!r}; it must be an http://, https:// or file:// URL"
            )
        base = parts.path.rstrip("/")
        named = {layout.file_name: layout for layout in layouts}
        last = base.rsplit("/", 1)[-1]
        if last in named:
            found.append((mirror, named[last]))
        elif last.endswith((".gz", ".tgz", ".tar", ".zip")):
            raise UserError(
                f"config.data.mirror is {mirror!r}; the archive must be called {' or '.join(named)}"
            )
        else:
            for layout in layouts:
                url = urllib.parse.urlunsplit(parts._replace(path=f"{base}/{layout.file_name}"))
                found.append((url, layout))
    found.append((origin + layouts[0].file_name, layouts[0]))
    return found


def fetch(
    url: str,
    *,
    layout: archive.Layout,
    folder: pathlib.Path,
    show_progress: bool,
    open_seconds: float = OPEN_SECONDS,
    pause_seconds: float = PAUSE_SECONDS,
) -> pathlib.Path:
    """Downloads an archive, going on with what an earlier attempt has left.

    Args:
      url: of the archive.
      layout: of the archive; its size and sha256 are verified.
      folder: to download into; made where it does not exist. The file appears in it whole or not at
        all; an unfinished one is called `<name>.part`.
      show_progress: whether to say on stderr what is downloaded.
      open_seconds: to wait for an answer.
      pause_seconds: before the second attempt.

    Returns:
      The path of the archive.

    Raises:
      SourceError: the address cannot be reached or has something else.
      UserError: the transfer broke off too often, or the folder cannot be written to.
    """
    final = folder / layout.file_name
    part = folder / f"{layout.file_name}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for fresh in (False, True):
            if fresh:
                part.unlink(missing_ok=True)
            resumed = _transfer(
                url,
                layout=layout,
                part=part,
                show_progress=show_progress,
                open_seconds=open_seconds,
                pause_seconds=pause_seconds,
            )
            if archive.sha256_of(part) == layout.sha256:
                part.replace(final)
                return final
            part.unlink()
            # A part may have been of another file; only the whole from one source condemns that.
            if not resumed:
                break
            if show_progress:
                print(f"{part} was damaged and is deleted; starting anew", file=sys.stderr)
    except OSError as error:
        raise UserError(f"cannot download into {folder}: {error}") from error
    raise SourceError(f"{url} is not the published {layout.file_name} (wrong sha256); deleted")


def _transfer(
    url: str,
    *,
    layout: archive.Layout,
    part: pathlib.Path,
    show_progress: bool,
    open_seconds: float,
    pause_seconds: float,
) -> bool:
    """Fills `part` up to the size of the archive; returns whether any of it was there before."""
    from tqdm import tqdm

    start = part.stat().st_size if part.exists() else 0
    if start > layout.size:
        part.unlink()
        start = 0
    resumed = start > 0
    if show_progress:
        at = f", from byte {start:,} on" if resumed else ""
        size = f"{layout.size / 1e6:.0f} MB"
        print(f"Downloading {url} to {part.parent} ({size}{at})", file=sys.stderr)
    # None: shown only where stderr is a terminal.
    with tqdm(
        total=layout.size,
        initial=start,
        unit="B",
        unit_scale=True,
        desc=layout.file_name,
        disable=None if show_progress else True,
    ) as bar:
        reason = "it is not complete"
        for attempt in range(ATTEMPTS):
            if start == layout.size:
                return resumed
            if attempt:
                time.sleep(pause_seconds * 2 ** (attempt - 1))
            try:
                response = _open(url, start=start, seconds=open_seconds)
            except SourceError as error:
                if attempt == 0:
                    raise
                reason = error
                continue
            with response:
                start = _agreed_start(response, url=url, start=start, layout=layout)
                resumed = resumed and start > 0
                bar.n = start
                try:
                    _append(response, part=part, start=start, size=layout.size, bar=bar)
                except _DroppedError as error:
                    reason = error
            start = part.stat().st_size
    if start == layout.size:
        return resumed
    raise UserError(
        f"the download of {url} broke off {ATTEMPTS} times ({reason}).\n"
        f"{start:,} of {layout.size:,} bytes are kept at {part}; start again to go on from there."
    )


class _DroppedError(Exception):
    """The connection broke; what has arrived is on disk."""


def _append(response, *, part: pathlib.Path, start: int, size: int, bar) -> None:
    """Writes what arrives to `part`, from byte `start` on."""
    with part.open("r+b" if start else "wb") as file:
        file.seek(start)
        file.truncate()
        while start < size:
            try:
                block = response.read(min(_BLOCK, size - start))
            except (OSError, http.client.HTTPException) as error:
                raise _DroppedError(str(error) or type(error).__name__) from error
            if not block:
                raise _DroppedError("the connection was closed")
            file.write(block)
            start += len(block)
            bar.update(len(block))


def _agreed_start(response, *, url: str, start: int, layout: archive.Layout) -> int:
    """Returns the byte at which the server starts, which need not be the one asked for."""
    length = response.headers.get("Content-Length")
    if getattr(response, "status", 200) == 206:
        sent = response.headers.get("Content-Range", "")
        if not sent.startswith(f"bytes {start}-"):
            raise SourceError(f"{url} sends the range {sent!r} where {start}- was asked for")
        total = sent.rsplit("/", 1)[-1]
    else:
        start = 0  # The server knows no ranges.
        total = length
    if total and total.isdigit() and int(total) != layout.size:
        raise SourceError(f"{url} has {int(total):,} bytes; {layout.file_name} has {layout.size:,}")
    return start


def _open(url: str, *, start: int, seconds: float):
    """Opens a URL from byte `start` on, within a number of seconds whatever happens.

    A look-up of a name has no time limit of its own and may hang, and a time limit on connecting
    counts for each address of a name. So the opening is done in a thread that is given up.

    Raises:
      SourceError: the URL cannot be opened, or not in time.
    """
    headers = {"User-Agent": "resnet_flax", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    outcome: list = []
    given_up = threading.Event()

    def work() -> None:
        try:
            request = urllib.request.Request(url, headers=headers)
            outcome.append(urllib.request.urlopen(request, timeout=STALL_SECONDS))
        except Exception as error:  # It is raised again, below.
            outcome.append(error)
        else:
            if given_up.is_set():
                outcome[0].close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        given_up.set()
        raise SourceError(f"{url}: no answer in {seconds:.3g} seconds")
    if isinstance(outcome[0], Exception):
        error = outcome[0]
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # It holds the connection.
        elif isinstance(error, urllib.error.URLError):
            error = error.reason  # Without the "<urlopen error ...>" around it.
        raise SourceError(f"{url}: {error}")
    return outcome[0]
