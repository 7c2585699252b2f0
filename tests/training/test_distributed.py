"""Two processes against one with the doubled batch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from rectiflow.flows import FlowModel


def launch(folder: Path, processes: int, batch_size: int) -> list[dict[str, float]]:
    """Train through `accelerate launch -m rectiflow train` and return the loss log."""
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--cpu"),
        *("--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"),
        *("--dynamo_backend", "no", "--main_process_port", "0"),
        *("-m", "rectiflow", "train", "--data", "digits", "--net", "mlp", "--steps", "6"),
        *("--batch-size", str(batch_size), "--log-every", "1", "--ema", "0.9"),
        *("--checkpoint-every", "6", "--out", str(folder)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((folder / "run.json").read_text())["status"] == "done"
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_equal_one_with_the_doubled_batch(tmp_path):
    two = launch(tmp_path / "two", 2, 32)
    one = launch(tmp_path / "one", 1, 64)
    losses = [torch.tensor([row["loss"] for row in rows]) for rows in (two, one)]
    assert len(losses[0]) == 6
    # Sums over 32 + 32 and over 64 rows round differently; six steps keep it near 1e-6.
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    models = [FlowModel.from_pretrained(tmp_path / name / "model") for name in ("two", "one")]
    for a, b in zip(models[0].parameters(), models[1].parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
