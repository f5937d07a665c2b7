"""Tries to break the layout: an arrow that points back, a heavy import at start-up, a file that sprawls."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "metier"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# cli -> sweep -> pipeline -> stages -> model -> kernels, and all -> artifacts, keys, domains, recipe, errors, reasons.
FOUNDATIONS = {"artifacts", "keys", "domains", "recipe", "errors", "reasons"}
STAGES = {"data", "training", "evaluation", "serving"}
MAY_IMPORT = {
    "": FOUNDATIONS,  # metier/__init__.py
    "__main__": {"cli"},
    "errors": set(),
    "artifacts": {"errors"},
    "keys": {"errors"},
    "reasons": set(),
    "domains": {"errors", "recipe"},
    "recipe": {"errors"},
    "kernels": FOUNDATIONS,
    "model": FOUNDATIONS | {"kernels"},
    **{stage: FOUNDATIONS | {"model", "kernels"} for stage in STAGES},
    "pipeline": FOUNDATIONS | STAGES | {"model"},
    "sweep": FOUNDATIONS | STAGES | {"pipeline", "model"},
    "terminal": FOUNDATIONS,
    "cli": FOUNDATIONS | STAGES | {"pipeline", "sweep", "model", "terminal"},
}
# One site for each heavy dependency whose next release may break it.
# model/template.py is a process of its own, which must not import torch.
ONLY_IN = {"transformers": {"model/load.py", "model/template.py"}, "peft": set(), "datasets": set(), "pickle": set()}
BANNED_NAMES = {"utils", "common", "helpers", "misc", "manager", "handler", "processor", "wrapper", "base"}
# The readers of a damaged GGUF file or tokenizer.json raise whatever its bytes lead to.
BROAD_EXCEPT_IN = {"model/load.py"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 70


def _name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def _room(path: Path) -> str:
    """`data` for metier/data/split.py, `recipe` for metier/recipe.py, and `` for metier/__init__.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """Every module that a file imports, at its top or in a function, with the line."""
    package = ["metier", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(p for p in (start, node.module) if p)
            yield node.lineno, module
            if module == "metier":
                yield from ((node.lineno, f"metier.{alias.name}") for alias in node.names)


def test_the_walk_sees_the_package() -> None:
    assert {"recipe/recipe.py", "artifacts.py", "errors.py", "__init__.py"} <= {_name(p) for p in SOURCES}
    assert {"yaml", "metier.errors"} <= {module for _, module in _imports(PACKAGE / "recipe" / "read.py")}


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_imports_follow_the_arrows(path: Path) -> None:
    room = _room(path)
    assert room in MAY_IMPORT, f"{_name(path)} is in no room of the layout"
    for line, module in _imports(path):
        parts = module.split(".")
        if parts[0] != "metier" or len(parts) == 1 or parts[1] == room:
            continue
        assert parts[1] in MAY_IMPORT[room], f"{_name(path)}:{line} imports {module}, against the arrows"


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_a_heavy_dependency_has_one_import_site(path: Path) -> None:
    for line, module in _imports(path):
        sites = ONLY_IN.get(module.split(".")[0])
        assert sites is None or _name(path) in sites, f"{_name(path)}:{line} imports {module}"


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_no_builtin_runs_text_as_code(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("exec", "eval", "compile", "__import__"), f"{_name(path)}:{node.lineno}"


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_nothing_catches_everything(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        names = {c.id if isinstance(c, ast.Name) else None if c is not None else "bare" for c in caught}
        broad = names & {"Exception", "BaseException", "bare"}
        assert not broad or _name(path) in BROAD_EXCEPT_IN, f"{_name(path)}:{node.lineno} catches {broad}"


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_FILE_LINES, f"{_name(path)} has {text.count(chr(10))} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{_name(path)}:{node.lineno} {node.name} has {length} lines"


def test_no_module_has_a_name_that_says_nothing() -> None:
    names = {part for path in SOURCES for part in path.relative_to(PACKAGE).with_suffix("").parts}
    assert not names & BANNED_NAMES


def _modules_after(statement: str) -> set[str]:
    """The top-level modules in a new interpreter after `statement`."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return {name.split(".")[0] for name in json.loads(done.stdout)}


@pytest.mark.parametrize(
    "statement", ["import metier", "import metier.recipe", "import metier.artifacts", "import metier.cli"]
)
def test_start_up_imports_nothing_heavy(statement: str) -> None:
    heavy = {"torch", "transformers", "matplotlib", "sklearn", "scipy", "polars", "numpy", "gguf", "sacrebleu"}
    assert not _modules_after(statement) & heavy
