"""The installed wheel does the main things, away from the checkout."""

from pathlib import Path

import torch

import mmadapt as mm

assert "site-packages" in str(Path(mm.__file__)), mm.__file__
clip = mm.load("tiny/clip")
pixels = torch.rand(2, 3, 32, 32)
with torch.no_grad():
    before = clip.model.encode_image(pixels)
attachment = mm.attach(clip, mm.Bottleneck(8), name="try")
with torch.no_grad():
    assert torch.allclose(clip.model.encode_image(pixels), before, atol=1e-5)
mm.save(clip, "try-adapter")
mm.load_adapter(mm.load("tiny/clip"), "./try-adapter")
mm.detach(clip)
from mmadapt.kernels.cuda import compiler  # noqa: E402

assert "bottleneck_forward" in compiler.source()

print("wheel: loaded tiny/clip, attached, saved and loaded an adapter from", mm.__version__)
