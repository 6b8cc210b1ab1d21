"""The files that the pipeline writes: path, schema, reader and writer of each."""
