"""New output layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from mmadapt.adapter.base import Adapter
from mmadapt.adapter.registry import register_adapter
from mmadapt.adapter.validation import flag, positive
from mmadapt.errors import AdapterError


@register_adapter
@dataclass(frozen=True)
class Head(Adapter):
    """A new linear output layer, in the place of what its site returns (Alain and Bengio 2016).

    At `logits` it reads what the backbone's classifier reads, (B, D), and returns (B, classes); the
    classifier stays frozen and is not saved. At a feature site that nothing of the backbone reads
    further, such as the `vision.pooled` of a tower without a classifier, it maps the features. Sites
    inside the backbone, whose width it goes on computing with, are refused. Outputs are `classes`
    wide: a loss the model computes itself may expect the old count (transformers' classifiers with
    `labels=` read `config.num_labels`); compute it from the logits then.

    `names`, one a class, are kept in the adapter's file; without `classes` they count the classes,
    and without both there are 2. `norm` puts a trained LayerNorm before. Weight and bias start at
    zero, so that every class starts equal; cross-entropy moves both at once.

    Parameters: classes·(D + 1), with the norm 2·D more.

        ast = mm.load("tiny/ast")
        mm.attach(ast, mm.Head(names=("bird", "engine", "rain")))
        logits = ast(torch.randn(2, 98, 64)).logits                   # (2, 3)
    """

    method: ClassVar[str] = "head"
    layer: ClassVar[str] = "mmadapt.methods.head:HeadLayer"
    ports: ClassVar[tuple[str, ...]] = ("out",)
    default_sites: ClassVar[tuple[str, ...]] = ("logits",)
    elsewhere: ClassVar[str] = (
        "name pooled features with at= (see mmadapt.sites), or take the library's class with a "
        "classifier, or name the last module: mmadapt.Backbone(model, anatomy=mmadapt.Anatomy"
        '.from_paths(model, {"pooled": "pooler"})) and at="pooled"'
    )
    not_identity: ClassVar[str] = "it takes the place of the backbone's own outputs"
    source: ClassVar[str] = "Alain and Bengio 2016, arXiv:1610.01644"

    classes: int | None = None
    names: tuple[str, ...] = ()
    norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        names: Any = self.names
        strings = isinstance(names, (list, tuple)) and all(isinstance(one, str) for one in names)
        if not strings or len(set(names)) != len(names) or not all(names):
            raise AdapterError(
                f"Head: names is {names!r}, expected different names, one a class",
                'for example names=("cat", "dog")',
            )
        object.__setattr__(self, "names", tuple(names))
        if self.classes is None:
            object.__setattr__(self, "classes", len(names) or 2)
        positive(self, "classes")
        if names and len(names) != self.classes:
            raise AdapterError(
                f"Head: {len(names)} names were given for {self.classes} classes",
                "name every class or none",
            )
        flag(self, "norm")
