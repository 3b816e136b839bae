"""Arrays handed over through shared memory arrive bit for bit; a place is lent again when all are gone."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from tiny import MODEL, SAMPLER, assert_same_item, make_sampler, table, visit, weights

from ats_stream.workers.handover import Neighbour, Shelf
from ats_stream.workers.ray_executor import RayExecutor, _Published

if TYPE_CHECKING:
    from types import ModuleType

    from ats_stream.io import Archive

pytestmark = pytest.mark.skipif(Shelf.if_possible("", 1) is None, reason="memory without a name is of Linux")
NODE = "a node"
PLACE_BYTES = 1 << 16


@given(
    st.lists(
        npst.arrays(
            st.sampled_from([np.uint8, np.uint16, np.int64, np.float32, np.bool_]),
            npst.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5),
        ),
        max_size=6,
    ),
    st.text(max_size=5),
)
def test_what_is_put_is_taken(arrays: list[np.ndarray], word: str) -> None:
    shelf = Shelf(NODE, PLACE_BYTES, num_places=2)
    neighbour = Neighbour(NODE)
    for _ in range(3):  # in places used before
        place = shelf.lend()
        assert place is not None
        parcel = neighbour.put((word, arrays), place)
        assert parcel is not None
        copy = neighbour.get(parcel, place)
        taken = shelf.take(parcel, place)
        for found_word, found in (copy, taken):
            assert found_word == word
            for one, wanted in zip(found, arrays, strict=True):
                assert (one.dtype, one.shape, one.tobytes()) == (wanted.dtype, wanted.shape, wanted.tobytes())
        assert not any(one.flags.writeable for one in taken[1])


def test_a_place_comes_back_with_the_last_array_in_it() -> None:
    shelf = Shelf(NODE, PLACE_BYTES, num_places=1)
    place = shelf.lend()
    assert place is not None
    assert shelf.lend() is None
    parcel = shelf.put([np.arange(100), np.arange(7.0)], place)
    assert parcel is not None
    first, second = shelf.take(parcel, place)
    part = second[3:]
    del first, second
    gc.collect()
    assert shelf.num_free == 0
    assert part.tolist() == [3.0, 4.0, 5.0, 6.0]
    del part
    gc.collect()
    assert shelf.lend() == place


def test_a_value_travels_otherwise_where_its_place_does_not_do() -> None:
    shelf = Shelf(NODE, PLACE_BYTES, num_places=1)
    place = shelf.lend()
    assert place is not None
    small = np.zeros(10)
    assert Neighbour("another node").put(small, place) is None
    assert Neighbour(NODE).put(np.zeros(PLACE_BYTES + 1, np.uint8), place) is None
    # the process of that number is another one there, or has closed it
    assert Neighbour(NODE).put(small, place._replace(name="ats-stream-else")) is None
    assert Neighbour(NODE).put(small, place._replace(fd=1 << 20)) is None
    assert Neighbour(NODE).put(small, place) is not None


@pytest.mark.slow
def test_a_sampler_draws_with_no_weights_but_those_it_was_asked_to(
    archive: Archive, ray_local: ModuleType
) -> None:
    executor = RayExecutor(*table(archive), MODEL, SAMPLER, num_samplers=1, cpus_per_sampler=0.1)
    reference = make_sampler(archive)
    try:
        executor.submit(visit(0), weights(0)).result()
        assert executor._reaches == [True]
        shelf = executor._shelf
        assert shelf is not None
        # their place was lent to others before the sampler came to look
        published = executor._published[weights(1).key] = _Published(weights(1), shelf)
        assert published.kept is not None
        parcel, place = published.kept
        shelf._memory[place.first : place.first + len(parcel)] = bytes(len(parcel))
        item = executor.submit(visit(1), weights(1)).result()
        assert_same_item(item, reference.sample(visit(1), weights(1)))
        again = executor.submit(visit(2), weights(1)).result()
        assert_same_item(again, reference.sample(visit(2), weights(1)))
        assert executor._reaches == [True]
    finally:
        executor.close()
