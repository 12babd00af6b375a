"""What mask-slice-writes is made of: slices, positions that are data, and writes into constants."""
