"""Work beside the training loop leaves its threads alone."""

from __future__ import annotations

import sys

import pytest
import torch

from lcogeom.recording.threads import WORTH, side_by_side


@pytest.mark.skipif(sys.platform != "linux", reason="the OpenMP runtime is looked for in /proc")
def test_threads_of_the_pool_have_no_teams() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found = side_by_side(lambda _: torch.get_num_threads(), range(8), WORTH)
        assert found == [1] * 8
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
