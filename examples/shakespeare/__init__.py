"""Shakespeare's plays as a federation: one genre bootstraps tier 1, speakers of the other genres are the devices."""
