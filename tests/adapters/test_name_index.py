"""Names by owner, in order, whatever comes and goes."""

from hypothesis import given
from hypothesis import strategies as st

from server.adapters.name_index import NameIndex

OWNERS = (None, "acme", "beta")
CHANGES = st.lists(st.tuples(st.sampled_from("abcdefg"), st.sampled_from((*OWNERS, "gone"))), max_size=40)


@given(CHANGES)
def test_every_owner_sees_its_own_and_the_operators(changes: list[tuple[str, str | None]]) -> None:
    index, right = NameIndex(), dict[str, str | None]()
    for name, owner in changes:
        if owner != "gone":
            index.put(name, owner)
            right[name] = owner
        elif right.pop(name, "none") != "none":
            index.remove(name)
    assert index.owners() == right
    for owner in OWNERS:
        of_owner = sorted(name for name, whose in right.items() if whose == owner)
        assert list(index.of(owner)) == of_owner
        seen = sorted(name for names in index.open_to(owner) for name in names)
        assert seen == sorted(name for name, whose in right.items() if owner is None or whose in (owner, None))
        assert all(list(names) == sorted(set(names)) for names in index.open_to(owner))
