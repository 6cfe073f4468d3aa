"""Lists of tensors shaped like a model's parameters: checked, added up, flattened, moved there and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def require_params(params: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The parameters as a tuple.

    Raises:
        TypeError: a model or one tensor instead of a list.
        ValueError: none, one twice, or one that needs no gradient.
    """
    if isinstance(params, torch.nn.Module):
        raise TypeError("params: a module; pass a list, such as [p for p in model.parameters() if p.requires_grad].")
    if isinstance(params, Tensor):
        raise TypeError("params: one tensor; pass a list of them.")
    params = tuple(params)
    if not params:
        raise ValueError("params: none. Does any parameter of the model require a gradient?")
    if len({id(parameter) for parameter in params}) < len(params):
        raise ValueError("params: the same tensor twice; tied weights count once, as in model.parameters().")
    frozen = [place for place, parameter in enumerate(params) if not parameter.requires_grad]
    if frozen:
        raise ValueError(f"params: number {frozen[0]} requires no gradient; pass trainable parameters only.")
    return params


def require_like(name: str, vector: Sequence[Tensor], params: Sequence[Tensor]) -> list[Tensor]:
    """`vector` on the parameters' devices and in their dtypes. Raises ValueError unless it is shaped like them."""
    if isinstance(vector, Tensor) or len(vector) != len(params):
        count = "one tensor" if isinstance(vector, Tensor) else f"{len(vector)} tensors"
        raise ValueError(f"{name}: {count}; must be a list of {len(params)} tensors, shaped like params.")
    for place, (value, parameter) in enumerate(zip(vector, params, strict=True)):
        if value.shape != parameter.shape:
            raise ValueError(
                f"{name}: number {place} has shape {tuple(value.shape)}, its parameter {tuple(parameter.shape)}."
            )
    return [value.detach().to(parameter) for value, parameter in zip(vector, params, strict=True)]


def flat_matvec(
    product: Callable[[list[Tensor]], Sequence[Tensor]], params: Sequence[Tensor]
) -> Callable[[Tensor], Tensor]:
    """A product of lists of tensors as one of flat vectors, such as `lg.extreme_eigenvalues` takes.

    Args:
        product: lists shaped like params to lists shaped like params.
        params: in the order in which they lie in the flat vector, whose length is the sum of their sizes.
    """
    shapes = [parameter.shape for parameter in params]
    sizes = [parameter.numel() for parameter in params]

    def matvec(vector: Tensor) -> Tensor:
        if vector.shape != (sum(sizes),):
            raise ValueError(f"vector: shape {tuple(vector.shape)}; must be ({sum(sizes)},), all parameters in a row.")
        pieces = [piece.reshape(shape) for piece, shape in zip(vector.split(sizes), shapes, strict=True)]
        found = product(pieces)
        return torch.cat([part.reshape(-1).to(vector) for part in found])

    return matvec


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """<a, b>, added up in float64 over the tensors."""
    pairs = zip(a, b, strict=True)
    return float(torch.stack([(x.detach() * y.detach()).sum(dtype=torch.float64).cpu() for x, y in pairs]).sum())


def norm(a: Sequence[Tensor]) -> float:
    """The Euclidean norm of a list."""
    return inner(a, a) ** 0.5


def random_like(params: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Standard normal entries, the same on every device."""
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=rng, dtype=torch.float32).to(p) for p in params]


@contextmanager
def held(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Copies of the parameters, which get their values back to the bit at the end, whatever happens."""
    saved = [parameter.detach().clone() for parameter in params]
    try:
        yield saved
    finally:
        assign(params, saved)


def assign(params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write values into parameters."""
    with torch.no_grad():
        for parameter, value in zip(params, values, strict=True):
            parameter.copy_(value)


def modules_called(function: Callable[[], object]) -> list[torch.nn.Module]:
    """The modules whose forward runs in `function`, each once."""
    seen: dict[int, torch.nn.Module] = {}
    handle = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: seen.update({id(module): module})
    )
    try:
        with torch.no_grad():
            function()
    finally:
        handle.remove()
    return list(seen.values())
