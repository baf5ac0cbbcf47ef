"""Seeded memory faults are found, and the correct twin of each kernel passes."""

import numpy as np
import pytest

pytest.importorskip("triton")
torch = pytest.importorskip("torch")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from gpulayers.testing import interpreter  # noqa: E402
from gpulayers.testing.interpreter import interpreting  # noqa: E402
from gpulayers.testing.memory import KernelMemoryError, Memory  # noqa: E402


@pytest.fixture(autouse=True)
def _toys_prove_nothing(monkeypatch):
    """The kernels below are toys: keep them out of the record of what was proven."""
    monkeypatch.setattr(interpreter, "proven", set())


@triton.jit
def copy(x, y, n, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if MASKED:
        tl.store(y + i, tl.load(x + i, i < n), i < n)
    else:
        tl.store(y + i, tl.load(x + i))


@triton.jit
def copy_rows(x, y, columns, stride, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    row = tl.program_id(0)
    tl.store(y + row * BLOCK + i, tl.load(x + row * stride + i, i < columns, 0.0))


@triton.jit
def add_atomically(counts, bins, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = tl.load(bins + i, i < n, 0)
    tl.atomic_add(counts + b, 1, i < n)


def pair(n=100):
    return torch.randn(n), torch.zeros(n)


def test_out_of_bounds_of_a_contiguous_tensor():
    x, y = pair()
    with interpreting():
        copy[(4,)](x, y, 100, BLOCK=32, MASKED=True)
        assert torch.equal(x, y)
        with pytest.raises(
            KernelMemoryError, match=r"copy, program \(3, 0, 0\): load .*'x'.*28 of 32 lanes.*100 of 100"
        ):
            copy[(4,)](x, y, 100, BLOCK=32, MASKED=False)
        with pytest.raises(KernelMemoryError, match=r"store .*'y'.*1 of 128 lanes"):
            copy[(1,)](torch.randn(128), torch.zeros(127), 128, BLOCK=128, MASKED=False)


def test_a_neighbouring_argument_is_not_the_tensor():
    """The next argument lies right behind the first in memory; reading it through the first is still wrong."""
    storage = torch.zeros(64)
    x, y = storage[:32], storage[32:]
    with interpreting(), pytest.raises(KernelMemoryError, match="'x'"):
        copy[(1,)](x, y, 64, BLOCK=64, MASKED=True)


def test_the_gap_of_a_strided_view():
    wide = torch.randn(4, 24)
    x, y = wide[:, :16], torch.zeros(4, 16)
    with interpreting():
        copy_rows[(4,)](x, y, 16, 24, BLOCK=16)
        assert torch.equal(x, y)
        with pytest.raises(KernelMemoryError, match=r"4 of 20 lanes; the first at element 16, in a gap"):
            copy_rows[(3,)](x, torch.zeros(4, 32), 20, 24, BLOCK=32)


def test_before_the_first_element_and_negative_strides():
    x, y = np.arange(8, dtype=np.float32), np.zeros(8, np.float32)

    @triton.jit
    def backwards(x, y, first, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        tl.store(y + i, tl.load(x + first - i))

    with interpreting():
        backwards[(1,)](x[::-1], y, 0, BLOCK=8)
        np.testing.assert_array_equal(y, x[::-1])
        with pytest.raises(KernelMemoryError, match="element -1"):
            backwards[(1,)](x, y, 6, BLOCK=8)


def test_misaligned_access():
    @triton.jit
    def read(x, y, byte):
        p = (x.to(tl.pointer_type(tl.int8)) + byte).to(tl.pointer_type(tl.int32))
        tl.store(y, tl.load(p))

    x, y = torch.arange(8, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with interpreting():
        read[(1,)](x, y, 8)
        assert y.item() == 2
        with pytest.raises(KernelMemoryError, match="byte 6, which is misaligned"):
            read[(1,)](x, y, 6)


def test_atomics_are_checked():
    bins = torch.tensor([0, 3, 3, 7, 3], dtype=torch.int32)
    counts = torch.zeros(8, dtype=torch.int32)
    with interpreting():
        add_atomically[(3,)](counts, bins, 5, BLOCK=2)
        assert counts.tolist() == [1, 0, 0, 3, 0, 0, 0, 1]
        with pytest.raises(KernelMemoryError, match=r"atomic out of bounds of argument 0, 'counts'"):
            add_atomically[(3,)](counts[:7], bins, 5, BLOCK=2)


def test_empty_tensors_have_no_elements():
    with interpreting():
        copy[(1,)](torch.empty(0), torch.empty(0), 0, BLOCK=32, MASKED=True)
        with pytest.raises(KernelMemoryError, match="element 0 of 0"):
            copy[(1,)](torch.empty(0), torch.empty(32), 32, BLOCK=32, MASKED=True)


def test_int32_overflow_of_an_offset_is_out_of_bounds():
    @triton.jit
    def far(x, y, stride, WIDE: tl.constexpr):
        i = tl.arange(0, 4)
        if WIDE:
            i = i.to(tl.int64)
        tl.store(y + tl.arange(0, 4), tl.load(x + i * stride))

    step = 2**30
    x = torch.zeros(1, dtype=torch.int8).expand(3 * step + 1)
    y = torch.zeros(4, dtype=torch.int8)
    with interpreting(), pytest.raises(KernelMemoryError):
        far[(1,)](x.as_strided((4,), (0,)), y, step, WIDE=False)
    big = torch.empty(3 * step + 1, dtype=torch.int8)  # untouched pages
    with interpreting():
        far[(1,)](big, y, step, WIDE=True)
        with pytest.raises(KernelMemoryError, match=f"element {-2 * step}"):
            far[(1,)](big, y, step, WIDE=False)


@triton.jit
def accumulate(x, total, BLOCK: tl.constexpr, HAZARD: tl.constexpr):
    """Programs that meet in `total`: each stores to one place, reads what the one before stored, or the reverse."""
    pid = tl.program_id(0)
    v = tl.sum(tl.load(x + pid * BLOCK + tl.arange(0, BLOCK)))
    if HAZARD == "write-after-write":
        tl.store(total, v)
    elif HAZARD == "read-after-write":
        tl.store(total + pid, v + tl.load(total + pid - 1, pid > 0, 0.0))
    elif HAZARD == "write-after-read":
        tl.store(total + pid, v + tl.load(total + pid + 1))
    else:
        tl.store(total + pid, v)


@pytest.mark.parametrize("hazard", ["write-after-write", "read-after-write", "write-after-read"])
def test_hazards_between_programs(hazard):
    x, total = torch.ones(4 * 16), torch.zeros(5)
    with interpreting():
        accumulate[(4,)](x, total, BLOCK=16, HAZARD="none")
        assert total.tolist() == [16, 16, 16, 16, 0]
        with pytest.raises(KernelMemoryError, match=rf"program \(1, 0, 0\): {hazard}.*'total'.*by program \(0, 0, 0\)"):
            accumulate[(4,)](x, total, BLOCK=16, HAZARD=hazard)
        accumulate[(1,)](x, total, BLOCK=16, HAZARD=hazard)  # one program alone is in order
    with interpreting(races=False):
        accumulate[(4,)](x, total, BLOCK=16, HAZARD=hazard)


@triton.jit
def turn(x, y, BARRIER: tl.constexpr, AGAIN: tl.constexpr):
    """Within a program, lanes meet in y: what one has stored its neighbour loads, or stores."""
    i = tl.arange(0, 16)
    other = (i + 1) % 16
    y += tl.program_id(0) * 16
    tl.store(y + i, 2 * tl.load(x + i))
    tl.store(y + i, 3 * tl.load(y + i))  # its own
    if BARRIER:
        tl.debug_barrier()
    if AGAIN == "store":
        tl.store(y + other, tl.load(x + other))
    elif AGAIN == "store two columns":
        tl.store(y + tl.arange(0, 8)[:, None] + tl.arange(0, 2)[None, :] * 8, tl.zeros((8, 2), tl.float32))
    else:
        tl.store(x + i, tl.load(y + other))


@pytest.mark.parametrize("programs", [1, 2])
@pytest.mark.parametrize("again", ["store", "store two columns", "load"])
def test_hazards_between_lanes(again, programs):
    x, y = torch.ones(16), torch.zeros(32)
    hazard = "read" if again == "load" else "write"
    with interpreting():
        if programs == 1 or again != "load":
            turn[(programs,)](x, y, BARRIER=True, AGAIN=again)
        with pytest.raises(KernelMemoryError, match=rf"{hazard}-after-write between lanes .* element [01] of .* 'y'"):
            turn[(programs,)](x, y, BARRIER=False, AGAIN=again)
    with interpreting(races=False):
        turn[(programs,)](x, y, BARRIER=False, AGAIN=again)


def test_many_reads_before_the_first_write(monkeypatch):
    """They are entered when it comes, or when there are too many of them."""
    x = np.zeros(64, np.float32)
    for most in (0, 40, 1000):
        monkeypatch.setattr("gpulayers.testing._hazards.MOST_WAITING", most)
        room = Memory("test", (3, 1, 1))
        where = room.add("x", x) + 4 * np.arange(16, dtype=np.uint64)
        for room.program in (1, 2):
            room.load(where + np.uint64(64 * room.program), None, x.dtype, None)
        room.program = 3
        room.store(where, x[:16], None)
        with pytest.raises(KernelMemoryError, match=r"write-after-read .* element 32 .* by program \(1, 0, 0\)"):
            room.store(where + np.uint64(128), x[:16], None)


def test_hazards_between_overlapping_arguments():
    """In place through two arguments: an element is the same element under either name."""
    x = torch.zeros(65)
    with interpreting():
        copy[(2,)](x[:64], x[:64], 64, BLOCK=32, MASKED=True)
        with pytest.raises(KernelMemoryError, match="write-after-read"):
            copy[(2,)](x[1:65], x[:64], 64, BLOCK=32, MASKED=False)


def test_atomics_meet_atomics_only():
    @triton.jit
    def count(c, y, READ: tl.constexpr):
        tl.atomic_add(c, 1)
        if READ:
            tl.store(y + tl.program_id(0), tl.load(c))

    c, y = torch.zeros(1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    with interpreting():
        count[(2,)](c, y, READ=False)
        assert c.item() == 2
        with pytest.raises(KernelMemoryError, match="after a plain load"):
            count[(2,)](c, y, READ=True)


def test_lanes_of_one_store_that_disagree():
    @triton.jit
    def scatter(y, SAME: tl.constexpr):
        i = tl.arange(0, 8)
        tl.store(y + i // 2, i // 2 if SAME else i)

    y = torch.zeros(4, dtype=torch.int32)
    with interpreting():
        scatter[(1,)](y, SAME=True)
        with pytest.raises(KernelMemoryError, match=r"different values to one element .*4 of 8 lanes"):
            scatter[(1,)](y, SAME=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_lanes_masked_off_are_poison(dtype):
    @triton.jit
    def total(x, y, n, BLOCK: tl.constexpr, OTHER: tl.constexpr):
        i = tl.arange(0, BLOCK)
        if OTHER:
            v = tl.load(x + i, i < n, 0.0)
        else:
            v = tl.load(x + i, i < n)
        tl.store(y, tl.sum(v))

    x, y = torch.ones(20, dtype=dtype), torch.zeros(1, dtype=dtype)
    with interpreting():
        total[(1,)](x, y, 20, BLOCK=32, OTHER=True)
        assert y.item() == 20
        total[(1,)](x, y, 20, BLOCK=32, OTHER=False)
        assert y.isnan().all()
    with interpreting(poison=False):
        total[(1,)](x, y, 20, BLOCK=32, OTHER=False)
        assert y.item() == 20


def test_descriptor_boxes_read_zero_outside_and_stay_inside():
    @triton.jit
    def transpose(x, y, rows, columns, stride, BLOCK: tl.constexpr):
        d = tl.make_tensor_descriptor(x, [rows, columns], [stride, 1], [BLOCK, BLOCK])
        i = tl.arange(0, BLOCK)
        tl.store(y + i[None, :] * BLOCK + i[:, None], d.load([0, 0]))

    x, y = torch.randn(5, 8), torch.zeros(16, 16)
    with interpreting():
        transpose[(1,)](x, y, 5, 8, 8, BLOCK=16)
        assert torch.equal(y[:8, :5], x.T) and not y[8:].any() and not y[:, 5:].any()
        with pytest.raises(KernelMemoryError, match="'x'"):
            transpose[(1,)](x, y, 6, 8, 8, BLOCK=16)  # says one row more than there is


def test_pointers_selected_from_two_tensors_and_addresses_as_integers():
    @triton.jit
    def pick(x, y, out, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        tl.store(out + i, tl.load(tl.where(i % 2 == 0, x + i, y + i)))

    @triton.jit
    def through(addresses, x, out, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        p = tl.load(addresses).to(tl.pointer_type(tl.float32))
        tl.store(out + i, tl.load(p + i))

    x, y, out = torch.ones(8), torch.zeros(8), torch.full((8,), 5.0)
    with interpreting():
        pick[(1,)](x, y, out, BLOCK=8)
        assert out.tolist() == [1, 0] * 4
        through[(1,)](torch.tensor([x.data_ptr()]), x, out, BLOCK=8)
        assert torch.equal(out, x)
        with pytest.raises(KernelMemoryError, match="belongs to no argument"):
            through[(1,)](torch.tensor([y.data_ptr()]), x, out, BLOCK=8)


def test_memory_names_the_program_and_the_place():
    memory = Memory("k", (2, 1, 1))
    base = np.uint64(memory.add("x", np.zeros((2, 3), np.float32)[:, ::2]))
    memory.program = 2
    with pytest.raises(KernelMemoryError, match=r"k, program \(1, 0, 0\).*shape \(2, 2\), strides \(3, 2\).*gap"):
        memory.load(base + np.arange(2, dtype=np.uint64) * np.uint64(4), None, np.dtype(np.float32), None)


@triton.jit
def hinted(x, y, first, HINT: tl.constexpr, BLOCK: tl.constexpr):
    i = first + tl.arange(0, BLOCK)
    if HINT == "multiple":
        i = tl.max_contiguous(tl.multiple_of(i, [16]), [16])
    elif HINT == "constant":
        i = tl.max_constancy(i // 8, [8])
    elif HINT == "contiguous":
        i = tl.max_contiguous(i // 2, [4])
    else:
        x = tl.multiple_of(x, 16)
    tl.store(y + tl.arange(0, BLOCK), tl.load(x + i))


def test_hints_that_lie():
    """What a kernel promises the compiler is checked, as the compiler would build on it."""
    x, y = torch.randn(128), torch.zeros(32)
    with interpreting():
        for hint, first in (("multiple", 16), ("constant", 8), ("address", 5)):
            hinted[(1,)](x, y, first, HINT=hint, BLOCK=32)
        for hint, first, data in (("multiple", 17, x), ("constant", 9, x), ("contiguous", 0, x), ("address", 0, x[1:])):
            with pytest.raises(ValueError, match=r"tl\.m\w+\(…, \d+\) does not hold"):
                hinted[(1,)](data, y, first, HINT=hint, BLOCK=32)
