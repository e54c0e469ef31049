"""The rules of the architecture that a reader could otherwise only hope for."""

import ast
import io
import os
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import fedray

PACKAGE = Path(fedray.__file__).parent
ROOT = PACKAGE.parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted((ROOT / "experiments").glob("*/*.py"))


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(path): path for path in SOURCES}
everywhere = pytest.mark.parametrize("path", SOURCES, ids=map(dotted, SOURCES))


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(node: ast.AST, lazily: bool = True) -> Iterator[str]:
    """The modules that are imported, but for the eyes of a type checker only; ``lazily`` within functions, too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.FunctionDef) and not lazily:
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            for alias in child.names:
                inner = f"{child.module}.{alias.name}"
                yield inner if inner in MODULES else str(child.module)
        yield from imported(child, lazily)


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


# who imports whom


@everywhere
def test_only_the_ray_backend_imports_ray(path):
    if not within(dotted(path), "fedray.backends.ray"):
        assert not [name for name in imported(parsed(path)) if within(name, "ray")]


@everywhere
def test_backends_are_for_those_who_start_runs(path):
    starters = (
        "fedray.backends",
        "fedray.experiment",
        "fedray.runs",
        "fedray.calibrate",
        "fedray.generate",
        "fedray.sweep",
        "fedray.tune",
        "fedray.search",
        "fedray.cli",
        "fedray.commands",
    )
    if not within(dotted(path), *starters):
        assert not [name for name in imported(parsed(path)) if within(name, "fedray.backends")]


ONLY_FROM = {
    "fedray.trees": (),
    "fedray.seeds": (),
    "fedray.errors": (),
    "fedray.algorithm": ("fedray.trees",),
    "fedray.server_optimizers": ("fedray.trees",),
    "fedray.privacy": ("fedray.errors", "fedray.trees"),
    "fedray.peft": ("fedray.peft", "fedray.errors"),
    "fedray.models": ("fedray.models", "fedray.data.dataset", "fedray.errors", "fedray.peft"),
    "fedray.data": ("fedray.data", "fedray.errors"),
    "fedray.algorithms": (
        "fedray.algorithms",
        "fedray.adversarial",
        "fedray.algorithm",
        "fedray.aggregators",
        "fedray.bits",
        "fedray.errors",
        "fedray.learner",
        "fedray.local_training",
        "fedray.mask_privacy",
        "fedray.metrics.accuracy",
        "fedray.peft",
        "fedray.privacy",
        "fedray.seeds",
        "fedray.server_optimizers",
        "fedray.synthesis",
        "fedray.trees",
    ),
    "fedray.synthesis": (
        "fedray.synthesis",
        "fedray.algorithm",
        "fedray.data",
        "fedray.errors",
        "fedray.hardware",
        "fedray.learner",
        "fedray.local_training",
        "fedray.seeds",
        "fedray.trees",
    ),
}


@pytest.mark.parametrize("package", ONLY_FROM)
def test_what_is_below_does_not_import_what_is_above(package):
    for name, path in MODULES.items():
        if within(name, package):
            ours = {other for other in imported(parsed(path)) if within(other, "fedray")}
            assert {other for other in ours if not within(other, *ONLY_FROM[package])} == set(), name


def test_the_top_is_imported_by_nobody_below():
    users = {name: set(imported(parsed(path))) for name, path in MODULES.items()}
    assert [name for name, used in users.items() if "fedray.cli" in used] == ["fedray.__main__"]
    assert [name for name, used in users.items() if "fedray.runs" in used] == [
        "fedray.cli",
        "fedray.submit",
        "fedray.sweep",
        "fedray.tune",
    ]


def test_there_is_no_circle():
    graph = {
        name: set(imported(parsed(path), lazily=False)) & MODULES.keys() - {name} for name, path in MODULES.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


LOADED = """
import sys
from importlib import import_module
import fedray.algorithms
print(*sys.modules)
for name in sys.argv[1:]:
    import_module(name)
print(*sys.modules)
"""


def test_algorithms_load_neither_ray_nor_what_only_some_runs_need():
    light = [name for name in MODULES if not within(name, "fedray.backends.ray", "fedray.__main__")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *light], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    algorithms, everything = (set(line.split()) for line in done.stdout.splitlines())
    assert "fedray.algorithms.scaffold" in algorithms
    heavy = {
        "ray",
        "diffusers",
        "transformers",
        "peft",
        "datasets",
        "sklearn",
        "matplotlib",
        "PIL",
        "soundfile",
        "rich",
        "dp_accounting",
        "pandas",
        "optuna",
    }
    assert not algorithms & heavy
    assert not everything & (heavy - {"matplotlib"})  # which the report is drawn with


# what stands in a file


@pytest.mark.parametrize("path", [*SOURCES, *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_short(path):
    assert path.read_text(encoding="utf-8").count("\n") < 400


def public(node: ast.AST, name: str) -> Iterator[tuple[str, ast.AST]]:
    yield name, node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            inner = f"{name}.{child.name}"
            yield from public(child, inner) if isinstance(child, ast.ClassDef) else [(inner, child)]


@everywhere
def test_every_public_name_is_documented(path):
    silent = [name for name, node in public(parsed(path), dotted(path)) if not ast.get_docstring(node)]
    assert silent == []


def test_the_public_names_of_the_package_are_those_a_type_checker_sees():
    [block] = [node for node in parsed(PACKAGE / "__init__.py").body if isinstance(node, ast.If)]
    seen = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == set(fedray.__all__)
    with pytest.raises(AttributeError, match="module 'fedray' has no attribute 'nonsense'"):
        _ = fedray.nonsense


@everywhere
def test_nothing_is_ever_pickled_to_disk_or_unpickled(path):
    picklers = ("pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "ray.cloudpickle")
    assert not [name for name in imported(parsed(path)) if within(name, *picklers)]
    for call in (node for node in ast.walk(parsed(path)) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        assert name not in ("torch.load", "torch.save", "eval", "exec", "yaml.load", "yaml.unsafe_load")
        if name in ("np.load", "numpy.load"):
            assert "allow_pickle=False" in map(ast.unparse, call.keywords), f"line {call.lineno}"


CLASSES = {node.name for path in SOURCES for node in ast.walk(parsed(path)) if isinstance(node, ast.ClassDef)}
OWN_CLASSES = CLASSES - {"FedrayError"}


@everywhere
def test_no_class_is_made_to_be_derived_from(path):
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ClassDef):
            assert not OWN_CLASSES & {ast.unparse(base) for base in node.bases}, node.name


# an algorithm reads like its paper


def code_lines(source: str) -> int:
    """Lines with code on them: not blank, no comment, no docstring, no import."""
    spared: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            spared |= set(range(node.lineno, (node.end_lineno or 0) + 1))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            spared |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines: set[int] = set()
    blank = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in blank:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - spared)


def test_code_lines_are_counted_without_what_explains_them():
    source = (
        '"""Doc\nof two."""\nimport os  # why\n\n# comment\ndef f(\n    a,\n):\n    """Doc."""\n    return """x\ny"""\n'
    )
    assert code_lines(source) == 5


BUDGET = {"fedavg": 30, "fedprox": 10, "scaffold": 35}
ALGORITHMS = sorted((PACKAGE / "algorithms").glob("[a-z]*.py"))


@pytest.mark.parametrize("path", ALGORITHMS, ids=lambda path: path.stem)
def test_an_algorithm_is_as_short_as_its_paper_says_it(path):
    assert code_lines(path.read_text(encoding="utf-8")) <= BUDGET.get(path.stem, 60)


@pytest.mark.parametrize("path", [path for path in ALGORITHMS if path.stem != "baselines"], ids=lambda path: path.stem)
def test_an_algorithm_cites_its_paper_in_its_first_lines(path):
    assert re.search(r"\b(19|20)\d\d\b", "".join(path.read_text(encoding="utf-8").partition("\n")[0]))


# nothing of the machine that it was written on


def tracked() -> list[Path]:
    """The files of the repository: what git tracks, or would if they were added."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is not a git checkout")
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def test_no_tracked_file_names_a_place_on_somebodys_machine():
    private = re.compile(
        rb"(?<![\w.])/(" + rb"|".join([rb"work", rb"root", rb"home/\w", rb"Users/\w"]) + rb")(?![\w-])"
    )
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip().decode(errors='replace')[:100]}"
        for path in tracked()
        for number, line in enumerate(path.read_bytes().splitlines(), start=1)
        if private.search(line)
    ]
    assert found == []


def test_no_tracked_file_is_large_or_made_by_a_run():
    for path in tracked():
        limit = 15_000_000 if "pipelines" in path.parts else 2_000_000  # the generators that come with fedray
        assert path.stat().st_size < limit, path
        assert path.suffix not in (".pt", ".pth", ".pkl", ".pyc", ".npy"), path
