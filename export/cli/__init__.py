"""Commands that need the export extra: one module a verb."""
