"""What PEFT's adaption prompts compute, for `test_peers.py`; run in an environment of its own.

    pip install torch==2.11.0 transformers==5.23.0 peft==0.21.2
    python tests/peers/make_peft_prompt.py

Random tiny Llama with as many key heads as query heads, and with grouped queries; random prompts and
open gates in the top two of three layers. Logits of the whole texts, of texts padded left and right,
and token by token with a cache; in float32 and float64.
"""

from __future__ import annotations

from pathlib import Path

import peft
import torch
import transformers
from peft import AdaptionPromptConfig, TaskType, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG = {
    "vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def inputs(padding: str) -> dict[str, Tensor]:
    ids = torch.randint(3, 24, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[0, :3] = 0
    if padding == "right":
        mask[0, -3:] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def step_by_step(model: torch.nn.Module, batch: dict[str, Tensor], first: int) -> Tensor:
    """Logits (B, T, V) of `first` tokens at once and the others one by one, with a cache."""
    cache, found = None, []
    length = batch["input_ids"].shape[1]
    for start, stop in [(0, first), *((t, t + 1) for t in range(first, length))]:
        output = model(
            input_ids=batch["input_ids"][:, start:stop],
            attention_mask=batch["attention_mask"][:, :stop],
            position_ids=batch["position_ids"][:, start:stop],
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        found.append(output.logits)
    return torch.cat(found, dim=1)


def main() -> None:
    kept: dict[str, Tensor] = {}
    for key_heads in (4, 2):
        torch.manual_seed(key_heads)
        backbone = LlamaForCausalLM(LlamaConfig(**CONFIG, num_key_value_heads=key_heads)).eval()
        for parameter in backbone.parameters():
            if parameter.ndim > 1:  # the library's 0.02 would hide errors
                torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        kept |= {f"{key_heads} backbone.{k}": v.clone() for k, v in backbone.state_dict().items()}
        config = AdaptionPromptConfig(task_type=TaskType.CAUSAL_LM, adapter_len=5, adapter_layers=2)
        model = get_peft_model(backbone, config).eval()
        for name, parameter in model.named_parameters():
            if "adaption_" in name:
                torch.nn.init.normal_(parameter)
                role = name.removeprefix("base_model.model.model.").replace(".self_attn.", ".")
                kept[f"{key_heads} prompt.{role}"] = parameter.detach().clone()
        for dtype in (torch.float32, torch.float64):
            model = model.to(dtype)
            with torch.no_grad():
                found = {
                    padding: model(**inputs(padding), use_cache=False).logits
                    for padding in ("none", "left", "right")
                }
                found["cache"] = step_by_step(model, inputs("left"), 4)
            bits = "64" if dtype is torch.float64 else "32"
            kept |= {f"{key_heads} {bits} {k}": v.clone() for k, v in found.items()}
    versions = (
        f"peft {peft.__version__}, transformers {transformers.__version__}, {torch.__version__}"
    )
    path = Path(__file__).resolve().parent / "peft_prompt.safetensors"
    save_file({k: v.contiguous() for k, v in kept.items()}, path, {"made with": versions})
    print(path.name, path.stat().st_size, versions)


if __name__ == "__main__":
    main()
