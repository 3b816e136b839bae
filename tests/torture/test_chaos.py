"""Training on several nodes while parts of it are killed: nothing is lost, done twice or left behind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest
from chaos import (
    DEADLINE_S,
    NUM_STEPS,
    OPTIONS,
    RANK,
    SAMPLER,
    Nodes,
    Run,
    assert_each_visit_once,
    assert_same_run,
    farthest,
    kill,
    model_of,
    train,
)

from ats_stream import cli
from ats_stream.demo.digits import DigitsConfig, build_archive
from ats_stream.workers.ledger import read_ledger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# every node has one CPU: of TWO it holds a rank and a sampler, of TWO_APART a rank or samplers
TWO = ("--ranks", "2", "--cpus-per-rank", "0.7")
TWO_APART = ("--ranks", "2", "--cpus-per-rank", "0.9", "--max-failures", "3")
TOLERANCE = 1e-6
"""Of weights after ``NUM_STEPS`` steps, of which some were summed over another number of ranks."""
NUM_TORTURE_SEEDS = 2


@pytest.fixture(scope="module")
def table(digits: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = DigitsConfig(
        num_train=7, num_val=3, num_test=0, classes=(0, 1), num_matching=4, num_clutter=4, side_px=512
    )
    return build_archive(tmp_path_factory.mktemp("archive"), digits, config)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    made = Nodes()
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def whole(nodes: Nodes, table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks, each on a node of its own, without accidents."""
    out = tmp_path_factory.mktemp("whole") / "run"
    nodes.have(2)
    train(nodes, table, out, *TWO)
    return out


def test_two_nodes_train_the_model_of_one_process(whole: Path, table: Path, tmp_path: Path) -> None:
    assert cli.main(["train", str(table), "--out", str(tmp_path / "serial"), *OPTIONS]) == 0
    assert farthest(model_of(whole), model_of(tmp_path / "serial")) < TOLERANCE
    assert_each_visit_once(whole)
    assert {record.rank for record in read_ledger(whole)} == {0, 1}


def test_a_run_goes_on_with_the_node_that_is_left(
    nodes: Nodes, whole: Path, table: Path, tmp_path: Path
) -> None:
    nodes.have(2)
    options = (*TWO, "--min-ranks", "1", "--max-failures", "1")
    run = train(nodes, table, tmp_path / "run", *options, accidents={2: lambda _: nodes.kill(1)})
    assert "start 1 of 1 after a failure" in run.text
    assert "training with 1 of 2 ranks: no room for more" in run.text
    assert_each_visit_once(tmp_path / "run")
    ranks = {record.step: record.rank for record in read_ledger(tmp_path / "run")}
    assert ranks[0] == 1  # of the two lines of a step the last
    assert ranks[NUM_STEPS - 1] == 0
    assert farthest(model_of(tmp_path / "run"), model_of(whole)) < TOLERANCE


# --- accidents at a fixed number of ranks


def kill_sampler(nodes: Nodes, rng: np.random.Generator) -> None:
    kill([nodes.running(SAMPLER)[rng.integers(2)]])


def kill_samplers(nodes: Nodes, _rng: np.random.Generator) -> None:
    kill(nodes.running(SAMPLER))


def kill_sampler_node(nodes: Nodes, _rng: np.random.Generator) -> None:
    nodes.kill(nodes.place_of(SAMPLER))
    nodes.add()


def kill_rank(nodes: Nodes, rng: np.random.Generator) -> None:
    kill([nodes.running(RANK)[rng.integers(2)]])


def kill_rank_node(nodes: Nodes, _rng: np.random.Generator) -> None:
    nodes.kill(nodes.place_of(RANK))
    nodes.add()


ACCIDENTS: dict[str, Callable[[Nodes, np.random.Generator], None]] = {
    "sampler": kill_sampler,
    "all samplers": kill_samplers,
    "sampler node": kill_sampler_node,
    "rank": kill_rank,
    "rank node": kill_rank_node,
}


def test_one_accident_of_each_kind_in_one_run_changes_no_bit(
    nodes: Nodes, whole: Path, table: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    nodes.have(3)
    first = Run(nodes, table, tmp_path / "run", *TWO_APART)
    try:
        for epoch, kind in ((1, "sampler"), (2, "all samplers"), (3, "sampler node")):
            first.wait_for_epoch(epoch)
            ACCIDENTS[kind](nodes, rng)
        first.wait_for_epoch(4)
    finally:
        first.kill()  # the driver
    nodes.wait_until_idle()
    accidents = {5: lambda _: kill_rank(nodes, rng)}
    second = train(nodes, table, tmp_path / "run", *TWO_APART, accidents=accidents)
    assert "going on from" in second.text
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.torture
@pytest.mark.parametrize("seed", range(NUM_TORTURE_SEEDS))
@pytest.mark.parametrize("kind", [*ACCIDENTS, "driver"])
def test_an_accident_at_a_random_moment_changes_no_bit(
    nodes: Nodes, whole: Path, table: Path, tmp_path: Path, kind: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    nodes.have(3)
    epoch, moment_s = int(rng.integers(1, 6)), 0.6 * float(rng.random())

    def accident(run: Run) -> None:
        run.wait_a_moment(moment_s)
        if kind == "driver":
            run.kill()
        else:
            ACCIDENTS[kind](nodes, rng)

    if kind == "driver":
        run = Run(nodes, table, tmp_path / "run", *TWO_APART)
        run.wait_for_epoch(epoch)
        accident(run)
        nodes.wait_until_idle()
        train(nodes, table, tmp_path / "run", *TWO_APART)
    else:
        train(nodes, table, tmp_path / "run", *TWO_APART, accidents={epoch: accident})
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.torture
@pytest.mark.parametrize("seed", range(NUM_TORTURE_SEEDS))
def test_a_killed_command_takes_the_ray_that_it_started_with_it(
    table: Path, tmp_path: Path, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    run = Run(None, table, tmp_path / "run", *TWO)
    run.wait_for_epoch(int(rng.integers(1, 6)))
    run.wait_a_moment(0.6 * float(rng.random()))
    children = psutil.Process(run.process.pid).children(recursive=True)
    assert "raylet" in {process.name() for process in children}
    run.kill()
    _, left = psutil.wait_procs(children, timeout=DEADLINE_S)
    assert [process.name() for process in left] == []
    again = Run(None, table, tmp_path / "run", *TWO)
    assert again.end() == 0, again.text
    assert_each_visit_once(tmp_path / "run")


@pytest.mark.torture
def test_a_run_shrinks_and_grows_with_its_nodes(
    nodes: Nodes, whole: Path, table: Path, tmp_path: Path
) -> None:
    nodes.have(1)
    options = (*TWO, "--min-ranks", "1", "--max-failures", "2", "--epochs", "60")
    run = train(nodes, table, tmp_path / "run", *options, accidents={3: lambda _: nodes.add()})
    assert "there is room for more than 1 ranks; starting again" in run.text
    ranks = [record.rank for record in read_ledger(tmp_path / "run")]
    assert (ranks[0], ranks[-1]) == (0, 1)
