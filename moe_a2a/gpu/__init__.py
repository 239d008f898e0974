"""GPU ranks of one domain: the masked path, made of the kernels in `moe_a2a.kernels`."""
