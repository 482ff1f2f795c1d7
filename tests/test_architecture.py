"""The plan of the house, held to by reading the imports of every module.

The table below is the plan: a module may import its own floor or a lower one, rivals never meet,
the core has no terminal, and the command line touches the core inside its functions alone.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("latentlm_core", "latentlm_cli")

FLOORS = {
    "latentlm_core": 0,
    "latentlm_core.errors": 0,
    "latentlm_core.config": 0,
    "latentlm_core.progress": 0,
    "latentlm_core.files": 0,
    "latentlm_core.runtime": 0,
    "latentlm_core.processes": 0,
    "latentlm_core.draws": 0,
    "latentlm_core.result": 0,
    "latentlm_core.layout": 1,
    "latentlm_core.diffusion": 1,
    "latentlm_core.nn": 1,
    "latentlm_core.weight_files": 1,
    "latentlm_core.tokenizers": 2,
    "latentlm_core.models": 2,
    "latentlm_core.published": 2,
    "latentlm_core.published_lm": 2,
    "latentlm_core.data": 3,
    "latentlm_core.hub": 3,
    "latentlm_core.figures": 3,
    "latentlm_core.report": 3,
    "latentlm_core.training": 4,
    "latentlm_core.sampling": 4,
    "latentlm_core.evaluation": 4,
    "latentlm_core.artifacts": 4,
    "latentlm_core.export_config": 4,
    "latentlm_core.importing": 4,
    "latentlm_core.pretrained": 4,
    "latentlm_core.recipes": 5,
    "latentlm_core.workflows": 5,
    "latentlm_core.demo": 5,
    "latentlm_cli": 6,
}
"""Floor of each module; that of a package holds for all in it."""

RIVALS = (
    ("latentlm_core.tokenizers", "latentlm_core.models"),
    ("latentlm_core.training", "latentlm_core.sampling"),
    ("latentlm_core.training", "latentlm_core.evaluation"),
    ("latentlm_core.sampling", "latentlm_core.evaluation"),
)
NOT_IN_THE_CORE = {"typer", "rich", "latentlm_cli"}
LIGHT = {"latentlm_core.errors", "latentlm_core.progress"}
"""What the command line may import of the core outside its functions."""

MAX_LINES = 400
MAX_COMMAND_LINES = 25


@dataclass(frozen=True)
class Import:
    """One imported module.

    Attributes:
        target: dotted name; of ``from a import b`` it is ``a.b`` where that is a module of ours.
        line: where it stands.
        lazy: inside a function, or for the type checker alone.
    """

    target: str
    line: int
    lazy: bool


@dataclass(frozen=True)
class Module:
    """A source file."""

    name: str
    path: Path
    tree: ast.Module
    imports: tuple[Import, ...]


def read_modules(root: Path) -> dict[str, Module]:
    """Every module of the two packages, by its dotted name."""
    paths = {_dotted(path, root): path for pkg in PACKAGES for path in (root / pkg).rglob("*.py")}
    modules = {}
    for name, path in paths.items():
        tree = ast.parse(path.read_text("utf-8"))
        modules[name] = Module(name, path, tree, tuple(_imports(tree, set(paths), lazy=False)))
    return modules


def floor_of(name: str) -> int | None:
    """The floor of the longest prefix that the table knows, below the packages themselves."""
    for prefix in _prefixes(name):
        if prefix in FLOORS and (prefix != "latentlm_core" or name == prefix):
            return FLOORS[prefix]
    return None


def floor_faults(modules: dict[str, Module]) -> list[str]:
    faults = [f"{name} has no floor" for name in modules if floor_of(name) is None]
    for name, item in own_imports(modules):
        floor, target = floor_of(name), floor_of(item.target)
        if floor is not None and target is not None and target > floor:
            faults.append(f"{name}:{item.line} climbs from floor {floor} to {item.target}")
    return faults


def rival_faults(modules: dict[str, Module]) -> list[str]:
    pairs = {frozenset(pair) for pair in RIVALS}
    return [
        f"{name}:{item.line} meets its rival {item.target}"
        for name, item in own_imports(modules)
        for mine in _prefixes(name)
        for theirs in _prefixes(item.target)
        if frozenset((mine, theirs)) in pairs
    ]


def terminal_faults(modules: dict[str, Module]) -> list[str]:
    """Where the core prints, or knows what the command line is made of."""
    faults = []
    for name, module in modules.items():
        if not name.startswith("latentlm_core"):
            continue
        for item in module.imports:
            if item.target.partition(".")[0] in NOT_IN_THE_CORE:
                faults.append(f"{name}:{item.line} imports {item.target}")
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Name | ast.Attribute) and ast.unparse(node) in {
                "print",
                "sys.stdout",
                "sys.stderr",
            }:
                faults.append(f"{name}:{node.lineno} uses {ast.unparse(node)}")
    return faults


def eager_faults(modules: dict[str, Module]) -> list[str]:
    """Where the command line loads the core before it is asked for anything."""
    return [
        f"{name}:{item.line} imports {item.target} outside a function"
        for name, item in own_imports(modules)
        if name.startswith("latentlm_cli")
        and item.target.startswith("latentlm_core")
        and item.target not in LIGHT
        and not item.lazy
    ]


def own_imports(modules: dict[str, Module]) -> Iterator[tuple[str, Import]]:
    for name, module in modules.items():
        for item in module.imports:
            if item.target in modules:
                yield name, item


def _imports(node: ast.AST, known: set[str], lazy: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, lazy)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            base = str(child.module)
            for alias in child.names:
                name = f"{base}.{alias.name}"
                yield Import(name if name in known else base, child.lineno, lazy)
        else:
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            is_typing = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            yield from _imports(child, known, lazy or is_function or is_typing)


def _dotted(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


MODULES = read_modules(ROOT)


def test_the_whole_house_was_read() -> None:
    assert len(MODULES) > 50
    assert sum(1 for _ in own_imports(MODULES)) > 100
    assert {"latentlm_core.workflows", "latentlm_cli.app"} <= MODULES.keys()


def test_imports_go_downwards_only() -> None:
    assert not floor_faults(MODULES)


def test_imports_have_no_circle() -> None:
    graph: dict[str, set[str]] = {name: set() for name in MODULES}
    for name, item in own_imports(MODULES):
        graph[name].add(item.target)
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)


def test_rivals_never_meet() -> None:
    assert not rival_faults(MODULES)


def test_the_core_has_no_terminal() -> None:
    assert not terminal_faults(MODULES)


def test_the_command_line_loads_the_core_when_it_is_asked() -> None:
    assert not eager_faults(MODULES)


@pytest.mark.parametrize(
    ("path", "source", "faults"),
    [
        ("latentlm_core/files.py", "import latentlm_core.layout", floor_faults),
        ("latentlm_core/nn/layers.py", "from latentlm_core import workflows", floor_faults),
        ("latentlm_core/attic.py", "", floor_faults),
        (
            "latentlm_core/layout.py",
            "def f():\n    from latentlm_core import sampling",
            floor_faults,
        ),
        ("latentlm_core/models/dit.py", "from latentlm_core.tokenizers import base", rival_faults),
        ("latentlm_core/sampling.py", "import latentlm_core.training.trainer", rival_faults),
        ("latentlm_core/layout.py", "from rich.text import Text", terminal_faults),
        ("latentlm_core/layout.py", "import sys\nsys.stderr.write('x')", terminal_faults),
        ("latentlm_core/layout.py", "def f():\n    print('x')", terminal_faults),
        ("latentlm_cli/app.py", "from latentlm_core import workflows", eager_faults),
        ("latentlm_cli/app.py", "if True:\n    import latentlm_core.config", eager_faults),
    ],
)
def test_a_planted_fault_is_found(tmp_path: Path, path: str, source: str, faults) -> None:
    skeleton = [
        "latentlm_core/config.py",
        "latentlm_core/layout.py",
        "latentlm_core/sampling.py",
        "latentlm_core/workflows.py",
        "latentlm_core/tokenizers/base.py",
        "latentlm_core/training/trainer.py",
    ]
    for name in skeleton:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert faults(read_modules(tmp_path)) == []
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(source)
    assert len(faults(read_modules(tmp_path))) == 1


def test_no_file_is_too_long() -> None:
    sources = [path for folder in (*PACKAGES, "tests") for path in (ROOT / folder).rglob("*.py")]
    lengths = {str(p.relative_to(ROOT)): len(p.read_text("utf-8").splitlines()) for p in sources}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_a_command_is_one_call_of_the_core() -> None:
    """A command's body imports, calls and shows; whatever is longer belongs into the core."""
    bodies = {
        f"{name}.{node.name}": node.end_lineno - node.body[0].lineno + 1
        for name, module in MODULES.items()
        if name.startswith("latentlm_cli")
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef) and isinstance(_first_statement(node), ast.ImportFrom)
    }
    assert len(bodies) >= 9
    assert {name: lines for name, lines in bodies.items() if lines > MAX_COMMAND_LINES} == {}


def _first_statement(function: ast.FunctionDef) -> ast.stmt:
    has_docstring = ast.get_docstring(function) is not None and len(function.body) > 1
    return function.body[1 if has_docstring else 0]


def test_the_tree_in_the_readme_is_the_tree_on_disk() -> None:
    listed = read_tree((ROOT / "README.md").read_text("utf-8"))
    missing = [name for name in listed if not (ROOT / name).exists()]
    sources = {str(module.path.relative_to(ROOT)) for module in MODULES.values()}
    unlisted = {name for name in sources if not name.endswith("__init__.py")} - listed.keys()
    assert (missing, sorted(unlisted)) == ([], [])
    assert [name for name, purpose in listed.items() if not purpose] == []


def test_ci_runs_the_command_of_the_readme() -> None:
    command = 'pip install -e ".[test]" && pytest'
    assert command in (ROOT / "README.md").read_text("utf-8")
    assert command in (ROOT / ".ci" / "run").read_text("utf-8")


def read_tree(text: str) -> dict[str, str]:
    """Purpose by path, from the block that opens with ```` ```text tree ````.

    A line is a name, two or more spaces, a purpose. Names of folders end in a slash, and what is
    in them stands below, indented by two more spaces.
    """
    block = re.search(r"^```text tree\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert block, "README.md has no block ```text tree"
    listed: dict[str, str] = {}
    folders: list[str] = []
    for line in filter(str.strip, block[1].splitlines()):
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, purpose = line.strip().partition("  ")
        folders[depth:] = [name]
        listed["".join(folders[: depth + 1])] = purpose.strip()
    return listed


def test_a_tree_is_read_with_its_folders() -> None:
    lines = ["x", "```text tree", "a/        one", "  b.py    two", "  c/      three"]
    text = "\n".join([*lines, "    d.py  four", "e  f", "```", ""])
    assert read_tree(text) == {
        "a/": "one",
        "a/b.py": "two",
        "a/c/": "three",
        "a/c/d.py": "four",
        "e": "f",
    }
