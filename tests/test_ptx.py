"""The executor of PTX (see tests/ptx): its arithmetic, known results, planted faults; and a few of
the project's kernels in it. ``make gpu-proof`` executes all cases.
"""

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from ptx import arithmetic
from ptx.machine import Deadlock, Machine
from ptx.memory import GlobalMemory, Report
from ptx.parser import parse
from ptx.program import Program

ROOT = Path(__file__).parents[1]
RANDOM = np.random.default_rng(0)
COUNT = 2000
MASK = 2**32 - 1


def words(bits: int = 32) -> np.ndarray:
    return RANDOM.integers(0, 2**bits, COUNT, dtype=np.uint64).astype(f"u{bits // 8}")


def truncated(x: int, y: int) -> int:
    """The quotient towards zero."""
    return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)


def field(x: int, at: int, bits: int) -> int:
    return x >> at & (1 << min(bits, 32)) - 1 if at < 32 else 0


def signed_field(x: int, at: int, bits: int) -> int:
    """bfe.s32 bit by bit, as the manual says."""
    if bits == 0:
        return 0
    sign = x >> min(at + bits - 1, 31) & 1
    value = sum((x >> at + i & 1 if i < bits and at + i < 32 else sign) << i for i in range(32))
    return value - (value >> 31 << 32)


def inserted(x: int, y: int, at: int, bits: int) -> int:
    mask = ((1 << min(bits, 32)) - 1 << at) & MASK
    return y & ~mask | x << at & mask


def permuted(x: int, y: int, selector: int) -> int:
    result = 0
    for n in range(4):
        choice = selector >> 4 * n & 15
        byte = (y << 32 | x) >> 8 * (choice & 7) & 255
        result |= (255 * (byte >> 7) if choice & 8 else byte) << 8 * n
    return result


A, B, C = words(), words(), words()
WIDE_A, WIDE_B = words(64), words(64)
SMALL = np.where(B.view("i4") >> 20 == 0, 1, B.view("i4") >> 20)
AT, BITS = (RANDOM.integers(0, most, COUNT).astype("u4") for most in (40, 34))
INTEGERS = {
    "mulhi_u32": ((A, B), lambda x, y: x * y >> 32),
    "mulhi_s32": ((A.view("i4"), B.view("i4")), lambda x, y: x * y >> 32),
    "mulhi_u64": ((WIDE_A, WIDE_B), lambda x, y: x * y >> 64),
    "mulhi_s64": ((WIDE_A.view("i8"), WIDE_B.view("i8")), lambda x, y: x * y >> 64),
    "shl": ((A, AT), lambda x, n: x << n & MASK if n < 32 else 0),
    "shr": ((A.view("i4"), AT), lambda x, n: x >> min(n, 31)),
    "div_int": ((A.view("i4"), SMALL), truncated),
    "rem_int": ((A.view("i4"), SMALL), lambda x, y: x - truncated(x, y) * y),
    "shf_l_wrap": ((A, B, C), lambda x, y, n: (y << 32 | x) << n % 32 >> 32 & MASK),
    "shf_r_clamp": ((A, B, AT), lambda x, y, n: (y << 32 | x) >> min(n, 32) & MASK),
    "bfe": ((A, AT, BITS), field),
    "bfi": ((A, B, AT, BITS), inserted),
    "prmt": ((A, B, C), permuted),
    "popc": ((A,), lambda x: bin(x).count("1")),
    "clz": ((A,), lambda x: 32 - x.bit_length()),
    "brev": ((A,), lambda x: int(f"{x:032b}"[::-1], 2)),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_integers(name: str):
    arguments, expected = INTEGERS[name]
    found = getattr(arithmetic, name)(*arguments).tolist()
    assert found == [expected(*row) for row in zip(*(a.tolist() for a in arguments))]


def test_signed_fields_and_tables():
    found = arithmetic.bfe(A.view("i4"), AT, BITS).tolist()
    assert found == [signed_field(*row) for row in zip(A.tolist(), AT.tolist(), BITS.tolist())]
    rows = list(zip(A.tolist(), B.tolist(), C.tolist()))
    assert arithmetic.lop3(A, B, C, 0x96).tolist() == [x ^ y ^ z for x, y, z in rows]
    majority = [x & y | x & z | y & z for x, y, z in rows]
    assert arithmetic.lop3(A, B, C, 0xE8).tolist() == majority


def test_roundings():
    """To 16 bits as PyTorch has it; fma as exact fractions have it, but for its double rounding."""
    exponents = RANDOM.integers(-40, 38, COUNT).astype("f4")
    x = (RANDOM.standard_normal(COUNT) * 10.0**exponents).astype("f4")
    x[:5] = np.inf, -np.inf, 0, -0.0, 3.4e38
    for name, dtype in (("to_bf16", torch.bfloat16), ("to_f16", torch.float16)):
        expected = torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view("u2")
        assert (getattr(arithmetic, name)(x) == expected).all()
    a, b, small = (RANDOM.standard_normal(COUNT).astype("f4") for _ in range(3))
    c = -a * b + small * np.float32(1e-6)  # most digits cancel
    near = np.empty(COUNT, "f4")
    arithmetic.fma_f32(a, b, c, near, None)
    below = arithmetic.fma_down(a, b, c)
    for *row, rounded, floor in zip(*(v.tolist() for v in (a, b, c, near, below))):
        x, y, z = map(Fraction, row)
        exact = x * y + z
        step = Fraction(float(np.spacing(np.float32(rounded))))
        assert abs(exact - Fraction(rounded)) <= abs(step) / 2
        next_up = float(np.nextafter(np.float32(floor), np.float32(np.inf)))
        assert Fraction(floor) <= exact < Fraction(next_up)


# Thread i of 64 copies number i to shared memory as it arrives and stores number 63 - i, plus the
# sum over its warp by a butterfly, to global memory.
KERNEL = """
.version 8.7
.target sm_90
.address_size 64
.visible .entry reversed(.param .u64 from, .param .u64 to)
{
  .reg .pred %p<2>;
  .reg .b32 %r<12>;
  .reg .b64 %rd<6>;
  .shared .align 16 .b8 held[256];
  ld.param.u64 %rd1, [from];
  ld.param.u64 %rd2, [to];
  mov.u32 %r1, %tid.x;
  shl.b32 %r2, %r1, 2;
  mov.u32 %r3, held;
  add.s32 %r4, %r3, %r2;
  cvt.u64.u32 %rd3, %r2;
  add.s64 %rd4, %rd1, %rd3;
  cp.async.ca.shared.global [%r4], [%rd4], 4;
  cp.async.commit_group;
  cp.async.wait_group 0;
  bar.sync 0;
  sub.s32 %r5, 63, %r1;
  shl.b32 %r6, %r5, 2;
  add.s32 %r7, %r3, %r6;
  ld.shared.u32 %r8, [%r7];
  mov.u32 %r9, %r8;
  shfl.sync.bfly.b32 %r10, %r9, 16, 31, -1;
  add.s32 %r9, %r9, %r10;
  shfl.sync.bfly.b32 %r10, %r9, 8, 31, -1;
  add.s32 %r9, %r9, %r10;
  shfl.sync.bfly.b32 %r10, %r9, 4, 31, -1;
  add.s32 %r9, %r9, %r10;
  shfl.sync.bfly.b32 %r10, %r9, 2, 31, -1;
  add.s32 %r9, %r9, %r10;
  shfl.sync.bfly.b32 %r10, %r9, 1, 31, -1;
  add.s32 %r9, %r9, %r10;
  add.s32 %r8, %r8, %r9;
  add.s64 %rd5, %rd2, %rd3;
  setp.lt.u32 %p1, %r1, 64;
  @%p1 bra DONE;
  trap;
DONE:
  st.global.u32 [%rd5], %r8;
  ret;
}
"""


def executed(
    ptx: str, order: int | None = None, blocks: int = 1, any_thread: bool = False
) -> tuple[np.ndarray, list[str]]:
    """What the kernel stores, and the kinds of what is found or ends it."""
    memory = GlobalMemory(report := Report(), any_thread)
    given, stored = np.arange(100, 164, dtype="u4"), np.zeros(64, "u4")
    bases = memory.add(given.view("u1"), "from"), memory.add(stored.view("u1"), "to", fresh=True)
    parameters = np.array(bases, "u8").tobytes()
    program = Program(parse(ptx))
    options = {"order": order, "uniform": True}
    sizes = (blocks, 1, 1), (64, 1, 1)
    machine = Machine(program, *sizes, parameters, memory, 0, report, **options)
    try:
        machine.run()
    except Deadlock as problem:
        report.add(str(problem), "", 1)
    return stored, sorted({kind for kind, _ in report.found})


@pytest.mark.parametrize("order", [None, 0, 1])
def test_known_result(order: int | None):
    stored, found = executed(KERNEL, order)
    numbers = np.arange(163, 99, -1)
    assert stored.tolist() == (numbers + numbers.reshape(2, 32).sum(1).repeat(32)).tolist()
    assert found == []


@pytest.mark.parametrize("packed", [False, True])
def test_comparisons_of_16_bits(packed: bool):
    """bfloat16 registers are compared as numbers, not as their bits."""
    a, b = (arithmetic.to_bf16(RANDOM.standard_normal(64).astype("f4")) for _ in range(2))
    a[0], b[0], a[1], b[1] = 0x7FC0, 0, 0x8000, 0  # NaN < 0 and -0 < 0
    memory = GlobalMemory(report := Report())
    stored = np.full(64, 7, "u4")
    rows = np.stack([a, b], axis=1).copy()
    bases = memory.add(rows.view("u1").ravel(), "from"), memory.add(stored.view("u1"), "to")
    body = "ld.global.v2.b16 {%h1, %h2}, [%rd4]; "
    if packed:  # the other way round in the lower halves
        body += "mov.b32 %r8, {%h2, %h1}; mov.b32 %r9, {%h1, %h2}; "
        body += "setp.lt.bf16x2 %p0|%p1, %r8, %r9; "
    else:
        body += "setp.lt.bf16 %p1, %h1, %h2; "
    body += "selp.b32 %r8, 1, 0, %p1;"
    head = KERNEL[: KERNEL.index("cp.async")].replace(".reg .b64", ".reg .b16 %h<3>; .reg .b64")
    tail = "add.s64 %rd5, %rd2, %rd3; st.global.u32 [%rd5], %r8; ret; }"
    parameters = np.array(bases, "u8").tobytes()
    program = Program(parse(head + body + tail))
    Machine(program, (1, 1, 1), (64, 1, 1), parameters, memory, 0, report).run()
    assert stored.tolist() == (arithmetic.from_bf16(a) < arithmetic.from_bf16(b)).tolist()
    assert report.lines() == []


DAMAGE = {
    "barrier": ("bar.sync 0;", "", "RACE: read of another warp's write"),
    "wait": ("cp.async.wait_group 0;", "", "shared load of unwritten bytes"),
    "later_wait": ("wait_group 0", "wait_group 1", "shared load of unwritten bytes"),
    "address": ("[%rd4], 4", "[%rd4+4], 4", "global load OUT OF BOUNDS"),
    "target": ("[%rd5], %r8", "[%rd5+-4], %r8", "global store OUT OF BOUNDS"),
    "shared_address": ("[%r7]", "[%r7+4]", "shared load OUT OF BOUNDS"),
    "alignment": ("[%rd5], %r8", "[%rd5+2], %r8", "misaligned global store"),
    "same_place": ("add.s32 %r4, %r3, %r2", "mov.u32 %r4, %r3", "RACE: two warps write"),
    "one_target": (
        "add.s64 %rd5, %rd2, %rd3",
        "mov.u64 %rd5, %rd2",
        "RACE: different values written at once",
    ),
    "read_back": (
        "st.global.u32 [%rd5], %r8;",
        "st.global.u32 [%rd5], %r8; ld.global.u32 %r8, [%rd2];",
        "RACE: read of another warp's write",
    ),
    "non_coherent_after": (
        "st.global.u32 [%rd5], %r8;",
        "st.global.u32 [%rd5], %r8; ld.global.nc.u32 %r8, [%rd5];",
        "non-coherent read of what the launch writes",
    ),
    "non_coherent_before": (
        "st.global.u32 [%rd5], %r8;",
        "ld.global.nc.u32 %r9, [%rd5]; st.global.u32 [%rd5], %r8;",
        "non-coherent read of what the launch writes",
    ),
    "source": ("[%rd4], 4", "[%rd5], 4", "global load OUT OF BOUNDS"),
    "unwritten": ("add.s64 %rd4, %rd1", "add.s64 %rd4, %rd2", "global load of unwritten bytes"),
    "branch": ("%r1, 64", "%r1, 63", "threads of a block branch apart"),
    "members": (
        "shfl.sync.bfly.b32 %r10, %r9, 1, 31, -1;",
        "setp.lt.u32 %p1, %r1, 5; @%p1 shfl.sync.bfly.b32 %r10, %r9, 1, 31, -1;",
        "shfl without all its members",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_noticed(name: str):
    text, instead, expected = DAMAGE[name]
    assert KERNEL.count(text) == 1
    assert expected in executed(KERNEL.replace(text, instead))[1]


def test_a_barrier_that_some_threads_never_reach():
    damaged = KERNEL.replace("bar.sync 0;", "setp.lt.u32 %p1, %r1, 7; @%p1 bra DONE; bar.sync 0;")
    damaged = damaged.replace("DONE:", "DONE: bar.sync 0;")
    _, found = executed(damaged)
    assert "barrier reached from different places" in found


def test_what_a_barrier_orders_is_no_race():
    read_back = "st.global.u32 [%rd5], %r8; bar.sync 0; ld.global.u32 %r8, [%rd2];"
    assert executed(KERNEL.replace("st.global.u32 [%rd5], %r8;", read_back))[1] == []


def test_threads_of_triton_may_not_rely_on_what_they_do_themselves():
    """Its compiler may let another thread load what this one stored or is to overwrite."""
    store = "st.global.u32 [%rd5], %r8;"
    race = "RACE: read back without a barrier"
    for barrier, expected in ("", [race]), ("bar.sync 0;", []):
        damaged = KERNEL.replace(store, f"{store} {barrier} ld.global.u32 %r8, [%rd5];")
        assert executed(damaged)[1] == []
        assert executed(damaged, any_thread=True)[1] == expected
    own_warp = "and.b32 %r2, %r2, 128; cvt.u64.u32 %rd3, %r2; add.s64 %rd4, %rd2, %rd3;"
    race = "RACE: write to what another thread reads"
    for barrier, expected in ("", [race]), ("bar.sync 0;", []):
        look = f"{store} bar.sync 0; {own_warp} ld.global.u32 %r9, [%rd4]; {barrier} {store}"
        damaged = KERNEL.replace(store, look)
        assert executed(damaged)[1] == []
        assert executed(damaged, any_thread=True)[1] == expected


def test_blocks_have_no_barrier_between_them():
    """Two of them store the same, but neither may rely on it."""
    read_back = "st.global.u32 [%rd5], %r8; bar.sync 0; ld.global.u32 %r8, [%rd5];"
    damaged = KERNEL.replace("st.global.u32 [%rd5], %r8;", read_back)
    assert executed(damaged, blocks=2)[1] == ["RACE: read of another block's write"]


def test_a_removed_barrier_shows_in_another_order():
    """Where races are not watched: a warp that runs alone reads what no other wrote yet."""
    expected = executed(KERNEL)[0]
    stored = executed(KERNEL.replace("bar.sync 0;", ""), order=0)[0]
    assert (stored != expected).any()


# Calls that take every kernel, with most of its options, in the dtype of most users, whose products
# go through tensor cores.
THIN = {
    "several": ("options",),
    "tiles": ("wide", "wide-large", "wide-long"),
    "others": ("options-scores", "options-step", "options-memory", "options-pool", "pool-scores"),
}


def run_cases(backend: str, dtype: str, cases: tuple[str, ...], *options: str) -> None:
    """In a process of its own: backends are not to compute on CPU tensors in others."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.ptx", backend, *options, "--dtype", dtype]
    command += ["--only", *cases]
    run = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{len(cases)} of {len(cases)} ok" in run.stdout


@pytest.mark.parametrize("cases", THIN.values(), ids=THIN)
def test_triton_kernels(cases: tuple[str, ...]):
    pytest.importorskip("triton")
    run_cases("triton", "bfloat16", cases)


def test_triton_kernels_in_the_order_of_their_work():
    """Jagged sequences: the largest tiles first, several of them to each multiprocessor."""
    pytest.importorskip("triton")
    run_cases("triton", "bfloat16", ("jagged", "options-jagged"), "--processors", "2")


def test_cuda_kernels():
    from ptx import run_cuda

    if problem := run_cuda.missing():
        pytest.skip(problem)
    run_cases("cuda", "bfloat16", ("jagged", *THIN["several"], *THIN["others"]))
