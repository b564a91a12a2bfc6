"""A CUDA device made of NumPy: compiled kernels run, and are checked, on a machine without a GPU."""
