"""Kernels that decode block-quantized matrices: plain jnp, Pallas for GPUs, Mosaic for TPUs."""
