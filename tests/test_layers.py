"""Imports inside the package point strictly downwards, between rooms and inside them."""

import ast
import graphlib

ROOMS = [
    {"errors", "locks", "signals"},
    {"config", "commands"},
    {"devices"},
    {"models"},
    {"data"},
    {"runs"},
    {"training"},
    {"pretrained"},
    {"tools"},
    {"main", "__main__", "fitting"},
]


def module_of(path, root):
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path, modules):
    """Modules of the package that a file imports, also inside its functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "resnet_flax":
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in modules else node.module
        elif isinstance(node, ast.Import):
            for alias in node.names:
                assert not alias.name.startswith("resnet_flax."), f"{path}: import {alias.name}"


def test_imports_point_downwards_and_in_no_circle(root):
    files = {module_of(p, root): p for p in (root / "resnet_flax").rglob("*.py")}
    level = {name: i for i, names in enumerate(ROOMS) for name in names}
    graph = {name: set(imports_of(path, files)) - {"resnet_flax"} for name, path in files.items()}
    assert sum(map(len, graph.values())) > 100
    for name, imported in graph.items():
        for other in imported if name != "resnet_flax" else ():
            here, there = (x.split(".")[1] for x in (name, other))
            assert here == there or level[there] < level[here], f"{name} imports {other}"
    graphlib.TopologicalSorter(graph).prepare()  # Raises for a circle.


def test_no_file_is_much_over_300_lines(root):
    for folder in ("resnet_flax", "configs"):
        for path in (root / folder).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 310, path
