"""Initial values of recurrent layers and cells: see :mod:`fastseq.nn.init`."""

from .nn.init import chrono_, forget_gate_bias_, gate_bias_, identity_, orthogonal_

__all__ = ["chrono_", "forget_gate_bias_", "gate_bias_", "identity_", "orthogonal_"]
