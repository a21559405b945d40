"""The blocking and the asyncio door take the same arguments, and what both pass on is what sessions know."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, Unpack, get_type_hints

import pytest

import devmem_tcp as dmt
from devmem_tcp import aio, transport
from devmem_tcp.transport.terms import SessionArguments, SessionOptions
from tensor_ends import LOOPBACK

DOORS = [(transport.open_receiver, aio.open_receiver), (transport.open_sender, aio.open_sender)]


@pytest.mark.parametrize(("blocking", "awaited"), DOORS, ids=["receiver", "sender"])
def test_both_doors_take_the_same_arguments(blocking: Callable[..., Any], awaited: Callable[..., Any]) -> None:
    first, *others = inspect.signature(blocking).parameters.values()
    assert [first, *others] == list(inspect.signature(awaited).parameters.values())
    assert first.name == "nic"
    assert all(one.kind is one.KEYWORD_ONLY and one.default is not one.empty for one in others[:-1])
    assert others[-1].kind is inspect.Parameter.VAR_KEYWORD
    assert get_type_hints(blocking)["session"] == Unpack[SessionArguments]


def test_what_is_passed_on_is_what_sessions_are_made_of() -> None:
    known = get_type_hints(SessionOptions)
    assert get_type_hints(SessionArguments) == {
        field.name: known[field.name] for field in dataclasses.fields(SessionOptions)
    }
    assert not SessionArguments.__required_keys__


@pytest.mark.parametrize("door", [transport.open_receiver, transport.open_sender])
def test_an_argument_that_there_is_not_is_named_and_nothing_stays(door: Callable[..., Any]) -> None:
    with dmt.open_nic("soft0", backend="software") as nic, pytest.raises(TypeError, match="kye"):
        door(nic, listen=LOOPBACK, kye=bytes(32))


@pytest.mark.parametrize(("blocking", "awaited"), DOORS, ids=["receiver", "sender"])
def test_help_names_every_argument(blocking: Callable[..., Any], awaited: Callable[..., Any]) -> None:
    told = inspect.getdoc(blocking)
    assert told is not None
    names = [name for name in inspect.signature(blocking).parameters if name != "nic"]
    assert [name for name in names if f"\n    {name}: " not in told] == []
    assert all(
        f"\n    {field.name}: " in (inspect.getdoc(SessionOptions) or "")
        for field in dataclasses.fields(SessionOptions)
    )
    assert f"as ``devmem_tcp.transport.{blocking.__name__}``" in (inspect.getdoc(awaited) or "")
