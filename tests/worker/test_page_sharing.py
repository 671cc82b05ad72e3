from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from lorry.worker import page_sharing
from lorry.worker.plan import Plan
from tests.support.schedules import PAGE_TOKENS, STOP, Driver
from tests.support.shadow import ShadowPool


def sharing(**fields: Any) -> Driver:
    driver = Driver(prefix_cache=True, **fields)
    ShadowPool(driver)
    return driver


def starts(driver: Driver, plan: Plan) -> dict[int, int]:
    """First position that the step computes of each request."""
    assert plan.batch is not None
    numbers = driver.scheduler.table.number_R[plan.batch.row_S].tolist()
    return dict(zip(numbers, plan.batch.start_S.tolist(), strict=True))


def run(driver: Driver, *numbers: int) -> list[int]:
    """Run everything to its end; where each of `numbers` was first computed."""
    first = dict[int, int]()
    while driver.scheduler.requests:
        plan = driver.step()
        if plan.batch is not None:
            first = starts(driver, plan) | first
    return [first[number] for number in numbers]


def test_a_prompt_is_computed_from_where_an_earlier_one_differs() -> None:
    driver = sharing()
    driver.send(1, [*range(10, 20), 20, 21], 2)
    assert run(driver, 1) == [0]
    driver.send(2, [*range(10, 20), 30, 31], 2)
    assert run(driver, 2) == [8]
    assert driver.finished[2].cached_tokens == 8


def test_the_last_token_is_always_computed() -> None:
    driver = sharing()
    for number in range(1, 9):
        driver.send(number, [*range(10, 10 + 4 + number)], 1)
        run(driver)
    for number in range(1, 9):
        driver.send(10 + number, [*range(10, 10 + 4 + number)], 1)
        assert run(driver, 10 + number) == [(3 + number) // 4 * 4]


def test_a_running_request_lends_its_pages() -> None:
    driver = sharing()
    driver.submit(1, prompt=9, max_tokens=30)
    driver.step()
    driver.submit(2, prompt=9, max_tokens=30)
    assert starts(driver, driver.step())[2] == 8
    table = driver.scheduler.table
    assert (table.block_table_RP[0, :2] == table.block_table_RP[1, :2]).all()
    assert len(driver.scheduler.prefixes.pages) == 2
    assert driver.scheduler.pool.kv == 2


def test_pages_are_lent_only_once_their_step_was_read() -> None:
    driver = sharing(max_in_flight=2)
    driver.submit(1, prompt=9, max_tokens=9)
    driver.step()
    driver.submit(2, prompt=9, max_tokens=9)
    assert starts(driver, driver.step())[2] == 0
    driver.submit(3, prompt=9, max_tokens=9)
    assert starts(driver, driver.step())[3] == 8


def test_two_that_compute_the_same_at_the_same_time_keep_a_page_each() -> None:
    driver = sharing(step_tokens=32)
    driver.submit(1, prompt=13, max_tokens=2)
    driver.submit(2, prompt=13, max_tokens=2)
    driver.run()
    assert len(driver.scheduler.prefixes.pages) == 3
    assert driver.scheduler.pool.kv == 0


def test_what_was_cancelled_before_its_step_was_read_is_not_cached() -> None:
    driver = sharing(max_in_flight=2, step_tokens=8)
    driver.submit(1, prompt=15, max_tokens=9)
    driver.step()
    driver.step()  # the first chunk's results are read
    driver.note(*driver.scheduler.cancel([1]))
    driver.scheduler.check_integrity()
    assert len(driver.scheduler.prefixes.pages) == 2
    driver.submit(2, prompt=15, max_tokens=1)
    assert run(driver, 2) == [8]


def test_output_is_part_of_the_next_turns_prefix() -> None:
    driver = sharing()
    driver.send(1, [5] * 6, 7)
    driver.run()
    # 13 tokens are known, but the KV of the last one was never computed.
    driver.send(2, [5] * 6 + driver.tokens[1] + [8, 8, 8, 8], 2)
    assert run(driver, 2) == [12]


def test_a_request_that_goes_on_elsewhere_takes_its_output_from_the_cache() -> None:
    driver = sharing()
    driver.send(1, [5] * 6, 12)
    driver.run()
    driver.send(2, [5] * 6 + driver.tokens[1][:9], 12, generated_tokens=9)
    assert run(driver, 2) == [12]
    assert driver.tokens[1][9:] == driver.tokens[2]
    assert driver.finished[2].cached_tokens == 6  # of the prompt


def test_a_preempted_request_finds_its_own_pages() -> None:
    driver = sharing(pages=9)
    driver.send(1, [5] * 4, 22)
    driver.send(2, [6] * 4, 22)
    first = dict[int, int]()
    while driver.scheduler.requests:
        plan = driver.step()
        assert plan.batch is not None
        if 2 in first and plan.preempted == [2]:
            break
        first |= starts(driver, plan)
    driver.note(*driver.scheduler.cancel([1]))
    assert starts(driver, driver.step())[2] > 0
    driver.run()
    assert len(driver.tokens[2]) == 22


def test_tenants_and_versions_share_nothing() -> None:
    driver = sharing(adapter_pages={b"a": 1, b"b": 1})
    cases = [(t, v) for t in ("one", "two") for v in (b"", b"a", b"b")]
    for number, (tenant, version) in enumerate(cases, start=1):
        driver.send(number, 20, 2, tenant=tenant, version=version)
        assert run(driver, number) == [0]
    assert driver.scheduler.prefixes.hit_tokens == 0
    for number, (tenant, version) in enumerate(cases, start=10):
        driver.send(number, 20, 2, tenant=tenant, version=version)
        assert run(driver, number) == [16]
    assert driver.scheduler.prefixes.hit_tokens == 16 * len(cases)
    assert driver.scheduler.prefixes.query_tokens == 40 * len(cases)


def test_pages_outlive_the_residency_of_their_adapter() -> None:
    driver = sharing(pages=30, adapter_pages={b"a": 4})
    driver.send(1, 17, 2, version=b"a")
    driver.run()
    adapter = driver.scheduler.residency.find(b"a")
    assert adapter is not None
    driver.scheduler.residency.evict(adapter)
    driver.scheduler.residency.drop_image(adapter)
    driver.send(2, 17, 2, version=b"a")
    assert run(driver, 2) == [16]


def test_a_request_for_logprobs_of_its_prompt_computes_all_of_it() -> None:
    driver = sharing()
    driver.send(1, 17, 1)
    driver.run()
    driver.send(2, 17, 1, prompt_logprobs=0)
    assert run(driver, 2) == [0]
    assert driver.scheduler.prefixes.query_tokens == 17


def test_nothing_is_kept_when_it_is_off() -> None:
    driver = Driver(prefix_cache=False)
    for number in (1, 2):
        driver.send(number, 17, 9)
        assert run(driver, number) == [0]
    assert driver.scheduler.pool.free == driver.scheduler.pool.total


def test_requests_are_counted_once_though_preempted() -> None:
    driver = sharing(pages=9)
    driver.send(1, [5] * 4, 22)
    driver.send(2, [6] * 4, 22)
    driver.run()
    assert driver.scheduler.preemptions > 0
    assert driver.scheduler.prefixes.query_tokens == 8


def test_a_request_that_needs_the_whole_pool_gets_it() -> None:
    driver = sharing(pages=8)
    driver.send(1, [5] * 20, 6)
    driver.run()
    driver.send(2, [6] * 20, 12)
    driver.send(3, [5] * 20, 12)
    driver.run()
    assert [len(driver.tokens[number]) for number in (1, 2, 3)] == [6, 12, 12]


def test_a_borrowed_page_is_not_evicted_for_the_borrowers_other_pages() -> None:
    """The request's room is made out of others', though its prefix is the longest idle."""
    driver = sharing(pages=8)
    driver.send(1, [5] * 13, 1)
    driver.run()
    driver.send(2, [6] * 13, 1)
    driver.run()
    driver.send(3, [5] * 13 + [7] * 10, 1)
    assert run(driver, 3) == [12]


def test_a_step_offers_few_pages_at_a_time_and_forgets_none(monkeypatch: Any) -> None:
    monkeypatch.setattr(page_sharing, "MAX_OFFERED_PAGES", 2)
    driver = sharing(step_tokens=32)
    driver.submit(1, prompt=29, max_tokens=20)
    cached = []
    for _ in range(5):
        driver.step()
        cached.append(len(driver.scheduler.prefixes.pages))
    assert cached == [2, 4, 6, 8, 8]
    driver.run()
    assert len(driver.scheduler.prefixes.pages) == 12


def test_a_request_that_ends_offers_what_is_left(monkeypatch: Any) -> None:
    monkeypatch.setattr(page_sharing, "MAX_OFFERED_PAGES", 1)
    driver = sharing(step_tokens=32)
    driver.submit(1, prompt=29, max_tokens=1)
    driver.run()
    assert len(driver.scheduler.prefixes.pages) == 7


def test_a_waiting_request_is_admitted_once_others_have_computed_its_prefix() -> None:
    driver = sharing(pages=10, step_tokens=32)
    driver.submit(1, prompt=20, max_tokens=8)
    driver.submit(2, prompt=20, max_tokens=8)
    assert starts(driver, driver.step()) == {1: 0}
    assert starts(driver, driver.step()) == {1: 20, 2: 16}
    driver.run()


VERSIONS = {b"": 0, b"a": 1, b"b": 3, b"c": 7}
PROMPTS = st.tuples(st.integers(0, 24), st.integers(0, 2), st.integers(1, 12)).map(
    lambda parts: [7] * parts[0] + [10 + parts[1]] * parts[2]
)
ACTIONS = st.one_of(
    st.tuples(
        st.just("submit"),
        PROMPTS,
        st.integers(1, 30),
        st.sampled_from(sorted(VERSIONS)),
        st.sampled_from(["one", "two"]),
        st.sampled_from([None, None, None, 0]),
    ),
    st.tuples(st.just("repeat"), st.integers(1, 40), st.integers(1, 20)),
    st.tuples(st.just("cancel"), st.integers(1, 40)),
    st.tuples(st.just("step"), st.integers(1, 6)),
    st.tuples(st.just("draw"), st.sampled_from([1, 7, STOP])),
    st.tuples(st.just("prefetch"), st.lists(st.sampled_from([b"a", b"b", b"c"]), max_size=3)),
    st.tuples(st.just("reclaim"), st.sampled_from([b"a", b"b", b"c"])),
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(ACTIONS, max_size=60), st.integers(16, 50), st.integers(8, 24), st.sampled_from([1, 2])
)
def test_no_schedule_makes_a_sequence_read_what_is_not_its_own(
    actions: list[tuple[Any, ...]], pages: int, step_tokens: int, max_in_flight: int
) -> None:
    driver = sharing(
        pages=pages,
        adapter_pages=VERSIONS,
        step_tokens=step_tokens,
        max_in_flight=max_in_flight,
        max_context_tokens=(pages - max(VERSIONS.values())) * PAGE_TOKENS,
    )
    history: list[tuple[list[int], bytes, dict[str, Any]]] = []
    for action, *arguments in actions:
        _apply(driver, history, str(action), arguments)
    driver.next_token = 1
    driver.run()
    for number, tokens in driver.tokens.items():
        end = driver.finished[number]
        assert end.completion_tokens == len(tokens) or end.failure is not None
    assert driver.scheduler.pool.kv == 0
    assert len(driver.scheduler.prefixes.idle) == driver.scheduler.pool.prefix


def _apply(
    driver: Driver,
    history: list[tuple[list[int], bytes, dict[str, Any]]],
    action: str,
    arguments: list[Any],
) -> None:
    scheduler, number = driver.scheduler, len(driver.tokens) + 1
    match action:
        case "submit":
            prompt, max_tokens, version, tenant, prompt_logprobs = arguments
            fields = {"tenant": tenant, "prompt_logprobs": prompt_logprobs}
            history.append((prompt, version, fields))
            driver.send(number, prompt, max_tokens, version=version, **fields)
        case "repeat" if history:
            which, max_tokens = arguments[0] % len(history), arguments[1]
            prompt, version, fields = history[which]
            answer = driver.tokens[which + 1]
            history.append((prompt + answer, version, fields))
            driver.send(number, prompt + answer, max_tokens, version=version, **fields)
        case "cancel":
            driver.note(*scheduler.cancel(arguments))
        case "step":
            for _ in range(arguments[0]):
                driver.step()
        case "draw":
            driver.next_token = arguments[0]
        case "prefetch":
            scheduler.set_prefetch(arguments[0])
        case "reclaim":
            adapter = scheduler.residency.find(arguments[0])
            if adapter is not None and adapter.image is not None:
                scheduler.residency.drop_image(adapter)
    scheduler.check_integrity()
