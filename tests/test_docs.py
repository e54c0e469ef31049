"""Everything in the documentation that looks like code runs, and every table in it is complete.

Comments on the lines before a fenced block say what is done with it:

    <!-- runs: OVERRIDES -->    overrides for each `fedray run` of the block, instead of rounds=1 backend.name=serial
    <!-- planned: REASON -->    each `fedray run` or configuration is only read, checked and built, if its data are here
    <!-- not run: REASON -->    only parsed
    <!-- exits: CODE -->        the exit code of the block's last command; 0 without it
    <!-- file: NAME -->         written to NAME in the page's folder
    <!-- prints -->             what the block before printed, where ... stands for anything
    <!-- ci: NAME -->           .ci/run runs it
    <!-- tree -->               folders and files, all of which exist; complete for fedray/

and before a table, whose first column is names: `<!-- table: NAME -->`.
"""

import doctest
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import fedray
from fedray import catalogue, cli, config
from fedray.clock import PHASES
from fedray.errors import DataError
from fedray.experiment import plan
from fedray.options import options_of
from fedray.runs import find
from fedray.search import DISTRIBUTIONS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALL = ["rounds=1", "backend.name=serial"]
LANGUAGES = {"python", "bash", "yaml", "text"}


@dataclass(frozen=True)
class Block:
    """A fenced block, or a table: its language, its lines, and the comments before it."""

    page: Path
    line: int
    language: str
    text: str
    notes: dict[str, str]

    def __str__(self) -> str:
        return f"{self.page.name}, line {self.line}"


def blocks(page: Path) -> Iterator[Block]:
    lines = page.read_text(encoding="utf-8").splitlines()
    notes: dict[str, str] = {}
    number = 0
    while number < len(lines):
        line, start = lines[number], number + 1
        if note := re.fullmatch(r"<!-- ([a-z ]+?)(?:: (.*))? -->", line):
            notes[note[1]] = note[2] or ""
            number += 1
            continue
        inside: list[str] = []
        if line.startswith("```"):
            inside = list(takewhile(lambda text: text != "```", lines[number + 1 :]))
            number += len(inside) + 1
        elif line.startswith("|"):
            inside = list(takewhile(lambda text: text.startswith("|"), lines[number:]))
            number += len(inside) - 1
        if inside:
            language = line[3:] if line.startswith("```") else "table"
            yield Block(page, start, language, "\n".join(inside) + "\n", notes)
        if line:
            notes = {}
        number += 1


BLOCKS = [block for page in PAGES for block in blocks(page)]
named = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


# --- code ---


@named
def test_what_looks_like_code_runs(page, tmp_path, monkeypatch, capsys, request):
    mine = [block for block in BLOCKS if block.page == page]
    python = [block.text for block in mine if block.language == "python" and "not run" not in block.notes]
    if any("fedray.backends.ray" in text or "from ray import" in text for text in python):
        request.getfixturevalue("ray_local")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("fedray.runs", "fedray.report"):  # most of a small run's time; test_report.py tests it
        monkeypatch.setattr(sys.modules[module], "write_report", touch)
    before = set(sys.modules)
    namespace = {"__name__": "__main__"}
    printed = ""
    try:
        for block in mine:
            if "prints" in block.notes:
                expect(block, printed)
            elif "file" in block.notes:
                Path(block.notes["file"]).write_text(block.text, encoding="utf-8")
            elif not {"ci", "not run", "tree"} & set(block.notes):
                capsys.readouterr()
                error = RUNNERS.get(block.language, ignore)(block, namespace)
                shown = capsys.readouterr()
                printed = shown.err if error else shown.out
    finally:
        for name in set(sys.modules) - before:
            if tmp_path in Path(getattr(sys.modules[name], "__file__", None) or "/").parents:
                del sys.modules[name]


def touch(_folders: Any, page: Path, _targets: Any = None) -> Path:
    page.touch()
    return page


def expect(block: Block, printed: str) -> None:
    wanted, checker, flags = block.text, doctest.OutputChecker(), doctest.ELLIPSIS
    if not checker.check_output(wanted, printed, flags):
        difference = checker.output_difference(doctest.Example("", wanted), printed, flags)
        pytest.fail(f"{block} is not what was printed\n{difference}")


def run_python(block: Block, namespace: dict[str, Any]) -> None:
    code = "\n" * block.line + block.text  # so that a traceback names the page's own lines
    exec(compile(code, str(block.page), "exec"), namespace)


def run_bash(block: Block, _namespace: dict[str, Any]) -> bool:
    expected = int(block.notes.get("exits", 0))
    commands = fedray_commands(block)
    for position, arguments in enumerate(commands, 1):
        wanted = expected if position == len(commands) else 0
        if arguments[0] != "run":
            code = cli.main(arguments)
        elif "planned" in block.notes:
            planned(block, config.read(find(arguments[1]), arguments[2:]))
            continue
        else:
            out = [] if "--out" in arguments else ["--out", f"{block.line}-{position}"]  # two runs in the same second
            code = cli.main([*arguments, *(shlex.split(block.notes["runs"]) if "runs" in block.notes else SMALL), *out])
        assert code == wanted, f"{block}: fedray {shlex.join(arguments)}"
    return expected != 0


def fedray_commands(block: Block) -> list[list[str]]:
    lines = block.text.replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    odd = [command for command in commands if command[:1] not in ([], ["fedray"])]
    assert not odd, f"{block} has {odd}; say `not run`"
    return [command[1:] for command in commands if command]


def run_yaml(block: Block, _namespace: dict[str, Any]) -> None:
    """A whole configuration, or a part that is laid over the quickstart's."""
    quickstart = config.read(find("quickstart"))
    written = OmegaConf.to_container(OmegaConf.create(block.text), resolve=False)
    planned(block, config.read(overlaid(quickstart, written)))


def planned(block: Block, values: dict[str, Any]) -> None:
    with suppress(*[DataError] if "planned" in block.notes else []):
        plan(values)


def overlaid(base: Any, part: Any) -> Any:
    if not isinstance(part, dict) or not isinstance(base, dict) or "name" in part:
        return part  # a component stands for itself
    return {**base, **{key: overlaid(base.get(key), value) for key, value in part.items()}}


def ignore(_block: Block, _namespace: dict[str, Any]) -> None:
    """Tables and plain text."""


RUNNERS: dict[str, Callable[[Block, dict[str, Any]], Any]] = {"python": run_python, "bash": run_bash, "yaml": run_yaml}


@pytest.mark.parametrize("block", [b for b in BLOCKS if "not run" in b.notes], ids=str)
def test_what_cannot_run_here_at_least_parses(block):
    if block.language == "python":
        compile(block.text, str(block), "exec")
    elif block.language == "yaml":
        OmegaConf.create(block.text)
    else:
        for line in block.text.replace("\\\n", " ").splitlines():
            command = shlex.split(line, comments=True)
            if command[:1] == ["fedray"]:
                cli._parse(command[1:])


def test_every_block_says_what_it_is():
    assert {block.language for block in BLOCKS} <= LANGUAGES | {"table"}
    known = {"runs", "planned", "not run", "exits", "file", "prints", "ci", "tree", "table"}
    assert {note for block in BLOCKS for note in block.notes} <= known


def test_the_readme_begins_with_the_two_commands_that_ci_runs():
    commands = {b.notes["ci"]: b.text.splitlines() for b in BLOCKS if "ci" in b.notes and b.page.name == "README.md"}
    assert {name: len(lines) for name, lines in commands.items()} == {"main": 1, "test": 1}


def test_the_tutorials_algorithm_is_short():
    [block] = [b for b in BLOCKS if b.notes.get("file") == "my_algorithm.py"]
    assert len(block.text.splitlines()) <= 30


# --- tables ---


def registry_names(kind: str) -> set[str]:
    return set(catalogue.components(kind))


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs") / "run"
    made = config.read(
        find("quickstart"), ["algorithm.name=scaffold", "rounds=2", "checkpoint_every=1", "profile=true", *SMALL[1:]]
    )
    return fedray.run(made, out=folder)


def files_of_a_run(run: fedray.Run) -> set[str]:
    return {path.name + "/" * path.is_dir() for path in run.folder.iterdir()}


def keys_of_a_record(run: fedray.Run) -> set[str]:
    return {key for record in run.metrics for key in record}


TABLES: dict[str, Callable[[Any], set[str]]] = {
    **{kind: lambda _, kind=kind: registry_names(kind) for kind in catalogue.KINDS},
    "public names": lambda _: set(fedray.__all__),
    "run folder": files_of_a_run,
    "metrics.jsonl": keys_of_a_record,
    "profile": lambda _: set(PHASES),
    "distributions": lambda _: set(DISTRIBUTIONS),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_complete(name, finished_run):
    tables = [rows(block) for block in BLOCKS if block.notes.get("table") == name]
    assert tables, f"no page has the table {name!r}"
    found = [name for table in tables for row in table[1:] for name in names(row[0])]
    assert sorted(found) == sorted(TABLES[name](finished_run))


@pytest.mark.parametrize("kind", catalogue.KINDS)
def test_tables_name_the_options(kind):
    for block in BLOCKS:
        header, *body = rows(block) if block.notes.get("table") == kind else [[]]
        for row in body if "options" in header else []:
            component = catalogue.components(kind)[names(row[0])[0]]
            elsewhere = ("local", "synthesis", "central")  # options that several algorithms share
            own = {name for name, option in options_of(component).items() if option.group not in elsewhere}
            assert set(names(row[header.index("options")])) == own, f"{block}: {row[0]}"


def rows(block: Block) -> list[list[str]]:
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.text.splitlines()]
    return [cells[0], *cells[2:]]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_the_tree_is_complete():
    [block] = [block for block in BLOCKS if "tree" in block.notes]
    paths, folder = set(), ""
    for line in block.text.splitlines():
        names = list(takewhile(re.compile(r"[\w.]+(\.\w+|/)|LICENSE").fullmatch, line.split()))
        paths |= {f"{folder if line.startswith(' ') else ''}{name}" for name in names}
        folder = folder if line.startswith(" ") else names[0]
    assert {path for path in paths if not (ROOT / path).exists()} == set()
    here = (ROOT / "fedray").glob("[!_.]*.py"), (ROOT / "fedray").glob("*/__init__.py")
    wanted = {f"fedray/{path.name}" for path in here[0]} | {f"fedray/{path.parent.name}/" for path in here[1]}
    assert wanted - paths == set()


# --- links ---


def anchors(page: Path) -> set[str]:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)|(?:src|href|srcset)=\"([^\"]+)\"", text)
    for target in (a or b for a, b in targets):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(there), f"{page.name} links to {target}"


def test_every_page_is_linked_from_the_readme():
    readme = PAGES[0].read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in readme] == []


def test_the_changelog_knows_this_version():
    from importlib.metadata import version

    assert f"## [{version('fedray')}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
