"""Places: where states live and how they move. `lanes` and `slabs` are what all of them are made of, `files`,
`records` and `vault` what keeps states on a disk."""
