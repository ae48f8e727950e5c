"""A closure as a graph cut at its layers: recorded once, run again for other weights and tangents.

`record` runs a closure and gives a `Tape`; the tape's backward pass serves any weights, and
`push_tangents` is its one forward-mode pass.
"""

from teleport.recording.capture import USED_OUTSIDE, record, watch
from teleport.recording.looks import Looks
from teleport.recording.replay import load_tangents, push_tangents
from teleport.recording.tape import Call, Formed, Tape, multiplications, recorded_basis

__all__ = [
    "USED_OUTSIDE",
    "Call",
    "Formed",
    "Looks",
    "Tape",
    "load_tangents",
    "multiplications",
    "push_tangents",
    "record",
    "recorded_basis",
    "watch",
]
