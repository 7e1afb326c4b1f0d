import pytest
import torch

from serve_app.bench.measuring.timing import Step, Stopwatch, Timing


def test_a_step_that_fails_is_not_counted() -> None:
    stopwatch = Stopwatch(torch.device("cpu"))
    with pytest.raises(ValueError, match="broken"), stopwatch.timed(Step.READ):
        raise ValueError("broken")
    assert stopwatch.medians() == {}


def test_steps_come_in_their_own_order_and_forgotten_ones_not_at_all() -> None:
    stopwatch = Stopwatch(torch.device("cpu"))
    with stopwatch.timed(Step.RESTORE):
        pass
    stopwatch.forget()
    for step in (Step.SWAP, Step.READ):
        with stopwatch.timed(step):
            pass
    assert list(stopwatch.medians()) == [Step.READ, Step.SWAP]


def test_times_add_up_and_lose_the_device_where_one_part_has_none() -> None:
    assert Timing(1.0, 2.0, 3.0) + Timing(10.0, 20.0, 30.0) == Timing(11.0, 22.0, 33.0)
    assert Timing(1.0, 2.0, 3.0) + Timing(10.0, 20.0, None) == Timing(11.0, 22.0, None)
