"""Plant defects in a copy of the sources, one at a time, and tell which test catches each.

    python tests/planted.py --only layout-bound nmt-topk     # the list is tests/planted_defects.py

For each defect the tests named beside it run first, up to the first failure, then what
``make test`` runs. A test counts only if it passes where nothing is planted; a crash or a time-out
of the tests counts as caught. The table goes to ``tests/results/planted.json``, too.
"""

import argparse
import datetime
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import NamedTuple

from planted_copy import (
    COMPILED,
    PYTHON,
    ROOT,
    SWITCH,
    TREE,
    VENV,
    Variables,
    planted,
    prepare,
    start,
    update,
)
from planted_defects import CUDA, DEFECTS, TRITON, Defect

RESULTS = ROOT / "tests" / "results" / "planted.json"
# The kernels that this machine has no device for are run by an interpreter and by an emulation.
INTERPRETED: Variables = (("TRITON_INTERPRET", "1"),)
EMULATED: Variables = (
    ("PYTHONPATH", str(TREE / "tests")),
    ("PYTEST_ADDOPTS", "-p emulated_cuda -k 'not default_backend'"),
)
SMALL_WAVES: Variables = (("ATTN_EXT_EMULATED_DEFINITIONS", "-DATTN_EXT_CUDA_WAVE_BYTES=4096"),)


class Caught(NamedTuple):
    test: str | None  # the first that failed
    how: str  # "failed", "time-out" or the status of a crash
    stage: str | None  # "named", or the target of make
    seconds: int
    variables: Variables


FAILURE = re.compile(r"^(?:FAILED|ERROR) (\S+?\.py(?:::.*?)?)(?: - .*)?$", re.M)


def first_failure(run: subprocess.CompletedProcess) -> tuple[str | None, str]:
    """The test that failed first, and how; of a crash or a time-out, the one that ran."""
    if run.returncode in (0, 5):  # 5: nothing was collected
        return None, "passed"
    if failed := FAILURE.search(run.stdout):
        return failed[1], "failed"
    begun = re.findall(r"^(tests/\S+\.py::.+?)(?: (?:[A-Z]+ |Fatal ).*)?$", run.stdout, re.M)
    how = "time-out" if run.returncode is None else f"status {run.returncode}"
    return begun[-1].strip() if begun else "before any test", how


def pytest(tests: list[str], *options: str) -> list[str]:
    return [str(PYTHON), "-m", "pytest", "-v", "-p", "no:cacheprovider", *options, *tests]


def without(tests: Iterable[str]) -> list[str]:
    return ["-x", *(word for test in sorted(tests) for word in ("--deselect", test))]


def make(target: str, options: list[str]) -> list[str]:
    """What the Makefile's target runs, with one worker."""
    options = ["-v", "-p", "no:cacheprovider", *options]
    command = ["make", "-o", f"{VENV}/.built", f"VENV={VENV}", "WORKERS=1", target]
    return [*command, f"ARGS={shlex.join(options).replace('$', '$$')}"]


def variables_of(defect: Defect) -> Variables:
    """For the tests named."""
    if defect in CUDA:
        return EMULATED + (SMALL_WAVES if "wave" in defect.name else ())
    return INTERPRETED if defect in TRITON or "test_triton.py" in defect.tests else ()


def catch(defect: Defect, suite: str | None, timeout: float, left_out: set[str]) -> Caught:
    """Which test catches a defect, if one does."""
    began = time.monotonic()
    path = TREE / defect.file
    before = path.read_text()
    switch: Variables = ((SWITCH, defect.name),) if defect.name in COMPILED else ()
    if not switch:
        path.write_text(planted(before, defect, defect.new))
    try:
        stage, variables = "named", variables_of(defect)
        command = pytest(defect.tests.split(), *without(left_out))
        test, how = first_failure(start(command, variables + switch, timeout))
        if test is not None and how == "time-out":  # of this test, or of all before it?
            command = pytest([test.partition(" ")[0]], *without(left_out))
            test, how = first_failure(start(command, variables + switch, timeout))
        if test is None and suite is not None:
            run = start(make(suite, without(left_out)), switch, 20 * timeout)
            test, how = first_failure(run)
            interpreted = "\nTRITON_INTERPRET=1 " in run.stdout  # make says what it runs
            stage, variables = suite, INTERPRETED if interpreted else ()
    finally:
        path.write_text(before)
    return Caught(test, how, stage, round(time.monotonic() - began), variables)


def by_variables(pairs: Iterable[tuple[Variables, str]]) -> dict[Variables, set[str]]:
    """Tests by what the environment holds for them."""
    groups: dict[Variables, set[str]] = {}
    for variables, test in pairs:
        groups.setdefault(variables, set()).add(test)
    return groups


def check_names(defects: list[Defect]) -> None:
    """That the tests named are there and can be collected."""
    pairs = ((variables_of(defect), test) for defect in defects for test in defect.tests.split())
    for variables, tests in by_variables(pairs).items():
        run = start(pytest(sorted(tests), "--collect-only", "-q"), variables)
        if run.returncode:
            sys.exit(run.stdout[-4000:])


def failing_unchanged(results: Iterable[Caught]) -> set[str]:
    """Those of the tests that caught something which fail where nothing is planted, too."""
    failing: set[str] = set()
    pairs = ((r.variables, r.test) for r in results if r.test and "::" in r.test)
    for variables, tests in by_variables(pairs).items():
        run = start(pytest(sorted(tests)), variables)
        if run.returncode not in (0, 1):
            sys.exit(f"where nothing is planted:\n{run.stdout[-4000:]}")
        failing |= tests.intersection(FAILURE.findall(run.stdout))
    return failing


def write_results(found: dict[str, Caught], suite: str | None) -> None:
    """Add what was found to the results of other defects of the list."""
    known = json.loads(RESULTS.read_text())["defects"] if RESULTS.exists() else {}
    day = datetime.date.today().isoformat()
    ran = "the tests named" if suite is None else f"the tests named, then make {suite}"
    for name, caught in found.items():
        values = {"test": caught.test, "how": caught.how, "seconds": caught.seconds}
        known[name] = {**values, "ran": ran, "day": day}
    known = {defect.name: known[defect.name] for defect in DEFECTS if defect.name in known}
    count = sum(result["test"] is not None for result in known.values())
    content = {"caught": count, "of": len(known), "list": len(DEFECTS), "defects": known}
    update(RESULTS, f"{json.dumps(content, indent=1)}\n".encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = [defect.name for defect in DEFECTS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help="plant only these")
    parser.add_argument("--list", action="store_true", help="show them, plant none")
    parser.add_argument("--named-only", action="store_true", help="run only the tests named")
    parser.add_argument(
        "--suite", default="test", help="target of make that runs after them (default test)"
    )
    parser.add_argument("--timeout", type=float, default=600, help="seconds, of the tests named")
    options = parser.parse_args()
    chosen = [d for d in DEFECTS if not options.only or d.name in options.only]
    if options.list:
        for defect in chosen:
            print(f"{defect.name:32}{defect.file}\n    {defect.seen}\n    {defect.tests}")
        return
    prepare(chosen)
    check_names(chosen)
    suite = None if options.named_only else options.suite
    left_out: set[str] = set()
    found: dict[str, Caught] = {}
    pending = chosen
    while pending:
        for defect in pending:
            result = found[defect.name] = catch(defect, suite, options.timeout, left_out)
            verdict = f"{result.test} ({result.how})" if result.test else "MISSED"
            print(f"{defect.name:32}{result.seconds:5} s  {verdict}", flush=True)
            write_results({defect.name: result}, suite)
        failing = failing_unchanged(found[defect.name] for defect in pending)
        left_out |= failing
        pending = [defect for defect in pending if found[defect.name].test in failing]
        if pending:
            print("again without what fails with nothing planted:", *sorted(failing), flush=True)
    print(f"{sum(result.test is not None for result in found.values())} of {len(chosen)} caught")


if __name__ == "__main__":
    main()
