"""The numbers in launch/README.md are the recorded ones."""

from tests.conftest import ROOT

README = (ROOT / "launch/README.md").read_text()
COUNTS, EFFICIENCIES = (
    (ROOT / "results/scaling/expected.txt").read_text().split("expected efficiency", 1)
)


def table(first_cell):
    lines = README.split(f"\n| {first_cell} |", 1)[1].split("\n\n")[0].splitlines()[2:]
    for line in lines:
        net, *cells = (cell.strip(" %") for cell in line.strip("|").split("|"))
        yield net.split()[0].lower().replace("-", ""), cells


def recorded(block):
    """{(net, devices, images a device, whether grouped): the other columns}."""
    rows = [line.split() for line in block.splitlines() if line.strip().startswith("resnet")]
    return {(net, d, i, kind != "global"): rest for net, d, i, kind, *rest in rows}


def test_quoted_efficiencies_are_the_recorded_ones():
    rows = list(table("net | devices | images a device"))
    shares = recorded(EFFICIENCIES.split("computes at 40% of its peak")[1].split("expected")[0])
    assert len(rows) == 12
    for net, (devices, images, *chips) in rows:
        both = [shares[net, devices, images, grouped] for grouped in (False, True)]
        for cell, *exact in zip(chips, *both, strict=True):
            for quoted, share in zip(cell.split(","), exact, strict=True):
                # Rounded from tenths.
                assert abs(float(quoted.strip(" %")) - float(share.strip("%"))) <= 0.5


def test_quoted_counts_are_the_recorded_ones():
    rows = recorded(COUNTS)
    for net, quoted in table("net | of batch statistics, global batch norm"):
        own = {key: row for key, row in rows.items() if key[0] == net}
        assert len(own) >= 10
        for (*_, grouped), (_, count, kilobytes, others, megabytes, rest) in own.items():
            assert rest == "0"
            if grouped:
                assert count == "0"
                continue
            assert quoted[:3] == [count, f"{float(kilobytes):.0f} KB", others]
            assert abs(float(megabytes) - float(quoted[3].removesuffix(" MB"))) <= 0.5
