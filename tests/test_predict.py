"""`tools.predict` on every kind of file that somebody may point it at."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from resnet_flax import pretrained
from resnet_flax.errors import UserError
from resnet_flax.runs import weights
from resnet_flax.tools import predict
from tests.conftest import ROOT
from tests.test_pretrained import small_weights

READABLE = ["a name with spaces.png", "cmyk.jpg", "rgba.png", "sub/deeper/inside.webp"]
UNREADABLE = ["empty.jpg", "fifo.png", "text.png", "truncated.jpg"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "sub/deeper").mkdir(parents=True)
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (12, 20, 3), np.uint8))
    for name, mode in zip(READABLE, ("RGB", "CMYK", "RGBA", "RGB"), strict=True):
        image.convert(mode).save(folder / name)
    (folder / "sub/loop").symlink_to("..")
    for name in ("sub/notes.txt", ".hidden.png", "text.png"):
        (folder / name).write_text("no image")
    (folder / "empty.jpg").touch()
    os.mkfifo(folder / "fifo.png")
    (folder / "truncated.jpg").write_bytes((folder / "cmyk.jpg").read_bytes()[:700])
    return folder


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    weights.save(path, small_weights(class_names=("ant", "$5^{", "\N{CAT}")))
    return path


def test_a_folder_of_all_kinds(pictures, file, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(pretrained, "BATCH", 3)
    strip = tmp_path / "strip.png"
    args = [str(pictures), "no such.png", f"--weights={file}", f"--strip={strip}"]
    with pytest.raises(UserError, match="5 of 9 images could not be read"):
        predict.main(args)
    shown = capfd.readouterr()
    lines = dict(line.split(": ", 1) for line in shown.out.splitlines())
    assert list(lines) == [str(pictures / name) for name in READABLE]
    predictions = pretrained.load_pretrained(file).predict(list(lines))
    for line, ranked in zip(lines.values(), predictions, strict=True):
        assert line == ", ".join(f"{c} {100 * p:.1f} %" for c, p in ranked)
    for name in [*(str(pictures / name) for name in UNREADABLE), "no such.png"]:
        assert f"{name} cannot be read: " in shown.err
    assert len(shown.err.splitlines()) == 5
    with Image.open(strip) as picture:
        assert picture.format == "PNG"
        assert picture.width > 500  # Four in a row.


def test_command_line(pictures, file, tmp_path):
    strange = tmp_path / "two\nlines \udcff.png"
    Image.new("1", (3, 700)).save(strange)
    command = [sys.executable, "-m", "resnet_flax.tools.predict", strange, pictures / "text.png"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    options = {"cwd": ROOT, "capture_output": True, "text": True, "env": environment}
    done = subprocess.run([*command, f"--weights={file}"], check=False, **options)
    assert done.returncode == 1
    assert f"{tmp_path}/two\\nlines \\udcff.png: " in done.stdout
    assert "\\U0001f408 " in done.stdout
    assert len(done.stdout.splitlines()) == 1
    first, last = done.stderr.splitlines()
    assert first.startswith(f"{pictures}/text.png cannot be read: it is not an image")
    assert last == "error: 1 of 2 images could not be read"


def test_json(pictures, file, capsys):
    names = [str(pictures / name) for name in ("rgba.png", "text.png")]
    with pytest.raises(UserError, match="1 of 2 images could not be read"):
        predict.main([*names, f"--weights={file}", "--json"])
    good, bad = json.loads(capsys.readouterr().out)
    assert [good["image"], bad["image"]] == names
    assert {p["class"] for p in good["predictions"]} == {"ant", "$5^{", "\N{CAT}"}
    assert sum(p["probability"] for p in good["predictions"]) == pytest.approx(1, abs=1e-5)
    assert "not an image" in bad["error"]


def test_what_cannot_be_done(pictures, file, tmp_path):
    (tmp_path / "folder.png").mkdir()
    one, weights_flag = str(pictures / "rgba.png"), f"--weights={file}"
    for args, message in (
        ([], "the following arguments are required: IMAGE, --weights"),
        ([one, "--weights=resnet56"], "no weights are published for resnet56; published"),
        ([str(tmp_path), weights_flag], "there are no images in"),
        ([one, weights_flag, "--strip=no/where.png"], "in a folder that exists"),
        ([one, weights_flag, f"--strip={tmp_path}/x.jpg"], "must be a name ending in .png"),
        ([one, weights_flag, f"--strip={tmp_path}/folder.png"], "cannot write .*Is a directory"),
        ([one, f"--weights={one}"], "cannot be read"),
        ([one, weights_flag, "--top=3"], "unrecognized arguments: --top=3"),
    ):
        with pytest.raises(UserError, match=message):
            predict.main(args)
