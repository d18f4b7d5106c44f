"""`pointsman routes`: what a routing record says, for people: load of the experts, pictures of it, and where two records part."""
