"""Many slides, many workers: the same bytes from all executors, bad slides, dead workers, tables."""

from __future__ import annotations

import os
from pathlib import Path

import deadly_array
import numpy as np
import pytest
import tifffile

from ats_stream.errors import ArchiveError, InputError, SlideError, StorageError
from ats_stream.io import ConvertConfig, convert, open_pyramid, preprocess, target_path, write_pyramid
from ats_stream.io.conversion.executors import SerialExecutor, make_executor
from ats_stream.io.conversion.inputs import expand_inputs, pixel_sizes
from ats_stream.io.conversion.plan import ConvertPlan, Shard, build_levels
from ats_stream.io.conversion.run import run_jobs
from ats_stream.io.conversion.state import ConvertJob

CONFIG = ConvertConfig(chunk_px=32, shard_px=128, coarsest_px=64)
SIZES = ((600, 500), (130, 700), (90, 40))


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def slides(tmp_path_factory, picture):
    """Three slides of tiles, one of them JPEG, and one that is broken."""
    folder = tmp_path_factory.mktemp("slides")
    for number, (height, width) in enumerate(SIZES):
        image = picture((3, height, width), seed=number).transpose(1, 2, 0)
        compression = "jpeg" if number == 1 else "zlib"
        path = folder / f"{number}.tif"
        tifffile.imwrite(path, image, tile=(64, 64), compression=compression, photometric="rgb")
    (folder / "broken.tif").write_bytes((folder / "0.tif").read_bytes()[:5000])
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def serial(slides, tmp_path_factory):
    """What this process makes, for two profiles."""
    found = {}
    for profile in ("lossless", "pass"):
        out = tmp_path_factory.mktemp(profile)
        config = ConvertConfig(profile=profile, chunk_px=32, shard_px=128, coarsest_px=64)
        results = list(preprocess(slides, out, config, progress=False))
        assert [r.ok for r in results] == [True, True, True, False]
        found[profile] = (files(out), [str(r).split(" MPix/s")[0][:30] for r in results])
    return found


@pytest.mark.parametrize("profile", ["lossless", "pass"])
@pytest.mark.parametrize("kind", ["processes", pytest.param("ray", marks=pytest.mark.slow)])
def test_all_executors_give_the_same_bytes(slides, serial, tmp_path, request, kind, profile):
    if kind == "ray":
        request.getfixturevalue("ray_local")
    config = ConvertConfig(profile=profile, chunk_px=32, shard_px=128, coarsest_px=64)
    results = list(preprocess(slides, tmp_path, config, workers=2, on_ray=kind == "ray", progress=False))
    assert [r.ok for r in results] == [True, True, True, False]
    # manifests too: they are written in one order in the end
    assert files(tmp_path) == serial[profile][0]
    assert [str(r).split(" MPix/s")[0][:30] for r in results] == serial[profile][1]


def test_processes_go_on_where_this_one_stood(slides, serial, tmp_path, monkeypatch):
    from ats_stream.io.conversion import array_writer

    write, num_written = array_writer.write_parts, []

    def failing(path, parts):
        num_written.append(path)
        if len(num_written) == 15:
            raise OSError("no more")
        return write(path, parts)

    monkeypatch.setattr(array_writer, "write_parts", failing)
    with pytest.raises(StorageError, match="no more"):
        list(preprocess(slides[:3], tmp_path, CONFIG, progress=False))
    monkeypatch.undo()
    results = list(preprocess(slides[:3], tmp_path, CONFIG, workers=2, progress=False))
    assert [r.num_resumed for r in results] == [14, 0, 0]
    assert files(tmp_path) == serial["lossless"][0]


def test_strict_stops_at_the_first_slide_that_fails(slides, tmp_path):
    order = [slides[0], slides[3], slides[1]]
    for workers in (1, 2):
        out = tmp_path / str(workers)
        with pytest.raises(SlideError, match=r"broken\.tif"):
            list(preprocess(order, out, CONFIG, workers=workers, is_strict=True, progress=False))
        assert not Path(target_path(slides[3], out)).exists()


@pytest.mark.parametrize("kind", ["processes", pytest.param("ray", marks=pytest.mark.slow)])
def test_a_slide_that_kills_its_worker_fails_alone(slides, serial, tmp_path, request, kind):
    from ats_stream.io.conversion.slides import ArraySlide

    out = str(tmp_path)
    sources = [
        str(slides[0]),
        ArraySlide(deadly_array.Deadly(main=os.getpid())),
        str(slides[1]),
        str(slides[2]),
    ]
    jobs = [
        ConvertJob(source=source, target=f"{out}/{name}.ome.zarr", config=CONFIG)
        for source, name in zip(sources, ("0", "deadly", "1", "2"), strict=True)
    ]
    if kind == "ray":
        ray = request.getfixturevalue("ray_local")
        # its workers do not have the path of the tests
        ray.cloudpickle.register_pickle_by_value(deadly_array)
        request.addfinalizer(lambda: ray.cloudpickle.unregister_pickle_by_value(deadly_array))
    results = list(run_jobs(jobs, make_executor(2, on_ray=kind == "ray"), progress=False))
    assert [r.ok for r in results] == [True, False, True, True]
    says = {"processes": "a worker process ended with exit code -9", "ray": "its Ray worker died"}
    assert says[kind] in results[1].reason
    assert files(tmp_path) == serial["lossless"][0]


def test_a_lazy_array_is_computed_by_processes(tmp_path, picture):
    import dask.array

    image = picture((3, 300, 401))
    lazy = dask.array.from_array(image, chunks=(3, 100, 333))
    write_pyramid(image, tmp_path / "a.zarr", CONFIG, progress=False)
    write_pyramid(lazy, tmp_path / "b" / "a.zarr", CONFIG, workers=2, progress=False)
    assert files(tmp_path / "a.zarr") == files(tmp_path / "b" / "a.zarr")


@pytest.mark.parametrize("shape", [(3, 2000, 3000), (1, 100, 5000), (2, 40, 300, 500), (1, 9, 40, 90, 70)])
@pytest.mark.parametrize("is_whole", [False, True])
def test_tasks_cover_every_shard_once_and_come_after_what_they_need(shape, is_whole):
    space = ("t", "z", "y", "x")[-(len(shape) - 1) :]
    shapes = [shape]
    for _ in range(4):
        shapes.append((shape[0], *(-(-n // 2) for n in shapes[-1][1:])))
    levels = build_levels(shapes, space, np.dtype(np.uint8), ConvertConfig(chunk_px=8, shard_px=16))
    plan = ConvertPlan(
        levels=levels, attributes={}, profile="lossless", pixel_size_um=None, tissue_level=None
    )
    shards = list(plan.shards())
    tasks = plan.tasks(shards, is_whole=is_whole)
    made = [shard for task, _ in tasks for shard in task.shards]
    assert sorted(made) == sorted(shards)
    number_of = {shard: number for number, (task, _) in enumerate(tasks) for shard in task.shards}
    before = [set(needs) for _, needs in tasks]
    for number, needs in enumerate(before):
        assert all(n < number for n in needs)
    for shard in shards:
        if shard.level > 0:
            children = [child for child, _ in plan.children(shard)]
            assert all(plan.parent(child) == shard for child in children)
            for child in children:
                own, under = number_of[shard], number_of[child]
                assert under == own or under in before[own]
    if not is_whole:
        assert max(sum(s.level == 0 for s in task.shards) for task, _ in tasks) <= 16
    some = [shard for shard in shards if hash(shard.place) % 3 == 0 or shard.level == 4]
    assert sorted(s for task, _ in plan.tasks(some, is_whole=is_whole) for s in task.shards) == sorted(some)
    assert Shard(0, (0,) * len(space)) in shards


def test_inputs_are_folders_tables_and_files(slides, tmp_path):
    folder = slides[0].parent
    pyramid = tmp_path / "deep" / "a.ome.zarr"
    convert(slides[2], pyramid, CONFIG, progress=False)
    (tmp_path / "deep" / "note.txt").write_text("x")
    assert expand_inputs([folder]) == [str(path) for path in slides]
    assert expand_inputs([tmp_path]) == [str(pyramid)]
    (tmp_path / "deep" / "b.png").write_bytes(b"x")
    assert expand_inputs([tmp_path], out_dir=tmp_path / "deep") == [str(tmp_path / "deep" / "b.png")]
    (tmp_path / "deep" / "b.png").unlink()
    assert expand_inputs([pyramid]) == [str(pyramid)]
    table = tmp_path / "archive.csv"
    table.write_text(f"slide,label\n{slides[0]},a\ndeep/a.ome.zarr,b\ns3://bucket/x.svs,c\n")
    assert expand_inputs([table, slides[0]]) == [str(slides[0]), str(pyramid), "s3://bucket/x.svs"]
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="no slides in this folder"):
        expand_inputs([tmp_path / "none"])
    with pytest.raises(ArchiveError, match=r"archive\.csv:1: no column 'path'"):
        expand_inputs([table], slide_column="path")


def test_pixel_sizes_of_a_table(slides, tmp_path):
    names = [str(slide) for slide in slides]
    table = tmp_path / "sizes.csv"
    table.write_text(f"slide,pixel_size_um\n{slides[0]},0.25\n1,0.5\n2.tif,1\nelse,7\n")
    sizes = pixel_sizes(table, names)
    assert sizes == {names[0]: 0.25, names[1]: 0.5, names[2]: 1.0}
    for wrong, says in (
        ("0,x\n", r"sizes\.csv:2: pixel_size_um must be a number that is positive, got 'x'"),
        ("0,1\n0.tif,2\n", "two pixel sizes"),
    ):
        table.write_text(f"slide,pixel_size_um\n{wrong}")
        with pytest.raises(ArchiveError, match=says):
            pixel_sizes(table, names)
    config = ConvertConfig(pixel_size_um=0.25, tissue=False)
    (result,) = preprocess([slides[0]], tmp_path / "out", configs={names[0]: config}, progress=False)
    assert open_pyramid(result.target).levels[0].pixel_size_um == (0.25, 0.25)


def test_a_pixel_size_that_disagrees_is_noted(slide_path, tmp_path):
    config = ConvertConfig(pixel_size_um=0.25, levels=1, tissue=False, profile="pass")
    summary = convert(slide_path, tmp_path / "a", config, progress=False)
    assert "pixel size 0.25 um was given, the slide states 0.499 x 0.499 um" in summary.notes
    again = ConvertConfig(pixel_size_um=0.5, levels=1, tissue=False, profile="pass", overwrite=True)
    notes = convert(slide_path, tmp_path / "a", again, progress=False).notes
    assert not any("pixel size" in note for note in notes)


def test_an_executor_of_this_process_is_the_default(slides, serial, tmp_path):
    job = ConvertJob(source=str(slides[2]), target=str(tmp_path / "2.ome.zarr"), config=CONFIG)
    (result,) = run_jobs([job], SerialExecutor(), progress=False)
    assert result.ok
    found = files(tmp_path)
    assert found == {key: data for key, data in serial["lossless"][0].items() if key.startswith("2.ome")}
