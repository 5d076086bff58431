"""Errors: one tree, a next step, and near names for unknown ones."""

from __future__ import annotations

import inspect

import pytest

from mmadapt import errors
from mmadapt.errors import MmadaptError, closest, did_you_mean

TREE = {
    "AdapterError": ValueError,
    "SiteError": LookupError,
    "AttachError": ValueError,
    "MergeError": ValueError,
    "CheckError": RuntimeError,
    "AdapterFileError": ValueError,
    "WrongBackboneError": errors.AdapterFileError,
    "BackboneError": TypeError,
    "ZooError": LookupError,
    "DownloadError": errors.ZooError,
    "OfflineError": errors.DownloadError,
    "GatedError": errors.DownloadError,
    "ChecksumError": errors.ZooError,
    "StorageError": errors.ZooError,
    "DataError": ValueError,
    "OpsError": ValueError,
    "MissingDependencyError": ImportError,
}


def test_every_error_is_in_the_tree_and_has_a_built_in_parent() -> None:
    found = {
        name: cls
        for name, cls in inspect.getmembers(errors, inspect.isclass)
        if issubclass(cls, Exception) and cls is not MmadaptError
    }
    assert set(found) == set(TREE)
    for name, cls in found.items():
        assert issubclass(cls, MmadaptError)
        assert issubclass(cls, TREE[name])
        assert cls.__doc__


def test_the_hint_stands_on_a_line_of_its_own() -> None:
    error = errors.SiteError("no site 'x'", "look at mmadapt.sites(model)")
    assert str(error) == "no site 'x'\n  Next: look at mmadapt.sites(model)"
    assert (error.message, error.hint) == ("no site 'x'", "look at mmadapt.sites(model)")


def test_without_a_hint_the_message_stands_alone() -> None:
    assert str(errors.SiteError("no site 'x'")) == "no site 'x'"


def test_a_lookup_error_prints_its_text_not_its_repr() -> None:
    assert str(errors.ZooError("first\nsecond")) == "first\nsecond"


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("botleneck", "did you mean 'bottleneck'?"),
        ("zzz", "known: bottleneck, lora"),
    ],
)
def test_the_nearest_name_is_offered_or_all_when_few(word: str, expected: str) -> None:
    assert did_you_mean(word, ["bottleneck", "lora"]) == expected


def test_nothing_is_offered_where_nothing_is_near_and_the_list_is_long() -> None:
    assert did_you_mean("zzz", [f"name{i}" for i in range(40)]) == ""
    assert did_you_mean("zzz", []) == ""


def test_options_may_come_from_a_generator() -> None:
    assert did_you_mean("lara", (name for name in ("lora", "bottleneck"))) == "did you mean 'lora'?"
    assert closest("lara", iter(["lora"])) == ["lora"]
