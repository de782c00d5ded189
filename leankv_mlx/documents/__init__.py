"""Long documents: reading them, answering from them, summaries, and the cache that keeps them.

`readers` turns files, pages and stdin into text and needs no model; `isolated` has them parsed in a
process with limits. `reader` answers with a model, over prefixes that `prefix` opens from the files
of `cache`; `summary` does what `planning` decides.
"""
