"""The slowest obvious version of what the library does, on the CPU, for all ranks at once."""

from reference.moe import Arrival, Layout, Sent, combine, dispatch, layout

__all__ = ["Arrival", "Layout", "Sent", "combine", "dispatch", "layout"]
