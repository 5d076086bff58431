"""What every site contributes: over the patches of an image, under tokens, along time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmadapt.core.figure import AMOUNT, HEAT, cells, drawn, img, new_figure, png
from mmadapt.errors import DataError
from mmadapt.ui.base import ipywidgets
from mmadapt.ui.settings import Settings, Value

if TYPE_CHECKING:
    import numpy

    from mmadapt.core.contribution import Contribution

#: pictures in one figure, tokens under one, sites in one
_PICTURES, _TOKENS, _SITES = 12, 64, 48


def contribution(
    m: Any,
    batch: Any,
    images: Any = None,
    tokens: Sequence[Sequence[str]] | None = None,
    seconds: float | Sequence[float] | None = None,
) -> SharesView:
    """See by how much every acting site changes what flows through it, ‖change‖ / ‖what was there‖.

    `batch` is what the model takes (a tensor, a tuple, a dictionary), or a function that runs it. The
    shares of patches lie over `images`, one for each row: (H, W) or (H, W, 3), or PIL. `tokens`, a
    list of texts for each row, stand under the columns, and `seconds`, how long what was heard is, is
    their axis. `row` says which row of the batch is seen, and may be assigned; `found` holds the
    numbers, `table()` their means. Raises `CheckError` where nothing acts.

        w = mm.ui.contribution(clip, pixels, images)
        w.row = 3
    """
    from mmadapt.core.contribution import contribution

    return SharesView(contribution(m, batch), images, tokens, seconds)


class SharesView(Settings):
    """What `mm.ui.contribution` gives."""

    row: Value[int] = Value()
    delay = 0.15

    def __init__(
        self,
        found: Contribution,
        images: Any = None,
        tokens: Any = None,
        seconds: float | Sequence[float] | None = None,
    ) -> None:
        if not found.shares:
            raise DataError(
                "no site was reached whose change has a measure", "; ".join(found.notes)
            )
        self.found, self.images, self.tokens = found, images, tokens
        #: rows of the batch, by the sites that have one row for each
        self.rows = min(len(share) for share in found.shares.values())
        lasting = [seconds] * self.rows if isinstance(seconds, (int, float)) else seconds
        for word, given in (("images", images), ("tokens", tokens), ("seconds", lasting)):
            if given is not None and len(given) < self.rows:
                raise DataError(f"there are {len(given)} {word} for {self.rows} rows of the batch")
        self.seconds: list[float] | None = None if lasting is None else [float(s) for s in lasting]
        super().__init__(row=0)

    def _checked(self, values: dict[str, Any]) -> dict[str, Any]:
        row = values["row"]
        if not isinstance(row, int) or not 0 <= row < self.rows:
            raise DataError(f"row is {row!r}, expected 0 to {self.rows - 1}")
        return {"row": row}

    def table(self) -> Any:
        """The mean share of every site, over all rows."""
        return self.found.table()

    # -- what is shown ------------------------------------------------------------------------------

    def _controls(self) -> dict[str, Any]:
        row = ipywidgets().IntSlider(
            min=0, max=max(self.rows - 1, 0), description="row", continuous_update=False
        )
        return {"row": row} if self.rows > 1 else {}

    def _html(self) -> str:
        return img(png(self.figure(), dpi=90), self._text()) + self.table()._repr_html_()

    def _text(self) -> str:
        return str(self.table())

    @drawn
    def figure(self) -> Any:
        """Pictures where sites see patches of an image, else a grid of sites by positions."""
        grids = {
            site: grid[self.row].numpy()
            for site in self.found.shares
            if (grid := self.found.grid(site)) is not None
        }
        if grids and self.seconds is None and self.tokens is None:
            return self._patches(_spread(grids, _PICTURES))
        return self._lines()

    def _patches(self, grids: dict[str, numpy.ndarray]) -> Any:
        """One picture a site, all on one scale."""
        columns = min(4, len(grids))
        rows = -(-len(grids) // columns)
        picture = None if self.images is None else _grey(self.images[self.row])
        ratio = 1.0 if picture is None else picture.shape[0] / picture.shape[1]
        figure = new_figure(2.1 * columns + 0.9, (2.1 * ratio + 0.25) * rows)
        axes = figure.subplots(rows, columns, squeeze=False)
        top = max(max(float(grid.max()) for grid in grids.values()), 1e-9)
        image = None
        for own, (site, grid) in zip(axes.flat, grids.items(), strict=False):
            height, width = picture.shape if picture is not None else grid.shape
            if picture is not None:
                own.imshow(picture, "gray", extent=(0, width, height, 0))
            image = own.imshow(
                grid, HEAT, vmin=0, vmax=top, extent=(0, width, height, 0), interpolation="nearest",
                alpha=1.0 if picture is None else 0.6,
            )  # fmt: skip
            own.set_title(site.rpartition(":")[0], fontsize=8)
        for own in axes.flat:
            own.set_axis_off()
        bar = figure.colorbar(image, ax=axes, label="‖change‖ / ‖what was there‖", shrink=0.9)
        bar.outline.set_visible(False)
        return figure

    def _lines(self) -> Any:
        """A row a site, a column a position: a token's text below it, or seconds."""
        import numpy

        shown = _spread(
            {site: share[self.row].flatten().numpy() for site, share in self.found.shares.items()},
            _SITES,
        )
        width = max(len(values) for values in shown.values())
        texts = [] if self.tokens is None else [_visible(text) for text in self.tokens[self.row]]
        if texts:
            width = min(width, _TOKENS)
        figure = new_figure(
            min(3 + 0.2 * width, 14) if texts else 9, 1.2 + 0.22 * len(shown) + 0.5 * bool(texts)
        )
        axes = figure.add_subplot()
        values = numpy.full((len(shown), width), numpy.nan)
        for place, own in enumerate(shown.values()):
            values[place, : len(own)] = own[:width]
        names = [site.rpartition(":")[0] for site in shown]
        slant = 60 if max(map(len, texts), default=0) > 2 else 0
        image = cells(axes, values, names, texts[:width], "share", (0, None), AMOUNT, slant=slant)
        axes.set_xlabel("token" if texts else "position")
        if self.seconds is not None:
            image.set_extent((0, self.seconds[self.row], len(shown) - 0.5, -0.5))
            axes.set_xlim(0, self.seconds[self.row])
            axes.set_xlabel("seconds")
        return figure


def _visible(text: Any) -> str:
    """A token as it can be seen: spaces and line ends too."""
    return str(text).replace(" ", "␣").replace("\n", "⏎") or "∅"


def _spread(values: dict[str, Any], most: int) -> dict[str, Any]:
    """At most so many, evenly chosen, the first and the last among them."""
    if len(values) <= most:
        return values
    names = list(values)
    return {
        names[round(place * (len(names) - 1) / (most - 1))]: values[
            names[round(place * (len(names) - 1) / (most - 1))]
        ]
        for place in range(most)
    }


def _grey(image: Any) -> numpy.ndarray:
    """An image as (H, W) of numbers."""
    import numpy

    array = numpy.asarray(image.detach().cpu() if hasattr(image, "detach") else image)
    if array.ndim == 3 and array.shape[0] == 3 and array.shape[2] != 3:
        array = array.transpose(1, 2, 0)
    if array.ndim == 3:
        array = array.mean(-1)
    if array.ndim != 2 or array.dtype.kind not in "buif":
        raise DataError(
            f"an image is {array.shape} of {array.dtype}, expected (H, W) or (H, W, 3) of numbers"
        )
    return array
