"""Q-RM's loss and its convexity, and reward models trained for seconds on the tiny model's own mistakes."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

import lcogeom as lg
from lcogeom.models import LoadedModel, load_model
from lcogeom.training import Problem, Task, dense, load_task
from lcogeom.training import preferences as pref
from lcogeom.training.replay import completion_logits
from lcogeom.training.rollout import generate, pad_id, side_by_side

VOCAB = 6


def random_batch(seed: int) -> tuple[Tensor, lg.TokenBatch]:
    """Two pairs, answers of 1 to 3 tokens, in shuffled order."""
    source = torch.Generator().manual_seed(seed)
    rows = [
        (pair, chosen) for pair in (3, 8) for chosen in (True, False) for _ in range(1 + (seed + pair + chosen) % 3)
    ]
    rows = [rows[place] for place in torch.randperm(len(rows), generator=source)]
    pairs, chosen = torch.tensor([pair for pair, _ in rows]), torch.tensor([flag for _, flag in rows])
    actions = torch.randint(0, VOCAB, (len(rows),), generator=source)
    z = 3 * torch.randn(len(rows), VOCAB, generator=source, dtype=torch.float64)
    ref = -torch.rand(len(rows), generator=source, dtype=torch.float64)
    return z, lg.TokenBatch(actions, ref_logprobs=ref, pairs=pairs, chosen=chosen)


def q_rm_loop(z: Tensor, batch: lg.TokenBatch, beta: float, gamma: float, cross_entropy: float) -> float:
    losses, chosen_nll = [], []
    for pair in sorted(set(batch.pairs.tolist())):
        means = {}
        for flag in (True, False):
            places = [t for t in range(len(z)) if batch.pairs[t] == pair and bool(batch.chosen[t]) == flag]
            means[flag] = sum(float(z[t, batch.actions[t]]) for t in places) / len(places)
            if flag:
                sums = [math.log(sum(math.exp(x) for x in z[t].tolist())) for t in places]
                chosen_nll += [s - float(z[t, batch.actions[t]]) for s, t in zip(sums, places, strict=True)]
        losses.append(math.log1p(math.exp(-(beta * (means[True] - means[False]) - gamma))))
    return sum(losses) / len(losses) + cross_entropy * sum(chosen_nll) / len(chosen_nll)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("cross_entropy", [0.0, 1.0])
def test_the_loss(seed: int, cross_entropy: float) -> None:
    z, batch = random_batch(seed)
    for beta, gamma in ((0.2, 2.0), (3.0, -1.0)):
        found = pref.q_rm_loss(z, batch, beta=beta, gamma=gamma, cross_entropy=cross_entropy)
        wanted = q_rm_loop(z, batch, beta, gamma, cross_entropy)
        np.testing.assert_allclose(float(found), wanted, rtol=1e-9)  # torch's softplus(x) is x from x = 20 on


def lowest_eigenvalue(loss, z: Tensor) -> float:  # type: ignore[no-untyped-def]
    """Of the Hessian over the logits of ALL tokens at once, by double backward in float64."""
    hessian = torch.autograd.functional.hessian(lambda flat: loss(flat.reshape(z.shape)), z.flatten())
    return float(torch.linalg.eigvalsh(hessian)[0])


@pytest.mark.parametrize("seed", range(8))
def test_q_rm_is_convex_in_the_logits_and_dpo_is_not(seed: int) -> None:
    """systems.md 14. The cross entropy leaves it convex; on log-probabilities, as DPO and SimPO, it is not."""
    z, batch = random_batch(seed)
    for cross_entropy in (0.0, 1.0):
        assert (
            lowest_eigenvalue(lambda x, c=cross_entropy: pref.q_rm_loss(x, batch, beta=1, cross_entropy=c), z) > -1e-13
        )
    for name, options in (("dpo", {"beta": 1.0}), ("simpo", {})):
        assert lowest_eigenvalue(lambda x, n=name, o=options: lg.objective(n, **o).loss(x, batch).sum(), z) < -1e-3


def wrong_answers(tiny: LoadedModel, problems: list[Problem], seed: int) -> list[pref.Pair]:
    """Right sums against the model's own wrong ones."""
    samples = generate(tiny.model, tiny.tokenizer, problems, max_new_tokens=5, seed=seed, stop="\n")
    return [pref.Pair(s.problem.prompt, s.problem.solution, s.completion + "\n") for s in samples if s.reward == 0]


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_model("tiny", device="cpu")


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task("addition-2")


@pytest.fixture(scope="module")
def pairs(tiny: LoadedModel, task: Task) -> tuple[list[pref.Pair], list[pref.Pair]]:
    """(to train on, held out)."""
    train = wrong_answers(tiny, task.draw(2500, 0), 0)
    held_out = wrong_answers(tiny, list(task.held_out) * 4, 1)
    assert not {pair.prompt for pair in train} & {pair.prompt for pair in held_out}
    assert len(train) > 700
    return train, held_out


def trained(tiny: LoadedModel, pairs: list[pref.Pair], loss: str) -> transformers.PreTrainedModel:
    """40 updates of 64 pairs: about 3 s. The cross entropy keeps what the model knows about the other ids."""
    model = copy.deepcopy(tiny.model)
    reference = tiny.model if loss == "dpo" else None
    losses = pref.train_reward_model(
        model, tiny.tokenizer, pairs, loss=loss, reference=reference, updates=40, learning_rate=1e-4,
        pairs_per_update=64, cross_entropy=1.0,
    )  # fmt: skip
    assert np.mean(losses[-8:]) < np.mean(losses[:8])
    return model


@pytest.fixture(scope="module")
def verifier(tiny: LoadedModel, pairs: tuple[list[pref.Pair], list[pref.Pair]]) -> transformers.PreTrainedModel:
    return trained(tiny, pairs[0], "qrm")


def accuracy(
    tiny: LoadedModel, model: transformers.PreTrainedModel, pairs: list[pref.Pair], loss: str
) -> pref.PairAccuracy:
    reference = tiny.model if loss == "dpo" else None
    return pref.pair_accuracy(pref.pair_margins(model, tiny.tokenizer, pairs, loss=loss, reference=reference))


def test_a_verifier_learns(tiny: LoadedModel, pairs: tuple, verifier: transformers.PreTrainedModel) -> None:
    """On problems it was not trained on; the model before training prefers the right sum often, but not so often."""
    _, held_out = pairs
    before, after = accuracy(tiny, tiny.model, held_out, "qrm"), accuracy(tiny, verifier, held_out, "qrm")
    assert after.low > before.high > before.low > 0.5
    assert after.pairs == len(held_out)


def test_a_dpo_model_learns(tiny: LoadedModel, pairs: tuple) -> None:
    """Against its reference, which is the model itself: chance before training, by construction."""
    train, held_out = pairs
    before, after = (
        accuracy(tiny, tiny.model, held_out, "dpo"),
        accuracy(tiny, trained(tiny, train, "dpo"), held_out, "dpo"),
    )
    assert before.share == 0.5
    assert after.low > 0.5


def right_sums(tiny: LoadedModel, model: transformers.PreTrainedModel, problems: tuple[Problem, ...]) -> Tensor:
    """The probability of the right answer to each problem."""
    batch = pref.pair_tokens(tiny.tokenizer, [pref.Pair(p.prompt, p.solution, "0\n") for p in problems], model.device)
    rows = batch.sequences.action_mask.nonzero()[:, 0]
    return torch.zeros(2 * len(problems)).index_add(0, rows, pref.sampled_logprobs(model, batch))[0::2].exp()


def lco_with_dense_advantages(tiny: LoadedModel, verifier: transformers.PreTrainedModel, task: Task) -> Tensor:
    """How much more probable the held-out right answers are after 15 rollouts, two updates each: (P,)."""
    policy = copy.deepcopy(tiny.model)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4, weight_decay=0.0)
    objective = lg.objective("lco-kld", beta=0.5, outside="drop")
    for update in range(15):
        samples = generate(policy, tiny.tokenizer, task.draw(64, update), max_new_tokens=5, seed=update, stop="\n")
        sequences = side_by_side(samples, pad_id(tiny.tokenizer), policy.device)
        with torch.no_grad():
            old = completion_logits(policy, sequences)
            advantages, ids = dense.q_rm(completion_logits(verifier, sequences), old)
        actions = sequences.input_ids[sequences.action_mask]
        batch = lg.TokenBatch(actions, advantages, old_logits=old, advantage_ids=ids)
        for _ in range(2):
            loss = objective.loss(completion_logits(policy, sequences), batch).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return right_sums(tiny, policy, task.held_out) - right_sums(tiny, tiny.model, task.held_out)


def interval(changes: Tensor) -> tuple[float, float]:
    """The mean's 95 % interval over problems."""
    half = 1.96 * float(changes.std()) / len(changes) ** 0.5
    return float(changes.mean()) - half, float(changes.mean()) + half


def test_its_dense_advantages_raise_right_answers(
    tiny: LoadedModel, pairs: tuple, verifier: transformers.PreTrainedModel, task: Task
) -> None:
    """On problems of neither training, and by more than the untrained model as its own verifier, which sharpens too.

    A verifier taught the pairs the wrong way round lowers them.
    """
    gain = lco_with_dense_advantages(tiny, verifier, task)
    sharpened = lco_with_dense_advantages(tiny, tiny.model, task)
    swapped = [pref.Pair(pair.prompt, pair.rejected, pair.chosen) for pair in pairs[0]]
    loss = lco_with_dense_advantages(tiny, trained(tiny, swapped, "qrm"), task)
    assert interval(gain)[0] > 0
    assert interval(gain - sharpened)[0] > 0
    assert interval(loss)[1] < 0


def test_pairs_as_tokens(tiny: LoadedModel) -> None:
    made = pref.pair_tokens(
        tiny.tokenizer, [pref.Pair("1+2=", "3\n", "12"), pref.Pair("10+2=", "21\n", "4\n")], torch.device("cpu")
    )
    spoken = [tiny.tokenizer.decode(row[mask]) for row, mask in zip(*_fields(made), strict=True)]
    assert spoken == ["3\n", "12\n", "21\n", "4\n"]  # with the token that ends a text behind the one that lacked it
    assert made.tokens.pairs.tolist() == [0] * 5 + [1] * 5
    assert made.tokens.chosen.tolist() == [True] * 2 + [False] * 3 + [True] * 3 + [False] * 2


def _fields(made: pref.PairTokens) -> tuple[Tensor, Tensor]:
    return made.sequences.input_ids, made.sequences.action_mask


@pytest.mark.parametrize("loss", pref.LOSSES)
def test_margins_do_not_depend_on_what_stands_beside_a_pair(tiny: LoadedModel, loss: str) -> None:
    """Against one pair at a time, unpadded, worked out from the model's own logits."""
    pairs = [pref.Pair("1+2=", "3\n", "12\n"), pref.Pair("12+34=", "64\n", "123\n"), pref.Pair("5+5=", "01\n", "1\n")]
    other = copy.deepcopy(tiny.model)
    with torch.no_grad():
        other.lm_head.weight.mul_(0.5)
    wanted = []
    for pair in pairs:
        sums = []
        for answer in (pair.chosen, pair.rejected):
            ids = tiny.tokenizer(pair.prompt + answer, return_tensors="pt").input_ids
            start = len(tiny.tokenizer(pair.prompt).input_ids)
            with torch.no_grad():
                z, z_ref = (m(input_ids=ids).logits[0, start - 1 : -1].double() for m in (other, tiny.model))
            places = torch.arange(len(z)), ids[0, start:]
            if loss == "qrm":
                sums.append(z[places].mean())
            elif loss == "simpo":
                sums.append(z.log_softmax(1)[places].mean())
            else:
                sums.append((z.log_softmax(1) - z_ref.log_softmax(1))[places].sum())
        wanted.append(float(sums[0] - sums[1]))
    for at_once in (1, 2, 64):
        found = pref.pair_margins(other, tiny.tokenizer, pairs, loss=loss, reference=tiny.model, pairs_at_once=at_once)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_accuracy_and_its_interval() -> None:
    """Wilson's interval as the roots of (share - p)^2 = z^2 p (1 - p) / n."""
    found = pref.pair_accuracy(torch.tensor([1.0] * 7 + [-1.0] * 2 + [0.0] * 2))
    assert found.share == pytest.approx(8 / 11)
    for p in (found.low, found.high):
        assert (found.share - p) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / 11, rel=1e-5)
    assert found.low < found.share < found.high
    assert pref.pair_accuracy(torch.ones(10)).high == pytest.approx(1)


def test_training_is_its_seed(tiny: LoadedModel) -> None:
    pairs = [pref.Pair(f"{n}+1=", f"{n + 1}\n", f"{n}\n") for n in range(1, 8)]
    ends = []
    for seed in (0, 0, 1):
        model = copy.deepcopy(tiny.model)
        before = torch.random.get_rng_state()
        options = {"updates": 3, "learning_rate": 1e-3, "pairs_per_update": 3, "seed": seed}
        pref.train_reward_model(model, tiny.tokenizer, pairs, **options)
        assert torch.equal(torch.random.get_rng_state(), before)
        ends.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss": "orpo"}, "loss: 'orpo'"),
        ({"loss": "dpo"}, "reference: DPO needs"),
        ({"updates": 0}, "updates: 0"),
        ({"cross_entropy": -1.0}, "cross_entropy: -1.0"),
        ({"beta": -1.0}, "beta: -1.0"),
        ({"pairs": []}, "pairs: none"),
    ],
)
def test_bad_input(options: dict, said: str, tiny: LoadedModel) -> None:
    pairs = options.pop("pairs", [pref.Pair("1+1=", "2\n", "3\n")])
    with pytest.raises(ValueError, match=said):
        pref.train_reward_model(tiny.model, tiny.tokenizer, pairs, **{"updates": 1, "learning_rate": 1e-4, **options})
