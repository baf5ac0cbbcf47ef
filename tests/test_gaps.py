"""dy whose rows lie apart in memory: what reads rows in place must take their step from dy, not from its shape."""

import pytest
from small_calls import CALLS

from gpulayers.testing.check_op import check_op


@pytest.mark.parametrize("name", CALLS)
def test_gradients(name):
    op, given, options = CALLS[name]
    served = check_op(op, *given, dtypes=["float32", "bfloat16"], dys=["gapped"], **options)
    assert {"definition", "triton"} <= set(served)
