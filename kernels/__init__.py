"""Triton kernels of dispatch and combine for GPU ranks; installs as `moe_a2a.kernels`.

None is here yet: they arrive with the support of GPU ranks. CPU ranks need none.
"""
