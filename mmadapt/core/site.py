"""Sites: named places in a backbone, and the patterns that select them.

A site's name is a role and a port: `vision.layers[3].mlp:out`. A pattern is a name whose indices
may be slices and whose words may be `*`: `vision.layers[-6:].mlp:out`, `*.layers[*].attn.q`.
Without a port, a pattern takes the first port of the adapter that the role offers. The bias beside a
role's weight is a role of its own, `vision.layers[3].attn.q.bias`, and has to be named: `*` stands
for every word but `bias`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mmadapt.errors import SiteError, closest

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor, nn

    from mmadapt.core.context import Context

PORTS = ("in", "out", "weight", "around")
BIAS = "bias"
NO_GRID = -1

_WORD = re.compile(r"(\*|[A-Za-z_][A-Za-z0-9_]*)(?:\[([^\[\]]*)\])?\Z")
_SELECTOR = re.compile(r"\*|-?\d+|(-?\d+)?:(-?\d+)?(:-?[1-9]\d*)?")


@dataclass(frozen=True)
class Span:
    """One row of an anatomy: where a role begins and ends in the modules of a backbone.

    Paths are relative to the backbone's root; `{i}` stands for the layer index.
    """

    #: path of the module whose call is met
    module: str
    #: ports on offer, preferred first
    ports: tuple[str, ...] = ("out", "in")
    #: where the input comes from: "position|keyword" of the call, or "tap:<tap name>"
    x: str = "0|hidden_states"
    #: which element (index) or field (name) of the module's output the role means
    y: int | str = 0
    #: parameter whose size is the number of channels at y: "path", or "path@dimension"
    channels: str = ""
    #: the same for x, where it differs from y
    channels_in: str = ""
    #: order of the axes at y: B batch, T tokens, H rows, W columns, P prompts of an image, C channels,
    #: D pooled features, K classes
    layout: str = "BTC"
    #: of T, tokens (class, registers) before an image's patches, in reading order;
    #: NO_GRID: patches in no order; None: not known
    prefix: int | None = None
    #: of the patches behind them, the rows of their grid: bands of a spectrogram (1: frames in a row,
    #: time along it), None: as many as columns
    grid_rows: int | None = None
    #: whether tokens may be added to the module's input: nothing in it depends on their number or place
    more_tokens: bool = False
    #: parameter that is this role's weight, and its share (k-th of n equal row blocks)
    weight: str = ""
    block: tuple[int, int] = (0, 1)
    #: where heads meet their output projection: function of the attention module around it
    attention: Callable[[Any], Attention] | None = None
    #: whether x and y hold the same positions in the same layout, so that a change read from x fits y
    aligned: bool = True
    #: rows at y for each row of the batch: "one"; "several", side by side (windows, prompts); "unknown"
    rows: str = "one"
    #: function of the module -> what it is made of (`mmadapt.core.parts`), where that is known
    parts: Callable[[Any], Any] | None = None


@dataclass(eq=False)
class Attention:
    """What a backbone's attention does to tokens, for layers that bring tokens of their own.

    H query heads of d channels, G key heads of which each serves H / G query heads.
    """

    #: the projections of tokens to keys and values, called as the backbone calls them
    k: nn.Module
    v: nn.Module
    heads: int
    key_heads: int
    head_width: int
    #: factor on q·k before the softmax
    scale: float
    #: channels of the tokens that keys and values are made of
    width: int
    #: norm over each head of a key, where there is one
    k_norm: nn.Module | None = None
    #: function (queries (B, T, H, d), *position embeddings) -> rotated queries, where there is one
    rotate: Callable[..., Tensor] | None = None

    def keys_and_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, G, K, d) of tokens (B, K, width), without positions."""
        split = (self.key_heads, self.head_width)
        keys, values = self.k(tokens).unflatten(-1, split), self.v(tokens).unflatten(-1, split)
        if self.k_norm is not None:
            keys = self.k_norm(keys)
        return keys.transpose(1, 2), values.transpose(1, 2)


@dataclass(frozen=True)
class Derived:
    """A tap computed from others at the moment it is read, such as queries after their rotation."""

    #: raw taps: "module path:out", "…:in" or "…:kw:keyword", `{i}` standing for the layer index
    sources: tuple[str, ...]
    #: function (the reader's site, what each source saw) -> what the tap gives; importable by name
    compute: Callable[..., Tensor]


@dataclass(eq=False)
class BoundTap:
    """A derived tap as one site reads it."""

    site: SiteView
    sources: tuple[str, ...]
    compute: Callable[..., Tensor]

    def value(self, context: Context) -> Tensor:
        """Read every source and compute; each counts as read."""
        return self.compute(self.site, *[context.read(source) for source in self.sources])


@dataclass(eq=False)
class SiteView:
    """A site resolved in one backbone; handed to layers, which must not own what it refers to."""

    name: str
    port: str
    span: Span
    module: nn.Module
    #: channels at y, or output rows of the weight
    width: int
    #: channels at x, or inputs of the weight
    width_in: int
    #: module that holds the weight, its parameter's name and the rows [start, stop) of this role
    holder: nn.Module | None = None
    parameter: str = ""
    rows: tuple[int, int] = (0, 0)
    #: a tensor of the site, for the dtype
    reference: Tensor | None = field(default=None, repr=False)
    #: where the site computes
    device: torch.device | None = None
    #: taps the layer may pop, by the layer's own word
    taps: dict[str, str | BoundTap] = field(default_factory=dict)
    #: what the attention around the site does, where its span says so
    attention: Attention | None = None

    @property
    def role(self) -> str:
        """The site's name without its port."""
        return self.name.rpartition(":")[0]

    def bind(self, word: str, tap: str, source: str | Derived) -> dict[str, str]:
        """Let the layer read `tap` by its own word; returns the raw taps that takes, by name."""
        if isinstance(source, str):
            self.taps[word] = tap
            return {tap: source}
        raw = {f"{tap} from {path}": path for path in source.sources}
        self.taps[word] = BoundTap(self, tuple(raw), source.compute)
        return raw

    def read_taps(self, word: str) -> tuple[str, ...]:
        """Names of the raw taps behind a layer's word."""
        tap = self.taps[word]
        return (tap,) if isinstance(tap, str) else tap.sources


def parse_role(role: str) -> tuple[tuple[str, int | None], ...]:
    """Split a role into (word, index) pairs: "vision.layers[3].mlp" -> ((vision, None), …)."""
    parts: list[tuple[str, int | None]] = []
    for component in role.split("."):
        match = _WORD.match(component)
        if match is None:
            raise SiteError(f"{role!r} is not a role: {component!r} is malformed")
        parts.append((match[1], None if match[2] is None else int(match[2])))
    return tuple(parts)


def stem(role: str) -> str:
    """The role without its indices, the same in every layer: "vision.layers[*].mlp"."""
    return re.sub(r"\[\d+\]", "[*]", role)


def _split_pattern(pattern: str) -> tuple[list[tuple[str, str | None]], str | None]:
    if not isinstance(pattern, str) or not pattern:
        raise SiteError(
            f"a site pattern is a non-empty string, got {pattern!r}",
            'for example "vision.layers[-6:].mlp:out"',
        )
    role, _, port = pattern.partition(":") if "[" not in pattern else _partition_port(pattern)
    words: list[tuple[str, str | None]] = []
    for component in role.split("."):
        match = _WORD.match(component)
        if match is None or (match[2] is not None and not _SELECTOR.fullmatch(match[2])):
            raise SiteError(
                f"malformed site pattern {pattern!r}, at {component!r}",
                'write names joined by dots with indices or slices, as in "vision.layers[0:4].mlp:out"',
            )
        words.append((match[1], match[2]))
    if port and port not in PORTS:
        raise SiteError(
            f"site pattern {pattern!r} names the port {port!r}", f"ports are {', '.join(PORTS)}"
        )
    return words, port or None


def _partition_port(pattern: str) -> tuple[str, str, str]:
    """Split at the colon behind the last bracket, since slices hold colons too."""
    head, bracket, tail = pattern.rpartition("]")
    name, colon, port = tail.partition(":")
    return head + bracket + name, colon, port


def _selected(selector: str, index: int, length: int) -> bool:
    if selector == "*":
        return True
    if ":" in selector:
        ends = [int(end) if end else None for end in selector.split(":")]
        return index in range(*slice(*ends).indices(length))
    wanted = int(selector)
    return index == (wanted + length if wanted < 0 else wanted)


def match_roles(pattern: str, roles: Iterable[str]) -> tuple[list[str], str | None]:
    """Roles that `pattern` selects, in the order given, and the port it names, if any."""
    words, port = _split_pattern(pattern)
    parsed = {role: parse_role(role) for role in roles}
    lengths: dict[tuple, int] = {}  # how many there are of each indexed word, under each prefix
    for parts in parsed.values():
        for depth, (word, index) in enumerate(parts):
            if index is not None:
                key = (*parts[:depth], word)
                lengths[key] = max(lengths.get(key, 0), index + 1)

    def matches(parts: tuple[tuple[str, int | None], ...]) -> bool:
        if len(parts) != len(words):
            return False
        for depth, ((word, index), (wanted, selector)) in enumerate(zip(parts, words, strict=True)):
            if wanted != word and (wanted != "*" or word == BIAS):
                return False
            if (index is None) != (selector is None):
                return False
            if index is not None and selector is not None:
                if not _selected(selector, index, lengths[(*parts[:depth], word)]):
                    return False
        return True

    return [role for role, parts in parsed.items() if matches(parts)], port


def offers(span: Span) -> tuple[str, ...]:
    """The ports at which a role can be met: what is called can be stood in for, too."""
    return (*span.ports, "around") if "out" in span.ports else span.ports


def select(
    patterns: Iterable[str],
    spans: Mapping[str, Span],
    ports: tuple[str, ...],
    former: Mapping[str, str] | None = None,
) -> list[tuple[str, str]]:
    """Resolve patterns to (role, port) pairs in the backbone's order, each once.

    `ports` are those the adapter can use, preferred first; `former` maps old names to present roles
    and counts for patterns that match no present one. Raises `SiteError` when a pattern
    matches nothing or asks for a port that is not there.
    """
    former = former or {}
    chosen: dict[tuple[str, str], None] = {}
    order = {role: place for place, role in enumerate(spans)}
    for pattern in patterns:
        roles, port = match_roles(pattern, spans)
        roles = roles or [former[old] for old in match_roles(pattern, former)[0]]
        if not roles:
            raise nothing_matched(pattern, spans)
        for role in roles:
            offered = offers(spans[role])
            usable = [p for p in ports if p in offered and port in (None, p)]
            if not usable:
                wanted = f"port {port!r}" if port else f"a port among {', '.join(ports)}"
                raise SiteError(
                    f"site pattern {pattern!r} needs {wanted} at {role!r}, which offers "
                    f"{', '.join(offered)}; the adapter can use {', '.join(ports)}",
                    "choose another site, or another method (see mmadapt.sites)",
                )
            chosen[role, usable[0]] = None
    return sorted(chosen, key=lambda pair: order[pair[0]])


def nothing_matched(pattern: str, spans: Mapping[str, Span]) -> SiteError:
    """The error for a pattern that selects no role, with the nearest roles."""
    named = [role for role in spans if BIAS in pattern or not role.endswith(f".{BIAS}")]
    general = list(dict.fromkeys(stem(role) for role in named))
    bare = re.sub(r"\[[^\]]*\]", "[*]", pattern.rpartition("]")[0] + "]") if "]" in pattern else ""
    wanted = (bare + pattern.rpartition("]")[2]) if bare else pattern
    wanted = re.sub(r":\w+$", "", wanted)
    near = closest(wanted, general, n=4)
    if wanted in general:  # the name is right, so the index is not
        count = sum(stem(role) == wanted for role in spans)
        return SiteError(
            f"site pattern {pattern!r} matches nothing: there are {count} of {wanted!r}"
        )
    return SiteError(
        f"site pattern {pattern!r} matches nothing in this backbone",
        "the nearest sites are " + ", ".join(near or general[:6]),
    )
