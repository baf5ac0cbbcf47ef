"""Measurements: one file per op family (shapes, bytes, flops, providers)."""
