"""Hessian-vector products against finite differences and the dense Hessian, and the self-check of their routes."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.func import functional_call, grad, jacrev, jvp
from torch.utils.checkpoint import checkpoint

import lcogeom as lg
from tests.curvature.models import CONFIGS, MODELS, Case, case, differences, dot, flat, random_like, small_gpt2

OBJECTIVES = ["sft", "ppo", "lco-kld", "entropy"]


def gradient(loss: Callable[[], Tensor], params: list[Tensor]) -> Callable[[], list[Tensor]]:
    return lambda: list(torch.autograd.grad(loss(), params, materialize_grads=True))


@pytest.mark.parametrize(("name", "tied"), MODELS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_equals_finite_differences(name: str, tied: bool, objective: str, device: torch.device) -> None:
    some = case(CONFIGS[name](tied), device)
    loss = some.loss(lg.objective(objective))
    v = random_like(some.params, 3)
    found = flat(lg.hvp(loss, some.params, v, route="double-backward"))
    wanted = differences(gradient(loss, some.params), some.params, v, 2e-5 if name == "gpt2" else 1e-4)
    # The Llama family's norms stay in float32, whose rounding the differences magnify.
    assert (found - wanted).norm() <= (1e-6 if name == "gpt2" else 1e-2) * wanted.norm()


@pytest.mark.parametrize(("name", "tied"), MODELS)
def test_symmetric_in_float32(name: str, tied: bool, device: torch.device) -> None:
    some = case(CONFIGS[name](tied), device, torch.float32)
    H = lg.model_hessian(some.loss(lg.objective("ppo")), some.params)
    assert H.route == "double-backward"
    u, v = random_like(some.params, 1), random_like(some.params, 2)
    hu = H(u)  # along H u and v no product cancels
    left, right = dot(H(hu), v), dot(hu, H(v))
    assert abs(left - right) <= 1e-4 * flat(hu).double().norm() * flat(H(v)).double().norm()
    assert H.check is not None
    assert H.check.asymmetry <= 1e-4


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_equals_the_dense_hessian(objective: str, device: torch.device) -> None:
    some = small_gpt2(device)
    chosen = lg.objective(objective)
    shapes = {name: p.shape for name, p in some.model.named_parameters()}
    sizes = [p.numel() for p in some.params]

    def loss(theta: Tensor) -> Tensor:
        parts = theta.split(sizes)
        named = {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        logits = functional_call(some.model, named, kwargs={"input_ids": some.input_ids}).logits
        return chosen.loss(logits[:, :-1][some.mask[:, 1:]], some.batch).mean()

    dense = torch.autograd.functional.hessian(loss, flat(some.params).detach())
    H = lg.model_hessian(some.loss(chosen), some.params)
    matvec = lg.flat_matvec(H, some.params)
    torch.testing.assert_close(H.size, len(dense))
    for seed in range(3):
        v = flat(random_like(some.params, seed))
        torch.testing.assert_close(matvec(v), dense @ v, rtol=1e-9, atol=1e-11)


def test_differences_equal_double_backward(device: torch.device) -> None:
    for dtype, allowed in ((torch.float64, 1e-3), (torch.float32, 3e-2)):
        some = case(CONFIGS["llama"](True), device, dtype)
        loss = some.loss(lg.objective("ppo"))
        exact, near = (lg.model_hessian(loss, some.params, route=r) for r in ("double-backward", "finite-differences"))
        v = exact(random_like(some.params, 5))
        before = [p.clone() for p in some.params]
        wanted, found = flat(exact(v)), flat(near(v))
        assert (found - wanted).norm() <= allowed * wanted.norm()
        assert all(torch.equal(p, b) for p, b in zip(some.params, before, strict=True))


def test_micro_batches_add_up(device: torch.device) -> None:
    some = small_gpt2(device)
    objective = lg.objective("ppo")
    v = random_like(some.params, 0)
    parts = [some.rows(slice(row, row + 1)) for row in range(3)]
    total = len(some.batch)
    losses = [lambda part=part: objective.loss(part.logits(), part.batch).sum() / total for part in parts]
    whole = flat(lg.hvp(some.loss(objective), some.params, v))
    torch.testing.assert_close(flat(lg.hvp(losses, some.params, v)), whole, rtol=1e-10, atol=1e-12)
    near = flat(lg.hvp(losses, some.params, v, route="finite-differences"))
    assert (near - whole).norm() <= 1e-3 * whole.norm()


def test_a_kept_graph_follows_the_parameters(device: torch.device) -> None:
    some = small_gpt2(device)
    loss = some.loss(lg.objective("ppo"))
    kept, fresh = lg.model_hessian(loss, some.params, keep_graph=True), lg.model_hessian(loss, some.params)
    v = random_like(some.params, 0)
    for _ in range(2):
        torch.testing.assert_close(flat(kept(v)), flat(fresh(v)), rtol=0, atol=0)
        torch.testing.assert_close(flat(kept(v)), flat(fresh(v)), rtol=0, atol=0)
        with torch.no_grad():
            some.params[0].mul_(1.1)
    kept.release()


@pytest.mark.parametrize("part", ["transformer.h.0.attn", "transformer.wte"])
def test_one_module_is_a_block(part: str, device: torch.device) -> None:
    some = small_gpt2(device)
    loss = some.loss(lg.objective("ppo"))
    block = list(some.model.get_submodule(part).parameters())
    inside = {id(p) for p in block}
    v = random_like(block, 0)
    place = iter(v)
    padded = [next(place) if id(p) in inside else torch.zeros_like(p) for p in some.params]
    whole = [h for h, p in zip(lg.hvp(loss, some.params, padded), some.params, strict=True) if id(p) in inside]
    torch.testing.assert_close(flat(lg.hvp(loss, block, v)), flat(whole), rtol=1e-9, atol=1e-12)


# routes -----------------------------------------------------------------------------------------


def test_sdpa_attention_is_made_differentiable_twice(device: torch.device) -> None:
    eager, fused = (case(CONFIGS["llama"](False), device, attention=kind) for kind in ("eager", "sdpa"))
    objective = lg.objective("ppo")
    v = random_like(eager.params, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = flat(lg.hvp(fused.loss(objective), fused.params, v))
    wanted = flat(lg.hvp(eager.loss(objective), eager.params, v))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))


def test_the_self_check_catches_a_wrong_route(device: torch.device) -> None:
    """Forward over vmapped reverse mode through layer_norm: wrong by tens of percent, and silent."""
    some = case(CONFIGS["gpt2"](False), device, torch.float32)
    names = [name for name, _ in some.model.named_parameters()]
    objective = lg.objective("ppo")

    def loss(*values: Tensor) -> Tensor:
        logits = functional_call(
            some.model, dict(zip(names, values, strict=True)), kwargs={"input_ids": some.input_ids}
        ).logits
        return objective.loss(logits[:, :-1][some.mask[:, 1:]], some.batch).mean()

    places = tuple(range(len(names)))

    def over(outer: Callable[..., object]) -> Callable[[list[Tensor]], list[Tensor]]:
        return lambda v: [h.detach() for h in jvp(outer, tuple(some.params), tuple(v))[1]]

    right, wrong = over(grad(loss, argnums=places)), over(jacrev(loss, argnums=places))
    check = lg.check_hvp(right, some.loss(objective), some.params)
    assert check.disagreement < 0.03
    with pytest.raises(lg.RouteError, match=r"not this loss.s Hessian|no Hessian"):
        lg.check_hvp(wrong, some.loss(objective), some.params)


class Fused(torch.autograd.Function):
    """A loss that computes its gradient in the forward pass: no second derivative, and no word about it."""

    @staticmethod
    def forward(ctx, logits: Tensor) -> Tensor:
        with torch.enable_grad():
            z = logits.detach().requires_grad_()
            value = torch.logsumexp(z, 1).mean()
            ctx.save_for_backward(*torch.autograd.grad(value, z))
        return value.detach()

    @staticmethod
    def backward(ctx, outer: Tensor) -> Tensor:
        return outer * ctx.saved_tensors[0]


class Forbidden(Fused):
    """The same, saying so."""

    @staticmethod
    @once_differentiable
    def backward(ctx, outer: Tensor) -> Tensor:
        return outer * ctx.saved_tensors[0]


@pytest.mark.parametrize("fused", [Fused, Forbidden])
def test_fused_losses_go_by_differences(fused: type[torch.autograd.Function], device: torch.device) -> None:
    some = small_gpt2(device)
    v = random_like(some.params, 0)
    with pytest.raises((lg.RouteError, RuntimeError), match=r"differs|differentiable"):
        lg.model_hessian(lambda: fused.apply(some.logits()), some.params, route="double-backward")
    with pytest.warns(UserWarning, match="differences of gradients are used, because"):
        H = lg.model_hessian(lambda: fused.apply(some.logits()), some.params)
    assert H.route == "finite-differences"
    plain = small_gpt2(device)
    wanted = flat(lg.hvp(lambda: torch.logsumexp(plain.logits(), 1).mean(), plain.params, v))
    assert (flat(H(v)) - wanted).norm() <= 1e-3 * wanted.norm()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, device: torch.device) -> None:
    some = small_gpt2(device)
    hidden = torch.randn(5, 6, dtype=torch.float64, device=device, requires_grad=True)
    head = some.model.lm_head
    params = [head.weight]
    plain = flat(lg.hvp(lambda: head(hidden.tanh()).logsumexp(1).mean(), params, random_like(params, 0)))

    def loss() -> Tensor:
        return checkpoint(lambda h: head(h.tanh()).logsumexp(1).mean(), hidden, use_reentrant=reentrant)

    mine = [torch.nn.Parameter(head.weight.detach().clone())]  # a set of parameters that was not checked yet
    head.weight = mine[0]
    mine[0].grad = torch.ones_like(mine[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if reentrant else "error")
        found = flat(lg.hvp(loss, mine, random_like(mine, 0)))
    assert (found - plain).norm() <= (1e-3 if reentrant else 1e-10) * plain.norm()
    assert torch.equal(mine[0].grad, torch.ones_like(mine[0]))


def test_padding_rows_are_no_coordinates(device: torch.device) -> None:
    """An unmasked pad id reaches the loss, but autograd gives its row no gradient."""
    torch.manual_seed(0)
    embed = torch.nn.Embedding(7, 4, padding_idx=2, dtype=torch.float64, device=device)
    with torch.no_grad():
        embed.weight[2] = 0.5
    layer = torch.nn.Linear(4, 5, dtype=torch.float64, device=device)
    ids = torch.tensor([[1, 2, 3], [2, 2, 5]], device=device)
    params = [*embed.parameters(), *layer.parameters()]

    def loss() -> Tensor:
        return layer(embed(ids).tanh().sum(1)).logsumexp(1).square().mean()

    v, u = random_like(params, 0), random_like(params, 1)
    near = flat(lg.hvp(loss, params, v, route="finite-differences"))
    found = lg.hvp(loss, params, v)
    assert (near - flat(found)).norm() <= 1e-3 * near.norm()
    assert (found[0][2] == 0).all()
    assert abs(dot(found, u) - dot(lg.hvp(loss, params, u), v)) <= 1e-12 * abs(dot(found, u))
    v[0][2] = 0.0
    wanted = differences(gradient(loss, params), params, v, 1e-4)
    torch.testing.assert_close(flat(found), wanted, rtol=1e-7, atol=1e-9)


def test_only_trainable_parameters_move(device: torch.device) -> None:
    """Low-rank adapters on frozen weights: the Hessian is that of the adapters."""
    some = small_gpt2(device)
    for p in some.params:
        p.requires_grad_(False)
    head = some.model.lm_head.weight
    a = torch.nn.Parameter(random_like([head[:2]], 0)[0])
    b = torch.nn.Parameter(random_like([head[:, :2]], 1)[0])

    def loss() -> Tensor:
        hidden = some.model.transformer(input_ids=some.input_ids).last_hidden_state
        logits = hidden @ (head + b @ a).T
        return lg.objective("sft").loss(logits[:, :-1][some.mask[:, 1:]], some.batch).mean()

    v = random_like([a, b], 2)
    wanted = differences(gradient(loss, [a, b]), [a, b], v, 1e-4)
    torch.testing.assert_close(flat(lg.hvp(loss, [a, b], v)), wanted, rtol=1e-7, atol=1e-9)


def test_a_linear_loss_has_no_curvature(device: torch.device) -> None:
    w = torch.nn.Parameter(torch.ones(3, dtype=torch.float64, device=device))
    for route in ("auto", "finite-differences"):
        assert flat(lg.hvp(lambda: 2 * w.sum(), [w], [torch.ones_like(w)], route=route)).abs().max() < 1e-9


# bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"params": []}, ValueError, "params: none"),
        ({"params": "model"}, TypeError, "params: a module"),
        ({"params": "twice"}, ValueError, "params: the same tensor twice"),
        ({"params": "frozen"}, ValueError, "params: number 1 requires no gradient"),
        ({"vector": "short"}, ValueError, "vector: 1 tensors"),
        ({"vector": "shape"}, ValueError, "vector: number 0 has shape"),
        ({"route": "magic"}, ValueError, "route: 'magic'"),
        ({"loss": "vector"}, ValueError, "loss_fn: it returned shape"),
        ({"loss": "nan"}, lg.RouteError, "loss_fn: the loss is nan"),
        ({"loss": "random"}, lg.RouteError, "loss_fn: it gave .* and then"),
        ({"loss": "none"}, ValueError, "loss_fn: an empty list"),
    ],
    ids=str,
)
def test_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    model = torch.nn.Linear(2, 3)
    x = torch.ones(4, 2)
    params: object = list(model.parameters())
    vector = [torch.ones_like(p) for p in model.parameters()]
    losses = {
        "vector": lambda: model(x)[0],
        "nan": lambda: model(x).sum() * float("nan"),
        "random": lambda: (model(x) * torch.rand(4, 3)).square().mean(),
        "none": [],
    }
    wrong = change.get("params")
    if wrong == "model":
        params = model
    elif wrong == "twice":
        params = [model.weight, model.weight]
    elif wrong == "frozen":
        model.bias.requires_grad_(False)
    elif wrong is not None:
        params = wrong
    if change.get("vector") == "short":
        vector = vector[:1]
    elif change.get("vector") == "shape":
        vector[0] = torch.ones(3)
    loss = losses.get(str(change.get("loss")), lambda: model(x).square().mean())
    with pytest.raises(error, match=message):
        lg.hvp(loss, params, vector, route=str(change.get("route", "auto")))


def test_wrong_length_of_a_flat_vector() -> None:
    w = torch.nn.Parameter(torch.ones(3))
    matvec = lg.flat_matvec(lambda v: v, [w])
    with pytest.raises(ValueError, match=r"vector: shape \(2,\); must be \(3,\)"):
        matvec(torch.ones(2))


def test_smollm2_like_models_need_no_warning() -> None:
    """The common case is silent: Llama with SDPA, float32."""
    some: Case = case(transformers.LlamaConfig(**{"vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 24}), torch.device("cpu"), torch.float32, "sdpa")  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lg.model_hessian(some.loss(lg.objective("lco-kld")), some.params)
