"""What is measured: a case of an op, who can compute it, and which choices of the kernels' tables it asks for.

Imports no other room of bench; the families' files, which import this one, are loaded by name.
"""
