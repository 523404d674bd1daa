"""``python -m peft_kernels env | explain | demo | bench``."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from peft_kernels import environment
from peft_kernels.version import __version__


def _size(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 or more, got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m peft_kernels", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    env = commands.add_parser("env", help="versions, devices, and which backend serves each op")
    env.add_argument("--json", action="store_true", help="print JSON")

    explain = commands.add_parser(
        "explain", help="which backend runs one shape, and why not others"
    )
    explain.add_argument("--op", choices=sorted(environment.EXPLAINED), default="lora_linear")
    for flag, default in environment.SIZES.items():
        short = flag.removesuffix("_features")
        explain.add_argument(f"--{short}", dest=flag, type=_size, default=default, metavar="N")
    explain.add_argument("--dtype", choices=environment.DTYPES, default="bfloat16")
    explain.add_argument(
        "--device", default="cpu", help="cpu, cuda or cuda:1 (default: %(default)s)"
    )
    explain.add_argument("--dropout", type=float, default=0.0, metavar="P")
    explain.add_argument("--backend", help="as if it were demanded")

    # Their own parsers read what follows, --help included.
    commands.add_parser("demo", help="train on real digits, eager against fused", add_help=False)
    commands.add_parser("bench", help="measure, or --tune tiles (source checkout)", add_help=False)
    return parser


def _env(as_json: bool) -> int:
    # A terminal that knows no UTF-8 must not end the report.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    sections = environment.report()
    print(json.dumps(sections, indent=2, default=str) if as_json else environment.render(sections))
    return 0


def _explain(options: dict[str, object]) -> int:
    explain_op = environment.EXPLAINED[str(options.pop("op"))]
    try:
        print(explain_op(**options))
    except (TypeError, ValueError, RuntimeError, AssertionError, ImportError) as error:
        print(f"explain: {error}", file=sys.stderr)
        return 2
    return 0


def _demo(arguments: list[str]) -> int:
    from peft_kernels.demo.main import main as demo

    return demo(arguments)


def _bench(arguments: list[str]) -> int:
    runner = Path(__file__).resolve().parent.parent / "bench" / "run.py"
    if not runner.is_file():
        print(
            "bench: the benchmarks live in the source tree, not in the installed package: "
            "clone the repository and run `make bench` there",
            file=sys.stderr,
        )
        return 2
    if "--tune" not in arguments:
        return subprocess.call([sys.executable, str(runner), *arguments])
    arguments.remove("--tune")
    paths = os.pathsep.join([str(runner.parent.parent), *filter(None, sys.path)])
    command = [sys.executable, "-m", "bench.tune", *arguments]
    return subprocess.call(command, env=os.environ | {"PYTHONPATH": paths})


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    given = vars(options)
    command = given.pop("command")
    if command == "demo":
        return _demo(rest)
    if command == "bench":
        return _bench(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return _env(given["json"]) if command == "env" else _explain(given)


if __name__ == "__main__":
    sys.exit(main())
