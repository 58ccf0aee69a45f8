"""What the kernels for NVIDIA GPUs share: what they run on, how they are found, what they read."""

from __future__ import annotations

import importlib
from abc import abstractmethod
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor

from .backend import Backend, deliver

# All of them move 16 bytes at a time: two-byte elements in eights, from addresses and strides that
# are multiples of that.
_VECTOR_BYTES = 16
_VECTOR_ELEMENTS = 8


class GpuBackend(Backend):
    """A kernel for NVIDIA GPUs that takes [B, S, H, D] views with any strides of B, S and H.

    Copies an input only if the kernel could not read it in place: head dim not contiguous, address
    or strides not multiples of 16 bytes, or rows, heads or samples expanded from one.
    """

    device_type: ClassVar[str] = "cuda"
    dtypes: ClassVar[frozenset[torch.dtype]] = frozenset({torch.bfloat16, torch.float16})
    has_lse: ClassVar[bool] = True
    # Compute capabilities that the kernel runs on, by their major number.
    majors: ClassVar[tuple[int, ...]]

    head_dim_multiple = _VECTOR_ELEMENTS

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.capability = capability_of(device)
        if self.capability[0] not in self.majors:
            known = ", ".join(f"{major}.x" for major in self.majors)
            major, minor = self.capability
            raise NotImplementedError(
                f"attention backend {self.name!r} runs on GPUs of compute capability {known}; "
                f"{device} has {major}.{minor}"
            )

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        into = out if out is not None and self._can_write(out, q.dtype) else None
        result, lse = self._attend(readable(q), readable(k), readable(v), scale, into)
        return deliver(result, out if into is None else None), lse

    @abstractmethod
    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`forward` for inputs that the kernel can read; `out` is given only if it can write it."""

    def _can_write(self, out: Tensor, dtype: torch.dtype) -> bool:
        return self.writes_out and out.dtype == dtype and is_readable(out)


def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability of an NVIDIA GPU.

    Raises:
        NotImplementedError: there is none that torch can use.
    """
    if torch.version.cuda is None or not torch.cuda.is_available():
        raise NotImplementedError(
            f"attention on {device} needs an NVIDIA GPU and torch built for CUDA; "
            f"torch {torch.__version__} finds none"
        )
    return torch.cuda.get_device_capability(device)


def load_module(module: str, *, backend: str, package: str, command: str) -> ModuleType:
    """Import the module that holds a kernel.

    Raises:
        ModuleNotFoundError: the package is not installed; names it and what installs it.
        ImportError: it is installed and does not import; names it and says why.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # Anything else that is missing is something that the package itself needs.
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise broken_package(error, backend=backend, package=package, command=command) from None
        raise ModuleNotFoundError(
            f"attention backend {backend!r} needs the package {package}, which is not installed: "
            f"{command}",
            name=module,
        ) from None
    except Exception as error:
        raise broken_package(error, backend=backend, package=package, command=command) from error


def broken_package(
    reason: Exception | str, *, backend: str, package: str, command: str
) -> ImportError:
    """The error for a package that is installed but of no use, with what may mend it."""
    if isinstance(reason, Exception):
        reason = f"{type(reason).__name__}: {reason}"
    return ImportError(
        f"attention backend {backend!r} cannot use the installed package {package} ({reason}); "
        f"to install it again: {command}"
    )


def readable(x: Tensor) -> Tensor:
    """x [B, S, H, D], or a copy if a kernel that loads 16 bytes at a time could not read it."""
    if is_readable(x):
        return x
    # The stride of a dim of size 1 means nothing, but kernels look at it: take one that fits.
    head_dim = x.shape[3]
    strides = [x.stride(dim) if x.shape[dim] > 1 else head_dim for dim in range(3)]
    view = x.as_strided(x.shape, (*strides, x.stride(3)))
    return view if is_readable(view) else x.clone(memory_format=torch.contiguous_format)


def is_readable(x: Tensor) -> bool:
    """Whether a kernel that loads 16 bytes at a time can read, or write, x [B, S, H, D]."""
    batch, rows, heads, dim = x.stride()
    aligned = (batch | rows | heads) % _VECTOR_ELEMENTS == 0 and x.data_ptr() % _VECTOR_BYTES == 0
    return dim == 1 and aligned and 0 not in (batch, rows, heads)
