"""Norms and directions of the parameters' gradient and step, read around one optimiser step."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from lcogeom.recording.attention import attention_layouts, split_attention
from lcogeom.recording.clipping import ScalingWatch
from lcogeom.recording.norms import norm, squared_norm, squared_norms, stretches
from lcogeom.recording.ranks import Ranks, in_whole, local
from lcogeom.recording.steps import CopiedSteps, SketchedSteps, Sketcher, StepFound, StepWatch, StoredSketch


class GradientMeter:
    """Watches the parameters that an optimiser updates. Every result is a 0-d tensor on its device: no sync here."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        sketch: int = 0,
        sketch_layers: bool = False,
        copies: bool = False,
        scaler: torch.amp.GradScaler | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """sketch: numbers kept of each gradient and step, 0 for none; sketch_layers: of each layer's part too.

        copies: of parameters and gradient are kept, for exact norms and cosines of steps.
        """
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._names: list[str] = []
        self._parameters: list[torch.nn.Parameter] = []
        self._members: dict[tuple[str, str], list[int]] = defaultdict(list)  # (scope, name) -> places in _parameters
        for group, settings in enumerate(optimizer.param_groups):
            for parameter in settings["params"]:
                if not parameter.requires_grad:
                    continue
                name = names.get(id(parameter), f"group{group}.unnamed")
                self._members["layer", layer_of(name)].append(len(self._parameters))
                self._members["group", str(group)].append(len(self._parameters))
                self._names.append(name)
                self._parameters.append(parameter)
        if not any(id(parameter) in names for parameter in self._parameters):
            raise ValueError(
                "optimizer: it updates none of this model's trainable parameters. Pass the pair that trains."
            )
        self._ranks = ranks or Ranks()
        self._optimizer = optimizer
        sketcher = None
        if sketch:
            layers = [layer_of(name) for name in self._names]
            sketcher = Sketcher(self._parameters, layers, sketch, sketch_layers, self._ranks)
        self._steps: StepWatch | None = None
        if copies:
            self._steps = CopiedSteps(self._parameters, self._members, sketcher)
        elif sketcher is not None:
            self._steps = SketchedSteps(self._parameters, self._members, sketcher)
        self._layouts = attention_layouts(model)
        self._scaling = ScalingWatch(self._parameters)
        self._scaler = scaler
        self._scale: Tensor | None = None
        self._norms: Tensor | None = None
        self._received: Tensor | None = None
        self._present: list[bool] = []
        self._audited: list[Tensor] = []

    def backward_ended(self) -> None:
        """The gradients are in place as the backward pass left them."""
        self._scaling.look()
        # Private, but get_scale() would wait for the device.
        scale = None if self._scaler is None else getattr(self._scaler, "_scale", None)
        self._scale = None if scale is None else scale.detach().double().reshape(()).clone()

    def gradients_gone(self) -> bool:
        """Whether gradients of the last backward pass have been thrown away."""
        return self._scaling.gone()

    def before_step(self, audited: bool = False) -> dict[str, Tensor]:
        """Norms of the gradient, and its cosine with the last one. audited: the weights are kept for the audit."""
        found: dict[str, Tensor] = {}
        rate = self._optimizer.param_groups[0].get("lr")
        if rate is not None:
            found["learning_rate"] = torch.as_tensor(rate, dtype=torch.float64).detach().clone()
        with torch.no_grad():
            if audited:
                self._audited = [parameter.detach().clone() for parameter in self._parameters]
            gradients = [parameter.grad for parameter in self._parameters]
            device = self._parameters[0].device
            cosines, clipped = self._read(gradients, device)
            found |= cosines
            scaling = self._scaling.factors()
            self._norms = None
            if scaling is None:
                found["grad_norm_clipped"] = self._ranks.total(clipped).sum().sqrt()
            else:
                factors, plain = scaling
                if self._scale is not None:
                    factors = factors * self._scale.to(device)
                squares = [torch.where(plain, clipped / factors.square(), math.nan)]
                for place, gradient in enumerate(gradients):
                    layout = self._layouts.get(self._names[place])
                    if layout is not None and gradient is not None:
                        part = clipped[place]
                        if layout.sizes:
                            split = split_attention(in_whole(gradient), layout)
                            own = torch.stack([squared_norm(local(piece)).to(device) for piece in split])
                            part = own if self._ranks.counts(gradient) else torch.zeros_like(own)
                        squares.append(torch.where(plain, part.reshape(-1) / factors[place].square(), math.nan))
                whole = self._ranks.total(torch.cat([clipped, *squares]))
                clipped, before, attention = whole.tensor_split([len(gradients), 2 * len(gradients)])
                found["grad_norm_clipped"] = clipped.sum().sqrt()
                self._norms = before.sqrt()
                found["grad_norm"] = before.sum().sqrt()
                if len(attention):
                    found["qkv_mean_frobenius"] = attention.sqrt().mean()
            self._received = clipped.sqrt() if scaling is not None else self._ranks.total(clipped).sqrt()
            self._present = [gradient is not None for gradient in gradients]
            return found

    def _read(self, gradients: Sequence[Tensor | None], device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
        """(cosine with the last gradient, squared norms (P,) float64 of what this process holds and counts)."""
        norms: list[list[Tensor]] = [[] for _ in gradients]

        def visit(place: int, stretch: Tensor) -> None:
            norms[place].append(norm(stretch).to(device))

        found: dict[str, Tensor] = {}
        if self._steps is not None:
            found = self._steps.before(visit)
        else:
            for place, gradient in enumerate(gradients):
                for stretch in [] if gradient is None else stretches(local(gradient)):
                    visit(place, stretch)
        nothing = [torch.zeros((), device=device)]
        counted = [gradient is not None and self._ranks.counts(gradient) for gradient in gradients]
        return found, squared_norms([own if there else nothing for own, there in zip(norms, counted, strict=True)])

    def around_the_step(self) -> tuple[list[Tensor], list[Tensor]]:
        """(the parameters, their values before the step); only after `before_step(audited=True)`."""
        before, self._audited = self._audited, []
        return list(self._parameters), before

    def after_step(self) -> tuple[dict[str, Tensor], dict[str, list[object]], list[StoredSketch]]:
        """(norm of the step and its cosine with -gradient, rows of the norms table without their step, sketches)."""
        with torch.no_grad():
            found = StepFound({}, {}, {}, {}, []) if self._steps is None else self._steps.after()
            rows: dict[str, list[object]] = defaultdict(list)
            for key, members in self._members.items():
                there = [place for place in members if self._present[place]]
                rows["scope"].append(key[0])
                rows["name"].append(key[1])
                for column, norms in (("grad_norm", self._norms), ("grad_norm_clipped", self._received)):
                    rows[column].append(None if norms is None or not there else norms[there].square().sum().sqrt())
                rows["update_norm"].append(found.squares[key].sqrt() if key in found.squares else None)
                rows["weight_norm"].append(found.weights[key].sqrt() if key in found.weights else None)
                rows["moved_between"].append(found.between[key].sqrt() if key in found.between else None)
        return found.values, rows, found.sketches


def layer_of(name: str) -> str:
    """The numbered block a parameter belongs to (`model.layers.3`), else its module (`model.embed_tokens`)."""
    block = re.match(r"(.*?\.\d+)\.", name)
    return block.group(1) if block else name.rsplit(".", 1)[0]
