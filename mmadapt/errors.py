"""What mmadapt raises: every message names what was seen, what was expected and the next step."""

from __future__ import annotations

from collections.abc import Iterable


class MmadaptError(Exception):
    """Root of every error mmadapt raises on purpose; `hint` is the next step, in one sentence."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  Next: {self.hint}" if self.hint else self.message


class AdapterError(MmadaptError, ValueError):
    """An adapter's hyper-parameters have no meaning, alone or at the site they were sent to."""


class SiteError(MmadaptError, LookupError):
    """A site pattern is malformed, matches nothing, or asks for a port the site does not have."""


class AttachError(MmadaptError, ValueError):
    """An attachment cannot be made, or the one that was named is not there."""


class MergeError(MmadaptError, ValueError):
    """An attachment cannot be merged into the backbone's weights, or is not."""


class CheckError(MmadaptError, RuntimeError):
    """A forward or backward pass showed that an attachment does not work as it should."""


class AdapterFileError(MmadaptError, ValueError):
    """An adapter file is missing, damaged, too new, or does not hold what it declares."""


class WrongBackboneError(AdapterFileError):
    """An adapter file was made for another backbone."""


class BackboneError(MmadaptError, TypeError):
    """The object is not a model mmadapt can read, or no anatomy is known for it."""


class ZooError(MmadaptError, LookupError):
    """A zoo name is unknown, or what it stands for cannot be loaded."""


class DownloadError(ZooError):
    """A server answered, and not with what was asked for."""


class OfflineError(DownloadError):
    """No server could be reached, or the network is not to be used; what had arrived is kept."""


class GatedError(DownloadError):
    """The owner of a repository wants terms accepted, or a token, first."""


class ChecksumError(ZooError):
    """A file does not hold what its size and sha256 promise."""


class StorageError(ZooError):
    """No room, or no right to write, where files are to be kept."""


class DataError(MmadaptError, ValueError):
    """Images, labels, class names or features are not what a task needs."""


class OpsError(MmadaptError, ValueError):
    """An operation was given what it has no answer for, or a path that is not there was asked for."""


class MissingDependencyError(MmadaptError, ImportError):
    """An optional library is not installed; the hint is the line that installs it."""


def closest(word: str, options: Iterable[str], n: int = 3) -> list[str]:
    """The `n` names most like `word`, best first; empty when nothing is near."""
    import difflib

    return difflib.get_close_matches(word, list(options), n=n, cutoff=0.5)


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """A hint that names the nearest options, or all of them when they are few."""
    options = list(options)
    near = closest(word, options)
    if near:
        return "did you mean " + " or ".join(repr(name) for name in near) + "?"
    if 0 < len(options) <= 12:
        return "known: " + ", ".join(options)
    return ""


def no_attribute(module: str, name: str, options: Iterable[str]) -> AttributeError:
    """What a module of lazy names raises for one that it does not have."""
    hint = did_you_mean(name, options) if not name.startswith("_") else ""
    return AttributeError(
        f"module {module!r} has no attribute {name!r}" + (f"; {hint}" if hint else "")
    )
