r"""Exports a trained net, preprocessing included, as StableHLO that runs without this package.

    python -m resnet_flax.tools.export --weights=resnet20 --out=exported
    python -m resnet_flax.tools.export --check=exported

This writes `model.jaxexport`, for `jax.export.deserialize`: any number of images, on CPU, CUDA and
TPU; `model.stablehlo`, a portable artifact of `--batch_size` images for other programs that run
StableHLO; and `model.json`, which describes them. Input is uint8 [b, H, W, 3], RGB, output float32
[b, K]. Both programs are compared with the net before anything is written.

What one version of jax writes, later ones read for at least six months, earlier ones perhaps not:
export with the oldest version that is to read it. `--check` tries the present one.
"""

import hashlib
import importlib.metadata
import pathlib
from typing import Any

import jax
import numpy as np
from jax import export

from resnet_flax import pretrained
from resnet_flax.errors import UserError, first_line
from resnet_flax.runs import files
from resnet_flax.tools import entry

PLATFORMS = ("cpu", "cuda", "tpu")
PROGRAM, PORTABLE, DESCRIPTION = "model.jaxexport", "model.stablehlo", "model.json"

# Images compared, and the relative and absolute tolerance: compilers round differently.
_COMPARED, _TOLERANCE = 3, 1e-3


def export_net(
    net: pretrained.Pretrained, directory: pathlib.Path, *, output: str, batch_size: int = 1
) -> dict[str, Any]:
    """Writes programs of a net whose output is "probabilities" or "logits"; returns `model.json`.

    Raises:
      UserError: the programs do not compute what the net does.
      OSError: the directory cannot be written.
    """

    @jax.jit
    def compute(images):
        logits = net.logits(images)
        return logits if output == "logits" else jax.nn.softmax(logits)

    def program(batch, platforms):
        images = jax.ShapeDtypeStruct((batch, net.size, net.size, 3), np.uint8)
        return export.export(compute, platforms=platforms)(images)

    serialized = bytes(program(export.symbolic_shape("b")[0], PLATFORMS).serialize())
    # With several platforms a program has one more argument, and with any number of images
    # assertions about it, which other programs that run StableHLO may not know.
    portable = program(batch_size, ("cpu",))
    contents, described = {PROGRAM: serialized, PORTABLE: portable.mlir_module_serialized}, {}
    for name, run, batch, shape, platforms in (
        (PROGRAM, export.deserialize(bytearray(serialized)).call, _COMPARED, "b", PLATFORMS),
        (PORTABLE, portable.call, batch_size, batch_size, "any"),
    ):
        random = np.random.RandomState(0)
        images = random.randint(0, 256, (batch, net.size, net.size, 3), np.uint8)
        want, got = np.asarray(compute(images)), np.asarray(run(images))
        difference = float(np.max(np.abs(got - want)))
        if not np.allclose(got, want, rtol=_TOLERANCE, atol=_TOLERANCE):
            raise UserError(f"{name} differs from {net.name} by {difference:.3g}: not written")
        described[name] = {
            "sha256": hashlib.sha256(contents[name]).hexdigest(),
            "input": {"dtype": "uint8", "shape": [shape, net.size, net.size, 3]},
            "output": {"dtype": "float32", "shape": [shape, len(net.class_names)]},
            "platforms": platforms,
            "largest_difference_from_net": difference,
        }
    kept = ("model", "data", "test_error_last")
    description = {
        "weights": pathlib.PurePath(net.name).name,
        "weights_sha256": net.sha256,
        "training": {key: net.training[key] for key in kept if key in net.training},
        "class_names": net.class_names,
        "input": f"RGB, 0 to 255: the central square of an image whose shorter side was resized to "
        f"{net.short_side} pixels (bilinear)",
        "output": output,
        "files": described,
        "versions": {p: importlib.metadata.version(p) for p in ("jax", "jaxlib", "flax")},
    }
    directory.mkdir(parents=True, exist_ok=True)
    # The description comes last: it declares the rest complete.
    (directory / DESCRIPTION).unlink(missing_ok=True)
    for name, content in contents.items():
        files.write_atomically(directory / name, content)
    files.write_json(directory / DESCRIPTION, description)
    return description


def check(directory: pathlib.Path) -> dict[str, Any]:
    """Verifies an export and runs `model.jaxexport` on this machine; returns `model.json`.

    Raises:
      UserError: something is missing or damaged, or this version of jax cannot read it.
    """
    description = files.read_json(directory / DESCRIPTION)
    if description is None:
        raise UserError(f"{directory} holds no {DESCRIPTION}: export to it first")
    try:
        for name, file in description["files"].items():
            if files.sha256_of(directory / name) != file["sha256"]:
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
    program = directory / PROGRAM
    try:
        found = np.asarray(export.deserialize(bytearray(program.read_bytes())).call(images))
    except Exception as error:  # Anything that a version of jax stumbles over.
        raise UserError(
            f"{program} does not run with jax {jax.__version__}; it was written by jax {writer}: "
            f"take that one or a later one, or export with this one ({first_line(error)})"
        ) from error
    if found.shape != shape or not np.isfinite(found).all():
        raise UserError(f"{program} computes no {description['output']}")
    return description


def main(argv: list[str]) -> None:
    """Exports one net, or checks an export."""
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
        said = f"{description['weights']}, written by jax {description['versions']['jax']}"
        print(f"{args.check}: {said}, runs with jax {jax.__version__}")
        return
    if not (args.weights and args.out):
        raise UserError("give --weights=NAME|FILE and --out=FOLDER, or --check=FOLDER")
    if args.batch_size < 1:
        raise UserError(f"--batch_size={args.batch_size} must be at least 1")
    net = pretrained.load_pretrained(args.weights)
    with entry.writing(args.out):
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
