"""Tables and pictures of finished runs, beside the published numbers.

    python -m resnet_flax.tools.report runs/paper --out=runs/paper/report

Reads nothing but what the runs have left (config.json, run.json, result.json, metrics.jsonl, and
responses.json of resnet_flax.tools.responses). Writes report.html, a page that needs no other file,
report.md, and the pictures as PNG.
"""

import pathlib

from resnet_flax.errors import UserError
from resnet_flax.reporting import figures, page, records, tables
from resnet_flax.tools import entry


def read(roots: list[pathlib.Path]) -> tuple[list[records.Record], list[str]]:
    """All runs below `roots`, and what is wrong with those that cannot be read."""
    found, notes = [], []
    for directory in records.find(roots):
        try:
            found.append(records.load(directory))
        except UserError as error:
            notes.append(str(error))
    return found, notes


def compose(found: list[records.Record], notes: list[str]) -> page.Report:
    """The report on some runs."""
    groups, left_out = records.group(found)
    compared, absent = tables.comparisons(groups)
    finished = sum(record.result is not None for record in found)
    lead = [
        f"{finished} finished runs, {len(found) - finished} unfinished, of {len(groups)} kinds.",
        "Test errors are those of the last step, in percent: mean ± sample standard deviation over "
        "seeds. [R]: Deep Residual Learning, arXiv:1512.03385. [I]: Identity Mappings, "
        "arXiv:1603.05027.",
    ]
    if absent:
        lead.append(f"No runs: {'; '.join(absent)}.")
    return page.Report(
        "Residual nets on CIFAR-10: runs and published numbers",
        tuple(lead),
        (*compared, tables.overview(groups)),
        tuple(figures.all_pictures(groups)),
        (*tables.class_errors(groups), tables.every_run(found)),
        (*notes, *left_out),
    )


def write(report: page.Report, directory: pathlib.Path) -> list[pathlib.Path]:
    """Writes a report's files, each whole or not at all.

    Raises:
      UserError: the directory cannot be written.
    """
    images = {(p.name, theme): p.png(theme) for p in report.pictures for theme in ("light", "dark")}
    files = {f"{picture.name}.png": images[picture.name, "light"] for picture in report.pictures}
    files["report.md"] = page.to_markdown(report).encode()
    files["report.html"] = page.to_html(report, images).encode()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            files.write_atomically(directory / name, content)
    except OSError as error:
        raise UserError(
            f"cannot write in {directory}: {error.strerror}; choose another --out"
        ) from error
    return [directory / name for name in files]


def main(argv: list[str]) -> None:
    """Writes the report that the flags ask for."""
    parser = entry.parser(__doc__)
    parser.add_argument("runs", nargs="+", help="directories of runs, or that hold runs")
    parser.add_argument("--out", required=True, help="directory of the report")
    args = parser.parse_args(argv)
    found, notes = read([pathlib.Path(path).expanduser() for path in args.runs])
    if not found and not notes:
        raise UserError(f"no runs in {', '.join(args.runs)}")
    for note in notes:
        print(f"passed over: {note}")
    report = compose(found, notes)
    files = write(report, pathlib.Path(args.out).expanduser())
    print(f"{len(found)} runs: {files[-1]}, {files[-2]} and {len(report.pictures)} pictures")


if __name__ == "__main__":
    entry.run(main)
