"""Which layers can act together, and which in part."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmadapt.errors import AttachError

if TYPE_CHECKING:
    from mmadapt.core.layer import Layer


def check_sums(layers: dict[str, list[Layer]]) -> None:
    """Layers that meet at one site and see the same output must each add a change to it."""
    for site, several in layers.items():
        around = site.endswith(":around")  # two of them cannot both call the module
        odd = [type(layer).__name__ for layer in several if around or not layer.additive]
        if len(several) > 1 and odd:
            raise AttachError(
                f"{odd[0]} at {site} does not add a change to its site's output, so a sum with "
                "another layer has no meaning",
                'attach them under two names and use mmadapt.Stack("a", "b")',
            )


def check_weight(name: str, weight: float, layers: dict[str, list[Layer]]) -> None:
    """A part of an attachment is a part of every change it makes: there has to be one everywhere."""
    if weight in (0, 1):
        return
    for site, several in layers.items():
        for layer in several:
            why = "" if layer.additive else "it does not add a change"
            if site.endswith(":around"):
                why = "it stands in for a call"
            if why:
                raise AttachError(
                    f"{name!r} cannot have the weight {weight:g}: there is no part of "
                    f"{type(layer).__name__} at {site}, since {why}",
                    "give it the weight 1 (on) or 0 (off)",
                )
