"""`rectiflow list`: the 41 systems and their recipes. Loads nothing but the catalog."""

from __future__ import annotations

import json
from collections.abc import Sequence

HELP = """usage: rectiflow list [--json]

The 41 systems: number, recipe slugs, whether they are built here, title."""


def main(words: Sequence[str]) -> int:
    """Run the command."""
    from rectiflow.recipes.catalog import SYSTEMS

    if any(word in ("-h", "--help") for word in words):
        print(HELP)
        return 0
    extra = [word for word in words if word != "--json"]
    if extra:
        raise ValueError(f"list takes only --json, got {' '.join(extra)}")
    if "--json" in words:
        rows = [
            {
                "number": s.number,
                "slug": s.slug,
                "title": s.title,
                "arxiv": s.arxiv,
                "recipes": list(s.recipes),
                "names": list(s.names),
                "built": s.built,
            }
            for s in SYSTEMS
        ]
        print(json.dumps(rows, indent=2))
        return 0
    width = max(len(s.slug) for s in SYSTEMS)
    for s in SYSTEMS:
        state = "built  " if s.built else "planned"
        print(f"{s.number:>2}  {s.slug:<{width}}  {state}  {s.title}")
    built = sum(s.built for s in SYSTEMS)
    print(f"\n{built} of {len(SYSTEMS)} systems are built; rectiflow run SLUG measures one.")
    return 0
