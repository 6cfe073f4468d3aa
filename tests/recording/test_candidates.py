"""Rows of what a tap saw, gathered into memory that is kept."""

from __future__ import annotations

import pytest
import torch

from lcogeom.recording.candidates import Rows, rows_of


@pytest.mark.parametrize("width", [2, 7, 32_768, 32_771, 50_257, 70_000])  # the second but last 29 * 1733; 32,771 prime
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("contiguous", [True, False])
def test_rows_of_any_width(width: int, dtype: torch.dtype, contiguous: bool, device: torch.device) -> None:
    source = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    if not contiguous:
        source = source[:, :-1]
    sequence, place = torch.tensor([[0, 1, 1, 0], [3, 0, 2, 3]], device=device)
    memory = torch.full((3, width), torch.nan, device=device)
    found = rows_of(Rows(source, sequence, place), slice(1, 4), memory)
    wanted = torch.stack([source[1, 0], source[1, 2], source[0, 3]]).float()
    assert torch.equal(found, wanted)
    assert found.data_ptr() == memory.data_ptr()
