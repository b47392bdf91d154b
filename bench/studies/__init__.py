"""Studies of the re-batching policies by simulation; each method is described in a document."""
