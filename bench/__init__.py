"""Measurements. A family's file declares its shapes, bytes, flops and providers; run.py measures them, report.py writes them up.

The rooms, each importing only those before it: models (whole ones, in plain torch.nn), cases (what is measured, and who can
compute it), judging (whether a result is right), measuring (how long it takes), reporting (tables and plots), tuning (the
search for a kernel's configurations), suite (a GPU hour in one command). Family files import cases alone.
"""
