"""A layer's array code, read by running it on arrays that record.

``record(layer, [(None, 64)])`` runs forward and backward at several batch sizes and returns what they do as two graphs of
named operations (``graph.py`` lists them), each with the line of the user's that it came from. ``check_replay`` runs the
graphs in NumPy and holds them against the layer. The targets (tfjs, onnx) write the same graphs as their own operations.

A branch at a size that no run reached (``if len(x) > 100``) is not seen; ``self.last = x`` is dropped.
"""

from gpulayers.export.recording._computed import computed
from gpulayers.export.recording._place import Place, Unrecordable
from gpulayers.export.recording._whole import Ran, called, called_back, spaced
from gpulayers.export.recording.graph import Formula, Graph, Node, Recording, authors_name, needed
from gpulayers.export.recording.record import record
from gpulayers.export.recording.replay import check_replay, from_generator

__all__ = [
    "Formula",
    "Graph",
    "Node",
    "Place",
    "Ran",
    "Recording",
    "Unrecordable",
    "authors_name",
    "called",
    "called_back",
    "check_replay",
    "computed",
    "from_generator",
    "needed",
    "record",
    "spaced",
]
