"""Decoding that reads the weights of surviving features alone: `prepare_for_decode`, `restore`, and their parts."""
