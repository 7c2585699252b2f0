"""Self-contained HTML reports: tables, pictures, settings, environment, lineage in one file."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rectiflow.files import write_text

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto;
         padding: 0 1rem; }
  h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
  p.lead { font-size: 1.05rem; } figure { margin: 1rem 0; }
  img { max-width: 100%; height: auto; } figcaption { color: #555; font-size: .9rem; }
  .scroll { overflow-x: auto; }
  table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
  th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right; }
  th:first-child, td:first-child { text-align: left; } td { white-space: nowrap; }
  caption { caption-side: bottom; text-align: left; color: #555; font-size: .9rem; }
  pre { background: #f6f6f6; padding: .7rem; overflow-x: auto; font-size: .85rem; }
  @media (prefers-color-scheme: dark) {
    body { background: #181818; color: #ddd; } pre { background: #242424; }
    img { background: #fff; } th, td { border-color: #444; }
    caption, figcaption { color: #aaa; }
  }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for text in lead %}<p class="lead">{{ text }}</p>
{% endfor %}
{% for section in sections %}
<h2>{{ section.title }}</h2>
{% for text in section.texts %}<p>{{ text }}</p>
{% endfor %}
{% for table in section.tables %}
<div class="scroll"><table>
{% if table.caption %}<caption>{{ table.caption }}</caption>{% endif %}
<thead><tr>{% for cell in table.header %}<th scope="col">{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody>
</table></div>
{% endfor %}
{% for picture in section.pictures %}
<figure><img src="{{ picture.source }}" alt="{{ picture.caption }}">
<figcaption>{{ picture.caption }}</figcaption></figure>
{% endfor %}
{% for name, value in section.facts.items() %}
<details{% if loop.first %} open{% endif %}><summary>{{ name }}</summary><pre>{{ value }}</pre>
</details>
{% endfor %}
{% endfor %}
</body>
</html>
"""


@dataclass(frozen=True)
class Table:
    """A table of cells; numbers are formatted by `cell`."""

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Attributes:
        title: its heading.
        texts: paragraphs.
        tables: tables.
        pictures: picture file to caption.
        facts: name to a text or a table of settings, shown folded.
    """

    title: str
    texts: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Mapping[Path, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


def write_report(
    path: Path | str, title: str, sections: Sequence[Section], *, lead: Sequence[str] = ()
) -> Path:
    """Write a report that needs no other file and no network.

    Args:
        path: the HTML file.
        title: heading and page title.
        sections: parts, in order.
        lead: opening paragraphs.
    """
    import jinja2

    template = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE)
    parts = [
        {
            "title": section.title,
            "texts": section.texts,
            "tables": [
                {
                    "header": table.header,
                    "rows": [[cell(value) for value in row] for row in table.rows],
                    "caption": table.caption,
                }
                for table in section.tables
            ],
            "pictures": [
                {"source": _embedded(file), "caption": caption}
                for file, caption in section.pictures.items()
            ],
            "facts": {name: _text(value) for name, value in section.facts.items()},
        }
        for section in sections
    ]
    write_text(path, template.render(title=title, lead=lead, sections=parts))
    return Path(path)


def cell(value: Any) -> str:
    """A value as a table shows it: three significant digits, a dash for nothing.

    Example:
        >>> cell(0.012345), cell(1234.5), cell(None), cell(7)
        ('0.0123', '1234', '–', '7')
    """
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def _embedded(file: Path) -> str:
    kind = {"svg": "svg+xml"}.get(file.suffix.lstrip("."), file.suffix.lstrip("."))
    return f"data:image/{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"


def _text(value: Any) -> str:
    import json

    return value if isinstance(value, str) else json.dumps(value, indent=2)
