"""A ViT-B in training, with bottlenecks by each path and without any."""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from device import Device


def training_steps(device: Device) -> Iterator[dict[str, Any]]:
    """Training steps of a ViT-B in bfloat16 with 0, 12 and 24 bottlenecks: samples a second, memory."""
    from transformers import ViTConfig, ViTModel

    import mmadapt as mm

    torch, dry = device.torch, device.dry
    small: dict[str, Any] = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
                      intermediate_size=128, image_size=32, patch_size=16)  # fmt: skip
    batch = 2 if dry else 256
    for sites in ((), ("mlp",), ("attn", "mlp")):
        paths = (None, *(p for p in device.paths if p.cluster in (0, 4)))
        for path in paths if sites else (None,):
            model: Any = ViTModel(ViTConfig(**small if dry else {}), add_pooling_layer=False)
            model.to(device.name, torch.bfloat16).requires_grad_(False)
            size = model.config.image_size
            pixels = torch.randn(batch, 3, size, size, device=device.name).bfloat16()
            pixels.requires_grad_(not sites)  # without an adapter, gradients still go down
            if sites:
                at = [f"vision.layers[*].{site}:out" for site in sites]
                adapter = mm.Bottleneck(8 if dry else 64, activation="gelu")
                mm.attach(model, adapter, at=at)

            def run(model: Any = model, pixels: Any = pixels) -> None:
                model(pixels).last_hidden_state.float().mean().backward()

            with device.on(path):
                if not dry:
                    torch.cuda.reset_peak_memory_stats()
                taken = device.microseconds(run, 1500)
            yield {
                "bottlenecks": len(sites) * model.config.num_hidden_layers,
                "path": path.name if path else "reference",
                "images_a_second": batch / (1e-6 * taken),
                "peak_gb": 0.0 if dry else torch.cuda.max_memory_allocated() / 1e9,
            }
            del model
