"""Which files of a folder are images."""

import os
from collections.abc import Callable, Iterator

# A fixed list, not what this Pillow can decode: a folder must be the same data set everywhere.
EXTENSIONS = frozenset(
    ".avif .bmp .gif .ico .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tga .tif .tiff "
    ".webp".split()
)
"""How the names of image files end, in lower case."""

_SYSTEM_FOLDERS = frozenset({"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN"})


def is_visible(name: str) -> bool:
    """Whether a file or folder of this name is neither hidden nor made by an operating system."""
    return not name.startswith(".") and name not in _SYSTEM_FOLDERS


def find(
    folder: str | os.PathLike, seen: set[str], onerror: Callable[[OSError], None] | None = None
) -> Iterator[str]:
    """Paths of the visible image files below a folder, sorted by name.

    Links are followed, into each folder once: `seen` has the real paths of folders not to enter,
    and those that are entered are added. A folder that cannot be listed is passed over, or given to
    `onerror`.
    """
    for place, folders, files in os.walk(folder, onerror=onerror, followlinks=True):
        real = {os.path.realpath(os.path.join(place, f)): f for f in folders if is_visible(f)}
        folders[:] = sorted(name for path, name in real.items() if path not in seen)
        seen.update(real)
        for file in sorted(filter(is_visible, files)):
            if os.path.splitext(file)[1].lower() in EXTENSIONS:
                yield os.path.join(place, file)
