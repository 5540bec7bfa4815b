"""What the end-to-end tests share: the store, the server, a raw NBD client and the models."""
