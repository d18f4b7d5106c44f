"""Which pages of the cache hold what: page numbers only. The keys and values themselves live in `layers`."""
