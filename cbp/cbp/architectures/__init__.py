"""Networks that are built as modules of PyTorch, from the records of `cbp.spec.network_spec`."""
