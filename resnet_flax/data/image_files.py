"""Which files of a folder are images."""

import os
from collections.abc import Callable, Iterator

# Not what this version of Pillow can decode: the same folder must be the same data set everywhere.
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
    """Paths of the visible image files below a folder, in order of name.

    Links are followed, into each folder once.

    Args:
      folder: where to begin.
      seen: real paths of folders that are not entered from others; those that are, are added.
      onerror: told of folders that cannot be listed; None: they are passed over.
    """
    for place, folders, files in os.walk(folder, onerror=onerror, followlinks=True):
        real = {os.path.realpath(os.path.join(place, f)): f for f in folders if is_visible(f)}
        folders[:] = sorted(name for path, name in real.items() if path not in seen)
        seen.update(real)
        for file in sorted(filter(is_visible, files)):
            if os.path.splitext(file)[1].lower() in EXTENSIONS:
                yield os.path.join(place, file)
