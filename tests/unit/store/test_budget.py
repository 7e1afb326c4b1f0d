"""The byte budget: who goes, who stays, for every order of events."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serve_app.store.budget import ByteBudget, Entry, EvictionPlan, plan_eviction


def test_nothing_is_evicted_while_all_fit() -> None:
    entries = [Entry("a", 40), Entry("b", 40)]
    assert plan_eviction(entries, 20, 100) == EvictionPlan()


def test_the_least_recently_used_go_first_and_no_more_than_needed() -> None:
    entries = [Entry("oldest", 30), Entry("older", 30), Entry("newest", 30)]
    assert plan_eviction(entries, 40, 100) == EvictionPlan(("oldest",))


def test_a_pinned_entry_is_passed_over_for_a_younger_one() -> None:
    entries = [Entry("pinned", 60, is_pinned=True), Entry("free", 40)]
    assert plan_eviction(entries, 10, 100) == EvictionPlan(("free",))


def test_a_plan_says_how_far_pins_leave_the_cache_over_its_budget() -> None:
    entries = [Entry("pinned", 90, is_pinned=True), Entry("free", 5)]
    assert plan_eviction(entries, 30, 100) == EvictionPlan(("free",), excess_bytes=20)


def test_an_entry_larger_than_the_budget_goes_before_older_ones_that_fit() -> None:
    entries = [Entry("old", 50), Entry("huge", 500), Entry("new", 50)]
    assert plan_eviction(entries, 0, 100) == EvictionPlan(("huge",))


def test_an_entry_larger_than_the_budget_stays_while_pinned_and_goes_after() -> None:
    budget = ByteBudget(100)
    budget.pin("huge")
    assert budget.add("huge", 500) == EvictionPlan(excess_bytes=400)
    assert "huge" in budget
    assert budget.unpin("huge") == EvictionPlan(("huge",))
    assert budget.used_bytes == 0


def test_an_entry_larger_than_the_budget_that_nobody_holds_is_not_kept() -> None:
    assert ByteBudget(100).add("huge", 500) == EvictionPlan(("huge",))


def test_pinning_counts_as_a_use() -> None:
    budget = ByteBudget(100)
    budget.add("a", 50)
    budget.add("b", 50)
    budget.pin("a")
    budget.unpin("a")
    assert budget.add("c", 50) == EvictionPlan(("b",))


def test_what_pins_kept_beyond_the_budget_goes_when_they_do() -> None:
    budget = ByteBudget(100)
    for key in ("a", "b"):
        budget.pin(key)
        budget.add(key, 80)
    assert budget.used_bytes == 160
    assert budget.unpin("a") == EvictionPlan(("a",))


def test_a_forgotten_entry_waits_for_its_last_pin() -> None:
    budget = ByteBudget(100)
    budget.add("a", 10)
    budget.pin("a")
    budget.pin("a")
    assert budget.forget("a") == EvictionPlan()
    assert budget.unpin("a") == EvictionPlan()
    assert budget.unpin("a") == EvictionPlan(("a",))


def test_a_forgotten_entry_that_is_asked_for_again_stays() -> None:
    budget = ByteBudget(100)
    budget.add("a", 10)
    budget.pin("a")
    budget.forget("a")
    budget.pin("a")
    budget.unpin("a")
    assert budget.unpin("a") == EvictionPlan()
    assert "a" in budget


class BudgetHistory(RuleBasedStateMachine):
    """Any order of leases, arrivals and forgetting, beside the simplest model of what must hold."""

    BUDGET_BYTES = 100
    KEYS = st.sampled_from("abcdef")

    def __init__(self) -> None:
        super().__init__()
        self.budget = ByteBudget(self.BUDGET_BYTES)
        self.present: dict[str, int] = {}
        self.pins: dict[str, int] = {}

    def carry_out(self, plan: EvictionPlan) -> None:
        for key in plan.evict:
            assert not self.pins.get(key), "a pinned entry is never evicted"
            del self.present[key]

    @rule(key=KEYS)
    def pin(self, key: str) -> None:
        self.budget.pin(key)
        self.pins[key] = self.pins.get(key, 0) + 1

    @precondition(lambda self: any(self.pins.values()))
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(key for key, count in self.pins.items() if count)))
        self.pins[key] -= 1
        self.carry_out(self.budget.unpin(key))

    @rule(key=KEYS, size_bytes=st.integers(0, 150))
    def add(self, key: str, size_bytes: int) -> None:
        self.present[key] = size_bytes
        self.carry_out(self.budget.add(key, size_bytes))

    @rule(key=KEYS)
    def forget(self, key: str) -> None:
        self.carry_out(self.budget.forget(key))
        assert self.pins.get(key) or key not in self.present

    @invariant()
    def the_accounts_are_right(self) -> None:
        assert set(self.budget.keys) == set(self.present)
        assert self.budget.used_bytes == sum(self.present.values())
        assert self.budget.pinned == {key for key, count in self.pins.items() if count}

    @invariant()
    def the_budget_holds_unless_all_that_is_left_is_pinned(self) -> None:
        over = self.budget.used_bytes > self.BUDGET_BYTES
        assert not over or all(self.pins.get(key) for key in self.present)

    def teardown(self) -> None:
        for key in self.pins:
            while self.pins[key]:
                self.pins[key] -= 1
                self.carry_out(self.budget.unpin(key))
        assert self.budget.used_bytes <= self.BUDGET_BYTES


TestBudgetHistory = BudgetHistory.TestCase
TestBudgetHistory.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, database=None)
