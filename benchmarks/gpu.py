"""Everything that is to be known about one GPU, in one command of at most ten minutes.

    python benchmarks/gpu.py --output gpu-output                 # all parts, ten minutes
    python benchmarks/gpu.py --output gpu-output --parts refine --minutes 8 --text book.txt
    python benchmarks/gpu.py --output dry --dry                  # tiny sizes on the CPU: only shows that it runs

The parts are

* tests: the tests that are marked ``cuda``;
* losses: time and memory of lift, field and objectives, beside plain PyTorch, eager and compiled;
* step: a whole training step of the paper's size, eager and compiled;
* sampling: the samplers against the published algorithm with dense float64 tensors;
* equality: losses and gradients against those of the CPU, samples in any split into batches, TF32;
* refine: a base trained from scratch, four refinements of it, and samples of all to be judged later.

Each part runs in a process of its own and has a share of the time. Time that a part does not need goes to the parts
after it. A part that fails or is late is named, keeps the rows that it has finished, and does not stop the others. The
folder receives ``gpu.json`` with all figures, ``gpu.md`` with the same as tables, ``tests.txt``, and ``samples.zip``.
Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SHARES = {"tests": 10, "losses": 8, "step": 16, "sampling": 7, "equality": 4, "refine": 55}
GRACE = 10.0  # seconds after which a part that is late is ended
ROOT = Path(__file__).parents[1]

Result = dict[str, Any]


def main() -> None:
    """Run the chosen parts, one after the other, and write their results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--parts", nargs="+", choices=SHARES, default=list(SHARES), help="default: all")
    parser.add_argument("--minutes", type=float, default=10.0, help="time for all parts together; default 10")
    parser.add_argument("--text", nargs="+", type=Path, default=[], help="text files for the refinement")
    parser.add_argument("--device", default="cuda", help="default cuda")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU")
    options = parser.parse_args()
    if options.dry:
        options.device = "cpu"
    options.output, options.text = options.output.resolve(), [path.resolve() for path in options.text]
    options.output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    results: dict[str, Result] = {}
    for number, name in enumerate(options.parts):
        ahead = sum(SHARES[other] for other in options.parts[number:])
        seconds = (end - time.monotonic() - GRACE) * SHARES[name] / ahead
        print(f"{name}: {seconds:.0f} seconds at most", flush=True)
        results[name] = run_tests(options, seconds) if name == "tests" else run_part(options, name, seconds)
        print(f"  {results[name]['state']} after {results[name]['seconds']:.0f} seconds", flush=True)
        write(options, results)
    failed = [name for name, result in results.items() if result["state"] != "complete"]
    print(f"not complete: {', '.join(failed)}" if failed else "all parts are complete")
    sys.exit(bool(failed))


def run_part(options: argparse.Namespace, name: str, seconds: float) -> Result:
    """Run a part in a process of its own; return what it has written, and how it ended."""
    file = options.output / f".{name}.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_parts.py"), name, str(file), "--seconds", str(seconds)]
    command += ["--device", options.device, *(["--dry"] if options.dry else [])]
    command += ["--text", *map(str, options.text)] if options.text else []
    state, output, took = ended(command, seconds + GRACE)
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"rows": []}
    file.unlink(missing_ok=True)
    if state != "complete":
        found["error"] = output[-3000:]
    return {"state": state, "seconds": took, **found}


def run_tests(options: argparse.Namespace, seconds: float) -> Result:
    """Run the tests that are marked ``cuda``; their output goes into a file."""
    command = [sys.executable, "-m", "pytest", "tests/test_cuda.py", "-m", "cuda", "-q", "-p", "no:cacheprovider"]
    state, output, took = ended([*command, "--durations=10", f"--cuda-device={options.device}"], seconds + GRACE)
    (options.output / "tests.txt").write_text(output, encoding="utf-8")
    lines = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR")) or " in " in line]
    return {"state": state, "seconds": took, "rows": [{"result": line} for line in lines[-40:]]}


def ended(command: list[str], seconds: float) -> tuple[str, str, float]:
    """Run a command; return how it ended, what it printed, and the seconds that it took."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    start = time.monotonic()
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
            state = "complete" if process.returncode == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # compilers that it has started as well
            output, state = process.communicate()[0], "late"
    return state, output, time.monotonic() - start


def write(options: argparse.Namespace, results: dict[str, Result]) -> None:
    """Write all results so far, as JSON and as Markdown."""
    machine = next((result["machine"] for result in results.values() if "machine" in result), options.device)
    when = time.strftime("%Y-%m-%d")
    report = {"machine": machine, "date": when, "dry": options.dry, "parts": results}
    (options.output / "gpu.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    lines = [f"# Measured on {machine}, {when}{', a dry run of tiny sizes' if options.dry else ''}"]
    for name, result in results.items():
        lines += ["", f"## {name}: {result['state']}, {result['seconds']:.0f} s", *result.get("notes", [])]
        for columns, rows in tables(result["rows"]):
            lines += ["", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
            lines += ["| " + " | ".join(cell(row[column]) for column in columns) + " |" for row in rows]
        if "error" in result:
            lines += ["", "```text", *result["error"].splitlines()[-30:], "```"]
    (options.output / "gpu.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def tables(rows: list[Result]) -> list[tuple[list[str], list[Result]]]:
    """Return the rows in groups of those with the same columns."""
    groups: dict[tuple[str, ...], list[Result]] = {}
    for row in rows:
        groups.setdefault(tuple(row), []).append(row)
    return [(list(columns), members) for columns, members in groups.items()]


def cell(value: object) -> str:
    """Return a figure as it stands in a table."""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")


if __name__ == "__main__":
    main()
