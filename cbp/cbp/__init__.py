"""Continual Backprop: neural networks that never stop learning."""

# What there is says __init__.pyi. A name is imported when it is first used: for a specification alone nobody waits for
# torch.
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
