"""An encoder inside another module, with what that module makes of the encoder's output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from mmadapt.core.anatomy import Anatomy, find_anatomy
from mmadapt.core.site import Derived, Span


def pooled_anatomy(model: Any) -> Anatomy:
    """`mmadapt.tasks.tagging.PooledEncoder`: the roles of its encoder, and `audio.pooled`.

    Family, facts and site names are the encoder's, so that adapter files fit both. Roles of a bare
    model, which take other inputs than sound, are left out.
    """
    own = within(find_anatomy(model.encoder), "encoder")
    channels = own.spans["audio.layers[i].mlp"].channels.replace("{i}", "0")
    pooled = Span("pool", ("out",), channels=channels, layout="BD", aligned=False)
    inside = {role: span for role, span in own.spans.items() if span.ports != ("around",)}
    facts = own.facts
    return replace(
        own,
        spans={**inside, "audio.pooled": pooled},
        facts=None if facts is None else partial(_of_the_encoder, facts),
    )


def _of_the_encoder(facts: Callable[[Any], dict[str, Any]], model: Any) -> dict[str, Any]:
    return facts(model.encoder)


def within(anatomy: Anatomy, path: str) -> Anatomy:
    """The same anatomy of a model that is the submodule at `path` of another."""

    def put(where: str) -> str:
        return f"{path}.{where}" if where else path

    def inside(span: Span) -> Span:
        named = {name: getattr(span, name) for name in ("channels", "channels_in", "weight")}
        return replace(
            span, module=put(span.module), **{name: put(p) for name, p in named.items() if p}
        )

    def tap(source: str | Derived) -> str | Derived:
        if isinstance(source, str):
            return put(source)
        return replace(source, sources=tuple(put(one) for one in source.sources))

    return replace(
        anatomy,
        spans={role: inside(span) for role, span in anatomy.spans.items()},
        towers={tower: put(where) for tower, where in anatomy.towers.items()},
        taps={role: tap(source) for role, source in anatomy.taps.items()},
        fills={put(where): told for where, told in anatomy.fills.items()},
        settings={put(where): value for where, value in anatomy.settings.items()},
        encode={},
    )
