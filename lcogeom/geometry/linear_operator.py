"""Products of flat tensors as `scipy.sparse.linalg.LinearOperator`, and the other way round."""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from torch import Tensor

from lcogeom.geometry.krylov import Matvec, require_operator

NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


def to_linear_operator(
    matvec: Matvec, size: int, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> LinearOperator:
    """A symmetric operator on tensors as scipy sees it, for `scipy.sparse.linalg.eigsh` and the like.

    Args:
        matvec: x (size,) of `dtype` on `device` -> H x (size,).
        dtype: float32 or float64: of the tensors, and of the arrays that scipy gives and gets.

    Raises:
        ValueError: another dtype, a size below 1.
    """
    require_operator(size, 1, dtype)

    def product(x: np.ndarray) -> np.ndarray:
        # A copy: scipy hands over slices of its work space.
        given = torch.tensor(np.asarray(x).reshape(size), dtype=dtype, device=device)
        result: np.ndarray = matvec(given).detach().to("cpu", dtype).numpy()
        return result

    return LinearOperator((size, size), matvec=product, rmatvec=product, dtype=NUMPY[dtype])


def from_linear_operator(operator: object) -> Matvec:
    """x -> H x on tensors of any device and floating dtype, from anything scipy takes for a linear operator.

    Args:
        operator: a real square `LinearOperator`, sparse matrix or array; it works in its own dtype, on the CPU.

    Raises:
        TypeError: scipy cannot take it for a linear operator.
        ValueError: it is not square, or not real.
    """
    linear = aslinearoperator(operator)
    rows, columns = linear.shape
    if rows != columns:
        raise ValueError(f"operator: shape {(rows, columns)}; must be square.")
    if np.issubdtype(linear.dtype, np.complexfloating):
        raise ValueError(f"operator: {linear.dtype}; must be real.")
    kind = linear.dtype if np.issubdtype(linear.dtype, np.floating) else np.dtype(np.float64)

    def matvec(x: Tensor) -> Tensor:
        product = linear.matvec(x.detach().cpu().to(torch.float64).numpy().astype(kind))
        return torch.from_numpy(np.array(product, dtype=np.float64)).to(x)

    return matvec
