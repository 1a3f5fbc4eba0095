"""Layer 2: under storages. `base` is the contract, one module per kind, `registry` finds them."""
