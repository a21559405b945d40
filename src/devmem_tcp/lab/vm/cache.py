"""Where the lab keeps what it fetched, and the record that says a folder of it is complete."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_MANIFEST: Final = "manifest.json"
_RUNS_KEPT: Final = 10


@dataclass(frozen=True)
class Cache:
    """The lab's folder below the user's cache: ``apt``, ``debs``, ``programs``, ``kernels`` and ``runs``."""

    root: Path

    @classmethod
    def of_user(cls) -> Cache:
        """Return the cache of this user: ``$XDG_CACHE_HOME/devmem-tcp/lab``, by default below ``~/.cache``."""
        base = os.environ.get("XDG_CACHE_HOME", "")
        folder = Path(base) if os.path.isabs(base) else Path.home() / ".cache"  # a relative one is void: XDG's rule
        return cls(folder / "devmem-tcp" / "lab")

    @property
    def apt(self) -> Path:
        """The private directories of apt."""
        return self.root / "apt"

    @property
    def debs(self) -> Path:
        """Packages fetched and not yet unpacked; what an interrupted set-up goes on with."""
        return self.root / "debs"

    @property
    def programs(self) -> Path:
        """QEMU, virtiofsd and the guest's tools, unpacked, with their libraries."""
        return self.root / "programs"

    @property
    def kernels(self) -> Path:
        """One folder a kernel release."""
        return self.root / "kernels"

    @property
    def runs(self) -> Path:
        """One folder a run: its logs."""
        return self.root / "runs"

    def new_run(self) -> Path:
        """Make a folder for one run's logs and sockets; of the earlier ones the newest few are kept.

        A folder whose process still lives is never removed: its name ends with the process id.
        """
        self.runs.mkdir(parents=True, exist_ok=True)
        for old in sorted(self.runs.iterdir())[: -_RUNS_KEPT + 1]:
            if not Path("/proc", old.name.rpartition("-")[2]).exists():
                shutil.rmtree(old, ignore_errors=True)
        folder = self.runs / f"{time.strftime('%Y%m%d-%H%M%S')}-{time.monotonic_ns() % 1000:03d}-{os.getpid()}"
        folder.mkdir()
        return folder


def read_manifest(folder: Path) -> dict[str, str]:
    """Return the packages (name to version) that ``folder`` was made from; empty if it was never completed."""
    try:
        found = json.loads((folder / _MANIFEST).read_bytes())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    packages = found.get("packages") if isinstance(found, dict) else None
    return packages if isinstance(packages, dict) else {}


def build_once(folder: Path, packages: Mapping[str, str], fill: Callable[[Path], None]) -> bool:
    """Make ``folder`` from ``packages`` unless it is there, from just these; return whether it was made now.

    It is filled beside its place and moved there when complete, so that a folder with a manifest is whole, whatever
    interrupted an earlier attempt.

    Args:
        packages: name to version, exactly as ``read_manifest`` gives it back.
        fill: called with an empty folder; what it leaves there becomes ``folder``.
    """
    if read_manifest(folder) == packages:
        return False
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    fill(partial)
    (partial / _MANIFEST).write_text(json.dumps({"packages": dict(packages)}, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return True
