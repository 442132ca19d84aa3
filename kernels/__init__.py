"""The Triton kernels (installed as fdistill_ops.kernels). Importing this package does not import triton."""
