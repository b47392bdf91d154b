"""Studies of the re-batching policies that time nothing here: their method has a document each."""
