"""The exceptions of this package. The native code defines them, so that both halves raise the same classes."""

from deep_ep_cpp import CudaError, Error, InternalError, InvalidArgument, TimeoutError, TransportError  # noqa: A004

__all__ = ["CudaError", "Error", "InternalError", "InvalidArgument", "TimeoutError", "TransportError"]
