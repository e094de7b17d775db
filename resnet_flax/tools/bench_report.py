"""What `tools.bench` makes of its measurements: images a second, shares of the ceilings, tables."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

# Forwards once; backwards once towards the weights and once towards the activations.
_PASSES = 3


def spread(values: Sequence[float]) -> dict[str, float]:
    """`median`, `min` and `max` of some timings."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def rates(seconds: Sequence[float], images: int) -> dict[str, float]:
    """The spread of images a second, where `images` of them took each of `seconds`."""
    return spread([images / s for s in seconds])


def step_operations(multiply_adds: int, batch_size: int) -> int:
    """Operations of a training step, two to a multiply-add of a convolution or dense layer.

    Three passes; the gradient towards the images, which nobody takes, is counted all the same.
    """
    return 2 * _PASSES * multiply_adds * batch_size


def summarize(measured: dict[str, Any], batch_size: int) -> dict[str, Any]:
    """What follows from a worker's measurements, see `bench_worker.measure`.

    Returns:
      Of these keys those that were measured:
      `train_images_per_second`, `eval_images_per_second`, `step_seconds`: spreads;
      `step_operations`: see there; `step_operations_xla`: by XLA's count, over all devices, see
        `bench_limits.program`;
      `step_bytes`: read and written in a step, by XLA's count of each instruction's operands and
        results, over all devices, and where it does not know calls of cuDNN with theirs; None
        where a net's blocks are a loop, which XLA counts once;
      `matmul_share`, `bandwidth_share`: of the two ceilings, 0 to 1, at the median step; the second
        can be above 1, where operands are still in a cache;
      `limit_seconds`: the larger of the times that operations and bytes need at the ceilings;
      `above_limit`: the median step over that.
    """
    found: dict[str, Any] = {}
    operations = step_operations(measured["multiply_adds"], batch_size)
    devices, program = measured["devices"], measured["program"]
    counted = (program["operations"] or 0) * devices
    moved = (program["bytes_accessed"] or 0) * devices
    if counted > operations * measured["chunk_steps"] / 2:
        # Every turn of the loop has been counted.
        counted, moved = (x / measured["chunk_steps"] for x in (counted, moved))
    moved -= program["resident_bytes_counted"] * devices
    if counted < operations / 2:
        # Convolutions are calls of a library; or else in a loop over blocks.
        moved = moved + program["library_bytes"] * devices if program["library_bytes"] else 0
    if measured["scanned"] or moved <= 0:
        moved = None
    found |= {
        "step_operations": operations,
        "step_operations_xla": counted,
        "step_bytes": moved,
    }
    if "eval_seconds" in measured:
        found["eval_images_per_second"] = rates(measured["eval_seconds"], measured["eval_examples"])
    if "step_seconds" not in measured:
        return found
    found["step_seconds"] = spread(measured["step_seconds"])
    found["train_images_per_second"] = rates(measured["step_seconds"], batch_size)
    if "ceilings" not in measured:
        return found
    step, ceilings = found["step_seconds"]["median"], measured["ceilings"]
    needs = [operations / ceilings["operations"], (moved or 0) / ceilings["bytes"]]
    return found | {
        "matmul_share": needs[0] / step,
        "bandwidth_share": needs[1] / step if moved else None,
        "limit_seconds": max(needs),
        "above_limit": step / max(needs),
    }


Column = tuple[str, Callable[[dict[str, Any]], str]]


def _range(values: dict[str, float]) -> str:
    return f"{values['median']:,.0f} ({values['min']:,.0f} to {values['max']:,.0f})"


def _megabytes(value: float | None) -> str:
    return f"{value / 1e6:,.0f}"


def _peak(memory: dict[str, Any]) -> str:
    return f"{_megabytes(memory['bytes'])} {memory['of']}"


_HEAD: list[Column] = [
    ("net", lambda r: r["case"]["model"]),
    ("batch", lambda r: str(r["case"]["batch_size"])),
    ("dtype", lambda r: r.get("measured", r["case"])["dtype"]),
    ("devices", lambda r: str(r.get("measured", r["case"])["devices"])),
]
SPEED: list[Column] = [
    *_HEAD,
    ("train images/s", lambda r: _range(r["summary"]["train_images_per_second"])),
    ("ms/step", lambda r: f"{1e3 * r['summary']['step_seconds']['median']:.3g}"),
    ("of matmul", lambda r: f"{100 * r['summary']['matmul_share']:.1f} %"),
    ("of bandwidth", lambda r: f"{100 * r['summary']['bandwidth_share']:.1f} %"),
    ("x limit", lambda r: f"{r['summary']['above_limit']:.1f}"),
    ("eval images/s", lambda r: _range(r["summary"]["eval_images_per_second"])),
]
COST: list[Column] = [
    *_HEAD,
    ("steps/dispatch", lambda r: str(r["measured"]["chunk_steps"])),
    ("trace s", lambda r: f"{r['measured']['trace_seconds']:.1f}"),
    ("compile s", lambda r: f"{r['measured']['compile_seconds']:.1f}"),
    ("first result s, cold", lambda r: f"{r['first_step']['cold']['first_chunk']:.1f}"),
    ("cached", lambda r: f"{r['first_step']['cached']['first_chunk']:.1f}"),
    ("GFLOP/step", lambda r: f"{r['summary']['step_operations'] / 1e9:.2f}"),
    ("by XLA", lambda r: f"{r['summary']['step_operations_xla'] / 1e9:.2f}"),
    ("temporary MB", lambda r: _megabytes(r["measured"]["program"]["temp_bytes"])),
    ("peak MB of", lambda r: _peak(r["measured"]["train_memory"])),
]


def table(rows: Sequence[dict[str, Any]], columns: Sequence[Column]) -> str:
    """Columns as wide as they need; a dash for what a row does not have."""

    def cell(make, row):
        try:
            return make(row)
        except (KeyError, TypeError):
            return "-"

    cells = [[name for name, _ in columns]]
    cells += [[cell(make, row) for _, make in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def describe(rows: Sequence[dict[str, Any]]) -> str:
    """Both tables, the ceilings, and what failed; rows as `tools.bench` writes them."""
    good = [r for r in rows if "error" not in r]
    lines: list[str] = []
    for environment in [r["measured"]["environment"] for r in good if "measured" in r]:
        versions = environment["versions"]
        line = (
            f"{environment['hardware']}; Python {environment['python']}, jax {versions['jax']}, "
            f"flax {versions['flax']}; commit {environment['commit']}"
        )
        lines += [line] if line not in lines else []
    if good:
        lines += ["medians of repeats (least to most)", "", table(good, SPEED), ""]
        lines += [table(good, COST)]
    for row in good:
        if ceilings := row.get("measured", {}).get("ceilings"):
            lines.append(
                f"ceilings measured with {row['case']['model']}, {row['measured']['dtype']}, "
                f"{row['measured']['devices']} device(s): {ceilings['operations'] / 1e12:.3g} "
                f"TFLOP/s, {ceilings['bytes'] / 1e9:.4g} GB/s"
            )
    for row in rows:
        if "error" in row:
            case = row["case"]
            lines.append(
                f"failed: {case['model']}, batch {case['batch_size']}, {case['dtype']}, devices "
                f"{case['devices']}: {row['error']}"
            )
    return "\n".join(lines)
