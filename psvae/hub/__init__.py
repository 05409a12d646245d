"""Weights on disk and on the Hub: one strict loader, one atomic writer, one card."""
