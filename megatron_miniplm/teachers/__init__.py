"""Floor 4: where the teacher's opinion of a batch comes from; one file a source."""
