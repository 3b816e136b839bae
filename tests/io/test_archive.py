from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ats_stream.errors import ArchiveError, TargetExistsError
from ats_stream.io import read_archive, write_archive


@pytest.fixture
def table(tmp_path):
    def write(text, slides=("a.zarr", "b.zarr", "c.zarr")):
        for slide in slides:
            (tmp_path / slide).mkdir(parents=True, exist_ok=True)
        (tmp_path / "table.csv").write_text(text)
        return tmp_path / "table.csv"

    return write


GOOD = "slide,label,split\nb.zarr,tumor,train\na.zarr,normal,train\nc.zarr,tumor,val\n"


def test_rows_come_in_file_order_with_slides_beside_the_table(table, tmp_path):
    archive = read_archive(table(GOOD))
    assert [(r.slide, r.label, r.split, r.line) for r in archive] == [
        (str(tmp_path / "b.zarr"), "tumor", "train", 2),
        (str(tmp_path / "a.zarr"), "normal", "train", 3),
        (str(tmp_path / "c.zarr"), "tumor", "val", 4),
    ]
    assert archive.classes == ("normal", "tumor")
    assert [archive.class_index(r) for r in archive] == [1, 0, 1]
    assert archive.splits == ("train", "val")
    assert [r.name for r in archive.split("train")] == ["b", "a"]
    # a split knows the classes of the whole table
    assert archive.split("val").classes == ("normal", "tumor")
    assert archive[1] is archive.rows[1]
    with pytest.raises(ArchiveError, match=r"table\.csv: no rows of split 'test', there are train, val"):
        archive.split("test")


def test_columns_can_have_other_names_and_be_among_others(table):
    text = "id,diagnosis,path,part\n1,x,a.zarr,train\n2,y,b.zarr,train\n"
    archive = read_archive(table(text), columns={"slide": "path", "label": "diagnosis", "split": "part"})
    assert [r.label for r in archive] == ["x", "y"]
    with pytest.raises(ArchiveError, match="unknown name 'lable'"):
        read_archive(table(text), columns={"lable": "diagnosis"})


def test_given_classes_keep_their_order(table):
    archive = read_archive(table(GOOD), classes=["tumor", "normal", "other"])
    assert archive.classes == ("tumor", "normal", "other")
    assert [archive.class_index(r) for r in archive] == [0, 1, 0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", r"table\.csv:1: no column 'slide', the header has nothing"),
        ("slide,label\na.zarr,x\n", r"table\.csv:1: no column 'split', the header has slide, label"),
        ("slide,label,split\n", r"table\.csv: the table has no rows"),
        ("slide,label,split\na.zarr,x,train\nb.zarr,x,\n", r"table\.csv:3: column 'split' is empty"),
        ("slide,label,split\na.zarr,  ,train\n", r"table\.csv:2: column 'label' is empty"),
        ("slide,label,split\na.zarr,x\n", r"table\.csv:2: column 'split' is empty"),
        ("slide,label,split\na.zarr,x,train,more\n", r"table\.csv:2: more values than columns"),
        (
            "slide,label,split\na.zarr,x,train\n./a.zarr,y,val\n",
            r"table\.csv:3: slide .*a\.zarr stands in line 2",
        ),
        (
            "slide,label,split\na.zarr,x,train\nd.zarr,x,val\n",
            r"table\.csv:3: slide .*d\.zarr does not exist",
        ),
        ('slide,label,split\na.zarr,"x,train\n', r"table\.csv: cannot read it: unexpected end"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_line(table, text, says):
    with pytest.raises(ArchiveError, match=says) as caught:
        read_archive(table(text))
    assert "\n" not in str(caught.value)


def test_a_label_outside_of_the_classes_is_named(table):
    with pytest.raises(ArchiveError, match=r"table\.csv:3: label 'normal' is none of tumor, stroma"):
        read_archive(table(GOOD), classes=["tumor", "stroma"])


def test_tables_that_are_no_text(tmp_path):
    with pytest.raises(ArchiveError, match="no such file"):
        read_archive(tmp_path / "none.csv")
    with pytest.raises(ArchiveError, match="cannot read it"):
        read_archive(tmp_path)
    (tmp_path / "b.csv").write_bytes(b"slide,label,split\n\xff\xfe,\x80,x\n")
    with pytest.raises(ArchiveError, match="cannot read it"):
        read_archive(tmp_path / "b.csv")


def test_a_byte_order_mark_and_windows_lines(table, tmp_path):
    path = table(GOOD)
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert len(read_archive(path)) == 3


def test_remote_slides_stay_as_they_are(table):
    archive = read_archive(table("slide,label,split\ns3://bucket/a.zarr,x,train\n"))
    assert archive[0].slide == "s3://bucket/a.zarr"


texts = st.text(
    st.characters(codec="utf-8", exclude_characters="\x00\r\n/\\"), min_size=1, max_size=9
).filter(lambda t: t == t.strip() and t not in {".", ".."} and "://" not in t)


@given(rows=st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=6, unique_by=lambda r: r[0]))
def test_a_written_table_reads_back(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("archive") / "table.csv"
    write_archive(path, [(path.parent / "slides" / slide, label, split) for slide, label, split in rows])
    archive = read_archive(path, check_slides=False)
    assert [(r.slide, r.label, r.split) for r in archive] == [
        (str(path.parent / "slides" / slide), label, split) for slide, label, split in rows
    ]
    assert "slides/" in path.read_text().splitlines()[1]
    assert str(path.parent) not in path.read_text()


def test_slides_elsewhere_are_written_in_full(tmp_path, monkeypatch):
    (tmp_path / "tables").mkdir()
    monkeypatch.chdir(tmp_path)
    write_archive("tables/t.csv", [("other/a.zarr", "x", "train")])
    assert read_archive("tables/t.csv", check_slides=False)[0].slide == str(tmp_path / "other" / "a.zarr")


def test_an_existing_table_is_kept(tmp_path):
    write_archive(tmp_path / "t.csv", [("a", "x", "train")])
    with pytest.raises(TargetExistsError):
        write_archive(tmp_path / "t.csv", [("b", "y", "train")])
    assert read_archive(tmp_path / "t.csv", check_slides=False)[0].label == "x"
    write_archive(tmp_path / "t.csv", [("b", "y", "train")], overwrite=True)
    assert read_archive(tmp_path / "t.csv", check_slides=False)[0].label == "y"
    assert [p.name for p in tmp_path.iterdir()] == ["t.csv"]


WITH_MORE = (
    "slide,label,split,group,weight,time\n"
    "a.zarr,1,train,p1,2.5,10\nb.zarr,0,val,p2,1,0\nc.zarr,1,train,p1,0.5,3\n"
)


def test_optional_columns_are_read_when_they_are_there(table):
    archive = read_archive(table(WITH_MORE))
    assert [(r.group, r.weight, r.time) for r in archive] == [("p1", 2.5, 10), ("p2", 1, 0), ("p1", 0.5, 3)]
    assert archive.has_groups
    plain = read_archive(table(GOOD))
    assert not plain.has_groups
    assert {(r.group, r.weight, r.time) for r in plain} == {("", 1.0, None)}
    with pytest.raises(ArchiveError, match=r"table\.csv:1: no column 'patient', the header has slide, "):
        read_archive(table(GOOD), columns={"group": "patient"})


def test_a_group_in_two_splits_is_refused(table):
    with pytest.raises(ArchiveError, match=r"table\.csv:3: group 'p1' is in split 'val' here and in 'train'"):
        read_archive(table(WITH_MORE.replace("p2", "p1")))


def test_pixel_sizes_are_read_where_they_are_given(table, tmp_path):
    import pyarrow
    import pyarrow.parquet

    lines = ["slide,label,split,pixel_size_um", "a.zarr,x,train,0.25", "b.zarr,y,train,", "c.zarr,x,val, "]
    path = table("\n".join([*lines, "d.zarr,x,val"]), ("a.zarr", "b.zarr", "c.zarr", "d.zarr"))
    archive = read_archive(path)
    assert [r.pixel_size_um for r in archive] == [0.25, None, None, None]
    columns = {"slide": [r.slide for r in archive], "label": [*"xyxx"], "split": ["train"] * 2 + ["val"] * 2}
    sizes = {"um": pyarrow.array([0.25, None, None, None], pyarrow.float64())}
    pyarrow.parquet.write_table(pyarrow.table(columns | sizes), tmp_path / "table.parquet")
    assert read_archive(tmp_path / "table.parquet", columns={"pixel_size_um": "um"}).rows == archive.rows
    assert {r.pixel_size_um for r in read_archive(table(GOOD))} == {None}


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *(("weight", value) for value in ("0", "nan", "inf")),
        *(("time", value) for value in ("-1", "soon")),
        *(("pixel_size_um", value) for value in ("0", "-0.25", "nan", "inf", "1e-999", "0.25 um", "none")),
    ],
)
def test_numbers_that_cannot_be_are_refused(table, column, value):
    text = f"slide,label,split,{column}\na.zarr,1,train,{value}\n"
    with pytest.raises(
        ArchiveError, match=rf"table\.csv:2: {column} must be a number that is .*'{value}'"
    ) as no:
        read_archive(table(text))
    assert "\n" not in str(no.value)


def test_parquet_reads_as_csv_does(table, tmp_path):
    import pyarrow.csv
    import pyarrow.parquet

    path = table(WITH_MORE)
    pyarrow.parquet.write_table(pyarrow.csv.read_csv(path), tmp_path / "table.parquet")
    one, other = read_archive(path), read_archive(tmp_path / "table.parquet")
    assert one.rows == other.rows
    assert one.classes == other.classes


def test_broken_or_absent_parquet_is_refused(tmp_path):
    with pytest.raises(ArchiveError, match=r"t\.parquet: no such file"):
        read_archive(tmp_path / "t.parquet")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ArchiveError, match=r"t\.parquet: cannot read it"):
        read_archive(tmp_path / "t.parquet")
