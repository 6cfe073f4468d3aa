"""One method of logit_hessian.py in a process, and an environment, of its own.

    python logit_hessian_worker.py METHOD FOLDER

METHOD: ours, autograd, hessian-eigenthings, curvlinops. FOLDER: the tokens, one safetensors file per set. One JSON
request a line on stdin, one JSON answer a line on stdout; the first answer holds the versions. Every method starts from
the same float32 logits and computes in float64.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

RESTARTS = 30  # of ARPACK, about 10 products each: the zero end of a convex token never converges
STEPS = (8, 16, 32, 50)  # of hessian-eigenthings' Lanczos, whose default is 2; it orthogonalises again up to 50
RESIDUAL = 1e-6  # hessian-eigenthings: relative residual that counts as converged
Ends = tuple[float | None, float | None]

# f(l) of each objective, l_old given: what the peers see of it
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ppo, A > 0": lambda logp, old: -(logp - old).exp(),
    "ppo, A < 0": lambda logp, old: (logp - old).exp(),
    "sft": lambda logp, _: -logp,
}


class LogitRow(nn.Module):
    """The model whose parameter is one token's logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), -1)


class TokenLoss(nn.Module):
    """f(log pi(a)) of a batch of one token; the target is the action."""

    reduction = "mean"

    def __init__(self, case: str, old: Tensor) -> None:
        super().__init__()
        self.case, self.old = case, old

    def forward(self, logits: Tensor, action: Tensor) -> Tensor:
        logp = torch.log_softmax(logits, dim=1).gather(1, action[:, None]).squeeze(1)
        return LOSSES[self.case](logp, self.old).mean()


def autograd(logits: Tensor, action: Tensor, old: Tensor, case: str) -> Ends:
    """Double backward, the graph of the gradient built once, and ARPACK."""
    from scipy.sparse.linalg import LinearOperator

    z = logits.double().requires_grad_()
    loss = LOSSES[case](torch.log_softmax(z, dim=0)[action], old)
    (gradient,) = torch.autograd.grad(loss, z, create_graph=True)

    def product(x: np.ndarray) -> np.ndarray:
        return torch.autograd.grad(gradient, z, torch.from_numpy(x.reshape(-1)), retain_graph=True)[0].numpy()

    return both_ends(LinearOperator((len(z), len(z)), matvec=product, dtype=np.float64))


def curvlinops(logits: Tensor, action: Tensor, old: Tensor, case: str) -> Ends:
    from curvlinops import HessianLinearOperator

    model, data = LogitRow(logits.double()), [(torch.zeros(1, 1, dtype=torch.float64), action[None])]
    loss = TokenLoss(case, old)
    H = HessianLinearOperator(model, loss, [model.logits], data, check_deterministic=False)
    return both_ends(H.to_scipy(np.float64))


def both_ends(operator) -> Ends:
    """One run of ARPACK for both ends, its own tolerance and subspace."""
    from scipy.sparse.linalg import ArpackNoConvergence, eigsh

    start = np.random.default_rng(0).standard_normal(operator.shape[0])
    try:
        low, high = eigsh(operator, k=2, which="BE", maxiter=RESTARTS, v0=start, return_eigenvectors=False)
    except ArpackNoConvergence as error:  # it brings what did converge: of a convex token, the positive end
        found = error.eigenvalues
        return None, float(found[-1]) if len(found) else None
    return float(low), float(high)


def eigenthings(logits: Tensor, action: Tensor, old: Tensor, case: str, steps: int) -> Ends:
    from hessian_eigenthings import HessianOperator, lanczos

    model, data = LogitRow(logits.double()), [(torch.zeros(1, 1, dtype=torch.float64), action[None])]
    loss = TokenLoss(case, old)
    H = HessianOperator(model, data, lambda model, pair: loss(model(pair[0]), pair[1]))
    ends = (lanczos(H, k=1, which=end, max_iter=steps, tol=RESIDUAL, seed=0) for end in ("SA", "LA"))
    low, high = (float(end.eigenvalues[0]) if bool(end.converged[0]) else None for end in ends)
    return low, high


@cache
def enough_steps(name: str, case: str, token: int) -> int:
    """The fewest of STEPS at which every end that is not 0 converges; the search is not timed."""
    for steps in STEPS:
        low, high = eigenthings(*one_token(name, token), case, steps)
        if high is not None and (low is not None or case == "sft"):
            break
    return steps


@lru_cache(maxsize=2)
def tokens(name: str) -> dict[str, Tensor]:
    return load_file(Path(sys.argv[2]) / f"{name}.safetensors")


def one_token(name: str, token: int) -> tuple[Tensor, Tensor, Tensor]:
    """(logits (V,) float32, action (), old log-probability ())."""
    some = tokens(name)
    return some["logits"][token], some["actions"][token], some["old_logprobs"][token]


def ours(name: str, case: str, rows: slice, device: str) -> dict[str, object]:
    """The rows of a set in one batch."""
    import lcogeom as lg

    some = {key: value[rows].to(device) for key, value in tokens(name).items()}
    objective = lg.objective("sft") if case == "sft" else lg.objective("ppo", clip_low=None, clip_high=None)
    advantages = torch.full_like(some["old_logprobs"], -1.0 if case == "ppo, A < 0" else 1.0)
    batch = lg.TokenBatch(some["actions"], advantages=advantages, old_logprobs=some["old_logprobs"])

    def both() -> tuple[Tensor, Tensor]:
        ends = objective.hessian(some["logits"], batch).eigenvalue_range()
        if device == "cuda":
            torch.cuda.synchronize()
        return ends

    both() if device == "cuda" else None
    seconds, (low, high) = timed(both)
    return {"seconds": seconds, "lowest": low.tolist(), "highest": high.tolist()}


def timed(function):
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def answer(method: str, request: dict) -> dict[str, object]:
    """{"seconds", "lowest", "highest"} of the first `tokens` tokens of a set."""
    name, case, count = request["set"], request["case"], request["tokens"]
    if method == "ours" and request.get("batched"):
        return ours(name, case, slice(count), request["device"])
    total: dict[str, object] = {"seconds": 0.0, "lowest": [], "highest": []}
    for token in range(count):
        if method == "ours":
            one = ours(name, case, slice(token, token + 1), request["device"])
        else:
            data = (*one_token(name, token), case)
            peer = {"autograd": autograd, "curvlinops": curvlinops}.get(method)
            if peer is None:
                steps = enough_steps(name, case, token)
                seconds, ends = timed(lambda data=data, steps=steps: eigenthings(*data, steps))
            else:
                seconds, ends = timed(lambda data=data, peer=peer: peer(*data))
            one = {"seconds": seconds, "lowest": [ends[0]], "highest": [ends[1]]}
        total = {key: total[key] + one[key] for key in total}
    return total


def bandwidth(_: dict) -> dict[str, float]:
    """Bytes read per second by the sum of 256 MiB of float32, and moved (read and written) by a copy of it."""
    data = torch.ones(2**26)
    copy = torch.empty_like(data)
    read, moved = [], []
    for _ in range(5):
        read.append(timed(data.sum)[0])
        moved.append(timed(lambda: copy.copy_(data))[0])
    return {"read": 4 * len(data) / min(read), "copy": 8 * len(data) / min(moved)}


def memory(request: dict) -> dict[str, int]:
    """Bytes that the resident set grows at its peak, beyond the logits: hessian, negative_count, eigenvalue_range."""
    import lcogeom as lg

    objective = lg.objective("ppo", clip_low=None, clip_high=None)
    for count, vocab in ((2, 64), (request["tokens"], request["vocab"])):  # a small one first: what is loaded lazily
        logits = torch.empty(count, vocab).normal_(std=3.0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        before = resident("VmRSS")
        batch = lg.TokenBatch(
            torch.zeros(count, dtype=torch.long), advantages=torch.ones(count), old_logprobs=torch.full((count,), -2.0)
        )
        H = objective.hessian(logits, batch)
        H.negative_count(), H.eigenvalue_range()
    return {"extra": resident("VmHWM") - before, "logits": 4 * logits.numel()}


def resident(which: str) -> int:
    """Bytes of the resident set: VmRSS now, VmHWM at its peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    method = sys.argv[1]
    packages = ["torch", "numpy", "scipy"]
    packages += {"ours": ["lcogeom"], "curvlinops": ["curvlinops-for-pytorch"], "autograd": []}.get(method, [method])
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    print(json.dumps({"versions": {name: version(name) for name in packages}, "gpu": gpu}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        special = {"bandwidth": bandwidth, "memory": memory}.get(request.get("what", ""))
        print(json.dumps(special(request) if special else answer(method, request)), flush=True)
