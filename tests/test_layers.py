"""Imports inside the package point strictly down, from room to room."""

import ast

ROOMS = [
    {"main", "tools", "__main__"},
    {"grid", "reporting"},
    {"pretrained"},
    {"training"},
    {"runs"},
    {"data"},
    {"models"},
    {"devices", "validation", "commands"},
    {"config", "signals"},
    {"errors"},
]
# Still to be turned round.
UPWARD = {("runs", "training"), ("training", "pretrained")}


def rooms_imported_by(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "resnet_flax":
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [a.name for a in node.names]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                assert not alias.name.startswith("resnet_flax."), f"{path}: import {alias.name}"


def test_every_room_imports_only_from_below(root):
    package = root / "resnet_flax"
    level = {room: i for i, rooms in enumerate(ROOMS) for room in rooms}
    found = set()
    for path in package.rglob("*.py"):
        room = path.relative_to(package).with_suffix("").parts[0]
        if room != "__init__":
            found |= {(room, other) for other in rooms_imported_by(path) if other != room}
    upward = {(room, other) for room, other in found if level[room] >= level[other]}
    assert upward <= UPWARD
    assert len(found) > 30


def test_no_file_is_much_over_300_lines(root):
    for folder in ("resnet_flax", "configs"):
        for path in (root / folder).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 310, path
