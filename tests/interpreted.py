"""The kernels in Triton's interpreter against float64; `test_kernels.py` runs it in a process of its own.

python tests/interpreted.py quick|slow      # one line of JSON: errors of every case, and facts
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """x (rows, channels_in) → (rows, channels); scale "number", "trained" or "channel"."""

    rows: int
    channels_in: int
    width: int
    dtype: str = "f32"
    activation: str = "gelu"
    norm: bool = True
    scale: str = "trained"
    bias: bool = True
    #: outputs, where they are not as many as inputs; the residual is another tensor then
    channels: int = 0
    #: of a mixed batch, whose rows have `length` tokens
    adapters: int = 0
    length: int = 1
    #: mean of x, in its deviations, and a channel of huge values
    offset: float = 0.0

    @property
    def key(self) -> str:
        parts = [f"{self.rows}x{self.channels_in}-{self.channels or self.channels_in}r{self.width}"]
        parts += [self.dtype, self.activation, "norm" if self.norm else "bare", self.scale]
        parts += ["" if self.bias else "no-bias", f"of{self.adapters}" if self.adapters else ""]
        parts += [f"length{self.length}" if self.length > 1 else "", f"mean{self.offset:g}"]
        return " ".join(part for part in parts if part and part != "mean0")


QUICK = (
    Case(33, 96, 8, activation="relu", norm=False, scale="number", bias=False),
    Case(70, 96, 8, "bf16"),
    Case(37, 40, 20, activation="silu", scale="channel", channels=72),
    Case(17, 72, 20, "f16", "quick_gelu", channels=40),
    Case(1, 72, 130 - 2, "bf16", "tanh", scale="channel"),
    Case(19, 64, 5, "bf16", "gelu_new", norm=False, scale="number"),
    Case(19, 64, 5, activation="identity", offset=30.0),
    Case(40, 48, 10, adapters=3, activation="relu"),
    Case(
        36, 48, 10, "bf16", "silu", norm=False, scale="channel", channels=56, adapters=4, length=9
    ),
)
SLOW = (
    *(
        Case(rows, channels, width, dtype, activation, norm, scale, bias)
        for rows, channels, width, activation, norm, scale, bias in (
            (197, 768, 48, "gelu", True, "trained", True),
            (130, 200, 16, "relu", False, "number", True),
            (65, 1000, 24, "gelu_new", True, "channel", False),
            (50, 4096, 16, "silu", True, "number", True),
            (64, 520, 128, "quick_gelu", False, "channel", True),
        )
        for dtype in ("f32", "f16", "bf16")
    ),
    Case(100, 320, 64, "bf16", offset=30.0),
    Case(100, 320, 64, "f16", offset=3.0),
    Case(203, 104, 33, adapters=64),
    Case(130, 256, 16, "bf16", adapters=5, length=26),
)


def rounded(case: Case, seed: int = 0) -> dict[str, Any]:
    """Inputs, float32 parameters and dy; x and dy as the dtype has them."""
    draw = torch.Generator().manual_seed(seed)
    half = DTYPES[case.dtype]

    def normal(*shape: int, size: float = 1.0) -> Tensor:
        return size * torch.randn(*shape, generator=draw, dtype=torch.float64)

    several = (case.adapters,) if case.adapters else ()
    inputs, outputs, width = case.channels_in, case.channels or case.channels_in, case.width
    rows = (case.rows // case.length, case.length) if case.length > 1 else (case.rows,)
    x = normal(*rows, inputs) + case.offset
    if case.offset:
        x[..., 1] *= 20
    found: dict[str, Any] = {
        "x": x.to(half),
        "residual": normal(*rows, outputs).to(half) if case.channels else None,
        "dy": normal(*rows, outputs).to(half),
        "norm_weight": 1 + normal(*several, inputs, size=0.2) if case.norm else None,
        "norm_bias": normal(*several, inputs, size=0.2) if case.norm else None,
        "down": normal(*several, width, inputs, size=inputs**-0.5),
        "down_bias": normal(*several, width, size=0.3) if case.bias else None,
        "up": normal(*several, outputs, width, size=width**-0.5),
        "up_bias": normal(*several, outputs, size=0.3) if case.bias else None,
    }
    scales = {
        "number": lambda: 0.7,
        "trained": lambda: (0.7 + 0.1 * torch.rand(several, generator=draw)).float(),
        "channel": lambda: (1 + normal(*several, outputs, size=0.2)).float(),
    }
    found["scale"] = scales[case.scale]()
    if several:
        found["ids"] = torch.randint(-1, case.adapters, rows[:1], generator=draw)
        found["ids"][-1] = -1
    for name in ("norm_weight", "norm_bias", "down", "down_bias", "up", "up_bias"):
        found[name] = None if found[name] is None else found[name].float()
    return found


def computed(case: Case, given: dict[str, Any], exact: bool) -> dict[str, Tensor]:
    """y and every gradient, by the reference in float64 or by the kernels."""
    from mmadapt.ops import bottleneck as ops
    from mmadapt.ops import reference

    leaves = {}
    for name, value in given.items():
        if isinstance(value, Tensor) and value.is_floating_point() and name != "dy":
            leaves[name] = (value.double() if exact else value).detach().clone().requires_grad_()
        else:
            leaves[name] = value
    p = leaves
    residual = p["x"] if p["residual"] is None else p["residual"]
    norm = (p["norm_weight"], p["norm_bias"]) if case.norm else None
    weights = (p["down"], p["down_bias"], p["up"], p["up_bias"], case.activation, p["scale"])
    if case.adapters:
        run = reference.mixed_bottleneck if exact else ops.mixed
        y = run(residual, p["x"], p["ids"], *weights, norm)
    elif exact:
        z = p["x"] if norm is None else reference.layer_norm(p["x"], *norm)
        y = residual + reference.bottleneck(z, *weights)
    else:
        y = ops.bottleneck(residual, p["x"], *weights, 0.0, norm)
    y.backward(given["dy"].to(y.dtype))
    found = {"y": y.detach()}
    found |= {f"d {n}": v.grad for n, v in p.items() if isinstance(v, Tensor) and v.requires_grad}
    return found


def errors(case: Case) -> dict[str, float]:
    """Relative errors of y and of every gradient."""
    given = rounded(case)
    exact, found = computed(case, given, True), computed(case, given, False)
    if exact.keys() != found.keys():
        raise RuntimeError(f"gradients differ: {sorted(exact.keys() ^ found.keys())}")
    return {
        name: float((found[name].double() - value).norm() / value.norm().clamp_min(1e-12))
        for name, value in exact.items()
    }


def facts() -> dict[str, Any]:
    """What must hold bit for bit, or beside NaN."""
    from mmadapt.ops import bottleneck as ops

    found: dict[str, Any] = {}
    case = Case(36, 48, 10, "bf16", adapters=4, length=9)
    given = rounded(case)
    once, twice = (computed(case, given, False) for _ in range(2))
    found["the same bits again"] = all(torch.equal(once[name], twice[name]) for name in once)

    odd = given["x"].clone()
    odd[given["ids"] == -1] = torch.tensor([-0.0, torch.inf, -torch.inf, torch.nan] * 12).bfloat16()
    y = ops.mixed(odd, odd, given["ids"], given["down"], None, given["up"], None, "gelu", 1.0)
    none = given["ids"] == -1
    found["rows without an adapter"] = bool(none.any()) and torch.equal(
        y[none].view(torch.int16), odd[none].view(torch.int16)
    )

    plain = rounded(Case(20, 64, 8, activation="relu"))
    weights = (plain["down"], plain["down_bias"], plain["up"], plain["up_bias"], "relu", 1.0)
    x = plain["x"]
    for name, bad in (("nan", torch.nan), ("inf", torch.inf)):
        broken = x.clone()
        broken[3, 5] = bad
        y = ops.bottleneck(broken, broken, *weights)
        ops.choice.FORCED = "reference"
        expected = ops.bottleneck(broken, broken, *weights)
        ops.choice.FORCED = "triton"
        found[f"{name} as in the reference"] = torch.allclose(
            y, expected, equal_nan=True, atol=1e-5
        )
        found[f"{name} is there"] = not bool(expected.isfinite().all())

    expected = ops.bottleneck(x, x, *weights)
    wide = torch.full((40, 128), torch.nan)
    wide[::2, :64] = x
    strided = wide[::2, :64]
    found["rows apart in memory"] = torch.equal(
        ops.bottleneck(strided, strided, *weights), expected
    )
    crossed = x.view(4, 5, 64).transpose(0, 1).contiguous().transpose(0, 1)
    y = ops.bottleneck(crossed, crossed, *weights)
    found["axes in another order"] = torch.equal(y.reshape(20, 64), expected)
    one = x[:1].expand(7, 64)
    found["rows that overlap"] = torch.equal(
        ops.bottleneck(one, one, *weights),
        ops.bottleneck(one.contiguous(), one.contiguous(), *weights),
    )
    found |= of_a_model()
    return found


def of_a_model() -> dict[str, Any]:
    """An attachment computes with the kernels what it computes without, rows of a mixed batch too."""
    from backbones import BACKBONES, pixels
    from mmadapt.kernels import launch
    from snapshot import randomise

    import mmadapt as mm
    from mmadapt.ops import choice

    model = BACKBONES["hf_vit"].fresh()
    for seed, name in enumerate("ab"):
        randomise(
            mm.attach(model, mm.Bottleneck(3, scale_kind="learned", norm="before"), name=name),
            seed=seed,
        )
    calls = []
    forward = launch.forward
    launch.forward = lambda *arguments: calls.append(0) or forward(*arguments)
    outputs = {}
    with torch.no_grad():
        for path in ("reference", "triton"):
            choice.FORCED = path
            alone = model(pixels(3)).last_hidden_state
            with mm.context(model, rows=("a", None, "b")):
                outputs[path] = (alone, model(pixels(3)).last_hidden_state)
    launch.forward = forward
    close = [torch.allclose(a, b, atol=1e-5) for a, b in zip(*outputs.values(), strict=True)]
    return {"a model": close[0], "a model's mixed rows": close[1], "launches": len(calls)}


def main(which: str) -> None:
    import interpreter  # noqa: F401

    from mmadapt.ops import choice

    choice.FORCED = "triton"
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # which also fills what is allocated with NaN
    found: dict[str, Any] = {
        case.key: errors(case) for case in (QUICK if which == "quick" else SLOW)
    }
    if which == "quick":
        found["facts"] = facts()
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
