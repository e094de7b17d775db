"""Imports inside the package point strictly downwards."""

import ast

LEVELS = [
    {"errors", "signals"},
    {
        "config",
        "models",
        "augment",
        "optim",
        "packing",
        "sharding",
        "cache",
        "cpu",
        "torch_names",
        "workdir",
        "progress",
        "distributed",
        "file_list",
        "commands",
        "randomness",
    },
    {"data", "state", "metrics", "devices"},
    {"steps", "checkpoint", "weights", "feed", "reporting"},
    {"evaluate", "identity", "inputs", "outputs"},
    {"experiment", "pretrained"},
    {"record", "seeds"},
    {"account", "scoring"},
    {"loop", "handover"},
    {"train", "trained"},
    {"main", "tools", "__main__"},
]


def level_of(module):
    return next(i for i, names in enumerate(LEVELS) if module in names)


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "resnet_flax":
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [a.name for a in node.names]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                assert not alias.name.startswith("resnet_flax."), f"{path}: import {alias.name}"


def test_every_module_has_a_level_and_imports_only_from_below(root):
    package = root / "resnet_flax"
    seen = 0
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        if parts == ("__init__",):
            continue
        own = parts[0]
        for imported in imports_of(path):
            if imported == own:
                assert len(parts) > 1, f"{path} imports itself"
                continue
            seen += 1
            assert level_of(imported) < level_of(own), f"{path} imports {imported}"
    assert seen > 30


def test_no_file_is_much_over_300_lines(root):
    for folder in ("resnet_flax", "configs"):
        for path in (root / folder).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 310, path
