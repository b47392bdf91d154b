"""Statements about every value of the data, checked on nvcc's PTX: see docs/proof.md."""
