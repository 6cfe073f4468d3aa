"""What does training do to the loss's curvature in the parameters?  ->  spectrum.parquet

    python analysis/spectrum.py [--updates 60] [--out analysis/spectrum.parquet]        (80 s on one core)

From the weights of `tiny`, on one batch of 16 completions, 60 updates under each of three objectives; before and after,
the Hessian of that objective's mean loss over all 133,696 parameters: its density by stochastic Lanczos quadrature and
its two ends by Lanczos. Products by double backward in float32. One batch, one seed; errors are over probes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import lcogeom as lg
from lcogeom.training import ReplaySettings, make_batch, mean_loss, one_update, variant_objective

VARIANTS = ("sft", "ppo-unclipped:positive", "lco-kld")
LEARNING_RATE = 3e-4  # as `lcogeom replay tiny`
PROBES, STEPS = 5, 96
POINTS, WIDTH = 801, 0.12  # of the drawn density, in asinh(eigenvalue): linear within 1, logarithmic beyond
ZERO = 1e-3  # of the largest |eigenvalue|: what counts as negative lies below


def curvature(model: transformers.PreTrainedModel, loss: Callable[[], Tensor]) -> Callable[[Tensor], Tensor]:
    """x -> H x over all parameters, flat; the gradient's graph is built once."""
    params = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss(), params, create_graph=True)])

    def product(x: Tensor) -> Tensor:
        return torch.cat([part.flatten() for part in torch.autograd.grad(gradient, params, x, retain_graph=True)])

    return product


def negative_part(density: lg.SpectralDensity) -> tuple[float, float]:
    """(sum of the negative eigenvalues over the sum of all |eigenvalues|, standard error of that ratio)."""
    below = (density.weights * density.nodes.clamp(max=0)).sum(1).abs()
    total = (density.weights * density.nodes.abs()).sum(1)
    ratio = float(below.sum() / total.sum())
    return ratio, float((below - ratio * total).std() / total.mean() / len(total) ** 0.5)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--probes", type=int, default=PROBES)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=Path("analysis/spectrum.parquet"))
    arguments = parser.parse_args()

    loaded = lg.load_model("tiny")
    model = loaded.model
    model.set_attn_implementation("eager")  # the other kernels have no second derivative
    size = sum(parameter.numel() for parameter in model.parameters())
    batch = make_batch(loaded, ReplaySettings(sequences=16), 0, lambda *_: None)
    start = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    where = {"dtype": torch.float32, "device": model.device}

    measured: dict[tuple[str, str], tuple[float, lg.ExtremeEigenvalues, lg.SpectralDensity]] = {}
    for name in track(VARIANTS, description="objectives"):
        model.load_state_dict(start)
        minimised, advantage = variant_objective(name)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        for when in ("before", "after"):
            loss = mean_loss(model, minimised, batch, advantage=advantage)
            matvec = curvature(model, lambda loss=loss: loss)
            ends = lg.extreme_eigenvalues(matvec, size, steps=200, tolerance=3e-6, **where)
            density = lg.spectral_density(matvec, size, probes=arguments.probes, steps=arguments.steps, **where)
            measured[name, when] = float(loss.detach()), ends, density
            if when == "before":
                for _ in range(arguments.updates):
                    one_update(model, optimizer, minimised, batch, advantage=advantage)
    furthest = max(density.nodes.abs().max() for _, _, density in measured.values()).asinh() + 4 * WIDTH
    grid = torch.linspace(-float(furthest), float(furthest), POINTS, dtype=torch.float64)
    rows = []
    shown = Table(title=f"tiny, {arguments.updates} updates on one batch: the Hessian over {size:,} parameters")
    for heading in (
        "objective",
        "when",
        "loss",
        "lowest",
        "highest",
        "below 0, % of eigenvalues",
        "negative, % of the sum of sizes",
    ):
        shown.add_column(heading, justify="left" if heading in ("objective", "when") else "right")
    for name in VARIANTS:
        for when in ("before", "after"):
            loss, ends, density = measured[name, when]
            values, error = replace(density, nodes=density.nodes.asinh()).on(grid, WIDTH).density
            share = [float(part) for part in density.cumulative(torch.tensor([-ZERO * ends.scale]))]
            mass, mass_error = negative_part(density)
            rows.append(
                pd.DataFrame(
                    {
                        "variant": name,
                        "when": when,
                        "updates": 0 if when == "before" else arguments.updates,
                        "size": size,
                        "loss": loss,
                        "x": grid.sinh().numpy(),
                        "density": values.numpy(),
                        "density_error": error.numpy(),
                        "width": WIDTH,
                        "lowest": float(ends.values[0]),
                        "lowest_residual": float(ends.residuals[0]),
                        "highest": float(ends.values[1]),
                        "highest_residual": float(ends.residuals[1]),
                        "lowest_unseen": ends.unseen[0],
                        "converged": bool(ends.converged.all()),
                        "negative_share": share[0],
                        "negative_share_error": share[1],
                        "negative_share_lowest": share[2],
                        "negative_share_highest": share[3],
                        "negative_mass": mass,
                        "negative_mass_error": mass_error,
                    }
                )
            )
            shown.add_row(
                name,
                when,
                f"{loss:.3g}",
                *(f"{value:.4g} ± {gap:.1g}" for value, gap in zip(ends.values, ends.residuals, strict=True)),
                f"{100 * share[0]:.3g} ± {100 * share[1]:.1g} [{100 * share[2]:.2g}, {100 * share[3]:.2g}]",
                f"{100 * mass:.3g} ± {100 * mass_error:.1g}",
            )
    Console(width=140).print(shown)
    pd.concat(rows, ignore_index=True).to_parquet(arguments.out, index=False)
    print(arguments.out)
