"""Metrics files: read again, rewound, and understood by TensorBoard's own reader's format."""

import json
import struct

import numpy as np
import pytest

from lora_jax import train
from lora_jax.train import metrics
from lora_jax.train.events import _masked_crc
from lora_jax.train.progress import smoothed
from lora_jax.train.speed import Clock

pytestmark = pytest.mark.once

RECORDS = [
    {"kind": "eval", "step": 0, "eval_loss": 4.5},
    {"kind": "train", "step": 1, "loss": 4.25, "learning_rate": 0.5},
    {"kind": "train", "step": 300, "loss": 1.125, "learning_rate": 0.25},
]


def write_all(directory, records=RECORDS, **options):
    with metrics.writer(directory, **options) as write:
        for record in records:
            write(record)


def test_records_come_back(tmp_path):
    write_all(tmp_path)
    assert train.read_metrics(tmp_path / "metrics.jsonl") == RECORDS


def test_a_record_is_in_the_file_at_once(tmp_path):
    """Whatever happens to the process afterwards."""
    with metrics.writer(tmp_path, tensorboard=False) as write:
        for number, record in enumerate(RECORDS, start=1):
            write(record)
            assert train.read_metrics(tmp_path / "metrics.jsonl") == RECORDS[:number]


def test_half_a_line_is_left_out_and_a_bad_one_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_all(tmp_path, tensorboard=False)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert train.read_metrics(path) == RECORDS[:2]
    path.write_bytes(b"{}\n\x00\x00\n" + whole)
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a JSON record of metrics"):
        train.read_metrics(path)


def test_rewind_keeps_what_a_checkpoint_has_seen(tmp_path):
    write_all(tmp_path, tensorboard=False)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"kind": "tr')
    assert metrics.rewind(tmp_path / "metrics.jsonl", 1) == RECORDS[:2]
    write_all(tmp_path, RECORDS[2:], tensorboard=False)
    assert train.read_metrics(tmp_path / "metrics.jsonl") == RECORDS
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert metrics.rewind(tmp_path / "none.jsonl", 3) == []


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_all(None)
    assert list(tmp_path.iterdir()) == []


def test_crc_is_castagnoli():
    # RFC 3720, B.4: CRC-32C of 32 zero bytes is 0x8a9136aa.
    crc = 0x8A9136AA
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    assert _masked_crc(bytes(32)) == struct.pack("<I", masked)


def records_of(path):
    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        assert data[8:12] == _masked_crc(data[:8])
        body, crc = data[12 : 12 + length], data[12 + length : 16 + length]
        assert crc == _masked_crc(body)
        yield body
        data = data[16 + length :]


def test_event_files_are_read_by_the_protocol_buffers_own_parser(tmp_path):
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    write_all(tmp_path, step=7)
    (path,) = (tmp_path / "tensorboard").iterdir()
    assert path.name.startswith("events.out.tfevents.")
    events = [Event.FromString(body) for body in records_of(path)]
    assert events[0].file_version == "brain.Event:2"
    assert events[1].session_log.status == SessionLog.START and events[1].step == 8
    got = [(e.step, {v.tag: v.simple_value for v in e.summary.value}) for e in events[2:]]
    assert got == [
        (0, {"eval/eval_loss": 4.5}),
        (1, {"train/loss": 4.25, "train/learning_rate": 0.5}),
        (300, {"train/loss": 1.125, "train/learning_rate": 0.25}),
    ]
    assert all(e.wall_time > 1.6e9 for e in events)


def test_plot_is_replaced_when_it_is_whole(tmp_path):
    path = tmp_path / "loss.png"
    train.plot_loss(path, RECORDS, title="a run")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["loss.png"]
    with pytest.raises(ValueError, match="`history` has no record with a loss"):
        train.plot_loss(path, [])


def test_plot_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="loss.png: the plot cannot be written: File exists"):
        train.plot_loss(tmp_path / "file" / "loss.png", RECORDS)


def test_the_smoothed_loss_does_not_lag():
    values = np.sin(np.arange(120.0)).tolist()
    found = smoothed(values)
    np.testing.assert_allclose(found[60], np.mean(values[57:64]))  # a twentieth, 3 on each side
    np.testing.assert_allclose(found[1], np.mean(values[:3]))
    assert (found[0], found[-1]) == (values[0], values[-1])
    falling = np.linspace(4.0, 1.0, 1000).tolist()
    np.testing.assert_allclose(smoothed(falling), falling)
    assert smoothed([3.0, 1.0]) == [3.0, 1.0] and smoothed([]) == []


def test_clock_leaves_out_what_is_not_training(monkeypatch):
    now = iter([0.0, 1.0, 50.0, 52.0, 54.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    clock = Clock(memory=0.5)
    assert clock.step(100) == (1.0, 100.0)
    clock.restart()
    assert clock.step(100) == (2.0, 150 / 2.5)
    assert clock.step(100)[0] == 2.0
    assert clock.first_step == 1.0


def test_json_lines_are_json(tmp_path):
    write_all(tmp_path, tensorboard=False)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == RECORDS
