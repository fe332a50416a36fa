"""One report of how fast everything is, as ratios from one run on one machine: `lvm bench`."""
