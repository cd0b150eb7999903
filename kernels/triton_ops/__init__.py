"""The Triton kernels behind torch.ops.quantdit on CUDA. dispatch.py alone is imported without triton; it chooses, the others run.

Each file: reference -> shape signature -> kernel -> wrapper. A wrapper takes and returns what its op in kernels/ops.py does, runs
on CUDA tensors, and under TRITON_INTERPRET=1 on CPU tensors. Functions launched on a grid end in `_kernel`; those have
an interpreter test and rows in reports/bench/static.md.
"""
