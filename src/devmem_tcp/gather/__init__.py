"""Pieces to contiguous: a pure plan, and its execution by the CPU."""

from devmem_tcp.gather.host import gather
from devmem_tcp.gather.plan import GatherPlan, plan_gather

__all__ = ["GatherPlan", "gather", "plan_gather"]
