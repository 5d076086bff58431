"""The trainable layer an adapter builds at one site."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from mmadapt.errors import AdapterError

if TYPE_CHECKING:
    from mmadapt.core.context import Context
    from mmadapt.core.site import SiteView

_WIDE = (torch.float32, torch.float64)


class Layer(nn.Module):
    """Base of all layers: flat parameters, no inner modules, one method per port it can use.

    Layers hold no reference to the backbone; what they need of it comes with the `site`. What the
    sites of one adapter share is a layer too, one without a port.
    """

    #: read-only taps it reads, each once a call: `context.read(site.taps[word])`
    taps: ClassVar[tuple[str, ...]] = ()
    #: facts of the forward pass it asks the context for, such as "mask"
    facts: ClassVar[tuple[str, ...]] = ()
    #: whether its output may stand in a sum with others' (a plain `acc + delta`)
    additive: ClassVar[bool] = True
    #: why it cannot be merged into a weight, shown when `fold` returns None
    why_not_merge: ClassVar[str] = "it is not a linear change of a weight"
    #: what the sites of its adapter share, where they do; there from the end of `attach` on
    shared: Any = None

    def share(self, shared: Layer) -> None:
        """Refer to what the sites share, which the bank registers once, beside the layers."""
        self.__dict__["shared"] = (
            shared  # as a sub-module it would be counted and saved once a site
        )

    def read_parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter its output depends on: its own, and those it shares."""
        yield from self.parameters()
        if self.shared is not None:
            yield from self.shared.parameters()

    def to_file(self) -> dict[str, Tensor]:
        """What its file holds, by name; `from_file` takes the same names, shapes and kinds."""
        return self.state_dict()

    def from_file(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `to_file` of an equal layer gave."""
        with torch.no_grad():
            for name, value in self.state_dict().items():
                value.copy_(tensors[name])

    def before(self, x: Tensor, context: Context, site: SiteView) -> Tensor:
        """Port `in`: the new input, shaped as x."""
        raise NotImplementedError(f"{type(self).__name__} has no `in` port")

    def after(self, acc: Tensor, y: Tensor, x: Tensor, context: Context, site: SiteView) -> Tensor:
        """Port `out`: acc + delta(y, x). In a sum y is the backbone's output; in a stack y is acc."""
        raise NotImplementedError(f"{type(self).__name__} has no `out` port")

    def weight(self, weight: Tensor, context: Context, site: SiteView) -> Tensor:
        """Port `weight`: the effective rows (width, width_in) for this role; `weight` is not changed."""
        raise NotImplementedError(f"{type(self).__name__} has no `weight` port")

    def around(
        self,
        call: Callable[..., Any],
        args: tuple,
        kwargs: dict[str, Any],
        context: Context,
        site: SiteView,
    ) -> Any:
        """Port `around`: what the module returns, `call(*args, **kwargs)` being its own forward."""
        raise NotImplementedError(f"{type(self).__name__} has no `around` port")

    @property
    def rowwise(self) -> bool:
        """Whether rows of one batch may choose among layers like this one: `after_rows` is there."""
        return False

    def row_operands(self, tensors: dict[str, Tensor]) -> Any:
        """What `after_rows` computes with, from each parameter as (B, …); zeros must mean no change."""
        return tensors

    def after_rows(self, operands: Any, acc: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """Port `out` with parameters of every row's own."""
        raise NotImplementedError(f"{type(self).__name__} cannot be chosen by row")

    def fuses_rows(self, y: Tensor, x: Tensor) -> bool:
        """Whether a fused kernel would compute a mixed batch from the layers' stacked parameters."""
        return False

    def after_stacked(
        self, tensors: dict[str, Tensor], ids: Tensor, acc: Tensor, y: Tensor, x: Tensor
    ) -> Tensor:
        """`after_rows` for parameters (N, …) and which of them each row takes, (B,); −1 for none."""
        raise NotImplementedError(f"{type(self).__name__} has no fused kernel for mixed batches")

    def fold(
        self, weight: Tensor, bias: Tensor | None, site: SiteView
    ) -> tuple[Tensor, Tensor | None] | None:
        """The role's rows of the weight and bias with this layer merged in, or None: it cannot be.

        `weight` (width, …) and `bias` (width,) are in the backbone's dtype and are not changed.
        """
        return None

    def describe(self) -> dict[str, Any]:
        """Numbers worth showing in `inspect`, such as gates; plain floats."""
        return {}


def require_aligned(site: SiteView, what: str) -> None:
    """Refuse a site whose input's positions or layout are not its output's."""
    if not site.span.aligned:
        raise AdapterError(
            f"{what} adds what it reads from the input of {site.name} to its output, which holds other "
            "positions",
            "choose other sites with at=, such as 'vision.layers[*].mlp', or a method that reads the "
            "output",
        )


def empty(site: SiteView, *shape: int) -> nn.Parameter:
    """An uninitialised parameter on the site's device.

    float32 beside half-precision or quantised backbones, else in the backbone's dtype.
    """
    reference = site.reference
    assert reference is not None
    dtype = reference.dtype if reference.dtype in _WIDE else torch.float32
    return nn.Parameter(torch.empty(shape, device=site.device, dtype=dtype))


def fill_uniform(parameter: Tensor, bound: float, generator: torch.Generator) -> None:
    """Draw from U(−bound, bound) on the CPU, so that a seed means the same on every device."""
    if parameter.is_meta:  # only planned: there is nowhere to put the numbers
        return
    with torch.no_grad():
        draw = torch.rand(parameter.shape, generator=generator, dtype=torch.float32, device="cpu")
        parameter.copy_((draw * 2 - 1) * bound)


def fill_normal(
    parameter: Tensor, deviation: float, generator: torch.Generator, within: float | None = None
) -> None:
    """Draw from N(0, deviation²) on the CPU; `within` so many deviations, by their own quantiles."""
    shape = parameter.shape
    with torch.no_grad():
        if within is None:
            draw = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        else:
            edge = math.erf(within / math.sqrt(2))
            draw = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
            draw = torch.erfinv((2 * draw - 1) * edge) * math.sqrt(2)
        parameter.copy_(draw * deviation)
