"""The definitions: one file per op family, and in it each op's rule, plain forward and plain backward."""
