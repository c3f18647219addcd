"""TensorBoard: stages one after the other on one axis, windows in one chart, the config as text, pictures."""

from pathlib import Path

import numpy as np
from tensorboardX.proto.event_pb2 import Event

from proreflow_jax.runtime.curves import SAMPLES, Curves, as_text, tag_of


def events(folder: Path) -> list[Event]:
    (file,) = folder.iterdir()
    data, at, found = file.read_bytes(), 0, []
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little")
        found.append(Event.FromString(data[at + 12 : at + 12 + size]))
        at += 16 + size
    return found


def values(folder: Path) -> list[tuple[str, int, object]]:
    return [(value.tag, event.step, value) for event in events(folder) for value in event.summary.value]


def test_all_that_a_stage_shows(tmp_path):
    curves = Curves(tmp_path, start=0, offset=500, about=as_text({"train.steps": 500, "name": "x"}))
    for step in (50, 100):
        curves.write(step, {"loss": 1.0 / step, "learning_rate": 0.5, "window/0/loss": 1.0, "window/3/cosine": 0.25})
    curves.picture(100, np.zeros((4, 8, 3), np.uint8))
    curves.close()
    rows = values(tmp_path)
    steps = {tag: [step for name, step, _ in rows if name == tag] for tag, *_ in rows}
    assert steps["loss"] == steps["learning_rate"] == steps["loss_by_window/0"] == steps["cosine_by_window/3"] == [550, 600]
    assert steps[SAMPLES] == [600] and len(steps["custom_scalars__config__"]) == 1
    (layout,) = [value.tensor.string_val[0] for tag, _, value in rows if tag.startswith("custom_scalars")]
    assert b"loss_by_window/.*" in layout and b"cosine_by_window/.*" in layout
    (text,) = [value.tensor.string_val[0].decode() for tag, _, value in rows if tag.startswith("config")]
    assert "| train.steps | `500` |" in text and "| name | `'x'` |" in text


def test_a_stage_that_goes_on_drops_what_it_repeats_on_the_axis_of_the_run(tmp_path):
    Curves(tmp_path, start=4, offset=500).close()
    assert [event.step for event in events(tmp_path) if event.session_log.status] == [505]


def test_windows_of_a_number_stand_together():
    assert [tag_of(name) for name in ("loss", "window/3/loss", "window/12/cosine")] == [
        "loss",
        "loss_by_window/3",
        "cosine_by_window/12",
    ]
