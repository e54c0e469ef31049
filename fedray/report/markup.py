"""What pages are made of."""

import html
from collections.abc import Sequence
from importlib import resources

from fedray.report import figures


def legend(labels: Sequence[str]) -> str:
    """What the lines of a picture are called, each with its style."""
    items = []
    for index, label in enumerate(labels):
        colour, (_, dashes) = figures.line_style(index)
        dash = f' stroke-dasharray="{" ".join(f"{2 * part:g}" for part in dashes)}"' if dashes else ""
        line = f'<svg viewBox="0 0 28 8"><path d="M1 4H27" stroke="{colour}" stroke-width="3"{dash}/></svg>'
        items.append(f"<li>{line}{text(label)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def section(title: str, body: str, note: str = "") -> str:
    """A part of a page; nothing without a body."""
    words = f'<p class="words">{text(note)}</p>' if note else ""
    return f"<section><h2>{text(title)}</h2>{words}{body}</section>" if body else ""


def table(rows: Sequence[Sequence[str]]) -> str:
    """The table; nothing if there are no rows under the header."""
    if len(rows) < 2:
        return ""
    head = "".join(f"<th>{text(cell)}</th>" for cell in rows[0])
    body = "".join(f"<tr>{''.join(f'<td>{text(cell)}</td>' for cell in row)}</tr>" for row in rows[1:])
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def text(value: str) -> str:
    """Text as HTML."""
    return html.escape(value)


def page(title: str, subtitle: str, sections: Sequence[str]) -> str:
    """A whole page, which needs nothing beside itself: sections that are empty are left out."""
    css = resources.files("fedray.report").joinpath("page.css").read_text(encoding="utf-8")
    body = "\n".join(section for section in sections if section)
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{text(title)} – fedray</title>
<style>
{css}</style>
<main>
<header><h1>{text(title)}</h1><p>{text(subtitle)}</p></header>
{body}
</main>
</html>
"""
