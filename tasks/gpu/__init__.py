"""Tasks on several ranks; importing them needs torch, so no control image and no control task does."""
