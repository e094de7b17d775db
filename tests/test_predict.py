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

READABLE = [
    "a name with spaces.png", "animated.gif", "big.png", "cmyk.jpg", "exif.jpg", "grey.png",
    "one.png", "palette.png", "rgba.png", "sixteen.png", "sub/deeper/inside.webp",
]  # fmt: skip
UNREADABLE = ["empty.jpg", "fifo.png", "text.png", "truncated.jpg"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.RandomState(0)
    image = Image.fromarray(random.randint(0, 256, (12, 20, 3), np.uint8))
    image.save(folder / "a name with spaces.png")
    image.save(folder / "animated.gif", save_all=True, append_images=[image.rotate(90)])
    Image.new("P", (8000, 6000)).save(folder / "big.png", compress_level=1)
    image.convert("CMYK").save(folder / "cmyk.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "exif.jpg", exif=exif)
    image.convert("L").save(folder / "grey.png")
    image.crop((0, 0, 1, 1)).save(folder / "one.png")
    image.convert("P").save(folder / "palette.png")
    image.convert("RGBA").save(folder / "rgba.png")
    sixteen = random.randint(0, 65536, (9, 9)).astype(np.uint16)
    Image.fromarray(sixteen).save(folder / "sixteen.png")
    (folder / "sub/deeper").mkdir(parents=True)
    image.save(folder / "sub/deeper/inside.webp")
    (folder / "sub/loop").symlink_to("..")
    (folder / "sub/notes.txt").write_text("no image")
    (folder / ".hidden.png").write_text("no image")
    (folder / "empty.jpg").touch()
    os.mkfifo(folder / "fifo.png")
    (folder / "text.png").write_text("no image")
    (folder / "truncated.jpg").write_bytes((folder / "cmyk.jpg").read_bytes()[:700])
    return folder


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    weights.save(path, small_weights(class_names=("ant", "$5^{", "\N{CAT}")))
    return path


def test_a_folder_of_all_kinds(pictures, file, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(pretrained, "BATCH", 10)
    strip = tmp_path / "strip.png"
    args = [str(pictures), "no such.png", f"--weights={file}", f"--strip={strip}"]
    with pytest.raises(UserError, match="5 of 16 images could not be read"):
        predict.main(args)
    shown = capfd.readouterr()
    lines = dict(line.split(": ", 1) for line in shown.out.splitlines())
    assert list(lines) == [str(pictures / name) for name in READABLE]
    net = pretrained.load_pretrained(file)
    small = [name for name in lines if "big" not in name]  # Decoding it takes a second.
    for name, ranked in zip(small, net.predict(small), strict=True):
        assert lines[name] == ", ".join(f"{c} {100 * p:.1f} %" for c, p in ranked)
    for name in [*(str(pictures / name) for name in UNREADABLE), "no such.png"]:
        assert f"{name} cannot be read: " in shown.err
    assert len(shown.err.splitlines()) == 5
    with Image.open(strip) as picture:
        assert picture.format == "PNG"
        assert picture.width > 1000  # Eight in a row.
        assert picture.height > 300


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
    with pytest.raises(UserError, match="1 of 2 images could not be read"):
        predict.main(
            [str(pictures / n) for n in ("rgba.png", "text.png")] + [f"--weights={file}", "--json"]
        )
    good, bad = json.loads(capsys.readouterr().out)
    assert good["image"] == str(pictures / "rgba.png")
    assert {p["class"] for p in good["predictions"]} == {"ant", "$5^{", "\N{CAT}"}
    assert sum(p["probability"] for p in good["predictions"]) == pytest.approx(1, abs=1e-5)
    assert "not an image" in bad["error"]


def test_what_cannot_be_done(pictures, file, tmp_path):
    one = str(pictures / "one.png")
    for args, message in (
        ([], "the following arguments are required: IMAGE, --weights"),
        ([one, "--weights=resnet56"], "no weights are published yet for resnet56; there are"),
        ([str(tmp_path), f"--weights={file}"], "there are no images in"),
        ([one, f"--weights={file}", "--strip=no/where.png"], "in a folder that exists"),
        ([one, f"--weights={file}", f"--strip={tmp_path}/x.jpg"], "must be a name ending in .png"),
        ([one, f"--weights={one}"], "cannot be read"),
        ([one, f"--weights={file}", "--top=3"], "unrecognized arguments: --top=3"),
    ):
        with pytest.raises(UserError, match=message):
            predict.main(args)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match="cannot write .*folder.png: Is a directory"):
        predict.main([one, f"--weights={file}", f"--strip={tmp_path}/folder.png"])
