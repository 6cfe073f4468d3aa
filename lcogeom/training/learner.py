"""What a training run is made of: the policy, its optimiser, and what its objective asks for beside them.

Accelerate places and wraps them: one process, several with copies (DDP) or with shards (FSDP2).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor

from lcogeom.models import LoadedModel, load_model
from lcogeom.objectives import Intervention, LastLayer, Objective, TokenBatch, intervention
from lcogeom.recording.unwrap import unwrap_model
from lcogeom.training.critic import Critic
from lcogeom.training.settings import DENSE_ADVANTAGES, TrainSettings, minimised

try:
    import accelerate
    from accelerate.utils import FullyShardedDataParallelPlugin
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("training needs accelerate. Run: pip install 'lcogeom[train]'") from error

LORA_ALPHA_PER_RANK = 2


@dataclass(frozen=True, eq=False)
class Learner:
    """One run's parts, placed on their devices."""

    settings: TrainSettings
    accelerator: accelerate.Accelerator
    tokenizer: transformers.PreTrainedTokenizerBase
    policy: torch.nn.Module
    """As it is called: wrapped by DDP, sharded by FSDP2, with LoRA inside."""
    optimizer: torch.optim.Optimizer
    objective: Objective
    intervention: Intervention | None
    judges_steps: bool
    """Whether the intervention asks for the last layer and its optimiser (CAPO)."""
    needs: frozenset[str]
    """Fields of `TokenBatch` that objective and intervention read."""
    critic: Critic | torch.nn.Module | None
    critic_optimizer: torch.optim.Optimizer | None
    reference: torch.nn.Module | None
    """The starting policy, frozen; None where nothing asks for it, or where it is the policy without its adapters."""
    advantage_model: torch.nn.Module | None

    @property
    def model(self) -> Any:
        """The policy without DDP: what generates."""
        return getattr(self.policy, "module", self.policy)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @contextlib.contextmanager
    def precision(self) -> Iterator[None]:
        """Passes of a model run within it."""
        if self.settings.dtype == "float32":
            yield
        else:
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                yield

    @contextlib.contextmanager
    def reference_policy(self) -> Iterator[torch.nn.Module]:
        """The policy that training started from."""
        if self.reference is not None:
            yield self.reference
        else:
            with self.model.disable_adapter():
                yield self.model


def build_learner(settings: TrainSettings, loaded: LoadedModel | None = None) -> Learner:
    """Load, adapt and place everything a run needs. `loaded`: the model to train, in place of `settings.model`.

    Raises:
        FileNotFoundError, ValueError: a model that cannot be used, an objective that needs what a rollout lacks.
        ModuleNotFoundError: LoRA without peft.
    """
    objective = minimised(settings)
    rule = None
    if settings.intervention is not None:
        rule = intervention(settings.intervention, **settings.intervention_options)
    dense = settings.advantages in DENSE_ADVANTAGES
    two = torch.zeros(2, 4)
    needs = needed_fields(lambda batch: objective.loss(two, batch), dense=dense)
    judges_steps = False
    if rule is not None:
        try:
            read = needed_fields(lambda batch: rule(two, batch, objective=objective), dense=dense)
        except ValueError:
            layer, judges_steps = LastLayer(torch.ones(2, 3), learning_rate=1.0), True
            read = needed_fields(lambda batch: rule(two, batch, objective=objective, layer=layer), dense=dense)
        needs |= read
    if "advantages" in needs and settings.advantages == "none":
        raise ValueError(f"advantages: 'none', but objective {objective.name!r} needs some; set advantages=group.")
    accelerator = make_accelerator(settings)
    if settings.prompts % accelerator.num_processes:
        raise ValueError(f"prompts: {settings.prompts} cannot be shared by {accelerator.num_processes} processes.")
    if loaded is None:
        loaded = load_model(settings.model, device=accelerator.device)
    model: Any = loaded.model.to(accelerator.device).eval()  # without dropout: a ratio would be noise
    scorer = None
    if settings.advantage_model is not None:
        scorer = load_model(settings.advantage_model, device=accelerator.device).model.requires_grad_(False)
        if scorer.get_output_embeddings().weight.shape[0] != model.get_output_embeddings().weight.shape[0]:
            raise ValueError("advantage_model: its vocabulary is not the policy's; both must share one tokenizer.")
    wants_reference = bool(needs & {"ref_logprobs", "ref_logits"}) or settings.advantages in ("dpo-log-ratio", "adpa")
    reference = copy.deepcopy(model).requires_grad_(False) if wants_reference and not settings.lora_rank else None
    with torch.random.fork_rng(devices=[accelerator.device] if accelerator.device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        critic = Critic(model) if settings.advantages == "gae" else None
        if settings.lora_rank:
            model = with_lora(model, settings.lora_rank)
    if settings.gradient_checkpointing:
        checkpoint_blocks(model)
    policy, optimizer = _placed(accelerator, model, settings, settings.learning_rate)
    critic_optimizer = None
    if critic is not None:
        critic, critic_optimizer = _placed(accelerator, critic, settings, settings.critic_learning_rate)
    return Learner(
        settings=settings,
        accelerator=accelerator,
        tokenizer=loaded.tokenizer,
        policy=policy,
        optimizer=optimizer,
        objective=objective,
        intervention=rule,
        judges_steps=judges_steps,
        needs=needs,
        critic=critic,
        critic_optimizer=critic_optimizer,
        reference=reference,
        advantage_model=scorer,
    )


def make_accelerator(settings: TrainSettings) -> accelerate.Accelerator:
    """Accelerate's view of the processes: `accelerate launch` or torchrun starts several.

    Raises:
        ValueError: FSDP2 with one process; or this process has made an Accelerator of another precision before.
    """
    if not settings.fsdp:
        return accelerate.Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")  # settings.dtype says it
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    accelerator = accelerate.Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no", fsdp_plugin=plugin)
    if accelerator.num_processes == 1:
        raise ValueError("fsdp: there is one process to shard over; start with `accelerate launch` or torchrun.")
    return accelerator


def needed_fields(reads: Callable[[TokenBatch], object], *, dense: bool) -> frozenset[str]:
    """The fields of `TokenBatch`, beside actions, that a loss or a rule reads: it is asked, on two tokens.

    reads: called with batches of N = 2 and V = 4 until it is content.

    Raises:
        ValueError: it needs a field that a rollout has not (pairs), or refuses the advantages' kind.
    """
    flat, wide = torch.zeros(2), torch.zeros(2, 4)
    offered: dict[str, dict[str, Tensor]] = {
        "advantages": {"advantages": flat},
        **{name: {name: flat} for name in ("old_logprobs", "ref_logprobs")},
        **{name: {name: wide} for name in ("old_logits", "ref_logits")},
        "sequences": {"sequences": torch.tensor([0, 1])},
    }
    if dense:
        offered["advantages"] = {"advantages": torch.eye(2), "advantage_ids": torch.tensor([[0, 1], [1, 2]])}
    batch, found = TokenBatch(torch.tensor([0, 1])), set[str]()
    while True:
        try:
            reads(batch)
        except ValueError as error:
            name = str(error).partition(":")[0]
            if name not in offered or name in found:
                raise ValueError(
                    f"objective: it cannot be trained on rollouts with these advantages: {error}"
                ) from error
            found.add(name)
            batch = replace(batch, **offered[name])
        else:
            return frozenset(found)


def with_lora(model: transformers.PreTrainedModel, rank: int) -> Any:
    """The model with adapters on every linear layer but the head; only they are trained."""
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("lora_rank: adapters need peft. Run: pip install 'lcogeom[train]'") from error
    settings = peft.LoraConfig(r=rank, lora_alpha=LORA_ALPHA_PER_RANK * rank, target_modules="all-linear")
    return peft.get_peft_model(model, settings).eval()


def checkpoint_blocks(model: Any) -> None:
    """Recompute each block in the backward pass. Blocks alone are set to training mode: dropout stays off."""
    base: Any = unwrap_model(model)
    enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)  # the name changes
    enable({"use_reentrant": False})
    base.enable_input_require_grads()
    for module in base.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True


def _placed(
    accelerator: accelerate.Accelerator, model: torch.nn.Module, settings: TrainSettings, rate: float
) -> tuple[Any, torch.optim.Optimizer]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=settings.adam_betas, weight_decay=settings.weight_decay)
    placed, wrapped = accelerator.prepare(model, optimizer)
    return placed, wrapped.optimizer  # Accelerate's own step() only adds what fp16 and XLA need
