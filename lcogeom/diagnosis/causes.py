"""The closed list of causes: what each is, what to try, and what it may bring about."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cause:
    """One way in which a run goes wrong."""

    id: str
    title: str
    what: str
    """What is wrong, in a sentence."""
    remedy: str
    brings: tuple[str, ...] = ()
    """Ids of what may follow: in the same update, if they come later in CAUSES, or in later ones."""


_POLICY = ("entropy-collapse", "logit-drift", "clip-saturation", "no-signal")
_BROKEN = (
    "step-too-large",
    "optimizer-lag",
    "layer-amplification",
    "negative-rare-token",
    "ratio-blow-up",
    "dominant-sequence",
    "non-finite",
    *_POLICY,
)
"""What a policy thrown out of its region may show."""

CAUSES: dict[str, Cause] = {
    cause.id: cause
    for cause in (
        Cause(
            "unmasked-tokens",
            "Prompt or padding tokens receive gradient",
            "Tokens that the policy did not choose, of the prompt or of the padding, are part of the loss.",
            "Check the mask: entry t must be true exactly where input_ids[:, t] was sampled, up to and with the first "
            "end of sequence; multiply per-token losses by it before they are summed, and divide by its sum.",
            ("behaviour-mismatch", "loss-scale-jump", *_BROKEN),
        ),
        Cause(
            "behaviour-mismatch",
            "Old log-probabilities do not belong to the policy that sampled",
            "On a new rollout, before any update was made on it, ratios are not 1: the sampler and the trainer "
            "disagree (temperature, precision, weights that were not synchronised, tokens out of line).",
            "Recompute old log-probabilities in the trainer, with the sampler's temperature and its weights; where the "
            "sampler must differ (another engine or precision), correct with truncated importance weights.",
            ("ratio-blow-up", "clip-saturation", *_BROKEN),
        ),
        Cause(
            "advantage-outlier",
            "One advantage is far outside all others",
            "A reward or its normalisation gave one sequence or token an advantage far above the rest, and the "
            "update follows it alone.",
            "Look at that reward; normalise advantages within the group or batch, and clip them (at 5 standard "
            "deviations, say); mind groups whose rewards hardly differ, where dividing by their deviation explodes.",
            ("dominant-sequence", *_BROKEN),
        ),
        Cause(
            "no-signal",
            "All advantages are zero",
            "No sequence is better than another, so the update teaches nothing (what moves the weights then is "
            "momentum, weight decay or a penalty).",
            "Sample harder or easier problems, or more completions for each; check that the reward can be reached and "
            "is not constant; leave out groups without differences (as DAPO does).",
            ("optimizer-lag",),
        ),
        Cause(
            "loss-scale-jump",
            "The loss was multiplied by another factor",
            "The normaliser of the loss changed: every token's gradient grew or shrank by one factor, and nothing "
            "about their directions did.",
            "Find what the loss is divided by (tokens of the micro-batch or of the update, accumulation steps, the "
            "number of processes) and keep it the same at every update.",
            _BROKEN,
        ),
        Cause(
            "clip-saturation",
            "Most tokens are clipped and give no gradient",
            "The ratio of most tokens is beyond the clip bound on the side where the objective is flat: the update "
            "is made of what is left.",
            "Fewer inner epochs or smaller steps on each rollout; check that old log-probabilities are the sampler's; "
            "widen the bounds only if the ratios are honest.",
            ("ratio-blow-up", "no-signal", "dominant-sequence", "optimizer-lag"),
        ),
        Cause(
            "ratio-blow-up",
            "Probability ratios left the trust region",
            "At some tokens the policy is many times as likely as it was when they were sampled, and the objective "
            "multiplies their gradient by that ratio; with a negative advantage no clip holds it.",
            "Fewer inner epochs or a lower learning rate; clip the ratio on the negative side too (dual_clip=3), or "
            "use an objective without it (CISPO's truncated weights, LCO).",
            _BROKEN,
        ),
        Cause(
            "negative-rare-token",
            "Unlikely tokens with negative advantage drive the update",
            "Pushing an already unlikely token down has no minimum: its gradient does not vanish, and the mass it "
            "loses goes to whatever was likely. The loss is not convex in the logits there.",
            "Mask or damp tokens with negative advantage and low probability (CAPO, lower bound on the probability), "
            "or use an objective that is convex there (LCO).",
            _BROKEN,
        ),
        Cause(
            "dominant-sequence",
            "One sequence makes most of the gradient",
            "A single sequence outweighs all others of its batch, beyond what its advantage says.",
            "Look at its length and weight: average over tokens of the batch rather than within each sequence (or the "
            "reverse, for one very long sequence), remove duplicates, and clip gradients.",
            _BROKEN,
        ),
        Cause(
            "layer-amplification",
            "One layer multiplies the gradient",
            "The gradient at the logits is as before, but it grows on its way back through the model at one layer.",
            "Look at that layer: its weights, its normalisation's scale, its learning rate; clip its gradient on its "
            "own, or go back to a checkpoint from before.",
            _BROKEN,
        ),
        Cause(
            "precision-loss",
            "Steps are lost in the weights' rounding",
            "Most weights do not change, because the step is smaller than the spacing of their number format.",
            "Keep float32 master weights (train in mixed precision), or round stochastically; a larger learning rate "
            "hides it only.",
            ("optimizer-lag",),
        ),
        Cause(
            "optimizer-lag",
            "The step is out of proportion to the gradient",
            "The optimiser's state does not fit the gradient any more: second moments that are stale, were lost or "
            "divide by a tiny epsilon, or momentum that goes on without a gradient.",
            "Restore the optimiser's state with the weights, or warm the learning rate up after a restart; raise "
            "Adam's epsilon; lower beta2, so that second moments follow the gradient.",
            _BROKEN,
        ),
        Cause(
            "step-too-large",
            "The step is too large",
            "The weights moved so far in one update that the gradient said nothing about where they arrived.",
            "Lower the learning rate or warm it up, and clip the gradient's norm; go back to the checkpoint before.",
            ("behaviour-mismatch", *_BROKEN),
        ),
        Cause(
            "entropy-collapse",
            "The policy became deterministic",
            "Entropy fell to almost nothing: samples are all alike, and there is nothing left to compare.",
            "Raise the clip bound for positive advantages, add an entropy bonus or a KL penalty to a reference, "
            "lower the learning rate; sample at a higher temperature.",
            ("no-signal", "negative-rare-token", "clip-saturation", "optimizer-lag"),
        ),
        Cause(
            "logit-drift",
            "Logits drift away in a direction that probabilities do not see",
            "The softmax's normaliser moves steadily: logits grow or shift together, until their format has no "
            "digits left for differences.",
            "Add a small z-loss (1e-4 times the squared log normaliser), weight decay on the head, or fix a bias that "
            "pushes all logits alike.",
            ("entropy-collapse", "non-finite", "precision-loss"),
        ),
        Cause(
            "non-finite",
            "A number is not finite",
            "A NaN or an infinity entered the update.",
            "Look at the tensor named, and at lcogeom.replay_batch for the update itself; guard the logarithm, "
            "division or exponential that made it, and skip steps whose gradient is not finite.",
            ("no-signal", "precision-loss"),
        ),
    )
}
"""Every cause that a finding may have, by id. Their order is that of an update: the data, the weights of its tokens,
the backward pass, the optimiser's step, the policy after it. Within one update, what comes earlier is the cause."""
