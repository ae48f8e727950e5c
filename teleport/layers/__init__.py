"""What a layer is: rows times a matrix; which weights of a model can move.

`RULES` is the support matrix: asking for this package loads all rules, since those that register
themselves are imported here. `register` adds a line to it.
"""

from teleport.layers import attention, convolution, embedding, linear, recurrent
from teleport.layers.linear import LinearRule
from teleport.layers.part import DenseMap, LinearMap, ParameterSlice, Pieces
from teleport.layers.rule import RULES, LayerRule, register, rule_for

__all__ = [
    "RULES",
    "DenseMap",
    "LayerRule",
    "LinearMap",
    "LinearRule",
    "ParameterSlice",
    "Pieces",
    "attention",
    "convolution",
    "embedding",
    "linear",
    "recurrent",
    "register",
    "rule_for",
]
