#!/usr/bin/env bash
# The C++ code under GCC's sanitizers: `make sanitize`, or bash tests/sanitize.sh PYTHON [WORKERS].
# It builds in build/sanitize, never in place of the checkout's own library.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "$1")
workers=${2:-2}
folder=$PWD/build/sanitize
reports=$folder/reports
# Python is built with -fwrapv, under which an overflow is no error.
address="-O1 -g -fno-omit-frame-pointer -fno-wrapv"
address+=" -fsanitize=address,undefined -fno-sanitize-recover=all"
thread="-O1 -g -fno-omit-frame-pointer -fsanitize=thread"

# Where a report may be false, or there is nothing to report on:
without=(
    --ignore=tests/test_leaks.py          # freed memory stays with AddressSanitizer for a while
    --ignore=tests/test_kept_memory.py    # nothing is kept, or reads of it would be missed
    --ignore=tests/test_cuda_emulation.py # runs tests in processes of its own: they follow below
    --ignore=tests/test_cuda_build.py     # these six compile or install, not what is built here
    --ignore=tests/test_locks.py
    --ignore=tests/test_packaging.py
    --ignore=tests/test_ptx.py
    --ignore=tests/test_sass.py
    --ignore=tests/test_static.py
    --ignore=tests/nmt/test_distributed.py # has time limits; the same calls are in tests/nmt
)
op_tests=(tests/test_additive_attention.py tests/test_attention_memory*.py)

export PYTHONSAFEPATH=1 OMP_NUM_THREADS=1
# detect_leaks=0: Python and PyTorch keep much until the process ends; tests/test_leaks.py counts.
export ASAN_OPTIONS=detect_leaks=0:log_path=$reports/address
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1:log_path=$reports/undefined
# Python and PyTorch are not built for ThreadSanitizer, so that it sees neither their accesses nor
# all of their synchronisation: what our code reads and writes counts.
export TSAN_OPTIONS=ignore_noninstrumented_modules=1:halt_on_error=1:log_path=$reports/thread

build() { # NAME FLAGS
    echo "make sanitize: building for $1 sanitizer"
    ATTN_EXT_BUILD_CUDA=0 ATTN_EXT_BUILD_CPU=1 ATTN_EXT_BUILD_FLAGS=$2 "$python" setup.py -q \
        build --build-base "$folder/$1" --build-lib "$folder/$1/lib" >"$folder/$1.log" 2>&1 || {
        cat "$folder/$1.log"
        exit 1
    }
}

# Reports go to files: pytest would keep them to itself, and dies with the process. A warning that
# AddressSanitizer cannot follow a jump between fibers is no report.
pytest_with() { # NAME ARGUMENTS...
    local failed=0 name=$1
    shift
    # The library of C++ comes second, or its throw is not found when torch is loaded later.
    local preload
    preload="$(g++ -print-file-name="$name") $(g++ -print-file-name=libstdc++.so.6)"
    echo "make sanitize: $name: pytest $*"
    "$python" -c 'import importlib.util as u, sys
found = u.find_spec("attn_ext").origin
sys.exit(None if found.startswith(sys.argv[1]) else f"not what was built is tested: {found}")' "$folder"
    # Fixed addresses: ThreadSanitizer of GCC 12 does not know those of newer kernels.
    LD_PRELOAD=$preload setarch -R "$python" -m pytest -q -p no:cacheprovider "$@" || failed=$?
    if grep -sqE "ERROR: |runtime error: |CHECK failed|WARNING: ThreadSanitizer" "$reports"/*; then
        cat "$reports"/*
        echo "make sanitize: FAILED, reports above" >&2
        exit 1
    elif [ $failed != 0 ]; then
        echo "make sanitize: FAILED, no report, but tests failed" >&2
        exit 1
    fi
}

rm -rf "$reports"
mkdir -p "$reports"
build address "$address"
build thread "$thread"

export PYTHONPATH=$folder/address/lib:$PWD:$PWD/tests
pytest_with libasan.so -n "$workers" --dist worksteal "${without[@]}"
for isa in avx2 portable; do
    ATTN_EXT_CPU_ISA=$isa pytest_with libasan.so "${op_tests[@]}" -k "cpu and not cpu_"
done

# The CUDA kernels on the host. What jumps between their fibers is left as it is: it would have to
# tell AddressSanitizer of every jump.
cat >"$folder/g++" <<END
#!/bin/sh
case "\$*" in
*" -c "*/emulation.cpp*) exec g++ "\$@" ;;
*) exec g++ "\$@" $address ;;
esac
END
chmod +x "$folder/g++"
CXX=$folder/g++ pytest_with libasan.so -p emulated_cuda "${op_tests[@]}" \
    tests/cuda_emulation/cases.py -k "not default_backend"

export PYTHONPATH=$folder/thread/lib:$PWD:$PWD/tests
pytest_with libtsan.so -p four_threads "${op_tests[@]}" tests/test_concurrency.py \
    tests/test_kept_memory.py -k "not reference and not process and not exit"
echo "make sanitize: passed, no report"
