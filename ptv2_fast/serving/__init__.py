"""The HTTP server over a bank of adapters, `ptv2-fast serve` (the extra serve)."""
