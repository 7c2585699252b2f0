"""Pages made while the site is built: commands, API, gallery, evidence and benchmarks.

Commands come from their own help, the gallery from the catalog, evidence and benchmarks from the
JSON files that were committed with them.
"""

from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src"
sys.path.insert(0, str(SOURCE))

from rectiflow.cli.commands import COMMANDS  # noqa: E402
from rectiflow.recipes.catalog import SYSTEMS, System, recipe_exists  # noqa: E402

ROOMS = (
    "flows",
    "nets",
    "optim",
    "training",
    "diagnose",
    "distill",
    "guidance",
    "align",
    "vectors",
    "images",
    "interop",
    "recipes",
)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the generated pages to the navigation."""
    config.nav += [
        {"Commands": [{name: f"commands/{name}.md"} for name in COMMANDS]},
        {"API": [{room: f"api/{room}.md"} for room in rooms()]},
        {"Systems": "systems.md"},
        {"Evidence": "evidence.md"},
        {"Benchmarks": "benchmarks.md"},
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages themselves."""
    pages = {
        **command_pages(),
        **{f"api/{room}.md": api_page(room) for room in rooms()},
        "systems.md": gallery(),
        "evidence.md": evidence(records(ROOT / "results")),
        "benchmarks.md": benchmarks(records(ROOT / "benchmarks" / "results")),
    }
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def rooms() -> list[str]:
    """The rooms that hold code."""
    return [room for room in ROOMS if modules(room)]


def modules(room: str) -> list[str]:
    """The public modules of a room, packages included."""
    found = pkgutil.walk_packages([str(SOURCE / "rectiflow" / room)], f"rectiflow.{room}.")
    return [module.name for module in found if "._" not in module.name]


HELP = """
import contextlib, io, json
from rectiflow.cli import main
from rectiflow.cli.commands import COMMANDS

pages = {}
for name in COMMANDS:
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        main([name, "--help"])
    pages[name] = shown.getvalue().strip()
print(json.dumps(pages))
"""


def command_pages() -> dict[str, str]:
    """What each command does, and its own help; one process, since the width is set once."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "COLUMNS": "88", "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-c", HELP], env=environment, capture_output=True, text=True, check=True
    )
    return {
        f"commands/{name}.md": f"# rectiflow {name}\n\n{sentence(COMMANDS[name].summary)}\n\n"
        f"```text\n{shown}\n```\n"
        for name, shown in json.loads(done.stdout).items()
    }


def api_page(room: str) -> str:
    """The modules of a room, by their docstrings."""
    parts = "\n\n".join(f"::: {name}" for name in modules(room))
    return f"# rectiflow.{room}\n\n{parts}\n"


def gallery() -> str:
    """The table of all systems."""
    built = sum(system.built for system in SYSTEMS)
    rows = ["| | system | what it does | where | paper |", "|---|---|---|---|---|"]
    rows += [gallery_row(system) for system in SYSTEMS]
    lead = (
        f"rectiflow brings {len(SYSTEMS)} published systems into one library; {built} of them can "
        "be run today, the others are planned. `rectiflow list` prints this table, `rectiflow run "
        "SLUG` measures a system's claim."
    )
    return "# Systems\n\n" + lead + "\n\n" + "\n".join(rows) + "\n"


def gallery_row(system: System) -> str:
    recipes = ", ".join(f"`{slug}`" for slug in system.recipes if recipe_exists(slug))
    state = f"runs: {recipes}" if recipes else "planned"
    paper = f"[{system.arxiv}](https://arxiv.org/abs/{system.arxiv})"
    where = ", ".join(f"`{room}`" for room in system.rooms)
    what = f"{system.summary} *{state}*"
    return f"| {system.number} | **{system.title}** | {what} | {where} | {paper} |"


def records(folder: Path) -> list[dict[str, Any]]:
    """The committed results of a folder, by name; none if the folder is absent."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def evidence(results: list[dict[str, Any]]) -> str:
    """Every claim with its verdict, checks and numbers."""
    lead = (
        "Each section is one recipe: a claim, the verdict that follows from its checks, and the "
        "numbers. Nothing here is written by hand."
    )
    if not results:
        lead += " No result has been committed yet: `rectiflow run SLUG` makes one."
    return "\n\n".join(["# Evidence", lead, *map(evidence_section, results)]) + "\n"


def evidence_section(result: dict[str, Any]) -> str:
    seeds = ", ".join(map(str, result["seeds"]))
    parts = [
        f"## {result['slug']}",
        f"{sentence(result['claim'])} **Verdict: {result['verdict']}.**",
        f"Preset `{result['preset']}`, seeds {seeds}, on {result['device']}.",
    ]
    if result.get("checks"):
        parts.append(
            table(
                ("check", "rule", "by seed", "state"),
                [(c["name"], c["rule"], each(c["values"]), c["state"]) for c in result["checks"]],
            )
        )
    parts.append(
        table(
            ("quantity", "arm", "mean", "standard deviation", "by seed"),
            [
                (n["quantity"], n["arm"], number(n["mean"]), number(n["spread"]), each(n["values"]))
                for n in result["numbers"]
            ],
        )
    )
    parts += [sentence(note) for note in result.get("notes", ())]
    settings = json.dumps(result["settings"], indent=2)
    parts.append(f"Settings:\n\n```json\n{settings}\n```")
    return "\n\n".join(parts)


def benchmarks(results: list[dict[str, Any]]) -> str:
    """Every benchmark as a table of ratios with their quartiles."""
    lead = (
        "Each table answers one question; a ratio compares two variants timed in turn in the same "
        "run. A target missed by less than two standard errors of the median is unclear. "
        "`make bench` measures them anew."
    )
    if not results:
        lead += " No result has been committed yet."
    return "\n\n".join(["# Benchmarks", lead, *map(benchmark_section, results)]) + "\n"


def benchmark_section(result: dict[str, Any]) -> str:
    machine = result["machine"]
    head = ("case", "figure", "CPU time", "wall time", "target", "met", "note")
    where = (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} thread(s), "
        f"Python {machine['python']}, "
        + ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
        + f", {machine['date']}."
    )
    rows = []
    for row in result["rows"]:
        sign = "at least" if row["lower_bound"] else "at most"
        goal = f"{sign} {row['target']:g} {row['clock']}" if row["target"] is not None else ""
        met = {True: "yes", False: "no", None: ""}[row["met"]]
        if row.get("unclear"):
            met = "unclear"
        times = (quartiles(row[clock], row["unit"]) for clock in ("cpu", "wall"))
        rows.append((row["case"], row["figure"], *times, goal, met, row["note"]))
    title = result["name"].replace("_", " ")
    return "\n\n".join([f"## {title}", result["question"], table(head, rows), where])


def quartiles(value: dict[str, float], unit: str) -> str:
    return f"{value['median']:.3g} {unit} [{value['low']:.3g}, {value['high']:.3g}]"


def table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    cells = ([str(cell).replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def each(values: list[float]) -> str:
    return ", ".join(map(number, values))


def sentence(text: str) -> str:
    """The text as a sentence."""
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else text + "."
