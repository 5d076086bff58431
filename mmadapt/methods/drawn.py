"""Layers whose projections and kernels are drawn as torch draws its own."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor, nn

from mmadapt.core.layer import Layer, empty, fill_uniform
from mmadapt.ops.reference import layer_norm, linear

if TYPE_CHECKING:
    import torch

    from mmadapt.core.site import SiteView


class Drawn(Layer):
    """A layer whose projections and kernels are drawn as torch draws its own."""

    def draw(
        self,
        site: SiteView,
        generator: torch.Generator,
        name: str,
        shape: tuple[int, ...],
        several: tuple[int, ...] = (),
        bias: bool = True,
    ) -> None:
        """Register `name` (outputs, inputs, taps …) from U(−1/√n, 1/√n), with a bias beside it.

        `several` of them make axes in front.
        """
        bound = 1 / math.sqrt(math.prod(shape[1:]))
        for each, size in ((name, shape), (f"{name}_bias", shape[:1])):
            if bias or each == name:
                tensor = empty(site, *several, *size)
                fill_uniform(tensor, bound, generator)
                self.register_parameter(each, tensor)

    def draw_norm(self, site: SiteView, name: str, *shape: int) -> None:
        """Register the weight and bias of a norm."""
        for each, start in ((f"{name}_weight", 1.0), (f"{name}_bias", 0.0)):
            tensor = empty(site, *shape)
            nn.init.constant_(tensor, start)
            self.register_parameter(each, tensor)

    def project(self, x: Tensor, name: str, *which: int) -> Tensor:
        """x (…, inputs) through a projection and its bias; `which` of several."""
        weight, bias = self.get_parameter(name), self.get_parameter(f"{name}_bias")
        return linear(x, weight[which], bias[which]) if which else linear(x, weight, bias)

    def normed(self, x: Tensor, name: str, which: int) -> Tensor:
        """One of several norms, over the last axis."""
        weight, bias = (self.get_parameter(f"{name}_{word}")[which] for word in ("weight", "bias"))
        return layer_norm(x, weight, bias)
