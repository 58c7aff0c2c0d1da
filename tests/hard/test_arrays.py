"""Arrays of every kind where the Python API takes one: the result of the plain array, or one InputError."""

import pytest

HEAD = """
import numpy as np, pandas as pd, qdv_gpu, torch, warnings
from tiny_networks import cnn
warnings.simplefilter("ignore")
r = np.random.default_rng(0)
points, labels = r.normal(size=(60, 5)).astype(np.float32), r.integers(0, 3, 60)
pixels = r.integers(0, 255, (20, 1, 8, 8)).astype(np.uint8)
normal = r.normal(size=(20, 1, 8, 8)).astype(np.float32)
tsne = qdv_gpu.TSNE(perplexity=5, iterations=20, device="cpu")
calls = {
    "pixels": lambda v: qdv_gpu.activations(cnn(), v, layers="pool@1")["pool@1"],
    "normal": lambda v: qdv_gpu.activations(cnn(), v, layers="pool@1")["pool@1"],
    "tsne": tsne.fit_transform,
    "points": lambda v: qdv_gpu.neighborhood_hit(v, labels, k=5),
    "labels": lambda v: qdv_gpu.neighborhood_hit(points, v, k=5),
}
x = {"pixels": pixels, "normal": normal, "labels": labels}.get(CALL, points)
call = calls[CALL]
def plain(result):
    return result.detach().float().numpy() if torch.is_tensor(result) else np.asarray(result, np.float32)
"""
SAME = {
    "big_endian": "x.astype(x.dtype.newbyteorder('>'))",
    "read_only": "(c := x.copy(), c.setflags(write=False))[0]",
    "fortran": "np.asfortranarray(x)",
    "strided": "np.repeat(x, 2, 0)[::2]",
    "backwards": "x[::-1].copy()[::-1]",
    "unmasked": "np.ma.masked_array(x)",
    "tensor": "torch.from_numpy(x.copy())",
    "transposed": "torch.from_numpy(x.T.copy()).T.contiguous().transpose(0, -1).contiguous().transpose(0, -1)",
}
OF_POINTS = {
    "matrix": "np.matrix(x)",
    "frame": "pd.DataFrame(x)",
    "list": "x.tolist()",
    "gradient": "torch.tensor(x, requires_grad=True)",
    "parameter": "torch.nn.Parameter(torch.tensor(x))",
    "negative_bit": "torch.complex(torch.zeros(x.shape), -torch.tensor(x)).conj().imag",
    "double": "x.astype(np.float64)",
}
REFUSED = {
    "masked": "np.ma.masked_array(x, x == x.flat[0])",
    "conjugate": "torch.tensor(x).to(torch.complex64).conj()",
    "sparse": "torch.tensor(x).to_sparse()",
    "rows": "torch.tensor(x.reshape(len(x), -1)).to_sparse_csr()",
    "objects": "x.astype(object)",
    "text": "x.astype(str)",
    "dates": "x.astype('M8[s]')",
    "complex": "x.astype(complex)",
    "long": "x.astype(np.longdouble)",
    "records": "np.zeros(len(x), [('a', 'f4')])",
    "empty": "x[:0]",
    "number": "3.5",
    "meta": "torch.tensor(x).to('meta')",
    "quantised": "torch.quantize_per_tensor(torch.tensor(x, dtype=torch.float32), 0.1, 0, torch.qint8)",
    "nan": "x * np.nan",
    "none": "None",
    "word": "'abc'",
    "dict": "{'a': x}",
    "generator": "(i for i in x)",
    "ragged": "[[1.0, 2.0], [3.0]]",
    "nested": "torch.nested.nested_tensor([torch.tensor(i) for i in x])",
    "bytes": "x.tobytes()",
    "module": "np",
}
CALLS = ("pixels", "normal", "tsne", "points", "labels")
CASES = [(call, kind) for call in CALLS for kind in {**SAME, **(OF_POINTS if call in ("tsne", "points") else {})}]


def code(call, kind):
    made = {**SAME, **OF_POINTS, **REFUSED}[kind]
    return f"CALL = {call!r}\n{HEAD}\nvalue = {made}\n"


@pytest.mark.parametrize(("call", "kind"), CASES)
def test_the_same_as_the_plain_array(warm, tmp_path, call, kind):
    done = warm.run(code=code(call, kind) + "assert np.array_equal(plain(call(value)), plain(call(x)))", cwd=tmp_path)
    assert done.code == 0, done.err


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", REFUSED)
def test_one_error(warm, tmp_path, call, kind):
    done = warm.run(code=code(call, kind) + "call(value)", cwd=tmp_path)
    assert done.refused, done.err
