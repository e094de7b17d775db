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
from resnet_flax.tools.report import figures, published, runs, tables
from tests import commands
from tests.conftest import ROOT

CLASSES = ["cat", "dog", "<b>|ship"]
PICTURES = [
    f"{name}.png" for name in ("fig6", "fig6_2", "fig7", "parameters", "class_errors", "confusion")
]


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
    steps = [(total * i // 4, error * (5 - i)) for i in range(1, 5)]
    write_log(directory, [(*point, split) for point in steps for split in ("train", "test")])
    return directory


def write_log(directory, points):
    keys = "step", "error", "split", "examples"
    lines = [json.dumps(dict(zip(keys, (*point, 10), strict=True))) for point in points]
    (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def gather(*roots):
    found, notes = runs.read(list(roots))
    assert not notes
    return runs.gather(found)


def rows_of(table):
    return {
        row[0].partition("\n")[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows
    }


def compared(experiments, title):
    (table,) = [t for t in tables.comparisons(experiments)[0] if t.title.startswith(title)]
    return rows_of(table)


def test_mean_and_deviation_over_seeds(tmp_path):
    for seed, error in enumerate((0.0870, 0.0890, 0.0850)):
        write_run(tmp_path / f"seed{seed}", error, seed=seed)
    write_run(tmp_path / "seed3", finished=False, seed=3)
    write_run(tmp_path / "other", finished=False, model__name="resnet44")
    experiments, notes = gather(tmp_path)
    assert not notes
    row = rows_of(tables.overview(experiments))["resnet20"]
    # By hand: deviations 0, 0.2, -0.2; sqrt(0.08 / 2).
    assert list(row.values())[2:] == [
        "64,000", "3\n1 unfinished", "8.70 ± 0.20", "8.75", tables.NONE, "7.70 ± 0.20",
        "4.35 ± 0.10", "1:00:01", "1,000", "1 x NVIDIA H200 (gpu)",
    ]  # fmt: skip
    cells = compared(experiments, "Residual nets")
    assert list(cells["resnet20"].values()) == [
        "resnet20", "8.70 ± 0.20 (3 runs)", "8.75", "8.27", "8.04", "8.39 ± 0.31", "7.44", "5.97"
    ]  # fmt: skip
    assert cells["resnet32"]["here, last step"] == tables.MISSING
    assert cells["resnet44"]["here, last step"] == "unfinished, at step 64,000 of 64,000"
    (classes,) = tables.class_errors(experiments)
    assert classes.rows == [("resnet20", "8.7", "0.0", "50.0")]  # 9, 9 and 8 of 100


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
    here = compared(experiments, "Residual nets")["resnet20"]["here, last step"].split("\n")
    assert here[-1] == "55.00 ± 7.07 (2 runs; 640 of 64,000 steps)"
    assert set(here[:-1]) == {
        "8.00 (1 run)", "9.00 (1 run; 45k training images)", "9.00 (1 run; bfloat16)",
        "1.00 (1 run)", "2.00 (1 run; initialised from other weights)",
    }  # fmt: skip
    options = compared(experiments, "Shortcut options")
    assert options["resnet20-B"]["here, last step"] == "8.50 (1 run)"
    assert options["resnet20-C"]["here, last step"] == tables.MISSING
    row = [r for r in tables.overview(experiments).rows if "nesterov=True" in r[1]]
    assert [r[5] for r in row] == [tables.NONE]
    cells = compared(experiments, "Shortcuts of ResNet-110")
    assert cells[gated] == {"net": gated, "here, last step": "7.00 (1 run)", "[I]": "6.91"}
    assert cells[f"{gated}-bias0"]["here, last step"] == "13.00 (1 run)"
    assert any("Table 3" in title for title in tables.comparisons(experiments)[1])


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
    assert note in report.render("page.md.j2", **report.compose(found, notes)).replace("\\", "")


def test_published_numbers_are_of_models_that_exist():
    for table in published.TABLES:
        for model in table["models"]:
            name, _, option = model.partition("-")
            assert name in models.ARCHITECTURES
            assert option in ("", "bias0", *models.OPTIONS)
        for source in table["sources"]:
            assert set(table["models"]) & set(published.SOURCES[source]["errors"])
    errors = [published.paper_error(f"resnet{n}") for n in (20, 32, 44, 56, 110, 1202)]
    assert errors == [8.75, 7.51, 7.17, 6.97, 6.43, 7.93]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    for net in ("resnet20", "resnet56", "plain20"):
        for seed in (0, 1):
            write_run(folder / "runs" / net / str(seed), 0.08 + 0.01 * seed, seed=seed,
                      model__name=net)  # fmt: skip
    write_run(folder / "runs" / "<i>x", 0.2, data__name="digits", train__total_steps=40)
    for net in ("resnet20", "plain20"):
        layers = [{"name": str(i), "std": 1 / (i + 1)} for i in range(19)]
        path = folder / "runs" / net / "0" / "responses.json"
        path.write_text(json.dumps({"layers": layers}))
    done = commands.run("resnet_flax.tools.report", f"{folder}/runs", f"--out={folder}/out")
    assert done.returncode == 0, done.stderr
    out = folder / "out"
    assert done.stdout == f"7 runs: {out}/report.html, {out}/report.md and 6 pictures\n"
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
    # Foreign text.
    assert found[3][0] == ("net", *CLASSES)
    assert any(row[0].endswith("/<i>x") for row in found[4])


def test_the_markdown_is_whole(written):
    text = (written / "report.md").read_text()
    assert re.findall(r"\]\((.*?)\)", text) == PICTURES
    assert "| resnet20 | 8.50 ± 0.71 (2 runs) | 8.75 |" in text
    assert "\n| net | cat | dog | \\<b\\>\\|ship |\n|---|---|---|---|\n| resnet20 | 8.5 |" in text
    tables_ = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables_) == 5
    for table in tables_:
        assert len({re.sub(r"\\\|", "", line).count("|") for line in table.splitlines()}) == 1


def test_the_figures_show_what_they_say(written):
    experiments, _ = gather(written.parent / "runs")
    axes = {
        axes.get_title(): axes
        for picture in figures.all_pictures(experiments)
        if picture.name in ("fig6", "fig7")
        for axes in picture.figure.axes
    }
    counts = {title: len(own.lines) for title, own in axes.items()}
    assert counts == {"plain": 4, "residual": 8, "in the order of the layers": 2, "sorted": 2}
    _, test, *marks = axes["plain"].lines
    # Mean over two seeds: errors 0.08 and 0.09 times 4, 3, 2, 1.
    assert list(test.get_xdata()) == [16_000, 32_000, 48_000, 64_000]
    assert list(test.get_ydata()) == pytest.approx([34, 25.5, 17, 8.5])
    # Where the paper's curves end.
    assert [(m.get_marker(), *m.get_ydata()) for m in marks] == [("D", 9.67), ("D", 1.4)]
    assert [m.get_fillstyle() for m in marks] == ["full", "none"]


def test_long_curves_are_averaged_in_parts(tmp_path):
    directory = write_run(tmp_path / "a", 0.08)
    write_log(directory, [(step, step / 1000, "train") for step in range(1, 501)])
    (experiment,), _ = gather(tmp_path)
    steps, errors = figures.curve(experiment, "train")
    assert len(steps) == 250
    assert (steps[0], errors[0]) == (2, pytest.approx(0.15))
    assert figures.curve(experiment, "test") == ([], [])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "arguments are required"),
        (["{tmp}"], "arguments are required: --out"),
        (["{tmp}/absent", "--out={tmp}/o"], "absent is no directory"),
        (["{tmp}", "--out={tmp}/o"], "no runs in"),
        (["{tmp}/runs", "--out={tmp}/file"], "cannot write in"),
    ],
)
def test_wrong_flags(tmp_path, args, message):
    (tmp_path / "file").touch()
    if "runs" in str(args):
        write_run(tmp_path / "runs" / "a", finished=False)
    with pytest.raises(UserError, match=message):
        report.main([a.replace("{tmp}", str(tmp_path)) for a in args])
    assert not (tmp_path / "o").exists()
