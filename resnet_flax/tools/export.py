r"""Exports a trained net, preprocessing included, as StableHLO that runs without this package.

    python -m resnet_flax.tools.export --weights=resnet20 --out=exported
    python -m resnet_flax.tools.export --check=exported

Written are `model.jaxexport`, for `jax.export.deserialize`: any number of images, on CPU, CUDA and
TPU; `model.stablehlo`, a portable artifact of `--batch_size` images for other programs that run
StableHLO; and, last, `model.json`, which describes them. Input is uint8 [b, H, W, 3], RGB, output
float32 [b, K]. Both programs are read again and compared with the net first.

What one version of jax writes, later ones read for six months at least, earlier ones perhaps not:
export with the oldest version that is to read it. `--check` tries it with the one at hand.
"""

import dataclasses
import hashlib
import importlib.metadata
import pathlib
from typing import Any

import jax
import numpy as np
from jax import export

from resnet_flax import pretrained
from resnet_flax.errors import UserError
from resnet_flax.runs import files
from resnet_flax.tools import entry

PLATFORMS = ("cpu", "cuda", "tpu")
PROGRAM, PORTABLE, DESCRIPTION = "model.jaxexport", "model.stablehlo", "model.json"

# Images of the comparison, and by how much the outputs may differ, relatively and absolutely: the
# compiler may fuse, and so round, in another way.
_COMPARED, _TOLERANCE = 3, 1e-3


def export_net(
    net: pretrained.Pretrained, directory: pathlib.Path, *, output: str, batch_size: int = 1
) -> dict[str, Any]:
    """Writes the programs of a net, and compares them with it.

    Args:
      net: see `pretrained.load_pretrained`.
      directory: to write in; it is made.
      output: "probabilities" or "logits".
      batch_size: of `model.stablehlo`.

    Returns:
      What `model.json` holds.

    Raises:
      UserError: the directory cannot be written, or the programs do not compute what the net does.
    """
    if batch_size < 1:
        raise UserError(f"--batch_size={batch_size} must be at least 1")

    def compute(images):
        logits = net.logits(images)
        return logits if output == "logits" else jax.nn.softmax(logits)

    def program(batch, platforms):
        images = jax.ShapeDtypeStruct((batch, net.size, net.size, 3), np.uint8)
        return export.export(jax.jit(compute), platforms=platforms)(images)

    (any_number,) = export.symbolic_shape("b")
    for_jax = program(any_number, PLATFORMS)
    # Of several platforms a program would have a further argument, and of any number of images
    # assertions about it, which not everything that runs StableHLO knows.
    fixed = program(batch_size, ("cpu",))
    contents = {PROGRAM: _serialized(for_jax), PORTABLE: fixed.mlir_module_serialized}
    random = np.random.RandomState(0)
    differences = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Without it the rest counts for nothing.
        (directory / DESCRIPTION).unlink(missing_ok=True)
        for name, content in contents.items():
            files.write_atomically(directory / name, content)
        read = {name: (directory / name).read_bytes() for name in contents}
        for run, batch in (
            (lambda x: _run(read[PROGRAM], x, directory, jax.__version__), _COMPARED),
            (dataclasses.replace(fixed, mlir_module_serialized=read[PORTABLE]).call, batch_size),
        ):
            images = random.randint(0, 256, (batch, net.size, net.size, 3), np.uint8)
            want, got = np.asarray(jax.jit(compute)(images)), np.asarray(run(images))
            differences.append(float(np.max(np.abs(got - want))))
            if not np.allclose(got, want, rtol=_TOLERANCE, atol=_TOLERANCE):
                raise UserError(
                    f"what was exported to {directory} differs from {net.name} by "
                    f"{differences[-1]:.3g}: it was removed"
                )
        description = _describe(net, output, batch_size, read, differences)
        files.write_json(directory / DESCRIPTION, description)
    except OSError as error:
        raise UserError(f"cannot write in {directory}: {error.strerror}") from error
    except UserError:
        for name in contents:
            (directory / name).unlink(missing_ok=True)
        raise
    return description


def _serialized(exported: export.Exported) -> bytes:
    try:
        return bytes(exported.serialize())
    except ImportError as error:
        raise UserError("this needs flatbuffers: pip install flatbuffers") from error


def _run(content: bytes, images: np.ndarray, directory: pathlib.Path, writer: str) -> np.ndarray:
    """The output of `model.jaxexport` with this `content`, which jax `writer` wrote."""
    try:
        return np.asarray(export.deserialize(bytearray(content)).call(images))
    except ImportError as error:
        raise UserError("this needs flatbuffers: pip install flatbuffers") from error
    except Exception as error:  # It depends on what a version of jax trips over.
        reason = str(error).strip().partition("\n")[0][:160]
        raise UserError(
            f"{directory / PROGRAM} does not run with jax {jax.__version__}; it was written by jax "
            f"{writer}: take that one or a later one, or export with this one ({reason})"
        ) from error


def _describe(
    net: pretrained.Pretrained,
    output: str,
    batch_size: int,
    contents: dict[str, bytes],
    differences: list[float],
) -> dict[str, Any]:
    training = {
        k: net.training[k] for k in ("model", "data", "test_error_last") if k in net.training
    }
    shape, classes = [net.size, net.size, 3], len(net.class_names)
    batches = {PROGRAM: "b", PORTABLE: batch_size}
    platforms = {PROGRAM: PLATFORMS, PORTABLE: "any"}
    return {
        "weights": pathlib.PurePath(net.name).name,
        "weights_sha256": net.sha256,
        "training": training,
        "class_names": net.class_names,
        "input": f"RGB, 0 to 255: the central square of an image whose shorter side was resized to "
        f"{net.short_side} pixels (bilinear)",
        "output": output,
        "files": {
            name: {
                "sha256": hashlib.sha256(content).hexdigest(),
                "input": {"dtype": "uint8", "shape": [batches[name], *shape]},
                "output": {"dtype": "float32", "shape": [batches[name], classes]},
                "platforms": platforms[name],
                "largest_difference_from_net": difference,
            }
            for (name, content), difference in zip(contents.items(), differences, strict=True)
        },
        "versions": {p: importlib.metadata.version(p) for p in ("jax", "jaxlib", "flax")},
    }


def check(directory: pathlib.Path) -> dict[str, Any]:
    """Reads what was exported, and runs `model.jaxexport` on this machine.

    Returns:
      What `model.json` holds.

    Raises:
      UserError: something is missing or damaged, or this version of jax cannot read it.
    """
    description = files.read_json(directory / DESCRIPTION)
    if description is None:
        raise UserError(
            f"{directory} holds no {DESCRIPTION}: nothing was exported to it, or in part"
        )
    try:
        for name, file in description["files"].items():
            content = (directory / name).read_bytes()
            if hashlib.sha256(content).hexdigest() != file["sha256"]:
                raise UserError(
                    f"{directory / name} is damaged: its SHA-256 is another; export it again"
                )
        file, writer = description["files"][PROGRAM], description["versions"]["jax"]
        images = np.zeros((2, *file["input"]["shape"][1:]), np.uint8)
        shape = (2, *file["output"]["shape"][1:])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{directory / DESCRIPTION} is damaged: {error}; export it again"
        ) from error
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error
    found = _run((directory / PROGRAM).read_bytes(), images, directory, writer)
    if found.shape != shape or not np.isfinite(found).all():
        raise UserError(f"{directory / PROGRAM} computes no {description['output']}")
    return description


def main(argv: list[str]) -> None:
    """Exports one net, or checks what was exported."""
    parser = entry.parser(__doc__)
    parser.add_argument("--weights", help="a published name, a file, or a run")
    parser.add_argument("--out", type=pathlib.Path, help="folder to write")
    parser.add_argument("--output", choices=("probabilities", "logits"), default="probabilities")
    parser.add_argument("--batch_size", type=int, default=1, help=f"images of {PORTABLE}")
    parser.add_argument("--check", type=pathlib.Path, help="folder of an export to read and run")
    args = parser.parse_args(argv)
    if args.check:
        if args.weights or args.out:
            raise UserError("--check goes without --weights and --out")
        description = check(args.check)
        print(
            f"{args.check}: {description['weights']}, written by jax "
            f"{description['versions']['jax']}, runs with jax {jax.__version__}"
        )
        return
    if not (args.weights and args.out):
        raise UserError("give --weights=NAME|FILE and --out=FOLDER, or --check=FOLDER")
    net = pretrained.load_pretrained(args.weights)
    description = export_net(net, args.out, output=args.output, batch_size=args.batch_size)
    for name, file in description["files"].items():
        print(
            f"wrote {args.out / name}: uint8 {file['input']['shape']} -> float32 "
            f"{file['output']['shape']} {args.output}; differs from the net by at most "
            f"{file['largest_difference_from_net']:.1e}"
        )
    print(f"It is read by jax {jax.__version__} and later ones, perhaps not by earlier ones.")


if __name__ == "__main__":
    entry.run(main)
