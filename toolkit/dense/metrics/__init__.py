"""Metrics for the `evaluate` package, loaded from these folders without the Hub."""
