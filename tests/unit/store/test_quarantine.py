from __future__ import annotations

import pytest

from serve_app.core import GenerationRequest
from serve_app.errors import DeadlineExceeded, InternalError
from serve_app.refusals import NonFinite, Quarantined
from serve_app.store.quarantine import LONGEST_S, MAX_FAILURES, MAX_REMEMBERED, PERIOD_S, Quarantine, QuarantineEntry
from tests.engine_cases import request, use_of

BROKEN = request(adapters=(use_of("acme/broken"),))
GENTLE = request(adapters=(use_of("acme/broken", 0.5),))


class Books:
    """A quarantine with a clock that the test turns, and what it has told."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.told: list[int] = []
        self.quarantine = Quarantine(clock=lambda: self.now, on_change=self.told.append)

    def end(self, wanted: GenerationRequest, error: Exception | None = None) -> None:
        with self.quarantine.guard(wanted):
            if error is not None:
                raise error

    def fail(self, wanted: GenerationRequest, times: int = 1, *, apart_s: float = 1.0) -> None:
        for _ in range(times):
            with pytest.raises(NonFinite):
                self.end(wanted, NonFinite("acme/broken", "the image overflows"))
            self.now += apart_s


@pytest.fixture
def books() -> Books:
    return Books()


def test_an_adapter_that_fails_again_and_again_is_refused_until_its_time_is_over(books: Books) -> None:
    books.fail(BROKEN, MAX_FAILURES)
    with pytest.raises(Quarantined) as caught:
        books.end(BROKEN)
    assert str(caught.value) == (
        "adapter acme/broken at scale 1 is refused for now: its last 2 tries failed; it may be tried again in 59 s"
    )
    assert (caught.value.status, caught.value.retry_after_s) == (422, 59)
    assert books.told[-1] == books.quarantine.held == 1
    assert books.quarantine.holds() == (
        QuarantineEntry((BROKEN.adapters[0].spec.key,), (1.0,), "its last 2 tries failed: the image overflows", 59),
    )
    books.now += PERIOD_S
    assert books.quarantine.holds() == ()
    books.end(BROKEN)
    assert books.told[-1] == books.quarantine.held == 0


def test_another_scale_another_adapter_and_none_are_served_meanwhile(books: Books) -> None:
    books.fail(BROKEN, MAX_FAILURES)
    for wanted in (GENTLE, request(adapters=(use_of("acme/sound"),)), request()):
        books.end(wanted)


def test_one_image_that_comes_out_clears_what_failed_before(books: Books) -> None:
    for _ in range(3):
        books.fail(BROKEN, MAX_FAILURES - 1)
        books.end(BROKEN)


def test_whoever_fails_right_after_is_held_for_longer_each_time_up_to_a_limit(books: Books) -> None:
    books.fail(BROKEN, MAX_FAILURES, apart_s=0.5)
    books.now += PERIOD_S
    held: list[int] = []
    for _ in range(6):
        books.fail(BROKEN, apart_s=0.0)
        with pytest.raises(Quarantined) as caught:
            books.end(BROKEN)
        held.append(caught.value.retry_after_s)
        books.now += caught.value.retry_after_s
    assert held == [120, 240, 480, 900, 900, LONGEST_S]


def test_failures_of_one_pass_count_once(books: Books) -> None:
    books.fail(BROKEN, 10, apart_s=0.01)
    books.end(BROKEN)


def test_a_failure_of_ours_counts_and_a_deadline_or_a_caller_who_left_does_not(books: Books) -> None:
    for _ in range(5):
        with pytest.raises(DeadlineExceeded):
            books.end(BROKEN, DeadlineExceeded(1.0))
        books.now += 1
    for _ in range(MAX_FAILURES):
        with pytest.raises(InternalError):
            books.end(BROKEN, InternalError("id"))
        books.now += 1
    with pytest.raises(Quarantined):
        books.end(BROKEN)


def test_a_request_without_adapters_is_never_refused(books: Books) -> None:
    for _ in range(10):
        with pytest.raises(InternalError):
            books.end(request(), InternalError("id"))
        books.now += 1
    books.end(request())


def test_the_books_stay_small(books: Books) -> None:
    for index in range(MAX_REMEMBERED + 10):
        books.fail(request(adapters=(use_of(f"acme/{index}"),)), MAX_FAILURES, apart_s=0.3)
    assert books.quarantine.held <= MAX_REMEMBERED
