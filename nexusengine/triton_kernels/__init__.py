"""Triton kernels, one concern a file, each with the function that launches it; `launch` says whether they can run.

Kernels take tensors and shapes and know nothing of backends or models. They run on CUDA, and on a CPU in Triton's
interpreter where TRITON_INTERPRET=1 was set before the first import: for checking numbers, not for use.
Imports torch and triton; `launch` imports triton only when asked.
"""
