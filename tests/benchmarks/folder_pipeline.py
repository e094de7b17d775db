"""How many images a second the pipeline of a folder yields, beside Pillow's own decoding.

    python tests/benchmarks/folder_pipeline.py --folder=DIR --rounds=5

Without --folder it makes 512 JPEG files of 500 x 375 pixels, much like ImageNet's in size and
bytes. All variants read the same files, in turns, whole batches of 64; times are of the second half
of each turn, when caches are warm and worker processes have begun.
"""

import argparse
import itertools
import json
import os
import pathlib
import statistics
import tempfile
import time

import numpy as np
from PIL import Image

from resnet_flax import data
from resnet_flax.data import streaming

BATCH = 64


def make_folder(root: pathlib.Path, count: int) -> None:
    """Smooth pictures with some noise: files of about 60 kB."""
    random = np.random.RandomState(0)
    for i in range(count):
        small = Image.fromarray(random.randint(0, 256, (24, 32, 3)).astype(np.uint8))
        large = np.asarray(small.resize((500, 375), Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(large + random.randint(-12, 13, large.shape), 0, 255).astype(np.uint8)
        folder = root / f"class{i % 2}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(noisy).save(folder / f"{i:04}.jpg", quality=80)


def pillow_decode(split):
    """Reading and decoding only, in one thread."""
    for i in itertools.cycle(range(len(split))):
        with Image.open(split.name(i)) as image:
            image.load()
        yield 1


def pillow_usual(split):
    """Read, decode, resize the shorter side to 256, cut out the centre: the usual way."""
    for i in itertools.cycle(range(len(split))):
        with Image.open(split.name(i)) as image:
            image = image.convert("RGB")
        scale = 256 / min(image.size)
        image = image.resize([round(s * scale) for s in image.size], Image.Resampling.BILINEAR)
        left, top = (image.width - 224) // 2, (image.height - 224) // 2
        np.asarray(image.crop((left, top, left + 224, top + 224)))
        yield 1


def pipeline(split, workers):
    """What a training run takes its batches from."""
    ordered = streaming.TrainBatches(
        split, np.arange(BATCH), 0, seed=0, batch_size=BATCH, first=0, last=10**6
    )
    ahead = streaming.read_ahead(ordered, workers)
    try:
        while True:
            yield len(next(ahead)["labels"])
    finally:
        ahead.close()


def rate(images, count: int) -> float:
    """Images a second, over `count` of them after as many that do not count."""
    done = 0
    while done < count:
        done += next(images)
    start, done = time.perf_counter(), 0
    while done < count:
        done += next(images)
    return done / (time.perf_counter() - start)


def main() -> None:
    """Prints a line for each variant, and one of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=512, help="a turn")
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    variants = {
        "Pillow, decoding only, 1 core": (pillow_decode, 1),
        "Pillow, decode, resize, crop, 1 core": (pillow_usual, 1),
        "pipeline, 1 worker": (lambda split: pipeline(split, 1), 1),
        f"pipeline, {cores} workers": (lambda split: pipeline(split, cores), cores),
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(args.folder or scratch)
        if not args.folder:
            make_folder(folder, 512)
        geometry = streaming.Geometry(224, (256, 480), 224, 256)
        split = data.load("folder", data_dir=folder, geometry=geometry).train
        size = statistics.mean(os.path.getsize(split.name(i)) for i in range(len(split)))
        print(f"{len(split)} files of {size / 1000:.0f} kB on average, {cores} cores")
        rates = {name: [] for name in variants}
        for _ in range(args.rounds):
            for name, (make, _) in variants.items():
                images = make(split)
                rates[name].append(rate(images, args.images))
                images.close()
    for name, (_, used) in variants.items():
        per_core = sorted(r / used for r in rates[name])
        print(
            f"{name:40} {statistics.median(rates[name]):7.1f} images/s, a core "
            f"{statistics.median(per_core):6.1f} ({per_core[0]:.1f} to {per_core[-1]:.1f})"
        )
    print(json.dumps(rates))


if __name__ == "__main__":
    main()
