"""Two processes against one with the doubled batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from rectiflow.cli import main
from rectiflow.flows import FlowModel

TRAIN = ["train", "--data", "digits", "--net", "mlp-2d", "--steps", "6", "--log-every", "1"]
# `--multi_gpu` is Accelerate's word for several processes on one machine; the variable keeps
# them on the CPU, where they talk through gloo.
LAUNCH = [
    *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
]


def losses(folder: Path) -> torch.Tensor:
    assert json.loads((folder / "run.json").read_text())["status"] == "done"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([row["loss"] for row in rows])


def test_two_processes_equal_one_with_the_doubled_batch(tmp_path):
    command = [sys.executable, "-m", *LAUNCH, "-m", "rectiflow", *TRAIN, "--batch-size", "32"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "two")],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert main([*TRAIN, "--batch-size", "64", "--out", str(tmp_path / "one")]) == 0
    two, one = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert len(one) == 6
    # Sums over 32 + 32 and over 64 rows round differently; six steps keep it near 1e-6.
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)
    models = [FlowModel.from_pretrained(tmp_path / name / "model") for name in ("two", "one")]
    for a, b in zip(*(model.parameters() for model in models)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
