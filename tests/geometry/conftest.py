"""A language model of 5,000 parameters, small enough for its dense Hessian."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

VOCAB, WIDTH, HIDDEN = 32, 24, 52


class NextToken(nn.Module):
    """The next token from two: embedding, LayerNorm, tanh, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.norm = nn.LayerNorm(2 * WIDTH)
        self.hidden = nn.Linear(2 * WIDTH, HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(self.norm(self.embedding(ids).flatten(1))).tanh())


@dataclass(frozen=True, eq=False)
class DenseModel:
    params: Tensor
    """(5,108,) float64, flat."""
    loss: Callable[[Tensor], Tensor]
    """flat parameters -> scalar."""
    hessian: Tensor
    """(5,108, 5,108) float64, by `torch.autograd.functional.hessian`."""
    eigenvalues: Tensor
    """(5,108,), ascending."""
    layers: dict[str, slice]

    def matvec(self, some: slice = slice(None), dtype: torch.dtype = torch.float64) -> Callable[[Tensor], Tensor]:
        """x -> H x over some of the parameters, by double backward, with the model in `dtype`."""
        everything = self.params.to(dtype)
        free = everything[some].clone().requires_grad_()
        whole = everything.clone()
        whole[some] = free
        (gradient,) = torch.autograd.grad(self.loss(whole), free, create_graph=True)
        return lambda x: torch.autograd.grad(gradient, free, x, retain_graph=True)[0]


@pytest.fixture(scope="session")
def dense_model(device: torch.device) -> DenseModel:
    """Trained for 25 updates on pairs with a rule, so that the spectrum has a bulk, outliers and a negative side."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = NextToken().to(device)
        ids = torch.randint(VOCAB, (64, 2)).to(device)
    target = (ids.sum(1) * 5) % VOCAB
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(25):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(ids), target).backward()
        optimizer.step()
    names = [name for name, _ in model.named_parameters()]
    sizes = [parameter.numel() for parameter in model.parameters()]
    shapes = [parameter.shape for parameter in model.parameters()]

    def loss(flat: Tensor) -> Tensor:
        pieces = [piece.reshape(shape) for piece, shape in zip(flat.split(sizes), shapes, strict=True)]
        logits = torch.func.functional_call(model, dict(zip(names, pieces, strict=True)), (ids,))
        return nn.functional.cross_entropy(logits, target)

    params = torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).double()
    hessian = torch.autograd.functional.hessian(loss, params)
    ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
    layers = {name: slice(a, b) for name, a, b in zip(names, ends, ends[1:], strict=False)}
    return DenseModel(params, loss, hessian, torch.linalg.eigvalsh(hessian).cpu(), layers)
