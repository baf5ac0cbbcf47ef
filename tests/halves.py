"""``check_op`` for tests that make many calls of an op: each in one of the two 16-bit types."""

import zlib

from gpulayers.testing.check_op import check_op as check


def check_op(op, *inputs, **options):
    """In float64, float32, and float16 or bfloat16: which of them, the call decides. ``dtypes`` are as given, if they are."""
    if "dtypes" not in options:
        half = ("float16", "bfloat16")[zlib.crc32(repr([op.name, inputs, options]).encode()) % 2]
        options["dtypes"] = ("float64", "float32", half)
    return check(op, *inputs, **options)
