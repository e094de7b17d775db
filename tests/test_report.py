"""`tools.report`, on made-up runs whose statistics are known."""

import base64
import json
import math
import re
from xml.etree import ElementTree

import pytest

from resnet_flax import models
from resnet_flax.errors import UserError
from resnet_flax.tools.report import __main__ as report
from resnet_flax.tools.report import experiment, figures, published, runs, tables
from tests import commands
from tests.conftest import ROOT

CLASSES = ["cat", "$^$", "<b>|ship"]
PICTURES = [f"{name}.png" for name in "fig6 fig6_2 fig7 parameters class_errors confusion".split()]


def write_run(directory, error=0.1, *, finished=True, seed=0, shortcut=None, info=(), **config):
    """The files of a real run, of another test error; `config` has "__" for dots."""
    directory.mkdir(parents=True)
    real = ROOT / "results/cifar10/resnet20/seed0"
    files = {name: json.loads((real / f"{name}.json").read_text()) for name in ("config", "run")}
    flat = files["config"]
    flat |= {"seed": seed} | {key.replace("__", "."): value for key, value in config.items()}
    name, total, wrong = flat["model.name"], flat["train.total_steps"], round(100 * error)
    data = {"name": flat["data.name"], "fingerprint": "f" * 64}
    files["run"] |= {"model": name, "total_steps": total, "dtype": "float32", "data": data}
    files["run"] |= {"shortcut": shortcut or models.ARCHITECTURES[name].shortcut, **dict(info)}
    if finished:
        files["result"] = json.loads((real / "result.json").read_text()) | {
            "steps": total, "test_error_last": error, "test_error_best_is_leakage": error - 0.01,
            "train_error_last": error / 2, "class_names": CLASSES,
            "test_confusion_last": [[100 - wrong, wrong, 0], [0, 100, 0], [50, 0, 50]],
            "seconds": 3600.0 + seed, "images_per_second": 1000.0,
        }  # fmt: skip
    for file, content in files.items():
        (directory / f"{file}.json").write_text(json.dumps(content))
    points = [("test", total * i // 4, error * (5 - i)) for i in range(1, 5)]
    points += [("train", total * i // 500, error * (1 - i / 1000)) for i in range(1, 501)]
    keys = "split", "step", "error", "examples"
    log = [json.dumps(dict(zip(keys, (*point, 1), strict=True))) for point in points]
    (directory / "metrics.jsonl").write_text("\n".join(log))
    return directory


def gather(*roots):
    found, notes = runs.read(list(roots))
    assert not notes
    return experiment.gather(found)


def rows_of(table):
    return {name.partition("\n")[0]: tuple(cells) for name, *cells in table.rows}


def compared(experiments):
    """Cells by title and model: here, then of others."""
    shown, _ = tables.comparisons(experiments)
    return {table.title.partition(" [")[0]: rows_of(table) for table in shown}


def test_mean_and_deviation_over_seeds(tmp_path):
    for seed, error in enumerate((0.0870, 0.0890, 0.0850)):
        write_run(tmp_path / f"seed{seed}", error, seed=seed)
    write_run(tmp_path / "seed3", finished=False, seed=3)
    write_run(tmp_path / "other", finished=False, model__name="resnet44")
    experiments, notes = gather(tmp_path)
    assert not notes
    # By hand: deviations 0, 0.2, -0.2; sqrt(0.08 / 2).
    assert rows_of(tables.overview(experiments))["resnet20"][1:] == (
        "64,000", "3\n1 unfinished", "8.70 ± 0.20", "8.75", tables.NONE, "7.70 ± 0.20",
        "4.35 ± 0.10", "1:00:01", "1,000", "1 x NVIDIA H200 (gpu)",
    )  # fmt: skip
    cells = compared(experiments)["Residual nets"]
    assert cells["resnet20"] == (
        "8.70 ± 0.20 (3 runs)", "8.75", "8.27", "8.04", "8.39 ± 0.31", "7.44", "5.97"
    )  # fmt: skip
    assert cells["resnet32"][0] == tables.MISSING
    assert cells["resnet44"][0] == "unfinished, at step 64,000 of 64,000"
    (classes,) = tables.class_errors(experiments)
    assert classes.rows == [["resnet20", "8.7", "0.0", "50.0"]]  # 9, 9 and 8 of 100


def test_only_runs_that_differ_in_the_seed_alone_are_averaged(tmp_path):
    short = {"train__total_steps": 640, "optim__boundaries_steps": [320, 480]}
    write_run(tmp_path / "full", 0.08)
    write_run(tmp_path / "short0", 0.5, **short)
    write_run(tmp_path / "short1", 0.6, **short, seed=1)
    write_run(tmp_path / "held_out", 0.09, data__split="45k/5k")
    write_run(tmp_path / "nesterov", 0.07, optim__nesterov=True)
    write_run(tmp_path / "half", 0.09, info={"dtype": "bfloat16"}, model__dtype="auto")
    write_run(tmp_path / "b", 0.085, shortcut="B", model__shortcut="B")
    write_run(tmp_path / "other_data", 0.01, info={"data": {"name": "cifar10", "fingerprint": "e"}})
    write_run(tmp_path / "from_weights", 0.02, info={"init_weights": "a" * 64})
    gated, warm = "resnet110_shortcut_gating", {"optim__warmup_steps": 400}
    write_run(tmp_path / "gates", 0.07, model__name=gated, **warm)
    write_run(tmp_path / "bias", 0.13, model__name=gated, model__gate_bias=0.0, **warm)
    experiments, _ = gather(tmp_path)
    assert sorted(len(e.finished) for e in experiments) == [1] * 9 + [2]
    cells = compared(experiments)
    here = cells["Residual nets"]["resnet20"][0].split("\n")
    assert here[-1] == "55.00 ± 7.07 (2 runs; 640 of 64,000 steps)"
    assert set(here[:-1]) == {
        "8.00 (1 run)", "9.00 (1 run; 45k training images)", "9.00 (1 run; bfloat16)",
        "1.00 (1 run)", "2.00 (1 run; initialised from other weights)",
    }  # fmt: skip
    assert cells["Shortcut options"]["resnet20-B"][0] == "8.50 (1 run)"
    assert cells["Shortcut options"]["resnet20-C"][0] == tables.MISSING
    assert cells["Shortcuts of ResNet-110"][gated] == ("7.00 (1 run)", "6.91")
    assert cells["Shortcuts of ResNet-110"][f"{gated}-bias0"] == ("13.00 (1 run)", "12.86")
    assert any("Table 3" in title for title in tables.comparisons(experiments)[1])
    (row,) = [r for r in tables.overview(experiments).rows if "nesterov=True" in r[1]]
    assert row[5] == tables.NONE


def test_what_does_not_set_runs_apart(tmp_path):
    write_run(tmp_path / "a", 0.08, data__data_dir="/here", checkpoint__every_steps=7)
    write_run(tmp_path / "b", 0.09)
    write_run(tmp_path / "c", 0.10, seed=1, finished=False)
    # The model's own option by name, and an "auto" that means the same.
    write_run(tmp_path / "d", 0.09, seed=1, model__shortcut="A", model__dtype="float32")
    # A run of an older version, which lacks two keys.
    old = write_run(tmp_path / "e", 0.10, seed=2) / "config.json"
    flat = json.loads(old.read_text())
    del flat["eval.crops"], flat["model.survival"]
    old.write_text(json.dumps(flat))
    (experiment,), notes = gather(tmp_path, tmp_path / "a")
    # Of two runs with one seed, the finished one or the first counts.
    assert [r.directory.name for r in experiment.finished] == ["a", "d", "e"]
    assert [note.partition(":")[0][-13:] for note in notes] == ["b is left out", "c is left out"]


DAMAGE = {
    "config": ["{", {"seed": "0"}, {"optim.warmup_error": None}],
    "run": [None, {"total_steps": "many"}, {"data": []}],
    "result": [
        "[1]", {"test_error_last": None}, {"test_error_last": 8.7}, {"steps": 640},
        {"test_error_best_is_leakage": "x"}, {"seconds": "long"}, {"seconds": math.inf},
        {"test_confusion_last": [[1, 2]]}, {"test_confusion_last": 3}, {"class_names": 3},
    ],
    "responses": [{"layers": [{"name": "a"}]}, {"layers": [{"name": "a", "std": None}]}],
}  # fmt: skip


@pytest.mark.parametrize(("file", "change"), [(f, c) for f in DAMAGE for c in DAMAGE[f]])
def test_damaged_runs_are_named_and_passed_over(tmp_path, file, change):
    write_run(tmp_path / "good", 0.08)
    bad = write_run(tmp_path / "bad", 0.09, seed=1) / f"{file}.json"
    if isinstance(change, dict):
        change = json.dumps((json.loads(bad.read_text()) if bad.exists() else {}) | change)
    bad.write_text(change) if change else bad.unlink()
    found, notes = runs.read([tmp_path])
    assert [r.directory.name for r in found] == ["good"]
    (note,) = notes
    assert "bad" in note
    assert "\n" not in note


def test_published_numbers_are_of_models_that_exist():
    for table in published.TABLES:
        assert {model.partition("-")[0] for model in table["models"]} <= models.ARCHITECTURES.keys()
        for source in table["sources"]:
            assert any(source in published.ERRORS.get(model, ()) for model in table["models"])
    errors = [published.paper_error(f"resnet{n}") for n in (20, 32, 44, 56, 110, 1202)]
    assert errors == [8.75, 7.51, 7.17, 6.97, 6.43, 7.93]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    for net in ("resnet20", "resnet56", "plain20"):
        first = write_run(folder / "runs" / net / "0", 0.08, model__name=net)
        write_run(folder / "runs" / net / "1", 0.09, seed=1, model__name=net)
        if net != "resnet56":
            layers = [{"name": str(i), "std": 1 / (i + 1)} for i in range(19)]
            (first / "responses.json").write_text(json.dumps({"layers": layers}))
    write_run(folder / "runs" / "<i>x", 0.2, data__name="digits", train__total_steps=500)
    (write_run(folder / "runs" / "damaged") / "run.json").unlink()
    done = commands.run("resnet_flax.tools.report", f"{folder}/runs", f"--out={folder}/out")
    assert done.returncode == 0, done.stderr
    out = folder / "out"
    assert done.stdout == (
        f"passed over: {folder}/runs/damaged holds no run.json\n"
        f"7 runs: {out}/report.html, {out}/report.md and 6 pictures\n"
    )
    return out


def test_the_page_needs_no_other_file_and_shows_foreign_text_as_text(written):
    text = (written / "report.html").read_text()
    page = ElementTree.fromstring(text)
    assert not re.search(r"https?://|url\(|@import|<script|<link|href", text)
    prefix = "data:image/png;base64,"
    images = [image.get("src").removeprefix(prefix) for image in page.iter("img")]
    pictures = {path.name: path.read_bytes() for path in written.glob("*.png")}
    assert pictures.keys() == set(PICTURES)
    assert sorted(map(base64.b64decode, images)) == sorted(pictures.values())
    found = [[tuple(row.itertext()) for row in table.iter("tr")] for table in page.iter("table")]
    assert [len(rows) for rows in found] == [7, 6, 5, 5, 8]
    assert found[0][1][:3] == ("resnet20", "8.50\xa0±\xa00.71 (2 runs)", "8.75")
    assert page.find(".//td[@class='missing']").text == "missing"
    assert page.find(".//li").text.endswith("/runs/damaged holds no run.json")
    # Foreign text.
    assert found[3][0] == ("net", *CLASSES)
    assert any(row[0].endswith("/<i>x") for row in found[4])


def test_the_markdown_is_whole(written):
    text = (written / "report.md").read_text()
    assert re.findall(r"\]\((.*?)\)", text) == PICTURES
    assert "| resnet20 | 8.50 ± 0.71 (2 runs) | 8.75 |" in text
    assert re.search(r"\n## Passed over\n\n- .*/runs/damaged holds no run\.json\n", text)
    assert "\n| net | cat | $^$ | \\<b\\>\\|ship |\n|---|---|---|---|\n| resnet20 | 8.5 |" in text
    tables_ = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables_) == 5
    for table in tables_:
        assert len({re.sub(r"\\\|", "", line).count("|") for line in table.splitlines()}) == 1


def test_the_figures_show_what_they_say(written):
    experiments, _ = experiment.gather(runs.read([written.parent / "runs"])[0])
    pictures = figures.all_pictures(experiments)
    shown = [p.figure.axes for p in pictures if p.name in ("fig6", "fig7")]
    axes = {own.get_title(): own for panels in shown for own in panels}
    counts = {title: len(own.lines) for title, own in axes.items()}
    assert counts == {"plain": 4, "residual": 8, "in the order of the layers": 2, "sorted": 2}
    train, test, *marks = axes["plain"].lines
    # Means over two seeds, of errors 0.08 and 0.09 times 4, 3, 2, 1.
    assert list(test.get_xdata()) == [16_000, 32_000, 48_000, 64_000]
    assert list(test.get_ydata()) == pytest.approx([34, 25.5, 17, 8.5])
    # Of 500 points two make one; the first two are 0.085 times 0.999 and 0.998.
    assert len(train.get_xdata()) == 250
    assert (train.get_xdata()[0], train.get_ydata()[0]) == (256, pytest.approx(8.48725))
    # Where the paper's curves end.
    assert [(m.get_marker(), *m.get_ydata()) for m in marks] == [("D", 9.67), ("D", 1.4)]
    assert [m.get_fillstyle() for m in marks] == ["full", "none"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("", "arguments are required"),
        ("{tmp}", "arguments are required: --out"),
        ("{tmp}/absent --out={tmp}/o", "absent is no directory"),
        ("{tmp}/empty --out={tmp}/o", "no runs in"),
        ("{tmp}/damaged --out={tmp}/o", "no runs in"),
        ("{tmp} --out={tmp}/file", "cannot write in"),
    ],
)
def test_wrong_flags(tmp_path, args, message):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "run", finished=False)
    (write_run(tmp_path / "damaged") / "run.json").unlink()
    with pytest.raises(UserError, match=message):
        report.main(args.format(tmp=tmp_path).split())
    assert not (tmp_path / "o").exists()
