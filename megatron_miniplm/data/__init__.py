"""Floor 2: corpora, subsets, scores, tokenizers, packing and batches."""
