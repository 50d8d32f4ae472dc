"""Decoding through the weights of surviving features alone: `prepare_for_decode`, `restore`, and what they stand on."""
