"""Tables and pictures of finished runs, beside the published numbers.

    python -m resnet_flax.tools.report runs/paper --out=runs/paper/report

Reads nothing but what the runs have left (config.json, run.json, result.json, metrics.jsonl, and
responses.json of resnet_flax.tools.responses). Writes report.html, a page that needs no other file,
report.md, and the pictures as PNG.
"""

import base64
import pathlib
from typing import Any

import jinja2
import matplotlib

from resnet_flax.errors import UserError, first_line
from resnet_flax.runs.files import write_atomically
from resnet_flax.tools import entry
from resnet_flax.tools.report import figures, runs, tables
from resnet_flax.tools.report.experiment import gather


def compose(found: list[runs.Run], notes: list[str]) -> dict[str, Any]:
    """What the templates show: lead, notes, and sections, which are tables and pictures."""
    experiments, left_out = gather(found)
    compared, absent = tables.comparisons(experiments)
    finished = sum(run.result is not None for run in found)
    lead = [
        f"{finished} finished runs, {len(found) - finished} unfinished, of {len(experiments)} "
        "kinds.",
        "Test errors are those of the last step, in percent: mean ± sample standard deviation over "
        "seeds. [R]: Deep Residual Learning, arXiv:1512.03385. [I]: Identity Mappings, "
        "arXiv:1603.05027.",
    ]
    if absent:
        lead.append(f"No runs: {'; '.join(absent)}.")
    sections = [
        *compared,
        tables.overview(experiments),
        *figures.all_pictures(experiments),
        *tables.class_errors(experiments),
        tables.every_run(found),
    ]
    return {"lead": lead, "notes": [*notes, *left_out], "sections": sections}


def render(template: str, **content: Any) -> str:
    """A page with every text of `content` escaped: it may hold anything."""
    is_html = template.endswith(".html.j2")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=is_html,
        finalize=None if is_html else _escape_markdown,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(content, missing=tables.MISSING)


def _escape_markdown(text: Any) -> str:
    if hasattr(text, "__html__"):  # marked as safe in the template
        return text
    escaped = "".join(f"\\{c}" if c in "\\`*_[]<>|" else c for c in str(text))
    return escaped.replace("\n", "<br>")


def write(report: dict[str, Any], directory: pathlib.Path) -> list[pathlib.Path]:
    """Writes the files of a report, each whole or not at all; the Markdown and HTML come last."""
    pictures = {s.name: s.png() for s in report["sections"] if isinstance(s, figures.Picture)}
    images = {name: base64.b64encode(png).decode() for name, png in pictures.items()}
    contents = {f"{name}.png": png for name, png in pictures.items()}
    contents["report.md"] = render("page.md.j2", **report).encode()
    contents["report.html"] = render("page.html.j2", **report, images=images).encode()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            write_atomically(directory / name, content)
    except OSError as error:
        why = first_line(error)
        raise UserError(f"cannot write in {directory}: {why}; choose another --out") from error
    return [directory / name for name in contents]


def main(argv: list[str]) -> None:
    """Reads runs and writes their report."""
    parser = entry.parser(__doc__)
    parser.prog = "python -m resnet_flax.tools.report"
    parser.add_argument("runs", nargs="+", help="directories of runs, or that hold runs")
    parser.add_argument("--out", required=True, help="directory of the report")
    args = parser.parse_args(argv)
    found, notes = runs.read([pathlib.Path(path).expanduser() for path in args.runs])
    for note in notes:
        print(f"passed over: {note}")
    if not found:
        raise UserError(f"no runs in {', '.join(args.runs)}")
    with matplotlib.rc_context(fname=figures.STYLE):
        paths = write(compose(found, notes), pathlib.Path(args.out).expanduser())
    *pictures, markdown, html = paths
    print(f"{len(found)} runs: {html}, {markdown} and {len(pictures)} pictures")


if __name__ == "__main__":
    entry.run(main)
