"""`tools.summary`, held against the numbers of the papers."""

import functools
import json
import subprocess
import sys

import pytest

from resnet_flax.errors import UserError
from resnet_flax.models import ARCHITECTURES
from resnet_flax.tools import summary
from tests.conftest import ROOT

# name, shortcut, stride in the 3x3: parameters, multiply-adds in 1e9 [R Table 1 has 1.8, 3.6, 3.8,
# 7.6, 11.3]. Plain-34 is 3,663,761,408 less its three projections, 3 * 6,422,528.
IMAGENET = {
    ("resnet18", "B", False): (11_689_512, 1.814),
    ("resnet18", "A", False): (11_515_688, 1.795),
    ("plain18", None, False): (11_515_688, 1.795),
    ("resnet34", "B", False): (21_797_672, 3.664),
    ("resnet34", "A", False): (21_623_848, 3.644),
    ("plain34", None, False): (21_623_848, 3.644),
    ("resnet50", None, False): (25_557_032, 3.858),
    ("resnet50", None, True): (25_557_032, 4.089),
    ("resnet101", None, False): (44_549_160, 7.570),
    ("resnet101", None, True): (44_549_160, 7.801),
    ("resnet152", None, False): (60_192_808, 11.282),
    ("resnet152", None, True): (60_192_808, 11.514),
}


@pytest.mark.parametrize("net", IMAGENET)
def test_imagenet_nets_have_the_papers_numbers(net):
    name, shortcut, stride = net
    total = summary.summarize(name, shortcut=shortcut, stride_in_3x3=stride)
    parameters, billions = IMAGENET[net]
    assert total["parameters"] == parameters
    assert round(total["multiply_adds"] / 1e9, 3) == billions
    assert total["weighted_layers"] == int("".join(c for c in name if c.isdigit()))


def test_layers_add_up_and_have_their_canonical_names():
    total = summary.summarize("resnet20")
    names = [row["name"] for row in total["layers"]]
    assert len(set(names)) == len(names) == 2 * 19 + 1
    assert names[:3] == ["stem_conv", "stem_bn", "stage1_block1/conv1"]
    assert names[-1] == "head"
    assert "stage3_block3/bn2" in names
    assert total["multiply_adds"] == 40_551_040
    rows = {row["name"]: row for row in total["layers"]}
    assert rows["stage2_block2/conv1"]["shape"] == (16, 16, 32)
    assert rows["stage2_block2/conv1"]["multiply_adds"] == 9 * 32 * 32 * 16 * 16


def test_a_thousand_layers_are_listed_one_by_one():
    total = summary.summarize("resnet1202")
    assert (total["parameters"], total["multiply_adds"]) == (19_421_274, 2_829_238_912)
    assert sum(row["kind"] != "BatchNorm" for row in total["layers"]) == 1202


def test_without_the_last_layer():
    whole, headless = (summary.summarize("resnet20", num_classes=n) for n in (10, 0))
    assert whole["parameters"] - headless["parameters"] == 650
    assert headless["weighted_layers"] == 19


def test_command_line():
    def run(*args):
        command = [sys.executable, "-m", "resnet_flax.tools.summary", *args]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert 3_663_761_408 - 3 * 6_422_528 == summary.summarize("plain34")["multiply_adds"]
    done = run("--model=resnet20", "--shortcut=B", "--json")
    total = json.loads(done.stdout)
    assert (total["name"], total["parameters"], total["weighted_layers"]) == (
        "resnet20",
        272_474,
        20,
    )
    for args, message in (
        (["--model=resnet21"], "unknown model 'resnet21'"),
        ([], "give either --model=NAME or --list"),
        (["--model=resnet20", "--shortcuts=B"], "unrecognized arguments"),
        (["--model=plain20", "--shortcut=C"], "is plain and has no shortcuts"),
    ):
        done = run(*args)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
        assert len(done.stderr.splitlines()) <= 2


def test_list_has_every_net_as_text_and_as_json(capsys, monkeypatch):
    monkeypatch.setattr(summary, "summarize", functools.cache(summary.summarize))
    summary.main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["name", *ARCHITECTURES]
    assert "11,282,415,616" in next(line for line in lines if line.startswith("resnet152 "))
    summary.main(["--list", "--json"])
    totals = json.loads(capsys.readouterr().out)
    assert [t["name"] for t in totals] == list(ARCHITECTURES)
    keys = {"name", "shortcut", "num_classes", "image_size"}
    assert {frozenset(t) for t in totals} == {
        frozenset(keys | {"parameters", "weighted_layers", "multiply_adds"})
    }
    by_name = {t["name"]: t for t in totals}
    assert by_name["highway20"]["parameters"] == 514_522
    assert by_name["resnet110"]["multiply_adds"] == 252_887_680
    assert by_name["resnet164_preact"]["weighted_layers"] == 164


def test_bad_image_size():
    with pytest.raises(UserError, match="image_size=4"):
        summary.summarize("resnet20", image_size=4)
