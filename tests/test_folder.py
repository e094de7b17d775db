"""A folder of images, from the files to a fine-tuned net."""

import contextlib
import dataclasses
import json
import os
import re
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from configs import finetune_folder
from resnet_flax import create_model, data
from resnet_flax.data import order, streaming
from resnet_flax.devices import sharding
from resnet_flax.errors import UserError
from resnet_flax.runs import metrics, weights
from resnet_flax.tools import predict
from resnet_flax.training import feed, scoring, train
from tests.conftest import make_small_config, stop_at_step
from tests.test_pretrained import small_weights
from tests.test_train import assert_same_end

SIDE = 16
CLASSES = ("ant", "bee", "cat")
PLAIN = streaming.Geometry(SIDE, (SIDE, SIDE), SIDE, SIDE)
SCALED = streaming.Geometry(8, (9, 20), 8, 10)
MEAN, STD = np.zeros(3, np.float32), np.ones(3, np.float32)


def picture(label, number):
    """Something to tell the classes apart by, and the images of a class."""
    pixels = np.random.RandomState([label, number]).randint(0, 60, (SIDE, SIDE, 3))
    pixels[..., label] += 150
    return pixels.astype(np.uint8)


def draw(root, classes, count):
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(picture(label, number)).save(root / name / f"{number:02}.png")
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twenty images of each of three classes, in the same size as the nets want them."""
    return draw(tmp_path_factory.mktemp("photos"), CLASSES, 20)


def load(root, geometry=PLAIN, **options):
    return data.load("folder", data_dir=root, geometry=geometry, **options)


def files_of(split):
    return {os.path.realpath(split.name(i)) for i in range(len(split))}


def sizes(dataset):
    return tuple(s and len(s) for s in (dataset.train, dataset.validation, dataset.test))


def test_classes_are_folders_and_a_tenth_is_held_out(photos):
    found = load(photos)
    assert (found.class_names, sizes(found)) == (CLASSES, (54, None, 6))
    assert len(files_of(found.train) | files_of(found.test)) == 60
    for i in range(6):
        image, label = found.test.example(i, None)
        name = found.test.name(i)
        assert name.split("/")[-2] == CLASSES[label]
        np.testing.assert_array_equal(image, picture(label, int(name[-6:-4])))
    assert load(photos, seed=5).fingerprint == found.fingerprint


def test_splits_may_have_folders_of_their_own(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "train")
    for name in ("ant", "cat"):
        (tmp_path / "val" / name / "deeper").mkdir(parents=True)
        Image.fromarray(picture(0, 99)).save(tmp_path / "val" / name / "deeper" / "x.JPG", "JPEG")
        for other in (".hidden.png", "notes.txt"):
            (tmp_path / "val" / name / other).write_text("not looked at")
    found = load(tmp_path)
    assert sizes(found) == (60, None, 2)
    assert [found.test.example(i, None)[1] for i in range(2)] == [0, 2]
    held_out = load(tmp_path, split="45k/5k", seed=1)
    assert sizes(held_out) == (54, 6, 2)
    assert files_of(held_out.train) | files_of(held_out.validation) == files_of(found.train)
    assert held_out.fingerprint == found.fingerprint
    (tmp_path / "val" / "cat" / "deeper" / "x.JPG").unlink()
    assert load(tmp_path).fingerprint != found.fingerprint


def test_splits_have_many_names(tmp_path):
    for names in ("Train Test", "training_set test_set", "TRAIN Val", "training dev"):
        root = tmp_path / names
        for name in names.split():
            draw(root / name, CLASSES, 1)
        found = load(root)
        assert (found.class_names, sizes(found)) == (CLASSES, (3, None, 3))
        assert "/" + names.split()[1] + "/" in found.test.name(0)


def test_three_folders_are_three_splits(tmp_path, capsys):
    for name in ("train", "val", "test", "more"):
        draw(tmp_path / name, CLASSES, 2)
    (tmp_path / "val/ant/00.png").unlink()
    found = load(tmp_path)
    assert sizes(found) == (6, 5, 6)
    assert "/val/" in found.validation.name(0)
    assert found.validation.central
    assert capsys.readouterr().err.endswith("are not used: more\n")
    (tmp_path / "val/ant/01.png").unlink()
    assert load(tmp_path).fingerprint != found.fingerprint
    with pytest.raises(UserError, match="has a validation split of its own"):
        load(tmp_path, split="45k/5k")


def test_links_are_followed_into_each_folder_once(tmp_path):
    root, elsewhere = (draw(tmp_path / name, CLASSES, 5) for name in ("photos", "elsewhere"))
    before = load(root)
    (root / "ant/self").symlink_to(".")
    (root / "ant/up").symlink_to("..")
    (root / "cat/bees").symlink_to("../bee")
    assert load(root).fingerprint == before.fingerprint
    (root / "cat/more").symlink_to(elsewhere / "cat")
    found = load(root)
    assert len(found.train) + len(found.test) == 20
    assert not files_of(found.train) & files_of(found.test)
    (root / "dog").symlink_to("cat")
    with pytest.raises(UserError, match="cat and .*dog are the same folder"):
        load(root)
    (root / "dog").unlink()
    (root / "eel").symlink_to("nowhere")
    with pytest.raises(UserError, match="eel is a link that leads nowhere"):
        load(root)


def test_other_programs_folders_are_left_alone_and_all_images_are_found(tmp_path):
    classes = ("ant", "cat", "train")  # A class may be called "train".
    root = draw(tmp_path, classes, 2)
    for name in ("__MACOSX", "@eaDir", ".ipynb_checkpoints", "ant/@eaDir"):
        (root / name).mkdir()
        (root / name / "x.png").write_bytes(b"")
    Image.new("RGB", (SIDE, SIDE)).save(root / "ant/photo.JFIF", "JPEG")
    found = load(root)
    assert found.class_names == classes
    both = files_of(found.train) | files_of(found.test)
    assert sorted(both) == sorted(predict.find_images([str(root)]))
    assert len(both) == 7


def test_small_classes_are_tested_too(tmp_path):
    for name, count in (("a", 3), ("b", 2), ("c", 1)):
        draw(tmp_path, [name], count)
    found = load(tmp_path, split="45k/5k")
    names = [[n.split("/")[-2] for n in sorted(files_of(s))] for s in (found.train, found.test)]
    assert names == [["a", "b", "c"], ["a", "b"]]
    assert files_of(found.validation) < {str(tmp_path / "a" / f"0{i}.png") for i in range(3)}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "root is not a folder"),
        (["empty/"], "has 1 sub-folders; it must have one for each class"),
        (["a/1.png", "b/"], "b has no images"),
        (["a/1.png", "b/1.png"], "has one image a class"),
        (["test/a/1.png"], "has test/ but no train/"),
        (["test/a/1.png", "Test_Set/a/1.png", "train/a/1.png"], "has both Test_Set/ and test/"),
        (["train/a/1.png", "train/b/1.png", "test/z/1.png"], "has the class 'z', which"),
    ],
)
def test_what_is_no_data_set_is_named(files, message, tmp_path):
    for file in files:
        path = tmp_path / "root" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if file.endswith("/") else path.touch()
    with pytest.raises(UserError, match=re.escape(message)):
        load(tmp_path / "root")


def example(split, index):
    """An example of a split that has nothing to draw."""
    return dataclasses.replace(split, central=True).example(index, None)


@pytest.fixture
def make_feed():
    with contextlib.ExitStack() as open_feeds:

        def make(split, devices=1, workers=0, limit=3, warn=print):
            mesh = sharding.make_mesh(jax.devices()[:devices], 8)
            options = {"workers": workers, "limit": limit, "warn": warn, "total_steps": 40}
            made = feed.StreamedFeed(split, MEAN, STD, seed=3, mesh=mesh, batch_size=8, **options)
            open_feeds.callback(made.close)
            return made

        yield make


@pytest.mark.parametrize("devices", [1, 8])
def test_streamed_batches_are_the_examples_in_their_order(photos, make_feed, devices):
    """Over an epoch's end, from any step on, and on any number of devices."""
    split = load(photos).train
    images, labels = map(np.array, zip(*(example(split, i) for i in range(54)), strict=True))
    index = order.indices(3, 0, 12, 8, 54)
    fed = make_feed(split, devices)
    for step, count in ((0, 1), (1, 3), (9, 2), (4, 1)):
        got = fed.chunk(step, count)
        np.testing.assert_array_equal(got["images"], images[index[step : step + count]])
        np.testing.assert_array_equal(got["labels"], labels[index[step : step + count]])
    assert len(got["images"].sharding.device_set) == devices


def test_each_epoch_cuts_out_another_part_and_a_restart_the_same(photos, make_feed):
    split = load(photos, SCALED).train
    got, rest = make_feed(split).chunk(0, 20), make_feed(split, workers=1).chunk(7, 13)
    np.testing.assert_array_equal(got["images"][7:], rest["images"])
    seen = {}
    images = np.asarray(got["images"]).reshape(160, -1)
    for i, image in zip(order.indices(3, 0, 20, 8, 54).ravel().tolist(), images, strict=True):
        seen.setdefault(i, set()).add(image.tobytes())
    assert min(len(parts) for parts in seen.values()) >= 2


@pytest.mark.parametrize("devices", [1, 8])
def test_every_image_is_evaluated_once_on_any_number_of_devices(photos, make_feed, devices):
    fed = make_feed(load(photos).test, devices)
    labels = np.concatenate([b["labels"][0] for b in fed.batches(4)])
    assert sorted(labels[labels >= 0]) == [0, 0, 1, 1, 2, 2]
    assert set(labels[labels < 0]) <= {streaming.PADDING}


@pytest.fixture(scope="module")
def damaged(photos, tmp_path_factory):
    """Two training images and one of the test set cannot be read, the first a dangling link."""
    root = shutil.copytree(photos, tmp_path_factory.mktemp("damaged") / "photos")
    found = load(root)
    bad = [found.train.name(5), found.train.name(6), found.test.name(0)]
    for name, content in zip(bad[1:], (b"just text", b"\x89PNG\r\n\x1a\n cut"), strict=True):
        with open(name, "wb") as file:
            file.write(content)
    os.remove(bad[0])
    os.symlink("/nowhere/at/all", bad[0])
    return root, bad


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_are_named_once_and_the_next_takes_their_place(
    damaged, make_feed, workers
):
    root, bad = damaged
    split, said = load(root).train, []
    fed = make_feed(split, workers=workers, warn=said.append)
    index = np.arange(54)
    index[[5, 6]] = 7
    images, labels = map(np.array, zip(*(example(split, i) for i in index.tolist()), strict=True))
    got, want = fed.chunk(0, 21), order.indices(3, 0, 21, 8, 54)  # Three epochs.
    np.testing.assert_array_equal(got["images"], images[want])
    np.testing.assert_array_equal(got["labels"], labels[want])
    assert len(said) == 2
    reasons = dict(zip(bad[:2], ("No such file", "it is not an image"), strict=True))
    for name, reason in reasons.items():
        assert sum(f"{name} ({reason}" in line for line in said) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_unreadable_images_end_it(photos, tmp_path, make_feed, workers):
    root = shutil.copytree(photos, tmp_path / "photos")
    split = load(root).train
    for i in range(0, 54, 2):
        open(split.name(i), "w").close()
    said = []
    fed = make_feed(split, workers=workers, limit=2, warn=said.append)
    with pytest.raises(UserError, match=r"image 3 that cannot be read: .*max_unreadable=2"):
        fed.chunk(0, 5)
    assert len(said) == 2
    for i in range(54):
        open(split.name(i), "w").close()
    with pytest.raises(UserError, match="^3 images in a row .*, the first is .*png: [^\n]*$"):
        make_feed(split, limit=2).chunk(0, 1)
    with pytest.raises(UserError, match="none of 10 training images can be read; .*png: it is not"):
        streaming.central_sample(split, 10)


def configure(config, root):
    config.data.name, config.data.data_dir = "folder", str(root)
    config.data.workers, config.data.image_size = 0, SIDE
    config.data.pad, config.data.color = 2, True
    config.data.batch_size, config.eval.batch_size = 8, 4
    return config


@pytest.fixture(scope="module")
def whole(damaged, tmp_path_factory):
    """A run with unreadable images on the way, evaluated by ten crops: config, place, result."""
    config = configure(make_small_config(), damaged[0])
    config.eval.bn_examples = 16
    config.data.eval_short_side, config.eval.crops = 20, 10
    directory = tmp_path_factory.mktemp("whole") / "run"
    return config, directory, train.train(config, directory)


def test_unreadable_images_are_counted_and_not_scored(whole, damaged):
    _, directory, result = whole
    assert (result["test_examples"], result["test_unreadable_last"]) == (5, 1)
    record = metrics.read_records(directory / "metrics.jsonl")[-1]
    assert (record["examples"], record["unreadable"]) == (5, 1)
    said = []
    text = scoring.describe(scoring.score(None, str(directory), None, warn=said.append))
    assert f"({result['test_wrong_last']} of 5 wrong)" in text
    assert "1 images could not be read" in text
    assert sum(damaged[1][2] in line for line in said) == 1


def test_ten_crops_average_the_probabilities(whole, damaged):
    _, directory, result = whole
    loaded = weights.load(directory / "weights.safetensors")
    net = jax.jit(create_model("resnet8", 3).apply)
    split = load(damaged[0], streaming.Geometry(SIDE, (20, 20), 20, 20)).test
    wrong = 0
    for i in [i for i in range(len(split)) if split.name(i) != damaged[1][2]]:
        image, label = split.example(i, None)
        parts = [image[y : y + 16, x : x + 16] for y, x in ((0, 0), (0, 4), (4, 0), (4, 4), (2, 2))]
        parts += [part[:, ::-1] for part in parts]
        logits = net(loaded.variables, (np.stack(parts) - loaded.mean) / loaded.std)
        wrong += int(np.asarray(jax.nn.softmax(logits)).mean(axis=0).argmax() != label)
    assert result["test_wrong_last"] == wrong


def test_stopped_and_resumed_a_run_on_a_folder_ends_the_same(whole, damaged, tmp_path):
    config, directory, _ = whole
    assert stop_at_step(config, tmp_path / "run", 6)["stopped"] == 6
    other = config.copy_and_resolve_references()
    other.data.data_dir = str(shutil.copytree(damaged[0], tmp_path / "photos", symlinks=True))
    (tmp_path / "photos/ant/00.png").unlink()
    with pytest.raises(UserError, match="the data set folder is not the one"):
        train.train(other, tmp_path / "run")
    train.train(config, tmp_path / "run")
    assert_same_end(directory, tmp_path / "run")


def test_fine_tuning_takes_net_size_and_preprocessing_from_the_weights(tmp_path, capsys):
    """And a handful of images will do."""
    draw(tmp_path / "photos", CLASSES[:2], 3)
    before = small_weights(mean=np.full((32, 32, 3), 120, np.float32))
    file = tmp_path / "net.safetensors"
    weights.save(file, before)
    config = finetune_folder.get_config()
    config.data.data_dir, config.data.workers = str(tmp_path / "photos"), 0
    config.train.total_steps, config.checkpoint.every_steps = 4, 2
    config.data.batch_size, config.train.cpu_devices = 16, 1
    result = train.train(config, tmp_path / "whole", str(file))
    assert (result["test_examples"], result["class_names"]) == (2, CLASSES[:2])
    assert "a batch of 16 holds images more than once, as there are 4" in capsys.readouterr().err
    after = weights.load(tmp_path / "whole" / "weights.safetensors")
    assert (after.model["name"], after.model["num_classes"]) == ("resnet8", 2)
    assert after.class_names == CLASSES[:2]
    np.testing.assert_array_equal(after.mean, before.mean)
    # Finished, and then known by its own configuration.
    again = train.train(config, tmp_path / "whole", str(file))
    one, other = (json.loads(json.dumps(r, default=list)) for r in (again, result))
    assert one == other
    found = scoring.score(config, None, str(tmp_path / "whole" / "weights.safetensors"))
    assert f"({result['test_wrong_last']} of 2 wrong)" in scoring.describe(found)
    # Stopped, it goes on without the weights.
    stop_at_step(config, tmp_path / "parts", 2, init_weights=str(file))
    train.train(config, tmp_path / "parts")
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.name": "auto"}, "model.name=auto takes the net from --weights"),
        ({"data.short_sides": (8, 20)}, "short_sides=8 is less than the image size, 16 pixels"),
        ({"eval.crops": 10}, "crops=10 needs config.data.eval_short_side above"),
        ({"eval.crops": 10, "data.name": "digits"}, "crops=10 is for streamed images only"),
    ],
)
def test_settings_that_contradict_each_other_are_named(
    small_config, photos, tmp_path, changes, message
):
    config = configure(small_config, photos)
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
