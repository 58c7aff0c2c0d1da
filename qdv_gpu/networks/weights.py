"""Reading and writing weight files without ever running code from them."""

import codecs
import io
import json
import logging
import pickle
import warnings
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qdv_gpu.errors import InputError
from qdv_gpu.files import replacing

Tensors = dict[str, Tensor]
logger = logging.getLogger(__name__)
HASH = "sha256"  # the key of the hash among what is said
TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".tar")
# Under which programs keep a state dict in a checkpoint; where there are several, the first of these is taken.
WRAPPINGS = (
    "state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "weights", "params",
    "state_dict_ema", "model_ema", "ema_state_dict", "ema",
)  # fmt: skip


def read_weights(path: str | Path) -> tuple[Tensors, dict[str, Any]]:
    """Read a `.safetensors`, a PyTorch (`.pt`, `.pth`, `.ckpt`, `.bin`, `.tar`) or (Caffe AlexNet) `.npy` file.

    A state dict inside of a training checkpoint (Lightning's, timm's, ...) is found by its usual names; what else such
    a file holds is not made into objects.

    Returns
    -------
    tensors : dict of str to Tensor
        The state dict, on the CPU.
    metadata : dict
        What `write_weights` stored beside it; empty for files of other programs.

    Raises
    ------
    InputError
        If the file is absent, truncated, of another format, or holds tensors that are not dense numbers (quantised,
        sparse, complex, without data) or names that are no text.
    """
    tensors, metadata = read_tensors(path)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            logger.warning("%s holds NaN or infinity in %s", path, name)
    return tensors, metadata


def read_tensors(path: str | Path) -> tuple[Tensors, dict[str, Any]]:
    """As `read_weights`, which warns of what is no number besides."""
    path = Path(path)
    if not path.is_file():  # a pipe would be waited for
        what = "is no regular file" if path.exists() else "does not exist"
        raise InputError(f"weights file {path} {what}")
    readers = {".safetensors": _read_safetensors, ".npy": _read_caffe, **dict.fromkeys(TORCH_SUFFIXES, _read_torch)}
    if path.suffix not in readers:
        raise InputError(f"weights file {path} must end in {', '.join(readers)}")
    tensors, metadata = readers[path.suffix](path)
    for name, tensor in tensors.items():
        kind = _unusable(tensor)
        if kind:
            raise InputError(f"{path} holds {kind} tensor {name}: dense tensors of real numbers are required")
    return tensors, metadata


def _unusable(tensor: Tensor) -> str:
    """What is wrong with a tensor as a weight; "" if nothing is."""
    if tensor.is_meta:
        return "the empty (meta)"
    if tensor.is_quantized:
        return "the quantised"
    if tensor.layout != torch.strided:
        return "the sparse"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():  # of which few numbers are kept
        return "the repeated"
    if tensor.dtype == torch.float4_e2m1fn_x2:
        return "the packed"
    return "the complex" if tensor.is_complex() else ""


def write_weights(path: str | Path, tensors: Tensors, metadata: dict[str, Any]) -> None:
    """Write tensors and a JSON-able `metadata` to one safetensors file, atomically."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    first = {tensor.untyped_storage().data_ptr(): name for name, tensor in reversed(tensors.items())}
    for name, tensor in tensors.items():  # safetensors refuses tied ones
        if first[tensor.untyped_storage().data_ptr()] != name:
            tensors[name] = tensor.clone()
    said = {**metadata, HASH: _digest(tensors, metadata)}  # in one text: safetensors writes several in any order
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={"qdv_gpu": json.dumps(said)})
        except SafetensorError as error:
            raise OSError(str(error)) from error


def _read_safetensors(path: Path) -> tuple[Tensors, dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
            metadata = json.loads((file.metadata() or {}).get("qdv_gpu", "{}"))
    except (OSError, SafetensorError, ValueError, RuntimeError, MemoryError) as error:
        raise InputError(f"{path} is truncated or not a safetensors file ({_first_line(error)})") from None
    written = metadata.pop(HASH, None) if isinstance(metadata, dict) else ""
    if written is not None and written != _digest(tensors, metadata):
        raise InputError(f"{path} is damaged (it is not what its hash says)")
    return tensors, metadata


def _digest(tensors: Tensors, metadata: Any) -> str:
    """Hash of tensors on the CPU and of what is said about them, hexadecimal SHA-256."""
    kept = json.loads(json.dumps(metadata))
    digest = sha256(json.dumps(kept, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_torch(path: Path) -> tuple[Tensors, dict[str, Any]]:
    try:
        state = _load_inert(path)
    except pickle.UnpicklingError:
        raise InputError(f"{path} is not a plain state dict of tensors: nothing else is loaded from a pickle") from None
    except Exception as error:
        if "TorchScript" in str(error):
            raise InputError(f"{path} is a TorchScript archive: save the state_dict() of the module") from None
        raise InputError(f"{path} is truncated or not a PyTorch file ({_first_line(error)})") from None
    seen: list[Any] = []
    while isinstance(state, dict) and not any(state is one for one in seen):  # one may hold itself
        seen.append(state)
        inner = [key for key in WRAPPINGS if isinstance(state.get(key), dict) and state[key]]
        if not inner:
            break
        if len(inner) > 1:
            logger.warning("%s holds %s: the first of them is taken", path, ", ".join(inner))
        state = state[inner[0]]
    if isinstance(state, _Inert):
        raise InputError(f"{path} is a whole object, of which no code is loaded: save its state_dict()")
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not named or not any(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path} is not a state dict: a dict of names and tensors is required")
    return {name: value.detach() for name, value in state.items() if isinstance(value, Tensor)}, {}


def _load_inert(path: Path) -> Any:
    """What torch.load makes of a file, every object that is no tensor or plain value being an empty `_Inert`."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except ValueError:  # files from before torch 1.6 are not searched
        names = []
    with torch.serialization.safe_globals([(_Inert, name) for name in names]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what an old torch wrote
        return torch.load(path, map_location="cpu", weights_only=True)


class _Inert:
    """In the place of an object that a checkpoint holds beside tensors: it takes what it is given, and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> "_Inert":
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class _Array(np.ndarray[Any, Any]):
    """An array that takes no more memory than its pickle: of objects one, as numpy.save makes it of a dict."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, *_ = state
        if dtype.hasobject and shape != ():
            raise pickle.UnpicklingError("an array of objects is not an array of numbers")
        super().__setstate__(state)


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles dicts and lists of numpy arrays, and refuses every other class or function."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core.", "numpy._core.")
        if (module, name) == ("numpy._core.multiarray", "_reconstruct"):
            return lambda *_: np.ndarray.__new__(_Array, (0,), np.int8)
        if (module, name) == ("numpy", "ndarray"):
            return None  # called, it would take any memory
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if (module, name) == ("_codecs", "encode"):  # how Python 2 strings arrive
            return codecs.encode
        raise pickle.UnpicklingError(f"{module}.{name} is not an array")


def _read_caffe(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Read `{"conv1": [W [h, w, in, out], b], ..., "fc8": [W [in, out], b]}`, bvlc_alexnet.npy's layout."""
    try:
        data = path.read_bytes()
        file = io.BytesIO(data)
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(file)
        if not dtype.hasobject or shape != ():
            raise ValueError("one pickled dict of arrays is required")
        loaded = _ArrayUnpickler(file, encoding="latin1").load()
        layers = loaded.item() if isinstance(loaded, np.ndarray) else loaded
        arrays = {name: [np.asarray(array, np.float32) for array in pair] for name, pair in layers.items()}
        positions = {"conv1": 0, "conv2": 4, "conv3": 8, "conv4": 10, "conv5": 12}
        tensors: Tensors = {}
        for name, position in positions.items():
            kernel, bias = arrays[name]
            tensors[f"features.{position}.weight"] = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
            tensors[f"features.{position}.bias"] = torch.from_numpy(bias.ravel().copy())
        for name, position in {"fc6": 0, "fc7": 3, "fc8": 6}.items():
            matrix, bias = arrays[name]
            if name == "fc6":  # its inputs come as [h, w, maps]; ours as [maps, h, w]
                matrix = matrix.reshape(6, 6, 256, -1).transpose(2, 0, 1, 3).reshape(9216, -1)
            tensors[f"classifier.{position}.weight"] = torch.from_numpy(matrix.T.copy())
            tensors[f"classifier.{position}.bias"] = torch.from_numpy(bias.ravel().copy())
        return tensors, {}
    except Exception as error:  # an unpickler raises anything
        raise InputError(f"{path} is not in the layout of bvlc_alexnet.npy ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
