"""Places: where states live and how they move. `lanes` and `slabs` are what all of them are made of."""
