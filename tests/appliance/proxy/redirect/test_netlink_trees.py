from hypothesis import given
from hypothesis import strategies as st

from appliance.proxy.redirect.netlink import agrees, be32, encode, first, parse, text

KINDS = st.integers(1, 0x3FFF)
VALUES = st.binary(max_size=40)
TREES = st.recursive(
    VALUES,
    lambda inner: st.lists(st.tuples(KINDS, inner), min_size=1, max_size=4).map(tuple),
    max_leaves=12,
).filter(lambda value: not isinstance(value, bytes))


@given(TREES)
def test_what_is_encoded_is_parsed_back_level_by_level(tree):
    data = encode(tree)
    assert len(data) % 4 == 0
    back = parse(data)
    assert [kind for kind, _ in back] == [kind for kind, _ in tree]
    for (_, wanted), (_, got) in zip(tree, back, strict=True):
        assert got == (wanted if isinstance(wanted, bytes) else encode(wanted))


@given(TREES)
def test_a_tree_agrees_with_what_it_is_encoded_as(tree):
    assert agrees(tree, encode(tree))


@given(TREES, st.data())
def test_a_changed_value_does_not_agree(tree, data):
    number = data.draw(st.integers(0, len(tree) - 1))
    kind, value = tree[number]
    other = value + b"x" if isinstance(value, bytes) else (*value, value[0])
    changed = (*tree[:number], (kind, other), *tree[number + 1 :])
    assert not agrees(tree, encode(changed))


@given(TREES, VALUES)
def test_attributes_of_the_kernels_own_are_not_looked_at(tree, value):
    free = next(kind for kind in range(1, 0x3FFF) if kind not in dict(tree))
    assert agrees(tree, encode((*tree, (free, value))))
    assert not agrees((*tree, (free, value)), encode(tree))


@given(st.binary(max_size=60))
def test_junk_is_parsed_without_an_error(data):
    for _, value in parse(data):
        assert len(value) <= len(data)


def test_the_bytes_are_those_of_the_kernels_headers():
    tree = ((1, text("ab")), (2, ((3, be32(7)),)))
    assert (
        encode(tree).hex()
        == (
            "0700" + "0100" + "61620000"  # length 7, type 1, "ab", NUL, padding
            "0c00" + "0280" + "0800" + "0300" + "00000007"
        )
    )  # nested: the flag 0x8000 in the type
    assert first(encode(tree), 2, 3) == be32(7)
    assert first(encode(tree), 2, 4) is None
