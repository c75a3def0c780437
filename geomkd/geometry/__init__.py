"""One layer's sample as numbers: exact products, its Gram matrix, neighbours, principal axes."""
