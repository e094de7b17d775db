"""The notebook runs from its first cell to its last, and is committed with clean outputs."""

import json
import re

import matplotlib
import pytest

from tests.conftest import ROOT

PATH = ROOT / "notebooks/main.ipynb"
# The training step of `conftest.make_small_config`, which is compiled once for all tests.
SMALLEST = 'DATA = "digits"\nSTEPS, BATCH, RATE = 12, 16, 0.1\nNETS = ("resnet8",)\n'


@pytest.fixture(scope="module")
def cells():
    notebook = json.loads(PATH.read_text())
    assert notebook["nbformat"] == 4
    return [c for c in notebook["cells"] if c["cell_type"] == "code"]


def source(cell):
    return "".join(cell["source"])


def test_one_cell_holds_what_is_to_be_changed(cells):
    tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", ())]
    assert tagged == cells[:1]
    names = re.findall(r"^([A-Z, ]+) =", source(cells[0]), re.MULTILINE)
    assert names == re.findall(r"^([A-Z, ]+) =", SMALLEST, re.MULTILINE)


def test_it_runs_from_top_to_bottom(cells, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    names = {"__name__": "notebook"}
    with matplotlib.rc_context():  # The notebook sets what its figures look like.
        for number, cell in enumerate(cells):
            text = source(cell) if number else SMALLEST
            exec(compile(text, f"cell {number}", "exec"), names)
    assert names["results"]["resnet8"]["steps"] == 12
    figures = list(map(names["plt"].figure, names["plt"].get_fignums()))
    assert len(figures) == sum("image/png" in str(c["outputs"]) for c in cells) == 6
    # As many responses as layers with batch normalisation: all but the last.
    (line,) = figures[4].axes[0].get_lines()
    assert list(line.get_xdata()) == list(range(1, 8))
    names["plt"].close("all")
    assert "resnet8      training error" in capsys.readouterr().out


def test_its_outputs_are_of_one_run_and_say_nothing_of_a_machine(cells):
    assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert "execution" not in cell["metadata"]
        for output in cell["outputs"]:
            assert output["output_type"] in ("stream", "display_data", "execute_result")
            assert output.get("name") != "stderr"
            text = json.dumps({**output, "data": {**output.get("data", {}), "image/png": ""}})
            assert not re.search(r"/(root|home|tmp|work|content)/|0x[0-9a-f]{6}", text)
    assert PATH.stat().st_size < 500_000
