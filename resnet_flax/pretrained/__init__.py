"""Trained nets, ready to use: published weights and any weights file or run."""

import dataclasses
import functools
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
from resnet_flax.runs import published, weights
from resnet_flax.training import augment, inputs
from resnet_flax.training.state import abstract_variables

BATCH = 32
"""Most images that are computed at once."""

# Side, in pixels, of the images of CIFAR and the digits.
_SIDE_IN_MEMORY = 32

Picture = str | os.PathLike | bytes | images.Image.Image | np.ndarray
"""A path, a file's content, an image of Pillow, or uint8 [H, W] or [H, W, 1 | 3 | 4]."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Pretrained:
    """A trained net with its preprocessing and class names; see also `weights.Weights`."""

    name: str  # the published name, or the path of the file
    model: ResNet  # from normalised images to logits
    variables: dict[str, Any]  # float32, in the model's layout (canonical unless `model.scan`)
    mean: np.ndarray
    std: np.ndarray
    class_names: tuple[str, ...]
    training: dict[str, Any]
    size: int  # side of the square images that the net takes, pixels
    short_side: int  # to which an image is resized before its centre is cut out, pixels
    sha256: str  # of the file

    def __repr__(self) -> str:
        return f"Pretrained({self.name!r}, size={self.size}, {len(self.class_names)} classes)"

    def crop(self, picture: Picture, size: int | None = None) -> np.ndarray:
        """The part of an image that the net sees, uint8 [size, size, 3], by default of `self.size`.

        Raises:
          UserError: the image cannot be read.
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
        """Float32 [N, K] of uint8 [N, size, size, 3], computed `BATCH` images at a time.

        Raises:
          ValueError: the images are of another shape or type.
        """
        crops = np.asarray(crops)
        shape = (self.size, self.size, 3)
        if crops.dtype != np.uint8 or crops.shape[1:] != shape:
            raise ValueError(f"images are {crops.dtype} {crops.shape}; must be uint8 [N, *{shape}]")
        # The last batch is filled up, so that one program is enough.
        count, batch = len(crops), min(len(crops), BATCH)
        found = [np.zeros((0, len(self.class_names)), np.float32)]
        for start in range(0, count, BATCH):
            part = crops[start : start + BATCH]
            filled = np.concatenate([part, np.zeros((batch - len(part), *shape), np.uint8)])
            found.append(np.asarray(self._compiled(filled)))
        return np.concatenate(found)[:count]

    def predict(
        self, pictures: Picture | Iterable[Picture], *, top: int = 5
    ) -> list[list[tuple[str, float]]]:
        """The `top` likeliest classes of each image with their probabilities, likeliest first.

        `pictures` is one image or several, of any sizes, or uint8 [N, H, W, 1 | 3 | 4].

        Raises:
          UserError: an image cannot be read.
        """
        one = isinstance(pictures, (str, os.PathLike, bytes)) or not isinstance(pictures, Iterable)
        if one or getattr(pictures, "ndim", 4) < 4:
            pictures = [pictures]
        crops = np.array([self.crop(picture) for picture in pictures], np.uint8)
        probabilities = self.probabilities(crops.reshape(-1, self.size, self.size, 3))
        return [self.rank(row, top=top) for row in probabilities]

    def rank(self, probabilities: np.ndarray, *, top: int = 5) -> list[tuple[str, float]]:
        """The `top` likeliest classes of one image's probabilities [K]."""
        order = np.argsort(-probabilities, kind="stable")[:top]
        return [(self.class_names[k], float(probabilities[k])) for k in order]


def _decode(picture: Picture, *, least: int) -> images.Image.Image:
    if isinstance(picture, images.Image.Image):
        return images.upright_rgb(picture)
    if isinstance(picture, (str, os.PathLike)):
        path = pathlib.Path(picture)
        # Opening a named pipe would wait for a writer.
        if not path.is_file():
            raise ValueError("it is not a file" if path.exists() else "there is no such file")
        picture = path.read_bytes()
    if isinstance(picture, bytes):
        return images.decode(picture, at_least=(least, least))
    if not hasattr(picture, "__array__"):
        raise ValueError(f"it is a {type(picture).__name__}, and no path, image or array")
    array = np.asarray(picture)
    fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if array.dtype != np.uint8 or not fits or not array.size:
        raise ValueError(
            f"it is {array.dtype} {list(array.shape)}: give pixel values 0 to 255 as uint8 "
            "[H, W] or [H, W, 1 | 3 | 4]"
        )
    grey = array.shape[2:] == (1,)
    return images.upright_rgb(images.Image.fromarray(array[..., 0] if grey else array))


def load_pretrained(source: str | os.PathLike) -> Pretrained:
    """Loads a net by its published name, or from a weights file or a run.

        net = resnet_flax.load_pretrained("resnet20")
        [[(name, probability), *others]] = net.predict("photo.jpg")

    Raises:
      UserError: `source` is none of these (the message lists the names), or is damaged.
    """
    path, digest = published.locate(source)
    return assemble(str(source), weights.load(path), digest)


def build(loaded: weights.Weights, source: str) -> tuple[ResNet, dict[str, Any]]:
    """The net that a weights file describes, and its variables, in the canonical layout.

    Raises:
      UserError: this version has no such net, or the variables are those of another.
    """
    try:
        model = models.create_model(**loaded.model)
    except TypeError as error:
        raise UserError(f"{source} describes no net of this version: {loaded.model}") from error
    return model, weights.fit(loaded.variables, abstract_variables(model), source)


def assemble(name: str, loaded: weights.Weights, sha256: str) -> Pretrained:
    """A usable net; raises a UserError if the weights file contradicts itself."""
    model, variables = build(loaded, name)
    if models.get_architecture(loaded.model["name"]).scan_pays:
        model, variables = model.clone(scan=True), layout.to_scanned(variables)
    class_names = loaded.class_names or tuple(map(str, range(model.num_classes)))
    if len(class_names) != model.num_classes or not all(isinstance(c, str) for c in class_names):
        raise UserError(
            f"{name} has {len(class_names)} class names, but its net {model.num_classes} outputs"
        )
    mean, std = loaded.mean, loaded.std
    size, short_side = _image_sizes(loaded)
    weights.check_preprocessing(mean, std, (size, size, 3), name)
    return Pretrained(
        name, model, variables, mean, std, class_names, loaded.training, size, short_side, sha256
    )


def _image_sizes(loaded: weights.Weights) -> tuple[int, int]:
    """`size` and `short_side` of `Pretrained`: as when the net was tested."""
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
        # A mean per pixel only fits images of its own size.
        config.data.image_size, config.data.eval_short_side = loaded.mean.shape[0], 0
    geometry = inputs.make_geometry(config)
    return geometry.size, geometry.eval_short_side
