"""
How fast a model could be at most: the speed of its matrix products alone, and of the device's fastest product.

The products are recorded while the model runs: linear layers, patch embedding, both products of attention, and in
training those of the backward pass. Then they run one after the other on memory that is allocated already, without
norms, activations, softmax, copies or allocation in between. Attention counts as two batched products.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map


aten = torch.ops.aten
# Operations that can write into allocated memory, and operations that cannot.
MATRIX_PRODUCTS = {op.default: op.out for op in (aten.mm, aten.addmm, aten.bmm, aten.baddbmm)}
CONVOLUTIONS = {aten.convolution.default, aten.convolution_backward.default}


@dataclass
class Product:
    """One recorded product, ready to run again: `function(*args, **kwargs)`."""

    function: Callable[..., Any]
    args: tuple
    kwargs: dict[str, Any]


class ProductRecorder(TorchDispatchMode):
    """
    Records the matrix products that run inside it. Weights stay the model's own, so that each is read from where the
    model reads it. All other operands become random tensors of the same shape, strides and type, which similar
    products share.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
        self.tensors: dict[tuple, torch.Tensor] = {}
        self.products: list[Product] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in MATRIX_PRODUCTS or function in CONVOLUTIONS:
            result = function(*args, **kwargs)
            self.record(function, args, kwargs, result)
            return result
        # `inference_mode` keeps composite functions whole, attention among them.
        with self:
            result = function.decompose(*args, **kwargs)
        return function(*args, **kwargs) if result is NotImplemented else result

    def record(self, function, args: tuple, kwargs: dict[str, Any], result: Any):
        operands = tuple(tree_map(partial(self.operand, position), arg) for position, arg in enumerate(args))
        if function in MATRIX_PRODUCTS:
            kwargs = {**kwargs, "out": self.operand("out", result)}
            function = MATRIX_PRODUCTS[function]
        self.products.append(Product(function, operands, kwargs))

    def operand(self, position: int | str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if value.untyped_storage()._cdata in self.weights:
            return value.detach()
        key = (position, value.shape, value.stride(), value.dtype)
        if key not in self.tensors:
            extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
            flat = torch.randn(extent, device=value.device).to(value.dtype)
            self.tensors[key] = flat.as_strided(value.shape, value.stride())
        return self.tensors[key]


@contextmanager
def plain_attention():
    """Computes attention as two products in the model's type; PyTorch would widen half precision."""
    widened = not torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(not widened)


def record_products(model: nn.Module, call: Callable[[], Any]) -> list[Product]:
    """The matrix products of `call`, in which `model` runs."""
    recorder = ProductRecorder(model)
    with plain_attention(), recorder:
        call()
    return recorder.products


@torch.inference_mode()
def run_products(products: list[Product]):
    for product in products:
        product.function(*product.args, **product.kwargs)


def square_product(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], Any], int]:
    """A matrix product large enough for the device's best speed, and its multiply-accumulates."""
    size = 8192 if device.type == "cuda" else 1536
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return partial(torch.mm, left, right, out=torch.empty_like(left)), size**3
