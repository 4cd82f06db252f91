"""Packed weights: views of lent bytes with their scales, dequantised where they are multiplied."""
