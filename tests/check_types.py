"""Whether type checkers know every type of the public API: `make types`.

Asks pyright, on PATH, which of the symbols of attn_ext are without a known type; attn_ext.nmt is
an application, and triton_kernels are in Triton's language.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = ("attn_ext.nmt", "attn_ext.triton_kernels")


def main() -> None:
    command = ["pyright", "--verifytypes", "attn_ext", "--ignoreexternal", "--outputjson"]
    # Whose packages pyright reads is the first Python on PATH.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    try:
        symbols = json.loads(done.stdout)["typeCompleteness"]["symbols"]
    except (ValueError, KeyError):
        sys.exit(f"pyright did not answer: {done.stdout}{done.stderr}")
    public = [symbol for symbol in symbols if not symbol["name"].startswith(LEFT_OUT)]
    unknown = [s for s in public if not s["isTypeKnown"] or s["isTypeAmbiguous"]]
    for symbol in unknown:
        messages = [diagnostic["message"] for diagnostic in symbol["diagnostics"]]
        print(f"{symbol['name']}: {'; '.join(messages)}")
    known = len(public) - len(unknown)
    print(f"the types of {known} of {len(public)} symbols are known")
    sys.exit(bool(unknown) or not public)


if __name__ == "__main__":
    main()
