"""The demo: a MoE layer and a MoE language model over several ranks, each checked against one rank (`make demo`)."""
from __future__ import annotations

import time

import launcher
import moe_layer
import moe_lm


def main(argv: list[str] | None = None) -> int:
    """Runs both examples; returns 0 if both agree with their references."""
    options = launcher.parse_options(__doc__, argv, default_steps=moe_lm.Settings.num_steps)
    common = ["--num-processes", str(options.num_processes), "--device", options.device]
    if options.ranks_per_node is not None:
        common += ["--ranks-per-node", str(options.ranks_per_node)]
    parts = {
        "MoE layer, forward and backward": lambda: moe_layer.main(common),
        "MoE language model, training": lambda: moe_lm.main([*common, "--steps", str(options.steps)]),
    }
    results = {}
    for name, run in parts.items():
        start = time.perf_counter()
        exit_code = run()
        results[name] = exit_code, time.perf_counter() - start

    launcher.print_header("Summary")
    for name, (exit_code, seconds) in results.items():
        print(f'{"FAIL" if exit_code else "PASS"}  {name:36}{seconds:5.0f} s')
    return max(exit_code for exit_code, _ in results.values())


if __name__ == "__main__":
    launcher.exit_with(main)
