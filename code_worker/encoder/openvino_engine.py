"""The encoder on a CPU through OpenVINO, whose kernels use what torch's leave unused on many processors."""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from code_worker.encoder.forward import CropEncoder
from code_worker.encoder.torch_engine import check_crops
from code_worker.system.libraries import silent_import
from code_worker.system.machine import usable_cores
from code_worker.types import EMBEDDING_DIM, IMAGE_SIZE

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from code_worker.encoder.weights import EncoderWeights

with silent_import():
    import openvino

ops = openvino.opset14


# No conversion of the torch module: the converter follows torch's tracer, which is deprecated. Forty lines of
# operations do not.
def encoder_graph(encoder: CropEncoder) -> openvino.Model:
    """A model from one crop, `(1, 224, 224, 3) uint8`, to `(1, 192) float32`, with the shortcuts of `CropEncoder`.

    Passes of more crops are no faster, and shapes that may change are slower.
    """
    crops = ops.parameter([1, IMAGE_SIZE, IMAGE_SIZE, 3], np.uint8, name="crops")
    tokens = _tokens(encoder, crops)
    blocks: list[Any] = list(encoder.blocks)
    for block in blocks[:-1]:
        tokens = ops.add(tokens, _attention(block, _normed(block.norm1, tokens)))
        tokens = ops.add(tokens, _mlp(block.mlp, _normed(block.norm2, tokens)))
    embeddings = _normed(encoder.norm, _cls_of_last_block(blocks[-1], tokens))
    width = encoder.first.shape[1]
    embeddings = _reshaped(embeddings, 1, width)
    if missing := EMBEDDING_DIM - width:
        embeddings = ops.concat([embeddings, _constant(np.zeros((1, missing), np.float32))], 1)
    return openvino.Model([embeddings], [crops], "code_worker_encoder")


def _tokens(encoder: CropEncoder, crops: openvino.Node) -> openvino.Node:
    """Patches cut out of the bytes, projected, with the CLS token before them and the positions added."""
    side, size = encoder.side, encoder.patch_size
    margin = encoder.margin
    if margin:
        end = IMAGE_SIZE - margin
        crops = ops.slice(crops, _whole([margin, margin]), _whole([end, end]), _whole([1, 1]), _whole([1, 2]))
    grid = _reshaped(crops, 1, side, size, side, size, 3)
    patches = _reshaped(ops.transpose(grid, _whole([0, 1, 3, 2, 4, 5])), 1, side * side, size * size * 3)
    projected = ops.add(_product(ops.convert(patches, np.float32), encoder.weight), _constant(encoder.offsets))
    return ops.concat([_constant(_array(encoder.first)[None]), projected], 1)


def _attention(block: Any, normed: openvino.Node) -> openvino.Node:
    qkv = block.attn.qkv
    joined = _linear(normed, qkv.weight, qkv.bias)
    count = joined.get_output_shape(0)[1]
    parts = _by_head(joined, block.attn.num_heads, 3, count)
    mixed = ops.scaled_dot_product_attention(*parts)
    return _projected(block, mixed, count)


def _cls_of_last_block(block: Any, tokens: openvino.Node) -> openvino.Node:
    """The block's output `(1, 1, width)` for the CLS token alone."""
    attention = block.attn
    width = tokens.get_output_shape(0)[2]
    count = tokens.get_output_shape(0)[1]
    weight, bias = attention.qkv.weight, attention.qkv.bias
    normed = _normed(block.norm1, tokens)
    query = _linear(_first_token(normed), weight[:width], None if bias is None else bias[:width])
    key_value = _linear(normed, weight[width:], None if bias is None else bias[width:])
    (query,) = _by_head(query, attention.num_heads, 1, 1)
    key, value = _by_head(key_value, attention.num_heads, 2, count)
    mixed = ops.scaled_dot_product_attention(query, key, value)
    cls_token = ops.add(_first_token(tokens), _projected(block, mixed, 1))
    return ops.add(cls_token, _mlp(block.mlp, _normed(block.norm2, cls_token)))


def _by_head(joined: openvino.Node, heads: int, parts: int, count: int) -> list[openvino.Node]:
    """`parts` of `(1, heads, count, width of a head)` from `(1, count, parts · width)`."""
    head_width = joined.get_output_shape(0)[2] // (parts * heads)
    split = ops.transpose(_reshaped(joined, 1, count, parts, heads, head_width), _whole([2, 0, 3, 1, 4]))
    pieces = ops.split(split, ops.constant(np.int64(0)), parts).outputs()
    return [_reshaped(piece, 1, heads, count, head_width) for piece in pieces]


def _projected(block: Any, mixed: openvino.Node, count: int) -> openvino.Node:
    projection = block.attn.proj
    width = projection.weight.shape[1]
    return _linear(
        _reshaped(ops.transpose(mixed, _whole([0, 2, 1, 3])), 1, count, width), projection.weight, projection.bias
    )


def _mlp(mlp: Any, values: openvino.Node) -> openvino.Node:
    inner = ops.gelu(_linear(values, mlp.fc1.weight, mlp.fc1.bias), "ERF")
    return _linear(inner, mlp.fc2.weight, mlp.fc2.bias)


def _normed(norm: Any, values: openvino.Node) -> openvino.Node:
    """LayerNorm over the last axis."""
    standard = ops.mvn(values, _whole([-1]), normalize_variance=True, eps=norm.eps, eps_mode="INSIDE_SQRT")
    return ops.add(ops.multiply(standard, _constant(norm.weight)), _constant(norm.bias))


def _linear(values: openvino.Node, weight: Tensor, bias: Tensor | None) -> openvino.Node:
    product = _product(values, weight)
    return product if bias is None else ops.add(product, _constant(bias))


def _product(values: openvino.Node, weight: Tensor) -> openvino.Node:
    return ops.matmul(values, _constant(weight), transpose_a=False, transpose_b=True)


def _first_token(tokens: openvino.Node) -> openvino.Node:
    return ops.slice(tokens, _whole([0]), _whole([1]), _whole([1]), _whole([1]))


def _reshaped(values: Any, *shape: int) -> openvino.Node:
    return ops.reshape(values, _whole(list(shape)), special_zero=False)


def _whole(numbers: list[int]) -> openvino.Node:
    return ops.constant(np.array(numbers, np.int64))


def _constant(values: Any) -> openvino.Node:
    return ops.constant(_array(values))


def _array(values: Any) -> Any:
    return values if isinstance(values, np.ndarray) else values.detach().float().cpu().contiguous().numpy()


_CORE_LOCK: Final = threading.Lock()
"""`cache` alone lets two threads make one each, of which one is destroyed."""


class OpenVinoEngine:
    """Embeds crops in float32; any number of threads may call it at once, each with a stream of its own.

    Attributes:
        device: `cpu`.
        precision: `fp32`: OpenVINO would choose bf16 by itself where the processor has it, and move embeddings.
        name: `openvino`.
    """

    device = "cpu"
    precision = "fp32"
    name = "openvino"

    def __init__(self, weights: EncoderWeights, *, streams: int | None = None) -> None:
        """Compiles the model, which takes about a third of a second.

        Args:
            weights: the encoder.
            streams: calls that run at the same time; unset: one per core that this process may use.
        """
        cores = usable_cores()
        chosen = {
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "THROUGHPUT",
            "NUM_STREAMS": streams or cores,
            "INFERENCE_NUM_THREADS": cores,
            # Two worker processes on one machine would otherwise be pinned to the same cores.
            "ENABLE_CPU_PINNING": False,
        }
        # One crop a pass: larger passes are no faster, and so a row has the same bits in any batch.
        graph = encoder_graph(CropEncoder(weights.config, weights.state))
        self._model = _the_core().compile_model(graph, "CPU", chosen)
        self._own = threading.local()
        self.kernels = f"OpenVINO {openvino.__version__.partition('-')[0]}"

    def embed(self, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        """`(n, 224, 224, 3) uint8` to `(n, 192) float32`: the CLS token after the final LayerNorm, not normalised.

        A row depends on its own crop only, to the last bit.

        Raises:
            ValueError: another shape or type.
        """
        check_crops(crops)
        crops = np.require(crops, requirements=["C"])
        embeddings = np.empty((len(crops), EMBEDDING_DIM), np.float32)
        request = self._request()
        for number in range(len(crops)):
            request.infer([crops[number : number + 1]], share_inputs=True)
            embeddings[number] = request.get_output_tensor().data[0]
        return embeddings

    def warm_up(self, crops: int = 1) -> None:
        """Runs a black batch, so that no image waits for memory to be reserved."""
        self.embed(np.zeros((crops, 224, 224, 3), np.uint8))

    def _request(self) -> Any:
        """This thread's own room for inputs and outputs."""
        if not hasattr(self._own, "request"):
            self._own.request = self._model.create_infer_request()
        return self._own.request


def _the_core() -> Any:
    with _CORE_LOCK:
        return _core()


@functools.cache
def _core() -> Any:
    """One for as long as the process lives.

    Its CPU plugin gives the thread that makes it a stack for signals and takes it away when it is destroyed, from
    whichever thread that happens. The main thread of a worker that swapped its release died of the next signal.
    """
    return openvino.Core()
