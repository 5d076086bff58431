"""Write the golden adapter of the present schema; run once for each new schema, never again for one.

python tests/golden/make.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> None:
    import torch
    from backbones import BACKBONES
    from safetensors.torch import save_file
    from snapshot import randomise

    import mmadapt as mm
    from mmadapt.core.store import SCHEMA

    folder = Path(__file__).resolve().parent / f"schema-{SCHEMA}"
    if folder.exists():
        sys.exit(f"{folder.name} is there already; files of a published schema do not change")
    tiny = BACKBONES["open_clip"]
    model = tiny.fresh()
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):  # no library's random start
            values = torch.arange(parameter.numel(), dtype=torch.float32)
            parameter.copy_(((values * 0.37 + index).sin() * 0.1).view(parameter.shape))
    several = [
        mm.Bottleneck(2),
        mm.LoRA(2),
        mm.Compacter(4, division=2),
        mm.BiAdaptFormer(2, bits=3),
        mm.Invertible(),
    ]
    randomise(mm.attach(model, several, name="golden"))
    mm.save(model, folder, licence="Apache-2.0", metrics={"accuracy": 0.5})
    with torch.no_grad():
        outputs = tiny.outputs(model)
    save_file(
        {f"output {i}": value for i, value in enumerate(outputs)}, folder / "outputs.safetensors"
    )


if __name__ == "__main__":
    main()
