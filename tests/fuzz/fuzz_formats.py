"""Fuzz the importers: mutated files of every format are read, or refused with one line; never anything else.

    python tests/fuzz/fuzz_formats.py [--format NAME]... [--seconds N] [--cases N] [--seed N] [--keep FOLDER]

Each sample runs in a process of its own, so that a crash of a library is found too. Prints one JSON line per sample;
exits 1 if an import did what it may not, the offending files being kept in a folder that the message names.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
for part in ("tests/logs/formats", "data", "cli", "."):
    sys.path.insert(0, str(ROOT / part))

from mutations import Violation, case, check  # noqa: E402
from samples import SAMPLES, Sample  # noqa: E402

MEMORY = 6 << 30
LONGEST = 20.0
"""Seconds that one small file may take."""


def fuzz(sample: Sample, work: Path, seconds: float, cases: int, seed: int) -> dict[str, Any]:
    """Import mutated files until the time is over, all problems or the first of each kind being counted."""
    counts: dict[str, Any] = {"sample": sample.name, "cases": 0, "accepted": 0, "refused": 0, "violations": {}}
    end = time.monotonic() + seconds
    while time.monotonic() < end and counts["cases"] < cases:
        number = seed + counts["cases"]
        files, format = case(sample, number)
        root = work / "case"
        shutil.rmtree(root, ignore_errors=True)
        source = sample.build(root, files[""], {k: v for k, v in files.items() if k})
        (root / "case.txt").write_text(f"{sample.name} --seed {number} --cases 1, imported as {format}\n")
        started = time.monotonic()
        try:
            accepted = check(source, root, format)
            if time.monotonic() - started > LONGEST:
                raise Violation(f"an import of {source.stat().st_size} bytes took more than {LONGEST:.0f} s")
        except Violation as e:
            kept = work / f"case-{number}"
            shutil.copytree(root, kept, dirs_exist_ok=True)
            counts["violations"].setdefault(_kind(e), f"{kept} (as {format})")
        else:
            counts["accepted" if accepted else "refused"] += 1
        counts["cases"] += 1
    shutil.rmtree(work / "case", ignore_errors=True)
    return counts


def _kind(error: Violation) -> str:
    """Return the message, and for an exception of another kind the line of oirl that it came from."""
    cause, place = error.__cause__, ""
    while cause is not None and cause.__traceback__ is not None:
        trace = cause.__traceback__
        while trace is not None:
            file = trace.tb_frame.f_code.co_filename
            if f"{os.sep}oirl{os.sep}" in file:
                place = f" at {Path(file).name}:{trace.tb_lineno}"
            trace = trace.tb_next
        break
    return f"{error}"[:160] + place


def run_apart(name: str, keep: Path, seconds: float, cases: int, seed: int) -> dict[str, Any]:
    """Run the fuzzing of one sample in a process of its own."""
    work = keep / name
    work.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--child", str(work), "--format", name]
    command += ["--seconds", str(seconds), "--cases", str(cases), "--seed", str(seed)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 120, check=False)
        failed = f"the process ended with {done.returncode}: {done.stderr.strip()[-300:]}" if done.returncode else ""
        output = done.stdout
    except subprocess.TimeoutExpired:
        failed, output = "an import does not end", ""
    if failed:
        return {"sample": name, "violations": {failed: str(work / "case")}}
    found: dict[str, Any] = json.loads(output)
    return found


def main() -> int:
    """Read the arguments and fuzz."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--format", action="append", help="a format or a sample; all by default")
    parser.add_argument("--seconds", type=float, default=20.0, help="per sample")
    parser.add_argument("--cases", type=int, default=10**9, help="at most, per sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for offending files; a new temporary one by default")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        sample = SAMPLES[arguments.format[0]]
        print(json.dumps(fuzz(sample, arguments.child, arguments.seconds, arguments.cases, arguments.seed)))
        return 0
    wanted = arguments.format or list(SAMPLES)
    chosen = [s.name for s in SAMPLES.values() if s.name in wanted or s.format in wanted]
    unknown = [w for w in wanted if not any(w in (s.name, s.format) for s in SAMPLES.values())]
    if unknown:
        parser.error(f"no sample of {unknown[0]!r}; there: {', '.join(SAMPLES)}")
    keep = arguments.keep or Path(tempfile.mkdtemp(prefix="oirl-fuzz-"))
    bad = False
    for name in chosen:
        found = run_apart(name, keep, arguments.seconds, arguments.cases, arguments.seed)
        print(json.dumps(found), flush=True)
        for violation, place in found["violations"].items():
            bad = True
            print(f"{name}: {violation}; the input is in {place}", file=sys.stderr)
    if not bad and not arguments.keep:
        shutil.rmtree(keep, ignore_errors=True)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
