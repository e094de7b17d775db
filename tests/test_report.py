"""`tools.report`, on records made up here, whose statistics are known."""

import base64
import json
import pathlib
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from resnet_flax import models
from resnet_flax.config import base_config, flatten
from resnet_flax.errors import UserError
from resnet_flax.reporting import figures, page, published, records, tables
from resnet_flax.reporting.picture import Picture
from resnet_flax.tools import report

CLASSES = ["cat", "dog", "<b>|ship"]


def write_run(directory, errors=0.1, *, finished=True, seed=0, shortcut=None, run=(), **config):
    """A run that ended with a test error; `config` has "__" for dots."""
    flat = flatten(base_config()) | {"seed": seed}
    flat |= {key.replace("__", "."): value for key, value in config.items()}
    name, total = flat["model.name"], flat["train.total_steps"]
    directory.mkdir(parents=True)
    described = {
        "model": name,
        "shortcut": shortcut or models.ARCHITECTURES[name].shortcut,
        "dtype": "float32",
        "parameters": 269_722,
        "total_steps": total,
        "data": {"name": flat["data.name"], "fingerprint": "f" * 64},
        **dict(run),
    }
    points = [
        {"step": total * i // 4, "split": split, "error": errors * (5 - i), "examples": 10}
        for i in range(1, 5)
        for split in ("train", "test")
    ]
    wrong = round(100 * errors)
    result = {
        "model": name,
        "seed": seed,
        "steps": total,
        "test_error_last": errors,
        "test_wrong_last": wrong,
        "test_examples": 300,
        "test_error_at_best_validation": None,
        "test_error_best_is_leakage": errors - 0.01,
        "train_error_last": errors / 2,
        "class_names": CLASSES,
        "test_confusion_last": [[100 - wrong, wrong, 0], [0, 100, 0], [50, 0, 50]],
        "seconds": 3600.0 + seed,
        "images_per_second": 1000.0,
        "hardware": "1 x Thing (gpu)",
        "commit": "0123456789abcdef",
        "versions": {"jax": "0.10.2"},
    }
    contents = {"config.json": flat, "run.json": described}
    contents |= {"result.json": result} if finished else {}
    for file, content in contents.items():
        (directory / file).write_text(json.dumps(content))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(p) + "\n" for p in points))
    return directory


def read_groups(*roots):
    found, notes = report.read(list(roots))
    assert not notes
    return records.group(found)


def table_of(tables_, title):
    (table,) = [t for t in tables_ if t.title.startswith(title)]
    return {
        row[0].partition("\n")[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows
    }


def test_mean_and_deviation_over_seeds(tmp_path):
    for seed, error in enumerate((0.0870, 0.0890, 0.0850)):
        write_run(tmp_path / f"seed{seed}", error, seed=seed)
    write_run(tmp_path / "seed3", finished=False, seed=3)
    groups, notes = read_groups(tmp_path)
    assert not notes
    (group,) = groups
    statistic = group.statistic("test_error_last", 100)
    # By hand: deviations 0, 0.2, -0.2; sqrt(0.08 / 2).
    assert (statistic.mean, statistic.deviation, statistic.n) == (
        pytest.approx(8.70), pytest.approx(0.2), 3
    )  # fmt: skip
    row = table_of([tables.overview(groups)], "All runs")["resnet20"]
    assert row["test error, last step, %"] == "8.70 ± 0.20"
    assert row["best on test, %: leakage"] == "7.70 ± 0.20"
    assert row["training error, %"] == "4.35 ± 0.10"
    assert row["test error at the best validation step, %"] == tables.NONE
    assert row["published, %"] == "8.75"
    assert (row["steps"], row["runs"]) == ("64,000", "3\n1 unfinished")
    assert (row["time a run"], row["images/s"]) == ("1:00:01", "1,000")
    assert row["hardware"] == "1 x Thing (gpu)"
    compared, _ = tables.comparisons(groups)
    cells = table_of(compared, "Residual nets")
    assert cells["resnet20"]["here, last step"] == "8.70 ± 0.20 (3 runs)"
    assert cells["resnet20"]["[R]"] == "8.75"
    assert cells["resnet20"]["akamaster"] == "8.27"
    assert cells["resnet32"]["here, last step"] == tables.MISSING
    # One run has no deviation.
    assert tables.percent(records.Statistic.of([8.755])) in ("8.75", "8.76")
    assert tables.percent(records.Statistic.of([])) == tables.NONE


def test_only_runs_that_differ_in_the_seed_alone_are_averaged(tmp_path):
    write_run(tmp_path / "full", 0.08)
    write_run(tmp_path / "short0", 0.5, train__total_steps=640, optim__boundaries_steps=[320, 480])
    write_run(tmp_path / "short1", 0.6, train__total_steps=640, optim__boundaries_steps=[320, 480],
              seed=1)  # fmt: skip
    write_run(tmp_path / "held_out", 0.09, data__split="45k/5k")
    write_run(tmp_path / "nesterov", 0.07, optim__nesterov=True)
    write_run(tmp_path / "half", 0.09, run={"dtype": "bfloat16"}, model__dtype="auto")
    write_run(tmp_path / "b", 0.085, shortcut="B", model__shortcut="B")
    write_run(tmp_path / "other_data", 0.01, run={"data": {"name": "cifar10", "fingerprint": "e"}})
    write_run(tmp_path / "from_weights", 0.02, run={"init_weights": "a" * 64})
    groups, _ = read_groups(tmp_path)
    assert sorted(len(g.finished) for g in groups) == [1] * 7 + [2]
    compared, _ = tables.comparisons(groups)
    here = table_of(compared, "Residual nets")["resnet20"]["here, last step"].split("\n")
    assert here[-1] == "55.00 ± 7.07 (2 runs; 640 of 64,000 steps)"
    assert set(here[:-1]) == {
        "8.00 (1 run)", "9.00 (1 run; 45k training images)", "9.00 (1 run; bfloat16)",
        "1.00 (1 run)", "2.00 (1 run)",
    }  # fmt: skip
    options = table_of(compared, "Shortcut options")
    assert options["resnet20-B"]["here, last step"] == "8.50 (1 run)"
    assert options["resnet20-C"]["here, last step"] == tables.MISSING
    row = [r for r in tables.overview(groups).rows if "nesterov=True" in r[1]]
    assert [r[5] for r in row] == [tables.NONE]


def test_what_does_not_set_runs_apart(tmp_path):
    write_run(tmp_path / "0", 0.08, data__data_dir="/here", checkpoint__every_steps=7)
    # An option named that is the net's own, and "auto" that came to the same.
    write_run(tmp_path / "1", 0.09, seed=1, model__shortcut="A", model__dtype="auto")
    # A run of an older version, without a key.
    old = write_run(tmp_path / "2", 0.10, seed=2) / "config.json"
    flat = json.loads(old.read_text())
    del flat["eval.crops"], flat["model.survival"]
    old.write_text(json.dumps(flat))
    (group,), notes = read_groups(tmp_path)
    assert len(group.finished) == 3
    assert not notes


def test_the_same_run_twice_counts_once(tmp_path):
    write_run(tmp_path / "a", 0.08)
    write_run(tmp_path / "b", 0.09)
    write_run(tmp_path / "c", 0.10, seed=1, finished=False)
    write_run(tmp_path / "d", 0.10, seed=1)
    (group,), notes = read_groups(tmp_path, tmp_path / "a")
    assert [r.directory.name for r in group.finished] == ["a", "d"]
    assert len(notes) == 2
    assert "b is left out" in notes[0]
    assert "c is left out" in notes[1]


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", "{"),
        ("config.json", {"seed": "0"}),
        ("config.json", {"optim.warmup_error": None}),
        ("run.json", None),
        ("run.json", {"total_steps": "many"}),
        ("run.json", {"data": []}),
        ("result.json", "[1]"),
        ("result.json", {"test_error_last": None}),
        ("result.json", {"test_error_last": 8.7}),
        ("result.json", {"test_error_best_is_leakage": "x"}),
        ("result.json", {"steps": 640}),
        ("result.json", {"seconds": "long"}),
        ("result.json", {"test_confusion_last": [[1, 2]]}),
        ("result.json", {"test_confusion_last": 3}),
        ("result.json", {"class_names": 3}),
        ("responses.json", {"layers": [{"name": "a"}]}),
        ("responses.json", {"layers": [{"name": "a", "std": None}]}),
    ],
)
def test_damaged_records_are_named_and_passed_over(tmp_path, file, change):
    write_run(tmp_path / "good", 0.08)
    bad = write_run(tmp_path / "bad", 0.09, seed=1) / file
    if change is None:
        bad.unlink()
    elif isinstance(change, str):
        bad.write_text(change)
    else:
        bad.write_text(json.dumps((json.loads(bad.read_text()) if bad.exists() else {}) | change))
    found, notes = report.read([tmp_path])
    assert [r.directory.name for r in found] == ["good"]
    assert len(notes) == 1
    assert "bad" in notes[0]
    assert "\n" not in notes[0]
    assert notes[0] in page.to_markdown(report.compose(found, notes)).replace("\\", "")


def test_ablations_have_their_own_tables(tmp_path):
    net = "resnet110_shortcut_gating"
    write_run(tmp_path / "a", 0.07, model__name=net, optim__warmup_steps=400)
    write_run(tmp_path / "b", 0.13, model__name=net, optim__warmup_steps=400, model__gate_bias=0.0)
    groups, _ = read_groups(tmp_path)
    compared, absent = tables.comparisons(groups)
    cells = table_of(compared, "Shortcuts of ResNet-110")
    assert cells[net] == {"net": net, "here, last step": "7.00 (1 run)", "[I]": "6.91"}
    assert cells[f"{net}-bias0"]["here, last step"] == "13.00 (1 run)"
    assert any("Table 3" in title for title in absent)


def test_every_net_of_the_tables_exists():
    for _, nets, sources, _ in published.TABLES:
        for net in nets:
            name, _, rest = net.partition("-")
            assert name in models.ARCHITECTURES
            assert not rest or rest in models.OPTIONS or rest == "bias0"
        assert all(set(nets) & set(source.errors) for source in sources if source.name == "[I]")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    for seed in (0, 1):
        for net in ("resnet20", "resnet56", "plain20"):
            write_run(folder / "runs" / net / f"seed{seed}", 0.08 + 0.01 * seed, seed=seed,
                      model__name=net)  # fmt: skip
    write_run(folder / "runs" / "<i>x", 0.2, data__name="digits", train__total_steps=40)
    for net, count in (("resnet20", 19), ("plain20", 19)):
        layers = [{"name": str(i), "std": 1 / (i + 1)} for i in range(count)]
        path = folder / "runs" / net / "seed0" / "responses.json"
        path.write_text(json.dumps({"layers": layers}))
    report.main([str(folder / "runs"), f"--out={folder}/out"])
    return folder / "out"


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.addresses, self.open = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [v for k, v in attributes if k in ("src", "srcset", "href")]
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_no_other_file(written):
    text = (written / "report.html").read_text()
    parsed = Page()
    parsed.feed(text)
    assert not parsed.open
    names = {p.name for p in written.glob("*.png")}
    assert names == {
        "fig6.png", "fig6_2.png", "fig7.png", "parameters.png", "class_errors.png", "confusion.png"
    }  # fmt: skip
    # Each picture for a light page and for a dark one.
    assert len(parsed.addresses) == 2 * len(names)
    for address in parsed.addresses:
        kind, _, content = address.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(content)[:4] == b"\x89PNG"
    assert not re.search(r"https?://|url\(|@import|<script|<link", text)
    assert parsed.tags.count("table") == 5
    # What records say is text.
    assert "<b>" not in text
    assert "<i>x" not in text
    assert "&lt;b&gt;|ship" in text
    assert "missing" in text


def test_the_markdown_is_whole(written):
    text = (written / "report.md").read_text()
    for name in re.findall(r"\]\((\w+\.png)\)", text):
        assert (written / name).exists()
    assert text.count("](") == 6
    assert "| resnet20 | 8.50 ± 0.71 (2 runs) | 8.75 |" in text
    widths = [re.sub(r"\\\|", "", line).count("|") for line in text.splitlines() if "|" in line]
    heads = [i for i, line in enumerate(text.splitlines()) if line.startswith("|---")]
    assert len(heads) == 5
    assert "\\<b\\>\\|ship" in text
    assert min(widths) >= 4


def test_the_figures_show_what_they_say(written):
    found, _ = report.read([written.parent / "runs"])
    groups, _ = records.group(found)
    pictures = {p.name: p for p in figures.all_pictures(groups)}
    assert draw(pictures["fig6"]) == {"plain": 4, "residual": 8}  # two curves, two marks each
    assert draw(pictures["fig7"]) == {"in the order of the layers": 2, "sorted": 2}
    plain = [g for g in groups if g.net == "plain20"]
    # Means over two seeds: errors 0.08 and 0.09 times 4, 3, 2, 1.
    assert figures._curve(plain[0], "test") == (
        [16_000, 32_000, 48_000, 64_000], pytest.approx([34, 25.5, 17, 8.5])
    )  # fmt: skip


def draw(picture: Picture):
    from matplotlib.figure import Figure

    figure = Figure()
    picture.draw(figure, {"page": "w", "ink": "k", "grid": "k", "map": "Blues"})
    return {axes.get_title(): len(axes.get_lines()) for axes in figure.axes}


def test_long_curves_are_averaged_in_parts(tmp_path):
    directory = write_run(tmp_path / "a", 0.08)
    points = [
        {"step": s, "split": "train", "error": s / 1000, "examples": 1} for s in range(1, 501)
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(p) + "\n" for p in points))
    (group,), _ = read_groups(tmp_path)
    steps, errors = figures._curve(group, "train")
    assert len(steps) == 250
    assert (steps[0], errors[0]) == (2, pytest.approx(0.15))
    assert figures._curve(group, "test") == ([], [])


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
        write_run(tmp_path / "runs" / "a")
    with pytest.raises(UserError, match=message):
        report.main([a.replace("{tmp}", str(tmp_path)) for a in args])
    assert not (tmp_path / "o").exists()


def test_a_browser_shows_the_page(written, tmp_path):
    browser = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if browser is None:
        pytest.skip("no Chromium here")
    script = (
        "<script>onload = () => { const images = [...document.images];"
        "document.title = JSON.stringify([images.length, images.filter(i => i.complete && "
        "i.naturalWidth > 500).length, document.querySelectorAll('tbody tr').length, "
        "document.documentElement.scrollWidth <= innerWidth]); }</script></body>"
    )
    html = (written / "report.html").read_text().replace("</body>", script)
    copy = pathlib.Path(tmp_path, "page.html")
    copy.write_text(html)
    done = subprocess.run(
        [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1000,800",
         f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=10000", "--dump-dom",
         copy.as_uri()],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stderr
    # Six nets, five plain ones, four groups, two rows of classes (one for each), seven runs.
    assert json.loads(title[1]) == [6, 6, 6 + 5 + 4 + 4 + 7, True]
