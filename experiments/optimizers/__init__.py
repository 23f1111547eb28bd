"""What makes a step of gradients: PyTorch's optimizers, and the rivals that users would otherwise pick."""

from experiments.optimizers.make import MakesGradients, check_optimizer, make_optimizer

__all__ = ["MakesGradients", "check_optimizer", "make_optimizer"]
