"""What the code imports is what a plain install brings.

Every import in nexusengine, also those inside functions, names a package of [project].dependencies, or one that is
optional and where the code says what to do without it.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
MODULES = {"huggingface-hub": "huggingface_hub", "pyzmq": "zmq", "prometheus-client": "prometheus_client"}
MODULES |= {"nvidia-ml-py": "pynvml", "flash-attn": "flash_attn"}
"""Packages whose module has another name."""
OPTIONAL = {
    "matplotlib": "plots, with the extra plot",
    "triton": "comes with torch where torch can use it",
    "flash_attn": "an attention backend, with the extra flash",
    "flash_attn_interface": "an attention backend, built from its source",
    "flashinfer": "an attention backend, chosen where it is installed",
    "gptqmodel": "packed weights, with the extra packed",
}


def imports(tree: ast.AST, guarded: bool = False) -> Iterator[tuple[str, int, bool]]:
    """(top-level module, line, whether an ImportError is caught or only type checkers look) of each import below."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.lineno, guarded) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.split(".")[0], node.lineno, guarded
        elif isinstance(node, ast.Try):
            caught = {
                name for handler in node.handlers for name in re.findall(r"\w+", ast.unparse(handler.type or tree))
            }
            inside = guarded or bool(caught & {"ImportError", "ModuleNotFoundError", "Exception"})
            yield from imports(ast.Module(node.body, []), inside)
            for other in (node.handlers, node.orelse, node.finalbody):
                yield from imports(ast.Module(other, []), guarded)  # type: ignore[arg-type]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imports(ast.Module(node.body, []), True)
            yield from imports(ast.Module(node.orelse, []), guarded)
        else:
            yield from imports(node, guarded)


def sources() -> list[Path]:
    """All files of the package; the folders of it that are links are followed, whatever the version of Python."""
    package = ROOT / "nexusengine"
    folders = [package, *(folder.resolve() for folder in package.iterdir() if folder.is_symlink())]
    return sorted({path.resolve() for folder in folders for path in folder.rglob("*.py")})


def third_party() -> dict[str, list[tuple[str, bool]]]:
    """Module -> (file:line, guarded) of its imports."""
    found: dict[str, list[tuple[str, bool]]] = {}
    for path in sources():
        for name, line, guarded in imports(ast.parse(path.read_text(encoding="utf-8"))):
            if name not in sys.stdlib_module_names and name != "nexusengine":
                found.setdefault(name, []).append((f"{path.relative_to(ROOT)}:{line}", guarded))
    return found


def required() -> set[str]:
    project = tomllib.loads(ROOT.joinpath("pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = [re.match(r"[\w.-]+", entry) for entry in project["dependencies"]]
    return {MODULES.get(n[0], n[0]) for n in names if n}


def test_every_import_is_a_dependency_or_known_to_be_optional() -> None:
    known = required()
    assert {"torch", "zmq", "huggingface_hub", "pynvml"} <= known
    unknown = {name: places for name, places in third_party().items() if name not in known and name not in OPTIONAL}
    assert unknown == {}


def test_every_module_that_is_said_to_be_optional_is_imported_somewhere() -> None:
    assert [name for name in OPTIONAL if name not in third_party()] == []


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import httpx", [("httpx", False)]),
        ("def f():\n    from httpx import X", [("httpx", False)]),
        ("try:\n    import a.b\nexcept ImportError:\n    import c", [("a", True), ("c", False)]),
        ("if TYPE_CHECKING:\n    import a\nfrom . import b", [("a", True)]),
    ],
)
def test_imports_are_found_wherever_they_stand(code: str, expected: list[tuple[str, bool]]) -> None:
    assert [(name, guarded) for name, _, guarded in imports(ast.parse(code))] == expected


ONLY_WHAT_IS_INSTALLED = """
import importlib, importlib.metadata, pkgutil, re, sys
from importlib.abc import MetaPathFinder

def closure(names):
    seen, todo = set(), list(names)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in seen:
            continue
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # of another system
        seen.add(name)
        todo += [re.match(r"[A-Za-z0-9_.-]+", need)[0] for need in needs if "extra ==" not in need]
    return seen

brought = closure(sys.argv[1].split(","))
allowed = {
    module
    for module, owners in importlib.metadata.packages_distributions().items()
    if any(re.sub(r"[-_.]+", "-", owner).lower() in brought for owner in owners)
}

class Plain(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        own = top in sys.stdlib_module_names or top.startswith("_sysconfigdata") or top == "nexusengine"
        if not own and top not in allowed:
            raise ModuleNotFoundError(f"No module named {name!r} in a plain install", name=name)

sys.meta_path.insert(0, Plain())
import nexusengine
failed = {}
for module in pkgutil.walk_packages(nexusengine.__path__, "nexusengine."):
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        failed[module.name] = error.name or str(error)
print(failed)
assert "httpx" not in allowed and "transformers" not in allowed
"""


def test_every_module_imports_with_what_a_plain_install_brings() -> None:
    """But those of what is optional."""
    project = tomllib.loads(ROOT.joinpath("pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = ",".join(re.match(r"[\w.-]+", entry)[0] for entry in project["dependencies"])  # type: ignore[index]
    done = subprocess.run(
        [sys.executable, "-c", ONLY_WHAT_IS_INSTALLED, names], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    failed = ast.literal_eval(done.stdout.splitlines()[-1])
    assert {name: missing for name, missing in failed.items() if missing.split(".")[0] not in OPTIONAL} == {}
