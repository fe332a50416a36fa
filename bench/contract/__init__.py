"""The contract's figures F1 to F8, measured on the service as a process under load from other processes."""
