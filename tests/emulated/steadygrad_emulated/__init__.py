"""steadygrad's CUDA backend with its kernels emulated on the CPU: the interface of ``steadygrad._kernels``."""

from steadygrad_emulated._emulated import *  # noqa: F403
