"""What ``devmem-tcp lab setup`` does: kernel, driver, QEMU and tools, fetched once into the user's cache."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from devmem_tcp.errors import DevmemError
from devmem_tcp.lab.vm import kernels, programs
from devmem_tcp.lab.vm.apt import PrivateApt, Progress, unpack
from devmem_tcp.lab.vm.cache import Cache, build_once, read_manifest
from devmem_tcp.lab.vm.kernels import Kernel
from devmem_tcp.lab.vm.programs import Programs

PINNED_QEMU: Final = "1:11.1.3+ds-1~bpo13+1"
"""What the lab's facts were seen on; taken while the suite has it, else the newest of backports."""

_QEMU_PACKAGE: Final = "qemu-system-x86"
_OTHER_PACKAGES: Final = ("virtiofsd", "ethtool", "iperf3", "iproute2", "iputils-ping", "kmod", "tcpdump")


class Installation:
    """What is fetched and what is not, and the fetching of it.

    Args:
        mirror: as of ``PrivateApt``.
    """

    def __init__(self, cache: Cache, progress: Progress, *, mirror: str | None = None) -> None:
        self._cache: Final = cache
        self._progress: Final = progress
        self._mirror: Final = mirror
        self._opened: PrivateApt | None = None

    def kernel(self, wanted: str | None = None) -> Kernel:
        """Return a kernel of the suites, fetched if it is not in the cache.

        Args:
            wanted: a release or the start of one; None: one that is in the cache, or else as ``kernels.choose``.

        Raises:
            DevmemError: there is none like it, or it cannot be fetched.
        """
        if held := self.held_kernels(wanted):
            return kernels.unpacked(self._cache.kernels / held[0])
        self.programs()  # kmod among them
        apt = self._apt()
        release = kernels.choose(kernels.releases(apt.names(kernels.PACKAGE_PATTERN)), wanted)
        packages = {name: apt.versions(name)[0] for name in (f"{part}-{release}" for part in kernels.PARTS)}
        folder = self._cache.kernels / release
        self._build(folder, packages, f"kernel {release}", lambda root: self._index_modules(root, release))
        return kernels.unpacked(folder)

    def held_kernels(self, wanted: str | None = None) -> list[str]:
        """Return the releases in the cache that are like ``wanted``: the pinned one first, then the newest."""
        folders = self._cache.kernels.iterdir() if self._cache.kernels.exists() else ()
        names = [name for folder in folders for name in read_manifest(folder)]
        held = kernels.releases(names)
        if wanted is None:
            return sorted(held, key=lambda release: release != kernels.PINNED_RELEASE)
        try:
            return [kernels.choose(held, wanted)]
        except DevmemError:
            return []

    def programs(self) -> Programs:
        """Return QEMU, virtiofsd and the guest's tools, fetched if they are not in the cache."""
        folder = self._cache.programs
        if not self.held_programs():
            apt = self._apt()
            versions = apt.versions(_QEMU_PACKAGE)
            version = PINNED_QEMU if PINNED_QEMU in versions else versions[0]
            packages = apt.plan([f"{_QEMU_PACKAGE}={version}", *_OTHER_PACKAGES])
            if _QEMU_PACKAGE not in packages:
                raise DevmemError("apt found no way to put QEMU and its libraries together")
            self._build(folder, packages, "QEMU and tools", lambda root: programs.write_tool_wrappers(root, folder))
        return programs.unpacked(folder)

    def held_programs(self) -> dict[str, str]:
        """Return the packages (name to version) of the programs in the cache; empty if they are not there."""
        return read_manifest(self._cache.programs)

    def _apt(self) -> PrivateApt:
        if self._opened is None:
            apt = PrivateApt(self._cache.apt, mirror=self._mirror)
            self._progress("package lists", 0.0)
            apt.update()
            self._opened = apt
        return self._opened

    def _build(self, folder: Path, packages: Mapping[str, str], what: str, finish: Callable[[Path], None]) -> None:
        def fill(root: Path) -> None:
            debs = self._apt().download(packages, self._cache.debs, self._progress, f"fetching {what}")
            unpack(debs, root, self._progress, f"unpacking {what}")
            finish(root)
            self._progress(f"{what} ready", 1.0)

        folder.parent.mkdir(parents=True, exist_ok=True)
        build_once(folder, packages, fill)
        shutil.rmtree(self._cache.debs, ignore_errors=True)

    def _index_modules(self, root: Path, release: str) -> None:
        """Make ``modules.dep``, which modprobe goes by: the packages leave that to their installation."""
        self._progress("indexing modules", 0.0)
        loader, *arguments = programs.loader_command(self._cache.programs, "usr/bin/kmod")
        subprocess.run([loader, "--argv0", "depmod", *arguments, "-b", root / "usr", release], check=True)
