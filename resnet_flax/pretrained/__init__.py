"""Trained nets, ready to use: the ones published with the package, and any weights file.

`index.json` here lists the published ones; `tools.publish` writes it.
"""

import dataclasses
import difflib
import functools
import hashlib
import os
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from resnet_flax import data, models
from resnet_flax.config import base_config
from resnet_flax.data import images
from resnet_flax.errors import UserError
from resnet_flax.models import layout
from resnet_flax.models.resnet import ResNet
from resnet_flax.runs import weights
from resnet_flax.runs.files import read_json
from resnet_flax.training import augment, inputs
from resnet_flax.training.state import abstract_variables

FOLDER = pathlib.Path(__file__).parent
"""Where the published weights lie."""

BATCH = 32
"""Most images that are computed at once."""

# Side, in pixels, of the images of the data sets that are held in memory: CIFAR and the digits.
_SIDE_IN_MEMORY = 32
# A file with more bytes is no image that would be decoded: see `images.MAX_PIXELS`.
_LARGEST_FILE = 2**30

Picture = str | os.PathLike | bytes | images.Image.Image | np.ndarray
"""An image: a path, a file's content, one of Pillow, or uint8 [H, W] or [H, W, 1 | 3 | 4]."""


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
    """A trained net with all that is needed to use it.

    Attributes:
      name: of the published weights, or the path of the file.
      model: the net; it maps normalised images to logits.
      variables: its `{"params": …, "batch_stats": …}`, float32, in its own layout (canonical but
        for very deep nets, see `models.layout`).
      mean: float32 [H, W, C] or [C], what is subtracted from pixel values 0 to 255.
      std: float32 [1] or [C], what they are divided by then.
      class_names: one a class.
      training: how the weights came about: of a run, its result and its configuration.
      size: side of the square images that the net takes, pixels.
      short_side: what the shorter side of an image is resized to before the central square is cut
        out of it, pixels.
      sha256: of the file.
    """

    name: str
    model: ResNet = dataclasses.field(repr=False)
    variables: dict[str, Any] = dataclasses.field(repr=False)
    mean: np.ndarray = dataclasses.field(repr=False)
    std: np.ndarray = dataclasses.field(repr=False)
    class_names: tuple[str, ...]
    training: dict[str, Any] = dataclasses.field(repr=False)
    size: int
    short_side: int
    sha256: str

    def crop(self, picture: Picture, size: int | None = None) -> np.ndarray:
        """The part of an image that the net sees, of any image that `data.images.decode` reads.

        Args:
          picture: the image.
          size: side of the result, pixels; None: what the net takes.

        Returns:
          uint8 [size, size, 3].

        Raises:
          UserError: it cannot be read.
        """
        size = size or self.size
        try:
            image = _decode(picture, least=max(size, self.short_side))
        except (OSError, ValueError) as error:
            name = picture if isinstance(picture, (str, os.PathLike)) else "an image"
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{name} cannot be read: {reason}") from error
        box = images.central_box(*image.size, short_side=self.short_side, size=self.size)
        return images.crop_resized(image, box, size)

    def logits(self, crops: jax.Array) -> jax.Array:
        """Float32 [B, K] of uint8 [B, size, size, 3]; a pure function, preprocessing included."""
        return self._apply(self.variables, crops)

    def _apply(self, variables: dict[str, Any], crops: jax.Array) -> jax.Array:
        normalized = augment.normalize(crops, self.mean, self.std)
        return self.model.apply(variables, normalized, train=False)

    @functools.cached_property
    def _compiled(self):
        apply = jax.jit(lambda variables, crops: jax.nn.softmax(self._apply(variables, crops)))
        return functools.partial(apply, jax.device_put(self.variables))

    def probabilities(self, crops: np.ndarray) -> np.ndarray:
        """Float32 [N, K] of uint8 [N, size, size, 3]; `BATCH` images at a time.

        Raises:
          ValueError: the images are of another shape or type.
        """
        crops = np.asarray(crops)
        shape = (self.size, self.size, 3)
        if crops.dtype != np.uint8 or crops.shape[1:] != shape:
            raise ValueError(f"images are {crops.dtype} {crops.shape}; must be uint8 [N, *{shape}]")
        found = [np.zeros((0, len(self.class_names)), np.float32)]
        # One program, whatever the number of images: the last batch is filled up.
        batch = min(len(crops), BATCH)
        for start in range(0, len(crops), BATCH):
            part = crops[start : start + BATCH]
            filled = np.concatenate([part, np.zeros((batch - len(part), *shape), np.uint8)])
            found.append(np.asarray(self._compiled(filled))[: len(part)])
        return np.concatenate(found)

    def predict(
        self, pictures: Picture | Iterable[Picture], *, top: int = 5
    ) -> list[list[tuple[str, float]]]:
        """The likeliest classes of each image, with their probabilities, the likeliest first.

        Args:
          pictures: one image, or several, of any sizes; or uint8 [N, H, W, 1 | 3 | 4].
          top: number of classes; of fewer classes, all.

        Raises:
          UserError: an image cannot be read.
        """
        one = isinstance(pictures, (str, os.PathLike, bytes)) or not isinstance(pictures, Iterable)
        if one or getattr(pictures, "ndim", 4) < 4:
            pictures = [pictures]
        crops = [self.crop(picture) for picture in pictures]
        if not crops:
            return []
        return [self.rank(row, top=top) for row in self.probabilities(np.stack(crops))]

    def rank(self, probabilities: np.ndarray, *, top: int = 5) -> list[tuple[str, float]]:
        """The `top` likeliest classes of one image's probabilities [K]."""
        order = np.argsort(-probabilities, kind="stable")[:top]
        return [(self.class_names[k], float(probabilities[k])) for k in order]


def _decode(picture: Picture, *, least: int) -> images.Image.Image:
    if isinstance(picture, images.Image.Image):
        return images.upright_rgb(picture)
    if hasattr(picture, "__array__"):
        array = np.asarray(picture)
        fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
        if array.dtype != np.uint8 or not fits or not array.size:
            raise ValueError(
                f"it is {array.dtype} {list(array.shape)}: give pixel values 0 to 255 as uint8 "
                "[H, W] or [H, W, 1 | 3 | 4]"
            )
        grey = array.ndim == 3 and array.shape[2] == 1
        return images.upright_rgb(images.Image.fromarray(array[..., 0] if grey else array))
    if not isinstance(picture, (bytes, str, os.PathLike)):
        raise ValueError(f"it is a {type(picture).__name__}, and no path, image or array")
    if not isinstance(picture, bytes):
        path = pathlib.Path(picture)
        if not path.exists():
            raise ValueError("there is no such file")
        if not path.is_file():
            raise ValueError("it is a folder" if path.is_dir() else "it is not a file")
        if path.stat().st_size > _LARGEST_FILE:
            raise ValueError(f"it has more than {_LARGEST_FILE:,} bytes")
        picture = path.read_bytes()
    return images.decode(picture, at_least=(least, least))


def read_index(folder: pathlib.Path = FOLDER) -> dict[str, dict[str, Any]]:
    """What is published, by name: `file`, `sha256`, `model`, `test_error`, `results` and others.

    Raises:
      UserError: the index is damaged.
    """
    return read_json(folder / "index.json") or {}


def load_pretrained(source: str | os.PathLike) -> Pretrained:
    """Loads a published net by its name, or any weights file of this package by its path.

        net = resnet_flax.load_pretrained("resnet20")
        [[(name, probability), *others]] = net.predict("photo.jpg")

    Args:
      source: a name, a weights file, or the directory of a finished run.

    Raises:
      UserError: there is no such name or file (the message lists the names), or it is damaged.
    """
    path, digest = locate(source)
    return assemble(str(source), weights.load(path), digest)


def locate(source: str | os.PathLike) -> tuple[pathlib.Path, str]:
    """The weights file that a path, a run's directory or a published name stands for; its SHA-256.

    A file or directory of the user's own comes before published weights of that name.

    Raises:
      UserError: as `load_pretrained`.
    """
    index = read_index()
    path = pathlib.Path(source).expanduser()
    entry = None if path.exists() else index.get(str(source))
    path = FOLDER / entry["file"] if entry else path
    if path.is_dir():
        path /= "weights.safetensors"
        if not path.exists():
            seeds = sorted(str(p.parent) for p in path.parent.glob(f"seed*/{path.name}"))
            todo = f"name one of its runs, {', '.join(seeds)}" if seeds else "finish the run first"
            raise UserError(f"{source} holds no weights.safetensors: {todo}")
    if not path.is_file():
        raise UserError(
            f"weights file {path} of {source!r} is missing: install the package again"
            if entry
            else _no_such(str(source), index)
        )
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"weights file {path} cannot be read: {error.strerror}") from error
    if entry and digest != entry["sha256"]:
        raise UserError(
            f"weights file {path} is damaged: its SHA-256 is {digest[:12]}…, not "
            f"{entry['sha256'][:12]}… as published; install the package again"
        )
    return path, digest


def _no_such(source: str, index: dict[str, dict[str, Any]]) -> str:
    listed = [f"{n} ({100 * e['test_error']:.2f} % on {e['data']})" for n, e in index.items()]
    there_are = f"there are: {', '.join(listed)}" if listed else "none is published yet"
    if os.sep in source or source.endswith(".safetensors"):
        return f"weights file {source} does not exist; of published ones {there_are}"
    if source in models.ARCHITECTURES:
        return f"no weights are published yet for {source}; {there_are}; or give a weights file"
    near = difflib.get_close_matches(source, index, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"no published weights are called {source!r}{hint}; {there_are}; or give a weights file"


def assemble(name: str, loaded: weights.Weights, sha256: str) -> Pretrained:
    """Makes the net of a weights file's content.

    Raises:
      UserError: what the file says of the net, its classes or its images contradicts itself.
    """
    try:
        options = dict(loaded.model)
        model = models.create_model(options.pop("name"), **options)
    except TypeError as error:
        raise UserError(f"{name} describes no net of this version: {loaded.model}") from error
    template = abstract_variables(model)
    variables = weights.fit(loaded.variables, template, name)
    if models.get_architecture(loaded.model["name"]).scan_pays:
        model, variables = model.clone(scan=True), layout.to_scanned(variables)
    class_names = loaded.class_names or tuple(map(str, range(model.num_classes)))
    if len(class_names) != model.num_classes or not all(isinstance(c, str) for c in class_names):
        raise UserError(
            f"{name} has {len(class_names)} class names, but its net {model.num_classes} outputs"
        )
    size, short_side = _geometry(loaded)
    weights.check_preprocessing(loaded.mean, loaded.std, (size, size, 3), name)
    return Pretrained(
        name,
        model,
        variables,
        loaded.mean,
        loaded.std,
        class_names,
        loaded.training,
        size,
        short_side,
        sha256,
    )


def _geometry(loaded: weights.Weights) -> tuple[int, int]:
    """Sizes that the net's images had when it was tested: see `Pretrained`."""
    trained = loaded.training.get("config")
    trained = trained if isinstance(trained, dict) else {}
    config = base_config()
    config.model.name = loaded.model["name"]
    for key in ("image_size", "eval_short_side"):
        value = trained.get(f"data.{key}")
        if isinstance(value, int) and value > 0:
            config.data[key] = value
    if trained.get("data.name") in [name for name in data.NAMES if name not in data.STREAMED]:
        config.data.image_size = config.data.eval_short_side = _SIDE_IN_MEMORY
    if loaded.mean.ndim == 3 and loaded.mean.shape[0] != config.data.image_size:
        # A mean of every pixel goes with images of its own size and no others.
        config.data.image_size, config.data.eval_short_side = loaded.mean.shape[0], 0
    geometry = inputs.make_geometry(config)
    return geometry.size, geometry.eval_short_side
