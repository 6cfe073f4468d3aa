"""To scipy and back."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import torch
from scipy.sparse.linalg import LinearOperator, eigsh

import lcogeom as lg
from tests.geometry.conftest import DenseModel
from tests.geometry.test_lanczos import SPECTRA, times, turned


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_arpack_agrees(dense_model: DenseModel, dtype: torch.dtype, device: torch.device) -> None:
    matvec, size = dense_model.matvec(dtype=dtype), len(dense_model.params)
    operator = lg.to_linear_operator(matvec, size, dtype=dtype, device=device)
    assert operator.shape == (size, size)
    start = np.ones(size, dtype=operator.dtype)
    values = np.sort(eigsh(operator, k=4, which="BE", return_eigenvectors=False, v0=start, tol=1e-5))
    ours = lg.extreme_eigenvalues(matvec, size, k=2, dtype=dtype, device=device)
    np.testing.assert_allclose(values, ours.values, rtol=0, atol=1e-4 * ours.scale)


@pytest.mark.parametrize("form", ["array", "sparse", "operator", "integers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_from_scipy(form: str, dtype: torch.dtype, device: torch.device) -> None:
    matrix = turned(SPECTRA["indefinite"], torch.device("cpu")).numpy()
    if form == "integers":
        matrix = np.rint(100 * matrix).astype(np.int64)
    operator = {"sparse": scipy.sparse.csr_array, "operator": scipy.sparse.linalg.aslinearoperator}.get(form, np.array)(
        matrix
    )
    found = lg.extreme_eigenvalues(
        lg.from_linear_operator(operator), len(matrix), k=2, steps=200, dtype=dtype, device=device, vectors=True
    )
    true = np.linalg.eigvalsh(matrix.astype(float))
    np.testing.assert_allclose(found.values, true[[0, 1, -2, -1]], rtol=0, atol=1e-4 * found.scale)
    assert found.vectors is not None
    assert found.vectors.dtype == dtype
    assert found.vectors.device.type == device.type


def test_there_and_back_is_the_same(device: torch.device) -> None:
    matrix = turned(SPECTRA["indefinite"], device)
    x = torch.randn(len(matrix), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    there = lg.to_linear_operator(times(matrix), len(matrix), dtype=torch.float64, device=device)
    back = lg.from_linear_operator(there)
    assert torch.equal(back(x), matrix @ x)
    torch.testing.assert_close(there.rmatvec(x.cpu().numpy()), (matrix @ x).cpu().numpy())
    block = np.stack([x.cpu().numpy(), -x.cpu().numpy()], axis=1)
    np.testing.assert_allclose((there @ block)[:, 1], -(matrix @ x).cpu().numpy())
    spoiled = lg.to_linear_operator(lambda v: v.zero_(), len(matrix), dtype=torch.float64)
    given = x.cpu().numpy().copy()
    spoiled.matvec(given)
    assert np.array_equal(given, x.cpu().numpy())  # the caller's array is its own


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"dtype: torch\.bfloat16"):
        lg.to_linear_operator(lambda x: x, 3, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"operator: shape \(2, 3\); must be square"):
        lg.from_linear_operator(np.ones((2, 3)))
    with pytest.raises(ValueError, match="operator: complex128; must be real"):
        lg.from_linear_operator(LinearOperator((2, 2), matvec=lambda x: x, dtype=complex))
    with pytest.raises(TypeError):
        lg.from_linear_operator("nothing")
