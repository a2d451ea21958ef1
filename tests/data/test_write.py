import numpy as np
import pytest

from fedsim.data.shape import Examples
from fedsim.data.write import StoreWriter


def test_a_user_that_comes_twice_is_refused(tmp_path) -> None:
    writer = StoreWriter(tmp_path, np.dtype(np.uint8))
    rows = Examples(tokens=np.arange(4), lengths=np.array([2, 2]), users=np.array([0, 1]))
    writer.append(np.array([[1, 5], [2, 0]], np.uint64), rows)
    for key in ([2, 0], [1, 9]):
        with pytest.raises(RuntimeError, match="twice"):
            writer.append(np.array([key, [9, 9]], np.uint64), rows)
    writer.append(np.array([[2, 1], [9, 9]], np.uint64), rows)
    assert writer.num_users == 4
