from hypothesis import given
from hypothesis import strategies as st

from capture.exchange import MOST_WAITING, exchanges


def operation(op):
    return (op, {"record": "Operation", "op": op})


def result(op):
    return (0, {"record": "Result", "op": op})


def ops(records):
    return [(e.operation["op"], e.result is not None) for e in exchanges(records)]


def test_operations_come_in_their_order_with_their_results():
    told = [operation(1), operation(2), result(2), (0, {"record": "Gap"}), result(1), operation(3)]
    assert ops(told) == [(1, True), (2, True), (3, False)]


def test_an_answer_is_given_as_soon_as_it_is_known():
    seen = []

    def records():
        for op in (1, 2, 3):
            yield operation(op)
            yield result(op)
            seen.append(op)

    pairs = exchanges(records())
    assert next(pairs).operation["op"] == 1
    assert seen == []


def test_an_operation_without_an_answer_does_not_hold_up_a_long_session():
    last = 3 * MOST_WAITING
    read = 0

    def records():
        nonlocal read
        yield operation(1)
        for op in range(2, last):
            read = op
            yield operation(op)
            yield result(op)

    first = next(exchanges(records()))
    assert first.operation["op"] == 2
    assert read == MOST_WAITING + 2, "no more than that waits in memory"
    assert sorted(ops(records())) == [(1, False), *[(op, True) for op in range(2, last)]]


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 8)), max_size=40))
def test_every_operation_comes_once_whatever_the_order(said):
    told, asked, answered = [], [], set()
    for is_result, op in said:
        if is_result:
            told.append(result(op))
            if op in asked:
                answered.add(op)
        elif op not in asked:
            asked.append(op)
            told.append(operation(op))
    assert sorted(ops(told)) == sorted((op, op in answered) for op in asked)
