"""Norms and directions of the parameters' gradient and step, read around one optimiser step."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from lcogeom.recording.sketching import UpdateSketches

SEPARATE = {"q_proj", "k_proj", "v_proj", "query", "key", "value", "q_lin", "k_lin", "v_lin", "wq", "wk", "wv"}
FUSED = {"qkv_proj", "c_attn", "Wqkv", "W_pack", "query_key_value"}
INTERLEAVED = {"query_key_value"}  # [q of the group's heads, k, v] for each key/value head, not q | k | v
PIECE = 2**20  # elements looked at together: several passes over 4 MiB cost one pass over memory


class GradientMeter:
    """Watches the parameters that an optimiser updates. Every result is a 0-d tensor on its device: no sync here."""

    def __init__(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, sketch: int = 0, sketch_layers: bool = False
    ) -> None:
        """sketch: numbers kept of each gradient and step, 0 for none; sketch_layers: of each layer's part too."""
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._parameters: list[tuple[str, torch.nn.Parameter]] = []
        self._members: dict[tuple[str, str], list[int]] = defaultdict(list)  # (scope, name) -> places in _parameters
        for group, settings in enumerate(optimizer.param_groups):
            for parameter in settings["params"]:
                if not parameter.requires_grad:
                    continue
                name = names.get(id(parameter), f"group{group}.unnamed")
                self._members["layer", layer_of(name)].append(len(self._parameters))
                self._members["group", str(group)].append(len(self._parameters))
                self._parameters.append((name, parameter))
        if not any(id(parameter) in names for _, parameter in self._parameters):
            raise ValueError(
                "optimizer: it updates none of this model's trainable parameters. Pass the pair that trains."
            )
        self._sketches: UpdateSketches | None = None
        if sketch:
            layers = [layer_of(name) for name, _ in self._parameters]
            self._sketches = UpdateSketches([p for _, p in self._parameters], layers, sketch, sketch_layers)
        self._layouts = attention_layouts(model)
        self._arrived: dict[int, Tensor] = {}  # place -> squared norm before clipping
        self._attention: dict[int, Tensor] = {}  # place -> Frobenius norms of its q, k, v parts
        self._before: list[Tensor] | None = None
        self._gradient: list[Tensor | None] = [None] * len(self._parameters)
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._accumulated(place))
            for place, (_, parameter) in enumerate(self._parameters)
        ]

    def remove(self) -> None:
        """Take the hooks off and let go of the copies."""
        for handle in self._handles:
            handle.remove()
        self._before, self._gradient = None, [None] * len(self._parameters)

    def _accumulated(self, place: int) -> Callable[[Tensor], None]:
        layout = self._layouts.get(self._parameters[place][0])

        def hook(parameter: Tensor) -> None:
            # With accumulation this runs once per backward pass; the last one sees the whole gradient.
            gradient = parameter.grad
            if gradient is None:
                return
            self._arrived[place] = _norm(gradient).square()
            if layout is not None:
                self._attention[place] = torch.stack([_norm(part) for part in split_attention(gradient, layout)])

        return hook

    def before_step(self) -> dict[str, Tensor]:
        """Norms of the gradient, and its cosine with the last one; keeps copies of parameters and gradient."""
        if self._before is None:
            self._before = [torch.empty_like(_flat(parameter)) for _, parameter in self._parameters]
            for place, (_, parameter) in enumerate(self._parameters):
                self._sketch("weights", place, parameter)
        now, last, along = _Sum(), _Sum(), _Sum()
        comparable = True  # with the last update: every gradient here was there too
        with torch.no_grad():
            for place, (_, parameter) in enumerate(self._parameters):
                self._before[place].copy_(_flat(parameter))
                gradient, kept = parameter.grad, self._gradient[place]
                if gradient is None:
                    self._gradient[place] = None
                    continue
                self._sketch("gradient", place, gradient)
                if kept is None:
                    kept = self._gradient[place] = torch.zeros_like(_flat(gradient))
                    comparable = False
                for new, old in _pieces(_flat(gradient), kept):
                    now.add(_square(new))
                    if comparable:
                        last.add(_square(old))
                        along.add(_dot(new, old))
                    old.copy_(new)
        found = {"grad_norm_clipped": now.root()}
        if self._arrived:
            found["grad_norm"] = _root_of_sum(self._arrived.values())
        if self._attention:
            found["qkv_mean_frobenius"] = torch.cat(list(self._attention.values())).mean()
        if comparable and along.terms:
            found["grad_cos_prev"] = along.total() / (now.root() * last.root())
        return found

    def around_the_step(self) -> tuple[list[Tensor], list[Tensor]]:
        """(the parameters, their values before the step); only between `before_step` and `after_step`."""
        assert self._before is not None
        parameters = [parameter for _, parameter in self._parameters]
        return list(parameters), [
            old.view(parameter.shape) for old, parameter in zip(self._before, parameters, strict=True)
        ]

    def after_step(self) -> tuple[dict[str, Tensor], dict[str, list[object]]]:
        """(norm of the step and its cosine with -gradient, rows of the norms table without their step)."""
        assert self._before is not None
        steps, forces, along = [_Sum() for _ in self._parameters], _Sum(), _Sum()
        with torch.no_grad():
            for place, (_, parameter) in enumerate(self._parameters):
                gradient = self._gradient[place]
                for before, after, force in _pieces(self._before[place], _flat(parameter), gradient):
                    backwards = before.sub_(after)
                    steps[place].add(_square(backwards))
                    if force is not None:
                        forces.add(_square(force))
                        along.add(_dot(backwards, force))
                self._sketch("step", place, self._before[place], sign=-1.0)  # it holds theta_old - theta_new now
        found = {"update_norm": _root_of_sum(step.total() for step in steps)}
        if forces.terms:
            found["step_grad_cos"] = along.total() / (found["update_norm"] * forces.root())
        rows: dict[str, list[object]] = defaultdict(list)
        for (scope, name), members in self._members.items():
            rows["scope"].append(scope)
            rows["name"].append(name)
            arrived = [self._arrived[place] for place in members if place in self._arrived]
            rows["grad_norm"].append(_root_of_sum(arrived) if arrived else None)
            rows["update_norm"].append(_root_of_sum(steps[place].total() for place in members))
        self._arrived.clear()
        self._attention.clear()
        return found, rows

    def sketches(self) -> list[tuple[str, str | None, Tensor]]:
        """(vector, layer or None for the whole, sketch) of the update that after_step saw; none if not asked for."""
        return [] if self._sketches is None else self._sketches.take()

    def _sketch(self, vector: str, place: int, values: Tensor, sign: float = 1.0) -> None:
        if self._sketches is not None:
            self._sketches.add(vector, place, values, sign)


def layer_of(name: str) -> str:
    """The numbered block a parameter belongs to (`model.layers.3`), else its module (`model.embed_tokens`)."""
    block = re.match(r"(.*?\.\d+)\.", name)
    return block.group(1) if block else name.rsplit(".", 1)[0]


@dataclass(frozen=True)
class AttentionLayout:
    """Where query, key and value lie in one projection's weight."""

    kind: str
    """'separate': one of the three alone; 'fused': q | k | v; 'interleaved': (q, k, v) of each group."""
    transposed: bool
    """GPT-2's Conv1D: outputs are columns."""
    heads: int = 0
    groups: int = 0
    """Query heads, and key/value heads."""
    size: int = 0
    """Of one head."""


def attention_layouts(model: torch.nn.Module) -> dict[str, AttentionLayout]:
    """The query, key and value weights of a model, by parameter name."""
    config = model.config.get_text_config() if isinstance(model, transformers.PreTrainedModel) else None
    layouts: dict[str, AttentionLayout] = {}
    for name, module in model.named_modules():
        kind = name.rsplit(".", 1)[-1]
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            continue
        transposed = isinstance(module, transformers.pytorch_utils.Conv1D)
        if kind in SEPARATE:
            layouts[f"{name}.weight"] = AttentionLayout("separate", transposed)
        elif kind in FUSED and config is not None:
            heads = int(config.num_attention_heads)
            groups = _key_value_heads(config, heads)
            size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
            if weight.shape[1 if transposed else 0] == (heads + 2 * groups) * size:  # else: cross-attention's key-value
                layout = "interleaved" if kind in INTERLEAVED else "fused"
                layouts[f"{name}.weight"] = AttentionLayout(layout, transposed, heads, groups, size)
    return layouts


def split_attention(gradient: Tensor, layout: AttentionLayout) -> list[Tensor]:
    """The query, key and value parts of a projection's gradient; a separate projection is its own only part."""
    rows = gradient.T if layout.transposed else gradient
    heads, groups, size = layout.heads, layout.groups, layout.size
    if layout.kind == "separate":
        return [rows]
    if layout.kind == "fused":
        return list(rows.split([heads * size, groups * size, groups * size]))
    queries = heads // groups
    grouped = rows.reshape(groups, queries + 2, size, -1)
    return [grouped[:, :queries], grouped[:, queries], grouped[:, queries + 1]]


def _key_value_heads(config: transformers.PretrainedConfig, heads: int) -> int:
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1  # Falcon-7B, GPT-BigCode
    return int(getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or heads)


class _Sum:
    """A sum of 0-d tensors, kept on their device and added in float64 at the end."""

    def __init__(self) -> None:
        self.terms: list[Tensor] = []

    def add(self, term: Tensor) -> None:
        self.terms.append(term)

    def total(self) -> Tensor:
        return torch.stack(self.terms).double().sum() if self.terms else torch.zeros((), dtype=torch.float64)

    def root(self) -> Tensor:
        return self.total().sqrt()


def _pieces(*tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """The same stretch of each flat tensor, small enough that what follows finds it in the cache; None stays None."""
    assert tensors[0] is not None
    for start in range(0, len(tensors[0]), PIECE):
        yield tuple(None if tensor is None else tensor[start : start + PIECE] for tensor in tensors)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1)


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor.detach(), dtype=torch.promote_types(tensor.dtype, torch.float32))


def _square(tensor: Tensor) -> Tensor:
    return _norm(tensor).square()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    precise = torch.promote_types(a.dtype, torch.float32)
    return torch.dot(a.to(precise), b.to(precise))


def _root_of_sum(squares: Iterable[Tensor]) -> Tensor:
    return torch.stack([square.double() for square in squares]).sum().sqrt()
