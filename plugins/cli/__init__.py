"""Commands of this folder, one file a verb."""
