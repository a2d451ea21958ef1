from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.data import check
from fedsim.data.check import good_records
from fedsim.data.records import MALFORMED, Records, Tally

COLUMNS = {"user": "u", "text": "t"}
TEXTS = ["a", "ä", " ", "", "\n", "\ud800", "7.0", "1e+300", " b", "1.0E7"]
VALUES = st.sampled_from([*TEXTS, None, 0, 7, True, 1.0, 1.5, 2.0**60, float("nan"), [], b"x", MALFORMED])


@settings(max_examples=300)
@given(st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=6))
def test_many_at_once_are_judged_as_one_by_one(rows) -> None:
    columns = {"u": [row[0] for row in rows], "t": [row[1] for row in rows]}
    together, one_by_one = Tally(), Tally()
    whole = good_records([Records(columns=columns, origin="x", first=1)], COLUMNS, None, together)
    singles = [
        Records(columns={"u": [user], "t": [text]}, origin="x", first=place + 1)
        for place, (user, text) in enumerate(rows)
    ]
    assert whole == good_records(singles, COLUMNS, None, one_by_one)
    assert together == one_by_one
    assert len(whole["user"]) + together.total == len(rows)


def test_good_records_take_the_short_way(monkeypatch) -> None:
    monkeypatch.setattr(check, "_check", None)
    columns = {"u": ["ann", "bob"], "t": ["one", "zwölf"]}
    good = good_records([Records(columns=columns, origin="x", first=1)], COLUMNS, None, Tally())
    assert good == {"user": ["ann", "bob"], "text": ["one", "zwölf"]}
