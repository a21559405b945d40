"""``devmem-tcp``, or ``tensor_end.py``, without privileges: ``unprivileged.py USER PROGRAM [ARGUMENT]...``."""

from __future__ import annotations

import importlib
import pkgutil
import sys

import tensor_end
from broker_client import become
from devmem_tcp.cli.main import main

_NEEDED = ("arrays", "broker", "cli", "kernel", "memory", "probe", "safetensors", "software", "transport")


def import_all() -> None:
    """Import what would be imported later, from where another user may not read."""
    importlib.import_module("xxhash")
    for package in _NEEDED:
        name = f"devmem_tcp.{package}"
        for module in pkgutil.walk_packages(importlib.import_module(name).__path__, f"{name}."):
            importlib.import_module(module.name)


if __name__ == "__main__":
    _, user, program, *arguments = sys.argv
    import_all()
    become(int(user))
    if program == "devmem-tcp":
        sys.argv = [program, *arguments]
        main()
    else:
        tensor_end.main(*arguments)
