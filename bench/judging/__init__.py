"""Whether a result is right, and how far from the truth. Imports cases."""
