"""Run folders, logs, figures, reports and progress."""

from __future__ import annotations

import io
import json
import re
import sys
import time

import pytest
import torch
from PIL import Image

from rectiflow.errors import RunExistsError
from rectiflow.training import progress
from rectiflow.training.figures import curves, save_images, tile, to_bytes
from rectiflow.training.records import MetricsLog, read_log
from rectiflow.training.report import Section, Table, write_report
from rectiflow.training.runs import Run, new_folder


def test_run_records_how_it_ended(tmp_path):
    with Run(tmp_path / "a", "train", {"steps": 3}) as run:
        run.used("rectified-flow", "sophia")
        assert json.loads((tmp_path / "a/run.json").read_text())["status"] == "running"
    record = json.loads((tmp_path / "a/run.json").read_text())
    assert record["status"] == "done"
    assert record["settings"] == {"steps": 3}
    assert record["systems"] == ["rectified-flow", "sophia"]
    with pytest.raises(KeyboardInterrupt), Run(tmp_path / "b", "train"):
        raise KeyboardInterrupt
    assert json.loads((tmp_path / "b/run.json").read_text())["status"] == "interrupted"
    with pytest.raises(ValueError, match="broken"), Run(tmp_path / "c", "train"):
        raise ValueError("broken")
    failed = json.loads((tmp_path / "c/run.json").read_text())
    assert (failed["status"], failed["reason"]) == ("failed", "ValueError: broken")


def test_runs_are_guarded(tmp_path):
    with Run(tmp_path / "a", "train"):
        pass
    with pytest.raises(RunExistsError, match="not empty"):
        Run(tmp_path / "a", "train")
    with pytest.raises(ValueError, match="is a run of 'train', not of 'reflow'"):
        Run(tmp_path / "a", "reflow", resume=True)
    assert Run(tmp_path / "a", "train", resume=True).resumed
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunExistsError, match="is a file"):
        Run(tmp_path / "file", "train")


def test_a_run_goes_on_with_its_own_settings(tmp_path):
    def begin(resume=True, **settings):
        return Run(tmp_path / "a", "train", settings, resume=resume)

    given = {"data": "digits", "steps": 4, "log_every": 5, "optim": {"name": "adam", "eps": 1e-8}}
    begin(resume=False, **given)
    with pytest.raises(ValueError, match=r"--data was digits, now photos; use the settings of"):
        begin(**given | {"data": "photos"})
    with pytest.raises(ValueError, match=r"--optim.name was adam, now sgd"):
        begin(**given | {"optim": {"name": "sgd", "eps": 1e-8}})
    assert json.loads((tmp_path / "a/run.json").read_text())["settings"] == given
    # Longer, and shown otherwise; settings that the first run did not know.
    with begin(**given | {"steps": 8, "log_every": 1, "fresh": 1}):
        pass
    with pytest.raises(ValueError, match=r"a is done, with --steps 8: for 9 start a new run"):
        begin(**given | {"steps": 9})
    assert begin(**given | {"steps": 8}).resumed


def test_one_file_has_many_names(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    Run("a", "reflow", {"model": "model"})
    assert Run("a", "reflow", {"model": str(tmp_path / "model")}, resume=True).resumed


def test_what_failed_before_it_wrote_leaves_its_folder_free(tmp_path):
    with pytest.raises(ValueError, match="broken"), Run(tmp_path / "a", "train"):
        raise ValueError("broken")
    (tmp_path / "a/metrics.jsonl").write_text("")
    with pytest.raises(RunExistsError, match="not empty"):
        Run(tmp_path / "a", "train")


def test_new_folders_never_collide(tmp_path):
    first = new_folder("train", "digits", tmp_path)
    first.mkdir(parents=True)
    assert new_folder("train", "digits", tmp_path) != first


def test_log_is_cut_back_on_resume(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    for step in (1, 2, 3):
        log.write(step, {"loss": step / 2})
    with open(tmp_path / "m.jsonl", "a") as stream:
        stream.write('{"step": 4, "lo')
    assert [row["step"] for row in read_log(tmp_path / "m.jsonl")] == [1, 2, 3]
    MetricsLog(tmp_path / "m.jsonl", 2).write(3, {"loss": 9.0})
    assert read_log(tmp_path / "m.jsonl")[-1] == {"step": 3, "loss": 9.0}


def test_bytes_of_images():
    values = torch.tensor([-1.0, 0.0, 1.0, 3.0, -7.0])
    assert to_bytes(values).tolist() == [0, 128, 255, 255, 0]


def test_tiles_are_placed_row_by_row():
    images = torch.stack([torch.full((1, 2, 2), v) for v in (-1.0, 1.0, -1.0)])
    sheet = tile(images, columns=2, gap=1)
    assert sheet.shape == (5, 5, 3)
    assert sheet[0, 0].tolist() == [0, 0, 0]
    assert sheet[0, 3].tolist() == [255, 255, 255]
    assert sheet[4, 1].tolist() == [0, 0, 0]
    assert sheet[4, 4].tolist() == [255, 255, 255]


def test_images_are_saved_enlarged(tmp_path):
    save_images(torch.zeros(4, 3, 16, 16), tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").size == (33 * 4, 33 * 4)


def test_report_is_self_contained_and_escaped(tmp_path):
    picture = curves({"a": ([1, 2], [1, 2])}, tmp_path / "c.png", across="x", up="y")
    page = write_report(
        tmp_path / "r.html",
        "A <title>",
        [
            Section(
                "One",
                texts=["<script>alert(1)</script>"],
                tables=[Table(["a", "b"], [["row", 0.12345]], caption="c")],
                pictures={picture: "A picture"},
                facts={"settings": {"steps": 3}},
            )
        ],
    ).read_text()
    assert "A &lt;title&gt;" in page
    assert "<script>" not in page
    assert "0.123" in page
    assert '"steps": 3' in page.replace("&#34;", '"')
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "data:image/png;base64," in page


def test_progress_in_plain_lines(monkeypatch):
    stream = io.StringIO()
    now = [0.0]
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with progress.bar("train", 100) as bar:
        now[0] = 1.0
        bar.update(10, loss=0.5)
        assert stream.getvalue() == ""
        now[0] = 4.0
        bar.update(40, loss=0.25)
        bar.update(41, loss=0.25)
        now[0] = 10.0
        bar.update(100)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "train: 40/100  loss 0.25  10 steps/s  0:06 left"
    assert lines[-1] == "train: 100/100 in 0:10"
    assert len(lines) == 2


def test_short_jobs_show_nothing(capsys):
    with progress.bar("train", 2) as bar:
        bar.update(2)
    assert capsys.readouterr().err == ""
