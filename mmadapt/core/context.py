"""What travels with one forward pass, and how a recomputed one finds it again.

Hooks of one backbone share a `Forwards`. It holds the `Context` of the call under way: facts about
its inputs, and what taps left for layers further on. Where a region is checkpointed, it also keeps,
for as long as the region may be recomputed, which layers acted and with which context, so that
backward repeats the forward that was, whatever has been switched since.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.utils.checkpoint

from mmadapt.errors import CheckError

if TYPE_CHECKING:
    from mmadapt.core.site import BoundTap

_CHECKPOINT = torch.utils.checkpoint.__file__
_NON_REENTRANT = (
    "pass use_reentrant=False, in transformers through "
    'gradient_checkpointing_kwargs={"use_reentrant": False}'
)


class Context:
    """One forward pass: facts about its inputs, and the tensors that taps left."""

    def __init__(self, facts: Mapping[str, Any] | None = None, region: Any = None) -> None:
        self._facts = facts or {}
        self._taps: dict[str, tuple[Any, int]] = {}
        #: the checkpointed region within which this pass began, if it did
        self.region = region

    def get(self, fact: str, default: Any = None) -> Any:
        """A fact about this forward pass: what `mmadapt.context` was given, or the anatomy found."""
        value = self._facts.get(fact)
        return default if value is None else value

    def tell(self, **facts: Any) -> None:
        """Facts that a layer found while the pass is under way, for the layers further on."""
        self._facts = {**self._facts, **facts}

    def leave(self, tap: str, value: Any, readers: int) -> None:
        """Keep what a tap saw until its last reader has come."""
        self._taps[tap] = (value, readers)

    def read(self, tap: str | BoundTap) -> Any:
        """What the tap saw last in this forward pass; `tap` is a value of `site.taps`."""
        if not isinstance(tap, str):
            return tap.value(self)
        if tap not in self._taps:
            raise CheckError(
                f"a layer reads {tap!r} before the backbone has computed it, or for a second time",
                "the module that gives it runs later, or was called on its own",
            )
        value, readers = self._taps.pop(tap)
        if readers > 1:
            self._taps[tap] = (value, readers - 1)
        return value

    def __getstate__(self) -> dict[str, Any]:
        return {}  # non-leaf tensors can neither be deep-copied nor pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()


class Choice:
    """Which layers act. A switch replaces it; `plans` and `readers` are written when first needed."""

    def __init__(self) -> None:
        self.plans: dict[Any, tuple] | None = None
        self.readers: dict[Any, int] = {}


@dataclass
class Region:
    """What a checkpointed region has to be recomputed with."""

    choice: Choice
    #: of the forward pass around it; one that begins inside begins again when it is recomputed
    context: Context
    switched: bool = False


class Forwards:
    """The forward passes of one backbone: the one under way, and those backward may recompute."""

    def __init__(self) -> None:
        #: facts the user gave, for every pass within `mmadapt.context`
        self.given: dict[str, Any] = {}
        self.context = Context()
        self.choice = Choice()
        #: hooks by site and by tap, kept by the bank
        self.sites: dict[str, Any] = {}
        self.taps: dict[str, Any] = {}
        self._regions: WeakKeyDictionary[Any, Region] = WeakKeyDictionary()
        #: whether a graph may exist whose backward is to come
        self.graded = False
        #: whether the pass under way began with gradients on
        self.learning = False
        self._thread = 0
        self._depth = 0

    # -- the pass under way -------------------------------------------------------------------

    def begin(self, facts: Mapping[str, Any]) -> Context:
        """Start a pass with these facts, below the ones given; returns the context to go back to."""
        before = self.context
        if torch.compiler.is_compiling():
            self.context = Context({**before._facts, **facts, **self.given})
            return before
        here = threading.get_ident()
        if self._depth and self._thread != here:
            raise CheckError(
                "a second forward pass began in another thread while one is under way; an adapted "
                "model serves one at a time",
                "run them one after another, or give each thread a copy.deepcopy of the model",
            )
        self._thread = here
        if not self._depth:
            self.learning = torch.is_grad_enabled()
        self._depth += 1
        self.context = Context({**before._facts, **facts, **self.given}, _region_under_way()[0])
        return before

    def end(self, before: Context) -> None:
        """Go back to the context before `begin`."""
        self.context = before
        if not torch.compiler.is_compiling():
            self._depth -= 1

    def mine(self) -> bool:
        """Whether the pass under way is this thread's."""
        return torch.compiler.is_compiling() or self._thread == threading.get_ident()

    # -- passes that backward recomputes --------------------------------------------------------

    def recomputed(self) -> tuple[Choice, Context] | None:
        """What to repeat, where backward recomputes a region now; a region under way is noted.

        Called by every hook with gradients on, so the first question is the cheap one.
        """
        self.graded = True
        region, again = _region_under_way()
        if not again and torch._C._current_graph_task_id() != -1:
            raise CheckError(
                "backward runs this adapted model again, and it cannot be told for which forward "
                "pass: reentrant checkpointing, or a checkpoint within a checkpoint",
                _NON_REENTRANT,
            )
        if region is None:
            return None
        known = self._regions.get(region)
        if not again:
            if known is None:
                self._write_down()
                outside = Context() if self.context.region is region else self.context
                self._regions[region] = Region(self.choice, outside)
            elif known.choice is not self.choice:
                known.switched = True
            return None
        if known is None or known.switched:
            raise CheckError(
                "adapters were switched within a checkpointed region, which cannot be recomputed",
                "switch outside of what is checkpointed",
            )
        return known.choice, self.context if self.context.region is region else known.context

    def refuse_reentrant(self) -> None:
        """Refuse a call without gradients, in a pass that began with them, under reentrant checkpointing.

        Where nothing before it requires a gradient, as behind a frozen front end, adapters in there
        would get none, and nobody would say so.
        """
        frame = sys._getframe()
        while frame is not None:
            if frame.f_code is torch.utils.checkpoint.CheckpointFunction.forward.__code__:
                raise CheckError(
                    "this part of the model runs under reentrant checkpointing, which records no "
                    "gradients here; behind a frozen front end adapters would get none, silently",
                    _NON_REENTRANT,
                )
            frame = frame.f_back

    def _write_down(self) -> None:
        if self.choice.plans is None:
            self.choice.plans = {hook: hook.plan for hook in self.sites.values()}
            self.choice.readers = {hook: hook.readers for hook in self.taps.values()}

    def __getstate__(self) -> dict[str, Any]:
        return {"given": {}, "sites": self.sites, "taps": self.taps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()
        self.__dict__.update(state)


def _region_under_way() -> tuple[Any, bool]:
    """The checkpointed region this code runs in, and whether backward is recomputing it.

    torch tells nobody, but a region sees to its saved tensors by hooks whose closure holds the
    region's frame, or a reference to it when recomputing.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # type: ignore[attr-defined]
    if hooks is None:
        return None, False
    code = getattr(hooks[0], "__code__", None)
    if code is None or code.co_filename != _CHECKPOINT:
        return None, False
    for name, cell in zip(code.co_freevars, hooks[0].__closure__ or (), strict=True):
        if name == "frame":
            return cell.cell_contents, False
        if name == "target_frame_ref":
            return cell.cell_contents(), True
    return None, False
