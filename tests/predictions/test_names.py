"""File names of slides: whatever the names, no two alike, and the same every time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ats_stream.predictions.names import MAX_BYTES, unique_names

# few letters, so that names meet, with the endings that are added
WORDS = st.lists(st.text("aAB-12.ü/", max_size=6), max_size=12)


@given(WORDS)
def test_no_two_are_alike_on_any_file_system(names: list[str]) -> None:
    found = unique_names(names)
    assert len({name.casefold() for name in found}) == len(found) == len(names)
    assert found == unique_names(names)
    for name in found:
        assert name
        assert not set(name) & set('/\\:*?"<>|\0')
        assert not name.startswith(".")


def test_a_plain_name_stays() -> None:
    assert unique_names(["CMU-1.svs", "TCGA-3C-AALI-01Z", "Präparat 7"]) == (
        "CMU-1.svs",
        "TCGA-3C-AALI-01Z",
        "Präparat_7",
    )


def test_long_names_fit_with_their_endings() -> None:
    names = unique_names(["片" * 300, "片" * 301])
    assert all(len(name.encode()) <= MAX_BYTES + len("-2") for name in names)
    assert len(set(names)) == 2
