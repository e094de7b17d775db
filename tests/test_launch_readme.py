"""launch/README.md says what the files and the recorded output say."""

import re

from resnet_flax.config import base_config, flatten
from tests.conftest import ROOT

README = (ROOT / "launch/README.md").read_text()
RAW = (ROOT / "results/scaling/expected.txt").read_text()


def table(first_cell):
    lines = README.split(f"\n| {first_cell} |", 1)[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def raw(block):
    """{(net, devices, images a device, whether grouped): the other columns}."""
    rows = {}
    for line in block.splitlines():
        cells = line.split()
        if cells and cells[0].startswith("resnet"):
            rows[cells[0], int(cells[1]), int(cells[2]), cells[3] != "global"] = cells[4:]
    return rows


def test_quoted_efficiencies_are_the_recorded_ones():
    recorded = raw(RAW.split("computes at 40% of its peak")[1].split("expected")[0])
    rows = table("net | devices | images a device")
    assert len(rows) == 12
    for net, devices, images, *chips in rows:
        key = net.lower().replace("-", ""), int(devices), int(images)
        both = zip(recorded[*key, False], recorded[*key, True], strict=True)
        for cell, shares in zip(chips, both, strict=True):
            quoted = [float(share.strip(" %")) for share in cell.split(",")]
            # Rounded from tenths.
            assert all(abs(q - float(s[:-1])) <= 0.5 for q, s in zip(quoted, shares, strict=True))


def test_quoted_counts_are_the_recorded_ones():
    recorded = raw(RAW.split("expected efficiency")[0])
    for net, statistics, kilobytes, gradients, megabytes in table(
        "net | of batch statistics, global batch norm"
    ):
        name = net.split()[0].lower().replace("-", "")
        rows = {k: v for k, v in recorded.items() if k[0] == name}
        assert len(rows) >= 10
        for (*_, grouped), (_, count, kb, others, mb, rest) in rows.items():
            assert rest == "0"
            if grouped:
                assert count == "0"
                continue
            assert (count, others) == (statistics, gradients)
            assert f"{float(kb):.0f} KB" == kilobytes
            assert abs(float(mb) - float(megabytes.removesuffix(" MB"))) <= 0.5


def test_what_it_names_exists():
    for path in re.findall(r"\]\((?!http)([^)\s]+)\)", README):
        assert (ROOT / "launch" / path).exists(), path
    for path in re.findall(r"(?:configs|launch|tests)/[\w./]+\.(?:py|sh|sbatch|yaml)", README):
        assert (ROOT / path).exists(), path
    known = flatten(base_config())
    for key in re.findall(r"(?:--config\.|`)((?:model|data|train|checkpoint)\.\w+)", README):
        assert key in known, key
