"""How much a pass may draw after memory ran out, and when it may draw more again."""

from __future__ import annotations

from serve_app.engine.worker.memory import LONGEST_RECOVERY_S, RECOVERY_S, PassSizeBackoff

PIXELS = 64 * 64


def test_there_is_no_limit_until_something_failed() -> None:
    assert PassSizeBackoff().images(PIXELS, 0.0) is None


def test_a_pass_that_failed_halves_what_the_next_may_draw_and_one_image_is_always_allowed() -> None:
    allowance = PassSizeBackoff()
    allowance.shrink(8 * PIXELS, 0.0)
    assert allowance.images(PIXELS, 1.0) == 4
    assert allowance.images(4 * PIXELS, 1.0) == 1
    allowance.shrink(4 * PIXELS, 1.0)
    allowance.shrink(1, 1.0)
    assert allowance.images(PIXELS, 1.0) == 1


def test_the_limit_doubles_with_time_until_what_failed_may_be_tried_again() -> None:
    allowance = PassSizeBackoff()
    allowance.shrink(8 * PIXELS, 0.0)
    allowance.shrink(4 * PIXELS, 0.0)
    told = [allowance.images(PIXELS, at_s) for at_s in (RECOVERY_S - 1, RECOVERY_S, 2 * RECOVERY_S)]
    assert told == [2, 4, None]


def test_a_limit_that_was_lifted_in_vain_stays_twice_as_long_each_time_up_to_a_bound() -> None:
    allowance, now_s, waits = PassSizeBackoff(), 0.0, []
    for _ in range(7):
        allowance.shrink(2 * PIXELS, now_s)
        wait_s = next(s for s in range(int(LONGEST_RECOVERY_S) + 2) if allowance.update_limit(now_s + s) is None)
        waits.append(wait_s)
        now_s += wait_s + 1
    assert waits == [60, 120, 240, 480, 900, 900, 900]


def test_a_failure_long_after_the_last_begins_anew() -> None:
    allowance = PassSizeBackoff()
    allowance.shrink(2 * PIXELS, 0.0)
    assert allowance.update_limit(RECOVERY_S) is None
    later_s = RECOVERY_S + LONGEST_RECOVERY_S
    allowance.shrink(2 * PIXELS, later_s)
    assert allowance.update_limit(later_s + RECOVERY_S) is None
