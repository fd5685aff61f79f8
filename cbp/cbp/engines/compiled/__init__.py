"""Steps in code compiled by numba, on the CPU: kernels over one table of addresses, and the engine that drives them."""
