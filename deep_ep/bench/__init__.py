"""Benchmarks: `python -m deep_ep bench intranode`, `internode` or `low-latency`. They measure and never judge."""
