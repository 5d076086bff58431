"""What the scripts that make fixtures share: sizes of small backbones, and how files are kept."""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SIZE = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
IMAGE = {"image_size": 16, "patch_size": 8}
TEXT = {
    "vocab_size": 24, "max_position_embeddings": 6, "bos_token_id": 21, "eos_token_id": 22,
    "pad_token_id": 23,
}  # fmt: skip
WHISPER = {
    "vocab_size": 24, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "num_mel_bins": 4, "max_source_positions": 8, "max_target_positions": 8,
    "pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1,
}  # fmt: skip
AST = {
    "max_length": 24, "num_mel_bins": 16, "patch_size": 8, "frequency_stride": 8, "time_stride": 8,
}  # fmt: skip
TIMM = {
    "model_name": "vit_tiny_patch16_224", "img_size": 16, "patch_size": 8, "embed_dim": 16,
    "depth": 2, "num_heads": 2, "num_classes": 3,
}  # fmt: skip


def off_their_starts(model: Any) -> Any:
    """The model in eval mode with random weights that are large enough to show errors."""
    import torch

    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            parameter.data.add_(0.05 * torch.randn(parameter.shape))
    return model.eval()


def zipped(save: Callable[[str], Any], target: Path) -> None:
    """What `save` writes to a folder, as a zip without dates."""
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(Path(folder).iterdir()):
                content = file.read_bytes()
                archive.writestr(zipfile.ZipInfo(file.name), content, zipfile.ZIP_DEFLATED)


def keep(kept: dict[str, Any], name: str, versions: str, folder: Path) -> None:
    """Write tensors beside this file, and print what was made."""
    from safetensors.torch import save_file

    path = HERE / f"{name}.safetensors"
    save_file({k: v.contiguous().clone() for k, v in kept.items()}, path, {"made with": versions})
    print(path.name, path.stat().st_size, versions)
    print(json.dumps({f.name: f.stat().st_size for f in sorted(folder.iterdir())}, indent=1))
