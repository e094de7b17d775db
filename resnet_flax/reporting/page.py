"""A report as one HTML file that needs no other, and as Markdown."""

import base64
import dataclasses
import html

from resnet_flax.reporting.picture import Picture
from resnet_flax.reporting.tables import MISSING, Table

_STYLE = """
:root { --page: #ffffff; --ink: #1b1f24; --soft: #59626d; --line: #d0d4d9; --stripe: #f5f6f8;
  --warn: #a23b00; }
@media (prefers-color-scheme: dark) { :root { --page: #16191d; --ink: #dfe3e8; --soft: #98a2ae;
  --line: #3a4048; --stripe: #1d2126; --warn: #ffa36b; } }
:root { color-scheme: light dark; }
body { background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
  max-width: 78rem; margin: 0 auto; padding: 1rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin: 2.5rem 0 0.5rem; }
p { margin: 0.3rem 0; max-width: 50rem; }
.soft, figcaption { color: var(--soft); font-size: 0.9rem; }
.scroll { overflow-x: auto; margin: 0.75rem 0; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem;
  font-variant-numeric: tabular-nums; }
table.wide { font-size: 0.8rem; }
th, td { padding: 0.4rem 0.7rem; text-align: left; vertical-align: top; }
td { border-top: 1px solid var(--line); white-space: pre; }
.wide th, .wide td { padding: 0.35rem 0.45rem; } .wide td { white-space: pre-line; }
td:first-child, .wide td:first-child { font-weight: 600; white-space: pre; }
th { vertical-align: bottom; font-weight: 600; color: var(--soft); }
tbody tr:nth-child(even) { background: var(--stripe); }
td.missing { color: var(--soft); font-style: italic; }
figure { margin: 0.75rem 0; } img { max-width: 100%; height: auto; display: block;
  border-radius: 6px; }
.warn { color: var(--warn); } li { overflow-wrap: anywhere; }
"""


@dataclasses.dataclass(frozen=True)
class Report:
    """What a report says.

    Attributes:
      title: its heading.
      lead: sentences under it.
      tables: for reading.
      pictures: after them.
      more: tables for looking things up, at the end.
      notes: what was passed over, and why.
    """

    title: str
    lead: tuple[str, ...]
    tables: tuple[Table, ...]
    pictures: tuple[Picture, ...]
    more: tuple[Table, ...]
    notes: tuple[str, ...]


def to_html(report: Report, images: dict[tuple[str, str], bytes]) -> str:
    """The page; `images` are PNGs by (name, theme)."""
    parts = [f"<h1>{html.escape(report.title)}</h1>"]
    parts += [f"<p>{html.escape(line)}</p>" for line in report.lead]
    if report.notes:
        items = "".join(f"<li>{html.escape(note)}</li>" for note in report.notes)
        parts.append(f'<h2 class="warn">Passed over</h2><ul>{items}</ul>')
    parts += [_html_table(table) for table in report.tables]
    parts += [_html_picture(picture, images) for picture in report.pictures]
    parts += [_html_table(table) for table in report.more]
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(report.title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _html_table(table: Table) -> str:
    def cell(text: str) -> str:
        kind = ' class="missing"' if text == MISSING else ""
        return f"<td{kind}>{html.escape(text)}</td>"

    head = "".join(f'<th scope="col">{html.escape(c)}</th>' for c in table.columns)
    rows = "\n".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in table.rows)
    captions = "".join(f'<p class="soft">{html.escape(c)}</p>' for c in table.caption)
    kind = ' class="wide"' if table.wide else ""
    return (
        f'<h2>{html.escape(table.title)}</h2>\n<div class="scroll"><table{kind}><thead><tr>{head}'
        f"</tr></thead>\n<tbody>{rows}</tbody></table></div>\n{captions}"
    )


def _html_picture(picture: Picture, images: dict[tuple[str, str], bytes]) -> str:
    light, dark = (
        "data:image/png;base64," + base64.b64encode(images[picture.name, theme]).decode()
        for theme in ("light", "dark")
    )
    return (
        f"<h2>{html.escape(picture.title)}</h2>\n<figure><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{html.escape(picture.title)}"></picture>'
        f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>"
    )


def to_markdown(report: Report) -> str:
    """The same for a README; pictures are the PNG files beside it."""
    parts = [f"# {_plain(report.title)}", *map(_plain, report.lead)]
    if report.notes:
        parts += ["## Passed over", "\n".join(f"- {_plain(note)}" for note in report.notes)]
    parts += [_markdown_table(table) for table in report.tables]
    for picture in report.pictures:
        title = _plain(picture.title)
        parts += [f"## {title}", f"![{title}]({picture.name}.png)", f"*{_plain(picture.caption)}*"]
    parts += [_markdown_table(table) for table in report.more]
    return "\n\n".join(parts) + "\n"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    for character in "\\`*_[]<>|":
        text = text.replace(character, "\\" + character)
    return text.replace("\n", "<br>")


def _markdown_table(table: Table) -> str:
    lines = [
        "| " + " | ".join(map(_plain, table.columns)) + " |",
        "|" + "---|" * len(table.columns),
        *("| " + " | ".join(map(_plain, row)) + " |" for row in table.rows),
    ]
    captions = [_plain(c) for c in table.caption]
    return "\n\n".join([f"## {_plain(table.title)}", "\n".join(lines), *captions])
