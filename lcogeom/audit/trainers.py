"""What TRL and verl write to disk by themselves, and the lines that make them write log-probabilities.

Confirmed in the source of the released packages:

- TRL 1.16, `log_completions=True`: trainer/grpo_trainer.py (`log`) and trainer/distillation_trainer.py write
  `<output_dir>/completions/completions_<step>.parquet`, one row per completion: step, prompt, completion, and in GRPO
  also one column per reward function, the columns a reward function adds by `log_extra`, and advantage. RLOO, and GRPO
  before the file existed (0.20, 0.24), hand the same table to wandb only. No log-probabilities in any of them.
  In memory (`_compute_loss`): old_per_token_logps (only where it differs from the current policy's),
  sampling_per_token_logps (vLLM), ref_per_token_logps (beta > 0), completion_ids, completion_mask, tool_mask: (B, T);
  advantages: (B,).
- verl, `trainer.rollout_data_dir`: trainer/ppo/ray_trainer.py and, in 0.9.1, v1/trainer_base.py (`_write_generations`)
  write `<dir>/<step>.jsonl`, one object per completion: input, output, score, step (0.4.1, 0.5.0), gts (0.6.1, 0.9.1),
  and what the reward function returned beside its score; request_id or uid in 0.9.1. No log-probabilities, no
  advantages. In memory: old_log_probs, rollout_log_probs, ref_log_prob, advantages, response_mask, responses: (B, T).
  The current policy's log-probabilities (`log_probs`) never leave the worker.
"""

from __future__ import annotations

from collections.abc import Collection

TRL_RECIPE = """\
# TRL (run with 1.16): a trainer that appends every completion's tokens to tokens-<rank>.jsonl.
import json, torch
from trl import GRPOTrainer

class LoggingGRPOTrainer(GRPOTrainer):
    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._latest_logps = found[0].detach()
        return found

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        if model.training:
            mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
            columns = {
                "per_token_logps": self._latest_logps,
                "old_per_token_logps": inputs.get("old_per_token_logps", self._latest_logps),
                "advantages": inputs["advantages"],
                "completion_mask": mask,
                "completion_ids": inputs["completion_ids"],
            }
            if "ref_per_token_logps" in inputs:
                columns["ref_per_token_logps"] = inputs["ref_per_token_logps"]
            with open(f"tokens-{self.accelerator.process_index}.jsonl", "a") as file:
                for row in zip(*(column.tolist() for column in columns.values())):
                    file.write(json.dumps({"step": self.state.global_step, **dict(zip(columns, row))}) + "\\n")
        return loss

# then: lcogeom audit tokens-0.jsonl --clip-low EPSILON --clip-high EPSILON_HIGH
"""

VERL_RECIPE = """\
# verl (from the source of 0.9.1; not run here): a trainer that writes <rollout_data_dir>/<step>.tokens.jsonl.
import json, os
import transfer_queue as tq
from verl.trainer.ppo.v1 import PPOTrainerSync, register_trainer

@register_trainer("sync_logging")  # and trainer.v1.trainer_mode=sync_logging
class LoggingTrainer(PPOTrainerSync):
    def _log_rollout_data(self, batch, timing_raw, rollout_data_dir):
        super()._log_rollout_data(batch, timing_raw, rollout_data_dir)
        names = ["old_log_probs", "rollout_log_probs", "advantages", "response_mask", "responses"]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)
        with open(os.path.join(rollout_data_dir, f"{self.global_steps}.tokens.jsonl"), "w") as file:
            for i in range(len(batch.keys)):
                file.write(json.dumps({name: data[name][i].tolist() for name in names if name in data.keys()}) + "\\n")

# With trainer.use_v1=False, a subclass of RayPPOTrainer adds the columns to the file that verl writes:
class LoggingRayTrainer(RayPPOTrainer):
    def _log_rollout_data(self, batch, reward_extra_infos_dict, *rest):
        names = ["old_log_probs", "rollout_log_probs", "advantages", "response_mask", "responses"]
        columns = {name: batch.batch[name].tolist() for name in names if name in batch.batch}
        super()._log_rollout_data(batch, {**reward_extra_infos_dict, **columns}, *rest)

# verl's driver never sees the log-probs of the policy inside the update. old_log_probs are those at its start:
#   lcogeom audit 10.tokens.jsonl --logprobs old_log_probs --old-logprobs rollout_log_probs   (ratio to the sampler)
#   lcogeom audit 10.tokens.jsonl --logprobs old_log_probs --old-logprobs old_log_probs       (ratio 1)
"""

RECIPES = {"trl": TRL_RECIPE, "verl": VERL_RECIPE}


def recognise(columns: Collection[str]) -> str | None:
    """What a file without log-probabilities is, where its columns say so: a sentence with its remedy. Else None."""
    names = set(columns)
    if {"step", "prompt", "completion"} <= names:
        return (
            "This is a table of TRL's log_completions: prompts, completions, rewards and advantages as text and one "
            "number per completion. TRL has no option that writes log-probabilities; `lcogeom audit --how-to-log trl` "
            "prints the lines that do (a GRPOTrainer whose _compute_loss writes per_token_logps)."
        )
    if {"input", "output", "score", "step"} <= names:
        return (
            "This is a dump of verl's trainer.rollout_data_dir (or validation_data_dir): texts and one score per "
            "completion. verl has no option that writes log-probabilities or advantages; `lcogeom audit --how-to-log "
            "verl` prints the lines that do (a trainer whose _log_rollout_data writes old_log_probs and advantages)."
        )
    return None
