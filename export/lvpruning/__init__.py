"""LVPruning (arXiv 2501.13652): trained modules that score visual rows by the question, on a frozen base model."""
