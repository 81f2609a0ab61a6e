"""The reader of machine code against loops whose counts are known.

Nothing here needs a GPU: ptxas and the disassembler are part of Triton's wheel.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from benchmarks import sass, static  # noqa: E402
from benchmarks.control_flow import Loop  # noqa: E402
from benchmarks.ptx import argument_load_widths  # noqa: E402

ROOT = Path(__file__).parents[1]
ARCHS = ("sm_80", "sm_90", "sm_100")

PTX_HEAD = """
.version {version}
.target {arch}
.address_size 64
.visible .entry known(.param .u64 src, .param .u64 dst, .param .u32 n, .param .u32 m)
{{
    .reg .b64 %p, %q; .reg .b32 %i, %j, %n, %m; .reg .f32 %x<4>, %a<{registers}>; .reg .pred %c;
    ld.param.u64 %p, [src]; ld.param.u64 %q, [dst]; ld.param.u32 %n, [n]; ld.param.u32 %m, [m];
    mov.u32 %i, %tid.x; mad.wide.u32 %p, %i, 16, %p;
"""

# Per iteration: one 16-byte load, an exponential, a reciprocal, three fused multiply-adds.
KNOWN_LOOP = """
    mov.f32 %a0, 0f00000000; mov.f32 %a1, 0f00000000; mov.f32 %a2, 0f00000000; mov.u32 %i, 0;
again:
    .pragma "nounroll";
    ld.global.v4.f32 {%x0, %x1, %x2, %x3}, [%p];
    ex2.approx.ftz.f32 %x0, %x0;
    rcp.approx.ftz.f32 %x1, %x1;
    fma.rn.f32 %a0, %x0, %x1, %a0;
    fma.rn.f32 %a1, %x2, %x3, %a1;
    fma.rn.f32 %a2, %x2, %x1, %a2;
    add.u64 %p, %p, 512;
    add.u32 %i, %i, 1;
    setp.lt.u32 %c, %i, %n;
    @%c bra again;
    st.global.f32 [%q], %a0; st.global.f32 [%q+4], %a1; st.global.f32 [%q+8], %a2;
    ret;
}
"""

# Outer: a shared-memory round trip, a reciprocal. Inner: an 8-byte load, two exponentials.
NESTED_LOOPS = """
    .shared .align 4 .b8 buffer[128];
    mov.f32 %a0, 0f00000000; mov.f32 %a1, 0f00000000; mov.u32 %i, 0;
outer:
    .pragma "nounroll";
    st.shared.f32 [buffer], %a0;
    bar.sync 0;
    ld.shared.f32 %a1, [buffer+64];
    rcp.approx.ftz.f32 %a0, %a1;
    mov.u32 %j, 0;
inner:
    .pragma "nounroll";
    ld.global.v2.f32 {%x0, %x1}, [%p];
    ex2.approx.ftz.f32 %x0, %x0;
    ex2.approx.ftz.f32 %x1, %x1;
    fma.rn.f32 %a0, %x0, %x1, %a0;
    add.u64 %p, %p, 512;
    add.u32 %j, %j, 1;
    setp.lt.u32 %c, %j, %m;
    @%c bra inner;
    add.u32 %i, %i, 1;
    setp.lt.u32 %c, %i, %n;
    @%c bra outer;
    st.global.f32 [%q], %a0;
    ret;
}
"""

# A loop that passes by a block of eight stores and {function} unless what it loaded is large.
GUARDED_LOOP = """
    mov.f32 %a0, 0f00000000; mov.u32 %i, 0;
again:
    .pragma "nounroll";
    ld.global.f32 %x0, [%p];
    rcp.approx.ftz.f32 %x1, %x0;
    setp.lt.f32 %c, %x0, 0f41F80000;
    @%c bra usual;
    bar.sync 0;
    {slow}
    bar.sync 0;
usual:
    fma.rn.f32 %a0, %x0, %x1, %a0;
    add.u64 %p, %p, 512;
    add.u32 %i, %i, 1;
    setp.lt.u32 %c, %i, %n;
    @%c bra again;
    st.global.f32 [%q], %a0;
    ret;
}
""".replace("{slow}", "{function} %x1, %x1; st.volatile.global.f32 [%p], %x1;\n    " * 8)

# Holds 64 numbers at once.
WIDE = "\n".join(
    [
        *(f"    ld.volatile.global.f32 %a{n}, [%p+{4 * n}];" for n in range(64)),
        *(f"    st.volatile.global.f32 [%q+{4 * n}], %a{63 - n};" for n in range(64)),
        "    ret;\n}\n",
    ]
)


def assemble(body: str, folder: Path, arch: str = "sm_90", *options: str) -> sass.Kernel:
    """The body after ``PTX_HEAD`` as machine code, read back."""
    blackwell = arch == "sm_100"
    head = PTX_HEAD.format(version="8.6" if blackwell else "8.0", arch=arch, registers=64)
    source, cubin = folder / "known.ptx", folder / "known.cubin"
    source.write_text(head + body)
    tool = sass.find_tool("ptxas-blackwell" if blackwell else "ptxas")
    subprocess.run([tool, f"-arch={arch}", *options, source, "-o", cubin], check=True)
    (kernel,) = sass.disassemble(cubin).values()
    assert (kernel.name, kernel.arch) == ("known", arch)
    return kernel


@pytest.mark.parametrize("arch", ARCHS)
def test_counts_of_a_known_loop(tmp_path, arch):
    kernel = assemble(KNOWN_LOOP, tmp_path, arch)
    (loop,) = kernel.loops
    counts = sass.Counts.of(loop.straight())
    expected = {"LDG": 1, "MUFU.EX2": 1, "MUFU.RCP": 1, "FFMA": 3}
    # Two additions for the 64-bit pointer, one for the counter, its comparison, the branch.
    overhead = counts.slots - sum(expected.values())
    assert {name: counts.names[name] for name in expected} == expected
    assert counts.widths == {"LDG": {16: 1}}
    assert (counts.mufu, counts.fp32, counts.fp32_operations) == (2, 3, 3)
    assert 3 <= overhead <= 6, counts.names
    assert loop.straight() == loop.total()
    assert (kernel.spills, kernel.stack, kernel.shared) == (0, 0, 0)


def test_counts_of_an_element(tmp_path):
    (loop,) = assemble(KNOWN_LOOP, tmp_path).loops
    counts = sass.Counts.of(loop.straight())
    element = sass.per_element(counts, elements=64)  # two for each lane
    assert (element.mufu, element.reciprocals, element.fp32) == (1.0, 0.5, 1.5)
    assert element.slots == counts.slots / 2
    assert element.ceiling(90) == min(16 / 1.0, 128 / element.slots)
    twice = element + element
    assert twice.ceiling(90) == element.ceiling(90) / 2


def test_a_kernel_is_described_for_reading(tmp_path, monkeypatch, capsys):
    assemble(NESTED_LOOPS, tmp_path)
    monkeypatch.setattr(sys, "argv", ["sass", str(tmp_path / "known.cubin"), "--arch", "sm_90"])
    sass.main()
    title, outer, _, _, inner, widths, _ = capsys.readouterr().out.splitlines()
    assert title.startswith("known (sm_90): ") and "128 B static shared memory" in title
    assert re.match(r"  loop at 0x\w+: \d+ slots \(\d+ with cold blocks\), 1 MUFU, 0 FP32", outer)
    assert re.match(r"    loop at 0x\w+: \d+ slots \(\d+ with cold blocks\), 2 MUFU, 1 FP32", inner)
    assert widths.strip() == "bytes a lane: {'LDG': {8: 1}}"


@pytest.mark.parametrize("arch", ARCHS)
def test_nested_loops_are_told_apart(tmp_path, arch):
    kernel = assemble(NESTED_LOOPS, tmp_path, arch)
    outer, inner = kernel.loops
    assert kernel.innermost_loops == [inner]
    assert (inner.parent, outer.parent, outer.children) == (outer, None, [inner])
    assert (outer.depth, inner.depth) == (1, 2)
    assert outer.address < inner.address
    within, around = (sass.Counts.of(loop.straight()) for loop in (inner, outer))
    names = ("LDG", "MUFU.EX2", "FFMA", "STS", "LDS", "BAR", "MUFU.RCP")
    assert [within.names[name] for name in names] == [1, 2, 1, 0, 0, 0, 0]
    assert [around.names[name] for name in names] == [0, 0, 0, 1, 1, 1, 1]
    assert within.global_loads == {8: 1}
    assert within.names["BRA"] == around.names["BRA"] == 1
    assert kernel.shared == 128


def guarded(function: str, folder: Path) -> tuple[sass.Kernel, Loop]:
    kernel = assemble(GUARDED_LOOP.replace("{function}", function), folder)
    (loop,) = kernel.loops
    return kernel, loop


def test_blocks_that_rarely_run_are_left_out_of_the_straight_path(tmp_path):
    _, loop = guarded("tanh.approx.f32", tmp_path)
    straight, total = sass.Counts.of(loop.straight()), sass.Counts.of(loop.total())
    assert (straight.names["MUFU.TANH"], total.names["MUFU.TANH"]) == (0, 8)
    assert (straight.names["STG"], total.names["STG"]) == (0, 8)
    assert straight.names["MUFU.RCP"] == straight.names["FFMA"] == straight.names["LDG"] == 1
    assert straight.slots + 18 <= total.slots
    everything = sass.Counts.of(loop.straight(is_cold=lambda block: False))
    assert everything.names["MUFU.TANH"] == 8


def test_the_direct_route_is_no_part_of_the_main_loop(tmp_path):
    kernel, loop = guarded("ex2.approx.ftz.f32", tmp_path)
    assert sass.Counts.of(loop.straight()).names["MUFU.EX2"] == 8
    main, instructions = static.main_loop(kernel, 64, "all")
    counts = sass.Counts.of(instructions)
    assert main is loop
    assert (counts.names["MUFU.RCP"], counts.names["MUFU.EX2"], counts.names["STG"]) == (1, 0, 0)
    assert static.main_loop(kernel, 64 * 4, "all") is None  # too few reciprocals


def test_spills_are_seen(tmp_path):
    free = assemble(WIDE, tmp_path)
    assert (free.spills, free.stack) == (0, 0)
    assert free.registers >= 64
    tight = assemble(WIDE, tmp_path, "sm_90", "--maxrregcount=32")
    assert tight.registers <= 32
    assert tight.stack >= 4 * (64 - 32)
    assert tight.spills == tight.total.names["STL"] + tight.total.names["LDL"] >= 2 * (64 - 32) / 4


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "threads", "expected"),
    [
        # 128 registers x 32 lanes are 4096 of a quarter's 16384: 4 warps a quarter, 16 an SM.
        (90, 128, 0, 128, (4, 16, "registers")),
        (90, 129, 0, 128, (3, 12, "registers")),  # rounded up to 136
        (90, 168, 0, 128, (3, 12, "registers")),
        (90, 255, 0, 256, (1, 8, "registers")),
        (90, 32, 100 << 10, 128, (2, 8, "shared memory")),  # of 228 KiB
        (80, 32, 100 << 10, 128, (1, 4, "shared memory")),  # of 164 KiB
        (90, 16, 0, 32, (32, 32, "CTAs")),
        (90, 24, 0, 384, (5, 60, "warps")),
        (120, 24, 0, 128, (12, 48, "warps")),
    ],
)
def test_occupancy(arch, registers, shared, threads, expected):
    estimate = sass.occupancy(arch, registers, shared, threads)
    assert (estimate.ctas, estimate.warps, estimate.limit) == expected


def test_a_missing_disassembler_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(sass.MissingTool, match="nvdisasm was found neither.*pip install triton"):
        sass.disassemble(b"")


def test_a_file_without_machine_code_is_refused():
    with pytest.raises(ValueError, match="cannot read .*README.md"):
        sass.disassemble(ROOT / "README.md")


PTX_LOADS = """
    ld.param.b64 %rd1, [known_param_0];
    ld.param.b64 %rd2, [known_param_1];
    ld.param.b32 %r1, [known_param_2];
    ld.param.b64 %rd3, [known_param_3];
    mul.wide.s32 %rd4, %r1, 16;
    add.s64 %rd5, %rd1, %rd4;
    mov.b64 %rd8, %rd3;
again:
    @%p1 ld.global.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd5 + 0 ];
    ld.global.L1::evict_first.v2.b64 { %rd10, %rd11 }, [ %rd5 + 16 ];
    ld.global.b16 { %rs1 }, [ %rd8 + 2 ];
    add.s64 %rd12, %rd10, 8;
    ld.global.nc.b8 %rs2, [%rd12];
    @%p2 cp.async.cg.shared.global [ %r7 + 0 ], [ %rd7 + 0 ], 0x8, %r8;
    add.s64 %rd7, %rd2, %rd4;
    add.s64 %rd8, %rd8, 64;
    @%p3 bra again;
"""


def test_loads_are_traced_to_their_argument():
    """Through offsets and loops; an address that was itself loaded belongs to none."""
    widths = argument_load_widths(PTX_LOADS, ["key_ptr", "value_ptr", None, "score_weight_ptr"])
    assert widths == {"key_ptr": {16: 2}, "score_weight_ptr": {2: 1}, "value_ptr": {8: 1}}
