"""CrossAttentionTopK: LVPruning's module scores visual rows by what the text asks, the k best are kept."""
