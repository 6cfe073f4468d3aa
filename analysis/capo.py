"""Do CAPO's m_H and m_F know what an update does, and does the exact Fisher know better?  ->  capo.parquet

    python analysis/capo.py [tiny] [smollm2] [--out analysis/capo.parquet]        (tiny 1 minute, smollm2 4 minutes)

Real updates on replay batches under three objectives, with SGD and with AdamW. Before each update: m_H and m_F of the
last layer (systems.md 2.3), from the optimiser's own moments. After it: the KL of the whole network's step at every
completion token, the same had the output matrix alone moved, and the rise of -loss under both. A row per token, per
completion and per update. Printed: Spearman correlations, with that of 1 - p of the sampled action as a yardstick; 95 %
bootstrap intervals over whole completions (token, sentence) or blocks of 5 updates (update, and the mean over updates
of the correlation within one).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import lcogeom as lg
from lcogeom.training import ReplaySettings
from lcogeom.training.replay import (
    LoadedModel,
    ReplayBatch,
    load_model,
    make_batch,
    one_update,
    token_batch,
    variant_objective,
)

OBJECTIVES = ("ppo", "reinforce", "lco-kld")
# The SGD rates move the policy about as far as AdamW's do.
SETUPS = {
    "tiny": {"replay": {"sequences": 16, "seeds": 3, "updates": 40}, "adamw": 3e-4, "sgd": 1e-3},
    "smollm2": {
        "replay": {"sequences": 6, "seeds": 1, "updates": 3, "max_new_tokens": 4},
        "adamw": 1e-5,
        "sgd": 3e-3,
    },
}
KEYS = ["model", "optimizer", "objective", "seed", "update"]
TERMS = ("m_H", "m_F_empirical", "m_F_exact")
BLOCK = 5  # consecutive updates that are drawn together
DRAWS = 400
FEWEST = 10  # rows, below which no correlation is reported
FEWEST_CLUSTERS = 5  # below which no interval is
LEVELS = (  # (as printed, level and columns' suffix, what is drawn together; None: correlation within an update)
    ("token, own step", "token", "", ["seed", "sequence"]),
    ("  within an update", "token", "", None),
    ("token, update's step", "token", "_in_update", ["seed", "sequence"]),
    ("sentence", "sentence", "", ["seed", "sequence"]),
    ("update", "update", "", ["seed", "block"]),
)


def hidden_states(loaded: LoadedModel, batch: ReplayBatch) -> torch.Tensor:
    """The head's input at the completion tokens, (M, d)."""
    sequences = batch.sequences
    with torch.no_grad():
        states = loaded.model.base_model(
            input_ids=sequences.input_ids, attention_mask=sequences.attention_mask, use_cache=False
        ).last_hidden_state
    return states[:, :-1][sequences.action_mask[:, 1:]]


def last_layer(hidden: torch.Tensor, weight: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> lg.LastLayer:
    """The head as its optimiser is about to move it."""
    rate = optimizer.param_groups[0]["lr"]
    if isinstance(optimizer, torch.optim.SGD):
        return lg.LastLayer(hidden, rate)
    zero = torch.zeros_like(weight)
    state = optimizer.state.get(weight) or {"exp_avg": zero, "exp_avg_sq": zero, "step": 0}
    return lg.LastLayer(hidden, rate, lg.AdamState(**state))


def measured_update(
    loaded: LoadedModel, optimizer: torch.optim.Optimizer, name: str, batch: ReplayBatch
) -> pd.DataFrame:
    """Make one update; rows of all three levels, what was predicted before it beside what it did."""
    objective, advantage = variant_objective(name)
    tokens = token_batch(batch, advantage)
    weight = loaded.model.get_output_embeddings().weight
    hidden, matrix = hidden_states(loaded, batch), weight.detach().double()
    logits = hidden.double() @ matrix.T
    predicted = lg.last_layer_curvature(objective, logits, tokens, layer=last_layer(hidden, weight, optimizer))

    one_update(loaded.model, optimizer, objective, batch, advantage=advantage)
    matrix = weight.detach().double()
    head_only = hidden.double() @ matrix.T
    after = hidden_states(loaded, batch).double() @ matrix.T
    kl, kl_head = (lg.update_kl(logits, moved, sequences=tokens.sequences) for moved in (after, head_only))
    with torch.no_grad():
        before = objective.loss(logits, tokens)
        rise, rise_head = (before - objective.loss(moved, tokens) for moved in (after, head_only))

    chosen = torch.log_softmax(logits, 1).gather(1, tokens.actions[:, None]).squeeze(1)
    each = pd.DataFrame(
        {"level": "token", "sequence": tokens.sequences.tolist()}
        | {name: getattr(predicted.token, name).tolist() for name in TERMS}
        | {f"{name}_in_update": getattr(predicted.token_in_update, name).tolist() for name in TERMS}
        | {"kl": kl.token.tolist(), "kl_head": kl_head.token.tolist()}
        | {"rise": rise.tolist(), "rise_head": rise_head.tolist()}
        | {"complement": (-chosen.expm1()).tolist()}
    )
    means = each.groupby("sequence")[["rise", "rise_head", "complement"]].mean().reset_index()
    sentences = means.assign(
        level="sentence",
        **{name: getattr(predicted.sentence, name).tolist() for name in TERMS},
        kl=kl.sequence_mean.tolist(),
        kl_head=kl_head.sequence_mean.tolist(),
    )
    whole = {name: getattr(predicted.update, name).item() for name in TERMS}
    whole |= {"kl": kl.mean.item(), "kl_head": kl_head.mean.item()}
    whole |= {"rise": rise.mean().item(), "rise_head": rise_head.mean().item()}
    whole |= {"complement": each["complement"].mean()}
    return pd.concat([each, sentences, pd.DataFrame([{"level": "update", "sequence": -1} | whole])])


def record(model: str, seeds: int | None, updates: int | None) -> pd.DataFrame:
    """Every objective under both optimisers from the same weights on the same batches."""
    setup = SETUPS[model]
    given = {name: value for name, value in (("seeds", seeds), ("updates", updates)) if value is not None}
    settings = ReplaySettings(model=model, objectives=OBJECTIVES, **(setup["replay"] | given))
    loaded = load_model(model)
    start = {name: tensor.detach().clone() for name, tensor in loaded.model.state_dict().items()}
    runs = [(s, o, k) for s in range(settings.seeds) for o in OBJECTIVES for k in ("adamw", "sgd")]
    parts, batch = [], None
    for seed, name, kind in track(runs, f"{model}, {settings.updates} updates each", console=Console(stderr=True)):
        loaded.model.load_state_dict(start)
        if batch is None or (name, kind) == (OBJECTIVES[0], "adamw"):
            batch = make_batch(loaded, settings, seed, lambda *_: None)
        parameters, rate = loaded.model.parameters(), setup[kind]
        optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters, lr=rate)
        if kind == "adamw":
            optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=rate, weight_decay=0.0)
        for update in range(settings.updates):
            rows = measured_update(loaded, optimizer, name, batch)
            parts.append(rows.assign(model=model, optimizer=kind, objective=name, seed=seed, update=update))
    return pd.concat(parts, ignore_index=True)


def weighted_ranks(codes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mid-ranks of rows that count `weights` times each; codes: dense ranks."""
    counts = np.bincount(codes, weights)
    return (np.cumsum(counts) - counts / 2)[codes]


def spearman(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float:
    """Rank correlation of rows that count `weights` times each; x, y: dense ranks."""
    a, b = weighted_ranks(x, weights), weighted_ranks(y, weights)
    a, b = a - np.average(a, weights=weights), b - np.average(b, weights=weights)
    norm = np.sqrt((weights * a * a).sum() * (weights * b * b).sum())
    return float((weights * a * b).sum() / norm) if norm > 0 else np.nan


def pooled(rows: pd.DataFrame, pairs: list[tuple[str, str]], clusters: list[str]) -> np.ndarray:
    """Correlations of all rows, then of DRAWS resamplings of whole clusters, (1 + DRAWS, pairs)."""
    cluster = rows.groupby(clusters).ngroup().to_numpy()
    draw = np.random.default_rng(0).multinomial
    size = cluster.max() + 1
    weights = [np.ones(size), *draw(size, np.full(size, 1 / size), DRAWS)]
    codes = {name: np.unique(rows[name], return_inverse=True)[1] for pair in pairs for name in pair}
    return np.array([[spearman(codes[x], codes[y], one[cluster]) for x, y in pairs] for one in weights])


def within(rows: pd.DataFrame, pairs: list[tuple[str, str]]) -> np.ndarray:
    """Means over updates of the correlation inside one, then of DRAWS resamplings of blocks, (1 + DRAWS, pairs)."""
    names = sorted({name for pair in pairs for name in pair})
    every = rows.groupby(["seed", "block", "update"])[names].corr("spearman")
    values = pd.DataFrame({i: every[y].xs(x, level=-1) for i, (x, y) in enumerate(pairs)})
    blocks = [block.to_numpy() for _, block in values.groupby(["seed", "block"])]
    drawn = np.random.default_rng(0).integers(len(blocks), size=(DRAWS, len(blocks)))
    return np.array([np.nanmean(np.concatenate([blocks[i] for i in one]), 0) for one in [range(len(blocks)), *drawn]])


def correlations(table: pd.DataFrame) -> tuple[Table, Table]:
    """Of m_F with the KLs, and of m_H with the rise of -loss."""
    divergence = Table(title="Spearman of m_F with the KL [95 %]; head: had the output matrix alone moved")
    rise = Table(title="Spearman of m_H with the rise of -loss [95 %]")
    for heading in ("model, optimiser, objective", "level"):
        divergence.add_column(heading, no_wrap=True)
        rise.add_column(heading, no_wrap=True)
    for heading in ("empirical", "exact", "exact - empirical", "1 - p", "empirical, head", "exact, head"):
        divergence.add_column(heading, justify="right", no_wrap=True)
    for heading in ("network", "head"):
        rise.add_column(heading, justify="right", no_wrap=True)
    table = table.assign(block=table["update"] // BLOCK)
    for key, run in table.groupby(KEYS[:3], sort=False):
        for label, level, suffix, clusters in LEVELS:
            rows = run[run["level"] == level]
            if len(rows) < FEWEST:
                continue
            empirical, exact, bend = f"m_F_empirical{suffix}", f"m_F_exact{suffix}", f"m_H{suffix}"
            pairs = [(empirical, "kl"), (exact, "kl"), ("complement", "kl"), (empirical, "kl_head"), (exact, "kl_head")]
            pairs += [(bend, "rise"), (bend, "rise_head")]
            found = within(rows, pairs) if clusters is None else pooled(rows, pairs, clusters)
            found = np.insert(found, 2, found[:, 1] - found[:, 0], axis=1)
            low, high = np.nanquantile(found[1:], [0.025, 0.975], axis=0)
            cells = [f"{a:.2f} [{b:.2f}, {c:.2f}]" for a, b, c in zip(found[0], low, high, strict=True)]
            if len(rows[clusters or ["seed", "block"]].drop_duplicates()) < FEWEST_CLUSTERS:
                cells = [f"{a:.2f}" for a in found[0]]
            divergence.add_row(" ".join(map(str, key)), label, *cells[:6])
            rise.add_row(" ".join(map(str, key)), label, *cells[6:])
    return divergence, rise


def scale(table: pd.DataFrame) -> Table:
    """By how much the predictions are off: medians over tokens of what happened over what was predicted."""
    printed = Table(title="Medians over tokens (quartiles)")
    for heading in ("model, optimiser, objective", "KL / KL head", "m_F exact / KL head", "m_F empirical / KL head"):
        printed.add_column(heading, no_wrap=True)
    tokens = table[(table["level"] == "token") & (table["kl_head"] > 0)]
    for key, rows in tokens.groupby(KEYS[:3], sort=False):
        ratios = [rows["kl"] / rows["kl_head"]]
        ratios += [rows[f"m_F_{kind}_in_update"] / rows["kl_head"] for kind in ("exact", "empirical")]
        cells = ("{1:.3g} ({0:.3g}, {2:.3g})".format(*one.quantile([0.25, 0.5, 0.75])) for one in ratios)
        printed.add_row(" ".join(map(str, key)), *cells)
    return printed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="tiny, smollm2; default: both")
    parser.add_argument("--seeds", type=int, help="default: 3 for tiny, 1 for smollm2")
    parser.add_argument("--updates", type=int, help="under each objective; default: 40 for tiny, 3 for smollm2")
    parser.add_argument("--out", type=Path, default=Path("analysis/capo.parquet"))
    arguments = parser.parse_args()
    if not set(arguments.models) <= set(SETUPS):
        parser.error(f"MODEL: {' '.join(arguments.models)}; only {' and '.join(SETUPS)} have settings here.")

    found = [record(model, arguments.seeds, arguments.updates) for model in arguments.models or SETUPS]
    table = pd.concat(found, ignore_index=True)
    table.to_parquet(arguments.out, index=False)
    Console(width=200).print(*correlations(table), scale(table))
    print(arguments.out)
