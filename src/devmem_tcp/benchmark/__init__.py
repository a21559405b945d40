"""Measure devmem-tcp itself between two ends: what is measured, how, and the report of it. See docs/bench.md."""
