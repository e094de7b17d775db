import json
import pathlib
import sys

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from resnet_flax.errors import UserError
from resnet_flax.runs import files, metrics, pictures
from resnet_flax.runs.directory import Directory


def write(path, steps, split="train", tail=""):
    lines = [json.dumps({"step": s, "split": split, "error": 0.5, "examples": 10}) for s in steps]
    path.write_text("\n".join(lines) + ("\n" if lines else "") + tail)


def test_a_line_cut_by_a_crash_is_mended_and_no_step_stands_twice(tmp_path):
    write(tmp_path / "metrics.jsonl", [1, 2, 3], tail='{"step": 4, "spl')
    log = metrics.RunLog(tmp_path, resume_step=3, tensorboard=False)
    log.write("train", 3, {"error": 0.1, "examples": 10})
    log.write("train", 4, {"error": 0.4, "examples": 10})
    log.close()
    records = metrics.read_records(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert records[2]["error"] == 0.5
    assert (tmp_path / "metrics.jsonl").read_text().endswith("\n")
    # Nothing is thrown away, not even half a line.
    assert (tmp_path / "metrics.superseded.jsonl").read_text() == '{"step": 4, "spl\n'


def test_records_of_steps_to_come_are_kept_aside(tmp_path):
    write(tmp_path / "metrics.jsonl", [1, 2, 3])
    log = metrics.RunLog(tmp_path, resume_step=1, tensorboard=False)
    assert not log.has("train", 2)
    log.write("train", 2, {"error": 0.25, "examples": 10})
    log.close()
    assert [r["step"] for r in metrics.read_records(tmp_path / "metrics.jsonl")] == [1, 2]
    aside = metrics.read_records(tmp_path / "metrics.superseded.jsonl")
    assert [r["step"] for r in aside] == [2, 3]


@pytest.mark.parametrize(
    "line",
    ['{"step": "5", "split": "test", "error": 0.1, "examples": 1}', "[1, 2]", "null", "\x00\xff",
     '{"step": 5, "split": "test"}', '{"step": 5, "split": "test", "error": NaN, "examples": 1}'],
)  # fmt: skip
def test_lines_that_are_no_records_do_not_stop_a_run(tmp_path, line):
    write(tmp_path / "metrics.jsonl", [1], tail=line + "\n")
    log = metrics.RunLog(tmp_path, resume_step=9, tensorboard=False)
    log.close()
    assert [r["step"] for r in log.records] == [1]


def test_recent_error_covers_an_epoch_and_no_more():
    records = [
        {"step": s, "split": "train", "error": e, "examples": 10}
        for s, e in ((1, 1.0), (2, 0.5), (3, 0.25))
    ]
    assert metrics.recent_error(records, 10) == 0.25
    assert metrics.recent_error(records, 15) == 0.375
    assert metrics.recent_error(records, 1000) == pytest.approx(1.75 / 3)
    assert metrics.recent_error([], 10) is None


def test_curves_and_events_are_written(tmp_path):
    log = metrics.RunLog(tmp_path, resume_step=0, tensorboard=True)
    for step in (1, 2):
        log.write("train", step, {"error": 0.5 / step, "loss": 1.0})
    log.write("test", 2, {"error": 0.5})
    log.close()
    pictures.draw_curves(log.records, tmp_path / "curves.png", "title")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert "tfevents" in file.name
    events = list(read_events(file.read_bytes()))
    assert events[0].file_version == "brain.Event:2"
    assert (events[1].step, events[1].session_log.status) == (1, SessionLog.START)
    scalars = [(e.step, v.tag, v.simple_value) for e in events[2:] for v in e.summary.value]
    assert scalars == [
        (1, "train/error", 0.5),
        (1, "train/loss", 1.0),
        (2, "train/error", 0.25),
        (2, "train/loss", 1.0),
        (2, "test/error", 0.5),
    ]


def test_tensorboard_never_ends_a_run(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tensorboardX.event_file_writer", None)  # Half installed.
        log = metrics.RunLog(tmp_path, resume_step=0, tensorboard=True)
    log.write("train", 1, {"error": 0.5, "examples": 1})
    log.close()
    log = metrics.RunLog(tmp_path, resume_step=1, tensorboard=True)
    monkeypatch.setattr(log._events, "write", lambda record: 1 / 0)
    for step in (2, 3):
        log.write("train", step, {"error": 0.5, "examples": 1})
    log.sync()
    log.close()
    assert [r["step"] for r in metrics.read_records(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("note: nothing more is written for TensorBoard: ")
    assert second == "note: nothing more is written for TensorBoard: division by zero"


def read_events(content):
    """Events of a TFRecord file: length, its checksum, the bytes, their checksum."""
    while content:
        size = int.from_bytes(content[:8], "little")
        yield Event.FromString(content[12 : 12 + size])
        content = content[16 + size :]


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_one_error(tmp_path):
    log = metrics.RunLog(tmp_path, resume_step=0, tensorboard=False)
    log._file.close()
    log._file = open("/dev/full", "wb", buffering=0)
    with pytest.raises(UserError, match=r"could not write .*metrics\.jsonl: No space left"):
        log.write("train", 1, {"error": 0.5})
    log.close()


@pytest.mark.parametrize("put", [False, True])
def test_a_log_that_is_removed_or_replaced_is_noticed(tmp_path, put):
    log = metrics.RunLog(tmp_path, resume_step=0, tensorboard=False)
    log.write("train", 1, {"error": 0.5})
    log.sync()
    (tmp_path / "metrics.jsonl").rename(tmp_path / "moved")
    if put:
        (tmp_path / "metrics.jsonl").write_bytes((tmp_path / "moved").read_bytes())
    with pytest.raises(UserError, match="removed or replaced while the run wrote it"):
        log.sync()
    log.close()


def test_lost_training_records_are_counted(tmp_path):
    log = metrics.RunLog(tmp_path, resume_step=0, tensorboard=False)
    for step in (2, 6):
        log.write("train", step, {"error": 0.5})
    assert [log.count_lost(2, until) for until in (0, 2, 5, 8)] == [0, 0, 1, 2]
    log.close()


def test_json_is_replaced_whole_and_reads_back(tmp_path):
    value = {"a": [1, 2.5, None], "b": {"c": ["x  y", "[ ]"], "d": {}}, "e": [[1, 2], [3, 4]]}
    files.write_json(tmp_path / "f.json", {"old": 1})
    files.write_json(tmp_path / "f.json", value)
    assert files.read_json(tmp_path / "f.json") == value
    assert "[1, 2]" in (tmp_path / "f.json").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["f.json"]
    assert files.read_json(tmp_path / "absent.json") is None
    (tmp_path / "f.json").write_text("[1]")
    with pytest.raises(UserError, match="holds no object"):
        files.read_json(tmp_path / "f.json")
    (tmp_path / "f.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        files.read_json(tmp_path / "f.json")


def claim_and(directory, action=lambda: None):
    with Directory.open(directory):
        action()


def test_a_directory_is_held_by_one(tmp_path):
    with Directory.open(tmp_path / "run"), pytest.raises(UserError, match="another process"):
        claim_and(tmp_path / "run")
    claim_and(tmp_path / "run")


def test_what_a_kill_left_half_written_is_removed(tmp_path):
    for name in (".run.json.abc.part", "mine.part", "run.json"):
        (tmp_path / name).write_text("{}")
    claim_and(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "mine.part", "run.json"]


def test_a_failure_leaves_no_empty_directory_behind(tmp_path):
    def fail():
        raise UserError("early")

    def write_and_fail():
        (tmp_path / "run" / "config.json").write_text("{}")
        raise UserError("late")

    with pytest.raises(UserError, match="early"):
        claim_and(tmp_path / "run", fail)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="late"):
        claim_and(tmp_path / "run", write_and_fail)
    assert (tmp_path / "run" / "config.json").exists()


def test_class_names_of_a_confusion_picture_may_be_anything(tmp_path):
    names = ("$5_to_$10", "猫")
    pictures.draw_confusion(np.eye(2), names, tmp_path / "confusion.png", "title")
    assert (tmp_path / "confusion.png").read_bytes()[:4] == b"\x89PNG"
