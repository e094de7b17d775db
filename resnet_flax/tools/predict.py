r"""Prints the five likeliest classes of images, with their probabilities.

    python -m resnet_flax.tools.predict --weights=resnet20 photo.jpg holiday/
    python -m resnet_flax.tools.predict --weights=runs/quickstart/seed0/weights.safetensors \
        --json --strip=strip.png digits/

Images may be of any size, mode and format that Pillow decodes; the net sees the central square.
Folders are searched, with their sub-folders, for files with an image's extension. A file that
cannot be read is named and passed over; the exit status is then 1.
"""

import io
import itertools
import json
import os
import pathlib
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from resnet_flax import pretrained
from resnet_flax.data import image_files
from resnet_flax.errors import UserError
from resnet_flax.runs.files import write_atomically
from resnet_flax.tools import entry

# The picture of predictions: most images on it, images in a row, side of an image in pixels.
_STRIP, _COLUMNS, _SIDE = 64, 8, 112


def find_images(paths: Iterable[str]) -> Iterator[str]:
    """The files among `paths`, and the images in the folders among them.

    A folder that cannot be listed is returned itself, and then cannot be read.
    """
    for path in paths:
        if os.path.isdir(path):
            failed = []
            yield from image_files.find(path, {os.path.realpath(path)}, failed.append)
            yield from (error.filename for error in failed)
        else:
            yield path


def predict(
    net: pretrained.Pretrained, files: Iterable[str], *, thumbnails: int = 0
) -> Iterator[dict[str, Any]]:
    """Predicts image files, `pretrained.BATCH` at a time, in order.

    Yields:
      `image`, the path, and either `error`, or `predictions`, a list of `class` and `probability`,
      the likeliest first, and for the first `thumbnails` images `thumbnail`, uint8 [H, W, 3].
    """
    files = iter(files)
    while batch := [{"image": file} for file in itertools.islice(files, pretrained.BATCH)]:
        readable, crops = [], []
        for found in batch:
            try:
                crop = net.crop(found["image"])
                if thumbnails:
                    found["thumbnail"] = net.crop(found["image"], _SIDE)
                    thumbnails -= 1
            except UserError as error:
                found["error"] = str(error)
            else:
                readable.append(found)
                crops.append(crop)
        probabilities = net.probabilities(np.stack(crops)) if crops else ()
        for found, row in zip(readable, probabilities, strict=True):
            ranked = net.rank(row)
            found["predictions"] = [{"class": c, "probability": round(p, 6)} for c, p in ranked]
        yield from batch


def draw_strip(drawn: list[tuple[np.ndarray, dict[str, Any]]]) -> bytes:
    """A PNG of thumbnails with the likeliest class of each, see `predict`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(drawn), _COLUMNS)
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(1.4 * columns, 1.85 * rows), dpi=100, layout="constrained")
    for number, (thumbnail, found) in enumerate(drawn, 1):
        axes = figure.add_subplot(rows, columns, number)
        axes.axis("off")
        axes.imshow(thumbnail)
        best = found["predictions"][0]
        lines = _short(best["class"]), f"{100 * best['probability']:.1f} %", _short(found["image"])
        # A class may be called "$5", which is no formula.
        axes.set_title("\n".join(lines), fontsize=8, parse_math=False)
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # The font may lack a script.
        FigureCanvasAgg(figure).print_png(content)
    return content.getvalue()


def _short(text: str) -> str:
    text = _printable(os.path.basename(text))
    return text if len(text) <= 16 else text[:15] + "…"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def main(argv: list[str]) -> None:
    """Predicts the named images."""
    parser = entry.parser(__doc__)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders")
    parser.add_argument("--weights", required=True, help="a published name, a file, or a run")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--strip", type=pathlib.Path, help=f"a PNG of the first {_STRIP} to write")
    args = parser.parse_args(argv)
    strip = args.strip
    if strip and (strip.suffix.lower() != ".png" or not strip.parent.is_dir()):
        raise UserError(f"--strip={strip} must be a name ending in .png in a folder that exists")
    net = pretrained.load_pretrained(args.weights)
    results, drawn = [], []
    for found in predict(net, find_images(args.images), thumbnails=_STRIP if strip else 0):
        if "thumbnail" in found:
            drawn.append((found.pop("thumbnail"), found))
        if "error" in found:
            print(_printable(found["error"]), file=sys.stderr)
        elif not args.json:
            best = (f"{p['class']} {100 * p['probability']:.1f} %" for p in found["predictions"])
            print(_printable(f"{found['image']}: {', '.join(best)}"))
        results.append(found)
    if drawn:
        with entry.writing(strip):
            write_atomically(strip, draw_strip(drawn))
    if args.json:
        print(json.dumps(results, indent=2))
    if not results:
        raise UserError(f"there are no images in {', '.join(args.images)}")
    if unreadable := sum("error" in found for found in results):
        raise UserError(f"{unreadable} of {len(results)} images could not be read")


if __name__ == "__main__":
    entry.run(main)
