"""Tables of image files: columns, splits, labels, and what is wrong on which line."""

import pytest
from PIL import Image

from qdv_gpu.data.datasets import load_images
from qdv_gpu.data.tables import list_table
from qdv_gpu.errors import InputError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "more").mkdir()
    for i, name in enumerate(("a.png", "b.png", "more/c.png", "d, e.png", "f")):
        Image.new("RGB", (4, 3), (i, 0, 0)).save(tmp_path / name, format="png")
    return tmp_path


def table(folder, text, name="all.csv"):
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return folder / name


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("file,label\na.png,x\nb.png,y\nmore/c.png,x\n", [0, 1, 0]),
        ("label,ID,Path\nx,1,a.png\ny,1,b.png\nx,7,more/c.png", [0, 1, 0]),
        ("image,target\na.png,10\nb.png,9\nmore/c.png,010\n", [1, 0, 1]),
        ("FILENAME,Class\n a.png , 1\nb.png,-1\nmore/c.png,1\n", [1, 0, 1]),
        ("a.png,x\nb.png,y\nmore/c.png,x\n", [0, 1, 0]),
        ("a.png\nb.png\nmore/c.png\n", None),
        ("file\na.png\nb.png\nmore/c.png\n", None),
        ("\ufefffile,label\r\na.png,x\r\n\r\nb.png,y\r\n,\r\nmore/c.png,x\r\n", [0, 1, 0]),
        ('file,label\n"a.png","x, of one"\nb.png,z\nmore/c.png,"x, of one"\n', [0, 1, 0]),
    ],
)
def test_columns(text, labels, folder):
    images = load_images(table(folder, text))
    assert images.names == ["a.png", "b.png", "more/c.png"]
    assert images.pixels[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert (images.labels if labels is None else images.labels.tolist()) == labels
    assert images.name == str(folder / "all.csv")


def test_tabs_and_names(folder):
    images = load_images(table(folder, f"file\tlabel\nd, e.png\tx\n{folder / 'a.png'}\ty\nf\tx\n", "all.TSV"))
    assert images.names == ["d, e.png", "a.png", "f"]
    (folder / "tables").mkdir()
    images = load_images(table(folder / "tables", f"file\n../a.png\n{folder / 'b.png'}\n"))
    assert images.names == ["../a.png", str(folder / "b.png")]
    assert images.pixels[:, 0, 0, 0].tolist() == [0, 1]


def test_classes(folder):
    assert list_table(table(folder, "file,label\na.png,10\nb.png,9\nmore/c.png,-3\n")).classes == ("-3", "9", "10")
    assert list_table(table(folder, "file,label\na.png,10\nb.png,9\nmore/c.png,x\n")).classes == ("10", "9", "x")
    assert list_table(table(folder, "file,label\na.png,1.5\nb.png,10\n")).classes == ("1.5", "10")


def test_splits(folder):
    text = "file,label,split\na.png,x,test\nb.png,y,test\nmore/c.png,z,train\nd.png,,unused\nf,z,\n"
    path = table(folder, text)
    assert load_images(path).classes == ("x", "y")
    assert load_images(path).names == load_images(path, "test").names == ["a.png", "b.png"]
    with pytest.raises(InputError, match=r"no rows of the split 'val': pass --split .* has \(test, train, unused\)"):
        load_images(path, "val")
    with pytest.raises(InputError, match=r"no rows of the split 'test': pass --split .* has \(a, b\)"):
        load_images(table(folder, "file,split\na.png,a\nb.png,b\n"))
    with pytest.raises(InputError, match="has no column 'split', and split is 'val': leave it out"):
        load_images(table(folder, "file\na.png\n"), "val")


def test_samples(folder):
    path = table(folder, "file,label\na.png,x\nb.png,x\nmore/c.png,y\nf,y\n")
    assert sorted(load_images(path, samples=2).labels.tolist()) == [0, 1]
    assert len(load_images(table(folder, "file\na.png\nb.png\nf\n"), samples=2)) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na.png,x\nnone.png,y\n", "line 3: there is no image file .*none.png$"),
        ("file,label\na.png,x\n\nmore,y\n", "line 4: there is no image file .*more$"),
        (
            "picture,label\na.png,x\n",
            r"line 1: there is no image file .*picture \(a header must name a column 'file'\)",
        ),
        ("a.png,x,y\nb.png,x,y\n", "line 1: a header must name a column 'file' where there are more than two columns"),
        ("file,label\na.png,x\nb.png,\n", "line 3: the label is empty"),
        ("file,label\na.png,x\n ,y\n", "line 3: the name of the file is empty"),
        ("file,label\na.png,x\nb.png\n", "line 3: 1 cells, the first row has 2"),
        ("file,label\na.png,x\nb.png,y,z\n", "line 3: 3 cells, the first row has 2"),
        ("file,label\n'd, e.png',x\n", "line 2: 3 cells, the first row has 2"),
        ("file,label,file\na.png,x,b.png\n", "line 1: one column of files is allowed, got file, file"),
        ("file,Path\na.png,b.png\n", "line 1: one column of files is allowed, got file, Path"),
        ("file,label,class\na.png,1,x\n", "line 1: one column of labels is allowed, got label, class"),
        ("file,split,split\na.png,1,x\n", "line 1: one column of splits is allowed"),
        ("file,label\na.png,x\nfile,label\nb.png,y\n", "line 3: there is no image file .*file$"),
        (b"file,label\na.png,x\nb.png,\xe9t\xe9\n", "line 3: it must be UTF-8, got the byte 0xe9"),
        ("file,label\na.png,x\n".encode("utf-16"), "line 1: it must be UTF-8, got the byte 0xff"),
        ('file,label\na.png,x\nb.png,"y\nc.png,z\n', "line 3: unexpected end of data"),
        ('file,label\na.png,"x"y\nb.png,z\n', "line 2: ',' expected after '\"'"),
        ('file,label\na.png,"x\nx"\nb.png,y\nnone.png,z\n', "line 5: there is no image file"),
        ("file\na\0b.png\n", "line 2: there is no image file"),
        ("file,label\na.png,x\nb.png,x\n", "must have two or more classes, got 1, 'x': leave out the labels"),
        ("", "has no rows$"),
        ("\n,\n", "has no rows$"),
        ("file,label\n", "has no rows below its header"),
    ],
)
def test_what_is_wrong_is_said(text, message, folder):
    path = table(folder, text)
    with pytest.raises(InputError, match=message) as error:
        load_images(path)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"table {path}")


def test_a_damaged_file(folder):
    (folder / "b.png").write_bytes(b"")
    path = table(folder, "file\na.png\nb.png\n")
    with pytest.raises(InputError, match=r"b\.png cannot be read: it is empty; 1 bad of 2 files"):
        load_images(path)
    assert load_images(path, skip_bad=True).names == ["a.png"]
    (folder / "none").mkdir()
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        list_table((folder / "none").rename(folder / "folder.csv"))
