"""How fast: each part of the suite beside the plain way to do the same; and two runs compared.

    python benchmark.py decode --pairs val.json --task task/1s_20260128_020530 --output decode.json
    python benchmark.py load
    python benchmark.py train
    python benchmark.py adapter
    python benchmark.py prepare
    python benchmark.py products
    python benchmark.py compare old.json decode.json

Prints a table and writes all numbers as JSON, with device, versions and the limits of the device.
`compare` prints old, new and their ratio. Each part is a file of benchmarks/.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
import time
from pathlib import Path

if sys.flags.safe_path:            # python -P, PYTHONSAFEPATH
    sys.path.insert(0, str(Path(__file__).parent))

from base import UserError, as_json, log, now, parse_config, provenance, required
from machine.files import make_folder, read_json, write_json
from machine.running import run

BENCHMARKS = ("prepare", "extract", "train", "adapter", "products", "decode", "load")


@dataclasses.dataclass(frozen=True)
class Compare:
    """Print each figure of two outputs of benchmark.py, and new / old."""

    old: Path = required("the earlier output", positional=True)
    new: Path = required("the later output", positional=True)


def read_benchmark(path: Path) -> dict:
    results = read_json(path)
    if not isinstance(results, dict) or not str(results.get("kind", "")).startswith("benchmark"):
        raise UserError(f"{path} is no output of benchmark.py; wanted a file that --output named")
    return results


def figures(value, name: str = "") -> dict[str, float]:
    """{dotted name: number} of all numbers that are not those of single answers, flags or versions.
    """
    if isinstance(value, dict):
        parts = (figures(part, f"{name}.{key}" if name else str(key)) for key, part in value.items()
                 if key not in ("config", "provenance"))
        return {name: number for part in parts for name, number in part.items()}
    return {name: value} if isinstance(value, (int, float)) and not isinstance(value, bool) else {}


def print_comparison(old: dict, new: dict) -> None:
    for key in ("kind", "size", "device", "dtype", "gamma"):
        if old.get(key) != new.get(key):
            log(f"compare | WARNING | another {key}: {old.get(key)} -> {new.get(key)}")
    before, after = figures(old), figures(new)
    for name, value in after.items():
        if name in before:
            ratio = f"{value / before[name]:.3f}" if before[name] else "-"
            log(f"compare | {name} | {before[name]:.5g} -> {value:.5g} | {ratio}")
    if alone := sorted(before.keys() ^ after.keys()):
        log(f"compare | only in one of them: {', '.join(alone)}")


def compare(config: Compare) -> None:
    print_comparison(read_benchmark(config.old), read_benchmark(config.new))
    log(f"RESULT | {config.new} against {config.old}")


def measure(name: str, config) -> None:
    """One file of benchmarks/: measure(config) -> its numbers, show(results) logs its table,
    one_line(results).
    """
    benchmark, start = importlib.import_module(f"benchmarks.{name}"), time.monotonic()
    make_folder(config.output.resolve().parent)
    # before it may be written over
    old = read_benchmark(config.compare) if config.compare else None
    results = {
        "kind": f"benchmark {name}", "date": now(), "config": as_json(config),
        **benchmark.measure(config)
    }
    results |= {"seconds": time.monotonic() - start, "provenance": provenance()}
    write_json(config.output, results)
    benchmark.show(results)
    for row in results.get("wanted", []):
        measured = "none" if row["measured"] is None else f"{row['measured']:.4g}"
        of = results.get("wanted_of", "at real size on one H200")
        log(f"wanted {of} | {row['what']} | {measured} | {row['wanted']}")
    if old:
        print_comparison(old, read_json(config.output))
    log(f"RESULT | {config.output} | {benchmark.one_line(results)} | {results['seconds']:.0f} s")


def main() -> None:
    program, name, flags = sys.argv[0], (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if name in ("-h", "--help"):
        print(
            f"{__doc__}\n    python benchmark.py {'|'.join((*BENCHMARKS, 'compare'))} --help     "
            "the flags of each"
        )
        return
    if name not in (*BENCHMARKS, "compare"):
        raise UserError(
            f"{name!r}: wanted one of {', '.join((*BENCHMARKS, 'compare'))} (see benchmark.py "
            "--help)"
        )
    config_class = Compare if name == "compare" else importlib.import_module(
        f"benchmarks.{name}").Config
    sys.argv[0] = f"{program} {name}"                # argparse names the program by it
    try:
        config = parse_config(config_class, flags)
    finally:
        sys.argv[0] = program
    if name == "compare":
        compare(config)
    else:
        measure(name, config)


if __name__ == "__main__":
    run(main)
