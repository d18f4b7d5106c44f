"""The parts of a decoder: linear, norm, rotary, attention over the paged cache, mixture of experts, embedding and head."""
