"""Sinks of metrics with the packages themselves, where they are installed: points once, hyper-parameters, offline."""

import json
import struct

import pytest

from train.runtime.sinks import flat, open_sinks

CONFIG = {"sft": {"epochs": 2, "targets": ["a", "b"]}, "keep": None, "seed": 0}


def write(folder, sink, rows, **more):
    with open_sinks(None, [sink], folder=folder, name="rounds", config=CONFIG, **more) as put:
        for row in rows:
            put(row)


def rounds(*numbers):
    return [{"step": 2 * n + i, "round": n, f"{m}/loss": n + i / 10} for n in numbers for i, m in enumerate("ab")]


def test_a_config_is_flat_as_hyper_parameters():
    assert flat(CONFIG) == {"sft.epochs": 2, "sft.targets": "['a', 'b']", "seed": 0}


# --- TensorBoard ---


def events_of(folder):
    """The events of a folder as TensorBoard reads them: files in order, what a restart purges left out."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    kept = []
    for path in sorted(folder.glob("events.*"), key=lambda path: path.stat().st_mtime_ns):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            if event.session_log.status == SessionLog.START:
                kept = [old for old in kept if old.step < event.step or not old.summary.value[0].simple_value]
            elif event.summary.value:
                kept.append(event)
    return kept


@pytest.mark.parametrize("axis", ["step", "round"])
def test_tensorboard_has_each_point_once(axis, tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    import time

    clock = iter(range(1000, 2000))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))  # a file's name has the second in it
    write(tmp_path, "tensorboard", rounds(1), axis=axis)
    write(tmp_path, "tensorboard", rounds(1, 2), axis=axis)
    events = events_of(tmp_path / "tensorboard" / "rounds")
    points = [(e.step, v.tag, round(v.simple_value, 5)) for e in events for v in e.summary.value if v.simple_value]
    wanted = [
        (row[axis], tag, value) for row in rounds(1, 2) for tag, value in row.items() if tag not in ("step", axis)
    ]
    assert points == wanted
    tags = {v.tag for e in events for v in e.summary.value}
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= tags
    (said, *_) = [v for e in events for v in e.summary.value if v.tag == "_hparams_/session_start_info"]
    assert b"sft.epochs" in said.metadata.plugin_data.content


# --- Weights & Biases ---


def records_of(path):
    """The records of an offline run: a log in blocks of 32 KiB, a record in one piece or several (LevelDB's form)."""
    content, record = path.read_bytes(), b""
    place = 7  # behind the file's own head
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        if left < 7 or kind == 0:
            place += left
            continue
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def history_of(folder):
    """(config, rows of metrics) that the offline runs of a folder hold."""
    from wandb.proto import wandb_internal_pb2 as pb

    config, rows = {}, []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for record in map(pb.Record.FromString, records_of(path)):
            if record.WhichOneof("record_type") == "run":
                config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.WhichOneof("record_type") == "history":
                items = {(i.key or i.nested_key[0]): json.loads(i.value_json) for i in record.history.item}
                rows.append({**items, "step": record.history.step.num})
    return config, rows


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_wandb_offline_has_each_point_once(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    write(tmp_path, "wandb", rounds(1), axis="round")
    write(tmp_path, "wandb", rounds(1, 2), axis="round")
    config, rows = history_of(tmp_path)
    assert config["sft"] == CONFIG["sft"]
    found = [{k: v for k, v in row.items() if not k.startswith("_")} for row in rows]
    assert found == rounds(1, 2)
