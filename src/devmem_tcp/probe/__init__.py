"""What this machine and its NICs have for devmem TCP: checks, each with what was found, what is needed, and the fix."""

from devmem_tcp.probe.finding import reasons
from devmem_tcp.probe.machine import probe_kernel, probe_machine

__all__ = ["probe_kernel", "probe_machine", "reasons"]
