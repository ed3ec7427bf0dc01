"""The consistency study in parts: its grid, its measurements, their statistics, tables and plots."""
