"""What a forward pass may leave unsaid, and for how long."""

import pytest

from luthier.surgery.context import facts_left_out, may_leave_out


def test_facts_may_be_left_out_inside_alone_also_after_an_error_and_one_in_another() -> None:
    assert not may_leave_out()
    with facts_left_out():
        with facts_left_out():
            assert may_leave_out()
        assert may_leave_out()
    assert not may_leave_out()
    with pytest.raises(ZeroDivisionError), facts_left_out():
        raise ZeroDivisionError
    assert not may_leave_out()
