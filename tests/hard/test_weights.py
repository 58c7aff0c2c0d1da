"""Checkpoints that are none, or of the wrong kind: one line, nothing executed, no memory for what they only declare."""
# ruff: noqa: E501 - a file a line

import os

import pytest
from hard.cases import Warm

MAKE = r"""
import json, os, pickle, struct, zipfile, warnings
import numpy as np, torch
from tiny_networks import cnn
warnings.simplefilter("ignore")
class Bomb:
    def __reduce__(self): return (os.system, ("touch executed",))
s = cnn().state_dict()
def st(header, body=b"", length=None):
    h = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(h) if length is None else length) + h + body
def put(name, data): open(name, "wb").write(data)
t = lambda n, v: torch.save(v, n)
t("list.pt", [1, 2]); t("int.pt", 3); t("str.pt", "x"); t("tensor.pt", torch.ones(3)); t("none.pt", None)
t("module.pt", cnn()); t("dicts.pt", {"a": {"b": torch.ones(1)}}); t("empty.pt", {})
t("bomb.pt", {"a": Bomb(), **s}); put("bomb.pth", pickle.dumps(Bomb())); put("bomb2.bin", pickle.dumps({"x": Bomb()}))
t("ints.pt", {k: v.int() for k, v in s.items()}); t("bools.pt", {k: v.bool() for k, v in s.items()})
t("complex.pt", {k: v.to(torch.complex64) for k, v in s.items()})
t("u16.pt", {k: v.abs().to(torch.uint16) for k, v in s.items()})
t("f8.pt", {k: v.to(torch.float8_e4m3fn) for k, v in s.items()})
t("keys.pt", {3: torch.ones(1), "a": torch.ones(1)}); t("tuplekeys.pt", {("a", 1): torch.ones(1)})
t("shapes.pt", {k: v[None] for k, v in s.items()}); t("scalars.pt", {k: torch.tensor(1.) for k in s})
t("nan.pt", {k: v * float("nan") for k, v in s.items()}); t("inf.pt", {k: v / 0 for k, v in s.items()})
t("expand.pt", {k: torch.zeros(1).expand(10**6, 10**6) for k in s})
t("half.pt", {k: v.half() for k, v in s.items()})
t("loop.pt", (lambda d: (d.update(model=d), d)[1])({"a": torch.ones(1)}))
t("nested.pt", {"state_dict": {"model": {"net": s}}})
put("zero.pt", b""); put("zero.safetensors", b""); put("zero.npy", b"")
put("text.pt", b"hello world"); put("text.safetensors", b"hello world hello"); put("text.npy", b"hello")
put("deep.pt", pickle.dumps(None)[:-1] + b"(" * 100000)
put("deep2.pth", b"\x80\x02" + b"]" * 200000 + b"a" * 199999 + b".")
put("huge_int.pth", b"\x80\x02\x8a\xff" + b"\xff" * 255 + b".")
put("long4.pth", b"\x80\x02\x8b\xff\xff\xff\x7f" + b".")
put("binbytes8.pth", b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b".")
# safetensors
put("length.safetensors", st({}, length=2**60)); put("length2.safetensors", st({}, length=2**63 + 5))
put("array.safetensors", st([1])); put("null.safetensors", st(b"null"))
put("meta.safetensors", st({"__metadata__": [1]})); put("meta2.safetensors", st({"__metadata__": {"qdv_gpu": "[1]"}}))
put("meta3.safetensors", st({"__metadata__": {"qdv_gpu": "not json"}})); put("meta4.safetensors", st({"__metadata__": {"qdv_gpu": "3"}}))
put("meta5.safetensors", st({"__metadata__": {"qdv_gpu": "[" * 100000}})); put("meta6.safetensors", st({"__metadata__": {"qdv_gpu": "null"}}))
put("meta7.safetensors", st({"__metadata__": {"qdv_gpu": json.dumps({"network": 3, "image_size": "x", "image_mean": 3, "crop": []})}}))
one = lambda **k: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **k}
put("overlap.safetensors", st({"a": one(), "b": one()}, b"0" * 8)); put("outside.safetensors", st({"a": one(data_offsets=[0, 2**50])}, b"0" * 8))
put("shape.safetensors", st({"a": one(shape=[2**40])}, b"0" * 8)); put("negative.safetensors", st({"a": one(shape=[-1])}, b"0" * 8))
put("dtype.safetensors", st({"a": one(dtype="X9")}, b"0" * 8)); put("overflow.safetensors", st({"a": one(shape=[2**62, 4])}, b"0" * 8))
put("i64.safetensors", st({"a": one(dtype="I64", shape=[1])}, b"0" * 8)); put("c64.safetensors", st({"a": one(dtype="C64", shape=[1])}, b"0" * 8))
put("f4.safetensors", st({"a": one(dtype="F4", shape=[16])}, b"0" * 8)); put("hole.safetensors", st({"a": one(data_offsets=[8, 16])}, b"0" * 16))
put("utf.safetensors", st(b'{"\xff": 1}')); put("deepjson.safetensors", st(b"[" * 100000))
put("emptyname.safetensors", st({"": one()}, b"0" * 8))
# npy
def npy(descr, shape, body=b"", order="False"):
    h = ("{'descr': %s, 'fortran_order': %s, 'shape': %s, }" % (descr, order, shape)).encode(); h += b" " * (63 - (10 + len(h)) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(h)) + h + body
put("tera.npy", npy("'<f4'", "(1000000000000,)")); put("tera_obj.npy", npy("'|O'", "(1000000000000,)")); put("plain.npy", npy("'<f4'", "(2,)", b"0" * 8))
put("obj_bomb.npy", npy("'|O'", "()", pickle.dumps(Bomb()))); put("obj_int.npy", npy("'|O'", "()", pickle.dumps(3))); put("obj_bad.npy", npy("'|O'", "()", b"garbage"))
put("descr.npy", npy("__import__('os').system('touch executed')", "()")); put("deep.npy", npy("'|O'", "()", b"\x80\x02" + b"]" * 300000 + b"a" * 299999 + b"."))
put("long4.npy", npy("'|O'", "()", b"\x80\x02\x8b\xff\xff\xff\x7f.")); put("bytes8.npy", npy("'|O'", "()", b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"."))
put("recon.npy", npy("'|O'", "()", b"\x80\x02cnumpy\nndarray\n(M\xff\xffM\xff\xffM\xff\xfft\x85R."))
put("alloc.npy", npy("'|O'", "()", b"\x80\x02cnumpy\nndarray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85\x85R."))
put("v3.npy", b"\x93NUMPY\x09\x00" + b"0" * 100); put("short.npy", b"\x93NUMPY\x01\x00"); put("hlen.npy", b"\x93NUMPY\x02\x00\xff\xff\xff\xff")
d = pickle.dumps({k: 3 for k in ("conv1",)}); put("layers_int.npy", npy("'|O'", "()", d))
# zip
def rezip(name, change):
    t("base_.pt", s); z = zipfile.ZipFile("base_.pt"); o = zipfile.ZipFile(name, "w")
    for i in z.infolist():
        n, d = change(i.filename, z.read(i))
        if n: o.writestr(n, d)
    o.close()
rezip("nopkl.pt", lambda n, d: (None if n.endswith("data.pkl") else n, d)); rezip("nodata.pt", lambda n, d: (None if "/data/" in n else n, d))
rezip("short_data.pt", lambda n, d: (n, d[:3] if "/data/" in n else d)); rezip("version.pt", lambda n, d: (n, b"999" if n.endswith("version") else d))
rezip("order.pt", lambda n, d: (n, b"big" if n.endswith("byteorder") else d)); rezip("order2.pt", lambda n, d: (n, b"odd" if n.endswith("byteorder") else d))
z = zipfile.ZipFile("zipbomb.pt", "w", zipfile.ZIP_DEFLATED)
t("base_.pt", {"a": torch.zeros(1)}); zz = zipfile.ZipFile("base_.pt")
for i in zz.infolist():
    z.writestr(i.filename, b"\0" * (1 << 28) if "/data/" in i.filename else zz.read(i))
z.close()
o = zipfile.ZipFile("declared.pt", "w")
for i in zz.infolist():
    dd = zz.read(i)
    if i.filename.endswith("data.pkl"): dd = dd.replace(b"K\x01tq", b"\x8a\x06\x00\x00\x00\x00\x00\x01tq", 1)
    o.writestr(i.filename, dd)
o.close()
d2 = open("base_.pt", "rb").read(); put("cut.pt", d2[:len(d2)//2]); put("tail.pt", d2[-200:])
os.mkdir("dir.pt"); os.mkdir("dir.safetensors"); os.mkfifo("fifo.pt"); os.mkfifo("fifo.safetensors"); os.mkfifo("fifo.npy"); os.symlink("nowhere", "dangling.pt"); os.symlink("loop2.pt", "loop2.pt"); os.symlink("/dev/zero", "zerodev.pt"); os.symlink("/dev/null", "null.npy")
import socket; so = socket.socket(socket.AF_UNIX); so.bind("socket.pt")
put("suffix.xyz", b""); os.remove("base_.pt")
"""
LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))"
TAKEN = {"half.pt", "f8.pt", "nested.pt", "nan.pt", "inf.pt", "order.pt"}
SAID = {"nan.pt", "inf.pt", "order.pt"}  # that they hold no numbers


@pytest.fixture(scope="module")
def files(warm: Warm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    done = warm.run(code=MAKE, cwd=folder)
    assert done.code == 0, done.err
    return folder


NAMES = (
    "alloc.npy", "array.safetensors", "binbytes8.pth", "bomb.pt", "bomb.pth", "bomb2.bin", "bools.pt",
    "bytes8.npy", "c64.safetensors", "complex.pt", "cut.pt", "dangling.pt", "declared.pt", "deep.npy",
    "deep.pt", "deep2.pth", "deepjson.safetensors", "descr.npy", "dicts.pt", "dir.pt", "dir.safetensors",
    "dtype.safetensors", "empty.pt", "emptyname.safetensors", "expand.pt", "f4.safetensors", "f8.pt",
    "fifo.npy", "fifo.pt", "fifo.safetensors", "half.pt", "hlen.npy", "hole.safetensors", "huge_int.pth",
    "i64.safetensors", "inf.pt", "int.pt", "ints.pt", "keys.pt", "layers_int.npy", "length.safetensors",
    "length2.safetensors", "list.pt", "long4.npy", "long4.pth", "loop.pt", "loop2.pt", "meta.safetensors",
    "meta2.safetensors", "meta3.safetensors", "meta4.safetensors", "meta5.safetensors", "meta6.safetensors",
    "meta7.safetensors", "module.pt", "nan.pt", "negative.safetensors", "nested.pt", "nodata.pt", "none.pt",
    "nopkl.pt", "null.npy", "null.safetensors", "obj_bad.npy", "obj_bomb.npy", "obj_int.npy", "order.pt",
    "order2.pt", "outside.safetensors", "overflow.safetensors", "overlap.safetensors", "plain.npy",
    "recon.npy", "scalars.pt", "shape.safetensors", "shapes.pt", "short.npy", "short_data.pt", "socket.pt",
    "str.pt", "suffix.xyz", "tail.pt", "tensor.pt", "tera.npy", "tera_obj.npy", "text.npy", "text.pt",
    "text.safetensors", "tuplekeys.pt", "u16.pt", "utf.safetensors", "v3.npy", "version.pt", "zero.npy",
    "zero.pt", "zero.safetensors", "zerodev.pt", "zipbomb.pt",
)  # fmt: skip


def test_every_file_is_tried(files):
    assert set(os.listdir(files)) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_weights(warm, files, name):
    done = warm.run("layers", "tiny_networks:cnn", "--weights", name, cwd=files, before=LIMIT, timeout=30)
    if name in TAKEN:
        assert done.code == 0, done.err
        assert ("NaN or infinity" in done.err) == (name in SAID)
        return
    assert done.refused, done.err
    assert name in done.err
    assert not (files / "executed").exists()
