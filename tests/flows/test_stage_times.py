"""The table of times that a fixed-step integration hands to the field."""

from __future__ import annotations

import torch

from rectiflow.flows.integration import stage_times
from rectiflow.flows.solvers import EULER, RK4


def test_every_stage_gets_its_time_in_step_order() -> None:
    grid = [0.0, 0.25, 1.0]
    rows = stage_times(torch.zeros(3, 2), grid, RK4.intervals(grid), RK4.nodes)
    seen = [[t.tolist() for t in row] for row in rows]
    # start + node * length, exact in binary for these numbers
    assert seen == [
        [[0.0] * 3, [0.125] * 3, [0.125] * 3, [0.25] * 3],
        [[0.25] * 3, [0.625] * 3, [0.625] * 3, [1.0] * 3],
    ]


def test_a_falling_grid_and_half_precision_keep_float32_times() -> None:
    grid = [1.0, 0.5, 0.0]
    rows = stage_times(torch.zeros(2, 1, dtype=torch.bfloat16), grid, [-0.5, -0.5], EULER.nodes)
    assert [t[0].item() for (t,) in rows] == [1.0, 0.5]
    assert all(t.dtype == torch.float32 and t.shape == (2,) for (t,) in rows)


def test_times_are_views_of_one_small_table() -> None:
    grid = [i / 10 for i in range(11)]
    rows = stage_times(torch.zeros(1000, 1), grid, EULER.intervals(grid), EULER.nodes)
    storages = {t.untyped_storage().data_ptr() for (t,) in rows}
    assert len(storages) == 1
    assert rows[0][0].untyped_storage().nbytes() == 10 * 4
