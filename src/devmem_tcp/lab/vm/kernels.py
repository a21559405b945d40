"""Kernels: which of a suite's to take, what a guest needs of one, and the user's own."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from devmem_tcp.errors import DevmemError

PINNED_RELEASE: Final = "7.3.4+deb13-amd64"
"""What the lab's facts were seen on; taken while the suite has it, else the newest."""

PARTS: Final = ("linux-base", "linux-binary", "linux-modules")
"""The packages of one release, each followed by ``-RELEASE``: configuration, vmlinuz, modules."""

PACKAGE_PATTERN: Final = r"^linux-(base|binary|modules)-[0-9.]+[+][^-]+-amd64$"
_RELEASE: Final = re.compile(r"linux-(?P<part>base|binary|modules)-(?P<release>(?P<version>[0-9.]+)\+[^-]+-amd64)")
_BUILD: Final = "usr/lib/modules"


@dataclass(frozen=True)
class Kernel:
    """A kernel to boot.

    ``modules`` is its ``/lib/modules/RELEASE`` folder, or None where everything is built in.
    """

    name: str
    image: Path
    modules: Path | None

    def module_files(self, name: str) -> list[Path]:
        """Return the files to load for a module, those it depends on first; empty if it is not a module here."""
        if self.modules is None:
            return []
        try:
            listed = (self.modules / "modules.dep").read_text(encoding="utf-8")
        except FileNotFoundError:
            listed = ""
        for line in listed.splitlines():
            path, _, needs = line.partition(":")
            if _module_name(path) == name:
                return [self.modules / one for one in (*reversed(needs.split()), path)]
        return sorted(path for path in self.modules.rglob(f"{name}.ko*"))[:1]


def releases(package_names: Iterable[str]) -> list[str]:
    """Return the kernel releases whose packages are all there, newest first."""
    parts: dict[str, set[str]] = {}
    versions: dict[str, tuple[int, ...]] = {}
    for name in package_names:
        if match := _RELEASE.fullmatch(name):
            parts.setdefault(match["release"], set()).add(match["part"])
            versions[match["release"]] = tuple(map(int, match["version"].strip(".").split(".")))
    whole = [release for release, found in parts.items() if {"base", "binary", "modules"} <= found]
    return sorted(whole, key=lambda release: versions[release], reverse=True)


def choose(available: list[str], wanted: str | None) -> str:
    """Return the release to take.

    Args:
        available: newest first.
        wanted: a release or the start of one (``7.2`` is the newest 7.2); None: the pinned one, else the newest.

    Raises:
        DevmemError: there is none like it.
    """
    if wanted is None:
        if not available:
            raise DevmemError("the suites hold no kernel that the lab can use", hint="bring one with --kernel PATH")
        return PINNED_RELEASE if PINNED_RELEASE in available else available[0]
    for release in available:
        if release.startswith(wanted) and not release[len(wanted) :][:1].isdigit():
            return release
    raise DevmemError(f"no kernel {wanted}", hint=f"there are: {', '.join(available) or 'none'}; or give a path")


def unpacked(folder: Path) -> Kernel:
    """Return the kernel that its packages, unpacked below ``folder``, are.

    Raises:
        DevmemError: there is no image below ``folder``.
    """
    for image in sorted((folder / _BUILD).glob("*/vmlinuz")):
        return Kernel(image.parent.name, image, image.parent)
    raise DevmemError(
        f"no kernel image in {folder}", hint="devmem-tcp lab setup makes it anew once that folder is removed"
    )


def brought(path: Path, modules: Path | None) -> Kernel:
    """Return a kernel of the user's own.

    Args:
        path: a bzImage, or a kernel source tree it was built in.
        modules: the ``lib/modules/RELEASE`` folder that ``make modules_install`` made, if the guest needs modules.

    Raises:
        DevmemError: a path is not there or is not what it should be.
    """
    image = path / "arch/x86/boot/bzImage" if path.is_dir() else path
    if not image.is_file():
        raise DevmemError(
            f"{image}: no kernel image", hint="--kernel takes a release, a bzImage, or a built source tree"
        )
    if modules is not None and not modules.is_dir():
        raise DevmemError(
            f"{modules}: no folder of modules", hint="--modules takes lib/modules/RELEASE of modules_install"
        )
    return Kernel(str(image), image.absolute(), modules and modules.absolute())


def _module_name(path: str) -> str:
    return path.rpartition("/")[2].partition(".ko")[0].replace("-", "_")
