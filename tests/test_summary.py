"""`tools.summary`, held against the numbers of the papers."""

import json
import re

import pytest

from resnet_flax import models
from resnet_flax.errors import UserError
from resnet_flax.models import ARCHITECTURES
from resnet_flax.tools import summary
from tests import commands


@pytest.mark.parametrize(
    ("name", "shortcut", "stride_in_3x3", "parameters", "billions"),
    [  # [R Table 1 has 1.8, 3.6, 3.8, 7.6, 11.3]. Plain-34 is 34 B less its three projections.
        ("resnet18", "B", False, 11_689_512, 1.814),
        ("plain18", None, False, 11_515_688, 1.795),
        ("resnet34", "B", False, 21_797_672, 3.664),
        ("resnet34", "A", False, 21_623_848, 3.644),
        ("plain34", None, False, 21_623_848, 3.644),
        ("resnet50", None, False, 25_557_032, 3.858),
        ("resnet50", None, True, 25_557_032, 4.089),
        ("resnet101", None, False, 44_549_160, 7.570),
        ("resnet152", None, False, 60_192_808, 11.282),
        ("resnet152", None, True, 60_192_808, 11.514),
    ],
)
def test_imagenet_nets_have_the_papers_numbers(name, shortcut, stride_in_3x3, parameters, billions):
    total = summary.summarize(name, shortcut=shortcut, stride_in_3x3=stride_in_3x3)
    assert total["parameters"] == parameters
    assert round(total["multiply_adds"] / 1e9, 3) == billions
    assert total["weighted_layers"] == int(re.sub(r"\D", "", name))


def test_layers_add_up_and_have_their_canonical_names():
    total = summary.summarize("resnet20")
    rows = {row["name"]: row for row in total["layers"]}
    assert len(rows) == len(total["layers"]) == 2 * 19 + 1
    assert [*rows][:3] == ["stem_conv", "stem_bn", "stage1_block1/conv1"]
    assert [*rows][-2:] == ["stage3_block3/bn2", "head"]
    assert total["multiply_adds"] == 40_551_040
    assert rows["stage2_block2/conv1"]["shape"] == (16, 16, 32)
    assert rows["stage2_block2/conv1"]["multiply_adds"] == 9 * 32 * 32 * 16 * 16
    headless = summary.summarize("resnet20", num_classes=0)
    assert total["parameters"] - headless["parameters"] == 650
    assert headless["weighted_layers"] == 19


def test_a_thousand_layers_are_listed_one_by_one():
    total = summary.summarize("resnet1202")
    assert (total["parameters"], total["multiply_adds"]) == (19_421_274, 2_829_238_912)
    assert sum(row["kind"] != "BatchNorm" for row in total["layers"]) == 1202


def test_command_line(capsys):
    summary.main(["--model=resnet20", "--shortcut=B", "--json"])
    total = json.loads(capsys.readouterr().out)
    assert (total["name"], total["parameters"], len(total["layers"])) == ("resnet20", 272_474, 43)
    summary.main(["--model=resnet20"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == ["stem_conv", "Conv", *"32 x 32 x 16".split(), "432", "442,368"]
    assert lines[-1] == ["resnet20", "A", "10", "32", "269,722", "20", "40,551,040"]
    for args, message in (
        ([], "give either --model=NAME or --list"),
        (["--model=resnet20", "--shortcuts=B"], "unrecognized arguments"),
        (["--model=plain20", "--shortcut=C"], "is plain and has no shortcuts"),
        (["--model=resnet20", "--image_size=4"], "--image_size=4 must be at least 8"),
    ):
        with pytest.raises(UserError, match=message):
            summary.main(args)
    done = commands.run("resnet_flax.tools.summary", "--model=resnet21")
    assert done.returncode == 1
    assert done.stderr.startswith("error: unknown model 'resnet21'")
    assert len(done.stderr.splitlines()) <= 2


def test_a_list_of_nets_as_text_and_as_json(capsys, monkeypatch):
    nets = "highway20", "resnet152", "resnet110", "resnet164_preact"
    monkeypatch.setattr(models, "ARCHITECTURES", {name: ARCHITECTURES[name] for name in nets})
    summary.main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["name", *nets]
    assert "11,282,415,616" in lines[2]
    summary.main(["--list", "--json"])
    totals = {t.pop("name"): t for t in json.loads(capsys.readouterr().out)}
    assert [*totals] == [*nets]
    keys = {"shortcut", "num_classes", "image_size", "parameters", "weighted_layers"}
    assert all(t.keys() == keys | {"multiply_adds"} for t in totals.values())
    assert totals["highway20"]["parameters"] == 514_522
    assert totals["resnet110"]["multiply_adds"] == 252_887_680
    assert totals["resnet164_preact"]["weighted_layers"] == 164
