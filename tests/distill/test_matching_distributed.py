"""Two gloo processes against one with the doubled batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from tests.distill.matching_on_two import main

# `--multi_gpu` is Accelerate's word for several processes on one machine; the variable keeps
# them on the CPU, where they talk through gloo.
LAUNCH = [
    *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
]


def test_invariant_10_two_processes_weigh_like_one(tmp_path):
    script = Path(__file__).parent / "matching_on_two.py"
    done = subprocess.run(
        [sys.executable, "-m", *LAUNCH, str(script), str(tmp_path), "16"],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with torch.random.fork_rng():
        main(tmp_path, 32)
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    # Steps 0, 2 and 4; each process sees its half of the weights. Sums over 16 + 16 and 32 rows
    # round differently, and five steps of Adam keep that near 1e-6.
    both = torch.cat([first["weights"], second["weights"]], 1)
    assert both.shape == (3, 32)
    torch.testing.assert_close(both, one["weights"], rtol=1e-4, atol=1e-5)
    assert float((one["weights"].std(1)).min()) > 0.05, "the weights must tell samples apart"
    for name in ("model", "judge", "means"):
        torch.testing.assert_close(first[name], one[name], rtol=1e-4, atol=1e-5)
        assert torch.equal(first[name], second[name])
