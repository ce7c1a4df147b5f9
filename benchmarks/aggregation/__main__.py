"""Print all sides and write them, with the machine, to a dated file: `python -m benchmarks.aggregation`.

`--deployed` adds flwr's own processes (SuperLink, SuperNodes, HTTP): many minutes at the large shape. `--only small`
leaves the large shape out. The result is `benchmarks/results/aggregation-<date>.json`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from datetime import datetime, timezone
from statistics import median

from benchmarks.aggregation.bench import SideBySide, side_by_side
from benchmarks.aggregation.environment import PINS
from benchmarks.aggregation.workload import LARGE, SMALL, Shape
from benchmarks.figures import machine
from benchmarks.results import ROOT, code_commit

SHAPES: dict[str, tuple[Shape, int]] = {"small": (SMALL, 4), "large": (LARGE, 2)}  # with the number of clients


def main() -> None:
    """Measure, print, write."""
    options = _parser().parse_args()
    today = datetime.now(timezone.utc).date().isoformat()
    report = {"date": today, "machine": machine(), "commit": code_commit(), "peers": PINS, "shapes": {}}
    print(f"machine: {machine()}")
    for name in [options.only] if options.only else SHAPES:
        shape, n_clients = SHAPES[name]
        found = side_by_side(shape, n_clients, options.repeats, encodings=("int8", "int4"), deployed=options.deployed)
        _print(name, shape, n_clients, found)
        size = {"n_clients": n_clients, "n_tensors": shape.n_tensors, "fp32_bytes": shape.fp32_bytes}
        report["shapes"][name] = {**asdict(shape), **size, **asdict(found)}
    place = ROOT / "benchmarks" / "results" / f"aggregation-{today}.json"
    place.parent.mkdir(exist_ok=True)
    place.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten: {place.relative_to(ROOT)}")


def _print(name: str, shape: Shape, n_clients: int, found: SideBySide) -> None:
    print(f"\n{name}: {shape.n_tensors} tensors, {shape.fp32_bytes / 1e6:.1f} MB of fp32, {n_clients} clients")
    for side in found.seconds:
        totals = found.totals(side)
        each = ", ".join(f"{phase} {median(times):.2f}" for phase, times in found.seconds[side].items())
        share = f"  {100 * found.sent_bytes[side] / shape.fp32_bytes:.1f} % of fp32" if side in found.sent_bytes else ""
        print(f"  {side:20} {median(totals):9.2f} s [{min(totals):.2f}..{max(totals):.2f}]{share}  ({each})")
    for side, reason in found.absent.items():
        print(f"  {side:20} not measured: {reason}")
    print(f"  averaging A and B separately is off by {100 * found.factor_error:.0f} % of the mean update;")
    print(f"  int8 uses {100 * found.int8_share:.0f} % of its rounding bound")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aggregation", description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(SHAPES), help="one shape")
    parser.add_argument("--repeats", type=int, default=5, help="of every side")
    parser.add_argument("--deployed", action="store_true", help="flwr as it is deployed, too")
    return parser


if __name__ == "__main__":
    main()
